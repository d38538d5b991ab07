"""Logging: one line an event, for people or as JSON, on stderr."""

from __future__ import annotations

import logging
import sys
from typing import Any

import msgspec

from keepwarm.settings import LogSettings


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry).decode()


def set_up_logging(settings: LogSettings) -> None:
    """Send the `keepwarm` loggers to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    human = "%(asctime)s %(levelname)-7s %(message)s"
    handler.setFormatter(
        _Json() if settings.format == "json" else logging.Formatter(human, "%H:%M:%S")
    )
    logger = logging.getLogger("keepwarm")
    logger.handlers[:] = [handler]
    logger.setLevel(settings.level.upper())
    logger.propagate = False
