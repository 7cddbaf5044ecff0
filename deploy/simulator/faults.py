"""Scripted misbehaviour: rules that say which requests a fault strikes, and what the fault does.

    POST /_sim/faults {"match": {"model": "sim-fast", "nth": 3}, "times": 1, "fault": {"cut_after": 5}}

The first rule that strikes wins. `n` in `..._after` counts the events that carry output tokens; 0 strikes after the
role chunk. A fault that answers instead of the model (`status`, `html`, `body`, `drop`) opens no line in the bill,
unless it says `"bill": true`.
"""

from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

MAX_RULES: Final = 1000


class Fault(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What goes wrong. Several may be combined; unset fields do nothing."""

    # instead of an answer
    status: int = 0  # this HTTP status, with `body` or an error object like the real one's
    body: Any = None  # text is sent as it stands, anything else as JSON; alone: a 200 with that body
    headers: dict[str, str] = msgspec.field(default_factory=dict)  # added to whatever is answered
    retry_after: str | int | None = None
    html: bool = False  # a proxy's 200 page
    drop: bool = False  # the connection is closed without a byte
    bill: bool = False  # open a line all the same (the prompt was read)
    # before and while answering
    delay_ms: int = 0  # before the first byte
    slow_ms: int = 0  # every byte on its own, this many ms apart
    stall_after: int | None = None  # silence after n
    stall_ms: int = 120_000  # ... for so long, unless the client leaves
    usage_delay_ms: int = 0  # of a stream: silence between its last finish_reason and its usage
    cut_after: int | None = None  # the connection ends after n; of a whole answer half the body is sent
    cut: Literal["close", "reset", "clean"] = "close"  # FIN, RST, or a well-formed end of the HTTP body
    malformed_after: int | None = None
    malformed: str = 'data: {"id":"chatcmpl-broken","choices":[{\n\n'  # bytes put in at that point
    error_after: int | None = None  # an error object in the stream, then its end without [DONE]
    error: Any = None  # that object; default: a server_error
    huge_after: int | None = None
    huge_bytes: int = 2 << 20  # of one event's content
    no_done: bool = False
    no_finish: bool = False  # neither finish_reason, usage nor [DONE], but a well-formed end
    # what it says
    usage: Literal["", "missing", "null", "zero", "negative", "string", "huge"] = ""
    ignore_cap: bool = False
    # how it is written
    lines: Literal["lf", "crlf", "cr"] = "lf"
    bom: bool = False
    comments: bool = False  # a comment line before every event
    multiline: bool = False  # an event's JSON over two data lines

    @property
    def replaces(self) -> bool:
        """Whether it answers instead of the model."""
        return bool(self.status or self.html or self.drop or self.body is not None)


class Match(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which requests: all set fields must fit. Of those that fit, from the `nth` on, every `every`-th."""

    model: str = ""
    endpoint: str = ""
    request_id: str = ""  # a prefix of X-Request-ID
    stream: bool | None = None
    nth: int = 1
    every: int = 1


class Rule(Struct, forbid_unknown_fields=True, kw_only=True):
    """One rule, and how often it has fitted and struck. `times` 0: without end."""

    fault: Fault
    match: Match = Match()
    times: int = 1
    seen: int = 0
    struck: int = 0

    def strikes(self, model: str, endpoint: str, request_id: str, stream: bool) -> bool:
        """Whether this request is struck; counts it."""
        match = self.match
        fits = (
            match.model in ("", model)
            and match.endpoint in ("", endpoint)
            and request_id.startswith(match.request_id)
            and match.stream in (None, stream)
        )
        if not fits or (self.times and self.struck >= self.times):
            return False
        self.seen += 1
        if self.seen < match.nth or (self.seen - match.nth) % max(1, match.every):
            return False
        self.struck += 1
        return True


class FaultBook:
    """The rules in the order they were posted."""

    def __init__(self) -> None:
        self.rules: list[Rule] = []

    def add(self, raw: bytes) -> Rule:
        """Enter a rule from its JSON. Raises msgspec.ValidationError, or ValueError when the book is full."""
        if len(self.rules) >= MAX_RULES:
            raise ValueError(f"{MAX_RULES} rules are enough; POST /_sim/reset")
        rule = msgspec.json.decode(raw, type=Rule)
        self.rules.append(rule)
        return rule

    def take(self, model: str, endpoint: str, request_id: str, stream: bool) -> Fault | None:
        """The fault that strikes this request, if any."""
        for rule in self.rules:
            if rule.strikes(model, endpoint, request_id, stream):
                return rule.fault
        return None


def bad_usage(kind: str, true: dict[str, Any]) -> dict[str, Any] | None:
    """What is told instead of the true usage; None: nothing."""
    if kind == "missing":
        return None
    wrong: dict[str, dict[str, Any]] = {
        "null": dict.fromkeys(true),
        "zero": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        "negative": {"prompt_tokens": -true["prompt_tokens"], "completion_tokens": -5, "total_tokens": -5},
        "string": {"prompt_tokens": str(true["prompt_tokens"]), "completion_tokens": "many"},
        "huge": {"completion_tokens": 10**15, "total_tokens": 10**15},
    }
    return {**true, **wrong.get(kind, {})}
