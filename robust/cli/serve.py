"""`robust serve MODEL`: a model as an endpoint that can be attacked over a socket."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Annotated, cast

import typer

from robust.cli import options, settings
from robust.errors import ConfigError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="As for `robust eval`.")]
Host = Annotated[str, typer.Option("--host", metavar="HOST", help="Where to listen.")]
Port = Annotated[int, typer.Option("--port", metavar="PORT", help="0 takes a free one.")]
Answers = Annotated[str, typer.Option("--answers", metavar="KIND", help="scores or labels.")]
Auth = Annotated[
    str | None,
    typer.Option(
        "--auth",
        metavar="NAME",
        help="The environment variable with the Authorization header that requests must carry.",
        show_default=False,
    ),
]
Rate = Annotated[
    float | None,
    typer.Option("--rate", metavar="R", help="Points per second, at most.", show_default=False),
]
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve_model(
    model: Model,
    host: Host = "127.0.0.1",
    port: Port = 0,
    answers: Answers = "scores",
    auth: Auth = None,
    rate: Rate = None,
    budget: settings.Budget = None,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    bounds: options.Bounds = "0,1",
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Serve a model's answers over HTTP until it is stopped, for attacks on one's own model over a real socket."""
    settings.black_box(answers, budget, None, None)
    subject = options.make_subject(
        model, "digits", "linf", None, n=1, seed=0, weights=weights, mean=mean, std=std, bounds=bounds, device=device
    )  # fmt: skip
    secret = _secret(auth)
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port: {port} is no port; give 0 to 65535")
    from robust.models import load_model
    from robust.oracle import Answers as Kind
    from robust.serve import Server, desk_for

    loaded = load_model(
        subject.model,
        weights=weights,
        mean=subject.mean,
        std=subject.std,
        bounds=subject.bounds,
        device=device,
    )
    desk = desk_for(loaded, answers=cast("Kind", answers), budget=budget, rate=rate, secret=secret)
    with Server(desk, host, port) as server:
        print(
            json.dumps({"url": server.url, **desk.info()})
            if as_json
            else f"serving {desk.oracle.name} ({answers}) at {server.url}; stop it with Ctrl-C",
            flush=True,
        )
        if host not in _LOOPBACK and secret is None:
            print(
                "anybody who reaches this host may ask; --auth NAME asks for a secret",
                file=sys.stderr,
                flush=True,
            )
        _until_stopped(server)
        if not desk.lock.acquire(timeout=10):  # the batch under way gets its answer
            print("stopped in the middle of a batch", file=sys.stderr)
    if not as_json:
        print(f"stopped after {desk.points:,} points in {desk.requests:,} requests")


def _secret(name: str | None) -> str | None:
    if name is None:
        return None
    value = os.environ.get(name, "").strip()
    if not value:
        raise ConfigError(f"--auth: the environment variable {name} is not set")
    return value


def _until_stopped(server: object) -> None:
    """Serves in a thread until SIGINT or SIGTERM."""
    from robust.serve import Server

    assert isinstance(server, Server)
    stopped = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        stopped.wait()
    finally:
        server.shutdown()
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)
