"""Captum's Saliency by fastsal: with no target that of the predicted class, or that of the nearest boundary.

from captum.attr import Saliency                                      # before
from fastsal.integrations.captum import MarginSaliency as Saliency    # after
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsal import methods, validation
from fastsal.adversarial import nearest_boundary
from fastsal.integrations import Logits, peer
from fastsal.methods.base import Question
from fastsal.model.linearization import linearize

with peer("captum", "captum"):
    from captum import attr
    from captum.log import log_usage

__all__ = ["MarginSaliency"]

Inputs = Tensor | tuple[Tensor, ...]


class MarginSaliency(attr.Saliency):
    """Captum's Saliency, for which the target may be left out, and g† for which it has no name.

    Without a target it is g, the gradient of the predicted logit, at the cost of Captum's own; with `binarized` g†, that of the
    logit minus that of the runner-up, whose boundary is the nearest, at the cost of one `fastsal.analyze`. A target takes the
    place of the predicted class. Wherever Captum takes an attribution method, it takes this one.

    Args:
        forward_func: As in Captum: the model, or any function of its inputs. With `binarized`, logits [B, n] or one score for
            each example, and a model in evaluation mode.
        binarized: Whether to return g† instead of g.
        norm: The p of the perturbation that the nearest boundary is measured by: 2 (default), 1, `math.inf` or "inf".
        method: How it is found: "auto" (default) or any method of `fastsal.analyze`.

    >>> import torch
    >>> linear = torch.nn.Linear(2, 3, bias=False).requires_grad_(False).eval()
    >>> _ = linear.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]]))
    >>> x = torch.tensor([[3.0, 4.0]], requires_grad=True)
    >>> MarginSaliency(linear).attribute(x).tolist()
    [[0.0, 2.0]]
    >>> MarginSaliency(linear, binarized=True).attribute(x, abs=False).tolist()
    [[-1.0, 2.0]]
    """

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        *,
        binarized: bool = False,
        norm: float | str = 2,
        method: str | methods.Method = "auto",
    ) -> None:
        super().__init__(forward_func)
        self.binarized, self.norm = binarized, validation.norm(norm)
        self.method = methods.resolve(method, self.norm)

    @log_usage(part_of_slo=True)  # type: ignore[untyped-decorator]  # Captum's NoiseTunnel looks for what it wraps
    def attribute(
        self, inputs: Inputs, target: Any = None, abs: bool = True, additional_forward_args: Any = None
    ) -> Inputs:
        """The saliency map of every example, shaped like the inputs; by default its absolute values.

        Args:
            inputs: Tensors [B, *S], one or a tuple of them. With several, boundaries are measured in all of them together.
            target: Captum's: a class, or one for each example. None (default) for the predicted one.
            abs: Whether to return absolute values.
            additional_forward_args: Captum's: what `forward_func` takes besides the inputs.
        """
        parts = inputs if isinstance(inputs, tuple) else (inputs,)
        further = () if additional_forward_args is None else additional_forward_args
        further = further if isinstance(further, tuple) else (further,)
        if self.binarized:
            rows = self._binarized(parts, target, further)
            maps = tuple(row.abs() if abs else row for row in rows)
            return maps if isinstance(inputs, tuple) else maps[0]
        if target is None:
            with torch.no_grad():
                output = self.forward_func(*parts, *further)
            if output.dim() == 2 and output.shape[1] > 1:
                target = output.argmax(1)
        saliency: Inputs = super().attribute(inputs, target, abs, additional_forward_args)
        return saliency

    def _binarized(self, parts: tuple[Tensor, ...], target: Any, further: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """g† as one tensor for each of the inputs, which fastsal sees side by side as one x [B, D]."""
        for part in parts:
            validation.floating("inputs", part)
        B = len(parts[0])

        def forward(x: Tensor, *args: Any) -> Tensor:
            return self.forward_func(*_separate(x, parts), *args)  # type: ignore[no-any-return]

        x = torch.cat([part.detach().reshape(B, -1) for part in parts], 1)
        with linearize(Logits(forward, self.forward_func), x, args=further) as graph:
            if target is not None:
                classes = torch.as_tensor(target, device=graph.x.device).reshape(-1)
                if len(classes) not in (1, B):
                    raise ValueError(f"target: got {len(classes)} classes for {B} examples, wants one, or one for each")
                target = classes.expand(B)
            selection, _, row = nearest_boundary(graph, self.method, Question(self.norm, target=target))
            validation.warn_probabilities(selection.logits)
        return _separate(row, parts)


def _separate(x: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The columns of x [b, D] as tensors [b, *S] of the shapes and dtypes of parts."""
    pieces = zip(x.split([part[0].numel() for part in parts], 1), parts, strict=True)
    return tuple(piece.reshape(-1, *part.shape[1:]).to(part.dtype) for piece, part in pieces)
