"""A function of a batch at some of its examples, and whether it is one."""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastsal.model.calling import Model, call
from fastsal.model.chunking import first_line, is_out_of_memory
from fastsal.model.function import Examples, Function

# Logits of an example in batches of different sizes differ by a few units of rounding, on 27 families of timm.
ROUNDING = 200.0  # units
COARSEST = 0.05  # share of a logit, where units of rounding are large
EXACT = 1e-8  # share of a logit, in float64
SHRINK = 1e-3  # share of a difference that may be left in float64; of one that is rounding in float32, 2e-9 is
GROSS = 0.01  # share of a logit that rounding seldom explains
FIRST = 3  # examples of a batch that are run alone, at most: an odd number, so that what is mixed in pairs shows


def apart(one: Tensor, other: Tensor) -> float:
    """How far logits [B, n] are apart, relative to the size of each, or of an example's two highest; inf for one NaN.

    Logits that a mask has made large and negative are no measure of the others.
    """
    size = torch.where(other.isfinite(), other, 0.0).double().abs()
    highest = size.gather(1, other.nan_to_num(-math.inf).topk(2).indices).amax(1, keepdim=True)
    distance = (one.double() - other.double()).abs() / torch.maximum(size, highest)
    same = (one == other) | (one.isnan() & other.isnan())
    return float(torch.where(same, 0.0, distance.nan_to_num(math.inf)).max())


def mixed_examples(how: str) -> ValueError:
    """The error for a model that mixes the examples of a batch."""
    return ValueError(
        f"model: mixes the examples of a batch ({how}), wants each example's logits computed from that example alone; "
        "normalise with stored statistics, or pass the examples one at a time"
    )


def in_precision(x: Tensor, autocast: tuple[bool, torch.dtype]) -> torch.autocast:
    """The autocast state of a caller, for running a model at x again."""
    enabled, dtype = autocast
    return torch.autocast(x.device.type, dtype=dtype, enabled=enabled, cache_enabled=False)


class Batch:
    """A model and the batch that it is asked about.

    Passes run some examples at a time, which not every model allows. One that mixes the examples of a batch is another model
    for a part of it. One that knows each example by its place (a closure over the masks of a batch) or wants a certain number
    of them has to see all, in their order: the examples that are asked for are then put into the batch that the caller passed.

    Args:
        function: The model, as a function of one tensor.
        x: Where the batch is, [B, *S].
        autocast: Whether the caller's autocast is on, and its dtype.

    Attributes:
        whole: Whether the model has to see the whole batch.
        first: The logits of the first examples of the batch, run alone, if they are known.
    """

    def __init__(self, function: Function, x: Tensor, autocast: tuple[bool, torch.dtype]) -> None:
        self.function, self.x, self.whole, self._autocast = function, x, False, autocast
        cut = min(FIRST, len(x) // 2 | 1)
        self._parts = slice(0, cut), slice(cut, len(x))
        self.first: Tensor | None = None
        self._logits: Tensor | None = None
        # Whether runs are made as for gradients: a model may take another way without, or fail.
        self._as_recorded = False
        # Until differences have turned out to be rounding, or the whole batch to take too much memory.
        self._checks = True
        parameters = function.model.parameters() if isinstance(function.model, nn.Module) else ()
        dtypes = {value.dtype for value in (x, *parameters) if value.dtype.is_floating_point}
        self._eps = max(torch.finfo(dtype).eps for dtype in dtypes | ({autocast[1]} if autocast[0] else set()))

    @property
    def n(self) -> int:
        """How many classes there are."""
        if self.first is not None:
            return self.first.shape[1]
        if self._logits is None:
            self._logits = self._run()  # where the model fails, this is its error
        return self._logits.shape[1]

    def _run(self, examples: Examples | None = None, x: Tensor | None = None) -> Tensor:
        """The logits of some examples, or of all; with x [B, *S] in the place of the batch where that is given."""
        start = self.x if x is None else x
        start = (start if examples is None else start[examples]).detach().clone().requires_grad_(self._as_recorded)
        try:
            with torch.set_grad_enabled(self._as_recorded), in_precision(start, self._autocast):
                return call(self.function.at(examples), start.clone()).detach()
        except Exception as error:
            if self._as_recorded or is_out_of_memory(error):
                raise
            self._as_recorded = True  # a model may take gradients of its own
            try:
                return self._run(examples, x)
            except Exception:
                self._as_recorded = False  # that was not it
                raise

    def _in_parts(self) -> Tensor | None:
        """The logits of the batch, the first examples and the others run apart, [B, n]; None where that fails."""
        parts = [self.first] if self.first is not None else []
        try:
            return torch.cat(parts + [self._run(part) for part in self._parts[len(parts) :] if part.start < part.stop])
        except Exception as error:
            if not is_out_of_memory(error):
                self.fails_in_part(error)
            return None

    def _whole_logits(self) -> Tensor | None:
        """The model's logits at the whole batch, [B, n], run in the caller's order; None where memory does not allow it."""
        if self._logits is None and self._checks:
            try:
                self._logits = self._run()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._checks = False
            else:
                if self.first is not None:
                    self._agree(self.first, self._logits, torch.arange(len(self.first)))
        return self._logits

    def _check_whole(self, logits: Tensor) -> None:
        """Compares the logits of the whole batch with what is known of it: an earlier run, or else one of its parts."""
        known = self._logits
        if known is None:
            self._logits = logits
            known = self._in_parts()
        if known is not None and self._checks:
            self._agree(known, logits, slice(None))

    def record(self, call_at: Callable[[Model], Tensor], examples: Tensor | None, moved: bool) -> Tensor:
        """The logits of some examples, int64 [e], or of all, compared with what else is known of the batch.

        `call_at` runs a model at their inputs; where these have been moved from those of the batch, nothing is known of them.
        """
        if examples is None:
            logits = call_at(self.function.at())
            self._check_whole(logits.detach())
            return logits
        if not self.whole:
            try:
                logits = call_at(self.function.at(examples))
            except Exception as error:
                self.fails_in_part(error)
            else:
                whole = None if moved or not self._checks else self._whole_logits()
                if whole is None or (self._agree(logits.detach(), whole, examples) and not self.whole):
                    return logits
        return call_at(self.at(examples))

    def fails_in_part(self, error: Exception) -> None:
        """Takes note of an error that the model raised for a part of the batch."""
        if is_out_of_memory(error):
            raise error
        if self._logits is None:
            self._logits = self._run()  # where this fails as well, that is the error
        self._see_whole(f"fails for a part of the batch ({type(error).__name__}: {first_line(error)})")

    def allows(self, examples: Tensor) -> bool:
        """Whether the model can be run at some of the examples alone; takes note if it cannot."""
        try:
            self._run(examples)
        except Exception as error:
            self.fails_in_part(error)
        return not self.whole

    def at(self, examples: Tensor) -> Model:
        """The function at some examples, int64 [e]: from [e, *S] to logits [e, n]."""
        if not self.whole:
            return self.function.at(examples)
        return lambda inputs: call(self.function.at(), self.x.index_copy(0, examples, inputs))[examples]

    def _same(self, one: Tensor, other: Tensor) -> bool:
        return apart(one, other) <= min(ROUNDING * self._eps, COARSEST)

    def _agree(self, part: Tensor, logits: Tensor, examples: Tensor | slice) -> bool:
        """Whether logits of a part are those of the whole batch, up to rounding; else what follows is decided."""
        if not self._same(part, logits[examples]) and not self._as_recorded:
            self._as_recorded = True
            self._logits = logits = self._run()
            again = self._in_parts() if isinstance(examples, slice) else None
            part = part if again is None else again
        return self._same(part, logits[examples]) or self._explain(apart(part, logits[examples]), logits)

    def _mixes(self, logits: Tensor) -> bool:
        """Whether the logits of one part of the batch change where the other part has other inputs."""
        first, second = self._parts
        others = 0.5 * self.x.roll(1, 0)
        try:
            kept = [
                self._run(x=torch.cat((self.x[first], others[second])))[first],
                self._run(x=torch.cat((others[first], self.x[second])))[second],
            ]
        except Exception:  # user code, which may not take these inputs
            return False
        return not self._same(torch.cat(kept), logits)

    def _rounds(self, distance: float) -> bool | None:
        """Whether little of a distance of the parts from the whole batch is left in float64; None where that cannot be run."""
        if not isinstance(self.function.model, nn.Module):
            return None
        x = self.x.double()
        try:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                function = self.function.doubled()
                parts = torch.cat([call(function.at(part), x[part].clone()) for part in self._parts])
                return apart(parts, call(function.at(), x.clone())) <= min(EXACT, SHRINK * distance)
        except Exception:  # user code, which may be made for one precision
            return None

    def _see_whole(self, reason: str) -> None:
        if not self.whole:
            self.whole = True
            warnings.warn(
                f"model: {reason}; only whole batches are run, which takes longer. Where it knows the examples by their place, "
                "as a closure over the masks of a batch does, pass these by `args` or `kwargs`",
                stacklevel=2,
            )

    def _explain(self, distance: float, logits: Tensor) -> bool:
        """Finds out why the logits of a part are some distance apart from those of the whole batch; whether it is rounding.

        Raises where the model is random or mixes examples; else, and where it cannot tell, whole batches are run from now on.
        """
        if not self._same(self._run(), logits):
            raise ValueError(
                "model: two runs of the same batch have different logits (dropout as a function, or other random numbers); "
                "wants a function of x alone"
            )
        rounds = self._rounds(distance)
        if rounds:
            self._checks = False
            return True
        if self._mixes(logits) and (rounds is False or distance > GROSS):
            raise mixed_examples("the logits of an example change with the others beside it")
        self._see_whole("has other logits for a part of the batch than for the whole")
        return False
