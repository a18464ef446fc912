"""``ecar VERB ...``: finds the verb, runs it, turns wrong input into one line, which names flags, and exit code 2.

Nothing heavy is imported before the verb is known: ``ecar --help`` answers at once.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VERBS = {
    "fit": "a folder of pictures becomes a model and a report, in one command",
    "sample": "generate images from a model",
    "edit": "change a picture: parts of it, variations, margins, finer detail",
    "train": "train a model on images (the same command again resumes)",
    "tokenizer": "train the small convolutional autoencoder",
    "neon": "negative extrapolation from self-training: a better model, without data",
    "critic": "learn to tell a model's samples from real images, to choose among candidates",
    "encode": "encode a data set to latents once",
    "data": "check a data set: broken, tiny, odd and duplicate images",
    "evaluate": "compare samples with real images",
    "estimate": "parameters, memory, FLOPs and time of a model that does not exist yet",
    "info": "describe a model",
    "push": "publish a model on the Hub, or write the folder that would be uploaded",
    "serve": "serve a model: OpenAI images API and a web page",
    "completion": "print a script that completes commands, flags and class names in bash or zsh",
}
OK, FAILED, WRONG_INPUT = 0, 1, 2
_PACKAGE = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 1 failed, 2 wrong input)."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return OK if args else WRONG_INPUT
    if args[0] == "--version":
        from ecar import __version__

        print(f"ecar {__version__}")
        return OK
    if args[:2] == ["completion", "names"]:  # asked at every press of Tab: nothing else is imported
        from ecar.cli.names import completions

        print("\n".join(completions(args[2] if len(args) > 2 else "", args[3:])))
        return OK
    verb = args.pop(0)
    if verb not in VERBS:
        return _refuse(f"unknown command {verb!r}; choose one of {', '.join(VERBS)}")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that it has no letters for must not cost a whole report
        sys.stdout.reconfigure(errors="backslashreplace")
    module = importlib.import_module(f"ecar.cli.{verb}")
    try:
        with _warnings_in_words():
            module.run(args)
    except KeyboardInterrupt:
        print("ecar: interrupted", file=sys.stderr)
        return FAILED
    except (ValueError, ImportError, RuntimeError, OSError) as error:
        if os.environ.get("ECAR_TRACEBACK"):
            raise
        return _failed(error, module.OPTIONS)
    return OK


def _failed(error: Exception, options: type) -> int:
    """Say in one line what is wrong; the exit code."""
    if getattr(error, "said", False):  # by process 0 of those that torchrun started
        return WRONG_INPUT
    if isinstance(error, ValueError):
        from ecar.cli.options import name_flags

        return _refuse(name_flags(str(error), options))
    if isinstance(error, ImportError):
        return _refuse(f"a package is missing ({error.name}); install it with: pip install 'ecar[all]'")
    if isinstance(error, PermissionError):
        return _refuse(f"{error.filename}: permission denied" if error.filename else str(error))
    print(f"ecar: {_one_line(str(error))}", file=sys.stderr)
    return FAILED


@contextmanager
def _warnings_in_words() -> Iterator[None]:
    """Warnings of this package on one line, without the place in its source that Python would print."""
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
        if category is UserWarning and Path(filename).is_relative_to(_PACKAGE):
            print(f"WARNING: {_one_line(str(message))}", file=sys.stderr)
        else:
            before(message, category, filename, *rest, **more)

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = before


def _refuse(message: str) -> int:
    print(f"ecar: {_one_line(message)}", file=sys.stderr)
    return WRONG_INPUT


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _help() -> str:
    lines = [f"  {verb:11} {text}" for verb, text in VERBS.items()]
    return "\n".join(
        [
            "usage: ecar COMMAND [options]        (ecar COMMAND --help lists the options)",
            "",
            "Fast image generation with continuous autoregressive models.",
            "",
            *lines,
            "",
            "  --version  print the version",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
