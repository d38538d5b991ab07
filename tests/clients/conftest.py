"""These tests run real clients, so they run only where somebody has installed them and says so."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import pytest

from smalltiers import write_small_tiers
from tinymodels import small_model, write_tiny_qwen3

CONTEXT_TOKENS = 131072
# So large a row in its embedding makes a token likely at every place: the random model soon stops.
EMPHASIS = 60


def pytest_ignore_collect() -> bool | None:
    """`make test-clients` names the directory of the clients; nobody else collects anything."""
    return None if "KEEPWARM_TEST_CLIENTS" in os.environ else True


@pytest.fixture(scope="session")
def programs() -> Path:
    """Where the clients are, as `scripts/install_clients.py` has put them."""
    place = Path(os.environ["KEEPWARM_TEST_CLIENTS"]).absolute() / "bin"
    if not place.is_dir():
        pytest.skip(f"no clients in {place}")
    return place


@pytest.fixture(scope="session")
def small_tiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of two small tiers."""
    return write_small_tiers(tmp_path_factory.mktemp("tiers"))


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of random weights with room for an agent's prompt, and with few words to say."""
    path = tmp_path_factory.mktemp("model") / "random.gguf"
    write_tiny_qwen3(path, small_model(), context_tokens=CONTEXT_TOKENS)
    reader = gguf.GGUFReader(path, "r+")
    end = int(reader.fields["tokenizer.ggml.eos_token_id"].contents())
    table = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    table.data[end] *= EMPHASIS
    return path
