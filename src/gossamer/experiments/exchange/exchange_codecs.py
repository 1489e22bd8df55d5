"""The exchange's codecs: speed against the memory's own, and equal bits from every back end."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gossamer.core.timing import best_of
from gossamer.distribute import QSGD, DoReFa, SignSGD, SQm, TernGrad, backend
from gossamer.distribute.codecs.backends import statistics
from gossamer.distribute.codecs.codec import GradCodec
from gossamer.distribute.codecs.random import Key
from gossamer.distribute.wire.planes import Form
from gossamer.experiments import Claim, Context, experiment

__all__ = ["codecs", "speed"]

PAGE = "exchange"
ALEXNET = 61_100_840


def speed(codec: GradCodec, elements: int, rounds: int, seed: int) -> dict[str, float]:
    """GB/s of one core: reading, the statistics pass, encoding, decoding one and two payloads.

    Bytes are those read and written: four an element and the payload's. Reading is the faster of
    torch's sum and the statistics pass, in the same rounds. Time is the thread's on the processor,
    so that other programs of the machine count only by what they take from the memory.
    """
    g = torch.randn(elements, generator=torch.Generator().manual_seed(seed))
    scale, key, out = codec.scale(g), Key(seed, 0, 0, 1), torch.zeros(elements)
    room = {
        f: torch.zeros(codec.payload_bytes(elements, f), dtype=torch.uint8) for f in codec.forms
    }
    payload = {f: codec.encode(g, scale, key, form=f, out=room[f]).clone() for f in codec.forms}
    jobs: dict[str, tuple[Callable[[], Any], int]] = {
        "sum": (g.sum, 4 * elements),
        "statistics": (lambda: statistics(g), 4 * elements),
        "copy": (lambda: out.copy_(g), 8 * elements),
    }
    for form in codec.forms:
        p = payload[form]

        def encode(form: Any = form) -> Tensor:
            return codec.encode(g, scale, key, form=form, out=room[form])

        def decode(form: Any = form, payloads: tuple[Tensor, ...] = (p,)) -> None:
            codec.decode_mean(payloads, [scale] * len(payloads), out, 1, forms=form)

        def decode_two(form: Any = form, p: Tensor = p) -> None:
            codec.decode_mean([p, p], [scale, scale], out, 2, forms=form)

        jobs[f"encode {form}"] = encode, 4 * elements + p.numel()
        jobs[f"decode {form}"] = decode, 4 * elements + p.numel()
        jobs[f"decode two {form}"] = decode_two, 4 * elements + 2 * p.numel()
    seconds = best_of([job for job, _ in jobs.values()], rounds, clock=time.thread_time)
    rates = {
        name: size / s / 1e9 for (name, (_, size)), s in zip(jobs.items(), seconds, strict=True)
    }
    return {"read": max(rates["sum"], rates["statistics"]), **rates}


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _digest(codec: GradCodec, grads: list[Tensor]) -> str:
    """One hash of everything a back end computes from some gradients."""
    found: list[Tensor] = []
    for g in grads:
        scale, n = codec.scale(g), g.numel()
        found += [scale, *statistics(g)]
        for form in codec.forms:
            pays = [codec.encode(g, scale, Key(1, step, 2, 3), form=form) for step in range(3)]
            out = torch.empty(n)
            codec.decode_mean(pays, [scale, 0.3, 2.0], out, 3, forms=form)
            found += [*pays, out]
            if codec.sums:
                bits, mean = codec.sum_bits(3), torch.empty(n)
                packings: tuple[Form, ...] = ("planes", "sparse")
                for packing in packings:
                    sums = codec.sum_codes(pays, n, forms=form)
                    packed = codec.pack_sums(sums, bits, form=packing)
                    codec.decode_sums(packed, scale, n, bits, 3, mean, form=packing)
                    found += [packed, mean.clone()]
    digest = hashlib.blake2b()
    for tensor in found:
        digest.update(tensor.reshape(-1).numpy().tobytes())
    return digest.hexdigest()


def parity(elements: int, seed: int) -> dict[str, dict[str, int]]:
    """For each codec how many ways give other bits than plain torch does."""
    gen = torch.Generator().manual_seed(seed)
    grads = [torch.randn(n, generator=gen) for n in (1, 7, 65, 4097, elements)]
    grads += [g * torch.exp2(-40 * torch.rand(len(g), generator=gen)) for g in grads[2:]]
    ways = [
        ({"GOSSAMER_NATIVE": "1", "GOSSAMER_ISA": isa}, threads)
        for isa in ("scalar", "avx2", "avx512")
        for threads in (1, 2, 3)
    ]
    table: dict[str, dict[str, int]] = {}
    codecs = (TernGrad(), SQm(3), SQm(8, clip=3.0), QSGD(5), SignSGD("mean"), DoReFa(2))
    before = torch.get_num_threads()
    for codec in codecs:
        with _environment({"GOSSAMER_NATIVE": "0"}):
            oracle = _digest(codec, grads)
        differ = 0
        for environment, threads in ways:
            with _environment(environment):
                torch.set_num_threads(threads)
                try:
                    differ += _digest(codec, grads) != oracle
                finally:
                    torch.set_num_threads(before)
        table[codec.name] = {"ways": len(ways), "other_bits": differ}
    return table


def _judge(raw: Mapping[str, Any]) -> list[Claim]:
    """Every codec, form and size that was measured, those that fit a cache too."""
    claims = []
    for codec, key in (("ternary", "gigabytes_per_second"), ("SQ4", "sq4_gigabytes_per_second")):
        rows, sizes = list(raw[key].values()), ", ".join(f"{int(n):,}" for n in raw[key])
        for name in (n for n in rows[0] if n.startswith(("encode", "decode"))):
            what = f"{codec}, {name}: least part of reading's GB/s at {sizes} elements"
            least = min(row[name] / row["read"] for row in rows)
            claims.append(Claim(f"{PAGE}.5", what, least, ">=", 0.7))
    ways = sum(row["ways"] for row in raw["parity"].values())
    what = f"compiled codecs, instruction sets and threads: other bits than torch, of {ways}"
    other = sum(row["other_bits"] for row in raw["parity"].values())
    return [*claims, Claim(f"{PAGE}.7", what, other, "==", 0)]


@experiment("exchange-codecs", seeds=(0,), judge=_judge)
def codecs(context: Context) -> dict[str, Any]:
    """The exchange's codecs: one core's speed against reading memory, equal bits everywhere."""
    seed = context.seeds[0]
    if context.quick:
        sizes, rounds, large = [100_000], 2, 300_000
    else:
        sizes, rounds, large = [1 << 20, 1 << 24, 1 << 25, ALEXNET], 25, 1_000_000
    found = context.alone(speed, [(TernGrad(), n, rounds, seed) for n in sizes])
    rates = {str(n): row for n, row in zip(sizes, found, strict=True)}
    (finer,) = context.alone(speed, [(SQm(4), sizes[-1], max(2, rounds // 3), seed)])
    for n, row in rates.items():
        context.say(f"{n}: read {row['read']:.1f} GB/s, " + ", ".join(
            f"{k} {v / row['read']:.2f}" for k, v in row.items() if "code" in k))  # fmt: skip
    (table,) = context.map(parity, [(large, seed)])
    return {
        "gigabytes_per_second": rates,
        "sq4_gigabytes_per_second": {str(sizes[-1]): finer},
        "parity": table,
        "backend": backend(torch.zeros(1)),
        "threads": 1,
    }
