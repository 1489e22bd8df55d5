"""Networks side by side in every engine: size, milliseconds, operations, and whether it paid.

All networks in all engines are timed in one run, one call of each in turn, in an order that turns
from round to round. A speed-up is the median over the rounds of the dense network's time over the
network's own **in the same engine**, with its 95 % interval.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gossamer.core import flops, machine
from gossamer.core.columns import columns
from gossamer.core.errors import ArgumentError
from gossamer.core.same import same_operations
from gossamer.core.timing import compared, interleaved
from gossamer.core.timing import threads as set_threads
from gossamer.runtime.compare import closeness
from gossamer.runtime.engines import ENGINES, Call, Subject, installed
from gossamer.runtime.quiet import quiet

__all__ = ["Bench", "Timing", "bench"]

_UNDISTURBED = 0.9  # of the wall clock is the process's own on an idle machine
_EXACT = 1e-3  # of the largest output: float32 engines beside torch
_COSINE = 0.9  # of eight bits, which are judged where they are made: what an engine may add


@dataclass(frozen=True)
class Timing:
    """One network in one engine.

    Attributes:
        network, engine, batch, threads: what ran.
        ms, least_ms: median and least milliseconds of a call.
        dense_ms: the dense network's median there; None for itself.
        ratio, interval: how many times as fast as the dense one, with 95 %; None where both do the
            same operations, or nothing was compared.
        rounds: how many.
    """

    network: str
    engine: str
    batch: int
    threads: int
    ms: float
    least_ms: float
    dense_ms: float | None
    ratio: float | None
    interval: tuple[float, float] | None
    rounds: int

    @property
    def verdict(self) -> str:
        """What the interval shows, in a word or two."""
        if self.dense_ms is None:
            return "dense"
        if self.ratio is None:
            return "same operations"
        if self.interval is None:
            return "too few rounds"
        low, high = self.interval
        return "faster" if low > 1 else "slower" if high < 1 else "no difference shown"


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        processor, torch_version: where.
        dense: the name of the network that the others are compared with.
        timings: a row a network, engine, batch and number of threads.
        sizes: network -> form -> bytes.
        macs: network -> multiply-accumulates of one example: dense, nonzero, live.
        notes: engines that are not there, or did not take a network, and why.
    """

    processor: str
    torch_version: str
    dense: str
    timings: tuple[Timing, ...]
    sizes: Mapping[str, Mapping[str, int]]
    macs: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values; JSON takes them."""
        return {
            **asdict(self),
            "timings": [{**asdict(t), "verdict": t.verdict} for t in self.timings],
            "verdicts": self.verdicts(),
        }

    def verdicts(self) -> list[str]:
        """A sentence for each network but the dense one and each batch and number of threads.

        Engines differ, so each network's fastest is set against the dense one's fastest too.
        """
        told = []
        for network in dict.fromkeys(t.network for t in self.timings if t.network != self.dense):
            for batch, threads in dict.fromkeys((t.batch, t.threads) for t in self.timings):
                here = [t for t in self.timings if (t.batch, t.threads) == (batch, threads)]
                own = [t for t in here if t.network == network]
                dense = [t for t in here if t.network == self.dense]
                if own and dense:
                    told.append(_verdict(network, own, dense, f"batch {batch}, {_count(threads)}"))
        return told

    def table(self) -> str:
        """Sizes, operations, timings and what came of it, as plain text."""
        sizes = [["network", "form", "bytes", "MACs", "nonzero", "live"]]
        for name, forms in self.sizes.items():
            counts = (
                [f"{self.macs[name][k]:,.0f}" for k in ("macs", "nonzero", "live")]
                if (name in self.macs)
                else ["-"] * 3
            )
            for form, size in forms.items():
                sizes.append([name, form, f"{size:,}", *counts])
        rows = [
            ["network", "engine", "batch", "threads", "ms", "least", "against dense", "95 %", ""]
        ]
        for t in self.timings:
            ends = "" if t.interval is None else f"{t.interval[0]:.2f} to {t.interval[1]:.2f}"
            ratio = "" if t.ratio is None else f"{t.ratio:.2f}x"
            rows.append(
                [t.network, t.engine, str(t.batch), str(t.threads), f"{t.ms:.3f}",
                 f"{t.least_ms:.3f}", ratio, ends, t.verdict]
            )  # fmt: skip
        return "\n".join(
            [
                f"{self.processor}, torch {self.torch_version}; medians, interleaved in one run",
                *columns(sizes, (0, 1)),
                "",
                *columns(rows, (0, 1, 8)),
                "",
                *self.verdicts(),
                *(f"note: {note}" for note in self.notes),
            ]
        )


def _count(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def _verdict(network: str, own: Sequence[Timing], dense: Sequence[Timing], where: str) -> str:
    best, base = min(own, key=lambda t: t.ms), min(dense, key=lambda t: t.ms)
    fastest = (
        f"{network}, {where}: {best.ms:.3f} ms at best ({best.engine}), "
        f"dense {base.ms:.3f} ms ({base.engine})"
    )
    faster = [t.engine for t in own if t.verdict == "faster"]
    if all(t.ratio is None for t in own):
        return f"{fastest}. No gain in any engine: it does the same operations as the dense one"
    if all(t.interval is None for t in own):
        return f"{fastest}. Too few rounds for a verdict: six at least"
    if not faster:
        return f"{fastest}. No gain that these timings show, in any engine"
    left = [
        f"{t.engine} {t.verdict}" for t in own if t.verdict in ("slower", "no difference shown")
    ]
    return f"{fastest}. Faster in {', '.join(faster)}" + (f"; {', '.join(left)}" if left else "")


def bench(
    subjects: Sequence[Subject],
    *,
    engines: Sequence[str] | None = None,
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    rounds: int = 100,
    seconds: float = 30.0,
    say: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Bench:
    """Measure networks in engines; the first subject is the dense one.

    Args:
        subjects: at least one, of different names.
        engines: names of :data:`ENGINES`; None: all whose packages are installed, but those that
            take minutes to prepare. One that is named and missing is an error; one that does not
            take a network is a note.
        batches: examples a call.
        threads: of each engine; torch's are as before afterwards.
        rounds: at most, for each batch and number of threads.
        seconds: after which no other round is begun, for each of them.
        say: told what is being done.

    Raises :class:`ArgumentError` for no or equal subjects, an unknown engine, one that is not
    installed, batches, threads or rounds below 1, and an engine whose outputs are not torch's.
    """
    chosen = _chosen(engines)
    if min((*batches, *threads, rounds), default=0) < 1 or not batches or not threads:
        raise ArgumentError(
            f"batches={list(batches)}, threads={list(threads)}, rounds={rounds} must hold numbers "
            "of at least 1"
        )
    names = [s.name for s in subjects]
    if not names or len(set(names)) != len(names):
        raise ArgumentError(f"networks {names}: give at least one, each by another name")
    notes = [
        f"{name} was left out: it takes minutes to prepare; name it"
        if installed(name)
        else f"{name} is not installed"
        for name in ENGINES
        if engines is None and name not in chosen
    ]
    timings: list[Timing] = []
    with torch.no_grad():
        for batch in batches:
            for count in threads:
                say(f"batch {batch}, {_count(count)}")
                calls = _prepared(subjects, chosen, batch, count, notes, say)
                with set_threads(count):
                    began = time.perf_counter(), time.process_time()
                    taken = interleaved(
                        [c.run for c in calls.values()],
                        rounds=rounds,
                        seconds=seconds,
                        clock=clock,
                    )
                spent = time.perf_counter() - began[0], time.process_time() - began[1]
                if count == 1 and clock is time.perf_counter and spent[1] < _UNDISTURBED * spent[0]:
                    notes.append(
                        f"others took {100 - 100 * spent[1] / spent[0]:.0f} % of the processor "
                        f"while batch {batch} was timed: repeat it on an idle machine"
                    )
                seen = dict(zip(calls, taken, strict=True))
                timings += _timings(subjects, seen, batch, count)
    sizes, macs = _sizes(subjects, timings), {}
    for subject in subjects:
        try:
            macs[subject.name] = flops.count(subject.flat.model, subject.example).totals()
        except ArgumentError as e:
            notes.append(f"operations of {subject.name} were not counted: {e}")
        notes += subject.notes
    return Bench(
        machine.cpu(), str(torch.__version__), names[0], tuple(timings), sizes, macs,
        tuple(dict.fromkeys(notes)),
    )  # fmt: skip


def _chosen(engines: Sequence[str] | None) -> list[str]:
    if engines is None:
        return [name for name, engine in ENGINES.items() if installed(name) and not engine.slow]
    for name in engines:
        if not installed(name):
            raise ArgumentError(
                f"engine {name!r} needs {', '.join(ENGINES[name].packages)}; pip install "
                f"'gossamer[{name.partition('-')[0].replace('onnxruntime', 'onnx')}]'"
            )
    return list(dict.fromkeys(engines))


def _prepared(
    subjects: Sequence[Subject],
    engines: Sequence[str],
    batch: int,
    threads: int,
    notes: list[str],
    say: Callable[[str], None],
) -> dict[tuple[str, str], Call]:
    calls: dict[tuple[str, str], Call] = {}
    for subject in subjects:
        rows = subject.rows(batch)
        for name in engines:
            say(f"  {subject.name} in {name}")
            try:
                with quiet():
                    call = ENGINES[name].prepare(subject, rows, threads)
                _check(subject, name, call, rows)
            except ArgumentError as e:
                notes.append(f"{subject.name} is not in {name}: {e}")
                continue
            calls[name, subject.name] = call
    if not calls:
        raise ArgumentError(f"no engine takes a network: {'; '.join(dict.fromkeys(notes))}")
    return dict(sorted(calls.items(), key=lambda c: engines.index(c[0][0])))


def _check(subject: Subject, name: str, call: Call, rows: Sequence[torch.Tensor]) -> None:
    """The engine gives what torch gives, as far as its precision goes."""
    try:
        wanted = subject.flat(*rows)
    except ArgumentError:  # a fixed-point network: compared step by step when it was made
        return
    found = closeness(wanted, call.read(call.run()), name)
    exact = ENGINES[name].exact
    if found.relative > _EXACT if exact else found.cosine < _COSINE:
        raise ArgumentError(f"it gives something else than torch: {found}")


def _timings(
    subjects: Sequence[Subject],
    seen: Mapping[tuple[str, str], Sequence[float]],
    batch: int,
    threads: int,
) -> list[Timing]:
    dense, made = subjects[0], []
    for (engine, network), times in seen.items():
        base, ratio, interval = seen.get((engine, dense.name)), None, None
        subject = next(s for s in subjects if s.name == network)
        if base is None or subject is dense:
            base = None
        elif not _same(dense, subject, engine):
            pair = compared(base, times)
            ratio, interval = pair.ratio, pair.interval
        middle = sorted(times)[len(times) // 2]
        made.append(
            Timing(
                network,
                engine,
                batch,
                threads,
                1e3 * middle,
                1e3 * min(times),
                None if base is None else 1e3 * sorted(base)[len(base) // 2],
                ratio,
                interval,
                len(times),
            )
        )
    return made


def _same(dense: Subject, subject: Subject, engine: str) -> bool:
    """Whether an engine does the same for both, so that a ratio would be noise."""
    if ENGINES[engine].values:
        return False
    try:
        return same_operations(dense.flat.model, subject.flat.model)
    except ArgumentError:  # a fixed-point network
        return False


def _sizes(subjects: Sequence[Subject], timings: Sequence[Timing]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for subject in subjects:
        forms = found.setdefault(subject.name, {})
        if subject.file_bytes is not None:
            forms["file"] = subject.file_bytes
        try:
            every = (*subject.flat.parameters(), *subject.flat.buffers())
            forms["float32 tensors"] = sum(t.numel() * t.element_size() for t in every)
        except ArgumentError:  # a fixed-point network
            pass
        for engine in dict.fromkeys(t.engine for t in timings if t.network == subject.name):
            if (size := ENGINES[engine].size) is not None:
                forms[engine] = size(subject)
    return found
