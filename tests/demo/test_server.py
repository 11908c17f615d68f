"""The page's server as a process, asked by gradio_client as a user's program would."""

import contextlib
import http.client
import re
import shlex
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from mdt_jax import sample
from tests.conftest import ROOT, run_here, start_command
from tests.runs import DIGITS

gradio_client = pytest.importorskip("gradio_client")
pytestmark = pytest.mark.processes

NAMES = {
    "/weight", "/draw", "/watch", "/picture", "/mask", "/sample_picture", "/inpaint", "/stop",
    "/run", "/grid",
}  # fmt: skip
# The fields of "How to sample": sampler, steps, spacing, scale, power, from, up to.
OPTIONS = ["ddim", 4, "even", 2, 4, 0, 1]


@contextlib.contextmanager
def served(*flags: str):
    """(process, link) of a page on a free port."""
    process = start_command("mdt_jax.demo", "--port=0", *flags)
    try:
        link = ""
        while not link:
            line = process.stdout.readline()
            assert line, process.communicate()
            link = "".join(re.findall(r"the page is at (http://127\.0\.0\.1:\d+/)", line))
        yield process, link
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def server(trained):
    with served(f"--checkpoint={DIGITS}", f"--workdir={trained}") as both:
        yield both


@pytest.fixture
def client(server, tmp_path):
    return gradio_client.Client(server[1], verbose=False, download_files=str(tmp_path / "got"))


def last(job):
    job.result(timeout=300)
    return job.outputs()[-1]


def test_the_names_of_the_interface(client):
    assert {*client.view_api(return_format="dict", print_info=False)["named_endpoints"]} == NAMES
    text = (ROOT / "docs" / "demo.md").read_text()
    assert all(f"`{name}`" in text for name in NAMES)


def test_a_picture_is_that_of_the_command(client, tmp_path):
    pictures, state, command = last(client.submit([3, 8], 4, 7, False, *OPTIONS, api_name="/draw"))
    assert "Done." in state
    out = tmp_path / "samples.png"
    run_here(sample.main, *shlex.split(command)[3:-1], f"--out={out}")
    with open(pictures[0]["image"], "rb") as file:
        assert file.read() == out.read_bytes()


def test_a_mistake_is_a_sentence(client):
    *_, state, _ = last(client.submit([3], 4, -1, False, *OPTIONS, api_name="/draw"))
    assert 'class="error"' in state and "seed is -1" in state and "Traceback" not in state


def test_the_run(client):
    state, curves, *_ = client.predict(".", 0, api_name="/run")
    assert "Finished after 4 steps." in state and "<svg" in curves
    grid = client.predict(".", 1, api_name="/grid")
    assert Image.open(grid).size[0] > 100
    with pytest.raises(Exception, match="not in the list of choices"):
        client.predict("../..", 0, api_name="/run")


def get(link: str, path: str, **headers) -> int:
    host = link.split("/")[2]
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET", path, headers=headers)
    return connection.getresponse().status


def test_nothing_else_is_served(server, trained):
    _, link = server
    assert get(link, "/") == 200
    for path in ("/etc/passwd", DIGITS, trained / "config.json", ROOT / "setup.py", "../setup.py"):
        for route in ("/gradio_api/file=", "/file="):
            assert get(link, f"{route}{path}") in (403, 404)
    listening = subprocess.run(
        ["ss", "-ltnH"], capture_output=True, text=True, check=False
    ).stdout  # fmt: skip
    port = link.split(":")[2].strip("/")
    for line in listening.splitlines():
        if line.split()[3].endswith(f":{port}"):
            assert line.split()[3] == f"127.0.0.1:{port}"


def rss(process) -> int:
    """The memory of a process in MB."""
    with open(f"/proc/{process.pid}/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) // 1000


def test_many_at_once(server, tmp_path):
    process, link = server
    clients = [gradio_client.Client(link, verbose=False, download_files=False) for _ in range(8)]

    def ask(number: int) -> str:
        job = clients[number % 8].submit(
            [number % 10], 1, number, False, *OPTIONS, api_name="/draw"
        )
        return last(job)[1]

    with ThreadPoolExecutor(50) as pool:
        assert all("Done." in state for state in pool.map(ask, range(50)))
        before = rss(process)
        assert all("Done." in state for state in pool.map(ask, range(50)))
    assert rss(process) < 1.1 * before + 50


def test_uploads(client, server, tmp_path):
    def sent(path) -> str:
        return client.predict(gradio_client.handle_file(str(path)), api_name="/picture")[-1]

    large = tmp_path / "large.png"
    large.write_bytes(np.random.default_rng(0).bytes(100_000_000))
    with pytest.raises(Exception, match="(?i)size|large"):
        sent(large)
    bomb = tmp_path / "bomb.png"
    Image.new("1", (60_000, 20_000)).save(bomb)
    assert "too large" in sent(bomb)
    one = tmp_path / "one.png"
    Image.new("L", (1, 1)).save(one)
    assert "Paint over" in sent(one)


def test_stop(client):
    slow = ["ddpm", 1000, "even", 2, 4, 0, 1]
    job = client.submit([], 20, 0, False, *slow, api_name="/draw")
    while not job.outputs() or " of 1,000" not in job.outputs()[-1][1]:
        time.sleep(0.1)
    assert "Stopped" in client.predict(api_name="/stop")
    assert "Stopped." in last(job)[1]


def test_a_port_that_is_taken(server):
    port = server[1].split(":")[2].strip("/")
    process = start_command("mdt_jax.demo", f"--checkpoint={DIGITS}", f"--port={port}")
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 2 and printed.count("error: ") == 1, printed
    assert f"--port={port} cannot be used" in printed
