"""Episodes: one to learn from, many at a time to measure by, a few on film."""

import importlib.util
import multiprocessing
import os
import signal
import sys
import time
import warnings

import gymnasium as gym
import numpy as np
import torch

from benchmarks.harness.cli import available_cores, fail
from benchmarks.tasks.dataset import Dataset


def rescaled(env: gym.Env) -> gym.Env:
    """The environment with actions in [-1, 1], in which policy and critic work, mapped to its box.

    Not gymnasium's RescaleAction: its result may lie outside the box by a rounding error.
    """
    space = env.action_space
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        fail(f"the action space is {space}; PA-RL needs a vector of continuous actions (a one-dimensional Box)")
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        fail(f"the action space {space} is unbounded; wrap the environment to bound it")
    low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    unit = gym.spaces.Box(-1.0, 1.0, space.shape, np.float32)
    return gym.wrappers.TransformAction(env, lambda a: np.clip(low + (a + 1) / 2 * (high - low), low, high), unit)


class SimulationDied(Exception):
    """A process that simulates an evaluation's environments ended."""


def succeeded(info: dict):
    """What a step says of success, under either of the names in use; None if it says nothing."""
    return info.get("success", info.get("is_success"))


def decide(act, obs, action_dim: int, run):
    """What `act` (obs (B, O) -> a chunk of h actions each (B, h A)) is going to do in the next h steps: (h, B, A)."""
    chunks = act(torch.as_tensor(obs, dtype=torch.float32, device=run.device)).cpu().numpy()
    return chunks.reshape(len(obs), -1, action_dim).swapaxes(0, 1)


def collect_episode(env, act, seed: int, run) -> tuple[Dataset, bool]:
    """One episode of `act` (obs (1, O) -> (1, h A) in [-1, 1]): its transitions, and whether it reached the goal.

    Each chunk of h actions is taken to its end, or the episode's, without looking. run: its device is where
    observations go; it is asked to stop between any two steps, and ends where the rewards do not fit its flags.
    """
    obs, info = env.reset(seed=seed % 2**32)
    observations, actions, rewards, plan, done, success = [obs], [], [], [], False, False
    while not done:
        run.check_stop()
        plan = plan if len(plan) else decide(act, obs[None], len(env.action_space.low), run)[:, 0]
        action, plan = plan[0], plan[1:]
        obs, reward, terminated, truncated, info = env.step(action)
        observations.append(obs)
        actions.append(action)
        rewards.append(reward)
        success = success or bool(succeeded(info))
        done = terminated or truncated
    check_rewards(min(rewards), max(rewards), run.args, "an online episode")
    last = np.arange(len(rewards)) == len(rewards) - 1
    observations = np.array(observations, np.float32)
    return Dataset(
        observations=observations[:-1], actions=np.array(actions, np.float32), rewards=np.array(rewards, np.float32),
        next_observations=observations[1:], terminals=last & terminated, timeouts=last & (not terminated),
    ), success  # fmt: skip


def check_rewards(low: float, high: float, args, source: str) -> None:
    """Refuse rewards that leave the range in which the critic's values are."""
    low, high = low + args.reward_bias, high + args.reward_bias
    if not (low >= args.reward_min - 1e-3 and high <= 1e-3):  # so that NaN is refused, too
        fail(f"the rewards plus --reward-bias span [{low:.4g}, {high:.4g}], beyond [--reward-min, 0] = "
             f"[{args.reward_min:.4g}, 0]; set the two flags to fit ({source})")  # fmt: skip


def evaluate(envs, act, run) -> dict:
    """Run `act` for args.eval_episodes episodes, as many at a time as there are environments, from the same starts.

    Returns success_rate in [0, 1], score (100 x success, or 25 x sub-tasks completed where a task counts them), return
    (rewards with the bias, undiscounted), length (steps), and the trajectories as a list of (steps + 1, O).
    """
    args, n, total, told = run.args, envs.num_envs, run.args.eval_episodes, False
    success, scores, returns, lengths = np.zeros(total, bool), np.zeros(total), np.zeros(total), np.zeros(total, int)
    actions, trajectories = np.zeros(envs.action_space.shape, np.float32), []
    for first in range(0, total, n):
        seeds = [(args.eval_seed + first + i) % 2**32 for i in range(n)]
        obs, _ = simulate(envs, lambda seeds=seeds: envs.reset(seed=seeds), run)
        episodes, active = first + np.arange(n), first + np.arange(n) < total
        observations, plan = [obs], []
        while active.any():
            rows = np.flatnonzero(active)
            if not len(plan):  # all episodes began together, so that their chunks end together as well
                deciding, plan = rows, decide(act, obs[rows], actions.shape[1], run)
            actions[deciding], plan = plan[0], plan[1:]
            obs, reward, terminated, truncated, info = simulate(envs, lambda: envs.step(actions), run)
            observations.append(obs)
            now, reached = episodes[rows], succeeded(info)
            if reached is not None:
                told, success[now] = True, success[now] | np.asarray(reached, bool)[rows]
            score = 25 * np.asarray(info["completed"])[rows] if "completed" in info else 100 * success[now]
            scores[now] = np.maximum(scores[now], score)
            returns[now] += reward[rows] + args.reward_bias
            lengths[now] += 1
            active &= ~(terminated | truncated)  # an environment that ended restarts by itself; that episode is ignored
        stacked = np.stack(observations)  # (time, n, O)
        trajectories += [stacked[: lengths[episode] + 1, i] for i, episode in enumerate(episodes) if episode < total]
    return {
        "success_rate": float(success.mean()), "score": float(scores.mean()), "return": float(returns.mean()),
        "length": float(lengths.mean()), "trajectories": trajectories, "tells_success": told,
    }  # fmt: skip


def simulate(envs, call, run):
    """`call()`, of a vector of environments, unless the run is to stop; names a process of theirs that ended."""
    run.check_stop()
    try:
        return call()
    except (EOFError, OSError) as error:
        run.check_stop()  # a signal to all of the run's processes: this one is the first to hear of the others' end
        time.sleep(0.5)  # until the system has noted how it ended
        codes = [process.exitcode for process in getattr(envs, "processes", [])]
        dead = [f"{i + 1} of {len(codes)} (exit code {code})" for i, code in enumerate(codes) if code is not None]
        raise SimulationDied(f"simulation process {', '.join(dead) or 'unknown'} ended during an evaluation") from error


def make_vector_env(args, make_env) -> gym.vector.VectorEnv:
    """The environments of an evaluation: one for each episode in this process, or two processes for each core."""

    def make_one():
        if multiprocessing.parent_process() is not None:  # Ctrl-C is for the run, which ends its processes itself
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.stderr = open(os.devnull, "w")  # what goes wrong there, the run tells in its own words
        return rescaled(make_env(args.env_id))

    if not args.eval_processes:
        return gym.vector.SyncVectorEnv([make_one] * args.eval_episodes)
    # forked before anything big is loaded; where there is no fork, started anew
    context = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    return gym.vector.AsyncVectorEnv([make_one] * min(args.eval_episodes, 2 * available_cores()), context=context)


def close(envs) -> None:
    """End the environments of an evaluation; where some process is dead, gymnasium would wait for its answer."""
    if isinstance(envs, gym.vector.AsyncVectorEnv):
        for process in envs.processes:
            process.terminate()
        envs.closed = True
    elif envs is not None:
        envs.close()


def film(run, make_env, act, episodes: int = 3) -> None:
    """videos/*.mp4 of a few evaluation episodes. moviepy and off-screen OpenGL were found at the start."""
    env = rescaled(make_env(run.args.env_id, render_mode="rgb_array"))
    with warnings.catch_warnings(action="ignore"):
        env = gym.wrappers.RecordVideo(env, str(run.folder / "videos"), lambda episode: True, disable_logger=True)
        for episode in range(episodes):
            collect_episode(env, act, run.args.eval_seed + episode, run)
        env.close()


def check_optional_parts(args, make_env) -> None:
    """--track and --capture-video need packages that are not installed by default: say so now, not after hours."""
    for flag, package in {"track": "wandb", "capture_video": "moviepy"}.items():
        if getattr(args, flag) and importlib.util.find_spec(package) is None:
            fail(f"--{flag.replace('_', '-')} needs {package}: pip install {package}")
    if args.capture_video:
        try:
            env = make_env(args.env_id, render_mode="rgb_array")
            env.reset()
            env.render()
            env.close()
        except Exception as error:  # whatever the GL stack raises
            fail(f"--capture-video cannot render off screen ({error}); set MUJOCO_GL=egl, or osmesa with libosmesa6")
