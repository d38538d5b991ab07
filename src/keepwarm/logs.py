"""Logging: one line an event, for people or as JSON, on stderr. Prompts are in none of them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

import msgspec

from keepwarm.settings import LogSettings

_requests = logging.getLogger("keepwarm.request")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if told := getattr(record, "request", None):
            entry |= request_fields(told)
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


def log_request(record: Mapping[str, Any]) -> None:
    """One line for a finished request; see `explain.record` for what it is made of.

    Text of the prompt is in it only where the record holds it, and in JSON alone.
    """
    level = logging.INFO if record["outcome"] in ("answered", "escalated") else logging.WARNING
    if _requests.isEnabledFor(level):
        _requests.log(level, "%s", request_line(record), extra={"request": record})


def request_line(record: Mapping[str, Any]) -> str:
    """A request for people: who, where from, how much was warm, how fast, and why not faster."""
    where = f"{record['id']} {record['api']} tier={record['tier']} plan={record['plan']}"
    if record["outcome"] != "answered":
        return f"{where} {record['outcome']}: {record['summary']}"
    tokens, timing = record["tokens"], record["timing"]
    warm = tokens["prompt"] - tokens["cold"]
    line = (
        f"{where} slot={record['slot']} warm={warm} cold={tokens['cold']} "
        f"out={tokens['decoded']} ttft={timing['ttft_s']:.3f}s "
        f"(cold {timing['cold_ttft_s']:.2f}s)"
    )
    return line if record["cause"] in ("none", "new_text") else f"{line} {record['cause']}"


def request_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """A request for programs: flat, with units last."""
    timing, tokens = record["timing"], record["tokens"]
    out = {
        name: record[name]
        for name in ("id", "api", "model", "tier", "tier_reason", "plan", "slot", "outcome")
    }
    out |= {"status": record["status"], "cause": record["cause"]}
    out |= {f"{name}_tokens": count for name, count in tokens.items()}
    out |= {name: seconds for name, seconds in timing.items() if seconds is not None}
    if record["estimate"]:
        out["estimated_ttft_s"] = record["estimate"]["ttft_s"]
    if record["error"]:
        out["error"] = record["error"]
    if record["difference"]:
        named = ("place", "kind", "context", "before", "after", "before_hash", "after_hash")
        difference = record["difference"]
        out["difference"] = {n: difference[n] for n in named if difference.get(n)}
    return out
