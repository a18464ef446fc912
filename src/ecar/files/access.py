"""Who may read a file: what libraries write for its owner alone, and what they call missing where it is not theirs."""

from __future__ import annotations

import os
from pathlib import Path


def check_readable(path: Path) -> None:
    """ValueError where this user may not read a file, or enter a folder. What is not there passes: whoever reads it
    says so. Asked first, since libraries call a file that may not be read one that is not there."""
    try:
        if path.is_dir():
            os.stat(os.path.join(path, "."))  # asks for leave to enter; pathlib would drop the dot
        else:
            with open(path, "rb"):
                pass
    except PermissionError:
        raise ValueError(
            f"{path}: permission denied: this user may not read it; its owner can change that with: chmod -R a+rX"
        ) from None
    except (OSError, ValueError):  # a name that no file can have, too
        pass


def usual_mode(file: Path) -> None:
    """Give a file the mode of any new file, 0666 without the umask's bits. safetensors writes 0600 from version 0.8 on,
    and what one user trains would be nobody else's to use."""
    probe = file.with_name(f"{file.name}.mode.{os.getpid()}.tmp")  # to ask for the umask is to change it
    probe.touch()
    file.chmod(probe.stat().st_mode & 0o777)
    probe.unlink()
