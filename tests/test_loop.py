"""What `main` of each script does with the tested parts: which states and actions, which network, how often, how fast.

Every script is run in this process to its end on a made-up task of a few rows, with its functions wrapped so that they
note what they were called with; the tests then look at the notes.
"""

import gymnasium as gym
import numpy as np
import pytest
import torch

import parl_diffusion_calql
import parl_diffusion_iql
import parl_diffusion_rlpd
import parl_flow_calql
import parl_transformer_calql
from benchmarks.tasks.dataset import Dataset

LENGTH, ROWS, OBS_DIM, ACTION_DIM = 4, 24, 3, 2  # of an episode and of the dataset
CLONING, OFFLINE, EPISODES, EVERY = 6, 8, 2, 2  # updates, updates, episodes, updates between IQL's offline distillings
UTD, RATIO, CLONING_LR, DISTILL_LR, DISCOUNT = 1.5, 0.5, 0.02, 0.03, 0.9
TOY = (
    "--env-id pointmaze-umaze-v0 --threads 1 --eval-episodes 1 --num-offline-evals 1 --num-online-evals 1 "
    "--log-every 1 --policy-warmup 3 --cloning-batch-size 32 --critic-hidden 8 --batch-size 16 --num-bins 8 "
    f"--num-samples 4 --num-keep 3 --num-gradient-steps 0 --ensemble-size 3 --utd {UTD} --distill-ratio {RATIO} "
    f"--policy-lr {CLONING_LR} --distill-lr {DISTILL_LR} --discount {DISCOUNT} --num-cloning-steps {CLONING} "
    f"--num-online-episodes {EPISODES}"
).split()
DIFFUSION = "--policy-hidden 8 --policy-blocks 1 --policy-dropout 0.5".split()
CALQL, IQL, RLPD, TRANSFORMER = parl_diffusion_calql, parl_diffusion_iql, parl_diffusion_rlpd, parl_transformer_calql
FLAGS = {
    CALQL: [*DIFFUSION, "--num-offline-steps", str(OFFLINE)],
    parl_flow_calql: [*DIFFUSION, "--num-offline-steps", str(OFFLINE)],
    IQL: [*DIFFUSION, "--num-offline-steps", str(OFFLINE), "--distill-every", str(EVERY), "--distill-after", "0"],
    RLPD: [*DIFFUSION, "--num-warmup-episodes", "2"],
    TRANSFORMER: f"--policy-width 8 --policy-layers 1 --policy-heads 2 --num-offline-steps {OFFLINE}".split(),
}
DRAWN_ACTING = "--no-greedy-rollouts --distill-selection greedy".split()
DRAWN_DISTILLING = "--greedy-rollouts --distill-selection sample".split()
WRAPPED = (
    "policy_update", "critic_update", "distill", "select_actions", "refresh_candidates", "collect_episode", "optimize",
    "td_target", "calql_loss", "rlpd_loss", "iql_loss",
)  # fmt: skip
scripts = pytest.mark.parametrize("script", FLAGS, ids=lambda script: script.__name__)


def data_action(obs):
    """The action that the made-up data takes at a state, which is how a wrong pair is told from a right one."""
    return 0.5 * obs[..., :ACTION_DIM]


def made_up_dataset(*_, **__):
    """Trajectories of four rows cut by a time limit; no state comes twice."""
    path = np.random.default_rng(0).uniform(-1, 1, (ROWS // LENGTH, LENGTH + 1, OBS_DIM)).astype(np.float32)
    obs, next_obs = path[:, :-1].reshape(ROWS, OBS_DIM), path[:, 1:].reshape(ROWS, OBS_DIM)
    timeouts = np.arange(ROWS) % LENGTH == LENGTH - 1
    return Dataset(obs, data_action(obs), np.zeros(ROWS, np.float32), next_obs, np.zeros(ROWS, bool), timeouts, "here")


class MadeUpEnv(gym.Env):
    """Random observations for four steps."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (OBS_DIM,)), gym.spaces.Box(-1, 1, (ACTION_DIM,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        self.steps += 1
        return self._observe(), 0.0, False, self.steps == LENGTH, {"success": False}

    def _observe(self):
        return self.np_random.uniform(-1, 1, OBS_DIM).astype(np.float32)


def best_of(actions, q):
    return actions[torch.arange(len(actions)), q.argmax(1)]


def weights(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


class Notes:
    """The calls of one run in order, each a dict: `call`, its `args` and `result`, in which others and which phase."""

    def __init__(self):
        self.calls, self.inside, self.policy_updates, self.drawn_at = [], [], 0, {}

    def of(self, call, phase=None, inside=None):
        """The calls of a name, in a phase, directly or indirectly inside another one (False: inside none)."""
        return [
            note for note in self.calls
            if note["call"] == call and phase in (None, note["phase"])
            and (inside is None or (inside in note["inside"] if inside else not note["inside"]))
        ]  # fmt: skip

    def wrap(self, name, function):
        """The function, noting each call: tensors as they are then, and what else the tests want to know of it."""

        def wrapped(*args, **kwargs):
            note = {"call": name, "args": args, "inside": tuple(self.inside), "phase": self.run.progress["phase"]}
            note |= getattr(self, f"before_{name}", lambda *_, **__: {})(*args, **kwargs)
            self.calls.append(note)
            self.inside.append(name)
            note["result"] = function(*args, **kwargs)
            self.inside.pop()
            return note["result"]

        return wrapped

    def __getattr__(self, name):  # policy, ema_policy, critic_optimizer, ...: as they were handed to Run
        if name in ("run", "buffer") or name.startswith("before_"):
            raise AttributeError(name)
        return self.run.modules[name]

    def before_policy_update(self, policy, ema_policy, optimizer, obs, actions, *rest, **__):
        self.policy_updates += 1
        index = (self.buffer.states[None] == obs[:, None]).all(-1).float().argmax(1)  # no state comes twice
        is_sample = (self.buffer.candidates[index] == actions[:, None]).all(-1).any(1)
        return {"fresh": not optimizer.state, "lr": optimizer.param_groups[0]["lr"], "samples": is_sample.all().item()}

    def before_critic_update(self, *args, **__):
        *_, optimizer, buffer, index, _ = args
        states = {"obs": buffer.obs_index[index].tolist(), "next": buffer.next_index[index].tolist()}
        drawn = {f"{name}_drawn_at": {self.drawn_at.get(s) for s in states[name]} for name in states}
        is_online = (index >= buffer.num_offline).float().mean()
        return {"fresh": not optimizer.state, "rows": index, "is_online": is_online} | drawn

    def before_refresh_candidates(self, policy, buffer, states, **__):
        self.drawn_at |= dict.fromkeys(states.flatten().tolist(), self.policy_updates)
        return {"weights": weights(policy), "now": weights(self.ema_policy)}

    def before_sample(self, policy, obs, num_samples, *_, **__):
        return {"training": policy.training, "who": policy, "n": num_samples}


def policy_of(script):
    """The class of the policy that a script has."""
    (found,) = [getattr(script, name) for name in dir(script) if name.endswith("Policy")]
    return found


def play(script, tmp_path, *flags) -> Notes:
    """Run the script to its end at toy size, taking notes."""
    notes, Policy = Notes(), policy_of(script)

    class NotingRun(script.Run):
        def __init__(self, args, dataset, buffer, *rest, **modules):
            notes.run, notes.buffer = self, buffer
            super().__init__(args, dataset, buffer, *rest, **modules)

    with pytest.MonkeyPatch.context() as patch:
        for name in WRAPPED:
            if hasattr(script, name):
                patch.setattr(script, name, notes.wrap(name, getattr(script, name)))
        patch.setattr(Policy, "sample", notes.wrap("sample", Policy.sample))
        patch.setattr(script, "Run", NotingRun)
        patch.setattr(script, "make_env", lambda *_, **__: MadeUpEnv())
        patch.setattr(script, "load_dataset", made_up_dataset)
        patch.setattr(script, "finish", lambda *_, **__: None)
        flags = "--no-eval-processes", *FLAGS[script], *DRAWN_DISTILLING, *flags
        script.main([*TOY, *flags, "--runs", str(tmp_path)])
    assert notes.run.progress["phase"] == "done"
    return notes


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """`play` with the flags given, each run only once in this module."""
    done = {}

    def once(script, *flags):
        if (script, flags) not in done:
            done[script, flags] = play(script, tmp_path_factory.mktemp("runs"), *flags)
        return done[script, flags]

    return once


def held_by(optimizer):
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def ids(*networks):
    return {id(parameter) for network in networks for parameter in network.parameters()}


# --- networks ---
@scripts
def test_each_optimizer_holds_its_networks_and_no_more(played, script):
    """IQL's value network among them; the averaged policy and the target critic are trained by none."""
    notes = played(script)
    assert held_by(notes.policy_optimizer) == ids(notes.policy)
    values = [notes.value] if script is IQL else []
    assert held_by(notes.critic_optimizer) == ids(notes.critic, *values)
    critic_lr = notes.run.args.critic_lr
    assert [group["lr"] for group in notes.critic_optimizer.param_groups] == [critic_lr]


@scripts
@pytest.mark.parametrize("loss", ["hl_gauss", "mse"])
def test_the_critics_support_ends_at_the_smallest_value_there_can_be(played, script, loss):
    """r_min / (1 - gamma) to 0, in as many bins as asked for; one number for regression."""
    notes = played(script, "--critic-loss", loss)
    for critic in (notes.critic, notes.target_critic):
        assert critic.edges[0].item() == pytest.approx(-1 / (1 - DISCOUNT)) and critic.edges[-1] == 0
        assert critic.num_bins == (8 if loss == "hl_gauss" else 1) and critic.ensemble_size == 3


@scripts
def test_only_the_averaged_policy_is_sampled_and_without_dropout(played, script):
    """Acting, caching and distilling; IQL's offline distilling samples a copy of it. And it is what is averaged."""
    notes = played(script)
    samples = notes.of("sample")
    assert samples and not any(note["training"] for note in samples)
    assert notes.policy.training
    for note in samples:
        copied = script is IQL and note["phase"] == "offline" and "distill" in note["inside"]
        assert note["who"] is (notes.sampler if copied else notes.ema_policy), note
    for note in notes.of("policy_update"):
        assert note["args"][0] is notes.policy and note["args"][1] is notes.ema_policy
        assert note["args"][2] is notes.policy_optimizer and note["args"][5] == notes.run.args.policy_ema


@scripts
def test_the_online_critic_ranks_and_the_target_critic_values(played, script):
    """At every use of candidates; the action that the target values is the greedy one under the online critic."""
    notes = played(script)
    assert all(note["args"][0] is notes.critic for note in notes.of("optimize"))
    targets = notes.of("td_target")
    assert bool(targets) == (script is not IQL)
    for note in targets:
        assert note["args"][0] is notes.target_critic
    for note in notes.of("iql_loss"):
        assert note["args"][:3] == (notes.critic, notes.target_critic, notes.value)
    for note in notes.of("calql_loss") + notes.of("rlpd_loss"):
        assert note["args"][0] is notes.critic


# --- phase 1 ---
@scripts
def test_cloning_pairs_each_state_with_its_action_and_sees_all_rows(played, script):
    notes, data = played(script), made_up_dataset()
    updates = notes.of("policy_update", "cloning")
    assert len(updates) == CLONING and all(len(note["args"][3]) == 32 for note in updates)
    for note in updates:
        assert torch.allclose(note["args"][4], data_action(note["args"][3]), atol=1e-6)
    seen = {tuple(row.tolist()) for note in updates for row in note["args"][3]}
    assert seen == {tuple(row.tolist()) for row in data.observations}


@scripts
def test_the_learning_rate_is_the_schedules_when_cloning_and_constant_when_distilling(played, script):
    notes = played(script)
    expected = [script.cloning_lr(step, notes.run.args) for step in range(CLONING)]
    assert [note["lr"] for note in notes.of("policy_update", "cloning")] == expected and len(set(expected)) > 3
    distilling = notes.of("policy_update", inside="distill")
    assert distilling and {note["lr"] for note in distilling} == {DISTILL_LR}


@scripts
def test_the_cloned_policy_acts_with_one_sample_and_the_optimized_with_all(played, script):
    """In evaluations and episodes; RLPD's first episodes are the cloned policy's."""
    notes = played(script)
    cloned = notes.of("sample", "cloning", inside=False)
    assert cloned and {note["n"] for note in cloned} == {1}
    online = notes.of("sample", "online", inside="collect_episode")
    assert len(online) == EPISODES * LENGTH and {note["n"] for note in online} == {4}
    offline = notes.of("sample", "offline", inside=False) + notes.of("sample", "offline", inside="collect_episode")
    assert {note["n"] for note in offline} == {1 if script is RLPD else 4}
    assert len(notes.of("collect_episode", "offline")) == (2 if script is RLPD else 0)


# --- phases 2 and 3: the critic ---
@scripts
def test_critic_updates_use_the_present_policys_candidates(played, script):
    """Offline, where they are drawn once, and online, after each distilling; IQL uses none."""
    notes = played(script)
    if script is IQL:
        assert not notes.of("optimize", inside="critic_update")
        return
    updates_so_far = 0
    for note in notes.calls:
        updates_so_far += note["call"] == "policy_update"
        if note["call"] == "critic_update":
            assert note["next_drawn_at"] == {updates_so_far}
            assert script is RLPD or note["obs_drawn_at"] == {updates_so_far}


@scripts
def test_critic_updates_take_the_transition_as_it_was(played, script):
    """State, action, reward, next state of one row; offline the data's rows, online half of each."""
    notes, buffer = played(script), played(script).buffer
    updates = notes.of("critic_update")
    losses = notes.of("calql_loss") + notes.of("rlpd_loss") + notes.of("iql_loss")
    assert len(updates) == len(losses)
    for update, loss in zip(updates, losses):
        rows, first = update["rows"], {IQL: 3}.get(script, 1)
        assert torch.equal(loss["args"][first], buffer.states[buffer.obs_index[rows]])
        assert torch.equal(loss["args"][first + 1], buffer.action_at[buffer.obs_index[rows]])
        assert update["is_online"] == (0.5 if update["phase"] == "online" else 0)
    for update, target in zip(updates, notes.of("td_target")):
        rewards, masks, next_obs, next_actions, discount = target["args"][1:6]
        rows = update["rows"]
        assert torch.equal(rewards, buffer.rewards[rows]) and torch.equal(masks, buffer.masks[rows])
        assert torch.equal(next_obs, buffer.states[buffer.next_index[rows]]) and discount == DISCOUNT
    for loss in notes.of("iql_loss"):
        assert loss["args"][8:10] == (DISCOUNT, notes.run.args.expectile)


@scripts
def test_the_td_targets_action_is_the_one_selected_at_the_next_state(played, script):
    notes = played(script)
    for update, target in zip(notes.of("critic_update"), notes.of("td_target")):
        position = next(i for i, note in enumerate(notes.calls) if note is update)
        selected = next(note for note in notes.calls[position:] if note["call"] == "select_actions")
        assert torch.equal(target["args"][4], selected["result"][-len(target["args"][4]) :])


@scripts
def test_as_many_critic_updates_as_asked_for(played, script):
    """One a step offline (RLPD: none), and round(steps of the episode x utd) after each episode."""
    for utd in (UTD, 3.0):
        notes = played(script, *(() if utd == UTD else ("--utd", str(utd))))
        assert len(notes.of("critic_update", "offline")) == (0 if script is RLPD else OFFLINE)
        assert rounds(notes, "critic_update") == [round(LENGTH * utd)] * EPISODES
        assert all(len(note["rows"]) == 16 for note in notes.of("critic_update"))


def rounds(notes, call):
    """How often it was called in each round of phase 3, one round beginning with each episode."""
    counts = []
    for note in notes.calls:
        if note["phase"] == "online" and note["call"] == "collect_episode":
            counts.append(0)
        if note["phase"] == "online" and note["call"] == call:
            counts[-1] += 1
    return counts


# --- phases 2 and 3: distilling ---
@scripts
def test_as_much_distilling_as_asked_for(played, script):
    """round(steps x distill_ratio) updates after each episode; of IQL also after every distill_every updates."""
    for ratio in (RATIO, 2.0):
        notes = played(script, *(() if ratio == RATIO else ("--distill-ratio", str(ratio))))
        offline = [note["args"][5] for note in notes.of("distill", "offline")]
        assert offline == ([round(EVERY * ratio)] * (OFFLINE // EVERY) if script is IQL else [])
        assert [note["args"][5] for note in notes.of("distill", "online")] == [round(LENGTH * ratio)] * EPISODES
        assert rounds(notes, "policy_update") == [round(LENGTH * ratio)] * EPISODES
        assert len(notes.of("policy_update", "offline")) == sum(offline)
    assert not played(script, "--distill-ratio", "0").of("distill")


@scripts
def test_a_round_is_an_episode_then_distilling_then_the_critic(played, script):
    """RLPD's critic starts from nothing and is trained before it teaches."""
    notes, order = played(script), []
    for note in notes.calls:
        name = note["call"]
        if note["phase"] == "online" and name in ("collect_episode", "distill", "critic_update") and not note["inside"]:
            order += [name] if order[-1:] != [name] else []
    one = ["collect_episode", *(["critic_update", "distill"] if script is RLPD else ["distill", "critic_update"])]
    assert order == one * EPISODES
    assert len(notes.buffer) == ROWS + len(notes.of("collect_episode")) * LENGTH  # every episode went into the buffer
    seeds = [note["args"][2] for note in notes.of("collect_episode")]
    assert len(set(seeds)) == len(seeds)


@scripts
def test_distilling_teaches_candidates_of_states_that_transitions_begin_with(played, script):
    """Not of the states they lead to, of which each trajectory's last has no action; online ones are among them."""
    notes = played(script, "--distill-ratio", "2.0", "--no-distill-data-actions")
    buffer = notes.buffer
    begins = {tuple(row.tolist()) for row in buffer.states[buffer.obs_index]}
    offline = {tuple(row.tolist()) for row in torch.tensor(made_up_dataset().observations)}
    updates = notes.of("policy_update", inside="distill")
    taught = {tuple(row.tolist()) for note in updates for row in note["args"][3]}
    assert all(note["samples"] for note in updates)
    assert taught <= begins and len(offline & taught) > 0.7 * len(offline)
    assert taught - offline


@scripts
@pytest.mark.parametrize("flags", [DRAWN_DISTILLING, DRAWN_ACTING], ids=["greedy acting", "greedy distilling"])
def test_greedy_or_drawn_is_as_asked_for_in_each_use(played, script, flags):
    """Acting by --greedy-rollouts, distilling by --distill-selection, the critic's targets always greedy."""
    notes = played(script, *flags)
    acting = notes.of("select_actions", inside=False) + notes.of("select_actions", inside="collect_episode")
    distilling, targets = (notes.of("select_actions", inside=name) for name in ("distill", "critic_update"))
    for uses, greedy in ((acting, flags is DRAWN_DISTILLING), (distilling, flags is DRAWN_ACTING), (targets, True)):
        assert uses or (uses is targets and script is IQL)
        for note in uses:
            assert torch.equal(note["result"], best_of(*note["args"][:2])) or not greedy
        assert greedy or any(not torch.equal(note["result"], best_of(*note["args"][:2])) for note in uses)
    for note in notes.of("distill"):
        taught = [u["args"][4] for u in notes.of("policy_update", note["phase"], "distill")]
        assert note["result"][0].shape[:2] == (note["args"][5], 16)
        assert any(torch.equal(note["result"][0][0], actions) for actions in taught)


@scripts
@pytest.mark.parametrize("below", [0.0, 1e9])
def test_the_measured_spread_of_q_decides_how_to_distill(played, script, below):
    """--distill-selection auto, online, and against the choice for acting, which only stands in where none is known."""
    acting = "--no-greedy-rollouts" if below else "--greedy-rollouts"
    notes = played(script, "--distill-selection", "auto", "--greedy-below-std", str(below), acting)
    assert {note["args"][6] for note in notes.of("distill", "online")} == {below > 0}
    assert {note["args"][6] for note in notes.of("distill", "offline")} <= {acting == "--greedy-rollouts"}


@scripts
def test_moments_are_fresh_when_a_phase_begins(played, script):
    """Both optimizers online; and the policy's when IQL begins to distill offline. Afterwards they are kept."""
    notes = played(script)
    for call in ("policy_update", "critic_update"):
        for phase in ("cloning", "offline", "online"):
            fresh = [note["fresh"] for note in notes.of(call, phase)]
            assert fresh == [True] * bool(fresh) + [False] * (len(fresh) - 1), (call, phase)
        assert notes.of(call, "online")


@scripts
def test_online_distilling_annotates_with_the_present_policy(played, script):
    drawn = played(script).of("refresh_candidates", "online", "distill")
    assert drawn and all(torch.equal(note["weights"], note["now"]) for note in drawn)


# --- IQL ---
@pytest.mark.parametrize("every", [0, 1, 2])
def test_iql_refreshes_its_sampler_as_often_as_asked_for(played, every):
    """0: offline candidates stay the cloned policy's; n: the present policy's in each n-th round and the first."""
    notes = played(IQL, "--refresh-every", str(every))
    drawn = notes.of("refresh_candidates", "offline", "distill")
    cloned = drawn[0]["now"]
    assert len(drawn) == OFFLINE // EVERY and len({tuple(note["now"].tolist()) for note in drawn}) == len(drawn)
    for i, note in enumerate(drawn):
        assert torch.equal(note["weights"], drawn[i - i % every]["now"] if every else cloned)


def test_idql_never_distills_and_acts_by_rank_alone(played):
    notes = played(IQL, "--extraction", "idql", "--num-gradient-steps", "2")
    assert (
        not notes.of("distill") and not notes.of("policy_update", "offline") and not notes.of("policy_update", "online")
    )
    assert {note["args"][3].num_gradient_steps for note in notes.of("optimize")} == {0}
    steps = played(IQL, "--num-gradient-steps", "2").of("optimize")
    assert {note["args"][3].num_gradient_steps for note in steps} == {2}


# --- AS THE PAPER HAS IT, AND THE RELEASE'S WAY BEHIND A FLAG ---


@scripts
@pytest.mark.parametrize("mixed", [False, True])
def test_distilling_looks_at_all_states_alike_and_the_critic_at_half_online(played, script, mixed):
    """Equation 4.4: an online row counts as much as an offline one. The half and half is the critic's batch alone."""
    notes = played(script, "--distill-ratio", "20", *(["--distill-mixed"] if mixed else []))
    first = notes.buffer.states[notes.buffer.obs_index[:ROWS]]
    online = [
        ~(note["args"][3][:, None] == first[None]).all(-1).any(1)
        for note in notes.of("policy_update", "online", "distill")
    ]
    share = torch.cat(online).float().mean().item()
    rows = [ROWS + LENGTH * n for n in (1, 2)] if script is not RLPD else [ROWS + LENGTH * (2 + n) for n in (1, 2)]
    uniform = np.mean([1 - ROWS / n for n in rows])
    assert share == pytest.approx(0.5 if mixed else uniform, abs=0.04), share
    assert {note["is_online"].item() for note in notes.of("critic_update", "online")} == {0.5}


@pytest.mark.parametrize(
    ("script", "flags"),
    [(one, flags) for one in FLAGS for flags in ((), ("--no-distill-data-actions",))]
    + [(one, ("--target-data-actions",)) for one in FLAGS if one is not IQL],  # whose targets look at no candidates
    ids=lambda value: value.__name__ if hasattr(value, "__name__") else " ".join(value),
)
def test_the_datas_own_action_is_a_candidate_where_it_should_be(played, script, flags):
    """When distilling (algorithm 1, line 3), not in the critic's targets and not when acting, unless asked for."""
    notes = played(script, *flags)
    given = {"distill": flags != ("--no-distill-data-actions",), "critic_update": flags == ("--target-data-actions",)}
    for note in notes.of("optimize"):
        where = next((name for name in given if name in note["inside"]), None)
        data_actions = (*note["args"], None)[5]
        assert (data_actions is not None) == given.get(where, False)
        if data_actions is not None:
            obs = note["args"][1]
            index = (notes.buffer.states[None] == obs[:, None]).all(-1).float().argmax(1)
            torch.testing.assert_close(data_actions, notes.buffer.action_at[index], equal_nan=True)
            assert note["result"][0].shape[1] == 3 + 1  # beside the three kept, in nobody's place
    assert notes.of("optimize", inside="distill")


@scripts
@pytest.mark.parametrize("flags", [DRAWN_ACTING, [*DRAWN_DISTILLING, "--sample-backup"]], ids=["acting", "learning"])
def test_all_candidates_climb_where_one_is_drawn(played, script, flags):
    """Only where nothing but the best is looked at may the others stay as they are."""
    if script is IQL:
        flags = [flag for flag in flags if flag != "--sample-backup"]
    notes = played(script, *flags)
    drawn = {
        "collect_episode": flags == DRAWN_ACTING,
        "distill": flags != DRAWN_ACTING,
        "critic_update": flags != DRAWN_ACTING,
    }
    for note in notes.of("optimize"):
        where = next((name for name in drawn if name in note["inside"]), "collect_episode")  # or an evaluation
        assert note["args"][4] == (not drawn[where])
    assert notes.of("optimize", inside="distill") and notes.of("optimize", inside="collect_episode")


@pytest.mark.parametrize("script", [CALQL, parl_flow_calql, TRANSFORMER, RLPD], ids=lambda script: script.__name__)
@pytest.mark.parametrize("drawn", [False, True])
def test_targets_are_of_the_best_action_or_of_a_drawn_one(played, script, drawn):
    """The release's greedy action, or section 4.3's draw from equation 4.3; of what is optimized at the next states."""
    notes = played(script, *(["--sample-backup"] if drawn else []))
    uses = notes.of("select_actions", inside="critic_update")
    same = [torch.equal(note["result"], best_of(*note["args"][:2])) for note in uses]
    assert all(same) != drawn
    for use, target in zip(uses, notes.of("td_target")):
        assert torch.equal(target["args"][4], use["result"][-len(target["args"][4]) :])
    assert (
        script.Args(**script.PRESETS["kitchen"]).sample_backup
        and not script.Args(**script.PRESETS["antmaze"]).sample_backup
    )


@pytest.mark.parametrize("after", [0.0, 0.5, 1.0])
def test_iql_distils_offline_once_its_critic_can_rank(played, after):
    """No round in the first share of the phase; with 1 none at all, which is the release."""
    notes, done, rounds_at = played(IQL, "--distill-after", str(after)), 0, []
    for note in notes.calls:
        done += note["call"] == "critic_update" and note["phase"] == "offline"
        if note["call"] == "distill" and note["phase"] == "offline":
            rounds_at.append(done)
    assert rounds_at == [n for n in range(EVERY, OFFLINE + 1, EVERY) if n - 1 >= after * OFFLINE]
    assert notes.of("distill", "online")
    assert IQL.Args().distill_after > 0 and IQL.Args().ensemble_size == 2


def test_rlpd_judges_the_spread_by_its_last_rounds(played, monkeypatch):
    """The first rounds' is that of a random critic."""
    seen, choose = [], RLPD.choose_greedy_distillation
    monkeypatch.setattr(
        RLPD, "choose_greedy_distillation", lambda args, q_stds: seen.append(len(q_stds)) or choose(args, q_stds)
    )
    played(RLPD, "--num-online-episodes", "13", "--num-online-evals", "0")
    assert seen == [*range(1, 11), 10, 10, 10]
