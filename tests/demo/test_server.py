"""The page's server as a process, asked by gradio_client as a user's program would."""

import contextlib
import http.client
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from mdt_jax import sample
from tests.conftest import ROOT, run_here, start_command
from tests.docs.pages import PAGE_COMMANDS
from tests.runs import DIGITS

gradio_client = pytest.importorskip("gradio_client")
pytestmark = pytest.mark.processes

NAMES = {
    "/weight", "/draw", "/watch", "/picture", "/mask", "/sample_picture", "/inpaint", "/stop",
    "/run", "/grid",
}  # fmt: skip
# The fields of "How to sample": sampler, steps, spacing, scale, power, from, up to.
OPTIONS = ["ddim", 4, "even", 2, 4, 0, 1]
SLOW = ["ddpm", 1000, *OPTIONS[2:]]


def served(*flags: str, cwd=ROOT):
    """(process, link) of a page on a free port."""
    return page_of(start_command("mdt_jax.demo", "--port=0", *flags, cwd=cwd, PYTHONPATH=str(ROOT)))


@contextlib.contextmanager
def page_of(process):
    """(process, link) of a page that is being started."""
    try:
        link = ""
        while not link:
            line = process.stdout.readline()
            assert line, process.communicate()
            link = "".join(re.findall(r"the page is at (http://\S+:\d+/)", line))
        yield process, link
    finally:
        process.terminate()
        _, printed = process.communicate(timeout=60)
        assert "Traceback" not in printed, printed


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):
    """Of two runs: `whole`, and `bare`, which has no samples yet."""
    runs = tmp_path_factory.mktemp("runs")
    (runs / "whole").symlink_to(trained)
    (runs / "bare").mkdir()
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(trained / name, runs / "bare")
    with served(f"--checkpoint={DIGITS}", f"--workdir={runs}") as both:
        yield both


@pytest.mark.parametrize("command", PAGE_COMMANDS)
def test_commands_of_the_pages(command, trained, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(trained)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))  # the run lies elsewhere
    with served(*shlex.split(command)[3:], cwd=tmp_path) as (_, link):
        assert get(link, "/") == 200
        client = gradio_client.Client(link, verbose=False, download_files=str(tmp_path / "got"))
        assert Image.open(client.predict("digits", 1, api_name="/grid")).size[0] > 100


def test_the_space():
    process = subprocess.Popen(
        [sys.executable, ROOT / "launch" / "space" / "app.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CHECKPOINT": DIGITS},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with page_of(process) as (_, link):
        assert get(link, "/") == 200


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


def test_values_that_no_slider_has(client):
    for scale in (20, None, -1):
        options = [*OPTIONS[:3], scale, *OPTIONS[4:]]
        *_, state, _ = last(client.submit([3], 1, 0, False, *options, api_name="/draw"))
        assert "Done." in state if scale else "guidance_scale is empty" in state


def test_a_mistake_is_a_sentence(client):
    *_, state, _ = last(client.submit([3], 4, -1, False, *OPTIONS, api_name="/draw"))
    assert 'class="error"' in state and "seed is -1" in state and "Traceback" not in state


def test_the_run(client):
    grid = client.predict("whole", 7, api_name="/grid")  # beyond the last
    assert Image.open(grid).size[0] > 100
    state, curves, *_ = client.predict("whole", 0, api_name="/run")
    assert "Finished after 4 steps." in state and "<svg" in curves
    grid = client.predict("whole", 1, api_name="/grid")
    assert Image.open(grid).size[0] > 100
    for _ in range(2):
        *_, slider, grid = client.predict("bare", 0, api_name="/run")
        assert slider["value"] == 0 and grid is None
    state, curves, *_ = client.predict("../..", 0, api_name="/run")
    assert 'class="error"' in state and "there is no run" in state and not curves
    assert client.predict("../..", 0, api_name="/grid") is None


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
    assert listening(int(link.split(":")[2].strip("/"))) == {"0100007F"}  # 127.0.0.1


def listening(port: int) -> set[str]:
    """The addresses, in hexadecimal, on which this machine listens on a port."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in pathlib.Path("/proc/net", name).read_text().splitlines()[1:]:
            local, _, state = line.split()[1:4]
            address, number = local.split(":")
            if state == "0A" and int(number, 16) == port:
                found.add(address)
    return found


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
    mask = gradio_client.handle_file(str(one))
    _, state = client.predict(mask, api_name="/mask")
    assert "error" not in state
    elsewhere = {"path": f"{server[1]}file=x.png", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(Exception, match="not its URL"):
        client.predict(elsewhere, api_name="/picture")


def test_stop(client):
    job = client.submit([], 20, 0, False, *SLOW, api_name="/draw")
    while not job.outputs() or " of 1,000" not in job.outputs()[-1][1]:
        time.sleep(0.1)
    assert "Stopped" in client.predict(api_name="/stop")
    assert "Stopped." in last(job)[1]


def refused(*flags: str) -> str:
    process = start_command("mdt_jax.demo", *flags)
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 2 and printed.count("error: ") == 1, printed
    return printed


def test_starts_that_are_refused(server, tmp_path):
    port = server[1].split(":")[2].strip("/")
    of_it = f"--checkpoint={DIGITS}"
    assert f"port {port} of 127.0.0.1 cannot be used" in refused(of_it, f"--port={port}")
    assert "port is 70000" in refused(of_it, "--port=70000")
    assert "is no run" in refused(of_it, f"--workdir={tmp_path}")
    assert "--checkpoint=PATH to draw" in refused()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_end_in_the_middle(number, tmp_path, monkeypatch):
    """Ctrl-C ends a job, and deletes the pictures."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with served(f"--checkpoint={DIGITS}") as (process, link):
        client = gradio_client.Client(link, verbose=False, download_files=False)
        job = client.submit([], 100, 0, False, *SLOW, api_name="/draw")
        while not job.outputs() or " of 1,000" not in job.outputs()[-1][1]:
            time.sleep(0.1)
        assert list(tmp_path.glob("mdt_jax-demo-*"))
        process.send_signal(number)
        assert process.wait(30) == 0
    assert not list(tmp_path.glob("mdt_jax-demo-*"))
