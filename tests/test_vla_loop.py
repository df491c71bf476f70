"""What `main` of parl_openvla_real.py does with the tested parts, on a made-up robot; its cache, its resuming."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types
import weakref

import gymnasium as gym
import numpy as np
import pytest
import torch

INSTALL = "pip install -r requirements-openvla.txt"
pytest.importorskip("peft", reason=f"adapters are peft's: {INSTALL}")
pytest.importorskip("safetensors", reason=f"weights are safetensors: {INSTALL}")

import parl_openvla_real as script  # noqa: E402
from benchmarks import evaluate  # noqa: E402
from benchmarks.harness import rollouts  # noqa: E402
from benchmarks.vla import checkpoint as files  # noqa: E402
from benchmarks.vla import robot, workers  # noqa: E402
from tests.test_end_to_end import assert_same_checkpoint, rows_of  # noqa: E402
from tests.test_tasks_widowx import needs_rendering  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = script.Sizes(28, (16, 2, 2, 24), (16, 2, 2, 24), (16, 1, 2, 24), 32, 400, empty_token=2)
LENGTH, ZERO_SHOT, CLONING, OFFLINE, EPISODES, SAMPLES, KEEP, UTD, RATIO = 4, 3, 4, 5, 3, 6, 3, 1.5, 0.75
FLAGS = (
    f"--threads 1 --num-demonstrations 2 --num-cloning-steps {CLONING} --num-zero-shot {ZERO_SHOT} --eval-episodes 1 "
    f"--num-offline-steps {OFFLINE} --num-online-episodes {EPISODES} --num-online-evals 1 --log-every 2 --utd {UTD} "
    f"--distill-ratio {RATIO} --num-samples {SAMPLES} --num-keep {KEEP} --num-gradient-steps 0 --camera-size 28 "
    "--critic-image 20 --encoder-width 4 --encoder-blocks 1 1 --critic-hidden 8 8 --ensemble-size 3 --batch-size 8 "
    "--cloning-batch-size 8 --distill-batch-size 6 --lora-rank 2 --distill-lr 0.02 --critic-lr 0.03 --discount 0.9 "
    "--cloning-lr 0.04 --cql-actions 2 --cache-batch 3 --distill-episodes 1 --distill-selection sample "
    "--no-sample-backup --no-greedy-rollouts --no-use-proprio"
).split()
WRAPPED = (
    "supervised_step", "critic_update", "optimize", "select_actions", "td_target", "calql_loss", "distill_lora",
    "draw_candidates", "random_shift",
)  # fmt: skip


class MadeUpRobot(gym.Env):
    """Random images for four steps; halves what it is asked to do, and says so."""

    instruction = "do something"
    observation_space = gym.spaces.Dict({
        "image": gym.spaces.Box(0, 255, (28, 28, 3), np.uint8), "proprio": gym.spaces.Box(-np.inf, np.inf, (7,)),
    })  # fmt: skip
    action_space = gym.spaces.Box(-1, 1, (7,))
    asked: list = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        self.steps += 1
        MadeUpRobot.asked.append(action)
        info = {"success": False, "executed": (0.5 * action).astype(np.float32)}
        return self._observe(), 0.0, False, self.steps == LENGTH, info

    def _observe(self):
        image = self.np_random.integers(0, 256, (28, 28, 3)).astype(np.uint8)
        return {"image": image, "proprio": self.np_random.normal(size=7).astype(np.float32)}


def made_up_demonstrations(env_id, num, seed, **options):
    random = np.random.default_rng(seed)
    return [
        dict(
            image=random.integers(0, 256, (LENGTH + 1, 28, 28, 3)).astype(np.uint8),
            proprio=random.normal(size=(LENGTH + 1, 7)).astype(np.float32),
            actions=random.uniform(-0.02, 0.02, (LENGTH, 7)).astype(np.float32),
            rewards=np.zeros(LENGTH, np.float32), terminals=np.zeros(LENGTH, bool),
        )
        for _ in range(num)
    ]  # fmt: skip


def stand_in(patch):
    """A made-up robot for the simulated one, and a smaller VLA."""
    patch.setattr(script, "TINY", SMALL)
    patch.setattr(robot, "make_env", lambda env_id, **options: MadeUpRobot())
    patch.setattr(robot, "collect_demonstrations", made_up_demonstrations)


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """Every call of a run, in order: (name, arguments, result), and the run's parts."""
    calls, parts = [], {}
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        for name, function in [(name, getattr(script, name)) for name in WRAPPED]:

            def wrapped(*args, _name=name, _function=function, **kwargs):
                if _name == "critic_update":
                    critic, target, optimizer, buffer, index, _ = args
                    parts.update(critic=critic, target=target, buffer=buffer)
                    policy = parts["policy"]
                    episodes = np.searchsorted(buffer.first_row, index.numpy(), side="right") - 1
                    note = dict(
                        rows=index.clone(), total=len(buffer.rewards), lr=optimizer.param_groups[0]["lr"],
                        moments=len(optimizer.state), biases=[n.head_bias.tolist() for n in (critic, target)],
                        fresh={buffer.versions[e] == policy.version() for e in episodes},
                    )  # fmt: skip
                elif _name == "distill_lora":
                    parts["distill_buffer"] = args[3]
                    note = dict(updates=args[4], greedy=args[5], episodes=len(args[3].versions),
                                lr=args[1].param_groups[0]["lr"])  # fmt: skip
                elif _name == "supervised_step":
                    parts["policy"] = args[0]
                    trained = {n for n, p in args[0].model.named_parameters() if p.requires_grad}
                    note = dict(images=args[2].clone(), actions=args[3].clone(), lr=args[1].param_groups[0]["lr"],
                                trained=trained)  # fmt: skip
                elif _name == "optimize":
                    note = dict(candidates=args[2].clone(), best_only=args[4],
                                data=args[5].clone() if len(args) > 5 and args[5] is not None else None)  # fmt: skip
                else:
                    note = dict(args=args)
                calls.append((_name, note, result := _function(*args, **kwargs)))
                return result

            patch.setattr(script, name, wrapped)
        sample = script.VLAPolicy.sample

        def noting(policy, obs, num_samples, *rest):
            drawn = sample(policy, obs, num_samples, *rest)
            calls.append(("sample", dict(n=num_samples, cached=bool(rest), images=obs.clone()), drawn))
            return drawn

        patch.setattr(script.VLAPolicy, "sample", noting)
        MadeUpRobot.asked.clear()
        runs = tmp_path_factory.mktemp("runs")
        script.main([*FLAGS, "--runs", str(runs)])
    (parts["folder"],) = runs.iterdir()
    return calls, parts


def named(notes, name):
    return [(note, result) for other, note, result in notes[0] if other == name]


def test_the_phases_come_in_the_papers_order(notes):
    """Cloning (tiny only), zero-shot episodes, the critic; then per episode: LoRA, the cache, the critic."""
    names = [name for name, *_ in notes[0] if name in ("supervised_step", "critic_update", "distill_lora")]
    distill = ["supervised_step"] * round(LENGTH * RATIO) + ["distill_lora"]  # which is noted when it returns
    online = (distill + ["critic_update"] * round(LENGTH * UTD)) * EPISODES
    assert names == ["supervised_step"] * CLONING + ["critic_update"] * OFFLINE + online


def test_first_all_weights_are_cloned_and_then_adapters_only(notes):
    steps = [note for note, _ in named(notes, "supervised_step")]
    rates = [0.04 * min((i + 1) / 100, 1 - i / CLONING) for i in range(CLONING)]  # up in 100 updates, then down
    assert [step["lr"] for step in steps[:CLONING]] == pytest.approx(rates)
    for step in steps[:CLONING]:
        assert not any(".lora_" in name for name in step["trained"]) and len(step["trained"]) > 50
    for step in steps[CLONING:]:
        assert step["lr"] == 0.02 and all(".lora_" in name for name in step["trained"]) and len(step["images"]) == 6


def test_what_the_robot_executed_is_what_is_learned(notes):
    """Not what was asked for; normalised once, and the gripper as it is."""
    buffer = notes[1]["buffer"]
    assert len(buffer.rewards) == (ZERO_SHOT + EPISODES) * LENGTH
    executed = [0.5 * action for action in MadeUpRobot.asked]
    statistics = files.action_statistics(files.TINY_STATISTICS, "bridge_orig")
    expected = robot.normalize(np.array(executed), statistics)
    for rows in buffer.actions.split(LENGTH):  # the evaluations' actions are among them, and are not kept
        distance = np.abs(expected[None] - rows.numpy()[:, None]).max(-1)
        assert (distance.min(1) < 1e-5).all()


def test_zero_shot_episodes_are_the_policys_and_later_ones_the_optimized_actions(notes):
    """One sample at a time before the critic has learned, all candidates ranked by it afterwards."""
    calls, buffer = notes[0], notes[1]["buffer"]
    acting = [
        (i, note, drawn) for i, (name, note, drawn) in enumerate(calls) if name == "sample" and not note["cached"]
    ]
    for number in range(ZERO_SHOT + EPISODES):
        for t in range(LENGTH):
            image, taken = buffer.states[number * (LENGTH + 1) + t], buffer.actions[number * LENGTH + t]
            ((i, note, drawn),) = [
                a for a in acting if len(a[1]["images"]) == 1 and torch.equal(a[1]["images"][0], image)
            ]
            if number < ZERO_SHOT:
                assert note["n"] == 1 and calls[i + 1][0] != "optimize"
                action = drawn[0, 0]
            else:
                assert note["n"] == SAMPLES
                (_, optimize, (optimized, q)), (_, _, selected) = calls[i + 1 : i + 3]
                assert torch.equal(optimize["candidates"], drawn) and not optimize["best_only"]
                assert optimize["data"] is None and (optimized[0] == selected[0]).all(-1).any()
                action = selected[0]
            statistics = files.action_statistics(files.TINY_STATISTICS, "bridge_orig")
            halved = robot.normalize(0.5 * robot.unnormalize(action.numpy(), statistics), statistics)
            np.testing.assert_allclose(taken, halved, atol=1e-5)


def test_files_say_which_version_of_the_policy_made_them(notes):
    """So that a resumed run takes them only if it was the same: episodes as they came, candidates as they are now."""
    folder = notes[1]["folder"]

    def versions(kind, last):
        names = [f"{number:05}.npz" for number in range(last)]
        assert sorted(path.name for path in (folder / kind).iterdir()) == names
        return [str(robot.read_arrays(folder / kind / name)["version"]) for name in names]

    acted = versions("episodes", ZERO_SHOT + EPISODES)
    assert len(set(acted[: ZERO_SHOT + 1])) == 1 and len(set(acted[ZERO_SHOT:])) == EPISODES  # LoRA comes after each
    (drawn,) = set(versions("cache", ZERO_SHOT + EPISODES))
    assert drawn == notes[1]["policy"].version() and drawn not in acted


def test_images_are_kept_once_and_rewards_are_biased(notes):
    buffer = notes[1]["buffer"]
    episodes = ZERO_SHOT + EPISODES
    assert len(buffer.states) == len(buffer.small) == len(buffer.candidates) == episodes * (LENGTH + 1)
    assert buffer.obs_index.tolist() == [e * (LENGTH + 1) + i for e in range(episodes) for i in range(LENGTH)]
    assert (buffer.rewards == -1).all() and (buffer.masks == 1).all()  # cut by the time limit, not ended
    assert torch.allclose(buffer.mc_returns, torch.full_like(buffer.mc_returns, -1 / (1 - 0.9)))  # failed: for ever
    last = torch.arange(LENGTH, len(buffer.states), LENGTH + 1)
    assert buffer.action_at[last].isnan().all() and torch.equal(buffer.action_at[buffer.obs_index], buffer.actions)


def test_the_critic_begins_once_at_the_zero_shot_episodes_mean_return(notes):
    """And not at 0, from where its values would first have to fall together."""
    biases = [note["biases"] for note, _ in named(notes, "critic_update")]
    begin = [[[pytest.approx(-1 / (1 - 0.9))]]] * 3  # every episode failed, for ever
    assert biases[0] == [begin, begin]
    assert all(critic != begin for critic, _ in biases[1:]) and biases[OFFLINE] != biases[0]


def test_the_critic_sees_fresh_candidates_of_all_episodes_there_are(notes):
    updates = [note for note, _ in named(notes, "critic_update")]
    for update in updates:
        assert update["fresh"] == {True} and update["lr"] == 0.03 and len(update["rows"]) == 8
    per_episode = round(LENGTH * UTD)
    totals = [update["total"] for update in updates]
    grown = [(ZERO_SHOT + 1 + i // per_episode) * LENGTH for i in range(EPISODES * per_episode)]
    assert totals == [ZERO_SHOT * LENGTH] * OFFLINE + grown
    assert updates[OFFLINE]["moments"] == 0 and updates[OFFLINE - 1]["moments"] > 0  # fresh when going online
    assert len({row for update in updates[OFFLINE:] for row in update["rows"].tolist()}) > ZERO_SHOT * LENGTH


def test_targets_and_penalty_take_the_optimized_actions_at_both_states(notes):
    """And the target is valued by the target critic, at the shifted next image."""
    calls = notes[0]
    for i, (name, *_) in enumerate(calls):
        if name != "critic_update":
            continue
        inside = {other: (n, r) for other, n, r in calls[i - 5 : i]}
        optimized, q = inside["optimize"][1]
        assert inside["optimize"][0]["best_only"] and inside["optimize"][0]["data"] is None
        assert inside["optimize"][0]["candidates"].shape == (16, SAMPLES, 7) and optimized.shape == (16, KEEP, 7)
        best = optimized[torch.arange(16), q.argmax(1)]
        td, loss = inside["td_target"][0]["args"], inside["calql_loss"][0]["args"]
        assert td[0] is notes[1]["target"] and torch.equal(td[4], best[8:])
        assert loss[0] is notes[1]["critic"] and torch.equal(loss[5], best[:8]) and torch.equal(loss[6], best[8:])
        assert torch.equal(loss[3], inside["td_target"][1])
        assert len(td[6]) == len(loss[9]) == 2


def test_distilling_annotates_all_episodes_alike_with_cached_candidates_and_the_data(notes):
    """Equation 4.4: states uniform over all rows; algorithm 1, line 3: a_data(s) is one more candidate."""
    rounds = [note for note, _ in named(notes, "distill_lora")]
    assert [r["updates"] for r in rounds] == [round(LENGTH * RATIO)] * EPISODES
    assert [r["episodes"] for r in rounds] == [ZERO_SHOT + 1 + i for i in range(EPISODES)]
    assert [r["lr"] for r in rounds] == [0.02] * EPISODES
    buffer, seen = notes[1]["buffer"], set()
    calls = notes[0]
    for i, (name, note, _) in enumerate(calls):
        if name != "supervised_step" or len(note["images"]) != 6:
            continue
        (_, optimize, (optimized, q)) = next(c for c in reversed(calls[:i]) if c[0] == "optimize")
        assert optimize["candidates"].shape == (6, SAMPLES, 7) and optimized.shape == (6, KEEP + 1, 7)
        state = (buffer.states[:, None] == note["images"][None]).flatten(2).all(-1).int().argmax(0)
        assert torch.equal(buffer.states[state], note["images"])
        assert torch.equal(optimize["data"], buffer.action_at[state])
        if rounds[0]["greedy"]:
            assert torch.equal(note["actions"], optimized[torch.arange(6), q.argmax(1)])
        seen |= {s // (LENGTH + 1) for s in state.tolist()}
    assert len(seen) >= ZERO_SHOT  # episodes before going online as well as after


def test_states_to_distil_are_uniform_over_rows():
    """Counts of 6,000 draws over rows of unequal episodes."""
    args = script.Args(num_samples=2, num_keep=1, num_gradient_steps=0, critic_image=8, distill_batch_size=20)
    buffer = script.EpisodeBuffer((8, 8), args, torch.device("cpu"))
    for length in (2, 5, 3):
        obs = np.random.default_rng(length).integers(0, 256, (length + 1, 2 * 3 * 64 + 28)).astype(np.uint8)
        rows = dict(actions=np.zeros((length, 7), np.float32), rewards=np.zeros(length, np.float32))
        buffer.add(dict(obs=obs, terminals=np.zeros(length, bool)) | rows)
    critic = script.PixelCritic(7, 0, 4, (1,), (4,), 2)
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        step = lambda policy, optimizer, images, target: drawn.append(images) or torch.zeros(())  # noqa: E731
        patch.setattr(script, "supervised_step", step)
        script.distill_lora(None, None, critic, buffer, 300, True, args)
    states = torch.cat(drawn)
    counts = torch.stack([(buffer.states[i] == states).flatten(1).all(1).sum() for i in buffer.obs_index])
    assert counts.sum() == 6_000 and ((counts - 600) ** 2 / 600).sum() < 34  # 9 degrees of freedom, p = 1e-4


def test_a_critic_update_takes_each_transition_as_it_was(monkeypatch):
    """Images and candidates of s and s', the reward, the action; the gradient reaches the encoder, the target lags."""
    args = script.Args(num_samples=3, num_keep=2, num_gradient_steps=1, critic_image=8, use_proprio=True)
    args.ensemble_size, args.target_subset, args.discount, args.target_tau = 3, 2, 0.9, 0.25
    torch.manual_seed(0)
    buffer, random = script.EpisodeBuffer((8, 8), args, torch.device("cpu")), np.random.default_rng(0)
    for length in (2, 3):
        proprio = random.normal(size=(length + 1, 7)).astype(np.float32)
        pixels = random.integers(0, 256, (length + 1, 2 * 3 * 64)).astype(np.uint8)
        obs = np.concatenate([pixels, proprio.view(np.uint8)], 1)
        actions = random.uniform(-1, 1, (length, 7)).astype(np.float32)
        last = np.arange(length) == length - 1
        buffer.add(dict(obs=obs, actions=actions, rewards=last.astype(np.float32), terminals=last))
    buffer.candidates.uniform_(-1, 1)
    critic, target = (script.PixelCritic(7, 7, 4, (1,), (4,), 3) for _ in range(2))
    encoders = {c: script.copy.deepcopy(c) for c in (critic, target)}
    before = [p.clone() for p in target.parameters()]
    calls = {}

    def note(name):
        function = getattr(script, name)

        def noting(*given):
            calls[name] = given, (result := function(*given))
            return result

        monkeypatch.setattr(script, name, noting)

    for name in ("optimize", "td_target", "calql_loss"):
        note(name)
    shifted = []
    monkeypatch.setattr(script, "random_shift", lambda images: shifted.append(images) or images.flip(-1))
    index, here, there = torch.tensor([1, 4, 2, 0]), [1, 5, 3, 0], [2, 6, 4, 1]  # rows, their states, the next ones
    script.critic_update(critic, target, torch.optim.SGD(critic.parameters(), 0.1), buffer, index, args)
    assert len(shifted) == 1 and torch.equal(shifted[0], buffer.small[here + there])  # each image moves by itself
    encoded = lambda c, states: encoders[c].encode(buffer.small[states].flip(-1), buffer.proprio[states])  # noqa: E731
    (_, obs, candidates, *_), _ = calls["optimize"]
    torch.testing.assert_close(obs, torch.cat([encoded(critic, here), encoded(critic, there)]))
    assert torch.equal(candidates, buffer.candidates[here + there]) and not obs.requires_grad
    (_, rewards, masks, next_obs, _, discount, members), target_q = calls["td_target"]
    assert rewards.tolist() == [0, 0, -1, -1] and masks.tolist() == [0, 0, 1, 1] and discount == 0.9
    torch.testing.assert_close(next_obs, encoded(target, there))
    assert len(set(members.tolist())) == 2 and target_q.tolist()[:2] == [0, 0]
    (_, obs, actions, *_, random_actions, alpha, _), _ = calls["calql_loss"]
    torch.testing.assert_close(obs, encoded(critic, here))
    assert torch.equal(actions, buffer.actions[index]) and torch.equal(
        calls["calql_loss"][0][4], buffer.mc_returns[index]
    )
    assert random_actions.shape == (4, args.cql_actions, 7) and random_actions.abs().max() <= 1 and alpha == 0.01
    assert random_actions.min() < -0.5 and random_actions.max() > 0.5
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in critic.encoder.parameters())
    for old, new, online in zip(before, target.parameters(), critic.parameters()):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * online)
        assert new.grad is None


@pytest.mark.parametrize("greedy", [True, False])
def test_the_best_candidate_is_taught_or_one_drawn_from_equation_4_3(greedy):
    """Candidates whose Q differ by 2: the softmax prefers the best one to the other by exp(2)."""
    args = script.Args(num_samples=2, num_keep=2, num_gradient_steps=0, critic_image=8, distill_batch_size=500)
    args.distill_data_actions = False
    buffer = script.EpisodeBuffer((8, 8), args, torch.device("cpu"))
    obs = np.zeros((3, 2 * 3 * 64 + 28), np.uint8)
    buffer.add(
        dict(
            obs=obs, actions=np.zeros((2, 7), np.float32), rewards=np.zeros(2, np.float32), terminals=np.zeros(2, bool)
        )
    )
    buffer.candidates[:, 0], buffer.candidates[:, 1] = -0.5, 0.5
    critic, taught = script.PixelCritic(7, 0, 4, (1,), (4,), 2), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.PixelCritic, "forward", lambda self, obs, actions, members=None: 2 * actions[None, ..., 0])
        patch.setattr(script, "supervised_step", lambda p, o, images, target: taught.append(target) or torch.zeros(()))
        metrics = script.distill_lora(None, None, critic, buffer, 8, greedy, args)
    share = (torch.cat(taught)[:, 0] == 0.5).float().mean().item()
    assert metrics["distill_q"] == pytest.approx(1.0) and metrics["distill_q_std"] == pytest.approx(1.0)
    assert share == 1.0 if greedy else share == pytest.approx(1 / (1 + np.exp(-2)), abs=0.02)


def test_greedy_or_drawn_is_decided_by_the_spread_of_q():
    """Appendix B.1; unless it is said. Without an offline phase nothing was measured: as it acts."""
    choose, args = script.choose_greedy_distillation, script.Args
    assert choose(args(), [0.4, 1.5]) is True and choose(args(), [0.6, 1.5]) is False
    assert choose(args(greedy_below_std=3.0), [0.6, 1.5]) is True
    for selection in ("greedy", "sample"):
        for spread in ([0.1], [9.0], []):
            assert choose(args(distill_selection=selection), spread) is (selection == "greedy")
    for acting in (True, False):
        assert choose(args(greedy_rollouts=acting), []) is acting


def test_a_failed_episode_is_worth_the_least_and_a_successful_one_its_discounted_steps():
    """-1 / (1 - 0.99) = -100 from every state; and a success ends the value, a time limit does not."""
    buffer = script.EpisodeBuffer((8, 8), script.Args(num_samples=2, critic_image=8), torch.device("cpu"))
    obs, actions = np.zeros((4, 2 * 3 * 64 + 28), np.uint8), np.zeros((3, 7), np.float32)
    for reward, ends in ((0, False), (1, True), (0, True)):
        rewards = np.array([0, 0, reward], np.float32)
        buffer.add(dict(obs=obs, actions=actions, rewards=rewards, terminals=np.array([False, False, ends])))
    assert buffer.rewards.tolist() == [-1, -1, -1, -1, -1, 0, -1, -1, -1]
    assert buffer.masks.tolist() == [1, 1, 1, 1, 1, 0, 1, 1, 0]
    expected = torch.tensor([-100.0, -100, -100, -1.99, -1, 0, -100, -100, -100])
    torch.testing.assert_close(buffer.mc_returns, expected, atol=1e-4, rtol=1e-5)
    assert buffer.obs_index.tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]


def test_proprio_is_shown_to_the_critic_only_if_asked_for():
    for use in (False, True):
        args = script.Args(num_samples=2, critic_image=8, use_proprio=use)
        buffer = script.EpisodeBuffer((8, 8), args, torch.device("cpu"))
        proprio = np.arange(21, dtype=np.float32).reshape(3, 7)
        obs = np.concatenate([np.zeros((3, 2 * 3 * 64), np.uint8), proprio.view(np.uint8)], 1)
        rest = dict(rewards=np.zeros(2, np.float32), terminals=np.zeros(2, bool))
        buffer.add(dict(obs=obs, actions=np.zeros((2, 7), np.float32)) | rest)
        np.testing.assert_array_equal(buffer.proprio, proprio if use else proprio[:, :0])


def small_args(tmp_path, **changes):
    runs = dict(num_samples=3, cache_batch=2, critic_image=8, lora_rank=2, threads=1, runs=str(tmp_path))
    return script.Args(**runs | changes)


class FakeRun:
    """What `refresh` asks of a run."""

    def __init__(self, folder, args):
        self.folder, self.args, self.phase, self.stops = folder, args, "offline", 0

    def check_stop(self):
        self.stops += 1

    def each(self, description, parts):
        yield from parts


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A small policy, a buffer of three episodes, arguments, and a run's folder."""
    monkeypatch.setattr(script, "TINY", SMALL)
    torch.manual_seed(0)
    args = small_args(tmp_path)
    policy = script.make_policy(args, "put it down")
    files.train_only(policy.model, script.adapters(policy.model))
    buffer = script.EpisodeBuffer((28, 8), args, torch.device("cpu"))
    for length in (2, 4, 3):
        obs = np.random.default_rng(length).integers(0, 256, (length + 1, 3 * (28**2 + 64) + 28)).astype(np.uint8)
        rows = dict(actions=np.zeros((length, 7), np.float32), rewards=np.zeros(length, np.float32))
        buffer.add(dict(obs=obs, terminals=np.zeros(length, bool)) | rows)
    return policy, buffer, args, FakeRun(tmp_path, args)


def change(policy):
    with torch.no_grad():
        for parameter in script.adapters(policy.model).values():
            parameter.add_(0.3 * torch.randn_like(parameter))


def fill(cache, pool=None):
    policy, buffer, args, run = cache
    pool = pool or workers.NoPool(args, run, script.draw_candidates)
    return [*script.refresh(policy, buffer, run, pool)]


def test_a_stale_candidate_is_never_used(cache):
    policy, buffer, args, run = cache
    with pytest.raises((RuntimeError, ValueError)):
        buffer.rows_with(policy.version())  # there are none
    assert [len(rows) for rows in fill(cache)] == [9] and set(buffer.versions) == {policy.version()}
    old = buffer.candidates.clone()
    assert fill(cache)[-1].tolist() == list(range(9)) and torch.equal(buffer.candidates, old)
    change(policy)
    assert policy.version() not in buffer.versions
    fill(cache)
    assert set(buffer.versions) == {policy.version()} and not torch.equal(buffer.candidates, old)


def test_a_cache_of_another_policy_is_told_of(tmp_path, capsys):
    run = types.SimpleNamespace(folder=tmp_path)
    for number, version in enumerate(("this", "that", "this", "an older one")):
        robot.write_candidates(run, number, version, np.zeros((3, 2, 7), np.float32))
    robot.tell_stale_cache(run, "this")
    assert "2 of 4 episodes' candidates are of another policy" in capsys.readouterr().out
    robot.tell_stale_cache(types.SimpleNamespace(folder=tmp_path / "new"), "this")
    assert not capsys.readouterr().out


def test_what_was_drawn_is_found_after_a_stop(cache, monkeypatch):
    """Of the version that is asked for; nothing is drawn twice, and a file of another version is not taken."""
    policy, buffer, args, run = cache
    fill(cache)
    kept, buffer.versions = buffer.candidates.clone(), [""] * 3
    buffer.candidates.zero_()
    draws, draw = [], script.draw_candidates
    monkeypatch.setattr(script, "draw_candidates", lambda *a: draws.append(a) or draw(*a))
    fill(cache)
    assert not draws and torch.equal(buffer.candidates, kept)
    (run.folder / "cache" / "00001.npz").unlink()
    buffer.versions = [""] * 3
    fill(cache)
    assert len(draws) == 1 and torch.equal(buffer.candidates, kept)
    change(policy)
    fill(cache)
    assert len(draws) == 4
    (run.folder / "cache" / "00002.npz").write_bytes(b"PK nothing")
    buffer.versions = [""] * 3
    with pytest.raises(SystemExit, match="00002.npz is damaged") as stopped:
        fill(cache)
    assert "\n" not in str(stopped.value)


def test_workers_draw_the_same_and_one_that_dies_is_replaced(cache):
    """The base model once in each, adapters only sent; a killed one's episode is drawn anew."""
    ray = pytest.importorskip("ray", reason=INSTALL)
    policy, buffer, args, run = cache
    files.write_checkpoint(run.folder / "cloned", policy.model, files.TINY_STATISTICS)  # what the workers read
    change(policy)
    fill(cache)
    here, buffer.versions = buffer.candidates.clone(), [""] * 3
    for file in (run.folder / "cache").iterdir():
        file.unlink()
    args.num_cache_workers = 1
    pool = workers.make_pool(args, run, policy, script.make_policy, script.draw_candidates)
    try:
        victim = pool.pool.idle[-1]
        pid = ray.get(victim.pid.remote(), timeout=120)
        os.kill(pid, signal.SIGKILL)
        rows = fill(cache, pool)
        assert rows[-1].tolist() == list(range(9)) and torch.equal(buffer.candidates, here)
        assert all(0 < len(r) <= 9 for r in rows)
        alive = {ray.get(actor.pid.remote(), timeout=120) for actor in pool.pool.idle}
        assert len(alive) == 1 and pid not in alive
    finally:
        pool.close()


# --- from the command line ---


@needs_rendering
def test_a_robot_in_another_process_is_the_robot(monkeypatch):
    """The same images, states and actions through Ray, distractor or not; and a run's flags get to it."""
    pytest.importorskip("ray", reason=INSTALL)
    flags = dict(env_id="widowx-sim-pot-v0", camera_size=40, max_steps=3, critic_image=16, eval_episodes=1)
    args, statistics = script.Args(**flags, eval_processes=False), files.TINY_STATISTICS["bridge_orig"]["action"]
    statistics = {name: np.array(value) for name, value in statistics.items()}
    here, envs, _ = robot.set_up_robot(args, statistics, 28)
    envs.close()
    args.robot_node = "arm"
    there, envs, _ = robot.set_up_robot(args, statistics, 28)
    envs.close()
    assert there.unwrapped.instruction == here.unwrapped.instruction
    episodes, run = [], types.SimpleNamespace(args=args, device=torch.device("cpu"), check_stop=lambda: None)
    args.sparse_reward = False
    act = lambda obs: torch.full((1, 7), 0.3)  # noqa: E731
    try:
        for env in (here, there):
            for options in (None, {"distractors": False}):
                episodes.append(robot.collect(env, act, 5, run, options)[0])
    finally:
        import ray

        ray.shutdown()
    for a, b in zip(episodes[:2], episodes[2:]):
        assert all(np.array_equal(a[name], b[name]) for name in a) and len(a["rewards"]) == 3
    assert not np.array_equal(episodes[0]["obs"], episodes[1]["obs"])  # the distractor is seen, or not


def test_the_papers_pot_has_distractors_online_only(monkeypatch, tmp_path):
    """Section 5.2: not in what is cloned, not before going online; the other tasks always, or as one says."""
    asked, run = [], types.SimpleNamespace(folder=tmp_path, device="cpu")
    monkeypatch.setattr(robot, "collect", lambda env, act, seed, run, options: (asked.append(options), False))
    monkeypatch.setattr(robot, "write_arrays", lambda *_, **__: None)
    monkeypatch.setattr(robot, "collect_demonstrations", lambda *_, **options: asked.append(options) or [])
    for task, when, online_only, always in (
        ("pot", "task", True, True), ("vegetable", "task", False, None), ("cup", "online", True, True),
        ("pot", "never", False, False), ("pot", "always", False, True),
    ):  # fmt: skip
        args = run.args = script.Args(env_id=f"widowx-sim-{task}-v0", distractors=when, num_zero_shot=3)
        assert robot.robot_options(args)["distractors"] is always
        with contextlib.suppress(ValueError):  # there are none to be joined
            robot.demonstrations(args, None, (28, 16), "cpu")
        assert asked.pop()["distractors"] is (False if online_only else always)
        for number in (2, 3):
            with contextlib.suppress(TypeError):
                robot.get_episode(None, None, number, "version", run)
            assert asked.pop() == ({"distractors": False} if online_only and number == 2 else None)


def start(flags):
    env = os.environ | {"OMP_NUM_THREADS": "1", "MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")}
    command = [sys.executable, str(ROOT / "parl_openvla_real.py"), *flags]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


REAL = (
    "--threads 1 --num-demonstrations 1 --num-cloning-steps 3 --num-zero-shot 2 --eval-episodes 1 --no-eval-processes "
    "--num-offline-steps 4 --num-online-episodes 2 --num-offline-evals 1 --num-online-evals 1 --log-every 1 "
    "--num-samples 3 --num-keep 2 --max-steps 30 --camera-size 112 --critic-image 24 --encoder-width 4 "
    "--encoder-blocks 1 --critic-hidden 8 --batch-size 8 --cloning-batch-size 4 --distill-batch-size 4 --lora-rank 2 "
    "--distill-ratio 0.1 --utd 0.2 --distill-episodes 1 --checkpoint-seconds 0"
).split()


@needs_rendering
def test_a_run_that_is_killed_in_every_phase_ends_with_the_same_numbers(tmp_path, capsys):
    """On the simulated robot, from demonstrations to online; SIGKILL in cloning, zero-shot, offline and online.

    Metrics, weights, moments and progress are those of the run that was let be.
    """
    script.main([*REAL, "--runs", str(tmp_path / "a")])
    output = capsys.readouterr().out
    (folder,) = (tmp_path / "a").iterdir()
    for text in ("zero-shot: success", "cloned policy", "after offline RL", "after online RL", str(folder)):
        assert text in output
    pictures = "summary.png", "filmstrip.png"
    for name in (*pictures, "config.json", "metrics.csv", "cloned/model.safetensors", "episodes/00003.npz"):
        assert (folder / name).stat().st_size > 0
    assert {row["phase"] for row in rows_of(folder)} == {"cloning", "offline", "online"}
    assert len([row for row in rows_of(folder) if row["zero_shot_success"]]) == 1
    again, killed = None, start([*REAL, "--runs", str(tmp_path / "b")])
    for sign in ("metrics.csv", "episodes/00000.npz", "cache/00000.npz", "episodes/00002.npz"):
        deadline = time.monotonic() + 120
        while not (found := list((tmp_path / "b").glob(f"*/{sign}"))) or found[0].stat().st_size < 150:
            assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()[0][-2000:]
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        (again,) = (tmp_path / "b").iterdir()
        assert torch.load(again / "checkpoint.pt", weights_only=True)["progress"]["phase"] != "done", "killed too late"
        if sign != "episodes/00002.npz":
            killed = start(["--resume", str(again)])
    script.main(["--resume", str(again)])
    assert rows_of(again) == rows_of(folder) and len(rows_of(folder)) > 8
    assert_same_checkpoint(again, folder)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)["modules"]
    assert saved["policy"] and all(".lora_" in name for name in saved["policy"])  # not seven billion weights
    assert any(value.abs().max() > 0 for name, value in saved["policy"].items() if ".lora_B." in name)


def test_serving_what_a_finished_run_has_learned(notes, monkeypatch, tmp_path):
    """`--resume FOLDER --serve PORT`: the run's base model and adapters, the likeliest action, in metres."""
    pytest.importorskip("json_numpy", reason=INSTALL)
    answered, folder = [], notes[1]["folder"]
    image = np.random.default_rng(0).integers(0, 256, (50, 60, 3)).astype(np.uint8)

    def instead(act, port, host):
        answered.append((port, host, act(image, "do something", "bridge_orig"), act(image, "do nothing", None)))
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.vla.server.start_server", instead)
    with pytest.raises(KeyboardInterrupt):
        script.main(["--resume", str(folder), "--serve", "8123", "--serve-host", "127.0.0.1"])
    args = script.Args(checkpoint=str(folder / "cloned"), lora_rank=2, threads=1)
    policy = script.make_policy(args, "do something")
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)["modules"]["policy"]
    parameters = dict(policy.model.named_parameters())
    policy.top_k, small = 1, torch.tensor(robot.resize(image, 28)).permute(2, 0, 1)[None]
    likeliest = []
    for adapted in (False, True):
        with torch.no_grad():
            for name, value in saved.items() if adapted else ():
                parameters[name].copy_(value)
        statistics = files.action_statistics(files.TINY_STATISTICS, "bridge_orig")
        likeliest.append(robot.unnormalize(policy.sample(small, 1)[0, 0].numpy(), statistics))
    ((port, host, action, _),) = answered
    assert (port, host) == (8123, "127.0.0.1")
    np.testing.assert_allclose(action, likeliest[1])
    assert not np.allclose(likeliest[0], likeliest[1]), "the adapters make no difference: nothing was tested"
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:5000])
    with pytest.raises(SystemExit, match="error: .*checkpoint.pt cannot be read") as stopped:
        script.main(["--resume", str(damaged), "--serve", "8123"])
    assert "\n" not in str(stopped.value)


def test_a_finished_run_is_evaluated_again_as_it_acted(monkeypatch, tmp_path, capsys):
    """By benchmarks/evaluate.py: the run's adapters and critic, the tasks' starts, nothing trained or changed."""
    stand_in(monkeypatch)
    acted, measured, seeds, finish, measure = [], [], [], robot.finish_run, rollouts.evaluate
    obs = np.random.default_rng(0).integers(0, 256, (5, 3 * (28**2 + 20**2) + 28)).astype(np.float32)
    obs[:, -28:] = 0  # proprio: numbers, of which some random bytes are none

    def noted(run, env, make_robot, act, policy, critic):
        acted.append(decision(act))
        finish(run, env, make_robot, act, policy, critic)

    def decision(act):
        torch.manual_seed(5)
        return act(torch.as_tensor(obs)).tolist()

    def measuring(envs, act, run):
        measured.append(decision(act))
        return measure(envs, act, run)

    monkeypatch.setattr(robot, "finish_run", noted)
    script.main([*FLAGS, "--num-cache-workers", "0", "--runs", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_cache_workers": 3, "ray": "nowhere:1"}))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(rollouts, "evaluate", measuring)
    reset = MadeUpRobot.reset
    monkeypatch.setattr(MadeUpRobot, "reset", lambda self, **kw: seeds.append(kw.get("seed")) or reset(self, **kw))
    how = ["--episodes", "3", "--threads", "1", "--eval-seed", "7"]
    with monkeypatch.context() as patch:  # envs in this process, whose resets are seen here
        patch.setattr(robot, "make_vector_env", lambda args, make: gym.vector.SyncVectorEnv([lambda: make("x")] * 3))
        evaluate.main([str(folder), *how])
        evaluate.main([str(folder), *how, "--policy", "cloned"])
    assert measured[0] == acted[0] and measured[1] != acted[0]
    assert [seed for seed in seeds if seed is not None] == 2 * [7, 8, 9]
    assert robot.finish_run is noted and script.Run.__name__ == "Run"  # all is as it was
    entries = json.loads((folder / "evaluation.json").read_text())
    assert [(e["policy"], e["episodes"]) for e in entries] == [("optimized", 3), ("cloned", 3)]
    (folder / "evaluation.json").unlink()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert "95 % interval" in capsys.readouterr().out
    for flags, match in {
        ("--task", "widowx-real"): "a real robot is not evaluated again",
        ("--task", "pointmaze-umaze-v0"): "a VLA needs a camera",
        ("--episodes", "0"): "--eval-episodes 0 must be at least 1",
    }.items():
        with pytest.raises(SystemExit, match=match):
            evaluate.main([str(folder), *how, *flags])
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(state | {"progress": state["progress"] | {"phase": "cloning"}}, folder / "checkpoint.pt")
    with pytest.raises(SystemExit, match="has not cloned its policy yet"):
        evaluate.main([str(folder), *how])


def test_on_the_real_robot_nothing_is_evaluated_beside_its_own_episodes(notes, monkeypatch, tmp_path):
    """All stages with a checkpoint's weights and no simulated robots to evaluate in; at the end the arm stays still."""
    resets, reset = [], MadeUpRobot.reset
    monkeypatch.setattr(MadeUpRobot, "reset", lambda self, **kw: resets.append(kw) or reset(self, **kw))
    stand_in(monkeypatch)
    arm = ["--env-id", "widowx-real", "--instruction", "go", "--checkpoint", str(notes[1]["folder"] / "cloned")]
    script.main([*FLAGS, "--runs", str(tmp_path), *arm])
    (folder,) = tmp_path.iterdir()
    assert len(resets) == ZERO_SHOT + EPISODES and (folder / "summary.png").is_file()
    assert not any(row["success_rate"] for row in rows_of(folder))


def test_two_checkpoints_that_differ_by_merged_adapters_are_two_versions(notes, tmp_path):
    cloned = str(notes[1]["folder"] / "cloned")
    policy, again = (script.make_policy(script.Args(checkpoint=cloned, lora_rank=2), "go") for _ in range(2))
    adapted = script.adapters(policy.model)
    with torch.no_grad():
        for value in adapted.values():
            value.normal_()
    files.write_checkpoint(tmp_path, policy.model, files.TINY_STATISTICS)
    merged = script.make_policy(script.Args(checkpoint=str(tmp_path), lora_rank=2), "go")
    with torch.no_grad():
        for each in (again, merged):  # the same adapters, so that the bases alone differ
            for name, value in script.adapters(each.model).items():
                value.copy_(adapted[name])
    assert again.version() == policy.version() != merged.version()


@pytest.mark.parametrize("missing", ["ray"])
def test_what_the_workers_need_is_asked_for_before_anything_long(missing, monkeypatch, tmp_path):
    stand_in(monkeypatch)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as stopped:
        script.main([*FLAGS, "--num-cache-workers", "1", "--runs", str(tmp_path)])
    assert "pip install ray" in str(stopped.value)
    assert not list(tmp_path.iterdir())


class Slow(workers.NoPool):
    """Workers that have nothing to tell, five hundred times, before they have the next episode."""

    elsewhere = True

    def candidates(self, *args):
        for answer in super().candidates(*args):
            yield answer
            yield from [(None, None)] * 500


def test_waiting_for_the_workers_takes_no_memory(monkeypatch, tmp_path):
    """With 7 billion parameters they take minutes; what the trainer may use meanwhile is told thousands of times."""
    stand_in(monkeypatch)
    alive, most, rows_with = weakref.WeakSet(), [0], script.EpisodeBuffer.rows_with

    def noting(buffer, version):
        alive.add(rows := Rows(rows_with(buffer, version)))
        most[0] = max(most[0], len(alive))
        return rows

    monkeypatch.setattr(script.EpisodeBuffer, "rows_with", noting)
    monkeypatch.setattr(script, "make_pool", lambda args, run, policy, make, draw: Slow(args, run, draw))
    script.main([*FLAGS, "--num-online-episodes", "1", "--runs", str(tmp_path)])
    assert most[0] < 10


def test_between_two_distillings_the_policy_stays_and_only_new_episodes_are_drawn(monkeypatch, tmp_path):
    """--distill-episodes 2: after the second and fourth of five episodes, as often as both their steps ask for."""
    stand_in(monkeypatch)
    distilled, drawn, draw, distill = [], [], script.draw_candidates, script.distill_lora

    def noting_distill(policy, optimizer, critic, buffer, num_updates, *rest):
        distilled.append((len(buffer.versions), num_updates))
        return distill(policy, optimizer, critic, buffer, num_updates, *rest)

    def noting_draw(policy, images, *rest):
        drawn.append(policy.version())
        return draw(policy, images, *rest)

    monkeypatch.setattr(script, "distill_lora", noting_distill)
    monkeypatch.setattr(script, "draw_candidates", noting_draw)
    script.main([*FLAGS, "--distill-episodes", "2", "--num-online-episodes", "5", "--runs", str(tmp_path)])
    steps = round(2 * LENGTH * RATIO)
    assert distilled == [(ZERO_SHOT + 2, steps), (ZERO_SHOT + 4, steps)]
    # Episodes of each version: the zero-shot ones and two; those five anew and two; all seven anew and the fifth
    expected = [ZERO_SHOT + 2, ZERO_SHOT + 2 + 2, ZERO_SHOT + 4 + 1]
    assert [drawn.count(version) for version in dict.fromkeys(drawn)] == expected


class Rows(torch.Tensor):
    """Rows by identity, so that a WeakSet can hold them."""

    def __new__(cls, rows):
        return torch.Tensor._make_subclass(cls, rows)

    def __eq__(self, other):
        return self is other

    __hash__ = object.__hash__


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--checkpoint /nowhere/at/all", "no such folder"),
        ("--unnorm-key berkeley", "it has bridge_orig"),
        ("--num-zero-shot 0", "at least 1"),
        ("--serve 8000", "--serve needs --resume"),
        ("--num-keep 9 --num-samples 8", "--num-keep"),
        ("--env-id widowx-real --checkpoint tiny", "--instruction"),
        ("--env-id widowx-real --checkpoint tiny --instruction go", "simulated"),
        ("--env-id pointmaze-medium-v0", "camera"),
        ("--cache-batch 0", "--cache-batch"),
        ("--encoder-width 6", "multiple of 4"),
        ("--encoder-blocks 1 0", "--encoder-blocks"),
        ("--serve 99999999", "port"),
        ("--ray 127.0.0.1:1", "--num-cache-workers"),
        ("--no-plain", "vectors"),
        ("--robot-node arm --env-id widowx-real --checkpoint x --instruction go", "no terminal"),
        ("--capture-video --env-id widowx-real --checkpoint x --instruction go", "film"),
        ("--compile yes", "--compile"),
        ("--dataset-path some.npz", "--dataset-path"),
        ("--hz -3", "--hz"),
        ("--distill-episodes 0", "--distill-episodes"),
        ("--distill-selection perhaps", "perhaps"),
    ],
)
def test_refusals_in_one_line(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped, contextlib.redirect_stderr(None):
        script.main([*flags.split(), "--runs", str(tmp_path)])
    message = str(stopped.value)
    if message not in ("1", "2"):  # tyro's own boxes
        assert words in message and "\n" not in message
    assert not list(tmp_path.iterdir())
