"""A stand-in for an OpenAI-compatible endpoint on the loopback address, which answers as a test says."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """One answer of the endpoint."""

    body: str
    status: int = 200
    kind: str = "application/json"
    headers: dict[str, str] = {}  # noqa: RUF012 (never changed)


def verdict(text: Any, finish: str = "stop") -> Reply:
    """Return a chat completion that says ``text`` and took 10 tokens in and 3 out."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
    content = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return Reply(json.dumps(content))


class JudgeServer:
    """Answers every request by ``answer(request)``, after ``delay`` seconds; remembers what was sent."""

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any]], Reply] = lambda request: verdict("Score: 7")
        self.delay = 0.0
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.now = self.most = 0
        """Requests in work, and the most that there were."""
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def texts(self) -> list[str]:
        """What the judge was asked, in the order of the requests."""
        return [request["messages"][-1]["content"] for request in self.requests]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with server._lock:
                    server.requests.append({**request, "path": self.path})
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    server.now += 1
                    server.most = max(server.most, server.now)
                try:
                    time.sleep(server.delay)
                    reply = server.answer(request)
                finally:
                    with server._lock:
                        server.now -= 1
                body = reply.body.encode()
                self.send_response(reply.status)
                self.send_header("content-type", reply.kind)
                self.send_header("content-length", str(len(body)))
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):  # the client has gone: a time limit, or an interruption
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler
