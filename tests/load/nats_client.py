"""A direct publisher: asks Hotpath over NATS, without the HTTP front, as deploy/WIRE.md describes.

    async with NatsClient(url) as client:
        async for event in client.ask(tenant, key, {"model": "sim-fast", "messages": [...], "stream": True}):
            ...  # Write(data, head), then exactly one Finish(summary, hops) or Fail(error, started, head, hops)

Its place on the wire: one instance of the role `loadgen`. It may publish to hotpath.v1.admit, hotpath.v1.control.* and
hotpath.v1.beat.loadgen.*, and subscribe to hotpath.v1.reply.loadgen.* and nothing else. Frames come to
`reply.loadgen.<instance>`. NATS's 503 comes to the reply subject of the publish that nobody took, without saying which
publish it was; so each request under way and each instance asked "are you there?" has a reply subject of its own,
`reply.loadgen.<instance>-<n>`, used again when its turn is over. Who owns a stream, what a gap or a death means and
when to deliver again is decided by shared.core.stream: the rules the ingress follows.
"""

import asyncio
import os
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import Any, Final, Literal, Self

import orjson
from msgspec.structs import replace

from shared.bus.base import BusUnavailable, PayloadTooLarge
from shared.bus.nats import NatsBus
from shared.core.stream import WINDOW, Deliver, Discard, Events, Fail, Finish, Limits, Stop, Stream, Write
from shared.wire import errors, messages, subjects
from shared.wire.messages import Admit, Ask, Beat, Cancel, Credit, Frame, ReplyTo

ROLE: Final = "loadgen"
TICK_S: Final = 0.05
BEAT_S: Final = 0.5
PING_S: Final = 0.25
CREDIT_S: Final = 0.5
SILENT_S: Final = 1.5  # an instance we wait on that says nothing for so long is dead
HANDOFF_S: Final = 0.5
PAIR_WINDOW: Final = 16 << 20  # Delta bytes on their way from one instance to us
MAX_ASKS: Final = 4096  # requests under way; also bounds the reply subjects
MAX_GONE: Final = 4096  # ended streams whose provider was told to stop, so that it is told once
ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz234567"

Outcome = Write | Finish | Fail


class _Peer:
    """An instance that sends to us or that we wait on."""

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self.heard = now
        self.read = 0  # highest Batch.offset
        self.credited = 0  # of it, told
        self.waiting = 0  # streams that wait on it, as of the last tick
        self.inbox: _Inbox | None = None


class _Inbox:
    """One reply subject of ours; `on_reply(no_responders)` is whoever uses it now."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.on_reply: Callable[[bool], None] | None = None

    def handle(self, _subject: str, _reply: str, _payload: bytes, no_responders: bool) -> None:
        if self.on_reply is not None:
            self.on_reply(no_responders)


class _Asked:
    """One request under way: its rules, its request, and what the caller has not taken yet."""

    def __init__(self, ask: Ask, stream: Stream, inbox: _Inbox, record: list[Frame] | None) -> None:
        self.ask = ask
        self.stream = stream
        self.inbox = inbox
        self.record = record
        self.events: deque[Outcome] = deque()  # at most a window, or a whole answer of at most `max_bytes`
        self.woken = asyncio.Event()
        self.credited = 0  # bytes the provider has been told of


class NatsClient:
    """Any number of requests at once (at most MAX_ASKS) over one connection. Use it as an async context manager."""

    def __init__(self, url: str, *, timeout_s: float = 60.0, max_bytes: int = 128 << 20) -> None:
        self.instance = "".join(secrets.choice(ALPHABET) for _ in range(12))
        self._url = url
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._asked: dict[int, _Asked] = {}
        self._peers: dict[str, _Peer] = {}
        self._free: list[_Inbox] = []
        self._inboxes = 0
        self._gone: dict[tuple[int, int], None] = {}
        self._next = 0
        self._bus: NatsBus | None = None
        self._ticking: asyncio.Task[None] | None = None

    # ---- the connection ------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._bus = await NatsBus.connect(self._url, f"{ROLE}-{self.instance}", self._on_change)
        await self._bus.subscribe(subjects.reply(ROLE, self.instance), self._on_batch)
        self._beat()
        self._ticking = asyncio.create_task(self._tick_forever())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._bus is not None
        assert self._ticking is not None
        self._ticking.cancel()
        await asyncio.gather(self._ticking, return_exceptions=True)
        for asked in list(self._asked.values()):
            self._act(asked, asked.stream.leave("the client ends"))
        await self._bus.close()

    def _on_change(self, connected: bool) -> None:
        if not connected:
            for asked in list(self._asked.values()):
                self._act(asked, asked.stream.fail(errors.BusDown().body(), "the bus is away"))

    def _publish(self, subject: str, payload: bytes, reply: str = "") -> bool:
        assert self._bus is not None
        try:
            self._bus.publish(subject, payload, reply)
        except BusUnavailable:
            return False
        return True

    async def _inbox(self) -> _Inbox:
        """A reply subject nobody uses."""
        if self._free:
            return self._free.pop()
        assert self._bus is not None
        inbox = _Inbox(subjects.reply(ROLE, f"{self.instance}-{self._inboxes}"))
        self._inboxes += 1
        await self._bus.subscribe(inbox.subject, inbox.handle)
        return inbox

    def _release(self, inbox: _Inbox) -> None:
        inbox.on_reply = None
        self._free.append(inbox)

    # ---- asking --------------------------------------------------------------------------------------------------

    async def ask(
        self,
        tenant: str,
        key: str,
        body: bytes | dict[str, Any],
        *,
        label: str = "",
        rid: str = "",
        done: Literal["inline", "append", "comment"] = "inline",
        timeout_ms: int = 0,
        record: list[Frame] | None = None,
    ) -> AsyncGenerator[Outcome, None]:
        """Ask, and give what comes: Write..., then one Finish or Fail. Leaving the loop early cancels the request, at
        once if the generator is closed (contextlib.aclosing).

        `tenant` and `key` are ids (`hotpath keys create --json`), the tenant a synthetic one. `record` collects every
        frame of the request as it came. Raises RuntimeError when MAX_ASKS are under way.
        """
        if len(self._asked) >= MAX_ASKS:
            raise RuntimeError(f"{MAX_ASKS} requests are under way")
        raw = body if isinstance(body, bytes) else orjson.dumps(body)
        inbox = await self._inbox()
        self._next += 1
        ask = Ask(
            rid=rid or secrets.token_hex(16),
            tenant=tenant,
            key=key,
            reply=ReplyTo(ROLE, self.instance, self._next),
            label=label,
            done=done,
            timeout_ms=timeout_ms,
            body=raw,
        )
        loop = asyncio.get_running_loop()
        asked = _Asked(ask, Stream(self._limits(timeout_ms), loop.time()), inbox, record)
        self._asked[ask.reply.stream] = asked
        try:
            self._act(asked, asked.stream.begin(loop.time(), HANDOFF_S))
            while True:
                while asked.events:
                    event = asked.events.popleft()
                    if isinstance(event, Write):
                        self._took(asked, len(event.data), loop.time())
                    yield event
                    if not isinstance(event, Write):
                        return
                asked.woken.clear()
                await asked.woken.wait()
        finally:
            self._act(asked, asked.stream.leave("the caller left"))
            del self._asked[ask.reply.stream]
            self._release(inbox)

    def _limits(self, timeout_ms: int) -> Limits:
        """One total timer is enough for a test; the provider has the finer ones. Text is given out as it comes, as of a
        stream, whatever was asked for."""
        total = timeout_ms / 1000 + 1 if timeout_ms else self._timeout_s
        return Limits(streamed=True, first_token=total, idle=total, total=total, max_bytes=self._max_bytes)

    def _act(self, asked: _Asked, events: Events) -> None:
        for event in events:
            if isinstance(event, Deliver):
                self._deliver(asked, event)
            elif isinstance(event, Stop):
                self._cancel(event.instance, asked.ask.reply.stream, event.delivery, event.reason)
            elif not isinstance(event, Discard):  # only a death voids text, and nobody watches for deaths here
                asked.events.append(event)
                asked.woken.set()

    def _deliver(self, asked: _Asked, event: Deliver) -> None:
        delivery = event.delivery
        again = replace(asked.ask, delivery=delivery, lost=event.lost)

        def on_reply(no_responders: bool) -> None:
            if no_responders:
                self._act(asked, asked.stream.undeliverable(delivery, errors.NoWorker().body()))

        asked.inbox.on_reply = on_reply
        try:
            sent = self._publish(subjects.ADMIT, messages.encode(Admit(ask=again)), asked.inbox.subject)
        except PayloadTooLarge:
            self._act(asked, asked.stream.undeliverable(delivery, errors.TooLarge().body()))
            return
        if not sent:
            self._act(asked, asked.stream.undeliverable(delivery, errors.BusDown().body()))

    def _cancel(self, instance: str, stream: int, delivery: int, reason: str) -> None:
        message = Cancel(role=ROLE, instance=self.instance, stream=stream, delivery=delivery, reason=reason)
        self._publish(subjects.control(instance), messages.encode(message))

    # ---- frames --------------------------------------------------------------------------------------------------

    def _on_batch(self, _subject: str, _reply: str, payload: bytes, _no_responders: bool) -> None:
        try:
            batch = messages.decode_batch(payload)
        except messages.UNREADABLE:
            return
        now = asyncio.get_running_loop().time()
        peer = self._peer(batch.instance, now)
        peer.heard = now
        peer.read = max(peer.read, batch.offset)
        for raw in batch.frames:
            frame: Frame | messages.Unknown | None
            try:
                frame = messages.decode_frame(raw)
            except messages.UNREADABLE:
                frame = messages.unknown_frame(raw)
                if frame is None:
                    continue
            asked = self._asked.get(frame.stream)
            if asked is None:
                self._stray(frame, batch.instance)
                continue
            if asked.record is not None and not isinstance(frame, messages.Unknown):
                asked.record.append(frame)
            self._act(asked, asked.stream.frame(frame, batch.instance, now))
        if peer.read - peer.credited >= PAIR_WINDOW // 2:
            self._credit(peer)

    def _stray(self, frame: Frame | messages.Unknown, sender: str) -> None:
        """A frame of a stream that is over: whoever still works for it is told to stop, once."""
        key = (frame.stream, frame.delivery)
        if key in self._gone or not isinstance(frame, messages.Accepted | messages.Delta):
            return
        if len(self._gone) >= MAX_GONE:
            self._gone.clear()
        self._gone[key] = None
        self._cancel(sender, *key, "stream is over")

    # ---- credit --------------------------------------------------------------------------------------------------

    def _took(self, asked: _Asked, size: int, now: float) -> None:
        stream = asked.stream
        stream.took(stream.taken + size, now)
        if stream.taken - asked.credited >= WINDOW // 2 and stream.holder:
            self._credit(self._peer(stream.holder, now))

    def _credit(self, peer: _Peer) -> None:
        taken = []
        for number, asked in self._asked.items():
            if asked.stream.holder == peer.name:
                taken.append((number, asked.stream.delivery, asked.stream.taken))
                asked.credited = asked.stream.taken
        peer.credited = peer.read
        message = Credit(role=ROLE, instance=self.instance, read=peer.read, streams=tuple(taken))
        self._publish(subjects.control(peer.name), messages.encode(message))

    # ---- every 50 ms ---------------------------------------------------------------------------------------------

    def _peer(self, name: str, now: float) -> _Peer:
        peer = self._peers.get(name)
        if peer is None:
            peer = self._peers[name] = _Peer(name, now)
        return peer

    def _beat(self) -> None:
        beat = Beat(role=ROLE, instance=self.instance, pid=os.getpid(), in_flight=len(self._asked), capacity=MAX_ASKS)
        self._publish(subjects.beat(ROLE, self.instance), messages.encode(beat))

    async def _tick_forever(self) -> None:
        loop = asyncio.get_running_loop()
        due = {"beat": 0.0, "ping": 0.0, "credit": 0.0}
        while True:
            await asyncio.sleep(TICK_S)
            now = loop.time()
            for asked in list(self._asked.values()):
                if now >= asked.stream.due:
                    self._act(asked, asked.stream.tick(now))
            if now >= due["beat"]:
                due["beat"] = now + BEAT_S
                self._beat()
            if now >= due["ping"]:
                due["ping"] = now + PING_S
                await self._watch(now)
            if now >= due["credit"]:
                due["credit"] = now + CREDIT_S
                for peer in [peer for peer in self._peers.values() if peer.waiting]:
                    self._credit(peer)

    async def _watch(self, now: float) -> None:
        """Ask everybody we wait on whether it is there; give up on who has been silent; forget who is not needed."""
        waits: dict[str, int] = {}
        for asked in self._asked.values():
            name = asked.stream.waits_on()
            if name:
                waits[name] = waits.get(name, 0) + 1
        for name in waits.keys() - self._peers.keys():
            self._peer(name, now)
        for peer in list(self._peers.values()):
            started = peer.waiting == 0
            peer.waiting = waits.get(peer.name, 0)
            if not peer.waiting:
                self._forget(peer, now)
            elif not started and now - peer.heard > SILENT_S:
                self._died(peer.name)
            else:
                peer.heard = now if started else peer.heard
                await self._ping(peer)

    async def _ping(self, peer: _Peer) -> None:
        if peer.inbox is None:
            peer.inbox = await self._inbox()
        loop = asyncio.get_running_loop()

        def on_reply(no_responders: bool) -> None:
            if no_responders:
                self._died(peer.name)
            else:
                peer.heard = loop.time()

        peer.inbox.on_reply = on_reply
        self._publish(subjects.control(peer.name), b"", peer.inbox.subject)

    def _died(self, name: str) -> None:
        now = asyncio.get_running_loop().time()
        for asked in list(self._asked.values()):
            self._act(asked, asked.stream.died(name, now))

    def _forget(self, peer: _Peer, now: float) -> None:
        if now - peer.heard > SILENT_S:
            del self._peers[peer.name]
            if peer.inbox is not None:
                self._release(peer.inbox)
