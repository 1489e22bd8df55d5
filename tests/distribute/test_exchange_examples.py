"""The exchange's examples run, each in two processes."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run(*command):
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = next(line for line in done.stdout.splitlines() if line.startswith("accuracy"))
    assert float(told.split()[1]) > 0.85
    assert " 0 steps" not in told


def needs(package):
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError) as e:  # a torchvision of another torch is a RuntimeError
        pytest.skip(f"{package} cannot be imported: {e}")


def test_ddp():
    run(*LAUNCHER, EXAMPLES / "exchange_ddp.py")


@pytest.mark.slow
def test_loop():
    run(*LAUNCHER, EXAMPLES / "exchange_loop.py")


@pytest.mark.slow
def test_accelerate():
    needs("accelerate")
    run(*LAUNCHER, EXAMPLES / "exchange_accelerate.py")


@pytest.mark.slow
def test_lightning():
    needs("lightning")
    run(EXAMPLES / "exchange_lightning.py")
