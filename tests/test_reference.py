"""Parity with the authors' JAX release: inputs, weights and outputs it computed are in tests/data/*.npz.

The files come from MaxSobolMark/PolicyAgnosticRL at commit a26a192, float32 on a CPU. Where the release departs from
the paper, the script's flag or constructor argument for the release's way is used: `shared_head`, `release_width`,
`keep_best_of_path`. Weights are in flax layout: kernels (in, out), the ensemble in front.

Left out, because the script has no such feature: the ensemble-minimum cases of local_opt (`*_ensmin`), the policy
without LayerNorm (`noln_*`) and sampling without clipping (`actions_bounds_1e6`).
"""

import dataclasses
import math
import pathlib
import types

import numpy as np
import pytest
import torch

import parl_diffusion_calql as script
from benchmarks.harness.fast_critic import FrozenCritic

DATA = pathlib.Path(__file__).parent / "data"
TOLERANCE = 1e-5  # of the largest entry of the expected array


# --- HELPERS ---


class Vectors:
    """An .npz file as tensors: `v["obs"]`; integers become int64, 0-d arrays become numbers."""

    def __init__(self, name):
        with np.load(DATA / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files}

    def __getitem__(self, key):
        array = self.arrays[key]
        if array.ndim == 0:
            return array.item()
        return torch.as_tensor(array.astype(np.int64) if array.dtype.kind == "i" else array)

    def __contains__(self, key):
        return key in self.arrays

    def tree(self, prefix):
        """The leaves below `prefix.`, by their names below it."""
        return {key[len(prefix) + 1 :]: self[key] for key in self.arrays if key.startswith(prefix + ".")}


def relative_error(actual, expected) -> float:
    """Largest difference, as a share of the largest entry expected."""
    actual, expected = torch.as_tensor(actual).detach(), torch.as_tensor(expected)
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    difference = (actual.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp(min=1e-12)).item()


def check(actual, expected, tolerance=TOLERANCE, what=""):
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e} exceeds {tolerance:.0e}"


def critic_leaves(critic):
    """(name in the release, parameter of ours) of every leaf of a critic with a shared head."""
    leaves = []
    for i in range(len(critic.weights)):
        leaves.append((f"network.Dense_{i}.kernel", critic.weights[i]))
        leaves.append((f"network.Dense_{i}.bias", critic.biases[i]))
    for i in range(len(critic.scales)):
        leaves.append((f"network.LayerNorm_{i}.scale", critic.scales[i]))
        leaves.append((f"network.LayerNorm_{i}.bias", critic.shifts[i]))
    return [*leaves, ("Dense_0.kernel", critic.head_weight), ("Dense_0.bias", critic.head_bias)]


def make_critic(vectors, prefix="critic", settings=""):
    """A Critic with the weights below `prefix`. Ours keep a singleton axis where a bias meets the batch."""
    tree = vectors.tree(prefix)
    kernels = [tree[f"network.Dense_{i}.kernel"] for i in range(2)]
    actions = next(name for name in ("actions", "act", "dataset_actions") if name in vectors)
    action_dim = vectors[actions].shape[-1]
    critic = script.Critic(
        obs_dim=kernels[0].shape[1] - action_dim, action_dim=action_dim, hidden=[k.shape[2] for k in kernels],
        ensemble_size=kernels[0].shape[0], num_bins=tree["Dense_0.bias"].shape[0],
        q_min=vectors[f"{settings}q_min"], q_max=vectors[f"{settings}q_max"],
        layer_norm="network.LayerNorm_0.scale" in tree, shared_head=True,
    )  # fmt: skip
    leaves = critic_leaves(critic)
    assert len(leaves) == len(list(critic.parameters())) == len(tree)
    with torch.no_grad():
        for name, parameter in leaves:
            parameter.copy_(tree[name].view(parameter.shape))
    return critic


def policy_leaves(policy):
    """(name in the release, parameter of ours, whether it is transposed) of every leaf of a policy."""
    linears = {"cond_encoder.Dense_0": policy.time1, "cond_encoder.Dense_1": policy.time2}
    linears |= {"reverse_network.Dense_0": policy.first, "reverse_network.Dense_1": policy.last}
    leaves = [("time_preprocess.kernel", policy.frequencies, False)]
    for i, block in enumerate(policy.blocks):
        name = f"reverse_network.MLPResNetBlock_{i}"
        linears |= {f"{name}.Dense_0": block.up, f"{name}.Dense_1": block.down}
        leaves += [(f"{name}.LayerNorm_0.scale", block.norm.weight, False)]
        leaves += [(f"{name}.LayerNorm_0.bias", block.norm.bias, False)]
    for name, linear in linears.items():
        leaves += [(f"{name}.kernel", linear.weight, True), (f"{name}.bias", linear.bias, False)]
    return leaves


def make_policy(vectors, prefix, dropout=0.0):
    """A DiffusionPolicy with the weights below `prefix`; the first layer's input is [time, obs, action] in both."""
    tree = vectors.tree(prefix)
    policy = script.DiffusionPolicy(
        obs_dim=5, action_dim=3, num_steps=vectors["diffusion_steps"], hidden=vectors["hidden_dim"],
        blocks=vectors["num_blocks"], time_dim=vectors["time_dim"], dropout=dropout,
    )  # fmt: skip
    leaves = policy_leaves(policy)
    assert len(leaves) == len(list(policy.parameters())) == len(tree)
    with torch.no_grad():
        for name, parameter, transposed in leaves:
            parameter.copy_((tree[name].T if transposed else tree[name]).reshape(parameter.shape))
    return policy


BOTH = pytest.mark.parametrize("wrap", [lambda critic: critic, FrozenCritic], ids=["plain", "frozen"])


# --- HL-GAUSS ---

HL_GAUSS = ["hl_gauss_r10_b16", "hl_gauss_r100_b128"]


@pytest.mark.parametrize("name", HL_GAUSS)
def test_hl_gauss_release_width(name):
    v = Vectors(name)
    critic = script.Critic(5, 3, (4,), 1, v["num_bins"], v["min_value"], v["max_value"])
    check(critic.edges, v["support"], what="edges")
    check(critic.centers, v["centers"], what="centres")
    target = script.hl_gauss_target(v["targets"], critic.edges, release_width=True)
    check(target, v["target_probs"], what="probabilities")
    check(target.sum(-1), v["target_probs_sum"], what="sum")
    check(target @ critic.centers, v["target_probs_to_scalar"], what="decoded")
    check(critic.value(v["logits"]), v["logits_to_scalar"], what="value of logits")
    cross_entropy = -(target * torch.log_softmax(v["logits"], -1)).sum(-1)
    check(cross_entropy, v["cross_entropy"], what="cross entropy")
    check(cross_entropy.mean(), v["cross_entropy_mean"], what="mean cross entropy")


@pytest.mark.parametrize("name", HL_GAUSS)
def test_hl_gauss_release_width_in_float64(name):
    v = Vectors(name)
    edges = torch.linspace(v["min_value"], v["max_value"], v["num_bins"] + 1, dtype=torch.float64)
    target = script.hl_gauss_target(v["targets"].double(), edges, release_width=True)
    # 2e-6: targets far outside were rounded to float32, and so was the expected array
    check(target, v["target_probs_float64_scipy_NOT_official"].double(), 2e-6, "probabilities")


@pytest.mark.parametrize("name", HL_GAUSS)
def test_hl_gauss_paper_width(name):
    """erf((edge - value) / (sqrt(2) sigma)), sigma = 0.75 bins: the paper's form, which no release vector covers."""
    v = Vectors(name)
    edges = v["support"]
    sigma = v["sigma"]
    assert sigma == pytest.approx(0.75 * (v["max_value"] - v["min_value"]) / v["num_bins"], rel=1e-6)
    margin = 2 * sigma  # further out the closed form below loses its digits
    inside = (v["targets"] > v["min_value"] - margin) & (v["targets"] < v["max_value"] + margin)
    targets = v["targets"][inside]
    assert len(targets) > 10
    expected = []
    for value in targets.tolist():
        erf = [math.erf((edge - value) / (math.sqrt(2) * sigma)) for edge in edges.tolist()]
        expected.append([(right - left) / (erf[-1] - erf[0]) for left, right in zip(erf, erf[1:])])
    expected = torch.tensor(expected, dtype=torch.float64)
    check(script.hl_gauss_target(targets.double(), edges.double()), expected, 1e-6, "in float64")
    check(script.hl_gauss_target(targets, edges), expected, what="in float32")


def test_hl_gauss_widths_differ_by_sqrt_2():
    edges = torch.linspace(-100, 0, 129, dtype=torch.float64)
    width, centers = 100 / 128, (edges[:-1] + edges[1:]) / 2
    std = []
    for release_width in (False, True):
        p = script.hl_gauss_target(torch.tensor([-50.0], dtype=torch.float64), edges, release_width)[0]
        variance = p @ centers**2 - (p @ centers) ** 2 - width**2 / 12  # Sheppard: binning adds width^2 / 12
        std.append(variance.sqrt().item() / width)
    assert std == pytest.approx([0.75, 0.75 * math.sqrt(2)], rel=1e-3)


# --- CRITIC ---


@pytest.mark.parametrize(
    "name", [f"critic_forward_{head}_{norm}" for head in ("dist", "mse") for norm in ("ln", "noln")]
)
def test_critic_forward(name):
    v = Vectors(name)
    critic = make_critic(v)
    assert critic.layer_norm == bool(v["layer_norm"]) and (critic.num_bins > 1) == bool(v["distributional"])
    obs, one, several = v["obs"], v["act"][:, None], v["act3"]
    check(critic(obs, one)[..., 0], v["q"], what="q")
    check(critic(obs, several), v["q3"], what="q of several actions")
    members = torch.tensor([2, 0, 2])
    check(critic(obs, several, members), v["q3"][members], what="q of some members")
    if v["distributional"]:
        check(critic.outputs(obs, one)[:, :, 0], v["logits"], what="logits")
    q, gradient = script.q_and_gradient(critic, obs, one)
    check(q[:, 0], v["q_mean_over_ensemble"], what="mean q")
    check(gradient[:, 0], v["dqmean_dact"], what="gradient of the mean")


# --- ACTION OPTIMIZATION ---

LOCAL_CASES = ["clip_step0p05", "noclip_step0p05", "clip_bigstep", "noclip_bigstep", "clip_step0p0003_T10"]


@pytest.mark.parametrize("head", ["dist", "mse"])
@pytest.mark.parametrize("case", LOCAL_CASES)
def test_local_optimization(head, case):
    v = Vectors(f"local_opt_{head}_ln")
    critic = make_critic(v)
    assert v[f"{case}.ensemble_min"] == 0
    low, high = (v["low"], v["high"]) if v[f"{case}.clip"] else (-torch.inf, torch.inf)
    actions, q = script.local_optimization(
        critic, v["obs"], v["act"][:, None], v[f"{case}.num_steps"], v[f"{case}.step_size"], low, high,
        keep_best_of_path=True,
    )  # fmt: skip
    best, rows = v[f"{case}.best_index"], torch.arange(len(v["obs"]))
    check(actions[:, 0], v[f"{case}.actions"], what="actions")
    check(q[:, 0], v[f"{case}.path_q"][best, rows], what="q")
    if "bigstep" in case:  # what tells the release's rule from the paper's: the best point is not always the last
        assert len(best.unique()) > 1


@pytest.mark.parametrize("head", ["dist", "mse"])
@pytest.mark.parametrize("case", ["clip_bigstep", "noclip_bigstep"])
def test_local_optimization_of_the_paper_follows_the_release_until_q_falls(head, case):
    """The paper's rule stops at the first point after which the release's path goes down."""
    v = Vectors(f"local_opt_{head}_ln")
    critic = make_critic(v)
    low, high = (v["low"], v["high"]) if v[f"{case}.clip"] else (-torch.inf, torch.inf)
    actions, q = script.local_optimization(
        critic, v["obs"], v["act"][:, None], v[f"{case}.num_steps"], v[f"{case}.step_size"], low, high
    )
    path_q, rows = v[f"{case}.path_q"], torch.arange(len(v["obs"]))
    stop = (path_q[1:] > path_q[:-1]).long().cumprod(0).sum(0)  # steps taken before the first that does not raise Q
    assert (stop < v[f"{case}.num_steps"]).any()
    check(actions[:, 0], v[f"{case}.path_actions"][stop, rows], what="actions")
    check(q[:, 0], path_q[stop, rows], what="q")


@pytest.mark.parametrize("head", ["dist", "mse"])
def test_global_optimization(head):
    v = Vectors(f"action_opt_{head}_ln")
    actions, q = script.global_optimization(make_critic(v), v["obs"], v["candidates"], v["num_actions_to_keep"])
    index = v["topk_indices"].flip(1)  # best first here, ascending in the release
    check(q, v["q_candidates"].gather(1, index), what="q")
    check(actions, v["candidates"].gather(1, index[..., None].expand(-1, -1, 3)), 0.0, "actions")


ACTION_CASES = ["keep4", "keep4_dataset", "keepall", "keep4_bigstep", "keep4_dataset_bigstep"]


@BOTH
@pytest.mark.parametrize("head", ["dist", "mse"])
@pytest.mark.parametrize("case", ACTION_CASES)
def test_optimize_actions(head, case, wrap):
    v = Vectors(f"action_opt_{head}_ln")
    critic, keep = wrap(make_critic(v)), v[f"{case}.num_actions_to_keep"]
    data_actions = v["dataset_actions"] if v[f"{case}.use_dataset_actions"] else None
    actions, q = script.optimize_actions(
        critic, v["obs"], v["candidates"], keep, v["num_steps"], v[f"{case}.step_size"], v["low"], v["high"],
        data_actions=data_actions, keep_best_of_path=True, replace_worst=True,
    )  # fmt: skip
    # The release's order is ascending where it ranks, with the dataset's action appended, and the given order where it
    # keeps all. Here it is best first, and the dataset's action stands last, where the worst one stood.
    if case == "keepall":
        order = v["q_candidates"].argsort(1, descending=True)
    elif data_actions is not None:
        order = torch.tensor([[*reversed(range(keep - 1)), keep - 1]]).expand(6, -1)
    else:
        order = torch.arange(keep).flip(0).expand(6, -1)
    # FrozenCritic adds in another order than the release, and steps of 0.4 magnify the rounding: 2e-5 was seen
    tolerance = 1e-4 if "bigstep" in case else TOLERANCE
    expected = v[f"{case}.optimized_actions"].gather(1, order[..., None].expand(-1, -1, 3))
    check(actions, expected, tolerance, "actions")
    check(q, v[f"{case}.q_optimized"].gather(1, order), tolerance, "q")
    check(script.select_actions(actions, q, greedy=True), v[f"{case}.argmax_action"], tolerance, "greedy action")
    probabilities = v[f"{case}.categorical_probs"].gather(1, order)
    check(torch.softmax(q, 1), probabilities, tolerance, "probabilities of equation 4.3")


@pytest.mark.parametrize("head", ["dist", "mse"])
def test_sampled_selection(head):
    """Frequencies of drawn actions against the release's distribution over them."""
    v = Vectors(f"action_opt_{head}_ln")
    actions, q, probabilities = (v[f"keep4.{x}"] for x in ("optimized_actions", "q_optimized", "categorical_probs"))
    torch.manual_seed(0)
    draws = 20_000
    for row in range(len(q)):
        drawn = script.select_actions(actions[row].expand(draws, -1, -1), q[row].expand(draws, -1), greedy=False)
        counts = (drawn[:, None] == actions[row]).all(-1).sum(0)
        assert counts.sum() == draws
        expected = draws * probabilities[row]
        assert ((counts - expected) ** 2 / expected).sum() < 25  # chi-square, 3 degrees of freedom: p = 1.5e-5


# --- CAL-QL ---

CALQL = ["calql_dist_sub2", "calql_dist_sub2_nomaxbackup", "calql_dist_nosub", "calql_mse_sub2"]


def calql_members(v):
    """The members the release drew for the TD target and for the penalty; it draws with replacement, we do not."""
    if v["cfg.critic_subsample_size"] < 0:
        return None, None
    return v["td.subsample_idx"], v["cql.subsample_idx"]


def one_of_copies(actions):
    """The release repeats each optimized action n times, (B, n, A) of identical rows; without max backup only once."""
    if actions.ndim == 2:
        return actions
    assert (actions == actions[:, :1]).all()
    return actions[:, 0]


def greedy_actions(v, critic, which):
    actions, q = script.optimize_actions(
        FrozenCritic(critic), v[which], v[f"base_policy_actions_{which}"], v["cfg.num_actions_to_keep"],
        v["cfg.num_steps"], v["cfg.step_size"], v["cfg.low"], v["cfg.high"], keep_best_of_path=True,
    )  # fmt: skip
    return script.select_actions(actions, q, greedy=True)


def calql(v, critic, target_critic):
    """target_q, the loss and its info, all by the script's functions."""
    td_members, cql_members = calql_members(v)
    current_actions, next_actions = (greedy_actions(v, critic, which) for which in ("obs", "next_obs"))
    target_q = script.td_target(
        target_critic, v["rewards"], v["masks"], v["next_obs"], next_actions, v["cfg.discount"], td_members
    )
    loss, info = script.calql_loss(
        critic, v["obs"], v["actions"], target_q, v["mc_returns"], current_actions, next_actions,
        v["cql.random_actions"], v["cfg.cql_alpha"], cql_members, release_width=True,
    )  # fmt: skip
    return target_q, loss, info


@pytest.mark.parametrize("name", CALQL)
def test_calql_actions_and_target(name):
    v = Vectors(name)
    critic, target_critic = make_critic(v, "critic", "cfg."), make_critic(v, "target_critic", "cfg.")
    # All copies of the release's next action are the same one, so the maximum over them (max backup) changes nothing.
    next_actions = greedy_actions(v, critic, "next_obs")
    check(next_actions, one_of_copies(v["td.next_actions"]), what="TD's next actions")
    check(next_actions, one_of_copies(v["cql.next_actions"]), what="penalty's next actions")
    check(greedy_actions(v, critic, "obs"), one_of_copies(v["cql.current_actions"]), what="current actions")
    q = target_critic(v["next_obs"], next_actions[:, None])
    copies = v["td.target_next_qs_all_ensemble"].reshape(*q.shape[:2], -1)
    check(q.expand_as(copies), copies, what="target critic")
    check(calql(v, critic, target_critic)[0], v["td.target_q"], what="target")


@pytest.mark.parametrize("name", CALQL)
def test_calql_loss_and_gradients(name):
    v = Vectors(name)
    critic, target_critic = make_critic(v, "critic", "cfg."), make_critic(v, "target_critic", "cfg.")
    _, loss, info = calql(v, critic, target_critic)
    check(loss, v["info.critic_loss"], what="loss")
    names = {
        "td_loss": "td_loss", "cql_loss": "cql_loss", "critic_loss": "critic_loss", "q_data": "predicted_qs",
        "target_q": "target_qs", "bound_rate": "calql_bound_rate",
    }  # fmt: skip
    assert set(info) == {*names, "q_random", "q_optimized"}
    for ours, theirs in names.items():
        check(info[ours], v[f"info.{theirs}"], what=ours)
    # The release evaluates the sampled actions on all members and averages its metrics over them, then draws; we draw
    # first, so these two metrics are means over the drawn members. The release keeps that array too: [random, next,
    # current].
    q, n = v["cql.q_samples_subsampled"], v["cfg.cql_n_actions"]
    check(info["q_random"], q[..., :n].mean(), what="q_random")
    check(info["q_optimized"], q[..., 2 * n :].mean(), what="q_optimized")
    if v["cfg.critic_subsample_size"] < 0:
        check(info["q_random"], v["info.random_action_values"], what="q_random")
        check(info["q_optimized"], v["info.current_action_values"], what="q_optimized")
    loss.backward()
    for leaf, parameter in critic_leaves(critic):
        check(parameter.grad, v[f"grad.{leaf}"].view(parameter.shape), what=f"gradient of {leaf}")


@pytest.mark.parametrize("name", CALQL)
def test_calql_update(name):
    """One Adam step and the target's moving average, with the loss put together by hand."""
    v = Vectors(name)
    critic, target_critic = make_critic(v, "critic", "cfg."), make_critic(v, "target_critic", "cfg.")
    optimizer = torch.optim.Adam(critic.parameters(), v["update.lr"])
    script.gradient_step(calql(v, critic, target_critic)[1], optimizer, critic, target_critic, v["update.tau"])
    check_update(v, critic, target_critic)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", CALQL)
def test_critic_update(name, plain, monkeypatch):
    """The same by `critic_update`, given the release's draws: the candidates' cache, the wiring, the step."""
    v = Vectors(name)
    critic, target_critic = make_critic(v, "critic", "cfg."), make_critic(v, "target_critic", "cfg.")
    td_members, cql_members = calql_members(v)
    B, E = len(v["obs"]), critic.ensemble_size
    args = dataclasses.replace(
        script.Args(), ensemble_size=E, target_subset=E if td_members is None else len(td_members),
        discount=v["cfg.discount"], cql_alpha=v["cfg.cql_alpha"], cql_actions=v["cfg.cql_n_actions"],
        target_tau=v["update.tau"], num_keep=v["cfg.num_actions_to_keep"], num_gradient_steps=v["cfg.num_steps"],
        gradient_step_size=v["cfg.step_size"], keep_best_of_path=True, hl_gauss_release_width=True, batch_size=B,
        plain=plain,
    )  # fmt: skip
    index = torch.arange(B)
    rows = {name: v[name] for name in ("rewards", "masks", "mc_returns")}
    action_at = torch.cat([v["actions"], torch.full_like(v["actions"], torch.nan)])
    rows |= {"obs_index": index, "next_index": index + B}
    candidates = torch.cat([v["base_policy_actions_obs"], v["base_policy_actions_next_obs"]])
    buffer = types.SimpleNamespace(states=torch.cat([v["obs"], v["next_obs"]]), candidates=candidates,
                                   data_actions=action_at.__getitem__, **rows)  # fmt: skip
    draws = [torch.arange(E) if m is None else m for m in (td_members, cql_members)]  # in the order of use
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: draws.pop(0))
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: (v["cql.random_actions"] + 1) / 2)
    optimizer = torch.optim.Adam(critic.parameters(), v["update.lr"])
    info = script.critic_update(critic, target_critic, optimizer, buffer, index, args)
    assert not draws
    check(info["critic_loss"], v["update.critic_loss"], what="loss")
    for leaf, parameter in critic_leaves(critic):
        check(parameter.grad, v[f"grad.{leaf}"].view(parameter.shape), what=f"gradient of {leaf}")
    check_update(v, critic, target_critic)


def check_update(v, critic, target_critic):
    for (leaf, parameter), (_, target) in zip(critic_leaves(critic), critic_leaves(target_critic)):
        new, new_target = (v[f"update.new_{name}.{leaf}"].view(parameter.shape) for name in ("critic", "target_critic"))
        check(parameter, new, what=leaf)
        check(target, new_target, what=f"target's {leaf}")
        # The step is 3e-4 at most and the target's 5e-3 of a small distance, so look at them apart from the weights.
        # Float32 weights of about 1 carry 1e-7, and where the gradient is near 0 Adam's first step magnifies rounding.
        before, target_before = (v[f"{which}.{leaf}"].view(parameter.shape) for which in ("critic", "target_critic"))
        firm = v[f"grad.{leaf}"].view(parameter.shape).abs() > 1e-5
        torch.testing.assert_close((parameter.detach() - before)[firm], (new - before)[firm], rtol=0, atol=6e-7)
        torch.testing.assert_close(target.detach() - target_before, new_target - target_before, rtol=0, atol=6e-7)


# --- DIFFUSION POLICY ---


@pytest.mark.parametrize("num_steps", [5, 10, 25])
def test_diffusion_schedule(num_steps):
    v = Vectors("ddpm_schedule")
    check(script.cosine_beta_schedule(num_steps), v[f"K{num_steps}.betas"], what="schedule")
    policy = script.DiffusionPolicy(5, 3, num_steps, hidden=4, blocks=1, time_dim=4)
    check(policy.betas, v[f"K{num_steps}.betas"], what="betas")
    check(policy.alphas, v[f"K{num_steps}.alphas"], what="alphas")
    check(policy.alpha_bars, v[f"K{num_steps}.alpha_hats"], what="cumulative product of alphas")
    # The last alpha-bar is small: it matters by itself, in 1 / sqrt(alpha) and as the signal left in a_K.
    assert policy.alpha_bars[-1].item() == pytest.approx(v[f"K{num_steps}.alpha_hats"][-1].item(), rel=1e-4)


def noise_prediction(policy, obs, noisy_actions, t):
    obs_part, time_parts = policy.first_layer_parts(obs)
    return policy.predict_noise(obs_part + time_parts[t], noisy_actions)


@pytest.mark.parametrize("prefix, output", [("actor", "params"), ("target_actor", "target_params")])
def test_diffusion_network(prefix, output):
    v = Vectors("ddpm_network")
    # The release's rate is 0 there; any rate is the same outside training.
    policy = make_policy(v, prefix, dropout=0.1).eval()
    obs, noisy_actions = v["obs"][:, 0], v["noisy_actions"][:, 0]
    for t in range(5):
        prediction = noise_prediction(policy, obs, noisy_actions, torch.full((6,), t))
        check(prediction, v[f"eps_pred_{output}_t{t}"][:, 0], what=f"step {t}")


def test_diffusion_network_at_mixed_steps():
    v = Vectors("ddpm_network")
    policy = make_policy(v, "actor")
    obs, noisy_actions, t = v["obs"][:, 0], v["noisy_actions"][:, 0], v["mixed_t"]
    check(policy.time_features(t), v["cond_encoder_mixed_t"], what="time features")
    check(noise_prediction(policy, obs, noisy_actions, t), v["eps_pred_params_mixed_t"][:, 0], what="prediction")


def test_diffusion_sampling():
    v = Vectors("ddpm_sampling")
    policy, repeat = make_policy(v, "target_actor").eval(), v["repeat"]  # the release samples the averaged copy
    assert v["z_timesteps"].tolist() == [4, 3, 2, 1, 0]
    # Row b of obs is rows 4b to 4b + 3 of the release's noise; its last draw, like ours, is not used.
    noise = torch.cat([v["x_T"][None], v["z"]]).view(6, 6, repeat, 3).transpose(0, 1)  # states first
    actions = policy.sample(v["obs"][:, 0], repeat, noise)
    check(actions, v["actions"], what="actions")
    assert (v["actions"].abs() == 1).any() and (v["actions"].abs() < 1).any()  # clipped and not: both are covered
    noise[:, -1] = torch.nan
    assert torch.equal(policy.sample(v["obs"][:, 0], repeat, noise), actions)


def test_diffusion_loss_gradients_and_average():
    v = Vectors("ddpm_bc_loss")
    policy, average = make_policy(v, "actor"), make_policy(v, "target_before_update")
    obs, actions, noise, t = v["obs"][:, 0], v["actions"][:, 0], v["noise"][:, 0], v["time"]
    loss = policy.loss(obs, actions, t, noise)
    check(loss, v["loss"], what="loss")
    loss.backward()
    for leaf, parameter, transposed in policy_leaves(policy):
        expected = v[f"grad.{leaf}"]
        expected = (expected.T if transposed else expected).reshape(parameter.shape)
        check(parameter.grad, expected, what=f"gradient of {leaf}")
    # The release's learning rate is 0 in the first update (warm-up), so only the averaged copy moves.
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.0)
    script.policy_update(policy, average, optimizer, obs, actions, ema_rate=0.002)
    for leaf, parameter, transposed in policy_leaves(average):
        expected, before = (v[f"target_{when}_update.{leaf}"] for when in ("after", "before"))
        if transposed:
            expected, before = expected.T, before.T
        check(parameter, expected.reshape(parameter.shape), what=leaf)
        moved = parameter.detach() - before.reshape(parameter.shape)
        torch.testing.assert_close(moved, (expected - before).reshape(parameter.shape), rtol=0, atol=6e-7)
