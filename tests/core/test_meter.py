"""Metering a stream: what is generated never passes what is reserved unnoticed (DESIGN 4; acceptance 4)."""

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.core import meter, pricing, tokens
from shared.core.meter import LOOK_BYTES, NEVER, Meter
from shared.core.translators.base import Usage
from shared.core.translators.texts import MAX_TAIL, Texts
from shared.wire.messages import Price

PRICE = Price(150_000_000, 75_000_000, 600_000_000)
PRICES = st.builds(Price, st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**11))
TEXT = st.one_of(
    st.sampled_from(["the", " word", " and", "日本", "😀", "\n\n", "   ", " x1", "é", "don't", "  if"]),
    st.text(min_size=1, max_size=12),
)
DELTA = st.tuples(st.integers(0, 2), st.sampled_from(["content", "refusal", "arguments"]), TEXT)


def count(text: str) -> int:
    """By the real table."""
    return tokens.count_text(text, "o200k")


def exact(texts: Texts) -> int:
    """As settlement counts."""
    return texts.uncounted + sum(max(count(text), deltas) for text, deltas in texts.all())


# ---- money to tokens and back ----------------------------------------------------------------------------------------


@given(price=PRICES, amount=st.integers(0, 2**53), prompt=st.integers(0, 10**6))
def test_what_is_affordable_costs_no_more(price: Price, amount: int, prompt: int) -> None:
    """By the money (D1): so many tokens fit into the amount, and one more does not."""
    reserved = meter.affordable(price, amount, prompt)
    if price.output == 0:
        assert reserved == NEVER
        return
    bound = prompt * pricing.dearest_input(price)
    if reserved:
        assert meter.spent(price, prompt, reserved) <= amount
        assert pricing.cost(price, Usage(uncached=prompt, text_output=reserved)) <= amount
    assert bound + (reserved + 1) * price.output > amount * pricing.PER


def test_a_slice_is_a_reservation_or_a_number_of_tokens() -> None:
    """BUDGET_MIN_RESERVATION_USD, or more where a token is dear."""
    assert meter.slice_of(PRICE, 1_000_000) == 1_000_000
    assert meter.slice_of(Price(0, 0, 60_000_000_000), 1_000_000) == 256 * 60_000


# ---- counting what is new --------------------------------------------------------------------------------------------


@given(deltas=st.lists(DELTA, max_size=150), looks=st.sets(st.integers(0, 149)))
def test_counting_piece_by_piece_is_counting_the_whole(deltas: list[tuple[int, str, str]], looks: set[int]) -> None:
    """However often it is asked: the texts are cut only where no token reaches over."""
    texts = Texts()
    for number, (index, kind, text) in enumerate(deltas):
        texts.keep(index, kind, 0, text)
        if number in looks:
            assert texts.tokens(count) == exact(texts)
    assert texts.tokens(count) == exact(texts)
    assert exact(texts) <= texts.kept


def test_a_text_without_a_place_to_cut_is_counted_in_parts() -> None:
    """Chinese: what is counted again stays bounded, the count is off by a token a part at most."""
    texts = Texts()
    asked: list[int] = []

    def note(text: str) -> int:
        asked.append(len(text))
        return count(text)

    for number in range(40_000 // 4):
        texts.keep(0, "content", 0, "天地玄黄")
        if number % 64 == 0:
            texts.tokens(note)
    assert max(asked) <= MAX_TAIL + 64 * 4
    assert abs(texts.tokens(count) - exact(texts)) <= 40_000 // MAX_TAIL + 1


# ---- the meter -------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    reads=st.lists(st.lists(DELTA, min_size=1, max_size=6), max_size=80),
    reserved=st.integers(0, 200),
    grants=st.lists(st.integers(1, 60), max_size=5),
)
def test_nothing_passes_it_by_more_than_one_read(
    reads: list[list[tuple[int, str, str]]], reserved: int, grants: list[int]
) -> None:
    """After each read either all is paid for, or the meter has just said how much is not."""
    texts, one, held = Texts(), Meter(reserved), reserved
    for read in reads:
        assert exact(texts) <= held
        for index, kind, text in read:
            texts.keep(index, kind, 0, text)
        lacks = one.count(texts.kept, texts.tokens(count)) if texts.kept > one.due else 0
        assert lacks == max(exact(texts) - held, 0)
        if lacks:
            if not grants:
                return
            held = exact(texts) + grants.pop()
            assert one.reserve(held) == 0


@given(reserved=st.integers(1, 2**40), written=st.integers(0, 2**40))
def test_it_is_due_before_it_can_be_passed(reserved: int, written: int) -> None:
    """A byte is a token at most, and no read has to count more than LOOK_BYTES and what it brought itself."""
    one = Meter(reserved)
    assert 0 < one.due <= min(reserved, LOOK_BYTES)
    counted = min(written, reserved)
    assert one.count(written, counted) == 0
    assert one.due - written == min(reserved - counted, LOOK_BYTES)


def test_an_unmetered_call_is_never_due() -> None:
    """Free output, or nothing reserved."""
    one = Meter(NEVER)
    assert one.due == NEVER
    assert one.count(1000, 1000) == 0
    assert one.due == NEVER


def test_prose_is_counted_a_few_times() -> None:
    """A reservation of 1000 tokens that is used up: some twenty counts, of some 40 bytes at the end of each."""
    texts, one, looks = Texts(), Meter(1000), 0
    while texts.kept < 6000:
        texts.keep(0, "content", 0, " word")
        if texts.kept > one.due:
            looks += 1
            if one.count(texts.kept, texts.tokens(count)):
                break
    assert texts.kept == 5 * 1001
    assert looks < 40
