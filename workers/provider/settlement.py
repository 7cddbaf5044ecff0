"""What a call is charged: by the provider's usage when it ended well, else at no less than its bill (I1). Pure.

    ended well, usable usage                     exactly that, at the price of the endpoint that served it (marked
                                                 `estimated` when its parts contradicted one another)
    a drain brought the usage (it finished)      exactly that
    ended well without usable usage              counted: prompt by the published formula, output over the text
    nothing sent, or refused with a status       0
    cut, all the upstream wrote was read         counted
    cut, not all was read (TLS, reset, drain     counted + ALLOWANCE a choice, at most up to the cap, if it was kept to
      over)
    a 200 that could not be read, or a whole     prompt counted + the whole output cap: what was generated is unknown,
      answer that came in part                   but of an answer that came in part no more tokens than the bytes its
                                                 head announced (an error in its place says nothing by its size)

A count of the provider's own that came on the way is no bill, but no bill is below it: it stands for the prompt, and
for the output where that is more than we counted.
Images of a prompt that is counted cost what the published rule says at most, audio and files a token a byte.
All that is counted adds what a reasoning model may have billed and not shown in the time it ran, up to the cap.
All but the first two are marked `estimated`. A piece of text counts as the larger of its tokens and its deltas: a
server that sends a token at a time may cut where a tokenizer would not.
"""

from typing import Final

import msgspec
from msgspec import Struct

from shared.core import money, pricing, quality, tokens
from shared.core.head import guardian_head
from shared.core.translators.base import Translator, Usage
from shared.core.translators.usage import keep
from shared.wire import headers
from shared.wire.messages import Admission, Ask, Call, Step
from workers.provider.ended import Ended

#: Tokens a choice may have been ahead of what we read when the connection was cut: at 100 tokens a second a third of a
#: second, more than a round trip and the time a provider takes to notice.
ALLOWANCE: Final = 32

_json: Final = msgspec.json.Encoder().encode


class Charge(Struct, frozen=True):
    """What one call is settled at, nano-USD, and what is behind it; `raw` is the provider's own usage, as JSON."""

    cost: int
    usage: Usage = Usage()
    estimated: bool = False
    raw: bytes = b""


FREE: Final = Charge(0)


def charge(
    ask: Ask, admission: Admission, step: Step, translator: Translator, ended: Ended, encoding: tokens.Encoding,
    hidden: int = 0,
) -> Charge:  # fmt: skip
    """See the table above. `hidden`: tokens a choice may have been billed for and not shown (reasoning)."""
    if not ended.billed:
        return FREE
    price, raw = pricing.price_of(admission, step), keep(translator.usage_sent)
    usage = translator.usage
    if usage is not None and translator.finished and (usage.output_tokens or not translator.texts()):
        return Charge(pricing.cost(price, usage), usage, usage.doubtful, raw)
    shown = _output(ask, admission, translator, ended, encoding)
    output = max(shown, min(shown + hidden * ask.n, admission.output_cap * ask.n))
    if usage is not None and not translator.finished:
        counted = msgspec.structs.replace(usage, text_output=output - usage.audio_output)
    else:
        prompt, opaque = tokens.cover_prompt(ask.body, encoding, step.model)
        counted = Usage(uncached=prompt, text_output=output, audio_input=opaque)
    return Charge(pricing.cost(price, counted), counted, estimated=True, raw=raw)


def _output(ask: Ask, admission: Admission, translator: Translator, ended: Ended, encoding: tokens.Encoding) -> int:
    counted = translator.uncounted() + sum(
        max(tokens.count_text(text, encoding), deltas) for text, deltas in translator.texts()
    )
    if ended.error is None:
        return counted
    if translator.usage is not None and not translator.finished:
        counted = max(counted, translator.usage.output_tokens)
    cap = admission.output_cap * ask.n
    if not ended.readable:
        return max(counted, min(cap, ended.size) if ended.size else cap)
    if not ended.complete and not translator.finished:
        more = counted + ALLOWANCE * ask.n
        return more if counted > cap else max(counted, min(more, cap))
    return counted


def efficiency(message: Call, translator: Translator, paid: Charge) -> float:
    """D13, of an answer that ended well: its quality, and what the cheapest endpoint of the Plan would have cost."""
    admission = message.admission
    share = 1.0
    if admission.prices:
        prices = (pricing.price_of(admission, step) for step in message.plan.steps)
        share = pricing.cheapest_share(prices, paid.usage, paid.cost)
    return quality.efficiency(quality.quality(translator.spoken(), quality.format_of(message.ask.body)), share)


def head(
    admission: Admission, step: Step | None, call: int, actual: int | None = None, efficiency: float = 0.0
) -> dict[str, str]:
    """The X-BR headers; `actual` (nano-USD) and `efficiency` on whole answers, where they are known before the head
    goes (D11)."""
    found = {**guardian_head(admission), headers.BR_CALLS: str(call)}
    if step is not None:
        found[headers.BR_ENDPOINT] = step.endpoint
    if actual is not None:
        found[headers.BR_ACTUAL_COST] = money.show_usd(actual)
        found[headers.BR_EFFICIENCY] = f"{efficiency:.2f}"
    return found


class _Tokens(Struct):
    input_tokens: int
    cached_tokens: int
    output_tokens: int


class _Payload(Struct, omit_defaults=True):
    request_id: str
    guardian: str
    estimated_cost: str | None  # none in mode `off`
    actual_cost: str
    actual_cost_nano_usd: int
    efficiency: float
    overhead_ms: float
    endpoint: str
    model: str
    calls: int
    usage: _Tokens
    estimated: bool
    cut: str = ""


def payload(
    ask: Ask, admission: Admission, step: Step, call: int, paid: Charge, efficiency: float, cut: str = ""
) -> bytes:
    """The JSON of D5; `cut`: why the stream was ended before its provider ended it."""
    return _json(
        _Payload(
            ask.rid,
            admission.status,
            None if admission.estimate < 0 else money.show_usd(admission.estimate),
            money.show_usd(paid.cost),
            paid.cost,
            efficiency,
            round(admission.overhead_us / 1000, 1),
            step.endpoint,
            step.model,
            call,
            _Tokens(paid.usage.input_tokens, paid.usage.cache_read, paid.usage.output_tokens),
            paid.estimated,
            cut,
        )
    )
