"""--policy-checkpoint: a run that starts from weights which somebody else cloned, and files that it refuses."""

import json
import os
import pickle

import pytest
import torch
from test_stub_harness import FLAGS, TOY, rows_of

import parl_diffusion_calql as script
import parl_transformer_calql

NOTHING_MORE = {
    True: "--num-offline-steps 0 --num-offline-evals 0 --num-online-episodes 0".split(),
    False: "--num-warmup-episodes 1 --num-online-episodes 0".split(),  # RLPD has no offline phase
}
scripts = pytest.mark.parametrize("one", FLAGS, ids=lambda one: one.__name__)


def run(one, folder, *flags):
    """The script run to its end without a picture; the folder it left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one, "finish", lambda *_, **__: None)
        one.main([*TOY, *FLAGS[one], *flags, "--runs", str(folder)])
    (made,) = folder.iterdir()
    return made


def modules_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["modules"]


def actions_of(one, state):
    """What a policy of these weights does at some states, its noise given by a seed."""
    if one is parl_transformer_calql:
        policy = one.TransformerPolicy(4, 2, 16, 1, 8, 2)
    else:
        Policy = getattr(one, "FlowPolicy", None) or one.DiffusionPolicy
        policy = Policy(4, 2, one.Args().flow_steps if "flow" in one.__name__ else 5, 8, 1)
    policy.load_state_dict(state)
    torch.manual_seed(0)
    return policy.eval().sample(torch.linspace(-1, 1, 12).view(3, 4), 4)


@scripts
def test_cloned_by_one_run_and_loaded_by_another(one, tmp_path):
    """The same actions, of both copies; phase 1 has no steps, and is measured all the same."""
    less = NOTHING_MORE["num_offline_steps" in one.Args.__dataclass_fields__]
    cloned = run(one, tmp_path / "first", *less)
    path = cloned / "checkpoint.pt"
    loaded = run(one, tmp_path / "second", "--policy-checkpoint", str(path), "--seed", "5", *less)
    expected = actions_of(one, modules_of(cloned)["ema_policy"])
    for name in ("policy", "ema_policy"):
        assert torch.equal(actions_of(one, modules_of(loaded)[name]), expected)
    first, second = (rows_of(folder)[0] for folder in (cloned, loaded))
    assert first["updates"] == "3" and second["phase"] == "cloning" and second["updates"] == "0"
    config = json.loads((loaded / "config.json").read_text())
    assert config["num_cloning_steps"] == 0 and config["policy_checkpoint"] == str(path)


@pytest.fixture(scope="module")
def cloned(tmp_path_factory):
    return run(script, tmp_path_factory.mktemp("runs"), *NOTHING_MORE[True])


def test_a_state_dict_and_what_comes_after(cloned, tmp_path, monkeypatch):
    """A bare state dict, by a relative path; it is improved as if cloned here, and resumed without the file."""
    weights = modules_of(cloned)["ema_policy"]
    torch.save(weights, tmp_path / "cloned.pt")
    monkeypatch.chdir(tmp_path)
    folder = run(script, tmp_path / "runs", "--policy-checkpoint", "cloned.pt", "--distill-ratio", "1")
    assert {row["phase"] for row in rows_of(folder)} == {"cloning", "offline", "online"}
    assert not any("policy_loss" in row for row in rows_of(folder))
    after = modules_of(folder)["policy"]
    assert any(not torch.equal(after[name], weights[name]) for name in weights)
    (tmp_path / "cloned.pt").unlink()
    before = {path.name: path.read_bytes() for path in folder.glob("metrics.csv")}
    monkeypatch.setattr(script, "finish", lambda *_, **__: None)
    script.main(["--resume", str(folder)])
    assert {path.name: path.read_bytes() for path in folder.glob("metrics.csv")} == before
    with pytest.raises(SystemExit, match="started with --policy-checkpoint"):
        script.main(["--resume", str(folder), "--policy-checkpoint", str(cloned / "checkpoint.pt")])


def refused(tmp_path, *flags, one=script):
    """The one line with which the run ends; it left no folder."""
    with pytest.raises(SystemExit) as stopped:
        one.main([*TOY, *FLAGS[one], *map(str, flags), "--runs", str(tmp_path / "refused")])
    message = str(stopped.value)
    assert message.startswith("error: --policy-checkpoint /") and "\n" not in message and len(message) < 800, message
    assert not (tmp_path / "refused").exists()
    return message


def test_a_file_that_is_not_there(tmp_path, monkeypatch):
    """Before any data is looked at; a run's folder is not its checkpoint either."""
    monkeypatch.setattr(script, "set_up", None)
    assert "no such file" in refused(tmp_path, "--policy-checkpoint", tmp_path / "missing.pt")
    assert "checkpoint.pt" in refused(tmp_path, "--policy-checkpoint", tmp_path)


def test_a_policy_of_another_size_is_told_by_names_and_shapes(cloned, tmp_path):
    message = refused(tmp_path, "--policy-checkpoint", cloned / "checkpoint.pt", "--policy-hidden", "16")
    assert "does not fit" in message and "first.weight" in message and "[16, 134]" in message and "[8, 134]" in message
    message = refused(tmp_path, "--policy-checkpoint", cloned / "checkpoint.pt", "--policy-blocks", "2")
    assert "Missing" in message and "blocks.1.norm.weight" in message
    message = refused(tmp_path, "--policy-checkpoint", cloned / "checkpoint.pt", one=parl_transformer_calql)
    assert "Missing" in message and "position" in message


class Code:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (f"{self.path}.ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("weights"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(pickle.dumps(Code(path))),
        lambda path: torch.save({"modules": {"critic": {}}}, path),
        lambda path: torch.save(torch.zeros(3), path),
        lambda path: torch.save({"weight": 1.0}, path),
        lambda path: torch.save([1], path),
    ],
    ids=["text", "empty", "code", "no policy", "a tensor", "numbers", "a list"],
)
def test_a_file_that_holds_no_weights(write, tmp_path, monkeypatch, request):
    path = tmp_path / "file.pt"
    write(path)
    if "numbers" not in request.node.name:  # a dict may be the right one until there is a policy
        monkeypatch.setattr(script, "set_up", None)  # all others are refused before any data is looked at
    assert "does not fit" in refused(tmp_path, "--policy-checkpoint", path)
    assert [found.name for found in tmp_path.iterdir()] == ["file.pt"]


def test_weights_that_are_no_numbers(cloned, tmp_path):
    """A policy that diverged where it was cloned: the run says which network and stops."""
    weights = modules_of(cloned)["ema_policy"]
    weights["last.bias"][0] = float("nan")
    torch.save(weights, tmp_path / "nan.pt")
    with pytest.raises(SystemExit, match="a weight of the policy became nan at cloning step 1"):
        run(script, tmp_path / "runs", "--policy-checkpoint", str(tmp_path / "nan.pt"))
