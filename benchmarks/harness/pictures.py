"""What a run leaves to look at: the final table and summary.png."""

import matplotlib
import numpy as np
import torch
from matplotlib.patches import Circle, Rectangle

from benchmarks.harness.fast_critic import FrozenCritic, sample_on_all_cores
from benchmarks.harness.rollouts import film
from benchmarks.harness.runs import SCORES, write_atomically


def finish(run, env, make_env, act, policy, critic) -> None:
    """The picture, the video if it was asked for, and the table of a run that has come to its end.

    act: what is filmed, obs (B, O) -> actions (B, A). policy, critic: for the map of values; no critic: no map.
    """
    draw_summary(run, env, policy, critic)
    if run.args.capture_video:
        film(run, make_env, act)
    print_table(run.results, run.folder)


def print_table(results: dict, folder) -> None:
    """What the policies reached, and where everything is."""
    print(f"\n{'':18}{'success rate':>14}{'score':>8}{'return':>10}{'length':>10}{'time':>8}")
    for label, r in results.items():
        print("{:18}{:14.1%}{:8.1f}{:10.2f}{:10.1f}{:6.0f} s".format(label, *(r[key] for key in (*SCORES, "seconds"))))
    print(f"\nall of it: {folder}/ with summary.png, metrics.csv, config.json, checkpoint.pt and TensorBoard's events")


def draw_summary(run, env, policy, critic) -> None:
    """summary.png: the learning curve and, for a maze, the policies' paths from above over the critic's value."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    maze, args = getattr(env.unwrapped, "maze", None), run.args
    if maze is not None:  # so that there is a goal to draw; a robot would move
        env.reset(seed=args.eval_seed)
    panels = list(run.results.items()) if maze is not None else []
    figure = plt.figure(figsize=(4.6 + 3.6 * len(panels), 4.0), layout="constrained")
    ax, *maze_axes = figure.subplots(1, 1 + len(panels), squeeze=False)[0]
    ax.plot([updates for _, updates, _ in run.curve], [score for *_, score in run.curve], color="0.8", zorder=1)
    for phase, color in {"cloning": "tab:gray", "offline": "tab:blue", "online": "tab:red"}.items():
        points = [(updates, score) for p, updates, score in run.curve if p == phase]
        if points:
            ax.plot(*zip(*points), "o-", color=color, label=phase)
    label = "success rate, %" if not args.env_id.startswith("kitchen") else "score: 25 x sub-tasks"
    ax.set(xlabel="updates of policy and critic", ylabel=label, ylim=(-3, 103))
    task = args.env_id + (" (local data)" if run.local else "")
    ax.set_title(f"{task}, seed {args.seed}\n{args.eval_episodes} episodes a point", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(loc="best") if run.curve else None
    x, y, values = value_map(run.buffer.states, policy, critic, args.num_samples) if panels else (None, None, None)
    for ax, (label, result) in zip(maze_axes, panels):
        mesh = ax.scatter(x, y, c=values, s=7, cmap=critic and "viridis", linewidths=0)
        draw_maze(ax, env.unwrapped, maze)
        for path in result["trajectories"]:
            ax.plot(*path.numpy().T, color="white", lw=2.0, alpha=0.5)
            ax.plot(*path.numpy().T, color="tab:red", lw=0.8)
        ax.set_title(f"{label}: {result['success_rate']:.0%}", fontsize=11)
    if panels and critic:
        figure.colorbar(mesh, ax=maze_axes, label="final critic: value of the best candidate", shrink=0.85)
    write_atomically(run.folder / "summary.png", lambda file: figure.savefig(file, dpi=110, format="png"))
    plt.close(figure)


def value_map(states, policy, critic, num_samples: int, count: int = 4000):
    """x, y of states spread over the buffer, and Q of the best of the policy's samples at each, or grey."""
    states = states[torch.linspace(0, len(states) - 1, min(count, len(states)), device=states.device).long()]
    q = critic and FrozenCritic(critic)(states, sample_on_all_cores(policy, states, num_samples)).mean(0).amax(1)
    return *states[:, :2].T.cpu().numpy(), "0.8" if q is None else q.cpu().numpy()


def draw_maze(ax, env, maze) -> None:
    """Walls, start and goal of a gymnasium-robotics maze, on axes without ticks."""
    half = maze.maze_size_scaling / 2
    for row, column in np.argwhere(np.array(maze.maze_map, object) == 1):
        x, y = maze.cell_rowcol_to_xy(np.array([row, column]))
        ax.add_patch(Rectangle((x - half, y - half), 2 * half, 2 * half, color="0.25"))
    ax.add_patch(Circle(env.goal[:2], 0.9 * half, fill=False, color="black", lw=2))
    ax.set(aspect="equal", xticks=[], yticks=[])
    ax.autoscale_view()
