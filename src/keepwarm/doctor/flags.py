"""What a llama-server was started with, from its command line. Pure.

Options have changed names over the years, so each is known by all of them; where one is given twice
the last counts, as llama-server has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

_NUMBERS = {
    "-np": "slots",
    "--parallel": "slots",
    "-c": "context_tokens",
    "--ctx-size": "context_tokens",
    "-cram": "cache_ram_mib",
    "--cache-ram": "cache_ram_mib",
    "-t": "threads",
    "--threads": "threads",
}
_TEXTS = {"--slot-save-path": "slot_dir", "-m": "model", "--model": "model"}
_SWITCHES = {
    "-kvu": ("unified", True),
    "--kv-unified": ("unified", True),
    "-no-kvu": ("unified", False),
    "--no-kv-unified": ("unified", False),
    "--cache-idle-slots": ("clears_idle", True),
    "--no-cache-idle-slots": ("clears_idle", False),
    "--swa-full": ("swa_full", True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFlags:
    """The flags that matter to warmth; None where a flag wasn't given.

    `context_tokens` 0 means the model's own; `cache_ram_mib` -1 means no limit.
    """

    slots: int | None = None
    context_tokens: int | None = None
    cache_ram_mib: int | None = None
    threads: int | None = None
    slot_dir: str | None = None
    model: str | None = None
    unified: bool | None = None
    clears_idle: bool | None = None
    swa_full: bool = False

    @property
    def empties_idle_slots(self) -> bool:
        """Whether a starting task saves every idle slot to the prompt cache and clears it.

        That takes unified KV, which is also what an unset -np brings, and a prompt cache.
        """
        unified = self.unified if self.unified is not None else self.slots is None
        return unified and self.clears_idle is not False and self.cache_ram_mib != 0


def is_llama_server(command: Sequence[str]) -> bool:
    """Whether a command line is llama-server's, by its name or by its options."""
    if not command:
        return False
    named = any("llama-server" in PurePath(word).name for word in command[:2])
    return named or {"--slot-save-path", "--ctx-size", "--parallel", "-np"} & set(command) != set()


def read_flags(command: Sequence[str]) -> ServerFlags:
    """The flags of a command line; what can't be read counts as not given."""
    found: dict[str, object] = {}
    words = list(command)
    for index, word in enumerate(words):
        name, equals, inline = word.partition("=")
        value = inline if equals else next(iter(words[index + 1 : index + 2]), "")
        if switch := _SWITCHES.get(name):
            found[switch[0]] = switch[1]
        elif key := _TEXTS.get(name):
            found[key] = value
        elif (key := _NUMBERS.get(name)) and value.lstrip("-").isdecimal():
            found[key] = int(value)
    return ServerFlags(**found)  # type: ignore[arg-type]
