"""A real engine for live tests, in a process that ends with its parent.

`python engine_child.py '{"model.path": "...", "port": 9100}'` starts the server with these
`CommonParams`, prints `listening ADDRESS`, and ends when its standard input is closed.
"""

from __future__ import annotations

import json
import os
import sys

import xllamacpp


def main() -> None:
    params = xllamacpp.CommonParams()
    for name, value in json.loads(sys.argv[1]).items():
        owner: object = params
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        # Enumerations are given by number.
        setattr(owner, last, type(getattr(owner, last))(value))
    server = xllamacpp.Server(params)
    sys.stdout.write(f"listening {server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)  # the server's threads don't end by themselves


main()
