"""Downloads against a server of our own: kept when right, refused and not kept when wrong."""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from raysparse.data import sources
from raysparse.data.sketch import Download
from raysparse.errors import UsageError

CONTENT = os.urandom(3_000_000)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"only this")
        else:
            super().do_GET()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "data.bin").write_bytes(CONTENT)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.mark.parametrize("pinned", [hashlib.sha256(CONTENT).hexdigest(), None], ids=["pinned", "not pinned"])
def test_a_download_is_kept_and_not_fetched_twice(server: str, pinned: str | None, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = sources.downloaded(
        Download("d.bin", f"{server}/data.bin", pinned), tmp_path, lambda *counts: seen.append(counts)
    )
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert sources.downloaded(Download("d.bin", "http://127.0.0.1:9/", pinned), tmp_path) == path


def test_a_kept_file_that_was_damaged_is_fetched_again(server: str, tmp_path: Path) -> None:
    file = Download("d.bin", f"{server}/data.bin", hashlib.sha256(CONTENT).hexdigest())
    sources.downloaded(file, tmp_path).write_bytes(b"damage")
    assert sources.downloaded(file, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("data.bin", "its sha256 is [0-9a-f]{64}, not 00"),
        ("absent", "cannot download.*404"),
        ("cut", "cannot download"),
    ],
)
def test_a_wrong_download_is_not_kept(server: str, path: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        sources.downloaded(Download("d.bin", f"{server}/{path}", "00" * 32), tmp_path)
    assert list((tmp_path / "sources").iterdir()) == []


def test_no_network(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot download http://127.0.0.1:9/.*--path"):
        sources.downloaded(Download("d.bin", "http://127.0.0.1:9/", None), tmp_path)


def test_content_hash_is_of_names_and_bytes_and_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "0"
    folder.mkdir()
    a, b = folder / "a", folder / "b"
    a.write_bytes(b"1")
    b.write_bytes(b"2")
    first = sources.content_hash([a, b], tmp_path / "root")
    assert sources.content_hash([b, a], tmp_path / "root") != first
    with monkeypatch.context() as patched:
        patched.setattr(sources.files, "sha256", None)  # would fail if it were called
        assert sources.content_hash([a, b], tmp_path / "root") == first
    a.write_bytes(b"3")
    assert sources.content_hash([a, b], tmp_path / "root") != first
    with pytest.raises(UsageError, match=r"cannot read .*absent"):
        sources.content_hash([folder / "absent"], tmp_path / "root")


@pytest.mark.parametrize("damage", [b"", b"\xd3" * 65, b"z" * 64 + b"\n", b"\0" * 64])
def test_a_damaged_memory_of_a_hash_is_made_again(tmp_path: Path, damage: bytes) -> None:
    assert sources.remembered("ab" * 32, tmp_path, lambda: "c" * 64) == "c" * 64
    [memory] = (tmp_path / "sources").iterdir()
    memory.write_bytes(damage)
    assert sources.remembered("ab" * 32, tmp_path, lambda: "d" * 64) == "d" * 64
    assert sources.remembered("ab" * 32, tmp_path, lambda: "e" * 64) == "d" * 64
