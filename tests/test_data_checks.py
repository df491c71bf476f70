"""Every array of a dataset is checked alike, whatever kind of file it comes from."""

import json
import zipfile

import h5py
import numpy as np
import pytest

from benchmarks.tasks import TaskError, load_dataset
from benchmarks.tasks.dataset import check_array

POINTMAZE, ANTMAZE = "pointmaze-umaze-v0", "antmaze-umaze-v2"
OGBENCH, VISUAL = "pointmaze-medium-navigate-singletask-v0", "visual-antmaze-medium-navigate-singletask-v0"
KITCHEN = "kitchen-complete-v2"
ROWS = 12


def six_arrays(observation=(4,), action=2):
    rng = np.random.default_rng(0)
    images = len(observation) == 3
    return {
        "observations": rng.integers(0, 255, (ROWS, *observation), np.uint8)
        if images
        else np.zeros((ROWS, *observation)),
        "actions": rng.uniform(-1, 1, (ROWS, action)),
        "rewards": np.zeros(ROWS),
        "next_observations": np.zeros((ROWS, *observation), np.uint8 if images else np.float32),
        "terminals": np.zeros(ROWS, bool),
        "timeouts": np.arange(ROWS) == ROWS - 1,
    }


def write_npz(path, arrays):
    np.savez(path, **arrays)
    return path


def write_hdf5(path, arrays):
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array.astype("S8") if array.dtype.kind == "U" else array
    return path


def write_minari(path, arrays):
    """One episode, in the layout of Minari's files."""
    (path / "data").mkdir(parents=True)
    write_hdf5(path / "data" / "main_data.hdf5", {f"episode_0/{key}": array for key, array in arrays.items()})
    with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
        file["episode_0"].attrs.update({"id": 0, "total_steps": ROWS, "seed": 0})
    metadata = {
        "minari_version": "0.5.4", "dataset_id": "D4RL/kitchen/complete-v2", "total_episodes": 1, "total_steps": ROWS,
        "data_format": "hdf5", "observation_space": SPACE, "action_space": BOX,
    }  # fmt: skip
    (path / "data" / "metadata.json").write_text(json.dumps(metadata))
    return path


GOALS = {"microwave": 1, "kettle": 7, "light switch": 2, "slide cabinet": 1}


def box(size):
    return {"type": "Box", "dtype": "float64", "shape": [size], "low": [-9e9] * size, "high": [9e9] * size}


BOX = json.dumps(box(9))
GOAL_SPACE = {"type": "Dict", "subspaces": {task: box(size) for task, size in GOALS.items()}}
SPACE = json.dumps({"type": "Dict", "subspaces": {"observation": box(59), "achieved_goal": GOAL_SPACE}})


def minari_arrays():
    achieved = {f"observations/achieved_goal/{task}": np.full((ROWS + 1, size), 9.0) for task, size in GOALS.items()}
    flags = {"terminations": np.zeros(ROWS, bool), "truncations": np.arange(ROWS) == ROWS - 1}
    observations = {"observations/observation": np.zeros((ROWS + 1, 59))}
    return observations | achieved | flags | {"actions": np.zeros((ROWS, 9)), "rewards": np.zeros(ROWS)}


def d4rl_arrays():
    arrays = six_arrays((29,), 8)
    del arrays["next_observations"]
    infos = {"infos/goal": (ROWS, 2), "infos/qpos": (ROWS, 15), "infos/qvel": (ROWS, 14)}
    return arrays | {key: np.zeros(shape) for key, shape in infos.items()}


def ogbench_arrays():
    arrays = six_arrays((2,), 2)
    return {key: arrays[key] for key in ("observations", "actions", "terminals")} | {"qpos": np.zeros((ROWS, 2))}


# road: task, how its file is written, the good arrays, and those of them that are flags
ROADS = {
    "npz": (POINTMAZE, write_npz, six_arrays, ("terminals", "timeouts")),
    "npz for the ant": (ANTMAZE, write_npz, lambda: six_arrays((29,), 8), ("terminals", "timeouts")),
    "npz for the kitchen": (KITCHEN, write_npz, lambda: six_arrays((59,), 9), ("terminals", "timeouts")),
    "npz for OGBench": (OGBENCH, write_npz, lambda: six_arrays((2,), 2), ("terminals", "timeouts")),
    "hdf5": (ANTMAZE, write_hdf5, d4rl_arrays, ("terminals", "timeouts")),
    "ogbench": (OGBENCH, write_npz, ogbench_arrays, ("terminals",)),
    "minari": (KITCHEN, write_minari, minari_arrays, ()),
}
UNUSED = ("rewards", "terminations", "truncations")  # Minari's: computed anew from the states
NAMES = [
    (road, name) for road, (_, _, arrays, _) in ROADS.items() for name in arrays()
    if not (road == "minari" and name in UNUSED)
]  # fmt: skip


def load(road, folder, **changes):
    if road in ("ogbench", "npz for OGBench"):
        pytest.importorskip("ogbench")
    env_id, write, arrays, _ = ROADS[road]
    suffix = {write_npz: ".npz", write_hdf5: ".hdf5", write_minari: ""}[write]
    path = write(folder / f"file{suffix}", arrays() | changes)
    return load_dataset(env_id, path=path)


def error_of(road, folder, name, array):
    with pytest.raises(TaskError) as caught:
        load(road, folder, **{name: array})
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message and name.rsplit("/", 1)[-1] in message, message
    return message


@pytest.mark.parametrize("road", ROADS)
def test_a_good_file_is_read(road, tmp_path):
    dataset = load(road, tmp_path)
    assert dataset.terminals.dtype == dataset.timeouts.dtype == bool and len(dataset) >= ROWS - 1
    assert dataset.observations.dtype == dataset.actions.dtype == dataset.rewards.dtype == np.float32


@pytest.mark.parametrize("road, name", NAMES)
def test_every_array_has_to_be_finite_numbers_of_its_shape(road, name, tmp_path):
    _, _, arrays, flags = ROADS[road]
    good = arrays()[name]
    is_flag, is_number = name in flags, good.dtype.kind == "f" or name in flags
    bad = {
        "must be a number": good.astype(str),
        "has shape": good.reshape(len(good), 1) if good.ndim == 1 else good[:, :, None],
    }
    if is_number:
        for text, value in (("nan", np.nan), ("inf", -np.inf), ("1e+300", 1e300), ("0.5", 0.5)):
            if text == "0.5" and not is_flag:
                continue
            bad[f"{text} in row 3"] = good.astype(float)
            bad[f"{text} in row 3"][3] = value
    for number, (expected, array) in enumerate(bad.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        message = error_of(road, folder, name, array)
        assert expected in message, message


@pytest.mark.parametrize("road", [road for road in ROADS if ROADS[road][3]])
def test_a_flag_may_be_any_kind_of_0_and_1(road, tmp_path):
    for number, kind in enumerate((np.uint8, np.int64, np.float32, np.float64)):
        (tmp_path / str(number)).mkdir()
        name = ROADS[road][3][-1]
        flag = np.arange(ROWS) == 5
        dataset = load(road, tmp_path / str(number), **{name: flag.astype(kind)})
        assert dataset.terminals.dtype == bool == dataset.timeouts.dtype
        assert (dataset.terminals | dataset.timeouts).sum() in (2, 1)


def test_fewer_rows_in_one_array(tmp_path):
    for number, road in enumerate(ROADS):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(TaskError, match="length"):
            load(road, tmp_path / str(number), actions=ROADS[road][2]()["actions"][:-2])


def test_images_stay_images(tmp_path):
    pytest.importorskip("ogbench")
    path = write_npz(tmp_path / "six.npz", six_arrays((64, 64, 3), 8))
    dataset = load_dataset(VISUAL, path=path)
    assert dataset.observations["image"].dtype == np.uint8 == dataset.next_observations["image"].dtype
    assert dataset.observations["image"].shape == (ROWS, 64, 64, 3)
    write_npz(path, six_arrays((64, 64, 3), 8) | {"observations": np.zeros((ROWS, 64, 64, 3))})
    with pytest.raises(TaskError, match="images must be uint8"):
        load_dataset(VISUAL, path=path)


@pytest.mark.parametrize(
    "array", [1.0, np.zeros(3, complex), np.array([None]), np.zeros(3, "m8[s]"), np.zeros((3, 0, 1))]
)
def test_what_is_no_column_of_numbers(array):
    with pytest.raises(TaskError, match="file: rewards has"):
        check_array("rewards", array, "file", ())


def test_a_group_or_a_plain_array_in_place_of_arrays(tmp_path):
    arrays = d4rl_arrays()
    del arrays["rewards"]
    write_hdf5(tmp_path / "file.hdf5", arrays | {"rewards/deeper": np.zeros(ROWS)})
    np.save(tmp_path / "file.npy", np.zeros(ROWS))
    (tmp_path / "file.npy").rename(tmp_path / "file.npz")
    for name in ("file.hdf5", "file.npz"):
        with pytest.raises(TaskError, match=f"{name} is not a readable") as caught:
            load_dataset(ANTMAZE, path=tmp_path / name)
        assert "\n" not in str(caught.value)
    with zipfile.ZipFile(tmp_path / "file.npz", "w") as file:
        file.writestr("observations.npy", b"nonsense")
    with pytest.raises(TaskError, match="has no array|not a readable"):
        load_dataset(ANTMAZE, path=tmp_path / "file.npz")
