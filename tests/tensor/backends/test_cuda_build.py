"""The installed fastsal._cuda as the build left it: architectures, registers and spills, and manners without a driver."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
CUDA = importlib.util.find_spec("fastsal._cuda")


class Instruction(NamedTuple):
    """One of a kernel's machine code; `target` is where a branch goes."""

    address: int
    word: str
    target: int | None


INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(?:@\S+\s+)?([A-Z][\w.]+)(.*?);")
LOAD_OR_USE = re.compile(r"LDG|[FD]ADD|[FD]FMA|[FD]SETP|BRA|CALL")
# Instructions at most, of sm_90: entry functions of each kernel, of one of them as it stands, and of its innermost loop that
# loads most. They are what nvcc 13.0 made, and a little more.
BUDGETS = {
    "row_sums_kernel": (9, 3150, 470),
    "row_sums_join_kernel": (3, 370, None),
    "row_norms_double_kernel": (3, 1200, None),
    "margin_geometry_finish_kernel": (12, 4400, None),
    "pairwise_margins_tile_kernel": (12, 2400, None),
    "pairwise_margins_project_kernel": (1, 750, None),
    "pairwise_margins_finish_kernel": (6, 2900, None),
    "pairwise_backward_sum_weights_kernel": (1, 300, None),
    "pairwise_backward_x_kernel": (1, 550, None),
    "pairwise_backward_tops_kernel": (1, 1400, None),
    "pairwise_backward_rows_kernel": (3, 1700, None),
    "probe_kernel": (1, 20, None),
}
KERNELS = set(BUDGETS)
FLOAT32_LOOP = 175  # of the pass over rows in float32: two steps of four rows
NARROW_FINISH = 1600  # of the kernel that finishes an example below float64
REGISTERS = {"row_sums_kernel": 128, "margin_geometry_finish_kernel": 96}  # of the 65536 of a multiprocessor
H200 = 132  # multiprocessors

needs_module = pytest.mark.skipif(CUDA is None, reason="fastsal was installed without fastsal._cuda (no nvcc)")


def tool(name):
    """A CUDA tool: of CUDA_HOME, on PATH, or of Triton's wheel, which has cuobjdump."""
    folders = [os.path.join(os.environ.get("CUDA_HOME", ""), "bin")]
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    found = shutil.which(name, path=folders[0]) or shutil.which(name) or shutil.which(name, path=folders[-1])
    return found or pytest.skip(f"no {name} in CUDA_HOME, on PATH or in Triton's package")


def nvcc_output(option):
    return subprocess.run([tool("nvcc"), option], capture_output=True, text=True, check=True).stdout.split()


def cuobjdump(option):
    command = [tool("cuobjdump"), option, CUDA.origin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@needs_module
def test_architectures():
    """Machine code for every architecture asked for, and PTX of the newest."""
    default = ";".join(
        arch for arch in ("80", "90", "100", "120") if f"compute_{arch}" in nvcc_output("--list-gpu-arch")
    )
    wanted = sorted(int(arch) for arch in os.environ.get("FASTSAL_CUDA_ARCHS", default).split(";"))
    found = re.findall(r"sm_(\d+)\.cubin", cuobjdump("--list-elf"))
    assert sorted({int(arch) for arch in found}) == wanted
    assert all(found.count(str(arch)) == len(SOURCES) for arch in wanted)
    assert re.findall(r"sm_(\d+)\.ptx", cuobjdump("--list-ptx")) == [str(wanted[-1])] * len(SOURCES)


@needs_module
def test_registers_and_spills(record_property):
    """Every kernel keeps its values in registers: no stack frame, which is where spills go.

    Its shared memory is below the 48 KiB that every device grants, beside 1 KiB that newer ones keep of every block.
    """
    usage = re.findall(r"Function (\w+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", cuobjdump("-res-usage"))
    kernels = [row for row in usage if re.search(r"\d[a-z_]+_kernel", row[0])]
    names = {re.search(r"\d([a-z_]+_kernel)", row[0]).group(1) for row in kernels}
    assert names == KERNELS
    assert max(int(shared) for _, _, _, shared, _ in kernels) <= 49 * 1024
    for name, registers, *_ in kernels:
        kernel = re.search(r"\d([a-z_]+_kernel)", name)[1]
        assert int(registers) <= REGISTERS.get(kernel, 255), name
    lines = [f"{name} {registers} {stack} {local}" for name, registers, stack, _, local in kernels]
    record_property("kernel registers stack local", "\n".join(lines))
    print(*lines, sep="\n")
    assert not [line for line in lines if not line.endswith(" 0 0")]


@pytest.fixture(scope="module")
def machine_code():
    """The kernels of sm_90, each with its mangled name and the words of its instructions."""
    if "sm_90.cubin" not in cuobjdump("--list-elf"):
        pytest.skip("built without sm_90, whose machine code is read here")
    command = [tool("cuobjdump"), "-sass", "-arch", "sm_90", CUDA.origin]
    functions = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "Function : " in line:
                words = []
                functions.append((re.search(r"\d([a-z_]+_kernel)(\w*)", line).groups(), words))
            elif instruction := INSTRUCTION.match(line):
                address, word, operands = instruction.groups()
                target = re.search(r"0x([0-9a-f]+)\s*$", operands) if word == "BRA" else None
                words.append(Instruction(int(address, 16), word, int(target[1], 16) if target else None))
    assert process.returncode == 0
    assert {name for (name, _), _ in functions} == KERNELS
    return functions


def most_loads_in_flight(code):
    """The longest run of loads from global memory before anything needs one of them, or branches."""
    ordered = "".join("L" if "LDG" in word else "+" for _, word, _ in code if LOAD_OR_USE.match(word))
    return max(map(len, ordered.split("+")))


def hot_loop(code):
    """The instructions of the innermost loop with most loads of 16 bytes."""
    loops = [
        [one for one in code if end.target <= one.address <= end.address] for end in code if end.target is not None
    ]
    inner = [loop for loop in loops if loop and sum(one.target is not None for one in loop) == 1]
    return max(inner, key=lambda loop: sum("LDG.E.128" in one.word for one in loop))


@needs_module
def test_budgets(machine_code, record_property):
    """Entry functions and instructions of every kernel, and of the loop that reads the Jacobian."""
    sizes = {name: [] for name in KERNELS}
    for (name, of), code in machine_code:
        sizes[name].append(len(code))
        if BUDGETS[name][2] is not None:
            loop = len(hot_loop(code))
            record_property(f"hot loop of {name}{of}", loop)
            assert loop <= (FLOAT32_LOOP if re.match(r"ILi\dEf", of) else BUDGETS[name][2]), (name, of, loop)
        if name == "margin_geometry_finish_kernel" and not re.match(r"ILi\dEd", of):
            assert len(code) <= NARROW_FINISH, of
    for name, found in sizes.items():
        entries, instructions, _ = BUDGETS[name]
        assert len(found) <= entries, name
        assert max(found) <= instructions, (name, found)
    assert sum(map(len, sizes.values())) <= 53


@needs_module
@pytest.mark.parametrize(
    ("B", "n", "D"), [(65536, 10, 784), (1700, 100, 3072), (13, 1000, 37632), (1, 1000, 150_528), (8, 10, 784)]
)
@pytest.mark.parametrize("size", [4, 2])
def test_waves_of_the_pass_over_rows(B, n, D, size):
    """Its blocks fill the multiprocessors several times, or the problem is small. 128 registers leave 16 warps."""
    tasks = -(-n // 4) * -(-D * size // 4096)
    waves = B * -(-tasks // 4) / (H200 * 4)
    assert waves > 4 or B * tasks < 264


@needs_module
@pytest.mark.parametrize(
    ("B", "n", "D"), [(1, 1000, 150_528), (2, 1000, 150_528), (2, 1000, 3072), (13, 1000, 37_632), (1, 100, 150_528)]
)
def test_waves_and_memory_of_pairs(B, n, D):
    """Every multiprocessor has several blocks, of which it holds at least four; sums take less than half a GiB."""
    from fastsal import _cuda

    tiles = -(-n // 32)
    assert B * tiles * (tiles + 1) // 2 * -(-D // 4096) > (2 if n == 100 else 8) * H200 - 1
    assert _cuda.pairwise_margins_scratch(_cuda.Inputs(2, 0, 0, n * D, D, 0, 0, 0, B, n, D)) < 2**29


@needs_module
def test_loads_in_flight(machine_code):
    """What a warp waits for is asked for together, before any of it is needed."""
    constants = (ROOT / "csrc/cuda/row_sums.cu").read_text(encoding="utf-8")
    steps, rows = (int(re.search(rf"\b{name} = (\d+);", constants)[1]) for name in ("kSteps", "kGroupRows"))
    wanted = {  # all steps' packs of the anchor, the rows and x; the sums of four segments
        "row_sums_kernel": steps * (rows + 2),
        "row_sums_join_kernel": 4,
    }
    for (name, of), words in machine_code:
        if name in wanted:
            assert most_loads_in_flight(words) >= wanted[name], (name, of)


@needs_module
def test_import_needs_no_driver(run_python):
    """The module imports and answers everywhere; a launch without a driver is an error that says so."""
    code = (
        "import sys, importlib.util as u\n"
        "spec = u.spec_from_file_location('_cuda', sys.argv[1])\n"
        "cuda = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(cuda)\n"
        "print(cuda.runtime_version() >= 11000, 'torch' in sys.modules, bool(cuda.why_not()))\n"
        "try:\n"
        "    cuda.row_sums(cuda.Inputs(2, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1), 0, 0, 0)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    result = run_python("-c", code, CUDA.origin, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == "True False True"
    assert second.startswith("row_sums_kernel: ")


@needs_module
@pytest.mark.parametrize(("norm", "dtype", "named"), [(3, 0, "norm"), (2, 4, "dtype")])
def test_unknown_codes_are_refused(norm, dtype, named):
    from fastsal import _cuda

    with pytest.raises(RuntimeError, match=f"{named}: got code {max(norm, dtype)}"):
        _cuda.row_sums(_cuda.Inputs(norm, dtype, 0, 1, 1, 0, 0, 1, 1, 1, 1), 0, 0, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_refuses_politely_without_a_device():
    import fastsal
    from fastsal.tensor import ops

    reason = fastsal.info()["backends"]["cuda"]
    assert "torch.cuda.is_available()" in reason or "cannot be imported" in reason
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: "):
        ops.choose("cuda", torch.zeros(1, 2, 3))
