"""Options of the benchmarks that are modules of their own: a model, an engine, tiers."""

from __future__ import annotations

import argparse
from pathlib import Path

from keepwarm.core.tiers import TierSet
from keepwarm.settings import EngineSettings, Settings, TierSettings
from keepwarm.tiers.files import find_tiers_directory, load_tiers


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is measured: the same names as `keepwarm serve` has."""
    usual = EngineSettings()
    parser.add_argument("--model", required=True)
    parser.add_argument("--engine", default="", help="a llama-server binary; default: embedded")
    parser.add_argument("--chat-template", default="")
    parser.add_argument("--tiers", type=Path, default=None)
    parser.add_argument("--slots", type=int, default=usual.slots)
    parser.add_argument("--context", type=int, default=usual.context)
    parser.add_argument("--threads", type=int, default=usual.threads)


def settings_of(args: argparse.Namespace) -> tuple[Settings, TierSet]:
    """Settings for a process that may run elsewhere, so with the tiers' directory named in full.

    Raises:
        TierError: the tiers can't be used.
    """
    directory = find_tiers_directory(args.tiers, Path.home() / ".config")
    engine = EngineSettings(
        model=args.model,
        binary=args.engine,
        chat_template=args.chat_template,
        slots=args.slots,
        context=args.context,
        threads=args.threads,
    )
    tiers = TierSettings(dir=str(directory.absolute()))
    return Settings(engine=engine, tiers=tiers), load_tiers(directory, tiers.agent_name)
