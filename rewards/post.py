"""One HTTP request with JSON in and out, for rewards that ask a service."""

import ipaddress
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from rewards.api import Unavailable

_MAX_REPLY = 64 * 2**20  # bytes
_BUSY = 429


class Refused(RuntimeError):
    """The service answered that the request itself is wrong; asking again would not help."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the token to another host, and turn a POST into a GET."""

    def redirect_request(self, *_: Any) -> None:
        return None


def post_json(url: str, payload: object, *, token: str | None, timeout_s: float) -> Any:
    """POSTs `payload` and returns the reply.

    Raises:
      Unavailable: no connection, no reply in time, HTTP 429 or 5xx: worth another try.
      Refused: any other HTTP status, or a reply that is no JSON.
    """
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, json.dumps(payload).encode(), headers)
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
    if is_loopback(urllib.parse.urlsplit(url).hostname or ""):
        handlers.append(urllib.request.ProxyHandler({}))  # no proxy can reach this machine's own
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s) as reply:
            body = reply.read(_MAX_REPLY)
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(300).decode("utf-8", "replace")
        kind = Unavailable if error.code == _BUSY or error.code >= 500 else Refused
        raise kind(f"{url} said HTTP {error.code}: {said}") from None
    except OSError as error:  # URLError and timeouts are some
        raise Unavailable(f"{url}: {error}") from error
    try:
        return json.loads(body)
    except ValueError as error:
        raise Refused(f"{url} replied with something that is no JSON") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can be meant."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token_from(variable: str) -> str | None:
    """A secret out of the environment, read when it is used, so that it is stored nowhere."""
    return os.environ.get(variable) or None
