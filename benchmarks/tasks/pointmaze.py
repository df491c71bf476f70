"""`pointmaze-{umaze,medium,large}-v0`: a point mass with inertia looks for one fixed goal, and nothing tells it where.

The environment is gymnasium-robotics' PointMaze with a fixed start cell and goal, a reward of 1 (and the end of the
episode) within 0.45 m of the goal, else 0, and a decision every 0.15 s. Observation: x, y, vx, vy.

The data is collected here, in seconds, by a controller that drives from random cells to random cells along random
routes with noise, and now and then pushes on in some direction, walls or not. Most trajectories go elsewhere (in the
medium maze 31 % end at the goal), so a policy that imitates them wanders; the pieces of a good route are all there, and
joining them is the task of the critic.
"""

import functools
import hashlib
import heapq
import inspect
import os
import sys

import gymnasium as gym
import numpy as np
from tqdm import tqdm

from benchmarks.tasks.dataset import Dataset, TaskError, cache_dir, one_at_a_time, read_npz, verify, write_npz

# `#` wall, `R` reset cell, `G` goal cell. The mazes and their start and goal are D4RL's (AntMaze's evaluation mazes).
MAPS = {
    "umaze": ["#####", "#R..#", "###.#", "#G..#", "#####"],
    "medium": ["########", "#R.##..#", "#..#...#", "##...###", "#..#...#", "#.#..#.#", "#...#.G#", "########"],
    "large": [
        "############", "#R...#.....#", "#.##.#.#.#.#", "#......#...#", "#.####.###.#",
        "#..#.#.....#", "##.#.#.#.###", "#..#...#.G.#", "############",
    ],
}  # fmt: skip
MAX_STEPS = {"umaze": 40, "medium": 60, "large": 90}  # decisions: over twice what a direct drive takes
DATASET_SIZE = {"umaze": 20_000, "medium": 40_000, "large": 80_000}  # transitions
ENV_IDS = tuple(f"pointmaze-{name}-v0" for name in MAPS)
GOAL_PROBABILITY = 0.15  # of heading for the task's goal rather than for a random cell
PUSH_PROBABILITY = 0.25  # of pushing on in a random direction for a while, at a waypoint: how the data meets the walls
SUBSTEPS = 15  # simulation steps of 0.01 s per decision: a short horizon is what makes this task learnable in minutes


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """One point maze. Observation (4,) float32; action (2,) in [-1, 1], a force; `info["success"]` at the goal."""
    name = env_id.split("-")[1]
    env = gym.wrappers.TimeLimit(_point_maze_class()(name, render_mode=render_mode), MAX_STEPS[name])
    space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    return gym.wrappers.TransformObservation(env, lambda obs: obs["observation"].astype(np.float32), space)


@functools.cache
def _point_maze_class():
    """The environment's class, made on first use: importing gymnasium-robotics takes seconds and prints a notice."""
    stderr, sys.stderr = sys.stderr, open(os.devnull, "w")
    try:
        from gymnasium_robotics.envs.maze.point_maze import PointMazeEnv
    finally:
        sys.stderr.close()
        sys.stderr = stderr

    class FixedGoalPointMaze(PointMazeEnv):
        """PointMaze whose goal has no noise (only the start has), deciding every SUBSTEPS simulation steps."""

        def __init__(self, name: str, render_mode: str | None = None):
            letters = {"#": 1, ".": 0, "R": "r", "G": "g"}
            maze_map = [[letters[cell] for cell in row] for row in MAPS[name]]
            super().__init__(maze_map=maze_map, render_mode=render_mode, reward_type="sparse", continuing_task=False)
            self.point_env.frame_skip = SUBSTEPS

        def reset(self, *, seed=None, options=None):
            obs, info = super().reset(seed=seed, options=options)
            self.goal = self.maze.unique_goal_locations[0].copy()
            self.update_target_site_pos()
            obs["desired_goal"] = self.goal.copy()
            return obs, info

    return FixedGoalPointMaze


def load_dataset(env_id: str, path=None, size: int | None = None, seed: int = 0, source: str = "auto") -> Dataset:
    """The task's dataset, from the cache or collected now. The cache's name contains what the content depends on.

    There is nothing to download: this data is the task's own, so it is not marked as local.
    """
    if path is not None:
        return read_npz(path, obs_shape=(4,), action_shape=(2,))
    if source == "download":
        raise TaskError(
            f"{env_id} has no published file; its data is collected here (leave out --dataset-source download)"
        )
    name = env_id.split("-")[1]
    size = DATASET_SIZE[name] if size is None else size
    if size < MAX_STEPS[name]:
        raise TaskError(
            f"a dataset of {size} transitions is shorter than one episode ({MAX_STEPS[name]}); ask for more"
        )
    recipe = hashlib.sha256(inspect.getsource(sys.modules[__name__]).encode()).hexdigest()[:8]
    path = cache_dir() / "pointmaze" / f"{env_id}-{size}-seed{seed}-{recipe}.npz"
    with one_at_a_time(path):
        if os.path.isfile(path):
            dataset = read_npz(path, verify(path, read_npz), obs_shape=(4,), action_shape=(2,))
        else:
            dataset = collect(env_id, size, seed)
            dataset.sha256 = write_npz(path, dataset)
    dataset.source = f"collected locally by benchmarks/tasks/pointmaze.py, seed {seed}"
    return dataset


def collect(env_id: str, size: int, seed: int) -> Dataset:
    """Drive from random cells to random cells until `size` transitions are recorded (the last trajectory is cut there).

    An episode starts in a random cell and heads for one random cell after the other, each along a route of its own:
    the shortest path for random lengths of the cells, so that every way around a wall is taken. It ends at the task's
    goal (terminal) or at the time limit (timeout), as the task's own episodes do.
    """
    rng = np.random.default_rng(seed)
    env = make_env(env_id)
    maze, point = env.unwrapped.maze, env.unwrapped.point_env
    free = [(r, c) for r, row in enumerate(maze.maze_map) for c, cell in enumerate(row) if cell != 1]
    goal_cell = next((r, c) for r, c in free if maze.maze_map[r][c] == "g")
    starts = [cell for cell in free if cell != goal_cell]
    rows = {name: [] for name in ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")}
    with tqdm(total=size, desc=f"collecting {env_id}", unit="step", mininterval=0.5) as bar:
        while len(rows["rewards"]) < size:
            env.reset(seed=int(rng.integers(2**31)))
            cell = starts[rng.integers(len(starts))]
            position = maze.cell_rowcol_to_xy(np.array(cell)) + rng.uniform(-0.3, 0.3, 2)
            point.set_state(position, rng.normal(0.0, 0.5, 2))
            obs = np.concatenate([position, point.data.qvel]).astype(np.float32)
            speed = rng.uniform(1.5, 3.0)  # m/s
            route, waypoint, push, pushes_left, done = [], None, None, 0, False
            while not done and len(rows["rewards"]) < size:
                if pushes_left == 0 and waypoint is None and rng.random() < PUSH_PROBABILITY:
                    angle = rng.uniform(0, 2 * np.pi)
                    push, pushes_left, route = np.array([np.cos(angle), np.sin(angle)]), rng.integers(2, 7), []
                if pushes_left == 0 and waypoint is None:
                    if not route:
                        cell = tuple(int(i) for i in maze.cell_xy_to_rowcol(obs[:2]))
                        target = goal_cell if rng.random() < GOAL_PROBABILITY else free[rng.integers(len(free))]
                        route = _random_route(rng, free, cell, target) or [cell]
                    waypoint = maze.cell_rowcol_to_xy(np.array(route.pop(0))) + rng.uniform(-0.25, 0.25, 2)
                if pushes_left > 0:
                    action, pushes_left = push, pushes_left - 1
                else:
                    action = _drive(obs, waypoint, speed)
                action = np.clip(action + rng.normal(0.0, 0.3, 2), -1.0, 1.0).astype(np.float32)
                next_obs, reward, terminated, truncated, _ = env.step(action)
                done = terminated or truncated
                for key, value in zip(rows, (obs, action, reward, next_obs, terminated, truncated and not terminated)):
                    rows[key].append(value)
                obs = next_obs
                if waypoint is not None and np.linalg.norm(obs[:2] - waypoint) < 0.35:
                    waypoint = None
                bar.update()
    env.close()
    rows["timeouts"][-1] = not rows["terminals"][-1]
    types = dict.fromkeys(rows, np.float32) | {"terminals": bool, "timeouts": bool}
    return Dataset(**{key: np.array(value, types[key]) for key, value in rows.items()})


def _drive(obs, waypoint, speed):
    """Force that brings the velocity to `speed` towards the waypoint in about one decision (24 m/s^2 at force 1)."""
    offset = waypoint - obs[:2]
    desired = offset / max(np.linalg.norm(offset), 1e-6) * min(speed, 4.0 * np.linalg.norm(offset))
    return (desired - obs[2:4]) / (24.0 * 0.01 * SUBSTEPS)


def _random_route(rng, free, start, end):
    """Cells from `start` (left out) to `end`: the shortest path when each cell has a random length."""
    length = {cell: rng.exponential() + 0.2 for cell in free}
    best, queue = {start: None}, [(0.0, start, None)]
    done = set()
    while queue:
        cost, cell, parent = heapq.heappop(queue)
        if cell in done:
            continue
        done.add(cell)
        best[cell] = parent
        if cell == end:
            break
        r, c = cell
        for neighbour in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
            if neighbour in length and neighbour not in done:
                heapq.heappush(queue, (cost + length[neighbour], neighbour, cell))
    route = []
    while end != start:
        route.append(end)
        end = best[end]
    return route[::-1]
