"""The kitchen: rewards and ends of the environment, and the Minari dataset that this test records from it."""

import json
import pathlib
import shutil
import sys
import warnings

import numpy as np
import pytest
from test_download import send, server

from benchmarks.tasks import kitchen
from benchmarks.tasks.dataset import ARRAYS, TaskError, file_sha256, write_npz

pytest.importorskip("gymnasium_robotics")
minari = pytest.importorskip("minari")
h5py = pytest.importorskip("h5py")

TASKS = kitchen.TASKS["complete"]
KETTLE_BACK = "kettle back"  # in a plan: the kettle returns to where it stood


def put(env, *tasks):
    """Set the kitchen's state: these sub-tasks are complete (KETTLE_BACK: that one no longer is)."""
    base = env.unwrapped
    module = sys.modules[kitchen._kitchen_env_class().__module__]
    qpos = base.data.qpos.copy()
    for task in tasks:
        where = module.OBS_ELEMENT_INDICES["kettle" if task == KETTLE_BACK else task]
        qpos[where] = base.robot_env.init_qpos[where] if task == KETTLE_BACK else module.OBS_ELEMENT_GOALS[task]
    base.robot_env.set_state(qpos, np.zeros_like(base.data.qvel))


# one plan an episode: what happens before which step. The second goes on after all four; in the third the kettle moves
# back.
PLANS = [
    (6, {}),
    (12, {2: TASKS[:1], 4: TASKS[1:3], 7: TASKS[3:]}),
    (9, {1: ("kettle",), 4: (KETTLE_BACK,), 6: ("microwave",)}),
]


def record(folder, env_id="kitchen-complete-v2"):
    """Record PLANS with FrankaKitchen as Minari's script does; return the dataset's folder and the actions taken.

    Minari's DataCollector needs jax, so its buffers are filled by hand.
    """
    settings = dict(remove_task_when_completed=False, terminate_on_tasks_completed=False)
    env = kitchen._kitchen_env_class()(tasks_to_complete=kitchen.TASKS[env_id.split("-")[1]], **settings)
    rng, all_actions, buffers = np.random.default_rng(0), [], []
    for seed, (steps, plan) in enumerate(PLANS):
        observations, actions, rewards = [env.reset(seed=seed)[0]], rng.uniform(-1, 1, (steps, 9)), []
        for step in range(steps):
            put(env, *plan.get(step, ()))
            obs, reward, terminated, _, _ = env.step(actions[step])
            assert not terminated
            observations.append(obs)
            rewards.append(reward)
        stacked = stack(observations)
        ends = np.arange(steps) == steps - 1
        buffer = minari.data_collector.EpisodeBuffer
        buffers.append(buffer(seed, seed, None, stacked, actions, rewards, np.zeros(steps, bool), ends, {}))
        all_actions.extend(actions)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):  # no author, no permalink
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        spaces = dict(observation_space=env.observation_space, action_space=env.action_space)
        minari.create_dataset_from_buffers(kitchen._minari_id(env_id), buffers, env="FrankaKitchen-v1", **spaces)
    env.close()
    return folder / kitchen._minari_id(env_id), all_actions


def stack(observations):
    """A list of nested dictionaries of arrays as one such dictionary."""
    if isinstance(observations[0], dict):
        return {key: stack([obs[key] for obs in observations]) for key in observations[0]}
    return np.array(observations)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return record(tmp_path_factory.mktemp("minari"))


@pytest.fixture(autouse=True)
def empty_home(monkeypatch, tmp_path):
    """Neither Minari's folder nor the cache has anything, and nobody gets to the network."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari-home"))
    monkeypatch.setenv("PARL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kitchen, "HUB", "http://127.0.0.1:9")


def copy(recorded, tmp_path):
    return shutil.copytree(recorded[0], tmp_path / "copy")


def error_of(*args, **kwargs):
    with pytest.raises(TaskError) as caught:
        kitchen.load_dataset(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- the environment ---


@pytest.mark.parametrize("env_id", kitchen.ENV_IDS)
def test_spaces_and_determinism(env_id):
    env = kitchen.make_env(env_id)
    obs, info = env.reset(seed=3)
    assert obs.dtype == np.float32 and obs.shape == (59,) and env.observation_space.contains(obs)
    assert env.action_space.shape == (9,) and env.action_space.dtype == np.float32
    assert info == {"completed": 0, "success": False}
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(5)]
    first = [env.step(action)[0] for action in actions]
    env.reset(seed=3)
    assert all(np.array_equal(a, env.step(action)[0]) for a, action in zip(first, actions))
    env.close()


def test_the_robots_joints_come_first():
    """What stands in for the lookup by name that fails on MuJoCo 4."""
    env = kitchen.make_env("kitchen-complete-v2").unwrapped
    names = [env.model.joint(i).name for i in range(env.model.njnt)]
    assert [name.startswith("robot") for name in names] == [True] * 9 + [False] * (len(names) - 9)
    assert list(env.model.jnt_qposadr[:9]) == list(env.model.jnt_dofadr[:9]) == list(range(9))


@pytest.mark.parametrize("env_id", kitchen.ENV_IDS)
def test_the_reward_counts_the_sub_tasks_completed_so_far_and_the_fourth_ends_the_episode(env_id):
    env, tasks = kitchen.make_env(env_id), kitchen.TASKS[env_id.split("-")[1]]
    for _ in range(2):  # a reset forgets what was completed
        env.reset(seed=0)
        assert env.step(np.zeros(9))[1] == 0.0
        for count, task in enumerate(tasks, start=1):
            put(env, task)
            _, reward, terminated, truncated, info = env.step(np.zeros(9, np.float32))
            assert reward == count and terminated == (count == 4) and not truncated
            assert info == {"completed": count, "success": count == 4}
            assert type(info["completed"]) is int and type(info["success"]) is bool
            if count == 2:
                put(env, KETTLE_BACK)
                assert env.step(np.zeros(9))[1] == 2.0, "what was completed stays completed"


def test_other_sub_tasks_do_not_count_and_the_time_limit_cuts(monkeypatch):
    monkeypatch.setattr(kitchen, "MAX_STEPS", 4)
    env = kitchen.make_env("kitchen-mixed-v2")
    env.reset(seed=0)
    put(env, "slide cabinet", "hinge cabinet")
    steps = [env.step(np.zeros(9)) for _ in range(4)]
    assert [step[1] for step in steps] == [0.0] * 4
    assert [step[2:4] for step in steps] == [(False, False)] * 3 + [(False, True)]


def test_the_time_limit_is_280():
    assert kitchen.make_env("kitchen-partial-v2").get_wrapper_attr("_max_episode_steps") == 280


# --- the data ---


def test_a_dataset_is_what_was_recorded_with_the_environments_rewards(recorded):
    folder, actions = recorded
    data = kitchen.load_dataset("kitchen-complete-v2", path=folder)
    kept = [range(6), range(6, 6 + 8), range(18, 27)]  # the second episode ends with its eighth step
    rows = np.concatenate(kept)
    np.testing.assert_array_equal(data.actions, np.array(actions, np.float32)[rows])
    np.testing.assert_array_equal(data.rewards, [0] * 6 + [0, 0, 1, 1, 3, 3, 3, 4] + [0, 1, 1, 1, 1, 1, 2, 2, 2])
    ends = np.cumsum([len(part) for part in kept]) - 1
    assert list(np.flatnonzero(data.terminals)) == [ends[1]] and list(np.flatnonzero(data.timeouts)) == [
        ends[0],
        ends[2],
    ]
    start = 0
    for episode, end in zip(minari.MinariDataset(folder / "data"), ends):
        obs = episode.observations["observation"].astype(np.float32)
        np.testing.assert_array_equal(data.observations[start : end + 1], obs[: end + 1 - start])
        np.testing.assert_array_equal(data.next_observations[start : end + 1], obs[1 : end + 2 - start])
        start = end + 1
    for name in ARRAYS:
        assert getattr(data, name).dtype == (bool if name in ("terminals", "timeouts") else np.float32)
    assert (
        data.source == str(folder) and data.sha256 == file_sha256(folder / "data" / "main_data.hdf5") and not data.local
    )


def test_the_recording_gives_the_same_rewards_and_ends_in_make_env(recorded):
    data = kitchen.load_dataset("kitchen-complete-v2", path=recorded[0])
    env, row = kitchen.make_env("kitchen-complete-v2"), 0
    for seed, (steps, plan) in enumerate(PLANS):
        obs, _ = env.reset(seed=seed)
        for step in range(steps):
            put(env, *plan.get(step, ()))
            np.testing.assert_array_equal(obs, data.observations[row])
            obs, reward, terminated, _, _ = env.step(np.float64(data.actions[row]))
            np.testing.assert_allclose(obs, data.next_observations[row], atol=1e-3)  # the actions were float64
            obs = data.next_observations[row]
            assert reward == data.rewards[row] and terminated == data.terminals[row]
            row += 1
            if terminated:
                break
    assert row == len(data)


def test_minaris_own_folder_is_found(recorded, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(recorded[0].parents[2]))
    data = kitchen.load_dataset("kitchen-complete-v2")
    assert len(data) == 23 and data.source == str(recorded[0])


def test_an_npz(recorded, tmp_path):
    data = kitchen.load_dataset("kitchen-complete-v2", path=recorded[0])
    write_npz(tmp_path / "data.npz", data)
    again = kitchen.load_dataset("kitchen-complete-v2", path=tmp_path / "data.npz")
    assert all(np.array_equal(getattr(data, name), getattr(again, name)) for name in ARRAYS)
    data.actions = data.actions[:, :8]
    write_npz(tmp_path / "data.npz", data)
    assert "(N, 9)" in error_of("kitchen-complete-v2", path=tmp_path / "data.npz")


def test_missing_folders(tmp_path, recorded):
    message = error_of("kitchen-complete-v2", path=tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message and "minari download D4RL/kitchen/complete-v2" in message
    folder = copy(recorded, tmp_path)
    (folder / "data" / "metadata.json").unlink()
    assert "metadata.json" in error_of("kitchen-complete-v2", path=folder)


def test_damaged_files(tmp_path, recorded):
    folder = copy(recorded, tmp_path)
    path = folder / "data" / "main_data.hdf5"
    whole = path.read_bytes()
    for size in (0, 1000, len(whole) // 2, len(whole) - 4000):
        path.write_bytes(whole[:size])
        assert "truncated" in error_of("kitchen-complete-v2", path=folder)
    path.write_bytes(whole)
    metadata = folder / "data" / "metadata.json"
    for text in ("{", "{}", "[]", json.dumps(json.loads(metadata.read_text()) | {"minari_version": "0.0.1"})):
        metadata.write_text(text)
        assert "not readable" in error_of("kitchen-complete-v2", path=folder)


def rewrite(folder, name, change):
    """Replace one array of episode 1 (None: delete it)."""
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        array = file["episode_1"][name][()]
        del file["episode_1"][name]
        if change is not None:
            file["episode_1"][name] = change(array)


@pytest.mark.parametrize(
    "name, change, text",
    [
        ("observations/observation", None, "observation"),
        ("observations/observation", lambda a: a[:, :58], "(N, 59)"),
        ("observations/observation", lambda a: a[:-1], "wrong length"),
        ("observations/observation", lambda a: a.astype("S8"), "must be a number"),
        ("observations/achieved_goal/kettle", lambda a: a[:, :3], "(N, 7)"),
        ("observations/achieved_goal/kettle", None, "kettle"),
        ("actions", lambda a: a[:, :8], "(N, 9)"),
        ("actions", lambda a: a[:-2], "wrong length"),
        ("rewards", None, "rewards"),
    ],
)
def test_other_arrays(tmp_path, recorded, name, change, text):
    folder = copy(recorded, tmp_path)
    rewrite(folder, name, change)
    message = error_of("kitchen-complete-v2", path=folder)
    assert text in message and str(folder) in message


def test_the_data_of_another_task(recorded):
    assert "bottom burner" in error_of("kitchen-mixed-v2", path=recorded[0])


def test_without_network_or_packages_one_line_says_what_to_do(monkeypatch):
    for source in ("auto", "download", "local"):
        message = error_of("kitchen-mixed-v2", source=source)
        assert "--dataset-path FOLDER" in message and "minari download D4RL/kitchen/mixed-v2" in message
        assert ("refused" in message) == (source != "local")
    for name in ("minari", "h5py"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            assert 'pip install "minari[hdf5]"' in error_of("kitchen-mixed-v2")


def test_a_download_is_kept_and_checked(recorded, monkeypatch, tmp_path):
    asked = []

    def answer(handler, number):
        asked.append(handler.path)
        send(handler, (recorded[0] / "data" / handler.path.rsplit("/", 1)[1]).read_bytes())

    with server(answer) as (url, _):
        monkeypatch.setattr(kitchen, "HUB", url)
        first, again = (kitchen.load_dataset("kitchen-complete-v2") for _ in range(2))
    assert [path.removeprefix("/file.hdf5") for path in asked] == [
        "/kitchen/complete-v2/data/metadata.json", "/kitchen/complete-v2/data/main_data.hdf5"
    ]  # fmt: skip
    assert first.sha256 == again.sha256 and len(again) == 23 and not first.local
    path = tmp_path / "cache" / "minari" / "D4RL" / "kitchen" / "complete-v2" / "data" / "main_data.hdf5"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "changed on disk" in error_of("kitchen-complete-v2")


@pytest.mark.parametrize("damage", [None, "main_data.hdf5", "metadata.json"])
def test_files_put_into_the_cache_by_hand(recorded, tmp_path, damage):
    data = tmp_path / "cache" / "minari" / "D4RL" / "kitchen" / "complete-v2" / "data"
    shutil.copytree(recorded[0] / "data", data)
    if damage is None:
        assert len(kitchen.load_dataset("kitchen-complete-v2")) == 23
        notes = {file.name for file in data.iterdir() if file.name.endswith(".json")}
        assert notes == {"metadata.json", "metadata.json.json", "main_data.hdf5.json"}
        assert len(kitchen.load_dataset("kitchen-complete-v2")) == 23
    else:
        (data / damage).write_bytes((data / damage).read_bytes()[:-100])
        message = error_of("kitchen-complete-v2")
        assert (
            str(data / damage) in message and "not a readable Minari file" in message and "delete the file" in message
        )


def test_without_a_home_folder_the_cache_will_do(recorded, tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", no_home)
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    shutil.copytree(recorded[0], tmp_path / "cache" / "minari" / "D4RL" / "kitchen" / "complete-v2")
    assert len(kitchen.load_dataset("kitchen-complete-v2")) == 23


def test_a_download_that_fails_leaves_nothing_that_a_later_run_takes(recorded, monkeypatch, tmp_path):
    with server(lambda handler, n: send(handler, b"{}")) as (url, _):
        monkeypatch.setattr(kitchen, "HUB", url)
        message = error_of("kitchen-complete-v2")
    assert "not a readable Minari file" in message and "--dataset-path FOLDER" in message
    assert not list((tmp_path / "cache").rglob("main_data.hdf5"))


def test_a_cache_that_cannot_be_written_to(monkeypatch):
    monkeypatch.setenv("PARL_CACHE", "/proc/nowhere")
    assert "PARL_CACHE" in error_of("kitchen-complete-v2")
