"""The flow policy: its loss and its sampler against closed forms, and that it learns what a flow can learn."""

import copy

import pytest
import torch
from torch import nn

import parl_diffusion_calql
import parl_flow_calql as script
from benchmarks.tasks.dataset import Dataset

OBS, ACT = 3, 2


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_policy(num_steps=10, hidden=16, obs_dim=OBS, dropout=0.0):
    return script.FlowPolicy(obs_dim, ACT, num_steps, hidden, blocks=1, time_dim=16, dropout=dropout)


def with_field(policy, field, monkeypatch):
    """The policy with the velocity field(x, t) in place of its network's; returns the (x, t) it was asked for."""
    seen = []
    monkeypatch.setattr(policy, "first_layer_parts", lambda obs, t: (obs.new_zeros(len(obs), 1), t[:, None]))

    def velocity(obs_and_time, x):
        seen.append((x, obs_and_time[..., 0]))
        return field(x, obs_and_time)

    monkeypatch.setattr(policy, "velocity", velocity)
    return seen


# --- the loss ---
def test_the_loss_is_that_of_the_straight_path(monkeypatch):
    """At x_t = (1 - t) noise + t a the target is a - noise; the squared norm, meaned over the batch."""
    policy = make_policy()
    seen = with_field(policy, lambda x, t: 3 * x + t, monkeypatch)
    actions, noise, t = torch.rand(5, ACT) * 2 - 1, torch.randn(5, ACT), torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])
    loss = policy.loss(torch.randn(5, OBS), actions, t, noise)
    expected = 0.0
    for a, z, s in zip(actions.tolist(), noise.tolist(), t.tolist()):
        x = [(1 - s) * z[i] + s * a[i] for i in range(ACT)]
        expected += sum((3 * x[i] + s - (a[i] - z[i])) ** 2 for i in range(ACT)) / 5
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(seen[0][0][0], noise[0])  # at t = 0 the noise, at t = 1 the action
    torch.testing.assert_close(seen[0][0][-1], actions[-1])


def test_the_loss_draws_times_and_noise(monkeypatch):
    """t uniform in [0, 1), noise standard normal and independent of t: a field of 0 has loss E|a - noise|^2."""
    policy = make_policy()
    seen = with_field(policy, lambda x, t: torch.zeros_like(x), monkeypatch)
    action, n = torch.tensor([0.5, -0.5]), 50_000
    loss = policy.loss(torch.randn(n, OBS), action.expand(n, -1))
    assert loss.item() == pytest.approx(0.5 + ACT, abs=0.08)  # five standard errors
    x, t = seen[0]
    assert t.min() >= 0 and t.max() < 1
    counts = torch.histc(t, 10, 0, 1)
    assert ((counts - n / 10) ** 2 / (n / 10)).sum() < 41  # chi-square, 9 degrees of freedom: p = 5e-6
    noise = (x - t[:, None] * action) / (1 - t[:, None])
    late = noise[(t > 0.5) & (t < 0.99)]
    assert noise[t < 0.5].std().item() == pytest.approx(1, abs=0.02) and late.std().item() == pytest.approx(1, abs=0.02)


# --- the sampler ---
@pytest.mark.parametrize("num_steps", [1, 10])
def test_the_field_of_a_single_action_leads_there(num_steps, monkeypatch):
    """All paths to one action mu have the velocity (mu - x) / (1 - t): Euler's last step lands on mu, for any K."""
    policy, mu = make_policy(num_steps), torch.tensor([0.3, -0.8])
    seen = with_field(policy, lambda x, t: (mu - x) / (1 - t), monkeypatch)
    noise = torch.randn(4, 3, ACT)
    actions = policy.sample(torch.randn(4, OBS), 3, noise)
    torch.testing.assert_close(actions, mu.expand(4, 3, -1), atol=1e-5, rtol=0)
    assert len(seen) == num_steps
    for i, (x, t) in enumerate(seen):  # on the way the straight lines from the noise
        torch.testing.assert_close(t.flatten(), torch.full_like(t.flatten(), i / num_steps))
        torch.testing.assert_close(x, (1 - i / num_steps) * noise + i / num_steps * mu, atol=1e-5, rtol=1e-5)


def test_actions_are_clipped_at_the_end_alone(monkeypatch):
    """A path that goes out to 3 and comes back to 0.5 is not cut short; one that ends outside is."""
    policy = make_policy(num_steps=2)
    with_field(policy, lambda x, t: torch.where(t < 0.5, 6.0, -5.0).expand_as(x), monkeypatch)
    noise = torch.tensor([[[0.0, 2.0]]])
    torch.testing.assert_close(policy.sample(torch.randn(1, OBS), 1, noise), torch.tensor([[[0.5, 1.0]]]))


def test_samples_depend_on_their_own_state_and_noise():
    policy = make_policy().eval()
    obs, noise = torch.randn(4, OBS), policy.draw_noise(torch.zeros(4, OBS), 3)
    actions = policy.sample(obs, 3, noise)
    assert actions.shape == noise.shape == (4, 3, ACT) and (actions.abs() <= 1).all()
    for b in range(4):
        for i in range(3):
            alone = policy.sample(obs[b : b + 1], 1, noise[b : b + 1, i : i + 1])[0, 0]
            torch.testing.assert_close(alone, actions[b, i])
    drawn = policy.sample(obs[:1].expand(50, -1), 4).view(-1, ACT)  # anew, without noise given
    assert len(drawn.unique(dim=0)) > 100


def test_the_first_layer_in_parts_is_the_whole_one():
    """The parts of time, observation and action add up to the linear layer of all three side by side."""
    policy = make_policy()
    obs, x, t = torch.randn(4, OBS), torch.randn(4, ACT), torch.rand(4)
    h = policy.first(torch.cat([policy.time_features(t), obs, x], -1))
    for block in policy.blocks:
        h = block(h)
    obs_part, time_part = policy.first_layer_parts(obs, t)
    torch.testing.assert_close(policy.velocity(obs_part + time_part, x), policy.last(nn.functional.silu(h)))


def test_dropout_in_training_only():
    policy = make_policy(dropout=0.5)
    obs, noise = torch.randn(4, OBS), torch.randn(4, 3, ACT)
    assert not torch.equal(policy.train().sample(obs, 3, noise), policy.sample(obs, 3, noise))
    assert torch.equal(policy.eval().sample(obs, 3, noise), policy.sample(obs, 3, noise))


# --- gradients ---
def test_gradients_come_from_the_loss_alone(monkeypatch):
    """Samples carry none, and a round of distilling sends none to the critic: the targets are data."""
    policy = make_policy()
    assert not policy.sample(torch.randn(2, OBS), 3).requires_grad
    seen, loss = [], script.FlowPolicy.loss
    monkeypatch.setattr(script.FlowPolicy, "loss", lambda self, obs, a: seen.append((obs, a)) or loss(self, obs, a))
    args = script.Args(batch_size=8, num_samples=4, num_keep=2, num_gradient_steps=2, num_bins=8, plain=True)
    critic = script.Critic(OBS, ACT, (8,), 2, 8, -10.0)
    nn.init.normal_(critic.head_weight)
    average = copy.deepcopy(policy).requires_grad_(False).eval()
    optimizer = torch.optim.SGD(policy.parameters(), 0.1)
    buffer = script.ReplayBuffer(made_up_data(), args, torch.device("cpu"))
    before = copy.deepcopy(policy)
    script.distill(policy, average, optimizer, critic, buffer, 1, True, args)
    (obs, targets), *_ = seen
    assert len(seen) == 1 and not obs.requires_grad and not targets.requires_grad
    assert all(parameter.grad is None for parameter in critic.parameters())
    for new, old in zip(policy.parameters(), before.parameters()):
        torch.testing.assert_close(new.detach(), (old - 0.1 * new.grad).detach())


def made_up_data():
    rng, rows = torch.Generator().manual_seed(0), 24
    path = torch.randn(rows + 1, OBS, generator=rng).numpy()
    actions = (torch.rand(rows, ACT, generator=rng) * 2 - 1).numpy()
    no = torch.zeros(rows, dtype=torch.bool).numpy()
    return Dataset(path[:-1], actions, actions[:, 0] * 0, path[1:], no, no, "here")


# --- what it learns ---
def cloned(policy, draw, num_steps, lr=5e-3):
    """The averaged copy of the policy after cloning the actions draw(128) -> (128, A), whatever the state."""
    average = copy.deepcopy(policy).requires_grad_(False).eval()
    optimizer = torch.optim.Adam(policy.parameters())
    args = script.Args(policy_lr=lr, policy_warmup=50, num_cloning_steps=num_steps)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = script.cloning_lr(step, args)
        obs = torch.randn(128, policy.obs_dim)
        script.policy_update(policy, average, optimizer, obs, draw(128), ema_rate=0.02)
    return average


def test_of_one_gaussian_it_learns_the_exact_marginal_velocity():
    """Actions N(mu, sigma^2): E[a - noise | x_t = x] = mu + (t sigma^2 - (1 - t)) / v (x - t mu), where
    v = (1 - t)^2 + t^2 sigma^2 is the variance of x_t; a regression of jointly normal variables."""
    mu, sigma = torch.tensor([0.3, -0.4]), 0.4
    policy = cloned(make_policy(hidden=32, obs_dim=1), lambda n: mu + sigma * torch.randn(n, ACT), 1000)
    t = torch.linspace(0.05, 0.95, 10)[:, None]
    variance = (1 - t) ** 2 + t**2 * sigma**2
    x = t * mu + variance.sqrt() * torch.tensor([[-1.5], [-0.5], [0.5], [1.5]])[:, None]  # (4, 10, A)
    exact = mu + (t * sigma**2 - (1 - t)) / variance * (x - t * mu)
    obs_part, time_part = policy.first_layer_parts(torch.zeros(10, 1), t[:, 0])
    error = (policy.velocity(obs_part + time_part, x) - exact).square().mean().sqrt()
    assert error < 0.15 * exact.square().mean().sqrt(), (error, exact.square().mean().sqrt())
    samples = policy.sample(torch.zeros(4000, 1), 1)[:, 0]
    inside = 0.4 * torch.randn(20_000, ACT) + mu  # clipped as samples are
    torch.testing.assert_close(samples.mean(0), inside.clamp(-1, 1).mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(samples.std(0), inside.clamp(-1, 1).std(0), atol=0.06, rtol=0)


def test_policy_keeps_both_modes():
    """Two joint modes, (0.7, 0.7) and (-0.7, -0.7), equally often: cloned, both are kept, not mixed nor averaged."""
    draw = lambda n: (0.7 * (torch.randint(2, (n, 1)) * 2.0 - 1)).expand(-1, 2)  # noqa: E731
    average = cloned(make_policy(hidden=32, obs_dim=2), draw, 1000)
    samples = average.sample(torch.randn(400, 2), 10).view(-1, 2)
    near = [((samples - mode * 0.7).abs() < 0.25).all(1).float().mean().item() for mode in (1, -1)]
    assert all(0.3 < share < 0.7 for share in near), near
    assert sum(near) > 0.93, near
    middle = (samples.abs() < 0.35).any(1).float().mean().item()
    mixed = (samples.prod(1) < 0).float().mean().item()
    assert middle < 0.06 and mixed < 0.01, (middle, mixed)


def test_a_flow_depends_on_its_state():
    """Where the action is the state's: cloned, the samples follow it."""
    policy = make_policy(hidden=32, obs_dim=2)
    average = copy.deepcopy(policy).requires_grad_(False).eval()
    optimizer = torch.optim.Adam(policy.parameters(), 5e-3)
    for _ in range(600):
        obs = torch.rand(128, 2) * 1.6 - 0.8
        script.policy_update(policy, average, optimizer, obs, obs.flip(1), ema_rate=0.02)
    obs = torch.rand(300, 2) * 1.6 - 0.8
    error = (average.sample(obs, 2) - obs.flip(1)[:, None]).abs().mean()
    assert error < 0.1, error


def test_nothing_but_the_policy_differs_from_the_diffusion_script():
    """The same fields in the same order and values, but for the number of steps and their clipping; and functions.

    With chunks the diffusion policy is wider and cloned for longer, in bfloat16 products, which flow does without.
    """
    other = parl_diffusion_calql
    ours, theirs = script.Args.__dataclass_fields__, other.Args.__dataclass_fields__
    names = [name.replace("flow_steps", "diffusion_steps") for name in ours]
    assert names == [name for name in theirs if name != "clip_steps"]
    same = [name for name in ours if name != "flow_steps"]
    assert all(getattr(script.Args(), name) == getattr(other.Args(), name) for name in same)
    presets = {family: {k: v for k, v in p.items() if k != "flow_steps"} for family, p in script.PRESETS.items()}
    clone = dict(policy_hidden=192, num_cloning_steps=12_000)
    chunked = {k: v for k, v in other.PRESETS["laptop-chunk"].items() if k != "matmul_precision"} | clone
    assert presets == other.PRESETS | {"laptop-chunk": chunked} and script.Args().flow_steps == 10
