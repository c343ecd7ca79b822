"""Machine code as `cuobjdump -sass` prints it: its loops, and how many instructions a warp takes along the usual path."""

import heapq
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

LINE = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(@\S+\s+)?([A-Z][\w.]+)(.*?);")
LOAD_OR_USE = re.compile(r"LDG|[FD]ADD|[FD]FMA|[FD]SETP|BRA|CALL")


class Instruction(NamedTuple):
    """`target` is where a branch goes; `always`: it does whatever a predicate says."""

    address: int
    word: str
    target: int | None
    always: bool


Code = list[Instruction]


def instruction(line: str) -> Instruction | None:
    """The instruction that a line of the listing holds."""
    if (found := LINE.match(line)) is None:
        return None
    address, predicate, word, operands = found.groups()
    target = re.search(r"0x([0-9a-f]+)\s*$", operands) if word == "BRA" else None
    always = predicate is None and (target is None or re.match(r"\s*U?P\d|\s*!", operands) is None)
    return Instruction(int(address, 16), word, int(target[1], 16) if target else None, always)


def most_loads_in_flight(code: Code) -> int:
    """The longest run of loads from global memory before anything needs one of them, or branches."""
    ordered = "".join("L" if "LDG" in one.word else "+" for one in code if LOAD_OR_USE.match(one.word))
    return max(map(len, ordered.split("+")))


def count(code: Code, word: str) -> int:
    return sum(one.word.startswith(word) for one in code)


def hot_loop(code: Code) -> Code:
    """The instructions of the innermost loop with most loads of 16 bytes."""
    loops = [
        [one for one in code if end.target <= one.address <= end.address] for end in code if end.target is not None
    ]
    inner = [loop for loop in loops if loop and sum(one.target is not None for one in loop) == 1]
    return max(inner, key=lambda loop: count(loop, "LDG.E.128"))


class Usual:
    """The shortest ways between places of a kernel: slow paths are never the shortest."""

    def __init__(self, code: Code) -> None:
        place = {one.address: index for index, one in enumerate(code)}
        jumps = [index for index, one in enumerate(code) if one.word.split(".")[0] in ("BRA", "EXIT", "CALL", "RET")]
        starts = {0, *(index + 1 for index in jumps), *(place[one.target] for one in code if one.target is not None)}
        ordered = sorted(index for index in starts if index < len(code))
        self.blocks = [code[a:b] for a, b in zip(ordered, [*ordered[1:], len(code)], strict=True)]
        of = {index: block for block, index in enumerate(ordered)}
        self._next: list[list[int]] = []
        for block, instructions in enumerate(self.blocks):
            end = instructions[-1]
            ahead = [] if end.target is None else [of[place[end.target]]]
            stops = end.always and (end.word in ("BRA", "EXIT") or end.word.startswith("RET"))
            self._next.append(ahead if stops or block + 1 == len(self.blocks) else [*ahead, block + 1])

    def _cost(self, start: int, ends: set[int]) -> tuple[int, int]:
        """Instructions from behind block `start` to the end of the nearest of `ends`, and which it is."""
        reached, queue = set[int](), [(len(self.blocks[block]), block) for block in self._next[start]]
        heapq.heapify(queue)
        while queue:
            cost, block = heapq.heappop(queue)
            if block in ends:
                return cost, block
            if block not in reached:
                reached.add(block)
                for after in self._next[block]:
                    heapq.heappush(queue, (cost + len(self.blocks[after]), after))
        raise AssertionError("no way there")

    def instructions(self, *places: tuple[Callable[[Code], bool], int]) -> int:
        """From the first instruction to the end of a block of each kind in this order, through each so many times."""
        total, at = len(self.blocks[0]), 0
        for wanted, times in places:
            ends = {block for block, instructions in enumerate(self.blocks) if wanted(instructions)}
            for turn in range(times):
                cost, at = self._cost(at, ends if turn == 0 else {at})
                total += cost
        return total


def functions(lines: Iterable[str]) -> list[tuple[str, Code]]:
    """The mangled names of the kernels of a listing, and their code."""
    found: list[tuple[str, Code]] = []
    for line in lines:
        if "Function : " in line:
            found.append((line.split("Function : ")[1].strip(), []))
        elif one := instruction(line):
            found[-1][1].append(one)
    return found
