"""Around OpenVLA: checkpoints that do not fit, the robot's units, the pixel critic, the REST server, the workers."""

import json
import pickle
import sys
import threading
import types
import urllib.error
import urllib.request

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image

INSTALL = "pip install -r requirements-openvla.txt"
pytest.importorskip("peft", reason=f"adapters are peft's: {INSTALL}")
safetensors = pytest.importorskip("safetensors.torch", reason=f"weights are safetensors: {INSTALL}")

import parl_openvla_real as script  # noqa: E402
from benchmarks.tasks import widowx  # noqa: E402
from benchmarks.vla import checkpoint as files  # noqa: E402
from benchmarks.vla import robot, server, workers  # noqa: E402

SMALL = script.Sizes(28, (16, 2, 2, 24), (16, 2, 2, 24), (16, 1, 2, 24), 32, 400, empty_token=2)
BRIDGE = files.action_statistics(files.TINY_STATISTICS, "bridge_orig")
CPU = torch.device("cpu")


def refused(function, *args, words=()):
    """The one line with which the program ends, in which these words stand."""
    with pytest.raises(SystemExit) as stopped:
        function(*args)
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message
    for word in words:
        assert word in message, message
    return message


# --- WEIGHTS ---
SHAPES = {"projector.fc1.weight": (3, 2), "projector.fc1.bias": (3,), "language_model.lm_head.weight": (5, 2)}


def write_weights(folder, name="model.safetensors", **shapes):
    safetensors.save_file({key.replace("/", "."): torch.ones(shape) for key, shape in shapes.items()}, folder / name)


def read(folder, shapes=SHAPES):
    return files.read_weights(folder, shapes, CPU)


def test_weights_may_lie_in_several_files_and_hold_what_the_forward_pass_does_not_use(tmp_path):
    write_weights(tmp_path, "model-1-of-2.safetensors", **{"projector.fc1.weight": (3, 2)})
    unused = {"vision_backbone.featurizer.norm.bias": (4,), "vision_backbone.fused_featurizer.attn_pool.q.bias": (4,)}
    unused |= {"vision_backbone.featurizer.blocks.23.ls1.scale_factor": (4,)}
    rest = {"projector.fc1.bias": (3,), "language_model.lm_head.weight": (5, 2)}
    write_weights(tmp_path, "model-2-of-2.safetensors", **rest, **unused)
    weights = read(tmp_path)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == SHAPES
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"projector.fc1.bias": None}, ("1 missing", "projector.fc1.bias")),
        ({"projector.fc1.bias": None, "language_model.lm_head.weight": None}, ("2 missing", "language_model.lm_head")),
        ({"projector.fc4.weight": (2, 2)}, ("1 surplus", "projector.fc4.weight")),
        ({"projector.fc1.weight": (2, 3)}, ("1 of another shape", "projector.fc1.weight")),
        ({"projector.fc1.bias": (4,), "other": (1,)}, ("1 surplus (other", "1 of another shape (projector.fc1.bias")),
        ({"vision_backbone.featurizer.cls_token": (1,)}, ("1 surplus", "cls_token")),
    ],
)
def test_weights_of_another_model_are_refused(change, words, tmp_path):
    """With how many and which, before anything is read."""
    shapes = {name: shape for name, shape in (SHAPES | change).items() if shape is not None}
    write_weights(tmp_path, **shapes)
    refused(read, tmp_path, words=("holds another model", *words))


def test_damaged_weights_are_refused(tmp_path):
    write_weights(tmp_path, **SHAPES)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-5], whole[:20], b"", b"\xff" * 100, b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(content)
        refused(read, tmp_path, words=("cannot be read", str(tmp_path)))
    path.write_bytes(whole)
    assert len(read(tmp_path)) == 3


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_weights_are_never_opened(tmp_path):
    """Folders with nothing but .bin, .pt or .pth files: opening one of those can run anything."""
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "it ran")))
    refused(read, tmp_path, words=("no *.safetensors", "can run code"))
    np.savez(tmp_path / "cache.npz", candidates=np.array([Trap(tmp_path / "it ran")], object))
    refused(robot.read_arrays, tmp_path / "cache.npz", words=("is damaged",))
    assert not (tmp_path / "it ran").exists()


def test_a_full_size_model_is_for_a_gpu_with_room(monkeypatch):
    """A tiny one may run anywhere. That it is said before weights are read: test_a_checkpoint_of_the_hub."""
    size = 7_498_156_704
    refused(files.check_memory, size, CPU, words=("7.5 billion", "GPU", "CPU", "--checkpoint tiny"))
    files.check_memory(10_000_000, CPU)
    for gib, fits in ((12, False), (80, True)):
        told = types.SimpleNamespace(total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, told=told: told)
        if fits:
            files.check_memory(size, torch.device("cuda"))
        else:
            refused(files.check_memory, size, torch.device("cuda"), words=("7.5 billion", f"has {gib}"))


# --- CONFIG, STATISTICS, TOKENIZER, FOLDER ---


def test_statistics_are_those_of_the_robot_that_was_named():
    other = {"action": {"q01": [-1.0] * 7, "q99": [2.0] * 7, "mask": [True] * 6 + [False]}}
    both = files.TINY_STATISTICS | {"kuka": other, "lame": {"action": {"q01": [0.0] * 6, "q99": [0.0] * 6}}}
    found = files.action_statistics(both, "kuka")
    np.testing.assert_array_equal(found["q99"], [2.0] * 7)
    refused(files.action_statistics, both, "bridge", words=("--unnorm-key bridge", "bridge_orig, kuka, lame"))
    refused(files.action_statistics, {}, "bridge", words=("it has none",))
    refused(files.action_statistics, both, "lame", words=("--unnorm-key lame", "7 action dimensions"))


def test_bridge_statistics_are_the_published_ones():
    q01 = [-0.02872725307941437, -0.04170349963009357, -0.026093858778476715, -0.08092105075716972]
    q01 += [-0.09288699507713317, -0.20718276381492615, 0.0]
    q99 = [0.028309678435325586, 0.040855254605412394, 0.040161586627364146, 0.08192047759890528]
    q99 += [0.07792850524187081, 0.20382574498653397, 1.0]
    np.testing.assert_array_equal(BRIDGE["q01"], q01)
    np.testing.assert_array_equal(BRIDGE["q99"], q99)
    assert BRIDGE["mask"].tolist() == [True] * 6 + [False]


def test_a_config_says_sizes_and_statistics(tmp_path):
    """Fine-tuning writes statistics of its own beside it; Llama's rms eps is the config's where it has one."""
    robots = {"a": {"action": 1}, "b": {"action": 2}}
    config = {"text_config": {"rms_norm_eps": 1e-5}, "norm_stats": robots}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert files.read_config(tmp_path) == ({"rms_eps": 1e-5}, robots)
    (tmp_path / "dataset_statistics.json").write_text(json.dumps({"b": {"action": 3}, "c": {"action": 4}}))
    assert files.read_config(tmp_path)[1] == {"a": {"action": 1}, "b": {"action": 3}, "c": {"action": 4}}
    (tmp_path / "config.json").write_text("{}")
    assert files.read_config(tmp_path)[0] == {}
    for content in ("", "{nonsense"):
        (tmp_path / "config.json").write_text(content)
        refused(files.read_config, tmp_path, words=(str(tmp_path), "no OpenVLA checkpoint"))
    (tmp_path / "config.json").unlink()
    refused(files.read_config, tmp_path, words=(str(tmp_path), "no OpenVLA checkpoint"))


@pytest.mark.parametrize("content", ["[]", '{"norm_stats": null}', '{"text_config": null}'])
def test_a_config_of_another_form_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    try:
        files.read_config(tmp_path)
    except SystemExit as stopped:
        assert str(stopped).startswith("error: ") and str(tmp_path) in str(stopped)


def write_tokenizer(folder, bos=True, **changed):
    """A tokenizer with Llama 2's ids for the words of the prompt."""
    tokenizers = pytest.importorskip("tokenizers", reason=f"tokenizer.json: {INSTALL}")
    from tokenizers import models, pre_tokenizers, processors

    words = ["<s>", "In", ":", "What", "action", "should", "the", "robot", "take", "to", "put", "pot"]
    ids = [1, 512, 29901, 1724, 3158, 881, 278, 19964, 2125, 304, 1925, 3104]
    tokenizer = tokenizers.Tokenizer(models.WordLevel(dict(zip(words, ids)) | {"<unk>": 0} | changed, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_the_checkpoints_tokenizer_is_used(tmp_path):
    write_tokenizer(tmp_path)
    tokenize = files.load_tokenizer(tmp_path, 32064, 0)
    assert tokenize("put pot") == [1, 1925, 3104]


def test_tokenizers_that_do_not_fit_are_refused(tmp_path):
    """One without BOS makes OpenVLA do something else, silently."""
    load = files.load_tokenizer
    refused(load, tmp_path, 32064, 0, words=("tokenizer.json", "cannot be read"))
    (tmp_path / "tokenizer.json").write_text('{"nonsense": 1}')
    refused(load, tmp_path, 32064, 0, words=("tokenizer.json", "cannot be read"))
    write_tokenizer(tmp_path, bos=False)
    refused(load, tmp_path, 32064, 0, words=("tokenizer.json", "no BOS"))
    write_tokenizer(tmp_path, robot=19965)
    refused(load, tmp_path, 32064, 0, words=("tokenizer.json", "another vocabulary", "19965", "19964"))
    for changed in ({f"word {i}": 40_000 + i for i in range(32_100)}, {"<robot>": 32_064}):
        write_tokenizer(tmp_path, **changed)
        refused(load, tmp_path, 32064, 0, words=("tokenizer.json", "another vocabulary", "go to", "32063"))


def test_the_tiny_models_words_have_ids_of_their_own():
    tokenize = files.load_tokenizer(None, 400, 77)
    one, two = tokenize("put the pot"), tokenize("put the cup")
    assert one == files.load_tokenizer(None, 400, 77)("put the pot")
    assert one[0] == 1 and one[:3] == two[:3] and one[3] != two[3]
    assert all(3 <= i < 80 for i in one[1:] + two[1:])


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "./a/b/c", "../x", "a/", "/b", "a/.."])
def test_what_is_no_folder_and_no_id_of_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # nobody is asked
    words = f"--checkpoint {name}", "no such folder", "owner/name", "tiny"
    refused(files.checkpoint_folder, name, "*.json", words=words)


def test_a_checkpoint_of_the_hub(monkeypatch, tmp_path):
    """Downloaded without the formats that can run code, and its weights last; what goes wrong is told in one line."""
    asked, hub = [], types.ModuleType("huggingface_hub")
    hub.snapshot_download = lambda name, **options: asked.append((name, options["allow_patterns"])) or str(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert files.checkpoint_folder("openvla/openvla-7b", "*.json") == tmp_path
    assert files.checkpoint_folder(str(tmp_path), "*.json") == tmp_path
    sizes = script.TINY
    files.write_checkpoint(tmp_path, script.OpenVLA(sizes), files.TINY_STATISTICS)
    args = script.Args(checkpoint="open/vla", preset="widowx")
    opened = files.open_checkpoint(args, script.Sizes, sizes)
    assert opened.sizes == sizes and asked == [("openvla/openvla-7b", ["*.json"]), ("open/vla", ["*.json"])]
    files.load_model(script.OpenVLA, opened, CPU)
    assert asked[2:] == [("open/vla", ["*.safetensors"])]

    # 7 billion parameters: neither for a preset of tiny sizes nor for a CPU, which is seen without their weights
    (tmp_path / "config.json").write_text(json.dumps({"norm_stats": files.TINY_STATISTICS}))
    monkeypatch.setattr(files, "load_tokenizer", lambda *_: None)
    open_it = lambda args: files.open_checkpoint(args, script.Sizes, sizes)  # noqa: E731
    refused(open_it, args, words=("--preset widowx", "open/vla", "add --preset default"))
    opened = open_it(script.Args(checkpoint="open/vla", preset="default"))
    refused(files.load_model, script.OpenVLA, opened, CPU, words=("7.5 billion", "CPU"))
    assert [files_ for _, files_ in asked[3:]] == [["*.json"], ["*.json"]]

    def unreachable(*_, **__):
        raise ConnectionError("401 Client Error.\nRepository Not Found")

    hub.snapshot_download = unreachable
    fetch = lambda: files.checkpoint_folder("open/vla", "*.json")  # noqa: E731
    refused(fetch, words=("open/vla", "could not be downloaded", "401 Client Error."))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(fetch, words=("open/vla", "pip install huggingface_hub"))


@pytest.mark.parametrize("content", [b"", b"PK nothing", b"\x93NUMPY", None])
def test_a_damaged_file_of_a_run_says_what_to_do(content, tmp_path):
    path = tmp_path / "cache" / "00003.npz"
    robot.write_arrays(path, candidates=np.zeros((40, 4, 7), np.float32), version="abc")
    whole = path.read_bytes()
    assert str(robot.read_arrays(path)["version"]) == "abc"
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    refused(robot.read_arrays, path, words=("00003.npz is damaged", "remove it and --resume"))
    assert [p.name for p in path.parent.iterdir()] == ["00003.npz"]


# --- THE ROBOT'S UNITS ---


class Arm(gym.Env):
    """Remembers what it was asked for; executes it cut to 0.02 where it tells."""

    def __init__(self, size=40, tells=True, length=3):
        box = gym.spaces.Box
        self.observation_space = gym.spaces.Dict({"image": box(0, 255, (size, size, 3), np.uint8)})
        self.action_space, self.size, self.tells, self.length = box(-1, 1, (7,)), size, tells, length
        self.asked, self.seen = [], []

    def _observe(self):
        obs = {
            "image": self.np_random.integers(0, 256, (self.size, self.size, 3)).astype(np.uint8),
            "proprio": self.np_random.normal(size=7),
        }
        self.seen.append(obs)
        return obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.asked, self.seen = [], []
        return self._observe(), {"hello": 1}

    def step(self, action):
        self.asked.append(action)
        done = len(self.asked) == self.length
        info = {"success": done} | ({"executed": np.clip(action, -0.02, 0.02)} if self.tells else {})
        return self._observe(), float(done), done, False, info


def wrapped(**options):
    return robot.RobotEnv(Arm(**options), BRIDGE, 28, 20)


def test_actions_are_unnormalised_by_openvlas_formula_and_back():
    actions = np.random.default_rng(0).uniform(-1.5, 1.5, (50, 7))
    real = robot.unnormalize(actions, BRIDGE)
    for i in range(6):
        low, high = BRIDGE["q01"][i], BRIDGE["q99"][i]
        np.testing.assert_allclose(real[:, i], 0.5 * (actions[:, i] + 1) * (high - low) + low)
    np.testing.assert_array_equal(real[:, 6], actions[:, 6])  # the gripper
    np.testing.assert_allclose(robot.normalize(real, BRIDGE), actions, atol=1e-12)
    np.testing.assert_allclose(robot.normalize(BRIDGE["q01"], BRIDGE)[:6], -1)
    np.testing.assert_allclose(robot.normalize(BRIDGE["q99"], BRIDGE)[:6], 1)


def test_the_robot_is_asked_in_its_own_units_and_what_it_did_comes_back_normalised():
    """Neither is clipped to [-1, 1]: beyond lie the motions rarer than 1 in 50; a robot that tells nothing did it."""
    action = np.array([1.3, -0.4, 0.1, 0.9, -1.2, 0.3, 0.8], np.float32)
    for tells in (True, False):
        env = wrapped(tells=tells)
        env.reset(seed=0)
        executed = env.step(action)[-1]["executed"]
        expected = 0.5 * (action + 1) * (BRIDGE["q99"] - BRIDGE["q01"]) + BRIDGE["q01"]
        expected[6] = action[6]
        np.testing.assert_allclose(env.unwrapped.asked[0], expected, atol=1e-7)
        assert executed.dtype == np.float32
        if tells:
            back = np.clip(expected, -0.02, 0.02)
            back[:6] = 2 * (back[:6] - BRIDGE["q01"][:6]) / (BRIDGE["q99"] - BRIDGE["q01"])[:6] - 1
            np.testing.assert_allclose(executed, back, atol=1e-5)
        else:
            np.testing.assert_allclose(executed, action, atol=1e-5)
            assert executed[0] > 1.2 and executed[4] < -1.1


def test_an_observation_is_one_vector_that_can_be_taken_apart():
    """Also as float32, which is how the harness hands it on; images by PIL's bicubic filter, proprio bit for bit."""
    env = wrapped()
    rows = np.stack([env.reset(seed=0)[0], env.step(np.zeros(7))[0]])
    assert rows.dtype == np.uint8 and rows.shape[1:] == env.observation_space.shape
    assert env.observation_space.contains(rows[0])
    for kind in (torch.uint8, torch.float32):
        for part in (slice(0, 1), slice(0, 2)):
            large, small, proprio = robot.unpack(torch.tensor(rows).to(kind)[part], 28, 20)
            for i, seen in enumerate(env.unwrapped.seen[part]):
                for size, images in ((28, large), (20, small)):
                    assert images.dtype == torch.uint8 and images.shape[1:] == (3, size, size)
                    expected = Image.fromarray(seen["image"]).resize((size, size), Image.Resampling.BICUBIC)
                    np.testing.assert_array_equal(images[i].permute(1, 2, 0), np.asarray(expected))
                np.testing.assert_array_equal(proprio[i], seen["proprio"].astype(np.float32))


def test_images_of_any_size_can_be_taken_apart():
    env = robot.RobotEnv(Arm(), BRIDGE, 28, 21)
    proprio = robot.unpack(torch.tensor(env.reset(seed=0)[0])[None], 28, 21)[2]
    np.testing.assert_array_equal(proprio[0], env.unwrapped.seen[0]["proprio"].astype(np.float32))


def fake_run(tmp_path, **flags):
    args = script.Args(**flags)
    return types.SimpleNamespace(folder=tmp_path, args=args, device=CPU, check_stop=lambda: None)


def test_an_episode_has_one_image_more_than_actions(tmp_path):
    """N + 1 and N; each action stands beside the image it was chosen at; what was executed is what is kept."""
    env, run, seen = wrapped(length=4), fake_run(tmp_path), []

    def act(obs):
        seen.append(obs[0].clone())
        return torch.full((1, 7), 0.9)

    episode, success = robot.collect(env, act, 5, run)
    assert success and episode["obs"].shape == (5, *env.observation_space.shape) and episode["obs"].dtype == np.uint8
    np.testing.assert_array_equal(episode["obs"][:-1], torch.stack(seen))
    np.testing.assert_array_equal(episode["obs"], [env.pack(obs) for obs in env.unwrapped.seen])
    expected = robot.normalize(np.clip(env.unwrapped.asked, -0.02, 0.02), BRIDGE)
    np.testing.assert_allclose(episode["actions"], expected, atol=1e-5)
    assert episode["rewards"].tolist() == [0, 0, 0, 1] and episode["terminals"].tolist() == [False] * 3 + [True]


def test_rewards_outside_the_range_of_values_are_refused(tmp_path):
    act = lambda obs: torch.zeros(1, 7)  # noqa: E731
    refused(robot.collect, wrapped(), act, 0, fake_run(tmp_path, reward_bias=0.0), words=("--reward-bias",))


def test_a_robots_episode_is_kept_and_taken_again(tmp_path):
    """If the same version of the policy acted; another one's is collected anew. No random number of the run is used."""
    env, run, calls = wrapped(), fake_run(tmp_path), []

    def act(obs):
        calls.append(1)
        return torch.randn(1, 7)

    state = torch.get_rng_state()
    first, success = robot.get_episode(env, act, 3, "one", run)
    assert torch.equal(torch.get_rng_state(), state) and len(calls) == 3
    again, success_again = robot.get_episode(env, act, 3, "one", run)
    assert len(calls) == 3 and success is success_again is True and first.keys() == again.keys()
    assert all(np.array_equal(first[name], again[name]) for name in first)
    other, _ = robot.get_episode(env, act, 4, "one", run)
    assert len(calls) == 6 and not np.array_equal(other["actions"], first["actions"])
    robot.get_episode(env, act, 3, "two", run)
    assert len(calls) == 9
    assert np.array_equal(robot.read_episode(run, 4)["actions"], other["actions"])


def test_demonstrations_become_episodes_in_normalised_units():
    env, random = wrapped(), np.random.default_rng(0)
    found = {
        "image": random.integers(0, 256, (3, 40, 40, 3)).astype(np.uint8),
        "proprio": random.normal(size=(3, 7)).astype(np.float32),
        "actions": random.uniform(-0.02, 0.02, (2, 7)),
        "rewards": np.zeros(2, np.float32),
        "terminals": np.ones(2, bool),
    }
    episode = robot.as_episode(found, env)
    np.testing.assert_allclose(robot.unnormalize(episode["actions"], BRIDGE), found["actions"], atol=1e-7)
    frames = [dict(image=image, proprio=p) for image, p in zip(found["image"], found["proprio"])]
    np.testing.assert_array_equal(episode["obs"], [env.pack(frame) for frame in frames])


# --- THE PIXEL CRITIC ---


def small_critic(proprio=0, members=3, seed=0, moved=0.3):
    torch.manual_seed(seed)
    critic = script.PixelCritic(7, proprio, width=4, blocks=(1, 1), hidden=(8, 6), ensemble_size=members)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(moved * torch.randn_like(parameter))
    return critic


def pictures(num, size=20, seed=0):
    return torch.randint(256, (num, 3, size, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_the_critic_values_many_actions_of_one_image_at_once():
    """An image is encoded once; each action's value is what it would be alone, by every member and by a chosen few."""
    for proprio in (0, 7):
        critic, images, state = small_critic(proprio), pictures(4), torch.randn(4, proprio)
        actions = torch.rand(4, 5, 7) * 2 - 1
        q = critic(critic.encode(images, state), actions)
        assert q.shape == (3, 4, 5) and q.dtype == torch.float32 and q.std(0).min() > 1e-3
        for b in range(4):
            for i in range(5):
                alone = critic(critic.encode(images[b : b + 1], state[b : b + 1]), actions[b : b + 1, i : i + 1])
                torch.testing.assert_close(alone[:, 0, 0], q[:, b, i], atol=1e-5, rtol=1e-5)
        chosen = critic(critic.encode(images, state), actions, torch.tensor([2, 0]))
        torch.testing.assert_close(chosen, q[[2, 0]], atol=1e-6, rtol=1e-6)
    other = critic(critic.encode(pictures(4, seed=1), state), actions)
    assert (other - q).abs().amax((0, 2)).min() > 1e-3
    assert (critic(critic.encode(images, state + 1), actions) - q).abs().amax((0, 2)).min() > 1e-3


def test_the_action_enters_at_every_layer():
    """With all other ways closed each layer's own weights of the action still make a difference, at once in all."""
    images, actions = pictures(2), torch.rand(2, 3, 7)
    for layer in range(2):
        critic = small_critic()
        with torch.no_grad():
            for i, weight in enumerate(critic.weights):
                assert weight.shape[1] == (critic.encode(images, torch.zeros(2, 0)).shape[1], 8)[i] + 7
                if i != layer:
                    weight[:, -7:] = 0
        given = actions.clone().requires_grad_()
        critic(critic.encode(images, torch.zeros(2, 0)), given).sum().backward()
        assert given.grad.abs().amin(-1).min() > 0


def test_members_share_the_encoder_and_nothing_else():
    critic, images, actions = small_critic(), pictures(2), torch.rand(2, 3, 7)
    features = critic.encode(images, torch.zeros(2, 0))
    critic(features, actions)[1].sum().backward()
    for name, parameter in critic.named_parameters():
        if name.startswith("encoder."):
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad[1].abs().max() > 0 and parameter.grad[[0, 2]].abs().max() == 0, name


def test_a_new_critics_members_differ_and_know_nothing():
    """Q starts nearly constant, so that no action is preferred before anything was learned."""
    torch.manual_seed(0)
    critic = script.PixelCritic(7, 0, 8, (1, 1), (16, 16), 4)
    q = critic(critic.encode(pictures(8), torch.zeros(8, 0)), torch.rand(8, 6, 7) * 2 - 1)
    assert q.abs().max() < 0.2
    for weight in critic.weights:
        for i in range(4):
            for j in range(i):
                assert (weight[i] - weight[j]).abs().max() > 1e-3
    assert {p.dtype for p in critic.parameters()} == {torch.float32}


def test_the_default_critic_is_a_resnet_18_with_ten_members():
    """Its parameters: torchvision's ResNet-18 without the classifier, and without a norm on the three short cuts."""
    critic = script.PixelCritic(7)
    encoder = sum(p.numel() for name, p in critic.named_parameters() if name.startswith("encoder."))
    assert encoder == 11_176_512 - 2 * (128 + 256 + 512)
    assert critic.ensemble_size == 10 and [tuple(w.shape) for w in critic.weights] == [
        (10, 512 + 7, 512), (10, 512 + 7, 512), (10, 512 + 7, 512),
    ]  # fmt: skip


def test_states_of_a_batch_do_not_see_each_other():
    critic, images = small_critic(), pictures(5)
    together = critic.encode(images, torch.zeros(5, 0))
    images[1:] = 255 - images[1:]
    torch.testing.assert_close(critic.encode(images, torch.zeros(5, 0))[0], together[0], atol=1e-6, rtol=1e-6)


def test_the_regression_loss_is_the_mean_square_of_all_members():
    critic, actions, target = small_critic(), torch.rand(4, 7), torch.randn(4)
    features = critic.encode(pictures(4), torch.zeros(4, 0))
    q, loss = critic.td_loss(features, actions, target)
    each = critic(features, actions[:, None])[..., 0]
    torch.testing.assert_close(q, each)
    expected = np.mean([(each[e, b].item() - target[b].item()) ** 2 for e in range(3) for b in range(4)])
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_critic_can_learn_where_something_is():
    """Q of a bright spot's side of the image and of the action's sign: needs image and action together."""
    torch.manual_seed(0)
    critic = script.PixelCritic(7, 0, 8, (1,), (32,), 2)
    optimizer = torch.optim.Adam(critic.parameters(), 3e-3)
    for _ in range(121):
        side, sign = torch.randint(2, (32,)), torch.randint(2, (32,)) * 2.0 - 1
        images = torch.zeros(32, 3, 16, 16, dtype=torch.uint8)
        images[torch.arange(32), :, :, 4] = (255 * side[:, None, None]).to(torch.uint8)
        actions = torch.zeros(32, 1, 7)
        actions[:, 0, 3] = sign
        q = critic(critic.encode(images, torch.zeros(32, 0)), actions)[..., 0]
        loss = (q - (side * 2 - 1) * sign).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_random_shift_against_a_slow_one(monkeypatch):
    """Padded by the border's pixels and cropped; all shifts from -pad to pad, of every image its own."""
    images, pad = pictures(6, 9), 3
    moves = torch.randint(-pad, pad + 1, (2, 6, 1), generator=torch.Generator().manual_seed(1))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", lambda low, high, shape, **_: moves.clone().reshape(shape))
        shifted = script.random_shift(images, pad)
    padded = torch.nn.functional.pad(images.float(), (pad,) * 4, mode="replicate")
    for b in range(6):
        row, column = (pad + moves[:, b, 0]).tolist()
        expected = padded[b, :, row : row + 9, column : column + 9].to(torch.uint8)
        assert torch.equal(shifted[b], expected)
    torch.manual_seed(0)
    ramp = (torch.arange(21)[:, None] * 10 + torch.arange(21)[None] % 10).to(torch.uint8)
    where = {tuple(m) for m in (script.random_shift(ramp.expand(2000, 3, 21, 21))[:, 0, 10, 10]).unsqueeze(1).tolist()}
    assert {value // 10 for (value,) in where} == set(range(6, 15)), "vertical shifts of -4 to 4"
    columns = script.random_shift((torch.arange(21) * 5).to(torch.uint8).expand(2000, 3, 21, 21))[:, 0, 10, 10] / 5
    counts = torch.bincount(columns.long(), minlength=21)
    assert counts[6:15].sum() == 2000 and ((counts[6:15] - 2000 / 9) ** 2 / (2000 / 9)).sum() < 32  # 8 dof, p = 1e-4
    assert torch.equal(script.random_shift(images, 0), images) and script.random_shift(images).dtype == torch.uint8


# --- THE SERVER ---


def policy_of(instruction="put the pot down"):
    torch.manual_seed(0)
    model = script.OpenVLA(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    tokenize = files.load_tokenizer(None, SMALL.vocabulary, SMALL.last_action - 256 - 3)
    return script.VLAPolicy(model, tokenize, instruction)


@pytest.fixture(scope="module")
def served():
    """The address of a server, and the policy behind it."""
    pytest.importorskip("json_numpy", reason=f"OpenVLA's protocol is json-numpy's: {INSTALL}")
    policy = policy_of()
    listening = server.start_server(server.answer_with(policy, "bridge_orig", BRIDGE), 0)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}", policy
    listening.shutdown()
    listening.server_close()
    thread.join(10)
    assert not thread.is_alive()


def post(url, body):
    """Status and decoded answer."""
    import json_numpy

    body = body if isinstance(body, bytes) else json_numpy.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, method="POST"), timeout=20) as answer:
            return answer.status, json_numpy.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def photo(seed=0, size=(48, 64)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


def expected_action(policy, image, instruction):
    """The likeliest action in the robot's units, from a policy of one's own."""
    policy = script.VLAPolicy(policy.model, policy.tokenize, instruction, top_k=1)
    resized = np.asarray(Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC))
    action = policy.sample(torch.tensor(resized).permute(2, 0, 1)[None], 1)[0, 0].numpy()
    real = 0.5 * (action + 1) * (BRIDGE["q99"] - BRIDGE["q01"]) + BRIDGE["q01"]
    return np.append(real[:6], action[6])


def test_the_server_answers_openvlas_protocol(served):
    """Images of any size, any instruction at any time, in the robot's units; plain and packed twice."""
    import json_numpy

    url, policy = served
    answers = []
    for seed, instruction, size in (
        (0, "put the pot down", (48, 64)),
        (1, "Open the drawer", (28, 28)),
        (0, "stop", (9, 7)),
    ):
        image = photo(seed, size)
        request = {"image": image, "instruction": instruction, "unnorm_key": "bridge_orig"}
        for body in (request, {"image": image, "instruction": instruction}, {"encoded": json_numpy.dumps(request)}):
            status, action = post(f"{url}/act", body)
            if "encoded" in body:  # such a client has no json-numpy on its wire: a text comes back
                action = json_numpy.loads(action)
            assert status == 200 and action.shape == (7,)
            np.testing.assert_allclose(action, expected_action(policy, image, instruction), atol=1e-7)
        answers.append(action)
    assert not np.allclose(answers[0], answers[1]) and not np.allclose(answers[0], answers[2])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"instruction": "go", "unnorm_key": "bridge_orig"}, "image"),
        ({"image": photo()}, "instruction"),
        ({"image": photo().astype(np.float32), "instruction": "go"}, "uint8"),
        ({"image": photo()[..., :2], "instruction": "go"}, "(48, 64, 2)"),
        ({"image": photo()[0], "instruction": "go"}, "(64, 3)"),
        ({"image": None, "instruction": "go"}, "image"),
        ({"image": "a cat", "instruction": "go"}, "image"),
        ({"image": photo(), "instruction": "go", "unnorm_key": "kuka"}, "bridge_orig"),
        ({"image": photo(), "instruction": "  ", "unnorm_key": "bridge_orig"}, "instruction is empty"),
        ([1, 2], ""),
        ("text", ""),
        (b"{nonsense", "JSONDecodeError"),
        (b"\xff\xfe", ""),
        (b"", "bytes"),
        (b'{"image": {"__numpy__": "!", "dtype": "uint8", "shape": [1]}, "instruction": "go"}', ""),
        (b'{"image": {"__numpy__": "AAAA", "dtype": "uint8", "shape": [9, 9, 3]}, "instruction": "go"}', ""),
        (b'{"image": {"__numpy__": "AAAA"}, "instruction": "go"}', "dtype"),
        (b'{"image": {"__numpy__": "AAAA", "dtype": "O", "shape": [1]}, "instruction": "go"}', ""),
    ],
)
def test_a_request_that_makes_no_sense_is_answered_with_why(served, body, words):
    """400, and the server goes on."""
    url, policy = served
    status, answer = post(f"{url}/act", body)
    assert status == 400 and words in answer["error"] and len(answer["error"]) > 5
    status, action = post(f"{url}/act", {"image": photo(2), "instruction": "go on"})
    assert status == 200
    np.testing.assert_allclose(action, expected_action(policy, photo(2), "go on"), atol=1e-7)


@pytest.mark.parametrize("body", [np.zeros(3), b"[" * 100_000], ids=["an array", "nested"])
def test_a_request_of_another_form_is_answered_with_why(served, body, capfd):
    status, answer = post(f"{served[0]}/act", body)
    assert status == 400


@pytest.mark.parametrize("change", [{"instruction": None}, {"image": photo(size=(0, 5))}], ids=["null", "no pixels"])
def test_an_instruction_is_text_and_an_image_has_pixels(served, change):
    assert post(f"{served[0]}/act", {"image": photo(), "instruction": "go"} | change)[0] == 400


def test_other_addresses_are_not_found(served):
    url, _ = served
    good = {"image": photo(), "instruction": "go"}
    for path in ("/", "/predict", "/act/more", "/actions"):
        status, answer = post(url + path, good)
        assert status == 404 and "/act" in answer["error"]
    assert post(f"{url}/act/", good)[0] == 200


def test_a_port_that_is_taken_is_named(served):
    port = int(served[0].rsplit(":", 1)[1])
    refused(server.start_server, lambda *_: None, port, words=(f"port {port}",))


def test_one_request_at_a_time_reaches_the_policy():
    """A second one with another instruction must not change what the first is answered."""
    pytest.importorskip("json_numpy", reason=INSTALL)
    inside, most, told = [], [], threading.Event()

    def act(image, instruction, key):
        inside.append(instruction)
        most.append(len(inside))
        told.wait(0.1)
        inside.remove(instruction)
        return np.full(7, float(instruction))

    listening = server.start_server(act, 0)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    answers = {}

    def ask(i):
        url = f"http://127.0.0.1:{listening.server_port}/act"
        answers[i] = post(url, {"image": photo(), "instruction": str(i)})[1][0]

    clients = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(20)
    listening.shutdown()
    listening.server_close()
    thread.join(10)
    assert most == [1] * 4 and answers == {i: float(i) for i in range(4)}


def test_an_independent_client_of_openvlas_protocol(served):
    """PyPI's inspect-robots-widowx, which knows nothing of this repository."""
    client = pytest.importorskip("inspect_robots_widowx.policy", reason=f"an independent client: {INSTALL}")
    from inspect_robots.types import Observation

    url, policy = served
    theirs = client.OpenVLAPolicy(server_url=url, resize_px=40, jpeg_roundtrip=False)
    theirs.reset(types.SimpleNamespace(instruction="put the cup down"))
    image = photo(3, (60, 80))
    chunk = theirs.act(Observation(images={"external_cam": image}, state={}))
    sent = np.asarray(Image.fromarray(image).resize((40, 40), Image.Resampling.LANCZOS))
    np.testing.assert_allclose(chunk.actions[0].data, expected_action(policy, sent, "put the cup down"), atol=1e-7)
    theirs.reset(types.SimpleNamespace(instruction=""))
    with pytest.raises(Exception, match="400"):
        theirs.act(Observation(images={"external_cam": image}, state={}))


# --- THE WORKERS: on a stand-in for Ray, whose actors live in this process ---


class ActorError(Exception):
    pass


class Dead(Exception):
    """Raised by a method to say that its process died."""


class TaskFailed(Exception):
    """What Ray makes of an exception in a method: its message is the whole traceback."""

    def __init__(self, cause):
        super().__init__("ray::Something() (pid=1)\nTraceback")
        self.cause = cause


class StandIn(types.ModuleType):
    """The calls of Ray that are used. An answer is computed when it is fetched."""

    def __init__(self):
        super().__init__("ray")
        self.exceptions = types.SimpleNamespace(RayActorError=ActorError, RayTaskError=TaskFailed)
        self.options, self.made, self.busy, self.down, self.shared = None, [], {}, False, {}
        self.shuffled, self.random = False, np.random.default_rng(0)
        self.resources, self.asked_for, self.free = {"CPU": 2.0}, [], None

    def init(self, **options):
        self.options = options

    def is_initialized(self):
        return False

    def shutdown(self):
        self.down = True

    def cluster_resources(self):
        return self.resources

    def available_resources(self):
        return self.resources if self.free is None else self.free

    def put(self, value):
        self.shared[key := f"object {len(self.shared)}"] = value
        return key

    def remote(self, **needs):
        self.asked_for.append(needs)

        def make(cls):
            def create(*args):
                actor = cls(*args)
                self.made.append(args)

                def ask(name, *given):
                    assert actor not in [a for a, *_ in self.busy.values()], "two questions before one worker"
                    reference = object()
                    self.busy[reference] = actor, name, given
                    return reference

                methods = [name for name in dir(cls) if not name.startswith("_")]
                call = lambda name: types.SimpleNamespace(remote=lambda *given: ask(name, *given))  # noqa: E731
                return types.SimpleNamespace(**{name: call(name) for name in methods})

            return types.SimpleNamespace(remote=create)

        return make

    def wait(self, references, num_returns, timeout):
        assert all(reference in self.busy for reference in references)
        first = self.random.integers(len(references)) if self.shuffled else 0
        return references[first : first + 1], []

    def get(self, reference):
        actor, name, given = self.busy.pop(reference)
        given = [self.shared.get(g, g) if isinstance(g, str) else g for g in given]
        try:
            return getattr(actor, name)(*given)
        except Dead as error:
            raise ActorError(*error.args) from None
        except (widowx.RobotError, widowx.TaskError) as error:
            raise TaskFailed(error) from None


@pytest.fixture
def ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", stand_in := StandIn())
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    return stand_in


class Doubler:
    deaths: list = []

    def __init__(self, *args):
        self.args = args

    def double(self, number):
        if number in Doubler.deaths:
            Doubler.deaths.remove(number)
            raise Dead("the node's memory was full")
        if number < 0:
            raise ValueError("a negative number")
        return 2 * number


def answers_of(pool):
    found = []
    while pool.busy():
        found += pool.results(wait=True)
    return found


def test_workers_answer_all_questions_and_the_dead_are_replaced(ray):
    """With the arguments of the first; their question is asked again; three deaths over one end the run."""
    Doubler.deaths = [4, 4, 0]
    pool = workers.Pool(2, "", Doubler, ("some", "settings"))
    ray.shuffled = True
    assert not ray.made[2:] and ray.options["num_cpus"] == 2 and "address" not in ray.options
    pool.submit({i: ("double", i) for i in range(5)})
    found = answers_of(pool)
    assert sorted(found) == [(i, 2 * i) for i in range(5)] and len(found) == 5
    assert ray.made == [("some", "settings")] * 5 and len(pool.idle) == 2 and not Doubler.deaths
    Doubler.deaths = [7, 7, 7]
    pool.submit({"an episode": ("double", 7)})
    with pytest.raises(RuntimeError, match="3 cache workers died over episode an episode .*memory was full"):
        answers_of(pool)
    pool.close()
    assert ray.down


def test_deaths_of_long_ago_are_forgotten(ray):
    """Episode 7 is asked for in every round of a run; workers that died in earlier rounds do not end it."""
    pool = workers.Pool(1, "", Doubler, ())
    for number in range(10, 14):
        Doubler.deaths = [number]
        pool.submit({7: ("double", number)})
        assert answers_of(pool) == [(7, 2 * number)]


def test_what_was_asked_before_is_forgotten(ray):
    """The policy has changed since: an answer that still comes is not taken for one to the new question."""
    pool = workers.Pool(2, "", Doubler, ())
    pool.submit({i: ("double", i) for i in range(4)})
    pool.submit({"b": ("double", 10), 9: ("double", 11)})
    found = answers_of(pool)
    assert dict(found) == {"b": 20, 9: 22} and len(found) == 2
    pool.submit({})
    assert not pool.busy()


def test_an_old_answer_is_not_taken_for_a_new_question_of_the_same_name(ray):
    """Questions are named by episode, and every version of the policy asks for every episode."""
    pool = workers.Pool(1, "", Doubler, ())
    pool.submit({7: ("double", 1)})
    pool.submit({7: ("double", 100)})
    assert answers_of(pool) == [(7, 200)]


def test_what_is_wrong_with_a_worker_is_told(ray):
    pool = workers.Pool(1, "", Doubler, ())
    pool.submit({1: ("double", -1)})
    with pytest.raises(ValueError, match="a negative number"):
        answers_of(pool)


def test_a_worker_with_another_base_model_is_found_out(ray):
    """Adapters alone are sent: candidates of another base would be taken for the policy's."""
    policy, args = adapted_policy(), script.Args(num_samples=2, cache_batch=3, num_cache_workers=1)
    make = lambda args, instruction: adapted_policy(instruction)  # noqa: E731
    images = {0: pictures(4, 28), 5: pictures(2, 28, seed=1)}
    pool = workers.CachePool(args, policy, make, script.draw_candidates)
    change(policy)
    found = dict(answer for answer in pool.candidates(policy, policy.version(), images, {0: 11, 5: 12}))
    found.pop(None, None)
    for episode, seed in ((0, 11), (5, 12)):
        expected = script.draw_candidates(policy, images[episode], 2, 3, seed)
        np.testing.assert_array_equal(found[episode], expected)
    assert len(ray.made) == 1

    def other(args, instruction):
        policy = adapted_policy(instruction)
        policy.model.projector.fc3.bias.data += 1
        return policy

    pool = workers.CachePool(args, policy, other, script.draw_candidates)
    with pytest.raises(ValueError, match="is its checkpoint another"):
        list(pool.candidates(policy, policy.version(), images, {0: 11, 5: 12}))


def adapted_policy(instruction="put the pot down"):
    policy = policy_of(instruction)
    script.add_lora(policy.model, 2)
    files.train_only(policy.model, script.adapters(policy.model))
    return policy


def change(policy):
    with torch.no_grad():
        for parameter in script.adapters(policy.model).values():
            parameter.add_(0.3 * torch.randn_like(parameter))


def test_a_cluster_that_cannot_be_reached_is_named(ray, monkeypatch):
    def unreachable(**options):
        raise ConnectionError("Could not find any running Ray instance at 10.0.0.9:6379.\nPlease specify one")

    pool = workers.Pool(1, "10.0.0.9:6379", Doubler, ())
    assert ray.options["address"] == "10.0.0.9:6379" and len(pool.idle) == 1
    ray.init = unreachable
    refused(workers.Pool, 1, "10.0.0.9:6379", Doubler, (), words=("--ray 10.0.0.9:6379", "Could not find any running"))
    refused(workers.Pool, 1, "", Doubler, (), words=("a Ray cluster on this machine", "Could not find"))
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(workers.Pool, 1, "", Doubler, (), words=("--num-cache-workers", "pip install ray"))


class MadeUpTask(gym.Env):
    observation_space, action_space = gym.spaces.Box(0, 1, (2,)), gym.spaces.Box(-1, 1, (7,))
    instruction = "go there"

    def __init__(self, number):
        if number < 0:
            raise widowx.TaskError("no such robot")
        self.number = number

    def reset(self, *, seed=None, options=None):
        return self.number + np.array([seed, len(options or ())], np.float32), {}

    def step(self, action):
        if action.sum() > 100:
            raise widowx.RobotError("the arm is stuck")
        if action.sum() > 10:
            raise Dead("the network is down")
        return action[:2], 1.0, True, False, {"executed": action / 2}


def remote_robot(**options):
    args = types.SimpleNamespace(robot_node="arm", num_cache_workers=0, ray="")
    return workers.RemoteEnv(args, "made-up", options)


def test_the_robots_loop_runs_on_the_machine_that_has_the_robot(ray, monkeypatch):
    """All that crosses the network is what `reset` and `step` are given and return; its errors arrive as they are."""
    monkeypatch.setattr(workers, "make_env", lambda env_id, **options: MadeUpTask(**options))
    ray.resources = {"CPU": 1.0, "arm": 1.0}
    env = remote_robot(number=3)
    assert ray.options["resources"] == {"arm": 1} and ray.asked_for[-1] == {"num_cpus": 0, "resources": {"arm": 1}}
    assert env.instruction == "go there" and env.action_space == MadeUpTask.action_space
    obs, info = env.reset(seed=4, options={"distractors": False})
    assert obs.tolist() == [7, 4] and info == {}
    obs, reward, terminated, truncated, info = env.step(np.full(7, 0.5))
    assert (obs.tolist(), reward, terminated, truncated) == ([0.5, 0.5], 1.0, True, False)
    assert info["executed"].tolist() == [0.25] * 7
    with pytest.raises(widowx.RobotError, match="^the arm is stuck$"):
        env.step(np.full(7, 50))
    with pytest.raises(widowx.RobotError, match="process or its machine is gone.*--resume"):
        env.step(np.full(7, 2))
    with pytest.raises(widowx.TaskError, match="^no such robot$"):
        remote_robot(number=-1)


def test_a_robot_that_no_machine_has_or_another_run_has_is_named(ray):
    refused(remote_robot, words=("--robot-node arm", "ray start", '"arm": 1'))
    ray.resources, ray.free = {"CPU": 1.0, "arm": 1.0}, {"CPU": 1.0}
    refused(remote_robot, words=("--robot-node arm", "another run"))


def test_no_worker_asks_for_more_than_there_is(ray):
    """Ray would wait for ever, without a word: cores and GPUs are shared, and none at all is an error."""
    for resources, num, gpus, expected in (
        ({"CPU": 8.0, "GPU": 8.0}, 4, 1.0, (1, 1)),
        ({"CPU": 2.0}, 4, 0.0, (0.5, 0)),
        ({"CPU": 8.0, "GPU": 1.0}, 3, 1.0, (1, 0.333)),
    ):
        ray.resources = resources
        workers.Pool(num, "", Doubler, (), gpus)
        assert tuple(ray.asked_for[-1].values()) == expected
    ray.resources = {"CPU": 8.0}
    refused(workers.Pool, 2, "", Doubler, (), 1.0, words=("GPU", "--num-cache-workers"))


def test_candidates_are_the_same_here_and_there():
    """And depend on episode and seed, not on how the random numbers of the run stand."""
    policy = adapted_policy()
    torch.manual_seed(1)
    one = script.draw_candidates(policy, pictures(5, 28), 4, 2, 7)
    torch.manual_seed(2)
    assert torch.equal(script.draw_candidates(policy, pictures(5, 28), 4, 2, 7), one) and one.shape == (5, 4, 7)
    assert not torch.equal(script.draw_candidates(policy, pictures(5, 28), 4, 2, 8), one)


def test_no_stale_candidate_comes_from_a_worker_that_was_still_at_it(ray, tmp_path):
    """The offline phase may end before the cache is whole; going online then asks the same again, and later anew."""
    policy, args = adapted_policy(), script.Args(num_samples=2, cache_batch=3, critic_image=20, num_cache_workers=2)
    buffer, run = script.EpisodeBuffer((28, 20), args, CPU), fake_run(tmp_path)
    for length in (2, 4, 3):
        obs = np.random.default_rng(length).integers(0, 256, (length + 1, 3 * (28**2 + 20**2) + 28)).astype(np.uint8)
        rows = dict(actions=np.zeros((length, 7), np.float32), rewards=np.zeros(length, np.float32))
        buffer.add(dict(obs=obs, terminals=np.zeros(length, bool)) | rows)
    make = lambda args, instruction: adapted_policy(instruction)  # noqa: E731
    pool = workers.CachePool(args, policy, make, script.draw_candidates)
    next(script.refresh(policy, buffer, run, pool))
    for _ in range(2):
        for _rows in script.refresh(policy, buffer, run, pool):
            pass
        version = policy.version()
        assert buffer.versions == [version] * 3
        for episode in range(3):
            states = buffer.states_of(episode)
            seed = int(version[:8], 16) + episode
            expected = script.draw_candidates(policy, buffer.states[states], 2, 3, seed)
            assert torch.equal(buffer.candidates[states], expected), "drawn by another version of the policy"
        change(policy)
