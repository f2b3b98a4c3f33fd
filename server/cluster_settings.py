"""What can be set when a cluster starts: a server's settings, and those of its replicas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ponderttt.errors import InvalidRequestError
from server.settings import Settings, setting

# How often a replica looks whether another one asks for a session that is idle here, seconds.
_HAND_OVER_SECONDS = 1.0
# What a session's lock may take to be free beyond what is certain, seconds.
_MARGIN_SECONDS = 5.0


class ClusterSettings(Settings):
    """Settings of all replicas, and how many there are. Unknown keys are refused."""

    replicas: int = setting(
        "Cluster", 2, "Replicas; the fewest, where --max-replicas allows for more.", ge=1
    )
    max_replicas: int | None = setting(
        "Cluster",
        None,
        "Most replicas: as many run as the queues ask for; by default always --replicas.",
        ge=1,
    )
    target_requests: float = setting(
        "Cluster",
        8.0,
        "Requests, running and waiting, per replica that the number of replicas is steered to.",
        gt=0,
    )
    replica_cpus: float = setting(
        "Cluster", 1.0, "CPU cores that Ray reserves for a replica; its threads, too.", gt=0
    )
    replica_gpus: float = setting(
        "Cluster", 0.0, "GPUs that Ray reserves for a replica, with --device cuda.", ge=0
    )
    ingresses: int = setting("Cluster", 1, "Processes that find each request's replica.", ge=1)
    ray_address: str | None = setting(
        "Cluster",
        None,
        "Ray cluster to run on (auto, or HOST:PORT of its head); by default one is started on this "
        "machine, and ends with this command.",
    )

    @property
    def hand_over_seconds(self) -> float | None:
        """How often to look whether another replica asks for an idle session."""
        return _HAND_OVER_SECONDS

    @property
    def most_replicas(self) -> int:
        """Replicas that there may be."""
        return self.max_replicas or self.replicas

    @property
    def replica_threads(self) -> int:
        """Threads of PyTorch in each replica."""
        return self.threads or max(1, math.floor(self.replica_cpus))

    @property
    def patience_seconds(self) -> float:
        """How long a request waits for a session whose replica died or is being replaced."""
        return max(self.session_lease_seconds, self.drain_seconds) + _MARGIN_SECONDS


def check_cluster(settings: ClusterSettings) -> None:
    """Refuse what can't work with several replicas.

    Raises:
        InvalidRequestError: says which setting, and what to do.
    """
    if settings.sessions == "memory":
        raise InvalidRequestError(
            "sessions",
            "memory is not shared by replicas; give a directory that all machines see, or a URL "
            "(--sessions s3://bucket/prefix)",
        )
    if settings.most_replicas < settings.replicas:
        raise InvalidRequestError(
            "max_replicas",
            f"{settings.max_replicas} is below replicas, {settings.replicas}; raise it, or lower "
            "--replicas",
        )
    if settings.device.startswith("cuda") and not settings.replica_gpus:
        raise InvalidRequestError(
            "replica_gpus",
            f"0 GPUs are reserved for a replica on device {settings.device}; give --replica-gpus 1",
        )
    if settings.device.startswith("cuda:"):
        raise InvalidRequestError(
            "device",
            f"{settings.device} names one GPU for all replicas; give --device cuda, Ray then shows "
            "each replica its own",
        )


def portable(settings: ClusterSettings) -> dict[str, Any]:
    """Settings for processes that were started in another directory; `ClusterSettings(**…)`."""
    values = settings.model_dump()
    for name, value in values.items():
        if isinstance(value, Path):
            values[name] = value.expanduser().absolute()
    for name in ("sessions", "model"):
        place = values[name]
        if place is not None and "://" not in place and "::" not in place:
            path = Path(place).expanduser()
            # A model may be a name instead.
            if name == "sessions" or path.exists():
                values[name] = str(path.absolute())
    return values
