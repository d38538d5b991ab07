"""Run a command for exactly as long as standard input stays open: `python -m ...guard CMD ARGS`.

A `llama-server` binary knows nothing of its parent; this small process in between ends it when
Keepwarm is gone, however Keepwarm ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main() -> int:
    """Run the command, forward SIGTERM, return its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    print(f"keepwarm-guard: pid {child.pid}", file=sys.stderr, flush=True)  # noqa: T201
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())

    def watch() -> None:
        while os.read(0, 4096):
            pass
        child.kill()

    threading.Thread(target=watch, daemon=True).start()
    return child.wait()


if __name__ == "__main__":
    status = main()
    # The watcher may still sit in its read; a normal exit is fine for a daemon thread.
    sys.exit(status if status >= 0 else 128 - status)
