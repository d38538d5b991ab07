"""What an engine is started with, and the flags that follow.

Why these flags (see docs/decisions/0003-slot-setup.md): llama-server's own prompt cache and slot
choice undo warming (an idle slot is saved to the RAM cache and cleared when another task starts),
so both are off (`--cache-ram 0`, `-sps 0`) and Keepwarm names the slot in every request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keepwarm.engine.arguments import leave_out
from keepwarm.engine.tuning import Tuning

# llama-server computes 512 tokens at a time anyway (`--ubatch-size`); with a logical batch of the
# same size other slots decode in between, progress is reported and a hang-up noticed that often.
BATCH_TOKENS = 512

# An engine's compute threads wait for each other by spinning, and GNU OpenMP lets them spin for ten
# milliseconds behind the last token, on cores that the next request's way in needs. So many turns
# are longer than one waits inside a graph, and soon over (docs/decisions/0015-quiet-engine.md).
ENVIRONMENT = {"GOMP_SPINCOUNT": "5000"}

# llama.cpp's levels: warnings, and what it does.
_QUIET, _TALKING = 2, 3

# What every request says, whatever the client or the server's `--cache-reuse` asks for: no chunk of
# a slot is shifted to another place. Its state was computed behind other text, and saved under its
# tokens it would pass for exact (see docs/decisions/0006-cache-reuse.md).
EXACT = {"n_cache_reuse": 0}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to run an engine over one model.

    `context_tokens` is shared by all slots: one pool if `unified`, else an equal part for each.
    `is_talking`: the log tells each request, not only what is wrong. `extra` goes to an engine
    binary unchanged, behind all else. `without`: flags that this binary doesn't know.
    """

    model: Path
    slots: int
    context_tokens: int
    slot_dir: Path
    unified: bool
    threads: int | None = None
    kv_type_k: str = "f16"
    kv_type_v: str = "f16"
    flash_attention: str = "auto"
    chat_template: Path | None = None
    swa_full: bool = False
    is_talking: bool = False
    extra: tuple[str, ...] = field(default=())
    without: frozenset[str] = field(default=frozenset())
    tuning: Tuning = field(default=Tuning({}))

    @property
    def _verbosity(self) -> int:
        return _TALKING if self.is_talking else _QUIET

    def binary_flags(self, *, host: str, port: int) -> list[str]:
        """Arguments for a `llama-server` binary."""
        flags = [
            *("--model", str(self.model), "--host", host, "--port", str(port)),
            *("--ctx-size", str(self.context_tokens), "--parallel", str(self.slots)),
            *("--slot-save-path", f"{self.slot_dir}/", "--cache-ram", "0"),
            *("--slot-prompt-similarity", "0", "--no-cache-idle-slots", "--metrics", "--jinja"),
            *("--cache-type-k", self.kv_type_k, "--cache-type-v", self.kv_type_v),
            *("--flash-attn", self.flash_attention, "--batch-size", str(BATCH_TOKENS)),
            "--kv-unified" if self.unified else "--no-kv-unified",
            *("--log-verbosity", str(self._verbosity)),
        ]
        if self.threads:
            flags += ["--threads", str(self.threads)]
        if self.chat_template:
            flags += ["--chat-template-file", str(self.chat_template)]
        if self.swa_full:
            flags.append("--swa-full")
        # Behind what they override: of a flag that is given twice, the last one counts.
        flags += self.tuning.flags()
        return [*leave_out(flags, self.without), *self.extra]

    def embedded_params(self, *, host: str, port: int) -> dict[str, Any]:
        """The same for `xllamacpp.CommonParams`: attribute paths and values."""
        params: dict[str, Any] = {
            "model.path": str(self.model),
            "hostnames": [host],
            "port": port,
            "n_ctx": self.context_tokens,
            "n_parallel": self.slots,
            "slot_save_path": f"{self.slot_dir}/",
            "cache_ram_mib": 0,
            "slot_prompt_similarity": 0.0,
            "cache_idle_slots": False,
            "kv_unified": self.unified,
            "endpoint_metrics": True,
            "endpoint_props": False,
            "cache_type_k": self.kv_type_k,
            "cache_type_v": self.kv_type_v,
            "flash_attn_type": self.flash_attention,
            "swa_full": self.swa_full,
            "n_batch": BATCH_TOKENS,
            # The memory fit probes devices by loading the model twice; the owner chose the size.
            "fit_params": False,
            "verbosity": self._verbosity,
        }
        if self.threads:
            params["cpuparams.n_threads"] = self.threads
            params["cpuparams_batch.n_threads"] = self.threads
        if self.chat_template:
            params["chat_template"] = self.chat_template.read_text(encoding="utf-8")
        return params | self.tuning.params()
