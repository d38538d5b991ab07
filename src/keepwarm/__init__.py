"""Keepwarm: a gateway that keeps llama-server's prompt prefixes warm."""

# Also the package's version (see pyproject.toml). Asking the installed package for it would take
# 50 ms of every start, the engine's own too.
__version__ = "0.1.0"

__all__ = ["__version__"]
