"""``slidetl studio``."""

from __future__ import annotations

import getpass
import logging
import signal
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit


def studio(
    *,
    root: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8765,
    public_url: str = "",
    password_file: Path | None = None,
    new_password: bool = False,
    max_upload_gb: float = 5.0,
) -> int:
    """Opens a page in the browser that leads from slides and grades to a classifier, on this machine.

    It prints an address that lets in one browser, once. Ends with Ctrl-C; a running job goes on, and the next
    studio finds it.

    Args:
        root: folder that the page may read; its projects are in ROOT/studio.
        host: address to listen at; any but this machine's own needs ``public_url`` and ``password_file``.
        port: port to listen at; 0 takes a free one.
        public_url: address in browsers of a proxy in front that speaks TLS, e.g.
            https://studio.hospital.example.
        password_file: file of ``new_password``.
        new_password: ask for a password, write its hash to ``password_file``, and end.
        max_upload_gb: largest upload of a slide, GB.
    """
    from slidetl.errors import UsageError, needs_extra

    with needs_extra("the studio needs its extra", "studio"):
        import uvicorn
        from fastapi import FastAPI  # noqa: F401 (is it there?)

    from slidetl.studio.app import create_app, open_studio
    from slidetl.studio.guard import LOOPBACK, Guard, read_password, write_password

    if new_password:
        if password_file is None:
            raise UsageError("--new-password needs --password-file, the file to write")
        first = getpass.getpass("password: ")
        if getpass.getpass("again: ") != first:
            raise UsageError("the two passwords differ")
        write_password(password_file, first)
        print(f"written to {password_file}")
        return 0
    if root is None or not root.is_dir():
        raise UsageError(f"--root must be a folder that is there, not {root}")
    if not max_upload_gb > 0:
        raise UsageError(f"--max-upload-gb must be above 0, not {max_upload_gb:g}")
    if (host not in LOOPBACK or public_url) and (password_file is None or not public_url):
        raise UsageError(
            "to be reached from other machines the studio needs --password-file (made by --new-password), "
            "and a proxy in front that speaks TLS, with its address as --public-url: see docs/howto/studio.md"
        )
    if public_url and (urlsplit(public_url).scheme != "https" or not urlsplit(public_url).netloc):
        raise UsageError(
            f"--public-url must be an address such as https://studio.hospital.example, not {public_url}"
        )
    password = read_password(password_file) if password_file is not None else ""
    opened = open_studio(root, max_upload_gb)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UsageError(
            f"cannot listen at {host}:{port}: {error.strerror}; choose another --port"
        ) from error
    port = listening.getsockname()[1]
    hosts = [f"[{name}]" if ":" in name else name for name in LOOPBACK]
    origins = (public_url.rstrip("/"),) if public_url else tuple(f"http://{name}:{port}" for name in hosts)
    app = create_app(opened)
    guard = Guard(app, origins, password)
    app.state.guard = guard
    address = f"{origins[0]}/" + (f"?token={guard.token}" if guard.token else "")
    print(f"slidetl studio of {opened.root.folder}\nopen {address}\nend with Ctrl-C", flush=True)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    # A job inherits an ignored SIGINT from a shell's background, and Stop would not reach it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    opened.queue.start()
    config = uvicorn.Config(
        guard,
        access_log=False,
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        ws="none",
        lifespan="off",
        limit_concurrency=100,
        timeout_graceful_shutdown=2,
    )
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        print("slidetl: the studio has ended; a running job goes on", file=sys.stderr)
    finally:
        opened.queue.close()
    return 0
