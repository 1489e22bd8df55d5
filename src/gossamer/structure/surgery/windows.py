"""Rules of operations that look at windows of an image: pools, resizing, padding by reflection."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gossamer.structure.surgery.memory import varying
from gossamer.structure.surgery.node import Node
from gossamer.structure.surgery.rules import rule
from gossamer.structure.surgery.trace import Trace

__all__: list[str] = []

_SPATIAL = {
    "max_pool1d": 1, "avg_pool1d": 1, "_adaptive_avg_pool1d": 1, "adaptive_avg_pool1d": 1,
    "adaptive_max_pool1d": 1, "max_pool2d": 2, "max_pool2d_with_indices": 2, "avg_pool2d": 2,
    "_adaptive_avg_pool2d": 2, "adaptive_avg_pool2d": 2, "adaptive_max_pool2d": 2,
    "max_pool3d": 3, "max_pool3d_with_indices": 3, "avg_pool3d": 3, "_adaptive_avg_pool3d": 3,
    "adaptive_avg_pool3d": 3, "adaptive_max_pool3d": 3, "upsample_nearest1d": 1,
    "upsample_nearest2d": 2, "upsample_nearest3d": 3, "_upsample_nearest_exact1d": 1,
    "_upsample_nearest_exact2d": 2, "upsample_linear1d": 1, "upsample_bilinear2d": 2,
    "upsample_bicubic2d": 2, "upsample_trilinear3d": 3, "reflection_pad1d": 1,
    "reflection_pad2d": 2, "reflection_pad3d": 3, "replication_pad1d": 1, "replication_pad2d": 2,
    "replication_pad3d": 3, "_upsample_bilinear2d_aa": 2,
}  # fmt: skip


@rule(*_SPATIAL)
def _windows(trace: Trace, node: Node, out: Any, x: Tensor, *rest: Any, **kw: Any) -> None:
    spatial = [x.ndim - 1 - d for d in range(_SPATIAL[node.op])]
    layers = []
    for layer in trace.labels(x):
        if set(varying(layer)) & set(spatial):
            trace.pin(node, layer, f"{node.op} runs over it", read=True)
        else:
            layers.append(layer)
    unknown = trace.unknown(x)
    for d in spatial:  # any in a channel: coarse, and never too few
        unknown = unknown.any(d, keepdim=True)
    for one in out if isinstance(out, (tuple, list)) else [out]:
        mapped = []
        for layer in layers:
            for d in spatial:
                layer = layer.narrow(d, 0, 1)
            mapped.append(layer.expand(one.shape))
        trace.ledger.write(one, mapped, unknown.expand(one.shape))
