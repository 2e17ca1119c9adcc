"""The processes that serve one engine together: how they find each other, agree, and notice that one of them is gone.

Process 0 takes requests and plans; the others do on their devices what it does on its own, told by frames of
`channel.py`. A step's frame must come before the device is done with the step before it, so it goes over TCP beside the
devices: a collective would wait behind that step. What may wait for another process's devices is waited for in `run`
alone: a process that is lost ends the wait.
"""

import atexit
import json
import logging
import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from enum import IntEnum
from typing import Any, TypeVar

import jax

# The one private name of JAX that is used. `jax.distributed` can start the cluster and say that there is one, and
# `jax.process_count` starts devices to say how many. Before those are there, a process has to know which one it is, and
# the others have to find process 0: by the store and the address that JAX's coordinator has anyway.
from jax._src.distributed import global_state

from atoma_jax.config import MeshConfig
from atoma_jax.engine.channel import TOKEN_BYTES, Connection, Frame, OnLost, accept, connect, listen
from atoma_jax.errors import ConfigError, EngineDeadError

MEETING = 300.0  # seconds in which all processes must have come
_FAREWELLS = 86_400  # seconds that a process which is done waits for the others: as long as they live
_NOTICE = 3.0  # seconds after a fault of the devices in which it may turn out that a process is lost
_KEY = "atoma_jax/channel"

_T = TypeVar("_T")


class Order(IntEnum):
    """What a frame is."""

    FACTS = 1  # to process 0: JSON of what this process is about to run
    AGREED = 2  # to the others: JSON of what all of them have
    REFUSED = 3  # to the others: why they do not go together
    READY = 4  # to process 0, and back when all are
    STEP = 5  # index: of the program; the words of its batch
    SLOT = 6  # index: home and slot; the arrays of a `SlotRow`
    ALLOWED = 7  # index: rows of a slice; their slots, and bits of the tokens that they may draw


def join(config: MeshConfig) -> int:
    """Makes this process one of a JAX cluster, unless it is already; returns which. 0 where there is no cluster.

    Raises:
        ConfigError: what the cluster says, or an earlier start of JAX, contradicts the configuration.
    """
    if config.coordinator_address is None or config.num_processes == 1:
        if global_state.client is not None and global_state.num_processes > 1:
            problem = f"must be given: this process is one of {global_state.num_processes} of a JAX cluster"
            raise ConfigError("coordinator_address", config.coordinator_address, problem)
        return 0
    if global_state.client is None:
        address = None if config.coordinator_address == "auto" else config.coordinator_address
        # It would take SIGTERM for itself, and say nothing: a server would never hear that it is to end.
        jax.config.update("jax_enable_preemption_service", False)
        try:
            jax.distributed.initialize(
                address,
                config.num_processes,
                config.process_id,
                initialization_timeout=int(MEETING),
                shutdown_timeout_seconds=_FAREWELLS,
            )
        except ValueError as error:
            problem = (
                f"is not known from the environment ({error}): give coordinator_address, num_processes, process_id"
            )
            raise ConfigError("coordinator_address", config.coordinator_address, problem) from error
        except RuntimeError as error:
            problem = f"no cluster came about: {error}"
            raise ConfigError("coordinator_address", config.coordinator_address, problem) from error
    for name, own in (("num_processes", global_state.num_processes), ("process_id", global_state.process_id)):
        given = getattr(config, name)
        if given is not None and given != own:
            raise ConfigError(name, given, f"must be {own}, which is what the JAX cluster of this process says")
    return global_state.process_id


Meet = Callable[[OnLost, Callable[[], None]], list[Connection]]  # what hears of losses, and what raises after one


class Cluster:
    """This process's place among those of one engine."""

    def __init__(self, process: int, count: int, meet: Meet):
        """Meets the others.

        Args:
            process: which this is.
            count: of all.
            meet: gives the connections: of process 0 to all others, of the others to process 0. Its errors pass.
        """
        self.process, self.count = process, count
        self.lost: str | None = None
        self._has_failed = False  # this process, or it has lost another: they end one by one
        self._on_lost: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._waiting: set[Future[Any]] = set()
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._others: list[Connection] = []
        self._others = meet(self._lose, self.check)
        threading.Thread(target=self._work, name="devices", daemon=True).start()

    @classmethod
    def of(cls, config: MeshConfig) -> "Cluster | None":
        """Joins, and meets the others; None where the configuration names none.

        Raises:
            ConfigError: as `join` does; or this process has had an engine of several processes before.
            EngineDeadError: not all of them came in time.
        """
        join(config)
        if global_state.client is None or global_state.num_processes == 1:
            return None
        cluster = cls(global_state.process_id, global_state.num_processes, _meet)
        atexit.register(cluster._at_exit)
        return cluster

    @property
    def is_leader(self) -> bool:
        """Whether this process takes requests and plans."""
        return self.process == 0

    def agree(self, facts: Mapping[str, Any], free: int) -> int:
        """Holds what this process is about to run against what the others are.

        Args:
            facts: by what a user would call them, as plain values.
            free: bytes that each device of this process has.

        Returns:
            The least that any process has.

        Raises:
            ConfigError: another process has something else.
        """
        own = json.loads(json.dumps({"facts": facts, "free": free}))
        if not self.is_leader:
            self._others[0].send(Order.FACTS, parts=[json.dumps(own).encode()])
            answer = self.next()
            if answer is not None and answer.kind == Order.REFUSED:
                raise ConfigError("process_id", self.process, answer.payload.decode())
            return json.loads(self._expect(answer, Order.AGREED))["free"]
        theirs = [json.loads(self._expect(other.receive(), Order.FACTS)) for other in self._others]
        for process, other in enumerate(theirs, start=1):
            different = [name for name in own["facts"] if own["facts"][name] != other["facts"].get(name)]
            if different:
                name = different[0]
                here, there = own["facts"][name], other["facts"].get(name)
                problem = (
                    f"every process must have the same {name}: process 0 has {here}, process {process} has {there}"
                )
                self.tell(Order.REFUSED, parts=[problem.encode()])
                self.close()
                raise ConfigError(name, there, problem)
        free = min(each["free"] for each in (own, *theirs))
        self.tell(Order.AGREED, parts=[json.dumps({"free": free}).encode()])
        return free

    def wait_for_all(self) -> None:
        """Returns when every process has come to this point. Raises EngineDeadError if one does not."""
        if self.is_leader:
            for other in self._others:
                self._expect(other.receive(), Order.READY)
            self.tell(Order.READY)
        else:
            self._others[0].send(Order.READY)
            self._expect(self.next(), Order.READY)

    def tell(self, order: Order, index: int = 0, parts: Iterable[bytes | memoryview] = ()) -> None:
        """Process 0 tells all others."""
        whole = [b"".join(parts)]
        for other in self._others:
            other.send(order, index, whole)

    def next(self) -> Frame | None:
        """What process 0 says next; None at its farewell. Raises EngineDeadError if it is lost."""
        frame = self._others[0].receive()
        if frame is None:
            self.check()
        return frame

    def check(self) -> None:
        """Raises EngineDeadError if a process is lost."""
        if self.lost is not None:
            raise EngineDeadError(self.lost)

    def run(self, call: Callable[[], _T]) -> _T:
        """What `call` returns, done in another thread. Calls are done in order.

        Raises:
            EngineDeadError: a process is lost; whatever `call` waits for is left to itself.
        """
        future: Future[_T] = Future()
        with self._lock:
            self.check()
            self._waiting.add(future)
        self._calls.put((future, call))
        try:
            return future.result()
        except EngineDeadError:
            raise
        except Exception as error:
            # Devices that lose their counterpart may say so before the connection does.
            if self._is_lost_soon():
                raise EngineDeadError(str(self.lost)) from error
            raise
        finally:
            with self._lock:
                self._waiting.discard(future)

    def when_lost(self, call: Callable[[], None]) -> None:
        """Has `call` called, from another thread, once a process is lost."""
        with self._lock:
            self._on_lost.append(call)
            lost = self.lost is not None
        if lost:
            call()

    def close(self, reason: str = "") -> None:
        """Says farewell, upon which the others end: well, or with the reason as their error, and wait for nobody."""
        self._has_failed |= bool(reason)
        for other in self._others:
            other.close(reason)

    def _expect(self, frame: Frame | None, order: Order) -> bytes:
        self.check()
        if frame is None:
            raise EngineDeadError("Another process of this engine has ended.")
        assert frame.kind == order, (frame.kind, order)
        return frame.payload

    def _work(self) -> None:
        """In a thread: what may wait for devices that never answer."""
        while True:
            future, call = self._calls.get()
            try:
                result = call()
            except BaseException as error:
                with suppress(InvalidStateError):  # a process was lost meanwhile
                    future.set_exception(error)
            else:
                with suppress(InvalidStateError):
                    future.set_result(result)
            del future, call

    def _lose(self, reason: str) -> None:
        with self._lock:
            if self.lost is not None:
                return
            self.lost = reason
            waiting, told = list(self._waiting), list(self._on_lost)
        for future in waiting:
            with suppress(InvalidStateError):
                future.set_exception(EngineDeadError(reason))
        self.close(reason)  # those that are left hear of it now
        for call in told:
            call()

    def _is_lost_soon(self) -> bool:
        noticed = threading.Event()
        self.when_lost(noticed.set)
        return noticed.wait(_NOTICE)

    def _at_exit(self) -> None:
        """Before JAX waits for processes that are gone, and for programs that never end."""
        if not self._has_failed:
            self.close()
            return
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(1)


def _meet(on_lost: OnLost, check: Callable[[], None]) -> list[Connection]:
    """The connections between the processes of this process's JAX cluster, which keeps where process 0 listens."""
    client, process = global_state.client, global_state.process_id
    assert client is not None
    assert global_state.coordinator_address is not None
    host = global_state.coordinator_address.rpartition(":")[0].strip("[]")
    if process:
        try:
            said = json.loads(client.blocking_key_value_get(_KEY, int(MEETING * 1000)))
        except Exception as error:  # JAX's runtime errors have no base that is public everywhere
            raise EngineDeadError(f"Process 0 did not say where to reach it: {error}") from error
        token = bytes.fromhex(said["token"])
        return [connect(host, said["port"], token, process, timeout=MEETING, on_lost=on_lost)]
    token = secrets.token_bytes(TOKEN_BYTES)
    with listen(host) as listener:
        said = json.dumps({"port": listener.getsockname()[1], "token": token.hex()})
        try:
            client.key_value_set(_KEY, said)
        except Exception as error:
            problem = "is one of several processes, which have one engine in their lives: start them anew"
            raise ConfigError("process_id", 0, problem) from error
        others = global_state.num_processes - 1
        return accept(listener, token, others, timeout=MEETING, on_lost=on_lost, check=check)
