"""Provider dialects: what to send to an upstream and what its answer meant. Pure: workers/provider carries.

base.py      the interface: Dialect (one per provider kind), Translator (one per upstream call), Usage, Failure
registry.py  provider kind -> Dialect
failures.py  an upstream's error status or error object -> our errors, bounded and scrubbed
openai.py    the OpenAI chat wire format (any compatible server), to the OpenAI chat surface
usage.py     an OpenAI `usage` object -> Usage, or None when it cannot be believed
"""
