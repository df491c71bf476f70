"""`antmaze-{umaze,umaze-diverse,medium-play,medium-diverse,large-play,large-diverse}-v2`: D4RL's AntMaze, rebuilt.

A four-legged ant walks through a maze to a goal it is not told; the reward is 1 (and the end) within half a metre of
it. The environment is D4RL's definition of v2, rebuilt on the `mujoco` package: the same mazes, ant, noise and limits
(facts from the `d4rl` package). One difference is MuJoCo's own: since 2.1.2 a capsule's inertia is exact where it was
that of a cylinder.

The data is D4RL's HDF5 file, downloaded; without network it is collected here as D4RL collected and relabelled its own,
by the walking policy of `ant_walker.npz`, which does not stay at a goal as D4RL's does. See `collect_chunk`, README.md.
"""

import collections
import functools
import hashlib
import inspect
import math
import os
import pathlib
import sys

import gymnasium as gym
import mujoco
import numpy as np

from benchmarks.tasks import ant_walker
from benchmarks.tasks.ant_walker import WEIGHTS, load_walker, upright
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
    verify,
    write_once,
)
from benchmarks.tasks.download import DownloadError, download_from
from benchmarks.tasks.pointmaze import MAPS  # which are D4RL's

ENV_IDS = tuple(
    f"antmaze-{name}-v2"
    for name in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
)
# D4RL's own server, which was down for weeks in 2026, and somebody's copy of its files on the hub
URLS = (
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/ant_maze_v2",
    "https://huggingface.co/datasets/imone/D4RL/resolve/main",
)
FILES = {
    f"antmaze-{name}-v2": f"Ant_maze_{maze}_noisy_multistart_{starts}_multigoal_{goals}_sparse_fixed.hdf5"
    for name, maze, starts, goals in (
        ("umaze", "u-maze", False, False), ("umaze-diverse", "u-maze", True, True),
        ("medium-play", "big-maze", True, False), ("medium-diverse", "big-maze", True, True),
        ("large-play", "hardest-maze", True, False), ("large-diverse", "hardest-maze", True, True),
    )
}  # fmt: skip
SHA256: dict[str, str] = {}  # of the published files, where someone has them; without, the first download's is kept
# (row, column) of the goals that D4RL's collection draws from in `play`, but for medium's last: there D4RL has (6, 5),
# behind the evaluation's goal cell (6, 6), and our ants cut that corner so that no row was rewarded
PLAY_GOALS = {
    "medium": [(2, 6), (5, 1), (6, 6)],
    "large": [(1, 6), (3, 5), (3, 10), (5, 2), (7, 4), (7, 6), (7, 9)],
}
DATASET_SIZE = 1_000_000
MAX_STEPS = {"umaze": 700, "medium": 1000, "large": 1000}
CELL = 4.0  # m
SUBSTEPS = 5  # of 0.02 s: a decision every 0.1 s
GOAL_RADIUS = 0.5  # m


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """One ant maze. Observation (29,) float32: qpos[:15], qvel[:14]; action (8,) in [-1, 1]; `info["success"]`."""
    name = env_id.split("-")[1]
    return gym.wrappers.TimeLimit(AntMaze(MAPS[name], render_mode), MAX_STEPS[name])


# --- THE ANT ---


def ant_spec() -> mujoco.MjSpec:
    """Gymnasium's ant.xml as D4RL changed it: time step, contacts, torques of 30 x action."""
    folder = os.path.join(os.path.dirname(gym.__file__), "envs", "mujoco", "assets")
    spec = mujoco.MjSpec.from_file(os.path.join(folder, "ant.xml"))
    spec.option.timestep = 0.02
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_RK4
    # One ant is one island: a twentieth faster, same states (MuJoCo before 3.3 has no islands to switch off).
    spec.option.disableflags |= getattr(mujoco.mjtDisableBit, "mjDSBL_ISLAND", 0)
    for geom in spec.geoms:
        soft_contact(geom)
    for actuator in spec.actuators:
        actuator.gear[0] = 30.0
    return spec


def soft_contact(geom) -> None:
    """D4RL's contact parameters, of every geom (width, mid point and power of solimp stay MuJoCo's)."""
    geom.solref = [0.02, 1.0]
    geom.solimp = [0.8, 0.8, 0.01, 0.5, 2.0]


def noisy_ant_state(model, rng) -> tuple[np.ndarray, np.ndarray]:
    """D4RL's reset: qpos (15,) = initial + U(-0.1, 0.1) in every entry, qvel (14,) = 0.1 N(0, 1)."""
    qpos = model.qpos0 + rng.uniform(-0.1, 0.1, model.nq)
    qpos[3:7] /= np.linalg.norm(qpos[3:7])  # as MuJoCo 2's forward pass did in place
    return qpos, 0.1 * rng.standard_normal(model.nv)


def ant_observation(data) -> np.ndarray:
    """(29,) float32: position and orientation of the torso (7), joint angles (8), their velocities (6 + 8)."""
    obs = np.empty(29, np.float32)
    obs[:15], obs[15:] = data.qpos, data.qvel
    return obs


# --- THE MAZE ---


class Maze:
    """A grid of 4 m cells whose reset cell has its centre at the origin; x runs along columns, y along rows."""

    maze_size_scaling = CELL

    def __init__(self, rows: list[str]):
        self.maze_map = [[1 if cell == "#" else 0 for cell in row] for row in rows]
        cells = {(r, c): cell for r, row in enumerate(rows) for c, cell in enumerate(row)}
        self.free = [cell for cell, letter in cells.items() if letter != "#"]
        self.reset_cell = next(cell for cell, letter in cells.items() if letter == "R")
        self.goal_cell = next(cell for cell, letter in cells.items() if letter == "G")

    def cell_rowcol_to_xy(self, cell) -> np.ndarray:
        """Centre of (row, column), in metres."""
        return CELL * np.array([cell[1] - self.reset_cell[1], cell[0] - self.reset_cell[0]], float)

    def cell_xy_to_rowcol(self, xy) -> tuple[int, int]:
        """The cell around (x, y)."""
        return round(xy[1] / CELL) + self.reset_cell[0], round(xy[0] / CELL) + self.reset_cell[1]

    def neighbours(self, cell):
        r, c = cell
        return [n for n in ((r, c - 1), (r, c + 1), (r + 1, c), (r - 1, c)) if not self.maze_map[n[0]][n[1]]]

    def wall_boxes(self):
        """Rectangles of wall cells that cover all of them: (first row, first column, last row, last column)."""
        wall, covered, boxes = (
            np.array(self.maze_map, bool),
            np.zeros((len(self.maze_map), len(self.maze_map[0])), bool),
            [],
        )
        for r, c in np.argwhere(wall):
            if covered[r, c]:
                continue
            c1, r1 = c, r
            while c1 + 1 < wall.shape[1] and wall[r, c1 + 1]:
                c1 += 1
            while r1 + 1 < wall.shape[0] and wall[r1 + 1, c : c1 + 1].all():
                r1 += 1
            covered[r : r1 + 1, c : c1 + 1] = True
            boxes.append((int(r), int(c), int(r1), int(c1)))
        return boxes


class AntMaze(gym.Env):
    """D4RL's AntMaze v2, without its time limit. `goal` (x, y), `model`, `data` and `maze` may be read."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    action_space = gym.spaces.Box(-1.0, 1.0, (8,), np.float32)
    observation_space = gym.spaces.Box(-np.inf, np.inf, (29,), np.float32)

    def __init__(self, rows: list[str], render_mode: str | None = None):
        self.maze, self.render_mode, self.renderer = Maze(rows), render_mode, None
        spec = ant_spec()
        for r0, c0, r1, c1 in self.maze.wall_boxes():
            xy = (self.maze.cell_rowcol_to_xy((r0, c0)) + self.maze.cell_rowcol_to_xy((r1, c1))) / 2
            size = [CELL / 2 * (c1 - c0 + 1), CELL / 2 * (r1 - r0 + 1), 1.0]
            wall = spec.worldbody.add_geom(
                type=mujoco.mjtGeom.mjGEOM_BOX, size=size, pos=[*xy, 1.0], contype=1, conaffinity=1, condim=3,
                margin=0.01, friction=[1.0, 0.5, 0.5], rgba=[0.7, 0.5, 0.3, 1.0],
            )  # fmt: skip
            soft_contact(wall)
        site = spec.worldbody.add_site(name="goal", type=mujoco.mjtGeom.mjGEOM_SPHERE, rgba=[0.9, 0.1, 0.1, 0.6])
        site.size = [GOAL_RADIUS, 0.0, 0.0]
        self.model = spec.compile()
        self.data = mujoco.MjData(self.model)
        self.goal = self.maze.cell_rowcol_to_xy(self.maze.goal_cell)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        rng = self.np_random
        self.goal = _point_near(rng, self.maze, self.maze.goal_cell)
        self.model.site("goal").pos[:2] = self.goal
        mujoco.mj_resetData(self.model, self.data)
        self.set_state(*noisy_ant_state(self.model, rng))
        return ant_observation(self.data), {"success": False}

    def set_state(self, qpos, qvel) -> None:
        """Put the ant somewhere: qpos (15,), qvel (14,)."""
        self.data.qpos[:], self.data.qvel[:] = qpos, qvel
        mujoco.mj_forward(self.model, self.data)

    def step(self, action):
        self.data.ctrl[:] = action  # MuJoCo clips it to [-1, 1]
        mujoco.mj_step(self.model, self.data, nstep=SUBSTEPS)
        x, y = self.data.qpos[:2]
        success = math.hypot(x - self.goal[0], y - self.goal[1]) <= GOAL_RADIUS
        return ant_observation(self.data), float(success), success, False, {"success": success}

    def render(self):
        """The maze from above, (480, 640, 3) uint8."""
        if self.renderer is None:
            self.renderer = mujoco.Renderer(self.model, 480, 640)
            self.camera = mujoco.MjvCamera()
            height, width = np.array(self.maze.maze_map).shape
            self.camera.lookat[:2] = self.maze.cell_rowcol_to_xy(((height - 1) / 2, (width - 1) / 2))
            self.camera.distance, self.camera.elevation, self.camera.azimuth = (
                1.3 * CELL * max(height, 0.75 * width),
                -90,
                90,
            )
        self.renderer.update_scene(self.data, self.camera)
        return self.renderer.render()

    def close(self):
        if self.renderer is not None:
            self.renderer.close()
            self.renderer = None


# --- THE DATA ---

OBS, ACTIONS = 29, 8
KEYS = {"observations": (OBS,), "actions": (ACTIONS,), "rewards": (), "terminals": (), "timeouts": ()}
JUMP = 1.0  # metres in one decision (0.1 s) that no ant moves: the next row belongs to another trajectory
INFO_KEYS = {"infos/goal": (2,), "infos/qpos": (15,), "infos/qvel": (14,)}


def load_dataset(env_id: str, path=None, size: int | None = None, seed: int = 0, source: str = "auto") -> Dataset:
    """D4RL's file, or data collected here in its place and in its layout.

    Args:
        path: an HDF5 file of D4RL's layout (or an .npz of Dataset's six arrays) instead.
        size: transitions to collect, for local data; None: D4RL's 1,000,000.
        seed: of a local collection.
        source: `download`, `local`, or `auto`: local if the file cannot be downloaded.
    """
    if path is not None:
        if pathlib.Path(path).suffix == ".npz":
            return read_npz(path, obs_shape=(OBS,), action_shape=(ACTIONS,))
        return read_hdf5(path)
    file, reason = cache_dir() / "antmaze" / FILES[env_id], "--dataset-source local was asked for"
    if source != "local":
        try:
            with one_at_a_time(file):
                urls = [f"{url}/{FILES[env_id]}" for url in URLS]
                digest = download_from(urls, file, SHA256.get(env_id), functools.partial(read_hdf5, quiet=True))
            return read_hdf5(file, digest)
        except DownloadError as error:
            if source == "download":
                raise
            reason = str(error)
    size = DATASET_SIZE if size is None else size
    announce_local_data(env_id, reason, f"{size:,} transitions, collected by the walking policy of this repository")
    limit = MAX_STEPS[env_id.split("-")[1]]
    if size < 2 * limit:
        raise TaskError(f"a dataset of {size} transitions is shorter than two episodes ({2 * limit}); ask for more")
    parts = (
        ant_walker,
        ant_spec,
        soft_contact,
        noisy_ant_state,
        Maze,
        AntMaze,
        collect,
        collect_chunk,
        _draw_start_and_goal,
        _point_near,
        _ways_to,
        _waypoint,
    )
    recipe = "".join(inspect.getsource(part) for part in parts) + file_sha256(WEIGHTS)
    recipe += f"{PLAY_GOALS} {TRAJECTORY} {CHUNK} {REST} {GOAL_RADIUS} {SUBSTEPS} {CELL} {MAPS}"
    recipe = hashlib.sha256(recipe.encode()).hexdigest()[:8]
    file = cache_dir() / "antmaze-local" / f"{env_id}-{size}-seed{seed}-{recipe}.hdf5"
    with one_at_a_time(file):
        if not os.path.isfile(file):
            arrays, quality = collect(env_id, size, seed)
            write_once(file, lambda out: _write_hdf5(out, arrays, quality))
            print("collected:", ", ".join(f"{name} {value:.3g}" for name, value in quality.items()), file=sys.stderr)
        digest = verify(file, functools.partial(read_hdf5, quiet=True))
    dataset = read_hdf5(file, digest)
    dataset.source, dataset.local = f"collected locally by benchmarks/tasks/antmaze.py, seed {seed}", True
    return dataset


def read_hdf5(path, sha256: str | None = None, quiet: bool = False) -> Dataset:
    """Read a file of D4RL's layout; transitions as D4RL's `qlearning_dataset` makes them.

    Rows are consecutive steps, and a row's next observation is the next row's. The row where `timeouts` is set has no
    next row of its own trajectory and is left out, as is the file's last row.

    A row from which the ant jumps more than `JUMP` to the next one counts as if `timeouts` were set there: the
    trajectory was cut, and a file whose flags do not say so would teach that the ant flies. One line on stderr gives
    the counts, unless `quiet`. A terminal row stays: it needs no next row, and a new trajectory may well begin there.

    Raises:
        TaskError: missing, truncated, lacking a key, or of another observation or action size.
    """
    import h5py  # takes half a second

    path = pathlib.Path(path)
    if not path.is_file():
        raise TaskError(f"no dataset file at {path}")
    arrays = {}
    try:
        with h5py.File(path, locking=False) as file:  # only read, also where the file system has no locks
            for key, shape in (KEYS | INFO_KEYS).items():
                if key not in file:
                    if key in INFO_KEYS:
                        continue
                    raise TaskError(f"{path} has no {key!r}; an AntMaze file of D4RL has {', '.join(KEYS | INFO_KEYS)}")
                kind = "flag" if key in ("terminals", "timeouts") else "number"
                arrays[key] = check_array(key, file[key][()], path, shape, kind)
    except (OSError, RuntimeError, AttributeError, KeyError, TypeError) as error:  # a group is no array: TypeError
        raise TaskError(
            f"{path} is not a readable HDF5 file, or it is truncated ({str(error).splitlines()[0]})"
        ) from error
    check_lengths(arrays, path, at_least=2)
    timeouts, terminals = arrays["timeouts"], arrays["terminals"]
    moved = np.linalg.norm(np.diff(arrays["observations"][:, :2].astype(np.float64), axis=0), axis=1)  # (N - 1,) metres
    jumps = np.append(moved > JUMP, False) & ~terminals
    if (jumps & ~timeouts).any() and not quiet:
        counts = f"timeouts mark {timeouts.sum()} rows, {jumps.sum()} rows jump by more than {JUMP:.0f} m"
        unmarked = f"{(jumps & ~timeouts).sum()} of them unmarked"
        print(f"{path}: {counts} ({unmarked}); both end a trajectory", file=sys.stderr)
    kept = ~(timeouts | jumps)
    kept[-1] = False
    if not kept.any():
        raise TaskError(f"{path} has no row whose next row belongs to the same trajectory; is it an AntMaze file?")
    cut = np.append(~kept[1:], True) & ~terminals  # the last kept row of a trajectory that only ran out of time
    return Dataset(
        observations=arrays["observations"][kept].astype(np.float32),
        actions=arrays["actions"][kept].astype(np.float32),
        rewards=arrays["rewards"][kept].astype(np.float32),
        next_observations=arrays["observations"][np.flatnonzero(kept) + 1].astype(np.float32),
        terminals=terminals[kept], timeouts=cut[kept], source=str(path), sha256=sha256 or file_sha256(path),
        infos={key.removeprefix("infos/"): arrays[key][kept] for key in INFO_KEYS if key in arrays},
    )  # fmt: skip


def _write_hdf5(file, arrays: dict, attributes: dict) -> None:
    import h5py

    with h5py.File(file, "w") as out:
        for key, array in arrays.items():
            out.create_dataset(key, data=array, compression="gzip", compression_opts=1, shuffle=True)
        out.attrs.update(attributes)


# --- LOCAL COLLECTION ---


def collect(env_id: str, size: int, seed: int, processes: int | None = None) -> tuple[dict, dict]:
    """D4RL's protocol with our walker: arrays of D4RL's layout, and how well it went.

    The file has one goal, near the centre of the evaluation's goal cell: a row is terminal with reward 1 if its next
    position is within `GOAL_RADIUS` of it, whatever the ant was doing there, and the trajectory goes on.

    Returns the arrays (size rows) and, of the whole collection, the number of `trajectories`, the `goals_reached` by
    each of them, the `mean_speed` (m/s, from goal to goal, in a straight line), and the shares of the trajectories
    that `fell` and of those with a rewarded row (`task_success`), and the number of `rewarded_rows`.
    """
    load_walker()  # complain before any process starts
    sizes = [min(CHUNK, size - first) for first in range(0, size, CHUNK)]
    if len(sizes) > 1 and sizes[-1] < 1_000:  # no chunk of a few steps
        sizes[-2:] = [sizes[-2] + sizes[-1]]
    jobs = [(env_id, seed, number, rows) for number, rows in enumerate(sizes)]
    chunks, counts = zip(*collect_in_chunks(collect_chunk, jobs, f"collecting {env_id}", processes))
    arrays = {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}
    total = sum(counts, collections.Counter())
    trajectories = total["trajectories"]
    return arrays, {
        "trajectories": trajectories, "goals_reached": total["reached"] / trajectories,
        "mean_speed": total["metres"] / max(0.1, total["seconds"]), "fell": total["fell"] / trajectories,
        "task_success": total["success"] / trajectories, "rewarded_rows": int(arrays["terminals"].sum()),
    }  # fmt: skip


def collect_chunk(env_id: str, seed: int, number: int, size: int) -> tuple[dict, collections.Counter]:
    """`size` rows of trajectories of 1,001 steps: start and goal are drawn, and the walker goes there, with noise.

    `umaze` starts at the reset cell and heads for the task's goal cell. `play` draws both from the hand-picked cells,
    `diverse` from all free ones. The ant never stops: `REST` steps after it was first within `GOAL_RADIUS` of its goal,
    around which it walks meanwhile, another is drawn (in `umaze` in the same cell).
    """
    rng = np.random.default_rng([seed, number])
    _, maze_name, *variant = env_id.removesuffix("-v2").split("-")
    env, walk = AntMaze(MAPS[maze_name]), load_walker()
    maze = env.maze
    env.reset(seed=int(rng.integers(2**31)))
    env.goal = task_goal = _point_near(np.random.default_rng(seed), maze, maze.goal_cell)  # the file's
    rows, counts = collections.defaultdict(list), collections.Counter()
    while len(rows["rewards"]) < size:
        start, cell = _draw_start_and_goal(rng, maze, maze_name, variant)
        qpos, qvel = noisy_ant_state(env.model, rng)
        if variant:  # several starts: anywhere near the cell's centre
            qpos[:2] = np.maximum(maze.cell_rowcol_to_xy(start) + rng.uniform(0, 1, 2), 0.0)
        env.set_state(qpos, qvel)
        obs, goal, success, counts["trajectories"] = ant_observation(env.data), None, False, counts["trajectories"] + 1
        for step in range(TRAJECTORY):
            if goal is None:
                goal, following = _point_near(rng, maze, cell), _ways_to(maze, cell)
                origin, began, arrived = obs[:2].copy(), step, None
            waypoint = _waypoint(rng, maze, obs[:2], goal, following)
            action = np.clip(walk(obs, waypoint - obs[:2]) + 0.2 * rng.standard_normal(ACTIONS), -1, 1)
            action = action.astype(np.float32)
            qpos, qvel = env.data.qpos.copy(), env.data.qvel.copy()
            next_obs, reward, terminated, _, _ = env.step(action)
            timeout = step == TRAJECTORY - 1 or len(rows["rewards"]) + 1 == size
            row = (obs, action, reward, terminated, timeout, task_goal, qpos, qvel)
            for key, value in zip((*KEYS, *INFO_KEYS), row):
                rows[key].append(value)
            obs, success = next_obs, success or terminated
            if arrived is None and np.hypot(*(obs[:2] - goal)) <= GOAL_RADIUS:
                arrived, counts["reached"] = step, counts["reached"] + 1
                counts["metres"] += float(np.hypot(*(goal - origin)))
                counts["seconds"] += 0.1 * (step + 1 - began)
            if arrived is not None and step >= arrived + REST:
                goal, (_, cell) = None, _draw_start_and_goal(rng, maze, maze_name, variant)
            if timeout:
                break
        counts["fell"] += upright(obs) < 0  # D4RL lets it lie on its back, and so do we
        counts["success"] += success
    types = dict.fromkeys(rows, np.float32) | {"terminals": bool, "timeouts": bool}
    return {key: np.array(value, types[key]) for key, value in rows.items()}, counts


TRAJECTORY = 1_001  # steps, D4RL's; the last one has no next row
CHUNK = 10 * TRAJECTORY  # rows of one job
# Steps around a goal before the next is drawn. D4RL's ants stay for the rest of their trajectory: ours, which walks
# 1 m/s and arrives early, would then be shown circling in most rows, and seldom walking (our choice; see README.md).
REST = 50


def _draw_start_and_goal(rng, maze: Maze, name: str, variant: list[str]):
    """Two cells: where to start and where to go."""
    if not variant:
        return maze.reset_cell, maze.goal_cell
    goals = PLAY_GOALS[name] if variant == ["play"] else maze.free
    starts = [maze.reset_cell, *goals] if variant == ["play"] else maze.free
    goal = goals[rng.integers(len(goals))]
    starts = [cell for cell in starts if cell != goal]
    return starts[rng.integers(len(starts))], goal


def _point_near(rng, maze: Maze, cell) -> np.ndarray:
    """D4RL's goal (2,) for a cell: its centre and two noises, clipped at 0."""
    return np.maximum(maze.cell_rowcol_to_xy(cell) + rng.uniform(0, 1, 2) + rng.uniform(0, 0.5, 2), 0.0)


def _ways_to(maze: Maze, goal_cell) -> dict:
    """Each free cell's neighbour on a shortest way to `goal_cell`, breadth first from there."""
    following, queue = {goal_cell: goal_cell}, collections.deque([goal_cell])
    while queue:
        for neighbour in maze.neighbours(queue[0]):
            if neighbour not in following:
                following[neighbour] = queue[0]
                queue.append(neighbour)
        queue.popleft()
    return following


def _waypoint(rng, maze: Maze, xy, goal, following: dict) -> np.ndarray:
    """Where to walk now (2,): the goal from its own cell and the next to it, else near the next cell's centre.

    D4RL draws it anew at every step, so that the ant heads for the next cell but one as soon as it crosses a border.
    """
    ahead = following.get(maze.cell_xy_to_rowcol(xy))
    if ahead is None or following[ahead] == ahead:  # the goal's cell alone follows itself; None: a leg over a wall
        return goal
    return maze.cell_rowcol_to_xy(ahead) + rng.uniform(0, 1, 2)
