"""The Gaussian baselines: densities and losses against closed forms, loops by counting, runs stopped and resumed."""

import importlib
import json
import math
import pathlib
import signal
import subprocess
import sys
import time
import typing

import numpy as np
import pytest
import torch
from test_budget import faults
from test_end_to_end import assert_same_checkpoint, rows_of
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from benchmarks.baselines import calql_gaussian, idql, parl_gaussian_calql, rlpd_gaussian
from benchmarks.baselines.calql_gaussian import TanhGaussianPolicy, calql_gaussian_loss
from benchmarks.harness.runs import Run

ROOT = pathlib.Path(__file__).parent.parent
BASELINES = [idql, calql_gaussian, rlpd_gaussian, parl_gaussian_calql]
TOY = (
    "--env-id pointmaze-umaze-v0 --dataset-size 600 --threads 1 --eval-episodes 2 --log-every 5 "
    "--checkpoint-seconds 0 --num-online-episodes 3 --num-online-evals 1 --critic-hidden 16 16 --batch-size 16 "
    "--num-bins 16 --ensemble-size 3 --num-samples 4 --utd 0.3"
).split()
OFFLINE = "--num-offline-steps 12 --num-offline-evals 1 --num-cloning-steps 6 --cloning-batch-size 32".split()
FLAGS = {
    idql: [*OFFLINE, *"--policy-hidden 16 --policy-blocks 1 --cloning-ratio 0.2".split()],
    calql_gaussian: [*OFFLINE, *"--policy-hidden 16 16 --cql-actions 2".split()],
    rlpd_gaussian: "--policy-hidden 16 16 --num-warmup-episodes 2 --policy-ratio 0.1".split(),
    parl_gaussian_calql: [*OFFLINE, *"--policy-hidden 16 16 --num-keep 2 --num-gradient-steps 1".split()],
}
baselines = pytest.mark.parametrize("script", BASELINES, ids=lambda script: script.__name__.split(".")[-1])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def some_policy(obs_dim=3, action_dim=2, hidden=(16, 16)):
    """A policy whose mean and deviation depend on the observation."""
    policy = TanhGaussianPolicy(obs_dim, action_dim, hidden)
    torch.nn.init.normal_(policy.last.weight, std=0.3)
    torch.nn.init.normal_(policy.last.bias[:action_dim], std=0.3)
    torch.nn.init.constant_(policy.last.bias[action_dim:], -1.0)  # narrow enough for nothing to lie beyond 0.999
    return policy


# --- the policy ---
def test_log_probabilities_are_torchs():
    policy, obs = some_policy(), torch.randn(5, 3)
    actions, log_probs = policy.draw(obs, 4)
    mean, std = policy.normal(obs)
    squashed = TransformedDistribution(Normal(mean[:, None], std[:, None]), TanhTransform(cache_size=1))
    torch.testing.assert_close(log_probs, squashed.log_prob(actions).sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(policy.log_prob(obs, actions[:, 0]), log_probs[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(policy.loss(obs, actions[:, 0]), -log_probs[:, 0].mean(), rtol=1e-4, atol=1e-4)


def test_the_density_integrates_to_one():
    policy, obs, a = some_policy(action_dim=1), torch.randn(3, 3), torch.linspace(-0.999, 0.999, 2_001)
    density = policy.log_prob(obs.repeat_interleave(len(a), 0), a.repeat(3)[:, None]).exp().view(3, -1)
    torch.testing.assert_close(torch.trapezoid(density, a), torch.ones(3), rtol=0, atol=0.01)


def test_actions_at_the_bounds_have_finite_loss_and_gradient():
    policy, obs = some_policy(), torch.randn(4, 3)
    loss = policy.loss(obs, torch.tensor([[1.0, -1.0]]).expand(4, 2))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in policy.parameters())


def test_log_density_far_out_is_finite():
    u = torch.tensor([[30.0, -30.0]])
    value = calql_gaussian.log_density(u, u, torch.ones_like(u))
    # log(1 - tanh(u)^2) goes to log 4 - 2 |u|
    torch.testing.assert_close(value, torch.tensor([-math.log(2 * math.pi) + 2 * (60 - math.log(4))]))


def test_samples_repeat_with_their_noise_and_are_the_draws():
    policy, obs = some_policy(), torch.randn(5, 3)
    noise = policy.draw_noise(obs, 4)
    assert noise.shape == policy.sample(obs, 4).shape == (5, 4, 2)
    assert torch.equal(policy.sample(obs, 4, noise), policy.draw(obs, 4, noise)[0])
    torch.testing.assert_close(policy.mode(obs), policy.sample(obs, 1, torch.zeros(5, 1, 2))[:, 0])


def test_cloning_finds_a_gaussian():
    """Data a = tanh(u), u normal with mean 0.5 s and deviation 0.3."""
    policy = TanhGaussianPolicy(1, 1, (16,))
    optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
    for _ in range(600):
        obs = torch.rand(256, 1) * 2 - 1
        loss = policy.loss(obs, torch.tanh(0.5 * obs + 0.3 * torch.randn(256, 1)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    obs = torch.tensor([[-0.8], [0.0], [0.8]])
    mean, std = policy.normal(obs)
    torch.testing.assert_close(mean, 0.5 * obs, rtol=0, atol=0.06)
    torch.testing.assert_close(std, torch.full((3, 1), 0.3), rtol=0, atol=0.05)


# --- SAC ---
class Quadratic(torch.nn.Module):
    """Q = -scale |a - best|^2, of two members that differ by a constant."""

    def __init__(self, best, scale):
        super().__init__()
        self.best, self.scale = torch.nn.Parameter(torch.tensor(best)), scale

    def forward(self, obs, actions, members=None):
        q = -self.scale * (actions - self.best).square().sum(-1)
        return torch.stack([q, q - 1])


def test_the_actor_climbs_a_quadratic_to_its_top():
    policy, critic = TanhGaussianPolicy(1, 2, (16,)), Quadratic([0.4, -0.6], 5.0)
    log_temperature = torch.nn.Parameter(torch.tensor(-5.0))
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    for _ in range(500):
        calql_gaussian.actor_update(policy, log_temperature, critic, optimizer, torch.rand(64, 1), -2.0)
    torch.testing.assert_close(policy.mode(torch.rand(3, 1)), critic.best.detach().expand(3, 2), rtol=0, atol=0.03)
    assert critic.best.grad is None and critic.best.requires_grad


def test_actor_and_temperature_losses_by_hand():
    critic, log_temperature = Quadratic([0.0, 0.0], 1.0), torch.tensor(math.log(0.5), requires_grad=True)
    actions, log_probs = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([-1.0, 3.0])
    # Q of the mean member: -1.5, -4.5; alpha log pi: -0.5, 1.5
    assert calql_gaussian.actor_loss(critic, None, actions, log_probs, 0.5).item() == pytest.approx((1.0 + 6.0) / 2)
    loss = calql_gaussian.temperature_loss(log_temperature, log_probs, -2.0)
    assert loss.item() == pytest.approx(-0.5 * (1.0 - 2.0))
    loss.backward()  # entropy -1 is above the target -2: alpha must fall
    assert log_temperature.grad > 0


def test_the_temperature_keeps_the_target_entropy():
    """With Q = -50 a^2 the best policy of temperature alpha is a normal with variance alpha / 100.

    Its entropy is asked to be -1, so that the variance is exp(-3) / (2 pi) and alpha 0.79.
    """
    policy, critic = TanhGaussianPolicy(1, 1, (16,)), Quadratic([0.0], 50.0)
    log_temperature = torch.nn.Parameter(torch.tensor(0.0))
    optimizer = torch.optim.Adam([*policy.parameters(), log_temperature], 1e-2)
    settings = policy, log_temperature, critic, optimizer
    infos = [calql_gaussian.actor_update(*settings, torch.rand(256, 1), -1.0) for _ in range(500)][-100:]
    assert np.mean([info["entropy"].item() for info in infos]) == pytest.approx(-1.0, abs=0.05)
    alpha = 100 * math.exp(-3) / (2 * math.pi)
    assert np.mean([info["temperature"].item() for info in infos]) == pytest.approx(alpha, rel=0.15)


# --- Cal-QL ---
class Table(torch.nn.Module):
    """A critic of two members whose Q is the action's first number, twice that for the second; no TD loss."""

    def forward(self, obs, actions, members=None):
        q = torch.stack([actions[..., 0], 2 * actions[..., 0]])
        return q if members is None else q[members]

    def td_loss(self, obs, actions, target_q, release_width):
        q = self.forward(obs, actions[:, None])[..., 0]
        return q, (q - target_q).square().mean()


def calql(importance, mc_return, members=None, log_probs=((0.3, -0.2),)):
    """The penalty where Q is -3 of the data's action, -1 and -2 of the policy's, -4 of a random one; doubled."""
    obs, action, policy_actions = torch.zeros(1, 1), torch.tensor([[-3.0]]), torch.tensor([[[-1.0], [-2.0]]])
    batch = obs, action, torch.tensor([-3.0]), torch.tensor([mc_return]), policy_actions, torch.tensor(log_probs)
    loss, info = calql_gaussian_loss(Table(), *batch, torch.tensor([[[-4.0]]]), 0.5, members, importance)
    assert loss.item() == pytest.approx(info["td_loss"].item() + 0.5 * info["cql_loss"].item())
    return info


def test_calql_with_densities_by_hand():
    info = calql(True, -1.5, members=torch.tensor([0]))
    entries = [-4 + math.log(2), -1 - 0.3, -1.5 + 0.2]  # the bound holds up -2; the uniform density is 1/2
    assert info["cql_loss"].item() == pytest.approx(math.log(sum(map(math.exp, entries)) / 3) + 3, rel=1e-5)
    assert info["bound_rate"].item() == 0.5
    assert info["td_loss"].item() == pytest.approx((0 + 9) / 2)


def test_calql_without_densities_has_the_datas_action_too():
    info = calql(False, -10.0, members=torch.tensor([0]))
    entries = [-4.0, -1.0, -2.0, -3.0]
    assert info["cql_loss"].item() == pytest.approx(math.log(sum(map(math.exp, entries)) / 4) + 3, rel=1e-5)
    assert info["bound_rate"].item() == 0


def test_the_penalty_is_the_mean_over_the_members_named():
    both = calql(True, -10.0)["cql_loss"]
    each = [calql(True, -10.0, members=torch.tensor([i]))["cql_loss"] for i in range(2)]
    torch.testing.assert_close(both, sum(each) / 2)


def test_below_the_bound_nothing_is_pushed():
    """Cal-QL's point: actions of the policy that are worth less than the data's return have no gradient."""
    policy_actions = torch.tensor([[[-1.0], [-2.0]]], requires_grad=True)
    batch = torch.zeros(1, 1), torch.tensor([[-3.0]]), torch.tensor([-3.0]), torch.tensor([-1.5]), policy_actions
    loss, _ = calql_gaussian_loss(Table(), *batch, torch.zeros(1, 2), torch.tensor([[[-4.0]]]), 1.0, torch.tensor([0]))
    loss.backward()
    assert policy_actions.grad[0, 0] > 0 and policy_actions.grad[0, 1] == 0


def test_the_logsumexp_estimates_the_integral():
    """Q = 0 everywhere: the integral of exp(Q) over [-1, 1]^2 is 4, by densities of any policy."""
    policy, n = some_policy(), 20_000
    actions, log_probs = policy.draw(torch.zeros(1, 3), n)
    critic = calql_gaussian.Critic(3, 2, (8,), 2, 1)
    with torch.no_grad():
        critic.head_weight.zero_()
        batch = torch.zeros(1, 3), torch.zeros(1, 2), torch.zeros(1), torch.full((1,), -1.0), actions, log_probs
        _, info = calql_gaussian_loss(critic, *batch, torch.rand(1, n, 2) * 2 - 1, 1.0)
    assert info["cql_loss"].item() == pytest.approx(math.log(4), abs=0.1)


@pytest.mark.parametrize("max_backup", [False, True])
def test_calqls_update_draws_at_s_and_s_and_backs_up_one_or_the_best(max_backup, monkeypatch):
    """States 0, 1, 2, of which a policy draws 0.1 and 0.2 more than the state's number; Q is twice the action."""
    seen = {}

    class Policy:
        def draw(self, obs, n):
            return obs[:, None] + torch.tensor([[[0.1], [0.2]]]), (10 * obs).expand(-1, n)

    class Buffer:
        obs_index, next_index = torch.tensor([0, 1]), torch.tensor([1, 2])
        states, rewards, masks = torch.arange(3.0)[:, None], torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 0.0])
        mc_returns = torch.tensor([-7.0, -8.0])

        def data_actions(self, states):
            return 100.0 + states[:, None]

    def critic(obs, actions, members=None):
        return torch.stack([2 * actions[..., 0]])

    def note(critic, obs, actions, target_q, mc_returns, policy_actions, log_probs, random_actions, *settings):
        seen.update(locals())
        return torch.zeros(()), {}

    monkeypatch.setattr(calql_gaussian, "calql_gaussian_loss", note)
    monkeypatch.setattr(calql_gaussian, "gradient_step", lambda *_: None)
    args = calql_gaussian.Args(
        ensemble_size=1, target_subset=1, discount=0.5, cql_actions=2, max_backup=max_backup, importance=False
    )
    index = torch.tensor([0, 1])
    calql_gaussian.critic_update(critic, critic, Policy(), None, Buffer(), index, args)
    next_action = 1.2 if max_backup else 1.1
    torch.testing.assert_close(seen["target_q"], torch.tensor([-1 + 0.5 * 2 * next_action, -1.0]))
    at_s_then_next = torch.tensor([[0.1, 0.2, 1.1, 1.2], [1.1, 1.2, 2.1, 2.2]])
    torch.testing.assert_close(seen["policy_actions"][..., 0], at_s_then_next)
    assert seen["log_probs"].tolist() == [[0, 0, 10, 10], [10, 10, 20, 20]]
    assert seen["actions"].tolist() == [[100], [101]] and seen["mc_returns"].tolist() == [-7, -8]
    random_actions = seen["random_actions"]
    assert (
        random_actions.shape == (2, 2, 1) and random_actions.abs().max() <= 1 and random_actions.unique().numel() == 4
    )
    assert seen["settings"][0] == 0.005 and seen["settings"][2:] == (False, False)


# --- RLPD ---
@pytest.mark.parametrize("entropy_backup", [False, True])
def test_rlpds_target(entropy_backup, monkeypatch):
    """r + gamma mask min Q(s', a'), less gamma mask alpha log pi with the entropy in it."""
    seen, args = {}, rlpd_gaussian.Args(ensemble_size=2, target_subset=2, entropy_backup=entropy_backup, discount=0.9)

    def note(critic, obs, actions, target_q, release_width):
        seen["target_q"] = target_q
        return sum(p.sum() for p in critic.parameters()) * 0, {}

    class Policy:
        def draw(self, obs, n):
            return torch.full((len(obs), n, 1), 0.5), torch.full((len(obs), n), -2.0)

    class Buffer:
        obs_index, next_index = torch.tensor([0, 1]), torch.tensor([1, 2])
        states, rewards, masks = torch.zeros(3, 1), torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 0.0])

        def data_actions(self, states):
            return torch.zeros(len(states), 1)

    monkeypatch.setattr(rlpd_gaussian, "rlpd_loss", note)
    critic, target = torch.nn.Linear(1, 1), Quadratic([0.0], 4.0)  # target Q of 0.5: -1 and -2
    target.weight = torch.nn.Parameter(torch.zeros(1, 1))
    optimizer = torch.optim.SGD(critic.parameters(), 0.0)
    monkeypatch.setattr(rlpd_gaussian, "gradient_step", lambda *_: None)
    rlpd_gaussian.critic_update(critic, target, Policy(), 0.25, optimizer, Buffer(), torch.tensor([0, 1]), args)
    bonus = 0.9 * 0.25 * 2.0 if entropy_backup else 0.0
    torch.testing.assert_close(seen["target_q"], torch.tensor([-1 + 0.9 * -2 + bonus, -1.0]))


# --- IDQL ---
def test_implicit_weights():
    weights = idql.implicit_weights(torch.tensor([[-1.0, -3.0, -2.0]]), torch.tensor([-2.0]), 0.9)
    torch.testing.assert_close(weights, torch.tensor([[0.9, 0.1, 0.9]]))


def test_reranking_takes_the_best_or_draws_by_the_weights():
    class Policy:
        def sample(self, obs, n):
            return torch.tensor([[[0.0], [1.0]]]).expand(len(obs), 2, 1)

    def critic(obs, actions):
        return torch.stack([-actions[..., 0], -3 * actions[..., 0]])  # means 0 and -2

    def value(obs, actions):
        return torch.full((1, len(obs), 1), -1.0)

    obs, args = torch.zeros(4_000, 1), idql.Args(num_samples=2, expectile=0.8)
    assert not idql.rerank(Policy(), critic, value, obs, args).any()
    args.greedy_rollouts = False
    assert idql.rerank(Policy(), critic, value, obs, args).mean().item() == pytest.approx(0.2, abs=0.03)


def test_idqls_value_and_critic_targets_by_hand():
    """Q_target = -2 and -4, V = -1 everywhere: V's loss is 0.1 x 9 (Q is below), Q's target r + gamma V."""

    class Constant(torch.nn.Module):
        def forward(self, obs, actions, members=None):
            return torch.tensor([-2.0, -4.0])[:, None, None].expand(2, len(obs), 1)

        def td_loss(self, obs, actions, target_q, release_width):
            return torch.zeros(2, len(obs)), (target_q + 1.5).square().mean()

    def value(obs, actions):
        return torch.full((1, len(obs), 1), -1.0)

    obs, ones = torch.zeros(3, 1), torch.ones(3)
    _, info = idql.iql_loss(Constant(), Constant(), value, obs, obs, -ones, ones * 0.5, obs, 0.8, 0.9)
    assert info["value_loss"].item() == pytest.approx(0.1 * 9)
    assert info["target_q"].item() == pytest.approx(-1 - 0.4)
    assert info["td_loss"].item() == pytest.approx(0.01, rel=1e-3)


# --- the loops ---
@baselines
def test_a_run_stopped_in_every_phase_ends_with_the_same_numbers(script, tmp_path, monkeypatch):
    flags = [*TOY, *FLAGS[script]]
    script.main([*flags, "--runs", str(tmp_path / "whole")])
    (reference,) = (tmp_path / "whole").iterdir()
    for name in ("config.json", "metrics.csv", "checkpoint.pt", "summary.png"):
        assert (reference / name).stat().st_size > 0
    phases, whole = (
        ["offline", "online"] if script is rlpd_gaussian else ["cloning", "offline", "online"],
        Run.check_stop,
    )

    def stop_in_each_phase(run):  # as a signal would
        if phases and run.phase == phases[0] and run.progress["step"] >= 1:
            phases.pop(0)
            run.stop_signal = signal.SIGTERM
        whole(run)

    monkeypatch.setattr(Run, "check_stop", stop_in_each_phase)
    argv = [*flags, "--runs", str(tmp_path / "stopped")]
    for _ in phases.copy():
        with pytest.raises(SystemExit) as ended:
            script.main(argv)
        assert ended.value.code == 128 + signal.SIGTERM
        (folder,) = (tmp_path / "stopped").iterdir()
        argv = ["--resume", str(folder)]
    script.main(argv)
    assert not phases
    assert rows_of(folder) == rows_of(reference)
    assert_same_checkpoint(folder, reference)


@pytest.mark.parametrize(
    ("script", "name", "per_step"),
    [(idql, "policy_update", 0.2), (calql_gaussian, "actor_update", 0.3), (rlpd_gaussian, "actor_update", 0.1)],
    ids=lambda value: getattr(value, "__name__", str(value)).split(".")[-1],
)
def test_as_many_updates_as_asked_for(script, name, per_step, tmp_path, monkeypatch):
    """Online, per environment step; before, one a step of the phase."""
    counts, lengths = {name: 0, "critic_update": 0}, []

    def counted(function, key):
        def call(*args, **kwargs):
            counts[key] += 1
            return function(*args, **kwargs)

        return call

    def collected(*args):
        episode, success = original(*args)
        lengths.append(len(episode))
        return episode, success

    original = script.collect_episode
    monkeypatch.setattr(script, "collect_episode", collected)
    for key in counts:
        monkeypatch.setattr(script, key, counted(getattr(script, key), key))
    script.main([*TOY, *FLAGS[script], "--runs", str(tmp_path)])
    online = lengths[-3:]
    assert len(lengths) == (5 if script is rlpd_gaussian else 3)
    before = {idql: (6, 12), calql_gaussian: (12, 12), rlpd_gaussian: (0, 0)}[script]
    assert counts[name] == before[0] + sum(round(per_step * length) for length in online)
    assert counts["critic_update"] == before[1] + sum(round(0.3 * length) for length in online)


@baselines
def test_the_docstrings_table_is_true(script):
    assert faults(pathlib.Path(script.__file__).read_text()) == []


@baselines
def test_every_preset_is_accepted_and_bad_flags_end_in_one_line(script, tmp_path):
    for preset in ("default", "antmaze", "kitchen", "ogbench", "pointmaze", "laptop"):
        assert script.parse_args(script.Args, script.PRESETS, ["--preset", preset]).preset == preset
    for flags in ("--target-subset 11 --discount 1.0", "--batch-size 0", "--policy-hidden 0", "--env-id nowhere-v0"):
        with pytest.raises(SystemExit) as stopped:
            script.main([*TOY, *FLAGS[script], *flags.split(), "--runs", str(tmp_path)])
        message = str(stopped.value)
        assert message.startswith("error: ") or message == "2"  # 2: a flag that idql does not have
    assert not list(tmp_path.iterdir())


def test_no_actions_in_the_penalty_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="--cql-actions"):
        calql_gaussian.main([*TOY, *FLAGS[calql_gaussian], "--cql-actions", "0", "--runs", str(tmp_path)])


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (idql, "--no-greedy-rollouts --critic-loss mse --chunk 2"),
        (calql_gaussian, "--max-backup --no-importance --critic-loss mse --chunk 2 --num-cloning-steps 0"),
        (rlpd_gaussian, "--entropy-backup --critic-loss mse --chunk 2 --policy-ratio 2 --utd 0"),
        (parl_gaussian_calql, "--sample-backup --no-greedy-rollouts --distill-selection sample --chunk 2"),
    ],
    ids=lambda value: getattr(value, "__name__", "").split(".")[-1],
)
def test_variants_run(script, flags, tmp_path):
    script.main([*TOY, *FLAGS[script], *flags.split(), "--num-online-episodes", "1", "--runs", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    assert (folder / "summary.png").exists()


def test_a_stopped_baseline_says_how_to_go_on(tmp_path):
    """By `python -m`, since the file alone would not find the package."""
    program = [sys.executable, "-m", "benchmarks.baselines.rlpd_gaussian"]
    flags = [*TOY, *FLAGS[rlpd_gaussian], "--num-online-episodes", "1000", "--runs", str(tmp_path)]
    root = pathlib.Path(__file__).parent.parent
    process = subprocess.Popen([*program, *flags], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("*/checkpoint.pt")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    line = process.communicate()[0].decode().strip().splitlines()[-1]
    (folder,) = tmp_path.iterdir()
    assert line.endswith(f"to continue: python -m benchmarks.baselines.rlpd_gaussian --resume {folder}")
    command = json.loads((folder / "config.json").read_text())["provenance"]["command"]
    assert command.startswith("python -m benchmarks.baselines.rlpd_gaussian --env-id pointmaze-umaze-v0")


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/baselines").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_compile_is_refused_where_nothing_is_compiled(path):
    module, compiles = importlib.import_module(f"benchmarks.baselines.{path.stem}"), "compiled(" in path.read_text()
    accepts = "yes" in typing.get_args(typing.get_type_hints(module.Args)["compile"])
    assert accepts == compiles
