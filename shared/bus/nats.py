"""The bus on NATS, through nats-py: the only file that names it (DESIGN 3, 8)."""

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any, Final

from nats import errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from shared.bus import checks
from shared.bus.base import BusUnavailable, Handler, PayloadTooLarge

PING_S: Final = 2
PINGS: Final = 2
PENDING_BYTES: Final = 64 * 1024 * 1024
CONNECT_S: Final = 2
RECONNECT_S: Final = (0.05, 0.25)

_log: Final = logging.getLogger("hotpath.bus")


class NatsSubscription:
    """A subscription that survives reconnects."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    async def drain(self) -> None:
        """No new messages; returns when those received have been handled."""
        await self._inner.drain()


class NatsBus:
    """The Bus of base.py."""

    def __init__(self, client: Client, on_change: Callable[[bool], None] | None) -> None:
        self._client = client
        self._on_change = on_change
        self._checks = checks.Checks()
        self.errors: dict[str, int] = {}

    @classmethod
    async def connect(cls, url: str, name: str, on_change: Callable[[bool], None] | None = None) -> "NatsBus":
        """Connect. Raises BusUnavailable."""
        bus = cls(Client(), on_change)
        try:
            async with asyncio.timeout(CONNECT_S):
                await bus._client.connect(
                    servers=url,
                    name=name,
                    error_cb=bus._on_error,
                    disconnected_cb=bus._on_disconnected,
                    reconnected_cb=bus._on_reconnected,
                    closed_cb=bus._on_closed,
                    ping_interval=PING_S,
                    max_outstanding_pings=PINGS,
                    pending_size=-1,
                    max_reconnect_attempts=-1,
                    connect_timeout=CONNECT_S,
                    reconnect_to_server_handler=_next_server,
                    skip_subject_validation=True,
                )
        except (OSError, errors.Error, TimeoutError) as error:
            raise BusUnavailable(f"NATS does not answer: {error}") from error
        return bus

    @property
    def connected(self) -> bool:
        """Whether a publish would be sent now."""
        return bool(self._client.is_connected)

    @property
    def max_payload(self) -> int:
        """Largest payload in bytes."""
        return int(self._client.max_payload)

    def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        """Send in this turn of the loop."""
        self._checks.subject(subject)
        if reply:
            self._checks.reply(reply)
        if self._client.pending_data_size > PENDING_BYTES:
            raise BusUnavailable("NATS does not take what was sent")
        sending = self._client.publish(subject, payload, reply)
        try:
            sending.send(None)
        except StopIteration:
            return
        except errors.MaxPayloadError as error:
            raise PayloadTooLarge(str(error)) from error
        except errors.Error as error:
            raise BusUnavailable(str(error)) from error
        sending.close()
        raise AssertionError("nats-py suspended in publish")

    async def subscribe(self, pattern: str, handler: Handler, queue: str = "") -> NatsSubscription:
        """Deliver matching messages to `handler`."""
        checks.pattern(pattern, queue)

        async def on_message(message: Msg) -> None:
            headers = message.headers
            handler(
                message.subject,
                message.reply,
                message.data,
                headers is not None and not message.data and headers.get("Status") == "503",
            )

        try:
            inner = await self._client.subscribe(
                pattern, queue, cb=on_message, pending_msgs_limit=0, pending_bytes_limit=PENDING_BYTES
            )
            await self._client.flush()
        except errors.Error as error:
            raise BusUnavailable(str(error)) from error
        return NatsSubscription(inner)

    async def flush(self) -> None:
        """Everything published before has reached the server."""
        try:
            await self._client.flush()
        except errors.Error as error:
            raise BusUnavailable(str(error)) from error

    async def close(self) -> None:
        """Flush and close."""
        if self.connected:
            try:
                await self._client.flush(timeout=CONNECT_S)
            except errors.Error:
                _log.warning("bus flush failed at close")
        self._on_change = None
        await self._client.close()

    async def _on_error(self, error: Exception) -> None:
        name = type(error).__name__
        self.errors[name] = self.errors.get(name, 0) + 1
        level = logging.ERROR if isinstance(error, errors.SlowConsumerError) else logging.WARNING
        _log.log(level, "bus error", extra={"error": f"{name}: {error}"})

    async def _on_disconnected(self) -> None:
        if self._on_change is not None:
            self._on_change(False)

    async def _on_reconnected(self) -> None:
        if self._on_change is not None:
            self._on_change(True)

    async def _on_closed(self) -> None:
        _log.info("bus closed")


def _next_server(servers: list[Any], _info: dict[str, Any]) -> tuple[Any, float]:
    server = random.choice(servers)
    low, high = RECONNECT_S
    return server, random.uniform(low, high)
