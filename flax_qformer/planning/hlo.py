"""Memory traffic and collectives of a compiled program, from XLA's text; loop bodies count once per iteration."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from flax_qformer.errors import InputError

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
# Free: no bytes move.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"}
SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Traffic:
    """Traffic of one run of a program on one chip.

    Attributes:
      memory: bytes read and written by the operations, as XLA's cost analysis counts them.
      wire: bytes that a chip sends, by kind of collective, if rings are used.
      collectives: number in the program, by kind; those in a loop run more than once.
    """

    memory: float
    wire: dict[str, float]
    collectives: dict[str, int]


@dataclass
class _Computation:
    instructions: list["_Instruction"] = field(default_factory=list)

    def by_name(self) -> dict[str, "_Instruction"]:
        return {instruction.name: instruction for instruction in self.instructions}


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    literal: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def size(self) -> float:
        return _bytes(self.shape)

    def called(self, attribute: str) -> str | None:
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


def traffic(text: str) -> Traffic:
    """Read `compiled.as_text()`.

    Raises:
      InputError: the text is not of the form that libtpu 0.0.42 writes.
    """
    computations, entry = _parse(text)
    if not entry:
        raise InputError("this libtpu writes programs in an unknown way, without an ENTRY; take another version")
    memory, wire, count = 0.0, defaultdict[str, float](float), Counter[str]()
    for computation, times in _runs(computations, entry, 1):
        known = computation.by_name()
        for one in computation.instructions:
            for kind, sent in _collectives(one, known, computations):
                wire[kind] += times * sent
                count[kind] += 1
            if one.opcode not in FREE and not one.opcode.endswith("-done"):
                memory += times * _moved(one, known, computations)
    return Traffic(memory, dict(wire), dict(count))


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current, entry = _Computation(), ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
        if head:
            current = computations[head[2]] = _Computation()
            entry = head[2] if head[1] else entry
            continue
        found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", line)
        if found:
            inside, attributes = _split(found[4])
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            current.instructions.append(_Instruction(found[1], found[2], found[3], inside, operands, attributes))
    return computations, entry


def _split(rest: str) -> tuple[str, str]:
    """The text inside an opcode's parentheses, and the text after them."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return rest[:place], rest[place + 1 :]
    return rest, ""


def _runs(computations: dict[str, _Computation], name: str, times: int) -> Iterator[tuple[_Computation, int]]:
    """A computation and those that it runs, each with the number of runs."""
    computation = computations[name]
    yield computation, times
    for one in computation.instructions:
        if one.opcode == "while":
            trips = _trips(one, computations)
            yield from _runs(computations, str(one.called("body")), times * trips)
        elif one.opcode in ("call", "async-start"):
            called = one.called("to_apply") or one.called("calls")
            if called in computations:
                yield from _runs(computations, called, times)


def _trips(loop: _Instruction, computations: dict[str, _Computation]) -> int:
    """Iterations of a loop: XLA's trip count, or the number in its condition."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = computations[str(loop.called("condition"))]
    constants = (one.literal for one in condition.instructions if one.opcode == "constant")
    return max((int(literal) for literal in constants if literal.isdecimal()), default=1)


def _collectives(
    one: _Instruction, known: dict[str, _Instruction], computations: dict[str, _Computation]
) -> Iterator[tuple[str, float]]:
    """Kind and sent bytes of an operation, or of those in a fusion: on a TPU one can hold a sliced all-reduce."""
    inner = computations.get(one.called("calls") or "") if one.opcode == "fusion" else None
    for sender in inner.instructions if inner else (one,):
        kind = sender.opcode.removesuffix("-start")
        if kind == "all-reduce" and inner and one.size < sender.size:
            kind = "reduce-scatter"
        if kind in COLLECTIVES and (sent := _sent(sender, kind, inner.by_name() if inner else known)):
            yield kind, sent


def _sent(one: _Instruction, kind: str, known: dict[str, _Instruction]) -> float:
    given = sum(known[name].size for name in one.operands if name in known)
    if kind == "collective-permute":
        return given
    size = _group(one.attributes)
    share = (size - 1) / size
    return {
        "all-gather": given * (size - 1),
        "all-reduce": 2 * given * share,
        "reduce-scatter": given * share,
        "all-to-all": given * share,
    }[kind]


def _group(attributes: str) -> int:
    """Number of chips in a group: XLA lists them, counts them, or names axes of a mesh."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    raise InputError(f"this libtpu writes collectives in an unknown way ({attributes[:80]}); take another")


def _moved(one: _Instruction, known: dict[str, _Instruction], computations: dict[str, _Computation]) -> float:
    """Bytes that an operation reads and writes; only the slice for slices and updates in place."""
    if one.opcode in SLICES:
        return 2 * one.size
    if one.opcode == "dynamic-update-slice":
        return 2 * (known[one.operands[1]].size if one.operands[1] in known else 0.0)
    if one.opcode == "copy-start":  # it also returns what it copies
        return 2 * sum(known[name].size for name in one.operands if name in known)
    inner = computations.get(one.called("calls") or "")
    if inner is None:
        return one.size + sum(known[name].size for name in one.operands if name in known)
    return _written(one, inner) + sum(_read(parameter, inner, computations) for parameter in _parameters(inner))


def _parameters(computation: _Computation) -> list[_Instruction]:
    return sorted((i for i in computation.instructions if i.opcode == "parameter"), key=lambda i: int(i.literal))


def _read(value: _Instruction, inner: _Computation, computations: dict[str, _Computation]) -> float:
    """Bytes that a fusion reads of a value: its slices, if no operation inside reads more."""
    total = 0.0
    for user in inner.instructions:
        for place, name in enumerate(user.operands):
            if name != value.name:
                continue
            nested = computations.get(user.called("calls") or "")
            if user.opcode in SLICES and place == 0:
                total += user.size
            elif user.opcode == "bitcast":
                total += _read(user, inner, computations)
            elif nested is not None:
                total += _read(_parameters(nested)[place], nested, computations)
            elif user.opcode != "dynamic-update-slice" or place:
                return value.size
    return min(total, value.size)


def _written(one: _Instruction, inner: _Computation) -> float:
    known = inner.by_name()
    updates = [u for u in inner.instructions if u.opcode == "dynamic-update-slice" and _bytes(u.shape) == one.size]
    return known[updates[0].operands[1]].size if updates and updates[0].operands[1] in known else one.size


def _bytes(shape: str) -> float:
    total = 0.0
    for dtype, sides in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shape):
        bits = BITS.get(dtype) or int(re.sub(r"\D.*", "", dtype.lstrip("abcdefghijklmnopqrstuvwxyz")) or 8)
        size = 1
        for side in sides.split(","):
            size *= int(side) if side else 1
        total += size * bits / 8
    return total
