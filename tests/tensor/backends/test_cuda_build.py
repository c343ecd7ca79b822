"""The installed fastsal._cuda as the build left it: architectures, registers and spills, and manners without a driver.

Instructions are those of sm_90, read from the listing. Nothing here is a measurement.
"""

import importlib.util
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tensor.backends import machine_code

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
CUDA = importlib.util.find_spec("fastsal._cuda")


# Instructions at most, of sm_90: entry functions of each kernel, of one of them as it stands, and of its innermost loop that
# loads most. They are what nvcc 13.0 made, and a little more.
BUDGETS = {
    "row_sums_kernel": (9, 2600, 300),
    "row_sums_join_kernel": (3, 370, None),
    "row_norms_double_kernel": (3, 1200, None),
    "margin_geometry_finish_kernel": (12, 4650, None),
    "pairwise_margins_tile_kernel": (12, 2400, None),
    "pairwise_margins_project_kernel": (1, 750, None),
    "pairwise_margins_finish_kernel": (6, 3000, None),
    "pairwise_backward_sum_weights_kernel": (1, 300, None),
    "pairwise_backward_x_kernel": (1, 550, None),
    "pairwise_backward_tops_kernel": (1, 1400, None),
    "pairwise_backward_rows_kernel": (3, 1700, None),
    "probe_kernel": (1, 20, None),
}
KERNELS = set(BUDGETS)
FLOAT32_LOOP = 105  # of the pass over rows in float32: a step of five rows
NARROW_FINISH = 1950  # of the kernel that finishes an example below float64
REGISTERS = {"row_sums_kernel": 128, "margin_geometry_finish_kernel": 120}  # of the 65536 of a multiprocessor
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


def cuobjdump(*options):
    command = [tool("cuobjdump"), *options, CUDA.origin]
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
def kernels():
    """The kernels of sm_90, each with its name, its mangled template arguments, and its code."""
    if "sm_90.cubin" not in cuobjdump("--list-elf"):
        pytest.skip("built without sm_90, whose machine code is read here")
    found = machine_code.functions(cuobjdump("-sass", "-arch", "sm_90").splitlines())
    kernels = [(re.search(r"\d([a-z_]+_kernel)(\w*)", name).groups(), code) for name, code in found]
    assert {name for (name, _), _ in kernels} == KERNELS
    return kernels


@needs_module
def test_budgets(kernels, record_property):
    """Entry functions and instructions of every kernel, and of the loop that reads the Jacobian."""
    sizes = {name: [] for name in KERNELS}
    for (name, of), code in kernels:
        sizes[name].append(len(code))
        if BUDGETS[name][2] is not None:
            loop = len(machine_code.hot_loop(code))
            record_property(f"hot loop of {name}{of}", loop)
            assert loop <= (FLOAT32_LOOP if re.match(r"ILi\dEf", of) else BUDGETS[name][2]), (name, of, loop)
        if name == "margin_geometry_finish_kernel" and not re.match(r"ILi\dEd", of):
            assert len(code) <= NARROW_FINISH, of
    for name, found in sizes.items():
        entries, instructions, _ = BUDGETS[name]
        assert len(found) <= entries, name
        assert max(found) <= instructions, (name, found)
    assert sum(map(len, sizes.values())) <= 53


def block_with(**wanted):
    """Whether a block of instructions has so many that begin with each word; underscores are dots."""
    return lambda block: all(
        machine_code.count(block, word.replace("_", ".")) == times for word, times in wanted.items()
    )


# Blocks of the pass over the rows: a step of its loop; single entries; the lanes' sums; x, for the prediction's row; the root
# of a norm.
STEP, SINGLES, LANES = block_with(LDG_E_128=7), block_with(FFMA=15, FADD=5), block_with(STS=15)
OF_X, A_ROOT = block_with(DFMA=4, F2F=4), block_with(MUFU_RSQ64H=1, STG=0)
# Of the kernel that finishes: the warp that selects begins; a class's ratio, and its store; a round of the lanes that look for
# the nearest class, and what the warps of a block exchange; what was found; barriers; an example whose rows need no other
# reading; the scalars.
SELECT, RATIO, STORE = block_with(LDG=2, F2F=1), block_with(DFMA=7, MUFU=1), block_with(STG=1, F2F=1)
ROUND, WARPS, FOUND = block_with(SHFL=6), block_with(BAR=2), block_with(STS=17)
BARRIER, EXAMPLE, SCALARS = block_with(BAR=1), block_with(LDS=1, LDG=0, BSSY=1), block_with(STG=10)
END = block_with(STG=1, EXIT=1)


@pytest.fixture(scope="module")
def usual(kernels):
    """usual(kernel, dtype): the ways through its code, for q = 2."""

    def of(name, dtype):
        (code,) = [code for (kernel, of), code in kernels if kernel == name and of.startswith(f"ILi2E{dtype}")]
        return machine_code.Usual(code)

    return of


def classes(count):
    """The kernel that finishes, where each lane sees so many classes."""
    return (SELECT, 1), *[place for _ in range(count) for place in ((RATIO, 1), (STORE, 1))]


@needs_module
@pytest.mark.parametrize(("dtype", "step", "most"), [("f", 128, 2550), ("NS_8BFloat16E", 256, 3200)])
def test_instructions_for_an_example_of_short_rows(usual, record_property, dtype, step, most):
    """(10, 784), of all warps of both launches. A read at 4.8 TB/s leaves room for 6,700 in float32, 3,300 in bfloat16."""
    rows, finish = usual("row_sums_kernel", dtype), usual("margin_geometry_finish_kernel", dtype)
    steps = (STEP, 784 // step), (SINGLES, 1), (LANES, 1)
    group = rows.instructions(*steps, (A_ROOT, 1), (END, 1))
    group_of_prediction = rows.instructions(*steps, (OF_X, 784 // 128), (A_ROOT, 1), (END, 1))
    # A block finishes eight examples, each by four lanes of its first warp.
    first = finish.instructions(*classes(3), (ROUND, 2), (FOUND, 1), (BARRIER, 1), (EXAMPLE, 2), (SCALARS, 1), (END, 1))
    other = finish.instructions((BARRIER, 1), (EXAMPLE, 2), (BARRIER, 1))
    total = group + group_of_prediction + (first + 3 * other) / 8
    record_property("instructions", total)
    assert total <= most


@needs_module
def test_instructions_behind_the_last_byte(usual, record_property):
    """(1, 1000, 150528) in float32, of one warp in each launch: its lanes' sums, 147 segments that 32 lanes join, the end."""
    rows, join = usual("row_sums_kernel", "f"), usual("row_sums_join_kernel", "")
    finish = usual("margin_geometry_finish_kernel", "f")
    lanes = rows.instructions((STEP, 1), (LANES, 1), (END, 1)) - rows.instructions((STEP, 1))
    segments = (block_with(LDG=3), 1), (block_with(LDG=12), 1)
    joined = join.instructions(*segments, *[(block_with(SHFL=2), 5)] * 3, (block_with(STG=3), 1))
    finished = finish.instructions(
        *classes(2),
        *((ROUND, 5), (WARPS, 1), (ROUND, 4)),
        (FOUND, 1),
        (BARRIER, 1),
        (EXAMPLE, 1),
        (SCALARS, 1),
        (END, 1),
    )
    record_property("instructions", (lanes, joined, finished))
    assert lanes + joined + finished <= 2000


@needs_module
@pytest.mark.parametrize(
    ("B", "n", "D"), [(65536, 10, 784), (1700, 100, 3072), (13, 1000, 37_632), (1, 1000, 150_528), (8, 10, 784)]
)
def test_waves_of_the_pass_over_rows(B, n, D):
    """Its blocks of four warps fill the multiprocessors several times, or the problem is small. 128 registers leave 16."""
    tasks = -(-n // 5) * -(-D // 1024)
    waves = B * tasks / 4 / (H200 * 4)
    assert waves > 8 or B * tasks < 264


@needs_module
@pytest.mark.parametrize(
    ("B", "n", "D", "megabytes"),
    [
        (1, 1000, 150_528, 16.1),
        (2, 1000, 150_528, 32.1),
        (2, 1000, 3072, 24.1),
        (13, 1000, 37_632, 209),
        (1, 100, 150_528, 2),
    ],
)
def test_waves_and_memory_of_pairs(B, n, D, megabytes):
    """Blocks come in eight waves of one for each multiprocessor, or few classes in segments; the last wave is nearly full."""
    from fastsal import _cuda

    scratch = _cuda.pairwise_margins_scratch(_cuda.Inputs(2, 0, 0, n * D, D, 0, 0, 0, B, n, D))
    assert scratch < 1e6 * megabytes
    tiles, runs = -(-n // 32), (scratch // B - 24 * n) // (4 * n * (n - 1))
    waves = B * tiles * (tiles + 1) // 2 * runs / H200
    assert waves >= (8 if n == 1000 else 3)
    assert waves / math.ceil(waves) > 0.9


@needs_module
def test_loads_in_flight(kernels):
    """What a warp waits for is asked for together, before any of it is needed."""
    wanted = {
        "row_sums_kernel": 7,
        "row_sums_join_kernel": 4,
    }  # packs of the anchor, five rows and x; sums of four segments
    for (name, of), words in kernels:
        if name in wanted:
            assert machine_code.most_loads_in_flight(words) >= wanted[name], (name, of)


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
