"""Tables and curves of many runs: what `python -m benchmarks.report tables` does, in the order in which it does it.

A run counts with three numbers. `offline`: the score of its last evaluation before it acts online (of a script without
an offline phase, the cloned policy's; none if nothing was cloned). `online`: that of its last evaluation, or of the
last one up to --episodes. `regret`: one minus the mean success of the episodes in which it learned online. The score is
in percent: success, or 25 a sub-task where a task counts them.
"""

import base64
import csv
import dataclasses
import functools
import html
import io
import itertools
import json
import pathlib
import re
import shlex
import sys
from dataclasses import dataclass

import numpy as np

from benchmarks.harness.cli import FREE, fail
from benchmarks.intervals import improvement, interquartile_mean, mean, with_interval
from benchmarks.report import WANTED, check_finished, curve, label_and_folder, read_whole

NUMBERS = ("offline", "online", "regret")


@dataclass
class Entry:
    """One run, with the three numbers of it."""

    method: str  # its row of the table
    task: str
    seed: int
    folder: pathlib.Path
    config: dict
    rows: list[dict]  # of metrics.csv, those of an evaluation, with `score`
    episodes: int  # online episodes that count
    offline: float | None
    online: float | None  # None, as is regret: it had no online phase
    regret: float | None


# --- READING: what is not whole is refused, since a table does not show it ---
def entry_of(method: str, folder: pathlib.Path, episodes: int = 0) -> Entry:
    """A finished run's entry, of its first so many online episodes; 0: of all. One line if it has not made them."""
    config, rows = read_whole(folder, ("script", "env_id", *WANTED[1:], "num_online_episodes"))
    check_finished(folder, config, rows)
    total = config["num_online_episodes"]
    if episodes > total:
        fail(f"{folder} was to make {total} online episodes, fewer than --episodes {episodes}")
    episodes = episodes or total
    each = config.get("episodes_per_round", 1)  # DPPO: a row, and a step, is a round of episodes
    rows = [row | {"step": each * row["step"]} if row["phase"] == "online" and "step" in row else row for row in rows]
    online = [row for row in rows if row["phase"] == "online"]
    rates = [row["episode_success"] for row in online if "episode_success" in row for _ in range(each)]
    evaluations = [
        row | {"score": row.get("score", 100 * row["success_rate"])} for row in rows if "success_rate" in row
    ]
    before = [row for row in evaluations if row["phase"] != "online"]
    after = [row for row in evaluations if row["phase"] == "online"]
    within = [row for row in after if row.get("step", total) <= episodes]
    if total and not within:
        fail(f"{folder} has no evaluation within --episodes {episodes}, the first is after {after[0]['step']:.0f}")
    score, regret = (within[-1]["score"], 1 - float(np.mean(rates[:episodes]))) if total else (None, None)
    offline = before[-1]["score"] if before else None  # RLPD's Gaussian: there is nothing before it acts
    task = config["env_id"], config["seed"], folder, config
    return Entry(method, *task, evaluations, episodes, offline, score, regret)


def runs_of_suite(suite: str, size: str, results: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
    """Label and folder of each finished run of a suite, as `benchmarks/run.py` names them; says what is missing."""
    try:
        from benchmarks import run
    except ImportError:
        fail("--suite needs benchmarks/run.py, which this checkout does not have; name the runs with --runs")
    jobs, missing = run.jobs_of(run.Options(suite=suite, size=size, results=results))
    folders = [(job.label, run.finished_run(results / job.name)) for job in jobs]
    found = [(label, folder) for label, folder in folders if folder is not None]
    print("".join(f"{line}\n" for line in missing), end="")
    if not found:
        fail(f"{results} holds no finished run of {suite} ({size}): python -m benchmarks.run --suite {suite} "
             f"--size {size} --results {results}")  # fmt: skip
    if len(found) < len(jobs):
        print(f"{len(jobs) - len(found)} of {len(jobs)} runs are not finished: the table is of the others")
    return found


NOT_LEARNED = {"seed", "runs", "resume", "log_every", "plain"} | FREE  # flags that do not change what a run learns


@functools.cache
def suite_jobs(task: str) -> list[tuple[str, str, int, dict, dict]]:
    """Each run on this task that a suite names: suite, script, seed, its settings, and the script's defaults."""
    from benchmarks import run
    from benchmarks.suites import SUITES

    found = []
    for suite, size in itertools.product(SUITES, ("laptop", "paper")):
        if task in SUITES[suite][size]["tasks"]:
            for job in run.jobs_of(run.Options(suite=suite, size=size, tasks=(task,)))[0]:
                args, plain = run.resolved(job.script, job.task, job.flags), run.load(job.script).Args()
                name = suite if size == "laptop" else f"{suite} (paper)"
                found.append((name, pathlib.Path(job.script).stem, job.seed, vars(args), vars(plain)))
    return found


def suites_of(entry: Entry) -> list[str]:
    """Suites of benchmarks/suites.py that name a run of these settings, script, task and seed; of a run at paper size
    with that word behind. A flag that the script got after the run counts as its default; reward_min 0 is the data's.
    """
    config, names = entry.config, []
    for suite, script, seed, args, plain in suite_jobs(entry.task):
        if (script, seed) == (config["script"], entry.seed) and suite not in names:
            pairs = [(name, config.get(name, plain[name]), args[name]) for name in args.keys() - NOT_LEARNED]
            if all(
                (tuple(was) if isinstance(was, list) else was) == now or (name, now) == ("reward_min", 0)
                for name, was, now in pairs
            ):
                names.append(suite)
    return names


def check_comparable(entries: list[Entry], mix_sources: bool) -> None:
    """Refuse a table whose numbers cannot stand side by side; one line each."""
    bases: dict[str, set] = {}
    for entry in entries:
        bases.setdefault(re.sub(r"-v\d+$", "", entry.task), set()).add(entry.task)
    for versions in bases.values():
        if len(versions) > 1:
            fail(f"two versions of one task, {' and '.join(sorted(versions))}: make a table of each")
    local = {bool(entry.config["data"]["local"]): entry for entry in entries}
    if len(local) > 1 and not mix_sources:
        fail(f"{local[True].folder} learned from data collected locally, {local[False].folder} from the published or "
             "the task's own: make a table of each, or pass --mix-sources")  # fmt: skip
    seen: dict[tuple, Entry] = {}
    for entry in entries:
        twin = seen.setdefault((entry.method, entry.task, entry.seed), entry)
        if twin is not entry:
            fail(f"{twin.folder} and {entry.folder} are both seed {entry.seed} of {entry.method} on {entry.task}: "
                 "leave one out, or give them two labels")  # fmt: skip
        first = seen.setdefault((entry.method, entry.task), entry)
        if first.episodes != entry.episodes:
            fail(f"{first.folder} made {first.episodes} online episodes, {entry.folder} {entry.episodes}: pass "
                 f"--episodes {min(first.episodes, entry.episodes)}")  # fmt: skip


# --- COUNTING ---
def methods_of(entries) -> list[str]:
    return list(dict.fromkeys(entry.method for entry in entries))


def tasks_of(entries) -> list[str]:
    return list(dict.fromkeys(entry.task for entry in entries))


def strata(entries, method: str, tasks, number: str) -> list[list[float]]:
    """A method's numbers, by task; empty if it lacks one of the tasks or the number."""
    found = [[getattr(e, number) for e in entries if (e.method, e.task) == (method, task)] for task in tasks]
    return found if all(found) and None not in sum(found, []) else []


def statistics(entries) -> list[dict]:
    """Everything that is counted, a dict for each number: as the CSV has it, and what the tables are made of.

    Per task the mean; over the tasks that every method has, where there are several, the mean; over these the
    interquartile mean, and how probably a run of the first method is better than one of another.
    """
    rows, methods, tasks = [], methods_of(entries), tasks_of(entries)

    def add(method, task, number, statistic, name, samples):
        value, low, high = with_interval(statistic, samples)
        counted = dict(method=method, task=task, runs=sum(map(len, samples)), number=number, statistic=name)
        rows.append(counted | dict(value=value, low=low, high=high))

    common = [task for task in tasks if all(any((e.method, e.task) == (m, task) for e in entries) for m in methods)]
    for number in NUMBERS:
        for method in methods:
            for task in tasks:
                if samples := strata(entries, method, [task], number):
                    add(method, task, number, mean, "mean", samples)
            if samples := common and strata(entries, method, common, number):
                if len(common) > 1:
                    add(method, "all tasks", number, mean, "mean", samples)
                add(method, "all tasks", number, interquartile_mean, "interquartile mean", samples)
                others = strata(entries, methods[0], common, number)
                if method != methods[0] and others and number != "regret":
                    add(f"{methods[0]} over {method}", "all tasks", number, improvement, "probability of improvement",
                        [*others, *samples])  # fmt: skip
    return rows


# --- SHOWING ---
def text_of(row: dict | None) -> str:
    """A number with its interval, as a cell; empty where there is none. Scores in whole percent."""
    if row is None:
        return ""
    digits = 1 if row["number"] != "regret" and row["statistic"] != "probability of improvement" else 2
    value, low, high = (f"{row[name]:.{digits}f}" for name in ("value", "low", "high"))
    return value if np.isnan(row["low"]) else f"{value} ({low} to {high})"


def tables_of(entries, rows) -> list[tuple[str, list[list[str]]]]:
    """The tables as texts: a title and lines of cells, the first its heading."""
    methods, tasks = methods_of(entries), tasks_of(entries)

    def cell(method, task, number, name="mean"):
        wanted = (method, task, number, name)
        return text_of(next((r for r in rows if (r["method"], r["task"], r["number"], r["statistic"]) == wanted), None))

    lines = [
        *tasks,
        *(["all tasks"] if any(r["task"] == "all tasks" and r["statistic"] == "mean" for r in rows) else []),
    ]

    def arrow(method, task):
        both = [cell(method, task, number).split(" (")[0] for number in NUMBERS[:2]]
        return " → ".join(filter(None, both))

    arrows = [[task, *(arrow(method, task) for method in methods)] for task in lines]
    details = []
    for task in lines:
        for method in methods:
            some = [e for e in entries if e.method == method and task in (e.task, "all tasks")]
            if cells := [cell(method, task, number) for number in NUMBERS] if some else []:
                made = "" if task == "all tasks" else str(some[0].episodes)
                details.append([task, method, str(len(some)), cells[0], cells[1], made, cells[2]])
    middles = [[m, *(cell(m, "all tasks", n, "interquartile mean") for n in NUMBERS)] for m in methods]
    better = [[f"{methods[0]} over {m}", *(cell(f"{methods[0]} over {m}", "all tasks", n, "probability of improvement")
                                           for n in NUMBERS[:2])] for m in methods[1:]]  # fmt: skip
    found = [("Offline RL → after online RL, score in percent, mean of the seeds", [["task", *methods], *arrows]),
             ("Each with its 95 % interval, and the regret online",
              [["task", "method", "runs", "offline", "online", "after episodes", "regret"], *details])]  # fmt: skip
    named = [[m, ", ".join(s for s in suites_of(some[0]) if all(s in suites_of(e) for e in some))]
             for m in methods for some in [[e for e in entries if e.method == m]]]  # fmt: skip
    if any(any(line[1:]) for line in middles):
        found.append(("Interquartile mean over the tasks that all methods have", [["method", *NUMBERS], *middles]))
    if any(any(line[1:]) for line in better):
        found.append(("Probability that a run of the first method is better", [["", *NUMBERS[:2]], *better]))
    if any(line[1] for line in named):
        title = "Suites of suites.py that name these very runs, by settings and seeds as they are today"
        found.append((title, [["method", "suites"], *named]))
    return found


NOTE = ("Intervals: stratified percentile bootstrap over the seeds (95 %), of five seeds or fewer rather too narrow; "
        "none of a single seed. Before the arrow: the last evaluation before acting online.")  # fmt: skip


def notes_of(entries) -> list[str]:
    """What a reader of the numbers must know, a sentence each."""
    local = sorted({entry.task for entry in entries if entry.config["data"]["local"]})
    made = sorted({entry.config["eval_episodes"] for entry in entries})
    said = [NOTE, f"An evaluation is of {' or '.join(map(str, made))} episodes."]
    return said + [f"**Local data**, not the published: {', '.join(local)}."] * bool(local)


def markdown_of(tables, notes) -> str:
    parts = []
    for title, (head, *lines) in tables:
        cells = [head, ["---"] * len(head), *lines]
        parts.append(
            f"**{title}**\n\n" + "\n".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |" for line in cells)
        )
    return "\n\n".join([*parts, *notes]) + "\n"


def draw(entries, over: str, path: pathlib.Path) -> bool:
    """Mean score of each method's runs and its 95 % interval, a panel for each task; False if nothing can be drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks, methods, drawn = tasks_of(entries), methods_of(entries), False
    colors = plt.get_cmap("tab10" if len(methods) <= 10 else "tab20").colors
    outside = len(methods) > 6  # more names than a panel has room for
    size = 0.8 + 4.2 * len(tasks) + 2.6 * outside, 3.8
    figure, axes = plt.subplots(1, len(tasks), figsize=size, layout="constrained", squeeze=False)
    for ax, task in zip(axes[0], tasks):
        for i, method in enumerate(methods):
            some = [e for e in entries if (e.method, e.task) == (method, task)]
            lines = [curve([r | {"success_rate": r["score"] / 100} for r in e.rows], over) for e in some]
            lines = [line for line in lines if line[0]]
            if not lines:
                continue
            drawn, x = True, min((line[0] for line in lines), key=lambda x: x[-1])  # as far as all runs have come
            points = np.array([np.interp(x, *line) for line in lines])  # (runs, evaluations)
            value, low, high = np.array([with_interval(mean, [column]) for column in points.T]).T
            ax.plot(x, value, "o-", ms=2.5, lw=1.8, color=colors[i % 20], label=f"{method} (n={len(lines)})")
            ax.fill_between(x, low, high, color=colors[i % 20], alpha=0.2, lw=0)
        ax.set(xlabel={"episodes": "online episodes", "seconds": "seconds of wall clock"}[over], ylim=(-3, 103))
        ax.set_title(task, fontsize=10)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("score, %")
    if drawn:
        if outside:
            figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
        else:
            axes[0][0].legend(loc="best", fontsize=8)
        figure.savefig(path, dpi=110)
    plt.close(figure)
    return drawn


STYLE = """
body { font-family: sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }
td, th { padding: .2em .8em; text-align: left; border-bottom: 1px solid #ccc }
img { max-width: 100% }
pre { white-space: pre-wrap; background: #f4f4f4; padding: .6em }
"""


def page_of(title: str, tables, notes, pictures, entries) -> str:
    """One HTML page with everything in it: it opens without a server, and can be sent to somebody."""

    def image(path):
        data = base64.b64encode(path.read_bytes()).decode()
        return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'

    parts = [f"<h1>{html.escape(title)}</h1>"]
    for name, (head, *lines) in tables:
        cells = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in line)}</tr>\n" for line in lines)
        heading = "".join(f"<th>{html.escape(c)}</th>" for c in head)
        parts.append(f"<h2>{html.escape(name)}</h2>\n<table><tr>{heading}</tr>\n{cells}</table>")
    parts += [f"<p>{html.escape(note.replace('**', ''))}</p>" for note in notes]
    parts += [f"<h2>{html.escape(path.stem.replace('-', ' '))}</h2>\n{image(path)}" for path in pictures]
    parts.append("<h2>Runs</h2><p>With each its command, its settings, and the picture of the first seed.</p>")
    shown = set()
    for e in entries:
        said, first = e.config["provenance"], (e.method, e.task) not in shown
        shown.add((e.method, e.task))
        summary = e.folder / "summary.png"
        picture = image(summary) if first and summary.is_file() else ""
        about = f"commit {said['commit']}; {said['machine']}; {said['versions']}; data: {e.config['data']['source']}"
        parts.append(
            f"<details><summary>{html.escape(f'{e.method}, {e.task}, seed {e.seed}')}</summary>\n"
            f"<pre>{html.escape(said['command'])}</pre>\n<p>{html.escape(about)}</p>\n{picture}\n"
            f"<pre>{html.escape(json.dumps(e.config, indent=2))}</pre></details>"
        )
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def write(options) -> None:
    """`report tables`: options as in report.Tables. Everything is read and checked before anything is written."""
    if bool(options.suite) == bool(options.runs):
        fail("name a --suite, or --runs, one of the two")
    if options.episodes < 0:
        fail(f"--episodes {options.episodes} must be at least 0")
    if options.suite:
        named = runs_of_suite(options.suite, options.size, options.results)
    else:
        named = [label_and_folder(text) for text in options.runs]
    entries = [entry_of(label or read_whole(folder)[0]["script"], folder, options.episodes) for label, folder in named]
    check_comparable(entries, options.mix_sources)
    rows = statistics(entries)
    tables, notes, out = tables_of(entries, rows), notes_of(entries), options.out
    title = f"{options.suite} ({options.size})" if options.suite else out.resolve().name
    try:
        out.mkdir(parents=True, exist_ok=True)
        pictures = [out / f"curves-{over}.png" for over in ("episodes", "seconds")]
        pictures = [path for path in pictures if draw(entries, path.stem.split("-")[1], path)]
        for name, text in files_of(title, entries, rows, tables, pictures).items():
            (out / name).write_text(text)
        if options.html:
            command = shlex.join(["python", "-m", "benchmarks.report", *sys.argv[1:]])
            (out / "index.html").write_text(page_of(title, tables, [*notes, f"Made by: {command}"], pictures, entries))
    except OSError as error:
        fail(f"cannot write to {out} ({error.strerror})")
    print(markdown_of(tables, notes))
    print(f"{out}: table.md, table.csv, runs.csv{', index.html' * options.html}, {', '.join(p.name for p in pictures)}")


def files_of(title: str, entries, rows, tables, pictures) -> dict[str, str]:
    """table.md, table.csv and runs.csv, as texts by name."""
    text = [f"# {title}\n", markdown_of(tables, notes_of(entries)), *(f"![{p.stem}]({p.name})\n" for p in pictures)]
    return {"table.md": "\n".join(text), "table.csv": csv_of(rows), "runs.csv": csv_of([
        dict(method=e.method, task=e.task, seed=e.seed, offline=e.offline, online=e.online, episodes=e.episodes,
             regret=e.regret, seconds=e.rows[-1].get("seconds"), local=e.config["data"]["local"],
             commit=e.config["provenance"]["commit"], folder=e.folder) for e in entries])}  # fmt: skip


def csv_of(rows: list[dict]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows([{k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in rows])
    return text.getvalue()


def made_again(out: pathlib.Path, root: pathlib.Path) -> dict[str, str]:
    """`files_of` a folder that `write` made, from the runs that its runs.csv names, whose folders are below root."""
    with open(out / "runs.csv", newline="") as file:
        listed = list(csv.DictReader(file))
    entries = [entry_of(row["method"], root / row["folder"], int(row["episodes"])) for row in listed]
    entries = [dataclasses.replace(e, folder=pathlib.Path(row["folder"])) for e, row in zip(entries, listed)]
    check_comparable(entries, mix_sources=True)
    title = (out / "table.md").read_text().splitlines()[0].removeprefix("# ")
    rows = statistics(entries)
    pictures = [out / name for name in ("curves-episodes.png", "curves-seconds.png") if (out / name).is_file()]
    return files_of(title, entries, rows, tables_of(entries, rows), pictures)
