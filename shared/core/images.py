"""What an image costs in tokens at most: by the published rule where the model and the size are known. Pure.

OpenAI's rules (platform.openai.com/docs/guides/images-vision, "Calculating costs"):

    tiles     scaled down to fit 2048 x 2048, then to a shortest side of 768; tokens = base + tile for each 512 x 512 of
              it; `detail: low` = base. Small images are not scaled up (measured: 128 x 64 is one tile).
    patches   one for each 32 x 32, at most 1536, times the model's factor; `detail: low` is taken as no cheaper.

`auto` counts as high. Roundings go up at each step, since servers round either way. The size of a `data:` URL is read
from the first bytes of its PNG, JPEG, GIF or WebP; nothing is decoded, nothing fetched. What is unknown (a remote URL,
an odd file) has the rule's largest size; a model of no known family `UNKNOWN` tokens.
"""

from binascii import a2b_base64
from collections.abc import Iterable
from typing import Final

from msgspec import Struct

#: The dearest image at high detail of any model but gpt-4o-mini: 10,000 patches x 1.2 (models that take `original`).
UNKNOWN: Final = 12_000

_FIT: Final = 2048
_SHORT: Final = 768
_TILE: Final = 512
_MAX_TILES: Final = 8  # of 2048 x 768
_PATCH: Final = 32
_MAX_PATCHES: Final = 1536
#: Characters of base64 read to find the size: an exif or colour profile may stand before a JPEG's.
_READS: Final = (1024, 32_768, 262_144)
_MAX_STEPS: Final = 256  # segments, fill bytes or blocks
_MAX_SUB_BLOCKS: Final = 1024  # of a GIF before its first image: 255 bytes each in what programs write

#: Start of the frame in a JPEG: baseline to lossless, without DHT (C4), JPG (C8) and DAC (CC).
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE: Final = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length

_LONG: Final = (b"\xff\xd8\xff", b"GIF")  # JPEG and GIF: much may stand before the size

Size = tuple[int, int]


class _Rule(Struct, frozen=True):
    base: int = 0
    tile: int = 0
    percent: int = 0  # of a token for each patch; 0 = tiles


#: By the beginning of the model's name, the first that fits; gpt-5 itself has other families under its name.
_FAMILIES: Final[tuple[tuple[str, _Rule], ...]] = (
    ("gpt-4o-mini", _Rule(2833, 5667)),
    ("gpt-4.1-mini", _Rule(percent=162)),
    ("gpt-4.1-nano", _Rule(percent=246)),
    ("o4-mini", _Rule(percent=172)),
    ("gpt-5-mini", _Rule(percent=162)),
    ("gpt-5-nano", _Rule(percent=246)),
    *((name, _Rule(85, 170)) for name in ("gpt-4o", "chatgpt-4o", "gpt-4.1", "gpt-4.5", "gpt-4-turbo")),
    *((name, _Rule(75, 150)) for name in ("o1", "o3")),
    *((name, _Rule(70, 140)) for name in ("gpt-5-chat", "gpt-5-20")),
)  # fmt: skip
_GPT_5: Final = _Rule(70, 140)


def bound(models: Iterable[str], url: str, detail: str) -> int:
    """The most that this image of a message costs with whichever of these upstream models; UNKNOWN without any."""
    rules = [_rule(model) for model in models]
    reads = any(rule is not None and (rule.percent or detail != "low") for rule in rules)
    found = size_of(url) if reads else None  # once: it is the dear part
    return max((_bound(rule, found, detail) for rule in rules), default=UNKNOWN)


def _bound(rule: "_Rule | None", found: Size | None, detail: str) -> int:
    if rule is None:
        return UNKNOWN
    if rule.percent:
        patches = _MAX_PATCHES if found is None else _ceil(found[0], _PATCH) * _ceil(found[1], _PATCH)
        return _ceil(min(patches, _MAX_PATCHES) * rule.percent, 100)
    if detail == "low":
        return rule.base
    return rule.base + rule.tile * (_MAX_TILES if found is None else _tiles(*found))


def size_of(url: str) -> Size | None:
    """Width and height of a base64 `data:` URL's image, as its own header has them; None when they cannot be read."""
    if url[:5].lower() != "data:":
        return None
    comma = url.find(",", 5, 256)
    if comma < 0 or not url[:comma].lower().endswith(";base64"):
        return None
    for count in _READS:
        text = url[comma + 1 : comma + 1 + count]
        found, longer = _read_some(text[: len(text) // 4 * 4])
        if not longer or len(text) < count:
            return found
    return None


def _read_some(text: str) -> tuple[Size | None, bool]:
    """The size from a beginning of base64, and whether more of it might tell."""
    try:
        data = a2b_base64(text, strict_mode=True)
    except ValueError:  # binascii.Error is one; so is what is not ASCII
        return None, False
    found = _read(data)
    if found is None:
        return None, data[:3] in _LONG
    return (found if min(found) > 0 else None), False


# ---- by rule ---------------------------------------------------------------------------------------------------------


def _rule(model: str) -> _Rule | None:
    name = model.rpartition("/")[2].removeprefix("ft:")
    if name == "gpt-5":
        return _GPT_5
    return next((rule for start, rule in _FAMILIES if name.startswith(start)), None)


def _tiles(width: int, height: int) -> int:
    least = min(width, height)  # rounded down where the others are rounded up: what is divided by
    most = max(width, height)
    if most > _FIT:
        width, height, least = _ceil(width * _FIT, most), _ceil(height * _FIT, most), least * _FIT // most
    if least > _SHORT:
        width, height = _ceil(width * _SHORT, least), _ceil(height * _SHORT, least)
    return min(_MAX_TILES, _ceil(width, _TILE) * _ceil(height, _TILE))


def _ceil(number: int, by: int) -> int:
    return -(-number // by)


# ---- headers of files ------------------------------------------------------------------------------------------------


def _read(data: bytes) -> Size | None:
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and len(data) >= 24:
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if data[:3] == b"\xff\xd8\xff":
        return _jpeg(data)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return _gif(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        return _webp(data)
    return None


def _jpeg(data: bytes) -> Size | None:
    """ITU T.81 B.1: markers, each with the length of its segment, up to the frame's."""
    at = 2
    for _ in range(_MAX_STEPS):
        if data[at : at + 2] == b"\xff\xff":  # a fill byte
            at += 1
            continue
        if len(data) < at + 9 or data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker in _FRAMES:
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        at += 2 if marker in _BARE else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _gif(data: bytes) -> Size | None:
    """GIF89a: the logical screen, or the first image when that reaches beyond it."""
    if len(data) < 13:
        return None
    width, height = int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    left_over = _MAX_SUB_BLOCKS
    for _ in range(_MAX_STEPS):
        if len(data) < at + 9:
            return None
        if data[at] == 0x2C:
            left, top, wide, high = (int.from_bytes(data[at + i : at + i + 2], "little") for i in (1, 3, 5, 7))
            return max(width, left + wide), max(height, top + high)
        if data[at] != 0x21:
            return None
        at += 2
        while at < len(data) and data[at]:  # sub-blocks
            at += 1 + data[at]
            left_over -= 1
            if not left_over:
                return None
        at += 1
    return None


def _webp(data: bytes) -> Size | None:
    """RFC 9649: lossy, lossless, or extended with its canvas."""
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None
