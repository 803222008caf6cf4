"""What the compiler makes of a Triton kernel, read from the machine code: no GPU is needed.

A kernel is compiled ahead of time for a compute capability. Registers, stack and shared memory come from the binary;
spills, float64 and arithmetic from its disassembly. Arithmetic is counted *per pixel and substep*. How often an
instruction runs in one substep follows from PTX, where the loops still are as the source wrote them: ptxas keeps for
each machine instruction the line of PTX that it comes from.

    runs of a PTX line      = product of the constant trip counts of the loops around it
    copies of a PTX loop    = machine instructions per line of PTX that is one instruction: ptxas unrolls
    per pixel and substep   = sum over machine instructions of runs / copies, times threads / pixels of a program

The loop over substeps is the one whose trip count depends on the kernel's argument `n_steps`; several such loops (a
backward that runs forwards first) add up. Whatever cannot be told from the code raises an `AnalysisError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import linecache
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MOST_TRIPS = 1 << 20


class AnalysisError(RuntimeError):
    """The code has a form whose arithmetic per substep cannot be told; nothing is guessed."""


# ---------------------------------------------------------------------------------------------------------------------
# Compiling


@dataclass(frozen=True)
class Compiled:
    """A kernel for one compute capability: machine code, the PTX it came from, bytes of dynamic shared memory."""

    cubin: bytes
    ptx: str
    shared_bytes: int
    arguments: tuple[str, ...]
    """Names of the parameters that PTX numbers: those that are not constants."""
    num_warps: int
    capability: int
    folder: Path
    """Of the kernel's source; the one that PTX names may be another copy, from which Triton's own cache has it."""


def compile_for(
    kernel: JITFunction,
    signature: dict[str, str],
    constants: dict[str, Any],
    divisible: set[str],
    num_warps: int,
    capability: int,
    *,
    enable_fp_fusion: bool = True,
    maxnreg: int | None = None,
    num_stages: int = 3,
) -> Compiled:
    """Compile a kernel as a launch on a GPU of this compute capability (80, 90, 100) would.

    Args:
        signature: type of every argument, as Triton writes it ("*bf16", "i32", "constexpr").
        constants: value of every argument of type "constexpr".
        divisible: arguments known to be divisible by 16 (pointers: aligned to 16 bytes).
        maxnreg: most registers of a thread; None leaves it to ptxas.
    """
    if not isinstance(kernel, JITFunction):
        raise ValueError(f"kernel: expected a compiled Triton kernel, got {kernel!r}; unset TRITON_INTERPRET")
    if signature.keys() != set(kernel.arg_names):
        raise ValueError(f"signature: {kernel.__name__} takes {kernel.arg_names}, got {list(signature)}")
    signature = {name: signature[name] for name in kernel.arg_names}
    hints = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in divisible}
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
    if maxnreg is not None:
        options["maxnreg"] = maxnreg
    source = ASTSource(kernel, signature, constants, hints)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    arguments = tuple(name for name, kind in signature.items() if kind != "constexpr")
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    folder = Path(inspect.getfile(kernel.fn)).parent
    return Compiled(cubin, ptx, compiled.metadata.shared, arguments, compiled.metadata.num_warps, capability, folder)


# ---------------------------------------------------------------------------------------------------------------------
# PTX: loops and how often they run

LABEL = re.compile(r"(\$L\w+):")
BRANCH = re.compile(r"(?:@(?P<negated>!?)(?P<predicate>%\w+)\s+)?bra(?:\.uni)?\s+(?P<target>\$L\w+)\s*;")
DEFINITION = re.compile(r"(?:@!?%\w+\s+)?(?P<operation>[\w.:]+)\s+\{?\s*(?P<result>%\w+)\s*\}?,\s*(?P<operands>.*);")
LOCATION = re.compile(r"\.loc\s+(?P<file>\d+) (?P<line>\d+) \d+[^/]*(?://\s*(?P<comment>.*))?")
FILE = re.compile(r'^\s*\.file\s+(\d+) "(.*)"', re.MULTILINE)
COMPARISONS = {
    "eq": int.__eq__, "ne": int.__ne__, "lt": int.__lt__, "le": int.__le__, "gt": int.__gt__, "ge": int.__ge__,
    "lo": int.__lt__, "ls": int.__le__, "hi": int.__gt__, "hs": int.__ge__,
}  # fmt: skip


@dataclass
class Block:
    """Lines [first, last] of PTX that run together; control leaves to the blocks `successors`."""

    first: int
    last: int
    successors: list[int] = field(default_factory=list)


@dataclass
class Loop:
    """A loop of PTX. `trips` is None where it is known at run time only, by these arguments of the kernel."""

    header: int
    blocks: set[int]
    source: str = "?"
    file: str = ""
    line: int = 0
    trips: int | None = None
    depends_on: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"the loop at {self.source}"


class Counting(NamedTuple):
    """A loop's counter: what it is before the first step, its step, whether a trip steps before it tests."""

    origin: str
    step: int
    stepped: bool


class PTX:
    """Control flow of one PTX kernel."""

    def __init__(self, text: str, arguments: Sequence[str], folder: Path) -> None:
        self.folder = folder
        self.lines = [""] + [
            line.split("//")[0].strip() for line in text.splitlines()
        ]  # numbered from 1, as ptxas does
        self.arguments = arguments
        self.places = self._places(text)
        self.definitions: dict[str, list[tuple[int, str, list[str]]]] = defaultdict(list)
        for number, line in enumerate(self.lines):
            if match := DEFINITION.match(line):
                operands = [operand.strip() for operand in match["operands"].split(",")]
                self.definitions[match["result"]].append((number, match["operation"], operands))
        self.blocks = self._blocks()
        self.loops = self._loops()
        for loop in self.loops:
            self._count(loop)

    def _places(self, text: str) -> list[tuple[str, str, int]]:
        """Of every line, its place in the source ("gram.py:21:38 @[ gram.py:330:62 ]"), file and line."""
        files: dict[str, str] = dict(FILE.findall(text))
        places, current = [("?", "", 0)], ("?", "", 0)
        for line in text.splitlines():
            if match := LOCATION.search(line):
                current = (match["comment"] or match[0], files.get(match["file"], ""), int(match["line"]))
            places.append(current)
        return places

    def _blocks(self) -> list[Block]:
        body = range(self.lines.index("{") + 1, len(self.lines))
        blocks, labels, first = [], {}, body.start
        ends: list[tuple[str | None, bool]] = []  # where each block branches to, and whether it may fall through

        def close(last: int, target: str | None, falls: bool) -> None:
            nonlocal first
            blocks.append(Block(first, last))
            ends.append((target, falls))
            first = last + 1

        for number in body:
            line = self.lines[number]
            if line == "}" and not self.lines[number - 1].endswith(","):
                close(number, None, False)
                break
            if match := LABEL.match(line):
                close(number - 1, None, True)
                labels[match[1]] = len(blocks)
            elif match := BRANCH.match(line):
                close(number, match["target"], match["predicate"] is not None)
            elif re.match(r"(ret|exit|trap)\b", line):
                close(number, None, False)
            elif re.match(r"(@!?%\w+\s+)?(brx|call)", line):
                raise AnalysisError(f"PTX line {number}: `{line}` has targets that are not followed")
        for i, (block, (target, falls)) in enumerate(zip(blocks, ends)):
            block.successors = ([labels[target]] if target else []) + ([i + 1] if falls and i + 1 < len(blocks) else [])
        return blocks

    def _loops(self) -> list[Loop]:
        """Natural loops by their back edges (into a block still open in a depth-first walk), outermost first."""
        predecessors: dict[int, set[int]] = defaultdict(set)
        back, state, path = [], {0: "open"}, [(0, iter(self.blocks[0].successors))]
        while path:
            block, following = path[-1]
            successor = next(following, None)
            if successor is None:
                state[block] = "done"
                path.pop()
                continue
            predecessors[successor].add(block)
            if state.get(successor) == "open":
                back.append((block, successor))
            elif successor not in state:
                state[successor] = "open"
                path.append((successor, iter(self.blocks[successor].successors)))
        loops: dict[int, Loop] = {}
        for latch, header in back:
            loop = loops.setdefault(header, Loop(header, {header}))
            pending = [latch]
            while pending:
                block = pending.pop()
                if block not in loop.blocks:
                    if block == 0:
                        raise AnalysisError("PTX has a loop with two entries")
                    loop.blocks.add(block)
                    pending.extend(predecessors[block])
        return sorted(loops.values(), key=lambda loop: -len(loop.blocks))

    def loops_around(self, number: int) -> tuple[Loop, ...]:
        """The loops that hold a line, outermost first."""
        return tuple(loop for loop in self.loops if self.block_of[number] in loop.blocks)

    @functools.cached_property
    def block_of(self) -> list[int]:
        """Block of every line; -1 outside of the body."""
        of = [-1] * len(self.lines)
        for i, block in enumerate(self.blocks):
            of[block.first : block.last + 1] = [i] * (block.last + 1 - block.first)
        return of

    def _count(self, loop: Loop) -> None:
        """Trip count of a loop from its counter, or the arguments on which it depends."""
        latches = [i for i in loop.blocks if loop.header in self.blocks[i].successors]
        leaving = [i for i in loop.blocks if set(self.blocks[i].successors) - loop.blocks]
        loop.source, loop.file, loop.line = self.places[self.blocks[latches[0]].last]
        if any("nounroll" in line for i in latches for line in self._text(i)):
            raise AnalysisError(f"{loop} was unrolled by LLVM or asks not to be: its substeps cannot be told apart")
        if len(leaving) != 1:
            raise AnalysisError(f"{loop} is left from {len(leaving)} places, one was expected")
        at_its_end = all(self._only_jumps(i) for i in self._behind(leaving[0], loop))
        if not at_its_end and leaving[0] != loop.header:
            raise AnalysisError(f"{loop} is left from its middle")
        end = self.blocks[leaving[0]].last
        branch = BRANCH.match(self.lines[end])
        if branch is None or branch["predicate"] is None:
            raise AnalysisError(f"{loop}: PTX line {end} `{self.lines[end]}` is not a conditional branch")
        goes_on_if = (self.blocks[leaving[0]].successors[0] in loop.blocks) != (branch["negated"] == "!")
        tests = [definition for definition in self.definitions[branch["predicate"]] if definition[0] < end]
        at, operation, operands = tests[-1] if tests else (end, "", [])
        test = re.match(r"setp\.(\w+)\.[sub]\d+$", operation)
        if test is None or len(operands) != 2:
            raise AnalysisError(f"{loop}: PTX line {at} `{self.lines[at]}` is not a comparison of two integers")
        counters = [self._counter(operand, loop, at) for operand in operands]
        swapped = counters[0] is None
        counter, bound = counters[swapped], operands[not swapped]
        first, limit = self._constant(counter.origin) if counter else None, self._constant(bound)
        if counter is None or first is None or limit is None:
            loop.depends_on = frozenset().union(*(self._arguments_behind(operand) for operand in operands))
            return
        for trip in range(MOST_TRIPS):
            value = first + counter.step * (trip + counter.stepped)
            if COMPARISONS[test[1]](*((limit, value) if swapped else (value, limit))) != goes_on_if:
                loop.trips = trip + at_its_end
                return
        raise AnalysisError(f"{loop} does not end within {MOST_TRIPS} trips")

    def runs_by(self, loop: Loop, argument: str) -> bool:
        """Whether a loop runs as often as an argument says, by its code and, where at hand, its line of the source."""
        here = self.folder / Path(loop.file).name
        text = linecache.getline(str(here) if here.is_file() else loop.file, loop.line)
        return loop.trips is None and argument in loop.depends_on and (argument in text or not text)

    def _text(self, block: int) -> list[str]:
        return self.lines[self.blocks[block].first : self.blocks[block].last + 1]

    def _only_jumps(self, block: int) -> bool:
        return all(not line or LABEL.match(line) or BRANCH.match(line) or line[0] == "." for line in self._text(block))

    def _behind(self, block: int, loop: Loop) -> set[int]:
        """Blocks of a loop that run after this one in the same trip."""
        behind: set[int] = set()
        pending = [block]
        while pending:
            following = set(self.blocks[pending.pop()].successors) & loop.blocks - {loop.header} - behind
            behind |= following
            pending.extend(following)
        return behind

    def _counter(self, register: str, loop: Loop, at: int) -> Counting | None:
        """How a register that is compared in line `at` counts the trips of a loop; None where it does not."""
        inside = [d for d in self.definitions.get(register, []) if self.block_of[d[0]] in loop.blocks]
        if len(inside) != 1:
            return None
        number, operation, operands = inside[0]
        phi = register
        if operation.startswith("mov"):  # phi <- sum at the end of a trip, sum = phi + step
            sums = self.definitions.get(operands[0], [])
            if len(sums) != 1:
                return None
            _, operation, operands = sums[0]
        elif len(self.definitions[register]) == 1:  # the sum itself is compared
            phi = operands[0]
        step = integer(operands[1]) if len(operands) == 2 else None
        if not operation.startswith("add.") or step is None or operands[0] != phi:
            return None
        entering = [d for d in self.definitions[phi] if self.block_of[d[0]] not in loop.blocks]
        origins = {d[2][0] if d[1].startswith("mov") else phi for d in entering}
        return Counting(origins.pop(), step, number < at) if len(origins) == 1 else None

    def _constant(self, operand: str, depth: int = 8) -> int | None:
        if (value := integer(operand)) is not None or depth == 0:
            return value
        definitions = self.definitions.get(operand, [])
        if not definitions or not all(d[1].startswith("mov") for d in definitions):
            return None
        values = {self._constant(d[2][0], depth - 1) for d in definitions}
        return values.pop() if len(values) == 1 else None

    def _arguments_behind(self, operand: str) -> frozenset[str]:
        """Arguments of the kernel that a register is computed from."""
        found, seen, pending = set(), set(), [operand]
        while pending:
            register = pending.pop()
            if register in seen:
                continue
            seen.add(register)
            for _, operation, operands in self.definitions.get(register, []):
                if operation.startswith("ld.param"):
                    found.add(self.arguments[int(re.search(r"_param_(\d+)", operands[0])[1])])  # type: ignore[index]
                elif not operation.startswith("ld."):
                    pending.extend(re.findall(r"%\w+", " ".join(operands)))
        return frozenset(found)


def integer(operand: str) -> int | None:
    return int(operand) if re.fullmatch(r"-?\d+", operand) else None


# ---------------------------------------------------------------------------------------------------------------------
# Machine code

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);")
PTX_LINE = re.compile(r'//## File "\.nv_debug_ptx_txt", line (\d+)')
KINDS = ("fma", "mul", "add", "mufu")
FLOAT64 = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|.*\.F64\b|MUFU\.\w*64H")
LOCAL = re.compile(r"(LDL|STL)\b")
ARITHMETIC = {"FFMA": "fma", "FHFMA": "fma", "HFMA2": "fma", "FMUL": "mul", "FHMUL": "mul", "HMUL2": "mul",
              "FADD": "add", "FHADD": "add", "HADD2": "add"}  # fmt: skip
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


COPIED = re.compile(r"(?:@!?%\w+\s+)?(ld\.global|ex2|fma\.rn)\b")
COPIES = {"ld.global": r"LDG\b", "ex2": r"MUFU\.EX2\b", "fma.rn": r"FFMA2?\b"}


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: str
    ptx_line: int
    in_kernel: bool
    """Not in a subroutine, which integer divisions call."""

    @property
    def arithmetic(self) -> tuple[str, int]:
        """("fma" | "mul" | "add", results) on the float pipes; packed instructions have two. ("", 0) for any other."""
        name = self.opcode.split(".")[0]
        packed = name.endswith("2")
        if name.startswith("H") and "RZ" in self.operands:
            return "", 0  # a constant or a conversion in the shape of half arithmetic
        kind = ARITHMETIC.get(name) or ARITHMETIC.get(name.removesuffix("2"), "")
        return kind, (2 if packed else 1) if kind else 0

    @property
    def bytes(self) -> int:
        return next((WIDTHS[part] for part in self.opcode.split(".")[1:] if part in WIDTHS), 4)


def run_on(tool: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([BINARIES / tool, *options, file.name], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AnalysisError(f"{tool} cannot read the compiled kernel: {done.stderr.strip()}")
    return done.stdout


def disassemble(cubin: bytes) -> list[Instruction]:
    """The instructions of a kernel and of its subroutines, each with its line of PTX; padding is left out."""
    instructions, number, in_kernel = [], 0, True
    for line in run_on("nvdisasm", cubin, "-c", "-gp").splitlines():
        if line.startswith("\t.section"):
            in_kernel = True
        elif line.startswith("$"):
            in_kernel = False
        elif match := PTX_LINE.search(line):
            number = int(match[1])
        elif (match := INSTRUCTION.search(line)) and match["opcode"] != "NOP":
            instructions.append(Instruction(match["opcode"], match["operands"], number, in_kernel))
    if not any(instruction.ptx_line for instruction in instructions):
        raise AnalysisError("the machine code names no lines of PTX; unset TRITON_DISABLE_LINE_INFO")
    return instructions


# ---------------------------------------------------------------------------------------------------------------------
# Facts


@dataclass(frozen=True)
class LoopFacts:
    """A loop whose arithmetic is counted: its place in the source, trips (None: at run time), copies by ptxas."""

    source: str
    trips: int | None
    copies: int
    fma: float
    """Multiply-adds, multiplications and additions in it (inner loops not included), per pixel and substep."""


@dataclass(frozen=True)
class KernelFacts:
    """What one compiled kernel costs. Occupancy: resident warps over the most that a multiprocessor holds.

    fma_per_substep: ffma + fmul + fadd, all of them one slot of the float32 pipe, per pixel and substep; mufu likewise.
    None where the kernel does not work on pixels.
    """

    kernel: str
    capability: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    local_instructions: int
    float64_instructions: int
    occupancy: float
    ffma_per_substep: float | None
    fmul_per_substep: float | None
    fadd_per_substep: float | None
    fma_per_substep: float | None
    mufu_per_substep: float | None
    instructions_total: int
    loops: tuple[LoopFacts, ...]


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of a streaming multiprocessor (CUDA programming guide, specifications per compute capability)."""

    shared_bytes: int
    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    registers_granularity: int = 256
    shared_granularity: int = 128
    shared_reserved: int = 1024
    partitions: int = 4


MULTIPROCESSORS = {
    80: Multiprocessor(shared_bytes=164 << 10),
    90: Multiprocessor(shared_bytes=228 << 10),
    100: Multiprocessor(shared_bytes=228 << 10),
}


def occupancy(capability: int, registers: int, shared_bytes: int, num_warps: int) -> float:
    """Resident warps over the most that a multiprocessor holds, as the CUDA occupancy calculator has it."""
    sm = MULTIPROCESSORS[capability]
    per_warp = -(-max(registers, 1) * 32 // sm.registers_granularity) * sm.registers_granularity
    by_registers = sm.registers // sm.partitions // per_warp * sm.partitions // num_warps
    shared = -(-(shared_bytes + sm.shared_reserved) // sm.shared_granularity) * sm.shared_granularity
    blocks = min(by_registers, sm.shared_bytes // shared, sm.warps // num_warps, sm.blocks)
    return blocks * num_warps / sm.warps


def copies_of(loop: Loop, ptx: PTX, by_line: dict[int, list[Instruction]]) -> int:
    """How many copies of a loop's body the machine code holds: ptxas unrolls, with remainders behind and before.

    Each line of PTX that loads, exponentiates or multiplies and adds is one instruction in each copy. Copies may share
    one where they compute the same, so the largest number counts; most lines must have it.
    """
    told: Counter[int] = Counter()
    for i in loop.blocks:
        for number in range(ptx.blocks[i].first, ptx.blocks[i].last + 1):
            match = COPIED.match(ptx.lines[number])
            if match and ptx.loops_around(number)[-1] is loop:
                told[sum(bool(re.match(COPIES[match[1]], each.opcode)) for each in by_line.get(number, []))] += 1
    told.pop(0, None)
    if not told:
        raise AnalysisError(
            f"{loop}: nothing in it tells how ptxas unrolls it, no load, exponential or fused multiply-add"
        )
    copies = max(told)
    if 2 * told[copies] < told.total():
        raise AnalysisError(f"{loop}: its lines have {dict(told)} copies in the machine code, so it cannot be counted")
    return copies


def analyse(compiled: Compiled, block: int | None, *, kernel: str = "", substeps: str | int = "n_steps") -> KernelFacts:
    """Read the facts of a compiled kernel.

    Args:
        block: pixels that one program works on; None for a kernel that does not work on pixels: nothing is counted.
        kernel: name to report.
        substeps: the argument that the loop over substeps depends on; or a number, where the kernel has no such loop
            but is written for that many: then all of it counts, shared evenly.
    """
    usage = run_on("cuobjdump", compiled.cubin, "-res-usage")
    registers, stack, static_shared = (usage_of(field, usage) for field in ("REG", "STACK", "SHARED"))
    instructions = disassemble(compiled.cubin)
    local = [each for each in instructions if LOCAL.match(each.opcode)]
    shared = compiled.shared_bytes + static_shared
    loops: tuple[LoopFacts, ...] = ()
    counts: dict[str, float | None] = dict.fromkeys(KINDS)
    fma = None
    if block is not None:
        loops, counted = count_arithmetic(compiled, instructions, block, substeps)
        counts |= counted
        fma = round(counted["fma"] + counted["mul"] + counted["add"], 6)
    return KernelFacts(
        kernel=kernel,
        capability=compiled.capability,
        registers=registers,
        spill_bytes=sum(each.bytes for each in local),
        stack_bytes=stack,
        shared_bytes=shared,
        local_instructions=len(local),
        float64_instructions=sum(bool(FLOAT64.match(each.opcode)) for each in instructions),
        occupancy=occupancy(compiled.capability, registers, shared, compiled.num_warps),
        ffma_per_substep=counts["fma"],
        fmul_per_substep=counts["mul"],
        fadd_per_substep=counts["add"],
        fma_per_substep=fma,
        mufu_per_substep=counts["mufu"],
        instructions_total=len(instructions),
        loops=loops,
    )


def usage_of(field: str, usage: str) -> int:
    match = re.search(rf"\b{field}:(\d+)", usage)
    if match is None:
        raise AnalysisError(f"cuobjdump names no {field} in {usage!r}")
    return int(match[1])


def count_arithmetic(
    compiled: Compiled, instructions: list[Instruction], block: int, substeps: str | int
) -> tuple[tuple[LoopFacts, ...], dict[str, float]]:
    """Arithmetic per pixel and substep: of each loop (all of it), and of all of them by kind."""
    ptx = PTX(compiled.ptx, compiled.arguments, compiled.folder)
    by_line: dict[int, list[Instruction]] = defaultdict(list)
    for each in instructions:
        if each.in_kernel:
            by_line[each.ptx_line].append(each)
    over_substeps = [loop for loop in ptx.loops if isinstance(substeps, str) and ptx.runs_by(loop, substeps)]
    if isinstance(substeps, str) and not over_substeps:
        raise AnalysisError(f"no loop depends on {substeps!r}; loops: {[loop.source for loop in ptx.loops]}")
    scale = 32 * compiled.num_warps / block / (substeps if isinstance(substeps, int) else 1)
    totals = dict.fromkeys(KINDS, 0.0)
    within: dict[int, float] = defaultdict(float)
    copies: dict[int, int] = {}
    for number, here in by_line.items():
        around = ptx.loops_around(number)
        if over_substeps and not any(loop in over_substeps for loop in around):
            continue
        unknown = [loop for loop in around if loop.trips is None]
        if unknown != [loop for loop in around if loop in over_substeps] or len(unknown) > 1:
            raise AnalysisError(
                " in ".join(f"{loop} runs as often as {sorted(loop.depends_on)} say" for loop in reversed(unknown))
                + ": at most one loop, over substeps, may have a trip count that is not constant"
            )
        runs = scale * math.prod(loop.trips or 1 for loop in around)
        if around:
            innermost = around[-1]
            if innermost.header not in copies:
                copies[innermost.header] = copies_of(innermost, ptx, by_line)
            runs /= copies[innermost.header]
        for each in here:
            kind, results = each.arithmetic
            if kind:
                totals[kind] += runs * results
                within[around[-1].header if around else -1] += runs * results
            totals["mufu"] += runs * each.opcode.startswith("MUFU.")
    loops = (
        LoopFacts(loop.source, loop.trips, copies[loop.header], round(within[loop.header], 6))
        for loop in ptx.loops
        if loop.header in copies
    )
    return tuple(loops), {kind: round(total, 6) for kind, total in totals.items()}


def failures(facts: KernelFacts, needed: float | None = None, most: float = 1.35) -> list[str]:
    """Why a kernel does not pass the gate; empty where it does.

    Spills and local memory fail, and float64 in per-pixel code: a kernel that computes per-sample `coefficients`, by
    its name, may use it. `needed` multiply-adds per pixel and substep, where given, may be exceeded by `most`.
    """
    found = []
    if facts.spill_bytes or facts.stack_bytes or facts.local_instructions:
        found.append(
            f"local memory: {facts.spill_bytes} bytes spilled by {facts.local_instructions} instructions, "
            f"{facts.stack_bytes} bytes of stack"
        )
    if facts.float64_instructions and "coefficients" not in facts.kernel:
        found.append(f"{facts.float64_instructions} float64 instructions in per-pixel code")
    if needed is not None and facts.fma_per_substep is not None and facts.fma_per_substep > most * needed:
        found.append(
            f"{facts.fma_per_substep:.0f} multiply-adds per pixel and substep, {facts.fma_per_substep / needed:.2f}x "
            f"the {needed:.0f} that the algebra needs; at most {most}x"
        )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Many kernels: kept by source hash, compiled in parallel


@dataclass(frozen=True)
class Request:
    """What to compile and analyse; arguments as of `compile_for` and `analyse`. kernel: "package.module:name"."""

    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: frozenset[str]
    num_warps: int
    capability: int
    block: int | None
    substeps: str | int = "n_steps"
    enable_fp_fusion: bool = True
    maxnreg: int | None = None
    num_stages: int = 3

    def function(self) -> JITFunction:
        module, name = self.kernel.split(":")
        return getattr(importlib.import_module(module), name)

    def key(self) -> str:
        """Changes with the source of the kernel and all it calls, with what it is compiled for, and with this file."""
        parts = [self.function().cache_key, triton.__version__, get_ptxas_version(self.capability)]
        fields = dataclasses.asdict(self) | {"divisible": sorted(self.divisible)}
        parts += [json.dumps(fields, sort_keys=True, default=repr), Path(__file__).read_text()]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def analyse_request(request: Request) -> KernelFacts | AnalysisError:
    """Compile and analyse; an error, returned so that it does not end the work on others, names the kernel."""
    try:
        compiled = compile_for(
            request.function(), request.signature, request.constants, set(request.divisible), request.num_warps,
            request.capability, enable_fp_fusion=request.enable_fp_fusion, maxnreg=request.maxnreg,
            num_stages=request.num_stages,
        )  # fmt: skip
        name = request.kernel.split(":")[1]
        return analyse(compiled, request.block, kernel=name, substeps=request.substeps)
    except AnalysisError as error:
        return AnalysisError(f"{request.kernel} for sm_{request.capability}: {error}")


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "piflow" / "static_analysis"


def read_cached(path: Path) -> KernelFacts | None:
    """Facts kept in a file; None where there is none or it does not hold them."""
    try:
        entry = json.loads(path.read_text())
        return KernelFacts(**entry | {"loops": tuple(LoopFacts(**loop) for loop in entry["loops"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_cached(path: Path, facts: KernelFacts) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
        json.dump(dataclasses.asdict(facts), file)
    os.replace(file.name, path)


def analyse_all(requests: Sequence[Request], *, workers: int | None = None) -> Iterator[KernelFacts | AnalysisError]:
    """Facts of each request, in their order; those not in the cache are compiled in parallel.

    Args:
        workers: processes; None takes one for each core. A main module that calls this must be importable.
    """
    paths = [cache_folder() / f"{request.key()}.json" for request in requests]
    kept = [read_cached(path) for path in paths]
    missing = [request for request, facts in zip(requests, kept) if facts is None]
    workers = min(workers or os.cpu_count() or 1, len(missing))
    with contextlib.ExitStack() as stack:
        fresh: Iterator[KernelFacts | AnalysisError] = map(analyse_request, missing)
        if workers > 1:
            pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
            fresh = stack.enter_context(pool).map(analyse_request, missing)
        for known, path in zip(kept, paths):
            facts = known or next(fresh)
            if known is None and isinstance(facts, KernelFacts):
                write_cached(path, facts)
            yield facts
