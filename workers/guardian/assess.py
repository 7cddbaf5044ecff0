"""What a request may cost at most (D1), and what it will probably cost (S2-09, S2-10)."""

import msgspec

from shared.catalog import Model
from shared.core import pricing, tokens
from shared.core.translators.base import Usage
from shared.state.base import RATIO_ONE
from shared.wire.messages import Admission, Ask, Price


def assess(ask: Ask, model: Model, floor: int, epoch: int = 0, ratio: int = RATIO_ONE) -> Admission:
    """An Admission not yet reserved; `floor` is the least amount in nano-USD (S0-16), `epoch` the catalogue's, `ratio`
    the tenant's output/input ratio in millionths."""
    names = tuple({step.model for step in model.steps})
    size = tokens.size_prompt(ask.body, model.encoding, names, model.token_safety_percent)
    return _admission(ask, model, floor, size, "on", epoch, ratio)


def assess_blind(ask: Ask, model: Model, floor: int, epoch: int = 0, ratio: int = RATIO_ONE) -> Admission:
    """The same without the tokenizer: no token is shorter than a byte, and the estimate counts characters anyway.

    Used when counting fails: advice fails open, marked `degraded` (D4).
    """
    size = tokens.PromptSize(bound=len(ask.body), estimate=tokens.estimate_prompt(len(ask.body)))
    return _admission(ask, model, floor, size, "degraded", epoch, ratio)


def likely_tokens(admission: Admission, choices: int, ratio: int) -> int:
    """Input and output tokens that the request will probably use: what it takes of the rate limits."""
    output = tokens.estimate_output(admission.input_estimate, ratio, admission.output_cap)
    return admission.input_estimate + choices * output


def least_amount(admission: Admission, choices: int, floor: int) -> int:
    """The least reservation that makes sense: the prompt and one token a choice, or `floor` (S0-16)."""
    return pricing.upper_bound(admission.price, admission.input_tokens, choices, floor)


def clamp(admission: Admission, held: int, choices: int, floor: int, ratio: int) -> Admission | None:
    """The admission with its output cap lowered until its upper bound is at most `held`; None when no cap does that.

    What is held may stay a little above what the lowered cap needs: less than one token's price.
    """
    cap = pricing.affordable_cap(
        admission.price, admission.input_tokens, choices, admission.output_cap, held, floor
    )  # fmt: skip
    if cap == 0:
        return None
    estimate = admission.estimate
    if estimate >= 0:
        estimate = _estimate(admission.price, admission.input_estimate, cap, choices, ratio)
    return msgspec.structs.replace(admission, amount=held, output_cap=cap, estimate=estimate)


def _admission(
    ask: Ask, model: Model, floor: int, size: tokens.PromptSize, status: str, epoch: int, ratio: int
) -> Admission:
    cap = min(ask.max_output or model.max_output_tokens, model.max_output_tokens)
    return Admission(
        reserved=False,
        amount=pricing.upper_bound(model.price, size.bound, ask.n * cap, floor),
        estimate=_estimate(model.price, size.estimate, cap, ask.n, ratio),
        input_tokens=size.bound,
        output_cap=cap,
        price=model.price,
        status=status,
        epoch=epoch,
        prices=model.prices,
        input_estimate=size.estimate,
    )


def _estimate(price: Price, input_estimate: int, cap: int, choices: int, ratio: int) -> int:
    likely = tokens.estimate_output(input_estimate, ratio, cap)
    return pricing.cost(price, Usage(uncached=input_estimate, text_output=likely * choices))
