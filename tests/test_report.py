"""What the README's tables and pictures are made with: kept results, learning curves, and runs that cannot be kept."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parent.parent


def write_run(folder, seed=1, successes=(0.1, 0.5, 0.9), finished=True):
    folder.mkdir(parents=True)
    config = {
        "script": "parl_diffusion_calql", "seed": seed, "threads": 1, "eval_episodes": 10, "data": {"local": False},
        "provenance": {
            "command": f"python /a/checkout/x.py --seed {seed} --runs /tmp/r", "commit": "abc", "machine": "m",
            "versions": "v",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "metrics.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["phase", "step", "updates", "episodes", "seconds", "success_rate", "policy_loss"])
        table.writeheader()
        for i, (phase, success) in enumerate(zip(("cloning", "offline", "online"), successes)):
            common = {"phase": phase, "step": 9, "updates": 10 * i, "episodes": 5 * (i == 2), "seconds": 3.0 * i}
            table.writerow(common | {"policy_loss": 0.5})  # a row of training, which is no evaluation
            table.writerow(common | {"success_rate": success})
    if finished:
        (folder / "summary.png").write_bytes(b"picture")
    return folder


def test_kept_results_say_what_was_reached_and_how(tmp_path, capsys):
    runs = [write_run(tmp_path / f"run{seed}", seed, (0.1, 0.5, seed / 10)) for seed in (2, 1)]
    report.keep(report.Keep(tmp_path / "out", runs, machine="a machine"))
    document = json.loads((tmp_path / "out/results.json").read_text())
    assert document["machine"] == "a machine" and document["eval_episodes"] == 10
    assert [run["seed"] for run in document["runs"]] == [1, 2]
    assert document["runs"][0]["command"] == "python x.py --seed 1"
    assert document["runs"][1]["after online RL"] == {"success_rate": 0.2, "seconds": 6.0}
    assert (tmp_path / "out/seed2/metrics.csv").read_text() == (runs[0] / "metrics.csv").read_text()
    assert "| 2 | 10% (0 s) | 50% (3 s) | 20% (6 s) |" in capsys.readouterr().out
    report.keep(report.Keep(tmp_path / "said by the runs", runs))  # whatever machine this is
    assert json.loads((tmp_path / "said by the runs/results.json").read_text())["machine"] == "m"


def test_curves_stand_where_the_evaluations_were(tmp_path):
    _, rows = report.read_run(write_run(tmp_path / "run"))
    assert report.curve(rows, "updates") == ([0, 10, 20], [10, 50, 90])
    assert report.curve(rows, "episodes") == ([0, 5], [50, 90])  # from what the first episode started with
    assert report.curve(rows, "critic_updates") == ([9], [50])  # `step` counts what is done
    report.curves(report.Curves(tmp_path / "c.png", [f"a=b={tmp_path / 'run'}", str(tmp_path / "run")]))
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_is_one_whatever_its_name_and_label(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "lr=0.1", "sweep=2/lr=0.1", "b=c"):
        (tmp_path / name).mkdir(parents=True)
        for label in ("", "a", "utd = 10", "x=y"):
            for folder in (name, str(tmp_path / name)):
                text = f"{label}={folder}" if label else folder
                assert report.label_and_folder(text) == (label, report.pathlib.Path(folder))
    assert report.label_and_folder("a=b=c") == ("a", report.pathlib.Path("b=c"))  # the first that names a folder
    for text in ("nowhere", "a=nowhere", "plain=", "=", "", "plain=nowhere", "x" * 5000):
        with pytest.raises(SystemExit, match="no such folder; pass FOLDER or LABEL=FOLDER") as caught:
            report.label_and_folder(text)
        assert "\n" not in str(caught.value)


def rewrite(folder, columns):
    """metrics.csv with these columns in this order."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(folder / "metrics.csv", "w", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def test_the_columns_of_metrics_may_stand_in_any_order_and_some_be_absent(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    everything = report.read_run(folder)
    columns = ["success_rate", "seconds", "episodes", "phase", "updates", "step", "policy_loss"]
    rewrite(folder, columns)
    assert report.read_run(folder) == everything
    picture = tmp_path / "c.png"
    for absent in columns:
        folder = write_run(tmp_path / absent / "run")
        rewrite(folder, [name for name in columns if name != absent])
        if absent == "success_rate":
            with pytest.raises(SystemExit, match="no evaluation yet"):
                report.read_run(folder)
            continue
        report.keep(report.Keep(tmp_path / absent / "kept", [folder]))
        for over in ("updates", "episodes", "seconds", "critic_updates"):
            if absent == over or over == "critic_updates" and absent in ("phase", "step"):
                with pytest.raises(SystemExit, match="use --over"):
                    report.curves(report.Curves(picture, [str(folder)], over))
            else:
                report.curves(report.Curves(picture, [str(folder)], over))
    assert "| 1 | 10% | 50% | 90% |" in capsys.readouterr().out  # without seconds
    for rows in ("online,0.5,more\n", "online,0.5\noffline\n"):  # too long and too short
        (folder / "metrics.csv").write_text(f"phase,success_rate\n{rows}")
        with pytest.raises(SystemExit, match="is truncated"):
            report.read_run(folder)
    (folder / "metrics.csv").write_text("phase,success_rate\nonline,half\n")
    with pytest.raises(SystemExit, match="no number"):
        report.read_run(folder)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda folder: folder.mkdir(), "no config.json and no metrics.csv"),
        (lambda folder: write_run(folder, finished=False), "--resume"),
        (lambda folder: write_run(folder, successes=()), "no evaluation yet"),
    ],
)
def test_a_run_that_cannot_be_kept_is_one_line(tmp_path, build, message):
    build(tmp_path / "run")
    command = [sys.executable, "benchmarks/report.py", "keep", str(tmp_path / "out"), "--runs", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["keep", "curves"])
def test_a_csv_that_was_cut_off_is_one_line(command, tmp_path):
    """Within a line, keep and curves refuse it; between two lines, keep, whose runs are to be finished, does."""
    folder, out = write_run(tmp_path / "run"), tmp_path / "out" / "c.png"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_offline_steps": 9, "num_online_episodes": 1}))
    rows = list(csv.reader(open(folder / "metrics.csv", newline="")))
    episode, evaluation = ["online", 0, 20, 5, 6.0, "", 0.5, 1], ["online", 1, 20, 5, 6.0, 0.9, "", ""]
    with open(folder / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerow([*rows[0], "episode_success"])
        csv.writer(file).writerows([*([*row, ""] for row in rows[1:-2]), episode, evaluation])
    whole = (folder / "metrics.csv").read_bytes()
    for size in range(len(whole)):
        at_a_line, within = whole[:size].endswith(b"\n"), size % 7 == 0
        if at_a_line and command == "keep" or within and not at_a_line:
            (folder / "metrics.csv").write_bytes(whole[:size])
            with pytest.raises(SystemExit, match="truncated|not finished|no evaluation yet|no readable") as caught:
                report.main([command, str(out), "--runs", str(folder)])
            assert "\n" not in str(caught.value) and not out.parent.exists()
    (folder / "metrics.csv").write_bytes(whole)
    report.main([command, str(out), "--runs", str(folder)])
    assert out.exists()


@pytest.mark.parametrize("command", ["keep", "curves"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "no readable config.json"), (b"\xff", "no readable"), (b"3", "no readable"),
        (b"{}", "does not say script, seed, data"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_read_is_one_line(command, content, words, tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(SystemExit, match=words) as caught:
        report.main([command, str(tmp_path / "out.png"), "--runs", str(folder)])
    assert "\n" not in str(caught.value)


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path):
    folder = write_run(tmp_path / "run")
    (tmp_path / "file").touch()
    for command, out in (("keep", "file/out"), ("curves", "file/c.png"), ("curves", "c.nothing")):
        with pytest.raises(SystemExit, match="cannot write") as caught:
            report.main([command, str(tmp_path / out), "--runs", str(folder)])
        assert "\n" not in str(caught.value)


def test_two_runs_of_one_seed_are_not_kept_over_each_other(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(SystemExit, match="one run for each seed"):
        report.keep(report.Keep(tmp_path / "out", runs))


def test_the_mean_of_the_seeds_has_an_interval(tmp_path):
    """Wilson's interval by hand: of 4 in 10 it is [0.1682, 0.6873], of 10 in 10 it begins at 1 / (1 + z^2 / 10)."""
    assert report.wilson(4, 10) == pytest.approx((0.1682, 0.6873), abs=1e-4)
    assert report.wilson(10, 10) == pytest.approx((1 / (1 + 1.959964**2 / 10), 1.0))
    runs = [write_run(tmp_path / f"run{seed}", seed, (0.1, 0.5, 0.2 * seed)) for seed in (1, 3)]
    report.keep(report.Keep(tmp_path / "out", runs))
    mean = json.loads((tmp_path / "out/results.json").read_text())["mean"]
    low, high = report.wilson(8, 20)
    assert mean["after online RL"] == {"success_rate": 0.4, "low": round(low, 4), "high": round(high, 4)}
