"""What the kernels of a compiled program read, write and multiply, from its optimised HLO text.

XLA's own cost analysis counts the body of a loop once and is missing for CUDA. Here a body counts
as often as it runs, and a slice of an array as the slice.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
}
# Operations that run no kernel, and the second halves of asynchronous ones.
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "iota",
    "partition-id", "replica-id", "opt-barrier", "get-dimension-size", "domain", "add-dependency",
}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SLICES = ("dynamic-slice", "slice", "gather")
# A TPU's vector memory: what is there moves no bytes of HBM.
ON_CHIP = re.compile(r"S\(1\)")
ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: list[str]
    arguments: str
    attributes: str
    root: bool


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of the program. bytes and flops: of one run, of which there are `count`."""

    name: str
    opcode: str
    op_name: str
    type: str
    kind: str
    count: int
    bytes: int
    flops: int


def kernels(text: str) -> list[Kernel]:
    """The kernels that a module (its optimised HLO as text) runs, loops unrolled by `count`."""
    computations, entry = parse(text)
    return list(Module(computations).kernels(entry, 1))


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """(computation → instruction by name, the name of the entry computation)."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{", line)
        if head:
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif current is not None and (instruction := _instruction(line)):
            current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    opcode, rest = rest[:opening], rest[opening:]
    end = _closing(rest)
    arguments = rest[1 : end - 1]
    operands = re.findall(r"%([\w.\-]+)", arguments)
    return Instruction(head[2], type_, opcode, operands, arguments, rest[end:], bool(head[1]))


def _closing(text: str) -> int:
    """The index after the parenthesis that closes the one at the beginning."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index + 1
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def shapes(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays of a type: (dtype, shape)."""
    found = [match for match in ARRAY.finditer(type_) if match[1] in BYTES]
    return [(match[1], tuple(int(n) for n in match[2].split(",") if n)) for match in found]


def size(type_: str) -> int:
    """Bytes of a type in the device's memory."""
    return sum(
        math.prod(int(n) for n in match[2].split(",") if n) * BYTES[match[1]]
        for match in ARRAY.finditer(type_)
        if match[1] in BYTES and not ON_CHIP.search(match[3] or "")
    )


class Module:
    """The computations of a module."""

    def __init__(self, computations: dict[str, dict[str, Instruction]]):
        self.computations = computations

    def kernels(self, computation: str, count: int) -> Iterator[Kernel]:
        """The kernels of a computation that runs `count` times."""
        body = self.computations[computation]
        for each in body.values():
            if each.opcode in FREE or each.opcode.endswith("-done"):
                continue
            if each.opcode == "while":
                yield from self.kernels(_called(each, "body"), count * _trips(each))
            elif each.opcode == "conditional":
                yield from self._branch(each, count)
            elif each.opcode in ("call", "async-start"):
                yield from self.kernels(_called(each, "to_apply", "calls"), count)
            else:
                flops = self._flops(each, body)
                op_name = re.search(r'op_name="([^"]*)"', each.attributes)
                path = op_name[1] if op_name else ""
                kind = _kind(each, path, flops)
                moved = self._moved(each, body)
                yield Kernel(each.name, each.opcode, path, each.type, kind, count, moved, flops)

    def _branch(self, each: Instruction, count: int) -> Iterator[Kernel]:
        """The branch that moves the most bytes."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", each.attributes)
        names = (
            re.findall(r"%?([\w.\-]+)", listed[1])
            if listed
            else [_called(each, f"{value}_computation") for value in ("true", "false")]
        )
        branches = [list(self.kernels(name, count)) for name in names]
        yield from max(branches, key=lambda branch: sum(k.bytes * k.count for k in branch))

    def _moved(self, each: Instruction, body: dict[str, Instruction]) -> int:
        """Bytes that an instruction reads and writes."""
        if each.opcode in ("fusion", "fusion-start"):
            return self._fusion(each, body)
        if each.opcode in SLICES:
            return 2 * size(each.type)
        if each.opcode == "dynamic-update-slice":
            return 2 * size(body[each.operands[1]].type)
        if each.opcode == "copy-start":
            return size(each.type)  # which has the source beside the copy
        if each.opcode.startswith(COLLECTIVES):
            return 2 * self._delivered(each, body)
        written = size(each.type)
        if each.opcode == "custom-call":  # a matmul's or cuDNN's scratch memory is no result
            written = sum(
                math.prod(shape) * BYTES[dtype]
                for dtype, shape in shapes(each.type)
                if dtype not in ("s8", "u8")
            )
        return written + sum(size(body[name].type) for name in each.operands if name in body)

    def _delivered(self, each: Instruction, body: dict[str, Instruction]) -> int:
        """Bytes of a collective's results."""
        if each.opcode == "all-gather-start":  # whose type has the operands, too
            return size(each.type) - sum(size(body[name].type) for name in each.operands)
        return size(each.type)

    def _fusion(self, each: Instruction, body: dict[str, Instruction]) -> int:
        fused = self.computations[_called(each, "calls")]
        users = collections.defaultdict(list)
        for instruction in fused.values():
            for name in instruction.operands:
                users[name].append((instruction, name))

        def uses(name: str) -> list:
            """(instruction, operand) of each use, looking through bitcasts."""
            found = []
            for user, operand in users[name]:
                found += uses(user.name) if user.opcode == "bitcast" else [(user, operand)]
            return found

        read = 0
        for instruction in fused.values():
            if instruction.opcode != "parameter":
                continue
            ways = [(user, user.operands[0] == operand) for user, operand in uses(instruction.name)]
            if ways and all(first and user.opcode in SLICES for user, first in ways):
                read += sum(size(user.type) for user, _ in ways)
            elif ways and all(
                first and user.opcode == "dynamic-update-slice" for user, first in ways
            ):
                continue  # updated in place
            else:
                index = int(instruction.arguments)
                read += size(body[each.operands[index]].type)
        root = next(instruction for instruction in fused.values() if instruction.root)
        results = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return read + sum(_written(result, fused) for result in results)

    def _flops(self, each: Instruction, body: dict[str, Instruction]) -> int:
        """Operations of an instruction's matmuls and attention, 2 for a multiply-accumulate."""
        if each.opcode == "fusion":
            fused = self.computations[_called(each, "calls")]
            return sum(self._flops(inner, fused) for inner in fused.values())
        target = re.search(r'custom_call_target="([^"]*)"', each.attributes)
        if target and "fmha" in target[1]:
            _, (batch, queries, heads, depth) = shapes(body[each.operands[0]].type)[0]
            matmuls = 5 if "Backward" in target[1] else 2
            return matmuls * 2 * batch * heads * queries * queries * depth
        if each.opcode == "dot" or (target and "gemm" in target[1]):
            contracted = re.search(
                r'lhs_contracting_dim(?:s=\{|ension_numbers"?:\s*\[?|ensions":\[)"?([\d,"]+)',
                each.attributes,
            )
            left = shapes(body[each.operands[0]].type)[0][1]
            axes = re.findall(r"\d+", contracted[1]) if contracted else []
            out = math.prod(shapes(each.type)[0][1])
            return 2 * out * math.prod(left[int(axis)] for axis in axes)
        return 0


def _written(result: Instruction, fused: dict[str, Instruction]) -> int:
    while result.opcode == "bitcast":
        result = fused[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return size(fused[result.operands[1]].type)
    return size(result.type)


def _called(each: Instruction, *attributes: str) -> str:
    """The computation that an attribute of an instruction names."""
    for attribute in attributes:
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", each.attributes)
        if found:
            return found[1]
    raise ValueError(f"{each.opcode} {each.name} calls no computation")


def _trips(loop: Instruction) -> int:
    found = re.search(r"known_trip_count\D*(\d+)", loop.attributes)
    return int(found[1]) if found else 1


def _kind(each: Instruction, path: str, flops: int) -> str:
    """The part of the network, or of its overhead, that a kernel belongs to."""
    if each.opcode.startswith(COLLECTIVES):
        return "communication"
    last = path.rpartition("/")[2]
    if (
        each.opcode in ("fusion-start", "copy-start")
        or last in ("dynamic_update_slice", "dynamic_slice")
        or each.name.startswith(("loop_dynamic_update_slice", "wrapped_dynamic", "dynamic-"))
        or (last == "broadcast_in_dim" and each.name.startswith("loop_broadcast"))
    ):
        return "stacks of a scan"
    if "optimizer/" in path:
        return "optimiser"
    if "/attention/" in path and "/qkv/" not in path and "/proj/" not in path:
        return "attention"
    return "matmuls of linear layers" if flops else "between matmuls"
