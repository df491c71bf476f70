"""--chunk: windows of the buffer against a walk row by row, acting without looking, targets by hand, whole runs."""

import dataclasses
import os
import signal
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_end_to_end import Fork, assert_same_checkpoint, finish, rows_of

import parl_diffusion_calql as calql
import parl_diffusion_iql as iql
import parl_diffusion_rlpd as rlpd
import parl_flow_calql as flow
import parl_transformer_calql as transformer
from benchmarks import climbing, cost, distilling, precision, speed
from benchmarks.harness import rollouts
from benchmarks.tasks.dataset import Dataset

OBS, ACT, GAMMA, BIAS = 3, 2, 0.9, -1.0
SCRIPTS = (calql, flow, iql, rlpd, transformer)
scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
CPU = torch.device("cpu")


def make_args(script=calql, **fields):
    known = script.Args.__dataclass_fields__
    small = dict(
        num_samples=2, num_keep=2, num_gradient_steps=0, discount=GAMMA, batch_size=8, ensemble_size=2, num_bins=8
    )
    return script.Args(**{name: value for name, value in (small | fields).items() if name in known})


# --- WINDOWS ---


def trajectories(rng, kinds, longest=9) -> Dataset:
    """Random ones one after another, each ended by a terminal, a time limit, both, or a break that no flag marks; or
    by a terminal over which the data go on, as AntMaze's and OGBench's do at a goal.
    """
    before, state = "break", None
    rows = {name: [] for name in ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")}
    for kind in kinds:
        length = rng.integers(1, longest + 1)
        path, last = rng.normal(size=(length + 1, OBS)), np.arange(length) == length - 1
        path[0] = state if before == "goes on" else path[0]
        before, state = kind, path[-1]
        rows["observations"].append(path[:-1])
        rows["next_observations"].append(path[1:])
        rows["actions"].append(rng.uniform(-1, 1, (length, ACT)))
        rows["rewards"].append(rng.integers(0, 2, length))
        rows["terminals"].append(last & (kind in ("terminal", "both", "goes on")))
        rows["timeouts"].append(last & (kind in ("timeout", "both")))
    arrays = {name: np.concatenate(parts) for name, parts in rows.items()}
    flags = {name: arrays.pop(name) for name in ("terminals", "timeouts")}
    return Dataset(**{name: array.astype(np.float32) for name, array in arrays.items()}, **flags)


def walk(data, row, chunk):
    """From a row on, step by step: the chunk's actions, reward, mask and last state; None if it is cut."""
    actions, total, first = [], 0.0, row

    def ends_at(row):
        jump = row + 1 == len(data) or not np.array_equal(data.next_observations[row], data.observations[row + 1])
        return data.timeouts[row] or jump

    for i in range(chunk):
        row = first + i
        actions.append(data.actions[row])
        total += GAMMA**i * (float(data.rewards[row]) + BIAS)
        if data.terminals[row]:
            next_obs = data.next_observations[row]
            while len(actions) < chunk:  # the data's own as long as they go on, then the last one
                row += not ends_at(row)
                actions.append(data.actions[row])
            return np.concatenate(actions), total, 0.0, next_obs
        if i + 1 < chunk and ends_at(row):
            return None
    return np.concatenate(actions), total, 1.0, data.next_observations[row]


KINDS = ("terminal", "timeout", "both", "break", "goes on", "goes on")


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("seed", range(4))
def test_windows_are_those_of_a_walk_row_by_row(seed, chunk):
    """Offline rows and those of three online episodes, one of which may be too short to hold any."""
    rng = np.random.default_rng(seed)
    dataset = trajectories(rng, rng.choice(KINDS, 12))
    episodes = [
        trajectories(rng, [kind], longest) for kind, longest in (("terminal", 9), ("timeout", 9), ("timeout", 2))
    ]
    args = make_args(chunk=chunk)
    buffer, single = (calql.ReplayBuffer(dataset, dataclasses.replace(args, chunk=h), CPU) for h in (chunk, 1))
    for episode in episodes:
        buffer.add(episode)
        single.add(episode)
    assert len(buffer) == len(single) and torch.equal(buffer.states, single.states)
    first, starts, num_offline = 0, set(buffer.starts.tolist()), 0
    for data in (dataset, *episodes):
        for row in range(len(data)):
            there, window = first + row, walk(data, row, chunk)
            state = buffer.obs_index[there]
            assert np.array_equal(buffer.states[state], data.observations[row])
            assert (there in starts) == (window is not None)
            num_offline += window is not None and data is dataset
            given = buffer.data_actions(state[None])[0]
            if window is None:
                assert given.isnan().all()
                continue
            actions, reward, mask, next_obs = window
            assert np.array_equal(given, actions)
            assert buffer.rewards[there] == pytest.approx(reward, abs=1e-5) and buffer.masks[there] == mask
            assert np.array_equal(buffer.states[buffer.next_index[there]], next_obs)
        first += len(data)
    assert buffer.num_offline == num_offline and torch.equal(buffer.starts, buffer.starts.unique())  # in order, once
    assert torch.equal(buffer.mc_returns, single.mc_returns)  # of single steps, from the window's first one on
    last = torch.ones(len(buffer.states), dtype=bool)
    last[buffer.obs_index] = False
    assert buffer.data_actions(last.nonzero()[:, 0]).isnan().all()  # the last state of a trajectory has no action
    assert buffer.candidates.shape == (
        len(buffer.states),
        2,
        chunk * ACT,
    )  # one cache for each state, as without chunks
    if chunk > 1:
        assert len(starts) < len(buffer)


def test_chunks_hold_no_copy_of_the_data():
    """What grows with h is the cache of candidates alone."""
    data = trajectories(np.random.default_rng(0), ["terminal"] * 5)
    sizes = []
    for chunk in (1, 4):
        tensors = {
            k: v for k, v in vars(calql.ReplayBuffer(data, make_args(chunk=chunk), CPU)).items() if torch.is_tensor(v)
        }
        sizes.append({name: tensor.numel() for name, tensor in tensors.items() if name != "candidates"})
    assert sizes[0] == sizes[1]  # every row of these begins a window


def test_batches_are_of_windows_and_distilling_looks_at_all_rows():
    rng = np.random.default_rng(1)
    buffer = calql.ReplayBuffer(trajectories(rng, ["timeout", "break"] * 3), make_args(chunk=3), CPU)
    starts, rows = set(buffer.starts.tolist()), len(buffer)
    assert set(buffer.sample_index((50, 40)).flatten().tolist()) == starts < set(range(rows))
    assert set(buffer.sample_index((50, 40), mixed=False).flatten().tolist()) == set(range(rows))
    buffer.add(trajectories(rng, ["timeout"], longest=1))  # no window in it: batches stay offline
    assert set(buffer.sample_index((50, 40)).flatten().tolist()) == starts
    while len(buffer.starts) == buffer.num_offline:
        rows = len(buffer)
        buffer.add(trajectories(rng, ["timeout"]))
    index = buffer.sample_index((50, 40))
    online = set(buffer.starts[buffer.num_offline :].tolist())
    assert set(index[:, :20].flatten().tolist()) == starts and set(index[:, 20:].flatten().tolist()) == online
    assert min(online) == rows and set(buffer.sample_index((90, 40), False).flatten().tolist()) == set(
        range(len(buffer))
    )


# --- ACTING ---


class Clock(gym.Env):
    """Observes (its seed, the step); its episode is as long as its seed says; notes the actions it is given."""

    observation_space, action_space = gym.spaces.Box(-1e3, 1e3, (2,)), gym.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        self.length, self.time, self.taken = seed % 100 if seed is not None else 1, 0, []
        return np.array([self.length, 0], np.float32), {}

    def step(self, action):
        self.taken.append(np.array(action))
        self.time += 1
        obs, ended = np.array([self.length, self.time], np.float32), self.time == self.length
        return obs, 0.0, ended, False, {"success": ended and self.length % 2 == 0}


class Policy:
    """Says in each action of a chunk for which step it is meant, and when that was decided; notes what it was asked."""

    def __init__(self, chunk):
        self.chunk, self.asked = chunk, []

    def __call__(self, obs):
        self.asked.append(obs.tolist())
        steps = obs[:, 1:] + torch.arange(self.chunk)  # (B, h)
        return torch.stack([steps, obs[:, 1:].expand_as(steps)], -1).flatten(1) / 100


def expected_actions(length, chunk):
    return np.array([[t, t - t % chunk] for t in range(length)], np.float32) / 100


def stub_run(**fields):
    args = calql.Args(**dict(reward_bias=-1.0, reward_min=-1.0) | fields)
    return types.SimpleNamespace(args=args, device=CPU, check_stop=lambda: None)


@pytest.mark.parametrize("chunk", [1, 3, 4])
@pytest.mark.parametrize("length", [1, 4, 7, 9])
def test_an_episode_takes_each_chunk_without_looking(length, chunk):
    policy, env = Policy(chunk), rollouts.rescaled(Clock())
    episode, success = rollouts.collect_episode(env, policy, length, stub_run())
    assert policy.asked == [[[length, t]] for t in range(0, length, chunk)]
    assert len(episode) == length and success == (length % 2 == 0)  # in environment steps
    np.testing.assert_allclose(episode.actions, expected_actions(length, chunk), atol=1e-7)
    np.testing.assert_allclose(env.unwrapped.taken, expected_actions(length, chunk), atol=1e-7)
    assert episode.terminals.tolist() == [False] * (length - 1) + [True]


@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_an_evaluation_takes_each_chunk_without_looking_and_counts_steps(chunk):
    """Episodes of 1 to 5 and 6 steps, three environments at a time, each asked only at the beginning of its chunks."""
    policy, envs = Policy(chunk), gym.vector.SyncVectorEnv([lambda: rollouts.rescaled(Clock())] * 3)
    taken, step = [], envs.step
    envs.step = lambda actions: taken.append(actions.copy()) or step(actions)
    result = rollouts.evaluate(envs, policy, stub_run(eval_episodes=6, eval_seed=1))
    asked = [[seed, t] for group in ((1, 2, 3), (4, 5, 6)) for t in range(0, 6, chunk) for seed in group if t < seed]
    assert [row for obs in policy.asked for row in obs] == asked
    assert result["length"] == 3.5 and result["return"] == -3.5 and result["success_rate"] == 0.5
    assert [len(path) for path in result["trajectories"]] == [2, 3, 4, 5, 6, 7]
    for group, began in (((1, 2, 3), 0), ((4, 5, 6), 3)):
        for i, seed in enumerate(group):
            actions = np.array(taken)[began : began + seed, i]
            np.testing.assert_allclose(actions, expected_actions(seed, chunk), atol=1e-7)


# --- THE CRITIC'S UPDATE ---


def one_trajectory(terminal):
    """Seven steps with rewards of their own, and then a terminal or a time limit."""
    path, last = np.random.default_rng(0).normal(size=(8, OBS)).astype(np.float32), np.arange(7) == 6
    actions = np.linspace(-1, 1, 7 * ACT, dtype=np.float32).reshape(7, ACT)
    rewards = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0], np.float32)
    return Dataset(path[:-1], actions, rewards, path[1:], last & terminal, last & (not terminal))


@scripts
@pytest.mark.parametrize(
    ("row", "terminal", "reward", "mask", "rows"),
    [
        (1, True, -0.9 - 0.9 * 0.8 - 0.81 * 0.7, 1, [1, 2, 3]), (4, True, -0.6 - 0.9 * 0.5, 0, [4, 5, 6]),
        (5, True, -0.5, 0, [5, 6, 6]), (6, True, 0.0, 0, [6, 6, 6]), (4, False, -0.6 - 0.9 * 0.5, 1, [4, 5, 6]),
    ],
)  # fmt: skip
def test_the_target_of_a_critic_update_by_hand(script, row, terminal, reward, mask, rows, monkeypatch):
    """sum of gamma^i r_i + gamma^3 mask V(three steps on), where V is -5; the loss is of the chunk that was taken."""
    args, data = make_args(script, chunk=3, sparse_reward=False), one_trajectory(terminal)
    buffer, seen = script.ReplayBuffer(data, args, CPU), {}
    loss_name = {iql: "iql_loss", rlpd: "rlpd_loss"}.get(script, "calql_loss")
    loss = getattr(script, loss_name)
    critic = script.Critic(OBS, 3 * ACT, (8, 8), 2, 8, -10.0)

    def always(obs, actions, members=None):
        seen["values_at"] = obs
        return torch.full((2, *actions.shape[:2]), -5.0)

    def watch(*args, **kwargs):
        seen["loss"] = args
        return loss(*args, **kwargs)

    monkeypatch.setattr(script, loss_name, watch)
    monkeypatch.setattr(script, "gradient_step", lambda *_: None)
    value = []
    if script is iql:
        value = [script.Critic(OBS, 0, (8, 8), 1, 1)]
        monkeypatch.setattr(script, "value_of", lambda value, obs: seen.update(values_at=obs) or torch.full((1,), -5.0))
    info = script.critic_update(critic, always, *value, None, buffer, torch.tensor([row]), args)
    assert info["target_q"].item() == pytest.approx(reward - 5 * 0.9**3 * mask, abs=1e-5)
    if mask:
        assert script is iql or np.array_equal(seen["values_at"][0], data.next_observations[row + 2])
    actions = seen["loss"][{iql: 4}.get(script, 2)]
    assert np.array_equal(actions[0], data.actions[rows].flatten())
    if loss_name == "calql_loss":  # the bound is the return from the chunk's first step on, in environment steps
        rest = sum(0.9**i * (r - 1) for i, r in enumerate(data.rewards[row:]))
        assert seen["loss"][4].item() == pytest.approx(rest, abs=1e-5)  # its last reward is 0: nothing after a cut
    if script is iql:
        assert seen["loss"][8] == 0.9**3 and np.array_equal(seen["loss"][7][0], buffer.states[buffer.next_index[row]])


# --- WHOLE RUNS ---


TOY = (
    "--env-id pointmaze-umaze-v0 --dataset-size 600 --threads 1 --eval-episodes 3 --log-every 10 --chunk 3 "
    "--checkpoint-seconds 0 --num-cloning-steps 20 --num-online-episodes 3 --num-online-evals 1 --no-eval-processes "
    "--cloning-batch-size 32 --critic-hidden 16 16 --batch-size 16 --num-bins 16 --num-samples 4 --num-keep 2 "
    "--num-gradient-steps 2 --distill-ratio 0.3 --utd 0.3"
).split()
DIFFUSION, OFFLINE = (
    "--policy-hidden 16 --policy-blocks 1".split(),
    "--num-offline-steps 20 --num-offline-evals 1".split(),
)
FLAGS = {
    calql: DIFFUSION + OFFLINE,
    flow: DIFFUSION + OFFLINE,
    iql: [*DIFFUSION, *OFFLINE, "--distill-every", "10"],
    rlpd: [*DIFFUSION, "--num-warmup-episodes", "2"],
    transformer: "--policy-width 16 --policy-layers 1 --policy-heads 2 --policy-bins 32".split() + OFFLINE,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a toy run of a script with chunks of three, each run once."""
    done = {}

    def once(script):
        if script not in done:
            runs = tmp_path_factory.mktemp("runs")
            script.main([*TOY, *FLAGS[script], "--runs", str(runs)])
            (done[script],) = runs.iterdir()
        return done[script]

    return once


@scripts
def test_a_whole_run_counts_environment_steps(script, finished):
    folder = finished(script)
    state, rows = torch.load(folder / "checkpoint.pt", weights_only=True), rows_of(folder)
    assert state["progress"]["phase"] == "done" and {row["phase"] for row in rows} >= {"cloning", "online"}
    lengths = [len(episode["rewards"]) for episode in state["episodes"]]
    assert [float(row["episode_length"]) for row in rows if row["episode_length"]] == lengths
    assert state["progress"]["env_steps"] == sum(lengths) and not all(length % 3 == 0 for length in lengths)
    assert all(episode["actions"].shape == (len(episode["rewards"]), 2) for episode in state["episodes"])
    assert state["modules"]["critic"]["weights.0"].shape[1] == 4 + 3 * 2
    if script is transformer:
        assert state["modules"]["policy"]["position"].shape[0] == 3 * 2
    else:
        assert state["modules"]["policy"]["last.weight"].shape[0] == 3 * 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_stopped_within_a_chunk_ends_with_the_same_numbers(number, finished, tmp_path, monkeypatch):
    """In the second episode, after the first action of its second chunk."""
    if torch.cuda.is_available() or not hasattr(os, "fork"):
        pytest.skip("the episode is stopped in a fork of this process")
    collect, reached = calql.collect_episode, tmp_path / "reached"

    class Stops(gym.Wrapper):
        steps = 0

        def step(self, action):
            self.steps += 1
            if self.steps == 4:
                reached.touch()
                os.kill(os.getpid(), number)
            return self.env.step(action)

    def collect_and_stop(env, act, seed, run):
        stop = run.progress["phase"] == "online" and run.progress["step"] == 1
        return collect(Stops(env) if stop else env, act, seed, run)

    monkeypatch.setattr(calql, "collect_episode", collect_and_stop)
    code, output = finish(Fork(calql, *TOY, *FLAGS[calql], "--runs", str(tmp_path / "runs")))
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 128 + number), output
    assert reached.is_file()
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(torch.load(folder / "checkpoint.pt", weights_only=True)["episodes"]) == 1  # nothing of the second one
    monkeypatch.setattr(calql, "collect_episode", collect)
    code, output = finish(Fork(calql, "--resume", str(folder)))
    assert code == 0, output
    assert rows_of(folder) == rows_of(finished(calql))
    assert_same_checkpoint(folder, finished(calql))


def error_of(script, *flags):
    with pytest.raises(SystemExit) as stopped:
        script.main(list(flags))
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


@scripts
@pytest.mark.parametrize("chunk", ["0", "-2", "100000"])
def test_a_chunk_that_cannot_be(script, chunk, tmp_path):
    assert f"--chunk {chunk} must be at least 1" in error_of(script, *TOY, "--chunk", chunk, "--runs", str(tmp_path))
    assert not list(tmp_path.iterdir())


@scripts
def test_a_chunk_longer_than_every_trajectory(script, tmp_path, monkeypatch):
    longest = 7
    data = dataclasses.replace(one_trajectory(terminal=False), source="made up")
    monkeypatch.setattr(script, "make_env", lambda *_, **__: Still())
    monkeypatch.setattr(script, "load_dataset", lambda *_, **__: data)
    message = error_of(script, *TOY, *FLAGS[script], "--chunk", str(longest + 1), "--runs", str(tmp_path))
    assert f"--chunk {longest + 1} is longer than every trajectory" in message and f"longest has {longest}" in message
    assert not list(tmp_path.iterdir())
    script.main([*TOY, *FLAGS[script], "--chunk", str(longest), "--runs", str(tmp_path), "--num-cloning-steps", "2"])


class Still(gym.Env):
    """Four steps in which nothing happens: online episodes are shorter than the chunk."""

    observation_space, action_space = gym.spaces.Box(-9, 9, (OBS,)), gym.spaces.Box(-1, 1, (ACT,))

    def reset(self, *, seed=None, options=None):
        self.time = 0
        return np.zeros(OBS, np.float32), {}

    def step(self, action):
        self.time += 1
        return np.zeros(OBS, np.float32), 0.0, False, self.time == 4, {"success": False}


def test_a_resumed_run_keeps_its_chunk(finished):
    assert "was started with --chunk 3" in error_of(calql, "--resume", str(finished(calql)), "--chunk", "2")


# --- WHAT LOOKS AT RUNS ---


def test_the_studies_go_on_working(finished, monkeypatch):
    """Distilling from a run with chunks, of an episode that is cut; climbing and precision on its networks."""
    collect = distilling.collect_episode

    def cut(*args):
        episode, success = collect(*args)
        return dataclasses.replace(episode, terminals=np.zeros(len(episode), bool)), success

    monkeypatch.setattr(distilling, "collect_episode", cut)
    options = distilling.Options(run=str(finished(calql)), online=1, every=1, episodes=2, ways=("both",))
    rows = distilling.fine_tune(options)
    assert len(rows) == 2 and np.isfinite(rows[1]["q_taken"]) and np.isfinite(rows[1]["followed"])
    assert len(climbing.measure(str(finished(calql)), 20)) == 10
    rows = precision.measure(str(finished(calql)), 20, "the run's")
    assert len(rows) == 3 and all(np.isfinite(row["policy_loss"]) for row in rows)


@scripts
def test_speed_and_cost_know_of_chunks(script):
    args = dataclasses.replace(script.Args(**script.PRESETS["pointmaze"]), chunk=3)
    net = speed.build(script, args, 4, 2, CPU)
    assert net.policy.action_dim == 6
    speed.clone_step(script, net, args, 8)
    speed.critic_step(script, net, args, net.buffer.sample_index((1, 8))[0])
    one, three = (
        cost.phase_flops(dataclasses.replace(args, chunk=h, utd=0, distill_ratio=0), 4, 6, 100, 10) for h in (1, 3)
    )
    acting = cost.acting_flops(args, 4, 6, 1, min(args.num_keep, cost.USUALLY_CLIMB))
    assert one["online"] - three["online"] == pytest.approx((10 - 4) * acting * args.num_online_episodes)
