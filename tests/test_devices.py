"""What can be known of a GPU where there is none: every update's tensors are on one device, and `--compile`."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import parl_diffusion_calql
import parl_diffusion_iql
import parl_diffusion_rlpd
import parl_flow_calql
import parl_transformer_calql
from benchmarks.harness import fast_critic
from benchmarks.tasks.dataset import Dataset

SCRIPTS = [parl_diffusion_calql, parl_flow_calql, parl_diffusion_iql, parl_diffusion_rlpd, parl_transformer_calql]
scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
OBS, ACT, ROWS = 4, 2, 60
OTHER = torch.device("lazy:0")  # a device that is not the CPU and whose tensors hold no data here


def settings(script, **more):
    small = dict(num_samples=5, num_keep=3, num_bins=8, batch_size=8, ensemble_size=3, cql_actions=2, discount=0.9)
    known = script.Args.__dataclass_fields__
    return script.Args(**{name: value for name, value in (small | more).items() if name in known})


def made_up_data() -> Dataset:
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(ROWS + 1, OBS)).astype(np.float32)
    return Dataset(
        observations=obs[:-1], next_observations=obs[1:], rewards=-np.ones(ROWS, np.float32),
        actions=rng.uniform(-1, 1, (ROWS, ACT)).astype(np.float32), terminals=np.zeros(ROWS, bool),
        timeouts=np.arange(ROWS) % 20 == 19,
    )  # fmt: skip


class Parts:
    """A script's networks, optimizers and buffer, as its `main` makes them, small."""

    def __init__(self, script, args, device="cpu", move=lambda network: network):
        def make_policy():
            if script is parl_transformer_calql:
                return script.TransformerPolicy(OBS, ACT, 16, 1, 8, 2)
            Policy = script.FlowPolicy if script is parl_flow_calql else script.DiffusionPolicy
            return Policy(OBS, ACT, 3, 8, 1, dropout=0.1)

        def make_critic(action_dim=ACT, members=args.ensemble_size, bins=8):
            critic = script.Critic(OBS, action_dim, (16, 16), members, bins, -10.0)
            torch.nn.init.normal_(critic.head_weight)  # Q differs between candidates by more than rounding
            return move(critic)

        torch.manual_seed(0)
        self.script, self.args, self.device = script, args, torch.device(device)
        self.policy, self.critic = move(make_policy()), make_critic()
        torch.manual_seed(0)  # copies, made like this since tensors without data cannot be copied
        self.ema_policy, self.target_critic = move(make_policy()), make_critic()
        self.value = [make_critic(0, 1, 1)] if script is parl_diffusion_iql else []
        for network in (self.ema_policy.eval(), self.target_critic):
            network.requires_grad_(False)
        critics = [parameter for network in (self.critic, *self.value) for parameter in network.parameters()]
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), 1e-3)
        self.critic_optimizer = torch.optim.Adam(critics, 1e-3)
        self.buffer = script.ReplayBuffer(made_up_data(), args, device)
        self.update_critic = script.critic_update

    def play(self):
        """Cloning, caching, two critic updates, a round of distilling, an episode more. Returns the metrics."""
        script, args, buffer = self.script, self.args, self.buffer
        pair, optimizer, metrics = (self.policy, self.ema_policy), self.policy_optimizer, {}
        rows = torch.randint(ROWS, (8,), device=self.device)
        batch = buffer.states[buffer.obs_index[rows]], buffer.data_actions(buffer.obs_index[rows])
        metrics["policy_loss"] = script.policy_update(*pair, optimizer, *batch, 0.002)
        script.refresh_candidates(self.ema_policy, buffer, torch.arange(len(buffer.states), device=self.device))
        for index in buffer.sample_index((2, args.batch_size)):
            networks = self.critic, self.target_critic, *self.value
            metrics |= self.update_critic(*networks, self.critic_optimizer, buffer, index, args)
        metrics |= script.distill(*pair, optimizer, self.critic, buffer, 2, True, args)[1]
        actions, q = script.optimize(self.critic, buffer.states[:1], buffer.candidates[:1], args, True)
        metrics["action"] = script.select_actions(actions, q, False)
        buffer.add(made_up_data())
        metrics["mixed"] = buffer.sample_index((2, args.batch_size))
        return metrics


@contextlib.contextmanager
def without_data(monkeypatch):
    """Tensors that have a device and a shape but no data; what would depend on data is given a shape."""

    def move(network):
        for module in network.modules():
            for parts in (module._parameters, module._buffers):
                for name, old in [part for part in parts.items() if part[1] is not None]:
                    new = torch.empty(old.shape, device=OTHER)
                    parts[name] = torch.nn.Parameter(new) if isinstance(old, torch.nn.Parameter) else new
        return network

    def as_tensor(array, device=None, dtype=None):
        dtype = array.dtype if isinstance(array, torch.Tensor) else torch.from_numpy(array[:0].copy()).dtype
        return torch.empty(array.shape, dtype=dtype, device=device)

    def pairs(mask):
        return tuple(torch.zeros(7, dtype=torch.long, device=mask.device) for _ in range(mask.dim()))

    with FakeTensorMode():
        monkeypatch.setattr(torch, "as_tensor", as_tensor)
        monkeypatch.setattr(torch.Tensor, "unique", lambda self: self.flatten())
        monkeypatch.setattr(fast_critic, "pairs", pairs)
        yield move


@scripts
@pytest.mark.parametrize("flags", [{}, {"climb_all": True, "plain": True}, {"sample_backup": True}], ids=str)
def test_every_tensor_of_an_update_is_on_the_device(script, flags, monkeypatch):
    """A tensor that is left on the CPU meets one of another device: torch refuses that with data and without."""
    with without_data(monkeypatch) as move:
        metrics = Parts(script, settings(script, **flags), OTHER, move).play()
        assert len(metrics) > 8 and all(value.device.type == "lazy" for value in metrics.values())


class VLAParts:
    """A tiny OpenVLA with adapters, its critic, optimizers and an episode, as `main` makes them."""

    def __init__(self):
        script = pytest.importorskip("parl_openvla_real", reason="pip install -r requirements-openvla.txt")
        pytest.importorskip("peft", reason="pip install -r requirements-openvla.txt")
        self.args = script.Args(
            num_samples=5, num_keep=3, num_gradient_steps=2, batch_size=8, distill_batch_size=4, ensemble_size=3,
            use_proprio=True, sample_backup=True,
        )  # fmt: skip
        sizes = script.Sizes(28, (16, 3, 2, 24), (12, 3, 2, 20), (16, 2, 2, 24), 32, 400, empty_token=2)
        self.script, self.model = script, script.OpenVLA(sizes)
        script.add_lora(self.model, 2)
        self.critic, self.target_critic = (script.PixelCritic(7, 7, 4, (1,), (8,), 3) for _ in range(2))

    def move(self, device, move):
        script, self.device = self.script, device
        model, self.critic, self.target_critic = map(move, (self.model, self.critic, self.target_critic))
        self.policy = script.VLAPolicy(model, lambda text: [1, 3, 4], "go")
        self.policy_optimizer = torch.optim.Adam(script.adapters(model).values(), 1e-3)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), 1e-3)
        self.buffer = script.EpisodeBuffer((28, 16), self.args, device)
        obs = np.zeros((ROWS + 1, 3 * 28**2 + 3 * 16**2 + 28), np.uint8)
        episode = dict(actions=np.zeros((ROWS, 7), np.float32), rewards=np.zeros(ROWS, np.float32))
        self.buffer.add(episode | dict(obs=obs, terminals=np.zeros(ROWS, bool)))
        self.buffer.versions = ["this"]

    def play(self):
        """Cloning, candidates, a critic update, a round of distilling, a decision. Returns the metrics."""
        script, args, buffer, policy = self.script, self.args, self.buffer, self.policy
        rows = torch.randint(ROWS, (4,), device=self.device)
        loss = script.supervised_step(
            policy, self.policy_optimizer, script.random_shift(buffer.states[rows]), buffer.actions[rows]
        )
        metrics = {"policy_loss": loss, "candidates": policy.sample(buffer.states[:4], 5)}
        index = buffer.rows_with("this")[torch.randint(ROWS, (args.batch_size,), device=self.device)]
        networks = self.critic, self.target_critic, self.critic_optimizer
        metrics |= script.critic_update(*networks, buffer, index, args)
        metrics |= script.distill_lora(policy, self.policy_optimizer, self.critic, buffer, 2, True, args)
        features = self.critic.encode(buffer.small[:1], buffer.proprio[:1])
        actions, q = script.optimize(self.critic, features, policy.sample(buffer.states[:1], 5), args, True)
        return metrics | {"action": script.select_actions(actions, q, True)}


def test_every_tensor_of_a_vlas_update_is_on_the_device(monkeypatch):
    parts = VLAParts()
    with without_data(monkeypatch) as move:
        parts.move(OTHER, move)
        metrics = parts.play()
        assert len(metrics) > 12 and all(value.device.type == "lazy" for value in metrics.values())
        right = parts.script.random_shift
        monkeypatch.setattr(parts.script, "random_shift", lambda images: right(images) + torch.ones(1, 1)[0])
        with pytest.raises(RuntimeError, match="device"):
            parts.play()


@pytest.mark.parametrize("name", ["td_target", "select_actions", "hl_gauss_target"])
def test_a_tensor_left_on_the_cpu_is_found(name, monkeypatch):
    """The test above can fail."""
    script, right = parl_diffusion_calql, getattr(parl_diffusion_calql, name)
    monkeypatch.setattr(script, name, lambda *a, **k: right(*a, **k) + torch.ones(1, 1)[0])
    with without_data(monkeypatch) as move, pytest.raises(RuntimeError, match="device"):
        Parts(script, settings(script), OTHER, move).play()


@pytest.mark.parametrize("script", [SCRIPTS[i] for i in (0, 2, 4)], ids=lambda script: script.__name__)
def test_compiled_updates_do_the_same(script, monkeypatch):
    """The same draws and, to rounding, the same networks; by the tracer alone: the C++ compiler takes minutes."""
    traced = []

    def trace(function, options):
        assert options["fallback_random"]  # else the compiled function draws other numbers
        traced.append(function)
        return make(function, backend="aot_eager")

    make = torch.compile
    monkeypatch.setattr(torch, "compile", trace)
    results = []
    for choice in ("no", "yes"):
        torch._dynamo.reset()
        parts = Parts(script, settings(script, compile=choice))
        functions = fast_critic.compiled(parts.args, parts.device, parts.policy.loss, script.critic_update)
        parts.policy.loss, parts.update_critic = functions
        torch.manual_seed(1)
        results.append((parts.play(), parts.critic.state_dict(), parts.policy.state_dict(), torch.rand(1)))
    assert [function.__name__ for function in traced] == ["loss", "critic_update"]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_compile_is_for_gpus_unless_asked_for(monkeypatch):
    """auto: on CUDA and nowhere else; the default task's runs are shorter than compiling."""
    monkeypatch.setattr(torch, "compile", lambda function, options: "compiled")
    for choice, device, expected in [
        ("auto", "cpu", "plain"), ("auto", "cuda", "compiled"), ("no", "cuda", "plain"), ("yes", "cpu", "compiled"),
    ]:  # fmt: skip
        args = settings(parl_diffusion_calql, compile=choice)
        assert list(fast_critic.compiled(args, torch.device(device), "plain")) == [expected]
    for script in SCRIPTS:
        assert script.PRESETS["pointmaze"]["compile"] == script.PRESETS["laptop"]["compile"] == "no"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@scripts
def test_updates_on_a_gpu(script):
    """As on the CPU; and while the critic trains the host waits for the GPU only where candidates are chosen."""
    args = settings(script, climb_all=True)  # without it, one wait an update: how many can win
    parts = Parts(script, args, torch.device("cuda"), lambda network: network.cuda())
    parts.play()
    index = parts.buffer.sample_index((1, args.batch_size))[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        networks = parts.critic, parts.target_critic, *parts.value
        info = parts.update_critic(*networks, parts.critic_optimizer, parts.buffer, index, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(value) and value.is_cuda for value in info.values())


def test_the_parts_are_mains():
    """`Parts` copies what it cannot copy by the seed: the averaged policy and the target critic begin as the others."""
    parts = Parts(parl_diffusion_calql, settings(parl_diffusion_calql))
    for a, b in ((parts.policy, parts.ema_policy), (parts.critic, parts.target_critic)):
        torch.testing.assert_close(copy.deepcopy(a).state_dict(), b.state_dict(), rtol=0, atol=0)
