"""Decisions: synchronous functions of values. No clock, disk, socket or environment here."""
