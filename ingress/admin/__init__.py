"""The admin API: tenants, keys, budgets, spend and ledger entries over HTTP, on a port of its own (ADMIN_HOST,
ADMIN_PORT) and for ADMIN_API_KEY only; there is no way to switch that off.

    operations  what there is: path, query, body, answer, statuses; router and openapi are made from this one table
    resources   what each does, by shared/state/operations.py, as `hotpath keys|tenant|budget|spend` does
    router      finds the operation, checks credential, query and body, turns what it raises into an answer
    openapi     the OpenAPI 3.1 file, served at /openapi.json and kept as openapi.json
    server      the port

It stands on the front door's own connections (ingress/protocol.py, ingress/middleware.py) rather than on a second
aiohttp Application: those have the timers, the bounds and the error shape, and echo nothing of what they refuse.
"""
