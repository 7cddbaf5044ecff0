"""The second copy of the money, as the command line reads it: usage records and snapshots of a JetStream stream."""

import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

import msgspec
from msgspec import Struct, field

from shared.bus.base import BusUnavailable
from shared.bus.jetstream import JetStream, inboxes
from shared.bus.nats import NatsBus
from shared.bus.stored import StreamUnavailable
from shared.core.transitions import position
from shared.service.usage import plan
from shared.settings import Settings
from shared.state.audit import Copied
from shared.wire.messages import VERSION
from shared.wire.records import BalanceSnapshot, Stored, UsageBatch, UsageRecord, decode_stored

ROLE: Final = "operator"


class CopyUnavailable(Exception):
    """The second copy cannot be read; the message says why."""


class Copy:
    """A connection to the stream; made by `opened`."""

    def __init__(self, stream: JetStream, inbox: str, name: str) -> None:
        self._stream = stream
        self._inbox = inbox
        self._name = name
        self._reads = 0

    async def read(self) -> AsyncIterator[Stored]:
        """Every message that it holds now, oldest first; those of a newer Hotpath are left out. Raises
        CopyUnavailable, in between too."""
        self._reads += 1
        try:
            async for stored in self._stream.read(f"{self._name}-{self._reads}", self._inbox):
                try:
                    found = decode_stored(stored.payload)
                except msgspec.DecodeError:
                    continue  # the guardians, who read all of it, log what it is
                if found.v <= VERSION:
                    yield found
        except StreamUnavailable as error:
            raise CopyUnavailable(f"the second copy cannot be read: {error}") from error

    async def records(self) -> AsyncIterator[UsageRecord]:
        """The records alone. Raises CopyUnavailable."""
        async for found in self.read():
            if isinstance(found, UsageBatch):
                for record in found.records:
                    yield record


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Copy]:
    """The copy of a Hotpath. Raises CopyUnavailable, ValueError (NATS_URL)."""
    name = f"cli{secrets.token_hex(6)}"
    answers, pulls = inboxes(ROLE, name)
    try:
        bus = await NatsBus.connect(settings.nats_url, name)
    except BusUnavailable as error:
        raise CopyUnavailable(
            f"NATS does not answer ({error}); set NATS_URL, or name the directory: --data DIR"
        ) from error
    try:
        stream = JetStream(bus, plan(settings), answers, update=False)
        await stream.start()
        try:
            yield Copy(stream, pulls, name)
        finally:
            await stream.close()
    finally:
        await bus.close()


class Scan(Struct):
    """What the copy says of every settlement, by tenant and call; `since`: shared-clock ms since when it is whole."""

    since: int = 0
    settlements: dict[str, dict[tuple[str, int], Copied]] = field(default_factory=dict)


async def scan(copy: Copy, tenants: set[str]) -> Scan:
    """Of these tenants, in memory: some 300 bytes a call. Raises CopyUnavailable."""
    found = Scan()
    async for stored in copy.read():
        found.since = found.since or stored.at
        if isinstance(stored, BalanceSnapshot):
            continue
        for record in stored.records:
            if record.tenant not in tenants:
                continue
            calls = found.settlements.setdefault(record.tenant, {})
            before = calls.get((record.rid, record.call))
            if before is None or not before.line:  # once more with its line, when a guardian posted it
                calls[record.rid, record.call] = Copied(record.cost, record.line)
    return found


class Snapshot(Struct):
    """The newest whole snapshot of a tenant: all fields of its balances as line `line` had them."""

    line: str
    parts: int
    fields: dict[str, str] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    @property
    def whole(self) -> bool:
        """Whether every part was there."""
        return len(self.seen) == self.parts


async def snapshots(copy: Copy, before: Mapping[str, str] | None = None) -> dict[str, Snapshot]:
    """Of every tenant; with `before` of its tenants alone, the newest of before a line. Raises CopyUnavailable."""
    whole: dict[str, Snapshot] = {}
    begun: dict[tuple[str, str], Snapshot] = {}
    async for part in copy.read():
        if not isinstance(part, BalanceSnapshot):
            continue
        if before is not None and position(part.line) >= position(before.get(part.tenant, "")):
            continue
        known = whole.get(part.tenant)
        if known is not None and position(known.line) >= position(part.line):
            continue
        found = begun.setdefault((part.tenant, part.line), Snapshot(part.line, part.parts))
        found.fields |= part.fields
        found.seen.add(part.part)
        if found.whole:
            whole[part.tenant] = begun.pop((part.tenant, part.line))
    return whole
