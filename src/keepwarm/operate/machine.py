"""What a machine has for a model: cores, memory, GPUs, and models in the usual folders.

Everything is read below a root and a home that the caller names, so that a machine can be made up.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from keepwarm.doctor.kernel import usable_cores

_FIRST_PART = re.compile(r"-(\d{5})-of-\d{5}\.gguf$", re.IGNORECASE)
# A folder of models is flat or sorted by author and name; nobody nests them deeper.
_MOST_DEPTH = 5
_MOST_FILES = 5000
_GPU_TIMEOUT_S = 10


@dataclass(frozen=True, slots=True)
class Gpu:
    """A graphics processor. `memory_bytes` 0: it shares the machine's memory."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model file, under the name that its program knows it by. `source` is that program's."""

    path: Path
    name: str
    source: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ThisMachine:
    """What there is. `free_bytes` is memory that a program may take without swapping."""

    cores: int
    memory_bytes: int
    free_bytes: int
    gpus: tuple[Gpu, ...]
    models: tuple[FoundModel, ...]


def look(
    home: Path, environment: Mapping[str, str], *, root: Path = Path("/"), cores: int | None = None
) -> ThisMachine:
    """Look at this machine, or at one that lies below `root`.

    Args:
        home: the user's home, for the folders of models.
        environment: names of folders that programs take from it (`HF_HOME` and the like).
        root: where `proc` and `sys` are.
        cores: how many may be used; None asks the kernel.
    """
    total, free = _memory(root)
    if cores is None:
        cores = usable_cores(root / "proc", root / "sys/fs/cgroup")
    return ThisMachine(cores, total, free, _gpus(root), find_models(home, environment))


def find_models(home: Path, environment: Mapping[str, str]) -> tuple[FoundModel, ...]:
    """Models in the folders of llama.cpp, LM Studio, Ollama, Hugging Face, and `~/models`.

    Each file once, the largest first; projectors of pictures and further parts aren't models.
    """
    found: dict[Path, FoundModel] = {}
    for source, folder in _folders(home, environment):
        models = _of_ollama(folder) if source == "Ollama" else _of_folder(folder, source)
        for model in models:
            found.setdefault(model.path.resolve(), model)
    return tuple(sorted(found.values(), key=lambda m: (-m.size_bytes, str(m.path))))


def _folders(home: Path, environment: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    yield "llama.cpp", Path(environment.get("LLAMA_CACHE") or cache / "llama.cpp")
    yield "llama.cpp", home / "Library" / "Caches" / "llama.cpp"
    yield "LM Studio", home / ".lmstudio" / "models"
    yield "LM Studio", cache / "lm-studio" / "models"
    yield "Ollama", Path(environment.get("OLLAMA_MODELS") or home / ".ollama" / "models")
    yield "Ollama", Path("/usr/share/ollama/.ollama/models")
    hub = Path(environment.get("HF_HOME") or cache / "huggingface") / "hub"
    yield "Hugging Face", Path(environment.get("HF_HUB_CACHE") or hub)
    yield "~/models", home / "models"


def _of_folder(folder: Path, source: str) -> Iterator[FoundModel]:
    for path in _below(folder, ".gguf", _MOST_DEPTH):
        part = _FIRST_PART.search(path.name)
        if "mmproj" in path.name.lower() or (part and int(part[1]) != 1):
            continue
        size_bytes = _size(path)
        if size_bytes:
            yield FoundModel(path, path.stem, source, size_bytes)


def _of_ollama(folder: Path) -> Iterator[FoundModel]:
    """Ollama names a model in a manifest and keeps it in a file named after its digest."""
    for manifest in _below(folder / "manifests", "", _MOST_DEPTH):
        try:
            layers = json.loads(manifest.read_text(encoding="utf-8"))["layers"]
            digest = next(
                str(layer["digest"])
                for layer in layers
                if layer["mediaType"] == "application/vnd.ollama.image.model"
            )
        except (OSError, ValueError, KeyError, TypeError, StopIteration):
            continue
        path = folder / "blobs" / digest.replace(":", "-")
        size_bytes = _size(path)
        if size_bytes:
            name = f"{manifest.parent.name}:{manifest.name}"
            yield FoundModel(path, name, "Ollama", size_bytes)


def _below(folder: Path, suffix: str, depth: int) -> Iterator[Path]:
    """Files below a folder, in a fixed order; a folder that can't be read has none."""
    try:
        entries = sorted(folder.iterdir())[:_MOST_FILES]
    except OSError:
        return
    for entry in entries:
        if entry.name.lower().endswith(suffix) and entry.is_file():
            yield entry
        elif depth and entry.is_dir():
            yield from _below(entry, suffix, depth - 1)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _memory(root: Path) -> tuple[int, int]:
    """Bytes in all and free ones, by the kernel and by the control group's limit; 0: unknown."""
    told = {}
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if value.split():
            told[name] = int(value.split()[0]) * 1024
    total, free = told.get("MemTotal", 0), told.get("MemAvailable", 0)
    if not total:
        total = free = _memory_by_sysctl()
    group = root / "sys/fs/cgroup"
    for limit, used in (
        (group / "memory.max", group / "memory.current"),
        (group / "memory/memory.limit_in_bytes", group / "memory/memory.usage_in_bytes"),
    ):
        allowed = _text(limit).strip()
        if allowed.isdecimal() and int(allowed) < total:
            total = int(allowed)
            taken = _text(used).strip()
            free = min(free, total - int(taken) if taken.isdecimal() else total)
    return total, max(free, 0)


def _memory_by_sysctl() -> int:
    """As macOS tells; what is free there isn't told in one number."""
    try:
        said = _said(["/usr/sbin/sysctl", "-n", "hw.memsize"])
    except OSError:
        return 0
    return int(said) if said.strip().isdecimal() else 0


def _gpus(root: Path) -> tuple[Gpu, ...]:
    if root != Path("/"):
        return _amd_gpus(root)
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return (Gpu("Apple GPU (Metal)", 0),)
    return (*_nvidia_gpus(), *_amd_gpus(root))


def _nvidia_gpus() -> tuple[Gpu, ...]:
    program = shutil.which("nvidia-smi")
    if not program:
        return ()
    query = ["--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    return parse_nvidia(_said([program, *query]))


def parse_nvidia(said: str) -> tuple[Gpu, ...]:
    """GPUs from the lines of `nvidia-smi`: a name, a comma, mebibytes."""
    rows = [line.rpartition(",") for line in said.splitlines()]
    return tuple(
        Gpu(name.strip(), int(memory) << 20)
        for name, _, memory in rows
        if name and memory.strip().isdecimal()
    )


def _amd_gpus(root: Path) -> tuple[Gpu, ...]:
    cards = sorted((root / "sys/class/drm").glob("card*/device/mem_info_vram_total"))
    sizes = [_text(card).strip() for card in cards]
    return tuple(Gpu("AMD GPU", int(size)) for size in sizes if size.isdecimal() and int(size))


def _said(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_GPU_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
