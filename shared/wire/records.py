"""The second copy of the money (DESIGN 4): what each call used, and the balances now and then, in a JetStream stream.

msgpack maps and arrays as in messages.py, and the same rules for versions. One message is a UsageBatch or a part of a
BalanceSnapshot; both are stored, so a reader meets those of older builds too.
"""

from typing import Final

import msgspec
from msgspec import Struct

from shared.wire.messages import VERSION


class UsageRecord(Struct, frozen=True, array_like=True):
    """One settled call, complete in itself: whom and when to charge, how much, and what for.

    `line` is the id of the journal's line that posted it; "" = Redis did not take it, it is to be posted. `day` counts
    from 1970-01-01, `at` is shared-clock ms. `cost` is nano-USD at the prices of `epoch`. Tokens: `input_tokens` holds
    cached, written and audio ones, `output_tokens` audio ones and reasoning. `input_estimate` is what the guardian
    estimated the prompt at (S2-09). `raw`: the provider's own usage as JSON, at most 1 KiB.
    """

    tenant: str
    rid: str
    call: int
    key: str
    user: str
    day: int
    model: str
    endpoint: str
    cost: int
    estimated: bool
    line: str
    at: int
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    cache_write_5m: int = 0
    cache_write_1h: int = 0
    audio_input: int = 0
    audio_output: int = 0
    reasoning: int = 0
    input_estimate: int = 0
    epoch: int = 0
    raw: bytes = b""


class UsageBatch(Struct, frozen=True, kw_only=True, tag_field="kind", tag="usage"):
    """Records of one process. `instance` and `number` name the batch: one that comes twice is counted once. `at` is
    when it was published, shared-clock ms. `late`: published anew by a guardian that posted them; the same record may
    stand in several of those, and each is counted once."""

    v: int = VERSION
    instance: str
    number: int
    at: int
    records: tuple[UsageRecord, ...]
    late: bool = False


class BalanceSnapshot(Struct, frozen=True, kw_only=True, tag_field="kind", tag="snap"):
    """All fields of a tenant's balances as the journal's line `line` holds them, in `parts` messages: `part` from 0."""

    v: int = VERSION
    tenant: str
    line: str
    at: int
    part: int
    parts: int
    fields: dict[str, str]


Stored = UsageBatch | BalanceSnapshot

decode_stored: Final = msgspec.msgpack.Decoder(UsageBatch | BalanceSnapshot).decode
