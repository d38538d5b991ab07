"""Every place that removes or renames files is known, with what proves that they are ours."""

from __future__ import annotations

import ast
from pathlib import Path

import keepwarm

ROOT = Path(keepwarm.__file__).parent

_VERBS = {"unlink", "rmdir", "rmtree", "rename", "removedirs"}
_MODULE_VERBS = {("os", verb) for verb in ("remove", "replace", "rename", "unlink", "rmdir")}

# module -> why what it removes is its own. Whoever adds a line here says what proves it.
KNOWN = {
    "batch/watched_directory.py": "journals and directories whose names it gave, in DIR/running",
    "batch/ledger.py": "names that it wrote down before their files were made",
    "bench/servers.py": "directories that it made with a name of its own",
    "cli/service.py": "the unit, which `unitfile` proved to be ours or a person confirmed",
    "deployment/probe.py": "slot files under random names that it gave",
    "doctor/experiment.py": "slot files under random names that it gave",
    "doctor/kernel.py": "a file under a random name that it created",
    "explain/history.py": "nothing removed: a file that can't be read is set aside",
    "gateway/listening.py": "a socket that nobody listens on, at the address we are to have",
    "store/container.py": "its own temporary file; an export replaces an export only",
    "store/disk.py": "the one way of the store's other modules to the file system",
    "store/files.py": "names of an extent's or end's form, in a directory with our tag",
    "store/neighbours.py": "stores with our tag that no process holds, to keep the quota",
    "store/places.py": "names of our form in a directory whose tag names it",
    "store/staging.py": "names of this life, or of one whose lock nobody holds",
    "store/unsaved.py": "a directory that this process made under a new name",
}


def _removals(path: Path) -> list[int]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        if node.func.attr in _VERBS or (owner, node.func.attr) in _MODULE_VERBS:
            found.append(node.lineno)
    return found


def test_every_module_that_removes_files_says_what_proves_them_ours() -> None:
    found = {
        str(path.relative_to(ROOT)): lines
        for path in sorted(ROOT.rglob("*.py"))
        if (lines := _removals(path))
    }
    new = {name: lines for name, lines in found.items() if name not in KNOWN}
    assert not new, f"say in KNOWN what proves that these are ours: {new}"
    assert not KNOWN.keys() - found.keys(), "these remove nothing any more"


def test_whole_trees_are_removed_only_where_they_were_made() -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if "rmtree" in path.read_text(encoding="utf-8")
    }
    assert users == {"bench/servers.py", "store/unsaved.py"}
