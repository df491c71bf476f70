"""OGBench's single tasks: the ids, seeded environments, local data that OGBench itself reads, and bad input."""

import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest

from benchmarks import tasks
from benchmarks.tasks import TaskError
from benchmarks.tasks import ogbench_singletask as family
from benchmarks.tasks.dataset import ARRAYS, cache_dir
from benchmarks.tasks.download import DownloadError

ogbench = pytest.importorskip("ogbench")


def one_line(function, *args, **kwargs) -> str:
    """The message of the TaskError that the call must raise."""
    with pytest.raises(TaskError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def can_render() -> str:
    """Empty, or why not."""
    try:
        env = family.make_env("pointmaze-medium-navigate-singletask-v0", render_mode="rgb_array")
        env.reset(seed=0)
        env.render()
        env.close()
    except TaskError as error:
        return str(error)
    return ""


WHY_NOT = can_render()
needs_rendering = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "it renders")


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return all(equal(a[key], b[key]) for key in a)
    return np.array_equal(a, b)


def test_every_id_is_registered():
    assert len(set(family.ENV_IDS)) == len(family.ENV_IDS)
    published = {family.split_id(env_id)[3] for env_id in family.ENV_IDS}
    assert len(published) == 82  # OGBench's data files, powderworld's three left out
    for env_id in family.ENV_IDS:
        parts = env_id.split("-")  # as `ogbench.make_env_and_datasets` takes an id apart
        position = parts.index("singletask")
        assert "-".join(parts[: position - 1] + parts[position:]) == family.split_id(env_id)[2]
        assert "-".join(parts[:position] + parts[-1:]) == family.split_id(env_id)[3]
        assert family.split_id(env_id)[2] in gym.registry, env_id


def test_ids_do_not_import_ogbench():
    code = "import sys, benchmarks.tasks.ogbench_singletask as f; print(len(f.ENV_IDS), 'ogbench' in sys.modules)"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    output = subprocess.run([sys.executable, "-c", code], cwd=root, text=True, capture_output=True, check=True).stdout
    assert output.split() == [str(len(family.ENV_IDS)), "False"]


def test_without_the_package_one_line_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(family, "download_from", lambda *args, **kwargs: pytest.fail("fetched in vain"))
    (tmp_path / "file.npz").touch()
    for name in [name for name in sys.modules if name.startswith("ogbench.")]:
        monkeypatch.delitem(sys.modules, name)  # as if nothing of it had ever been imported
    monkeypatch.setitem(sys.modules, "ogbench", None)
    calls = [(tasks.make_env, {}), (tasks.load_dataset, {}), (tasks.load_dataset, {"source": "local"})]
    calls += [(tasks.load_dataset, {"path": tmp_path / "file.npz"})]
    for env_id in ("cube-single-play-singletask-v0", "visual-antmaze-medium-navigate-singletask-task2-v0"):
        for function, options in calls:
            message = one_line(function, env_id, **options)
            assert "pip install ogbench" in message and "labmaze has wheels up to Python 3.12" in message
    code = (
        "import sys; sys.modules['ogbench'] = None; from benchmarks.tasks import make_env; make_env('antmaze-umaze-v2')"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)  # the other families do not miss it


def rollout(env, seed, steps=15):
    obs, info = env.reset(seed=seed)
    rows = [obs, info["success"]]
    for _ in range(steps):
        action = env.action_space.sample()
        obs, reward, terminated, truncated, info = env.step(action)
        rows += [action, obs, reward, terminated, truncated, info["success"]]
    rows.append(env.reset()[0])  # without a seed: goes on with the streams of the last one
    return rows


@pytest.mark.parametrize("name", ["pointmaze-teleport-navigate", "antmaze-medium-stitch", "cube-double-play"])
def test_environment_is_float32_and_fixed_by_its_seed(name):
    env, other = (family.make_env(f"{name}-singletask-v0", render_mode="rgb_array") for _ in range(2))
    assert type(env.unwrapped).__module__.startswith("ogbench.")
    np.random.seed(3)
    expected = np.random.random(4)
    np.random.seed(3)
    other.reset()
    other.step(other.action_space.sample())
    first, second, again, different = rollout(env, 1), rollout(other, 1), rollout(env, 1), rollout(env, 2)
    assert np.array_equal(np.random.random(4), expected)  # numpy's global generator is nobody's business
    assert all(equal(a, b) for a, b in zip(first, second)) and all(equal(a, b) for a, b in zip(first, again))
    assert not equal(first[0], different[0]) and not equal(first[0], first[-1])
    assert env.action_space == gym.spaces.Box(-1.0, 1.0, env.action_space.shape, np.float32)
    assert all(isinstance(success, bool) for success in first[1::6])
    for obs in first[0], first[3], first[-1]:
        assert obs.dtype == np.float32 and env.observation_space.contains(obs)
    assert env.render_mode == "rgb_array" and env.metadata["render_fps"] > 0
    env.close()


@needs_rendering
def test_camera_environment():
    env = family.make_env("visual-antmaze-medium-navigate-singletask-task3-v0")
    first, again = rollout(env, 1, steps=3), rollout(env, 1, steps=3)
    assert all(equal(a, b) for a, b in zip(first, again))
    assert env.observation_space.contains(first[0]) and first[0]["image"].std() > 5
    assert first[0]["image"].shape == (64, 64, 3) and first[0]["proprio"].shape == (0,)
    assert not equal(first[0], first[-1])
    env.close()


@needs_rendering
def test_renderer_is_chosen_after_mujoco_was_imported():
    code = (
        "import mujoco\nfrom benchmarks.tasks.ogbench_singletask import make_env\n"
        "env = make_env('pointmaze-medium-navigate-singletask-v0')\nenv.reset(seed=0)\nprint(env.render().std() > 5)"
    )
    environ = {
        key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "DISPLAY", "PYOPENGL_PLATFORM")
    }
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    result = subprocess.run([sys.executable, "-c", code], cwd=root, env=environ, text=True, capture_output=True)
    assert result.stdout.split()[-1:] == ["True"], result.stderr


def test_no_renderer_is_one_line():
    def fail():
        with family.complain_about_renderer():
            raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    assert "libosmesa6" in one_line(fail) and "MUJOCO_GL=egl" in one_line(fail)


def check_local_data(env_id, size, capsys):
    """Collect, and compare row by row with what OGBench's own loader makes of the file."""
    dataset = family.load_dataset(env_id, size=size, seed=7, source="local")
    assert "LOCAL DATA" in capsys.readouterr().err and dataset.local and "seed 7" in dataset.source
    env, train, validation = ogbench.make_env_and_datasets(env_id, dataset_path=str(local_file(env_id, size, seed=7)))
    assert len(dataset) == size == len(train["rewards"]) and len(validation["rewards"]) >= 1
    image = isinstance(dataset.observations, dict)
    assert image == env_id.startswith("visual-")
    for key in "observations", "next_observations":
        ours = getattr(dataset, key)["image"] if image else getattr(dataset, key)
        assert ours.dtype == (np.uint8 if image else np.float32) and np.array_equal(ours, train[key])
        assert not image or getattr(dataset, key)["proprio"].shape == (size, 0)
    for key in "actions", "rewards":
        assert getattr(dataset, key).dtype == np.float32 and np.array_equal(getattr(dataset, key), train[key])
    assert np.array_equal(dataset.terminals, train["masks"] == 0)
    assert np.array_equal(dataset.terminals | dataset.timeouts, (train["masks"] == 0) | (train["terminals"] == 1))
    assert not (dataset.terminals & dataset.timeouts).any() and (dataset.terminals | dataset.timeouts)[-1]
    assert np.abs(dataset.actions).max() <= 1.0 and dataset.rewards.max() <= 0.0
    return dataset


def local_file(env_id, size, seed=0):
    (path,) = (cache_dir() / "ogbench-local").glob(f"{family.split_id(env_id)[3]}-{size}-seed{seed}-????????.npz")
    return path


@pytest.mark.parametrize("name", ["cube-double-play", "scene-noisy", "puzzle-3x3-play"])
def test_local_data_of_the_arm(name, capsys):
    dataset = check_local_data(f"{name}-singletask-v0", 60, capsys)
    assert dataset.rewards.min() < 0


@pytest.mark.parametrize("name", ["antmaze-medium-navigate", "antmaze-large-explore"])
def test_local_data_of_the_ant(name, capsys):
    dataset = check_local_data(f"{name}-singletask-task2-v0", 250, capsys)
    assert (
        np.linalg.norm(dataset.next_observations[:, :2] - dataset.observations[:, :2], axis=1).max() < 1.0
    )  # one trajectory


@needs_rendering
def test_local_data_through_a_camera(capsys):
    check_local_data("visual-cube-single-play-singletask-v0", 4, capsys)


def test_one_file_serves_all_tasks_and_is_kept(capsys):
    first = check_local_data("pointmaze-medium-navigate-singletask-v0", 5_500, capsys)
    moved = np.linalg.norm(first.next_observations - first.observations, axis=1)
    assert moved.max() < 1.5 and first.timeouts.sum() <= 6  # no row spans two trajectories
    tasks = [
        family.load_dataset(f"pointmaze-medium-navigate-singletask-task{task}-v0", size=5_500, seed=7, source="local")
        for task in range(1, 6)
    ]
    assert capsys.readouterr().err.count("LOCAL DATA") == 5  # cached or not
    assert all(task.sha256 == first.sha256 and equal(task.observations, first.observations) for task in tasks)
    assert equal(tasks[0].rewards, first.rewards)  # OGBench's default task here is the first
    assert sum(task.terminals.any() for task in tasks) >= 3 and sum(task.terminals.sum() for task in tasks) > 20
    path = local_file("pointmaze-medium-navigate-singletask-v0", 5_500, 7)
    by_path = family.load_dataset("pointmaze-medium-navigate-singletask-v0", path=path)
    assert equal(by_path.rewards, first.rewards) and not by_path.local and by_path.sha256 == first.sha256


def test_stitch_trajectories_are_short_and_whole():
    dataset = family.load_dataset("pointmaze-medium-stitch-singletask-v0", size=500, source="local")
    ends = np.append(np.linalg.norm(dataset.next_observations[:-1] - dataset.observations[1:], axis=1) > 1e-6, True)
    assert list(np.flatnonzero(ends)) == [199, 399, 499]


def test_content_does_not_depend_on_the_number_of_processes():
    one, two = (family.collect("pointmaze-medium", "navigate", 5_050, 0, processes=n)[0] for n in (1, 2))
    assert equal(one, two) and len(one["actions"]) == 5_050 + 6
    train, validation = family.collect("cube-single", "noisy", 20, 0)
    again = family.collect_chunk("cube-single", "noisy", 0, 0, 0, 20)  # in this process
    assert equal(train, again) and not equal(train["actions"][:2], validation["actions"][:2])


# --- BAD INPUT ---

POINT, CUBE = "pointmaze-medium-stitch-singletask-v0", "cube-single-play-singletask-v0"


def test_bad_files_are_one_line(tmp_path):
    path, point_arrays = tmp_path / "file.npz", family.collect("pointmaze-medium", "stitch", 10, 0, processes=1)[0]

    def message(env_id=POINT, **changes):
        arrays = {key: array for key, array in (point_arrays | changes).items() if array is not None}
        np.savez(path, **arrays)
        return one_line(family.load_dataset, env_id, path=path)

    assert "no dataset file" in one_line(family.load_dataset, POINT, path=tmp_path / "absent.npz")
    assert "'qpos'" in message(qpos=None)
    assert "'button_states'" in message("puzzle-3x3-play-singletask-v0")
    assert "qpos has shape" in message(qpos=point_arrays["qpos"][:, :-1])
    assert "observations has shape (11, 2); this task needs (N, 28)" in message(CUBE)
    assert "actions has shape" in message(actions=np.zeros((11, 3)))
    assert "different or no length" in message(terminals=point_arrays["terminals"][:-1])
    assert "dtype <U" in message(actions=point_arrays["actions"].astype(str))
    assert "readable" in message(actions=np.full((11, 2), None))  # a pickle
    np.savez(path, **point_arrays)
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in one_line(family.load_dataset, POINT, path=path)
    path.write_bytes(b"not a zip")
    assert "not a readable .npz" in one_line(family.load_dataset, POINT, path=path)
    np.savez_compressed(path, **point_arrays)
    damaged = bytearray(path.read_bytes())
    damaged[100:260] = bytes(160)
    path.write_bytes(damaged)
    assert "not a readable .npz" in one_line(family.load_dataset, POINT, path=path)


def test_six_arrays_are_read_too(tmp_path):
    dataset = family.load_dataset("pointmaze-medium-stitch-singletask-v0", size=100, source="local")
    np.savez(tmp_path / "six.npz", **{key: getattr(dataset, key) for key in ARRAYS})
    again = family.load_dataset("pointmaze-medium-stitch-singletask-v0", path=tmp_path / "six.npz")
    assert all(equal(getattr(again, key), getattr(dataset, key)) for key in ARRAYS)
    assert "observations has shape" in one_line(family.load_dataset, CUBE, path=tmp_path / "six.npz")


def test_a_changed_cache_file_is_noticed():
    family.load_dataset("pointmaze-medium-stitch-singletask-v0", size=30, source="local")
    path = local_file("pointmaze-medium-stitch-singletask-v0", 30)
    path.write_bytes(path.read_bytes() + b"x")
    assert "changed on disk" in one_line(
        family.load_dataset, "pointmaze-medium-stitch-singletask-v0", size=30, source="local"
    )


@pytest.mark.parametrize(
    "name", ["humanoidmaze-medium-navigate", "antsoccer-arena-stitch", "visual-humanoidmaze-large-stitch"]
)
def test_what_cannot_be_collected_says_what_to_pass(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise DownloadError("cannot download it: no network")

    monkeypatch.setattr(family, "download_from", refuse)
    for source in "local", "auto":
        message = one_line(family.load_dataset, f"{name}-singletask-task1-v0", source=source)
        assert "--dataset-path" in message and f"ogbench/{name}-v0.npz" in message
    assert "no network" in one_line(family.load_dataset, f"{name}-singletask-v0", source="download")


def test_published_file_first_and_local_data_without_it(monkeypatch, capsys):
    env_id = "pointmaze-large-navigate-singletask-task4-v0"
    asked = []

    def refuse(urls, *args, **kwargs):
        asked.extend(urls)
        raise DownloadError("cannot download it: no network")

    monkeypatch.setattr(family, "download_from", refuse)
    dataset = family.load_dataset(env_id, size=60)
    assert dataset.local and "no network" in capsys.readouterr().err
    file, copy = "pointmaze-large-navigate-v0.npz", "https://huggingface.co/datasets/zhouzypaul/ogbench_datasets"
    assert asked == [f"https://rail.eecs.berkeley.edu/datasets/ogbench/{file}", f"{copy}/resolve/main/{file}"]
    local = local_file(env_id, 60)

    def serve(url, path, sha256=None, check=None):
        path.write_bytes(local.read_bytes())
        check(path)
        return "digest"

    monkeypatch.setattr(family, "download_from", serve)
    published = family.load_dataset(env_id)
    assert not published.local and published.sha256 == "digest" and equal(published.rewards, dataset.rewards)
    assert "LOCAL" not in capsys.readouterr().err
