"""Memory traffic and collectives of a compiled program; loop bodies count once per iteration."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from flax_qformer.planning.hlo import Computation, Instruction, parse

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
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


def count_traffic(text: str) -> Traffic:
    """The traffic of a program whose `compiled.as_text()` is the text. Branches of conditionals are not counted.

    Raises:
      InputError: the text has a form that the parser does not understand.
    """
    memory, wire, count = 0.0, defaultdict[str, float](float), Counter[str]()
    for instruction, times in _runs(parse(text), 1):
        for kind, sent in _collectives(instruction):
            wire[kind] += times * sent
            count[kind] += 1
        if instruction.opcode not in FREE and not instruction.opcode.endswith("-done"):
            memory += times * _bytes_moved(instruction)
    return Traffic(memory, dict(wire), dict(count))


def _runs(computation: Computation, times: int) -> Iterator[tuple[Instruction, int]]:
    """The instructions of a computation and of those that it runs, each with the number of runs."""
    for instruction in computation:
        yield instruction, times
        if instruction.opcode == "while":
            yield from _runs(instruction.called["body"], times * instruction.trip_count)
        elif instruction.opcode == "call":
            yield from _runs(instruction.called["to_apply"], times)
        elif instruction.opcode == "async-start":
            yield from _runs(instruction.called["calls"], times)


def _collectives(instruction: Instruction) -> Iterator[tuple[str, float]]:
    """Kind and sent bytes of an instruction, or of those in a fusion: on a TPU one can hold a sliced all-reduce."""
    is_fusion = instruction.opcode == "fusion"
    for sender in instruction.called["calls"] if is_fusion else (instruction,):
        kind = sender.opcode.removesuffix("-start")
        if kind == "all-reduce" and is_fusion and instruction.size < sender.size:
            kind = "reduce-scatter"
        if kind in COLLECTIVES and (sent := _bytes_sent(sender, kind)):
            yield kind, sent


def _bytes_sent(instruction: Instruction, kind: str) -> float:
    size = sum(operand.size for operand in instruction.operands)
    if kind == "collective-permute":
        return size
    chips = instruction.group_size
    share = (chips - 1) / chips
    return {
        "all-gather": size * (chips - 1),
        "all-reduce": 2 * size * share,
        "reduce-scatter": size * share,
        "all-to-all": size * share,
    }[kind]


def _bytes_moved(instruction: Instruction) -> float:
    """Bytes that an instruction reads and writes; only the slice for slices and updates in place."""
    if instruction.opcode in SLICES:
        return 2 * instruction.size
    if instruction.opcode == "dynamic-update-slice":
        return 2 * instruction.operands[1].size
    read = sum(operand.size for operand in instruction.operands)
    if instruction.opcode == "copy-start":  # its result includes the operand
        return 2 * read
    if "calls" not in instruction.called:
        return instruction.size + read
    inner = instruction.called["calls"]
    return _bytes_written(instruction, inner) + sum(_bytes_read(parameter, inner) for parameter in _parameters(inner))


def _parameters(computation: Computation) -> list[Instruction]:
    return sorted((i for i in computation if i.opcode == "parameter"), key=lambda i: int(i.literal))


def _bytes_read(value: Instruction, inner: Computation) -> float:
    """Bytes that a fusion reads of a value: its slices, if no operation inside reads more."""
    total = 0.0
    for user in inner:
        for place, operand in enumerate(user.operands):
            if operand is not value:
                continue
            if user.opcode in SLICES and place == 0:
                total += user.size
            elif user.opcode == "bitcast":
                total += _bytes_read(user, inner)
            elif "calls" in user.called:
                total += _bytes_read(_parameters(user.called["calls"])[place], user.called["calls"])
            elif user.opcode != "dynamic-update-slice" or place:
                return value.size
    return min(total, value.size)


def _bytes_written(instruction: Instruction, inner: Computation) -> float:
    """Bytes that a fusion writes: the update, if it updates its result in place."""
    updates = [user for user in inner if user.opcode == "dynamic-update-slice" and user.size == instruction.size]
    return updates[0].operands[1].size if updates else instruction.size
