"""Dense kernels of OpenVINO: a run of neighbours, compiled for the shapes of one batch.

It reads and writes the plan's own arrays. A single node says little of it, as layouts change at its
border, so it is offered runs alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np

from gossamer.runtime import openvino
from gossamer.runtime.plan import dense
from gossamer.runtime.plan.graph import Graph, Node
from gossamer.runtime.plan.onnx_model import model

__all__ = ["bind", "pack", "refuses"]

_SIZES = 4  # batch sizes that are kept


@dataclass
class _Packed:
    held: bytes
    inputs: tuple[str, ...]
    threads: int
    ready: OrderedDict[tuple[Any, ...], Any] = field(default_factory=OrderedDict)
    lock: Any = field(default_factory=threading.Lock)

    def compiled(self, shapes: Sequence[tuple[int, ...]]) -> Any:
        """The model for inputs of these shapes."""
        key = tuple(shapes)
        with self.lock:
            if key not in self.ready:
                given = dict(zip(self.inputs, shapes, strict=True))
                self.ready[key] = openvino.opened(self.held, given, threads=self.threads)
            self.ready.move_to_end(key)
            while len(self.ready) > _SIZES:
                self.ready.popitem(last=False)
            return self.ready[key]


def refuses(graph: Graph, node: Node) -> str:
    """Why a node is not for OpenVINO; "" for one that is."""
    if find_spec("openvino") is None:
        return "openvino is not installed; pip install 'gossamer[openvino]'"
    if node.attributes.get("reverse"):  # 2026.4 does, where the steps come first
        return "it computes loops that run backwards otherwise"
    return dense.unfit(graph, node)


def pack(
    graph: Graph, nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str], threads: int
) -> _Packed:
    """The model's bytes; it is compiled where its shapes are known."""
    return _Packed(model(graph, nodes, inputs, outputs), tuple(inputs), threads)


def bind(
    packed: _Packed,
    nodes: Sequence[Node],
    inputs: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    batch: int,
) -> Callable[[], object]:
    """The call on these arrays; raises :class:`ArgumentError` where OpenVINO does not take them."""
    from openvino import Tensor

    request = packed.compiled([a.shape for a in inputs]).create_infer_request()
    for i, a in enumerate(inputs):
        request.set_input_tensor(i, Tensor(a, shared_memory=True))
    for i, a in enumerate(outputs):
        request.set_output_tensor(i, Tensor(a, shared_memory=True))
    held = (*inputs, *outputs)  # tensors have their addresses alone

    def call(run: Any = request.infer, arrays: Any = held) -> None:
        run(share_outputs=True)

    return call
