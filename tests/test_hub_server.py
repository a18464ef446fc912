"""The Hub's faults with a real server on this machine and the real client: a download that breaks off, names that leave
the folder, a revision that moves, one that does not exist."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from conftest import random_model, tiny_config
from ecar.pretrained.folders import save_model, weights_fingerprint
from ecar.tokenizers import PixelTokenizer

HOSTILE = ("../evil.json", "tokenizer/../../../evil.safetensors", "/tmp/evil.json", "pytorch_model.bin")
FINGERPRINT = """
import sys
from ecar.pretrained.folders import load_model, weights_fingerprint
try:
    load_model(sys.argv[1])
    print(weights_fingerprint(sys.argv[1]))
except ValueError as error:
    sys.exit(f"{error}")
"""


class Hub(ThreadingHTTPServer):
    """Serves one repository, ``someone/tiny``: what the client asks for, and no more.

    Attributes:
        revisions: commit -> folder.
        main: commit that the branch is at.
        breaks: name of a file of which only half is sent.
        asked: paths of all requests.
        hostile: names that it lists besides.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.revisions: dict[str, Path] = {}
        self.main, self.breaks, self.asked = "", "", list[str]()
        self.hostile: tuple[str, ...] = HOSTILE

    def handle_error(self, *_: object) -> None:
        """Half answers are meant."""


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0].strip("/")
        hub.asked.append(path)
        if path.startswith("api/models/someone/tiny"):
            revision = path.split("/")[5] if path.count("/") > 4 else "main"
            commit = hub.main if revision == "main" else revision
            if commit not in hub.revisions:
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            folder = hub.revisions[commit]
            names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()] + list(hub.hostile)
            if "/tree/" in self.path:
                entries = [{"type": "file", "path": n, "size": 1, "oid": "0" * 40} for n in names]
                return self.send(200, json.dumps(entries).encode())
            record = {"id": "someone/tiny", "sha": commit, "siblings": [{"rfilename": n} for n in names]}
            return self.send(200, json.dumps(record).encode())
        if path.startswith("someone/tiny/resolve/"):
            commit, name = path.removeprefix("someone/tiny/resolve/").split("/", 1)
            data = (hub.revisions[commit] / name).read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit}
            return self.send(200, data, headers, half=name == hub.breaks)
        return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def send(self, code: int, body: bytes, headers: dict[str, str] | None = None, *, half: bool = False) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if half else body)
        self.close_connection = half

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub() as server:
        for seed, commit in enumerate("ab"):
            folder = tmp_path / commit
            save_model(folder, random_model(tiny_config(), seed=seed), PixelTokenizer(factor=1))
            server.revisions[40 * commit] = folder
        server.main = 40 * "a"
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(hub: Hub, tmp_path: Path, name: str, *, offline: bool = False) -> tuple[int, str, str]:
    """Exit code, the fingerprint of the weights that ``name`` stands for, and the last line of what went wrong."""
    environment = {**os.environ, "HF_HUB_OFFLINE": str(int(offline)), "HF_HOME": str(tmp_path / "cache")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", FINGERPRINT, name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout.strip(), (done.stderr.strip().splitlines() or [""])[-1]


def test_a_download_that_breaks_off_is_never_taken_for_a_model_and_goes_on_later(hub: Hub, tmp_path: Path) -> None:
    hub.breaks = "model.safetensors"
    code, _, message = ask(hub, tmp_path, "someone/tiny")
    assert code == 1 and "the download broke off" in message and "run the same again" in message
    code, _, message = ask(hub, tmp_path, "someone/tiny", offline=True)
    assert code == 1 and ("missing weights" in message or "hf download" in message)
    hub.breaks = ""
    assert ask(hub, tmp_path, "someone/tiny")[:2] == (0, weights_fingerprint(tmp_path / "a"))
    assert ask(hub, tmp_path, "someone/tiny", offline=True)[:2] == (0, weights_fingerprint(tmp_path / "a"))


def test_names_that_leave_the_folder_and_pickles_are_not_even_asked_for(hub: Hub, tmp_path: Path) -> None:
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    assert ask(hub, tmp_path, "someone/tiny")[0] == 0
    new = {p for p in tmp_path.rglob("*") if p.is_file()} - before
    assert new and all(p.is_relative_to(tmp_path / "cache") and "evil" not in p.name for p in new)
    files = {path.split("/", 4)[4] for path in hub.asked if "/resolve/" in path}
    assert "model.safetensors" in files and not any("evil" in name or name.endswith(".bin") for name in files)
    assert not Path("/tmp/evil.json").exists()


def test_a_branch_that_moved_gives_the_new_weights_whole_and_a_commit_the_old_ones(hub: Hub, tmp_path: Path) -> None:
    old, new = (weights_fingerprint(tmp_path / commit) for commit in "ab")
    assert old != new and ask(hub, tmp_path, "someone/tiny")[1] == old
    hub.main = 40 * "b"
    assert ask(hub, tmp_path, "someone/tiny")[1] == new
    assert ask(hub, tmp_path, f"someone/tiny@{40 * 'a'}", offline=True)[1] == old


@pytest.mark.parametrize(
    ("name", "word"), [("someone/tiny@v9", "no such revision"), ("someone/other", "no such repository")]
)
def test_what_does_not_exist_is_said_in_one_line(hub: Hub, tmp_path: Path, name: str, word: str) -> None:
    code, _, message = ask(hub, tmp_path, name)
    assert code == 1 and word in message and name in message
