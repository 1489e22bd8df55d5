"""Average gradients over workers, in few bits: in a bare loop, or N workers in one process.

>>> import torch
>>> from gossamer.distribute import TernGrad
>>> workers = [{"fc.weight": torch.randn(2000)} for _ in range(4)]
>>> mean = simulate(workers, TernGrad(), step=0, topology="two_phase")
>>> mean["fc.weight"].unique().numel() <= 9  # sums of four ternary codes, one scale
True
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gossamer.core import names
from gossamer.core.errors import ArgumentError, one_of
from gossamer.distribute.codecs.codec import GradCodec
from gossamer.distribute.codecs.feedback import ErrorFeedback
from gossamer.distribute.exchange.group import TIMEOUT, Distributed, Program, lockstep
from gossamer.distribute.exchange.job import Job
from gossamer.distribute.exchange.spans import SPAN, Flights
from gossamer.distribute.exchange.topology import AGREED, TOPOLOGIES, Topology, program
from gossamer.distribute.wire.message import VERSION, Layout, Slot

__all__ = ["THRESHOLD", "Plan", "exchange", "simulate"]

Dither = Literal["independent", "shifted"]

THRESHOLD = 1024
"""Elements under which a gradient stays in floating point: biases and norms, mostly.

TernGrad's ImageNet networks keep everything under 9217.
"""


class Options(TypedDict, total=False):
    """The fields of :class:`Plan` beside codec and feedback, as keywords."""

    topology: Topology
    threshold: int
    exclude: str | Iterable[str] | None
    shared_scale: bool | None
    dither: Dither
    seed: int
    requantize: bool
    checksum: bool


@dataclass(frozen=True)
class Plan:
    """How gradients are averaged: everything the ranks must agree on.

    Attributes:
        codec: of the gradients that are coded.
        topology: ``all_gather``, ``two_phase``, ``server``, or ``auto``: see
            :mod:`gossamer.distribute.exchange.topology`.
        threshold: gradients of fewer elements travel in floating point, averaged exactly.
        exclude: names or patterns (:func:`gossamer.core.names.select`) of more of those.
        shared_scale: one scale a gradient for all ranks, the largest. None: where the topology
            needs it, which are all but ``all_gather``.
        dither: ``independent`` random numbers on each rank, or one stream ``shifted`` by rank:
            less noise in the average of gradients that are alike, each rank still unbiased.
        seed: of the random numbers, 64 bits.
        checksum: messages carry a CRC-32, and a damaged one is an error that names its sender.
        feedback: whether what was left out of a gradient is added to the next.
        requantize: sums come back as codes of their mean, quantized a second time, not exactly:
            fewer bytes, more noise, still unbiased. Not with ``all_gather``, nor biased codecs.

    Raises :class:`ArgumentError` for a topology that the codec cannot do, and values outside.
    """

    codec: GradCodec
    topology: Topology = "auto"
    threshold: int = THRESHOLD
    exclude: str | Iterable[str] | None = None
    shared_scale: bool | None = None
    dither: Dither = "independent"
    seed: int = 0
    requantize: bool = False
    feedback: bool = False
    checksum: bool = False

    def __post_init__(self) -> None:
        """Check."""
        if not isinstance(self.codec, GradCodec):
            raise ArgumentError(
                f"codec={self.codec!r} is no gradient codec; make one with "
                "gossamer.distribute.by_name('terngrad')"
            )
        if self.topology not in ("auto", *TOPOLOGIES):
            raise ArgumentError(
                f"topology={self.topology!r} is not one of auto, {', '.join(TOPOLOGIES)}"
            )
        if self.topology in ("two_phase", "server"):
            if not self.codec.sums:
                raise ArgumentError(
                    f"topology={self.topology!r} needs exact sums, which {self.codec.name} with "
                    "these settings does not have; use topology='all_gather'"
                )
            if self.shared_scale is False:
                raise ArgumentError(
                    f"topology={self.topology!r} sums codes of one shared scale; use "
                    "topology='all_gather' with shared_scale=False"
                )
        if self.requantize and self.topology == "all_gather":
            raise ArgumentError(
                "requantize=True is of sums, which topology='all_gather' has none of; use "
                "topology='two_phase' or 'server'"
            )
        if self.requantize and not self.codec.unbiased:
            raise ArgumentError(
                f"requantize=True would bias {self.codec.name}, which is no unbiased codec, a "
                "second time; leave it out"
            )
        if self.dither not in ("independent", "shifted"):
            raise ArgumentError(f"dither={self.dither!r} is not one of independent, shifted")
        if not isinstance(self.threshold, int) or self.threshold < 0:
            raise ArgumentError(f"threshold={self.threshold!r} must be a number of elements from 0")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 64:
            raise ArgumentError(f"seed={self.seed!r} must be a whole number from 0, below 2**64")

    @classmethod
    def of(cls, codec: GradCodec | Plan, **options: Any) -> Plan:
        """The plan itself, or that of a codec, with these fields changed.

        Raises :class:`ArgumentError` for an option that is no field.
        """
        known = [field.name for field in fields(cls)][1:]
        for name in options:
            one_of("option", name, known)
        if isinstance(codec, Plan):
            return replace(codec, **options)
        return cls(codec, **options)

    def way(self, size: int) -> str:
        """The topology among ``size`` ranks."""
        if self.topology != "auto":
            return self.topology
        return "two_phase" if size > 3 and self.codec.sums else "all_gather"

    def excluded(self, everything: Iterable[str]) -> frozenset[str]:
        """Names that stay in floating point whatever their size."""
        if self.exclude is None:
            return frozenset()
        return frozenset(names.select(everything, self.exclude))

    def layout(self, tensors: Mapping[str, Tensor], excluded: frozenset[str], size: int) -> Layout:
        """What ``size`` ranks must agree on to exchange these tensors.

        Raises :class:`ArgumentError` for a tensor that cannot be averaged.
        """
        slots = []
        for name, t in tensors.items():
            if not isinstance(t, Tensor):
                raise ArgumentError(
                    f"the gradient of {name} is {t!r:.60}, no tensor; where there is none, give "
                    "zeros, so that all ranks exchange the same"
                )
            if t.layout != torch.strided:
                raise ArgumentError(
                    f"the gradient of {name} is sparse; make it dense with "
                    "nn.Embedding(..., sparse=False)"
                )
            if t.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
                raise ArgumentError(
                    f"the gradient of {name} is {t.dtype}; float32, float16, bfloat16 and float64 "
                    "can be averaged"
                )
            coded = t.numel() >= max(1, self.threshold) and name not in excluded
            slots.append(Slot(name, tuple(t.shape), t.dtype, coded))
        return Layout(self.settings(size, excluded), tuple(slots))

    def settings(self, size: int, excluded: frozenset[str]) -> tuple[tuple[str, str], ...]:
        """What shapes the messages of ``size`` ranks and their meaning, beside the tensors."""
        said = {
            "message version": VERSION,
            "number of ranks": size,
            "codec": self.codec,
            "topology": self.way(size),
            "shared_scale": self._shared(size),
            "dither": self.dither,
            "requantize": self.requantize,
            "feedback": self.feedback,
            "checksum": self.checksum,
            "threshold": self.threshold,
            "exclude": ", ".join(sorted(excluded)) or None,
            "seed": self.seed,
            "spans": f"{SPAN} elements, announced by {' and '.join(map(str, AGREED))}",
        }
        return tuple((name, str(value)) for name, value in said.items())

    def _shared(self, size: int) -> bool:
        if self.shared_scale is None:
            return self.way(size) != "all_gather"
        return self.shared_scale

    def program(
        self,
        layout: Layout,
        tensors: Sequence[Tensor],
        rank: int,
        size: int,
        step: int,
        feedback: ErrorFeedback | None = None,
        flights: Flights | None = None,
    ) -> Program:
        """One rank's part, to be run by a group; averages flat tensors in place.

        With ``flights`` that is done when these have landed.
        """
        job = Job(
            codec=self.codec,
            layout=layout,
            tensors=tensors,
            rank=rank,
            size=size,
            step=step,
            seed=self.seed,
            shared=self._shared(size),
            shifted=self.dither == "shifted",
            requantize=self.requantize,
            checksum=self.checksum,
            feedback=feedback,
        )
        return program(job, self.way(size), flights)


@torch.no_grad()
def exchange(
    gradients: Mapping[str, Tensor] | nn.Module,
    codec: GradCodec | Plan,
    group: Distributed | dist.ProcessGroup | None = None,
    *,
    step: int,
    feedback: ErrorFeedback | None = None,
    timeout: float = TIMEOUT,
    **options: Unpack[Options],
) -> None:
    """Replace gradients by their average over all ranks of ``group``, in place.

    Call it on every rank, after ``backward()`` and before the optimizer's step, with the same
    names, shapes and settings.

    Args:
        gradients: clean name -> gradient, or a model: then the gradients of all its parameters
            that require one; where there is none, zeros take part and the average is set.
        group: a process group, None for the default one, or :class:`Distributed`. Without a
            process group there is one worker, whose gradients are quantized all the same.
        step: number of the exchange, from 0; with ``seed`` it decides all random numbers.
        feedback: this rank's errors, to be added and renewed; None: no error feedback.
        timeout: seconds a rank may keep the others waiting; a :class:`Distributed` has its own.

    ``codec`` may be a whole :class:`Plan`; ``options`` are its other fields. Raises
    :class:`ArgumentError`, with nothing changed, and
    :class:`~gossamer.core.errors.ExchangeError` when a rank is gone or holds something else.
    """
    plan = Plan.of(codec, feedback=feedback is not None, **options)
    if isinstance(gradients, nn.Module):
        found: dict[str, Tensor] = {}
        for name, p in names.parameters(gradients).items():
            if p.requires_grad:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                found[name] = p.grad
        gradients = found
    if not isinstance(gradients, Mapping) or not gradients:
        raise ArgumentError(
            f"gradients is empty, or no mapping of names to gradients ({type(gradients).__name__}):"
            " there is nothing to average"
        )
    where = group if isinstance(group, Distributed) else Distributed(group, timeout=timeout)
    layout = plan.layout(gradients, plan.excluded(gradients), where.size)
    flat = [g.contiguous().view(-1) for g in gradients.values()]
    where.run(plan.program(layout, flat, where.rank, where.size, step, feedback))
    for g, out in zip(gradients.values(), flat, strict=True):
        if not g.is_contiguous():
            g.copy_(out.view(g.shape))


@torch.no_grad()
def simulate(
    gradients: Sequence[Mapping[str, Tensor]],
    codec: GradCodec | Plan,
    *,
    step: int,
    feedback: Sequence[ErrorFeedback] | None = None,
    **options: Unpack[Options],
) -> dict[str, Tensor]:
    """What every one of N ranks would hold after :func:`exchange`, to the bit, in one process.

    Args:
        gradients: one mapping a rank; left as they are.
        feedback: one a rank.

    Raises as :func:`exchange`.
    """
    plan = Plan.of(codec, feedback=feedback is not None, **options)
    size = len(gradients)
    ranks = isinstance(gradients, Sequence) and all(isinstance(g, Mapping) for g in gradients)
    if not ranks or not size or not gradients[0]:
        raise ArgumentError(
            "gradients is empty, or no list of mappings: give one mapping a rank, with a gradient "
            "or more"
        )
    if feedback is not None and len({id(f) for f in feedback}) != size:
        raise ArgumentError(f"{len(feedback)} feedback for {size} ranks: one a rank, of its own")
    plan.layout(gradients[0], plan.excluded(gradients[0]), size)  # what cannot be averaged is told
    result = {
        name: g.clone(memory_format=torch.contiguous_format) for name, g in gradients[0].items()
    }
    programs = []
    for rank, own in enumerate([result, *gradients[1:]]):
        layout = plan.layout(own, plan.excluded(own), size)
        flat = [g.contiguous().view(-1) for g in own.values()]
        errors = None if feedback is None else feedback[rank]
        programs.append(plan.program(layout, flat, rank, size, step, errors))
    lockstep(programs)
    return result
