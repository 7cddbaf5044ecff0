"""The Procfile: the one source of the commands that `hotpath up` and honcho run."""

import re
import shlex
import sys
from pathlib import Path
from typing import Final

#: The repository: the Procfile's folder, and the working directory of whatever it starts.
ROOT: Final = Path(__file__).resolve().parents[2]

_LINE: Final = re.compile(r"([A-Za-z0-9_-]{1,32}):\s*(.+)\Z")
_SHELL: Final = frozenset("$`|;&<>*?(){}\\")


class ProcfileError(Exception):
    """The Procfile cannot be run as it stands."""


def parse(text: str) -> dict[str, list[str]]:
    """Process type -> argument list, in the file's order. `python` becomes this interpreter: no PATH is needed.

    Commands are run without a shell, so that a signal reaches the process itself; one that needs a shell is refused.
    """
    commands: dict[str, list[str]] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None:
            raise ProcfileError(f"Procfile line {number}: expected `name: command`")
        name, command = match.groups()
        if _SHELL & set(command):
            raise ProcfileError(f"Procfile line {number}: {name} needs a shell; write a plain command")
        if name in commands:
            raise ProcfileError(f"Procfile line {number}: {name} stands there twice")
        words = shlex.split(command)
        commands[name] = [sys.executable, *words[1:]] if words[0] in {"python", "python3"} else words
    if not commands:
        raise ProcfileError("the Procfile is empty")
    return commands
