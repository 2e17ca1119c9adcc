"""Where a model runs, and whose kernels: what every choice of this package is made by."""

from dataclasses import dataclass
from typing import Literal

from atoma_jax.model_spec import KVDtype
from atoma_jax.native import library as native_library
from atoma_jax.quant.qtensor import Layout
from sharding.collectives import size_of
from sharding.mesh import MeshShape

Platform = Literal["cpu", "cuda"]
Kernels = Literal["xla", "pallas", "interpret", "native"]
Precision = Literal["default", "high", "exact"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Where and in which arithmetic a model runs. Part of every program's key."""

    platform: Platform
    operands: Literal["float32", "bfloat16"]  # of products with quantized weights; sums are float32
    weight_layout: Layout  # of quantized weights
    kernels: Kernels = "xla"  # interpret: the Pallas kernels without a GPU, step by step; for tests
    precision: Precision = "default"  # of activations in native products: int8, two int8 planes, float32; see `config`
    device: str = ""  # its kind, as JAX calls it, for sizes that were measured there; empty: not known
    mesh: MeshShape | None = None  # that a step's arrays are cut over; None: one device
    whole_heads: bool = False  # each device of `tensor` has all heads, as they do not divide

    @property
    def uses_pallas(self) -> bool:
        """Whether Pallas kernels run, compiled or interpreted."""
        return self.kernels in ("pallas", "interpret")

    @property
    def draws_natively(self) -> bool:
        """Whether native kernels draw tokens and compute logprobs, of a vocabulary that is whole."""
        return self.kernels == "native"

    @property
    def kv_dtype(self) -> KVDtype:
        """The type of a KV cache for which none is asked: as narrow as changes results less than products do, which
        round their inputs to int8 in native kernels and to bfloat16 on a GPU."""
        if self.platform != "cpu":
            return "bfloat16"
        if self.kernels != "native" or self.precision != "default":
            return "float32"
        library = native_library.library()
        return "float16" if library is not None and library.converts_halves else "float32"

    @property
    def multiplies_alone(self) -> bool:
        """Whether each device makes products by itself: of the tokens that it has, with weights that it has whole."""
        return size_of(self.mesh, "tensor", "fsdp") == 1

    @property
    def gathers(self) -> bool:
        """Whether weights are spread over devices that gather them before use."""
        return size_of(self.mesh, "fsdp") > 1


def has_native_kernels() -> bool:
    """Whether this process can run them; the log says once why not."""
    return native_library.library() is not None
