"""benchmarks/reproduce.py on small networks, which a server here gives for the released ones."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from mdt_jax.evaluation import references
from mdt_jax.evaluation.features import Accumulator
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights import kinds, networks, torch_files
from mdt_jax.weights.mdt_names import dit
from tests.conftest import ROOT, exits_with_one_line
from tests.hub_server import released, running
from tests.measuring import crops
from tests.models.common import random_params

pytest.importorskip("torch")
sys.path.insert(0, str(ROOT / "benchmarks"))

import reproduce  # noqa: E402

# The bench with 8 samples of 16×16 for 50,000 of 256×256, and its downloads from a server here.
# What takes long is done once: the Inception is read, and in all runs the reference decomposed.
SMALL = """
import dataclasses, functools, hashlib, pathlib, sys
sys.path.insert(0, "benchmarks")
import numpy as np
import reproduce
from mdt_jax import cli, evaluate
from mdt_jax.evaluation import evaluator, feature_networks, features
feature_networks.EACH_DEVICE, features.SLICE = 2, 4
load_once = functools.cache(feature_networks.load_inception)
evaluator.load_inception = evaluate.load_inception = load_once
known, eigh = pathlib.Path(sys.argv.pop(1)), np.linalg.eigh

def remembered(matrix):
    path = known / hashlib.sha256(np.ascontiguousarray(matrix)).hexdigest()
    if len(matrix) < 1000:
        return eigh(matrix)
    if not path.exists():
        with reproduce.atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, *eigh(matrix))
    return tuple(np.load(path).values())

np.linalg.eigh = remembered
reproduce.SAMPLES, reproduce.FAST, reproduce.SIZE = 8, 5, 16
server, inception = sys.argv.pop(1), sys.argv.pop(1)
reproduce.REFERENCE, reproduce.INCEPTION = f"{server}/reference.npz", f"{server}/{inception}"
dit = reproduce.ROWS["dit-xl2-g"]
reproduce.ROWS["dit-xl2-g"] = dataclasses.replace(dit, checkpoint=f"{server}/DiT-XL-2-256x256.pt")
cli.run(reproduce.bench)
"""


class Handler(http.server.BaseHTTPRequestHandler):
    """server.files: content by path, of which ranges can be asked for; server.hangs_up."""

    def do_GET(self):
        content, start = self.server.files.get(self.path), 0
        if content is None:
            return self.send_error(404)
        if asked := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
            if start >= len(content):
                return self.send_error(416)
        self.server.starts.append(start)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = len(content) // 2 if self.server.hangs_up else len(content)
        self.wfile.write(content[start:end])

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(files):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.starts, server.hangs_up = files, [], False
    with running(server):
        yield server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The downloads but for the hub's, and the environment in which the hub is here."""
    from tests.fid_packages import random_state

    folder, random = tmp_path_factory.mktemp("served"), np.random.default_rng(0)
    accumulator = Accumulator()
    for n in range(2):  # ADM's file has the statistics of images that it does not hold
        draws = {
            name: random.random((12, size)) for name, size in (("pool", 2048), ("spatial", 2023))
        }
        accumulator.add(12 * n, draws)
    references.save(folder / "reference.npz", accumulator.result(), crops(4, 2, 16))
    torch_files.write_arrays(folder / "fid.pth", random_state())
    inception = (folder / "fid.pth").read_bytes()
    name = f"pt_inception-{hashlib.sha256(inception).hexdigest()[:8]}.pth"
    network = dit(input_size=(8, 8), in_channels=4, hidden_size=64, depth=2, num_heads=1)
    networks.save(folder / "dit.pt", kinds.Weights(network, random_params(network)))
    files = {
        "/reference.npz": (folder / "reference.npz").read_bytes(), f"/{name}": inception,
        "/DiT-XL-2-256x256.pt": (folder / "dit.pt").read_bytes(),
    }  # fmt: skip
    with released(folder) as hub, serving(files) as server:
        server.environment = os.environ | hub | {"PYTHONPATH": str(ROOT)}
        server.inception, server.known = name, folder / "decomposed"
        server.known.mkdir()
        yield server


def start(server, workdir, *flags):
    command = [sys.executable, "-c", SMALL, str(server.known), server.endpoint, server.inception]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", "--batch_size=2", *flags], cwd=ROOT, text=True,
        env=server.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ends(process, expect=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == expect, out + err
    return out, err


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """The workdir of a run of mdtv2-xl2-g, and what it printed."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, *ends(start(server, workdir, "--row=mdtv2-xl2-g"))


def test_a_row_from_download_to_verdict(undisturbed):
    workdir, out, err = undisturbed
    report = json.loads((workdir / "mdtv2-xl2-g.json").read_text())
    how = report["card"]["samples"]["how"]
    published = {
        "sampler": "ddpm", "num_steps": 250, "spacing": "even", "guidance": "power_cosine",
        "guidance_scale": 3.8, "guidance_power": 4.0, "guidance_channels": 3, "labels": "random",
        "clip_denoised": False, "dtype": "float32", "seed": 0, "num_samples": 8,
        "vae_scale": 0.18215,
    }  # fmt: skip
    assert how | published == how
    assert (how["checkpoint"], how["vae"]) == (
        "hf://shgao/MDT-XL2/mdt_xl2_v2_ckpt.pt", "hf://stabilityai/sd-vae-ft-ema",
    )  # fmt: skip
    rows = {row["metric"]: row for row in report["metrics"]}
    measured = report["card"]["measured"]
    assert {name: row["measured"] for name, row in rows.items()} == {
        name: measured[name] for name in ("fid", "sfid", "inception_score", "precision", "recall")
    }
    for row in rows.values():
        gap = abs(row["measured"] - float(row["published"]))
        assert row["verdict"] == ("within" if gap <= row["tolerance"] else "outside")
        assert np.isfinite(row["standard_error"])
    assert rows["fid"]["verdict"] == "outside" and rows["fid"]["standard_error"] > 0
    assert all(len(digest) == 64 for digest in report["sha256"].values())
    assert report["seconds"]["sampling"] > 0 and not report["resumed"]
    assert "| FID |" in out and "1 of 3" in err and "2 of 3" in err and "3 of 3" in err
    line = (workdir / "mdtv2-xl2-g.md").read_text()
    assert line.startswith("| MDTv2-XL/2-G | ") and report["sha256"]["weights"][:8] in line
    assert sorted(path.name for path in workdir.iterdir() if "mdtv2" in path.name) == [
        "mdtv2-xl2-g.card.json", "mdtv2-xl2-g.json", "mdtv2-xl2-g.md", "mdtv2-xl2-g.npz",
    ]  # fmt: skip


def test_killed_in_sampling_and_in_measuring_and_resumed(server, undisturbed, tmp_path):
    """kill -9; the figures are then those of the undisturbed run."""
    stages = (
        ("mdtv2-xl2-g.npz.parts", "*.npy"),
        ("mdtv2-xl2-g.card.json.features", "samples/*.npz"),
    )
    for folder, pattern in stages:
        process, until = start(server, tmp_path, "--row=mdtv2-xl2-g"), time.time() + 200
        while not list((tmp_path / folder).glob(pattern)):
            assert process.poll() is None and time.time() < until, process.communicate()
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert not (tmp_path / "mdtv2-xl2-g.json").exists()
    downloads = len(server.starts)
    ends(start(server, tmp_path, "--row=mdtv2-xl2-g"))
    assert len(server.starts) == downloads
    ours, theirs = (
        json.loads((folder / "mdtv2-xl2-g.json").read_text())
        for folder in (tmp_path, undisturbed[0])
    )
    assert ours["resumed"] and ours["metrics"] == theirs["metrics"]
    assert ours["sha256"] == theirs["sha256"]


@pytest.mark.parametrize(
    ("row", "network", "guidance"),
    [
        ("mdt-xl2-g", "MDT v1, hidden size 16, depth 4 (2 decode)", ("power_cosine", 3.8, 4.0)),
        ("dit-xl2-g", "DiT, hidden size 64, depth 2", ("constant", 1.5, 4.0)),
    ],
)
def test_fewer_samples_have_fewer_verdicts(row, network, guidance, server, undisturbed):
    workdir = undisturbed[0]
    flags = (f"--row={row}", "--fast", "--seed=1", "--dtype=bfloat16")
    out, _ = ends(start(server, workdir, *flags))
    report = json.loads((workdir / f"{row}-fast.json").read_text())
    how = report["card"]["samples"]["how"]
    assert (how["seed"], how["dtype"], how["num_samples"]) == (1, "bfloat16", 5)
    names = ("guidance", "guidance_scale", "guidance_power")
    assert how["network"].startswith(network) and tuple(how[name] for name in names) == guidance
    assert (how["sampler"], how["num_steps"], how["guidance_channels"]) == ("ddpm", 250, 3)
    judged = {each["metric"] for each in report["metrics"] if each["tolerance"] is not None}
    assert judged == {"precision"}
    assert re.search(r"\| FID \| .* \| not comparable: of 5 samples; about [1-9][0-9.]* of it", out)


def test_the_vae(server, undisturbed, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    from PIL import Image

    for n, image in enumerate(crops(3, 3, 32)):
        Image.fromarray(image).save(images / f"{n}.png")
    workdir = undisturbed[0]
    out, _ = ends(start(server, workdir, "--row=sd-vae", f"--images={images}"))
    assert re.search(r"\| rFID \| [0-9.]+ \| 4.42 \|  \| not comparable: published for 5,000", out)
    report = json.loads((workdir / "sd-vae.json").read_text())
    assert report["card"]["images"]["shape"] == [16, 16, 3]
    assert report["row"] == "sd-vae-ft-ema" and len(report["sha256"]["images"]) == 64


def test_an_interrupted_download_is_continued(tmp_path, capsys):
    content = np.random.default_rng(0).bytes(3 * 2**20 + 5)
    name = f"weights-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    with serving({f"/{name}": content}) as server:
        server.hangs_up = True
        with pytest.raises(UserError, match="rerun to continue"):
            reproduce.download(f"{server.endpoint}/{name}", tmp_path, "inception")
        assert [path.name for path in tmp_path.iterdir()] == [f"{name}.part"]
        server.hangs_up = False
        path = reproduce.download(f"{server.endpoint}/{name}", tmp_path, "inception")
        assert (tmp_path / name).read_bytes() == content and path == str(tmp_path / name)
        assert server.starts == [0, len(content) // 2]
        reproduce.download(f"{server.endpoint}/{name}", tmp_path, "inception")
        assert len(server.starts) == 2


def test_a_damaged_download_is_discarded(tmp_path):
    with serving({"/weights-0123abcd.pth": b"damaged"}) as server:
        with pytest.raises(UserError, match="SHA-256 is .*, not 0123abcd"):
            reproduce.download(f"{server.endpoint}/weights-0123abcd.pth", tmp_path, "inception")
        assert not list(tmp_path.iterdir())
        (tmp_path / "weights-0123abcd.pth.part").write_bytes(b"longer than the file")
        with pytest.raises(UserError, match="416"):
            reproduce.download(f"{server.endpoint}/weights-0123abcd.pth", tmp_path, "inception")
        assert not list(tmp_path.iterdir())


def test_mistakes_are_one_line(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "INCEPTION", "http://127.0.0.1:9/inception.pth")
    dit_row = dataclasses.replace(
        reproduce.ROWS["dit-xl2-g"], checkpoint=f"{server.endpoint}/none.pt"
    )
    monkeypatch.setitem(reproduce.ROWS, "dit-xl2-g", dit_row)
    small = tmp_path / "small.npz"
    small.write_bytes(server.files["/reference.npz"])
    bare = tmp_path / "bare.npz"
    np.savez(bare, arr_0=crops(4, 0, 16))
    damaged = tmp_path / "damaged.npz"
    content = bytearray(small.read_bytes())
    content[2000] ^= 1  # in arr_0
    damaged.write_bytes(content)
    given = tmp_path / "fid.pth"
    given.write_bytes(server.files[f"/{server.inception}"])
    for flags, message in (
        (["--row=mdtv3"], "invalid choice"),
        (["--row=sd-vae"], "needs --images"),
        (["--row=sd-vae", "--images=x", "--fast"], "--fast is for rows of samples"),
        (["--row=mdt-xl2-g", "--images=x"], "--images is for --row=sd-vae"),
        (["--row=mdt-xl2-g"], "give the file: --inception=FILE"),
        (["--row=mdt-xl2-g", f"--inception={given}", f"--reference={small}"], "images of 16×16"),
        (["--row=mdt-xl2-g", f"--inception={given}", f"--reference={bare}"], "lacks mu"),
        (["--row=mdt-xl2-g", f"--inception={given}", "--reference=none.npz"], "none.npz"),
        (["--row=dit-xl2-g"], "give the file: --checkpoint=FILE"),
    ):
        monkeypatch.setattr(reproduce, "log", lambda line: None)
        argv = [*flags, f"--workdir={tmp_path / 'work'}"]
        assert message in exits_with_one_line(reproduce.bench, argv, capsys, monkeypatch)
    monkeypatch.setattr(reproduce, "SIZE", 16)
    argv = ["--row=mdt-xl2-g", f"--inception={given}", f"--reference={damaged}", argv[-1]]
    assert "damaged.npz" in exits_with_one_line(reproduce.bench, argv, capsys, monkeypatch)
    assert not [path for path in (tmp_path / "work").iterdir() if "mdt" in path.name]


def test_what_can_be_compared():
    errors = dict.fromkeys(reproduce.ROWS["mdt-xl2-g"].published, 0.001)
    published = reproduce.ROWS["mdt-xl2-g"].published
    measured = {name: float(text) for name, text in published.items()}

    def judged(count):
        rows = reproduce.verdicts(measured, published, errors, count, {"fid": 5.0, "sfid": 9.0})
        return {row["metric"]: row["verdict"].partition(":")[0] for row in rows}

    assert set(judged(50_000).values()) == {"within"}
    few = judged(5_000)
    assert {name for name, verdict in few.items() if verdict == "within"} == {
        "precision", "inception_score",
    }  # fmt: skip
    measured["fid"] += 0.2
    assert judged(50_000)["fid"] == "outside"
