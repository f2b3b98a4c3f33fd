"""`/v1/sessions`: making, listing, teaching, exporting, forking, deleting."""

from __future__ import annotations

import io
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.helpers import source_text
from tests.server.live import PROMPT, Live

TEXT = source_text()[:4000]


def test_new_session_has_the_servers_defaults(live: Live) -> None:
    answer = live.http.post("/v1/sessions", json={"id": "fresh"})
    assert answer.status_code == 201
    state = answer.json()
    expected = {
        "id": "fresh", "object": "session", "version": 0, "gate": "threshold", "action": None,
        "budget": 2.0, "cost_model": "nominal", "chunk_size": 256, "adapt_on": "prompt",
        "when": "inline", "chunks": 0, "learned_tokens": 0, "rollbacks": 0, "norm": 0.0,
    }  # fmt: skip
    assert {name: state[name] for name in expected} == expected
    assert state["chunks_by_action"] == {"SKIP": 0, "UPDATE_1": 0, "UPDATE_2": 0, "UPDATE_4": 0}
    assert live.session("fresh")["digest"] == state["digest"]


@pytest.mark.parametrize("body", [b"", b"{}", b"null"])
def test_session_without_id_gets_one(live: Live, body: bytes) -> None:
    answer = live.http.post(
        "/v1/sessions", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 201
    assert answer.json()["id"].startswith("session-")


def test_session_of_a_taken_id_is_a_conflict(live: Live) -> None:
    name = live.new_session()
    answer = live.http.post("/v1/sessions", json={"id": name})
    assert answer.status_code == 409
    assert name in answer.json()["error"]["message"]


def test_list_has_every_session_in_order(live: Live) -> None:
    names = [live.new_session() for _ in range(3)]
    listed = live.http.get("/v1/sessions").json()
    assert listed["object"] == "list"
    assert [item["id"] for item in listed["data"]][-3:] == names
    live.wait_for("sessions", len(listed["data"]))


def test_deleted_session_is_gone(live: Live) -> None:
    name = live.new_session()
    answer = live.http.delete(f"/v1/sessions/{name}")
    assert answer.json() == {"id": name, "object": "session.deleted", "deleted": True}
    for method in ("GET", "DELETE"):
        again = live.http.request(method, f"/v1/sessions/{name}")
        assert again.status_code == 404
        assert name in again.json()["error"]["message"]


def test_adapt_reports_chunk_by_chunk_and_the_session_adds_it_up(live: Live) -> None:
    name = live.new_session()
    report = live.adapt(name, TEXT[:1500], TEXT[1500:2500], gate="fixed", chunk_size=64)
    assert report["object"] == "session.adaptation"
    assert report["session"] == name
    assert [document["path"] for document in report["documents"]] == ["0.py", "1.py"]
    lengths = [len(live.core.tokenizer.encode(t)) for t in (TEXT[:1500], TEXT[1500:2500])]
    assert [document["tokens"] for document in report["documents"]] == lengths
    assert report["tokens"] == sum(lengths)
    counts = [-(-length // 64) for length in lengths]
    assert [document["chunks"] for document in report["documents"]] == counts
    chunks = report["chunks"]
    assert [chunk["document"] for chunk in chunks] == [0] * counts[0] + [1] * counts[1]
    by_hand = [
        sum(weight(c) * c["loss_before"] for c in chunks) / sum(map(weight, chunks)),
        sum(weight(c) * (c["loss_after"] or c["loss_before"]) for c in chunks)
        / sum(map(weight, chunks)),
    ]
    assert [report["loss_before"], report["loss_after"]] == pytest.approx(by_hand)
    state = live.session(name)
    updates = sum(count for action, count in report["actions"].items() if action != "SKIP")
    assert state["version"] == report["version_after"] == updates > 3
    assert state["chunks"] == len(chunks) == sum(report["actions"].values())
    assert state["cost"]["nominal"] == pytest.approx(report["cost"]["nominal"])
    learned = [c for c in chunks if c["action"] != "SKIP"]
    assert state["learned_tokens"] == sum(map(weight, learned))
    assert state["norm"] > 0


def weight(chunk: dict[str, Any]) -> int:
    """Tokens of a chunk."""
    start, end = chunk["tokens"]
    return int(end - start)


def test_adapt_takes_documents_beyond_the_context(live: Live) -> None:
    name = live.new_session()
    text = source_text()[:8000]
    report = live.adapt(name, text, gate="fixed", budget=1.5, chunk_size=128)
    assert report["tokens"] > 3 * live.core.max_model_len
    assert report["version_after"] > 0
    assert report["cost"]["nominal"] <= 1.5


def test_streamed_adapt_sends_every_chunk_then_the_same_report(live: Live) -> None:
    one, other = live.new_session(), live.new_session()
    expected = live.adapt(one, TEXT[:1500], TEXT[1500:2500], gate="fixed", chunk_size=64)
    documents = [
        {"path": "0.py", "text": TEXT[:1500]},
        {"path": "1.py", "text": TEXT[1500:2500]},
    ]
    body = {"documents": documents, "gate": "fixed", "chunk_size": 64, "stream": True}
    with live.http.stream("POST", f"/v1/sessions/{other}/adapt", json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    *chunks, report = [json.loads(line) for line in lines[:-1]]
    assert report["documents"] == expected["documents"]
    assert report["version_after"] == expected["version_after"]
    assert {chunk["object"] for chunk in chunks} == {"session.adaptation.chunk"}
    assert [chunk["path"] for chunk in chunks] == [
        f"{chunk['document']}.py" for chunk in expected["chunks"]
    ]
    assert [chunk["progress"][0] for chunk in chunks] == [
        sum(map(weight, chunks[: i + 1])) for i in range(len(chunks))
    ]
    assert chunks[-1]["progress"] == [report["tokens"]] * 2
    assert [chunk["loss_after"] for chunk in chunks] == [c["loss_after"] for c in report["chunks"]]


# Of peft, about transformers.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_exported_adapter_is_peft_and_gives_the_sessions_scores(
    live: Live, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    name = live.new_session()
    live.adapt(name, TEXT, gate="fixed", chunk_size=64)
    answer = live.http.get(f"/v1/sessions/{name}/adapter")
    assert answer.headers["content-type"] == "application/zip"
    assert f'filename="{name}.zip"' in answer.headers["content-disposition"]
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(archive.namelist())
        archive.extractall(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    adapted = PeftModel.from_pretrained(base, str(tmp_path))
    ids = torch.tensor([live.core.tokenizer.encode(PROMPT)])
    with torch.no_grad():
        table = torch.log_softmax(adapted(ids).logits.float(), dim=-1)[0, :-1]
    expected = table.gather(1, ids[0, 1:, None])[:, 0]
    scored = live.openai.completions.create(
        model=live.model, prompt=PROMPT, max_tokens=0, echo=True, logprobs=0,
        extra_body={"ttt": {"session": name, "gate": "off"}},
    )  # fmt: skip
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None
    scores = torch.tensor((logprobs.token_logprobs or [])[1:])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)


def test_export_leaves_no_file_behind(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    name = live.new_session()
    assert live.http.get(f"/v1/sessions/{name}/adapter").status_code == 200
    assert live.http.get("/v1/sessions/nobody/adapter").status_code == 404
    # The answer is there a moment before its files are gone.
    until = time.monotonic() + 5
    while list(tmp_path.iterdir()):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_fork_goes_its_own_way(live: Live) -> None:
    parent = live.new_session(gate="fixed", chunk_size=64)
    live.adapt(parent, TEXT[:1500])
    before = live.session(parent)
    answer = live.http.post(f"/v1/sessions/{parent}/fork", json={"id": f"{parent}-fork"})
    assert answer.status_code == 201
    fork = answer.json()
    assert fork["id"] == f"{parent}-fork"
    for field in ("version", "digest", "norm", "chunks", "learned_tokens", "gate", "cost"):
        assert fork[field] == before[field]
    live.adapt(fork["id"], TEXT[1500:3000])
    assert live.session(fork["id"])["version"] > fork["version"]
    assert live.session(parent) == before


def test_fork_without_id_gets_one(live: Live) -> None:
    answer = live.http.post(f"/v1/sessions/{live.new_session()}/fork")
    assert answer.status_code == 201
    assert answer.json()["id"].startswith("session-")


def test_session_with_a_policy_that_is_not_there_is_refused_at_once(live: Live) -> None:
    answer = live.http.post("/v1/sessions", json={"gate": "policy"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "gate"
    assert error["message"].startswith("gate: ")
    assert "threshold" in error["message"]
