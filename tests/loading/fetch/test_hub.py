"""What a user calls a model leads to one file or folder, or to an error that says where it was looked for."""

import errno
import hashlib
import http.server
import shutil
import stat
import subprocess
import sys
import threading
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from atoma_jax.errors import ConfigError, DownloadError, ModelNotFoundError
from atoma_jax.loading.fetch import hub, sources
from atoma_jax.loading.fetch.catalog import (
    CatalogEntry,
    HubSource,
    Source,
    UrlSource,
    WheelPart,
    WheelSource,
    load_catalog,
    parse_entry,
)

CONTENT = bytes(range(256)) * 9000  # 2.3 MB, so that more than one block is read


def entry_for(source: Source, content: bytes = CONTENT) -> CatalogEntry:
    return CatalogEntry(
        name="tiny",
        description="made here",
        licence="CC0",
        licence_note=None,
        file="tiny.gguf",
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        source=source,
    )


WHEEL = WheelSource(parts=(WheelPart(requirement="tiny-gguf==1.0", member="tiny_gguf/tiny.gguf"),))


@pytest.fixture
def catalogue(monkeypatch: pytest.MonkeyPatch) -> Callable[[CatalogEntry], None]:
    """Puts one entry in place of the shipped ones."""
    return lambda entry: monkeypatch.setattr(hub, "load_catalog", lambda: {entry.name: entry})


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that the user's pip is configured to use, and nothing else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def make_wheel(folder: Path, member: str, content: bytes, name: str = "tiny_gguf") -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: absent\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models" / "tiny").iterdir() if path.name != ".lock")


# Local paths


def test_gguf_file_is_found_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    assert hub.resolve(str(path)) == hub.ResolvedModel(name=str(path), path=path, kind="gguf")


def test_folder_with_one_gguf_means_that_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "README.md").write_text("hello")
    assert hub.resolve(str(tmp_path)).path == tmp_path / "m.gguf"


def test_folder_with_a_split_gguf_means_its_first_part(tmp_path: Path) -> None:
    for index in (1, 2, 3):
        (tmp_path / f"m-{index:05}-of-00003.gguf").write_bytes(b"GGUF")
    assert hub.resolve(str(tmp_path)).path == tmp_path / "m-00001-of-00003.gguf"


def test_folder_in_hf_layout_is_taken_whole(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert hub.resolve(str(tmp_path)) == hub.ResolvedModel(name=str(tmp_path), path=tmp_path, kind="folder")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"config\.json with \*\.safetensors, or exactly one \*\.gguf"),
        (["config.json"], "holds no model"),
        (["config.json", "pytorch_model.bin"], "holds no model"),
        (["a.gguf", "b.gguf"], r"2 GGUF files: a\.gguf, b\.gguf"),
    ],
)
def test_folder_without_one_model_says_what_was_looked_for(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match=message):
        hub.resolve(str(tmp_path))


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="pickled weights"):
        hub.resolve(str(path))


@pytest.mark.parametrize("name", ["", " ", "m\0.gguf", "x" * 5000, "models/m.gguf", "/absent/m.gguf", "../m.gguf"])
def test_name_of_nothing_is_not_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="hub id"):
        hub.resolve(name)


@pytest.mark.parametrize(
    "name", ["org/../name", "org/name:../x.gguf", "org/name/a/../../x.gguf", "/org/name", "org/name:x.bin"]
)
def test_hub_id_cannot_climb_out_or_name_a_pickle(name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        hub.resolve(name)


def test_mistyped_name_is_answered_with_the_nearest_and_all_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="did you mean smollm2-135m-instruct") as caught:
        hub.resolve("smollm2-135m-instuct")
    assert "gemma3-270m" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_link_out_of_a_model_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.gguf").write_bytes(b"GGUF")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "m.gguf").symlink_to("../secret.gguf")
    with pytest.raises(ConfigError, match="leads out of"):
        hub.resolve(str(folder))


@pytest.mark.parametrize("what", ["folder", "file"])
def test_model_that_everybody_may_write_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    (tmp_path if what == "folder" else path).chmod(0o777)
    with pytest.raises(ConfigError, match="chmod o-w"):
        hub.resolve(str(path))


def test_file_below_a_sticky_folder_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    tmp_path.chmod(0o777 | stat.S_ISVTX)
    assert hub.resolve(str(path)).path == path


def test_revision_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="revision"):
        hub.resolve(str(tmp_path / "m.gguf"), revision="main")


# The hub


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """A repository as huggingface_hub leaves it after a download: links from snapshots to blobs."""
    repo = tmp_path / "hub" / "models--org--name"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = repo / "snapshots" / commit
    for folder in (snapshot, repo / "blobs", repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for name in ("config.json", "model.safetensors", "x.gguf"):
        (repo / "blobs" / name).write_bytes(b"{}")
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    return tmp_path


def test_hub_repository_in_the_cache_needs_no_network(hub_cache: Path) -> None:
    found = hub.resolve("org/name", cache_dir=hub_cache, download=False)
    assert found.kind == "folder"
    assert (found.path / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize("name", ["org/name:x.gguf", "org/name/x.gguf"])
def test_one_file_of_a_hub_repository(hub_cache: Path, name: str) -> None:
    found = hub.resolve(name, cache_dir=hub_cache, download=False)
    assert (found.kind, found.path.name) == ("gguf", "x.gguf")


def test_hub_repository_that_is_not_here_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"org/other .*is not in .*hub"):
        hub.resolve("org/other", cache_dir=tmp_path, download=False)


@pytest.mark.parametrize("revision", ["../../etc", "", "a b"])
def test_revision_cannot_be_a_path(revision: str) -> None:
    with pytest.raises(ConfigError, match="branch, tag or commit"):
        hub.resolve("org/name", revision=revision, download=False)


# Wheels


def test_file_of_a_wheel_is_fetched_once_through_the_users_pip(
    tmp_path: Path, wheels: Path, catalogue: Callable[[CatalogEntry], None]
) -> None:
    wheel = make_wheel(wheels, "tiny_gguf/tiny.gguf", CONTENT)
    catalogue(entry_for(WHEEL))
    found = hub.resolve("tiny", cache_dir=tmp_path / "cache", progress=False)
    assert found.path == tmp_path / "cache" / "models" / "tiny" / "tiny.gguf"
    assert found.path.read_bytes() == CONTENT
    assert left_in(tmp_path / "cache") == ["tiny.gguf"]
    wheel.unlink()
    assert hub.resolve("tiny", cache_dir=tmp_path / "cache", progress=False) == found


def test_parts_in_several_wheels_are_joined_in_order(
    tmp_path: Path, wheels: Path, catalogue: Callable[[CatalogEntry], None]
) -> None:
    make_wheel(wheels, "p1/x.part0", CONTENT[:1000], name="tiny_part1")
    make_wheel(wheels, "p2/x.part1", CONTENT[1000:], name="tiny_part2")
    parts = (
        WheelPart(requirement="tiny-part1==1.0", member="p1/x.part0"),
        WheelPart(requirement="tiny-part2==1.0", member="p2/x.part1"),
    )
    catalogue(entry_for(WheelSource(parts=parts)))
    assert hub.resolve("tiny", cache_dir=tmp_path / "cache", progress=False).path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT[:-1] + b"?", "sha256"),
        (CONTENT[:-1], "expected 2304000 bytes"),
        (CONTENT + b"?", "more than the expected 2304000 bytes"),
    ],
)
def test_wrong_content_is_an_error_and_nothing_stays(
    tmp_path: Path, wheels: Path, catalogue: Callable[[CatalogEntry], None], content: bytes, message: str
) -> None:
    make_wheel(wheels, "tiny_gguf/tiny.gguf", content)
    catalogue(entry_for(WHEEL))
    with pytest.raises(DownloadError, match=message):
        hub.resolve("tiny", cache_dir=tmp_path / "cache", progress=False)
    assert left_in(tmp_path / "cache") == []


def test_wheel_without_the_member_is_an_error(
    tmp_path: Path, wheels: Path, catalogue: Callable[[CatalogEntry], None]
) -> None:
    make_wheel(wheels, "other.txt", b"")
    catalogue(entry_for(WHEEL))
    with pytest.raises(DownloadError, match=r"holds no tiny_gguf/tiny\.gguf"):
        hub.resolve("tiny", cache_dir=tmp_path / "cache", progress=False)


def test_without_a_registry_the_error_names_what_is_missing_and_where_it_was_looked_for(
    tmp_path: Path, wheels: Path, catalogue: Callable[[CatalogEntry], None]
) -> None:
    catalogue(entry_for(WHEEL))
    with pytest.raises(DownloadError) as caught:
        hub.resolve("tiny", cache_dir=tmp_path / "cache", progress=False)
    message = str(caught.value)
    assert "tiny-gguf==1.0" in message
    assert str(tmp_path / "cache" / "models" / "tiny") in message
    assert "No matching distribution" in message
    assert left_in(tmp_path / "cache") == []


def test_full_disk_is_told_before_anything_is_fetched(
    tmp_path: Path, wheels: Path, catalogue: Callable[[CatalogEntry], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue(entry_for(WHEEL))
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DownloadError, match=r"no space left in .*1 MiB are free"):
        hub.resolve("tiny", cache_dir=tmp_path / "cache", progress=False)
    assert left_in(tmp_path / "cache") == []


def test_disk_that_fills_up_meanwhile_leaves_nothing(
    tmp_path: Path, wheels: Path, catalogue: Callable[[CatalogEntry], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(wheels, "tiny_gguf/tiny.gguf", CONTENT)
    catalogue(entry_for(WHEEL))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sources, "_unpack", full)
    with pytest.raises(DownloadError, match="no space left"):
        hub.resolve("tiny", cache_dir=tmp_path / "cache", progress=False)
    assert left_in(tmp_path / "cache") == []


def test_two_at_once_fetch_once(
    tmp_path: Path, wheels: Path, catalogue: Callable[[CatalogEntry], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(wheels, "tiny_gguf/tiny.gguf", CONTENT)
    catalogue(entry_for(WHEEL))
    fetched: list[str] = []

    def counted(entry: CatalogEntry, target: Path, *, progress: bool) -> None:
        fetched.append(entry.name)
        sources.fetch(entry, target, progress=progress)

    monkeypatch.setattr(hub, "fetch", counted)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: hub.resolve("tiny", cache_dir=tmp_path / "cache", progress=False), range(2)))
    assert answers[0] == answers[1]
    assert fetched == ["tiny"]


# The cache


def cached_file(cache: Path, content: bytes) -> Path:
    path = cache / "models" / "tiny" / "tiny.gguf"
    path.parent.mkdir(parents=True, mode=0o700)
    path.write_bytes(content)
    return path


def test_damaged_file_in_the_cache_is_fetched_again(
    tmp_path: Path, wheels: Path, catalogue: Callable[[CatalogEntry], None]
) -> None:
    make_wheel(wheels, "tiny_gguf/tiny.gguf", CONTENT)
    catalogue(entry_for(WHEEL))
    cached_file(tmp_path / "cut", CONTENT[:10])
    assert hub.resolve("tiny", cache_dir=tmp_path / "cut", progress=False).path.read_bytes() == CONTENT
    cached_file(tmp_path / "flipped", b"?" + CONTENT[1:])  # the same size: only `verify` can see it
    found = hub.resolve("tiny", cache_dir=tmp_path / "flipped", verify=True, progress=False)
    assert found.path.read_bytes() == CONTENT


def test_without_download_a_missing_file_is_an_error_and_no_folder_is_made(
    tmp_path: Path, catalogue: Callable[[CatalogEntry], None]
) -> None:
    catalogue(entry_for(WHEEL))
    with pytest.raises(DownloadError, match="atoma-jax pull tiny"):
        hub.resolve("tiny", cache_dir=tmp_path / "cache", download=False)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("level", ["", "models", "models/tiny"])
def test_cache_that_everybody_may_write_is_refused(
    tmp_path: Path, catalogue: Callable[[CatalogEntry], None], level: str
) -> None:
    catalogue(entry_for(WHEEL))
    cached_file(tmp_path / "cache", CONTENT)
    (tmp_path / "cache" / level).chmod(0o777)
    with pytest.raises(ConfigError, match="chmod o-w"):
        hub.resolve("tiny", cache_dir=tmp_path / "cache")


def test_link_in_the_cache_is_refused(tmp_path: Path, catalogue: Callable[[CatalogEntry], None]) -> None:
    catalogue(entry_for(WHEEL))
    path = cached_file(tmp_path / "cache", CONTENT)
    path.rename(tmp_path / "elsewhere.gguf")
    path.symlink_to(tmp_path / "elsewhere.gguf")
    with pytest.raises(ConfigError, match="not links"):
        hub.resolve("tiny", cache_dir=tmp_path / "cache")


def test_cache_folder_that_cannot_be_made_is_an_error(
    tmp_path: Path, catalogue: Callable[[CatalogEntry], None]
) -> None:
    catalogue(entry_for(WHEEL))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DownloadError, match="--cache-dir"):
        hub.resolve("tiny", cache_dir=tmp_path / "cache")


def test_models_are_kept_below_the_xdg_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hub.default_cache_dir() == tmp_path / "atoma-jax"


# URLs


class Site(http.server.ThreadingHTTPServer):
    """One file on loopback, with ranges; `cut` ends the first answer early."""

    content = CONTENT
    cut: int | None = None
    ranges = True
    redirect: str | None = None

    def __init__(self) -> None:
        self.asked: list[str | None] = []
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def source(self) -> UrlSource:
        return UrlSource(url=f"http://127.0.0.1:{self.server_port}/tiny.gguf")


class Answer(http.server.BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        site = self.server
        asked = self.headers.get("Range")
        site.asked.append(asked)
        if site.redirect is not None:
            self.send_response(302)
            self.send_header("Location", site.redirect)
            self.end_headers()
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and site.ranges else 0
        body = site.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(site.content) - 1}/{len(site.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if site.cut is None else body[: site.cut])
        site.cut = None

    def log_message(self, *_: object) -> None:
        """Silent: pytest's output is for results."""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    plain = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    monkeypatch.setattr(sources, "https_opener", lambda: plain)
    with Site() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_file_behind_a_url_is_fetched(tmp_path: Path, site: Site, catalogue: Callable[[CatalogEntry], None]) -> None:
    catalogue(entry_for(site.source))
    assert hub.resolve("tiny", cache_dir=tmp_path, progress=False).path.read_bytes() == CONTENT
    assert left_in(tmp_path) == ["tiny.gguf"]


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_transfer_is_resumed(
    tmp_path: Path, site: Site, catalogue: Callable[[CatalogEntry], None], ranges: bool
) -> None:
    catalogue(entry_for(site.source))
    site.cut, site.ranges = 1_000_000, ranges
    with pytest.raises(DownloadError, match="1000000 of 2304000 bytes"):
        hub.resolve("tiny", cache_dir=tmp_path, progress=False)
    assert left_in(tmp_path) == [".fetch"]  # never under the model's own name
    assert hub.resolve("tiny", cache_dir=tmp_path, progress=False).path.read_bytes() == CONTENT
    assert site.asked == [None, "bytes=1000000-"]
    assert left_in(tmp_path) == ["tiny.gguf"]


def test_changed_file_behind_a_url_is_an_error_and_nothing_stays(
    tmp_path: Path, site: Site, catalogue: Callable[[CatalogEntry], None]
) -> None:
    catalogue(entry_for(site.source))
    site.content = CONTENT[::-1]
    with pytest.raises(DownloadError, match="sha256"):
        hub.resolve("tiny", cache_dir=tmp_path, progress=False)
    assert left_in(tmp_path) == []


def test_redirect_away_from_https_is_refused(
    tmp_path: Path, site: Site, catalogue: Callable[[CatalogEntry], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real opener
    monkeypatch.setattr(hub, "load_catalog", lambda: {"tiny": entry_for(site.source)})
    monkeypatch.setenv("no_proxy", "*")
    site.redirect = "http://127.0.0.1:9/tiny.gguf"
    with pytest.raises(DownloadError, match="not https"):
        hub.resolve("tiny", cache_dir=tmp_path, progress=False)


# The catalogue


def test_shipped_catalogue_is_sound() -> None:
    catalog = load_catalog()
    assert {"smollm2-135m-instruct", "gemma3-270m"} <= set(catalog)
    assert catalog["gemma3-270m"].licence_note is not None


VALID = """
name = "tiny"
description = "x"
licence = "CC0"
file = "tiny.gguf"
size = 1
sha256 = "{sha}"
[source]
{source}
""".replace("{sha}", "0" * 64)
HUB = 'kind = "hub"\nrepo = "org/name"\nfile = "a.gguf"\nrevision = "main"'


def test_hub_source_is_read() -> None:
    assert parse_entry(VALID.format(source=HUB), where="t").source == HubSource(
        repo="org/name", file="a.gguf", revision="main"
    )


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("size = 1", "size = true", "size"),
        ("size = 1", "size = 0", "size"),
        ("size = 1", "", "size"),
        ("size = 1", "size = 1\nsise = 2", "sise"),
        ('file = "tiny.gguf"', 'file = "../tiny.gguf"', "file"),
        ('file = "tiny.gguf"', 'file = "tiny.bin"', "file"),
        ('"tiny"', '"../tiny"', "name"),
        ("0" * 64, "0" * 63, "sha256"),
        ('"hub"', '"ftp"', "kind"),
        ('"org/name"', '"org/../name"', "repo"),
        (HUB, 'kind = "url"\nurl = "http://example.org/tiny.gguf"', "url"),
        (HUB, 'kind = "wheel"\nparts = []', "parts"),
        (HUB, 'kind = "wheel"\nparts = [{requirement = "-r x", member = "m"}]', "requirement"),
        (HUB, 'kind = "wheel"\nparts = [{requirement = "a==1", member = "../m"}]', "member"),
        (HUB, 'kind = "wheel"\nparts = [{requirement = "a>=1", member = "m"}]', "requirement"),
        ("[source]", "[source", "TOML"),
    ],
)
def test_entry_outside_the_schema_names_the_key(old: str, new: str, field: str) -> None:
    text = VALID.format(source=HUB)
    assert old in text
    with pytest.raises(ConfigError, match=field):
        parse_entry(text.replace(old, new), where="t")


# The command


def test_pull_prints_the_path_alone_and_imports_no_jax(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    code = (
        f"import sys; from atoma_jax.cli.pull import pull; pull({str(path)!r}); "
        "sys.exit(bool({'jax', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{path}\n"


@pytest.mark.model
def test_demo_model_comes_from_its_wheel(smollm2_path: Path) -> None:
    assert smollm2_path.read_bytes()[:4] == b"GGUF"
