"""The router's values: what a request looks like, what tiers cost, what was decided and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from keepwarm.router.catalog import ToolText

MINIMAL: Final = "minimal"
STANDARD: Final = "standard"
FULL: Final = "full"
#: Smallest first. What a larger tier holds beyond a smaller one: tools, then context.
TIERS: Final = (MINIMAL, STANDARD, FULL)
AUTO: Final = "auto"


class Reason(StrEnum):
    """Why a tier was chosen. The first group are rules, the second is what the scores said."""

    EXPLICIT = "explicit-tier"
    DEPLOYMENT_RULE = "deployment-rule"
    TOOL_HISTORY = "tool-history"
    FORCED_TOOL = "forced-tool"
    TOOL_WORDS = "asks-for-tools"
    EARLIER = "earlier-reference"
    FILE = "file-reference"
    LONG = "long-request"
    CODE = "much-code"
    STEPS = "several-steps"
    IMAGES_ONLY = "images-only"
    EMPTY = "empty-message"
    SMALL_TALK = "small-talk"
    TIER_WORDS = "tier-words-ignored"
    CONVERSATION = "conversation-tier"

    SIMPLE = "simple"
    NO_TOOLS = "no-tools-on-offer"
    NEEDS_TOOLS = "needs-tools"
    NEEDS_CONTEXT = "needs-context"
    NEEDS_DEPTH = "needs-depth"
    UNSURE = "unsure"
    JUDGED = "judged"
    CHEAPEST_NOW = "cheapest-now"


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """The facts of one request that routing looks at.

    `text` is the last user message's. `tools` are the client's own (None: the tiers' tools are on
    offer). `tier_so_far` is the largest tier this conversation has had.
    """

    text: str
    tools: tuple[ToolText, ...] | None = None
    turns: int = 1
    has_tool_messages: bool = False
    forces_tool: bool = False
    forbids_tools: bool = False
    has_images: bool = False
    brings_system_prompt: bool = False
    explicit_tier: str | None = None
    tier_so_far: str | None = None

    @property
    def is_left_alone(self) -> bool:
        """True if the client brings its own system prompt and doesn't ask for a tier."""
        return self.brings_system_prompt and self.explicit_tier is None


@dataclass(frozen=True, slots=True)
class TierCost:
    """What answering with a tier costs now, in estimated seconds: waiting, restoring and prefilling
    its prompt, and decoding the slower the longer the prompt is. A warm tier costs little."""

    tier: str
    seconds: float


@dataclass(frozen=True, slots=True)
class MissCosts:
    """What it costs, in seconds of somebody's time, to lack what a request needs.

    Most misses are seen and replayed one tier up; the rest are a useless answer. Context costs less
    than tools, since a model knows that it doesn't know what it was never told, and says so; depth
    costs least, since the answer is only poorer. `step_s` is what a larger prompt costs even when
    both are warm (memory, decode speed, a small model's attention). The values are where fewer than
    2 % of requests are under-tiered on unseen sources (docs/router.md).
    """

    tools_s: float = 24.0
    context_s: float = 10.0
    depth_s: float = 5.0
    step_s: float = 0.3


@dataclass(frozen=True, slots=True)
class DeploymentRule:
    """One `[[rule]]` of routing.toml: words or phrases that send a request to a tier.

    `is_floor`: the scores may still choose a larger tier.
    """

    name: str
    tier: str
    any_of: tuple[str, ...] = ()
    all_of: tuple[str, ...] = ()
    none_of: tuple[str, ...] = ()
    min_words: int = 0
    max_words: int | None = None
    is_floor: bool = True


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one feature added to a score, in logits: positive argues for needing it."""

    score: str
    feature: str
    value: float
    logits: float


@dataclass(frozen=True, slots=True)
class Decision:
    """A tier, why, the two probabilities behind it, and the features that moved them most.

    `doubt_s` is what knowing the needs for sure would save on average, 0 where a rule decided;
    `floor` the least tier that rules allow. `expected_s` are the tiers' expected costs; `logits`
    what the shipped scores said (`tools` is absent where nothing was on offer), to be kept with the
    outcome for `keepwarm route calibrate`.
    """

    tier: str
    reason: Reason
    p_tools: float
    p_context: float
    detail: str = ""
    contributions: Sequence[Contribution] = field(default_factory=tuple)
    expected_s: Mapping[str, float] = field(default_factory=dict)
    doubt_s: float = 0.0
    floor: str | None = None
    logits: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """The decision as plain values, for headers, logs and `--json`."""
        return {
            "tier": self.tier,
            "reason": str(self.reason),
            "detail": self.detail,
            "p_tools": round(self.p_tools, 4),
            "p_context": round(self.p_context, 4),
            "expected_s": {tier: round(cost, 3) for tier, cost in self.expected_s.items()},
            "doubt_s": round(self.doubt_s, 3),
            "contributions": [
                {
                    "score": each.score,
                    "feature": each.feature,
                    "value": round(each.value, 3),
                    "logits": round(each.logits, 3),
                }
                for each in self.contributions
            ],
        }


def larger(first: str | None, second: str | None) -> str | None:
    """The larger of two tiers; a name that isn't a tier counts as none."""
    known = [tier for tier in (first, second) if tier in TIERS]
    return max(known, key=TIERS.index, default=None)


def next_tier(tier: str) -> str | None:
    """The tier one step up, or None at the top and for a name that isn't a tier."""
    if tier not in TIERS or tier == TIERS[-1]:
        return None
    return TIERS[TIERS.index(tier) + 1]
