"""The private names of torch that fastsal uses: what each is for, and what is done where a torch no longer has one.

Any of them may go with any release, so no other file imports such names. All but the first line's serve traces
(`fastsal.model.traced`): where one is missing, `MISSING` says which, nothing is traced, and products are taken in forward mode,
more slowly.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

# Takes lists, tuples and dicts apart, and whatever else libraries have registered there. It has no public name, and is what
# torch.func and torch.export themselves, and transformers, go by.
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

__all__ = ["MISSING", "is_zero", "no_fallback", "recorded", "tree_flatten", "tree_map", "tree_unflatten"]

MISSING = ""
try:
    # Lets every tracing step of one call share a fake mode: make_fx alone makes one a value, which takes three times as long.
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Records the operations of a function. `torch.export` refuses forward-mode derivatives.
    from torch.fx.experimental.proxy_tensor import make_fx

    # Whether vmap may take an operation without a rule one by one, with a line on the error output for each call.
    _may_loop, _let_loop = (getattr(torch._C._functorch, f"_{name}_vmap_fallback_enabled") for name in ("is", "set"))
    # Whether a tensor is the zero that forward mode puts in for a tangent that is not there.
    is_zero: Callable[[Tensor], bool] = Tensor._is_zerotensor
except (ImportError, AttributeError) as error:
    MISSING = f"torch {torch.__version__} lacks what traces need: {error}"


def recorded(function: Callable[..., Any], *given: Any) -> fx.GraphModule:
    """The operations of a function of tensors, without those in place.

    Raises:
        RuntimeError: Something is missing.
    """
    if MISSING:
        raise RuntimeError(MISSING)
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        graph: fx.GraphModule = make_fx(torch.func.functionalize(function))(*given)
        return graph


@contextlib.contextmanager
def no_fallback() -> Iterator[None]:
    """Inside, vmap raises where torch would take an operation one by one."""
    before = _may_loop()
    _let_loop(False)
    try:
        yield
    finally:
        _let_loop(before)
