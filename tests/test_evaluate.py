"""python -m mdt_jax.evaluate: measures, references, what goes on after a kill, and mistakes."""

import functools
import io
import json
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

import mdt_jax
from mdt_jax import cli, convert, encode, evaluate, info, inpaint, main, sample
from mdt_jax.data import sample_files, sources
from mdt_jax.evaluation import feature_networks, features, image_sets, metrics, references
from mdt_jax.evaluation.evaluator import Evaluator
from mdt_jax.evaluation.metrics import precision_recall
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import file_sha256
from mdt_jax.weights import torch_files
from mdt_jax.weights.vae import Vae
from tests.adm import adm_frechet, adm_precision_recall
from tests.conftest import exits_with_one_line, run_here
from tests.measuring import assert_equal, crops, flags, make_sets, measured, quick_inception
from tests.runs import DIGITS
from tests.small_data import write_pictures, write_vae

torch = pytest.importorskip("torch")
fid = pytest.importorskip("tests.fid_packages")

MEASURES = ("fid", "sfid", "inception_score", "precision", "recall")


@pytest.fixture(scope="module", autouse=True)
def small():
    with quick_inception():
        yield


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return make_sets(tmp_path_factory.mktemp("sets"))


def found_by_hand(folder, images: np.ndarray) -> dict[str, np.ndarray]:
    network = feature_networks.load_inception(str(folder / "fid.pth"))
    return network(images)


def test_fid_from_python(sets):
    paths = [str(sets / name) for name in ("samples.npz", "real.npz", "fid.pth")]
    expected = measured(sets / "card.json")["fid"]
    assert mdt_jax.fid(*paths) == pytest.approx(expected, rel=1e-6)
    samples, real = (np.load(path)["arr_0"] for path in paths[:2])
    assert mdt_jax.fid(samples, real, paths[2]) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(UserError, match="the samples is float32 of shape .*images must be uint8"):
        mdt_jax.fid(samples.astype(np.float32), real, paths[2])


def test_the_card_and_its_measures_by_hand(sets):
    card = json.loads((sets / "card.json").read_text())
    ours = card["measured"]
    a, b = (
        found_by_hand(sets, np.load(sets / f"{name}.npz")["arr_0"]) for name in ("samples", "real")
    )
    assert ours["fid"] == pytest.approx(adm_frechet(a["pool"], b["pool"]), rel=1e-6)
    assert ours["sfid"] == pytest.approx(adm_frechet(a["spatial"], b["spatial"]), rel=1e-6)
    theirs = adm_precision_recall(b["pool"], a["pool"])
    assert (ours["precision"], ours["recall"]) == theirs
    score = fid.metric_isc.isc_features_to_metric(torch.tensor(a["logits"]), 1, shuffle=False)
    assert ours["inception_score"] == pytest.approx(score["inception_score_mean"], rel=1e-6)
    assert ours["kid"] == pytest.approx(metrics.kernel_distance(b["pool"], a["pool"]), rel=1e-9)
    assert ours["num_samples"] == 6
    assert card["samples"]["sha256"] == file_sha256(sets / "samples.npz")
    assert card["reference"]["sha256"] == file_sha256(sets / "real.npz")
    assert card["samples"]["shape"] == [32, 32, 3] and card["samples"]["how"] is None
    assert card["features"][0]["inception_sha256"] and card["neighbours"] == 3


def starts(cache: features.FeatureCache) -> list[int]:
    return [start for start, _ in cache.resume()]


def test_cached_features_of_other_images_are_not_used(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "SLICE", 8)
    folder, saved = tmp_path / "cache", {"pool": np.zeros((8, 2))}
    cache = features.FeatureCache(folder, {"of": "others"})
    assert starts(cache) == []
    cache.put(0, saved)
    assert starts(features.FeatureCache(folder, {"of": "others"})) == [0]
    assert starts(features.FeatureCache(folder, {"of": "these"})) == []
    assert not list(folder.glob("*.npz"))


def test_cached_features_that_are_damaged_are_computed_anew(tmp_path, monkeypatch):
    def network(images):
        return {"pool": images.reshape(len(images), -1).astype(np.float32)}

    monkeypatch.setattr(features, "SLICE", 2)
    images = image_sets.ArrayImages("x.npz", np.arange(24, dtype=np.uint8).reshape(6, 2, 2, 1))
    cache = features.FeatureCache(tmp_path / "cache", {"of": "these"})
    wanted = features.extract([network], images, cache).rows["pool"]
    files = sorted((tmp_path / "cache").glob("*.npz"))
    whole = files[1].read_bytes()
    flipped = bytearray(whole)
    flipped[160] ^= 1
    numbers = io.BytesIO()
    np.save(numbers, np.zeros(3))
    other = io.BytesIO()
    np.savez(other, pool=np.zeros((2, 4)))
    bad = (b"", whole[:-9], bytes(flipped), numbers.getvalue(), other.getvalue())
    for content in bad:
        files[1].write_bytes(content)
        assert starts(cache) == [0, 4]
        found = features.extract([network], images, cache).rows["pool"]
        np.testing.assert_array_equal(found, wanted)
        assert starts(cache) == [0, 2, 4]
    (tmp_path / "cache" / "features.json").write_bytes(b"\xff")
    assert starts(cache) == []


def test_a_folder_is_measured_as_the_npz(sets, tmp_path):
    for n, image in enumerate(np.load(sets / "samples.npz")["arr_0"]):
        path = tmp_path / "pictures" / f"{n:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "pictures" / "1.avif").touch()
    out = tmp_path / "card.json"
    printed = run_here(evaluate.main, *flags(sets, samples=f"{tmp_path}/pictures/", out=out))
    assert "rank 5 in 2048 dimensions" in printed and "FID" in printed
    said = "/pictures/: 6 images without classes; left out: unknown suffix .avif: 1 (1.avif)"
    assert said in printed
    assert_equal(measured(out), measured(sets / "card.json"))


def test_samples_in_a_folder_are_in_the_order_of_the_npz(tmp_path):
    """So that the first N are the same, though the files are named by their labels."""
    few = ["--num_samples=12", "--num_steps=2", "--labels=7,1,2", f"--checkpoint={DIGITS}"]
    for out in ("a.npz", "a/"):
        run_here(sample.main, *few, f"--out={tmp_path}/{out}")
    npz, folder = (
        image_sets.open_images(f"{tmp_path}/{out}", labelled=True, num=5, generated=True)
        for out in ("a.npz", "a")
    )
    np.testing.assert_array_equal(npz.take(np.arange(5)), folder.take(np.arange(5)))
    assert npz.labels.tolist() == folder.labels.tolist() == [7, 1, 2, 7, 1]


def test_no_card_is_written_beside_a_data_set(tmp_path):
    import tarfile

    grey_folders(tmp_path / "classes", ["cat", "dog"])
    grey_folders(tmp_path / "flat", [""])
    (tmp_path / "flat" / "settings.json").write_text('{"of": "another program"}')
    (tmp_path / "list.csv").write_text("classes/cat/0.png,cat\nclasses/dog/0.png,dog\n")
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(tmp_path / "classes", "classes")
    image_sets.open_images(str(tmp_path / "set.tar"))  # now there is its index
    real = np.random.RandomState(0).randint(0, 256, (9, 4, 4, 1), np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=real)
    np.savez(tmp_path / "digits.npz", arr_0=sources.load("digits")[1].images)
    before = sorted(tmp_path.rglob("*"))
    for name in ("classes", "classes/", "flat", "list.csv", "set.tar", "digits"):
        samples = name if name == "digits" else f"{tmp_path}/{name}"
        real = tmp_path / ("digits.npz" if name == "digits" else "real.npz")
        printed = run_here(
            evaluate.main, f"--samples={samples}", f"--reference={real}", "--features=pixels",
            cwd=tmp_path,
        )  # fmt: skip
        assert "distance" in printed and "no card with the settings: --out=FILE.json" in printed
        assert sorted(tmp_path.rglob("*")) == before
    run_here(
        evaluate.main, f"--samples={tmp_path}/classes", f"--reference={tmp_path}/real.npz",
        "--features=pixels", f"--out={tmp_path}/card.json",
    )  # fmt: skip
    assert measured(tmp_path / "card.json")["num_samples"] == 10


def test_the_card_lies_beside_samples(tmp_path):
    for out, card in (("a.npz", "a.npz.json"), ("b/", "b.json")):
        few = ["--num_samples=4", "--num_steps=2", f"--checkpoint={DIGITS}"]
        run_here(sample.main, *few, f"--out={tmp_path}/{out}")
        run_here(
            evaluate.main, f"--samples={tmp_path}/{out}", "--reference=digits", "--features=pixels"
        )
        assert measured(tmp_path / card)["num_samples"] == 4


class Closed(io.TextIOBase):
    """A terminal that is gone."""

    def write(self, text):
        raise OSError("closed")


def test_the_card_is_written_whatever_becomes_of_the_terminal(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", arr_0=sources.load("digits")[1].images)
    argv = [f"--samples={tmp_path}/a.npz", "--reference=digits", "--features=pixels"]
    ascii_alone = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    for number, terminal in enumerate((ascii_alone, Closed())):
        card = tmp_path / f"{number}.json"
        monkeypatch.setattr("sys.argv", ["command", *argv, f"--out={card}"])
        monkeypatch.setattr("sys.stdout", terminal)
        if terminal is ascii_alone:
            cli.run(evaluate.main)
        else:
            with pytest.raises(SystemExit):
                cli.run(evaluate.main)
        assert measured(card)["frechet_distance"] >= 0
    printed = ascii_alone.buffer.getvalue().decode("ascii")
    assert "Fr\\xe9chet distance" in printed


@pytest.mark.parametrize("command", [sample, evaluate, inpaint, convert, info, main, encode])
def test_help_on_a_terminal_of_ascii(command, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    monkeypatch.setattr("sys.argv", ["command", "--help"])
    monkeypatch.setattr("sys.stdout", terminal)
    with pytest.raises(SystemExit) as exit_:
        cli.run(command.main)
    assert exit_.value.code == 0 and b"usage" in terminal.buffer.getvalue()


def test_the_inception_score_of_a_folder_is_that_of_the_npz(sets, tmp_path, monkeypatch):
    """The folder is in another order, and is measured in slices of another size."""
    saved, network = (
        np.load(sets / "samples.npz"),
        feature_networks.load_inception(f"{sets}/fid.pth"),
    )
    for n, image in enumerate(saved["arr_0"]):
        Image.fromarray(image).save(tmp_path / f"{saved['arr_1'][n]}_{n:02}.png")
    scores = []
    for path, size in ((sets / "samples.npz", 512), (tmp_path, 4)):
        monkeypatch.setattr(features, "SLICE", size)
        images = image_sets.open_images(str(path), generated=True)
        rows = features.extract([network], images).rows
        scores.append(metrics.inception_score(rows["logits"], rows["pixels"], split=5))
    assert scores[0] == pytest.approx(scores[1], rel=1e-9)
    assert scores[0] != pytest.approx(measured(sets / "card.json")["inception_score"], rel=1e-6)


def test_a_reference_is_made_as_adms_are(sets, tmp_path, monkeypatch):
    out = tmp_path / "reference.npz"
    run_here(
        evaluate.main, f"--make_reference={sets}/real.npz", f"--out={out}",
        f"--inception={sets}/fid.pth",
    )  # fmt: skip
    made = np.load(out)
    assert {name: (made[name].shape, str(made[name].dtype)) for name in made} == {
        "arr_0": ((10, 32, 32, 3), "uint8"), "count": ((), "int64"),
        "mu": ((2048,), "float64"), "sigma": ((2048, 2048), "float64"),
        "mu_s": ((2023,), "float64"), "sigma_s": ((2023, 2023), "float64"),
    }  # fmt: skip
    spatial = found_by_hand(sets, made["arr_0"])["spatial"].astype(np.float64)
    np.testing.assert_allclose(made["mu_s"], spatial.mean(0), rtol=1e-12)
    np.testing.assert_allclose(made["sigma_s"], np.cov(spatial, rowvar=False), atol=1e-9)
    run_here(evaluate.main, *flags(sets, reference=out, out=tmp_path / "card.json"))
    assert_equal(measured(tmp_path / "card.json"), measured(sets / "card.json"))
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["reference"]["statistics_pool"] == card["reference"]["images"] == 10
    # Statistics alone: no images, so neither precision nor recall; another network's are refused.
    np.savez(tmp_path / "mu.npz", mu=made["mu"], sigma=made["sigma"])
    run_here(evaluate.main, *flags(sets, reference=tmp_path / "mu.npz", out=tmp_path / "mu.json"))
    theirs = measured(sets / "card.json")
    kept = {name: theirs[name] for name in ("fid", "inception_score", "num_samples")}
    assert_equal(measured(tmp_path / "mu.json"), kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "card.json", "mu.json", "mu.npz", "reference.npz"
    ]  # fmt: skip


def test_two_networks_at_once(sets, tmp_path):
    """One reading of the images, one card and one reference; each network's metrics are its own."""
    dinov2 = pytest.importorskip("tests.dinov2")
    torch_files.write_arrays(tmp_path / "vit.pth", dinov2.random_state())
    both = {"features": "inception,dinov2", "dinov2": tmp_path / "vit.pth"}
    reference, out = tmp_path / "reference.npz", tmp_path / "card.json"
    made = [flag for flag in flags(sets, **both) if not flag.startswith(("--sam", "--ref"))]
    run_here(evaluate.main, f"--make_reference={sets}/real.npz", f"--out={reference}", *made)
    run_here(evaluate.main, *flags(sets, **both, reference=reference, out=out))
    found = measured(out)
    assert found.pop("fd_dinov2") > 0 and found.pop("kd_dinov2") != 0
    assert_equal(found, measured(sets / "card.json"))
    card = json.loads(out.read_text())
    assert [note["features"] for note in card["features"]] == ["inception", "dinov2"]
    assert card["reference"]["statistics_dinov2"] == card["reference"]["statistics_spatial"] == 10


def test_a_reference_keeps_images_from_all_over_the_set(monkeypatch):
    monkeypatch.setattr(references, "KEPT_IMAGES", 50)
    images = np.arange(200, dtype=np.uint8).reshape(200, 1, 1, 1)
    kept = references.images_to_keep(image_sets.ArrayImages("x", images))[:, 0, 0, 0]
    assert len(np.unique(kept)) == 50 and kept.min() < 20 and kept.max() > 180


def adm_reads(path, name: str) -> np.ndarray:
    """What ADM's evaluator streams: the entry NAME.npy, its header, then the bytes in order."""
    with zipfile.ZipFile(path) as archive:
        assert f"{name}.npy" in archive.namelist()
        with archive.open(f"{name}.npy") as file:
            assert np.lib.format.read_magic(file) in ((1, 0), (2, 0))
            shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
            assert not by_columns and not dtype.hasobject
            batches, left = [], shape[0]
            while left:
                count = min(64, left)
                part = file.read(count * int(np.prod(shape[1:])) * dtype.itemsize)
                batches.append(np.frombuffer(part, dtype).reshape(count, *shape[1:]))
                left -= count
            assert file.read(1) == b""
    return np.concatenate(batches)


def test_adms_evaluator_can_read_what_the_sampler_writes(tmp_path):
    out = tmp_path / "samples.npz"
    few = ["--num_samples=70", "--num_steps=2", "--sampler=ddim", f"--checkpoint={DIGITS}"]
    run_here(sample.main, *few, f"--out={out}")
    images, labels = (adm_reads(out, name) for name in ("arr_0", "arr_1"))
    assert images.dtype == np.uint8 and images.shape == (70, 8, 8, 1)
    assert labels.dtype == np.int64 and labels.shape == (70,)
    assert "mu" not in np.load(out).files  # it would take them for statistics
    np.testing.assert_array_equal(images, np.load(out)["arr_0"])


def test_the_card_of_a_run_tells_how_the_samples_came_about(trained, tmp_path):
    out = tmp_path / "card.json"
    run_here(
        evaluate.main, f"--samples={trained}/samples.npz", "--reference=digits",
        "--features=pixels,classifier", f"--out={out}",
    )  # fmt: skip
    card, report = json.loads(out.read_text()), json.loads((trained / "report.json").read_text())
    for name in ("frechet_distance", "frechet_distance_real", "frechet_ratio", "class_agreement"):
        assert card["measured"][name] == pytest.approx(report[name], rel=1e-12)
    how = card["samples"]["how"]
    assert (how["step"], how["parameters"], how["sampler"]) == (4, "ema", "ddpm")
    assert {"parameters_sha256", "guidance_scale", "num_steps", "uint8", "seed"} <= set(how)
    run_here(
        sample.main, f"--checkpoint={trained}", "--num_samples=20", f"--out={tmp_path}/x",
        "--batch_size=10",
    )  # fmt: skip
    run_here(
        evaluate.main, f"--samples={tmp_path}/x", "--reference=digits", f"--out={out}",
        "--features=pixels,classifier",
    )  # fmt: skip
    again = json.loads(out.read_text())
    assert_equal(again["measured"], card["measured"])
    assert again["samples"]["how"]["parameters_sha256"] == how["parameters_sha256"]


def test_a_classifier_of_any_labelled_images(tmp_path):
    source = sources.PACKAGED["digits"]()
    np.savez(tmp_path / "all.npz", arr_0=source.images, arr_1=source.labels)
    run_here(
        evaluate.main, f"--samples={tmp_path}/all.npz", f"--reference={tmp_path}/all.npz",
        "--features=classifier,pixels",
    )  # fmt: skip
    found = measured(tmp_path / "all.npz.json")
    assert found["class_agreement"] > 0.98 and found["classifier_accuracy"] > 0.95
    assert found["frechet_distance"] == pytest.approx(0, abs=1e-9)


def test_what_a_vae_loses(sets, tmp_path):
    vae, pictures = write_vae(tmp_path / "vae.safetensors"), write_pictures(tmp_path / "set", 9)
    printed = run_here(
        evaluate.main, f"--vae={vae}", f"--images={pictures}", "--image_size=32",
        f"--inception={sets}/fid.pth", f"--out={tmp_path}/vae.json",
    )  # fmt: skip
    assert "PSNR (dB)" in printed and "rFID" in printed
    card = json.loads((tmp_path / "vae.json").read_text())
    images = image_sets.open_images(str(pictures), 32).take(range(9))
    vae = Vae.load(vae)
    network, params = vae.network, vae.params
    x = images.astype(np.float32) / 127.5 - 1
    mean, _ = jax.jit(functools.partial(network.apply, method="encode"))({"params": params}, x)
    decode = jax.jit(functools.partial(network.apply, method="decode"))
    back = np.asarray(decode({"params": params}, mean))
    back = np.clip((back + 1) * 127.5, 0, 255).astype(np.uint8)
    from skimage.metrics import peak_signal_noise_ratio

    pairs = list(zip(images, back, strict=True))
    theirs = np.mean([peak_signal_noise_ratio(*pair) for pair in pairs])
    assert card["measured"]["psnr"] == pytest.approx(theirs, rel=1e-4)
    a, b = (found_by_hand(sets, each)["pool"] for each in (images, back))
    assert card["measured"]["rfid"] == pytest.approx(adm_frechet(a, b), rel=1e-3)
    assert 0 < card["measured"]["ssim"] < 1 and card["vae_sha256"]


def test_features_that_are_not_finite_name_the_sample(tmp_path):
    def network(images):
        return {"pool": np.where(images[:, 0, 0] == 3, np.nan, np.float32(1))}

    images = image_sets.ArrayImages("x.npz", np.arange(9, dtype=np.uint8).reshape(9, 1, 1, 1))
    with pytest.raises(UserError, match=r"x\.npz, image 3 has features that are not finite"):
        features.extract([network], images)


@pytest.fixture(scope="module")
def bad(tmp_path_factory, sets):
    """Files that cannot be measured, by the names that BAD gives them."""
    folder = tmp_path_factory.mktemp("bad")
    images = crops(5, 0)
    np.savez(folder / "float.npz", arr_0=images.astype(np.float32))
    np.savez(folder / "first.npz", arr_0=images.transpose(0, 3, 1, 2))
    np.savez(folder / "grey.npz", arr_0=images[..., 0])
    np.savez(folder / "columns.npz", arr_0=np.asfortranarray(images))
    np.savez(folder / "none.npz", arr_0=images[:0])
    np.savez(folder / "few.npz", arr_0=images[:3])
    np.savez(folder / "named.npz", images=images)
    np.savez(folder / "unlabelled.npz", arr_0=images)
    np.savez(folder / "other.npz", arr_0=crops(5, 0, 24))
    np.savez(folder / "mu.npz", mu=np.zeros(2048))
    np.savez(folder / "small.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(folder / "shapes.npz", mu=np.zeros(64), sigma=np.eye(63))
    np.savez(folder / "nan.npz", mu=np.zeros(64), sigma=np.full((64, 64), np.nan))
    np.savez(folder / "skew.npz", mu=np.zeros(2), sigma=np.array([[1.0, 2], [0, 1]]))
    np.savez(folder / "void.npz", mu=np.zeros(0), sigma=np.zeros((0, 0)))
    np.savez(folder / "texts.npz", mu=np.full(9, "1"), sigma=np.eye(9))
    np.savez(folder / "count.npz", mu=np.zeros(9), sigma=np.eye(9), count="many")
    np.savez(folder / "two.npz", arr_0=images[:4], arr_1=[0, 0, 1, 1])
    with zipfile.ZipFile(folder / "header.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': '|u1', (")
    for names in (("classes", "dog", "horse"), ("others", "cat", "dog")):
        for name in names[1:]:
            (folder / names[0] / name).mkdir(parents=True)
            for n in range(6):
                Image.fromarray(crops(1, n)[0]).save(folder / names[0] / name / f"{n}.png")
    (folder / "folder.json").mkdir()
    (folder / "text.npz").write_text("no zip")
    whole = (sets / "samples.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "empty").mkdir()
    (folder / "mixed").mkdir()
    for n, size in enumerate((32, 32, 40, 32)):
        Image.fromarray(crops(1, n, size)[0]).save(folder / "mixed" / f"{n}.png")
    (folder / "torn").mkdir()
    for n in range(4):
        Image.fromarray(crops(1, n)[0]).save(folder / "torn" / f"{n}.png")
    (folder / "torn" / "2.png").write_bytes((folder / "torn" / "2.png").read_bytes()[:100])
    theirs = {**fid.random_state(), "AuxLogits.fc.bias": np.zeros(1000, np.float32)}
    torch.save({name: torch.tensor(array) for name, array in theirs.items()}, folder / "tv.pth")
    ten = {**fid.random_state(), "fc.weight": np.zeros((10, 2048)), "fc.bias": np.zeros(10)}
    torch.save({name: torch.tensor(array) for name, array in ten.items()}, folder / "ten.pth")
    write_vae(folder / "vae.safetensors")
    return folder


S, R, W = "--samples=SETS/samples.npz", "--reference=SETS/real.npz", "--inception=SETS/fid.pth"
PIXELS = "--features=pixels"
BAD = {
    "nothing": ([], "one of the arguments --samples --make_reference --vae is required"),
    "two things": ([S, "--vae=x", R], "argument --vae: not allowed with argument --samples"),
    "no reference": ([S], "--reference is missing"),
    "no images": (["--vae=BAD/vae.safetensors"], "--images is missing"),
    "no out": (["--make_reference=SETS/real.npz"], "--out is missing"),
    "images of samples": ([S, R, "--images=x"], "--images is not for --samples"),
    "unknown features": ([S, R, "--features=vgg"], "unknown features 'vgg'"),
    "no weights": ([S, R], "needs weights, --inception=FILE: pt_inception-2015"),
    "torchvision's weights": ([S, R, "--inception=BAD/tv.pth"], "torchvision's Inception v3"),
    "a VAE's weights": (
        [S, R, "--inception=BAD/vae.safetensors"],
        "holds a VAE, not FID's Inception",
    ),
    "no file": (["--samples=BAD/no.npz", R, PIXELS], "no.npz could not be read: No such file"),
    "no folder": (["--samples=BAD/no", R, PIXELS], "no does not exist"),
    "empty folder": (["--samples=BAD/empty", R, PIXELS], "empty holds no images"),
    "no zip": (["--samples=BAD/text.npz", R, PIXELS], "text.npz could not be read"),
    "cut short": (["--samples=BAD/cut.npz", R, PIXELS], "cut.npz could not be read"),
    "floats": (["--samples=BAD/float.npz", R, PIXELS], "arr_0 is float32 of shape [5, 32, 32, 3]"),
    "channels first": (
        ["--samples=BAD/first.npz", R, PIXELS],
        "arr_0 is uint8 of shape [5, 3, 32, 32]; images must be",
    ),
    "three axes": (
        ["--samples=BAD/grey.npz", R, PIXELS],
        "is uint8 of shape [5, 32, 32]; images must be",
    ),
    "Fortran's order": (
        ["--samples=BAD/columns.npz", R, PIXELS],
        "of shape [5, 32, 32, 3], in Fortran order; images must be",
    ),
    "no images in it": (
        ["--samples=BAD/none.npz", R, PIXELS],
        "none.npz: arr_0 is uint8 of shape [0, 32, 32, 3]; images",
    ),
    "another name": (
        ["--samples=BAD/named.npz", R, PIXELS],
        "holds no arr_0, the images; its arrays are",
    ),
    "of several sizes": (["--samples=BAD/mixed", R, PIXELS], "2.png is 40×40, but"),
    "damaged": (["--samples=BAD/torn", R, PIXELS], "2.png could not be read"),
    "few samples": (["--samples=BAD/few.npz", R, W], "few.npz has too few images: 3; at least 4"),
    "few real images": ([S, "--reference=BAD/few.npz", W], "few.npz has too few images: 3"),
    "more than there are": ([S, R, PIXELS, "--num_samples=99"], "has 6 images, fewer than the 99"),
    "no samples": ([S, R, PIXELS, "--num_samples=0"], "--num_samples: 0 must be at least 1"),
    "another resolution": (
        [S, "--reference=BAD/other.npz", PIXELS],
        "other.npz are 24×24×3, but those of",
    ),
    "neither": ([S, "--reference=BAD/named.npz", PIXELS], "neither mu and sigma nor arr_0"),
    "half of it": ([S, "--reference=BAD/mu.npz", W], "has one of mu and sigma without the other"),
    "statistics of others": ([S, "--reference=BAD/small.npz", W], "statistics of 64 features"),
    "of no features": ([S, "--reference=BAD/void.npz", W], "they must be [D] and [D, D]"),
    "texts": ([S, "--reference=BAD/texts.npz", W], "mu is <U"),
    "no count": ([S, "--reference=BAD/count.npz", W], "it must be how many images mu is of"),
    "another header": (["--samples=BAD/header.npz", R, PIXELS], "header.npz could not be read"),
    "one of each class": (
        [S, "--reference=BAD/two.npz", "--features=classifier"],
        "too few images of each class",
    ),
    "other classes": (
        ["--samples=BAD/classes", "--reference=BAD/others", "--features=classifier"],
        "has the label 'horse', which no image of",
    ),
    "another card": ([S, R, PIXELS, "--out=SETS/samples.npz"], "unknown suffix '.npz'; use .json"),
    "over the images": (
        ["--make_reference=SETS/real.npz", W, "--out=SETS/real.npz"],
        "exists and is no reference",
    ),
    "an Inception of ten": ([S, R, "--inception=BAD/ten.pth"], "this is an Inception of 10 logits"),
    "size of a packaged set": (
        [S, "--reference=digits", PIXELS, "--image_size=4"],
        "has images of 32×32; --image_size=4",
    ),
    "shapes": ([S, "--reference=BAD/shapes.npz", W], "they must be [D] and [D, D]"),
    "not finite": ([S, "--reference=BAD/nan.npz", W], "mu or sigma is not finite everywhere"),
    "not symmetric": ([S, "--reference=BAD/skew.npz", W], "it is not symmetric"),
    "statistics for pixels": ([S, "--reference=BAD/small.npz", PIXELS], "pixels needs images; "),
    "unlabelled samples": (
        ["--samples=BAD/unlabelled.npz", R, "--features=classifier"],
        "unlabelled.npz has no labels",
    ),
    "unlabelled reference": (
        [S, "--reference=BAD/unlabelled.npz", "--features=classifier"],
        "npz has no labels",
    ),
    "huge size": (
        [S, R, PIXELS, "--image_size=1000000"],
        "image_size is 1000000; it must be at most 16,384",
    ),
    "size of an npz": ([S, R, PIXELS, "--image_size=16"], "--image_size=16 crops image files only"),
    "a folder as the card": ([S, R, PIXELS, "--out=BAD/folder.json"], "folder.json cannot be"),
    "a reference without npz": (
        ["--make_reference=SETS/real.npz", "--out=BAD/x.json", W],
        "unknown suffix '.json'",
    ),
    "small for a VAE": (
        ["--vae=BAD/vae.safetensors", "--images=BAD/torn", "--image_size=8"],
        "SSIM 11×11 at least",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes(name, bad, sets, capsys, monkeypatch, in_root):
    arguments, message = BAD[name]

    def placed(text):
        return text.replace("BAD", str(bad)).replace("SETS", str(sets))

    before = {path for folder in (bad, sets) for path in folder.rglob("*")}
    argv = list(map(placed, arguments))
    if name == "damaged":  # which is seen when it is its turn
        assert placed(message) in run_here(evaluate.main, *argv, expect=2)
    else:
        printed = exits_with_one_line(evaluate.main, argv, capsys, monkeypatch)
        assert placed(message) in printed
    assert {path for folder in (bad, sets) for path in folder.rglob("*")} == before


def test_what_makes_a_distance_hard_to_compare_is_said_once(capsys):
    evaluator = Evaluator(references.Reference("real.npz", {}, None), ())
    few = metrics.gaussian(np.random.RandomState(0).rand(5, 9))
    wrong = metrics.Gaussian(np.zeros(9), np.diag([-0.5, *np.ones(8)]))
    for _ in range(2):
        assert evaluator._distance(few, wrong) > 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert "covariance of the samples, of 5 images, has rank 4 in 9 dimensions" in said[0]
    assert "compare it only with distances of as many" in said[0]
    assert "covariance of real.npz has rank 8 in 9 dimensions" in said[1]
    still = np.pad(np.random.RandomState(0).rand(50, 8), [(0, 0), (0, 1)])  # one never changes
    assert metrics.reliability_warnings("x", metrics.gaussian(still)) == []
    assert "real.npz has negative eigenvalues" in said[2] and "complex square roots" in said[2]


def test_large_images_are_not_compared_by_pixels():
    images = image_sets.ArrayImages("x", np.zeros((5, 64, 64, 3), np.uint8))
    with pytest.raises(UserError, match="64×64×3 are too large to be compared by their pixels"):
        Evaluator(references.Reference("x", {}, images), ["pixels"])


def test_a_folder_is_grey_where_all_of_it_is(tmp_path):
    for n, image in enumerate(crops(3, 0)):
        picture = Image.fromarray(image)
        (picture if n == 1 else picture.convert("L")).save(tmp_path / f"{n}.png")
    assert image_sets.open_images(str(tmp_path)).shape == (32, 32, 3)
    (tmp_path / "1.png").unlink()
    assert image_sets.open_images(str(tmp_path)).shape == (32, 32, 1)
    assert image_sets.open_images(str(tmp_path), 16).take(range(2)).shape == (2, 16, 16, 1)


def test_the_hash_of_a_tar_is_of_its_pixels(tmp_path):
    import tarfile

    hashes = set()
    for n in range(2):
        Image.fromarray(crops(1, n)[0]).save(tmp_path / "a.bmp")
        with tarfile.open(tmp_path / "set.tar", "w") as archive:
            archive.add(tmp_path / "a.bmp", "a.bmp")
        hashes.add(image_sets.open_images(str(tmp_path / "set.tar")).sha256)
    assert len(hashes) == 2


def agreement(samples, reference, folder) -> float:
    run_here(
        evaluate.main, f"--samples={samples}", f"--reference={reference}", "--features=classifier",
        f"--out={folder}/card.json",
    )  # fmt: skip
    return measured(folder / "card.json")["class_agreement"]


def grey_folders(folder, names) -> np.ndarray:
    """Five grey pictures in a folder for each class, no two classes alike; those of each class."""
    pictures = []
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        pictures += [np.full((4, 4, 1), 25 * number + n, np.uint8) for n in range(5)]
        for n in range(5):
            Image.fromarray(pictures[n - 5][..., 0]).save(folder / name / f"{n}.png")
    return np.stack(pictures).reshape(-1, 5, 4, 4, 1)


@pytest.mark.parametrize("names", [["cat", "dog", "horse"], ["1", "2", "3"], ["01", "2", "x"]])
def test_samples_with_the_names_of_their_classes(names, tmp_path):
    """As mdt_jax.sample writes them: numbers, and the names in the note."""
    real = grey_folders(tmp_path / "real", names)
    labels = np.array([2, 1, 1, 2])
    images, note = real[labels, [0, 1, 2, 3]], {"mdt_jax": "0"}
    for sink, out in ((sample_files.Npz, "a.npz"), (sample_files.Folder, "a")):
        written = sink(
            tmp_path / out, labels, (4, 4, 1), {**note, "num_classes": 3, "classes": names}
        )  # fmt: skip
        written.begin()
        written.write(0, images)
        written.finish()
        assert agreement(tmp_path / out, tmp_path / "real", tmp_path) == 1
    # Names decide, not numbers: here class 0 is what the reference calls its class 2.
    other = sample_files.Npz(
        tmp_path / "b.npz", labels - 1, (4, 4, 1), {**note, "classes": names[1:]}
    )
    other.begin()
    other.write(0, images)
    other.finish()
    assert agreement(tmp_path / "b.npz", tmp_path / "real", tmp_path) == 1


def test_samples_that_tell_numbers_alone(tmp_path):
    """Numbers are places among the reference's classes, also where these are named 1, 2, …"""
    for kind in (["cat", "dog", "horse"], ["1", "2", "3"]):
        real = grey_folders(tmp_path / kind[0], kind)
        labels = np.array([2, 1, 1, 2])
        np.savez(tmp_path / "a.npz", arr_0=real[labels, 0], arr_1=labels)
        assert agreement(tmp_path / "a.npz", tmp_path / kind[0], tmp_path) == 1
        drawn = tmp_path / f"{kind[0]} drawn"
        drawn.mkdir()
        for n, label in enumerate(labels):
            Image.fromarray(real[label, n, ..., 0]).save(drawn / f"{label}_{n:06}.png")
        assert agreement(drawn, tmp_path / kind[0], tmp_path) == 1


def test_labels_are_compared_by_name(tmp_path):
    for folder, names in (("real", ("cat", "dog", "horse")), ("drawn", ("dog", "horse"))):
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            for n in range(5):
                grey = np.full((4, 4), 20 * ord(name[0]) % 256 + n, np.uint8)
                Image.fromarray(grey).save(tmp_path / folder / name / f"{n}.png")
    assert agreement(tmp_path / "drawn", tmp_path / "real", tmp_path) == 1


def test_a_cached_slice_that_is_cut_short_is_skipped(tmp_path):
    cache = features.FeatureCache(tmp_path / "x", {})
    assert starts(cache) == []
    cache.put(0, {"pool": np.zeros((8, 2))})
    cache.put(512, {"pool": np.zeros((8, 2))})
    cut = (tmp_path / "x" / "000000512.npz").read_bytes()[:100]
    (tmp_path / "x" / "000000512.npz").write_bytes(cut)
    assert starts(cache) == [0]


def test_memory_of_many_features(monkeypatch):
    """Precision and recall hold tiles, not all pairs."""
    import tracemalloc

    monkeypatch.setattr(metrics, "TILE", 256)
    x = np.random.RandomState(0).randn(3000, 16).astype(np.float32)
    tracemalloc.start()
    precision_recall(x, x)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 10e6  # all pairs in float64 would take 72 MB


@pytest.mark.parametrize("left_out", [["mu"], ["sigma"], ["mu", "sigma"], ["mu_s"], ["mu", "mu_s"]])
def test_a_reference_with_a_part_of_its_statistics_is_not_taken_for_images(left_out, tmp_path):
    images = np.zeros((4, 8, 8, 3), np.uint8)
    arrays = {"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    kept = {name: array for name, array in arrays.items() if name not in left_out}
    for more in ({}, {"arr_0": images}):
        np.savez(tmp_path / "r.npz", **kept, **more)
        with pytest.raises(UserError, match="without the other|but neither mu nor sigma"):
            references.load(str(tmp_path / "r.npz"))
    np.savez(tmp_path / "r.npz", **arrays, arr_0=images)
    assert set(references.load(str(tmp_path / "r.npz")).gaussians) == {"pool", "spatial"}
