"""Prometheus metrics. Where vLLM counts the same quantity, its name with our prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from ponderttt import __version__
from ponderttt.engine.observer import StepRecord
from ponderttt.engine.outputs import Choice, ChunkReport
from ponderttt.engine.stats import EngineStats
from ponderttt.sessions.stats import StoreStats

# Editors live below 0.3 s, batch jobs above 60 s.
_LATENCY = (
    0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75,
    1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_LOSS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0)
_SUCCESS = ("stop", "length", "adapted")


class Metrics:
    """All metrics of one server, in a registry of its own; an `EngineObserver`.

    Args:
        model_name: label of `ponderttt_build_info`.
        stats: gives the engine's counts; called at every scrape.
    """

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_StatsCollector(stats))
        self._make_request_metrics()
        self._make_learning_metrics()
        self._publish = self._histogram(
            "adapter_publish_seconds", "From fast weights to an adapter loaded in vLLM.", _LATENCY
        )
        build = Info("ponderttt_build", "What is running.", registry=self.registry)
        build.info({"version": __version__, "model": model_name})

    def _make_request_metrics(self) -> None:
        counter, histogram = self._counter, self._histogram
        self._http = counter(
            "http_requests", "HTTP requests answered.", "method", "route", "status"
        )
        self._rejections = counter(
            "queue_rejections", "Requests refused because the queue is full."
        )
        self._requests = counter("requests", "Requests ended, by outcome.", "outcome")
        self._success = counter(
            "request_success", "Requests answered in full, by reason of the end.", "finished_reason"
        )
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts and documents read.")
        self._generation_tokens = counter("generation_tokens", "Tokens generated.")
        self._ttft = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _LATENCY
        )
        self._tpot = histogram(
            "time_per_output_token_seconds", "Between one token and the next.", _LATENCY
        )
        self._itl = histogram(
            "inter_token_latency_seconds", "The same, by vLLM's newer name.", _LATENCY
        )
        self._e2e = histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its end.", _LATENCY
        )
        self._step_seconds = histogram("step_seconds", "Wall time of a phase.", _LATENCY, "phase")
        self._step_tokens = histogram(
            "iteration_tokens", "Tokens computed in one phase.", _ROWS, "phase"
        )

    def _make_learning_metrics(self) -> None:
        counter, histogram = self._counter, self._histogram
        self._chunks = counter(
            "chunks", "Chunks dealt with, by action and by reason.", "action", "reason"
        )
        self._learned = counter("learned_tokens", "Tokens of chunks that an update was kept of.")
        self._rollbacks = counter("rollbacks", "Updates rolled back, by what they did.", "cause")
        self._answers = counter(
            "session_answers",
            "Requests in sessions whose prompts told whose weights answer: the session's, or base.",
            "weights",
        )
        self._nominal = counter("cost_nominal", "Nominal cost of chunks, × forward.", "phase")
        self._measured = counter("cost_measured", "Measured cost of chunks, × forward.", "phase")
        self._chunk_seconds = counter("cost_seconds", "Wall time of chunks.", "phase")
        self._before = histogram("loss_before", "Loss of a chunk as it is read, nats.", _LOSS)
        self._after = histogram("loss_after", "Loss of a learned chunk afterwards, nats.", _LOSS)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"ponderttt_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(f"ponderttt_{name}", text, labels, buckets=buckets, registry=self.registry)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    # --- the server tells -----------------------------------------------------------------------

    def answered(self, method: str, route: str, status: int) -> None:
        """An HTTP request has been answered; `route` is the path's pattern."""
        self._http.labels(method, route, str(status)).inc()

    def rejected(self) -> None:
        """A request was refused because the queue is full."""
        self._rejections.inc()

    # --- the engine tells (EngineObserver) ----------------------------------------------------

    def step(self, record: StepRecord) -> None:
        """A phase has run."""
        self._step_seconds.labels(record.kind).observe(record.seconds)
        self._step_tokens.labels(record.kind).observe(record.tokens)

    def first_token(self, seconds: float) -> None:
        """A request's first token."""
        self._ttft.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """A further token."""
        self._tpot.observe(seconds)
        self._itl.observe(seconds)

    def chunk(self, report: ChunkReport) -> None:
        """A chunk has been dealt with."""
        self._chunks.labels(report.action.name, report.reason).inc()
        self._nominal.labels(report.phase).inc(report.nominal)
        self._measured.labels(report.phase).inc(report.measured)
        self._chunk_seconds.labels(report.phase).inc(report.seconds)
        if report.rollback is not None:
            self._rollbacks.labels(report.rollback).inc()
        elif report.action.steps:
            self._learned.inc(report.end - report.start)
        if report.loss_before is not None:
            self._before.observe(report.loss_before)
        if report.loss_after is not None:
            self._after.observe(report.loss_after)

    def chosen(self, choice: Choice) -> None:
        """A request whose prompt told whose weights were to answer is complete."""
        self._answers.labels(choice.read).inc()

    def published(self, seconds: float) -> None:
        """Fast weights have been published."""
        self._publish.observe(seconds)

    def finished(
        self, outcome: str, prompt_tokens: int, generated_tokens: int, seconds: float
    ) -> None:
        """A request has ended."""
        self._requests.labels(outcome).inc()
        if outcome in _SUCCESS:
            self._success.labels(outcome).inc()
        self._prompt_tokens.inc(prompt_tokens)
        self._generation_tokens.inc(generated_tokens)
        self._e2e.observe(seconds)


class _StatsCollector(Collector):
    """Gauges that are read off the engine when somebody asks."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """The engine's counts of this moment."""
        stats = self._stats()
        gauges = {
            "num_requests_running": ("Sequences that are running.", stats.running),
            "num_requests_waiting": ("Requests that wait their turn.", stats.waiting),
            "num_background": ("Answers still to be learned in idle time.", stats.background),
            "kv_cache_usage_perc": (
                "Share of the KV cache in use, 0 to 1.",
                stats.kv_tokens / stats.kv_capacity if stats.kv_capacity else 0.0,
            ),
            "sessions": ("Sessions that exist.", stats.sessions),
            "bank_slots_occupied": ("Fast weights in the bank.", stats.bank_occupied),
            "bank_slots": ("Fast weights that the bank can hold.", stats.bank_capacity),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"ponderttt_{name}", text, value=value)
        yield CounterMetricFamily(
            "ponderttt_session_evictions",
            "Sessions moved out of the bank for others.",
            value=stats.evictions,
        )
        yield from _prefix_metrics(stats)
        yield from _adapter_metrics(stats)
        if stats.store is not None:
            yield from _store_metrics(stats.store)


def _store_metrics(store: StoreStats) -> Iterator[Metric]:
    """Of the session store, where there is one."""
    counters: dict[str, tuple[str, float]] = {
        "bytes": ("Bytes of committed versions.", store.commit_bytes),
        "failures": ("Commits, loads and deletions that failed.", store.failures),
        "recoveries": (
            "Loads that found the newest version damaged and fell back to an older one.",
            store.recoveries,
        ),
        "evictions": ("Sessions whose weights were left to the store alone.", store.put_away),
    }
    for name, (text, value) in counters.items():
        yield CounterMetricFamily(f"ponderttt_session_store_{name}", text, value=value)
    summaries = {
        "commit": ("Time of a session's commit.", store.commits, store.commit_seconds),
        "load": ("Time to read a session.", store.loads, store.load_seconds),
    }
    for name, (text, count, seconds) in summaries.items():
        yield SummaryMetricFamily(
            f"ponderttt_session_store_{name}_seconds", text, count_value=count, sum_value=seconds
        )
    gauges: dict[str, tuple[str, float]] = {
        "unsaved": ("Sessions with changes that are not committed yet.", store.unsaved),
        "unsaved_seconds": ("Age of the oldest of these changes.", store.unsaved_seconds),
        "unreadable": ("Stored sessions that can't be read.", store.unreadable),
    }
    for name, (text, value) in gauges.items():
        yield GaugeMetricFamily(f"ponderttt_session_store_{name}", text, value=value)


def _prefix_metrics(stats: EngineStats) -> Iterator[Metric]:
    """Of the prefix cache, by kind of entry: shared by all (trunk), of one session (adaptive)."""
    kinds = {"trunk": stats.prefix_trunk, "adaptive": stats.prefix_adaptive}
    counters = {
        "queries": "Prompt tokens looked up in the prefix cache.",
        "hits": "Prompt tokens found there; the others had to be computed.",
        "evictions": "Entries that made room for others.",
    }
    for name, text in counters.items():
        counter = CounterMetricFamily(f"ponderttt_prefix_cache_{name}", text, labels=["kind"])
        for kind, counts in kinds.items():
            counter.add_metric([kind], getattr(counts, name))
        yield counter
    held = GaugeMetricFamily(
        "ponderttt_prefix_cache_bytes", "Bytes of the entries held.", labels=["kind"]
    )
    for kind, counts in kinds.items():
        held.add_metric([kind], counts.nbytes)
    yield held


def _adapter_metrics(stats: EngineStats) -> Iterator[Metric]:
    """Of the vLLM server that generates; all zero where none does."""
    counts = stats.adapters
    gauges = {
        "loaded": ("Adapters loaded in vLLM.", counts.loaded),
        "slots": ("Adapters that may be loaded in vLLM at once.", counts.slots),
    }
    for name, (text, value) in gauges.items():
        yield GaugeMetricFamily(f"ponderttt_adapters_{name}", text, value=value)
    counters = {
        "adapter_hits": ("Texts that found their adapter loaded.", counts.hits),
        "adapter_loads": ("Adapters published and loaded.", counts.loads),
        "adapter_unloads": ("Adapters unloaded.", counts.unloads),
        "adapter_evictions": ("Adapters unloaded to make room for others.", counts.evictions),
        "vllm_retries": ("Texts that vLLM was asked for again.", counts.retries),
    }
    for name, (text, value) in counters.items():
        yield CounterMetricFamily(f"ponderttt_{name}", text, value=value)
    errors = CounterMetricFamily(
        "ponderttt_vllm_errors", "Failures of vLLM, by kind.", labels=["kind"]
    )
    for kind, value in counts.errors.items():
        errors.add_metric([kind], value)
    yield errors
