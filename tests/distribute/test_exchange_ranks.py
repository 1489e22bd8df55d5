"""Several processes against the simulation in one: bit for bit, in all that DDP can do.

The file runs itself as a script that forks two, three, four and five processes one after the
other; each writes what went wrong, and the tests read that.
"""

import datetime
import importlib
import json
import multiprocessing
import sys
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP

from gossamer.core.errors import ArgumentError, ExchangeError, GossamerError
from gossamer.distribute import (
    Distributed,
    ErrorFeedback,
    GradientExchange,
    SignSGD,
    by_name,
    exchange,
    exchange_hook,
    simulate,
)
from gossamer.distribute.codecs.qsgd import QSGD
from gossamer.distribute.codecs.terngrad import TernGrad
from gossamer.distribute.exchange import faults
from gossamer.distribute.wire.message import Writer
from launched import run

CODECS = {
    "terngrad": by_name("terngrad"),
    "sq4": by_name("sq4"),
    "qsgd": by_name("qsgd-4"),
    "qsgd-buckets": QSGD(4, bucket=64),
    "signsgd": SignSGD("mean"),
    "dorefa": by_name("dorefa-2"),
}
WAYS = {
    "all_gather": {"topology": "all_gather"},
    "all_gather, shared": {"topology": "all_gather", "shared_scale": True},
    "two_phase": {"topology": "two_phase"},
    "server": {"topology": "server"},
    "auto": {"topology": "auto"},
    "shifted": {"topology": "auto", "dither": "shifted"},
    "excluded": {"topology": "two_phase", "exclude": "conv.*", "threshold": 0},
    "again": {"topology": "two_phase", "requantize": True},
}


def gradients(rank, step=0):
    g = torch.Generator().manual_seed(1000 * step + rank)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    return {
        "conv.weight": normal(5, 3, 3, 3).to(memory_format=torch.channels_last),
        "conv.bias": normal(5),
        "fc.weight": normal(70, 47) * (rank + 1),
        "half": normal(1100).bfloat16(),
        "other": normal(33, 41).half(),
        "double": normal(9).double() / 3,
        "empty": torch.zeros(0, 4),
        "scalar": normal(),
        "still": torch.zeros(2000),
    }


def bits(t):
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.contiguous().view(whole[t.element_size()]) if t.ndim else t.reshape(1).view(torch.int8)


def same(a, b):
    return list(a) == list(b) and all(torch.equal(bits(a[n]), bits(b[n])) for n in a)


def check_codecs(rank, size, group):
    """Every codec by every topology."""
    wrong = []
    for name, codec in CODECS.items():
        for way, options in WAYS.items():
            if options.get("requantize") and not codec.unbiased:
                continue
            if not codec.sums and options["topology"] in ("two_phase", "server"):
                continue
            own = gradients(rank)
            exchange(own, codec, group, step=7, seed=3, **options)
            every = [gradients(r) for r in range(size)]
            if not same(own, simulate(every, codec, step=7, seed=3, **options)):
                wrong.append(f"{name} {way}")
    return wrong


def check_feedback(rank, size, group):
    """Errors of several steps."""
    wrong = []
    for way in ("all_gather", "two_phase"):
        mine, all_ = ErrorFeedback(), [ErrorFeedback() for _ in range(size)]
        for step in range(3):
            own = gradients(rank, step)
            codec = CODECS["signsgd"]
            exchange(own, codec, group, step=step, topology=way, feedback=mine)
            every = [gradients(r, step) for r in range(size)]
            expected = simulate(every, codec, step=step, topology=way, feedback=all_)
            if not same(own, expected) or not same(mine.errors, all_[rank].errors):
                wrong.append(f"{way} step {step}")
    return wrong


def check_not_finite(rank, size, group):
    """NaN and infinity arrive as NaN everywhere, in the tensor they are of and in no other."""
    wrong = []
    for way in ("all_gather", "two_phase", "server"):
        for bad in (float("nan"), float("inf"), -float("inf")):
            own = gradients(rank)
            if rank == size - 1:
                own["fc.weight"][3, 4] = bad
                own["conv.bias"][1] = bad
            exchange(own, CODECS["sq4"], group, step=0, topology=way)
            finite = {n: bool(t.isfinite().all()) for n, t in own.items()}
            if any(ok == (n in ("fc.weight", "conv.bias")) for n, ok in finite.items()):
                wrong.append(f"{way} {bad}: {finite}")
            elif not bool(own["fc.weight"].isnan().all()):
                wrong.append(f"{way} {bad} is not NaN everywhere")
    return wrong


def check_layouts(rank, size, group):
    """Ranks that do not fit say what differs and on whom, all of them, and can go on afterwards."""
    wrong = []
    rest = "rank 0" if size == 2 else f"ranks 0, {', '.join(map(str, range(2, size)))}"

    def values(plain, other):
        return f"is {plain} on {rest} and {other} on rank 1"

    def compare(what, told, attempt):
        try:
            attempt()
            wrong.append(f"{what} {told}: went unseen")
        except ExchangeError as e:
            if f": {told}. " not in str(e):
                wrong.append(f"{what} {told}: {e}")

    cases = {
        f"'fc 70x47 float32 coded' on {rest} and 'fc 71x47 float32 coded' on rank 1": {
            "gradients": lambda: {"fc": torch.ones(70 + (rank == 1), 47)}
        },
        f"'a 2000 float32 coded' on {rest} and 'b 2000 float32 coded' on rank 1": {
            "gradients": lambda: {"b" if rank == 1 else "a": torch.ones(2000)}
        },
        f"nothing on {rest} and 'more 3 float32 exact' on rank 1": {
            "gradients": lambda: {
                "a": torch.ones(9),
                **({"more": torch.ones(3)} if rank == 1 else {}),
            }
        },
        f"5 on {rest} and 6 on rank 1": {"step": 5 + (rank == 1)},
    }
    for told, options in cases.items():
        own = options.pop("gradients", lambda: gradients(rank))()
        before = {n: t.clone() for n, t in own.items()}
        call = {"step": 0, **options}
        compare("loop", told, lambda own=own, call=call: exchange(own, CODECS["terngrad"], **call))
        if not same(own, before):
            wrong.append(f"loop, {told}: changed")

    plain, one = {"topology": "all_gather", "threshold": 0}, rank == 1
    differ = {  # what differs on rank 1, as it is told: each alone
        f"codec {values(TernGrad(), TernGrad(clip=3.0))}": {"codec": TernGrad(clip=3.0)},
        f"codec {values(TernGrad(), by_name('sq4'))}": {"codec": by_name("sq4")},
        f"shared_scale {values(False, True)}": {"shared_scale": True},
        f"dither {values('independent', 'shifted')}": {"dither": "shifted"},
        f"threshold {values(0, 48)}": {"threshold": 48},
        f"seed {values(0, 4)}": {"seed": 4},
        f"feedback {values(False, True)}": {"feedback": True},
        f"checksum {values(False, True)}": {"checksum": True},
        f"exclude {values(None, '0.bias, 0.weight')}": {"exclude": "0.*"},
        f"topology {values('all_gather', 'two_phase')}; shared_scale {values(False, True)}": {
            "topology": "two_phase"
        },
        f"topology {values('all_gather', 'server')}; shared_scale {values(False, True)}; "
        f"requantize {values(False, True)}": {"topology": "server", "requantize": True},
    }
    for told, options in differ.items():
        chosen = {"codec": TernGrad(), **plain, **(options if one else {})}
        ddp, state = wrapped(chosen.pop("codec"), group, **chosen)
        compare("DDP", told, lambda ddp=ddp: backward(ddp, rank, 0))
        state.close()
        own = local(network(), rank, 0)
        before = {n: t.clone() for n, t in own.items()}
        call = {"codec": TernGrad(), **plain, **(options if one else {}), "step": 0}
        if call.pop("feedback", False):
            call["feedback"] = ErrorFeedback()
        compare("loop", told, lambda own=own, call=call: exchange(own, group=group, **call))
        if not same(own, before):
            wrong.append(f"loop, {told}: changed")
    return wrong


def check_left_out(rank, size, group):
    """What DDP does not average may differ: frozen parameters, and those it was told to ignore."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(48, 48)
            self.frozen = nn.ParameterList(torch.ones(3 + rank) for _ in range(2 + rank))
            self.frozen.requires_grad_(False)
            self.own = nn.Linear(10 + rank, 48)

        def forward(self, x):
            return self.fc(x) + 0 * self.own.weight.sum()

    model = Net()
    # frozen ones too, as DDP sends rank 0's to all others
    DDP._set_params_and_buffers_to_ignore_for_model(
        model, ["own.weight", "own.bias", *(f"frozen.{i}" for i in range(2 + rank))]
    )
    codec = CODECS["terngrad"]
    ddp, state = wrapped(codec, group, model, threshold=0, exclude=["own.*", "frozen.*"])
    every = []
    for r in range(size):
        model.zero_grad()
        model(batch(r, 0)[0]).square().mean().backward()
        every.append({n: p.grad.clone() for n, p in model.fc.named_parameters("fc")})
    model.zero_grad()
    ddp(batch(rank, 0)[0]).square().mean().backward()
    state.close()
    found = {n: p.grad for n, p in model.fc.named_parameters("fc")}
    return [] if same(found, simulate(every, codec, step=0, threshold=0)) else ["differs"]


def check_collectives(rank, size, group):
    """A loop's exchange has no collective but those that announce and send its messages."""
    wrong = []
    for way, expected in (
        ("all_gather", ["_all_gather"] * 2),  # lengths, codes
        # agreement, scales, lengths, codes, lengths of sums, sums
        ("two_phase", ["_all_gather", "all_reduce", "_all_gather", "all_to_all_single",
                       "_all_gather", "_all_gather"]),
    ):  # fmt: skip
        where, seen = Distributed(group, timeout=300), []
        begin = where._flying

        def flying(call, answer, seen=seen, begin=begin):
            seen.append(call.func.__name__)
            return begin(call, answer)

        where._flying = flying
        exchange({"w": torch.ones(3000)}, TernGrad(), where, step=0, topology=way)
        if len(seen) != len(expected):
            wrong.append(f"{way}: {seen}")
    return wrong


def check_damage(rank, size, group):
    """A changed bit of a message ends the others with an error that names the sender."""
    wrong = []
    for way in ("all_gather", "two_phase", "server"):
        ddp, state = wrapped(CODECS["terngrad"], group, topology=way, checksum=True)
        backward(ddp, rank, 0)
        finish = Writer.finish
        if rank == size - 1:

            def damaged(self, *args, finish=finish, **options):
                message = finish(self, *args, **options)
                message[-1] ^= 4
                return message

            Writer.finish = damaged
        try:
            backward(ddp, rank, 1)
            wrong.append(f"{way}: went unseen")
        except ExchangeError as e:
            if (
                rank < size - 1
                and f"the message of rank {size - 1} is damaged: a message with checksum"
                not in str(e)
            ):
                wrong.append(f"{way}: {e}")
        finally:
            Writer.finish = finish
        state.close()
    return wrong


def check_formats(rank, size, group):
    """Parameters in other memory formats give the bits of the simulation, in DDP and in a loop."""
    wrong = []

    def images(memory_format):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(16, 6)).to(memory_format=memory_format)

    def go(model, r, step):
        model.zero_grad()
        g = torch.Generator().manual_seed(10 * step + r)
        model(torch.randn(2, 3, 6, 6, generator=g)).square().mean().backward()
        module = getattr(model, "module", model)
        return {n: p.grad.clone() for n, p in module.named_parameters()}

    for views in (False, True):
        model = images(torch.channels_last)
        with torch.no_grad():  # neither format
            model[0].weight = nn.Parameter(model[0].weight.permute(1, 0, 3, 2).contiguous()
                                           .permute(1, 0, 3, 2))  # fmt: skip
        state = GradientExchange(model, CODECS["terngrad"], process_group=group, threshold=0)
        ddp = DDP(model, process_group=group, bucket_cap_mb=0.0002, gradient_as_bucket_view=views)
        ddp.register_comm_hook(state, state.hook)
        plain = images(torch.contiguous_format)
        for step in range(3):
            found = go(ddp, rank, step)
            every = [go(plain, r, step) for r in range(size)]
            loop = go(model, rank, step) if not views else None
            expected = simulate(every, CODECS["terngrad"], step=step, threshold=0)
            close = all(torch.allclose(found[n], expected[n], atol=1e-5) for n in expected)
            own = [go(ddp.module, r, step) for r in range(size)] if not views else every
            exact = simulate(own, CODECS["terngrad"], step=step, threshold=0)
            if not (close if views else same(found, exact)):
                wrong.append(f"views {views}, step {step}")
            if loop is not None:
                exchange(loop, CODECS["terngrad"], group, step=step, threshold=0)
                if not same(loop, exact):
                    wrong.append(f"loop, step {step}")
        state.close()
    return wrong


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(48, 48), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(48, 10)).to(dtype)


def batch(rank, step):
    g = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 48, generator=g), torch.randint(10, (8,), generator=g)


def local(model, rank, step):
    """One rank's own gradients."""
    model.zero_grad()
    x, y = batch(rank, step)
    dtype = next(model.parameters()).dtype
    cross_entropy(model(x.to(dtype)), y).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def wrapped(codec, group, model=None, hook=GradientExchange.hook, **options):
    model = network() if model is None else model
    ddp_options = {"bucket_cap_mb": 0.01, "find_unused_parameters": options.pop("unused", False)}
    state = GradientExchange(model, codec, process_group=group, timeout=300, **options)
    ddp = DDP(model, process_group=group, **ddp_options)
    ddp.register_comm_hook(state, hook)
    return ddp, state


def backward(ddp, rank, step):
    ddp.zero_grad()
    x, y = batch(rank, step)
    dtype = next(ddp.parameters()).dtype
    cross_entropy(ddp(x.to(dtype)), y).backward()
    return {n: p.grad.clone() for n, p in ddp.module.named_parameters()}


def check_ddp(rank, size, group):
    """Hooked buckets, before and after they are rebuilt, against the simulation."""
    wrong = []
    cases = {
        "terngrad": {},
        "sq4": {"topology": "two_phase", "dither": "shifted", "seed": 9},
        "dorefa": {"topology": "server", "exclude": "12"},
        "signsgd": {"feedback": True, "topology": "all_gather", "dtype": torch.bfloat16},
    }
    for name, options in cases.items():
        dtype = options.pop("dtype", torch.float32)
        hook = exchange_hook if name == "sq4" else GradientExchange.hook
        ddp, state = wrapped(CODECS[name], group, network(dtype), hook, **options)
        plain = network(dtype)
        errors = [ErrorFeedback() for _ in range(size)] if options.pop("feedback", False) else None
        for step in range(3):
            found = backward(ddp, rank, step)
            every = [local(plain, r, step) for r in range(size)]
            expected = simulate(every, CODECS[name], step=step, feedback=errors, **options)
            if not same(found, expected):
                wrong.append(f"{name} step {step}")
        if dtype == torch.float32 and len(state._layouts) < 4:
            wrong.append(f"{name}: {len(state._layouts)} layouts, so no buckets were rebuilt")
        state.close()
    return wrong


def check_replay(rank, size, group):
    """From a saved state on, in new buckets."""
    wrong = []
    for feedback in (False, True):
        options = {"feedback": feedback, "seed": 5}
        ddp, state = wrapped(CODECS["terngrad"], group, **options)
        backward(ddp, rank, 0)
        backward(ddp, rank, 1)
        saved = state.state_dict()
        expected = [backward(ddp, rank, step) for step in (2, 3)]
        state.close()
        ddp, state = wrapped(CODECS["terngrad"], group, **options)
        state.load_state_dict(saved)
        found = [backward(ddp, rank, step) for step in (2, 3)]
        wrong += [f"step {i + 2}" for i in range(2) if not same(found[i], expected[i])]
        for bad, words in (
            ({**saved, "size": 8}, f"of 8 ranks, this run has {size}"),
            ({**saved, "seed": 6}, "seed 6"),
            ({**saved, "codec": "x"}, "codec x"),
        ):
            try:
                state.load_state_dict(bad)
                wrong.append(f"{words} was taken")
            except ArgumentError as e:
                if words not in str(e) or state.step != 4:
                    wrong.append(str(e))
        state.load_state_dict({**saved, "size": 8}, resize=True)
        backward(ddp, rank, 2)
        state.close()
    return wrong


class Branches(nn.Module):
    """Leaves parameters unused, differently by rank."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.common = nn.Linear(48, 48)
        self.arms = nn.ModuleList(nn.Linear(48, 10) for _ in range(3))
        self.nothing = nn.Parameter(torch.zeros(0))

    def forward(self, x, arm):
        return self.arms[arm](torch.relu(self.common(x)))


def check_usage(rank, size, group):
    """Unused parameters, no_sync with accumulation, join: as plain DDP, within the codec's error.

    SQ8 without clipping is within scale / 127 of each gradient.
    """
    wrong = []
    codec = by_name("sq8")

    def compare(what, run):
        plain = run(lambda model, **o: DDP(model, process_group=group, **o))

        def hooked(model, **o):
            ddp = DDP(model, process_group=group, bucket_cap_mb=0.01, **o)
            state = GradientExchange(model, codec, process_group=group, threshold=100, timeout=300)
            ddp.register_comm_hook(state, GradientExchange.hook)
            return ddp

        found = run(hooked)
        for name, grad in plain.items():
            other = found[name]
            if (grad is None) != (other is None):
                wrong.append(f"{what}: {name} is None in one of the two")
            elif grad is not None and grad.numel():
                error = float((grad - other).abs().max())
                if not error <= size * float(grad.abs().max()) / 127 + 1e-7:
                    wrong.append(f"{what}: {name} is {error} off")

    def unused(wrap):
        ddp = wrap(Branches(), find_unused_parameters=True)
        for step in range(3):
            x, y = batch(rank, step)
            ddp.zero_grad()
            cross_entropy(ddp(x, rank % 2), y).backward()
        return {n: p.grad for n, p in ddp.module.named_parameters()}

    def accumulated(wrap):
        ddp = wrap(network())
        for step in range(2):
            ddp.zero_grad()
            x, y = batch(rank, step)
            with ddp.no_sync():
                cross_entropy(ddp(x), y).backward()
            cross_entropy(ddp(x.neg()), y).backward()
        return {n: p.grad for n, p in ddp.module.named_parameters()}

    def joined(wrap):
        ddp = wrap(network())
        last = {}
        with ddp.join():
            for step in range(2 + (rank == 0)):
                ddp.zero_grad()
                x, y = batch(rank, step)
                cross_entropy(ddp(x), y).backward()
                last = {n: p.grad.clone() for n, p in ddp.module.named_parameters()}
        return last if rank == 0 else {}

    compare("unused", unused)
    compare("accumulated", accumulated)
    compare("joined", joined)
    return wrong


def check_scaler(rank, size, group):
    """A GradScaler on every rank skips the step in which one rank overflows."""
    ddp, state = wrapped(CODECS["terngrad"], group)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    scales = []
    for step in range(3):
        before = ddp.module[0].weight.detach().clone()
        optimizer.zero_grad()
        x, y = batch(rank, step)
        loss = cross_entropy(ddp(x), y)
        if step == 1 and rank == size - 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append((scaler.get_scale(), torch.equal(before, ddp.module[0].weight)))
    state.close()
    expected = [(1024.0, False), (512.0, True), (512.0, False)]
    return [] if scales == expected else [f"scale and stillness: {scales}"]


def check_sparse(rank, size, group):
    """A sparse gradient is refused by name of the remedy, in a loop and in DDP."""
    wrong = []
    emb = nn.Embedding(100, 20, sparse=True)
    emb(torch.tensor([1, 2])).sum().backward()
    ddp, state = wrapped(CODECS["terngrad"], group, nn.Embedding(100, 20, sparse=True))
    for what, attempt in (
        ("loop", lambda: exchange(emb, CODECS["terngrad"], group, step=0)),
        ("ddp", lambda: ddp(torch.tensor([1, 2])).sum().backward()),
    ):
        try:
            attempt()
            wrong.append(f"{what}: went through")
        except (GossamerError, RuntimeError) as e:
            if "sparse" not in str(e):
                wrong.append(f"{what}: {e}")
    state.close()
    return wrong


def check_model(rank, size, group):
    """A bare loop over a model: a parameter without a gradient takes part with zeros."""
    model = Branches()
    x, y = batch(rank, 0)
    cross_entropy(model(x, rank % 2), y).backward()
    every = []
    for r in range(size):
        other = Branches()
        x, y = batch(r, 0)
        cross_entropy(other(x, r % 2), y).backward()
        every.append(
            {
                n: torch.zeros_like(p) if p.grad is None else p.grad
                for n, p in other.named_parameters()
            }
        )
    exchange(model, CODECS["sq4"], Distributed(group, timeout=300), step=0, threshold=100)
    found = {n: p.grad for n, p in model.named_parameters()}
    expected = simulate(every, CODECS["sq4"], step=0, threshold=100)
    return [] if same(found, expected) else ["differs"]


ALL = {2, 3, 4, 5}
CHECKS = {
    "codecs": (check_codecs, ALL),
    "feedback": (check_feedback, {2, 4}),
    "not_finite": (check_not_finite, {3}),
    "layouts": (check_layouts, {2, 3}),
    "left_out": (check_left_out, {2}),
    "collectives": (check_collectives, {2}),
    "damage": (check_damage, {3}),
    "formats": (check_formats, {2}),
    "ddp": (check_ddp, ALL),
    "replay": (check_replay, {2, 4}),
    "usage": (check_usage, {3}),
    "scaler": (check_scaler, {2, 4}),
    "sparse": (check_sparse, {2}),
    "model": (check_model, {5}),
}


def work(rank, size, folder):
    torch.set_num_threads(1)
    faults._ASK = 600.0  # seconds: the store is a file, and answers however busy the machine is
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{size}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=600),
    )
    found = {}
    for name, (check, sizes) in CHECKS.items():
        if size in sizes:
            try:
                found[name] = check(rank, size, None)
            except Exception:
                found[name] = [traceback.format_exc()]
            dist.barrier()
    with open(f"{folder}/{size}-{rank}.json", "w") as f:
        json.dump(found, f)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run(__file__, folder)
    return folder


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, size) for name, (_, sizes) in CHECKS.items() for size in sorted(sizes)],
)
def test_ranks(found, name, size):
    rows = [json.loads((found / f"{size}-{rank}.json").read_text()) for rank in range(size)]
    assert [row[name] for row in rows] == [[]] * size


if __name__ == "__main__":
    importlib.import_module("torch._dynamo")  # which DDP imports: here once, before all fork
    fork = multiprocessing.get_context("fork")
    status = 0
    for size in sorted(ALL):
        workers = [fork.Process(target=work, args=(r, size, sys.argv[1])) for r in range(size)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
            status = status or abs(worker.exitcode)
    sys.exit(status)
