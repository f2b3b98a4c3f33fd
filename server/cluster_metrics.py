"""The metrics of all replicas as one page, told apart by a label `replica`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from server.cluster_replica import Page


class IngressMetrics:
    """What the way in counts itself, and the pages that replicas give it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.repeats = Counter(
            "ponderttt_cluster_repeats",
            "Requests sent to a replica once more: the session was elsewhere, or the replica died.",
            ["reason"],
            registry=self.registry,
        )

    def page(self, pages: Sequence[Page]) -> bytes:
        """Everything in Prometheus' text format."""
        replicas = CollectorRegistry(auto_describe=False)
        replicas.register(_Merged(pages))
        return generate_latest(self.registry) + generate_latest(replicas)


class _Merged(Collector):
    def __init__(self, pages: Sequence[Page]) -> None:
        self._pages = pages

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "ponderttt_cluster_replicas", "Replicas that answer.", value=len(self._pages)
        )
        processes = GaugeMetricFamily(
            "ponderttt_cluster_replica",
            "1 for each replica, and where it runs.",
            labels=["replica", "host", "pid"],
        )
        families: dict[str, Metric] = {}
        for page in self._pages:
            processes.add_metric([page.replica, page.host, str(page.pid)], 1)
            for family in text_string_to_metric_families(page.text):
                merged = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                merged.samples += [
                    sample._replace(labels={**sample.labels, "replica": page.replica})
                    for sample in family.samples
                ]
        yield processes
        yield from families.values()
