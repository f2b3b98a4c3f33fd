"""What is seen of a chunk, against transformers' logits and eager attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from ponderttt.adaptation.observation import ChunkObservation, History
from ponderttt.adaptation.observe import MAX_PROBES, ChunkRead, Scores, observe, score
from ponderttt.models.decoder import Decoder
from tests.ponderttt import reference
from tests.ponderttt.engine import harness

LENGTH = 300
FIRST_ADAPTIVE = 2
# (start, end): a first chunk, a later one, one of more rows than a slice of logits, a short tail.
SPANS = [(0, 64), (64, 128), (100, 300), (296, 300)]
# Losses and entropies sum over a vocabulary whose logits reach 50 in these random models.
TOLERANCE = 1e-4


def assert_close(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@dataclass(frozen=True)
class Reference:
    """What transformers says of a text."""

    ids: Tensor
    logits: Tensor
    attention: Tensor


@cache
def expected(path: Path) -> Reference:
    ids = torch.tensor(reference.code_ids(path, LENGTH))
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        out = model(ids[None], output_attentions=True)
    return Reference(ids, out.logits[0], out.attentions[FIRST_ADAPTIVE][0])


@cache
@torch.inference_mode()
def read(path: Path) -> tuple[Decoder, ChunkRead]:
    """The whole text as serving leaves it behind."""
    decoder, _ = harness.load(path)
    ids = expected(path).ids
    cache_ = decoder.new_cache(LENGTH)
    batch = decoder.batch([(cache_, 0, LENGTH)])
    boundary = decoder.run(decoder.embed(ids, batch), 0, FIRST_ADAPTIVE, batch)
    top = decoder.run(boundary, FIRST_ADAPTIVE, decoder.config.num_layers, batch)
    return decoder, ChunkRead(ids, 0, LENGTH, boundary, decoder.normed(top), cache_)


def read_chunk(path: Path, start: int, end: int) -> tuple[Decoder, ChunkRead]:
    decoder, whole = read(path)
    chunk = ChunkRead(whole.token_ids[:end], start, end, whole.boundary, whole.final, whole.cache)
    return decoder, chunk


@torch.inference_mode()
def look(path: Path, start: int, end: int) -> tuple[Scores, ChunkObservation]:
    decoder, chunk = read_chunk(path, start, end)
    scores = score(decoder, chunk)
    history = History(loss_ema=1.5, ahead=3)
    return scores, observe(decoder, FIRST_ADAPTIVE, chunk, scores, "def f():", 64, history)


@pytest.fixture(params=reference.FAMILIES)
def path(request: pytest.FixtureRequest) -> Path:
    directory: Path = request.getfixturevalue(request.param)
    return directory


@pytest.mark.parametrize(("start", "end"), SPANS)
def test_losses_of_a_chunk_are_the_cross_entropies_of_the_full_logits(
    path: Path, start: int, end: int
) -> None:
    scores, seen = look(path, start, end)
    ref, first = expected(path), max(start, 1)
    losses = F.cross_entropy(ref.logits[first - 1 : end - 1], ref.ids[first:end], reduction="none")
    assert_close(scores.losses, losses)
    assert_close(seen.losses, losses)
    assert scores.loss == pytest.approx(float(losses.mean()), abs=1e-4)


@pytest.mark.parametrize(("start", "end"), SPANS)
def test_probes_of_a_chunk_have_the_entropies_of_the_full_logits(
    path: Path, start: int, end: int
) -> None:
    _, seen = look(path, start, end)
    logits = expected(path).logits[seen.probe_positions + start]
    distribution = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(
        seen.probe_entropy, distribution.entropy(), atol=TOLERANCE, rtol=TOLERANCE
    )
    torch.testing.assert_close(
        seen.probe_top1, distribution.probs.amax(dim=1), atol=TOLERANCE, rtol=TOLERANCE
    )


@pytest.mark.parametrize(("start", "end"), SPANS)
def test_attention_at_the_probes_is_that_of_eager_attention(
    path: Path, start: int, end: int
) -> None:
    _, seen = look(path, start, end)
    attention = expected(path).attention[:, seen.probe_positions + start, :end]
    assert seen.attention.shape == attention.shape
    torch.testing.assert_close(seen.attention, attention, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen.attention.sum(dim=-1), torch.ones(attention.shape[:2]))


def test_attention_beyond_a_sliding_window_is_zero(tiny_mistral_dir: Path) -> None:
    _, seen = look(tiny_mistral_dir, 128, 192)
    for row, probe in enumerate(seen.probe_positions.tolist()):
        visible = seen.attention[:, row].sum(dim=0).nonzero().squeeze(1)
        assert int(visible.min()) == probe + 128 - 31
        assert int(visible.max()) == probe + 128


@pytest.mark.parametrize(
    ("start", "end", "count"),
    [(0, 2, 1), (0, 17, 16), (0, 18, 16), (5, 7, 1), (64, 128, 16), (10, 290, 16), (90, 106, 15)],
)
def test_probes_of_any_chunk_are_spread_over_predictions_within_it(
    tiny_llama_dir: Path, start: int, end: int, count: int
) -> None:
    _, seen = look(tiny_llama_dir, start, end)
    probes = seen.probe_positions
    assert len(probes) == count <= MAX_PROBES
    assert (probes.diff() > 0).all()
    # The last token of a chunk predicts the next chunk, so it is not looked at.
    assert int(probes[0]) == 0
    assert int(probes[-1]) == (end - start - 2 if count > 1 else 0)


def test_scores_of_a_lone_first_token_are_empty(tiny_llama_dir: Path) -> None:
    decoder, chunk = read_chunk(tiny_llama_dir, 0, 1)
    scores = score(decoder, chunk)
    assert scores.losses.numel() == scores.probes.numel() == 0
    assert scores.loss == 0.0


def test_observation_of_a_chunk_holds_its_tokens_context_and_activations(
    tiny_llama_dir: Path,
) -> None:
    decoder, whole = read(tiny_llama_dir)
    _, seen = look(tiny_llama_dir, 64, 128)
    assert torch.equal(seen.token_ids, whole.token_ids[64:128])
    assert torch.equal(seen.context_ids, whole.token_ids[:64])
    assert torch.equal(seen.boundary, whole.boundary[64:128])
    assert torch.equal(seen.final, whole.final[64:128])
    assert (seen.start, seen.chunk_size, seen.text) == (64, 64, "def f():")
    assert seen.vocab_size == decoder.config.vocab_size
    assert seen.history.loss_ema == 1.5


def test_observation_of_a_chunk_does_not_depend_on_what_follows_it(tiny_llama_dir: Path) -> None:
    decoder, chunk = read_chunk(tiny_llama_dir, 64, 128)
    alone = ChunkRead(
        chunk.token_ids,
        64,
        128,
        chunk.boundary[:128].clone(),
        chunk.final[:128].clone(),
        chunk.cache,
    )
    with torch.inference_mode():
        one, two = score(decoder, chunk), score(decoder, alone)
    assert torch.equal(one.losses, two.losses)
    assert torch.equal(one.entropy, two.entropy)
