"""Prometheus' and Grafana's files fit each other, the compose file and our metrics.

That real Prometheus runs with them and every panel gets data: docker/check.sh prometheus.
"""

from __future__ import annotations

import runpy
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from ponderttt.engine.stats import EngineStats
from ponderttt.sessions.stats import StoreStats
from server.metrics import Metrics
from tests.docker.dockerfile import ROOT
from tests.docker.panels import DASHBOARD, metrics_in, queries, read_dashboard

DOCKER = ROOT / "docker"


def load(name: str) -> Any:
    return yaml.safe_load((DOCKER / name).read_text())


def exposed() -> set[str]:
    """Names of all samples that a server with a session store can give."""
    metrics = Metrics("tiny", lambda: EngineStats(store=StoreStats()))
    names = set()
    for family in text_string_to_metric_families(metrics.render().decode()):
        names |= {sample.name for sample in family.samples} | {family.name}
        if family.type == "counter":
            names.add(f"{family.name}_total")
        if family.type == "histogram":
            names |= {f"{family.name}_{end}" for end in ("bucket", "sum", "count")}
    return names


def test_dashboard_is_what_its_script_writes() -> None:
    script = runpy.run_path(str(DOCKER / "grafana" / "make_dashboard.py"))
    assert script["text"]() == DASHBOARD.read_text()


def test_every_panel_asks_for_metrics_that_exist() -> None:
    known = exposed()
    for query in queries(read_dashboard()):
        names = metrics_in(query.expression)
        assert names, query
        assert names <= known, query


def test_dashboard_shows_what_an_operator_has_to_see() -> None:
    shown = {name for query in queries(read_dashboard()) for name in metrics_in(query.expression)}
    assert {f"ponderttt_{name}" for name in (
        "requests_total", "num_requests_running", "num_requests_waiting", "queue_rejections_total",
        "time_to_first_token_seconds_bucket", "time_per_output_token_seconds_bucket",
        "prompt_tokens_total", "generation_tokens_total", "learned_tokens_total", "chunks_total",
        "cost_nominal_total", "cost_measured_total", "cost_seconds_total", "rollbacks_total",
        "loss_before_sum", "loss_after_sum", "sessions", "bank_slots_occupied", "bank_slots",
        "session_evictions_total", "prefix_cache_hits_total", "prefix_cache_queries_total",
        "session_store_commit_seconds_count", "session_store_failures_total",
        "session_store_unsaved_seconds",
    )} <= shown  # fmt: skip


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    panels = read_dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_dashboard_is_provisioned_with_the_data_source_that_its_panels_name() -> None:
    (source,) = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    for panel in read_dashboard()["panels"]:
        for target in panel.get("targets", ()):
            assert target["datasource"] == {"type": source["type"], "uid": source["uid"]}
    compose = load("compose.yaml")["services"]
    assert source["url"] == "http://prometheus:9090"
    assert "monitoring" in compose["grafana"]["networks"]
    assert "monitoring" in compose["prometheus"]["networks"]
    (provider,) = load("grafana/provisioning/dashboards/ponderttt.yaml")["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in compose["grafana"]["volumes"]


def test_prometheus_scrapes_the_server_with_its_key() -> None:
    config = load("prometheus/prometheus.yml")
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    assert job["authorization"]["credentials_file"] == "/run/secrets/metrics_key"
    assert load("compose.yaml")["services"]["prometheus"]["secrets"] == ["metrics_key"]
    assert all((DOCKER / "prometheus" / name).is_file() for name in config["rule_files"])


def test_alerts_are_about_metrics_that_exist_and_are_documented() -> None:
    known = exposed()
    manual = (ROOT / "docs" / "operations.md").read_text()
    rules = [rule for group in load("prometheus/alerts.yml")["groups"] for rule in group["rules"]]
    for rule in rules:
        assert metrics_in(rule["expr"]) <= known, rule["alert"]
        assert f"`{rule['alert']}`" in manual, rule["alert"]


def test_every_metric_is_documented() -> None:
    manual = (ROOT / "docs" / "operations.md").read_text()
    metrics = Metrics("tiny", lambda: EngineStats(store=StoreStats()))
    for family in text_string_to_metric_families(metrics.render().decode()):
        if family.name.endswith("_created"):
            continue
        assert f"`{family.name.removeprefix('ponderttt_')}" in manual, family.name
