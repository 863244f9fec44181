"""``miniclip serve``: one page over a folder of embeddings, and the JSON interface behind it.

Safe by default. It listens on this computer alone and refuses other Host headers, so that no page of another site can
reach it through a name that points here (DNS rebinding). It sends images that it decoded itself, never files, and only
images that are rows of the index: a client names rows by number, never a path. Uploads are bounded and stay in memory.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable
from pathlib import Path

from miniclip.errors import ConfigError, InputError
from miniclip.gallery import Gallery


def serve(
    folder: Path, host: str, port: int, token: str | None, model: str | None, say: Callable[[str], object]
) -> None:
    """Serve a folder until Ctrl-C.

    Raises:
        InputError: if the host is not this computer's loopback and no token is given, or the port is out of range.
        ConfigError: if a package is missing, or the port cannot be used.
        MiniclipError: as ``Index.open`` and ``load`` do.
    """
    try:
        import uvicorn

        from miniclip.web_app import LOOPBACK, make_app
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        raise ConfigError(f'the package {package} is missing: pip install -c constraints.txt -e ".[web]"') from None
    name = host.lower()  # as browsers send it
    if name not in LOOPBACK and not token:
        raise InputError(f"--host {host} can be reached from other computers, so it needs --token SECRET")
    if token is not None and not re.fullmatch("[A-Za-z0-9_-]+", token):  # it stands in addresses and in a cookie
        raise InputError("the token must consist of letters A to Z, digits, - and _")
    if not 0 <= port <= 65535:
        raise InputError(f"--port must be a number from 0 to 65535, got {port}")
    gallery = Gallery(folder, model)
    if notice := gallery.index.notice:
        say(notice)
    app = make_app(gallery, None if _is_any(name) else LOOPBACK | {name}, token)
    settings = uvicorn.Config(app, log_level="warning", server_header=False)
    listening = _listen(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"
    say(f"{address}{f'?token={token}' if token else ''}   (Ctrl-C ends)")
    uvicorn.Server(settings).run(sockets=[listening])


def _is_any(host: str) -> bool:
    """Whether a host stands for all addresses of this computer, which clients know by names of their own."""
    try:
        return host == "" or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    """A socket at an address. Not uvicorn's own, which prints a line and ends the process if that fails."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, UnicodeError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"port {port} of {host} cannot be used ({reason}): choose another --port or --host") from None
    return listening
