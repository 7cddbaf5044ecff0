"""A JetStream stream over any Bus (DESIGN 4, the second copy): made by whoever comes first, published to with an
acknowledgement, read by one durable pull consumer that several processes share, or from a place on by anybody.

JetStream is spoken to by plain messages: JSON requests to `$JS.API...` answered at an inbox, a PubAck to what was
published with a reply, and messages of the stream brought to the inbox of a pull. Source: docs.nats.io, "JetStream wire
API Reference" (ADR-1, ADR-13, ADR-37). `memory_jetstream.py` is the same server for `MemoryBus`.

Nothing here is fatal: while JetStream is away, or not switched on, calls raise StreamUnavailable and it is tried again.
Times of a message are of the NATS server's own clock: good for "from then on", never to be compared with ours.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from typing import Final, TypeVar

import msgspec
from msgspec import Struct

from shared.bus.base import Bus, BusUnavailable, PayloadTooLarge, Subscription
from shared.bus.consumer import Consumer
from shared.bus.stored import NS, Stored, StreamPlan, StreamState, StreamUnavailable
from shared.wire import subjects

API_S: Final = 2.0  # a request to JetStream's API; a server that makes a file answers in milliseconds
#: Waits between tries to make the stream or consumer: doubled from the first to the last.
RETRY_FIRST_S: Final = 0.25
RETRY_LAST_S: Final = 10.0
#: An ephemeral consumer that nobody asks any more is dropped by the server after this.
READER_S: Final = 30
READ_AT_ONCE: Final = 256
MAX_OPEN: Final = 4096  # requests and publishes without an answer

_NOT_FOUND: Final = 10059
_OTHER_CONFIG: Final = 10058

_log: Final = logging.getLogger("hotpath.bus")
_json: Final = msgspec.json.Encoder().encode

A = TypeVar("A", bound="_Answer")


class _Error(Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Answer(Struct):
    error: _Error | None = None


class _PubAck(_Answer):
    seq: int = 0


class _State(Struct, frozen=True):
    messages: int = 0
    bytes: int = 0
    first_seq: int = 0
    last_seq: int = 0


class _Info(_Answer):
    state: _State = _State()


class _Refused(StreamUnavailable):
    """JetStream's own answer; `number` is its err_code."""

    def __init__(self, error: _Error) -> None:
        super().__init__(f"JetStream says: {error.description} ({error.err_code})")
        self.number = error.err_code


class JetStream:
    """One stream. `inbox` is a prefix whose single further token is ours alone, e.g. `subjects.inbox(role, x, "")`."""

    def __init__(self, bus: Bus, plan: StreamPlan, inbox: str, *, update: bool = True) -> None:
        """`update` False: this user may make the stream and not change it."""
        self._bus = bus
        self.plan: Final = plan
        self._inbox = inbox
        self._update = update
        self._loop = asyncio.get_running_loop()
        self._asked: dict[str, asyncio.Future[bytes]] = {}
        self._number = 0
        self._subscription: Subscription | None = None
        self._missing = asyncio.Event()
        self._missing.set()
        self._keeper: asyncio.Task[None] | None = None
        self.there = False  # as far as we know
        self.said = ""  # why it is not, or not as planned

    # ---- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Subscribe to the inbox, and keep the stream from when JetStream is there on. Raises BusUnavailable."""
        self._subscription = await self._bus.subscribe(self._inbox + "*", self._on_answer)
        self._keeper = self._loop.create_task(self._keep())

    async def close(self) -> None:
        """Ask nothing more."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._subscription is not None:
            await self._subscription.drain()

    def missing(self) -> None:
        """Somebody saw that the stream may be gone: it is made anew in the background."""
        self.there = False
        self._missing.set()

    async def _keep(self) -> None:
        """Make the stream, and again whenever it is missing (a NATS that lost its disk)."""
        wait = RETRY_FIRST_S
        while True:
            await self._missing.wait()
            try:
                await self.ensure()
            except StreamUnavailable as error:
                if self._bus.connected:
                    self._say(str(error))
                await asyncio.sleep(wait * random.uniform(0.5, 1))  # noqa: S311 - spreads processes, hides nothing
                wait = min(2 * wait, RETRY_LAST_S)
                continue
            wait = RETRY_FIRST_S
            self._missing.clear()

    def _say(self, text: str) -> None:
        """Once, until it changes."""
        if text != self.said:
            self.said = text
            _log.warning("the stream %s is not as it should be: %s", self.plan.name, text)

    async def ensure(self) -> None:
        """Create the stream, or bring an existing one to the plan; a stream that cannot be brought there is used as it
        is, and the log says why. Raises StreamUnavailable: there is none."""
        config = self._config()
        try:
            await self._ask(subjects.jetstream("STREAM.CREATE", self.plan.name), config, _Answer)
            self.said = ""
        except _Refused as refused:
            await self.state()  # one that is there is left as it is, or refused for what the plan says
            await self._bring(config, refused)
        self.there = True

    async def _bring(self, config: dict[str, object], refused: _Refused) -> None:
        try:
            if self._update:
                await self._ask(subjects.jetstream("STREAM.UPDATE", self.plan.name), config, _Answer)
                self.said = ""
            elif refused.number != _OTHER_CONFIG:  # which a user that may change it brings to date
                self._say(str(refused))
        except _Refused as still:
            self._say(str(still))

    def _config(self) -> dict[str, object]:
        plan = self.plan
        return {
            "name": plan.name, "subjects": [plan.subject], "retention": "limits", "discard": "new", "storage": "file",
            "compression": "s2", "max_age": plan.max_age_ms * NS, "max_bytes": plan.max_bytes,
            "num_replicas": plan.replicas,
            # Messages carry no id: who reads them can tell a repetition by what it says, also after this window.
            "duplicate_window": min(plan.max_age_ms, 1000) * NS,
        }  # fmt: skip

    # ---- asking ------------------------------------------------------------------------------------------------------

    async def publish(self, payload: bytes, within: float) -> int:
        """Store one message; its sequence. Raises StreamUnavailable (it may be stored yet), PayloadTooLarge."""
        answer = await self._send(self.plan.subject, payload, within)
        try:
            return _read(answer, _PubAck).seq
        except _Refused as refused:
            if refused.number == _NOT_FOUND:
                self.missing()
            raise

    async def state(self) -> StreamState:
        """What it holds. Raises StreamUnavailable."""
        found = (await self._ask(subjects.jetstream("STREAM.INFO", self.plan.name), None, _Info)).state
        return StreamState(found.messages, found.bytes, found.first_seq, found.last_seq)

    async def _ask(self, subject: str, body: dict[str, object] | None, kind: type[A]) -> A:
        """A request to the API. Raises StreamUnavailable."""
        try:
            return _read(await self._send(subject, b"" if body is None else _json(body), API_S), kind)
        except PayloadTooLarge as error:
            raise StreamUnavailable(str(error)) from error

    async def _send(self, subject: str, payload: bytes, within: float) -> bytes:
        if len(self._asked) >= MAX_OPEN:
            raise StreamUnavailable("JetStream is behind: too much waits for its answer")
        self._number += 1
        token = str(self._number)
        answered: asyncio.Future[bytes] = self._loop.create_future()
        self._asked[token] = answered
        try:
            self._bus.publish(subject, payload, self._inbox + token)
            async with asyncio.timeout(within):
                return await answered
        except TimeoutError as error:
            raise StreamUnavailable("JetStream did not answer in time") from error
        except BusUnavailable as error:
            raise StreamUnavailable(str(error)) from error
        finally:
            del self._asked[token]

    def _on_answer(self, subject: str, _reply: str, payload: bytes, no_responders: bool) -> None:
        answered = self._asked.get(subject[len(self._inbox) :])
        if answered is None or answered.done():
            return
        if no_responders:
            self.missing()
            answered.set_exception(StreamUnavailable("there is no JetStream, or not this stream"))
        else:
            answered.set_result(payload)

    # ---- reading -----------------------------------------------------------------------------------------------------

    def consumer(self, name: str, inbox: str, *, ack_wait_s: float, max_pending: int) -> Consumer:
        """The durable consumer of that name: each who uses it gets a share of the messages. `inbox`: another one."""
        config: dict[str, object] = {
            "durable_name": name, "ack_policy": "explicit", "ack_wait": int(ack_wait_s * 1000) * NS,
            "max_ack_pending": max_pending, "deliver_policy": "all", "max_deliver": -1,
        }  # fmt: skip
        return Consumer(self._bus, self.plan.name, name, inbox, lambda: self.create_consumer(name, config))

    async def create_consumer(self, name: str, config: dict[str, object]) -> None:
        """Make it, or bring it to `config`. Raises StreamUnavailable."""
        body: dict[str, object] = {"stream_name": self.plan.name, "config": config, "action": ""}
        try:
            await self._ask(subjects.jetstream_consumer("CONSUMER.CREATE", self.plan.name, name), body, _Answer)
        except _Refused as refused:
            if refused.number == _NOT_FOUND:
                self.missing()
            raise

    async def read(self, name: str, inbox: str, *, first: int = 1) -> AsyncIterator[Stored]:
        """Every message from sequence `first` to the newest of this moment, in order, taking nothing from anybody.

        `name` is of a consumer of one's own, which the server forgets by itself. Raises StreamUnavailable, in between
        too.
        """
        state = await self.state()
        last = state.last
        config: dict[str, object] = {
            "name": name, "ack_policy": "none", "deliver_policy": "by_start_sequence", "opt_start_seq": max(first, 1),
            "inactive_threshold": READER_S * 1000 * NS, "mem_storage": True,
        }  # fmt: skip
        if first > last or state.messages == 0:
            return
        consumer = Consumer(self._bus, self.plan.name, name, inbox, lambda: self.create_consumer(name, config))
        await consumer.start()
        try:
            reached = 0
            while reached < last:
                found = await consumer.fetch(READ_AT_ONCE, API_S)
                if not found:
                    state = await self.state()
                    if state.messages and state.first <= last:
                        raise StreamUnavailable("JetStream stopped in the midst of a reading")
                    return  # what was left is over its age
                for stored in found:
                    if stored.sequence <= last:
                        yield stored
                    reached = stored.sequence
        finally:
            await consumer.close()
            verb = subjects.jetstream_consumer("CONSUMER.DELETE", self.plan.name, name)
            try:
                await self._ask(verb, None, _Answer)
            except StreamUnavailable:
                pass  # it is forgotten after READER_S


def _read(answer: bytes, kind: type[A]) -> A:
    """Raises StreamUnavailable."""
    try:
        found = msgspec.json.decode(answer, type=kind)
    except ValueError as error:
        raise StreamUnavailable("JetStream's answer was not understood") from error
    if found.error is not None:
        raise _Refused(found.error)
    return found


#: How a role's stream is opened: its two inboxes carry the instance, so that the allow-lists cover them.
Inboxes = tuple[str, str]


def inboxes(role: str, instance: str) -> Inboxes:
    """Of the answers and of the pulls of one instance: `inbox.<role>.<instance>-js.*` and `...-pull.*`."""
    return subjects.inbox(role, f"{instance}-js", ""), subjects.inbox(role, f"{instance}-pull", "")
