"""`keepwarm init` on machines that are made up: what is found, what is proposed, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from keepwarm.cli import init as command
from keepwarm.cli.main import app
from keepwarm.core.memory import MemoryKind
from keepwarm.engine.gguf_header import ModelHeader, read_model
from keepwarm.errors import ConfigError
from keepwarm.operate.machine import FoundModel, Gpu, ThisMachine, find_models, look, parse_nvidia
from keepwarm.operate.propose import ALL_LAYERS, best_model, propose
from keepwarm.settings import load_settings

GB = 10**9
# Qwen3-8B at four bits: 36 layers of 8 KV heads, 128 elements each.
ROW_BYTES = 36 * 8 * 256 * 2


def header(size_gb: float = 5.0, **more: Any) -> ModelHeader:
    known = {"row_bytes": ROW_BYTES, "layers": 36, "chat_template": "{{ tools }}"} | more
    return ModelHeader(
        path=Path("/models/m.gguf"),
        name="m",
        architecture="qwen3",
        memory=MemoryKind.PLAIN,
        window_tokens=0,
        train_context_tokens=40960,
        size_bytes=int(size_gb * GB),
        file_id="id",
        **known,
    )


def machine(memory_gb: float, *gpus: Gpu, cores: int = 8, models: Any = ()) -> ThisMachine:
    free = int((memory_gb - 1) * GB)
    return ThisMachine(cores, int(memory_gb * GB), free, gpus, tuple(models))


def proposal(there: ThisMachine, model: ModelHeader, **options: Any) -> dict[str, Any]:
    proposed = propose(there, model, **options)
    assert all(one.reason for one in proposed)
    return {one.key: one.value for one in proposed}


@pytest.mark.parametrize("memory_gb", [8, 12, 16, 24, 32, 64, 256])
def test_what_is_proposed_fits_the_memory(memory_gb: int) -> None:
    there = machine(memory_gb)
    out = proposal(there, header())
    types = 17 / 32 if out.get("engine.kv_type_k") == "q8_0" else 1
    taken = 5 * GB + out["engine.context"] * ROW_BYTES * types
    assert taken < there.free_bytes
    assert out["engine.context"] <= 131_072
    assert out["engine.threads"] == 8


def test_more_memory_gives_more_context_and_halves_rows_only_where_they_are_short() -> None:
    small, large = proposal(machine(10), header()), proposal(machine(64), header())
    assert small["engine.kv_type_k"] == small["engine.kv_type_v"] == "q8_0"
    assert "engine.kv_type_k" not in large
    assert small["engine.context"] < large["engine.context"] == 131_072
    assert (small["engine.slots"], large["engine.slots"]) == (2, 4)


def test_all_layers_go_to_a_gpu_that_holds_them_and_as_many_as_fit_to_a_small_one() -> None:
    large, small = Gpu("large", 24 * GB), Gpu("small", 4 * GB)
    assert proposal(machine(32, large), header())["engine.gpu_layers"] == ALL_LAYERS
    assert 0 < proposal(machine(32, small), header())["engine.gpu_layers"] < 36
    assert proposal(machine(32, Gpu("shares", 0)), header())["engine.gpu_layers"] == ALL_LAYERS
    assert "engine.gpu_layers" not in proposal(machine(32), header())


def test_a_chatml_template_that_drops_tools_is_replaced_and_no_other() -> None:
    ours = Path("/ours.jinja")
    drops, other = "<|im_start|>{{ messages }}", "[INST]{{ messages }}"
    out = proposal(machine(32), header(chat_template=drops), tools_template=ours)
    assert out["engine.chat_template"] == str(ours)
    for template in (other, f"{drops}{{{{ tools }}}}"):
        out = proposal(machine(32), header(chat_template=template), tools_template=ours)
        assert "engine.chat_template" not in out


def test_the_largest_model_that_leaves_room_is_taken() -> None:
    sizes = {"huge": 60, "good": 9, "little": 1}
    models = [FoundModel(Path(name), name, "x", size * GB) for name, size in sizes.items()]

    def read(path: Path) -> ModelHeader:
        return header(sizes[str(path)])

    found = best_model(machine(32, models=models), read)
    assert found
    assert found[0].name == "good"
    assert best_model(machine(4, models=models), read) is None


def test_a_header_tells_what_a_token_takes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(36)
    writer.add_embedding_length(4096)
    writer.add_head_count(32)
    writer.add_head_count_kv(8)
    writer.add_key_length(128)
    writer.add_value_length(128)
    writer.add_tensor("a", np.ones((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    known = read_model(path)
    assert (known.layers, known.row_bytes) == (36, ROW_BYTES)


def put(path: Path, size: int = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return path


def test_models_are_found_where_other_programs_keep_them(tmp_path: Path) -> None:
    put(tmp_path / ".cache/llama.cpp/a.gguf", 11)
    put(tmp_path / ".lmstudio/models/author/name/b.gguf", 12)
    put(tmp_path / ".lmstudio/models/author/name/mmproj-b.gguf", 99)
    blob = put(tmp_path / ".ollama/models/blobs/sha256-123", 13)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:123"}
    manifest = tmp_path / ".ollama/models/manifests/registry.ollama.ai/library/qwen3/8b"
    put(manifest).write_text(json.dumps({"layers": [{"mediaType": "other"}, layer]}))
    put(manifest.parent / "damaged").write_text("{")
    snapshot = tmp_path / ".cache/huggingface/hub/models--a--b/snapshots/1/c-00001-of-00002.gguf"
    put(snapshot, 14)
    put(snapshot.with_name("c-00002-of-00002.gguf"), 99)
    put(tmp_path / "models/again.gguf").unlink()
    (tmp_path / "models/again.gguf").symlink_to(snapshot)
    found = [(model.name, model.source) for model in find_models(tmp_path, {})]
    assert found == [
        ("c-00001-of-00002", "Hugging Face"),
        ("qwen3:8b", "Ollama"),
        ("b", "LM Studio"),
        ("a", "llama.cpp"),
    ]
    assert find_models(tmp_path, {})[1].path == blob


def test_folders_that_the_environment_names_come_first(tmp_path: Path) -> None:
    put(tmp_path / "hub/models--a/snapshots/1/d.gguf")
    put(tmp_path / "elsewhere/e.gguf", 20)
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "LLAMA_CACHE": f"{tmp_path}/elsewhere"}
    assert [m.name for m in find_models(tmp_path / "home", environment)] == ["e", "d"]


@pytest.mark.parametrize("limit", ["max", "2000000000", ""])
def test_memory_is_what_the_control_group_leaves_of_it(tmp_path: Path, limit: str) -> None:
    put(tmp_path / "proc/meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 6000000 kB\n")
    if limit:
        put(tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{limit}\n")
        put(tmp_path / "sys/fs/cgroup/memory.current").write_text("500000000\n")
    there = look(tmp_path, {}, root=tmp_path, cores=2)
    is_limited = limit.isdecimal()
    assert there.memory_bytes == (2_000_000_000 if is_limited else 8_000_000 * 1024)
    assert there.free_bytes == (1_500_000_000 if is_limited else 6_000_000 * 1024)


def test_an_amd_card_is_seen_by_its_memory(tmp_path: Path) -> None:
    put(tmp_path / "sys/class/drm/card0/device/mem_info_vram_total").write_text("17163091968\n")
    put(tmp_path / "sys/class/drm/card1/device/mem_info_vram_total").write_text("0\n")
    assert look(tmp_path, {}, root=tmp_path, cores=2).gpus == (Gpu("AMD GPU", 17163091968),)


def test_a_container_without_anything_is_looked_at_in_peace(tmp_path: Path) -> None:
    there = look(Path("/nonexistent"), {}, root=tmp_path, cores=1)
    assert (there.gpus, there.models) == ((), ())


def test_nvidia_cards_are_read_line_by_line() -> None:
    said = "NVIDIA GeForce RTX 4090, 24564\nNVIDIA T4, 15360\n\nrubbish\n"
    cards = parse_nvidia(said)
    assert cards == (Gpu("NVIDIA GeForce RTX 4090", 24564 << 20), Gpu("NVIDIA T4", 15360 << 20))


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with one model, and a directory to stand in."""
    model = FoundModel(Path("/models/m.gguf"), "m", "LM Studio", 5 * GB)
    there = machine(32, Gpu("card", 24 * GB), models=[model])
    monkeypatch.setattr(command, "look", lambda *_: there)
    monkeypatch.setattr(command, "read_model", lambda _: header())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_nothing_is_written_unasked(made_up: Path) -> None:
    done = CliRunner().invoke(app, ["init"])
    assert done.exit_code == 0
    assert "gpu_layers = 999" in done.stdout
    assert "LM Studio" in done.stderr
    assert list(made_up.iterdir()) == []


def test_what_is_written_can_be_used_and_is_never_written_over(made_up: Path) -> None:
    assert CliRunner().invoke(app, ["init", "--write"]).exit_code == 0
    settings, _ = load_settings(file=made_up / "keepwarm.toml")
    assert settings.engine.model == "/models/m.gguf"
    assert settings.engine.gpu_layers == ALL_LAYERS
    before = (made_up / "keepwarm.toml").read_text()
    again = CliRunner().invoke(app, ["init", "--write"])
    assert isinstance(again.exception, ConfigError)
    assert (made_up / "keepwarm.toml").read_text() == before


@pytest.mark.usefixtures("made_up")
def test_a_program_reads_the_same() -> None:
    done = CliRunner().invoke(app, ["init", "--json"])
    told = json.loads(done.stdout)
    assert told["machine"]["models"][0]["source"] == "LM Studio"
    assert {one["key"] for one in told["proposed"]} >= {"engine.model", "engine.context"}
    assert msgspec.toml.decode(told["toml"])["engine"]["model"] == "/models/m.gguf"


def test_without_a_model_it_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "look", lambda *_: machine(32))
    done = CliRunner().invoke(app, ["init"])
    assert isinstance(done.exception, ConfigError)
    assert "--model" in str(done.exception)
