"""The embedded engine's process: `python -m keepwarm.engine.child`, parameters as JSON on stdin.

It lives exactly as long as its standard input stays open: the parent never closes it, so when the
parent ends, by SIGKILL too, the pipe breaks and this process leaves. That works on Linux and macOS
alike, which a parent-death signal would not.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any, NoReturn

# Enumerations by the parameter that takes them, and what their members' names begin with.
_WORDS = {
    "split_mode": ("llama_split_mode", "LLAMA_SPLIT_MODE_"),
    "rope_scaling_type": ("llama_rope_scaling_type", "LLAMA_ROPE_SCALING_TYPE_"),
    "load_mode": ("llama_load_mode", "LLAMA_LOAD_MODE_"),
    "numa": ("ggml_numa_strategy", "GGML_NUMA_STRATEGY_"),
}


def main() -> NoReturn:
    """Serve one model until standard input closes or a signal comes."""
    params = json.loads(sys.stdin.readline())
    # Ctrl-C in a terminal goes to the whole process group; the parent decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    _server = _start(params)
    sys.stdin.read()
    # Nor is the server ended first: that waits for its threads, until a prefill is through, and now
    # and then for ever, as any normal exit would. Nobody is left to wait for them.
    os._exit(0)


def _start(params: dict[str, Any]) -> object:
    import xllamacpp  # noqa: PLC0415 - 100 MB of extension, needed in this process only

    common = xllamacpp.CommonParams()
    for path, value in params.items():
        target = common
        *parents, name = path.split(".")
        for parent in parents:
            target = getattr(target, parent)
        native = _native(xllamacpp, name, value)
        if name == "tensor_split":
            native = native + [0.0] * (len(target.tensor_split) - len(native))
        setattr(target, name, native)
    return xllamacpp.Server(common)


def _native(xllamacpp: Any, name: str, value: Any) -> Any:
    """Enumerations travel as words."""
    if name in ("cache_type_k", "cache_type_v"):
        return getattr(xllamacpp.ggml_type, f"GGML_TYPE_{value.upper()}")
    if name == "flash_attn_type":
        words = {"auto": "AUTO", "on": "ENABLED", "off": "DISABLED"}
        return getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{words[value]}")
    if name in _WORDS:
        kind, prefix = _WORDS[name]
        return getattr(getattr(xllamacpp, kind), prefix + value.upper())
    if name == "types":
        return [getattr(xllamacpp.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_{value}")]
    if name == "lora_adapters":
        return [xllamacpp.CommonAdapterLoraInfo(path, scale) for path, scale in value]
    return value


if __name__ == "__main__":
    main()
