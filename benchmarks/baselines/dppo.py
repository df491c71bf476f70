"""DPPO: a cloned diffusion policy fine-tuned online by PPO (Ren et al., Diffusion Policy Policy Optimization, 2024).

Every denoising step draws from a Gaussian, so each has a likelihood, and a decision of the policy is K small decisions:
a two-level Markov decision process whose reward comes when the last one, the action, is taken. PPO clips the ratio of
each denoising step by itself; the advantage is that of the environment's step, estimated by GAE on a learned value of
the state. On-policy: each episode is used for one round of updates and forgotten, there is no offline RL.

    python -m benchmarks.baselines.dppo                                      # a small maze on a laptop: minutes
    python -m benchmarks.baselines.dppo --env-id antmaze-large-diverse-v2    # the paper's setting, one GPU
    python -m benchmarks.baselines.dppo --resume runs/<folder>               # continue after a stop, in any phase

paper                                             | here
--------------------------------------------------|-------------------------------------------------------------
the inner chain of Gaussians, minimum deviation   | step_std, step_means, draw_chain
log-probability of each denoising step            | log_probs
advantages of environment steps (GAE)             | advantages
clipped ratio per denoising step                  | ppo_loss
an iteration: episodes, then some epochs          | ppo_round
PA-RL app. B.2  clone, then online alone          | main: phases 1 and 3

The first ten minutes: `draw_chain`, `log_probs`, `ppo_loss` and `ppo_round`. Diffusion policy and cloning are those of
`parl_diffusion_calql.py`, imported.

PA-RL's appendix B.2 ran DPPO with 40 environments in parallel and chunks of 6 actions (AntMaze) or 8 (kitchen); its
figure 3 gives DPPO 100 episodes (AntMaze) or 500 (kitchen) for each one of the others, as it needs far more. Here one
environment acts, `episodes_per_round` episodes one after the other. Parameters it does not print are our choice, like
those of DPPO's public configurations: least deviation 0.1, denoising discount 0.99, GAE 0.95. Also ours: all K steps
are fine-tuned, a step's mean is clipped to [-1, 1] and what is drawn is not (the environment clips the action), so that
likelihoods are exact. The policy is measured as it acts: once PPO trains its chain, by that chain; cloned, by
`DiffusionPolicy.sample`.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn as nn

from benchmarks.harness.cli import RunArgs, fail, parse_args, run_program
from benchmarks.harness.datasets import set_up
from benchmarks.harness.pictures import finish
from benchmarks.harness.rollouts import collect_episode
from benchmarks.harness.runs import Run
from benchmarks.tasks import load_dataset, make_env
from parl_diffusion_calql import DiffusionPolicy, ReplayBuffer, cloning_lr, policy_update


# --- ARGUMENTS ---
@dataclass
class Args(RunArgs):
    """DPPO. Defaults shown are those of the preset in force."""

    compile: Literal["auto", "no"] = "auto"  # nothing here is compiled
    # phases
    num_cloning_steps: int = 300_000  # phase 1: updates of the policy
    num_online_episodes: int = 100_000  # phase 3: episodes, in whole rounds; 0: cloning only
    # policy
    chunk: int = 1  # steps of one decision, taken without looking; the policy's action holds all of them
    diffusion_steps: int = 5  # K, denoising steps
    policy_hidden: int = 256  # width of the policy's residual blocks (4 x inside)
    policy_blocks: int = 3  # residual blocks
    policy_dropout: float = 0.1  # in the residual blocks, when cloning
    cloning_batch_size: int = 1024  # of the paper
    policy_lr: float = 3e-4  # Adam, cloning: warm-up, then cosine decay
    policy_warmup: int = 2_000  # updates of warm-up
    policy_ema: float = 0.002  # rate of the averaged copy of the policy, which is what is fine-tuned
    # PPO
    episodes_per_round: int = 40  # episodes between two rounds of updates
    num_epochs: int = 5  # passes over the round's decisions
    batch_size: int = 1_000  # decisions of an update, with all their denoising steps
    actor_lr: float = 1e-4  # Adam
    value_lr: float = 1e-3  # Adam
    value_hidden: tuple[int, ...] = (256, 256, 256)  # hidden layers of V(s)
    num_value_warmup: int = 1  # rounds that train the value alone
    gae_lambda: float = 0.95  # of environment steps
    denoising_discount: float = 0.99  # of the advantage, for each denoising step before the last
    clip_ratio: float = 0.1  # epsilon of the last denoising step
    clip_ratio_first: float = 0.01  # and of the first, the noisiest; exponential between them
    min_std: float = 0.1  # least standard deviation of a denoising step, when acting and in likelihoods
    max_grad_norm: float = 1.0  # of the policy's gradient
    target_kl: float = 1.0  # stop the round's updates of the policy where it has moved so far
    # of no effect
    num_samples: int = 1  # the policy acts with one sample
    release_returns: bool = False  # no Monte-Carlo returns are used
    mixing_ratio: float = 0.5  # no offline data is used online


# Cloning is that of parl_diffusion_calql.py, so that both fine-tune the same policy.
PRESETS: dict[str, dict] = {
    "default": {}, "antmaze": dict(chunk=6),
    "kitchen": dict(chunk=8, num_online_episodes=500_000, reward_bias=-4.0, reward_min=-4.0, sparse_reward=False),
    "ogbench": dict(reward_bias=0.0, reward_min=0.0),  # its rewards are minus the number of parts left to do
    # Ten times PA-RL's episodes there, in less time than PA-RL takes
    "pointmaze": dict(
        num_cloning_steps=2_000, num_online_episodes=400, eval_episodes=50, compile="no", eval_processes=False,
        num_online_evals=4, log_every=50, policy_hidden=64, policy_blocks=2, cloning_batch_size=256, policy_lr=1e-3,
        policy_warmup=200, discount=0.95, episodes_per_round=10, batch_size=100, value_hidden=(128, 128),
        actor_lr=3e-4),
    # On top of the family's: what two CPU cores train in half an hour
    "laptop": dict(
        dataset_size=200_000, num_cloning_steps=10_000, num_online_episodes=200, eval_episodes=50, num_online_evals=1,
        policy_hidden=128, policy_blocks=2, policy_dropout=0.0, cloning_batch_size=256, policy_lr=1e-3,
        policy_warmup=500, episodes_per_round=10, batch_size=250, value_hidden=(128, 128), compile="no"),
}  # fmt: skip


# --- THE TWO-LEVEL MDP ---
def step_std(policy, min_std: float):
    """Standard deviation of each denoising step, in the order they are taken (noisiest first), at least min_std: (K,).

    The last one has no noise of its own in sampling; here it draws, too, since a step needs a likelihood.
    """
    std = policy.betas.flip(0).sqrt()
    std[-1] = 0
    return std.clamp(min=min_std)


def step_means(policy, obs, noisy):
    """Mean of each denoising step, clipped to [-1, 1]: obs (B, O), what each one denoises (B, K, A) -> (B, K, A)."""
    obs_part, time_parts = policy.first_layer_parts(obs)
    epsilon = policy.predict_noise(obs_part[:, None] + time_parts.flip(0), noisy)
    alphas, alpha_bars = policy.alphas.flip(0)[:, None], policy.alpha_bars.flip(0)[:, None]
    return ((noisy - (1 - alphas) / (1 - alpha_bars).sqrt() * epsilon) / alphas.sqrt()).clamp(-1, 1)


@torch.no_grad()
def draw_chain(policy, obs, min_std: float):
    """Draw one chain a_K, ..., a_0 at each of obs (B, O): (B, K + 1, A). The last is the action, not clipped."""
    obs_part, time_parts = policy.first_layer_parts(obs)
    stds, chain = step_std(policy, min_std), [torch.randn(len(obs), policy.action_dim, device=obs.device)]
    for std, t in zip(stds, reversed(range(policy.num_steps))):
        epsilon = policy.predict_noise(obs_part + time_parts[t], chain[-1])
        alpha, alpha_bar = policy.alphas[t], policy.alpha_bars[t]
        mean = ((chain[-1] - (1 - alpha) / (1 - alpha_bar).sqrt() * epsilon) / alpha.sqrt()).clamp(-1, 1)
        chain.append(mean + std * torch.randn_like(mean))
    return torch.stack(chain, 1)


def log_probs(policy, obs, chains, min_std: float):
    """log p(a_{k-1} | a_k, s) of each denoising step: obs (B, O), chains (B, K + 1, A) -> (B, K), noisiest first."""
    std = step_std(policy, min_std)[:, None]
    z = (chains[:, 1:] - step_means(policy, obs, chains[:, :-1])) / std
    return (-0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


# --- PPO ---
class Value(nn.Module):
    """V(s): obs (B, O) -> (B,)."""

    def __init__(self, obs_dim, hidden):
        super().__init__()
        layers = [part for i, o in zip((obs_dim, *hidden), hidden) for part in (nn.Linear(i, o), nn.Mish())]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))

    def forward(self, obs):
        return self.layers(obs)[:, 0]


def decisions(rewards, chunk: int, discount: float):
    """Reward of each decision of an episode, the sum of gamma^i r_i over its chunk: rewards (T,) -> (ceil(T / h),)."""
    padded = np.pad(rewards, (0, -len(rewards) % chunk)).reshape(-1, chunk)
    return padded @ discount ** np.arange(chunk)


def advantages(rewards, values, terminal: bool, discount: float, gae_lambda: float):
    """Generalised advantage estimation along one episode of D decisions.

    rewards (D,), values (D + 1,) of its states, the last one's counts for nothing if terminal -> advantages (D,), and
    the value's targets (D,), advantage + value.
    """
    values = np.append(values[:-1], 0.0 if terminal else values[-1])
    found, running = np.zeros(len(rewards)), 0.0
    for i in reversed(range(len(rewards))):
        running = rewards[i] + discount * values[i + 1] - values[i] + discount * gae_lambda * running
        found[i] = running
    return found, found + values[:-1]


def step_clips(num_steps: int, first: float, last: float):
    """Epsilon of each denoising step: from `first` to `last` as (e^(3 x) - 1) / (e^3 - 1) over x in [0, 1]: (K,)."""
    x = torch.linspace(0, 1, num_steps) if num_steps > 1 else torch.ones(1)
    return first + (last - first) * torch.expm1(3 * x) / math.expm1(3)


def ppo_loss(new_log_probs, old_log_probs, advantage, clips, denoising_discount: float):
    """-min(r A, clip(r, 1 - eps, 1 + eps) A), with the ratio r of each denoising step by itself, mean over all.

    new_log_probs, old_log_probs (B, K), advantage (B,) of the environment's steps, clips (K,); a denoising step's
    advantage is discounted for each one after it -> the loss (scalar), and its parts as a dict, detached.
    """
    K = new_log_probs.shape[1]
    weights = denoising_discount ** torch.arange(K - 1, -1, -1, device=clips.device)
    step_advantage, log_ratio = advantage[:, None] * weights, new_log_probs - old_log_probs
    ratio = log_ratio.exp()
    clipped = torch.maximum(torch.minimum(ratio, 1 + clips), 1 - clips)
    loss = -torch.minimum(ratio * step_advantage, clipped * step_advantage).mean()
    info = {"kl": (ratio - 1 - log_ratio).mean(), "clip_rate": ((ratio - 1).abs() > clips).float().mean()}
    return loss, {"policy_loss": loss.detach()} | {name: part.detach() for name, part in info.items()}


def ppo_round(policy, value, policy_optimizer, value_optimizer, batch, args: Args, value_only: bool, run):
    """Some epochs of updates on a round's decisions. Returns metrics, and the number of updates.

    batch: obs (N, O), chains (N, K + 1, A), advantages (N,), value targets (N,).
    """
    obs, chains, advantage, target = batch
    with torch.no_grad():
        old = torch.cat([log_probs(policy, o, c, args.min_std) for o, c in zip(obs.split(4096), chains.split(4096))])
    clips = step_clips(policy.num_steps, args.clip_ratio_first, args.clip_ratio).to(obs.device)
    metrics, updates, moving = {}, 0, not value_only
    for _ in range(args.num_epochs):
        for index in torch.randperm(len(obs), device=obs.device).split(args.batch_size):
            run.check_stop()
            value_loss = (value(obs[index]) - target[index]).square().mean()
            value_optimizer.zero_grad(set_to_none=True)
            value_loss.backward()
            value_optimizer.step()
            metrics["value_loss"], updates = value_loss.detach(), updates + 1
            if moving and len(index) > 1:
                a = advantage[index]
                a = (a - a.mean()) / (a.std() + 1e-8)
                new = log_probs(policy, obs[index], chains[index], args.min_std)
                loss, info = ppo_loss(new, old[index], a, clips, args.denoising_discount)
                policy_optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
                policy_optimizer.step()
                metrics |= info
                moving = info["kl"].item() <= args.target_kl
    return metrics, updates


def collect_round(env, policy, value, first_seed: int, args: Args, device, run):
    """`episodes_per_round` episodes as a batch for `ppo_round`, with the share that succeeded, lengths and returns."""
    all_obs, chains, all_advantages, targets, successes, lengths = [], [], [], [], [], []

    def act(obs):
        chains.append(draw_chain(policy, obs, args.min_std))
        return chains[-1][:, -1].clamp(-1, 1)

    for i in range(args.episodes_per_round):
        episode, success = collect_episode(env, act, first_seed + i, run)
        rewards = decisions(episode.rewards + args.reward_bias, args.chunk, args.discount)
        obs = torch.as_tensor(episode.observations[:: args.chunk], device=device)
        last = torch.as_tensor(episode.next_observations[-1:], device=device)
        with torch.no_grad():
            values = value(torch.cat([obs, last])).cpu().numpy()
        gamma = args.discount**args.chunk
        advantage, target = advantages(rewards, values, bool(episode.terminals[-1]), gamma, args.gae_lambda)
        for kept, new in zip((all_obs, all_advantages, targets), (obs, advantage, target)):
            kept.append(torch.as_tensor(new, dtype=torch.float32, device=device))
        successes.append(success)
        lengths.append(len(episode))
    batch = torch.cat(all_obs), torch.cat(chains), torch.cat(all_advantages), torch.cat(targets)
    return batch, {"episode_success": np.mean(successes), "episode_length": np.mean(lengths)}, sum(lengths)


# --- MAIN ---
def main(argv: list[str] | None = None) -> None:
    args = parse_args(Args, PRESETS, argv)
    if min(args.episodes_per_round, args.num_epochs) < 1 or not args.min_std > 0:
        fail("--episodes-per-round and --num-epochs must be at least 1, --min-std above 0")
    if left := args.num_online_episodes % args.episodes_per_round:
        fail(f"--num-online-episodes {args.num_online_episodes} are not whole rounds of --episodes-per-round "
             f"{args.episodes_per_round}: the last {left} would never act; make it a multiple")  # fmt: skip
    device, env, envs, dataset = set_up(args, make_env, load_dataset)
    obs_dim, action_dim = env.observation_space.shape[0], args.chunk * env.action_space.shape[0]
    buffer = ReplayBuffer(dataset, dataclasses.replace(args, num_samples=0), device)  # of the dataset alone
    sizes = args.diffusion_steps, args.policy_hidden, args.policy_blocks
    policy = DiffusionPolicy(obs_dim, action_dim, *sizes, dropout=args.policy_dropout).to(device)
    ema_policy = copy.deepcopy(policy).requires_grad_(False).eval()  # the one that is sampled, and fine-tuned
    value = Value(obs_dim, args.value_hidden).to(device)
    policy_optimizer = torch.optim.Adam(policy.parameters(), args.policy_lr, fused=True)
    value_optimizer = torch.optim.Adam(value.parameters(), args.value_lr, fused=True)

    def act_cloned(obs):
        return ema_policy.sample(obs, 1)[:, 0]

    def act(obs):  # as `collect_round` does: PPO trains this chain, which `sample` is not
        return draw_chain(ema_policy, obs, args.min_std)[:, -1].clamp(-1, 1)

    run = Run(args, dataset, buffer, policy=policy, ema_policy=ema_policy, policy_optimizer=policy_optimizer,
              value=value, value_optimizer=value_optimizer)  # fmt: skip
    with run:
        # Phase 1: clone the data
        for step in run.steps("cloning", args.num_cloning_steps, envs, act_cloned):
            policy_optimizer.param_groups[0]["lr"] = cloning_lr(step, args)
            states = buffer.obs_index[buffer.sample_index((1, args.cloning_batch_size))[0]]
            obs, actions = buffer.states[states], buffer.data_actions(states)
            loss = policy_update(policy, ema_policy, policy_optimizer, obs, actions, args.policy_ema)
            run.log({"policy_loss": loss}, every=args.log_every)
        for _ in run.steps("offline", 0):  # phase 2: none
            pass

        # Phase 3: episodes, then PPO on them; a step is one round
        if run.starts("online"):
            policy.load_state_dict(ema_policy.state_dict())
            policy_optimizer.state.clear()
            policy_optimizer.param_groups[0]["lr"] = args.actor_lr
        policy.eval()  # a likelihood without dropout
        num_rounds = args.num_online_episodes // args.episodes_per_round
        for i in run.steps("online", num_rounds, envs, act, args.num_online_evals, "round"):
            first_seed = args.seed * 1_000_003 + i * args.episodes_per_round
            batch, metrics, env_steps = collect_round(env, policy, value, first_seed, args, device, run)
            warming_up = i < args.num_value_warmup
            info, updates = ppo_round(policy, value, policy_optimizer, value_optimizer, batch, args, warming_up, run)
            ema_policy.load_state_dict(policy.state_dict())
            run.count(episodes=args.episodes_per_round, env_steps=env_steps, updates=updates)
            run.log(metrics | info)
        finish(run, env, make_env, act, ema_policy, None)


if __name__ == "__main__":
    run_program(main)
