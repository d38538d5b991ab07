"""Engines: start, reach and identify a llama-server, whatever form it comes in."""
