"""Cal-QL with a tanh-Gaussian policy, offline and then online (Nakamoto et al., arXiv 2303.05479).

The critic is trained by TD and by Cal-QL's penalty, which pushes Q of the policy's actions down towards Q of the data's
actions, but never below the return that the data itself had. The policy is SAC's: a Gaussian squashed by tanh, which
climbs Q through its own samples and keeps an entropy by a learned temperature. That gradient is what ties the method to
policies of one density; PA-RL (arXiv 2412.06685) compares with it in table 1 and figure 17.

    python -m benchmarks.baselines.calql_gaussian                                      # a laptop: minutes
    python -m benchmarks.baselines.calql_gaussian --env-id antmaze-large-diverse-v2    # the paper's setting, one GPU
    python -m benchmarks.baselines.calql_gaussian --resume runs/<folder>               # continue after a stop

paper                                             | here
--------------------------------------------------|-------------------------------------------------------------
SAC app. C      squashed Gaussian                 | TanhGaussianPolicy, log_density
SAC eq. 7       policy loss                       | actor_loss
SAC eq. 18      entropy temperature               | temperature_loss
CQL app. F      logsumexp by importance sampling  | calql_gaussian_loss
PA-RL eq. 3.3   no lower than the data's return   | calql_gaussian_loss
PA-RL app. B.2  offline, then online              | main: phases 1 / 2 / 3

The first ten minutes: `calql_gaussian_loss`, `actor_loss` and `main`. Critic, HL-Gauss, returns and replay buffer are
those of `parl_diffusion_calql.py`, imported: in PA-RL's paper this baseline shares most hyperparameters with PA-RL and
has a policy of (256, 256).

Our choices where the papers are silent: the policy climbs the mean of the ensemble, which is also what PA-RL ranks by;
targets without entropy and, on AntMaze, of the best of the sampled actions (max-backup); the deviation of the policy is
bounded below. The policy is not cloned before, as in Cal-QL; `--num-cloning-steps` does that. `--no-importance` has the
penalty as `parl_diffusion_calql.py` has it, without densities and with the data's action among the others.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from benchmarks.harness.cli import RunArgs, fail, parse_args, run_program
from benchmarks.harness.datasets import set_up
from benchmarks.harness.pictures import finish
from benchmarks.harness.rollouts import collect_episode
from benchmarks.harness.runs import Run
from benchmarks.tasks import load_dataset, make_env
from parl_diffusion_calql import Critic, ReplayBuffer, gradient_step, td_target


# --- ARGUMENTS ---
@dataclass
class Args(RunArgs):
    """Cal-QL with a tanh-Gaussian policy. Defaults shown are those of the preset in force."""

    compile: Literal["auto", "no"] = "auto"  # nothing here is compiled
    # phases
    num_cloning_steps: int = 0  # phase 1: updates of the policy by likelihood before RL begins; 0: none
    num_offline_steps: int = 1_000_000  # phase 2: updates of critic and policy; 0: no offline phase
    num_online_episodes: int = 1_000  # phase 3: episodes; 0: offline only
    # policy
    chunk: int = 1  # steps of one decision, taken without looking; the policy's action holds all of them
    policy_hidden: tuple[int, ...] = (256, 256)  # hidden layers
    policy_lr: float = 3e-4  # Adam, of policy and temperature; 1e-4 in Cal-QL
    cloning_batch_size: int = 1024  # transitions of an update of phase 1
    initial_temperature: float = 1.0  # alpha of SAC at the start
    num_samples: int = 8  # of the policy, for the picture's map of values alone
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
    cql_actions: int = 10  # actions in its logsumexp: so many random ones, of the policy at s, and at s'
    importance: bool = True  # each of them weighs one over its density
    max_backup: bool = False  # targets of the best of the policy's cql_actions at s', not of one
    release_returns: bool = False  # a cut trajectory is worth the sum up to the cut, online a failed one, too
    # online
    mixing_ratio: float = 0.5  # share of offline data in an online batch
    utd: float = 1.0  # updates per environment step


# Numbers of updates and sizes are those of parl_diffusion_calql.py, so that the two differ in the method alone.
PRESETS: dict[str, dict] = {
    "default": {}, "antmaze": dict(critic_hidden=(256, 256, 256, 256), max_backup=True),
    "kitchen": dict(critic_hidden=(512, 512, 512), num_offline_steps=500_000, reward_bias=-4.0, reward_min=-4.0,
                    sparse_reward=False),
    "ogbench": dict(reward_bias=0.0, reward_min=0.0),  # its rewards are minus the number of parts left to do
    "pointmaze": dict(
        num_offline_steps=1_500, num_online_episodes=40, eval_episodes=50, compile="no", eval_processes=False,
        num_offline_evals=3, num_online_evals=4, log_every=50, policy_hidden=(128, 128), policy_lr=1e-3,
        ensemble_size=2, critic_hidden=(128, 128), critic_lr=1e-3, discount=0.95, target_tau=0.03, num_bins=64,
        cql_actions=4),
    # On top of the family's: what two CPU cores train in half an hour
    "laptop": dict(
        dataset_size=200_000, num_offline_steps=6_000, num_online_episodes=20, eval_episodes=50, num_offline_evals=1,
        num_online_evals=1, policy_lr=5e-4, ensemble_size=2, critic_hidden=(256, 256), critic_lr=5e-4, batch_size=128,
        target_tau=0.02, num_bins=64, cql_actions=2, utd=0.5, compile="no"),
    # On top of that, the flags of parl_diffusion_calql.py's preset of that name, as far as they are here
    "laptop-chunk": dict(
        chunk=5, dataset_size=100_000, cql_actions=4, num_offline_steps=20_000, num_online_episodes=60, critic_lr=3e-4,
        target_tau=0.005),
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


# --- SAC ---
def actor_loss(critic, obs, actions, log_probs, temperature: float):
    """SAC's equation 7, E[alpha log pi(a|s) - Q(s, a)], Q being the ensemble's mean: (B, O), (B, A), (B,) -> scalar."""
    return (temperature * log_probs - critic(obs, actions[:, None])[..., 0].mean(0)).mean()


def temperature_loss(log_temperature, log_probs, target_entropy: float):
    """SAC's equation 18, E[-alpha (log pi(a|s) + H)]: its gradient raises alpha while the entropy is below H."""
    return -(log_temperature.exp() * (log_probs.detach() + target_entropy)).mean()


def actor_update(policy, log_temperature, critic, optimizer, obs, target_entropy: float) -> dict[str, torch.Tensor]:
    """One step of policy and temperature on obs (B, O); one optimizer has both, and the critic stays as it is."""
    critic.requires_grad_(False)
    actions, log_probs = (tensor[:, 0] for tensor in policy.draw(obs, 1))
    loss = actor_loss(critic, obs, actions, log_probs, log_temperature.detach().exp())
    optimizer.zero_grad(set_to_none=True)
    (loss + temperature_loss(log_temperature, log_probs, target_entropy)).backward()
    optimizer.step()
    critic.requires_grad_(True)
    info = {"actor_loss": loss, "entropy": -log_probs.mean(), "temperature": log_temperature.exp()}
    return {name: part.detach() for name, part in info.items()}


# --- CAL-QL WITH DENSITIES ---
def calql_gaussian_loss(critic, obs, actions, target_q, mc_returns, policy_actions, log_probs, random_actions,
                        cql_alpha, cql_members=None, importance=True, release_width=False):  # fmt: skip
    """TD, and CQL(H)'s penalty with Cal-QL's bound: logsumexp of Q over all actions minus Q of the data's action.

    The policy's actions, drawn at s and at s', are valued at s and no lower than the Monte-Carlo return; random ones
    have no bound. With importance each weighs one over its density, so that the logsumexp estimates the logarithm of
    the integral of exp(Q) over [-1, 1]^A; else all weigh alike and the data's action is one of them.

    obs (B, O), actions (B, A), target_q and mc_returns (B,), policy_actions (B, m, A) with log_probs (B, m),
    random_actions (B, n, A) uniform; cql_members: indices of the members to penalise, None for all -> the loss
    (scalar), and its parts as a dict of scalar tensors, detached (means over the members they use).
    """
    n, action_dim = random_actions.shape[1:]
    q_data, td_loss = critic.td_loss(obs, actions, target_q, release_width)
    q_data_cql = q_data if cql_members is None else q_data[cql_members]
    sampled = torch.cat([random_actions, policy_actions], 1)
    q_random, q_policy = critic(obs, sampled, cql_members).split([n, policy_actions.shape[1]], -1)  # (members, B, .)
    q_bounded = torch.maximum(q_policy, mc_returns[:, None])  # calibrated: no pushing below the data's own return
    if importance:  # the uniform density is 2^-A
        entries = torch.cat([q_random + action_dim * math.log(2), q_bounded - log_probs], -1)
    else:
        entries = torch.cat([q_random, q_bounded, q_data_cql[..., None]], -1)
    cql_loss = (torch.logsumexp(entries, -1) - math.log(entries.shape[-1]) - q_data_cql).mean()
    loss = td_loss + cql_alpha * cql_loss
    info = dict(td_loss=td_loss, cql_loss=cql_loss, critic_loss=loss, q_data=q_data.mean(), target_q=target_q.mean(),
                q_random=q_random.mean(), q_optimized=q_policy.mean(),
                bound_rate=(q_policy < mc_returns[:, None]).float().mean())  # fmt: skip
    return loss, {name: part.detach() for name, part in info.items()}


def critic_update(critic, target_critic, policy, optimizer, buffer, index, args: Args) -> dict[str, torch.Tensor]:
    """One update of the critic on the transitions `index` (B,)."""
    states, next_index, n = buffer.obs_index[index], buffer.next_index[index], args.cql_actions
    obs, next_obs = buffer.states[states], buffer.states[next_index]
    with torch.no_grad():  # (2 B, n, A), (2 B, n): those at s, then those at s'
        drawn, log_probs = policy.draw(torch.cat([obs, next_obs]), max(n, 1))
        next_actions = drawn[len(obs) :]
        best = critic(next_obs, next_actions).mean(0).argmax(1) if args.max_backup else torch.zeros_like(index)
    next_action = next_actions[torch.arange(len(index), device=index.device), best]
    td_members = torch.randperm(args.ensemble_size, device=obs.device)[: args.target_subset]
    cql_members = torch.randperm(args.ensemble_size, device=obs.device)[: args.target_subset]
    rewards, masks = buffer.rewards[index], buffer.masks[index]
    target_q = td_target(target_critic, rewards, masks, next_obs, next_action, args.discount**args.chunk, td_members)
    policy_actions = torch.cat(drawn.chunk(2), 1)[:, : 2 * n]  # all are valued at s
    policy_log_probs = torch.cat(log_probs.chunk(2), 1)[:, : 2 * n]
    random_actions = torch.rand(len(index), n, drawn.shape[-1], device=obs.device) * 2 - 1
    batch = obs, buffer.data_actions(states), target_q, buffer.mc_returns[index], policy_actions, policy_log_probs
    settings = args.cql_alpha, cql_members, args.importance, args.hl_gauss_release_width
    loss, info = calql_gaussian_loss(critic, *batch, random_actions, *settings)
    gradient_step(loss, optimizer, critic, target_critic, args.target_tau)
    return info


# --- MAIN ---
def main(argv: list[str] | None = None) -> None:
    args = parse_args(Args, PRESETS, argv)
    if args.cql_actions < 1:
        fail("--cql-actions must be at least 1: the penalty is a logsumexp over them")
    device, env, envs, dataset = set_up(args, make_env, load_dataset)
    obs_dim, action_dim = env.observation_space.shape[0], args.chunk * env.action_space.shape[0]
    buffer = ReplayBuffer(dataset, dataclasses.replace(args, num_samples=0), device)  # no cache of candidates
    policy = TanhGaussianPolicy(obs_dim, action_dim, args.policy_hidden).to(device)
    num_bins, q_min = args.num_bins if args.critic_loss == "hl_gauss" else 1, args.reward_min / (1 - args.discount)
    critic = Critic(obs_dim, action_dim, args.critic_hidden, args.ensemble_size, num_bins, q_min).to(device)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    temperature = nn.ParameterList([torch.tensor(math.log(args.initial_temperature), device=device)])  # its logarithm
    policy_optimizer = torch.optim.Adam([*policy.parameters(), *temperature], args.policy_lr)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True)

    def update(index):  # of critic, policy and temperature
        info = critic_update(critic, target_critic, policy, critic_optimizer, buffer, index, args)
        obs = buffer.states[buffer.obs_index[index]]
        return info | actor_update(policy, temperature[0], critic, policy_optimizer, obs, target_entropy=-action_dim)

    run = Run(args, dataset, buffer, policy=policy, temperature=temperature, policy_optimizer=policy_optimizer,
              critic=critic, target_critic=target_critic, critic_optimizer=critic_optimizer)  # fmt: skip
    with run:
        # Phase 1: clone the data, if asked for
        for _ in run.steps("cloning", args.num_cloning_steps, envs, policy.mode if args.num_cloning_steps else None):
            states = buffer.obs_index[buffer.sample_index((1, args.cloning_batch_size))[0]]
            loss = policy.loss(buffer.states[states], buffer.data_actions(states))
            policy_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            policy_optimizer.step()
            run.log({"policy_loss": loss.detach()}, every=args.log_every)

        # Phase 2: critic and policy on the data
        for _ in run.steps("offline", args.num_offline_steps, envs, policy.mode, args.num_offline_evals):
            run.log(update(buffer.sample_index((1, args.batch_size))[0]), every=args.log_every)

        # Phase 3: an episode of the policy's samples, then as many updates as it had steps; a step is one episode
        for i in run.steps("online", args.num_online_episodes, envs, policy.mode, args.num_online_evals, "episode"):
            act = lambda obs: policy.sample(obs, 1)[:, 0]  # noqa: E731
            episode, success = collect_episode(env, act, args.seed * 100_003 + i, run)
            buffer.add(episode)
            num_updates = round(len(episode) * args.utd)
            metrics = {"episode_success": success, "episode_length": len(episode)}
            for rows in buffer.sample_index((num_updates, args.batch_size)):
                run.check_stop()
                metrics |= update(rows)
            run.count(episodes=1, env_steps=len(episode), updates=num_updates)
            run.log(metrics)
        finish(run, env, make_env, policy.mode, policy, critic)


if __name__ == "__main__":
    run_program(main)
