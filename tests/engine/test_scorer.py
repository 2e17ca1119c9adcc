"""Two models over a text: their scores against a forward pass in float64 numpy, and against float64 sums of given rows.

The reference reads the file with the `gguf` package and shares no code with the engine.
"""

import copy
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from atoma_jax import EngineConfig, ModelPair, Scorer, UserError
from atoma_jax.engine import scorer as module
from atoma_jax.engine.scorer import CHUNK, compare_rows
from atoma_jax.errors import ConfigError
from tests.tiny_model import write_tiny_llama

LENGTH = 200  # two chunks, the second one part full
H = 16  # head dim of the tiny model


def load(path: Path, **options: Any) -> Scorer:
    return Scorer.load(EngineConfig.from_options({"model": str(path), "dtype": "float32", **options}))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in F32 and in Q8_0, and other weights."""
    folder = tmp_path_factory.mktemp("pair")
    types = gguf.GGMLQuantizationType
    models = {"f32": (types.F32, 0), "q8_0": (types.Q8_0, 0), "other": (types.F32, 1)}
    return {
        name: write_tiny_llama(folder / f"{name}.gguf", kind=kind, seed=seed, embedding_scale=0.35)
        for name, (kind, seed) in models.items()
    }


@pytest.fixture(scope="module")
def scorers(paths: dict[str, Path]) -> dict[str, Scorer]:
    return {name: load(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return np.random.default_rng(3).integers(3, 260, LENGTH).tolist()


@pytest.fixture(scope="module")
def by_hand(paths: dict[str, Path], ids: list[int]) -> dict[str, np.ndarray]:
    """Log-probabilities of the next token in float64, `[T, V]`."""
    return {name: log_softmax(forward(path, ids)) for name, path in paths.items()}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def forward(path: Path, ids: list[int]) -> np.ndarray:
    """The llama of the tiny file over a whole sequence, without cache, chunks or pages."""
    tensors = {
        tensor.name.removesuffix(".weight"): gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        for tensor in gguf.GGUFReader(path).tensors
    }

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * tensors[name]

    angles = np.arange(len(ids))[:, None] * 10_000.0 ** (-np.arange(0, H, 2) / H)  # [T, H/2]
    turns = np.exp(1j * angles)[:, None]

    def heads(x: np.ndarray, *, rotated: bool) -> np.ndarray:
        x = x.reshape(len(ids), -1, H)
        if rotated:  # neighbours are the two parts of a complex number
            turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turns
            x = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
        return x

    x = tensors["token_embd"][ids]
    for layer in range(2):
        block = {name: tensors[f"blk.{layer}.{name}"] for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        h = norm(x, f"blk.{layer}.attn_norm")
        q, k = (heads(h @ block[name].T, rotated=True) for name in ("attn_q", "attn_k"))
        v = heads(h @ block["attn_v"].T, rotated=False)
        k, v = (np.repeat(part, q.shape[1] // k.shape[1], axis=1) for part in (k, v))
        logits = np.einsum("tnh,snh->nts", q, k) / np.sqrt(H)
        logits[:, ~np.tri(len(ids), dtype=bool)] = -np.inf
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        out = np.einsum("nts,snh->tnh", weights / weights.sum(axis=-1, keepdims=True), v)
        x = x + out.reshape(len(ids), -1) @ block["attn_output"].T
        h = norm(x, f"blk.{layer}.ffn_norm")
        gate, up = (h @ tensors[f"blk.{layer}.ffn_{name}"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ tensors[f"blk.{layer}.ffn_down"].T
    return norm(x, "output_norm") @ tensors["token_embd"].T


def divergence(base: np.ndarray, model: np.ndarray) -> np.ndarray:
    return (np.exp(base) * (base - model)).sum(axis=1)


NAMES = ("base_nll", "nll", "kld", "same_top")


def all_of(pair: ModelPair, ids: list[int], *, first: int = 1, context: int = LENGTH) -> dict[str, np.ndarray]:
    told: list[int] = []
    [found] = pair.compare([(ids, first)], context=context, rows=1, on_tokens=told.append)
    assert sum(told) == len(found.nll)
    return {name: getattr(found, name) for name in NAMES}


@pytest.mark.parametrize("name", ["f32", "q8_0"])
def test_distributions_are_those_of_a_forward_pass_in_float64(
    name: str, scorers: dict[str, Scorer], ids: list[int], by_hand: dict[str, np.ndarray]
) -> None:
    chunks = list(scorers[name].logprobs([ids], context=LENGTH))
    assert [chunk.shape for chunk in chunks] == [(CHUNK, scorers[name].vocab_size)] * 2
    np.testing.assert_allclose(np.concatenate(chunks)[:LENGTH], by_hand[name], rtol=0, atol=2e-4)


@pytest.mark.parametrize("model", ["q8_0", "other"])
def test_a_pair_is_scored_as_in_float64(
    model: str, scorers: dict[str, Scorer], ids: list[int], by_hand: dict[str, np.ndarray]
) -> None:
    found = all_of(ModelPair(scorers["f32"], scorers[model]), ids)
    p, q = by_hand["f32"][:-1], by_hand[model][:-1]
    at = np.arange(LENGTH - 1), ids[1:]
    np.testing.assert_allclose(found["base_nll"], -p[at], rtol=0, atol=2e-4)
    np.testing.assert_allclose(found["nll"], -q[at], rtol=0, atol=2e-4)
    np.testing.assert_allclose(found["kld"], divergence(p, q), rtol=2e-3, atol=1e-6)
    np.testing.assert_array_equal(found["same_top"], p.argmax(axis=1) == q.argmax(axis=1))
    assert found["same_top"].mean() > 0.8 if model == "q8_0" else found["same_top"].mean() < 0.5
    assert found["kld"].mean() > (1e-4 if model == "q8_0" else 1)


def test_a_model_is_no_distance_from_itself(paths: dict[str, Path], ids: list[int]) -> None:
    found = all_of(ModelPair(load(paths["q8_0"]), load(paths["q8_0"])), ids)
    assert not found["kld"].any()
    assert found["same_top"].all()
    np.testing.assert_array_equal(found["nll"], found["base_nll"])


@pytest.mark.parametrize("first", [1, 100, CHUNK, CHUNK + 1, LENGTH - 1])
def test_scores_begin_where_they_are_asked_to_and_do_not_depend_on_it(
    first: int, scorers: dict[str, Scorer], ids: list[int]
) -> None:
    pair = ModelPair(scorers["f32"], scorers["q8_0"])
    part, whole = all_of(pair, ids, first=first), all_of(pair, ids)
    for name in whole:
        np.testing.assert_array_equal(part[name], whole[name][first - 1 :])


def test_windows_together_score_as_alone(scorers: dict[str, Scorer], ids: list[int]) -> None:
    pair = ModelPair(scorers["f32"], scorers["q8_0"])
    windows = [(ids, 1), (ids[20:150], 70), (ids[5:], CHUNK + 3)]
    told: list[int] = []
    together = pair.compare(windows, context=LENGTH, rows=4, on_tokens=told.append)
    assert sum(told) == sum(len(window) - first for window, first in windows)
    for (window, first), found in zip(windows, together, strict=True):
        alone = all_of(pair, window, first=first)
        for name in NAMES[:3]:  # the same sums, cut otherwise by the matrix products of another shape
            np.testing.assert_allclose(getattr(found, name), alone[name], rtol=0, atol=2e-5, err_msg=name)
        np.testing.assert_array_equal(found.same_top, alone["same_top"])


def test_fewer_windows_go_together_where_memory_is_short(
    scorers: dict[str, Scorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = ModelPair(scorers["f32"], scorers["q8_0"])
    assert pair.windows_at_once(LENGTH) == module.MOST_ROWS
    distributions = 4 * 4 * CHUNK * pair.base.vocab_size
    kv = 2 * 256 * 2 * 2 * 2 * H * 4  # both models: padded context, K and V, layers, kv heads, head dim, float32
    monkeypatch.setattr(module, "ROW_BYTES", 3 * (distributions + kv))
    assert pair.windows_at_once(LENGTH) == 3
    monkeypatch.setattr(module, "ROW_BYTES", 3 * (distributions + kv) - 1)
    assert pair.windows_at_once(LENGTH) == 2
    monkeypatch.setattr(module, "ROW_BYTES", 1)
    assert pair.windows_at_once(LENGTH) == 1


def test_room_that_is_not_used_changes_nothing(scorers: dict[str, Scorer], ids: list[int]) -> None:
    pair = ModelPair(scorers["f32"], scorers["other"])  # two models of one program
    tight, roomy = (all_of(pair, ids[:50], context=context)["kld"] for context in (50, LENGTH))
    np.testing.assert_array_equal(tight, roomy)


@pytest.mark.parametrize("noise", [1e-3, 0.1, 3.0, 60.0])
def test_rows_are_reduced_as_in_float64_however_near_they_are(noise: float) -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 4, (CHUNK, 5000)).astype(np.float32)
    model = base + rng.normal(0, noise, base.shape).astype(np.float32)
    targets = rng.integers(0, 5000, CHUNK).astype(np.int32)
    p, q = log_softmax(base), log_softmax(model)
    base_nll, nll, kld, same_top = np.asarray(
        compare_rows(jnp.asarray(p.astype(np.float32)), jnp.asarray(q.astype(np.float32)), targets[None])
    )
    np.testing.assert_allclose(kld, divergence(p, q), rtol=2e-3)
    np.testing.assert_allclose(base_nll, -p[np.arange(CHUNK), targets], rtol=1e-6)
    np.testing.assert_allclose(nll, -q[np.arange(CHUNK), targets], rtol=1e-6)
    np.testing.assert_array_equal(same_top, p.argmax(axis=1) == q.argmax(axis=1))
    assert kld.min() > 0


def test_what_one_model_holds_impossible() -> None:
    base = np.full((CHUNK, 4), np.log(0.25), np.float32)
    model = base.copy()
    model[0] = [np.log(0.5), np.log(0.5), -np.inf, -np.inf]
    base[1] = [np.log(0.5), np.log(0.5), -np.inf, -np.inf]
    base[2, :], model[3, :] = np.nan, np.nan
    base[4] = model[4] = [0, -np.inf, -np.inf, -np.inf]
    targets = np.full(CHUNK, 2, np.int32)
    base_nll, nll, kld, same_top = np.asarray(compare_rows(jnp.asarray(base), jnp.asarray(model), targets[None]))
    assert (kld[0], nll[0]) == (np.inf, np.inf)
    assert kld[1] == pytest.approx(np.log(2))
    assert base_nll[1] == np.inf
    assert np.isnan(kld[2:4]).all()
    assert not same_top[2:4].any()
    assert np.isnan([base_nll[2], nll[3]]).all()
    assert kld[4] == 0


def test_a_nan_in_a_models_weights_is_a_nan_in_its_scores(
    paths: dict[str, Path], ids: list[int], tmp_path: Path
) -> None:
    raw = bytearray(paths["f32"].read_bytes())
    norm = next(tensor for tensor in gguf.GGUFReader(paths["f32"]).tensors if tensor.name == "output_norm.weight")
    raw[norm.data_offset : norm.data_offset + 4] = np.float32(np.nan).tobytes()
    damaged = tmp_path / "nan.gguf"
    damaged.write_bytes(raw)
    found = all_of(ModelPair(load(paths["f32"]), load(damaged)), ids[:20])
    assert np.isnan(found["kld"]).all()
    assert np.isnan(found["nll"]).all()
    assert np.isfinite(found["base_nll"]).all()
    assert not found["same_top"].any()


def test_vocabularies_of_two_sizes_are_refused(scorers: dict[str, Scorer]) -> None:
    other = copy.copy(scorers["q8_0"])
    other.vocab_size, other.model = 32000, "other"
    with pytest.raises(
        UserError, match=r"base: must have the vocabulary of the model: 269 tokens, and other has 32000"
    ):
        ModelPair(scorers["f32"], other)


def test_a_length_beyond_the_model_is_refused_before_weights_are_read(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atoma_jax.engine.model_setup.load_weights", lambda *_, **__: pytest.fail("it went on"))
    with pytest.raises(
        ConfigError, match=r"max_model_len: must be at most 256, what f32.gguf was trained for, got 257"
    ):
        load(paths["f32"], max_model_len=257)


@pytest.mark.parametrize("options", [{"quantization": "int4"}, {"kv_cache_dtype": "int8"}])
def test_what_is_done_to_a_model_while_it_loads_or_runs_shows(
    options: dict[str, str], paths: dict[str, Path], scorers: dict[str, Scorer], ids: list[int]
) -> None:
    found = all_of(ModelPair(scorers["f32"], load(paths["f32"], **options)), ids[:60])
    assert 1e-7 < found["kld"].mean() < 1
