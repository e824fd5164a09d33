"""Published weights over a loopback server that behaves in every way a network does."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_random_sam import build_random_sam

from lightning_samrefine import load_sam
from lightning_samrefine.models import download
from lightning_samrefine.models import registry as loading
from lightning_samrefine.models.download import DownloadError, RemoteFile, fetch
from lightning_samrefine.utils.cache_dir import home

CONTENT = bytes(range(256)) * 1200
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`; the other attributes say in which way it misbehaves."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.cut_after = None  # bytes an answer, however many were promised
        self.ranges = True
        self.promises = True  # a Content-Length
        self.status = None
        self.pause = 0.0  # seconds between blocks
        self.requests = []  # the Range header of each

    def file(self, **other):
        url = f"http://127.0.0.1:{self.server_port}/models/sam.pth"
        return RemoteFile(**{"url": url, "sha256": SHA256, "size": len(CONTENT), **other})


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.requests.append(wanted)
        if server.status is not None:
            self.send_error(server.status)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if not server.ranges:
            start = 0
        if start >= len(server.content) > 0:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            end = len(server.content)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
        body = server.content[start:]
        if server.promises:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for begin in range(0, len(body[: server.cut_after]), 1 << 16):
            self.wfile.write(body[: server.cut_after][begin : begin + (1 << 16)])
            time.sleep(server.pause)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _online_and_quick(monkeypatch):
    for name in ("SAMREFINE_OFFLINE", "HF_HUB_OFFLINE", "SAMREFINE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "_PAUSES_S", (0.01, 0.01))


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_a_file_is_fetched_once(server, tmp_path):
    path = fetch(server.file(), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "sam.pth"
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["sam.pth"]
    assert fetch(server.file(), path.parent) == path
    assert server.requests == [None]


def test_a_truncated_response_is_continued(server, tmp_path):
    server.cut_after = 100_000
    assert fetch(server.file(), tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, *(f"bytes={n}00000-" for n in (1, 2, 3))]


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.ranges = False
    (tmp_path / "sam.pth.part").write_bytes(CONTENT[:5000])
    assert fetch(server.file(), tmp_path).read_bytes() == CONTENT
    assert server.requests == ["bytes=5000-"]


def test_what_an_interrupted_run_left_is_used(server, tmp_path):
    server.cut_after = 0
    (tmp_path / "sam.pth.part").write_bytes(CONTENT[:70_000])
    with pytest.raises(DownloadError, match=r"70000 of 307200 bytes arrived"):
        fetch(server.file(), tmp_path)
    assert names(tmp_path) == ["sam.pth.part"]
    server.cut_after = None
    server.requests.clear()
    assert fetch(server.file(), tmp_path).read_bytes() == CONTENT
    assert server.requests == ["bytes=70000-"]


@pytest.mark.parametrize("left", [b"other" * 100, CONTENT[:-1] + b"?", CONTENT + b"more"])
def test_leftovers_of_another_file_are_replaced(server, tmp_path, left):
    (tmp_path / "sam.pth.part").write_bytes(left)
    assert fetch(server.file(), tmp_path).read_bytes() == CONTENT
    assert names(tmp_path) == ["sam.pth"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT[::-1], f"what arrived has the sha256 {hashlib.sha256(CONTENT[::-1]).hexdigest()}"),
        (CONTENT + b"more", "the server's file has 307204 bytes instead of 307200"),
        (CONTENT[:1000], "the server's file has 1000 bytes instead of 307200"),
    ],
)
def test_a_corrupted_file_never_gets_its_name(server, tmp_path, content, message):
    server.content = content
    with pytest.raises(DownloadError, match=message) as info:
        fetch(server.file(), tmp_path)
    for named in (server.file().url, str(tmp_path), SHA256):
        assert named in str(info.value)
    assert "sam.pth" not in names(tmp_path)
    server.content = CONTENT
    assert fetch(server.file(), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT + b"more", "more than 307200 bytes arrived"),
        (CONTENT[:1000], r"\(1000 of 307200 bytes arrived\)"),
    ],
)
def test_a_server_that_promises_no_length_is_stopped(server, tmp_path, content, message):
    server.content, server.promises = content, False
    with pytest.raises(DownloadError, match=message):
        fetch(server.file(), tmp_path)
    assert len(server.requests) < 6


@pytest.mark.parametrize(("status", "attempts"), [(404, 1), (503, 3)])
def test_a_refusal_is_reported(server, tmp_path, status, attempts):
    server.status = status
    with pytest.raises(DownloadError, match=f"the server returned {status}"):
        fetch(server.file(), tmp_path)
    assert len(server.requests) == attempts


def test_a_refused_connection_is_reported(server, tmp_path):
    file = server.file(url="http://127.0.0.1:9/models/sam.pth")
    with pytest.raises(
        DownloadError, match=r"refused.*URL: http://127\.0\.0\.1:9/.*sha256: [0-9a-f]"
    ):
        fetch(file, tmp_path)


def test_a_server_that_stalls_is_given_up_and_continued(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT_S", 0.2)
    monkeypatch.setattr(download, "_CHUNK", 1 << 14)
    server.pause = 0.5  # each attempt sees one block and then silence
    assert fetch(server.file(), tmp_path).read_bytes() == CONTENT
    assert len(server.requests) > 2


@pytest.mark.parametrize("name", ["SAMREFINE_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_there_is_no_request(server, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(DownloadError, match=f"{name} is set, so it is not downloaded"):
        fetch(server.file(), tmp_path)
    assert server.requests == []
    (tmp_path / "sam.pth").write_bytes(CONTENT)
    assert fetch(server.file(), tmp_path) == tmp_path / "sam.pth"


def test_a_file_of_the_wrong_size_is_not_used(server, tmp_path):
    (tmp_path / "sam.pth").write_bytes(CONTENT[:10])
    with pytest.raises(DownloadError, match="has 10 bytes instead of 307200; remove it"):
        fetch(server.file(), tmp_path)


@pytest.fixture
def read_only(tmp_path_factory):
    """A folder in which nothing can be made, for root neither."""
    folder = tmp_path_factory.mktemp("read_only")
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        for parent in folder.parents:  # pytest's own are closed to other users
            if parent.stat().st_mode & 0o005 != 0o005:
                parent.chmod(0o755)
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.chmod(0o755)


def test_a_read_only_folder_is_named(server, read_only):
    for folder in (read_only, read_only / "weights"):
        with pytest.raises(
            DownloadError, match=r"PermissionError.*SAMREFINE_HOME moves it"
        ) as info:
            fetch(server.file(), folder)
        assert f"folder: {folder} " in str(info.value)
    assert server.requests == []


def test_a_folder_without_locks_is_named(server, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(download.FileLock, "acquire", refuse)
    with pytest.raises(DownloadError, match=r"support flock\. URL: .*SAMREFINE_HOME moves it"):
        fetch(server.file(), tmp_path)


def test_a_file_in_a_read_only_folder_is_used(server, tmp_path):
    (tmp_path / "sam.pth").write_bytes(CONTENT)
    tmp_path.chmod(0o555)
    try:
        assert fetch(server.file(), tmp_path).read_bytes() == CONTENT
    finally:
        tmp_path.chmod(0o755)
    assert names(tmp_path) == ["sam.pth"]
    assert server.requests == []


FETCH = """
import importlib.util, sys, types
from pathlib import Path
# Without the package's __init__, which loads torch.
from lightning_samrefine.utils import cache_dir
path = Path(cache_dir.__file__).parents[1] / "models" / "download.py"
spec = importlib.util.spec_from_file_location("download", path)
module = sys.modules["download"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
url, sha256, size, folder = sys.argv[1:]
print(module.fetch(module.RemoteFile(url, sha256, int(size)), Path(folder)))
"""


@pytest.mark.slow
def test_of_several_processes_one_downloads(server, tmp_path):
    server.pause = 0.2  # slow enough for the others to arrive meanwhile
    file = server.file()
    command = [sys.executable, "-c", FETCH, file.url, SHA256, str(file.size), str(tmp_path)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert out.strip() == str(tmp_path / "sam.pth"), err
    assert server.requests == [None]
    assert (tmp_path / "sam.pth").read_bytes() == CONTENT


@pytest.mark.slow
def test_a_killed_download_leaves_no_lock_behind(server, tmp_path):
    server.pause = 0.3
    file = server.file()
    command = [sys.executable, "-c", FETCH, file.url, SHA256, str(file.size), str(tmp_path)]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 30
        while not (tmp_path / "sam.pth.part").is_file() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
    assert names(tmp_path) == ["sam.pth.part"]
    server.pause = 0.0
    assert fetch(file, tmp_path).read_bytes() == CONTENT


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert home() == tmp_path / "lightning-samrefine"
    monkeypatch.setenv("SAMREFINE_HOME", str(tmp_path / "mine"))
    assert home() == tmp_path / "mine"
    monkeypatch.delenv("SAMREFINE_HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert home() == Path.home() / ".cache" / "lightning-samrefine"


# --- load_sam ------------------------------------------------------------------------------------


@pytest.fixture
def published(server, tmp_path, monkeypatch):
    """A small model whose weights the server publishes as those of vit_b."""
    path = tmp_path / "made.pth"
    torch.save(build_random_sam(seed=7).state_dict(), path)
    server.content = path.read_bytes()
    file = server.file(sha256=hashlib.sha256(server.content).hexdigest(), size=len(server.content))
    architecture = loading._Architecture(build_random_sam, published=file)
    monkeypatch.setattr(loading, "_ARCHITECTURES", {"vit_b": architecture})
    monkeypatch.setenv("SAMREFINE_HOME", str(tmp_path / "home"))
    return file


def test_a_name_alone_loads_the_published_weights(server, published, tmp_path):
    expected = build_random_sam(seed=7).state_dict()
    for _ in range(2):
        loaded = load_sam("vit_b").module.state_dict()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    assert server.requests == [None]
    assert names(tmp_path / "home" / "weights") == ["sam.pth"]


def test_every_published_file_is_described():
    for name in ("vit_t", "vit_b", "vit_l", "vit_h"):
        file = loading._ARCHITECTURES[name].published
        assert file.url.startswith("https://")
        assert len(file.sha256) == 64
        assert int(file.sha256, 16)
        assert file.size > 1e7
