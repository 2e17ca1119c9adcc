"""A converted model is the model: the same bits on the device, the same answers, and the same file again."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest

from atoma_jax import LLM, SamplingParams, ops
from atoma_jax.config import EngineConfig, ModelConfig
from atoma_jax.engine import convert, model_setup
from atoma_jax.engine.convert import convert_model
from atoma_jax.engine.export import export_gguf
from atoma_jax.engine.model_tokenizer import tokenizer_of
from atoma_jax.errors import ConfigError, UnsupportedModelError, UserError, WeightFileError
from atoma_jax.loading.fetch.hub import resolve
from atoma_jax.loading.model_files import open_model
from atoma_jax.loading.orbax import weights as orbax_weights
from atoma_jax.loading.orbax.checkpoint import OrbaxModel
from atoma_jax.loading.orbax.manifest import read_manifest
from atoma_jax.native.library import library
from atoma_jax.ops import Backend
from tests.engine.converted import edit, load, some_file
from tests.loading.conftest import TinyModel
from tests.tiny_model import SMALL_ENGINE

ROOT = Path(__file__).parents[2]
Q = gguf.GGMLQuantizationType

INSIDE = {"attn_q": Q.Q4_K, "attn_k": Q.Q8_0, "attn_v": Q.Q6_K, "ffn_gate": Q.Q5_0, "ffn_up": Q.Q6_K}
MIXES: dict[str, Callable[[str], Q]] = {
    "Q8_0": lambda name: Q.Q8_0,
    "Q4_1": lambda name: Q.Q4_1,
    "Q4_K": lambda name: Q.Q4_K,
    "a mix as of Q4_K_M": lambda name: INSIDE.get(name.split(".")[-2], Q.Q8_0),
    "layers in turn": lambda name: Q.Q6_K if "blk.0" in name else Q.Q4_K,
    "dense layers beside quantized ones": lambda name: Q.F16 if "blk.1" in name else Q.Q4_0,
    "F32": lambda name: Q.F32,
    "F16 and Q6_K": lambda name: Q.F16 if "token_embd" in name else Q.Q6_K,
}
EXPERTS: dict[str, Any] = {
    "metadata": {"expert_count": 4, "expert_used_count": 2},
    "types": lambda name: Q.F32,
    "tensors": {
        name: shape
        for i in range(2)
        for name, shape in {
            **{f"blk.{i}.ffn_{part}.weight": None for part in ("gate", "up", "down")},
            f"blk.{i}.ffn_gate_inp.weight": (4, 256),
            f"blk.{i}.ffn_gate_exps.weight": (4, 512, 256),
            f"blk.{i}.ffn_up_exps.weight": (4, 512, 256),
            f"blk.{i}.ffn_down_exps.weight": (4, 256, 512),
        }.items()
    },
}


@pytest.fixture
def any_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of `TinyModel` have none."""
    monkeypatch.setattr("atoma_jax.engine.convert.tokenizer_of", lambda files: None)


def assert_same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (left.shape, left.dtype) == (right.shape, right.dtype)
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


class TestTheWeights:
    @pytest.mark.parametrize("layout", ["rows", "planar", "tiles"])
    @pytest.mark.parametrize("mix", MIXES)
    @pytest.mark.usefixtures("any_tokenizer")
    def test_come_back_bit_by_bit_and_as_planned(self, tmp_path: Path, mix: str, layout: str) -> None:
        TinyModel(types=MIXES[mix]).write(tmp_path / "m.gguf")
        settings = {"weight_layout": layout, "dtype": "float32"}
        settings |= {"cpu_precision": "high"} if layout == "tiles" else {}
        done = convert_model(ModelConfig(model=str(tmp_path / "m.gguf"), **settings), tmp_path / "out")
        before, weights = load(tmp_path / "m.gguf", **settings)
        after, restored = load(tmp_path / "out")
        assert_same_bits(weights, restored)
        assert after.spec == before.spec
        assert jax.tree.map(lambda a: (a.shape, a.dtype), dict(after.planned)) == jax.tree.map(
            lambda a: (a.shape, a.dtype), restored
        )
        assert done.weight_bytes == before.weight_bytes == after.weight_bytes
        assert done.file_bytes == sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())

    def test_of_a_folder_in_hf_layout_come_with_its_tokenizer_and_sampling_defaults(self, tmp_path: Path) -> None:
        source = ROOT / "tests" / "data" / "ternary" / "hf"
        convert_model(ModelConfig(model=str(source)), tmp_path / "out")
        before, weights = load(source)
        after, restored = load(tmp_path / "out")
        assert_same_bits(weights, restored)
        assert after.spec == before.spec
        with open_model(resolve(str(source))) as there, open_model(resolve(str(tmp_path / "out"))) as here:
            text = "It was the best of times"
            assert tokenizer_of(here).encode(text) == tokenizer_of(there).encode(text)
            assert here.generation_defaults == there.generation_defaults
        with pytest.raises(UnsupportedModelError, match="source_kind"):
            export_gguf(ModelConfig(model=str(tmp_path / "out")), tmp_path / "back.gguf")

    @pytest.mark.parametrize("quantization", [None, "int4", "fp8"])
    @pytest.mark.usefixtures("any_tokenizer")
    def test_of_experts_quantized_on_the_way(self, tmp_path: Path, quantization: str | None) -> None:
        TinyModel(**EXPERTS).write(tmp_path / "m.gguf")
        config = ModelConfig(model=str(tmp_path / "m.gguf"), quantization=quantization)
        convert_model(config, tmp_path / "out")
        before, weights = load(tmp_path / "m.gguf", quantization=quantization)
        after, restored = load(tmp_path / "out")
        assert_same_bits(weights, restored)
        assert after.spec == before.spec
        assert after.spec.experts is not None
        assert read_manifest(tmp_path / "out").quantization == quantization

    @pytest.mark.parametrize("layout", ["rows", "planar", "tiles"])
    @pytest.mark.parametrize("mix", MIXES)
    @pytest.mark.usefixtures("any_tokenizer")
    def test_become_the_files_values_again(self, tmp_path: Path, mix: str, layout: str) -> None:
        exact = TinyModel(types=MIXES[mix]).write(tmp_path / "m.gguf")
        config = ModelConfig(model=str(tmp_path / "m.gguf"), weight_layout=layout)
        convert_model(config, tmp_path / "out")
        export_gguf(ModelConfig(model=str(tmp_path / "out")), tmp_path / "back.gguf")
        back = gguf.GGUFReader(tmp_path / "back.gguf")
        assert {tensor.name for tensor in back.tensors} == set(exact)
        for tensor in back.tensors:
            assert tensor.tensor_type == Q.F32
            np.testing.assert_array_equal(tensor.data, exact[tensor.name])

    @pytest.mark.usefixtures("any_tokenizer")
    def test_of_experts_become_the_files_values_again(self, tmp_path: Path) -> None:
        exact = TinyModel(**EXPERTS).write(tmp_path / "m.gguf")
        convert_model(ModelConfig(model=str(tmp_path / "m.gguf")), tmp_path / "out")
        export_gguf(ModelConfig(model=str(tmp_path / "out")), tmp_path / "back.gguf")
        for tensor in gguf.GGUFReader(tmp_path / "back.gguf").tensors:
            np.testing.assert_array_equal(tensor.data, exact[tensor.name])

    @pytest.mark.usefixtures("any_tokenizer")
    def test_rotary_frequencies_of_their_own_stay(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def positive(shape: tuple[int, ...], kind: Q, rng: np.random.Generator) -> np.ndarray:
            return np.abs(rng.standard_normal(shape)).astype(np.float32) + 1

        monkeypatch.setattr("tests.loading.conftest.random_rows", positive)
        TinyModel(types=lambda _: Q.F32, tensors={"rope_freqs.weight": (32,)}).write(tmp_path / "m.gguf")
        convert_model(ModelConfig(model=str(tmp_path / "m.gguf")), tmp_path / "out")
        export_gguf(ModelConfig(model=str(tmp_path / "out")), tmp_path / "back.gguf")
        specs = [load(tmp_path / name)[0].spec for name in ("m.gguf", "out", "back.gguf")]
        assert specs[0].rope == specs[1].rope == specs[2].rope
        assert min(specs[0].rope.frequencies) > 0

    def test_go_to_the_devices_that_they_are_meant_for(self, converted: Path, tmp_path: Path) -> None:
        convert_model(ModelConfig(model=str(converted / "tiny.gguf"), weight_layout="rows"), tmp_path / "rows")
        command = [sys.executable, "-m", "tests.loading.orbax.restore_sharded", str(tmp_path / "rows")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "layers.gate_up.codes: 4 shards of (2, 64, 2, 32)" in done.stdout


class TestAnEngine:
    def test_answers_as_from_the_file_it_was_made_of(self, converted: Path, tmp_path: Path) -> None:
        settings = tmp_path / "engine.toml"
        settings.write_text(SMALL_ENGINE)
        export_gguf(ModelConfig(model=str(converted / "tiny")), converted / "back.gguf")
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=5)
        prompts = ["the cat sat in the hat", "on a mat"]
        answers = []
        for model in ("tiny.gguf", "tiny", "back.gguf"):
            exact = {"cpu_precision": "exact"} if library() else {}  # the dense file's products are not rounded
            llm = LLM.from_config(EngineConfig.from_toml(settings, {"model": str(converted / model), **exact}))
            outputs = llm.generate(prompts, params, use_tqdm=False)
            answers.append(
                [(out.outputs[0].text, out.outputs[0].token_ids, out.outputs[0].logprobs) for out in outputs]
            )
            assert ("restore" in llm.startup.phases) == (model == "tiny")
            llm.shutdown()
        assert answers[0] == answers[1]
        for (text, ids, logprobs), (back_text, back_ids, back_logprobs) in zip(answers[0], answers[2], strict=True):
            assert (text, ids) == (back_text, back_ids)
            for step, back_step in zip(logprobs, back_logprobs, strict=True):
                there = {token: entry.logprob for token, entry in step.items()}
                back = {token: entry.logprob for token, entry in back_step.items()}
                assert back == pytest.approx(there, abs=1e-4)  # the same values, summed in another order


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "field", "command"),
        [
            ({"weight_layout": "planar"}, "weight_layout", "--weight-layout planar"),
            ({"quantization": "int4"}, "quantization", "--quantization int4"),
        ],
    )
    def test_that_the_folder_was_not_made_for_name_the_command_that_makes_one(
        self, converted: Path, settings: dict[str, Any], field: str, command: str
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            load(converted / "tiny", **settings)
        assert caught.value.field == field
        assert f"`atoma-jax convert {converted / 'tiny.gguf'} OUT {command}`" in str(caught.value)

    def test_tiles_need_native_kernels(self, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if not ops.has_native_kernels():
            pytest.skip("the native kernels are not built, or do not fit; the log says why")
        convert_model(ModelConfig(model=str(converted / "tiny.gguf")), tmp_path / "tiles")
        setup, _ = load(tmp_path / "tiles")
        assert (setup.backend.weight_layout, setup.backend.kernels) == ("tiles", "native")
        with pytest.raises(ConfigError, match=r"written in layout tiles"):
            load(tmp_path / "tiles", kernels="xla")
        monkeypatch.setattr(model_setup, "has_native_kernels", lambda: False)
        with pytest.raises(ConfigError, match=r"written in layout tiles.*--weight-layout rows"):
            load(tmp_path / "tiles")

    def test_a_cpu_runs_both_layouts(self, converted: Path, tmp_path: Path) -> None:
        convert_model(ModelConfig(model=str(converted / "tiny.gguf"), weight_layout="planar"), tmp_path / "planar")
        setup, _ = load(tmp_path / "planar")
        assert (setup.backend.weight_layout, setup.backend.kernels) == ("planar", "xla")
        with pytest.raises(ConfigError, match="written in layout planar"):
            load(tmp_path / "planar", weight_layout="rows")

    def test_a_gpu_wants_its_own_layout(self, converted: Path, tmp_path: Path) -> None:
        convert_model(ModelConfig(model=str(converted / "tiny.gguf"), weight_layout="rows"), tmp_path / "rows")
        model = OrbaxModel.open(tmp_path / "rows")
        gpu = Backend(platform="cuda", operands="bfloat16", weight_layout="planar")
        with pytest.raises(ConfigError, match="--weight-layout planar"):
            model.backend(ModelConfig(model="m"), gpu)
        rows = Backend(platform="cuda", operands="bfloat16", weight_layout="rows")
        assert model.backend(ModelConfig(model="m", weight_layout="rows"), rows) == rows

    def test_dense_weights_that_were_narrowed_are_for_what_they_were_narrowed_for(self, dense: Path) -> None:
        edit(dense, lambda values: values["forms"]["embed"].update(dtype="bfloat16"))
        edit(dense, lambda values: values.update(operands="bfloat16"))
        model = OrbaxModel.open(dense)
        gpu = Backend(platform="cuda", operands="float32", weight_layout="rows")
        with pytest.raises(ConfigError, match="--dtype float32"):
            model.backend(ModelConfig(model="m", dtype="float32", weight_layout="rows"), gpu)
        assert model.backend(ModelConfig(model="m", weight_layout="rows"), gpu).operands == "bfloat16"
        with pytest.raises(ConfigError, match=r"stored narrower.*--dtype float32"):
            load(dense)

    def test_dense_weights_that_native_kernels_keep_narrow_are_for_them(self, dense: Path) -> None:
        edit(dense, lambda values: values["forms"]["embed"].update(dtype="float16"))
        edit(dense, lambda values: values.update(layout="tiles"))
        model = OrbaxModel.open(dense)
        native = Backend(platform="cpu", operands="float32", weight_layout="tiles", kernels="native")
        assert model.backend(ModelConfig(model="m"), native) == native
        with pytest.raises(ConfigError, match=r"stored narrower.*--weight-layout rows"):
            model.backend(ModelConfig(model="m"), Backend(platform="cpu", operands="float32", weight_layout="rows"))

    @pytest.mark.usefixtures("any_tokenizer")
    def test_frequencies_for_another_context_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        scaling = {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 64}
        monkeypatch.setattr(
            "tests.loading.conftest.random_rows",
            lambda shape, kind, rng: np.abs(rng.normal(2, 0.1, shape)).astype("f4"),
        )
        factors = {"rope_factors_long.weight": (32,), "rope_factors_short.weight": (32,)}
        TinyModel(types=lambda _: Q.F32, metadata=scaling, tensors=factors).write(tmp_path / "m.gguf")
        convert_model(ModelConfig(model=str(tmp_path / "m.gguf"), max_model_len=64), tmp_path / "short")
        assert (
            load(tmp_path / "short", max_model_len=64)[0].spec.rope
            == load(tmp_path / "m.gguf", max_model_len=64)[0].spec.rope
        )
        with pytest.raises(ConfigError, match="must be 64") as caught:
            load(tmp_path / "short")
        assert (caught.value.field, caught.value.value) == ("max_model_len", 128)

    @pytest.mark.parametrize("threads", [0, 257])
    def test_threads_have_limits(self, converted: Path, tmp_path: Path, threads: int) -> None:
        with pytest.raises(ConfigError, match="threads"):
            convert_model(ModelConfig(model=str(converted / "tiny.gguf")), tmp_path / "out", threads=threads)


class TestTheWayBack:
    def test_starts_from_a_converted_folder(self, converted: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="must be a folder of"):
            export_gguf(ModelConfig(model=str(converted / "tiny.gguf")), tmp_path / "back.gguf")
        with pytest.raises(ConfigError, match="was converted already"):
            convert_model(ModelConfig(model=str(converted / "tiny")), tmp_path / "twice")
        assert not list(tmp_path.iterdir())

    def test_int8_activations_have_none(self, copied: Path, tmp_path: Path) -> None:
        edit(copied, lambda values: values.update(quantization="w8a8"))
        with pytest.raises(UnsupportedModelError, match="no GGUF equivalent"):
            export_gguf(ModelConfig(model=str(copied)), tmp_path / "back.gguf")

    def test_a_file_that_is_there_stays(self, converted: Path, tmp_path: Path) -> None:
        (tmp_path / "back.gguf").write_text("mine")
        with pytest.raises(ConfigError, match="--force"):
            export_gguf(ModelConfig(model=str(converted / "tiny")), tmp_path / "back.gguf")
        assert (tmp_path / "back.gguf").read_text() == "mine"


class TestWhereItIsWritten:
    def test_a_folder_that_is_there_stays_unless_forced(self, converted: Path, tmp_path: Path) -> None:
        config = ModelConfig(model=str(converted / "tiny.gguf"))
        convert_model(config, tmp_path / "out")
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ConfigError, match="exists"):
            convert_model(config, tmp_path / "out")
        assert sorted(tmp_path.rglob("*")) == before
        convert_model(config, tmp_path / "out", force=True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        load(tmp_path / "out")

    def test_force_replaces_nothing_but_conversions(self, converted: Path, tmp_path: Path) -> None:
        (tmp_path / "papers").mkdir()
        (tmp_path / "papers" / "mine").touch()
        with pytest.raises(ConfigError, match="replaces nothing else"):
            convert_model(ModelConfig(model=str(converted / "tiny.gguf")), tmp_path / "papers", force=True)
        assert (tmp_path / "papers" / "mine").exists()

    @pytest.mark.parametrize("where", ["save", "_write_metadata", "_write_synced"])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
    def test_an_interrupted_conversion_leaves_nothing(
        self, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Any
    ) -> None:
        def fail(path: Path, *_: Any) -> None:
            path.mkdir()
            (path / "half").write_text("written")
            raise error

        def fail_on_second(*arguments: Any) -> None:
            fail(arguments[-1])

        home = "atoma_jax.loading.orbax.weights.save" if where == "save" else f"atoma_jax.engine.convert.{where}"
        monkeypatch.setattr(home, fail_on_second if where == "_write_metadata" else fail)
        with pytest.raises((KeyboardInterrupt, UserError)):
            convert_model(ModelConfig(model=str(converted / "tiny.gguf")), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("damage", ["read back", "on disk"])
    def test_what_does_not_restore_never_appears(
        self, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
    ) -> None:
        if damage == "read back":  # files that are as they were written, and hold something else
            true_sums = orbax_weights.sums_of
            calls: list[int] = []

            def sums_of(values: Any) -> dict[str, int]:
                calls.append(1)
                return {name: value + len(calls) for name, value in true_sums(values).items()}

            monkeypatch.setattr(orbax_weights, "sums_of", sums_of)
        else:
            true_write = convert._write_synced

            def write(path: Path, content: bytes) -> None:
                true_write(path, content)
                file = some_file(path.parent)
                damaged = bytearray(file.read_bytes())
                damaged[-1] ^= 1  # never what it was
                file.write_bytes(damaged)

            monkeypatch.setattr(convert, "_write_synced", write)
        with pytest.raises(UserError, match=r"other values of|CRC-32"):
            convert_model(ModelConfig(model=str(converted / "tiny.gguf")), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_without_its_last_file_is_no_model(self, copied: Path) -> None:
        (copied / "model.json").unlink()
        with pytest.raises(WeightFileError):  # what is left names a GGUF file without tensors
            load(copied)
