"""Once a second: leases that are over, and snapshots of balances into the usage stream.

Every guardian does it, so one suffices (faults 20). The ledger writes a snapshot of a tenant's balances into its
journal now and then; a copy goes to JetStream, where `hotpath ledger rebuild` begins when Redis has lost everything.
"""

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

from shared.bus.base import PayloadTooLarge
from shared.bus.stored import StreamUnavailable
from shared.service.usage import STORE_S, UsageStream
from shared.state.base import StateUnavailable
from shared.wire.messages import encode
from shared.wire.records import BalanceSnapshot

if TYPE_CHECKING:
    from shared.service import Context

SWEEP_S: Final = 1.0  # I3: lease + 5 s
#: A snapshot of many users comes in parts of so many bytes.
PART_BYTES: Final = 256 * 1024


class Sweeper:
    """Of one guardian process; owns one task."""

    def __init__(self, ctx: "Context", usage: UsageStream) -> None:
        self._ctx = ctx
        self._usage = usage
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to sweep."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """No more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                swept = await self._ctx.state.ledger.sweep(self._ctx.state.registry.tenants())
                for tenant, line in swept.snapshots:
                    await self.publish(tenant, line)
            except StateUnavailable:
                continue  # the next second asks again

    async def publish(self, tenant: str, line: str) -> None:
        """The snapshot that the journal's line holds, into the stream; one that it does not take is followed by others.

        Raises StateUnavailable.
        """
        found = await self._ctx.state.ledger.journal(tenant=tenant, after=line.partition("-")[0])
        flat = next((each.more[0] for each in found if each.id == line), ())
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        parts = list(_parts(fields))
        for number, part in enumerate(parts):
            snapshot = BalanceSnapshot(
                tenant=tenant, line=line, at=self._ctx.state.clock.now(), part=number, parts=len(parts), fields=part
            )
            with contextlib.suppress(StreamUnavailable, PayloadTooLarge):
                await self._usage.stream.publish(encode(snapshot), STORE_S)


def _parts(fields: dict[str, str]) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    size = PART_BYTES
    for name, text in fields.items():
        if size >= PART_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = text
        size += len(name) + len(text)
    return parts
