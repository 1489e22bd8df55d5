"""The exchange's examples run, each in two processes."""

import subprocess
import sys
from pathlib import Path

import pytest

from launched import TWO, run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def learns(*command):
    told = next(line for line in run(*command).splitlines() if line.startswith("accuracy"))
    assert float(told.split()[1]) > 0.85
    assert " 0 steps" not in told


def needs(package):
    # in a process of its own, as the example is: here a torchvision of another torch may be hidden
    done = subprocess.run(
        [sys.executable, "-c", f"import {package}"], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"{package} cannot be imported: {done.stderr.strip().splitlines()[-1]}")


def test_ddp():
    learns(*TWO, EXAMPLES / "exchange_ddp.py")


@pytest.mark.slow
def test_loop():
    learns(*TWO, EXAMPLES / "exchange_loop.py")


@pytest.mark.slow
def test_accelerate():
    needs("accelerate")
    learns(*TWO, EXAMPLES / "exchange_accelerate.py")


@pytest.mark.slow
def test_lightning():
    needs("lightning")
    learns(EXAMPLES / "exchange_lightning.py")
