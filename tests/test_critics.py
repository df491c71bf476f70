"""The critics of IQL and RLPD: the release's numbers, closed forms, and which actions and transitions they look at."""

import dataclasses

import numpy as np
import pytest
import torch
from test_reference import Vectors, check, critic_leaves, make_critic

import parl_diffusion_iql as iql
import parl_diffusion_rlpd as rlpd
from benchmarks.tasks.dataset import Dataset

OBS, ACT = 5, 3


# --- IQL ---


def make_value(vectors):
    """The release's value network as a Critic of one member without actions."""
    tree = vectors.tree("value")
    hidden = [tree[f"network.Dense_{i}.kernel"].shape[1] for i in range(2)]
    value = iql.Critic(OBS, 0, hidden, ensemble_size=1, num_bins=1, shared_head=True)
    leaves = critic_leaves(value)
    assert len(leaves) == len(tree)
    with torch.no_grad():
        for name, parameter in leaves:
            parameter.copy_(tree[name].view(parameter.shape))
    return value


@pytest.mark.parametrize("name", ["iql_dist", "iql_mse"])
def test_losses_and_gradients_of_the_release(name):
    v = Vectors(name)
    critic, target, value = make_critic(v), make_critic(v, "target_critic"), make_value(v)
    check(iql.value_of(value, v["obs"]), v["v"], what="V(s)")
    check(iql.value_of(value, v["next_obs"]), v["next_v"], what="V(s')")
    batch = [v[key] for key in ("obs", "actions", "rewards", "masks", "next_obs", "discount", "expectile")]
    loss, info = iql.iql_loss(critic, target, value, *batch, release_width=True)
    check(info["value_loss"], v["value_loss"], what="value loss")
    check(info["td_loss"], v["td_loss"], what="TD loss")
    check(info["target_q"], v["td_target"].mean(), what="TD target")
    check(info["q_data"], v["q_pred_mean"], what="Q")
    loss.backward()
    for network, tree in ((critic, "grad_critic"), (value, "grad_value")):
        for leaf, parameter in critic_leaves(network):
            expected = v.tree(tree)[leaf]
            check(parameter.grad.view(expected.shape), expected, 2e-5, f"{tree}.{leaf}")
    assert all(parameter.grad is None for parameter in target.parameters())


def test_expectile_loss_of_the_release():
    v = Vectors("iql_expectile")
    for tau in (0.5, 0.7, 0.9):
        check(iql.expectile_loss(v["diff"], tau), v[f"loss_tau0p{round(10 * tau)}"], what=f"tau {tau}")


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.9])
def test_the_loss_is_least_at_the_expectile(tau):
    """The tau-expectile m of a sample solves tau E(x - m)+ = (1 - tau) E(m - x)+; found here by bisection."""
    sample = torch.tensor(np.random.default_rng(0).gamma(2.0, size=2000))
    low, high = sample.min(), sample.max()
    for _ in range(60):
        m = (low + high) / 2
        excess = tau * (sample - m).clamp(min=0).mean() - (1 - tau) * (m - sample).clamp(min=0).mean()
        low, high = (m, high) if excess > 0 else (low, m)
    v = m.clone().requires_grad_()
    iql.expectile_loss(sample - v, tau).mean().backward()
    assert abs(v.grad.item()) < 1e-9  # and the loss is convex
    assert (m > sample.mean()) == (tau > 0.5) or tau == 0.5 and abs(m - sample.mean()) < 1e-6


class NoPolicy:
    """Whatever is asked of it, it raises."""

    def __getattr__(self, name):
        raise AssertionError(f"the critic's update asked the policy for {name}")


def make_buffer(module, args, rows=60):
    rng = np.random.default_rng(0)
    states = rng.normal(size=(3, 21, OBS)).astype(np.float32)
    dataset = Dataset(
        observations=states[:, :-1].reshape(rows, OBS), next_observations=states[:, 1:].reshape(rows, OBS),
        actions=rng.uniform(-1, 1, (rows, ACT)).astype(np.float32), rewards=(rng.random(rows) < 0.1).astype(np.float32),
        terminals=np.zeros(rows, bool), timeouts=np.arange(1, rows + 1) % 20 == 0,
    )  # fmt: skip
    return module.ReplayBuffer(dataset, args, torch.device("cpu"))


def iql_networks(args):
    bins = args.num_bins if args.critic_loss == "hl_gauss" else 1
    critic = iql.Critic(OBS, ACT, (16, 16), args.ensemble_size, bins, -100.0)
    value = iql.Critic(OBS, 0, (16, 16), 1, 1)
    optimizer = torch.optim.Adam([*critic.parameters(), *value.parameters()], 1e-3)
    return critic, iql.copy.deepcopy(critic), value, optimizer


@pytest.mark.parametrize("loss", ["hl_gauss", "mse"])
def test_no_policy_sample_enters_iqls_critic(loss, monkeypatch):
    """A policy that raises when sampled goes unnoticed, and so would any action optimization."""
    monkeypatch.setattr(iql, "DiffusionPolicy", NoPolicy)
    for name in ("optimize", "optimize_actions", "refresh_candidates", "global_optimization", "local_optimization"):
        monkeypatch.setattr(iql, name, lambda *args, name=name, **kwargs: pytest.fail(f"{name} was called"))
    args = dataclasses.replace(iql.Args(), ensemble_size=3, num_bins=16, critic_loss=loss)
    buffer, networks = make_buffer(iql, args), iql_networks(args)
    before = [p.clone() for network in networks[:3] for p in network.parameters()]
    info = iql.critic_update(*networks, buffer, torch.arange(8) * 5, args)
    after = [p for network in networks[:3] for p in network.parameters()]
    assert sum(not torch.equal(a, b) for a, b in zip(before, after)) > len(after) / 2
    assert set(info) == {"td_loss", "value_loss", "critic_loss", "q_data", "v_data", "target_q"}
    assert all(torch.isfinite(part) for part in info.values())


def test_iqls_critic_looks_at_the_datas_actions_only():
    """Another action in a row that is not in the batch changes nothing; in a row of the batch it does."""
    args = dataclasses.replace(iql.Args(), ensemble_size=2, num_bins=16)
    index, results = torch.tensor([3, 7]), []
    for changed in (None, 20, 7):
        torch.manual_seed(0)
        buffer, networks = make_buffer(iql, args), iql_networks(args)
        if changed is not None:
            buffer.action_at[buffer.obs_index[changed]] *= -1
        results.append(iql.critic_update(*networks, buffer, index, args)["td_loss"])
    assert results[0] == results[1] != results[2]


def test_iql_learns_the_best_return_of_the_data():
    """One state, two actions worth -1 and -4: V's expectile lies near the better one, and each Q at its own reward."""
    torch.manual_seed(0)
    critic = iql.Critic(1, 1, (32,), 2, 1)
    target, value = iql.copy.deepcopy(critic), iql.Critic(1, 0, (32,), 1, 1)
    optimizer = torch.optim.Adam([*critic.parameters(), *value.parameters()], 3e-3)
    obs, actions = torch.zeros(64, 1), torch.tensor([[-1.0], [1.0]]).repeat(32, 1)
    rewards = torch.tensor([-4.0, -1.0]).repeat(32)
    for _ in range(1500):
        loss, _ = iql.iql_loss(critic, target, value, obs, actions, rewards, torch.zeros(64), obs, 0.99, 0.9)
        iql.gradient_step(loss, optimizer, critic, target, 0.05)
    q = critic(obs[:2], actions[:2, None])[..., 0].mean(0)
    torch.testing.assert_close(q, torch.tensor([-4.0, -1.0]), atol=0.1, rtol=0)
    expectile = 0.9 * -1 + 0.1 * -4  # of two equally frequent ones
    assert iql.value_of(value, obs[:1]).item() == pytest.approx(expectile, abs=0.1)


# --- RLPD ---


def test_rlpds_target_is_the_minimum_of_a_random_pair(monkeypatch):
    """Pairs without repetition, drawn anew each update, all of them in the long run; the target is their minimum."""
    sizes = dict(num_bins=16, critic_hidden=(16,), num_samples=4, num_keep=2, num_gradient_steps=1)
    args = dataclasses.replace(rlpd.Args(), **sizes)
    buffer, critic = make_buffer(rlpd, args), rlpd.Critic(OBS, ACT, (16,), args.ensemble_size, 16)
    with torch.no_grad():  # the first weights make all members nearly equal
        critic.head_weight.normal_()
    target, optimizer = rlpd.copy.deepcopy(critic), torch.optim.SGD(critic.parameters(), 0.0)
    buffer.candidates, index = torch.rand(len(buffer.states), 4, ACT) * 2 - 1, torch.arange(8)
    seen, td_target = [], rlpd.td_target

    def watch(target_critic, rewards, masks, next_obs, next_actions, discount, members):
        result = td_target(target_critic, rewards, masks, next_obs, next_actions, discount, members)
        q = target_critic(next_obs, next_actions[:, None])[..., 0]
        assert len(members) == 2 and members[0] != members[1]
        torch.testing.assert_close(result, rewards + discount * masks * torch.minimum(q[members[0]], q[members[1]]))
        seen.append(frozenset(members.tolist()))
        return result

    monkeypatch.setattr(rlpd, "td_target", watch)
    for _ in range(400):
        rlpd.critic_update(critic, target, optimizer, buffer, index, args)
    assert len(set(seen)) == 45  # 10 choose 2; one of them missing has probability 45 (44/45)^400 = 0.6 %
    assert args.ensemble_size == 10 and args.target_subset == 2 and args.utd == 10


def test_rlpds_target_uses_the_best_optimized_action_at_the_next_state():
    args = dataclasses.replace(rlpd.Args(), ensemble_size=2, num_bins=1, critic_loss="mse", num_samples=4, num_keep=2,
                               num_gradient_steps=0)  # fmt: skip
    buffer, critic = make_buffer(rlpd, args), rlpd.Critic(OBS, ACT, (16,), 2, 1)
    target, optimizer = rlpd.copy.deepcopy(critic), torch.optim.SGD(critic.parameters(), 0.0)
    candidates, index = torch.rand(len(buffer.states), 4, ACT) * 2 - 1, torch.tensor([0, 5, 19])
    buffer.candidates = candidates
    info = rlpd.critic_update(critic, target, optimizer, buffer, index, args)
    next_index = buffer.next_index[index]
    q = critic(buffer.states[next_index], candidates[next_index])  # (2, 3, 4)
    best = q.mean(0).argmax(1)
    expected = buffer.rewards[index] + args.discount * q[:, torch.arange(3), best].min(0).values
    torch.testing.assert_close(info["target_q"], expected.mean())


def test_rlpd_has_no_conservatism():
    """The loss depends on the data's actions alone: TD of all members, against a sum by hand."""
    critic = rlpd.Critic(OBS, ACT, (16,), 4, 1)
    obs, actions, target = torch.randn(6, OBS), torch.rand(6, ACT), torch.randn(6)
    loss, info = rlpd.rlpd_loss(critic, obs, actions, target)
    by_hand = sum((critic(obs, actions[:, None])[e, :, 0] - target).square().mean() for e in range(4)) / 4
    torch.testing.assert_close(loss, by_hand)
    distributional = rlpd.Critic(OBS, ACT, (16,), 4, 16, -10.0)
    loss, _ = rlpd.rlpd_loss(distributional, obs, actions, target)
    probs = torch.log_softmax(distributional.outputs(obs, actions[:, None])[:, :, 0], -1)
    by_hand = -(rlpd.hl_gauss_target(target, distributional.edges) * probs).sum(-1).mean()
    torch.testing.assert_close(loss, by_hand)
    assert not hasattr(rlpd, "calql_loss")


def test_half_of_every_batch_is_online():
    args = rlpd.Args()
    buffer = make_buffer(rlpd, args)
    zeros = np.zeros((7, OBS), np.float32)
    episode = Dataset(zeros, np.zeros((7, ACT), np.float32), zeros[:, 0], zeros, zeros[:, 0] > 0, np.arange(7) == 6)
    assert (buffer.sample_index((5, 64)) < 60).all()  # nothing online yet
    buffer.add(episode)
    index = buffer.sample_index((200, 64))
    assert ((index < 60).sum(1) == 32).all() and set(index[index >= 60].tolist()) == set(range(60, 67))
