"""An image's tokens by the published rule (issue 4), and sizes read from the headers of files, bounded."""

import base64
import struct
import time
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core import images


def png(width: int, height: int) -> bytes:
    """A header, as any PNG begins."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"IDAT"


def jpeg(width: int, height: int, *, before: int = 0, frame: int = 0xC0) -> bytes:
    """Segments of `before` bytes in all, as a camera's exif and profile, then the frame."""
    segments = b""
    while before > 0:
        size = min(before, 65_533)
        segments += b"\xff\xe1" + struct.pack(">H", size + 2) + b"\xff\xc0" * (size // 2) + b"x" * (size % 2)
        before -= size
    start = b"\xff\xd8\xff\xc4" + struct.pack(">H", 4) + b"ab" + segments + b"\xff\xff"  # a table, a fill byte
    return start + bytes([0xFF, frame]) + struct.pack(">HBHH", 11, 8, height, width) + b"\x01\x01\x11\x00"


def gif(width: int, height: int, frame: tuple[int, int, int, int]) -> bytes:
    """With a colour table, a comment, and a first image."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x81, 0, 0) + bytes(12)
    return head + b"\x21\xfe\x03abc\x00" + b"\x2c" + struct.pack("<HHHHB", *frame, 0)


def webp(kind: bytes, payload: bytes) -> bytes:
    """One chunk."""
    chunk = kind + struct.pack("<I", len(payload)) + payload
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def lossless(width: int, height: int) -> bytes:
    return webp(b"VP8L", b"\x2f" + struct.pack("<I", width - 1 | (height - 1) << 14) + bytes(8))


def url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (png(640, 480), (640, 480)),
        (png(2**31 - 1, 1), (2**31 - 1, 1)),
        (png(0, 480), None),
        (jpeg(640, 480), (640, 480)),
        (jpeg(640, 480, frame=0xC2), (640, 480)),
        (jpeg(640, 480, before=5000), (640, 480)),
        (jpeg(640, 480, before=150_000), (640, 480)),
        (jpeg(640, 480, before=300_000), None),  # further than is read
        (jpeg(640, 480, frame=0xDA), None),
        (gif(640, 480, (0, 0, 640, 480)), (640, 480)),
        (gif(1, 1, (10, 20, 640, 480)), (650, 500)),
        (lossless(640, 480), (640, 480)),
        (webp(b"VP8 ", b"\x00\x00\x00\x9d\x01\x2a" + struct.pack("<HH", 640 | 0x4000, 480)), (640, 480)),
        (webp(b"VP8X", bytes(4) + (639).to_bytes(3, "little") + (479).to_bytes(3, "little")), (640, 480)),
        (webp(b"WHAT", bytes(20)), None),
        (b"BM" + bytes(50), None),
        (b"", None),
    ],
)  # fmt: skip
def test_sizes_are_read_from_the_header(data: bytes, size: tuple[int, int] | None) -> None:
    """Whatever the URL calls it: servers look at the bytes, too."""
    assert images.size_of(url(data, "image/jpeg")) == size
    assert images.size_of(url(data).replace("data:", "DATA:")) == size


@pytest.mark.parametrize(
    "odd",
    [
        "https://example.com/a.png",
        "data:image/png," + "a" * 50,
        "data:image/png;base64," + "%41" * 40,
        "data:image/png;base64",
        url(png(5, 5)).replace(",", ",\n"),
        url(png(5, 5))[:40] + " " + url(png(5, 5))[40:],
        url(png(5, 5))[:30] + "é" * 30,
        url(png(5, 5))[:40],
    ],
)
def test_what_a_server_might_read_otherwise_has_no_size(odd: str) -> None:
    """White space moves what a lenient decoder reads; then the largest image is reserved."""
    assert images.size_of(odd) is None


@given(st.sampled_from([png(9, 9), jpeg(9, 9), gif(9, 9, (0, 0, 9, 9)), lossless(9, 9)]), st.data())
def test_broken_headers_raise_nothing(whole: bytes, data: st.DataObject) -> None:
    """Cut anywhere, any byte changed."""
    at = data.draw(st.integers(0, len(whole) - 1))
    images.size_of(url(whole[:at]))
    images.size_of(url(whole[:at] + data.draw(st.binary(max_size=9)) + whole[at + 1 :]))


@pytest.mark.parametrize(
    ("model", "size", "detail", "tokens"),
    [
        # OpenAI's own examples, and what users measured
        ("gpt-4o", (1024, 1024), "high", 765),
        ("gpt-4o", (2048, 4096), "auto", 1105),
        ("gpt-4o", (4096, 8192), "low", 85),
        ("gpt-4o", (128, 64), "high", 255),
        ("o3", (128, 64), "high", 225),
        ("gpt-4o-mini", (128, 64), "high", 8500),
        ("gpt-4o", (2049, 513), "high", 85 + 8 * 170),
        ("gpt-4.1-mini", (1024, 1024), "auto", 1659),  # 1024 patches x 1.62
        ("gpt-4.1-mini", (4000, 1474), "high", 2489),  # 1536 x 1.62
        ("gpt-4.1-nano", (128, 64), "low", 20),  # 8 x 2.46
        ("openai/gpt-5-mini-2025-08-07", (512, 512), "high", 415),
        ("gpt-5", (1024, 1024), "high", 630),
        ("gpt-5", (1, 1), "None", 210),
        ("ft:gpt-4o-mini:me", None, "low", 2833),
        ("gpt-4o", None, "high", 1445),  # no image has more tiles than 2048 x 768
        ("gpt-4o-mini", None, "auto", 48_169),
        ("gpt-5.2", (1, 1), "low", images.UNKNOWN),  # its rule is not published
        ("llava", (1, 1), "low", images.UNKNOWN),
    ],
)  # fmt: skip
def test_the_published_rule(model: str, size: tuple[int, int] | None, detail: str, tokens: int) -> None:
    address = "https://example.com/a.png" if size is None else url(png(*size))
    assert images.bound((model,), address, detail) == tokens


@given(st.integers(1, 60_000), st.integers(1, 60_000), st.sampled_from(["gpt-4o", "gpt-4.1-mini", "gpt-5"]))
def test_no_image_passes_the_bound_of_one_of_unknown_size(width: int, height: int, model: str) -> None:
    """D1; and on its side it costs the same."""
    known = images.bound((model,), url(png(width, height)), "high")
    assert 0 < known <= images.bound((model,), "https://example.com/a.png", "high")
    assert known == images.bound((model,), url(png(height, width)), "high")


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff" + b"\xff" * 190_000,
        b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + b"\x21\xf9" + b"\x01\x00" * 95_000,
        b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + b"\x21\xf9" + b"\x01\x01" * 95_000,
    ],
)
def test_an_image_made_to_be_walked_through_is_given_up(data: bytes) -> None:
    """It is read on the guardian's event loop: four of them took 60 ms, times the families of a model's endpoints."""
    address = url(data, "image/jpeg")
    took = []
    for _ in range(5):
        began = time.process_time()
        assert images.bound(("gpt-4o", "gpt-4o-mini", "gpt-4.1"), address, "high") == 48_169
        took.append(time.process_time() - began)
    assert min(took) < 0.004
