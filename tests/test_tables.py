"""Tables of many runs: intervals against cases worked out by hand and rliable, what is counted, what is refused."""

import csv
import dataclasses
import html.parser
import json
import pathlib
import re
import shlex
import sys

import numpy as np
import pytest

from benchmarks import intervals, report, tables

ROOT = pathlib.Path(__file__).parent.parent
X = np.array([[94, 30], [98, 90], [66, 62], [98, 44], [88, 70]], float)  # (runs, tasks)
Y = np.array([[60, 10], [80, 40], [90, 62], [92, 36], [100, 20]], float)
COLUMNS = ["phase", "step", "episodes", "seconds", "success_rate", "score", "episode_success", "policy_loss"]


def write_run(folder, seed=1, offline=0.5, online=(0.8, 0.9), acted=(0, 1, 1, 1), **config):
    """A run with four online episodes of these successes, evaluated after the second and the fourth."""
    folder.mkdir(parents=True)
    settings = {
        "script": "parl_diffusion_calql", "env_id": "pointmaze-medium-v0", "seed": seed, "eval_episodes": 10,
        "num_online_episodes": len(acted), "data": {"local": False, "source": "<here>"},
        "provenance": {"command": f"python x.py --seed {seed} --flag '<&>'", "commit": "abc", "machine": "m",
                       "versions": "v"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings | config))
    rows = [("cloning", 9, 0, {"policy_loss": 1}), ("cloning", 10, 0, {"success_rate": 0.1, "score": 10})]
    if offline is not None:
        rows.append(("offline", 10, 0, {"success_rate": offline, "score": 100 * offline}))
    for i, success in enumerate(acted):
        rows.append(("online", i, i + 1, {"episode_success": success}))
        if i % 2:
            rows.append(("online", i + 1, i + 1, {"success_rate": online[i // 2], "score": 100 * online[i // 2]}))
    with open(folder / "metrics.csv", "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for i, (phase, step, episodes, more) in enumerate(rows):
            table.writerow({"phase": phase, "step": step, "episodes": episodes, "seconds": 3.0 * i} | more)
    return folder


def options(out, runs, **more):
    return report.Tables(out, runs=tuple(f"{label}={folder}" for label, folder in runs), **more)


# --- intervals ---
def test_the_bootstrap_of_two_runs_by_hand():
    """Runs 0 and 1: drawn anew the mean is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4, so the interval is all of it.

    Of two tasks, (0, 1) and a constant 1, it is the mean of that and 1: from 1/2 to 1. The strata stay apart: a draw of
    all four together could give less than 1/2.
    """
    assert intervals.with_interval(intervals.mean, [[0, 1]]) == (0.5, 0.0, 1.0)
    assert intervals.with_interval(intervals.mean, [[0, 1], [1, 1]]) == (0.75, 0.5, 1.0)
    assert intervals.with_interval(intervals.improvement, [[1, 0], [0, 0]]) == (0.75, 0.5, 1.0)
    value, low, high = intervals.with_interval(intervals.mean, [[0.3]])
    assert value == 0.3 and np.isnan([low, high]).all()


def test_the_bootstrap_covers_what_a_normal_interval_covers():
    """Of many runs the interval of the mean is that of the central limit theorem, with the variance over n."""
    x = np.random.default_rng(0).normal(5, 2, 400)
    value, low, high = intervals.with_interval(intervals.mean, [x])
    half = 1.959964 * x.std() / 20
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.03 * half * 2)


def test_definitions_by_hand():
    assert intervals.interquartile_mean(np.array([0, 10, 20, 100.0])) == 15  # the middle two
    assert intervals.interquartile_mean(np.array([0.0, 10]), np.array([20, 100.0])) == 15  # of all tasks together
    assert intervals.interquartile_mean(np.array([1.0, 2, 6])) == 3  # too few to leave any out
    assert intervals.mean(np.array([0.0, 1]), np.array([1.0] * 6)) == 0.75  # each task counts the same
    assert intervals.improvement(np.array([3.0, 1]), np.array([2.0, 1])) == (1 + 1 + 0 + 0.5) / 4


def test_rliable_gave_the_same():
    """rliable 1.2.0 (its arch replaced by arch 8.0.0), 20,000 draws, run once on X and Y on 2026-11-26."""
    theirs = {
        "mean": (intervals.mean, X.T, (74.0, 63.4, 84.4)),
        "iqm": (intervals.interquartile_mean, X.T, (78.33333333, 63.0, 89.33333333)),
        "improvement": (intervals.improvement, [*X.T, *Y.T], (0.71, 0.46, 0.92)),
    }
    for name, (statistic, strata, numbers) in theirs.items():
        value, low, high = intervals.with_interval(statistic, strata)
        assert value == pytest.approx(numbers[0]), name
        assert (low, high) == pytest.approx(numbers[1:], abs=0.5 if value > 1 else 0.005), name  # 0.5 of 100


# --- what is counted ---
def test_the_three_numbers_of_a_run(tmp_path):
    entry = tables.entry_of("a", write_run(tmp_path / "run"))
    assert (entry.offline, entry.online, entry.regret, entry.episodes) == (50, 90, 0.25, 4)
    entry = tables.entry_of("a", tmp_path / "run", episodes=3)  # the last evaluation up to there is after two
    assert (entry.offline, entry.online, entry.regret) == (50, 80, pytest.approx(1 / 3))
    entry = tables.entry_of("a", write_run(tmp_path / "rlpd", offline=None))  # no offline phase: the cloned policy
    assert (entry.offline, entry.online) == (10, 90)
    entry = tables.entry_of("a", write_run(tmp_path / "offline", acted=(), num_offline_steps=10))
    assert (entry.offline, entry.online, entry.regret) == (50, None, None)
    tables.write(options(tmp_path / "out", [("a", tmp_path / "run"), ("b", tmp_path / "offline")]))  # one seed each
    assert "| pointmaze-medium-v0 | 50.0 → 90.0 | 50.0 |" in (tmp_path / "out/table.md").read_text()


def test_a_run_with_nothing_before_it_acts_has_no_first_number(tmp_path):
    """RLPD's Gaussian: neither cloned nor trained offline. One that is cut off is still refused."""
    folder = write_run(tmp_path / "a", offline=None)
    path, lines = folder / "metrics.csv", (folder / "metrics.csv").read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], *lines[3:]]))
    entry = tables.entry_of("rlpd", folder)
    assert (entry.offline, entry.online, entry.regret) == (None, 90, 0.25)
    report.main(["tables", str(tmp_path / "out"), "--runs", f"rlpd={folder}"])
    assert "|  | 90.0 |" in (tmp_path / "out" / "table.md").read_text()
    path.write_text("".join([lines[0], *lines[3:-2]]))
    with pytest.raises(SystemExit, match="not finished"):
        tables.entry_of("rlpd", folder)


def test_tables_curves_and_a_page(tmp_path):
    runs, maze = [], {"env_id": "antmaze-umaze-v2"}
    for seed in (1, 2):
        runs += [("ours", write_run(tmp_path / f"a{seed}", seed, 0.2 * seed)),
                 ("ours", write_run(tmp_path / f"b{seed}", seed, 0.6, **maze)),
                 ("its | <own>", write_run(tmp_path / f"c{seed}", seed, 0.1)),
                 ("its | <own>", write_run(tmp_path / f"d{seed}", seed, 0.1, **maze))]  # fmt: skip
    tables.write(options(tmp_path / "out", runs, html=True))
    text = (tmp_path / "out/table.md").read_text()
    assert "| pointmaze-medium-v0 | 30.0 → 90.0 | 10.0 → 90.0 |" in text
    assert "| all tasks | 45.0 → 90.0 | 10.0 → 90.0 |" in text
    assert (
        "| pointmaze-medium-v0 | ours | 2 | 30.0 (20.0 to 40.0) | 90.0 (90.0 to 90.0) | 4 | 0.25 (0.25 to 0.25) |"
        in text
    )
    assert "| ours over its / <own> | 1.00 (1.00 to 1.00) | 0.50 (0.50 to 0.50) |" in text
    lines = text.splitlines()
    for before, line in zip(lines, lines[1:]):
        assert not (before.startswith("|") and line.startswith("|")) or before.count("|") == line.count("|")
    with open(tmp_path / "out/table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [r for r in rows if (r["method"], r["task"], r["number"]) == ("ours", "pointmaze-medium-v0", "offline")]
    assert [(float(r["value"]), float(r["low"]), float(r["high"]), r["runs"]) for r in found] == [(30, 20, 40, "2")]
    page = (tmp_path / "out/index.html").read_text()
    seen = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: seen.append((tag, dict(attributes)))
    parser.feed(page)
    assert all(a["src"].startswith("data:image/png;base64,") for tag, a in seen if tag == "img")
    assert not {"link", "script", "own"} & {tag for tag, _ in seen}  # needs no other file, and texts are escaped
    assert sum(tag == "details" for tag, _ in seen) == len(runs)
    assert "python x.py --seed 2 --flag &#x27;&lt;&amp;&gt;&#x27;" in page
    for over in ("episodes", "seconds"):
        assert (tmp_path / f"out/curves-{over}.png").read_bytes().startswith(b"\x89PNG")


def test_the_pages_command_can_be_pasted_into_a_shell(tmp_path, monkeypatch):
    arguments = ["tables", str(tmp_path / "out"), "--html", "--runs", f"PA-RL + 'x'={write_run(tmp_path / 'a run')}"]
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    report.main()
    made = re.search(r"<p>Made by: (.*)</p>", (tmp_path / "out/index.html").read_text())[1]
    assert shlex.split(html.unescape(made)) == ["python", "-m", "benchmarks.report", *arguments]


# --- what is refused ---
@pytest.mark.parametrize(
    ("runs", "more", "message"),
    [
        ([dict(), dict(seed=2, env_id="pointmaze-medium-v1")], {}, "two versions of one task"),
        ([dict(), dict(seed=2, data={"local": True, "source": ""})], {}, "--mix-sources"),
        ([dict(), dict()], {}, "both seed 1"),
        ([dict(), dict(seed=2, acted=(1, 1))], {}, "pass --episodes 2"),
        ([dict()], {"episodes": 5}, "fewer than --episodes 5"),
        ([dict()], {"episodes": 1}, "the first is after 2"),
        ([dict()], {"episodes": -1}, "at least 0"),
        ([dict(num_online_episodes=6)], {}, "not finished"),
        ([dict(num_offline_steps=20)], {}, "no evaluation after its 20 offline updates"),
        ([dict()], {"suite": "table1"}, "one of the two"),
    ],
)
def test_what_cannot_stand_in_a_table_is_one_line(tmp_path, runs, more, message):
    named = [("a", write_run(tmp_path / f"run{i}", **run)) for i, run in enumerate(runs)]
    with pytest.raises(SystemExit) as caught:
        tables.write(options(tmp_path / "out", named, **more))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_local_and_published_data_may_be_mixed_on_purpose(tmp_path):
    local = {"data": {"local": True, "source": ""}}
    named = [("a", write_run(tmp_path / "a")), ("a", write_run(tmp_path / "b", seed=2, **local))]
    tables.write(options(tmp_path / "out", named, mix_sources=True))
    assert "**Local data**, not the published: pointmaze-medium-v0" in (tmp_path / "out/table.md").read_text()


def test_a_run_in_rounds_of_episodes_counts_them_all(tmp_path):
    """DPPO's row is a round: 4 of ten episodes are the 40 that were to be made."""
    folder = write_run(tmp_path / "run", num_online_episodes=40, episodes_per_round=10)
    whole, half = tables.entry_of("a", folder), tables.entry_of("a", folder, 20)
    assert (whole.episodes, whole.online, whole.regret) == (40, 90, 0.25)
    assert (half.episodes, half.online, half.regret) == (20, 80, 0.5)
    unfinished = write_run(tmp_path / "other", num_online_episodes=50, episodes_per_round=10)
    with pytest.raises(SystemExit, match="ends after 40 of 50 online episodes"):
        tables.entry_of("a", unfinished)


def test_a_csv_cut_anywhere_is_refused(tmp_path):
    folder = write_run(tmp_path / "run")
    whole = (folder / "metrics.csv").read_bytes()
    for size in range(len(whole)):
        if whole[:size].endswith(b"\n") or size % 5 == 0:  # at every line's end, and within lines
            (folder / "metrics.csv").write_bytes(whole[:size])
            with pytest.raises(SystemExit, match="truncated|not finished|no readable") as caught:
                tables.entry_of("a", folder)
            assert "\n" not in str(caught.value)
    (folder / "metrics.csv").write_bytes(whole)
    tables.entry_of("a", folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="does not say script, env_id"):
        tables.entry_of("a", folder)


def test_the_tables_of_the_readmes_are_current():
    """`python -m benchmarks.report readme` would change nothing."""
    assert all(len(made) > 1 for made in report.GENERATED.values())
    for file, made in report.GENERATED.items():
        text = (ROOT / file).read_text()
        for name, make in made.items():
            assert report.with_table(text, name, make(ROOT / "benchmarks/results"), file) == text, (file, name)
    with pytest.raises(SystemExit, match="lost the markers"):
        report.with_table("no markers", "scripts", "", "README.md")


@pytest.mark.parametrize("name", ["ablations", "baselines", "cube-single-chunk"])
def test_the_tables_of_kept_runs_are_current(name):
    """`python -m benchmarks.report readme` would change neither table.md, table.csv nor runs.csv."""
    assert len(list((ROOT / "benchmarks/results").rglob("table.md"))) == 3  # a new one: name it above
    folder = ROOT / "benchmarks/results" / name
    for file, text in tables.made_again(folder, ROOT).items():
        assert text == (folder / file).read_text(), f"{folder / file}: python -m benchmarks.report readme"


def test_tables_made_again_are_those_that_were_made(tmp_path):
    runs = [("b", write_run(tmp_path / "b", 2, 0.7)), ("a", write_run(tmp_path / "a", 1))]
    tables.write(options(tmp_path / "out", runs, episodes=2))
    made = {name: (tmp_path / "out" / name).read_text() for name in ("table.md", "table.csv", "runs.csv")}
    assert tables.made_again(tmp_path / "out", ROOT) == made
    rows = (tmp_path / "a/metrics.csv").read_text()
    (tmp_path / "a/metrics.csv").write_text(rows.replace("0.8,80.0", "0.6,60.0"))  # the one that counts
    again = tables.made_again(tmp_path / "out", ROOT)
    assert "50.0 → 60.0" in again["table.md"] and "50.0 → 80.0" in made["table.md"]
    assert [again[name] != text for name, text in made.items()] == [True] * 3


def test_the_suites_of_a_run_are_those_that_name_it():
    """By all settings that matter: of the data's actions distilled figure 6, of the rest not; an older run has none."""
    folder = ROOT / "benchmarks/results/ablations/data-actions/seed1"
    entry = tables.entry_of("a", folder)
    assert tables.suites_of(entry) == ["figure6"]

    def suites_with(seed=1, **changes):
        return tables.suites_of(dataclasses.replace(entry, seed=seed, config=entry.config | changes))

    assert suites_with(log_every=7, runs="/elsewhere", threads=9) == ["figure6"]
    assert suites_with(seed=6) == suites_with(batch_size=65) == suites_with(script="parl_flow_calql") == []
    assert "table1" in suites_with(distill_from="policy") and "figure6" in suites_with(distill_from="policy")
    del entry.config["distill_from"]  # as before there was this flag: the policy's own
    assert "table1" in tables.suites_of(entry)
    assert tables.suites_of(dataclasses.replace(entry, task="nowhere-v0")) == []


def test_a_runs_online_episodes_are_one_number_in_all_tables():
    """The READMEs' tables, table.md and the settings; what RLPD acts before its first update is told apart."""
    experiments = report.CUBE_MORE | report.BASELINES | report.ABLATIONS
    for folder in (folder for name in experiments for folder in (ROOT / "benchmarks/results" / name).glob("seed*")):
        config, (before, online) = report.read_run(folder)[0], report.online_episodes(folder)
        assert (before, online) == (config.get("num_warmup_episodes", 0), config["num_online_episodes"]), folder
    table = report.experiments_table(ROOT / "benchmarks/results", {"baselines/rlpd_gaussian": "RLPD"}, True)
    assert "| 10 + 200 |" in table


def test_a_suite_finds_the_runs_that_the_runner_made(tmp_path, capsys):
    run = pytest.importorskip("benchmarks.run")
    jobs, _ = run.jobs_of(run.Options(suite="critics", results=tmp_path))
    for job in jobs[:-1]:
        write_run(tmp_path / job.name / "a run", job.seed, script=job.script)
        (tmp_path / job.name / "a run/summary.png").write_bytes(b"picture")
    tables.write(report.Tables(tmp_path / "out", suite="critics", results=tmp_path))
    said = capsys.readouterr().out
    assert f"1 of {len(jobs)} runs are not finished" in said
    assert all(f"| {job.label} | " in said for job in jobs)
    with pytest.raises(SystemExit, match="holds no finished run of critics"):
        tables.write(report.Tables(tmp_path / "out", suite="critics", results=tmp_path / "nowhere"))
