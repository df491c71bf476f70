"""Cal-QL whose actions come from the cross-entropy method over the critic: figures 5, 14 and 15 of arXiv 2412.06685.

Wherever Cal-QL asks a policy for an action (to act, and at s and s' of an update), a Gaussian over actions is fitted to
the best of a population by Q, and the next population drawn from it, a few times. No policy is trained: the first
population is random, or drawn from a cloned diffusion policy that stays as it is. A maximum found far from the data is
where the critic errs, which is what PA-RL's figures show.

    python -m benchmarks.baselines.cem_calql                                        # a small maze on a laptop: minutes
    python -m benchmarks.baselines.cem_calql --env-id antmaze-large-diverse-v2      # figure 5, one GPU
    python -m benchmarks.baselines.cem_calql --initial-population policy            # figure 15
    python -m benchmarks.baselines.cem_calql --critic-loss mse                      # figure 14, centre and right
    python -m benchmarks.baselines.cem_calql --resume runs/<folder>                 # continue after a stop

paper                                             | here
--------------------------------------------------|-------------------------------------------------------------
fig. 5, 15  the first population                  | UniformPolicy, DiffusionPolicy
sec. 5.3    iterated: keep the top few, refit     | cross_entropy_method
eq. 3.3     Cal-QL                                | critic_update
fig. 14     over-optimism                         | over_optimism
fig. 5      offline, then online                  | main: phases 1 / 2 / 3

The first ten minutes: `cross_entropy_method`, `critic_update` and `main`. Diffusion policy, critic, Cal-QL's loss and
replay buffer are those of `parl_diffusion_calql.py`, imported.

The paper takes the cross-entropy method's parameters from Simmons-Edler et al. (arXiv 1903.10605) and does not print
them. Four iterations of 64 actions with 6 elites here are our choice, flags, and not checked against that paper. Our
choice as well: the action taken is the best of the last population, the Gaussian is diagonal and never narrower than
`--cem-min-std`. Figure 14's values without bounds are logged as `cem_...`: `q_...` must stay in [q_min, 0].
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn

from benchmarks.harness.cli import RunArgs, fail, parse_args, run_program
from benchmarks.harness.datasets import set_up
from benchmarks.harness.fast_critic import FrozenCritic, in_parts
from benchmarks.harness.pictures import finish
from benchmarks.harness.rollouts import collect_episode
from benchmarks.harness.runs import Run
from benchmarks.tasks import load_dataset, make_env
from parl_diffusion_calql import (
    Critic,
    DiffusionPolicy,
    ReplayBuffer,
    calql_loss,
    cloning_lr,
    gradient_step,
    policy_update,
    refresh_candidates,
    td_target,
)


# --- ARGUMENTS ---
@dataclass
class Args(RunArgs):
    """Cal-QL with the cross-entropy method. Defaults shown are those of the preset in force."""

    compile: Literal["auto", "no"] = "auto"  # nothing here is compiled
    # phases
    num_cloning_steps: int = 300_000  # phase 1: updates of the policy; of no effect with random populations
    num_offline_steps: int = 1_000_000  # phase 2: updates of the critic; 0: no offline phase
    num_online_episodes: int = 1_000  # phase 3: episodes; 0: offline only
    # cross-entropy method
    initial_population: Literal["random", "policy"] = "random"  # uniform actions, or samples of the cloned policy
    num_samples: int = 64  # actions of a population
    num_elites: int = 6  # the best of them, to which the next Gaussian is fitted
    num_iterations: int = 4  # populations, the first included
    cem_min_std: float = 0.01  # least standard deviation of that Gaussian
    # policy
    chunk: int = 1  # steps of one decision, taken without looking; the policy's action holds all of them
    diffusion_steps: int = 5  # K, denoising steps
    policy_hidden: int = 256  # width of the policy's residual blocks (4 x inside)
    policy_blocks: int = 3  # residual blocks
    policy_dropout: float = 0.1  # in the residual blocks, when training
    cloning_batch_size: int = 1024  # of the paper
    policy_lr: float = 3e-4  # Adam, cloning: warm-up, then cosine decay
    policy_warmup: int = 2_000  # updates of warm-up
    policy_ema: float = 0.002  # rate of the averaged copy of the policy, the one that is sampled
    # critic
    ensemble_size: int = 10  # members of the critic
    target_subset: int = 2  # members whose minimum is the TD target, and members penalised: both drawn anew each update
    critic_hidden: tuple[int, ...] = (256, 256)  # hidden layers
    critic_loss: Literal["hl_gauss", "mse"] = "hl_gauss"  # classification over bins of the value, or regression
    num_bins: int = 128  # bins of hl_gauss
    hl_gauss_release_width: bool = False  # sigma sqrt(2) x 0.75 bins instead of 0.75 bins
    critic_lr: float = 3e-4  # Adam
    batch_size: int = 256  # transitions of an update
    target_tau: float = 0.005  # rate of the target critic
    cql_alpha: float = 0.005  # weight of the Cal-QL penalty
    cql_actions: int = 10  # random actions in its logsumexp
    release_returns: bool = False  # a cut trajectory is worth the sum up to the cut, online a failed one, too
    # online
    mixing_ratio: float = 0.5  # share of offline data in the critic's online batch
    utd: float = 1.0  # critic updates per environment step


# Numbers of updates and sizes are those of parl_diffusion_calql.py, so that the two differ in the method alone.
PRESETS: dict[str, dict] = {
    "default": {}, "antmaze": dict(critic_hidden=(256, 256, 256, 256)),
    "kitchen": dict(critic_hidden=(512, 512, 512), num_offline_steps=500_000, reward_bias=-4.0, reward_min=-4.0,
                    sparse_reward=False),
    "ogbench": dict(reward_bias=0.0, reward_min=0.0),  # its rewards are minus the number of parts left to do
    # 3 x 16 actions cost about what 8 samples and the gradient steps of PA-RL cost there
    "pointmaze": dict(
        num_cloning_steps=2_000, num_offline_steps=1_500, num_online_episodes=40, eval_episodes=50, compile="no",
        eval_processes=False, num_offline_evals=3, num_online_evals=4, log_every=50, policy_hidden=64, policy_blocks=2,
        cloning_batch_size=256, policy_lr=1e-3, policy_warmup=200, ensemble_size=2, critic_hidden=(128, 128),
        critic_lr=1e-3, discount=0.95, target_tau=0.03, num_bins=64, cql_actions=4, num_samples=16, num_elites=4,
        num_iterations=3),
    # On top of the family's: what two CPU cores train in half an hour
    "laptop": dict(
        dataset_size=200_000, num_cloning_steps=10_000, num_offline_steps=6_000, num_online_episodes=20,
        eval_episodes=50, num_offline_evals=1, num_online_evals=1, policy_hidden=128, policy_blocks=2,
        policy_dropout=0.0, cloning_batch_size=256, policy_lr=1e-3, policy_warmup=500, ensemble_size=2,
        critic_hidden=(256, 256), critic_lr=5e-4, batch_size=128, target_tau=0.02, num_bins=64, cql_actions=2,
        num_samples=16, num_elites=4, num_iterations=3, utd=0.5, compile="no"),
}  # fmt: skip


# --- CROSS-ENTROPY METHOD ---
class UniformPolicy(nn.Module):
    """Actions uniform over [-1, 1]^A whatever the state: the random first population, in the shape of a policy."""

    width = 1  # floats of a sample's largest activation

    def __init__(self, action_dim):
        super().__init__()
        self.action_dim = action_dim

    def draw_noise(self, obs, num_samples):
        """What `sample` returns for obs (B, O): (B, n, A)."""
        return torch.rand(len(obs), num_samples, self.action_dim, device=obs.device) * 2 - 1

    def sample(self, obs, num_samples, noise=None):
        """obs (B, O), num_samples n per state -> actions (B, n, A)."""
        return self.draw_noise(obs, num_samples) if noise is None else noise


@torch.no_grad()
def cross_entropy_method(critic, obs, population, num_elites, num_iterations, min_std=0.01, low=-1.0, high=1.0):
    """Maximise Q, the ensemble's mean, from a first population; the best action of the last one, and its Q.

    An iteration ranks a population and fits a diagonal Gaussian to its elites, from which the next one, of the same
    size, is drawn and clipped. num_iterations counts populations: 1 only ranks the first.

    obs (B, O), population (B, n, A) in [low, high] -> actions (B, A), q (B,).
    """
    elites = None
    for _ in range(num_iterations):
        if elites is not None:
            mean, std = elites.mean(1, keepdim=True), elites.std(1, correction=0, keepdim=True)  # (B, 1, A)
            population = (mean + std.clamp(min=min_std) * torch.randn_like(population)).clamp(low, high)
        q, index = critic(obs, population).mean(0).topk(num_elites, dim=1, sorted=True)
        elites = population.gather(1, index[..., None].expand(-1, -1, population.shape[-1]))
    return elites[:, 0], q[:, 0]


def cem_actions(critic, obs, population, args: Args):
    """`cross_entropy_method` with the run's settings; but for --plain with the same critic made fast."""
    critic = critic if args.plain else FrozenCritic(critic)
    settings = args.num_elites, args.num_iterations, args.cem_min_std
    return in_parts(lambda o, a: cross_entropy_method(critic, o, a, *settings), obs, population)


# --- CAL-QL WITH ITS ACTIONS ---
def critic_update(critic, target_critic, optimizer, buffer, index, args: Args) -> dict[str, torch.Tensor]:
    """One update of Cal-QL on the transitions `index` (B,); the actions at s and s' are the cross-entropy method's."""
    states = torch.cat([buffer.obs_index[index], buffer.next_index[index]])
    if args.initial_population == "policy":
        population = buffer.candidates[states]
    else:
        shape = len(states), args.num_samples, buffer.action_at.shape[1] * args.chunk
        population = torch.rand(shape, device=states.device) * 2 - 1
    actions, _ = cem_actions(critic, buffer.states[states], population, args)
    current_actions, next_actions = actions.chunk(2)
    obs, next_obs = buffer.states[states].chunk(2)
    td_members = torch.randperm(args.ensemble_size, device=obs.device)[: args.target_subset]
    cql_members = torch.randperm(args.ensemble_size, device=obs.device)[: args.target_subset]
    rewards, masks = buffer.rewards[index], buffer.masks[index]
    target_q = td_target(target_critic, rewards, masks, next_obs, next_actions, args.discount**args.chunk, td_members)
    random_actions = torch.rand(len(index), args.cql_actions, actions.shape[-1], device=obs.device) * 2 - 1
    data_actions, mc_returns = buffer.data_actions(states[: len(index)]), buffer.mc_returns[index]
    batch = critic, obs, data_actions, target_q, mc_returns, current_actions, next_actions, random_actions
    loss, info = calql_loss(*batch, args.cql_alpha, cql_members, args.hl_gauss_release_width)
    gradient_step(loss, optimizer, critic, target_critic, args.target_tau)
    if args.critic_loss == "mse":  # which nothing bounds, and a run stops where a `q_` leaves [q_min, 0]
        values = ("q_data", "q_random", "q_optimized", "target_q")
        info = {"cem_" + name if name in values else name: value for name, value in info.items()}
    return info


def over_optimism(critic, buffer, first: int):
    """Figure 14: Q of the actions taken less the discounted return that followed, mean over the windows from `first`.

    buffer: with an episode at its end, whose windows begin there. NaN if there are none.
    """
    rows = buffer.starts[first:]
    states = buffer.obs_index[rows]
    with torch.no_grad():
        q = critic(buffer.states[states], buffer.data_actions(states)[:, None]).mean(0)[:, 0]
    return (q - buffer.mc_returns[rows]).mean()


# --- MAIN ---
def main(argv: list[str] | None = None) -> None:
    args = parse_args(Args, PRESETS, argv)
    if not 1 <= args.num_elites <= args.num_samples or args.num_iterations < 1 or args.cem_min_std < 0:
        fail("--num-elites must be from 1 to --num-samples, --num-iterations at least 1, --cem-min-std at least 0")
    device, env, envs, dataset = set_up(args, make_env, load_dataset)
    obs_dim, action_dim = env.observation_space.shape[0], args.chunk * env.action_space.shape[0]
    cloned = args.initial_population == "policy"
    num_candidates = args.num_samples if cloned else 0  # random populations are drawn anew each time
    buffer = ReplayBuffer(dataset, dataclasses.replace(args, num_samples=num_candidates), device)
    sizes = args.diffusion_steps, args.policy_hidden, args.policy_blocks
    diffusion_policy = DiffusionPolicy(obs_dim, action_dim, *sizes, dropout=args.policy_dropout).to(device)
    ema_policy = copy.deepcopy(diffusion_policy).requires_grad_(False).eval()  # the one that is sampled
    policy = ema_policy if cloned else UniformPolicy(action_dim)  # where the first population comes from
    num_bins, q_min = args.num_bins if args.critic_loss == "hl_gauss" else 1, args.reward_min / (1 - args.discount)
    critic = Critic(obs_dim, action_dim, args.critic_hidden, args.ensemble_size, num_bins, q_min).to(device)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    policy_optimizer = torch.optim.Adam(diffusion_policy.parameters(), args.policy_lr, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True)

    def act_cloned(obs):
        return policy.sample(obs, 1)[:, 0]

    def act(obs):
        return cem_actions(critic, obs, policy.sample(obs, args.num_samples), args)[0]

    run = Run(args, dataset, buffer, policy=diffusion_policy, ema_policy=ema_policy, policy_optimizer=policy_optimizer,
              critic=critic, target_critic=target_critic, critic_optimizer=critic_optimizer)  # fmt: skip
    with run:
        # Phase 1: clone the data, where populations come from the policy; otherwise measure random actions
        for step in run.steps("cloning", args.num_cloning_steps if cloned else 0, envs, act_cloned):
            policy_optimizer.param_groups[0]["lr"] = cloning_lr(step, args)
            states = buffer.obs_index[buffer.sample_index((1, args.cloning_batch_size))[0]]
            obs, actions = buffer.states[states], buffer.data_actions(states)
            loss = policy_update(diffusion_policy, ema_policy, policy_optimizer, obs, actions, args.policy_ema)
            run.log({"policy_loss": loss}, every=args.log_every)

        # Phase 2: train the critic; of a cloned policy, which is frozen, the samples are drawn once
        if cloned and run.phase == "offline" and args.num_offline_steps:
            with torch.random.fork_rng():  # so that a resumed run draws the same
                torch.manual_seed(args.seed)
                for part in run.each("caching", torch.arange(len(buffer.states), device=device).split(2**14)):
                    refresh_candidates(policy, buffer, part)
        for _ in run.steps("offline", args.num_offline_steps, envs, act, args.num_offline_evals):
            index = buffer.sample_index((1, args.batch_size))[0]
            info = critic_update(critic, target_critic, critic_optimizer, buffer, index, args)
            run.log(info, every=args.log_every)

        # Phase 3: an episode, then critic training; a step is one episode
        if run.starts("online"):  # with fresh moments, as PA-RL
            critic_optimizer.state.clear()
        for i in run.steps("online", args.num_online_episodes, envs, act, args.num_online_evals, "episode"):
            episode, success = collect_episode(env, act, args.seed * 100_003 + i, run)
            first = len(buffer.starts)
            buffer.add(episode)
            num_updates = round(len(episode) * args.utd)
            metrics = {"episode_success": success, "episode_length": len(episode)}
            if len(buffer.starts) > first:
                metrics["over_optimism"] = over_optimism(critic, buffer, first)
            index = buffer.sample_index((num_updates, args.batch_size))
            if cloned:
                refresh_candidates(policy, buffer, torch.cat([buffer.obs_index[index], buffer.next_index[index]]))
            for rows in index:
                run.check_stop()
                metrics |= critic_update(critic, target_critic, critic_optimizer, buffer, rows, args)
            run.count(episodes=1, env_steps=len(episode), updates=num_updates)
            run.log(metrics)
        finish(run, env, make_env, act, policy, critic)


if __name__ == "__main__":
    run_program(main)
