"""The third judge: the model itself, asked for one letter where the scores leave doubt.

It is asked only where a sure answer might save more than asking costs (`Decision.doubt_s`), with a
static question in front that stays warm like a tier's prompt, so that it evaluates the task's own
words and generates one token. Pure; who asks is `gateway.judge`.
"""

from __future__ import annotations

from typing import Any, Final

from keepwarm.core.tiers import ContextRole, Tier, TierText
from keepwarm.router.types import FULL, MINIMAL, STANDARD

#: Its own name among the prompts that are kept warm; no tier can be asked for by it.
NAME: Final = "judge"

_QUESTION: Final = """\
You sort tasks for an assistant. Read the task in the user's message; don't do it. Answer with one \
letter.

A: it can be answered at once, from general knowledge or from the task's own words: a question, an \
explanation, a translation, a sum, a short text, small talk.
B: it needs a tool: reading or writing files, running commands or code, the web, a calendar, mail, \
a device, or facts of today such as weather, prices and news.
C: it needs more than the task says: what was said in earlier conversations, the user's documents \
or projects, or long and careful work in several steps.

Examples: "What is the capital of Peru?" A. "Rename the log files in this folder." B. "Go on with \
the plan we made last week." C. "Translate good night into Italian." A. "Will it rain tomorrow?" B.
"""
_TIER_OF: Final = {"A": MINIMAL, "B": STANDARD, "C": FULL}
#: The scores see as much of a long request (docs/router.md); the end holds what is asked for.
_FIRST_CHARS: Final = 700
_LAST_CHARS: Final = 250


def judges_prompt() -> Tier:
    """The question as a static prompt, to be warmed and shared like a tier's."""
    return Tier(
        name=NAME,
        description="Which tier does this task need?",
        extends=None,
        segments=(TierText(NAME, _QUESTION, ContextRole.SYSTEM),),
        tools=(),
    )


def question_of(text: str) -> dict[str, Any]:
    """A chat request that asks for a task's letter; the static question isn't in it yet.

    The grammar leaves no room for reasoning. No argument that shapes the template: the prompt in
    front must be the one that is kept warm.
    """
    if len(text) > _FIRST_CHARS + _LAST_CHARS:
        text = f"{text[:_FIRST_CHARS]}\n...\n{text[-_LAST_CHARS:]}"
    return {
        "messages": [{"role": "user", "content": f"Task: {text}\n\nAnswer with A, B or C."}],
        "max_tokens": 1,
        "temperature": 0,
        "grammar": 'root ::= "A" | "B" | "C"',
    }


def verdict_of(said: str | None) -> str | None:
    """The tier of a reply's text; None if it isn't one of the letters."""
    return _TIER_OF.get((said or "").strip())
