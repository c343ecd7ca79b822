"""The one entry point: `python -m bench [LEVEL ...] [OPTIONS]` measures, `python -m bench COMMAND [OPTIONS]` does the rest."""

import importlib
import sys

# command -> the module whose main() reads the options, and what it does; anything else are levels to measure
COMMANDS = {
    "foils": ("bench.cases.foils", "the nearest other tokens of a trained Whisper, and what finding them takes"),
    "layers": ("bench.cases.layers", "margins at hidden layers, against cut networks"),
    "report": (
        "bench.report.page",
        "write docs/benchmarks.md and the pages behind it, the README's tables and the plots",
    ),
    "auto": ("bench.tools.auto", "passes and seconds of the default method from 10 to 10,000 classes"),
    "photographs": (
        "bench.tools.photographs",
        "EfficientNet-Lite0 to -Lite2 on photographs: the paper's quantities, saliency maps",
    ),
    "study_results": (
        "bench.tools.study_results",
        "copy a finished study's results and write its tables into docs/study.md",
    ),
    "study_experiments": ("bench.tools.study_experiments", "what changes the study's verdicts"),
    "gpu": ("bench.tools.gpu", "build, test, sanitize and measure on a GPU"),
    "triton_matrix": ("bench.tools.triton_matrix", "compile every Triton kernel without a GPU"),
}


def main() -> int:
    """Runs a command, or measures."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        command = arguments.pop(0)
        sys.argv = [f"python -m bench {command}", *arguments]
        return importlib.import_module(COMMANDS[command][0]).main() or 0
    sys.argv = ["python -m bench", *arguments]
    from bench.tools import run

    return run.main(COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
