"""An SSH server on loopback (paramiko's) that gives a folder by SFTP, to one user with a password."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import paramiko
from paramiko import SFTP_FAILURE, SFTP_OK, SFTPAttributes, SFTPHandle, SFTPServer, SFTPServerInterface

USER, PASSWORD = "me", "open sesame"


@dataclass(frozen=True)
class Host:
    """Where it listens, and the line of `known_hosts` that makes it known."""

    port: int
    known: str


class _Login(paramiko.ServerInterface):
    def check_auth_password(self, username: str, password: str) -> int:
        good = (username, password) == (USER, PASSWORD)
        return paramiko.AUTH_SUCCESSFUL if good else paramiko.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED

    def get_allowed_auths(self, username: str) -> str:
        return "password"


class _Files(SFTPServerInterface):
    """The machine's own files."""

    def list_folder(self, path: str) -> list[SFTPAttributes] | int:
        return _said(lambda: [SFTPAttributes.from_stat(e.stat(), e.name) for e in os.scandir(path)])

    def stat(self, path: str) -> SFTPAttributes | int:
        return _said(lambda: SFTPAttributes.from_stat(Path(path).stat()))

    lstat = stat

    def open(self, path: str, flags: int, attr: SFTPAttributes) -> SFTPHandle | int:
        def opened() -> SFTPHandle:
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR))
            file = os.fdopen(os.open(path, flags, 0o666), "r+b" if flags & os.O_RDWR else "wb" if writes else "rb")
            handle = SFTPHandle(flags)
            handle.filename = path
            handle.readfile = handle.writefile = file
            return handle

        return _said(opened)

    def remove(self, path: str) -> int:
        return _said(lambda: Path(path).unlink())

    def posix_rename(self, oldpath: str, newpath: str) -> int:
        return _said(lambda: os.rename(oldpath, newpath))  # noqa: PTH104 - no answer, as its callers want

    def mkdir(self, path: str, attr: SFTPAttributes) -> int:
        return _said(lambda: Path(path).mkdir())

    def rmdir(self, path: str) -> int:
        return _said(lambda: Path(path).rmdir())


@contextmanager
def serving() -> Iterator[Host]:
    """Run it for as long as the block lasts."""
    key = paramiko.ECDSAKey.generate()
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    transports: list[paramiko.Transport] = []

    def accept() -> None:
        with suppress(OSError):
            while True:
                transport = paramiko.Transport(listening.accept()[0])
                transport.add_server_key(key)
                transport.set_subsystem_handler("sftp", SFTPServer, _Files)
                transport.start_server(server=_Login(), event=threading.Event())
                transports.append(transport)

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield Host(port, f"[127.0.0.1]:{port} {key.get_name()} {key.get_base64()}\n")
    finally:
        listening.close()
        for transport in transports:
            transport.close()


def know(host: Host, home: Path) -> None:
    """Write a host among those that a user has met."""
    (home / ".ssh").mkdir(parents=True, exist_ok=True)
    (home / ".ssh" / "known_hosts").write_text(host.known)


def _said(act: object) -> object:
    try:
        found = act()
    except OSError as error:
        return SFTPServer.convert_errno(error.errno) if error.errno else SFTP_FAILURE
    return SFTP_OK if found is None else found
