"""Which language a file is written in, told by its extension."""

from __future__ import annotations

from pathlib import PurePosixPath

from ponderttt.errors import InvalidRequestError

# A header `.h` goes to C although C++ uses it, too: its text is read either way.
_EXTENSIONS = {
    "bash": (".sh", ".bash"),
    "c": (".c", ".h"),
    "cpp": (".cc", ".cpp", ".cxx", ".hh", ".hpp", ".hxx"),
    "csharp": (".cs",),
    "go": (".go",),
    "haskell": (".hs",),
    "java": (".java",),
    "javascript": (".js", ".jsx", ".mjs", ".cjs"),
    "julia": (".jl",),
    "kotlin": (".kt", ".kts"),
    "lua": (".lua",),
    "php": (".php",),
    "python": (".py", ".pyi"),
    "ruby": (".rb",),
    "rust": (".rs",),
    "scala": (".scala",),
    "sql": (".sql",),
    "swift": (".swift",),
    "typescript": (".ts", ".tsx", ".mts", ".cts"),
    "zig": (".zig",),
}

#: Every language that can be asked for.
LANGUAGES = tuple(sorted(_EXTENSIONS))
DEFAULT = ("python",)

_BY_EXTENSION = {extension: name for name, all_of in _EXTENSIONS.items() for extension in all_of}


def language_of(path: str) -> str | None:
    """The language of a file, or None where its extension is none that we know.

    Args:
        path: with `/`; only its last extension counts, in any case.
    """
    return _BY_EXTENSION.get(PurePosixPath(path).suffix.lower())


def parse_languages(text: str) -> tuple[str, ...]:
    """Languages out of a comma-separated list such as `python,rust`, sorted, each once.

    Raises:
        InvalidRequestError: the list is empty or names a language that we do not know.
    """
    return checked_languages([name.strip().lower() for name in text.split(",") if name.strip()])


def checked_languages(names: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """The same for names that are separate already.

    Raises:
        InvalidRequestError: there are none, or one of them is unknown.
    """
    known = ", ".join(LANGUAGES)
    if not names:
        raise InvalidRequestError("languages", f"none is given; name at least one of {known}")
    for name in names:
        if name not in _EXTENSIONS:
            raise InvalidRequestError("languages", f"{name!r} is not one of {known}")
    return tuple(sorted(set(names)))
