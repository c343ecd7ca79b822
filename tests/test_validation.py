"""Every argument error: its type, the argument it names, what it got and what it wants."""

import math
import re
import warnings

import cases
import pytest
import torch

import fastsal
from fastsal import validation

CALLS = pytest.mark.parametrize("call", [fastsal.margin_geometry, fastsal.pairwise_margins], ids=lambda f: f.__name__)


def good(**changes):
    """Valid arguments with some of them replaced."""
    named = dict(zip(("logits", "jacobian", "x"), cases.inputs(2, 3, 4, torch.float32), strict=True))
    return named | changes


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, device="meta", dtype=dtype)


ONE_SCORE = r"wants \[B, n\] with n >= 2; for a binary classifier with one score F pass the two logits \(-F/2, F/2\)"

ERRORS = [
    # one replaced argument, the exception, its message
    ({"logits": [[1.0, 2.0]]}, TypeError, r"logits: got list, wants a torch.Tensor"),
    ({"jacobian": None}, TypeError, r"jacobian: got NoneType, wants a torch.Tensor"),
    ({"x": 3.0}, TypeError, r"x: got float, wants a torch.Tensor"),
    (
        {"logits": torch.ones(2, 3, dtype=torch.int64)},
        TypeError,
        r"logits: got dtype torch.int64, wants float32, float64",
    ),
    (
        {"jacobian": torch.ones(2, 3, 4, dtype=torch.complex64)},
        TypeError,
        r"jacobian: got dtype torch.complex64, wants",
    ),
    (
        {"x": torch.ones(2, 4, dtype=torch.bool)},
        TypeError,
        r"x: got dtype torch.bool, wants float32, float64, float16 or",
    ),
    (
        {"jacobian": torch.ones(2, 3, 4).to_sparse()},
        TypeError,
        r"jacobian: got layout torch.sparse_coo, wants a strided",
    ),
    ({"logits": torch.ones(2)}, ValueError, r"logits: got shape \(2,\), " + ONE_SCORE),
    (
        {"logits": torch.ones(2, 1), "jacobian": torch.ones(2, 1, 4)},
        ValueError,
        r"logits: got shape \(2, 1\), " + ONE_SCORE,
    ),
    (
        {"logits": torch.ones(2, 0), "jacobian": torch.ones(2, 0, 4)},
        ValueError,
        r"logits: got shape \(2, 0\), .* n >= 2",
    ),
    ({"logits": torch.ones(2, 3, 1)}, ValueError, r"logits: got shape \(2, 3, 1\), wants \[B, n\] with n >= 2$"),
    ({"logits": torch.ones(())}, ValueError, r"logits: got shape \(\), wants \[B, n\] with n >= 2$"),
    (
        {"jacobian": torch.ones(2, 3)},
        ValueError,
        r"jacobian: got shape \(2, 3\), wants \[B, n, \*S\] with \[B, n\] = \[2, 3\]",
    ),
    (
        {"jacobian": torch.ones(2, 4, 4)},
        ValueError,
        r"jacobian: got shape \(2, 4, 4\), wants .* = \[2, 3\] as in logits",
    ),
    (
        {"jacobian": torch.ones(1, 3, 4)},
        ValueError,
        r"jacobian: got shape \(1, 3, 4\), wants .* = \[2, 3\] as in logits",
    ),
    (
        {"jacobian": torch.ones(2, 3, 0), "x": torch.ones(2, 0)},
        ValueError,
        r"jacobian: got shape \(2, 3, 0\), wants at least one input dimension entry \(D >= 1\)",
    ),
    ({"x": torch.ones(2, 5)}, ValueError, r"x: got shape \(2, 5\), wants \[B, \*S\] = \[2, 4\] to go with jacobian"),
    (
        {"x": torch.ones(2, 2, 2)},
        ValueError,
        r"x: got shape \(2, 2, 2\), wants \[B, \*S\] = \[2, 4\] to go with jacobian",
    ),
    ({"x": meta(2, 4)}, ValueError, r"x: got device meta, wants the jacobian's, cpu"),
    ({"logits": meta(2, 3)}, ValueError, r"logits: got device meta, wants the jacobian's, cpu"),
    (
        {"logits": torch.ones(2, 3).double()},
        TypeError,
        r"logits: got dtype torch.float64, wants no float64 to go with jacobian's torch.float32",
    ),
    (
        {"jacobian": torch.ones(2, 3, 4).double()},
        TypeError,
        r"logits: got dtype torch.float32, wants float64 to go with jacobian's torch.float64",
    ),
    (
        {"x": torch.ones(2, 4).double()},
        TypeError,
        r"x: got dtype torch.float64, wants no float64 to go with jacobian's torch.float32",
    ),
    (
        {"x": torch.ones(2, 4).half()},
        TypeError,
        r"x: got dtype torch.float16, wants the jacobian's, torch.float32, or float32",
    ),
    (
        {"jacobian": torch.ones(2, 3, 4).half(), "x": torch.ones(2, 4).bfloat16()},
        TypeError,
        r"x: got dtype torch.bfloat16, wants the jacobian's, torch.float16, or float32",
    ),
    (
        {"jacobian": torch.ones(2, 4, 3).transpose(1, 2)[:, :, :4]},
        ValueError,
        r"jacobian: got strides \(12, 1, 3\) for shape \(2, 3, 4\), wants the input dimensions \(those behind the first 2\) "
        r"contiguous; pass jacobian.contiguous\(\)",
    ),
    ({"x": torch.ones(2, 8)[:, ::2]}, ValueError, r"x: got strides \(8, 2\) .* pass x.contiguous\(\)"),
    ({"x": torch.ones(2, 1).expand(2, 4)}, ValueError, r"x: got strides \(1, 0\) .* pass x.contiguous\(\)"),
]


@CALLS
@pytest.mark.parametrize(("changes", "error", "message"), ERRORS)
def test_tensor_errors(call, changes, error, message):
    with pytest.raises(error, match=message):
        call(**good(**changes))


def test_channels_last_is_named():
    """A 4-D input in another memory format is refused, not copied behind the caller's back."""
    jacobian = torch.ones(2, 3, 4, 5, 6)
    x = torch.ones(2, 4, 5, 6)
    fastsal.margin_geometry(torch.ones(2, 3), jacobian, x)
    with pytest.raises(ValueError, match=r"x: got strides .* pass x.contiguous\(\)"):
        fastsal.margin_geometry(torch.ones(2, 3), jacobian, x.to(memory_format=torch.channels_last))
    with pytest.raises(ValueError, match=r"jacobian: got strides .* pass jacobian.contiguous\(\)"):
        fastsal.margin_geometry(torch.ones(2, 3), jacobian.transpose(3, 4).contiguous().transpose(3, 4), x)


def test_strides_of_single_entries_do_not_matter():
    logits, jacobian, x = cases.inputs(2, 3, 1, torch.float32)
    strided = torch.empty_strided((2, 3, 1), (9, 3, 7)).copy_(jacobian)
    cases.assert_same_results(fastsal.margin_geometry(logits, strided, x), fastsal.margin_geometry(logits, jacobian, x))


@CALLS
@pytest.mark.parametrize("norm", [0, 3, -1, "2.0", None, "l2", math.nan, [2]])
def test_norm_errors(call, norm):
    with pytest.raises(ValueError, match=r"norm: got .*, wants 2, 1, math.inf or 'inf' \(the p of the perturbation\)"):
        call(**good(), norm=norm)


@CALLS
def test_norm_spellings(call):
    for spellings in ((2, 2.0, "2"), (1, 1.0, "1"), (math.inf, "inf", float("inf"))):
        first, *others = (call(**good(), norm=spelling) for spelling in spellings)
        for other in others:
            cases.assert_same_results(other, first)


@CALLS
def test_options_are_keyword_only(call):
    with pytest.raises(TypeError, match="positional"):
        call(*good().values(), 2)


def test_x_is_required_by_margin_geometry():
    with pytest.raises(TypeError, match=r"x: got NoneType, wants a torch.Tensor"):
        fastsal.margin_geometry(**good(x=None))


def test_probabilities_are_noticed():
    with pytest.warns(UserWarning, match="every row is non-negative and sums to 1, as probabilities do"):
        validation.warn_probabilities(torch.randn(5, 4).softmax(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for logits in (torch.randn(5, 4), torch.randn(5, 4).log_softmax(1), torch.empty(0, 4)):
            validation.warn_probabilities(logits)


def test_output_dtypes():
    assert [validation.output_dtype(dtype) for dtype in validation.DTYPES] == [
        cases.out_dtype(dtype) for dtype in validation.DTYPES
    ]


@pytest.mark.parametrize("B", [2, 3])
def test_a_jacobian_of_the_whole_batch_is_named_with_the_way_to_each_examples_own(B):
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5)), torch.randn(B, 3, 2, 2)
    whole = torch.func.jacrev(model)(x).detach()
    with pytest.raises(
        ValueError, match=rf"\[B, n, B, \*S\], torch.func.jacrev .* wants \[B, n, \*S\] = \[{B}, 5, 3, 2, 2\]"
    ) as error:
        fastsal.margin_geometry(model(x).detach(), whole, x)
    recipe = re.search(r"vmap\(jacrev.*\)\(x\)", str(error.value))[0]
    jacobian = eval(recipe, {"model": model, "x": x, **vars(torch.func)}).detach()
    assert jacobian.shape == (B, 5, 3, 2, 2)
    found = fastsal.margin_geometry(model(x).detach(), jacobian, x)
    torch.testing.assert_close(found.linearized_robustness, fastsal.analyze(model, x).linearized_robustness)


class OnMps(torch.Tensor):
    """A tensor as it is seen on Apple's GPU, which torch refuses to make a float64 tensor for, here too."""

    device = torch.device("mps")


class TestDeviceWithoutFloat64:
    WANTS = "which has no float64, in which fastsal adds; wants all tensors, and the model if there is one, on another device"

    def test_tensor_level(self):
        for name, value in good().items():
            with pytest.raises(TypeError, match=f"{name}: is on mps, {self.WANTS}: pass {name}.cpu"):
                fastsal.margin_geometry(**good(**{name: value.as_subclass(OnMps)}))

    def test_model_level(self):
        model, x = torch.nn.Linear(4, 3), torch.randn(2, 4).as_subclass(OnMps)
        for call in (fastsal.analyze, fastsal.deepfool, fastsal.fab):
            with pytest.raises(TypeError, match=f"x: is on mps, {self.WANTS}"):
                call(model, x)

    def test_the_output_of_a_layer(self):
        class Tokens(torch.nn.Embedding):
            def forward(self, tokens):
                return super().forward(tokens).as_subclass(OnMps)

        model = torch.nn.Sequential(Tokens(9, 4), torch.nn.Flatten(), torch.nn.Linear(12, 3))
        with pytest.raises(TypeError, match=f"the output of layer '0': is on mps, {self.WANTS}"):
            fastsal.analyze(model, torch.tensor([[1, 2, 3]]), layer="0")

    def test_others_are_asked_once(self, monkeypatch):
        """A device that torch has no special name for is let in where it computes in float64."""
        validation._has_float64.cache_clear()
        asked = []
        monkeypatch.setattr(torch, "ones", lambda *_, device: asked.append(device) or torch.zeros(1))
        tensor = torch.randn(2, 4).as_subclass(OnMps)
        for _ in range(2):
            validation.floating("x", tensor)
        assert asked == [torch.device("mps")]
        validation._has_float64.cache_clear()
