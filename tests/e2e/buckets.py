"""An S3-compatible server (moto) on loopback that counts what goes over the wire.

It answers one request after the other: a put with a condition is then one step, as it is with S3 itself.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Asked:
    """One request: method, path, bytes that came with it, status."""

    method: str
    path: str
    size: int
    status: int


@dataclass
class Bucket:
    """The server's address and what it was asked."""

    url: str
    log: list[Asked] = field(default_factory=list)

    def put(self, word: str = "") -> list[int]:
        """The sizes of what was put below a path."""
        return [a.size for a in self.log if a.method == "PUT" and word in a.path and a.status == 200]


@contextmanager
def serving() -> Iterator[Bucket]:
    """Run it for as long as the block lasts."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *args: object) -> None:
            pass

    state = Bucket("")
    app = _counting(DomainDispatcherApplication(create_backend_app), state)
    server = make_server("127.0.0.1", 0, app, threaded=False, request_handler=Quiet)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _counting(app: Callable[..., Iterable[bytes]], state: Bucket) -> Callable[..., Iterable[bytes]]:
    def counted(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        def started(status: str, *rest: Any) -> Any:
            size = int(environ.get("HTTP_X_AMZ_DECODED_CONTENT_LENGTH") or environ.get("CONTENT_LENGTH") or 0)
            state.log.append(Asked(environ["REQUEST_METHOD"], environ["PATH_INFO"], size, int(status[:3])))
            return start_response(status, *rest)

        return app(environ, started)

    return counted
