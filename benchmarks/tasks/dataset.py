"""The dataset container, and reading and writing it: atomic, verified, without pickle."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

ARRAYS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")


class TaskError(ValueError):
    """Something a person can put right; the message is one line that says how."""


@dataclass
class Dataset:
    """N transitions in recorded order: a trajectory is a run of rows up to one with `terminals` or `timeouts` set."""

    observations: np.ndarray
    """(N, O) float32; through a camera a dict of `image` (N, H, W, 3) uint8 and `proprio` (N, P) float32."""
    actions: np.ndarray
    """(N, A) float32, in the environment's action space."""
    rewards: np.ndarray
    """(N,) float32, as the environment gives them (no bias, no scale)."""
    next_observations: np.ndarray
    """As `observations`."""
    terminals: np.ndarray
    """(N,) bool: the state after this row is absorbing."""
    timeouts: np.ndarray
    """(N,) bool: the trajectory was cut after this row, and its last state is not absorbing."""
    source: str = ""
    """Where it came from: a path or `collected locally ...`."""
    sha256: str = ""
    """Of the file's bytes."""
    local: bool = False
    """Collected on this machine in place of a published file: results are not comparable with published ones."""
    infos: dict[str, np.ndarray] = field(default_factory=dict)
    """What else the file holds for each row (D4RL: goal, qpos, qvel); the algorithms do not look at it."""

    def __len__(self) -> int:
        return len(self.rewards)


def cache_dir() -> pathlib.Path:
    """Folder of downloaded and collected data: `$PARL_CACHE`, else `~/.cache/parl`."""
    if os.environ.get("PARL_CACHE"):
        return pathlib.Path(os.environ["PARL_CACHE"]).expanduser()
    return home() / ".cache" / "parl"


def home() -> pathlib.Path:
    """The user's home folder.

    Raises:
        TaskError: there is none (a container that runs under a bare user number has no entry for it, and no HOME).
    """
    try:
        return pathlib.Path.home()
    except RuntimeError as error:
        raise TaskError("this user has no home folder: set PARL_CACHE to a folder for the datasets") from error


def read_npz(path, sha256: str | None = None, obs_shape: tuple = (None,), action_shape: tuple = (None,)) -> Dataset:
    """Read a dataset written by `write_npz` (or any `.npz` with the six arrays).

    Args:
        path: the file.
        sha256: what its bytes must hash to; None skips the check.
        obs_shape: of one observation; None stands for any size. Three numbers are an image, whose values must be uint8.
        action_shape: of one action, likewise.
    Raises:
        TaskError: missing, truncated, changed, lacking an array, or an array that `check_array` refuses.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise TaskError(f"no dataset file at {path}")
    with readable(path):
        digest = file_sha256(path)
        if sha256 is not None and digest != sha256:
            raise TaskError(_changed(path, digest, sha256))
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in ARRAYS if name not in file]
            if missing:
                raise TaskError(f"{path} has no array {missing[0]!r}; a dataset needs {', '.join(ARRAYS)}")
            arrays = {name: file[name] for name in ARRAYS}
    observation = "image" if len(obs_shape) == 3 else "number"
    arrays["observations"] = check_array("observations", arrays["observations"], path, obs_shape, observation)
    obs_shape = arrays["observations"].shape[1:]
    shapes_and_kinds = {
        "next_observations": (obs_shape, observation),
        "actions": (action_shape, "number"),
        "rewards": ((), "number"),
        "terminals": ((), "flag"),
        "timeouts": ((), "flag"),
    }
    for name, (shape, kind) in shapes_and_kinds.items():
        arrays[name] = check_array(name, arrays[name], path, shape, kind)
    check_lengths(arrays, path)
    for name in ("observations", "actions", "rewards", "next_observations"):
        if arrays[name].dtype != np.uint8 or observation != "image":
            arrays[name] = arrays[name].astype(np.float32)
    return Dataset(**arrays, source=str(path), sha256=digest)


@contextlib.contextmanager
def readable(path):
    """Turn what a damaged `.npz` archive raises into one line."""
    try:
        yield
    except TaskError:
        raise
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise TaskError(f"{path} is not a readable .npz file, or it is truncated ({reason})") from error


def check_array(name: str, array, path, shape: tuple, kind: str = "number") -> np.ndarray:
    """The one check that every array of every dataset goes through, whatever file it comes from.

    Args:
        name: of the array, for the message.
        array: as it was read.
        path: of the file, for the message.
        shape: what follows the first dimension, exactly; () is an array (N,), and None stands for any size.
        kind: `number` (bool, integers or floats, finite also as float32), `flag` (bool, or numbers that are all 0 or 1)
            or `image` (uint8).
    Returns:
        the array as it is, a flag as bool.
    Raises:
        TaskError: one line that names the file, the array and what is wrong, with the first row where it is.
    """
    array = np.asarray(array)
    if array.dtype.kind not in "biuf":  # not text, objects, complex numbers or times
        raise TaskError(f"{path}: {name} has dtype {array.dtype}; it must be a number{' or bool' * (kind == 'flag')}")
    if kind == "image" and array.dtype != np.uint8:
        raise TaskError(f"{path}: {name} has dtype {array.dtype}; images must be uint8")
    fits = array.ndim == 1 + len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape[1:]))
    if not fits:
        needed = ", ".join(["N", *("any" if n is None else str(n) for n in shape)]) + "," * (not shape)
        raise TaskError(f"{path}: {name} has shape {array.shape}; this task needs ({needed})")
    if kind == "flag" and array.dtype != bool:
        _refuse_rows(name, array, (array == 0) | (array == 1), path, "a flag is 0 or 1 (or bool)")
        return array.astype(bool)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            good = np.isfinite(array.astype(np.float32, copy=False))
        _refuse_rows(name, array, good, path, "every number must be finite, also as float32")
    return array


def _refuse_rows(name: str, array: np.ndarray, good: np.ndarray, path, rule: str) -> None:
    """Complain of the first entry of `array` that is not `good`."""
    if not good.all():
        where = tuple(np.argwhere(~good)[0])
        raise TaskError(f"{path}: {name} has {array[where]:g} in row {where[0]}; {rule}")


def check_lengths(arrays: dict[str, np.ndarray], path, at_least: int = 1) -> None:
    """Complain unless all arrays have the same number of rows, and enough of them."""
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or min(lengths.values()) < at_least:
        raise TaskError(f"{path} has arrays of different or no length: {lengths}")


def write_npz(path, dataset: Dataset) -> str:
    """Write a dataset so that `path` either holds all of it or does not exist; return the sha256 of its bytes."""
    arrays = {name: getattr(dataset, name) for name in ARRAYS}
    return write_once(path, lambda file: np.savez_compressed(file, **arrays))


def write_once(path, write) -> str:
    """`write(file)` into a new file that takes the name `path` when it is whole; return the sha256 of its bytes.

    A note beside it, `<path>.json`, keeps that sum for `verify`.

    Raises:
        TaskError: the folder cannot be written to, or the disk is full.
    """
    path = pathlib.Path(path)
    with writing_to_cache(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two processes may make the same file
        try:
            with open(temporary, "w+b") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            digest = file_sha256(temporary)
            write_note(path, digest)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return digest


@contextlib.contextmanager
def one_at_a_time(path):
    """Let other processes that want to make the same file wait (runs with several seeds start together).

    The lock only saves work: without one the later of two processes replaces the file of the earlier. So nothing is
    locked where the file is there already, nor where the file system has no locks, and a folder that is there but takes
    no lock file is no error yet: reading may be all that is wanted, and who writes will complain.

    Raises:
        TaskError: the file is absent, and its folder is not there and cannot be made, or cannot be written to.
    """
    path = pathlib.Path(path)
    with contextlib.ExitStack() as stack:
        if not os.path.isfile(path):
            with writing_to_cache(path):
                lock = _open_lock(path)
            if lock is not None:
                stack.enter_context(lock)
                with contextlib.suppress(ImportError, OSError):  # Windows; a file system without locks
                    import fcntl

                    fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _open_lock(path: pathlib.Path):
    """The lock file of `path`, or None where it cannot be opened and that matters not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path.with_name(path.name + ".lock"), "w")
    except OSError:
        # Another user's lock file in a shared folder, or (the path being a folder) data that is already there. An
        # absent file in a folder that takes none is an error now, before minutes of collecting.
        if path.exists() or os.access(path.parent, os.W_OK | os.X_OK):
            return None
        raise


@contextlib.contextmanager
def writing_to_cache(path):
    """Turn the system's complaints about a folder or disk into one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise TaskError(f"cannot write the dataset to {path} ({reason}); set PARL_CACHE to another folder") from error


def write_note(path: pathlib.Path, digest: str) -> None:
    """Keep the sum of a file's bytes beside it, in `<path>.json`."""
    note = _note(path)
    partial = note.with_name(f"{note.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps({"sha256": digest}))
        os.replace(partial, note)
    finally:
        with contextlib.suppress(OSError):  # nothing left behind, also where the disk is full
            partial.unlink(missing_ok=True)


def verify(path, check=None, sha256: str | None = None) -> str:
    """The sha256 of a file in the cache, which must be what its note says.

    A file without a readable note was put there by hand: it must pass `check`, and then gets a note if that can be
    written.

    Args:
        check: `check(path)` raises a TaskError if this is not a file of the wanted kind.
        sha256: what a file without a note must hash to, if that is known.
    Raises:
        TaskError: the file is not readable, it changed, or it came without a note and is not what it should be.
    """
    path = pathlib.Path(path)
    try:
        digest = file_sha256(path)
    except OSError as error:
        raise TaskError(f"{path} is not readable ({error.strerror or error})") from error
    noted = _noted_sum(path)
    if noted is None:
        if sha256 is not None and digest != sha256:
            raise TaskError(
                f"{path} is not the published file (sha256 {digest[:12]}, expected {sha256[:12]}); delete it"
            )
        try:
            if check is not None:
                check(path)
        except TaskError as error:
            raise TaskError(f"{error}; delete the file to get it anew") from error
        with contextlib.suppress(OSError):  # a folder that cannot be written to; then the next run checks again
            write_note(path, digest)
    elif digest != noted:
        raise TaskError(_changed(path, digest, noted))
    return digest


def _noted_sum(path: pathlib.Path) -> str | None:
    """What the note beside a file says, None if there is no note that says anything."""
    try:
        noted = json.loads(_note(path).read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return noted if isinstance(noted, str) else None


def _changed(path, digest: str, expected: str) -> str:
    return f"{path} changed on disk (sha256 {digest[:12]}, expected {expected[:12]}); delete it to build it anew"


def _note(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".json")


def file_sha256(path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def announce_local_data(env_id: str, reason: str, what: str) -> None:
    """The notice that local data stands in for published data. `reason`: why; `what`: what is used instead."""
    marked = "results on it are not comparable with published ones; the run is marked `local`"
    lines = (f"LOCAL DATA for {env_id}", reason, what, marked)
    print("\n" + "!" * 100, *(f"!!  {line}" for line in lines), "!" * 100 + "\n", sep="\n", file=sys.stderr, flush=True)


def collect_in_chunks(worker, jobs: list[tuple], description: str, processes: int | None = None, renders=False) -> list:
    """`worker(*job)` for every job, on all cores; the results in the jobs' order, whatever the number of cores.

    worker: a function of a module, which draws its random numbers from a seed in its job. jobs: tuples whose last entry
    is a number of transitions, for the progress bar. renders: the worker draws images.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes, results = min(processes or cores, len(jobs)), []
    # Forked where that is possible, because a spawned process imports the whole script again; but after a fork a
    # renderer waits for ever for the threads of its parent's driver.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() and not renders else "spawn"
    ignore_ctrl_c = {
        "initializer": signal.signal,
        "initargs": (signal.SIGINT, signal.SIG_IGN),
    }  # this process sees to it
    with (
        tqdm(total=sum(job[-1] for job in jobs), desc=description, unit="step", mininterval=0.5) as bar,
        ProcessPoolExecutor(processes, multiprocessing.get_context(method), **ignore_ctrl_c) as pool,
    ):
        try:
            for job, result in zip(jobs, pool.map(worker, *zip(*jobs))):
                results.append(result)
                bar.update(job[-1])
        except BrokenProcessPool as error:
            raise TaskError(f"{description}: a process ended unexpectedly; was memory short?") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():  # not to wait for the chunks under way
                process.terminate()
            raise
    return results
