"""Loss-aware training on N workers: quantized gradients up, quantized weights down.

Hou, Zhang, Kwok, *Analysis of Quantized Models*, ICLR 2019, algorithm 1. In each step

1. every worker takes its gradient at the quantized weights and sends it in a few bits, Q_g(g);
2. the server averages: g = sum Q_g(g_n) / N;
3. v <- beta v + (1 - beta) g^2, from the averaged, quantized gradient; v starts at 0;
4. the latent weights, in full precision, step: w <- w - rate g / (sqrt(v) + eps);
5. the server quantizes them under the curvature d = sqrt(v) + eps and sends the values to all.

Which quantizers is the caller's choice: any codec of :mod:`gossamer.distribute` for the gradients
(the paper: SQm, clipped at c sigma), any function of weight and d for the weights (the paper: LAB,
LAQ; :mod:`gossamer.quantize.loss_aware`). The server is rank 0, a worker too; or one process
plays all N, with the same bits.

Deviations: Adam (``momentum``) corrects the bias of both moments, as its authors do. Gradients of
parameters that are not coded, and weights that are not projected, travel in floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gossamer.core.errors import ArgumentError, GossamerError
from gossamer.core.names import Tensors
from gossamer.distribute.codecs.codec import GradCodec
from gossamer.distribute.codecs.random import Key, parameter_hash
from gossamer.distribute.exchange.values import pack_values, unpack_values

__all__ = ["LossAwareLoop", "Rule"]

Projection = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """The server's step.

    Attributes:
        beta: of the second moment, in [0, 1).
        momentum: of the first, in [0, 1): Adam; None: RMSProp.
        eps: added to sqrt(v), more than 0; the paper 1e-8.
        clip: latent weights that are projected stay in [-clip, clip]; None: free.

    Raises :class:`ArgumentError` for values outside.
    """

    beta: float
    momentum: float | None
    eps: float
    clip: float | None

    def __post_init__(self) -> None:
        for name in ("beta", "momentum"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ArgumentError(f"{name}={value} is outside [0, 1)")
        if not self.eps > 0:
            raise ArgumentError(f"eps={self.eps} must be more than 0: v starts at 0")
        if self.clip is not None and not self.clip > 0:
            raise ArgumentError(f"clip={self.clip} must be more than 0, or None")


class LossAwareLoop:
    """The N workers and their server.

    Args:
        parameters: name -> start of the latent weights, float32; copied.
        codec: of the gradients; None: full precision.
        coded: names whose gradients are coded; the others travel as floats.
        projections: name -> quantizer of the weight, ``(weight, d) -> values``; the others stay
            in full precision.
        rule: the server's step.
        workers: how many, all in this process; or the process group whose rank 0 is the server.
        seed: of the codec's random numbers; every worker has a stream of its own.

    Attributes:
        weights: name -> what the workers compute with, the same on every rank.
        steps: done so far.
        sent: bytes of a worker's gradients, and of the server's weights to a worker, in the last
            step of a process group, headers left out.

    Raises :class:`ArgumentError` for names that are no parameters, tensors that are not float32,
    and fewer than one worker.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        codec: GradCodec | None,
        coded: Collection[str],
        projections: Mapping[str, Projection],
        rule: Rule,
        workers: int | dist.ProcessGroup,
        seed: int,
    ) -> None:
        unknown = [n for n in (*coded, *projections) if n not in parameters]
        if unknown:
            raise ArgumentError(f"{', '.join(unknown)}: no parameter; there are {[*parameters]}")
        odd = [n for n, p in parameters.items() if p.dtype != torch.float32]
        if odd:
            raise ArgumentError(f"{', '.join(odd)}: not float32; convert them")
        self._group = None if isinstance(workers, int) else workers
        self.workers = workers if isinstance(workers, int) else dist.get_world_size(workers)
        if self.workers < 1:
            raise ArgumentError(f"workers={workers} must be at least 1")
        self.rank = 0 if self._group is None else dist.get_rank(self._group)
        self.codec, self.coded, self.rule, self.seed = codec, frozenset(coded), rule, seed
        if codec is None:
            self.coded = frozenset()
        self._projections = dict(projections)
        self.steps = 0
        self.sent = (0, 0)
        self._latent = {n: p.detach().clone() for n, p in parameters.items()}
        self._second = {n: torch.zeros_like(p) for n, p in self._latent.items()}
        self._first = {n: torch.zeros_like(p) for n, p in self._latent.items()}
        self.weights: Tensors = self._projected()
        self._publish()

    @torch.no_grad()
    def step(self, gradients: Sequence[Mapping[str, Tensor]], rate: float) -> None:
        """One step at a learning rate; a process group takes this rank's gradients alone.

        Raises :class:`ArgumentError` for another number of workers, names or shapes, before
        anything is sent, and :class:`~gossamer.core.errors.GossamerError` on every rank for a
        gradient that is not finite, with the weights as they were.
        """
        here = self.workers if self._group is None else 1
        if len(gradients) != here:
            raise ArgumentError(f"gradients of {len(gradients)} workers; {here} are in here")
        for mine in gradients:
            shapes = {n: tuple(g.shape) for n, g in mine.items()}
            if shapes != {n: tuple(p.shape) for n, p in self._latent.items()}:
                raise ArgumentError(
                    f"gradients {shapes} do not fit the parameters in name or shape"
                )
        parts = [self._encode(mine, self.rank + i) for i, mine in enumerate(gradients)]
        everyone = self._gather(parts[0]) if self._group is not None else parts
        bad = ""
        if self.rank == 0:
            mean = {n: self._mean(n, [p[n] for p in everyone]) for n in self._latent}
            bad = next((n for n, g in mean.items() if not bool(g.isfinite().all())), "")
            if not bad:
                self._move(mean, rate)
                self.weights = self._projected()
        self._publish(bad)
        self.steps += 1

    def _encode(self, gradients: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        """Name -> float32 scale and payload as bytes, or the floats as bytes."""
        parts = {}
        for name in self._latent:
            g = gradients[name].detach().float().contiguous()
            if self.codec is None or name not in self.coded:
                parts[name] = g.reshape(-1).view(torch.uint8)
                continue
            scale = self.codec.scale(g)
            key = Key(self.seed, self.steps, rank, parameter_hash(name))
            payload = self.codec.encode(g, scale, key)
            parts[name] = torch.cat([scale.reshape(1).view(torch.uint8), payload])
        return parts

    def _mean(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        out = torch.empty_like(self._latent[name])
        if self.codec is None or name not in self.coded:
            total = torch.zeros_like(out).reshape(-1)
            for part in parts:
                total += part.view(torch.float32)
            return out.copy_((total * torch.tensor(1 / self.workers)).view_as(out))
        scales = torch.cat([p[:4] for p in parts]).view(torch.float32)
        self.codec.decode_mean([p[4:] for p in parts], scales, out, self.workers)
        return out

    def _move(self, mean: Tensors, rate: float) -> None:
        beta, first, turn = self.rule.beta, self.rule.momentum, self.steps + 1
        for name, g in mean.items():
            w, v, m = self._latent[name], self._second[name], self._first[name]
            v.mul_(beta).addcmul_(g, g, value=1 - beta)
            if first is None:
                w.addcdiv_(g, v.sqrt().add_(self.rule.eps), value=-rate)
            else:
                m.mul_(first).add_(g, alpha=1 - first)
                root = (v / (1 - beta**turn)).sqrt_().add_(self.rule.eps)
                w.addcdiv_(m, root, value=-rate / (1 - first**turn))
            if self.rule.clip is not None and name in self._projections:
                w.clamp_(-self.rule.clip, self.rule.clip)

    def _projected(self) -> Tensors:
        found = {}
        for name, w in self._latent.items():
            project = self._projections.get(name)
            d = self._second[name].sqrt().add_(self.rule.eps)
            found[name] = w.clone() if project is None else project(w, d).detach().clone()
        return found

    def _gather(self, parts: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Every rank's parts at rank 0; they are as long on all."""
        sizes = [p.numel() for p in parts.values()]
        mine = torch.cat(list(parts.values()))
        self.sent = (mine.numel(), self.sent[1])
        rows = [torch.empty_like(mine) for _ in range(self.workers if self.rank == 0 else 0)]
        root = dist.get_global_rank(self._group, 0) if self._group is not None else 0
        dist.gather(mine, rows if self.rank == 0 else None, dst=root, group=self._group)
        # own memory for each: floats and scales are read where they are aligned
        return [
            {n: part.clone() for n, part in zip(parts, row.split(sizes), strict=True)}
            for row in rows
        ]

    def _publish(self, bad: str = "") -> None:
        """The weights, or what was wrong, from rank 0 to all."""
        if self._group is not None:
            packed = pack_values(self.weights) if not bad else torch.tensor([*bad.encode()]).byte()
            length = torch.tensor([packed.numel(), int(bool(bad))])
            root = dist.get_global_rank(self._group, 0)
            dist.broadcast(length, root, group=self._group)
            if self.rank:
                packed = torch.empty(int(length[0]), dtype=torch.uint8)
            dist.broadcast(packed, root, group=self._group)
            if length[1]:
                bad = bytes(packed.tolist()).decode()
            else:
                self.weights = unpack_values(packed, {n: p.shape for n, p in self._latent.items()})
                self.sent = (self.sent[0], packed.numel())
        if bad:
            raise GossamerError(
                f"step {self.steps}: the averaged gradient of {bad} is not finite; lower the "
                "learning rate, and check the inputs for NaN"
            )

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, as tensors and plain values; rank 0's holds for all."""
        return {
            "steps": self.steps,
            **{
                key: {n: t.clone() for n, t in held.items()} for key, held in self._states().items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` of rank 0 returned, on every rank."""
        self.steps = int(state["steps"])
        for key, held in self._states().items():
            for name, tensor in held.items():
                tensor.copy_(state[key][name])

    def _states(self) -> dict[str, Tensors]:
        return {
            "latent": self._latent,
            "first": self._first,
            "second": self._second,
            "weights": self.weights,
        }
