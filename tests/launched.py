"""What tests share that start Python anew."""

import os
import subprocess
import sys

TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def run(*command: object, timeout: float = 900) -> str:
    """Standard output of Python with these arguments, one thread a process; it must end well."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        # a test file that is started itself finds what tests share
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
