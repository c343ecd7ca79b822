"""Peak memory of a model-level analysis beside that of a full Jacobian: `python -m bench.memory`.

A CNN with 1000 classes on 3×64×64 images, untrained (memory does not depend on the weights). Each contestant runs in a fresh
process; the figure is the growth of its peak resident set from just before the call to just after it.
"""

import argparse
import multiprocessing
import resource

import torch
from torch import Tensor, nn


def cnn(n: int) -> nn.Module:
    """Four strided convolutions and a linear head."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128), (128, 256)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 16, n)).eval()


def full_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """[B, n, D] by a loop of backward passes over the classes."""
    x = x.clone().requires_grad_()
    logits = model(x)
    rows = [torch.autograd.grad(logits[:, j].sum(), x, retain_graph=True)[0] for j in range(logits.shape[1])]
    return torch.stack(rows, 1)


def run(name: str, batch: int, classes: int, queue: "multiprocessing.Queue[float]") -> None:
    """One contestant, in its own process: puts its peak in MiB into the queue."""
    import fastsal

    model, x = cnn(classes), torch.rand(batch, 3, 64, 64)
    with torch.no_grad():
        model(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name == "fastsal.analyze":
        fastsal.analyze(model, x)
    else:
        with torch.no_grad():
            logits = model(x)
        if name == "loop of autograd.grad":
            jacobian = full_jacobian(model, x)
        else:
            jacobian = torch.func.vmap(torch.func.jacrev(lambda one: model(one.unsqueeze(0))[0]))(x)
        fastsal.margin_geometry(logits, jacobian, x)
    queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--classes", type=int, default=1000)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    size = arguments.batch * arguments.classes * 3 * 64 * 64 * 4 / 2**20
    print(f"B = {arguments.batch}, n = {arguments.classes}, D = 12288: the Jacobian alone is {size:.0f} MiB")
    for name in ("fastsal.analyze", "loop of autograd.grad", "vmap(jacrev)"):
        queue = context.Queue()
        process = context.Process(target=run, args=(name, arguments.batch, arguments.classes, queue))
        process.start()
        process.join()
        print(f"{name:24} {queue.get(timeout=10):8.0f} MiB" if process.exitcode == 0 else f"{name:24} failed")


if __name__ == "__main__":
    main()
