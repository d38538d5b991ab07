"""`fleet.toml`: how many nodes, what each is, where they share what they save.

    [fleet]
    nodes = 2

    [shared]
    url = "s3://models/warm"

    [shared.options]
    endpoint = "https://objects.example"

    [node.engine]
    model = "/models/qwen3-8b-q4.gguf"

Everything below `[node]` is a `keepwarm.toml` (docs/configuration.md). Pure but for reading the
file.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from keepwarm.errors import ConfigError

_Rate = Annotated[float, Meta(ge=0, le=1e13)]


class FleetPart(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """The `[fleet]` table.

    `address`: of a Ray cluster that runs; empty starts one here. `nodes` are there from the start;
    with `max_nodes` above it more are added while a node has more than `target_ongoing` requests,
    or prompts for more than `target_wait_s` (0: however many), for `scale_up_s`, and taken away
    after `scale_down_s` without need. `cpus` and `gpus` are what Ray reserves for each node, and
    `one_per_machine` lets no two be on one machine. `host` and `port` are where the fleet listens.
    """

    address: str = ""
    nodes: Annotated[int, Meta(ge=1, le=1024)] = 1
    max_nodes: Annotated[int, Meta(ge=0, le=1024)] = 0
    target_ongoing: Annotated[float, Meta(gt=0, le=1000)] = 4.0
    target_wait_s: Annotated[float, Meta(ge=0, le=3600)] = 2.0
    scale_up_s: Annotated[float, Meta(ge=0, le=86400)] = 30.0
    scale_down_s: Annotated[float, Meta(ge=0, le=86400)] = 600.0
    cpus: Annotated[float, Meta(ge=0, le=1024)] = 1.0
    gpus: Annotated[float, Meta(ge=0, le=64)] = 0.0
    one_per_machine: bool = False
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535)] = 8090
    report_s: Annotated[float, Meta(ge=0.1, le=60)] = 2.0
    stream_timeout_s: Annotated[float, Meta(gt=0, le=86400)] = 600.0


class SharedPart(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """The `[shared]` table. Without a `url` nodes share nothing.

    `options` go to the object store's library as they are (`endpoint`, `region`, keys);
    `allow_http` lets it speak without encryption. With a `key_file` only what was written by
    somebody who has the key is taken. The bandwidths bound each node, in bytes a second; 0 is no
    bound.
    """

    url: str = ""
    options: dict[str, str] = {}
    allow_http: bool = False
    key_file: str = ""
    upload_bytes_per_s: _Rate = 0.0
    download_bytes_per_s: _Rate = 0.0
    timeout_s: Annotated[float, Meta(gt=0, le=3600)] = 30.0


class FleetConfig(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """A whole `fleet.toml`. `node` holds tables of settings as in keepwarm.toml."""

    fleet: FleetPart = FleetPart()
    shared: SharedPart = SharedPart()
    node: dict[str, dict[str, Any]] = {}

    @property
    def most_nodes(self) -> int:
        """How many nodes there may be at a time."""
        return max(self.fleet.max_nodes, self.fleet.nodes)

    def node_flags(self) -> dict[str, Any]:
        """The node's settings by dotted key, as `load_settings` takes them."""
        return {
            f"{section}.{key}": value
            for section, table in self.node.items()
            for key, value in table.items()
        }


def load_fleet(path: Path) -> FleetConfig:
    """Read a `fleet.toml`. Raises: ConfigError naming the file and what is wrong."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} isn't valid TOML: {error}.") from error
    return fleet_of(tree, source=str(path))


def fleet_of(tree: dict[str, Any], *, source: str) -> FleetConfig:
    """A fleet from plain values. Raises: ConfigError naming the source and what is wrong."""
    try:
        config = msgspec.convert(tree, FleetConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {error}.") from error
    if not config.node.get("engine"):
        raise ConfigError(
            f"{source} names no engine. Give [node.engine] a `model`, as in keepwarm.toml."
        )
    for key in ("server.host", "server.port"):
        if key in config.node_flags():
            raise ConfigError(
                f"{source}: node.{key} is Keepwarm's to choose; see [fleet] {key[7:]}."
            )
    return config
