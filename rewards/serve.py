"""Serves rewards over HTTP, from a pool of worker processes.

  REWARDS_TOKEN=… python -m rewards.serve my_module:my_reward --port 8765

The protocol, all JSON, with the header "Authorization: Bearer TOKEN" on every request:

  POST /v1/score  {"items": [{"id", "completion", "problem": {…}, "facts": {…}}, …]}
             200  {"results": [{"id", "scores": {NAME: {"value", "valid", "status", …}}}, …]}
  GET  /v1/health {"rewards": [NAME, …], "counts": {…}}

`problem` and the scores have the fields of `rewards.api.Problem` and `Score`. An id that was asked
before, with the same content, is answered from memory, so a client may repeat a request at will.
Errors are {"error": …}: 400 and 413 for requests that will never do, 401 for a wrong token, 503
for a server that is busy or closing, where the client should try again.

There is no encryption: it listens on this machine alone unless told otherwise, and then belongs in
a private network or behind a proxy that speaks TLS.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import hmac
import json
import os
import secrets
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from rewards.api import Problem, Score, Status
from rewards.loading import facts_of, problem_of, start_pool
from rewards.pool import RewardPool
from rewards.post import is_loopback
from rewards.remote import TOKEN_VARIABLE

_MAX_BODY = 64 * 2**20  # bytes
_MAX_ITEMS = 1_024
_MAX_REQUESTS = 32  # at once
_REMEMBERED = 50_000  # verdicts
_VERDICT_S = 600.0
_AGAIN = (Status.LOST, Status.UNAVAILABLE)  # not remembered: the next try may do better


class BadRequest(ValueError):
    """The client's mistake, with the HTTP status that says so."""

    def __init__(self, message: str, code: int = 400) -> None:
        super().__init__(message)
        self.code = code


class RewardServer:
    """An HTTP server over a pool; use it as a context manager, with `serve` on some thread."""

    def __init__(
        self, pool: RewardPool, token: str, host: str = "127.0.0.1", port: int = 0
    ) -> None:
        """Binds the address; port 0 takes a free one."""
        self.pool = pool
        self.token = token
        self._lock = threading.Lock()
        self._verdicts: collections.OrderedDict[str, tuple[str, Future[list[Score]]]] = (
            collections.OrderedDict()
        )
        self._places = threading.BoundedSemaphore(_MAX_REQUESTS)
        self._http = ThreadingHTTPServer((host, port), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://{host}:{self._http.server_port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.server_close()

    def serve(self) -> None:
        """Answers requests until `stop` is called from another thread."""
        self._http.serve_forever(poll_interval=0.1)

    def stop(self) -> None:
        """Ends `serve`."""
        self._http.shutdown()

    def allows(self, authorization: str) -> bool:
        """Whether the header carries the token; takes equally long for any wrong one."""
        return hmac.compare_digest(authorization.encode(), f"Bearer {self.token}".encode())

    def health(self) -> dict[str, Any]:
        """The reply of /v1/health."""
        return {"rewards": list(self.pool.names), "counts": self.pool.counts()}

    def score(self, request: Any) -> dict[str, Any]:
        """The reply of /v1/score.

        Raises:
          BadRequest: the request is not what the protocol says, or comes at a bad time.
        """
        items = request.get("items") if isinstance(request, dict) else None
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise BadRequest('expected {"items": [{…}, …]}')
        if len(items) > _MAX_ITEMS:
            raise BadRequest(f"at most {_MAX_ITEMS} items a request, got {len(items)}", 413)
        if not self._places.acquire(blocking=False):
            raise BadRequest(f"{_MAX_REQUESTS} requests are being answered already", 503)
        try:
            futures = [self._future(item) for item in items]
            results = [
                {"id": item["id"], "scores": self._scores(item["id"], future)}
                for item, future in zip(items, futures, strict=True)
            ]
        except (RuntimeError, TimeoutError, CancelledError) as error:  # closed, or far behind
            raise BadRequest(str(error), 503) from error
        finally:
            self._places.release()
        return {"results": results}

    def _future(self, item: dict[str, Any]) -> "Future[list[Score]]":
        """The verdict to an item: a remembered one, one under way, or a new one."""
        name, completion = item.get("id"), item.get("completion")
        if not isinstance(name, str) or not isinstance(completion, str):
            raise BadRequest("an item needs an id and a completion, both text")
        content = hashlib.sha256(json.dumps(item, sort_keys=True).encode()).hexdigest()
        problem, facts = _problem(item)
        with self._lock:
            if name in self._verdicts:
                self._verdicts.move_to_end(name)
                known, future = self._verdicts[name]
                if known != content:
                    raise BadRequest(f"the id {name[:80]!r} was used for something else")
                return future
            future = self.pool.submit(completion, problem, facts)
            self._verdicts[name] = content, future
            if len(self._verdicts) > _REMEMBERED:
                self._verdicts.popitem(last=False)
            return future

    def _scores(self, name: str, future: "Future[list[Score]]") -> dict[str, Any]:
        final = False
        try:
            scores = future.result(_VERDICT_S)
            final = not any(score.status in _AGAIN for score in scores)
        finally:
            if not final:
                with self._lock:
                    self._verdicts.pop(name, None)
        named = zip(self.pool.names, scores, strict=True)
        return {reward: dataclasses.asdict(score) for reward, score in named}


def _problem(item: dict[str, Any]) -> tuple[Problem, Any]:
    try:
        return problem_of(item), facts_of(item.get("facts") or {})
    except (TypeError, ValueError, AttributeError) as error:
        raise BadRequest(f"no problem can be made of this: {error}") from error


def _handler(rewards: RewardServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 60.0  # seconds that a client may take to send

        def do_GET(self) -> None:
            self._answer("/v1/health", lambda _: rewards.health())

        def do_POST(self) -> None:
            self._answer("/v1/score", rewards.score)

        def _answer(self, path: str, reply: Any) -> None:
            try:
                if not rewards.allows(self.headers.get("Authorization", "")):
                    raise BadRequest(f"wrong token; is {TOKEN_VARIABLE} set?", 401)
                if self.path != path:
                    raise BadRequest("no such address", 404)
                code, content = 200, reply(self._body())
            except BadRequest as error:
                code, content = error.code, {"error": str(error)}
            except OSError:  # the client went away
                return
            except Exception as error:  # one request must not take the server's thread with it
                code, content = 500, {"error": repr(error)[:300]}
            self._send(code, json.dumps(content).encode())

        def _body(self) -> Any:
            length = self.headers.get("Content-Length", "0")
            if not length.isascii() or not length.isdigit():
                raise BadRequest("no length")
            if int(length) > _MAX_BODY:
                raise BadRequest(f"at most {_MAX_BODY} bytes a request", 413)
            try:
                return json.loads(self.rfile.read(int(length)) or b"null")
            except (ValueError, RecursionError) as error:
                raise BadRequest(f"no JSON: {error}") from error

        def _send(self, code: int, body: bytes) -> None:
            with contextlib.suppress(OSError):
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            del format, args  # a line a request would drown what matters

    return Handler


def main(arguments: Sequence[str]) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m rewards.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rewards", nargs="+", metavar="MODULE_OR_FILE:NAME")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--deadline_s", type=float, default=2.0)
    options = parser.parse_args(arguments)

    token = os.environ.get(TOKEN_VARIABLE)
    if not token and not is_loopback(options.host):
        raise SystemExit(f"set {TOKEN_VARIABLE} before listening on {options.host}")
    with (
        start_pool(options.rewards, options.workers, options.deadline_s) as pool,
        RewardServer(
            pool, token or secrets.token_urlsafe(32), options.host, options.port
        ) as server,
    ):
        if not token:
            print(f"{TOKEN_VARIABLE}={server.token}", flush=True)
        print(f"{', '.join(pool.names)} at {server.url}", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            # `stop` waits for `serve` to end, and handlers run on the thread that serves.
            signal.signal(number, lambda *_: threading.Thread(target=server.stop).start())
        server.serve()


if __name__ == "__main__":
    main(sys.argv[1:])
