"""From what a person wants to the text of a unit: values in, text out. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePath

from keepwarm.service.unitfile import (
    argument,
    command_line,
    quoted,
    with_added,
    with_value,
    with_words,
)

# What ProtectHome= and PrivateTmp= hide from a system service (systemd.exec(5)).
_HOMES = ("/home", "/root", "/run/user")
_TEMPORARY = ("/tmp", "/var/tmp")  # noqa: S108 - compared, not written to
_SPLIT_MODEL = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


class Scope(StrEnum):
    """Whose manager runs the service."""

    SYSTEM = "system"
    USER = "user"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPaths:
    """Files that a service reads, all absolute.

    `also` is what it needs besides: the interpreter's directories, and what links lead to.
    """

    model: str
    engine: str | None = None
    tiers: str | None = None
    chat_template: str | None = None
    config: str | None = None
    key_file: str | None = None
    also: tuple[str, ...] = ()

    def all(self) -> list[str]:
        """Each of them once, shortest first."""
        model = str(PurePath(self.model).parent) if _SPLIT_MODEL.search(self.model) else self.model
        named = (model, self.engine, self.tiers, self.chat_template, self.config, self.key_file)
        return sorted({path for path in (*named, *self.also) if path}, key=lambda p: (len(p), p))


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A service to render.

    `keepwarm` is the command's absolute path; `slots`, `context` and `threads` are None where they
    are left to the settings; `extra` goes to the engine's binary unchanged; `stop_timeout_s` is
    what a graceful stop may take.
    """

    scope: Scope
    keepwarm: str
    paths: UnitPaths
    port: int
    host: str = "127.0.0.1"
    slots: int | None = None
    context: int | None = None
    threads: int | None = None
    store: str | None = None
    stop_timeout_s: float = 90.0
    is_loopback: bool = True
    extra: tuple[str, ...] = field(default=())


def keepwarm_unit(template: str, wanted: Wanted) -> str:
    """`keepwarm.service` with these values."""
    paths = wanted.paths
    named = {
        "--config": paths.config,
        "--model": paths.model,
        "--engine": paths.engine,
        "--tiers": paths.tiers,
        "--chat-template": paths.chat_template,
        "--host": None if wanted.host == "127.0.0.1" else wanted.host,
        "--port": wanted.port,
        "--slots": wanted.slots,
        "--context": wanted.context,
        "--threads": wanted.threads,
    }
    words = [wanted.keepwarm, "serve"]
    for flag, value in named.items():
        if value is not None:
            words += [flag, str(value)]
    line = command_line(words)
    if wanted.scope is Scope.SYSTEM:
        line += " --store %S/keepwarm/store"
    elif wanted.store:
        line += " " + command_line(["--store", wanted.store])
    if wanted.extra:
        line += " -- " + " ".join(argument(word) for word in wanted.extra)
    text = with_value(template, "ExecStart", line)
    text = with_value(text, "TimeoutStopSec", f"{wanted.stop_timeout_s:.0f}")
    return _confined(text, wanted)


def plain_unit(template: str, wanted: Wanted, *, warmup: list[str]) -> str:
    """`llama-server.service` with these values.

    Args:
        template: the unit from deploy/systemd/.
        wanted: `paths.engine` is the llama-server.
        warmup: the command that warms, without its options.
    """
    paths = wanted.paths
    assert paths.engine
    is_user = wanted.scope is Scope.USER
    base = "%h" if is_user else "/srv"
    checkout = "%h/keepwarm" if is_user else "/opt/keepwarm"
    server = "%h/bin/llama-server" if is_user else "/usr/local/bin/llama-server"
    more = [*(("--threads", str(wanted.threads)) if wanted.threads else ()), *wanted.extra]
    if paths.chat_template:
        more = ["--chat-template-file", paths.chat_template, *more]
    words = {
        server: quoted(paths.engine),
        f"{base}/models/model.gguf": argument(paths.model),
        "--port 8080": f"--port {wanted.port}",
        "http://127.0.0.1:8080": f"http://{_reached_at(wanted.host)}:{wanted.port}",
        "--jinja --metrics": " ".join(["--jinja --metrics", *(argument(word) for word in more)]),
        f"{checkout}/.venv/bin/python {checkout}/scripts/warmup_cache.py": command_line(warmup),
        f"--tiers {checkout}/configs/prompt-tiers": (
            command_line(["--tiers", paths.tiers]) if paths.tiers else ""
        ),
    }
    if wanted.slots is not None:
        words["--parallel 4"] = f"--parallel {wanted.slots}"
    if wanted.context is not None:
        words["--ctx-size 32768"] = f"--ctx-size {wanted.context}"
    if wanted.host != "127.0.0.1":
        words["--host 127.0.0.1"] = f"--host {argument(wanted.host)}"
    return _confined(with_words(template, words), wanted)


def _confined(text: str, wanted: Wanted) -> str:
    """Let a system service reach what it needs, and no more."""
    if wanted.scope is Scope.USER:
        return text
    text = with_value(text, "RequiresMountsFor", quoted(wanted.paths.model))
    if not wanted.is_loopback:
        text = with_value(text, "IPAddressDeny", "")
        text = with_value(text, "IPAddressAllow", "any")
    hidden = outermost([p for p in wanted.paths.all() if is_hidden(p)])
    if any(_is_below(path, _HOMES) for path in hidden):
        # With `yes` nothing could be mounted into the homes; this leaves them empty.
        text = with_value(text, "ProtectHome", "tmpfs")
    if hidden:
        binds = " ".join(quoted(path) for path in hidden)
        text = with_added(text, "ProtectHome", f"BindReadOnlyPaths={binds}")
    return text


def _reached_at(host: str) -> str:
    """Where a server that listens on `host` is reached from the same machine."""
    if host in ("0.0.0.0", "::", ""):  # noqa: S104 - compared, not listened on
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def is_hidden(path: str) -> bool:
    """Whether a system service sees it only if it is mounted there for it."""
    return _is_below(path, _HOMES + _TEMPORARY)


def _is_below(path: str, roots: tuple[str, ...]) -> bool:
    return any(path == root or path.startswith(root + "/") for root in roots)


def outermost(paths: list[str]) -> list[str]:
    """These paths without those that lie in another of them."""
    out: list[str] = []
    for path in sorted(set(paths), key=len):
        if not any(path.startswith(other.rstrip("/") + "/") for other in out):
            out.append(path)
    return out
