"""What a night came to: from the journal's rows to figures. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


_RATE_TOKENS = 16


def build_report(
    tasks: Sequence[Row],
    fills: Sequence[Row],
    *,
    total: int,
    bad_lines: int,
    planned_tokens: int,
    naive_tokens: int,
    least_tokens: int,
    planned_prompt_tokens: int,
) -> dict[str, Any]:
    """The report of a night, over all its runs.

    Args:
        tasks: the journal's rows of ended tasks; times in seconds of the Unix epoch.
        fills: those of filled branches.
        total: valid tasks of the file.
        bad_lines: lines that couldn't be used.
        planned_tokens, naive_tokens, least_tokens: prefilled tokens as estimated before.
        planned_prompt_tokens: all prompts' lengths as estimated; what they really had corrects the
            three estimates.

    Returns:
        Counts; `*_tokens` in tokens, `*_s` in seconds. `active_s` is the time in which anything
        ran, so that a night that was interrupted is judged by what it worked.
    """
    ran = [row for row in tasks if "prefilled" in row]
    prefilled = _total(ran, "prefilled") + _total(fills, "prefilled")
    reused = _total(ran, "cached") - _total(fills, "prefilled")
    prompt = _total(ran, "prefilled") + _total(ran, "cached")
    # Estimates are from characters; only tasks that ran can be compared.
    ratio = prompt / planned_prompt_tokens if planned_prompt_tokens and len(ran) == total else 1.0
    naive = round(naive_tokens * ratio)
    active_s = _union_s([*tasks, *fills])
    s_per_token = _prefill_rate(ran, active_s)
    succeeded = sum(bool(row["ok"]) for row in tasks)
    left = total - sum("began_s" in row for row in tasks)
    times = [row for row in [*tasks, *fills] if "began_s" in row]
    return {
        "tasks": total,
        "succeeded": succeeded,
        "failed": sum(not row["ok"] and "began_s" in row for row in tasks),
        "unusable_lines": bad_lines,
        "left": left,
        "began_s": min((row["began_s"] for row in times), default=None),
        "ended_s": max((row["ended_s"] for row in times), default=None),
        "active_s": round(active_s, 3),
        "tasks_an_hour": round(3600 * succeeded / active_s, 1) if active_s else None,
        "prompt_tokens": prompt,
        "prefilled_tokens": prefilled,
        "reused_tokens": max(reused, 0),
        "decoded_tokens": _total(ran, "decoded"),
        "fills": len(fills),
        "estimated": {
            "planned_prefill_tokens": round(planned_tokens * ratio),
            "least_prefill_tokens": round(least_tokens * ratio),
            "naive_prefill_tokens": naive,
        },
        "prefill_s_per_token": s_per_token,
        # The estimates are of the whole pile: with a part of it there is nothing to compare.
        "seconds_saved": None if left else _saved_s(naive - prefilled, s_per_token),
        "attempts": sum(row.get("attempts", 0) for row in tasks),
        "by_tier": _grouped(ran, "tier"),
        "by_plan": _grouped(ran, "plan"),
    }


def _total(rows: Sequence[Row], key: str) -> int:
    return sum(row.get(key, 0) for row in rows)


def _prefill_rate(rows: Sequence[Row], active_s: float) -> float | None:
    """Seconds of the machine for a token.

    A request's own time is longer, since others are worked on beside it: it is divided by how many
    were on average. Replies that prefilled little tell a latency and not a rate.
    """
    told = [row for row in rows if row.get("prefill_n", 0) >= _RATE_TOKENS]
    tokens = _total(told, "prefill_n")
    if not tokens or not active_s:
        return None
    beside = max(sum(row["ended_s"] - row["began_s"] for row in rows) / active_s, 1.0)
    return float(round(sum(row["prefill_s"] for row in told) / tokens / beside, 6))


def _saved_s(tokens: int, s_per_token: float | None) -> float | None:
    return None if s_per_token is None else round(tokens * s_per_token, 1)


def _union_s(rows: Sequence[Row]) -> float:
    """Seconds in which at least one of them ran."""
    spans = sorted((row["began_s"], row["ended_s"]) for row in rows if "began_s" in row)
    total = 0.0
    until = float("-inf")
    for began_s, ended_s in spans:
        total += max(ended_s - max(began_s, until), 0.0)
        until = max(until, ended_s)
    return total


def _grouped(rows: Sequence[Row], key: str) -> dict[str, dict[str, int]]:
    out: dict[str, dict[str, int]] = {}
    for row in rows:
        name = str(row.get(key) or "unknown")
        group = out.setdefault(name, dict.fromkeys(_GROUP_KEYS, 0))
        group["tasks"] += 1
        group["prefilled_tokens"] += row.get("prefilled", 0)
        group["reused_tokens"] += row.get("cached", 0)
        group["decoded_tokens"] += row.get("decoded", 0)
    return dict(sorted(out.items()))


_GROUP_KEYS = ("tasks", "prefilled_tokens", "reused_tokens", "decoded_tokens")
