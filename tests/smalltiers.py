"""Two small tiers, so that a test that starts Keepwarm several times warms it in a second."""

from __future__ import annotations

from pathlib import Path

_SYSTEM = """\
You are {agent_name}, an agent that keeps a small household server in order. Answer in one short
sentence and name the thing you looked at. When you are not sure, say so plainly and ask for one
more detail before you change anything on the machine.
"""
_CONTEXT = """\
The server runs a mail relay, a backup job each night and a web page for the family. The backup
disk is mounted at the second drive bay. Restarts are announced an hour before they happen, and
nothing is deleted without asking first.
"""


def write_small_tiers(directory: Path) -> Path:
    """Write `minimal` (about 60 tokens) and `standard` (about 110) below a directory."""
    minimal, standard = directory / "minimal", directory / "standard"
    minimal.mkdir(parents=True)
    standard.mkdir()
    (minimal / "tier.toml").write_text('description = "Who the agent is."\n')
    (minimal / "system.md").write_text(_SYSTEM)
    (standard / "tier.toml").write_text(
        'description = "And what it looks after."\nextends = "minimal"\ndefault = true\n'
    )
    (standard / "context.md").write_text(_CONTEXT)
    return directory
