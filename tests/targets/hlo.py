"""Read the text of a compiled program, and find what a program of this library must not have."""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator

import jax

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all", "reduce-scatter")
# A result of these is the array that was there, or the array with a part of it written.
_IN_PLACE = {
    *("parameter", "get-tuple-element", "bitcast", "optimization-barrier", "tuple", "while", "conditional", "call"),
    *("scatter", "dynamic-update-slice", "all-reduce-done", "copy-done", "async-done", "async-update", "async-start"),
}
_TO_THE_HOST = {"infeed", "outfeed", "send", "recv", "send-done", "recv-done"}
_WIDE = ("s64", "f64", "c128")  # u64 is in the random bits of every draw
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a computation.

    Attributes:
      computation: name of the computation that it is in.
      name: its name.
      root: whether it is the computation's result.
      shapes: its result, as in "f32[2,3]"; several for a tuple.
      opcode: the operation.
      operands: names of its operands.
      rest: what follows the operands.
    """

    computation: str
    name: str
    root: bool
    shapes: tuple[str, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str


class Text:
    """The instructions of a compiled program, by their names and by the computations that they are in."""

    def __init__(self, text: str):
        self.instructions = list(_read(text))
        self.by_name = {(one.computation, one.name): one for one in self.instructions}
        self.roots = {one.computation: one for one in self.instructions if one.root}
        # Results within a fusion are never in memory as a whole.
        self.fused = {called for one in self.instructions if one.opcode == "fusion" for called in _called(one)}

    def operands(self, one: Instruction) -> list[Instruction]:
        """Return the instructions whose results an instruction reads."""
        return [found for name in one.operands if (found := self.by_name.get((one.computation, name)))]

    def in_memory(self) -> list[Instruction]:
        """Return the instructions whose results are in memory, or part of another result that is."""
        return [one for one in self.instructions if one.computation not in self.fused]

    def writes_in_place(self, one: Instruction, shape: str) -> bool:
        """Tell whether the part of a result with that shape is an array that was there before, or a write to it."""
        if one.opcode == "fusion":
            (called,) = _called(one)
            return self.writes_in_place(self.roots[called], shape)
        parts = self.operands(one)
        if one.opcode == "tuple" and one.computation in self.fused:
            return all(self.writes_in_place(part, shape) for part in parts if shape in part.shapes)
        if one.opcode == "bitcast" and one.computation in self.fused:
            return all(self.writes_in_place(part, part.shapes[0]) for part in parts)
        return one.opcode in _IN_PLACE or (one.opcode == "custom-call" and "AllocateBuffer" in one.rest)


def _read(text: str) -> Iterator[Instruction]:
    computation = ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            computation = head[1]
        elif body := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line):
            result, rest = _cut(body[3])
            opcode, _, rest = rest.strip().partition("(")
            operands, rest = _cut("(" + rest)
            shapes = tuple(f"{dtype}[{dims}]" for dtype, dims in _ARRAY.findall(result))
            yield Instruction(computation, body[2], bool(body[1]), shapes, opcode, tuple(_NAME.findall(operands)), rest)


def _cut(text: str) -> tuple[str, str]:
    """Cut a text after its first bracketed part, or before its first space if it does not begin with a bracket."""
    if not text.startswith("("):
        first, _, rest = text.partition(" ")
        return first, rest
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: at + 1], text[at + 1 :]
    return text, ""


def _called(one: Instruction) -> list[str]:
    return re.findall(r"calls=%?([\w.\-]+)", one.rest)


@functools.lru_cache(maxsize=4)
def read(text: str) -> Text:
    """Read the text of a compiled program."""
    return Text(text)


def shape_of(array: jax.ShapeDtypeStruct) -> str:
    """Write an array's shape as XLA does: "bf16[2,3]"."""
    kind = {"float": "f", "bfloat": "bf", "int": "s", "uint": "u", "bool": "pred"}
    name, bits = re.fullmatch(r"([a-z]+)(\d*)", array.dtype.name).groups()
    return f"{kind[name]}{bits}[{','.join(map(str, array.shape))}]"


def copies(text: str, arrays: Iterable[jax.ShapeDtypeStruct]) -> dict[str, int]:
    """Count the results with the shape of one of some arrays that are neither such an array nor a write to one."""
    program, wanted = read(text), {shape_of(array) for array in arrays}
    found: collections.Counter[str] = collections.Counter()
    for one in program.in_memory():
        for shape in wanted & set(one.shapes):
            if not program.writes_in_place(one, shape):
                found[shape] += 1
    return dict(found)


def rounded_products(text: str) -> list[str]:
    """Return the products of float32 arrays whose operands the device may round first, to TF32 or bfloat16."""
    program, found = read(text), []
    for one in program.instructions:
        library = one.opcode == "custom-call" and re.search(r'custom_call_target="__cu(dnn\$conv|blas)', one.rest)
        if one.opcode in ("dot", "convolution", "ragged-dot") or library:
            factors = program.operands(one)[:2]
            precise = re.search(r'operand_precision(=\{highest,highest|":\["HIGHEST","HIGHEST")', one.rest)
            if any(factor.shapes[0].startswith("f32") for factor in factors) and not precise:
                found.append(f"{one.computation}: {one.name} {one.shapes[0]}")
    return found


def faults(text: str) -> list[str]:
    """Return what no program may have: products of rounded float32 arrays, transfers to the host, 64-bit arrays."""
    found = [f"rounds the operands of a float32 product: {one}" for one in rounded_products(text)]
    for one in read(text).instructions:
        place = f"{one.computation}: {one.name}"
        if one.opcode in _TO_THE_HOST or (one.opcode == "custom-call" and "callback" in one.rest):
            found.append(f"asks the host: {place}")
        if any(shape.startswith(_WIDE) for shape in one.shapes):
            found.append(f"computes in 64 bits: {place} {' '.join(one.shapes)}")
    return found


def collectives(text: str) -> dict[str, list[str]]:
    """List the shapes of the results of the collectives of each kind."""
    found: dict[str, list[str]] = {}
    for one in read(text).instructions:
        if (kind := one.opcode.removesuffix("-start")) in COLLECTIVES:
            found.setdefault(kind, []).extend(one.shapes)
    return found
