"""A server that runs, and a client that means it harm: what `soak.py` and the tests send.

The client speaks over plain sockets, because well-behaved ones do not send what is here.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WAIT_SECONDS = 120


class Served:
    """A `tvm-sparse serve` in a process of its own, on a port that the system chooses."""

    def __init__(self, library: Path | str, *options: str, python: str = sys.executable) -> None:
        command = [python, "-m", "tvm_sparse", "serve", str(library), "--port", "0", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self._is_up = threading.Event()
        self.port = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._is_up.wait(WAIT_SECONDS) or not self.port:
            self.process.kill()
            raise RuntimeError(f"the server did not start: {''.join(self.lines)}")
        self._wait_until_ready()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            found = re.search(r"running on http://[^ ]*:(\d+)", line)
            if found:
                self.port = int(found[1])
                self._is_up.set()
        self._is_up.set()

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < until:
            reply = exchange(self.port, request_text("GET", "/v2/health/ready"))
            if reply is not None and reply.status == 200:
                return
            time.sleep(0.05)
        self.process.kill()
        raise RuntimeError(f"the server did not get ready: {''.join(self.lines)}")

    @property
    def resident_bytes(self) -> int:
        """What the process keeps in memory."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0]) << 10

    def stop(self) -> int:
        """End the server as an orchestrator does, and return its exit code."""
        self.process.terminate()
        code = self.process.wait(WAIT_SECONDS)
        self._reader.join(WAIT_SECONDS)
        return code

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True)
class Reply:
    """What came back: the status, the headers in lower case, and the body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def data(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


def request_text(
    method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> bytes:
    """Write a request as it goes over the wire."""
    lines = {"Host": "server", "Content-Length": str(len(body)), "Connection": "close"}
    if body:
        lines["Content-Type"] = "application/json"
    lines.update(headers or {})
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body


def exchange(port: int, *pieces: bytes, pause: float = 0.0, then: str = "read") -> Reply | None:
    """Send pieces, and read the answer; None where the server just closed the connection.

    `then` may also be "close": go away without reading.
    """
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT_SECONDS) as link:
            try:
                for number, piece in enumerate(pieces):
                    if number and pause:
                        time.sleep(pause)
                    link.sendall(piece)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it may have answered before it closed
            return None if then == "close" else _read_reply(link)
    except (ConnectionResetError, ConnectionRefusedError):
        return None


def _read_reply(link: socket.socket) -> Reply | None:
    data = b""
    try:
        while chunk := link.recv(1 << 16):
            data += chunk
            head, is_whole, rest = data.partition(b"\r\n\r\n")
            length = _length(head)
            if is_whole and length is not None and len(rest) >= length:
                break
    except (ConnectionResetError, BrokenPipeError):
        pass
    head, is_whole, rest = data.partition(b"\r\n\r\n")
    if not is_whole:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return Reply(int(first.split()[1]), headers, rest)


def _length(head: bytes) -> int | None:
    """How long a body is; None where it ends with the connection."""
    found = re.search(rb"(?i)\ncontent-length: *(\d+)", head)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class Target:
    """A served model with one input in FP32, whose first size is free."""

    port: int
    path: str
    input: str
    width: int

    def body(self, x: np.ndarray, **more: Any) -> bytes:
        """Write a right request in JSON."""
        return json.dumps({"inputs": [self.entry(x)], **more}).encode()

    def entry(self, x: np.ndarray) -> dict[str, Any]:
        """Describe the input in JSON."""
        shape = list(x.shape)
        return {"name": self.input, "shape": shape, "datatype": "FP32", "data": x.ravel().tolist()}

    def ask(self, x: np.ndarray) -> Reply | None:
        """Send a right request, its input and its outputs in binary."""
        raw = np.ascontiguousarray(x, "<f4").tobytes()
        entry = {**self.entry(x), "parameters": {"binary_data_size": len(raw)}}
        del entry["data"]
        wish = {"inputs": [entry], "parameters": {"binary_data_output": True}}
        head = json.dumps(wish).encode()
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(len(head)),
        }
        return exchange(self.port, request_text("POST", self.path, head + raw, headers))


def binary_outputs(reply: Reply) -> list[bytes]:
    """Take the tensors of an answer in binary apart."""
    length = int(reply.headers["inference-header-content-length"])
    rest = reply.body[length:]
    parts = []
    for output in json.loads(reply.body[:length])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        parts.append(rest[:size])
        rest = rest[size:]
    return parts


# What an attack may end in: an answer with one of these, or none where the connection is closed.
Attack = Callable[[Target, random.Random], "Reply | None"]


def _post(target: Target, body: bytes, **headers: Any) -> Reply | None:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return exchange(target.port, request_text("POST", target.path, body, named))


def _with(target: Target, **fields: Any) -> Reply | None:
    entry = {**target.entry(np.ones((1, target.width), np.float32)), **fields}
    kept = {key: value for key, value in entry.items() if value is not None}
    return _post(target, json.dumps({"inputs": [kept]}).encode())


def _ones(target: Target) -> bytes:
    return target.body(np.ones((1, target.width), np.float32))


def _truncated(target: Target, chance: random.Random) -> Reply | None:
    text = request_text("POST", target.path, _ones(target))
    return exchange(target.port, text[: chance.randrange(1, len(text))], then="close")


def _declared(target: Target, length: str) -> Reply | None:
    return _post(target, _ones(target), Content_Length=length)


def _chunked(target: Target, chunks: Sequence[bytes]) -> Reply | None:
    head = request_text(
        "POST",
        target.path,
        headers={
            "Content-Length": None,  # type: ignore[dict-item]
            "Transfer-Encoding": "chunked",
            "Content-Type": "application/json",
        },
    )
    return exchange(target.port, head, *chunks)


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def _flipped(target: Target, chance: random.Random) -> Reply | None:
    body = bytearray(_ones(target))
    for _ in range(chance.randrange(1, 6)):
        body[chance.randrange(len(body))] = chance.randrange(256)
    return _post(target, bytes(body))


def _noise(target: Target, chance: random.Random) -> Reply | None:
    return _post(target, chance.randbytes(chance.randrange(1, 2000)))


def _noise_for_http(target: Target, chance: random.Random) -> Reply | None:
    return exchange(target.port, chance.randbytes(chance.randrange(1, 500)) + b"\r\n\r\n")


def _split_header(target: Target, length: str) -> Reply | None:
    return _post(target, _ones(target), Inference_Header_Content_Length=length)


# Name -> what is sent, and the statuses that are right; 0 stands for a connection that is closed.
ATTACKS: dict[str, tuple[Attack, frozenset[int]]] = {
    "cut off": (_truncated, frozenset({0})),
    "noise": (_noise, frozenset({400})),
    "noise instead of HTTP": (_noise_for_http, frozenset({0, 400})),
    "changed bytes": (_flipped, frozenset({200, 400})),
    "no body": (lambda t, _: _post(t, b""), frozenset({400})),
    "length that is no number": (lambda t, _: _declared(t, "abc"), frozenset({400})),
    "negative length": (lambda t, _: _declared(t, "-5"), frozenset({400})),
    "endless length": (lambda t, _: _declared(t, "9" * 15), frozenset({413})),
    "length too small": (lambda t, _: _declared(t, "7"), frozenset({400})),
    "broken chunks": (lambda t, _: _chunked(t, [b"xyz\r\n"]), frozenset({0, 400})),
    "chunks that never end": (
        lambda t, _: _chunked(t, [_chunk(b" " * (1 << 16))] * 2000),
        # The answer is lost where the system resets a connection that has unread data.
        frozenset({0, 413}),
    ),
    "long head": (
        lambda t, _: exchange(t.port, b"GET /v2 HTTP/1.1\r\nX: " + b"a" * (1 << 20)),
        frozenset({0, 400}),
    ),
    "deep lists": (lambda t, _: _post(t, b"[" * 50_000), frozenset({400})),
    "deep objects": (lambda t, _: _post(t, b'{"a":' * 20_000 + b"1"), frozenset({400})),
    "wrong UTF-8": (lambda t, _: _post(t, b'{"id": "\xc3\x28"}'), frozenset({400})),
    "NaN": (lambda t, _: _post(t, b'{"inputs": [NaN]}'), frozenset({400})),
    "1e999": (lambda t, _: _post(t, _ones(t).replace(b"1.0", b"1e999")), frozenset({400})),
    "huge shape": (lambda t, _: _with(t, shape=[2**31 - 1, t.width]), frozenset({400})),
    "negative shape": (lambda t, _: _with(t, shape=[-1, -t.width]), frozenset({400})),
    "overflowing shape": (lambda t, _: _with(t, shape=[2**62, 4]), frozenset({400})),
    "endless shape": (lambda t, _: _with(t, shape=[10**300, 1]), frozenset({400})),
    "no rows": (lambda t, _: _with(t, shape=[0, t.width], data=[]), frozenset({400})),
    "wrong rank": (lambda t, _: _with(t, shape=[1] * 1000), frozenset({400})),
    "wrong type": (lambda t, _: _with(t, datatype="FP64"), frozenset({400})),
    "type of text": (lambda t, _: _with(t, datatype="BYTES"), frozenset({400})),
    "text for numbers": (lambda t, _: _with(t, data=["1"] * t.width), frozenset({400})),
    "no data": (lambda t, _: _with(t, data=None), frozenset({400})),
    "unknown input": (lambda t, _: _with(t, name="\ud800" * 9999), frozenset({400})),
    "input twice": (
        lambda t, _: _post(
            t, json.dumps({"inputs": [t.entry(np.ones((1, t.width), "f4"))] * 2}).encode()
        ),
        frozenset({400}),
    ),
    "input missing": (lambda t, _: _post(t, b'{"inputs": []}'), frozenset({400})),
    "binary that is not there": (
        lambda t, _: _with(t, data=None, parameters={"binary_data_size": 4 * t.width}),
        frozenset({400}),
    ),
    "more JSON than body": (lambda t, _: _split_header(t, "999999"), frozenset({400})),
    "negative JSON": (lambda t, _: _split_header(t, "-1"), frozenset({400})),
    "JSON of no length": (lambda t, _: _split_header(t, "0"), frozenset({400})),
    "compressed": (lambda t, _: _post(t, b"\x1f\x8b", Content_Encoding="gzip"), frozenset({415})),
    "a form": (lambda t, _: _post(t, b"a=b", Content_Type="text/html"), frozenset({415})),
    "unknown model": (
        lambda t, _: exchange(t.port, request_text("POST", "/v2/models/q/infer", b"{}")),
        frozenset({404}),
    ),
    "unknown version": (
        lambda t, _: exchange(
            t.port,
            request_text("POST", t.path.replace("/infer", "/versions/9/infer"), b"{}"),
        ),
        frozenset({404}),
    ),
    "unknown path": (
        lambda t, _: exchange(t.port, request_text("GET", "/../../etc/passwd")),
        frozenset({404}),
    ),
    "wrong method": (
        lambda t, _: exchange(t.port, request_text("DELETE", t.path)),
        frozenset({405}),
    ),
}


def run_attack(name: str, target: Target, chance: random.Random) -> int:
    """Attack once; return the status, or 0.

    Raises
    ------
    AssertionError
        When the answer is not one of those that are right.
    """
    send, right = ATTACKS[name]
    reply = send(target, chance)
    status = 0 if reply is None else reply.status
    assert status in right, f"{name}: the answer is {status}, and not {sorted(right)}"
    if reply is not None and status >= 400:
        check_sentence(name, reply)
    return status


def check_sentence(name: str, reply: Reply) -> None:
    """Hold an answer of refusal against what it should be: one sentence, and nothing inner.

    Raises
    ------
    AssertionError
    """
    if reply.headers.get("content-type", "").startswith("text/plain"):
        # uvicorn's own, for what is not HTTP.
        assert b"Invalid HTTP request received." in reply.body, f"{name}: {reply.body!r}"
        return
    sentence = reply.data["error"]
    assert 10 < len(sentence) < 1000 and "\n" not in sentence, f"{name}: {sentence!r}"
    assert "Traceback" not in sentence and os.sep + "site-packages" not in sentence, name
