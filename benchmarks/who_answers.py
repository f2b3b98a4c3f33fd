"""Where a session that has learned a directory answers, and where the base model does.

Prompts of files that it has learned, of other files of the package, and of unrelated ones, as
completions and in chats. The session is only read.

    ponderttt adapt .../narwhals/_polars --session polars
    python benchmarks/who_answers.py polars .../narwhals .../narwhals/_polars .../peft
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from clients.api import Client
from clients.files import TextFile, text_files

CHAT = "Complete this Python code. Reply with the code in one block.\n```python\n{code}\n```"
# Characters of a prompt, and of the shortest file.
PROMPT, LEAST = 1800, 4000


def files(root: Path, count: int, without: Path | None = None) -> list[TextFile]:
    """Some Python files below a directory, but for those below another one."""
    inside = f"{without.relative_to(root).as_posix()}/" if without is not None else None
    found = [
        file
        for file in text_files(root, 1 << 20)
        if isinstance(file, TextFile) and file.path.endswith(".py") and file.size > LEAST
        if inside is None or not file.path.startswith(inside)
    ]
    random.Random(0).shuffle(found)
    return found[:count]


def prompt(file: TextFile) -> str:
    """What stands before a line in the last two thirds of it."""
    lines = file.text.splitlines(keepends=True)
    end = random.Random(file.path).randrange(len(lines) // 3, len(lines))
    return "".join(lines[:end])[-PROMPT:]


def main(
    session: str,
    package: Annotated[Path, typer.Argument(help="What holds the learned directory.")],
    learned: Annotated[Path, typer.Argument(help="The directory that it has learned.")],
    unrelated: Annotated[Path, typer.Argument(help="Another package.")],
    base_url: Annotated[str, typer.Option(envvar="PONDERTTT_BASE_URL")] = "http://127.0.0.1:8000",
    count: Annotated[int, typer.Option(help="Files of each kind.")] = 12,
) -> None:
    """Ask and print a table."""
    kinds = {
        "learned": files(learned, count),
        "others of the package": files(package, count, without=learned),
        "unrelated": files(unrelated, count),
    }
    table = Table("files", "asked as", "session answers", "its loss is lower", "mean difference")
    ttt = {"session": session, "gate": "off", "read": "auto"}
    with Client(base_url, timeout=600.0) as client:
        for kind, found in kinds.items():
            for way in ("completion", "chat"):
                choices = []
                for file in found:
                    text = prompt(file)
                    if way == "completion":
                        answer = client.complete(text, max_tokens=1, temperature=0.0, ttt=ttt)
                    else:
                        said = [{"role": "user", "content": CHAT.format(code=text)}]
                        answer = client.chat(said, max_tokens=1, temperature=0.0, ttt=ttt)
                    choice = (answer.ttt or {}).get("choice")
                    if choice is None:
                        raise typer.BadParameter(f"session {session} has learned nothing")
                    choices.append(choice)
                differences = [each["session"] - each["base"] for each in choices]
                table.add_row(
                    kind,
                    way,
                    f"{sum(each['read'] == 'session' for each in choices)} of {len(choices)}",
                    str(sum(difference < 0 for difference in differences)),
                    f"{sum(differences) / len(differences):+.3f}",
                )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
