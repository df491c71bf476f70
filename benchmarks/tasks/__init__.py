"""An environment and its offline dataset, by id: what `d4rl` was for.

    env = make_env("pointmaze-medium-v0")           # a gymnasium.Env, float32 vector observations, box actions
    dataset = load_dataset("pointmaze-medium-v0")   # arrays of transitions in the order they were recorded

Each family of tasks is one module with `ENV_IDS`, `make_env` and `load_dataset`; ids are routed here.
"""

import difflib

from benchmarks.tasks import pointmaze
from benchmarks.tasks.dataset import Dataset, TaskError, read_npz

FAMILIES = (pointmaze,)


def env_ids() -> list[str]:
    """Every id that `make_env` and `load_dataset` accept."""
    return [env_id for family in FAMILIES for env_id in family.ENV_IDS]


def make_env(env_id: str, **kwargs):
    """Build one environment.

    Args:
        env_id: one of `env_ids()`.
        kwargs: passed to the family, e.g. `render_mode="rgb_array"`.
    Returns:
        a `gymnasium.Env` with float32 vector observations; `info["success"]` says whether the goal was reached.
    Raises:
        TaskError: the id is unknown; the message lists near matches.
    """
    return _family(env_id).make_env(env_id, **kwargs)


def load_dataset(env_id: str, path=None, size: int | None = None, seed: int = 0) -> Dataset:
    """Load the offline dataset of a task, collecting it first where it is collected locally and not cached yet.

    Args:
        env_id: one of `env_ids()`.
        path: read this `.npz` instead (the six arrays of `Dataset`).
        size: number of transitions to collect, for tasks with local data. None: the task's default.
        seed: seed of a local collection.
    Raises:
        TaskError: the id is unknown, or a file is missing, truncated, changed on disk or of another shape.
    """
    family = _family(env_id)
    if path is not None:
        return read_npz(path)
    return family.load_dataset(env_id, size=size, seed=seed)


def _family(env_id: str):
    for family in FAMILIES:
        if env_id in family.ENV_IDS:
            return family
    near = difflib.get_close_matches(env_id, env_ids(), n=3, cutoff=0.4) or env_ids()
    raise TaskError(f"unknown environment id {env_id!r}; did you mean {' or '.join(near)}?")
