"""What a request may cost at most (D1), and what it will probably cost (S2-09, S2-10)."""

from shared.catalog import Model
from shared.core import pricing, tokens
from shared.core.translators.base import Usage
from shared.wire.messages import Admission, Ask


def assess(ask: Ask, model: Model, floor: int, epoch: int = 0) -> Admission:
    """An Admission not yet reserved; `floor` is the least amount in nano-USD (S0-16), `epoch` the catalogue's."""
    names = tuple({step.model for step in model.steps})
    size = tokens.size_prompt(ask.body, model.encoding, names, model.token_safety_percent)
    return _admission(ask, model, floor, size, "on", epoch)


def assess_blind(ask: Ask, model: Model, floor: int, epoch: int = 0) -> Admission:
    """The same without the tokenizer: no token is shorter than a byte, and the estimate counts characters anyway.

    Used when counting fails: advice fails open, marked `degraded` (D4).
    """
    size = tokens.PromptSize(bound=len(ask.body), estimate=tokens.estimate_prompt(len(ask.body)))
    return _admission(ask, model, floor, size, "degraded", epoch)


def _admission(ask: Ask, model: Model, floor: int, size: tokens.PromptSize, status: str, epoch: int) -> Admission:
    cap = min(ask.max_output or model.max_output_tokens, model.max_output_tokens)
    likely = min(size.estimate, cap)  # the default output ratio of 1.0 (S2-10); learned per tenant later
    return Admission(
        reserved=False,
        amount=pricing.upper_bound(model.price, size.bound, ask.n * cap, floor),
        estimate=pricing.cost(model.price, Usage(uncached=size.estimate, text_output=likely * ask.n)),
        input_tokens=size.bound,
        output_cap=cap,
        price=model.price,
        status=status,
        epoch=epoch,
        prices=model.prices,
        input_estimate=size.estimate,
    )
