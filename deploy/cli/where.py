"""Where a command finds the Hotpath it is about: a running `hotpath up` by its data directory, else the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.cli import credentials, runfile
from deploy.cli.procfile import ROOT
from shared.settings import Settings
from shared.settings import load as load_settings

#: From run.json's names to the settings' names.
_FIELDS = {"redis_url": "REDIS_URL", "nats_url": "NATS_URL", "api_key": "GATEWAY_API_KEY", "admin_key": "ADMIN_API_KEY"}


@dataclass(frozen=True)
class Where:
    """A data directory, the run.json in it (None: nothing runs there, or the environment was preferred), and the
    environment that settings are read from."""

    data: Path
    run: dict[str, Any] | None
    env: dict[str, str]

    def settings(self) -> Settings:
        """The settings. Raises SettingsError."""
        return load_settings(self.env)

    def catalogue(self) -> str:
        """The path of the catalogue that is served: what is given, the simulator's own when `hotpath up` started that,
        else the one we ship."""
        if self.env.get("HOTPATH_CATALOG"):
            return self.env["HOTPATH_CATALOG"]
        if self.run is not None and self.run["simulator_url"]:
            return str(self.data / "catalog.toml")
        return str(ROOT / "deploy" / "catalog.toml")


def find(data: str, env: Mapping[str, str] | None = None) -> Where:
    """`--data DIR` means what runs there; without it REDIS_URL decides, where set, else the default directory.

    Raises ValueError when a file in the directory is not what `hotpath up` wrote.
    """
    env = os.environ if env is None else env
    directory = Path(data or env.get("HOTPATH_DATA") or ".hotpath").resolve()
    by_env = not data and bool(env.get("REDIS_URL"))
    run = None if by_env else runfile.read(directory)
    found = {"HOTPATH_DATA": str(directory)}
    if not by_env:
        found |= credentials.read(directory / "secrets.env")
    found |= env
    if run is not None:
        found |= {_FIELDS[name]: str(run[name]) for name in _FIELDS if run.get(name)}
    return Where(directory, run, found)
