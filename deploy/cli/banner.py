"""What `hotpath up` prints when everything is ready; every line of it works as pasted (a test pastes them).

The demo key is shown, since it was just made up; a key that the environment gave is named only (I9).
"""

import json
import shlex
from typing import Final

from deploy.cli.fleet import Plan
from deploy.cli.http import get

DEMO: Final = "sim-fast"
VARIABLE: Final = "GATEWAY_API_KEY"

_TEXT: Final = """
Hotpath is ready on {url}    (Ctrl-C drains and stops everything; details: {run})
The admin API is on {admin}    (its key: ADMIN_API_KEY in {secrets}; what it has: /openapi.json)

  {label}   {key}

  {curl}

  {imports}
  client = OpenAI(base_url="{url}/v1", api_key={python_key})
  messages = [{{"role": "user", "content": "Hello"}}]
  for chunk in client.chat.completions.create(model={model}, messages=messages, stream=True):
      print(chunk.choices[0].delta.content or "" if chunk.choices else "", end="", flush=True)
"""


async def text(plan: Plan) -> str:
    """The banner, with a model that this gateway really serves."""
    _, answer = await get(plan.url, "/v1/models", plan.api_key)
    try:
        names = [model["id"] for model in json.loads(answer)["data"]]
    except (ValueError, KeyError, TypeError):
        names = []
    model = DEMO if DEMO in names or not names else names[0]
    given = plan.api_key_given
    key = f"${VARIABLE}" if given else plan.api_key
    return _TEXT.format(
        url=plan.url,
        label="your key" if given else "demo key",
        key=key,
        run=plan.data / "run.json",
        admin=plan.admin_url,
        secrets="the environment" if plan.admin_key_given else plan.data / "secrets.env",
        model=json.dumps(model),
        curl=curl(plan.url, key, model),
        imports="import os; from openai import OpenAI" if given else "from openai import OpenAI",
        python_key=f'os.environ["{VARIABLE}"]' if given else json.dumps(key),
    )


def curl(url: str, key: str, model: str) -> str:
    """One line for any POSIX shell."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    headers = f'-H "Authorization: Bearer {key}" -H "Content-Type: application/json"'
    return f"curl -sS {url}/v1/chat/completions {headers} -d {shlex.quote(body)}"
