"""Write the dashboard: `python docker/grafana/make_dashboard.py`.

Grafana's JSON repeats thirty lines for every panel; what differs between them is the table below.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).resolve().parent / "dashboards" / "ponderttt.json"
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}  # as provisioned
WIDTH, HEIGHT, COLUMNS = 8, 7, 3


def of(metric: str, selector: str = "") -> str:
    """A metric of the chosen servers."""
    return f'ponderttt_{metric}{{instance=~"$instance"{selector}}}'


def rate(metric: str, *by: str) -> str:
    """Events per second, summed over all but the labels `by`."""
    grouping = f" by ({', '.join(by)})" if by else ""
    return f"sum{grouping} (rate({of(metric)}[$__rate_interval]))"


def ratio(above: str, below: str, *by: str) -> str:
    """Mean of the first per one of the second, over the last interval."""
    return f"{rate(above, *by)} / {rate(below, *by)}"


def percentiles(histogram: str) -> list[tuple[str, str]]:
    """Median and tail."""
    buckets = rate(f"{histogram}_bucket", "le")
    return [(f"histogram_quantile({q}, {buckets})", f"p{round(q * 100)}") for q in (0.5, 0.9, 0.99)]


# Row → panels of (title, unit, queries of (expression, legend)).
ROWS: dict[str, list[tuple[str, str, list[tuple[str, str]]]]] = {
    "Traffic": [
        ("Requests by outcome", "reqps", [(rate("requests_total", "outcome"), "{{outcome}}")]),
        (
            "Running and waiting",
            "short",
            [
                (f"sum ({of('num_requests_running')})", "running"),
                (f"sum ({of('num_requests_waiting')})", "waiting"),
                (f"sum ({of('num_background')})", "to be learned when idle"),
            ],
        ),
        ("Refused: queue full", "reqps", [(rate("queue_rejections_total"), "429")]),
        (
            "HTTP answers by status",
            "reqps",
            [(rate("http_requests_total", "status"), "{{status}}")],
        ),
        (
            "Tokens per second",
            "short",
            [
                (rate("prompt_tokens_total"), "read"),
                (rate("generation_tokens_total"), "generated"),
                (rate("learned_tokens_total"), "learned"),
            ],
        ),
        ("KV cache in use", "percentunit", [(of("kv_cache_usage_perc"), "{{instance}}")]),
    ],
    "Latency": [
        ("Time to first token", "s", percentiles("time_to_first_token_seconds")),
        ("Time per output token", "s", percentiles("time_per_output_token_seconds")),
        ("Request, end to end", "s", percentiles("e2e_request_latency_seconds")),
        (
            "Time by phase (share of a second)",
            "percentunit",
            [(rate("step_seconds_sum", "phase"), "{{phase}}")],
        ),
        (
            "Tokens per phase, mean",
            "short",
            [(ratio("iteration_tokens_sum", "iteration_tokens_count", "phase"), "{{phase}}")],
        ),
    ],
    "Learning": [
        ("Chunks by action", "cps", [(rate("chunks_total", "action"), "{{action}}")]),
        ("Chunks by reason", "cps", [(rate("chunks_total", "reason"), "{{reason}}")]),
        ("Rollbacks by cause", "cps", [(rate("rollbacks_total", "cause"), "{{cause}}")]),
        (
            "Cost per chunk, × forward",
            "short",
            [
                (ratio("cost_nominal_total", "chunks_total"), "nominal"),
                (ratio("cost_measured_total", "chunks_total"), "measured"),
            ],
        ),
        (
            "Time spent on chunks (share of a second)",
            "percentunit",
            [(rate("cost_seconds_total", "phase"), "{{phase}}")],
        ),
        (
            "Loss, nats per token, mean",
            "short",
            [
                (ratio("loss_before_sum", "loss_before_count"), "as read, all chunks"),
                (ratio("loss_after_sum", "loss_after_count"), "after learning, learned chunks"),
            ],
        ),
    ],
    "Sessions and caches": [
        ("Sessions", "short", [(of("sessions"), "{{instance}}")]),
        (
            "Bank of fast weights",
            "short",
            [
                (f"sum ({of('bank_slots_occupied')})", "occupied"),
                (f"sum ({of('bank_slots')})", "slots"),
            ],
        ),
        (
            "Evictions",
            "cps",
            [
                (rate("session_evictions_total"), "bank to RAM"),
                (rate("session_store_evictions_total"), "RAM to store"),
                (rate("prefix_cache_evictions_total", "kind"), "prefix cache, {{kind}}"),
            ],
        ),
        (
            "Prefix cache: share of tokens found",
            "percentunit",
            [
                (
                    ratio("prefix_cache_hits_total", "prefix_cache_queries_total", "kind"),
                    "{{kind}}",
                )
            ],
        ),
        (
            "Prefix cache: size",
            "bytes",
            [(f"sum by (kind) ({of('prefix_cache_bytes')})", "{{kind}}")],
        ),
    ],
    "Session store": [
        (
            "Commits and loads",
            "cps",
            [
                (rate("session_store_commit_seconds_count"), "commits"),
                (rate("session_store_load_seconds_count"), "loads"),
            ],
        ),
        (
            "Time of a commit and of a load, mean",
            "s",
            [
                (
                    ratio("session_store_commit_seconds_sum", "session_store_commit_seconds_count"),
                    "commit",
                ),
                (
                    ratio("session_store_load_seconds_sum", "session_store_load_seconds_count"),
                    "load",
                ),
            ],
        ),
        ("Bytes written", "Bps", [(rate("session_store_bytes_total"), "committed")]),
        (
            "Failures and recoveries",
            "cps",
            [
                (rate("session_store_failures_total"), "failures"),
                (rate("session_store_recoveries_total"), "fallen back to an older version"),
            ],
        ),
        (
            "Not saved yet",
            "s",
            [(of("session_store_unsaved_seconds"), "oldest change, {{instance}}")],
        ),
        (
            "Sessions not saved, and not readable",
            "short",
            [
                (f"sum ({of('session_store_unsaved')})", "not saved yet"),
                (f"sum ({of('session_store_unreadable')})", "not readable"),
            ],
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row, contents in ROWS.items():
        place = {"h": 1, "w": WIDTH * COLUMNS, "x": 0, "y": y}
        panels.append({"id": len(panels) + 1, "type": "row", "title": row, "gridPos": place})
        panels[-1]["panels"] = []
        y += 1
        for index, (title, unit, queries) in enumerate(contents):
            line, column = divmod(index, COLUMNS)
            place = {"h": HEIGHT, "w": WIDTH, "x": column * WIDTH, "y": y + line * HEIGHT}
            panels.append(panel(len(panels) + 1, title, unit, queries, place))
        y += -(-len(contents) // COLUMNS) * HEIGHT
    return {
        "uid": "ponderttt",
        "title": "PonderTTT",
        "tags": ["ponderttt"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [INSTANCE]},
        "annotations": {"list": []},
        "panels": panels,
    }


def panel(
    number: int, title: str, unit: str, queries: list[tuple[str, str]], place: dict[str, int]
) -> dict[str, Any]:
    """A time series of each query."""
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "expr": expression,
                "legendFormat": legend,
                "range": True,
            }
            for index, (expression, legend) in enumerate(queries)
        ],
    }


INSTANCE = {
    "name": "instance",
    "label": "Server",
    "type": "query",
    "datasource": DATASOURCE,
    "query": {"query": "label_values(ponderttt_build_info, instance)", "refId": "instance"},
    "definition": "label_values(ponderttt_build_info, instance)",
    "refresh": 2,
    "multi": True,
    "includeAll": True,
    "allValue": ".*",
    "current": {"text": "All", "value": "$__all"},
}


def text() -> str:
    """The file's text."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(text())
