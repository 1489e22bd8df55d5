"""The kernels without Python: each body beside an oracle in C++ (``kernels.cpp``).

Here for this processor, the portable path alone; by ``make aarch64`` for every
instruction set of it, and for aarch64 under user-mode emulation, with dot products and without, as
the C library and its example. What lacks is named, and skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gossamer
from gossamer.runtime import include
from gossamer.runtime.plan.door import compile_network

HERE = Path(__file__).parent
CXX = shutil.which(os.environ.get("CXX", "c++"))
FLAGS = os.environ.get("GOSSAMER_C_FLAGS", "-O0 -DGOSSAMER_PORTABLE").split()
WARN = ["-Wall", "-Wextra"]
ARM = os.environ.get("AARCH64_CXX", "aarch64-linux-gnu-g++").split()
ARM_CXX = shutil.which(ARM[0])
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")

needs_arm = pytest.mark.skipif(
    ARM_CXX is None or QEMU is None,
    reason=f"no {ARM[0]} (another: AARCH64_CXX), or no qemu-aarch64 on the path",
)
needs_cxx = pytest.mark.skipif(CXX is None, reason="no C++ compiler (c++) on the path")
each_cpu = pytest.mark.parametrize(("cpu", "levels"), [("max", 4), ("cortex-a53", 3)])


def built(to: Path, compiler: list[str], *what: object) -> Path:
    flags = ["-std=c++17", "-ffp-contract=off", "-pthread", *WARN]
    subprocess.run([*compiler, *flags, *map(str, what), "-o", to], check=True)
    return to


def compared(command: list[Any], rounds: int, levels: int) -> None:
    run = subprocess.run([*command, str(rounds)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    *lines, last = run.stdout.splitlines()
    assert last == "0 faults"
    assert len(lines) == levels, run.stdout
    assert int(lines[0].split()[2]) > 1000 * rounds


@needs_cxx
def test_the_portable_kernels(tmp_path: Path) -> None:
    program = built(tmp_path / "kernels", [str(CXX)], *FLAGS, HERE / "kernels.cpp")
    compared([program], 30, levels=1 if "-DGOSSAMER_PORTABLE" in FLAGS else 2)


@pytest.mark.slow
@needs_cxx
def test_every_instruction_set_of_this_processor(tmp_path: Path) -> None:
    program = built(tmp_path / "kernels", [str(CXX)], "-O2", HERE / "kernels.cpp")
    run = subprocess.run([program, "60"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1] == "0 faults"


@pytest.fixture(scope="module")
def arm_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("arm") / "kernels"
    return built(to, ARM, "-O2", "-Wno-psabi", "-static", HERE / "kernels.cpp")


@pytest.mark.slow
@needs_arm
@each_cpu
def test_the_kernels_for_aarch64(arm_kernels: Path, cpu: str, levels: int) -> None:
    # scalar, wide, NEON, and where the processor has them, dot products
    compared([QEMU, "-cpu", cpu, arm_kernels], 60, levels)


@pytest.fixture(scope="module")
def arm_example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    example = HERE.parents[1] / "examples" / "c" / "classify.c"
    source = include()
    # the example as C++: one compiler is enough
    parts = [
        "-static",
        f"-I{source}",
        source / "gossamer.cpp",
        "-x",
        "c++",
        "-fpermissive",
        example,
    ]
    to = tmp_path_factory.mktemp("arm") / "classify"
    return built(to, ARM, "-O2", "-Wno-psabi", *parts)


@pytest.mark.slow
@needs_arm
@each_cpu
@pytest.mark.parametrize("int8", [False, True])
def test_the_example_for_aarch64(
    arm_example: Path, tmp_path: Path, cpu: str, levels: int, int8: bool
) -> None:
    net = gossamer.nets.build("lenet-5").eval()
    for p in net.parameters():
        if p.ndim > 1:
            p.data[torch.rand_like(p) > 0.3] = 0
    x = torch.randn(4, 1, 28, 28)
    more: dict[str, Any] = {"precision": "int8", "calibration": [x]} if int8 else {}
    plan = compile_network(net, x, engine="numpy", rounds=1, **more)
    plan.save(tmp_path / "net.plan")
    for image in x.numpy()[:, None]:
        image.tofile(tmp_path / "image.f32")
        command = [QEMU, "-cpu", cpu, arm_example, tmp_path / "net.plan", tmp_path / "image.f32"]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        answers = np.array([float(line) for line in run.stdout.split()], np.float32)
        wanted = plan(image)[0]
        bound = 0 if int8 else 3e-6 * np.abs(wanted).max()
        np.testing.assert_allclose(answers, wanted, rtol=0, atol=bound)
