"""The processes of a launcher, such as torchrun, training one network together."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from gossamer.core.errors import ArgumentError, ExchangeError, GossamerError
from gossamer.distribute.codecs.codec import GradCodec
from gossamer.distribute.ddp.hook import GradientExchange
from gossamer.distribute.exchange.average import Options, Plan
from gossamer.distribute.exchange.group import TIMEOUT, Distributed

__all__ = ["Processes"]

_TIMES = itertools.count()  # that this process has joined the others


class Processes:
    """The workers of :func:`gossamer.training.train`: DDP, with coded gradients.

    Args:
        codec: None: plain DDP, in floating point.
        timeout, options: of :class:`GradientExchange`.

    A process group must be there; :meth:`launched` makes one. A network whose parameters do not
    all take part in every step is refused by DDP.
    """

    def __init__(
        self,
        codec: GradCodec | Plan | None,
        *,
        timeout: float = TIMEOUT,
        **options: Unpack[Options],
    ) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.about = "float gradients"
        self._plan = None if codec is None else Plan.of(codec, **options)
        if self._plan is not None:
            plan = self._plan
            self.about = (
                f"{plan.codec!r} {plan.topology}, threshold={plan.threshold}, seed={plan.seed}"
            )
        self._timeout = timeout
        self._exchange: GradientExchange | None = None
        self._saved: Mapping[str, Any] | None = None

    @classmethod
    @contextlib.contextmanager
    def launched(
        cls, codec: GradCodec | Plan | None, *, timeout: float = TIMEOUT, **options: Unpack[Options]
    ) -> Iterator[Processes]:
        """Join the others that torchrun started; without a launcher there is one process.

        An error that leaves this context on one rank ends the others with an
        :class:`~gossamer.core.errors.ExchangeError` that names it.

        Raises :class:`ArgumentError` for a launcher that does not say where to meet.
        """
        limit = timedelta(seconds=timeout)
        if "WORLD_SIZE" not in os.environ:
            dist.init_process_group(
                "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=limit
            )
        else:
            missing = [k for k in ("RANK", "MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
            if missing:
                raise ArgumentError(
                    f"WORLD_SIZE is set but {', '.join(missing)} not; start with "
                    "torchrun --nproc-per-node 2 -m gossamer ..."
                )
            cuda = torch.cuda.is_available()
            if cuda:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            store, rank, size = next(rendezvous("env://", timeout=limit))
            # After a restart torchrun's store still holds the addresses of the processes before.
            life = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}.{next(_TIMES)}"
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=dist.PrefixStore(f"gossamer/{life}", store),
                rank=rank,
                world_size=size,
                timeout=limit,
            )
        workers = None
        try:
            workers = cls(codec, timeout=timeout, **options)
            yield workers
        except BaseException as error:
            if workers is not None:
                workers._abort(error)
            raise
        finally:
            if workers is not None:
                workers.close()
            dist.destroy_process_group()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The network in DDP, with the hook."""
        self.close()
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        if self._plan is not None:
            self._exchange = GradientExchange(model, self._plan, timeout=self._timeout)
            if self._saved is not None:
                self._exchange.load_state_dict(self._saved)
            ddp.register_comm_hook(self._exchange, GradientExchange.hook)
        return ddp

    def settle(self, model: nn.Module) -> None:
        """Give rank 0's buffers to all."""
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)

    def state_dict(self) -> dict[str, Any]:
        """The exchange's state, None before there is one."""
        return {"exchange": None if self._exchange is None else self._exchange.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state: at the next :meth:`wrap`."""
        self._saved = state["exchange"]

    def _abort(self, error: BaseException) -> None:
        """Tell the others, or raise what another told, whose end broke this one's collective."""
        roll = Distributed().roll
        broken = isinstance(error, RuntimeError) and not isinstance(error, GossamerError)
        if roll is not None and broken and (told := roll.look()) is not None:
            raise ExchangeError(f"{told}. Restart from the last checkpoint") from error
        if roll is not None and not isinstance(error, ExchangeError):
            roll.report(f"rank {self.rank} failed: {type(error).__name__}: {error}")
        if self._exchange is not None:
            self._exchange.close(error)

    def close(self) -> None:
        """End the exchange's thread."""
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None
