"""An OpenAI-compatible server on 127.0.0.1 that answers, and on request fails, stalls and lies."""

import contextlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What a server may do in place of an answer; `length` and `none` are answers that are of no use.
FAULTS = ("429", "500", "stall", "drip", "cut", "half", "html", "empty", "error", "null")


class Server(ThreadingHTTPServer):
    """answer: (the request's body) -> the completion's text; fault: (body, attempt) -> one of FAULTS, "length", "none", a
    status as "400", or "".
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer, fault=lambda body, attempt: ""):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.fault = answer, fault
        self.attempts: Counter = Counter()  # of each request, by its body
        self.served, self.under_way, self.most, self.keys = 0, 0, 0, set()
        self.lock, self.over = threading.Lock(), threading.Event()

    def handle_error(self, request, client_address):
        """A client that is killed, or has what it wants, closes its connections."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Silent."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, text = self.server, json.dumps(body, sort_keys=True)
        with server.lock:
            attempt = server.attempts[text]
            server.attempts[text] += 1
            server.under_way += 1
            server.most = max(server.most, server.under_way)
            server.keys.add(self.headers.get("Authorization", ""))
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._answer(body, server.fault(body, attempt))
        finally:
            with server.lock:
                server.under_way -= 1

    def _answer(self, body, fault):
        finish, content = ("length" if fault == "length" else "stop"), self.server.answer(body)
        message = {"role": "assistant", "content": None if fault == "none" else content}
        choices = [] if fault == "empty" else [{"index": 0, "message": message, "finish_reason": finish}]
        whole = {"id": "x", "object": "chat.completion", "choices": choices, "usage": {"completion_tokens": len(content)}}
        if fault == "error":
            whole = {"error": {"message": "the model has fallen asleep"}}
        elif fault == "null":
            choices[0]["message"] = None
        data = json.dumps(whole).encode()
        if fault == "stall":
            self.server.over.wait(20)
            self.close_connection = True
        elif fault.isdigit():
            self._send(int(fault), b'{"error": {"message": "not now"}}', {"Retry-After": "0.1"} if fault == "429" else {})
        elif fault == "html":
            self._send(200, b"<html>welcome</html>", {"Content-Type": "text/html"})
        elif fault == "half":
            self._send(200, data[: len(data) // 2])
        elif fault in ("cut", "drip"):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            for i in range(0, len(data) if fault == "drip" else 1, 1):
                self.wfile.write(data[i : i + 1])
                self.wfile.flush()
                if fault == "drip" and self.server.over.wait(0.05):
                    break
            self.close_connection = True
        else:
            with self.server.lock:
                self.server.served += 1
            self._send(200, data)

    def _send(self, status, data, headers=None):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def serving(answer, fault=lambda body, attempt: ""):
    """A server that runs during the block."""
    server = Server(answer, fault)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
