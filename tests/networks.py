"""Small networks of every kind, their dense Jacobians, and ways to watch the passes through them."""

import collections

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastsal.model.linearization import Linearization


class Attention(nn.Module):
    """A small transformer over tokens [B, 5, 12]; "fused" calls scaled_dot_product_attention itself."""

    def __init__(self, kind, classes=7):
        super().__init__()
        self.kind = kind
        self.mix = (
            nn.Linear(12, 36)
            if kind == "fused"
            else nn.TransformerEncoderLayer(12, 2, 24, dropout=0.1, activation="gelu", batch_first=True)
        )
        self.head = nn.Linear(12, classes)

    def forward(self, x):
        if self.kind == "fused":
            q, k, v = self.mix(x).view(*x.shape[:2], 3, 2, 6).permute(2, 0, 3, 1, 4)
            y = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        else:
            y = self.mix(x)
        return self.head(y.mean(1))


def relu_mlp(bias=True):
    return nn.Sequential(
        nn.Linear(20, 32, bias=bias), nn.ReLU(), nn.Linear(32, 32, bias=bias), nn.ReLU(), nn.Linear(32, 23, bias=bias)
    )


def relu_cnn():
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.1, inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 5),
        nn.BatchNorm1d(5),
    )
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
    return net


MODELS = {
    "mlp": (relu_mlp, (20,)),
    "mlp without bias": (lambda: relu_mlp(bias=False), (20,)),
    "cnn with batchnorm": (relu_cnn, (2, 8, 8)),
    "gelu": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 20)), (3, 4)),
    "transformer": (lambda: Attention("encoder"), (5, 12)),
    "fused attention": (lambda: Attention("fused"), (5, 12)),
}


def make(name, dtype=torch.float32, batch=6, seed=0):
    torch.manual_seed(seed)
    build, shape = MODELS[name]
    return build().to(dtype).eval(), torch.randn(batch, *shape, dtype=dtype)


def dense(model, x):
    """Logits [B, n] and the whole Jacobian [B, n, D], by one plain backward pass a class."""
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = model(x.clone())
    rows = [torch.autograd.grad(logits[:, j].sum(), x, retain_graph=True)[0].flatten(1) for j in range(logits.shape[1])]
    return logits.detach(), torch.stack(rows, 1)


class CountedOperations(TorchDispatchMode, collections.Counter):
    """How often each operation runs inside, by name."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self[str(func)] += 1
        return func(*args, **(kwargs or {}))


class LargestTensor(TorchDispatchMode):
    """The most entries, and the most bytes, of a tensor that an operation inside gives back."""

    entries = bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, torch.Tensor):
                self.entries = max(self.entries, one.numel())
                self.bytes = max(self.bytes, one.numel() * one.element_size())
        return result


def spy(monkeypatch, fail=lambda count: None):
    """The number of rows of every backward pass from here on; `fail(count)` may raise."""
    calls, grad = [], Linearization._grad

    def wrapper(self, cotangents, batched, create_graph):
        count = cotangents.shape[0] if batched else 1
        fail(count)
        calls.append(count)
        return grad(self, cotangents, batched, create_graph)

    monkeypatch.setattr(Linearization, "_grad", wrapper)
    return calls


def network(classes=120, entries=40, count=7, seed=0):
    """A network in float64 and examples of very different margins."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(entries, 60), nn.Tanh(), nn.Linear(60, classes)).double().requires_grad_(False)
    return model, torch.randn(count, entries, dtype=torch.float64) * torch.logspace(-1, 1, count).unsqueeze(1)
