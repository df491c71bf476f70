"""Train the walking policy of `ant_walker.py`: soft actor-critic on D4RL's ant in free space.

    pip install stable-baselines3 && python -m benchmarks.tasks.train_ant_walker

The direction changes every six seconds, the torso starts with any yaw, and in half of the episodes the actions carry
the noise of the data collection. The reward is the velocity along the direction, a little for an upright torso, less a
little for torque. 250,000 steps take about half an hour on one core. The weights are written whenever they walked
better than before on a fixed set of legs, which the collection does not use.
"""

import argparse
import os
import pathlib

import gymnasium as gym
import mujoco
import numpy as np

from benchmarks.tasks.ant_walker import WEIGHTS, load_walker, upright, walker_input
from benchmarks.tasks.antmaze import SUBSTEPS, ant_observation, ant_spec, noisy_ant_state

TURN_EVERY = 60  # decisions
EPISODE = 600  # decisions


class FreeAnt(gym.Env):
    """The ant on an endless floor, told where to walk."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (29,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (8,), np.float32)

    def __init__(self):
        self.model = ant_spec().compile()
        self.data = mujoco.MjData(self.model)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        qpos, qvel = noisy_ant_state(self.model, self.np_random)
        turn = np.array([np.cos(angle := self.np_random.uniform(-np.pi, np.pi) / 2), 0, 0, np.sin(angle)])
        tilted = qpos[3:7].copy()
        mujoco.mju_mulQuat(qpos[3:7], turn, tilted)
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:], self.data.qvel[:] = qpos, qvel
        mujoco.mj_forward(self.model, self.data)
        self.noise = 0.2 * self.np_random.integers(2)
        self.steps = 0
        self._turn()
        return walker_input(ant_observation(self.data), self.direction), {}

    def _turn(self):
        angle = self.np_random.uniform(-np.pi, np.pi)
        self.direction = np.array([np.cos(angle), np.sin(angle)])

    def step(self, action):
        before = self.data.qpos[:2].copy()
        noisy = action + self.noise * self.np_random.standard_normal(8)
        self.data.ctrl[:] = np.clip(noisy, -1.0, 1.0)
        mujoco.mj_step(self.model, self.data, nstep=SUBSTEPS)
        self.steps += 1
        velocity = (self.data.qpos[:2] - before) / (SUBSTEPS * self.model.opt.timestep)
        up = upright(self.data.qpos)
        reward = float(velocity @ self.direction + 0.2 * up - 0.02 * np.square(action).sum())
        if self.steps % TURN_EVERY == 0:
            self._turn()
        obs = walker_input(ant_observation(self.data), self.direction)
        return obs, reward, bool(up < 0), self.steps >= EPISODE, {}


def measure(walk, legs: int = 200, noise: float = 0.2, seed: int = 12345) -> dict[str, float]:
    """Walk `legs` straight ways of 4 m, one after the other in random directions, with the collection's noise.

    Returns `reached` (share of legs whose end the ant came within 0.5 m of in 20 s), `fallen` (share on which it ended
    on its back, after which it is put on its feet), and `speed` (m/s over the reached legs).
    """
    rng, model = np.random.default_rng(seed), ant_spec().compile()
    data = mujoco.MjData(model)
    reached, fallen, steps_reached = 0, 0, 0
    data.qpos[:], data.qvel[:] = noisy_ant_state(model, rng)
    mujoco.mj_forward(model, data)
    for _ in range(legs):
        angle = rng.uniform(-np.pi, np.pi)
        end = data.qpos[:2] + 4.0 * np.array([np.cos(angle), np.sin(angle)])
        for step in range(200):
            action = walk(ant_observation(data), end - data.qpos[:2]) + noise * rng.standard_normal(8)
            data.ctrl[:] = np.clip(action, -1.0, 1.0)
            mujoco.mj_step(model, data, nstep=SUBSTEPS)
            if np.hypot(*(end - data.qpos[:2])) < 0.5:
                reached, steps_reached = reached + 1, steps_reached + step + 1
                break
        if upright(data.qpos) < 0:
            fallen += 1
            data.qpos[:], data.qvel[:] = noisy_ant_state(model, rng)
            mujoco.mj_forward(model, data)
    return {"reached": reached / legs, "fallen": fallen / legs, "speed": 3.5 * reached / max(1, steps_reached) / 0.1}


def save_weights(actor, path: pathlib.Path) -> None:
    """The actor's three layers (mean action) as float32 arrays, replacing `path` only when whole."""
    layers = [actor.latent_pi[0], actor.latent_pi[2], actor.mu]
    names = [(i, layer, name) for i, layer in enumerate(layers) for name in ("weight", "bias")]
    arrays = {f"{name}{i}": getattr(layer, name).detach().cpu().numpy() for i, layer, name in names}
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250_000, help="decisions to train for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=WEIGHTS)
    parser.add_argument("--measure", action="store_true", help="only measure the walker in --out, on 1,000 legs")
    args = parser.parse_args()
    if args.measure:
        print(measure(load_walker(args.out), legs=1000, seed=54321))
        return
    try:
        import stable_baselines3
        import torch
    except ImportError:
        raise SystemExit("error: training needs stable-baselines3: pip install stable-baselines3") from None
    torch.set_num_threads(1)  # two threads gain little on networks this small
    agent = stable_baselines3.SAC(
        "MlpPolicy", FreeAnt(), learning_rate=3e-4, batch_size=256, gamma=0.97, train_freq=4, gradient_steps=2,
        learning_starts=5_000, policy_kwargs={"net_arch": [256, 256]}, seed=args.seed, device="cpu",
    )  # fmt: skip
    best, candidate = -1.0, args.out.with_name("candidate-" + args.out.name)
    for part in range(max(1, args.steps // 25_000)):
        agent.learn(min(25_000, args.steps), reset_num_timesteps=part == 0)
        save_weights(agent.actor, candidate)
        quality = measure(load_walker(candidate))
        score = quality["reached"] - quality["fallen"] + 0.1 * quality["speed"]
        print(agent.num_timesteps, "steps:", *(f"{name} {value:.3f}" for name, value in quality.items()), flush=True)
        if score > best:
            best = score
            os.replace(candidate, args.out)
    candidate.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
