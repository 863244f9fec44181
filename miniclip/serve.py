"""``miniclip serve``: one page over a folder of embeddings, and the JSON interface behind it.

Safe by default. It listens on this computer alone and refuses other Host headers, so that no page of another site can
reach it through a name that points here (DNS rebinding). It sends images that it decoded itself, never files, and only
images that are rows of the index: a client names rows by number, never a path. Uploads are bounded and stay in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from miniclip.errors import ConfigError, InputError
from miniclip.gallery import Gallery


def serve(
    folder: Path, host: str, port: int, token: str | None, model: str | None, say: Callable[[str], object]
) -> None:
    """Serve a folder until Ctrl-C.

    Raises:
        InputError: if the host is not this computer's loopback and no token is given.
        ConfigError: if a package is missing, or the port is taken.
        MiniclipError: as ``Index.open`` and ``load`` do.
    """
    try:
        import uvicorn

        from miniclip.web_app import LOOPBACK, make_app
    except ImportError as error:
        name = (error.name or "").partition(".")[0]
        raise ConfigError(f'the package {name} is missing: pip install -c constraints.txt -e ".[web]"') from None
    if host not in LOOPBACK and not token:
        raise InputError(f"--host {host} can be reached from other computers, so it needs --token SECRET")
    if token is not None and not re.fullmatch("[A-Za-z0-9_-]+", token):  # it stands in addresses and in a cookie
        raise InputError("the token must consist of letters A to Z, digits, - and _")
    hosts = LOOPBACK if host in LOOPBACK else LOOPBACK | {host}
    gallery = Gallery(folder, model)
    if gallery.index.notice:
        say(gallery.index.notice)
    app = make_app(gallery, hosts, token)
    settings = uvicorn.Config(app, host=host, port=port, log_level="warning", server_header=False)
    try:
        listening = settings.bind_socket()
    except (SystemExit, OverflowError):  # uvicorn's answer to a port that is taken
        raise ConfigError(f"port {port} of {host} cannot be used: choose another --port") from None
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"
    say(f"{address}{f'?token={token}' if token else ''}   (Ctrl-C ends)")
    uvicorn.Server(settings).run(sockets=[listening])
