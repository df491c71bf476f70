"""Nothing that learns hides in the harness: a `Run` that only counts ends with the same networks, to the last bit."""

import contextlib
import csv

import numpy as np
import pytest
import torch

import parl_diffusion_calql
import parl_diffusion_iql
import parl_diffusion_rlpd
import parl_flow_calql
import parl_transformer_calql
from benchmarks.harness.rollouts import evaluate

TOY = (
    "--env-id pointmaze-umaze-v0 --dataset-size 300 --threads 1 --eval-episodes 2 --no-eval-processes --log-every 3 "
    "--num-cloning-steps 7 --num-online-episodes 2 --num-online-evals 2 --cloning-batch-size 8 --critic-hidden 8 8 "
    "--batch-size 4 --num-bins 8 --num-samples 3 --num-keep 2 --num-gradient-steps 1 --utd 0.2 --distill-ratio 0.1"
).split()
DIFFUSION = "--policy-hidden 8 --policy-blocks 1".split()
OFFLINE = "--num-offline-steps 7 --num-offline-evals 2".split()
FLAGS = {
    parl_diffusion_calql: DIFFUSION + OFFLINE,
    parl_flow_calql: DIFFUSION + OFFLINE,
    parl_diffusion_iql: [*DIFFUSION, *OFFLINE, "--distill-every", "20"],
    parl_diffusion_rlpd: [*DIFFUSION, "--num-warmup-episodes", "2"],
    parl_transformer_calql: "--policy-width 8 --policy-layers 1 --policy-heads 2 --policy-bins 16".split() + OFFLINE,
}
scripts = pytest.mark.parametrize("script", FLAGS, ids=lambda script: script.__name__)


class StubRun(contextlib.nullcontext):
    """What a script needs of a run: numbers, and evaluations, which draw random ones. No file, no signal, no resume."""

    def __init__(self, args, dataset, buffer, **modules):
        self.args, self.device, self.rows, self.folder, self.enter_result = args, buffer.states.device, [], None, self
        self.progress = {"phase": "cloning", "step": 0, "updates": 0, "episodes": 0, "env_steps": 0}

    phase = property(lambda self: self.progress["phase"])

    def starts(self, phase):
        return self.progress["phase"] == phase

    def steps(self, phase, total, envs=None, act=None, evals=1, unit="update"):
        for step in range(total + 1):
            if act and step in {total, *np.linspace(0, total, evals + 1, dtype=int)[1:]}:
                result = evaluate(envs, act, self)
                self.log({name: result[name] for name in ("success_rate", "score", "return", "length")})
            if step < total:
                self.count(updates=int(unit == "update"))
                yield step
                self.progress["step"] = step + 1
        self.progress |= {"phase": {"cloning": "offline", "offline": "online", "online": "done"}[phase], "step": 0}

    def each(self, description, parts):
        return parts

    def count(self, **done):
        for name, number in done.items():
            self.progress[name] += number

    def log(self, metrics, every=1):
        if (self.progress["step"] + 1) % every == 0:
            counted = {name: str(number) for name, number in self.progress.items() if name != "q_stds"}
            self.rows.append(counted | {name: f"{float(value):.6g}" for name, value in metrics.items()})

    def check_stop(self):
        pass


def play(script, Run, tmp_path, *flags):
    """Run the script to its end with this `Run`: it, and what it was handed."""
    seen = {}

    def noted(*args, **modules):
        seen.update(modules, run=Run(*args, **modules))
        return seen["run"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "Run", noted)
        patch.setattr(script, "finish", lambda *_, **__: None)
        script.main([*TOY, *FLAGS[script], *flags, "--runs", str(tmp_path)])
    return seen.pop("run"), seen


def rows_of(folder):
    """metrics.csv without what depends on the clock and without what a row does not have."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    clocks = ("seconds", "updates_per_second")
    return [{name: value for name, value in row.items() if value and name not in clocks} for row in rows]


def leaves(value, path=""):
    """The tensors and numbers of a nested state by their path."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, item in items for name, leaf in leaves(item, f"{path}/{key}").items()}
    return {path: value}


def differing(modules, others) -> list[str]:
    """The networks' and optimizers' tensors and settings that are not the same to the last bit."""
    states = [leaves({name: module.state_dict() for name, module in seen.items()}) for seen in (modules, others)]
    ours, theirs = states
    same = {
        name: torch.equal(ours[name], theirs[name]) if torch.is_tensor(ours[name]) else ours[name] == theirs[name]
        for name in ours.keys() & theirs.keys()
    }
    return sorted(ours.keys() ^ theirs.keys()) + sorted(name for name in same if not same[name])


@scripts
def test_a_run_that_only_counts_learns_the_same(script, tmp_path):
    """All networks and optimizers, and every metric of every row."""
    real, modules = play(script, script.Run, tmp_path / "real")
    stub, others = play(script, StubRun, tmp_path / "stub")
    assert not (tmp_path / "stub").exists()
    assert {"policy", "ema_policy", "critic", "target_critic", "policy_optimizer", "critic_optimizer"} <= set(modules)
    assert differing(modules, others) == []
    assert stub.progress["phase"] == "done" and stub.progress["updates"] > 7
    assert rows_of(real.folder) == stub.rows
    assert {row["phase"] for row in stub.rows} == {"cloning", "offline", "online"}


def test_a_harness_that_takes_part_is_found_out(tmp_path):
    """One number drawn, or one weight touched, and the comparison tells."""
    script = parl_diffusion_calql
    _, modules = play(script, StubRun, tmp_path)

    class Draws(StubRun):
        def check_stop(self):
            torch.rand(1)

    class Touches(StubRun):
        def __init__(self, *args, **modules):
            super().__init__(*args, **modules)
            with torch.no_grad():
                modules["target_critic"].head_bias[..., 0] += 1e-3  # of one bin: all of them together change nothing

    for Run in (Draws, Touches):
        assert any(name.startswith("/critic/") for name in differing(modules, play(script, Run, tmp_path)[1]))
