"""Settings: `keepwarm.toml`, then `KEEPWARM_*`, then flags, each overriding the one before.

The structures below are the only list of settings there is: the TOML keys, the environment's
names (`KEEPWARM_ENGINE_SLOTS` for `engine.slots`), the bounds, the error messages and
docs/configuration.md all follow from them. The environment is read in this module alone.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import unquote

import msgspec
from msgspec import Meta, Struct

from keepwarm.core.hygiene import MOST_EXPRESSIONS, RULES, check_rules, compile_lines
from keepwarm.errors import ConfigError

_GIB = 1 << 30
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# They are names of tiers; `NAME:TIER` is a tier on a model.
_NO_NAMES = ("auto", "minimal", "standard", "full")

Slots = Annotated[int, Meta(ge=1, le=64, description="sequences the engine keeps at a time")]
Context = Annotated[
    int, Meta(ge=256, le=4_194_304, description="tokens of context that all slots share")
]
Pool = Annotated[
    Literal["auto", "shared", "split"],
    Meta(
        description="`split`: each slot has an equal part of the context, none slows another, and "
        "outputs don't depend on what the others hold; `shared`: every slot may use all of it; "
        "`auto`: split where a part holds the largest tier one and a half times"
    ),
]
Layers = Annotated[
    int,
    Meta(ge=-1, le=100_000, description="layers on the GPU; 999: all; -1: the engine's own choice"),
]
Port = Annotated[int, Meta(ge=0, le=65535, description="TCP port; 0 takes a free one")]
Bytes = Annotated[int, Meta(ge=0)]


class EngineSettings(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """Which engine runs which model. Give one of `model`, `binary` with `model`, `upstream`."""

    model: Annotated[str, Meta(description="path of a GGUF model")] = ""
    binary: Annotated[
        str, Meta(description="path of a `llama-server`; empty: the embedded engine")
    ] = ""
    upstream: Annotated[
        str,
        Meta(
            description="URL of a llama-server that runs already, or `unix:PATH` of its socket, "
            "instead of `model`"
        ),
    ] = ""
    upstream_key: Annotated[str, Meta(description="API key of that llama-server")] = ""
    slot_dir: Annotated[
        str, Meta(description="that llama-server's `--slot-save-path`, as Keepwarm sees it")
    ] = ""
    slots: Slots = 4
    context: Context = 32768
    pool: Pool = "auto"
    threads: Annotated[
        int, Meta(ge=0, le=1024, description="CPU threads; 0: one for each core there is")
    ] = 0
    chat_template: Annotated[
        str, Meta(description="path of a Jinja chat template; empty: the model's own")
    ] = ""
    kv_type_k: Annotated[str, Meta(description="KV cache type of keys, as llama-server's")] = "f16"
    kv_type_v: Annotated[str, Meta(description="KV cache type of values")] = "f16"
    flash_attention: Annotated[
        Literal["auto", "on", "off"], Meta(description="flash attention")
    ] = "auto"
    gpu_layers: Layers = -1
    main_gpu: Annotated[
        int, Meta(ge=-1, le=127, description="GPU by its number where only one is used; -1: unset")
    ] = -1
    split_mode: Annotated[
        Literal["", "none", "layer", "row"],
        Meta(description="how several GPUs share the model; empty: unset"),
    ] = ""
    tensor_split: Annotated[
        str, Meta(description="parts of the model for each GPU, as `3,1`; empty: unset")
    ] = ""
    device: Annotated[
        str,
        Meta(description="devices to use, as `CUDA0,CUDA1`; empty: unset; a `binary` only"),
    ] = ""
    cpu_moe_layers: Annotated[
        int,
        Meta(
            ge=0,
            le=100_000,
            description="layers whose experts stay in the machine's memory; 0: unset; a `binary` "
            "only",
        ),
    ] = 0
    kv_offload: Annotated[
        bool, Meta(description="keep keys and values where their layer is, as on a GPU")
    ] = True
    batch: Annotated[
        int,
        Meta(
            ge=0,
            le=65536,
            description="tokens of a prompt taken at a time, between which other slots decode; 0: "
            "512, Keepwarm's own",
        ),
    ] = 0
    ubatch: Annotated[
        int, Meta(ge=0, le=65536, description="tokens computed at a time; 0: the engine's own")
    ] = 0
    threads_batch: Annotated[
        int, Meta(ge=0, le=1024, description="CPU threads for prompts; 0: as `threads`")
    ] = 0
    mmproj: Annotated[
        str, Meta(description="path of a projector, for a model that sees pictures; empty: none")
    ] = ""
    draft_model: Annotated[
        str, Meta(description="path of a small model that drafts for the large one; empty: none")
    ] = ""
    draft_max: Annotated[
        int, Meta(ge=0, le=1024, description="tokens drafted at a time; 0: the engine's own")
    ] = 0
    draft_gpu_layers: Layers = -1
    lora: Annotated[
        tuple[str, ...],
        Meta(
            description="adapters for all requests: paths, each with `:scale` behind if it isn't 1"
        ),
    ] = ()
    rope_scaling: Annotated[
        Literal["", "none", "linear", "yarn"],
        Meta(description="how positions are stretched; empty: the model's own"),
    ] = ""
    rope_freq_base: Annotated[
        float, Meta(ge=0, description="RoPE's base frequency; 0: the model's own")
    ] = 0.0
    rope_freq_scale: Annotated[
        float, Meta(ge=0, description="RoPE's frequency scale; 0: the model's own")
    ] = 0.0
    yarn_orig_context: Annotated[
        int,
        Meta(ge=0, le=1 << 30, description="YaRN: tokens of the original context; 0: the model's"),
    ] = 0
    yarn_ext_factor: Annotated[
        float, Meta(ge=-1, description="YaRN: extrapolation, 0 to 1; -1: the engine's own")
    ] = -1.0
    yarn_attn_factor: Annotated[
        float, Meta(ge=-1, description="YaRN: attention's scale; -1: the engine's own")
    ] = -1.0
    yarn_beta_slow: Annotated[
        float, Meta(ge=-1, description="YaRN: high correction dimension; -1: the engine's own")
    ] = -1.0
    yarn_beta_fast: Annotated[
        float, Meta(ge=-1, description="YaRN: low correction dimension; -1: the engine's own")
    ] = -1.0
    ahead: Annotated[
        Literal["auto", "off"],
        Meta(
            description="`auto`: where a template or a client writes the history otherwise than it "
            "was, the next turn's is prefilled while the machine is idle and not on battery"
        ),
    ] = "auto"
    mlock: Annotated[bool, Meta(description="keep the model in memory: never swapped out")] = False
    mmap: Annotated[
        bool, Meta(description="map the model's file; false: read all of it at the start")
    ] = True
    numa: Annotated[
        Literal["", "distribute", "isolate", "numactl"],
        Meta(description="how threads are spread over NUMA nodes; empty: not at all"),
    ] = ""
    start_timeout_s: Annotated[
        float, Meta(gt=0, le=86400, description="seconds a model may take to load")
    ] = 900.0
    hang_timeout_s: Annotated[
        float,
        Meta(gt=0, le=3600, description="seconds without a health answer before a restart"),
    ] = 30.0
    max_rss_bytes: Annotated[
        int,
        Meta(
            ge=0,
            le=1 << 50,
            description="resident memory, bytes, above which the engine is saved and restarted "
            "when it is idle; 0: never",
        ),
    ] = 0
    extra: Annotated[
        tuple[str, ...], Meta(description="further arguments for the `binary`, unchanged")
    ] = ()
    idle_unload_s: Annotated[
        float,
        Meta(
            ge=0,
            description="seconds without a request after which the engine is ended and its memory "
            "given back, slots saved; the next request starts it again; 0: never",
        ),
    ] = 0.0
    max_models: Annotated[
        int,
        Meta(
            ge=0,
            le=64,
            description="models that are loaded at a time; 0: one, or with `memory_bytes` as many "
            "as have room",
        ),
    ] = 0
    memory_bytes: Annotated[
        int,
        Meta(
            ge=0,
            le=1 << 50,
            description="resident memory, bytes, that all loaded models may take; 0: no limit",
        ),
    ] = 0
    swap_wait_s: Annotated[
        float,
        Meta(
            gt=0,
            le=86400,
            description="seconds after which a request gets its turn although the model that is "
            "loaded instead of its own has work left",
        ),
    ] = 60.0


OF_THE_HOUSE = ("upstream", "upstream_key", "slot_dir", "max_models", "memory_bytes", "swap_wait_s")
"""Keys of `[engine]` that no single model may have."""


class ModelSettings(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """One model of several: how its engine is run, and which tiers are warm on it."""

    engine: EngineSettings
    tiers: tuple[str, ...] = ()
    """Empty: as `tiers.warm`."""
    pin: bool = False
    """Whether it stays loaded whatever others wait for."""


class ServerSettings(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """Where the gateway listens and what it admits."""

    host: Annotated[
        str,
        Meta(
            description="address to listen on (others than loopback need an API key), or the path "
            "of a Unix socket, ending in `.sock`"
        ),
    ] = "127.0.0.1"
    port: Port = 8090
    ssl_key_file: Annotated[str, Meta(description="PEM file of the key for TLS")] = ""
    ssl_cert_file: Annotated[str, Meta(description="PEM file of its certificate")] = ""
    api_keys: Annotated[
        tuple[str, ...],
        Meta(description="API keys, each with a namespace of its own; empty: no key is asked for"),
    ] = ()
    api_key_file: Annotated[
        str, Meta(description="file with one API key a line, `name:key` or `key`")
    ] = ""
    operators: Annotated[
        tuple[str, ...],
        Meta(
            description="names of API keys that see the figures of all keys together (metrics, "
            "slots, sizes); where there is one key only it does"
        ),
    ] = ()
    cors_origins: Annotated[
        tuple[str, ...],
        Meta(
            description="web pages that may use the API, as `https://chat.example.org`, or `*`; "
            "empty: all where a key is asked for, else those of this machine"
        ),
    ] = ()
    hosts: Annotated[
        tuple[str, ...],
        Meta(description="public names under which Keepwarm may be asked for without a key"),
    ] = ()
    max_body_bytes: Annotated[
        int, Meta(ge=1024, le=4 * _GIB, description="largest request body, bytes")
    ] = 64 * 1024 * 1024
    queue: Annotated[
        int,
        Meta(
            ge=1,
            le=100_000,
            description="requests that may wait for a slot, batches' counted apart; where there "
            "are several API keys, half of it for one",
        ),
    ] = 256
    queue_bytes: Annotated[
        int,
        Meta(
            ge=1024,
            le=1 << 40,
            description="bytes of the bodies of all requests that wait or are served; where there "
            "are several API keys, half of it for one",
        ),
    ] = 512 * 1024 * 1024
    queue_timeout_s: Annotated[
        float, Meta(gt=0, le=86400, description="seconds a request may wait for a slot")
    ] = 600.0
    ping_s: Annotated[
        float,
        Meta(ge=0, le=3600, description="seconds of silence in a stream before a ping; 0: none"),
    ] = 1.0
    drain_timeout_s: Annotated[
        float, Meta(ge=0, le=3600, description="seconds running requests get at shutdown")
    ] = 30.0
    strict_models: Annotated[
        bool,
        Meta(
            description="refuse a request whose `model` is neither the engine's nor a tier; false: "
            "any name gets the engine's model"
        ),
    ] = False


class TierSettings(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """The prompt tiers."""

    dir: Annotated[
        str, Meta(description="directory of the tiers; empty: see docs/prompt-tiers.md")
    ] = ""
    agent_name: Annotated[
        str, Meta(min_length=1, max_length=60, description="what the agent calls itself")
    ] = "Keeper"
    warm: Annotated[
        tuple[str, ...], Meta(description="tiers to warm at start; empty: all of them")
    ] = ()
    wait: Annotated[
        bool,
        Meta(
            description="serve only when every tier is warm; false: serve as soon as what is saved "
            "is restored, and prefill the rest whenever nobody asks for anything"
        ),
    ] = True
    untiered: Annotated[
        Literal["pass", "auto"],
        Meta(
            description="requests without a system prompt and with an unknown model name: "
            "`pass` them on as they are, or route them like `auto`"
        ),
    ] = "pass"
    escalate: Annotated[
        bool, Meta(description="replay a request one tier up when the model asks for it")
    ] = True


class HygieneSettings(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """What is changed in requests so that prompts begin alike, besides the line of accounting."""

    rules: Annotated[
        tuple[str, ...],
        Meta(
            description=f"rules to apply, of {', '.join(f'`{rule}`' for rule in RULES)}; empty: "
            "only a client's line of accounting is left out; see docs/use-with.md"
        ),
    ] = ()
    drop_lines: Annotated[
        tuple[str, ...],
        Meta(
            description="further lines of system prompts that `drop-billing` drops: at most "
            f"{MOST_EXPRESSIONS} regular expressions, each of a whole line (Python's `re`)"
        ),
    ] = ()


class StoreSettings(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """Where snapshots live."""

    dir: Annotated[
        str, Meta(description="directory of the store; empty: `keepwarm` under XDG_STATE_HOME")
    ] = ""
    quota_bytes: Annotated[
        int, Meta(ge=1 << 20, le=1 << 50, description="bytes the store may take on disk")
    ] = 20 * _GIB
    staging_dir: Annotated[
        str,
        Meta(
            description="directory slot files pass through; empty: /dev/shm where it has room, "
            "else beside the store"
        ),
    ] = ""
    staging_bytes: Annotated[
        int,
        Meta(ge=1 << 20, le=1 << 50, description="bytes of ready slot files kept in staging"),
    ] = _GIB
    max_age_days: Annotated[
        int,
        Meta(
            ge=0,
            le=36_500,
            description="days after which what nobody used is evicted, learned prefixes too; 0: "
            "only when room is needed",
        ),
    ] = 0
    learned: Annotated[
        int,
        Meta(ge=0, le=1000, description="prefixes of clients' own that are kept warm at most"),
    ] = 16


class BatchSettings(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """Batches that run on the gateway: when, how much of it, and where they are kept."""

    dir: Annotated[
        str,
        Meta(
            description="directory of uploaded files and batches; empty: `keepwarm/batches` under "
            "XDG_STATE_HOME"
        ),
    ] = ""
    hours: Annotated[
        str,
        Meta(
            description="when tasks may begin, in local time: `22:00-07:00`, several separated by "
            "commas; empty: always"
        ),
    ] = ""
    share: Annotated[
        float,
        Meta(gt=0, le=1, description="part of the slots that batches use at most, one at least"),
    ] = 0.75
    gap_s: Annotated[
        float,
        Meta(
            ge=0, le=3600, description="seconds without an interactive request before a task begins"
        ),
    ] = 1.0
    attempts: Annotated[
        int, Meta(ge=1, le=100, description="how often a task is tried before it has failed")
    ] = 4
    max_file_bytes: Annotated[
        int, Meta(ge=1024, le=1 << 40, description="largest file that may be uploaded, bytes")
    ] = 200 * 1024 * 1024
    quota_bytes: Annotated[
        int, Meta(ge=1 << 20, le=1 << 50, description="bytes that all files may take together")
    ] = 4 * _GIB


class LogSettings(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """What is logged."""

    format: Annotated[Literal["human", "json"], Meta(description="a line's form")] = "human"
    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="least severe level; `debug` tells all that the engine says"),
    ] = "info"
    prompts: Annotated[
        bool, Meta(description="keep prompt text in explanations; false: offsets and hashes")
    ] = False


class Settings(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """All settings, by section."""

    engine: EngineSettings = EngineSettings()
    server: ServerSettings = ServerSettings()
    tiers: TierSettings = TierSettings()
    hygiene: HygieneSettings = HygieneSettings()
    store: StoreSettings = StoreSettings()
    batch: BatchSettings = BatchSettings()
    log: LogSettings = LogSettings()
    models: dict[str, ModelSettings] = {}

    def of_model(self, name: str) -> Settings:
        """The settings of one of several models, as if it were the only one."""
        model = self.models[name]
        tiers = msgspec.structs.replace(self.tiers, warm=model.tiers or self.tiers.warm)
        return msgspec.structs.replace(self, engine=model.engine, tiers=tiers)


@dataclass(frozen=True, slots=True)
class Places:
    """Directories by the XDG base directory specification, and where settings were read."""

    config_home: Path
    state_home: Path
    runtime_dir: Path | None
    settings_file: Path | None

    @property
    def store(self) -> Path:
        """The default directory of the store."""
        return self.state_home / "keepwarm" / "store"


@dataclass(frozen=True, slots=True)
class ServiceManager:
    """What systemd asks of this process; all None where it runs without.

    `watchdog_s` is the longest time without a ping before it restarts us.
    """

    notify_socket: str | None
    watchdog_s: float | None


def service_manager() -> ServiceManager:
    """Read what systemd put into the environment (sd_notify(3), sd_watchdog_enabled(3))."""
    environment = os.environ
    usec = environment.get("WATCHDOG_USEC", "")
    # The variables are inherited; WATCHDOG_PID tells whose watchdog it is.
    ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    watchdog_s = int(usec) / 1e6 if usec.isdecimal() and int(usec) and ours else None
    return ServiceManager(environment.get("NOTIFY_SOCKET") or None, watchdog_s)


def child_environment(unless_set: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process of ours: the user's own, and these where they aren't set."""
    return {**unless_set, **os.environ}


def variables_set(names: Collection[str]) -> set[str]:
    """Which of these environment variables are set."""
    return {name for name in names if os.environ.get(name)}


def client_environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """The environment for a client: the user's own with these set, or taken out where None.

    A proxy that the user has is for other machines: a gateway on this one isn't reached through it.
    """
    kept = {**os.environ, **{name: value for name, value in changes.items() if value is not None}}
    for name in ("NO_PROXY", "no_proxy"):
        listed = [part for part in kept.get(name, "").split(",") if part.strip()]
        kept[name] = ",".join(dict.fromkeys([*listed, "127.0.0.1", "localhost"]))
    return {name: value for name, value in kept.items() if changes.get(name, "") is not None}


def user_environment() -> tuple[Path, Mapping[str, str]]:
    """The user's home and environment, for the folders that other programs keep models in."""
    return _home(os.environ), dict(os.environ)


def gateway_key() -> str | None:
    """The API key that commands give to a running gateway when none is named."""
    return os.environ.get("KEEPWARM_API_KEY") or None


@dataclass(frozen=True, slots=True)
class TraceExport:
    """Where traces go, by OpenTelemetry's own environment names.

    `endpoint` is the full URL for traces (OTLP over HTTP). `headers` are sent with each export.
    """

    endpoint: str
    headers: dict[str, str]
    service: str


def trace_export() -> TraceExport | None:
    """Read OTEL_*; None unless an endpoint is named and nothing turns tracing off."""
    environment = os.environ
    off = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    exporter = environment.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower()
    base = environment.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip()
    endpoint = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "").strip()
    if not endpoint and base:
        endpoint = base.rstrip("/") + "/v1/traces"
    if off or not endpoint or exporter != "otlp":
        return None
    raw = environment.get("OTEL_EXPORTER_OTLP_TRACES_HEADERS") or environment.get(
        "OTEL_EXPORTER_OTLP_HEADERS", ""
    )
    pairs = (part.partition("=") for part in raw.split(",") if "=" in part)
    headers = {name.strip(): unquote(value.strip()) for name, _, value in pairs}
    return TraceExport(endpoint, headers, environment.get("OTEL_SERVICE_NAME") or "keepwarm")


def load_settings(
    *,
    file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> tuple[Settings, Places]:
    """Read all sources.

    Args:
        file: a settings file; without one `./keepwarm.toml`, then the user's configuration.
        flags: values by dotted key (`engine.slots`); None means not given.
        defaults: values by dotted key that count where no source gives another one.

    Raises:
        ConfigError: a file that can't be read, an unknown key, a value out of bounds; names the
            source and the key.
    """
    environment = os.environ
    places = _places(environment)
    tree: dict[str, Any] = {}
    origin: dict[str, str] = {}
    _merge(tree, origin, _nested(defaults or {}), "the defaults")
    path = file or next((p for p in _files(places) if p.is_file()), None)
    if path:
        _merge(tree, origin, _read_toml(path), str(path))
    _merge(tree, origin, _from_environment(environment), "environment")
    given = _nested(flags or {})
    if given.get("models") or "model" in given.get("engine", {}):
        tree.pop("models", None)  # those that are named here are meant, and no others
    _merge(tree, origin, given, "flags")
    tables = tree.pop("models", {})
    try:
        settings = msgspec.convert(tree, Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), origin)) from error
    _check_hygiene(settings.hygiene, origin)
    models = _models(tables, tree.get("engine", {}), origin)
    settings = msgspec.structs.replace(settings, models=models)
    return settings, Places(places.config_home, places.state_home, places.runtime_dir, path)


def _models(
    tables: object, engine: Mapping[str, Any], origin: Mapping[str, str]
) -> dict[str, ModelSettings]:
    """The tables `[models.NAME]`; what one leaves out is as `[engine]` has it.

    Raises:
        ConfigError: names the table and what is wrong with it.
    """
    if not isinstance(tables, dict) or not all(isinstance(one, dict) for one in tables.values()):
        raise ConfigError("The setting models can't be used: give a table [models.NAME] for each.")
    out = {}
    for name, table in tables.items():
        where = f"The table [models.{name}] (from {origin.get(f'models.{name}', 'the defaults')})"
        if not _MODEL_NAME.fullmatch(name) or name in _NO_NAMES:
            raise ConfigError(
                f"{where} has a name that a model can't have: use up to 64 letters, digits, `.`, "
                f"`_` and `-`, and none of {', '.join(_NO_NAMES)}."
            )
        own = {"tiers": table.get("tiers", ()), "pin": table.get("pin", False)}
        rest = {key: value for key, value in table.items() if key not in own}
        if wrong := [key for key in rest if key in OF_THE_HOUSE]:
            raise ConfigError(f"{where} can't have {wrong[0]!r}: it belongs to [engine].")
        kept = {key: value for key, value in engine.items() if key != "upstream"}
        if engine.get("upstream"):
            raise ConfigError(
                f"{where} can't stand beside engine.upstream: several models are served by engines "
                "that Keepwarm starts. A router (llama-server's router mode, llama-swap) can't be "
                "attached to as several models."
            )
        try:
            out[name] = msgspec.convert({**own, "engine": {**kept, **rest}}, ModelSettings)
        except msgspec.ValidationError as error:
            what = str(error).replace("`", "").replace("$.engine.", "").replace("$.", "")
            raise ConfigError(f"{where} can't be used: {what}.") from error
        if not out[name].engine.model:
            raise ConfigError(f"{where} names no file: give it `model`.")
    return out


def model_name_of(path: str) -> str:
    """The name of a model that is given by its file alone."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).stem).strip("-._")[:64] or "model"


def _check_hygiene(hygiene: HygieneSettings, origin: Mapping[str, str]) -> None:
    """Say now what would otherwise be found when the gateway is made.

    Raises:
        ConfigError: names the key and where its value came from.
    """
    key = "rules"
    try:
        check_rules(hygiene.rules)
        key = "drop_lines"
        compile_lines(hygiene.drop_lines)
        if hygiene.drop_lines and "drop-billing" not in hygiene.rules:
            raise ValueError("it belongs to the rule drop-billing, which hygiene.rules lacks")
    except ValueError as error:
        source = origin.get(f"hygiene.{key}", "the defaults")
        raise ConfigError(
            f"The setting hygiene.{key} (from {source}) can't be used: {error}."
        ) from error


def _places(environment: Mapping[str, str]) -> Places:
    home = _home(environment)
    config = Path(environment.get("XDG_CONFIG_HOME") or home / ".config")
    state = Path(
        environment.get("STATE_DIRECTORY", "").split(":")[0]
        or environment.get("XDG_STATE_HOME")
        or home / ".local" / "state"
    )
    runtime = environment.get("XDG_RUNTIME_DIR")
    return Places(config, state, Path(runtime) if runtime else None, None)


def _home(environment: Mapping[str, str]) -> Path:
    """The user's home; the root where there is none, as in a container with a user of its own."""
    if named := environment.get("HOME"):
        return Path(named)
    try:
        return Path.home()
    except RuntimeError:
        return Path("/")


def _files(places: Places) -> tuple[Path, ...]:
    return (Path("keepwarm.toml"), places.config_home / "keepwarm" / "keepwarm.toml")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The settings file {path} can't be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The settings file {path} isn't valid TOML: {error}.") from error


def fields() -> list[tuple[str, Any, Any]]:
    """Every setting as (dotted key, type, default), in order of declaration."""
    out = []
    for section, kind in get_type_hints(Settings).items():
        if section == "models":  # tables of these very settings, see `_models`
            continue
        hints = get_type_hints(kind, include_extras=True)
        out += [
            (f"{section}.{field.name}", hints[field.name], field.default)
            for field in msgspec.structs.fields(kind)
        ]
    return out


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, kind, _ in fields():
        raw = environment.get("KEEPWARM_" + key.replace(".", "_").upper())
        if raw is not None:
            out[key] = _typed(key, kind, raw)
    return _nested(out)


def _typed(key: str, kind: Any, raw: str) -> Any:
    """An environment variable's text as the setting's type; lists are split at commas."""
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if get_origin(plain) is tuple:
        return [part for part in raw.split(",") if part]
    if plain in (int, float, bool):
        try:
            return msgspec.convert(raw.strip(), plain, strict=False)
        except msgspec.ValidationError as error:
            name = "KEEPWARM_" + key.replace(".", "_").upper()
            raise ConfigError(f"{name}={raw!r} is not {_noun(plain)}.") from error
    return raw


def _noun(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false"}[kind]


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in flat.items():
        if value is not None:
            section, name = key.split(".", 1)
            out.setdefault(section, {})[name] = value
    return out


def _merge(tree: dict[str, Any], origin: dict[str, str], new: dict[str, Any], source: str) -> None:
    for section, values in new.items():
        if not isinstance(values, dict):
            tree[section] = values
            origin[section] = source
            continue
        known = tree.setdefault(section, {})
        if isinstance(known, dict):  # otherwise the conversion tells what is wrong with it
            known.update(values)
        origin.update({f"{section}.{name}": source for name in values})


def _explain(message: str, origin: Mapping[str, str]) -> str:
    """msgspec's message names the place as `$.engine.slots`; add where that value came from."""
    for key, source in origin.items():
        if f"$.{key}`" in message:
            what = message.partition(" - at ")[0].replace("`", "")
            return f"The setting {key} (from {source}) can't be used: {what}."
    files = sorted(
        {s for s in origin.values() if s not in ("environment", "flags", "the defaults")}
    )
    where = f" in {files[0]}" if files else ""
    return f"The settings{where} can't be used: {message.replace('`', '')}."
