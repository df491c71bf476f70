"""OGBench's `*-singletask-*` tasks, e.g. `cube-single-play-singletask-v0`, `visual-scene-play-singletask-task2-v0`.

The environments are those of the `ogbench` package, with its rewards: in a maze -1 until the goal, 0 there; with an arm
minus the number of parts (cubes, buttons, ...) that are not where they should be. An episode ends when all are. A name
without `-taskN-` is OGBench's default task of that environment.

The data is OGBench's `.npz` file (one per environment and kind of data, shared by all its tasks), downloaded; without
network it is collected here as OGBench collected its own: the arm by the oracles inside the `ogbench` package, the
mazes along shortest paths, the ant by the walking policy of `ant_walker.py`. Humanoid and soccer have no local
collection: their controllers are large trained policies. Kinds of data: `navigate` walks from goal to goal, `stitch` to
one goal four cells away, `explore` in random directions; `play` follows smooth plans, `noisy` a feedback controller
with noise.
"""

import contextlib
import ctypes.util
import hashlib
import importlib
import inspect
import os
import pathlib
import sys
import warnings
import zipfile
from collections import defaultdict, deque
from unittest import mock

import gymnasium as gym
import numpy as np

from benchmarks.tasks import ant_walker
from benchmarks.tasks.dataset import (
    Dataset,
    TaskError,
    announce_local_data,
    cache_dir,
    check_array,
    check_lengths,
    collect_in_chunks,
    file_sha256,
    one_at_a_time,
    read_npz,
    readable,
    verify,
    write_once,
)
from benchmarks.tasks.download import DownloadError, download_from

# OGBench's own server, which was down for weeks in 2026, and somebody's copy of its files on the hub
URL = "https://rail.eecs.berkeley.edu/datasets/ogbench"
COPY = "https://huggingface.co/datasets/zhouzypaul/ogbench_datasets"
DATASETS = {  # environment: the kinds of data that OGBench publishes
    **dict.fromkeys((f"pointmaze-{size}" for size in ("medium", "large", "giant", "teleport")), ("navigate", "stitch")),
    **dict.fromkeys((f"antmaze-{size}" for size in ("medium", "large", "teleport")), ("navigate", "stitch", "explore")),
    "antmaze-giant": ("navigate", "stitch"),
    **dict.fromkeys((f"humanoidmaze-{size}" for size in ("medium", "large", "giant")), ("navigate", "stitch")),
    **dict.fromkeys(("antsoccer-arena", "antsoccer-medium"), ("navigate", "stitch")),
    **dict.fromkeys((f"cube-{number}" for number in ("single", "double", "triple", "quadruple")), ("play", "noisy")),
    **dict.fromkeys(("scene", *(f"puzzle-{size}" for size in ("3x3", "4x4", "4x5", "4x6"))), ("play", "noisy")),
}
# all but two are published with images, too
DATASETS |= {
    f"visual-{name}": kinds for name, kinds in DATASETS.items() if not name.startswith(("pointmaze", "antsoccer"))
}
ENV_IDS = tuple(
    f"{name}-{kind}-singletask{task}-v0"
    for name, kinds in DATASETS.items() for kind in kinds for task in ("", *(f"-task{n}" for n in range(1, 6)))
)  # fmt: skip
DATASET_SIZE, VISUAL_DATASET_SIZE = (
    100_000,
    20_000,
)  # transitions of a local collection; OGBench's files have 1 to 5 million
CHUNK = 5_000  # transitions that one process collects at a time


def split_id(env_id: str) -> tuple[str, str, str, str]:
    """The environment, the kind of data, the id that gymnasium knows, and the name of the data file.

    `cube-single-play-singletask-task2-v0`:
    `cube-single`, `play`, `cube-single-singletask-task2-v0`, `cube-single-play-v0`.
    """
    front, task = env_id.split("-singletask")
    environment, kind = front.rsplit("-", 1)
    return environment, kind, f"{environment}-singletask{task}", f"{front}-v0"


# --- THE ENVIRONMENT ---


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """One OGBench environment in single-task mode, within its time limit.

    Observation: a float32 vector; of `visual-*` a dict of `image` (64, 64, 3) uint8 and `proprio` (0,) float32, as
    OGBench gives a camera and nothing else. Action: float32 in [-1, 1]. `info["success"]`: the task was solved before
    this step's action (OGBench's convention for single tasks, as for the reward and the end).

    Raises:
        TaskError: `visual-*`, and nothing can be rendered on this machine; the ogbench package is missing.
    """
    with building_ogbench(env_id):
        # OGBench renders at any time, with render_mode None too; the arm does not accept another one
        return SingleTask(gym.make(split_id(env_id)[2], disable_env_checker=True), env_id, render_mode)


@contextlib.contextmanager
def building_ogbench(name: str):
    """OGBench's environments are registered, find a renderer where they look for one, and build without warnings."""
    use_headless_renderer()
    with complain_about_renderer():
        importlib.import_module("mujoco")  # it loads the renderer's library
    import_ogbench()
    with (
        warnings.catch_warnings(),
        complain_about_renderer() if name.startswith("visual-") else contextlib.nullcontext(),
    ):
        warnings.filterwarnings("ignore", ".*precision lowered by casting")  # of the bounds -1 and 1
        yield


def import_ogbench(module: str = "ogbench"):
    """The package, which registers its environments, or a module of it.

    Raises:
        TaskError: it, or something that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TaskError(
            f"OGBench's tasks need the ogbench package ({reason}): pip install ogbench; its dependency labmaze has "
            "wheels up to Python 3.12 only"
        ) from error


class SingleTask(gym.Wrapper):
    """Float32 observations, a bool `info["success"]`, and resets that a seed fixes.

    OGBench draws starts and teleports with numpy's global generator, and the actions with which it warms a scene up
    from spaces that nobody seeds. Here both come from streams of the environment's own, and the global generator stays
    as it was.
    """

    def __init__(self, env: gym.Env, env_id: str, render_mode: str | None):
        super().__init__(env)
        self.random = np.random.RandomState()
        self.draws_in_steps = "teleport" in env_id
        self.warm_up_space = self.unwrapped.action_space  # the arm makes a new one each time it is asked
        self.action_space = gym.spaces.Box(-1.0, 1.0, self.warm_up_space.shape, np.float32)
        self.visual, space = env_id.startswith("visual-"), self.unwrapped.observation_space
        if self.visual:
            image, proprio = (
                gym.spaces.Box(0, 255, space.shape, np.uint8),
                gym.spaces.Box(-np.inf, np.inf, (0,), np.float32),
            )
            self.observation_space = gym.spaces.Dict({"image": image, "proprio": proprio})
        else:
            self.observation_space = gym.spaces.Box(-np.inf, np.inf, space.shape, np.float32)
        self.asked_render_mode = render_mode
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": 10 if "maze" in env_id or "soccer" in env_id else 20,
        }

    @property
    def render_mode(self):
        return self.asked_render_mode

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.random = legacy_generator(seed)
            self.warm_up_space.seed(seed)
            self.action_space.seed(seed)
        same_space = mock.patch.object(type(self.unwrapped), "action_space", self.warm_up_space, create=True)
        with as_global_generator(self.random), same_space:
            obs, info = self.env.reset(seed=seed, options=options)
        return self.observation(obs), {**info, "success": False}

    def step(self, action):
        with as_global_generator(self.random) if self.draws_in_steps else contextlib.nullcontext():
            obs, reward, terminated, truncated, info = self.env.step(action)
        info["success"] = bool(info["success"])
        return self.observation(obs), float(reward), bool(terminated), truncated, info

    def observation(self, obs):
        return {"image": obs, "proprio": np.zeros(0, np.float32)} if self.visual else obs.astype(np.float32)

    def render(self):
        with complain_about_renderer():
            return self.env.render()

    def close(self):
        for name in (
            "custom_renderer",
            "_renderer",
        ):  # of the mazes, of the arm; OGBench leaves them to the interpreter's end
            if getattr(self.unwrapped, name, None) is not None:
                getattr(self.unwrapped, name).close()
                setattr(self.unwrapped, name, None)
        super().close()


def legacy_generator(*seeds: int) -> np.random.RandomState:
    """A generator of numpy's old kind, which its global functions can take over."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seeds)))


@contextlib.contextmanager
def as_global_generator(generator: np.random.RandomState):
    """Within, `np.random.uniform` etc. draw from `generator`; afterwards they go on as if nothing had been drawn."""
    saved = np.random.get_state(legacy=False)
    np.random.set_state(generator.get_state(legacy=False))
    try:
        yield
    finally:
        generator.set_state(np.random.get_state(legacy=False))
        np.random.set_state(saved)


def use_headless_renderer() -> None:
    """Without a display and a choice of one's own, let MuJoCo render with EGL or OSMesa, whichever is installed."""
    if sys.platform != "linux" or os.environ.get("MUJOCO_GL") or os.environ.get("DISPLAY"):
        return
    for backend, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if ctypes.util.find_library(library):
            os.environ["MUJOCO_GL"] = backend
            for module in (
                "mujoco.rendering.classic.gl_context",
                "mujoco.gl_context",
            ):  # the choice is made at their import
                if module in sys.modules:
                    importlib.reload(sys.modules[module])
            return


@contextlib.contextmanager
def complain_about_renderer():
    """Turn what a missing driver raises (of many classes, by driver and MuJoCo version) into one line."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise TaskError(
            f"MuJoCo cannot render here ({reason}): MUJOCO_GL=egl needs an EGL driver (apt-get install libegl1), "
            "MUJOCO_GL=osmesa needs apt-get install libosmesa6"
        ) from error


# --- THE DATA ---


def load_dataset(env_id: str, path=None, size: int | None = None, seed: int = 0, source: str = "auto") -> Dataset:
    """OGBench's file, or data collected here in its place and in its layout.

    Args:
        env_id: one of ENV_IDS.
        path: an .npz of OGBench's layout (or of Dataset's six arrays) instead.
        size: transitions to collect, for local data; None: 100,000, of `visual-*` 20,000 (minutes, where OGBench's own
            millions would take hours).
        seed: of a local collection.
        source: `download`, `local`, or `auto`: local if the file cannot be downloaded.
    Raises:
        TaskError: the data cannot be had, a file is missing, truncated, changed or not of this task's shapes, or the
            ogbench package is missing.
    """
    import_ogbench()  # missed before gigabytes are fetched
    if path is not None:
        return read_ogbench(path, env_id)
    environment, kind, _, name = split_id(env_id)
    reason = "--dataset-source local was asked for"
    if source != "local":
        file = cache_dir() / "ogbench" / f"{name}.npz"
        try:
            with one_at_a_time(file):
                urls = f"{URL}/{name}.npz", f"{COPY}/resolve/main/{name}.npz"
                digest = download_from(urls, file, check=check_layout)
            return read_ogbench(file, env_id, digest)
        except DownloadError as error:
            if source == "download":
                raise
            reason = str(error)
    if "humanoid" in env_id or "soccer" in env_id:
        raise TaskError(
            f"no data for {env_id}: {reason}; it cannot be collected here, so fetch {URL}/{name}.npz elsewhere and "
            "pass --dataset-path FILE.npz"
        )
    if size is None:
        size = VISUAL_DATASET_SIZE if env_id.startswith("visual-") else DATASET_SIZE
    if size < 1:
        raise TaskError(f"a dataset of {size} transitions is empty; ask for more")
    controller = "the oracles of the ogbench package"
    if "maze" in env_id:
        controller = "this repository's walking policy" if "ant" in env_id else "a controller"
        controller += " in random directions" if kind == "explore" else " along shortest paths"
    announce_local_data(env_id, reason, f"{size:,} transitions are collected by {controller}")
    file = cache_dir() / "ogbench-local" / f"{name}-{size}-seed{seed}-{recipe(environment)}.npz"
    with one_at_a_time(file):
        if not os.path.isfile(file):
            train, validation = collect(environment, kind, size, seed)
            # `ogbench.make_env_and_datasets(dataset_path=...)` wants both
            write_once(file.with_name(f"{file.stem}-val.npz"), lambda out: np.savez_compressed(out, **validation))
            write_once(file, lambda out: np.savez_compressed(out, **train))
        digest = verify(file, check_layout)
    dataset = read_ogbench(file, env_id, digest)
    dataset.source, dataset.local = f"collected locally by benchmarks/tasks/ogbench_singletask.py, seed {seed}", True
    return dataset


def recipe(environment: str) -> str:
    """What, beside size and seed, the content of a local collection depends on, as a short name."""
    functions = (collect, collect_chunk, _oracles, _arm_trajectory, _maze_controller, _maze_trajectory, _maze_steps)
    parts = [inspect.getsource(function) for function in (*functions, _rows, _is_corridor, _distances, _waypoint)]
    if "antmaze" in environment:
        parts += [
            inspect.getsource(ant_walker),
            file_sha256(ant_walker.WEIGHTS) if ant_walker.WEIGHTS.is_file() else "",
        ]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:8]


def read_ogbench(path, env_id: str, sha256: str | None = None) -> Dataset:
    """Read a file of OGBench's layout and give it the rewards of this task.

    Rows are consecutive states. The last row of a trajectory has `terminals` set; it is only the next observation of
    the row before it. Rows after a success stay in, as OGBench has them: `terminals` (the task was solved in this row's
    state) only stops the backup there.

    Raises:
        TaskError: missing, truncated, lacking an array, or of another observation or action size.
    """
    relabel_dataset = import_ogbench("ogbench.relabel_utils").relabel_dataset
    visual = env_id.startswith("visual-")
    state_id = env_id.removeprefix("visual-")  # the same task; needs no renderer
    env = make_env(state_id)
    obs_shape = (64, 64, 3) if visual else env.observation_space.shape

    def as_observations(array):
        return {"image": array, "proprio": np.zeros((len(array), 0), np.float32)} if visual else array

    if sha256 is None and check_layout(path, or_six_arrays=True) == "six arrays":
        dataset = read_npz(path, obs_shape=obs_shape, action_shape=env.action_space.shape)
        dataset.observations = as_observations(dataset.observations)
        dataset.next_observations = as_observations(dataset.next_observations)
        return dataset
    env.reset(seed=0)  # the arm has a model from now on; the goal depends on no seed
    shapes = {
        "observations": obs_shape, "actions": env.action_space.shape,
        "terminals": (), "qpos": (env.unwrapped.model.nq,),
    }  # fmt: skip
    kinds = {"observations": "image" if visual else "number", "terminals": "flag"}
    if has_buttons(env_id):
        shapes["button_states"] = (env.unwrapped._num_buttons,)
    check_layout(path, shapes)
    with readable(path), np.load(path, allow_pickle=False) as file:
        arrays = {
            key: check_array(key, file[key], path, shape, kinds.get(key, "number")) for key, shape in shapes.items()
        }
    check_lengths(arrays, path, at_least=2)
    ends = arrays["terminals"].copy()  # what follows adds the file's last row
    ends[-1] = True
    rows = np.flatnonzero(~ends)  # those with a next row
    labels = {key: arrays[key][rows] for key in ("qpos", "button_states") if key in arrays}
    relabel_dataset(split_id(state_id)[2], env, labels)
    env.close()
    observations = arrays.pop("observations") if visual else arrays.pop("observations").astype(np.float32)
    terminals = labels["masks"] == 0
    return Dataset(
        observations=as_observations(observations[rows]), actions=arrays["actions"][rows].astype(np.float32),
        rewards=labels["rewards"], next_observations=as_observations(observations[rows + 1]),
        terminals=terminals, timeouts=ends[rows + 1] & ~terminals, source=str(path), sha256=sha256 or file_sha256(path),
    )  # fmt: skip


def has_buttons(env_id: str) -> bool:
    return "scene" in env_id or "puzzle" in env_id


def check_layout(path, keys=("observations", "actions", "terminals", "qpos"), or_six_arrays: bool = False) -> str:
    """Complain unless `path` is a whole .npz with these arrays; or, with `or_six_arrays`, with Dataset's.

    Looks only at the directory of the archive, which is at its end: cheap, and it notices a truncated file.
    """
    if not pathlib.Path(path).is_file():
        raise TaskError(f"no dataset file at {path}")
    with readable(path), zipfile.ZipFile(path) as file:
        names = {name.removesuffix(".npy") for name in file.namelist()}
    if or_six_arrays and {"rewards", "next_observations"} <= names:
        return "six arrays"
    missing = [key for key in keys if key not in names]
    if missing:
        raise TaskError(f"{path} has no array {missing[0]!r}; this task's file of OGBench has {', '.join(keys)}")
    return "ogbench"


# --- LOCAL COLLECTION ---


def trajectory_length(environment: str, kind: str) -> int:
    """Transitions per trajectory, as in OGBench's files."""
    return {"stitch": 200, "explore": 500}.get(kind, 2000 if "giant" in environment else 1000)


def collect(environment: str, kind: str, size: int, seed: int, processes: int | None = None) -> tuple[dict, dict]:
    """Arrays of OGBench's layout with `size` transitions (the last trajectory is cut), and others to validate with."""
    if "antmaze" in environment:
        ant_walker.load_walker()  # complain before any process starts
    length = trajectory_length(environment, kind)
    chunk = max(1, CHUNK // length) * length  # whole trajectories
    jobs = [(environment, kind, seed, 0, first, min(chunk, size - first)) for first in range(0, size, chunk)]
    jobs.append((environment, kind, seed, 1, 0, min(chunk, max(1, size // 20))))
    renders = environment.startswith("visual-")
    chunks = collect_in_chunks(collect_chunk, jobs, f"collecting {environment} {kind}", processes, renders)
    train = {key: np.concatenate([chunk[key] for chunk in chunks[:-1]]) for key in chunks[0]}
    return train, chunks[-1]


def collect_chunk(environment: str, kind: str, seed: int, split: int, first: int, size: int) -> dict:
    """`size` transitions in whole trajectories (but the last); `split` (0 train, 1 validation) and `first` seed it."""
    rng = np.random.default_rng([seed, split, first])
    maze = "maze" in environment
    options = {"disable_env_checker": True, "terminate_at_goal": False} | ({} if maze else {"mode": "data_collection"})
    with as_global_generator(legacy_generator(seed, split, first)):  # what OGBench itself draws from
        with building_ogbench(environment):
            env = gym.make(f"{environment}-v0", **options).unwrapped  # without its time limit
            env.action_space.seed(int(rng.integers(2**31)))
            env.reset(seed=int(rng.integers(2**31)))
        controller = _maze_controller(environment, kind, rng) if maze else _oracles(env, environment, kind)
        trajectory = _maze_trajectory if maze else _arm_trajectory
        chunks, left = [], size
        while left > 0:
            steps = min(left, trajectory_length(environment, kind))
            chunks.append(trajectory(env, environment, kind, controller, rng, steps))
            left -= steps
    types = {
        "terminals": bool,
        "button_states": np.int64,
        "observations": np.uint8 if env._ob_type == "pixels" else np.float32,
    }
    return {
        key: np.concatenate([chunk[key] for chunk in chunks]).astype(types.get(key, np.float32)) for key in chunks[0]
    }


def _rows(steps) -> dict:
    """A list of (obs, action, info of the step) as arrays. The last has no next row."""
    arrays = defaultdict(list)
    for obs, action, info in steps:
        arrays["observations"].append(obs)
        arrays["actions"].append(action)
        for key in ("qpos", "qvel", "button_states"):
            if f"prev_{key}" in info:
                arrays[key].append(info[f"prev_{key}"])
    arrays["terminals"] = [False] * (len(steps) - 1) + [True]
    return {key: np.array(array) for key, array in arrays.items()}


# The arm.

STACKING = {
    "single": (0, 0),
    "double": (0, 0.25),
    "triple": (0.05, 0.35),
    "quadruple": (0.1, 0.5),
}  # range of its probability


def _oracles(env, environment: str, kind: str) -> dict:
    """OGBench's controllers by what they move. `play`: open-loop plans with smooth noise. `noisy`: feedback."""
    style = "plan" if kind == "play" else "markov"
    settings = {"noise": 0.1, "noise_smoothing": 0.5} if kind == "play" else {"min_norm": 0.4}
    things = {"cube": ["cube"], "puzzle": ["button"]}.get(environment.removeprefix("visual-").split("-")[0])
    oracles = {}
    for thing in things or ["cube", "button", "drawer", "window"]:
        module = import_ogbench(f"ogbench.manipspace.oracles.{style}.{thing}_{style}")
        extra = {"gripper_always_closed": True} if "puzzle" in environment else {}
        if kind == "noisy" and "scene" in environment and thing == "cube":
            extra["max_step"] = 100
        oracles[thing] = getattr(module, f"{thing}_{style}".title().replace("_", "") + "Oracle")(
            env=env, **settings, **extra
        )
    return oracles


def _arm_trajectory(env, environment, kind, oracles, rng, steps) -> dict:
    """One random thing after the other is moved to a random place (or pressed, opened, ...)."""
    low, high = STACKING.get(environment.split("-")[-1], (0.5, 0.5))
    random_actions = 0.0 if kind == "play" else 0.2 if "puzzle" in environment else 0.1
    while True:
        obs, info = env.reset()
        stacking, noise = rng.uniform(low, high), rng.uniform(0.0, 0.1) * np.array([1.0, 1.0, 1.0, 3.0, 10.0])
        oracle = oracles[info["privileged/target_task"]]
        oracle.reset(obs, info)
        rows = []
        for _ in range(steps + 1):
            if rng.random() < random_actions:
                action = rng.uniform(-1.0, 1.0, 5)
            else:
                action = np.asarray(oracle.select_action(obs, info))
                if kind == "noisy":
                    action = action + noise * rng.standard_normal(5)
            action = np.clip(action, -1.0, 1.0).astype(np.float32)
            next_obs, _, _, _, info = env.step(action)
            rows.append((obs, action, info))
            obs = next_obs
            if oracle.done:
                _, info = env.set_new_target(p_stack=stacking)
                oracle = oracles[info["privileged/target_task"]]
                oracle.reset(obs, info)
        rows = _rows(rows)
        # OGBench drops trajectories of the scene whose cube leaves the camera's view other than into the drawer
        y, z = rows["qpos"][:, 15], rows["qpos"][:, 16]
        if "scene" not in environment or not ((y >= 0.29) | (y <= -0.3) & ((z < 0.06) | (z > 0.08))).any():
            return rows


# The mazes.


def _maze_controller(environment: str, kind: str, rng):
    """`act(env, direction) -> action` of the point or the ant, with OGBench's noise."""
    if "point" in environment:
        return lambda env, direction: direction + 0.5 * rng.standard_normal(2)
    walk, noise = ant_walker.load_walker(), 1.0 if kind == "explore" else 0.2
    return lambda env, direction: walk(env.get_ob(ob_type="states"), direction) + noise * rng.standard_normal(8)


def _maze_trajectory(env, environment, kind, act, rng, steps) -> dict:
    """One trajectory whose ant stays on its legs, if twenty attempts yield one: on its back it lies until the end.

    (`explore` is noise, and may fall.)
    """
    for _ in range(20):
        rows = _rows(_maze_steps(env, kind, act, rng, steps))
        if "ant" not in environment or kind == "explore" or ant_walker.upright(rows["qpos"][-1]) >= 0:
            break
    return rows


def _maze_steps(env, kind, act, rng, steps) -> list:
    """From a random cell by shortest paths to any goal (`navigate`), one nearby (`stitch`), or about (`explore`)."""
    free = [(int(r), int(c)) for r, c in np.argwhere(env.maze_map == 0)]
    start = free[rng.integers(len(free))]
    goals = [cell for cell in free if not _is_corridor(env.maze_map, cell)]
    if kind == "stitch":
        goals = [cell for cell, distance in _distances(free, start).items() if distance == 4] or [start]
    goal = goals[rng.integers(len(goals))]
    obs, _ = env.reset(options={"task_info": {"init_ij": start, "goal_ij": goal}})
    distances = _distances(free, goal)
    rows = []
    for step in range(steps + 1):
        if kind == "explore":
            if step % 10 == 0:
                direction = rng.standard_normal(2)
        else:
            direction = _waypoint(env, distances) - env.get_xy()
        direction = direction / max(np.hypot(*direction), 1e-6)
        action = np.clip(act(env, direction), -1.0, 1.0).astype(np.float32)
        next_obs, _, _, _, info = env.step(action)
        rows.append((obs, action, info))
        obs = next_obs
        if info["success"] and kind == "navigate":
            goal = goals[rng.integers(len(goals))]
            env.set_goal(goal_xy=env.add_noise(env.ij_to_xy(goal)))
            distances = _distances(free, goal)
    return rows


def _is_corridor(maze_map, cell) -> bool:
    """Free to two opposite sides only: no place to send anyone to."""
    r, c = cell
    north, south, west, east = maze_map[r - 1, c], maze_map[r + 1, c], maze_map[r, c - 1], maze_map[r, c + 1]
    return (north, south, west, east) in ((0, 0, 1, 1), (1, 1, 0, 0))


def _neighbours(cell):
    r, c = cell
    return (r - 1, c), (r, c - 1), (r + 1, c), (r, c + 1)


def _distances(free, goal) -> dict:
    """Steps to the goal's cell from every cell that has a way there, breadth first."""
    distances, queue = {goal: 0}, deque([goal])
    while queue:
        cell = queue.popleft()
        for neighbour in _neighbours(cell):
            if neighbour in free and neighbour not in distances:
                distances[neighbour] = distances[cell] + 1
                queue.append(neighbour)
    return distances


def _waypoint(env, distances) -> np.ndarray:
    """The goal, if it is in this cell, else the centre of the next cell on the way to it."""
    cell = env.xy_to_ij(env.get_xy())
    if distances.get(cell) == 0:
        return np.array(env.cur_goal_xy)
    best = min((c for c in (*_neighbours(cell), cell) if c in distances), key=distances.get, default=cell)
    return np.array(env.ij_to_xy(best))
