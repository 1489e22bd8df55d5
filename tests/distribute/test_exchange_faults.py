"""A rank that is killed, stops, or fails ends the others with an error that says so.

The file runs itself as a script: three processes a case, all cases side by side, as they mostly
wait. No verdict is by the clock: what ends waiting is that the rank has gone.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from datetime import timedelta
from multiprocessing.sharedctypes import RawArray

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from gossamer.distribute import GradientExchange, Processes, TernGrad, exchange, exchange_hook
from gossamer.distribute.exchange import faults, group
from launched import run

RANKS = 3
BEGUN, ENDED = 1, 2  # a rank's marks: it is in that step; it has answered the roll call, or is gone
LIMIT = 600.0  # seconds; nothing here takes so long, and no verdict hangs on it
STEP = 5  # in which it happens, in the middle of encoding
CASES = {  # name -> which rank ends how, in DDP or in a bare loop
    "killed": (2, signal.SIGKILL, "ddp"),
    "stopped": (2, signal.SIGSTOP, "ddp"),
    "killed, rank 0 with the store": (0, signal.SIGKILL, "ddp"),
    "stopped, rank 0 with the store": (0, signal.SIGSTOP, "ddp"),
    "failed in the worker thread": (1, None, "ddp"),
    "killed in a loop": (1, signal.SIGKILL, "loop"),
    "failed outside the hook, rank 0 with the store": (0, None, "context"),
    "failed outside the hook, in Processes": (1, None, "launched"),
    "failed outside the hook, in Processes without a codec": (1, None, "float"),
}
LEFT = ("context", "launched", "float")  # an error leaves the context, and the process lives on


class Clock:
    """Stands still until an event, then goes on at every look, at most up to an hour.

    So a rank is given up when it is gone and not when the machine is busy.
    """

    sleep = staticmethod(time.sleep)

    def __init__(self, event, tick, most):
        self.event, self.tick, self.most, self.now = event, tick, most, 0.0

    def monotonic(self):
        if self.event():
            self.now = min(self.now + self.tick, self.most)
        return self.now


def set_clocks(victim, signum, marks):
    """Waiting ends once the victim has gone, the roll call once all others have answered it."""
    others = [rank for rank in range(RANKS) if rank != victim]
    stopped = signum == signal.SIGSTOP
    group.time = Clock(lambda: stopped and marks[victim] == ENDED, LIMIT, float("inf"))
    # past the call's end, and short of the end of rank 0's waiting for the others to read
    faults.time = Clock(lambda: all(marks[r] == ENDED for r in others), 1.0, faults._CALL + 1)
    if (victim, signum) != (0, signal.SIGSTOP):
        faults._ASK = LIMIT  # a store that lives answers, however late; a dead one breaks off
    report = faults.Roll.report

    @functools.wraps(report)
    def reported(self, *args, **options):
        report(self, *args, **options)
        marks[self.rank] = ENDED

    faults.Roll.report = reported


def join(case, rank, folder, whole):
    """A store that rank 0 keeps, on a port that the system chose for it, and a process group."""
    meet = dist.FileStore(f"{folder}/{case}", RANKS)
    limit = timedelta(seconds=LIMIT)
    meet.set_timeout(limit)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, None, True, limit, wait_for_workers=False)
        meet.set("port", str(store.port))
    else:
        store = dist.TCPStore("127.0.0.1", int(meet.get("port")), None, False, limit)
    if whole:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=limit)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    for name, value in {**where, "RANK": rank, "WORLD_SIZE": RANKS}.items():
        os.environ[name] = str(value)
    return store


@contextlib.contextmanager
def trained(way, model):
    """What makes a step of the model with its gradients averaged."""
    if way in ("launched", "float"):
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store that is there
        codec = None if way == "float" else TernGrad()
        with Processes.launched(codec, topology="two_phase", timeout=LIMIT) as workers:
            yield workers.wrap(model)
        return
    state = GradientExchange(model, TernGrad(), timeout=LIMIT, topology="two_phase")
    with state if way == "context" else contextlib.nullcontext():
        wrapped = DDP(model, bucket_cap_mb=0.005)
        wrapped.register_comm_hook(state, exchange_hook)
        yield model if way == "loop" else wrapped


def work(case, rank, folder, marks):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    victim, signum, way = CASES[case]
    set_clocks(victim, signum, marks)
    store = join(case, rank, folder, way not in ("launched", "float"))
    torch.manual_seed(rank)
    model = nn.Sequential(*[nn.Linear(40, 40) for _ in range(5)])

    def ends(*_, **__):
        while 0 in marks:  # what others still read of the step before would be lost with this rank
            time.sleep(0.01)
        if signum is None:
            raise ValueError("no more today")
        marks[rank] = ENDED
        os.kill(os.getpid(), signum)

    told = {"error": None}
    try:
        with trained(way, model) as network:
            for number in range(STEP + 2):
                if number == STEP:
                    marks[rank] = BEGUN
                if (rank, number) == (victim, STEP):
                    if way in LEFT:
                        model[0].forward = ends
                    else:
                        name = "sum_codes" if signum is None else "encode_smallest"
                        setattr(TernGrad, name, ends)
                model.zero_grad()
                network(torch.randn(4, 40)).square().sum().backward()
                if way == "loop":
                    exchange(model, TernGrad(), step=number, timeout=LIMIT)
    except Exception as e:
        told = {"error": type(e).__name__, "text": str(e), "step": number}
    with open(f"{folder}/{case}-{rank}.json", "w") as f:
        json.dump(told, f)
    marks[rank] = ENDED
    # it lives on; but what waits in plain DDP is woken by a process's end only
    while way in LEFT and (way, rank) != ("float", victim) and any(m != ENDED for m in marks):
        time.sleep(0.01)
    del store
    sys.exit(7)


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    run(__file__, folder, timeout=LIMIT + 300)
    return {
        case: [
            json.loads(path.read_text())
            if (path := folder / f"{case}-{rank}.json").exists()
            else None
            for rank in range(RANKS)
        ]
        for case in CASES
    }, json.loads((folder / "codes.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_survivors(ends, case):
    told, codes = ends
    victim, signum, _ = CASES[case]
    for rank, row in enumerate(told[case]):
        if rank == victim and signum is not None:
            assert row is None
            continue
        assert codes[case][rank] == 7, "the process ended by itself"
        if rank == victim:
            assert (row["error"], row["text"]) == ("ValueError", "no more today")
            continue
        assert row["error"] == "ExchangeError"
        assert row["step"] == STEP
        if signum is None:
            assert f"rank {victim} failed: ValueError: no more today" in row["text"]
        elif victim == 0:
            assert "the store that rank 0 (or the launcher) keeps does not answer" in row["text"]
        else:
            assert f"rank {victim} of 3 did not answer" in row["text"], "and no other"


if __name__ == "__main__":
    __import__("torch._dynamo")  # which DDP imports: here once, before all fork
    fork = multiprocessing.get_context("fork")
    every = {}
    # all held, or one's memory is the next one's; without locks, which a killed process would keep
    marks = {case: RawArray("b", RANKS) for case in CASES}
    for case in CASES:
        every[case] = [
            fork.Process(target=work, args=(case, rank, sys.argv[1], marks[case]))
            for rank in range(RANKS)
        ]
        for process in every[case]:
            process.start()
    for case, processes in every.items():
        for rank, process in enumerate(processes):
            if (rank, signal.SIGSTOP) != CASES[case][:2]:
                process.join()
    codes = {case: [p.exitcode for p in processes] for case, processes in every.items()}
    for processes in every.values():
        for process in processes:
            process.kill()
    with open(f"{sys.argv[1]}/codes.json", "w") as f:
        json.dump(codes, f)
