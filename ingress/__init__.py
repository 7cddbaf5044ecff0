"""The ingress: HTTP in, one message out, frames back. It holds no fact that another process needs.

The path of a request, in the order of the files:

    protocol    aiohttp's connection, with our refusals, header timer and connection bound
    middleware  the door: request id, in-flight bound, error shape, metrics
    chat        auth -> content type and size -> one strict parse -> validate -> hand over
    deliver     the exchange: the request's state machine (shared/core/stream.py) between bus and client
    replies     frames in; credit, cancel and liveness out
    render      bytes for the client: heads, SSE, errors
    sinks       where an answer goes: collected whole, or streamed as it comes

Beside it: models, health, observe (metrics targets and traces), auth, wheel (timers), app (routes, listening, drain).
"""
