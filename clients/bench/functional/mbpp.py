"""MBPP: short functions from a sentence and three assertions (Austin et al., arXiv:2108.07732).

Prompts are the paper's. A base model sees three solved problems first, numbers 2, 3 and 4, which
are not asked for; its answer ends at `[DONE]`. A chat model sees none. A program passes when the
assertions of `test_list` hold. It sees the record's imports, which come before it, and what its
set-up code, which may use the program's classes, defines after it. Both are run again with the
assertions, so that these don't depend on what the program makes of them.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from clients.bench.functional.answers import fenced_block
from clients.bench.functional.data import Entry, finds_fault, is_file, read_file, read_hub
from clients.bench.functional.problems import Problem, Suite
from ponderttt.errors import InvalidRequestError

HUB = "google-research-datasets/mbpp"
Subset = Literal["full", "sanitized"]
# The paper's examples.
_EXAMPLES = ("2", "3", "4")
_TASK = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass "
    "these tests:\n\n{tests}\n"
)
_BEGIN, _DONE = "[BEGIN]", "[DONE]"
_CHAT = "Reply with the complete code in one Python code block."


def load_mbpp(data: str | None, subset: Subset, shots: int) -> Suite:
    """The problems of the split `test`; of a local file, all but the examples that are shown.

    Args:
        data: a file, or the name of a data set on the hub that has MBPP's schema.
        subset: `full` or `sanitized`, on the hub.
        shots: solved problems in a base model's prompt, 0 to 3.
    Raises:
        InvalidRequestError: a record lacks a field, or there are not enough examples.
        PonderError: the hub can't be reached.
    """
    name = data or HUB
    if is_file(name):
        entries = examples = read_file(Path(name))
        source = name
    else:
        entries = read_hub(name, subset, "test")
        examples = read_hub(name, subset, "prompt") if shots else []
        source = f"{name} ({subset})"
    shown = _shown(examples, shots, source)
    introduction = "".join(f"{_asked(each)}{_BEGIN}\n{_solution(each)}{_DONE}\n" for each in shown)
    hidden = {each.name() for each in shown}
    asked = [each for each in entries if each.name() not in hidden]
    if not asked:
        raise InvalidRequestError("--data", f"{source} has nothing but examples; give more records")
    return Suite(
        name="mbpp",
        source=source,
        problems=tuple(_problem(entry, introduction) for entry in asked),
        stops=(_DONE,),
        cut=until_done,
    )


def until_done(answer: str) -> str:
    """What comes before `[DONE]`, without a fence."""
    return fenced_block(answer.partition(_DONE)[0])


def _shown(entries: Sequence[Entry], shots: int, source: str) -> list[Entry]:
    by_name = {entry.name(): entry for entry in entries}
    missing = [name for name in _EXAMPLES[:shots] if name not in by_name]
    if missing:
        raise InvalidRequestError(
            "--shots",
            f"{source} has no record {', '.join(missing)}, which base prompts show as an example; "
            "add it, or give --shots 0",
        )
    return [by_name[name] for name in _EXAMPLES[:shots]]


def _asked(entry: Entry) -> str:
    return _TASK.format(text=entry.text("text", "prompt"), tests="\n".join(_tests(entry)))


def _tests(entry: Entry) -> list[str]:
    tests = entry.texts("test_list")
    if not tests:
        raise entry.bad("test_list is empty, so anything would pass")
    for test in tests:
        lines = [line.strip() for line in test.splitlines()]
        if not any(line and not line.startswith("#") for line in lines):
            raise entry.wrong("test_list", tests, f"a list of assertions: {test!r} says nothing")
    return tests


def _solution(entry: Entry) -> str:
    # Some records have line ends of another system.
    return entry.text("code").replace("\r\n", "\n").rstrip() + "\n"


def _problem(entry: Entry, introduction: str) -> Problem:
    asked, solution = _asked(entry), _solution(entry)
    imports = "\n".join(entry.texts("test_imports", default=()))
    setup = entry.text("test_setup_code", default="")
    tests = "\n".join(_tests(entry))
    entry.check_code(test_imports=imports)
    trees = entry.parsed("test_setup_code", setup), entry.parsed("test_list", tests)
    if not any(map(finds_fault, trees)):
        raise entry.wrong("test_list", _tests(entry), "a list of assertions: anything would pass")
    return Problem(
        task_id=entry.name(),
        base_prompt=f"{introduction}{asked}{_BEGIN}\n",
        chat_prompt=f"{asked}\n{_CHAT}",
        head=f"{imports}\n" if imports else "",
        checks={"tests": f"\n{imports}\n{setup}\n{tests}\n"},
        mutated=_functions(entry, solution),
        solution=solution,
        tail=f"\n{setup}\n" if setup.strip() else "",
    )


def _functions(entry: Entry, solution: str) -> frozenset[str]:
    """Functions that the tests call, among those that the solution defines at top level."""
    entry.check_code(code=solution)
    defined = {node.name for node in ast.parse(solution).body if isinstance(node, ast.FunctionDef)}
    tests = ast.parse("\n".join(_tests(entry)))
    called = {node.id for node in ast.walk(tests) if isinstance(node, ast.Name)}
    return frozenset(defined & called or defined)
