"""Diffusion Q-learning, offline and then online (Wang et al., arXiv 2208.06193).

The policy is a diffusion model trained by two losses at once: it denoises the data's actions, and what its denoising
chain makes of noise climbs Q, by a gradient that passes from the critic through all steps of the chain. The critic is
trained by TD with the policy's own samples at the next state. PA-RL (arXiv 2412.06685) compares with it in table 1 and
figures 3 and 18, and never sends a gradient through the chain.

    python -m benchmarks.baselines.dql                                      # a small maze on a laptop: minutes
    python -m benchmarks.baselines.dql --env-id antmaze-large-diverse-v2    # the paper's setting, for one GPU
    python -m benchmarks.baselines.dql --resume runs/<folder>               # continue after a stop, in any phase

paper                                            | here
-------------------------------------------------|--------------------------------------------------------------
DQL eq. 1     the chain, with a gradient         | denoise
DQL eq. 3     denoising loss - eta Q / |Q|       | dql_loss
DQL eq. 4     TD towards the policy's samples    | critic_update
DQL           act: draw many, prefer high Q      | prefer
PA-RL app. B.2 offline, then online              | main: phases 1 / 2 / 3

The first ten minutes: `denoise`, `dql_loss`, `critic_update` and `main`. Diffusion policy, critic, TD target and
replay buffer are those of `parl_diffusion_calql.py`, imported: PA-RL's authors ran the baseline in the same code.

PA-RL's appendix B.2 searched eta for each task: 11 for antmaze-large-diverse, 15 large-play, 9 medium-diverse, 7
medium-play, 0.005 for the kitchens, 0.01 for calvin. The presets have 11 and 0.005; the suites of `benchmarks.run` give
each task its own, by hand it is `--eta 15`. The paper also picks the offline checkpoint of the second
lowest denoising loss, which is not done here: the last one goes on. Our choices: Q is the ensemble's mean for the
policy and the minimum of `target_subset` members for the target, HL-Gauss as in PA-RL (`--critic-loss mse` is Wang's),
10 samples at s' of which the best is backed up on mazes (as in Wang's max-Q-backup on AntMaze, but the best by the
members' minimum, where Wang takes the minimum of each member's best), and to act the averaged policy's samples are
weighed by the ensemble's mean. Wang trains both losses from the start; `--num-cloning-steps` clones first, as the
laptop's presets do to begin where PA-RL begins.
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.harness.cli import RunArgs, fail, parse_args, run_program
from benchmarks.harness.datasets import set_up
from benchmarks.harness.pictures import finish
from benchmarks.harness.rollouts import collect_episode
from benchmarks.harness.runs import Run
from benchmarks.tasks import load_dataset, make_env
from parl_diffusion_calql import Critic, DiffusionPolicy, ReplayBuffer, cloning_lr, gradient_step, policy_update

from parl_diffusion_calql import select_actions, td_target  # isort: skip


# --- ARGUMENTS ---
@dataclass
class Args(RunArgs):
    """Diffusion Q-learning. Defaults shown are those of the preset in force."""

    compile: Literal["auto", "no"] = "auto"  # nothing here is compiled
    # phases
    num_cloning_steps: int = 0  # phase 1: updates of the policy by the denoising loss alone; Wang: none
    num_offline_steps: int = 1_000_000  # phase 2: updates of critic and policy; 0: no offline phase
    num_online_episodes: int = 1_000  # phase 3: episodes; 0: offline only
    # policy
    chunk: int = 1  # steps of one decision, taken without looking; the policy's action holds all of them
    diffusion_steps: int = 5  # K, denoising steps
    policy_hidden: int = 256  # width of the policy's residual blocks (4 x inside)
    policy_blocks: int = 3  # residual blocks
    policy_dropout: float = 0.1  # in the residual blocks, in the denoising loss
    cloning_batch_size: int = 1024  # of an update of phase 1
    policy_lr: float = 3e-4  # Adam: warm-up and cosine decay in phase 1, constant in phases 2 and 3
    policy_warmup: int = 2_000  # updates of warm-up
    policy_ema: float = 0.002  # rate of the averaged copy of the policy, the one that is sampled; 0.005 in Wang
    eta: float = 1.0  # weight of the Q loss
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
    backup_samples: int = 1  # targets of the best of so many samples at s' (max-Q-backup); 1: of one sample
    release_returns: bool = False  # of no effect: no Monte-Carlo returns are used
    # acting and learning online
    num_samples: int = 50  # candidates drawn from the policy to act
    greedy_rollouts: bool = False  # take the best of them; else draw one from softmax(Q), as Wang does
    mixing_ratio: float = 0.5  # share of offline data in an online batch
    utd: float = 1.0  # updates per environment step


# Numbers of updates and sizes are those of parl_diffusion_calql.py, so that the two differ in the method alone.
PRESETS: dict[str, dict] = {
    "default": {}, "antmaze": dict(critic_hidden=(256, 256, 256, 256), eta=11.0, backup_samples=10),
    "kitchen": dict(critic_hidden=(512, 512, 512), num_offline_steps=500_000, reward_bias=-4.0, reward_min=-4.0,
                    sparse_reward=False, eta=0.005),
    "ogbench": dict(reward_bias=0.0, reward_min=0.0),  # its rewards are minus the number of parts left to do
    "pointmaze": dict(
        num_cloning_steps=2_000, num_offline_steps=1_500, num_online_episodes=40, eval_episodes=50, compile="no",
        eval_processes=False, num_offline_evals=3, num_online_evals=4, log_every=50, policy_hidden=64, policy_blocks=2,
        cloning_batch_size=256, policy_lr=1e-3, policy_warmup=200, policy_ema=0.01, ensemble_size=2,
        critic_hidden=(128, 128), critic_lr=1e-3, discount=0.95, target_tau=0.03, num_bins=64, num_samples=8,
        backup_samples=4, greedy_rollouts=True),
    # On top of the family's: what two CPU cores train in half an hour
    "laptop": dict(
        dataset_size=200_000, num_cloning_steps=10_000, num_offline_steps=6_000, num_online_episodes=20,
        eval_episodes=50, num_offline_evals=1, num_online_evals=1, policy_hidden=128, policy_blocks=2,
        policy_dropout=0.0, cloning_batch_size=256, policy_lr=1e-3, policy_warmup=500, ensemble_size=2,
        critic_hidden=(256, 256), critic_lr=5e-4, batch_size=128, target_tau=0.02, num_bins=64, num_samples=4,
        backup_samples=4, greedy_rollouts=False, utd=0.5, compile="no"),
}  # fmt: skip


# --- DIFFUSION Q-LEARNING ---
def denoise(policy, obs, noise):
    """`policy.sample` with one sample a state, through which gradients pass to the policy; without dropout.

    Clipping after every step, as there, stops the gradient of what lies outside [-1, 1]. obs (B, O), noise (B, K + 1,
    A) standard normal, as of `policy.draw_noise(obs, 1)[:, :, 0]` -> actions (B, A).
    """
    training = policy.training
    policy.eval()
    obs_part, time_parts = policy.first_layer_parts(obs)
    actions = noise[:, 0]
    for i, t in enumerate(reversed(range(policy.num_steps))):
        epsilon = policy.predict_noise(obs_part + time_parts[t], actions)
        alpha, alpha_bar, beta = policy.alphas[t], policy.alpha_bars[t], policy.betas[t]
        actions = (actions - (1 - alpha) / (1 - alpha_bar).sqrt() * epsilon) / alpha.sqrt()
        actions = (actions + beta.sqrt() * noise[:, i + 1] if t > 0 else actions).clamp(-1, 1)
    policy.train(training)
    return actions


def dql_loss(policy, critic, obs, actions, eta: float, noise=None):
    """DQL's equation 3: denoising loss of the data's actions, less eta times Q of the policy's own, over mean |Q|.

    Q is the ensemble's mean; dividing by mean |Q|, a constant, makes eta independent of the rewards' scale.

    obs (B, O), actions (B, A), noise (B, K + 1, A) of `denoise`, None: drawn here -> the loss (scalar), and its parts
    as a dict of scalar tensors, detached.
    """
    noise = policy.draw_noise(obs, 1)[:, :, 0] if noise is None else noise
    denoising_loss = policy.loss(obs, actions)
    q = critic(obs, denoise(policy, obs, noise)[:, None]).mean(0)
    q_loss = -q.mean() / q.detach().abs().mean().clamp(min=1e-6)
    info = {"denoising_loss": denoising_loss, "q_loss": q_loss, "q_optimized": q.mean()}
    return denoising_loss + eta * q_loss, {name: part.detach() for name, part in info.items()}


def dql_update(policy, ema_policy, critic, optimizer, buffer, index, args: Args) -> dict[str, torch.Tensor]:
    """One step of the policy on the transitions `index` (B,); the critic stays as it is."""
    states = buffer.obs_index[index]
    critic.requires_grad_(False)
    loss, info = dql_loss(policy, critic, buffer.states[states], buffer.data_actions(states), args.eta)
    gradient_step(loss, optimizer, policy, ema_policy, args.policy_ema)
    critic.requires_grad_(True)
    return info


def critic_update(critic, target_critic, ema_policy, optimizer, buffer, index, args: Args) -> dict[str, torch.Tensor]:
    """DQL's equation 4: one update of the critic by TD on the transitions `index` (B,)."""
    states = buffer.obs_index[index]
    obs, next_obs = buffer.states[states], buffer.states[buffer.next_index[index]]
    next_actions = ema_policy.sample(next_obs, args.backup_samples)
    members = torch.randperm(args.ensemble_size, device=obs.device)[: args.target_subset]
    if args.backup_samples > 1:
        with torch.no_grad():  # max-Q-backup: the sample whose target value is highest
            q = target_critic(next_obs, next_actions, members).min(0).values
        next_action = select_actions(next_actions, q, True)
    else:
        next_action = next_actions[:, 0]
    rewards, masks = buffer.rewards[index], buffer.masks[index]
    target_q = td_target(target_critic, rewards, masks, next_obs, next_action, args.discount**args.chunk, members)
    q_data, loss = critic.td_loss(obs, buffer.data_actions(states), target_q, args.hl_gauss_release_width)
    gradient_step(loss, optimizer, critic, target_critic, args.target_tau)
    return {"td_loss": loss.detach(), "q_data": q_data.detach().mean(), "target_q": target_q.mean()}


@torch.no_grad()
def prefer(policy, critic, obs, num_samples: int, greedy: bool):
    """What acts: of so many samples at obs (B, O), the best by Q or one drawn from softmax(Q) -> actions (B, A)."""
    actions = policy.sample(obs, num_samples)
    return select_actions(actions, critic(obs, actions).mean(0), greedy)


# --- MAIN ---
def main(argv: list[str] | None = None) -> None:
    args = parse_args(Args, PRESETS, argv)
    if args.backup_samples < 1 or args.eta < 0:
        fail("--backup-samples must be at least 1 and --eta at least 0")
    device, env, envs, dataset = set_up(args, make_env, load_dataset)
    obs_dim, action_dim = env.observation_space.shape[0], args.chunk * env.action_space.shape[0]
    buffer = ReplayBuffer(dataset, dataclasses.replace(args, num_samples=0), device)  # no cache: the policy changes
    sizes = args.diffusion_steps, args.policy_hidden, args.policy_blocks
    policy = DiffusionPolicy(obs_dim, action_dim, *sizes, dropout=args.policy_dropout).to(device)
    ema_policy = copy.deepcopy(policy).requires_grad_(False).eval()  # the one that is sampled
    num_bins, q_min = args.num_bins if args.critic_loss == "hl_gauss" else 1, args.reward_min / (1 - args.discount)
    critic = Critic(obs_dim, action_dim, args.critic_hidden, args.ensemble_size, num_bins, q_min).to(device)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    policy_optimizer = torch.optim.Adam(policy.parameters(), args.policy_lr, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True)

    def act_cloned(obs):
        return ema_policy.sample(obs, 1)[:, 0]

    def act(obs):
        return prefer(ema_policy, critic, obs, args.num_samples, args.greedy_rollouts)

    def update(index):  # of the critic, then of the policy
        info = critic_update(critic, target_critic, ema_policy, critic_optimizer, buffer, index, args)
        return info | dql_update(policy, ema_policy, critic, policy_optimizer, buffer, index, args)

    run = Run(args, dataset, buffer, policy=policy, ema_policy=ema_policy, policy_optimizer=policy_optimizer,
              critic=critic, target_critic=target_critic, critic_optimizer=critic_optimizer)  # fmt: skip
    with run:
        # Phase 1: clone the data, if asked for
        for step in run.steps("cloning", args.num_cloning_steps, envs, act_cloned):
            policy_optimizer.param_groups[0]["lr"] = cloning_lr(step, args)
            states = buffer.obs_index[buffer.sample_index((1, args.cloning_batch_size))[0]]
            obs, actions = buffer.states[states], buffer.data_actions(states)
            loss = policy_update(policy, ema_policy, policy_optimizer, obs, actions, args.policy_ema)
            run.log({"policy_loss": loss}, every=args.log_every)

        # Phase 2: critic and policy on the data
        if run.starts("offline"):
            policy_optimizer.state.clear()
            policy_optimizer.param_groups[0]["lr"] = args.policy_lr
        for _ in run.steps("offline", args.num_offline_steps, envs, act, args.num_offline_evals):
            run.log(update(buffer.sample_index((1, args.batch_size))[0]), every=args.log_every)

        # Phase 3: an episode, then as many updates of both as it had steps; a step is one episode
        if run.starts("online"):  # with fresh moments, as PA-RL
            policy_optimizer.state.clear()
            critic_optimizer.state.clear()
        for i in run.steps("online", args.num_online_episodes, envs, act, args.num_online_evals, "episode"):
            episode, success = collect_episode(env, act, args.seed * 100_003 + i, run)
            buffer.add(episode)
            num_updates = round(len(episode) * args.utd)
            metrics = {"episode_success": success, "episode_length": len(episode)}
            for rows in buffer.sample_index((num_updates, args.batch_size)):
                run.check_stop()
                metrics |= update(rows)
            run.count(episodes=1, env_steps=len(episode), updates=num_updates)
            run.log(metrics)
        finish(run, env, make_env, act, ema_policy, critic)


if __name__ == "__main__":
    run_program(main)
