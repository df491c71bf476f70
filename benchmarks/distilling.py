"""What distilling does to success: of the policy alone, of its optimized actions, and of the cloned policy's.

    python parl_diffusion_calql.py --num-online-episodes 0 --runs runs            # clones, trains the critic, stops
    python -m benchmarks.distilling runs/<folder> --out frozen.csv                # distils in four ways from there
    python -m benchmarks.distilling runs/<folder> --online 20 --out online.csv    # or fine-tunes online in three
    python -m benchmarks.distilling runs/<folder> --unchosen --out unchosen.csv   # or teaches what nothing has chosen
    python -m benchmarks.distilling --widths --out widths.csv                     # how wide a sampler's samples are
    python -m benchmarks.distilling --draw frozen.png --title "default task" --csv a.csv b.csv

All ways start from the cloned policy and the critic of the run. The first four distil under a critic that never
changes, after a few online episodes of the optimized policy: with and without the data's own action among the
candidates (algorithm 1, line 3), on states uniform over all rows (equation 4.4) or half online. Whatever falls is the
policy's doing. The three of `--online` are phase 3 of the script: as it is, with the critic standing still (`--utd 0`),
and with the policy standing still (`--distill-ratio 0`). Those of `--unchosen` need no critic: the policy is taught one
sample of its own at each state of the data, or, to compare with, the data's action.

`--widths` needs no run: actions are normally distributed and the network is the one that the loss is least for, in
closed form. What differs between the width of the data and that of the samples is then the sampler's doing alone.

`alone` is success of the policy's samples, `ranked` that of the optimized policy, `cloned` that of the cloned policy's
samples optimized by the present critic, `spread` the standard deviation of 32 samples of a state (mean over dimensions
and 2,000 states of the buffer), `q` the critic's mean over the same samples. Online, `q_taken` is the critic's Q of the
actions of the episodes since the last measurement, as it was when they were taken, and `followed` the discounted return
that did follow them (paper, figure 14; of an episode that failed, what failing for ever is worth). `moved` is how far
an agent in a maze gets in 100 steps, in the maze's metres, by the policy's samples: the median over all such windows.
"""

import copy
import csv
import dataclasses
import itertools
import json
import pathlib
import types
from dataclasses import dataclass

import numpy as np
import torch
import tyro

import parl_diffusion_calql as script
import parl_flow_calql as flow
from benchmarks.evaluate import set_flags
from benchmarks.harness.cli import fail
from benchmarks.harness.datasets import set_up
from benchmarks.harness.fast_critic import FrozenCritic, sample_on_all_cores
from benchmarks.harness.rollouts import collect_episode, evaluate


@dataclass
class Options:
    """Distil from a run that was trained offline, under its critic or online, or draw what came of it."""

    run: tyro.conf.Positional[str] = ""  # folder of a finished run of parl_diffusion_calql.py without online episodes
    out: str = "distilling.csv"  # the table to write
    updates: int = 1_200  # distilling updates of each way
    every: int = 200  # updates between two measurements; with --online: episodes
    collect: int = 10  # online episodes beside the data
    online: int = 0  # fine-tune for so many episodes, in three ways, instead
    unchosen: bool = False  # teach the policy its own samples as they come, or the data's actions, instead
    widths: bool = False  # the width of the samples of a policy that has learned a normal distribution exactly, instead
    warmup: int = 0  # of these, episodes before the first distilling
    anchored: bool = False  # annotate samples of the cloned policy, always
    flags: tuple[str, ...] = ()  # of the script, over those of the run: --flags utd=4 distill_lr=1e-5
    ways: tuple[str, ...] = ()  # only the ways whose names hold one of these words
    episodes: int = 50  # episodes of a measurement
    greedy: bool = True  # teach the best candidate, else draws of equation 4.3
    draw: str = ""  # write this picture from tables instead
    title: str = ""  # its title
    csv: tuple[str, ...] = ()  # the tables, one for each seed


FROZEN = {
    f"{'with' if a else 'without'} a_data, {'mixed' if m else 'uniform'}": dict(distill_data_actions=a, distill_mixed=m)
    for a in (True, False)
    for m in (False, True)
}
ONLINE = {"both learn": {}, "the critic stands still": dict(utd=0), "the policy stands still": dict(distill_ratio=0)}

UNCHOSEN = {"its own samples": True, "the data's actions": False}


def load(options: Options):
    """The run: arguments, environments, buffer, cloned policy, its average, critic, target, a stand-in for its Run."""
    folder, path = options.run, pathlib.Path(options.run)
    if not (path / "checkpoint.pt").is_file():
        fail(f"{folder} is not the folder of a run: it has no checkpoint.pt")
    config = json.loads((path / "config.json").read_text())
    known = script.Args.__dataclass_fields__
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}
    config |= {"eval_episodes": options.episodes}
    args = script.Args(**config)
    set_flags(args, options.flags)
    device, env, envs, dataset = set_up(args, script.make_env, script.load_dataset)
    state = torch.load(path / "checkpoint.pt", map_location=device, weights_only=True)
    buffer = script.ReplayBuffer(dataset, args, device)
    obs_dim, action_dim = buffer.states.shape[1], buffer.candidates.shape[2]
    sizes = args.diffusion_steps, args.policy_hidden, args.policy_blocks
    how = dict(dropout=args.policy_dropout, clip=args.clip_steps)
    policy = script.DiffusionPolicy(obs_dim, action_dim, *sizes, **how).to(device)
    num_bins, q_min = args.num_bins if args.critic_loss == "hl_gauss" else 1, args.reward_min / (1 - args.discount)
    critic = script.Critic(obs_dim, action_dim, args.critic_hidden, args.ensemble_size, num_bins, q_min).to(device)
    policy.load_state_dict(state["modules"]["policy"])
    critic.load_state_dict(state["modules"]["critic"])
    average = copy.deepcopy(policy).requires_grad_(False).eval()
    average.load_state_dict(state["modules"]["ema_policy"])
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    target_critic.load_state_dict(state["modules"]["target_critic"])
    run = types.SimpleNamespace(args=args, device=device, check_stop=lambda: None)
    return args, env, envs, buffer, policy, average, critic, target_critic, run


def alone(policy):
    """A policy as it is: obs (B, O) -> (B, A), of all steps of a chunk."""
    return lambda obs: policy.sample(obs, 1)[:, 0]


def optimized(policy, critic, args):
    """pi^opt of a policy and a critic: obs (B, O) -> (B, A)."""

    def act(obs):
        actions, q = script.optimize(critic, obs, policy.sample(obs, args.num_samples), args, args.greedy_rollouts)
        return script.select_actions(actions, q, args.greedy_rollouts)

    return act


def sample_statistics(policy, critic, states) -> dict:
    samples = sample_on_all_cores(policy, states, 32)
    return {"spread": samples.std(1).mean().item(), "q": FrozenCritic(critic)(states, samples).mean().item()}


def keep(rows: list[dict], row: dict) -> None:
    rows.append(row)
    print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def chosen(ways: dict, options: Options) -> dict:
    found = {w: flags for w, flags in ways.items() if not options.ways or any(part in w for part in options.ways)}
    return found or fail(f"--ways {' '.join(options.ways)}: none of {list(ways)} holds one of these words")


def distil_under_frozen_critic(options: Options) -> list[dict]:
    args, env, envs, buffer, cloned, cloned_average, critic, _, run = load(options)
    torch.manual_seed(args.seed)
    for i in range(options.collect):
        seed = args.seed * 100_003 + 70_000 + i
        buffer.add(collect_episode(env, optimized(cloned_average, critic, args), seed, run)[0])
    states = buffer.states[torch.randperm(len(buffer.states))[:2_000]]
    rows = []
    for way, flags in chosen(FROZEN, options).items():
        args = dataclasses.replace(args, **flags)
        torch.manual_seed(args.seed)
        policy, average = copy.deepcopy(cloned), copy.deepcopy(cloned_average)
        optimizer = torch.optim.Adam(policy.parameters(), args.distill_lr)
        acts = {"alone": alone(average), "ranked": optimized(average, critic, args)}
        loss = float("nan")
        for done in itertools.count(0, options.every):
            row = {"seed": args.seed, "way": way, "updates": done, "loss": loss}
            row |= sample_statistics(average, critic, states)
            keep(rows, row | {name: evaluate(envs, act, run)["success_rate"] for name, act in acts.items()})
            if done >= options.updates:
                break
            modules = policy, average, optimizer, critic, buffer
            loss = script.distill(*modules, options.every, options.greedy, args)[1]["distill_loss"].item()
    return rows


def fine_tune(options: Options) -> list[dict]:
    """Phase 3 of the script from the run's cloned policy and critic, taken apart every few episodes."""
    rows = []
    for way, flags in chosen(ONLINE, options).items():
        args, env, envs, buffer, policy, average, critic, target_critic, run = load(options)
        args = run.args = dataclasses.replace(args, **flags)
        torch.manual_seed(args.seed)
        cloned = copy.deepcopy(average)
        policy_optimizer = torch.optim.Adam(policy.parameters(), args.distill_lr, fused=True)
        critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True)
        way += "" if options.greedy else ", draws taught"
        acts = {"alone": alone(average), "ranked": optimized(average, critic, args),
                "cloned": optimized(cloned, critic, args)}  # fmt: skip
        states = buffer.states[torch.randperm(len(buffer.states))[:2_000]]
        taken, followed, reached = [], [], []
        for done in range(options.online + 1):
            if done == 0 and rows:  # where all ways begin
                keep(rows, rows[0] | {"way": way})
            elif done % options.every == 0 or done == options.online:
                row = {"seed": args.seed, "way": way, "episodes": done} | sample_statistics(average, critic, states)
                for name, tensors in (("q_taken", taken), ("followed", followed)):
                    row[name] = torch.cat(tensors).mean().item() if tensors else float("nan")
                row["reached"] = float(np.mean(reached)) if reached else float("nan")
                taken, followed, reached = [], [], []
                keep(rows, row | {name: evaluate(envs, act, run)["success_rate"] for name, act in acts.items()})
            if done == options.online:
                break
            episode, success = collect_episode(env, acts["ranked"], args.seed * 100_003 + done, run)
            first = len(buffer)
            buffer.add(episode)
            begin = buffer.starts[buffer.starts >= first]
            states_taken = buffer.obs_index[begin]
            actions = buffer.data_actions(states_taken)[:, None]
            taken.append(FrozenCritic(critic)(buffer.states[states_taken], actions).mean(0)[:, 0])
            followed.append(buffer.mc_returns[begin])
            reached.append(success)
            num_distill, num_critic = round(len(episode) * args.distill_ratio), round(len(episode) * args.utd)
            if num_distill and done >= options.warmup:
                modules = policy, average, policy_optimizer, critic, buffer
                script.distill(*modules, num_distill, options.greedy, args, cloned if options.anchored else None)
            if num_critic:
                index = buffer.sample_index((num_critic, args.batch_size))
                states_ahead = torch.cat([buffer.obs_index[index], buffer.next_index[index]]).unique()
                script.refresh_candidates(average, buffer, states_ahead)
                for part in index:
                    script.critic_update(critic, target_critic, critic_optimizer, buffer, part, args)
    return rows


def teach_what_nothing_chose(options: Options) -> list[dict]:
    """The distilling loss and rate on the cloned policy's own samples, drawn as it changes, or on the data's."""
    args, _, envs, buffer, cloned, cloned_average, _, _, run = load(options)
    rows = []
    for way, own in chosen(UNCHOSEN, options).items():
        torch.manual_seed(args.seed)
        policy, average = copy.deepcopy(cloned), copy.deepcopy(cloned_average)
        optimizer = torch.optim.Adam(policy.parameters(), args.distill_lr)
        states = buffer.states[torch.randperm(len(buffer.states))[:2_000]]
        for done in itertools.count(0, options.every):
            found, samples = evaluate(envs, alone(average), run), sample_on_all_cores(average, states, 32)
            row = {"seed": args.seed, "way": way, "updates": done, "spread": samples.std(1).mean().item()}
            row["moved"] = moved(found["trajectories"]) if "maze" in args.env_id else float("nan")
            keep(rows, row | {"alone": found["success_rate"]})
            if done >= options.updates:
                break
            for index in buffer.sample_index((options.every, args.batch_size)):
                seen = buffer.obs_index[index]
                obs = buffer.states[seen]
                actions = average.sample(obs, 1)[:, 0] if own else buffer.data_actions(seen)
                script.policy_update(policy, average, optimizer, obs, actions, args.policy_ema)
    return rows


def exact_policy(width: float, steps: int, straight: bool):
    """A policy of 64 actions, each normal around 0 with this standard deviation, that has learned them exactly.

    Its sampler is the script's; what its network would learn stands in the network's place. straight: a flow policy,
    whose best velocity is E[a - noise | x_t] of x_t = (1 - t) noise + t a; else a diffusion policy, whose best
    prediction is E[noise | a_t] of a_t = sqrt(alpha_bar) a + sqrt(1 - alpha_bar) noise.
    """
    policy = (flow.FlowPolicy if straight else script.DiffusionPolicy)(1, 64, steps, 8, 1)

    def predict_noise(t, noisy_actions):
        alpha_bar = policy.alpha_bars[t.long()]
        return (1 - alpha_bar).sqrt() * noisy_actions / (alpha_bar * width**2 + 1 - alpha_bar)

    def velocity(t, x):
        return (t * width**2 - (1 - t)) * x / ((1 - t) ** 2 + t**2 * width**2)

    policy.predict_noise, policy.velocity = predict_noise, velocity
    all_steps = torch.arange(steps)  # the flow's sampler names its times, the diffusion's goes through all steps
    policy.first_layer_parts = lambda obs, t=all_steps: (torch.zeros(len(obs), 1), t[:, None])
    return policy


def sampled_widths() -> list[dict]:
    """The standard deviation of samples, over that of the data: what one generation of own samples leaves of it."""
    rows = []
    for straight, name in ((False, "diffusion"), (True, "flow")):
        for steps in (5, 10, 20, 50, 100):
            torch.manual_seed(0)
            row = {"policy": name, "steps": steps}
            for width in (0.4, 0.2, 0.1, 0.05):
                samples = exact_policy(width, steps, straight).sample(torch.zeros(1, 1), 4_000)
                row[f"of {width}"] = samples.std().item() / width
            keep(rows, row)
    return rows


def moved(trajectories, steps: int = 100) -> float:
    """Median distance between where an agent is (its first two observations) and where it is so many steps later.

    NaN where no trajectory is as long.
    """
    ways = np.concatenate([np.linalg.norm(path[steps:, :2] - path[:-steps, :2], axis=1) for path in trajectories])
    return float(np.median(ways)) if len(ways) else float("nan")


TITLES = {
    "ranked": "success, %: optimized policy",
    "alone": "success, %: policy alone",
    "cloned": "success, %: cloned policy, optimized by this critic",
    "spread": "spread of the policy's samples",
    "gap": "Q of the actions taken, less the return that followed",
    "success_rate": "success, %: the policy that acts",
    "return": "return",
    "moved": "metres in 100 steps, policy alone",
}


def draw(options: Options) -> None:
    """What a table holds over updates or episodes: the mean of the seeds, and each seed thinly."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for name in options.csv for row in csv.DictReader(open(name, newline=""))]
    online, curves = "q_taken" in rows[0], "success_rate" in rows[0]
    unit = "episodes" if online else "updates"
    for row in rows if online else []:
        row["gap"] = float(row["q_taken"]) - float(row["followed"])
    titles = {column: title for column, title in TITLES.items() if column in rows[0]}
    figure, axes = plt.subplots(1, len(titles), figsize=(4.3 * len(titles), 3.8), layout="constrained")
    for ax, (column, title) in zip(axes, titles.items()):
        factor = 100 if title.startswith("success") else 1
        for i, way in enumerate(dict.fromkeys(row["way"] for row in rows)):
            lines = {}
            for row in rows:
                if row["way"] == way:
                    lines.setdefault(row["seed"], []).append((int(row[unit]), factor * float(row[column])))
            for line in lines.values():
                ax.plot(*zip(*line), color=f"C{i}", lw=0.7, alpha=0.4)
            mean = np.mean(list(lines.values()), 0).T  # of x as well: online, seeds differ in updates
            ax.plot(*mean, "o-", ms=3, color=f"C{i}", lw=2, label=f"{way} (n={len(lines)})")
        ax.set(xlabel="online episodes" if online else "updates" if curves else "distilling updates")
        ax.set_title(title, fontsize=10)
        if column not in ("gap", "return"):
            ax.set_ylim(0, 103 if factor == 100 else None)
        ax.grid(alpha=0.3)
    axes[-1].legend(fontsize=8)
    figure.suptitle(options.title, fontsize=11)
    figure.savefig(options.draw, dpi=110)


def main() -> None:
    options = tyro.cli(Options)
    if options.draw:
        draw(options)
        return
    if not (options.run or options.widths):
        fail("name the folder of a run, or --draw a picture of tables (--csv), or ask for --widths")
    if options.widths:
        rows = sampled_widths()
    elif options.unchosen:
        rows = teach_what_nothing_chose(options)
    else:
        rows = fine_tune(options) if options.online else distil_under_frozen_critic(options)
    with open(options.out, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
