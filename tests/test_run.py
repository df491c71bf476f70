"""benchmarks/run.py: what is run, skipped, resumed and refused with toy scripts, every suite against the real flags."""

import dataclasses
import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from benchmarks import run, suites
from benchmarks.harness.runs import lock

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What the suites name and the scripts do not have yet. A test tells when one is there: take it out then.
AWAITED = {"calvin"}

# A script in small: it writes a run's folder, checkpoints, resumes, and does what its flag --how says at its third step
TOY = """
import argparse, csv, fcntl, json, os, pathlib, signal, sys, time

if __name__ != "__main__":  # what the runner reads
    from dataclasses import dataclass

    from benchmarks.harness.cli import RunArgs

    @dataclass
    class Args(RunArgs):
        steps: int = 5
        pause: float = 0.0
        how: str = ""

    PRESETS = {"default": {}, "pointmaze": {}}
else:
    parser = argparse.ArgumentParser()
    for name, kind in (("env-id", str), ("seed", int), ("runs", str), ("resume", str), ("threads", int)):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--how", default="")
    args = parser.parse_args()
    if args.resume:
        folder = pathlib.Path(args.resume)
        for name, value in json.loads((folder / "config.json").read_text()).items():
            setattr(args, name, value)
    else:
        folder = pathlib.Path(args.runs) / f"{args.env_id}__toy__{args.seed}__{os.getpid()}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(vars(args)))
        (folder / "metrics.csv").write_text("phase,step,seconds,success_rate\\n")
    held = open(folder / ".lock", "a")
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    checkpoint, stopped = folder / "checkpoint.pt", []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    print(f"cores {len(os.sched_getaffinity(0))}, threads {os.environ['OMP_NUM_THREADS']}")
    for step in range(first, args.steps):
        marked = folder.parent / "marked"
        if step == 3 and args.how and not marked.exists():
            marked.touch()
            if args.how == "fails":
                sys.exit("error: it went wrong")
            os.kill(os.getpid() if args.how == "dies" else os.getppid(), signal.SIGKILL)
            time.sleep(5)
        if stopped:
            sys.exit(128 + signal.SIGTERM)
        time.sleep(args.pause)
        with open(folder / "metrics.csv", "a") as file:
            file.write(f"online,{step},{step / 10},{step / args.steps}\\n")
        checkpoint.write_text(str(step + 1))
    (folder / "summary.png").touch()
"""


@pytest.fixture()
def toy(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    yield path
    run._loaded.pop(str(path), None)
    run._variants.clear()
    sys.modules.pop("toy", None)


def options(toy, tmp_path, *flags, **more):
    return run.Options(scripts=(str(toy),), flags=flags, results=tmp_path / "results", **more)


def start(opts):
    """The runs, and what became of them."""
    jobs, _ = run.jobs_of(opts)
    state = run.run_all(jobs, opts)
    return [opts.results / job.name for job in jobs], state


def steps_of(folder):
    (metrics,) = folder.glob("*/metrics.csv")
    return [line.split(",")[1] for line in metrics.read_text().splitlines()[1:]]


def test_runs_fill_the_slots_and_are_skipped_when_finished(toy, tmp_path, capsys):
    opts = options(toy, tmp_path, "pause=0.1", seeds=(1, 2, 3), slots=2)
    folders, state = start(opts)
    assert len(state.finished) == 3 and not state.failed and state.skipped == 0
    assert [steps_of(folder) for folder in folders] == [list("01234")] * 3
    assert folders[0].name == "pointmaze-medium-v0__toy__pause=0.1__seed1"
    assert "cores 1, threads 1" in (folders[0] / "log.txt").read_text()  # pinned
    again = start(dataclasses.replace(opts, seeds=(1, 2, 3, 4)))[1]
    assert (again.skipped, len(again.finished)) == (3, 4)
    assert "finished: pointmaze-medium-v0__toy__pause=0.1__seed4, success 0.8" in capsys.readouterr().out
    assert (folders[0] / "log.txt").read_text().count("\n+ ") == 1


def test_a_flag_with_several_values_is_a_run_for_each_and_a_run_has_one_name(toy, tmp_path):
    jobs, _ = run.jobs_of(options(toy, tmp_path, "steps=5,6", "pause=0.0,1"))
    assert [(job.label, job.name.split("__")[2]) for job in jobs] == [
        ("toy steps=5 pause=0.0", "preset"), ("toy steps=5 pause=1", "pause=1.0"),
        ("toy steps=6 pause=0.0", "steps=6"), ("toy steps=6 pause=1", "pause=1.0,steps=6"),
    ]  # fmt: skip
    assert run.argv_of((("plain", "True"), ("compile", "no"), ("sparse-reward", "False"), ("x", "1 2"))) == (
        "--plain --compile no --no-sparse-reward --x 1 2".split()
    )
    long = run.shortened("x" * 200)
    assert len(long) == 169 and long != run.shortened("x" * 201)


@pytest.mark.parametrize("how", ["dies", "fails"])
def test_a_run_that_is_killed_goes_on_and_one_that_fails_is_listed(how, toy, tmp_path, capsys):
    opts = options(toy, tmp_path, f"how={how}")
    (folder,), state = start(opts)
    log = (folder / "log.txt").read_text()
    if how == "dies":
        assert len(state.finished) == 1 and list(state.restarts.values()) == [1]
        assert log.count("--resume") == 1 and steps_of(folder) == list("01234")
    else:
        assert list(state.failed.values()) == ["error: it went wrong"]
        assert "failed: " in capsys.readouterr().out
        assert len(start(opts)[1].finished) == 1  # the next call tries again, from its checkpoint
        assert steps_of(folder) == list("01234")


def test_no_more_restarts_than_allowed(toy, tmp_path):
    (folder,), state = start(options(toy, tmp_path, "how=dies", restarts=0))
    assert list(state.failed.values()) == ["ended by signal 9, 0 times resumed"]


def test_an_interrupted_suite_continues_where_it_was(toy, tmp_path):
    command = [sys.executable, "-m", "benchmarks.run", "--scripts", str(toy), "--seeds", "1", "2", "--slots", "1",
               "--flags", "pause=0.2", "--results", str(tmp_path / "results")]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first = tmp_path / "results/pointmaze-medium-v0__toy__pause=0.2__seed1"
    while not list(first.glob("*/checkpoint.pt")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 143 and "2 are to be done: the same command goes on" in output, output
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "2 of 2 runs finished (0 before), 0 failed" in done.stdout, done.stdout
    assert steps_of(first) == list("01234") and (first / "log.txt").read_text().count("--resume") == 1


def test_runs_stop_when_their_runner_dies(toy, tmp_path):
    command = [sys.executable, "-m", "benchmarks.run", "--scripts", str(toy), "--slots", "1",
               "--flags", "pause=0.1", "steps=300", "--results", str(tmp_path / "results")]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("results/*/*/checkpoint.pt")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    (folder,) = tmp_path.glob("results/*/*/")
    deadline = time.monotonic() + 10
    while run.held(folder):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(steps_of(folder.parent)) < 300


@pytest.fixture()
def three_cores(monkeypatch):
    """Three cores to pin to, under numbers that no other test's runner has."""
    cores = [10**7 + 10 * os.getpid() + i for i in range(3)]
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda process: set(cores))
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 0)
    return cores


def test_a_second_runner_pins_to_cores_that_the_first_left(three_cores, toy, tmp_path):
    a, b, c = three_cores

    def cores_of(runner):
        return [cores for _, cores in runner.slots]

    first = run.Local(options(toy, tmp_path, slots=1, threads=2))
    assert cores_of(first) == [{a, b}] and "another runner" not in first.words
    second = run.Local(options(toy, tmp_path))  # as many as are left
    assert cores_of(second) == [{c}] and "another runner" not in second.words
    third = run.Local(options(toy, tmp_path, slots=2))
    assert cores_of(third) == [{a}, {b}] and third.words.endswith(f"sharing cores {a}, {b} with another runner")
    first.close()
    fourth = run.Local(options(toy, tmp_path, slots=3))  # more than are left: its own first
    assert cores_of(fourth) == [{a}, {b}, {c}] and fourth.words.endswith(f"sharing cores {c} with another runner")
    for runner in (second, third, fourth):
        runner.close()
    assert list(run.claim(three_cores)) == three_cores


def test_the_cores_of_a_runner_that_was_killed_are_free(three_cores):
    def hold(ready):
        held = run.claim(three_cores)
        ready.set()
        time.sleep(60 if held else 0)

    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=hold, args=(ready := fork.Event(),))
    process.start()
    assert ready.wait(20) and not run.claim(three_cores)
    process.kill()
    process.join()
    assert list(run.claim(three_cores)) == three_cores


def test_a_dry_run_holds_no_cores_while_it_measures(three_cores, toy, tmp_path, monkeypatch):
    free = []
    monkeypatch.setattr(run, "estimate", lambda *_: free.extend(run.claim(three_cores)) or (1.0, 1.0, 1.0, "as said"))
    run.main(["--scripts", str(toy), "--results", str(tmp_path / "results"), "--dry-run"])
    assert free == three_cores


def test_two_suites_share_a_folder_and_wait_for_each_other(toy, tmp_path):
    """A job that another runner holds is not started twice; when that one has finished it, it counts as finished."""
    opts = options(toy, tmp_path, slots=1)
    (job,), _ = run.jobs_of(opts)
    folder = opts.results / job.name
    folder.mkdir(parents=True)
    other, state = lock(folder), run.State([job])
    assert not run.take(job, state, folder) and state.waiting == [job]
    inner = folder / "a-run"
    inner.mkdir()
    (inner / "summary.png").touch()
    other.close()
    assert not run.take(job, state, folder) and state.finished == [job] and not state.waiting
    assert not run.held(folder)


def test_the_table_shows_what_runs(toy, tmp_path):
    opts = options(toy, tmp_path)
    (job,), _ = run.jobs_of(opts)
    inner = opts.results / job.name / "a-run"
    inner.mkdir(parents=True)
    (inner / "metrics.csv").write_text("phase,step,seconds,success_rate\noffline,3,1.0,0.25\noffline,4,2.0,\n")
    (inner.parent / "log.txt").write_text("a\n\rhalf 50%\rall 100%\r\n")
    state, workers = run.State([], since={job: time.monotonic()}), run.Local(opts)
    workers.running[job] = None
    head, line, last = run.Table(state, workers, opts.results).lines()
    assert line.split()[:4] == ["offline", "4", "25", "%"] and line.endswith(job.name)
    assert last == "0 finished, 1 running, 0 waiting, 0 failed"
    assert run.last_line(inner.parent / "log.txt") == "all 100%"


# --- RAY ---
@pytest.mark.parametrize("how", ["kills its worker"])
def test_ray_resumes_what_a_dead_worker_left(how, toy, tmp_path, monkeypatch):
    """On Ray: two runs, one of which kills with SIGKILL the worker that started it, and one that fails."""
    pytest.importorskip("ray")
    for name in ("RAY_raylet_start_wait_time_s", "RAY_gcs_rpc_server_reconnect_timeout_s"):
        monkeypatch.setenv(name, "120")  # a busy machine starts it slowly
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    opts = options(toy, tmp_path, "how=fails,kills", ray="local", slots=2)
    folders, state = start(opts)
    failed, killed = folders
    assert [job.name for job in state.finished] == [killed.name]
    assert list(state.failed.values()) == ["error: it went wrong"]
    assert list(state.restarts.values()) == [1] and steps_of(killed) == list("01234")
    assert (killed / "log.txt").read_text().count("--resume") == 1


def test_ray_shows_what_it_queues_and_refuses_what_no_machine_has(toy, tmp_path, monkeypatch, capsys):
    """On Ray: two runs that want all cores each, of which one waits; and one that wants GPUs which are not there."""
    pytest.importorskip("ray")
    for name in ("RAY_raylet_start_wait_time_s", "RAY_gcs_rpc_server_reconnect_timeout_s"):
        monkeypatch.setenv(name, "120")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    opts = options(toy, tmp_path, "pause=0.3", seeds=(1, 2), ray="local", gpus=0.0, threads=os.cpu_count())
    shown = []
    monkeypatch.setattr(run.Table, "draw", lambda table: shown.append(table.lines()))
    folders, state = start(opts)
    assert len(state.finished) == 2
    one_each = [lines for lines in shown if lines[-1].startswith("0 finished, 1 running, 0 waiting, 1 queued in Ray")]
    assert one_each and all(len(lines) == 3 for lines in one_each)  # the heading, the one that runs, and the counts
    assert max(int(lines[-1].split(" running")[0].split()[-1]) for lines in shown) == 1  # never two
    assert f"queued, to be started: {folders[1].name}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no machine of the cluster has 1 CPUs and 99 GPUs for a run, there are: "):
        start(dataclasses.replace(opts, gpus=99.0, threads=1, seeds=(3,)))


def test_a_dead_address_of_ray_is_one_line(toy, tmp_path):
    pytest.importorskip("ray")
    with socket.socket() as free:  # a port at which nobody answers
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        began = time.monotonic()
        for text in (address, f"ray://{address}"):
            with pytest.raises(SystemExit, match=rf"^error: --ray {text} cannot be reached .*ray start --head$"):
                start(options(toy, tmp_path, ray=text))
        assert time.monotonic() - began < 15


def test_without_ray_there_is_one_line(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match="pip install -r requirements-cluster.txt"):
        start(options(toy, tmp_path, ray="local"))


# --- SUITES ---
@pytest.mark.parametrize("size", ["laptop", "paper"])
@pytest.mark.parametrize("name", suites.SUITES)
def test_every_suite_parses_against_the_real_flags(name, size):
    jobs, missing = run.jobs_of(run.Options(suite=name, size=size))  # parses each
    names = [word.rstrip(",") for line in missing for word in line.split()]
    absent = {word for word in names if word.startswith(("--", "benchmarks/")) or word == "calvin"}
    assert absent <= AWAITED and bool(missing) == bool(absent)
    assert jobs or missing
    for job in jobs:
        assert job.name == run.Job("x", job.script, job.task, job.seed, job.flags).name


@pytest.mark.parametrize("name", ["table1", "figure3", "figure18"])
def test_dqls_eta_is_each_tasks_own(name):
    """As PA-RL's appendix B.2 has it (the paper's text: "We chose eta = 11 for large-diverse, ..."), and a flag's."""
    tasks = tuple(task for task in suites.DQL_ETA if task not in AWAITED)
    jobs, _ = run.jobs_of(run.Options(suite=name, size="paper", tasks=tasks, seeds=(1,)))
    found = {job.task: run.resolved(job.script, job.task, job.flags).eta for job in jobs if job.label == "DQL"}
    maze = {"medium-play": 7, "medium-diverse": 9, "large-play": 15, "large-diverse": 11}
    kitchen = dict.fromkeys(("complete", "partial", "mixed"), 0.005)
    assert found == {f"antmaze-{k}-v2": v for k, v in maze.items()} | {f"kitchen-{k}-v2": v for k, v in kitchen.items()}
    assert not [job for job in jobs if job.label != "DQL" and "eta" in dict(job.flags)]
    asked = run.Options(suite=name, size="paper", tasks=tasks[:1], seeds=(1,), only="DQL", flags=("eta=3",))
    assert [run.resolved(job.script, job.task, job.flags).eta for job in run.jobs_of(asked)[0]] == [3]
    laptop, _ = run.jobs_of(run.Options(suite=name, only="DQL", seeds=(1,)))
    assert [job.name.split("__")[2] for job in laptop] == ["preset"]


def test_what_is_awaited_is_not_there():
    for name in AWAITED:
        if name.endswith(".py"):
            assert not (ROOT / name).is_file(), f"{name} is there: take it out of AWAITED"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--suite table9", ("table9", "table1, ")),
        ("--suite table4 --tasks pointmaze-mediun-v0", ("pointmaze-mediun-v0", "did you mean pointmaze-medium-v0")),
        ("--suite table4 --only nothing", ("nothing",)),
        ("--suite table4 --scripts parl_diffusion_calql.py", ("one of the two",)),
        ("--scripts nowhere.py", ("no script nowhere.py",)),
        ("--scripts tests/conftest.py", ("is no script",)),
        ("--scripts parl_diffusion_calql.py --flags num-sample=4", ("no --num-sample",)),
        ("--scripts parl_diffusion_calql.py --flags num-samples", ("name=value",)),
        ("--scripts parl_diffusion_calql.py --flags num-samples=many", ("--num-samples", "many")),
        ("--scripts parl_diffusion_calql.py --flags num-keep=9", ("--num-keep 9", "at most --num-samples (8)")),
        ("--scripts parl_diffusion_calql.py --slots -1", ("--slots",)),
        ("--scripts parl_diffusion_calql.py --slots 99999", ("--slots",)),
        ("--scripts parl_diffusion_calql.py --seeds 1 -1", ("--seeds -1", "at least 0")),
        ("--suite table1 --seeds 4294967296", ("--seeds 4294967296", "at most 4294967295")),
        ("--scripts parl_diffusion_calql.py --flags seed=3", ("--flags seed", "--seeds")),
        ("--scripts parl_diffusion_calql.py --flags env_id=pointmaze-medium-v0", ("--flags env-id", "--tasks")),
        ("--suite table1 --flags cql-actions=3", ("--flags", "idql.py has no --cql-actions", "--only")),
        ("--suite table1 --flags nonsense=3 --dry-run", ("parl_diffusion_calql.py has no --nonsense",)),
    ],
)
def test_what_cannot_be_run_is_one_line(flags, words, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run.main([*flags.split(), "--results", str(tmp_path / "results")])
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message and all(word in message for word in words), message
    assert not (tmp_path / "results").exists()


def test_a_flag_that_only_some_methods_have_is_for_those_named_with_only():
    jobs, missing = run.jobs_of(run.Options(suite="table1", flags=("cql-actions=3",), only="Cal-QL"))
    assert {job.label for job in jobs} == {"PA-RL + Cal-QL", "Cal-QL (Gaussian)"} and not missing
    assert all(("cql-actions", "3") in job.flags for job in jobs)


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_place_that_cannot_hold_the_runs_is_one_line(dry, toy, tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/results"):
        with pytest.raises(SystemExit, match=r"^error: --results .*file is a file; name a folder$"):
            run.main(["--scripts", str(toy), "--results", str(tmp_path / place), *dry])


def test_a_place_that_cannot_be_written_to_is_one_line(toy, tmp_path, monkeypatch):
    def refuse(path, **how):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run.pathlib.Path, "mkdir", refuse)  # root, who may run the tests, may write anywhere
    with pytest.raises(SystemExit, match=r"^error: --results .*Permission denied"):
        run.main(["--scripts", str(toy), "--results", str(tmp_path / "results")])
    monkeypatch.setattr(run.os, "access", lambda path, mode: False)
    with pytest.raises(SystemExit, match=r"^error: --results .*cannot be written to"):
        run.main(["--scripts", str(toy), "--results", str(tmp_path / "results"), "--dry-run"])


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "holds no metrics.csv"), (b"phase,seconds\nonline,1", "truncated"), (b"phase,seconds\na,x\n", "no number")],
)
def test_an_estimate_from_a_damaged_run_is_one_line(content, words, toy, tmp_path):
    opts = options(toy, tmp_path)
    (finished,), _ = start(opts)
    (metrics,) = finished.glob("*/metrics.csv")
    metrics.unlink() if content is None else metrics.write_bytes(content)
    with pytest.raises(SystemExit, match=words) as stopped:
        run.main(["--scripts", str(toy), "--results", str(opts.results), "--seeds", "2", "--dry-run"])
    assert "\n" not in str(stopped.value)


def test_a_row_that_is_being_written_is_not_read_yet(tmp_path):
    (tmp_path / "a-run").mkdir()
    (tmp_path / "a-run/metrics.csv").write_text("phase,step,success_rate\nonline,3,0.25\nonline,4,0.5e-")
    assert run.progress_of(tmp_path) == {"phase": "online", "step": "3", "seconds": "", "success": "0.25"}


def test_an_estimate_counts_all_steps_of_a_chunk(monkeypatch):
    counted = []
    monkeypatch.setattr(run, "rates_of", lambda script, args, sizes: {"cloning": 1.0, "critic": 1.0})
    monkeypatch.setattr(run, "phase_flops", lambda args, *sizes: counted.append(sizes) or {"cloning": 1, "online": 1})
    for flags in ((), (("chunk", "5"),)):
        run.by_arithmetic(run.Job("a", "parl_diffusion_calql.py", "pointmaze-medium-v0", 1, flags), {})
    assert [action_dim for _, action_dim, *_ in counted] == [2, 10]


def test_an_estimate_is_quick_at_the_papers_sizes(monkeypatch):
    """A critic update of minutes is measured on a few of its states, and once for all tasks of one size."""
    from benchmarks import speed

    batches = []
    monkeypatch.setattr(speed, "build", lambda script, args, *sizes: batches.append(args.batch_size) or stop())
    task = "antmaze-large-diverse-v2"
    for script, expected in (("parl_diffusion_calql.py", 16), ("parl_diffusion_iql.py", 256)):
        with pytest.raises(KeyboardInterrupt):
            run.rates_of(run.load(script), run.resolved(script, task, ()), (29, 8))
        assert batches.pop() == expected
    cache, measured = {}, []
    monkeypatch.setattr(run, "rates_of", lambda *rest: measured.append(rest) or {"cloning": 1.0, "critic": 1.0})
    for task in ("antmaze-large-diverse-v2", "antmaze-medium-play-v2"):
        run.by_arithmetic(run.Job("a", "parl_diffusion_calql.py", task, 1, ()), cache)
    assert len(measured) == 1
    arm = run.Job("a", "parl_openvla_real.py", "widowx-sim-vegetable-v0", 1, ())
    assert run.by_arithmetic(arm, cache)[3] == "unknown until one has run" and len(measured) == 1


def stop():
    raise KeyboardInterrupt


def test_a_dry_run_tells_commands_time_and_disk(tmp_path, capsys):
    run.main(["--suite", "table4", "--dry-run", "--results", str(tmp_path / "r"), "--slots", "2", "--only", "local"])
    out = capsys.readouterr().out
    command = "python parl_diffusion_calql.py --env-id pointmaze-medium-v0 --seed 1 --num-gradient-steps 0 --runs "
    assert out.startswith(command) and "by arithmetic, at this machine's rate" in out
    assert "5 runs to do, 0 finished; " in out and "on 2 slots of 1 thread" in out and not (tmp_path / "r").exists()


def test_a_finished_run_tells_what_the_next_will_take(toy, tmp_path, capsys):
    start(options(toy, tmp_path))
    capsys.readouterr()
    common = ["--scripts", str(toy), "--results", str(tmp_path / "results"), "--dry-run"]
    run.main([*common, "--seeds", "1", "2"])
    out = capsys.readouterr().out
    assert "as 1 finished" in out and "1 runs to do, 1 finished" in out and out.count("python ") == 1
    run.main([*common, "--flags", "steps=7"])
    assert "unknown until one has run" in capsys.readouterr().out


def test_what_a_job_is_run_with(tmp_path):
    job = run.Job("IDQL", "benchmarks/baselines/idql.py", "pointmaze-medium-v0", 3, (("num-samples", "4"),))
    command = run.command_of(job, tmp_path, 2)
    assert command[1:3] == ["-m", "benchmarks.baselines.idql"] and command[-2:] == ["--threads", "2"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a/checkpoint.pt").touch()
    assert run.command_of(job, tmp_path, 2)[3:5] == ["--resume", str(tmp_path / "a")]
    assert os.path.isabs(run.command_of(dataclasses.replace(job, script="parl_diffusion_iql.py"), tmp_path, 1)[1])


def test_a_runs_gpus_are_among_those_that_were_given(monkeypatch, toy, tmp_path):
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 2)
    for given, expected in (("2,3", ["2", "3"]), (None, ["0", "1"])):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if given:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        slots = run.Local(options(toy, tmp_path, slots=2)).slots
        assert [environment["CUDA_VISIBLE_DEVICES"] for environment, _ in slots] == expected
