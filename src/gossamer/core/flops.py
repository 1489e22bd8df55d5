"""Multiplications of a forward pass that know zeros, dead filters and low rank.

A real forward pass on example inputs is watched at torch's operators, so that functional calls,
recurrent cells, attention and factors of low rank count as what they compute. Three figures a
layer, in multiply-accumulates (MACs) of one example; FLOPs are twice that. Borders that are padded
count as full, as everywhere.

- **dense**: of all weights.
- **nonzero**: of weights that are not zero: what unstructured sparsity could save at most.
- **live**: of the dense product that is left when dead rows and columns are taken away: an output
  channel is dead where it does not depend on the network's inputs, and an input channel where it
  is dead or all its weights are zero. A dead filter thus leaves the next layers too, through
  normalization, activations, additions and concatenations, as its constant can be folded forward.
  A filter that only zero weights read still counts in its own layer.

What depends on the inputs is found by passing NaN in their place: every operator passes it on where
its result depends on it. Products alone would pass it through zero weights; for them the rule is
applied here. It errs on the side of live.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from gossamer.core import nest
from gossamer.core.columns import columns
from gossamer.core.dispatch import Watching
from gossamer.core.errors import ArgumentError
from gossamer.core.plain import copied, plain

__all__ = ["Flops", "LayerFlops", "count"]

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm: 0, _ATEN.bmm: 0, _ATEN.addmm: 1, _ATEN.baddbmm: 1}  # place of the first
_NORMS = (
    _ATEN.native_batch_norm,
    _ATEN._native_batch_norm_legit_no_training,
    _ATEN.cudnn_batch_norm,
)
_NAN = float("nan")


@dataclass(frozen=True)
class LayerFlops:
    """One weight, or one product of activations.

    Attributes:
        name: of the weight; of a product of activations, or of a weight that the forward computes,
            its module's with ``(product)``.
        kind: of the module.
        macs, nonzero, live: multiply-accumulates of one example, as the module says.
    """

    name: str
    kind: str
    macs: float
    nonzero: float
    live: float


@dataclass(frozen=True)
class Flops:
    """The layers' figures, in the order of the forward pass."""

    rows: tuple[LayerFlops, ...]

    @property
    def macs(self) -> float:
        """Dense multiply-accumulates of one example; FLOPs are twice that."""
        return sum(row.macs for row in self.rows)

    @property
    def nonzero(self) -> float:
        """Those of weights that are not zero."""
        return sum(row.nonzero for row in self.rows)

    @property
    def live(self) -> float:
        """Those left when dead rows and columns are taken away."""
        return sum(row.live for row in self.rows)

    def totals(self) -> dict[str, float]:
        """The three sums."""
        return {"macs": self.macs, "nonzero": self.nonzero, "live": self.live}

    def as_dict(self) -> dict[str, Any]:
        """Sums and rows as plain values; JSON takes them."""
        return {**self.totals(), "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        cells = [["layer", "MACs", "nonzero", "live"]]
        for row in (*self.rows, LayerFlops("total", "", self.macs, self.nonzero, self.live)):
            cells.append([row.name, *(f"{v:,.0f}" for v in (row.macs, row.nonzero, row.live))])
        return "\n".join(columns(cells))


def count(
    model: nn.Module, example: Any, *, feed: Callable[[nn.Module, Any], Any] = nest.feed
) -> Flops:
    """Count a forward pass in evaluation mode; the model is left as it is.

    Args:
        example: one batch as the network takes it (:func:`gossamer.core.nest.feed`), whose first
            dimension counts the examples where its tensors share one.
        feed: runs the network on a batch.

    >>> net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
    >>> with torch.no_grad():
    ...     _ = net[0].weight.fill_(1.0)[0].zero_(), net[2].weight.fill_(1.0)
    >>> count(net, torch.zeros(5, 4)).totals()
    {'macs': 18.0, 'nonzero': 14.0, 'live': 12.0}

    Raises :class:`ArgumentError` for no tensor in the example, or one that the network does not
    take.
    """
    given = nest.leaves(example)
    if not given:
        raise ArgumentError(f"example holds no tensor: {nest.shown(example)}; give one batch")
    sizes = {len(t) if t.ndim else 1 for t in given}
    batch = max(1, sizes.pop()) if len(sizes) == 1 else 1
    network, _ = plain(copied(model))
    network = network.cpu().eval().requires_grad_(False)
    kinds = {t.dtype for t in network.parameters() if t.is_floating_point()}
    if kinds & {torch.float16, torch.bfloat16}:
        network, example = network.float(), nest.mapped(_single, example)
    watch = _Watch(network)

    def marked(t: Tensor) -> Tensor:
        t = t.detach().cpu().clone()
        if t.is_floating_point():
            return t.fill_(_NAN)
        watch.taint(t)
        return t

    inputs = nest.mapped(marked, example)
    with _watched(network, watch):
        try:
            feed(network, inputs)
        except Exception as e:  # the user's own forward, which may raise anything
            raise ArgumentError(
                f"the operations of {type(model).__name__} on {nest.shown(example)} cannot be "
                f"counted: {type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:200]}"
            ) from e
    return Flops(tuple(row.result(batch) for row in watch.rows.values()))


def _single(t: Tensor) -> Tensor:
    return t.float() if t.is_floating_point() else t


@contextmanager
def _watched(network: nn.Module, watch: _Watch) -> Iterator[None]:
    """Every operator is seen: no fused kernels of recurrent layers and attention."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        for name, module in network.named_modules():
            for hook in (
                module.register_forward_pre_hook(
                    lambda m, _, name=name: watch.at.append((name, m))
                ),
                module.register_forward_hook(lambda *_: watch.at.pop() and None, always_call=True),
            ):
                stack.callback(hook.remove)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        # what torch.backends.mkldnn.flags does, which also warns of flags that it leaves alone
        stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
        torch._C._set_mkldnn_enabled(False)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.no_grad())
        stack.enter_context(watch)
        yield


@dataclass
class _Row:
    """What is gathered of a layer over its calls.

    ``pairs``: (groups, outputs, inputs) of a group, whether any weight joins the two; None for a
    product of activations. ``alive``: (groups, inputs), whether an input depends on the network's.
    """

    name: str
    kind: str
    macs: int = 0
    density: float = 1.0
    pairs: Tensor | None = None
    alive: Tensor | None = None

    def result(self, batch: int) -> LayerFlops:
        """The figures of one example."""
        macs, share = self.macs / batch, 1.0
        if self.pairs is not None and self.alive is not None:
            used = self.pairs & self.alive[:, None]
            left = used.any(2).sum(1) * used.any(1).sum(1)
            share = int(left.sum()) / max(1, self.pairs.numel())
        return LayerFlops(self.name, self.kind, macs, macs * self.density, macs * share)


@dataclass
class _Watch(Watching):
    """Counts products, and passes NaN on where results depend on the inputs."""

    network: nn.Module
    rows: dict[Any, _Row] = field(default_factory=dict)
    at: list[tuple[str, nn.Module]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        every = (*self.network.named_parameters(), *self.network.named_buffers())
        self.names = {t.untyped_storage().data_ptr(): name for name, t in every if t.numel()}
        # integers and truth values that depend on the inputs, kept so that no address is used again
        self.tainted: dict[int, Tensor] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and asking for that would import all of the compiler."""
        return False

    def taint(self, tensor: Tensor) -> None:
        """Remember a tensor that cannot hold NaN as one that depends on the inputs."""
        self.tainted[tensor.untyped_storage().data_ptr()] = tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """One operator."""
        kwargs, packet = kwargs or {}, func._overloadpacket
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        tainted = any(
            not t.is_floating_point() and t.untyped_storage().data_ptr() in self.tainted
            for t in given
        )
        if packet is _ATEN.convolution:
            return self._convolution(func, args)
        if packet in _PRODUCTS:
            return self._product(func, args, kwargs, _PRODUCTS[packet])
        out = func(*args, **kwargs)
        if packet is _ATEN.embedding:
            table = args[0]
            return out.masked_fill((table != table[:1]).any(0), _NAN)
        if packet is _ATEN.mul and not tainted and all(isinstance(a, Tensor) for a in args[:2]):
            return out.masked_fill((args[0] == 0) | (args[1] == 0), 0.0)
        if packet in _NORMS and isinstance(args[1], Tensor):
            off = (args[1] == 0).view(-1, *[1] * (out[0].ndim - 2))
            shift = args[2] if isinstance(args[2], Tensor) else torch.zeros_like(args[1])
            return (torch.where(off, shift.view(off.shape), out[0]), *out[1:])
        if packet in flop_registry:  # a fused product: no rule here, so all of it counts
            row = self._row(None)
            row.macs += flop_registry[packet](*args, **kwargs, out_val=out) // 2
        return self._marked(out, given, tainted, func)

    def _marked(self, out: Any, given: list[Tensor], tainted: bool, func: Any) -> Any:
        """The result with what cannot carry NaN by itself marked."""
        whole = [t for t in tree_leaves(out) if isinstance(t, Tensor) and not t.is_floating_point()]
        if whole and (tainted or any(_any_nan(t) for t in given)):
            for t in whole:
                self.taint(t)
        if not tainted:
            return out
        if func._schema.is_mutable:
            for t in tree_leaves(out):
                if isinstance(t, Tensor) and t.is_floating_point():
                    t.fill_(_NAN)
            return out
        return tree_map(
            lambda t: (
                torch.full_like(t, _NAN) if isinstance(t, Tensor) and t.is_floating_point() else t
            ),
            out,
        )

    def _row(self, weight: Tensor | None) -> _Row:
        path, module = self.at[-1] if self.at else ("", self.network)
        name = f"{path} (product)".strip()
        key: Any = name
        if weight is not None and (known := self.names.get(weight.untyped_storage().data_ptr())):
            # a slice of a weight, such as the queries' of attention, has dead parts of its own
            name, key = known, (known, weight.storage_offset(), weight.numel())
        return self.rows.setdefault(key, _Row(name, type(module).__name__))

    def _weigh(self, weight: Tensor, pairs: Callable[[], Tensor], alive: Tensor, macs: int) -> None:
        row = self._row(weight)
        row.macs += macs
        if row.pairs is None:
            row.pairs, row.alive = pairs(), alive
            row.density = int(torch.count_nonzero(weight)) / max(1, weight.numel())
        else:
            assert row.alive is not None  # set beside pairs
            row.alive = row.alive | alive

    def _convolution(self, func: Any, args: Any) -> Tensor:
        x, w, bias, *rest = args
        transposed, groups = rest[3], rest[5]
        if _any_nan(w):  # a kernel that the forward computes of its inputs
            row = self._row(None)
            out: Tensor = func(*args)
            row.macs += _conv_macs(x, w, out, transposed)
            return torch.full_like(out, _NAN)
        seen = x.isnan()
        out = func(x.nan_to_num(nan=0.0), w, bias, *rest)
        depends = func(seen.to(w.dtype), (w != 0).to(w.dtype), None, *rest) > 0

        def pairs() -> Tensor:
            joined = (w != 0).flatten(2).any(2)
            if transposed:  # (in, out / groups)
                return joined.view(groups, -1, joined.shape[1]).transpose(1, 2)
            return joined.view(groups, -1, joined.shape[1])

        dims = [d for d in range(x.ndim) if d != x.ndim - w.ndim + 1]
        alive = seen.any(dim=dims).view(groups, -1)
        self._weigh(w, pairs, alive, _conv_macs(x, w, out, transposed))
        return out.masked_fill(depends, _NAN)

    def _product(self, func: Any, args: Any, kwargs: dict[str, Any], first: int) -> Tensor:
        a, b = args[first : first + 2]
        from_a, from_b = a.isnan(), b.isnan()
        plainly = [t.nan_to_num(nan=0.0) if isinstance(t, Tensor) else t for t in args]
        out: Tensor = func(*plainly, **kwargs)
        left, right = ((t != 0).to(a.dtype) for t in (a, b))
        depends = (from_a.to(a.dtype) @ right + left @ from_b.to(a.dtype)) > 0
        if first and _any_nan(args[0]):
            depends = depends | args[0].isnan()
        macs = prod(a.shape) * b.shape[-1]
        known = [t.untyped_storage().data_ptr() in self.names for t in (a, b)]
        if not _any_nan(b) and (known[1] or not known[0]) and (_any_nan(a) or known[1]):
            joined = right.bool().view(-1, *b.shape[-2:]).transpose(1, 2)
            self._weigh(b, lambda: joined, _groups(from_a, -2), macs)
        elif not _any_nan(a) and (_any_nan(b) or known[0]):
            joined = left.bool().view(-1, *a.shape[-2:])
            self._weigh(a, lambda: joined, _groups(from_b, -1), macs)
        else:
            self._row(None).macs += macs
        return out.masked_fill(depends, _NAN)


def _groups(seen: Tensor, dim: int) -> Tensor:
    """(K, N) or (B, K, N) -> whether each of the K, or N, is seen: (1 or B, K)."""
    return seen.any(dim).view(-1, seen.shape[-1 if dim == -2 else -2])


def _conv_macs(x: Tensor, w: Tensor, out: Tensor, transposed: bool) -> int:
    places = x if transposed else out
    channel = places.ndim - w.ndim + 1
    return prod(s for d, s in enumerate(places.shape) if d != channel) * w.numel()


def _any_nan(t: Tensor) -> bool:
    return t.is_floating_point() and bool(t.isnan().any())
