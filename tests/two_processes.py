"""Scripts on two processes, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys


def torchrun(*command: str, timeout: float = 300) -> str:
    """Run a script on two processes; raise with the end of its output if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*start, *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-6000:])
    return done.stderr
