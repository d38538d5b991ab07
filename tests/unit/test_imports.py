"""The architecture as a test: which module may import which, and a few rules of the house."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import keepwarm

ROOT = Path(keepwarm.__file__).parent
MODULES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}

# Decisions need no clock, no disk, no network and no environment.
# fmt: off
IMPURE = frozenset((
    "aiohttp", "asyncio", "concurrent", "ctypes", "http", "io", "logging", "os", "pathlib",
    "select", "selectors", "shutil", "signal", "socket", "sqlite3", "subprocess", "sys", "tempfile",
    "threading", "time", "urllib",
))
# fmt: on
# Who may be imported by whom: a module of one layer knows its own and those before it.
# fmt: off
LAYERS = (
    "core", "api", "slotfile", "tiers", "store", "engine", "explain", "deployment", "gateway",
    "cli",
)
# fmt: on
# What decides and stands beside what keeps: as strict as the core.
PURE = (
    "explain/difference.py",
    "explain/explanation.py",
    "explain/parts.py",
    "explain/recent.py",
)
LINES = 420
# What a module's name may not be: it says nothing of what is in it.
VAGUE = frozenset(("utils", "util", "helpers", "helper", "manager", "base", "common", "misc"))


def imports_of(path: Path, *, for_types: bool = False) -> Iterator[str]:
    """Every module a file imports, wherever; those for the type checker alone if `for_types`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if not for_types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(name: str) -> str:
    """`core` of `keepwarm.core.plan`; '' for what isn't in a package of Keepwarm's."""
    parts = name.split(".")
    return parts[1] if parts[0] == "keepwarm" and len(parts) > 1 else ""


def modules_in(package: str) -> dict[str, Path]:
    found = {name: path for name, path in MODULES.items() if name.startswith(f"{package}/")}
    assert found, f"no package {package}"
    return found


@pytest.mark.parametrize("package", ["core", "router", "slotfile", "api"])
def test_the_core_imports_nothing_that_waits_or_looks_outside(package: str) -> None:
    for name, path in modules_in(package).items():
        for imported in imports_of(path):
            # Taking an address apart looks at nothing.
            if imported.startswith("urllib.parse"):
                continue
            assert imported.split(".")[0] not in IMPURE, f"{name} imports {imported}"


@pytest.mark.parametrize("name", PURE)
def test_an_explanation_is_decided_without_looking_outside(name: str) -> None:
    for imported in imports_of(MODULES[name]):
        assert imported.split(".")[0] not in IMPURE, f"{name} imports {imported}"


@pytest.mark.parametrize("package", LAYERS)
def test_imports_go_one_way(package: str) -> None:
    later = LAYERS[LAYERS.index(package) + 1 :]
    for name, path in modules_in(package).items():
        for imported in imports_of(path):
            assert package_of(imported) not in later, f"{name} imports {imported}"


@pytest.mark.parametrize("name", ["settings.py", "errors.py", "keys.py", "logs.py"])
def test_what_everyone_imports_imports_no_layer_but_the_core(name: str) -> None:
    for imported in imports_of(MODULES[name]):
        assert package_of(imported) not in LAYERS[1:], f"{name} imports {imported}"


def test_the_benchmark_knows_keepwarm_by_its_public_interface_only() -> None:
    for name, path in modules_in("bench").items():
        for imported in imports_of(path):
            assert package_of(imported) not in {"store", "gateway"}, f"{name} imports {imported}"


def module_name(name: str) -> str:
    """`keepwarm.core.plan` of `core/plan.py`, `keepwarm.core` of `core/__init__.py`."""
    return ".".join(("keepwarm", *Path(name).with_suffix("").parts)).removesuffix(".__init__")


def reached_from(start: str, imports: dict[str, set[str]]) -> set[str]:
    """All modules that one's imports lead to, itself among them only in a circle."""
    reached: set[str] = set()
    waiting = list(imports[start])
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += imports[name]
    return reached


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {module_name(name): path for name, path in MODULES.items()}
    # `from keepwarm.store import checks` within the store means the module, not the package.
    imports = {
        name: {
            imported
            for imported in imports_of(path, for_types=True)
            if imported in names and not f"{name}.".startswith(f"{imported}.")
        }
        for name, path in names.items()
    }
    circular = {name for name in names if name in reached_from(name, imports)}
    assert not circular, f"these import each other: {sorted(circular)}"


def test_nothing_in_the_wheel_imports_what_is_outside_of_it() -> None:
    for name, path in MODULES.items():
        for imported in imports_of(path):
            assert imported.split(".")[0] not in {"benchmarks", "tests"}, f"{name}: {imported}"


def test_the_environment_is_read_in_the_settings_alone() -> None:
    for name, path in MODULES.items():
        if name == "settings.py":
            continue
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
        # What a library of others wants to find there is written, not read.
        written = {id(node.value) for node in attributes if node.attr == "setdefault"}
        for node in attributes:
            read = node.attr in ("environ", "getenv", "environb") and id(node) not in written
            assert not read, f"{name}:{node.lineno} reads the environment"


def test_every_foreign_error_is_translated_but_in_the_supervisor() -> None:
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ExceptHandler):
                continue
            kinds = ast.unparse(node.type) if node.type else ""
            assert kinds, f"{name}:{node.lineno} catches everything"
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            # A supervisor that ends of an error nobody thought of leaves the engine dead for ever.
            is_supervisor = name == "deployment/supervision.py"
            fine = kinds != "Exception" or raises or is_supervisor
            assert fine, f"{name}:{node.lineno} swallows every error"


def test_modules_have_names_that_say_something() -> None:
    for name in MODULES:
        for part in Path(name).with_suffix("").parts:
            assert part not in VAGUE, f"{name} says nothing of what is in it"


def test_every_module_says_what_it_is_for() -> None:
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        assert not text or ast.get_docstring(ast.parse(text)), f"{name} has no docstring"


def test_modules_stay_readable() -> None:
    """A warning, not a failure: a long module may be right, but somebody should look at it."""
    for name, path in MODULES.items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LINES:
            warnings.warn(f"{name} has {lines} lines", stacklevel=1)
        assert lines < 2 * LINES, f"{name} has {lines} lines"


def test_importing_the_package_imports_no_engine_and_opens_nothing() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    kinds = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr)
    assert all(isinstance(node, kinds) for node in tree.body)
    for name, path in MODULES.items():
        top = [
            n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.Import)
        ]
        imported = {alias.name.split(".")[0] for node in top for alias in node.names}
        assert "xllamacpp" not in imported, f"{name} loads the engine when it is imported"
