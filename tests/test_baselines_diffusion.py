"""The diffusion baselines: each loss against its own paper's formula, runs stopped and resumed, bad flags."""

import copy
import math
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from test_end_to_end import assert_same_checkpoint, rows_of
from torch.distributions import Normal

from benchmarks.baselines import cem_calql, dppo, dql, filtered_bc
from benchmarks.harness.cli import parse_args
from benchmarks.harness.runs import Run
from benchmarks.tasks.dataset import Dataset
from parl_diffusion_calql import Critic, DiffusionPolicy, ReplayBuffer

BASELINES = [filtered_bc, cem_calql, dql, dppo]
TOY = (
    "--env-id pointmaze-umaze-v0 --dataset-size 600 --threads 1 --eval-episodes 2 --log-every 5 --no-eval-processes "
    "--checkpoint-seconds 0 --num-online-episodes 4 --num-online-evals 1 --num-cloning-steps 6 "
    "--cloning-batch-size 32 --batch-size 16 --policy-hidden 16 --policy-blocks 1"
).split()
CRITIC = (
    "--num-offline-steps 12 --num-offline-evals 1 --critic-hidden 16 16 --num-bins 16 --ensemble-size 3 "
    "--num-samples 4 --utd 0.3"
).split()
FLAGS = {
    filtered_bc: "--cloning-ratio 0.3".split(),
    cem_calql: [*CRITIC, *"--num-elites 2 --num-iterations 2 --initial-population policy".split()],
    dql: [*CRITIC, *"--backup-samples 2".split()],
    dppo: "--episodes-per-round 2 --value-hidden 16 --num-epochs 2".split(),
}
baselines = pytest.mark.parametrize("script", BASELINES, ids=lambda script: script.__name__.split(".")[-1])


def some_policy(obs_dim=3, action_dim=2, num_steps=5, dropout=0.0):
    torch.manual_seed(0)
    return DiffusionPolicy(obs_dim, action_dim, num_steps, hidden=16, blocks=1, dropout=dropout)


def quadratic(best):
    """A critic of two members whose mean is -|a - best|^2 at every state."""

    def q(obs, actions, members=None):
        value = -(actions - best).square().sum(-1)
        return torch.stack([value - 0.3 * actions.sum(-1), value + 0.3 * actions.sum(-1)])

    return q


# --- the cross-entropy method ---
def test_cem_finds_the_maximum_of_a_quadratic():
    torch.manual_seed(0)
    best, obs = torch.tensor([0.6, -0.3]), torch.zeros(5, 1)
    population = torch.rand(5, 64, 2) * 2 - 1
    actions, q = cem_calql.cross_entropy_method(quadratic(best), obs, population, 6, 8, min_std=1e-4)
    torch.testing.assert_close(actions, best.expand(5, 2), atol=0.01, rtol=0)
    torch.testing.assert_close(q, -(actions - best).square().sum(-1))


def test_cem_stays_in_the_action_space_where_the_maximum_lies_outside():
    torch.manual_seed(0)
    population = torch.rand(3, 64, 2) * 2 - 1
    found = cem_calql.cross_entropy_method(quadratic(torch.tensor([3.0, -3.0])), torch.zeros(3, 1), population, 6, 6)[0]
    assert found.abs().max() <= 1
    torch.testing.assert_close(found, torch.tensor([[1.0, -1.0]]).expand(3, 2), atol=0.02, rtol=0)


def test_cem_of_one_iteration_ranks_its_population():
    population = torch.rand(4, 10, 2) * 2 - 1
    q = quadratic(torch.zeros(2))
    actions, value = cem_calql.cross_entropy_method(q, torch.zeros(4, 1), population, 3, 1)
    best = population.square().sum(-1).argmin(1)
    assert torch.equal(actions, population[torch.arange(4), best])
    torch.testing.assert_close(value, -actions.square().sum(-1))


def test_cem_draws_from_the_gaussian_of_the_elites():
    """Its second population, caught by the critic: mean and deviation of the two best actions of the first."""
    seen = []

    def q(obs, actions, members=None):
        seen.append(actions)
        return actions.sum(-1)[None]

    torch.manual_seed(0)
    population = torch.full((1, 20_000, 1), -0.9)
    population[0, :2, 0] = torch.tensor([0.1, 0.5])
    cem_calql.cross_entropy_method(q, torch.zeros(1, 1), population, 2, 2)
    assert len(seen) == 2
    assert seen[1].mean().item() == pytest.approx(0.3, abs=0.01)
    assert seen[1].std().item() == pytest.approx(0.2, abs=0.01)


def test_cem_is_the_same_with_the_fast_critic():
    args = cem_calql.Args(num_elites=3, num_iterations=3)
    critic, obs, population = Critic(3, 2, (16, 16), 3, 16), torch.randn(6, 3), torch.rand(6, 12, 2) * 2 - 1
    for weight in critic.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    found = []
    for args.plain in (True, False):
        torch.manual_seed(1)
        found.append(cem_calql.cem_actions(critic, obs, population, args)[0])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


class Slopes(torch.nn.Module):
    """A critic of two members whose Q of an action (B, n, 1) is w times it, w 1 and 2 at first; regression."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, obs, actions, members=None):
        q = self.weight[:, None, None] * actions[..., 0]
        return q if members is None else q[members]

    def td_loss(self, obs, actions, target_q, release_width):
        q = self.forward(obs, actions[:, None])[..., 0]
        return q, (q - target_q).square().mean()


class TwoTransitions:
    """State 0 -> 1, which goes on, and 1 -> 2, a terminal; both rewards -1, the returns that followed -0.5 and -9."""

    obs_index, next_index = torch.tensor([0, 1]), torch.tensor([1, 2])
    states, rewards, masks = torch.arange(3.0)[:, None], torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 0.0])
    mc_returns, action_at = torch.tensor([-0.5, -9.0]), torch.zeros(2, 1)
    candidates = torch.tensor([[[-0.8], [-0.6], [-0.9]], [[-0.4], [-0.7], [-0.5]], [[-0.3], [-0.1], [-0.2]]])

    def data_actions(self, states):
        return torch.tensor([[-0.2], [-0.3]])


def test_cem_calqls_update_by_hand(monkeypatch):
    """Equation 3.3 with the best of each state's candidates: -0.6, -0.4 and -0.1 at states 0, 1 and 2.

    Both members are targets and penalised; the random action is 0, valued 0. One gradient step of the whole loss.
    """
    args = cem_calql.Args(
        initial_population="policy", num_samples=3, num_elites=1, num_iterations=1, ensemble_size=2, target_subset=2,
        critic_loss="mse", discount=0.5, cql_alpha=0.3, cql_actions=1, target_tau=0.25,
    )  # fmt: skip
    critic, target = Slopes(), Slopes().requires_grad_(False)
    monkeypatch.setattr(cem_calql, "FrozenCritic", lambda critic: critic)  # which takes the script's own alone
    monkeypatch.setattr(cem_calql.torch, "rand", lambda *shape, **how: torch.full(shape, 0.5))  # an action of 0
    optimizer = torch.optim.SGD(critic.parameters(), 0.1)
    info = cem_calql.critic_update(critic, target, optimizer, TwoTransitions(), torch.tensor([0, 1]), args)

    targets = [-1 + 0.5 * 2 * -0.4, -1.0]  # the smaller member's value of the best action at s'; none after a terminal
    data, best, best_next, returns = [-0.2, -0.3], [-0.6, -0.4], [-0.4, -0.1], [-0.5, -9.0]
    td, penalty = [], []
    slope = {w: {"td": 0.0, "cql": 0.0} for w in (1.0, 2.0)}  # of the losses' sums, by each member's weight
    for w in slope:
        for i in range(2):
            td.append((w * data[i] - targets[i]) ** 2)
            slope[w]["td"] += 2 * (w * data[i] - targets[i]) * data[i]
            actions = [0.0, best_next[i], best[i], data[i]]
            bounded = [0.0, max(w * actions[1], returns[i]), max(w * actions[2], returns[i]), w * actions[3]]
            total = sum(map(math.exp, bounded))
            penalty.append(math.log(total / 4) - w * data[i])
            held = [k in (1, 2) and w * actions[k] < returns[i] for k in range(4)]  # by the bound: no gradient
            slope[w]["cql"] += sum(math.exp(q) / total * a * (not h) for q, a, h in zip(bounded, actions, held))
            slope[w]["cql"] -= data[i]
    assert info["td_loss"].item() == pytest.approx(sum(td) / 4)
    assert info["cql_loss"].item() == pytest.approx(sum(penalty) / 4)
    assert info["critic_loss"].item() == pytest.approx(sum(td) / 4 + 0.3 * sum(penalty) / 4)
    assert info["cem_target_q"].item() == pytest.approx(sum(targets) / 2)
    assert info["bound_rate"].item() == pytest.approx(3 / 8)  # of -0.4, -0.6 and twice those, below -0.5 are three
    moved = [w - 0.1 * (slope[w]["td"] + 0.3 * slope[w]["cql"]) / 4 for w in slope]
    assert critic.weight.tolist() == pytest.approx(moved)
    assert target.weight.tolist() == pytest.approx([0.75 * w + 0.25 * m for w, m in zip(slope, moved)])


def test_cem_calqls_random_populations_are_drawn_anew_over_all_actions(monkeypatch):
    """For s and s' of every transition, a chunk's steps together; what a policy drew is not looked at."""
    seen, args = [], cem_calql.Args(num_samples=500, chunk=2, ensemble_size=2, critic_loss="mse", cql_actions=1)

    def note(critic, obs, population, args):
        seen.append(population)
        return population[:, 0], population[:, 0, 0]

    monkeypatch.setattr(cem_calql, "cem_actions", note)
    monkeypatch.setattr(cem_calql, "calql_loss", lambda critic, *rest: (critic.weight.sum(), {}))
    critic, target = Slopes(), Slopes().requires_grad_(False)
    optimizer = torch.optim.SGD(critic.parameters(), 0.0)
    for _ in range(2):
        cem_calql.critic_update(critic, target, optimizer, TwoTransitions(), torch.tensor([0, 1]), args)
    assert [population.shape for population in seen] == [(4, 500, 2)] * 2 and not torch.equal(*seen)
    assert seen[0].min() < -0.99 and seen[0].max() > 0.99 and seen[0].abs().max() <= 1


def test_over_optimism_is_q_less_the_return_that_followed():
    args = cem_calql.Args(num_samples=1, discount=0.5, sparse_reward=False)
    buffer = ReplayBuffer(episode_of(4, 1.0), args, "cpu")
    first = len(buffer)
    buffer.add(episode_of(2, 1.0))  # biased rewards -1, 0 and a terminal: returns -1 and 0

    def critic(obs, actions, members=None):
        return torch.full((2, *actions.shape[:2]), 3.0)

    assert cem_calql.over_optimism(critic, buffer, first).item() == pytest.approx(3 - (-1 + 0) / 2)


# --- filtered cloning ---
def episode_of(length, value, rewards=None):
    """`length` steps to a terminal with the reward 1, all actions being `value`."""
    obs = np.random.default_rng(length).normal(size=(length + 1, 3)).astype(np.float32)
    last = np.arange(length) == length - 1
    actions = np.full((length, 2), value, np.float32)
    return Dataset(obs[:-1], actions, last.astype(np.float32), obs[1:], last, np.zeros(length, bool), "here")


def test_exactly_the_successful_episodes_are_kept():
    buffer = ReplayBuffer(episode_of(5, 0.0), filtered_bc.Args(), "cpu")
    kept = [filtered_bc.keep_successful(buffer, episode_of(3, i / 10), i % 2 == 1) for i in range(6)]
    assert kept == [0, 1, 1, 2, 2, 3]
    assert [e.actions[0, 0] for e in buffer.data[1:]] == pytest.approx([0.1, 0.3, 0.5])
    assert len(buffer) == 5 + 3 * 3
    index = buffer.sample_index((200, 4))  # half of each batch from the kept ones
    actions = buffer.data_actions(buffer.obs_index[index.flatten()])[:, 0].view(200, 4)
    assert (actions[:, :2] == 0).all() and (actions[:, 2:] > 0).all()
    assert {round(a, 1) for a in actions[:, 2:].flatten().tolist()} == {0.1, 0.3, 0.5}


def test_cloning_takes_a_step_down_the_denoising_loss_of_the_rows_own_actions():
    """Equation 3.1 by hand, at the steps and with the noise that the same seed draws; then SGD, and the average."""
    data, rows = episode_of(6, 0.0), torch.tensor([4, 1, 1])
    data.actions[:] = np.linspace(-0.9, 0.9, 12).reshape(6, 2)  # each row its own
    buffer = ReplayBuffer(data, filtered_bc.Args(), "cpu")
    policy, average = some_policy(), some_policy().requires_grad_(False)
    before = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    torch.manual_seed(3)
    t, noise = torch.randint(5, (3,)), torch.randn(3, 2)
    obs, actions = (torch.as_tensor(array)[rows] for array in (data.observations, data.actions))
    bar = torch.cumprod(1 - policy.betas, 0)[t, None]
    obs_part, time_parts = policy.first_layer_parts(obs)
    predicted = policy.predict_noise(obs_part + time_parts[t], bar.sqrt() * actions + (1 - bar).sqrt() * noise)
    expected = ((predicted - noise) ** 2).sum(1).mean()
    slopes = dict(zip(before, torch.autograd.grad(expected, list(policy.parameters()))))
    torch.manual_seed(3)
    loss = filtered_bc.clone(policy, average, torch.optim.SGD(policy.parameters(), 0.1), buffer, rows, 0.25)
    assert loss.item() == pytest.approx(expected.item()) and not loss.requires_grad
    assert max(slope.abs().max() for slope in slopes.values()) > 0.01
    for name, weight in policy.named_parameters():
        moved = before[name] - 0.1 * slopes[name]
        torch.testing.assert_close(weight.detach(), moved)
        torch.testing.assert_close(average.get_parameter(name), 0.75 * before[name] + 0.25 * moved)


def test_what_is_cloned_is_what_the_policy_then_does():
    """Of data whose action is 0.3 everywhere, and later of kept episodes with -0.6 in half of each batch: both."""
    torch.manual_seed(0)
    buffer, policy = ReplayBuffer(episode_of(40, 0.3), filtered_bc.Args(), "cpu"), some_policy()
    average, optimizer = copy.deepcopy(policy).requires_grad_(False), torch.optim.Adam(policy.parameters(), 3e-3)

    def samples_after(updates):
        for rows in buffer.sample_index((updates, 64)):
            filtered_bc.clone(policy, average, optimizer, buffer, rows, 0.05)
        return average.sample(torch.zeros(500, 3), 1)[:, 0]

    assert (samples_after(400) - 0.3).abs().mean() < 0.1
    filtered_bc.keep_successful(buffer, episode_of(30, -0.6), True)
    actions = samples_after(600)
    low, high = ((actions - value).abs().amax(1) < 0.3 for value in (-0.6, 0.3))
    assert low.float().mean() > 0.25 and high.float().mean() > 0.25


def test_nothing_is_cloned_online_before_a_success(tmp_path, monkeypatch):
    """Then after every episode, as often as its steps say."""
    successes = False, True, False
    counts, outcomes = [], iter(successes)

    def collected(*args):
        counts.append(0)
        return original(*args)[0], next(outcomes)

    def cloned(*args):
        if counts:
            counts[-1] += 1
        return torch.zeros(())

    original = filtered_bc.collect_episode
    monkeypatch.setattr(filtered_bc, "collect_episode", collected)
    monkeypatch.setattr(filtered_bc, "clone", cloned)
    filtered_bc.main([*TOY, "--num-online-episodes", "3", "--runs", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    lengths = [float(row["episode_length"]) for row in rows_of(folder) if row["episode_length"]]
    assert counts == [round(n) if any(successes[: i + 1]) else 0 for i, n in enumerate(lengths)]


# --- diffusion Q-learning ---
def test_the_chain_with_gradients_is_the_policys():
    policy, obs = some_policy(dropout=0.5).train(), torch.randn(7, 3)
    noise = policy.draw_noise(obs, 1)
    actions = dql.denoise(policy, obs, noise[:, :, 0])
    assert policy.training and actions.requires_grad
    torch.testing.assert_close(actions, policy.eval().sample(obs, 1, noise)[:, 0])


def linear(slope):
    def q(obs, actions, members=None):
        return (actions @ slope).expand(2, -1, -1)

    return q


def test_dqls_loss_by_hand():
    """Equation 3: denoising loss less eta mean Q / mean |Q|."""
    policy, obs, data, slope = some_policy(), torch.randn(8, 3), torch.rand(8, 2), torch.tensor([1.0, 2.0])
    noise = policy.draw_noise(obs, 1)[:, :, 0]
    torch.manual_seed(5)
    loss, info = dql.dql_loss(policy, linear(slope), obs, data, 3.0, noise)
    torch.manual_seed(5)
    q = dql.denoise(policy, obs, noise) @ slope
    torch.testing.assert_close(loss, policy.loss(obs, data) - 3 * q.mean() / q.abs().mean())
    torch.testing.assert_close(info["denoising_loss"] + 3 * info["q_loss"], loss.detach())


def test_the_q_losss_gradient_is_that_of_q_over_a_constant():
    policy, obs, data, slope = some_policy(), torch.randn(8, 3), torch.rand(8, 2), torch.tensor([1.0, 2.0])
    noise, weight = policy.draw_noise(obs, 1)[:, :, 0], policy.last.weight

    def gradient(loss):
        return torch.autograd.grad(loss, weight)[0]

    torch.manual_seed(5)
    found = gradient(dql.dql_loss(policy, linear(slope), obs, data, 3.0, noise)[0])
    torch.manual_seed(5)
    q = dql.denoise(policy, obs, noise) @ slope
    expected = gradient(policy.loss(obs, data)) - 3 * gradient(q.mean()) / q.abs().mean().detach()
    torch.testing.assert_close(found, expected)
    assert expected.abs().max() > 0


def test_the_gradient_moves_samples_up_a_linear_q():
    policy, obs, slope = some_policy(), torch.randn(64, 3), torch.tensor([1.0, -1.0])
    data, optimizer = torch.zeros(64, 2), torch.optim.Adam(policy.parameters(), 3e-3)
    before = policy.sample(obs, 50) @ slope
    for _ in range(60):
        optimizer.zero_grad()
        dql.dql_loss(policy, linear(slope), obs, data, 10.0)[0].backward()
        optimizer.step()
    after = policy.sample(obs, 50) @ slope
    assert after.mean() > before.mean() + 0.5


def test_the_critic_is_not_changed_by_the_policys_update():
    policy, critic = some_policy(), Critic(3, 2, (8,), 2, 8)
    args = dql.Args(num_samples=1, ensemble_size=2)
    buffer = ReplayBuffer(episode_of(20, 0.3), args, "cpu")
    optimizer = torch.optim.Adam(policy.parameters())
    before = [p.clone() for p in critic.parameters()]
    dql.dql_update(policy, some_policy(), critic, optimizer, buffer, torch.arange(16), args)
    assert all(torch.equal(a, b) and b.grad is None and b.requires_grad for a, b in zip(before, critic.parameters()))


@pytest.mark.parametrize("samples", [1, 3])
def test_dqls_target_by_hand(samples):
    """r + gamma mask min over members; of several samples at s' that of the highest minimum (max-Q-backup)."""
    args = dql.Args(num_samples=1, ensemble_size=2, target_subset=2, backup_samples=samples, discount=0.9)
    buffer, policy, noted = ReplayBuffer(episode_of(4, 0.3), args, "cpu"), some_policy().eval(), {}

    class Target(torch.nn.Linear):
        def forward(self, obs, actions, members=None):
            return torch.stack([actions.sum(-1), 2 * actions.sum(-1)])[members]

    class Online(torch.nn.Linear):
        def td_loss(self, obs, actions, target_q, release_width):
            noted.update(actions=actions, target_q=target_q)
            return torch.zeros(2, len(obs)), self(obs[:, :1]).mean()

    online, target, rows = Online(1, 1), Target(1, 1), torch.arange(4)
    optimizer = torch.optim.SGD(online.parameters(), 0.1)
    torch.manual_seed(3)
    dql.critic_update(online, target, policy, optimizer, buffer, rows, args)
    torch.manual_seed(3)
    total = policy.sample(buffer.states[buffer.next_index[rows]], samples).sum(-1)
    expected = buffer.rewards + 0.9 * buffer.masks * torch.minimum(total, 2 * total).max(1).values
    torch.testing.assert_close(noted["target_q"], expected)
    assert torch.equal(noted["actions"], torch.full((4, 2), 0.3))


# --- DPPO ---
def test_log_probabilities_of_a_chain_are_those_of_its_gaussians():
    """Step by step, each as the textbook's denoising step from what the network predicts there."""
    policy, obs = some_policy().eval(), torch.randn(6, 3)
    chain = dppo.draw_chain(policy, obs, 0.2)
    assert chain.shape == (6, 6, 2)
    found, (obs_part, time_parts) = dppo.log_probs(policy, obs, chain, 0.2), policy.first_layer_parts(obs)
    assert found.shape == (6, 5)
    for i, t in enumerate([4, 3, 2, 1, 0]):
        epsilon = policy.predict_noise(obs_part + time_parts[t], chain[:, i])
        beta, bar = policy.betas[t], policy.alpha_bars[t]
        mean = ((chain[:, i] - beta / (1 - bar).sqrt() * epsilon) / (1 - beta).sqrt()).clamp(-1, 1)
        std = max(beta.sqrt().item() if t > 0 else 0.0, 0.2)
        torch.testing.assert_close(
            found[:, i], Normal(mean, std).log_prob(chain[:, i + 1]).sum(-1), rtol=1e-4, atol=1e-4
        )


def test_a_chain_of_one_step_has_the_closed_form():
    """K = 1, a network that predicts a constant c: a_0 is normal around clip((a_1 - c sqrt(beta)) / sqrt(1 - beta))."""
    policy, obs, c = some_policy(num_steps=1), torch.zeros(20_000, 3), 0.2
    torch.nn.init.zeros_(policy.last.weight)
    torch.nn.init.constant_(policy.last.bias, c)
    chain, beta = dppo.draw_chain(policy, obs, 0.1), policy.betas[0]
    mean = ((chain[:, 0] - c * beta.sqrt()) / (1 - beta).sqrt()).clamp(-1, 1)
    z = (chain[:, 1] - mean) / 0.1
    assert z.mean().abs() < 0.03 and (z.std() - 1).abs() < 0.03
    closed = (-z.square() / 2 - math.log(0.1 * math.sqrt(2 * math.pi))).sum(-1)
    torch.testing.assert_close(dppo.log_probs(policy, obs, chain, 0.1)[:, 0], closed, rtol=1e-4, atol=1e-3)


def test_at_the_old_policy_the_ratio_is_one_and_the_gradient_the_policy_gradient():
    policy, obs, advantage = some_policy().eval(), torch.randn(9, 3), torch.randn(9)
    chain, clips, discount = dppo.draw_chain(policy, obs, 0.1), dppo.step_clips(5, 0.01, 0.1), 0.9
    weights = discount ** torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    new = dppo.log_probs(policy, obs, chain, 0.1)
    loss, info = dppo.ppo_loss(new, new.detach(), advantage, clips, discount)
    torch.testing.assert_close(loss, -(advantage[:, None] * weights).mean())
    assert info["kl"] == 0 and info["clip_rate"] == 0
    parameters = list(policy.parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=True)
    expected = torch.autograd.grad(-(new * advantage[:, None] * weights).mean(), parameters)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)
    assert any(b.abs().max() > 1e-4 for b in expected)


def test_a_ratio_beyond_its_steps_clip_has_no_gradient_where_it_helps():
    """Two denoising steps, eps 0.1 and 0.3; the first's ratio is beyond, the second's within."""
    old, clips = torch.zeros(2, 2), torch.tensor([0.1, 0.3])
    new = torch.tensor([[1.2, 1.2], [0.8, 0.8]]).log().requires_grad_()
    loss, info = dppo.ppo_loss(new, old, torch.tensor([2.0, -3.0]), clips, 1.0)
    expected = -(1.1 * 2 + 1.2 * 2 + 0.9 * -3 + 0.8 * -3) / 4
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    torch.testing.assert_close(new.grad, torch.tensor([[0, -1.2 * 2 / 4], [0, 0.8 * 3 / 4]]))
    assert info["clip_rate"] == 0.5
    # the other way round the ratio harms, and no clip saves it
    wrong = torch.tensor([[1.2, 1.2], [0.8, 0.8]]).log()
    harmed = dppo.ppo_loss(wrong, old, torch.tensor([-2.0, 3.0]), clips, 1.0)[0]
    assert harmed.item() == pytest.approx(-(1.2 * -2 * 2 + 0.8 * 3 * 2) / 4)


def test_clips_rise_exponentially():
    clips = dppo.step_clips(3, 0.01, 0.1)
    middle = 0.01 + 0.09 * (math.exp(1.5) - 1) / (math.exp(3) - 1)
    torch.testing.assert_close(clips, torch.tensor([0.01, middle, 0.1]))
    assert dppo.step_clips(1, 0.01, 0.1).tolist() == pytest.approx([0.1])


@pytest.mark.parametrize("terminal", [True, False])
def test_advantages_by_hand(terminal):
    """lambda 1: return-to-go less value; lambda 0: the TD error. A cut episode goes on with its last state's value."""
    rewards, values, gamma = np.array([1.0, 2.0, 3.0]), np.array([0.5, -0.5, 1.5, 4.0]), 0.9
    end = 0.0 if terminal else 4.0
    returns = np.array([1 + 0.9 * (2 + 0.9 * (3 + 0.9 * end)), 2 + 0.9 * (3 + 0.9 * end), 3 + 0.9 * end])
    found, targets = dppo.advantages(rewards, values, terminal, gamma, 1.0)
    np.testing.assert_allclose(found, returns - values[:3])
    np.testing.assert_allclose(targets, returns)
    found, _ = dppo.advantages(rewards, values, terminal, gamma, 0.0)
    np.testing.assert_allclose(found, [1 - 0.45 - 0.5, 2 + 1.35 + 0.5, 3 + 0.9 * end - 1.5])


def test_a_decisions_reward_is_that_of_its_chunk():
    found = dppo.decisions(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), 2, 0.5)
    np.testing.assert_allclose(found, [1 + 1, 3 + 2, 5])


def test_ppo_makes_rewarded_actions_likelier():
    """A bandit: the reward is the action's first coordinate."""
    policy, args = some_policy(action_dim=1).eval(), dppo.Args(batch_size=200, num_epochs=4, discount=0.9)
    value, obs = dppo.Value(3, (8,)), torch.zeros(400, 3)
    optimizers = torch.optim.Adam(policy.parameters(), 1e-3), torch.optim.Adam(value.parameters(), 1e-2)

    class Unstopped:
        def check_stop(self):
            pass

    before = policy.sample(obs, 5).mean()
    for _ in range(15):
        chains = dppo.draw_chain(policy, obs, 0.1)
        reward = chains[:, -1, 0].clamp(-1, 1)
        batch = obs, chains, reward - value(obs).detach(), reward
        metrics, updates = dppo.ppo_round(policy, value, *optimizers, batch, args, False, Unstopped())
    assert updates == 8 and metrics["kl"] >= 0
    assert policy.sample(obs, 5).mean() > before + 0.2
    weights = [p.clone() for p in policy.parameters()]
    dppo.ppo_round(policy, value, *optimizers, batch, args, True, Unstopped())  # the value alone
    assert all(torch.equal(a, b) for a, b in zip(weights, policy.parameters()))


# --- the programs ---
def let_some_succeed(monkeypatch):
    """Filtered cloning learns from episodes that succeed, and no policy of six updates does: here the even seeds'."""
    collect = filtered_bc.collect_episode
    monkeypatch.setattr(filtered_bc, "collect_episode", lambda *how: (collect(*how)[0], how[2] % 2 == 0))


@baselines
def test_a_run_stopped_in_every_phase_ends_with_the_same_numbers(script, tmp_path, monkeypatch):
    let_some_succeed(monkeypatch)
    flags = [*TOY, *FLAGS[script], "--seed", "3"]
    script.main([*flags, "--runs", str(tmp_path / "whole")])
    (reference,) = (tmp_path / "whole").iterdir()
    assert script is not filtered_bc or rows_of(reference)[-2]["episodes_kept"] == "2"
    phases = {"cloning", "offline", "online"} if script in (cem_calql, dql) else {"cloning", "online"}
    original = Run.count

    def stop_in_each_phase(run, **done):  # as a signal would, at the second step of each
        original(run, **done)
        if run.phase in phases and run.progress["step"] == 1:
            phases.remove(run.phase)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "count", stop_in_each_phase)
    argv = [*flags, "--runs", str(tmp_path / "stopped")]
    for _ in range(len(phases)):
        with pytest.raises(SystemExit) as ended:
            script.main(argv)
        assert ended.value.code == 128 + signal.SIGTERM
        (folder,) = (tmp_path / "stopped").iterdir()
        argv = ["--resume", str(folder)]
    script.main(argv)
    assert not phases
    assert rows_of(folder) == rows_of(reference)
    assert_same_checkpoint(folder, reference)


@pytest.mark.skipif(torch.cuda.is_available() or not hasattr(os, "fork"), reason="a fork cannot use the GPU")
@pytest.mark.parametrize("script", [dql, filtered_bc], ids=["dql", "filtered_bc"])
def test_a_run_killed_in_every_phase_ends_with_the_same_numbers(script, tmp_path, monkeypatch):
    """SIGKILL, in a fork of this process at the second step of each phase: nothing is saved then."""
    let_some_succeed(monkeypatch)
    flags, original = [*TOY, *FLAGS[script], "--seed", "4"], Run.count
    script.main([*flags, "--runs", str(tmp_path / "whole")])
    (reference,) = (tmp_path / "whole").iterdir()
    argv = [*flags, "--runs", str(tmp_path / "killed")]
    for phase in ("cloning", "offline", "online") if script is dql else ("cloning", "online"):

        def killed(run, phase=phase, **done):
            original(run, **done)
            if run.phase == phase and run.progress["step"] == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        with monkeypatch.context() as patched:
            patched.setattr(Run, "count", killed)
            process = multiprocessing.get_context("fork").Process(target=script.main, args=(argv,))
            process.start()
            process.join(120)
        assert process.exitcode == -signal.SIGKILL
        (folder,) = (tmp_path / "killed").iterdir()
        argv = ["--resume", str(folder)]
    script.main(argv)
    assert rows_of(folder) == rows_of(reference)
    assert_same_checkpoint(folder, reference)


@pytest.mark.parametrize(
    ("script", "flags"),
    [(cem_calql, "--initial-population random --critic-loss mse --chunk 2"), (dql, "--critic-loss mse --chunk 2"),
     (dppo, "--chunk 2"), (filtered_bc, "--chunk 2")],
    ids=lambda value: getattr(value, "__name__", "").split(".")[-1],
)  # fmt: skip
def test_variants_run(script, flags, tmp_path):
    script.main([*TOY, *FLAGS[script], *flags.split(), "--runs", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    assert (folder / "summary.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("script", "flags", "says"),
    [(cem_calql, "--num-elites 99", "--num-elites"), (cem_calql, "--num-iterations 0", "--num-iterations"),
     (dql, "--backup-samples 0", "--backup-samples"), (dql, "--eta -1", "--eta"), (dppo, "--min-std 0", "--min-std"),
     (dppo, "--episodes-per-round 0", "--episodes-per-round"),
     (dppo, "--num-online-episodes 5", "--num-online-episodes 5 are not whole rounds"),
     (filtered_bc, "--preset none", "unknown --preset")],
    ids=lambda value: getattr(value, "__name__", str(value)).split(".")[-1],
)  # fmt: skip
def test_bad_flags_end_in_one_line(script, flags, says, tmp_path):
    with pytest.raises(SystemExit) as ended:
        script.main([*TOY, *FLAGS[script], *flags.split(), "--runs", str(tmp_path)])
    message = str(ended.value.code)
    assert message.startswith("error: ") and says in message and "\n" not in message and not list(tmp_path.iterdir())


@baselines
def test_every_preset_is_accepted(script):
    tasks = (
        "antmaze-umaze-v2",
        "kitchen-partial-v2",
        "cube-single-play-singletask-v0",
        "pointmaze-medium-v0",
        "calvin",
    )
    for task, preset in [(task, preset) for task in tasks for preset in ("auto", "laptop")]:
        args = parse_args(script.Args, script.PRESETS, ["--env-id", task, "--preset", preset])
        assert args.preset in ("laptop", *script.PRESETS) and args.num_online_episodes > 0
        assert args.num_online_episodes % getattr(args, "episodes_per_round", 1) == 0
