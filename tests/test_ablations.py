"""The paper's ablations that are flags: which actions are cloned, and which are backed up; figure 13's measurements."""

import types

import pytest
import torch

import parl_diffusion_calql as calql
import parl_diffusion_iql as iql
import parl_diffusion_rlpd as rlpd
import parl_flow_calql as flow
import parl_transformer_calql as transformer

WITH_TARGETS = pytest.mark.parametrize("script", [calql, rlpd, flow, transformer], ids=lambda script: script.__name__)
ALL = pytest.mark.parametrize("script", [calql, iql, rlpd, flow, transformer], ids=lambda script: script.__name__)


class Linear:
    """Q(s, a) = slope . a in each of two members, but for a constant; without a highest action."""

    def __init__(self, slope):
        self.slope, self.ensemble_size = torch.tensor(slope), 2

    def __call__(self, obs, actions, members=None):
        q = actions @ self.slope
        return torch.stack([q - 1, q + 1])


class Buffer:
    """Five states with three candidates each; the data's action is good at 0 and 3, bad at 1, unknown at 2 and 4."""

    def __init__(self):
        self.states, self.next_index = torch.zeros(5, 2), torch.tensor([1, 2, 3, 4])
        self.candidates = torch.arange(30, dtype=torch.float32).view(5, 3, 2) / 100
        self.known = self.candidates.mean(1) + torch.tensor([[0.1], [-0.1], [torch.nan], [0.3], [torch.nan]])
        self.obs_index = torch.tensor([0, 1, 2, 3])
        self.rewards, self.masks, self.mc_returns = torch.zeros(4), torch.ones(4), torch.zeros(4)

    def data_actions(self, states):
        return self.known[states]

    def sample_index(self, shape, mixed=True):
        return torch.arange(4).expand(shape)


@ALL
def test_self_imitation_clones_the_datas_actions_in_proportion_to_their_positive_advantage(script):
    """Advantages 0.2 and 0.6 at states 0 and 3: 3 is drawn three times as often; never a candidate, never NaN."""
    torch.manual_seed(0)
    buffer = Buffer()
    everywhere, args = torch.arange(5).repeat(4000), script.Args(plain=True)
    states, actions, q = script.self_imitation(Linear([1.0, 1.0]), buffer, everywhere, args)
    counts = torch.bincount(states, minlength=5)
    assert counts[2] == counts[4] == 0 and counts[1] <= 2
    assert counts[3] / counts[0] == pytest.approx(3, rel=0.06)
    torch.testing.assert_close(actions[:, 0], buffer.known[states])
    torch.testing.assert_close(q[:, 0], buffer.known[states].sum(1))


@ALL
def test_what_is_cloned(script, monkeypatch):
    """With --distill-from data the data's own actions, unchanged; otherwise optimized ones, the data's among them."""
    monkeypatch.setattr(script, "refresh_candidates", lambda *args: None)
    cloned = []

    def update(policy, ema_policy, optimizer, obs, actions, ema):
        cloned.append(actions)
        return torch.zeros(())

    monkeypatch.setattr(script, "policy_update", update)
    buffer, critic = Buffer(), Linear([1.0, 1.0])
    for source in ("data", "policy"):
        cloned.clear()
        flags = dict(distill_from=source, batch_size=4, num_samples=3, num_keep=2, num_gradient_steps=1, plain=True)
        args = script.Args(**flags, gradient_step_size=0.05)
        targets, metrics = script.distill(None, None, None, critic, buffer, 2, True, args)
        assert len(cloned) == 2 and targets.shape == (2, 4, 2)
        good = buffer.known[[0, 3]]
        if source == "data":
            assert all((row == good).all(1).any() for row in torch.cat(cloned))
        else:  # the best of the policy's two best and the data's, after one step
            best = torch.stack([buffer.known[0], buffer.candidates[1, 2], buffer.candidates[2, 2], buffer.known[3]])
            torch.testing.assert_close(cloned[0], best + 0.05)
        assert metrics["action_l1"] == pytest.approx(0.1) and metrics["action_std_change"] == pytest.approx(0, abs=1e-6)
        assert metrics["action_std"] == pytest.approx(0.01) and metrics["climbed_q_std"] == pytest.approx(0.02)


@WITH_TARGETS
@pytest.mark.parametrize("base", [False, True])
def test_what_is_backed_up(script, base, monkeypatch):
    """Figure 16: with --base-policy-backup any candidate at s', as it is; else the best one, climbed."""
    seen = []

    def target(target_critic, rewards, masks, next_obs, next_actions, discount, members):
        seen.append(next_actions)
        raise StopIteration

    monkeypatch.setattr(script, "td_target", target)
    flags = dict(base_policy_backup=base, num_samples=3, num_keep=2, num_gradient_steps=1, ensemble_size=2, plain=True)
    args, buffer = script.Args(**flags, gradient_step_size=0.05), Buffer()
    for seed in range(20):
        torch.manual_seed(seed)
        with pytest.raises(StopIteration):
            critic = Linear([1.0, 1.0])
            script.critic_update(critic, critic, None, buffer, torch.arange(4), args)
    at_next = buffer.candidates[buffer.next_index]
    if not base:
        torch.testing.assert_close(seen[0], at_next[:, 2] + 0.05)
    else:
        which = torch.stack([(actions[:, None] == at_next).all(-1).float().argmax(1) for actions in seen])
        assert all((actions[:, None] == at_next).all(-1).any(1).all() for actions in seen)
        assert set(which.flatten().tolist()) == {0, 1, 2}, "one of the policy's samples, drawn anew each time"


def test_the_suites_ask_for_flags_that_change_what_they_say():
    """Without global or local optimization (table 4) an action is what the policy gave, or only ranked."""
    critic, obs, actions = Linear([1.0, -1.0]), torch.zeros(4, 2), torch.rand(4, 3, 2)
    one = types.SimpleNamespace(num_samples=1, num_keep=1)
    kept, _ = calql.optimize_actions(critic, obs, actions[:, :1], one.num_keep, 1, 0.05, -1.0, 1.0)
    torch.testing.assert_close(kept[:, 0], (actions[:, 0] + torch.tensor([0.05, -0.05])).clamp(-1, 1))
    ranked, q = calql.optimize_actions(critic, obs, actions, 1, 0, 0.05, -1.0, 1.0)
    best = (actions @ critic.slope).argmax(1)
    torch.testing.assert_close(ranked[:, 0], actions[torch.arange(4), best])
