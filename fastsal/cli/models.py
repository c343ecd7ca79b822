"""What --model and --weights mean: a network by name from timm or torchvision, or what your own code makes."""

import importlib
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.files import Blame, CommandError, extra
from fastsal.study.models import LIBRARIES, build

RANDOM = "random"
Transform = Callable[[Any], Tensor]


class Normalized(nn.Module):
    """A model behind its normalisation, (x − mean) / std for each channel: distances are then in units of the x before."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, x: Tensor) -> Tensor:
        """The logits of x [B, C, *S], or of x [B, *S] with a single mean and std."""
        mean, std = (value.to(x).view(-1, *[1] * (x.dim() - 2)) for value in (self.mean, self.std))
        logits: Tensor = self.model((x - mean) / std)
        return logits

    def extra_repr(self) -> str:
        """What is printed beside the name."""
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}"


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, and how it wants its images: a transform of PIL's that gives [C, H, W] in [0, 1], or None."""

    model: nn.Module
    transform: Transform | None
    note: str


def _timm(timm: Any, network: str, model: nn.Module) -> tuple[Transform, Sequence[float], Sequence[float]]:
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config | {"mean": (0.0,), "std": (1.0,)}, is_training=False)
    return transform, config["mean"], config["std"]


def _torchvision(models: Any, network: str, model: nn.Module) -> tuple[Transform, Sequence[float], Sequence[float]]:
    transforms = models.get_model_weights(network).DEFAULT.transforms
    own = transforms()
    return transforms(mean=(0.0,), std=(1.0,)), own.mean, own.std


def _named(name: str, weights: str | None) -> Loaded:
    library, _, network = name.partition(":")
    module = extra(LIBRARIES[library], library)
    try:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)  # untrained networks are the same in every process, and when a run resumes
            model = build(name, pretrained=weights is None)
    except CommandError as error:
        hint = "; --weights FILE needs no download" if weights is None else ""
        raise CommandError(f"{error}{hint}") from error
    with Blame(f"--model {name}"):
        transform, mean, std = (_timm if library == "timm" else _torchvision)(module, network, model)
    if weights not in (None, RANDOM):
        load_weights(model, Path(weights or ""))
    digits = ", ".join(f"{value:g}" for value in mean), ", ".join(f"{value:g}" for value in std)
    note = (
        f"distances are in pixels in [0, 1]: the normalisation of {name}, mean {digits[0]} and standard deviation "
        f"{digits[1]}, is part of the model"
    )
    return Loaded(Normalized(model, mean, std).eval(), transform, note)


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def _own(name: str, weights: str | None, mean: Sequence[float] | None, std: Sequence[float] | None) -> Loaded:
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise CommandError(f"--model {name}: wants package.module:name, timm:NAME or torchvision:NAME")
    with Blame(f"--model {name}"):
        found = attrgetter(attribute)(importlib.import_module(module_name))
        makes = callable(found) and not isinstance(found, nn.Module)
        model = found() if makes else found
    if not isinstance(model, nn.Module):
        raise CommandError(f"--model {name}: gives {type(model).__name__}, wants a torch.nn.Module")
    if weights == RANDOM:
        raise CommandError(
            f"--weights {RANDOM}: is for timm:NAME and torchvision:NAME; leave it out, and your code decides"
        )
    if weights is not None:
        load_weights(model, Path(weights))
    elif makes and not _same_weights(model, found()):
        warnings.warn(
            f"--model {name}: is untrained, with other weights each time it is made; --weights FILE loads some",
            stacklevel=2,
        )
    note = "distances are in units of the data as the model takes them"
    if mean is not None or std is not None:
        mean, std = mean or [0.0], std or [1.0]
        if len(mean) != len(std) and 1 not in (len(mean), len(std)):
            raise CommandError(f"--std: got {len(std)} numbers, wants as many as --mean, {len(mean)}")
        if 0 in std:
            raise CommandError("--std: got 0, wants what to divide by")
        model = Normalized(model, mean, std)
        note = "distances are in units of the data before --mean and --std, which are part of the model"
    return Loaded(model.eval(), None, note)


def load(name: str, weights: str | None, mean: Sequence[float] | None, std: Sequence[float] | None) -> Loaded:
    """The model of this name: `timm:NAME`, `torchvision:NAME`, or a module or what makes one at `package.module:name`."""
    if name.partition(":")[0] not in LIBRARIES:
        return _own(name, weights, mean, std)
    if mean is not None or std is not None:
        raise CommandError(f"--mean, --std: {name} brings its own normalisation")
    return _named(name, weights)


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a .safetensors file, or a torch file that holds a state_dict and no more; nothing is unpickled."""
    with Blame(f"--weights {path}"):
        if path.suffix == ".safetensors":
            state = extra("safetensors.torch").load_file(path)
        else:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                raise CommandError(
                    f"--weights {path}: is no torch file of tensors alone; save model.state_dict(), or a .safetensors file"
                ) from None
        if not isinstance(state, dict):
            raise CommandError(f"--weights {path}: holds {type(state).__name__}, wants a state_dict")
        model.load_state_dict(state)
