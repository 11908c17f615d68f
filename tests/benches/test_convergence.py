"""benchmarks/convergence.py, and its measures.py, curves.py and features.py."""

import json
import re
import sys

import numpy as np
import pytest

from mdt_jax import config as configs
from mdt_jax.data import sources
from mdt_jax.evaluation import metrics
from mdt_jax.models.mdt import MDT, init_params
from mdt_jax.runtime import keys
from mdt_jax.runtime.errors import UserError
from mdt_jax.train.stopping import StopSignal
from tests import small_data
from tests.conftest import ROOT, exits_with_one_line, run_here

sys.path.insert(0, str(ROOT / "benchmarks"))

import convergence  # noqa: E402
import curves  # noqa: E402
import features  # noqa: E402
import measures  # noqa: E402

SMALL = ["--data=digits", "--variant=smoke", "--seeds=0", "--samples=20"]


def test_networks_are_trained_measured_and_trained_further(tmp_path):
    from PIL import Image

    flags = [*SMALL, "--only=DiT;MDTv2", f"--out={tmp_path}"]
    printed = run_here(convergence.bench, *flags, "--steps=2")
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert rows == ["", "---", "DiT", "MDTv2", "*real training images*", "steps of DiT", "---",
                    "1", "2"]  # fmt: skip
    report = json.loads((tmp_path / "convergence.json").read_text())
    before = report["runs"]["MDTv2"][0]
    assert [point["step"] for point in before["points"]] == [1, 2]
    assert all(np.isfinite(list(point.values())).all() for point in before["points"])
    assert before["operations"] > report["runs"]["DiT"][0]["operations"] > 0
    assert Image.open(tmp_path / "convergence.png").size[0] > 500

    again = run_here(convergence.bench, *flags, "--steps=2")
    assert again.endswith(printed[-500:]) and "measuring" not in again and "compiling" not in again
    # A point that is lost is measured again, from its checkpoint, with the same result.
    path = tmp_path / "MDTv2" / "0" / "curve.json"
    curve = json.loads(path.read_text())
    path.write_text(json.dumps({**curve, "points": curve["points"][:1]}))
    again = run_here(convergence.bench, *flags, "--steps=2")
    assert "measuring step 2" in again and "measuring step 1" not in again
    assert json.loads(path.read_text())["points"] == curve["points"]


def small_run(**changes):
    """A config on digits, of DiT."""
    set_ = convergence.SETS["digits"]
    return convergence.recipe(set_, convergence.DIT | changes, 0, 2, 1, 20, "smoke")


@pytest.fixture(scope="module")
def of_digits():
    return measures.Measures("digits", "", 20)


def test_a_run_with_more_steps_goes_on(tmp_path, of_digits, monkeypatch):
    """Points lie where an undisturbed run has them, and the ones there are stay as they are."""
    config = small_run()
    two = convergence.run(config, tmp_path, of_digits)["points"]
    config.train.steps = 11
    with monkeypatch.context() as patch, pytest.raises(UserError, match="stopped; the same"):
        patch.setattr(StopSignal, "requested", lambda self, step: step == 9)
        convergence.run(config, tmp_path, of_digits)
    assert (tmp_path / "checkpoints" / "9").is_dir()
    eleven = convergence.run(config, tmp_path, of_digits)["points"]
    assert [point["step"] for point in eleven] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11]
    assert eleven[:2] == two
    config.train.steps = 10
    assert convergence.run(config, tmp_path, of_digits)["points"] == eleven[:-1]
    config.train.steps = 9
    with pytest.raises(UserError, match="is trained to step 11 already"):
        convergence.run(config, tmp_path, of_digits)
    with pytest.raises(UserError, match="of a run with another config; remove its folder"):
        convergence.run(small_run(**{"optim.lr": 1e-5}), tmp_path, of_digits)


def test_fine_tuning_starts_from_the_source(tmp_path):
    flags = ["--variant=smoke", "--seeds=0", "--samples=20", "--steps=2", f"--out={tmp_path}"]
    printed = run_here(convergence.bench, "--suite=finetune", *flags)
    names = re.findall(r"^\| (from [^|]*) \|", printed, re.M)
    assert names == ["from scratch", "from digits 0–4"]
    assert f"parameters and EMA are those of {tmp_path / 'source-4'}" in printed


@pytest.mark.parametrize("data", convergence.SETS)
def test_all_networks_of_a_suite_are_valid_and_differ(data):
    for name in [*convergence.SUITES, "tuning"]:
        seen = []
        set_ = convergence.FINETUNE if name == "finetune" else convergence.SETS[data]
        for changes in convergence.suite_of(name, set_).values():
            config = convergence.recipe(set_, changes, 0, 200, 100, 50)
            config.model.num_classes = 10
            configs.validate(config)
            assert config.to_dict() not in seen
            seen.append(config.to_dict())


def test_networks_of_a_set_have_its_size_and_rates():
    mnist = convergence.SETS["mnist"]
    config = {
        name: convergence.recipe(mnist, changes, 0, 200, 100, 50)
        for name, changes in convergence.suite_of("parts", mnist).items()
    }
    assert (config["MDTv2"].optim.lr, config["MDTv2"].optim.name) == (0.012, "adan")
    assert config["DiT by Adan and min-SNR"].optim.lr == 0.012
    assert (config["MDTv2 by AdamW"].optim.lr, config["MDT"].optim.lr) == (0.003, 0.003)
    assert (config["MDT"].model.version, config["MDT"].diffusion.loss_weight) == ("v1", "uniform")
    assert MDT.from_config(config["MDT"]).num_tokens == 49
    assert config["DiT, batch doubled"].data.batch_size == 2 * config["MDT"].data.batch_size
    assert mnist.steps_of("DiT", "models") == mnist.steps > max(mnist.fewer.values())
    assert mnist.steps_of("MDTv2", "models") == mnist.fewer["MDTv2"] > mnist.fewer["MDT"]
    assert {mnist.steps_of(name, "parts") for name in config} == {mnist.fewer["MDT"]}
    for name, tokens in (("mnist_7", 16), ("mnist_2", 196), ("emoji", 64)):
        other = convergence.recipe(convergence.SETS[name], {}, 0, 200, 100, 50)
        assert MDT.from_config(other).num_tokens == tokens


@pytest.mark.parametrize("name", ["mnist_2", "emoji"])
def test_sets_are_measured(name, tmp_path):
    """Real images against real images, and a network that has learnt nothing."""
    path = ""
    if name == "emoji":
        path = str(tmp_path / "emoji")
        for part in ("train", "test"):
            for category in range(9):
                small_data.write_pictures(tmp_path / "emoji" / part / str(category), count=3)
    found = measures.Measures(convergence.SETS[name].images, path, 20)
    config = convergence.recipe(convergence.SETS[name], {}, 0, 2, 1, 20, path=path)
    assert found.real()["distance"] >= 0
    assert ("pixel_distance" in found.real()) == (name != "emoji")
    shape = found.train.images.shape
    assert shape[1:] == (config.data.image_size, config.data.image_size, config.data.channels)


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    for arguments, message in (
        (["--suite=all"], "invalid choice"),
        (["--data=digits_5_9"], "invalid choice"),
        (["--seeds=a"], "--seeds"),
        (["--steps=0"], "--steps"),
        (["--only=MDT;MDT3"], "--only: 'MDT3' is none of DiT; MDT; MDTv2"),
        (["--data=emoji"], "--data=emoji needs --path=FOLDER"),
        (["--data=mnist", "--suite=finetune"], "finetune is of digits, not of mnist"),
        (["--data=emoji", "--variant=smoke"], "replaces the images of emoji by digits"),
    ):
        argv = [*arguments, f"--out={tmp_path / 'out'}"]
        assert message in exits_with_one_line(convergence.bench, argv, capsys, monkeypatch)
    argv = ["--data=digits", "--epochs=0"]
    assert "--epochs" in exits_with_one_line(features.bench, argv, capsys, monkeypatch)
    assert not (tmp_path / "out").exists()


# Curves.


def run_of(distances, every=100, **cost):
    points = [
        {"step": every * number, "distance": distance, "held_out_loss": 1 / number,
         "training_loss": 1 / number, "class_agreement": 0.5}
        for number, distance in enumerate(distances, start=1)
    ]  # fmt: skip
    return {"images": 32, "operations": 100, "seconds": 0.1, **cost, "points": points}


def test_steps_to_a_distance():
    run = run_of([16.0, 4.0, 5.0, 1.0])
    assert curves.steps_to(run, 16.0) == 100 and curves.steps_to(run, 99.0) == 100
    assert curves.steps_to(run, 8.0) == pytest.approx(150)  # halfway in the logarithm
    assert curves.steps_to(run, 4.0) == pytest.approx(200)
    assert curves.steps_to(run, 2.0) == pytest.approx(350)  # from 4, the best so far
    assert np.isnan(curves.steps_to(run, 0.9))


def test_factors_are_those_of_each_seed():
    """The second network needs half the steps, at three times the operations and seconds."""
    twice = dict(operations=300, seconds=0.3, images=64)
    runs = {
        "DiT": [run_of([16, 8, 4, 2]), run_of([8, 4, 2, 2])],
        "MDT": [run_of([8, 2, 1, 1], **twice), run_of([8, 4, 3, 2], **twice)],
        "none": [run_of([16, 16, 16, 16]), run_of([16, 16, 16, 1])],
    }
    report = curves.report(runs, {"distance": 0.5})
    last = report["factors"][-1]
    assert (last["step"], last["distance"]) == (400, [2.0, 0.0])
    # Seed 0: 400 steps against 200; seed 1 arrives at 300, and the other at 400.
    assert last["networks"]["MDT"]["steps"] == pytest.approx([1.375, np.std([2, 0.75], ddof=1)])
    assert last["networks"]["MDT"]["seconds"][0] == pytest.approx(1.375 / 3)
    assert last["networks"]["MDT"]["operations"][0] == pytest.approx(1.375 / 3)
    assert last["networks"]["MDT"]["images"][0] == pytest.approx(1.375 / 2)
    assert last["networks"]["none"] is None
    assert report["change"] == {"since": 300, "fell": [0.25, pytest.approx(np.sqrt(0.125))]}
    assert report["rank_correlation"] is None
    assert report["networks"]["MDT"]["difference"] == [-0.5, pytest.approx(np.sqrt(0.5))]
    printed = curves.tables(report)
    assert (
        "| 400 | 2.000 ± 0.000 | 1.38 ± 0.88 · 0.46 ± 0.29 · 0.46 ± 0.29 | not reached |" in printed
    )
    assert "Between the steps 300 and 400 the distance of DiT fell by 25.0%." in printed
    # At 200 steps the second network of seed 0 is there at its first checkpoint.
    assert (
        "| 200 | 6.000 ± 2.828 | at least 1.50 ± 0.71 · 0.50 ± 0.24 · 0.50 ± 0.24 | not" in printed
    )


def test_runs_measured_once_have_no_factors():
    report = curves.report({"MDT": [run_of([2.0])], "DiT": [run_of([3.0])]}, {"distance": 0.5})
    assert report["factors"] == [] and report["change"] is None
    printed = curves.tables(report)
    assert "| DiT | 100 | 3.000 ± 0.000 | 0.500 ± 0.000 |" in printed and "fell" not in printed


def test_networks_of_different_lengths_are_compared_by_their_curves(tmp_path):
    """The shorter one has no difference at its last step, but a factor."""
    runs = {"DiT": [run_of([8, 4, 2, 1])], "MDTv2": [run_of([2, 0.5])]}
    report = curves.report(runs, {"distance": 0.5})
    assert [row["steps"] for row in report["networks"].values()] == [400, 200]
    assert report["factors"][-1]["networks"]["MDTv2"]["steps"][0] == pytest.approx(400 / 150)
    printed = curves.tables(report)
    assert "| MDTv2 | 200 | 0.500 ± 0.000 | 0.500 ± 0.000 |" in printed
    assert re.search(r"\| MDTv2 .* \|  \| 100 \| 0.00 \|", printed)
    curves.draw(tmp_path / "curves.png", runs, {"distance": 0.5})


def test_the_rank_correlation_is_spearmans():
    scipy_stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    runs = {"a": [run_of(random.random(8))], "b": [run_of(random.random(8))]}
    points = [point for of_name in runs.values() for point in of_name[0]["points"]]
    for point in points:
        point["pixel_distance"] = point["distance"] ** 3 + 0.1 * random.random()
    pairs = [[point[name] for point in points] for name in ("distance", "pixel_distance")]
    found = curves.report(runs, {"distance": 0.1})["rank_correlation"]
    assert found == pytest.approx(scipy_stats.spearmanr(*pairs).statistic)


def test_plots_are_drawn(tmp_path):
    runs = {"DiT": [run_of([4, 2]), run_of([3, 2])], "MDT": [run_of([2, 1]), run_of([2, 1])]}
    curves.draw(tmp_path / "curves.png", runs, {"distance": 0.5})
    ends = {name: [run_of([2.0])] for name in runs}
    curves.draw(tmp_path / "dots.png", ends, {"distance": 0.5})
    assert min(path.stat().st_size for path in tmp_path.iterdir()) > 1000


# Features and losses.


@pytest.mark.parametrize("data, least", [("digits", 0.97), ("mnist", 0.97), ("digits_5_9", 0.96)])
def test_the_classifiers_that_are_shipped(data, least):
    train, held_out = sources.load(data)
    network = features.Classifier(data)
    assert network.sha256 in (ROOT / "docs" / "results.md").read_text()
    of_held_out, classes = network(held_out.images)
    assert of_held_out.shape == (len(held_out), 64) and np.isfinite(of_held_out).all()
    assert np.mean(classes == held_out.labels) >= least
    # Real images are near real images, shuffled pixels are not.
    real = metrics.gaussian(of_held_out)
    chosen = np.random.default_rng(0).permutation(len(train))[: len(held_out)]
    images = train.images[chosen]
    shuffled = np.random.default_rng(1).permuted(images.reshape(len(images), -1), axis=1)
    near, far = (
        metrics.frechet(metrics.gaussian(network(each)[0]), real)
        for each in (images, shuffled.reshape(images.shape))
    )
    assert far > 20 * near > 0


def test_a_classifier_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "FOLDER", tmp_path)
    printed = run_here(features.bench, "--data=digits", "--epochs=6")
    share = float(re.search(r"digits.safetensors: ([0-9.]+) of 359", printed)[1])
    assert share > 0.8 and features.Classifier("digits").sha256 in printed


def test_the_loss_of_a_network_that_predicts_nothing_is_that_of_the_noise(of_digits):
    model = MDT.from_config(small_run())
    params = init_params(model, keys.key(0))  # its last layer is 0
    loss = measures.held_loss(model, params, of_digits.held_out)
    assert loss == pytest.approx(1.0, abs=0.01)
    assert loss == measures.held_loss(model, params, of_digits.held_out)


def test_the_classes_of_both_parts_of_a_folder_agree(tmp_path):
    for part, names in (("train", "ab"), ("test", "ac")):
        for name in names:
            small_data.write_pictures(tmp_path / part / name, count=2)
    with pytest.raises(UserError, match="have other classes; make the folder anew"):
        features.load_images("emoji", str(tmp_path))
