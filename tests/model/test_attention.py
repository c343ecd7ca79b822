"""Attention in blocks of queries: the same values and derivatives, and no more memory than a block."""

import math

import pytest
import torch
import torch.nn.functional as F
from networks import LargestTensor
from torch import nn

import fastsal
from fastsal.model import attention
from fastsal.model.attention import math_attention
from fastsal.model.traced import TracedPasses


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of three queries."""
    monkeypatch.setattr(attention, "BLOCK", 1)
    monkeypatch.setattr(attention, "QUERIES", 3)


def by_formula(query, key, value, mask=None, causal=False, scale=None, groups=1):
    """softmax(q kᵀ · scale + mask) v, as the documentation of torch has it."""
    key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ value


L, S, HEADS = 10, 7, 4
MASKS = {
    "none": None,
    "every query its own": (2, HEADS, L, S),
    "every head the same": (2, 1, L, S),
    "every example the same": (L, S),
    "every query the same": (2, 1, 1, S),
    "of keys alone": (S,),
}


def drawn(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("small_blocks")
class TestValuesAndDerivatives:
    def check(self, options, mask=None, causal=False, heads=HEADS, lead=(2,), queries=L):
        """Values, gradients and the derivative of these along a cotangent, in blocks and by the formula."""
        inputs = [drawn(i, *lead, h, n, 5) for i, (h, n) in enumerate([(HEADS, queries), (heads, S), (heads, S)])]
        along = [drawn(3 + i, *one.shape) for i, one in enumerate(inputs)]

        def products(attend):
            leaves = [one.clone().requires_grad_() for one in inputs]
            value = attend(*leaves)
            cotangent = drawn(9, *value.shape).requires_grad_()
            gradients = torch.autograd.grad(value, leaves, cotangent, create_graph=True)
            return [value, *gradients, *torch.autograd.grad(gradients, cotangent, along)]

        with math_attention():
            found = products(lambda *given: F.scaled_dot_product_attention(*given, mask, is_causal=causal, **options))
        groups = HEADS // heads
        wanted = products(lambda *given: by_formula(*given, mask, causal, options.get("scale"), groups))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("kind", [torch.bool, torch.float64])
    @pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
    def test_masks(self, shape, kind):
        mask = None if shape is None else drawn(6, *shape)
        if mask is not None and kind is torch.bool:
            mask = mask > -0.5
            mask[..., 0] = True  # no query without keys
        self.check({}, mask)

    @pytest.mark.parametrize("queries", [S, L, S - 3])
    def test_causal(self, queries):
        self.check({}, causal=True, queries=queries)

    @pytest.mark.parametrize("lead", [(), (2, 3)])
    def test_fewer_and_more_dimensions(self, lead):
        self.check({"scale": 0.3}, lead=lead)

    def test_keys_shared_by_heads(self):
        self.check({"enable_gqa": True}, heads=2)

    def test_a_mask_with_gradients_of_its_own(self):
        """As of an attention whose bias depends on the input."""
        mask = drawn(6, L, S).requires_grad_()
        given = [drawn(i, 2, HEADS, n, 5) for i, n in enumerate((L, S, S))]
        with math_attention():
            (found,) = torch.autograd.grad(F.scaled_dot_product_attention(*given, mask).sin().sum(), mask)
        (wanted,) = torch.autograd.grad(by_formula(*given, mask).sin().sum(), mask)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)

    def test_a_query_without_keys(self):
        """Torch has zeros for it, in one piece or in blocks."""
        mask = torch.ones(L, S, dtype=torch.bool)
        mask[4] = False
        given = [drawn(i, 2, HEADS, n, 5) for i, n in enumerate((L, S, S))]
        with math_attention():
            found = F.scaled_dot_product_attention(*given, mask)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(*given, mask))


class TestMemory:
    """What is formed: the weights of a block of queries, not of all."""

    @pytest.mark.parametrize("causal", [False, True])
    def test_of_attention(self, causal, monkeypatch):
        monkeypatch.setattr(attention, "BLOCK", 4 * 2 * 1000 * 64)
        given = [drawn(i, 2, 1000, 4).float().requires_grad_() for i in range(3)]
        with LargestTensor() as seen, math_attention():
            value = F.scaled_dot_product_attention(*given, is_causal=causal)
            cotangent = torch.ones_like(value, requires_grad=True)
            gradients = torch.autograd.grad(value, given, cotangent, create_graph=True)
            torch.autograd.grad(gradients, cotangent, given)
        assert 2 * 1000 * 64 <= seen.entries < 2 * 1000 * 80

    def test_of_torchs_own_layer(self, monkeypatch):
        monkeypatch.setattr(attention, "BLOCK", 4 * 2 * 1000 * 64)
        layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval()
        with LargestTensor() as seen, math_attention():
            layer(torch.randn(1, 1000, 8, requires_grad=True))
        assert seen.entries <= 2 * 1000 * 64

    def test_of_other_devices(self, small_blocks):
        """In one piece: nobody has measured what a cache that is not a processor's gains."""
        given = [torch.empty(2, 100, 4, device="meta") for _ in range(3)]
        with LargestTensor() as seen, math_attention():
            F.scaled_dot_product_attention(*given)
        assert seen.entries == 2 * 100 * 100

    def test_of_many_heads(self, monkeypatch):
        """A block never has fewer queries than that reading the keys pays; of several examples one comes at a time."""
        monkeypatch.setattr(attention, "BLOCK", 1)
        given = [torch.randn(3, 4, 100, 2) for _ in range(3)]
        with LargestTensor() as seen, math_attention():
            F.scaled_dot_product_attention(*given)
        assert seen.entries == 4 * 100 * attention.QUERIES

    def test_of_short_sequences_in_a_large_batch(self, monkeypatch):
        """Some examples at a time, whose queries stay together."""
        monkeypatch.setattr(attention, "BLOCK", 4 * 2 * 4 * 50 * 50)
        given = [torch.randn(7, 4, 50, 2) for _ in range(3)]
        with LargestTensor() as seen, math_attention():
            F.scaled_dot_product_attention(*given)
        assert seen.entries == 2 * 4 * 50 * 50


class Attending(nn.Module):
    """Places that attend to each other, a causal half of the heads and a free one."""

    def __init__(self, places=11, width=8, classes=200):
        super().__init__()
        self.project = nn.Linear(width, 3 * width)
        self.head = nn.Linear(places * width, classes)

    def forward(self, x):
        given = [one.unflatten(-1, (2, -1)).transpose(1, 2) for one in self.project(x).chunk(3, -1)]
        both = F.scaled_dot_product_attention(*given) + F.scaled_dot_product_attention(*given, is_causal=True)
        return self.head(both.transpose(1, 2).flatten(1))


class TestInModels:
    @pytest.mark.parametrize("traced", [False, True])
    def test_certified_equals_exact(self, traced, small_blocks, monkeypatch):
        """In two groups of examples, with products in a trace and without."""
        monkeypatch.setattr("fastsal.methods.certified.GROUP_BYTES", 8 * 20 * 88 * 5)
        if traced:
            monkeypatch.setattr("fastsal.model.traced.PAYS", 0)
        made, plain = [], TracedPasses.jvp
        monkeypatch.setattr(TracedPasses, "jvp", lambda self, *given: made.append(1) or plain(self, *given))
        torch.manual_seed(3)
        model, x = Attending().double().eval(), torch.randn(9, 11, 8, dtype=torch.float64)
        found = fastsal.analyze(model, x, method="certified")
        wanted = fastsal.analyze(model, x, method="exact")
        assert found.certified.all()
        assert (found.jvps > 0).all()
        assert bool(made) is traced
        assert (found.runner_up == wanted.runner_up).all()
        torch.testing.assert_close(found.linearized_robustness, wanted.linearized_robustness, rtol=1e-12, atol=0)

    def test_margin_losses(self, small_blocks):
        """With derivatives: the same gradients of the weights as with attention in one piece."""
        torch.manual_seed(4)
        model, x = Attending().double().eval(), torch.randn(3, 11, 8, dtype=torch.float64)
        found = []
        for queries in (3, 1000):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(attention, "QUERIES", queries)
                geometry = fastsal.analyze(model, x, method="exact", differentiable=True)
                found.append(torch.autograd.grad(geometry.linearized_robustness.sum(), [*model.parameters()]))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)

    def test_torch_gets_its_own_back(self):
        before, fast = F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()
        with pytest.raises(ZeroDivisionError), math_attention(), math_attention():
            raise ZeroDivisionError
        assert F.scaled_dot_product_attention is before
        assert torch.backends.mha.get_fastpath_enabled() is fast
