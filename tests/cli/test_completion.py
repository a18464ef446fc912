"""Completion as it is typed: real shells with the script loaded, at a terminal of their own."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ecar.cli.completion import script
from ecar.cli.names import completions

SHELLS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
}
BEGIN = {
    "bash": "bind 'set bell-style none'; PS1='> '; source ./{}",
    "zsh": "autoload -Uz compinit; compinit -D -u; PS1='> '; unsetopt beep; source ./{}",
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where `ecar` is a command, and a model has odd names."""
    command = tmp_path / "bin" / "ecar"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ecar "$@"\n')
    command.chmod(0o755)
    (tmp_path / "model").mkdir()
    names = ["Red bird", "it's $5", "cat", "tench, Tinca tinca"]
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model": {"class_names": names}}))
    return tmp_path


def typed(shell: str, home: Path, keys: str) -> list[str]:
    """The words of the command that stands at the prompt after ``keys``, which begin with `ecar`."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (home / "script").write_text(script(shell))
    environment = {
        **os.environ, "PATH": f"{home / 'bin'}:{os.environ['PATH']}", "HOME": str(home), "TERM": "dumb",
        "PYTHONPATH": os.pathsep.join(sys.path), "HISTFILE": "",
    }  # fmt: skip
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        SHELLS[shell], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=home, start_new_session=True
    )
    os.close(theirs)
    try:
        os.write(ours, (BEGIN[shell].format("script") + "; echo loa''ded\n").encode())
        read_until(ours, "loaded\r\n")
        os.write(ours, keys.encode() + b"\x01printf '[%s]' \x05; echo do''ne\n")  # before and after what stands there
        text = read_until(ours, "done\r\n")
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    (line,) = re.findall(r"\[(ecar\].*)\]done\r\n", text)
    return line.split("][")


def read_until(terminal: int, end: str) -> str:
    text, until = "", time.monotonic() + 60
    while end not in text:
        assert time.monotonic() < until, text
        if select.select([terminal], [], [], 1)[0]:
            text += os.read(terminal, 65536).decode(errors="replace")
    return text


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("ecar sample --classes Lun\t", ["--classes", "Luna Moth"]),
        ("ecar sample --classes Julia,lun\t,Vic\t", ["--classes", "Julia,Luna Moth,Viceroy"]),
        ('ecar sample --classes "Lun\tCLOSED --seed 3', ["--classes", "Luna Moth", "--seed", "3"]),
        ("ecar sample cifar10 --classes=fr\t", ["cifar10", "--classes=frog"]),
        ("ecar sample model --classes Re\t,it\t", ["model", "--classes", "Red bird,it's $5"]),
        ("ecar sam\t --per-cl\t 2", ["--per-class", "2"]),
        ("ecar edit cifar10 model/conf\t --class au\t", ["cifar10", "model/config.json", "--class", "automobile"]),
    ],
)
def test_what_is_typed_is_completed(shell: str, home: Path, keys: str, words: list[str]) -> None:
    keys = keys.replace("CLOSED", "" if shell == "bash" else '"')  # bash closes a quote where one name is left
    found = typed(shell, home, keys)
    assert found[2:] == words, found


def test_class_names_are_those_of_the_model_that_is_named_and_need_no_torch(home: Path) -> None:
    assert completions("", ["ecar", "sample", str(home / "model")])[:2] == ["Red\\ bird", "it\\'s\\ \\$5"]
    assert completions('"cat,Re', ["ecar", "edit", str(home / "model"), "x.png"]) == ["cat,Red bird"]
    assert completions("s", ["ecar", "sample", "--seed", "3", "cifar10"]) == ["ship"]
    assert completions("Lu", ["ecar", "sample", "nobody/none"]) == ["Luna\\ Moth"]
    code = "import sys; from ecar.cli.main import main; main(['completion', 'names', 'Jul', 'ecar', 'sample'])"
    code += "; print(sorted({'torch', 'tyro', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["Julia", "[]"]
