"""The dashboard's queries, as Grafana would send them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.docker.dockerfile import ROOT

DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "ponderttt.json"

_METRIC = re.compile(r"\bponderttt_\w+")


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel.

    Args:
        panel, legend: as people see them.
        expression: PromQL with Grafana's variables in it.
    """

    panel: str
    legend: str
    expression: str

    def promql(self, rate_interval: str = "60s") -> str:
        """For Prometheus: of all servers, over Grafana's interval for our scrape interval (4×)."""
        replaced = self.expression.replace("$__rate_interval", rate_interval)
        return replaced.replace("$instance", ".*")


def read_dashboard(path: Path = DASHBOARD) -> dict[str, Any]:
    """The dashboard."""
    dashboard: dict[str, Any] = json.loads(path.read_text())
    return dashboard


def queries(dashboard: dict[str, Any]) -> Iterator[Query]:
    """Of all panels, in order."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield Query(panel["title"], target["legendFormat"], target["expr"])


def metrics_in(expression: str) -> set[str]:
    """Names of our metrics in a query."""
    return set(_METRIC.findall(expression))
