"""The engine's own options that are settings: one table for a binary and the embedded engine.

A setting that isn't set leaves the engine its own default, and writes nothing. `in_rows` is what a
token's keys and values depend on, and so belongs to the fingerprint; where and how fast they are
computed does not. What isn't in the table goes to a binary behind `--`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from keepwarm.engine.gguf_header import read_model
from keepwarm.errors import ConfigError
from keepwarm.settings import EngineSettings


@dataclass(frozen=True, slots=True)
class EngineOption:
    """One option.

    `key` is the setting's in [engine]. `flag` is llama-server's; of a switch that is on by default,
    the one that turns it off. `attribute` is the embedded engine's parameter; empty: it has none.
    `short` are other names of the flag.
    """

    key: str
    flag: str
    attribute: str
    in_rows: bool = False
    short: tuple[str, ...] = ()
    is_file: bool = False


OPTIONS = (
    EngineOption("gpu_layers", "--gpu-layers", "n_gpu_layers", short=("-ngl", "--n-gpu-layers")),
    EngineOption("main_gpu", "--main-gpu", "main_gpu", short=("-mg",)),
    EngineOption("split_mode", "--split-mode", "split_mode", short=("-sm",)),
    EngineOption("tensor_split", "--tensor-split", "tensor_split", short=("-ts",)),
    EngineOption("device", "--device", "", short=("-dev",)),
    EngineOption("cpu_moe_layers", "--n-cpu-moe", "", short=("-ncmoe",)),
    EngineOption("kv_offload", "--no-kv-offload", "no_kv_offload", short=("-nkvo",)),
    EngineOption("batch", "--batch-size", "n_batch", short=("-b",)),
    EngineOption("ubatch", "--ubatch-size", "n_ubatch", short=("-ub",)),
    EngineOption("threads_batch", "--threads-batch", "cpuparams_batch.n_threads", short=("-tb",)),
    EngineOption("mmproj", "--mmproj", "mmproj.path", short=("-mm",), is_file=True),
    EngineOption(
        "draft_model",
        "--model-draft",
        "speculative.draft.mparams.path",
        short=("-md", "--spec-draft-model"),
        is_file=True,
    ),
    EngineOption(
        "draft_max", "--draft-max", "speculative.draft.n_max", short=("--draft", "--draft-n")
    ),
    EngineOption(
        "draft_gpu_layers",
        "--gpu-layers-draft",
        "speculative.draft.n_gpu_layers",
        short=("-ngld", "--n-gpu-layers-draft"),
    ),
    EngineOption("lora", "--lora", "lora_adapters", in_rows=True, short=("--lora-scaled",)),
    EngineOption("rope_scaling", "--rope-scaling", "rope_scaling_type", in_rows=True),
    EngineOption("rope_freq_base", "--rope-freq-base", "rope_freq_base", in_rows=True),
    EngineOption("rope_freq_scale", "--rope-freq-scale", "rope_freq_scale", in_rows=True),
    EngineOption("yarn_orig_context", "--yarn-orig-ctx", "yarn_orig_ctx", in_rows=True),
    EngineOption("yarn_ext_factor", "--yarn-ext-factor", "yarn_ext_factor", in_rows=True),
    EngineOption("yarn_attn_factor", "--yarn-attn-factor", "yarn_attn_factor", in_rows=True),
    EngineOption("yarn_beta_slow", "--yarn-beta-slow", "yarn_beta_slow", in_rows=True),
    EngineOption("yarn_beta_fast", "--yarn-beta-fast", "yarn_beta_fast", in_rows=True),
    EngineOption("mlock", "--mlock", "load_mode"),
    EngineOption("mmap", "--no-mmap", "load_mode"),
    EngineOption("numa", "--numa", "numa"),
)
# Switches have no value behind their flag.
_SWITCHES = frozenset(("kv_offload", "mlock", "mmap"))
_LOAD_MODES = {(True, True): "MMAP_MLOCK", (True, False): "MLOCK", (False, False): "NONE"}


@dataclass(frozen=True, slots=True)
class Tuning:
    """The options that are set, by the settings' keys. `lora` are pairs of a file and a scale.

    `rows_identity` names what saved rows depend on, files by what is in them.
    """

    values: Mapping[str, Any]
    rows_identity: tuple[str, ...] = ()

    def flags(self) -> list[str]:
        """Arguments for a `llama-server`."""
        out: list[str] = []
        for option in OPTIONS:
            value = self.values.get(option.key)
            if option.key == "lora":
                for file, scale in value or ():
                    plain = scale == 1.0
                    out += ["--lora", file] if plain else ["--lora-scaled", f"{file}:{scale:g}"]
            elif value is not None:
                out += [option.flag] if option.key in _SWITCHES else [option.flag, _text(value)]
        return out

    def params(self) -> dict[str, Any]:
        """Attribute paths and values of the embedded engine; see `child` for enumerations."""
        out: dict[str, Any] = {}
        for option in OPTIONS:
            value = self.values.get(option.key)
            if value is None:
                continue
            if option.attribute == "load_mode":
                value = _LOAD_MODES["mlock" in self.values, "mmap" not in self.values]
            elif option.key == "kv_offload":
                value = True
            elif option.key == "tensor_split":
                value = _proportions(value)
            out[option.attribute] = value
        if "draft_model" in self.values:
            out["speculative.types"] = "DRAFT_SIMPLE"
        return out


def tuning_of(settings: EngineSettings, *, embedded: bool) -> Tuning:
    """What is set of the table.

    Raises:
        ConfigError: the engine doesn't have an option, or a file that is named isn't there.
        ModelError: an adapter's file can't be used.
    """
    values: dict[str, Any] = {}
    identity: list[str] = []
    for option in _set(settings):
        value = getattr(settings, option.key)
        if embedded and not option.attribute:
            raise ConfigError(
                f"The embedded engine has no {option.flag} (engine.{option.key}). Leave it out, or "
                "give a llama-server of your own with --engine PATH."
            )
        if option.key == "lora":
            value = [_adapter(text) for text in value]
            identity += [f"lora:{read_model(Path(f)).file_id}:{scale:g}" for f, scale in value]
        elif option.is_file:
            value = str(_file(value, option.key))
        elif option.key == "tensor_split":
            _proportions(value)
        if option.in_rows and option.key != "lora":
            identity.append(f"{option.key}:{value}")
        values[option.key] = value
    return Tuning(values, tuple(identity))


def refuse_tuned(settings: EngineSettings) -> None:
    """Raises: ConfigError: an option is set, and the server that is attached runs already."""
    if found := _set(settings):
        names = ", ".join(f"engine.{option.key}" for option in found)
        flags = " ".join(option.flag for option in found)
        raise ConfigError(
            f"--upstream attaches to a server that runs already, so {names} can't be changed. "
            f"Leave it out, and start that server with {flags}."
        )


def _set(settings: EngineSettings) -> list[EngineOption]:
    defaults = {field.name: field.default for field in msgspec.structs.fields(EngineSettings)}
    return [option for option in OPTIONS if getattr(settings, option.key) != defaults[option.key]]


def without_rows(extra: tuple[str, ...]) -> set[int]:
    """Places in a binary's own arguments of options that no row depends on, values included."""
    plain = {
        name: option
        for option in OPTIONS
        if not option.in_rows
        for name in (option.flag, *option.short)
    }
    places: set[int] = set()
    for index, argument in enumerate(extra):
        option = plain.get(argument.partition("=")[0])
        if option and index not in places:
            has_value = "=" not in argument and option.key not in _SWITCHES
            places |= {index, index + 1} if has_value else {index}
    return places


def _adapter(text: str) -> tuple[str, float]:
    """`path` or `path:scale`; a path may have colons itself."""
    path, colon, scale = text.rpartition(":")
    try:
        known = (path, float(scale)) if colon else (text, 1.0)
    except ValueError:
        known = (text, 1.0)
    return str(_file(known[0], "lora")), known[1]


def _file(text: str, key: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_file():
        raise ConfigError(f"The file {path} doesn't exist (engine.{key}).")
    return path


def _proportions(text: str) -> list[float]:
    try:
        return [float(part) for part in text.replace("/", ",").split(",")]
    except ValueError as error:
        raise ConfigError(
            f"engine.tensor_split is {text!r}, and not numbers separated by commas, as `3,1`."
        ) from error


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
