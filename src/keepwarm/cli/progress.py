"""Progress on stderr while an engine loads and prefixes are warmed."""

from __future__ import annotations

from types import TracebackType

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from keepwarm.cli.output import err


class WarmProgress:
    """A status line, and a bar for each prefix that is prefilled. Silent when not a terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._line: TaskID | None = None
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> WarmProgress:
        """Begin to draw."""
        self._progress.start()
        self._line = self._progress.add_task("starting", total=None, detail="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove what was drawn."""
        self.stop()

    def stop(self) -> None:
        """Remove what was drawn; nothing more will be."""
        self._progress.stop()

    def status(self, text: str) -> None:
        """What is being done now."""
        if self._line is not None:
            self._progress.update(self._line, description=text)

    def tokens(self, name: str, done: int, total: int) -> None:
        """How far one prefix is."""
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=total, detail="")
        detail = f"{done:,} of {total:,} tokens"
        self._progress.update(self._bars[name], completed=done, total=total, detail=detail)
