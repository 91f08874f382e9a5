"""Importing the package is quick and changes nothing of the process."""

from __future__ import annotations

import json
import subprocess
import sys

# What takes time to import and serves some calls alone; tqdm comes with Pyro.
LATE = ["arviz", "filelock", "matplotlib", "pandas", "rich", "sklearn", "typer", "xarray"]

STATE = """
import json, random, sys
import numpy, pyro, torch
import pyro.infer, pyro.infer.autoguide

def state():
    return [
        str(torch.get_default_dtype()),
        str(torch.get_default_device()),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.distributions.Distribution._validate_args,
        pyro.infer.util.is_validation_enabled(),
        torch.get_rng_state().tolist(),
        str(numpy.random.get_state()),
        str(random.getstate()),
        len(pyro.get_param_store()),
        sys.getrecursionlimit(),
    ]

before, modules = state(), set(sys.modules)
import pyroflow
json.dump([before == state(), sorted(set(sys.modules) - modules)], sys.stdout)
"""


def test_import_changes_nothing_and_brings_in_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STATE], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    same, modules = json.loads(done.stdout)
    assert same
    assert not {name.partition(".")[0] for name in modules} & set(LATE)
    assert not {"torch._dynamo", "torch._inductor"} & set(modules)
