"""The guardian decides whether a request may run and what it may cost.

`admit.py` consumes requests: `envelope.py` checks what a direct publisher sent, `assess.py` bounds the cost, one Lua
call reserves it, and the request goes on to routing. Beside that `learn.py` reads the usage stream, and `sweep.py`
looks after leases and snapshots.
"""
