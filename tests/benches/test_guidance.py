"""benchmarks/guidance.py on a run of four steps."""

import dataclasses
import json
import sys
import types

import matplotlib.image
import numpy as np
import pytest

from mdt_jax.diffusion.options import SampleOptions
from mdt_jax.models.mdt import MDT
from mdt_jax.train.costs import pass_macs
from tests.conftest import ROOT, exits_with_one_line, run_here
from tests.runs import DIGITS

sys.path.insert(0, str(ROOT / "benchmarks"))

import guidance  # noqa: E402

FEW = ["--samples=20", "--steps=4"]


def test_each_kind_of_guidance_is_measured_at_equal_cost(trained, tmp_path):
    flags = [f"--checkpoint={trained}", *FEW, "--scales=1,2", f"--out={tmp_path}"]
    printed = run_here(guidance.bench, *flags, f"--guide={trained}")
    found = json.loads((tmp_path / "guidance.json").read_text())["points"].values()
    kinds = {point["kind"] for point in found}
    assert kinds == {"no guidance", *guidance.GUIDANCE}
    for point in found:
        assert np.isfinite(point["distance"]) and 0 <= point["class_agreement"] <= 1
        assert 5 < point["passes"] <= 8 and point["steps"] >= 3
        assert point["kind"] in printed or point["scale"] == 1
    assert matplotlib.image.imread(tmp_path / "guidance.png").std() > 0
    before = (tmp_path / "guidance.json").read_bytes()
    assert run_here(guidance.bench, *flags, f"--guide={trained}").count("scale 2") == 0
    assert (tmp_path / "guidance.json").read_bytes() == before


def test_the_reused_encoder_is_measured(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(guidance, "DEGREES", (0, 1))
    monkeypatch.setattr(guidance, "EVERY", (1, 2))
    run_here(
        guidance.bench, f"--checkpoint={trained}", *FEW, "--suite=encoder", f"--out={tmp_path}"
    )
    found = json.loads((tmp_path / "encoder.json").read_text())["points"].values()
    by = {(point["kind"], point["steps"]): point for point in found if "difference" in point}
    assert by["always", 4]["passes"] == 8 and by["always", 8]["passes"] == 16
    assert by["each 2, degree 1", 4]["passes"] < 8 and by["each 2, degree 1", 4]["difference"] > 0
    assert matplotlib.image.imread(tmp_path / "encoder.png").std() > 0


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_what_samples_cost(version):
    model = MDT((8, 8), 1, 32, 6, 2, decoder_layers=2, num_classes=10, version=version)
    blocks = pass_macs(model.clone(depth=8)) - pass_macs(model)
    assert guidance.encoder_macs(model) == 2 * blocks  # two pairs of blocks
    pipeline = types.SimpleNamespace(model=model, guide=None)
    options = SampleOptions(num_steps=10, guidance="constant", guidance_scale=2.0)

    def cost(**changes):
        return guidance.passes(pipeline, dataclasses.replace(options, **changes))

    assert cost() == 20 and cost(guidance_scale=1.0) == 10
    assert 10 < cost(guide="masked") < 20
    share = guidance.encoder_macs(model) / pass_macs(model)
    assert cost(encoder_every=2) == pytest.approx(20 - 10 * share)
    assert cost(encoder_every=2, guidance_scale=1.0) == pytest.approx(10 - 5 * share)
    equal = guidance.equal_cost(pipeline, dataclasses.replace(options, guide="masked"), 20.0)
    assert guidance.passes(pipeline, equal) <= 20
    more = dataclasses.replace(equal, num_steps=equal.num_steps + 1)
    assert guidance.passes(pipeline, more) > 20


def test_what_cannot_be_measured(trained, capsys, monkeypatch):
    for argv, message in (
        ([f"--checkpoint={DIGITS}"], "is not a run on digits or mnist and its classes"),
        ([f"--checkpoint={trained}", "--suite=all"], "invalid choice"),
        ([f"--checkpoint={trained}", "--scales=a"], "invalid numbers value"),
    ):
        assert message in exits_with_one_line(guidance.bench, argv, capsys, monkeypatch)
