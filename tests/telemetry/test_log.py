"""Log lines: JSON, one line each whatever they hold, without secrets (I9), never in a request's way (faults 86)."""

import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest

from shared.telemetry.log import HIDDEN, MAX_LINE, JsonFormatter, Log, Redactor, StderrHandler, security

SECRET = "s3cret/value+with=signs"


class Lines:
    """A Log that writes into a pipe."""

    def __init__(self) -> None:
        self._read, write = os.pipe()
        self._write = write
        self.log = Log("info", [SECRET], write)

    def end(self) -> list[dict[str, Any]]:
        self.log.close()
        os.close(self._write)
        with os.fdopen(self._read, "rb") as source:
            return [json.loads(line) for line in source.read().splitlines()]


@pytest.fixture
def lines() -> Iterator[Lines]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield Lines()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    logging.getLogger("hotpath").setLevel(logging.NOTSET)


def test_a_line_says_who_and_what(lines: Lines) -> None:
    log = lines.log.role("guardian", "abc234")
    log.info("took %s over", "it", extra={"requestId": "r", "count": 3})
    log.debug("not shown")
    logging.getLogger("some.library").info("not shown")
    logging.getLogger("some.library").warning("shown")
    first, second = lines.end()
    assert first.pop("ts")[10:11] == "T"
    assert first == {
        "level": "info", "role": "guardian", "instance": "abc234", "msg": "took it over", "requestId": "r", "count": 3,
    }  # fmt: skip
    assert second["msg"] == "shown"


def test_secrets_are_replaced_wherever_they_came_from(lines: Lines) -> None:
    """I9: in the message, a field, a nested field, an exception."""
    log = lines.log.role("provider", "p1")
    lines.log.redactor.add(['quo"ted\\secret', "short"])
    log.warning("provider said: %s", SECRET, extra={"detail": {"key": SECRET}, "other": 'quo"ted\\secret'})
    try:
        int(SECRET)
    except ValueError:
        log.exception("failed")
    log.info("a short word")
    text = json.dumps(written := lines.end())
    assert SECRET not in text
    assert written[0]["other"] == HIDDEN
    assert text.count(HIDDEN) >= 4
    assert written[2]["msg"] == "a short word"


@pytest.mark.parametrize("hostile", ["a\nb", "a\r\n{}", "\u2028", "\x00\x1b[31m", "\ud800", '"}', "x" * 100_000])
def test_one_event_is_one_line(lines: Lines, hostile: str) -> None:
    log = lines.log.role("ingress", "i1")
    log.warning("%s", hostile[:1000], extra={"client": hostile[:1000]})
    assert len(lines.end()) == 1


def test_what_cannot_be_logged_is_logged_somehow(lines: Lines) -> None:
    record = logging.makeLogRecord(
        {"name": "hotpath.x", "msg": "%d of them", "args": ("three",), "odd": object(), "raw": b"\xff", "nan": 1e999}
    )
    line = json.loads(lines.log.formatter.format(record))
    assert line["msg"] == "%d of them"
    assert line["odd"].startswith("<object")
    loop: list[object] = []
    loop.append(loop)
    assert json.loads(lines.log.formatter.format(logging.makeLogRecord({"name": "x", "msg": "m", "loop": loop})))


def test_a_long_line_is_cut() -> None:
    record = logging.makeLogRecord({"name": "hotpath.x", "msg": "y" * 1_000_000})
    line = JsonFormatter(Redactor()).format(record)
    assert len(line) <= MAX_LINE
    assert json.loads(line)["role"] == "x"


def test_security_events_are_marked(lines: Lines) -> None:
    """S1-R3."""
    security(lines.log.role("ingress", "i1"), "auth_failure", ip="192.0.2.1", requestId="r")
    (line,) = lines.end()
    assert (line["security"], line["event"], line["ip"]) == (True, "auth_failure", "192.0.2.1")


def test_a_blocked_reader_costs_lines_not_time() -> None:
    """Faults 86: the pipe is full and nobody reads; the process goes on and counts."""
    read, write = os.pipe()
    handler = StderrHandler(write, waiting=100)
    handler.setFormatter(JsonFormatter(Redactor()))
    for _ in range(3000):
        handler.emit(logging.makeLogRecord({"name": "hotpath.x", "msg": "x" * 100}))
    assert handler.dropped > 0
    os.close(read)  # the writing thread gets EPIPE for the rest, and counts it
    handler.close()
    os.close(write)
    assert handler.dropped >= 100


def test_a_closed_descriptor_is_counted() -> None:
    read, write = os.pipe()
    os.close(read)
    handler = StderrHandler(write)
    handler.emit(logging.makeLogRecord({"name": "hotpath.x", "msg": "x"}))
    handler.close()
    os.close(write)
    assert handler.dropped == 1
