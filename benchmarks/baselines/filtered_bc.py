"""Iterated filtered behaviour cloning with a diffusion policy: what PA-RL is compared with in its table 3.

Clone the data. Let the policy act; keep an episode if it reached the goal, forget it if not. Clone the kept ones beside
the data, and repeat. There is no critic: the only judgement is whether a whole episode succeeded, so that a good action
in an episode that failed teaches nothing, and where no episode succeeds nothing is ever learned.

    python -m benchmarks.baselines.filtered_bc                                      # a small maze on a laptop: minutes
    python -m benchmarks.baselines.filtered_bc --env-id antmaze-large-diverse-v2    # for one GPU
    python -m benchmarks.baselines.filtered_bc --resume runs/<folder>               # continue after a stop

paper                                     | here
------------------------------------------|---------------------------------------------------------------------
PA-RL eq. 3.1, 4.5  denoising loss        | clone
PA-RL table 3       keep the successful   | keep_successful
PA-RL sec. 5.2      iterate               | main: phases 1 and 3

The first ten minutes: `clone`, `keep_successful` and `main`. Diffusion policy, cloning update and replay buffer are
those of `parl_diffusion_calql.py`, imported.

PA-RL's paper says of this baseline that it follows Zhou et al. without goal conditioning, and prints no numbers for it.
So these are our choice, the same as PA-RL's where it has them: the policy acts with one sample, an episode is judged
and cloned before the next one begins, with as many updates per environment step and at the same rate as PA-RL distils,
on batches of half data, half kept episodes.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.harness.cli import RunArgs, parse_args, run_program
from benchmarks.harness.datasets import set_up
from benchmarks.harness.pictures import finish
from benchmarks.harness.rollouts import collect_episode
from benchmarks.harness.runs import Run
from benchmarks.tasks import load_dataset, make_env
from parl_diffusion_calql import DiffusionPolicy, ReplayBuffer, cloning_lr, policy_update


# --- ARGUMENTS ---
@dataclass
class Args(RunArgs):
    """Iterated filtered behaviour cloning. Defaults shown are those of the preset in force."""

    compile: Literal["auto", "no"] = "auto"  # nothing here is compiled
    # phases
    num_cloning_steps: int = 300_000  # phase 1: updates of the policy
    num_online_episodes: int = 1_000  # phase 3: episodes; 0: cloning only
    # policy
    chunk: int = 1  # steps of one decision, taken without looking; the policy's action holds all of them
    diffusion_steps: int = 5  # K, denoising steps
    policy_hidden: int = 256  # width of the policy's residual blocks (4 x inside)
    policy_blocks: int = 3  # residual blocks
    policy_dropout: float = 0.1  # in the residual blocks, when training
    cloning_batch_size: int = 1024  # of the paper, phase 1
    policy_lr: float = 3e-4  # Adam, phase 1: warm-up, then cosine decay
    policy_warmup: int = 2_000  # updates of warm-up
    distill_lr: float = 5e-5  # Adam, online: constant
    policy_ema: float = 0.002  # rate of the averaged copy of the policy, the one that is sampled
    # online
    batch_size: int = 256  # transitions of an update, online
    mixing_ratio: float = 0.5  # share of the dataset in such a batch; the rest are kept episodes
    cloning_ratio: float = 1.0  # updates per environment step, once an episode is kept
    release_returns: bool = False  # of no effect: no returns are used
    num_samples: int = 1  # of no effect: the policy acts with one sample


# Numbers of updates and sizes are those of parl_diffusion_calql.py, so that the two differ in the method alone.
PRESETS: dict[str, dict] = {
    "default": {}, "antmaze": {},
    "kitchen": dict(reward_bias=-4.0, reward_min=-4.0, sparse_reward=False),
    "ogbench": dict(reward_bias=0.0, reward_min=0.0),  # its rewards are minus the number of parts left to do
    "pointmaze": dict(
        num_cloning_steps=2_000, num_online_episodes=40, eval_episodes=50, compile="no", eval_processes=False,
        num_online_evals=4, log_every=50, policy_hidden=64, policy_blocks=2, cloning_batch_size=256, policy_lr=1e-3,
        policy_warmup=200, distill_lr=3e-4, discount=0.95),
    # On top of the family's: what two CPU cores train in half an hour
    "laptop": dict(
        dataset_size=200_000, num_cloning_steps=10_000, num_online_episodes=20, eval_episodes=50, num_online_evals=1,
        policy_hidden=128, policy_blocks=2, policy_dropout=0.0, cloning_batch_size=256, policy_lr=1e-3,
        policy_warmup=500, batch_size=128, cloning_ratio=0.05, compile="no"),
    # On top of that, the flags of parl_diffusion_rlpd.py's preset of that name, as far as they are here
    "laptop-chunk": dict(
        chunk=5, dataset_size=100_000, policy_hidden=192, num_cloning_steps=12_000, num_online_episodes=160,
        num_online_evals=4),
}  # fmt: skip


# --- FILTERED CLONING ---
def clone(policy, ema_policy, optimizer, buffer, rows, policy_ema: float) -> torch.Tensor:
    """One update of the policy on the actions that the rows (B,) of the buffer took. Returns the loss (eq. 3.1)."""
    states = buffer.obs_index[rows]
    return policy_update(policy, ema_policy, optimizer, buffer.states[states], buffer.data_actions(states), policy_ema)


def keep_successful(buffer, episode, success: bool) -> int:
    """Add an episode that reached the goal to the buffer, whole. Returns how many are kept by now.

    One that was cut within its only chunk of actions holds nothing to clone, but counts as kept.
    """
    if success:
        buffer.add(episode)
    return len(buffer.data) - 1


# --- MAIN ---
def main(argv: list[str] | None = None) -> None:
    args = parse_args(Args, PRESETS, argv)
    device, env, envs, dataset = set_up(args, make_env, load_dataset)
    obs_dim, action_dim = env.observation_space.shape[0], args.chunk * env.action_space.shape[0]
    buffer = ReplayBuffer(dataset, args, device)
    sizes = args.diffusion_steps, args.policy_hidden, args.policy_blocks
    policy = DiffusionPolicy(obs_dim, action_dim, *sizes, dropout=args.policy_dropout).to(device)
    ema_policy = copy.deepcopy(policy).requires_grad_(False).eval()  # the one that is sampled
    optimizer = torch.optim.Adam(policy.parameters(), args.policy_lr, fused=True)

    def act(obs):
        return ema_policy.sample(obs, 1)[:, 0]

    run = Run(args, dataset, buffer, policy=policy, ema_policy=ema_policy, policy_optimizer=optimizer)
    with run:
        # Phase 1: clone the data
        for step in run.steps("cloning", args.num_cloning_steps, envs, act):
            optimizer.param_groups[0]["lr"] = cloning_lr(step, args)
            rows = buffer.sample_index((1, args.cloning_batch_size))[0]
            run.log({"policy_loss": clone(policy, ema_policy, optimizer, buffer, rows, args.policy_ema)},
                    every=args.log_every)  # fmt: skip
        for _ in run.steps("offline", 0):  # phase 2: nothing to train on the data but the policy
            pass

        # Phase 3: an episode, which is kept if it succeeded, then cloning; a step is one episode
        if run.starts("online"):  # with fresh moments, at a constant rate, as PA-RL distils
            optimizer.state.clear()
            optimizer.param_groups[0]["lr"] = args.distill_lr
        for i in run.steps("online", args.num_online_episodes, envs, act, args.num_online_evals, "episode"):
            episode, success = collect_episode(env, act, args.seed * 100_003 + i, run)
            kept = keep_successful(buffer, episode, success)
            num_updates = round(len(episode) * args.cloning_ratio) if len(buffer.starts) > buffer.num_offline else 0
            metrics = {"episode_success": success, "episode_length": len(episode), "episodes_kept": kept}
            for rows in buffer.sample_index((num_updates, args.batch_size)):
                run.check_stop()
                metrics["policy_loss"] = clone(policy, ema_policy, optimizer, buffer, rows, args.policy_ema)
            run.count(episodes=1, env_steps=len(episode), updates=num_updates)
            run.log(metrics)
        finish(run, env, make_env, act, ema_policy, None)


if __name__ == "__main__":
    run_program(main)
