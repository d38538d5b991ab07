#!/usr/bin/env python3
"""The real engine behind `llama-server`'s command line, for machines that have only the package.

It knows the options that the unit in deploy/systemd and `keepwarm serve --engine` give, and refuses
any other.
"""

from __future__ import annotations

import argparse
import os
import signal
from importlib.metadata import version as package_version
from pathlib import Path

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--parallel", type=int)
    parser.add_argument("--ctx-size", type=int, required=True)
    parser.add_argument("--cache-ram", type=int, default=8192)
    parser.add_argument("--slot-prompt-similarity", type=float, default=0.1)
    parser.add_argument("--slot-save-path", default="")
    parser.add_argument("--chat-template-file")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cache-type-k", choices=["f16"], default="f16")
    parser.add_argument("--cache-type-v", choices=["f16"], default="f16")
    parser.add_argument("--flash-attn", choices=["auto"], default="auto")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--log-verbosity", type=int, default=3)
    version = f"version: stand-in ({package_version('xllamacpp')})"
    parser.add_argument("--version", action="version", version=version)
    switches = "kv-unified no-kv-unified no-cache-idle-slots jinja metrics swa-full"
    for name in switches.split():
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.hostnames = [options.host]
    params.port = options.port
    # As llama-server: without a number there are four slots over one unified KV.
    params.n_parallel = options.parallel or 4
    params.n_ctx = options.ctx_size
    params.n_batch = options.batch_size
    params.verbosity = options.log_verbosity
    params.cache_ram_mib = options.cache_ram
    params.slot_prompt_similarity = options.slot_prompt_similarity
    params.slot_save_path = options.slot_save_path
    params.kv_unified = options.kv_unified or not options.parallel
    params.swa_full = options.swa_full
    params.cache_idle_slots = not options.no_cache_idle_slots
    params.endpoint_metrics = options.metrics
    params.fit_params = False
    if options.chat_template_file:
        params.chat_template = Path(options.chat_template_file).read_text(encoding="utf-8")
    if options.threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    server = xllamacpp.Server(params)
    assert server.listening_address
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
