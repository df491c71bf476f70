"""The autoregressive policy: the release's tokens, cached sampling against the plain pass, joint modes, likelihood."""

import math
import pathlib

import numpy as np
import pytest
import torch

import parl_transformer_calql as script

OBS, ACT = 5, 4


def make_policy(bins=16, width=32, layers=2, heads=4, scale=0.3, action_dim=ACT):
    """A small policy whose weights are far enough from their start that every position and observation matters."""
    torch.manual_seed(0)
    policy = script.TransformerPolicy(OBS, action_dim, bins, layers, width, heads).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return policy


def test_tokens_of_the_release():
    v = np.load(pathlib.Path(__file__).parent / "data" / "transformer_bins.npz")
    policy = script.TransformerPolicy(OBS, 3, len(v["support"]), 1, 8, 1)
    np.testing.assert_allclose(policy.centers, v["support"], atol=1e-7)
    tokens = policy.tokenize(torch.tensor(v["actions"]))
    np.testing.assert_array_equal(tokens, v["tokens"])
    np.testing.assert_allclose(policy.centers[tokens], v["detokenized"], atol=1e-7)


def test_a_token_is_nearest():
    policy = script.TransformerPolicy(OBS, ACT, 128, 1, 8, 1)
    actions = torch.rand(1000, ACT) * 2 - 1
    error = (policy.centers[policy.tokenize(actions)] - actions).abs()
    assert error.max() <= 1 / 127 + 1e-6 and abs(error.mean() - 0.5 / 127) < 3e-4
    assert torch.equal(policy.tokenize(policy.centers), torch.arange(128))


@pytest.mark.parametrize("action_dim", [1, 2, 8])
def test_cached_sampling_has_the_log_probabilities_of_the_plain_forward_pass(action_dim):
    policy, n = make_policy(action_dim=action_dim), 3
    obs, tokens, seen = torch.randn(6, OBS), torch.randint(16, (6, n, action_dim)), []

    def choose(i, logits):
        seen.append(torch.log_softmax(logits, -1))
        return tokens[:, :, i]

    assert torch.equal(policy.decode(obs, n, choose), tokens)
    plain = policy.log_probs(obs.repeat_interleave(n, 0), tokens.flatten(0, 1)).view(6, n, action_dim, 16)
    torch.testing.assert_close(torch.stack(seen, 2), plain, atol=1e-5, rtol=0)


def test_each_element_is_computed_once(monkeypatch):
    """The observation's once per state, not per sample; a token's once."""
    policy, rows = make_policy(), []
    forward = script.TransformerBlock.forward
    count = lambda self, x, *rest: rows.append(x.shape[0] * x.shape[1]) or forward(self, x, *rest)  # noqa: E731
    monkeypatch.setattr(script.TransformerBlock, "forward", count)
    policy.sample(torch.randn(6, OBS), 7)
    assert rows == 2 * [6] + 2 * (ACT - 1) * [6 * 7]  # two layers each


def test_the_policy_is_autoregressive():
    """A position sees the observation and the tokens before it, and no other."""
    policy = make_policy()
    obs, tokens = torch.randn(1, OBS), torch.randint(16, (1, ACT))
    plain = policy.log_probs(obs, tokens)
    torch.testing.assert_close(plain.exp().sum(-1), torch.ones(1, ACT))
    for i in range(ACT):
        other = tokens.clone()
        other[0, i] = (other[0, i] + 5) % 16
        changed = (policy.log_probs(obs, other) - plain).abs().amax(-1)[0] > 1e-4
        assert changed.tolist() == [j > i for j in range(ACT)]
    assert ((policy.log_probs(obs + 1, tokens) - plain).abs().amax(-1) > 1e-4).all()


def test_samples_follow_the_distribution():
    """Frequencies of all 3^2 actions of one state against the product of categoricals."""
    policy, draws = make_policy(bins=3, action_dim=2, scale=0.15), 40_000
    obs = torch.randn(1, OBS)
    actions = policy.sample(obs, draws)[0]
    assert set(actions.unique().tolist()) <= {-1.0, 0.0, 1.0}
    tokens = policy.tokenize(actions)
    counts = torch.bincount(tokens[:, 0] * 3 + tokens[:, 1], minlength=9).double()
    every = torch.tensor([[i, j] for i in range(3) for j in range(3)])
    picked = policy.log_probs(obs.expand(9, -1), every).gather(2, every[..., None])[..., 0]
    expected = picked.sum(1).exp().double() * draws
    assert expected.sum().item() == pytest.approx(draws, rel=1e-4) and expected.min() > 5
    assert ((counts - expected) ** 2 / expected).sum() < 33  # chi-square, 8 degrees of freedom, p = 6e-5


def test_samples_depend_on_their_own_state_and_noise():
    policy = make_policy()
    obs, noise = torch.randn(4, OBS), torch.rand(4, 3, ACT)
    actions = policy.sample(obs, 3, noise)
    assert actions.shape == (4, 3, ACT) and (actions.abs() <= 1).all() and not actions.requires_grad
    for b in range(4):
        for i in range(3):
            alone = policy.sample(obs[b : b + 1], 1, noise[b : b + 1, i : i + 1])[0, 0]
            torch.testing.assert_close(alone, actions[b, i])
    ends = policy.sample(obs, 1, torch.full((4, 1, ACT), 1.0 - 2**-24))  # rounding must not choose a token that is none
    assert ends.abs().max() <= 1
    assert policy.sample(obs[:0], 3).shape == (0, 3, ACT)  # an online round may have no critic update


def test_cross_entropy_against_a_closed_form():
    """A policy of zero weights is uniform: A log(bins). And one that only has biases: the sum of their log-softmax."""
    policy = script.TransformerPolicy(OBS, ACT, 16, 1, 8, 2)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    obs, actions = torch.randn(9, OBS), torch.rand(9, ACT) * 2 - 1
    assert policy.loss(obs, actions).item() == pytest.approx(ACT * math.log(16), rel=1e-6)
    bias = torch.randn(16)
    with torch.no_grad():
        policy.head.bias.copy_(bias)
    expected = -(bias - bias.exp().sum().log())[policy.tokenize(actions)].sum(-1).mean()
    torch.testing.assert_close(policy.loss(obs, actions), expected)


def test_joint_modes_of_two_dimensions_are_kept():
    """Data at (a, a) and (-a, -a) only: the marginals allow four corners, the joint distribution two."""
    torch.manual_seed(0)
    policy = script.TransformerPolicy(2, 2, 32, 2, 32, 4)
    average, optimizer = script.copy.deepcopy(policy).requires_grad_(False), torch.optim.Adam(policy.parameters(), 3e-3)
    for _ in range(300):
        obs = torch.randn(128, 2)
        side = torch.randint(2, (128, 1)) * 2.0 - 1
        actions = (side * 0.6 + 0.05 * torch.randn(128, 2)).clamp(-1, 1)
        script.policy_update(policy, average, optimizer, obs, actions, 0.02)
    samples = average.sample(torch.randn(400, 2), 10).view(-1, 2)
    same_side = samples[:, 0] * samples[:, 1] > 0
    assert same_side.float().mean() > 0.98
    assert 0.4 < (samples[:, 0] > 0).float().mean() < 0.6
    assert (samples.abs() - 0.6).abs().mean() < 0.08


def test_the_average_follows_every_parameter():
    policy = make_policy()
    average = script.copy.deepcopy(policy)
    optimizer = torch.optim.SGD(policy.parameters(), 0.1)
    before = [p.clone() for p in average.parameters()]
    script.policy_update(policy, average, optimizer, torch.randn(8, OBS), torch.rand(8, ACT), 0.25)
    for old, new, online in zip(before, average.parameters(), policy.parameters()):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * online)
