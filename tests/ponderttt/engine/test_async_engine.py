"""The engine's thread behind an event loop: order, cancellation, overload, shutdown, failure."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ponderttt.adaptation.params import TTTParams
from ponderttt.adaptation.update import Writer
from ponderttt.engine.admission import Admission
from ponderttt.engine.async_engine import MAX_PENDING_EVENTS, AsyncEngine, EventStream
from ponderttt.engine.core import EngineCore
from ponderttt.engine.outputs import (
    DoneEvent,
    ErrorEvent,
    Event,
    FinishEvent,
    PromptEvent,
    TokenEvent,
)
from ponderttt.engine.request import AdaptRequest, GenerateRequest, Tenant
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.engine.sequence_factory import SequenceFactory
from ponderttt.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PonderError,
    PromptTooLongError,
    StoreError,
    UnavailableError,
)
from ponderttt.sessions.config import StoreConfig
from tests.ponderttt.engine import harness
from tests.ponderttt.sessions.stores import attached

OFF = TTTParams(gate="off")
SHORT = replace(harness.GREEDY, max_tokens=6)
LONG = replace(harness.GREEDY, max_tokens=450)

pytestmark = pytest.mark.timeout(60)


def ask(sampling: SamplingParams = SHORT, ttt: TTTParams = OFF) -> GenerateRequest:
    return GenerateRequest((5, 6, 7), sampling, ttt)


@asynccontextmanager
async def running(core: EngineCore) -> AsyncIterator[AsyncEngine]:
    """A started engine that is stopped in the end, whatever happened."""
    engine = AsyncEngine(core)
    engine.start()
    try:
        yield engine
    finally:
        await engine.stop(drain_seconds=0.0)


async def collect(stream: EventStream) -> harness.Outcome:
    return harness.Outcome([event async for event in stream])


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    while not condition():
        await asyncio.sleep(0.002)


class Brake:
    """Holds the engine's thread between two steps."""

    def __init__(self) -> None:
        self._go = threading.Event()
        self.held = threading.Event()

    def __call__(self, core: EngineCore) -> None:
        self.held.set()
        self._go.wait(timeout=30)

    def release(self) -> None:
        self._go.set()


@asynccontextmanager
async def held(engine: AsyncEngine) -> AsyncIterator[None]:
    brake = Brake()
    call = asyncio.create_task(engine.call(brake))
    await until(brake.held.is_set)
    try:
        yield
    finally:
        brake.release()
        await call


async def test_events_of_a_request_come_in_order_and_end_once(tiny_llama_dir: Path) -> None:
    sampling = replace(SHORT, prompt_logprobs=0, n=2)
    lone = harness.generate(harness.make_core(tiny_llama_dir), (5, 6, 7), sampling, OFF)
    async with running(harness.make_core(tiny_llama_dir)) as engine:
        stream = engine.submit(ask(sampling))
        got = await collect(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        await stream.aclose()
    kinds = [type(event) for event in got.events]
    assert kinds[0] is PromptEvent
    assert kinds[-1] is DoneEvent
    assert kinds.count(FinishEvent) == 2
    assert set(kinds[1:-1]) == {TokenEvent, FinishEvent}
    assert got.tokens == lone.tokens


async def test_many_requests_at_once_get_what_they_get_alone(tiny_llama_dir: Path) -> None:
    core = harness.make_core(tiny_llama_dir)
    prompts = [harness.text(tiny_llama_dir, n, 5 + 3 * n) for n in range(30)]
    lone = [
        harness.generate(harness.make_core(tiny_llama_dir), prompt, SHORT, OFF).tokens
        for prompt in prompts
    ]
    async with running(core) as engine:
        streams = [engine.submit(GenerateRequest(prompt, SHORT, OFF)) for prompt in prompts]
        outcomes = await asyncio.gather(*(collect(stream) for stream in streams))
    assert [outcome.tokens for outcome in outcomes] == lone
    assert harness.holdings(core) == (0, 0, {})


async def test_requests_from_many_tasks_with_learning_and_sessions_all_end(
    tiny_llama_dir: Path,
) -> None:
    core = harness.make_core(tiny_llama_dir, adapter_slots=3)

    async def client(engine: AsyncEngine, number: int) -> None:
        name = f"s{number}"
        await engine.call(lambda core: core.sessions.create(name, TTTParams()))
        ttt = TTTParams(session=name, gate="fixed", chunk_size=16)
        text = harness.text(tiny_llama_dir, number, 40)
        lesson = await collect(engine.submit(AdaptRequest((text,), ttt)))
        assert lesson.report.version_after == 3
        for again in range(3):
            later = replace(ttt, when="background" if again else "inline")
            got = await collect(engine.submit(GenerateRequest(text, SHORT, later)))
            assert got.report.version_before == 3
            assert len(got.tokens[0]) == 6

    async with running(core) as engine:
        await asyncio.gather(*(client(engine, number) for number in range(8)))
        await engine.stop(drain_seconds=20)
    assert harness.holdings(core)[1:] == (0, {f"s{n}": 0 for n in range(8)})


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (GenerateRequest(()), InvalidRequestError),
        (GenerateRequest((5,) * 600), PromptTooLongError),
        (GenerateRequest((5,), ttt=TTTParams(session="nobody")), NotFoundError),
    ],
)
async def test_request_that_cannot_run_is_refused_at_once(
    tiny_llama_dir: Path, request_: GenerateRequest, error: type[PonderError]
) -> None:
    async with running(harness.make_core(tiny_llama_dir)) as engine:
        with pytest.raises(error):
            engine.submit(request_)


async def test_request_beyond_the_queue_is_refused_at_once(tiny_llama_dir: Path) -> None:
    async with running(harness.make_core(tiny_llama_dir, max_waiting=3)) as engine:
        async with held(engine):
            streams = [engine.submit(ask()) for _ in range(3)]
            with pytest.raises(OverloadedError, match="3 requests are waiting"):
                engine.submit(ask())
        outcomes = await asyncio.gather(*(collect(stream) for stream in streams))
        assert all(outcome.done.generated_tokens == 6 for outcome in outcomes)
        assert (await collect(engine.submit(ask()))).ended


async def test_request_in_the_cores_queue_counts_and_a_running_one_does_not(
    tiny_llama_dir: Path,
) -> None:
    core = harness.make_core(tiny_llama_dir, max_waiting=1, max_num_seqs=1)
    async with running(core) as engine:
        first = engine.submit(ask(LONG))
        assert isinstance(await anext(first), TokenEvent)
        second = engine.submit(ask())
        await until(lambda: core.waiting == 1)
        with pytest.raises(OverloadedError):
            engine.submit(ask())
        await first.aclose()
        assert (await collect(second)).done.generated_tokens == 6


async def test_tenants_line_counts_what_is_still_on_its_way(tiny_llama_dir: Path) -> None:
    mine, other = Tenant("mine", max_waiting=2), Tenant("other", max_waiting=2)
    async with running(harness.make_core(tiny_llama_dir)) as engine:
        async with held(engine):
            streams = [engine.submit(replace(ask(), tenant=mine)) for _ in range(2)]
            with pytest.raises(OverloadedError, match="2 requests of yours"):
                engine.submit(replace(ask(), tenant=mine))
            streams.append(engine.submit(replace(ask(), tenant=other)))
        outcomes = await asyncio.gather(*(collect(stream) for stream in streams))
        assert all(outcome.done.generated_tokens == 6 for outcome in outcomes)


async def test_reader_who_falls_behind_gets_everything_in_few_events(tiny_llama_dir: Path) -> None:
    core = harness.make_core(tiny_llama_dir)
    sampling = replace(LONG, n=2, max_tokens=400, logprobs=0)
    async with running(core) as engine:
        expected = await collect(engine.submit(ask(sampling)))
        slow = engine.submit(ask(sampling))
        await until(lambda: engine.stats().running == 2)
        await until(lambda: engine.stats().running == 0)
        # The reader was away while 800 tokens were made.
        await asyncio.sleep(0.05)
        assert len(slow._events) <= MAX_PENDING_EVENTS + 8
        got = await collect(slow)
    assert len(expected.events) > 2 * MAX_PENDING_EVENTS
    assert got.texts == expected.texts
    assert got.tokens == expected.tokens
    assert got.logprobs == expected.logprobs
    assert got.reasons == expected.reasons
    assert got.done.generated_tokens == 800


# --- cancellation ---------------------------------------------------------------------------------


async def test_task_cancelled_while_it_waits_aborts_its_request(tiny_llama_dir: Path) -> None:
    core = harness.make_core(tiny_llama_dir)
    recorder = core.observer = harness.Recorder()
    async with running(core) as engine:
        task = asyncio.create_task(collect(engine.submit(ask(LONG))))
        await until(lambda: engine.stats().running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: engine.stats().running == 0)
        assert harness.holdings(core) == (0, 0, {})
        assert [outcome for outcome, _, _ in recorder.outcomes] == ["abort"]
        assert recorder.outcomes[0][2] < 450


async def test_stream_closed_early_aborts_its_request_alone(tiny_llama_dir: Path) -> None:
    core = harness.make_core(tiny_llama_dir)
    recorder = core.observer = harness.Recorder()
    async with running(core) as engine:
        one, two = engine.submit(ask(LONG)), engine.submit(ask())
        await anext(one)
        await one.aclose()
        await one.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(one)
        assert (await collect(two)).done.generated_tokens == 6
        await until(lambda: len(recorder.outcomes) == 2)
    assert sorted(outcome for outcome, _, _ in recorder.outcomes) == ["abort", "length"]


async def test_stream_closed_before_the_engine_knew_of_it_never_runs(tiny_llama_dir: Path) -> None:
    core = harness.make_core(tiny_llama_dir)
    recorder = core.observer = harness.Recorder()
    async with running(core) as engine:
        async with held(engine):
            await engine.submit(ask(LONG)).aclose()
        await until(lambda: bool(recorder.outcomes))
    assert recorder.outcomes == [("abort", 3, 0)]
    assert recorder.steps == []


async def test_stream_closed_after_its_end_aborts_nothing(tiny_llama_dir: Path) -> None:
    core = harness.make_core(tiny_llama_dir)
    recorder = core.observer = harness.Recorder()
    async with running(core) as engine:
        stream = engine.submit(ask())
        await collect(stream)
        await stream.aclose()
        await engine.call(lambda core: None)
    assert [outcome for outcome, _, _ in recorder.outcomes] == ["length"]


# --- calls ----------------------------------------------------------------------------------------


async def test_call_runs_in_the_engines_thread_and_returns_its_value(tiny_llama_dir: Path) -> None:
    core = harness.make_core(tiny_llama_dir)
    async with running(core) as engine:
        name = await engine.call(lambda core: threading.current_thread().name)
        assert name == "engine"
        session = await engine.call(lambda core: core.sessions.create("s", TTTParams()))
        assert core.sessions.get("s") is session


async def test_call_that_raises_raises_at_its_caller_and_harms_nobody(tiny_llama_dir: Path) -> None:
    async with running(harness.make_core(tiny_llama_dir)) as engine:
        with pytest.raises(NotFoundError, match="'nobody'"):
            await engine.call(lambda core: core.delete_session("nobody"))

        def odd(core: EngineCore) -> None:
            raise KeyboardInterrupt("odd")

        with pytest.raises(BaseException, match="odd"):
            await asyncio.shield(asyncio.ensure_future(_outcome(engine, odd)))
        assert engine.ready
        assert (await collect(engine.submit(ask()))).ended


async def _outcome(engine: AsyncEngine, function: Callable[[EngineCore], None]) -> None:
    """Turn what would end the test's own loop into an ordinary error."""
    try:
        await engine.call(function)
    except KeyboardInterrupt as error:
        raise RuntimeError(str(error)) from error


async def test_call_while_a_request_uses_the_session_is_between_its_steps(
    tiny_llama_dir: Path,
) -> None:
    core = harness.make_core(tiny_llama_dir)
    core.sessions.create("s", TTTParams())
    async with running(core) as engine:
        stream = engine.submit(ask(LONG, TTTParams(session="s", gate="off")))
        await anext(stream)
        with pytest.raises(ConflictError):
            await engine.call(lambda core: core.delete_session("s"))
        forked = await engine.call(lambda core: core.sessions.fork("s", "t"))
        assert forked.pins == 0
        await stream.aclose()
        await engine.call(lambda core: core.delete_session("s"))


async def test_call_whose_caller_gave_up_harms_nobody(tiny_llama_dir: Path) -> None:
    async with running(harness.make_core(tiny_llama_dir)) as engine:
        async with held(engine):
            task = asyncio.create_task(engine.call(lambda core: 1))
            await asyncio.sleep(0.01)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await engine.call(lambda core: 2) == 2


async def test_caller_whose_loop_is_closed_harms_nobody(tiny_llama_dir: Path) -> None:
    async with running(harness.make_core(tiny_llama_dir)) as engine:
        async with held(engine):

            def leave() -> None:
                async def begin() -> None:
                    engine.submit(ask())
                    task = asyncio.ensure_future(engine.call(lambda core: 1))
                    await asyncio.sleep(0)
                    task.cancel()

                loop = asyncio.new_event_loop()
                loop.run_until_complete(begin())
                loop.close()

            await asyncio.to_thread(leave)
        assert await engine.call(lambda core: 2) == 2
        await until(lambda: engine.stats().running == 0)
        assert engine.ready


# --- what is taken of a slow store ----------------------------------------------------------------


class SlowLocks:
    """Has whoever takes a lock of an engine's store wait, and perhaps fail."""

    def __init__(self, core: EngineCore, error: Exception | None = None) -> None:
        self.holds = attached(core.sessions).vault.holds
        self.asked, self.go = threading.Event(), threading.Event()
        self._error, self._hold = error, self.holds._locks.hold
        self.holds._locks.hold = self._slowly  # type: ignore[method-assign]

    def _slowly(self, key: str) -> None:
        self.asked.set()
        self.go.wait(timeout=30)
        if self._error is not None:
            raise self._error
        self._hold(key)

    @property
    def free(self) -> bool:
        """Whether nobody has, or wants, any lock, once whoever was taking one is through."""
        with self.holds._guard:
            wanted = self.holds._claims or self.holds._reserved
            return not wanted and self.holds._locks.held() == []


def _delete(engine: AsyncEngine) -> Coroutine[Any, Any, object]:
    return engine.delete_session("s")


def _create(engine: AsyncEngine) -> Coroutine[Any, Any, object]:
    return engine.new_session("t", lambda core, name: core.sessions.create(name, TTTParams()))


@pytest.mark.parametrize("act", [_delete, _create])
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("error", [None, StoreError("the store is gone")])
async def test_lock_that_comes_after_its_caller_has_gone_is_given_back(
    tiny_llama_dir: Path,
    tmp_path: Path,
    act: Callable[[AsyncEngine], Coroutine[Any, Any, object]],
    times: int,
    error: Exception | None,
) -> None:
    first = harness.make_core(tiny_llama_dir, store=StoreConfig(str(tmp_path)))
    first.sessions.create("s", TTTParams())
    first.close()
    core = harness.make_core(tiny_llama_dir, store=StoreConfig(str(tmp_path)))
    async with running(core) as engine:
        locks = SlowLocks(core, error)
        task = asyncio.create_task(act(engine))
        await until(locks.asked.is_set)
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0.01)
        locks.go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(until(lambda: locks.free), 5)
        assert core.sessions.names() == ["s"]
        if error is None:
            # Nothing stands in the way of the next one.
            await act(engine)


@pytest.mark.parametrize("act", [_delete, _create])
async def test_lock_that_cannot_be_had_is_its_callers_error(
    tiny_llama_dir: Path,
    tmp_path: Path,
    act: Callable[[AsyncEngine], Coroutine[Any, Any, object]],
) -> None:
    core = harness.make_core(tiny_llama_dir, store=StoreConfig(str(tmp_path)))
    core.sessions.create("s", TTTParams())
    async with running(core) as engine:
        locks = SlowLocks(core, StoreError("the store is gone"))
        locks.go.set()
        with pytest.raises(StoreError, match="the store is gone"):
            await act(engine)
        assert not locks.holds._claims
        assert not locks.holds._reserved


# --- stopping -------------------------------------------------------------------------------------


async def test_engine_before_its_start_and_after_its_end_is_unavailable(
    tiny_llama_dir: Path,
) -> None:
    engine = AsyncEngine(harness.make_core(tiny_llama_dir))
    assert not engine.ready
    with pytest.raises(UnavailableError, match="not started"):
        engine.submit(ask())
    with pytest.raises(UnavailableError):
        await engine.call(lambda core: None)
    engine.start()
    assert engine.ready
    await engine.stop(drain_seconds=5)
    assert not engine.ready
    assert engine.draining
    with pytest.raises(UnavailableError, match="shutting down"):
        engine.submit(ask())
    with pytest.raises(UnavailableError):
        await engine.call(lambda core: None)
    await engine.stop(drain_seconds=5)
    assert engine.failure is None


async def test_stop_lets_requests_finish_and_takes_no_more(tiny_llama_dir: Path) -> None:
    core = harness.make_core(tiny_llama_dir, max_num_seqs=2)
    others = set(threading.enumerate())
    async with running(core) as engine:
        streams = [engine.submit(ask(replace(SHORT, max_tokens=40))) for _ in range(5)]
        stop = asyncio.create_task(engine.stop(drain_seconds=30))
        await asyncio.sleep(0)
        assert not engine.ready
        with pytest.raises(UnavailableError):
            engine.submit(ask())
        outcomes = await asyncio.gather(*(collect(stream) for stream in streams))
        await stop
    assert [outcome.done.generated_tokens for outcome in outcomes] == [40] * 5
    assert not any(t.name == "engine" for t in set(threading.enumerate()) - others)


async def test_stop_at_its_deadline_cuts_requests_off_with_an_error(tiny_llama_dir: Path) -> None:
    core = harness.make_core(tiny_llama_dir, max_num_seqs=2)
    async with running(core) as engine:
        streams = [engine.submit(ask(LONG)) for _ in range(4)]
        await until(lambda: engine.stats().running == 2)
        begun = time.monotonic()
        await engine.stop(drain_seconds=0.05)
        assert time.monotonic() - begun < 5
        outcomes = await asyncio.gather(*(collect(stream) for stream in streams))
    for outcome in outcomes:
        assert isinstance(outcome.error, UnavailableError)
        assert "cut off" in str(outcome.error)
    assert harness.holdings(core) == (0, 0, {})


async def test_stop_does_not_wait_for_background_learning(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Writer.step

    def slowly(self: Writer, writes: Any) -> None:
        time.sleep(0.2)
        step(self, writes)

    monkeypatch.setattr(Writer, "step", slowly)
    core = harness.make_core(tiny_llama_dir)
    core.sessions.create("s", TTTParams())
    later = TTTParams(session="s", gate="fixed", chunk_size=16, when="background")
    async with running(core) as engine:
        prompt = harness.text(tiny_llama_dir, 0, 480)
        got = await collect(engine.submit(GenerateRequest(prompt, SHORT, later)))
        assert got.report.pending == 30
        begun = time.monotonic()
        await engine.stop(drain_seconds=20)
        assert time.monotonic() - begun < 5
    assert core.sessions.get("s").version < 30
    assert core.sessions.get("s").pins == 0


async def test_stop_waits_for_a_request_that_is_just_being_admitted(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = SequenceFactory.begin

    def slowly(self: SequenceFactory, *args: Any, **settings: Any) -> None:
        time.sleep(0.2)
        begin(self, *args, **settings)

    monkeypatch.setattr(SequenceFactory, "begin", slowly)
    async with running(harness.make_core(tiny_llama_dir)) as engine:
        stream = engine.submit(ask())
        await asyncio.sleep(0.05)
        await engine.stop(drain_seconds=30)
        assert (await collect(stream)).done.generated_tokens == 6


async def test_stop_at_the_moment_the_engine_falls_asleep_wakes_it(tiny_llama_dir: Path) -> None:
    engine = AsyncEngine(harness.make_core(tiny_llama_dir))

    class Racing(threading.Event):
        """Is set by `stop` just before the engine's thread clears it."""

        def clear(self) -> None:
            engine._stopping = True
            self.set()
            super().clear()

    engine._wake = Racing()
    engine.start()
    await asyncio.to_thread(engine._thread.join, 5)
    assert not engine._thread.is_alive()


async def test_engines_started_and_stopped_again_and_again_never_hang(
    tiny_llama_dir: Path,
) -> None:
    core = harness.make_core(tiny_llama_dir)
    for round_ in range(40):
        engine = AsyncEngine(core)
        engine.start()
        stream = engine.submit(ask()) if round_ % 2 else None
        await asyncio.wait_for(engine.stop(drain_seconds=0.0 if round_ % 3 else 10.0), 10)
        if stream is not None:
            assert (await asyncio.wait_for(collect(stream), 10)).ended
    assert harness.holdings(core) == (0, 0, {})


# --- failure --------------------------------------------------------------------------------------


class BrokenError(RuntimeError):
    """What no phase expects."""


def fail(*args: Any) -> Any:
    raise BrokenError("the engine broke")


@pytest.mark.parametrize("part", ["step", "stats"])
async def test_engine_that_fails_tells_everybody_and_takes_no_more(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    core = harness.make_core(tiny_llama_dir, max_num_seqs=2)
    async with running(core) as engine:
        streams = [engine.submit(ask(LONG)) for _ in range(4)]
        await until(lambda: engine.stats().running == 2)
        monkeypatch.setattr(core, part, fail)
        outcomes = await asyncio.gather(*(collect(stream) for stream in streams))
        for outcome in outcomes:
            assert isinstance(outcome.error, UnavailableError)
            assert "the engine broke" in str(outcome.error)
        await until(lambda: not engine._thread.is_alive())
        assert isinstance(engine.failure, BrokenError)
        assert not engine.ready
        with pytest.raises(UnavailableError):
            engine.submit(ask())
        with pytest.raises(UnavailableError):
            await engine.call(lambda core: None)


async def test_engine_that_fails_over_a_job_tells_those_behind_it(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = harness.make_core(tiny_llama_dir)
    async with running(core) as engine:
        async with held(engine):
            monkeypatch.setattr(core, "abort", fail)
            first, second = engine.submit(ask(LONG)), engine.submit(ask(LONG))
            await first.aclose()
            third = engine.submit(ask(LONG))
            await third.aclose()
            fourth = engine.submit(ask(LONG))
        for stream in (second, fourth):
            got = await collect(stream)
            assert isinstance(got.error, UnavailableError)
        assert isinstance(engine.failure, BrokenError)


async def test_engine_that_fails_and_cannot_clean_up_still_tells_everybody(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = harness.make_core(tiny_llama_dir)
    async with running(core) as engine:
        streams = [engine.submit(ask(LONG)) for _ in range(3)]
        await until(lambda: engine.stats().running == 3)
        monkeypatch.setattr(Admission, "release", fail)
        monkeypatch.setattr(core, "step", fail)
        for outcome in await asyncio.gather(*(collect(stream) for stream in streams)):
            assert isinstance(outcome.error, UnavailableError)


async def test_request_at_the_moment_the_engine_ends_is_not_left_waiting(
    tiny_llama_dir: Path,
) -> None:
    async with running(harness.make_core(tiny_llama_dir)) as engine:
        # As seen by a caller who looked just before the end.
        engine._stopping = True
        engine._wake.set()
        await until(lambda: not engine._thread.is_alive())
        engine._check_ready = lambda: None  # type: ignore[method-assign]
        with pytest.raises(UnavailableError):
            engine.submit(ask())


async def test_phase_that_raises_ends_its_requests_and_not_the_engine(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = harness.make_core(tiny_llama_dir)
    async with running(core) as engine:
        run = core._phases.run
        monkeypatch.setattr(core._phases, "run", fail)
        events: list[Event] = (await collect(engine.submit(ask()))).events
        assert isinstance(events[-1], ErrorEvent)
        assert isinstance(events[-1].error, BrokenError)
        monkeypatch.setattr(core._phases, "run", run)
        assert (await collect(engine.submit(ask()))).done.generated_tokens == 6
        assert engine.ready


async def test_stats_can_be_read_at_any_time(tiny_llama_dir: Path) -> None:
    core = harness.make_core(tiny_llama_dir)
    engine = AsyncEngine(core)
    assert engine.stats().running == 0
    async with running(core) as started:
        stream = started.submit(ask(LONG))
        await anext(stream)
        await until(lambda: started.stats().kv_tokens == 453)
        await stream.aclose()
        await until(lambda: started.stats().kv_tokens == 0)
