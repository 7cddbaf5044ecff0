"""The catalogue: which endpoints exist, which models clients may ask for, what they cost; read or refused as a whole.

A fault is told with the path of the field (`models[2].price.output: ...`). Prices are decimal strings in USD per
million tokens, kept as integer nano-USD per million; a model without a price is looked up in genai-prices and refused
as `unpriced_model` when that does not know it either (D20). Model names are looked up exactly (D6).
"""

import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from shared.core import money, tokens
from shared.wire.messages import Price, Step

MAX_NAME: Final = 256  # bytes of a model name (D6)
MAX_PRICE: Final = 10_000 * money.NANO  # nano-USD per million tokens; keeps every reservation below money.MAX_NANO
_MAX_FILE: Final = 4_194_304  # bytes; a catalogue is a few KiB
_MAX_KEY_FILE: Final = 16_384  # bytes
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_KEY: Final = re.compile(r"[\x21-\x7e]+\Z")  # what may stand in an Authorization header
_PATH_IN_ERROR: Final = re.compile(r"(.*) - at `\$\.?(.*)`\Z", re.DOTALL)
_MAX_COMPLETION_TOKENS_HOSTS: Final = ("api.openai.com",)  # its newer models refuse max_tokens

CapField = Literal["max_tokens", "max_completion_tokens"]
EndpointId = Annotated[str, Meta(pattern=r"^[a-z0-9-]{1,32}\Z")]


class CatalogError(Exception):
    """The catalogue is refused; `errors` has one line for each fault, `path: what is wrong`."""

    def __init__(self, errors: list[str]) -> None:
        self.errors = errors
        super().__init__("\n".join(errors))


class Endpoint(Struct, frozen=True, kw_only=True):
    """One upstream server. `key` never shows in `repr`; "" = the server needs none."""

    id: str
    provider: str
    base_url: str  # without a trailing slash
    allow_private: bool
    key: str
    cap_field: CapField

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        names = self.__struct_fields__
        return [(name, "***" if name == "key" and self.key else getattr(self, name)) for name in names]

    def __repr__(self) -> str:
        return f"Endpoint({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"


class Model(Struct, frozen=True, kw_only=True):
    """What clients may ask for: `steps` in the operator's order, usable endpoints only."""

    name: str
    steps: tuple[Step, ...]
    max_output_tokens: int
    price: Price
    encoding: tokens.Encoding
    owned_by: str
    hidden_reasoning: bool  # bills output that it does not show: a cut call is charged for the time it ran


class Catalog(Struct, frozen=True, kw_only=True):
    """The catalogue of one boot. `left_out`: endpoints without their key; `why` says which key, for the log."""

    models: dict[str, Model]
    endpoints: dict[str, Endpoint]
    left_out: tuple[str, ...]
    why: dict[str, str]
    epoch: int  # CRC-32 of the file: tells whether two processes read the same one


class _EndpointRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: EndpointId
    provider: Literal["openai"]
    base_url: str
    api_key_env: Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}\Z")] | None = None
    api_key_file: Annotated[str, Meta(min_length=1)] | None = None
    allow_private: bool = False
    cap_field: CapField | None = None


class _StepRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    endpoint: str
    model: str


class _PriceRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    input: str
    output: str
    cached_input: str | None = None


class _ModelRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    endpoints: Annotated[tuple[_StepRow, ...], Meta(min_length=1, max_length=16)]
    max_output_tokens: Annotated[int, Meta(ge=1, le=1_000_000)]
    price: _PriceRow | str | None = None
    encoding: tokens.Encoding | None = None
    hidden_reasoning: bool | None = None
    owned_by: Annotated[str, Meta(min_length=1, max_length=64)] | None = None


class _File(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    endpoints: tuple[_EndpointRow, ...] = ()
    models: tuple[_ModelRow, ...] = ()


def load(path: str | Path, env: Mapping[str, str]) -> Catalog:
    """Read and check the file; keys come from `env` or from files beside it. Raises CatalogError."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as exc:
        raise CatalogError([f"{path}: {exc.strerror}; set HOTPATH_CATALOG to the catalogue's path"]) from exc
    if len(raw) > _MAX_FILE:
        raise CatalogError([f"{path}: larger than {_MAX_FILE} bytes"])
    return parse(raw, env, path.parent)


def parse(raw: bytes, env: Mapping[str, str], folder: Path) -> Catalog:
    """The catalogue of these TOML bytes; relative `api_key_file` paths start at `folder`. Raises CatalogError."""
    try:
        file = msgspec.toml.decode(raw, type=_File)
    except msgspec.ValidationError as exc:
        found = _PATH_IN_ERROR.match(str(exc))
        raise CatalogError([f"{found[2] or 'file'}: {found[1]}" if found else f"file: {exc}"]) from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise CatalogError([f"file: not valid TOML: {exc}"]) from exc
    errors = [*_endpoint_faults(file), *_model_faults(file)]
    if errors:
        raise CatalogError(errors)
    why: dict[str, str] = {}
    endpoints = _endpoints(file, env, folder, why, errors)
    models = _models(file, endpoints, errors)
    if errors:
        raise CatalogError(errors)
    return Catalog(models=models, endpoints=endpoints, left_out=tuple(why), why=why, epoch=zlib.crc32(raw))


# ---- faults ----------------------------------------------------------------------------------------------------------


def _endpoint_faults(file: _File) -> Iterator[str]:
    seen: set[str] = set()
    for index, row in enumerate(file.endpoints):
        if row.id in seen:
            yield f"endpoints[{index}].id: {row.id!r} is there already"
        seen.add(row.id)
        fault = _url_fault(row.base_url, allow_private=row.allow_private)
        if fault:
            yield f"endpoints[{index}].base_url: {fault}"


def _url_fault(url: str, *, allow_private: bool) -> str:
    """What is wrong with a base URL, without repeating it (it may hold a password); "" when nothing is."""
    try:
        parts = urlsplit(url)
        port_fits = parts.port is None or parts.port > 0
    except ValueError:
        return "not a URL"
    checks = (
        (
            bool(_CONTROL.search(url)) or " " in url or not url.isascii(),
            "only visible ASCII characters may stand in it",
        ),
        (parts.scheme not in ("http", "https"), "must start with https://"),
        (parts.scheme == "http" and not allow_private, "must be https, unless allow_private = true"),
        (not parts.hostname or not port_fits, "needs a host, and a port from 1 to 65535 if any"),
        (parts.username is not None or parts.password is not None, "must not hold a user or password; use api_key_env"),
        ("?" in url or "#" in url, "must not have a query or fragment"),
    )
    return next((text for wrong, text in checks if wrong), "")


def _model_faults(file: _File) -> Iterator[str]:
    known = {row.id for row in file.endpoints}
    seen: set[str] = set()
    for index, row in enumerate(file.models):
        at = f"models[{index}]"
        if row.name in seen:
            yield f"{at}.name: {row.name!r} is there already"
        seen.add(row.name)
        yield from _name_fault(f"{at}.name", row.name)
        steps: set[_StepRow] = set()
        for number, step in enumerate(row.endpoints):
            yield from _name_fault(f"{at}.endpoints[{number}].model", step.model)
            if step.endpoint not in known:
                yield f"{at}.endpoints[{number}].endpoint: no endpoint has the id {step.endpoint!r}"
            if step in steps:
                yield f"{at}.endpoints[{number}]: the same endpoint and model are there already"
            steps.add(step)


def _name_fault(at: str, name: str) -> Iterator[str]:
    if not name or len(name.encode()) > MAX_NAME:
        yield f"{at}: must have 1 to {MAX_NAME} bytes"
    elif _CONTROL.search(name):
        yield f"{at}: must not have control characters"


# ---- what is built ---------------------------------------------------------------------------------------------------


def _endpoints(
    file: _File, env: Mapping[str, str], folder: Path, why: dict[str, str], errors: list[str]
) -> dict[str, Endpoint]:
    endpoints = {}
    for index, row in enumerate(file.endpoints):
        key, missing = _key(row, env, folder)
        if missing:
            why[row.id] = missing
            continue
        if key and not _KEY.match(key):
            source = "api_key_env" if row.api_key_env and env.get(row.api_key_env) else "api_key_file"
            errors.append(f"endpoints[{index}].{source}: the key has characters that cannot stand in a header")
            continue
        host = urlsplit(row.base_url).hostname
        own: CapField = "max_completion_tokens" if host in _MAX_COMPLETION_TOKENS_HOSTS else "max_tokens"
        endpoints[row.id] = Endpoint(
            id=row.id,
            provider=row.provider,
            base_url=row.base_url.rstrip("/"),
            allow_private=row.allow_private,
            key=key,
            cap_field=row.cap_field or own,
        )
    return endpoints


def _key(row: _EndpointRow, env: Mapping[str, str], folder: Path) -> tuple[str, str]:
    """(key, why it is missing): the variable first, then the file."""
    if row.api_key_env and env.get(row.api_key_env, "").strip():
        return env[row.api_key_env].strip(), ""
    missing = f"{row.api_key_env} is not set" if row.api_key_env else ""
    if row.api_key_file:
        path = folder / row.api_key_file
        try:
            with path.open("rb") as file:
                key = file.read(_MAX_KEY_FILE).decode("latin-1").strip()
        except OSError as exc:
            return "", f"{path}: {exc.strerror}"
        missing = "" if key else f"{path} is empty"
        return key, missing
    return "", missing


def _models(file: _File, endpoints: Mapping[str, Endpoint], errors: list[str]) -> dict[str, Model]:
    rows = {row.id: row for row in file.endpoints}
    models = {}
    for index, row in enumerate(file.models):
        try:
            price = _price(row, rows)
        except CatalogError as exc:
            errors.extend(f"models[{index}].price{line}" for line in exc.errors)
            continue
        steps = tuple(Step(step.endpoint, step.model) for step in row.endpoints if step.endpoint in endpoints)
        if steps:
            models[row.name] = Model(
                name=row.name,
                steps=steps,
                max_output_tokens=row.max_output_tokens,
                price=price,
                encoding=row.encoding or tokens.encoding_for(steps[0].model),
                owned_by=row.owned_by or endpoints[steps[0].endpoint].provider,
                hidden_reasoning=_hides(row, steps),
            )
    return models


def _hides(row: _ModelRow, steps: tuple[Step, ...]) -> bool:
    """The operator's word, else what the upstream names say."""
    if row.hidden_reasoning is not None:
        return row.hidden_reasoning
    return any(tokens.hides_reasoning(step.model) for step in steps)


def _price(row: _ModelRow, rows: Mapping[str, _EndpointRow]) -> Price:
    """Raises CatalogError with lines that continue `models[i].price`."""
    if isinstance(row.price, str):
        if row.price != "free":
            raise CatalogError([': expected "free" or a table { input, cached_input, output }'])
        return Price(0, 0, 0)
    if row.price is None:
        found = [_known_price(step.model, rows[step.endpoint].base_url) for step in row.endpoints]
        # The dearest endpoint the request may reach (D1).
        return Price(*(max(price[part] for price in found) for part in range(3)))
    errors: list[str] = []

    def read(field: str, text: str) -> int:
        try:
            nano = money.usd_to_nano(text)
        except ValueError as exc:
            errors.append(f".{field}: {exc}")
            return 0
        if nano > MAX_PRICE:
            errors.append(f".{field}: above {money.show_usd(MAX_PRICE)} per million tokens")
        return nano

    given = row.price
    price_in, price_out = read("input", given.input), read("output", given.output)
    cached = price_in if given.cached_input is None else read("cached_input", given.cached_input)
    if errors:
        raise CatalogError(errors)
    return Price(price_in, cached, price_out)


def _known_price(model: str, base_url: str) -> tuple[int, int, int]:
    """Nano-USD per million (input, cached input, output) from genai-prices. Raises CatalogError `unpriced_model`.

    A price that depends on more than the model (tiers by prompt length) is not known here: the operator must give one.
    """
    import genai_prices  # noqa: PLC0415 - 0.26 s to import, and a catalogue with prices never needs it

    try:
        found = genai_prices.calc_price(genai_prices.Usage(), model, provider_api_url=base_url).model_price
    except LookupError as exc:
        raise _unpriced(model) from exc
    parts = [getattr(found, name, None) for name in ("input_mtok", "cache_read_mtok", "output_mtok")]
    parts[1] = parts[0] if parts[1] is None else parts[1]
    try:
        price_in, cached, price_out = (money.usd_to_nano(f"{part:f}") for part in parts)
    except (TypeError, ValueError) as exc:
        raise _unpriced(model) from exc
    return price_in, cached, price_out


def _unpriced(model: str) -> CatalogError:
    wanted = 'give price = { input = "...", output = "..." } in USD per million tokens, or price = "free"'
    return CatalogError(
        [f": unpriced_model: genai-prices has no single price for {model!r} at this endpoint; {wanted}"]
    )
