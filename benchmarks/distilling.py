"""What distilling does to a policy while its critic stands still: success and spread of its samples, update by update.

    python parl_diffusion_calql.py --num-online-episodes 0 --runs runs            # clones, trains the critic, stops
    python -m benchmarks.distilling runs/<folder> --out distilling.csv            # distils in four ways from there
    python -m benchmarks.distilling --draw distilling.png --title "default task" --csv a.csv b.csv

Each way starts from the cloned policy and the critic of the run, after a few online episodes of the optimized policy:
with and without the data's own action among the candidates (algorithm 1, line 3), on states uniform over all rows
(equation 4.4) or half online. The critic never changes, so whatever falls is the policy's doing: `alone` is success of
its samples, `ranked` that of the optimized policy, `spread` the standard deviation of 32 samples of a state (mean over
dimensions and 2,000 states of the buffer), `q` the critic's mean over the same samples.
"""

import copy
import csv
import itertools
import json
import pathlib
import types
from dataclasses import dataclass

import numpy as np
import torch
import tyro

import parl_diffusion_calql as script
from benchmarks.harness.cli import fail
from benchmarks.harness.datasets import set_up
from benchmarks.harness.fast_critic import FrozenCritic, sample_on_all_cores
from benchmarks.harness.rollouts import collect_episode, evaluate


@dataclass
class Options:
    """Distil in four ways from a run that was trained offline, or draw what came of it."""

    run: tyro.conf.Positional[str] = ""  # folder of a finished run of parl_diffusion_calql.py without online episodes
    out: str = "distilling.csv"  # the table to write
    updates: int = 1_200  # distilling updates of each way
    every: int = 200  # updates between two measurements
    collect: int = 10  # online episodes beside the data
    episodes: int = 50  # episodes of a measurement
    greedy: bool = True  # teach the best candidate, else draws of equation 4.3
    draw: str = ""  # write this picture from tables instead
    title: str = ""  # its title
    csv: tuple[str, ...] = ()  # the tables, one for each seed


WAYS = {f"{'with' if a else 'without'} a_data, {'mixed' if m else 'uniform'}": (a, m) for a in (1, 0) for m in (0, 1)}


def load(folder: str, episodes: int):
    """The run's arguments, environment(s), buffer, cloned policy, critic, and a stand-in for its Run."""
    path = pathlib.Path(folder)
    if not (path / "checkpoint.pt").is_file():
        fail(f"{folder} is not the folder of a run: it has no checkpoint.pt")
    config = json.loads((path / "config.json").read_text())
    known = script.Args.__dataclass_fields__
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}
    args = script.Args(**config | {"eval_episodes": episodes})
    device, env, envs, dataset = set_up(args, script.make_env, script.load_dataset)
    state = torch.load(path / "checkpoint.pt", map_location=device, weights_only=True)
    buffer = script.ReplayBuffer(dataset, args, device)
    obs_dim, action_dim = buffer.states.shape[1], buffer.actions.shape[1]
    sizes = args.diffusion_steps, args.policy_hidden, args.policy_blocks
    policy = script.DiffusionPolicy(obs_dim, action_dim, *sizes, dropout=args.policy_dropout).to(device)
    num_bins, q_min = args.num_bins if args.critic_loss == "hl_gauss" else 1, args.reward_min / (1 - args.discount)
    critic = script.Critic(obs_dim, action_dim, args.critic_hidden, args.ensemble_size, num_bins, q_min).to(device)
    policy.load_state_dict(state["modules"]["policy"])
    critic.load_state_dict(state["modules"]["critic"])
    average = copy.deepcopy(policy).requires_grad_(False).eval()
    average.load_state_dict(state["modules"]["ema_policy"])
    run = types.SimpleNamespace(args=args, device=device, check_stop=lambda: None)
    return args, env, envs, buffer, policy, average, critic, run


def measure(options: Options) -> list[dict]:
    args, env, envs, buffer, cloned, cloned_average, critic, run = load(options.run, options.episodes)
    torch.manual_seed(args.seed)

    def acts(policy):
        def ranked(obs):
            actions, q = script.optimize(critic, obs, policy.sample(obs, args.num_samples), args)
            return script.select_actions(actions, q, args.greedy_rollouts)

        return {"alone": lambda obs: policy.sample(obs, 1)[:, 0], "ranked": ranked}

    for i in range(options.collect):
        buffer.add(collect_episode(env, acts(cloned_average)["ranked"], args.seed * 100_003 + 70_000 + i, run)[0])
    states = buffer.states[torch.randperm(len(buffer.states))[:2_000]]
    rows = []
    for way, (args.distill_data_actions, args.distill_mixed) in WAYS.items():
        torch.manual_seed(args.seed)
        policy, average = copy.deepcopy(cloned), copy.deepcopy(cloned_average)
        optimizer = torch.optim.Adam(policy.parameters(), args.distill_lr)
        loss = float("nan")
        for done in itertools.count(0, options.every):
            samples = sample_on_all_cores(average, states, 32)
            row = {"seed": args.seed, "way": way, "updates": done, "loss": loss, "spread": samples.std(1).mean().item(),
                   "q": FrozenCritic(critic)(states, samples).mean().item()}  # fmt: skip
            row |= {name: evaluate(envs, act, run)["success_rate"] for name, act in acts(average).items()}
            rows.append(row)
            print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
            if done >= options.updates:
                break
            modules = policy, average, optimizer, critic, buffer
            loss = script.distill(*modules, options.every, options.greedy, args)[1]["distill_loss"].item()
    return rows


def draw(options: Options) -> None:
    """Success alone, success ranked, and spread over the updates: mean of the seeds, and each seed thinly."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for name in options.csv for row in csv.DictReader(open(name, newline=""))]
    titles = {"ranked": "success, %: optimized policy", "alone": "success, %: policy alone", "spread": "its spread"}
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for ax, (column, title) in zip(axes, titles.items()):
        factor = 1 if column == "spread" else 100
        for i, way in enumerate(WAYS):
            lines = {}
            for row in rows:
                if row["way"] == way:
                    lines.setdefault(row["seed"], []).append((int(row["updates"]), factor * float(row[column])))
            for line in lines.values():
                ax.plot(*zip(*line), color=f"C{i}", lw=0.7, alpha=0.4)
            mean = np.mean([[y for _, y in line] for line in lines.values()], 0)
            ax.plot([x for x, _ in line], mean, "o-", ms=3, color=f"C{i}", lw=2, label=f"{way} (n={len(lines)})")
        ax.set(xlabel="distilling updates", title=title, ylim=(0, 103) if factor == 100 else (0, None))
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(options.title, fontsize=11)
    figure.savefig(options.draw, dpi=110)


def main() -> None:
    options = tyro.cli(Options)
    if options.draw:
        draw(options)
        return
    if not options.run:
        fail("name the folder of a run, or --draw a picture of tables (--csv)")
    rows = measure(options)
    with open(options.out, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
