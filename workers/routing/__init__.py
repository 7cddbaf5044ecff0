"""Routing decides which endpoints a request may call, and in which order.

`route.py` consumes requests and makes the Plan from the catalogue and the circuits; `learn.py` consumes how upstream
calls ended and moves the circuits.
"""
