"""Sessions of different keys on one server: neither load nor learning of one reaches the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from tests.helpers import source_text
from tests.server.live import Live, live_server
from tests.server.test_auth import bearer_of, key_file

#: Of log-probabilities down to -15: batches differ in size, and updates make more of that.
TOLERANCE = 1e-3
#: After several updates in batches with others: a gradient of about zero is rounded to one side or
#: the other, and Adam makes a whole step of either.
CROWDED_TOLERANCE = 1e-2

TEXTS = [source_text()[at : at + 1200] for at in (0, 3000, 6000, 9000)]
PROBE = source_text()[12_000:12_600]
SECRET = "PASSWORD = 'correct horse battery staple 7391'\n"


@contextmanager
def server(
    directory: Path, tmp_path: Path, names: Sequence[str] = ("alice", "bob"), **options: Any
) -> Iterator[Live]:
    """A server with keys of these names, each with a session `repo`."""
    path = key_file(tmp_path, *names, "root")
    with live_server(directory, api_key_file=path, **{"learning_rate": 0.02, **options}) as live:
        for name in names:
            made = live.http.post("/v1/sessions", json={"id": "repo"}, headers=bearer_of(name))
            assert made.status_code == 201
        yield live


def teach(live: Live, name: str, text: str, action: str = "UPDATE_2") -> dict[str, Any]:
    body = {"documents": [{"text": text}], "action": action, "chunk_size": 64}
    answer = live.http.post("/v1/sessions/repo/adapt", json=body, headers=bearer_of(name))
    assert answer.status_code == 200, answer.text
    report: dict[str, Any] = answer.json()
    return report


def scores(live: Live, name: str, prompt: str) -> torch.Tensor:
    """Log-probabilities of the prompt's tokens, and of the 5 likeliest at each place."""
    body = {
        "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 5,
        "ttt": {"session": "repo", "gate": "off"},
    }  # fmt: skip
    answer = live.http.post("/v1/completions", json=body, headers=bearer_of(name))
    assert answer.status_code == 200, answer.text
    found = answer.json()["choices"][0]["logprobs"]
    top = [list(place.values())[:5] for place in found["top_logprobs"][1:]]
    return torch.cat([torch.tensor(found["token_logprobs"][1:]), torch.tensor(top).flatten()])


def mean_score(live: Live, name: str, prompt: str) -> float:
    """Mean log-probability of the prompt's tokens."""
    return float(scores(live, name, prompt).unflatten(0, (6, -1))[0].mean())


def completion(live: Live, name: str, prompt: str) -> str:
    body = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True,
            "ttt": {"session": "repo", "gate": "off", "read": "session"}}  # fmt: skip
    answer = live.http.post("/v1/completions", json=body, headers=bearer_of(name))
    return str(answer.json()["choices"][0]["text"])


@asynccontextmanager
async def traffic(live: Live, name: str, clients: int) -> AsyncIterator[list[int]]:
    """Completions that learn, and documents, without a pause; yields the statuses so far."""
    statuses: list[int] = []

    async def ask(http: httpx.AsyncClient, number: int) -> None:
        while True:
            prompt = TEXTS[number % len(TEXTS)][: 300 + 40 * number]
            calls: list[tuple[str, dict[str, Any]]] = [
                ("/v1/completions", {
                    "prompt": prompt, "max_tokens": 16,
                    "ttt": {"session": "repo", "gate": "fixed", "chunk_size": 32},
                }),
                ("/v1/sessions/repo/adapt", {
                    "documents": [{"text": prompt}], "action": "UPDATE_4", "chunk_size": 32,
                }),
            ]  # fmt: skip
            path, body = calls[len(statuses) % 2]
            statuses.append((await http.post(path, json=body)).status_code)

    async with httpx.AsyncClient(base_url=live.url, timeout=600, headers=bearer_of(name)) as http:
        tasks = [asyncio.create_task(ask(http, number)) for number in range(clients)]
        try:
            yield statuses
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def test_answers_are_the_same_with_and_without_heavy_traffic_of_another(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    seen: dict[str, list[Any]] = {}
    for mode in ("alone", "crowded"):
        with server(tiny_llama_dir, tmp_path) as live:
            async with traffic(live, "bob", 8 if mode == "crowded" else 0) as statuses:
                reports, found = [], []
                for text in TEXTS[:3]:
                    reports.append(await asyncio.to_thread(teach, live, "alice", text))
                    found.append(await asyncio.to_thread(scores, live, "alice", PROBE))
                said = await asyncio.to_thread(completion, live, "alice", PROBE)
            seen[mode] = [reports, found, said]
            if mode == "crowded":
                assert statuses.count(200) == len(statuses) > 8
    alone, crowded = seen["alone"], seen["crowded"]
    for one, other in zip(alone[0], crowded[0], strict=True):
        assert [c["action"] for c in one["chunks"]] == [c["action"] for c in other["chunks"]]
        assert one["version_after"] == other["version_after"] > 0
    for one, other in zip(alone[1], crowded[1], strict=True):
        torch.testing.assert_close(one, other, atol=CROWDED_TOLERANCE, rtol=0)
    assert alone[2] == crowded[2]


def test_secret_that_one_session_has_learned_can_not_be_had_through_another(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    prompts = (PROBE, SECRET, "PASSWORD = '", SECRET[:30])
    found: dict[bool, list[torch.Tensor]] = {}
    said: dict[bool, list[str]] = {}
    for planted in (False, True):
        with server(tiny_llama_dir, tmp_path) as live:
            teach(live, "alice", TEXTS[0])
            before = mean_score(live, "bob", SECRET)
            for shift in range(8 if planted else 0):
                # Texts that differ: the same one would be learned once.
                teach(live, "bob", f"{'#' * shift}\n{SECRET * 6}", "UPDATE_4")
            # Bob's session knows it, or there would be nothing to extract.
            assert (mean_score(live, "bob", SECRET) > before + 1.0) is planted
            completion(live, "bob", SECRET[:30])
            found[planted] = [scores(live, "alice", prompt) for prompt in prompts]
            said[planted] = [completion(live, "alice", prompt) for prompt in prompts]
    for absent, present in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(present, absent, atol=TOLERANCE, rtol=0)
    assert said[True] == said[False]


def test_prefix_that_another_has_sent_is_reused_and_changes_no_answer(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    found: dict[bool, torch.Tensor] = {}
    said: dict[bool, str] = {}
    for sent in (False, True):
        with server(tiny_llama_dir, tmp_path) as live:
            teach(live, "bob", TEXTS[1], "UPDATE_4")
            teach(live, "alice", TEXTS[0])
            if sent:
                completion(live, "bob", PROBE)
            hits = live.core.stats().prefix_trunk.hits
            said[sent] = completion(live, "alice", PROBE)
            assert (live.core.stats().prefix_trunk.hits > hits) is sent
            found[sent] = scores(live, "alice", PROBE)
    assert said[True] == said[False]
    torch.testing.assert_close(found[True], found[False], atol=TOLERANCE, rtol=0)
