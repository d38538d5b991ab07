"""Keepwarm: a gateway that keeps llama-server's prompt prefixes warm."""

from importlib.metadata import version

__version__ = version("keepwarm")

__all__ = ["__version__"]
