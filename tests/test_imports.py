"""Imports inside the package go one way, and torch's private names stand in one file."""

import ast
import graphlib
import importlib
import importlib.util
import pkgutil
import re
import shutil
import sys
import types
from pathlib import Path

import pytest

import fastsal

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(fastsal.__file__).resolve().parent

# Imports go one way, from the top down, and never between the modules of one line. A name stands for a module, or for a package
# with all that is in it but what is listed by itself.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("study",),
    ("__init__",),  # gathers the public names, and starts no command line
    ("integrations", "pages"),
    ("adaptive",),
    ("adversarial", "biases", "evaluation", "losses"),
    ("analysis", "plot"),
    ("methods",),
    ("methods.rows",),
    ("methods.certified", "methods.features"),
    ("methods.certified.search",),
    ("methods.certified.plan", "methods.certified.rounding"),
    ("methods.certified.probes",),
    ("methods.certified.basis",),
    ("methods.certified.state",),
    ("methods.certified.chi_square", "methods.certified.norms"),
    ("methods.base", "methods.gram", "methods.mixtures"),
    ("model", "tensor"),
    ("model.products", "tensor.geometry", "tensor.pairwise"),
    ("model.double_backward", "model.traced", "tensor.ops", "tensor.results"),
    ("model.linearization", "tensor.backends"),
    ("model.inputs", "tensor.tolerance", "_cpu", "_cuda"),
    ("model.function",),
    ("model.calling",),
    ("model.attention", "model.chunking", "model.private"),
    ("tensor.reference",),
    ("devices", "files", "progress", "validation"),
)
STRANGERS = ("model", "tensor")  # neither imports anything of the other
LEAVES = ("files", "tensor.reference", "validation")  # these import torch at most, and nothing of fastsal


class TestImportDirection:
    def test_no_import_points_upward_or_closes_a_cycle(self):
        assert wrong_imports(PACKAGE) == []

    def test_every_listed_name_exists(self):
        """A name that no file has would hold nothing to its place."""
        for name in {name for names in LAYERS for name in names} - {"_cpu", "_cuda"}:
            path = PACKAGE.joinpath(*name.split("."))
            assert path.is_dir() or path.with_suffix(".py").is_file(), name

    @pytest.mark.parametrize(
        ("file", "line", "wrong"),
        [
            ("study/train.py", "from fastsal.cli import options", "fastsal.study.train imports fastsal.cli.options"),
            ("analysis.py", "from fastsal import study", "fastsal.analysis imports fastsal.study"),
            ("plot.py", "from fastsal.evaluation import shards", "fastsal.plot imports fastsal.evaluation.shards"),
            ("methods/rows.py", "from ..analysis import analyze", "fastsal.methods.rows imports fastsal.analysis"),
            (
                "methods/base.py",
                "from fastsal.methods import rows",
                "fastsal.methods.base imports fastsal.methods.rows",
            ),
            (
                "methods/features.py",
                "from . import certified",
                "fastsal.methods.features imports fastsal.methods.certified",
            ),
            (
                "model/linearization.py",
                "from fastsal.model.products import Passes",
                "fastsal.model.linearization imports fastsal.model.products",
            ),
            (
                "model/products.py",
                "from fastsal.tensor import reference",
                "fastsal.model.products imports fastsal.tensor.reference",
            ),
            ("tensor/ops.py", "from fastsal.model import calling", "fastsal.tensor.ops imports fastsal.model.calling"),
            (
                "tensor/geometry.py",
                "import fastsal.tensor.pairwise",
                "fastsal.tensor.geometry imports fastsal.tensor.pairwise",
            ),
            (
                "tensor/backends/cpu.py",
                "from fastsal.tensor import ops",
                "fastsal.tensor.backends.cpu imports fastsal.tensor.ops",
            ),
            ("validation.py", "import numpy", "fastsal.validation imports numpy"),
            (
                "tensor/reference.py",
                "from fastsal import validation",
                "fastsal.tensor.reference imports fastsal.validation",
            ),
            (
                "methods/certified/plan.py",
                "from fastsal.methods.certified.rounding import SPARE",
                "fastsal.methods.certified.plan imports fastsal.methods.certified.rounding",
            ),
            ("model/products.py", "import fastsal", "fastsal.model.products imports fastsal.__init__"),
            ("study/data.py", "from fastsal.study import measure", "a cycle: fastsal.study."),
            ("nowhere.py", "import torch", "fastsal.nowhere has no place in LAYERS"),
        ],
    )
    def test_a_planted_import_is_found(self, tmp_path, file, line, wrong):
        """The line stands inside a function, where an import hides best."""
        planted = tmp_path / "fastsal"
        shutil.copytree(
            PACKAGE, planted, ignore=lambda folder, names: [n for n in names if Path(n).suffix not in ("", ".py")]
        )
        with (planted / file).open("a", encoding="utf-8") as text:
            text.write(f"\n\ndef planted():\n    {line}\n")
        found = wrong_imports(planted)
        assert len(found) == 1
        assert found[0].startswith(wrong)


def wrong_imports(package):
    """What is wrong with the imports of the files in a folder that holds fastsal, a line for each."""
    files = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    height = {name: height for height, names in enumerate(LAYERS) for name in names}

    def listed(module):
        """The name that stands for a module: its own, or that of the nearest package around it that is listed."""
        while module and module not in height:
            module = module.rpartition(".")[0]
        return module

    graph, wrong = {module: set() for module in files}, []
    for module, path in files.items():
        mine, half = listed(module), module.split(".")[0]
        if not mine:
            wrong.append(f"fastsal.{module} has no place in LAYERS")
            continue
        for name in imported_names(path, package):
            if name != "fastsal" and not name.startswith("fastsal."):
                if module in LEAVES and name.split(".")[0] not in {*sys.stdlib_module_names, "torch"}:
                    wrong.append(f"fastsal.{module} imports {name}")
                continue
            parts = name.split(".")[1:]
            while parts and ".".join(parts) not in {*files, "_cpu", "_cuda"}:
                parts.pop()  # what is imported from the module
            target = ".".join(parts) or "__init__"
            below, other = listed(target), target.split(".")[0]
            upward = height.get(below, -1) <= height[mine] and below != mine
            if upward or module in LEAVES or (half != other and {half, other} <= {*STRANGERS}):
                wrong.append(f"fastsal.{module} imports fastsal.{target}")
            elif target != module:
                graph[module].add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        wrong.append("a cycle: " + " is imported by ".join(f"fastsal.{module}" for module in error.args[1]))
    return wrong


def private_names(text):
    """Modules of torch's that a file of this text imports or names, and that torch calls private."""
    found = re.findall(r"\b(torch(?:\.\w+)*\._[a-z]\w*|torch\.fx\.experimental|torch\._C\b)", text)
    return sorted(set(found) - {"torch.__version__", "torch.__file__"})


def test_private_modules_of_torch_are_named_in_one_file():
    assert private_names("import torch._guards\nfrom torch.nn._x import y; torch._C.z") != []
    found = {path.name: private_names(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    assert {name for name, names in found.items() if names} == {"private.py", "calling.py"}
    # Whether it was imported by others, which a torch without it answers too.
    assert found["calling.py"] == ["torch._dynamo"]


def imported_names(path, package):
    """Full names of everything that a file of the package imports, at its top or inside functions."""
    home = ".".join(("fastsal", *path.relative_to(package).parts[:-1]))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), home)
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    "package", ["fastsal", *(one.name for one in pkgutil.iter_modules(fastsal.__path__, "fastsal.") if one.ispkg)]
)
def test_nothing_hides_a_module_of_its_name(package):
    """What a package calls by the name of one of its modules is that module: `fastsal.analysis`, not a function analysis."""
    module = importlib.import_module(package)
    for submodule in pkgutil.iter_modules(module.__path__):
        found = getattr(module, submodule.name, None)
        assert found is None or isinstance(found, types.ModuleType), f"{package}.{submodule.name} is {found!r}"
