"""RLPD with a tanh-Gaussian policy: online with the data at hand, from scratch (Ball et al., arXiv 2302.02948).

There is no offline phase: policy and critic start from random weights when the robot starts to act. Every batch is half
data and half what was seen online, every environment step is followed by ten critic updates, and a large ensemble with
LayerNorm, of which a random pair gives the target, keeps the critic from overestimating. The policy is SAC's, and so is
its entropy. PA-RL (arXiv 2412.06685) compares with it in table 2, left.

    python -m benchmarks.baselines.rlpd_gaussian                                      # a laptop: minutes
    python -m benchmarks.baselines.rlpd_gaussian --env-id antmaze-large-diverse-v2    # the paper's setting, one GPU
    python -m benchmarks.baselines.rlpd_gaussian --resume runs/<folder>               # continue after a stop

paper                                          | here
-----------------------------------------------|----------------------------------------------------------------
SAC app. C      squashed Gaussian              | TanhGaussianPolicy, log_density
SAC eq. 7       policy loss                    | actor_loss
SAC eq. 18      entropy temperature            | temperature_loss
RLPD alg. 1     TD, random pair of ten         | critic_update
PA-RL app. B.2  random episodes, then online   | main: phases 2 / 3

The first ten minutes: `critic_update`, `actor_loss` and `main`. Critic, HL-Gauss and replay buffer are those of
`parl_diffusion_rlpd.py`, imported.

PA-RL's appendix B.2: a Gaussian from scratch, ten updates a step, ten members, targets of two. Our choices where it is
silent: HL-Gauss as in PA-RL (`--critic-loss mse` for RLPD's regression); no entropy in the targets, since with rewards
of at most 0 no value may pass 0 (`--entropy-backup` adds it); episodes of random actions before the first update.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from benchmarks.harness.cli import RunArgs, parse_args, run_program
from benchmarks.harness.datasets import set_up
from benchmarks.harness.pictures import finish
from benchmarks.harness.rollouts import collect_episode
from benchmarks.harness.runs import Run
from benchmarks.tasks import load_dataset, make_env
from parl_diffusion_rlpd import Critic, ReplayBuffer, gradient_step, rlpd_loss, td_target


# --- ARGUMENTS ---
@dataclass
class Args(RunArgs):
    """RLPD with a tanh-Gaussian policy. Defaults shown are those of the preset in force."""

    compile: Literal["auto", "no"] = "auto"  # nothing here is compiled
    # phases
    num_warmup_episodes: int = 10  # phase 2: episodes of random actions before the first update
    num_online_episodes: int = 200  # phase 3: episodes
    # policy
    chunk: int = 1  # steps of one decision, taken without looking; the policy's action holds all of them
    policy_hidden: tuple[int, ...] = (256, 256)  # hidden layers
    policy_lr: float = 3e-4  # Adam, of policy and temperature
    initial_temperature: float = 1.0  # alpha of SAC at the start
    num_samples: int = 8  # of the policy, for the picture's map of values alone
    # critic
    ensemble_size: int = 10  # members of the critic
    target_subset: int = 2  # members whose minimum is the TD target, drawn anew each update
    critic_hidden: tuple[int, ...] = (256, 256)  # hidden layers
    critic_loss: Literal["hl_gauss", "mse"] = "hl_gauss"  # classification over bins of the value, or regression
    num_bins: int = 128  # bins of hl_gauss
    hl_gauss_release_width: bool = False  # sigma sqrt(2) x 0.75 bins instead of 0.75 bins
    critic_lr: float = 3e-4  # Adam
    batch_size: int = 256  # transitions of an update
    target_tau: float = 0.005  # rate of the target critic
    entropy_backup: bool = False  # targets hold the next action's entropy, too
    release_returns: bool = False  # of no effect: RLPD needs no Monte-Carlo returns
    # online
    mixing_ratio: float = 0.5  # share of offline data in a batch
    utd: float = 10.0  # critic updates per environment step
    policy_ratio: float = 1.0  # policy updates per environment step, each on the batch of the last critic update


# Numbers of episodes and sizes are those of parl_diffusion_rlpd.py, so that the two differ in the method alone.
PRESETS: dict[str, dict] = {
    "default": {}, "antmaze": dict(critic_hidden=(256, 256, 256, 256)),
    "kitchen": dict(critic_hidden=(512, 512, 512), reward_bias=-4.0, reward_min=-4.0, sparse_reward=False),
    "ogbench": dict(reward_bias=0.0, reward_min=0.0),  # its rewards are minus the number of parts left to do
    "pointmaze": dict(
        num_warmup_episodes=10, num_online_episodes=200, eval_episodes=50, compile="no", eval_processes=False,
        num_online_evals=20, log_every=50, policy_hidden=(128, 128), policy_lr=1e-3, ensemble_size=2,
        critic_hidden=(128, 128), critic_lr=1e-3, discount=0.95, target_tau=0.03, num_bins=64, batch_size=64, utd=4.0),
    # On top of the family's: what two CPU cores train in half an hour
    "laptop": dict(
        dataset_size=200_000, num_online_episodes=30, eval_episodes=50, num_online_evals=1, policy_lr=5e-4,
        ensemble_size=2, critic_hidden=(256, 256), critic_lr=5e-4, batch_size=128, target_tau=0.02, num_bins=64,
        utd=4.0, compile="no"),
    # On top of that, the flags of parl_diffusion_rlpd.py's preset of that name, as far as they are here
    "laptop-chunk": dict(
        chunk=5, dataset_size=100_000, utd=1.0, num_online_episodes=160, num_online_evals=4, critic_lr=3e-4,
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


# --- RLPD ---
def critic_update(critic, target_critic, policy, temperature, optimizer, buffer, index, args: Args) -> dict:
    """One TD update of all members on the transitions `index` (B,), towards one sample of the policy at s'."""
    states, next_obs = buffer.obs_index[index], buffer.states[buffer.next_index[index]]
    with torch.no_grad():
        next_actions, log_probs = (tensor[:, 0] for tensor in policy.draw(next_obs, 1))
    members = torch.randperm(args.ensemble_size, device=next_obs.device)[: args.target_subset]
    rewards, masks, discount = buffer.rewards[index], buffer.masks[index], args.discount**args.chunk
    target_q = td_target(target_critic, rewards, masks, next_obs, next_actions, discount, members)
    if args.entropy_backup:
        target_q = target_q - discount * masks * temperature * log_probs
    obs, actions = buffer.states[states], buffer.data_actions(states)
    loss, info = rlpd_loss(critic, obs, actions, target_q, args.hl_gauss_release_width)
    gradient_step(loss, optimizer, critic, target_critic, args.target_tau)
    return info


# --- MAIN ---
def main(argv: list[str] | None = None) -> None:
    args = parse_args(Args, PRESETS, argv)
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

    def act_randomly(obs):
        return torch.rand(len(obs), action_dim, device=device) * 2 - 1

    def act(obs):
        return policy.sample(obs, 1)[:, 0]

    run = Run(args, dataset, buffer, policy=policy, temperature=temperature, policy_optimizer=policy_optimizer,
              critic=critic, target_critic=target_critic, critic_optimizer=critic_optimizer)  # fmt: skip
    with run:
        # Phase 1: nothing is cloned
        for _ in run.steps("cloning", 0):
            pass

        # Phase 2: episodes of random actions, so that every batch can be half online
        for i in run.steps("offline", args.num_warmup_episodes, unit="episode"):
            episode, success = collect_episode(env, act_randomly, args.seed * 100_003 + 50_000 + i, run)
            buffer.add(episode)
            run.count(episodes=1, env_steps=len(episode))
            run.log({"episode_success": success, "episode_length": len(episode)})

        # Phase 3: an episode of the policy's samples, critic updates, and now and then one of the policy
        for i in run.steps("online", args.num_online_episodes, envs, policy.mode, args.num_online_evals, "episode"):
            episode, success = collect_episode(env, act, args.seed * 100_003 + i, run)
            buffer.add(episode)
            num_critic, num_policy = round(len(episode) * args.utd), round(len(episode) * args.policy_ratio)
            metrics = {"episode_success": success, "episode_length": len(episode)}
            for j, rows in enumerate(buffer.sample_index((num_critic, args.batch_size))):
                run.check_stop()
                alpha = temperature[0].detach().exp()
                metrics |= critic_update(critic, target_critic, policy, alpha, critic_optimizer, buffer, rows, args)
                # num_policy updates, spread evenly over the critic's
                for _ in range((j + 1) * num_policy // num_critic - j * num_policy // num_critic):
                    obs = buffer.states[buffer.obs_index[rows]]
                    metrics |= actor_update(policy, temperature[0], critic, policy_optimizer, obs, -action_dim)
            run.count(episodes=1, env_steps=len(episode), updates=num_critic + num_policy * (num_critic > 0))
            run.log(metrics)
        finish(run, env, make_env, policy.mode, policy, critic)


if __name__ == "__main__":
    run_program(main)
