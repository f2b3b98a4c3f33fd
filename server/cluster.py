"""A cluster: replicas of the server under Ray Serve, with a session's requests at one of them.

    client ── Serve's HTTP proxy ── ingress ── replica ── session store
                                       └────── replica ──────┘

A session is to Serve what a model is in model multiplexing: requests that name it go to the replica
that has it loaded. Having it loaded means, here, having its lock in the store; so a request that
comes to the wrong replica all the same finds the session locked, and is sent again (see
`cluster_ingress.py`). A replica that is stopped stores its sessions and gives back their locks; the
locks of one that is killed end with it (on a local disk) or with their lease.
"""

from __future__ import annotations

import logging
from logging.config import dictConfig
from typing import Any

from server.cluster_ingress import create_ingress
from server.cluster_replica import Replica
from server.cluster_settings import ClusterSettings, check_cluster, portable
from server.logs import log_config

#: Name of the application in Serve.
APP = "ponderttt"
_REPLICA = "Replica"

# Beyond what they get to end: to store the sessions before the replica is killed, seconds.
_SAVE_SECONDS = 60.0
# Requests at a replica beyond those that its own queue takes: it answers 429 itself.
_SPARE_REQUESTS = 32
_ENDLESS = 100_000


def build_cluster(settings: ClusterSettings) -> Any:
    """The application for `serve.run`.

    Args:
        settings: of the cluster.
    Raises:
        InvalidRequestError: settings that can't work with several replicas.
    """
    from ray import serve

    check_cluster(settings)
    values = portable(settings)
    stop_seconds = settings.drain_seconds + _SAVE_SECONDS
    replicas = serve.deployment(
        _with_sessions_as_models(settings.adapter_slots + settings.ram_sessions),
        name=_REPLICA,
        **_scale(settings),
        max_ongoing_requests=settings.max_waiting + settings.max_num_seqs + _SPARE_REQUESTS,
        graceful_shutdown_timeout_s=stop_seconds,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={
            "num_cpus": settings.replica_cpus,
            "num_gpus": settings.replica_gpus,
        },
    )

    def ingress_app() -> Any:
        there = ClusterSettings(**values)
        dictConfig(log_config(there.log_format, there.log_level))
        # The replicas have more to say of each request.
        logging.getLogger("server.requests").setLevel(logging.WARNING)
        return create_ingress(there, serve.get_deployment_handle(_REPLICA, app_name=APP))

    ingress = serve.deployment(
        serve.ingress(ingress_app)(),
        name="Ingress",
        num_replicas=settings.ingresses,
        max_ongoing_requests=_ENDLESS,
        graceful_shutdown_timeout_s=stop_seconds,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(replicas.bind(values))


def _with_sessions_as_models(most: int) -> type[Replica]:
    """The replica whose sessions Serve knows; beyond `most`, the longest unused are let go."""
    from ray import serve

    hold = serve.multiplexed(Replica.hold, max_num_models_per_replica=most)
    return type(_REPLICA, (Replica,), {"hold": hold})


def _scale(settings: ClusterSettings) -> dict[str, Any]:
    """A fixed number of replicas, or one steered by their queues."""
    if settings.most_replicas == settings.replicas:
        return {"num_replicas": settings.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": settings.replicas,
            "max_replicas": settings.most_replicas,
            "target_ongoing_requests": settings.target_requests,
        }
    }


def from_arguments(arguments: dict[str, Any]) -> Any:
    """The application, for Serve's own config files (`import_path: server.cluster:from_arguments`).

    Args:
        arguments: settings, as `args` in that file.
    Raises:
        InvalidRequestError: an unknown setting, or a wrong value.
    """
    from server.settings_sources import load_settings

    return build_cluster(load_settings(arguments, kind=ClusterSettings))
