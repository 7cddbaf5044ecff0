"""What calls used, into the second copy (DESIGN 4): batched each 100 ms in good times, awaited by nobody.

A batch that JetStream did not acknowledge is sent again until it does: `KEPT_BYTES` are kept for that, then the oldest
are lost and counted; Redis has them all the same. What Redis did not take is another matter: `post`, one record at
once, acknowledged by JetStream or on disk before the client has its End.
"""

import asyncio
import logging
from collections import deque
from typing import Final, Literal

from shared.bus.base import PayloadTooLarge
from shared.bus.spool import SpoolFailed
from shared.bus.stored import StreamUnavailable
from shared.service.usage import STORE_S, UsageStream
from shared.state.base import Clock
from shared.wire.messages import encode
from shared.wire.records import UsageBatch, UsageRecord

EVERY_S: Final = 0.1
#: A batch that is full goes at once: 500 records are some 100 KiB, at most 600 with the providers' own usage.
MAX_BATCH: Final = 500
KEPT_BYTES: Final = 8 * 1024 * 1024
#: JetStream's time while a client waits (DESIGN 4).
POST_S: Final = 0.150
AGAIN_S: Final = 0.5
#: A drain waits so long for the last acknowledgements.
CLOSE_S: Final = 1.0


class UsageLog:
    """Of one provider process."""

    def __init__(self, usage: UsageStream, instance: str, clock: Clock, log: logging.Logger) -> None:
        self._usage = usage
        self._instance = instance
        self._clock = clock
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._records: list[UsageRecord] = []
        self._timer: asyncio.TimerHandle | None = None
        self._number = 0
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0
        self._sender: asyncio.Task[None] | None = None
        self.lost = 0  # batches

    @property
    def waiting(self) -> int:
        """Records and batches without an acknowledgement."""
        return len(self._records) + len(self._kept)

    def add(self, record: UsageRecord) -> None:
        """One call that Redis settled."""
        self._records.append(record)
        if len(self._records) >= MAX_BATCH:
            self.flush()
        elif self._timer is None:
            self._timer = self._loop.call_later(EVERY_S, self.flush)

    def flush(self) -> None:
        """Send what waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._records:
            return
        records, self._records = self._records, []
        payload = self._batch(records)
        self._kept.append(payload)
        self._kept_bytes += len(payload)
        while self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popleft())
            self.lost += 1
        if self._sender is None:
            self._sender = self._loop.create_task(self._send())

    def _batch(self, records: list[UsageRecord]) -> bytes:
        self._number += 1
        batch = UsageBatch(
            instance=self._instance, number=self._number, at=self._clock.now(), records=tuple(records)
        )  # fmt: skip
        return encode(batch)

    async def _send(self) -> None:
        """Until everything is acknowledged, oldest first."""
        try:
            while self._kept:
                payload = self._kept[0]
                try:
                    await self._usage.stream.publish(payload, STORE_S)
                except StreamUnavailable:
                    await asyncio.sleep(AGAIN_S)
                    continue
                except PayloadTooLarge:
                    self.lost += 1
                if self._kept and self._kept[0] is payload:
                    self._kept_bytes -= len(self._kept.popleft())
        finally:
            self._sender = None

    async def post(self, record: UsageRecord) -> Literal["stream", "spool"]:
        """A settlement that Redis did not take: it outlives this process when this returns, and a guardian posts it.

        Raises SpoolFailed: neither took it.
        """
        payload = self._batch([record])
        try:
            await self._usage.stream.publish(payload, POST_S)
        except (StreamUnavailable, PayloadTooLarge):
            await self._usage.spool.append(payload)
            return "spool"
        return "stream"

    async def close(self) -> None:
        """Send the rest; what JetStream does not take in CLOSE_S goes to the spool, if it ever took anything."""
        self.flush()
        if self._sender is not None:
            await asyncio.wait((self._sender,), timeout=CLOSE_S)
        if self._sender is not None:
            self._sender.cancel()
        if self._kept and not self._usage.stream.there:
            self.lost += len(self._kept)
            self._kept.clear()
        for payload in self._kept:
            try:
                await self._usage.spool.append(payload)
            except SpoolFailed as error:
                self.lost += 1
                self._log.error("usage records were lost: the money is in Redis alone", extra={"error": str(error)})
        self._kept.clear()
