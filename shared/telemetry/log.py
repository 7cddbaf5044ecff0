"""Log lines: one JSON object a line on stderr, from the standard `logging` (DESIGN 8).

    log.info("took over", extra={"requestId": rid, "instance": holder})
    {"ts":"2026-11-21T02:13:35.120Z","level":"info","role":"guardian","instance":"k3...","msg":"took over",...}

Loggers are named `hotpath.<role>`; the formatter adds that role's instance. Lines are written by a thread behind a
bounded queue: a blocked terminal or a full disk costs lines (counted), never requests (faults 86). Known secret values
are replaced in the finished line, wherever they came from (I9).
"""

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, Final

import msgspec

#: Lines waiting for a slow stderr; at 300 bytes a line about 3 MB.
MAX_WAITING: Final = 10_000
#: Longest line: an error text that quotes a megabyte is cut.
MAX_LINE: Final = 16_384
#: A shorter value is no secret worth the name, and replacing it would mangle innocent text.
MIN_SECRET: Final = 8
HIDDEN: Final = "[redacted]"

_encode: Final = msgspec.json.Encoder(enc_hook=str).encode
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class Redactor:
    """Replaces the secret values it was told of."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets: list[str] = []
        self.add(secrets)

    def add(self, secrets: Iterable[str]) -> None:
        """Know further secrets; each also in the form JSON gives it."""
        known = set(self._secrets)
        for secret in secrets:
            if len(secret) >= MIN_SECRET:
                known.add(secret)
                known.add(_encode(secret).decode()[1:-1])
        self._secrets = sorted(known, key=len, reverse=True)  # the longest first: one may contain another

    def clean(self, text: str) -> str:
        """`text` without any of them."""
        for secret in self._secrets:
            if secret in text:
                text = text.replace(secret, HIDDEN)
        return text


class JsonFormatter(logging.Formatter):
    """One record as one line of JSON."""

    def __init__(self, redactor: Redactor) -> None:
        super().__init__()
        self._redactor = redactor
        self._instances: dict[str, str] = {}

    def name_instance(self, role: str, instance: str) -> None:
        """Lines of the logger `hotpath.<role>` are this instance's."""
        self._instances[role] = instance

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its newline; never raises for odd arguments."""
        _, _, role = record.name.partition(".")
        line: dict[str, Any] = {
            "ts": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "role": role or record.name,
        }
        if role in self._instances:
            line["instance"] = self._instances[role]
        try:
            line["msg"] = record.getMessage()
        except (TypeError, ValueError):  # the call's arguments do not fit its format
            line["msg"] = str(record.msg)
        for key, value in vars(record).items():
            if key not in _STANDARD and key not in line:
                line[key] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            text = _encode(line).decode()
        except (TypeError, ValueError, RecursionError, UnicodeError):
            text = _encode({key: repr(value)[:200] for key, value in line.items()}).decode()
        text = self._redactor.clean(text)
        if len(text) > MAX_LINE:
            kept = {key: line[key] for key in ("ts", "level", "role", "instance") if key in line}
            text = _encode(kept | {"msg": "a line too long to log", "begins": text[: MAX_LINE // 4]}).decode()
        return text


class StderrHandler(logging.Handler):
    """Hands lines to a thread that writes them to a descriptor; a full queue drops them."""

    def __init__(self, descriptor: int | None = None, waiting: int = MAX_WAITING) -> None:
        super().__init__()
        self.dropped = 0
        self._descriptor = sys.stderr.fileno() if descriptor is None else descriptor
        self._queue: queue.Queue[bytes | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue one line."""
        try:
            self._queue.put_nowait(self.format(record).encode("utf-8", "replace") + b"\n")
        except queue.Full:
            self.dropped += 1

    def _write(self) -> None:
        while (line := self._queue.get()) is not None:
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except OSError:
                self.dropped += 1

    def close(self) -> None:
        """Write what waits, for at most a second."""
        try:
            self._queue.put(None, timeout=1)
            self._thread.join(1)
        except queue.Full:
            pass
        super().close()


class Log:
    """The logging of one process: set up once, at its door."""

    def __init__(self, level: str = "info", secrets: Iterable[str] = (), descriptor: int | None = None) -> None:
        self.redactor = Redactor(secrets)
        self.formatter = JsonFormatter(self.redactor)
        self.handler = StderrHandler(descriptor)
        self.handler.setFormatter(self.formatter)
        root = logging.getLogger()
        root.handlers[:] = [self.handler]
        root.setLevel(logging.WARNING)  # libraries: what is wrong, not what they do
        logging.getLogger("hotpath").setLevel(level.upper())
        logging.captureWarnings(capture=True)

    def role(self, role: str, instance: str) -> logging.Logger:
        """The logger of one role instance."""
        self.formatter.name_instance(role, instance)
        return logging.getLogger(f"hotpath.{role}")

    def close(self) -> None:
        """Write what waits and stop the thread; later lines are lost."""
        root = logging.getLogger()
        if self.handler in root.handlers:
            root.removeHandler(self.handler)
        self.handler.close()


def security(log: logging.Logger, event: str, **fields: object) -> None:
    """A security event for the SIEM (S1-R3): `security: true`, `event`, and what is known (`ip`, `requestId`, ...).

    Values that came from a client must be short and quoted by the caller (`wire.errors.quote`); JSON keeps them on
    one line whatever they hold.
    """
    log.warning(event, extra={"security": True, "event": event, **fields})
