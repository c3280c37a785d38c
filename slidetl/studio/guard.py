"""Decides who may ask: hosts, origins, the token or password, cookies, and the policy of every page."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slidetl.errors import UsageError
from slidetl.files import write_whole
from slidetl.studio.texts import say

COOKIE = "slidetl_studio"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SESSION_S = 12 * 3600
_MOST_SESSIONS = 100
_SAFE = ("GET", "HEAD")
_LEAST_PASSWORD = 12
_SCRYPT: dict[str, int] = {"n": 2**15, "r": 8, "p": 1}
_SCRYPT_BYTES = 2**26

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
# A report's own policy has the hashes of its scripts; sandboxed, it reaches neither cookies nor us.
REPORT_POLICY = (
    "sandbox allow-scripts allow-downloads; default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with none at all, browsers hide the origin of a form
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass
class Session:
    """A browser that was let in.

    Attributes:
        csrf: must come back with every change.
        since: monotonic seconds.
        notes: messages for the next page of a project.
    """

    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    since: float = field(default_factory=time.monotonic)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def add_notes(self, project: str, notes: Iterable[str]) -> None:
        """Keeps messages for the next page of a project."""
        self.notes.setdefault(project, []).extend(notes)

    def take_notes(self, project: str) -> list[str]:
        """Returns the messages of a project, once."""
        return self.notes.pop(project, [])


class Guard:
    """ASGI middleware in front of the pages.

    Args:
        app: the pages.
        origins: of the studio as browsers see it, e.g. ``http://127.0.0.1:8765``.
        password: line of a password file; empty lets in by the one-time token.
    """

    def __init__(self, app: ASGIApp, origins: tuple[str, ...], password: str = "") -> None:
        self._app = app
        self._origins = frozenset(origins)
        self._hosts = frozenset(urlsplit(origin).netloc for origin in origins)
        self._is_secure = all(origin.startswith("https:") for origin in origins)
        self._password = password
        self._sessions: dict[str, Session] = {}
        self._lock, self._slow = threading.Lock(), threading.Lock()
        self.token = "" if password else secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or hands a request on with its session in ``scope["state"]``."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError("the studio has no web sockets")

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in {**_HEADERS, "Content-Security-Policy": POLICY}.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._judge(scope, receive, send_guarded)

    async def _judge(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        if headers.getlist("host") != [headers.get("host", "")] or headers.get("host") not in self._hosts:
            await PlainTextResponse(say("guard.host"), 421)(scope, receive, send)
            return
        if scope["method"] not in _SAFE and not self._is_own(headers):
            await PlainTextResponse(say("guard.origin"), 403)(scope, receive, send)
            return
        scope.setdefault("state", {})
        session = self._session(headers)
        if self.token and session is None and scope["method"] == "GET" and path == "/":
            token = _token(scope)
            with self._lock:
                is_right = bool(token) and secrets.compare_digest(token.encode(), self.token.encode())
                if is_right:
                    self.token = ""  # once
            if is_right:
                await self.welcome()(scope, receive, send)
                return
        if session is None and self._password and path == "/login":
            scope["state"]["session"] = None
        elif session is None and not path.startswith("/static/"):
            is_page = "hx-request" not in headers and scope["method"] != "PUT"
            if self._password and is_page:
                await RedirectResponse("/login", 303)(scope, receive, send)
            else:
                said = say("guard.session" if self._password else "guard.token")
                await PlainTextResponse(said, 401)(scope, receive, send)
            return
        else:
            scope["state"]["session"] = session
        await self._app(scope, receive, send)

    def welcome(self) -> RedirectResponse:
        """Lets a browser in: a cookie, and the first page."""
        key = secrets.token_urlsafe(32)
        with self._lock:
            now = time.monotonic()
            fresh = {k: s for k, s in self._sessions.items() if now - s.since < _SESSION_S}
            self._sessions = dict(list(fresh.items())[-_MOST_SESSIONS + 1 :])
            self._sessions[key] = Session()
        response = RedirectResponse("/", 303)
        response.set_cookie(
            COOKIE, key, max_age=_SESSION_S, httponly=True, samesite="strict", secure=self._is_secure
        )
        return response

    def lets_in(self, password: str) -> bool:
        """Compares a password with the file; takes a second if it is wrong, one at a time."""
        with self._slow:
            is_right = bool(self._password) and is_password(password, self._password)
            if not is_right:
                time.sleep(1)
            return is_right

    def _session(self, headers: Headers) -> Session | None:
        # Not http.cookies, which gives up at a cookie of another program that it does not like.
        session = self._sessions.get(cookie_parser(headers.get("cookie", "")).get(COOKIE, ""))
        return session if session is not None and time.monotonic() - session.since < _SESSION_S else None

    def _is_own(self, headers: Headers) -> bool:
        """Tells if a change comes from a page of ours; every browser names the origin of one."""
        fetched = headers.get("sec-fetch-site", "same-origin")
        return headers.get("origin") in self._origins and fetched == "same-origin"


def _token(scope: Scope) -> str:
    query: bytes = scope.get("query_string", b"")
    try:
        return parse_qs(query.decode("latin-1"), max_num_fields=10).get("token", [""])[0]
    except ValueError:  # too many of them
        return ""


def write_password(path: Path, password: str) -> None:
    """Writes the scrypt hash of a password, readable by this user alone.

    Raises:
        UsageError: it is shorter than 12 letters.
        OutputError: the file cannot be written.
    """
    if len(password) < _LEAST_PASSWORD:
        raise UsageError(f"a password has at least {_LEAST_PASSWORD} letters")
    salt = secrets.token_bytes(16)
    values = {"kind": "scrypt", **_SCRYPT, "salt": salt.hex(), "hash": _scrypt(password, salt).hex()}
    write_whole(path, json.dumps(values) + "\n")
    path.chmod(0o600)


def read_password(path: Path) -> str:
    """Reads a file of :func:`write_password`.

    Raises:
        UsageError: it is no such file, or others may read it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        is_open = path.stat().st_mode & 0o077
        values: Any = json.loads(text)
        known = values["kind"] == "scrypt" and {key: values[key] for key in _SCRYPT} == _SCRYPT
        if not known or not bytes.fromhex(values["salt"]) or not bytes.fromhex(values["hash"]):
            raise ValueError
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: no password file; make one with 'slidetl studio --new-password'"
        ) from error
    if is_open:
        raise UsageError(f"{path}: others may read it; chmod 600 {path}")
    return text


def is_password(password: str, stored: str) -> bool:
    """Compares a password with the text of a password file."""
    values = json.loads(stored)
    return secrets.compare_digest(
        _scrypt(password, bytes.fromhex(values["salt"])), bytes.fromhex(values["hash"])
    )


def _scrypt(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(
        password.encode("utf-8", "surrogatepass"), salt=salt, maxmem=_SCRYPT_BYTES, **_SCRYPT
    )
