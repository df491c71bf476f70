"""The command line as a person uses it: a toy run through all phases, killed and resumed; stopping; bad input."""

import contextlib
import csv
import errno
import importlib
import io
import json
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import gymnasium as gym
import numpy as np
import pytest
import torch

import parl_diffusion_calql as script
from benchmarks.harness import cli, runs
from benchmarks.report import Curves
from benchmarks.run import Options as Runner
from benchmarks.tasks import TaskError, load_dataset, make_env
from benchmarks.tasks.dataset import ARRAYS, Dataset, write_npz

ROOT = pathlib.Path(__file__).parent.parent
TOY = (
    "--env-id pointmaze-umaze-v0 --dataset-size 600 --threads 1 --eval-episodes 3 --log-every 10 "
    "--checkpoint-seconds 0 --num-cloning-steps 40 --num-offline-steps 40 --num-online-episodes 4 "
    "--num-offline-evals 2 --num-online-evals 2 --policy-hidden 16 --policy-blocks 1 --cloning-batch-size 32 "
    "--critic-hidden 16 16 --batch-size 16 --num-bins 16 --num-samples 4 --num-keep 2 --num-gradient-steps 2 --utd 0.3 "
    "--distill-ratio 0.3"
).split()


def start(*flags, cwd=ROOT, script="parl_diffusion_calql.py"):
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *flags], cwd=cwd, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


class Fork:
    """As `start`, of a script that is imported already: a fork of this process, without the seconds of importing it.

    Where there is a GPU, which a fork cannot use, or no fork, it is a program all the same.
    """

    def __new__(cls, script, *flags):
        if torch.cuda.is_available() or not hasattr(os, "fork"):
            return start(*flags, script=f"{script.__name__}.py")
        return super().__new__(cls)

    def __init__(self, script, *flags):
        def run():
            os.setsid()
            sys.argv = [script.__file__, *flags]
            sys.stdout = sys.stderr = open(self.output.name, "w", buffering=1)
            cli.run_program(lambda: script.main(list(flags)))

        self.output = tempfile.NamedTemporaryFile("r")
        self.process = multiprocessing.get_context("fork").Process(target=run)
        self.process.start()

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def wait(self):
        self.process.join(240)
        return self.process.exitcode

    def communicate(self, timeout=240):
        self.process.join(timeout)
        self.returncode = self.process.exitcode
        return self.output.read(), None


def finish(process):
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name in ("seconds", "updates_per_second"):
            row.pop(name, None)
    return rows


def phases_seen(folder):
    path = folder / "metrics.csv"
    return {row["phase"] for row in rows_of(folder)} if path.is_file() and path.stat().st_size else set()


def flat(value, prefix=""):
    """A nested checkpoint as {path: leaf}, without what depends on the clock."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key != "seconds":
                yield from flat(item, f"{prefix}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from flat(item, f"{prefix}/{i}")
    else:
        yield prefix, value


def assert_same_checkpoint(folder, reference):
    """Bit for bit, but for clocks; NaN stands for NaN."""
    ours, theirs = (dict(flat(torch.load(f / "checkpoint.pt", weights_only=True))) for f in (folder, reference))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        same = ours[name] == value
        if torch.is_tensor(value):
            same = same.all()
            if value.is_floating_point():
                same = torch.equal(ours[name].nan_to_num(9e9), value.nan_to_num(9e9))
        assert same, f"{name} differs after the resumed run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One toy run to its end, and what it printed."""
    parent, output = tmp_path_factory.mktemp("runs"), io.StringIO()
    flags = [*TOY, "--runs", str(parent)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARL_CACHE", str(tmp_path_factory.mktemp("cache")))  # empty, whatever ran before: it must collect
        patch.setattr(sys, "argv", [script.__file__, *flags])
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            script.main(flags)
    (folder,) = parent.iterdir()
    return folder, output.getvalue()


def test_a_run_leaves_what_the_readme_promises(finished):
    folder, output = finished
    assert re.fullmatch(r"pointmaze-umaze-v0__parl_diffusion_calql__1__\d{8}-\d{6}", folder.name)
    for name in ("config.json", "metrics.csv", "checkpoint.pt", "summary.png"):
        assert (folder / name).stat().st_size > 0
    assert list(folder.glob("events.out.tfevents*"))
    assert not list(folder.glob("*.partial"))
    for text in ("cloned policy", "after offline RL", "after online RL", "success rate", str(folder)):
        assert text in output
    for phase in ("collecting", "cloning", "caching", "offline", "online"):
        assert re.search(rf"{phase}.*100%", output), f"no progress bar for {phase}"
    rows = rows_of(folder)
    assert [r["phase"] for r in rows if r["success_rate"]] == ["cloning"] + 2 * ["offline"] + 2 * ["online"]
    config = json.loads((folder / "config.json").read_text())
    assert config["critic_hidden"] == [16, 16] and config["preset"] == "pointmaze"
    assert config["provenance"]["command"].endswith(str(folder.parent)) and config["provenance"]["commit"]


def test_a_run_killed_in_every_phase_ends_with_the_same_numbers(finished, tmp_path):
    reference, _ = finished
    process, folder = start(*TOY, "--runs", str(tmp_path)), None
    for phase in ("cloning", "offline", "online"):
        deadline = time.monotonic() + 120
        while folder is None or phase not in phases_seen(folder):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
            folder = next(tmp_path.iterdir(), None)
        time.sleep(random.uniform(0.0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert torch.load(folder / "checkpoint.pt", weights_only=True)["progress"]["phase"] != "done", "killed too late"
        process = start("--resume", str(folder)) if phase == "online" else Fork(script, "--resume", str(folder))
    code, output = finish(process)
    assert code == 0, output
    assert rows_of(folder) == rows_of(reference)
    assert_same_checkpoint(folder, reference)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_continue(number, tmp_path):
    flags = ["--num-cloning-steps", "1000000", "--checkpoint-seconds", "1000", "--eval-processes"]
    process = start(*TOY, *flags, "--runs", str(tmp_path))
    deadline = time.monotonic() + 120
    while not any("cloning" in phases_seen(folder) for folder in tmp_path.iterdir()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as Ctrl-C in a terminal: to the evaluation's processes as well
    code, output = finish(process)
    (folder,) = tmp_path.iterdir()
    assert code == 128 + number
    assert "Traceback" not in output
    assert f"--resume {folder}" in output
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["progress"]["step"] > 0


def test_offline_and_online_can_be_left_out(tmp_path):
    script.main([*TOY, "--num-offline-steps", "0", "--num-online-episodes", "0", "--runs", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    assert {row["phase"] for row in rows_of(folder)} == {"cloning"}
    assert (folder / "summary.png").stat().st_size > 0


@pytest.mark.parametrize(
    "flags",
    [
        "--critic-loss mse",
        "--target-data-actions --keep-best-of-path --hl-gauss-release-width --release-returns",
        "--distill-mixed --sample-backup --no-distill-data-actions",
        "--distill-selection sample --no-greedy-rollouts --num-keep 1 --num-gradient-steps 0",
        "--num-offline-steps 0 --num-offline-evals 0 --mixing-ratio 1 --utd 2 --distill-ratio 0",
    ],
)
def test_every_variant_runs(flags, tmp_path):
    short = ["--num-cloning-steps", "2", "--num-offline-steps", "12", "--num-online-episodes", "1"]
    script.main([*TOY, *short, *flags.split(), "--runs", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    assert phases_seen(folder) >= {"cloning", "online"}


def test_another_environment(monkeypatch, tmp_path):
    """As the README says: two functions replaced; actions beyond [-1, 1], float64 observations, dense rewards."""

    def other_env(env_id, **kwargs):
        env = gym.make("Pendulum-v1", max_episode_steps=20, **kwargs)
        space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
        return gym.wrappers.TransformObservation(env, lambda obs: obs.astype(np.float64), space)

    def other_dataset(env_id, path=None, size=None, source="auto"):
        env, rows = other_env(env_id), {name: [] for name in ARRAYS}
        for episode in range(10):
            obs, done = env.reset(seed=episode)[0], False
            while not done:
                action = env.action_space.sample()
                next_obs, reward, terminated, done, _ = env.step(action)
                for key, value in zip(rows, (obs, action, reward, next_obs, terminated, done)):
                    rows[key].append(value)
                obs = next_obs
        return Dataset(**{name: np.array(values) for name, values in rows.items()}, source="mine")

    monkeypatch.setattr(script, "make_env", other_env)
    monkeypatch.setattr(script, "load_dataset", other_dataset)
    rewards = ["--reward-bias", "0", "--reward-min", "-17", "--no-sparse-reward"]
    script.main([*TOY, "--env-id", "Pendulum-v1", "--preset", "pointmaze", *rewards, "--runs", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["progress"]["phase"] == "done" and len(state["episodes"]) == 4
    assert all(episode["actions"].abs().max() <= 1 for episode in state["episodes"])
    assert state["results"]["after online RL"]["return"] < 0


def test_antmaze_with_local_data_in_processes(tmp_path, capfd):
    """Data that is not the published one marks the run; a short offline phase draws candidates as it goes."""
    flags = "--env-id antmaze-umaze-v2 --preset laptop --dataset-source local --dataset-size 1500"
    flags += " --num-online-episodes 1 --num-offline-steps 12 --num-offline-evals 0 --num-online-evals 0"
    flags += " --distill-ratio 0.01 --utd 0.01 --eval-episodes 1"
    script.main([*TOY, *flags.split(), "--eval-processes", "--runs", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("antmaze-umaze-v2-local__parl_diffusion_calql__1__")
    config = json.loads((folder / "config.json").read_text())
    assert config["dataset_source"] == "local" and config["data"]["local"] and len(config["data"]["sha256"]) == 64
    assert (config["reward_bias"], config["discount"], config["preset"]) == (-1.0, 0.99, "laptop")
    assert "LOCAL DATA" in capfd.readouterr().err
    assert [float(row["length"]) for row in rows_of(folder) if row["success_rate"]] == 3 * [700.0]
    script.main(["--resume", str(folder)])  # finds the same data again


@pytest.mark.parametrize(
    ("env_id", "preset", "reward_bias"),
    [
        ("antmaze-large-play-v2", "antmaze", -1.0), ("kitchen-mixed-v2", "kitchen", -4.0),
        ("pointmaze-medium-v0", "pointmaze", -1.0), ("pointmaze-medium-navigate-singletask-v0", "ogbench", 0.0),
        ("antmaze-large-navigate-singletask-task2-v0", "ogbench", 0.0), ("my-env-v0", "default", -1.0),
    ],
)  # fmt: skip
def test_presets_follow_the_task(env_id, preset, reward_bias):
    args = cli.parse_args(script.Args, script.PRESETS, ["--env-id", env_id])
    assert (args.preset, args.reward_bias) == (preset, reward_bias)
    flags = ["--env-id", env_id, "--preset", "laptop", "--seed", "7"]
    small = cli.parse_args(script.Args, script.PRESETS, flags)
    assert (small.preset, small.reward_bias, small.ensemble_size, small.seed) == ("laptop", reward_bias, 2, 7)


CHUNKED = {
    "parl_diffusion_iql": 32, "parl_diffusion_calql": 16, "parl_flow_calql": 16, "parl_diffusion_rlpd": 8,
    "parl_transformer_calql": 8,
}  # fmt: skip


@pytest.mark.parametrize(("name", "num_samples"), CHUNKED.items())
def test_the_preset_with_chunks_lies_on_the_laptops_and_on_the_familys(name, num_samples):
    one = importlib.import_module(name)
    flags = ["--env-id", "cube-single-play-singletask-v0", "--preset", "laptop-chunk"]
    args = cli.parse_args(one.Args, one.PRESETS, flags)
    assert (args.chunk, args.preset, args.reward_bias, args.ensemble_size) == (5, "laptop-chunk", 0.0, 2)
    assert (args.num_samples, args.num_gradient_steps) == (num_samples, 0)
    assert (args.greedy_rollouts, args.distill_selection, args.num_keep) == (False, "sample", num_samples)
    assert cli.parse_args(one.Args, one.PRESETS, [*flags[:3], "laptop"]).chunk == 1


# --- bad input: one clear line, before any long work ---


FEW = ("--env-id", "pointmaze-umaze-v0", "--eval-episodes", "1")  # else its fifty environments take seconds


def error_of(*flags):
    """The one line with which the script refuses."""
    with pytest.raises(SystemExit) as stopped:
        script.main(list(flags))
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_unknown_environment_names_near_matches(tmp_path):
    message = error_of("--env-id", "pointmaze-mediun-v0", "--runs", str(tmp_path))
    assert "pointmaze-medium-v0" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num-keep 20 --num-samples 16", ("--num-keep 20", "--num-samples (16)")),
        ("--target-subset 3 --ensemble-size 2", ("--target-subset 3",)),
        ("--discount 1.0", ("--discount",)),
        ("--batch-size 0", ("--batch-size",)),
        ("--num-offline-steps -1", ("--num-offline-steps",)),
        ("--reward-min 1", ("--reward-min",)),
        ("--dataset-source download", ("no published file",)),
        ("--preset nonsense", ("nonsense", "antmaze")),
        ("--dataset-path /nowhere.npz", ("/nowhere.npz",)),
        ("--dataset-size 5", ("5",)),
        ("--resume /nowhere", ("/nowhere",)),
    ],
)
def test_bad_flags(flags, words, tmp_path):
    message = error_of(*FEW, *flags.split(), "--runs", str(tmp_path))
    assert all(word in message for word in words), message
    assert not list(tmp_path.iterdir())


def toy_dataset(**changes):
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(size=(80, 4)), "actions": rng.uniform(-1, 1, (80, 2)), "rewards": np.zeros(80),
        "next_observations": rng.normal(size=(80, 4)), "terminals": np.zeros(80, bool), "timeouts": np.zeros(80, bool),
    }  # fmt: skip
    return Dataset(**(arrays | changes))


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("observations", np.zeros((80, 5)), "observations"),
        ("next_observations", np.zeros((80, 3)), "next_observations"),
        ("actions", np.zeros((80, 3)), "actions"),
        ("actions", np.full((80, 2), 1.5), "beyond the action space"),
        ("rewards", np.where(np.arange(80) == 7, np.nan, 0), "row 7"),
        ("rewards", np.full(80, 5.0), "--reward-bias"),
        ("rewards", np.full(80, -5.0), "--reward-min"),
        ("rewards", np.full(80, 1.0), "--reward-min 0"),
        ("actions", np.where(np.arange(160).reshape(80, 2) == 8, np.inf, 0), "row 4"),
    ],
)
def test_a_dataset_that_does_not_fit(name, value, word, tmp_path):
    write_npz(tmp_path / "data.npz", toy_dataset(**{name: value}))
    flags = word.split() if word.startswith("--reward-min ") else []  # 0: what the data's smallest reward is
    message = error_of(*TOY, *flags, "--dataset-path", str(tmp_path / "data.npz"), "--runs", str(tmp_path))
    assert word.split()[0] in message if flags else word in message, message


def test_a_truncated_or_incomplete_dataset_file(tmp_path):
    path = tmp_path / "data.npz"
    write_npz(path, toy_dataset())
    path.write_bytes(path.read_bytes()[:-200])
    assert "truncated" in error_of(*FEW, "--dataset-path", str(path))
    np.savez(path, **{name: getattr(toy_dataset(), name) for name in ARRAYS if name != "timeouts"})
    assert "timeouts" in error_of(*FEW, "--dataset-path", str(path))
    np.savez(path, **{name: getattr(toy_dataset(), name)[: 70 if name == "actions" else 80] for name in ARRAYS})
    assert "length" in error_of(*FEW, "--dataset-path", str(path))


def test_a_discrete_action_space(monkeypatch):
    monkeypatch.setattr(script, "make_env", lambda env_id: gym.make("CartPole-v1"))
    assert "continuous" in error_of(*FEW)


def test_resume_refuses_another_script_preset_or_a_damaged_checkpoint(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    assert "--preset pointmaze" in error_of("--resume", str(folder), "--preset", "antmaze")
    assert "--seed 1" in error_of("--resume", str(folder), "--seed", "2")
    checkpoint = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(checkpoint[: len(checkpoint) // 2])
    assert "cannot be read" in error_of("--resume", str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"script": "parl_diffusion_iql"}))
    assert "another script" in error_of("--resume", str(folder))


def test_a_resumed_run_drops_rows_that_its_checkpoint_does_not_know(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    with open(folder / "metrics.csv", "a") as file:
        columns = (folder / "metrics.csv").read_text().splitlines()[0].count(",") + 1
        file.write("online,99,1,1,1,1.0" + (columns - 6) * "," + "\nonli")  # one row too many, and half of another
    script.main(["--resume", str(folder)])
    assert rows_of(folder) == rows_of(finished[0])


def test_resume_refuses_another_dataset(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    other = lambda env_id, path, size, source: load_dataset(env_id, path, size, seed=9)  # noqa: E731
    monkeypatch.setattr(script, "load_dataset", other)
    assert "another dataset" in error_of("--resume", str(folder))


def test_no_disk_space(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(runs.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
        assert "MB free" in error_of(*TOY, "--runs", str(tmp_path))

    real, calls = os.fsync, []

    def full_after_five(descriptor):
        calls.append(descriptor)
        if len(calls) > 5:  # config.json, metrics.csv, three checkpoints
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(runs.os, "fsync", full_after_five)
    message = error_of(*TOY, "--runs", str(tmp_path / "full"))
    assert "No space left" in message and "--resume" in message
    (folder,) = (tmp_path / "full").iterdir()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["progress"]["step"] == 2
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("loss", ["hl_gauss", "mse"])
def test_a_diverging_critic_stops_the_run_and_keeps_the_last_good_checkpoint(loss, tmp_path):
    flags = [*TOY, "--num-cloning-steps", "0", "--num-offline-steps", "300", "--critic-lr", "1e4"]
    flags += ["--critic-loss", loss]
    if loss == "hl_gauss":  # a softmax cannot leave its range, so make the weights overflow
        flags += ["--critic-lr", "1e38"]
    message = error_of(*flags, "--runs", str(tmp_path))
    assert re.search(r"offline step \d+", message) and "last good checkpoint" in message
    (folder,) = tmp_path.iterdir()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in state["modules"]["critic"].values())


def test_optional_parts_say_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in error_of(*TOY, "--track")
    monkeypatch.setitem(sys.modules, "moviepy", None)
    assert "pip install moviepy" in error_of(*TOY, "--capture-video")


# --- tasks ---


def test_pointmaze_data_is_deterministic_cached_and_checked(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PARL_CACHE", str(tmp_path))
    first = load_dataset("pointmaze-umaze-v0", size=300, seed=3)
    assert "collecting" in capsys.readouterr().err
    again = load_dataset("pointmaze-umaze-v0", size=300, seed=3)
    assert "collecting" not in capsys.readouterr().err
    other = load_dataset("pointmaze-umaze-v0", size=300, seed=4)
    assert first.sha256 == again.sha256 != other.sha256
    shutil.rmtree(tmp_path)
    fresh = load_dataset("pointmaze-umaze-v0", size=300, seed=3)
    assert all(np.array_equal(getattr(first, name), getattr(fresh, name)) for name in ARRAYS)
    path = next(path for path in tmp_path.rglob("*.npz") if "seed3" in path.name)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(TaskError, match="changed on disk"):
        load_dataset("pointmaze-umaze-v0", size=300, seed=3)
    monkeypatch.setenv("PARL_CACHE", "/proc/nowhere")
    with pytest.raises(TaskError, match="PARL_CACHE"):
        load_dataset("pointmaze-umaze-v0", size=300, seed=5)


@pytest.mark.parametrize("name", ["umaze", "medium", "large"])
def test_pointmaze_environment_and_data_agree(name):
    env_id = f"pointmaze-{name}-v0"
    env, data = make_env(env_id), load_dataset(env_id, size=400)
    obs, _ = env.reset(seed=0)
    assert obs.dtype == np.float32 and env.observation_space.contains(obs)
    goals = set()
    for seed in range(3):
        env.reset(seed=seed)
        goals.add(tuple(env.unwrapped.goal))
    assert len(goals) == 1, "the goal is fixed"
    assert data.observations.shape[1:] == env.observation_space.shape
    assert data.actions.shape[1:] == env.action_space.shape
    for row in range(0, 400, 37):  # the data is what the environment does: replay single transitions in it
        env.reset(seed=0)
        env.unwrapped.point_env.set_state(data.observations[row, :2], data.observations[row, 2:])
        next_obs, reward, terminated, _, info = env.step(data.actions[row])
        np.testing.assert_allclose(next_obs, data.next_observations[row], atol=1e-4)
        assert reward == data.rewards[row] and terminated == data.terminals[row] == info["success"]


def test_the_readme_names_real_flags_and_files():
    text = (ROOT / "README.md").read_text()
    flags = set(re.findall(r"`(--[a-z][a-z0-9-]*)", text)) | set(re.findall(r"(?<=\s)(--[a-z][a-z0-9-]+)", text))
    scripts = [importlib.import_module(path.stem) for path in ROOT.glob("parl_*.py")]
    programs = [*(script.Args for script in scripts), Curves, Runner]
    fields = {name for one in programs for name in one.__dataclass_fields__}
    names = [name.replace("_", "-") for name in fields]
    known = {"--" + name for name in names} | {"--no-" + name for name in names}
    outside = {"--help", "--script", "--case", "--index-url"}
    assert flags - outside <= known, flags - outside - known
    for page in ("README.md", "benchmarks/README.md", "benchmarks/tasks/README.md"):
        for path in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(re.sub(r"\s", "", path)).exists(), (page, path)
