"""The dataset container, and reading and writing it: atomic, verified, without pickle."""

import hashlib
import os
import pathlib
import zipfile
from dataclasses import dataclass

import numpy as np

ARRAYS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")


class TaskError(ValueError):
    """Something a person can put right; the message is one line that says how."""


@dataclass
class Dataset:
    """N transitions in recorded order: a trajectory is a run of rows that ends where `terminals` or `timeouts` is set."""

    observations: np.ndarray
    """(N, O) float32."""
    actions: np.ndarray
    """(N, A) float32, in the environment's action space."""
    rewards: np.ndarray
    """(N,) float32, as the environment gives them (no bias, no scale)."""
    next_observations: np.ndarray
    """(N, O) float32."""
    terminals: np.ndarray
    """(N,) bool: the state after this row is absorbing."""
    timeouts: np.ndarray
    """(N,) bool: the trajectory was cut after this row, and its last state is not absorbing."""
    source: str = ""
    """Where it came from: a path or `collected locally ...`."""
    sha256: str = ""
    """Of the file's bytes."""

    def __len__(self) -> int:
        return len(self.rewards)


def cache_dir() -> pathlib.Path:
    """Folder of downloaded and collected data: `$PARL_CACHE`, else `~/.cache/parl`."""
    return pathlib.Path(os.environ.get("PARL_CACHE") or pathlib.Path.home() / ".cache" / "parl")


def read_npz(path, sha256: str | None = None) -> Dataset:
    """Read a dataset written by `write_npz` (or any `.npz` with the six arrays).

    Args:
        path: the file.
        sha256: what its bytes must hash to; None skips the check.
    Raises:
        TaskError: missing, truncated, changed, lacking an array, or arrays of different length.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise TaskError(f"no dataset file at {path}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 is not None and digest != sha256:
        raise TaskError(f"{path} changed on disk (sha256 {digest[:12]}, expected {sha256[:12]}); delete it to build it anew")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in ARRAYS if name not in file]
            if missing:
                raise TaskError(f"{path} has no array {missing[0]!r}; a dataset needs {', '.join(ARRAYS)}")
            arrays = {name: file[name] for name in ARRAYS}
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        if isinstance(error, TaskError):
            raise
        raise TaskError(f"{path} is not a readable .npz file, or it is truncated ({error})") from error
    lengths = {name: len(array) if array.ndim else -1 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise TaskError(f"{path} has arrays of different length: {lengths}")
    for name in ("observations", "actions", "rewards", "next_observations"):
        if not np.issubdtype(arrays[name].dtype, np.number):
            raise TaskError(f"{path}: {name} has dtype {arrays[name].dtype}; it must be a number")
        arrays[name] = arrays[name].astype(np.float32)
    for name in ("terminals", "timeouts"):
        arrays[name] = arrays[name].astype(bool)
    return Dataset(**arrays, source=str(path), sha256=digest)


def write_npz(path, dataset: Dataset) -> str:
    """Write a dataset so that `path` either holds all of it or does not exist; return the sha256 of its bytes."""
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two processes may collect the same data
        try:
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **{name: getattr(dataset, name) for name in ARRAYS})
                file.flush()
                os.fsync(file.fileno())
            digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise TaskError(f"cannot write the dataset to {path} ({error.strerror}); set PARL_CACHE to another folder") from error
    return digest
