"""Downloads against a local HTTP server that behaves well, cuts, hangs, lies and forgets."""

import builtins
import contextlib
import errno
import hashlib
import http.server
import io
import os
import pathlib
import threading
import time

import pytest

from benchmarks.tasks import load_dataset, pointmaze
from benchmarks.tasks.dataset import TaskError, cache_dir, one_at_a_time, verify, write_once
from benchmarks.tasks.download import DownloadError, download, download_from

CONTENT = os.urandom(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@contextlib.contextmanager
def server(answer):
    """Serves `answer(handler, number of the request)`; yields the address and the requests' Range headers."""
    ranges = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            ranges.append(self.headers.get("Range"))
            answer(self, len(ranges))

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/file.hdf5", ranges
    finally:
        httpd.shutdown()
        httpd.server_close()


def send(handler, content=CONTENT, cut=None, etag='"v1"', ranges=True):
    """Send the content from where the client asks for it if it names this version; after `cut` bytes hang up."""
    asked = handler.headers.get("Range")
    start = 0
    if ranges and asked and handler.headers.get("If-Range") == etag:
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
    handler.send_response(206 if start else 200)
    handler.send_header("Content-Length", str(len(content) - start))
    handler.send_header("ETag", etag)
    handler.end_headers()
    with contextlib.suppress(OSError):
        handler.wfile.write(content[start:] if cut is None else content[start : start + cut])
    handler.close_connection = True


def left_behind(path):
    """Files that are there, without the lock and notes."""
    return sorted(p.name for p in path.parent.iterdir() if not p.name.endswith(".json"))


def test_a_good_file_is_fetched_once_and_verified_later(tmp_path):
    path = tmp_path / "deep" / "file.hdf5"
    with server(lambda handler, n: send(handler)) as (url, ranges):
        assert download(url, path, SHA256) == SHA256 == verify(path)
        assert download(url, path) == SHA256  # from the disk
        assert len(ranges) == 1
    assert path.read_bytes() == CONTENT and left_behind(path) == ["file.hdf5"]
    path.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(TaskError, match="changed on disk"):
        download(url, path)


def test_a_cut_connection_is_taken_up_where_it_broke(tmp_path):
    path = tmp_path / "file.hdf5"
    with server(lambda handler, n: send(handler, cut=1_000_000)) as (url, ranges):
        assert download(url, path) == SHA256
    assert ranges == [None, "bytes=1000000-", "bytes=2000000-"]


def test_a_later_run_takes_up_what_an_earlier_one_left(tmp_path):
    path = tmp_path / "file.hdf5"
    with server(lambda handler, n: send(handler, cut=700_000 if n == 1 else 0)) as (url, _):
        with pytest.raises(DownloadError, match="700000 of 3000000 bytes"):
            download(url, path)
    assert left_behind(path) == ["file.hdf5.partial"]  # nothing that a later run would take for the file
    with server(lambda handler, n: send(handler)) as (url, ranges):
        assert download(url, path) == SHA256
    assert ranges == ["bytes=700000-"]


@pytest.mark.parametrize("kind", ["changed", "no ranges"])
def test_a_file_that_changed_meanwhile_is_not_glued_together(tmp_path, kind):
    path, new = tmp_path / "file.hdf5", CONTENT[::-1]
    with server(lambda handler, n: send(handler, cut=700_000 if n == 1 else 0)) as (url, _):
        with pytest.raises(DownloadError):
            download(url, path)
    with server(lambda handler, n: send(handler, new, etag='"v2"', ranges=kind == "changed")) as (url, _):
        assert download(url, path) == hashlib.sha256(new).hexdigest()


@pytest.mark.parametrize("wrong", ["sum", "content"])
def test_a_wrong_file_is_not_kept(tmp_path, wrong):
    def check(path):
        raise TaskError("no HDF5 file")

    path = tmp_path / "file.hdf5"
    with server(lambda handler, n: send(handler)) as (url, _):
        with pytest.raises(DownloadError, match="expected 0000|no HDF5 file"):
            download(url, path, "0" * 64 if wrong == "sum" else None, check if wrong == "content" else None)
    assert left_behind(path) == []


def test_more_bytes_than_announced_never_make_a_file(tmp_path):
    """A partial file longer than the server's (another file's beginning) is thrown away, not kept."""
    path = tmp_path / "file.hdf5"
    with server(lambda handler, n: send(handler, cut=700_000 if n == 1 else 0)) as (url, _):
        with pytest.raises(DownloadError):
            download(url, path)
    with open(tmp_path / "file.hdf5.partial", "ab") as file:
        file.write(bytes(len(CONTENT)))

    def answer(handler, number):
        if handler.headers.get("Range"):
            handler.send_error(416)
        else:
            send(handler)

    with server(answer) as (url, ranges):
        assert download(url, path) == SHA256
    assert len(ranges) == 2 and ranges[1] is None


@pytest.mark.parametrize("code, requests", [(404, 1), (403, 1), (500, 2)])
def test_http_errors_end_in_one_line(tmp_path, code, requests):
    with server(lambda handler, n: handler.send_error(code)) as (url, ranges):
        with pytest.raises(DownloadError, match=f"HTTP {code}") as error:
            download(url, tmp_path / "file.hdf5")
    assert "\n" not in str(error.value) and len(ranges) == requests


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_server_that_hangs_is_given_up(tmp_path, when):
    done = threading.Event()

    def answer(handler, number):
        if when == "during":
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(CONTENT)))
            handler.end_headers()
            handler.wfile.write(CONTENT[:1000])
            handler.wfile.flush()
        done.wait(20)

    started = time.monotonic()
    with server(answer) as (url, _):
        with pytest.raises(DownloadError, match="no answer within|sent nothing for"):
            download(url, tmp_path / "file.hdf5", timeout=0.3)
        done.set()
    assert time.monotonic() - started < 15 and not (tmp_path / "file.hdf5").exists()


def test_no_server_and_no_folder_end_in_one_line(tmp_path):
    with pytest.raises(DownloadError, match="refused"):
        download("http://127.0.0.1:9/file.hdf5", tmp_path / "file.hdf5")
    with server(lambda handler, n: send(handler)) as (url, _):
        with pytest.raises(TaskError, match="PARL_CACHE"):
            download(url, "/proc/nowhere/file.hdf5")


# --- The cache: locks, notes and a home folder are conveniences ---


@pytest.fixture
def read_only(monkeypatch, tmp_path):
    """Once called, nothing below tmp_path can be written (root ignores permissions, so they will not do)."""

    def refuse(path):
        if str(tmp_path) in str(path):
            raise OSError(errno.EROFS, "Read-only file system", str(path))

    def guarded(function):
        def call(path, *args, **kwargs):
            refuse(path)
            return function(path, *args, **kwargs)

        return call

    def open_for_reading(path, mode="r", *args, open=io.open, **kwargs):
        if set(mode) & set("wax+"):
            refuse(path)
        return open(path, mode, *args, **kwargs)

    def switch():
        for module in (builtins, io):
            monkeypatch.setattr(module, "open", open_for_reading)
        for name in ("mkdir", "replace", "unlink"):
            monkeypatch.setattr(os, name, guarded(getattr(os, name)))
        access = os.access
        monkeypatch.setattr(
            os, "access", lambda path, mode: not (mode & os.W_OK and str(tmp_path) in str(path)) and access(path, mode)
        )

    return switch


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    fcntl = pytest.importorskip("fcntl")
    asked = []

    def flock(*args):
        asked.append(args)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with one_at_a_time(tmp_path / "deep" / "file"):
        write_once(tmp_path / "deep" / "file", lambda file: file.write(b"data"))
    assert asked and (tmp_path / "deep" / "file").read_bytes() == b"data"


def test_a_lock_that_belongs_to_somebody_else(tmp_path, monkeypatch):
    """In a shared folder: it cannot be opened, but the folder can be written to."""
    (tmp_path / "file.lock").mkdir()  # what not even root can open for writing
    with one_at_a_time(tmp_path / "file"):
        write_once(tmp_path / "file", lambda file: file.write(b"data"))
    assert verify(tmp_path / "file")


@pytest.mark.parametrize("note", ["there", "absent"])
def test_a_read_only_cache_that_holds_the_data(tmp_path, monkeypatch, read_only, note):
    monkeypatch.setenv("PARL_CACHE", str(tmp_path))
    first = load_dataset("pointmaze-umaze-v0", size=50)
    for path in list(tmp_path.rglob("*.lock")) + (list(tmp_path.rglob("*.json")) if note == "absent" else []):
        path.unlink()
    before = sorted(tmp_path.rglob("*"))
    read_only()
    assert load_dataset("pointmaze-umaze-v0", size=50).sha256 == first.sha256
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(
        TaskError, match="Read-only file system.*PARL_CACHE"
    ) as caught:  # other data, before collecting it
        load_dataset("pointmaze-umaze-v0", size=60)
    assert "\n" not in str(caught.value)


def test_a_read_only_cache_without_the_data_is_said_before_it_is_collected(tmp_path, monkeypatch, read_only):
    monkeypatch.setenv("PARL_CACHE", str(tmp_path))
    monkeypatch.setattr(pointmaze, "collect", lambda *args: pytest.fail("collected in vain"))
    (tmp_path / "pointmaze").mkdir()
    read_only()
    with pytest.raises(TaskError, match="set PARL_CACHE"):
        load_dataset("pointmaze-umaze-v0", size=50)


@pytest.mark.parametrize("note", [None, "", "{", "[]", "{}", '{"sha256": null}', '{"sha256": 5}'])
def test_a_file_put_into_the_cache_by_hand(tmp_path, note):
    path, checked = tmp_path / "file.hdf5", []
    path.write_bytes(CONTENT)
    note_file = tmp_path / "file.hdf5.json"
    if note is not None:
        note_file.write_text(note)
    assert download("http://127.0.0.1:9/", path, check=checked.append) == SHA256 and checked == [path]
    assert download("http://127.0.0.1:9/", path, check=checked.append) == SHA256 and checked == [path]  # noted
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(TaskError, match="changed on disk.*delete it to build it anew"):
        download("http://127.0.0.1:9/", path)


def test_a_wrong_file_put_into_the_cache_by_hand_is_refused_and_not_noted(tmp_path):
    def refuse(path):
        raise TaskError(f"{path} is no HDF5 file")

    path = tmp_path / "file.hdf5"
    path.write_bytes(CONTENT)
    for sha256, check, expected in (("0" * 64, None, "not the published file"), (None, refuse, "is no HDF5 file")):
        with pytest.raises(TaskError, match=f"{path}.*{expected}.*delete") as caught:
            download("http://127.0.0.1:9/", path, sha256, check)
        assert "both" not in str(caught.value) and "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["file.hdf5"]


def test_no_home_folder(tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", no_home)
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    monkeypatch.setenv("PARL_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("PARL_CACHE")
    for env_id in ("pointmaze-umaze-v0", "antmaze-umaze-v2", "kitchen-mixed-v2", "cube-single-play-singletask-v0"):
        with pytest.raises(TaskError, match="set PARL_CACHE") as caught:
            load_dataset(env_id)
        assert "\n" not in str(caught.value)


def test_addresses_are_tried_in_order_and_a_mirror_before_them(tmp_path, monkeypatch):
    """The first that has the file; what another one began is not continued; a mirror is laid out as the cache."""
    monkeypatch.setenv("PARL_CACHE", str(tmp_path))
    monkeypatch.setenv("PARL_MIRROR", "")
    path, dead = tmp_path / "ogbench" / "a b.npz", "http://127.0.0.1:9/a.npz"
    with (
        server(lambda handler, n: handler.send_error(404)) as (missing, asked),
        server(lambda h, n: send(h)) as (good, got),
    ):
        path.parent.mkdir()
        path.with_name("a b.npz.partial").write_bytes(b"of another server")
        path.with_name("a b.npz.partial.json").write_text('{"version": "\\"v2\\""}')
        assert download_from([dead, missing, good], path, SHA256) == SHA256 and path.read_bytes() == CONTENT
        assert len(asked) == 1 and len(got) == 1
        path.unlink()
        with pytest.raises(DownloadError) as caught:
            download_from([dead, missing], path)
        message = str(caught.value)
        assert dead in message and f"{missing}: HTTP 404" in message and "\n" not in message
    paths = []
    with server(lambda handler, n: (paths.append(handler.path), send(handler))) as (url, _):
        monkeypatch.setenv("PARL_MIRROR", url.removesuffix("/file.hdf5") + "/")
        assert download_from([dead], path, SHA256) == SHA256 and paths == ["/ogbench/a%20b.npz"]
        path.unlink()
        monkeypatch.setenv("PARL_MIRROR", (tmp_path / "copy").as_uri())
        (tmp_path / "copy" / "ogbench").mkdir(parents=True)
        (tmp_path / "copy" / "ogbench" / "a b.npz").write_bytes(CONTENT)
        assert download_from([dead], path, SHA256) == SHA256 and len(paths) == 1
        path.unlink()
        (tmp_path / "copy" / "ogbench" / "a b.npz").write_bytes(CONTENT[:-1])
        with pytest.raises(DownloadError, match="expected"):
            download_from([dead], path, SHA256)
    assert not path.exists()
