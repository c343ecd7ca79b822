"""What the results of a data set depend on, so that a change is noticed: a hash of the model, one of the data, the options."""

import hashlib
import importlib.metadata
import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.evaluation.batches import Batches
from fastsal.evaluation.shards import Record
from fastsal.model.calling import Model

SAMPLED = 8  # examples that the data are known again by
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def _digest(*tensors: Tensor) -> bytes:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def model_fingerprint(model: Model) -> tuple[str, dict[str, str]]:
    """A module's name with a hash of its text, and hashes of its parameters and buffers; of another callable the name only."""
    if not isinstance(model, nn.Module):
        return f"{model.__module__}.{getattr(model, '__qualname__', type(model).__qualname__)}", {}
    text = hashlib.sha256(_ADDRESS.sub("", repr(model)).encode()).hexdigest()
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return f"{type(model).__name__} {text[:8]}", {name: _digest(tensor).hex()[:8] for name, tensor in named}


def data_fingerprint(batches: Batches, names: Sequence[str] | None) -> str:
    """A hash of eight examples, evenly spread, and of all names."""

    def content(index: int) -> bytes:
        try:
            x, y = batches.example(index)
        except Exception:
            return b"unreadable"
        return _digest(x) + str(y).encode()

    sample = sorted({index * (batches.examples - 1) // (SAMPLED - 1) for index in range(SAMPLED)})
    if content(sample[0]) != content(sample[0]):
        raise ValueError("data: example 0 is not the same when read twice, wants data without random augmentation")
    digest = hashlib.sha256(b"".join(map(content, sample)))
    digest.update("\n".join(names or ()).encode())
    return digest.hexdigest()[:16]


def _name(model: Model, layer: nn.Module) -> str:
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return next((name for name, module in modules if module is layer), type(layer).__name__)


def made_from(
    model: Model, batches: Batches, names: Sequence[str] | None, options: dict[str, Any], keep: Sequence[str] = ()
) -> Record:
    """What the results depend on, each part under the name that a message calls it by."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    device = "cpu" if parameter is None else parameter.device.type
    text, tensors = model_fingerprint(model)
    # Which layer, classes and target, where any is chosen.
    chosen: Record = {name: options[name] for name in ("layer", "target", "classes") if name in options}
    if isinstance(layer := chosen.get("layer"), nn.Module):
        chosen["layer"] = _name(model, layer)
    if "classes" in chosen:
        chosen["classes"] = _digest(chosen["classes"]).hex()[:16]
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
    return {
        "fastsal": importlib.metadata.version("fastsal"),
        "model": text,
        "parameters": tensors,
        "data": data_fingerprint(batches, names),
        "examples": batches.examples,
        "norm": f"{options['norm']:g}",
        "method": _ADDRESS.sub("", repr(options["method"])),
        "batch_size": batches.size,
        "chunk_size": options["chunk_size"],
        "backend": options["backend"],
        "keep": sorted(keep),
        "device": device,
        "autocast": autocast,
        **chosen,
    }
