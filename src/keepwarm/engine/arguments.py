"""Arguments of an engine binary: which of a user's own can't be, and which of ours may be left out.

What a user hands on goes behind our own flags, so it would win. Where that takes the engine from
under Keepwarm (another port, a key, another number of slots), it is refused by name before anything
starts, since an engine that is up somewhere else looks like one that loads for ever.

An older or forked binary may not know one of our flags. It says so and ends at once; it is started
again without the flag if that only costs something (see `COSTS`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from types import MappingProxyType

_REACHED = "Keepwarm reaches its engine by itself; clients come to Keepwarm's own --host and --port"
_KEYS = "only Keepwarm asks its engine; keys for clients are server.api_keys"
_MODEL = "the model is Keepwarm's own --model"
_CHAT_ONLY = "such an engine answers no chat"
_CACHE = "the engine's own prompt cache empties slots that are warm; Keepwarm's store replaces it"

# What takes the engine from under Keepwarm, and what to do instead.
REFUSED = MappingProxyType(
    {
        "--host": _REACHED,
        "--port": _REACHED,
        "--api-prefix": _REACHED,
        "--ssl-key-file": _REACHED,
        "--ssl-cert-file": _REACHED,
        "--api-key": _KEYS,
        "--api-key-file": _KEYS,
        "-m": _MODEL,
        "--model": _MODEL,
        "-mu": _MODEL,
        "--model-url": _MODEL,
        "-hf": _MODEL,
        "-hfr": _MODEL,
        "--hf-repo": _MODEL,
        "-np": "give --slots",
        "--parallel": "give --slots",
        "-c": "give --context",
        "--ctx-size": "give --context",
        "--slot-save-path": "slot files pass through store.staging_dir",
        "-kvu": 'set engine.pool = "shared"',
        "--kv-unified": 'set engine.pool = "shared"',
        "-no-kvu": 'set engine.pool = "split"',
        "--no-kv-unified": 'set engine.pool = "split"',
        "-cram": _CACHE,
        "--cache-ram": _CACHE,
        "--cache-idle-slots": _CACHE,
        "--embedding": _CHAT_ONLY,
        "--embeddings": _CHAT_ONLY,
        "--rerank": _CHAT_ONLY,
        "--reranking": _CHAT_ONLY,
    }
)
# The same by environment. Other variables of llama.cpp's lose against our flags.
REFUSED_VARIABLES = MappingProxyType(
    {
        "LLAMA_API_KEY": _KEYS,
        "LLAMA_ARG_API_KEY_FILE": _KEYS,
        "LLAMA_ARG_API_PREFIX": _REACHED,
        "LLAMA_ARG_SSL_KEY_FILE": _REACHED,
        "LLAMA_ARG_SSL_CERT_FILE": _REACHED,
        "LLAMA_ARG_EMBEDDINGS": _CHAT_ONLY,
        "LLAMA_ARG_RERANKING": _CHAT_ONLY,
    }
)

_AS_BUILT = "is as this engine has it by itself"
# Flags of ours that may be left out, and what that costs.
COSTS = MappingProxyType(
    {
        "--slot-save-path": "nothing can be saved or restored, so every start is cold",
        "--cache-ram": f"its own prompt cache {_AS_BUILT}",
        "--no-cache-idle-slots": f"whether idle slots are emptied {_AS_BUILT}",
        "--slot-prompt-similarity": f"its own slot choice {_AS_BUILT}",
        "--kv-unified": f"how slots share the context {_AS_BUILT}",
        "--no-kv-unified": f"how slots share the context {_AS_BUILT}",
        "--flash-attn": f"flash attention {_AS_BUILT}",
        "--swa-full": "sliding windows can't be kept whole",
        "--jinja": "tools may be missing from prompts",
        "--metrics": "/metrics has Keepwarm's own figures only",
        "--log-verbosity": f"how much it logs {_AS_BUILT}",
    }
)

# llama.cpp's words, ik_llama.cpp's and argparse's, for an argument they don't know.
_UNKNOWN = re.compile(
    r"error: (?:invalid argument|unknown argument|unrecognized arguments?): *(\S+)", re.IGNORECASE
)


def conflicts(extra: Iterable[str], variables: Collection[str]) -> list[str]:
    """What of a user's own can't be handed to the engine: a phrase for each, with what to do.

    Args:
        extra: arguments, in llama-server's spelling.
        variables: names of environment variables that are set.
    """
    found: dict[str, str] = {}
    for argument in extra:
        name = argument.partition("=")[0]
        if name.startswith("--"):
            name = name.replace("_", "-")  # as llama.cpp does
        if name in REFUSED:
            found[name] = REFUSED[name]
    found |= {name: why for name, why in REFUSED_VARIABLES.items() if name in variables}
    return [f"{name} ({why})" for name, why in found.items()]


def unknown_argument(log: str) -> str | None:
    """The argument that an engine ended over, by the last lines of its log."""
    match = _UNKNOWN.search(log)
    return match[1] if match else None


def flag_of(argument: str, flags: Iterable[str]) -> str | None:
    """Which of our flags an unknown argument is or belongs to, if that may be left out.

    An older `--flash-attn` takes no value, and then the value is what isn't known.
    """
    flag = ""
    for word in flags:
        if word.startswith("--"):
            flag = word
        if word == argument and flag in COSTS:
            return flag
    return None


def leave_out(flags: Iterable[str], names: Collection[str]) -> list[str]:
    """These flags, each followed by its values, without some."""
    out: list[str] = []
    is_kept = True
    for word in flags:
        if word.startswith("--"):
            is_kept = word not in names
        if is_kept:
            out.append(word)
    return out
