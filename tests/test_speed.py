"""benchmarks/speed.py: its operation counts against hand sums and PyTorch's own counter, and its command line."""

import dataclasses
import json
import math
import pathlib
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import parl_diffusion_calql as script
import parl_diffusion_iql
import parl_diffusion_rlpd
import parl_transformer_calql
from benchmarks import speed
from benchmarks.harness import cli

ROOT = pathlib.Path(__file__).resolve().parent.parent
OBS, ACT = 5, 3
TINY = script.Args(
    ensemble_size=3, target_subset=2, critic_hidden=(16, 24), num_bins=12, batch_size=4, num_samples=6, num_keep=2,
    num_gradient_steps=3, cql_actions=2, policy_hidden=8, policy_blocks=2, diffusion_steps=5,
)  # fmt: skip


def counted(function) -> int:
    """Operations of the matrix products that PyTorch saw."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def make_critic(args):
    return script.Critic(OBS, ACT, args.critic_hidden, args.ensemble_size, args.num_bins)


def make_policy(args):
    return script.DiffusionPolicy(OBS, ACT, args.diffusion_steps, args.policy_hidden, args.policy_blocks)


def make_batch(B, n):
    return torch.randn(B, OBS), torch.rand(B, n, ACT) * 2 - 1


def test_critic_update_by_hand():
    """Multiply-adds of one member: 80 observation, 48 + 16 * 24 + 24 * 12 = 48 + 672 action."""
    assert speed.cost.critic_layers(TINY, OBS, ACT) == (160, 96, 1344)
    optimize = 8 * 3 * (160 + (6 + 2 * 6) * 1440)  # 8 states, 3 members; 6 ranked, 2 kept with 3 passes forward, 3 back
    assert speed.cost.optimize_flops(TINY, OBS, ACT, 8) == optimize
    target = 4 * 2 * 1600
    data = 4 * 3 * (160 + 192 + 4032)
    penalty = 4 * 2 * 4 * (192 + 4032)
    assert speed.cost.critic_update_flops(TINY, OBS, ACT) == optimize + target + data + penalty


def test_candidates_that_are_climbed_by_hand():
    """A data action is one more to evaluate and to climb; those that cannot win cost their first gradient alone."""
    one = 3 * 1440  # a pass of all members
    with_data = speed.cost.optimize_flops(TINY, OBS, ACT, 1, data_action=True)
    assert with_data == 3 * 160 + (6 + 1 + 3 * 6) * one
    assert speed.cost.optimize_flops(TINY, OBS, ACT, 1, True, climbed=3) == with_data
    assert speed.cost.optimize_flops(TINY, OBS, ACT, 1, climbed=1.5) == 3 * 160 + (6 + 2 + 1.5 * 5) * one
    only_rank = dataclasses.replace(TINY, num_gradient_steps=0)
    assert speed.cost.optimize_flops(only_rank, OBS, ACT, 1, climbed=1.5) == 3 * 160 + 6 * one


def test_every_phase_that_climbs_counts_those_that_did():
    saved = 5 * 3 * 1440  # of 2 candidates 1 is climbed: 3 passes forward and 2 back less at a state
    for count, states in (
        (lambda climbed: speed.cost.critic_update_flops(TINY, OBS, ACT, climbed), 8),
        (lambda climbed: speed.cost.acting_flops(TINY, OBS, ACT, 3, climbed), 3),
        (lambda climbed: speed.cost.distill_flops(TINY, OBS, ACT, 2, 100, climbed), 8),
        (lambda climbed: speed.cost.online_flops(TINY, OBS, ACT, 2, 100, climbed, climbed), 24),
    ):
        assert count(2) - count(1) == states * saved
    assert speed.cost.critic_update_flops(TINY, OBS, ACT, 2) == speed.cost.critic_update_flops(TINY, OBS, ACT)
    assert speed.cost.distill_flops(TINY, OBS, ACT, 2, 100, 3) == speed.cost.distill_flops(TINY, OBS, ACT, 2, 100)


def test_who_climbed_is_counted():
    args = dataclasses.replace(TINY, climb_all=True) if hasattr(TINY, "climb_all") else TINY
    net = speed.build(script, args, OBS, ACT, torch.device("cpu"))
    plain = script.optimize_actions, script.local_optimization
    with speed.counting_climbed(script) as climbed:
        assert climbed() is None
        speed.act(script, net, args, net.buffer.states[:5])
        assert climbed() == args.num_keep
        speed.distill_round(script, net, args, 1)  # at batch_size states there is the data's action, too
        assert climbed() == pytest.approx((5 * args.num_keep + 4 * (args.num_keep + 1)) / 9)
    assert (script.optimize_actions, script.local_optimization) == plain
    some = SimpleNamespace(local_optimization=lambda critic, obs, actions: None)
    some.optimize_actions = lambda critic, obs, actions: some.local_optimization(critic, obs[:3], actions[:3, :1])
    with speed.counting_climbed(some) as climbed:
        some.optimize_actions(None, torch.zeros(4, OBS), torch.zeros(4, 2, ACT))
    assert climbed() == 0.75


@pytest.mark.parametrize("greedy", [True, False])
def test_acting_leaves_out_candidates_where_a_script_can_and_the_best_is_wanted(greedy):
    said = []

    def old_optimize(critic, obs, actions, args, data_actions=None):
        said.append("all")
        return actions, actions[..., 0]

    def optimize(critic, obs, actions, args, data_actions=None, best_only=False):
        said.append(best_only)
        return actions, actions[..., 0]

    net = SimpleNamespace(critic=None, ema_policy=make_policy(TINY))
    for function in (old_optimize, optimize):
        stub = SimpleNamespace(optimize=function, select_actions=script.select_actions)
        speed.act(stub, net, dataclasses.replace(TINY, greedy_rollouts=greedy), torch.zeros(2, OBS))
    assert said == ["all", greedy]


def test_ranking_is_what_pytorch_counts():
    critic, (obs, actions) = make_critic(TINY), make_batch(7, TINY.num_samples)
    only_rank = dataclasses.replace(TINY, num_gradient_steps=0)
    needed = speed.cost.optimize_flops(only_rank, OBS, ACT, 7)
    assert counted(lambda: script.global_optimization(critic, obs, actions, 2)) == needed


def test_gradient_steps_are_what_pytorch_counts():
    """Less what is done twice: the kept actions' values, which the ranking had, and in every pass the observation's
    part of the first layer."""
    critic, (obs, actions) = make_critic(TINY).requires_grad_(False), make_batch(7, TINY.num_keep)
    only_rank = dataclasses.replace(TINY, num_gradient_steps=0)
    needed = speed.cost.optimize_flops(TINY, OBS, ACT, 7) - speed.cost.optimize_flops(only_rank, OBS, ACT, 7)
    # `.forward`: the counter's hooks on a module's call do not work under autograd.grad
    seen = counted(lambda: script.local_optimization(critic.forward, obs, actions, 3, 3e-4, -1.0, 1.0))
    obs_part, action_part, rest = (7 * 3 * part for part in speed.cost.critic_layers(TINY, OBS, ACT))
    again = TINY.num_keep * (action_part + rest)
    assert needed + again <= seen <= needed + again + 4 * obs_part


def test_critic_loss_is_what_pytorch_counts():
    """Less the observation's part of the first layer, forward: the action optimization at s has evaluated it."""
    B, members = TINY.batch_size, torch.tensor([0, 2])
    critic, (obs, actions) = make_critic(TINY), make_batch(B, 5)
    returns = torch.zeros(B)
    not_loss = speed.cost.optimize_flops(TINY, OBS, ACT, 2 * B) + B * 2 * sum(speed.cost.critic_layers(TINY, OBS, ACT))
    needed = speed.cost.critic_update_flops(TINY, OBS, ACT) - not_loss

    def loss():
        a = actions.unbind(1)
        script.calql_loss(critic, obs, a[0], returns, returns, a[1], a[2], actions[:, 3:], 0.1, members)[0].backward()

    obs_part = B * speed.cost.critic_layers(TINY, OBS, ACT)[0]
    assert needed <= counted(loss) <= needed + obs_part * (3 + 2 * 2)  # forward 3 + 2, and 2 backward again


def test_policy_is_what_pytorch_counts():
    policy, (obs, _) = make_policy(TINY), make_batch(7, 1)
    assert counted(lambda: policy.sample(obs, 6)) == speed.cost.sampling_flops(TINY, OBS, ACT, 7, 6)
    obs, actions = make_batch(TINY.diffusion_steps, 1)  # a row for each step: no step's time features are needed twice
    needed = speed.cost.policy_update_flops(TINY, OBS, ACT, len(obs))
    assert counted(lambda: policy.loss(obs, actions[:, 0]).backward()) == needed


TINY_TRANSFORMER = parl_transformer_calql.Args(
    num_samples=6, policy_width=16, policy_layers=2, policy_heads=2, policy_bins=12
)


def test_transformer_is_what_pytorch_counts():
    """All products but attention's, which the counter does not see on every device: those by hand."""
    args = TINY_TRANSFORMER
    policy = parl_transformer_calql.TransformerPolicy(OBS, ACT, 12, 2, 16, 2)
    obs, actions = torch.randn(7, OBS), torch.rand(7, ACT) * 2 - 1
    per_pair = 2 * 2 * 2 * 16  # layers, two products, multiply and add, width: one element looking at another
    attention = 7 * per_pair * (1 + 6 * (2 + 3))  # the observation at itself; each sample's two tokens at 2 and at 3
    needed = speed.cost.sampling_flops(args, OBS, ACT, 7, 6)
    assert counted(lambda: policy.sample(obs, 6)) in (needed, needed - attention)
    needed = speed.cost.policy_update_flops(args, OBS, ACT, 7)
    seen = counted(lambda: policy.loss(obs, actions).backward())
    pairs = 1 + 2 + 3  # attention's: needed 3 passes of these; the counter sees all pairs and recomputation, or nothing
    assert needed - 7 * per_pair * 3 * pairs <= seen <= needed + 7 * per_pair * 4 * 9


@pytest.mark.parametrize("other", [parl_diffusion_iql, parl_diffusion_rlpd], ids=lambda module: module.__name__)
def test_other_critic_updates_are_what_pytorch_counts(other):
    """One whole `critic_update`, less what is done again: the kept actions' values, and in each pass the observation's
    part of the first layer."""
    sizes = dict(ensemble_size=3, critic_hidden=(16, 24), num_bins=12, batch_size=4, num_samples=6, num_keep=2)
    drawn = {"sample_backup": True} if other is parl_diffusion_rlpd else {}  # so that all candidates climb
    args = other.Args(**sizes, **drawn, num_gradient_steps=3)
    net = speed.build(other, args, OBS, ACT, torch.device("cpu"))
    assert len(net.buffer.states) == speed.ROWS + speed.ROWS // speed.EPISODE
    rows = torch.arange(4) * 7
    needed = speed.cost.critic_update_flops(args, OBS, ACT)
    obs_part, action_part, rest = (4 * 3 * part for part in speed.cost.critic_layers(args, OBS, ACT))
    again = 4 * obs_part + 2 * (action_part + rest) if other is parl_diffusion_rlpd else 0
    seen = counted(lambda: speed.critic_step(other, net, args, rows))
    assert needed + again <= seen <= 1.01 * needed + again


def test_antmaze_count():
    case = speed.CASES["antmaze"]
    args = script.Args(**script.PRESETS["antmaze"] | case["fields"])
    needed = speed.cost.critic_update_flops(args, 29, 8)
    assert needed == pytest.approx(0.562e12, rel=1e-3)
    ranking = speed.cost.optimize_flops(dataclasses.replace(args, num_gradient_steps=0), 29, 8, 512)
    steps = speed.cost.optimize_flops(args, 29, 8, 512) - ranking
    loss = needed - ranking - steps
    assert [round(part / 1e12, 3) for part in (steps, ranking, loss)] == [0.474, 0.076, 0.012]
    all_members = dataclasses.replace(args, target_subset=10)  # the penalty's actions, and the target, through all ten
    again = 512 * 10 * 10 * sum(speed.cost.critic_layers(args, 29, 8)[1:])  # the kept actions' values
    assert speed.cost.critic_update_flops(all_members, 29, 8) + again == pytest.approx(0.62e12, rel=5e-3)


def test_distinct():
    drawn = torch.randint(1000, (800,), generator=torch.Generator().manual_seed(0)).unique().numel()
    assert speed.cost.distinct(800, 1000) == pytest.approx(drawn, rel=0.05)
    assert speed.cost.distinct(1, 1000) == 1


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("parl_diffusion_calql", ["offline critic update"]),
        ("parl_flow_calql", ["offline critic update"]),
        ("parl_transformer_calql", ["caching, naively", "offline critic update"]),
        ("parl_diffusion_iql", ["offline critic update"]),
        ("parl_diffusion_rlpd", ["critic update"]),
    ],
)
def test_command_line(name, more, tmp_path, monkeypatch, capsys):
    """The first script's as a program, the others' without the seconds that starting one and its peak take."""
    file = tmp_path / "speed.json"
    flags = ["--case", "quickstart", "--seconds", "0.02", "--threads", "1", "--device", "cpu", "--json", str(file)]
    command = ["benchmarks/speed.py", "--script", name, *flags]
    if name == "parl_diffusion_calql":
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        output = done.stdout
    else:
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(speed, "START", time.perf_counter())
        monkeypatch.setattr(speed, "peak_gflops", lambda seconds, device: 100.0)
        speed.main()
        output = capsys.readouterr().out
    (result,) = json.loads(file.read_text())
    names = [phase["phase"] for phase in result["phases"]]
    later = ["distilling", "online: distill + critic", "online: acting", "evaluation: acting, 50"]
    assert names == ["cloning, batch 256", "caching", *more, *later]
    assert ("times_naive" in result["phases"][1]) == ("transformer" in name)
    for phase in result["phases"]:
        assert phase["phase"] in output
        assert len(phase["repetitions"]) >= 3 and phase["gflop"] > 0
        no_climb = ["cloning", "caching"] + ["offline critic update"] * ("iql" in name)
        assert (phase["climbed"] is None) == any(phase["phase"].startswith(start) for start in no_climb)
        assert phase["share_of_peak"] == pytest.approx(phase["gflop"] / phase["seconds"] / result["peak_gflops"])
    assert result["peak_memory_gb"] > 0.05 and 0 < result["first_update_seconds"] < 300
    assert math.isfinite(result["peak_gflops"]) and len(result["peaks"]) == 1 + len(names)


@pytest.fixture
def main(monkeypatch, capsys):
    """speed.py with these flags, on a quickstart, in this process and without measuring the peak: what it prints."""
    monkeypatch.setattr(speed, "peak_gflops", lambda seconds, device: 100.0)

    def run(*flags):
        sizes = ["--case", "quickstart", "--seconds", "0.02", "--threads", "1", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["benchmarks/speed.py", *sizes, *flags])
        speed.main()
        return capsys.readouterr().out

    return run


def test_only_some_phases(main, tmp_path):
    main("--script", "parl_transformer_calql", "--phase", "caching, n", "--json", str(tmp_path / "speed.json"))
    (result,) = json.loads((tmp_path / "speed.json").read_text())
    assert [phase["phase"] for phase in result["phases"]] == ["caching, naively"]
    with pytest.raises(SystemExit, match="no phase has 'dreaming' in its name; there are cloning, batch 256; caching;"):
        main("--phase", "dreaming")


def test_profile(main):
    """Of each phase named, and no other, the operations that PyTorch saw, the dearest first."""
    output = main("--script", "parl_diffusion_iql", "--profile", "acting")
    tables = output.strip().split("\n\n")
    names = [table.splitlines()[0].split(": ", 1)[1] for table in tables]
    assert names == [
        "online: acting, 1 x decision, on one thread",
        "evaluation: acting, 50, 50 x decision, on one thread",
    ]
    for table in tables:
        shares = [float(line.split("%")[0]) for line in table.splitlines()[2:]]
        assert len(shares) == 12 and shares == sorted(shares, reverse=True) and sum(shares) <= 100.6
        assert "x aten::" in table and " 1 x Python, and waiting" in table


# At the end of a checkout's script: a clock that only `policy_update` and looking at it move on; a list of who called.
CLOCK = """
import time
print("hello")
now = [0.0]


def pass_time(seconds):
    now[0] += seconds
    return now[0]


def policy_update(*_):
    pass_time({seconds})
    with open({log!r}, "a") as log:
        log.write({letter!r})
    return torch.zeros(())


time.perf_counter = lambda: pass_time(0.05)
critic_update, refresh_candidates = lambda *_: {{}}, lambda *_: None  # to save the tests' own time
"""


def checkout(folder: pathlib.Path, script: str) -> pathlib.Path:
    """A copy of what a script needs of this repository, and that script."""
    for part in ("harness", "tasks"):
        shutil.copytree(ROOT / "benchmarks" / part, folder / "benchmarks" / part, ignore=lambda *_: ["__pycache__"])
    for part in ("__init__.py", "cost.py"):
        shutil.copy(ROOT / "benchmarks" / part, folder / "benchmarks" / part)
    (folder / "parl_diffusion_calql.py").write_text(script)
    return folder


def test_against_another_checkout(main, tmp_path, monkeypatch):
    """In the other one an update of the policy takes twice as long, there is no `distill` and no --distill-ratio."""
    log, text = tmp_path / "log", (ROOT / "parl_diffusion_calql.py").read_text()
    stubs = [CLOCK.format(seconds=s, letter=c, log=str(log)) for s, c in ((0.95, "a"), (1.95, "b"))]
    without = "\n".join(line for line in text.splitlines() if not line.startswith("    distill_ratio:"))
    this = checkout(tmp_path / "this", text + stubs[0])
    other = checkout(tmp_path / "other", without + stubs[1] + "del distill\n")
    monkeypatch.setattr(speed, "ROOT", this)
    output = main("--against", str(other), "--json", str(tmp_path / "speed.json"))
    (result,) = json.loads((tmp_path / "speed.json").read_text())
    phases = {phase["phase"]: phase for phase in result["phases"]}
    cloning = phases.pop("cloning, batch 256")
    assert cloning["this"] == pytest.approx([1.0] * 5) and cloning["other"] == pytest.approx([2.0] * 5)
    assert [cloning["times_as_fast"], *cloning["quartiles"]] == pytest.approx([2.0] * 4)
    assert log.read_text().startswith("ab" * 6)  # a warm-up and five turns
    why = {name: phase["not_there"] for name, phase in phases.items() if "not_there" in phase}
    assert why == {
        "distilling": f"{other}: AttributeError: module 'parl_diffusion_calql' has no attribute 'distill'",
        "online: distill + critic": f"{other}: AttributeError: 'Args' object has no attribute 'distill_ratio'",
    }
    assert all(len(phase["this"]) == len(phase["other"]) == 5 for name, phase in phases.items() if name not in why)
    assert result["settings_that_differ"] == ["distill_ratio 1.0 here, not there in the other"]
    assert "update    1.00 s    2.00 s           2.00    2.00 2.00 2.00      5" in output
    assert output.count("not there in") == 3 and "hello" not in output
    assert not list(tmp_path.rglob("__pycache__"))


@pytest.mark.parametrize("script", [script, parl_diffusion_iql, parl_diffusion_rlpd, parl_transformer_calql])
def test_the_cube_case_is_what_a_run_has(script):
    """laptop-chunk over laptop over the family, at the precision asked for, and less is refused to what climbs."""
    options = speed.Options(case="cube", matmul_precision="medium")
    flags = "--env-id cube-single-play-singletask-v0 --preset laptop-chunk --device cpu --matmul-precision medium"
    theirs = vars(cli.parse_args(script.Args, script.PRESETS, flags.split()))
    ours = vars(speed.arguments(script, speed.CASES["cube"], options, "cpu"))
    assert torch.get_float32_matmul_precision() == "medium"
    assert {name for name in ours if ours[name] != theirs[name]} <= {"env_id", "runs", "reward_bias", "reward_min"}
    with pytest.raises(SystemExit, match="for what only ranks"):
        speed.arguments(script, speed.CASES["quickstart"], options, "cpu")
    speed.arguments(script, speed.CASES["cube"], speed.Options(), "cpu")
    assert torch.get_float32_matmul_precision() == "highest"


def test_against_what_cannot_be_measured(main, tmp_path, monkeypatch):
    """One line, whether there is no script, it fails when it is imported, or its process dies."""
    (tmp_path / "benchmarks").mkdir()
    with pytest.raises(SystemExit, match=f"no script parl_diffusion_calql.py in {tmp_path}; there is none$"):
        main("--against", str(tmp_path))
    (tmp_path / "parl_diffusion_calql.py").write_text('raise RuntimeError("one thing\\nafter another")')
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=f"^error: {tmp_path}: RuntimeError: one thing$"):
        main("--against", str(tmp_path))
    dies = ["sh", "-c", "read question; exit 7"]
    with (
        subprocess.Popen(dies, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
        pytest.raises(SystemExit, match=r"^error: there: the process that measures it ended \(exit code 7\)$"),
    ):
        speed.ask(("there", process), ["caching", 1])


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(case="nonsense"), "there are antmaze"),
        (dict(case="antmaze", preset="kitchen"), "not both"),
        (dict(preset="kitchen"), "--obs-dim"),
        (dict(case="antmaze", obs_dim=3), "--preset"),
        (dict(threads=-1), "--threads"),
        (dict(seconds=0.0), "--seconds"),
        (dict(seconds=float("nan")), "--seconds"),
        (dict(json="/nowhere/at/all.json"), "no folder"),
        (dict(against="/nowhere"), "no checkout of this project"),
        (dict(against=str(ROOT), profile="acting"), "not both"),
        (dict(profile="acting", phase="acting"), "--profile names its phases"),
        (dict(profile="acting", json="speed.json"), "--json"),
        (dict(profile="acting", case="all"), "one case"),
        (dict(profile="acting", threads=2), "one thread"),
        (dict(compile=True, profile="acting"), "--compile"),
        (dict(device="abacus"), "--device"),
        (dict(device="meta"), "--device"),
    ],
)
def test_refusals(flags, words):
    with pytest.raises(SystemExit, match=words) as refusal:
        speed.check_options(speed.Options(**flags))
    assert "\n" not in str(refusal.value)


def test_unknown_script_and_preset():
    with pytest.raises(SystemExit, match="no script parl_nothing.py"):
        speed.load_script("parl_nothing")
    with pytest.raises(SystemExit, match="cannot be measured"):
        speed.load_script("benchmarks/tasks/dataset.py")
    case = dict(preset="nonsense")
    with pytest.raises(SystemExit, match="no preset 'nonsense'"):
        speed.measure(speed.Options(), case, torch.device("cpu"))
