"""ρ from above: the smallest Euclidean perturbation that any of several attacks finds, and which attack that was."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.adversarial import distances, predicted, to_boundary
from fastsal.files import extra

CHEAP = ("gradient line search", "iterative", "DeepFool")  # on every image, and of these ρ is the smallest
DEAR = ("Carlini-Wagner", "DDN")  # on a few images, to see how much smaller ρ is
ATTACKS = CHEAP + DEAR
BOX = (0.0, 1.0)
EVERYWHERE = (-8.0, 9.0)  # foolbox wants bounds, and these are far outside of [0, 1]
STEPS = {"iterative": 10, "Carlini-Wagner": 60, "DDN": 50}
SHRINKING, SIZES = 0.6, 5  # how far an attack that must be told goes: ‖x‖ times powers of this, so many


def _attack(name: str, width: float) -> tuple[Any, bool]:
    """foolbox's attack in a box so wide, and whether it needs to be told how far to go."""
    if name == "DeepFool":
        return extra("fastsal.integrations.foolbox", "foolbox").L2DeepFoolAttack(), False
    attacks = extra("foolbox.attacks")
    if name == "gradient line search":
        return attacks.L2FastGradientAttack(random_start=False), True
    if name == "iterative":
        return attacks.L2BasicIterativeAttack(random_start=False, steps=STEPS[name], rel_stepsize=0.25), True
    if name == "DDN":
        return attacks.DDNAttack(steps=STEPS[name]), False
    # A black pixel lies where tanh is flat, as far from 0 as 7: shorter steps stay there. They are as long in any box.
    options = {"binary_search_steps": 4, "initial_const": 1.0, "stepsize": 0.25 / width}
    return attacks.L2CarliniWagnerAttack(steps=STEPS[name], **options), False


def nearest_found(
    model: nn.Module, x: Tensor, attack: str, *, bounds: tuple[float, float] = BOX
) -> tuple[Tensor, Tensor]:
    """The nearest image with another prediction that an attack finds within bounds, for every image of x [B, *S].

    Every attack starts from the model's own prediction, right or wrong, since ρ does not know the true class. What it finds is
    moved along the segment to x as near to x as still errs. Deterministic.

    Returns:
        The images [B, *S], x itself where the attack failed, and their distances to x, float64 [B], upper bounds of
        ρ(x) = inf {‖e‖₂ : the prediction at x + e is another}, and +inf there.
    """
    model = copy.deepcopy(model).requires_grad_(False)  # foolbox's backward passes would fill the parameters' gradients
    prediction = predicted(model, x)
    method, needs_sizes = _attack(attack, bounds[1] - bounds[0])
    largest = distances(x, torch.zeros_like(x), 2).median().item()
    sizes = [largest * SHRINKING**k for k in range(1, 1 + SIZES)] if needs_sizes else [None]
    foolbox_model = extra("foolbox").PyTorchModel(model, bounds=bounds, device=x.device)
    best, size = x, torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
    with torch.random.fork_rng(
        devices=[x.device] if x.is_cuda else []
    ):  # foolbox draws numbers, even to leave them unused
        candidates = method(foolbox_model, x, prediction, epsilons=sizes)[0]
    for candidate in candidates:
        errs = predicted(model, candidate) != prediction
        distance = torch.where(errs, distances(candidate, x, 2), math.inf)
        best = torch.where((distance < size).view(-1, *(1,) * (x.dim() - 1)), candidate, best)
        size = torch.minimum(size, distance)
    best = to_boundary(model, x, best, prediction)
    return best, torch.where(size < math.inf, distances(best, x, 2), size)
