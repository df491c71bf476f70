"""PA-RL + Cal-QL for OpenVLA, a 7B vision-language-action model, on a WidowX arm: section 5.2.2 of arXiv 2412.06685.

A generalist policy that was never trained for the task tries it some fifty times. A small critic is trained on those
episodes and on candidate actions that the big policy was asked for once and that were kept. From then on the robot does
what the critic likes best among the policy's samples, improved by gradient steps on the action; what it likes is taught
to the policy by supervised learning through LoRA adapters; and the candidates are drawn anew. No gradient passes from
the critic through the policy, to which PA-RL says only `sample` and `loss`.

    python parl_openvla_real.py                                       # a tiny VLA and a simulated arm: a laptop
    python parl_openvla_real.py --preset default --checkpoint openvla/openvla-7b --env-id widowx-real \
        --instruction "put the vegetable on the plate"
    python parl_openvla_real.py --resume runs/<folder>                # continue after a stop, in any phase
    python parl_openvla_real.py --resume runs/<folder> --serve 8000   # OpenVLA's REST protocol, with what was learned

paper                                              | here
---------------------------------------------------|------------------------------------------------------------
sec. 3        autoregressive policy                | OpenVLA.sample_tokens, encode_actions
sec. 5.2.2    LoRA of rank 32                      | add_lora
app. B.1      Q-network from images                | random_shift, PixelCritic
eq. 4.1       keep the m best of k samples         | global_optimization
eq. 4.2       gradient ascent on the action        | local_optimization
alg. 1        action optimization                  | optimize_actions
eq. 4.3       which optimized action to take       | select_actions
eq. 3.3       Cal-QL: TD + calibrated penalty      | td_target, calql_loss, monte_carlo_returns
sec. 5.2.2    cache of candidates and its workers  | draw_candidates, refresh
app. B.1      argmax or samples                    | choose_greedy_distillation
eq. 4.4       dataset of optimized actions         | distill_lora
sec. 5.2.2    zero-shot, offline, online           | main: before phase 2, phases 2 and 3

The first ten minutes: `optimize_actions`, `VLAPolicy.sample`, `VLAPolicy.loss`, `refresh`, `distill_lora` and `main`.
The model is written out in plain PyTorch and reads the published weights; what the other scripts have too stands here
in the same words. `benchmarks/vla/` holds files and wires: checkpoints, the robot's units, Ray, the REST server.

Never run here: the published weights, the real robot. With `--checkpoint tiny` a small random VLA is first cloned on
scripted demonstrations; it stands for the pre-trained model. On a GPU weights are bfloat16, adapters float32.
"""

import copy
import math
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.harness.cli import fail, parse_args, run_program, start_torch
from benchmarks.harness.fast_critic import FrozenCritic, climb_winners, in_parts
from benchmarks.harness.runs import Run
from benchmarks.vla import checkpoint as files
from benchmarks.vla import robot
from benchmarks.vla.server import serve
from benchmarks.vla.workers import check_ray, make_pool


# --- ARGUMENTS ---
@dataclass
class Args(robot.RobotArgs):
    """PA-RL + Cal-QL for OpenVLA. Defaults shown are those of the preset in force."""

    env_id: str = "widowx-sim-vegetable-v0"  # widowx-real, widowx-sim-{vegetable,cup,pot}-v0
    plain: bool = True  # always: the harness's fast critic knows vectors only, so all that are kept climb
    # policy
    checkpoint: str = "tiny"  # folder or hub id of OpenVLA's weights; tiny: a small random one, cloned first
    unnorm_key: str = "bridge_orig"  # robot whose action statistics are used
    instruction: str = ""  # what the robot is told; empty: the simulated task's own
    # phases
    num_demonstrations: int = 0  # tiny: scripted episodes to clone
    num_cloning_steps: int = 0  # tiny, phase 1: updates of the whole policy
    num_zero_shot: int = 50  # episodes of the policy as it is, from which the critic learns first
    num_offline_steps: int = 10_000  # phase 2: updates of the critic (our choice)
    num_online_episodes: int = 40  # phase 3: episodes; the paper's took 40 minutes
    # distilling
    lora_rank: int = 32  # of the adapters
    cloning_lr: float = 1e-3  # Adam, tiny only: 100 updates of warm-up, then linear decay
    cloning_batch_size: int = 64  # tiny only
    distill_lr: float = 2e-5  # Adam
    distill_batch_size: int = 16  # states
    distill_ratio: float = 1.0  # distilling updates per environment step
    distill_episodes: int = 1  # online episodes between two distillings; after each the whole cache is drawn anew
    distill_selection: Literal["auto", "greedy", "sample"] = "auto"  # teach the best candidate, or draws from eq. 4.3
    greedy_below_std: float = 1.0  # auto: greedy if the candidates' Q differ less (offline, standard deviation)
    distill_data_actions: bool = True  # alg. 1's a_data(s) is one more candidate when distilling
    # critic
    critic_image: int = 100  # pixels of what it sees
    encoder_width: int = 64  # channels of the ResNet's first stage, doubled in each
    encoder_blocks: tuple[int, ...] = (2, 2, 2, 2)  # residual blocks of each stage: ResNet-18
    use_proprio: bool = False  # show it the arm's state, too
    ensemble_size: int = 10  # members of the critic behind one encoder
    target_subset: int = 2  # members whose minimum is the TD target, and members penalised: both drawn anew each update
    critic_hidden: tuple[int, ...] = (512, 512, 512)  # hidden layers
    critic_lr: float = 3e-4  # Adam
    batch_size: int = 256  # transitions of a critic update
    target_tau: float = 0.005  # rate of the target critic
    cql_alpha: float = 0.01  # weight of the Cal-QL penalty
    cql_actions: int = 4  # random actions in its logsumexp
    utd: float = 1.0  # critic updates per environment step, online
    # action optimization
    num_samples: int = 16  # k, candidates drawn from the policy (release: 8)
    num_keep: int = 10  # m, candidates kept by rank (release: 4)
    num_gradient_steps: int = 10  # T, gradient steps on each kept action; 0: rank only
    gradient_step_size: float = 3e-4  # alpha of equation 4.2
    keep_best_of_path: bool = False  # the release's way: take every step, return the best point of the path
    climb_first: int = 0  # there climb, even if climb_all, from so many of highest Q only, a shortcut; 0: from all
    greedy_rollouts: bool = False  # act with the best candidate; else draw from equation 4.3
    sample_backup: bool = False  # targets of a drawn optimized action (section 4.3), not the best (release)


# Defaults are the paper's (section 5.2.2, appendix B.1) and, where it is silent, the release's; the numbers of updates
# and episodes are ours. `widowx`, for a CPU core and the tiny model: tuned on seed 101, its distilling also on 1 and 2.
PRESETS: dict[str, dict] = {
    "default": {},
    "widowx": dict(
        num_demonstrations=300, num_cloning_steps=3_000, cloning_batch_size=32, num_zero_shot=100,
        num_offline_steps=3_000, num_online_episodes=50, eval_episodes=50, num_offline_evals=1, num_online_evals=2,
        log_every=50, camera_size=112, max_steps=40, distill_batch_size=64, distill_ratio=0.03, distill_episodes=10,
        critic_image=56, encoder_width=16, encoder_blocks=(1, 1, 1), ensemble_size=2, critic_hidden=(128, 128),
        critic_lr=5e-4, batch_size=64, discount=0.95, target_tau=0.05, utd=5, sample_backup=True, use_proprio=True,
        num_samples=8, num_keep=8, num_gradient_steps=0, greedy_rollouts=True, lora_rank=8, cache_batch=64),
}  # fmt: skip


# --- OPENVLA ---
@dataclass(frozen=True)
class Sizes:
    """Of OpenVLA's networks; the defaults are openvla-7b's. A tower or language model: width, layers, heads, hidden."""

    image: int = 224
    dino: tuple[int, ...] = (1024, 24, 16, 4096)
    siglip: tuple[int, ...] = (1152, 27, 16, 4304)
    llama: tuple[int, ...] = (4096, 32, 32, 11008)
    projector: int = 8704  # of openvla-7b four times both towers' widths
    vocabulary: int = 32064  # its last 64 are padding; the 256 before those are the action tokens
    rms_eps: float = 1e-6
    empty_token: int = 29871  # Llama's token for a lone space, which comes before the first action token

    @property
    def last_action(self) -> int:
        return self.vocabulary - 64  # an action token is this minus a bin from 1 to 256


TINY = Sizes(112, (64, 4, 4, 128), (64, 4, 4, 128), (96, 2, 4, 192), 256, 1088, empty_token=2)
EOS, NUM_BINS, ACTION_DIM, PATCH = 2, 256, 7, 14
# Mean and standard deviation of the two towers' pixels: DINOv2's are ImageNet's
PIXELS = (0.485, 0.456, 0.406, 0.5, 0.5, 0.5), (0.229, 0.224, 0.225, 0.5, 0.5, 0.5)


def to_pixels(images):
    """What both towers see of images, uint8 (B, 3, H, W) at the model's size -> float32 (B, 6, H, W), DINOv2 first."""
    mean, std = (torch.tensor(value, device=images.device).view(6, 1, 1) for value in PIXELS)
    return (torch.cat([images, images], 1).float() / 255 - mean) / std


def perceptron(*widths):
    """Linear layers fc1, fc2, ... with the exact GELU between them."""
    layers = OrderedDict()
    for i, sizes in enumerate(zip(widths, widths[1:]), 1):
        layers |= {f"fc{i}": nn.Linear(*sizes), f"gelu{i}": nn.GELU()}
    layers.popitem()
    return nn.Sequential(layers)


class VisionBlock(nn.Module):
    def __init__(self, width, heads, hidden, layer_scale):
        super().__init__()
        self.heads, self.mlp = heads, perceptron(width, hidden, width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        scale = lambda: nn.ParameterDict({"scale_factor": torch.ones(width)}) if layer_scale else {}  # noqa: E731
        self.ls1, self.ls2 = scale(), scale()

    def forward(self, x):
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attn["proj"](attended) * self.ls1.get("scale_factor", 1)
        return x + self.mlp(self.norm2(x)) * self.ls2.get("scale_factor", 1)


class VisionTower(nn.Module):
    """A vision transformer up to its second-to-last block: DINOv2 (with 5 tokens beside the patches) or SigLIP."""

    def __init__(self, image, width, layers, heads, hidden, dino: bool):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (image // PATCH) ** 2, width))
        token = lambda n: nn.Parameter(0.02 * torch.randn(1, n, width)) if dino else None  # noqa: E731
        self.cls_token, self.reg_token = token(1), token(4)
        self.blocks = nn.ModuleList(VisionBlock(width, heads, hidden, dino) for _ in range(layers - 1))

    def forward(self, pixels, checkpointed=False):
        """pixels (B, 3, H, W) -> patch features (B, patches, width), without a final norm."""
        x = self.patch_embed["proj"](pixels).flatten(2).mT + self.pos_embed
        if self.cls_token is not None:  # these have no position
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.reg_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = run_block(block, checkpointed, x)
        return x if self.cls_token is None else x[:, 5:]


class LlamaBlock(nn.Module):
    def __init__(self, width, heads, hidden, eps):
        super().__init__()
        linear = lambda inside, outside: nn.Linear(inside, outside, bias=False)  # noqa: E731
        self.heads, down = heads, {"down_proj": linear(hidden, width)}
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(width, eps) for _ in range(2))
        self.self_attn = nn.ModuleDict({f"{name}_proj": linear(width, width) for name in "qkvo"})
        self.mlp = nn.ModuleDict({f"{name}_proj": linear(width, hidden) for name in ("gate", "up")} | down)

    def forward(self, x, rotation, mask, cache, start):
        """x (B, T, D); mask (T, start + T) or None: causal. cache (2, B, heads, >= start + T, d) is filled in place."""
        attention, mlp, h = self.self_attn, self.mlp, self.input_layernorm(x)
        q, k, v = (attention[f"{name}_proj"](h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qkv")
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            end = start + x.shape[1]
            cache[0, :, :, start:end], cache[1, :, :, start:end] = k, v
            k, v = cache[:, :, :, :end]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + attention["o_proj"](attended.transpose(1, 2).flatten(2))
        h = self.post_attention_layernorm(x)
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](h)) * mlp["up_proj"](h))


class Llama(nn.Module):
    """Llama 2: embeddings, blocks, final norm."""

    def __init__(self, width, layers, heads, hidden, vocabulary, eps):
        super().__init__()
        self.embed_tokens, self.norm = nn.Embedding(vocabulary, width), nn.RMSNorm(width, eps)
        self.layers = nn.ModuleList(LlamaBlock(width, heads, hidden, eps) for _ in range(layers))

    def forward(self, x, positions, mask=None, caches=None, start=0, checkpointed=False):
        """x (B, T, D) embedded, positions (T,) -> hidden (B, T, D). caches: one for each layer, filled up to start."""
        rotation = rotary_embedding(positions, x.shape[-1] // self.layers[0].heads, x.dtype)
        for i, layer in enumerate(self.layers):
            x = run_block(layer, checkpointed, x, rotation, mask, None if caches is None else caches[i], start)
        return self.norm(x)


def run_block(block, checkpointed: bool, *inputs):
    """The block; if checkpointed its activations are computed again in the backward pass instead of being kept."""
    return checkpoint(block, *inputs, use_reentrant=False) if checkpointed else block(*inputs)


def rotary_embedding(positions, head_dim, dtype):
    """Cosine and sine (T, head_dim) of Llama's rotary embedding, theta 10,000, halves laid side by side."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
    angles = (positions[:, None] * 10_000.0**-exponents).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class OpenVLA(nn.Module):
    """DINOv2 and SigLIP, a projector, and Llama 2; parameters are named as in the published checkpoint."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes, width = sizes, sizes.llama[0]
        towers = {"featurizer": VisionTower(sizes.image, *sizes.dino, True),
                  "fused_featurizer": VisionTower(sizes.image, *sizes.siglip, False)}  # fmt: skip
        self.vision_backbone = nn.ModuleDict(towers)
        self.projector = perceptron(sizes.dino[0] + sizes.siglip[0], sizes.projector, width, width)
        llama, head = Llama(*sizes.llama, sizes.vocabulary, sizes.rms_eps), nn.Linear(width, sizes.vocabulary, False)
        self.language_model = nn.ModuleDict({"model": llama, "lm_head": head})

    def vision_features(self, images, checkpointed=False):
        """images uint8 (B, 3, H, W), or pixels (B, 6, H, W) -> (B, patches, DINOv2's width + SigLIP's)."""
        pixels = to_pixels(images) if images.dtype == torch.uint8 else images
        dino, siglip = pixels.to(self.vision_backbone["featurizer"].pos_embed.dtype).split(3, 1)
        seen = {"featurizer": dino, "fused_featurizer": siglip}
        return torch.cat([self.vision_backbone[name](x, checkpointed) for name, x in seen.items()], -1)

    def embed(self, images, tokens, checkpointed=False):
        """Llama's input (B, patches + T, D) for tokens (B, T), BOS first: the patches stand behind it."""
        patches = self.projector(self.vision_features(images, checkpointed))
        words = self.language_model["model"].embed_tokens(tokens)
        return torch.cat([words[:, :1], patches, words[:, 1:]], 1)

    def logits(self, images, tokens, last: int, checkpointed=False):
        """Of the token behind each of the `last` positions, teacher-forced: float32 (B, last, vocabulary)."""
        x = self.embed(images, tokens, checkpointed)
        hidden = self.language_model["model"](x, torch.arange(x.shape[1], device=x.device), checkpointed=checkpointed)
        return self.language_model["lm_head"](hidden[:, -last:]).float()

    def action_logits(self, hidden):
        """(..., D) -> float32 (..., 256) over the action tokens alone, in the order of their ids."""
        last = self.sizes.last_action
        return self.language_model["lm_head"](hidden)[..., last - NUM_BINS : last].float()

    @torch.no_grad()
    def sample_tokens(self, images, prompt, num_samples, pick):
        """num_samples action sequences for each image, (B, n, 7), from one pass over image and prompt.

        The samples' tokens stand behind the prompt as n "positions" of one sequence which share the position id, the
        image and the prompt's keys and values: each attends to the prefix and to its own earlier tokens only.

        images as in `vision_features`; prompt (P,) ids; pick: logits (B, n, 256) -> which action token (B, n),
        counted from the first; so are the tokens returned.
        """
        model, n, B = self.language_model["model"], num_samples, len(images)
        x = self.embed(images, prompt.expand(B, -1))
        (width, layers, heads, _), (P, D) = self.sizes.llama, x.shape[1:]
        caches = x.new_empty(layers, 2, B, heads, P + (ACTION_DIM - 1) * n, width // heads)
        hidden = model(x, torch.arange(P, device=x.device), None, caches)[:, -1:].expand(B, n, D)
        prefix, own = x.new_ones(n, P, dtype=torch.bool), torch.eye(n, dtype=torch.bool, device=x.device)
        chosen = [pick(self.action_logits(hidden))]
        for step in range(1, ACTION_DIM):
            x = model.embed_tokens(chosen[-1] + self.sizes.last_action - NUM_BINS)
            mask = torch.cat([prefix, own.repeat(1, step)], 1)
            position = torch.full((n,), P + step - 1, device=x.device)
            hidden = model(x, position, mask, caches, P + (step - 1) * n)
            chosen.append(pick(self.action_logits(hidden)))
        return torch.stack(chosen, 2)


# --- ACTION TOKENS ---
def action_values(device=None):
    """The normalised action that each of the 256 action tokens stands for, in the order of their ids: float32 (256,).

    Tokens number 256 bins from the highest down; a bin's value is its centre, and +1, a bin of its own when encoding,
    has the last centre (as published).
    """
    edges = torch.linspace(-1, 1, NUM_BINS, dtype=torch.float64, device=device)
    centers = (edges[:-1] + edges[1:]) / 2
    return torch.cat([centers, centers[-1:]]).flip(0).float()


def encode_actions(actions, sizes: Sizes):
    """Token ids of normalised actions (...); what lies outside [-1, 1] gets the outermost token."""
    edges = torch.linspace(-1, 1, NUM_BINS, dtype=torch.float64, device=actions.device)
    return sizes.last_action - torch.bucketize(actions.double().clamp(-1, 1), edges, right=True)


# --- LORA ---
def add_lora(model: OpenVLA, rank: int) -> None:
    """Freeze the model and give every linear and convolutional layer that is used a float32 adapter (LoRA, alpha 16).

    The layers are named one by one: what peft's "all-linear" means changes with its versions.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=16, lora_dropout=0.0, init_lora_weights="gaussian", target_modules=names)
    inject_adapter_in_model(config, model)
    for parameter in adapters(model).values():
        parameter.data = parameter.data.float()


def adapters(model) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


# --- VLA POLICY ---
class VLAPolicy:
    """OpenVLA under one instruction. To PA-RL it is `sample` and `loss`, of images at the model's size."""

    def __init__(self, model: OpenVLA, tokenize, instruction: str, top_k: int = 50):
        self.model, self.tokenize, self.top_k = model, tokenize, top_k
        self.device = model.language_model["model"].norm.weight.device
        self.set_instruction(instruction)

    def set_instruction(self, instruction: str) -> None:
        if not instruction.strip():
            fail("the instruction is empty; say what the robot should do (--instruction)")
        sizes = self.model.sizes
        ids = self.tokenize(f"{files.WORDS} {instruction.strip().lower()}?\nOut:")
        ids = ids if ids[-1] == sizes.empty_token else [*ids, sizes.empty_token]
        self.instruction, self.prompt = instruction, torch.tensor(ids, device=self.device)

    def loss(self, obs, actions):
        """The loss OpenVLA was trained with: cross-entropy of the 7 action tokens and the end, their mean.

        obs uint8 (B, 3, H, W), actions (B, 7) normalised -> scalar.
        """
        tokens = encode_actions(actions, self.model.sizes)
        ends = torch.full_like(tokens[:, :1], EOS)
        tokens = torch.cat([self.prompt.expand(len(obs), -1), tokens, ends], 1)
        logits = self.model.logits(obs, tokens, ACTION_DIM + 2, checkpointed=self.device.type == "cuda")[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, -ACTION_DIM - 1 :].flatten())

    @torch.no_grad()
    def sample(self, obs, num_samples, generator=None):
        """obs uint8 (B, 3, H, W) -> normalised actions (B, n, 7).

        As published, at temperature 1 among the top_k likeliest tokens; but among action tokens only, so that every
        sample is an action.
        """

        def pick(logits):
            top, index = logits.topk(self.top_k, -1)
            drawn = torch.multinomial(top.softmax(-1).flatten(0, 1), 1, generator=generator)
            return index.flatten(0, 1).gather(1, drawn).view(logits.shape[:-1])

        return action_values(self.device)[self.model.sample_tokens(obs, self.prompt, num_samples, pick)]

    def version(self) -> str:
        """Names what the samples depend on: instruction, adapters, and the base, known by 64 numbers of each tensor."""
        base = [p.flatten()[:64] for name, p in self.model.named_parameters() if ".lora_" not in name]
        return files.fingerprint((self.instruction, self.top_k), *base, *adapters(self.model).values())


def supervised_step(policy, optimizer, obs, actions):
    """One step of the policy's own loss. Returns the loss."""
    loss = policy.loss(obs, actions)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


# --- PIXEL CRITIC ---
def gradient_step(loss, optimizer, online: nn.Module, average: nn.Module, rate: float) -> None:
    """One step of the optimizer, then average <- (1 - rate) average + rate online, parameter by parameter."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(online.parameters()), rate)


def random_shift(images, pad: int = 4):
    """Each image moved by up to `pad` pixels in both directions, its border repeated (DrQ): (B, C, H, W)."""
    B, C, H, W = images.shape
    move = torch.randint(-pad, pad + 1, (2, B, 1), device=images.device)
    rows = (torch.arange(H, device=images.device) + move[0]).clamp(0, H - 1)  # (B, H)
    columns = (torch.arange(W, device=images.device) + move[1]).clamp(0, W - 1)  # (B, W)
    pixels = (rows[:, :, None] * W + columns[:, None]).view(B, 1, H * W).expand(-1, C, -1)
    return images.flatten(2).gather(2, pixels).view_as(images)


class ResNetBlock(nn.Module):
    """Two 3 x 3 convolutions around which the input passes. GroupNorm: batch statistics would leak between states."""

    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(4, outside), nn.GroupNorm(4, outside)
        same = inside == outside and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x):
        return F.silu(self.skip(x) + self.norm2(self.conv2(F.silu(self.norm1(self.conv1(x))))))


class PixelCritic(nn.Module):
    """Q from images: one ResNet, then an ensemble of E MLPs which are shown the action again at every layer.

    An image is encoded once (`encode`), for all of its actions and members: for the rest of the algorithm the features
    are the observation.
    """

    def __init__(self, action_dim, proprio_dim=0, width=64, blocks=(2, 2, 2, 2), hidden=(512,) * 3, ensemble_size=10):
        super().__init__()
        self.ensemble_size = ensemble_size
        layers, inside = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.GroupNorm(4, width), nn.SiLU()], width
        layers.append(nn.MaxPool2d(3, 2, 1))
        for i, count in enumerate(blocks):
            for j in range(count):
                layers.append(ResNetBlock(inside, width * 2**i, 2 if i > 0 and j == 0 else 1))
                inside = width * 2**i
        self.encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        E, sizes = ensemble_size, (inside + proprio_dim, *hidden)

        def orthogonal(rows, columns, gain):  # each member a matrix of its own
            return torch.stack([nn.init.orthogonal_(torch.empty(rows, columns), gain) for _ in range(E)])

        gains = [math.sqrt(2)] * (len(hidden) - 1) + [0.01]  # a last hidden layer this small: Q starts nearly constant
        self.weights = nn.ParameterList(orthogonal(i + action_dim, o, g) for i, o, g in zip(sizes, hidden, gains))
        self.biases = nn.ParameterList(torch.zeros(E, 1, o) for o in hidden)
        self.scales = nn.ParameterList(torch.ones(E, 1, o) for o in hidden)
        self.shifts = nn.ParameterList(torch.zeros(E, 1, o) for o in hidden)
        self.head_weight = nn.Parameter(orthogonal(hidden[-1], 1, 0.01))
        self.head_bias = nn.Parameter(torch.zeros(E, 1, 1))

    def encode(self, images, proprio):
        """images uint8 (B, 3, H, W), proprio (B, P), P may be 0 -> features (B, F), which members share (release)."""
        return torch.cat([self.encoder(images.float() / 127.5 - 1), proprio], 1)

    def forward(self, obs, actions, members=None):
        """obs: features (B, F), actions (B, n, A) -> q (E, B, n), of the named members only if given."""
        B, n, A = actions.shape
        pick = (lambda p: p) if members is None else (lambda p: p[members])
        rows, x = actions.reshape(B * n, A), obs
        for i in range(len(self.weights)):
            below, action = pick(self.weights[i]).split([self.weights[i].shape[1] - A, A], 1)
            x = torch.matmul(x, below) + pick(self.biases[i])  # (E, B, H) of the features, then (E, B n, H)
            x = x.repeat_interleave(n, 1) if i == 0 else x
            x = F.layer_norm(x + torch.matmul(rows, action), x.shape[-1:], eps=1e-6)
            x = F.silu(torch.addcmul(pick(self.shifts[i]), x, pick(self.scales[i])))
        return torch.baddbmm(pick(self.head_bias), x, pick(self.head_weight)).view(-1, B, n)

    def td_loss(self, obs, actions, target_q, release_width=False):
        """Q of actions (B, A), (E, B), and its mean squared difference from target_q (B,). release_width: not used."""
        q = self(obs, actions[:, None])[..., 0]
        return q, (q - target_q).square().mean()


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


# --- CAL-QL FROM PIXELS ---
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
    """Algorithm 2, line 4: one update on the transitions `index` (B,), their candidates taken from the cache.

    Only the features that the loss is made of have a gradient. s and s' are shifted each by its own amount.
    """
    states = torch.cat([buffer.obs_index[index], buffer.obs_index[index] + 1])
    (image, next_image), (here, there) = random_shift(buffer.small[states]).chunk(2), buffer.proprio[states].chunk(2)
    obs = critic.encode(image, here)
    with torch.no_grad():
        next_obs, target_obs = critic.encode(next_image, there), target_critic.encode(next_image, there)
    best = not args.sample_backup
    optimized, q = optimize(critic, torch.cat([obs.detach(), next_obs]), buffer.candidates[states], args, best)
    current_actions, next_actions = select_actions(optimized, q, best).chunk(2)
    td_members = torch.randperm(args.ensemble_size, device=obs.device)[: args.target_subset]
    cql_members = torch.randperm(args.ensemble_size, device=obs.device)[: args.target_subset]
    rewards, masks = buffer.rewards[index], buffer.masks[index]
    target_q = td_target(target_critic, rewards, masks, target_obs, next_actions, args.discount, td_members)
    random_actions = torch.rand(len(index), args.cql_actions, optimized.shape[-1], device=obs.device) * 2 - 1
    batch = critic, obs, buffer.actions[index], target_q, buffer.mc_returns[index], current_actions, next_actions
    loss, info = calql_loss(*batch, random_actions, args.cql_alpha, cql_members)
    gradient_step(loss, optimizer, critic, target_critic, args.target_tau)
    return info


# --- EPISODES ---
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


class EpisodeBuffer:
    """The robot's episodes as tensors on the device, each image once: N steps have N + 1 states.

    Of each state: `states`, the policy's image; `small` and `proprio`, what the critic sees; `action_at`, the action
    taken there, NaN at the last; `candidates`, the cache, valid where the episode's entry in `versions` is the
    policy's. Of each step: `obs_index`, its state (the next one is behind it), `actions`, `rewards`, `masks`,
    `mc_returns`.
    """

    def __init__(self, image_sizes, args: Args, device):
        self.args, self.device, self.image_sizes = args, device, image_sizes
        self.data = [None]  # the harness saves what is behind the first: nothing, episodes are files of their own
        self.first_state, self.first_row, self.versions = [0], [0], []
        none = lambda *shape, dtype=torch.float32: torch.zeros(0, *shape, dtype=dtype, device=device)  # noqa: E731
        self.states, self.small = (none(3, size, size, dtype=torch.uint8) for size in image_sizes)
        self.proprio, self.candidates = none(7 * args.use_proprio), none(args.num_samples, ACTION_DIM)
        self.actions, self.action_at, self.obs_index = none(ACTION_DIM), none(ACTION_DIM), none(dtype=torch.long)
        self.rewards, self.masks, self.mc_returns = none(), none(), none()

    def add(self, episode: dict[str, np.ndarray]) -> None:
        """Append what `collect` returned."""
        args, N = self.args, len(episode["rewards"])
        rewards = episode["rewards"] + np.float32(args.reward_bias)
        failure = args.reward_min if args.sparse_reward else -math.inf
        images, small, proprio = robot.unpack(torch.as_tensor(episode["obs"]), *self.image_sizes)
        new = dict(
            states=images, small=small, proprio=proprio[:, : 7 * args.use_proprio], actions=episode["actions"],
            action_at=np.append(episode["actions"], np.full((1, ACTION_DIM), np.nan, np.float32), 0),
            obs_index=len(self.states) + np.arange(N),
            candidates=np.zeros((N + 1, args.num_samples, ACTION_DIM), np.float32), rewards=rewards,
            masks=1 - episode["terminals"].astype(np.float32),
            mc_returns=monte_carlo_returns(rewards, episode["terminals"], np.array([N]), args.discount, failure),
        )  # fmt: skip
        for name, array in new.items():
            setattr(self, name, torch.cat([getattr(self, name), torch.as_tensor(array, device=self.device)]))
        self.first_state.append(len(self.states))
        self.first_row.append(len(self.rewards))
        self.versions.append("")

    def put_candidates(self, episode: int, candidates: np.ndarray, version: str) -> None:
        self.candidates[self.states_of(episode)] = torch.tensor(candidates, device=self.device)
        self.versions[episode] = version

    def states_of(self, episode: int) -> slice:
        return slice(self.first_state[episode], self.first_state[episode + 1])

    def rows_with(self, version: str) -> torch.Tensor:
        """Rows of the episodes whose candidates were drawn by that version of the policy."""
        first = self.first_row
        fresh = [torch.arange(first[i], first[i + 1]) for i, by in enumerate(self.versions) if by == version]
        return torch.cat(fresh).to(self.device)


# --- CANDIDATE CACHE ---
def draw_candidates(policy, images, num_samples: int, batch: int, seed: int):
    """The policy's samples at images (S, 3, H, W): (S, n, 7). The same wherever they are drawn."""
    generator = torch.Generator(policy.device).manual_seed(seed)
    return torch.cat([policy.sample(part, num_samples, generator) for part in images.split(batch)])


def refresh(policy, buffer, run, pool):
    """Draw the candidates of every episode whose cached ones another version of the policy drew (section 5.2.2).

    A generator of the rows whose candidates are fresh. With workers it can be asked again and again, while the trainer
    goes on with the critic on those; without, the first are all. What was drawn is kept in a file and found there after
    a stop. pool: draws them, here or in workers.
    """
    version = policy.version()
    wanted = [e for e in reversed(range(len(buffer.versions))) if buffer.versions[e] != version]  # the newest first
    for episode in wanted:
        if (saved := robot.read_candidates(run, episode, version)) is not None:
            buffer.put_candidates(episode, saved, version)
    stale = [episode for episode in wanted if buffer.versions[episode] != version]
    images = {episode: buffer.states[buffer.states_of(episode)] for episode in stale}
    seeds = {episode: int(version[:8], 16) + episode for episode in stale}
    for episode, candidates in pool.candidates(policy, version, images, seeds):
        run.check_stop()
        if candidates is not None:  # None: the workers have none at this moment
            buffer.put_candidates(episode, candidates, version)
            robot.write_candidates(run, episode, version, candidates)
        if pool.elsewhere and version in buffer.versions:
            yield buffer.rows_with(version)
    yield buffer.rows_with(version)


# --- LORA DISTILLATION ---
def choose_greedy_distillation(args: Args, q_stds: list[float]) -> bool:
    """Appendix B.1: teach the argmax where the candidates' Q differ too little for samples of eq. 4.3 to prefer any.

    q_stds: measured standard deviations of the candidates' Q; none: nothing was measured. The paper gives no
    threshold. Equation 4.3's softmax has temperature 1, so that below a standard deviation of about 1 the candidates
    are nearly equally likely, and samples would hardly improve the policy.
    """
    if args.distill_selection != "auto":
        return args.distill_selection == "greedy"
    return bool(np.mean(q_stds) < args.greedy_below_std) if q_stds else args.greedy_rollouts


def distill_lora(policy, optimizer, critic, buffer, num_updates, greedy, args: Args) -> dict[str, torch.Tensor]:
    """Section 4.2: states uniform over all episodes, with optimized actions (equation 4.4), cloned by LoRA.

    The candidates are the cached ones, of the policy as it was before. Returns as metrics the mean loss, and the
    annotations' mean Q and its standard deviation over the candidates of a state.
    """
    rows = torch.randint(len(buffer.obs_index), (num_updates, args.distill_batch_size), device=buffer.device)
    losses, values, spreads = [], [], []
    for index in buffer.obs_index[rows]:
        with torch.no_grad():
            obs = critic.encode(buffer.small[index], buffer.proprio[index])
        data_actions = buffer.action_at[index] if args.distill_data_actions else None
        optimized, q = optimize(critic, obs, buffer.candidates[index], args, greedy, data_actions)
        target = select_actions(optimized, q, greedy)
        losses.append(supervised_step(policy, optimizer, buffer.states[index], target))
        values.append(q.amax(1).mean())
        spreads.append(q_spread(critic, buffer, index, args))
    names = "distill_loss", "distill_q", "distill_q_std"
    return {name: torch.stack(column).mean() for name, column in zip(names, (losses, values, spreads))}


@torch.no_grad()
def q_spread(critic, buffer, states, args: Args):
    """Standard deviation of Q over a state's kept candidates, before they climb: mean over the states (index (S,))."""
    obs = critic.encode(buffer.small[states], buffer.proprio[states])
    return global_optimization(critic, obs, buffer.candidates[states], args.num_keep)[1].std(1, correction=0).mean()


# --- MAIN ---
def make_policy(args: Args, instruction: str, opened=None) -> VLAPolicy:
    """The checkpoint's model, frozen, under an instruction, with adapters that change nothing yet; a worker's too."""
    opened = opened or files.open_checkpoint(args, Sizes, TINY)
    model = files.load_model(OpenVLA, opened, start_torch(args))
    add_lora(model, args.lora_rank)
    return VLAPolicy(model, opened.tokenize, instruction)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(Args, PRESETS, argv)
    robot.check_flags(args)
    check_ray(args.num_cache_workers, args.ray, args.robot_node)
    device, tiny, cloned = start_torch(args), args.checkpoint == "tiny", files.cloned_folder(args)
    opened = files.open_checkpoint(args, Sizes, TINY, cloned)
    if args.serve:
        return serve(args, make_policy(args, "nothing yet", opened), opened.statistics)
    env, envs, make_robot = robot.set_up_robot(args, opened.statistics, opened.sizes.image)
    policy = make_policy(args, args.instruction or env.unwrapped.instruction, opened)
    image_sizes = opened.sizes.image, args.critic_image
    buffer = EpisodeBuffer(image_sizes, args, device)
    network = args.encoder_width, args.encoder_blocks, args.critic_hidden, args.ensemble_size
    critic = PixelCritic(ACTION_DIM, 7 if args.use_proprio else 0, *network).to(device)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True)
    base = {name: p for name, p in policy.model.named_parameters() if ".lora_" not in name}
    cloned_weights = base.values() if tiny else [critic.head_bias]  # of a checkpoint: none, but Adam needs some
    cloning_optimizer = torch.optim.Adam(cloned_weights, args.cloning_lr, fused=True)
    policy_optimizer = torch.optim.Adam(adapters(policy.model).values(), args.distill_lr, fused=True)
    files.train_only(policy.model, adapters(policy.model) if cloned or not tiny else base)

    def act_policy(obs):
        return policy.sample(robot.unpack(obs, *image_sizes)[0], 1)[:, 0]

    @torch.no_grad()
    def act_optimized(obs):  # pi^opt of algorithm 1
        images, small, proprio = robot.unpack(obs, *image_sizes)
        features = critic.encode(small, proprio[:, : 7 * args.use_proprio])
        actions, q = optimize(critic, features, policy.sample(images, args.num_samples), args, args.greedy_rollouts)
        return select_actions(actions, q, args.greedy_rollouts)

    run = Run(args, robot.no_data("the run's own episodes"), buffer, policy=files.TrainedPart(policy.model),
              policy_optimizer=policy_optimizer, cloning_optimizer=cloning_optimizer, critic=critic,
              target_critic=target_critic, critic_optimizer=critic_optimizer)  # fmt: skip
    q_stds = run.progress.setdefault("q_stds", [])  # measured in the second half of phase 2
    with run:
        # Phase 1, tiny only: clone scripted demonstrations into a policy that can do a little, as OpenVLA can
        if (num_cloning_steps := args.num_cloning_steps * tiny) and run.phase == "cloning":
            images, actions = robot.demonstrations(args, env, image_sizes, device)
        for step in run.steps("cloning", num_cloning_steps, envs, act_policy):
            lr = args.cloning_lr * min((step + 1) / 100, 1 - step / num_cloning_steps)
            cloning_optimizer.param_groups[0]["lr"] = lr
            rows = torch.randint(len(images), (args.cloning_batch_size,), device=device)
            loss = supervised_step(policy, cloning_optimizer, random_shift(images[rows]), actions[rows])
            run.log({"policy_loss": loss}, every=args.log_every)
        if tiny and not cloned:
            files.write_checkpoint(run.folder / "cloned", policy.model, files.TINY_STATISTICS)
        files.train_only(policy.model, adapters(policy.model))
        pool = make_pool(args, run, policy, make_policy, draw_candidates)
        robot.tell_stale_cache(run, policy.version())

        # Zero-shot episodes of the policy as it is; those that a stopped run has are read from their files
        for i in range(args.num_zero_shot + run.progress["step"] if run.phase == "online" else 0):
            buffer.add(robot.read_episode(run, i))
        if run.phase == "offline":
            for i in run.each("zero-shot", range(args.num_zero_shot)):
                buffer.add(robot.get_episode(env, act_policy, i, policy.version(), run)[0])
            robot.tell_zero_shot(run)
            if run.starts("offline"):  # our choice: Q begins at their mean return, to which it else falls first, from 0
                for q_network in (critic, target_critic):
                    nn.init.constant_(q_network.head_bias, buffer.mc_returns.mean().item())

        # Phase 2: train the critic on them (algorithm 2, lines 3 and 4), with candidates that are drawn once
        rows, arrivals = None, refresh(policy, buffer, run, pool)
        for step in run.steps("offline", args.num_offline_steps, envs, act_optimized, args.num_offline_evals):
            rows = next(arrivals, rows)
            index = rows[torch.randint(len(rows), (args.batch_size,), device=device)]
            info = critic_update(critic, target_critic, critic_optimizer, buffer, index, args)
            if (step + 1) % args.log_every == 0:
                info["q_std"] = q_spread(critic, buffer, buffer.obs_index[index], args)
                q_stds += [info["q_std"].item()] if 2 * step >= args.num_offline_steps else []
                run.log(info)

        # Phase 3: an episode, LoRA, the cache anew, critic training (algorithm 2, lines 3 to 8); a step is one episode
        if run.starts("online"):
            critic_optimizer.state.clear()
        greedy = choose_greedy_distillation(args, q_stds)
        for i in run.steps("online", args.num_online_episodes, envs, act_optimized, args.num_online_evals, "episode"):
            episode, success = robot.get_episode(env, act_optimized, args.num_zero_shot + i, policy.version(), run)
            buffer.add(episode)
            (rows,) = deque(refresh(policy, buffer, run, pool), 1)  # of the new episode, and what a stop left undone
            length = len(episode["rewards"])
            now, num_critic, first = (i + 1) % args.distill_episodes == 0, round(length * args.utd), buffer.first_row
            num_distill = round((first[-1] - first[-1 - args.distill_episodes]) * args.distill_ratio) if now else 0
            metrics = {"episode_success": success, "episode_length": length}
            if num_distill:
                metrics |= distill_lora(policy, policy_optimizer, critic, buffer, num_distill, greedy, args)
            arrivals = refresh(policy, buffer, run, pool)
            for _ in range(num_critic):
                run.check_stop()
                rows = next(arrivals, rows)
                index = rows[torch.randint(len(rows), (args.batch_size,), device=device)]
                metrics |= critic_update(critic, target_critic, critic_optimizer, buffer, index, args)
            (rows,) = deque(arrivals, 1) or [rows]  # the policy must not change under its workers
            run.count(episodes=1, env_steps=length, updates=num_distill + num_critic)
            run.log(metrics)
        pool.close()
        robot.finish_run(run, env, make_robot, act_optimized, policy, critic)


if __name__ == "__main__":
    run_program(main)
