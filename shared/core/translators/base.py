"""The interface between a provider's dialect and the shell that carries its bytes.

A `Dialect` is made once; it makes one `Translator` for each upstream call, which is pure and belongs to that call:

    request(...)        what to send
    feed(payload)       one SSE payload in -> bytes ready for the client out (b"" = nothing yet)
    finish(rest, stray) the bytes ended: raises unless the stream had ended well
    cut()               nothing more is paid for: what still comes is only counted; then `close(...)` ends the stream
    tail(x_br)          what was held back until usage was known and the call settled
    whole(body)         a whole answer
    failure(...)        a status that is not 200

Nothing here knows sockets, clocks or money.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from msgspec import Struct

from shared.wire.messages import Ask, ErrorBody, Step

Headers = tuple[tuple[str, str], ...]


class Usage(Struct, frozen=True):
    """The canonical record of what one call used, in tokens; each is in exactly one part, and so is priced once.

    `reasoning` alone is told beside: it is in `text_output` already. OpenAI counts cached, written and audio tokens
    inside its prompt and completion; Anthropic's `input_tokens` is `uncached` as it stands. `doubtful`: the parts
    contradicted one another or could not be read; their sum is right, their split is our guess.
    """

    uncached: int = 0  # text and images read as input, from no cache and into none
    cache_read: int = 0
    text_output: int = 0
    cache_write_5m: int = 0
    cache_write_1h: int = 0
    audio_input: int = 0
    audio_output: int = 0
    reasoning: int = 0  # part of text_output
    doubtful: bool = False

    @property
    def input_tokens(self) -> int:
        """All of the prompt."""
        return self.uncached + self.cache_read + self.cache_write_5m + self.cache_write_1h + self.audio_input

    @property
    def output_tokens(self) -> int:
        """All that was generated, reasoning included."""
        return self.text_output + self.audio_output


class Spoken(Struct, frozen=True):
    """One choice of an answer as far as it came, for its quality. `arguments` of function calls, which should be JSON;
    `called`: any tool was. `reason`: OpenAI's finish_reason, "" while there is none."""

    text: str
    reason: str
    refused: bool
    called: bool
    arguments: tuple[str, ...]


class Request(Struct, frozen=True):
    """One upstream request: `path` continues the endpoint's base URL; `headers` without those of the connection."""

    path: str
    headers: Headers
    body: bytes


class Failure(Struct, frozen=True):
    """What an upstream's refusal means.

    retryable: another endpoint may serve it (nothing was generated). same_endpoint: so may this one, after the
    backoff. endpoint_fault: counts for the endpoint's circuit; a request that is wrong, or a rate limit, does not.
    """

    error: ErrorBody
    retryable: bool
    same_endpoint: bool
    endpoint_fault: bool


class UpstreamFailure(Exception):
    """An upstream's own error inside a 200: an error object instead of an answer, or in the middle of a stream."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.error.message)


class Translator(Protocol):
    """One upstream call."""

    #: Something that is billed as output came (or the end did): from here on no other endpoint may be tried.
    started: bool
    #: Every choice has its finish_reason: what is missing is at most the usage and the terminal.
    finished: bool
    #: The provider's own terminal came: whatever follows is ignored.
    done: bool
    #: As the provider billed it; None when absent or not to be believed.
    usage: Usage | None
    #: What the provider sent as its usage, believed or not; None when nothing came.
    usage_sent: Any

    def request(self, ask: Ask, step: Step, cap: int, cap_field: str) -> Request:
        """The client's body with the model's name there and the output cap; nothing else changed. Raises nothing: the
        body is our own serialisation of a checked one."""

    def feed(self, payload: bytes) -> bytes:
        """Raises UpstreamInvalid (malformed) or UpstreamFailure (an error object)."""

    def finish(self, rest: bytes, stray: bytes) -> bytes:
        """The stream's bytes ended; `rest` and `stray` are the parser's. Raises UpstreamTruncated, UpstreamInvalid or
        UpstreamFailure when it did not end well."""

    def cut(self) -> None:
        """The client gets no more of it, though more may come: the choices that are open now stay so for `close`."""

    def close(self, prompt: int, cached: int, completion: int) -> None:
        """After `cut`: end each open choice as one that came to its cap, with the tokens it is charged as its usage.
        `tail` gives it."""

    def tail(self, x_br: bytes) -> bytes:
        """What was held back; `x_br` (JSON, or b"") goes into its last chunk with a finish_reason (D5)."""

    def whole(self, body: bytes) -> bytes:
        """The client's JSON body of a whole answer. Raises UpstreamInvalid or UpstreamFailure."""

    def whole_as_stream(self, body: bytes) -> bytes:
        """A whole answer that came although a stream was asked for, as the events it should have been. Raises like
        `whole`; leaves the translator as `feed` would."""

    def failure(self, status: int, headers: Mapping[str, str], body: bytes) -> Failure:
        """What a status other than 200 means. Header names in lower case; at most a few KiB of `body` are needed."""

    def texts(self) -> list[tuple[str, int]]:
        """What was generated so far, in pieces that tokenise on their own (a choice's text, a tool call's name, its
        arguments), each with the number of deltas it came in: to be counted when the provider's usage is missing. A
        server that sends a token at a time may cut where a tokenizer would not, so the larger number counts."""

    def spoken(self) -> list[Spoken]:
        """What was said, by choice."""

    @property
    def written(self) -> int:
        """Bytes of generated text so far: no token is shorter."""

    def tokens(self, count: Callable[[str], int]) -> int:
        """What `texts` and `uncounted` come to by this table; asked again, only what is new is counted."""

    def uncounted(self) -> int:
        """Bytes of generated text beyond what `texts` keeps: count a token each (no token is shorter)."""


class Dialect(Protocol):
    """One kind of provider."""

    def headers(self, key: str) -> Headers:
        """The headers that are the same for every call to an endpoint with this key (authentication among them)."""

    def translator(self, ask: Ask, secrets: tuple[str, ...]) -> Translator:
        """A translator for one call; `secrets` never appear in any error it makes."""
