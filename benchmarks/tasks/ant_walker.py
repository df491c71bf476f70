"""The walking policy that collects AntMaze data: a small network that walks the ant in a direction given to it.

`train_ant_walker.py` trained it and wrote `ant_walker.npz`; this file only reads and runs it, with numpy.
"""

import pathlib
import zipfile

import numpy as np

from benchmarks.tasks.dataset import TaskError

WEIGHTS = pathlib.Path(__file__).with_name("ant_walker.npz")


def load_walker(path=WEIGHTS):
    """`walk(observation, direction) -> action`: observation (29,) of the ant maze, direction (2,) of any length but 0.

    Raises:
        TaskError: the weights are missing or not readable.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            layers = [(file[f"weight{i}"], file[f"bias{i}"]) for i in range(3)]  # weight (out, in), bias (out,)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, EOFError) as error:
        how = "restore it, or python -m benchmarks.tasks.train_ant_walker"
        raise TaskError(f"cannot read the walking policy {path} ({error}); {how}") from error

    def times(weight, x):  # einsum: BLAS would start threads for so small a product, in each collecting process
        return np.einsum("ij,j->i", weight, x)

    def walk(observation, direction) -> np.ndarray:
        x = walker_input(observation, direction)
        for weight, bias in layers[:-1]:
            x = np.maximum(times(weight, x) + bias, 0.0)
        return np.tanh(times(layers[-1][0], x) + layers[-1][1])

    return walk


def upright(qpos) -> float:
    """Cosine between torso and vertical: 1 standing, below 0 on its back. qpos (>= 7,), quaternion at 3."""
    return 1 - 2 * float(qpos[4] ** 2 + qpos[5] ** 2) / float(qpos[3:7] @ qpos[3:7])


def walker_input(observation, direction) -> np.ndarray:
    """(29,) float32: what the ant feels (where it is left out) and the unit vector to walk along."""
    direction = np.asarray(direction) / max(float(np.hypot(*direction)), 1e-6)
    return np.concatenate([observation[2:], direction]).astype(np.float32)
