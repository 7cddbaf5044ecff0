"""The OpenAI chat surface: one strict parse of a client's body, and the model list.

Parsed once (S1-H4a), by jiter with duplicate keys refused: a body that two parsers read differently is how a cheap
model's price is paid for a dear one (GHSA-4gph). Only our own serialisation of that parse travels on. Fields of the
same dialect that we do not know are kept; those that could turn the request elsewhere are dropped.
The fields: https://platform.openai.com/docs/api-reference/chat/create
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, Final

import orjson
from msgspec import Struct

from shared.wire import strict
from shared.wire.errors import ClientError, MissingModel, ModelNotFound

MAX_MODEL_BYTES: Final = 256  # D6
MAX_N: Final = 16  # choices; each is reserved at the full output cap
MAX_STOP: Final = 16  # OpenAI takes 4, others up to 16
MAX_TOOLS: Final = 512  # OpenAI takes 128
MAX_OUTPUT: Final = 2**31 - 1  # tokens
MAX_IDENTIFIER: Final = 512  # characters of `user` and the like; OpenAI takes 64
MAX_METADATA_KEYS: Final = 64  # OpenAI takes 16
MAX_METADATA_BYTES: Final = 16_384  # OpenAI's 16 pairs of 64 + 512 characters, with room

_ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_MAY_BE_EMPTY: Final = frozenset({"assistant", "function"})  # null or no content
_URL: Final = re.compile(r"(https?://|data:)", re.IGNORECASE)
_NOT_AN_IDENTIFIER: Final = re.compile(r"[\x00-\x1f\x7f*]")  # control characters, and what a store reads as a pattern

#: Not of the dialect: other gateways and SDKs take these as *where to and as whom* (LiteLLM, the official SDKs).
DENIED: Final = frozenset({
    "allowed_openai_params", "api_base", "api_key", "api_type", "api_version", "azure_ad_token", "base_url",
    "callbacks", "context_window_fallbacks", "credentials", "custom_llm_provider", "default_headers", "deployment_id",
    "drop_params", "extra_body", "extra_headers", "extra_query", "failure_callback", "fallbacks", "headers",
    "litellm_params", "litellm_metadata", "mock_response", "mock_timeout", "mock_tool_calls", "model_list",
    "num_retries", "organization", "proxy", "success_callback", "user_config", "x_br",
})  # fmt: skip
_DENIED_PREFIXES: Final = ("aws_", "azure_", "litellm_", "mock_", "vertex_")


class ChatRequest(Struct, frozen=True, kw_only=True):
    """One checked chat completion request."""

    model: str
    stream: bool
    include_usage: bool  # stream_options.include_usage
    max_output: int  # max_completion_tokens, else max_tokens; 0 = not given
    n: int
    user: str = ""  # the `user` field
    body: bytes  # compact JSON, ours


def parse_chat(body: bytes) -> ChatRequest:
    """Check a request body.

    Raises InvalidJson, MissingModel, ModelNotFound (the name is too long to be in any catalogue) or ClientError with
    `param` naming the field.
    """
    fields = strict.parse(body)
    model = _model(fields)
    dropped = _check_fields(fields)
    for key in dropped:
        del fields[key]
    _check_messages(fields.get("messages"))
    options = fields.get("stream_options")
    return ChatRequest(
        model=model,
        stream=fields.get("stream") or False,
        include_usage=bool(options and options.get("include_usage")),
        max_output=fields.get("max_completion_tokens") or fields.get("max_tokens") or 0,
        n=fields.get("n") or 1,
        user=fields.get("user") or "",
        body=strict.serialise(fields, body, exact=not dropped),
    )


def models_page(models: Iterable[tuple[str, str]], created: int = 0) -> bytes:
    """`GET /v1/models` for these (name, owned_by)."""
    rows = [{"id": name, "object": "model", "created": created, "owned_by": owner} for name, owner in models]
    return orjson.dumps({"object": "list", "data": rows})


# ---- top-level fields ------------------------------------------------------------------------------------------------


def _model(fields: dict[str, Any]) -> str:
    model = fields.get("model")
    if model is None or model == "":
        raise MissingModel
    if type(model) is not str:
        raise ClientError("model must be a string", param="model")
    if len(model) > MAX_MODEL_BYTES or len(model.encode()) > MAX_MODEL_BYTES:
        raise ModelNotFound
    return model


def _check_fields(fields: dict[str, Any]) -> list[str]:
    """Check every known field but `model` and `messages`; the names of those to drop."""
    dropped: list[str] = []
    for key, value in fields.items():
        check = _CHECKS.get(key)
        if check is not None:
            if value is not None:  # null = not given, as OpenAI has it
                check(key, value)
        elif key not in _ELSEWHERE and _is_foreign(key):
            dropped.append(key)
    return dropped


def _is_foreign(key: str) -> bool:
    """Denied, or a known name in other letters: a server that folds case (Go's encoding/json) would read it as ours."""
    if not key:
        raise ClientError("The request body has a field with an empty name.")
    folded = key.casefold()
    if folded in DENIED or folded.startswith(_DENIED_PREFIXES):
        return True
    return folded != key and (folded in _CHECKS or folded in _ELSEWHERE)


def _integer(low: int, high: int) -> Callable[[str, Any], None]:
    def check(key: str, value: Any) -> None:
        if type(value) is not int or not low <= value <= high:
            raise ClientError(f"{key} must be an integer from {low} to {high}", param=key)

    return check


def _number(low: float, high: float) -> Callable[[str, Any], None]:
    def check(key: str, value: Any) -> None:
        if (type(value) is not float and type(value) is not int) or not low <= value <= high:
            raise ClientError(f"{key} must be a number from {low:g} to {high:g}", param=key)

    return check


def _typed(kind: type, name: str) -> Callable[[str, Any], None]:
    def check(key: str, value: Any) -> None:
        if type(value) is not kind:
            raise ClientError(f"{key} must be {name}", param=key)

    return check


def _check_identifier(key: str, value: Any) -> None:
    if type(value) is not str or len(value) > MAX_IDENTIFIER or _NOT_AN_IDENTIFIER.search(value):
        wanted = f"a string of at most {MAX_IDENTIFIER} characters without control characters or '*'"
        raise ClientError(f"{key} must be {wanted}", param=key)


def _check_stop(key: str, value: Any) -> None:
    if type(value) is str:
        return
    if type(value) is not list or len(value) > MAX_STOP or not all(type(item) is str for item in value):
        raise ClientError(f"{key} must be a string or a list of at most {MAX_STOP} strings", param=key)


def _check_metadata(key: str, value: Any) -> None:
    if type(value) is not dict or len(value) > MAX_METADATA_KEYS:
        raise ClientError(f"{key} must be an object of at most {MAX_METADATA_KEYS} keys", param=key)
    try:
        size = len(orjson.dumps(value))
    except orjson.JSONEncodeError as exc:
        raise ClientError("A number in the request body is out of range.", param=key) from exc
    if size > MAX_METADATA_BYTES:
        raise ClientError(f"{key} must be smaller than {MAX_METADATA_BYTES} bytes", param=key)


def _check_stream_options(key: str, value: Any) -> None:
    if type(value) is not dict or type(value.get("include_usage", False)) not in {bool, type(None)}:
        raise ClientError(f"{key} must be an object, include_usage in it a boolean", param=key)


def _check_choice(key: str, value: Any) -> None:
    if type(value) is not str and type(value) is not dict:
        raise ClientError(f"{key} must be a string or an object", param=key)


def _check_service_tier(key: str, value: Any) -> None:
    if value not in ("auto", "default"):
        raise ClientError(
            f"{key} must be 'auto' or 'default': other tiers cost what the catalogue does not say", param=key
        )


def _check_prediction(key: str, value: Any) -> None:  # noqa: ARG001 - of one shape with the others
    raise ClientError(f"{key} is not supported: rejected tokens are billed beyond the output cap", param=key)


def _check_tools(key: str, value: Any) -> None:
    if type(value) is not list or len(value) > MAX_TOOLS:
        raise ClientError(f"{key} must be a list of at most {MAX_TOOLS} tools", param=key)
    for index, tool in enumerate(value):
        if type(tool) is not dict or type(tool.get("type")) is not str:
            raise ClientError(f"{key}[{index}] must be an object with a type", param=f"{key}[{index}]")
        if tool["type"] == "function":
            _check_function(f"{key}[{index}].function", tool.get("function"))


def _check_functions(key: str, value: Any) -> None:
    if type(value) is not list or len(value) > MAX_TOOLS:
        raise ClientError(f"{key} must be a list of at most {MAX_TOOLS} functions", param=key)
    for index, function in enumerate(value):
        _check_function(f"{key}[{index}]", function)


def _check_function(at: str, function: Any) -> None:
    """The schema itself is passed on unread: no `$ref` followed, no `pattern` compiled."""
    if type(function) is not dict or type(function.get("name")) is not str or not function["name"]:
        raise ClientError(f"{at} must be an object with a name", param=at)
    if type(function.get("parameters")) not in {dict, bool, type(None)}:
        raise ClientError(f"{at}.parameters must be a JSON schema", param=f"{at}.parameters")


_ELSEWHERE: Final = frozenset({"model", "messages"})
_CHECKS: Final[dict[str, Callable[[str, Any], None]]] = {
    "frequency_penalty": _number(-2, 2),
    "function_call": _check_choice,
    "functions": _check_functions,
    "logit_bias": _typed(dict, "an object"),
    "logprobs": _typed(bool, "a boolean"),
    "max_completion_tokens": _integer(1, MAX_OUTPUT),
    "max_tokens": _integer(1, MAX_OUTPUT),
    "metadata": _check_metadata,
    "n": _integer(1, MAX_N),
    "parallel_tool_calls": _typed(bool, "a boolean"),
    "prediction": _check_prediction,
    "presence_penalty": _number(-2, 2),
    "prompt_cache_key": _check_identifier,
    "response_format": _typed(dict, "an object"),
    "safety_identifier": _check_identifier,
    "seed": _integer(-(2**63), 2**63 - 1),
    "service_tier": _check_service_tier,
    "stop": _check_stop,
    "store": _typed(bool, "a boolean"),
    "stream": _typed(bool, "a boolean"),
    "stream_options": _check_stream_options,
    "temperature": _number(0, 2),
    "tool_choice": _check_choice,
    "tools": _check_tools,
    "top_logprobs": _integer(0, 20),
    "top_p": _number(0, 1),
    "user": _check_identifier,
}


# ---- messages --------------------------------------------------------------------------------------------------------


def _check_messages(messages: Any) -> None:
    if type(messages) is not list or not messages:
        raise ClientError("messages must be a list with at least one message", param="messages")
    for index, message in enumerate(messages):
        if type(message) is not dict:
            raise _wrong(index, "", "must be an object")
        role = message.get("role")
        if type(role) is not str or role not in _ROLES:
            raise _wrong(index, ".role", "must be system, developer, user, assistant or tool")
        content = message.get("content")
        if type(content) is list:
            _check_parts(index, content)
        elif type(content) is not str and (content is not None or role not in _MAY_BE_EMPTY):
            raise _wrong(index, ".content", "must be a string or a list of parts")
        if len(message) > 2 or content is None:  # more than role and content
            _check_rest(index, role, message)
        elif role == "tool":
            raise _wrong(index, ".tool_call_id", "must be a string")


def _wrong(index: int, field: str, text: str) -> ClientError:
    at = f"messages[{index}]{field}"
    return ClientError(f"{at} {text}", param=at)


def _check_parts(index: int, parts: list[Any]) -> None:
    """Parts of kinds we do not know are passed on."""
    for number, part in enumerate(parts):
        at = f".content[{number}]"
        kind = part.get("type") if type(part) is dict else None
        if type(kind) is not str:
            raise _wrong(index, at, "must be an object with a type")
        if kind == "text" and type(part.get("text")) is not str:
            raise _wrong(index, f"{at}.text", "must be a string")
        if kind == "image_url":
            _check_image(index, at, part.get("image_url"))
        if kind == "file" and type(part.get("file")) is dict and "file_id" in part["file"]:
            raise _wrong(index, f"{at}.file.file_id", "is not supported: its size is not known here; send file_data")


def _check_image(index: int, at: str, image: Any) -> None:
    """The gateway never fetches it; a `file:` URL could make an upstream read its own disk."""
    url = image.get("url") if type(image) is dict else None
    if type(url) is not str or not _URL.match(url):
        raise _wrong(index, f"{at}.image_url.url", "must be an http(s) or data URL")


def _check_rest(index: int, role: str, message: dict[str, Any]) -> None:
    name = message.get("name")
    if name is not None and type(name) is not str:
        raise _wrong(index, ".name", "must be a string")
    if role == "tool" and type(message.get("tool_call_id")) is not str:
        raise _wrong(index, ".tool_call_id", "must be a string")
    calls = message.get("tool_calls")
    if calls is not None:
        if type(calls) is not list or len(calls) > MAX_TOOLS:
            raise _wrong(index, ".tool_calls", f"must be a list of at most {MAX_TOOLS} calls")
        for number, call in enumerate(calls):
            _check_call(index, f".tool_calls[{number}]", call)
    call = message.get("function_call")
    if call is not None:
        _check_called(index, ".function_call", call)


def _check_call(index: int, at: str, call: Any) -> None:
    if type(call) is not dict or type(call.get("id")) is not str:
        raise _wrong(index, at, "must be an object with an id")
    kind = call.get("type", "function")
    if type(kind) is not str:
        raise _wrong(index, f"{at}.type", "must be a string")
    if kind == "function":
        _check_called(index, f"{at}.function", call.get("function"))


def _check_called(index: int, at: str, function: Any) -> None:
    if type(function) is not dict or type(function.get("name")) is not str:
        raise _wrong(index, at, "must be an object with a name")
    if type(function.get("arguments")) is not str:
        raise _wrong(index, f"{at}.arguments", "must be a string of JSON")
