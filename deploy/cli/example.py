"""deploy/env.example: every setting, from the settings themselves (`hotpath env --example`; a test compares)."""

from typing import Final

from shared.settings import describe

_HEAD: Final = """\
# Every setting of Hotpath with its default. Generated: hotpath env --example > deploy/env.example
# `hotpath up` needs none of them; `hotpath env` writes those a Procfile runner needs. Times are milliseconds.
"""

#: What is not a setting of the processes, but read by the command line or named by the catalogue.
_BESIDE: Final = (
    ("OPENAI_API_KEY", "The provider's key that deploy/catalog.toml names; set, `hotpath up` starts no simulator."),
    ("NATS_URL_LOADGEN", "Your own NATS as the user of direct publishers, for run.json; empty = NATS_URL."),
    ("SIMULATOR_PORT", "Where deploy/Procfile.dev runs the simulator."),
)


def text() -> str:
    """The file's content. A required one stands without a value, one with a default is commented out."""
    parts = [_HEAD]
    for name, default, what, secret in describe():
        more = " Secret, at least 32 characters, no default." if secret else ""
        line = f"{name}=" if default is None else f"#{name}={default}"
        parts.append(f"# {what}{more}\n{line}\n")
    parts.extend(f"# {what}\n#{name}=\n" for name, what in _BESIDE)
    return "\n".join(parts)
