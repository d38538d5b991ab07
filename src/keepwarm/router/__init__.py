"""The tier router: which prompt a request needs, why, and what being wrong would cost. Pure."""

from keepwarm.router.catalog import (
    NO_TOOLS,
    UNKNOWN_TOOLS,
    CatalogCache,
    ToolCatalog,
    ToolText,
    prepare_catalog,
    tool_texts,
)
from keepwarm.router.config import DEFAULT_COSTS, RouterConfig, config_from_toml
from keepwarm.router.decide import route
from keepwarm.router.escalation import (
    Escalation,
    EscalationCause,
    MarkerWatch,
    Verdict,
    escalation_needed,
)
from keepwarm.router.model import Weights, weights_from_json
from keepwarm.router.request import route_request
from keepwarm.router.types import (
    AUTO,
    TIERS,
    Decision,
    MissCosts,
    Reason,
    RouteRequest,
    TierCost,
    larger,
)

__all__ = [
    "AUTO",
    "DEFAULT_COSTS",
    "NO_TOOLS",
    "TIERS",
    "UNKNOWN_TOOLS",
    "CatalogCache",
    "Decision",
    "Escalation",
    "EscalationCause",
    "MarkerWatch",
    "MissCosts",
    "Reason",
    "RouteRequest",
    "RouterConfig",
    "TierCost",
    "ToolCatalog",
    "ToolText",
    "Verdict",
    "Weights",
    "config_from_toml",
    "escalation_needed",
    "larger",
    "prepare_catalog",
    "route",
    "route_request",
    "tool_texts",
    "weights_from_json",
]
