"""Scripted services on 127.0.0.1: what a model's API answers, request by request."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """`body` is bytes, or a value that is sent as JSON, or a function that writes to the socket's file itself."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Scripted:
    """The last reply is given again to whatever else is asked."""

    replies: list[Reply]
    url: str = ""
    requests: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)

    def next(self) -> Reply:
        return self.replies[min(len(self.requests), len(self.replies)) - 1]


@contextlib.contextmanager
def serve(*replies: Reply) -> Iterator[Scripted]:
    script = Scripted(list(replies))
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.send_error(404)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                script.requests.append((self.path, dict(self.headers), json.loads(body)))
                reply = script.next()
            with contextlib.suppress(OSError):  # the client may be gone
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                if callable(reply.body):
                    reply.body(self)
                    return
                data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    script.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def events(*all_events: dict[str, Any]) -> Reply:
    """Server-sent events."""
    text = "".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in all_events)
    return Reply(text.encode(), headers={"Content-Type": "text/event-stream"})


def anthropic(number: int, *blocks: dict[str, Any], stop: str = "tool_use") -> Reply:
    """A message of Anthropic's API, streamed; blocks as in its `content`."""
    usage = {"input_tokens": 100, "output_tokens": 1}
    message = {
        "id": f"msg_{number}", "type": "message", "role": "assistant", "model": "claude-sonnet-4-5", "content": [],
        "stop_reason": None, "stop_sequence": None, "usage": usage,
    }  # fmt: skip
    parts: list[dict[str, Any]] = [{"type": "message_start", "message": message}]
    for index, block in enumerate(blocks):
        if block["type"] == "text":
            empty, delta = {"type": "text", "text": ""}, {"type": "text_delta", "text": block["text"]}
        else:
            empty = block | {"input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
        parts += [
            {"type": "content_block_start", "index": index, "content_block": empty},
            {"type": "content_block_delta", "index": index, "delta": delta},
            {"type": "content_block_stop", "index": index},
        ]
    end = {"stop_reason": stop, "stop_sequence": None}
    parts += [{"type": "message_delta", "delta": end, "usage": {"output_tokens": 50}}, {"type": "message_stop"}]
    return events(*parts)


def tool_use(number: int, name: str, **given: Any) -> Reply:
    return anthropic(number, {"type": "tool_use", "id": f"toolu_{number}", "name": name, "input": given})


def responses(*items: dict[str, Any]) -> Reply:
    """A response of OpenAI's Responses API, streamed."""
    usage = {
        "input_tokens": 100, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 50,
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 150,
    }  # fmt: skip
    done = [{"type": "response.output_item.done", "output_index": i, "item": item} for i, item in enumerate(items)]
    ended = {"type": "response.completed", "response": {"id": "resp_1", "usage": usage}}
    return events({"type": "response.created", "response": {"id": "resp_1"}}, *done, ended)


def chat(content: str | None = None, *calls: tuple[str, Any], reason: str = "", **message: Any) -> Reply:
    """A chat completion; calls are (tool, arguments), which are sent as they are where they are a string."""
    said: dict[str, Any] = {"role": "assistant", "content": content, **message}
    if calls:
        texts = [(name, given if isinstance(given, str) else json.dumps(given)) for name, given in calls]
        said["tool_calls"] = [
            {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": text}}
            for i, (name, text) in enumerate(texts)
        ]
    choice = {"index": 0, "message": said, "finish_reason": reason or ("tool_calls" if calls else "stop")}
    usage = {"prompt_tokens": 1000, "completion_tokens": 200, "total_tokens": 1200}
    return Reply({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})


def slowly(part: bytes, pause_s: float, times: int, headers: bool = False) -> Callable[[BaseHTTPRequestHandler], None]:
    """A body, or headers, that trickle: `part` again and again."""
    gone = threading.Event()

    def write(handler: BaseHTTPRequestHandler) -> None:
        if not headers:
            handler.end_headers()
        else:
            handler.flush_headers()
            handler.wfile.write(b"X-Endless: ")
        for _ in range(times):
            handler.wfile.write(part)
            gone.wait(pause_s)

    return write
