"""The form of the log: lines for people, or JSON objects for machines.

A record's `fields` (`extra={"fields": {…}}`) become keys of the object, or `key=value` at the end
of the line. The id of the HTTP request at work is added by itself.
"""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]

#: Id of the HTTP request that the running code works for.
REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)


class JsonFormatter(logging.Formatter):
    """One JSON object per record, on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """The object: time (UTC), level, logger, message, the fields, and a traceback if any."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        # Escaped: no line break or control character of a name reaches the log as such.
        return json.dumps(entry, default=str)


class TextFormatter(logging.Formatter):
    """`INFO:     message key=value …`, as uvicorn prints it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and a traceback if there is one."""
        fields = " ".join(f"{name}={value}" for name, value in _fields(record).items())
        line = f"{record.levelname + ':':9} {record.getMessage()}"
        line = line if not fields else f"{line} {fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    request_id = REQUEST_ID.get()
    fields = {"request_id": request_id, **getattr(record, "fields", {})}
    return {name: value for name, value in fields.items() if value is not None}


def log_config(log_format: LogFormat, level: str) -> dict[str, Any]:
    """For `logging.config.dictConfig`: everything to the standard error, in one form.

    Args:
        log_format: of every record, libraries' included.
        level: of our own loggers and uvicorn's; others are heard from `warning` on.
    """
    formatter = JsonFormatter if log_format == "json" else TextFormatter
    ours = {name: {"level": level.upper()} for name in ("ponderttt", "server", "uvicorn")}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"chosen": {"()": formatter}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "chosen"}},
        "root": {
            "level": max(logging.WARNING, logging.getLevelName(level.upper())),
            "handlers": ["stderr"],
        },
        "loggers": ours,
    }
