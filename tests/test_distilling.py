"""benchmarks/distilling.py: the ways from one start, who learns in which; tables and pictures; what it refuses."""

import csv

import numpy as np
import pytest
import torch

import parl_diffusion_calql as script
from benchmarks import climbing, distilling

TOY = (
    "--env-id pointmaze-umaze-v0 --dataset-size 300 --threads 1 --eval-episodes 2 --num-cloning-steps 5 "
    "--num-offline-steps 5 --num-offline-evals 1 --num-online-episodes 0 --policy-hidden 8 --policy-blocks 1 "
    "--cloning-batch-size 8 --critic-hidden 8 --batch-size 8 --num-bins 8 --num-samples 2 --num-keep 2"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    script.main([*TOY, "--runs", str(runs)])
    return next(runs.iterdir())


def draw(rows, path):
    with open(path / "a.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    distilling.draw(distilling.Options(draw=str(path / "a.png"), csv=(str(path / "a.csv"),)))
    assert (path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_four_ways_from_one_start(folder, tmp_path, monkeypatch):
    seen, distill = [], script.distill

    def watch(policy, average, optimizer, critic, buffer, num_updates, greedy, args):
        before = {name: value.clone() for name, value in critic.state_dict().items()}
        result = distill(policy, average, optimizer, critic, buffer, num_updates, greedy, args)
        assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
        assert len(buffer) > buffer.num_offline and optimizer.param_groups[0]["lr"] == args.distill_lr
        seen.append((args.distill_data_actions, args.distill_mixed, num_updates, greedy))
        return result

    monkeypatch.setattr(script, "distill", watch)
    options = distilling.Options(run=str(folder), updates=4, every=2, collect=1, episodes=2)
    rows = distilling.distil_under_frozen_critic(options)
    assert seen == [(a, m, 2, True) for a in (1, 0) for m in (0, 1) for _ in range(2)]
    assert [row["updates"] for row in rows] == [0, 2, 4] * 4 and len({row["way"] for row in rows}) == 4
    starts = [(row["spread"], row["q"]) for row in rows if row["updates"] == 0]
    assert len(set(starts)) <= 4 and all(start[0] > 0 for start in starts)
    draw(rows, tmp_path)


def test_what_nothing_chose_is_the_policys_sample_or_the_datas_action(folder, tmp_path, monkeypatch):
    taught, update = [], script.policy_update

    def watch(policy, average, optimizer, obs, actions, rate):
        torch.manual_seed(0)
        taught.append((obs, actions, average.sample(obs, 1)[:, 0], optimizer.param_groups[0]["lr"]))
        return update(policy, average, optimizer, obs, actions, rate)

    def sample(policy, obs, num_samples, noise=None, draw=script.DiffusionPolicy.sample):
        torch.manual_seed(0)  # so that it is known what was drawn
        return draw(policy, obs, num_samples, noise)

    monkeypatch.setattr(script, "policy_update", watch)
    monkeypatch.setattr(script.DiffusionPolicy, "sample", sample)
    options = distilling.Options(run=str(folder), updates=4, every=2, episodes=2, unchosen=True)
    rows = distilling.teach_what_nothing_chose(options)
    assert [(row["way"], row["updates"]) for row in rows] == [(w, n) for w in distilling.UNCHOSEN for n in (0, 2, 4)]
    assert [rows[0][name] for name in ("spread", "alone")] == [rows[3][name] for name in ("spread", "alone")]
    args, _, _, buffer, *_ = distilling.load(options)
    for obs, actions, own, lr in taught:
        index = (buffer.states[None] == obs[:, None]).all(-1).float().argmax(1)
        data = torch.nan_to_num(buffer.data_actions(index), nan=9)
        same = [torch.equal(actions, own), torch.allclose(actions, data)]
        assert same in ([True, False], [False, True]) and lr == args.distill_lr
    assert [torch.equal(actions, own) for _, actions, own, _ in taught] == [True] * 4 + [False] * 4
    draw(rows, tmp_path)


def test_widths_are_those_of_an_exactly_learned_policy():
    """Euler's steps in closed form, one denoising step in closed form, and many steps, which lose nothing."""
    obs, width = torch.zeros(1, 1), 0.1
    torch.manual_seed(0)
    grown = 1.0
    for t in (0, 0.25, 0.5, 0.75):  # x grows by v / 4, v = Cov(a - noise, x_t) / Var(x_t) x
        grown *= 1 + (t * width**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * width**2) / 4
    assert distilling.exact_policy(width, 4, True).sample(obs, 4_000).std().item() == pytest.approx(grown, rel=0.01)
    policy = distilling.exact_policy(width, 1, False)
    alpha = policy.alphas[0].item()  # E[a | a_1] = sqrt(alpha) width^2 a_1 / (alpha width^2 + 1 - alpha)
    shrunk = alpha**0.5 * width**2 / (alpha * width**2 + 1 - alpha)
    assert policy.sample(obs, 4_000).std().item() == pytest.approx(shrunk, rel=0.01)
    for straight in (False, True):
        samples = distilling.exact_policy(width, 500, straight).sample(obs, 2_000)
        assert samples.std().item() == pytest.approx(width, rel=0.04)


def test_moved_is_the_median_way_of_a_hundred_steps():
    line = np.stack([np.arange(151) * 0.03, np.arange(151) * 0.04, np.ones(151)], 1)  # 5 in 100 steps
    still = np.zeros((130, 3))
    assert distilling.moved([line]) == pytest.approx(5) and distilling.moved([line, still]) == pytest.approx(5)
    assert distilling.moved([line, still, still]) == 0 and distilling.moved([line[:51], line]) == pytest.approx(5)
    assert np.isnan(distilling.moved([line[:51]]))


def test_online_ways_are_the_scripts_phase_3(folder, tmp_path, monkeypatch):
    """Who learns how often, at what rate, from when on; all start alike."""
    calls, distill, update = [], script.distill, script.critic_update

    def watch_distill(policy, average, optimizer, critic, buffer, num_updates, greedy, args, sampler):
        calls.append(("distill", num_updates, len(buffer) - buffer.num_offline, optimizer.param_groups[0]["lr"]))
        return distill(policy, average, optimizer, critic, buffer, num_updates, greedy, args, sampler)

    def watch_update(critic, target_critic, optimizer, buffer, rows, args):
        calls.append(("critic", len(rows), len(buffer) - buffer.num_offline, optimizer.param_groups[0]["lr"]))
        return update(critic, target_critic, optimizer, buffer, rows, args)

    monkeypatch.setattr(script, "distill", watch_distill)
    monkeypatch.setattr(script, "critic_update", watch_update)
    flags = "distill_ratio=0.1", "utd=0.05"
    options = distilling.Options(run=str(folder), online=2, every=1, episodes=2, flags=flags)
    rows = distilling.fine_tune(options)
    assert len([call for call in calls if call[0] == "distill"]) == 4  # not where the policy stands still
    assert [(row["way"], row["episodes"]) for row in rows] == [(way, i) for way in distilling.ONLINE for i in range(3)]
    first, second = [online for name, _, online, _ in calls if name == "distill"][:2]  # rows of online data by then
    lengths = first, second - first
    assert [num for name, num, *_ in calls if name == "distill"][:2] == [round(0.1 * length) for length in lengths]
    both = calls[: 2 + sum(round(0.05 * length) for length in lengths)]
    assert [name for name, *_ in both] == [
        name for length in lengths for name in ["distill"] + ["critic"] * round(0.05 * length)
    ]
    assert all(size == 8 for name, size, *_ in calls if name == "critic") and calls[len(both)][0] == "distill"
    assert {lr for name, *_, lr in calls if name == "critic"} == {script.PRESETS["pointmaze"]["critic_lr"]}
    assert {lr for name, *_, lr in calls if name == "distill"} == {script.PRESETS["pointmaze"]["distill_lr"]}
    starts = [{k: row[k] for k in ("spread", "q")} for row in rows if row["episodes"] == 0]
    assert starts[0] == starts[1] == starts[2]
    draw(rows, tmp_path)


def test_who_is_distilled_from_what_and_from_when(folder, monkeypatch):
    """--warmup leaves out the first episodes' distilling; --anchored draws from the cloned policy, else the present."""
    samplers, distill = [], script.distill
    monkeypatch.setattr(script, "distill", lambda *args: samplers.append(args[-1]) or distill(*args))
    for anchored in (False, True):
        options = distilling.Options(
            run=str(folder), online=3, every=3, episodes=1, flags=("utd=0", "distill_ratio=0.1")
        )
        options.ways, options.warmup, options.anchored = ("both",), 2, anchored
        distilling.fine_tune(options)
    assert [sampler is None for sampler in samplers] == [True, False]


def test_what_climbing_ways_come_to(folder, monkeypatch):
    """The exact way loses nothing; what a way costs is counted against all candidates climbing."""
    load = distilling.load

    def steeper(options):  # five updates leave a critic so flat that steps of 3e-4 gain nothing but rounding
        parts = load(options)
        parts[6].head_weight.data *= 100
        return parts

    monkeypatch.setattr(distilling, "load", steeper)
    rows = climbing.measure(str(folder), num_states=50)
    assert len(rows) == 2 * 5 and {row["settings"] for row in rows} == {"the run's", "the paper's"}
    for row in rows:
        if row["way"] == "all":
            assert row["of_full"] == 1 and row["same"] == 1 and row["moved"] == 0
            most = row["climbed"]
        if row["way"] == "winners":
            assert row["of_full"] == pytest.approx(1, rel=1e-3) and row["climbed"] <= most
        if "first 3" in row["way"]:
            assert 1 <= row["climbed"] <= min(3, most)
        assert row["gain"] > 1e-5


def test_flags_and_ways_that_are_none_are_refused(folder):
    for flag in ("no_such=1", "utd", "critic_hidden=8"):
        with pytest.raises(SystemExit, match="--flags"):
            distilling.fine_tune(distilling.Options(run=str(folder), flags=(flag,)))
    with pytest.raises(SystemExit, match="none of"):
        distilling.fine_tune(distilling.Options(run=str(folder), ways=("nobody",)))


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="not the folder of a run"):
        distilling.fine_tune(distilling.Options(run=str(tmp_path)))
