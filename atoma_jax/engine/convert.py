"""`atoma-jax convert`: writes a model's weights as they lie on this platform's devices, to be restored so.

Owns what the folder is made of and that it appears whole or not at all. Its parts are `loading`'s: `orbax/manifest.py`,
`orbax/weights.py`, `gguf/writer.py`.
"""

import os
import secrets
import shutil
import time
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
import numpy as np

from atoma_jax.config import ModelConfig
from atoma_jax.engine.model_setup import ModelSetup, set_up_model
from atoma_jax.engine.model_tokenizer import tokenizer_of
from atoma_jax.engine.progress import loading_bar
from atoma_jax.errors import ConfigError, UserError, WeightFileError
from atoma_jax.loading.fetch.hub import ResolvedModel, resolve
from atoma_jax.loading.gguf.file import GGUFFile, encoded_metadata, first_shard
from atoma_jax.loading.gguf.names import SPARE
from atoma_jax.loading.gguf.writer import GGUFWriter, TensorEntry
from atoma_jax.loading.model_files import open_model
from atoma_jax.loading.orbax import weights as orbax_weights
from atoma_jax.loading.orbax.checkpoint import GGUF_METADATA, WEIGHTS, OrbaxModel
from atoma_jax.loading.orbax.manifest import FILE_NAME, Manifest, StoredFile, stored_form
from atoma_jax.loading.threads import checked_threads
from atoma_jax.loading.weight_forms import form_of

FOLDER_FILES = (  # of a folder in HF layout: its tokenizer, its sampling defaults, where the model's shape came from
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "generation_config.json", "config.json"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What was written.

    Attributes:
        path: the folder or file.
        kind: what can read it: this engine, or whatever reads GGUF.
        layout: of quantized weights in it.
        operands: of products, that dense weights were narrowed to where this platform gains from it.
        source_bytes: of all tensors in the model's files.
        weight_bytes: of all weights that were written.
        file_bytes: of all that was written.
        seconds: that each part took. "read": from the source's header to weights on the device; "write"; and of a
            folder "restore": from its `model.json` to the same weights on the device again.
    """

    path: Path
    kind: str
    layout: str
    operands: str
    source_bytes: int
    weight_bytes: int
    file_bytes: int
    seconds: dict[str, float]


def convert_model(
    config: ModelConfig, out: Path, *, force: bool = False, threads: int | None = None, progress: bool = True
) -> Conversion:
    """Writes a folder that `LLM` takes as a model and that restores without any decoding.

    Restores it once before it appears: a folder that holds anything else than the weights is an error here, not later.
    The device holds the weights once at a time.

    Args:
        config: which model, and how its weights are to lie: dtype, weight_layout, quantization, max_model_len.
        out: the folder; its parent must exist.
        force: replace a folder that an earlier conversion left there.
        threads: that decode; None: one a core.
        progress: show bars on standard error, where that is a terminal, for what is fetched and loaded.

    Raises:
        UserError: the model or a setting cannot be used, or the folder cannot be written; see the subclasses.
        DownloadError: the model could not be fetched.
    """
    threads = checked_threads(threads)
    check_target(out, force=force)
    found = resolve(config.model, revision=config.revision, progress=progress)
    begin = time.perf_counter()
    with open_model(found, max_model_len=config.max_model_len) as files:
        if isinstance(files, OrbaxModel):
            problem = f"was converted already, from {files.manifest.source}: convert that one, or add --to gguf"
            raise ConfigError("model", config.model, problem)
        setup = set_up_model(config, files)
        header = time.perf_counter() - begin
        tokenizer_of(files)  # a folder without one would be of no use
        begin = time.perf_counter()
        weights = jax.block_until_ready(setup.load_values(threads=threads, progress=progress))
        loaded = time.perf_counter()
        with _new_folder(out, force=force) as folder:
            sums = orbax_weights.sums_of(weights)
            orbax_weights.save(folder / WEIGHTS, weights)
            del weights  # what is restored takes their place
            if found.kind == "gguf":
                _write_metadata(found.path, folder / GGUF_METADATA)
            else:
                _copy_files(found.path, folder)
            manifest = _manifest(config, found, setup, folder / WEIGHTS, threads)
            # Last: a folder without it is no model.
            _write_synced(folder / FILE_NAME, manifest.encode())
            written = time.perf_counter()
            restored = _restore(folder, setup, sums, out, threads=threads, progress=progress)
            file_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Conversion(
        path=out,
        kind="orbax",
        layout=manifest.layout,
        operands=manifest.operands,
        source_bytes=manifest.source_bytes,
        weight_bytes=setup.weight_bytes,
        file_bytes=file_bytes,
        seconds={"read": header + loaded - begin, "write": written - loaded, "restore": restored},
    )


def _restore(
    folder: Path, setup: ModelSetup, sums: Mapping[str, int], out: Path, *, threads: int, progress: bool
) -> float:
    """Restores what was written, as a start would, and holds it to the sums of what it was written from.

    Returns:
        Seconds from the folder to the weights on the device.

    Raises:
        UserError: they are not the weights that were written; WeightFileError, which is one, where none come back.
    """
    begin = time.perf_counter()
    model = OrbaxModel.open(folder)
    model.abstract(setup.wanted)
    with loading_bar(setup.weight_bytes, "restoring", shown=progress) as on_bytes:
        weights = jax.block_until_ready(model.load(threads=threads, on_bytes=on_bytes))
    seconds = time.perf_counter() - begin
    differ = [name for name, value in orbax_weights.sums_of(weights).items() if value != sums[name]]
    if differ:
        problem = f"gave back other values of {differ[0]} than were written: a fault of disk or memory; try another one"
        raise UserError("out", str(out), problem)
    return seconds


def check_target(out: Path, *, force: bool) -> None:
    """Refuses a place before anything is read. Only a folder that a conversion left may be replaced."""
    if not out.absolute().parent.is_dir():
        raise ConfigError("out", str(out), "needs a folder around it that exists; make it first")
    if not os.path.lexists(out):
        return
    if not force:
        raise ConfigError("out", str(out), "exists; name another folder, or replace it with --force")
    if out.is_symlink() or not (out / FILE_NAME).is_file() or not (out / WEIGHTS).is_dir():
        raise ConfigError("out", str(out), "is no folder of `atoma-jax convert`: --force replaces nothing else")


@contextmanager
def _new_folder(out: Path, *, force: bool) -> Generator[Path]:
    """A folder that is moved to `out` when all went well, and removed with all that is in it otherwise."""
    beside = out.absolute()
    folder = beside.with_name(f".{beside.name}.{secrets.token_hex(4)}.part")
    try:
        folder.mkdir()
        yield folder
        check_target(out, force=force)  # somebody may have put something there meanwhile
        if os.path.lexists(out):
            old = folder.with_suffix(".old")
            beside.rename(old)
            try:
                folder.rename(beside)
            except OSError:
                old.rename(beside)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            folder.rename(beside)
    except OSError as error:
        raise UserError(
            "out", str(out), f"cannot be written ({error.strerror or error}); choose another place"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone, where all went well


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _manifest(config: ModelConfig, found: ResolvedModel, setup: ModelSetup, weights: Path, threads: int) -> Manifest:
    checkpoint = setup.checkpoint
    assert not isinstance(checkpoint, OrbaxModel)
    names = sorted(str(path.relative_to(weights)) for path in weights.rglob("*") if path.is_file())
    with ThreadPoolExecutor(threads) as pool:
        sums = orbax_weights.checksums(weights, names, pool)
    is_gguf = found.kind == "gguf"
    return Manifest(
        engine=_version(),
        source=config.model,
        source_kind="gguf" if is_gguf else "folder",
        source_bytes=sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
        quantization=config.quantization,
        spec=setup.spec,
        rope_tokens=_rope_tokens(config, found, setup),
        layout=setup.backend.weight_layout,
        operands=setup.backend.operands,
        forms={
            path: stored_form(form_of(checkpoint, setup.sources[path], want, setup.backend))
            for path, want in setup.wanted.items()
        },
        tensors={name: tensor.shape for name, tensor in checkpoint.tensors.items()} if is_gguf else {},
        files={name: StoredFile(nbytes=(weights / name).stat().st_size, crc32=sums[name].result()) for name in names},
    )


def _version() -> str:
    try:
        return version("atoma-jax")
    except PackageNotFoundError:  # run from its sources
        return "unknown"


def _rope_tokens(config: ModelConfig, found: ResolvedModel, setup: ModelSetup) -> int | None:
    """The context that frequencies were chosen for, where the model has some for short contexts and some for long."""
    with open_model(found, max_model_len=1) as shortest, open_model(found) as longest:
        if shortest.spec.rope == longest.spec.rope:
            return None
    return config.max_model_len or setup.spec.context_length


def _write_metadata(source: Path, path: Path) -> None:
    """The keys of a GGUF file, byte for byte, with the tensors that are no weights."""
    with GGUFFile.open(source) as file:
        spare = [tensor for name, tensor in file.tensors.items() if name in SPARE]
        kept = encoded_metadata(first_shard(file))
        alignment = file.metadata.get_int("general.alignment", 32)
        tensors = [TensorEntry(tensor.name, tensor.shape, tensor.type) for tensor in spare]
        with GGUFWriter(path, kept, tensors, alignment=alignment) as writer:
            for tensor in spare:
                writer.write(np.ascontiguousarray(tensor.data))


def _copy_files(source: Path, folder: Path) -> None:
    for name in FOLDER_FILES:
        if (source / name).is_file():
            try:
                content = (source / name).read_bytes()
            except OSError as error:  # not to be taken for an error of the folder that is written
                problem = f"cannot be read ({error.strerror})"
                raise WeightFileError(str(source / name), None, problem) from error
            (folder / name).write_bytes(content)
