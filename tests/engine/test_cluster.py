"""Processes of one engine, of which this one plays several over socket pairs: what they tell each other, and how a loss
ends what waits."""

import socket
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import pytest

from atoma_jax.config import MeshConfig
from atoma_jax.engine import channel
from atoma_jax.engine.channel import Connection, accept, connect, listen
from atoma_jax.engine.cluster import Cluster, Order, join
from atoma_jax.errors import ConfigError, EngineDeadError

PATIENCE = 20  # seconds; what is waited for takes milliseconds


def cluster_on(sock: socket.socket, process: int) -> Cluster:
    def meet(on_lost: Callable[[str], None], _check: Callable[[], None]) -> list[Connection]:
        return [Connection(sock, f"process {1 - process}", on_lost, may_leave=process == 1)]

    return Cluster(process, 2, meet)


@pytest.fixture
def pair() -> Generator[tuple[Cluster, Cluster]]:
    """Processes 0 and 1."""
    one, other = socket.socketpair()
    both = cluster_on(one, 0), cluster_on(other, 1)
    yield both
    for cluster in both:
        cluster.close()


def beside(call: Callable[[], Any]) -> list[Any]:
    """Calls in a thread; the list gets what it returns or raises, once `joined`."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    found.append(thread)
    return found


def joined(found: list[Any]) -> Any:
    found.pop(0).join(PATIENCE)
    return found[0]


class TestAgreement:
    def test_all_get_the_least_memory(self, pair: tuple[Cluster, Cluster]) -> None:
        other = beside(lambda: pair[1].agree({"programs": ("a", 1)}, 3 << 40))
        assert pair[0].agree({"programs": ["a", 1]}, 2 << 40) == joined(other) == 2 << 40

    def test_what_differs_is_named_at_both(self, pair: tuple[Cluster, Cluster]) -> None:
        other = beside(lambda: pair[1].agree({"dtype": "float32", "seed": 2}, 1))
        with pytest.raises(ConfigError, match="the same seed: process 0 has 1, process 1 has 2") as caught:
            pair[0].agree({"dtype": "float32", "seed": 1}, 1)
        assert caught.value.field == "seed"
        error = joined(other)
        assert isinstance(error, ConfigError)
        assert "the same seed" in str(error)

    def test_nobody_goes_on_before_all_are_there(self, pair: tuple[Cluster, Cluster]) -> None:
        first = beside(pair[0].wait_for_all)
        time.sleep(0.05)
        assert len(first) == 1, "it waits"
        pair[1].wait_for_all()
        assert joined(first) is None


class TestLoss:
    def test_it_ends_what_waits_for_devices(self, pair: tuple[Cluster, Cluster]) -> None:
        never = threading.Event()
        waiting = beside(lambda: pair[0].run(never.wait))
        pair[1].close("process 1 failed: out of memory")
        error = joined(waiting)
        assert isinstance(error, EngineDeadError)
        assert str(error) == "process 1 failed: out of memory"
        with pytest.raises(EngineDeadError, match="out of memory"):  # and all that comes later
            pair[0].run(lambda: None)
        never.set()

    def test_a_process_that_ends_before_the_first_one_is_lost(self, pair: tuple[Cluster, Cluster]) -> None:
        told = threading.Event()
        pair[0].when_lost(told.set)
        pair[1].close()
        assert told.wait(PATIENCE)
        assert pair[0].lost == "process 1 has ended"

    def test_a_farewell_of_process_0_is_none(self, pair: tuple[Cluster, Cluster]) -> None:
        pair[0].tell(Order.STEP, 3, [b"ab", b"c"])
        pair[0].close()
        frame = pair[1].next()
        assert frame is not None
        assert tuple(frame) == (Order.STEP, 3, b"abc")
        assert pair[1].next() is None
        assert pair[1].next() is None
        assert pair[1].lost is None

    def test_the_others_hear_who_was_lost(self, pair: tuple[Cluster, Cluster]) -> None:
        pair[0]._lose("process 2 is lost: its machine is gone")
        with pytest.raises(EngineDeadError, match="process 2 is lost"):
            pair[1].next()

    def test_a_fault_of_the_devices_is_told_as_the_loss_it_comes_from(self, pair: tuple[Cluster, Cluster]) -> None:
        def fail() -> None:
            threading.Timer(0.05, pair[1].close, ["process 1 was killed"]).start()
            raise RuntimeError("Gloo all-reduce failed")

        with pytest.raises(EngineDeadError, match="process 1 was killed"):
            pair[0].run(fail)

    def test_what_a_call_raises_is_raised(self, pair: tuple[Cluster, Cluster], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("atoma_jax.engine.cluster._NOTICE", 0.01)
        with pytest.raises(ZeroDivisionError):
            pair[0].run(lambda: 1 // 0)
        assert pair[0].run(lambda: 5) == 5

    def test_silence_is_a_loss(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(channel, "SILENCE", 0.2)
        one, other = socket.socketpair()
        with other:  # stays open, and says nothing
            cluster, told = cluster_on(one, 0), threading.Event()
            cluster.when_lost(told.set)
            assert told.wait(PATIENCE)
            assert "nothing was heard of it" in str(cluster.lost)

    def test_who_says_nothing_else_says_that_it_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(channel, "BEAT", 0.01)
        one, other = socket.socketpair()
        cluster = cluster_on(one, 0)
        with other:
            other.settimeout(PATIENCE)
            assert other.recv(9) + other.recv(9) == 2 * bytes([255, 0, 0, 0, 0, 0, 0, 0, 0])
        cluster.close()

    def test_a_frame_beyond_all_limits_is_not_taken_in(self) -> None:
        one, other = socket.socketpair()
        with other:
            cluster, told = cluster_on(one, 0), threading.Event()
            cluster.when_lost(told.set)
            other.sendall(bytes([5, 0, 0, 0, 0, 255, 255, 255, 255]))
            assert told.wait(PATIENCE)
            assert "announced a message of 4294967295 bytes" in str(cluster.lost)


class TestMeeting:
    def test_strangers_are_sent_away_and_the_others_come_in_their_order(self) -> None:
        token, on_lost = b"t" * 32, lambda _reason: None
        with listen("127.0.0.1") as listener:
            port = listener.getsockname()[1]

            def come(shown: bytes, process: int) -> Connection:
                return connect("127.0.0.1", port, shown, process, timeout=float(PATIENCE), on_lost=on_lost)

            came = beside(lambda: [come(b"x" * 32, 1), come(token, 2), come(token, 7), come(token, 1)])
            found = accept(listener, token, 2, timeout=float(PATIENCE), on_lost=on_lost, check=lambda: None)
        assert [connection.peer for connection in found] == ["process 1", "process 2"]
        others = joined(came)
        assert others[0].receive() is None
        found[1].send(Order.READY)
        assert others[1].receive() == (Order.READY, 0, b"")
        for connection in (*found, *others):
            connection.close()

    def test_who_does_not_come_is_named(self) -> None:
        with listen("127.0.0.1") as listener, pytest.raises(EngineDeadError, match=r"\[1, 2\] did not connect"):
            accept(listener, b"t" * 32, 2, timeout=0.0, on_lost=lambda _: None, check=lambda: None)

    def test_a_process_alone_joins_nothing(self) -> None:
        alone = MeshConfig(coordinator_address="127.0.0.1:1", num_processes=1, process_id=0)
        assert join(MeshConfig()) == join(alone) == 0
        assert Cluster.of(MeshConfig()) is None

    def test_what_started_before_cannot_join(self) -> None:
        import jax

        jax.devices()
        config = MeshConfig(mesh="data=2", coordinator_address="127.0.0.1:1", num_processes=2, process_id=1)
        with pytest.raises(ConfigError, match=r"no cluster came about: .*before any JAX calls"):
            join(config)
