"""Keepwarm as a service: systemd units, their rendering and installing, and telling systemd."""
