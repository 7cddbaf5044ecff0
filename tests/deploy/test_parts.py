"""The parts of the supervisor that need no process: Procfile, secrets, configuration files, logs, backoff, options."""

import asyncio
import io
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.cli import confs, credentials, example, logs, procfile, runfile, show, up, where
from deploy.cli.backoff import REFILL_S, Backoff
from deploy.cli.slot import ReadyLines
from deploy.simulator.bill import PRICES
from shared.catalog import load as load_catalog
from shared.wire.messages import Price

# ---- Procfile --------------------------------------------------------------------------------------------------------


def test_procfile() -> None:
    """The repository's Procfile has the four roles, and `python` is this interpreter."""
    roles = procfile.parse((procfile.ROOT / "Procfile").read_text())
    assert list(roles) == ["ingress", "guardian", "routing", "provider"]
    assert roles["ingress"] == [sys.executable, "-m", "ingress"]


def test_procfile_dev_has_the_same_roles() -> None:
    """deploy/Procfile.dev is the Procfile and servers."""
    dev = procfile.parse((procfile.ROOT / "deploy" / "Procfile.dev").read_text())
    roles = procfile.parse((procfile.ROOT / "Procfile").read_text())
    assert {name: dev[name] for name in roles} == roles
    assert set(dev) - set(roles) == {"nats", "redis", "simulator"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("# nothing\n\n", "empty"),
        ("ingress python", "line 1"),
        ("a: x\na: y", "line 2: a stands there twice"),
        ("a: x | y", "needs a shell"),
        ("a: X=$PORT y", "needs a shell"),
        ("a b: x", "line 1"),
    ],
)
def test_procfile_refused(text: str, why: str) -> None:
    """What cannot be run without a shell, or is no Procfile, is refused with its line."""
    with pytest.raises(procfile.ProcfileError, match=why):
        procfile.parse(text)


# ---- secrets ---------------------------------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_secrets_are_made_once_and_kept(tmp_path: Path) -> None:
    """D16: no secret has a default; `hotpath up` generates them (0600) and finds them again."""
    path = tmp_path / "secrets.env"
    first = credentials.ensure(path, {})
    assert mode(path) == 0o600
    assert set(first) == {*credentials.SETTINGS, *credentials.SERVERS}
    assert len(set(first.values())) == len(first)
    assert all(len(value) >= 40 for value in first.values())
    assert first["GATEWAY_API_KEY"].startswith("br_live_demo_")
    assert credentials.ensure(path, {}) == first
    assert credentials.read(path) == first


def test_a_given_secret_is_used_and_not_kept(tmp_path: Path) -> None:
    """One from the environment wins, even an empty one (S1-C1c: it is then refused), and an older one is forgotten."""
    path = tmp_path / "secrets.env"
    credentials.ensure(path, {})
    given = credentials.ensure(path, {"KEY_PEPPER": "p" * 40, "ADMIN_API_KEY": ""})
    assert (given["KEY_PEPPER"], given["ADMIN_API_KEY"]) == ("p" * 40, "")
    assert not {"KEY_PEPPER", "ADMIN_API_KEY"} & set(credentials.read(path))


def test_a_broken_secrets_file(tmp_path: Path) -> None:
    """It is said which line; nothing is overwritten."""
    path = tmp_path / "secrets.env"
    path.write_text("KEY_PEPPER=abc\nexport X\n")
    with pytest.raises(ValueError, match="line 2"):
        credentials.ensure(path, {})
    assert path.read_text() == "KEY_PEPPER=abc\nexport X\n"


def test_write_private_is_never_open_to_others(tmp_path: Path) -> None:
    """0600 even when a file with a wider mode stands there."""
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(0o644)
    credentials.write_private(path, "new")
    assert (path.read_text(), mode(path)) == ("new", 0o600)
    assert list(tmp_path.iterdir()) == [path]


# ---- configuration files ---------------------------------------------------------------------------------------------


def test_fill() -> None:
    """Every word is needed, and none may end the string it stands in."""
    assert confs.fill('a "@one@" b@c', {"one": "1"}) == 'a "1" b@c'
    with pytest.raises(KeyError):
        confs.fill("@two@", {"one": "1"})
    for evil in ('a"b', "a\nb", "a\\b"):
        with pytest.raises(ValueError, match="cannot stand"):
            confs.fill("@one@", {"one": evil})


def test_nats_takes_every_body_we_take(tmp_path: Path) -> None:
    """D16b: max_payload follows MAX_BODY_BYTES."""
    secrets = credentials.ensure(tmp_path / "secrets.env", {})
    small = confs.nats_conf(tmp_path, "127.0.0.1", 1, secrets, 1_048_576).read_text()
    assert "max_payload: 2097152\n" in small
    large = confs.nats_conf(tmp_path, "127.0.0.1", 1, secrets, 8_388_608).read_text()
    assert f"max_payload: {8_388_608 + 65_536}\n" in large


def test_the_simulators_catalogue_is_a_catalogue(tmp_path: Path) -> None:
    """The prices are those of the simulator's own books."""
    catalog = load_catalog(confs.sim_catalog(tmp_path, "http://127.0.0.1:9"), {})
    assert set(catalog.models) == set(PRICES)
    for name, model in catalog.models.items():
        assert [step.endpoint for step in model.steps] == ["sim", "sim-b"]
        own = PRICES[name]
        assert model.price == Price(own.input, own.cached_input, own.output)


# ---- run.json --------------------------------------------------------------------------------------------------------


def test_run_file(tmp_path: Path) -> None:
    """Mode 0600, every role always there, replaced at each change, gone at the end."""
    path = tmp_path / "run.json"
    file = runfile.RunFile(path, {"url": "http://x"})
    file.add("guardian", 7, "http://m/7")
    assert not path.exists()  # nothing is told before it is opened
    file.open()
    assert mode(path) == 0o600
    run = runfile.read(tmp_path)
    assert run is not None
    assert run["pids"] == {role: [7] if role == "guardian" else [] for role in runfile.ROLES}
    file.add("guardian", 8, "http://m/8")
    file.remove(7)
    run = json.loads(path.read_text())
    assert (run["pids"]["guardian"], run["metrics"]["guardian"]) == ([8], ["http://m/8"])
    file.close()
    assert runfile.read(tmp_path) is None


# ---- logs ------------------------------------------------------------------------------------------------------------


def test_log_files_are_bounded(tmp_path: Path) -> None:
    """At most twice the limit, however much is written; the start keeps one older file."""
    path = tmp_path / "a.log"
    path.write_bytes(b"of the last start\n")
    file = logs.LogFile(path, limit=100)
    assert (tmp_path / "a.log.1").read_bytes() == b"of the last start\n"
    for number in range(100):
        file.write(b"%09d\n" % number)
    file.close()
    older = (tmp_path / "a.log.1").read_bytes()
    assert len(path.read_bytes()) <= 100
    assert len(older) <= 100
    assert (older + path.read_bytes()).endswith(b"000000098\n000000099\n")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.log", "a.log.1"]


def test_the_screen_shows_what_matters_once() -> None:
    """Warnings in short, tracebacks as they stand, information not at all; several processes' same words once."""
    out, now = io.StringIO(), [0.0]
    screen = logs.Screen(out, lambda: now[0])
    for name in ("guardian.1", "guardian.2"):
        screen.line(name, json.dumps({"ts": 1, "level": "warning", "msg": "slow", "ms": 9}).encode())
    screen.line("guardian.1", b'{"level": "info", "msg": "no"}')
    screen.line("guardian.1", b"Traceback (most recent call last):\n")
    screen.line("guardian.1", b"\xff{not json")
    screen.line("guardian.1", b"")
    assert out.getvalue().splitlines() == [
        "guardian.1 | warning slow ms=9",
        "guardian.1 | Traceback (most recent call last):",
        "guardian.1 | \ufffd{not json",
    ]
    now[0] += logs.REPEAT_S
    screen.line("guardian.2", json.dumps({"level": "warning", "msg": "slow", "ms": 9}).encode())
    assert out.getvalue().endswith("guardian.2 | warning slow ms=9\n")


def test_a_terminal_that_is_gone() -> None:
    """The supervisor goes on without it."""
    out = io.StringIO()
    screen = logs.Screen(out)
    out.close()
    screen.say("hello")
    screen.say("hello")


async def test_output_in_pieces(tmp_path: Path) -> None:
    """However the pipe cuts the bytes; an endless line is cut, never kept whole in memory."""
    file, seen = logs.LogFile(tmp_path / "a.log"), list[bytes]()
    output = logs.Output(file, seen.append)
    for piece in (b"one\ntw", b"o\nthr", b"ee", b"\n", b"last"):
        output.data_received(piece)
    assert seen == [b"one", b"two", b"three"]
    for _ in range(3):
        output.data_received(b"x" * logs.MAX_LINE)
    output.connection_lost(None)
    assert len(seen[3]) <= 2 * logs.MAX_LINE
    assert b"".join(seen[3:]) == b"last" + b"x" * (3 * logs.MAX_LINE)
    assert len(output.tail) <= logs.TAIL
    await asyncio.wait_for(output.ended, 1)
    file.close()


def test_ready_lines_are_bounded() -> None:
    """Whole JSON objects only; a process that writes without end is not listened to."""
    seen = list[dict[str, Any]]()
    lines = ReadyLines(seen.append)
    lines.data_received(b'{"role": "a"}\n[1]\nno\n{"ro')
    lines.data_received(b'le": "b"}\n')
    assert seen == [{"role": "a"}, {"role": "b"}]
    lines.data_received(b'{"role": "c"}\n' * 10_000)
    assert len(seen) == 2


# ---- backoff, options ------------------------------------------------------------------------------------------------


def test_backoff() -> None:
    """0.1 s, doubling to 10 s, and from the start again after 30 s of life (fault 21)."""
    backoff = Backoff()
    waits = [unready(backoff) for _ in range(10)]
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10, 10]
    assert backoff.pause(0.0, alive=30.0, served=0.0) == 0.1


def unready(backoff: Backoff) -> float:
    """The wait after a death before it was ready."""
    return backoff.pause(0.0, alive=0.0, served=0.0)


def test_what_had_served_comes_back_at_once() -> None:
    """Killed 20 times in a minute it is back after 0.1 s each time; a loop that goes on backs off all the same."""
    backoff, now, starts = Backoff(), 0.0, 0
    waits = []
    for _ in range(20):
        waits.append(backoff.pause(now, alive=1.5, served=1.0))
        now += 1.0 + waits[-1]
    assert waits == [0.1] * 20
    until = now + 600
    while now < until:
        now += 1.0 + backoff.pause(now, alive=1.5, served=1.0)
        starts += 1
    assert starts < 600 / 5
    now += 20 * REFILL_S
    assert [backoff.pause(now, alive=1.5, served=1.0) for _ in range(20)] == [0.1] * 20


def test_scale() -> None:
    """Roles of the Procfile, 0 to 64."""
    roles = {"ingress": 1, "guardian": 1, "provider": 1}
    assert up.scale_of("guardian=2, provider=0", roles) == {"ingress": 1, "guardian": 2, "provider": 0}
    for wrong in ("guardian", "guardian=65", "guardian=-1", "nats=2", "guardian=2=3"):
        with pytest.raises(ValueError, match="--scale"):
            up.scale_of(wrong, roles)


def test_env_example_is_in_step() -> None:
    """S1-L4: every setting is listed. Written by: hotpath env --example > deploy/env.example."""
    assert (procfile.ROOT / "deploy" / "env.example").read_text() == example.text()


def test_where(tmp_path: Path) -> None:
    """--data means what runs there; without it REDIS_URL wins; then HOTPATH_DATA."""
    secrets = credentials.ensure(tmp_path / "secrets.env", {})
    run = {"redis_url": "redis://r", "nats_url": "nats://n", "api_key": "k" * 40, "admin_key": "a" * 40}
    credentials.write_private(tmp_path / "run.json", json.dumps(run))
    env = {"REDIS_URL": "redis://given", "HOTPATH_DATA": "/nowhere", "KEY_PEPPER": "p" * 40}
    by_data = where.find(str(tmp_path), env)
    assert by_data.env["REDIS_URL"] == "redis://r"
    assert by_data.env["GATEWAY_API_KEY"] == "k" * 40
    assert by_data.env["KEY_PEPPER"] == "p" * 40
    by_env = where.find("", env)
    assert (by_env.run, by_env.env["REDIS_URL"]) == (None, "redis://given")
    default = where.find("", {"HOTPATH_DATA": str(tmp_path)})
    assert default.run == run
    assert default.env["KEY_PEPPER"] == secrets["KEY_PEPPER"]


def test_tables_are_whole_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """No id is wrapped or cut when the output is no terminal."""
    entry = {"rid": "a" * 32, "call": 1, "state": "settled", "amount": 1_000_000, "cost": 42_500, "estimated": True}
    show.out(show.ledger_table({"entries": [entry]}))
    line = capsys.readouterr().out.splitlines()[1].split()
    assert line == ["a" * 32, "1", "settled", "$0.001", "$0.0000425", "estimated"]


def test_the_locks_name_no_machine() -> None:
    """Hashes for every package; no index, no path."""
    for name in ("requirements.txt", "requirements-test.txt"):
        text = (procfile.ROOT / "deploy" / name).read_text()
        assert not [line for line in text.splitlines() if "://" in line or "/tmp" in line or line.startswith("--")]
        blocks = [block for block in text.replace("\\\n", "").splitlines() if block and not block.startswith("#")]
        assert len(blocks) > 30
        assert all("--hash=sha256:" in block and "==" in block for block in blocks)


def test_scripts_are_executable() -> None:
    """The README's commands, as git has them."""
    for name in ("deploy/up", "deploy/test", ".ci/run"):
        assert os.access(procfile.ROOT / name, os.X_OK)
