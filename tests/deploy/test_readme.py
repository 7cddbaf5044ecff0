"""Every command in README.md is run: here, or by the test that is named here (acceptance 8)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.cli import procfile
from tests.e2e.rig import Up

README = (procfile.ROOT / "README.md").read_text("utf-8")
#: A block's own commands, and those in the prose.
BLOCKS = [
    line for block in re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE) for line in block.splitlines()
]
PROSE = [
    span
    for span in re.findall(
        r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    )
    if re.match(r"(\./deploy/|([A-Z_]+=\S+ )?(\.venv/bin/)?(hotpath|honcho|python) |\. \.venv)", span)
]

EDGE = "tests/load/test_edge.py::test_a_thousand_at_once_from_four_processes"
MACHINE = "tests/state/test_ledger_machine.py::test_the_ledger_equals_the_model"
OUTAGES = "tests/e2e/test_outages_redis.py::test_outages_in_turn"
HISTORIES = "LEDGER_SEQUENCES=2000 .venv/bin/python -m pytest -q -s --timeout 3000 tests/state/test_ledger_machine.py"

#: Commands that cannot be run from inside the tests, or need values: the test that runs each.
ELSEWHERE = {
    "./deploy/up": "tests/deploy/test_fresh.py::test_a_fresh_clone",
    "./deploy/test": "tests/deploy/test_readme.py::test_the_test_command_is_the_cis",
    "./deploy/test --interop": "tests/deploy/test_readme.py::test_the_test_command_is_the_cis",
    "hotpath up": "tests/deploy/test_supervisor.py::test_life",
    "hotpath up --scale guardian=2,provider=2": "tests/deploy/test_supervisor.py::test_life",
    "hotpath restart all": "tests/e2e/test_rolling.py::test_every_role_is_replaced_under_load",
    "hotpath doctor": "tests/deploy/test_commands.py::test_doctor_of_a_healthy_one",
    "hotpath trace RID": "tests/e2e/test_path.py::test_four_processes",
    "hotpath env --role provider": "tests/deploy/test_commands.py::test_env_of_a_role",
    "hotpath circuits": "tests/e2e/test_circuits.py::test_two_hundred_at_once_are_one_call",
    "hotpath prices show MODEL": "tests/deploy/test_commands.py::test_prices",
    "python -m tests.ingress.admin_fuzz": "tests/ingress/test_admin_openapi.py::test_every_operation",
    "hotpath keys set": "tests/deploy/test_tenants.py::test_a_key_with_everything",
    "hotpath keys revoke": "tests/deploy/test_commands.py::test_keys",
    "hotpath tenant show": "tests/deploy/test_tenants.py::test_policies",
    "hotpath ledger show acme": "tests/deploy/test_readme.py::test_the_prose",
    "honcho start -c ingress=2,guardian=2,provider=4": "tests/deploy/test_honcho.py::test_scaled_against_given_servers",
    "honcho start -f deploy/Procfile.dev": "tests/deploy/test_honcho.py::test_procfile_dev",
    "WORKER_ROLES=guardian,routing,provider python -m workers": "tests/deploy/test_honcho.py::test_one_worker_process",
    ".venv/bin/python -m tests.e2e.rounds --rounds 20": "tests/e2e/test_kills.py::test_killed_and_frozen_under_load",
    ".venv/bin/python -m tests.e2e.kill_points --times 3": "tests/e2e/test_kills.py::test_every_kill_point",
    ".venv/bin/python -m tests.e2e.money --times 10": "tests/e2e/money/test_money_matrix.py::test_lost_answers",
    ".venv/bin/python -m tests.e2e.chaos --minutes 10": "tests/e2e/test_blows.py::test_a_few_seconds_of_chaos",
    ".venv/bin/python -m tests.load slow-reader": "tests/e2e/test_flow.py::test_a_slow_reader",
    ".venv/bin/python -m tests.load stalled": "tests/e2e/test_flow.py::test_stalled_clients",
    ".venv/bin/python -m tests.load soak": "tests/e2e/test_soak.py::test_a_soak",
    ".venv/bin/hotpath ledger verify": "tests/e2e/money/test_money_matrix.py::test_a_server_killed",
    "hotpath ledger verify": "tests/e2e/money/test_money_matrix.py::test_a_server_killed",
    "hotpath ledger rebuild": "tests/e2e/money/test_money_matrix.py::test_redis_one_second_older",
    "hotpath reconcile": "tests/e2e/money/test_money_matrix.py::test_lost_answers",
    "hotpath reconcile --bill FILE.jsonl": "tests/e2e/money/test_money_matrix.py::test_lost_answers",
    ".venv/bin/python -m tests.load edge --rounds 200": EDGE,
    HISTORIES: MACHINE,
    "OUTAGES=1 .venv/bin/python -m pytest -q tests/e2e/test_outages_redis.py": OUTAGES,
    ".venv/bin/python -m pytest -q tests/e2e/test_leaving.py": "tests/e2e/test_leaving.py::test_at_every_event",
    ". .venv/bin/activate": "tests/deploy/test_fresh.py::test_a_fresh_clone",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything of the repository in it, where a command may write, and this interpreter as .venv."""
    directory = tmp_path_factory.mktemp("readme")
    for entry in procfile.ROOT.iterdir():
        if not entry.name.startswith("."):
            (directory / entry.name).symlink_to(entry)
    (directory / ".venv").mkdir()
    scripts = directory / ".venv" / "bin"
    scripts.mkdir()
    for name, module in (("python", ""), ("honcho", "-m honcho"), ("hotpath", "-m deploy.cli")):
        script = scripts / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
        script.chmod(0o755)
    return directory


def shell(command: str, folder: Path, up: Up) -> None:
    """As typed in a second terminal while `./deploy/up` runs."""
    path = f"{folder}/.venv/bin{os.pathsep}{os.environ['PATH']}"
    env = {**up.env, "HOTPATH_DATA": str(up.data), "PATH": path, "ADMIN_URL": up.run["admin_url"]}
    done = subprocess.run(
        ["sh", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def test_there_are_commands() -> None:
    """The extractor finds them."""
    assert "./deploy/up" in BLOCKS
    assert len(BLOCKS) >= 5
    assert len(PROSE) >= 5


def test_the_blocks(up: Up, folder: Path) -> None:
    """Each line of each sh block, in the README's order."""
    for command in BLOCKS:
        if command not in ELSEWHERE:
            shell(command, folder, up)


def test_the_prose(up: Up, folder: Path) -> None:
    """Each command in the text is named above, and `hotpath ledger show` runs."""
    assert [command for command in PROSE if command not in ELSEWHERE and command not in BLOCKS] == []
    shell("hotpath keys create --tenant acme", folder, up)
    shell("hotpath ledger show acme", folder, up)


def test_the_named_tests_exist() -> None:
    """Nothing is claimed that is not there."""
    for name in ELSEWHERE.values():
        file, _, test = name.partition("::")
        assert re.search(rf"^(async )?def {test}\(", (procfile.ROOT / file).read_text("utf-8"), re.MULTILINE), name


def test_the_test_command_is_the_cis() -> None:
    """`.ci/run` runs the README's test command, which runs this test."""
    script = (procfile.ROOT / ".ci" / "run").read_text("utf-8")
    assert "./deploy/test --interop\n" in script
    assert "./deploy/test --interop" in BLOCKS
