"""Every example in a docstring of the installed package runs, and every one of the guides; public docstrings are complete."""

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import fastsal

NATIVE = ("fastsal._cpu", "fastsal._cuda")
MODULES = ["fastsal", *(module.name for module in pkgutil.walk_packages(fastsal.__path__, "fastsal."))]
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", [name for name in MODULES if name not in NATIVE and not name.endswith("__main__")])
def test_examples(name, request):
    if "triton" in name:
        pytest.importorskip("triton")
    if name.endswith(".transformers"):
        request.getfixturevalue("torchvision")
    if name.startswith("fastsal.integrations."):
        pytest.importorskip(name.rpartition(".")[2])
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


PUBLIC = [
    *(thing for thing in map(fastsal.__dict__.get, fastsal.__all__) if callable(thing)),
    *(
        thing
        for thing in vars(fastsal.plot).values()
        if inspect.isfunction(thing) and not thing.__name__.startswith("_")
    ),
]


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_every_parameter_and_field_is_described(thing):
    """Each on a line of its own, in the order of the signature; a function's sections in the order of a reader's questions."""
    names = list(inspect.signature(thing).parameters)
    lines = [line.strip() for line in inspect.getdoc(thing).splitlines()]
    assert [
        line.partition(":")[0] for line in lines if re.match(r"\w+: ", line) and line.partition(":")[0] in names
    ] == names
    if names and not dataclasses.is_dataclass(thing):
        sections = [line for line in lines if line in ("Args:", "Returns:", "Raises:", "Examples:")]
        assert sections == ["Args:", "Returns:", "Raises:", "Examples:"]


@pytest.mark.parametrize("guide", sorted(ROOT.glob("docs/*.md")), ids=lambda path: path.name)
def test_guides(guide, request):
    """The sessions of a guide, which say what they print."""
    if re.search(r"^>>> import .*\btransformers\b", guide.read_text(encoding="utf-8"), re.M):
        request.getfixturevalue("torchvision")
        pytest.importorskip("transformers")
    assert doctest.testfile(str(guide), module_relative=False).failed == 0


def test_toy_theory_is_among_the_examples():
    assert doctest.testfile(str(ROOT / "docs" / "quantities.md"), module_relative=False).attempted > 5


class Letters:
    """A tokenizer of which every token is a letter."""

    def __call__(self, text, return_tensors):
        return {"input_ids": torch.tensor([[ord(letter) for letter in text]])}

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_readme(torchvision, monkeypatch):
    """The README's Python, from first to last in one session; a model of random weights stands for the one it names."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 3
    tf = pytest.importorskip("transformers")
    model = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=1, n_head=2))
    for kind, loaded in {"AutoTokenizer": Letters(), "AutoModelForCausalLM": model}.items():
        monkeypatch.setattr(getattr(tf, kind), "from_pretrained", lambda name, loaded=loaded: loaded)
    exec("".join(blocks), {})
