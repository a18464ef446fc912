"""``ecar completion``: a script that completes commands, flags and class names in bash or zsh."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from ecar.cli.options import fields_of, parse

_BASH = r"""# ecar in bash: source <(ecar completion bash)
_ecar() {
  local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} flags=
  local names='^(sample --classes|edit --class)$'
  if [[ $current == = ]]; then
    current=
  elif [[ $before == = ]]; then
    before=${COMP_WORDS[COMP_CWORD-2]}
  fi
  case ${COMP_WORDS[1]} in
@FLAGS@
  esac
  COMPREPLY=()
  if ((COMP_CWORD == 1)); then
    COMPREPLY=($(compgen -W '@VERBS@' -- "$current"))
  elif [[ "${COMP_WORDS[1]} $before" =~ $names ]]; then
    mapfile -t COMPREPLY < <("$1" completion names "$current" "${COMP_WORDS[@]:0:COMP_CWORD}" 2>/dev/null)
    compopt -o nospace  # a comma may follow
  elif [[ $current == -* ]]; then
    COMPREPLY=($(compgen -W "$flags" -- "$current"))
  fi
}
complete -o bashdefault -o default -F _ecar ecar"""

_ZSH = r"""#compdef ecar
# ecar in zsh: source <(ecar completion zsh), after compinit
_ecar() {
  local current=${words[CURRENT]} before=${words[CURRENT-1]} start=
  local names='^(sample --classes|edit --class)$'
  local -a flags found
  case ${words[2]} in
@FLAGS@
  esac
  if [[ $current == --*=* ]]; then
    before=${current%%=*} start=$before= current=${current#*=}
  fi
  if ((CURRENT == 2)); then
    compadd -- @VERBS@
  elif [[ "${words[2]} $before" =~ $names ]]; then
    found=("${(@f)$("${words[1]}" completion names "$current" "${(@)words[1,CURRENT-1]}" 2>/dev/null)}")
    compadd -Q -U -S '' -- "${start}"${^found:#}
  elif [[ $current == -* ]]; then
    compadd -- ${=flags}
  else
    _files
  fi
}
compdef _ecar ecar"""


@dataclass(frozen=True, kw_only=True)
class CompletionOptions:
    """Print a script that completes commands, flags and class names."""

    shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional]
    """Whose; load it with: source <(ecar completion bash)"""


OPTIONS = CompletionOptions


def run(arguments: Sequence[str]) -> None:
    """Parse, print."""
    print(script(parse(CompletionOptions, arguments, "completion").shell))


def script(shell: str) -> str:
    """The script for a shell, with all verbs and flags in it: only class names are asked for at a press of Tab."""
    from ecar.cli.main import VERBS

    lines = []
    for verb in VERBS:
        options = importlib.import_module(f"ecar.cli.{verb}").OPTIONS
        flags = " ".join(f"--{name.strip('_').replace('_', '-')}" for name, _ in fields_of(options))
        lines.append(f"    {verb}) flags={flags!r} ;;")
    text = _BASH if shell == "bash" else _ZSH
    return text.replace("@FLAGS@", "\n".join(lines)).replace("@VERBS@", " ".join(VERBS))
