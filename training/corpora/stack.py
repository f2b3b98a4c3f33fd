"""`stack:DATASET[:CONFIG]`: data sets in the manner of The Stack, streamed from the hub.

The library `datasets` is an optional extra and is loaded only here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ponderttt.errors import InvalidRequestError
from training.corpora.filters import Reason
from training.corpora.intake import File, Intake, Left
from training.corpora.languages import language_of
from training.corpora.repository import Repository

if TYPE_CHECKING:
    from datasets import IterableDataset

log = logging.getLogger(__name__)

#: The Stack, The Stack smol, and GitHub code call the same things differently.
REPOSITORY_COLUMNS = ("max_stars_repo_name", "repository_name", "repo_name")
PATH_COLUMNS = ("max_stars_repo_path", "path", "file_path")
TEXT_COLUMNS = ("content", "code", "text")
REVISION_COLUMNS = ("max_stars_repo_head_hexsha", "revision_id", "commit_id")
_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


def read(spec: str, intake: Intake) -> Iterator[Repository]:
    """The data set's repositories, in the order in which the stream names them.

    The rows of a repository may be scattered. So the first `limits.stack_rows` rows are read, and
    of the repositories in them with `limits.min_documents` documents the first
    `limits.stack_repositories` are taken.

    Args:
        spec: a name on the hub or a local file or directory (parquet, JSON lines); CONFIG is a
            configuration of the data set, or, with a `/`, a directory in it (`data/python`).
        intake: languages and limits.
    Raises:
        InvalidRequestError: `datasets` is missing, there is no such data set, or it lacks a
            column for the repository, the path or the text.
    """
    taken = 0
    for name, rows in _grouped(_rows(spec), spec, intake).items():
        repository = intake.repository(
            name, f"stack:{spec}", [file for file, _ in rows], revision=_revision(rows)
        )
        if len(repository.documents) < intake.limits.min_documents:
            continue
        yield repository
        taken += 1
        if taken == intake.limits.stack_repositories:
            return


_Row = tuple[File | Left, str | None]


def _grouped(rows: Iterable[Mapping[str, Any]], spec: str, intake: Intake) -> dict[str, list[_Row]]:
    groups: dict[str, list[_Row]] = {}
    try:
        for row in islice(rows, intake.limits.stack_rows):
            name, path = _column(row, REPOSITORY_COLUMNS, spec), _column(row, PATH_COLUMNS, spec)
            text = _column(row, TEXT_COLUMNS, spec)
            revision = next((row[each] for each in REVISION_COLUMNS if row.get(each)), None)
            if name and path and isinstance(text, str):
                groups.setdefault(str(name), []).append((_file(str(path), text, intake), revision))
            else:
                log.debug("stack:%s: a row without repository, path or text is left out", spec)
    # The library passes on whatever its readers of files and networks raise.
    except Exception as error:
        if isinstance(error, InvalidRequestError):
            raise
        raise _unavailable(spec, error) from error
    return groups


def _file(path: str, text: str, intake: Intake) -> File | Left:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts:
        return Left(path, Reason.UNSAFE)
    if language_of(path) not in intake.languages:
        # Not kept in memory: most rows of a mixed data set are of this kind.
        return Left(path, Reason.LANGUAGE)
    # JSON can hold half a surrogate pair, which no UTF-8 file can.
    raw = text.encode("utf-8", "surrogatepass")
    return File(parts.as_posix(), len(raw), lambda limit: raw[:limit])


def _revision(rows: list[_Row]) -> str | None:
    """The commit of the rows if they all have the same, else None: the content's hash."""
    revisions = {revision for _, revision in rows}
    only = revisions.pop()
    return None if revisions else only


def _column(row: Mapping[str, Any], names: tuple[str, ...], spec: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise InvalidRequestError(
        "corpus",
        f"stack:{spec} has none of the columns {', '.join(names)} but {', '.join(row)}; data sets "
        "that only hold identifiers of files (such as The Stack v2) can't be read",
    )


def _rows(spec: str) -> IterableDataset:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InvalidRequestError(
            "corpus", "stack: needs the package datasets; run `pip install datasets`"
        ) from error
    local = Path(spec).expanduser()
    try:
        if local.exists():
            form, files = _local_files(local)
            return load_dataset(form, data_files=files, split="train", streaming=True)
        dataset, _, config = spec.partition(":")
        options = {"data_dir" if "/" in config else "name": config} if config else {}
        return load_dataset(dataset, split="train", streaming=True, **options)
    except InvalidRequestError:
        raise
    # Anything from a missing data set to a refused connection.
    except Exception as error:
        raise _unavailable(spec, error) from error


def _local_files(path: Path) -> tuple[str, list[str]]:
    found = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    by_format = {
        form: [str(each) for each in found if _FORMATS.get(each.suffix) == form]
        for form in ("parquet", "json")
    }
    filled = {form: files for form, files in by_format.items() if files}
    if len(filled) != 1:
        raise InvalidRequestError(
            "corpus", f"stack:{path} must hold parquet files or JSON lines, and not both"
        )
    return filled.popitem()


def _unavailable(spec: str, error: Exception) -> InvalidRequestError:
    words = " ".join(str(error).split())[:600]
    return InvalidRequestError(
        "corpus",
        f"stack:{spec} can't be read: {type(error).__name__}: {words}; check its name and the "
        "network, and whether its terms must be accepted on the hub first",
    )
