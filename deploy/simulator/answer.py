"""The answer to a request: what each choice says or calls, as one body or as the events of a stream.

Grammar of a stream as the real server writes it (OpenAI API reference, "Streaming"): a role chunk per choice, chunks
of content or of tool calls (id and name with the first of an index, then fragments of `arguments`), a chunk with
`finish_reason` and an empty delta per choice, with `stream_options.include_usage` one chunk without choices that
carries `usage` (null on all others), then `data: [DONE]`. Choices are interleaved. `created` is constant and ids come
from the seed: the same request gives the same bytes (I12).
"""

import random
import zlib
from collections.abc import Iterator
from typing import Any, Final

import orjson
from msgspec import Struct

from deploy.simulator import words
from deploy.simulator.bill import count_text, encoding
from deploy.simulator.wanted import Wanted

CREATED: Final = 1_760_000_000
DONE: Final = b"data: [DONE]\n\n"

_ALPHABET: Final = "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz23456789"


class Piece(Struct, frozen=True):
    """Something written as one chunk: JSON of its `delta`, and its output tokens."""

    delta: bytes
    tokens: int


class Choice(Struct, kw_only=True):
    """One choice: its pieces for a stream, its `message` for a whole answer."""

    role: bytes
    pieces: list[Piece]
    message: dict[str, Any]
    finish: str
    tokens: int


def _identity(dice: random.Random, prefix: str) -> str:
    return prefix + "".join(dice.choices(_ALPHABET, k=24))


# ---- text -----------------------------------------------------------------------------------------------------


def _spoken(wanted: Wanted, index: int) -> Choice:
    count, finish = wanted.chunks, "stop"
    if wanted.cap is not None and wanted.cap < count:
        count, finish = wanted.cap, "length"
    tokens = words.text(wanted.seed + index, count, mixed=wanted.mixed)
    return Choice(
        role=b'{"role":"assistant","content":"","refusal":null}',
        pieces=[Piece(b'{"content":"%b"}' % token.encode(), 1) for token in tokens] if wanted.stream else [],
        message={"role": "assistant", "content": "".join(tokens), "refusal": None, "annotations": []},
        finish=finish,
        tokens=count,
    )


# ---- tool calls -----------------------------------------------------------------------------------------------


def _value(schema: Any, dice: random.Random) -> Any:
    """A value that fits a property's JSON schema well enough for a client that checks it."""
    if not isinstance(schema, dict):
        return "x"
    enum = schema.get("enum")
    if isinstance(enum, list) and enum:
        return enum[0]
    fixed: dict[str, Any] = {
        "integer": dice.randrange(1, 100),
        "number": dice.randrange(1, 100) / 4,
        "boolean": dice.random() < 0.5,
        "array": [],
        "object": {},
        "null": None,
    }
    return fixed.get(str(schema.get("type")), dice.choice(words.PLAIN))


def arguments(function: dict[str, Any], dice: random.Random) -> str:
    """Arguments of a call: a JSON object with a value for every property of the function's schema."""
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    if not isinstance(properties, dict):
        return "{}"
    return orjson.dumps({name: _value(schema, dice) for name, schema in properties.items()}).decode()


def fragments(text: str) -> list[tuple[str, int]]:
    """A text cut at its tokens: (fragment, tokens); tokens that end inside a character stay together."""
    cut: list[tuple[str, int]] = []
    waiting: list[int] = []
    for token in encoding.encode(text):
        waiting.append(token)
        piece = encoding.decode(waiting)
        if piece is not None and "\ufffd" not in piece:
            cut.append((piece, len(waiting)))
            waiting = []
    whole = "".join(piece for piece, _ in cut)
    return cut if whole == text else [(text, count_text(text))]


class _Call(Struct):
    """One call as its pieces; `arguments` holds what the cap let through."""

    identity: str
    name: str
    pieces: list[Piece]
    arguments: str = ""


def _calls(wanted: Wanted, index: int) -> tuple[list[_Call], bool, int]:
    """The calls of one choice, whether the cap cut them, and their tokens."""
    dice = random.Random(wanted.seed + index)  # noqa: S311 - repeatable on purpose
    left = wanted.cap if wanted.cap is not None else 1 << 60
    start, calls = left, list[_Call]()
    for number, function in enumerate(wanted.tools):
        name, text = function["name"], arguments(function, dice)
        tokens = count_text(name)
        if tokens > left:
            return calls, True, start - left
        left -= tokens
        call = _Call(_identity(dice, "call_"), name, [])
        opening = {
            "index": number,
            "id": call.identity,
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        call.pieces.append(Piece(orjson.dumps({"tool_calls": [opening]}), tokens))
        calls.append(call)
        for fragment, size in fragments(text):
            if size > left:
                return calls, True, start - left
            left -= size
            call.arguments += fragment
            delta = {"tool_calls": [{"index": number, "function": {"arguments": fragment}}]}
            call.pieces.append(Piece(orjson.dumps(delta), size))
    return calls, False, start - left


def _called(wanted: Wanted, index: int) -> Choice:
    calls, cut, tokens = _calls(wanted, index)
    pieces = [piece for call in calls for piece in call.pieces]
    if wanted.interleave and calls:
        longest = max(len(call.pieces) for call in calls)
        pieces = [call.pieces[i] for i in range(longest) for call in calls if i < len(call.pieces)]
    shown = [
        {"id": call.identity, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]
    return Choice(
        role=b'{"role":"assistant","content":null,"refusal":null}',
        pieces=pieces,
        message={"role": "assistant", "content": None, "tool_calls": shown, "refusal": None, "annotations": []},
        finish="length" if cut else "tool_calls",
        tokens=tokens,
    )


# ---- the answer -----------------------------------------------------------------------------------------------


class Answer:
    """Everything that would be said to one request."""

    def __init__(self, wanted: Wanted, label: str) -> None:
        self.wanted = wanted
        self.choices = [(_called if wanted.tools else _spoken)(wanted, index) for index in range(wanted.n)]
        self.output_tokens = sum(choice.tokens for choice in self.choices)
        self.identity = f"chatcmpl-sim{wanted.seed & 0xFFFFFFFF:08x}{zlib.crc32(label.encode()):08x}"

    def usage(self) -> dict[str, Any]:
        """The true `usage` object."""
        return {
            "prompt_tokens": self.wanted.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.wanted.prompt_tokens + self.output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.wanted.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    def whole(self, usage: dict[str, Any] | None) -> bytes:
        """The body of an answer that is not streamed; without `usage` when it is None."""
        body: dict[str, Any] = {
            "id": self.identity,
            "object": "chat.completion",
            "created": CREATED,
            "model": self.wanted.model,
            "choices": [
                {"index": index, "message": choice.message, "logprobs": None, "finish_reason": choice.finish}
                for index, choice in enumerate(self.choices)
            ],
            "service_tier": "default",
            "system_fingerprint": "fp_simulator",
        }
        if usage is not None:
            body["usage"] = usage
        return orjson.dumps(body)

    def events(self, usage: dict[str, Any] | None) -> Iterator[tuple[bytes, int]]:
        """The stream without its `[DONE]`: (event, output tokens in it)."""
        head = (
            f'data: {{"id":"{self.identity}","object":"chat.completion.chunk","created":{CREATED},'
            f'"model":"{self.wanted.model}","service_tier":"default","system_fingerprint":"fp_simulator","choices":['
        ).encode()
        tail = b'],"usage":null}\n\n' if self.wanted.include_usage else b"]}\n\n"
        fronts = [b'%b{"index":%d,"delta":' % (head, index) for index in range(len(self.choices))]
        going = b',"logprobs":null,"finish_reason":null}' + tail
        for front, choice in zip(fronts, self.choices, strict=True):
            yield front + choice.role + going, 0
        for number in range(max(len(choice.pieces) for choice in self.choices)):
            for front, choice in zip(fronts, self.choices, strict=True):
                if number < len(choice.pieces):
                    piece = choice.pieces[number]
                    yield front + piece.delta + going, piece.tokens
        for front, choice in zip(fronts, self.choices, strict=True):
            yield b'%b{},"logprobs":null,"finish_reason":"%b"}%b' % (front, choice.finish.encode(), tail), 0
        if self.wanted.include_usage and usage is not None:
            yield b'%b],"usage":%b}\n\n' % (head, orjson.dumps(usage)), 0
