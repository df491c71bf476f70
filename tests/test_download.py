"""Downloads against a local HTTP server that behaves well, cuts, hangs, lies and forgets."""

import contextlib
import hashlib
import http.server
import os
import threading
import time

import pytest

from benchmarks.tasks.dataset import TaskError, verify
from benchmarks.tasks.download import DownloadError, download

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
