"""An exported file against the network it was made of, in onnxruntime, step by step.

A runtime may read an attribute in another way (average pooling with ``ceil_mode`` is one), or
have a fault of its own. So the exported model runs on probes, every step's value is read out, and
each is compared with the fixed-point network's result for *the very inputs the runtime had*:
differences do not add up from step to step, and the step that differs is named. Operators are not
fused there. Then the model runs as it will be deployed, whole and optimized: fused integer
kernels round in their own way (on a CPU without VNNI by up to five steps of eight bits in
ResNet-8, where the unfused ones agree to the bit), so that only a fault is refused there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gossamer.core.errors import ArgumentError
from gossamer.quantize.network import FixedPoint
from gossamer.quantize.steps import ARITHMETIC, Step, wide
from gossamer.runtime import sessions

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["check"]

_PROBES = 4  # examples
_ROUNDING = 2.0**-20  # of float32 sums, relative to the sum of magnitudes
_WHOLE = 0.25  # of the largest output: what fused kernels' rounding may add up to


def probes(net: FixedPoint) -> Tensor:
    """Inputs on the network's grid, (4, ...), float32: normal, a quarter of the range wide."""
    first = net.program.steps[0].name
    form, shape = net.formats[first], net.shapes[first]
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(_PROBES, *shape, generator=generator) * (form.high / 4)
    return codes.round().clamp(form.low, form.high) * form.step


@torch.no_grad()
def check(net: FixedPoint, model: ModelProto, held: Mapping[str, str]) -> None:
    """Raise :class:`ArgumentError`, naming the step, where onnxruntime computes otherwise.

    Args:
        net: the fixed-point network.
        model: its export, with input ``input``.
        held: step -> the name of its value in the model.
    """
    inputs = probes(net)
    steps = net.program.steps
    values = dict(zip(held, _run(_opened(model, held), inputs, fused=False), strict=True))
    for step in steps:
        given = [values[n].double() for n in step.inputs] or [inputs]
        wanted = net.apply_step(step, given).double()
        got = values[step.name].double()
        if wanted.shape != got.shape:
            raise ArgumentError(
                f"{step.name} ({step.kind}) is {tuple(got.shape)} in onnxruntime and "
                f"{tuple(wanted.shape)} in the network; nothing was written"
            )
        off = float((wanted - got).abs().max()) if got.numel() else 0.0
        if off > _allowed(net, step, given):
            raise ArgumentError(
                f"{step.name} ({step.kind}) differs by {off:.3g} between onnxruntime and the "
                "network; nothing was written. Write the layer with other operations, or leave "
                "out what ONNX defines otherwise (ceil_mode, unequal windows)"
            )
    (whole,) = _run(model, inputs)
    wanted = net(inputs)
    form = net.formats[net.program.output]
    most = float(wanted.abs().max()) if wanted.numel() else 0.0
    off = float((whole - wanted).abs().max()) if wanted.numel() else 0.0
    if off > max(16 * form.step, _WHOLE * most):
        raise ArgumentError(
            f"the network as a whole differs by {off:.3g} in onnxruntime, where outputs reach "
            f"{most:.3g}, although its steps agree: the runtime's optimizer changes it; nothing "
            "was written"
        )


def _allowed(net: FixedPoint, step: Step, given: list[Tensor]) -> float:
    """A tie that float32 rounds to the other side, and what float32 sums lose."""
    if step.kind not in ARITHMETIC:
        return 0.0 if step.kind != "input" else net.formats[step.name].step
    layer = net.layer(step.name)
    weight, bias = (None, None) if layer is None else layer.values()
    sizes = wide(
        step,
        [x.abs() for x in given],
        None if weight is None else weight.abs(),
        None if bias is None else bias.abs(),
    )
    return net.formats[step.name].step + (float(sizes.max()) * _ROUNDING if sizes.numel() else 0.0)


def _opened(model: ModelProto, held: Mapping[str, str]) -> ModelProto:
    """A copy that gives every step's value."""
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.output[:]
    for name in held.values():
        made.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return made


def _run(model: ModelProto, inputs: Tensor, *, fused: bool = True) -> list[Tensor]:
    try:
        return sessions.run(sessions.session(model, fused=fused), [inputs])
    except ArgumentError as e:
        raise ArgumentError(f"{e}; nothing was written") from e
