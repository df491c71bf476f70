"""PA-RL + RLPD with a diffusion policy, hybrid offline and online: "Policy Agnostic RL" (arXiv 2412.06685), table 2.

The policy is pre-trained by cloning the data; the critic starts from random weights when the robot starts to act. A few
episodes of the cloned policy come first. Then every episode is followed by ten critic updates per step, on batches of
which one half comes from the data and the other from what was seen online, and by distilling. The critic is plain TD
without conservatism: a large ensemble, of which a random pair gives the target, keeps it from overestimating (RLPD).

    python parl_diffusion_rlpd.py                                      # a small maze on a laptop: minutes
    python parl_diffusion_rlpd.py --env-id antmaze-large-diverse-v2    # the paper's setting: one GPU, hours
    python parl_diffusion_rlpd.py --resume runs/<folder>               # continue after a stop, in any phase

paper                                           | here
------------------------------------------------|---------------------------------------------------------------
eq. 3.1, 4.5  denoising loss                    | DiffusionPolicy.loss
sec. 3        denoising chain                   | DiffusionPolicy.sample
sec. 5.1, B.2 RLPD: TD, random pair of ten      | rlpd_loss, td_target
eq. 4.1       keep the m best of k samples      | global_optimization
eq. 4.2       gradient ascent on the action     | local_optimization
alg. 1        action optimization               | optimize_actions
eq. 4.3       which optimized action to take    | select_actions
eq. 4.4       dataset of optimized actions      | distill
app. B.1      argmax or samples                 | Args.distill_selection
app. E        cache of candidates               | refresh_candidates
alg. 2        line 1 / warm-up / 3-8            | main: phases 1 / 2 / 3

There is no offline phase: phase 2 is the warm-up with the cloned policy. Where the paper is silent or the authors'
release differs, see `parl_diffusion_calql.py`.
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import matplotlib
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from benchmarks.tasks import load_dataset, make_env

# --- ARGUMENTS ---


@dataclass
class Args:
    """PA-RL + RLPD with a diffusion policy. Defaults shown are those of the preset in force."""

    env_id: str = "pointmaze-medium-v0"  # task, see benchmarks/tasks
    preset: str = "auto"  # a task family's hyperparameters (PRESETS), auto: by the task's name; flags given by hand win;
    # laptop: the family's, with networks and phases for two CPU cores
    seed: int = 1  # seed of everything but the dataset
    device: str = "auto"  # auto: the GPU if there is one
    threads: int = 0  # CPU threads, 0: all cores this process may use
    runs: str = "runs"  # folder in which the run's folder is made
    resume: str = ""  # folder of a run to continue
    checkpoint_seconds: float = 30.0  # seconds between checkpoints
    track: bool = False  # log to Weights & Biases as well (pip install wandb)
    wandb_project: str = "parl"  # project there
    capture_video: bool = False  # film three episodes of the final policy (pip install opencv-python-headless)
    dataset_source: Literal["auto", "download", "local"] = "auto"  # published data or collected here; auto: if need be
    dataset_path: str = ""  # read the offline data from this file instead: .npz, or the task's own format
    dataset_size: int = 0  # transitions to collect where the data is collected locally, 0: the task's default

    num_cloning_steps: int = 300_000  # phase 1: updates of the policy
    num_warmup_episodes: int = 10  # phase 2: episodes of the cloned policy before the first critic update
    num_online_episodes: int = 200  # phase 3: episodes; 0: cloning only
    eval_episodes: int = 32  # episodes of an evaluation
    eval_processes: bool = True  # simulate them in processes, two for each core
    num_online_evals: int = 10  # evaluations spread over phase 3
    log_every: int = 100  # updates between two rows of metrics

    diffusion_steps: int = 5  # K, denoising steps
    policy_hidden: int = 256  # width of the policy's residual blocks (4 x inside)
    policy_blocks: int = 3  # residual blocks
    policy_dropout: float = 0.1  # in the residual blocks, when training
    cloning_batch_size: int = 1024  # of the paper; 256 in the release
    policy_lr: float = 3e-4  # Adam, cloning: warm-up, then cosine decay
    policy_warmup: int = 2_000  # updates of warm-up
    distill_lr: float = 5e-5  # Adam, distilling: constant
    policy_ema: float = 0.002  # rate of the averaged copy of the policy, the one that is sampled

    ensemble_size: int = 10  # members of the critic
    target_subset: int = 2  # members whose minimum is the TD target, drawn anew each update
    critic_hidden: tuple[int, ...] = (256, 256)  # hidden layers
    critic_loss: Literal["hl_gauss", "mse"] = "hl_gauss"  # classification over bins of the value, or regression
    num_bins: int = 128  # bins of hl_gauss
    hl_gauss_release_width: bool = False  # the release's effective sigma, sqrt(2) x 0.75 bins, instead of 0.75 bins
    critic_lr: float = 3e-4  # Adam
    batch_size: int = 256  # transitions of a critic update, states of a distilling update
    discount: float = 0.99  # gamma
    target_tau: float = 0.005  # rate of the target critic
    reward_bias: float = -1.0  # added to every reward so that the best possible one is 0
    reward_min: float = -1.0  # smallest biased reward, 0: that of the data; the smallest value is reward_min / (1 - discount)
    sparse_reward: bool = True  # a trajectory without success is worth reward_min / (1 - discount) from all its states

    num_samples: int = 32  # k, candidates drawn from the policy
    num_keep: int = 10  # m, candidates kept by rank
    num_gradient_steps: int = 10  # T, gradient steps on each kept action; 0: rank only
    gradient_step_size: float = 3e-4  # alpha of equation 4.2
    keep_best_of_path: bool = False  # the release's way: take every step, return the best point of the path
    use_data_actions: bool = False  # alg. 1's a_data(s): the data's action replaces the worst kept candidate
    greedy_rollouts: bool = True  # act online with the best candidate; else draw from equation 4.3
    distill_selection: Literal["auto", "greedy", "sample"] = "auto"  # teach the best candidate, or draws from eq. 4.3
    greedy_below_std: float = 1.0  # auto: greedy if the candidates' Q differ less than this (standard deviation)

    mixing_ratio: float = 0.5  # share of offline data in an online batch
    utd: float = 10.0  # critic updates per environment step
    distill_ratio: float = 1.0  # distilling updates per environment step
    online_plain_returns: bool = False  # of no effect: RLPD needs no Monte-Carlo returns


# What a task family changes in the defaults above, which are the paper's (appendix B.1) and its release's.
PRESETS: dict[str, dict] = {
    "default": {},
    "antmaze": dict(critic_hidden=(256, 256, 256, 256)),
    "kitchen": dict(
        critic_hidden=(512, 512, 512), reward_bias=-4.0, reward_min=-4.0, sparse_reward=False, greedy_rollouts=False
    ),
    # Sized for two CPU cores. One-step TD carries value over a horizon of H decisions in about H / target_tau updates;
    # here a good way takes 10 to 15 decisions, hence the faster target and the smaller discount. Fewer candidates and
    # steps than the paper's 32, 10 and 10 are for the time they take; what they cost in success was not measured.
    "ogbench": dict(reward_bias=0.0, reward_min=0.0),  # its rewards are minus the number of parts left to do
    "pointmaze": dict(
        num_cloning_steps=2_000, num_warmup_episodes=10, num_online_episodes=200, eval_episodes=50, eval_processes=False,
        num_online_evals=20, log_every=50, policy_hidden=64, policy_blocks=2,
        cloning_batch_size=256, policy_lr=1e-3, policy_warmup=200, distill_lr=3e-4, ensemble_size=2,
        critic_hidden=(128, 128), critic_lr=1e-3, discount=0.95, target_tau=0.03, num_bins=64, batch_size=64, utd=4.0,
        num_samples=8, num_keep=2, num_gradient_steps=2, gradient_step_size=0.03,
    ),
    # On top of the family's: what two CPU cores train in 20 to 30 minutes. Actions are drawn from equation 4.3 over all
    # candidates: on AntMaze the best of eight by a critic of so few updates failed where the cloned policy did not. And
    # little is distilled online: ten times as much narrowed the policy faster than the critic learned, until it failed.
    "laptop": dict(
        num_cloning_steps=10_000, num_online_episodes=30, eval_episodes=50, num_online_evals=1,
        policy_hidden=128, policy_blocks=2, policy_dropout=0.0,
        cloning_batch_size=256, policy_lr=1e-3, policy_warmup=500, distill_lr=5e-5, ensemble_size=2,
        critic_hidden=(256, 256), critic_lr=5e-4, batch_size=128, target_tau=0.02, num_bins=64,
        num_samples=4, num_keep=4, num_gradient_steps=1, gradient_step_size=0.001, greedy_rollouts=False,
        distill_selection="sample", utd=4.0, distill_ratio=0.05,
    ),
}  # fmt: skip


# --- COMMAND LINE ---


def task_family(env_id: str) -> str:
    """The preset of a task."""
    family = "ogbench" if "-singletask-" in env_id else env_id.split("-")[0]
    return family if family in PRESETS else "default"


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line, over the preset, over the defaults; with --resume, over the saved run."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # these three decide the others' defaults
    for flags, default in ((("--env-id", "--env_id"), Args.env_id), (("--preset",), "auto"), (("--resume",), "")):
        first.add_argument(*flags, default=default)
    given = first.parse_known_args(argv)[0]
    if given.resume:
        return _resumed_args(given.resume, argv)
    preset = given.preset
    if preset == "auto":
        preset = task_family(given.env_id)
    if preset not in PRESETS:
        fail(f"unknown --preset {preset!r}; there are {', '.join(PRESETS)}")
    below = PRESETS[task_family(given.env_id)] if preset == "laptop" else {}
    args = tyro.cli(Args, args=argv, default=Args(**below | PRESETS[preset]))
    return dataclasses.replace(args, preset=preset)


def _resumed_args(folder: str, argv: list[str] | None) -> Args:
    path = pathlib.Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        fail(f"{folder} is not a run's folder: it has no readable config.json")
    script = pathlib.Path(__file__).stem
    if config.pop("script", None) != script:
        fail(f"{folder} was made by another script; resume it with that one, not with {script}.py")
    config.pop("provenance", None)
    config.pop("data", None)
    known = {field.name for field in dataclasses.fields(Args)}
    if set(config) != known:
        fail(f"{folder} was made by another version of {script}.py (flags differ: {sorted(set(config) ^ known)})")
    saved = Args(**config | {"critic_hidden": tuple(config["critic_hidden"]), "resume": folder})
    args = tyro.cli(Args, args=argv, default=saved)
    free = {"track", "wandb_project", "capture_video", "checkpoint_seconds", "device", "threads"}
    for field in dataclasses.fields(Args):
        if field.name not in free and getattr(args, field.name) != getattr(saved, field.name):
            flag = "--" + field.name.replace("_", "-")
            fail(f"{folder} was started with {flag} {getattr(saved, field.name)}; leave {flag} out, or start a new run")
    return args


def check_args(args: Args) -> None:
    """Refuse values that cannot work, before anything long begins."""
    low = dict.fromkeys(("eval_episodes", "batch_size", "cloning_batch_size", "log_every"), 1)
    low |= {"num_keep": 1, "target_subset": 1, "num_bins": 2, "discount": 0, "mixing_ratio": 0, "cql_actions": 0}
    low |= dict.fromkeys(("num_cloning_steps", "num_offline_steps", "num_online_episodes", "num_gradient_steps"), 0)
    high = {"num_keep": "num_samples", "target_subset": "ensemble_size", "discount": 0.99999, "mixing_ratio": 1}
    high |= {"expectile": 0.999}
    low |= dict.fromkeys(("diffusion_steps", "policy_heads", "distill_every", "num_warmup_episodes"), 1)
    low |= {"policy_bins": 2, "expectile": 0.001, "refresh_every": 0}
    for name, least in low.items():
        if not hasattr(args, name):  # a flag of another script
            continue
        flag, value = "--" + name.replace("_", "-"), getattr(args, name)
        most = high.get(name, math.inf)
        limit = getattr(args, most) if isinstance(most, str) else most
        if not least <= value <= limit:
            most = f"--{most.replace('_', '-')} ({limit})" if isinstance(most, str) else most
            fail(f"{flag} {value} must be at least {least}" + (f" and at most {most}" if limit < math.inf else ""))
    if args.reward_min > 0:
        fail(f"--reward-min {args.reward_min} must not be positive: rewards are biased so that the best one is 0")
    if hasattr(args, "policy_heads") and args.policy_width % args.policy_heads:
        fail(f"--policy-heads {args.policy_heads} must divide --policy-width ({args.policy_width})")


def fail(message: str):
    """End the program with one line."""
    raise SystemExit(f"error: {message}")


# --- DIFFUSION POLICY ---

POLICY_METRICS = ("policy_loss",)


def cosine_beta_schedule(num_steps: int, s: float = 0.008) -> torch.Tensor:
    """Noise variances beta_1..beta_K, float32 (K,), of Nichol and Dhariwal's cosine schedule."""
    x = torch.linspace(0, num_steps, num_steps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((x / num_steps + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0, 0.999).float()


class ResidualBlock(nn.Module):
    """x + W2 swish(W1 LayerNorm(Dropout(x))), four times wider inside (IDQL's LN-ResNet)."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(F.silu(self.up(self.norm(self.dropout(x)))))


class DiffusionPolicy(nn.Module):
    """A conditional DDPM over actions in [-1, 1]^A (section 3; IDQL's network, appendix B.1)."""

    def __init__(self, obs_dim, action_dim, num_steps=5, hidden=256, blocks=3, time_dim=128, dropout=0.1):
        super().__init__()
        self.obs_dim, self.action_dim, self.num_steps = obs_dim, action_dim, num_steps
        self.width = 4 * hidden  # floats of a sample's largest activation
        self.frequencies = nn.Parameter(0.2 * torch.randn(time_dim // 2))  # learnable Fourier features of the step
        self.time1 = nn.Linear(time_dim, 2 * time_dim)
        self.time2 = nn.Linear(2 * time_dim, time_dim)
        self.first = nn.Linear(time_dim + obs_dim + action_dim, hidden)
        self.blocks = nn.ModuleList(ResidualBlock(hidden, dropout) for _ in range(blocks))
        self.last = nn.Linear(hidden, action_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        betas = cosine_beta_schedule(num_steps)
        self.register_buffer("betas", betas)
        self.register_buffer("alphas", 1 - betas)
        self.register_buffer("alpha_bars", torch.cumprod(1 - betas, 0))

    def time_features(self, t):
        """Steps t (...,) integers from 0 to K - 1 -> (..., time_dim)."""
        angle = 2 * math.pi * t[..., None] * self.frequencies
        return self.time2(F.silu(self.time1(torch.cat([angle.cos(), angle.sin()], -1))))

    def predict_noise(self, obs_and_time, noisy_actions):
        """epsilon_phi(a_t, s, t). obs_and_time: the sum of the two `first_layer_parts`."""
        x = obs_and_time + noisy_actions @ self.first.weight[:, -self.action_dim :].T
        for block in self.blocks:
            x = block(x)
        return self.last(F.silu(x))

    def first_layer_parts(self, obs):
        """What the first layer makes of the observations (B, hidden) and of each step (K, hidden).

        It is linear in [time, observation, action], so these parts serve all samples of a state, all states of a step.
        """
        time_weight, obs_weight, _ = self.first.weight.split([self.time2.out_features, self.obs_dim, self.action_dim], 1)
        steps = torch.arange(self.num_steps, device=obs.device)
        return F.linear(obs, obs_weight, self.first.bias), F.linear(self.time_features(steps), time_weight)

    def loss(self, obs, actions, t=None, noise=None):
        """Equation 3.1 with the squared norm, as DDPM and the release have it. obs (B, O), actions (B, A) -> scalar."""
        if t is None:
            t = torch.randint(self.num_steps, (len(obs),), device=obs.device)
        if noise is None:
            noise = torch.randn_like(actions)
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
        """Draw actions by the denoising chain, clipped to [-1, 1] after every step (release).

        Args:
            obs: (B, O).
            num_samples: n per state.
            noise: (B, K + 1, n, A) standard normal; the first is a_K, the last is not used. None: drawn here.
        Returns:
            actions (B, n, A).
        """
        noise = (self.draw_noise(obs, num_samples) if noise is None else noise).transpose(0, 1)
        obs_part, time_parts = self.first_layer_parts(obs)
        actions = noise[0]
        for i, t in enumerate(reversed(range(self.num_steps))):
            epsilon = self.predict_noise((obs_part + time_parts[t])[:, None], actions)
            alpha, alpha_bar, beta = self.alphas[t], self.alpha_bars[t], self.betas[t]
            actions = (actions - (1 - alpha) / (1 - alpha_bar).sqrt() * epsilon) / alpha.sqrt()
            if t > 0:
                actions = actions + beta.sqrt() * noise[i + 1]
            actions = actions.clamp(-1, 1)
        return actions


# --- SUPERVISED LEARNING ---


def cloning_lr(step: int, args: Args) -> float:
    """Linear warm-up to policy_lr, then cosine decay to 0 at the last update."""
    if step < args.policy_warmup:
        return args.policy_lr * (step + 1) / args.policy_warmup
    progress = (step - args.policy_warmup) / max(1, args.num_cloning_steps - args.policy_warmup)
    return args.policy_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def policy_update(policy, ema_policy, optimizer, obs, actions, ema_rate: float) -> torch.Tensor:
    """One step of supervised learning on obs (B, O), actions (B, A); the averaged copy follows. Returns the loss."""
    loss = policy.loss(obs, actions)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    ema_update(ema_policy, policy, ema_rate)
    return loss.detach()


@torch.no_grad()
def ema_update(average: nn.Module, online: nn.Module, rate: float) -> None:
    """average <- (1 - rate) average + rate online, parameter by parameter."""
    torch._foreach_lerp_(list(average.parameters()), list(online.parameters()), rate)


# --- CRITIC ---


class Critic(nn.Module):
    """An ensemble of E independent MLPs with LayerNorm and swish, evaluated as one batched matmul.

    Args:
        num_bins: bins of the value's distribution on [q_min, q_max] (HL-Gauss), or 1 for a scalar head (MSE).
        shared_head: one output head for all members, as in the release; None of the presets uses it.
    """

    def __init__(
        self, obs_dim, action_dim, hidden=(256, 256), ensemble_size=10, num_bins=128, q_min=-100.0, q_max=0.0,
        layer_norm=True, shared_head=False,
    ):  # fmt: skip
        super().__init__()
        self.obs_dim, self.num_bins, self.layer_norm = obs_dim, num_bins, layer_norm
        E = ensemble_size
        sizes = (obs_dim + action_dim, *hidden)
        gains = [math.sqrt(2)] * (len(hidden) - 1) + [0.01]  # a last hidden layer this small: Q starts nearly constant
        self.weights = nn.ParameterList(orthogonal(E, i, o, g) for i, o, g in zip(sizes, hidden, gains))
        self.biases = nn.ParameterList(torch.zeros(E, 1, o) for o in hidden)
        self.scales = nn.ParameterList(torch.ones(E, 1, o) for o in hidden if layer_norm)
        self.shifts = nn.ParameterList(torch.zeros(E, 1, o) for o in hidden if layer_norm)
        heads = 1 if shared_head else E
        self.head_weight = nn.Parameter(orthogonal(heads, hidden[-1], num_bins, 0.01))
        self.head_bias = nn.Parameter(torch.zeros(heads, 1, num_bins))
        self.ensemble_size, self.shared_head = E, shared_head
        self.width = max(hidden)
        edges = torch.linspace(q_min, q_max, num_bins + 1)
        self.register_buffer("edges", edges)
        self.register_buffer("centers", (edges[:-1] + edges[1:]) / 2)

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
        if self.num_bins == 1:
            return outputs[..., 0]
        return torch.softmax(outputs, -1) @ self.centers

    def forward(self, obs, actions, members=None):
        """obs (B, O), actions (B, n, A) -> q (E, B, n)."""
        return self.value(self.outputs(obs, actions, members))


class FrozenCritic:
    """A critic that does not change for a while: the same Q, and its gradient with respect to the action by hand.

    Action optimization is nearly all of PA-RL's arithmetic, and outside the matmuls it is bound by memory. So here each
    layer keeps two tensors for its backward pass instead of autograd's four, works in place, takes on a CPU as many
    members at a time as its cache holds, and normalises for less: with weights and biases centred over their outputs
    the mean of a pre-activation is 0, so LayerNorm is a division by its root mean square. In the backward pass the
    centred weights subtract the gradient's mean as well.
    """

    @torch.no_grad()
    def __init__(self, critic: Critic):
        self.critic = critic
        centred = (lambda w: w - w.mean(-1, keepdim=True)) if critic.layer_norm else (lambda w: w.detach())
        self.weights, self.biases = [centred(w) for w in critic.weights], [centred(b) for b in critic.biases]
        E = critic.ensemble_size
        self.head_weight, self.head_bias = critic.head_weight.expand(E, -1, -1), critic.head_bias.expand(E, -1, -1)

    @torch.no_grad()
    def __call__(self, obs, actions):
        """As Critic: obs (B, O), actions (B, n, A) -> q (E, B, n)."""
        return torch.cat([self._forward(obs, actions, members)[0] for members in self._groups(actions)])

    @torch.no_grad()
    def mean_and_gradient(self, obs, actions):
        """Mean Q over the ensemble (B, n), and its gradient with respect to each action (B, n, A)."""
        q, gradient = zip(*(self._value_and_gradient(obs, actions, members) for members in self._groups(actions)))
        E = self.critic.ensemble_size
        return sum(q) / E, sum(gradient) / E

    def _groups(self, actions):
        """Members to evaluate together."""
        E, rows = self.critic.ensemble_size, actions.shape[0] * actions.shape[1]
        size = E if actions.is_cuda else max(1, CACHE_FLOATS // (rows * self.critic.width))
        return [slice(first, min(E, first + size)) for first in range(0, E, size)]

    def _forward(self, obs, actions, members, saved=None):
        """q (E, B, n), and the bins' probabilities (E, B n, bins) or None; fills `saved` for the backward pass."""
        B, n, A = actions.shape
        weights, O, one = [w[members] for w in self.weights], self.critic.obs_dim, actions.new_ones(())  # noqa: E741
        E = len(weights[0])
        obs_part = torch.baddbmm(self.biases[0][members], obs.expand(E, -1, -1), weights[0][:, :O])
        z = torch.bmm(actions.reshape(1, B * n, A).expand(E, -1, -1), weights[0][:, O:])
        z.view(E, B, n, -1).add_(obs_part[:, :, None])
        x = None
        for i in range(len(weights)):
            z = z if i == 0 else torch.bmm(x, weights[i]).add_(self.biases[i][members])
            u, inverse_rms, scale = z, None, one
            if self.critic.layer_norm:
                norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
                inverse_rms = norm.square_().div_(z.shape[-1]).add_(1e-6).rsqrt_()
                scale = self.critic.scales[i][members]
                u = torch.addcmul(self.critic.shifts[i][members], z.mul_(inverse_rms), scale)
            if saved is None:
                x = F.silu(u, inplace=True)
            else:
                sigmoid = torch.sigmoid(u)
                x = u.mul_(sigmoid)
                slope = torch.lerp(x, one, sigmoid).mul_(scale)  # swish' = x + sigmoid (1 - x), times LayerNorm's scale
                saved.append((z, inverse_rms, slope))
        outputs = torch.baddbmm(self.head_bias[members], x, self.head_weight[members])
        if self.critic.num_bins == 1:
            return outputs.view(E, B, n), None
        probs = torch.softmax(outputs, -1)
        return (probs @ self.critic.centers).view(E, B, n), probs

    def _value_and_gradient(self, obs, actions, members):
        """Sums over the members: Q (B, n) and dQ/da (B, n, A)."""
        B, n, A = actions.shape
        saved = []
        q, probs = self._forward(obs, actions, members, saved)
        if probs is None:
            gradient = self.head_weight[members].transpose(1, 2).repeat(1, B * n, 1)
        else:  # dQ/dlogit = p (center - Q)
            gradient = probs.mul_(self.critic.centers - q.view(len(q), B * n, 1))
            gradient = torch.bmm(gradient, self.head_weight[members].transpose(1, 2))
        for i in reversed(range(len(saved))):
            normalised, inverse_rms, slope = saved[i]
            gradient.mul_(slope)
            if self.critic.layer_norm:
                along = torch.linalg.vecdot(gradient, normalised)[..., None] / normalised.shape[-1]
                gradient.addcmul_(normalised, along, value=-1).mul_(inverse_rms)
            weight = self.weights[i][members] if i > 0 else self.weights[0][members, self.critic.obs_dim :]
            gradient = torch.bmm(gradient, weight.transpose(1, 2))
        return q.sum(0), gradient.sum(0).view(B, n, A)


CACHE_FLOATS = 500_000  # of one activation, per core: the best of 60, 125, 250 and 500 thousand in one scan at the AntMaze size


def orthogonal(members: int, rows: int, columns: int, gain: float) -> torch.Tensor:
    """(members, rows, columns), each member an orthogonal matrix of its own times gain."""
    return torch.stack([nn.init.orthogonal_(torch.empty(rows, columns), gain) for _ in range(members)])


# --- ACTION OPTIMIZATION ---


def global_optimization(critic, obs, actions, num_keep):
    """Equation 4.1: the num_keep candidates of highest Q, best first, Q being the ensemble's mean.

    obs (B, O), actions (B, k, A) -> actions (B, m, A), q (B, m).
    """
    with torch.no_grad():
        q, index = critic(obs, actions).mean(0).topk(num_keep, dim=1, sorted=True)
    return actions.gather(1, index[..., None].expand(-1, -1, actions.shape[-1])), q


def local_optimization(critic, obs, actions, num_steps, step_size, low, high, keep_best_of_path=False):
    """Equation 4.2 under section 4.3's rule: num_steps of gradient ascent on each action, no step that lowers Q.

    A rejected step leaves the action where it was, and as its gradient there is the same, all later ones would be
    rejected too: a step costs one forward and one backward pass and nothing is evaluated twice. With
    keep_best_of_path (release) every step is taken and the best of the num_steps + 1 points is returned, of equal ones
    the later.

    obs (B, O), actions (B, m, A) in [low, high] -> actions (B, m, A), q (B, m). Needs full float32: a step of 3e-4
    changes Q in the fourth digit, so TF32 or bfloat16 would turn the comparison into noise.
    """
    q, gradient = q_and_gradient(critic, obs, actions, need_gradient=num_steps > 0)
    best_actions, best_q = actions, q
    for step in range(num_steps):
        proposed = (actions + step_size * gradient).clamp(low, high)
        new_q, new_gradient = q_and_gradient(critic, obs, proposed, need_gradient=step < num_steps - 1)
        better = new_q >= best_q if keep_best_of_path else new_q > best_q
        best_actions = torch.where(better[..., None], proposed, best_actions)
        best_q = torch.where(better, new_q, best_q)
        if keep_best_of_path:
            actions, gradient = proposed, new_gradient
        elif step < num_steps - 1:
            actions, gradient = best_actions, torch.where(better[..., None], new_gradient, gradient)
    return best_actions, best_q


def q_and_gradient(critic, obs, actions, need_gradient=True):
    """Mean Q of the ensemble (B, n) and, if asked for, its gradient with respect to each action (B, n, A)."""
    if isinstance(critic, FrozenCritic):
        return critic.mean_and_gradient(obs, actions) if need_gradient else (critic(obs, actions).mean(0), None)
    with torch.set_grad_enabled(need_gradient):
        actions = actions.detach().requires_grad_(need_gradient)
        q = critic(obs, actions).mean(0)
        gradient = torch.autograd.grad(q.sum(), actions)[0] if need_gradient else None
    return q.detach(), gradient


def optimize_actions(
    critic, obs, actions, num_keep, num_steps, step_size, low=-1.0, high=1.0, data_actions=None, keep_best_of_path=False
):
    """Algorithm 1: rank the candidates, keep the best, climb.

    obs (B, O), actions (B, k, A) samples of the policy, data_actions (B, A) or None -> actions (B, m, A), q (B, m).
    `data_actions` is a_data(s): it takes the place of the worst kept candidate (NaN where there is none).
    """

    def rank(obs, actions):
        return global_optimization(critic, obs, actions, num_keep)

    def climb(obs, actions):
        return local_optimization(critic, obs, actions, num_steps, step_size, low, high, keep_best_of_path)

    width, critic = critic.width, FrozenCritic(critic)
    actions, _ = over_states(rank, obs, actions, floats_per_state=actions.shape[1] * width)
    if data_actions is not None:
        known = torch.where(data_actions.isnan(), actions[:, -1], data_actions)
        actions = torch.cat([actions[:, :-1], known[:, None]], 1)
    return over_states(climb, obs, actions, floats_per_state=num_keep * width)


def optimize(critic, obs, actions, args: Args, data_actions=None):
    """`optimize_actions` with the run's settings."""
    return optimize_actions(
        critic, obs, actions, args.num_keep, args.num_gradient_steps, args.gradient_step_size,
        data_actions=data_actions, keep_best_of_path=args.keep_best_of_path,
    )  # fmt: skip


def select_actions(actions, q, greedy: bool):
    """Equation 4.3: one action per state, the best or drawn with probability softmax(q). (B, m, A), (B, m) -> (B, A)."""
    index = q.argmax(1) if greedy else torch.multinomial(torch.softmax(q, 1), 1)[:, 0]
    return actions[torch.arange(len(actions), device=actions.device), index]


def over_states(function, *tensors, floats_per_state):
    """`function(*tensors)`, on a CPU over chunks of states, one core each.

    States are independent, so no core need wait for another after every operation, and a chunk's activations
    (floats_per_state for each state) stay in the caches.

    The function takes and returns tensors with states in the first dimension; it must not draw random numbers, and
    sets its own grad mode, which other threads do not inherit.
    """
    if tensors[0].device.type != "cpu":
        return function(*tensors)
    threads = torch.get_num_threads()
    states, limit = len(tensors[0]), max(1, CACHE_FLOATS // floats_per_state)
    rounds = max(1, math.ceil(states / (threads * limit)))
    chunk = max(1, math.ceil(states / (threads * rounds)))  # the same number of chunks for each thread
    parts = zip(*(tensor.split(chunk) for tensor in tensors))
    results = list(single_threaded_workers(threads).map(lambda part: function(*part), parts))
    if isinstance(results[0], tuple):
        return tuple(torch.cat(column) for column in zip(*results))
    return torch.cat(results)


def keep_freed_memory() -> None:
    """Ask glibc not to hand freed memory back: faulting it in again for the next tensor costs more than the arithmetic."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library: slower, no less right
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


@functools.cache
def single_threaded_workers(count: int) -> ThreadPoolExecutor:
    """Threads whose torch operations use one core each (the setting is the thread's own)."""
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


# --- HL-GAUSS ---


def hl_gauss_target(values, edges, release_width=False):
    """Histogram of a Gaussian around each value, on the bins between `edges`, normalised: HL-Gauss.

    Args:
        values: (...), within some 1e7 bins of the edges; outside them the mass goes to the nearest bin.
        edges: (bins + 1,).
        release_width: sigma sqrt(2) times wider. The release passes the erf form's argument to the normal CDF.
    Returns:
        probabilities (..., bins).
    """
    sigma = 0.75 * (edges[1] - edges[0]) * (math.sqrt(2) if release_width else 1.0)
    z = (edges - values[..., None]) / sigma
    left, right = z[..., :-1], z[..., 1:]
    # log(Phi(right) - Phi(left)), in the tail where both are small, so that a value far outside loses no digits
    upper_tail = left > 0
    a, b = torch.where(upper_tail, -right, left), torch.where(upper_tail, -left, right)
    log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
    return torch.softmax(log_b + torch.log1p(-torch.exp(log_a - log_b)), -1)


# --- RLPD ---

LOSSES = ("critic_loss", "q_data", "target_q", "q_optimized", "q_std")  # the metrics of `critic_update`


@torch.no_grad()
def td_target(target_critic, rewards, masks, next_obs, next_actions, discount, members=None):
    """r + gamma mask min over the members of Q_target(s', a'): (B,). next_actions (B, A); members: indices or None."""
    q = target_critic(next_obs, next_actions[:, None], members)[..., 0]  # (members, B)
    return rewards + discount * masks * q.min(0).values


def rlpd_loss(critic, obs, actions, target_q, release_width=False):
    """TD loss of all members on the batch's actions; nothing is pushed down.

    obs (B, O), actions (B, A), target_q (B,) -> the loss (scalar) and its parts as a dict of scalar tensors, detached.
    """
    outputs = critic.outputs(obs, actions[:, None])[:, :, 0]  # (E, B, bins)
    q_data = critic.value(outputs)  # (E, B)
    if critic.num_bins == 1:
        loss = (q_data - target_q).square().mean()
    else:
        target = hl_gauss_target(target_q, critic.edges, release_width)
        loss = -(target * torch.log_softmax(outputs, -1)).sum(-1).mean()
    info = {"critic_loss": loss, "q_data": q_data.mean(), "target_q": target_q.mean()}
    return loss, {name: part.detach() for name, part in info.items()}


def critic_update(critic, target_critic, optimizer, buffer, candidates, index, args: Args) -> dict[str, torch.Tensor]:
    """Algorithm 2, line 4 with RLPD: one update on the transitions `index` (B,), their candidates taken from the cache."""
    batch = buffer.batch(index)
    obs, next_obs = buffer.states[batch["obs_index"]], buffer.states[batch["next_index"]]
    data_actions = buffer.action_at[batch["next_index"]] if args.use_data_actions else None  # the one that came next
    optimized, q = optimize(critic, next_obs, candidates[batch["next_index"]], args, data_actions)
    next_actions = select_actions(optimized, q, greedy=True)
    members = torch.randperm(args.ensemble_size, device=obs.device)[: args.target_subset]
    target_q = td_target(target_critic, batch["rewards"], batch["masks"], next_obs, next_actions, args.discount, members)
    loss, info = rlpd_loss(critic, obs, batch["actions"], target_q, args.hl_gauss_release_width)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    ema_update(target_critic, critic, args.target_tau)
    info["q_optimized"] = q.max(1).values.mean()
    if args.num_keep > 1:
        info["q_std"] = q.std(1).mean()  # what appendix B.1 decides between argmax and samples by
    return info


# --- DATA ---


def trajectory_ends(dataset) -> np.ndarray:
    """Index after the last row of each trajectory, in order; the dataset's end closes the last one."""
    ends = np.flatnonzero(dataset.terminals | dataset.timeouts) + 1
    return ends if len(ends) and ends[-1] == len(dataset) else np.append(ends, len(dataset))


def monte_carlo_returns(rewards, ends, discount, reward_min, sparse):
    """Discounted return-to-go of every row, the V^mu(s) that calibrates Cal-QL.

    Args:
        rewards: (N,) biased rewards; ends: index after the last row of each trajectory.
        sparse: a trajectory that never rose above reward_min never succeeds: reward_min / (1 - discount) everywhere,
            not the sum up to where it happened to be cut.
    """
    returns, start = np.zeros(len(rewards), np.float64), 0
    for end in ends:
        if sparse and rewards[start:end].max() <= reward_min:
            returns[start:end] = reward_min / (1 - discount)
        else:
            running = 0.0
            for i in range(end - 1, start - 1, -1):
                running = rewards[i] + discount * running
                returns[i] = running
        start = end
    return returns.astype(np.float32)


def check_dataset(dataset, env: gym.Env, args: Args) -> None:
    """Refuse a dataset that does not belong to this environment or holds values no network can be trained on."""
    space = env.action_space
    if not (isinstance(env.observation_space, gym.spaces.Box) and len(env.observation_space.shape) == 1):
        fail(f"the observation space is {env.observation_space}; this script takes a vector (a one-dimensional Box)")
    N, O, A = len(dataset.rewards), *env.observation_space.shape, *space.shape  # noqa: E741
    if N == 0:
        fail("the dataset is empty")
    shapes = {"observations": (N, O), "next_observations": (N, O), "actions": (N, A), "rewards": (N,)}
    for name, shape in shapes.items():
        array = getattr(dataset, name)
        if array.shape != shape:
            fail(f"the dataset's {name} have shape {array.shape}; this environment needs {shape} ({dataset.source})")
        if not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array.reshape(N, -1)).all(1))[0])
            fail(f"the dataset's {name} hold NaN or infinity, first in row {row} ({dataset.source})")
    low, high = dataset.rewards.min() + args.reward_bias, dataset.rewards.max() + args.reward_bias
    if args.reward_min == 0:
        fail(f"all rewards of the dataset are {low - args.reward_bias:.4g}; set --reward-min ({dataset.source})")
    if low < args.reward_min - 1e-3 or high > 1e-3:
        fail(f"the dataset's rewards plus --reward-bias span [{low:.4g}, {high:.4g}], beyond [--reward-min, 0] = "
             f"[{args.reward_min:.4g}, 0]; set the two flags to fit ({dataset.source})")  # fmt: skip
    slack = 1e-3 * (space.high - space.low)
    if (dataset.actions < space.low - slack).any() or (dataset.actions > space.high + slack).any():
        low, high = dataset.actions.min(), dataset.actions.max()
        fail(f"the dataset's actions span [{low:.3g}, {high:.3g}], beyond the action space [{space.low.min():.3g}, "
             f"{space.high.max():.3g}] ({dataset.source})")  # fmt: skip


class ReplayBuffer:
    """Offline transitions, then online ones, as tensors on the device.

    A state that ends one transition and begins the next is kept once, in `states`; transitions name states by index,
    and so does the cache of candidates.
    """

    FIELDS = ("states", "action_at", "obs_index", "next_index", "actions", "rewards", "masks", "mc_returns")

    def __init__(self, dataset, actions, args: Args, device):
        """dataset: checked arrays; actions: its actions in [-1, 1]."""
        rewards = dataset.rewards + args.reward_bias
        ends = trajectory_ends(dataset)
        returns = monte_carlo_returns(rewards, ends, args.discount, args.reward_min, args.sparse_reward)
        # next_obs of a row is obs of the following one, except where a trajectory ends or the arrays say otherwise
        last = np.ones(len(rewards), bool)
        last[:-1] = (dataset.next_observations[:-1] != dataset.observations[1:]).any(1)
        last[ends - 1] = True
        obs_index = np.arange(len(rewards)) + np.concatenate([[0], np.cumsum(last)[:-1]])
        states = np.zeros((len(rewards) + last.sum(), dataset.observations.shape[1]), np.float32)
        states[obs_index] = dataset.observations
        states[obs_index + 1] = dataset.next_observations
        action_at = np.full((len(states), actions.shape[1]), np.nan, np.float32)  # NaN: a trajectory's last state
        action_at[obs_index] = actions
        self.states, self.action_at = (torch.as_tensor(x, device=device) for x in (states, action_at))
        self.obs_index = torch.as_tensor(obs_index, device=device)
        self.next_index = self.obs_index + 1
        self.actions, self.rewards, self.masks, self.mc_returns = (
            torch.as_tensor(x, dtype=torch.float32, device=device) for x in (actions, rewards, ~dataset.terminals, returns)
        )
        self.num_offline, self.num_offline_states, self.mixing_ratio = len(rewards), len(states), args.mixing_ratio
        self.fingerprint = [len(rewards), float(states.sum(dtype=np.float64)), float(actions.sum(dtype=np.float64))]

    def __len__(self):
        return len(self.rewards)

    def append(self, fields: dict[str, torch.Tensor]) -> None:
        """Add online rows; their obs_index and next_index already point behind the present states."""
        for name in self.FIELDS:
            setattr(self, name, torch.cat([getattr(self, name), fields[name].to(self.states.device)]))

    def add_episode(self, episode, args: Args) -> None:
        """Add one online episode: observations (n + 1, O), actions (n, A), rewards (n,) unbiased, terminated."""
        n, first = len(episode["rewards"]), len(self.states)
        rewards = episode["rewards"] + np.float32(args.reward_bias)
        sparse = args.sparse_reward and not args.online_plain_returns
        returns = monte_carlo_returns(rewards, [n], args.discount, args.reward_min, sparse)
        masks = np.ones(n, np.float32)
        masks[-1] = 1.0 - episode["terminated"]
        no_action = np.full((1, episode["actions"].shape[1]), np.nan, np.float32)
        index = torch.arange(first, first + n)
        self.append({
            "states": torch.as_tensor(episode["observations"]),
            "action_at": torch.as_tensor(np.concatenate([episode["actions"], no_action])),
            "obs_index": index, "next_index": index + 1, "actions": torch.as_tensor(episode["actions"]),
            "rewards": torch.as_tensor(rewards), "masks": torch.as_tensor(masks), "mc_returns": torch.as_tensor(returns),
        })  # fmt: skip

    def sample_index(self, shape: tuple[int, int]) -> torch.Tensor:
        """Row indices (updates, batch): once there is online data, mixing_ratio of each batch is offline."""
        device = self.states.device
        if len(self) == self.num_offline:
            return torch.randint(self.num_offline, shape, device=device)
        num_offline = round(self.mixing_ratio * shape[1])
        offline = torch.randint(self.num_offline, (shape[0], num_offline), device=device)
        online = torch.randint(self.num_offline, len(self), (shape[0], shape[1] - num_offline), device=device)
        return torch.cat([offline, online], 1)

    def batch(self, index) -> dict[str, torch.Tensor]:
        """The rows `index`, without the states themselves."""
        return {name: getattr(self, name)[index] for name in self.FIELDS[2:]}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The online part; the offline part is rebuilt from the dataset."""
        first = {"states": self.num_offline_states, "action_at": self.num_offline_states}
        return {name: getattr(self, name)[first.get(name, self.num_offline) :].clone() for name in self.FIELDS}


def refresh_candidates(policy, buffer, candidates, states, num_samples):
    """Appendix E's cache: draw anew the candidates of the states given (index (S,)), and make room for new states.

    The policy is frozen while the critic trains on a batch of updates, so its candidates at each distinct state are
    drawn once. After the policy changed, only the states that the coming updates will look at are redrawn: nothing
    stale is ever used, and nothing is drawn that is not used.

    candidates (<= total states, k, A) -> (total states, k, A); rows of states never refreshed hold zeros.
    """
    missing = len(buffer.states) - len(candidates)
    if missing:
        candidates = torch.cat([candidates, candidates.new_zeros(missing, *candidates.shape[1:])])
    for index in states.split(4096):
        obs = buffer.states[index]
        noise = policy.draw_noise(obs, num_samples)
        sample = lambda obs, noise: policy.sample(obs, num_samples, noise)  # noqa: E731
        candidates[index] = over_states(sample, obs, noise, floats_per_state=num_samples * policy.width)
    return candidates


# --- DISTILLATION ---


def distill(policy, ema_policy, optimizer, critic, buffer, candidates, num_updates, greedy, args: Args, sampler=None):
    """Section 4.2: annotate states of the buffer with optimized actions (equation 4.4), then clone those.

    The critic does not change meanwhile, so all annotations of the round are made first, from candidates drawn now (by
    `sampler`, the policy that is sampled if None). Returns the cache, the targets (num_updates, B, A) and, as metrics, the
    policy's mean loss, and of the annotations the mean Q and its standard deviation over the candidates of a state.
    """
    states = buffer.obs_index[buffer.sample_index((num_updates, args.batch_size)).flatten()]
    candidates = refresh_candidates(sampler or ema_policy, buffer, candidates, states.unique(), args.num_samples)
    targets, values, stds = [], [], []
    for part in states.split(4096):
        data_actions = buffer.action_at[part] if args.use_data_actions else None
        actions, q = optimize(critic, buffer.states[part], candidates[part], args, data_actions)
        targets.append(select_actions(actions, q, greedy))
        values.append(q.max(1).values)
        stds.append(q.std(1, correction=0))
    obs = buffer.states[states].view(num_updates, args.batch_size, -1)
    targets = torch.cat(targets).view(num_updates, args.batch_size, -1)
    losses = [policy_update(policy, ema_policy, optimizer, o, a, args.policy_ema) for o, a in zip(obs, targets)]
    names = ("distill_loss", "distill_q", "distill_q_std")
    metrics = dict(zip(names, (torch.stack(losses).mean(), torch.cat(values).mean(), torch.cat(stds).mean())))
    return candidates, targets, metrics


def choose_greedy_distillation(args: Args, progress: dict) -> bool:
    """Appendix B.1: teach the argmax where the candidates' Q differ too little for samples of eq. 4.3 to prefer any.

    The paper gives no threshold. Equation 4.3's softmax has temperature 1, so that candidates whose Q differ by less
    than about 1 are nearly equally likely: below a standard deviation of 1 samples would hardly improve the policy.
    """
    if args.distill_selection != "auto" or progress["q_std_count"] == 0:  # 0: no offline phase to measure it in
        return args.distill_selection == "greedy" or (args.distill_selection == "auto" and args.greedy_rollouts)
    return progress["q_std_sum"] / progress["q_std_count"] < args.greedy_below_std


# --- ACTING AND EVALUATING ---

EVAL_SEED = 1_000_000_000  # the starts of evaluation episodes, the same in all runs; no training episode uses them


class ActionScale:
    """Between the environment's box and the [-1, 1] in which policy and critic work."""

    def __init__(self, space):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            fail(f"the action space is {space}; PA-RL needs a vector of continuous actions (a one-dimensional Box)")
        if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
            fail(f"the action space {space} is unbounded; wrap the environment to bound it")
        self.low, self.high = space.low.astype(np.float32), space.high.astype(np.float32)

    def to_unit(self, actions):
        return np.clip(2 * (actions - self.low) / (self.high - self.low) - 1, -1, 1).astype(np.float32)

    def to_env(self, actions):
        return self.low + (actions + 1) / 2 * (self.high - self.low)


def collect_episode(env, act, scale: ActionScale, seed: int, device) -> dict:
    """One episode of `act` (obs (1, O) -> (1, A)). Algorithm 2, lines 6-8."""
    obs, info = env.reset(seed=seed)
    observations, actions, rewards, done, success = [obs], [], [], False, False
    while not done:
        action = act(torch.as_tensor(obs, dtype=torch.float32, device=device)[None])[0].cpu().numpy()
        obs, reward, terminated, truncated, info = env.step(scale.to_env(action))
        observations.append(obs)
        actions.append(action)
        rewards.append(reward)
        success = success or bool(info.get("success", False))
        done = terminated or truncated
    return {
        "observations": np.array(observations, np.float32), "actions": np.array(actions, np.float32),
        "rewards": np.array(rewards, np.float32), "terminated": float(terminated), "success": success,
    }  # fmt: skip


def evaluate(envs, act, scale: ActionScale, args: Args, device) -> dict:
    """Run `act` for args.eval_episodes episodes, as many at a time as there are environments, always from the same starts.

    Returns success_rate in [0, 1], score (100 x success, or 25 x sub-tasks completed where the environment counts them),
    return (rewards with the bias, undiscounted), length (decisions), and the trajectories as a list of (steps + 1, O).
    """
    n, total = envs.num_envs, args.eval_episodes
    success, scores, returns, lengths = np.zeros(total, bool), np.zeros(total), np.zeros(total), np.zeros(total, int)
    actions, trajectories = np.zeros(envs.action_space.shape, np.float32), []
    for first in range(0, total, n):
        obs, _ = envs.reset(seed=[EVAL_SEED + first + i for i in range(n)])
        episodes, active = first + np.arange(n), first + np.arange(n) < total
        observations = [obs]
        while active.any():
            rows = np.flatnonzero(active)
            actions[rows] = scale.to_env(act(torch.as_tensor(obs[rows], dtype=torch.float32, device=device)).cpu().numpy())
            obs, reward, terminated, truncated, info = envs.step(actions)
            observations.append(obs)
            now = episodes[rows]
            success[now] |= np.asarray(info.get("success", np.zeros(n)), bool)[rows]
            score = 25 * np.asarray(info["completed"])[rows] if "completed" in info else 100 * success[now]
            scores[now] = np.maximum(scores[now], score)
            returns[now] += reward[rows] + args.reward_bias
            lengths[now] += 1
            active &= ~(terminated | truncated)  # an environment that ended restarts by itself; that episode is ignored
        stacked = np.stack(observations)  # (time, n, O)
        trajectories += [stacked[: lengths[episode] + 1, i] for i, episode in enumerate(episodes) if episode < total]
    return {
        "success_rate": float(success.mean()), "score": float(scores.mean()), "return": float(returns.mean()),
        "length": float(lengths.mean()), "trajectories": trajectories,
    }  # fmt: skip


def make_vector_env(args: Args) -> gym.vector.VectorEnv:
    """The environments of an evaluation: one for each episode in this process, or two processes for each core."""

    def make_one():
        if multiprocessing.parent_process() is not None:  # Ctrl-C is for the run, which ends its processes itself
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return make_env(args.env_id)

    if not args.eval_processes:
        return gym.vector.SyncVectorEnv([make_one] * args.eval_episodes)
    # forked before anything big is loaded; where there is no fork, started anew
    context = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    return gym.vector.AsyncVectorEnv([make_one] * min(args.eval_episodes, 2 * available_cores()), context=context)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def film(env_id: str, act, scale: ActionScale, path: pathlib.Path, device, episodes: int = 3) -> None:
    """An mp4 of a few evaluation episodes. OpenCV and off-screen OpenGL were found at the start."""
    import cv2

    env, writer = make_env(env_id, render_mode="rgb_array"), None
    for episode in range(episodes):
        obs, done = env.reset(seed=EVAL_SEED + episode)[0], False
        while not done:
            frame = env.render()
            if writer is None:
                fps = min(30, env.metadata.get("render_fps", 10))
                writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, frame.shape[1::-1])
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
            action = act(torch.as_tensor(obs, dtype=torch.float32, device=device)[None])[0].cpu().numpy()
            obs, _, terminated, truncated, _ = env.step(scale.to_env(action))
            done = terminated or truncated
    writer.release()
    env.close()


def check_optional_parts(args: Args) -> None:
    """--track and --capture-video need packages that are not installed by default: say so now, not after hours."""
    if args.track:
        try:
            import wandb  # noqa: F401
        except ImportError:
            fail("--track needs Weights & Biases: pip install wandb")
    if args.capture_video:
        try:
            import cv2  # noqa: F401
        except ImportError:
            fail("--capture-video needs OpenCV: pip install opencv-python-headless")
        try:
            env = make_env(args.env_id, render_mode="rgb_array")
            env.reset()
            env.render()
            env.close()
        except Exception as error:  # whatever the GL stack raises
            fail(f"--capture-video cannot render off screen ({error}); set MUJOCO_GL=egl, or osmesa with libosmesa6 installed")


# --- RUN: METRICS, CHECKPOINTS, STOPPING ---

PHASES = ("cloning", "offline", "online", "done")
COLUMNS = (
    "phase", "step", "updates", "episodes", "env_steps", "seconds", "success_rate", "score", "return", "length",
    *POLICY_METRICS, *LOSSES, "episode_success", "episode_length", "distill_loss", "distill_q", "distill_q_std",
    "updates_per_second",
)  # fmt: skip


class Stopped(Exception):
    """SIGINT or SIGTERM asked the run to end."""


class Run:
    """A run's folder: config.json, metrics.csv, TensorBoard events, checkpoint.pt; and how far the run has come."""

    def __init__(self, args: Args, modules: dict, buffer: ReplayBuffer, dataset):
        """modules: name -> network or optimizer, saved with every checkpoint and loaded here if args.resume is set."""
        self.args, self.modules, self.buffer, self.stop_signal = args, modules, buffer, None
        self.progress = dict.fromkeys(("step", "updates", "episodes", "env_steps", "csv_bytes", "q_std_count"), 0)
        self.progress |= {"phase": "cloning", "seconds": 0.0, "q_std_sum": 0.0, "greedy_distillation": False}
        self.results, self.curve, self.local = {}, [], dataset.local
        if args.resume:
            self.folder = pathlib.Path(args.resume)
            self._load()
        else:
            script = pathlib.Path(__file__).stem
            task = args.env_id + ("-local" if dataset.local else "")  # not the published data: say so in the name
            name = f"{task}__{script}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
            self.folder = pathlib.Path(args.runs) / name
            self._check_space()
            data = {name: getattr(dataset, name) for name in ("source", "sha256", "local")} | {"transitions": len(dataset)}
            config = {"script": script, "provenance": provenance(), "data": data} | dataclasses.asdict(args)
            write_atomically(self.folder / "config.json", lambda file: file.write(json.dumps(config, indent=2).encode()))
        self.started = time.monotonic() - self.progress["seconds"]
        self.saved_at, self.logged = time.monotonic(), (time.monotonic(), self.progress["updates"])
        self._open_logs()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def at(self, phase: str) -> bool:
        return self.progress["phase"] == phase

    def steps(self, total: int, unit: str = "update"):
        """The numbers of the phase's steps that are still to do. Between two of them, saves and stops when it is time."""
        first = self.progress["step"]
        with tqdm(total=total, initial=first, desc=self.progress["phase"], unit=unit, mininterval=0.5) as bar:
            for step in range(first, total):
                yield step
                self.progress["step"] = step + 1
                bar.update()
                if self.stop_signal or time.monotonic() - self.saved_at > self.args.checkpoint_seconds:
                    self.save()
                self.check_stop()

    def next_phase(self) -> None:
        self.progress |= {"phase": PHASES[PHASES.index(self.progress["phase"]) + 1], "step": 0}
        self.logged = (time.monotonic(), self.progress["updates"])
        self.save()
        self.check_stop()

    def check_stop(self) -> None:
        if self.stop_signal:
            raise Stopped

    def _on_signal(self, number, frame):
        if self.stop_signal:  # asked twice: at once
            raise Stopped
        self.stop_signal = signal.Signals(number)

    def log(self, metrics: dict) -> None:
        """A row of metrics.csv and its TensorBoard scalars, of numbers or scalar tensors; stops at impossible values."""
        metrics = {name: float(value) for name, value in metrics.items()}
        self._check_values(metrics)
        now, updates = time.monotonic(), self.progress["updates"]
        self.progress["seconds"] = now - self.started
        if updates > self.logged[1]:
            metrics["updates_per_second"] = (updates - self.logged[1]) / (now - self.logged[0])
        self.logged = (now, updates)
        row = {name: self.progress[name] for name in COLUMNS[:6]} | {"seconds": round(self.progress["seconds"], 2)}
        self.rows.writerow(row | {name: f"{value:.6g}" for name, value in metrics.items()})
        self.csv.flush()
        self.progress["csv_bytes"] = self.csv.tell()
        for name, value in metrics.items():
            charts = name in ("success_rate", "score", "return", "length", "episode_success", "episode_length")
            group = "time" if name == "updates_per_second" else "charts" if charts else "losses"
            self.writer.add_scalar(f"{group}/{name}", value, updates)

    def _check_values(self, metrics):
        where = f"at {self.progress['phase']} step {self.progress['step'] + 1}"
        kept = f"the last good checkpoint is kept in {self.folder}"
        q_min = self.args.reward_min / (1 - self.args.discount)
        for name, value in metrics.items():
            if not math.isfinite(value):
                fail(f"{name} became {value} {where}; {kept}")
            # a tenth of the range is allowed for: regression overshoots a little without diverging
            if name in ("q_data", "q_random", "q_optimized", "target_q") and not 1.1 * q_min <= value <= -0.1 * q_min:
                fail(f"{name} is {value:.4g} {where}, outside its possible range [{q_min:.4g}, 0]; {kept}")

    def record(self, label: str, result: dict, final: bool = False) -> None:
        """An evaluation: a line on the screen, a row of metrics, a point of the learning curve; `final` for the table."""
        scores = {name: result[name] for name in ("success_rate", "score", "return", "length")}
        self.log(scores)
        self.curve.append([self.progress["phase"], self.progress["updates"], result["score"]])
        if final:
            paths = [torch.tensor(path[:, :2]) for path in result["trajectories"][:24]]
            self.results[label] = scores | {"seconds": self.progress["seconds"], "trajectories": paths}
        tqdm.write("{:>18}: success {:6.1%}   score {:5.1f}   return {:8.2f}   length {:6.1f}   after {:.0f} s".format(
            label, *scores.values(), self.progress["seconds"]))  # fmt: skip

    def save(self) -> None:
        """Write all that a resumed run needs into one file, which replaces the last one only when it is whole."""
        for name, module in self.modules.items():
            if isinstance(module, nn.Module) and not all(p.isfinite().all() for p in module.parameters()):
                self._check_values({f"a weight of the {name}": math.nan})
        self.progress["seconds"] = time.monotonic() - self.started
        state = {
            "progress": self.progress, "results": self.results, "curve": self.curve, "buffer": self.buffer.state_dict(),
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "data": self.buffer.fingerprint, "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all(),
        }  # fmt: skip
        write_atomically(self.folder / "checkpoint.pt", lambda file: torch.save(state, file))
        self.saved_at = time.monotonic()

    def _load(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            fail(f"{self.folder} holds no checkpoint yet; start the run anew")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for name, module in self.modules.items():
                module.load_state_dict(state["modules"][name])
            same_data = state["data"] == self.buffer.fingerprint
            self.buffer.append(state["buffer"])
        except Exception as error:  # a damaged file can raise almost anything
            fail(f"{path} cannot be read or does not fit this run ({str(error).splitlines()[0]})")
        if not same_data:
            fail(f"{self.folder} was trained on another dataset than the one found now; restore that, or start a new run")
        self.progress, self.results, self.curve = state["progress"], state["results"], state["curve"]
        torch.set_rng_state(state["rng"])
        if len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_rng"])

    def _check_space(self):
        """Room for two checkpoints (weights and two moments each; the old one stands until the new one is whole)."""
        weights = sum(p.nbytes for m in self.modules.values() if isinstance(m, nn.Module) for p in m.parameters())
        needed = (2 * 3 * weights + 100 * 2**20) / 2**20
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free / 2**20
        except OSError as error:
            fail(f"cannot make the folder {self.folder} ({error.strerror}); name another with --runs")
        if free < needed:
            fail(f"{self.folder} has {free:.0f} MB free and the run needs {needed:.0f} MB; name another folder with --runs")

    def _open_logs(self):
        from torch.utils.tensorboard import SummaryWriter  # takes a second that bad input need not wait for

        if self.args.track:
            import wandb

            wandb.init(project=self.args.wandb_project, name=self.folder.name, id=self.folder.name, resume="allow",
                       sync_tensorboard=True, config=dataclasses.asdict(self.args))  # fmt: skip
        path = self.folder / "metrics.csv"
        path.touch()
        os.truncate(path, self.progress["csv_bytes"])  # what came after the checkpoint will come again
        self.csv = open(path, "a", newline="")
        self.rows = csv.DictWriter(self.csv, COLUMNS)
        if self.progress["csv_bytes"] == 0:
            self.rows.writeheader()
        self.writer = SummaryWriter(self.folder, purge_step=self.progress["updates"] + 1 if self.args.resume else None)

    def close(self) -> None:
        self.csv.close()
        self.writer.close()


def provenance() -> dict[str, str]:
    """What a result must carry to be repeated: the command, the commit, the machine, the versions."""
    commit = "unknown"
    if shutil.which("git"):
        git = ["git", "describe", "--always", "--abbrev=12", "--dirty"]
        commit = subprocess.run(git, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True).stdout.strip() or commit
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "command": " ".join(["python", *sys.argv]), "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {gpu}, {platform.system()}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, gymnasium {gym.__version__}",
    }  # fmt: skip


def write_atomically(path: pathlib.Path, write) -> None:
    """`write(file)`, so that `path` holds either what it held before or all of the new content."""
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        fail(f"cannot write {path} ({str(error).splitlines()[0]}); free some space, then --resume {path.parent}")
    finally:
        temporary.unlink(missing_ok=True)


# --- SUMMARY ---


def print_table(results: dict, folder: pathlib.Path) -> None:
    """What the policies reached, and where everything is."""
    print(f"\n{'':18}{'success rate':>14}{'score':>8}{'return':>10}{'length':>10}{'time':>8}")
    for label, r in results.items():
        row = f"{label:18}{r['success_rate']:14.1%}{r['score']:8.1f}{r['return']:10.2f}{r['length']:10.1f}"
        print(f"{row}{r['seconds']:6.0f} s")
    print(f"\nall of it: {folder}/ with summary.png, metrics.csv, config.json, checkpoint.pt and TensorBoard's events")


def draw_summary(run: Run, env, policy, critic, args: Args) -> None:
    """summary.png: the learning curve and, for a maze, the policies' paths from above over the critic's value."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    env.reset(seed=EVAL_SEED)  # so that there is a goal to draw
    maze = getattr(env.unwrapped, "maze", None)
    panels = list(run.results.items()) if maze is not None else []
    size = (4.6 + 3.6 * len(panels), 4.0)
    figure, axes = plt.subplots(1, 1 + len(panels), figsize=size, layout="constrained", squeeze=False)
    ax, *maze_axes = axes[0]
    ax.plot([updates for _, updates, _ in run.curve], [score for *_, score in run.curve], color="0.8", zorder=1)
    for phase, color in {"cloning": "tab:gray", "offline": "tab:blue", "online": "tab:red"}.items():
        points = [(updates, score) for p, updates, score in run.curve if p == phase]
        if points:
            ax.plot(*zip(*points), "o-", color=color, label=phase)
    label = "success rate, %" if task_family(args.env_id) != "kitchen" else "score: 25 x sub-tasks"
    ax.set(xlabel="updates of policy and critic", ylabel=label, ylim=(-3, 103))
    task = args.env_id + (" (local data)" if run.local else "")
    ax.set_title(f"{task}, seed {args.seed}\n{args.eval_episodes} episodes a point", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(loc="center right")
    x, y, values = value_map(run.buffer, policy, critic, args) if panels else (None, None, None)
    for ax, (label, result) in zip(maze_axes, panels):
        mesh = ax.scatter(x, y, c=values, s=7, cmap="viridis", linewidths=0)
        draw_maze(ax, env.unwrapped, maze)
        for path in result["trajectories"]:
            ax.plot(*path.numpy().T, color="white", lw=2.0, alpha=0.5)
            ax.plot(*path.numpy().T, color="tab:red", lw=0.8)
        ax.set_title(f"{label}: {result['success_rate']:.0%}", fontsize=11)
    if panels:
        figure.colorbar(mesh, ax=maze_axes, label="final critic: value of the best candidate", shrink=0.85)
    write_atomically(run.folder / "summary.png", lambda file: figure.savefig(file, dpi=110, format="png"))
    plt.close(figure)


def value_map(buffer, policy, critic, args: Args, count: int = 4000):
    """x, y of states spread over the buffer, and Q of the best of the policy's samples at each."""
    index = torch.linspace(0, len(buffer.states) - 1, min(count, len(buffer.states))).long()
    states = buffer.states[index.to(buffer.states.device)]
    q = optimize_actions(critic, states, policy.sample(states, args.num_samples), 1, 0, 0.0)[1][:, 0]
    return *states[:, :2].T.cpu().numpy(), q.cpu().numpy()


def draw_maze(ax, env, maze) -> None:
    """Walls, start and goal of a gymnasium-robotics maze, on axes without ticks."""
    from matplotlib.patches import Circle, Rectangle

    half = maze.maze_size_scaling / 2
    for row, column in np.argwhere(np.array(maze.maze_map, object) == 1):
        x, y = maze.cell_rowcol_to_xy(np.array([row, column]))
        ax.add_patch(Rectangle((x - half, y - half), 2 * half, 2 * half, color="0.25"))
    ax.add_patch(Circle(env.goal[:2], 0.9 * half, fill=False, color="black", lw=2))
    ax.set(aspect="equal", xticks=[], yticks=[])
    ax.autoscale_view()


# --- MAIN ---


def eval_steps(total: int, count: int) -> set[int]:
    """`count` evaluations spread evenly over `total` steps, without the last one, which the phase's end makes."""
    return set(np.linspace(0, total, count + 1, dtype=int)[1:-1].tolist())


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_args(args)
    torch.set_num_threads(args.threads or available_cores())
    keep_freed_memory()
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    torch.manual_seed(args.seed)
    try:
        env = make_env(args.env_id)
        scale = ActionScale(env.action_space)
        check_optional_parts(args)
        envs = make_vector_env(args)
        size, path = args.dataset_size or None, args.dataset_path or None
        dataset = load_dataset(args.env_id, path, size, source=args.dataset_source)
    except ValueError as error:
        fail(str(error))
    if dataset.local:
        args.dataset_source = "local"  # in the config, and when the run is resumed where there is a network again
    if args.reward_min == 0 and len(dataset):
        args.reward_min = min(0.0, float(dataset.rewards.min()) + args.reward_bias)
    check_dataset(dataset, env, args)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    buffer = ReplayBuffer(dataset, scale.to_unit(dataset.actions), args, device)

    policy = DiffusionPolicy(
        obs_dim, action_dim, args.diffusion_steps, args.policy_hidden, args.policy_blocks, dropout=args.policy_dropout
    ).to(device)
    ema_policy = copy.deepcopy(policy).requires_grad_(False).eval()  # the one that is sampled
    num_bins, q_min = args.num_bins if args.critic_loss == "hl_gauss" else 1, args.reward_min / (1 - args.discount)
    critic = Critic(obs_dim, action_dim, args.critic_hidden, args.ensemble_size, num_bins, q_min).to(device)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    policy_optimizer = torch.optim.Adam(policy.parameters(), args.policy_lr, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True)
    modules = {
        "policy": policy, "ema_policy": ema_policy, "critic": critic, "target_critic": target_critic,
        "policy_optimizer": policy_optimizer, "critic_optimizer": critic_optimizer,
    }  # fmt: skip
    run = Run(args, modules, buffer, dataset)
    progress = run.progress
    print(f"{args.env_id}: {len(dataset)} transitions in {len(trajectory_ends(dataset))} trajectories ({dataset.source})")
    print(f"preset {args.preset} on {device}, {torch.get_num_threads()} threads; everything goes to {run.folder}/")

    def act_cloned(obs):
        return ema_policy.sample(obs, 1)[:, 0]

    def act_optimized(obs):  # pi^opt of algorithm 1
        actions, q = optimize(critic, obs, ema_policy.sample(obs, args.num_samples), args)
        return select_actions(actions, q, args.greedy_rollouts)

    candidates = torch.zeros(0, args.num_samples, action_dim, device=device)
    try:
        # Phase 1: clone the data (algorithm 2, line 1)
        if run.at("cloning"):
            for step in run.steps(args.num_cloning_steps):
                policy_optimizer.param_groups[0]["lr"] = cloning_lr(step, args)
                rows = torch.randint(len(buffer), (args.cloning_batch_size,), device=device)
                obs, actions = buffer.states[buffer.obs_index[rows]], buffer.actions[rows]
                loss = policy_update(policy, ema_policy, policy_optimizer, obs, actions, args.policy_ema)
                progress["updates"] += 1
                if (step + 1) % args.log_every == 0:
                    run.log({"policy_loss": loss})
            run.record("cloned policy", evaluate(envs, act_cloned, scale, args, device), final=True)
            run.next_phase()

        # Phase 2: episodes of the cloned policy, so that every batch can be half online (appendix B.2)
        if run.at("offline"):
            for number in run.steps(args.num_warmup_episodes, unit="episode"):
                episode = collect_episode(env, act_cloned, scale, args.seed * 100_003 + 50_000 + number, device)
                buffer.add_episode(episode, args)
                progress["episodes"] += 1
                progress["env_steps"] += len(episode["rewards"])
                run.log({"episode_success": episode["success"], "episode_length": len(episode["rewards"])})
            policy_optimizer.state.clear()  # distilling starts with fresh moments, at a constant rate
            policy_optimizer.param_groups[0]["lr"] = args.distill_lr
            run.next_phase()

        # Phase 3: an episode, critic training, distilling (algorithm 2, lines 3 to 8); a step is one episode
        if run.at("online"):
            evals = eval_steps(args.num_online_episodes, args.num_online_evals)
            for number in run.steps(args.num_online_episodes, unit="episode"):
                episode = collect_episode(env, act_optimized, scale, args.seed * 100_003 + number, device)
                buffer.add_episode(episode, args)
                length = len(episode["rewards"])
                metrics = {"episode_success": episode["success"], "episode_length": length}
                num_distill, num_critic = round(length * args.distill_ratio), round(length * args.utd)
                # All updates of the round are one loop: indices and candidates are drawn before it, nothing is read back
                index = buffer.sample_index((num_critic, args.batch_size))
                states = buffer.next_index[index].unique()
                candidates = refresh_candidates(ema_policy, buffer, candidates, states, args.num_samples)
                for rows in index:
                    run.check_stop()
                    metrics |= critic_update(critic, target_critic, critic_optimizer, buffer, candidates, rows, args)
                if "q_std" in metrics:
                    progress["q_std_sum"] += metrics["q_std"].item()
                    progress["q_std_count"] += 1
                if num_distill:
                    candidates, _, info = distill(
                        policy, ema_policy, policy_optimizer, critic, buffer, candidates, num_distill,
                        choose_greedy_distillation(args, progress), args,
                    )  # fmt: skip
                    metrics |= info
                progress["episodes"] += 1
                progress["env_steps"] += length
                progress["updates"] += num_distill + num_critic
                run.log(metrics)
                if number + 1 in evals:
                    run.record("online RL", evaluate(envs, act_optimized, scale, args, device))
            if args.num_online_episodes:
                run.record("after online RL", evaluate(envs, act_optimized, scale, args, device), final=True)
            run.next_phase()
    except Stopped:
        run.close()
        print(f"\nstopped by {run.stop_signal.name}; to continue: python {sys.argv[0]} --resume {run.folder}")
        raise SystemExit(128 + run.stop_signal) from None

    envs.close()
    draw_summary(run, env, ema_policy, critic, args)
    if args.capture_video:
        film(args.env_id, act_optimized, scale, run.folder / "video.mp4", device)
    run.close()
    print_table(run.results, run.folder)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped before the run began")
