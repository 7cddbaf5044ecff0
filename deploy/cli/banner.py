"""What `hotpath up` prints when everything is ready; every line of it works as pasted (a test pastes them)."""

import asyncio
import json
from typing import Final
from urllib.parse import urlsplit

from deploy.cli.fleet import Plan

TIMEOUT_S: Final = 2.0
MAX_ANSWER: Final = 1024 * 1024  # bytes
DEMO: Final = "sim-fast"

_TEXT: Final = """
Hotpath is ready on {url}    (Ctrl-C drains and stops everything; details: {run})

  demo key   {key}

  curl -sS {url}/v1/chat/completions -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' -d '{body}'

  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="{key}")
  messages = [{{"role": "user", "content": "Hello"}}]
  for chunk in client.chat.completions.create(model="{model}", messages=messages, stream=True):
      print(chunk.choices[0].delta.content or "" if chunk.choices else "", end="", flush=True)
"""


async def get(url: str, path: str, key: str = "") -> tuple[int, bytes]:
    """One small GET without a client library: (status, body); (0, b"") when there is no answer."""
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            try:
                authorization = f"Authorization: Bearer {key}\r\n" if key else ""
                head = f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{authorization}Connection: close\r\n\r\n"
                writer.write(head.encode("ascii"))
                head_bytes, _, body = (await reader.read(MAX_ANSWER)).partition(b"\r\n\r\n")
                while not reader.at_eof() and len(body) < MAX_ANSWER:
                    body += await reader.read(MAX_ANSWER)
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return 0, b""
    words = head_bytes.split(b" ", 2)
    return (int(words[1]) if len(words) > 1 and words[1].isdigit() else 0), body


async def text(plan: Plan) -> str:
    """The banner, with a model that this gateway really serves."""
    _, answer = await get(plan.url, "/v1/models", plan.api_key)
    try:
        names = [model["id"] for model in json.loads(answer)["data"]]
    except (ValueError, KeyError, TypeError):
        names = []
    model = DEMO if DEMO in names or not names else names[0]
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    return _TEXT.format(
        url=plan.url, key=plan.api_key, run=plan.data / "run.json", model=model, body=body.replace("'", "'\\''")
    )
