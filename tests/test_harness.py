"""The harness around a run: who owns its folder, when it stops, what it refuses, and where trajectories end."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch

import parl_diffusion_calql as calql
import parl_diffusion_iql
import parl_diffusion_rlpd
import parl_flow_calql
import parl_transformer_calql
from benchmarks.harness import cli, datasets, rollouts, runs
from benchmarks.tasks import load_dataset, make_env
from benchmarks.tasks.dataset import Dataset, write_npz

SCRIPTS = (calql, parl_flow_calql, parl_diffusion_iql, parl_diffusion_rlpd, parl_transformer_calql)
TOY = (
    "--env-id pointmaze-umaze-v0 --dataset-size 300 --threads 1 --eval-episodes 2 --log-every 10 "
    "--num-cloning-steps 20 --num-offline-steps 20 --num-online-episodes 2 --num-offline-evals 2 --num-online-evals 1 "
    "--policy-hidden 8 --policy-blocks 1 --cloning-batch-size 8 --critic-hidden 8 --batch-size 8 --num-bins 8 "
    "--num-samples 2 --num-keep 2 --num-gradient-steps 1 --no-eval-processes"
).split()


def start(*flags, **options):
    command = [sys.executable, calql.__file__, *TOY, *flags]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def wait_for(condition, process, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def folders(path):
    return sorted(folder for folder in path.iterdir() if folder.is_dir()) if path.is_dir() else []


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def error_of(script, *flags):
    """The one line with which a script refuses."""
    with pytest.raises(SystemExit) as stopped:
        script.main(list(flags))
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message, message
    return message


# --- WHO OWNS A FOLDER ---


def test_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.time, "strftime", lambda form: "20260101-000000")
    for _ in range(3):
        calql.main([*TOY, "--num-offline-steps", "0", "--num-online-episodes", "0", "--runs", str(tmp_path)])
    names = [folder.name for folder in folders(tmp_path)]
    assert names == ["pointmaze-umaze-v0__parl_diffusion_calql__1__20260101-000000" + end for end in ("", "-2", "-3")]


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path):
    process = start("--num-cloning-steps", "1000000", "--checkpoint-seconds", "0", "--runs", str(tmp_path))
    wait_for(lambda: folders(tmp_path) and (folders(tmp_path)[0] / "checkpoint.pt").is_file(), process)
    (folder,) = folders(tmp_path)
    message = error_of(calql, "--resume", str(folder))
    assert "still alive" in message and str(process.pid) in message
    process.kill()
    process.communicate()
    held = runs.lock(folder)  # the dead hold nothing
    held.close()


def test_temporaries_carry_the_process_and_are_cleared(tmp_path):
    seen = []
    runs.write_atomically(tmp_path / "a", lambda file: seen.append([path.name for path in tmp_path.iterdir()]))
    assert seen == [[f"a.{os.getpid()}.partial"]] and [path.name for path in tmp_path.iterdir()] == ["a"]
    (tmp_path / "checkpoint.pt.999.partial").touch()
    runs.lock(tmp_path).close()
    assert not list(tmp_path.glob("*.partial"))


def test_no_locks_on_the_file_system(tmp_path, monkeypatch):
    import fcntl

    def none(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    runs.lock(tmp_path).close()


# --- STOPPING ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_an_evaluation_stops_it_and_loses_nothing(number, tmp_path):
    flags = "--eval-episodes 3000 --eval-processes --checkpoint-seconds 1000 --num-offline-steps 0"
    process = start(*flags.split(), "--runs", str(tmp_path))  # its only save is the one before the evaluation
    wait_for(lambda: folders(tmp_path) and (folders(tmp_path)[0] / "checkpoint.pt").is_file(), process)
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert time.monotonic() - began < 20 and process.returncode == 128 + number
    assert "Traceback" not in output and f"--resume {folders(tmp_path)[0]}" in output
    progress = checkpoint(folders(tmp_path)[0])["progress"]
    assert (progress["phase"], progress["step"], progress["evaluated"]) == ("cloning", 20, -1)


def test_a_stopped_evaluation_is_made_again(tmp_path, monkeypatch):
    """Stopped in the middle of one of them, a run ends with the numbers of one that was not."""
    calql.main([*TOY, "--runs", str(tmp_path / "whole")])
    calls, evaluate = [], runs.evaluate

    def stop_in_the_second(envs, act, run):
        calls.append(run.progress["step"])
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(envs, act, run)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "evaluate", stop_in_the_second)
        with pytest.raises(SystemExit) as stopped:
            calql.main([*TOY, "--runs", str(tmp_path / "stopped")])
    assert stopped.value.code == 128 + signal.SIGTERM and calls == [20, 10]
    (folder,), (whole,) = folders(tmp_path / "stopped"), folders(tmp_path / "whole")
    calql.main(["--resume", str(folder)])
    tables = [re.sub(r"(,\d+\.\d+)", "", (f / "metrics.csv").read_text()).splitlines() for f in (folder, whole)]
    assert [line.split(",")[:5] for line in tables[0]] == [line.split(",")[:5] for line in tables[1]]
    ours, theirs = (checkpoint(f)["modules"]["critic"] for f in (folder, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_dead_simulation_process_is_named(tmp_path):
    flags = "--eval-episodes 3000 --eval-processes --num-offline-steps 0 --num-online-episodes 0"
    process = start(*flags.split(), "--runs", str(tmp_path))
    wait_for(lambda: folders(tmp_path) and (folders(tmp_path)[0] / "checkpoint.pt").is_file(), process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[0]), signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "Traceback" not in output
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: simulation process 1 of ") and "--resume" in last


def test_a_reader_that_goes_away_and_a_terminal_that_hangs_up_end_nothing(tmp_path):
    process = start("--runs", str(tmp_path))
    process.stdout.close()  # as `| head` does
    wait_for(lambda: folders(tmp_path) and (folders(tmp_path)[0] / ".lock").read_text(), process)
    time.sleep(0.5)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=90) == 0
    assert checkpoint(folders(tmp_path)[0])["progress"]["phase"] == "done"


def test_whatever_is_raised_is_one_line_with_the_place_of_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(calql, "critic_update", lambda *arguments: 1 / 0)
    message = error_of(calql, *TOY, "--runs", str(tmp_path))
    (folder,) = folders(tmp_path)
    assert "ZeroDivisionError" in message and str(folder / "error.log") in message
    assert "critic_update" in (folder / "error.log").read_text()
    done = subprocess.run(
        [sys.executable, "-c", "from benchmarks.harness.cli import run_program; run_program(lambda: 1 / 0)"],
        capture_output=True, text=True, cwd=os.path.dirname(calql.__file__),
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error: ZeroDivisionError") and done.stderr.count("\n") == 1


# --- WHAT IS REFUSED ---


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_number_has_bounds(script):
    for field in dataclasses.fields(script.Args):
        value = getattr(script.Args(), field.name)
        values = value if isinstance(value, tuple) else (value,)
        if isinstance(value, bool) or not isinstance(values[0], (int, float)):
            continue
        least, most = cli.BOUNDS[field.name]
        limit = getattr(script.Args(), most) if isinstance(most, str) else most
        bad = [least - 1, limit * 2 + 1] if isinstance(least, int) else [least - 0.1, float("nan"), float("inf")]
        for wrong in bad:
            args = script.Args(**{field.name: (wrong,) if isinstance(value, tuple) else wrong})
            with pytest.raises(SystemExit, match=field.name.replace("_", "-")):
                cli.check_args(args)
    for preset in script.PRESETS.values():
        cli.check_args(script.Args(**preset))


def test_products_are_as_precise_as_asked():
    """Also where the run before in this process asked for another precision; the least leaves products near."""
    assert calql.Args().matmul_precision == "highest"
    left, right, products = torch.rand(64, 64), torch.rand(64, 64), {}
    for precision in ("medium", "highest"):
        flags = f"--matmul-precision {precision} --num-gradient-steps 0 --threads 1".split()
        cli.start_torch(cli.parse_args(calql.Args, calql.PRESETS, flags))
        assert torch.get_float32_matmul_precision() == precision
        products[precision] = left @ right
    assert torch.allclose(products["highest"], (left.double() @ right.double()).float(), rtol=1e-5)
    assert torch.allclose(products["medium"], products["highest"], rtol=0.01)


@pytest.mark.parametrize("flags", ["--device cuda:99", "--device abacus", "--seed -1", "--seed 4294967296", "--utd -1"])
def test_values_that_cannot_work(flags, tmp_path):
    assert flags.split()[0] in error_of(calql, *TOY, *flags.split(), "--runs", str(tmp_path))
    assert not folders(tmp_path)


@pytest.mark.parametrize("seed", [2**32 - 1, 2**31])
def test_the_largest_seeds(seed, tmp_path):
    calql.main([*TOY, "--seed", str(seed), "--eval-seed", str(2**32 - 1), "--runs", str(tmp_path)])


class Line(gym.Env):
    """A point on a line, within [-1, 1]; what a step gives is what the test sets."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(np.float32(-0.3), np.float32(0.7), (1,), np.float32)
    reward, obs, info = -1.0, np.zeros(2, np.float32), {}

    def reset(self, *, seed=None, options=None):
        self.time, self.actions = 0, []
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.actions.append(float(action[0]))
        self.time += 1
        return self.obs, self.reward, False, self.time == 5, dict(self.info)


def line_data(rows=40):
    rng = np.random.default_rng(0)
    states = rng.normal(size=(rows, 2)).astype(np.float32)
    actions = rng.uniform(-0.3, 0.7, (rows, 1)).astype(np.float32)
    rewards = np.where(np.arange(rows) % 5 == 4, 0, -1).astype(np.float32)
    ends = np.arange(rows) % 5 == 4
    return Dataset(states, actions, rewards, np.roll(states, -1, 0), np.zeros(rows, bool), ends, source="made up")


def run_on(monkeypatch, tmp_path, env, dataset, *flags):
    monkeypatch.setattr(calql, "make_env", lambda env_id, **kwargs: env())
    monkeypatch.setattr(calql, "load_dataset", lambda *a, **k: dataset)
    own = ["--env-id", "line-v0", "--preset", "pointmaze", "--reward-bias", "0", "--runs", str(tmp_path)]
    calql.main([*TOY, *own, *flags])


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"reward": np.array([-1.0])}, "reward"), ({"reward": float("nan")}, "reward"),
        ({"obs": np.zeros(3, np.float32)}, "observation"), ({"obs": np.full(2, np.nan)}, "observation"),
    ],
)  # fmt: skip
def test_the_first_step_is_looked_at(what, words, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=f"first step of line-v0 gives the {words}"):
        run_on(monkeypatch, tmp_path, type("Bad", (Line,), what), line_data())
    assert not folders(tmp_path)


def test_online_rewards_beyond_the_range_end_the_run(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"span \[-3, -3\].*an online episode"):
        run_on(monkeypatch, tmp_path, type("Worse", (Line,), {"reward": -3.0}), line_data())


@pytest.mark.parametrize("key", ["success", "is_success", ""])
def test_success_under_either_name_and_none_said_once(key, monkeypatch, tmp_path, capsys):
    env = type("Reports", (Line,), {"info": {key: True} if key else {}})
    run_on(monkeypatch, tmp_path, env, line_data())
    output = capsys.readouterr().out
    assert output.count("reports neither") == (0 if key else 1)
    assert output.count("success 100.0%") == (4 if key else 0)  # cloned, twice offline, online


@pytest.mark.parametrize("field, value", [
    ("terminals", np.zeros((40, 1), bool)), ("timeouts", np.full(40, "no")), ("timeouts", np.full(40, 0.5)),
    ("terminals", np.zeros(39, bool)), ("rewards", np.zeros((40, 1), np.float32)), ("actions", np.full((40, 1), "x")),
])  # fmt: skip
def test_arrays_of_ones_own_loader_are_checked(field, value, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=f"the dataset's {field} h"):
        run_on(monkeypatch, tmp_path, Line, dataclasses.replace(line_data(), **{field: value}))
    assert not folders(tmp_path)


def test_actions_stay_inside_the_box_after_the_map_back():
    rng = np.random.default_rng(0)
    for _ in range(200):
        low = rng.normal(size=3).astype(np.float32)
        high = low + rng.exponential(size=3).astype(np.float32)
        env = type("Box", (Line,), {"action_space": gym.spaces.Box(low, high)})()
        env = rollouts.rescaled(env)
        env.reset()
        assert env.action_space == gym.spaces.Box(-1, 1, (3,), np.float32)
        for action in (np.ones(3, np.float32), -np.ones(3, np.float32), rng.uniform(-1, 1, 3).astype(np.float32)):
            env.step(action)  # asserts


# --- WHERE THINGS LIE ---


def test_a_run_goes_on_where_its_data_lies_now(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_npz(tmp_path / "here.npz", load_dataset("pointmaze-umaze-v0", size=300))
    short = ["--num-offline-steps", "0", "--num-online-episodes", "0"]
    calql.main([*TOY, *short, "--dataset-path", "here.npz", "--runs", "a folder"])
    (folder,) = folders(tmp_path / "a folder")
    config = json.loads((folder / "config.json").read_text())
    assert config["dataset_path"] == str(tmp_path / "here.npz") and config["runs"] == str(tmp_path / "a folder")
    (tmp_path / "here.npz").rename(tmp_path / "there.npz")
    assert "here.npz" in error_of(calql, "--resume", str(folder))
    calql.main(["--resume", str(folder), "--dataset-path", "there.npz"])
    write_npz(tmp_path / "other.npz", load_dataset("pointmaze-umaze-v0", size=301))
    assert "another dataset" in error_of(calql, "--resume", str(folder), "--dataset-path", "other.npz")


def test_printed_commands_can_be_pasted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["a script.py", "--runs", "my runs; rm"])
    assert runs.provenance()["command"] == "python 'a script.py' --runs 'my runs; rm'"
    assert runs.provenance()["machine"].startswith(f"{runs.processor()}, ")


# --- WHERE TRAJECTORIES END ---


def test_flags_and_jumps_end_trajectories():
    """Rows 0-4, a jump that no flag marks, 5-9 with a timeout; a difference by rounding is no jump."""
    states = np.arange(24, dtype=np.float32).reshape(12, 2)
    here, there = np.delete(states, [5, 11], 0), np.delete(states, [0, 6], 0)
    there[1] += 1e-7
    timeouts = np.arange(10) == 9
    data = Dataset(here, np.zeros((10, 1)), np.zeros(10), there, np.zeros(10, bool), timeouts, source="made up")
    assert datasets.trajectory_ends(data).tolist() == [5, 10]
    assert datasets.trajectory_ends(dataclasses.replace(data, timeouts=np.zeros(10, bool))).tolist() == [5, 10]
    kept, _, index, last = datasets.distinct_states(data)
    assert np.array_equal(kept, states) and index.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert last.tolist() == [4] * 5 + [10] * 5
    goal = dataclasses.replace(data, terminals=np.arange(10) == 2)  # the data go on behind it: no state is kept twice
    assert datasets.trajectory_ends(goal).tolist() == [3, 5, 10]
    assert all(map(np.array_equal, datasets.distinct_states(goal)[::2], (kept, index)))


def test_unflagged_jumps_are_told(capsys):
    data = line_data()
    datasets.say_where_ends_differ(data)
    assert capsys.readouterr().out == ""
    jumping = dataclasses.replace(data, next_observations=data.next_observations + 1, timeouts=np.zeros(40, bool))
    datasets.say_where_ends_differ(jumping)
    assert "timeouts all False, 39 jumps" in capsys.readouterr().out


def test_data_and_environment_stay_as_they_were_for_the_first_step():
    """What `set_up` tries on the environment leaves no trace in the episodes that follow."""
    env, fresh = (rollouts.rescaled(make_env("pointmaze-umaze-v0")) for _ in range(2))
    datasets.check_environment(env, calql.Args(env_id="pointmaze-umaze-v0"))
    np.testing.assert_array_equal(env.reset(seed=5)[0], fresh.reset(seed=5)[0])
