"""`python -m tests.ingress.admin_fuzz`: schemathesis' own command against the admin API, with all its phases."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from deploy import servers
from tests.ingress.admin_api import ADMIN, serving


def main() -> int:
    """The exit code of schemathesis."""
    parser = argparse.ArgumentParser(prog="python -m tests.ingress.admin_fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=100, help="so many of each operation")
    examples = parser.parse_args().examples
    with tempfile.TemporaryDirectory() as name:
        directory, port = Path(name), servers.free_port()
        with (
            servers.running(servers.valkey_command(directory, port), port, directory / "log"),
            serving(f"redis://127.0.0.1:{port}/0") as api,
        ):
            command = [sys.executable, "-m", "schemathesis.cli", "run", f"{api.url}/openapi.json"]
            options = ["-H", f"Authorization: Bearer {ADMIN}", "--max-examples", str(examples)]
            return subprocess.run([*command, *options], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
