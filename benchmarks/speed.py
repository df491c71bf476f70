"""How fast a script's phases are, how much memory they take, and how near they come to the machine's float32 peak.

    python benchmarks/speed.py --case antmaze                            # the paper's AntMaze sizes, random data
    python benchmarks/speed.py --case all --seconds 30 --json speed.json
    python benchmarks/speed.py --script parl_transformer_calql --case antmaze
    python benchmarks/speed.py --preset kitchen --obs-dim 59 --action-dim 9 --device cuda
    python benchmarks/speed.py --device cuda --compile                   # updates as --compile makes them
    python benchmarks/speed.py --script parl_openvla_real --case tiny    # its own cases, see vla/timing.py
    python benchmarks/speed.py --profile "critic update"                 # what that phase spends its time on
    python benchmarks/speed.py --against ../before --phase acting        # was it worth it? this checkout and another
    python benchmarks/speed.py --case cube --against . --matmul-precision medium   # and bfloat16, against float32

The peak is measured in the same run, between the phases: the best rate of square float32 `torch.mm`s, since a shared
machine's peak changes by the minute. Where "cpu use" (CPU time over time and threads) is far below 1 on a CPU,
something else was running, and the share of the peak is too low by as much: the peak is a best of short products, which
escape it. GFLOP counts what the mathematics needs and nothing that is computed twice, so a script gains nothing by
doing work that it could leave out. Of a state's candidates those count that were climbed, a column of its own; where a
script leaves out those that cannot become the best, how many stay is a matter of the critic, here a random one. Every
case is a process of its own: its peak memory and its time to the first update, imports included, are those of that case
alone.

A script can be measured if it has the functions and classes in NEEDED, with the arguments of the five scripts: a
diffusion, a flow or a transformer policy, and the critic of Cal-QL, IQL or RLPD. Of each: cloning, drawing candidates,
critic update, distilling, a whole round online (all but its episode), and acting, on one state and on as many as an
evaluation has at a time. The transformer's candidates are drawn once more in the naive way, without its cache of keys
and values and with the observation repeated for every sample.

--against times two checkouts, a turn of the one and a turn of the other, so that what else the machine does slows both
alike: the ratio of their medians says more than two tables do. Both are timed by this file, each in a process that
imports script and harness from its own checkout. Where a script has not what a phase needs, that phase is "not there".
The same checkout twice shows how far from 1 a ratio comes by chance. Where the ratio is not between the quartiles of
those within each turn, the machine was too restless for so few --seconds.
"""

import time

START = time.perf_counter()  # before the imports: they are part of the time to the first update

import contextlib  # noqa: E402
import copy  # noqa: E402
import dataclasses  # noqa: E402
import functools  # noqa: E402
import importlib.util  # noqa: E402
import inspect  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import pathlib  # noqa: E402
import resource  # noqa: E402
import signal  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable, Iterable  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Literal  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Of this checkout, also where the scripts and their harness are another's
COST = importlib.util.spec_from_file_location("cost", ROOT / "benchmarks" / "cost.py")
cost = importlib.util.module_from_spec(COST)
COST.loader.exec_module(cost)
ROWS, EPISODE = 20_000, 100  # random data: transitions, and how many a trajectory has
RELEASE_GFLOPS = 197.0  # float32 peak of the two cores on which the release's times below were taken (README, Speed)
NEEDED = (
    "Args", "PRESETS", "ReplayBuffer", "Critic", "policy_update", "critic_update", "distill",
    "refresh_candidates", "optimize", "optimize_actions", "local_optimization", "select_actions",
)  # fmt: skip

ANTMAZE = dict(
    ensemble_size=10, critic_hidden=(256, 256, 256, 256), batch_size=256, num_samples=32, num_keep=10,
    num_gradient_steps=10,
)  # fmt: skip
# preset, sizes, fields of the script's Args set on top; batches of cloning ((): the preset's); the release's seconds
CASES: dict[str, dict] = {
    "antmaze": dict(
        preset="antmaze", obs_dim=29, action_dim=8, fields=ANTMAZE, cloning=(256, 1024),
        release={"offline critic update": 9.61, "cloning, batch 256": 0.0287},
    ),
    "small-critic": dict(
        preset="antmaze", obs_dim=29, action_dim=8, fields=ANTMAZE | dict(ensemble_size=2, critic_hidden=(256, 256)),
        cloning=(256, 1024), release={"cloning, batch 256": 0.0287},
    ),
    "quickstart": dict(preset="pointmaze", obs_dim=4, action_dim=2, fields={}, cloning=(), release={}),
    "kitchen": dict(preset="kitchen", obs_dim=59, action_dim=9, fields={}, cloning=(), release={}),
    "cube": dict(preset="laptop-chunk", obs_dim=28, action_dim=5, fields={}, cloning=(), release={}),
}  # fmt: skip
VLA, VLA_CASES = "parl_openvla_real", ("tiny", "openvla-7b")


@dataclass
class Options:
    """Updates per second of each phase of a script, its memory, and its share of the machine's float32 peak."""

    script: str = "parl_diffusion_calql"  # a script of this repository, by name
    case: str = ""  # antmaze, small-critic, quickstart, kitchen or all; antmaze unless --preset is given
    preset: str = ""  # instead of a case: one of the script's presets, with --obs-dim and --action-dim
    obs_dim: int = 0  # with --preset: numbers in an observation
    action_dim: int = 0  # with --preset: numbers in an action
    device: str = "auto"  # auto: the GPU if there is one
    threads: int = 0  # CPU threads, 0: all cores this process may use
    seconds: float = 10.0  # measuring time of a phase, on each side; three repetitions, five turns, are made at least
    phase: str = ""  # only the phases that have this in their names
    against: str = ""  # folder of another checkout: time it and this one in turn, and print the ratio by phase
    profile: str = ""  # instead of the table: where the time goes in the phases that have this in their names
    json: str = ""  # write the measurements to this file as well
    compile: bool = False  # time the updates as the script's --compile yes makes them
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # the scripts' flag; --against is at the highest


# --- WHAT IS MEASURED ---


def random_dataset(obs_dim: int, action_dim: int):
    """ROWS transitions of noise in trajectories of EPISODE rows; a reward of 1 in one row of a hundred."""
    from benchmarks.tasks.dataset import Dataset

    rng = np.random.default_rng(0)
    states = rng.standard_normal((ROWS // EPISODE, EPISODE + 1, obs_dim), dtype=np.float32)
    return Dataset(
        observations=states[:, :-1].reshape(ROWS, obs_dim), next_observations=states[:, 1:].reshape(ROWS, obs_dim),
        actions=rng.uniform(-1, 1, (ROWS, action_dim)).astype(np.float32),
        rewards=(rng.random(ROWS) < 0.01).astype(np.float32),
        terminals=np.zeros(ROWS, bool), timeouts=np.arange(1, ROWS + 1) % EPISODE == 0, source="random",
    )  # fmt: skip


def build(script, args, obs_dim: int, action_dim: int, device) -> SimpleNamespace:
    """Buffer, networks and optimizers as the script's main() builds them; candidates are uniform noise."""
    dataset = random_dataset(obs_dim, action_dim)
    buffer = script.ReplayBuffer(dataset, args, device)
    buffer.candidates.uniform_(-1, 1)
    action_dim = buffer.candidates.shape[2]
    if cost.is_transformer(args):
        sizes = args.policy_bins, args.policy_layers, args.policy_width, args.policy_heads
        policy = script.TransformerPolicy(obs_dim, action_dim, *sizes).to(device)
    else:
        sizes = cost.policy_steps(args), args.policy_hidden, args.policy_blocks
        Policy = script.FlowPolicy if cost.is_flow(args) else script.DiffusionPolicy
        policy = Policy(obs_dim, action_dim, *sizes, dropout=args.policy_dropout).to(device)
    num_bins, q_min = args.num_bins if args.critic_loss == "hl_gauss" else 1, args.reward_min / (1 - args.discount)
    critic = script.Critic(obs_dim, action_dim, args.critic_hidden, args.ensemble_size, num_bins, q_min).to(device)
    # IQL's value, which its critic_update takes before the optimizer
    values = [script.Critic(obs_dim, 0, args.critic_hidden, 1, 1).to(device)] if hasattr(args, "expectile") else []
    parameters = [p for network in (critic, *values) for p in network.parameters()]
    return SimpleNamespace(
        buffer=buffer, policy=policy, ema_policy=copy.deepcopy(policy).requires_grad_(False).eval(),
        critic=critic, target_critic=copy.deepcopy(critic).requires_grad_(False), values=values,
        policy_optimizer=torch.optim.Adam(policy.parameters(), args.policy_lr, fused=True),
        critic_optimizer=torch.optim.Adam(parameters, args.critic_lr, fused=True),
    )  # fmt: skip


def critic_step(script, net, args, rows) -> None:
    networks = net.critic, net.target_critic, *net.values, net.critic_optimizer
    script.critic_update(*networks, net.buffer, rows, args)


def clone_step(script, net, args, batch: int) -> None:
    buffer = net.buffer
    rows = buffer.sample_index((1, batch))[0]
    states = buffer.obs_index[rows]
    # another checkout (--against) may be older than chunks
    actions = buffer.data_actions(states) if hasattr(buffer, "data_actions") else buffer.actions[rows]
    script.policy_update(
        net.policy, net.ema_policy, net.policy_optimizer, buffer.states[states], actions, args.policy_ema
    )


def distill_round(script, net, args, updates: int) -> None:
    """Distilling updates as in an online round: candidates drawn anew, annotated, cloned."""
    networks = net.policy, net.ema_policy, net.policy_optimizer, net.critic
    script.distill(*networks, net.buffer, updates, args.greedy_rollouts, args)


def online_round(script, net, args, steps: int) -> None:
    """What main() does after an episode: distill, refresh the states of the coming critic updates, and update."""
    buffer, (num_distill, num_critic) = net.buffer, cost.updates_of_round(args, steps)
    distill_round(script, net, args, num_distill)
    index = buffer.sample_index((num_critic, args.batch_size))
    if not net.values:
        seen = [buffer.obs_index[index]] if hasattr(args, "cql_actions") else []
        states = torch.cat([*seen, buffer.next_index[index]]).unique()
        script.refresh_candidates(net.ema_policy, buffer, states)
    for rows in index:
        critic_step(script, net, args, rows)


def act(script, net, args, obs) -> torch.Tensor:
    """What main() does at each environment step, and an evaluation at each step of its environments: (B, O) -> (B, A).

    Where a script's `optimize` can leave out candidates that cannot win, it may do so for actions that are not drawn.
    """
    can_leave_out = "best_only" in inspect.signature(script.optimize).parameters
    how = {"best_only": args.greedy_rollouts} if can_leave_out else {}
    actions, q = script.optimize(net.critic, obs, net.ema_policy.sample(obs, args.num_samples), args, **how)
    return script.select_actions(actions, q, args.greedy_rollouts)


@torch.no_grad()
def naive_sample(policy, obs, num_samples: int) -> torch.Tensor:
    """What TransformerPolicy.sample does, the way one writes it first: for every token the whole sequence of every
    sample again, the observation repeated. obs (B, O) -> (B n, A)."""
    obs = obs.repeat_interleave(num_samples, 0)
    tokens = torch.zeros(len(obs), 0, dtype=torch.long, device=obs.device)
    for i in range(policy.action_dim):
        x = torch.cat([policy.observation(obs)[:, None], policy.embedding(tokens)], 1) + policy.position[: i + 1]
        for block in policy.blocks:
            x = block(x)
        probabilities = torch.softmax(policy.head(policy.norm(x[:, -1])), -1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1)], 1)
    return policy.centers[tokens]


@dataclass
class Phase:
    """One line of the table."""

    name: str
    unit: str  # what is counted
    count: int  # how many of it a call does
    flops: Callable[[float | None], float]  # operations that a call needs, given how many climbed (`optimize_flops`)
    call: Callable[[], object]


def phases(script, net, args, case: dict, steps: int) -> list[Phase]:
    """What is measured of a script, in the order of the table.

    steps: environment steps of a round online, and updates of a call of distilling.
    """
    states = net.buffer.states
    sizes = states.shape[1], net.buffer.candidates.shape[2]
    cached = torch.arange(256 if states.device.type == "cpu" else 4096, device=states.device)
    few, at_once = states[: len(cached) // 4], evaluated_at_once(args)
    critic = "offline critic update" if hasattr(args, "num_offline_steps") else "critic update"
    cloning = [
        Phase(f"cloning, batch {batch}", "update", 1,
              lambda _, batch=batch: cost.policy_update_flops(args, *sizes, batch),
              lambda batch=batch: clone_step(script, net, args, batch))
        for batch in case["cloning"] or (args.cloning_batch_size,)
    ]  # fmt: skip
    naively = [
        Phase("caching, naively", "state", len(few),
              lambda _: cost.sampling_flops(args, *sizes, len(few), args.num_samples),
              lambda: naive_sample(net.ema_policy, few, args.num_samples))
    ]  # fmt: skip
    return [
        *cloning,
        Phase("caching", "state", len(cached),
              lambda _: cost.sampling_flops(args, *sizes, len(cached), args.num_samples),
              lambda: script.refresh_candidates(net.ema_policy, net.buffer, cached)),
        *(naively if cost.is_transformer(args) else []),
        Phase(critic, "update", 1, lambda climbed: cost.critic_update_flops(args, *sizes, climbed),
              lambda: critic_step(script, net, args, net.buffer.sample_index((1, args.batch_size))[0])),
        Phase("distilling", "update", steps,
              lambda climbed: cost.distill_flops(args, *sizes, steps, len(states), climbed),
              lambda: distill_round(script, net, args, steps)),
        Phase("online: distill + critic", "env step", steps,
              lambda climbed: cost.online_flops(args, *sizes, steps, len(states), climbed, climbed),
              lambda: online_round(script, net, args, steps)),
        Phase("online: acting", "decision", 1, lambda climbed: cost.acting_flops(args, *sizes, 1, climbed),
              lambda: act(script, net, args, states[:1])),
        Phase(f"evaluation: acting, {at_once}", "decision", at_once,
              lambda climbed: cost.acting_flops(args, *sizes, at_once, climbed),
              lambda: act(script, net, args, states[:at_once])),
    ]  # fmt: skip


@contextlib.contextmanager
def counting_climbed(script):
    """Yields a function that says how many of a state's candidates climbed, a mean over the states seen since; or None.

    Seen are the arguments of the script's `optimize_actions`, and of `local_optimization` as called there: it may be
    given only some of the candidates, each as a state of its own. (What is climbed to be measured is not counted.)
    """
    whole, climb = script.optimize_actions, script.local_optimization
    seen = {"states": 0, "climbed": 0, "inside": False}

    def optimize_actions(critic, obs, *rest, **more):
        seen["states"], seen["inside"] = seen["states"] + len(obs), True
        try:
            return whole(critic, obs, *rest, **more)
        finally:
            seen["inside"] = False

    def local_optimization(critic, obs, actions, *rest, **more):
        seen["climbed"] += seen["inside"] * actions.shape[0] * actions.shape[1]
        return climb(critic, obs, actions, *rest, **more)

    script.optimize_actions, script.local_optimization = optimize_actions, local_optimization
    try:
        yield lambda: seen["climbed"] / seen["states"] if seen["states"] else None
    finally:
        script.optimize_actions, script.local_optimization = whole, climb


def evaluated_at_once(args) -> int:
    """Environments that an evaluation steps at a time, as the harness makes them: all, or two for each core."""
    return min(args.eval_episodes, 2 * cores()) if args.eval_processes else args.eval_episodes


# --- MEASURING ---


def timed(function, device) -> float:
    """Seconds of one call, the device's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def repeat(function, seconds: float, device) -> list[float]:
    """Seconds per call, of at least three repetitions after a warm-up; a repetition is calls enough for 0.05 s."""
    warm_up = [timed(function, device)]
    while sum(warm_up) < min(0.5, seconds) and len(warm_up) < 20:
        warm_up.append(timed(function, device))
    calls, times = max(1, round(0.05 / min(warm_up))), []
    while len(times) < 3 or sum(times) * calls < seconds:
        times.append(timed(lambda: [function() for _ in range(calls)], device) / calls)
    return times


def peak_gflops(seconds: float, device) -> float:
    """Best of float32 matrix products, in GFLOP/s: 1024 and 2048 square on a CPU, 8192 on a GPU, so long for each."""
    best = 0.0
    for n in (8192,) if device.type == "cuda" else (1024, 2048):
        product = functools.partial(torch.mm, *torch.rand(2, n, n, device=device), out=torch.empty(n, n, device=device))
        times = [timed(product, device), timed(product, device)]
        while sum(times) < seconds:
            times.append(timed(product, device))
        best = max(best, 2 * n**3 / min(times) / 1e9)
    return best


def peak_memory(device) -> float:
    """GB: on a GPU, of tensors since the last reset; on a CPU, of the whole process so far (0.05 are peak_gflops's)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def arguments(script, case: dict, options: Options, device):
    """The script's Args of a case; what it has no flag for is left out. Sets the precision of matrix products."""
    torch.set_float32_matmul_precision(options.matmul_precision)
    if case["preset"] not in script.PRESETS:
        fail(f"{script.__name__} has no preset {case['preset']!r}; it has {', '.join(script.PRESETS)}")
    known = {field.name for field in dataclasses.fields(script.Args)}
    fields = case["fields"] | {"matmul_precision": options.matmul_precision}
    fields = {name: value for name, value in fields.items() if name in known}
    below = script.PRESETS["laptop"] if case["preset"].startswith("laptop") else {}  # as parse_args lays them
    fields = below | script.PRESETS[case["preset"]] | fields
    args = script.Args(**fields | {"preset": case["preset"], "device": str(device)})
    if options.matmul_precision != "highest" and args.num_gradient_steps:
        fail(f"--matmul-precision {options.matmul_precision} is for what only ranks, as --case cube; this case climbs")
    return args


def steps_of_round(args, case: dict, seconds: float, peak: float) -> int:
    """Environment steps of a round online: 8 where three such rounds take, at the peak rate, no longer than asked for,
    else 1. An episode has more, but with more its updates would share states of the random data, as they seldom do in a
    real one's."""
    flops = cost.online_flops(args, case["obs_dim"], case["action_dim"], 8, ROWS + ROWS // EPISODE)
    return 8 if 3 * flops / 1e9 / peak < seconds else 1


def measure(options: Options, case: dict, device) -> dict:
    """All phases of one case."""
    script = load_script(options.script)
    args = arguments(script, case, options, device)
    torch.manual_seed(0)
    net = build(script, args, case["obs_dim"], case["action_dim"], device)
    if options.compile:
        args = dataclasses.replace(args, compile="yes")
        net.policy.loss, script.critic_update = script.compiled(args, device, net.policy.loss, script.critic_update)
    timed(lambda: critic_step(script, net, args, net.buffer.sample_index((1, args.batch_size))[0]), device)
    result = {"first_update_seconds": time.perf_counter() - START, "peak_memory_gb": peak_memory(device), "phases": []}

    result["load_before"] = os.getloadavg()[0]
    peaks = [peak_gflops(min(0.5, options.seconds), device)]
    steps = steps_of_round(args, case, options.seconds, peaks[0])
    there = {phase.name: phase for phase in phases(script, net, args, case, steps)}
    for phase in [there[name] for name in named(options.phase, there)]:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        wall, cpu = time.perf_counter(), time.process_time()
        with counting_climbed(script) as climbed:
            times = [seconds / phase.count for seconds in repeat(phase.call, options.seconds, device)]
        cpu_use = (time.process_time() - cpu) / (time.perf_counter() - wall) / torch.get_num_threads()
        result["peak_memory_gb"] = max(result["peak_memory_gb"], peak_memory(device))
        peaks.append(peak_gflops(min(0.5, options.seconds), device))
        result["phases"].append({"phase": phase.name, "unit": phase.unit, "seconds": statistics.median(times),
                                 "gflop": phase.flops(climbed()) / phase.count / 1e9, "climbed": climbed(),
                                 "cpu_use": cpu_use, "repetitions": times})  # fmt: skip
    peak = statistics.median(peaks)
    for phase in result["phases"]:
        phase["share_of_peak"] = phase["gflop"] / phase["seconds"] / peak
        if phase["phase"] in case["release"] and options.script == "parl_diffusion_calql":
            release = case["release"][phase["phase"]] * RELEASE_GFLOPS
            phase["times_the_release"] = release / (phase["seconds"] * peak)
    by_name = {phase["phase"]: phase for phase in result["phases"]}
    if {"caching", "caching, naively"} <= set(by_name):
        by_name["caching"]["times_naive"] = by_name["caching, naively"]["seconds"] / by_name["caching"]["seconds"]
    return result | {"peak_gflops": peak, "peaks": peaks, "load_after": os.getloadavg()[0]}


def named(text: str, names: Iterable[str]) -> list[str]:
    """Those that have the text in them, of which there must be one."""
    if not any(text in name for name in names):
        fail(f"no phase has {text!r} in its name; there are {'; '.join(names)}")
    return [name for name in names if text in name]


# --- TWO CHECKOUTS IN TURN ---


class NotThere(Exception):
    """A checkout's script has not what a phase needs."""


def compare(options: Options, device) -> dict:
    """Time the phases of one case in this checkout and in the other, and print a line for each."""
    roots = [ROOT, pathlib.Path(options.against).resolve()]
    for root in roots:
        find_script(options.script, root)
    name, case = case_of(options)
    result = {"script": options.script, "case": name or "own sizes", "machine": machine(options, device),
              "sides": [f"{root}{version(root)}" for root in roots], "phases": []}  # fmt: skip
    start = dict(options=vars(options), device=str(device), threads=torch.get_num_threads(),
                 peak=peak_gflops(min(0.5, options.seconds), device))  # fmt: skip
    program = [sys.executable, "-B", __file__, "--side"]  # -B: another checkout is left as it is
    sides = [
        (root, subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)) for root in roots
    ]
    try:
        this = ask(sides[0], start | {"root": str(roots[0]), "steps": 0})
        plain = vars(options) | {"matmul_precision": "highest"}
        other = ask(sides[1], start | {"options": plain, "root": str(roots[1]), "steps": this["steps"]})
        result["settings_that_differ"] = differences(this["settings"], other["settings"])
        print_heading(result, case)
        for name in named(options.phase, this["phases"] | other["phases"]):
            result["phases"].append(compare_phase(sides, [this, other], name, options.seconds))
            print_comparison(result["phases"][-1])
    finally:
        for _, process in sides:
            process.kill()
            process.communicate()
    print("times as fast: the other's median over this one's; quartiles: of the ratio within each turn of both")
    print_machine(result["machine"])
    return result


def compare_phase(sides, answers: list[dict], name: str, seconds: float) -> dict:
    """One phase of both sides, whose first answers are given; `not_there` says why where it cannot be compared."""
    unit, count = next(answer["phases"][name] for answer in answers if name in answer["phases"])
    phase = {"phase": name, "unit": unit}
    try:
        for (root, _), answer in zip(sides, answers):
            if name not in answer["phases"]:
                raise NotThere(f"{root}: {answer['missing'] or 'no such phase'}")
        turns = [[t / count for t in times] for times in in_turn(sides, name, seconds)]
    except NotThere as reason:
        return phase | {"not_there": str(reason)}
    this, other = zip(*turns)
    quartiles = statistics.quantiles([b / a for a, b in turns], n=4, method="inclusive")
    ratio = statistics.median(other) / statistics.median(this)
    return phase | {"this": this, "other": other, "times_as_fast": ratio, "quartiles": quartiles}


def in_turn(sides, name: str, seconds: float) -> list[list[float]]:
    """Seconds per call on this side and on the other, turn by turn, of at least five turns after a warm-up.

    A turn is the same number of calls on either side, enough for 0.05 s.
    """
    fewest = 2 * min(0.5, seconds)
    warm_up = [turn(sides, name, 1)]
    while sum(map(sum, warm_up)) < fewest and len(warm_up) < 20:
        warm_up.append(turn(sides, name, 1))
    calls, turns = max(1, round(0.05 / min(map(min, warm_up)))), []
    while len(turns) < 5 or calls * sum(map(sum, turns)) < 2 * seconds:
        turns.append(turn(sides, name, calls))
    return turns


def turn(sides, name: str, calls: int) -> list[float]:
    """Seconds per call of a phase on the one side, then on the other."""
    answers = [ask(side, [name, calls]) for side in sides]
    missing = [f"{root}: {answer['missing']}" for (root, _), answer in zip(sides, answers) if "missing" in answer]
    if missing:
        raise NotThere("; ".join(missing))
    return [answer["seconds"] for answer in answers]


def ask(side, question) -> dict:
    """What one side, (root, process), answers; the program ends where it cannot go on."""
    root, process = side
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        fail(f"{root}: the process that measures it ended (exit code {process.wait()})")
    answer = json.loads(line)
    if "error" in answer:
        fail(f"{root}: {answer['error']}")
    return answer


def serve() -> None:
    """One side of --against: answers each line of standard input, JSON both ways, until there are no more.

    The first says root, options, device, threads, peak and steps (0: decided here), and is answered by phases (name:
    unit and how many of it a call does), settings, steps and, where there are no phases, what is missing. The others
    are [phase, calls], answered by seconds per call or by what is missing. An error is answered to any of them.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a script prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that asks,
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # without which this one ends

    def answer(**fields):
        answers.write(json.dumps(fields, default=str) + "\n")

    start = json.loads(sys.stdin.readline())
    options, device, steps = Options(**start["options"]), torch.device(start["device"]), start["steps"]
    torch.set_num_threads(start["threads"])
    case, there, missing, last = case_of(options)[1], {}, "", None
    try:
        script = load_script(options.script, pathlib.Path(start["root"]), ("Args", "PRESETS"))
        args = arguments(script, case, options, device)
    except (Exception, SystemExit) as error:  # whatever another checkout's script does when it is imported
        return answer(error=in_a_line(error))
    try:
        torch.manual_seed(0)
        net = build(script, args, case["obs_dim"], case["action_dim"], device)
        steps = steps or steps_of_round(args, case, options.seconds, start["peak"])
        there = {phase.name: phase for phase in phases(script, net, args, case, steps)}
    except (AttributeError, TypeError) as error:
        missing = in_a_line(error)
    about = {phase.name: (phase.unit, phase.count) for phase in there.values()}
    answer(phases=about, settings=vars(args), steps=steps or 1, missing=missing)
    for line in sys.stdin:
        name, calls = json.loads(line)
        if name != last:  # both sides draw the same numbers
            torch.manual_seed(0)
        phase, last = there[name], name
        try:
            answer(seconds=timed(lambda phase=phase, calls=calls: [phase.call() for _ in range(calls)], device) / calls)
        except (AttributeError, TypeError) as error:
            answer(missing=in_a_line(error))
        except Exception as error:
            answer(error=f"{name}: {in_a_line(error)}")


def in_a_line(error: BaseException) -> str:
    """The first line of an error, with its kind unless it is one of `fail`'s."""
    first = (str(error).splitlines() or [""])[0]
    return first.removeprefix("error: ") if isinstance(error, SystemExit) else f"{type(error).__name__}: {first}"


def differences(this: dict, other: dict) -> list[str]:
    """Settings of two sides that are not the same."""
    told = [(name, this.get(name, "not there"), other.get(name, "not there")) for name in this | other]
    return [f"{name} {mine} here, {theirs} in the other" for name, mine, theirs in told if mine != theirs]


def version(root: pathlib.Path) -> str:
    """The commit of a checkout, and whether its files are others; nothing where git does not tell."""
    if not (root / ".git").exists():
        return ""
    git = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True)
    try:
        commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except OSError:
        return ""
    return f", commit {commit}{' and changes' if changed else ''}" if commit else ""


# --- PROFILING ---


def profile(options: Options, case: dict, device, rows: int = 12) -> None:
    """Print which operations take most of the CPU time of each phase named by --profile, without what they call.

    On one thread, since the profiler sees only the thread that starts it. It makes every operation a few microseconds
    slower, so what consists of many small ones looks slower than it is. On a GPU this is the time spent on launching.
    """
    script = load_script(options.script)
    args = arguments(script, case, options, device)
    torch.manual_seed(0)
    net = build(script, args, case["obs_dim"], case["action_dim"], device)
    there = {phase.name: phase for phase in phases(script, net, args, case, steps=1)}
    for phase in [there[name] for name in named(options.profile, there)]:
        phase.call()
        calls = min(100, max(1, round(min(1.0, options.seconds) / timed(phase.call, device))))
        with torch.profiler.profile() as profiler:
            for _ in range(calls):
                with torch.profiler.record_function("Python, and waiting"):
                    phase.call()
        entries = sorted(profiler.key_averages(), key=lambda entry: -entry.self_cpu_time_total)
        total = sum(entry.self_cpu_time_total for entry in entries)
        print(f"\n{options.script}, preset {case['preset']}: {phase.name}, {phase.count} x {phase.unit}, on one thread")
        print(f"{total / calls / 1e3:.3g} ms under the profiler, mean of {calls}; of these")
        for entry in entries[:rows]:
            own, count = entry.self_cpu_time_total, entry.count / calls
            print(f"{own / total:7.1%}{own / calls / 1e3:10.3g} ms in{count:7.4g} x {entry.key}", flush=True)


# --- TELLING ---


def machine(options: Options, device) -> dict:
    """What it ran on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    cpu = cost.processor()
    return {"cpu": cpu, "gpu": gpu, "cores": cores(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def print_result(result: dict) -> None:
    """The table of one case."""
    peaks = result["peaks"]
    print(f"\n{result['script']}, {result['case']}: preset {result['preset']}, observation {result['obs_dim']}, "
          f"action {result['action_dim']}, random data")  # fmt: skip
    print(f"{'':25}{'one':>9}{'median':>10}{'fastest':>10}{'per second':>12}{'climbed':>9}{'GFLOP':>9}{'of peak':>9}"
          f"{'cpu use':>9}")  # fmt: skip
    for p in result["phases"]:
        times = [readable(t) for t in (p["seconds"], min(p["repetitions"]))]
        release = ""
        if "times_the_release" in p:
            release = f"   {p['times_the_release']:.2f} times the release at the same peak"
        if "times_naive" in p:
            release = f"   {p['times_naive']:.2f} times the naive way"
        climbed = "" if p["climbed"] is None else f"{p['climbed']:.3g}"
        print(f"{p['phase']:25}{p['unit']:>9}{times[0]:>10}{times[1]:>10}{1 / p['seconds']:12.4g}{climbed:>9}"
              f"{p['gflop']:9.4g}{p['share_of_peak']:9.0%}{p['cpu_use']:9.0%}{release}")  # fmt: skip
    print(f"time to the first update {result['first_update_seconds']:.1f} s (imports, networks, one critic update); "
          f"peak memory {result['peak_memory_gb']:.2f} GB")  # fmt: skip
    load = f"load average {result['load_before']:.1f} before, {result['load_after']:.1f} after"
    print(f"peak of float32 torch.mm {result['peak_gflops']:.0f} GFLOP/s: median of {len(peaks)}, "
          f"from {min(peaks):.0f} to {max(peaks):.0f}; {load}")  # fmt: skip
    print_machine(result["machine"])


def print_heading(result: dict, case: dict) -> None:
    """What is above the table of two checkouts."""
    print(f"\n{result['script']}, {result['case']}: preset {case['preset']}, observation {case['obs_dim']}, "
          f"action {case['action_dim']}, random data")  # fmt: skip
    print(f"this:  {result['sides'][0]}\nother: {result['sides'][1]}")
    if result["settings_that_differ"]:
        print(f"settings that differ: {'; '.join(result['settings_that_differ'])}")
    print(f"{'':25}{'one':>9}{'this':>10}{'other':>10}{'times as fast':>15}{'quartiles':>18}{'turns':>7}", flush=True)


def print_comparison(p: dict) -> None:
    """A line of that table."""
    if "not_there" in p:
        return print(f"{p['phase']:25}{p['unit']:>9}   not there in {p['not_there']}", flush=True)
    times = [readable(statistics.median(p[side])) for side in ("this", "other")]
    quartiles = " ".join(f"{ratio:.2f}" for ratio in p["quartiles"])
    print(f"{p['phase']:25}{p['unit']:>9}{times[0]:>10}{times[1]:>10}{p['times_as_fast']:15.2f}{quartiles:>18}"
          f"{len(p['this']):7}", flush=True)  # fmt: skip


def print_machine(m: dict) -> None:
    gpu = f"{m['gpu']}, " if m["gpu"] else ""
    print(f"{gpu}{m['cpu']}, {m['cores']} cores, {m['threads']} threads, torch {m['torch']}", flush=True)


def readable(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


# --- COMMAND LINE ---


def fail(message: str):
    """End the program with one line."""
    raise SystemExit(f"error: {message}")


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def find_script(name: str, root: pathlib.Path) -> str:
    """The script's name without `.py`: a file of that checkout named so, or by a path from its root."""
    name = name.removesuffix(".py")
    if not (root / f"{name}.py").is_file():
        there = ", ".join(sorted(path.stem for path in root.glob("parl_*.py")))
        fail(f"no script {name}.py in {root}; there is {there or 'none'}")
    return name


def load_script(name: str, root: pathlib.Path = ROOT, needed: tuple[str, ...] = NEEDED):
    """A checkout's script as a module, with its harness; one process can load those of one checkout only."""
    name = find_script(name, root)
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    script = importlib.import_module(name.replace("/", "."))
    missing = [name for name in needed if not hasattr(script, name)]
    if missing:
        fail(f"{name}.py cannot be measured: it has no {', '.join(missing)}")
    with contextlib.suppress(ImportError, AttributeError):  # another checkout may have none
        importlib.import_module("benchmarks.harness.fast_critic").keep_freed_memory()  # as the script's own main does
    return script


def check_options(options: Options) -> torch.device:
    """Refuse what cannot be measured; returns the device."""
    if options.script == VLA:
        others = options.preset, options.phase, options.against, options.profile, options.compile
        if any(others) or options.matmul_precision != "highest" or options.case not in VLA_CASES:
            fail(f"{VLA} has cases of its own, --case {' or '.join(VLA_CASES)}, and no other options")
        options = dataclasses.replace(options, case="")
    if options.case and options.preset:
        fail("give --case or --preset, not both")
    if options.case not in ("", "all", *CASES):
        fail(f"unknown --case {options.case!r}; there are {', '.join(CASES)} and all")
    if options.preset and (options.obs_dim < 1 or options.action_dim < 1):
        fail(f"--preset {options.preset} needs --obs-dim and --action-dim, both at least 1")
    if not options.preset and (options.obs_dim or options.action_dim):
        fail("--obs-dim and --action-dim go with --preset; a case has its own")
    if options.compile and (options.against or options.profile):
        fail("--compile goes with the table only: leave --against and --profile out")
    if options.against and options.profile:
        fail("give --against or --profile, not both")
    if options.against and not (pathlib.Path(options.against) / "benchmarks").is_dir():
        fail(f"--against {options.against}: that is no checkout of this project, it has no folder benchmarks")
    if options.profile and (options.phase or options.json or options.case == "all"):
        fail("--profile names its phases itself, is of one case and writes no file: leave --phase, --json and all out")
    if options.profile and options.threads > 1:
        fail("--profile sees one thread only: leave --threads out")
    if not 0 <= options.threads <= cores():
        fail(f"--threads {options.threads} must be between 1 and the {cores()} cores there are, or 0 for all of them")
    if not 0 < options.seconds < float("inf"):
        fail(f"--seconds {options.seconds} must be positive and finite")
    if options.json and not pathlib.Path(options.json).absolute().parent.is_dir():
        fail(f"--json {options.json}: there is no folder {pathlib.Path(options.json).absolute().parent}")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        fail(f"--device {options.device} cannot be used: {str(error).splitlines()[0]}")
    if torch.device(device).type not in ("cpu", "cuda"):
        fail(f"--device {options.device}: only cpu and cuda are measured")
    return torch.device(device)


def run_all(options: Options) -> list[dict]:
    """Every case, each in a process of its own."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in CASES:
            file = pathlib.Path(folder) / f"{name}.json"
            flags = ["--script", options.script, "--case", name, "--device", options.device, "--json", str(file),
                     "--threads", str(options.threads), "--seconds", str(options.seconds),
                     "--phase", options.phase, "--matmul-precision", options.matmul_precision,
                     *(["--compile"] if options.compile else [])]  # fmt: skip
            code = subprocess.run([sys.executable, __file__, *flags]).returncode
            if code:
                raise SystemExit(code)
            results += json.loads(file.read_text())
    return results


def measure_vla(options: Options, device) -> dict:
    script = load_script(VLA, needed=("OpenVLA", "VLAPolicy", "add_lora", "PixelCritic", "critic_update"))
    timing = importlib.import_module("benchmarks.vla.timing")
    result = timing.measure(script, options.case, device, lambda function: repeat(function, options.seconds, device))
    result |= {"machine": machine(options, device), "peak_memory_gb": peak_memory(device)}
    timing.print_table(result, result["peak_memory_gb"])
    return {"script": VLA} | result


def case_of(options: Options) -> tuple[str, dict]:
    """Name, "" for own sizes, and sizes of the one case that is asked for."""
    name = options.case or ("" if options.preset else "antmaze")
    own = {key: getattr(options, key) for key in ("preset", "obs_dim", "action_dim")}
    return name, CASES[name] if name else own | dict(fields={}, cloning=(), release={})


def main() -> None:
    options = tyro.cli(Options)
    device = check_options(options)
    torch.set_num_threads(1 if options.profile else options.threads or cores())
    if options.script == VLA:
        results = [measure_vla(options, device)]
    elif options.profile:
        return profile(options, case_of(options)[1], device)
    elif options.against:
        names = CASES if options.case == "all" else [options.case]
        results = [compare(dataclasses.replace(options, case=name), device) for name in names]
    elif options.case == "all":
        results = run_all(options)
    else:
        name, case = case_of(options)
        about = {"script": options.script, "case": name or "own sizes", "machine": machine(options, device)}
        sizes = {key: case[key] for key in ("preset", "obs_dim", "action_dim")}
        results = [about | sizes | measure(options, case, device)]
        print_result(results[0])
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--side"] else main()
