"""Generation by somebody else, played by a script: who is asked for what, and when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ponderttt.adaptation.params import TTTParams
from ponderttt.engine.core import EngineCore
from ponderttt.engine.generator import (
    Adapter,
    AdapterCounts,
    Arrival,
    Continuation,
    Drawn,
    Ended,
    Failed,
)
from ponderttt.engine.relay import part_seed
from ponderttt.engine.request import GenerateRequest
from ponderttt.engine.sampler import SampledToken
from ponderttt.engine.sampling_params import SamplingParams
from ponderttt.errors import InvalidRequestError, UnavailableError
from ponderttt.fast_weights.peft_format import import_adapter
from tests.ponderttt.engine import harness

OFF = TTTParams(gate="off")


class Script:
    """A `Generator` that does what the test says."""

    def __init__(self) -> None:
        self.started: list[Continuation] = []
        self.cancelled: list[str] = []
        self.published: list[Adapter] = []
        self.forgotten: list[str] = []
        self.closed = False
        self.on_arrival: Callable[[], None] = lambda: None
        self.on_published: Callable[[float], None] = lambda seconds: None
        self._arrived: list[Arrival] = []

    def start(self, continuation: Continuation) -> None:
        self.started.append(continuation)

    def cancel(self, continuation_id: str) -> None:
        self.cancelled.append(continuation_id)

    def arrivals(self) -> list[Arrival]:
        came, self._arrived = self._arrived, []
        return came

    def publish(self, adapter: Adapter) -> None:
        self.published.append(adapter)

    def forget(self, owner: str) -> None:
        self.forgotten.append(owner)

    def counts(self) -> AdapterCounts:
        return AdapterCounts()

    def close(self) -> None:
        self.closed = True

    # --- what the test makes it say ----------------------------------------------------------

    def draw(self, *tokens: int, of: int = -1) -> None:
        """Tokens of the continuation that was started last, or of another."""
        drawn = tuple(SampledToken(token, -1.0) for token in tokens)
        self._arrived.append(Drawn(self.started[of].id, drawn))

    def end(self, *, stopped: bool = False, of: int = -1) -> None:
        self._arrived.append(Ended(self.started[of].id, stopped))

    def fail(self, error: Exception) -> None:
        self._arrived.append(Failed(self.started[-1].id, error))


def make(directory: Path, **settings: Any) -> tuple[EngineCore, Script]:
    script = Script()
    core = harness.make_core(directory, generator=script, **settings)
    core.sessions.create("s", TTTParams())
    return core, script


def settle(core: EngineCore) -> None:
    """Step until there is nothing to do but to wait for the script."""
    for _ in range(1000):
        if not core.step():
            return
    raise AssertionError("the engine does not come to rest")


def ask(directory: Path, ttt: TTTParams, length: int = 100, **sampling: Any) -> GenerateRequest:
    params = replace(harness.GREEDY, **sampling)
    return GenerateRequest(harness.text(directory, 0, length), params, ttt)


def test_nothing_is_read_here_where_nothing_is_learned(tiny_llama_dir: Path) -> None:
    core, script = make(tiny_llama_dir)
    recorder = core.observer = harness.Recorder()
    request = ask(tiny_llama_dir, OFF, max_tokens=3)
    got = harness.submit(core, request)
    settle(core)
    (text,) = script.started
    assert (text.tokens, text.max_tokens, text.adapter) == (request.prompt_ids, 3, None)
    assert core.stats().kv_tokens == 0
    script.draw(7, 8)
    settle(core)
    assert not got.ended
    script.draw(9)
    settle(core)
    assert got.tokens == [[7, 8, 9]]
    assert got.reasons == {0: "length"}
    assert (got.done.prompt_tokens, got.done.generated_tokens) == (100, 3)
    assert recorder.steps == []
    assert len(recorder.first_tokens) == 1
    assert len(recorder.next_tokens) == 2
    assert not core.has_work


def test_prompt_is_learned_first_and_read_with_what_it_taught(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    core, script = make(tiny_llama_dir)
    got = harness.submit(core, ask(tiny_llama_dir, replace(harness.FIXED, session="s")))
    harness.step_until(core, lambda: core.sessions.get("s").version == 2)
    assert script.started == []
    settle(core)
    (text,) = script.started
    session = core.sessions.get("s")
    assert text.adapter is not None
    assert (text.adapter.owner, text.adapter.version) == ("s", session.version)
    assert text.adapter.digest == core.sessions.digest(session)
    text.adapter.write(tmp_path)
    fresh = core.bank.fresh_weights
    assert torch.equal(
        import_adapter(core.bank.layout, tmp_path, fresh), harness.weights(core, "s")
    )
    script.draw(*range(12))
    settle(core)
    assert got.report.version_after == session.version == 3
    # The next request finds it loaded.
    assert [adapter.version for adapter in script.published] == [3]


def test_same_prompt_teaches_the_same_as_where_we_generate_ourselves(tiny_llama_dir: Path) -> None:
    core, script = make(tiny_llama_dir)
    own = harness.make_core(tiny_llama_dir)
    own.sessions.create("s", TTTParams())
    request = ask(tiny_llama_dir, replace(harness.FIXED, session="s"))
    (expected,) = harness.run(own, request)
    got = harness.submit(core, request)
    settle(core)
    script.draw(*expected.tokens[0])
    settle(core)
    assert torch.equal(harness.weights(core, "s"), harness.weights(own, "s"))
    assert [c.loss_before for c in got.chunks] == [c.loss_before for c in expected.chunks]


def test_generated_text_is_learned_part_by_part(tiny_llama_dir: Path) -> None:
    core, script = make(tiny_llama_dir)
    ttt = replace(harness.FIXED, session="s", adapt_on="generated")
    request = ask(tiny_llama_dir, ttt, max_tokens=80, seed=5)
    tokens = harness.text(tiny_llama_dir, 1, 80)
    got = harness.submit(core, request)
    settle(core)
    for part, version in ((tokens[:32], 0), (tokens[32:64], 1), (tokens[64:], 2)):
        text = script.started[-1]
        assert text.max_tokens == len(part)
        assert (text.adapter.version if text.adapter else 0) == version
        assert text.tokens == request.prompt_ids + tokens[: len(text.tokens) - 100]
        script.draw(*part)
        script.end()
        settle(core)
    assert [text.seed for text in script.started] == [5, part_seed(5, 0, 32), part_seed(5, 0, 64)]
    assert len({text.seed for text in script.started}) == 3
    assert got.tokens == [list(tokens)]
    # The last token drawn is not read, whoever draws it.
    assert [(c.start, c.end, c.phase) for c in got.chunks] == [
        (100, 132, "generated"), (132, 164, "generated"), (164, 179, "generated"),
    ]  # fmt: skip
    assert core.sessions.get("s").version == 3
    assert script.started[-1] is script.started[2]
    assert harness.holdings(core)[1:] == (0, {"s": 0})


def test_background_answers_first_and_reads_in_idle_time(tiny_llama_dir: Path) -> None:
    core, script = make(tiny_llama_dir)
    own = harness.make_core(tiny_llama_dir)
    own.sessions.create("s", TTTParams())
    ttt = replace(harness.FIXED, session="s", adapt_on="both", when="background")
    request = ask(tiny_llama_dir, ttt, max_tokens=40)
    (expected,) = harness.run(own, request)
    got = harness.submit(core, request)
    settle(core)
    assert script.started[0].max_tokens == 40
    assert core.sessions.get("s").version == 0
    script.draw(*expected.tokens[0])
    settle(core)
    assert got.report.pending == expected.report.pending > 0
    # Not to the bit: the prompt is read in other pieces here.
    torch.testing.assert_close(harness.weights(core, "s"), harness.weights(own, "s"))
    assert [adapter.version for adapter in script.published] == [own.sessions.get("s").version]


def test_background_waits_for_texts_that_are_drawn_on_the_same_cores(tiny_llama_dir: Path) -> None:
    core, script = make(tiny_llama_dir)
    ttt = replace(harness.FIXED, session="s", when="background")
    harness.submit(core, ask(tiny_llama_dir, ttt, max_tokens=1))
    other = harness.submit(core, ask(tiny_llama_dir, OFF, max_tokens=1))
    settle(core)
    script.draw(5, of=0)
    settle(core)
    assert core.stats().background == 1
    assert core.sessions.get("s").version == 0
    script.draw(5, of=1)
    settle(core)
    assert other.ended
    assert core.sessions.get("s").version == 3
    assert not core.has_work


def test_siblings_are_continued_apart(tiny_llama_dir: Path) -> None:
    core, script = make(tiny_llama_dir)
    got = harness.submit(core, ask(tiny_llama_dir, OFF, n=3, max_tokens=2, seed=1))
    settle(core)
    assert len({text.seed for text in script.started}) == 3
    for number in (2, 0, 1):
        script.draw(number, number + 10, of=number)
    settle(core)
    assert got.tokens == [[0, 10], [1, 11], [2, 12]]
    assert got.done.generated_tokens == 6


def test_stop_string_is_seen_here_and_ends_the_work_elsewhere(tiny_llama_dir: Path) -> None:
    core, script = make(tiny_llama_dir)
    ids = core.tokenizer.encode("one two END three", add_special_tokens=False)
    got = harness.submit(core, ask(tiny_llama_dir, OFF, stop=("END",), max_tokens=50))
    settle(core)
    script.draw(*ids)
    script.end()  # it may have ended before it heard of it
    settle(core)
    assert got.texts == ["one two "]
    assert got.reasons == {0: "stop"}
    assert script.cancelled == [script.started[0].id]


def test_text_stopped_elsewhere_has_stopped(tiny_llama_dir: Path) -> None:
    core, script = make(tiny_llama_dir)
    got = harness.submit(core, ask(tiny_llama_dir, OFF))
    settle(core)
    script.draw(5)
    script.end(stopped=True)
    settle(core)
    assert got.reasons == {0: "stop"}
    assert got.tokens == [[5]]


def test_end_of_text_ends_it_unless_it_is_to_be_ignored(tiny_llama_dir: Path) -> None:
    core, script = make(tiny_llama_dir)
    ends = sorted(core.tokenizer.eos_token_ids)
    got = harness.submit(core, ask(tiny_llama_dir, OFF, ignore_eos=False, stop_token_ids=(3,)))
    settle(core)
    assert script.started[0].stop_ids == (3, *ends)
    script.draw(5, ends[-1])
    settle(core)
    assert got.reasons == {0: "stop"}
    harness.submit(core, ask(tiny_llama_dir, OFF, ignore_eos=True))
    settle(core)
    assert script.started[1].stop_ids == ()


def test_abort_cancels_what_is_drawn_elsewhere(tiny_llama_dir: Path) -> None:
    core, script = make(tiny_llama_dir)
    request = ask(tiny_llama_dir, replace(OFF, session="s"), n=2)
    got = harness.submit(core, request)
    settle(core)
    core.abort(request.request_id)
    assert script.cancelled == [text.id for text in script.started]
    script.draw(5)
    settle(core)
    assert got.events == []
    assert harness.holdings(core)[1:] == (0, {"s": 0})


def test_failure_ends_the_request_and_harms_no_session(tiny_llama_dir: Path) -> None:
    core, script = make(tiny_llama_dir)
    got = harness.submit(core, ask(tiny_llama_dir, replace(harness.FIXED, session="s")))
    settle(core)
    other = harness.submit(core, ask(tiny_llama_dir, OFF, max_tokens=1))
    settle(core)
    script.draw(4)
    script._arrived.insert(0, Failed(script.started[0].id, UnavailableError("vLLM is down")))
    before = harness.weights(core, "s")
    settle(core)
    assert isinstance(got.error, UnavailableError)
    assert other.tokens == [[4]]
    assert torch.equal(harness.weights(core, "s"), before)
    assert core.sessions.get("s").version == 3
    assert harness.holdings(core)[1:] == (0, {"s": 0})
    again = harness.submit(core, ask(tiny_llama_dir, replace(OFF, session="s"), max_tokens=1))
    settle(core)
    script.draw(4)
    settle(core)
    assert again.report.version_before == 3


def test_prompt_is_scored_here(tiny_llama_dir: Path) -> None:
    core, script = make(tiny_llama_dir)
    request = ask(tiny_llama_dir, OFF, prompt_logprobs=2, max_tokens=1)
    (expected,) = harness.run(harness.make_core(tiny_llama_dir), request)
    got = harness.submit(core, request)
    settle(core)
    assert got.prompt == expected.prompt
    script.draw(1)
    settle(core)
    assert got.tokens == [[1]]
    scored = harness.submit(core, ask(tiny_llama_dir, OFF, prompt_logprobs=2, max_tokens=0))
    settle(core)
    assert scored.done.generated_tokens == 0
    assert len(script.started) == 1


def test_weights_of_one_request_are_forgotten_with_it(tiny_llama_dir: Path) -> None:
    core, script = make(tiny_llama_dir)
    request = ask(tiny_llama_dir, harness.FIXED, max_tokens=1)
    harness.submit(core, request)
    settle(core)
    adapter = script.started[0].adapter
    assert adapter is not None
    assert adapter.owner == f"request:{request.request_id}"
    script.draw(1)
    settle(core)
    assert script.forgotten == [adapter.owner]
    assert script.published == []


def test_deleted_session_is_forgotten(tiny_llama_dir: Path) -> None:
    core, script = make(tiny_llama_dir)
    core.delete_session("s")
    assert script.forgotten == ["s"]


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_penalty_that_parts_would_forget_is_refused(tiny_llama_dir: Path, penalty: str) -> None:
    core, _ = make(tiny_llama_dir)
    values: dict[str, Any] = {penalty: 0.5}
    sampling = SamplingParams(**values)
    parts = TTTParams(session="s", gate="fixed", adapt_on="generated")
    with pytest.raises(InvalidRequestError, match=f"{penalty}: 0.5 .*adapt_on = 'prompt'"):
        core.prepare(GenerateRequest((1,), sampling, parts), lambda event: None)
    core.prepare(GenerateRequest((1,), sampling, replace(parts, when="background")), print)
    own = harness.make_core(tiny_llama_dir)
    own.sessions.create("s", TTTParams())
    own.prepare(GenerateRequest((1,), sampling, parts), lambda event: None)


def test_engine_that_is_closed_closes_its_generator(tiny_llama_dir: Path) -> None:
    core, script = make(tiny_llama_dir)
    core.close()
    assert script.closed
