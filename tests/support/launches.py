"""What a lowered program would launch: its kernels, and the operations that XLA has around them."""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from jaxlib.mlir import ir

# What XLA makes no launch for: other names of the same numbers.
INPUT, KERNEL, CONSTANT = "input", "mosaic_gpu", "stablehlo.constant"
FREE = {INPUT, CONSTANT, "stablehlo.reshape", "stablehlo.bitcast_convert", "stablehlo.optimization_barrier"}


@dataclass
class Program:
    """The operations of a module with its calls inlined. Equal operations of equal operands are one, as XLA's common
    subexpression elimination makes them; so what all layers compute alike is counted once."""

    module: ir.Module
    functions: dict[str, Any] = field(default_factory=dict)
    nodes: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)  # name and operands of every operation
    numbers: dict[Any, int] = field(default_factory=dict)

    def count(self) -> Counter[str]:
        """How often each operation is there, of those that the results need; a kernel is called ``mosaic_gpu``."""
        self.functions = {op.attributes["sym_name"].value: op for op in self.module.body}
        main = self.functions["main"]
        inputs = [self._number(INPUT, i) for i, _ in enumerate(main.regions[0].blocks[0].arguments)]
        needed, waiting = set(), [node for node, _ in self._inline(main, [(number, 0) for number in inputs])]
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed.add(node)
                waiting += self.nodes[node][1]
        names = Counter(self.nodes[node][0] for node in needed)
        return Counter({name: n for name, n in names.items() if name not in FREE})

    def _number(self, name: str, detail: Any, operands: tuple[tuple[int, int], ...] = ()) -> int:
        if name not in (INPUT, KERNEL) and all(self.nodes[node][0] == CONSTANT for node, _ in operands):
            detail, name = (name, detail), CONSTANT  # XLA computes it
        key = name, detail, operands
        if key not in self.numbers:
            self.numbers[key] = len(self.nodes)
            self.nodes.append((name, tuple(node for node, _ in operands)))
        return self.numbers[key]

    def _inline(self, function: Any, arguments: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The results of a function, each as an operation's number and which of its results it is."""
        block = function.regions[0].blocks[0]
        values: dict[Any, tuple[int, int]] = dict(zip(block.arguments, arguments, strict=True))
        for op in (operation.operation for operation in block):
            operands = tuple(values[operand] for operand in op.operands)
            if op.name == "func.return":
                return list(operands)
            if op.name == "func.call":
                results = self._inline(self.functions[op.attributes["callee"].value], list(operands))
            else:
                node = self._of(op, operands, values)
                results = [(node, i) for i in range(len(op.results))]
            values |= dict(zip(op.results, results, strict=True))
        raise AssertionError("a function returns")

    def _of(self, op: Any, operands: tuple[tuple[int, int], ...], values: dict[Any, tuple[int, int]]) -> int:
        """The number of an operation. One with regions also depends on what these take from outside."""
        name = op.name
        if name == "stablehlo.custom_call" and KERNEL in op.attributes["call_target_name"].value:
            name = KERNEL
        attributes = tuple(sorted((name, str(op.attributes[name])) for name in op.attributes))
        types, regions = tuple(str(result.type) for result in op.results), tuple(map(_text, op.regions))
        captured: list[tuple[int, int]] = []

        def look(inner: Any) -> ir.WalkResult:
            captured.extend(values[operand] for operand in inner.operands if operand in values)
            return ir.WalkResult.ADVANCE

        if regions:
            op.walk(look)
        return self._number(name, (attributes, types, regions), (*operands, *captured))


def _text(region: Any) -> str:
    """A region with its values numbered from 0: what MLIR calls them depends on what stands before."""
    names: dict[str, str] = {}
    return re.sub(r"%\w+", lambda found: names.setdefault(found[0], f"%{len(names)}"), "".join(map(str, region)))


def operations_of_a_layer(lower: Any) -> Counter[str]:
    """The operations that one more layer adds; ``lower`` gives the lowered program of so many layers."""
    one, two = (Program(lower(layers).compiler_ir("stablehlo")).count() for layers in (2, 3))
    return two - one
