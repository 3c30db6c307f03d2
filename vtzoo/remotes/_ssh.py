"""fsspec's filesystem over SFTP, with the host's key checked and ~/.ssh/config read, which it leaves out."""

from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import paramiko
from fsspec.implementations.sftp import SFTPFileSystem

from vtzoo import patience

_CONFIG = Path("~/.ssh/config")


class HostKeyRefused(paramiko.SSHException):
    """The server's key is not among the known ones."""


class _Refuse(paramiko.MissingHostKeyPolicy):
    def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:  # noqa: ARG002 - paramiko's signature
        raise HostKeyRefused(f"the host {hostname} shows a {key.get_name()} key that is not in ~/.ssh/known_hosts")


class Strict(SFTPFileSystem):
    """Refuses hosts that `ssh` has not met; a silent server is given up."""

    def _connect(self) -> None:
        self.client = paramiko.SSHClient()
        self.client.load_system_host_keys()
        self.client.set_missing_host_key_policy(_Refuse())
        self.client.connect(
            self.host, timeout=patience.PATIENCE.stall_s, banner_timeout=patience.PATIENCE.stall_s, **self.ssh_kwargs
        )
        self.ftp = self.client.open_sftp()
        channel = self.ftp.get_channel()
        if channel is not None:
            channel.settimeout(patience.PATIENCE.stall_s)


def filesystem(url: str) -> Strict:
    """Connect to the host of a URL, as `ssh` would by its configuration (HostName, Port, User, IdentityFile)."""
    parts = urlsplit(url)
    config = _configured(parts.hostname or "")
    port = parts.port or int(config.get("port", 22))
    options: dict[str, Any] = {"port": port, "skip_instance_cache": True}
    if user := parts.username or config.get("user"):
        options["username"] = unquote(user)
    if parts.password:
        options["password"] = unquote(parts.password)
    if files := config.get("identityfile"):
        options["key_filename"] = files
    return Strict(config.get("hostname", parts.hostname), **options)


def _configured(host: str) -> dict[str, Any]:
    path = _CONFIG.expanduser()
    return dict(paramiko.SSHConfig.from_path(str(path)).lookup(host)) if path.is_file() else {}
