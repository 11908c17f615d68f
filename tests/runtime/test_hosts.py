"""What processes of a run leave for each other, and what others put there in its place."""

import math
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from mdt_jax.runtime import cluster, hosts, rendezvous
from mdt_jax.runtime.coordination import TOKEN, connection, sign
from mdt_jax.runtime.errors import UserError


class Service:
    """Keys and values as JAX's coordination service keeps them; its barriers are open."""

    def __init__(self):
        self.values: dict[str, bytes] = {}
        self.before_reading = lambda: None

    def key_value_set_bytes(self, key: str, value: bytes) -> None:
        if key in self.values:
            raise RuntimeError(f"ALREADY_EXISTS: key {key} already exists.")
        self.values[key] = value

    def wait_at_barrier(self, place: str, timeout: int) -> None:
        self.before_reading()

    def blocking_key_value_get_bytes(self, key: str, timeout: int) -> bytes:
        if key not in self.values:
            raise RuntimeError(f"DEADLINE_EXCEEDED: GetKeyValue() timed out with key: {key}")
        return self.values[key]


@pytest.fixture
def service(monkeypatch) -> Service:
    """This process is the first of two, and is about to make exchange 0."""
    client = Service()
    state = SimpleNamespace(
        client=client, process_id=0, num_processes=2, coordinator_address="10.0.0.1:1234"
    )
    monkeypatch.setattr(connection, "service", state)
    monkeypatch.setattr(connection, "exchanges", iter(range(10)))
    monkeypatch.setattr(connection, "patience", 0)
    monkeypatch.setattr(connection, "ended", threading.Event())
    monkeypatch.setenv(TOKEN, "this run's")
    return client


def place(process: int, exchange: int = 0) -> str:
    return f"mdt_jax/exchange/{exchange}/{process}"


def test_an_exchange(service):
    service.values[place(1)] = sign(place(1), '["broadcast", "itself é\\n2"]')
    assert hosts.broadcast("é\n1") == "é\n1"
    service.values[place(1, 1)] = sign(place(1, 1), '["vote", false]')
    assert hosts.all_hosts(True) is False
    service.values[place(1, 2)] = sign(place(1, 2), '["shutdown", null]')
    with pytest.raises(UserError, match="process 1 is at shutdown, not vote"):
        hosts.all_hosts(True)


@pytest.mark.parametrize("value", [[0, 4], {"fid": math.inf, "é": [None, 0.1]}, True, 1e-300])
def test_a_broadcast_takes_any_json(value, service):
    service.values[place(1)] = sign(place(1), '["broadcast", 7]')
    assert hosts.broadcast(value) == value


@pytest.mark.parametrize(
    "put",
    [b"", b'["vote", true]', b"\xff\xfe\x00", b"x" * 10**6, b"\x1b[2J\n" * 9, "elsewhere", "token"],
)
def test_what_a_stranger_has_put_in_a_process_s_place(put, service, monkeypatch):
    if put == "elsewhere":  # what this run signed, but for another key
        put = sign(place(1, 7), '["vote", true]')
    elif put == "token":
        monkeypatch.setenv(TOKEN, "another")
        put = sign(place(1), '["vote", true]')
        monkeypatch.setenv(TOKEN, "this run's")
    service.values[place(1)] = put
    with pytest.raises(UserError) as error:
        hosts.all_hosts(True)
    line = str(error.value)
    assert f"the key {place(1)} at the coordinator 10.0.0.1:1234 was not set by a process" in line
    assert "MDT_JAX_RUN_TOKEN" in line and line.isprintable() and len(line) < 400


def test_a_stranger_was_quicker_or_removed_a_key(service):
    service.values[place(0)] = sign(place(0), '["vote", true]')
    with pytest.raises(UserError, match=f"the key {place(0)} .* was not set by"):
        hosts.all_hosts(True)
    service.values[place(1, 1)] = b"any"
    service.before_reading = service.values.clear
    with pytest.raises(UserError, match="could not exchange 'vote': DEADLINE_EXCEEDED"):
        hosts.all_hosts(True)


@pytest.mark.parametrize("put", [b"", b"0 all is well", b"two \xff", b"9" * 10**5])
def test_a_stranger_says_that_a_process_left(put, service, monkeypatch):
    ended = []

    def end(line, code=2):
        ended.append((line, code))
        connection.ended.set()

    monkeypatch.setattr(cluster, "_end", end)
    service.values[cluster.LEFT] = put
    cluster._watch_notice()
    ((line, code),) = ended
    assert code == 2 and "mdt_jax/left at the coordinator" in line and line.isprintable()
    connection.ended.clear()
    service.values[cluster.LEFT] = sign(cluster.LEFT, "130 process 1 stopped: é")
    cluster._watch_notice()
    assert ended[1] == ("process 1 stopped: é", 130)


def free_ports() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_missing_processes_are_named_among_strangers():
    """Two of three come; others say nothing, or that they are process 2."""
    coordinator = f"127.0.0.1:{free_ports()}"
    port = rendezvous.report_port(int(coordinator.rpartition(":")[2]))
    lines, never = {}, threading.Event()

    def collect(process):
        lines[process] = rendezvous.missing_processes(coordinator, process, 3, 3, never)

    threads = [threading.Thread(target=collect, args=(process,)) for process in (0, 1)]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    for said in (b"2", b"-1", b"\xff" * 99, sign("mdt_jax/report", "2")[:-1] + b"1"):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
            stranger.sendall(said)
    silent = socket.create_connection(("127.0.0.1", port), timeout=5)
    for thread in threads:
        thread.join(timeout=20)
    silent.close()
    assert time.monotonic() - began < 10
    assert lines == dict.fromkeys((0, 1), "process 2 of 3 did not connect within 3 s")


def test_where_the_first_process_listens(monkeypatch):
    """Its own address alone where that is told by number; the name may mean another elsewhere."""
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
    assert rendezvous.bind_address("127.0.0.1:1234") == "127.0.0.1:1234"
    for other in ("localhost:1234", "node-7:1234", "192.0.2.1:1234", "[2001:db8::1]:1234"):
        assert rendezvous.bind_address(other) is None
    if socket.has_dualstack_ipv6():
        assert rendezvous.bind_address("[::1]:1234") == "[::1]:1234"
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "10.0.0.7:99")
    assert rendezvous.bind_address("127.0.0.1:1234") == "10.0.0.7:99"


def test_nobody_says_which_processes_there_are(service, monkeypatch):
    """A scheduler that does not answer is not waited for without end."""
    ended = []

    def end(line):
        ended.append(line)
        raise SystemExit

    monkeypatch.setattr(cluster, "_end", end)
    connection.service.client = None
    with pytest.raises(SystemExit):
        cluster._end_if_incomplete(0.2, threading.Event())
    assert ended == ["the scheduler did not list the processes within 0 s"]
