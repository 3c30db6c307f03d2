"""A real web server on loopback over a zoo's folder that does what servers do: cuts, lies, flips bits, stalls, redirects.

Faults are for the objects, one request after the other, as they stand in `faults`; when there are no more, and for the
index and the asking for a size (`bytes=0-0`), it is honest, but for `announces`. `log` says what was asked and sent.
"""

import random
import re
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_SLICE_BYTES = 16 << 10


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is to be sent; `stop` after so many bytes of the body, then silence (`stall_s`) or an end; `drip_s` between bytes."""

    status: int
    headers: dict[str, str]
    body: bytes
    start: int = 0
    stop: int | None = None
    stall_s: float = 0.0
    drip_s: float = 0.0


Fault = Callable[[Answer], Answer]


@dataclass
class Asked:
    """One request, and the bytes of a body that were sent for it."""

    path: str
    start: int | None
    sent: int = 0


def cut(after: int) -> Fault:
    """The connection breaks after so many bytes."""
    return lambda answer: replace(answer, stop=after)


def stall(after: int, seconds: float = 30.0) -> Fault:
    """Silence after so many bytes."""
    return lambda answer: replace(answer, stop=after, stall_s=seconds)


def drip(every_s: float) -> Fault:
    """A byte now and then."""
    return lambda answer: replace(answer, drip_s=every_s)


def flip(place: int) -> Fault:
    """One bit of the file's byte at `place` is another one."""

    def fault(answer: Answer) -> Answer:
        at = place - answer.start
        if not 0 <= at < len(answer.body):
            return answer
        return replace(answer, body=answer.body[:at] + bytes([answer.body[at] ^ 1]) + answer.body[at + 1 :])

    return fault


def refuse(status: int) -> Fault:
    """An error, by its status."""
    return lambda answer: replace(answer, status=status, headers={"Content-Length": "0"}, body=b"")


def redirect(to: str) -> Fault:
    """Sent elsewhere."""
    return lambda answer: replace(answer, status=302, headers={"Location": to, "Content-Length": "0"}, body=b"")


def longer(more: int) -> Fault:
    """More bytes than there are, without a length."""

    def fault(answer: Answer) -> Answer:
        headers = {k: v for k, v in answer.headers.items() if k != "Content-Length"}
        return replace(answer, headers=headers, body=answer.body + bytes(more))

    return fault


def honest(answer: Answer) -> Answer:
    """As it should be."""
    return answer


def drawn(draw: random.Random, size: int) -> Fault:
    """Any of these, at any place."""
    kinds = (
        honest,
        cut(draw.randrange(size)),
        stall(draw.randrange(size)),
        flip(draw.randrange(size)),
        refuse(draw.choice([500, 503, 429, 404, 403])),
        redirect(draw.choice(["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher:x", "//"])),
        longer(draw.randrange(1, size)),
    )
    return draw.choice(kinds)


@dataclass
class Flaky:
    """The server's behaviour, and what it saw.

    Attributes:
        ranges: whether it knows them.
        announces: added to the size that it announces.
        always: a fault of every request for an object, before those in `faults`.
    """

    folder: Path
    url: str = ""
    ranges: bool = True
    announces: int = 0
    always: Fault = honest
    faults: deque[Fault] = field(default_factory=deque)
    log: list[Asked] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    @property
    def objects(self) -> list[Asked]:
        """The requests for objects that were for more than the size."""
        return [a for a in self.log if "/objects/" in a.path and a.start is not None]

    @property
    def sent(self) -> int:
        """Bytes of objects that were sent."""
        return sum(a.sent for a in self.objects)


@contextmanager
def flaky(folder: Path, certificate: Path | None = None) -> Iterator[Flaky]:
    """Serve a folder on loopback for as long as the block lasts; by https with a certificate (and its key in the same file)."""
    state = Flaky(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    server.daemon_threads = True
    state.url = f"http{'s' if certificate else ''}://127.0.0.1:{server.server_address[1]}"
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


def certificate(path: Path) -> Path:
    """Write a certificate for 127.0.0.1 that vouches for itself, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    place = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    made = made.add_extension(place, critical=False).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(secret + made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return path


def _handler(state: Flaky) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = state.folder / self.path.lstrip("/")
            asked = Asked(self.path, None)
            state.log.append(asked)
            if not path.is_file():
                self.send_error(404)
                return
            with suppress(OSError):  # the other side has gone
                _send(self, _answer(state, path, self.headers.get("Range", ""), asked), asked, state)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's signature
            pass

    return Handler


def _answer(state: Flaky, path: Path, asked_range: str, asked: Asked) -> Answer:
    data = path.read_bytes()
    total = len(data) + (state.announces if "/objects/" in asked.path else 0)
    found = _RANGE.fullmatch(asked_range) if state.ranges else None
    start = int(found[1]) if found else 0
    body = data[start : int(found[2]) + 1 if found and found[2] else None]
    headers = {"Content-Length": str(len(body) if found else total)}
    if found:
        headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{total}"
    answer = Answer(status=206 if found else 200, headers=headers, body=body, start=start)
    if "/objects/" not in asked.path or asked_range == "bytes=0-0":
        return answer
    asked.start = start
    return (state.faults.popleft() if state.faults else honest)(state.always(answer))


def _send(handler: BaseHTTPRequestHandler, answer: Answer, asked: Asked, state: Flaky) -> None:
    handler.send_response(answer.status)
    for name, value in answer.headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    body = answer.body[: answer.stop]
    step = 1 if answer.drip_s else _SLICE_BYTES
    for at in range(0, len(body), step):
        handler.wfile.write(body[at : at + step])
        asked.sent += len(body[at : at + step])
        if answer.drip_s and state.stopped.wait(answer.drip_s):
            return
    handler.wfile.flush()
    if answer.stall_s:
        state.stopped.wait(answer.stall_s)
