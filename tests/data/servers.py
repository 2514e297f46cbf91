"""Servers on this machine: an HTTP server of a folder and a proxy, which count bytes and break requests on demand."""

import contextlib
import http.client
import http.server
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

SLOW_SECONDS = 30


@dataclass
class Request:
    method: str
    path: str
    sent: int = 0
    """Bytes of the body that were sent."""


class Server:
    """`with Server(folder) as server`, or `Server(upstream="http://127.0.0.1:5000")` for a proxy.

    Attributes:
        url: Its address.
        requests: All requests of the client.
        faults: What happens to the next requests, one after the other: an HTTP status, "reset", "truncated", "slow", or
            "ok". Afterwards `always` happens.
    """

    def __init__(self, folder: Path | None = None, upstream: str | None = None, ranges: bool = True):
        self.folder, self.upstream, self.ranges = folder, upstream, ranges
        self.requests: list[Request] = []
        self.faults: list[int | str] = []
        self.always: int | str = "ok"
        self.body = b""
        """Of answers with an HTTP status from `faults`."""

    def __enter__(self) -> "Server":
        handler = type("BoundHandler", (_Handler,), {"owner": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._stopped = threading.Event()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def bytes_sent(self) -> int:
        return sum(request.sent for request in self.requests)

    def reset(self) -> None:
        self.requests.clear()
        self.faults.clear()
        self.always, self.body = "ok", b""

    def wait(self, seconds: float) -> None:
        self._stopped.wait(seconds)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Server

    def do_GET(self) -> None:  # noqa: N802
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(self.command, self.path)
        self.owner.requests.append(request)
        fault = self.owner.faults.pop(0) if self.owner.faults else self.owner.always
        if fault == "slow":
            self.owner.wait(SLOW_SECONDS)
        if fault == "reset":
            # Closing with pending data and no linger sends RST.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        if isinstance(fault, int):
            self._send(fault, {}, self.owner.body, request)
            return
        status, headers, body = self._forwarded(sent) if self.owner.upstream else self._file()
        with contextlib.suppress(ConnectionError):
            self._send(status, headers, body, request, cut=fault == "truncated")

    do_HEAD = do_PUT = do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, headers: dict, body: bytes, request: Request, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            body = body[: len(body) // 2] if cut else body
            self.wfile.write(body)
            request.sent = len(body)
        if cut:
            self.close_connection = True

    def _file(self) -> tuple[int, dict, bytes]:
        path = self.owner.folder / unquote(urlsplit(self.path).path).lstrip("/")
        if path.is_dir():
            links = "".join(f'<a href="{quote(p.name)}{"/" * p.is_dir()}">{p.name}</a>' for p in sorted(path.iterdir()))
            return 200, {"Content-Type": "text/html"}, links.encode()
        if not path.is_file():
            return 404, {}, b""
        size, headers = path.stat().st_size, {"ETag": f'"{path.stat().st_mtime_ns}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        with open(path, "rb") as file:
            if not asked or not self.owner.ranges:
                return 200, headers, file.read()
            start, last = int(asked[1]), min(int(asked[2]), size - 1)
            return (
                206,
                headers | {"Content-Range": f"bytes {start}-{last}/{size}"},
                os.pread(file.fileno(), last - start + 1, start),
            )

    def _forwarded(self, sent: bytes) -> tuple[int, dict, bytes]:
        connection = http.client.HTTPConnection(urlsplit(self.owner.upstream).netloc, timeout=30)
        with contextlib.closing(connection):
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            connection.request(self.command, self.path, sent, headers)
            answer = connection.getresponse()
            body = answer.read()
            skipped = ("connection", "transfer-encoding", "date", "server")
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in skipped}
            return answer.status, headers, body
