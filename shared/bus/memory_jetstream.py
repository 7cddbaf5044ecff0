"""JetStream for `memory.Broker`: as much of the server as jetstream.py and consumer.py ask of it.

    MemoryJetStream(broker)     from now on the broker has one

It answers the same requests at the same subjects, so that the code above it is the same; nothing is written to disk.
"""

import asyncio
import time
from collections import deque
from typing import Any, Final

import msgspec
from msgspec import Struct

from shared.bus.memory import Broker

_NS: Final = 1_000_000_000
_json: Final = msgspec.json.Encoder().encode


class _Message(Struct):
    sequence: int
    at: int  # ns
    payload: bytes


class _Pull(Struct):
    inbox: str
    left: int
    timer: asyncio.TimerHandle | None = None


class _Consumer:
    """The pulls that wait, what was delivered and not acknowledged, what is to be delivered again."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.cursor = int(config.get("opt_start_seq", 1))
        self.pulls: deque[_Pull] = deque()
        self.again: deque[int] = deque()
        self.deliveries: dict[int, int] = {}
        self.timers: dict[int, asyncio.TimerHandle] = {}

    @property
    def explicit(self) -> bool:
        return bool(self.config.get("ack_policy") == "explicit")

    @property
    def full(self) -> bool:
        return self.explicit and len(self.timers) >= self.config.get("max_ack_pending", 1000)


class _Stream:
    """What is stored."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.messages: dict[int, _Message] = {}
        self.last = 0
        self.consumers: dict[str, _Consumer] = {}

    def sweep(self) -> None:
        oldest = time.time_ns() - self.config["max_age"]
        for sequence in [number for number, message in self.messages.items() if message.at < oldest]:
            del self.messages[sequence]

    def bytes(self) -> int:
        return sum(len(message.payload) for message in self.messages.values())


class MemoryJetStream:
    """The server's side. Everything happens in the turn of the publish; deliveries come in a later one."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._loop = asyncio.get_running_loop()
        self.streams: dict[str, _Stream] = {}
        broker.service = self._take

    def _take(self, subject: str, payload: bytes, reply: str) -> bool:
        tokens = subject.split(".")
        if tokens[:2] == ["$JS", "API"]:
            return self._api(tokens[2:], payload, reply)
        if tokens[:2] == ["$JS", "ACK"]:
            self._acked(tokens, payload)
            return True
        for name, stream in self.streams.items():
            if subject in stream.config["subjects"]:
                self._store(name, stream, payload, reply)
                return True
        return False

    def _answer(self, reply: str, **fields: Any) -> None:
        if reply:
            self._broker.answer(reply, _json(fields))

    def _fail(self, reply: str, number: int, text: str) -> None:
        self._answer(reply, error={"code": 400, "err_code": number, "description": text})

    # ---- the API -----------------------------------------------------------------------------------------------------

    def _api(self, tokens: list[str], payload: bytes, reply: str) -> bool:
        kind, verb, name = tokens[0], tokens[1], tokens[3 if tokens[1] == "MSG" else 2]
        stream = self.streams.get(name)
        if kind == "STREAM" and verb == "CREATE":
            self._create(name, msgspec.json.decode(payload), reply)
        elif stream is None:
            if verb == "MSG":
                return False  # nobody listens there: 503
            self._fail(reply, 10059, "stream not found")
        elif kind == "STREAM" and verb == "DELETE":
            del self.streams[name]
        elif kind == "STREAM":
            self._stream(verb, stream, payload, reply)
        else:
            return self._consumer(verb, stream, tokens, payload, reply)
        return True

    def _create(self, name: str, config: dict[str, Any], reply: str) -> None:
        stream = self.streams.get(name)
        if stream is not None and stream.config != config:
            self._fail(reply, 10058, "stream name already in use with a different configuration")
            return
        if stream is None:
            self.streams[name] = _Stream(config)
        self._answer(reply, config=config)

    def _stream(self, verb: str, stream: _Stream, payload: bytes, reply: str) -> None:
        if verb == "UPDATE":
            config = msgspec.json.decode(payload)
            if config["storage"] != stream.config["storage"]:
                self._fail(reply, 10052, "stream configuration update can not change storage type")
                return
            stream.config = config
        stream.sweep()
        first = min(stream.messages, default=stream.last + 1)
        state = {
            "messages": len(stream.messages), "bytes": stream.bytes(), "first_seq": first, "last_seq": stream.last,
        }  # fmt: skip
        self._answer(reply, state=state)

    def _consumer(self, verb: str, stream: _Stream, tokens: list[str], payload: bytes, reply: str) -> bool:
        name = tokens[-1]
        consumer = stream.consumers.get(name)
        if verb == "CREATE":
            config = msgspec.json.decode(payload)["config"]
            if consumer is None:
                stream.consumers[name] = _Consumer(config)
            else:
                consumer.config = config
            self._answer(reply)
        elif verb == "DELETE":
            stream.consumers.pop(name, None)
            self._answer(reply)
        elif consumer is None:
            return False
        else:
            self._pull(tokens[-2], name, consumer, msgspec.json.decode(payload), reply)
        return True

    # ---- messages ----------------------------------------------------------------------------------------------------

    def _store(self, name: str, stream: _Stream, payload: bytes, reply: str) -> None:
        stream.sweep()
        if stream.bytes() + len(payload) > stream.config["max_bytes"]:
            self._fail(reply, 10077, "maximum bytes exceeded")
            return
        stream.last += 1
        stream.messages[stream.last] = _Message(stream.last, time.time_ns(), payload)
        self._answer(reply, stream=name, seq=stream.last)
        for consumer_name, consumer in stream.consumers.items():
            self._pump(name, consumer_name, consumer)

    def _pull(self, stream: str, name: str, consumer: _Consumer, body: dict[str, Any], inbox: str) -> None:
        pull = _Pull(inbox, int(body["batch"]))
        pull.timer = self._loop.call_later(body["expires"] / _NS, self._expire, consumer, pull)
        consumer.pulls.append(pull)
        self._pump(stream, name, consumer)

    def _expire(self, consumer: _Consumer, pull: _Pull) -> None:
        if pull in consumer.pulls:
            consumer.pulls.remove(pull)
            self._broker.answer(pull.inbox, b"NATS/1.0 408 Request Timeout\r\n\r\n")

    def _pump(self, stream: str, name: str, consumer: _Consumer) -> None:
        """Give to the pulls that wait what there is."""
        held = self.streams[stream]
        held.sweep()
        while consumer.pulls and not consumer.full:
            message = self._next(held, consumer)
            if message is None:
                return
            pull = consumer.pulls[0]
            pull.left -= 1
            if pull.left == 0:
                consumer.pulls.popleft()
                if pull.timer is not None:
                    pull.timer.cancel()
            count = consumer.deliveries.get(message.sequence, 0) + 1
            if consumer.explicit:
                consumer.deliveries[message.sequence] = count
                self._arm(stream, name, consumer, message.sequence, consumer.config["ack_wait"] / _NS)
            reply = f"$JS.ACK.{stream}.{name}.{count}.{message.sequence}.{consumer.cursor}.{message.at}.0"
            self._broker.answer(pull.inbox, message.payload, held.config["subjects"][0], reply)

    def _next(self, held: _Stream, consumer: _Consumer) -> _Message | None:
        while consumer.again:
            if (message := held.messages.get(consumer.again.popleft())) is not None:
                return message
        while consumer.cursor <= held.last:
            consumer.cursor += 1
            if (message := held.messages.get(consumer.cursor - 1)) is not None:
                return message
        return None

    def _arm(self, stream: str, name: str, consumer: _Consumer, sequence: int, delay: float) -> None:
        if (timer := consumer.timers.pop(sequence, None)) is not None:
            timer.cancel()
        consumer.timers[sequence] = self._loop.call_later(delay, self._redeliver, stream, name, consumer, sequence)

    def _redeliver(self, stream: str, name: str, consumer: _Consumer, sequence: int) -> None:
        consumer.timers.pop(sequence, None)
        consumer.again.append(sequence)
        self._pump(stream, name, consumer)

    def _acked(self, tokens: list[str], payload: bytes) -> None:
        stream, name, sequence = tokens[2], tokens[3], int(tokens[5])
        held = self.streams.get(stream)
        consumer = held.consumers.get(name) if held is not None else None
        if consumer is None or sequence not in consumer.timers:
            return
        if payload.startswith(b"-NAK"):
            delay = msgspec.json.decode(payload[5:])["delay"] / _NS if len(payload) > 5 else 0.0
            self._arm(stream, name, consumer, sequence, delay)
        elif payload == b"+WPI":
            self._arm(stream, name, consumer, sequence, consumer.config["ack_wait"] / _NS)
        else:
            consumer.timers.pop(sequence).cancel()
            consumer.deliveries.pop(sequence, None)
            self._pump(stream, name, consumer)
