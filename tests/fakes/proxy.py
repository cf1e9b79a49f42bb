"""An HTTP proxy on loopback: it tunnels and forwards to one address, whatever name it is asked for, and keeps count."""

import http.client
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class FakeProxy:
    """Use with `with`. `target` is the host:port that every name leads to."""

    target: str
    wants: str = ""  # the Proxy-Authorization that callers must have; "" is none
    asked: list[str] = field(default_factory=list)  # "CONNECT host:port", "GET http://…"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeProxy":
        proxy = self

        class Bound(_Handler):
            served = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: FakeProxy
    protocol_version = "HTTP/1.1"

    def do_CONNECT(self) -> None:
        if not self._is_let_in():
            return
        host, _, port = self.served.target.rpartition(":")
        with socket.create_connection((host, int(port))) as there:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=_copy, args=(there, self.connection), daemon=True)
            back.start()
            _copy(self.connection, there)
            back.join(5)
        self.close_connection = True

    def do_GET(self) -> None:
        if not self._is_let_in():
            return
        connection = http.client.HTTPConnection(self.served.target, timeout=5)
        connection.request("GET", urlsplit(self.path).path, headers={"Accept": self.headers.get("Accept", "")})
        answer = connection.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        connection.close()

    def log_message(self, *_: object) -> None:
        pass

    def _is_let_in(self) -> bool:
        self.served.asked.append(f"{self.command} {self.path}")
        if self.served.wants and self.headers.get("Proxy-Authorization") != self.served.wants:
            self.send_response(407)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return False
        return True


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while piece := source.recv(1 << 16):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass
