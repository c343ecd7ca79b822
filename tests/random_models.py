"""Random compositions of honest parts and of such that break a certificate, and what may be said of them."""

import math
import random

import torch
import torch.nn.functional as F
from attacked import TWISTS, dense, ratios, reported
from torch import nn

from fastsal import Certified, analyze

HONEST = ("linear", "tanh", "gelu", "relu", "softplus", "norm", "residual", "attention", "convolution", "pooled")
TRICKS = (
    "gate",  # a factor without gradient
    "own statistic",  # of the example, detached
    "straight-through",
    "quantised",
    *TWISTS,
    "underflow",
    "kink",  # PReLU, at zeros where the input has them
    "root",  # of zeros: NaN
)
MIXING = ("mean of the batch", "largest of the batch")

# What a model is made of: the choices of each property, of which a search draws one.
CHOICES = {
    "classes": (70, 90, 130, 200, 400),
    "entries": (5, 20, 60, 200),
    "batch": (1, 2, 3, 5),
    "width": (8, 24, 64),
    "blocks": (1, 2, 3, 4),
    "dtype": ("float32", "float32", "float64", "float64", "bfloat16"),
    "norm": (2.0, math.inf),
    "max_passes": (None, None, None, 20, 28, 40, 60),
    "input": ("normal", "normal", "zeros", "sparse"),
    "trick": (*TRICKS, "", "", "", *MIXING),
    "head": ("linear", "linear", "log-softmax", "masked", "sizes", "steered"),
    "part": (1, 1, 3, 9, 30),  # the last classes, which a twist is for
    "twist": (*TWISTS, "underflow", ""),
    "gap": (0.002, 0.02, 0.2, 0.7, 0.95),
    "traced": (False, True),
    "seed": range(1 << 30),
}


def drawn(seed):
    """The properties that a seed decides."""
    generator = random.Random(seed)
    return {name: generator.choice(choices) for name, choices in CHOICES.items()}


class Underflow(nn.Module):
    """Linear, through weights whose products underflow in float32 unless the last comes first."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.first = nn.Parameter(1e-21 * torch.randn(32, inputs))
        self.second = nn.Parameter(1e-27 * torch.randn(32, 32))
        self.third = nn.Parameter(2e37 * torch.randn(outputs, 32).clamp(-3, 3))

    def forward(self, x):
        return F.linear(F.linear(F.linear(x, self.first), self.second), self.third)


class Block(nn.Module):
    """From [B, width] to the same."""

    def __init__(self, kind, width):
        super().__init__()
        self.kind, self.width = kind, width
        self.layer = {
            "norm": lambda: nn.LayerNorm(width),
            "convolution": lambda: nn.Conv1d(1, 3, 3, padding=1),
            "kink": lambda: nn.PReLU(width, 0.3),
            "underflow": lambda: Underflow(width, width),
        }.get(kind, lambda: nn.Linear(width, width))()

    def forward(self, h):
        match self.kind:
            case "linear" | "norm" | "kink":
                return self.layer(h)
            case "tanh" | "relu" | "gelu" | "softplus":
                return getattr(F, self.kind, torch.tanh)(1.5 * self.layer(h))
            case "residual":
                return h + torch.tanh(self.layer(h))
            case "attention":
                tokens = self.layer(h).unflatten(1, (4, -1))
                return h + F.scaled_dot_product_attention(tokens, tokens, tokens).flatten(1)
            case "convolution":
                return torch.tanh(self.layer(h.unsqueeze(1)).sum(1))
            case "pooled":
                return (
                    h + F.avg_pool1d(h.unsqueeze(1), 3, 1, 1).squeeze(1) - F.max_pool1d(h.unsqueeze(1), 3, 1, 1)[:, 0]
                )
            case "gate":
                with torch.no_grad():
                    gate = torch.sigmoid(3 * self.layer(h))
                return h * gate
            case "own statistic":
                return h / (0.1 + h.detach().square().mean(1, keepdim=True).sqrt())
            case "straight-through":
                value = torch.tanh(self.layer(h))
                return value.detach() + (h - h.detach())
            case "quantised":
                return h + ((4 * h).round() / 4 - h).detach()
            case "underflow":
                return h + 1e9 * self.layer(h)
            case "root":
                return h + F.relu(self.layer(h)).sqrt()
            case "mean of the batch":
                return h - 0.3 * h.detach().mean(0)
            case "largest of the batch":
                return h / h.abs().amax()
        times = 1 + torch.linspace(-0.5, 3.0, self.width).to(h)
        return TWISTS[self.kind](h, times)


class Composed(nn.Module):
    """A network of the given properties."""

    def __init__(self, **properties):
        super().__init__()
        self.given = given = properties
        torch.manual_seed(given["seed"])
        width, classes, self.part, self.times, self.steer = given["width"], given["classes"], given["part"], 1.0, [1.0]
        generator = random.Random(given["seed"])
        kinds = [generator.choice(HONEST) for _ in range(given["blocks"])]
        if given["trick"]:
            kinds.insert(generator.randrange(len(kinds) + 1), given["trick"])
        self.first = nn.Linear(given["entries"], width, bias=given["input"] != "zeros" or generator.random() < 0.5)
        self.blocks = nn.Sequential(*(Block(kind, width) for kind in kinds))
        self.last = nn.Linear(width, classes)
        self.extra = Underflow(given["entries"], self.part) if given["twist"] == "underflow" else None
        self.skip = nn.Linear(given["entries"], classes, bias=False)
        self.register_buffer("mask", torch.rand(classes) < 0.3)
        with torch.no_grad():
            self.last.weight.mul_(2.0)
            self.last.weight[-self.part :] *= generator.choice((0.02, 0.3, 1.0))
            self.last.bias[-self.part :] -= generator.choice((0.0, 1.0, 4.0))
            if given["head"] == "sizes":
                size = 10 ** generator.uniform(1, 5.5)
                self.last.weight[classes // 4 : -self.part] *= size
                self.last.bias[classes // 4 : -self.part] -= 30 * size
            if given["trick"] == "underflow" or self.extra is not None:
                self.last.weight.mul_(1e-8)
                self.last.bias.mul_(1e-8)
        self.below = generator.choice((20.0, 60.0, 88.8, 90.0, 95.0))
        self.to(getattr(torch, given["dtype"])).eval()

    def inputs(self):
        """The examples [batch, entries]."""
        x = torch.randn(
            self.given["batch"], self.given["entries"], generator=torch.Generator().manual_seed(self.given["seed"])
        )
        if self.given["input"] != "normal":
            x = F.relu(x - 0.5) if self.given["input"] == "sparse" else torch.zeros_like(x)
        return x.to(self.last.weight.dtype)

    def forward(self, x):
        part, logits = self.part, self.last(self.blocks(self.first(x)))
        low = logits[:, -part:]
        match self.given["twist"]:
            case "underflow":
                low = low + self.times * self.extra(x)
            case "":
                pass
            case kind:
                low = TWISTS[kind](low, self.times)
        logits = torch.cat((logits[:, :-part], low), 1)
        match self.given["head"]:
            case "log-softmax":
                drop = F.pad(logits.new_full((part,), self.below), (logits.shape[1] - part, 0))
                logits = torch.log(torch.softmax(logits - drop, 1))
            case "masked":
                logits = logits.masked_fill(self.mask, -math.inf)
            case "steered":
                logits = logits + self.steer[0] * self.skip(x)
        return logits


def calibrate(model, x):
    """Makes the last part's nearest class at x[0] nearer than all others, by the share `gap`, if gradients can."""
    logits, rows = dense(model, x[:1])
    part, gap = model.part, model.given["gap"]

    def answers(times):
        ratio = ratios(logits, torch.cat((rows[:, :-part], times * rows[:, -part:]), 1), model.given["norm"])[0]
        return ratio[-part:].min() / ratio[:-part].min()

    low, high = 0.01, 1e4
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if answers(middle) < 1 - gap else (middle, high)
    model.times = high if high < 5e3 else 3.0


def examine(**given):
    """Raises AssertionError where something false is said of the model of these properties; else tells how it ended."""
    model = Composed(**given)
    x = model.inputs()
    if given["twist"] and given["trick"] not in MIXING:
        calibrate(model, x)
    with torch.no_grad():
        alone, together = torch.cat([model(one) for one in x.split(1)]), model(x)
    # In 16 bits less than a twentieth of the range may be rounding.
    share = 0.4 if given["dtype"] == "bfloat16" else 1e-3
    room = share * (1 + together.nan_to_num(0.0, 0.0, 0.0).abs().max().item())
    mixed = given["trick"] in MIXING and not torch.allclose(alone, together, rtol=0.0, atol=room, equal_nan=True)
    method = Certified(max_passes=given["max_passes"], seed=given["seed"])
    try:
        if given["head"] == "steered":
            reported(analyze, model, x, norm=given["norm"], method=method)
            model.steer[0] = random.Random(given["seed"]).choice((0.0, 1.5, -3.0, 30.0))
        found, told = reported(analyze, model, x, norm=given["norm"], method=method)
    except ValueError as error:
        refused = str(error)
    else:
        refused = ""
    if refused or mixed:
        assert "mixes the examples" in refused, refused or "a mixture went unnoticed"
        assert given["trick"] in MIXING, refused
        return "error"
    logits, rows = dense(model, x)
    rho, near = ratios(logits, rows, given["norm"]), torch.finfo(x.dtype).eps
    rho = torch.where(logits == -math.inf, math.inf, rho)
    # Rounding of two runs of the model: of the logits against the margins, of the rows against their differences.
    own = logits.argmax(1, keepdim=True)
    sizes = rows.double().abs().sum(2) if given["norm"] == math.inf else rows.double().norm(dim=2)
    offset = rows.double() - rows.double().gather(1, own.unsqueeze(2).expand(-1, 1, rows.shape[2]))
    length = offset.abs().sum(2) if given["norm"] == math.inf else offset.norm(dim=2)
    margin = (logits.gather(1, own) - logits).double()
    finite = logits.nan_to_num(0.0, 0.0, 0.0).abs().max().double()
    noise = (sizes + sizes.gather(1, own)) / length + finite / margin
    best = rho.argmin(1, keepdim=True)
    units = 10 if given["dtype"] == "bfloat16" else 100
    tolerance = {"float64": 1e-9}.get(given["dtype"], 1e-4) + units * near * noise.gather(1, best).squeeze(
        1
    ).nan_to_num(math.inf)
    tolerance = torch.where(rho.amin(1) == 0, math.inf, tolerance)
    rho = rho.amin(1)
    assert not (found.certified & found.linearized_robustness.isnan()).any(), "certified NaN"
    assert not (found.certified & rho.isnan()).any(), "certified where exact is NaN"
    tried = tolerance < (0.5 if given["dtype"] == "bfloat16" else 0.05)
    wrong = found.certified & tried & ((found.linearized_robustness.double() / rho - 1).abs() > tolerance)
    assert not wrong.any(), f"certified {found.linearized_robustness.tolist()} for {rho.tolist()}"
    above = tried & (found.lower_bound.double() > rho * (1 + tolerance))
    assert not above.any(), f"lower bound {found.lower_bound.tolist()} above {rho.tolist()}"
    if any("exact rows" in text for text in told):
        return "rows"
    return "certified" if found.certified.all() else "limit"
