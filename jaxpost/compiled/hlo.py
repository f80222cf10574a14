"""What a compiled program sends between devices and reads from memory, taken from its text.

The text is a list of computations. The walk starts at the entry and follows calls. A loop's body counts as often as the loop
turns; the count comes from its condition, which compares a counter that grows by a constant with a limit. Where the limit is
only known at run time, a scope named `at_most_N_times` around the loop bounds it (see `trips`).

An asynchronous collective appears several times: as its start and its done, and on TPUs in pieces inside the fusions that hide
it. They share a channel, so it is counted once. The reduce-scatter of a TPU is a fusion called all-reduce-scatter, or a loop of
permutes between neighbours.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0}  # fmt: skip
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast", "send")  # fmt: skip
# How often each device sends its share of the array; 1 for other kinds.
SENT = {"all-reduce": 2.0, "all-gather as all-reduce": 2.0}
WHOLE = ("collective-permute", "send")  # kinds that send the whole array
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # operations that write into an array -> the operand that they write
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
        "partition-id", "replica-id", "iota", "domain", "opt-barrier"}  # fmt: skip
SCOPE = re.compile(r"at_most_(\d+)_times")


class Instruction(NamedTuple):
    """One line: its name, the type of its result, the operation, the names of its operands, and what follows them."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    rest: str


class Program(NamedTuple):
    """computations: name -> its instructions by name, the root last; entry: the name of the one that runs first."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


class Visit(NamedTuple):
    """An instruction, where it stands, how often it runs, and whether it is inside a fusion (and so touches no memory)."""

    instruction: Instruction
    computation: str
    times: float
    loops: tuple[str, ...]
    fused: bool


class Collective(NamedTuple):
    """One collective: its kind, the mesh axes that its groups span, the devices of a group by their place in the mesh, the
    bytes of its whole array, the bytes that a chip sends each time, how often it runs, and the operation it was made for.
    """

    kind: str
    axes: str
    group: tuple[int, ...]
    size: float
    sent: float
    times: float
    name: str


# ---------------------------------------------------------------------------------------------------------- The program


def parse(text: str) -> Program:
    """The computations of a compiled program's text."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if line[:1] in "%E" and line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif line == "}":  # nothing after it: a line of a kernel's settings may begin with one
            current = None
        elif current is not None and (instruction := _instruction(line)):
            current[instruction.name] = instruction
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")  # a tuple's type contains spaces
    type_, rest = rest[:end], rest[end:].lstrip()
    op = rest[: rest.index("(")]
    close = _closing(rest, len(op))
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[len(op) : close]))
    if op in ("constant", "parameter"):
        return Instruction(head[2], type_, op, (rest[len(op) + 1 : close],), rest[close + 1 :])
    return Instruction(head[2], type_, op, operands, rest[close + 1 :])


def _closing(text: str, start: int) -> int:
    """The index of the bracket that closes the one at start."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    return len(text)


def _called(instruction: Instruction) -> list[str]:
    """The computations that an instruction runs, a loop's condition left out."""
    if instruction.op in KINDS or instruction.op.removesuffix("-start") in KINDS or instruction.op in ("reduce", "sort", "map"):
        return []  # their computations are scalar functions
    names = re.findall(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)", instruction.rest)
    for group in re.findall(r"(?:branch_computations|called_computations)=\{(.*?)\}", instruction.rest):
        names += re.findall(r"%?([\w.\-]+)", group)
    return names


def walk(program: Program) -> Iterator[Visit]:
    """Every instruction that runs, as often as it does."""
    stack = [(program.entry, 1.0, (), False)]
    while stack:
        name, times, loops, fused = stack.pop()
        for instruction in program.computations[name].values():
            yield Visit(instruction, name, times, loops, fused)
            for callee in _called(instruction):
                if instruction.op == "while":
                    stack.append((callee, times * trips(program, name, instruction), (*loops, callee), fused))
                else:
                    stack.append((callee, times, loops, fused or instruction.op == "fusion"))


def trips(program: Program, where: str, loop: Instruction) -> int:
    """How often a loop of the computation `where` turns, or an upper bound; 1 where nothing says so."""
    if annotated := re.search(r'known_trip_count[^0-9]*"(\d+)"', loop.rest):
        return int(annotated[1])
    named = re.search(r'op_name="([^"]*)"|$', loop.rest)[1] or ""
    if scoped := SCOPE.findall(named.rpartition("/while/body/")[2]):  # an outer loop's scope says nothing of an inner one
        return int(scoped[-1])
    condition = program.computations[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]
    for compare in [i for i in condition.values() if i.op == "compare" and "direction=LT" in i.rest]:
        counter, limit = (condition.get(n) for n in compare.operands)
        limit = _number(condition, limit)
        if limit is None or counter is None or counter.op != "get-tuple-element":
            continue
        index = int(re.search(r"index=(\d+)", counter.rest)[1])
        body = program.computations[re.search(r"body=%?([\w.\-]+)", loop.rest)[1]]
        start = _start(program.computations[where], loop, index)
        return max(math.ceil((limit - start) / _step(body, index)), 0)
    return _fused_limit(program, condition)


def _number(computation: dict, instruction: Instruction | None) -> int | None:
    """The integer that an instruction is, if it is a constant."""
    while instruction is not None and instruction.op in ("copy", "bitcast", "convert"):
        instruction = computation.get(instruction.operands[0])
    if instruction is None or instruction.op != "constant" or not re.fullmatch(r"-?\d+", instruction.operands[0]):
        return None
    return int(instruction.operands[0])


def _start(computation: dict, loop: Instruction, index: int) -> int:
    """The counter's value before the first turn; 0 where that is no constant."""
    carried = computation.get(loop.operands[0])
    if carried is None or carried.op != "tuple":
        return 0
    return _number(computation, computation.get(carried.operands[index])) or 0


def _step(body: dict, index: int) -> int:
    """How much a turn adds to the counter; an unrolled loop adds more than one."""
    root = list(body.values())[-1]
    if root.op != "tuple":
        return 1
    total, current = 0, body.get(root.operands[index])
    while current is not None and current.op == "add":
        parts = [body.get(n) for n in current.operands]
        numbers = [n for part in parts if (n := _number(body, part)) is not None]
        if len(numbers) != 1:
            return 1
        total += numbers[0]
        current = next((p for p in parts if _number(body, p) is None), None)
    return total if total > 0 else 1


def _fused_limit(program: Program, condition: dict) -> int:
    """The limit of a condition whose comparison is inside a fusion: the largest integer constant there."""
    inside = [i for c in condition.values() for n in _called(c) for i in program.computations[n].values()]
    if not any(i.op == "compare" for i in inside):
        return 1
    every = [*condition.values(), *inside]
    numbers = [n for i in every if i.op == "constant" and i.type.startswith(("s32[]", "u32[]")) and (n := _number({}, i))]
    return max(numbers, default=1)


# -------------------------------------------------------------------------------------------------------- The sizes


def bytes_of(type_: str) -> float:
    """Bytes of a result's type, all parts of a tuple together."""
    return sum(SIZES.get(kind, 0) * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in _shapes(type_))


def _shapes(type_: str) -> list[tuple[str, str]]:
    return re.findall(r"(\w+)\[([\d,]*)\]", re.sub(r"\{[^{}]*\}", "", type_))


# ---------------------------------------------------------------------------------------------------- The collectives


def groups(rest: str, devices: int) -> np.ndarray:
    """The groups of a collective, one a row, as places in the mesh. The text lists them, or gives a reshaped and transposed
    iota, axes of a mesh, or the sources and targets of a permute.
    """
    if match := re.search(r"source_target_pairs=\{\{(.*?)\}\}", rest):
        return np.array([[int(n) for n in pair.split(",")] for pair in match[1].split("},{")])
    if match := re.search(r"replica_groups=\{\{(.*?)\}\}", rest):
        rows = [[int(n) for n in group.split(",")] for group in match[1].split("},{")]
        return np.array([row for row in rows if len(row) == len(rows[0])])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _turned(match[2], match[3]).reshape([int(n) for n in match[1].split(",")])
    mesh = r"replica_groups=@?mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}"
    if match := re.search(mesh, rest):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
        ids = (_turned(match[2], match[3]) if match[2] else np.arange(devices)).reshape(list(sizes.values()))
        within = [i for i, name in enumerate(sizes) if f"'{name}'" in match[4]]
        return np.moveaxis(ids, within, range(-len(within), 0)).reshape(-1, math.prod(ids.shape[i] for i in within))
    return np.arange(devices)[None]


def _turned(dims: str, order: str | None) -> np.ndarray:
    sides = [int(n) for n in dims.split(",")]
    ids = np.arange(math.prod(sides)).reshape(sides)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def axes_of(rows: np.ndarray, shape: dict[str, int]) -> str:
    """The axes of a mesh (name -> size) along which the devices of a group differ, joined by commas."""
    coordinates = np.array(np.unravel_index(rows, list(shape.values())))
    differs = [bool((c != c[:, :1]).any()) for c in coordinates]
    return ",".join(name for name, moves in zip(shape, differs, strict=True) if moves)


def collectives(program: Program, shape: dict[str, int]) -> list[Collective]:
    """Every collective of a program on a mesh of this shape (axis -> size), largest first, except those within one device."""
    entries, keys = [], set()
    for visit in walk(program):
        i = visit.instruction
        if (kind := i.op.removesuffix("-start")) not in KINDS or "-done" in i.op:
            continue
        channel = re.search(r"channel_id=(\d+)", i.rest)
        size = _whole(kind, i, program.computations[visit.computation])
        key = (channel[1] if channel else i.name, kind, size, visit.loops)
        rows = groups(i.rest, math.prod(shape.values()))
        if key in keys or rows.shape[1] < 2:
            continue
        keys.add(key)
        name = re.search(r'op_name="([^"]*)"', i.rest)
        group = _ring(rows) if kind == "collective-permute" else tuple(int(n) for n in rows[0])
        meant = _meant(kind, visit, program)
        sent = size * SENT.get(meant, 1.0) * (1.0 if kind in WHOLE else (len(group) - 1) / len(group))
        axes = "slices" if meant.endswith("between slices") else axes_of(rows, shape)
        entries.append(Collective(meant, axes, group, size, sent, visit.times, name[1] if name else ""))
    return sorted(entries, key=lambda c: -c.sent * c.times)


def _whole(kind: str, instruction: Instruction, computation: dict) -> float:
    """Bytes of the whole array that is gathered, reduced or exchanged."""
    operands = sum(bytes_of(computation[n].type) for n in instruction.operands if n in computation)
    if kind in ("all-gather", "collective-broadcast"):
        # A start's result holds its operand and counters as well.
        result = bytes_of(instruction.type)
        return result - operands if instruction.op.endswith("-start") else result
    return operands or bytes_of(instruction.type)


def _ring(pairs: np.ndarray) -> tuple[int, ...]:
    """The devices that a permute's array passes through, from the first one's on."""
    follows, ring = dict(pairs.tolist()), [int(pairs[0, 0])]
    while (after := follows.get(ring[-1])) is not None and after not in ring:
        ring.append(after)
    return tuple(ring)


def _meant(kind: str, visit: Visit, program: Program) -> str:
    """The kind by its purpose: also a fused reduce-scatter, or an all-gather written as a sum of padded parts."""
    if kind == "collective-permute" and (loop := re.search(r"windowed_dot_general_body_(rs|ag)", visit.computation)):
        return {"rs": "reduce-scatter by permutes", "ag": "all-gather by permutes"}[loop[1]]
    if kind == "send":
        transfer = re.search(r'megascale_transfer_type="(\w+)"', visit.instruction.rest)
        return f"{transfer[1].lower().replace('_', '-') if transfer else 'send'} between slices"
    if kind != "all-reduce":
        return kind
    if "all-reduce-scatter" in visit.computation:
        return "reduce-scatter"
    computation = program.computations[visit.computation]
    parts = [computation.get(n) for n in visit.instruction.operands]
    if parts and all(part is not None and _pads(program, computation, part) for part in parts):
        return "all-gather as all-reduce"
    return kind


def _pads(program: Program, computation: dict, instruction: Instruction) -> bool:
    """Whether an array is a smaller one padded with zeros."""
    while instruction.op in ("copy", "copy-done", "copy-start", "bitcast", "get-tuple-element"):
        instruction = computation.get(instruction.operands[0]) if instruction.operands else None
        if instruction is None:
            return False
    if instruction.op == "fusion" and (called := _called(instruction)):
        computation = program.computations[called[0]]
        instruction = list(computation.values())[-1]
    if instruction.op != "dynamic-update-slice":
        return False
    target = computation.get(instruction.operands[0])
    return target is not None and target.op in ("broadcast", "constant", "parameter")


# ------------------------------------------------------------------------------------------------------------ Memory


def traffic(program: Program) -> float:
    """Bytes that a device reads from and writes to its memory: the operands and results of every operation outside fusions.

    An array that is read or written in slices counts only its slices. What a TPU keeps on the chip does not count.
    """
    return sum(
        visit.times * _touched(program, visit)
        for visit in walk(program)
        if not visit.fused and visit.instruction.op not in FREE and not visit.instruction.op.endswith("-done")
    )


def _touched(program: Program, visit: Visit) -> float:
    i, computation = visit.instruction, program.computations[visit.computation]
    types = [computation[n].type if n in computation else "" for n in i.operands]
    if i.op in ("dynamic-slice", "gather"):
        return 2 * _in_memory(i.type)
    if i.op in UPDATES:
        return 2 * _in_memory(types[UPDATES[i.op]])
    if i.op in ("copy-start", "slice-start"):  # to the chip or from it
        first, second = re.findall(r"\w+\[[\d,]*\](?:\{[^{}]*\})?", i.type)[:2]
        read = bytes_of(second) if _in_memory(first) else 0.0
        return _in_memory(second) + (read if i.op == "slice-start" else _in_memory(first))
    if i.op == "fusion" and (called := _called(i)):
        return _fusion(program.computations[called[0]], types, i.type)
    if i.op.endswith("-start"):
        return sum(map(_in_memory, types)) * 2
    return sum(map(_in_memory, types)) + _in_memory(i.type)


def _fusion(inside: dict, types: list[str], result: str) -> float:
    users: dict[str, list[Instruction]] = {}
    for i in inside.values():
        for n in i.operands if i.op != "parameter" else ():
            users.setdefault(n, []).append(i)
    total, written = 0.0, 0.0
    for parameter in [i for i in inside.values() if i.op == "parameter"]:
        if (place := int(parameter.operands[0])) >= len(types) or not _in_memory(types[place]):
            continue
        uses = users.get(parameter.name, [])
        if uses and all(u.op in ("dynamic-slice", "gather") and u.operands[0] == parameter.name for u in uses):
            total += sum(bytes_of(u.type) for u in uses)
        elif uses and all(u.op in UPDATES and u.operands[0] == parameter.name for u in uses):
            written += bytes_of(types[place]) - sum(bytes_of(inside[u.operands[UPDATES[u.op]]].type) for u in uses)
        else:
            total += _in_memory(types[place])
    return total + max(_in_memory(result) - written, 0.0)


def _in_memory(type_: str) -> float:
    """Bytes of those parts of a type that are in the device's main memory."""
    parts = re.findall(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?", type_)
    return sum(
        SIZES.get(kind, 0) * math.prod(map(int, filter(None, dims.split(","))))
        for kind, dims, layout in parts
        if not re.search(r"S\([1-9]", layout)
    )
