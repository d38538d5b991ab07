"""What makes saved state usable: model, engine build, layout, flags, template, adapters."""

from __future__ import annotations

from typing import Any

import xxhash

from keepwarm.core.memory import MemoryKind
from keepwarm.engine.gguf_header import ModelHeader
from keepwarm.engine.launch import Launch
from keepwarm.engine.tuning import without_rows


def fingerprint(launch: Launch, props: dict[str, Any], *, form: str) -> str:
    """What must be equal for saved state to be used: see the fingerprint in the house's terms.

    Args:
        launch: the engine, its model and flags.
        props: the running engine's `/props`, for the template it really uses.
        form: the layout the engine writes, or the flags that shape whole snapshots.
    """
    h = xxhash.xxh3_128()
    options = launch.options
    parts = [
        launch.identity.kind,
        launch.identity.build,
        launch.model.file_id if launch.model else _described(props),
        _rope(launch.model, props),
        str(props.get("chat_template", "")),
        form,
    ]
    if options:
        parts += [options.kv_type_k, options.kv_type_v, options.flash_attention]
        parts += [str(options.swa_full), *_that_matter(options.extra)]
        parts += options.tuning.rows_identity
    for part in parts:
        raw = part.encode()
        h.update(len(raw).to_bytes(4, "little"))
        h.update(raw)
    return h.hexdigest()


def _described(props: dict[str, Any]) -> str:
    """A server whose model file can't be seen is known by all that it says of the model."""
    keys = ("model_path", "model_ftype", "bos_token", "eos_token")
    return "\n".join(f"{key}={props.get(key)}" for key in keys)


def _rope(model: ModelHeader | None, props: dict[str, Any]) -> str:
    """Which of a model's rope factors are used: a slot's context decides (LongRoPE)."""
    slot_tokens = int((props.get("default_generation_settings") or {}).get("n_ctx") or 0)
    if model is None:
        return str(slot_tokens)  # whether it matters can't be seen
    if not model.rope_switch_tokens:
        return ""
    return "long" if slot_tokens > model.rope_switch_tokens else "short"


# Arguments of llama-server that don't change what a token's KV state is, by how many values they
# take: where and how fast it computes, what it lets in, what it logs, how it samples, what it
# keeps. What isn't listed counts, so a flag that is new or unknown costs warmth, never a wrong
# answer.
_ONE_VALUE = """
-t --threads -tb --threads-batch -C --cpu-mask -Cr --cpu-range --cpu-strict --prio --poll -Cb
--cpu-mask-batch -Crb --cpu-range-batch --cpu-strict-batch --prio-batch --poll-batch -ngl
--gpu-layers --n-gpu-layers -sm --split-mode -ts --tensor-split -mg --main-gpu -dev --device
--numa -ot --override-tensor -ncmoe --n-cpu-moe -fit --fit -a --alias --tags --host --port
--reuse-port --path --api-prefix --api-key --api-key-file --ssl-key-file --ssl-cert-file -to
--timeout --threads-http --slot-save-path -sps --slot-prompt-similarity -cram --cache-ram -ctxcp
--ctx-checkpoints --swa-checkpoints --cache-reuse --sleep-idle-seconds -np --parallel -lv
--verbosity --log-verbosity --log-file --log-colors -n --predict --n-predict -s --seed --samplers
--sampling-seq --temp --top-k --top-p --min-p --top-nsigma --typical --repeat-last-n
--repeat-penalty --presence-penalty --frequency-penalty --xtc-probability --xtc-threshold
--mirostat --mirostat-lr --mirostat-ent --dynatemp-range --dynatemp-exp --grammar --grammar-file
-j --json-schema --json-schema-file --reasoning-format --reasoning-budget
"""
_NO_VALUE = """
--mlock --mmap --no-mmap -dio --direct-io -ndio --no-direct-io --no-repack -nr --repack --no-host
-cmoe --cpu-moe -kvo --kv-offload -nkvo --no-kv-offload --op-offload --no-op-offload --warmup
--no-warmup --perf --no-perf --offline --metrics --slots --no-slots --props --webui --no-webui -v
--verbose --log-verbose --log-disable --log-prefix --no-log-prefix --log-timestamps
--no-log-timestamps -cb --cont-batching -nocb --no-cont-batching --cache-prompt --no-cache-prompt
--cache-idle-slots --no-cache-idle-slots --ignore-eos
"""
_HARMLESS = dict.fromkeys(_ONE_VALUE.split(), 1) | dict.fromkeys(_NO_VALUE.split(), 0)


def _that_matter(extra: tuple[str, ...]) -> list[str]:
    """Arguments of a binary that may change what it computes."""
    out: list[str] = []
    skip = 0
    without = without_rows(extra)
    for index, argument in enumerate(extra):
        if skip:
            skip -= 1
        elif index in without:
            continue
        elif argument in _HARMLESS:
            skip = _HARMLESS[argument]
        else:
            out.append(argument)
    return out


def memory_kind(launch: Launch) -> MemoryKind | None:
    """The model's memory type, None if its header can't be seen."""
    return launch.model.memory if launch.model else None
