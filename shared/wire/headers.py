"""HTTP header names, defined once (S2-23, S1-H1, S1-G03, D5, D15)."""

from typing import Final

REQUEST_ID: Final = "X-Request-ID"  # the client's label, echoed (S1-H1); on the upstream side <rid>.<call>
TIMEOUT_MS: Final = "X-Timeout-Ms"  # S1-G03, clamped
MAX_ESTIMATE: Final = "X-BR-Max-Estimated-Cost"  # S2-12: USD such as 0.05; in mode `active` dearer advice is 402
DONE_PAYLOAD: Final = "X-BR-Done-Payload"  # D5: inline (default) | append | comment

BR_PREFIX: Final = "X-BR-"  # what all of ours begin with
BR_REQUEST_ID: Final = "X-BR-Request-Id"  # our own id: of the money, the frames and `hotpath trace`
BR_GUARDIAN_STATUS: Final = "X-BR-Guardian-Status"  # on | degraded | off
BR_ESTIMATED_COST: Final = "X-BR-Estimated-Cost"  # $0.03 (D12)
BR_ACTUAL_COST: Final = "X-BR-Actual-Cost"  # whole answers only (D11)
BR_EFFICIENCY: Final = "X-BR-Efficiency"  # 0.87 (D13); whole answers only (D11)
BR_GUARDIAN_OVERHEAD: Final = "X-BR-Guardian-Overhead-Ms"
BR_ENDPOINT: Final = "X-BR-Endpoint"  # S2-34: which endpoint answered
BR_CALLS: Final = "X-BR-Calls"  # how many upstream calls it took

BR_CLAMPED: Final = "X-BR-Max-Tokens-Clamped"  # the output cap a choice, where the budget lowered it

#: Rate limits as OpenAI tells them: limit, what is left, and how long until it is full again; by kind.
RATE_LIMITS: Final = {
    kind: (f"x-ratelimit-limit-{kind}", f"x-ratelimit-remaining-{kind}", f"x-ratelimit-reset-{kind}")
    for kind in ("requests", "tokens")
}
SHOULD_RETRY: Final = "x-should-retry"  # "false": what OpenAI's SDKs obey, where trying again can never help
#: What a worker may send to a client besides X-BR headers.
PASSED: Final = frozenset({*RATE_LIMITS["requests"], *RATE_LIMITS["tokens"], SHOULD_RETRY})

RETRY_AFTER: Final = "Retry-After"  # whole seconds, at least 1 (D15)
RETRY_AFTER_MS: Final = "retry-after-ms"  # the exact wait (D15)
