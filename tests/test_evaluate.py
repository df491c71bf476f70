"""A finished run's policy again: weights, way to act and starts are the run's; what cannot be is one line."""

import contextlib
import io
import json
import shutil

import pytest
import torch

import parl_diffusion_calql
import parl_diffusion_iql
import parl_diffusion_rlpd
import parl_transformer_calql
from benchmarks import evaluate
from benchmarks.harness import rollouts
from benchmarks.harness.rollouts import decide

TOY = (
    "--env-id pointmaze-umaze-v0 --dataset-size 300 --threads 1 --eval-episodes 2 --no-eval-processes --log-every 3 "
    "--num-cloning-steps 3 --num-online-episodes 1 --num-online-evals 1 --cloning-batch-size 8 --critic-hidden 8 8 "
    "--batch-size 4 --num-bins 8 --num-samples 3 --num-keep 2 --num-gradient-steps 1 --utd 0.1 --distill-ratio 0.1"
).split()
DIFFUSION, OFFLINE = (
    "--policy-hidden 8 --policy-blocks 1".split(),
    "--num-offline-steps 3 --num-offline-evals 1".split(),
)
FLAGS = {
    parl_diffusion_calql: [*DIFFUSION, *OFFLINE, "--chunk", "2"],
    parl_diffusion_iql: [*DIFFUSION, *OFFLINE, "--distill-every", "3"],
    parl_diffusion_rlpd: [*DIFFUSION, "--num-warmup-episodes", "1"],
    parl_transformer_calql: "--policy-width 8 --policy-layers 1 --policy-heads 2 --policy-bins 16".split() + OFFLINE,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished toy run of each script: its folder, and what its optimized policy decided at a state, by script."""
    folders, decided = {}, {}
    for script, flags in FLAGS.items():
        place, finish = tmp_path_factory.mktemp("runs"), script.finish

        def noted(run, env, make_env, act, policy, critic, script=script, finish=finish):
            decided[script] = decision(act, run)
            finish(run, env, make_env, act, policy, critic)

        script.finish = noted
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                script.main([*TOY, *flags, "--runs", str(place)])
        finally:
            script.finish = finish
        folders[script] = next(place.iterdir())
    return folders, decided


def decision(act, run):
    """What `act` does with fixed random numbers at some states."""
    torch.manual_seed(5)
    return decide(act, torch.linspace(-1, 1, 12).reshape(3, 4).numpy(), 2, run)


@pytest.mark.parametrize("script", FLAGS, ids=lambda script: script.__name__)
def test_it_acts_as_the_run_acted(runs, script, monkeypatch, capsys):
    folder, again, measure = runs[0][script], [], rollouts.evaluate

    def noted(envs, act, run):
        again.append(decision(act, run))
        return measure(envs, act, run)

    monkeypatch.setattr(rollouts, "evaluate", noted)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    finish = script.finish
    for policy in ("optimized", "cloned"):
        evaluate.main([str(folder), "--episodes", "3", "--policy", policy, "--threads", "1", "--eval-seed", "7"])
    assert (again[0] == runs[1][script]).all()  # to the last bit
    assert again[0].shape == again[1].shape and (again[0] != again[1]).any()
    assert script.finish is finish and script.Run.__name__ == "Run"  # the script is as it was
    entries = json.loads((folder / "evaluation.json").read_text())
    assert [entry["policy"] for entry in entries] == ["optimized", "cloned"]
    for entry in entries:
        assert entry["episodes"] == 3 and entry["eval_seed"] == 7 and entry["seed"] == 1 and entry["commit"]
        assert entry["low"] <= entry["success_rate"] <= entry["high"] and entry["task"] == "pointmaze-umaze-v0"
    assert "95 % interval" in capsys.readouterr().out
    (folder / "evaluation.json").unlink()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before  # nothing else was touched


def test_another_task_with_the_same_spaces(runs):
    folder = runs[0][parl_diffusion_calql]
    entry = evaluate.evaluate(evaluate.Options(folder, episodes=2, task="pointmaze-medium-v0", threads=1))
    assert (entry["task"], entry["trained_on"]) == ("pointmaze-medium-v0", "pointmaze-umaze-v0")
    assert evaluate.evaluate(evaluate.Options(folder, episodes=2, task="pointmaze-medium-v0", threads=1)) == entry


def test_other_flags_are_acted_with_and_noted(runs, monkeypatch):
    """Candidates asked for, and how one of them is chosen; environments at once no more than in the run."""
    folder, asked = runs[0][parl_diffusion_calql], []
    select, measure = parl_diffusion_calql.select_actions, rollouts.evaluate
    monkeypatch.setattr(
        parl_diffusion_calql,
        "select_actions",
        lambda actions, q, greedy: asked.append((actions.shape[1], greedy)) or select(actions, q, greedy),
    )
    monkeypatch.setattr(
        rollouts, "evaluate", lambda envs, act, run: asked.append(envs.num_envs) or measure(envs, act, run)
    )
    options = dict(episodes=3, threads=1)
    plain = evaluate.evaluate(evaluate.Options(folder, **options))
    assert asked[0] == 2 and set(asked[1:]) == {(2, True)} and plain["flags"] == []
    asked.clear()
    flags = ("num-samples=5", "num_keep=4", "greedy_rollouts=False")
    entry = evaluate.evaluate(evaluate.Options(folder, flags=flags, **options))
    assert asked[0] == 2 and set(asked[1:]) == {(4, False)} and entry["flags"] == list(flags)
    (folder / "evaluation.json").unlink()


def test_what_cannot_be_evaluated_is_one_line(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs[0][parl_diffusion_calql], folder)

    def refused(match, **options):
        with pytest.raises(SystemExit, match=match) as caught:
            evaluate.evaluate(evaluate.Options(**{"run": folder, "episodes": 1, "threads": 1} | options))
        assert "\n" not in str(caught.value)

    refused("not a run's folder", run=tmp_path / "nowhere")
    refused("its policy does not fit", task="antmaze-umaze-v2")
    refused("did you mean", task="pointmaze-medum-v0")
    refused("--eval-episodes 0 must be at least 1", episodes=0)
    for flag in ("nothing=1", "num_samples", "num_samples=x", "greedy_rollouts=1", "runs=x", "compile=maybe"):
        refused(f"--flags {flag}: write one as", flags=(flag,))
    refused("--num-keep 9", flags=("num_keep=9",))
    refused("too coarse to climb", flags=("matmul_precision=medium", "num_gradient_steps=1"))  # a word, and taken
    refused("does not fit its script", flags=("policy_hidden=16",))
    (folder / "evaluation.json").write_text("{")
    refused("no list of evaluations")
    (folder / "evaluation.json").unlink()
    whole = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    refused("cannot be read")
    (folder / "checkpoint.pt").unlink()
    refused("no checkpoint.pt")
    (folder / "checkpoint.pt").write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    for script in ("nothing_like_it", "../x", "benchmarks.report"):
        (folder / "config.json").write_text(json.dumps(config | {"script": script}))
        refused("which is not in")
    assert not (folder / "evaluation.json").exists()
