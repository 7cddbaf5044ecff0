"""A stand-in for a provider: speaks OpenAI's chat completions, says what it was told to, and keeps its own bill.

    words.py    the text: one o200k token per content chunk, chosen by seed
    wanted.py   a request, checked as the real server checks it, and what its prompt dictates (`[[sim chunks=60]]`)
    answer.py   the answer: pieces of text or tool calls per choice, as stream events or as one body
    bill.py     prices, the prompt's tokens, and the bill: what was really written to the socket
    faults.py   scripted misbehaviour: which request it strikes, and what happens then
    player.py   writes an answer to the socket, at its pace and with its fault, and counts
    control.py  what a test sees and scripts: /_sim/*
    server.py   the application: /v1, and the same again under /e/<endpoint>

It imports nothing of the gateway: the two keep separate books, so that a mistake in one shows against the other.
"""
