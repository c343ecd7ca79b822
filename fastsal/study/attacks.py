"""ρ from above: the smallest Euclidean perturbation that any of several attacks finds, and which attack that was."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.adversarial import deepfool, distances, predicted, to_boundary
from fastsal.files import extra

ATTACKS = ("DeepFool", "gradient line search", "PGD", "DDN", "FMN", "Carlini-Wagner")
BOX = 8.0  # far outside of [0, 1]: foolbox wants bounds, ρ has none


def _foolbox_attacks() -> dict[str, tuple[Any, bool]]:
    """foolbox's attack for every name but DeepFool, and whether it needs to be told how far to go."""
    attacks = extra("foolbox.attacks")
    return {
        "gradient line search": (attacks.L2FastGradientAttack(random_start=False), True),
        "PGD": (attacks.L2PGD(steps=25, rel_stepsize=0.1), True),
        "DDN": (attacks.DDNAttack(steps=200), False),
        "FMN": (attacks.L2FMNAttack(steps=100), False),
        # In the coordinates where the box is the whole space a step is as many times larger as the box is.
        "Carlini-Wagner": (attacks.L2CarliniWagnerAttack(binary_search_steps=6, steps=150, stepsize=0.05 / BOX), False),
    }


def robustness(
    model: nn.Module, x: Tensor, *, seed: int = 0, after_attack: Callable[[], None] = lambda: None
) -> Tensor:
    """Upper bounds of ρ(x) = inf {‖e‖₂ : the prediction at x + e is another}, for every image of x [B, *S] and attack.

    float64 [B, attacks] in the order of `ATTACKS`; +inf where an attack failed.

    Every attack starts from the model's own prediction, right or wrong, and may leave [0, 1]: ρ knows neither the true
    class nor a box. What it finds is moved along the segment to x as near to x as still errs. Deterministic for a seed.
    """
    model = copy.deepcopy(model).requires_grad_(False)  # foolbox's backward passes would fill the parameters' gradients
    prediction = predicted(model, x)
    scale = distances(x, torch.zeros_like(x), 2).median().item()
    found = {}
    cuda = [x.device] if x.is_cuda else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        found["DeepFool"] = [deepfool(model, x).adversarial]
        after_attack()
        foolbox_model = extra("foolbox").PyTorchModel(model, bounds=(-BOX, 1 + BOX), device=x.device)
        for name, (attack, needs_sizes) in _foolbox_attacks().items():
            sizes: list[float | None] = [None]
            if needs_sizes:
                sizes = [scale * 2.0**-halvings for halvings in range(7)]
            found[name] = attack(foolbox_model, x, prediction, epsilons=sizes)[0]
            after_attack()
    return torch.stack([_smallest(model, x, prediction, found[name]) for name in ATTACKS], 1)


def robustness_in_box(model: nn.Module, x: Tensor) -> Tensor:
    """The same, float64 [B], of perturbations that keep every pixel in [0, 1], as DDN alone finds it. Deterministic.

    The code that came with the paper attacks digits in this box. It takes only one attack here, since it is there to explain.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    prediction = predicted(model, x)
    foolbox_model = extra("foolbox").PyTorchModel(model, bounds=(0, 1), device=x.device)
    attack, _ = _foolbox_attacks()["DDN"]
    return _smallest(model, x, prediction, attack(foolbox_model, x, prediction, epsilons=[None])[0])


def _smallest(model: nn.Module, x: Tensor, prediction: Tensor, candidates: list[Tensor]) -> Tensor:
    """How near to x the nearest candidate with another prediction can be moved: float64 [B], +inf where there is none."""
    best, size = x, torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
    for candidate in (one.to(x.dtype) for one in candidates):
        errs = predicted(model, candidate) != prediction
        distance = torch.where(errs, distances(candidate, x, 2), math.inf)
        best = torch.where((distance < size).view(-1, *(1,) * (x.dim() - 1)), candidate, best)
        size = torch.minimum(size, distance)
    moved = distances(to_boundary(model, x, best, prediction), x, 2)
    return torch.where(size < math.inf, moved, size)
