"""A wide head for p = 2: the Gram matrix says which rows have to be formed, and decides nothing."""

import math

import pytest
import torch
from torch import nn

from fastsal import Exact, analyze
from fastsal.methods import features, gram

pytestmark = pytest.mark.usefixtures("one_thread")

F, D, N = 12, 300, 900


def exact_norms(weight, jacobian, own):
    """‖Δ_j‖₂ in long double, by rows."""
    difference = (weight[own].double() - weight.double()).numpy().astype("longdouble")
    rows = difference @ jacobian.double().numpy().astype("longdouble")
    return torch.from_numpy(((rows**2).sum(1) ** 0.5).astype("float64"))


@pytest.mark.parametrize("case", ["plain", "near copies", "cancelling", "tiny", "huge", "parallel"])
def test_what_is_not_formed_is_known(case):
    """Every norm that is not to be formed is right to float32, and no class that may be the nearest is left out."""
    generator = torch.Generator().manual_seed(1)
    weight, jacobian = torch.randn(N, F, generator=generator), torch.randn(F, D, generator=generator)
    if case == "near copies":
        weight[:450] = weight[:1] + 10.0 ** torch.linspace(-7, -1, 450).unsqueeze(1) * weight[:450]
    if case == "cancelling":
        jacobian = torch.randn(1, D, generator=generator) + 1e-6 * jacobian
        weight -= weight.mean(1, keepdim=True)
    if case == "parallel":
        jacobian = jacobian[:1].expand(F, D).clone()
    scale = {"tiny": 1e-25, "huge": 1e25}.get(case, 1.0)
    jacobian *= scale
    want = exact_norms(weight, jacobian, 0)
    margin = want * (1 + torch.rand(N, generator=generator, dtype=torch.float64))
    margin[300:340] = want[300:340]  # many ties for the nearest
    distance, form = gram.screen(weight, jacobian, torch.tensor(0), margin, torch.arange(N) > 0)
    torch.testing.assert_close(distance[~form], want[~form], rtol=2e-7, atol=0.0)
    assert form[300:340].all()
    if case in ("plain", "tiny", "huge"):
        assert form.sum() <= 45
    if case == "cancelling":
        assert form[1:].all()  # digits are lost


def test_nan_forms_every_row():
    weight, jacobian = torch.randn(N, F), torch.randn(F, D)
    jacobian[3, 5] = math.nan
    _, form = gram.screen(weight, jacobian, torch.tensor(0), torch.ones(N, dtype=torch.float64), torch.arange(N) > 0)
    assert form[1:].all()


@pytest.mark.parametrize("target", [None, torch.tensor([5, 700, 3])])
def test_equal_to_rows(monkeypatch, target):
    """With few of the rows formed."""
    monkeypatch.setattr(features, "WIDE", 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, F), nn.Tanh(), nn.Linear(F, N)).requires_grad_(False)
    x = torch.randn(3, D)
    formed, right = [], features.screen
    monkeypatch.setattr(
        features, "screen", lambda *given: (found := right(*given), formed.append(int(found[1].sum())))[0]
    )
    found = analyze(model, x, method="exact", target=target)
    want = analyze(model.double(), x.double(), method=Exact(memory_limit=0), target=target)
    assert len(formed) == 3
    assert max(formed) < 30
    assert torch.equal(found.runner_up, want.runner_up)
    torch.testing.assert_close(found.distances.double(), want.distances, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(found.linearized_robustness.double(), want.linearized_robustness, rtol=2e-5, atol=0.0)


class Sequence(nn.Module):
    """A head that sees every position, of which one has the logits: another one for each example."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LSTM(4, F, batch_first=True), nn.Linear(F, 150)

    def forward(self, x, length):
        return self.head(self.body(x)[0])[torch.arange(len(x)), length - 1]


@pytest.mark.parametrize("wide", [0, math.inf])
@pytest.mark.parametrize("norm", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_head_that_sees_every_position(monkeypatch, dtype, norm, wide):
    """One example at a time, and all at once."""
    monkeypatch.setattr(features, "WIDE", wide)
    torch.manual_seed(0)
    model, x = Sequence().to(dtype).requires_grad_(False), torch.randn(4, 7, 4, dtype=dtype)
    args = (torch.tensor([7, 2, 5, 1]),)
    found = analyze(model, x, args=args, norm=norm, method="exact")
    want = analyze(model, x, args=args, norm=norm, method=Exact(memory_limit=0))
    assert (found.vjps == F + 3).all()
    assert torch.equal(found.runner_up, want.runner_up)
    rtol = 1e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(found.distances, want.distances, rtol=rtol, atol=0.0)


def test_positions_of_equal_logits(recwarn):
    """Where two positions have the same logits, the gradients decide which of them it was: if not the last, class rows."""

    class Twice(Sequence):
        def forward(self, x, length):
            hidden = x[:, :2] @ self.lift
            return self.head(hidden)[:, 0]

    torch.manual_seed(0)
    model = Twice().double().requires_grad_(False)
    model.lift = torch.randn(4, F, dtype=torch.float64)
    x = torch.randn(2, 1, 4, dtype=torch.float64).expand(-1, 3, -1).clone()
    found = analyze(model, x, args=(0,), method="exact")
    want = analyze(model, x, args=(0,), method=Exact(memory_limit=0))
    torch.testing.assert_close(found.linearized_robustness, want.linearized_robustness, rtol=1e-12, atol=0.0)
    assert any("is not all of it" in str(warning.message) for warning in recwarn.list)
