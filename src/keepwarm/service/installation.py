"""A unit on this machine: what it should say, what it says, and what a change would be."""

from __future__ import annotations

import difflib
import stat
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import keepwarm
from keepwarm.engine.gguf_header import read_model
from keepwarm.errors import ConfigError
from keepwarm.keys import is_loopback
from keepwarm.service import systemd
from keepwarm.service.presence import stop_timeout_s
from keepwarm.service.render import (
    Scope,
    UnitPaths,
    Wanted,
    is_hidden,
    keepwarm_unit,
    outermost,
    plain_unit,
)
from keepwarm.service.unitfile import seal_state, sealed
from keepwarm.settings import Places, Settings


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit: its name (`keepwarm.service`), whose manager runs it, and the file."""

    name: str
    scope: Scope
    path: Path

    @property
    def text(self) -> str | None:
        """What lies there now, None if nothing does."""
        return self.path.read_text(encoding="utf-8") if self.path.is_file() else None

    @property
    def state(self) -> str:
        """`missing`, `intact` (as installed), `changed` since, or `foreign` (not ours)."""
        return "missing" if self.text is None else seal_state(self.text)


def unit_at(*, plain: bool, user: bool, directory: Path | None, places: Places) -> Unit:
    """The unit that these options speak of."""
    name = "llama-server.service" if plain else "keepwarm.service"
    scope = Scope.USER if user else Scope.SYSTEM
    folder = directory or systemd.unit_directory(scope, places.config_home)
    return Unit(name, scope, folder / name)


def template_of(unit: Unit) -> str:
    """The unit as it stands in deploy/systemd."""
    return systemd.template(unit.name, unit.scope)


def rendered(unit: Unit, wanted: Wanted) -> str:
    """The unit's text with these values, not yet sealed."""
    template = template_of(unit)
    if unit.name == "keepwarm.service":
        return keepwarm_unit(template, wanted)
    warmup = systemd.warmup_command(wanted.keepwarm, sys.executable)
    return plain_unit(template, wanted, warmup=warmup)


def wanted_of(
    unit: Unit,
    settings: Settings,
    places: Places,
    *,
    slots: int | None,
    context: int | None,
    threads: int | None,
    port: int | None,
) -> Wanted:
    """What the unit is to say. The four numbers are flags; None leaves them to the settings file.

    Raises:
        ConfigError, ModelError: the model, the engine or another file can't be used as it is.
    """
    engine = settings.engine
    if engine.upstream:
        raise ConfigError(
            "A service that attaches to another server needs that server's unit to be started "
            "first. Install it with --model FILE, or write the unit from `keepwarm service print`."
        )
    is_plain = unit.name != "keepwarm.service"
    if is_plain and not engine.binary:
        raise ConfigError("--plain runs a llama-server: say which with --engine PATH.")
    if unit.scope is Scope.SYSTEM and settings.store.dir:
        raise ConfigError(
            "A system service keeps its store in its state directory, since its user exists only "
            "while it runs: leave out --store (store.dir). docs/operations.md says how to have the "
            "state directory on another disk."
        )
    paths = UnitPaths(
        model=str(read_model(_absolute(engine.model)).path),
        engine=_existing(engine.binary, "the engine"),
        tiers=_existing(settings.tiers.dir, "the tiers' directory"),
        chat_template=_existing(engine.chat_template, "the chat template"),
        config=str(places.settings_file.absolute()) if places.settings_file else None,
        key_file=_existing(settings.server.api_key_file, "the file of API keys"),
    )
    # A model is often a link into a download cache.
    links = {str(Path(path).resolve()) for path in paths.all()}
    return Wanted(
        scope=unit.scope,
        keepwarm=_command(),
        paths=replace(paths, also=tuple(sorted({*_program(), *links}))),
        port=port or (8080 if is_plain else settings.server.port),
        host=settings.server.host,
        slots=slots,
        context=context,
        threads=threads,
        store=str(_absolute(settings.store.dir)) if settings.store.dir else None,
        stop_timeout_s=stop_timeout_s(settings),
        is_loopback=is_loopback(settings.server.host),
        extra=engine.extra,
    )


def difference(old: str | None, new: str, path: Path) -> str:
    """A unified diff from what lies there to what would be written; empty if they are equal."""
    lines = difflib.unified_diff(
        (old or "").splitlines(keepends=True),
        new.splitlines(keepends=True),
        fromfile=str(path) if old is not None else "/dev/null",
        tofile=str(path),
    )
    return "".join(lines)


def unreadable(wanted: Wanted) -> list[str]:
    """Which files a system service's own user couldn't read, by their permissions.

    What lies in a home is mounted for it by itself, so the folders above don't matter.
    """
    if wanted.scope is Scope.USER:
        return []
    shown = outermost([path for path in wanted.paths.all() if is_hidden(path)])
    out = []
    for name in wanted.paths.all():
        path = Path(name)
        chain = [path, *([] if name in shown else path.parents)]
        for part in chain:
            need = stat.S_IXOTH if part != path or path.is_dir() else stat.S_IROTH
            if not part.resolve().stat().st_mode & need:
                out.append(name)
                break
    return out


def final(text: str) -> str:
    """What is written: the text and its seal."""
    return sealed(text)


def _command() -> str:
    """The `keepwarm` beside the interpreter that runs this, else the one that was called."""
    beside = Path(sys.executable).parent / "keepwarm"
    return str(beside if beside.is_file() else Path(sys.argv[0]).absolute())


def _program() -> tuple[str, ...]:
    """Directories that the interpreter and the package need."""
    package = Path(keepwarm.__file__).resolve().parents[1]
    root = package.parent if package.name == "src" else package
    prefixes = {sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parents[1])}
    return tuple(sorted({*prefixes, str(root)}))


def _existing(value: str, what: str) -> str | None:
    if not value:
        return None
    path = _absolute(value)
    if not path.exists():
        raise ConfigError(f"{path} doesn't exist ({what}); the service couldn't start.")
    return str(path)


def _absolute(value: str) -> Path:
    return Path(value).expanduser().absolute()
