"""The build's switches, what the installed package contains, what importing it does, and which way imports go."""

import ast
import graphlib
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import fastsal

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(fastsal.__file__).resolve().parent


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, in an environment without switches."""
    for variable in ("FASTSAL_CUDA", "FASTSAL_CUDA_ARCHS", "CUDA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    spec = importlib.util.spec_from_file_location("fastsal_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """A pretended nvcc, alone on PATH. It fails to compile."""
    path = tmp_path / "cuda" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(
        """#!/bin/sh\n[ "$1" = --list-gpu-arch ] && echo compute_75 compute_80 compute_90 compute_120 && exit\n"""
        """echo '#$ LIBRARIES=  "-L/cuda/lib/stubs" "-L/cu da/lib"' >&2\n[ "$1" = --dryrun ]\n"""
    )
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent))
    return str(path)


class TestBuildSwitches:
    def test_archs(self, build, monkeypatch):
        assert build.cuda_archs() == [80, 90, 100, 120]
        monkeypatch.setenv("FASTSAL_CUDA_ARCHS", "120;80;90;80")
        assert build.cuda_archs() == [80, 90, 120]

    def test_archs_that_nvcc_knows(self, build, nvcc):
        assert build.cuda_archs(nvcc) == [80, 90, 120]

    @pytest.mark.parametrize("archs", ["", "8.0", "80,90", "80;", "sm_80", "native", "90a", "8"])
    def test_bad_archs(self, build, monkeypatch, archs):
        monkeypatch.setenv("FASTSAL_CUDA_ARCHS", archs)
        with pytest.raises(SystemExit, match=re.escape(f"FASTSAL_CUDA_ARCHS={archs!r}: want")):
            build.cuda_archs()

    def test_gencode_ends_with_ptx_of_the_newest(self, build):
        assert build.gencode_flags([80, 90]) == [
            "--generate-code=arch=compute_80,code=sm_80",
            "--generate-code=arch=compute_90,code=sm_90",
            "--generate-code=arch=compute_90,code=compute_90",
        ]

    def test_cuda_home_comes_before_path(self, build, nvcc, tmp_path, monkeypatch):
        assert build.find_nvcc() == nvcc
        other = tmp_path / "other" / "bin" / "nvcc"
        other.parent.mkdir(parents=True)
        shutil.copy(nvcc, other)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "other"))
        assert build.find_nvcc() == str(other)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
        assert build.find_nvcc() == nvcc

    @pytest.mark.parametrize("mode", [None, "auto", "1"])
    def test_cuda_with_nvcc(self, build, nvcc, monkeypatch, mode):
        if mode:
            monkeypatch.setenv("FASTSAL_CUDA", mode)
        assert build.wanted_nvcc(["a.cu"]) == nvcc

    def test_cuda_off(self, build, nvcc, monkeypatch):
        monkeypatch.setenv("FASTSAL_CUDA", "0")
        assert build.wanted_nvcc(["a.cu"]) is None

    @pytest.mark.parametrize("mode", ["yes", "", "2", "ON"])
    def test_cuda_invalid(self, build, monkeypatch, mode):
        monkeypatch.setenv("FASTSAL_CUDA", mode)
        with pytest.raises(SystemExit, match=f"FASTSAL_CUDA={mode!r}: want auto, 0 or 1"):
            build.wanted_nvcc(["a.cu"])

    def test_no_nvcc(self, build, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert build.wanted_nvcc(["a.cu"]) is None
        assert "building without fastsal._cuda: no nvcc" in capsys.readouterr().err
        monkeypatch.setenv("FASTSAL_CUDA", "1")
        with pytest.raises(SystemExit, match="FASTSAL_CUDA=1, but no nvcc"):
            build.wanted_nvcc(["a.cu"])

    def test_no_cuda_sources(self, build, nvcc, monkeypatch, capsys):
        assert build.wanted_nvcc([]) is None
        assert "no csrc/cuda" in capsys.readouterr().err
        monkeypatch.setenv("FASTSAL_CUDA", "1")
        with pytest.raises(SystemExit, match="FASTSAL_CUDA=1, but this source tree has no csrc/cuda"):
            build.wanted_nvcc([])

    def test_nvcc_says_where_to_link_from(self, build, nvcc):
        assert build.cuda_library_dirs(nvcc) == ["/cuda/lib/stubs", "/cu da/lib"]

    def test_failing_nvcc_fails_the_build(self, build, nvcc, tmp_path):
        with pytest.raises(build.CompileError, match=r"nvcc failed on a\.cu"):
            build.compile_cuda(nvcc, ["a.cu"], str(tmp_path))

    @pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
    @pytest.mark.parametrize("has_openmp", [True, False])
    def test_openmp_probe(self, build, tmp_path, has_openmp):
        from distutils.ccompiler import new_compiler  # setuptools' own

        from setuptools import Distribution

        path = tmp_path / "c++"
        refuse = "" if has_openmp else 'case "$*" in *-fopenmp*) echo "error: no OpenMP" >&2; exit 1;; esac'
        path.write_text(f'#!/bin/sh\n{refuse}\nexec {shutil.which("c++")} "$@"\n')
        path.chmod(0o755)
        command = build.BuildNative(Distribution())
        command.compiler = new_compiler()
        jobs = ("compiler", "compiler_so", "compiler_cxx", "compiler_so_cxx", "linker_exe", "linker_exe_cxx")
        command.compiler.set_executables(**dict.fromkeys(jobs, str(path)))
        if not has_openmp:
            assert command.openmp_flags() == ([], [])
        elif sys.platform == "linux":
            assert command.openmp_flags() == (["-fopenmp"], ["-fopenmp"])


class TestInstalled:
    def test_is_not_the_checkout_without_native_modules(self):
        assert importlib.util.find_spec("fastsal._cpu"), f"{PACKAGE} has no native module"

    def test_version_has_one_source(self):
        assert importlib.metadata.version("fastsal") == fastsal.__version__

    def test_needs_torch_and_numpy_only(self):
        requires = [line for line in importlib.metadata.requires("fastsal") if "extra ==" not in line]
        assert {re.match(r"[\w.-]+", line).group() for line in requires} == {"torch", "numpy"}

    def test_console_script(self):
        (script,) = importlib.metadata.entry_points(group="console_scripts", name="fastsal")
        assert script.value == "fastsal.cli:main"

    @pytest.mark.skipif(shutil.which("ldd") is None, reason="needs ldd")
    @pytest.mark.parametrize("name", ["_cpu", "_cuda"])
    def test_native_modules_link_the_system_s_libraries_alone(self, name):
        """Of which libgomp comes with torch, and is left out of the wheels; the last five are parts of the C library."""
        spec = importlib.util.find_spec(f"fastsal.{name}")
        if spec is None:
            pytest.skip(f"built without {name}")
        linked = subprocess.run(["ldd", spec.origin], capture_output=True, text=True, check=True).stdout
        names = {Path(line.split()[0]).name.partition(".so")[0] for line in linked.splitlines()}
        assert "libstdc++" in names
        system = {"libstdc++", "libgcc_s", "libgomp", "libc", "libm", "libdl", "libpthread", "librt", "linux-vdso"}
        assert {name for name in names if not name.startswith("ld-linux")} <= system

    def test_native_module_needs_no_torch(self, run_python):
        code = (
            "import sys, importlib.util as u\n"
            "spec = u.spec_from_file_location('_cpu', sys.argv[1])\n"
            "spec.loader.exec_module(u.module_from_spec(spec))\n"
            "print('torch' in sys.modules)"
        )
        result = run_python("-c", code, importlib.util.find_spec("fastsal._cpu").origin)
        assert result.stdout == "False\n", result.stderr

    def test_import_is_light(self, run_python):
        code = (
            "import sys, torch\n"
            "before = set(sys.modules)\n"
            "import fastsal\n"
            "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
            "heavy = {'captum', 'foolbox', 'matplotlib', 'pyarrow', 'safetensors'}\n"
            "heavy |= {'scipy', 'sklearn', 'torchattacks', 'tqdm'}\n"
            "print(torch.cuda.is_initialized(), new & heavy, 'fastsal.integrations' in sys.modules)"
        )
        result = run_python("-W", "error", "-c", code)
        assert (result.stdout, result.stderr) == ("False set() False\n", "")

    def test_integrations_without_their_libraries(self, run_python):
        code = (
            "import sys\n"
            "for name in ('foolbox', 'torchattacks', 'captum'):\n"
            "    sys.modules[name] = None\n"
            "    try:\n"
            "        __import__(f'fastsal.integrations.{name}')\n"
            "    except ImportError as error:\n"
            "        print(error)"
        )
        result = run_python("-c", code)
        assert result.stderr == ""
        assert result.stdout.splitlines() == [
            f"fastsal.integrations.{name} needs {name}, which is not installed: pip install {install}"
            for name, install in (
                ("foolbox", "foolbox"),
                ("torchattacks", "--no-deps torchattacks; fastsal.fab, the same attack, needs nothing"),
                ("captum", "captum"),
            )
        ]


def test_readme_starts_with_the_two_commands():
    block = re.search(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S).group(1)
    assert block == (
        "pip install -c constraints.txt '.[demo]' && fastsal demo\n"
        "pip install -c constraints.txt '.[test]' && pytest -n 2 --dist loadfile\n"
    )


# Imports go one way, from the top down, and never between the modules of one line. A name stands for a module, or for a package
# with all that is in it but what is listed by itself.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("study",),
    ("__init__",),  # gathers the public names, and starts no command line
    ("integrations", "pages"),
    ("adaptive",),
    ("adversarial", "evaluation", "losses"),
    ("analysis", "biases", "plot"),
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
    ("model.chunking", "model.private"),
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


def test_lower_bounds_are_those_of_the_oldest_environment():
    """A bound that no environment has is a guess."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = {line for group in (project["dependencies"], *project["optional-dependencies"].values()) for line in group}
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in needs if ">=" in line)
    oldest = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "oldest.txt").read_text(encoding="utf-8"), re.M))
    for name, bound in bounds.items():
        assert oldest[name].split(".")[: bound.count(".") + 1] == bound.split("."), name
    assert set(oldest) - set(bounds) == {"triton"}
