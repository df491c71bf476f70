"""The README's recipe for a policy of one's own, as written there: in a copy of the script, to the end of a toy run."""

import importlib.util
import pathlib
import re
import sys

import numpy as np
import pytest
import torch
from test_stub_harness import TOY, rows_of

from benchmarks import cost

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = ["parl_diffusion_calql", "parl_diffusion_iql", "parl_diffusion_rlpd", "parl_flow_calql"]
SHORT = "--num-offline-steps 6 --num-offline-evals 1 --distill-every 3 --num-warmup-episodes 2".split()


def code_after(label: str) -> str:
    """The README's code block below the comment of this label."""
    (found,) = re.findall(rf"<!-- {label} -->\n```python\n(.+?)```", README, re.DOTALL)
    return found


def copy_of(name: str, folder: pathlib.Path) -> pathlib.Path:
    """A copy of the script with the README's two replacements, and nothing else."""
    source = (ROOT / f"{name}.py").read_text()
    block = re.compile(r"(?<=POLICY ---\n).+?(?=# --- CLONING ---)", re.DOTALL)
    made = re.compile(r"^    policy = \w+Policy\(.+\n", re.MULTILINE)
    assert len(block.findall(source)) == 1 and len(made.findall(source)) == 1
    source = block.sub(lambda _: code_after("own policy") + "\n\n", source)
    source = made.sub(lambda _: code_after("own policy, made"), source)
    (folder / "my_policy.py").write_text(source)
    return folder / "my_policy.py"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """The copy as a module, which leaves again after the test."""

    def load(name):
        spec = importlib.util.spec_from_file_location("my_policy", copy_of(name, tmp_path))
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "my_policy", module)
        spec.loader.exec_module(module)
        monkeypatch.setattr(module, "finish", lambda *_, **__: None)
        return module

    return load


def flags_of(script):
    fields = script.Args.__dataclass_fields__
    return [
        *TOY,
        *(part for pair in zip(SHORT[::2], SHORT[1::2]) if pair[0][2:].replace("-", "_") in fields for part in pair),
    ]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_recipe_runs_to_its_end(name, load, tmp_path):
    """All three phases; the policy learns by its own loss in each; its weights are found in the checkpoint."""
    script = load(name)
    script.main([*flags_of(script), "--runs", str(tmp_path / "runs")])
    (folder,) = (tmp_path / "runs").iterdir()
    assert "my_policy" in folder.name
    rows = rows_of(folder)
    assert {row["phase"] for row in rows} >= {"cloning", "online"}
    assert all(np.isfinite(float(row[key])) for row in rows for key in row if key.endswith(("loss", "_q", "rate")))
    assert any("distill_loss" in row for row in rows)
    modules = torch.load(folder / "checkpoint.pt", weights_only=True)["modules"]
    assert modules["policy"].keys() == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}
    assert not torch.equal(modules["policy"]["net.0.bias"], modules["ema_policy"]["net.0.bias"])


def test_it_is_twenty_lines():
    assert len(code_after("own policy").splitlines()) <= 22


def test_weights_that_somebody_else_cloned(load, tmp_path):
    """A state dict made without this repository's loop: it is what the run starts from."""
    script = load(SCRIPTS[0])
    torch.manual_seed(3)
    torch.save(script.MixturePolicy(4, 2).state_dict(), tmp_path / "mine.pt")
    less = "--num-offline-steps 0 --num-offline-evals 0 --num-online-episodes 0".split()
    flags = ["--policy-checkpoint", str(tmp_path / "mine.pt"), "--runs", str(tmp_path / "runs"), *less]
    script.main([*TOY, *flags])
    (folder,) = (tmp_path / "runs").iterdir()
    found = torch.load(folder / "checkpoint.pt", weights_only=True)["modules"]["ema_policy"]
    torch.manual_seed(3)
    for name, weight in script.MixturePolicy(4, 2).state_dict().items():
        assert torch.equal(found[name], weight)


def test_it_keeps_two_modes(load):
    """Cloned with its loss on actions at (0.7, 0.7) and (-0.7, -0.7): samples lie at both, in shape and in range."""
    script = load(SCRIPTS[0])
    torch.manual_seed(0)
    policy = script.MixturePolicy(2, 2)
    optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
    for _ in range(400):
        actions = 0.7 * (torch.randint(2, (128, 1)) * 2.0 - 1).expand(-1, 2)
        optimizer.zero_grad()
        policy.loss(torch.randn(128, 2), actions).backward()
        optimizer.step()
    samples = policy.sample(torch.randn(300, 2), 7)
    assert samples.shape == (300, 7, 2) and (samples.abs() <= 1).all() and not samples.requires_grad
    near = [((samples - mode * 0.7).abs() < 0.25).all(-1).float().mean().item() for mode in (1, -1)]
    assert min(near) > 0.3 and sum(near) > 0.9, near


def test_a_script_whose_policy_has_other_flags_tells_no_time(load):
    """Where the flags of the block are gone as well, nothing is known of what the policy costs, and none is told."""
    script = load(SCRIPTS[0])

    class Args:
        pass

    for name, value in vars(script.Args()).items():
        if name not in ("diffusion_steps", "policy_hidden", "policy_blocks"):
            setattr(Args, name, value)
    assert cost.phase_flops(script.Args(), 4, 2, 100, 10) and cost.phase_flops(Args, 4, 2, 100, 10) == {}
