"""Episodes: one to learn from, many at a time to measure by, a few on film."""

import multiprocessing
import pathlib
import signal

import gymnasium as gym
import numpy as np
import torch

from benchmarks.harness.cli import available_cores, fail
from benchmarks.tasks.dataset import Dataset

EVAL_SEED = 1_000_000_000  # the starts of evaluation episodes, the same in all runs; no training episode uses them


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


def collect_episode(env, act, seed: int, device) -> tuple[Dataset, bool]:
    """One episode of `act` (obs (1, O) -> (1, A) in [-1, 1]): its transitions, and whether it reached the goal."""
    obs, info = env.reset(seed=seed)
    observations, actions, rewards, done, success = [obs], [], [], False, False
    while not done:
        action = act(torch.as_tensor(obs, dtype=torch.float32, device=device)[None])[0].cpu().numpy()
        obs, reward, terminated, truncated, info = env.step(action)
        observations.append(obs)
        actions.append(action)
        rewards.append(reward)
        success = success or bool(info.get("success", False))
        done = terminated or truncated
    last = np.arange(len(rewards)) == len(rewards) - 1
    observations = np.array(observations, np.float32)
    return Dataset(
        observations=observations[:-1], actions=np.array(actions, np.float32), rewards=np.array(rewards, np.float32),
        next_observations=observations[1:], terminals=last & terminated, timeouts=last & (not terminated),
    ), success  # fmt: skip


def evaluate(envs, act, args, device) -> dict:
    """Run `act` for args.eval_episodes episodes, as many at a time as there are environments, from the same starts.

    Returns success_rate in [0, 1], score (100 x success, or 25 x sub-tasks completed where a task counts them), return
    (rewards with the bias, undiscounted), length (decisions), and the trajectories as a list of (steps + 1, O).
    """
    n, total = envs.num_envs, args.eval_episodes
    success, scores, returns, lengths = np.zeros(total, bool), np.zeros(total), np.zeros(total), np.zeros(total, int)
    actions, trajectories = np.zeros(envs.action_space.shape, np.float32), []
    for first in range(0, total, n):
        obs, _ = envs.reset(seed=[EVAL_SEED + first + i for i in range(n)])
        episodes, active = first + np.arange(n), first + np.arange(n) < total
        observations = [obs]
        while active.any():
            rows = np.flatnonzero(active)
            actions[rows] = act(torch.as_tensor(obs[rows], dtype=torch.float32, device=device)).cpu().numpy()
            obs, reward, terminated, truncated, info = envs.step(actions)
            observations.append(obs)
            now = episodes[rows]
            success[now] |= np.asarray(info.get("success", np.zeros(n)), bool)[rows]
            score = 25 * np.asarray(info["completed"])[rows] if "completed" in info else 100 * success[now]
            scores[now] = np.maximum(scores[now], score)
            returns[now] += reward[rows] + args.reward_bias
            lengths[now] += 1
            active &= ~(terminated | truncated)  # an environment that ended restarts by itself; that episode is ignored
        stacked = np.stack(observations)  # (time, n, O)
        trajectories += [stacked[: lengths[episode] + 1, i] for i, episode in enumerate(episodes) if episode < total]
    return {
        "success_rate": float(success.mean()), "score": float(scores.mean()), "return": float(returns.mean()),
        "length": float(lengths.mean()), "trajectories": trajectories,
    }  # fmt: skip


def make_vector_env(args, make_env) -> gym.vector.VectorEnv:
    """The environments of an evaluation: one for each episode in this process, or two processes for each core."""

    def make_one():
        if multiprocessing.parent_process() is not None:  # Ctrl-C is for the run, which ends its processes itself
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return rescaled(make_env(args.env_id))

    if not args.eval_processes:
        return gym.vector.SyncVectorEnv([make_one] * args.eval_episodes)
    # forked before anything big is loaded; where there is no fork, started anew
    context = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    return gym.vector.AsyncVectorEnv([make_one] * min(args.eval_episodes, 2 * available_cores()), context=context)


def film(args, make_env, act, path: pathlib.Path, device, episodes: int = 3) -> None:
    """An mp4 of a few evaluation episodes. OpenCV and off-screen OpenGL were found at the start."""
    import cv2

    env, writer = rescaled(make_env(args.env_id, render_mode="rgb_array")), None
    for episode in range(episodes):
        obs, done = env.reset(seed=EVAL_SEED + episode)[0], False
        while not done:
            frame = env.render()
            if writer is None:
                fps = min(30, env.metadata.get("render_fps", 10))
                writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, frame.shape[1::-1])
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
            action = act(torch.as_tensor(obs, dtype=torch.float32, device=device)[None])[0].cpu().numpy()
            obs, _, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
    writer.release()
    env.close()


def check_optional_parts(args, make_env) -> None:
    """--track and --capture-video need packages that are not installed by default: say so now, not after hours."""
    if args.track:
        try:
            import wandb  # noqa: F401
        except ImportError:
            fail("--track needs Weights & Biases: pip install wandb")
    if args.capture_video:
        try:
            import cv2  # noqa: F401
        except ImportError:
            fail("--capture-video needs OpenCV: pip install opencv-python-headless")
        try:
            env = make_env(args.env_id, render_mode="rgb_array")
            env.reset()
            env.render()
            env.close()
        except Exception as error:  # whatever the GL stack raises
            fail(f"--capture-video cannot render off screen ({error}); set MUJOCO_GL=egl, or osmesa with libosmesa6")
