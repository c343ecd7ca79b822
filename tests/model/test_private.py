"""What fastsal takes from torch that torch may drop at any release."""

import copy
import importlib.util
import pkgutil
import sys
import types

import pytest
import torch
from attacked import assert_right
from torch import nn

from fastsal.model import private, traced


class TestWithoutPrivateNames:
    """What fastsal takes from torch that torch may drop at any release."""

    @pytest.mark.parametrize(
        "gone",
        [
            "torch._guards.tracing",
            "torch._guards.TracingContext",
            "torch._subclasses.fake_tensor.FakeTensorMode",
            "torch.fx.experimental.proxy_tensor.make_fx",
            "torch._C._functorch._is_vmap_fallback_enabled",
            "torch._C._functorch._set_vmap_fallback_enabled",
            "torch.Tensor._is_zerotensor",
        ],
    )
    def test_nothing_is_traced_and_the_values_are_right(self, monkeypatch, gone):
        """The file of these names is loaded as it would be by a torch without one of them."""
        owner, _, name = gone.rpartition(".")
        with pytest.MonkeyPatch.context() as patch:
            if name == "_is_zerotensor":  # of the base class, in C
                patch.setattr(private, "Tensor", type("Tensor", (), {}))
                patch.setitem(sys.modules, "torch", types.SimpleNamespace(**vars(torch) | {"Tensor": private.Tensor}))
            else:
                patch.delattr(pkgutil.resolve_name(owner), name)
            spec = importlib.util.spec_from_file_location("private", private.__file__)
            without = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(without)
        assert name in without.MISSING
        made, right = [], traced.Trace.__init__
        monkeypatch.setattr(traced, "PAYS", 0)
        monkeypatch.setattr(traced.Trace, "__init__", lambda self, *given: made.append(right(self, *given)))
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 150)).eval(), torch.randn(4, 30)
        with monkeypatch.context() as patch:
            patch.setattr(traced, "private", without)
            assert (assert_right(model, x).jvps > 0).all()
        assert made == []
        assert_right(copy.deepcopy(model), x)
        assert made == [None]
