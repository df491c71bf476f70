"""A run's folder: settings, metrics, checkpoint; stopping and going on where it stopped."""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import pathlib
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from benchmarks.cost import forecast, phase_flops, processor
from benchmarks.harness.cli import fail, in_one_line, script_name
from benchmarks.harness.datasets import fingerprint, trajectory_ends
from benchmarks.harness.rollouts import SimulationDied, close, evaluate
from benchmarks.tasks.dataset import ARRAYS, Dataset

PHASES = ("cloning", "offline", "online", "done")
PROGRESS = ("phase", "step", "updates", "episodes", "env_steps", "seconds")  # columns of every row
LABELS = {"cloning": "cloned policy", "offline": "after offline RL", "online": "after online RL"}  # of a phase's end
SCORES = ("success_rate", "score", "return", "length")  # of an evaluation
EPISODE = ("episode_success", "episode_length")  # of an online episode
MODULE = getattr(sys.modules["__main__"].__spec__, "name", "")  # with python -m, by which baselines are run
PROGRAM = ["-m", MODULE] if MODULE.startswith("benchmarks.") else []


class Stopped(Exception):
    """SIGINT, SIGTERM or SIGUSR1 asked the run to end."""


class Run:
    """A run's folder: config.json, metrics.csv, TensorBoard events, checkpoint.pt; and how far the run has come.

    Used as `with Run(...) as run`: on a signal the run ends with the line that continues it.
    """

    def __init__(self, args, dataset, buffer, **modules):
        """Make the folder, or read it if args.resume is set.

        Args:
            dataset: where it came from goes into config.json.
            buffer: its `data` but the first is saved with every checkpoint and added again on resuming, and so are
            modules: networks and optimizers by name, which are loaded here when a run is resumed.
        """
        self.args, self.modules, self.buffer, self.stop_signal = args, modules, buffer, None
        self.progress = dict.fromkeys((*PROGRESS, "rows"), 0) | {"phase": PHASES[0], "seconds": 0.0, "evaluated": -1}
        self.data, self.envs, self.handlers, self.seconds_of = fingerprint(dataset), None, {}, {}
        self.device, self.local, self.results, self.curve = buffer.states.device, dataset.local, {}, []
        self.folder = pathlib.Path(args.resume) if args.resume else self._make_folder()
        self.lock = lock(self.folder)
        try:
            self._load() if args.resume else self._write_config(dataset)
        except BaseException:
            self.lock.close()
            raise
        self.started = time.monotonic() - self.progress["seconds"]
        self.saved_at, self.logged = time.monotonic(), (time.monotonic(), self.progress["updates"])
        self._open_logs()
        self._catch_signals()
        ends = trajectory_ends(dataset)
        self.longest = int(np.diff(ends, prepend=0).max(initial=0))
        print(f"{args.env_id}: {len(dataset)} transitions in {len(ends)} trajectories ({dataset.source})")
        print(f"preset {args.preset} on {self.device}, {torch.get_num_threads()} threads; all goes to {self.folder}/")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        for part in (self.csv, self.writer, self.lock):
            part.close()
        close(self.envs)
        again = "to continue: " + shlex.join(["python", *(PROGRAM or sys.argv[:1]), "--resume", str(self.folder)])
        if kind is Stopped:
            print(f"\nstopped by {self.stop_signal.name}; {again}", flush=True)
            raise SystemExit(128 + self.stop_signal) from None
        if kind is SimulationDied:
            fail(f"{error}; the run is saved and stops; {again}")
        if kind is not None and issubclass(kind, Exception):
            fail(f"{in_one_line(error, self.folder / 'error.log')}; {again}")

    @property
    def phase(self) -> str:
        return self.progress["phase"]

    def starts(self, phase: str) -> bool:
        """Whether this phase is the next to begin: not if it is over, or taken up again in its middle."""
        return self.progress["phase"] == phase and self.progress["step"] == 0

    def steps(self, phase: str, total: int, envs=None, act=None, evals: int = 1, unit: str = "update"):
        """The numbers of the phase's steps that are still to do; none if a resumed run has passed it.

        Between two of them the run is saved, measured and stopped when it is time: the policy `act` (obs (B, O) ->
        actions (B, A)) in `envs` after each of `evals` equal parts of the phase; at its end in any case. A step that is
        an "update" is counted as one; with other units the script counts the updates.
        """
        if self.progress["phase"] != phase:
            return
        first, self.envs = self.progress["step"], envs or self.envs
        measured = set(np.linspace(0, total, evals + 1, dtype=int)[1:].tolist()) | {total}
        if envs is None or act is None or (total == 0 and phase != "cloning"):
            measured = set()
        with tqdm(total=total, initial=first, desc=phase, unit=unit, mininterval=0.5) as bar:
            began = time.monotonic()
            for step in range(first, total + 1):
                if step in measured and self.progress["evaluated"] < step:
                    self.save()  # an evaluation takes long: one that is stopped begins anew, and nothing else is lost
                    self.evaluate(LABELS[phase] if step == total else f"{phase} RL", envs, act, final=step == total)
                    self.progress["evaluated"] = step
                elif self.stop_signal or time.monotonic() - self.saved_at > self.args.checkpoint_seconds:
                    self.save()
                self.check_stop()
                if step < total:
                    self.count(updates=int(unit == "update"))
                    yield step
                    self.progress["step"] = step + 1
                    bar.update()
                    began = self._tell_cost(phase, began, step - first, total)
        self.progress |= {"phase": PHASES[PHASES.index(phase) + 1], "step": 0, "evaluated": -1}
        self.logged = (time.monotonic(), self.progress["updates"])
        self.save()
        self.check_stop()

    def _tell_cost(self, phase: str, began: float, steps: int, total: int) -> float:
        """After two seconds of a phase, of which the first step does not count: what all phases will take."""
        seconds = time.monotonic() - began
        if steps == 0 or seconds < 2 or steps < 3 and seconds < 30 or phase in self.seconds_of:
            return began if steps else time.monotonic()
        self.seconds_of[phase] = seconds / steps * total
        sizes = self.buffer.states.shape[1], self.buffer.candidates.shape[2], len(self.buffer.states)
        tqdm.write(forecast(phase_flops(self.args, *sizes, self.longest), self.seconds_of, phase, self.device.type))
        return began

    def each(self, description: str, parts):
        """The parts of something long that is not saved, with a progress bar; stops between two of them."""
        for part in tqdm(parts, desc=description, unit="part", mininterval=0.5):
            self.check_stop()
            yield part

    def count(self, **done: int) -> None:
        """Add to what was done so far: updates, episodes, env_steps."""
        for name, number in done.items():
            self.progress[name] += number

    def check_stop(self) -> None:
        if self.stop_signal:
            raise Stopped

    def _catch_signals(self):
        """Stop at the next good place when asked to; a terminal that hangs up only makes the run save soon."""

        def stop(number, frame):
            if self.stop_signal:  # asked twice: at once
                raise Stopped
            self.stop_signal = signal.Signals(number)

        def hang_up(number, frame):
            self.saved_at = -math.inf

        for name, handler in {"SIGINT": stop, "SIGTERM": stop, "SIGUSR1": stop, "SIGHUP": hang_up}.items():
            if number := getattr(signal, name, None):  # Windows has two of them
                self.handlers[number] = signal.signal(number, handler)

    def log(self, metrics: dict, every: int = 1) -> None:
        """A row of metrics.csv and its TensorBoard scalars, of numbers or scalar tensors; stops at impossible values.

        With `every`, only at steps that complete so many; so that the tensors of the others are never waited for.
        """
        if (self.progress["step"] + 1) % every:
            return
        metrics = {name: float(value) for name, value in metrics.items()}
        self._check_values(metrics)
        now, updates = time.monotonic(), self.progress["updates"]
        self.progress["seconds"] = now - self.started
        if updates > self.logged[1]:
            metrics["updates_per_second"] = (updates - self.logged[1]) / (now - self.logged[0])
        self.logged = (now, updates)
        row = {name: self.progress[name] for name in PROGRESS} | {"seconds": round(self.progress["seconds"], 2)}
        self._write(row | {name: f"{value:.6g}" for name, value in metrics.items()})
        self.progress["rows"] += 1
        for name, value in metrics.items():
            group = "time" if name == "updates_per_second" else "charts" if name in SCORES + EPISODE else "losses"
            self.writer.add_scalar(f"{group}/{name}", value, updates)

    def _write(self, row: dict) -> None:
        """Append a row to metrics.csv, which gets a new column for whatever is logged for the first time."""
        if not row.keys() <= set(self.columns):
            self.csv.close()
            with open(self.folder / "metrics.csv", newline="") as file:
                self._write_all(list(csv.DictReader(file)), row)
        csv.DictWriter(self.csv, self.columns).writerow(row)
        self.csv.flush()

    def _write_all(self, rows: list[dict], new=()) -> None:
        for row in (*rows[:1], new):
            self.columns += [name for name in row if name not in self.columns]
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, self.columns)
        table.writeheader()
        table.writerows(rows)
        path = self.folder / "metrics.csv"
        write_atomically(path, lambda file: file.write(text.getvalue().encode()))
        self.csv = open(path, "a", newline="")

    def _check_values(self, metrics):
        where = f"at {self.progress['phase']} step {self.progress['step'] + 1}"
        kept = f"the last good checkpoint is kept in {self.folder}"
        q_min = self.args.reward_min / (1 - self.args.discount)
        for name, value in metrics.items():
            if not math.isfinite(value):
                fail(f"{name} became {value} {where}; {kept}")
            # a tenth of the range is allowed for: regression overshoots a little without diverging
            if name in ("q_data", "q_random", "q_optimized", "target_q") and not 1.1 * q_min <= value <= -0.1 * q_min:
                fail(f"{name} is {value:.4g} {where}, outside its possible range [{q_min:.4g}, 0]; {kept}")

    def evaluate(self, label: str, envs, act, final: bool = False) -> None:
        """Measure `act`: a line on the screen, a row of metrics, a point of the curve; `final`: of the table."""
        result = evaluate(envs, act, self)
        scores = {name: result[name] for name in SCORES}
        self.log(scores)
        self.curve.append([self.progress["phase"], self.progress["updates"], result["score"]])
        if final:
            paths = [torch.tensor(path[:, :2]) for path in result["trajectories"][:24]]
            self.results[label] = scores | {"seconds": self.progress["seconds"], "trajectories": paths}
        if not (result["tells_success"] or self.progress.setdefault("said", False)):
            self.progress["said"] = True
            tqdm.write("this task reports neither info['success'] nor info['is_success']: look at the return")
        tqdm.write("{:>18}: success {:6.1%}   score {:5.1f}   return {:8.2f}   length {:6.1f}   after {:.0f} s".format(
            label, *scores.values(), self.progress["seconds"]))  # fmt: skip

    def save(self) -> None:
        """Write all that a resumed run needs into one file, which replaces the last one only when it is whole."""
        for name, module in self.modules.items():
            if isinstance(module, nn.Module) and not all(p.isfinite().all() for p in module.parameters()):
                self._check_values({f"a weight of the {name}": math.nan})
        self.progress["seconds"] = time.monotonic() - self.started
        state = {
            "progress": self.progress, "results": self.results, "curve": self.curve,
            "episodes": [{name: torch.as_tensor(getattr(e, name)) for name in ARRAYS} for e in self.buffer.data[1:]],
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "data": self.data, "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all(),
        }  # fmt: skip
        write_atomically(self.folder / "checkpoint.pt", lambda file: torch.save(state, file))
        self.saved_at = time.monotonic()

    def _load(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            fail(f"{self.folder} holds no checkpoint yet; start the run anew")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for name, module in self.modules.items():
                module.load_state_dict(state["modules"][name])
            for episode in state["episodes"]:
                self.buffer.add(Dataset(**{name: episode[name].numpy() for name in ARRAYS}))
        except Exception as error:  # a damaged file can raise almost anything
            fail(f"{path} cannot be read or does not fit this run ({str(error).splitlines()[0]})")
        if state["data"] != self.data:
            fail(f"{self.folder} was trained on another dataset than the one found; restore that, or start a new run")
        self.progress, self.results, self.curve = state["progress"], state["results"], state["curve"]
        torch.set_rng_state(state["rng"])
        if len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_rng"])

    def _make_folder(self) -> pathlib.Path:
        """A folder that no other run has, with room for two checkpoints (the old one stands until the new is whole)."""
        weights = sum(p.nbytes for m in self.modules.values() if isinstance(m, nn.Module) for p in m.parameters())
        needed = (2 * 3 * weights + 100 * 2**20) / 2**20  # weights and two moments each
        task = self.args.env_id + ("-local" if self.local else "")  # not the published data: say so in the name
        name = f"{task}__{script_name(self.args)}__{self.args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        runs = pathlib.Path(self.args.runs)
        try:
            runs.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(runs).free / 2**20
            if free < needed:
                fail(f"{runs} has {free:.0f} MB free, the run needs {needed:.0f} MB; name another place with --runs")
            for number in itertools.count(1):  # runs of a sweep start in the same second
                folder = runs / (name if number == 1 else f"{name}-{number}")
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                    return folder
        except OSError as error:
            fail(f"cannot make a folder in {runs} ({error.strerror}); name another place with --runs")

    def _write_config(self, dataset) -> None:
        data = {name: getattr(dataset, name) for name in ("source", "sha256", "local")} | {"transitions": len(dataset)}
        config = {"script": script_name(self.args), "provenance": provenance(), "data": data}
        text = json.dumps(config | dataclasses.asdict(self.args), indent=2).encode()
        write_atomically(self.folder / "config.json", lambda file: file.write(text))

    def _open_logs(self):
        from torch.utils.tensorboard import SummaryWriter  # takes a second that bad input need not wait for

        if self.args.track:
            import wandb

            wandb.init(project=self.args.wandb_project, name=self.folder.name, id=self.folder.name, resume="allow",
                       sync_tensorboard=True, config=dataclasses.asdict(self.args))  # fmt: skip
        self.columns, self.csv = [*PROGRESS, *SCORES], None
        path = self.folder / "metrics.csv"
        if path.exists():  # what came after the checkpoint will come again
            with open(path, newline="") as file:
                self._write_all(list(csv.DictReader(file))[: self.progress["rows"]])
        else:
            self._write_all([])
        self.writer = SummaryWriter(self.folder, purge_step=self.progress["updates"] + 1 if self.args.resume else None)


def provenance() -> dict[str, str]:
    """What a result must carry to be repeated: the command, the commit, the machine, the versions."""
    commit = "unknown"
    if shutil.which("git"):
        git = ["git", "describe", "--always", "--abbrev=12", "--dirty"]
        here = pathlib.Path(sys.argv[0]).resolve().parent
        commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout.strip() or commit
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "command": shlex.join(["python", *(PROGRAM or sys.argv[:1]), *sys.argv[1:]]), "commit": commit,
        "machine": f"{processor()}, {os.cpu_count()} cores, {gpu}, {platform.system()}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, gymnasium {gym.__version__}",
    }  # fmt: skip


def lock(folder: pathlib.Path):
    """Hold the folder while the returned file is open; refuse one that a living run holds."""
    try:
        file = open(folder / ".lock", "a+")
    except OSError as error:
        fail(f"cannot write to {folder} ({error.strerror}); a run must own its folder")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        fail(f"{folder} is the folder of a run that is still alive (process {holder}); let it end or stop it first")
    except (ImportError, OSError):  # Windows, or a file system without locks: nobody is kept out
        pass
    file.truncate(0)
    print(os.getpid(), file=file, flush=True)
    for left in folder.glob("*.partial"):  # by a run that was killed while it wrote
        left.unlink(missing_ok=True)
    return file


def write_atomically(path: pathlib.Path, write) -> None:
    """`write(file)`, so that `path` holds either what it held before or all of the new content."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        fail(f"cannot write {path} ({str(error).splitlines()[0]}); free some space, then --resume {path.parent}")
    finally:
        temporary.unlink(missing_ok=True)
