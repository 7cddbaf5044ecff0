"""What one upstream model costs at one endpoint: from the catalogue, else from genai-prices, compiled to integers once.

The operator's word wins. Prices are decimal USD per million tokens, kept as integer nano-USD per million. A part that
neither gives is settled here, once, and never while a call is priced: cached input, a cache write and audio read cost
what input costs (a write to Claude 1.25 or 2 times that, Anthropic's rule), audio made costs what output costs.
"""

from decimal import Decimal
from typing import Any, Final

from msgspec import Struct

from shared.core import money, pricing
from shared.wire.messages import Price

MAX_PRICE: Final = 10_000 * money.NANO  # nano-USD per million tokens; keeps every reservation below money.MAX_NANO

PARTS: Final[tuple[str, ...]] = Price.__struct_fields__
CATALOGUE: Final = "catalogue"
GENAI: Final = "genai-prices"

#: genai-prices' names of our parts, in PARTS' order.
_MTOK: Final = (
    "input_mtok", "cache_read_mtok", "output_mtok", "cache_write_mtok", "cache_write_1h_mtok", "input_audio_mtok",
    "output_audio_mtok",
)  # fmt: skip


class PriceError(Exception):
    """No price; `lines` continue the path of the field: `.output: ...` or `: unpriced_model: ...`."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        super().__init__("\n".join(lines))


class PriceRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A price as the catalogue gives it: USD per million tokens, as decimal strings."""

    input: str
    output: str
    cached_input: str | None = None
    cache_write_5m: str | None = None
    cache_write_1h: str | None = None
    audio_input: str | None = None
    audio_output: str | None = None


class Priced(Struct, frozen=True):
    """A price, and where each part of it (in PARTS' order) comes from."""

    price: Price
    sources: tuple[str, ...]


def of_row(row: PriceRow | str, model: str) -> Priced:
    """The catalogue's price, or "free". Raises PriceError with a line for each part that cannot be read."""
    if isinstance(row, str):
        if row != "free":
            raise PriceError([': expected "free" or a table { input, cached_input, output }'])
        return Priced(Price(0, 0, 0), (CATALOGUE,) * len(PARTS))
    given: dict[str, int] = {}
    lines = []
    for part in PARTS:
        text = getattr(row, part)
        if text is None:
            continue
        try:
            nano = money.usd_to_nano(text)
        except ValueError as exc:
            lines.append(f".{part}: {exc}")
            continue
        if nano > MAX_PRICE:
            lines.append(f".{part}: above {money.show_usd(MAX_PRICE)} per million tokens")
        given[part] = nano
    if lines:
        raise PriceError(lines)
    return _whole(given, CATALOGUE, model)


def known(model: str, base_url: str) -> Priced:
    """genai-prices' price of this model at this endpoint. Raises PriceError `unpriced_model` (D20).

    A price that depends on more than the model (tiers by the prompt's length, a fee per request, tokens that our record
    does not tell apart and that cost more) is none the ledger could hold to: the operator must give one.
    """
    import genai_prices  # noqa: PLC0415 - 0.26 s to import, and a catalogue with prices never needs it

    try:
        found = genai_prices.calc_price(genai_prices.Usage(), model, provider_api_url=base_url).model_price
    except LookupError as exc:
        raise _unpriced(model) from exc
    parts = {part: getattr(found, name, None) for part, name in zip(PARTS, _MTOK, strict=True)}
    try:
        given = {part: money.usd_to_nano(f"{value:f}") for part, value in parts.items() if value is not None}
    except (TypeError, ValueError) as exc:
        raise _unpriced(model) from exc
    if "input" not in given or "output" not in given or max(given.values()) > MAX_PRICE or _has_more(found, given):
        raise _unpriced(model)
    return _whole(given, GENAI, model)


def _whole(given: dict[str, int], source: str, model: str) -> Priced:
    """All parts, those not given by the rules of the module."""
    price_in, price_out = given["input"], given["output"]
    short, long = pricing.writes(model, price_in)
    short = given.get("cache_write_5m", short)
    instead = {
        "cached_input": (price_in, "as input"),
        "cache_write_5m": (short, _times(short, price_in)),
        "cache_write_1h": (max(long, short), _times(max(long, short), price_in)),
        "audio_input": (price_in, "as input"),
        "audio_output": (price_out, "as output"),
    }
    price = Price(*(given[part] if part in given else instead[part][0] for part in PARTS))
    return Priced(price, tuple(source if part in given else instead[part][1] for part in PARTS))


def _times(nano: int, price_in: int) -> str:
    return "as input" if nano == price_in else f"input x {Decimal(nano) / price_in:f}"


def _has_more(found: Any, given: dict[str, int]) -> bool:
    """Whether something is priced that would be billed above the part we count it as."""
    for name, value in vars(found).items():
        if value is None or name in _MTOK:
            continue
        if name == "requests_kcount":
            return True
        if name.endswith("_mtok"):
            try:
                nano = money.usd_to_nano(f"{value:f}")
            except (TypeError, ValueError):
                return True
            if nano > given["output" if name.startswith("output") else "input"]:
                return True
    return False


def _unpriced(model: str) -> PriceError:
    wanted = 'give price = { input = "...", output = "..." } in USD per million tokens, or price = "free"'
    return PriceError([f": unpriced_model: genai-prices has no single price for {model!r} at this endpoint; {wanted}"])
