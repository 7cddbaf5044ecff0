"""DIR/run.json: where everything of a running `hotpath up` is to be found, kept current while it runs (mode 0600)."""

import contextlib
import json
from pathlib import Path
from typing import Any, Final

from deploy.cli.credentials import write_private

ROLES: Final = ("ingress", "guardian", "routing", "provider", "nats", "redis", "simulator")


class RunFile:
    """What stands in the file, and the file. Every change replaces it in one step: a reader never sees half."""

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        self.path = path
        self.fields = fields
        self.metrics: dict[str, dict[int, str]] = {role: {} for role in ROLES}  # role -> pid -> URL
        self.pids: dict[str, set[int]] = {role: set() for role in ROLES}
        self._open = False

    def open(self) -> None:
        """From now on changes are written."""
        self._open = True
        self._write()

    def add(self, role: str, pid: int, metrics: str) -> None:
        """A process is ready."""
        self.pids.setdefault(role, set()).add(pid)
        self.metrics.setdefault(role, {})
        if metrics:
            self.metrics[role][pid] = metrics
        self._write()

    def remove(self, pid: int) -> None:
        """A process is gone."""
        known = [role for role, pids in self.pids.items() if pid in pids]
        for role in known:
            self.pids[role].discard(pid)
            self.metrics[role].pop(pid, None)
        if known:
            self._write()

    def close(self) -> None:
        """Nothing runs any more: no file, so that nobody takes old addresses for live ones."""
        self._open = False
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def _write(self) -> None:
        if not self._open:
            return
        lists = {
            "metrics": {role: list(urls.values()) for role, urls in self.metrics.items()},
            "pids": {role: sorted(pids) for role, pids in self.pids.items()},
        }
        write_private(self.path, json.dumps(self.fields | lists, indent=2) + "\n")


def read(data: Path) -> dict[str, Any] | None:
    """The run.json of a running `hotpath up` on this directory, or None."""
    try:
        text = (data / "run.json").read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    run = json.loads(text)
    return run if isinstance(run, dict) else None
