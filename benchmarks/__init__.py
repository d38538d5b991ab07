"""Measurements of parts and of long runs, outside the wheel: `python -m benchmarks.soak`."""
