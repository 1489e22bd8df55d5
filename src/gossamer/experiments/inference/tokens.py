"""Tokens a second of a small transformer that generates, at batch 1, in one run with the engines.

The transformer of ``inference-few-bits`` (four layers of 256, 256 tokens; 12.6 MB, which a
third-level cache holds) and one of four layers of 768 (113 MB, which none does), with random
weights: a time depends on bits and zeros, not on values. A network is a step: one token in, logits
and the token's keys and values out. A context of 128 places is kept outside, each layer's keys and
values an input, so that the step is one network of fixed shapes for every engine; places not yet
filled are masked. One sequence is 128 tokens, each the likeliest after those before, the context
growing from none.

Dense in torch, ``torch.compile``, onnxruntime and OpenVINO (float32 and int8) and as plans;
ternary, and half the weights zero on a grid of 15 levels (4 bits), as plans (``gossamer``) and as
plans that may compute in integers (``gossamer-int8``). One thread; the least of that thread's own
seconds over rounds in which every engine generates one sequence. What keeps the context costs
every engine the same and counts. An int8 engine whose answers are refused as too far from torch's
is left out, and a note says so.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer import nets
from gossamer.core.errors import ArgumentError, GossamerError
from gossamer.core.timing import best_of, one_thread
from gossamer.experiments import Claim, Context, experiment
from gossamer.experiments.inference.few_bits import FORMS, fewer
from gossamer.runtime.compare import closeness
from gossamer.runtime.engines import ENGINES, Call, Subject, installed

__all__ = ["FORMS", "SIZES", "Generator", "Step", "engines", "measured", "tokens"]

SIZES = {"4 layers of 256": (256, 4, 128, 40), "4 layers of 768": (768, 4, 128, 15)}
"""Network -> width, layers, places of the context, rounds."""

PLANS = ("gossamer", "gossamer-int8")
DENSE = ("torch", "torch.compile", "onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8")
_HIDDEN = -1e4  # of a place that is not filled: nothing of it is left after softmax
_EXACT = 1e-3  # of the largest logit: what float32 engines may differ by


class Step(nn.Module):
    """One token through a :class:`gossamer.nets.transformer.GPT`, its context in and out."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, token: Tensor, place: Tensor, seen: Tensor, *context: Tensor) -> Any:
        """Logits (N, vocabulary), and each layer's new key and value, (N, heads, width of one).

        token, place: (N). seen: (N, 1, places), 0 where a place counts. context: each layer's
        keys (N, heads, width of one, places) and values (N, heads, places, width of one).
        """
        net = self.net
        x = net.embedding(token) + net.position(place)
        fresh: list[Tensor] = []
        for block, keys, values in zip(net.block, context[::2], context[1::2], strict=True):
            made = block.attention.packed(block.norm1(x))
            q, k, v = made.view(x.shape[0], 3, keys.shape[1], -1).unbind(1)
            q = q.unsqueeze(2) * keys.shape[2] ** -0.5
            before = (q @ keys).squeeze(2) + seen
            weight = torch.softmax(torch.cat([before, (q @ k.unsqueeze(3)).squeeze(3)], 2), 2)
            mixed = (weight[:, :, :-1].unsqueeze(2) @ values).squeeze(2) + weight[:, :, -1:] * v
            x = x + block.attention.output(mixed.flatten(1))
            wide = F.gelu(block.expand(block.norm2(x)), approximate="tanh")
            x = x + block.contract(wide)
            fresh += [k, v]
        return net.output(net.norm(x)), *fresh


class Generator:
    """Sequences from an engine's call, which reads the tensors that are written here.

    Args:
        call: of :attr:`gossamer.runtime.engines.Engine.prepare`.
        batch: the tensors it was prepared with, of :class:`Step`'s inputs.
    """

    def __init__(self, call: Call, batch: Sequence[Tensor]) -> None:
        self.call = call
        self.token, self.place, self.seen, *self.context = (t.numpy() for t in batch)

    def step(self, place: int, token: int) -> Sequence[Tensor]:
        """The call's outputs for a token at a place, whose keys and values are kept."""
        self.token[0], self.place[0] = token, place
        found = self.call.read(self.call.run())
        for i, new in enumerate(found[1:]):
            row = new.numpy()[0]
            if i % 2:
                self.context[i][0, :, place] = row
            else:
                self.context[i][0, :, :, place] = row
        self.seen[0, 0, place] = 0
        return found

    def start(self) -> None:
        """An empty context."""
        self.seen[:] = _HIDDEN

    def sequence(self) -> list[int]:
        """So many tokens as there are places, each the likeliest after those before; first 0."""
        self.start()
        made = [0]
        for place in range(self.seen.shape[-1] - 1):
            made.append(int(self.step(place, made[-1])[0].argmax()))
        return made

    def logits(self, given: Sequence[int]) -> Tensor:
        """(places, vocabulary) after each of the given tokens."""
        self.start()
        return torch.cat([self.step(i, token)[0].clone() for i, token in enumerate(given)])


def engines(form: str) -> list[str]:
    """What a form is run in."""
    return [e for e in ((*DENSE, *PLANS) if form == "dense" else PLANS) if installed(e)]


def _subject(form: str, width: int, layers: int, places: int) -> Subject:
    net = nets.build(
        "gpt", classes=256, width=width, layers=layers, heads=4, context=places, tied=False, seed=0
    )
    with torch.no_grad():
        for key, p in net.named_parameters():
            if p.ndim == 2 and "embedding" not in key and "position" not in key:
                p.copy_(fewer(p, form))
    step, head = Step(net).eval(), width // 4
    empty = [torch.zeros(1, 4, *((head, places), (places, head))[i % 2]) for i in range(2 * layers)]
    zero = torch.zeros(1, dtype=torch.int64)
    first = (zero, zero.clone(), torch.full((1, 1, places), _HIDDEN), *empty)
    # the example, and what calibrates int8: contexts as they grow in a random text
    eager, rows = Generator(Call(partial(step, *first), list), first), []
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for place in range(places):
            eager.step(place, int(torch.randint(256, (1,), generator=draw)))
            rows.append(tuple(t.clone() for t in first))
    return Subject(form, step, rows[places // 2], rows[:: max(1, places // 32)])


def measured(width: int, layers: int, places: int, rounds: int) -> dict[str, Any]:
    """Least seconds of a sequence of each form in each engine; and how near torch's its logits."""
    runs: dict[tuple[str, str], Generator] = {}
    near: dict[str, dict[str, str]] = {form: {} for form in FORMS}
    notes: list[str] = []
    with one_thread(), torch.no_grad():
        for form in FORMS:
            subject = _subject(form, width, layers, places)
            batch = subject.rows(1)
            eager = Generator(Call(partial(subject.flat, *batch), list), batch)
            text = eager.sequence()
            wanted = eager.logits(text)
            for engine in engines(form):
                batch = subject.rows(1)
                try:
                    call = ENGINES[engine].prepare(subject, batch, 1)
                except ArgumentError as e:
                    if ENGINES[engine].exact:
                        raise
                    notes.append(f"{form} in {engine}: {e}")
                    continue
                found = Generator(call, batch)
                check = closeness([wanted], [found.logits(text)], engine)
                if ENGINES[engine].exact and not check.relative <= _EXACT:
                    raise GossamerError(f"{form} in {engine} differs from torch: {check}")
                near[form][engine] = str(check)
                runs[form, engine] = found
            notes += subject.notes
        taken = best_of([g.sequence for g in runs.values()], rounds, clock=time.thread_time)
    seconds: dict[str, dict[str, float]] = {form: {} for form in FORMS}
    for (form, engine), least in zip(runs, taken, strict=True):
        seconds[form][engine] = least
    rate = {f: {e: (places - 1) / s for e, s in row.items()} for f, row in seconds.items()}
    return {"tokens_per_second": rate, "near": near, "notes": notes}


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    claims = []
    for size, found in raw["networks"].items():
        rate = found["tokens_per_second"]
        dense = {e: v for e, v in rate["dense"].items() if e not in PLANS}
        exact = max(v for e, v in dense.items() if not e.endswith("-int8"))
        for form, words in (("ternary", "ternary"), ("grid", "50 % sparse, 4 bits")):
            what = f"{size}, {words}: tokens a second over those of the best dense"
            plain, best = rate[form]["gossamer"], max(rate[form].values())
            every = best / max(dense.values())
            claims += [
                Claim("inference.tokens", f"{what} float32 engine", plain / exact, ">=", 1),
                Claim("inference.tokens", f"{what} engine, int8 too", every, ">=", 1),
            ]
    return claims


@experiment("inference-tokens", seeds=(0,), judge=_judge)
def tokens(context: Context) -> dict[str, Any]:
    """Tokens a second of a small transformer, dense, ternary and sparse in 4 bits."""
    sizes = {"1 layer of 64": (64, 1, 16, 2)} if context.quick else SIZES
    found = dict(zip(sizes, context.alone(measured, list(sizes.values())), strict=True))
    for name, row in found.items():
        for form, rate in row["tokens_per_second"].items():
            context.say(f"{name}, {form}: " + ", ".join(f"{e} {v:,.0f}" for e, v in rate.items()))
    return {"networks": found}
