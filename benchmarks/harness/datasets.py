"""A task's environments and dataset, checked against each other before anything long begins."""

import dataclasses
import hashlib

import gymnasium as gym
import numpy as np

from benchmarks.harness.cli import fail, start_torch
from benchmarks.harness.rollouts import check_optional_parts, make_vector_env, rescaled
from benchmarks.tasks.dataset import ARRAYS


def set_up(args, make_env, load_dataset):
    """The device, and the task `args.env_id` with actions in [-1, 1] throughout.

    Returns the device, an environment, a vector of them for evaluations, and the dataset with its actions mapped alike.
    Data collected here marks the run: args.dataset_source becomes `local`. An args.reward_min of 0 becomes the data's.
    """
    device = start_torch(args)
    try:
        env = rescaled(make_env(args.env_id))
        check_optional_parts(args, make_env)
        envs = make_vector_env(args, make_env)
        size, path = args.dataset_size or None, args.dataset_path or None
        dataset = load_dataset(args.env_id, path, size, source=args.dataset_source)
    except ValueError as error:
        fail(str(error))
    if dataset.local:
        args.dataset_source = "local"  # in the config, and when the run is resumed where there is a network again
    if args.reward_min == 0 and len(dataset):
        args.reward_min = min(0.0, float(dataset.rewards.min()) + args.reward_bias)
    space = env.env.action_space
    check_dataset(dataset, env, space, args)
    actions = np.clip(2 * (dataset.actions - space.low) / (space.high - space.low) - 1, -1, 1)
    numbers = {name: getattr(dataset, name) for name in ("observations", "rewards", "next_observations")}
    numbers = {name: np.asarray(array, np.float32) for name, array in (numbers | {"actions": actions}).items()}
    return device, env, envs, dataclasses.replace(dataset, **numbers)


def check_dataset(dataset, env, space, args) -> None:
    """Refuse a dataset that does not belong to this environment or holds values no network can be trained on."""
    if not (isinstance(env.observation_space, gym.spaces.Box) and len(env.observation_space.shape) == 1):
        fail(f"the observation space is {env.observation_space}; this script takes a vector (a one-dimensional Box)")
    N, O, A = len(dataset.rewards), *env.observation_space.shape, *space.shape  # noqa: E741
    if N == 0:
        fail("the dataset is empty")
    shapes = {"observations": (N, O), "next_observations": (N, O), "actions": (N, A), "rewards": (N,)}
    for name, shape in shapes.items():
        array = getattr(dataset, name)
        if array.shape != shape:
            fail(f"the dataset's {name} have shape {array.shape}; this environment needs {shape} ({dataset.source})")
        if not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array.reshape(N, -1)).all(1))[0])
            fail(f"the dataset's {name} hold NaN or infinity, first in row {row} ({dataset.source})")
    low, high = dataset.rewards.min() + args.reward_bias, dataset.rewards.max() + args.reward_bias
    if args.reward_min == 0:
        fail(f"all rewards of the dataset are {low - args.reward_bias:.4g}; set --reward-min ({dataset.source})")
    if low < args.reward_min - 1e-3 or high > 1e-3:
        fail(f"the dataset's rewards plus --reward-bias span [{low:.4g}, {high:.4g}], beyond [--reward-min, 0] = "
             f"[{args.reward_min:.4g}, 0]; set the two flags to fit ({dataset.source})")  # fmt: skip
    slack = 1e-3 * (space.high - space.low)
    if (dataset.actions < space.low - slack).any() or (dataset.actions > space.high + slack).any():
        low, high = dataset.actions.min(), dataset.actions.max()
        fail(f"the dataset's actions span [{low:.3g}, {high:.3g}], beyond the action space [{space.low.min():.3g}, "
             f"{space.high.max():.3g}] ({dataset.source})")  # fmt: skip


def trajectory_ends(dataset) -> np.ndarray:
    """Index after the last row of each trajectory, in order; the dataset's end closes the last one."""
    ends = np.flatnonzero(dataset.terminals | dataset.timeouts) + 1
    return ends if len(ends) and ends[-1] == len(dataset) else np.append(ends, len(dataset))


def distinct_states(dataset, ends) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each state once, in order, and which of them each row begins with.

    Returns states (S, O) float32, the action that was taken at each (S, A), NaN at a trajectory's last one, and the
    index of each row's observation (N,). A row's next observation is the state behind it: within a trajectory, the next
    row's own.
    """
    last = np.zeros(len(dataset), bool)
    last[ends - 1] = True
    obs_index = np.arange(len(dataset)) + np.cumsum(last) - last  # a trajectory has one state more than it has rows
    states = np.zeros((len(dataset) + len(ends), dataset.observations.shape[1]), np.float32)
    states[obs_index], states[obs_index + 1] = dataset.observations, dataset.next_observations
    actions = np.full((len(states), dataset.actions.shape[1]), np.nan, np.float32)
    actions[obs_index] = dataset.actions
    return states, actions, obs_index


def fingerprint(dataset) -> str:
    """What a resumed run knows its dataset by: a hash over the arrays."""
    total = hashlib.sha256()
    for name in ARRAYS:
        total.update(np.ascontiguousarray(getattr(dataset, name)).tobytes())
    return total.hexdigest()
