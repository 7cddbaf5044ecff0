"""The provider worker: walks a request's Plan, streams the answer back, settles what was used.

call.py        takes requests from its subject: in, or refused
walk.py        one request: dispatch, the calls of its Plan, settle, the terminal
account.py     its money in the ledger: dispatch, extend, top-up, settle
order.py       which step of the Plan is next (pure)
exchange.py    one upstream call: bytes -> events -> translator -> frames; its timers; cancel and drain
reading.py     how the body of its answer is read, and what its end says (pure)
metering.py    a stream that passes what is reserved: more is asked for, or it is cut
upstream.py    HTTP/1.1 over asyncio: connections, pooled per endpoint
address.py     where a name may lead
settlement.py  what a call is charged (pure), and the payload of D5
posting.py     the road of a settlement
mux.py         frames back to the askers, credit windows
control.py     cancel, credit, askers that fell silent
gate.py        circuits: whether an endpoint may be called, the claim of a probe
usage.py       what calls used, into the second copy: batches, and the road of what Redis did not take
outcomes.py    how calls ended, for the breakers
"""
