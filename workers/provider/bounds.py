"""How long and how much of one upstream call is waited for and held back (see exchange.py)."""

from typing import Final

#: After the last finish_reason the usage and the terminal follow at once; a server that keeps silent for so long will
#: send neither, and the client waits for its last chunk.
TAIL_S: Final = 2.0
#: Chunks without anything billed that are held back until the first token: a role chunk, filter results.
MAX_PREFIX: Final = 65_536
#: A drain goes on for so long at most. A server's socket holds 4 MiB (Linux, tcp_wmem), some 16,000 events, of which
#: one process reads 100,000 a second: of 40 such streams at once.
MAX_DRAIN_S: Final = 5.0
#: An endpoint that said nothing for so much of the time it normally has is at fault, whichever timer ended the call: a
#: request's deadline began some ms before its call, and TIMEOUT_MS is TIMEOUT_OPENAI_MS by default.
PATIENCE: Final = 0.9
#: The asker's deadline is the same as ours, and its cancel may be here first.
EARLY_S: Final = 0.5
#: A timer of the loop may come so much too early (uvloop counts whole milliseconds).
TIMER_S: Final = 0.002
