"""benchmarks/rehearsal.py: what a run of a baseline will take, from a few steps of its own main on noise."""

import importlib
import os
import types

import pytest
import torch

from benchmarks import rehearsal, run

BASELINES = sorted(path.stem for path in run.ROOT.glob("benchmarks/baselines/*.py") if path.stem != "__init__")
TOY = "--policy-hidden 16 --batch-size 16 --threads 1".split()


class Clock:
    """A clock that only a script's updates move."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(rehearsal.time, "perf_counter", lambda: self.now)


def rehearsed(chunk=1):
    args, buffer = types.SimpleNamespace(chunk=chunk), types.SimpleNamespace(states=torch.zeros(100, 3))
    return rehearsal.Rehearsal(1_000, 50, args, None, buffer, policy=torch.nn.Linear(3, 2), other="no network")


def take(found, clock, phase, total, seconds, unit="update", first=0.0):
    """Steps that take so long each, the first one longer; how many were made."""
    made = 0
    for step in found.steps(phase, total, unit=unit):
        clock.now += seconds + first * (step == 0)
        made += 1
    return made


def test_a_phase_is_its_steps_times_what_one_takes(monkeypatch):
    clock, found = Clock(monkeypatch), rehearsed()
    assert found.phase == "cloning" and found.weights == 8
    assert take(found, clock, "cloning", 2_000, 0.25, first=0.7) == 6  # the first is left out, then more than a second
    assert take(found, clock, "offline", 0, 1.0) == 0
    assert found.phase == "online" and found.starts("online")
    assert found.few == 8  # of 0.25 s each
    assert take(found, clock, "online", 40, 0.5, unit="episode") == 4
    assert found.seconds == pytest.approx({"cloning": 2_000 * 0.25, "online": 40 * 0.5 * 50 / 8})


def test_of_a_slow_phase_one_step_is_made(monkeypatch):
    clock, found = Clock(monkeypatch), rehearsed(chunk=3)
    assert take(found, clock, "cloning", 1, 0.25) == 1
    assert take(found, clock, "offline", 100, 90.0) == 1
    assert found.seconds == pytest.approx({"cloning": 0.25, "offline": 9_000})
    assert found.few == 6  # two decisions
    for part in found.each("caching", torch.arange(100).split(40)):
        clock.now += 2.0
        assert len(part) == 40
    assert found.seconds["caching"] == pytest.approx(2.0 * 1_000 / 40)


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_can_be_rehearsed_and_is_as_it_was(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rehearsal, "SECONDS", 0.02)
    module = importlib.import_module(f"benchmarks.baselines.{name}")
    before, state = dict(vars(module)), torch.get_rng_state()
    seconds, size = rehearsal.rehearse(module, ["--env-id", "pointmaze-medium-v0", *TOY], (4, 2), 40_000, 60)
    without = {"offline": ("filtered_bc", "dppo"), "cloning": ("rlpd_gaussian", "calql_gaussian", "cem_calql")}
    phases = {"cloning", "offline", "online"} - {phase for phase, names in without.items() if name in names}
    assert seconds.keys() - {"caching"} == phases
    assert min(seconds.values()) > 0 and size > 20e6
    argv = ["--env-id", "pointmaze-medium-v0", *TOY, "--num-online-episodes", "400000"]
    more = rehearsal.rehearse(module, argv, (4, 2), 40_000, 60)[1]
    assert more == size if name == "dppo" else more > 1e9  # which keeps no episode
    assert dict(vars(module)) == before and torch.equal(torch.get_rng_state(), state) and not os.listdir(tmp_path)


def test_a_dry_run_knows_what_a_baseline_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rehearsal, "SECONDS", 0.02)
    run.main(["--suite", "table3", "--dry-run", "--only", "iterated filtered BC", "--results", str(tmp_path / "r")])
    out = capsys.readouterr().out
    assert "iterated filtered BC, pointmaze-medium-v0 (by a few steps of each phase on this machine)" in out
    assert "?" not in out and "unknown cost" not in out and not (tmp_path / "r").exists()
    with pytest.raises(SystemExit, match="not whole rounds"):  # what the script refuses, the dry run does
        run.main(["--scripts", "benchmarks/baselines/dppo.py", "--flags", "num-online-episodes=405", "--dry-run",
                  "--results", str(tmp_path / "r")])  # fmt: skip
