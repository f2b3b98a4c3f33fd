"""`ponderttt bench repo` against a fake server: protocol, arms and going on after a cut."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import httpx
import pytest
from tqdm import tqdm

from clients.bench.repo_arms import make_arms, session_name
from clients.bench.repo_exam import Exam
from clients.bench.repo_plan import Repository
from clients.results import Header, ResultFile, read_results
from ponderttt.errors import InvalidRequestError, PonderError
from tests.clients.bench import fake_server
from tests.clients.bench.conftest import Run
from tests.clients.bench.fake_server import CONTEXT, Cut, FakeServer

# Fields that depend on the clock.
TIMES = ("seconds", "read_seconds")


def timeless(path: Path) -> list[dict[str, Any]]:
    """The records without what the clock says."""
    _, records = read_results(path)
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def test_repo_runs_all_arms_and_reports_them(run: Run, project: Path, tmp_path: Path) -> None:
    server, out = FakeServer(), tmp_path / "out.json"
    result = run(server, str(project), "--json", str(out))
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    names = ["off", "stuffed"]
    for lead in ("adapt@1.5", "adapt@2"):
        names.append(lead)
        for kind in ("random", "fixed"):
            names += [f"{kind}=rate({lead})", f"{kind}=time({lead})"]
    assert list(found["arms"]) == names
    assert {arm["targets"] for arm in found["arms"].values()} == {6}
    assert found["clustered_by"] == "file"
    adapted = found["arms"]["adapt@2"]
    assert adapted["differences"]["loss"]["units"] == 6
    assert adapted["differences"]["loss"]["estimate"] == pytest.approx(
        adapted["means"]["loss"] - found["arms"]["off"]["means"]["loss"]
    )
    assert adapted["learning"]["update_rate"] == pytest.approx(0.5, abs=0.05)
    actions = adapted["learning"]["actions"]
    assert sum(actions.values()) == adapted["learning"]["chunks"]
    assert actions["UPDATE_1"] == pytest.approx(actions["SKIP"], rel=0.2)
    shown = " ".join(result.output.split())
    assert "| fixed=rate(adapt@2) |" in shown
    assert "`random` loses draws that its budget refuses" in shown
    assert server.sessions == {}


def test_followers_get_the_update_rate_of_the_arm_they_follow(
    run: Run, project: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    run(FakeServer(), str(project), "--json", str(out))
    arms = json.loads(out.read_text())["arms"]
    lead = arms["adapt@1.5"]["learning"]
    fixed = arms["fixed=rate(adapt@1.5)"]["learning"]
    assert fixed["update_rate"] == pytest.approx(lead["update_rate"], abs=0.02)
    assert fixed["chunks"] == lead["chunks"]
    lesson = next(
        record
        for record in read_results(tmp_path / "r.jsonl")[1]
        if record["arm"] == "random=time(adapt@1.5)"
    )
    assert lesson["options"]["cost_model"] == "measured"
    assert lesson["options"]["budget"] == pytest.approx(lead["measured"])


def test_nothing_is_learned_while_asking_and_targets_come_before_their_file(
    run: Run, project: Path
) -> None:
    server = FakeServer()
    run(server, str(project))
    taught: dict[str, str] = {}
    for _, path, body in server.requests:
        if path == "/v1/completions":
            assert body["ttt"]["gate"] == "off"
            learned = taught.get(body["ttt"].get("session", ""), "")
            if "session" in body["ttt"] and not body.get("echo"):
                # What stands right before the target was never learned.
                assert body["prompt"][-200:] not in learned
        elif path.endswith("/adapt"):
            name = path.split("/")[3]
            for document in body["documents"]:
                taught[name] = taught.get(name, "") + document["text"]


def test_prompt_ends_where_the_target_begins_and_the_loss_is_of_the_target(
    run: Run, project: Path, tmp_path: Path
) -> None:
    server = FakeServer()
    run(server, str(project), "--arm", "stuffed")
    sent = [body for body in server.bodies("/v1/completions") if "session" not in body["ttt"]]
    scored = [body["prompt"] for body in sent if body.get("echo")]
    asked = [body["prompt"] for body in sent if not body.get("echo")]
    targets = [r for r in read_results(tmp_path / "r.jsonl")[1] if r["record"] == "target"]
    assert len(targets) == len(asked) == 12
    for record, prompt in zip(targets, asked, strict=True):
        assert prompt + record["hidden"] in scored
        if record["arm"] == "off":
            assert len(prompt) <= 300
            assert prompt in (project / record["file"]).read_text()
            assert record["loss_tokens"] * record["loss"] == pytest.approx(record["loss_nats"])


def test_stuffed_prompt_fills_the_context_and_no_more(
    run: Run, project: Path, tmp_path: Path
) -> None:
    run(FakeServer(), str(project), "--arm", "stuffed", "--max-tokens", "50")
    _, records = read_results(tmp_path / "r.jsonl")
    stuffed = [r for r in records if r["arm"] == "stuffed" and r["record"] == "target"]
    assert len(stuffed) == 6
    assert max(r["prompt_tokens"] for r in stuffed) + 50 <= CONTEXT
    assert min(r["prompt_tokens"] for r in stuffed) > CONTEXT / 2


def test_same_seed_asks_the_same_and_another_seed_something_else(
    run: Run, project: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        run(FakeServer(), str(project), "--arm", "adapt", "--seed", seed, output=name)
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b")
    assert timeless(tmp_path / "a") != timeless(tmp_path / "c")


@pytest.mark.parametrize("loses_sessions", [False, True], ids=["server lives", "server dies"])
def test_resumed_run_equals_an_uninterrupted_one(
    run: Run, project: Path, tmp_path: Path, loses_sessions: bool
) -> None:
    whole = FakeServer()
    assert run(whole, str(project), output="whole.jsonl").exit_code == 0
    expected = timeless(tmp_path / "whole.jsonl")
    step = len(whole.requests) // 7
    for number, cut_at in enumerate(range(2, len(whole.requests), step)):
        output = f"cut{number}.jsonl"
        server = FakeServer(cut_at=cut_at)
        with pytest.raises(Cut):
            run(server, str(project), output=output)
        kept = server.sessions if not loses_sessions else {}
        again = FakeServer(sessions=kept)
        result = run(again, str(project), output=output)
        assert result.exit_code == 0, result.output
        assert timeless(tmp_path / output) == expected, f"cut at request {cut_at}"
        assert again.sessions == {}
        assert len(again.requests) < len(whole.requests) or cut_at < 10


def test_lesson_that_was_cut_off_leaves_nothing_in_the_session(
    run: Run, project: Path, tmp_path: Path
) -> None:
    # Without an update only the session's ledger knows of the lesson.
    options = ["--arm", "adapt", "--budget", "1", "--keep-sessions"]
    whole = FakeServer()
    run(whole, str(project), *options, output="whole.jsonl")
    lessons = [i for i, (_, path, _) in enumerate(whole.requests) if path.endswith("/adapt")]
    for cut_at in lessons:
        server = FakeServer(cut_at=cut_at)
        with pytest.raises(Cut):
            run(server, str(project), *options, output=f"{cut_at}.jsonl")
        again = FakeServer(sessions=server.sessions)
        assert run(again, str(project), *options, output=f"{cut_at}.jsonl").exit_code == 0
        assert timeless(tmp_path / f"{cut_at}.jsonl") == timeless(tmp_path / "whole.jsonl")
        for ours, theirs in zip(again.sessions.values(), whole.sessions.values(), strict=True):
            assert (ours.chunks, ours.learned) == (theirs.chunks, theirs.learned)


def test_finished_run_asks_nothing_more(run: Run, project: Path) -> None:
    run(FakeServer(), str(project))
    server = FakeServer()
    result = run(server, str(project))
    assert result.exit_code == 0
    assert server.bodies("/v1/completions") == []
    assert "| adapt@2 |" in " ".join(result.output.split())


def test_keep_sessions_names_sessions_that_have_learned(run: Run, project: Path) -> None:
    server = FakeServer()
    result = run(server, str(project), "--arm", "adapt", "--keep-sessions")
    names = [line.strip() for line in result.output.splitlines() if "  bench-" in line]
    assert sorted(names) == sorted(server.sessions)
    assert len(names) == 2
    assert all(session.learned for session in server.sessions.values())
    # Also where the result file is whole, but the sessions were lost.
    empty = FakeServer()
    run(empty, str(project), "--arm", "adapt", "--keep-sessions")
    assert empty.sessions == server.sessions


def test_runs_with_one_seed_on_one_server_have_sessions_of_their_own(
    run: Run, project: Path
) -> None:
    server = FakeServer()
    for output in ("a.jsonl", "b.jsonl"):
        run(server, str(project), "--arm", "adapt", "--keep-sessions", output=output)
    assert len(server.sessions) == 4


def test_session_names_differ_also_where_they_are_cut_off() -> None:
    repository = Repository("r" * 200, (), ())
    arms = make_arms(["adapt"], None, [1.5, 2.0], ["rate"])[1:]
    names = {session_name("run", repository, arm) for arm in arms}
    assert len(names) == 2
    assert {len(name) for name in names} == {128}


def test_server_without_sessions_runs_what_it_can(run: Run, project: Path, tmp_path: Path) -> None:
    server = FakeServer(has_sessions=False)
    result = run(server, str(project))
    assert result.exit_code == 0, result.output
    assert {r["arm"] for r in read_results(tmp_path / "r.jsonl")[1]} == {"off", "stuffed"}
    assert not any("ttt" in body for body in server.bodies("/v1/completions"))
    refused = run(server, str(project), "--arm", "adapt", output="other")
    assert isinstance(refused.exception, InvalidRequestError)
    assert "no sessions" in str(refused.exception)


def test_without_loss_nothing_is_scored(run: Run, project: Path, tmp_path: Path) -> None:
    server = FakeServer()
    assert run(server, str(project), "--no-loss").exit_code == 0
    assert not any(body.get("echo") for body in server.bodies("/v1/completions"))
    assert {r["record"] for r in read_results(tmp_path / "r.jsonl")[1]} == {"lesson", "target"}


def test_several_repositories_of_one_name_are_told_apart(
    run: Run, project: Path, tmp_path: Path
) -> None:
    result = run(FakeServer(), str(project), str(project), "--arm", "stuffed")
    assert result.exit_code == 0, result.output
    records = read_results(tmp_path / "r.jsonl")[1]
    assert {r["repository"] for r in records} == {"project", "project~2"}


def test_changed_repository_is_refused(run: Run, project: Path, tmp_path: Path) -> None:
    copy = tmp_path / "project"
    copy.mkdir()
    for path in project.rglob("*.py"):
        (copy / path.name).write_text(path.read_text())
    run(FakeServer(), str(copy), "--arm", "stuffed")
    for path in copy.glob("*.py"):
        path.write_text("# changed\n" + path.read_text())
    again = run(FakeServer(), str(copy), "--arm", "stuffed")
    assert isinstance(again.exception, InvalidRequestError)
    assert "texts" in str(again.exception)


def test_copies_of_files_with_targets_are_not_taught(
    run: Run, project: Path, tmp_path: Path
) -> None:
    doubled = tmp_path / "doubled"
    shutil.copytree(project, doubled)
    shutil.copytree(project, doubled / "vendored")
    result = run(FakeServer(), str(doubled), "--arm", "adapt")
    assert result.exit_code == 0, result.output
    header, records = read_results(tmp_path / "r.jsonl")
    taught = {path for r in records if r["record"] == "lesson" for path in r["files"]}
    subjects = {r["file"] for r in records if r["record"] == "target"}
    twins = {p.removeprefix("vendored/") if "vendored" in p else f"vendored/{p}" for p in subjects}
    assert len(subjects) == len(twins - subjects) == 2
    assert not twins & taught
    dropped = header.settings["dropped"]["doubled"]
    assert twins <= set(dropped)
    assert f"{len(dropped)} of doubled" in " ".join(result.output.split())


def test_repository_of_copies_alone_is_refused(run: Run, project: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    text = (project / "part0.py").read_text()
    for number in range(4):
        (copies / f"copy{number}.py").write_text(text)
    result = run(FakeServer(), str(copies))
    assert isinstance(result.exception, InvalidRequestError)
    assert "3 hold hidden text or are copies" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/at/all"], "neither a directory nor an installed package"),
        ([__file__], "is a file"),
        (["PROJECT", "--arm", "random"], "--arm adapt"),
        (["PROJECT", "--model", "other"], "give fake"),
        (["PROJECT", "--json", "/nowhere/x.json"], "no directory to write to"),
        (["PROJECT", "--unrelated", "/nowhere/x.py"], "can't be read"),
        (["EMPTY"], "no Python file"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    run: Run, project: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    places = {"PROJECT": str(project), "EMPTY": str(empty)}
    server = FakeServer()
    result = run(server, *[places.get(each, each) for each in arguments])
    assert isinstance(result.exception, PonderError)
    assert message in str(result.exception)
    assert server.bodies("/v1/completions") == []


def test_module_that_was_imported_from_nowhere_is_no_package(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As `__main__` is in a program that was not started with `-m`.
    monkeypatch.setitem(sys.modules, "nowhere", ModuleType("nowhere"))
    result = run(FakeServer(), "nowhere")
    assert isinstance(result.exception, InvalidRequestError)
    assert "neither a directory nor an installed package" in str(result.exception)


def test_interrupt_says_how_to_go_on(
    run: Run, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeServer()

    def interrupt(request: httpx.Request) -> httpx.Response:
        if len(server.requests) == 30:
            raise KeyboardInterrupt
        return real(request)

    real = server.answer
    monkeypatch.setattr(FakeServer, "transport", httpx.MockTransport(interrupt))
    result = run(server, str(project))
    assert isinstance(result.exception, PonderError)
    assert "run the same command again to go on" in str(result.exception)
    server.requests.clear()
    fresh = run(server, str(project), "--fresh")
    assert "run the same command again without --fresh to go on" in str(fresh.exception)


def test_failing_server_is_named_and_keeps_what_is_done(
    run: Run, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeServer()
    real = server.answer

    def fail(request: httpx.Request) -> httpx.Response:
        if len(server.requests) == 30:
            return httpx.Response(400, text="<html>proxy says no</html>")
        return real(request)

    monkeypatch.setattr(FakeServer, "transport", httpx.MockTransport(fail))
    result = run(server, str(project))
    assert isinstance(result.exception, PonderError)
    assert "proxy says no" in str(result.exception)
    kept = len(read_results(tmp_path / "r.jsonl")[1])
    assert kept > 5
    message = str(result.exception)
    assert f" {kept} of " in message
    assert "run the same command again to go on" in message


def test_server_that_goes_down_leaves_what_is_done(
    run: Run, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeServer()
    real = server.answer

    def go_down(request: httpx.Request) -> httpx.Response:
        if len(server.requests) >= 30:
            raise httpx.ConnectError("refused")
        return real(request)

    monkeypatch.setattr(FakeServer, "transport", httpx.MockTransport(go_down))
    result = run(server, str(project))
    kept = len(read_results(tmp_path / "r.jsonl")[1])
    assert isinstance(result.exception, PonderError)
    for tells in ("start a server", f" {kept} of ", "run the same command again to go on"):
        assert tells in str(result.exception)


def lines_of(path: Path, arm: str) -> list[int]:
    """Numbers of an arm's lines in a result file."""
    lines = path.read_text().splitlines()
    return [i for i, line in enumerate(lines) if i and json.loads(line)["arm"] == arm]


def remove_lines(path: Path, numbers: list[int]) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for i, line in enumerate(lines) if i not in numbers))


@pytest.mark.parametrize("missing", ["target", "lesson"])
def test_step_that_is_missing_before_others_of_its_session_is_not_made_up_for(
    run: Run, project: Path, tmp_path: Path, missing: str
) -> None:
    path = tmp_path / "r.jsonl"
    arguments = [str(project), "--arm", "adapt"]
    assert run(FakeServer(), *arguments).exit_code == 0
    expected = timeless(path)
    lines = lines_of(path, "adapt@2")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    gone = next(i for i in lines[1:] if records[i]["record"] == missing)
    unit = records[gone]["unit"]
    remove_lines(path, [gone])
    server = FakeServer()
    result = run(server, *arguments)
    assert isinstance(result.exception, PonderError)
    for tells in (repr(unit), "repository project", "arm adapt@2", "remove all later lines"):
        assert tells in str(result.exception)
    assert server.bodies("/v1/completions") == []
    remove_lines(path, [i for i in lines_of(path, "adapt@2") if i >= gone])
    assert run(FakeServer(), *arguments).exit_code == 0

    def by_key(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(found, key=lambda r: (r["arm"], r["unit"]))

    assert by_key(timeless(path)) == by_key(expected)


def test_step_that_is_missing_in_an_arm_without_session_is_done_alone(
    run: Run, project: Path, tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    arguments = [str(project), "--arm", "stuffed", "--no-loss"]
    assert run(FakeServer(), *arguments).exit_code == 0
    expected = timeless(path)
    remove_lines(path, [lines_of(path, "off")[2], lines_of(path, "stuffed")[1]])
    server = FakeServer()
    assert run(server, *arguments).exit_code == 0
    assert len(server.bodies("/v1/completions")) == 2
    found = timeless(path)
    assert len(found) == len(expected)
    assert all(record in expected for record in found)


def test_server_that_takes_no_notice_of_echo_gives_no_loss(run: Run, project: Path) -> None:
    result = run(FakeServer(echoes=False), str(project))
    assert isinstance(result.exception, PonderError)
    assert "--no-loss" in str(result.exception)


def test_lists_of_the_scored_prompt_must_be_of_one_length(
    run: Run, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fake_server.scores

    def short(tokens: list[str], learned: str) -> dict[str, Any]:
        scored = real(tokens, learned)
        return scored | {"token_logprobs": scored["token_logprobs"][:-1]}

    monkeypatch.setattr(fake_server, "scores", short)
    result = run(FakeServer(), str(project))
    assert isinstance(result.exception, PonderError)
    assert "--no-loss" in str(result.exception)


@pytest.mark.parametrize("has_sessions", [True, False])
def test_arm_off_may_be_run_alone(
    run: Run, project: Path, tmp_path: Path, has_sessions: bool
) -> None:
    result = run(FakeServer(has_sessions=has_sessions), str(project), "--arm", "off")
    assert result.exit_code == 0, result.output
    assert {r["arm"] for r in read_results(tmp_path / "r.jsonl")[1]} == {"off"}


def test_endpoint_without_tokenizer_gets_a_shorter_prompt_and_a_warning(
    run: Run, project: Path, tmp_path: Path
) -> None:
    server = FakeServer(has_tokenizer=False, has_sessions=False)
    result = run(server, str(project), "--max-tokens", "50", "--stuff-tokens", "400")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("no /tokenize to ask") == 1
    assert len(server.bodies("/tokenize")) == 1
    _, records = read_results(tmp_path / "r.jsonl")
    stuffed = [r for r in records if r["arm"] == "stuffed" and r["record"] == "target"]
    plain = {r["unit"]: r for r in records if r["arm"] == "off"}
    assert all(r["prompt_tokens"] > plain[r["unit"]]["prompt_tokens"] for r in stuffed)


def test_tokenizer_that_is_only_busy_is_not_done_without(
    run: Run, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeServer()
    real = server.answer

    def fail(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/tokenize":
            return httpx.Response(500, json={"error": {"message": "broke"}})
        return real(request)

    monkeypatch.setattr(FakeServer, "transport", httpx.MockTransport(fail))
    result = run(server, str(project), "--arm", "stuffed")
    assert isinstance(result.exception, PonderError)
    assert "500: broke" in str(result.exception)


def test_stuffing_that_has_no_room_is_told(run: Run, project: Path) -> None:
    result = run(FakeServer(), str(project), "--arm", "stuffed", "--stuff-tokens", "64")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("no other file fits into a prompt of 64 tokens") == 2


def test_session_that_became_another_is_recorded_and_its_exam_is_kept(
    run: Run, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeServer()
    taken: list[str] = []

    def humaneval(
        url: str, session: str | None, path: Path, sandbox: object, **options: Any
    ) -> Any:
        taken.extend([session] if session is not None else [])
        digest = server.sessions[session].digest if session is not None else None
        header = Header(
            kind="humaneval", seed=0, model="fake", base_url=url, server_version=None,
            settings={"session_digest": digest}, key_fields=("task_id",),
            metrics={"passed": "higher"},
        )  # fmt: skip
        with ResultFile.open(path, header, fresh=options.get("fresh", False)) as results:
            for task in range(results.resumed, options["limit"]):
                results.append({"task_id": task, "passed": task == 0})
                if session is not None and server.machine == "":
                    raise Cut
            return results.header, results.records

    def exam(problems: int, output: Path, *rest: Any) -> Exam:
        return Exam("http://test", None, None, cast("Any", None), problems, output, 1.0, 0, True)

    monkeypatch.setattr("clients.bench.repo_exam.humaneval_in_session", humaneval)
    monkeypatch.setattr("clients.bench.repo_setup.open_exam", exam)
    arguments = [str(project), "--arm", "adapt", "--humaneval", "2"]
    with pytest.raises(Cut):
        run(server, *arguments)
    _, records = read_results(tmp_path / "r.jsonl")
    # The session is lost, and what teaches it again calculates otherwise.
    server = FakeServer(machine="other")
    result = run(server, *arguments)
    assert result.exit_code == 0, result.output
    assert "taught again, the session is not what it was" in result.stderr
    lessons = [r for r in records if r["record"] == "lesson"]
    (again,) = [r for r in read_results(tmp_path / "r.jsonl")[1] if r["record"] == "retaught"]
    assert (again["arm"], again["unit"]) == ("adapt@1.5", "retaught 0")
    assert again["version"] == lessons[-1]["version"]
    assert again["updates"] == sum(lesson["updates"] for lesson in lessons)
    assert again["digest"] != lessons[-1]["digest"]
    path = tmp_path / "r-humaneval-project-adapt@1.5.jsonl"
    assert read_results(path)[0].settings["session_digest"] == again["digest"]
    # Nothing is left to do, and nothing is done again.
    before, asked = (tmp_path / "r.jsonl").read_bytes(), len(taken)
    result = run(FakeServer(machine="third"), *arguments)
    assert result.exit_code == 0, result.output
    assert len(taken) == asked
    assert (tmp_path / "r.jsonl").read_bytes() == before
    # A session that is made anew to be kept costs no exam either.
    for machine in ("third", "third"):
        server = FakeServer(machine=machine)
        assert run(server, *arguments, "--keep-sessions").exit_code == 0
    assert len(taken) == asked
    found = [r for r in read_results(tmp_path / "r.jsonl")[1] if r["record"] == "retaught"]
    units = [(r["arm"], r["unit"]) for r in found]
    assert units[1:] == [("adapt@1.5", "retaught 1"), ("adapt@2", "retaught 0")]


def test_progress_counts_steps_alone(
    run: Run, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[dict[str, Any]] = []

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: Any) -> None:
            shown.append(options)
            super().__init__(**options)

    monkeypatch.setattr("tqdm.tqdm", Bar)
    arguments = [str(project), "--arm", "adapt"]
    assert run(FakeServer(), *arguments).exit_code == 0
    with (tmp_path / "r.jsonl").open("a") as file:
        again = {"repository": "project", "arm": "adapt@2", "unit": "retaught 0"}
        json.dump(again | {"record": "retaught", "version": 1, "digest": "x", "updates": 1}, file)
        file.write("\n")
    assert run(FakeServer(), *arguments).exit_code == 0
    assert (shown[0]["initial"], shown[1]["initial"]) == (0, shown[1]["total"])
