"""Lets tests import what stands beside this file."""

from __future__ import annotations

from hypothesis import settings

# A machine under load is no failing test.
settings.register_profile("keepwarm", deadline=None)
settings.load_profile("keepwarm")
