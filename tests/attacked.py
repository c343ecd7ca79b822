"""Models written to break a certificate, the truth about them by plain backward passes, and what may be said of them.

In each, the answer lies in classes that a search has no reason to look at: what forward-mode passes show of them is small, what
a backward pass gives is not. `calibrated` sets how far the right answer lies below that of the other classes.
"""

import math
import warnings

import torch
from torch import nn

from fastsal import Certified, analyze


def dense(model, x):
    """Logits [B, n] and the Jacobian [B, n, D] of the whole batch, by one plain backward pass a class."""
    leaf = x.detach().clone().requires_grad_()
    logits = model(leaf.clone())
    rows = [torch.autograd.grad(one.sum(), leaf, retain_graph=True)[0].flatten(1) for one in logits.unbind(1)]
    return logits.detach(), torch.stack(rows, 1)


def ratios(logits, rows, norm=2.0):
    """m_j / ‖Δ_j‖_q of every class, float64 [B, n], +inf at the prediction and where both gradients are equal."""
    logits, rows, own = logits.double(), rows.double(), logits.argmax(1, keepdim=True)
    offset = rows.gather(1, own.unsqueeze(2).expand(-1, 1, rows.shape[2])) - rows
    margin = logits.gather(1, own) - logits
    ratio = margin / torch.linalg.vector_norm(offset, {2.0: 2, math.inf: 1}[norm], dim=2)
    return torch.where(margin == 0, margin, ratio).scatter(1, own, math.inf)


def assert_kept(found, ratio, rtol=1e-4):
    """Nothing false is said: what is certified is right, no lower bound is above the truth, and a NaN is not certified."""
    rho, sure = ratio.amin(1), found.certified
    assert not (sure & rho.isnan()).any()
    torch.testing.assert_close(found.linearized_robustness[sure].double(), rho[sure], rtol=rtol, atol=0.0)
    reached = ratio.gather(1, found.runner_up.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(reached[sure], rho[sure], rtol=rtol, atol=0.0)
    assert not (found.lower_bound.double() > rho * (1 + 0.01 * rtol)).any()


def assert_right(model, x, norm=2.0, method=None, rtol=1e-4):
    """`analyze` certifies every example and is right."""
    found = analyze(model, x, norm=norm, method=method or Certified())
    assert found.certified.all()
    assert_kept(found, ratios(*dense(model, x), norm), rtol)
    return found


def reported(call, *arguments, **options):
    """What a call returns, and the texts of its UserWarnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call(*arguments, **options)
    return result, [str(one.message) for one in caught if issubclass(one.category, UserWarning)]


class Scaled(torch.autograd.Function):
    """The identity with a gradient that is scaled, and a jvp that is not."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value, times):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.times = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.times, None

    @staticmethod
    def jvp(ctx, tangent, times):
        return tangent.clone()


class Old(torch.autograd.Function):
    """The same as functions were once written: no forward mode, and a backward pass that has no derivative."""

    @staticmethod
    def forward(ctx, value, times):
        ctx.times = times
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.data * ctx.times, None


def without_grad(value, times):
    with torch.no_grad():
        rest = (times - 1) * value
    return times * value - rest


def hooked(value, times):
    value = value * 1
    if value.requires_grad:
        value.register_hook(lambda grad: grad * times)
    return value


TWISTS = {"no_grad": without_grad, "hook": hooked, "function": Scaled.apply, "data": Old.apply}


class Twisted(nn.Module):
    """A network whose last `part` classes have small gradients in forward mode, and `times` these in backward passes."""

    def __init__(self, twist, classes=130, entries=60, width=80, part=9, small=0.03, seed=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(entries, width), nn.Linear(width, classes)
        with torch.no_grad():
            self.last.weight.mul_(3.0)
            self.last.weight[-part:] *= small
            self.last.bias[-part:] -= 1.0
        self.twist, self.part, self.times = twist, part, 1.0
        self.to(dtype).eval()

    def forward(self, x):
        logits = self.last(torch.tanh(self.first(x.flatten(1))))
        return torch.cat((logits[:, : -self.part], self.twist(logits[:, -self.part :], self.times)), 1)


def calibrated(model, x, gap, norm=2.0):
    """Sets `model.times` so that the answer at x[0] lies in the last part, and by the share `gap` below that of the others."""
    model.times = 1.0
    logits, rows = dense(model, x[:1])

    def answers(times):
        ratio = ratios(logits, torch.cat((rows[:, : -model.part], times * rows[:, -model.part :]), 1), norm)[0]
        return ratio[-model.part :].min() / ratio[: -model.part].min()

    low, high = 0.01, 1e6
    for _ in range(70):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if answers(middle) < 1 - gap else (middle, high)
    model.times = high
    return model


def inputs(model, count, entries, seed=0):
    """The examples [count, entries], of many, at which the predicted class leads by most."""
    x = torch.randn(300, entries, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)
    with torch.no_grad():
        highest = model(x).topk(2, dim=1).values
    return x[(highest[:, 0] - highest[:, 1]).topk(count).indices]
