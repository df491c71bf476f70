"""What the shortcuts of climbing cost: gain in Q and changed winners on the critics of finished runs.

    python -m benchmarks.climbing runs/<folder> runs/<other> --out climbing.csv

Of each run of parl_diffusion_calql.py 4,000 states of the buffer are taken, with fresh samples of its policy, and
climbed in several ways, with the run's own settings and with the paper's (32 samples, 10 kept, 10 steps of 3e-4):

    all             every kept candidate, all steps: the paper
    winners         those that can become the best: the default where only the best is wanted; exact under its condition
    first 3         of these the three of highest Q            --climb-first 3
    one step        one step of T x alpha from every one       --num-gradient-steps 1 --gradient-step-size T*alpha
    one, first 3    both

Columns: `climbed` candidates of a state, `gain` of the best Q over the best ranked Q, `of_full` as a share of that of
"all", `same` share of states whose best candidate is the same one, `moved` the largest difference of an action's
coordinate where it is, `growth` the largest factor by which a gradient's norm grew on its way (of "all").
"""

import csv
import dataclasses
from dataclasses import dataclass

import torch
import tyro

import parl_diffusion_calql as script
from benchmarks import distilling
from benchmarks.harness.cli import fail
from benchmarks.harness.fast_critic import sample_on_all_cores

PAPER = dict(num_samples=32, num_keep=10, num_gradient_steps=10, gradient_step_size=3e-4)


@dataclass
class Options:
    """Climb in several ways on the critics of finished runs."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # folders of finished runs of parl_diffusion_calql.py
    out: str = "climbing.csv"  # the table to write
    states: int = 4_000  # states of each run


def ways(args):
    """Settings of each way, over those of a run."""
    one = dict(num_gradient_steps=1, gradient_step_size=args.num_gradient_steps * args.gradient_step_size)
    first = dict(climb_first=3)
    return {"all": dict(climb_all=True), "winners": {}, "first 3": first, "one step": dict(climb_all=True) | one,
            "one, first 3": one | first}  # fmt: skip


def growth(critic, obs, actions, args) -> float:
    """Largest factor by which a gradient's norm grows on its way, where it was not 0 at the beginning."""
    q, gradient = script.q_and_gradient(critic, obs, actions)
    first = largest = gradient.norm(dim=-1)
    for _ in range(args.num_gradient_steps):
        proposed = (actions + args.gradient_step_size * gradient).clamp(-1, 1)
        new_q, new_gradient = script.q_and_gradient(critic, obs, proposed)
        better = (new_q > q)[..., None]
        actions, gradient = torch.where(better, proposed, actions), torch.where(better, new_gradient, gradient)
        q, largest = torch.maximum(q, new_q), torch.maximum(largest, gradient.norm(dim=-1))
    return (largest / first)[first > 0].max().item()


def measure(folder: str, num_states: int) -> list[dict]:
    """One row for each way and kind of settings."""
    run_args, _, _, buffer, _, policy, critic, _, _ = distilling.load(distilling.Options(run=folder, episodes=1))
    torch.manual_seed(run_args.seed)
    obs = buffer.states[torch.randperm(len(buffer.states))[:num_states]]
    rows = []
    for settings, change in {"the run's": {}, "the paper's": PAPER}.items():
        args = dataclasses.replace(run_args, **change, climb_all=False, climb_first=0)
        samples = sample_on_all_cores(policy, obs, args.num_samples)
        kept, ranked = script.global_optimization(critic, obs, samples, args.num_keep)
        grown, full = growth(critic, obs, kept, args), None
        for way, flags in ways(args).items():
            actions, q = script.optimize(critic, obs, samples, dataclasses.replace(args, **flags), True)
            best, gain = q.argmax(1), q.amax(1) - ranked.amax(1)
            chosen = script.select_actions(actions, q, greedy=True)
            full = full or (best, gain, chosen)
            same = best == full[0]
            climbed = args.num_keep if "climb_all" in flags else can_win(critic, obs, kept, args, flags)
            rows.append({"task": args.env_id, "seed": args.seed, "settings": settings, "way": way, "climbed": climbed,
                         "gain": gain.mean().item(), "of_full": (gain.mean() / full[1].mean()).item(),
                         "same": same.float().mean().item(), "moved": (chosen - full[2]).abs()[same].max().item(),
                         "growth": grown})  # fmt: skip
            print(", ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
    return rows


def can_win(critic, obs, kept, args, flags) -> float:
    """Candidates of a state that climb, on average."""
    seen = []
    args = dataclasses.replace(args, **flags)

    def climb(critic, obs, actions, *_):
        seen.append(len(obs))
        return actions, actions[..., 0]

    num_climb, settings = args.climb_first or args.num_keep, (args.num_gradient_steps, args.gradient_step_size)
    script.climb_winners(climb, script.q_and_gradient, critic, obs, kept, num_climb, *settings)
    return seen[0] / len(obs)


def main() -> None:
    options = tyro.cli(Options)
    if not options.runs:
        fail("name the folder of a run")
    rows = [row for folder in options.runs for row in measure(folder, options.states)]
    with open(options.out, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
