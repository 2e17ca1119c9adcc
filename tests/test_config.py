"""Settings are checked once, at the edge: each error names the field, its value, and what would be right."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from atoma_jax.config import (
    CacheConfig,
    CompileConfig,
    EngineConfig,
    MeshConfig,
    ModelConfig,
    SchedulerConfig,
    ValidationConfig,
)
from atoma_jax.errors import ConfigError

SECTIONS = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "compile": CompileConfig,
    "validation": ValidationConfig,
    "mesh": MeshConfig,
}


def refused(**options: Any) -> ConfigError:
    """The error of one setting beside a valid model."""
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_options({"model": "m.gguf", **options})
    return caught.value


def accepted(**options: Any) -> EngineConfig:
    return EngineConfig.from_options({"model": "m.gguf", **options})


class TestOptions:
    def test_a_model_is_enough(self) -> None:
        assert accepted() == EngineConfig(model=ModelConfig(model="m.gguf"))

    def test_each_goes_to_its_section(self) -> None:
        config = accepted(
            dtype="bfloat16",
            block_size=32,
            max_num_seqs=8,
            decode_rows=[1, 8],
            max_logprobs=5,
            kv_cache_dtype="float16",
        )
        assert config.model == ModelConfig(model="m.gguf", dtype="bfloat16")
        assert config.cache == CacheConfig(block_size=32, kv_cache_dtype="float16")
        assert config.scheduler == SchedulerConfig(max_num_seqs=8)
        assert config.compile == CompileConfig(decode_rows=(1, 8))
        assert config.validation == ValidationConfig(max_logprobs=5)

    def test_names_are_unique_over_all_sections(self) -> None:
        names = [option.name for section in SECTIONS.values() for option in dataclasses.fields(section)]
        assert len(names) == len(set(names))

    def test_sections_are_plain_values_that_build_the_same_again(self) -> None:
        config = accepted(decode_rows=(1, 4), watermark=0.1, deterministic=False)
        assert EngineConfig.from_sections(config.sections()) == config

    def test_none_leaves_the_choice_to_the_engine(self) -> None:
        assert accepted(num_pages=None, decode_rows=None, max_model_len=None, revision=None) == accepted()

    def test_an_integer_is_a_number(self) -> None:
        assert accepted(watermark=0, gpu_memory_utilization=1).cache.gpu_memory_utilization == 1

    def test_it_is_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            accepted().model.seed = 1  # type: ignore[misc]

    @pytest.mark.parametrize("options", [{}, {"max_num_seqs": 4}, {"model": ""}])
    def test_a_model_must_be_named(self, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=r"must name a model: .*a \.gguf file") as caught:
            EngineConfig.from_options(options)
        assert caught.value.field == "model"

    @pytest.mark.parametrize(
        ("name", "near"),
        [("max_num_seq", "max_num_seqs"), ("block_sise", "block_size"), ("gpu_memory_utilisation", "gpu_memory_ut")],
    )
    def test_for_an_unknown_name_a_near_one_is_offered(self, name: str, near: str) -> None:
        error = refused(**{name: 4})
        assert error.field == name
        assert f"did you mean {near}" in str(error)

    def test_without_a_near_one_all_are_listed(self) -> None:
        message = str(refused(zzz=1))
        assert all(option.name in message for section in SECTIONS.values() for option in dataclasses.fields(section))


class TestTypes:
    @pytest.mark.parametrize("value", [True, "7", 1.5, [1], {}])
    @pytest.mark.parametrize("name", ["max_num_seqs", "block_size", "seed", "num_pages", "max_logprobs"])
    def test_what_is_no_integer(self, name: str, value: Any) -> None:
        error = refused(**{name: value})
        assert (error.field, error.value) == (name, value)
        assert "must be an integer" in str(error)

    @pytest.mark.parametrize("value", [True, "0.5", [0.5]])
    @pytest.mark.parametrize("name", ["watermark", "gpu_memory_utilization"])
    def test_what_is_no_number(self, name: str, value: Any) -> None:
        assert "must be a number" in str(refused(**{name: value}))

    @pytest.mark.parametrize("value", [1, 0, "true", None])
    @pytest.mark.parametrize("name", ["enable_prefix_caching", "async_scheduling", "deterministic"])
    def test_what_is_neither_true_nor_false(self, name: str, value: Any) -> None:
        assert "must be true or false" in str(refused(**{name: value}))

    @pytest.mark.parametrize("value", [1, True, ["m"]])
    def test_what_is_no_text(self, value: Any) -> None:
        assert "must be a string" in str(refused(revision=value))
        assert "must be a string" in str(refused(model=value))

    @pytest.mark.parametrize("value", [4, "1,4", {1: 4}])
    def test_what_is_no_list(self, value: Any) -> None:
        assert "must be a list of integers" in str(refused(decode_rows=value))

    @pytest.mark.parametrize("value", [[True], ["1"], [1.0], [None]])
    def test_what_is_no_list_of_integers(self, value: Any) -> None:
        assert "must be an integer" in str(refused(prefill_tokens=value))

    @pytest.mark.parametrize(
        ("name", "choices"),
        [
            ("dtype", ["auto", "float32", "bfloat16"]),
            ("kv_cache_dtype", ["auto", "float32", "bfloat16", "float16", "fp8_e4m3", "int8"]),
            ("scheduling_policy", ["fcfs", "priority"]),
            ("kernels", ["auto", "xla", "pallas", "interpret", "native"]),
            ("cpu_precision", ["default", "high", "exact"]),
            ("weight_layout", ["auto", "rows", "planar", "tiles"]),
        ],
    )
    def test_what_is_no_choice(self, name: str, choices: list[str]) -> None:
        for choice in choices:
            accepted(**{name: choice})
        for value in ("float64", "", 0, True, None):
            assert f"must be one of {', '.join(choices)}, got {value!r}" in str(refused(**{name: value}))

    @pytest.mark.parametrize(
        ("short", "name"), [("f32", "float32"), ("bf16", "bfloat16"), ("f16", "float16"), ("fp8", "fp8_e4m3")]
    )
    def test_a_short_spelling_is_read_as_the_name(self, short: str, name: str, tmp_path: Path) -> None:
        assert accepted(kv_cache_dtype=short) == accepted(kv_cache_dtype=name)
        path = tmp_path / "serve.toml"
        path.write_text(f'[model]\nmodel = "m.gguf"\n[cache]\nkv_cache_dtype = "{short}"\n', encoding="utf-8")
        assert EngineConfig.from_toml(path).sections()["cache"]["kv_cache_dtype"] == name
        assert "must be one of" in str(refused(dtype=short)), "of the cache alone"


class TestLimits:
    @pytest.mark.parametrize(
        ("name", "inside", "outside", "rule"),
        [
            ("max_model_len", [1, 10**9], [0, -1], "must be at least 1"),
            ("seed", [0, 2**63 - 1], [-1, 2**63], "must be between 0 and 2**63 - 1"),
            ("block_size", [8, 16, 32, 64, 128], [0, 1, 12, 256], "must be 8, 16, 32, 64 or 128 tokens"),
            ("num_pages", [2, 10**6], [1, 0, -5], "must be at least 2: page 0 is scratch"),
            ("kv_cache_memory_bytes", [1], [0, -1], "must be at least 1"),
            ("gpu_memory_utilization", [0.01, 1.0], [0.0, 1.01, float("nan"), 10**400], "above 0 and at most 1"),
            ("max_num_seqs", [1, 4096], [0, 4097], "must be between 1 and 4096"),
            ("max_num_batched_tokens", [1, 65536], [0, 65537], "must be between 1 and 65536"),
            ("max_num_queued_reqs", [1], [0, -1], "must be at least 1"),
            ("watermark", [0.0, 0.49], [-0.1, 0.5, float("nan"), float("inf")], "must be at least 0 and below 0.5"),
            ("decode_rows", [(1,), (1, 2, 9)], [(), (0, 1), (2, 1), (1, 1)], "must be a rising list of sizes"),
            ("prefill_tokens", [(16,), (16, 512)], [(), (-1, 16), (32, 16), (16, 16)], "must be a rising list"),
            ("score_tokens", [1, 65536], [0, 65537], "must be between 1 and 65536"),
            ("max_logprobs", [0, 64], [-1, 65], "must be between 0 and 64"),
        ],
    )
    def test_they_hold_exactly(self, name: str, inside: list[Any], outside: list[Any], rule: str) -> None:
        for value in inside:
            accepted(**{name: value})
        for value in outside:
            error = refused(**{name: value})
            assert error.field == name
            assert rule in str(error)
            assert len(str(error)) < 400

    @pytest.mark.parametrize(
        ("options", "field", "why"),
        [
            ({"trust_remote_code": True}, "trust_remote_code", "code shipped with a checkpoint is never run"),
            ({"enforce_eager": True}, "enforce_eager", "runs compiled programs alone"),
            ({"num_pages": 9, "kv_cache_memory_bytes": 9}, "num_pages", "contradicts kv_cache_memory_bytes"),
            ({"num_pages": 9, "gpu_memory_utilization": 0.5}, "gpu_memory_utilization", "has no effect beside"),
            (
                {"kv_cache_memory_bytes": 9, "gpu_memory_utilization": 0.5},
                "gpu_memory_utilization",
                "has no effect beside",
            ),
            ({"deterministic": True, "decode_rows": (1, 4)}, "decode_rows", "one size where deterministic"),
            ({"deterministic": True, "prefill_tokens": (16, 32)}, "prefill_tokens", "one size where deterministic"),
            ({"deterministic": True, "enable_chunked_prefill": False}, "enable_chunked_prefill", "chunks are fixed"),
        ],
    )
    def test_what_has_no_meaning_is_refused_by_name(self, options: dict[str, Any], field: str, why: str) -> None:
        error = refused(**options)
        assert error.field == field
        assert why in str(error)

    def test_an_error_says_what_was_given(self) -> None:
        assert str(refused(block_size=12)) == "block_size: must be 8, 16, 32, 64 or 128 tokens, got 12."


class TestToml:
    def read(self, tmp_path: Path, text: str, overrides: dict[str, Any] | None = None) -> EngineConfig:
        path = tmp_path / "serve.toml"
        path.write_text(text, encoding="utf-8")
        return EngineConfig.from_toml(path, overrides)

    def test_sections_mean_what_options_mean(self, tmp_path: Path) -> None:
        text = """
            [model]
            model = "m.gguf"
            max_model_len = 2048
            [cache]
            num_pages = 64
            [scheduler]
            watermark = 0.05
            [compile]
            decode_rows = [1, 4, 16]
            [validation]
            max_logprobs = 3
        """
        assert self.read(tmp_path, text) == accepted(
            max_model_len=2048, num_pages=64, watermark=0.05, decode_rows=(1, 4, 16), max_logprobs=3
        )

    def test_options_win_over_the_file(self, tmp_path: Path) -> None:
        text = '[model]\nmodel = "m.gguf"\nseed = 1'
        config = self.read(tmp_path, text, {"seed": 2, "max_num_seqs": 4})
        assert config == accepted(seed=2, max_num_seqs=4)

    def test_the_model_may_come_from_an_option(self, tmp_path: Path) -> None:
        assert self.read(tmp_path, "[cache]\nblock_size = 32", {"model": "m.gguf"}) == accepted(block_size=32)

    @pytest.mark.parametrize(
        ("text", "field", "why"),
        [
            ("", "model", "must name a model"),
            ("[cache]\nblock_size = 16", "model", "must name a model"),
            ("[model]\nseed = 1", "model", "must name a model"),
            ('model = "m.gguf"', "model", "must be a table of settings"),
            ("[modell]\nx = 1", "modell", "is no section; there are model, cache, scheduler, compile, validation"),
            ("[cache]\nblocksize = 16", "cache.blocksize", "did you mean block_size"),
            ("[cache]\nmax_num_seqs = 4", "cache.max_num_seqs", "is no setting"),
            ('[model]\nmodel = "m"\nseed = true', "seed", "must be an integer"),
            ('[model]\nmodel = "m"\nmodel = "n"', "config", "is no valid TOML"),
            ("[model", "config", "is no valid TOML"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path: Path, text: str, field: str, why: str) -> None:
        with pytest.raises(ConfigError) as caught:
            self.read(tmp_path, text)
        assert caught.value.field == field
        assert why in str(caught.value)

    def test_an_unknown_option_is_named_beside_a_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="did you mean seed"):
            self.read(tmp_path, '[model]\nmodel = "m"', {"sead": 1})

    def test_a_file_that_is_no_text(self, tmp_path: Path) -> None:
        path = tmp_path / "serve.toml"
        path.write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigError, match="is no valid TOML"):
            EngineConfig.from_toml(path)

    def test_a_missing_file_and_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot be read: No such file"):
            EngineConfig.from_toml(tmp_path / "absent.toml")
        with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
            EngineConfig.from_toml(tmp_path)


class TestMesh:
    """[mesh]: how an engine is spread over devices and hosts."""

    def test_a_file_names_sizes_or_the_text_of_the_flag(self, tmp_path: Path) -> None:
        file = tmp_path / "engine.toml"
        file.write_text('[model]\nmodel = "m.gguf"\n[mesh]\nfsdp = 2\ntensor = -1\n')
        assert EngineConfig.from_toml(file).mesh == MeshConfig(mesh="fsdp=2,tensor=-1")
        assert EngineConfig.from_toml(file, {"mesh": "data=2"}).mesh == MeshConfig(mesh="data=2")
        file.write_text('[model]\nmodel = "m.gguf"\n[mesh]\nmesh = "fsdp"\n')
        assert EngineConfig.from_toml(file).mesh == MeshConfig(mesh="fsdp")

    def test_hosts_are_named_as_jax_names_them(self) -> None:
        config = accepted(mesh="fsdp=2", coordinator_address="10.0.0.1:1234", num_processes=2, process_id=1)
        assert config.mesh.process_id == 1
        assert accepted(mesh="fsdp", coordinator_address="auto").mesh.num_processes is None

    @pytest.mark.parametrize(
        ("options", "field", "problem"),
        [
            ({"num_processes": 2}, "num_processes", "needs coordinator_address"),
            ({"process_id": 0}, "process_id", "needs coordinator_address"),
            ({"coordinator_address": "10.0.0.1"}, "coordinator_address", "must be host:port, or auto"),
            ({"coordinator_address": "h:0"}, "coordinator_address", "must be host:port"),
            ({"coordinator_address": "h:99999999"}, "coordinator_address", "must be host:port"),
            ({"coordinator_address": "h:1", "num_processes": 2}, "process_id", "must be given beside"),
            ({"coordinator_address": "h:1", "process_id": 0}, "num_processes", "must be given beside"),
            ({"coordinator_address": "h:1", "num_processes": 2, "process_id": 2}, "process_id", "below num_processes"),
            ({"coordinator_address": "h:1", "num_processes": 2, "process_id": -1}, "process_id", "at least 0"),
            ({"coordinator_address": "h:1", "num_processes": 0, "process_id": 0}, "num_processes", "between 1 and"),
            ({"coordinator_address": "h:1", "num_processes": 2, "process_id": 1}, "mesh", "must be given for several"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, options: dict[str, Any], field: str, problem: str) -> None:
        error = refused(**options)
        assert error.field == field
        assert problem in str(error)
