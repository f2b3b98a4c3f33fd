"""`ponderttt cluster`. Its options are the fields of `ClusterSettings`."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import typer

from ponderttt.errors import InvalidRequestError, PonderError
from server.cli import given_options, options_from
from server.cluster_settings import ClusterSettings, check_cluster
from server.settings_sources import load_settings

_LOG = logging.getLogger("server.cluster")

# Ray's shared memory; nothing here is passed through it.
_OBJECT_STORE_BYTES = 100 * 1024 * 1024
_KNOCK_SECONDS = 5.0
_SERVE_LOGGING = {"log_level": "WARNING", "enable_access_log": False}


@options_from(ClusterSettings)
def cluster(context: typer.Context, **options: Any) -> None:
    """Serve with several replicas under Ray Serve; SIGHUP restarts them one by one."""
    config = options.pop("config")
    given = given_options(context, options)

    def settings() -> ClusterSettings:
        return load_settings(given, config, kind=ClusterSettings)

    first = settings()
    check_cluster(first)
    _require_serve()
    if first.ray_address is not None:
        deploy_there(first)
    else:
        _run_here(first, settings)


def _require_serve() -> None:
    # Ray would else report to its makers that it is used.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise InvalidRequestError(
            "replicas", "a cluster needs Ray Serve; pip install 'ponderttt[ray]'"
        ) from error


def deploy_there(settings: ClusterSettings) -> None:
    """Deploy, or update replica by replica, on a Ray cluster that goes on by itself."""
    import ray

    from server.runner import bind

    # Its port may be taken already, by what is to be replaced.
    with bind(settings.host, 0) as sock:
        _check_door(sock, settings)
    try:
        _knock(str(settings.ray_address))
        ray.init(address=settings.ray_address, log_to_driver=False, configure_logging=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidRequestError(
            "ray_address",
            f"there is no Ray cluster at {settings.ray_address!r} ({error}); start one by `ray "
            "start --head` and give auto or HOST:PORT, or leave out --ray-address",
        ) from error
    _deploy(settings)
    typer.echo(
        f"{settings.replicas} replicas of {settings.model} run on the Ray cluster, port "
        f"{settings.port} of its machines.\n`serve status` tells how they are; this command again "
        "replaces them one by one; `serve shutdown` ends them"
    )
    ray.shutdown()


def _knock(address: str) -> None:
    """Whether anybody listens there; Ray itself would try for minutes.

    Raises:
        OSError, ValueError: nobody, or there is no such address.
    """
    if address == "auto" or "://" in address:
        return
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        raise ValueError("no HOST:PORT")
    socket.create_connection((host.strip("[]"), int(port)), _KNOCK_SECONDS).close()


def _run_here(settings: ClusterSettings, reread: Callable[[], ClusterSettings]) -> None:
    """Serve on this machine until SIGTERM or SIGINT."""
    import ray

    from server.runner import base_url, bind

    with bind(settings.host, settings.port) as sock:
        _check_door(sock, settings)
        url, port = base_url(sock), sock.getsockname()[1]
    settings = settings.model_copy(update={"port": port})
    ended, again = threading.Event(), threading.Event()
    news = threading.Event()

    def on_signal(number: int, frame: object) -> None:
        if ended.is_set():
            raise KeyboardInterrupt  # told twice: not even the start is waited for
        (again if number == signal.SIGHUP else ended).set()
        news.set()

    ray.init(
        address="local",
        num_cpus=math.ceil(settings.most_replicas * settings.replica_cpus),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        configure_logging=False,
    )
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, on_signal)
    try:
        _deploy(settings)
        typer.echo(_banner(url, settings))
        while not ended.is_set():
            news.wait()
            news.clear()
            if again.is_set() and not ended.is_set():
                again.clear()
                _restart(reread, port)
    finally:
        _end()


def _check_door(sock: socket.socket, settings: ClusterSettings) -> None:
    from server.auth import check_exposure
    from server.keys import load_keys

    check_exposure(sock, settings)
    if settings.api_key_file is not None:
        load_keys(settings.api_key_file)


def _deploy(settings: ClusterSettings) -> None:
    """Start Serve where it does not run, and the application, replacing what it was.

    Raises:
        UnavailableError: the replicas do not start; those that run go on.
    """
    from ray import serve

    from server.cluster import APP, build_cluster
    from server.cluster_failure import start_failure

    serve.start(
        proxy_location="EveryNode",
        http_options={"host": settings.host, "port": settings.port},
        logging_config=_SERVE_LOGGING,
    )
    try:
        serve.run(build_cluster(settings), name=APP, logging_config=_SERVE_LOGGING)
    except RuntimeError as error:
        raise start_failure(serve.status().applications[APP]) from error


def _restart(reread: Callable[[], ClusterSettings], port: int) -> None:
    """Replace the replicas one by one, with the settings as they are now."""
    try:
        settings = reread().model_copy(update={"port": port})
        _deploy(settings)
    except PonderError as error:  # what runs goes on
        _LOG.error("the replicas are not restarted: %s", error)
    except Exception:
        _LOG.exception("the replicas are not restarted")
    else:
        typer.echo("all replicas are new")


def _end() -> None:
    """Let the replicas end what they do and store their sessions."""
    import ray
    from ray import serve

    serve.shutdown()
    ray.shutdown()


def _banner(url: str, settings: ClusterSettings) -> str:
    replicas = f"{settings.replicas}"
    if settings.most_replicas > settings.replicas:
        replicas += f" to {settings.most_replicas}"
    return f"""\
PonderTTT serves {settings.model} at {url} with {replicas} replicas
  documentation {url}/docs · metrics {url}/metrics"""
