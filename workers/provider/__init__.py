"""The provider worker: walks a request's Plan, streams the answer back, settles what was used.

call.py        takes requests from its subject: in, or refused
walk.py        one request: dispatch, the calls of its Plan, settle, the terminal
order.py       which step of the Plan is next (pure)
exchange.py    one upstream call: bytes -> events -> translator -> frames; its timers; cancel and drain
upstream.py    HTTP/1.1 over asyncio: connections, pooled per endpoint
address.py     where a name may lead
settlement.py  what a call is charged (pure), and the payload of D5
mux.py         frames back to the askers, credit windows
control.py     cancel, credit, askers that fell silent
gate.py        circuits: whether an endpoint may be called, the claim of a probe
outcomes.py    how calls ended, for the breakers
"""
