"""From a machine and a model to settings, each with its reason. Pure.

1. The model is the largest that leaves room for its context; a person may name another one.
2. What the model and the system leave of memory goes to the context, up to what agents use.
3. Keys and values are halved (`q8_0`) only where that brings the context to what agents need.
4. A template that drops tools is replaced where Keepwarm has one of the same kind.
5. Layers go to a GPU as far as its memory holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepwarm.engine.gguf_header import ModelHeader
from keepwarm.errors import ModelError
from keepwarm.operate.machine import FoundModel, Gpu, ThisMachine

_GIB = 1 << 30
# For the system and other programs, and for what an engine computes with.
_RESERVE_BYTES = 3 * _GIB // 2
# Claude Code's prompt has 20,000 tokens; with a conversation behind it an agent needs this much,
# and two of them have twice as much to share. More helps few and costs memory from the start.
_AGENT_TOKENS = 32_768
_MOST_TOKENS = 131_072
_STEP_TOKENS = 4096
# Slot files pass through memory, one slot's rows at a time.
_STAGED_SHARE = 0.8
_Q8_SHARE = 17 / 32
# All layers, whatever the model has.
ALL_LAYERS = 999


@dataclass(frozen=True, slots=True)
class Proposed:
    """One setting by its dotted key, and why."""

    key: str
    value: Any
    reason: str


def best_model(
    machine: ThisMachine, read: Callable[[Path], ModelHeader]
) -> tuple[FoundModel, ModelHeader] | None:
    """The largest model that leaves room for an agent's context; None: there is none."""
    for model in machine.models:
        try:
            header = read(model.path)
        except ModelError:
            continue
        if _context(header, _room(machine, header), 1.0) >= _AGENT_TOKENS:
            return model, header
    return None


def propose(
    machine: ThisMachine, header: ModelHeader, *, tools_template: Path | None = None
) -> list[Proposed]:
    """Settings for a model on a machine.

    `tools_template` is for models of the ChatML kind whose own template has no place for tools.
    """
    room = _room(machine, header)
    out = [
        Proposed(
            "engine.model",
            str(header.path),
            f"{header.name}, {_gb(header.size_bytes)}, of {_gb(machine.memory_bytes)} memory "
            f"({_gb(machine.free_bytes)} free)",
        )
    ]
    tokens, types = _context(header, room, 1.0), []
    if tokens < _AGENT_TOKENS and header.row_bytes:
        halved = _context(header, room, _Q8_SHARE)
        if halved > tokens:
            reason = "half the memory a token, since f16 would leave less context than agents need"
            tokens = halved
            types = [Proposed(f"engine.kv_type_{which}", "q8_0", reason) for which in "kv"]
    slots = 4 if tokens >= 2 * _AGENT_TOKENS else 2
    cost = f"{_gb(tokens * header.row_bytes)} as f16" if header.row_bytes else "an unknown size"
    agents = "; agents' own prompts have up to 20,000" if tokens < _AGENT_TOKENS else ""
    out.append(Proposed("engine.context", tokens, f"tokens for all slots, {cost}{agents}"))
    out.append(Proposed("engine.slots", slots, "an agent and its side requests keep a slot each"))
    out.append(Proposed("engine.pool", "shared", "one long conversation may use all of it"))
    out += types
    own = header.chat_template
    if tools_template and "<|im_start|>" in own and "tools" not in own:
        reason = "the model's own template drops tools, which agents can't do without"
        out.append(Proposed("engine.chat_template", str(tools_template), reason))
    if machine.gpus:
        out.append(_layers(machine.gpus, header, tokens))
    out.append(
        Proposed(
            "engine.threads",
            machine.cores,
            f"the cores that may be used here: {machine.cores}",
        )
    )
    return out


def _room(machine: ThisMachine, header: ModelHeader) -> int:
    """Bytes for the context behind the model: a GPU's, where it holds both, else the machine's."""
    dedicated = sum(gpu.memory_bytes for gpu in machine.gpus)
    whole = header.size_bytes + _RESERVE_BYTES + _AGENT_TOKENS * header.row_bytes
    free = dedicated if dedicated >= whole else machine.free_bytes
    return max(free - header.size_bytes - _RESERVE_BYTES, 0)


def _context(header: ModelHeader, room: int, share: float) -> int:
    """Tokens of context that fit, in whole steps."""
    most = _MOST_TOKENS
    if header.train_context_tokens:
        # Each slot holds at most what the model was trained for.
        most = min(most, 4 * header.train_context_tokens)
    if header.row_bytes:
        most = min(most, int(room * _STAGED_SHARE / (header.row_bytes * share)))
    return max(most // _STEP_TOKENS, 1) * _STEP_TOKENS


def _layers(gpus: tuple[Gpu, ...], header: ModelHeader, tokens: int) -> Proposed:
    names = ", ".join(gpu.name for gpu in gpus)
    memory = sum(gpu.memory_bytes for gpu in gpus)
    needed = header.size_bytes + tokens * header.row_bytes + _GIB // 2
    if not memory:
        return Proposed("engine.gpu_layers", ALL_LAYERS, f"{names} shares the machine's memory")
    engine = (
        "; the engine must be built for it: a llama-server (engine.binary), or xllamacpp's own "
        "package for it"
    )
    if needed <= memory:
        return Proposed("engine.gpu_layers", ALL_LAYERS, f"all layers fit {names}{engine}")
    layers = header.layers * memory // needed if header.layers else 0
    reason = f"as many of {header.layers} layers as {_gb(memory)} of {names} hold{engine}"
    return Proposed("engine.gpu_layers", int(layers), reason)


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:,.1f} GB"
