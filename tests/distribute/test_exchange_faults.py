"""A rank that is killed, stops, or fails ends the others with an error that says so, in time.

The file runs itself as a script: three processes a case, all cases side by side, as they mostly
wait.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from gossamer.distribute import GradientExchange, TernGrad, exchange, exchange_hook

RANKS = 3
TIMEOUT = 4.0
BOUND = 240.0  # seconds until all have ended, on a machine that is busy; some 10 where it is not
CASES = {  # name -> which rank ends how, in DDP or in a bare loop
    "killed": (2, signal.SIGKILL, "ddp"),
    "stopped": (2, signal.SIGSTOP, "ddp"),
    "killed, rank 0 with the store": (0, signal.SIGKILL, "ddp"),
    "stopped, rank 0 with the store": (0, signal.SIGSTOP, "ddp"),
    "failed in the worker thread": (1, None, "ddp"),
    "killed in a loop": (1, signal.SIGKILL, "loop"),
}


def fails(sums):
    raise ValueError("no sums today")


def work(case, rank, port, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    victim, signum, way = CASES[case]
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=600),
    )
    torch.manual_seed(rank)
    model = nn.Sequential(*[nn.Linear(40, 40) for _ in range(5)])
    codec = TernGrad()
    state = GradientExchange(model, codec, timeout=TIMEOUT, topology="two_phase")
    ddp = DDP(model, bucket_cap_mb=0.005)
    ddp.register_comm_hook(state, exchange_hook)

    def step(number):
        model.zero_grad()
        x = torch.randn(4, 40)
        if way == "ddp":
            ddp(x).square().sum().backward()
        else:
            model(x).square().sum().backward()
            exchange(model, codec, step=number, timeout=TIMEOUT)

    for number in range(3):
        step(number)
    dist.barrier()
    if rank == victim:
        if signum is None:
            TernGrad.sum_codes = lambda *_, **__: fails(0)
        else:
            threading.Timer(0.2, os.kill, (os.getpid(), signum)).start()
    began = time.monotonic()
    told = {"error": None}
    try:
        for number in range(3, 1_000_000):
            step(number)
    except Exception as e:
        told = {"error": type(e).__name__, "text": str(e), "seconds": time.monotonic() - began}
    with open(f"{folder}/{case}-{rank}.json", "w") as f:
        json.dump(told, f)
    sys.exit(7)


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    run = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout + run.stderr
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
            assert (row["error"], row["text"]) == ("ValueError", "no sums today")
            continue
        assert row["error"] == "ExchangeError"
        if signum is None:
            assert "rank 1 failed: ValueError: no sums today" in row["text"]
        elif victim == 0:
            assert "the store that rank 0 (or the launcher) keeps does not answer" in row["text"]
        else:
            assert f"rank {victim} of 3 did not answer" in row["text"]
        if signum == signal.SIGSTOP:
            assert row["seconds"] >= TIMEOUT


if __name__ == "__main__":
    __import__("torch._dynamo")  # which DDP imports: here once, before all fork
    fork = multiprocessing.get_context("fork")
    every = {}
    for case in CASES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        every[case] = [
            fork.Process(target=work, args=(case, rank, port, sys.argv[1])) for rank in range(RANKS)
        ]
        for process in every[case]:
            process.start()
    deadline = time.monotonic() + BOUND
    for case, processes in every.items():
        for rank, process in enumerate(processes):
            if (rank, signal.SIGSTOP) != CASES[case][:2]:
                process.join(max(0.0, deadline - time.monotonic()))
    codes = {case: [p.exitcode for p in processes] for case, processes in every.items()}
    for processes in every.values():
        for process in processes:
            process.kill()
    with open(f"{sys.argv[1]}/codes.json", "w") as f:
        json.dump(codes, f)
