"""The `keepwarm` command."""

from keepwarm.cli.main import main

__all__ = ["main"]
