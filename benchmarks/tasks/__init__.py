"""An environment and its offline dataset, by id: what `d4rl` was for.

    env = make_env("pointmaze-medium-v0")           # a gymnasium.Env, float32 vector observations, box actions
    dataset = load_dataset("pointmaze-medium-v0")   # arrays of transitions in the order they were recorded

Each family of tasks is one module with `ENV_IDS`, `make_env` and `load_dataset`; ids are routed here.
"""

import difflib
import os

try:
    import mujoco  # noqa: F401  it loads the renderer that MUJOCO_GL names
except Exception as error:  # of whatever kind the renderer's bindings raise
    raise SystemExit(
        f"error: MuJoCo cannot be imported with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')} ({error}); `egl` needs "
        "apt-get install libegl1, `osmesa` needs apt-get install libosmesa6, and without images it may be left unset"
    ) from None

from benchmarks.tasks import antmaze, kitchen, ogbench_singletask, pointmaze, widowx
from benchmarks.tasks.dataset import Dataset, TaskError

FAMILIES = (pointmaze, antmaze, kitchen, ogbench_singletask, widowx)


def env_ids() -> list[str]:
    """Every id that `make_env` and `load_dataset` accept."""
    return [env_id for family in FAMILIES for env_id in family.ENV_IDS]


def make_env(env_id: str, **kwargs):
    """Build one environment.

    Args:
        env_id: one of `env_ids()`.
        kwargs: passed to the family, e.g. `render_mode="rgb_array"`.
    Returns:
        a `gymnasium.Env` whose observations are float32 vectors (of `visual-*` and `widowx-*` a dict of `image` and
        `proprio`); `info["success"]` says whether the goal was reached.
    Raises:
        TaskError: the id is unknown; the message lists near matches.
    """
    return _family(env_id).make_env(env_id, **kwargs)


def load_dataset(env_id: str, path=None, size: int | None = None, seed: int = 0, source: str = "auto") -> Dataset:
    """Load the offline dataset of a task: from the cache, else downloaded, else collected here.

    Args:
        env_id: one of `env_ids()`.
        path: read this file instead: an `.npz` of the six arrays of `Dataset`, or the family's own format.
        size: number of transitions to collect, for local data. None: the task's default.
        seed: seed of a local collection.
        source: `auto`, `download` (the published file or an error) or `local` (collect here).
    Raises:
        TaskError: the id is unknown, the data cannot be had, or a file is missing, truncated, changed or of another
            shape.
    """
    return _family(env_id).load_dataset(env_id, path=path, size=size, seed=seed, source=source)


def _family(env_id: str):
    for family in FAMILIES:
        if env_id in family.ENV_IDS:
            return family
    near = difflib.get_close_matches(env_id, env_ids(), n=3, cutoff=0.4) or env_ids()
    raise TaskError(f"unknown environment id {env_id!r}; did you mean {' or '.join(near)}?")
