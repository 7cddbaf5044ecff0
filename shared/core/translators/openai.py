"""The OpenAI chat wire format (any compatible server) to the OpenAI chat surface: bytes pass through untouched.

Sources: https://platform.openai.com/docs/api-reference/chat (object, streaming, create), openai-python
src/openai/types/chat and src/openai/_streaming.py; reference/translation.md 1 for what servers do in practice.

A stream, as this file sees it. Chunks pass as they come, but two kinds: the usage chunk (`choices: []`) is read and
goes on only to a client that asked for it, and from the moment every open choice has its finish_reason all chunks are
held back, since the last one with a finish_reason carries the payload of D5, known only after the settlement:

    feed(chunk)*      -> the chunk | b"" (held, or the usage chunk of a client that did not ask)
    feed([DONE]) or finish() at the end of the bytes; then `tail(x_br)` -> what was held

A stream that is cut since nothing more is paid for ends as one that came to its cap: a chunk with `"finish_reason":
"length"` for each choice that was open, an open tool call with the arguments it has so far.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
from msgspec import Raw, Struct

from shared.core import sse
from shared.core.translators import ending, failures, usage
from shared.core.translators.base import Failure, Headers, Request, Spoken, UpstreamFailure, Usage
from shared.core.translators.texts import MAX_PIECES, MAX_TEXT, Texts, strings
from shared.wire.errors import UpstreamInvalid, UpstreamTruncated
from shared.wire.messages import Ask, Step

PATH: Final = "/chat/completions"
DONE: Final = b"[DONE]"

#: Chunks and bytes held back after the finish; a provider sends one or two.
MAX_HELD: Final = 256
MAX_HELD_BYTES: Final = 262_144
MAX_REASON: Final = 64  # characters of a finish_reason; OpenAI's longest has 14

_CAP_FIELDS: Final[tuple[str, ...]] = ("max_completion_tokens", "max_tokens")


class _Delta(Struct, gc=False):
    content: Any = None
    refusal: Any = None
    reasoning_content: Any = None  # DeepSeek, vLLM
    reasoning: Any = None  # OpenRouter
    tool_calls: Any = None
    function_call: Any = None


class _Choice(Struct, gc=False):
    index: Any = 0
    delta: _Delta | None = None
    finish_reason: Any = None


class _Chunk(Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: Any = None
    error: Any = None


class _Answer(Struct, gc=False):
    choices: list[dict[str, Any]] | None = None
    usage: Any = None
    error: Any = None


_chunk: Final = msgspec.json.Decoder(_Chunk).decode
_answer: Final = msgspec.json.Decoder(_Answer).decode
_fields: Final = msgspec.json.Decoder(dict[str, Raw]).decode
_options: Final = msgspec.json.Decoder(dict[str, Raw] | None).decode
_json: Final = msgspec.json.Encoder().encode


class OpenAI:
    """The dialect."""

    def headers(self, key: str) -> Headers:
        """Bearer authentication, when the endpoint has a key."""
        common = (("Content-Type", "application/json"),)
        return (("Authorization", f"Bearer {key}"), *common) if key else common

    def translator(self, ask: Ask, secrets: tuple[str, ...]) -> "OpenAITranslator":
        """One for each upstream call."""
        return OpenAITranslator(ask, secrets)


class OpenAITranslator:
    """See base.Translator."""

    __slots__ = (
        "_asked_usage", "_choices", "_cut", "_finished", "_held", "_held_size", "_open", "_reasons", "_sample",
        "_secrets", "_texts", "done", "finished", "started", "usage", "usage_sent",
    )  # fmt: skip

    def __init__(self, ask: Ask, secrets: tuple[str, ...]) -> None:
        self.started = False
        self.finished = False
        self.done = False
        self.usage: Usage | None = None
        self.usage_sent: Any = None
        self._secrets = secrets
        self._asked_usage = ask.include_usage
        self._choices = ask.n
        self._open: set[int] = set()  # choices of the request that have begun
        self._finished: set[int] = set()  # those with a finish_reason
        self._reasons: dict[int, str] = {}  # and which
        self._held: list[tuple[bytes, bool]] = []  # payload, whether it carries a finish_reason
        self._held_size = 0
        self._sample = b""  # a chunk of it, for the fields that all have
        self._cut: list[int] | None = None  # the choices that were open then
        self._texts = Texts()

    # ---- what to send ------------------------------------------------------------------------------------------------

    def request(self, ask: Ask, step: Step, cap: int, cap_field: str) -> Request:
        """Values travel as they are (no number is read and written again); see base.Translator."""
        fields = _fields(ask.body)
        fields["model"] = Raw(_json(step.model))
        limit = Raw(b"%d" % cap)
        for field in tuple(name for name in _CAP_FIELDS if name in fields) or (cap_field,):
            fields[field] = limit
        if ask.stream:
            options = _options(fields.get("stream_options", Raw(b"null"))) or {}
            options["include_usage"] = Raw(b"true")
            fields["stream_options"] = Raw(_json(options))
        accept = "text/event-stream" if ask.stream else "application/json"
        return Request(PATH, (("Accept", accept),), _json(fields))

    # ---- a stream ----------------------------------------------------------------------------------------------------

    def feed(self, payload: bytes) -> bytes:
        """One event; see base.Translator."""
        if self.done:
            return b""
        try:
            chunk = _chunk(payload)
        except (ValueError, RecursionError):  # msgspec's errors are ValueErrors; so is bad UTF-8
            return self._feed_odd(payload)
        choices = chunk.choices
        if choices and len(choices) == 1 and not self._held and chunk.usage is None and chunk.error is None:
            choice = choices[0]
            if choice.index == 0 and not choice.finish_reason and payload.isascii() and self._is_plain(choice.delta):
                return sse.encode(payload)
        return self._feed_any(payload, chunk)

    def _is_plain(self, delta: _Delta | None) -> bool:
        """The common case: nothing but a piece of text of a choice that has begun; it is kept."""
        texts = self._texts
        if delta is None or 0 not in self._open or texts.kept > MAX_TEXT:
            return False
        content = delta.content
        if (
            type(content) is not str
            or not content
            or delta.tool_calls is not None
            or delta.refusal is not None
            or delta.reasoning_content is not None
            or delta.reasoning is not None
            or delta.function_call is not None
        ):
            return False
        self.started = True
        texts.kept += len(content) if content.isascii() else len(content.encode())
        texts.main.append(content)
        return True

    def _feed_odd(self, payload: bytes) -> bytes:
        """Not a chunk: the terminal, nothing at all, or JSON but for what JavaScript and Python writers add. NaN and
        Infinity (vLLM's logprobs) become null; halves of a surrogate pair stay escaped, counted as another character.
        """
        if payload.startswith(DONE):
            return self._end()
        if not payload.strip():
            return b""
        try:
            fixed = _lenient(payload)
        except (ValueError, RecursionError):
            fixed = b""
        for text in (fixed, fixed.replace(b"\\ud", b"\\ue")):
            try:
                return self._feed_any(fixed, _chunk(text))
            except (ValueError, RecursionError):
                continue
        if self.finished:
            return b""  # everything was said
        raise UpstreamInvalid

    def _feed_any(self, payload: bytes, chunk: _Chunk) -> bytes:
        if chunk.error:
            if self.finished:
                return b""  # everything was said
            raise UpstreamFailure(failures.in_stream(chunk.error, self._secrets))
        try:
            if not payload.isascii():
                payload.decode()
            event = sse.encode(payload)
        except ValueError as exc:  # NotJson and UnicodeDecodeError
            raise UpstreamInvalid from exc
        if chunk.choices:
            self._sample = payload
        if chunk.usage is not None:
            self.usage_sent = chunk.usage
            self.usage = usage.read(chunk.usage) or self.usage
            if not chunk.choices:
                return self._pass(event) if self._asked_usage else b""
        finishes, goes_on = self._read(chunk.choices or [])
        if goes_on and self._held and self._cut is None:  # a choice was still to come: what is held was not the last
            return self._release() + (self._pass(event, finishes=True) if finishes else event)
        return self._pass(event, finishes=finishes)

    def _read(self, choices: list[_Choice]) -> tuple[bool, bool]:
        """Whether one of them finishes, and whether one of them had not finished before."""
        finishes = goes_on = False
        for choice in choices:
            index = choice.index if type(choice.index) is int else 0
            if 0 <= index < self._choices:
                self._open.add(index)
                goes_on = goes_on or index not in self._finished
            if choice.delta is not None:
                self._take(index, choice.delta)
            if choice.finish_reason:
                finishes = True
                self._finish(index, choice.finish_reason)
        return finishes, goes_on

    def _finish(self, index: int, reason: Any) -> None:
        self.started = True
        if 0 <= index < self._choices:
            self._reasons[index] = str(reason)[:MAX_REASON]
            self._finished.add(index)
            self.finished = len(self._finished) >= self._choices

    def _pass(self, event: bytes, *, finishes: bool = False) -> bytes:
        """The event, or b"" when it is held back."""
        if self._cut is not None:
            return b""
        if not finishes and not self._held:
            return event
        self._held.append((event, finishes))
        self._held_size += len(event)
        if len(self._held) > MAX_HELD or self._held_size > MAX_HELD_BYTES:
            raise UpstreamInvalid
        return b""

    def _release(self) -> bytes:
        events = b"".join(event for event, _ in self._held)
        self._held.clear()
        self._held_size = 0
        return events

    def _end(self) -> bytes:
        """The terminal: every choice that began must have finished."""
        if not self._finished or self._open - self._finished:
            raise UpstreamTruncated
        self.done = True
        return b""

    def finish(self, rest: bytes, stray: bytes) -> bytes:
        """The bytes ended, perhaps without [DONE]; see base.Translator."""
        out = b""
        if rest and not self.done:
            try:
                out = self.feed(rest)
            except UpstreamInvalid as exc:
                raise UpstreamTruncated from exc
        if not self.done:
            if stray and not self.finished and (error := failures.read_error(stray)):
                raise UpstreamFailure(failures.in_stream(error, self._secrets))
            out += self._end()
        return out

    def cut(self) -> None:
        """See base.Translator."""
        self._cut = [index for index in range(self._choices) if index not in self._finished]

    def close(self, prompt: int, cached: int, completion: int) -> None:
        """See base.Translator."""
        self._reasons.update(dict.fromkeys(self._cut or (), "length"))
        events = ending.by_cap(self._sample, self._cut or (), self._open, usage=self._asked_usage)
        self._held += [(event, True) for event in events]
        if self._asked_usage:
            self._held.append((ending.used(self._sample, prompt, cached, completion), False))

    def tail(self, x_br: bytes) -> bytes:
        """The held chunks; see base.Translator."""
        if x_br:
            last = next((i for i in range(len(self._held) - 1, -1, -1) if self._held[i][1]), None)
            if last is not None:
                self._held[last] = (ending.insert(self._held[last][0], x_br), True)
        return self._release()

    # ---- a whole answer ----------------------------------------------------------------------------------------------

    def whole(self, body: bytes) -> bytes:
        """The provider's JSON, untouched; see base.Translator."""
        return self._whole(body)[0]

    def _whole(self, body: bytes) -> tuple[bytes, list[dict[str, Any]]]:
        try:
            try:
                answer = _answer(body)
            except (ValueError, RecursionError):
                body = _lenient(body)
                answer = _answer(body)
            if not body.isascii():
                body.decode()
        except (ValueError, RecursionError) as exc:
            raise UpstreamInvalid from exc
        if answer.error:
            raise UpstreamFailure(failures.in_stream(answer.error, self._secrets))
        choices = answer.choices
        if not choices or not all(isinstance(choice.get("message"), dict) for choice in choices):
            raise UpstreamInvalid
        self.usage_sent = answer.usage
        self.usage = usage.read(answer.usage)
        for number, choice in enumerate(choices[:MAX_PIECES]):
            self._take(number, msgspec.convert(_known(choice["message"]), _Delta))
            self._reasons[number] = str(choice.get("finish_reason") or "")[:MAX_REASON]
        self.started = self.finished = True
        return body, choices

    def whole_as_stream(self, body: bytes) -> bytes:
        """One chunk with every choice's message as its delta, one with the finish reasons (held), the usage."""
        body, choices = self._whole(body)
        fields = _fields(body)
        base = ending.base(body)
        deltas, ends = [], []
        for number, choice in enumerate(choices):
            index = choice.get("index", number)
            deltas.append({"index": index, "delta": _as_delta(choice["message"]), "finish_reason": None})
            ends.append({"index": index, "delta": {}, "finish_reason": choice.get("finish_reason") or "stop"})
        self._held.append((sse.encode(_json({**base, "choices": ends})), True))
        if self._asked_usage and self.usage is not None:
            self._held.append((sse.encode(_json({**base, "choices": [], "usage": fields["usage"]})), False))
        self.done = True
        return sse.encode(_json({**base, "choices": deltas}))

    # ---- refusals, counts --------------------------------------------------------------------------------------------

    def failure(self, status: int, headers: Mapping[str, str], body: bytes) -> Failure:
        """See failures.py."""
        return failures.by_status(status, headers, body, self._secrets)

    def texts(self) -> list[tuple[str, int]]:
        """See base.Translator."""
        return self._texts.all()

    def spoken(self) -> list[Spoken]:
        """See base.Translator."""
        return self._texts.spoken(self._reasons)

    @property
    def written(self) -> int:
        """See base.Translator."""
        return self._texts.kept

    def tokens(self, count: Callable[[str], int]) -> int:
        """See base.Translator."""
        return self._texts.tokens(count)

    def uncounted(self) -> int:
        """See base.Translator."""
        return self._texts.uncounted

    def _take(self, index: int, delta: _Delta) -> None:
        before = self._texts.kept
        for kind in ("content", "refusal", "reasoning_content", "reasoning"):
            value = getattr(delta, kind)
            if value:
                self._texts.keep(index, kind, 0, "".join(strings(value)))
        if delta.tool_calls:
            self._texts.keep_calls(index, delta.tool_calls)
        if delta.function_call:
            self._texts.keep_calls(index, [{"index": -1, "function": delta.function_call}])
        if self._texts.kept > before:
            self.started = True


def _known(message: dict[str, Any]) -> dict[str, Any]:
    return {name: message.get(name) for name in _Delta.__struct_fields__}


def _as_delta(message: dict[str, Any]) -> dict[str, Any]:
    """A message as one delta: nulls left out, tool calls numbered."""
    delta = {key: value for key, value in message.items() if value is not None}
    calls = delta.get("tool_calls")
    if isinstance(calls, list):
        delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls) if isinstance(call, dict)]
    return delta


def _lenient(payload: bytes) -> bytes:
    """Raises ValueError (RecursionError) for what is not JSON even so."""
    return json.dumps(json.loads(payload, parse_constant=lambda _: None), separators=(",", ":")).encode()
