"""AntMaze: the environment against D4RL's numbers and OGBench's ant, D4RL's files, and the local collection."""

import multiprocessing
import pathlib
from concurrent.futures import ProcessPoolExecutor

import gymnasium as gym
import h5py
import mujoco
import numpy as np
import pytest
from test_download import send, server

from benchmarks.tasks import TaskError, antmaze, load_dataset, make_env
from benchmarks.tasks.ant_walker import load_walker
from benchmarks.tasks.antmaze import MAPS, AntMaze, Maze, noisy_ant_state
from benchmarks.tasks.dataset import ARRAYS, write_npz

# --- the environment ---


def test_numbers_of_d4rl():
    for env_id, limit in (
        ("antmaze-umaze-v2", 700),
        ("antmaze-medium-play-v2", 1000),
        ("antmaze-large-diverse-v2", 1000),
    ):
        env = make_env(env_id)
        model = env.unwrapped.model
        assert env.get_wrapper_attr("_max_episode_steps") == limit
        assert (model.opt.timestep, model.opt.integrator, antmaze.SUBSTEPS) == (0.02, mujoco.mjtIntegrator.mjINT_RK4, 5)
        assert np.unique(model.geom_solref, axis=0).tolist() == [[0.02, 1.0]]
        assert np.unique(model.geom_solimp[:, :3], axis=0).tolist() == [[0.8, 0.8, 0.01]]
        assert (model.actuator_gear[:, 0] == 30).all() and (np.abs(model.actuator_ctrlrange) == 1).all()
        names = [mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_JOINT, i) for i in model.actuator_trnid[:, 0]]
        assert names == ["hip_4", "ankle_4", "hip_1", "ankle_1", "hip_2", "ankle_2", "hip_3", "ankle_3"]
        assert env.observation_space.shape == (29,) and env.action_space == gym.spaces.Box(-1.0, 1.0, (8,), np.float32)


def test_reset_and_goal_noise():
    env = make_env("antmaze-large-play-v2")
    obs, goals = [], []
    for seed in range(200):
        o, _ = env.reset(seed=seed)
        obs.append(o)
        goals.append(env.unwrapped.goal)
    obs, goals = np.array(obs), np.array(goals)
    assert obs.dtype == np.float32 and obs.shape == (200, 29)
    assert np.abs(obs[:, :2]).max() <= 0.1 and abs(obs[:, 2].mean() - 0.75) < 0.02 and np.ptp(obs[:, 2]) > 0.15
    assert np.abs(obs[:, 7:15]).max() <= 0.1 and 0.09 < obs[:, 15:].std() < 0.11
    np.testing.assert_allclose(np.linalg.norm(obs[:, 3:7], axis=1), 1, atol=1e-5)
    noise = goals - [4 * 8, 4 * 6]  # goal cell (7, 9), reset cell (1, 1)
    assert noise.min() >= 0 and 1.3 < noise.max() <= 1.5 and abs(noise.mean() - 0.75) < 0.05
    again, _ = env.reset(seed=7)
    assert np.array_equal(again, obs[7]) and np.array_equal(env.unwrapped.goal, goals[7])


def test_reward_and_end_are_within_half_a_metre():
    env = make_env("antmaze-umaze-v2")
    env.reset(seed=0)
    inner = env.unwrapped
    qpos, qvel = inner.model.qpos0.copy(), np.zeros(14)
    for distance, near in ((0.45, True), (0.6, False)):
        qpos[:2] = inner.goal + [distance, 0]
        inner.set_state(qpos, qvel)
        _, reward, terminated, truncated, info = env.step(np.zeros(8, np.float32))
        assert (reward, terminated, info["success"], truncated) == (float(near), near, near, False)
    env.reset(seed=1)
    steps = [env.step(np.zeros(8, np.float32))[2:4] for _ in range(700)]
    assert steps[-1] == (False, True) and not any(terminated or truncated for terminated, truncated in steps[:-1])


@pytest.mark.parametrize("start", [(0, 0), (16, 4), (1.2, 0.3), (-1.2, 4.8)])
def test_the_ant_moves_as_ogbenchs_does(start):
    """OGBench's package has D4RL's ant as an XML file of its own, in the same medium maze, a box per wall cell."""
    pytest.importorskip("ogbench")  # registers its environments
    ours, theirs = AntMaze(MAPS["medium"]), gym.make("antmaze-medium-v0").unwrapped
    theirs.reset()
    rng = np.random.default_rng(0)
    qpos, qvel = noisy_ant_state(ours.model, rng)
    qpos[:2] = start
    ours.set_state(qpos, qvel)
    mujoco.mj_resetData(theirs.model, theirs.data)
    theirs.set_state(qpos, qvel)
    contacts = 0
    for _ in range(60):
        action = rng.uniform(-1, 1, 8).astype(np.float32)
        obs = ours.step(action)[0]
        theirs.do_simulation(action, 5)
        contacts += ours.data.ncon > 0
        np.testing.assert_allclose(obs, np.concatenate([theirs.data.qpos, theirs.data.qvel]), atol=2e-4)
    assert contacts > 10


def test_wall_boxes_cover_the_walls_and_nothing_else():
    for rows in MAPS.values():
        maze = Maze(rows)
        covered = np.zeros_like(np.array(maze.maze_map))
        for r0, c0, r1, c1 in maze.wall_boxes():
            covered[r0 : r1 + 1, c0 : c1 + 1] = 1
        assert np.array_equal(covered, maze.maze_map)
        for cell in maze.free:
            assert maze.cell_xy_to_rowcol(maze.cell_rowcol_to_xy(cell) + [1.9, -1.9]) == cell


# --- D4RL's files ---


def d4rl_arrays(rows=60, seed=0):
    """Two trajectories cut by time, one that succeeds, and a beginning: D4RL's layout with numbers to recognise."""
    rng = np.random.default_rng(seed)
    observations = rng.normal(size=(rows, 29)).astype(np.float32)
    observations[:, :2] = 0.01 * np.arange(rows)[:, None] + 8.0 * np.searchsorted([19, 39], np.arange(rows))[:, None]
    arrays = {
        "observations": observations,
        "actions": rng.uniform(-1, 1, (rows, 8)).astype(np.float32), "rewards": np.zeros(rows, np.float32),
        "terminals": np.zeros(rows, bool), "timeouts": np.zeros(rows, bool),
        "infos/goal": np.ones((rows, 2), np.float32), "infos/qpos": np.zeros((rows, 15), np.float32),
        "infos/qvel": np.zeros((rows, 14), np.float32),
    }  # fmt: skip
    arrays["timeouts"][[19, 39]] = True
    arrays["terminals"][49], arrays["rewards"][49] = True, 1.0
    return arrays


def write_hdf5(path, arrays):
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array


def reference_qlearning_dataset(arrays):
    """What D4RL's documentation says of `qlearning_dataset`, row by row."""
    rows = [i for i in range(len(arrays["rewards"]) - 1) if not arrays["timeouts"][i]]
    return {
        "observations": arrays["observations"][rows], "actions": arrays["actions"][rows],
        "next_observations": arrays["observations"][[i + 1 for i in rows]],
        "rewards": arrays["rewards"][rows], "terminals": arrays["terminals"][rows],
    }  # fmt: skip


def test_rows_and_trajectories_are_those_of_qlearning_dataset(tmp_path):
    arrays = d4rl_arrays()
    write_hdf5(tmp_path / "file.hdf5", arrays)
    data = load_dataset("antmaze-umaze-v2", path=tmp_path / "file.hdf5")
    for key, expected in reference_qlearning_dataset(arrays).items():
        np.testing.assert_array_equal(getattr(data, key), expected, err_msg=key)
    assert len(data) == 57 and not data.local and set(data.infos) == {"goal", "qpos", "qvel"}
    assert np.flatnonzero(data.timeouts).tolist() == [18, 37, 56]  # before each row left out
    assert np.flatnonzero(data.terminals).tolist() == [47]


def test_flags_that_mark_every_jump_are_believed_without_a_word(tmp_path, capfd):
    arrays = d4rl_arrays()
    arrays["observations"][50:, 0] += 8  # after the terminal row 49, as in a collection of ours
    write_hdf5(tmp_path / "file.hdf5", arrays)
    data = load_dataset("antmaze-umaze-v2", path=tmp_path / "file.hdf5")
    assert len(data) == 57 and np.flatnonzero(data.terminals).tolist() == [47] and capfd.readouterr().err == ""


@pytest.mark.parametrize("marked", [[], [19], [5, 39], [18, 38]])
def test_a_jump_that_no_flag_marks_is_the_end_of_a_trajectory(tmp_path, capfd, marked):
    arrays = d4rl_arrays()
    arrays["timeouts"][:] = False
    arrays["timeouts"][marked] = True
    write_hdf5(tmp_path / "file.hdf5", arrays)
    data = load_dataset("antmaze-umaze-v2", path=tmp_path / "file.hdf5")
    (line,) = capfd.readouterr().err.splitlines()
    unmarked = 2 - len({19, 39} & set(marked))
    counts = f"timeouts mark {len(marked)} rows, 2 rows jump by more than 1 m ({unmarked} of them unmarked)"
    assert line == f"{tmp_path / 'file.hdf5'}: {counts}; both end a trajectory"
    arrays["timeouts"][[19, 39]] = True  # the same file, whose flags say all of it
    write_hdf5(tmp_path / "flagged.hdf5", arrays)
    flagged = load_dataset("antmaze-umaze-v2", path=tmp_path / "flagged.hdf5")
    assert all(np.array_equal(getattr(data, name), getattr(flagged, name)) for name in ARRAYS)
    assert np.abs(data.next_observations[:, :2] - data.observations[:, :2]).max() < 0.02
    assert capfd.readouterr().err == ""


def test_the_jumps_of_a_download_are_told_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PARL_CACHE", str(tmp_path / "cache"))
    arrays = d4rl_arrays()
    arrays["timeouts"][:] = False
    write_hdf5(tmp_path / "file.hdf5", arrays)
    content = (tmp_path / "file.hdf5").read_bytes()
    with server(lambda handler, n: send(handler, content)) as (url, _):
        monkeypatch.setattr(antmaze, "URLS", (url,))
        load_dataset("antmaze-large-play-v2")
    assert capfd.readouterr().err.count("rows jump by more than") == 1


def test_rows_that_all_jump_are_no_dataset(tmp_path):
    arrays = d4rl_arrays()
    arrays["observations"][:, 0] = 5 * np.arange(60)
    arrays["terminals"][:] = False
    write_hdf5(tmp_path / "file.hdf5", arrays)
    with pytest.raises(TaskError, match="no row whose next row"):
        load_dataset("antmaze-umaze-v2", path=tmp_path / "file.hdf5")


def test_a_published_file_is_downloaded_checked_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PARL_CACHE", str(tmp_path / "cache"))
    write_hdf5(tmp_path / "file.hdf5", d4rl_arrays())
    content = (tmp_path / "file.hdf5").read_bytes()
    with server(lambda handler, n: send(handler, content)) as (url, ranges):
        monkeypatch.setattr(antmaze, "URLS", (url,))
        first = load_dataset("antmaze-large-play-v2")
        again = load_dataset("antmaze-large-play-v2", source="download")
    assert len(ranges) == 1 and first.sha256 == again.sha256 and not first.local
    assert "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse_fixed" in first.source
    next(pathlib.Path(tmp_path / "cache").rglob("*.hdf5")).write_bytes(content[:-1] + b"?")
    with pytest.raises(TaskError, match="changed on disk"):
        load_dataset("antmaze-large-play-v2")


def test_what_is_no_hdf5_file_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PARL_CACHE", str(tmp_path))
    with server(lambda handler, n: send(handler, b"<html>please log in</html>")) as (url, _):
        monkeypatch.setattr(antmaze, "URLS", (url,))
        with pytest.raises(TaskError, match="not a readable HDF5"):
            load_dataset("antmaze-umaze-v2", source="download")
    assert not list(tmp_path.rglob("*.hdf5")) and not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("bad", ["key", "size", "action", "truncated", "strings", "lengths", "missing", "text"])
def test_bad_files_end_in_one_line(tmp_path, bad):
    path, arrays = tmp_path / "file.hdf5", d4rl_arrays()
    if bad == "key":
        del arrays["timeouts"]
    if bad == "size":
        arrays["observations"] = arrays["observations"][:, :27]
    if bad == "action":
        arrays["actions"] = arrays["actions"][:, :6]
    if bad == "strings":
        arrays["rewards"] = np.array([b"one"] * 60)
    if bad == "lengths":
        arrays["rewards"] = arrays["rewards"][:-1]
    if bad != "missing":
        write_hdf5(path, arrays)
    if bad == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    if bad == "text":
        path.write_text("observations")
    expected = {
        "key": "'timeouts'",
        "size": r"needs \(N, 29\)",
        "action": r"needs \(N, 8\)",
        "strings": "must be a number",
        "lengths": "different or no length",
        "missing": "no dataset file",
    }
    with pytest.raises(TaskError, match=expected.get(bad, "not a readable HDF5 file, or it is truncated")) as error:
        load_dataset("antmaze-umaze-v2", path=path)
    assert "\n" not in str(error.value)


def test_an_npz_of_the_six_arrays_will_do_too(tmp_path):
    write_hdf5(tmp_path / "file.hdf5", d4rl_arrays())
    data = load_dataset("antmaze-umaze-v2", path=tmp_path / "file.hdf5")
    write_npz(tmp_path / "file.npz", data)
    same = load_dataset("antmaze-umaze-v2", path=tmp_path / "file.npz")
    assert all(np.array_equal(getattr(data, name), getattr(same, name)) for name in ARRAYS)


# --- the local collection ---


def test_without_network_data_is_collected_with_a_notice(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PARL_CACHE", str(tmp_path))
    monkeypatch.setattr(antmaze, "URLS", ("http://127.0.0.1:9",))
    data = load_dataset("antmaze-umaze-v2", size=3000)
    notice = capfd.readouterr().err
    assert "LOCAL DATA for antmaze-umaze-v2" in notice and "refused" in notice and "collecting" in notice
    assert data.local and "collected locally" in data.source and "rows jump" not in notice
    again = load_dataset("antmaze-umaze-v2", size=3000, source="local")
    notice = capfd.readouterr().err
    assert "LOCAL DATA" in notice and "collecting" not in notice  # said each time, collected once
    assert again.sha256 == data.sha256
    with pytest.raises(TaskError, match="refused"):
        load_dataset("antmaze-umaze-v2", size=3000, source="download")
    with pytest.raises(TaskError, match="shorter than two episodes"):
        load_dataset("antmaze-umaze-v2", size=100, source="local")
    monkeypatch.setenv("PARL_CACHE", "/proc/nowhere")
    with pytest.raises(TaskError, match="PARL_CACHE"):
        load_dataset("antmaze-umaze-v2", size=3000, source="local")


def test_two_processes_that_want_the_same_data_collect_it_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PARL_CACHE", str(tmp_path))
    # An executor, which lets its processes end: a Pool kills them by SIGTERM, and forked here they hold the handler of
    # any run that an earlier test made, which only takes note of it.
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        results = list(pool.map(_sha256_of_small_dataset, range(2)))
    assert results[0] == results[1] and len(list(tmp_path.rglob("*.hdf5"))) == 1


def _sha256_of_small_dataset(_):
    def alone(worker, jobs, description, processes=None):
        return [worker(*job) for job in jobs]

    antmaze.collect_in_chunks = alone
    return load_dataset("antmaze-umaze-v2", size=1500, source="local").sha256


def test_collected_rows_do_not_depend_on_the_cores():
    arrays = [antmaze.collect("antmaze-medium-diverse-v2", 12_000, seed=1, processes=n)[0] for n in (1, 2)]
    assert all(np.array_equal(arrays[0][key], arrays[1][key]) for key in arrays[0])
    other, _ = antmaze.collect("antmaze-medium-diverse-v2", 2_000, seed=2)
    assert not np.array_equal(other["actions"][:100], arrays[0]["actions"][:100])


def test_collected_rows_are_what_the_environment_does():
    arrays, quality = antmaze.collect("antmaze-umaze-v2", 20_020, seed=0)
    env = AntMaze(MAPS["umaze"])
    env.reset(seed=0)
    for row in range(0, 19_990, 1051):
        if arrays["timeouts"][row]:
            continue
        env.data.qacc_warmstart[:] = 0
        env.set_state(arrays["infos/qpos"][row].astype(float), arrays["infos/qvel"][row].astype(float))
        obs = env.step(arrays["actions"][row])[0]
        np.testing.assert_allclose(obs, arrays["observations"][row + 1], atol=2e-2)
    assert np.abs(arrays["actions"]).max() <= 1
    # the walker walks, and umaze's trajectories, sent to the goal's cell, get there and stay
    assert quality["goals_reached"] > 1 and quality["mean_speed"] > 0.4 and quality["fell"] <= 0.2
    assert quality["task_success"] >= 0.8 and arrays["terminals"].mean() > 0.1


@pytest.mark.parametrize("env_id", ["antmaze-umaze-v2", "antmaze-medium-diverse-v2"])
def test_a_file_has_one_goal_and_its_trajectories_run_on(env_id):
    """D4RL's: 1,001 steps whatever happens, and a row is rewarded by where it ends, by one goal for the whole file."""
    arrays, quality = antmaze.collect(env_id, 14_014, seed=3)  # two chunks
    assert np.array_equal(np.flatnonzero(arrays["timeouts"]), np.arange(1_000, 14_014, 1_001))
    goal = arrays["infos/goal"][0]
    assert (arrays["infos/goal"] == goal).all()
    maze = Maze(MAPS[env_id.split("-")[1]])
    noise = goal - maze.cell_rowcol_to_xy(maze.goal_cell)
    assert (noise >= 0).all() and (noise <= 1.5).all()
    inside = np.linalg.norm(arrays["observations"][1:, :2] - goal, axis=1) <= 0.5
    inner = ~arrays["timeouts"][:-1]  # whose next row is the same trajectory's
    assert np.array_equal(arrays["terminals"][:-1][inner], inside[inner])
    assert np.array_equal(arrays["rewards"], arrays["terminals"].astype(np.float32))
    if env_id == "antmaze-umaze-v2":
        both = arrays["terminals"][:-1] & arrays["terminals"][1:]
        assert both.sum() > 100 and quality["task_success"] > 0.5  # terminal rows one after the other
    assert quality["trajectories"] == 14


def test_a_goal_that_was_reached_is_left_after_a_rest(monkeypatch):
    goals = []
    monkeypatch.setattr(antmaze, "_waypoint", lambda rng, maze, xy, goal, following: goals.append(goal) or goal)
    monkeypatch.setattr(antmaze, "_draw_start_and_goal", lambda *_: ((3, 1), (3, 1)))  # no wall is in the way
    arrays, counts = antmaze.collect_chunk("antmaze-umaze-diverse-v2", 0, 0, 1_001)
    drawn = [i for i in range(1_001) if i == 0 or goals[i] is not goals[i - 1]]
    assert counts["reached"] >= len(drawn) - 1
    for first, after in zip(drawn, drawn[1:]):
        away = np.linalg.norm(arrays["observations"][first + 1 : after + 1, :2] - goals[first], axis=1) > 0.5
        assert after == first + np.argmin(away) + antmaze.REST + 1  # the step of the arrival, and so many more
    assert len(drawn) > 3


def test_play_and_diverse_draw_from_their_lists():
    rng = np.random.default_rng(0)
    maze = Maze(MAPS["large"])
    play = [antmaze._draw_start_and_goal(rng, maze, "large", ["play"]) for _ in range(2000)]
    assert {goal for _, goal in play} == set(antmaze.PLAY_GOALS["large"])
    assert {start for start, _ in play} == {maze.reset_cell, *antmaze.PLAY_GOALS["large"]}
    diverse = [antmaze._draw_start_and_goal(rng, maze, "large", ["diverse"]) for _ in range(4000)]
    assert {goal for _, goal in diverse} == set(maze.free) == {start for start, _ in diverse}
    assert all(start != goal for start, goal in play + diverse)
    assert antmaze._draw_start_and_goal(rng, maze, "large", []) == ((1, 1), (7, 9))
    for name, goals in antmaze.PLAY_GOALS.items():
        maze = Maze(MAPS[name])
        assert set(goals) <= set(maze.free) and maze.goal_cell in goals  # or no row would be rewarded


def test_waypoints_lead_along_a_shortest_way():
    rng, maze = np.random.default_rng(0), Maze(MAPS["large"])
    goal, xy, cells = maze.cell_rowcol_to_xy((7, 9)), np.zeros(2), [(1, 1)]
    following = antmaze._ways_to(maze, (7, 9))
    assert set(following) == set(maze.free)
    while cells[-1] != (7, 9):
        x, y = antmaze._waypoint(rng, maze, xy, goal, following)
        assert (x, y) != tuple(antmaze._waypoint(rng, maze, xy, goal, following)) or cells[-1] == (7, 8)  # drawn anew
        cells.append(maze.cell_xy_to_rowcol((x, y)))
        xy = maze.cell_rowcol_to_xy(cells[-1])
    steps = [abs(a[0] - b[0]) + abs(a[1] - b[1]) for a, b in zip(cells, cells[1:])]
    assert set(steps) == {1} and len(steps) == 14 and set(cells) <= set(maze.free)
    # as soon as the ant is over a border, it heads for the next cell but one
    before, after = (np.array([0.0, y]) for y in (1.99, 2.01))
    cell_ahead = [maze.cell_xy_to_rowcol(antmaze._waypoint(rng, maze, xy, goal, following)) for xy in (before, after)]
    assert cell_ahead[0] == following[(1, 1)] and cell_ahead[1] == following[following[(1, 1)]]


def test_a_missing_walker_is_named(tmp_path):
    with pytest.raises(TaskError, match="train_ant_walker"):
        load_walker(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK nonsense")
    with pytest.raises(TaskError, match="train_ant_walker"):
        load_walker(tmp_path / "bad.npz")
    assert antmaze.WEIGHTS.stat().st_size < 2**20
