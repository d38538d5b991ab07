"""`keepwarm demo`: before and after, on a small model, in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.status import Status

from keepwarm.bench.arms import KEEPWARM, NO_CACHE
from keepwarm.bench.demo import IDENTICAL, DemoScale, demo_picture, demo_tables, run_demo
from keepwarm.bench.picture import seconds_text
from keepwarm.bench.results import Prefix, Sample, write_json
from keepwarm.cli import options as opt
from keepwarm.cli.interrupt import run_until_interrupted
from keepwarm.cli.output import err, out, print_json
from keepwarm.errors import ConfigError
from keepwarm.settings import EngineSettings, Settings, TierSettings
from keepwarm.tiers.files import load_tiers, packaged_configs, tools_template

_MODEL = Path(".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf")
_QUICK = DemoScale(requests=3, conversations=1, kills=1)


def demo(
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="FILE", help="GGUF model. [default: the fetched SmolLM2]"),
    ] = None,
    engine: opt.Engine = None,
    chat_template: opt.ChatTemplate = None,
    tiers: Annotated[
        Path | None,
        typer.Option("--tiers", metavar="DIR", help="Prompt tiers. [default: Keepwarm's own]"),
    ] = None,
    threads: opt.Threads = None,
    directory: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where the results go.")
    ] = Path("demo-results"),
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Three requests instead of ten, one kill instead of three."),
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Show what Keepwarm does: one request cold and warm, ten times, and after a SIGKILL.

    Starts Keepwarm and, beside it, the same engine without a cache; takes up to five minutes on two
    cores; ends with tables, a picture (demo.svg) and demo.json, and leaves nothing running.
    """
    own = tiers or packaged_configs() / "prompt-tiers"
    settings = Settings(
        engine=EngineSettings(
            model=str(_model(model)),
            binary=engine or "",
            chat_template=chat_template or _template(model),
            threads=threads or 0,
        ),
        tiers=TierSettings(dir=str(own)),
    )
    loaded = load_tiers(own, settings.tiers.agent_name)
    scale = _QUICK if quick else DemoScale()
    with _Screen() as screen:
        report = run_until_interrupted(run_demo(settings, loaded, scale=scale, stage=screen))
    directory.mkdir(parents=True, exist_ok=True)
    picture, data = directory / "demo.svg", directory / "demo.json"
    picture.write_text(demo_picture(report), encoding="utf-8")
    write_json(report, data)
    if as_json:
        print_json(report)
    else:
        out.print()
        out.print(demo_tables(report))
    err.print(f"\npicture: {picture}\ndata:    {data}", markup=False, soft_wrap=True)


def _model(given: Path | None) -> Path:
    """The model to show it with.

    Raises:
        ConfigError: there is none.
    """
    if given is not None:
        return given
    for place in (Path(), packaged_configs().parent):
        if (place / _MODEL).is_file():
            return place / _MODEL
    raise ConfigError(
        f"The demo's model isn't here ({_MODEL}). `make demo` in a clone fetches it, and so does "
        "`python scripts/fetch_model.py`; or give a model of your own with --model FILE.gguf."
    )


def _template(given_model: Path | None) -> str:
    """SmolLM2's own template drops tools; other models are taken as they are."""
    return "" if given_model and given_model.name != _MODEL.name else str(tools_template())


class _Screen:
    """Headings and results as lines on stderr, with a status line while one waits."""

    def __init__(self) -> None:
        self._status = Status("", console=err)
        self._step = 0
        self._cold: dict[int, Sample] = {}
        self._warm: dict[int, Sample] = {}

    def __enter__(self) -> _Screen:
        """Begin to draw."""
        if err.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the status line."""
        self._status.stop()

    def heading(self, text: str) -> None:
        """See `Stage`."""
        self._step += 1
        err.print(f"\n[bold]{self._step}. {text}[/bold]")

    def doing(self, text: str) -> None:
        """See `Watcher`."""
        self._status.update(text)

    def told(self, text: str) -> None:
        """See `Stage`."""
        err.print(f"   {text}", markup=False, soft_wrap=True)

    def warmed(self, prefix: Prefix) -> None:
        """See `Stage`."""
        self.told(
            f"{prefix.tier:10} {prefix.tokens:6,} tokens {prefix.how} in "
            f"{seconds_text(prefix.seconds)}, {prefix.size_bytes / 1e6:.1f} MB saved"
        )

    def measured(self, sample: Sample) -> None:
        """See `Watcher`."""
        if sample.scenario != IDENTICAL:
            self.told(
                f"{sample.step:24}{seconds_text(sample.ttft_s):>8}  "
                f"{sample.prefilled_tokens:6,} evaluated {sample.cached_tokens:6,} reused  "
                f"{sample.plan}"
            )
            return
        {NO_CACHE: self._cold, KEEPWARM: self._warm}[sample.arm][sample.run] = sample
        cold, warm = self._cold.get(sample.run), self._warm.get(sample.run)
        if cold and warm:
            self.told(
                f"{sample.run + 1:2}  alone {seconds_text(cold.ttft_s):>7}, "
                f"{cold.prefilled_tokens:,} evaluated   Keepwarm {seconds_text(warm.ttft_s):>7}, "
                f"{warm.prefilled_tokens:,} evaluated"
            )
