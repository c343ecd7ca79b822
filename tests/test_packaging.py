"""The build's switches, what the installed package contains, and what importing it does."""

import importlib
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
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
