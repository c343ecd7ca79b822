"""A model with all that it takes, from its input or from a layer on, as a function of one tensor."""

import contextlib
import copy
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastsal import validation
from fastsal.model.calling import Model, check_input
from fastsal.model.private import tree_flatten, tree_map, tree_unflatten

Examples = Tensor | slice


def _module(model: Any, layer: Any) -> tuple[str, nn.Module]:
    """The name and the module that a caller means by a layer of the model."""
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    # torch.compile puts a module into another one, which has a name of its own.
    modules = {name.replace("_orig_mod.", ""): module for name, module in modules.items()}
    if isinstance(layer, nn.Module):
        name = next((name for name, module in modules.items() if module is layer), "")
        if modules and modules.get(name) is not layer:
            raise ValueError(f"layer: got a {type(layer).__name__} that is no module of the model, wants one that is")
        return name or type(layer).__name__, layer
    if not isinstance(layer, str):
        raise TypeError(f"layer: got {type(layer).__name__}, wants a module of the model, or its name")
    if layer not in modules:
        near = difflib.get_close_matches(layer, modules) or [name for name in modules if name][:5]
        wants = (
            f"such as {', '.join(map(repr, near))}"
            if near
            else "or, of a model that is no nn.Module, the module itself"
        )
        raise ValueError(
            f"layer: got {layer!r}, which is no module's name, wants one of model.named_modules(), {wants}"
        )
    return layer, modules[layer]


@contextlib.contextmanager
def _hooked(layer: nn.Module, hook: Callable[[Any], Any]) -> Iterator[None]:
    """Lets a function see every output of a module inside, and replace it where it returns one."""
    handle = layer.register_forward_hook(lambda module, inputs, output: hook(output))
    try:
        yield
    finally:
        handle.remove()


def nonempty(given: Any) -> Any:
    """Tensors, in lists, tuples and dicts, of which each that has no entry in front gets one, of zeros."""

    def one(value: Any) -> Any:
        empty = isinstance(value, Tensor) and value.dim() > 0 and len(value) == 0
        return value.new_zeros(1, *value.shape[1:]) if empty else value

    return tree_map(one, given)


def _usable(value: Any) -> Any:
    """The same, as autograd can record it."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


class Function:
    """What a model computes from one tensor of each example: from its input x, or from what one of its layers makes of x.

    What it takes besides is fixed. Tensors with B entries in front belong to the examples, one entry each, and go with them
    wherever some of the examples are looked at; everything else is the same for all.

    Args:
        model: The model, as the caller passed it: it is called with (x, *args, **kwargs).
        x: The batch, [B, *S].
        args, kwargs: What the model takes after x. Tensors may lie in lists, tuples and dicts.
        layer: The module whose output is the tensor, or its name; None for x itself.

    Attributes:
        model, layer: As above, the layer as a module.
        name: What messages call the tensor.
    """

    def __init__(
        self,
        model: Model,
        x: Tensor,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        layer: nn.Module | str | None = None,
    ) -> None:
        if layer is None or not isinstance(x, Tensor) or x.dim() == 0:
            check_input(x)
        if not isinstance(args, tuple | list):
            raise TypeError(f"args: got {type(args).__name__}, wants a tuple of what the model takes after x")
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise TypeError(f"kwargs: got {type(kwargs).__name__}, wants a dict of what the model takes by name")
        self.model, self.layer, self.name = model, None, "x"
        if layer is not None:
            name, self.layer = _module(model, layer)
            self.name = f"the output of layer {name!r}"
        # Of a layer's output, x is one more of the things that are fixed.
        given = (tuple(args) if layer is None else (x, *args), dict(kwargs or {}))
        self._leaves, self._spec = tree_flatten(tree_map(_usable, given))
        of_examples = [isinstance(one, Tensor) and one.dim() > 0 and len(one) == len(x) for one in self._leaves]
        self._own = [slot for slot, own in enumerate(of_examples) if own]
        self._shared = [
            slot for slot, one in enumerate(self._leaves) if isinstance(one, Tensor) and not of_examples[slot]
        ]
        self.x: Tensor = _usable(x)
        self._plain = layer is None and not args and not kwargs

    @property
    def own(self) -> list[Tensor]:
        """The tensors that belong to the examples, [B, ...] each."""
        return [self._leaves[slot] for slot in self._own]

    @property
    def shared(self) -> list[Tensor]:
        """The other tensors."""
        return [self._leaves[slot] for slot in self._shared]

    def start(self) -> Tensor:
        """Where the examples are: x, or what the layer makes of it, which takes one run of the model; [B, *S].

        Raises:
            TypeError: The layer returns no tensor of floating dtype.
            ValueError: It runs several times or not at all, or returns no entry for each example.
        """
        if self.layer is None:
            return self.x
        found: list[Any] = []
        # A clone, since what comes after the layer may overwrite its output.
        with _hooked(self.layer, lambda output: found.append(tree_map(_copied, output))):
            self._call(self.model, self._leaves)
        if len(found) != 1:
            raise ValueError(
                f"layer: {self.name} comes {len(found)} times in a forward pass, wants a module that runs once"
            )
        output = found[0]
        if not isinstance(output, Tensor):
            raise TypeError(f"layer: {self.name} is a {type(output).__name__}, wants a module that returns one tensor")
        if not output.is_floating_point():
            raise TypeError(f"layer: {self.name} has dtype {output.dtype}, wants one of floating-point numbers")
        validation.device(self.name, output)
        if output.dim() == 0 or len(output) != len(self.x) or 0 in output.shape[1:]:
            raise ValueError(
                f"layer: {self.name} has shape {tuple(output.shape)}, wants [B, *S] with B = {len(self.x)} in front"
            )
        return output

    def at(self, examples: Examples | None = None) -> Model:
        """The function at some of the examples, int64 [e] or a slice, or at all: from [e, *S] to what the model returns."""
        if self._plain:
            return self.model
        own = self.own if examples is None else [one[examples] for one in self.own]
        return lambda value: self.run(self.model, value, own, self.shared)

    def run(self, model: Callable[..., Any], value: Tensor, own: Sequence[Tensor], shared: Sequence[Tensor]) -> Any:
        """Calls a model that stands for this one, with other tensors in the place of its own."""
        leaves = list(self._leaves)
        for slot, one in zip((*self._own, *self._shared), (*own, *shared), strict=True):
            leaves[slot] = one
        if self.layer is None:
            return self._call(model, leaves, value)
        with _hooked(self.layer, lambda output: value):
            return self._call(model, leaves)

    def _call(self, model: Callable[..., Any], leaves: list[Any], *value: Tensor) -> Any:
        args, kwargs = tree_unflatten(leaves, self._spec)
        return model(*value, *args, **kwargs)

    def twin(self, memo: dict[int, Any] | None = None) -> "Function":
        """The same function of a copy of the model, of which `memo` says what it shares, as `copy.deepcopy` takes it."""
        twin = copy.copy(self)
        twin.model, twin.layer = copy.deepcopy((self.model, self.layer), memo)
        return twin

    def doubled(self) -> "Function":
        """The same in float64, for a model that is an `nn.Module`."""
        twin: Any = self.twin()
        twin.model.double()
        twin._leaves = [
            one.double() if isinstance(one, Tensor) and one.is_floating_point() else one for one in self._leaves
        ]
        return twin  # type: ignore[no-any-return]

    def kind(self) -> tuple[Any, ...]:
        """What has to be the same for two functions of a model to have the same operations, as far as one can tell."""
        plain = bool | int | float | str | None

        def told(slot: int, one: Any) -> Any:
            if isinstance(one, Tensor):
                return one.shape[slot in self._own :], one.dtype
            return one if isinstance(one, plain) else type(one)

        # Before torch 2.7 the spec itself has no hash.
        return self.name, repr(self._spec), *(told(slot, one) for slot, one in enumerate(self._leaves))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
