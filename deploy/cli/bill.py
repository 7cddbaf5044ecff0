"""A provider's bill on its way through `hotpath reconcile`: a million lines and more, on disk instead of in memory.

SQLite keeps them in a temporary file of its own, which is gone with the process: one row per call, so that a call that
is billed twice is found, and each request's calls are looked up as the books are read.
"""

import sqlite3
from collections.abc import Callable, Iterator
from typing import BinaryIO, Final

from msgspec import Struct, field

from shared.wire.bill import MAX_LINE_BYTES, Billed, read_line

#: Bad lines that are told one by one; further ones are counted.
TOLD: Final = 100
_PROGRESS: Final = 100_000


class Loaded(Struct):
    """What was read: lines that are calls, their sum in nano-USD, and the lines that are none: (number, why)."""

    lines: int = 0
    total: int = 0
    bad: int = 0
    told: list[tuple[int, str]] = field(default_factory=list)


class Bill:
    """The calls of a bill."""

    def __init__(self) -> None:
        self._rows = sqlite3.connect("", isolation_level=None)
        self._rows.execute("PRAGMA journal_mode = OFF")
        self._rows.execute("PRAGMA synchronous = OFF")
        self._rows.execute(
            "CREATE TABLE bill (rid BLOB, call INTEGER, cost INTEGER, found INTEGER DEFAULT 0, PRIMARY KEY (rid, call))"
            " WITHOUT ROWID"
        )

    def close(self) -> None:
        """Forget it."""
        self._rows.close()

    def load(self, file: BinaryIO, say: Callable[[str], None]) -> Loaded:
        """Read it to its end; empty lines are left out."""
        found = Loaded()
        self._rows.execute("BEGIN")
        for number, line in enumerate(_lines(file), 1):
            if number % _PROGRESS == 0:
                say(f"{number} lines read")
            if not line.strip():
                continue
            try:
                self._add(read_line(line), found)
            except ValueError as error:
                found.bad += 1
                if len(found.told) < TOLD:
                    found.told.append((number, str(error)))
        self._rows.execute("COMMIT")
        return found

    def _add(self, billed: Billed, found: Loaded) -> None:
        done = self._rows.execute(
            "INSERT OR IGNORE INTO bill (rid, call, cost) VALUES (?, ?, ?)",
            (bytes.fromhex(billed.rid), billed.call, billed.cost),
        )
        if done.rowcount == 0:
            raise ValueError(f"{billed.rid}.{billed.call} is on the bill before")
        found.lines += 1
        found.total += billed.cost

    def of(self, rid: str) -> dict[int, int]:
        """What the bill says of a request: call -> cost. It is then found."""
        raw = bytes.fromhex(rid)
        rows = dict(self._rows.execute("SELECT call, cost FROM bill WHERE rid = ? AND found = 0", (raw,)))
        if rows:
            self._rows.execute("UPDATE bill SET found = 1 WHERE rid = ?", (raw,))
        return rows

    def one(self, rid: str, call: int) -> int | None:
        """The cost of one call, if it is on the bill and nobody asked for it yet. It is then found."""
        named = (bytes.fromhex(rid), call)
        row = self._rows.execute("SELECT cost FROM bill WHERE rid = ? AND call = ? AND found = 0", named).fetchone()
        if row is None:
            return None
        self._rows.execute("UPDATE bill SET found = 1 WHERE rid = ? AND call = ?", named)
        return int(row[0])

    def rest(self) -> Iterator[Billed]:
        """The calls of requests that nobody asked for."""
        last = (b"", 0)
        while True:
            rows = self._rows.execute(
                "SELECT rid, call, cost FROM bill WHERE (rid, call) > (?, ?) AND found = 0"
                " ORDER BY rid, call LIMIT 1000",
                last,
            ).fetchall()
            for rid, call, cost in rows:
                yield Billed(rid.hex(), call, cost)
            if not rows:
                return
            last = rows[-1][:2]


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines, however long one is: of an overlong one only its beginning."""
    while line := file.readline(MAX_LINE_BYTES + 2):
        yield line
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)
