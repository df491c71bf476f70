"""Lets `pytest` find the scripts from anywhere, on one thread and with a cache folder of its own."""

import os
import pathlib
import sys
import tempfile

import torch

_cache = tempfile.TemporaryDirectory(prefix="parl-tests-")  # gone when the session ends
os.environ["PARL_CACHE"] = _cache.name
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
