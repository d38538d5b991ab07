"""What all deployments of one gateway share: keys, rules, metrics, and the account of requests."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from keepwarm.core.hygiene import Hygiene, hygiene_of
from keepwarm.explain.explainer import Explainer, Sink
from keepwarm.explain.metrics import Metrics
from keepwarm.explain.tracing import Tracing, start_tracing
from keepwarm.keys import Keyring, load_keys
from keepwarm.settings import Places, Settings, trace_export


@dataclass(frozen=True, slots=True)
class House:
    """See the module. `started_s` is the wall clock's."""

    settings: Settings
    places: Places
    keys: Keyring
    hygiene: Hygiene
    metrics: Metrics
    tracing: Tracing | None
    explainer: Explainer
    started_s: float = field(default_factory=time.time)


def open_house(settings: Settings, places: Places) -> House:
    """Read the keys, and begin to count and trace.

    Raises:
        ConfigError: the keys can't be read.
    """
    server = settings.server
    keys = load_keys(server.api_keys, server.api_key_file, server.operators)
    metrics, tracing = Metrics(), start_tracing(trace_export())
    sinks: list[Sink] = [metrics, *([tracing] if tracing else [])]
    return House(
        settings,
        places,
        keys,
        hygiene_of(settings.hygiene.rules, settings.hygiene.drop_lines),
        metrics,
        tracing,
        Explainer(keeps_text=settings.log.prompts, sinks=sinks),
    )
