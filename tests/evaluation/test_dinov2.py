"""python -m mdt_jax.evaluate --features=dinov2, with a small network."""

import json

import numpy as np
import pytest

from mdt_jax import evaluate
from mdt_jax.evaluation import feature_networks, features, metrics
from mdt_jax.weights import torch_files
from tests.adm import adm_frechet
from tests.conftest import exits_with_one_line, run_here
from tests.measuring import assert_equal, crops, measured
from tests.small_data import write_vae

dinov2 = pytest.importorskip("tests.dinov2")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """samples.npz, real.npz, vit.pth, and card.json of the first against the second."""
    folder = tmp_path_factory.mktemp("sets")
    np.savez(folder / "samples.npz", arr_0=crops(6, 1))
    np.savez(folder / "real.npz", arr_0=crops(10, 2))
    torch_files.write_arrays(folder / "vit.pth", dinov2.random_state())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_networks, "EACH_DEVICE", 2)
        run_here(evaluate.main, *flags(folder), f"--out={folder}/card.json")
        yield folder


def flags(folder, **others) -> list[str]:
    given = {
        "samples": folder / "samples.npz", "reference": folder / "real.npz",
        "dinov2": folder / "vit.pth", "features": "dinov2", **others,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in given.items()]


def found_by_hand(folder, name: str) -> np.ndarray:
    network = feature_networks.load_dinov2(str(folder / "vit.pth"))
    return network(np.load(folder / f"{name}.npz")["arr_0"])["dinov2"]


def test_the_card_and_its_metrics_by_hand(sets):
    card = json.loads((sets / "card.json").read_text())
    samples, real = (found_by_hand(sets, name) for name in ("samples", "real"))
    assert samples.shape == (6, 128) and samples.dtype == np.float32
    ours = card["measured"]
    assert set(ours) == {"num_samples", "fd_dinov2", "kd_dinov2"}
    assert ours["fd_dinov2"] == pytest.approx(adm_frechet(samples, real), rel=1e-6)
    expected = metrics.kernel_distance(real, samples)
    assert ours["kd_dinov2"] == pytest.approx(expected, rel=1e-9)
    (note,) = card["features"]
    assert note["features"] == "dinov2" and note["width"] == 128 and note["dinov2_sha256"]
    assert "224×224 by Pillow's bicubic filter" in note["resized"]


def test_weights_of_hugging_face_are_the_same(sets, tmp_path):
    """A folder with the names of files and arrays that facebook/dinov2-large has."""
    state = dinov2.hugging_face(dinov2.random_state())
    torch_files.write_arrays(tmp_path / "model.safetensors", state)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2", "hidden_size": 128}')
    (note,) = json.loads((sets / "card.json").read_text())["features"]
    theirs = feature_networks.load_dinov2(str(tmp_path)).note
    assert theirs["dinov2_sha256"] == note["dinov2_sha256"]


def test_another_size_of_network_is_said(sets, tmp_path):
    printed = run_here(evaluate.main, *flags(sets, out=tmp_path / "card.json"))
    assert (
        "FD-DINOv2 is defined with ViT-L/14, of width 1024, but --dinov2 has width 128" in printed
    )
    assert "FD-DINOv2" in printed and "KD-DINOv2" in printed


def test_a_reference_of_statistics(sets, tmp_path, capsys, monkeypatch):
    out = tmp_path / "reference.npz"
    make = [f"--make_reference={sets}/real.npz", f"--out={out}", *flags(sets)[2:]]
    run_here(evaluate.main, *make)
    made = np.load(out)
    assert set(made) == {"arr_0", "count", "mu_dinov2", "sigma_dinov2"}
    rows = found_by_hand(sets, "real").astype(np.float64)
    np.testing.assert_allclose(made["mu_dinov2"], rows.mean(0), rtol=1e-9)
    np.testing.assert_allclose(made["sigma_dinov2"], np.cov(rows, rowvar=False), atol=1e-9)
    run_here(evaluate.main, *flags(sets, reference=out, out=tmp_path / "card.json"))
    assert_equal(measured(tmp_path / "card.json"), measured(sets / "card.json"))
    run_here(evaluate.main, *make)  # over an older one
    statistics = {name: made[name] for name in ("mu_dinov2", "sigma_dinov2")}
    np.savez(tmp_path / "mu.npz", **statistics)
    run_here(evaluate.main, *flags(sets, reference=tmp_path / "mu.npz", out=tmp_path / "mu.json"))
    found = measured(tmp_path / "mu.json")
    assert set(found) == {"num_samples", "fd_dinov2"}
    assert found["fd_dinov2"] == pytest.approx(measured(sets / "card.json")["fd_dinov2"], rel=1e-9)
    # Some of the real images stand for all only where no statistics are asked for.
    argv = flags(sets, reference=out, features="inception")
    argv = [flag for flag in argv if not flag.startswith("--dinov2")]
    printed = exits_with_one_line(evaluate.main, argv, capsys, monkeypatch)
    assert "reference.npz has statistics, but no mu and sigma of inception; make a" in printed


def test_an_interrupted_measurement_goes_on(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "SLICE", 4)
    out, run, seen = tmp_path / "card.json", feature_networks.Dinov2Features.__call__, []

    def interrupted(network, images):
        seen.append(len(images))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return run(network, images)

    monkeypatch.setattr(feature_networks.Dinov2Features, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(["evaluate", *flags(sets, features="dinov2,pixels", out=out)])
    assert seen == [4, 2, 4, 4] and not out.exists()
    assert len(list(tmp_path.glob("card.json.features/*/*.npz"))) == 3
    run_here(evaluate.main, *flags(sets, features="dinov2,pixels", out=out))
    assert seen[4:] == [4, 2] and not (tmp_path / "card.json.features").exists()
    found = measured(out)
    assert found.pop("frechet_distance") > 0
    assert_equal(found, measured(sets / "card.json"))


BAD = {
    "no weights": ({"dinov2": ""}, "dinov2 needs weights, --dinov2=FILE: dinov2_vitl14_pretrain"),
    "a VAE's weights": ({"dinov2": "SETS/vae.safetensors"}, "holds a VAE, not a DINOv2"),
    "weights without features": ({"features": "pixels"}, "--dinov2 is for --features=dinov2"),
    "statistics of another network": (
        {"reference": "SETS/adm.npz"},
        "adm.npz has statistics, but no mu_dinov2 and sigma_dinov2 of dinov2; make a reference",
    ),
    "statistics of another size": (
        {"reference": "SETS/large.npz"},
        "large.npz has statistics of 1024 features, but dinov2 has 128: they are of another",
    ),
    "half of the statistics": (
        {"reference": "SETS/half.npz"},
        "half.npz has one of mu_dinov2 and sigma_dinov2 without the other",
    ),
}


@pytest.fixture(scope="module")
def bad(sets):
    write_vae(sets / "vae.safetensors")
    np.savez(sets / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048), arr_0=crops(5, 0))
    np.savez(sets / "large.npz", mu_dinov2=np.zeros(1024), sigma_dinov2=np.eye(1024))
    np.savez(sets / "half.npz", mu_dinov2=np.zeros(128))
    return sets


@pytest.mark.parametrize("name", BAD)
def test_mistakes(name, bad, capsys, monkeypatch, in_root):
    given, message = BAD[name]
    before = sorted(bad.rglob("*"))
    argv = [flag.replace("SETS", str(bad)) for flag in flags(bad, **given)]
    assert message in exits_with_one_line(evaluate.main, argv, capsys, monkeypatch)
    assert sorted(bad.rglob("*")) == before


def test_a_reference_is_made_by_networks_alone(sets, tmp_path, capsys, monkeypatch):
    argv = [f"--make_reference={sets}/real.npz", f"--out={tmp_path}/x.npz", "--features=pixels"]
    printed = exits_with_one_line(evaluate.main, argv, capsys, monkeypatch)
    assert "--make_reference takes --features of inception, dinov2, not pixels" in printed
