"""`ModelSpec`: the shape of a decoder, as every reader of model files fills it and every model is built from it."""

from dataclasses import dataclass
from typing import Literal

Family = Literal["llama", "gemma", "mixture"]
KVDtype = Literal["float32", "bfloat16", "float16", "fp8_e4m3", "int8"]
Activation = Literal["silu", "gelu_tanh", "relu_squared"]

_KV_BYTES: dict[KVDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8_e4m3": 1, "int8": 1}  # of a value
_SCALE_BYTES = 4  # of the scale that the types of one byte keep for each token and kv head


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary positions, scaling included: the angle of pair i at position p is p · frequencies[i].

    Half as many frequencies as a head has dimensions, or fewer: the dimensions behind the rotated ones stay.
    """

    frequencies: tuple[float, ...]  # radians a position
    local_frequencies: tuple[float, ...] | None = None  # of layers with a window; None: as the others
    magnitude: float = 1.0  # factor of cosines and sines; not of the layers that have frequencies of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSpec:
    """A mixture of experts in place of each feed-forward net."""

    count: int  # E
    used: int  # experts a token goes to, k
    ffn_dim: int  # of one expert
    normalized: bool  # the weights of a token's experts are made to add up to 1
    shared_ffn_dim: int = 0  # of the expert that every token goes to, behind a gate; 0: there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Dimensions and switches of one decoder. Per-layer settings are tuples of L entries."""

    architecture: str  # as the file calls it
    family: Family  # the module that implements it, see models/registry.py
    vocab_size: int  # V
    dim: int  # D
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    ffn_dim: int  # F; of a mixture, that of one expert
    context_length: int  # tokens the model was trained for
    norm_eps: float
    rope: RopeSpec
    windows: tuple[int | None, ...] = ()  # tokens each layer looks back; None: all of them
    attention_scale: float  # factor of the logits
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embedding_scale: float = 1.0
    activation: Activation = "silu"
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sub_norms: bool = False  # BitNet's, in front of the output and down projections
    int8_activations: bool = False  # inputs of all projections but the head are rounded to int8 for each token
    experts: ExpertSpec | None = None

    def kv_bytes_per_token(self, kv_dtype: KVDtype) -> int:
        """Bytes of K and V that one token takes in all layers, scales included."""
        value = _KV_BYTES[kv_dtype]
        vector = self.head_dim * value + (_SCALE_BYTES if value == 1 else 0)
        return 2 * self.num_layers * self.num_kv_heads * vector
