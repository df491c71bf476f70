"""What a run says it will take: the arithmetic of its phases, and the line that it prints once it runs."""

import types

import pytest

import parl_diffusion_calql
import parl_diffusion_iql
import parl_diffusion_rlpd
import parl_flow_calql
import parl_transformer_calql
from benchmarks import cost
from benchmarks.harness import runs

SCRIPTS = [parl_diffusion_calql, parl_flow_calql, parl_diffusion_iql, parl_diffusion_rlpd, parl_transformer_calql]
SIZES = 29, 8, 1_000_000, 1_000  # observation, action, states, steps of an episode: AntMaze's
scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)


def preset(script, name, **changes):
    return script.Args(**script.PRESETS[name] | changes)


@scripts
def test_each_phase_costs_what_its_parts_cost(script):
    args = preset(script, "antmaze")
    flops = cost.phase_flops(args, *SIZES)
    assert list(flops)[0] == "cloning" and list(flops)[-1] == "online" and min(flops.values()) > 0
    twice = preset(script, "antmaze", num_cloning_steps=2 * args.num_cloning_steps)
    assert cost.phase_flops(twice, *SIZES)["cloning"] == 2 * flops["cloning"]
    update = cost.critic_update_flops(args, 29, 8, cost.USUALLY_CLIMB)
    if script in (parl_diffusion_calql, parl_flow_calql, parl_transformer_calql):
        assert flops["offline"] == args.num_offline_steps * update
        assert flops["caching"] == cost.sampling_flops(args, 29, 8, 1_000_000, 32)
    elif script is parl_diffusion_iql:
        assert flops["offline"] > args.num_offline_steps * update
        assert cost.phase_flops(preset(script, "antmaze", extraction="idql"), *SIZES)["offline"] == pytest.approx(
            args.num_offline_steps * update
        )
    else:
        assert "offline" not in flops
    assert flops["online"] > args.num_online_episodes * 1_000 * args.utd * update
    if hasattr(args, "sample_backup"):  # of drawn targets all candidates climb, of drawn actions those acted with
        online = [cost.phase_flops(preset(script, "antmaze", **{name: value}), *SIZES)["online"]
                  for name, value in (("sample_backup", True), ("greedy_rollouts", False))]  # fmt: skip
        assert min(online) > 1.1 * flops["online"]
    everything = cost.phase_flops(preset(script, "antmaze", climb_all=True), *SIZES)
    assert everything["online"] > 1.2 * flops["online"]
    none = preset(script, "antmaze", num_online_episodes=0)
    assert cost.phase_flops(none, *SIZES)["online"] == 0


def test_the_line():
    flops = {"cloning": 10.0, "offline": 1000.0, "online": 0.0}
    assert cost.forecast(flops, {"cloning": 60.0}, "cloning") == (
        "on this machine the whole run takes about 1.7 h (cloning 60 s, offline 1.7 h)"
    )
    later = cost.forecast(flops | {"online": 10.0}, {"cloning": 60.0}, "cloning")
    assert later.endswith("about 1.7 h (cloning 60 s, offline 1.7 h, online at most 60 s)")
    assert "at most" not in cost.forecast({"cloning": 1.0, "online": 1.0}, {"cloning": 1.0, "online": 9.0}, "online")
    line = cost.forecast(flops, {"cloning": 60.0, "offline": 30 * 24 * 3600.0}, "offline")
    assert "about 30 days (cloning 60 s, offline 30 days)" in line and "--preset laptop" in line and "GPU" in line
    assert "GPU" not in cost.forecast(flops, {"cloning": 1e9}, "cloning", "cuda")  # it is on one
    for uncounted in ({}, {"offline": 1.0}):
        line = cost.forecast(uncounted, {"cloning": 60.0, "offline": 1.0}, "cloning")
        assert line == "on this machine this phase (cloning) takes about 60 s"
    assert [cost.duration(s) for s in (5, 100, 1000, 6000, 40_000, 140_000)] == [
        "5 s", "1.7 min", "17 min", "1.7 h", "11 h", "1.6 days",
    ]  # fmt: skip


@pytest.mark.parametrize(("per_step", "told_at"), [(0.001, 2000), (0.5, 4), (12.0, 3), (40.0, 1)])
def test_a_run_tells_after_two_seconds_and_a_few_steps(per_step, told_at, monkeypatch):
    """Of a phase that is fast after two seconds, of a slow one after three steps or thirty seconds; once."""
    now, lines = [0.0], []
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(runs.tqdm, "write", lines.append)
    run = types.SimpleNamespace(
        args=preset(parl_diffusion_calql, "antmaze"), seconds_of={}, longest=1_000,
        device=types.SimpleNamespace(type="cpu"),
        buffer=types.SimpleNamespace(states=FakeTensor(1000, 29), candidates=FakeTensor(1000, 32, 8)),
    )  # fmt: skip
    began, told = 0.0, None
    for step in range(2100):
        now[0] += 100.0 if step == 0 else per_step  # the first one is not like the others
        began = runs.Run._tell_cost(run, "offline", began, step, 1_000_000)
        if lines and told is None:
            told = step
    assert told == told_at and len(lines) == 1
    assert run.seconds_of["offline"] == pytest.approx(1e6 * per_step, rel=0.01)


class FakeTensor:
    def __init__(self, *shape):
        self.shape = shape

    def __len__(self):
        return self.shape[0]
