"""Climbing only from candidates that can win: the same best action on a trained critic, and what it is worth where not.

`data/trained_critic.npz` holds the critic of a default run (pointmaze-medium-v0, seed 101; 2 x (128, 128), weights as
float16), 1,000 states of its data and 16 samples of its cloned policy at each.
"""

import pathlib

import numpy as np
import pytest
import torch

import parl_diffusion_calql as script
from benchmarks.harness import fast_critic
from benchmarks.harness.fast_critic import FrozenCritic

DATA = pathlib.Path(__file__).parent / "data" / "trained_critic.npz"
# the paper's way, the default task's preset, a longer climb
SETTINGS = [(10, 10, 3e-4), (2, 2, 0.03), (16, 10, 0.01)]
settings = pytest.mark.parametrize(("num_keep", "num_steps", "step_size"), SETTINGS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def trained(dtype=torch.float32):
    arrays = {name: torch.tensor(array).to(dtype) for name, array in np.load(DATA).items()}
    obs, actions = arrays.pop("obs"), arrays.pop("actions")
    critic = script.Critic(4, 2, (128, 128), ensemble_size=2, num_bins=64, q_min=-20.0).to(dtype)
    critic.load_state_dict(arrays, strict=False)
    return critic, obs, actions


class Counting:
    """A critic that notes how many actions it was asked about."""

    def __init__(self, critic):
        self.critic, self.asked = critic, []

    def __call__(self, obs, actions):
        self.asked.append(actions.shape[0] * actions.shape[1])
        return self.critic(obs, actions)


def best(actions, q):
    return script.select_actions(actions, q, greedy=True), q.amax(1)


@dtypes
@settings
def test_no_winner_changes_on_a_trained_critic(num_keep, num_steps, step_size, dtype):
    critic, obs, actions = trained(dtype)
    everything, q_everything = script.optimize_actions(critic, obs, actions, num_keep, num_steps, step_size)
    some, q_some = script.optimize_actions(critic, obs, actions, num_keep, num_steps, step_size, num_climb=num_keep)
    assert (q_everything.argmax(1) == q_some.argmax(1)).all()  # in none of the 1,000 states
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(q_some.amax(1), q_everything.amax(1), rtol=tolerance, atol=0)
    torch.testing.assert_close(best(some, q_some)[0], best(everything, q_everything)[0], rtol=0, atol=10 * tolerance)
    # what was left out stands where it stood, at the Q it had
    ranked, q_ranked = script.global_optimization(critic, obs, actions, num_keep)
    left = (some == ranked).all(-1)
    torch.testing.assert_close(q_some[left], q_ranked[left], rtol=tolerance, atol=0)
    assert num_keep == 2 or left.float().mean() > 0.3


@settings
def test_the_fast_critic_finds_the_same_winners(num_keep, num_steps, step_size):
    critic, obs, actions = trained()
    plain = script.optimize_actions(critic, obs, actions, num_keep, num_steps, step_size)[1].amax(1)
    fast = script.optimize_actions(FrozenCritic(critic), obs, actions, num_keep, num_steps, step_size, num_climb=99)[1]
    torch.testing.assert_close(fast.amax(1), plain, rtol=1e-5, atol=0)


def test_less_is_evaluated():
    """At the paper's settings: 16 ranked, 10 kept valued and differentiated, then ten steps of those that can win."""
    critic, obs, actions = trained()
    asked = {}
    for num_climb in (0, 10, 1):
        counting = Counting(critic)
        script.optimize_actions(counting, obs, actions, 10, 10, 3e-4, num_climb=num_climb)
        asked[num_climb] = counting.asked
    assert asked[0] == [16_000] + [10_000] * 11
    assert asked[10][:2] == [16_000, 10_000] and asked[10][2:] == [1_465] * 10  # of 10,000
    assert asked[1][:2] == [16_000, 10_000] and asked[1][2:] == [1_000] * 10


class Steep(torch.nn.Module):
    """Q of a scalar action: 0.3 below 0; from 0 to 0.5 nearly flat, from there on a hundred times as steep."""

    def forward(self, obs, actions):
        x = actions[..., 0]
        return torch.where(x < 0, 0.3, 0.01 * x + (x - 0.5).clamp(min=0))[None]


def test_where_a_gradient_more_than_doubles_the_winner_may_be_another():
    """-0.5 is the better candidate and has nowhere to climb; from 0.499 one step leads to the slope and up to 0.51."""
    obs, actions = torch.zeros(1, 1), torch.tensor([[[-0.5], [0.499]]])
    args = script.Args(num_samples=2, num_keep=2, num_gradient_steps=10, gradient_step_size=0.2)
    settings = 2, args.num_gradient_steps, args.gradient_step_size

    exact, q = best(*script.optimize_actions(Steep(), obs, actions, *settings))
    fast, q_fast = best(*script.optimize_actions(Steep(), obs, actions, *settings, num_climb=2))
    assert exact.item() == 1.0 and q.item() == pytest.approx(0.51)
    assert fast.item() == -0.5 and q_fast.item() == pytest.approx(0.3)
    # the flag's way and the plain way climb from all
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "FrozenCritic", type("Same", (), {"__new__": lambda _, critic: critic}))
        patch.setattr(script, "climb_winners", lambda *_: seen.append(1) or (actions, actions[..., 0]))
        for change in (dict(climb_all=True), dict(plain=True)):
            actions_, q_ = script.optimize(Steep(), obs, actions, script.Args(**vars(args) | change), True)
            assert best(actions_, q_)[0].item() == exact.item()
        script.optimize(Steep(), obs, actions, args, False)
        assert not seen
        script.optimize(Steep(), obs, actions, args, True)
        assert seen


def test_climb_first_is_a_shortcut_that_plain_runs_take_too():
    critic, obs, actions = trained()
    for plain in (False, True):
        args = script.Args(num_samples=16, num_keep=10, climb_first=3, climb_all=True, plain=plain)
        optimized, q = script.optimize(critic, obs, actions, args, True)
        ranked, _ = script.global_optimization(critic, obs, actions, 10)
        moved = (optimized != ranked).any(-1)
        assert moved[:, 3:].sum() == 0 and moved[:, :3].any() and optimized.shape == ranked.shape
        assert (script.optimize(critic, obs, actions, args, False)[0] != ranked).any(-1)[:, 3:].any()


def test_the_datas_action_can_win():
    critic, obs, actions = trained()
    data_actions = actions[:, 0].clone()
    data_actions[::2] = torch.nan
    everything = best(*script.optimize_actions(critic, obs, actions[:, 1:], 5, 10, 0.01, data_actions=data_actions))
    some = best(
        *script.optimize_actions(critic, obs, actions[:, 1:], 5, 10, 0.01, data_actions=data_actions, num_climb=6)
    )
    torch.testing.assert_close(some[1], everything[1], rtol=1e-5, atol=0)


def test_one_state_and_no_steps():
    critic, obs, actions = trained()
    for num_steps in (0, 1, 3):
        one = script.optimize_actions(FrozenCritic(critic), obs[:1], actions[:1], 4, num_steps, 0.01, num_climb=4)
        all_ = script.optimize_actions(critic, obs[:1], actions[:1], 4, num_steps, 0.01)
        torch.testing.assert_close(one[1].amax(1), all_[1].amax(1), rtol=1e-5, atol=1e-6)


def test_compiled_once_however_many_can_win(monkeypatch):
    """As on a GPU: how many can win is counted outside of what is compiled, which soon is all; same result."""
    compiled = []

    def trace(graph, inputs):
        compiled.append(graph)
        return graph

    critic, obs, actions = trained()
    torch.compiler.reset()
    optimize, asked, graphs = torch.compile(script.optimize_actions, backend=trace), set(), []
    for start in range(0, 960, 80):
        some = obs[start : start + 80], actions[start : start + 80], 10, 3, 0.01
        watched = Counting(critic)
        plain = script.optimize_actions(watched, *some, num_climb=10)
        with monkeypatch.context() as gpu:
            gpu.setattr(fast_critic, "EXACT_COUNTS", set())
            torch.testing.assert_close(optimize(critic, *some, num_climb=10), plain)
        asked.add(sum(watched.asked))
        graphs.append(len(compiled))
    assert len(asked) > 8  # different counts
    assert graphs[-1] == graphs[2]
