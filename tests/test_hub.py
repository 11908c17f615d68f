"""Networks to the hub and back, in this process; tests/processes/test_hub.py has real ones."""

import json
import re

import jax
import numpy as np
import pytest

import mdt_jax
from mdt_jax import convert, evaluate, sample
from mdt_jax.models.autoencoder import AutoencoderKL
from mdt_jax.models.mdt import MDT
from mdt_jax.runtime import hub
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights import kinds, networks, picking, torch_files
from mdt_jax.weights.vae import Vae, recorded_norm
from tests.conftest import exits_with_one_line, run_here
from tests.hub_protocol import Repository
from tests.hub_server import serve, use_here
from tests.models.common import random_params
from tests.runs import DIGITS

pytest.importorskip("huggingface_hub")
PLACE = "hf://someone/net"
SMALL = dict(input_size=(8, 8), in_channels=3, hidden_size=16, depth=4, num_heads=2, num_classes=4)


@pytest.fixture
def server(tmp_path, monkeypatch):
    with serve({"/someone/other/resolve/main/notes.txt": b"notes"}) as server:
        use_here(server, monkeypatch, tmp_path / "cache")
        yield server


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


# --- Paths


@pytest.mark.parametrize(
    "path, place",
    [
        ("hf://o/r", ("o/r", None, "")),
        ("hf://o/r/", ("o/r", None, "")),
        ("hf://o/r/a/b.pt", ("o/r", None, "a/b.pt")),
        ("hf://o/r@v1.0", ("o/r", "v1.0", "")),
        ("hf://o/r@my%2Fbranch/x@y.pt", ("o/r", "my/branch", "x@y.pt")),
        ("hf://o/r@refs/pr/1/x.pt", ("o/r", "refs/pr/1", "x.pt")),
    ],
)
def test_a_path_names_a_repository_a_revision_and_a_file(path, place):
    assert hub.parse(path) == place
    assert hub.parse(str(hub.parse(path))) == place


@pytest.mark.parametrize("path", ["hf://", "hf://o", "hf:///r", "hf://o/r@/x", "hf://o/r/../x.pt"])
def test_what_is_no_path_on_the_hub(path):
    with pytest.raises(UserError, match="write hf://OWNER/REPOSITORY"):
        hub.parse(path)


# --- The file of a folder or repository

TAKEN = [
    (["README.md", "diffusion_pytorch_model.bin", "model.safetensors"], "model.safetensors"),
    (["model.safetensors.index.json", "a.pt"], "model.safetensors.index.json"),
    (["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"],
     "diffusion_pytorch_model.safetensors"),
    (["vae/diffusion_pytorch_model.bin", "transformer/diffusion_pytorch_model.bin"],
     "transformer/diffusion_pytorch_model.bin"),
    (["vae/x.bin", "transformer/diffusion_pytorch_model.fp16.safetensors"],
     "transformer/diffusion_pytorch_model.fp16.safetensors"),
    (["notes.txt", "net.pt", "old/net.pt"], "net.pt"),
]  # fmt: skip


@pytest.mark.parametrize("names, taken", TAKEN)
def test_the_file_that_is_taken(names, taken):
    assert picking.pick(names, None, "place") == taken


def test_a_vae_is_looked_for_in_a_folder_of_its_own():
    names = [f"{folder}/diffusion_pytorch_model.bin" for folder in ("transformer", "vae")]
    assert picking.pick(names, "vae", "place") == names[1]


@pytest.mark.parametrize(
    "names, message",
    [
        (["a.pt", "b.pt", "x"], "but a.pt, b.pt; append one, as in hf://o/r/a.pt"),
        (["sub/a.pt"], "but sub/a.pt; append one, as in hf://o/r/sub/a.pt"),
        (["x.onnx"], "but x.onnx$"),
        (["x-00001-of-00002.safetensors"], "but x-00001-of-00002.safetensors$"),
        ([], "but no file$"),
        ([f"{i}.pt" for i in range(30)], "9.pt and 20 more; append one"),
    ],
)
def test_where_no_file_is_taken_the_files_are_listed(names, message):
    with pytest.raises(UserError, match=message):
        picking.pick(names, None, "hf://o/r")


def test_a_local_folder_of_files(tmp_path):
    model = MDT(**SMALL)
    weights = kinds.Weights(model, random_params(model))
    networks.save(tmp_path / "net.pt", weights)
    assert same(mdt_jax.load(tmp_path).params, weights.params)
    (tmp_path / "transformer").mkdir()
    other = kinds.Weights(model, random_params(model, 1))
    networks.save(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", other)
    assert same(mdt_jax.load(tmp_path).params, other.params)
    networks.save(tmp_path / "copy.pt", weights)
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"but copy.pt, net.pt; append one, as in .*/copy.pt"):
        mdt_jax.load(tmp_path)


# --- To the hub and back

KINDS = {
    "v1": {},
    "three decode": {"decoder_layers": 3},
    "v2": {"depth": 6, "version": "v2"},
    "fixed positions": {"learned_position": False},
    "no bias": {"relative_bias": False},
    "neither": {"learned_position": False, "relative_bias": False, "version": "v2", "depth": 6},
    "DiT": {"decoder_layers": 0, "side_layers": 0, "relative_bias": False,
            "learned_position": False, "num_heads": 4, "timestep_shift": 1},
    "DiT of MDT's defaults": {"decoder_layers": 0, "relative_bias": False, "num_heads": 4},
    "switches": {"asymmetric": False, "masked_shortcut": False, "input_size": (8, 12)},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_comes_back_as_it_was(kind, tmp_path, server, monkeypatch):
    model = MDT(**SMALL | KINDS[kind])
    weights = kinds.Weights(
        model, random_params(model), item="raw", classes=tuple("abcd"), step=7, vae_sha256="ab"
    )
    networks.save(tmp_path / "folder", weights)
    printed = run_here(convert.main, f"--src={tmp_path}/folder", f"--dst={PLACE}")
    assert "/someone/net/commit/" in printed.splitlines()[-1], printed
    found = networks.load_weights(PLACE)
    assert found._replace(params={}) == weights._replace(params={})
    assert same(found.params, weights.params)
    for name, content in server.repositories["someone/net"].files.items():
        (tmp_path / name).write_bytes(content)
    assert same(networks.load_weights(tmp_path).params, weights.params)


def test_a_vae_comes_back_with_its_norms_and_factor(tmp_path, server):
    vae = AutoencoderKL(channels=(8, 16), layers=1, groups=4)
    params = jax.jit(vae.init)(jax.random.key(0), np.zeros((1, 4, 4, 3), np.float32))["params"]
    weights = kinds.Weights(vae, params, latents={"scaling_factor": 0.5})
    networks.save(tmp_path / "vae", weights)
    run_here(convert.main, f"--src={tmp_path}/vae", f"--dst={PLACE}")
    found = Vae.load(PLACE)
    assert found.network == vae and same(found.params, params)
    assert recorded_norm(PLACE).get("scale") == found.norm.scale == 0.5


def test_a_run_is_private_with_its_figures(trained, tmp_path, server):
    printed = run_here(convert.main, f"--src={trained}", f"--dst={PLACE}")
    repository = server.repositories["someone/net"]
    assert repository.private and "stays" not in printed
    run, found = mdt_jax.load(trained), mdt_jax.load(PLACE)
    assert same(found.params, run.params) and found.model == run.model
    assert found.config == run.config and found.classes == run.classes
    assert (found.weights.step, found.weights.item) == (4, "ema")
    assert np.array_equal(found.generate([3, 1], seed=5), run.generate([3, 1], seed=5))
    card = repository.files["README.md"].decode()
    report = json.loads((trained / "report.json").read_text())
    assert f"| Fréchet distance | {report['frechet_distance']:.6g} |" in card
    assert f"| SHA-256 of the parameters | {kinds.params_sha256(run.params)} |" in card
    for line in ("| sampler | ddpm |", "| steps | 3 |", "| guidance scale | 2 |", "| seed | 0 |",
                 "| samples | 20 |", "| step of the run | 4 |", "| model.hidden_size | 16 |",
                 f'pipeline = mdt_jax.load("{PLACE}")'):  # fmt: skip
        assert line in card, card


def test_cards_of_evaluate(tmp_path, server):
    out = tmp_path / "s.npz"
    run_here(sample.main, f"--checkpoint={DIGITS}", "--num_samples=30", "--num_steps=2",
             "--sampler=ddim", "--guidance_scale=1.5", "--seed=3", f"--out={out}")  # fmt: skip
    run_here(evaluate.main, f"--samples={out}", "--reference=digits", "--features=pixels")
    argv = [f"--dst={PLACE}", f"--card={out}.json"]
    run_here(convert.main, f"--src={DIGITS}", "--public", *argv)
    repository = server.repositories["someone/net"]
    card = json.loads((tmp_path / "s.npz.json").read_text())
    text = repository.files["README.md"].decode()
    for line in (
        f"| Fréchet distance | {card['measured']['frechet_distance']:.6g} |", "| sampler | ddim |",
        "| guidance scale | 1.5 |", "| seed | 3 |", "| samples | 30 |", "| reference | digits |",
        f"| SHA-256 of the samples | {card['samples']['sha256']} |",
        f"| SHA-256 of the reference | {card['reference']['sha256']} |",
    ):  # fmt: skip
        assert line in text, text
    assert not repository.private and str(tmp_path) not in text

    model = MDT(**SMALL)
    networks.save(tmp_path / "other.pt", kinds.Weights(model, random_params(model)))
    before = dict(repository.refs)
    printed = run_here(convert.main, f"--src={tmp_path}/other.pt", *argv, expect=2)
    assert "s.npz.json is of weights of SHA-256 " in printed and printed.count("\n") == 1
    assert repository.refs == before


def test_other_files_and_who_may_see_them_stay(tmp_path, server):
    server.repositories["someone/net"] = repository = Repository(("someone",))
    repository.commit({"notes.txt": b"notes", "README.md": b"old"})
    argv = [f"--src={DIGITS}", f"--dst={PLACE}"]
    assert f"{PLACE} existed: it stays public" in run_here(convert.main, *argv)
    assert {*repository.files} == {"notes.txt", "README.md", "config.json", "model.safetensors"}
    assert len(repository.commits) == 2
    repository.private = True
    assert "it stays private" in run_here(convert.main, *argv, "--public")
    assert repository.private


def test_a_revision(tmp_path, server):
    run_here(convert.main, f"--src={DIGITS}", f"--dst={PLACE}@trial%2Fone")
    repository = server.repositories["someone/net"]
    assert "model.safetensors" not in repository.files
    for revision in ("trial%2Fone", repository.refs["trial/one"]):
        assert networks.load_weights(f"{PLACE}@{revision}").model.hidden_size == 64
    with pytest.raises(UserError, match="has no model.safetensors"):
        networks.load_weights(PLACE)
    with pytest.raises(UserError, match="the repository someone/net has no revision v9"):
        networks.load_weights(f"{PLACE}@v9")


def test_all_files_are_of_one_commit(tmp_path, server, monkeypatch):
    """Another upload between the downloads does not mix two networks."""
    model = MDT(**SMALL)
    folders = []
    for seed in range(2):
        weights = kinds.Weights(model, random_params(model, seed), step=seed + 1)
        networks.save(tmp_path / f"{seed}", weights)
        folders.append(weights)
    run_here(convert.main, f"--src={tmp_path}/0", f"--dst={PLACE}")
    at_commit = hub.at_commit

    def then_upload(path):
        found = at_commit(path)
        monkeypatch.setattr(hub, "at_commit", at_commit)
        run_here(convert.main, f"--src={tmp_path}/1", f"--dst={PLACE}")
        return found

    monkeypatch.setattr(hub, "at_commit", then_upload)
    first = networks.load_weights(PLACE)
    assert first.step == 1 and same(first.params, folders[0].params)
    assert networks.load_weights(PLACE).step == 2


def shards(folder):
    """A network in two shards with their index, in a folder; returns the network."""
    model = MDT(**SMALL)
    weights = kinds.Weights(model, random_params(model))
    networks.save(folder / "whole.safetensors", weights)
    arrays = torch_files.read_file(folder / "whole.safetensors").arrays
    where = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(arrays)}
    for shard in {*where.values()}:
        part = {name: array for name, array in arrays.items() if where[name] == shard}
        torch_files.write_arrays(folder / shard, part)
    index = json.dumps({"metadata": {}, "weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index)
    (folder / "whole.safetensors").unlink()
    return weights


def test_shards_and_a_missing_one(tmp_path, server):
    weights = shards(tmp_path)
    repository = server.repositories["someone/other"]
    repository.commit({file.name: file.read_bytes() for file in tmp_path.glob("model*")})
    assert same(networks.load_weights("hf://someone/other").params, weights.params)
    repository.commit({n: c for n, c in repository.files.items() if n != "model-1.safetensors"})
    with pytest.raises(UserError, match="model-1.safetensors: .*someone/other has no such file"):
        networks.load_weights("hf://someone/other")


def test_a_pipeline_of_diffusers(tmp_path, server):
    """Its transformer with the names of the classes, and its VAE, from one repository."""
    dit = dict(decoder_layers=0, side_layers=0, relative_bias=False, learned_position=False)
    model = MDT(**SMALL | dit | {"in_channels": 4, "num_classes": 1000})
    vae = AutoencoderKL(channels=(8, 16), layers=1, groups=4)
    params = jax.jit(vae.init)(jax.random.key(0), np.zeros((1, 4, 4, 3), np.float32))["params"]
    networks.save(tmp_path / "vae", kinds.Weights(vae, params, latents={"scaling_factor": 0.5}))
    names = tuple(f"class {number}" for number in range(1000))
    networks.save(tmp_path / "a", kinds.Weights(model, random_params(model), classes=names))
    run_here(convert.main, f"--src={tmp_path}/a", f"--dst={tmp_path}/b", "--format=diffusers",
             f"--vae={tmp_path}/vae")  # fmt: skip
    paths = [path for path in (tmp_path / "b").rglob("*") if path.is_file()]
    server.repositories["someone/other"].commit(
        {path.relative_to(tmp_path / "b").as_posix(): path.read_bytes() for path in paths}
    )
    for place in ("hf://someone/other", "hf://someone/other/transformer", str(tmp_path / "b")):
        found = networks.load_weights(place)
        assert found.model == model.clone(timestep_shift=1) and found.classes == names
    assert found.sampling == networks.load_weights("hf://someone/other").sampling != {}
    for place in ("hf://someone/other", "hf://someone/other/vae", str(tmp_path / "b")):
        assert Vae.load(place).network == vae and recorded_norm(place).get("scale") == 0.5


# --- What is refused


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("config.json", lambda text: text[:-20], "config.json cannot be read"),
        ("config.json", lambda text: text.replace(b'"step": 7', b'"step": 8'), "or was edited"),
        ("config.json", lambda text: b'{"model_type": "bert"}', ""),
        ("config.json", lambda text: b"[1]", "expected a JSON object"),
        ("model.safetensors", None, "its config.json was written for other weights; to read"),
        ("model.safetensors", dict(depth=5), r"other weights \(depth\)"),
    ],
)
def test_a_config_that_is_not_of_the_file(name, change, message, tmp_path, server):
    model = MDT(**SMALL)
    networks.save(tmp_path / "a", kinds.Weights(model, random_params(model), step=7))
    run_here(convert.main, f"--src={tmp_path}/a", f"--dst={PLACE}")
    repository = server.repositories["someone/net"]
    changed = dict(repository.files)
    if name == "config.json":
        changed[name] = change(changed[name])
    else:
        model = MDT(**SMALL | (change or {}))
        networks.save(tmp_path / name, kinds.Weights(model, random_params(model, 9)))
        changed[name] = (tmp_path / name).read_bytes()
    repository.commit(changed)
    if not message:  # another program's
        found = networks.load_weights(PLACE)
        assert found.model == model and found.step is None
        return
    with pytest.raises(UserError, match=message) as raised:
        networks.load_weights(PLACE)
    assert str(raised.value).count("\n") == 0 and PLACE in str(raised.value)


REFUSED = {
    "no login": (PLACE, "", [], r"to upload, log in \(hf auth login\) or set HF_TOKEN"),
    "unknown token": (PLACE, "hf_none", [], "the hub does not accept the token; log in"),
    "a token to read": (PLACE, "hf_reader", [], "the token may not write there"),
    "another's": ("hf://stranger/net", "hf_writer", [], 'under the namespace "stranger"'),
    "a bad name": ("hf://someone/n..t", "hf_writer", [], "n..t"),
    "a file": (f"{PLACE}/x.pt", "hf_writer", [], r"write hf://OWNER/REPOSITORY\[@REVISION\]"),
    "no path": ("hf://someone", "hf_writer", [], "write hf://OWNER/REPOSITORY"),
    "no card": (PLACE, "hf_writer", ["--card=none.json"], "--card=none.json does not exist"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_uploads(name, tmp_path, server, monkeypatch):
    place, token, flags, message = REFUSED[name]
    use_here(server, monkeypatch, tmp_path / "cache", token)
    if not token:
        from huggingface_hub import constants

        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    argv = [f"--src={DIGITS}", f"--dst={place}", *flags]
    printed = run_here(convert.main, *argv, expect=2).splitlines()
    assert len([line for line in printed if not line.startswith("uploading ")]) == 1
    assert re.search(message, printed[-1]), printed
    assert {*server.repositories} == {"someone/other"}


def test_a_model_that_files_cannot_hold_makes_no_repository(tmp_path, server, monkeypatch, capsys):
    model = MDT(**SMALL | {"num_classes": 0})
    networks.save(tmp_path / "a", kinds.Weights(model, random_params(model)))
    argv = [f"--src={tmp_path}/a", f"--dst={PLACE}"]
    printed = exits_with_one_line(convert.main, argv, capsys, monkeypatch)
    assert "no place for an unconditional model" in printed
    assert {*server.repositories} == {"someone/other"}


def test_flags_of_the_hub_alone(tmp_path, monkeypatch, capsys):
    argv = [f"--src={DIGITS}", f"--dst={tmp_path}/x.pt", "--public"]
    printed = exits_with_one_line(convert.main, argv, capsys, monkeypatch)
    assert "--public is for --dst=hf://" in printed


def test_private_and_gated_repositories(tmp_path, server, monkeypatch):
    for name in ("private", "gated"):
        server.repositories[f"club/{name}"] = Repository(("member",), **{name: True})
        server.repositories[f"club/{name}"].commit({"model.safetensors": b"x"})
    url = f"{server.endpoint}/club/gated"
    for path, message in (
        ("hf://club/private", "no such repository, or your token does not give access to it"),
        ("hf://club/gated", f"is gated; accept its terms at {url}, then log in"),
    ):
        with pytest.raises(UserError, match=message):
            networks.load_weights(path)
