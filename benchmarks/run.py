"""Scripts x tasks x seeds x flags, or a table of the paper by name: here or on a Ray cluster; goes on where it stopped.

    python -m benchmarks.run --suite table1 --dry-run                      # the commands, their time and disk
    python -m benchmarks.run --suite table1 --results results              # on all cores or GPUs of this machine
    python -m benchmarks.run --suite table1 --size paper --results /shared/results --ray ADDRESS --gpus 1
    python -m benchmarks.run --scripts parl_diffusion_calql.py --seeds 1 2 3 --flags num-samples=4,8 num-keep=2

Suites are in `benchmarks/suites.py`. A flag with several values, separated by commas, is a run for each (of several
such flags, for each combination). A run has a folder of its own in RESULTS, named by task, script, what its flags
change and seed: so any number of suites share one folder, and what two of them have in common is run once. There
`log.txt` holds its output, and the script makes the run's folder. A run that is finished (it has its summary.png) is
skipped; one that has a checkpoint is resumed; one that another process holds is waited for. A run that was ended by a
signal, or whose machine went away, is resumed up to --restarts times; one that failed is listed with the last line of
its log, and tried again by the next call. Ctrl-C or SIGTERM: all runs save and stop, and the same command goes on.

Locally there is one process for each slot, a GPU or --threads cores, to which it is pinned; a second runner on the same
machine takes the cores that the first one left, or says that it shares them. With --ray each run is a
task with its declared --threads CPUs and --gpus GPUs; RESULTS and this checkout must be in the same place on every
machine (a shared file system), and `pip install -r requirements-cluster.txt` on all. `--ray local` starts Ray here.
Ray sends its tasks as pickles over its own, token-protected connections; this program reads none from disk or network.
"""

import contextlib
import csv
import ctypes
import dataclasses
import difflib
import importlib
import importlib.util
import io
import itertools
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field, fields
from typing import Literal

import gymnasium as gym
import torch
import tyro

from benchmarks.cost import duration, phase_flops
from benchmarks.harness.cli import BOUNDS, available_cores, fail, flag, parse_args
from benchmarks.harness.runs import lock
from benchmarks.suites import SUITES
from benchmarks.vla.workers import check_ray

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIGNALLED = {128 + signal.SIGTERM, 128 + signal.SIGUSR1}  # exit codes of a script that saved and stopped
OURS = {
    "env-id": "name tasks with --tasks", "seed": "name seeds with --seeds", "runs": "name a folder with --results",
    "resume": "it resumes what is in --results by itself", "threads": "say how many with --threads",
}  # fmt: skip
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass
class Options:
    """Run scripts on tasks with seeds and flags, or a suite; finished runs are skipped, stopped ones continued."""

    suite: str = ""  # a table or figure of the paper, see benchmarks/suites.py
    size: Literal["laptop", "paper"] = "laptop"  # of the suite
    scripts: tuple[str, ...] = ()  # instead of a suite: their files
    tasks: tuple[str, ...] = ()  # ids; empty: the suite's, or the default task
    seeds: tuple[int, ...] = ()  # empty: the suite's, or 1
    flags: tuple[str, ...] = ()  # of the scripts, as name=value or name=value,value
    results: pathlib.Path = pathlib.Path("results")  # folder of all runs, shared by any number of suites
    slots: int = 0  # runs at a time; 0: one for each GPU, or for each --threads cores; with --ray: as many as fit
    threads: int = 0  # CPU threads of a run; 0: 1 on a CPU, an equal share of the cores on GPUs
    gpus: float = -1.0  # GPUs of a run with --ray, may be a fraction; -1: 1 where this machine has any
    ray: str = ""  # address of a Ray cluster, or local
    restarts: int = 3  # how often a run that was ended by a signal, or lost with its machine, is resumed
    dry_run: bool = False  # print the commands, what they take in time and disk, and end
    only: str = ""  # of a suite: the method of this name; where none has it, those whose names hold this text


# --- WHAT IS RUN ---
@dataclass(frozen=True)
class Job:
    """One run."""

    label: str  # its row in a table
    script: str  # file, from the repository's root or absolute
    task: str
    seed: int
    flags: tuple[tuple[str, str], ...] = ()  # name without dashes, value

    @property
    def name(self) -> str:
        """Its folder: of the flags those that change something."""
        how = ",".join(f"{name}={value}" for name, value in variant(self.script, self.task, self.flags)) or "preset"
        safe = re.sub(r"[^\w.=,+-]+", "_", f"{self.task}__{pathlib.Path(self.script).stem}__{how}")
        return f"{shortened(safe)}__seed{self.seed}"

    def argv(self) -> list[str]:
        """The script's command line, but for where it writes."""
        return ["--env-id", self.task, "--seed", str(self.seed), *argv_of(self.flags)]


def shortened(text: str, longest: int = 160) -> str:
    """A name for a folder: of a long one its beginning and a sum of all of it."""
    import zlib

    return text if len(text) <= longest else f"{text[:longest]}~{zlib.crc32(text.encode()):08x}"


def argv_of(flags) -> list[str]:
    """name=value pairs as a command line; True and False as --name and --no-name."""
    argv = []
    for name, value in flags:
        switch = {"True": [flag(name)], "False": [flag("no-" + name)]}.get(value)
        argv += switch or [flag(name), *shlex.split(value)]
    return argv


def pairs(texts) -> tuple[tuple[str, str], ...]:
    """name=value texts taken apart; names with dashes, as on a command line."""
    found = [text.partition("=") for text in texts]
    for text, (name, sign, value) in zip(texts, found):
        if not (name and sign and value):
            fail(f"--flags {text}: write each as name=value, such as num-samples=4 or num-samples=4,8")
    names = [name.lstrip("-").replace("_", "-") for name, *_ in found]
    for name in names:
        if name in OURS:
            fail(f"--flags {name}=...: the runner sets --{name} of every run; {OURS[name]}")
    return tuple((name, value) for name, (*_, value) in zip(names, found))


_loaded: dict[str, object] = {}


def load(script: str):
    """A script as a module, by its file from the repository's root or absolute; None where there is no such file."""
    path = (ROOT / script).resolve()
    if script in _loaded or not path.is_file():
        return _loaded.get(script)
    if path.is_relative_to(ROOT):
        if str(ROOT) not in sys.path:
            sys.path.insert(0, str(ROOT))
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    else:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    if not (hasattr(module, "Args") and hasattr(module, "PRESETS")):
        fail(f"{script} is no script: it has no Args and PRESETS")
    _loaded[script] = module
    return module


def flags_missing(script: str, flags) -> list[str]:
    """Of the flags those that the script does not have."""
    known = {f.name.replace("_", "-") for f in fields(load(script).Args)}
    return [name for name, _ in flags if name not in known]


def resolved(script: str, task: str, flags):
    """The script's Args for these flags, as it will resolve them; what it would refuse ends in one line here."""
    module, said = load(script), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return parse_args(module.Args, module.PRESETS, ["--env-id", task, *argv_of(flags)])
    except SystemExit as stopped:
        box = " ".join(re.sub(r"[^\x20-\x7e]|-{4,}", " ", said.getvalue()).split())  # tyro draws one
        box = box.split("Argument helptext")[0].replace("| ", "").strip(" |+")
        why = stopped.code.removeprefix("error: ") if isinstance(stopped.code, str) else box[:300]
        fail(f"{script} {shlex.join(argv_of(flags))}: {why}")


_variants: dict[tuple, tuple] = {}


def variant(script: str, task: str, flags) -> tuple[tuple[str, str], ...]:
    """Of the flags those that change something against the preset, sorted; the preset itself stays, if one is given.

    So a run has one name, however it was asked for, and a flag that a script gets later changes no name.
    """
    if (script, task, flags) not in _variants:
        preset = tuple(pair for pair in flags if pair[0] == "preset" and pair[1] != "auto")
        with_flags, without = resolved(script, task, flags), resolved(script, task, preset)
        ours = {n for n, _ in flags} - {"preset", "runs", "threads"}
        values = {n: getattr(with_flags, n.replace("-", "_")) for n in ours}
        changed = {n: v for n, v in values.items() if v != getattr(without, n.replace("-", "_"))}
        texts = {n: "+".join(map(str, v)) if isinstance(v, tuple) else str(v) for n, v in changed.items()}
        _variants[script, task, flags] = (*preset, *sorted(texts.items()))
    return _variants[script, task, flags]


def jobs_of(options: Options) -> tuple[list[Job], list[str]]:
    """The runs that are asked for, in order, and one line for each part that does not exist yet."""
    from benchmarks.tasks import env_ids

    if bool(options.suite) == bool(options.scripts):
        fail("name a --suite, or --scripts, one of the two")
    known, missing, flags, of_tasks = env_ids(), [], pairs(options.flags), {}
    for task in options.tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=3, cutoff=0.4)
            fail(f"unknown task {task!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    for seed in options.seeds:
        least, most = BOUNDS["seed"]
        if not least <= seed <= most:
            fail(f"--seeds {seed}: a seed must be at least {least} and at most {most}")
    if options.suite:
        if options.suite not in SUITES:
            fail(f"unknown suite {options.suite!r}; there are {', '.join(SUITES)}")
        suite = SUITES[options.suite]
        of_tasks = suite.get("task_flags", {})
        size = suite[options.size]
        methods = {label: text.split() for label, text in size.get("methods", suite.get("methods")).items()}
        named = [options.only] if options.only in methods else [label for label in methods if options.only in label]
        methods = {label: (methods[label][0], pairs(methods[label][1:])) for label in named}
        if not methods:
            fail(f"{options.suite} has no method with {options.only!r} in its name")
        tasks, seeds = options.tasks or size["tasks"], options.seeds or range(1, size["seeds"] + 1)
        # What the suite says, a script may not have yet; what the user says, it must
        for script, _ in methods.values():
            if load(script) and (unknown := flags_missing(script, flags)):
                fail(f"--flags: {script} has no {' '.join(map(flag, unknown))}; leave that out, or name with --only "
                     f"methods of {options.suite} that have it")  # fmt: skip
        flags = pairs(size.get("flags", "").split()) + flags
    else:
        files = {file: file if file.endswith(".py") else f"{file}.py" for file in options.scripts}
        methods = {pathlib.Path(file).stem: (file, ()) for file in files.values()}
        tasks, seeds = options.tasks or ("pointmaze-medium-v0",), options.seeds or (1,)
    here = [task for task in tasks if task in known]
    missing += [f"{options.suite}: there is no task {task} yet" for task in tasks if task not in known]
    jobs = []
    for label, (script, own) in methods.items():
        absent = f"no script {script}" if load(script) is None else ""
        unknown = [] if absent else flags_missing(script, own + flags)
        if unknown:
            absent = f"{script} has no {' '.join(map(flag, unknown))}"
        if absent and not options.suite:
            fail(absent)
        if absent:
            missing.append(f"{options.suite}: {label} is left out, there is {absent} yet" if absent.startswith("no ")
                           else f"{options.suite}: {label} is left out, {absent} yet")  # fmt: skip
            continue
        for task, combination in itertools.product(here, combinations(flags)):
            named = f"{label} {' '.join(f'{n}={v}' for n, v in combination)}".strip()
            row = named if len(combinations(flags)) > 1 else label
            of_task = pairs(of_tasks.get(label, {}).get(task, "").split())
            jobs += [Job(row, script, task, seed, (*own, *of_task, *combination)) for seed in seeds]
    for job in {(job.script, job.task, job.flags): job for job in jobs}.values():
        resolved(job.script, job.task, job.flags)
    return jobs, missing


def combinations(flags) -> list[tuple[tuple[str, str], ...]]:
    """Each way to take one value of every flag."""
    return list(itertools.product(*([(name, one) for one in value.split(",")] for name, value in flags)))


def command_of(job: Job, folder: pathlib.Path, threads: int) -> list[str]:
    """What runs or continues a job whose folder this is."""
    script = pathlib.Path(job.script)
    program = [str(ROOT / script)]
    if len(script.parts) > 1 and not script.is_absolute():  # a baseline imports from the root
        program = ["-m", ".".join(script.with_suffix("").parts)]
    run = newest(folder, "checkpoint.pt")
    rest = ["--resume", str(run)] if run else [*job.argv(), "--runs", str(folder)]
    return [sys.executable, *program, *rest, "--threads", str(threads)]


# --- WHAT BECAME OF IT: all of it is read from the folders ---
def newest(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    """The latest run's folder in a job's folder that holds this file."""
    runs = [path.parent for path in folder.glob(f"*/{name}")]
    return max(runs, key=lambda run: ((run / name).stat().st_mtime, run.name)) if runs else None


def finished_run(folder: pathlib.Path) -> pathlib.Path | None:
    """The folder of a job's finished run: the job's own where `report keep` left the small files of one."""
    kept = all((folder / name).is_file() for name in ("config.json", "metrics.csv"))
    return folder if kept else newest(folder, "summary.png")


def held(folder: pathlib.Path) -> bool:
    """Whether a living process holds the folder."""
    try:
        lock(folder).close()
    except SystemExit:
        return True
    return False


def last_line(path: pathlib.Path) -> str:
    """The last line of a log that says something; of a progress bar, its last state."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 20_000))
            lines = re.split(r"[\r\n]+", file.read().decode(errors="replace"))
    except OSError:
        return "no log"
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing was printed")


def progress_of(folder: pathlib.Path) -> dict[str, str]:
    """Where a running job is: phase, step, seconds, and the last success rate, as its metrics.csv has them."""
    run = newest(folder, "metrics.csv")
    try:
        lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    except (OSError, TypeError):
        return {}
    rows = list(csv.DictReader(line for line in lines if line.endswith("\n")))  # one may be half written
    last = dict(rows[-1]) if rows else {}
    rates = [row["success_rate"] for row in rows if row.get("success_rate")]
    return {name: last.get(name) or "" for name in ("phase", "step", "seconds")} | {"success": (rates or [""])[-1]}


# --- WHERE IT RUNS ---
def launch(command: list[str], log: pathlib.Path, environment: dict[str, str]) -> subprocess.Popen:
    """Start a run. It is out of reach of the terminal's Ctrl-C, and asked to save and stop if this process dies."""
    with open(log, "ab") as file:
        file.write(f"\n+ {shlex.join(command)}\n".encode())
        file.flush()
        die_with_parent = (lambda: LIBC.prctl(1, signal.SIGTERM)) if LIBC else None
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | environment, cwd=ROOT, preexec_fn=die_with_parent,
        )  # fmt: skip


def environment_of(threads: int) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))}


def claim(cores) -> dict[int, socket.socket]:
    """Of these cores those that no other runner on this machine has, each with what holds it until it is closed.

    That is a name among Linux's abstract sockets: one process at a time can bind it, and it is free as soon as that
    process is gone, however it went. There is nothing to clean up, and no file whose owner is somebody else.
    """
    held = {}
    for core in cores:
        name = socket.socket(socket.AF_UNIX)
        try:
            name.bind(f"\0parl-runner-core-{core}")
            held[core] = name
        except OSError:
            name.close()
    return held


class Local:
    """This machine: a process for each slot, pinned to a GPU and to cores that are no other runner's, if any are left.

    It starts as many as fit the cores that are left; where there are none, or --slots asks for more, it shares cores
    with another runner and says so in its first line.
    """

    def __init__(self, options: Options):
        gpus, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(gpus)]  # only those that we were given
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(available_cores())
        self.held = claim(cores) if LIBC else dict.fromkeys(cores)
        own = list(self.held) or cores
        self.threads = options.threads or (max(1, len(own) // max(options.slots, gpus)) if gpus else 1)
        count = options.slots or gpus or max(1, len(own) // self.threads)
        cores = [*own, *(core for core in cores if core not in own)]
        self.slots = [
            ({"CUDA_VISIBLE_DEVICES": names[i % gpus]} if gpus else {},
             {cores[(i * self.threads + k) % len(cores)] for k in range(self.threads)})
            for i in range(count)
        ]  # fmt: skip
        pinned = set().union(*(cores for _, cores in self.slots))
        shared = sorted(pinned - self.held.keys())
        self.release(self.held.keys() - pinned)
        self.free, self.running = list(range(count)), {}
        self.words = f"{count} slot{'s' * (count > 1)} of {self.threads} thread{'s' * (self.threads > 1)}"
        self.words += f" on {gpus} GPUs" if gpus else ""
        self.words += f", sharing cores {', '.join(map(str, shared))} with another runner" * bool(shared)

    def release(self, cores) -> None:
        """Leave these cores to other runners."""
        for name in filter(None, [self.held.pop(core) for core in list(cores)]):
            name.close()

    def room(self) -> bool:
        return bool(self.free)

    def queued(self) -> list[Job]:
        """None: here a run starts at once."""
        return []

    def start(self, job: Job, command: list[str], log: pathlib.Path) -> None:
        environment, cores = self.slots[slot := self.free.pop(0)]
        process = launch(command, log, environment_of(self.threads) | environment)
        with contextlib.suppress(OSError, AttributeError):  # it has ended already, or may not or cannot be pinned
            os.sched_setaffinity(process.pid, cores)
        self.running[job] = process, slot

    def ended(self) -> list[tuple[Job, int]]:
        """Runs that ended since the last call, with their exit codes; negative: the number of a signal."""
        codes = [(job, process.poll()) for job, (process, _) in self.running.items()]
        done = [(job, code) for job, code in codes if code is not None]
        for job, _ in done:
            self.free.append(self.running.pop(job)[1])
        return done

    def stop(self, urgent: bool = False) -> None:
        """Ask all runs to save and stop, or end them at once."""
        for process, _ in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL if urgent else signal.SIGTERM)

    def close(self) -> None:
        self.release(self.held)


def size_of(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


class OnRay:
    """A Ray cluster: a task for each run, which starts the script there and waits for it."""

    def __init__(self, options: Options):
        try:
            import ray
        except ImportError:
            fail("--ray needs Ray: pip install -r requirements-cluster.txt")
        self.ray, self.threads = ray, options.threads or 1
        here = options.ray == "local"
        gpus = options.gpus if options.gpus >= 0 else float(torch.cuda.device_count() > 0)
        count = options.slots * self.threads or None
        start = {"num_cpus": count, "include_dashboard": False} if here else {}
        check_ray(1, options.ray)  # Ray asks for minutes whether an address where nobody answers has come up
        try:
            ray.init(address=options.ray, log_to_driver=False, **start)
        except Exception as error:  # of many kinds
            fail(f"--ray {options.ray}: {(str(error).strip().splitlines() or [repr(error)])[0]}")
        self.running, self.logs, self.limit = {}, {}, options.slots or 10_000
        self.check_machines(options.ray, {"CPU": self.threads, "GPU": gpus})

        def execute(command, log, environment):
            """Run the script on the machine where this task is; returns its exit code.

            Defined in here, so that Ray sends it whole. Stopped by the cluster (SIGTERM), it lets the script save.
            """
            import pathlib
            import sys

            sys.path.insert(0, environment["PYTHONPATH"].split(":")[0])
            from benchmarks.run import launch

            process = launch(command, pathlib.Path(log), environment)
            try:
                return process.wait()
            except BaseException:  # ray.cancel interrupts
                process.send_signal(15)
                process.wait(60)
                raise

        resources = dict(num_cpus=self.threads, num_gpus=gpus)
        self.execute = ray.remote(max_retries=0, **resources)(execute)
        self.words = f"Ray ({options.ray}), each run with {self.threads} CPUs and {gpus:g} GPUs"

    def check_machines(self, address: str, needed: dict[str, float]) -> None:
        """One line where no machine of the cluster has what a run is to have: Ray waits without a word for one."""
        machines = [{kind: node["Resources"].get(kind, 0) for kind in needed}
                    for node in self.ray.nodes() if node["Alive"]]  # fmt: skip
        if not any(all(machine[kind] >= number for kind, number in needed.items()) for machine in machines):
            self.close()

            def words(numbers):
                return " and ".join(f"{number:g} {kind}s" for kind, number in numbers.items())

            there = "; ".join(sorted(set(map(words, machines)))) or "none"
            fail(f"--ray {address}: no machine of the cluster has {words(needed)} for a run, there are: {there}; "
                 "pass other --threads or --gpus")  # fmt: skip

    def room(self) -> bool:
        return len(self.running) < self.limit

    def queued(self) -> list[Job]:
        """Those that wait in Ray's queue: where a run starts, its command is written to its log first."""
        return [job for job in self.running if size_of(self.logs[job][0]) == self.logs[job][1]]

    def start(self, job: Job, command: list[str], log: pathlib.Path) -> None:
        self.logs[job] = log, size_of(log)
        self.running[job] = self.execute.remote(command, str(log), environment_of(self.threads))

    def ended(self) -> list[tuple[Job, int]]:
        """As Local's; a worker or a machine that died counts as SIGKILL, and so does a task that was cancelled."""
        done = []
        if self.running:
            ready, _ = self.ray.wait(list(self.running.values()), num_returns=len(self.running), timeout=0)
            for job in [job for job, reference in self.running.items() if reference in ready]:
                try:
                    code = self.ray.get(self.running.pop(job))
                except self.ray.exceptions.RayError:
                    code = -signal.SIGKILL
                done.append((job, code))
        return done

    def stop(self, urgent: bool = False) -> None:
        for reference in self.running.values():
            self.ray.cancel(reference, force=urgent)

    def close(self) -> None:
        self.ray.shutdown()


# --- THE LOOP ---
@dataclass
class State:
    """What the runner knows of the jobs; where they stand is in their folders."""

    waiting: list[Job]
    finished: list[Job] = field(default_factory=list)
    skipped: int = 0  # of the finished, those that were before
    failed: dict[Job, str] = field(default_factory=dict)  # the last line of the log
    restarts: dict[Job, int] = field(default_factory=dict)
    locks: dict[Job, object] = field(default_factory=dict)
    since: dict[Job, float] = field(default_factory=dict)
    stop: int = 0  # signals that asked to


def take(job: Job, state: State, folder: pathlib.Path) -> bool:
    """Whether the job is this process's to start now: no one else runs it, and it is not finished."""
    run = newest(folder, ".lock")
    if run and held(run):  # by a run whose runner is gone, or that has not quite stopped
        return False
    try:
        state.locks[job] = lock(folder)
    except SystemExit:
        return False
    if finished_run(folder):  # by another runner, meanwhile
        state.locks.pop(job).close()
        state.finished.append(job)
        state.waiting.remove(job)
        return False
    return True


def start_jobs(state: State, workers, results: pathlib.Path, say) -> None:
    """Fill the free slots."""
    for job in list(state.waiting):
        if not workers.room() or state.stop:
            return
        folder = results / job.name
        folder.mkdir(parents=True, exist_ok=True)
        if take(job, state, folder):
            state.waiting.remove(job)
            state.since[job] = time.monotonic()
            command = command_of(job, folder, workers.threads)
            began = "resumed" if "--resume" in command else "started"
            workers.start(job, command, folder / "log.txt")
            say(f"{f'queued, to be {began}' if job in workers.queued() else began}: {job.name}")


def end_job(job: Job, code: int, state: State, results: pathlib.Path, restarts: int, say) -> None:
    """Note what became of a run that ended: finished, to be resumed, or failed."""
    folder = results / job.name
    state.locks.pop(job).close()
    run = finished_run(folder)
    if code == 0 and run:
        state.finished.append(job)
        say(f"finished: {job.name}, success {progress_of(folder).get('success') or '?'}")
    elif state.stop:
        state.waiting.append(job)
    elif (code < 0 or code in SIGNALLED) and state.restarts.get(job, 0) < restarts:
        state.restarts[job] = state.restarts.get(job, 0) + 1
        state.waiting.insert(0, job)
        say(f"to be resumed: {job.name}, it was ended from outside")
    else:
        why = last_line(folder / "log.txt") if code >= 0 else f"ended by signal {-code}, {restarts} times resumed"
        state.failed[job] = why if code else f"it ended without a summary.png ({why})"
        say(f"failed: {job.name}: {state.failed[job]}")


class Table:
    """What is shown meanwhile: one table that is drawn anew on a terminal, else a line for each change."""

    def __init__(self, state: State, workers, results: pathlib.Path):
        self.state, self.workers, self.results = state, workers, results
        self.live, self.height, self.drawn = sys.stdout.isatty(), 0, 0.0

    def say(self, text: str) -> None:
        if not self.live:
            print(text, flush=True)

    def draw(self) -> None:
        """At most once a second."""
        if not self.live or time.monotonic() - self.drawn < 1:
            return
        self.drawn, width = time.monotonic(), shutil.get_terminal_size().columns - 1
        lines = self.lines()
        print(f"\x1b[{self.height}F" * bool(self.height) + "\x1b[J" + "\n".join(line[:width] for line in lines))
        self.height = len(lines)

    def lines(self) -> list[str]:
        """A line for each running job, and one for all. What is in Ray's queue is counted; its time begins later."""
        state, lines = self.state, [f"{'phase':8}{'step':>8}{'success':>9}{'time':>9}  run"]
        queued = self.workers.queued()
        state.since |= dict.fromkeys(queued, time.monotonic())
        running = [job for job in self.workers.running if job not in queued]
        for job in running:
            at = progress_of(self.results / job.name)
            success = f"{100 * float(at['success']):.0f} %" if at.get("success") else ""
            took = duration(time.monotonic() - state.since[job])
            lines.append(f"{at.get('phase', ''):8}{at.get('step', ''):>8}{success:>9}{took:>9}  {job.name}")
        lines += [f"failed: {job.name}: {why}" for job, why in state.failed.items()]
        counts = {"finished": len(state.finished), "running": len(running), "waiting": len(state.waiting),
                  **({"queued in Ray": len(queued)} if queued else {}), "failed": len(state.failed)}  # fmt: skip
        return [*lines, ", ".join(f"{number} {name}" for name, number in counts.items())]


def run_all(jobs: list[Job], options: Options) -> State:
    """Run what is not finished yet, until all is finished or failed, or a signal asks to stop."""
    results = options.results.expanduser().resolve()
    state = State([job for job in jobs if not finished_run(results / job.name)])
    state.finished = [job for job in jobs if job not in state.waiting]
    state.skipped = len(state.finished)
    if not state.waiting:
        return state
    try:
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--results {results}: cannot be made ({error.strerror}); name another folder")
    workers = OnRay(options) if options.ray else Local(options)
    print(f"{len(jobs)} runs, {state.skipped} of them finished; {workers.words}; all of it in {results}/", flush=True)
    table = Table(state, workers, results)

    def stop(number, frame):
        state.stop += 1
        print("\nstopping: the runs save first; once more ends them at once", flush=True)
        workers.stop(urgent=state.stop > 1)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while workers.running or (state.waiting and not state.stop):
            start_jobs(state, workers, results, table.say)
            time.sleep(0.1)
            for job, code in workers.ended():
                end_job(job, code, state, results, options.restarts, table.say)
            table.draw()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        workers.close()
    return state


# --- WHAT IT WILL TAKE ---
def seconds_of(run: pathlib.Path) -> float:
    """How long a finished run took by its own clock; one line where its metrics.csv is missing or was cut off."""
    from benchmarks.report import read_whole  # takes scipy, a second that runs and Ray's workers do without

    return max((row["seconds"] for row in read_whole(run, wanted=())[1] if "seconds" in row), default=math.nan)


def rates_of(script, args, sizes: tuple[int, int]) -> dict[str, float]:
    """Operations per second of a cloning and of a critic update of this script with these arguments, on this machine.

    Measured for about a second each, on noise, by what benchmarks/speed.py measures; where an update of the critic is
    of more than a second's work, on a part of its batch, whose rate is a little lower than the whole one's.
    """
    from benchmarks import cost, speed

    torch.set_num_threads(args.threads or 1)
    work = cost.critic_update_flops(args, sizes[0], args.chunk * sizes[1])
    args = dataclasses.replace(args, batch_size=min(args.batch_size, max(16, round(args.batch_size * 2e10 / work))))
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    net = speed.build(script, args, *sizes, device)
    batch = args.cloning_batch_size
    cloning = speed.repeat(lambda: speed.clone_step(script, net, args, batch), 0.5, device)
    rows = net.buffer.sample_index((1, args.batch_size))[0]
    with speed.counting_climbed(script) as climbed:
        critic = speed.repeat(lambda: speed.critic_step(script, net, args, rows), 0.5, device)
    sizes = sizes[0], args.chunk * sizes[1]  # of a decision
    return {"cloning": cost.policy_update_flops(args, *sizes, batch) / statistics.median(cloning),
            "critic": cost.critic_update_flops(args, *sizes, climbed()) / statistics.median(critic)}  # fmt: skip


def estimate(job: Job, results: pathlib.Path, cache: dict) -> tuple[float, float, float, str]:
    """The fewest and the most seconds of a run and its bytes, NaN where nothing is known, and how that is known.

    From finished runs of the same script, task and flags with other seeds, else from the arithmetic of its phases at
    the rates that this machine reaches now, or a baseline's from a few steps of each phase, without evaluations: the
    fewest without its online episodes, the most with episodes that all last until the time limit.
    """
    key = job.name.rsplit("__", 1)[0]
    if key not in cache:
        before = [finished_run(folder) for folder in results.glob(f"{key}__seed*")]
        before = [run for run in before if run]
        if before:
            size = statistics.mean(sum(f.stat().st_size for f in run.rglob("*") if f.is_file()) for run in before)
            times = [seconds_of(run) for run in before]
            cache[key] = min(times), max(times), size, f"as {len(before)} finished"
        else:
            cache[key] = by_arithmetic(job, cache)
    return cache[key]


def by_arithmetic(job: Job, cache: dict) -> tuple[float, float, float, str]:
    """As `estimate`, of runs that benchmarks/cost.py can count, and of those that benchmarks/rehearsal.py must time.

    cache: of rates and rehearsals, by what decides them.
    """
    from benchmarks.rehearsal import rehearse
    from benchmarks.tasks import make_env

    script, args = load(job.script), resolved(job.script, job.task, job.flags)
    try:
        env = make_env(job.task)
        if not isinstance(env.observation_space, gym.spaces.Box):  # a camera's
            return math.nan, math.nan, math.nan, "unknown until one has run"
        sizes = env.observation_space.shape[0], env.action_space.shape[0]
        try:
            episode = env.get_wrapper_attr("_max_episode_steps")  # of gymnasium's TimeLimit
        except AttributeError:
            episode = 1_000
        rows = args.dataset_size or {"pointmaze": 40_000}.get(job.task.split("-")[0], 1_000_000)
        flops = phase_flops(args, sizes[0], getattr(args, "chunk", 1) * sizes[1], rows, episode)
        same = job.script, sizes, repr(dataclasses.replace(args, env_id="", seed=0))
        if not flops:  # a baseline's
            argv = ["--env-id", job.task, *argv_of(job.flags)]
            seconds, size = cache[same] = cache.get(same) or rehearse(script, argv, sizes, rows, episode)
            most = sum(seconds.values())
            return most - seconds.get("online", 0), most, size, "by a few steps of each phase on this machine"
        rates = cache[same] = cache.get(same) or rates_of(script, args, sizes)
    except Exception as error:  # a script of another shape, or a task whose package is not installed
        return math.nan, math.nan, math.nan, f"unknown until one has run ({type(error).__name__})"
    seconds = {name: work / rates["cloning" if name == "cloning" else "critic"] for name, work in flops.items()}
    most = sum(seconds.values())
    # weights, two moments and the copies of the networks, twice while a checkpoint replaces another; the rest is small
    weights = 4.0 * (args.ensemble_size * sum(a * b for a, b in itertools.pairwise((sum(sizes), *args.critic_hidden))))
    episodes = 4.0 * args.num_online_episodes * episode * (2 * sizes[0] + sizes[1] + 3)
    return most - seconds["online"], most, 2 * (8 * weights + episodes) + 20e6, "by arithmetic, at this machine's rate"


def check_results(folder: pathlib.Path) -> None:
    """One line where the folder of all runs cannot be made or written to."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        fail(f"--results {folder}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        fail(f"--results {folder}: {nearest} cannot be written to; name another folder")


def dry_run(jobs: list[Job], options: Options) -> None:
    """Print what would be run, and what it takes."""
    results, cache, shown = options.results.expanduser().resolve(), {}, {}
    waiting = [job for job in jobs if not finished_run(results / job.name)]
    slots = Local(options)
    slots.close()  # they are only counted
    for job in waiting:
        command = command_of(job, results / job.name, slots.threads)
        print(shlex.join(["python", *[part.removeprefix(f"{ROOT}/") for part in command[1:]]]))
        row = shown.setdefault((job.label, job.task), [0, *estimate(job, results, cache)])
        row[0] += 1
    print(f"\n{'runs':>4}{'each takes':>22}{'disk':>9}  method, task (how it is known)")
    for (label, task), (count, fewest, most, size, how) in shown.items():
        disk = "?" if math.isnan(size) else f"{count * size / 1e6:.0f} MB"
        print(f"{count:4}{between(fewest, most):>22}{disk:>9}  {label}, {task} ({how})")
    known = [row for row in shown.values() if not math.isnan(row[1])]
    fewest, most, disk = (sum(row[0] * row[i] for row in known) for i in (1, 2, 3))
    unknown = sum(row[0] for row in shown.values()) - sum(row[0] for row in known)
    free = shutil.disk_usage(next(path for path in (results, *results.parents) if path.exists())).free
    total = between(fewest / len(slots.slots), most / len(slots.slots))
    print(f"{len(waiting)} runs to do, {len(jobs) - len(waiting)} finished; {total} on {slots.words}"
          + f", and {unknown} runs of unknown cost" * bool(unknown)
          + f"; {disk / 1e6:.0f} MB of disk, {free / 1e6:.0f} MB are free (datasets not counted)")  # fmt: skip


def between(fewest: float, most: float) -> str:
    """Two numbers of seconds in words; one where both read the same, ? where they are not known."""
    if math.isnan(most):
        return "?"
    low, high = duration(fewest), duration(most)
    return high if low == high else f"{low} to {high}"


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, description=__doc__)
    if options.slots < 0 or options.threads < 0 or options.restarts < 0:
        fail("--slots, --threads and --restarts must be at least 0")
    if not options.ray and options.slots * max(1, options.threads) > 64 * available_cores():
        fail(f"--slots {options.slots} of {options.threads} threads are too many for {available_cores()} cores")
    check_results(options.results.expanduser().resolve())
    jobs, missing = jobs_of(options)
    jobs = list({job.name: job for job in jobs}.values())  # two rows of a table may be one run
    print("".join(f"{line}\n" for line in missing), end="")
    if not jobs:
        fail("nothing of it exists yet")
    if options.dry_run:
        dry_run(jobs, options)
        return
    state = run_all(jobs, options)
    print(f"{len(state.finished)} of {len(jobs)} runs finished ({state.skipped} before), {len(state.failed)} failed")
    for job, why in state.failed.items():
        print(f"failed: {options.results / job.name}/log.txt: {why}")
    if state.waiting:
        print(f"{len(state.waiting)} are to be done: the same command goes on")
    if state.failed or state.waiting:
        raise SystemExit(1 if state.failed else 128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
