"""Inpainting: what is known stays, what is hidden becomes the class that was asked for."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.svm import SVC

import mdt_jax
from mdt_jax import inpaint, sample
from mdt_jax.data import masks, sources
from mdt_jax.data.images import to_float, to_uint8
from mdt_jax.diffusion.options import SampleOptions
from mdt_jax.models.mdt import MDT, init_params
from mdt_jax.runtime.errors import UserError
from mdt_jax.sampling.inpainting import InpaintOptions, known_tokens
from mdt_jax.sampling.inpainting import inpaint as fill
from mdt_jax.weights import kinds, networks
from tests.conftest import ROOT, exits_with_one_line, run_here
from tests.lively import load_lively, with_a_broken_class
from tests.small_data import VAE, write_vae

DIGITS = str(ROOT / "tests" / "digits.safetensors")
OPTIONS = dict(num_steps=50, guidance_scale=2.0, seed=0)
HALVES = {
    "right": np.arange(8)[None] >= np.full((8, 1), 4),
    "bottom": np.arange(8)[:, None] >= np.full((1, 8), 4),
    "tokens": np.kron(np.indices((4, 4)).sum(0) % 2, np.ones((2, 2))).astype(bool),
}
HOWS = {
    "repaint": InpaintOptions(num_resamples=3),
    "side_interpolater": InpaintOptions("side_interpolater"),
}


@pytest.fixture(scope="module")
def digits():
    return mdt_jax.load(DIGITS)


@pytest.fixture(scope="module")
def lively(trained):
    return load_lively(trained)


@pytest.fixture(scope="module")
def pictures():
    """(held-out images, labels, a classifier trained on the others)."""
    train, held_out = sources.load("digits")
    flat = to_float(train.images).reshape(len(train.images), -1)
    return held_out.images[:40], held_out.labels[:40], SVC(C=10).fit(flat, train.labels)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("mode", HOWS)
def test_half_of_each_digit_is_drawn(digits, pictures, mode, half):
    images, labels, classifier = pictures
    hidden = HALVES[half]
    assert hidden.mean() == 0.5
    out = fill(*digits, to_float(images), hidden, labels, how=HOWS[mode], **OPTIONS)
    drawn = to_uint8(out)
    np.testing.assert_array_equal(out[:, ~hidden], to_float(images)[:, ~hidden])
    read = classifier.predict(to_float(drawn).reshape(len(drawn), -1))
    assert np.mean(read == labels) >= 0.9
    assert np.abs(drawn.astype(int) - images)[:, hidden].mean() > 5, "it is not the same picture"


@pytest.mark.parametrize("mode", HOWS)
def test_what_is_hidden_is_not_looked_at(digits, pictures, mode):
    images, labels, _ = pictures
    hidden = HALVES["right"]
    options = {**OPTIONS, "num_steps": 20}
    given = to_float(images[:3])
    out = fill(*digits, given, hidden, labels[:3], how=HOWS[mode], **options)
    given[:, hidden] = np.random.RandomState(0).normal(size=given[:, hidden].shape)
    other = fill(*digits, given, hidden, labels[:3], how=HOWS[mode], **options)
    np.testing.assert_array_equal(out, other)
    # Sample n depends on seed and n, not on the batch or the bar.
    options |= {"batch_size": 2, "progress": True}
    parts = fill(*digits, given, hidden, labels[:3], how=HOWS[mode], **options)
    np.testing.assert_allclose(parts, out, atol=1e-4)


class Watched(MDT):
    """An MDT that notes how many tokens each evaluation's encoder sees."""

    def __call__(self, x, t, y=None, keep_ids=None, **more):
        seen = 0 if keep_ids is None else keep_ids.shape[1]
        jax.debug.callback(lambda t: PASSES.append((int(t[0]), seen)), t, ordered=True)
        return super().__call__(x, t, y, keep_ids=keep_ids, **more)


PASSES = []


def test_early_steps_take_the_masked_pass(digits, pictures):
    model, params = digits
    fields = {f: getattr(model, f) for f in MDT.__dataclass_fields__ if f not in ("parent", "name")}
    images, labels, _ = pictures
    hidden = np.zeros((8, 8), bool)
    hidden[1, 1:5] = True  # a piece of three tokens: 13 of 16 are wholly known
    assert known_tokens(hidden, 2).tolist() == list(range(3, 16))
    PASSES.clear()
    fill(
        Watched(**fields), params, to_float(images[:2]), hidden, labels[:2], num_steps=5,
        how=InpaintOptions("side_interpolater", masked_share=0.4),
    )  # fmt: skip
    jax.effects_barrier()
    assert PASSES == [(999, 13), (749, 13), (500, 0), (250, 0), (0, 0)]
    PASSES.clear()
    how = InpaintOptions("repaint", jump_length=2, num_resamples=2)
    fill(Watched(**fields), params, to_float(images[:2]), hidden, labels[:2], num_steps=5, how=how)
    jax.effects_barrier()
    walk = [999, 749, 999, 749, 500, 250, 500, 250, 0]
    assert [(t, 0) for t in walk] == PASSES


@pytest.mark.parametrize("mode", HOWS)
def test_predictions_of_pixels_are_clipped_in_all_passes(lively, mode):
    given = np.zeros((2, 8, 8, 1)), HALVES["right"], [1, 2]
    how = dict(how=HOWS[mode], num_steps=12, guidance_scale=2.0)
    assert np.abs(fill(*lively, *given, **how)).max() == 1
    assert np.abs(fill(*lively, *given, clip_denoised=False, **how)).max() > 1.2


def test_v2_and_models_without_classes():
    for version, classes in (("v2", 3), ("v1", 0)):
        model = MDT(input_size=(8, 8), in_channels=1, hidden_size=16, depth=3, num_heads=2,
                    decoder_layers=1, num_classes=classes, version=version)  # fmt: skip
        params = init_params(model, jax.random.key(0))
        given = np.zeros((2, 8, 8, 1), np.float32)
        for how in HOWS.values():
            out = fill(
                model, params, given, HALVES["right"], [0, 0], how=how, num_steps=11,
                guidance_scale=1.0,
            )  # fmt: skip
            assert np.isfinite(out).all() and np.abs(out[:, :, 4:]).max() > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(how=InpaintOptions("x")), "unknown mode 'x'; choose one of repaint"),
        (dict(how=InpaintOptions(num_resamples=0)), "num_resamples is 0"),
        (dict(how=InpaintOptions(jump_length=0)), "jump_length is 0"),
        (dict(how=InpaintOptions(masked_share=1.5)), "masked_share is 1.5"),
        (dict(num_steps=10), "num_steps 10 leaves no room for jumps of 10: use more num_steps"),
        (dict(images=np.full((1, 8, 8, 1), np.nan)), "not finite"),
        (dict(sampler="heun"), "takes the sampler ddpm or ddim, not heun"),
        (dict(sampler="dpmpp_2m"), "not dpmpp_2m"),
        (dict(hidden=np.zeros((8, 8), bool)), "hides nothing"),
        (dict(hidden=np.ones((8, 8), bool)), "hides everything: that is sampling"),
        (dict(hidden=np.ones((4, 8), bool)), "the mask is 4×8, but the model draws 8×8"),
        (dict(images=np.zeros((1, 4, 4, 1))), "images of shape"),
        (dict(labels=[1, 2]), "images of shape"),
        (dict(labels=[10]), "outside the classes"),
        (dict(hidden=np.eye(8, dtype=bool) | np.kron(1 - np.eye(4), np.ones((2, 2))).astype(bool),
              how=HOWS["side_interpolater"]), "no token is completely known"),
    ],
)  # fmt: skip
def test_what_cannot_be_inpainted(digits, changes, message):
    given = dict(images=np.zeros((1, 8, 8, 1)), hidden=HALVES["right"], labels=[1]) | changes
    with pytest.raises(UserError, match=message):
        fill(*digits, **given)


def test_a_completion_that_is_not_finite_is_an_error(digits, pictures):
    model, params = digits
    given = to_float(pictures[0][:3]), HALVES["right"]
    with pytest.raises(UserError, match="sample 2 holds NaN or infinity"):
        fill(
            model, with_a_broken_class(params, 7), *given, [0, 1, 7], batch_size=2,
            how=InpaintOptions("side_interpolater"), num_steps=2,
        )  # fmt: skip


def test_each_completion_has_its_own_guidance_scale(digits, pictures):
    images, labels, _ = pictures
    base = SampleOptions(num_steps=12, guidance_scale=1.0, sampler="ddim")
    given = (to_float(images[:2]), HALVES["right"], labels[:2])
    how = dict(how=InpaintOptions(num_resamples=1), options=base)
    together = fill(*digits, *given, guidance_scale=[1.0, 6.0], **how)
    for n, scale in enumerate([1.0, 6.0]):
        alone = fill(*digits, *given, guidance_scale=scale, **how)
        np.testing.assert_allclose(together[n], alone[n], atol=1e-4)
    assert np.abs(together[1] - fill(*digits, *given, **how)[1]).max() > 0.05


def test_a_dit_has_no_masked_pass():
    model = MDT(input_size=(8, 8), in_channels=1, hidden_size=16, depth=2, num_heads=2,
                decoder_layers=0, num_classes=3)  # fmt: skip
    with pytest.raises(UserError, match="a DiT has no masked pass; use mode repaint"):
        fill(model, {}, np.zeros((1, 8, 8, 1)), HALVES["right"], [0], how=HOWS["side_interpolater"])


@pytest.fixture
def files(tmp_path, pictures):
    images, _, _ = pictures
    Image.fromarray(images[3, :, :, 0]).save(tmp_path / "in.png")
    Image.fromarray(HALVES["right"].astype(np.uint8) * 255).save(tmp_path / "mask.png")
    return tmp_path


def command(files, *flags: str) -> list[str]:
    return [
        f"--checkpoint={DIGITS}", f"--image={files / 'in.png'}", f"--mask={files / 'mask.png'}",
        f"--out={files / 'out.png'}", "--label=3", "--num_steps=12", *flags,
    ]  # fmt: skip


@pytest.mark.parametrize("mode", HOWS)
def test_the_command_leaves_known_pixels(files, mode):
    again = ["--num_resamples=2"] if mode == "repaint" else []
    printed = run_here(inpaint.main, *command(files, f"--mode={mode}", *again))
    assert "mask.png hides 50 % of the pixels" in printed
    before, after = (np.asarray(Image.open(files / name)) for name in ("in.png", "out.png"))
    assert after.shape == (8, 8) and after.dtype == np.uint8
    np.testing.assert_array_equal(after[:, :4], before[:, :4])
    assert (after[:, 4:] != before[:, 4:]).any()
    note = json.loads(Image.open(files / "out.png").text["Comment"])
    assert note["mode"] == mode and note["label"] == "3"
    run_here(inpaint.main, *command(files, f"--mode={mode}", "--num_samples=3", *again))
    assert Image.open(files / "out.png").size == (10 * 36 - 4, 32)


def test_a_grid_that_is_too_large(files, capsys, monkeypatch):
    argv = command(files, f"--num_samples={10**7}", "--num_resamples=1")
    line = exits_with_one_line(inpaint.main, argv, capsys, monkeypatch)
    assert "out.png: a grid of 10000000 images would have" in line


def test_the_command_resizes_when_asked_to(files, capsys, monkeypatch):
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (30, 40, 3), np.uint8)).save(
        files / "in.png"
    )
    line = exits_with_one_line(inpaint.main, command(files), capsys, monkeypatch)
    assert "mask.png is 8×8, but the image is 30×40; --resize" in line
    line = exits_with_one_line(inpaint.main, command(files, "--resize"), capsys, monkeypatch)
    assert "--resize takes masks of the image's proportions only" in line  # it is not stretched
    mask = np.zeros((30, 40), np.uint8)
    mask[:, 20:] = 255
    Image.fromarray(mask).save(files / "mask.png")
    line = exits_with_one_line(inpaint.main, command(files), capsys, monkeypatch)
    assert "mask.png is 30×40, but the model draws 8×8; --resize" in line
    run_here(inpaint.main, *command(files, "--resize", "--num_resamples=1"))
    assert Image.open(files / "out.png").size == (8, 8)


def read_pair(files, resize=True):
    paths = str(files / "in.png"), str(files / "mask.png")
    return masks.read_pair(*paths, (8, 8, 1), resize)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_picture_and_mask_are_turned_alike(files, orientation):
    """The mask is drawn over the picture as viewers show it."""
    shown = np.zeros((64, 64), np.uint8)
    shown[:32, :48] = 200
    hidden = shown > 0
    # What a camera stores that viewers show like this.
    undo = {
        2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1], 5: np.transpose,
        6: lambda x: np.rot90(x, 1), 7: lambda x: x[::-1, ::-1].T, 8: lambda x: np.rot90(x, -1),
    }.get(orientation, np.array)  # fmt: skip
    exif = Image.Exif()
    exif[0x112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo(shown)))
    stored.save(files / "in.png", exif=exif)
    Image.fromarray(hidden).save(files / "mask.png")
    image, found = read_pair(files)
    np.testing.assert_array_equal(found, hidden[::8, ::8])
    assert image[found].min() > 190 and image[~found].max() < 10
    stored.save(files / "mask.png", exif=exif)
    np.testing.assert_array_equal(read_pair(files)[1], found)


def test_a_mask_of_any_kind(files):
    """White on black as every mode has it; what is transparent is known."""
    hidden = HALVES["right"]
    grey = Image.fromarray(hidden.astype(np.uint8) * 255)
    colours = Image.fromarray(np.where(hidden, 1, 0).astype(np.uint8)).convert("P")
    colours.putpalette([0, 0, 0, 255, 255, 255])
    strokes = Image.new("RGBA", (8, 8), (255, 255, 255, 0))  # white, painted on nothing
    strokes.paste((255, 255, 255, 255), (4, 0, 8, 8))
    nothing = colours.copy()
    nothing.putpalette([255, 255, 255, 255, 255, 255])
    forms = {
        "1": grey.convert("1"), "L": grey, "LA": grey.convert("LA"), "P": colours,
        "RGB": grey.convert("RGB"), "RGBA": grey.convert("RGBA"), "strokes": strokes,
        "LA strokes": strokes.convert("LA"),
        "16 bits": Image.fromarray(hidden.astype(np.uint16) * 65535),
    }  # fmt: skip
    for form, mask in forms.items():
        mask.save(files / "mask.png")
        np.testing.assert_array_equal(read_pair(files, resize=False)[1], hidden, form)
    nothing.save(files / "mask.png", transparency=0)
    np.testing.assert_array_equal(read_pair(files, resize=False)[1], hidden, "tRNS")


def test_a_smaller_mask_of_the_same_proportions(files):
    Image.fromarray(np.zeros((30, 60), np.uint8)).save(files / "in.png")
    mask = np.zeros((15, 30), np.uint8)
    mask[:, 15:] = 255
    Image.fromarray(mask).save(files / "mask.png")
    np.testing.assert_array_equal(read_pair(files)[1], HALVES["right"])
    assert masks.scaled_alike((33, 22), (100, 67)) and masks.scaled_alike((100, 67), (33, 22))
    assert not masks.scaled_alike((64, 64), (64, 60))


def test_the_command_on_latents(tmp_path):
    """Of what is hidden nothing reaches the result; what is known is as it was, to the pixel."""
    model = MDT(input_size=(8, 8), in_channels=4, hidden_size=16, depth=2, num_heads=2,
                decoder_layers=1, num_classes=3)  # fmt: skip
    networks.save(tmp_path / "mdt", kinds.Weights(model, init_params(model, jax.random.key(0))))
    write_vae(tmp_path / "vae")
    size = 8 * VAE.factor
    mask = np.zeros((size, size), np.uint8)
    mask[10:30, 5:37] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    random = np.random.RandomState(0)
    image = random.randint(0, 256, (size, size, 3), np.uint8)
    drawn = []
    for number in range(2):
        image[mask > 0] = random.randint(0, 256, (1, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / "in.png")
        run_here(
            inpaint.main, f"--checkpoint={tmp_path / 'mdt'}", f"--vae={tmp_path / 'vae'}",
            f"--image={tmp_path / 'in.png'}", f"--mask={tmp_path / 'mask.png'}", "--label=1",
            "--num_steps=3", "--mode=side_interpolater", f"--out={tmp_path / f'{number}.png'}",
        )  # fmt: skip
        drawn.append(np.asarray(Image.open(tmp_path / f"{number}.png")))
        np.testing.assert_array_equal(drawn[-1][mask == 0], image[mask == 0])
        assert (drawn[-1][mask > 0] != image[mask > 0]).any()
    np.testing.assert_array_equal(*drawn)


@pytest.mark.parametrize(
    "flags, mask, message",
    [
        ([], 0, "(white is hidden, black known) hides nothing: the image would stay as it is"),
        ([], 255, "hides everything: that is sampling"),
        (["--label=10"], None, "label 10 is outside"),
        (["--label=cat"], None, "--label=cat: 'cat' is no class number"),
        (["--sampler=heun"], None, "takes the sampler ddpm or ddim"),
        (["--mode=x"], None, "invalid choice: 'x'"),
        (["--masked_share=2", "--mode=side_interpolater"], None, "masked_share is 2"),
        (["--masked_share=0.2"], None, "--masked_share is for --mode=side_interpolater"),
        (["--num_resamples=2", "--mode=side_interpolater"], None, "is for --mode=repaint"),
        (["--guidance_skip_tolerance=0.1"], None, "saves nothing here"),
        (["--label=3,5"], None, "--label=3,5: '3,5' is no class number"),
        (["--label=random"], None, "'random' is no class number"),
        (["--label="], None, "--label=: '' is no class number"),
        (["--label=1.5"], None, "'1.5' is no class number"),
        (["--guidance_scale=1,,2"], None, "expected a number, or several: 1,2,4; got '1,,2'"),
        (["--num_resamples=2", "--num_steps=10"], None, "leaves no room for jumps of 10"),
        (["--num_samples=0"], None, "--num_samples: 0 must be at least 1"),
        (["--image=none.png"], None, "--image=none.png could not be read: No such file"),
        (["--out=out.jpg"], None, "unknown suffix '.jpg'; use .png"),
        (["--vae_scale=1"], None, "--vae_scale is for latents"),
    ],
)
def test_mistakes(files, flags, mask, message, capsys, monkeypatch):
    if mask is not None:
        Image.fromarray(np.full((8, 8), mask, np.uint8)).save(files / "mask.png")
    argv = command(files, *flags)
    assert message in exits_with_one_line(inpaint.main, argv, capsys, monkeypatch)
    assert not (files / "out.png").exists()


def test_a_label_is_missing(files, capsys, monkeypatch):
    argv = [flag for flag in command(files) if not flag.startswith("--label")]
    line = exits_with_one_line(inpaint.main, argv, capsys, monkeypatch)
    assert "--label is missing: one of 10 classes" in line
    (files / "mask.png").write_text("not a picture")
    line = exits_with_one_line(inpaint.main, command(files), capsys, monkeypatch)
    assert "mask.png could not be read" in line


def test_both_commands_have_the_same_sampling_flags():
    shared = {"--sampler", "--eta", "--guidance_low", "--dtype", "--vae_scale"}
    for module in (sample, inpaint):
        text = run_here(module.main, "--help")
        assert all(flag in text for flag in shared)
