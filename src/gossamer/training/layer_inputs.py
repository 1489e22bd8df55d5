"""What a network's weights are multiplied with: seen at the products themselves.

Every product of a weight is an operation of torch (``addmm``, ``mm``, ``bmm``, ``convolution``,
``embedding``), whatever module or function asked for it: a linear layer, GPT-2's ``Conv1D``,
attention's packed projection, a recurrent layer's steps. They are watched below autograd, where a
weight is known by its memory, so no module type has a rule of its own here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core import names, nest
from gossamer.core.dispatch import Watching
from gossamer.core.modes import device_of, evaluating
from gossamer.training.patches import Patches

__all__ = [
    "Layout",
    "Pick",
    "Reading",
    "Use",
    "feed",
    "inputs_of",
    "plain_kernels",
    "readers",
    "watched",
]

_aten = torch.ops.aten
_PRODUCTS = {  # operation -> the place of its first factor
    _aten.mm.default: 0, _aten.bmm.default: 0, _aten.mv.default: 0,
    _aten.addmm.default: 1, _aten.baddbmm.default: 1, _aten.addmv.default: 1,
}  # fmt: skip
_LOOKUPS = {
    _aten.embedding.default,
    _aten._embedding_bag.default,
    _aten._embedding_bag_forward_only.default,
}


@dataclass(frozen=True)
class Layout:
    """How a weight is read as a matrix (outputs, inputs).

    Attributes:
        kind: ``filters``: (outputs, ...), all behind is inputs; ``rows``: (..., outputs, inputs);
            ``columns``: (..., inputs, outputs); ``transposed``: (inputs, outputs / groups, ...)
            of a transposed convolution.
        groups: of a transposed convolution.

    >>> Layout("columns").matrix(torch.zeros(3, 5)).shape
    torch.Size([5, 3])
    """

    kind: Literal["filters", "rows", "columns", "transposed"] = "filters"
    groups: int = 1

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as a matrix."""
        if self.kind == "filters":
            return weight.reshape(len(weight), -1)
        if self.kind == "rows":
            return weight.reshape(-1, weight.shape[-1])
        if self.kind == "columns":
            return weight.mT.reshape(-1, weight.shape[-2])
        return self._grouped(weight).movedim(1, 2).flatten(0, 1).flatten(1)

    def weight(self, matrix: Tensor, shape: Iterable[int]) -> Tensor:
        """The matrix as a weight of this shape: the inverse of :meth:`matrix`."""
        shape = tuple(shape)
        if self.kind in ("filters", "rows"):
            return matrix.reshape(shape)
        if self.kind == "columns":
            return matrix.reshape(*shape[:-2], shape[-1], shape[-2]).mT
        inputs, outputs, *kernel = shape
        parts = matrix.reshape(self.groups, outputs, inputs // self.groups, *kernel)
        return parts.movedim(1, 2).reshape(shape)

    def _grouped(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.groups, -1, *weight.shape[1:])


@dataclass(frozen=True)
class Use:
    """One product of a weight, or one look-up in it.

    Attributes:
        name: clean name of the weight.
        layout: how the weight is read.
        rows: of the matrix, from the first to the one behind the last.
        make: gives :attr:`inputs`, from the network's own tensors.
        ids: (n,), the rows that were looked up; of a table, which has no inputs.
        patches: of a convolution, all of whose inputs are looked at.
    """

    name: str
    layout: Layout
    rows: tuple[int, int]
    make: Callable[[], list[Tensor]] = list
    ids: Tensor | None = None
    patches: Patches | None = None

    @cached_property
    def inputs(self) -> list[Tensor]:
        """(n, columns) of each group, whose rows are even parts of ``rows``; made when asked for:
        those of a convolution are many times as large as the map that they lie on.
        """
        return self.make()

    def copied(self) -> Use:
        """With inputs of its own, float32: the network may write to its tensors afterwards."""
        if self.patches is not None:
            patches = self.patches.copied()
            return replace(self, make=patches.rows, patches=patches)
        inputs = [x.float().clone() for x in self.inputs]
        return replace(self, make=lambda: inputs)

    def like(self, other: Use) -> bool:
        """Whether the weight is read alike, by inputs of the same shapes."""
        if (self.rows, self.layout) != (other.rows, other.layout):
            return False
        if self.patches is not None and other.patches is not None:
            return self.patches.x.shape == other.patches.x.shape
        return [x.shape for x in self.inputs] == [x.shape for x in other.inputs]


See = Callable[[Use], None]
Pick = Callable[[str, int], Tensor]
"""Name of a weight and number of its inputs' rows -> which of them are looked at, (n,) integers."""


class _Stop(Exception):
    """All that is asked for has been seen."""


class _Watch(Watching):
    """Calls ``see`` for every product of the weights."""

    def __init__(self, weights: Mapping[str, Tensor], see: See, pick: Pick | None = None) -> None:
        super().__init__()
        self._see, self._pick = see, pick
        # Several weights may lie in one storage, as those of flattened recurrent layers do.
        self._places: dict[int, list[tuple[str, Tensor]]] = {}
        for name, weight in weights.items():
            self._places.setdefault(weight.untyped_storage().data_ptr(), []).append((name, weight))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # before the product: who is told may set the weight
        if func is _aten.convolution.default:
            self._convolution(*args)
        elif func in _PRODUCTS:
            first = _PRODUCTS[func]
            self._product(args[first], args[first + 1])
        elif func in _LOOKUPS:
            self._lookup(args[0], args[1])
        elif func is _aten.index.Tensor and len(args[1]) == 1:
            self._lookup(args[0], args[1][0])
        elif func is _aten.index_select.default and args[1] == 0:
            self._lookup(args[0], args[2])
        return func(*args, **(kwargs or {}))

    def _of(self, operand: Any) -> tuple[str, Tensor] | None:
        if not isinstance(operand, Tensor) or not operand.numel():
            return None
        for name, weight in self._places.get(operand.untyped_storage().data_ptr(), ()):
            begin = weight.data_ptr()
            if begin <= operand.data_ptr() < begin + weight.numel() * weight.element_size():
                return name, weight
        return None

    def _lookup(self, table: Any, ids: Tensor) -> None:
        known = self._of(table)
        if known is None or table.shape != known[1].shape or table.ndim != 2:
            return
        if ids.dtype == torch.bool:
            return
        self._see(Use(known[0], Layout("rows"), (0, len(table)), ids=ids.reshape(-1)))

    def _product(self, left: Tensor, right: Tensor) -> None:
        if right.ndim == 1:
            right = right[:, None]
        if left.ndim == 1 or left.shape[-1] != right.shape[-2]:
            return
        for x, w, behind in ((left, right, True), (right, left, False)):
            known = self._of(w)
            if known is None:
                continue
            # x as (..., n, columns), w as (..., outputs, columns)
            x, w = (x, w.mT) if behind else (x.mT, w)
            if w.ndim == 3 and (w.stride(0) == 0 or len(w) == 1):  # one weight for the whole batch
                self._matrix(*known, w[0], x)
            elif w.ndim == 3:  # one for each of the batch: experts
                for one, mine in zip(w.unbind(), x.unbind(), strict=True):
                    self._matrix(*known, one, mine)
            else:
                self._matrix(*known, w, x)
            return

    def _matrix(self, name: str, weight: Tensor, w: Tensor, x: Tensor) -> None:
        """A product with ``w`` (outputs, columns), which lies in the weight."""
        outputs, columns = w.shape
        along = 1 if columns == 1 else w.stride(1)
        across = None if outputs == 1 else w.stride(0)
        begin = (w.data_ptr() - weight.data_ptr()) // weight.element_size()
        if not weight.is_contiguous() or weight.ndim < 2:
            return
        length, behind = weight.shape[-1], weight[0].numel()
        layout, first = None, 0
        if along == 1 and columns == length and begin % length == 0 and across in (None, length):
            layout, first = Layout("rows"), begin // length
        elif along == 1 and columns == behind and begin % behind == 0 and across in (None, behind):
            layout, first = Layout("filters"), begin // behind
        if layout is None and columns == weight.shape[-2] and across in (None, 1):
            block, first = divmod(begin, weight.shape[-2] * length)
            if (columns == 1 or w.stride(1) == length) and first + outputs <= length:
                layout, first = Layout("columns"), block * length + first
        if layout is not None:

            def rows() -> list[Tensor]:
                found = x.reshape(-1, columns)
                if self._pick is not None:
                    found = found[self._pick(name, len(found)).to(found.device)]
                return [found]

            self._see(Use(name, layout, (first, first + outputs), rows))

    def _convolution(
        self,
        x: Tensor,
        w: Tensor,
        bias: Any,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        output_padding: list[int],
        groups: int,
    ) -> None:
        known = self._of(w)
        if known is None or w.shape != known[1].shape or x.ndim != w.ndim:
            return
        kernel, layout, outputs = w.shape[2:], Layout(), len(w)
        # one number stands for all axes, as torch gives it of padding="valid"
        stride, padding, dilation, output_padding = (
            [*v] * len(kernel) if len(v) == 1 else [*v]
            for v in (stride, padding, dilation, output_padding)
        )
        before, after = tuple(padding), tuple(padding)
        if transposed:  # the same as a convolution, its kernel turned, of inputs with gaps
            layout, outputs = Layout("transposed", groups), groups * w.shape[1]
            x, stride = _with_gaps(x, stride), [1] * len(kernel)
            reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            before = tuple(r - p for r, p in zip(reach, padding, strict=True))
            after = tuple(b + o for b, o in zip(before, output_padding, strict=True))
        patches = Patches(
            x, tuple(kernel), tuple(stride), tuple(dilation), before, after, groups, transposed
        )
        if self._pick is None:
            self._see(Use(known[0], layout, (0, outputs), patches.rows, patches=patches))
        else:
            at = self._pick(known[0], patches.count)
            self._see(Use(known[0], layout, (0, outputs), lambda: patches.some(at)))


def _with_gaps(x: Tensor, stride: list[int]) -> Tensor:
    """Inputs (N, C, ...) spread by the stride of a transposed convolution, zeros between them."""
    sizes = [s * (n - 1) + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    spread = x.new_zeros((*x.shape[:2], *sizes))
    spread[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
    return spread


def watched(
    weights: Mapping[str, Tensor], see: See, pick: Pick | None = None
) -> contextlib.AbstractContextManager[Any]:
    """A context in which ``see`` is told of every product of the weights, before it is taken."""
    return _Watch(weights, see, pick)


def feed(model: nn.Module, batch: Any) -> Any:
    """What the network gives for a batch, on its own device (:func:`gossamer.core.nest.feed`)."""
    return nest.feed(model, nest.moved(batch, device_of(model)))


@contextlib.contextmanager
def plain_kernels(model: nn.Module) -> Iterator[None]:
    """No fused paths that read weights where nothing can watch."""
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
    fast, fused = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    cudnn = torch.backends.cudnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(fused and not recurrent)
    torch._C._set_cudnn_enabled(cudnn and not recurrent)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(fused)
        torch._C._set_cudnn_enabled(cudnn)


def inputs_of(
    model: nn.Module,
    batch: Any,
    weights: Mapping[str, Tensor],
    see: See,
    *,
    uses: int = 0,
    pick: Pick | None = None,
) -> None:
    """Run the network on a batch, in evaluation mode, and tell of every product of the weights.

    Args:
        batch: a tensor, a tuple of a network's arguments, or a mapping of them by name.
        weights: clean name -> the network's own tensor.
        see: called for each :class:`Use`, with inputs that are the network's own tensors: later
            operations may write to them.
        uses: stop after so many; 0: run to the end.
        pick: which rows of the inputs are looked at; None: all.
    """
    left, failed = uses, list[Exception]()

    def told(use: Use) -> None:
        nonlocal left
        try:
            see(use)
        except Exception as e:
            failed.append(e)
            raise
        left -= 1
        if left == 0:
            raise _Stop

    watch = _Watch(weights, told, pick)
    with torch.no_grad(), evaluating(model), plain_kernels(model):
        try:
            with watch:
                feed(model, batch)
        except Exception:  # TorchScript passes on what is raised in it as another error
            if failed:
                raise failed[0] from None
            if left or not uses:
                raise


@dataclass
class Reading:
    """How batches read a weight.

    Attributes:
        uses: by each batch, of one or the other kind.
        multiplied, looked_up: as a matrix, as a table.
    """

    uses: list[int]
    multiplied: bool = False
    looked_up: bool = False


def readers(model: nn.Module, batches: Iterable[Any], include: Iterable[str]) -> dict[str, Reading]:
    """The weights in the order of their first use, and how often each batch uses them.

    A weight whose products cannot be seen (a bilinear layer's) is not among them.
    """
    own = names.parameters(model)
    weights, every = {n: own[n] for n in include}, list(batches)
    found: dict[str, Reading] = {}
    for number, batch in enumerate(every):

        def see(use: Use, number: int = number) -> None:
            reading = found.setdefault(use.name, Reading([0] * len(every)))
            reading.uses[number] += 1
            reading.multiplied |= use.ids is None
            reading.looked_up |= use.ids is not None

        inputs_of(model, batch, weights, see)
    return found
