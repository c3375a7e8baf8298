"""A model behind an http(s) endpoint: JSON batches in, scores or labels out, one sending at a time."""

from __future__ import annotations

import email.utils
import ipaddress
import json
import math
import os
import time
import urllib.parse
import urllib.request
from datetime import UTC, datetime
from typing import Any, NoReturn

import torch
import urllib3
from torch import Tensor
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ProxyError, SSLError

from robust import __version__
from robust.errors import ConfigError, ModelError
from robust.models.deployed import Asked, Endpoint
from robust.oracle import Answers, Oracle, Remote, Unanswered
from robust.wire import Encoding, pack, read_object, unpack

_REFUSED = (429, 503)  # nothing was processed
_LOST = (502, 504)  # a gateway's words: it may have been
_LARGEST = 1 << 28  # bytes of an answer
_CONNECT = 10.0  # seconds, at most, until there is a connection


def http(rest: str, asked: Asked, scheme: str = "http") -> Oracle:
    """An endpoint that takes JSON batches by POST; GET on its /info may tell what it is."""
    url = _address(f"{scheme}:{rest}")
    if asked.mean is not None or asked.std is not None:
        raise ModelError(f"{url} normalises for itself; leave out mean and std")
    if asked.device is not None:
        raise ModelError(f"{url} runs where it is; leave out device={asked.device}")
    backend = HttpBackend(url, asked.endpoint, answers=asked.answers)
    backend.introduce(asked.bounds)
    answers: Answers = backend.answers or "scores"
    backend.answers = answers
    return Oracle(
        backend,
        answers=answers,
        budget=asked.budget,
        classes=backend.classes or asked.classes,
        batch=min(asked.endpoint.batch, backend.most),
        retries=asked.endpoint.retries,
    )


def https(rest: str, asked: Asked) -> Oracle:
    """An endpoint over TLS that takes JSON batches by POST, and may tell what it is at /info."""
    return http(rest, asked, "https")


class HttpBackend(Remote):
    """An endpoint: see `robust.wire` for what it is sent and what it answers.

    Args:
        url: where batches are posted; settings: how; answers: what is wanted, None for what it gives.

    Attributes:
        info: what the endpoint says of itself; most: the most points it takes at once.
    """

    def __init__(self, url: str, settings: Endpoint, answers: Answers | None = None) -> None:
        self.url, self.settings, self.answers = url, settings, answers
        self.name = url.partition("?")[0]
        self.bounds, self.classes = (0.0, 1.0), None
        self.info: dict[str, Any] = {}
        self.most = 1 << 30
        self.encoding: Encoding = "json"
        self._secret = _secret(settings.auth)
        self._pool = _pool(url)
        self._ready = 0.0

    def introduce(self, bounds: tuple[float, float]) -> None:
        """Asks the endpoint what it is, and obeys; an endpoint that does not say is believed to be in `bounds`."""
        self.bounds = bounds
        self.info = self._asked_info()
        told = self.info.get("bounds")
        if told is not None:
            if not (
                isinstance(told, list) and len(told) == 2 and all(map(_number, told)) and told[0] < told[1]
            ):
                self._fail(f"says at /info that its bounds are {_short(told)}; [low, high] is right")
            self.bounds = (float(told[0]), float(told[1]))
            if tuple(bounds) not in ((0.0, 1.0), self.bounds):
                self._fail(f"takes inputs in {list(self.bounds)}; leave out other bounds")
        classes, most = self.info.get("classes"), self.info.get("batch")
        self.classes = classes if type(classes) is int and classes > 0 else None
        self.most = most if type(most) is int and most > 0 else self.most
        self.encoding = "base64" if "base64" in (self.info.get("encodings") or ()) else "json"
        gives = self.info.get("answers")
        if gives == "labels" and self.answers == "scores":
            self._fail("gives labels only; ask for answers=labels (--answers labels)")
        if self.answers is None and gives in ("scores", "labels"):
            self.answers = gives

    def digest(self) -> str:
        """What the endpoint says its model is, else its address."""
        told = self.info.get("digest")
        return told if isinstance(told, str) and 0 < len(told) <= 200 else f"endpoint:{self.name}"

    def describe(self) -> dict[str, Any]:
        """Address and settings; of the secret only the variable's name."""
        settings = self.settings
        return {
            "endpoint": self.name,
            "model": str(self.info.get("name", ""))[:200],
            "encoding": self.encoding,
            "timeout": settings.timeout,
            "rate": settings.rate,
            "auth": settings.auth,
        }

    def send(self, x: Tensor, key: str) -> Tensor:
        """See `Remote.send`."""
        self._pace(len(x))
        body = json.dumps({"inputs": pack(x.float(), self.encoding)}).encode()
        status, headers, raw = self._request("POST", self.url, body, {"Idempotency-Key": key})
        if status != 200:
            self._refused(status, headers, raw)
        try:
            content = read_object(raw)
        except ValueError as error:
            self._fail(f"answered {error}, but {_short(raw)}")
        return self._read(content, len(x))

    def _read(self, content: dict[str, Any], count: int) -> Tensor:
        """Scores (N, classes) or labels (N,), checked."""
        name = next((name for name in ("scores", "labels") if name in content), None)
        if name is None:
            self._fail(f"answered no scores and no labels, but {_short(content)}")
        if name == "labels" and self.answers == "scores":
            self._fail("gives labels only; ask for answers=labels (--answers labels)")
        try:
            answer = unpack(content[name])
        except ValueError as error:
            self._fail(f"answered with {error}")
        shape = (count,) if name == "labels" else (count, self.classes or answer.shape[-1])
        if tuple(answer.shape) != shape or 0 in shape:
            right = "one label each" if name == "labels" else "one row of scores each, of one length"
            self._fail(
                f"answered {name} of the shape {tuple(answer.shape)} to {count} points; {right} is right"
            )
        if name == "labels":
            if answer.is_floating_point() or int(answer.min()) < -1:
                self._fail("answered labels that are no classes 0, 1, …")
            return answer
        if not bool(answer.isfinite().all()):
            self._fail("answered scores that are not finite")
        self.classes = answer.shape[1]
        return answer.to(torch.float32)

    def _pace(self, points: int) -> None:
        """Waits until the rate allows so many points."""
        if self.settings.rate is None:
            return
        now = time.monotonic()
        if self._ready > now:
            time.sleep(self._ready - now)
        self._ready = max(now, self._ready) + points / self.settings.rate

    def _request(
        self, method: str, url: str, body: bytes | None = None, more: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (names in lower case) and body of one request.

        Raises:
            Unanswered: there is none; it says whether the other side may have read the request.
        """
        headers = {
            "Accept": "application/json",
            "User-Agent": f"robust-toolkit/{__version__}",
            **(more or {}),
        }
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._secret:
            headers["Authorization"] = self._secret
        limit = self.settings.timeout
        timeout = urllib3.Timeout(connect=min(limit, _CONNECT), read=limit)
        try:
            response = self._pool.request(
                method, url, body=body, headers=headers, timeout=timeout,
                retries=False, redirect=False, preload_content=False,
            )  # fmt: skip
        except SSLError as error:
            self._fail(f"cannot be trusted: {_reason(error)}")
        except (NewConnectionError, ConnectTimeoutError, ProxyError) as error:
            raise Unanswered(self._clean(f"no connection: {_reason(error)}"), spent=False) from None
        except (HTTPError, OSError) as error:
            raise Unanswered(self._clean(_reason(error)), spent=True) from None
        return (
            response.status,
            {name.lower(): text for name, text in response.headers.items()},
            self._body(response),
        )

    def _body(self, response: urllib3.BaseHTTPResponse) -> bytes:
        parts, size = [], 0
        try:
            for part in response.stream(1 << 16):
                parts.append(part)
                size += len(part)
                if size > _LARGEST:
                    self._fail(f"answered with more than {_LARGEST >> 20} MiB")
        except (HTTPError, OSError) as error:
            response.close()
            raise Unanswered(self._clean(f"the answer broke off: {_reason(error)}"), spent=True) from None
        response.release_conn()
        return b"".join(parts)

    def _refused(self, status: int, headers: dict[str, str], raw: bytes) -> NoReturn:
        """Raises what a status other than 200 means."""
        said = self._clean(f"{status}: {_said(raw)}")
        if status in _REFUSED + _LOST:
            raise Unanswered(said, spent=status in _LOST, wait=_seconds(headers.get("retry-after")))
        if status in (401, 403):
            name = self.settings.auth
            hint = f"is the value of {name} right?" if name else "does it want --endpoint auth=NAME?"
            self._fail(f"refuses with {said}; {hint}")
        if 300 <= status < 400:
            self._fail(
                f"is somewhere else ({status}): {_short(headers.get('location', 'nowhere'))}; give that address"
            )
        self._fail(f"answered {said}")

    def _asked_info(self) -> dict[str, Any]:
        """What GET /info says; an endpoint that has none is no error."""
        parts = urllib.parse.urlsplit(self.url)
        url = urllib.parse.urlunsplit(parts._replace(path=parts.path.rstrip("/") + "/info"))
        try:
            status, headers, raw = self._request("GET", url)
        except Unanswered as error:
            self._fail(f"does not answer: {error}")
        if status in (401, 403):
            self._refused(status, headers, raw)
        try:
            return read_object(raw) if status == 200 else {}
        except ValueError:
            return {}

    def _fail(self, text: str) -> NoReturn:
        raise ModelError(self._clean(f"{self.name} {text}"))

    def _clean(self, text: str) -> str:
        """One line without the secret, which an endpoint might repeat."""
        line = " ".join(text.split())
        for secret in filter(None, {self._secret, self._secret.partition(" ")[2]}):
            line = line.replace(secret, "***")
        return line


def _address(text: str) -> str:
    """A URL that can be asked and may be written down."""
    try:
        parts = urllib.parse.urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ModelError(f"{text!r} is no address ({error}); give http(s)://HOST[:PORT][/PATH]") from None
    if parts.username is not None or parts.password is not None:
        raise ModelError(
            f"leave user and password out of the address of {host}: it is written down; use auth=NAME"
        )
    if not host:
        raise ModelError(f"{text!r} names no host; give http(s)://HOST[:PORT][/PATH]")
    return urllib.parse.urlunsplit(parts._replace(fragment=""))


def _secret(name: str | None) -> str:
    """The value of the environment variable of that name; never shown."""
    if name is None:
        return ""
    value = os.environ.get(name, "").strip()
    if not value:
        raise ConfigError(f"auth={name}: the environment variable {name} is not set")
    if not (value.isascii() and value.isprintable()):
        raise ConfigError(f"auth={name}: its value holds characters that no header can have")
    return value


def _pool(url: str) -> urllib3.PoolManager:
    """Connections, through the proxy that the environment names unless the endpoint is on this machine."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or _loopback(host) or urllib.request.proxy_bypass(host):
        return urllib3.PoolManager()
    user = urllib.parse.urlsplit(proxy)
    if user.username is None:
        return urllib3.ProxyManager(proxy)
    basic = f"{urllib.parse.unquote(user.username)}:{urllib.parse.unquote(user.password or '')}"
    return urllib3.ProxyManager(proxy, proxy_headers=urllib3.make_headers(proxy_basic_auth=basic))


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reason(error: BaseException) -> str:
    """What went wrong, without urllib3's names of objects."""
    text = str(error).rpartition("Failed to establish a new connection: ")[2]
    text = text.removeprefix(text.partition("): ")[0] + "): ") if text.startswith("HTTP") else text
    return (text or type(error).__name__)[:200]


def _seconds(text: str | None) -> float:
    """What Retry-After says, in seconds or as a date; 0 where it says nothing."""
    if not text:
        return 0.0
    try:
        return max(float(int(text)), 0.0)
    except ValueError:
        pass
    try:
        then = email.utils.parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return 0.0
    return max((then - datetime.now(UTC if then.tzinfo else None)).total_seconds(), 0.0)


def _said(raw: bytes) -> str:
    """The endpoint's own line about an error, or how its answer begins."""
    try:
        error = read_object(raw).get("error")
    except ValueError:
        error = None
    return error[:300] if isinstance(error, str) else _short(raw)


def _short(content: Any) -> str:
    """How something begins, on one line."""
    text = content[:400].decode(errors="replace") if isinstance(content, bytes) else str(content)
    line = " ".join(text.split())
    return f"{line[:80]}…" if len(line) > 80 else (line or "nothing")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
