"""Token counts: exact, with the models' own byte-pair tables (offline), and cheap upper bounds for reservations.

The tables are rs-bpe's o200k and cl100k, equal to tiktoken; loading one takes about 30 ms, once (`warm`). The prompt
formula is the OpenAI cookbook's ("How to count tokens with tiktoken", num_tokens_from_messages), with tools counted
as the compact JSON they are sent as.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Final, Literal

import orjson
from msgspec import Struct
from rs_bpe.bpe import openai as tables

from shared.core import images

Encoding = Literal["o200k", "cl100k"]

PER_MESSAGE: Final = 3  # cookbook: every message has <|start|>role<|message|>...<|end|>
PER_NAME: Final = 1
PER_REPLY: Final = 3  # every reply is primed with <|start|>assistant<|message|>
CHARS_PER_TOKEN: Final = 4  # S2-09

#: Above this many bytes of text a reservation counts bytes instead (no token is shorter): 32 KiB take 0.5 ms to count.
EXACT_BYTES: Final = 32_768
#: What a bound adds to the count, since providers frame messages and tools in their own ways; the percentage is a
#: model's own where the catalogue says so (`token_safety_percent`).
MARGIN_PERCENT: Final = 10
MARGIN_TOKENS: Final = 8

#: Objects and lists of a body that are counted elsewhere, or never put before a model. All others may be: the schema of
#: a response_format is billed as input, as are vLLM's documents.
_COUNTED: Final = frozenset(
    ["messages", "tools", "functions", "metadata", "stop", "stream_options", "logit_bias", "modalities"]
)
_NESTED: Final = (dict, list)
_COUNTED_OF_A_MESSAGE: Final = frozenset(["role", "content", "name", "tool_calls", "tool_call_id", "function_call"])

#: Model families that still use cl100k (tiktoken/model.py, MODEL_PREFIX_TO_ENCODING); all newer ones use o200k.
_CL100K: Final = ("gpt-4-", "gpt-3.5", "gpt-35-", "text-embedding-")

#: Model families whose reasoning is billed as output and never shown (platform.openai.com/docs/guides/reasoning).
_HIDES_REASONING: Final = ("o1", "o3", "o4", "gpt-5")
#: Hidden tokens a second, at most: a few times what those families are measured at.
HIDDEN_PER_S: Final = 500


class Prompt(Struct, frozen=True, kw_only=True):
    """What of a chat body makes tokens."""

    texts: list[str]  # roles, names, contents, called functions and their arguments
    fixed: int  # tokens of the framing
    tools: bytes  # compact JSON of tools and functions
    images: list[tuple[str, str]]  # (URL, detail)
    opaque: int  # bytes of parts that are neither text nor image (audio, files)
    beside: bytes  # JSON of what no formula counts but a provider may: response_format, fields of a server's own


class PromptSize(Struct, frozen=True, kw_only=True):
    """Prompt tokens for the guardian: a bound to reserve, and S2-09's estimate to show."""

    bound: int
    estimate: int


def encoding_for(model: str) -> Encoding:
    """The table of an upstream model name; o200k for names it does not know."""
    name = model.rpartition("/")[2]
    return "cl100k" if name == "gpt-4" or name.startswith(_CL100K) else "o200k"


def hides_reasoning(model: str) -> bool:
    """Whether this upstream model bills output that it does not show."""
    return model.rpartition("/")[2].startswith(_HIDES_REASONING)


def warm(encoding: Encoding = "o200k") -> None:
    """Load the table now (at boot) rather than in the first request."""
    _counter(encoding)


@cache
def _counter(encoding: Encoding) -> Callable[[str], int]:
    table = tables.o200k_base() if encoding == "o200k" else tables.cl100k_base()
    count: Callable[[str], int] = table.count
    return count


def counter(encoding: Encoding) -> Callable[[str], int]:
    """`count_text` of one table, for those who count a stream."""
    return _counter(encoding)


def count_text(text: str, encoding: Encoding) -> int:
    """Tokens of one text; special tokens in it count as the plain text they are."""
    return _counter(encoding)(text)


def count_prompt(body: bytes, encoding: Encoding) -> int:
    """Tokens of a chat body (our own serialisation), without images, audio and files."""
    return _count(read_prompt(body), encoding)


def cover_prompt(body: bytes, encoding: Encoding, model: str) -> tuple[int, int]:
    """For a call whose bill nobody told (I1): tokens counted, those of images and of what no formula counts included at
    their most; and, apart, those of audio and files, at most a byte each. Without a margin."""
    prompt = read_prompt(body)
    pictures = sum(images.bound((model,), url, detail) for url, detail in prompt.images)
    beside = count_text(prompt.beside.decode(), encoding) if prompt.beside else 0
    return _count(prompt, encoding) + pictures + beside, prompt.opaque


def bound_prompt(body: bytes, encoding: Encoding, models: tuple[str, ...] = (), percent: int = MARGIN_PERCENT) -> int:
    """At least what a provider will count for this body, whichever of these upstream models gets it."""
    return _bound(read_prompt(body), encoding, models, percent)


def estimate_prompt(chars: int, tool_chars: int = 0) -> int:
    """S2-09: about four characters a token, plus the size of the tool schema."""
    return -(-chars // CHARS_PER_TOKEN) + -(-tool_chars // CHARS_PER_TOKEN)


def estimate_output(input_estimate: int, ratio: int, cap: int) -> int:
    """S2-10: ceil(input estimate x the tenant's output/input ratio, in millionths), and never more than the cap."""
    return min(-(-input_estimate * ratio // 1_000_000), cap)


def size_prompt(
    body: bytes, encoding: Encoding, models: tuple[str, ...] = (), percent: int = MARGIN_PERCENT
) -> PromptSize:
    """Bound and estimate from one reading of the body."""
    prompt = read_prompt(body)
    estimate = estimate_prompt(sum(map(len, prompt.texts)), len(prompt.tools))
    return PromptSize(bound=_bound(prompt, encoding, models, percent), estimate=estimate)


def read_prompt(body: bytes) -> Prompt:
    """Collect what makes tokens from a body that `wire.openai.parse_chat` has checked."""
    fields = orjson.loads(body)
    texts: list[str] = []
    beside = [orjson.dumps(value) for key, value in fields.items() if type(value) in _NESTED and key not in _COUNTED]
    fixed = PER_REPLY
    pictures: list[tuple[str, str]] = []
    opaque = 0
    for message in fields["messages"]:
        fixed += PER_MESSAGE
        texts.append(message["role"])
        content = message.get("content")
        if type(content) is str:
            texts.append(content)
        elif content:
            for part in content:
                kind = part["type"]
                if kind == "text":
                    texts.append(part["text"])
                elif kind == "image_url":
                    image = part["image_url"]
                    pictures.append((image["url"], str(image.get("detail"))))
                else:
                    opaque += len(orjson.dumps(part))
        if len(message) > 2 or content is None:  # more than role and content
            fixed += _read_rest(message, texts, beside)
    tools = b"".join(orjson.dumps(fields[key]) for key in ("tools", "functions") if fields.get(key))
    return Prompt(texts=texts, fixed=fixed, tools=tools, images=pictures, opaque=opaque, beside=b"".join(beside))


def _read_rest(message: dict[str, Any], texts: list[str], beside: list[bytes]) -> int:
    """Name and called functions into `texts`, other calls and fields into `beside`; the framing tokens they add."""
    beside.extend(orjson.dumps(message[key]) for key in message.keys() - _COUNTED_OF_A_MESSAGE)
    for call in message.get("tool_calls") or ():
        function = call.get("function")
        if function:
            texts += (function["name"], function["arguments"])
        else:
            beside.append(orjson.dumps(call))
    function = message.get("function_call")
    if function:
        texts += (function["name"], function["arguments"])
    name = message.get("name")
    if not name:
        return 0
    texts.append(name)
    return PER_NAME


def _count(prompt: Prompt, encoding: Encoding) -> int:
    count = _counter(encoding)
    total = prompt.fixed + sum(map(count, prompt.texts))
    return total + count(prompt.tools.decode()) if prompt.tools else total


def _bound(prompt: Prompt, encoding: Encoding, models: tuple[str, ...], percent: int) -> int:
    size = sum(len(text.encode()) for text in prompt.texts) + len(prompt.tools) + len(prompt.beside)
    if size <= EXACT_BYTES:
        count = _count(prompt, encoding)
        if prompt.beside:
            count += count_text(prompt.beside.decode(), encoding)
    else:
        count = prompt.fixed + size
    for url, detail in prompt.images:
        count += images.bound(models, url, detail)
    return count + -(-count * percent // 100) + MARGIN_TOKENS + prompt.opaque
