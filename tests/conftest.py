"""Lets `pytest` find the scripts from anywhere, each worker on one core, with one thread and a cache of its own."""

import os
import pathlib
import sys
import tempfile

import torch

_cache = tempfile.TemporaryDirectory(prefix="parl-tests-")  # gone when the session ends
os.environ["PARL_CACHE"] = _cache.name
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)

# pytest-xdist runs as many workers as pyproject.toml says. Pinned, they and the programs they start keep out of each
# other's way: two processes with two threads each on two cores are ten times slower, not two.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(worker.removeprefix("gw")) % len(_cores)]})
