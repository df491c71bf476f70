"""speed.py's cases of `parl_openvla_real`: candidates for the cache, LoRA steps, critic updates; `tiny`, or full size.

    python benchmarks/speed.py --script parl_openvla_real --case tiny
    python benchmarks/speed.py --script parl_openvla_real --case openvla-7b --device cuda

Weights are random: `openvla-7b` is the published sizes, in bfloat16 on a GPU. A state's candidates are 16 samples.

naive      one state and one sample at a time, each with its own pass over image and prompt (keys and values kept from
           token to token): what OpenVLA's published `generate` allows, which refuses batches
batch B    `VLAPolicy.sample`: B states in one pass over image and prompt, all their samples behind it
"""

import copy
import functools
import time

import torch

SAMPLES, BATCHES, STEP_BATCH = 16, (1, 4, 16), 16


def build(script, case: str, device):
    """The policy with its adapters, and the seconds that took."""
    from benchmarks.vla import checkpoint as files

    start = time.perf_counter()
    sizes = script.TINY if case == "tiny" else script.Sizes()
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
        try:
            model = script.OpenVLA(sizes)
        finally:
            torch.set_default_dtype(torch.float32)
    files.check_memory(sum(p.numel() for p in model.parameters()), device)
    script.add_lora(model, script.Args.lora_rank if case != "tiny" else 8)
    files.train_only(model, script.adapters(model))
    words = files.load_tokenizer(None, 0, 256 if case == "tiny" else 30_000)
    return script.VLAPolicy(model, words, "put the vegetable on the plate"), time.perf_counter() - start


def naive(policy, images) -> torch.Tensor:
    """The same samples one by one: (B, 16, 7)."""
    return torch.stack([torch.cat([policy.sample(image[None], 1)[0] for _ in range(SAMPLES)]) for image in images])


def critic_parts(script, device):
    """Critic, target, optimizer, a buffer of random episodes, and arguments, at the case's sizes."""
    import numpy as np

    args = script.Args(device=str(device))
    sizes = 14, args.critic_image  # the policy's images are not looked at
    buffer, random = script.EpisodeBuffer(sizes, args, device), np.random.default_rng(0)
    steps = 60
    for _ in range(10):
        obs = random.integers(0, 255, (steps + 1, 3 * sum(size**2 for size in sizes) + 28), np.uint8)
        rewards, terminals = np.zeros(steps, np.float32), np.zeros(steps, bool)
        actions = random.uniform(-1, 1, (steps, 7)).astype(np.float32)
        buffer.add(dict(obs=obs, actions=actions, rewards=rewards, terminals=terminals))
    buffer.candidates.uniform_(-1, 1)
    network = args.encoder_width, args.encoder_blocks, args.critic_hidden, args.ensemble_size
    critic = script.PixelCritic(7, 0, *network).to(device)
    return critic, copy.deepcopy(critic).requires_grad_(False), torch.optim.Adam(critic.parameters()), buffer, args


def measure(script, case: str, device, repeat) -> dict:
    """Rows of name, unit, units of a call, and seconds of its calls. repeat(function) -> seconds of each call."""
    policy, load = build(script, case, device)
    size = policy.model.sizes.image
    images = torch.randint(0, 256, (max(STEP_BATCH, *BATCHES), 3, size, size), dtype=torch.uint8, device=device)
    actions = torch.rand(STEP_BATCH, 7, device=device) * 2 - 1
    optimizer = torch.optim.Adam([p for p in policy.model.parameters() if p.requires_grad], 1e-5)
    rows = [("16 samples, naive", "state", 1, repeat(lambda: naive(policy, images[:1])))]
    for batch in BATCHES:
        seconds = repeat(functools.partial(policy.sample, images[:batch], SAMPLES))
        rows.append((f"16 samples, batch {batch}", "state", batch, seconds))
    step = repeat(lambda: script.supervised_step(policy, optimizer, images[:STEP_BATCH], actions))
    rows.append((f"LoRA step, batch {STEP_BATCH}", "update", 1, step))
    if case != "tiny":
        *networks, buffer, args = critic_parts(script, device)
        index = torch.randint(len(buffer.rewards), (args.batch_size,), device=device)
        update = repeat(lambda: script.critic_update(*networks, buffer, index, args))
        rows.append((f"critic update, batch {args.batch_size}", "update", 1, update))
    return {"case": case, "load_seconds": load, "parameters": sum(p.numel() for p in policy.model.parameters()),
            "rows": rows}  # fmt: skip


def print_table(result: dict, peak_memory: float) -> None:
    naive_rate = 1 / median(result["rows"][0][3])
    print(
        f"\nparl_openvla_real, {result['case']}: {result['parameters'] / 1e6:,.1f} million parameters, random weights"
    )
    print(f"{'':28}{'one':>8}{'median':>12}{'per second':>12}{'x naive':>9}")
    for name, unit, units, seconds in result["rows"]:
        rate = units / median(seconds)
        times = f"{rate / naive_rate:9.1f}" if unit == "state" else ""
        print(f"{name:28}{unit:>8}{median(seconds) / units * 1e3:9.1f} ms{rate:12.2f}{times}")
    print(f"built in {result['load_seconds']:.1f} s; peak memory {peak_memory:.2f} GB")


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
