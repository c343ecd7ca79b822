"""foolbox's DeepFool beside fastsal's drop-in, torchattacks' and adv-lib's FAB beside `fastsal.fab`: time, memory, distance.

DeepFool is right if all images are the original's within 1e-4. FAB is where the mean distance is the original's within a
hundredth: it takes many steps, and now and then rounding decides which way one goes; torchattacks' and adv-lib's images, both
AutoAttack's, differ by as much. How many are the same is told. The peak memory is that of two steps.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor, nn

import fastsal
from bench.baselines import models
from bench.baselines.peers import PEERS, adv_lib
from bench.harness.case import QUICK, Case, Implementation, Work

NORMS = {"L2": 2, "Linf": torch.inf, "L1": 1}
SAME = 1e-4  # the largest difference of two images that count as the same
SAME_MEAN = 1e-2  # and of two mean distances, as a share
FAB_STEPS = {10: 10, 100: 10, 1000: 4}  # by the number of classes; 10 are torchattacks' default

Inputs = tuple[nn.Module, Tensor, Tensor]  # a model, images and labels
Attack = Callable[[Inputs], Tensor]


def digits_cnn() -> Inputs:
    """A CNN trained on scikit-learn's digits, and 64 images that it was not trained on."""
    from fastsal.study.data import load_digits

    data = load_digits(seed=0)
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.train.x), data.train.y).backward()
        optimizer.step()
    return model.eval(), data.test.x[:64], data.test.y[:64]


def untrained_cnn(classes: int, size: int, count: int) -> Inputs:
    """An untrained network and grey noise, labelled as the network sees it."""
    torch.manual_seed(0)
    model = models.cnn(classes, size).eval()
    x = 0.2 + 0.6 * torch.rand(count, 3, size, size)
    return model, x, model(x).argmax(1)


def subject(n: int, tiny: bool) -> Inputs:
    """What is attacked, of n classes: a CNN trained on digits, 8 images of 3×32×32, or 2 of 3×64×64."""
    if tiny:
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 12)).eval(), torch.rand(2, 3, 2, 2)
        return model, x, model(x).argmax(1)
    return {10: digits_cnn, 100: lambda: untrained_cnn(100, 32, 8), 1000: lambda: untrained_cnn(1000, 64, 2)}[n]()


def deepfool(module: ModuleType, norm: str, candidates: int | None, steps: int) -> Attack:
    """foolbox's, or the drop-in's, with as many candidates as given, None for all."""
    import foolbox

    attack = getattr(module, f"{norm}DeepFoolAttack")(candidates=candidates, steps=steps)
    return lambda given: attack.run(foolbox.PyTorchModel(given[0], bounds=(0, 1)), *given[1:])


def fab(norm: str, steps: int) -> Attack:
    """fastsal's."""
    return lambda given: fastsal.fab(given[0], given[1], labels=given[2], norm=NORMS[norm], steps=steps).adversarial


def torchattacks_fab(norm: str, steps: int) -> Attack:
    """A single run, which is what `attack(images, labels)` comes to, but that it fails with L1."""
    import torchattacks

    return lambda given: torchattacks.FAB(given[0], norm, steps=steps).attack_single_run(*given[1:])


def adv_lib_fab(norm: str, steps: int) -> Attack:
    """adv-lib's, which is AutoAttack's code, and leaves wrong images where they are as the others do."""
    with adv_lib() as attacks:
        return lambda given: attacks.fab(given[0], *given[1:], norm=float(NORMS[norm]), n_iter=steps)


def work(attack: str, norm: str, n: int, candidates: int | None, tiny: bool) -> Work:
    """fastsal, which ratios are relative to, the original that its images are compared with, and another."""
    if attack == "DeepFool":
        import foolbox

        from fastsal.integrations import foolbox as drop_in

        steps, makers = (
            50,
            {
                name: functools.partial(deepfool, module, norm, candidates)
                for name, module in (("fastsal", drop_in), ("foolbox", foolbox.attacks))
            },
        )
    else:
        known = {"torchattacks": torchattacks_fab, "adv-lib": adv_lib_fab}
        here = {name: make for name, make in known.items() if not PEERS[f"{name} FAB"].missing()}
        steps = FAB_STEPS[n]
        makers = {name: functools.partial(make, norm) for name, make in ({"fastsal": fab} | here).items()}
    given = model, x, y = subject(n, tiny)
    right = model(x).argmax(1) == y

    @functools.cache
    def original() -> Tensor:
        return list(makers.values())[1](steps)(given)

    def distances(images: Tensor) -> Tensor:
        fooled = right & (model(images).argmax(1) != y)
        return torch.linalg.vector_norm((images - x).flatten(1), NORMS[norm], dim=1)[fooled]

    def apart(images: Tensor) -> Tensor:
        return (images - original()).flatten(1).abs().amax(1)

    def check(images: Tensor) -> float:
        if attack == "DeepFool":
            return float(apart(images).max())
        mean, wanted = distances(images).mean(), distances(original()).mean()
        return float(((mean - wanted) / wanted).abs())

    def facts(images: Tensor) -> dict[str, float]:
        found = distances(images)
        return {
            "success": (len(found) / right.sum()).item(),
            "median distance": found.median().item(),
            "same images": (apart(images) <= SAME).float().mean().item(),
        }

    limit = SAME if attack == "DeepFool" else SAME_MEAN
    every = [
        Implementation(title, make(steps), check, limit, facts=facts, brief=make(2)) for title, make in makers.items()
    ]
    return Work([given], every)


def cases(quick: bool = False) -> Iterator[Case]:
    """Both attacks in every norm that they take, on 10, 100 and 1000 classes, and on one thread."""
    missing = {
        "DeepFool": "" if importlib.util.find_spec("foolbox") else "not installed (pip install foolbox)",
        "FAB": min(PEERS[f"{name} FAB"].missing() for name in ("torchattacks", "adv-lib")),
    }
    classes = list(FAB_STEPS)[: 1 if quick else None]
    kinds: list[tuple[str, str, int, int | None]] = [
        ("DeepFool", norm, n, few)
        for n in classes
        for norm in ("L2", "Linf")
        for few in ((10,) if n == 10 else (10, None))
    ]
    kinds += [("FAB", norm, n, None) for n in classes for norm in NORMS]
    for attack, norm, n, few in kinds:
        considered = f", {few or 'all'} candidates" if attack == "DeepFool" else ""
        yield Case(
            "integrations",
            f"{attack} {norm}{considered}, n = {n}",
            functools.partial(work, attack, norm, n, few),
            threads=(1,),
            budget=QUICK if quick else 40.0,
            memory=not quick,
            missing=missing[attack],
        )
