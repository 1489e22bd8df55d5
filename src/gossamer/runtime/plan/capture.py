"""A torch network as a graph: exported, then lowered operation by operation.

Operations without a rule stay in torch: neighbours together in one *island*, an exported subgraph
that runs as it is. A plan names them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from gossamer.core.errors import ArgumentError
from gossamer.runtime.flat import Flat
from gossamer.runtime.onnx_float import captured
from gossamer.runtime.plan import lower_attention, lower_recurrent, reference
from gossamer.runtime.plan.graph import DTYPES, Graph, Node, Value
from gossamer.runtime.plan.lower import RULES, SAME, Batch, Left
from gossamer.runtime.quiet import quiet

__all__ = ["Captured", "capture"]

_RULES = {**RULES, **lower_recurrent.RULES, **lower_attention.RULES}


@dataclass(frozen=True)
class Captured:
    """A graph and its islands, which ``torch`` nodes number."""

    graph: Graph
    islands: tuple[nn.Module, ...]


class _Irregular(Exception):
    """A size that is no multiple of the batch."""


def capture(flat: Flat, tensors: Sequence[Tensor], *, free: bool = True) -> Captured:
    """The network as a graph; the batch is free where its shapes are multiples of it.

    ``free``: whether it may be free at all.

    Raises :class:`ArgumentError` where torch cannot export the network, saying where.
    """
    for attempt in (True, False) if free else (False,):
        program, _ = captured(flat, tensors, free=attempt)
        with quiet(), torch.no_grad():
            program = program.run_decompositions({})  # functional, and no operation taken apart
        try:
            return _Lowering(program).run()
        except _Irregular:
            continue
    raise ArgumentError(f"{type(flat.model).__name__} has sizes that depend on its inputs' values")


class _Lowering:
    """The walk over an exported program; an :class:`~gossamer.runtime.plan.lower.Emitter`."""

    def __init__(self, program: Any) -> None:
        self.program = program
        self.nodes: list[Node] = []
        self.values: dict[str, Value] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.tensors: dict[fx.Node, Tensor] = {}  # parameters, buffers, constants
        self.names: dict[fx.Node, str] = {}
        self.parts: dict[fx.Node, tuple[str, ...]] = {}  # of calls that give several tensors
        self.islands: list[fx.GraphModule] = []
        self.left: list[fx.Node] = []  # neighbours that wait to become an island
        self.why: list[str] = []
        self.out = Value(())
        self.now = ""  # the call that is lowered
        self.symbol: Any = None

    def run(self) -> Captured:
        """Lower every call, then drop what nothing reads."""
        graph, signature = self.program.graph, self.program.graph_signature
        stored = {**self.program.state_dict, **self.program.constants}
        held = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        inputs: list[str] = []
        output: fx.Node | None = None
        for node in graph.nodes:
            if node.op == "placeholder" and node.name in held:
                tensor = stored[held[node.name]].detach()
                # "@": no call has such a name
                self.names[node] = name = "@" + held[node.name].removeprefix("model.")
                self.tensors[node], self.constants[name] = tensor, tensor.contiguous().numpy()
            elif node.op == "placeholder":
                self._input(node)
                inputs.append(node.name)
            elif node.op == "output":
                output = node
            elif not isinstance(node.meta.get("val"), (torch.SymInt, int)):
                self._call(node)
        self._close()
        assert output is not None  # every graph has one
        made_of: Any = output.args[0]
        outputs = []
        for node, spec in zip(made_of, signature.output_specs, strict=True):
            if spec.kind.name == "USER_INPUT_MUTATION":  # the caller's tensors stay as they are
                continue
            if spec.kind.name != "USER_OUTPUT":
                raise ArgumentError(f"the network writes {spec.target} at each call")
            if not isinstance(node, fx.Node) or node in self.tensors:
                raise ArgumentError("the network gives a constant, or no tensor")
            if self.names[node] in self.constants:
                raise ArgumentError("the network gives a constant, or no tensor")
            outputs.append(self.names[node])
        made = Graph(tuple(inputs), tuple(outputs), tuple(self.nodes), self.values, self.constants)
        return Captured(pruned(made).check(), tuple(self.islands))

    # what rules see

    def kind(self, name: str) -> Value:
        """What a value or constant is."""
        if name in self.values:
            return self.values[name]
        array = self.constants[name]
        return Value(array.shape, str(array.dtype))

    def zeros(self, name: str) -> bool:
        """Whether a value is a ``fill`` of zeros."""
        return any(n.name == name and n.op == "fill" and not n.attributes["value"]
                   for n in self.nodes)  # fmt: skip

    def array(self, name: str) -> np.ndarray:
        """A constant."""
        if name not in self.constants:
            raise Left("a weight that is computed from the inputs")
        return self.constants[name]

    def constant(self, array: np.ndarray) -> str:
        """The name of a new constant."""
        name = f"@{self.now}/{len(self.constants)}"
        self.constants[name] = array
        return name

    def emit(
        self,
        op: str,
        inputs: Sequence[str],
        between: Sequence[int] | None = None,
        **attributes: Any,
    ) -> str:
        """Append a node; its result's name."""
        name = self.now if between is None else f"{self.now}/{len(self.nodes)}"
        self.values[name] = self.out if between is None else Value(tuple(between), self.out.dtype)
        self.nodes.append(Node(op, tuple(inputs), (name,), attributes))
        return name

    # the walk

    def _input(self, node: fx.Node) -> None:
        found = node.meta.get("val")
        if not isinstance(found, Tensor):
            raise ArgumentError(f"input {node.name} is no tensor; there is no plan of it")
        sizes: list[Any] = [s for s in found.shape if isinstance(s, torch.SymInt)]
        for size in sizes:
            expression = size.node.expr
            if self.symbol is None and expression.is_Symbol:
                self.symbol = expression
        self.names[node], self.values[node.name] = node.name, self._value(found)

    def _dim(self, size: Any) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression: Any = size.node.expr
        if expression.is_Integer:
            return int(expression)
        times = expression / self.symbol if self.symbol is not None else expression
        if not times.is_Integer or int(times) < 1:
            raise _Irregular
        return -int(times)

    def _value(self, tensor: Tensor) -> Value:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Value(tuple(self._dim(s) for s in tensor.shape), dtype)

    def _call(self, node: fx.Node) -> None:
        found = node.meta.get("val")
        if node.target is operator.getitem:
            source: Any = node.args[0]
            number: Any = node.args[1]
            if source in self.left:
                self.left.append(node)
            elif source in self.parts:
                self.names[node] = self.parts[source][number]
            elif source in self.names and number == 0:  # batch norm's other parts are unread
                self.names[node] = self.names[source]
            return  # else it is in an island that is closed
        try:
            if isinstance(found, (tuple, list)):
                found = found[0]
            if (
                not isinstance(found, Tensor)
                or str(found.dtype).removeprefix("torch.") not in DTYPES
            ):
                raise Left("its result is no tensor of numbers")
            self.out, self.now = self._value(found), node.name
            made = self._lowered(node)
            self.names[node] = made[0]
            if len(made) > 1:
                self.parts[node] = made
        except Left as e:
            self._leave(node, str(e))

    def _lowered(self, node: fx.Node) -> tuple[str, ...]:
        kind = _operation(node)
        if kind not in _RULES and kind not in SAME:
            raise Left("no operator of a plan")
        args: Any = fx.node.map_arg(node.args, self._argument)
        kwargs = {k: fx.node.map_arg(v, self._argument) for k, v in node.kwargs.items()}
        if kind in SAME:
            if self.kind(args[0]) != self.out:
                raise Left("another type")
            return (str(args[0]),)
        count = len(self.nodes)
        try:
            made = _RULES[kind](self, *args, **kwargs)
            self._folded(count)
            return made if isinstance(made, tuple) else (str(made),)
        except (Left, TypeError) as e:  # arguments that the rule does not know
            del self.nodes[count:]
            raise Left(str(e) if isinstance(e, Left) else "arguments without a rule") from e

    def _folded(self, start: int) -> None:
        """Compute nodes from ``start`` on that read constants alone."""
        for node in self.nodes[start:]:
            if not node.inputs or any(n not in self.constants for n in node.inputs if n):
                continue
            given = [self.constants[n] if n else None for n in node.inputs]
            kind = self.values[node.name]
            if min(kind.shape, default=0) >= 0:
                found = reference.evaluate(node, given, 1)
                self.constants[node.name] = np.ascontiguousarray(found.astype(kind.dtype))
                del self.values[node.name]
                self.nodes.remove(node)

    def _argument(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, int)):
            found = self._dim(value)
            return Batch(-found) if found < 0 else found
        if node in self.left:
            self._close()
        return self.names[node]

    def _leave(self, node: fx.Node, why: str) -> None:
        self.left.append(node)
        self.why.append(f"{_operation(node)}: {why}")

    def _close(self) -> None:
        """Make the operations that wait an island."""
        if not self.left:
            return
        inside, self.left = self.left, []
        whole = set(inside)
        # a tuple's parts are read later in the graph, and belong to it
        for node in list(inside):
            for user in node.users:
                if user.target is operator.getitem and user not in whole:
                    inside.append(user)
                    whole.add(user)
        graph, root = fx.Graph(), nn.Module()
        env: dict[fx.Node, fx.Node] = {}
        inputs: list[fx.Node] = []
        sizes: list[fx.Node] = []
        for node in dict.fromkeys(a for n in inside for a in n.all_input_nodes):
            if node in whole:
                continue
            if node in self.tensors:
                root.register_buffer(node.name, self.tensors[node])
            elif (held := self.constants.get(self.names.get(node, ""))) is not None:
                root.register_buffer(node.name, torch.from_numpy(held))  # computed of constants
            else:
                is_size = isinstance(node.meta.get("val"), (torch.SymInt, int))
                (sizes if is_size else inputs).append(node)
        for node in (*inputs, *sizes):
            env[node] = graph.placeholder(node.name)
        for node in dict.fromkeys(a for n in inside for a in n.all_input_nodes):
            if node.name in root._buffers:
                env[node] = graph.get_attr(node.name)
        for node in inside:
            env[node] = graph.node_copy(node, lambda n: env[n])
        given = [n for n in inside if any(u not in whole for u in n.users)]
        given = [n for n in given if isinstance(n.meta.get("val"), Tensor)]
        graph.output(tuple(env[n] for n in given))
        number = len(self.islands)
        self.islands.append(fx.GraphModule(root, graph))
        for node in given:
            self.names[node], self.values[node.name] = node.name, self._value(node.meta["val"])
        names = list(
            dict.fromkeys(_operation(n) for n in inside if n.target is not operator.getitem)
        )
        attributes = {
            "island": number,
            "names": names,
            "reason": "; ".join(dict.fromkeys(self.why)),
            "sizes": [self._dim(n.meta["val"]) for n in sizes],
        }
        self.why = []
        if given:
            self.nodes.append(
                Node(
                    "torch",
                    tuple(self.names[n] for n in inputs),
                    tuple(n.name for n in given),
                    attributes,
                )
            )


def _operation(node: fx.Node) -> str:
    """``conv2d`` of ``aten.conv2d.default``."""
    parts = str(node.target).split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def pruned(graph: Graph) -> Graph:
    """Without nodes and constants that nothing reads."""
    needed, kept = set(graph.outputs), []
    for node in reversed(graph.nodes):
        if needed & set(node.outputs):
            kept.append(node)
            needed |= set(node.inputs)
    values = {n: v for n, v in graph.values.items() if n in needed or n in graph.inputs}
    for node in kept:
        values |= {n: graph.values[n] for n in node.outputs}
    constants = {n: a for n, a in graph.constants.items() if n in needed}
    return Graph(graph.inputs, graph.outputs, tuple(reversed(kept)), values, constants)
