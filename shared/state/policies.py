"""What an operator may set of a tenant and of a key, and how it stands in the tenant's config hash.

    mode  pii  clamp  rpm  tpm      off|observe|active, off|flag|redact|block, 1|0, whole numbers a minute (above 0)
    keywords                        JSON array of words
    rpm:<key>  tpm:<key>            of one key
    expires:<key>                   ms of the shared clock
    models:<key>                    JSON array of model names

A field that is not there has its default. One that cannot be read fails towards safety, each in its own way: the mode
counts as `active`, pii as `block`, clamp as off, a rate as 1 a minute (the least there is), an expiry as gone by,
allowed models as none, and a tenant with unreadable keywords is closed: nobody can say which prompts its rule would
stop. Who reads it says so in the log; setting the field again repairs it.
"""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from shared.core.keywords import MAX_KEYWORD_CHARS, MAX_KEYWORDS, PATTERN, check_keywords

Mode = Literal["off", "observe", "active"]
Pii = Literal["off", "flag", "redact", "block"]

#: A billion tokens a minute is more than any provider sells; Lua's buckets count it exactly.
MAX_RATE: Final = 1_000_000_000
MAX_MODELS: Final = 100
#: The end of 9999: beyond it no date can be shown.
MAX_TIME: Final = 253_402_300_799_999
#: What is allowed when nobody can read what is: no model has an empty name.
NO_MODELS: Final = frozenset({""})
LEAST_RATE: Final = 1
GONE_BY: Final = 1
_CLOSED: Final = ("",)

_NUMBER: Final = re.compile(rb"[1-9][0-9]{0,15}")

Rate = Annotated[int, Meta(ge=0, le=MAX_RATE, description="A minute; 0 = no limit.")]
Keyword = Annotated[str, Meta(min_length=1, max_length=MAX_KEYWORD_CHARS, pattern=PATTERN)]
Keywords = Annotated[list[Keyword], Meta(max_length=MAX_KEYWORDS, description="Words looked for in prompts.")]
ModelName = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]
Models = Annotated[list[ModelName], Meta(max_length=MAX_MODELS, description="What the key may ask for; [] = all.")]
Expiry = Annotated[int, Meta(ge=0, le=MAX_TIME, description="Unix ms after which the key is refused; 0 = never.")]

T = TypeVar("T")


class TenantPolicy(Struct, frozen=True, kw_only=True):
    """What holds for every key of a tenant."""

    mode: Mode = "observe"
    pii: Pii = "off"
    keywords: tuple[str, ...] = ()
    clamp: bool = True
    rpm: int = 0
    tpm: int = 0
    closed: bool = False  # unreadable: nobody gets in


class KeyPolicy(Struct, frozen=True, kw_only=True):
    """What holds for one key besides."""

    rpm: int = 0
    tpm: int = 0
    expires: int = 0  # ms of the shared clock; 0 = never
    models: frozenset[str] = frozenset()  # empty = all


class TenantChange(Struct, kw_only=True, forbid_unknown_fields=True):
    """What to set of a tenant's policy; the rest stays as it is."""

    mode: Annotated[Mode, Meta(description="Of the guardian's advice.")] | UnsetType = UNSET
    pii: Annotated[Pii, Meta(description="What is done about personal data and keywords.")] | UnsetType = UNSET
    keywords: Keywords | UnsetType = UNSET
    clamp: Annotated[bool, Meta(description="Shorten answers to the budget's headroom.")] | UnsetType = UNSET
    rpm: Rate | UnsetType = UNSET
    tpm: Rate | UnsetType = UNSET


class KeyChange(Struct, kw_only=True, forbid_unknown_fields=True):
    """What to set of a key; the rest stays as it is."""

    rpm: Rate | UnsetType = UNSET
    tpm: Rate | UnsetType = UNSET
    expires: Expiry | UnsetType = UNSET
    models: Models | UnsetType = UNSET


class _Reader:
    """Reads fields, and remembers which could not be."""

    def __init__(self, fields: Mapping[bytes, bytes]) -> None:
        self._fields = fields
        self.damaged: list[str] = []

    def field(self, name: str, parse: Callable[[bytes], T], absent: T, damaged: T) -> T:
        value = self._fields.get(name.encode())
        if value is None:
            return absent
        try:
            return parse(value)
        except ValueError:  # msgspec's and Unicode's among them
            self.damaged.append(name)
            return damaged

    def rate(self, name: str) -> int:
        return self.field(name, lambda value: _number(value, MAX_RATE), 0, LEAST_RATE)


def _number(value: bytes, most: int) -> int:
    if not _NUMBER.fullmatch(value) or int(value) > most:
        raise ValueError("not a number")
    return int(value)


def _word(*allowed: str) -> Callable[[bytes], Any]:
    def parse(value: bytes) -> str:
        if value.decode() not in allowed:
            raise ValueError("not one of them")
        return value.decode()

    return parse


def _flag(value: bytes) -> bool:
    return bool(_word("1", "0")(value) == "1")


_keywords: Final = msgspec.json.Decoder(Keywords)
_models: Final = msgspec.json.Decoder(Models)


def _some(words: list[str]) -> tuple[str, ...]:
    if not words:  # the field is deleted when there are none: an empty one was not written by us
        raise ValueError("no word")
    return tuple(words)


def _read_keywords(value: bytes) -> tuple[str, ...]:
    words = _some(_keywords.decode(value))
    check_keywords(words)
    return words


def read_tenant(fields: Mapping[bytes, bytes]) -> tuple[TenantPolicy, list[str]]:
    """The policy of a tenant as its config hash has it, and the names of the fields that could not be read."""
    read = _Reader(fields)
    none: tuple[str, ...] = ()
    keywords = read.field("keywords", _read_keywords, none, _CLOSED)
    policy = TenantPolicy(
        mode=read.field("mode", _word(*get_args(Mode)), "observe", "active"),
        pii=read.field("pii", _word(*get_args(Pii)), "off", "block"),
        keywords=() if keywords == _CLOSED else keywords,
        clamp=read.field("clamp", _flag, absent=True, damaged=False),
        rpm=read.rate("rpm"),
        tpm=read.rate("tpm"),
        closed=keywords == _CLOSED,
    )
    return policy, read.damaged


def read_key(fields: Mapping[bytes, bytes], key: str) -> tuple[KeyPolicy, list[str]]:
    """As `read_tenant`, of one key."""
    read = _Reader(fields)
    policy = KeyPolicy(
        rpm=read.rate(f"rpm:{key}"),
        tpm=read.rate(f"tpm:{key}"),
        expires=read.field(f"expires:{key}", lambda value: _number(value, MAX_TIME), 0, GONE_BY),
        models=read.field(
            f"models:{key}", lambda value: frozenset(_some(_models.decode(value))), frozenset(), NO_MODELS
        ),
    )
    return policy, read.damaged


def tenant_fields(change: TenantChange) -> dict[str, str | None]:
    """What to write of a change: field -> text, None to delete it. Raises ValueError for what no policy may hold."""
    checked = msgspec.convert(msgspec.to_builtins(change), TenantChange)  # also when it was not read from JSON
    found: dict[str, str | None] = {}
    for name in ("mode", "pii"):
        if (word := getattr(checked, name)) is not UNSET:
            found[name] = word
    if checked.keywords is not UNSET:
        check_keywords(checked.keywords)
        found["keywords"] = _array(checked.keywords)
    if checked.clamp is not UNSET:
        found["clamp"] = "1" if checked.clamp else "0"
    return found | _numbers(checked, "", "rpm", "tpm")


def key_fields(change: KeyChange, key: str) -> dict[str, str | None]:
    """As `tenant_fields`, of one key."""
    checked = msgspec.convert(msgspec.to_builtins(change), KeyChange)
    found = {} if checked.models is UNSET else {f"models:{key}": _array(checked.models)}
    return found | _numbers(checked, f":{key}", "rpm", "tpm", "expires")


def _array(words: list[str]) -> str | None:
    if any(word.endswith("\n") for word in words):  # which Python's $ lets pass
        raise ValueError("no control characters")
    return msgspec.json.encode(list(dict.fromkeys(words))).decode() if words else None


def _numbers(change: Struct, end: str, *names: str) -> dict[str, str | None]:
    values = {name: getattr(change, name) for name in names}
    return {f"{name}{end}": str(value) if value else None for name, value in values.items() if value is not UNSET}
