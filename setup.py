"""Build of the native modules: `fastsal._cpu` always, `fastsal._cuda` where nvcc is found. Imports no torch.

Everything static is in pyproject.toml. docs/install.md lists the switches, FASTSAL_CUDA and FASTSAL_CUDA_ARCHS.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

ROOT = Path(__file__).resolve().parent
INCLUDE = "csrc/include"
# NaN and infinity keep their meaning, and no compiler may fuse what another SIMD level rounds twice.
CXX_FLAGS = ["-O3", "-g0", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden"]
# No product joins a sum but where the source says so: the same bits from every kernel that takes the same steps.
NVCC_FLAGS = ["-O3", "-std=c++17", "--fmad=false", "--cudart=static", "--compiler-options=-fPIC,-fvisibility=hidden"]
CUDA_ARCHS = (80, 90, 100, 120)
NVCC_JOBS = 2  # one nvcc can take more than a GiB
OPENMP_FLAGS = [(["-fopenmp"], ["-fopenmp"]), (["-Xpreprocessor", "-fopenmp"], ["-lomp"])]  # Apple's clang: the second
OPENMP_PROBE = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"


def sources(pattern: str) -> list[str]:
    """Files under the root that match, sorted, relative to it as setuptools wants them."""
    return [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(pattern))]


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, else of PATH."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc")


def wanted_nvcc(cuda_sources: list[str]) -> str | None:
    """The nvcc to build `fastsal._cuda` with, or None to build without, as FASTSAL_CUDA says."""
    mode = os.environ.get("FASTSAL_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"fastsal: FASTSAL_CUDA={mode!r}: want auto, 0 or 1")
    if mode == "0":
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        missing = "no nvcc in CUDA_HOME/bin or on PATH"
    elif not cuda_sources:
        missing = "this source tree has no csrc/cuda/*.cu"
    else:
        return nvcc
    if mode == "1":
        raise SystemExit(f"fastsal: FASTSAL_CUDA=1, but {missing}")
    print(f"fastsal: building without fastsal._cuda: {missing}", file=sys.stderr)
    return None


def cuda_archs(nvcc: str | None = None) -> list[int]:
    """Compute capabilities of FASTSAL_CUDA_ARCHS, ascending: "80;90" -> [80, 90]. Without it, those that nvcc knows."""
    text = os.environ.get("FASTSAL_CUDA_ARCHS")
    if text is None:
        known = (
            subprocess.run([nvcc, "--list-gpu-arch"], check=True, stdout=subprocess.PIPE, text=True) if nvcc else None
        )
        return [arch for arch in CUDA_ARCHS if known is None or f"compute_{arch}" in known.stdout.split()]
    if not re.fullmatch(r"[1-9]\d{1,2}(;[1-9]\d{1,2})*", text):
        raise SystemExit(f"fastsal: FASTSAL_CUDA_ARCHS={text!r}: want compute capabilities such as '80;90'")
    return sorted({int(arch) for arch in text.split(";")})


def gencode_flags(archs: list[int]) -> list[str]:
    """Machine code for every architecture, and PTX of the newest for those to come."""
    targets = [(arch, f"sm_{arch}") for arch in archs] + [(archs[-1], f"compute_{archs[-1]}")]
    return [f"--generate-code=arch=compute_{arch},code={code}" for arch, code in targets]


def cuda_library_dirs(nvcc: str) -> list[str]:
    """Where nvcc itself would link from: it may be a wrapper, so its own path does not tell."""
    command = [nvcc, "--dryrun", "-c", "probe.cu"]
    dry_run = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True).stderr
    libraries = next((line for line in dry_run.splitlines() if line.startswith("#$ LIBRARIES=")), "")
    return [word[2:] for word in shlex.split(libraries) if word.startswith("-L")]


def compile_cuda(nvcc: str, cuda_sources: list[str], build_temp: str) -> list[str]:
    """Objects of the .cu files. Raises if nvcc fails."""
    flags = [*NVCC_FLAGS, f"-I{INCLUDE}", *gencode_flags(cuda_archs(nvcc))]

    def compile_one(source: str) -> str:
        target = os.path.join(build_temp, f"{source}.o")
        os.makedirs(os.path.dirname(target), exist_ok=True)
        command = [nvcc, *flags, "-c", source, "-o", target]
        print(shlex.join(command))
        if subprocess.run(command).returncode:
            raise CompileError(f"nvcc failed on {source}; FASTSAL_CUDA=0 builds without CUDA")
        return target

    with ThreadPoolExecutor(NVCC_JOBS) as pool:
        return list(pool.map(compile_one, cuda_sources))


class BuildNative(build_ext):
    """build_ext that probes the compiler for OpenMP and hands .cu files to nvcc."""

    def openmp_flags(self) -> tuple[list[str], list[str]]:
        """Flags to compile and to link with; none if no program with OpenMP can be built."""
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "probe.cpp")
            probe.write_text(OPENMP_PROBE)
            for compile_args, link_args in OPENMP_FLAGS:
                try:
                    objects = self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=compile_args)
                    self.compiler.link_executable(objects, "probe", folder, extra_postargs=link_args, target_lang="c++")
                except (CompileError, LinkError):
                    continue
                return compile_args, link_args
        print("fastsal: the compiler has no OpenMP: fastsal._cpu will use one thread", file=sys.stderr)
        return [], []

    def build_extensions(self) -> None:
        compile_args, link_args = self.openmp_flags()
        for extension in self.extensions:
            if extension.name == "fastsal._cpu":
                extension.extra_compile_args += compile_args
                extension.extra_link_args += link_args
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "fastsal._cuda":
            ext.extra_objects += compile_cuda(ext.nvcc, ext.cuda_sources, self.build_temp)
        super().build_extension(ext)


def extensions() -> list[Extension]:
    """The native modules that this environment asks for."""
    from pybind11.setup_helpers import Pybind11Extension

    headers = sources("csrc/**/*.h") + sources("csrc/**/*.cuh")

    def extension(name: str, cpp_sources: list[str]) -> Extension:
        flags = list(CXX_FLAGS)
        return Pybind11Extension(
            name, cpp_sources, include_dirs=[INCLUDE], extra_compile_args=flags, depends=headers, cxx_std=17
        )

    modules = [extension("fastsal._cpu", sources("csrc/cpu/**/*.cpp"))]
    cuda_sources = sources("csrc/cuda/*.cu")
    nvcc = wanted_nvcc(cuda_sources)
    if nvcc:
        cuda = extension("fastsal._cuda", sources("csrc/cuda/*.cpp"))
        cuda.nvcc, cuda.cuda_sources = nvcc, cuda_sources
        cuda.library_dirs += cuda_library_dirs(nvcc)
        cuda.libraries += ["cudart_static", "dl", "rt", "pthread"]
        modules.append(cuda)
    return modules


def main() -> None:
    from pybind11.setup_helpers import ParallelCompile

    cuda_archs()  # a bad list is an error even where nothing is compiled for it
    # A fresh build folder: left-overs of another FASTSAL_CUDA or of a deleted file never reach a wheel.
    with tempfile.TemporaryDirectory() as build_base, ParallelCompile():
        setup(
            ext_modules=extensions(),
            cmdclass={"build_ext": BuildNative},
            options={"build": {"build_base": build_base}},
        )


if __name__ == "__main__":
    main()
