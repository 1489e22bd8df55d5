"""What a network's weights are multiplied with: seen at the products themselves.

Every product of a weight is an operation of torch (``addmm``, ``mm``, ``bmm``, ``convolution``),
whatever module or function asked for it: a linear layer, GPT-2's ``Conv1D``, attention's packed
projection, a recurrent layer's steps. They are watched below autograd, where a weight is known by
its memory, so no module type has a rule of its own here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.core import names
from gossamer.core.errors import ArgumentError
from gossamer.core.modes import device_of, evaluating

__all__ = ["Moments", "inputs_of", "moments", "readers"]

_ADD = {torch.ops.aten.addmm.default: 1, torch.ops.aten.baddbmm.default: 1}
_PRODUCT = {torch.ops.aten.mm.default: 0, torch.ops.aten.bmm.default: 0, **_ADD}
_CONVOLUTION = torch.ops.aten.convolution.default

See = Callable[[str, bool, list[Tensor]], None]
"""(clean name, whether the weight is (inputs, outputs), inputs (n, columns) of each group)."""


class _Stop(Exception):
    """All that is asked for has been seen."""


class _Watch(TorchDispatchMode):
    """Calls ``see`` for every product of the weights."""

    def __init__(self, weights: Mapping[str, Tensor], see: See) -> None:
        super().__init__()
        self._see = see
        # Several weights may lie in one storage, as those of flattened recurrent layers do.
        self._places: dict[int, list[tuple[str, Tensor]]] = {}
        for name, weight in weights.items():
            self._places.setdefault(weight.untyped_storage().data_ptr(), []).append((name, weight))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # before the product: who is told may set the weight
        if func is _CONVOLUTION:
            self._convolution(*args)
        elif func in _PRODUCT:
            first = _PRODUCT[func]
            self._product(args[first], args[first + 1])
        return func(*args, **(kwargs or {}))

    def _of(self, operand: Any) -> tuple[str, Tensor] | None:
        if not isinstance(operand, Tensor) or not operand.numel():
            return None
        for name, weight in self._places.get(operand.untyped_storage().data_ptr(), ()):
            begin = weight.data_ptr()
            if begin <= operand.data_ptr() < begin + weight.numel() * weight.element_size():
                return name, weight
        return None

    def _product(self, left: Tensor, right: Tensor) -> None:
        for x, w, turned in ((left, right, False), (right, left, True)):
            known = self._of(w)
            if known is None:
                continue
            name, weight = known
            if w.ndim == 3:  # one weight for the whole batch, expanded
                if w.stride(0) not in (0, w.shape[1] * w.shape[2]) or weight.ndim != 2:
                    return
                w, x = w[0], x.reshape(-1, x.shape[-1]) if not turned else x
            # x @ w, w (columns, outputs); or w @ x, w (outputs, columns)
            inputs = x if not turned else x.movedim(-2, -1).reshape(-1, x.shape[-2])
            columns = w.shape[0] if not turned else w.shape[1]
            along = w.stride(0) if not turned else w.stride(1)
            if columns not in weight.shape or inputs.shape[-1] != columns:
                return
            turned = along != 1
            if weight.ndim == 2 and weight.shape[0] != weight.shape[1]:
                turned = weight.shape[1] != columns  # strides of single columns say nothing
            self._see(name, turned, [inputs.reshape(-1, columns)])
            return

    def _convolution(
        self,
        x: Tensor,
        w: Tensor,
        bias: Any,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        output_padding: Any,
        groups: int,
    ) -> None:
        known = self._of(w)
        if known is None or transposed or x.ndim > 4 or w.shape != known[1].shape:
            return
        self._see(known[0], False, _patches(x, w, stride, padding, dilation, groups))


def _patches(
    x: Tensor, w: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> list[Tensor]:
    """What each place of a convolution's output is made from, (places, columns) of each group."""
    if x.ndim == 3:  # one dimension: of two, the first of which is 1
        x, w = x[:, :, None], w[:, :, None]
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    found = F.unfold(x, w.shape[2:], (*dilation,), (*padding,), (*stride,))  # (N, C kh kw, places)
    rows = found.movedim(1, 2).reshape(-1, groups, found.shape[1] // groups)
    return list(rows.unbind(1))


def _feed(model: nn.Module, batch: Any) -> None:
    device = device_of(model)
    if isinstance(batch, Mapping):
        model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    elif isinstance(batch, (tuple, list)):
        model(*(v.to(device) if isinstance(v, Tensor) else v for v in batch))
    else:
        model(batch.to(device))


@contextlib.contextmanager
def _plain_kernels(model: nn.Module) -> Iterator[None]:
    """No fused paths that read weights where nothing can watch."""
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
    fast, fused = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(fused and not recurrent)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(fused)


def inputs_of(
    model: nn.Module, batch: Any, weights: Mapping[str, Tensor], see: See, *, uses: int = 0
) -> None:
    """Run the network on a batch, in evaluation mode, and tell of every product of the weights.

    Args:
        batch: a tensor, a tuple of a network's arguments, or a mapping of them by name.
        weights: clean name -> the network's own tensor.
        see: called for each product.
        uses: stop after so many; 0: run to the end.
    """
    left = uses

    def told(name: str, turned: bool, inputs: list[Tensor]) -> None:
        nonlocal left
        see(name, turned, inputs)
        left -= 1
        if left == 0:
            raise _Stop

    watch, stop = _Watch(weights, told), contextlib.suppress(_Stop)
    with torch.no_grad(), evaluating(model), _plain_kernels(model), stop, watch:
        _feed(model, batch)


def readers(model: nn.Module, batch: Any, include: Iterable[str]) -> dict[str, int]:
    """The weights in the order of their first use, and how often a batch uses each.

    A weight whose products cannot be seen (a transposed convolution, an embedding's table) is not
    among them.
    """
    own = names.parameters(model)
    found: dict[str, int] = {}

    def see(name: str, turned: bool, inputs: list[Tensor]) -> None:
        found[name] = found.get(name, 0) + 1

    inputs_of(model, batch, {n: own[n] for n in include}, see)
    return found


class Moments:
    """Sums over a weight's inputs, per group of a grouped convolution.

    Attributes:
        hessian: Y Y^T (groups, columns, columns), float64, over the inputs Y that it has now.
        cross: X Y^T, X its inputs in the original network.
        count: inputs summed.
        turned: the weight is (inputs, outputs).
    """

    def __init__(self) -> None:
        self.hessian: Tensor | None = None
        self.cross: Tensor | None = None
        self.count = 0
        self.turned = False

    def add(self, now: list[Tensor], before: list[Tensor]) -> None:
        """Inputs of one product: in the network as it is, and in the original."""
        y, x = (v[0][None] if len(v) == 1 else torch.stack(v) for v in (now, before))
        if not torch.isfinite(y).all():
            raise ArgumentError("calibration inputs lead to NaN or infinity inside the network")
        # a batch in float32: its rounding is far below the damping, and takes half the time
        hessian, cross = (y.mT @ y).double(), (x.mT @ y).double()
        self.hessian = hessian if self.hessian is None else self.hessian.add_(hessian)
        self.cross = cross if self.cross is None else self.cross.add_(cross)
        self.count += y.shape[1]


def moments(
    model: nn.Module, original: nn.Module, batches: Iterable[Any], name: str, uses: int
) -> Moments:
    """The moments of one weight's inputs over all batches.

    Args:
        model, original: as it is now, and as it was; the same modules.
        batches: as :func:`inputs_of` takes them.
        name: clean name of the weight.
        uses: of the weight by a batch (:func:`readers`).

    Raises :class:`ArgumentError` where the networks use it differently, or inputs are not finite.
    """
    found = Moments()
    for batch in batches:
        seen: list[list[list[Tensor]]] = []
        for network in (original, model):
            mine: list[list[Tensor]] = []

            def see(_: str, turned: bool, inputs: list[Tensor], mine: Any = mine) -> None:
                found.turned = turned
                mine.append([x.float() for x in inputs])

            inputs_of(network, batch, {name: names.parameters(network)[name]}, see, uses=uses)
            seen.append(mine)
        before, now = seen
        if [[x.shape for x in use] for use in before] != [[x.shape for x in u] for u in now]:
            raise ArgumentError(
                f"{name} is used otherwise in the compressed network than before: its inputs "
                "decide where it is used; exclude it"
            )
        for x, y in zip(before, now, strict=True):
            found.add(y, x)
    if found.hessian is None:
        raise ArgumentError(f"no batch reaches {name}; give calibration inputs")
    return found
