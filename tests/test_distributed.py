"""What processes of a run leave for each other, and what others put there in its place."""

import socket
import threading
import time
from types import SimpleNamespace

import pytest

from mdt_jax.runtime import hosts, roll_call, signing
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
    monkeypatch.setattr(hosts, "_state", state)
    monkeypatch.setattr(hosts, "_calls", iter(range(10)))
    monkeypatch.setattr(hosts, "_patience", 0)
    monkeypatch.setenv(signing.TOKEN, "this run's")
    return client


def place(process: int, exchange: int = 0) -> str:
    return f"mdt_jax/exchange/{exchange}/{process}"


def test_an_exchange(service):
    service.values[place(1)] = signing.sign(place(1), "of_first\nitself é\n2")
    assert hosts.broadcast("é\n1") == "é\n1"
    service.values[place(1, 1)] = signing.sign(place(1, 1), "vote\n0")
    assert hosts.all_hosts(True) is False
    service.values[place(1, 2)] = signing.sign(place(1, 2), "part\n")
    with pytest.raises(UserError, match="process 1 is at part, not vote"):
        hosts.all_hosts(True)


@pytest.mark.parametrize(
    "put",
    [b"", b"vote\n1", b"\xff\xfe\x00", b"x" * 10**6, b"\x1b[2J\n" * 9, "elsewhere", "token"],
)
def test_what_a_stranger_has_put_in_a_process_s_place(put, service, monkeypatch):
    if put == "elsewhere":  # what this run signed, but for another key
        put = signing.sign(place(1, 7), "vote\n1")
    elif put == "token":
        monkeypatch.setenv(signing.TOKEN, "another")
        put = signing.sign(place(1), "vote\n1")
        monkeypatch.setenv(signing.TOKEN, "this run's")
    service.values[place(1)] = put
    with pytest.raises(UserError) as error:
        hosts.all_hosts(True)
    line = str(error.value)
    assert f"the key {place(1)} at the coordinator 10.0.0.1:1234 was set by somebody who" in line
    assert "MDT_JAX_RUN_TOKEN" in line and line.isprintable() and len(line) < 400


def test_a_stranger_was_quicker_or_removed_a_key(service):
    service.values[place(0)] = signing.sign(place(0), "vote\n1")
    with pytest.raises(UserError, match=f"the key {place(0)} .* was set by somebody"):
        hosts.all_hosts(True)
    service.values[place(1, 1)] = b"any"
    service.before_reading = service.values.clear
    with pytest.raises(UserError, match="did not come together for 'vote': DEADLINE_EXCEEDED"):
        hosts.all_hosts(True)


@pytest.mark.parametrize("put", [b"", b"0 all is well", b"two \xff", b"9" * 10**5])
def test_a_stranger_says_that_a_process_left(put, service, monkeypatch):
    ended = []
    monkeypatch.setattr(hosts, "_left", threading.Event())

    def die(line, code=2):
        ended.append((line, code))
        hosts._left.set()

    monkeypatch.setattr(hosts, "_die", die)
    service.values[hosts.LEFT] = put
    hosts._listen()
    ((line, code),) = ended
    assert code == 2 and "mdt_jax/left at the coordinator" in line and line.isprintable()
    hosts._left.clear()
    service.values[hosts.LEFT] = signing.sign(hosts.LEFT, "130 process 1 stopped: é")
    hosts._listen()
    assert ended[1] == ("process 1 stopped: é", 130)


def free_ports() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_the_roll_is_called_among_strangers(monkeypatch):
    """Two of three come; others say nothing, or that they are process 2."""
    coordinator = f"127.0.0.1:{free_ports()}"
    port = roll_call.roll_call_port(int(coordinator.rpartition(":")[2]))
    lines, never = {}, threading.Event()

    def hold(process):
        lines[process] = roll_call.hold(coordinator, process, 3, 3, never)

    threads = [threading.Thread(target=hold, args=(process,)) for process in (0, 1)]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    for said in (b"2", b"-1", b"\xff" * 99, signing.sign("mdt_jax/report", "2")[:-1] + b"1"):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
            stranger.sendall(said)
    silent = socket.create_connection(("127.0.0.1", port), timeout=5)
    for thread in threads:
        thread.join(timeout=20)
    silent.close()
    assert time.monotonic() - began < 10
    assert lines == dict.fromkeys((0, 1), "process 2 of 3 did not come within 3 s")


def test_where_the_first_process_listens(monkeypatch):
    """Its own address alone where that is told by number; the name may mean another elsewhere."""
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
    assert roll_call.bind_address("127.0.0.1:1234") == "127.0.0.1:1234"
    for other in ("localhost:1234", "node-7:1234", "192.0.2.1:1234", "[2001:db8::1]:1234"):
        assert roll_call.bind_address(other) is None
    if socket.has_dualstack_ipv6():
        assert roll_call.bind_address("[::1]:1234") == "[::1]:1234"
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "10.0.0.7:99")
    assert roll_call.bind_address("127.0.0.1:1234") == "10.0.0.7:99"


def test_nobody_says_which_processes_there_are(service, monkeypatch):
    """A scheduler that does not answer is not waited for without end."""
    ended = []

    def die(line):
        ended.append(line)
        raise SystemExit

    monkeypatch.setattr(hosts, "_die", die)
    hosts._state.client = None
    with pytest.raises(SystemExit):
        hosts._roll_call(0.2, threading.Event())
    assert ended == ["nobody said within 0 s which processes there are"]
