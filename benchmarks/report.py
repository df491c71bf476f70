"""Keep finished runs among the results, and draw the learning curves of several in one picture.

    python benchmarks/report.py keep benchmarks/results/quickstart --runs runs/pointmaze-medium-v0__*
    python benchmarks/report.py curves rlpd.png --runs "utd 10=runs/a" "utd 10=runs/b" "utd 1=runs/c" --over episodes
    python -m benchmarks.report tables report/table1 --suite table1 --results results --html
    python -m benchmarks.report readme

`keep` copies each run's small files to OUT/seedN, writes OUT/results.json (command, commit, machine, seed and what was
reached) and prints the table for the README. `curves` reads the runs' metrics.csv and config.json, or what `keep`
copied: a thin line is one run, a thick one the mean of the runs that share a label. `tables` compares methods over
tasks and seeds, with intervals, curves and a page to open in a browser (benchmarks/tables.py). `readme` writes the
tables of the two READMEs, from results.json, and those that `tables` made of kept runs, from their runs.csv.
"""

import csv
import json
import os
import pathlib
import re
import shutil
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tyro
from scipy.stats import binomtest

KEPT = ("config.json", "metrics.csv", "summary.png")
WANTED = ("script", "seed", "data", "provenance", "eval_episodes")  # of a config.json, to be a run's
LABELS = {
    "cloning": "cloned policy",
    "offline": "after offline RL",
    "online": "after online RL",
}  # by phase, as printed


@dataclass
class Keep:
    """Copy the small files of finished runs, one per seed, and write results.json beside them."""

    out: tyro.conf.Positional[pathlib.Path]  # folder of one experiment, such as benchmarks/results/quickstart
    runs: list[pathlib.Path]  # folders of finished runs
    machine: str = ""  # what they ran on, in words; empty: as the runs name it
    note: str = ""  # what else was running there, or anything a reader of the numbers must know


@dataclass
class Curves:
    """Draw success at every evaluation of several runs."""

    out: tyro.conf.Positional[pathlib.Path]  # the picture, .png
    runs: list[
        str
    ]  # folders, each as FOLDER or LABEL=FOLDER (a folder's name may hold a =); one label's runs are averaged
    over: Literal["updates", "episodes", "seconds", "critic_updates"] = "updates"  # the horizontal axis
    title: str = ""


@dataclass
class Tables:
    """Compare methods over tasks and seeds: tables with intervals, curves, and with --html one page of it all."""

    out: tyro.conf.Positional[pathlib.Path]  # folder for table.md, table.csv, runs.csv, curves-*.png, index.html
    suite: str = ""  # a table or figure of benchmarks/suites.py, whose runs are looked for in RESULTS
    size: Literal["laptop", "paper"] = "laptop"  # of the suite
    results: pathlib.Path = pathlib.Path("results")  # folder in which benchmarks.run made them
    runs: tuple[str, ...] = ()  # instead of a suite: folders, each as METHOD=FOLDER, or FOLDER alone
    episodes: int = 0  # count the first so many online episodes; 0: all that a run made
    mix_sources: bool = False  # allow local and published data in one table
    html: bool = False  # write index.html, with pictures, settings and commands


@dataclass
class Readme:
    """Write the tables of the kept results anew: in the two READMEs, between their markers, and beside a runs.csv."""

    root: pathlib.Path = pathlib.Path(__file__).resolve().parent.parent  # the checkout


def fail(message: str):
    sys.exit(f"error: {message}")


def read_whole(folder: pathlib.Path, wanted: tuple = WANTED) -> tuple[dict, list[dict]]:
    """config.json, which says all that is wanted, and each row of metrics.csv (numbers where there are any, by column).

    What is missing, unreadable or was cut off ends in one line, since a number or a curve made of the rest does not
    show it. A file that was cut off between two rows looks whole here: see `check_finished`.
    """
    path = folder / "metrics.csv"
    missing = [name for name in ("config.json", "metrics.csv") if not (folder / name).is_file()]
    if missing:
        fail(f"{folder} holds no {' and no '.join(missing)}: pass the folder of a run, as its first lines name it")
    try:
        config, text = json.loads((folder / "config.json").read_text()), path.read_text()
        absent = [name for name in wanted if name not in config]
    except (OSError, ValueError, TypeError) as error:  # also of bytes that are no text, and of a number for a config
        fail(f"{folder} has no readable config.json and metrics.csv ({error})")
    if absent:
        fail(f"{folder}/config.json does not say {', '.join(absent)}: it is not a run's of these scripts")
    rows = list(csv.reader(text.splitlines()))
    ragged = [number for number, row in enumerate(rows, 1) if len(row) != len(rows[0])]
    if not text.endswith("\n") or ragged:
        fail(f"{path} is truncated: line {(ragged or [len(rows)])[0]} is not whole; copy it anew, or --resume the run")
    return config, [numbers_of(dict(zip(rows[0], row)), folder) for row in rows[1:]]


def read_run(folder: pathlib.Path) -> tuple[dict, list[dict]]:
    """As `read_whole`, of the rows those that hold an evaluation; one line where there is none."""
    config, rows = read_whole(folder)
    rows = [row for row in rows if "success_rate" in row]
    if not rows:
        fail(f"{folder} has no evaluation yet: let the run finish (--resume {folder})")
    return config, rows


def check_finished(folder: pathlib.Path, config: dict, rows: list[dict]) -> None:
    """One line where the rows of metrics.csv end before the run did: it goes on, or the file was cut off at a line.

    A phase ends with an evaluation, and each online step, an episode or DPPO's round of them, has a row.
    """
    planned, total = (config.get(name, 0) for name in ("num_offline_steps", "num_online_episodes"))
    each = config.get("episodes_per_round", 1)
    evaluations, online = ([r for r in rows if name in r] for name in ("success_rate", "episode_success"))
    if planned and not any(r["phase"] == "offline" and r.get("step", planned) == planned for r in evaluations):
        fail(f"{folder} is not finished, it has no evaluation after its {planned} offline updates: --resume it")
    made = each * sum(row["phase"] == "online" for row in online)
    last = [row for row in evaluations if row["phase"] == "online"][-1:]
    if made < total or total and not (last and each * last[0].get("step", total) >= total) or not evaluations:
        fail(f"{folder} is not finished, its metrics.csv ends after {made} of {total} online episodes: --resume it")


def numbers_of(row: dict, folder: pathlib.Path) -> dict:
    """A row of metrics.csv as numbers, by column, without its empty cells; its `phase` as text, maybe empty."""
    cells = {name: cell for name, cell in row.items() if name not in ("phase", None) and cell}
    try:
        return {name: float(cell) for name, cell in cells.items()} | {"phase": row.get("phase") or ""}
    except ValueError as error:
        fail(f"{folder / 'metrics.csv'} has a cell that is no number ({error}): restore the file as the run wrote it")


def label_and_folder(text: str) -> tuple[str, pathlib.Path]:
    """Take FOLDER or LABEL=FOLDER apart; both may contain `=`, so it is the folders that exist which decide.

    Returns:
        the label (empty if there is none) and the folder: the whole text if that is a folder, else what follows the
        first `=` that is followed by a folder. Anything else ends in one line.
    """
    if os.path.isdir(text):
        return "", pathlib.Path(text)
    for i, character in enumerate(text):
        if character == "=" and os.path.isdir(text[i + 1 :]):
            return text[:i], pathlib.Path(text[i + 1 :])
    fail(f"--runs {text}: no such folder; pass FOLDER or LABEL=FOLDER, the folder as the run's first lines name it")


def summary_of(folder: pathlib.Path) -> dict:
    """One run's entry of results.json: where it comes from, and the last evaluation of each of its phases."""
    config, rows = read_run(folder)
    if not (folder / "summary.png").is_file():
        fail(f"{folder} is not finished, it has no summary.png: --resume {folder}")
    check_finished(folder, *read_whole(folder))
    provenance, last = config["provenance"], {row["phase"]: row for row in rows}
    entry = {
        "seed": config["seed"],
        # as typed in a checkout: the runner gives the script's whole path
        "command": re.sub(r"/\S*/(?=\w+\.py\b)", "", provenance["command"].split(" --runs ")[0], count=1),
        "commit": provenance["commit"],
    }
    entry |= {
        "machine": provenance["machine"],
        "versions": provenance["versions"],
        "threads": config.get("threads") or "all",
    }
    if config["data"]["local"]:
        entry["data"] = config["data"]
    numbers = ("success_rate", "score", "return", "length", "seconds")
    phases = {LABELS[phase]: row for phase, row in last.items() if phase in LABELS}
    return entry | {label: {n: row[n] for n in numbers if n in row} for label, row in phases.items()}


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """The 95 % interval of a rate (Wilson's score interval): sensible also where every trial succeeded."""
    interval = binomtest(round(successes), trials).proportion_ci(0.95, "wilson")
    return interval.low, interval.high


def keep(options: Keep) -> None:
    entries = sorted(((summary_of(folder), folder) for folder in options.runs), key=lambda pair: pair[0]["seed"])
    seeds = [entry["seed"] for entry, _ in entries]
    if len(set(seeds)) < len(seeds):
        fail(f"seeds {seeds}: one run for each seed, please; keep the others in another folder")
    episodes = read_run(entries[0][1])[0]["eval_episodes"]
    machines = "; ".join(sorted({entry["machine"] for entry, _ in entries}))
    document = {"machine": options.machine or machines, "note": options.note, "eval_episodes": episodes}
    document |= {"mean": means([entry for entry, _ in entries], episodes), "runs": [entry for entry, _ in entries]}
    try:
        for entry, folder in entries:
            target = options.out / f"seed{entry['seed']}"
            target.mkdir(parents=True, exist_ok=True)
            for name in KEPT:
                shutil.copyfile(folder / name, target / name)
        (options.out / "results.json").write_text(json.dumps(document, indent=2) + "\n")
    except OSError as error:
        fail(f"cannot write to {options.out} ({error.strerror}): name another folder")
    labels = [label for label in LABELS.values() if label in entries[0][0]]
    print("| seed | " + " | ".join(labels) + " |\n|" + "---|" * (1 + len(labels)))
    for entry, _ in entries:
        reached = [entry.get(label, {}) for label in labels]  # a run may lack a phase, or a column
        success = [f"{row['success_rate']:.0%}" if row else "" for row in reached]
        cells = [
            text + (f" ({row['seconds']:.0f} s)" if "seconds" in row else "") for text, row in zip(success, reached)
        ]
        print(f"| {entry['seed']} | " + " | ".join(cells) + " |")
    cells = [f"{m['success_rate']:.0%} ({m['low']:.0%} to {m['high']:.0%})" for m in document["mean"].values()]
    print("| mean, 95 % | " + " | ".join(cells) + " |")


def means(entries: list[dict], episodes: int) -> dict:
    """By phase: mean success of the seeds, and its 95 % interval over the episodes of all of them taken together."""
    document = {}
    for label in LABELS.values():
        rates = [entry[label]["success_rate"] for entry in entries if "success_rate" in entry.get(label, {})]
        if rates:
            low, high = wilson(sum(rates) * episodes, len(rates) * episodes)
            document[label] = {"success_rate": sum(rates) / len(rates), "low": round(low, 4), "high": round(high, 4)}
    return document


def curve(rows: list[dict], over: str) -> tuple[list[float], list[float]]:
    """Where the evaluations stand on the axis, and their success in percent; a row without the axis is left out.

    Over critic updates: the offline phase alone, whose `step` counts the updates done; over episodes: from the policy
    that the first episode started with.
    """
    if over == "critic_updates":
        rows = [row | {over: row["step"]} for row in rows if row["phase"] == "offline" and "step" in row]
    rows = [row for row in rows if over in row]
    if over == "episodes":
        rows = [row for row in rows if not row[over]][-1:] + [row for row in rows if row[over]]
    return [row[over] for row in rows], [100 * row["success_rate"] for row in rows]


def curves(options: Curves) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[str, list] = {}
    for text in options.runs:
        label, folder = label_and_folder(text)
        config, rows = read_run(folder)
        line = curve(rows, options.over)
        if not line[0]:
            missing = (
                "offline phase" if options.over == "critic_updates" else f"column {options.over!r} in its metrics.csv"
            )
            other = "seconds" if options.over == "updates" else "updates"
            fail(f"{folder} has no {missing} to draw over {options.over.replace('_', ' ')}: use --over {other}")
        groups.setdefault(label or config["script"], []).append(line)
    figure, ax = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for i, (label, lines) in enumerate(groups.items()):
        for x, y in lines:
            ax.plot(x, y, "o-", ms=2.5, lw=0.8, color=f"C{i}", alpha=0.5 if len(lines) > 1 else 1.0)
        # at the points of the shortest run, between the others' points; a mean of one run is that run
        x = min((line[0] for line in lines), key=len)
        mean = np.mean([np.interp(x, *line) for line in lines], 0)
        ax.plot(x, mean, lw=2.2, color=f"C{i}", label=f"{label} (n={len(lines)})")
    ax.set(xlabel=options.over.replace("_", " "), ylabel="success rate, %", ylim=(-3, 103))
    ax.set_title(options.title, fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(loc="best")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.out, dpi=110)
    except (OSError, ValueError) as error:  # ValueError: of an ending that is no picture's
        fail(f"cannot write {options.out} ({getattr(error, 'strerror', None) or error}): name a .png elsewhere")
    plt.close(figure)
    print(f"{options.out}: {sum(map(len, groups.values()))} runs")


# --- THE TABLES OF THE READMES: generated, between markers, from results.json ---
# Folder in benchmarks/results -> name, script, algorithm, where in the paper
DEFAULT_TASK = {
    "quickstart": ("diffusion, Cal-QL", "parl_diffusion_calql.py", "PA-RL + Cal-QL, diffusion policy",
                   "algorithm 2, table 1"),
    "flow-calql": ("flow, Cal-QL", "parl_flow_calql.py", "PA-RL + Cal-QL, flow-matching policy", "not in the paper"),
    "transformer-calql": ("transformer, Cal-QL", "parl_transformer_calql.py",
                          "PA-RL + Cal-QL, autoregressive transformer", "table 2, right"),
    "diffusion-iql": ("diffusion, IQL", "parl_diffusion_iql.py", "PA-RL + IQL, diffusion policy", "table 2, middle"),
    "diffusion-rlpd": ("diffusion, RLPD", "parl_diffusion_rlpd.py", "PA-RL + RLPD, diffusion policy: no offline phase",
                       "table 2, left"),
}  # fmt: skip


def scripts_table(results: pathlib.Path) -> str:
    """README.md's: a line for each script, with the means of the default task."""
    lines = ["| script | algorithm | paper | default task: cloned, offline, online |", "|---|---|---|---|"]
    for name, (_, script, algorithm, paper) in DEFAULT_TASK.items():
        document = json.loads((results / name / "results.json").read_text())
        text = ", ".join(rate_cell(document, label, False) or "none" for label in LABELS.values())
        seeds = f"{len(document['runs'])} seed{'s' * (len(document['runs']) > 1)}"
        link = f"[{text} ({seeds})](benchmarks/results/{name}/results.json)"
        lines.append(f"| [{script}]({script}) | {algorithm} | {paper} | {link} |")
    return "\n".join(lines)


def rate_cell(document: dict, label: str, long: bool) -> str:
    """One phase's success: the mean, and with `long` its interval and every seed; empty where there is none."""
    whole = document["mean"].get(label)
    if whole is None:
        return ""
    rate, low, high = (f"{100 * whole[key]:.0f}" for key in ("success_rate", "low", "high"))
    seeds = ", ".join(f"{100 * run[label]['success_rate']:.0f}" for run in document["runs"] if label in run)
    return f"**{rate} %** ({low} to {high}): {seeds}" if long else f"{rate} %"


def seconds_of(run: dict) -> float:
    """What a run took, by its own clock."""
    return max(run[label]["seconds"] for label in LABELS.values() if label in run)


def default_task_table(results: pathlib.Path) -> str:
    """benchmarks/README.md's: the same with intervals, and every seed."""
    lines = ["| script | seeds | cloned | after offline RL | after online RL | time |", "|---|---|---|---|---|---|"]
    for name, (short, *_) in DEFAULT_TASK.items():
        document = json.loads((results / name / "results.json").read_text())
        cells = [rate_cell(document, label, True) for label in LABELS.values()]
        seconds = [seconds_of(run) for run in document["runs"]]
        head = f"[{short}](results/{name}/results.json) | {len(document['runs'])}"
        lines.append(f"| {head} | {' | '.join(cells)} | {min(seconds):.0f} to {max(seconds):.0f} s |")
    return "\n".join(lines)


# The same of other experiments, one a line: a folder in benchmarks/results -> what it is called
CUBE = {
    "cube-single-chunk/flow-calql": "PA-RL + Cal-QL, flow policy",
    "cube-single-chunk/diffusion-calql": "PA-RL + Cal-QL",
    "cube-single-chunk/transformer-calql": "PA-RL + Cal-QL, transformer",
    "cube-single-chunk/diffusion-rlpd": "PA-RL + RLPD",
    "cube-single-chunk/diffusion-iql": "PA-RL + IQL",
    "cube-single-chunk/idql": "for comparison: IDQL",
    "cube-single-chunk/calql_gaussian": "Cal-QL, Gaussian (not tuned)",
}
CUBE_MORE = CUBE | {
    "cube-single-chunk/rlpd_gaussian": "RLPD, Gaussian (not tuned)",
    "cube-single-chunk/filtered_bc": "iterated filtered cloning",
    "cube-single-chunk/flow-best": "PA-RL + Cal-QL, flow policy, the best candidate acts and is taught",
    "cube-single-chunk/calql-narrow": "PA-RL + Cal-QL, narrower policy, half the cloning",
    "cube-single-chunk/calql-best": "PA-RL + Cal-QL, the best candidate acts and is taught",
    "cube-single-chunk/transformer-best": "PA-RL + Cal-QL, transformer, the best candidate acts and is taught",
    "cube-single-chunk/iql-best": "PA-RL + IQL, the best candidate acts, draws from the 8 best are taught",
    "cube-single-chunk/rlpd-draws": "PA-RL + RLPD, narrower policy, half the cloning",
    "cube-single-chunk/rlpd-best": "PA-RL + RLPD, the best candidate acts and is taught",
    "cube-single-chunk/rlpd-220": "the same, more episodes",
    "cube-single-chunk/iql-20000": "PA-RL + IQL, half the offline updates, the best candidate taught",
    "cube-single-chunk/chunk-5": "the same, offline only",
    "cube-single-chunk/chunk-1": "the same with `--chunk 1`",
}
VLA = {
    "openvla-sim/newcomer": "the preset, as a newcomer runs it, seeds 4 to 6",
    "openvla-sim/preset": "the preset, from weights cloned before, seeds 1 to 3",
    "openvla-sim/eight-samples": "before, with a critic that begins at 0: the best of eight samples",
    "openvla-sim/eight-samples-tuning": "the same, the tuning seed",
    "openvla-sim/two-samples-tuning": "the best of two, the tuning seed",
    "openvla-sim/more-online-tuning": "the tuning seed, other cloned weights, no distilling",
    "openvla-sim/twelve-episodes": "one update a step online, draws of equation 4.3",
    "openvla-sim/more-distilling": "the same, five times the distilling at five times the rate",
    "openvla-sim/400-episodes": "400 zero-shot episodes",
    "openvla-sim/400-episodes-tuning": "the same, the tuning seed",
}
ANTMAZE = {
    "antmaze-umaze": "`antmaze-umaze-v2`",
    "antmaze-umaze-diverse-chunk-online": "`antmaze-umaze-diverse-v2` *",
    "antmaze-medium-diverse-million": "`antmaze-medium-diverse-v2`, its own flags *",
    "antmaze-medium-diverse-chunk-online": "`antmaze-medium-diverse-v2`, the flags of `umaze` *",
    "antmaze-umaze-chunk-two-online": "`antmaze-umaze-v2`, 2 candidates",
    "antmaze-umaze-chunk-online": "`antmaze-umaze-v2` *",
    "antmaze-umaze-chunk-two": "`antmaze-umaze-v2`, 2 candidates, offline only *",
    "antmaze-umaze-chunk": "`antmaze-umaze-v2`, 32 candidates, offline only *",
    "antmaze-umaze-diverse-chunk": "`antmaze-umaze-diverse-v2`, 32 candidates, offline only *",
}
BASELINES = {
    "baselines/parl_gaussian_calql": "PA-RL + Cal-QL with a Gaussian",
    "baselines/calql_gaussian": "Cal-QL, Gaussian",
    "baselines/rlpd_gaussian": "RLPD, Gaussian",
    "baselines/idql": "IDQL",
    "baselines/dql": "DQL",
    "baselines/cem_calql": "CEM + Cal-QL from random populations",
    "baselines/filtered_bc": "iterated filtered cloning",
    "baselines/dppo": "DPPO",
}
ABLATIONS = {
    "ablations/whole": "PA-RL + Cal-QL",
    "ablations/without-global": "without global optimization (table 4): one sample, no re-ranking",
    "ablations/without-local": "without local optimization (table 4): no gradient steps",
    "ablations/data-actions": "the data's actions distilled (figure 6)",
}


def online_episodes(folder: pathlib.Path) -> tuple[int, int]:
    """Episodes of a kept run before its online phase (RLPD's, without an update), and in it, which tables.py counts."""
    rows = read_whole(folder)[1]
    before = max((row.get("episodes", 0) for row in rows if row["phase"] != "online"), default=0)
    return int(before), int(max(row.get("episodes", 0) for row in rows) - before)


def experiments_table(results: pathlib.Path, experiments: dict[str, str], long: bool) -> str:
    """A line for each experiment; with `long` intervals, every seed and the time, else the means alone."""
    lines = ["| | cloned | after offline RL | after online RL | episodes online |" + " minutes a run |" * long]
    lines.append("|---" * (6 if long else 5) + "|")
    base = "results" if long else "benchmarks/results"
    for name, title in experiments.items():
        document = json.loads((results / name / "results.json").read_text())
        cells = [rate_cell(document, label, long) for label in LABELS.values()]
        seeds = [results / name / f"seed{run['seed']}" for run in document["runs"]]
        before, online = max(map(online_episodes, seeds))
        cells.append(f"{before} + {online}" if before else str(online or "none"))
        cells += [", ".join(f"{seconds_of(run) / 60:.0f}" for run in document["runs"])] * long
        lines.append(f"| [{title}]({base}/{name}/results.json) | {' | '.join(cells)} |")
    return "\n".join(lines)


# Page -> its tables: name, and what makes it of benchmarks/results
GENERATED = {
    "README.md": {"scripts": scripts_table, "cube": lambda results: experiments_table(results, CUBE, False)},
    "benchmarks/README.md": {
        "default task": default_task_table,
        "baselines": lambda results: experiments_table(results, BASELINES, True),
        "ablations": lambda results: experiments_table(results, ABLATIONS, True),
        "cube": lambda results: experiments_table(results, CUBE_MORE, True),
        "antmaze": lambda results: experiments_table(results, ANTMAZE, True),
        "vla": lambda results: experiments_table(results, VLA, True),
    },
}


def with_table(text: str, name: str, table: str, file: str) -> str:
    """A page with what stands between its two markers of this name replaced."""
    begin, end = f"<!-- table: {name}, by python -m benchmarks.report readme -->", "<!-- end of table -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        fail(f"{file} has lost the markers of its table: put {begin} before it and {end} behind it")
    return f"{before}{begin}\n{table}\n{end}{after}"


def readme(options: Readme) -> None:
    from benchmarks import tables

    for file, tables_of_it in GENERATED.items():
        path = options.root / file
        text = path.read_text()
        for name, make in tables_of_it.items():
            text = with_table(text, name, make(options.root / "benchmarks/results"), file)
        path.write_text(text)
        print(path)
    for listed in sorted((options.root / "benchmarks/results").rglob("runs.csv")):
        for name, text in tables.made_again(listed.parent, options.root).items():
            (listed.parent / name).write_text(text)
        print(listed.parent / "table.md")


def main(argv: list[str] | None = None) -> None:
    commands = {"keep": Keep, "curves": Curves, "tables": Tables, "readme": Readme}
    chosen = tyro.extras.subcommand_cli_from_dict(commands, args=argv, description=__doc__)
    if isinstance(chosen, Tables):
        from benchmarks import tables  # takes scipy, which the others do without

        tables.write(chosen)
    elif isinstance(chosen, Readme):
        readme(chosen)
    elif not chosen.runs:
        fail("--runs names no run: pass at least one folder")
    else:
        keep(chosen) if isinstance(chosen, Keep) else curves(chosen)


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # as a file, too, it finds `benchmarks`
    main()
