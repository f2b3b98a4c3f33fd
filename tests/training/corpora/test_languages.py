"""Languages by extension."""

from __future__ import annotations

import pytest

from ponderttt.errors import InvalidRequestError
from training.corpora.languages import LANGUAGES, language_of, parse_languages


@pytest.mark.parametrize(
    ("path", "language"),
    [("a/b.py", "python"), ("x.RS", "rust"), ("x.d.ts", "typescript"), ("x.h", "c"),
     ("Makefile", None), (".py", None), ("x.py/README", None)],
)  # fmt: skip
def test_language_of_a_path_goes_by_its_last_extension(path: str, language: str | None) -> None:
    assert language_of(path) == language


def test_parse_languages_sorts_and_takes_each_once() -> None:
    assert parse_languages(" Rust,python, rust,") == ("python", "rust")
    assert parse_languages(",".join(LANGUAGES)) == LANGUAGES


@pytest.mark.parametrize("text", ["", " , ", "pyhton", "python;rust"])
def test_parse_languages_where_one_is_unknown_or_none_given_says_which_there_are(text: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"languages: .*python"):
        parse_languages(text)
