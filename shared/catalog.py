"""The catalogue: which endpoints exist, which models clients may ask for, what they cost; read or refused as a whole.

A fault is told with the path of the field (`models[2].price.output: ...`). Prices are decimal strings in USD per
million tokens, of a model or of it at one endpoint; a model without a price is looked up in genai-prices and refused
as `unpriced_model` when that does not know it either (D20, prices.py). Model names are looked up exactly (D6).
"""

import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from shared import prices
from shared.core import pricing, tokens
from shared.prices import Priced, PriceError, PriceRow
from shared.wire.messages import Price, Step

MAX_NAME: Final = 256  # bytes of a model name (D6)
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
    """What clients may ask for: `steps` in the operator's order, usable endpoints only.

    `price` is the dearest of them, part by part: what a request is reserved at (D1). `prices`: what a step costs where
    that is less, under pricing.key_of or the endpoint's id (pricing.price_of reads it); `priced` goes with `steps`.
    """

    name: str
    steps: tuple[Step, ...]
    max_output_tokens: int
    price: Price
    prices: dict[str, Price]
    priced: tuple[Priced, ...]
    encoding: tokens.Encoding
    token_safety_percent: int  # what the bound of a prompt adds to our count of it
    owned_by: str
    hidden_reasoning: bool  # bills output that it does not show: a cut call is charged for the time it ran


class Catalog(Struct, frozen=True, kw_only=True):
    """The catalogue of one boot. `left_out`: endpoints without their key; `why` says which key, for the log."""

    models: dict[str, Model]
    endpoints: dict[str, Endpoint]
    left_out: tuple[str, ...]
    why: dict[str, str]
    epoch: int  # CRC-32 of the file and of every price in it, genai-prices' too: who has the same one bills the same


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
    price: PriceRow | str | None = None  # what it costs there; else the model's, else genai-prices'


class _ModelRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    endpoints: Annotated[tuple[_StepRow, ...], Meta(min_length=1, max_length=16)]
    max_output_tokens: Annotated[int, Meta(ge=1, le=1_000_000)]
    price: PriceRow | str | None = None
    encoding: tokens.Encoding | None = None
    token_safety_percent: Annotated[int, Meta(ge=0, le=1000)] = tokens.MARGIN_PERCENT
    hidden_reasoning: bool | None = None
    owned_by: Annotated[str, Meta(min_length=1, max_length=64)] | None = None


class _File(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    endpoints: tuple[_EndpointRow, ...] = ()
    models: tuple[_ModelRow, ...] = ()


def load(path: str | Path, env: Mapping[str, str], *, keyless: bool = False) -> Catalog:
    """Read and check the file; keys come from `env` or from files beside it. `keyless`: for who looks at prices only,
    what is left out is there all the same. Raises CatalogError."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as exc:
        raise CatalogError([f"{path}: {exc.strerror}; set HOTPATH_CATALOG to the catalogue's path"]) from exc
    if len(raw) > _MAX_FILE:
        raise CatalogError([f"{path}: larger than {_MAX_FILE} bytes"])
    return parse(raw, env, path.parent, keyless=keyless)


def parse(raw: bytes, env: Mapping[str, str], folder: Path, *, keyless: bool = False) -> Catalog:
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
    endpoints = _endpoints(file, env, folder, why, errors, keyless=keyless)
    priced = _all_priced(file, errors)
    if errors:
        raise CatalogError(errors)
    epoch = zlib.crc32(msgspec.msgpack.encode(priced), zlib.crc32(raw))
    models = _models(file, endpoints, priced)
    return Catalog(models=models, endpoints=endpoints, left_out=tuple(why), why=why, epoch=epoch)


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
        steps: set[Step] = set()
        for number, step in enumerate(row.endpoints):
            yield from _name_fault(f"{at}.endpoints[{number}].model", step.model)
            if step.endpoint not in known:
                yield f"{at}.endpoints[{number}].endpoint: no endpoint has the id {step.endpoint!r}"
            pair = Step(step.endpoint, step.model)
            if pair in steps:
                yield f"{at}.endpoints[{number}]: the same endpoint and model are there already"
            steps.add(pair)


def _name_fault(at: str, name: str) -> Iterator[str]:
    if not name or len(name.encode()) > MAX_NAME:
        yield f"{at}: must have 1 to {MAX_NAME} bytes"
    elif _CONTROL.search(name):
        yield f"{at}: must not have control characters"


# ---- what is built ---------------------------------------------------------------------------------------------------


def _endpoints(
    file: _File, env: Mapping[str, str], folder: Path, why: dict[str, str], errors: list[str], *, keyless: bool
) -> dict[str, Endpoint]:
    endpoints = {}
    for index, row in enumerate(file.endpoints):
        key, missing = _key(row, env, folder)
        if missing:
            why[row.id] = missing
            if not keyless:
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


def _all_priced(file: _File, errors: list[str]) -> list[list[Priced]]:
    """What each step of each model costs, also where its endpoint has no key here: so all have the same epoch."""
    rows = {row.id: row for row in file.endpoints}
    priced = []
    for index, row in enumerate(file.models):
        wrong, found = _priced(row, rows)
        errors.extend(f"models[{index}]{line}" for line in wrong)
        priced.append(found)
    return priced


def _models(file: _File, endpoints: Mapping[str, Endpoint], priced: list[list[Priced]]) -> dict[str, Model]:
    models = {}
    for row, found in zip(file.models, priced, strict=True):
        usable = [
            (Step(step.endpoint, step.model), one)
            for step, one in zip(row.endpoints, found, strict=True)
            if step.endpoint in endpoints
        ]
        if usable:
            steps = tuple(step for step, _ in usable)
            price = pricing.dearest(one.price for _, one in usable)
            models[row.name] = Model(
                name=row.name,
                steps=steps,
                max_output_tokens=row.max_output_tokens,
                price=price,
                prices=_own_prices(price, usable),
                priced=tuple(one for _, one in usable),
                encoding=row.encoding or tokens.encoding_for(steps[0].model),
                token_safety_percent=row.token_safety_percent,
                owned_by=row.owned_by or endpoints[steps[0].endpoint].provider,
                hidden_reasoning=_hides(row, steps),
            )
    return models


def _own_prices(price: Price, usable: list[tuple[Step, Priced]]) -> dict[str, Price]:
    """The prices of the steps where they differ from `price`."""
    at: dict[str, set[Price]] = {}
    for step, priced in usable:
        at.setdefault(step.endpoint, set()).add(priced.price)
    return {
        step.endpoint if len(at[step.endpoint]) == 1 else pricing.key_of(step): priced.price
        for step, priced in usable
        if priced.price != price
    }


def _hides(row: _ModelRow, steps: tuple[Step, ...]) -> bool:
    """The operator's word, else what the upstream names say."""
    if row.hidden_reasoning is not None:
        return row.hidden_reasoning
    return any(tokens.hides_reasoning(step.model) for step in steps)


def _priced(row: _ModelRow, rows: Mapping[str, _EndpointRow]) -> tuple[list[str], list[Priced]]:
    """What each step costs; the faults continue `models[i]`."""
    wrong: dict[str, None] = {}  # a fault of the model's own price is told once, not for every step
    found = []
    for number, step in enumerate(row.endpoints):
        at = ".price" if step.price is None else f".endpoints[{number}].price"
        given = row.price if step.price is None else step.price
        try:
            if given is None:
                found.append(prices.known(step.model, rows[step.endpoint].base_url))
            else:
                found.append(prices.of_row(given, step.model))
        except PriceError as exc:
            wrong.update((at + line, None) for line in exc.lines)
    return list(wrong), found
