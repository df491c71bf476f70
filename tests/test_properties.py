"""The mathematics of parl_diffusion_calql.py, on closed forms and invariants, without reference vectors."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

import parl_diffusion_calql as script
from benchmarks.harness import datasets, fast_critic
from benchmarks.tasks.dataset import ARRAYS, Dataset

OBS, ACT = 5, 3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    np.random.seed(0)


# --- HELPERS ---


def make_critic(num_bins=16, members=3, hidden=(16, 16), scale=1.0, **kwargs):
    """A small critic with random normal weights: at initialisation Q would be nearly constant."""
    critic = script.Critic(OBS, ACT, hidden, members, num_bins, q_min=-10.0, q_max=0.0, **kwargs)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return critic


def make_batch(B=7, n=6, high=1.0):
    """obs (B, O) and actions (B, n, A) within the box."""
    return torch.randn(B, OBS), (2 * torch.rand(B, n, ACT) - 1) * high


def mean_q(critic, obs, actions):
    with torch.no_grad():
        return critic(obs, actions).mean(0)


class Quadratic(nn.Module):
    """Q_e(s, a) = offset_e - curvature / 2 |a - c_e(s)|^2, c_e(s) = obs + shift_e; the shifts cancel in the mean.

    The mean over the members is a constant (not the action's) less curvature / 2 |a - obs|^2; that of their minimum is
    not.
    """

    def __init__(self, curvature=1.0, shifts=(-0.3, 0.3), offsets=(-1.0, 5.0)):
        super().__init__()
        self.curvature = curvature
        self.shifts = nn.Parameter(torch.tensor(shifts, dtype=torch.float64).view(-1, 1, 1, 1))
        self.offsets = nn.Parameter(torch.tensor(offsets, dtype=torch.float64).view(-1, 1, 1))
        self.forwards, self.backwards, self.evaluated = 0, 0, []

    def forward(self, obs, actions):
        self.forwards += 1
        self.evaluated.append(actions.detach().clone())
        q = self.offsets - self.curvature / 2 * (actions - obs[:, None] - self.shifts).square().sum(-1)
        if q.requires_grad:
            q.register_hook(self._count)
        return q

    def _count(self, gradient):
        self.backwards += 1


def quadratic_batch(B=6, n=4):
    """Centres within [-0.2, 0.2] and actions within [-0.9, 0.9], in float64; the observation is the centre."""
    obs = 0.4 * torch.rand(B, ACT, dtype=torch.float64) - 0.2
    return obs, 1.8 * torch.rand(B, n, ACT, dtype=torch.float64) - 0.9


def make_args(**kwargs):
    return dataclasses.replace(script.Args(), **kwargs)


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return ((counts - expected) ** 2 / expected).sum().item()


# --- ACTION OPTIMIZATION ---


@pytest.mark.parametrize("keep", [1, 4, 6])
def test_global_optimization_keeps_the_best(keep):
    critic = make_critic()
    obs, actions = make_batch()
    kept, q = script.global_optimization(critic, obs, actions, keep)
    every = mean_q(critic, obs, actions)
    assert kept.shape == (7, keep, ACT)
    torch.testing.assert_close(q, every.sort(1, descending=True).values[:, :keep])
    torch.testing.assert_close(mean_q(critic, obs, kept), q)  # each action goes with its own value
    for row in range(7):  # every kept action is one of its own state's candidates, and none is kept twice
        index = [(actions[row] == action).all(-1).nonzero().item() for action in kept[row]]
        assert len(set(index)) == keep


def test_ranking_uses_the_mean_of_the_ensemble():
    """Two members that disagree: the minimum, the maximum and the first member would each choose otherwise."""
    obs, actions = torch.zeros(1, OBS), torch.arange(4.0).view(1, 4, 1)
    values = torch.tensor([[[0.0, 4.0, 9.0, 10.0]], [[3.0, 5.0, 1.0, -9.0]]])  # means 1.5, 4.5, 5, 0.5
    kept, q = script.global_optimization(lambda obs, actions: values, obs, actions, 3)
    assert kept.flatten().tolist() == [2, 1, 0] and q.flatten().tolist() == [5, 4.5, 1.5]


@pytest.mark.parametrize("step_size", [3e-4, 0.05, 1.0, 30.0])
@pytest.mark.parametrize("num_bins", [1, 16])
@pytest.mark.parametrize("keep_best_of_path", [False, True])
def test_no_step_lowers_q_or_leaves_the_box(step_size, num_bins, keep_best_of_path):
    critic = make_critic(num_bins)
    low, high = torch.tensor([-1.0, -0.5, -0.25]), torch.tensor([0.5, 1.0, 0.25])
    obs, actions = make_batch(40, 5)
    actions = actions.clamp(low, high)
    previous = mean_q(critic, obs, actions)
    start = previous
    for steps in range(6):  # the T-th point of the path, by taking T steps
        result, q = script.local_optimization(critic, obs, actions, steps, step_size, low, high, keep_best_of_path)
        torch.testing.assert_close(mean_q(critic, obs, result), q)  # the q returned is that of the action returned
        assert (q >= previous - 1e-6).all()
        assert (result >= low).all() and (result <= high).all()
        if steps == 0:
            assert torch.equal(result, actions)
        previous = q
    assert (q > start).float().mean() > (0.9 if step_size <= 0.05 else 0.05)  # and something was gained


@pytest.mark.parametrize("step_size", [0.1, 0.7, 1.0, 1.6])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_local_optimization_of_a_quadratic(step_size, steps):
    """Q = -|a - c|^2 / 2: every step multiplies a - c by 1 - step size, and raises Q while that is below 1 in size."""
    obs, actions = quadratic_batch()
    result, q = script.local_optimization(Quadratic(), obs, actions, steps, step_size, -1.0, 1.0)
    distance = (1 - step_size) ** steps * (actions - obs[:, None])
    torch.testing.assert_close(result, obs[:, None] + distance)
    # mean over the members of -|d - shift|^2 / 2 + offset, with shifts of +-0.3 in each of 3 dimensions
    torch.testing.assert_close(q, 2.0 - 3 * 0.3**2 / 2 - distance.square().sum(-1) / 2)


def test_local_optimization_stops_at_the_box():
    """With its centre beyond the box in the first dimension, the best action lies on the box's face."""
    obs, actions = quadratic_batch()
    obs[:, 0] = 3.0
    result, _ = script.local_optimization(Quadratic(), obs, actions, 200, 0.3, -1.0, 1.0)
    best = obs[:, None].expand_as(actions).clamp(-1, 1)
    torch.testing.assert_close(result, best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep_best_of_path", [False, True])
@pytest.mark.parametrize("step_size", [2.5, 30.0])
def test_a_step_that_overshoots_is_rejected(step_size, keep_best_of_path):
    """Beyond twice the inverse curvature every step of a quadratic ends farther from the centre than it began."""
    obs, actions = quadratic_batch()
    everywhere = -torch.inf, torch.inf
    result, q = script.local_optimization(Quadratic(), obs, actions, 5, step_size, *everywhere, keep_best_of_path)
    assert torch.equal(result, actions)
    assert torch.equal(q, mean_q(Quadratic(), obs, actions))


def test_a_step_that_changes_nothing_is_rejected():
    """Equal is not higher (section 4.3); the release takes the later of equal points."""
    critic = lambda obs, actions: 0 * actions.sum(-1)[None] + torch.round(actions.detach()).sum(-1)[None]  # noqa: E731
    shifted = lambda obs, actions: critic(obs, actions) + (actions - actions.detach()).sum(-1)[None]  # noqa: E731
    obs, actions = torch.zeros(2, OBS), torch.full((2, 1, ACT), 0.1)
    paper, _ = script.local_optimization(shifted, obs, actions, 1, 0.2, -1.0, 1.0)  # flat, though its gradient is 1
    release, _ = script.local_optimization(shifted, obs, actions, 1, 0.2, -1.0, 1.0, keep_best_of_path=True)
    assert torch.equal(paper, actions)
    torch.testing.assert_close(release, actions + 0.2)


def test_the_two_rules_differ_after_a_bad_step():
    """Q = a for a < 0.5, a - 1 from there to 0.8, a + 1 after: the release crosses the ditch, the paper does not."""

    def critic(obs, actions):
        a = actions[..., 0]
        return (a - ((a > 0.5) & (a < 0.8)).float() + (a >= 0.8).float())[None]

    obs, actions = torch.zeros(1, OBS), torch.full((1, 1, 1), 0.3)
    paper, _ = script.local_optimization(critic, obs, actions, 3, 0.2 - 1e-3, -1.0, 1.0)
    release, _ = script.local_optimization(critic, obs, actions, 3, 0.2 - 1e-3, -1.0, 1.0, keep_best_of_path=True)
    assert paper.item() == pytest.approx(0.499, abs=1e-6) and release.item() == pytest.approx(0.897, abs=1e-6)


@pytest.mark.parametrize("keep_best_of_path", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_local_optimization_evaluates_nothing_twice(steps, keep_best_of_path):
    """One forward and one backward pass per step, and one forward pass more for the value of the last point."""
    critic = Quadratic()
    obs, actions = quadratic_batch()
    script.local_optimization(critic, obs, actions, steps, 0.1, -1.0, 1.0, keep_best_of_path)
    assert (critic.forwards, critic.backwards) == (steps + 1, steps)
    points = torch.stack(critic.evaluated)
    assert len(points.unique(dim=0)) == steps + 1


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("floats_per_state", [1, 7_000, 10**9])
def test_over_states_is_the_function_itself(two_threads, floats_per_state):
    """Whatever the chunks: in order, each state once, one result or several; and the caller's threads stay its own."""
    sizes = []

    def function(x, y):
        sizes.append(len(x))
        assert len(x) == len(y)
        return 2 * x, x[:, 0] - y

    x, y = torch.randn(203, 4), torch.arange(203.0)
    doubled, difference = fast_critic.over_states(function, x, y, floats_per_state=floats_per_state)
    assert torch.equal(doubled, 2 * x) and torch.equal(difference, x[:, 0] - y)
    assert sum(sizes) == 203 and len(sizes) >= 2 and (floats_per_state < 10**9 or len(sizes) == 203)
    single = fast_critic.over_states(lambda x: x + 1, x, floats_per_state=floats_per_state)
    assert torch.equal(single, x + 1)
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError):  # what goes wrong in a chunk is not swallowed
        fast_critic.over_states(lambda x: 1 / 0, x, floats_per_state=floats_per_state)


def test_over_states_joins_along_the_dimension_asked_for(two_threads):
    x = torch.randn(203, 4)
    result = fast_critic.over_states(lambda x: torch.stack([x, -x]), x, floats_per_state=7_000, dim=1)
    assert torch.equal(result, torch.stack([x, -x]))


def test_in_parts_is_the_function_itself():
    """No more states at a time than asked for, in order; a tensor that is not there stays away."""
    sizes = []

    def function(x, y, nothing):
        sizes.append(len(x))
        assert len(x) == len(y) and nothing is None
        return 2 * x, x[:, 0] - y

    x, y = torch.randn(203, 4), torch.arange(203.0)
    for size, parts in ((100, [100, 100, 3]), (203, [203]), (1000, [203])):
        sizes.clear()
        doubled, difference = fast_critic.in_parts(function, x, y, None, size=size)
        assert torch.equal(doubled, 2 * x) and torch.equal(difference, x[:, 0] - y)
        assert sizes == parts


def test_chunks_change_nothing(two_threads, monkeypatch):
    """The acceptance of a step is a comparison of nearly equal numbers, yet chunks and threads change no result."""
    critic = fast_critic.FrozenCritic(make_critic())
    obs, actions = make_batch(40, 10)
    monkeypatch.setattr(fast_critic, "CACHE_FLOATS", 1)  # one state a chunk, one member at a time
    calls, forward = [], fast_critic.FrozenCritic._forward
    count = lambda self, obs, *rest: calls.append(len(obs)) or forward(self, obs, *rest)  # noqa: E731
    monkeypatch.setattr(fast_critic.FrozenCritic, "_forward", count)
    given = dict(data_actions=actions[:, 0])
    optimize = lambda: script.optimize_actions(critic, obs, actions, 4, 3, 0.05, **given)  # noqa: E731
    split = optimize()
    # one ranking, and three steps with the value at their start; for each state and each of the three members
    assert calls == [1] * (5 * 40 * 3)
    whole = lambda function, *tensors, floats_per_state, dim=0: function(*tensors)  # noqa: E731
    monkeypatch.setattr(fast_critic, "over_states", whole)
    monkeypatch.setattr(fast_critic, "CACHE_FLOATS", 10**9)
    calls.clear()
    whole = optimize()
    assert calls == [40] * 5
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)


def test_greedy_selection():
    actions = torch.randn(3, 4, ACT)
    q = torch.tensor([[0.0, 3.0, 1.0, 2.0], [-1.0, -2.0, -3.0, -4.0], [1.0, 2.0, 3.0, 4.0]])
    best = torch.stack([actions[0, 1], actions[1, 0], actions[2, 3]])
    assert torch.equal(script.select_actions(actions, q, greedy=True), best)


def test_sampled_selection_follows_equation_4_3():
    """Frequencies against softmax(q), for two states with different values in one batch."""
    q = torch.tensor([[0.0, 1.0, 2.0, -1.0], [-100.0, -99.0, -99.5, -200.0]])
    actions = torch.arange(8.0).view(2, 4, 1)
    draws = 20_000
    drawn = script.select_actions(actions.repeat(draws, 1, 1), q.repeat(draws, 1), greedy=False).view(draws, 2)
    first = torch.bincount(drawn[:, 0].long(), minlength=4).double()
    second = torch.bincount(drawn[:, 1].long() - 4, minlength=4).double()
    probabilities = torch.tensor([1.0, math.e, math.e**2, 1 / math.e], dtype=torch.float64)
    assert chi_square(first, probabilities / probabilities.sum()) < 25  # 3 degrees of freedom: p = 1.5e-5
    probabilities = torch.tensor([1.0, math.e, math.exp(0.5)], dtype=torch.float64)
    assert second[3] == 0
    assert chi_square(second[:3], probabilities / probabilities.sum()) < 22  # 2 degrees of freedom


BOTH = pytest.mark.parametrize("wrap", [lambda critic: critic, fast_critic.FrozenCritic], ids=["plain", "frozen"])


@BOTH
@pytest.mark.parametrize("replace_worst", [False, True])
def test_data_actions_are_one_more_candidate_or_the_releases_way(wrap, replace_worst):
    critic = make_critic()
    used = wrap(critic)
    obs, actions = make_batch()
    data_actions = make_batch()[1][:, 0]
    data_actions[2] = data_actions[5] = torch.nan  # states of which the data holds no action
    plain, plain_q = script.optimize_actions(used, obs, actions, 4, 0, 0.0)
    options = {"data_actions": data_actions, "replace_worst": replace_worst}
    given, given_q = script.optimize_actions(used, obs, actions, 4, 0, 0.0, **options)
    ranked, _ = script.global_optimization(used, obs, actions, 4)
    assert torch.equal(plain, ranked)
    expected = (
        ranked.clone() if replace_worst else torch.cat([ranked, ranked[:, -1:]], 1)
    )  # where there is none: the worst
    for row in (0, 1, 3, 4, 6):
        expected[row, -1] = data_actions[row]
    assert torch.equal(given, expected)
    torch.testing.assert_close(given_q, mean_q(critic, obs, expected))
    assert torch.equal(given_q[2, :4], plain_q[2])
    # and it is optimized like the others
    climbed, q = script.optimize_actions(used, obs, actions, 4, 5, 0.02, **options)
    alone = script.local_optimization(critic, obs, expected, 5, 0.02, -1.0, 1.0)
    torch.testing.assert_close((climbed, q), alone)
    assert (q[:, -1] > given_q[:, -1]).all()


@BOTH
def test_optimize_actions_is_rank_then_climb(wrap):
    critic = make_critic()
    used = wrap(critic)
    obs, actions = make_batch()
    low, high = -0.5, 0.75
    actions = actions.clamp(low, high)
    result = script.optimize_actions(used, obs, actions, 3, 4, 0.3, low, high)
    kept, _ = script.global_optimization(critic, obs, actions, 3)
    torch.testing.assert_close(result, script.local_optimization(critic, obs, kept, 4, 0.3, low, high))


@BOTH
def test_optimize_actions_leaves_the_critic_as_it_was(wrap):
    critic = make_critic()
    used = wrap(critic)
    obs, actions = make_batch()
    before = copy.deepcopy(critic.state_dict())
    result, q = script.optimize_actions(used, obs, actions, 4, 3, 0.05)
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
    assert not result.requires_grad and not q.requires_grad
    with pytest.raises(RuntimeError):
        script.optimize_actions(used, obs, actions[..., :1], 4, 3, 0.05)  # whatever happens inside
    assert all(p.requires_grad for p in critic.parameters())


# --- CRITIC ---


@pytest.mark.parametrize("num_bins", [1, 16])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("shared_head", [False, True])
def test_the_frozen_critic_is_the_critic(num_bins, layer_norm, shared_head):
    """Its hand-written backward pass against autograd, its shortcut through centred weights against LayerNorm."""
    critic = script.Critic(OBS, ACT, (16, 24, 8), 3, num_bins, layer_norm=layer_norm, shared_head=shared_head)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    obs, actions = make_batch()
    q, gradient = script.q_and_gradient(critic, obs, actions)
    frozen = script.FrozenCritic(critic)
    q_frozen, gradient_frozen = script.q_and_gradient(frozen, obs, actions)
    torch.testing.assert_close(q_frozen, q, rtol=1e-5, atol=1e-5 * q.abs().max().item())
    torch.testing.assert_close(gradient_frozen, gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())
    torch.testing.assert_close(frozen(obs, actions), critic(obs, actions), rtol=1e-5, atol=1e-5 * q.abs().max().item())


@pytest.mark.parametrize("num_bins", [1, 16])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("shared_head", [False, True])
@pytest.mark.parametrize("keep_best_of_path", [False, True])
def test_optimize_is_the_same_with_the_plain_critic(num_bins, layer_norm, shared_head, keep_best_of_path, monkeypatch):
    """All of algorithm 1, ranking, the data's action and climbing, to float32 rounding; --plain leaves it out."""
    critic = make_critic(num_bins, scale=0.5, layer_norm=layer_norm, shared_head=shared_head)
    obs, actions = make_batch(40, 8)
    data_actions = actions.flip(0)[:, 0].clone()
    data_actions[::3] = torch.nan
    settings = dict(num_samples=8, num_keep=4, num_gradient_steps=5, gradient_step_size=0.05)
    args = make_args(**settings, keep_best_of_path=keep_best_of_path)
    fast_actions, fast_q = script.optimize(critic, obs, actions, args, False, data_actions)
    with monkeypatch.context() as patch:
        patch.setattr(script, "FrozenCritic", Forbidden)
        plain_actions, plain_q = script.optimize(
            critic, obs, actions, dataclasses.replace(args, plain=True), False, data_actions
        )
    torch.testing.assert_close(fast_q, plain_q, rtol=1e-5, atol=1e-5 * plain_q.abs().max().item())
    # a step that changes Q by less than rounding may be taken by the one and not by the other
    same = torch.isclose(fast_actions, plain_actions, rtol=1e-5, atol=1e-5).all(-1)
    assert same.float().mean() >= 0.99
    assert (plain_actions[:, :-1] - script.global_optimization(critic, obs, actions, 4)[0]).abs().max() > 1e-3
    torch.testing.assert_close(
        mean_q(critic, obs, fast_actions), fast_q, rtol=1e-5, atol=1e-5 * fast_q.abs().max().item()
    )


class Forbidden:
    """In the place of `FrozenCritic`: no critic is one, and none may become one."""

    def __init__(self, critic):
        raise AssertionError("--plain made a FrozenCritic")


@pytest.mark.parametrize("num_bins", [1, 16])
def test_members_are_independent(num_bins):
    critic = make_critic(num_bins)
    obs, actions = make_batch()
    for e in range(3):
        critic.zero_grad()
        critic(obs, actions)[e].sum().backward()
        for name, parameter in critic.named_parameters():
            touched = [(gradient != 0).any().item() for gradient in parameter.grad]
            assert touched == [e == member for member in range(3)], name
    assert len(list(critic.parameters())) == 2 * 2 + 2 * 2 + 2


def test_members_start_different_and_orthogonal():
    critic = script.Critic(OBS, ACT, (32, 32, 32), 3, 16)
    gains = [math.sqrt(2), math.sqrt(2), 0.01, 0.01]
    for weight, gain in zip([*critic.weights, critic.head_weight], gains):
        assert not torch.allclose(weight[0], weight[1])
        for member in weight.detach():
            small = member @ member.T if member.shape[0] <= member.shape[1] else member.T @ member
            torch.testing.assert_close(small, gain**2 * torch.eye(len(small)), rtol=0, atol=1e-5 * gain**2)
    obs, actions = make_batch()
    q = critic(obs, actions)
    torch.testing.assert_close(q, critic.centers.mean().expand_as(q), rtol=0, atol=0.5)  # nearly constant: mid-range


@pytest.mark.parametrize("shared_head", [False, True])
def test_named_members_only(shared_head):
    critic = make_critic(shared_head=shared_head)
    obs, actions = make_batch()
    members = torch.tensor([2, 0])
    torch.testing.assert_close(critic(obs, actions, members), critic(obs, actions)[members])


def test_q_lies_within_the_bins():
    critic = make_critic(scale=50.0)
    q = critic(*make_batch(100))
    assert (q >= critic.centers[0] - 1e-4).all() and (q <= critic.centers[-1] + 1e-4).all()


# --- CAL-QL ---


@pytest.mark.parametrize("release_width", [False, True])
@pytest.mark.parametrize("low, bins", [(-100.0, 128), (-10.0, 16), (-50.0, 64)])
def test_hl_gauss_target(release_width, low, bins):
    edges = torch.linspace(low, 0, bins + 1)
    centers, width = (edges[:-1] + edges[1:]) / 2, -low / bins
    inside = torch.linspace(low + 4 * width, -4 * width, 101)
    target = script.hl_gauss_target(inside, edges, release_width)
    assert (target >= 0).all()
    torch.testing.assert_close(target.sum(-1), torch.ones(101))
    torch.testing.assert_close(target @ centers, inside, rtol=0, atol=0.01 * width)
    outside = torch.tensor([low - width * d for d in (0, 1, 10, 1e3)] + [width * d for d in (0, 1, 10, 1e3)])
    target = script.hl_gauss_target(outside, edges, release_width)
    assert target.isfinite().all()
    torch.testing.assert_close(target.sum(-1), torch.ones(8))
    assert (target.argmax(-1) == torch.tensor([0] * 4 + [bins - 1] * 4)).all()
    torch.testing.assert_close(target[[3, 7]].max(-1).values, torch.ones(2))  # far outside: all in the nearest bin


def test_hl_gauss_target_keeps_the_shape_of_the_values():
    edges = torch.linspace(-10, 0, 17)
    values = -10 * torch.rand(4, 6)
    target = script.hl_gauss_target(values, edges)
    assert target.shape == (4, 6, 16)
    torch.testing.assert_close(target[2, 3], script.hl_gauss_target(values[2, 3], edges))


def test_td_target():
    """r + gamma mask min_e Q_e(s', a'), by the quadratic's closed form."""

    class Target(Quadratic):
        def forward(self, obs, actions, members=None):
            q = super().forward(obs, actions)
            return q if members is None else q[members]

    target_critic = Target(offsets=(1.0, 2.0, 3.0), shifts=(0.0, 0.0, 0.0))
    next_obs, actions = quadratic_batch(4, 1)
    rewards, masks = torch.tensor([-1.0, 0, -1, 0]).double(), torch.tensor([1.0, 0, 1, 1]).double()
    distance = (actions[:, 0] - next_obs).square().sum(-1) / 2
    for members, offset in ((None, 1.0), (torch.tensor([2, 1]), 2.0), (torch.tensor([2]), 3.0)):
        target = script.td_target(target_critic, rewards, masks, next_obs, actions[:, 0], 0.9, members)
        torch.testing.assert_close(target, rewards + 0.9 * masks * (offset - distance))


def calql_inputs(critic, n=4, B=7):
    """Everything `calql_loss` takes after the critic, up to cql_alpha. Returns bound about half of the values."""
    obs, actions = make_batch(B, 1)
    current, following = make_batch(B, 2)[1].unbind(1)
    returns = mean_q(critic, obs, current[:, None])[:, 0] + torch.tensor([-3.0, 3.0]).repeat(B)[:B]
    target_q = -10 * torch.rand(B)
    return obs, actions[:, 0], target_q, returns, current, following, 2 * torch.rand(B, n, ACT) - 1


@pytest.mark.parametrize("members", [None, [1], [2, 0]])
@pytest.mark.parametrize("num_bins", [1, 16])
def test_calql_loss_against_its_definition(num_bins, members):
    """Equation 3.3 written out with every action repeated, one action and one state at a time."""
    critic, n = make_critic(num_bins), 4
    inputs = calql_inputs(critic, n)
    obs, actions, target_q, returns, current, following, random = inputs
    index = None if members is None else torch.tensor(members)
    loss, info = script.calql_loss(critic, *inputs, cql_alpha=0.3, cql_members=index)
    penalties, errors, bounded = [], [], []
    with torch.no_grad():
        for b in range(len(obs)):
            for e in range(3):
                q = lambda action: critic(obs[b : b + 1], action[None, None])[e, 0, 0]  # noqa: E731, B023
                if num_bins == 1:
                    errors.append((q(actions[b]) - target_q[b]) ** 2)
                else:
                    target = script.hl_gauss_target(target_q[b], critic.edges)
                    outputs = critic.outputs(obs[b : b + 1], actions[None, None, b])[e, 0, 0]
                    errors.append(-target @ torch.log_softmax(outputs, -1))
                if members is not None and e not in members:
                    continue
                entries = [q(action) for action in random[b]]
                for action in (following[b], current[b]):
                    entries += [torch.maximum(q(action), returns[b])] * n
                    bounded.append(q(action) < returns[b])
                entries.append(q(actions[b]))
                penalties.append(torch.logsumexp(torch.stack(entries), 0) - math.log(3 * n + 1) - q(actions[b]))
    td_loss, penalty = torch.stack(errors).mean(), torch.stack(penalties).mean()
    torch.testing.assert_close(info["td_loss"], td_loss)
    torch.testing.assert_close(info["cql_loss"], penalty)
    torch.testing.assert_close(loss.detach(), td_loss + 0.3 * penalty)
    rate = torch.stack(bounded).float().mean()
    assert 0 < rate < 1  # both sides of the bound were met
    torch.testing.assert_close(info["bound_rate"], rate)


def test_calql_loss_without_random_actions():
    critic = make_critic()
    inputs = calql_inputs(critic, n=0)
    obs, actions, _, returns, current, following, _ = inputs
    loss, info = script.calql_loss(critic, *inputs, cql_alpha=1.0)
    with torch.no_grad():
        q = critic(obs, torch.stack([following, current, actions], 1))
    entries = torch.cat([torch.maximum(q[..., :2], returns[:, None]), q[..., 2:]], -1)
    torch.testing.assert_close(info["cql_loss"], (torch.logsumexp(entries, -1) - math.log(3) - q[..., 2]).mean())
    assert loss.isfinite()


def test_gradients_of_the_loss_reach_the_critic_only():
    critic, target_critic, policy = make_critic(), make_critic(), script.DiffusionPolicy(OBS, ACT, 2, 8, 1, 8)
    obs, next_obs = torch.randn(2, 7, OBS)
    actions, q = script.optimize_actions(critic, obs, policy.sample(obs, 6), 3, 2, 0.1)
    current = script.select_actions(actions, q, greedy=True)
    actions, q = script.optimize_actions(critic, next_obs, policy.sample(next_obs, 6), 3, 2, 0.1)
    following = script.select_actions(actions, q, greedy=True)
    target_q = script.td_target(target_critic, -torch.ones(7), torch.ones(7), next_obs, following, 0.9)
    assert not (current.requires_grad or following.requires_grad or target_q.requires_grad)
    _, data, _, returns, _, _, random = calql_inputs(critic)
    loss, info = script.calql_loss(critic, obs, data, target_q, returns, current, following, random, 0.5)
    loss.backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in critic.parameters())
    assert all(p.grad is None for module in (target_critic, policy) for p in module.parameters())
    assert not any(value.requires_grad for value in info.values())


def test_the_penalty_reaches_the_named_members_only():
    critic = make_critic()
    inputs = calql_inputs(critic)
    gradients = []
    for alpha in (0.0, 1.0):
        loss, _ = script.calql_loss(critic, *inputs, alpha, torch.tensor([2, 0]))
        gradients.append(torch.autograd.grad(loss, list(critic.parameters())))
    for without, with_penalty in zip(*gradients):
        assert all((without[e] != 0).any() for e in range(3))  # TD reaches all
        difference = (with_penalty - without).abs().flatten(1).max(1).values
        assert difference[1] < 1e-6 and difference[0] > 1e-4 and difference[2] > 1e-4


def test_the_bound_stops_the_penalty_on_optimized_actions():
    """Where the Monte-Carlo return is above Q, Cal-QL does not push the optimized action's value down."""
    critic = make_critic()
    obs, actions, target_q, _, current, following, random = calql_inputs(critic)
    for returns, bounded in ((torch.zeros(7), True), (torch.full((7,), -20.0), False)):  # Q lies between them
        current, following = current.detach().requires_grad_(), following.detach().requires_grad_()
        loss, info = script.calql_loss(critic, obs, actions, target_q, returns, current, following, random, 1.0)
        gradients = torch.autograd.grad(loss, (current, following))
        assert info["bound_rate"] == float(bounded)
        assert all((gradient == 0).all() if bounded else (gradient != 0).any() for gradient in gradients)


# --- DATA ---


def geometric(gamma, count):
    """1 + gamma + ... of `count` terms."""
    return (1 - gamma ** np.asarray(count, float)) / (1 - gamma)


def returns_of(rewards, ends, gamma, **options):
    """Monte-Carlo returns of trajectories that end where `goals` says so, or else were cut."""
    terminals = flags([end - 1 for end in options.pop("goals", ())], len(rewards))
    return script.monte_carlo_returns(np.array(rewards, float), terminals, ends, gamma, **options)


def test_monte_carlo_returns():
    gamma = 0.9
    success = [-1.0, -1, -1, 0]  # reaches the goal with its last step
    for failure in (-math.inf, -1.0):
        for plain in (False, True):
            returns = returns_of(success, [4], gamma, goals=[4], failure=failure, plain=plain)
            np.testing.assert_allclose(returns, -geometric(gamma, [3, 2, 1, 0]), rtol=1e-6)
    for options in ({}, {"failure": -1.0}, {"failure": -1.0, "plain": True}, {"failure": -1.0, "goals": [5]}):
        np.testing.assert_allclose(returns_of([-1.0] * 5, [5], gamma, **options), np.full(5, -10.0), rtol=1e-6)
    plain = returns_of([-1.0] * 5, [5], gamma, plain=True)
    np.testing.assert_allclose(plain, -geometric(gamma, [5, 4, 3, 2, 1]), rtol=1e-6)
    rose = [-4.0, -4, -3, -2]  # above the smallest reward, and then it stays at -2: worth -4
    np.testing.assert_allclose(returns_of(rose, [4], 0.5, failure=-4.0), [-7.25, -6.5, -5.0, -4.0])
    np.testing.assert_allclose(returns_of(rose, [4], 0.5, failure=-4.0, goals=[4]), [-7.0, -6.0, -4.0, -2.0])
    np.testing.assert_allclose(returns_of(rose, [4], 0.5, plain=True), [-7.0, -6.0, -4.0, -2.0])
    np.testing.assert_allclose(returns_of([-4.0] * 3, [3], 0.5, failure=-4.0), [-8.0] * 3)


def test_a_cut_trajectory_is_worth_what_staying_is_worth():
    """Kitchen-like: -1 at the cut, where the plain sum says -1.0 and staying is worth -100."""
    rewards = [-4.0, -4, -3, -2, -2, -1, -1]
    returns = returns_of(rewards, [7], 0.99, failure=-4.0)
    assert returns[-1] == pytest.approx(-100.0)
    by_hand = [sum(0.99**i * r for i, r in enumerate(rewards[k:])) - 0.99 ** (7 - k) * 100 for k in range(7)]
    np.testing.assert_allclose(returns, by_hand, rtol=1e-6)
    assert returns_of(rewards, [7], 0.99, failure=-4.0, plain=True)[-1] == -1.0  # the release's


def test_a_break_that_only_the_states_show_ends_a_trajectory():
    """Five failed rows, a break that no flag marks, five to success: the failed are worth -100, not -8.6 to -4.9."""
    states = np.arange(24, dtype=np.float32).reshape(12, 2)
    here, there = np.delete(states, [5, 11], 0), np.delete(states, [0, 6], 0)
    rewards, terminals = np.array([0.0] * 9 + [1.0], np.float32), flags([9], 10)
    dataset = Dataset(here, np.zeros((10, ACT), np.float32), rewards, there, terminals, np.zeros(10, bool))
    buffer = script.ReplayBuffer(dataset, make_args(), torch.device("cpu"))
    np.testing.assert_allclose(buffer.mc_returns[:5], -100.0, rtol=1e-6)
    np.testing.assert_allclose(buffer.mc_returns[5:], -geometric(0.99, [4, 3, 2, 1, 0]), rtol=1e-6, atol=1e-7)


def test_the_smallest_reward_of_the_data_is_a_failures():
    """--reward-min is the range of values; were it the failure's, -1.5 would switch the rule for failures off."""
    dataset, _, _ = make_buffer()
    buffer = script.ReplayBuffer(dataset, make_args(discount=0.9, reward_min=-1.5), torch.device("cpu"))
    np.testing.assert_allclose(buffer.mc_returns[5:13], -10.0, rtol=1e-6)
    assert buffer.lowest == -1.0


def test_monte_carlo_returns_of_several_trajectories():
    """One after another, each its own: success, failure, a single row, success."""
    gamma, rewards = 0.9, np.array([-1.0, 0, -1, -1, -1, 0, -1, -1, 0], np.float32)
    returns = returns_of(rewards, [2, 5, 6, 9], gamma, failure=-1.0, goals=[2, 6, 9])
    expected = np.concatenate([-geometric(gamma, [1, 0]), [-10.0] * 3, [0.0], -geometric(gamma, [2, 1, 0])])
    np.testing.assert_allclose(returns, expected, rtol=1e-6, atol=1e-7)
    assert returns.dtype == np.float32


def flags(rows, length):
    array = np.zeros(length, bool)
    array[list(rows)] = True
    return array


@pytest.mark.parametrize(
    "terminals, timeouts, ends",
    [
        ([2, 7], [4], [3, 5, 8]), ([], [3, 7], [4, 8]), ([1], [1], [2, 8]), ([], [], [8]), ([7], [7], [8]),
        ([0], [6], [1, 7, 8]),
    ],
)  # fmt: skip
def test_trajectory_ends(terminals, timeouts, ends):
    zeros = np.zeros((8, 1), np.float32)
    dataset = Dataset(zeros, zeros, zeros[:, 0], zeros, flags(terminals, 8), flags(timeouts, 8))
    assert datasets.trajectory_ends(dataset).tolist() == ends
    dataset.next_observations = zeros + (np.arange(8) == 3)[:, None] * np.float32(1e-5)  # a jump ends one as well
    assert datasets.trajectory_ends(dataset).tolist() == sorted({*ends, 4})
    dataset.next_observations = zeros + np.float32(1e-7)  # rounding does not
    assert datasets.trajectory_ends(dataset).tolist() == ends


ENDS = [5, 6, 10, 13]  # a success, a single row, a trajectory cut by the time limit, one that the arrays' end cuts
BREAK = 8  # a row whose next observation is not the following observation, though no flag says so


def make_dataset():
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(13, 2)).astype(np.float32)
    next_observations = rng.normal(size=(13, 2)).astype(np.float32)
    for row in range(12):
        if row + 1 not in ENDS and row != BREAK:
            next_observations[row] = observations[row + 1]
    rewards = np.zeros(13, np.float32)
    rewards[4] = 1.0
    actions = rng.uniform(-1, 1, (13, ACT)).astype(np.float32)
    return Dataset(observations, actions, rewards, next_observations, flags([4, 5], 13), flags([9], 13))


def make_buffer(**kwargs):
    dataset = make_dataset()
    args = make_args(discount=0.9, **kwargs)
    return dataset, args, script.ReplayBuffer(dataset, args, torch.device("cpu"))


def make_episode(length=4, terminated=False):
    rng, last = np.random.default_rng(length), np.arange(length) == length - 1
    observations = rng.normal(size=(length + 1, 2)).astype(np.float32)
    return Dataset(
        observations=observations[:-1], next_observations=observations[1:],
        actions=rng.uniform(-1, 1, (length, ACT)).astype(np.float32), rewards=(last & terminated).astype(np.float32),
        terminals=last & terminated, timeouts=last & (not terminated),
    )  # fmt: skip


def test_replay_buffer_keeps_states_once():
    dataset, _, buffer = make_buffer()
    assert len(buffer) == 13
    assert len(buffer.states) == 13 + len(ENDS) + 1  # every observation, and the last state of each piece
    assert len(buffer.states.unique(dim=0)) == len(buffer.states)
    assert torch.equal(buffer.states[buffer.obs_index], torch.as_tensor(dataset.observations))
    assert torch.equal(buffer.states[buffer.next_index], torch.as_tensor(dataset.next_observations))
    assert buffer.next_index[0] == buffer.obs_index[1]  # kept once, not twice
    assert torch.equal(buffer.action_at[buffer.obs_index], torch.as_tensor(dataset.actions))
    without = torch.ones(len(buffer.states), dtype=bool)
    without[buffer.obs_index] = False
    assert without.sum() == 5 and buffer.action_at[without].isnan().all()
    assert torch.equal(buffer.rewards, torch.as_tensor(dataset.rewards) - 1)
    assert buffer.masks.tolist() == [1.0] * 4 + [0.0, 0.0] + [1.0] * 7  # a time limit is not terminal
    expected = np.concatenate([-geometric(0.9, [4, 3, 2, 1, 0]), [-10.0] * 8])
    np.testing.assert_allclose(buffer.mc_returns, expected, rtol=1e-6, atol=1e-7)
    index = torch.tensor([4, 0])
    assert buffer.rewards[index].tolist() == [0.0, -1.0] and buffer.masks[index].tolist() == [0.0, 1.0]
    assert torch.equal(buffer.next_index, buffer.obs_index + 1)
    assert buffer.candidates.shape == (18, 32, ACT) and (buffer.candidates == 0).all()


def test_replay_buffer_adds_episodes():
    dataset, _, buffer = make_buffer()
    states = len(buffer.states)
    failed, solved = make_episode(4), make_episode(3, terminated=True)
    buffer.add(failed)
    buffer.add(solved)
    assert len(buffer) == 13 + 4 + 3 and len(buffer.states) == states + 5 + 4 and len(buffer.action_at) == states + 9
    assert len(buffer.candidates) == states + 9
    for rows, episode in ((slice(13, 17), failed), (slice(17, 20), solved)):
        observations, actions = torch.as_tensor(episode.observations), torch.as_tensor(episode.actions)
        assert torch.equal(buffer.states[buffer.obs_index[rows]], observations)
        assert torch.equal(buffer.states[buffer.next_index[rows]], torch.as_tensor(episode.next_observations))
        assert torch.equal(buffer.action_at[buffer.obs_index[rows]], actions)
        assert buffer.action_at[buffer.next_index[rows][-1]].isnan().all()
    assert buffer.rewards[13:].tolist() == [-1.0] * 4 + [-1.0, -1.0, 0.0]
    assert buffer.masks[13:].tolist() == [1.0] * 4 + [1.0, 1.0, 0.0]
    np.testing.assert_allclose(buffer.mc_returns[13:], [-10.0] * 4 + [-1.9, -1.0, 0.0], rtol=1e-6)
    assert torch.equal(buffer.states[buffer.obs_index[:13]], torch.as_tensor(dataset.observations))  # the old rows stay


def test_replay_buffer_returns_of_the_release():
    _, _, buffer = make_buffer(release_returns=True)
    buffer.add(make_episode(4))
    np.testing.assert_allclose(buffer.mc_returns[13:], -geometric(0.9, [4, 3, 2, 1]), rtol=1e-6)
    np.testing.assert_allclose(buffer.mc_returns[5:13], -10.0, rtol=1e-6)  # of the offline ones the flag says nothing


@pytest.mark.parametrize("mixing_ratio, share", [(0.5, 32), (0.25, 16), (1.0, 64), (0.0, 0)])
def test_replay_buffer_mixes(mixing_ratio, share):
    _, _, buffer = make_buffer(mixing_ratio=mixing_ratio)
    index = buffer.sample_index((40, 64))
    assert index.shape == (40, 64) and set(index.flatten().tolist()) == set(range(13))
    buffer.add(make_episode(6))
    index = buffer.sample_index((40, 64))
    assert index.shape == (40, 64)
    assert ((index < 13).sum(1) == share).all()
    seen = set(index.flatten().tolist())  # and every row is drawn
    assert seen == set(range(13) if share else ()) | set(range(13, 19) if share < 64 else ())
    uniform = torch.bincount(buffer.sample_index((400, 64), mixed=False).flatten(), minlength=19).double()
    assert chi_square(uniform, torch.full((19,), 1 / 19, dtype=torch.float64)) < 50  # 18 degrees of freedom: p = 8e-5


def test_replay_buffer_round_trip():
    """Its online episodes are all that a checkpoint holds of it: added again, they make the same buffer."""
    buffer = make_buffer()[2]
    buffer.add(make_episode(4))
    buffer.add(make_episode(3, terminated=True))
    saved = buffer.data[1:]
    assert [len(episode) for episode in saved] == [4, 3]  # the online part only
    restored = make_buffer()[2]
    for episode in saved:
        restored.add(Dataset(**{name: getattr(episode, name).copy() for name in ARRAYS}))
    names = [name for name, value in vars(buffer).items() if torch.is_tensor(value)]
    assert len(names) == 10
    for name in names:
        torch.testing.assert_close(getattr(restored, name), getattr(buffer, name), rtol=0, atol=0, equal_nan=True)
    assert restored.num_offline == buffer.num_offline == 13
    assert torch.equal(restored.sample_index((2, 8)) >= 13, torch.tensor([[False] * 4 + [True] * 4] * 2))
    restored.add(make_episode(2))  # later states are numbered on from there
    assert restored.next_index[-1] == len(restored.states) - 1


class MarkingPolicy(script.DiffusionPolicy):
    """Its samples tell the state they were drawn for, the noise they were drawn with, and when (`time`)."""

    time = 1

    def sample(self, obs, num_samples, noise=None):
        noise = self.draw_noise(obs, num_samples) if noise is None else noise
        of_state = obs[:, None, :1].expand(-1, num_samples, -1)
        return torch.cat([of_state, noise[:, 0, :, :1], torch.full_like(of_state, self.time)], -1)


def check_drawn(candidates, states, buffer):
    """The rows are their own state's, and every one of them was drawn with noise of its own."""
    assert torch.equal(candidates[states, :, 0], buffer.states[states, :1].expand(-1, candidates.shape[1]))
    assert candidates[states, :, 1].unique().numel() == candidates[states, :, 1].numel()


def test_refresh_candidates_changes_the_given_states_only():
    samples = 3
    _, _, buffer = make_buffer(num_samples=samples)
    policy = MarkingPolicy(2, 3, 2, 8, 1, 8)
    first = torch.tensor([0, 4, 9, 12])
    script.refresh_candidates(policy, buffer, first)
    assert buffer.candidates.shape == (18, samples, 3)
    check_drawn(buffer.candidates, first, buffer)
    never = torch.ones(18, dtype=bool)
    never[first] = False
    assert (buffer.candidates[never] == 0).all()
    before = buffer.candidates.clone()
    buffer.add(make_episode(4))  # five states more
    second, policy.time = torch.tensor([4, 20]), 2
    script.refresh_candidates(policy, buffer, second)
    candidates = buffer.candidates
    assert candidates.shape == (23, samples, 3)
    check_drawn(candidates, second, buffer)
    assert (candidates[second, :, 2] == 2).all()
    same = torch.ones(18, dtype=bool)
    same[4] = False
    assert torch.equal(candidates[:18][same], before[same])
    assert (candidates[[18, 19, 21, 22]] == 0).all()


def test_refresh_candidates_of_many_states(two_threads):
    """More states than are drawn at a time: all are drawn, in order."""
    _, _, buffer = make_buffer(num_samples=2)
    buffer.add(make_episode(9_000))
    policy, states = MarkingPolicy(2, 3, 2, 8, 1, 8), torch.randperm(len(buffer.states))[:8_500]
    script.refresh_candidates(policy, buffer, states)
    candidates = buffer.candidates
    assert torch.equal(candidates[states, :, 0], buffer.states[states, :1].expand(-1, 2))
    assert candidates[states, :, 1].unique().numel() > 0.999 * 17_000  # float32 repeats itself now and then
    assert (candidates[..., 2].sum() == 17_000).all()


def test_refresh_candidates_of_no_state():
    """An episode so short that no update follows it: nothing is drawn."""
    _, _, buffer = make_buffer(num_samples=2)
    nothing = torch.zeros(0, dtype=torch.long)
    script.refresh_candidates(script.DiffusionPolicy(2, ACT, 2, 8, 1, 8).eval(), buffer, nothing)
    assert torch.equal(buffer.candidates, torch.zeros(18, 2, ACT))


def test_refreshed_candidates_are_samples_of_the_policy(two_threads):
    """The same as `sample` itself makes of the same noise."""
    _, _, buffer = make_buffer(num_samples=6)
    policy, every = script.DiffusionPolicy(2, ACT, 5, 16, 2, 8).eval(), torch.arange(18)
    torch.manual_seed(3)
    script.refresh_candidates(policy, buffer, every)
    torch.manual_seed(3)
    torch.testing.assert_close(buffer.candidates, policy.sample(buffer.states, 6))


# --- THE REST OF THE RECIPE ---


def test_choose_greedy_distillation():
    args = make_args(greedy_below_std=1.0)
    measured = lambda std: [0.5 * std, std, 1.5 * std]  # noqa: E731
    choose = script.choose_greedy_distillation
    assert choose(args, measured(0.99)) and not choose(args, measured(1.01))
    args = make_args(greedy_below_std=3.0)
    assert choose(args, measured(2.9)) and not choose(args, measured(3.1))
    for std in (0.1, 10.0):  # said by hand
        assert choose(make_args(distill_selection="greedy"), measured(std))
        assert not choose(make_args(distill_selection="sample"), measured(std))
    for greedy in (True, False):  # nothing was measured
        assert choose(make_args(greedy_rollouts=greedy), []) == greedy


def test_cloning_lr():
    args = make_args(policy_lr=3e-4, policy_warmup=100, num_cloning_steps=1100)
    rates = np.array([script.cloning_lr(step, args) for step in range(1100)])
    np.testing.assert_allclose(rates[:100], 3e-4 * np.arange(1, 101) / 100)  # linear, never 0
    np.testing.assert_allclose(rates[100:], 1.5e-4 * (1 + np.cos(np.pi * np.arange(1000) / 1000)))
    assert rates.max() == pytest.approx(3e-4) and rates[600] == pytest.approx(1.5e-4)
    assert 0 <= rates[-1] < 1e-8 and (np.diff(rates[100:]) < 0).all()
    without = make_args(policy_lr=1.0, policy_warmup=0, num_cloning_steps=10)
    assert script.cloning_lr(0, without) == 1.0
    longer = make_args(policy_lr=1.0, policy_warmup=20, num_cloning_steps=10)  # a run shorter than its warm-up
    assert script.cloning_lr(9, longer) == 0.5 and script.cloning_lr(20, longer) == 1.0


def test_gradient_step():
    """One step down the loss, old gradients forgotten, and the average a tenth nearer to where the step led."""
    average, online = make_critic(), make_critic()
    start, before = ([p.detach().clone() for p in module.parameters()] for module in (average, online))
    optimizer = torch.optim.SGD(online.parameters(), 0.5)
    for parameter in online.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    loss = sum((parameter**2).sum() for parameter in online.parameters()) / 2  # its gradient is the parameter
    script.gradient_step(loss, optimizer, online, average, 0.1)
    for a, b, new, mean in zip(start, before, online.parameters(), average.parameters()):
        torch.testing.assert_close(new.detach(), b / 2)
        torch.testing.assert_close(mean.detach(), 0.9 * a + 0.1 * b / 2)


# --- DIFFUSION POLICY ---


def test_samples_depend_on_their_own_state_and_noise():
    policy = script.DiffusionPolicy(OBS, ACT, 5, 16, 2, 8).eval()
    obs, noise = torch.randn(4, OBS), torch.randn(4, 6, 3, ACT)
    actions = policy.sample(obs, 3, noise)
    assert actions.shape == (4, 3, ACT) and (actions.abs() <= 1).all() and not actions.requires_grad
    for b in range(4):
        for i in range(3):
            alone = policy.sample(obs[b : b + 1], 1, noise[b : b + 1, :, i : i + 1])[0, 0]
            torch.testing.assert_close(alone, actions[b, i])
    drawn = policy.sample(obs[:1].expand(50, -1), 4).view(-1, ACT)  # anew, without noise given
    assert len(drawn.unique(dim=0)) > 100


@pytest.mark.parametrize("clip", [True, False])
def test_where_the_chain_is_clipped(clip, monkeypatch):
    """Data from N(0.5, 0.3^2) and its exact denoiser: clipped at its end only, the chain keeps the data's mean and most
    of its spread; after each step, as in the release and by default, less of both. Either way it stays in the box."""
    policy = script.DiffusionPolicy(OBS, 1, 5, 16, 1, 8, clip=clip)
    assert script.Args().clip_steps and script.DiffusionPolicy(OBS, 1).clip

    def denoiser(step, noisy):  # E[noise | noisy] of that Gaussian
        alpha_bar = policy.alpha_bars[step.long()]
        return (1 - alpha_bar).sqrt() * (noisy - 0.5 * alpha_bar.sqrt()) / (0.09 * alpha_bar + 1 - alpha_bar)

    steps = torch.arange(5.0)[:, None]
    monkeypatch.setattr(policy, "first_layer_parts", lambda obs: (torch.zeros(len(obs), 1), steps))
    monkeypatch.setattr(policy, "predict_noise", denoiser)
    actions = policy.sample(torch.randn(100, OBS), 400)
    assert actions.abs().max() <= 1
    mean, spread = actions.mean().item(), actions.std().item()
    assert mean < 0.475 and spread < 0.25 if clip else 0.485 < mean < 0.505 and spread > 0.26


def test_diffusion_loss_draws_steps_and_noise(monkeypatch):
    """Steps uniform over all K; and noise standard normal: a network that predicts 0 has loss E|noise|^2 = A."""
    policy = script.DiffusionPolicy(OBS, ACT, 5, 16, 1, 8, dropout=0.0)
    nn.init.zeros_(policy.last.weight)
    steps, draw = [], torch.randint
    monkeypatch.setattr(torch, "randint", lambda *a, **k: steps.append(draw(*a, **k)) or steps[-1])
    with torch.no_grad():
        loss = policy.loss(torch.randn(50_000, OBS), torch.rand(50_000, ACT))
    assert loss.item() == pytest.approx(ACT, abs=0.06)  # five standard errors
    assert steps[0].min() == 0 and steps[0].max() == 4
    assert chi_square(torch.bincount(steps[0]).double(), torch.full((5,), 0.2, dtype=torch.float64)) < 28  # p = 1.3e-5


@pytest.mark.parametrize("t", range(5))
def test_diffusion_loss_adds_the_schedules_noise(t, monkeypatch):
    """a_t = sqrt(alpha-bar) a + sqrt(1 - alpha-bar) noise, and the loss is the squared norm, meaned over the batch."""
    policy = script.DiffusionPolicy(OBS, ACT, 5, 16, 1, 8, dropout=0.0)
    seen = []
    predict_zero = lambda obs_time, noisy: [seen.append(noisy), torch.zeros_like(noisy)][1]  # noqa: E731
    monkeypatch.setattr(policy, "predict_noise", predict_zero)
    actions, noise = torch.rand(4, ACT), torch.randn(4, ACT)
    loss = policy.loss(torch.randn(4, OBS), actions, torch.full((4,), t), noise)
    alpha_bar = math.prod(1 - beta for beta in script.cosine_beta_schedule(5).tolist()[: t + 1])
    torch.testing.assert_close(seen[0], math.sqrt(alpha_bar) * actions + math.sqrt(1 - alpha_bar) * noise)
    torch.testing.assert_close(loss, noise.square().sum() / 4)


def test_dropout_in_training_only():
    policy = script.DiffusionPolicy(OBS, ACT, 5, 16, 1, 8, dropout=0.5)
    obs, noise = torch.randn(4, OBS), torch.randn(4, 6, 3, ACT)
    assert not torch.equal(policy.train().sample(obs, 3, noise), policy.sample(obs, 3, noise))
    assert torch.equal(policy.eval().sample(obs, 3, noise), policy.sample(obs, 3, noise))


def test_policy_keeps_both_modes():
    """Two joint modes, (0.7, 0.7) and (-0.7, -0.7), equally often: cloned, both are kept, not mixed nor averaged.

    Ten denoising steps: with the usual five even the exact denoiser leaves 4 % of the samples between the modes.
    """
    policy = script.DiffusionPolicy(2, 2, 10, hidden=32, blocks=1, time_dim=16, dropout=0.0)
    average = copy.deepcopy(policy).requires_grad_(False).eval()
    optimizer = torch.optim.Adam(policy.parameters())
    args = make_args(policy_lr=5e-3, policy_warmup=50, num_cloning_steps=1500)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = script.cloning_lr(step, args)
        sign = torch.randint(2, (128, 1)) * 2.0 - 1
        script.policy_update(policy, average, optimizer, torch.randn(128, 2), 0.7 * sign.expand(-1, 2), ema_rate=0.02)
    samples = average.sample(torch.randn(400, 2), 10).view(-1, 2)
    near = [((samples - mode * 0.7).abs() < 0.25).all(1).float().mean().item() for mode in (1, -1)]
    assert all(0.3 < share < 0.7 for share in near), near
    assert sum(near) > 0.93, near
    middle = (samples.abs() < 0.35).any(1).float().mean().item()
    mixed = (samples.prod(1) < 0).float().mean().item()
    assert middle < 0.06 and mixed < 0.01, (middle, mixed)
