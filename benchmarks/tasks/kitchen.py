"""`kitchen-{complete,partial,mixed}-v2`: a robot arm does four chores in a kitchen; all have to be done in one episode.

The environment is gymnasium-robotics' FrankaKitchen with the four sub-tasks of the dataset. Observation (59,): joints
of the arm (9) and their velocities (9), positions of the kitchen's objects (21) and their velocities (20), all with
sensor noise. The goals are fixed, so the goal entries of FrankaKitchen's dictionary are left out. The reward of a step
is the number of sub-tasks completed so far in the episode, which ends when that is 4.

The data are human demonstrations, published as the Minari datasets `D4RL/kitchen/{complete,partial,mixed}-v2`.
"""

import functools
import json
import os
import pathlib
import sys

import gymnasium as gym
import numpy as np

from benchmarks.tasks.dataset import (
    Dataset,
    TaskError,
    cache_dir,
    check_array,
    file_sha256,
    home,
    one_at_a_time,
    read_npz,
)
from benchmarks.tasks.download import DownloadError, download_from

# The sub-tasks are those with which Minari's datasets were recorded (scripts/D4RL/kitchen/create_franka_dataset.py in
# Farama-Foundation/minari-dataset-generation-scripts); they are D4RL's too.
TASKS = {
    "complete": ("microwave", "kettle", "light switch", "slide cabinet"),
    "partial": ("microwave", "kettle", "light switch", "slide cabinet"),
    "mixed": ("microwave", "kettle", "bottom burner", "light switch"),
}
ENV_IDS = tuple(f"kitchen-{name}-v2" for name in TASKS)
MAX_STEPS = 280
OBS_SIZE, ACTION_SIZE = 59, 9
HUB = "https://huggingface.co/datasets/farama-minari/D4RL/resolve/main"  # Minari's remote


# --- THE ENVIRONMENT ---


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """One kitchen. Observation (59,) float32; action (9,) in [-1, 1], joint velocities.

    `info["completed"]` counts the sub-tasks completed so far (0 to 4; 25 x this is the score), `info["success"]`
    says whether all four are.
    """
    kitchen = _kitchen_env_class()(tasks_to_complete=TASKS[_name(env_id)], render_mode=render_mode)
    return gym.wrappers.TimeLimit(Kitchen(kitchen), MAX_STEPS)


class Kitchen(gym.Wrapper):
    """FrankaKitchen with a vector as its observation, and the number of sub-tasks completed so far as its reward.

    FrankaKitchen itself gives 1 at the step that completes a sub-task. The count is what the authors of PA-RL trained
    with (`num_solved` in MaxSobolMark/D4RL), and what a reward bias of -4 brings to 0 when all is done.
    """

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS_SIZE,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (ACTION_SIZE,), np.float32)

    def reset(self, *, seed=None, options=None):
        obs, _ = self.env.reset(seed=seed, options=options)
        return obs["observation"].astype(np.float32), {"completed": 0, "success": False}

    def step(self, action):
        obs, _, terminated, truncated, info = self.env.step(action)
        completed = len(info["episode_task_completions"])
        info = {"completed": completed, "success": terminated}
        return obs["observation"].astype(np.float32), float(completed), terminated, truncated, info


@functools.cache
def _kitchen_env_class():
    """FrankaKitchen's class, imported on first use: importing gymnasium-robotics takes a while and prints a notice."""
    stderr, sys.stderr = sys.stderr, open(os.devnull, "w")
    try:
        from gymnasium_robotics.envs.franka_kitchen import franka_env, kitchen_env
    finally:
        sys.stderr.close()
        sys.stderr = stderr
    # gymnasium-robotics 1.4 looks the robot's joints up by name and asserts their type in a way that fails on MuJoCo 4.
    # They are the first nine, as the rest of FrankaKitchen takes for granted.
    franka_env.robot_get_obs = lambda model, data, names: (data.qpos[:9].copy(), data.qvel[:9].copy())
    return kitchen_env.KitchenEnv


def _name(env_id: str) -> str:
    return env_id.split("-")[1]


# --- THE DATA ---


def load_dataset(env_id: str, path=None, size: int | None = None, seed: int = 0, source: str = "auto") -> Dataset:
    """The task's demonstrations: from `path`, from Minari's folder, from the cache, or downloaded into the cache.

    Args:
        env_id: one of `ENV_IDS`.
        path: folder of a Minari dataset (with `data/main_data.hdf5` and `data/metadata.json`), or an `.npz` of the
            six arrays of `Dataset`.
        size, seed: of a local collection, which this family does not have.
        source: `auto` and `download` do the same; `local` is refused.
    Raises:
        TaskError: there is no data, or it is damaged or of another task; one line that says what to do.
    """
    if path is not None and pathlib.Path(path).suffix == ".npz":
        return read_npz(path, obs_shape=(OBS_SIZE,), action_shape=(ACTION_SIZE,))
    if path is not None:
        return read_minari(path, env_id)
    if source == "local":
        raise TaskError(f"{env_id} is human demonstrations, which cannot be collected here; {_how_to_get(env_id)}")
    folder = _minari_folder(env_id)
    if folder is not None:
        return read_minari(folder, env_id)
    _import_minari()  # what reads the files is missed before they are fetched
    folder = cache_dir() / "minari" / _minari_id(env_id)
    download_minari(env_id, folder)
    return read_minari(folder, env_id)


def _minari_folder(env_id: str) -> pathlib.Path | None:
    """Where `minari download` put the task's dataset, None if it did not."""
    datasets = os.environ.get("MINARI_DATASETS_PATH")
    if not datasets:
        try:
            datasets = home() / ".minari" / "datasets"
        except TaskError:  # no home folder, so nothing in it; the cache may be elsewhere
            return None
    folder = pathlib.Path(datasets) / _minari_id(env_id)
    return folder if os.path.isdir(folder) else None


def read_minari(folder, env_id: str) -> Dataset:
    """A Minari dataset as transitions, with the rewards and terminals of `make_env(env_id)`.

    The stored rewards are not used. They were recorded with `remove_task_when_completed=False` and
    `terminate_on_tasks_completed=False` (see `TASKS`), so they count the sub-tasks that are complete at that moment,
    and fall when one comes undone. The dataset keeps the objects' positions without noise (`achieved_goal`), from
    which what the environment would have given follows exactly. Demonstrations that go on after the fourth sub-task
    are cut there.
    """
    folder = pathlib.Path(folder)
    for file in (_hdf5(folder), folder / "data" / "metadata.json"):
        if not file.is_file():
            lacks = file.relative_to(folder)
            raise TaskError(f"{folder} is not the folder of a Minari dataset (no {lacks}); {_how_to_get(env_id)}")
    minari, goals = _import_minari(), _goals(env_id)
    parts = []
    try:
        for episode in minari.MinariDataset(folder / "data").iterate_episodes():
            parts.append(_transitions(episode, goals, folder))
    except TaskError:
        raise
    except Exception as error:  # minari and h5py raise a dozen kinds for damaged files
        raise TaskError(f"{folder} is not readable as a Minari dataset, or it is truncated ({_line(error)})") from error
    if not parts:
        raise TaskError(f"{folder} has no episodes")
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Dataset(**arrays, source=str(folder), sha256=file_sha256(_hdf5(folder)))


def _transitions(episode, goals: dict, folder) -> dict:
    """The arrays of a Dataset for one episode of T steps (the T + 1 states are stored once each)."""
    name, steps = f"episode {episode.id}", len(episode.rewards)
    obs = check_array(f"observations of {name}", episode.observations["observation"], folder, (OBS_SIZE,))
    actions = check_array(f"actions of {name}", episode.actions, folder, (ACTION_SIZE,))
    complete = np.zeros((len(goals), steps), bool)
    for row, (task, (goal, threshold)) in zip(complete, goals.items()):
        if task not in episode.observations["achieved_goal"]:
            raise TaskError(f"{folder}: {name} does not have the sub-task {task!r}; is it the data of another task?")
        achieved = check_array(f"{task} of {name}", episode.observations["achieved_goal"][task], folder, goal.shape)
        if not steps or len(obs) != steps + 1 or len(actions) != steps or len(achieved) != steps + 1:
            raise TaskError(f"{folder}: {name} has arrays of the wrong length for {steps} steps")
        row[:] = np.linalg.norm(achieved[1:] - goal, axis=1) < threshold  # after each step, as the environment looks
    completed = np.logical_or.accumulate(complete, axis=1).sum(0)  # (T,)
    success = completed == len(goals)
    end = int(success.argmax()) + 1 if success.any() else steps
    last = np.arange(end) == end - 1
    return {
        "observations": obs[:end].astype(np.float32),
        "actions": actions[:end].astype(np.float32),
        "rewards": completed[:end].astype(np.float32),
        "next_observations": obs[1 : end + 1].astype(np.float32),
        "terminals": success[:end],
        "timeouts": last & ~success[:end],
    }


def _goals(env_id: str) -> dict:
    """Each sub-task's goal, and how near to it counts as complete: FrankaKitchen's."""
    module = sys.modules[_kitchen_env_class().__module__]
    return {task: (module.OBS_ELEMENT_GOALS[task], module.BONUS_THRESH) for task in TASKS[_name(env_id)]}


def download_minari(env_id: str, folder: pathlib.Path) -> None:
    """The two files of the task's dataset, from where Minari keeps them, into `folder`; nothing if they are there."""
    try:
        with one_at_a_time(folder):
            for name, check in (("metadata.json", _check_metadata), ("main_data.hdf5", _check_hdf5)):
                url = f"{HUB}/{_minari_id(env_id).removeprefix('D4RL/')}/data/{name}"
                download_from([url], folder / "data" / name, check=check)
    except DownloadError as error:
        raise TaskError(f"{error}; {_how_to_get(env_id)}") from error


def _check_metadata(path) -> None:
    """Complain unless this is a JSON object; read_minari sees to what is in it."""
    try:
        if not isinstance(json.loads(pathlib.Path(path).read_text()), dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise TaskError(f"{path} is not a readable Minari file ({_line(error)})") from error


def _check_hdf5(path) -> None:
    """Complain unless this is an HDF5 file, whole, with an episode in it."""
    h5py = _import_h5py()
    try:
        with h5py.File(path) as file:
            file["episode_0"]
    except (OSError, KeyError) as error:
        raise TaskError(f"{path} is not a readable Minari file ({_line(error)})") from error


def _import_h5py():
    """h5py, which must not insist on locks: files are only read here, also where the file system has none.

    minari opens the file itself, and gives no other way to say so than the HDF5 library's variable.
    """
    os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")
    import h5py

    return h5py


def _import_minari():
    try:
        _import_h5py()  # minari reads with it
        import minari
    except ImportError as error:
        raise TaskError(
            f'kitchen data is read with minari and h5py ({_line(error)}): pip install "minari[hdf5]"'
        ) from error
    return minari


def _minari_id(env_id: str) -> str:
    return f"D4RL/kitchen/{_name(env_id)}-v2"


def _hdf5(folder: pathlib.Path) -> pathlib.Path:
    return folder / "data" / "main_data.hdf5"


def _how_to_get(env_id: str) -> str:
    return (
        f"on a machine with network run `minari download {_minari_id(env_id)}`, copy the folder "
        f"~/.minari/datasets/{_minari_id(env_id)} here and pass --dataset-path FOLDER"
    )


def _line(error: Exception) -> str:
    """The first line of an error's message, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
