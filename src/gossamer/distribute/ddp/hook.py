"""Gradients of a few bits in DistributedDataParallel: one line on any DDP model.

>>> from gossamer.distribute import TernGrad
>>> model = torch.nn.Linear(64, 64)
>>> state = GradientExchange(model, TernGrad())  # then: ddp.register_comm_hook(state, state.hook)

The hook's body encodes a bucket's first spans where scales are not shared; one worker thread
encodes the rest, communicates in the order of the buckets, over a process group of its own, and
decodes into the bucket. (Collectives issued from a future's callback hang, or mix buckets without a
word.) A bucket's last spans travel while the next bucket's are encoded. The hook of the last bucket
waits for the thread, so that a failure is raised by ``backward()`` as it is.

State is kept by parameter name: buckets are rebuilt after the first step. The divisor is the number
of ranks, whatever ``no_sync``, ``join`` or unused parameters leave of the gradients.
"""

import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from gossamer.core import names
from gossamer.core.errors import ArgumentError, FormatError
from gossamer.distribute.codecs.codec import GradCodec
from gossamer.distribute.codecs.feedback import ErrorFeedback
from gossamer.distribute.exchange.agreement import NUMBERS, agree
from gossamer.distribute.exchange.average import Options, Plan
from gossamer.distribute.exchange.group import TIMEOUT, Distributed
from gossamer.distribute.exchange.worker import Worker
from gossamer.distribute.wire.message import Layout

__all__ = ["GradientExchange", "exchange_hook"]

_FORMAT = 1


class GradientExchange:
    """The state of a DDP communication hook that averages gradients in few bits.

    Args:
        model: the model that DDP wraps (or the DDP model): for the names of its parameters.
        codec: how gradients are coded, or a whole plan.
        process_group: DDP's; None: the default one. The exchange makes a group of its own over the
            same ranks at the first step; for a group of some ranks only, torch asks that they have
            made equally many groups before.
        feedback: error feedback, for biased codecs.
        timeout: seconds a rank may keep the others waiting (in evaluation, or because it hangs)
            before they end with an error; a killed rank ends them in some seconds.

    As a context it closes itself at the end, and tells the others of an error that left it.

    ``options`` are the other fields of :class:`~gossamer.distribute.exchange.average.Plan`. With
    one rank gradients are quantized as for any number, nothing is sent, and a warning says so once.

    Raises :class:`ArgumentError` for arguments outside what is allowed.
    """

    def __init__(
        self,
        model: nn.Module,
        codec: GradCodec | Plan,
        *,
        process_group: dist.ProcessGroup | None = None,
        feedback: bool | None = None,
        timeout: float = TIMEOUT,
        **options: Unpack[Options],
    ) -> None:
        chosen = {} if feedback is None else {"feedback": feedback}
        self.plan = Plan.of(codec, **chosen, **options)
        if not timeout > 0:
            raise ArgumentError(f"timeout={timeout} must be more than 0 seconds")
        self.timeout = timeout
        self.step = 0
        self.errors = ErrorFeedback() if self.plan.feedback else None
        self._model = model
        self._parameters = names.parameters(model)  # held, so that ids stay theirs
        self._names = {id(p): name for name, p in self._parameters.items()}
        self._excluded = self.plan.excluded(self._parameters)
        self._layouts: dict[tuple[str, ...], Layout] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []  # of the step's buckets, to be put back
        self._process_group = process_group
        self._group: Distributed | None = None
        self._worker: Worker | None = None
        self._size: int | None = None  # of the run that a loaded state is of

    @staticmethod
    def hook(state: "GradientExchange", bucket: dist.GradBucket) -> Future[Tensor]:
        """The communication hook: ``ddp.register_comm_hook(state, GradientExchange.hook)``."""
        return state._exchange(bucket)

    def _exchange(self, bucket: dist.GradBucket) -> Future[Tensor]:
        group = self._start()
        if self._worker is not None:
            self._worker.check()
        buffer = bucket.buffer()
        with group.telling():
            tensors, copies = self._views(bucket, buffer)
            layout = self._layout(tensors, group.size)
        program = self.plan.program(
            layout,
            list(tensors.values()),
            group.rank,
            group.size,
            self.step,
            self.errors,
            None if self._worker is None else self._worker.flights,
        )
        last = bucket.is_last()
        self.step += last
        future: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
        with torch.no_grad():
            request = group.start(program)
        if buffer.is_cuda:  # the worker's stream knows nothing of this one
            torch.cuda.current_stream(buffer.device).synchronize()
        if self._worker is None:
            group.go_on(program, request)
            self._put_back(copies)
            future.set_result(buffer)
            return future
        self._copies += copies
        self._worker.submit(program, request, buffer, future, last)
        if last:  # DDP reads the buckets when this hook has returned
            copies, self._copies = self._copies, []
            self._worker.drain()
            self._put_back(copies)
        return future

    @staticmethod
    @torch.no_grad()
    def _put_back(copies: list[tuple[Tensor, Tensor]]) -> None:
        for place, flat in copies:
            place.copy_(flat.view(place.shape))

    def _views(
        self, bucket: dist.GradBucket, buffer: Tensor
    ) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
        """Flat gradients in the order of their elements, and those that are copies.

        A bucket holds a gradient in its parameter's memory format; the codes and their random
        numbers count elements as indices do, whatever the format.
        """
        if buffer.layout != torch.strided:
            raise ArgumentError(
                "a bucket holds a sparse gradient; make it dense with nn.Embedding(sparse=False)"
            )
        views, copies, at = {}, [], 0
        for p in bucket.parameters():
            name = self._names.get(id(p))
            if name is None:
                raise ArgumentError(
                    f"a bucket holds a parameter of shape {tuple(p.shape)} that is not the "
                    "model's; make the GradientExchange from the model that DDP wraps"
                )
            flat = buffer[at : at + p.numel()]
            if not p.is_contiguous() and _dense(p):
                place = flat.as_strided(p.shape, p.stride())
                flat = place.contiguous().view(-1)
                copies.append((place, flat))
            views[name] = flat
            at += p.numel()
        return views, copies

    def _layout(self, views: Mapping[str, Tensor], size: int) -> Layout:
        key = tuple(views)
        if key not in self._layouts:
            shaped = {n: v.view(self._parameters[n].shape) for n, v in views.items()}
            self._layouts[key] = self.plan.layout(shaped, self._excluded, size)
        return self._layouts[key]

    def _reduced(self) -> dict[str, Tensor]:
        """The parameters whose gradients DDP averages; ranks may differ in the others."""
        ids = _reduced(self._model)
        return {name: p for name, p in self._parameters.items() if id(p) in ids}

    def _start(self) -> Distributed:
        # A collective: at the first hook all ranks are here.
        if self._group is not None:
            return self._group
        group = Distributed(self._process_group, timeout=self.timeout)
        self._fits(group.size)
        reduced = self._reduced()
        self._excluded &= reduced.keys()
        if group.size > 1:
            own = dist.new_group(
                dist.get_process_group_ranks(group.group),
                timeout=timedelta(seconds=self.timeout),
                backend=dist.get_backend(group.group),
                # where some ranks are not in the group, they are not here either
                use_local_synchronization=group.size < dist.get_world_size(),
            )
            group = Distributed(own, timeout=self.timeout)
            everything = self.plan.layout(reduced, self._excluded, group.size)
            group.run(agree(everything, self.step, [0] * NUMBERS, "cpu"))
            self._worker = Worker(group)
        else:
            warnings.warn(
                "gradients of one rank are quantized with nobody to exchange them with; start more "
                "with torchrun --nproc-per-node",
                stacklevel=2,
            )
        self._group = group
        return group

    def _fits(self, size: int) -> None:
        if self._size not in (None, size):
            raise ArgumentError(
                f"the saved exchange is of {self._size} ranks, this run has {size}: start "
                f"{self._size} ranks, or load_state_dict(state, resize=True) to go on with {size}, "
                "to other bits and without errors fed back"
            )

    def state_dict(self) -> dict[str, Any]:
        """Step, seed and number of ranks, and this rank's errors where they are fed back.

        The same on all ranks but for the errors: with ``feedback`` each rank saves its own.
        """
        group = self._group or Distributed(self._process_group, timeout=self.timeout)
        return {
            "format": _FORMAT,
            "codec": repr(self.plan.codec),
            "seed": self.plan.seed,
            "step": self.step,
            "size": group.size if self._size is None else self._size,
            "rank": group.rank,
            "errors": None if self.errors is None else self.errors.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, resize: bool = False) -> None:
        """Go on from a saved state, to the same bits.

        Args:
            state: of :meth:`state_dict`, by the same rank where errors are fed back.
            resize: go on with another number of ranks; errors fed back start at zero.

        Raises :class:`~gossamer.core.errors.FormatError` for something else, and
        :class:`ArgumentError` for a state of another codec, seed, rank or number of ranks.
        """
        keys = ("codec", "seed", "step", "size", "rank", "errors")
        if state.get("format") != _FORMAT or any(key not in state for key in keys):
            raise FormatError("state is no GradientExchange.state_dict() of this version")
        for name, mine in (("codec", repr(self.plan.codec)), ("seed", self.plan.seed)):
            if state[name] != mine:
                raise ArgumentError(
                    f"the saved exchange has {name} {state[name]}, this one {mine}; make the "
                    "GradientExchange with the same"
                )
        size = None if resize else int(state["size"])
        group = self._group or Distributed(self._process_group, timeout=self.timeout)
        started = dist.is_available() and dist.is_initialized()
        self._size, before = size, self._size
        try:
            if started:
                self._fits(group.size)
            other = state["errors"] is None or (started and state["rank"] != group.rank)
            if self.errors is not None and not resize and other:
                raise ArgumentError(
                    f"errors of rank {group.rank} are fed back; the state is rank "
                    f"{state['rank']}'s{', without errors' if state['errors'] is None else ''}: "
                    "save and load one state a rank, or pass resize=True to start them at zero"
                )
        except ArgumentError:
            self._size = before
            raise
        self.step = int(state["step"])
        if self.errors is not None:
            self.errors.load_state_dict({} if resize else state["errors"])

    def close(self, error: BaseException | None = None) -> None:
        """End the worker thread; the next step would start another.

        Args:
            error: why this rank stops in the middle: the others end with it at once, rather than
                wait until the timeout.
        """
        if self._group is not None and error is not None:
            self._group.tell(error)
        if self._worker is not None:
            self._worker.close()
        self._worker = self._group = None

    def __enter__(self) -> "GradientExchange":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(error)


def _reduced(model: nn.Module) -> set[int]:
    """Ids of the parameters that take part, by DDP's own rule and in its own names."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    ignored = getattr(inner, "_ddp_params_and_buffers_to_ignore", ())
    return {
        id(p)
        for prefix, module in inner.named_modules()
        for name, p in module.named_parameters(recurse=False)
        if p.requires_grad and f"{prefix}.{name}" not in ignored
    }


def _dense(p: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in whatever order."""
    expected = 1
    for step, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size > 1:
            if step != expected:
                return False
            expected *= size
    return True


def exchange_hook(state: GradientExchange, bucket: dist.GradBucket) -> Future[Tensor]:
    """The same hook as a function: ``ddp.register_comm_hook(state, exchange_hook)``."""
    return GradientExchange.hook(state, bucket)
