"""`/metrics` in Prometheus' format, counting what happened."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from ponderttt.adaptation.actions import Action
from ponderttt.engine.outputs import Choice, ChunkReport, ReadWeights
from ponderttt.engine.stats import EngineStats
from server.metrics import Metrics
from tests.helpers import source_text
from tests.server.live import PROMPT, Live

TEXT = source_text()[:1500]


def test_metrics_are_well_formed_and_all_ours(live: Live) -> None:
    answer = live.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = list(text_string_to_metric_families(answer.text))
    names = {family.name for family in families}
    assert all(name.startswith("ponderttt_") for name in names)
    assert all(family.documentation for family in families if not family.name.endswith("_created"))
    assert names >= {
        f"ponderttt_{name}"
        for name in (
            "num_requests_running", "num_requests_waiting", "time_to_first_token_seconds",
            "time_per_output_token_seconds", "inter_token_latency_seconds",
            "e2e_request_latency_seconds", "prompt_tokens", "generation_tokens", "learned_tokens",
            "requests", "request_success", "chunks", "cost_nominal", "cost_measured",
            "cost_seconds", "rollbacks", "loss_before", "loss_after", "sessions",
            "bank_slots_occupied", "bank_slots", "session_evictions", "queue_rejections",
            "kv_cache_usage_perc", "prefix_cache_queries", "prefix_cache_hits",
            "prefix_cache_evictions", "prefix_cache_bytes",
        )
    }  # fmt: skip


def test_latency_buckets_begin_at_five_milliseconds(live: Live) -> None:
    live.openai.completions.create(model=live.model, prompt=PROMPT, max_tokens=2)
    bounds = sorted(
        float(dict(labels)["le"])
        for name, labels in live.metrics()
        if name == "ponderttt_time_to_first_token_seconds_bucket"
    )
    assert bounds[0] == 0.005
    assert sum(bound <= 0.3 for bound in bounds) >= 8


def test_a_completion_moves_the_counters(live: Live) -> None:
    names = (
        "prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count", "time_per_output_token_seconds_count",
        "e2e_request_latency_seconds_count",
    )  # fmt: skip
    before = {name: live.value(name) for name in names}
    ended = live.value("requests_total", outcome="length")
    answer = live.openai.completions.create(
        model=live.model, prompt=PROMPT, max_tokens=7, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    # The answer may be here before the engine has entered the request's end.
    last = "e2e_request_latency_seconds_count"
    live.wait_for(last, before[last] + 1)
    moved = {name: live.value(name) - before[name] for name in names}
    assert moved == {
        "prompt_tokens_total": answer.usage.prompt_tokens,
        "generation_tokens_total": 7,
        "time_to_first_token_seconds_count": 1,
        "inter_token_latency_seconds_count": 6,
        "time_per_output_token_seconds_count": 6,
        "e2e_request_latency_seconds_count": 1,
    }
    assert live.value("requests_total", outcome="length") == ended + 1


def test_learning_moves_the_counters_as_its_report_says(live: Live) -> None:
    def value(name: str, **labels: str) -> float:
        return live.value(name, **labels)

    updates = {"action": "UPDATE_1", "reason": "fixed"}
    before = (
        value("chunks_total", **updates),
        value("learned_tokens_total"),
        value("cost_nominal_total", phase="prompt"),
        value("cost_measured_total", phase="prompt"),
        value("cost_seconds_total", phase="prompt"),
        value("loss_before_sum"),
        value("loss_after_count"),
    )
    report = live.adapt(live.new_session(), TEXT, gate="fixed", chunk_size=64)
    chunks = report["chunks"]
    learned = [c for c in chunks if c["action"] == "UPDATE_1"]
    assert len(learned) > 5
    assert value("chunks_total", **updates) == before[0] + len(learned)
    tokens = sum(c["tokens"][1] - c["tokens"][0] for c in learned)
    assert value("learned_tokens_total") == before[1] + tokens
    for name, at, field in (
        ("cost_nominal_total", 2, "nominal"),
        ("cost_measured_total", 3, "measured"),
        ("cost_seconds_total", 4, "seconds"),
    ):
        moved = value(name, phase="prompt") - before[at]
        assert abs(moved - sum(c[field] for c in chunks)) < 1e-6
    assert abs(value("loss_before_sum") - before[5] - sum(c["loss_before"] for c in chunks)) < 1e-6
    assert value("loss_after_count") == before[6] + len(learned)


def test_prompt_sent_again_moves_the_prefix_caches_counters_and_is_reported(live: Live) -> None:
    session = live.new_session(gate="off")

    def moved() -> dict[str, float]:
        return {
            f"{name}/{kind}": live.value(f"prefix_cache_{name}_total", kind=kind)
            for name in ("queries", "hits")
            for kind in ("trunk", "adaptive")
        }

    found: list[int | None] = []
    tokens, before = 0, moved()
    for _ in range(2):
        answer = live.openai.completions.create(
            model=live.model,
            prompt=TEXT[-400:],
            max_tokens=1,
            extra_body={"ttt": {"session": session}},
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        found.append(answer.usage.prompt_tokens_details.cached_tokens)
        tokens = answer.usage.prompt_tokens
    blocks = tokens // 64 * 64
    assert found == [0, blocks]
    assert blocks > 0
    # The counts are those of the last step that has ended, which may not be the answer's yet.
    queries = before["queries/trunk"] + 2 * tokens
    live.wait_for("prefix_cache_queries_total", queries, kind="trunk")
    change = {name: value - before[name] for name, value in moved().items()}
    # Of a prompt of whole blocks the last token is run all the same.
    adaptive = min(blocks, tokens - 1)
    assert change == {
        "queries/trunk": 2 * tokens, "queries/adaptive": 2 * tokens,
        "hits/trunk": blocks, "hits/adaptive": adaptive,
    }  # fmt: skip
    for kind in ("trunk", "adaptive"):
        assert live.value("prefix_cache_bytes", kind=kind) > 0
        assert live.value("prefix_cache_evictions_total", kind=kind) == 0


def test_http_answers_are_counted_by_route_not_by_path(live: Live) -> None:
    route = "/v1/sessions/{session_id}"
    before = live.value("http_requests_total", method="GET", route=route, status="404")
    for name in ("nobody", "noone"):
        live.http.get(f"/v1/sessions/{name}")
    after = live.value("http_requests_total", method="GET", route=route, status="404")
    assert after == before + 2
    unknown = live.value("http_requests_total", method="any", route="unknown", status="404")
    live.http.get("/no/such/page")
    again = live.value("http_requests_total", method="any", route="unknown", status="404")
    assert again == unknown + 1


def test_roll_back_is_counted_by_cause_and_teaches_nothing() -> None:
    metrics = Metrics("m", EngineStats)
    report = ChunkReport(
        index=0, phase="prompt", start=0, end=64, action=Action.SKIP, reason="rolled_back",
        loss_before=1.0, loss_after=None, cost=3.0, nominal=3.0, measured=2.0, seconds=0.1,
        rollback="norm",
    )  # fmt: skip
    metrics.chunk(report)
    text = metrics.render().decode()
    assert 'ponderttt_rollbacks_total{cause="norm"} 1.0' in text
    assert "ponderttt_learned_tokens_total 0.0" in text
    assert 'ponderttt_chunks_total{action="SKIP",reason="rolled_back"} 1.0' in text


def test_answers_are_counted_by_whose_weights_gave_them() -> None:
    metrics = Metrics("m", EngineStats)
    answers: list[ReadWeights] = ["session", "base", "base"]
    for read in answers:
        metrics.chosen(Choice(read, 1.0, 1.1, 0.02, 64))
    text = metrics.render().decode()
    assert 'ponderttt_session_answers_total{weights="session"} 1.0' in text
    assert 'ponderttt_session_answers_total{weights="base"} 2.0' in text
