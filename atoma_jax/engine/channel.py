"""Connections between the processes of one engine: frames in order, and the news that one of them is gone.

Process 0 listens, the others connect. A frame is a kind, an index and bytes whose meaning is `cluster.py`'s; nothing in
it is code. Whoever closes without a farewell, or is silent for too long, is lost: machines that stop send nothing, so
each side says every two seconds that it is there. Imports no JAX.
"""

import hmac
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

from atoma_jax.errors import EngineDeadError

BEAT = 2.0  # seconds between signs of life
SILENCE = 12.0  # seconds without any, after which a process is lost
LARGEST = 1 << 30  # bytes of a frame
TOKEN_BYTES = 32  # that a process shows before anything it says is read

_HEADER = struct.Struct("!BII")  # kind, index, bytes that follow
_BEAT_KIND, _FAREWELL_KIND = 255, 254
_GREETING = struct.Struct(f"!{TOKEN_BYTES}sI")  # the token, and which process

OnLost = Callable[[str], None]


class Frame(NamedTuple):
    """One message."""

    kind: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  # nobody searches in a frame
    payload: bytes


class Connection:
    """The way to one other process. Frames may be sent from any thread and are received by one."""

    def __init__(self, sock: socket.socket, peer: str, on_lost: OnLost, *, may_leave: bool):
        """Starts to listen.

        Args:
            sock: connected, and greeted.
            peer: the other process, for errors.
            on_lost: called once, from a thread of this connection, when the other side is gone.
            may_leave: a farewell is no loss.
        """
        self.peer = peer
        self._sock, self._on_lost, self._may_leave = sock, on_lost, may_leave
        self._frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._closing = threading.Event()
        sock.settimeout(SILENCE)
        for work in (self._listen, self._beat):
            threading.Thread(target=work, name=f"{work.__name__[1:]} {peer}", daemon=True).start()

    def send(self, kind: int, index: int = 0, parts: Iterable[bytes | memoryview] = ()) -> None:
        """Sends a frame. One that cannot be sent means that the other side is lost, which `on_lost` hears of."""
        payload = b"".join(parts)
        assert len(payload) <= LARGEST, len(payload)
        try:
            with self._sending:
                self._sock.sendall(_HEADER.pack(kind, index, len(payload)) + payload)
        except OSError as error:
            self._lose(f"{self.peer} is lost: nothing can be sent to it ({error.strerror or error})")

    def receive(self) -> Frame | None:
        """The next frame; None once the other side has said farewell or is lost."""
        frame = self._frames.get()
        if frame is None:
            self._frames.put(None)  # for the next call
        return frame

    def close(self, reason: str = "") -> None:
        """Says farewell and hangs up. A reason makes it a loss for the other side, which hears it."""
        if not self._closing.is_set():
            self.send(_FAREWELL_KIND, parts=[reason.encode()])
            self._closing.set()
            self._hang_up()

    def _listen(self) -> None:
        """In a thread: takes in frames until the end."""
        try:
            while True:
                kind, index, count = _HEADER.unpack(_read(self._sock, _HEADER.size))
                if count > LARGEST:
                    self._lose(f"{self.peer} announced a message of {count} bytes")
                    return
                payload = _read(self._sock, count)
                if kind == _FAREWELL_KIND:
                    self._take_leave(payload.decode(errors="replace"))
                    return
                if kind != _BEAT_KIND:
                    self._frames.put(Frame(kind, index, payload))
        except TimeoutError:
            self._lose(f"{self.peer} is lost: nothing was heard of it for {SILENCE:.0f} seconds")
        except OSError as error:
            self._lose(f"{self.peer} is lost: the connection ended ({error.strerror or error})")
        finally:
            self._frames.put(None)

    def _take_leave(self, reason: str) -> None:
        if self._may_leave and not reason:
            self._closing.set()
            self._hang_up()
        else:
            self._lose(reason or f"{self.peer} has ended")

    def _beat(self) -> None:
        while not self._closing.wait(BEAT):
            self.send(_BEAT_KIND)

    def _lose(self, reason: str) -> None:
        with self._sending:  # of several threads that notice one tells
            if self._closing.is_set():
                return
            self._closing.set()
        self._hang_up()
        self._on_lost(reason)

    def _hang_up(self) -> None:
        with suppress(OSError):  # it may be closed from the other side
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def listen(host: str) -> socket.socket:
    """A socket on a free port, at the address of `host` where that is one of this machine's, else at all."""
    for address in (host, ""):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.bind((address, 0))
        except OSError:
            listener.close()
            continue
        listener.listen()
        return listener
    raise EngineDeadError("No port is free for the other processes of this engine.")


def accept(
    listener: socket.socket,
    token: bytes,
    others: int,
    *,
    timeout: float,
    on_lost: OnLost,
    check: Callable[[], None],
) -> list[Connection]:
    """Waits for every other process, 1 to `others`; in their order. `check` is called every second, and may raise.

    Raises:
        EngineDeadError: one did not come in time.
    """
    found: dict[int, Connection] = {}
    deadline = time.monotonic() + timeout
    while len(found) < others:
        missing = [process for process in range(1, others + 1) if process not in found]
        check()
        if time.monotonic() > deadline:
            raise EngineDeadError(f"Of this engine's processes, {missing} did not connect in {timeout:.0f} s.")
        listener.settimeout(1.0)
        try:
            sock, _ = listener.accept()
        except TimeoutError:
            continue
        sock.settimeout(BEAT)
        try:
            shown, process = _GREETING.unpack(_read(sock, _GREETING.size))
        except OSError:
            sock.close()
            continue
        if not hmac.compare_digest(shown, token) or process not in missing:  # a stranger
            sock.close()
            continue
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        found[process] = Connection(sock, f"process {process}", on_lost, may_leave=False)
    return [found[process] for process in sorted(found)]


def connect(host: str, port: int, token: bytes, process: int, *, timeout: float, on_lost: OnLost) -> Connection:
    """The way to process 0.

    Raises:
        EngineDeadError: it cannot be reached.
    """
    try:
        sock = socket.create_connection((host, port), timeout=timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(_GREETING.pack(token, process))
    except OSError as error:
        problem = f"Process 0 cannot be reached at {host}:{port}: {error.strerror or error}."
        raise EngineDeadError(f"{problem} Every port of it must be open to the other processes.") from error
    return Connection(sock, "process 0", on_lost, may_leave=True)


def _read(sock: socket.socket, count: int) -> bytes:
    """Exactly so many bytes. Raises OSError where there are fewer."""
    buffer = bytearray(count)
    view, at = memoryview(buffer), 0
    while at < count:
        got = sock.recv_into(view[at:])
        if got == 0:
            raise ConnectionResetError(None, "it hung up")
        at += got
    return bytes(buffer)
