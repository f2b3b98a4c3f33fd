"""The peers do the same work as we: the same tokens, the same losses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ponderttt.adaptation.actions import Action
from ponderttt.adaptation.params import AdaptOn, TTTParams
from ponderttt.adaptation.rules import UpdateRule
from ponderttt.bench.driving import greedy, mean_loss, run
from ponderttt.bench.hf_peer import HuggingFace
from ponderttt.bench.lab import Lab
from ponderttt.bench.peft_peer import Learns, PeftLoop
from ponderttt.fast_weights.layout import AdapterLayout, LoRAConfig

# Nothing is rolled back, so that both sides go the same way.
RULE = UpdateRule(learning_rate=1e-2, min_tokens=8, loss_tolerance=100.0, max_norm=1e6)
LORA = LoRAConfig(rank=4, alpha=8.0, layers=2, targets="all")
CHUNK = 32


@pytest.fixture
def loop(lab: Lab) -> PeftLoop:
    return PeftLoop.where_ours_sits(lab.path, lab.decoder, AdapterLayout(lab.decoder, LORA), RULE)


def learned(lab: Lab, prompt: tuple[int, ...], new: int, learns: AdaptOn) -> list[float]:
    """Our losses of the same chunks."""
    core = lab.core(lora=LORA, rule=RULE)
    core.sessions.create("ours", TTTParams())
    ttt = TTTParams(session="ours", action=Action.UPDATE_1, chunk_size=CHUNK, adapt_on=learns)
    (heard,) = run(core, [greedy(prompt, new, ttt)])
    return [loss for _, loss in heard.losses]


def test_generate_of_transformers_gives_our_tokens(lab: Lab) -> None:
    core, peer = lab.core(), HuggingFace(lab.path)
    for prompt in lab.rounds("greedy", 3, 24)[0]:
        (ours,) = run(core, [greedy(prompt, 20)])
        assert peer.generate(prompt, 20) == ours.tokens
        assert len(ours.tokens) == 20
        assert peer.first_token(prompt) == ours.tokens[0]


def test_prompt_losses_of_the_loop_are_ours(lab: Lab, loop: PeftLoop) -> None:
    # Nearly the same chunk six times, so that even a random model learns something.
    chunk = lab.stream("prompt").take(CHUNK - 1)
    prompt = tuple(token for number in range(6) for token in (number + 5, *chunk))
    outcome = loop.run(prompt, 1, CHUNK, "prompt")
    ours = learned(lab, prompt, 1, "prompt")
    assert [count for count, _ in outcome.losses] == [CHUNK - 1] + [CHUNK] * 5
    theirs = [loss for _, loss in outcome.losses]
    assert theirs[0] == pytest.approx(ours[0], rel=1e-5)
    # We predict a chunk's first token before the update of the chunk in front, the loop after it.
    assert theirs == pytest.approx(ours, rel=1e-3)
    unmoved = replace(RULE, learning_rate=1e-12)
    layout = AdapterLayout(lab.decoder, LORA)
    frozen = PeftLoop.where_ours_sits(lab.path, lab.decoder, layout, unmoved)
    assert frozen.run(prompt, 1, CHUNK, "prompt").losses[-1][1] > ours[-1] * 1.05


def test_generated_losses_of_the_loop_are_ours(lab: Lab, loop: PeftLoop) -> None:
    prompt = lab.stream("generated").take(24)
    outcome = loop.run(prompt, 2 * CHUNK + 16, CHUNK, "generated")
    ours = learned(lab, prompt, 2 * CHUNK + 16, "generated")
    # The last token of all is never read.
    assert [count for count, _ in outcome.losses] == [CHUNK, CHUNK, 15]
    assert len(ours) == 3
    assert outcome.losses[0][1] == pytest.approx(ours[0], rel=1e-3)


@pytest.mark.parametrize("learns", ["prompt", "generated"])
def test_loop_begins_anew_with_every_request(lab: Lab, loop: PeftLoop, learns: Learns) -> None:
    prompt = lab.stream("anew").take(2 * CHUNK)
    first = loop.run(prompt, CHUNK + 8, CHUNK, learns)
    assert loop.run(prompt, CHUNK + 8, CHUNK, learns) == first


def test_loop_of_full_depth_trains_every_projection(lab: Lab) -> None:
    loop = PeftLoop.full_depth(lab.path)
    names = {name for name, p in loop.model.named_parameters() if p.requires_grad}
    assert len(names) == 2 * lab.decoder.config.num_layers * len(lab.decoder.module_parts(0))
    prompt = lab.stream("full").take(3 * CHUNK)
    losses = loop.run(prompt, 4, CHUNK, "prompt").losses
    assert len(losses) == 3
    assert mean_loss(losses) > 0


def test_loop_where_ours_sits_trains_nothing_else(lab: Lab, loop: PeftLoop) -> None:
    trained = sum(p.numel() for p in loop.model.parameters() if p.requires_grad)
    assert trained == AdapterLayout(lab.decoder, LORA).size
