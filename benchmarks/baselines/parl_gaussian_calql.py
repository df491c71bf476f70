"""PA-RL + Cal-QL with a tanh-Gaussian policy: figure 17 of Policy Agnostic RL, arXiv 2412.06685.

The algorithm of `parl_diffusion_calql.py` with another policy: all that PA-RL asks of one is that it can be sampled and
cloned, here by likelihood. Where Cal-QL's Gaussian (`calql_gaussian.py`) climbs Q by a gradient through the critic into
its own weights, this one is taught improved actions, like any other policy.

    python -m benchmarks.baselines.parl_gaussian_calql                                  # a laptop: minutes
    python -m benchmarks.baselines.parl_gaussian_calql --env-id kitchen-complete-v2     # the paper's setting, one GPU
    python -m benchmarks.baselines.parl_gaussian_calql --resume runs/<folder>           # continue after a stop

paper                                     | here
------------------------------------------|---------------------------------------------------------------------
SAC app. C     squashed Gaussian          | TanhGaussianPolicy
sec. 3         cloning by likelihood      | TanhGaussianPolicy.loss
sec. 3         sampling                   | TanhGaussianPolicy.sample
alg. 2         line 1 / 3-4 / 5-8         | main: phases 1 / 2 / 3

The first ten minutes: `TanhGaussianPolicy.loss`, `TanhGaussianPolicy.sample` and `main`, beside `main` of
`parl_diffusion_calql.py`: they differ in the line that makes the policy. Action optimization, Cal-QL's loss, critic,
replay buffer and distilling are imported from there.

As the paper says of figure 17, the rate of distilling (3e-4) is the only hyperparameter that changes. Sizes of the
network, (256, 256), are those of the paper's Cal-QL policy; averaged weights are sampled as for diffusion.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from benchmarks.harness.cli import RunArgs, parse_args, run_program
from benchmarks.harness.datasets import set_up
from benchmarks.harness.fast_critic import compiled
from benchmarks.harness.pictures import finish
from benchmarks.harness.rollouts import collect_episode
from benchmarks.harness.runs import Run
from benchmarks.tasks import load_dataset, make_env
from parl_diffusion_calql import (
    Critic,
    ReplayBuffer,
    candidate_spread,
    choose_greedy_distillation,
    cloning_lr,
    critic_update,
    distill,
    optimize,
    policy_update,
    refresh_candidates,
    select_actions,
)


# --- ARGUMENTS ---
@dataclass
class Args(RunArgs):
    """PA-RL + Cal-QL with a tanh-Gaussian policy. Defaults shown are those of the preset in force."""

    # phases
    num_cloning_steps: int = 300_000  # phase 1: updates of the policy
    num_offline_steps: int = 1_000_000  # phase 2: updates of the critic; 0: no offline phase
    num_online_episodes: int = 1_000  # phase 3: episodes; 0: offline only
    # policy
    chunk: int = 1  # steps of one decision, taken without looking; the policy's action holds all of them
    policy_hidden: tuple[int, ...] = (256, 256)  # hidden layers
    cloning_batch_size: int = 1024  # of the paper; 256 in the release
    policy_lr: float = 3e-4  # Adam, cloning: warm-up, then cosine decay
    policy_warmup: int = 2_000  # updates of warm-up
    distill_lr: float = 3e-4  # Adam, distilling: constant (figure 17)
    policy_ema: float = 0.002  # rate of the averaged copy of the policy, the one that is sampled
    # critic
    ensemble_size: int = 10  # members of the critic
    target_subset: int = 2  # members whose minimum is the TD target, and members penalised: both drawn anew each update
    critic_hidden: tuple[int, ...] = (256, 256)  # hidden layers
    critic_loss: Literal["hl_gauss", "mse"] = "hl_gauss"  # classification over bins of the value, or regression
    num_bins: int = 128  # bins of hl_gauss
    hl_gauss_release_width: bool = False  # the release's effective sigma, sqrt(2) x 0.75 bins, instead of 0.75 bins
    critic_lr: float = 3e-4  # Adam
    batch_size: int = 256  # transitions of a critic update, states of a distilling update
    target_tau: float = 0.005  # rate of the target critic
    cql_alpha: float = 0.005  # weight of the Cal-QL penalty
    cql_actions: int = 10  # random actions in its logsumexp
    release_returns: bool = False  # a cut trajectory is worth the sum up to the cut, online a failed one, too
    # action optimization
    num_samples: int = 32  # k, candidates drawn from the policy
    num_keep: int = 10  # m, candidates kept by rank
    num_gradient_steps: int = 10  # T, gradient steps on each kept action; 0: rank only
    gradient_step_size: float = 3e-4  # alpha of equation 4.2
    keep_best_of_path: bool = False  # the release's way: take every step, return the best point of the path
    climb_all: bool = False  # where only the best is wanted, climb from candidates that cannot become it, too
    climb_first: int = 0  # there climb from so many of highest Q only: a shortcut, the best may be another; 0: from all
    distill_data_actions: bool = True  # alg. 1's a_data(s) is one more candidate when distilling
    distill_from: Literal["policy", "data"] = "policy"  # data: clone its actions by their advantage instead (figure 6)
    target_data_actions: bool = False  # and in the critic's targets (the release: there never)
    sample_backup: bool = False  # targets of a drawn optimized action (section 4.3), not the best (release, max-backup)
    base_policy_backup: bool = False  # targets of one sample of the policy (figure 16, where this is online only)
    # acting and distilling
    greedy_rollouts: bool = True  # act online with the best candidate; else draw from equation 4.3
    distill_selection: Literal["auto", "greedy", "sample"] = "auto"  # teach the best candidate, or draws from eq. 4.3
    greedy_below_std: float = 1.0  # auto: greedy if the candidates' Q differ less (offline, standard deviation)
    mixing_ratio: float = 0.5  # share of offline data in the critic's online batch
    distill_mixed: bool = False  # distil on such batches (release, from images), not uniformly over all states
    utd: float = 1.0  # critic updates per environment step, online
    distill_ratio: float = 1.0  # distilling updates per environment step


# Those of parl_diffusion_calql.py, but for the policy's sizes and the rate of distilling.
PRESETS: dict[str, dict] = {
    "default": {}, "antmaze": dict(critic_hidden=(256, 256, 256, 256)),
    "kitchen": dict(critic_hidden=(512, 512, 512), num_offline_steps=500_000, reward_bias=-4.0, reward_min=-4.0,
                    sparse_reward=False, greedy_rollouts=False, sample_backup=True),
    "ogbench": dict(reward_bias=0.0, reward_min=0.0),  # its rewards are minus the number of parts left to do
    "pointmaze": dict(
        num_cloning_steps=2_000, num_offline_steps=1_500, num_online_episodes=40, eval_episodes=50, compile="no",
        eval_processes=False, num_offline_evals=3, num_online_evals=4, log_every=50, policy_hidden=(128, 128),
        cloning_batch_size=256, policy_lr=1e-3, policy_warmup=200, ensemble_size=2, critic_hidden=(128, 128),
        critic_lr=1e-3, discount=0.95, target_tau=0.03, num_bins=64, cql_actions=4, num_samples=8, num_keep=2,
        num_gradient_steps=2, gradient_step_size=0.03),
    # On top of the family's: what two CPU cores train in half an hour
    "laptop": dict(
        dataset_size=200_000, num_cloning_steps=10_000, num_offline_steps=6_000, num_online_episodes=20,
        eval_episodes=50, num_offline_evals=1, num_online_evals=1, cloning_batch_size=256, policy_lr=1e-3,
        policy_warmup=500, ensemble_size=2, critic_hidden=(256, 256), critic_lr=5e-4, batch_size=128, target_tau=0.02,
        num_bins=64, cql_actions=2, num_samples=4, num_keep=4, num_gradient_steps=1, gradient_step_size=0.001,
        greedy_rollouts=False, distill_selection="sample", utd=0.5, distill_ratio=0.05, compile="no"),
}  # fmt: skip


# --- TANH-GAUSSIAN POLICY ---
class TanhGaussianPolicy(nn.Module):
    """a = tanh(u) in [-1, 1]^A, u from a normal distribution whose mean and deviation an MLP gives (SAC, appendix C).

    The deviations' logarithms are kept in [-5, 2], so that a policy that is cloned cannot become infinitely sure.
    """

    def __init__(self, obs_dim, action_dim, hidden=(256, 256)):
        super().__init__()
        self.action_dim, self.width, sizes = action_dim, max(hidden), (obs_dim, *hidden)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes, hidden))
        self.last = nn.Linear(hidden[-1], 2 * action_dim)
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
            nn.init.zeros_(layer.bias)
        nn.init.orthogonal_(self.last.weight, 0.01)  # at first the same everywhere: mean 0, deviation 1
        nn.init.zeros_(self.last.bias)

    def normal(self, obs):
        """obs (B, O) -> mean and standard deviation of u, (B, A) each."""
        for layer in self.layers:
            obs = F.relu(layer(obs))
        mean, log_std = self.last(obs).chunk(2, -1)
        return mean, log_std.clamp(-5, 2).exp()

    def draw(self, obs, num_samples, noise=None):
        """Actions (B, n, A) through which gradients pass to the policy, and their log-probabilities (B, n).

        obs (B, O); noise (B, n, A) standard normal, None: drawn here.
        """
        noise = self.draw_noise(obs, num_samples) if noise is None else noise
        mean, std = (parameter[:, None] for parameter in self.normal(obs))
        u = mean + std * noise
        return torch.tanh(u), log_density(u, mean, std)

    def log_prob(self, obs, actions):
        """Log-density of actions (B, A) at obs (B, O), in the actions' space: (B,). Of actions at +-1, of +-0.999."""
        return log_density(torch.atanh(actions.clamp(-0.999, 0.999)), *self.normal(obs))

    def loss(self, obs, actions):
        """Negative log-likelihood: obs (B, O), actions (B, A) -> scalar."""
        return -self.log_prob(obs, actions).mean()

    def draw_noise(self, obs, num_samples):
        """What `draw` and `sample` use up for obs (B, O): standard normal, (B, n, A)."""
        return torch.randn(len(obs), num_samples, self.action_dim, device=obs.device)

    @torch.no_grad()
    def sample(self, obs, num_samples, noise=None):
        """obs (B, O), num_samples n per state -> actions (B, n, A). noise (B, n, A) as in `draw`."""
        return self.draw(obs, num_samples, noise)[0]

    @torch.no_grad()
    def mode(self, obs):
        """The action of u's mean, (B, O) -> (B, A): what is evaluated."""
        return torch.tanh(self.normal(obs)[0])


def log_density(u, mean, std):
    """log p(tanh(u)), u (..., A) normal: the normal's, less the sum of log(1 - tanh(u)^2) (SAC, appendix C): (...)."""
    normal = -0.5 * ((u - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
    return (normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


# --- MAIN ---
def main(argv: list[str] | None = None) -> None:
    args = parse_args(Args, PRESETS, argv)
    device, env, envs, dataset = set_up(args, make_env, load_dataset)
    obs_dim, action_dim = env.observation_space.shape[0], args.chunk * env.action_space.shape[0]
    buffer = ReplayBuffer(dataset, args, device)
    policy = TanhGaussianPolicy(obs_dim, action_dim, args.policy_hidden).to(device)
    ema_policy = copy.deepcopy(policy).requires_grad_(False).eval()  # the one that is sampled
    num_bins, q_min = args.num_bins if args.critic_loss == "hl_gauss" else 1, args.reward_min / (1 - args.discount)
    critic = Critic(obs_dim, action_dim, args.critic_hidden, args.ensemble_size, num_bins, q_min).to(device)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    policy_optimizer = torch.optim.Adam(policy.parameters(), args.policy_lr, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True)
    policy.loss, update_critic = compiled(args, device, policy.loss, critic_update)

    def act_optimized(obs):  # pi^opt of algorithm 1
        actions, q = optimize(critic, obs, ema_policy.sample(obs, args.num_samples), args, args.greedy_rollouts)
        return select_actions(actions, q, args.greedy_rollouts)

    run = Run(args, dataset, buffer, policy=policy, ema_policy=ema_policy, policy_optimizer=policy_optimizer,
              critic=critic, target_critic=target_critic, critic_optimizer=critic_optimizer)  # fmt: skip
    q_stds = run.progress.setdefault("q_stds", [])  # measured in the second half of phase 2
    with run:
        # Phase 1: clone the data (algorithm 2, line 1)
        for step in run.steps("cloning", args.num_cloning_steps, envs, lambda obs: ema_policy.sample(obs, 1)[:, 0]):
            policy_optimizer.param_groups[0]["lr"] = cloning_lr(step, args)
            states = buffer.obs_index[buffer.sample_index((1, args.cloning_batch_size))[0]]
            obs, actions = buffer.states[states], buffer.data_actions(states)
            loss = policy_update(policy, ema_policy, policy_optimizer, obs, actions, args.policy_ema)
            run.log({"policy_loss": loss}, every=args.log_every)

        # Phase 2: train the critic (algorithm 2, lines 3 and 4). The policy is frozen: its candidates are drawn once
        if run.phase == "offline" and args.num_offline_steps:
            with torch.random.fork_rng():  # so that a resumed run draws the same
                torch.manual_seed(args.seed)
                for part in run.each("caching", torch.arange(len(buffer.states), device=device).split(2**14)):
                    refresh_candidates(ema_policy, buffer, part)
        for step in run.steps("offline", args.num_offline_steps, envs, act_optimized, args.num_offline_evals):
            index = buffer.sample_index((1, args.batch_size))[0]
            info = update_critic(critic, target_critic, critic_optimizer, buffer, index, args)
            if (step + 1) % args.log_every == 0:
                info |= candidate_spread(critic, buffer, buffer.obs_index[index], args)
                q_stds += [info["q_std"].item()] if 2 * step >= args.num_offline_steps else []
                run.log(info)

        # Phase 3: an episode, distilling, critic training (algorithm 2, lines 3 to 8); a step is one episode
        if run.starts("online"):  # with fresh moments (release), and the policy at a constant rate
            policy_optimizer.state.clear()
            critic_optimizer.state.clear()
            policy_optimizer.param_groups[0]["lr"] = args.distill_lr
        greedy = choose_greedy_distillation(args, q_stds)
        for i in run.steps("online", args.num_online_episodes, envs, act_optimized, args.num_online_evals, "episode"):
            episode, success = collect_episode(env, act_optimized, args.seed * 100_003 + i, run)
            buffer.add(episode)
            num_distill, num_critic = round(len(episode) * args.distill_ratio), round(len(episode) * args.utd)
            metrics = {"episode_success": success, "episode_length": len(episode)}
            if num_distill:
                metrics |= distill(policy, ema_policy, policy_optimizer, critic, buffer, num_distill, greedy, args)[1]
            index = buffer.sample_index((num_critic, args.batch_size))
            refresh_candidates(ema_policy, buffer, torch.cat([buffer.obs_index[index], buffer.next_index[index]]))
            for rows in index:
                run.check_stop()
                metrics |= update_critic(critic, target_critic, critic_optimizer, buffer, rows, args)
            run.count(episodes=1, env_steps=len(episode), updates=num_distill + num_critic)
            run.log(metrics)
        finish(run, env, make_env, act_optimized, ema_policy, critic)


if __name__ == "__main__":
    run_program(main)
