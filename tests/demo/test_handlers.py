"""The handlers of the page, called from Python."""

import contextlib
import json
import os
import re
import shlex
import shutil
import threading
import time

import numpy as np
import pytest
from PIL import Image

import mdt_jax
from mdt_jax import inpaint, sample
from mdt_jax.demo import forms, layout
from mdt_jax.demo.handlers import KEPT, OPTIONS, Handlers
from mdt_jax.demo.jobs import Jobs, Stopped
from mdt_jax.demo.runs import Runs
from mdt_jax.runtime.errors import UserError
from mdt_jax.weights.kinds import Weights
from tests.conftest import ROOT, run_here
from tests.runs import DIGITS


@pytest.fixture(scope="module")
def handlers(tmp_path_factory):
    pipeline = mdt_jax.sampling.pipeline.Pipeline.load(DIGITS)
    return Handlers(pipeline, str(tmp_path_factory.mktemp("pictures")))


def options(handlers, **changes):
    """The values of the page's fields: few steps, but for the changes."""
    own = {name: getattr(handlers.pipeline.options, name) for name in OPTIONS}
    return list((own | {"num_steps": 4.0, "guidance_scale": 2.0} | changes).values())


def last(updates):
    """The last update of a handler that must succeed."""
    *_, update = updates
    assert "error" not in update.state, update.state
    assert "Done." in update.state
    return update


def sentence(updates) -> str:
    """The red sentence that a handler ends with."""
    *_, update = updates
    (text,) = re.findall(r'<p class="error" role="alert">(.*)</p>', update.state)
    assert update.result is None and "Traceback" not in text
    return text


def test_a_picture_is_that_of_the_command(handlers, tmp_path):
    update = last(handlers.draw("a", [3, 8], 6.0, 7.0, False, *options(handlers)))
    ((path, caption),) = update.result
    assert caption is None
    words = shlex.split(update.command)
    assert words[:3] == ["python", "-m", "mdt_jax.sample"] and words[-1] == "--out=samples.png"
    out = tmp_path / "samples.png"
    run_here(sample.main, *words[3:-1], f"--out={out}")
    with open(path, "rb") as ours:
        assert ours.read() == out.read_bytes()
    note = json.loads(Image.open(path).text["Comment"])
    assert (note["labels"], note["seed"], note["num_steps"]) == ("3,8", 7, 4)


def test_progress_and_the_command_are_told_on_the_way(handlers):
    updates = list(handlers.draw("a", [], 2, 0, False, *options(handlers, num_steps=30)))
    assert "compiled first" in updates[0].state
    assert any(re.search(r"Sampling: \d+ of 30 steps", update.state) for update in updates)
    assert len({update.command for update in updates}) == 1


def test_three_scales_have_the_same_noise(handlers):
    update = last(handlers.draw("a", [5], 2, 1, True, *options(handlers)))
    assert [caption for _, caption in update.result] == [
        "guidance scale 1.5", "guidance scale 2", "guidance scale 3"
    ]  # fmt: skip
    assert update.command.count("--seed=1") == 3 and "scale-1.5.png" in update.command
    plain = last(handlers.draw("a", [5], 2, 1, False, *options(handlers)))
    pictures = [np.asarray(Image.open(path)) for path, _ in [*update.result, *plain.result]]
    assert (pictures[1] == pictures[3]).all() and (pictures[0] != pictures[2]).any()


@pytest.mark.parametrize("show", ["trajectory", "noise", "classes"])
def test_rows_are_those_of_the_command(show, handlers, tmp_path):
    update = last(handlers.watch("a", show, [3, 8], 2, 0, 3.0, *options(handlers)))
    strip, moving = update.result
    words = shlex.split(update.command)
    for name, path in (("a.png", strip), ("a.gif", moving)):
        run_here(sample.main, *words[3:-1], f"--out={tmp_path / name}")
        with open(path, "rb") as ours:
            assert ours.read() == (tmp_path / name).read_bytes()
    with Image.open(moving) as gif:
        assert gif.n_frames == 3


def test_the_weight_is_drawn_live(handlers):
    low, high = (handlers.weight(*options(handlers, guidance_scale=s)) for s in (2.0, 5.0))
    assert 'aria-label="Guidance weight, from 1 at the noise to 2 at the sample"' in low
    assert "to 5 at the sample" in high
    part = handlers.weight(*options(handlers, guidance_low=0.5))
    assert "to 1 at the sample" in part
    assert "swap them" in handlers.weight(*options(handlers, guidance_low=1, guidance_high=0.5))


def mask_of(handlers, rows: slice):
    """Layers of paint over rows of pixels."""
    width, height = forms.shown_size(handlers.pipeline)
    layer = np.zeros((height, width, 4), np.uint8)
    scale = height // handlers.pipeline.image_shape[0]
    layer[rows.start * scale : rows.stop * scale, :, 3] = 255
    return [layer]


INPAINTING = ["repaint", 2, 2, 0.3]


def test_known_pixels_stay(handlers, tmp_path):
    path, shown, state = handlers.picture(str(ROOT / "docs" / "three.png"))
    assert "Paint over" in state and shown.shape == (*forms.shown_size(handlers.pipeline)[::-1], 3)
    painted = mask_of(handlers, slice(0, 4))
    update = last(
        handlers.inpaint("a", path, painted, 3, 5, *INPAINTING, *options(handlers, num_steps=6))
    )
    out, seen = update.result
    image, complete = np.asarray(Image.open(path)), np.asarray(Image.open(out))
    assert (image[4:] == complete[4:]).all() and (image[:4] != complete[:4]).any()
    assert (seen[: len(seen) // 2] == (200, 40, 40)).all()
    assert (seen[len(seen) // 2 :] == shown[len(seen) // 2 :]).all()
    words = shlex.split(update.command)
    assert words[2] == "mdt_jax.inpaint" and "--jump_length=2" in words
    given = [w for w in words[3:-1] if not w.startswith(("--image", "--mask"))]
    folder = out.removesuffix("inpainted.png")
    run_here(
        inpaint.main, *given, f"--image={path}", f"--mask={folder}mask.png",
        f"--out={tmp_path / 'out.png'}",
    )  # fmt: skip
    with open(out, "rb") as ours:
        assert ours.read() == (tmp_path / "out.png").read_bytes()


def test_a_sample_may_be_painted_on(handlers):
    update = last(handlers.sample_picture("a", 4, 3, *options(handlers)))
    path, shown = update.result
    assert np.asarray(Image.open(path)).shape == (8, 8)
    (drawn,) = handlers.pipeline.generate([4], seed=3, num_steps=4, guidance_scale=2.0)
    assert (np.asarray(Image.open(path)) == mdt_jax.to_uint8(drawn)[:, :, 0]).all()
    assert shown.shape == (384, 384, 3)
    side = ["side_interpolater", 10, 10, 0.5]
    chosen = options(handlers)
    last(handlers.inpaint("a", path, mask_of(handlers, slice(2, 6)), 4, 0, *side, *chosen))


def test_a_mask_from_a_file(handlers, tmp_path):
    """White is hidden; its layer is what painting the same would be."""
    image, shown, _ = handlers.picture(str(ROOT / "docs" / "three.png"))
    hidden = np.zeros((16, 16), np.uint8)
    hidden[4:12] = 255
    Image.fromarray(hidden).save(tmp_path / "mask.png")
    editor, state = handlers.mask(image, str(tmp_path / "mask.png"))
    assert "error" not in state and (editor["background"] == shown).all()
    painted = forms.painted(handlers.pipeline, editor["layers"])
    assert (
        painted == forms.painted(handlers.pipeline, mask_of(handlers, slice(2, 6)))
    ).all() and painted.sum() == 32

    assert "picture first" in handlers.mask(None, str(tmp_path / "mask.png"))[1]
    Image.new("L", (30, 20)).save(tmp_path / "wide.png")
    editor, state = handlers.mask(image, str(tmp_path / "wide.png"))
    assert editor is None and "the mask is 20×30, but the picture is 8×8" in state
    (tmp_path / "text.png").write_text("no picture")
    assert "the mask could not be read" in handlers.mask(image, str(tmp_path / "text.png"))[1]


def test_latents_are_hidden_in_blocks(handlers, tmp_path, monkeypatch):
    """A mask of one pixel hides the block of the latent that it is of."""
    from types import SimpleNamespace

    vae = SimpleNamespace(network=SimpleNamespace(factor=4))
    pipeline = SimpleNamespace(vae=vae, image_shape=(8, 8, 1))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    hidden = np.zeros((8, 8), bool)
    hidden[1, 6] = True
    seen = forms.as_seen(pipeline, tmp_path / "a.png", hidden)
    red = (seen == (200, 40, 40)).all(-1)[::48, ::48]
    assert red[:4, 4:].all() and red.sum() == 16


def test_mistakes_are_red_sentences(handlers, tmp_path):
    chosen = options(handlers)
    assert "seed is -1" in sentence(handlers.draw("a", [], 1, -1, False, *chosen))
    assert "seed is 1.5; it must be a whole number" in sentence(
        handlers.draw("a", [], 1, 1.5, False, *chosen)
    )
    assert "seed is empty" in sentence(handlers.draw("a", [], 1, None, False, *chosen))
    assert "must be a number" in sentence(handlers.draw("a", [], "4", 0, False, *chosen))
    for name in ("num_steps", "guidance_scale", "guidance_low"):
        empty = options(handlers, **{name: None})
        assert f"{name} is empty" in sentence(handlers.draw("a", [], 1, 0, True, *empty))
        assert f"{name} is empty" in handlers.weight(*empty)
    one = options(handlers, guidance_scale=1.0)
    assert "must be above 1" in sentence(handlers.draw("a", [], 1, 0, True, *one))
    assert "1 to 100" in sentence(handlers.draw("a", [], 101, 0, False, *chosen))
    assert "count is empty" in sentence(handlers.draw("a", [], None, 0, False, *chosen))
    assert "outside the classes" in sentence(handlers.draw("a", [77], 1, 0, False, *chosen))
    steps = options(handlers, num_steps=2000)
    assert "num_steps is 2000" in sentence(handlers.draw("a", [], 1, 0, False, *steps))
    other = options(handlers, sampler="euler; rm -rf")
    assert "sampler" in sentence(handlers.draw("a", [], 1, 0, False, *other))
    assert "2 to 50" in sentence(handlers.watch("a", "noise", [], 1, 0, 1, *chosen))
    assert "1 to 10 rows" in sentence(handlers.watch("a", "noise", [], 11, 0, 3, *chosen))
    assert "--show" in sentence(handlers.watch("a", "both", [], 1, 0, 3, *chosen))
    assert "evaluations" in sentence(handlers.watch("a", "trajectory", [], 1, 0, 9, *chosen))
    assert "two or more" in sentence(handlers.watch("a", "classes", [1], 1, 0, 3, *chosen))

    def inpainted(image, layers):
        return handlers.inpaint("a", image, layers, 3, 0, *INPAINTING, *chosen)

    path, _, _ = handlers.picture(str(ROOT / "docs" / "three.png"))
    assert "no picture yet" in sentence(inpainted(None, []))
    assert sentence(inpainted(path, [])).startswith("the mask hides nothing")
    assert "hides everything" in sentence(inpainted(path, mask_of(handlers, slice(0, 8))))
    half, long = mask_of(handlers, slice(0, 4)), ["repaint", 1, 10_000, 0.3]
    assert "too many for the page" in sentence(
        handlers.inpaint("a", path, half, 3, 0, *long, *chosen)
    )
    other = [np.zeros((10, 10, 4), np.uint8)]
    assert "10×10" in sentence(inpainted(path, other))


def test_pictures_that_are_none(handlers, tmp_path):
    def refused(path) -> str:
        image, shown, state = handlers.picture(path)
        assert image is None and shown is None
        return state

    assert "Choose a picture" in refused(None)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    assert "the picture could not be read" in refused(str(text)) and str(tmp_path) not in refused(
        str(text)
    )
    bomb = tmp_path / "bomb.png"
    Image.new("1", (60_000, 20_000)).save(bomb)
    assert "too large" in refused(str(bomb))
    one = tmp_path / "one.png"
    Image.new("L", (1, 1), 9).save(one)
    path, _, _ = handlers.picture(str(one))
    assert (np.asarray(Image.open(path)) == 9).all()


def test_the_command_loads_the_checkpoint_as_the_page_does(handlers, tmp_path):
    loaded = ["--dtype=bfloat16"]
    other = Handlers(handlers.pipeline, str(tmp_path), loaded)
    update = last(other.draw("a", [5], 1, 1, False, *options(handlers)))
    assert loaded[0] in update.command


def test_without_classes(handlers, tmp_path):
    gradio = pytest.importorskip("gradio")
    model, params = handlers.pipeline
    model = model.clone(num_classes=0)
    params = {name: value for name, value in params.items() if name != "label_embed"}
    pipeline = mdt_jax.sampling.pipeline.Pipeline("unconditional", Weights(model, params))
    handlers = Handlers(pipeline, str(tmp_path))
    with gradio.Blocks():
        assert layout._classes(handlers, many=False).value is None
    chosen = options(handlers, guidance_scale=1.0)
    update = last(handlers.sample_picture("a", None, 0, *chosen))
    painted = mask_of(handlers, slice(0, 4))
    last(handlers.inpaint("a", update.result[0], painted, None, 0, *INPAINTING, *chosen))


def test_old_pictures_are_deleted(handlers, tmp_path):
    other = Handlers(handlers.pipeline, str(tmp_path))
    ((path, _),) = last(other.draw("a", [5], 1, 1, False, *options(handlers))).result
    folder = os.path.dirname(path)
    os.utime(folder, (0, time.time() - 2 * KEPT))
    last(other.draw("a", [5], 1, 1, False, *options(handlers)))
    assert not os.path.exists(folder)


def test_stop_between_two_steps(handlers):
    updates = handlers.draw("me/draw", [], 4, 0, False, *options(handlers, num_steps=1000))
    for update in updates:
        if re.search(r"[1-9]\d* of 1,000", update.state):
            break
    assert "Nothing" in handlers.stop("me/watch") and "Stopped" in handlers.stop("me/")
    *_, update = updates
    assert "Stopped." in update.state and update.result is None
    last(handlers.draw("me", [], 1, 0, False, *options(handlers)))


def test_a_closed_page_stops_its_job():
    jobs, begun, ended = Jobs(), threading.Event(), threading.Event()

    def work():
        from mdt_jax.runtime.progress import progress_bar

        try:
            with progress_bar(10**9, True, "sampling", "step") as bar:
                for _ in range(10**9):
                    bar.update(1)
                    begun.set()
        finally:
            ended.set()

    job = jobs.run("me", work)
    next(job)
    assert begun.wait(30)
    job.close()
    assert ended.wait(30)
    with contextlib.suppress(Stopped):
        *_, _ = jobs.run("me", lambda: None)


def test_errors_of_the_code_are_not_hidden():
    jobs = Jobs()
    with pytest.raises(ZeroDivisionError):
        list(jobs.run("me", lambda: 1 / 0))
    with pytest.raises(UserError, match="no such"):
        list(jobs.run("me", lambda: open("/no such/file")))  # noqa: SIM115


def test_runs(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "one")
    shutil.copytree(trained, tmp_path / "two")
    (tmp_path / "other").mkdir()
    (copies := tmp_path / "copies").mkdir()
    runs = Runs(tmp_path, str(copies))
    assert runs.names() == ["one", "two"] and Runs(trained, str(copies)).names() == ["."]
    shown = runs.show("one")
    assert "Finished after 4 steps." in shown.state and "Learning rate" in shown.curves
    assert "Fréchet distance" in shown.results and "optim.lr" in shown.config
    assert shown.steps == [2, 4] and runs.grid("one", 0).endswith("0000002.png")
    assert (copies / "run-one-0000002.png").read_bytes() == (
        trained / "samples" / "0000002.png"
    ).read_bytes()
    for name in ("..", "../runs", "/etc", "other", "three"):
        assert "there is no run" in runs.show(name).state and runs.grid(name, 0) is None
    for place in (-1, None, 7):
        assert runs.grid("two", place) is not None
    for text in ('{"train": 5}', '{"a": 1}', "[]", "{"):
        (tmp_path / "two" / "config.json").write_text(text)
        assert 'class="error"' in runs.show("two").state
    shutil.rmtree(tmp_path / "one" / "samples")
    assert runs.show("one").steps == [] and runs.grid("one", 0) is None
    with pytest.raises(UserError, match="is no run, and holds none"):
        Runs(tmp_path / "other", str(copies))


def test_class_names(handlers):
    assert forms.class_names(handlers.pipeline) == [str(n) for n in range(10)]
