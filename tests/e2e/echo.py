"""An upstream that keeps what it was sent and answers with the text of the last message, word for word."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from msgspec import Struct

USAGE = {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}


class Received(Struct, frozen=True):
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> dict[str, Any]:
        """Its JSON."""
        found: dict[str, Any] = json.loads(self.raw)
        return found


class Echo:
    """The server, in threads of its own. `received` grows until `clear`."""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Without /v1."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                asked = Received(self.path, dict(self.headers.items()), raw)
                received.append(asked)
                kind, answer = _stream(asked.body) if asked.body.get("stream") else _whole(asked.body)
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's word
                """Say nothing."""

        return Handler


def text_of(body: dict[str, Any]) -> str:
    """What is echoed."""
    content = body["messages"][-1].get("content")
    return content if isinstance(content, str) else json.dumps(content)


def _whole(body: dict[str, Any]) -> tuple[str, bytes]:
    message = {"role": "assistant", "content": text_of(body)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    answer = {"id": "e", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}
    return "application/json", json.dumps({**answer, "usage": USAGE}, ensure_ascii=False).encode()


def _stream(body: dict[str, Any]) -> tuple[str, bytes]:
    top = {"id": "e", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
    choices: list[dict[str, Any]] = [
        {"index": 0, "delta": {"role": "assistant", "content": text_of(body)}, "finish_reason": None},
        {"index": 0, "delta": {}, "finish_reason": "stop"},
    ]
    events: list[dict[str, Any]] = [{**top, "choices": [choice]} for choice in choices]
    events.append({**top, "choices": [], "usage": USAGE})
    lines = [f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events]
    return "text/event-stream", ("".join(lines) + "data: [DONE]\n\n").encode()
