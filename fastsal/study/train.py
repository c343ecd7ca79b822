"""Training a network as usual or robustified, with a checkpoint after every epoch, from which it resumes."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastsal.files import Blame, whole_file
from fastsal.study.data import Data, Split

PGD_STEPS = 7
# The share of epochs over which a radius grows. At its full size from the start, a network may learn nothing.
RAMP = 0.5
# The paper's code takes 200 epochs of MNIST's 60,000 digits at a rate of 1e-3, ten times less from epochs 80 and 160 on. Epochs
# here are few, and their rate is higher.
RATE, DROPS = 0.05, (0.4, 0.8)
SQUARED_WEIGHTS = 1e-6  # what the objective has of ‖w‖², over all parameters


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: with a `penalty` λ of double backpropagation, a `radius` ε of adversarial training, or neither.

    Double backpropagation (Drucker and LeCun, 1992) minimises the mean over examples of ℓ(x) + λ · ‖∇ℓ(x)‖₂², ℓ the
    cross-entropy of one example. (Layers that mix a batch's examples in training, such as BatchNorm, mix their gradients.)
    The code that came with the paper penalised the gradient of the mean over a batch of B examples, B² times smaller once
    squared, so that its λ is B² times ours: λ = 10 at B = 100 there is 1e-3 here.

    Adversarial training (Madry et al., 2018) minimises the mean of ℓ(x + e), e found by projected gradient ascent among
    ‖e‖₂ ≤ ε; ε grows from epoch to epoch over the first half of them.
    """

    penalty: float = 0.0
    radius: float = 0.0

    @property
    def training(self) -> str:
        return "double backpropagation" if self.penalty else "adversarial" if self.radius else "plain"

    @property
    def strength(self) -> float:
        return self.penalty or self.radius

    @property
    def name(self) -> str:
        """For the name of a file: penalty-0.1, radius-0.5 or plain."""
        return f"penalty-{self.penalty:g}" if self.penalty else f"radius-{self.radius:g}" if self.radius else "plain"

    @property
    def label(self) -> str:
        """For a reader: λ = 0.1, ε = 0.5 or plain."""
        return f"λ = {self.penalty:g}" if self.penalty else f"ε = {self.radius:g}" if self.radius else "plain"


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Images of 8 x 8 are not worth a second thread, and with one the numbers are the same on any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _lengths(x: Tensor) -> Tensor:
    """Euclidean norms [B, 1, ...], to divide x [B, *S] by; 1 where x is 0."""
    norms = torch.linalg.vector_norm(x.flatten(1), dim=1).view(-1, *(1,) * (x.dim() - 1))
    return torch.where(norms > 0, norms, 1.0)


def worst_nearby(model: nn.Module, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """x + e of high loss with ‖e‖₂ ≤ radius: projected gradient ascent from a random start, the model in evaluation mode."""
    training = model.training
    model.eval()
    start = torch.randn_like(x)
    e = radius * torch.rand(len(x), *(1,) * (x.dim() - 1), device=x.device) * start / _lengths(start)
    for _ in range(PGD_STEPS):
        e.requires_grad_()
        (ascent,) = torch.autograd.grad(cross_entropy(model(x + e), y, reduction="sum"), e)
        e = e.detach() + 2.5 * radius / PGD_STEPS * ascent / _lengths(ascent)
        e = e * (radius / _lengths(e)).clamp(max=1)
    model.train(training)
    return x + e


def objective(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe) -> Tensor:
    """What training minimises on a batch."""
    if recipe.radius:
        x = worst_nearby(model, x, y, recipe.radius)
    x = x.detach().requires_grad_(recipe.penalty > 0)
    losses = cross_entropy(model(x), y, reduction="none")
    if not recipe.penalty:
        return losses.mean()
    # No example's loss depends on another's input, so the sum's gradient holds each one's own.
    (gradient,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
    return losses.mean() + recipe.penalty * gradient.square().flatten(1).sum(1).mean()


def train(
    make: Callable[[], nn.Module],
    data: Data[Split],
    recipe: Recipe,
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    device: str = "cpu",
    checkpoint: Path | None = None,
    after_epoch: Callable[[], None] = lambda: None,
) -> nn.Module:
    """A trained network in evaluation mode, the same weights for the same seed, interrupted and resumed or not.

    checkpoint: where weights, optimizer and random state go after every epoch, from where a later call resumes.
    """
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []  # random states besides the CPU's
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        model = make().to(device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=2 * SQUARED_WEIGHTS)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(share * epochs) for share in DROPS])
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
        done = 0
        if checkpoint is not None and checkpoint.exists():
            with Blame(f"checkpoint {checkpoint}"):
                saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
                for name, part in parts.items():
                    part.load_state_dict(saved[name])
            torch.set_rng_state(saved["generator"])
            for one, state in zip(cuda, saved["cuda generators"], strict=True):
                torch.cuda.set_rng_state(state, one)
            done = saved["epochs"]
        for epoch in range(done, epochs):
            now = replace(recipe, radius=recipe.radius * min(1.0, (epoch + 1) / (RAMP * epochs)))
            for indices in torch.randperm(len(data.train)).split(batch_size):
                x, y = (part.to(device) for part in data.train.batch(indices))
                loss = objective(model, x, y, now)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
            if checkpoint is not None:
                state = {name: part.state_dict() for name, part in parts.items()}
                state |= {"epochs": epoch + 1, "generator": torch.get_rng_state()}
                state["cuda generators"] = [torch.cuda.get_rng_state(one) for one in cuda]
                # Whatever stood there was loaded as a checkpoint before.
                with Blame(f"checkpoint {checkpoint}"), whole_file(checkpoint) as file:
                    torch.save(state, file)
            after_epoch()
    return model.eval()
