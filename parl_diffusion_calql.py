"""PA-RL + Cal-QL with a diffusion policy, offline and then online: algorithm 2 of Policy Agnostic RL, arXiv 2412.06685.

Clone the data into a policy that can be sampled. Train a critic in which the policy's samples, improved by re-ranking
and by a few gradient steps on the *action*, are what acts at the next state. Let the improved actions act in the
environment. Teach them to the policy with the loss it was cloned with, so that no gradient ever passes from the critic
through the policy. Repeat the last three after every episode.

    python parl_diffusion_calql.py                                      # a small maze on a laptop: minutes
    python parl_diffusion_calql.py --env-id antmaze-large-diverse-v2    # the paper's setting, for one GPU
    python parl_diffusion_calql.py --env-id antmaze-umaze-v2 --preset laptop
    python parl_diffusion_calql.py --resume runs/<folder>               # continue after a stop, in any phase

paper                                           | here
------------------------------------------------|---------------------------------------------------------------
eq. 3.1, 4.5  denoising loss                    | DiffusionPolicy.loss
sec. 3        denoising chain                   | DiffusionPolicy.sample
eq. 4.1       keep the m best of k samples      | global_optimization
eq. 4.2       gradient ascent on the action     | local_optimization
alg. 1        action optimization               | optimize_actions
eq. 4.3       which optimized action to take    | select_actions
eq. 3.3       Cal-QL: TD + calibrated penalty   | td_target, calql_loss, monte_carlo_returns
app. E        cache of candidates               | refresh_candidates
eq. 4.4       dataset of optimized actions      | distill
app. B.1      argmax or samples                 | choose_greedy_distillation
alg. 2        line 1 / 3-4 / 5-8                | main: phases 1 / 2 / 3

The first ten minutes: `global_optimization`, `local_optimization`, `optimize_actions`, `distill`, `main`: PA-RL. The
rest is what it is combined with. Nothing in `benchmarks/harness/` (flags, folders, speed) decides what is learned.

Algorithm 1 as printed leaves its loop at the first step that helps; section 4.3's text says what is meant ("only
execute a local update if it increases the Q-value") and is what `local_optimization` does. The authors' release
differs from the paper in places; the paper is the default here and these flags choose the release:
`--keep-best-of-path`, `--hl-gauss-release-width`, `--release-returns`, `--distill-mixed`. Targets take the best action
as the release does; the paper's text backs up a drawn one: `--sample-backup`, as the kitchen preset has it.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from benchmarks.harness.cli import RunArgs, load_policy, parse_args, run_program
from benchmarks.harness.datasets import distinct_states, set_up, trajectory_ends
from benchmarks.harness.fast_critic import FrozenCritic, climb_winners, compiled, in_parts, sample_on_all_cores
from benchmarks.harness.pictures import finish
from benchmarks.harness.rollouts import collect_episode
from benchmarks.harness.runs import Run
from benchmarks.tasks import load_dataset, make_env


# --- ARGUMENTS ---
@dataclass
class Args(RunArgs):
    """PA-RL + Cal-QL with a diffusion policy. Defaults shown are those of the preset in force."""

    # phases
    num_cloning_steps: int = 300_000  # phase 1: updates of the policy
    num_offline_steps: int = 1_000_000  # phase 2: updates of the critic; 0: no offline phase
    num_online_episodes: int = 1_000  # phase 3: episodes; 0: offline only
    # policy
    chunk: int = 1  # steps of one decision, taken without looking; the policy's action holds all of them
    diffusion_steps: int = 5  # K, denoising steps
    policy_hidden: int = 256  # width of the policy's residual blocks (4 x inside)
    policy_blocks: int = 3  # residual blocks
    policy_dropout: float = 0.1  # in the residual blocks, when training
    clip_steps: bool = True  # to [-1, 1] after each denoising step (release), which narrows; no: after the last
    cloning_batch_size: int = 1024  # of the paper; 256 in the release
    policy_lr: float = 3e-4  # Adam, cloning: warm-up, then cosine decay
    policy_warmup: int = 2_000  # updates of warm-up
    distill_lr: float = 5e-5  # Adam, distilling: constant
    policy_ema: float = 0.002  # rate of the averaged copy of the policy, the one that is sampled
    policy_checkpoint: str = ""  # instead of cloning: file of a cloned policy's weights, or a run's checkpoint.pt
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
    climb_first: int = 0  # there climb, even if climb_all, from so many of highest Q only, a shortcut; 0: from all
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


# What a task family changes. Of the defaults the paper (appendix B.1) gives k, m, T, the step and the policy's network,
# its release the critic and the rates; numbers of updates are our choice (the release: 3,000,000 of cloning).
PRESETS: dict[str, dict] = {
    "default": {}, "antmaze": dict(critic_hidden=(256, 256, 256, 256)),
    "kitchen": dict(critic_hidden=(512, 512, 512), num_offline_steps=500_000, reward_bias=-4.0, reward_min=-4.0,
                    sparse_reward=False, greedy_rollouts=False, sample_backup=True),
    "ogbench": dict(reward_bias=0.0, reward_min=0.0),  # its rewards are minus the number of parts left to do
    # For two CPU cores. One-step TD carries value over H decisions (here 10 to 15) in about H / target_tau updates:
    # hence the faster target. Fewer candidates and steps than the paper's save time; what they cost was not measured.
    "pointmaze": dict(
        num_cloning_steps=2_000, num_offline_steps=1_500, num_online_episodes=40, eval_episodes=50, compile="no",
        eval_processes=False, num_offline_evals=3, num_online_evals=4, log_every=50, policy_hidden=64, policy_blocks=2,
        cloning_batch_size=256, policy_lr=1e-3, policy_warmup=200, distill_lr=3e-4, ensemble_size=2,
        critic_hidden=(128, 128), critic_lr=1e-3, discount=0.95, target_tau=0.03, num_bins=64, cql_actions=4,
        num_samples=8, num_keep=2, num_gradient_steps=2, gradient_step_size=0.03),
    # On top of the family's: what two CPU cores train in 20 to 30 minutes. Actions are drawn (equation 4.3): on AntMaze
    # the best of eight by a critic of so few updates failed. Ten times as much distilling online made success fall.
    "laptop": dict(
        dataset_size=200_000, num_cloning_steps=10_000, num_offline_steps=6_000, num_online_episodes=20,
        eval_episodes=50, num_offline_evals=1, num_online_evals=1, policy_hidden=128, policy_blocks=2,
        policy_dropout=0.0, cloning_batch_size=256, policy_lr=1e-3, policy_warmup=500, distill_lr=5e-5, ensemble_size=2,
        critic_hidden=(256, 256), critic_lr=5e-4, batch_size=128, target_tau=0.02, num_bins=64, cql_actions=2,
        num_samples=4, num_keep=4, num_gradient_steps=1, gradient_step_size=0.001, greedy_rollouts=False,
        distill_selection="sample", utd=0.5, distill_ratio=0.05, compile="no"),
    "laptop-chunk": dict(chunk=5, dataset_size=100_000, policy_hidden=256, num_cloning_steps=24_000, cql_actions=4,
        num_offline_steps=20_000, num_online_episodes=80, num_online_evals=2, critic_lr=3e-4, target_tau=0.005,
        num_samples=16, num_keep=16, distill_lr=1e-4, num_gradient_steps=0, matmul_precision="medium"),  # for the cube
}  # fmt: skip


# --- DIFFUSION POLICY ---
def cosine_beta_schedule(num_steps: int, s: float = 0.008) -> torch.Tensor:
    """Noise variances beta_1..beta_K, float32 (K,), of Nichol and Dhariwal's cosine schedule."""
    x = torch.linspace(0, num_steps, num_steps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((x / num_steps + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0, 0.999).float()


class ResidualBlock(nn.Module):
    """x + W2 swish(W1 LayerNorm(Dropout(x))), four times wider inside (IDQL's LN-ResNet)."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(F.silu(self.up(self.norm(self.dropout(x)))))


class DiffusionPolicy(nn.Module):
    """A conditional DDPM over actions in [-1, 1]^A (section 3; IDQL's network, appendix B.1)."""

    def __init__(self, obs_dim, action_dim, num_steps=5, hidden=256, blocks=3, time_dim=128, dropout=0.1, clip=True):
        super().__init__()
        self.obs_dim, self.action_dim, self.num_steps, self.clip = obs_dim, action_dim, num_steps, clip
        self.width = 4 * hidden  # floats of a sample's largest activation
        self.frequencies = nn.Parameter(0.2 * torch.randn(time_dim // 2))  # learnable Fourier features of the step
        self.time1, self.time2 = nn.Linear(time_dim, 2 * time_dim), nn.Linear(2 * time_dim, time_dim)
        self.first = nn.Linear(time_dim + obs_dim + action_dim, hidden)
        self.blocks = nn.Sequential(*(ResidualBlock(hidden, dropout) for _ in range(blocks)))
        self.last = nn.Linear(hidden, action_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.register_buffer("betas", cosine_beta_schedule(num_steps))
        self.register_buffer("alphas", 1 - self.betas)
        self.register_buffer("alpha_bars", torch.cumprod(self.alphas, 0))

    def time_features(self, t):
        """Steps t (...,) integers from 0 to K - 1 -> (..., time_dim)."""
        angle = 2 * math.pi * t[..., None] * self.frequencies
        return self.time2(F.silu(self.time1(torch.cat([angle.cos(), angle.sin()], -1))))

    def predict_noise(self, obs_and_time, noisy_actions):
        """epsilon_phi(a_t, s, t). obs_and_time: the sum of the two `first_layer_parts`."""
        x = obs_and_time + noisy_actions @ self.first.weight[:, -self.action_dim :].T
        return self.last(F.silu(self.blocks(x)))

    def first_layer_parts(self, obs):
        """What the first layer makes of the observations (B, hidden) and of each step (K, hidden).

        It is linear in [time, observation, action], so these parts serve all samples of a state, all states of a step.
        """
        time_w, obs_w, _ = self.first.weight.split([self.time2.out_features, self.obs_dim, self.action_dim], 1)
        steps = torch.arange(self.num_steps, device=obs.device)
        return F.linear(obs, obs_w, self.first.bias), F.linear(self.time_features(steps), time_w)

    def loss(self, obs, actions, t=None, noise=None):
        """Equation 3.1 with the squared norm, as DDPM and the release have it. obs (B, O), actions (B, A) -> scalar."""
        t = torch.randint(self.num_steps, (len(obs),), device=obs.device) if t is None else t
        noise = torch.randn_like(actions) if noise is None else noise
        alpha_bar = self.alpha_bars[t, None]
        noisy_actions = alpha_bar.sqrt() * actions + (1 - alpha_bar).sqrt() * noise
        obs_part, time_parts = self.first_layer_parts(obs)
        return (self.predict_noise(obs_part + time_parts[t], noisy_actions) - noise).square().sum(-1).mean()

    def draw_noise(self, obs, num_samples):
        """What `sample` uses up for obs (B, O): standard normal, (B, K + 1, n, A)."""
        noise = torch.randn(self.num_steps + 1, len(obs), num_samples, self.action_dim, device=obs.device)
        return noise.transpose(0, 1)

    @torch.no_grad()
    def sample(self, obs, num_samples, noise=None):
        """Draw actions by the denoising chain, clipped to [-1, 1] after every step (release), or after the last.

        obs (B, O), num_samples n per state -> actions (B, n, A). noise (B, K + 1, n, A) standard normal: the first is
        a_K, the last is not used; None: drawn here.
        """
        noise = (self.draw_noise(obs, num_samples) if noise is None else noise).transpose(0, 1)
        obs_part, time_parts = self.first_layer_parts(obs)
        actions = noise[0]
        for i, t in enumerate(reversed(range(self.num_steps))):
            epsilon = self.predict_noise((obs_part + time_parts[t])[:, None], actions)
            alpha, alpha_bar, beta = self.alphas[t], self.alpha_bars[t], self.betas[t]
            actions = (actions - (1 - alpha) / (1 - alpha_bar).sqrt() * epsilon) / alpha.sqrt()
            actions = actions + beta.sqrt() * noise[i + 1] if t > 0 else actions
            actions = actions.clamp(-1, 1) if self.clip or t == 0 else actions
        return actions


# --- CLONING ---
def cloning_lr(step: int, args: Args) -> float:
    """Linear warm-up to policy_lr, then cosine decay to 0 at the last update."""
    if step < args.policy_warmup:
        return args.policy_lr * (step + 1) / args.policy_warmup
    progress = (step - args.policy_warmup) / max(1, args.num_cloning_steps - args.policy_warmup)
    return args.policy_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def policy_update(policy, ema_policy, optimizer, obs, actions, ema_rate: float) -> torch.Tensor:
    """One step of supervised learning on obs (B, O), actions (B, A); the averaged copy follows. Returns the loss."""
    loss = policy.loss(obs, actions)
    gradient_step(loss, optimizer, policy, ema_policy, ema_rate)
    return loss.detach()


def gradient_step(loss, optimizer, online: nn.Module, average: nn.Module, rate: float) -> None:
    """One step of the optimizer, then average <- (1 - rate) average + rate online, parameter by parameter."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(online.parameters()), rate)


# --- CRITIC ---
class Critic(nn.Module):
    """An ensemble of E independent MLPs with LayerNorm and swish, evaluated as one batched matmul.

    num_bins: bins of the value's distribution on [q_min, q_max] (HL-Gauss), or 1 for a scalar head (MSE).
    shared_head: one output head for all members, as in the release; None of the presets uses it.
    """

    def __init__(self, obs_dim, action_dim, hidden=(256, 256), ensemble_size=10, num_bins=128, q_min=-100.0, q_max=0.0,
                 layer_norm=True, shared_head=False):  # fmt: skip
        super().__init__()
        self.obs_dim, self.num_bins, self.layer_norm = obs_dim, num_bins, layer_norm
        E, sizes = ensemble_size, (obs_dim + action_dim, *hidden)

        def orthogonal(members, rows, columns, gain):  # each member a matrix of its own
            return torch.stack([nn.init.orthogonal_(torch.empty(rows, columns), gain) for _ in range(members)])

        gains = [math.sqrt(2)] * (len(hidden) - 1) + [0.01]  # a last hidden layer this small: Q starts nearly constant
        self.weights = nn.ParameterList(orthogonal(E, i, o, g) for i, o, g in zip(sizes, hidden, gains))
        self.biases = nn.ParameterList(torch.zeros(E, 1, o) for o in hidden)
        self.scales = nn.ParameterList(torch.ones(E, 1, o) for o in hidden if layer_norm)
        self.shifts = nn.ParameterList(torch.zeros(E, 1, o) for o in hidden if layer_norm)
        self.head_weight = nn.Parameter(orthogonal(1 if shared_head else E, hidden[-1], num_bins, 0.01))
        self.head_bias = nn.Parameter(torch.zeros(len(self.head_weight), 1, num_bins))
        self.ensemble_size, self.shared_head, self.width = E, shared_head, max(hidden)
        self.register_buffer("edges", torch.linspace(q_min, q_max, num_bins + 1))
        self.register_buffer("centers", (self.edges[:-1] + self.edges[1:]) / 2)

    def outputs(self, obs, actions, members=None):
        """obs (B, O), actions (B, n, A) -> the head's outputs (E, B, n, bins), of the named members only if given."""
        B, n, A = actions.shape
        pick = (lambda p: p) if members is None else (lambda p: p[members])
        weight = pick(self.weights[0])
        E, _, H = weight.shape
        # The first layer is linear in [obs, action]: the observation's part is computed once for its n actions.
        obs_part = torch.matmul(obs, weight[:, : self.obs_dim]) + pick(self.biases[0])  # (E, B, H)
        action_part = torch.matmul(actions.reshape(B * n, A), weight[:, self.obs_dim :]).view(E, B, n, H)
        x = (action_part + obs_part[:, :, None]).view(E, B * n, H)
        for i in range(len(self.weights)):
            if i > 0:
                x = torch.baddbmm(pick(self.biases[i]), x, pick(self.weights[i]))
            if self.layer_norm:
                x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
                x = torch.addcmul(pick(self.shifts[i]), x, pick(self.scales[i]))
            x = F.silu(x)
        head = (lambda p: p.expand(E, -1, -1)) if self.shared_head else pick
        return torch.baddbmm(head(self.head_bias), x, head(self.head_weight)).view(E, B, n, self.num_bins)

    def value(self, outputs):
        """The head's outputs (..., bins) -> Q (...): the mean of the bins' centres, or the scalar itself."""
        return outputs[..., 0] if self.num_bins == 1 else torch.softmax(outputs, -1) @ self.centers

    def forward(self, obs, actions, members=None):
        """obs (B, O), actions (B, n, A) -> q (E, B, n)."""
        return self.value(self.outputs(obs, actions, members))

    def td_loss(self, obs, actions, target_q, release_width=False):
        """Q of actions (B, A), (E, B), and its mean loss against target_q (B,): HL-Gauss's cross-entropy, or MSE."""
        outputs = self.outputs(obs, actions[:, None])[:, :, 0]  # (E, B, bins)
        if self.num_bins == 1:
            return outputs[..., 0], (outputs[..., 0] - target_q).square().mean()
        target = hl_gauss_target(target_q, self.edges, release_width)
        return self.value(outputs), -(target * torch.log_softmax(outputs, -1)).sum(-1).mean()


# --- HL-GAUSS ---
def hl_gauss_target(values, edges, release_width=False):
    """Histogram of a Gaussian around each value, on the bins between `edges`, normalised: HL-Gauss.

    values (...), within some 1e7 bins of the edges, outside them the mass goes to the nearest bin; edges (bins + 1,) ->
    probabilities (..., bins). release_width: sigma sqrt(2) times wider, by the erf form's argument in the normal CDF.
    """
    sigma = 0.75 * (edges[1] - edges[0]) * (math.sqrt(2) if release_width else 1.0)
    z = (edges - values[..., None]) / sigma
    left, right = z[..., :-1], z[..., 1:]
    # log(Phi(right) - Phi(left)), in the tail where both are small, so that a value far outside loses no digits
    a, b = torch.where(left > 0, -right, left), torch.where(left > 0, -left, right)
    log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
    return torch.softmax(log_b + torch.log1p(-torch.exp(log_a - log_b)), -1)


# --- ACTION OPTIMIZATION ---
def global_optimization(critic, obs, actions, num_keep):
    """Equation 4.1: the num_keep candidates of highest Q, best first, Q being the ensemble's mean.

    obs (B, O), actions (B, k, A) -> actions (B, m, A), q (B, m).
    """
    with torch.no_grad():
        q, index = critic(obs, actions).mean(0).topk(num_keep, dim=1, sorted=True)
    return actions.gather(1, index[..., None].expand(-1, -1, actions.shape[-1])), q


def local_optimization(critic, obs, actions, num_steps, step_size, low, high, keep_best_of_path=False, start=None):
    """Equation 4.2 under section 4.3's rule: num_steps of gradient ascent on each action, no step that lowers Q.

    A rejected step leaves the action where it was, and as its gradient there is the same, all later ones would be
    rejected too: a step costs one forward and one backward pass and nothing is evaluated twice. With
    keep_best_of_path (release) every step is taken and the best of the T + 1 points is returned, the later of equals.

    obs (B, O), actions (B, m, A) in [low, high], start: their Q and gradient if known -> actions (B, m, A), q (B, m).
    Needs full float32: a step of 3e-4 changes Q in the fourth digit, TF32 or bfloat16 turn the comparison into noise.
    """
    q, gradient = start or q_and_gradient(critic, obs, actions, need_gradient=num_steps > 0)
    best_actions, best_q = actions, q
    for step in range(num_steps):
        proposed = (actions + step_size * gradient).clamp(low, high)
        new_q, new_gradient = q_and_gradient(critic, obs, proposed, need_gradient=step < num_steps - 1)
        better = new_q >= best_q if keep_best_of_path else new_q > best_q
        best_actions = torch.where(better[..., None], proposed, best_actions)
        best_q = torch.where(better, new_q, best_q)
        if step < num_steps - 1:
            taken = (better | keep_best_of_path)[..., None]
            actions, gradient = torch.where(taken, proposed, actions), torch.where(taken, new_gradient, gradient)
    return best_actions, best_q


def q_and_gradient(critic, obs, actions, need_gradient=True):
    """Mean Q of the ensemble (B, n) and, if asked for, its gradient with respect to each action (B, n, A)."""
    if isinstance(critic, FrozenCritic):  # the same, faster
        return critic.mean_and_gradient(obs, actions) if need_gradient else (critic(obs, actions).mean(0), None)
    with torch.set_grad_enabled(need_gradient):
        actions = actions.detach().requires_grad_(need_gradient)
        q = critic(obs, actions).mean(0)
        gradient = torch.autograd.grad(q.sum(), actions)[0] if need_gradient else None
    return q.detach(), gradient


def optimize_actions(critic, obs, actions, num_keep, num_steps, step_size, low=-1.0, high=1.0, data_actions=None,
                     keep_best_of_path=False, replace_worst=False, num_climb=0):  # fmt: skip
    """Algorithm 1: rank the candidates, keep the best, climb.

    obs (B, O), actions (B, k, A) samples of the policy, data_actions (B, A) or None -> actions (B, m, A), q (B, m), or
    m + 1 with data_actions. These are a_data(s) of line 3: one more candidate, climbed like the others; where there is
    none, NaN, the worst kept one stands twice. With replace_worst (release) it takes the worst one's place.
    num_climb > 0: only the best is wanted, so at most so many climb, and none that cannot become it (`climb_winners`).
    """
    actions, _ = global_optimization(critic, obs, actions, num_keep)
    if data_actions is not None:
        known = torch.where(data_actions.isnan(), actions[:, -1], data_actions)
        actions = torch.cat([actions[:, :-1] if replace_worst else actions, known[:, None]], 1)
    rest = num_steps, step_size, low, high, keep_best_of_path
    if num_climb == 0 or num_steps == 0:
        return local_optimization(critic, obs, actions, *rest)
    return climb_winners(local_optimization, q_and_gradient, critic, obs, actions, num_climb, *rest)


def optimize(critic, obs, actions, args: Args, best_only: bool, data_actions=None):
    """`optimize_actions` with the run's settings; but for --plain with the same critic made fast, the same best one."""
    critic, exact = (critic, 0) if args.plain else (FrozenCritic(critic), 0 if args.climb_all else args.num_keep + 1)
    settings = args.num_keep, args.num_gradient_steps, args.gradient_step_size, -1.0, 1.0
    flags = args.keep_best_of_path, False, (args.climb_first or exact) if best_only else 0
    return in_parts(lambda o, a, d: optimize_actions(critic, o, a, *settings, d, *flags), obs, actions, data_actions)


def select_actions(actions, q, greedy: bool):
    """Equation 4.3: one action per state, the best or one drawn from softmax(q). (B, m, A), (B, m) -> (B, A)."""
    index = q.argmax(1) if greedy else torch.multinomial(torch.softmax(q, 1), 1)[:, 0]
    return actions[torch.arange(len(actions), device=actions.device), index]


# --- CAL-QL ---
@torch.no_grad()
def td_target(target_critic, rewards, masks, next_obs, next_actions, discount, members=None):
    """r + gamma mask min over the members of Q_target(s', a'): (B,). next_actions (B, A); members: indices or None."""
    q = target_critic(next_obs, next_actions[:, None], members)[..., 0]  # (members, B)
    return rewards + discount * masks * q.min(0).values


def calql_loss(critic, obs, actions, target_q, mc_returns, current_actions, next_actions, random_actions, cql_alpha,
               cql_members=None, release_width=False):  # fmt: skip
    """Equation 3.3 as CQL(H) with the calibrated lower bound; the release's choices where the paper is silent.

    The penalty is logsumexp over random actions, the optimized actions at s and s' (both valued at s, and no lower than
    the Monte-Carlo return), and the data's action, minus Q of the data's action. The release repeats each optimized
    action as often as there are random ones; log(n) added to its entry is the same.

    obs (B, O), actions (B, A), target_q (B,), mc_returns (B,), current_actions and next_actions (B, A), random_actions
    (B, n, A); cql_members: indices of the ensemble's members to penalise, None for all -> the loss (scalar), and its
    parts as a dict of scalar tensors, detached (means over the members they use).
    """
    n = random_actions.shape[1]
    q_data, td_loss = critic.td_loss(obs, actions, target_q, release_width)
    sampled = torch.cat([random_actions, next_actions[:, None], current_actions[:, None]], 1)
    q_random, q_optimized = critic(obs, sampled, cql_members).split([n, 2], -1)  # (members, B, n), (members, B, 2)
    q_bounded = torch.maximum(q_optimized, mc_returns[:, None])  # calibrated: no pushing below the data's own return
    q_data_cql = q_data if cql_members is None else q_data[cql_members]
    entries = torch.cat([q_random, q_bounded + math.log(max(n, 1)), q_data_cql[..., None]], -1)
    cql_loss = (torch.logsumexp(entries, -1) - math.log(max(3 * n, 2) + 1) - q_data_cql).mean()
    loss = td_loss + cql_alpha * cql_loss
    info = dict(td_loss=td_loss, cql_loss=cql_loss, critic_loss=loss, q_data=q_data.mean(), target_q=target_q.mean(),
                q_random=q_random.mean() if n else q_data.mean(), q_optimized=q_optimized[..., 1].mean(),
                bound_rate=(q_optimized < mc_returns[:, None]).float().mean())  # fmt: skip
    return loss, {name: value.detach() for name, value in info.items()}


def critic_update(critic, target_critic, optimizer, buffer, index, args: Args) -> dict[str, torch.Tensor]:
    """Algorithm 2, line 4: one update on the transitions `index` (B,), their candidates taken from the cache."""
    states = torch.cat([buffer.obs_index[index], buffer.next_index[index]])
    data_actions, best = buffer.data_actions(states), not args.sample_backup  # at s' the one that came next
    known = data_actions if args.target_data_actions else None
    optimized, q = optimize(critic, buffer.states[states], buffer.candidates[states], args, best, known)
    current_actions, next_actions = select_actions(optimized, q, best).chunk(2)
    obs, next_obs = buffer.states[states].chunk(2)
    td_members = torch.randperm(args.ensemble_size, device=obs.device)[: args.target_subset]
    cql_members = torch.randperm(args.ensemble_size, device=obs.device)[: args.target_subset]
    rewards, masks, backup = buffer.rewards[index], buffer.masks[index], next_actions
    if args.base_policy_backup:
        drawn = torch.randint(args.num_samples, index.shape, device=obs.device)
        backup = buffer.candidates[buffer.next_index[index], drawn]  # one of the policy's samples
    target_q = td_target(target_critic, rewards, masks, next_obs, backup, args.discount**args.chunk, td_members)
    random_actions = torch.rand(len(index), args.cql_actions, optimized.shape[-1], device=obs.device) * 2 - 1
    batch = critic, obs, data_actions[: len(index)], target_q, buffer.mc_returns[index], current_actions, next_actions
    loss, info = calql_loss(*batch, random_actions, args.cql_alpha, cql_members, args.hl_gauss_release_width)
    gradient_step(loss, optimizer, critic, target_critic, args.target_tau)
    return info


# --- DATA ---
def monte_carlo_returns(rewards, terminals, ends, discount, failure=-math.inf, plain=False):
    """Discounted return-to-go of every row, the V^mu(s) that calibrates Cal-QL: float32 (N,).

    rewards (N,) biased, terminals (N,), ends: index after the last row of each trajectory. One that was cut goes on
    with its last reward for ever: + gamma^k r_last / (1 - gamma) at its end (our choice; plain, as in the release: the
    sum up to the cut). One that never rose above `failure` never succeeds: failure / (1 - gamma) from everywhere.
    """
    returns = np.zeros(len(rewards), np.float64)
    for start, end in zip([0, *ends[:-1]], ends):
        failed, last = rewards[start:end].max() <= failure, rewards[end - 1]
        running = 0.0 if terminals[end - 1] or plain else last / (1 - discount)
        for i in range(end - 1, start - 1, -1):
            running = returns[i] = failure / (1 - discount) if failed else rewards[i] + discount * running
    return returns.astype(np.float32)


def windows(rewards, terminals, ends, discount, chunk):
    """The chunk of actions, taken one after the other without looking, that begins at each row; all returned are (N,).

    One that a terminal ends early counts: what comes after is worth nothing, so that its other actions may be any (the
    data's, where they go on). One that a cut ends early (time limit, break) does not: its rest is not known.

    rewards (N,) biased, terminals (N,), ends: index after the last row of each trajectory -> steps: how many were
    taken; the sum of their gamma^i r_i; masks: 0 where a terminal ended them; whole: whether it counts.
    """
    lengths = np.diff(ends, prepend=0)
    left = np.repeat(ends, lengths) - np.arange(len(rewards))  # rows to the trajectory's end
    steps, terminal = np.minimum(left, chunk), np.repeat(terminals[ends - 1], lengths) & (left <= chunk)
    total = np.zeros_like(rewards)
    for i in range(steps.max()):
        total[: len(total) - i] += np.where(steps[: len(total) - i] > i, discount**i * rewards[i:], 0)
    return steps, total, 1 - terminal.astype(np.float32), terminal | (left >= chunk)


class ReplayBuffer:
    """Offline transitions, then online ones, as tensors on the device.

    A state that ends one transition and begins the next is kept once, in `states`; transitions name states by index. Of
    each state there is `action_at`, the data's action there, NaN where it took none, and `candidates`, the
    cache of appendix E, which `refresh_candidates` fills.

    With --chunk a transition is a window of so many steps, and `starts` are the rows at which one begins. Of these
    steps only the rewards are summed here; actions are gathered when asked for, returns are of the first step.
    """

    def __init__(self, dataset, args: Args, device):
        """dataset: checked arrays, with actions in [-1, 1]."""
        self.args, self.device, self.data = args, device, []  # a checkpoint keeps what came after the dataset
        self.add(dataset)
        self.num_offline = len(self.starts)  # windows of the dataset, which come first

    def __len__(self):
        return len(self.rewards)

    def add(self, data) -> None:
        """Append the trajectories of the dataset or, once that is there, an online episode."""
        args, online = self.args, len(self.data) > 0
        self.data.append(data)
        rewards, ends = data.rewards + np.float32(args.reward_bias), trajectory_ends(data)
        self.lowest = min(float(rewards.min()), self.lowest if online else 0.0)  # what a step of a failure is worth
        failure = self.lowest if args.sparse_reward and not (online and args.release_returns) else -math.inf
        mc_returns = monte_carlo_returns(rewards, data.terminals, ends, args.discount, failure, args.release_returns)
        steps, rewards, masks, whole = windows(rewards, data.terminals, ends, args.discount, args.chunk)
        states, action_at, obs_index, last = distinct_states(data)
        last_index = np.arange(len(states))  # where the actions of a state's chunk end, of one that is cut at the NaN
        last_index[obs_index] = np.where(whole, np.minimum(obs_index + args.chunk - 1, last), obs_index + steps)
        first, starts = (len(self.states), len(self)) if online else (0, 0), np.flatnonzero(whole)
        new = dict(states=states, action_at=action_at, last_index=last_index + first[0], obs_index=obs_index + first[0],
                   next_index=obs_index + steps + first[0], starts=starts + first[1], mc_returns=mc_returns,
                   rewards=rewards, masks=masks, candidates=np.zeros(
                       (len(states), args.num_samples, args.chunk * data.actions.shape[1]), np.float32))  # fmt: skip
        for name, array in new.items():
            tensor = torch.as_tensor(array, device=self.device)
            setattr(self, name, torch.cat([getattr(self, name), tensor]) if online else tensor)

    def data_actions(self, states) -> torch.Tensor:
        """The data's action, a whole chunk, at each state (index (B,)): (B, A), NaN where none begins."""
        steps = states[:, None] + torch.arange(self.args.chunk, device=self.device)
        actions = self.action_at[torch.minimum(steps, self.last_index[states, None])].flatten(1)
        return actions.masked_fill(actions.isnan().any(1, keepdim=True), math.nan)

    def sample_index(self, shape: tuple[int, int], mixed: bool = True) -> torch.Tensor:
        """Rows (updates, batch) that begin a window, mixing_ratio of them offline; not mixed: all rows alike."""
        num_windows = len(self.starts)
        if not mixed:
            return torch.randint(len(self), shape, device=self.device)
        if num_windows == self.num_offline:
            return self.starts[torch.randint(num_windows, shape, device=self.device)]
        num_offline = round(self.args.mixing_ratio * shape[1])
        offline = torch.randint(self.num_offline, (shape[0], num_offline), device=self.device)
        online = torch.randint(self.num_offline, num_windows, (shape[0], shape[1] - num_offline), device=self.device)
        return self.starts[torch.cat([offline, online], 1)]


def refresh_candidates(policy, buffer, states) -> None:
    """Appendix E's cache: draw anew the candidates of the states given (index of any shape, each state once).

    The policy is frozen while the critic trains on a batch of updates, so its candidates at each distinct state are
    drawn once. After the policy changed, only the states that the coming updates will look at are redrawn, by the
    policy given: nothing is drawn that is not used. Those of states never refreshed are zeros.
    """
    for index in states.unique().split(4096):
        buffer.candidates[index] = sample_on_all_cores(policy, buffer.states[index], buffer.candidates.shape[1])


# --- DISTILLATION ---
def distill(policy, ema_policy, optimizer, critic, buffer, num_updates, greedy, args: Args, sampler=None):
    """Section 4.2: annotate states, uniform over the buffer, with optimized actions (equation 4.4), then clone those.

    The critic does not change meanwhile, so all annotations of the round are made first, from candidates drawn now (by
    `sampler`, the policy that is sampled if None). Returns the targets (num_updates, B, A) and, as metrics, the mean
    loss, and of the annotations the mean Q and its standard deviation over the candidates of a state.
    """
    states = buffer.obs_index[buffer.sample_index((num_updates, args.batch_size), args.distill_mixed).flatten()]
    refresh_candidates(sampler or ema_policy, buffer, states)
    metrics = candidate_spread(critic, buffer, states[: args.batch_size], args)
    if args.distill_from == "data":
        states, optimized, q = self_imitation(critic, buffer, states, args)
    else:
        data_actions = buffer.data_actions(states) if args.distill_data_actions else None
        optimized, q = optimize(critic, buffer.states[states], buffer.candidates[states], args, greedy, data_actions)
    targets = select_actions(optimized, q, greedy).view(num_updates, args.batch_size, -1)
    obs = buffer.states[states].view(num_updates, args.batch_size, -1)
    losses = [policy_update(policy, ema_policy, optimizer, o, a, args.policy_ema) for o, a in zip(obs, targets)]
    loss, value, spread = torch.stack(losses).mean(), q.amax(1).mean(), metrics.pop("q_std")
    return targets, metrics | {"distill_loss": loss, "distill_q": value, "distill_q_std": spread}


def self_imitation(critic, buffer, states, args: Args):
    """Figure 6: the data's own actions, not optimized, in proportion to their advantage where that is positive.

    Advantage: Q of the data's action less its mean over the policy's samples. States (index (S,)) are drawn by it, with
    repetition: in expectation the weighted likelihood (both our choice; if none is positive, all count alike). Acting
    goes on ranking and climbing. Returns states (S,), actions (S, 1, A), q (S, 1).
    """
    critic = critic if args.plain else FrozenCritic(critic)
    candidates = torch.cat([buffer.data_actions(states)[:, None], buffer.candidates[states]], 1)
    with torch.no_grad():
        (q,) = in_parts(lambda o, a: (critic(o, a).mean(0),), buffer.states[states], candidates)
    advantage = (q[:, 0] - q[:, 1:].mean(1)).clamp(min=1e-6).nan_to_num(0)  # NaN: the data took no action there
    drawn = torch.multinomial(advantage, len(states), replacement=True)
    return states[drawn], candidates[drawn, :1], q[drawn, :1]


def candidate_spread(critic, buffer, states, args: Args) -> dict[str, torch.Tensor]:
    """Spread of Q over a state's kept candidates before they climb, mean over states (index (S,)); and, as in figure 13
    and table 6, what climbing does to all of 64 states': their spread, its change, an action's L1 change, Q's spread.
    """
    obs, spread = buffer.states[states], lambda values: values.std(1, correction=0).mean()
    kept, q = global_optimization(critic, obs, buffer.candidates[states], args.num_keep)
    settings = args.num_gradient_steps, args.gradient_step_size, -1.0, 1.0, args.keep_best_of_path
    fast = critic if args.plain else FrozenCritic(critic)
    climbed, climbed_q = local_optimization(fast, obs[:64], kept[:64], *settings)
    before, after, change = spread(kept[:64]), spread(climbed), climbed - kept[:64]
    return {"q_std": spread(q), "climbed_q_std": spread(climbed_q), "action_std": before,
            "action_std_change": after - before, "action_l1": change.abs().sum(-1).mean()}  # fmt: skip


def choose_greedy_distillation(args: Args, q_stds: list[float]) -> bool:
    """Appendix B.1: teach the argmax where the candidates' Q differ too little for samples of eq. 4.3 to prefer any.

    q_stds: measured standard deviations of the candidates' Q; none: nothing was measured. The paper gives no
    threshold. Equation 4.3's softmax has temperature 1, so that below a standard deviation of about 1 the candidates
    are nearly equally likely, and samples would hardly improve the policy.
    """
    if args.distill_selection != "auto":
        return args.distill_selection == "greedy"
    return bool(np.mean(q_stds) < args.greedy_below_std) if q_stds else args.greedy_rollouts


# --- MAIN ---
def main(argv: list[str] | None = None) -> None:
    args = parse_args(Args, PRESETS, argv)
    device, env, envs, dataset = set_up(args, make_env, load_dataset)
    obs_dim, action_dim = env.observation_space.shape[0], args.chunk * env.action_space.shape[0]
    buffer = ReplayBuffer(dataset, args, device)
    sizes = args.diffusion_steps, args.policy_hidden, args.policy_blocks
    policy = DiffusionPolicy(obs_dim, action_dim, *sizes, dropout=args.policy_dropout, clip=args.clip_steps).to(device)
    load_policy(policy, args)  # if there is a --policy-checkpoint
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
