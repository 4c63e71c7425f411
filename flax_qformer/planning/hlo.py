"""Parse the text of a program that XLA compiled, as `compiled.as_text()` returns it.

XLA does not promise the form of this text. A skipped line would make a plan too small, so each line that this parser
does not understand is an error.
"""

import importlib.metadata
import math
import re
from dataclasses import dataclass
from typing import TypeAlias

from flax_qformer.errors import InputError

COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .*\{$")
INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|[a-z]\w*\[[\d,]*\]\S*) (?P<opcode>[\w\-]+)\((?P<rest>.*)$"
)
CALLS = {"while": {"body", "condition"}, "fusion": {"calls"}, "call": {"to_apply"}, "async-start": {"calls"}}
"""Attributes that name the computations of an instruction, by opcode. Others may have `calls` and `to_apply` too."""

LITERALS = ("parameter", "constant")
"""Opcodes with a literal in place of operands."""

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}

Computation: TypeAlias = list["Instruction"]


@dataclass(frozen=True, eq=False, repr=False)
class Instruction:
    """An instruction of a computation.

    Attributes:
      shape: the shape of its result, such as `f32[8,128]{1,0}`, or a tuple of such shapes.
      literal: the number of a parameter, or the value of a constant.
      operands: earlier instructions of the same computation.
      called: the computations that it calls, by attribute.
      attributes: the text after the operands.
    """

    opcode: str
    shape: str
    literal: str
    operands: tuple["Instruction", ...]
    called: dict[str, Computation]
    attributes: str

    @property
    def size(self) -> float:
        """Bytes of the result."""
        total = 0.0
        for dtype, sides in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", self.shape):
            digits = re.match(r"[a-z]+(\d+)", dtype)  # f8e4m3fn has 8 bits; token has none, and counts as a byte
            bits = BITS.get(dtype) or (int(digits[1]) if digits else 8)
            total += math.prod(int(side) for side in sides.split(",") if side) * bits / 8
        return total

    @property
    def trip_count(self) -> int:
        """Iterations of a loop: XLA's count, else the largest constant of its condition, else 1."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', self.attributes):
            return int(known[1])
        constants = (one.literal for one in self.called["condition"] if one.opcode == "constant")
        return max((int(literal) for literal in constants if literal.isdecimal()), default=1)

    @property
    def group_size(self) -> int:
        """Chips in a group of a collective: XLA lists them, counts them, or names axes of a mesh."""
        if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", self.attributes):
            return len(listed[1].split(","))
        if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", self.attributes):
            return int(counted[1])
        if named := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", self.attributes):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
            axes = re.findall(r"'(\w+)'", named[2])
            if sizes.keys() >= set(axes):
                return math.prod(int(sizes[axis]) for axis in axes)
        raise _not_understood(f"{self.opcode} {self.attributes.strip(', ')}")


def parse(text: str) -> Computation:
    """The entry computation of a program.

    Raises:
      InputError: the text has a form that this parser does not understand.
    """
    computations: dict[str, Computation] = {}
    named: dict[str, Instruction] | None = None  # of the current computation
    entry, line = None, ""
    for line in filter(str.strip, text.splitlines()):
        if head := COMPUTATION.match(line):
            current = computations[head["name"]] = []
            named = {}
            entry = current if head["entry"] else entry
        elif line.startswith("}"):
            named = None
        elif named is not None:
            name, instruction = _instruction(line, named, computations)
            named[name] = instruction
            current.append(instruction)
        elif line[0].isspace() or line.endswith("{"):
            raise _not_understood(line)
    if entry is None:
        raise _not_understood(line)
    return entry


def _instruction(
    line: str, named: dict[str, Instruction], computations: dict[str, Computation]
) -> tuple[str, Instruction]:
    """The name and the instruction of a line. Operands and called computations come before it in the text."""
    if not (match := INSTRUCTION.match(line)):
        raise _not_understood(line)
    opcode = match["opcode"]
    inside, attributes = _split_at_parenthesis(match["rest"])
    operands = [] if opcode in LITERALS else re.findall(r"%([\w.\-]+)", inside)
    called = dict(re.findall(r"\b(body|condition|calls|to_apply)=%([\w.\-]+)", attributes))
    if (
        not named.keys() >= set(operands)
        or (inside.strip() and not operands and opcode not in LITERALS)
        or (opcode == "parameter" and not inside.isdecimal())
        or not called.keys() >= CALLS.get(opcode, set())
        or not computations.keys() >= set(called.values())
    ):
        raise _not_understood(line)
    return match["name"], Instruction(
        opcode,
        match["shape"],
        inside,
        tuple(named[name] for name in operands),
        {attribute: computations[name] for attribute, name in called.items()},
        attributes,
    )


def _split_at_parenthesis(rest: str) -> tuple[str, str]:
    """The text inside an opcode's parentheses, and the text after them."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return rest[:place], rest[place + 1 :]
    return rest, ""


def _not_understood(line: str) -> InputError:
    versions = []
    for package in ("jax", "libtpu"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    return InputError(
        f"the program text of this XLA version ({', '.join(versions)}) is not understood: {line.strip()[:100]!r}; run "
        "pip install 'jax[tpu]==0.10.2'"
    )
