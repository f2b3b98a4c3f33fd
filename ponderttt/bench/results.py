"""`bench.json`: what was measured with which settings, kept after every row."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ponderttt.bench import vllm_env
from ponderttt.bench.texts import provenance
from ponderttt.errors import InvalidRequestError

FILE = "bench.json"


def settings(
    model: str, threads: int, repeats: int, quick: bool, seed: int, *, compiled: bool = False
) -> dict[str, Any]:
    """Everything that figures depend on, as far as it is known."""
    return {
        "model": model,
        "dtype": "float32",
        "threads": threads,
        "repeats": repeats,
        "quick": quick,
        "seed": seed,
        "texts": provenance(),
        "versions": {
            **{name: version(name) for name in ("ponderttt", "torch", "transformers", "peft")},
            "vllm": vllm_env.REQUIREMENT,
        },
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        # Only then, so that earlier runs can still be resumed.
        **({"compile": True} if compiled else {}),
    }


@dataclass(slots=True)
class Results:
    """Rows by workload and curves by name.

    Args:
        directory: holds `bench.json`.
        settings: see above.
    """

    directory: Path
    settings: dict[str, Any]
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    scaling: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def resume(cls, directory: Path, settings: dict[str, Any]) -> Results:
        """What an earlier run with the same settings left; nothing where there was none.

        Raises:
            InvalidRequestError: the file is damaged, or of a run with other settings.
        """
        path = directory / FILE
        if not path.is_file():
            return cls(directory, settings)
        try:
            kept = json.loads(path.read_text())
            found = cls(directory, kept["settings"], kept["rows"], kept["scaling"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidRequestError("resume", f"{path} cannot be read: {error}") from error
        differs = [key for key in settings if found.settings.get(key) != settings[key]]
        if differs:
            raise InvalidRequestError(
                "resume",
                f"{path} was measured with other settings ({', '.join(differs)}); "
                "choose another --output, or leave --resume out to measure anew",
            )
        return found

    def is_done(self, name: str) -> bool:
        """Whether a workload was measured with all of its peers."""
        return name in self.rows and not self.rows[name]["skipped"]

    def save(self) -> None:
        """Write the file in one go.

        Raises:
            InvalidRequestError: the directory can't be written to.
        """
        path = self.directory / FILE
        value = {"settings": self.settings, "rows": self.rows, "scaling": self.scaling}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(json.dumps(value, indent=2) + "\n")
            unfinished.replace(path)
        except OSError as error:
            raise InvalidRequestError("output", f"{path} cannot be written: {error}") from error
