"""A request as the simulator understands it: checked as the real server checks it, plus what its prompt dictates.

Any message text may carry `[[sim key=value ...]]` (the last one holds), whole numbers only:

    chunks=60     tokens of each choice's text           pace=5       ms between two tokens
    seed=3        of the text                            tools=2      call so many of the request's tools instead
    mixed=1       text in many scripts                   interleave=1 fragments of parallel calls interleaved
    cached=12     so many prompt tokens read from cache  burst=1      events per write (unpaced: 8)
    ignore_cap=1  write on past max_tokens, and bill it

and the faults that a prompt may ask for itself: `status delay_ms stall_after cut_after malformed_after error_after`.
"""

import re
import zlib
from typing import Any, Final

import orjson
from msgspec import Struct

from deploy.simulator import bill

MAX_TOKENS: Final = 100_000  # of one choice: an answer stays a few MB
MAX_CHOICES: Final = 128  # OpenAI's own bound of n
MAX_CALLS: Final = 32
BURST: Final = 8  # events per write when nothing paces them: still several reads for the client, a quarter of the CPU

#: What sim-tools calls when the request brings no tools.
_OWN_TOOLS: Final[list[dict[str, Any]]] = [
    {"name": "get_weather", "parameters": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}},
    {"name": "get_time", "parameters": {"properties": {"city": {"type": "string"}, "utc": {"type": "boolean"}}}},
]

_DIRECTIVE: Final = re.compile(r"\[\[sim((?:\s+[a-z_]+=\d{1,9})*)\s*\]\]")
_PAIR: Final = re.compile(r"([a-z_]+)=(\d+)")
_KEYS: Final = frozenset(["chunks", "pace", "seed", "tools", "mixed", "interleave", "cached", "burst", "ignore_cap"])
FAULT_KEYS: Final = frozenset(["status", "delay_ms", "stall_after", "cut_after", "malformed_after", "error_after"])


class Refused(Exception):
    """The request is not answered: an HTTP status and OpenAI's error object."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Defaults(Struct, frozen=True):
    """What the command line sets: seed, words of an answer, ms between tokens of sim-paced."""

    seed: int = 0
    chunks: int = 16
    pace_ms: float = 20.0


class Wanted(Struct, kw_only=True):
    """What to answer. `cap` None: no bound of output tokens per choice. `tools` empty: answer with text."""

    model: str
    stream: bool
    include_usage: bool
    n: int
    cap: int | None
    seed: int
    chunks: int
    pace_ms: float
    burst: int
    mixed: bool
    interleave: bool
    tools: list[dict[str, Any]]
    prompt_tokens: int
    cached_tokens: int
    faults: dict[str, int]


def _whole(body: dict[str, Any], field: str, low: int, high: int) -> int | None:
    value = body.get(field)
    if value is None:
        return None
    if type(value) is not int:
        raise Refused(400, f"Invalid type for '{field}': expected an integer.", param=field, code="invalid_type")
    if not low <= value <= high:
        raise Refused(400, f"Invalid '{field}': must be from {low} to {high}.", param=field, code="invalid_value")
    return value


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "Missing or empty 'messages'.", param="messages", code="missing_required_parameter")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused(400, f"'messages[{number}]' needs a role.", param=f"messages[{number}]", code="invalid_type")
    return messages


def _cap(body: dict[str, Any]) -> int | None:
    old = _whole(body, "max_tokens", 1, 2**31)
    new = _whole(body, "max_completion_tokens", 1, 2**31)
    if old is not None and new is not None:
        raise Refused(400, "Set max_tokens or max_completion_tokens, not both.", param="max_tokens")
    return new if new is not None else old


def directives(texts: list[str]) -> dict[str, int]:
    """The key=value pairs of the last `[[sim ...]]` in the texts; {} without one. Unknown keys are refused."""
    found: dict[str, int] = {}
    for text in texts:
        for match in _DIRECTIVE.finditer(text) if "[[sim" in text else ():
            found = {key: int(value) for key, value in _PAIR.findall(match[1])}
    unknown = found.keys() - _KEYS - FAULT_KEYS
    if unknown:
        raise Refused(400, f"[[sim]] does not know {', '.join(sorted(unknown))}.", param="messages")
    return found


def _function(tool: Any, number: int) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused(400, f"'tools[{number}]' needs a function with a name.", param=f"tools[{number}]")
    return function


def _tools(body: dict[str, Any], last_role: str, asked: int | None) -> list[dict[str, Any]]:
    """The functions to call: none once a tool has answered, as an agent's loop must end somewhere."""
    sent = [_function(tool, number) for number, tool in enumerate(body.get("tools") or ())]
    choice = body.get("tool_choice")
    if last_role == "tool" or choice == "none":
        return []
    if isinstance(choice, dict):
        named = choice.get("function")
        return [function for function in sent if isinstance(named, dict) and function["name"] == named.get("name")][:1]
    own = body["model"] == "sim-tools"
    count = asked if asked is not None else 2 if own else 1 if choice == "required" else 0
    if body.get("parallel_tool_calls") is False:
        count = min(count, 1)
    pool = sent or (_OWN_TOOLS if own else [])
    return [pool[i % len(pool)] for i in range(min(count, MAX_CALLS))] if pool else []


def parse(raw: bytes, defaults: Defaults) -> Wanted:
    """Understand a request body. Raises Refused."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise Refused(400, "We could not parse the JSON body of your request.") from None
    if not isinstance(body, dict):
        raise Refused(400, "The body must be a JSON object.")
    model = body.get("model")
    if not isinstance(model, str) or model not in bill.PRICES:
        raise Refused(404, f"The model {str(model)[:64]!r} does not exist.", param="model", code="model_not_found")
    messages = _messages(body)
    if not isinstance(body.get("tools") or [], list):
        raise Refused(400, "'tools' must be an array.", param="tools", code="invalid_type")
    texts = [text for message in messages for text in bill.message_texts(message)]
    dictated = directives(texts)
    seed = dictated.get("seed", _whole(body, "seed", -(2**63), 2**63 - 1))
    if seed is None:
        seed = zlib.crc32("\x00".join(texts).encode(), defaults.seed & 0xFFFFFFFF)
    pace = float(dictated.get("pace", defaults.pace_ms if model == "sim-paced" else 0))
    prompt = bill.prompt_tokens(body)
    cap = _cap(body)
    options = body.get("stream_options")
    return Wanted(
        model=model,
        stream=body.get("stream") is True,
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
        n=_whole(body, "n", 1, MAX_CHOICES) or 1,
        cap=None if dictated.get("ignore_cap") else cap,
        seed=seed,
        chunks=min(dictated.get("chunks", defaults.chunks), MAX_TOKENS),
        pace_ms=pace,
        burst=max(1, dictated.get("burst", 1 if pace else BURST)),
        mixed=bool(dictated.get("mixed")),
        interleave=bool(dictated.get("interleave")),
        tools=_tools(body, messages[-1]["role"], dictated.get("tools")),
        prompt_tokens=prompt,
        cached_tokens=min(dictated.get("cached", 0), prompt),
        faults={key: value for key, value in dictated.items() if key in FAULT_KEYS},
    )
