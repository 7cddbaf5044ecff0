r"""The kinds of personal data that are looked for (S2-28), each as one or more `Pattern`s.

Which writings count, decided once:

    email        local part of up to 64 characters, dotted domain with a letters-only (or xn--) end; not `logo@2x.png`.
    credit_card  13 to 19 digits together, or in the schemes' groups with one kind of space or dash between; Luhn.
    ssn          123-45-6789 or 123 45 6789; nine digits together only after "SSN" or "social security".
    ip           four octets, not after "v", "version", "build", "==" and the like; IPv6 of the ranges hosts have.
                 A bare 1.2.3.4 is taken as an address: a version too many redacted is better than an address sent.
    phone        North American with separators or brackets; with a plus and a country code; and 7 to 15 digits in any
                 grouping after a word such as "phone" or "fax". Bare digits are ids and timestamps: not taken.

A number that touches a letter or a digit, or is part of a decimal number, is something else and left alone. Digits are
ASCII; separators may be no-break spaces and Unicode dashes, which models like to write.

Two engines share the work. `gate` is in RE2's syntax (linear time, no look-around) and matches wherever `regex` may,
among 1 KiB in 1.5 us; `regex` is Python's, anchored where the gate matched, and *bounded*: every repetition has a limit
and no two ways lead through the same text, so a candidate costs at most a few microseconds whatever it holds.
"""

import re
from collections.abc import Callable
from typing import Final, Literal

from msgspec import Struct

from shared.core.pii import validators

Kind = Literal["email", "phone", "ssn", "credit_card", "ip", "keyword"]
Check = Callable[[re.Match[bytes]], "tuple[int, int] | None"]

#: Between groups of digits: space, no-break space, dash and its Unicode sisters (U+2010 to U+2015); a dot in phones.
_GAP: Final = rb"(?:[ -]|\xc2\xa0|\xe2\x80[\x90-\x95])"
_DOT_GAP: Final = rb"(?:[ .-]|\xc2\xa0|\xe2\x80[\x90-\x95])"
#: What must not follow a number: a letter, a digit, decimals.
_END: Final = rb"(?![0-9A-Za-z]|\.[0-9])"
#: What must stand before one in the gate (consumed, RE2 looks nowhere): anything but a letter or digit, or an escape of
#: JSON or a program, whose letter is none.
BEFORE: Final = rb"(?:[^0-9A-Za-z]|\\[nrtbf])"

_CUE_TAIL: Final = rb"(?i:[ _-]?(?:number|num|no|nr))?[\x00- \"'`:=#.,*(\\-]{0,8}(?i:(?:is|at|on)[: ]{1,3})?"
_PHONE_CUE: Final = (
    rb"(?i:(?:tele)?phone|tel|telefon|mobile|cell|fax|whatsapp|(?:call|text|reach) (?:me|us) (?:at|on))" + _CUE_TAIL
)
_SSN_CUE: Final = rb"(?i:ssn|social security)" + _CUE_TAIL
_PHONE_DIGIT: Final = rb"(?:" + _DOT_GAP + rb"|/)?(?:[()]" + _DOT_GAP + rb"?)?[0-9]"

_DOMAIN: Final = re.compile(
    rb"@((?:(?:[A-Za-z0-9-]|[\xc3-\xc9][\x80-\xbf]){1,63}+\.){1,8})(xn--[A-Za-z0-9]{2,59}|[A-Za-z]{2,24})"
)
_LOCAL: Final = bytes(
    byte for byte in range(256) if chr(byte).isascii() and (chr(byte).isalnum() or chr(byte) in "._%+-'")
) + bytes([*range(0x80, 0xC0), *range(0xC3, 0xCA)])  # UTF-8 of U+00C0 to U+027F, as in the domain
_LOCAL_MOST: Final = 64  # RFC 5321, 4.5.3.1.1
_NOT_FIRST: Final = b"._%+-'" + bytes(range(0x80, 0xC0))  # punctuation, and what the cut left of a character
_ICON: Final = re.compile(rb"[0-9]x\.(?:png|jpe?g|gif|svg|webp)", re.IGNORECASE)

_VERSION: Final = re.compile(
    rb"(?:(?<![a-z])v|(?<![a-z])ver\.?|version|release|build|firmware|[=<>~!]=|[~^])[ \t]{0,2}\Z", re.IGNORECASE
)
_VERSION_ENDS: Final = frozenset(bytes([byte]) for byte in b"vVrR.nNeEdD=~^")  # what a match of it ends with
_VERSION_CONTEXT: Final = 12  # bytes looked at
_DATE: Final = re.compile(rb"(?:19|20)[0-9]{2}[-/.][0-9]{2}[-/.][0-9]{2}")
_OCTETS: Final = re.compile(rb"[0-9]{1,3}(?:\.[0-9]{1,3}){3}" + _END)
_GOES_ON: Final = re.compile(_PHONE_DIGIT)
_DOTTED: Final = re.compile(rb"[0-9]++(?:\.[0-9]++)*+")
_DOT: Final = 0x2E
_NOT_DIGITS: Final = bytes(set(range(256)) - set(b"0123456789"))


class Pattern(Struct, frozen=True, kw_only=True):
    """One way of writing one kind. A streaming scan holds back what may still grow into a match: at most `longest`
    characters and the `after` that decide it; of what it let go it remembers the last `before` characters."""

    kind: Kind
    gate: bytes  # RE2 syntax, to stand after `BEFORE`; empty: `regex` begins with a literal and is fast by itself
    first: bytes = b"0123456789"  # what a match of `regex` may begin with
    regex: re.Pattern[bytes]  # over UTF-8, bounded
    check: Check  # the validator: the bytes that are the match, None when it is not one
    longest: int  # characters, a cue included
    before: int = 2  # characters before a match that `check` looks at
    after: int = 2  # characters behind a match that decide whether it is one


def _digits(text: bytes) -> str:
    return text.translate(None, _NOT_DIGITS).decode()


def decimals_end(text: bytes, start: int) -> int:
    """Where the dotted number ends whose later part begins at `start` (a fraction, an object id): nothing begins in it.
    `start` itself when no digit and dot stand before it."""
    if text[start - 1] != _DOT or start < 2 or not 0x30 <= text[start - 2] <= 0x39:
        return start
    found = _DOTTED.match(text, start)
    return found.end() if found else start


def check_email(found: re.Match[bytes]) -> tuple[int, int] | None:
    """`found` is `@` and the domain; the local part is what stands before it."""
    text, at = found.string, found.start()
    window = text[max(0, at - _LOCAL_MOST) : at]
    local = window[len(window.rstrip(_LOCAL)) :]
    start = at - len(local.lstrip(_NOT_FIRST))
    if start == at or _ICON.fullmatch(text, at + 1, found.end()):
        return None
    if text[start - 1 : start] == b"\\" and text[start] in b"nrtbf" and at - start > 1:
        start += 1  # the letter of an escape
    return start, found.end()


def check_card(found: re.Match[bytes]) -> tuple[int, int] | None:
    """The whole, or without its last group (a security code, a house number)."""
    start, end = found.span()
    if validators.is_card(_digits(found[0])):
        return start, end
    tail = found["tail"]
    if tail and validators.is_card(_digits(found[0][: -len(tail)])):
        return start, end - len(tail)
    return None


def check_ssn(found: re.Match[bytes]) -> tuple[int, int] | None:
    """Nine digits that may have been issued."""
    return found.span() if validators.is_ssn(_digits(found[0])) else None


def check_ssn_cue(found: re.Match[bytes]) -> tuple[int, int] | None:
    """The nine digits after the cue."""
    return found.span("number") if validators.is_ssn(_digits(found["number"])) else None


def check_ipv4(found: re.Match[bytes]) -> tuple[int, int] | None:
    """An address of a host that is not called a version."""
    start = found.start()
    if not validators.is_ipv4(found[0].decode()):
        return None
    before = found.string[max(0, start - _VERSION_CONTEXT) : start]
    return None if before.rstrip(b" \t")[-1:] in _VERSION_ENDS and _VERSION.search(before) else found.span()


def check_ipv6(found: re.Match[bytes]) -> tuple[int, int] | None:
    """A colon at the end is the sentence's."""
    text = found[0]
    if text.endswith(b":") and not text.endswith(b"::"):
        text = text[:-1]
    return (found.start(), found.start() + len(text)) if validators.is_ipv6(text.decode()) else None


def check_north_american(found: re.Match[bytes]) -> tuple[int, int] | None:
    """Ten digits in groups, or eleven."""
    marked = any(mark in found[0] for mark in (b"(", b"-", b"\xe2\x80"))
    plausible = validators.is_north_american(_digits(found[0]), marked=marked)
    return found.span() if plausible else None


def check_international(found: re.Match[bytes]) -> tuple[int, int] | None:
    """A plus and a country code. Of +1 and +7 eleven digits, whatever number follows after a space."""
    start, end = found.span()
    text = found[0]
    digits = _digits(text)
    if digits[0] in "17" and len(digits) > 11:
        places = [place for place, byte in enumerate(text) if 0x30 <= byte <= 0x39]
        if places[11] == places[10] + 1:
            return None
        end = start + places[10] + 1
        digits = digits[:11]
    grouped = end - start > len(digits) + 1
    return (start, end) if validators.is_international(digits, grouped=grouped) else None


def check_phone_cue(found: re.Match[bytes]) -> tuple[int, int] | None:
    """Any grouping, but no date, no address, and not the head of a longer number: those are judged by themselves."""
    start, end = found.span("number")
    text = found.string
    return None if _GOES_ON.match(text, end) or _DATE.match(text, start) or _OCTETS.match(text, start) else (start, end)


def _gate(regex: bytes) -> bytes:
    return regex.replace(b"<gap>", _GAP).replace(b"<dot>", _DOT_GAP).replace(b"<digit>", _PHONE_DIGIT)


def _pattern(regex: bytes) -> re.Pattern[bytes]:
    return re.compile(_gate(regex))


EMAIL: Final = Pattern(
    kind="email",
    gate=b"",  # see the engine: `first` is searched for
    first=b"@",
    regex=_DOMAIN,
    check=check_email,
    longest=64 + 1 + 8 * 64 + 63,
    before=1,
    after=64,
)
CARD: Final = Pattern(
    kind="credit_card",
    gate=_gate(rb"[2-6][0-9]{3}(?:[0-9]{9}|<gap>[0-9]{4}<gap>[0-9]{4}<gap>[0-9]|<gap>[0-9]{6}<gap>[0-9]{4})"),
    first=b"23456",
    regex=_pattern(
        rb"(?:[2-6][0-9]{12,18}"
        rb"|[2-6][0-9]{3}(?P<a><gap>)[0-9]{4}(?P=a)[0-9]{4}(?P=a)[0-9]{1,4}(?P<tail>(?P=a)[0-9]{1,3})?"
        rb"|3[0-9]{3}(?P<b><gap>)[0-9]{6}(?P=b)[0-9]{4,5})" + _END
    ),
    check=check_card,
    longest=23,
    after=5,
)
SSN: Final = Pattern(
    kind="ssn",
    gate=_gate(rb"[0-9]{3}<gap>[0-9]{2}<gap>[0-9]{4}"),
    regex=_pattern(rb"[0-9]{3}(?P<a><gap>)[0-9]{2}(?P=a)[0-9]{4}" + _END),
    check=check_ssn,
    longest=11,
)
SSN_CUE: Final = Pattern(
    kind="ssn",
    gate=_gate(_SSN_CUE + rb"[0-9]{3}<gap>?[0-9]{2}<gap>?[0-9]{4}"),
    first=b"sS",
    regex=_pattern(_SSN_CUE + rb"(?P<number>[0-9]{3}<gap>?[0-9]{2}<gap>?[0-9]{4})" + _END),
    check=check_ssn_cue,
    longest=60,
    before=1,
)
IPV4: Final = Pattern(
    kind="ip",
    gate=rb"[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]",
    regex=_OCTETS,
    check=check_ipv4,
    longest=15,
    before=_VERSION_CONTEXT,
)
IPV6: Final = Pattern(
    kind="ip",
    gate=rb"[23fF][0-9A-Fa-f]{3}:[0-9A-Fa-f]{0,4}:",
    first=b"23fF",
    regex=_pattern(rb"[23fF][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}+){2,7}+(?![0-9A-Za-z])"),
    check=check_ipv6,
    longest=39,
    after=1,
)
NORTH_AMERICAN: Final = Pattern(
    kind="phone",
    gate=_gate(rb"(?:1<dot>?)?(?:\([0-9]{3}\) ?[0-9]{3}<dot>?|[0-9]{3}<dot>[0-9]{3}<dot>)[0-9]{4}"),
    first=b"(0123456789",
    regex=_pattern(rb"(?:1<dot>?)?(?:\([0-9]{3}\) ?[0-9]{3}<dot>?|[0-9]{3}<dot>[0-9]{3}<dot>)[0-9]{4}" + _END),
    check=check_north_american,
    longest=17,
)
INTERNATIONAL: Final = Pattern(
    kind="phone",
    gate=_gate(rb"\+[0-9](?:<digit>){6}"),
    first=b"+",
    regex=_pattern(rb"\+[0-9](?:<digit>){6,14}" + _END),
    check=check_international,
    longest=60,
)
PHONE_CUE: Final = Pattern(
    kind="phone",
    gate=_gate(_PHONE_CUE + rb"[+(]{0,2}[0-9](?:<digit>){6}"),
    first=b"pPtTmMcCfFwWrR",
    regex=_pattern(_PHONE_CUE + rb"(?P<number>[+(]{0,2}[0-9](?:<digit>){6,14})" + _END),
    check=check_phone_cue,
    longest=105,
    before=1,
    after=3,
)

#: In the order they are tried where several may begin: what a check digit proves goes before what looks alike.
PATTERNS: Final = (EMAIL, CARD, SSN, IPV4, IPV6, NORTH_AMERICAN, INTERNATIONAL, SSN_CUE, PHONE_CUE)
