"""The router's files: shipped weights, and a deployment's rules beside its tiers.

src/keepwarm/router/weights.json    shipped, learned by scripts/learn_router.py
TIERS/routing.toml                  the deployment's rules and costs; may be absent
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final

from keepwarm.errors import ConfigError
from keepwarm.router.catalog import (
    NO_TOOLS,
    UNKNOWN_TOOLS,
    CatalogCache,
    ToolCatalog,
    ToolText,
    tool_texts,
)
from keepwarm.router.config import RouterConfig, config_from_toml
from keepwarm.router.decide import route
from keepwarm.router.model import Weights, weights_from_json
from keepwarm.router.replies import USUAL_REPLY_TOKENS
from keepwarm.router.types import Decision, RouteRequest, TierCost

RULES_FILE: Final = "routing.toml"


@cache
def shipped_weights() -> Weights:
    """The weights in the package, read once.

    Raises:
        ConfigError: the package is damaged.
    """
    packaged = resources.files("keepwarm.router").joinpath("weights.json")
    try:
        return weights_from_json(json.loads(packaged.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The packaged router weights can't be read ({error}). Install Keepwarm again."
        ) from error


def read_rules(tiers_dir: Path | None) -> RouterConfig:
    """The deployment's `routing.toml`, or the defaults where there is none.

    Raises:
        ConfigError: it can't be read or isn't understood; the message names the file.
    """
    path = tiers_dir / RULES_FILE if tiers_dir else None
    if path is None or not path.exists():
        return RouterConfig()
    try:
        return config_from_toml(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}.") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Router:
    """Weights, rules and the tiers' own tools, ready to route with. Holds a cache of catalogs."""

    weights: Weights
    config: RouterConfig
    own_tools: ToolCatalog
    _catalogs: CatalogCache

    def catalog(self, tools: Sequence[ToolText] | None) -> ToolCatalog:
        """The catalog of a request's own tools; None means the tiers' own."""
        return self.own_tools if tools is None else self._catalogs.get(tools)

    def route(
        self,
        request: RouteRequest,
        costs: Sequence[TierCost] = (),
        *,
        reply_tokens: Mapping[str, float] = USUAL_REPLY_TOKENS,
        explain: bool = False,
    ) -> Decision:
        """Route one request; `costs` are the tiers' now, empty for the usual ones."""
        return route(
            request,
            self.catalog(request.tools),
            costs,
            self.config,
            self.weights,
            reply_tokens=reply_tokens,
            explain=explain,
        )


def load_router(
    *,
    tiers_dir: Path | None,
    own_tools: Sequence[Mapping[str, Any]] | None,
) -> Router:
    """The router of a deployment.

    `own_tools` are the tiers' tools, OpenAI's form; None: not known, so only requests themselves
    are evidence; empty: the tiers bring none.

    Raises:
        ConfigError: rules that can't be used.
    """
    weights = shipped_weights()
    catalogs = CatalogCache(weights.words)
    if own_tools is None:
        own = UNKNOWN_TOOLS
    else:
        texts = tool_texts(list(own_tools))
        own = catalogs.get(texts, is_open=True) if texts else NO_TOOLS
    return Router(weights, read_rules(tiers_dir), own, catalogs)
