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
    """What answering with a tier costs now, in estimated seconds.

    `first_s`: waiting, restoring and prefilling until the first token; little where it is warm.
    `token_s`: each token of the reply, the more the longer the prompt it looks back at.
    `displaced_s`: having back later what its KV state pushes out of the slots.
    """

    tier: str
    first_s: float
    token_s: float = 0.0
    displaced_s: float = 0.0

    def reply_s(self, tokens: float) -> float:
        """Decoding a reply of so many tokens."""
        return tokens * self.token_s

    def total_s(self, tokens: float) -> float:
        """All of it, with a reply of so many tokens."""
        return self.first_s + self.reply_s(tokens) + self.displaced_s


@dataclass(frozen=True, slots=True)
class MissCosts:
    """What a tier too small or too large costs, in seconds of somebody's time.

    `tools_s`, `context_s`, `depth_s`: a useless answer, since something was lacking. Context costs
    less than tools, since a model mostly says that it doesn't know what it was never told; depth
    costs least, since the answer is only poorer. `tools_told`, `context_told`: the share of cases
    in which the model says itself that it lacks something; these cost one short reply and the
    larger tier instead. `spoiled`: the share of answers that need nothing and that a larger prompt
    spoils, as a small model calls a tool that it was shown; such an answer is as useless as one
    without tools. docs/router.md tells how the shares were measured.
    """

    tools_s: float = 25.0
    context_s: float = 10.0
    depth_s: float = 2.0
    tools_told: float = 0.6
    context_told: float = 0.3
    spoiled: float = 0.128


@dataclass(frozen=True, slots=True)
class ExpectedCost:
    """A tier's expected cost for one request, in seconds, by its parts.

    `risk_s`: what a tier too small or too large costs, times how probable it is.
    """

    first_s: float
    reply_s: float
    displaced_s: float
    risk_s: float

    @property
    def own_s(self) -> float:
        """What it costs if it is the right one."""
        return self.first_s + self.reply_s + self.displaced_s

    @property
    def total_s(self) -> float:
        """What the tiers are compared by."""
        return self.own_s + self.risk_s


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

    `kind` is the kind of task (`replies.TaskKind`), `reply_tokens` how long a reply is expected to
    be, `costs` what each tier would cost.
    """

    tier: str
    reason: Reason
    p_tools: float
    p_context: float
    detail: str = ""
    contributions: Sequence[Contribution] = field(default_factory=tuple)
    costs: Mapping[str, ExpectedCost] = field(default_factory=dict)
    kind: str = ""
    reply_tokens: float = 0.0

    def to_json(self) -> dict[str, object]:
        """The decision as plain values, for headers, logs and `--json`."""
        return {
            "tier": self.tier,
            "reason": str(self.reason),
            "detail": self.detail,
            "p_tools": round(self.p_tools, 4),
            "p_context": round(self.p_context, 4),
            "kind": str(self.kind),
            "reply_tokens": round(self.reply_tokens),
            "costs": {
                tier: {
                    "first_s": round(cost.first_s, 3),
                    "reply_s": round(cost.reply_s, 3),
                    "displaced_s": round(cost.displaced_s, 3),
                    "risk_s": round(cost.risk_s, 3),
                    "expected_s": round(cost.total_s, 3),
                }
                for tier, cost in self.costs.items()
            },
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
