"""A task's environments and dataset, checked against each other before anything long begins."""

import dataclasses
import hashlib

import gymnasium as gym
import numpy as np

from benchmarks.harness.cli import fail, start_torch
from benchmarks.harness.rollouts import check_optional_parts, check_rewards, make_vector_env, rescaled
from benchmarks.tasks.dataset import ARRAYS

FLAGS = "terminals", "timeouts"


def set_up(args, make_env, load_dataset):
    """The device, and the task `args.env_id` with actions in [-1, 1] throughout.

    Returns the device, an environment, a vector of them for evaluations, and the dataset with its actions mapped alike.
    Data collected here marks the run: args.dataset_source becomes `local`. An args.reward_min of 0 becomes the data's.
    """
    device = start_torch(args)
    try:
        env = rescaled(make_env(args.env_id))
        check_environment(env, args)
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
    numbers = {name: np.asarray(getattr(dataset, name), np.float32) for name in ARRAYS if name not in FLAGS}
    flags = {name: np.asarray(getattr(dataset, name)).astype(bool) for name in FLAGS}
    dataset = dataclasses.replace(dataset, **numbers | flags | {"actions": actions.astype(np.float32)})
    say_where_ends_differ(dataset)
    if getattr(args, "chunk", 1) > (longest := np.diff(trajectory_ends(dataset), prepend=0).max()):
        fail(f"--chunk {args.chunk} is longer than every trajectory of the dataset; the longest has {longest} steps")
    return device, env, envs, dataset


def check_environment(env, args) -> None:
    """Refuse an environment whose observations are no vector, or whose first step does not give what one needs."""
    if not (isinstance(env.observation_space, gym.spaces.Box) and len(env.observation_space.shape) == 1):
        fail(f"the observation space is {env.observation_space}; this script takes a vector (a one-dimensional Box)")
    env.reset(seed=args.seed)
    obs, reward, *_ = env.step(np.zeros(env.action_space.shape, np.float32))
    if np.shape(obs) != (shape := env.observation_space.shape) or not np.isfinite(obs).all():
        fail(f"the first step of {args.env_id} gives the observation {obs}; it must be {shape} finite numbers")
    if np.ndim(reward) or not np.isfinite(reward):
        fail(f"the first step of {args.env_id} gives the reward {reward!r}; it must be one finite number")


def check_dataset(dataset, env, space, args) -> None:
    """Refuse a dataset that does not belong to this environment or holds values no network can be trained on."""
    N, O, A = len(dataset.rewards), *env.observation_space.shape, *space.shape  # noqa: E741
    if N == 0:
        fail("the dataset is empty")
    shapes = {"observations": (N, O), "next_observations": (N, O), "actions": (N, A), "rewards": (N,)}
    for name, shape in (shapes | dict.fromkeys(FLAGS, (N,))).items():
        array = np.asarray(getattr(dataset, name))
        if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
            fail(f"the dataset's {name} have dtype {array.dtype}; they must be numbers ({dataset.source})")
        if array.shape != shape:
            fail(f"the dataset's {name} have shape {array.shape}; this environment needs {shape} ({dataset.source})")
        if len(rows := np.flatnonzero(~np.isfinite(array.reshape(N, -1)).all(1))):
            fail(f"the dataset's {name} hold NaN or infinity, first in row {rows[0]} ({dataset.source})")
        if name in FLAGS and not np.isin(array, (0, 1)).all():
            fail(f"the dataset's {name} hold values other than 0 and 1 ({dataset.source})")
    if args.reward_min == 0:
        fail(f"all rewards of the dataset are {dataset.rewards.min():.4g}; set --reward-min ({dataset.source})")
    check_rewards(dataset.rewards.min(), dataset.rewards.max(), args, dataset.source)
    if (np.maximum(space.low - dataset.actions, dataset.actions - space.high) > 1e-3 * (space.high - space.low)).any():
        fail(f"the dataset's actions span [{dataset.actions.min():.3g}, {dataset.actions.max():.3g}], beyond the "
             f"action space [{space.low.min():.3g}, {space.high.max():.3g}] ({dataset.source})")  # fmt: skip


def trajectory_ends(dataset) -> np.ndarray:
    """Index after the last row of each trajectory, in order: where a flag says so, or where the next row's observation
    is not this row's next one (to 1e-6 of the larger, or of 1). The dataset's end closes the last one.
    """
    return np.flatnonzero(np.logical_or(*flags_and_jumps(dataset))) + 1


def flags_and_jumps(dataset) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N,) whose flags end a trajectory (the last always does); whose next observation is not the next row's."""
    here, there = dataset.next_observations[:-1], dataset.observations[1:]
    apart = np.abs(here - there) > 1e-6 * np.maximum(1.0, np.maximum(np.abs(here), np.abs(there)))
    flagged = dataset.terminals | dataset.timeouts | (np.arange(len(dataset)) == len(dataset) - 1)
    return flagged, np.append(apart.any(1), False)


def say_where_ends_differ(dataset) -> None:
    """One line if the flags do not say where the trajectories end."""
    flagged, jumps = flags_and_jumps(dataset)
    if unflagged := int((jumps & ~flagged).sum()):
        timeouts = f"timeouts set in {int(dataset.timeouts.sum())}" if dataset.timeouts.any() else "timeouts all False"
        print(f"{dataset.source}: {timeouts}, {unflagged} jumps between rows that no flag marks; both end a trajectory")


def distinct_states(dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each state once, in order, and which of them each row begins with.

    Returns states (S, O) float32, the action that was taken at each (S, A), NaN at a stretch's last one, and of each
    row (N,) the index of its observation and of its stretch's last action. A stretch goes on over a terminal after
    which the data do: only a time limit or a jump ends it. A row's next observation is the state behind its own.
    """
    last = flags_and_jumps(dataset)[1] | dataset.timeouts | (np.arange(len(dataset)) == len(dataset) - 1)
    obs_index = np.arange(len(dataset)) + np.cumsum(last) - last  # a stretch has one state more than it has rows
    states = np.zeros((len(dataset) + last.sum(), dataset.observations.shape[1]), np.float32)
    states[obs_index + 1] = dataset.next_observations
    states[obs_index] = dataset.observations
    actions = np.full((len(states), dataset.actions.shape[1]), np.nan, np.float32)
    actions[obs_index] = dataset.actions
    return states, actions, obs_index, np.repeat(obs_index[last], np.diff(np.flatnonzero(last), prepend=-1))


def fingerprint(dataset) -> str:
    """What a resumed run knows its dataset by: a hash over the arrays."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(getattr(dataset, name)).data for name in ARRAYS)).hexdigest()
