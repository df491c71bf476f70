"""Download a file so that it is either there, whole and checked, or not there; a broken transfer is taken up again."""

import http.client
import json
import os
import pathlib
import time
import urllib.error
import urllib.parse
import urllib.request

from tqdm import tqdm

from benchmarks.tasks.dataset import TaskError, cache_dir, file_sha256, verify, write_note, writing_to_cache

TIMEOUT = 20.0  # seconds without a byte after which a server counts as hanging
ATTEMPTS = 4  # broken transfers in a row, each without progress, after which to give up
BLOCK = 2**20


class DownloadError(TaskError):
    """The file cannot be had, and why."""


def download_from(urls, path, sha256: str | None = None, check=None) -> str:
    """`download` from the first of several addresses that has the file; before them `$PARL_MIRROR`, if that is set.

    A mirror is a server, or `file:///folder`, that is laid out as the cache is: a copy of somebody's cache will do.

    Raises:
        DownloadError: none has it, and why not, in one line. TaskError as for `download`.
    """
    path, mirror = pathlib.Path(path), os.environ.get("PARL_MIRROR", "").rstrip("/")
    if mirror and path.is_relative_to(cache_dir()):
        urls = (f"{mirror}/{urllib.parse.quote(path.relative_to(cache_dir()).as_posix())}", *urls)
    reasons = []
    for url in urls:
        try:
            return download(url, path, sha256, check)
        except DownloadError as error:
            reasons.append(str(error))
    raise DownloadError("; ".join(reasons))


def download(url: str, path, sha256: str | None = None, check=None, timeout: float = TIMEOUT) -> str:
    """Fetch `url` into `path` unless that exists, and return the sha256 of its bytes.

    The bytes go to `<path>.partial`, which takes its final name only when it has the length the server announced, the
    sum `sha256` if one is given, and `check(partial)`, if given, raises no TaskError. A transfer that breaks is
    continued where it stopped, in this call or a later one, as long as the server has the same file (its ETag or
    Last-Modified). The sum is kept in a note for `dataset.verify`. A file that is there without a note, put there by
    hand, must have the sum and pass the check as well.

    Raises:
        DownloadError: no connection, an HTTP error, a server that sends nothing for `timeout` seconds, or a file of
            wrong length, sum or content.
        TaskError: the folder cannot be written to.
    """
    path = pathlib.Path(path)
    if os.path.isfile(path):
        return verify(path, check, sha256)
    partial, version_file = path.with_name(path.name + ".partial"), path.with_name(path.name + ".partial.json")
    with writing_to_cache(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        failures = 0
        while True:
            before = partial.stat().st_size if partial.exists() else 0
            reason = _transfer(url, partial, version_file, timeout)
            if reason is None:
                break
            progress = partial.exists() and partial.stat().st_size > before
            failures = 0 if progress else failures + 1
            if failures >= ATTEMPTS or (before == 0 and not progress and failures >= 2):
                raise DownloadError(f"cannot download {url}: {reason}")
            time.sleep(min(5.0, 0.2 * 2**failures))
        digest = file_sha256(partial)
        if sha256 is not None and digest != sha256:
            _forget(partial, version_file)
            raise DownloadError(f"{url} has sha256 {digest[:12]}, expected {sha256[:12]}; it was not kept")
        try:
            if check is not None:
                check(partial)
        except TaskError as error:
            _forget(partial, version_file)
            raise DownloadError(f"what came from {url} was not kept: {error}") from error
        write_note(path, digest)
        os.replace(partial, path)
        version_file.unlink(missing_ok=True)
    return digest


def _forget(partial, version_file) -> None:
    partial.unlink(missing_ok=True)
    version_file.unlink(missing_ok=True)


def _transfer(url: str, partial: pathlib.Path, version_file: pathlib.Path, timeout: float) -> str | None:
    """One request. None when the file is whole, else what broke; raises where trying again is useless."""
    version, have = _known_version(partial, version_file)
    headers = {"Range": f"bytes={have}-", "If-Range": version} if have else {}
    try:
        # no name, no route, no listener: at once a clear answer, which no second attempt will change
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the partial file is longer than the server's: not the same file after all
            partial.unlink(missing_ok=True)
            return "the server's file changed"
        if error.code >= 500:
            return f"HTTP {error.code} {error.reason}"
        raise DownloadError(f"cannot download {url}: HTTP {error.code} {error.reason}") from error
    except TimeoutError as error:
        raise DownloadError(f"cannot download {url}: no answer within {timeout:.0f} s") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise DownloadError(f"cannot download {url}: no answer within {timeout:.0f} s") from error
        raise DownloadError(f"cannot download {url}: {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    with response:
        continued = have > 0 and response.status == 206
        start = have if continued else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        if not continued:
            version_file.write_text(json.dumps({"url": url, "version": version}))
        try:
            with (
                open(partial, "ab" if continued else "wb") as file,
                tqdm(
                    total=total, initial=start, desc=f"downloading {partial.stem[:40]}", unit="B", unit_scale=True
                ) as bar,
            ):
                while block := response.read(BLOCK):
                    file.write(block)
                    bar.update(len(block))
                file.flush()
                os.fsync(file.fileno())
        except TimeoutError:
            return f"the server sent nothing for {timeout:.0f} s"
        except (ConnectionError, http.client.HTTPException) as error:
            return f"the connection broke ({error or type(error).__name__})"
        size = partial.stat().st_size
    if total is None or size == total:
        return None
    if size > total:
        partial.unlink()
    return f"{size} of {total} bytes came"


def _known_version(partial: pathlib.Path, version_file: pathlib.Path) -> tuple[str, int]:
    """What identifies the file that `partial` is the beginning of, and how much of it is there (0: start anew)."""
    try:
        version = json.loads(version_file.read_text())["version"]
        return version, partial.stat().st_size if version else 0
    except (OSError, ValueError, KeyError):
        return "", 0
