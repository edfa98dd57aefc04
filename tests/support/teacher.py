"""An OpenAI-compatible server on 127.0.0.1 that misbehaves as servers do, by a script."""

import json
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-very-secret-0123456789"


def fused_caption(row):
    return f"  The fused caption of {row}. "


class Teacher(ThreadingHTTPServer):
    """`script(row, number of the try)` -> what happens: see Handler.play. Counts what it sees.

    `row_of` finds the row in what is asked, `says` is the good answer to it. No answer before `gather` requests have been in flight at once.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, script=lambda row, number: "good", row_of=lambda text: text.split()[-1], says=fused_caption):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.row_of, self.says = script, row_of, says
        self.lock, self.closed, self.gather = threading.Condition(), threading.Event(), 1
        self.tries, self.in_flight, self.most, self.bodies, self.times = Counter(), 0, 0, [], []
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the play."""

    def close(self):
        self.closed.set()
        self.shutdown()
        self.server_close()
        self.thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send(self, status, body, headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(data)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        row = server.row_of(text)
        with server.lock:
            server.tries[row] += 1
            server.in_flight += 1
            server.most = max(server.most, server.in_flight)
            server.bodies.append(body)
            server.times.append(time.monotonic())
            act = server.script(row, server.tries[row])
            server.lock.notify_all()
        time.sleep(0.01)
        with server.lock:  # before the answer: the client may send its next request as soon as it has it
            server.lock.wait_for(lambda: server.most >= server.gather, timeout=20)
            server.in_flight -= 1
        self.play(act, row, body)

    def play(self, act, row, body):
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            given = self.headers.get("Authorization")
            return self.send(401, {"error": {"message": f"Incorrect API key provided: {given}"}})
        answer = answer_for(self.server.says(row), "messages" in body)
        if act == "good":
            self.send(200, answer)
        elif isinstance(act, dict):  # the good answer with other parts
            self.send(200, answer | act)
        elif isinstance(act, bytes):
            self.send(200, act)
        elif isinstance(act, tuple):
            self.send(act[0], {"error": {"message": f"no, {KEY}", "code": act[2] if len(act) > 2 else None}}, act[1])
        elif isinstance(act, int):
            self.send(act, {"error": {"message": "bad"}})
        elif act == "slow":  # until long after the client gave up
            self.server.closed.wait()
            self.close_connection = True
        elif act == "truncated":  # the connection ends inside the body
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode()[:20])
            self.close_connection = True
        elif act == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True


def answer_for(said, chat=True):
    part = {"message": {"role": "assistant", "content": said}} if chat else {"text": said}
    return {"choices": [part | {"finish_reason": "stop"}], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
