"""What people see: messages on stderr, results on stdout."""

from __future__ import annotations

import sys

import msgspec
from rich.console import Console

# Results go to stdout so that they can be piped; everything told on the way goes to stderr.
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def fail(message: str) -> None:
    """Say what is wrong, as text: brackets in it are not markup."""
    err.print("error: ", style="bold red", end="")
    err.print(message, markup=False)


def print_json(value: object) -> None:
    """A result for programs."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")
