"""What a run's phases cost: the arithmetic that the mathematics needs, and the time that it will take.

In floating-point operations, two for each multiply-add of the matrix products. `benchmarks/speed.py` measures by the
same counts. args are those of a script.
"""

import math
import pathlib
import platform

TIME_DIM = 128  # features of a denoising step or a time, as in `DiffusionPolicy` and `FlowPolicy`
DAY = 24 * 3600.0
# Of a state's candidates, where those that cannot win are left out (1 to 3.4 in benchmarks/climbing)
USUALLY_CLIMB = 2.0


def critic_layers(args, obs_dim: int, action_dim: int) -> tuple[int, int, int]:
    """One member's forward pass: first layer's observation part (per state), its action part, the rest (per action)."""
    hidden, bins = args.critic_hidden, args.num_bins if args.critic_loss == "hl_gauss" else 1
    rest = sum(i * o for i, o in zip(hidden, (*hidden[1:], bins)))
    return 2 * obs_dim * hidden[0], 2 * action_dim * hidden[0], 2 * rest


def optimize_flops(args, obs_dim: int, action_dim: int, states: int, data_action=False, climbed=None) -> float:
    """Algorithm 1 on so many states: rank k samples, then T gradient steps on the m kept, all members.

    An action's gradient takes as many multiply-adds as a forward pass. The gradients at the start build on the forward
    passes of the ranking; from there each gradient step takes a forward pass and, but for the last, a backward pass.

    data_action: one more candidate, which needs no rank but its value. climbed: of a state's candidates, how many the
    gradient steps are taken on, a mean over states, where some are left out after their first gradient; None: all that
    are kept.
    """
    obs, action, rest = critic_layers(args, obs_dim, action_dim)
    steps, kept = args.num_gradient_steps, args.num_keep + data_action
    passes = args.num_samples + data_action
    if steps:
        passes += kept + (2 * steps - 1) * (kept if climbed is None else climbed)
    return states * args.ensemble_size * (obs + passes * (action + rest))


def critic_update_flops(args, obs_dim: int, action_dim: int, climbed=None) -> float:
    """One critic update, of Cal-QL: optimize at s and s', value at s', loss and its gradient for the parameters.

    A backward pass is two forward passes (inputs and weights), in the first layer one (weights alone). The
    observation's part of the first layer at s was evaluated when optimizing: its weights' gradient is left.
    climbed: as in `optimize_flops`.

    AntMaze comes to 0.562 TFLOP. Of that 0.474 are the gradient steps, 0.076 the ranking, 0.012 the loss. A count of
    0.62 is had by evaluating the kept actions once more after their ranking, and by sending the penalty's actions
    through all ten members; it needs only the two drawn for it.
    """
    obs, action, rest = critic_layers(args, obs_dim, action_dim)
    B, E = args.batch_size, args.ensemble_size
    if hasattr(args, "expectile"):  # IQL: target critic, value at s' and s, critic and value with gradients; no policy
        v_rest = rest - 2 * args.critic_hidden[-1] * ((args.num_bins if args.critic_loss == "hl_gauss" else 1) - 1)
        targets = E * (obs + action + rest) + obs + v_rest
        return B * (targets + E * (2 * obs + 2 * action + 3 * rest) + 2 * obs + 3 * v_rest)
    subset, how = args.target_subset, (args.target_data_actions, climbed)
    target = B * subset * (obs + action + rest)
    if not hasattr(args, "cql_actions"):  # RLPD: optimize at s' only, no penalty
        return optimize_flops(args, obs_dim, action_dim, B, *how) + target + B * E * (2 * obs + 2 * action + 3 * rest)
    data = B * E * (obs + 2 * action + 3 * rest)
    penalty = B * subset * (args.cql_actions + 2) * (2 * action + 3 * rest)  # random ones, and one each from s and s'
    return optimize_flops(args, obs_dim, action_dim, 2 * B, *how) + target + data + penalty


def is_transformer(args) -> bool:
    return hasattr(args, "policy_layers")


def is_flow(args) -> bool:
    return hasattr(args, "flow_steps")


def policy_steps(args) -> int:
    """Forward passes of a sample: denoising or Euler steps."""
    return args.flow_steps if is_flow(args) else args.diffusion_steps


def transformer_layers(args, obs_dim: int) -> tuple[int, int, int]:
    """One element: the observation's linear layer, all blocks without attention's products, and the head."""
    width = args.policy_width
    return 2 * obs_dim * width, args.policy_layers * 24 * width**2, 2 * width * args.policy_bins


def policy_layers(args, obs_dim: int, action_dim: int) -> tuple[int, int, int, int]:
    """One forward pass: time's part (per step), observation's (per state), action's and rest (per sample)."""
    width = args.policy_hidden
    time_part = 2 * (TIME_DIM * 2 * TIME_DIM + 2 * TIME_DIM * TIME_DIM + TIME_DIM * width)
    rest = 2 * (args.policy_blocks * 2 * width * 4 * width + width * action_dim)
    return time_part, 2 * obs_dim * width, 2 * action_dim * width, rest


def sampling_flops(args, obs_dim: int, action_dim: int, states: int, samples: int) -> int:
    """So many samples at so many states: the observation once, all denoising or Euler steps, or all tokens but one."""
    if is_transformer(args):
        obs, token, head = transformer_layers(args, obs_dim)
        attention = 4 * args.policy_width * args.policy_layers
        first = obs + token + head + attention
        rest = (action_dim - 1) * (token + head) + attention * sum(range(2, action_dim + 1))
        return states * (first + samples * rest)
    time_part, obs, action, rest = policy_layers(args, obs_dim, action_dim)
    steps = policy_steps(args)
    return steps * time_part + states * (obs + samples * steps * (action + rest))


def policy_update_flops(args, obs_dim: int, action_dim: int, batch: int) -> int:
    """One cloning or distilling update: three forward passes, two for the parts of layer one whose input is data.

    The time features have as many different values as there are denoising steps, so those are all that is needed; of a
    flow every row has a time of its own.
    """
    if is_transformer(args):
        obs, token, head = transformer_layers(args, obs_dim)
        attention = 4 * args.policy_width * args.policy_layers * action_dim * (action_dim + 1) // 2
        return batch * (2 * obs + 3 * (action_dim * (token + head) + attention))
    time_part, obs, action, rest = policy_layers(args, obs_dim, action_dim)
    times = batch if is_flow(args) else min(args.diffusion_steps, batch)
    return 3 * times * time_part + batch * (2 * obs + 2 * action + 3 * rest)


def acting_flops(args, obs_dim: int, action_dim: int, states: int, climbed=None) -> float:
    """One decision at each of so many states; climbed as in `optimize_flops`."""
    sampling = sampling_flops(args, obs_dim, action_dim, states, args.num_samples)
    return sampling + optimize_flops(args, obs_dim, action_dim, states, climbed=climbed)


def distill_flops(args, obs_dim: int, action_dim: int, updates: int, num_states: int, climbed=None) -> float:
    """Distilling updates, after drawing candidates at the distinct ones of their states.

    num_states: how many there are to choose from; climbed: as in `optimize_flops`.
    """
    drawn = updates * args.batch_size
    sampling = sampling_flops(args, obs_dim, action_dim, distinct(drawn, num_states), args.num_samples)
    optimizing = optimize_flops(args, obs_dim, action_dim, drawn, args.distill_data_actions, climbed)
    return sampling + optimizing + updates * policy_update_flops(args, obs_dim, action_dim, args.batch_size)


def online_flops(
    args, obs_dim: int, action_dim: int, steps: int, num_states: int, climbed=None, in_targets=None
) -> float:
    """A round online of so many environment steps: distilling, candidates for the critic's states, critic updates.

    climbed, in_targets: as in `optimize_flops`, when distilling and in the critic's targets.
    """
    num_distill, num_critic = updates_of_round(args, steps)
    # Cal-QL looks at s and s', RLPD at s' alone, IQL at no candidates
    looks = 0 if hasattr(args, "expectile") else 2 if hasattr(args, "cql_actions") else 1
    states = distinct(looks * num_critic * args.batch_size, num_states)
    sampling = sampling_flops(args, obs_dim, action_dim, states, args.num_samples)
    critic = num_critic * critic_update_flops(args, obs_dim, action_dim, in_targets)
    return sampling + critic + distill_flops(args, obs_dim, action_dim, num_distill, num_states, climbed)


def updates_of_round(args, steps: int) -> tuple[int, int]:
    """Distilling and critic updates after so many environment steps, at least one of each."""
    return max(1, round(steps * args.distill_ratio)), max(1, round(steps * args.utd))


def distinct(draws: int, population: int) -> int:
    """How many different ones are expected among so many uniform draws."""
    return round(population * (1 - (1 - 1 / population) ** draws))


def phase_flops(args, obs_dim: int, action_dim: int, num_states: int, episode: int) -> dict[str, float]:
    """A whole run, by phase. action_dim: of all steps of a chunk; num_states: distinct ones of the data; episode:
    environment steps of one.

    Empty for what is not counted here: a policy or a critic of images, somebody's own, a baseline's.
    """
    has_steps = is_flow(args) or hasattr(args, "diffusion_steps")
    known = has_steps and hasattr(args, "policy_hidden") and hasattr(args, "policy_blocks")
    if not (hasattr(args, "num_gradient_steps") and (known or is_transformer(args))):
        return {}
    sizes = obs_dim, action_dim
    some = None if args.climb_all or args.plain else min(args.num_keep, args.climb_first or USUALLY_CLIMB)
    # where only the best is wanted: in the critic's targets, and when acting and distilling (taken to be alike)
    in_targets = None if getattr(args, "sample_backup", True) else some
    climbed = some if args.greedy_rollouts else None
    flops = {"cloning": args.num_cloning_steps * policy_update_flops(args, *sizes, args.cloning_batch_size)}
    if hasattr(args, "num_offline_steps"):
        flops["offline"] = args.num_offline_steps * critic_update_flops(args, *sizes, in_targets)
        if hasattr(args, "distill_every"):  # IQL
            updates = round(args.distill_every * args.distill_ratio)
            rounds = (
                args.num_offline_steps * (1 - args.distill_after) / args.distill_every * (args.extraction == "parl")
            )
            flops["offline"] += rounds * distill_flops(args, *sizes, updates, num_states, climbed)
        else:
            flops["caching"] = sampling_flops(args, *sizes, num_states, args.num_samples)
    acting = math.ceil(episode / args.chunk) * acting_flops(args, *sizes, 1, climbed)
    flops["online"] = args.num_online_episodes * (
        acting + online_flops(args, *sizes, episode, num_states, climbed, in_targets)
    )
    return flops


def forecast(flops: dict[str, float], measured: dict[str, float], phase: str, device: str = "cpu") -> str:
    """A line on what all phases of a run take: as measured, the others by their arithmetic at the rate of `phase`.

    measured: seconds of the phases so far, `phase` among them; of a phase whose arithmetic is not counted the line says
    these alone. device: its type. Evaluations are not counted; online episodes are taken to be as long as the data's
    longest trajectory until some were seen.
    """
    if not flops.get(phase):
        return f"on this machine this phase ({phase}) takes about {duration(measured[phase])}"
    rate = measured[phase] / flops[phase]
    times = {name: measured.get(name, rate * work) for name, work in flops.items()}
    up_to = {"online": "at most "} if "online" not in measured else {}
    parts = ", ".join(f"{name} {up_to.get(name, '')}{duration(time)}" for name, time in times.items() if time > 0)
    line = f"on this machine the whole run takes about {duration(sum(times.values()))} ({parts})"
    if sum(times.values()) > DAY:
        gpu = ", the paper's sizes are for a GPU (--device cuda)" if device == "cpu" else ""
        line += f": more than a day; --preset laptop is sized for two cores{gpu}"
    return line


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    for unit, size in (("days", DAY), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def processor() -> str:
    """The name of this machine's processor, or its kind where the system does not tell the name."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
