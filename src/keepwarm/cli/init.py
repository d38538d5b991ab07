"""`keepwarm init`: settings for this machine, with reasons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keepwarm.cli import options as opt
from keepwarm.cli.output import err, out, print_json
from keepwarm.engine.gguf_header import read_model
from keepwarm.errors import ConfigError
from keepwarm.operate.machine import ThisMachine, look
from keepwarm.operate.propose import Proposed, best_model, propose
from keepwarm.operate.settings_file import toml_value
from keepwarm.settings import user_environment
from keepwarm.tiers.files import tools_template


def init(
    model: opt.Model = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write it; a file that is there stays as it is.")
    ] = False,
    file: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The file that --write writes.")
    ] = Path("keepwarm.toml"),
    as_json: opt.Json = False,
) -> None:
    """Look at this machine and propose a keepwarm.toml for it, with reasons.

    Looks at cores, memory, GPUs, and models in the folders of llama.cpp, LM Studio, Ollama and
    Hugging Face. Writes nothing without --write.
    """
    home, environment = user_environment()
    machine = look(home, environment)
    if model:
        header = read_model(Path(model).expanduser().absolute())
    else:
        best = best_model(machine, read_model)
        if best is None:
            raise ConfigError(
                f"{'None of the models found here leaves' if machine.models else 'No model is'} "
                f"{'room for its context' if machine.models else 'in the usual folders'}. Name one "
                "with --model FILE.gguf."
            )
        header = best[1]
    proposed = propose(machine, header, tools_template=tools_template())
    text = toml_of(proposed)
    if as_json:
        print_json({"machine": _told(machine), "proposed": proposed, "toml": text})
    else:
        _show(machine)
        out.print(text, markup=False, soft_wrap=True)
    if write:
        _write(file, text)
        err.print(f"written: {file}", markup=False)
    elif not as_json:
        err.print("Nothing is written; --write writes it to keepwarm.toml.", markup=False)


def toml_of(proposed: list[Proposed]) -> str:
    """The proposal as a settings file, each reason above its key."""
    lines: list[str] = []
    section = ""
    for one in proposed:
        head, _, name = one.key.partition(".")
        if head != section:
            section = head
            lines.append(f"[{section}]")
        lines += [f"# {one.reason}", f"{name} = {toml_value(one.value)}"]
    return "\n".join(lines) + "\n"


def _show(machine: ThisMachine) -> None:
    gpus = ", ".join(gpu.name for gpu in machine.gpus) or "none seen"
    err.print(
        f"cores {machine.cores}, memory {machine.memory_bytes / 1e9:.1f} GB "
        f"({machine.free_bytes / 1e9:.1f} GB free), GPU {gpus}",
        markup=False,
    )
    for model in machine.models:
        err.print(
            f"  {model.size_bytes / 1e9:6.1f} GB  {model.name}  ({model.source})",
            markup=False,
            soft_wrap=True,
        )


def _told(machine: ThisMachine) -> dict[str, object]:
    models = [
        {"path": str(m.path), "name": m.name, "source": m.source, "size_bytes": m.size_bytes}
        for m in machine.models
    ]
    return {
        "cores": machine.cores,
        "memory_bytes": machine.memory_bytes,
        "free_bytes": machine.free_bytes,
        "gpus": machine.gpus,
        "models": models,
    }


def _write(file: Path, text: str) -> None:
    """Write a file that isn't there.

    Raises:
        ConfigError: it is there, or can't be written.
    """
    try:
        with file.open("x", encoding="utf-8") as sink:
            sink.write(text)
    except FileExistsError as error:
        raise ConfigError(
            f"{file} is there already and stays as it is. Write another one with --out FILE."
        ) from error
    except OSError as error:
        raise ConfigError(f"{file} can't be written: {error.strerror}.") from error
