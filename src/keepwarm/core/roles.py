"""Who says a message, by the names that APIs have for them.

A module of its own, since the settings are read with it before the engine begins to load.
"""

from __future__ import annotations

# What a client sends with every task.
SYSTEM_ROLES = ("system", "developer")
# What the model says, as messages of chat and items of responses.
ANSWER_ROLES = ("assistant", "model", "function_call", "reasoning")
