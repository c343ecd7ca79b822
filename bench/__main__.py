"""The one entry point: `python -m bench [COMMAND] [OPTIONS]`."""

import importlib
import sys

# command -> the module whose main() reads the options, and what it does
COMMANDS = {
    "run": ("bench.tools.run", "measure, print tables, keep the figures; also without a command"),
    "report": ("bench.report.page", "write docs/benchmarks.md, the README's tables and the plots"),
    "certified": ("bench.cases.certified", "certified beside exact on trained networks of 1000 classes"),
    "imagenet": ("bench.cases.imagenet", "photographs and a network trained on ImageNet"),
    "zoo": ("bench.cases.zoo", "certified beside exact rows on timm's networks, one of every kind"),
    "photographs": ("bench.tools.photographs", "draw saliency maps of EfficientNet-Lite0 on photographs"),
    "study_experiments": ("bench.tools.study_experiments", "why alignment falls under strong adversarial training"),
    "gpu": ("bench.tools.gpu", "build, test, sanitize and measure on a GPU"),
    "triton_matrix": ("bench.tools.triton_matrix", "compile every Triton kernel without a GPU"),
}


def main() -> int:
    """Runs a command, or says which there are."""
    arguments = sys.argv[1:]
    if arguments in (["-h"], ["--help"]):
        print("python -m bench [COMMAND] [OPTIONS]; python -m bench COMMAND --help tells the options\n")
        print("\n".join(f"  {name:19}{what}" for name, (_, what) in COMMANDS.items()))
        return 0
    command = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "run"
    if command not in COMMANDS:
        print(f"python -m bench: got {command!r}, wants one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv = [f"python -m bench {command}", *arguments]
    return importlib.import_module(COMMANDS[command][0]).main() or 0


if __name__ == "__main__":
    sys.exit(main())
