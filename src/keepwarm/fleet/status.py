"""What a process's routers know, for its pages.

A module of its own, without Ray: Serve carries the router's class to other processes by value, and
with it copies of what stands beside it. A module that is only named is the process's own.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from keepwarm.fleet.routing import Fleet
from keepwarm.fleet.wire import NodeNote


class RouterView(Protocol):
    """What is shown of a router. `heard_s` and `told` are by the router's name of a node."""

    fleet: Fleet
    told: dict[str, NodeNote]
    heard_s: dict[str, float]


ROUTERS: weakref.WeakSet[Any] = weakref.WeakSet()
"""The routers of this process."""


def fleet_status() -> dict[str, Any]:
    """The nodes as the routers of this process see them, for JSON."""
    nodes: dict[str, Any] = {}
    now_s = time.time()
    known = 0
    routers: list[RouterView] = list(ROUTERS)
    for router in routers:
        known = max(known, router.fleet.known_prefixes)
        for name in router.fleet.nodes:
            told = router.told.get(name)
            nodes[name] = {
                "state": told.state if told else "unknown",
                "heard_s_ago": round(now_s - router.heard_s[name], 1) if told else None,
                "backlog_s": round(router.fleet.wait_s(name, now_s=now_s), 3),
                "prefixes": len(told.held) // 8 if told else 0,
                "stored": len(told.stored) // 8 if told else 0,
                **(told.about if told else {}),
            }
    return {"nodes": nodes, "known_prefixes": known, "router_pid": os.getpid()}


def fleet_metrics() -> bytes:
    """The same as Prometheus metrics, by node."""
    registry = CollectorRegistry()
    nodes = list(fleet_status()["nodes"].values())
    for name, (what, value) in _GAUGES.items():
        gauge = Gauge(f"keepwarm_fleet_{name}", what, ["node"], registry=registry)
        for node in nodes:
            if "node" in node:
                gauge.labels(node["node"]).set(value(node))
    tokens = Gauge(
        "keepwarm_fleet_prompt_tokens",
        "Prompt tokens since the node's start by where their KV state came from",
        ["node", "source"],
        registry=registry,
    )
    for node in nodes:
        for source, count in node.get("tokens", {}).items():
            tokens.labels(node["node"], source).set(count)
    return generate_latest(registry)


_GAUGES: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
    "ready": ("1 if the node's prefixes are warm", lambda node: node["state"] == "ready"),
    "report_age_seconds": ("Since the node's last report", lambda node: node["heard_s_ago"]),
    "backlog_seconds": ("Until the node is through with its prompts", lambda n: n["backlog_s"]),
    "queued": ("Requests that wait for a slot", lambda node: node["queued"]),
    "busy_slots": ("Slots in use", lambda node: node["busy_slots"]),
    "requests": ("Requests since the node's start", lambda node: node["asked"]),
    "prefixes": ("Prefixes the node tells", lambda node: node["prefixes"]),
    "store_bytes": ("The node's own store", lambda node: node["store_bytes"]),
    "moved_tokens": (
        "Tokens moved here through the shared store",
        lambda node: node.get("shared", {}).get("moved_tokens", 0),
    ),
    "written_bytes": (
        "Bytes written to the shared store",
        lambda node: node.get("shared", {}).get("stored_bytes", 0),
    ),
}
