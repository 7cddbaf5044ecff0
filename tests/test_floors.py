"""The rules of the house, run with the tests: import contracts, sizes, words that belong in one place (DESIGN 2)."""

import ast
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parent.parent
PRODUCT: Final = ("ingress", "workers", "shared", "deploy")
MAX_FILE: Final = 400  # lines
MAX_FUNCTION: Final = 60

#: Larger than that, and why.
LARGE_FILES: Final[dict[str, str]] = {
    "shared/bus/nats.py": "the one place that speaks NATS: its protocol is not cut in two for twenty lines",
    "shared/core/stream.py": "one state machine: its prose, its table and its steps are read together",
}
LARGE_FUNCTIONS: Final[dict[str, str]] = {}

#: Handlers of `except Exception`: the door of a process, a task or a bus, where one fault must not take others along.
DOORS: Final[dict[str, str]] = {
    "workers/guardian/admit.py": "one request must not take the others with it",
    "workers/guardian/learn.py": "one usage message must not stop those that come after it",
    "shared/service/__init__.py": "whatever ends the process becomes one log line and an exit code",
    "shared/bus/nats.py": "the door of the bus: a handler's fault must not cost others their messages",
    "shared/bus/memory.py": "as bus/nats.py",
}

SUBJECT: Final = re.compile(r"""["']hotpath\.v1|["']X-BR-""")
VAGUE: Final = {"utils", "util", "helpers", "misc", "common"}


def sources(*folders: str) -> Iterator[Path]:
    """The Python files of these folders."""
    for folder in folders:
        yield from (path for path in sorted((ROOT / folder).rglob("*.py")) if "node_modules" not in path.parts)


def name(path: Path) -> str:
    """Its path from the root."""
    return path.relative_to(ROOT).as_posix()


def test_import_contracts():
    """DESIGN 2: each floor imports only floors below it."""
    tool = Path(sysconfig.get_path("scripts")) / "lint-imports"
    done = subprocess.run([sys.executable, tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_are_short():
    large = {name(path): lines for path in sources(*PRODUCT) if (lines := path.read_text().count("\n")) > MAX_FILE}
    assert large.keys() <= LARGE_FILES.keys(), large


def test_functions_are_short():
    large = {}
    for path in sources(*PRODUCT):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION:
                    large[f"{name(path)}:{node.name}"] = lines
    assert large.keys() <= LARGE_FUNCTIONS.keys(), large


def test_subjects_and_headers_are_spelled_once():
    """Style: no literal subject or header outside shared/wire. The simulator and its like import nothing of ours."""
    found = [
        f"{name(path)}:{number}"
        for path in sources("ingress", "workers", "shared", "deploy/cli")
        if "wire" not in path.parts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if SUBJECT.search(line)
    ]
    assert not found


def test_no_file_is_named_utils():
    assert not [name(path) for path in sources(*PRODUCT, "tests") if path.stem in VAGUE]


def test_blind_handlers_stand_only_at_doors():
    """Foreign errors are mapped at the seam; what catches everything hides everything."""
    found = set()
    for path in sources(*PRODUCT):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and _is_blind(node):
                found.add(name(path))
    assert found <= DOORS.keys(), found - DOORS.keys()


def _is_blind(handler: ast.ExceptHandler) -> bool:
    """Bare, or Exception or BaseException by name, and not simply raised again."""
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    blind = handler.type is None or any(
        isinstance(k, ast.Name) and k.id in {"Exception", "BaseException"} for k in kinds
    )
    last = handler.body[-1]
    return blind and not (isinstance(last, ast.Raise) and last.exc is None)


def test_no_module_globals_change():
    """Style 10: no `global`, anywhere in the product."""
    found = [
        name(path)
        for path in sources(*PRODUCT)
        if any(isinstance(node, ast.Global) for node in ast.walk(ast.parse(path.read_text())))
    ]
    assert not found


@pytest.mark.parametrize("word", [r"/tmp/", r"/work/", r"/home/", r"/root/"])
def test_no_path_of_a_machine_is_named(word):
    found = [name(path) for path in sources(*PRODUCT) if word in path.read_text()]
    assert not found
