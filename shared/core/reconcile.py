"""What a provider's bill means for a call of ours: the decision of `hotpath reconcile`, pure.

right        posted at what the bill says
estimated    was cut, and posted at what we counted
wrong        posted at something else
unconfirmed  its worker died, or its lease ran out: nothing is posted yet
bound        the same, posted at its upper bound since
unbooked     the request is ours, this call of it was never posted: it was voided, or lost with Redis
running      it is under way: its own settlement will say
later        its entry began anew, and knows nothing of this call: it is forgotten within minutes
unknown      no tenant's books know the request
"""

from typing import Final, Literal

from msgspec import Struct

from shared.core.transitions import HOLDING, State

Kind = Literal[
    "right", "estimated", "wrong", "unconfirmed", "bound", "unbooked", "running", "later", "trimmed", "unknown"
]
#: correct: put right by ledger.correct; settle: posted as its own, since nothing is known of it any more.
Action = Literal["", "correct", "settle"]

KINDS: Final[tuple[Kind, ...]] = (
    "right", "estimated", "wrong", "unconfirmed", "bound", "unbooked", "running", "later", "trimmed",
    "unknown",
)  # fmt: skip


class Known(Struct, frozen=True, kw_only=True):
    """What the books say of a call, in nano-USD.

    State none: only its request is known. `entry`: the ledger remembers the request itself, not the journal alone;
    `fresh`: it does, of a later life that does not know the call, or not all that was posted for it; `running`: it is
    dispatched or reserved, and its lease is not over."""

    state: State
    posted: int = 0
    held: int = 0
    estimated: bool = False
    entry: bool = True
    running: bool = False
    fresh: bool = False
    key: str = ""
    user: str = ""
    day: int = 0


class Decision(Struct, frozen=True):
    """What is to be done, and by how much the books change (the bill less what is posted)."""

    kind: Kind
    difference: int = 0
    action: Action = ""


RIGHT: Final = Decision("right")


def decide(known: Known | None, cost: int) -> Decision:
    """For a call that costs so much by the bill."""
    if known is None:
        return Decision("unknown", cost)
    if known.fresh or known.running:
        return Decision("later" if known.fresh else "running")
    if known.state in HOLDING:
        return Decision("unconfirmed", cost, "correct")
    if known.state in {"settled", "posted"}:
        return _posted(known, cost)
    if cost == 0:
        return RIGHT
    return Decision("unbooked", cost, "correct" if known.entry else "settle")


def _posted(known: Known, cost: int) -> Decision:
    if known.state == "posted":
        return Decision("bound", cost - known.posted, "correct")
    if known.posted == cost and not (known.estimated and known.entry):
        return RIGHT  # an estimate that was right, of a call that is forgotten: no mark of it stands any more
    return Decision("estimated" if known.estimated else "wrong", cost - known.posted, "correct")
