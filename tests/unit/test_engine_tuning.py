"""The engine's own options: one table, both engines, and what of it the rows depend on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import xllamacpp

from keepwarm.engine import child
from keepwarm.engine.attach import plan_launch
from keepwarm.engine.fingerprint import fingerprint
from keepwarm.engine.launch import Launch
from keepwarm.engine.options import EngineOptions
from keepwarm.engine.process import EngineIdentity
from keepwarm.engine.tuning import OPTIONS, Tuning, tuning_of
from keepwarm.errors import ConfigError
from keepwarm.settings import EngineSettings

# A value of each that isn't its default.
VALUES: dict[str, Any] = {
    "gpu_layers": 20,
    "main_gpu": 1,
    "split_mode": "row",
    "tensor_split": "3,1",
    "device": "CUDA1",
    "cpu_moe_layers": 8,
    "kv_offload": False,
    "batch": 1024,
    "ubatch": 256,
    "threads_batch": 6,
    "mmproj": "a.gguf",
    "draft_model": "a.gguf",
    "draft_max": 6,
    "draft_gpu_layers": 3,
    "lora": ("a.gguf", "a.gguf:0.5"),
    "rope_scaling": "yarn",
    "rope_freq_base": 20000.0,
    "rope_freq_scale": 0.5,
    "yarn_orig_context": 4096,
    "yarn_ext_factor": 0.5,
    "yarn_attn_factor": 0.5,
    "yarn_beta_slow": 2.0,
    "yarn_beta_fast": 16.0,
    "mlock": True,
    "mmap": False,
    "numa": "isolate",
}
BINARY_ONLY = {"device", "cpu_moe_layers"}
IN_ROWS = {key for key in VALUES if key.startswith(("lora", "rope_", "yarn_"))}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("a", np.ones((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.chdir(tmp_path)


def set_to(key: str) -> EngineSettings:
    return EngineSettings(**{key: VALUES[key]})


def test_the_table_holds_what_is_tested_here() -> None:
    assert {option.key for option in OPTIONS} == set(VALUES)


def test_unset_options_say_nothing() -> None:
    assert tuning_of(EngineSettings(), embedded=True) == Tuning({})
    assert Tuning({}).flags() == []
    assert Tuning({}).params() == {}


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("key", VALUES)
def test_a_binary_is_told_each_by_its_flag(key: str) -> None:
    option = next(option for option in OPTIONS if option.key == key)
    flags = tuning_of(set_to(key), embedded=False).flags()
    if key == "lora":
        assert flags == ["--lora", "a.gguf", "--lora-scaled", "a.gguf:0.5"]
    elif isinstance(VALUES[key], bool):
        assert flags == [option.flag]
    else:
        assert flags == [
            option.flag,
            f"{VALUES[key]:g}" if isinstance(VALUES[key], float) else (str(VALUES[key])),
        ]


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("key", sorted(set(VALUES) - BINARY_ONLY))
def test_the_embedded_engine_takes_each(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xllamacpp, "Server", lambda common: common)
    params = tuning_of(set_to(key), embedded=True).params()
    assert params
    plain = xllamacpp.CommonParams()
    common = child._start(params)
    for path in params:
        taken, before = common, plain
        for part in path.split("."):
            taken, before = getattr(taken, part), getattr(before, part)
        assert taken != before, f"{path} is as it was"


@pytest.mark.parametrize("key", sorted(BINARY_ONLY))
def test_what_the_embedded_engine_lacks_is_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.{key}"):
        tuning_of(set_to(key), embedded=True)


@pytest.mark.parametrize("key", ["mmproj", "draft_model", "lora"])
def test_a_file_that_isnt_there_is_told_by_its_setting(key: str) -> None:
    value = ("no.gguf",) if key == "lora" else "no.gguf"
    with pytest.raises(ConfigError, match=rf"no\.gguf.*engine\.{key}"):
        tuning_of(EngineSettings(**{key: value}), embedded=True)


def test_proportions_that_arent_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="tensor_split"):
        tuning_of(EngineSettings(tensor_split="a,b"), embedded=False)


async def test_a_server_that_runs_already_cant_be_given_any(tmp_path: Path) -> None:
    settings = EngineSettings(upstream="http://127.0.0.1:1", slot_dir=str(tmp_path), ubatch=256)
    with pytest.raises(ConfigError, match=r"engine\.ubatch"):
        await plan_launch(settings, slot_dir=tmp_path)


def launch(settings: EngineSettings, *extra: str) -> Launch:
    options = EngineOptions(
        model=Path("m.gguf"),
        slots=2,
        context_tokens=4096,
        slot_dir=Path("slots"),
        unified=True,
        tuning=tuning_of(settings, embedded=False),
        extra=extra,
    )
    return Launch(EngineIdentity("k", "1"), None, options, None, None, Path("slots"), 1)


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("key", VALUES)
def test_only_what_rows_depend_on_is_part_of_the_fingerprint(key: str) -> None:
    plain = fingerprint(launch(EngineSettings()), {}, form="rows")
    tuned = fingerprint(launch(set_to(key)), {}, form="rows")
    assert (tuned != plain) == (key in IN_ROWS)
    by_hand = fingerprint(
        launch(EngineSettings(), *tuning_of(set_to(key), embedded=False).flags()), {}, form="rows"
    )
    assert (by_hand != plain) == (key in IN_ROWS)


@pytest.mark.usefixtures("files")
def test_an_adapter_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    def of(*lora: str) -> str:
        return fingerprint(launch(EngineSettings(lora=lora)), {}, form="rows")

    (tmp_path / "same.gguf").write_bytes((tmp_path / "a.gguf").read_bytes())
    assert of("same.gguf") == of("a.gguf") == of("a.gguf:1")
    assert of("a.gguf:0.5") != of("a.gguf")


def test_a_flag_with_its_value_in_one_word_is_left_out_alone() -> None:
    plain = fingerprint(launch(EngineSettings(), "--seed", "1"), {}, form="rows")
    with_batch = launch(EngineSettings(), "--batch-size=64", "--seed", "1")
    assert fingerprint(with_batch, {}, form="rows") == plain


def test_settings_keep_their_bounds() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"gpu_layers": -2}, EngineSettings)


@pytest.mark.usefixtures("files")
def test_an_option_stands_behind_what_it_overrides() -> None:
    options = launch(EngineSettings(batch=64)).options
    assert options
    flags = options.binary_flags(host="h", port=1)
    sizes = [flags[i + 1] for i, flag in enumerate(flags) if flag == "--batch-size"]
    assert sizes[-1] == "64"
    params = replace(options).embedded_params(host="h", port=1)
    assert params["n_batch"] == 64
