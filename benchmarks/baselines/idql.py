"""IDQL: implicit Q-learning with a diffusion policy, offline and then online (Hansen-Estruch et al., arXiv 2304.10573).

A diffusion policy is cloned from the data and never taught by a critic. Implicit Q-learning trains a value and a critic
on the data's own actions. To act, a number of actions is drawn from the cloned policy and the best by Q is taken, so
that all improvement over the data is in the re-ranking. Online the three go on learning, from the data and the episodes
alike, as in PA-RL's appendix B.2, which compares with it in tables 1 and 2. What it names IDQL-Imp seems to be
the version of IDQL's release that also draws online by the implied actor's weights: `--no-greedy-rollouts` here.

    python -m benchmarks.baselines.idql                                      # a small maze on a laptop: minutes
    python -m benchmarks.baselines.idql --env-id antmaze-large-diverse-v2    # the paper's setting, for one GPU
    python -m benchmarks.baselines.idql --resume runs/<folder>               # continue after a stop, in any phase

paper                                            | here
-------------------------------------------------|--------------------------------------------------------------
PA-RL eq. 3.4  value: expectile regression on Q  | expectile_loss, iql_loss
PA-RL eq. 3.5  critic: TD towards the value      | iql_loss
IDQL           the actor that IQL implies        | implicit_weights
IDQL           samples, re-ranked                | rerank
PA-RL app. B.2 critic, value and policy go on    | main: phases 1 / 2 / 3

The first ten minutes: `iql_loss`, `rerank` and `main`. The diffusion policy, the critic and the replay buffer are those
of `parl_diffusion_iql.py`, imported. That script's `--extraction idql` re-ranks a cloned policy, too, but online it
leaves that as it was.

Our choices where the papers are silent: as many samples as PA-RL draws (32), one policy update per critic update online
at the constant distilling rate of PA-RL, and the best of the samples in every episode (IDQL's other version online),
not one drawn by the weights of the actor that IQL's expectile loss implies.
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.harness.cli import RunArgs, parse_args, run_program
from benchmarks.harness.datasets import set_up
from benchmarks.harness.fast_critic import compiled
from benchmarks.harness.pictures import finish
from benchmarks.harness.rollouts import collect_episode
from benchmarks.harness.runs import Run
from benchmarks.tasks import load_dataset, make_env
from parl_diffusion_iql import Critic, DiffusionPolicy, ReplayBuffer, cloning_lr, gradient_step, policy_update


# --- ARGUMENTS ---
@dataclass
class Args(RunArgs):
    """IDQL. Defaults shown are those of the preset in force."""

    # phases
    num_cloning_steps: int = 300_000  # phase 1: updates of the policy
    num_offline_steps: int = 1_000_000  # phase 2: updates of critic and value; 0: no offline phase
    num_online_episodes: int = 1_000  # phase 3: episodes; 0: offline only
    # policy
    chunk: int = 1  # steps of one decision, taken without looking; the policy's action holds all of them
    diffusion_steps: int = 5  # K, denoising steps
    policy_hidden: int = 256  # width of the policy's residual blocks (4 x inside)
    policy_blocks: int = 3  # residual blocks
    policy_dropout: float = 0.1  # in the residual blocks, when training
    cloning_batch_size: int = 1024  # of the paper
    policy_lr: float = 3e-4  # Adam, cloning: warm-up, then cosine decay
    policy_warmup: int = 2_000  # updates of warm-up
    distill_lr: float = 5e-5  # Adam, cloning online: constant
    policy_ema: float = 0.002  # rate of the averaged copy of the policy, the one that is sampled
    # critic
    ensemble_size: int = 2  # members of the critic, the value learns from the minimum of all
    critic_hidden: tuple[int, ...] = (256, 256)  # hidden layers
    critic_loss: Literal["hl_gauss", "mse"] = "hl_gauss"  # classification over bins of the value, or regression
    num_bins: int = 128  # bins of hl_gauss
    hl_gauss_release_width: bool = False  # sigma sqrt(2) x 0.75 bins instead of 0.75 bins
    critic_lr: float = 3e-4  # Adam
    batch_size: int = 256  # transitions of an update
    target_tau: float = 0.005  # rate of the target critic
    expectile: float = 0.7  # tau of the value's loss
    release_returns: bool = False  # of no effect: IQL needs no Monte-Carlo returns
    # acting and learning online
    num_samples: int = 32  # candidates drawn from the policy
    greedy_rollouts: bool = True  # take the best candidate; else draw one by the weights of the implicit actor
    mixing_ratio: float = 0.5  # share of offline data in an online batch
    utd: float = 1.0  # updates of critic and value per environment step, online
    cloning_ratio: float = 1.0  # updates of the policy per environment step, online


# Numbers of updates and sizes are those of parl_diffusion_iql.py, so that the two differ in the method alone.
PRESETS: dict[str, dict] = {
    "default": {}, "antmaze": dict(critic_hidden=(256, 256, 256, 256), expectile=0.9),
    "kitchen": dict(critic_hidden=(512, 512, 512), num_offline_steps=500_000, reward_bias=-4.0, reward_min=-4.0,
                    sparse_reward=False),
    "ogbench": dict(reward_bias=0.0, reward_min=0.0),  # its rewards are minus the number of parts left to do
    "pointmaze": dict(
        num_cloning_steps=2_000, num_offline_steps=6_000, num_online_episodes=40, eval_episodes=50, compile="no",
        eval_processes=False, num_offline_evals=3, num_online_evals=4, log_every=50, policy_hidden=64, policy_blocks=2,
        cloning_batch_size=256, policy_lr=1e-3, policy_warmup=200, distill_lr=3e-4, expectile=0.9,
        critic_hidden=(128, 128), critic_lr=1e-3, discount=0.95, target_tau=0.01, num_bins=64, num_samples=8, utd=5.0),
    # On top of the family's: what two CPU cores train in half an hour
    "laptop": dict(
        dataset_size=200_000, num_cloning_steps=10_000, num_offline_steps=6_000, num_online_episodes=20,
        eval_episodes=50, num_offline_evals=1, num_online_evals=1, policy_hidden=128, policy_blocks=2,
        policy_dropout=0.0, cloning_batch_size=256, policy_lr=1e-3, policy_warmup=500, critic_hidden=(256, 256),
        critic_lr=5e-4, batch_size=128, target_tau=0.02, num_bins=64, num_samples=4, utd=0.5, cloning_ratio=0.05,
        compile="no"),
    # On top of that, the flags of parl_diffusion_iql.py's preset of that name, with half its offline updates
    "laptop-chunk": dict(
        chunk=5, dataset_size=100_000, policy_hidden=192, num_cloning_steps=12_000, num_offline_steps=20_000, utd=2.0,
        num_online_episodes=160, critic_lr=3e-4, batch_size=256, expectile=0.9, target_tau=0.005, num_samples=32),
}  # fmt: skip


# --- IQL ---
def expectile_loss(difference, expectile: float):
    """|tau - 1(u < 0)| u^2 elementwise (below equation 3.5): an excess of Q over V weighs tau, a shortfall 1 - tau."""
    return (expectile - (difference <= 0).to(difference.dtype)).abs() * difference.square()


def value_of(value: Critic, obs):
    """V(s) (B,): the value network is a critic of one member that takes no action."""
    return value(obs, obs.new_zeros(len(obs), 1, 0))[0, :, 0]


def iql_loss(critic, target_critic, value, obs, actions, rewards, masks, next_obs, discount, expectile,
             release_width=False):  # fmt: skip
    """Equations 3.4 and 3.5, on the data's own transitions: no action of a policy is looked at.

    The value regresses on the minimum of the target critic's members by the expectile loss; the critic on
    r + gamma mask V(s'), by HL-Gauss or squared error.

    obs, next_obs (B, O), actions (B, A), rewards, masks (B,) -> the sum of both losses (scalar; they share no weights),
    and its parts as a dict of scalar tensors, detached.
    """
    with torch.no_grad():
        q = target_critic(obs, actions[:, None])[..., 0].min(0).values  # (B,)
        target_q = rewards + discount * masks * value_of(value, next_obs)
    v = value_of(value, obs)
    value_loss = expectile_loss(q - v, expectile).mean()
    q_data, td_loss = critic.td_loss(obs, actions, target_q, release_width)
    info = dict(td_loss=td_loss, value_loss=value_loss, critic_loss=td_loss + value_loss, q_data=q_data.mean(),
                v_data=v.mean(), target_q=target_q.mean())  # fmt: skip
    return td_loss + value_loss, {name: part.detach() for name, part in info.items()}


def critic_update(critic, target_critic, value, optimizer, buffer, index, args: Args) -> dict[str, torch.Tensor]:
    """Algorithm 2, line 4 with IQL: one update of value and critic on the transitions `index` (B,)."""
    obs, next_obs = buffer.states[buffer.obs_index[index]], buffer.states[buffer.next_index[index]]
    actions = buffer.data_actions(buffer.obs_index[index])
    batch = obs, actions, buffer.rewards[index], buffer.masks[index], next_obs
    settings = args.discount**args.chunk, args.expectile, args.hl_gauss_release_width
    loss, info = iql_loss(critic, target_critic, value, *batch, *settings)
    gradient_step(loss, optimizer, critic, target_critic, args.target_tau)
    return info


# --- RE-RANKING ---
def implicit_weights(q, v, expectile: float):
    """The actor that IQL implies, relative to the cloned policy: |tau - 1(Q < V)|. q (B, n), v (B,) -> (B, n).

    IDQL: a critic with value loss f(Q - V) implies an actor proportional to mu(a|s) |f'(Q - V)| / |Q - V|, which for
    the expectile loss is tau where the action is better than the value and 1 - tau where it is worse.
    """
    return (expectile - (q < v[:, None]).to(q.dtype)).abs()


def rerank(policy, critic, value, obs, args: Args):
    """Draw num_samples actions, take the best by the members' mean or one by the implicit weights: (B, O) -> (B, A)."""
    with torch.no_grad():
        actions = policy.sample(obs, args.num_samples)
        q = critic(obs, actions).mean(0)
        if args.greedy_rollouts:
            index = q.argmax(1)
        else:
            index = torch.multinomial(implicit_weights(q, value_of(value, obs), args.expectile), 1)[:, 0]
    return actions[torch.arange(len(obs), device=obs.device), index]


# --- MAIN ---
def main(argv: list[str] | None = None) -> None:
    args = parse_args(Args, PRESETS, argv)
    device, env, envs, dataset = set_up(args, make_env, load_dataset)
    obs_dim, action_dim = env.observation_space.shape[0], args.chunk * env.action_space.shape[0]
    buffer = ReplayBuffer(dataset, dataclasses.replace(args, num_samples=0), device)  # no cache of candidates
    sizes = args.diffusion_steps, args.policy_hidden, args.policy_blocks
    policy = DiffusionPolicy(obs_dim, action_dim, *sizes, dropout=args.policy_dropout).to(device)
    ema_policy = copy.deepcopy(policy).requires_grad_(False).eval()  # the one that is sampled
    num_bins, q_min = args.num_bins if args.critic_loss == "hl_gauss" else 1, args.reward_min / (1 - args.discount)
    critic = Critic(obs_dim, action_dim, args.critic_hidden, args.ensemble_size, num_bins, q_min).to(device)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    value = Critic(obs_dim, 0, args.critic_hidden, ensemble_size=1, num_bins=1).to(device)
    policy_optimizer = torch.optim.Adam(policy.parameters(), args.policy_lr, fused=True)
    critic_optimizer = torch.optim.Adam([*critic.parameters(), *value.parameters()], args.critic_lr, fused=True)
    policy.loss, update_critic = compiled(args, device, policy.loss, critic_update)

    def act(obs):
        return rerank(ema_policy, critic, value, obs, args)

    def clone(batch_size):
        states = buffer.obs_index[buffer.sample_index((1, batch_size))[0]]
        obs, actions = buffer.states[states], buffer.data_actions(states)
        return policy_update(policy, ema_policy, policy_optimizer, obs, actions, args.policy_ema)

    run = Run(args, dataset, buffer, policy=policy, ema_policy=ema_policy, critic=critic, target_critic=target_critic,
              value=value, policy_optimizer=policy_optimizer, critic_optimizer=critic_optimizer)  # fmt: skip
    with run:
        # Phase 1: clone the data
        for step in run.steps("cloning", args.num_cloning_steps, envs, lambda obs: ema_policy.sample(obs, 1)[:, 0]):
            policy_optimizer.param_groups[0]["lr"] = cloning_lr(step, args)
            run.log({"policy_loss": clone(args.cloning_batch_size)}, every=args.log_every)

        # Phase 2: train value and critic; no policy is asked for, so that all of it could be done before phase 1
        for _ in run.steps("offline", args.num_offline_steps, envs, act, args.num_offline_evals):
            index = buffer.sample_index((1, args.batch_size))[0]
            info = update_critic(critic, target_critic, value, critic_optimizer, buffer, index, args)
            run.log(info, every=args.log_every)

        # Phase 3: an episode, then critic, value and policy on batches that mix the data with what was seen online
        if run.starts("online"):
            policy_optimizer.state.clear()
            critic_optimizer.state.clear()
            policy_optimizer.param_groups[0]["lr"] = args.distill_lr
        for i in run.steps("online", args.num_online_episodes, envs, act, args.num_online_evals, "episode"):
            episode, success = collect_episode(env, act, args.seed * 100_003 + i, run)
            buffer.add(episode)
            num_critic, num_cloning = round(len(episode) * args.utd), round(len(episode) * args.cloning_ratio)
            metrics = {"episode_success": success, "episode_length": len(episode)}
            for rows in buffer.sample_index((num_critic, args.batch_size)):
                run.check_stop()
                metrics |= update_critic(critic, target_critic, value, critic_optimizer, buffer, rows, args)
            for _ in range(num_cloning):
                run.check_stop()
                metrics["policy_loss"] = clone(args.batch_size)
            run.count(episodes=1, env_steps=len(episode), updates=num_critic + num_cloning)
            run.log(metrics)
        finish(run, env, make_env, act, ema_policy, critic)


if __name__ == "__main__":
    run_program(main)
