"""Collectives, cycles and memory in the text of an optimised HLO module.

Imports no JAX.

On TPUs a collective is asynchronous in one of two forms: as a pair of instructions
(`collective-permute-start`), or inside fusions, of which the first ends in an
`AsyncCollectiveStart` and others continue it beside other work. A reduce-scatter is
printed as an all-reduce inside a fusion with its name. Every instruction that computes
has an estimate of its cycles; collectives and Pallas kernels have none, but kernels
have the cost estimate that they were given.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
BITS_BY_KIND = {"pred": 8, "token": 0, "bf16": 16}
UNIT_BY_LETTER = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"constant\((\d+)\)")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_ITERATIONS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_COST = re.compile(r'"cost_estimate":\{"flops":"(\d+)","transcendentals":"(\d+)"')
_KERNEL = re.compile(r'op_name="[^"]*?(\w+)[^\w"]*/pallas_call')
_SHORT = re.compile(
    r"total memory required for [^(]*\(([\d.]+)([BKMGT]?)\) exceeds available \w+ "
    r"\(([\d.]+)([BKMGT]?)\)"
)
_SHORT_OLD = re.compile(
    r"Used ([\d.]+)([BKMGT]?) of ([\d.]+)([BKMGT]?) \w+", re.IGNORECASE
)


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str
    """Name, such as `all-reduce`."""
    num_bytes: int
    """Bytes of the whole array: before an all-reduce or a reduce-scatter, after an
    all-gather."""
    group: int
    """Chips of the collective."""
    asynchronous: bool
    """Whether it overlaps with other work."""
    times: int
    """Executions in a run of the program."""

    @property
    def sent_bytes(self) -> float:
        """Bytes that a chip sends in one execution, by the ring algorithm."""
        share = (self.group - 1) / max(self.group, 1)
        if self.kind == "all-reduce":
            return 2 * share * self.num_bytes
        if self.kind == "collective-permute":
            return float(self.num_bytes)
        return share * self.num_bytes


class Kernel(NamedTuple):
    """A Pallas kernel, with its own cost estimate."""

    name: str
    """Name of the kernel."""
    flops: int
    """FLOPs of the estimate."""
    transcendentals: int
    """Exponentials and similar operations of the estimate."""
    times: int
    """Executions in a run of the program."""


class Shortage(NamedTuple):
    """Memory of a program that does not fit."""

    needed: float
    """Bytes that it needs."""
    available: float
    """Bytes of the device."""


class Instruction(NamedTuple):
    """One instruction of a program."""

    opcode: str
    """Operation."""
    result: str
    """Text of the result's type."""
    text: str
    """Whole text."""


class Program(NamedTuple):
    """A parsed module."""

    computations: dict[str, list[Instruction]]
    """Instructions of each computation, by name."""
    entry: str
    """Name of the entry computation."""


def parse_program(text: str) -> Program:
    """Parse the text of an optimised module.

    Raises:
      ValueError: If there is no entry in it.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            opcode = _OPCODE.search(found[2])
            if opcode:
                result = found[2][: opcode.start()]
                current.append(Instruction(opcode[1], result, found[2]))
    if not entry:
        raise ValueError("text: got no ENTRY, wanted an optimised HLO module")
    return Program(computations, entry)


def estimated_cycles(program: Program) -> int:
    """Sum the estimated cycles of all executed instructions."""
    total = 0
    for instruction, times in _executed(program):
        found = _CYCLES.search(instruction.text)
        total += times * int(found[1]) if found else 0
    return total


def kernels(program: Program) -> list[Kernel]:
    """List the executed kernels that have a cost estimate."""
    rows: list[Kernel] = []
    for instruction, times in _executed(program):
        cost = _COST.search(instruction.text)
        if instruction.opcode == "custom-call" and cost:
            named = _KERNEL.search(instruction.text)
            name = named[1] if named else ""
            rows.append(Kernel(name, int(cost[1]), int(cost[2]), times))
    return rows


def collectives(program: Program) -> list[Collective]:
    """List the executed collectives in the order of the program."""
    rows: list[Collective] = []
    fused: dict[str, int] = {}
    for instruction, times in _executed(program):
        kind, half = _kind(instruction.opcode)
        if kind:
            if half != "done":
                rows.append(_collective(kind, instruction, half == "start", times))
            continue
        if instruction.opcode not in ("fusion", "async-start"):
            continue
        for name, inner in _within(program, instruction):
            kind, _ = _kind(inner.opcode)
            channel = _CHANNEL.search(inner.text)
            if not kind:
                continue
            if "reduce-scatter" in name or "all-reduce-scatter" in name:
                kind = "reduce-scatter"
            row = _collective(
                kind, inner, _is_asynchronous(program, name, instruction.opcode), times
            )
            chain = _CHAIN.search(inner.text)  # collectives may share a channel
            details = channel[1] if channel else name
            key = f"{kind} {details} {chain[1] if chain else 0}"
            if key in fused:  # continued in another fusion
                known = rows[fused[key]]
                both = known.asynchronous or row.asynchronous
                rows[fused[key]] = known._replace(asynchronous=both)
            else:
                fused[key] = len(rows)
                rows.append(row)
    return [row for row in rows if row.group > 1]


def parse_shortage(message: str) -> Shortage | None:
    """Read the memory in a compiler's error; None for an error of another kind."""
    found = _SHORT.search(message) or _SHORT_OLD.search(message)
    if found is None:
        return None
    needed, unit, available, available_unit = found.groups()
    return Shortage(
        float(needed) * UNIT_BY_LETTER[unit.upper()],
        float(available) * UNIT_BY_LETTER[available_unit.upper()],
    )


def num_bytes(result: str) -> int:
    """Count the bytes of a type, without the padding of its layout."""
    return sum(_array_bytes(*found) for found in _ARRAY.findall(result))


def _array_bytes(kind: str, shape: str) -> int:
    bits = BITS_BY_KIND.get(kind)
    if bits is None:
        digits = re.search(r"\d+", kind)
        bits = int(digits[0]) if digits else 0
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


def _executed(program: Program) -> Iterator[tuple[Instruction, int]]:
    """Yield each executed instruction and its number of executions; all branches."""
    todo = [(program.entry, 1)]
    while todo:
        name, times = todo.pop()
        for instruction in program.computations.get(name, []):
            yield instruction, times
            if instruction.opcode == "while":
                inner = times * _trips(program, instruction)
                todo += [
                    (called, inner)
                    for role, called in _CALLED.findall(instruction.text)
                    if role == "body"
                ]
            elif instruction.opcode in ("call", "conditional"):
                names = [called for _, called in _CALLED.findall(instruction.text)]
                if listed := _BRANCHES.search(instruction.text):
                    names += [n.strip(" %") for n in listed[1].split(",")]
                todo += [(called, times) for called in names]


def _trips(program: Program, loop: Instruction) -> int:
    """Return the rounds of a loop: stated, or the bound of its counter; else 1.

    TPU programs do not state it; JAX's scans count from 0 up to a constant.
    """
    if details := _TRIPS.search(loop.text):
        return int(details[1])
    called = dict(_CALLED.findall(loop.text))
    condition = program.computations.get(called.get("condition", ""), [])
    compared = [
        i for i in condition if i.opcode == "compare" and "direction=LT" in i.text
    ]
    limits = [_CONSTANT.search(i.text) for i in condition if i.opcode == "constant"]
    found = [int(limit[1]) for limit in limits if limit]
    return found[0] if len(compared) == len(found) == 1 else 1


def _within(
    program: Program, instruction: Instruction
) -> Iterator[tuple[str, Instruction]]:
    for role, name in _CALLED.findall(instruction.text):
        if role == "calls":
            for inner in program.computations.get(name, []):
                yield name, inner


def _is_asynchronous(program: Program, name: str, opcode: str) -> bool:
    """Return whether a fusion is part of an asynchronous collective."""
    return (
        opcode == "async-start"
        or name.startswith("async_collective")
        or any(
            "AsyncCollectiveStart" in inner.text
            for inner in program.computations.get(name, [])
        )
    )


def _kind(opcode: str) -> tuple[str, str]:
    for kind in COLLECTIVES:
        if opcode == kind:
            return kind, ""
        if opcode in (f"{kind}-start", f"{kind}-done"):
            return kind, opcode.removeprefix(f"{kind}-")
    return "", ""


def _collective(
    kind: str, instruction: Instruction, asynchronous: bool, times: int
) -> Collective:
    size = num_bytes(instruction.result)
    group = _group(instruction.text)
    if instruction.opcode.endswith("-start"):
        # The type has operand and result; the larger one is the whole array.
        arrays = _ARRAY.findall(instruction.result)
        size = max((_array_bytes(*found) for found in arrays), default=0)
    elif kind == "reduce-scatter" and instruction.opcode == "reduce-scatter":
        size *= group
    return Collective(kind, size, group, asynchronous, times)


def _group(text: str) -> int:
    if found := _ITERATIONS.search(text):
        return int(found[2])
    if found := _LISTED.search(text):
        return len(found[1].split(","))
    if found := _MESH.search(text):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", found[1]))
        return math.prod(int(sizes[a]) for a in re.findall(r"'([^']*)'", found[2]))
    return 2 if "source_target_pairs" in text else 1
