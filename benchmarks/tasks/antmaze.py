"""`antmaze-{umaze,umaze-diverse,medium-play,medium-diverse,large-play,large-diverse}-v2`: D4RL's AntMaze, rebuilt.

A four-legged ant walks through a maze to a goal it is not told; the reward is 1 (and the end) within half a metre of
it. The environment is D4RL's definition of v2, rebuilt on the `mujoco` package: the same mazes, ant, noise and limits
(facts from the `d4rl` package). One difference is MuJoCo's own: since 2.1.2 a capsule's inertia is exact where it was
that of a cylinder.

The data is D4RL's HDF5 file, downloaded; without network it is collected here after D4RL's protocol, by the walking
policy of `ant_walker.py` along shortest paths. See `load_dataset` and benchmarks/tasks/README.md.
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
# (row, column) of the goals that D4RL's collection draws from in `play`
PLAY_GOALS = {
    "medium": [(2, 6), (5, 1), (6, 5)],
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
        # the goal cell's centre, its two noises, and D4RL's clip at 0
        self.goal = self.maze.cell_rowcol_to_xy(self.maze.goal_cell) + rng.uniform(0, 1, 2) + rng.uniform(0, 0.5, 2)
        self.goal = np.maximum(self.goal, 0.0)
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
        ant_spec,
        soft_contact,
        noisy_ant_state,
        Maze,
        AntMaze,
        collect,
        collect_chunk,
        _draw_start_and_goal,
        _next_leg,
    )
    recipe = "".join(inspect.getsource(part) for part in parts) + file_sha256(WEIGHTS)
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

    Returns the arrays (size rows) and, of the whole collection, `legs_reached` and `legs_fallen` (shares of the
    waypoint legs), `mean_speed` (m/s, over reached legs), `commanded_goals_reached` and `task_success` (shares of
    trajectories).
    """
    load_walker()  # complain before any process starts
    sizes = [min(10_000, size - first) for first in range(0, size, 10_000)]
    if len(sizes) > 1 and sizes[-1] < 1_000:  # no chunk of a few steps
        sizes[-2:] = [sizes[-2] + sizes[-1]]
    jobs = [(env_id, seed, number, rows) for number, rows in enumerate(sizes)]
    chunks, counts = zip(*collect_in_chunks(collect_chunk, jobs, f"collecting {env_id}", processes))
    arrays = {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}
    total = sum(counts, collections.Counter())
    legs, trajectories = max(1, total["legs"]), max(1, total["trajectories"])
    return arrays, {
        "legs_reached": total["reached"] / legs, "legs_fallen": total["fallen"] / legs,
        "mean_speed": total["metres"] / max(0.1, total["seconds"]), "trajectories": trajectories,
        "commanded_goals_reached": total["commanded"] / trajectories, "task_success": total["success"] / trajectories,
    }  # fmt: skip


def collect_chunk(env_id: str, seed: int, number: int, size: int) -> tuple[dict, collections.Counter]:
    """`size` rows of trajectories: start and goal are drawn, and the walker follows the shortest way, with noise.

    `umaze` starts at the reset cell and heads for the task's goal. `play` draws both from the hand-picked cells,
    `diverse` from all free ones. A trajectory ends at the task's goal (terminal), at the one it was sent to, or at the
    time limit. The reward and the task's goal are those of the evaluation, whose goal cell is one of the drawn ones.
    """
    rng = np.random.default_rng([seed, number])
    _, maze_name, *variant = env_id.removesuffix("-v2").split("-")
    env, walk = AntMaze(MAPS[maze_name]), load_walker()
    maze = env.maze
    env.reset(seed=int(rng.integers(2**31)))
    rows, counts = collections.defaultdict(list), collections.Counter()
    while len(rows["rewards"]) < size:
        env.reset()
        start, cell = _draw_start_and_goal(rng, maze, maze_name, variant)
        goal = env.goal if cell == maze.goal_cell else np.maximum(
            maze.cell_rowcol_to_xy(cell) + rng.uniform(0, 1, 2) + rng.uniform(0, 0.5, 2), 0.0
        )  # fmt: skip
        qpos, qvel = noisy_ant_state(env.model, rng)
        if variant:  # several starts: anywhere near the cell's centre
            qpos[:2] = np.maximum(maze.cell_rowcol_to_xy(start) + rng.uniform(0, 1, 2), 0.0)
        env.set_state(qpos, qvel)
        obs, leg, counts["trajectories"] = ant_observation(env.data), None, counts["trajectories"] + 1
        for step in range(MAX_STEPS[maze_name]):
            if leg is None:
                leg = _next_leg(rng, maze, obs[:2], goal)
                leg_start, leg_steps = obs[:2].copy(), 0
                counts["legs"] += 1
            action = np.clip(walk(obs, leg[0] - obs[:2]) + 0.2 * rng.standard_normal(ACTIONS), -1.0, 1.0).astype(
                np.float32
            )
            qpos, qvel = env.data.qpos.copy(), env.data.qvel.copy()
            next_obs, reward, terminated, _, _ = env.step(action)
            leg_steps += 1
            arrived = bool(np.hypot(*(next_obs[:2] - goal)) <= GOAL_RADIUS)
            at_waypoint = bool(np.hypot(*(next_obs[:2] - leg[0])) <= leg[1])
            end_of_chunk = len(rows["rewards"]) + 1 == size
            timeout = not terminated and (arrived or end_of_chunk or step == MAX_STEPS[maze_name] - 1)
            row = (obs, action, reward, terminated, timeout, goal, qpos, qvel)
            for key, value in zip((*KEYS, *INFO_KEYS), row):
                rows[key].append(value)
            obs = next_obs
            fallen = upright(obs) < 0  # D4RL lets it lie on its back, and so do we
            if at_waypoint or terminated:
                counts["reached"] += 1
                counts["metres"] += float(np.hypot(*(obs[:2] - leg_start)))
                counts["seconds"] += leg_steps * 0.1
            elif fallen and leg_steps == LEG_STEPS:
                counts["fallen"] += 1
            if at_waypoint or terminated or leg_steps == LEG_STEPS:
                leg = None
            elif timeout:
                counts["legs"] -= 1  # cut short, neither reached nor missed
            if terminated or timeout:
                counts["commanded"] += arrived
                counts["success"] += terminated
                break
    types = dict.fromkeys(rows, np.float32) | {"terminals": bool, "timeouts": bool}
    return {key: np.array(value, types[key]) for key, value in rows.items()}, counts


LEG_STEPS = 150  # decisions after which a way to a waypoint counts as missed and is planned anew


def _draw_start_and_goal(rng, maze: Maze, name: str, variant: list[str]):
    """Two cells: where to start and where to go."""
    if not variant:
        return maze.reset_cell, maze.goal_cell
    goals = PLAY_GOALS[name] if variant == ["play"] else maze.free
    starts = [maze.reset_cell, *goals] if variant == ["play"] else maze.free
    goal = goals[rng.integers(len(goals))]
    starts = [cell for cell in starts if cell != goal]
    return starts[rng.integers(len(starts))], goal


def _next_leg(rng, maze: Maze, xy, goal):
    """The point to walk to next and how near counts as there: the goal, or a point in the next cell on the way."""
    cell, goal_cell = maze.cell_xy_to_rowcol(xy), maze.cell_xy_to_rowcol(goal)
    following, queue = {goal_cell: goal_cell}, collections.deque([goal_cell])
    while queue and cell not in following:  # breadth first from the goal: each cell's neighbour towards it
        for neighbour in maze.neighbours(queue[0]):
            if neighbour not in following:
                following[neighbour] = queue[0]
                queue.append(neighbour)
        queue.popleft()
    following = following.get(cell, goal_cell)
    if following == goal_cell:
        return goal, GOAL_RADIUS
    return maze.cell_rowcol_to_xy(following) + rng.uniform(0, 1, 2), 1.0
