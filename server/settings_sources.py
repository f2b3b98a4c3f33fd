"""Reads settings: the command line wins over the environment, and that over the TOML file."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

from pydantic import ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource

from ponderttt.errors import InvalidRequestError
from server.settings import ENV_PREFIX, Settings

CONFIG_VARIABLE = f"{ENV_PREFIX}CONFIG"

SettingsT = TypeVar("SettingsT", bound=Settings)


@overload
def load_settings(
    given: Mapping[str, Any] | None = None, config: str | Path | None = None
) -> Settings: ...


@overload
def load_settings(
    given: Mapping[str, Any] | None = None,
    config: str | Path | None = None,
    *,
    kind: type[SettingsT],
) -> SettingsT: ...


def load_settings(
    given: Mapping[str, Any] | None = None,
    config: str | Path | None = None,
    *,
    kind: type[Settings] = Settings,
) -> Settings:
    """Settings from the command line, the environment and a TOML file.

    Args:
        given: what the command line names; wins over the rest.
        config: TOML file; None: the one that `PONDERTTT_CONFIG` names, if any.
        kind: which settings.
    Raises:
        InvalidRequestError: a value or key is wrong, or the file can't be read; says which.
    """
    chosen = config or os.environ.get(CONFIG_VARIABLE) or None
    table = _read_toml(Path(chosen).expanduser()) if chosen else {}

    class FromFile(kind):  # type: ignore[valid-type, misc]  # a class given as a value
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, table)

    try:
        return kind.model_construct(**dict(FromFile(**dict(given or {}))))
    except ValidationError as error:
        raise _first_problem(error, chosen, kind) from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequestError("config", f"{path} can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError("config", f"{path} is not valid TOML: {error}") from error


def _first_problem(
    error: ValidationError, config: str | Path | None, kind: type[Settings]
) -> InvalidRequestError:
    problem = error.errors(include_url=False)[0]
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        known = ", ".join(kind.model_fields)
        return InvalidRequestError(key, f"unknown setting in {config}; there are {known}")
    message = problem["msg"].removeprefix("Value error, ")
    return InvalidRequestError(
        key,
        f"{message}, not {problem['input']!r} (--{key.replace('_', '-')}, "
        f"{ENV_PREFIX}{key.upper()}, or {key} in the TOML file)",
    )
