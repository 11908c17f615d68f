"""What mdt_jax.sample leaves on disk: as it comes, resumed, the same bytes whatever happened."""

import errno
import io
import json
import os
import shutil
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

import mdt_jax
from mdt_jax import sample
from mdt_jax.data import sources
from mdt_jax.data.sample_files import Folder, Grid, Npz
from mdt_jax.data.sample_notes import parsed
from mdt_jax.models.mdt import MDT, init_params
from mdt_jax.runtime.errors import UserError
from mdt_jax.sampling.labels import parse_labels
from mdt_jax.weights import kinds, networks
from tests.conftest import exits_with_one_line, run_here
from tests.lively import with_a_broken_class
from tests.models.common import random_params
from tests.runs import DIGITS, SAMPLE
from tests.small_data import VAE, write_vae


def draw(*flags: str) -> str:
    return run_here(sample.main, *SAMPLE, *flags)


def test_the_npz_is_what_adm_reads(tmp_path):
    """Its reader takes the header of arr_0 from the zip's stream, then rows of it, in order."""
    out = tmp_path / "samples.npz"
    draw("--num_samples=25", "--batch_size=10", "--labels=7,1", f"--out={out}")
    with zipfile.ZipFile(out) as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        assert (shape, fortran, dtype) == ((25, 8, 8, 1), False, np.uint8)
        images = np.frombuffer(file.read(), np.uint8).reshape(shape)
    with np.load(out) as saved:
        assert sorted(saved.files) == ["arr_0", "arr_1", "note"]
        np.testing.assert_array_equal(saved["arr_0"], images)
        assert saved["arr_1"].dtype == np.int64
        assert saved["arr_1"].tolist() == [7, 1] * 12 + [7]
        note = json.loads(str(saved["note"]))
    assert note["uint8"] == "clip((x + 1)*127.5, 0, 255), truncated"
    assert (note["sampler"], note["num_steps"], note["labels"]) == ("ddim", 3, "7,1")
    assert len(note["parameters_sha256"]) == 64 and note["precision"] == "highest"
    assert "finished already" in draw(
        "--num_samples=25", "--batch_size=10", "--labels=7,1", f"--out={out}"
    )


def test_clipping_is_in_the_note_and_a_flag(tmp_path):
    ways = {"": True, "--clip_denoised": True, "--clip_denoised=false": False}
    for number, (flag, clipped) in enumerate(ways.items()):
        out = tmp_path / f"{number}.npz"
        draw("--num_samples=2", *filter(None, [flag]), f"--out={out}")
        with np.load(out) as saved:
            assert json.loads(str(saved["note"]))["clip_denoised"] is clipped


def test_a_folder_of_pngs(tmp_path):
    npz, folder = tmp_path / "samples.npz", tmp_path / "pictures"
    flags = ["--num_samples=12", "--batch_size=5", "--labels=4,2,2"]
    draw(*flags, f"--out={npz}")
    draw(*flags, f"--out={folder}")
    images = np.load(npz)["arr_0"]
    labels = [4, 2, 2] * 4
    for n, label in enumerate(labels):
        with Image.open(folder / f"{label}_{n:06d}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), images[n, :, :, 0])
    # One that is missing is drawn again, and nothing else is.
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*_00000[0-4].png")}
    missing = folder / "2_000011.png"
    missing.unlink()
    (folder / "2_000011.png.4194304-0123abcd.tmp").touch()  # no process has this number
    draw(*flags, f"--out={folder}")
    assert missing.is_file() and len(list(folder.iterdir())) == 13
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert "finished already" in draw(*flags, f"--out={folder}")
    assert json.loads((folder / "settings.json").read_text())["num_samples"] == 12


def test_a_folder_of_pngs_is_a_data_set(tmp_path):
    from mdt_jax import config as configs

    draw("--num_samples=30", f"--out={tmp_path / 'pictures'}")
    config = configs.default()
    config.data.update(name="folder", path=str(tmp_path / "pictures"), image_size=8, channels=1)
    found = sources.cropped(config.data, 10, stand_ins=0)
    assert len(found) == 30 and len(found.classes) == 10


def test_other_settings_are_not_mixed(tmp_path, capsys, monkeypatch):
    out, parts = tmp_path / "a.npz", tmp_path / "a.npz.parts"
    sink = Npz(out, np.zeros(4, int), (2, 2, 1), {"seed": 1})
    sink.begin()
    sink.write(0, np.zeros((2, 2, 2, 1), np.uint8))
    assert sink.done(0, 2) and not sink.done(2, 2) and not sink.done(0, 3)
    other = Npz(out, np.zeros(4, int), (2, 2, 1), {"seed": 2})
    with pytest.raises(UserError, match="other settings .seed is 1 there and 2 here.; remove it"):
        other.begin()
    assert len(list(parts.iterdir())) == 2
    line = exits_with_one_line(sample.main, [*SAMPLE, f"--out={out}"], capsys, monkeypatch)
    assert "holds samples of other settings" in line
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    argv = [*SAMPLE, f"--out={tmp_path / 'mine'}"]
    assert "holds other files" in exits_with_one_line(sample.main, argv, capsys, monkeypatch)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "draft.tmp").write_text("dear")
    argv = [*SAMPLE, f"--out={tmp_path / 'theirs'}"]
    assert "holds other files" in exits_with_one_line(sample.main, argv, capsys, monkeypatch)
    assert (tmp_path / "theirs" / "draft.tmp").read_text() == "dear"


def test_a_finished_file_is_not_written_over(tmp_path, capsys, monkeypatch):
    out = tmp_path / "a.npz"
    draw("--num_samples=3", f"--out={out}")
    before = out.read_bytes()
    argv = [*SAMPLE, "--num_samples=3", "--seed=9", f"--out={out}"]
    line = exits_with_one_line(sample.main, argv, capsys, monkeypatch)
    assert "a.npz holds samples of other settings (seed is 0 there and 9 here); remove it" in line
    assert out.read_bytes() == before
    for content in (b"", b"no npz", before[:200]):
        out.write_bytes(content)
        line = exits_with_one_line(sample.main, argv, capsys, monkeypatch)
        assert "a.npz is no file of samples; remove it or choose another" in line
    np.save(tmp_path / "b", np.zeros(3))
    (tmp_path / "b.npy").rename(out)
    line = exits_with_one_line(sample.main, argv, capsys, monkeypatch)
    assert "a.npz is no file of samples" in line


@pytest.mark.parametrize("left", [[], ["settings.json"], ["settings.json", "000000000.npy"]])
def test_killed_while_the_parts_are_removed(left, tmp_path):
    out, parts = tmp_path / "a.npz", tmp_path / "a.npz.parts"
    draw("--num_samples=3", f"--out={out}")
    with np.load(out) as saved:
        note = str(saved["note"])
    parts.mkdir()
    for name in left:
        (parts / name).write_text(note)
    assert "finished already" in draw("--num_samples=3", f"--out={out}")
    assert not parts.exists()


def test_labels_that_changed_are_other_settings(tmp_path, capsys, monkeypatch):
    (tmp_path / "l.txt").write_text("1\n1\n")
    argv = [*SAMPLE, f"--labels={tmp_path / 'l.txt'}", f"--out={tmp_path / 'a.npz'}"]
    run_here(sample.main, *argv)
    (tmp_path / "l.txt").write_text("1\n8\n")
    line = exits_with_one_line(sample.main, argv, capsys, monkeypatch)
    assert "other settings (labels_sha256 is" in line


def test_a_part_cut_short_is_drawn_again(tmp_path):
    whole, out = tmp_path / "whole.npz", tmp_path / "a.npz"
    flags = ["--num_samples=20", "--batch_size=10"]
    draw(*flags, f"--out={whole}")
    shutil.copy(whole, out)
    parts = tmp_path / "b.npz.parts"
    with np.load(whole) as saved:
        note = json.loads(str(saved["note"]))
        first = saved["arr_0"][:10]
    sink = Npz(tmp_path / "b.npz", np.arange(20) % 10, (8, 8, 1), note)
    sink.begin()
    sink.write(0, first)
    part = next(parts.glob("*.npy"))
    part.write_bytes(part.read_bytes()[:-1])
    draw(*flags, f"--out={tmp_path / 'b.npz'}")
    assert (tmp_path / "b.npz").read_bytes() == whole.read_bytes()


def test_latents_are_decoded_batch_by_batch(tmp_path):
    model = MDT(input_size=(8, 8), in_channels=4, hidden_size=16, depth=2, num_heads=2,
                decoder_layers=1, num_classes=3)  # fmt: skip
    networks.save(tmp_path / "mdt", kinds.Weights(model, init_params(model, jax.random.key(0))))
    write_vae(tmp_path / "vae")
    flags = [f"--checkpoint={tmp_path / 'mdt'}", f"--vae={tmp_path / 'vae'}", "--num_steps=2"]
    flags += ["--num_samples=5"]
    for name, size in (("a", 2), ("b", 5)):
        run_here(sample.main, *flags, f"--batch_size={size}", f"--out={tmp_path / name}.npz")
    a, b = (np.load(tmp_path / f"{name}.npz") for name in "ab")
    assert a["arr_0"].shape == (5, 64, 64, 3)
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1
    assert json.loads(str(a["note"]))["vae"] == str(tmp_path / "vae")


@pytest.mark.parametrize("out", ["a.png", "a.npz", "a/", "a.gif"])
def test_samples_that_are_not_finite_are_not_written(out, tmp_path):
    model, params = mdt_jax.load(DIGITS)
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, 3e38), params)
    networks.save(tmp_path / "broken", kinds.Weights(model, broken))
    argv = [f"--checkpoint={tmp_path / 'broken'}", "--num_steps=2", "--num_samples=3"]
    argv += [f"--out={tmp_path}/new/{out}"] + ["--show=noise"] * (out == "a.gif")
    printed = run_here(sample.main, *argv, "--batch_size=2", expect=2)
    assert printed.splitlines()[-1].startswith("error: sample 0 holds NaN or infinity")
    assert list((tmp_path / "new").glob("*")) == []


def test_batches_before_one_that_is_not_finite_are_kept(tmp_path):
    model, params = mdt_jax.load(DIGITS)
    networks.save(tmp_path / "broken", kinds.Weights(model, with_a_broken_class(params, 3)))
    argv = [f"--checkpoint={tmp_path / 'broken'}", "--num_steps=2", "--num_samples=6"]
    argv += [f"--out={tmp_path}/a.npz", "--batch_size=2"]
    printed = run_here(sample.main, *argv, expect=2)
    assert printed.splitlines()[-1].startswith("error: sample 3 holds NaN or infinity")
    parts = sorted(path.name for path in (tmp_path / "a.npz.parts").iterdir())
    assert parts == ["000000000.npy", "settings.json"] and not (tmp_path / "a.npz").exists()


def test_images_that_a_vae_decodes_to_nan_are_not_written(tmp_path):
    model = MDT(input_size=(8, 8), in_channels=4, hidden_size=16, depth=2, num_heads=2,
                decoder_layers=1, num_classes=3)  # fmt: skip
    networks.save(tmp_path / "mdt", kinds.Weights(model, init_params(model, jax.random.key(0))))
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, 3e38), random_params(VAE))
    networks.save(tmp_path / "vae", kinds.Weights(VAE, broken))
    argv = [f"--checkpoint={tmp_path / 'mdt'}", f"--vae={tmp_path / 'vae'}", "--num_steps=2"]
    argv += ["--num_samples=2", f"--out={tmp_path / 'a.npz'}"]
    printed = run_here(sample.main, *argv, expect=2)
    assert "error: sample 0, decoded by the VAE, holds NaN or infinity" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mdt", "vae"]


def test_labels(tmp_path):
    def drawn(*flags):
        (tmp_path / "labels.npz").unlink(missing_ok=True)
        draw("--out=" + str(tmp_path / "labels.npz"), *flags)
        return np.load(tmp_path / "labels.npz")["arr_1"].tolist()

    assert drawn("--num_samples=12") == [*range(10), 0, 1]
    assert drawn("--num_samples=12", "--labels=balanced") == [*range(10), 0, 1]
    (tmp_path / "five.txt").write_text("\ufeff3\n1\n\n4\n1\n5\n", encoding="utf-8")
    assert drawn(f"--labels={tmp_path / 'five.txt'}") == [3, 1, 4, 1, 5]
    np.save(tmp_path / "five.npy", np.array([3, 1, 4, 1, 6]))
    assert drawn(f"--labels={tmp_path / 'five.npy'}", "--num_samples=5") == [3, 1, 4, 1, 6]
    random_ones = drawn("--labels=random", "--num_samples=40")
    assert random_ones == drawn("--labels=random", "--num_samples=40", "--batch_size=7")
    assert random_ones[:9] == drawn("--labels=random", "--num_samples=9")
    assert len(set(random_ones)) > 5


def test_names_are_looked_up_among_the_runs_own(tmp_path, capsys, monkeypatch):
    model = MDT(input_size=(4, 4), in_channels=1, hidden_size=16, depth=2, num_heads=2,
                decoder_layers=1, num_classes=3)  # fmt: skip
    found = kinds.Weights(model, init_params(model, jax.random.key(0)), classes=("1", "2", "3"))
    networks.save(tmp_path / "run", found)
    argv = [f"--checkpoint={tmp_path / 'run'}", "--num_steps=2", "--guidance_scale=1"]
    argv += [f"--out={tmp_path / 'a.npz'}"]
    line = exits_with_one_line(sample.main, [*argv, "--labels=1"], capsys, monkeypatch)
    assert "--labels=1: '1' may be class 0 by its name '1' or class 1 by its number" in line
    (tmp_path / "l.txt").write_text("3\n2\n")
    from_file = [*argv, f"--labels={tmp_path / 'l.txt'}"]
    line = exits_with_one_line(sample.main, from_file, capsys, monkeypatch)
    assert "l.txt, line 2: '2' may be class 1 by its name" in line
    run_here(sample.main, *argv, "--labels=3,name:1,number:1")
    with np.load(tmp_path / "a.npz") as saved:
        assert saved["arr_1"].tolist() == [2, 0, 1]
        assert json.loads(str(saved["note"]))["classes"] == ["1", "2", "3"]


def test_names_that_say_where_labels_come_from(tmp_path):
    classes = ("a.txt", "cat, tabby", "random", "pure random")

    def labels(text):
        return parse_labels(text, None, 4, classes).tolist()

    assert labels("cat, tabby") == [1] and labels("pure random") == [3]
    assert labels("name:a.txt") == [0] and labels("name:random,name:a.txt") == [2, 0]
    np.save(tmp_path / "l.npy", np.array([2, 1]))
    assert labels(str(tmp_path / "l.npy")) == [2, 1]
    for text in ("random", "a.txt"):
        with pytest.raises(UserError, match=f"--labels=name:{text} is the class"):
            labels(text)


def test_what_is_wrong_with_labels(tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.txt").write_text("3\nthree\n")
    (tmp_path / "far.txt").write_text("3\n10\n")
    (tmp_path / "none.txt").write_text("\n")
    np.save(tmp_path / "square.npy", np.zeros((2, 2), int))
    np.save(tmp_path / "half.npy", np.array([0.5]))
    (tmp_path / "no.npy").write_text("no array")
    (tmp_path / "empty.npy").write_text("")
    np.save(tmp_path / "yes.npy", np.array([True, False]))
    np.savez(tmp_path / "zip.npz", np.zeros(3, int))
    (tmp_path / "zip.npz").rename(tmp_path / "zip.npy")
    np.save(tmp_path / "sound.npy", np.arange(9))
    sound = (tmp_path / "sound.npy").read_bytes()
    (tmp_path / "open.npy").write_bytes(sound.replace(b"(9,), }", b"(9,),  "))
    (tmp_path / "huge.npy").write_bytes(
        sound.replace(b"(9,), }" + 12 * b" ", b"(9000000000000,), }")
    )
    os.mkfifo(tmp_path / "pipe.npy")
    for labels, more, message in (
        ("bad.txt", [], "bad.txt, line 2: 'three' is no class number"),
        ("far.txt", [], "label 10 is outside the classes 0 to 9"),
        ("far.txt", ["--num_samples=3"], "label 10"),
        ("none.txt", [], "holds no labels"),
        ("missing.txt", [], "could not be read: No such file"),
        ("square.npy", [], "has the shape (2, 2)"),
        ("half.npy", [], "is no array of whole numbers"),
        ("yes.npy", [], "is no array of whole numbers"),
        ("no.npy", [], "could not be read"),
        ("empty.npy", [], "could not be read"),
        ("zip.npy", [], "is no array of whole numbers"),
        ("open.npy", [], "could not be read"),
        ("huge.npy", [], "could not be read: mmap length is greater than file size"),
        ("pipe.npy", [], "could not be read: it is no regular file"),
    ):
        argv = [*SAMPLE, f"--labels={tmp_path / labels}", f"--out={tmp_path / 'x.npz'}", *more]
        assert message in exits_with_one_line(sample.main, argv, capsys, monkeypatch)
    (tmp_path / "two.txt").write_text("3\n1\n")
    argv = [*SAMPLE, f"--labels={tmp_path / 'two.txt'}", "--num_samples=3", "--out=x.npz"]
    line = exits_with_one_line(sample.main, argv, capsys, monkeypatch)
    assert "has 2 labels, but --num_samples=3" in line
    assert not (tmp_path / "x.npz").exists() and not (tmp_path / "x.npz.parts").exists()


def test_scales_in_turn(tmp_path):
    draw("--guidance_scale=1,3", "--num_samples=4", "--labels=5", f"--out={tmp_path / 'a.npz'}")
    saved = np.load(tmp_path / "a.npz")
    assert json.loads(str(saved["note"]))["guidance_scale"] == [1.0, 3.0]
    draw("--guidance_scale=3", "--num_samples=4", "--labels=5", f"--out={tmp_path / 'b.npz'}")
    same = (saved["arr_0"] == np.load(tmp_path / "b.npz")["arr_0"]).all((1, 2, 3))
    assert same.tolist() == [False, True, False, True]


def test_a_picture_that_was_emptied_is_drawn_again(tmp_path):
    folder, flags = tmp_path / "pictures", ["--num_samples=6", "--batch_size=3"]
    draw(*flags, f"--out={folder}")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    victim = folder / "4_000004.png"
    whole = before[victim.name]
    other = np.zeros((4, 4), np.uint8)
    for content in (b"", whole[: len(whole) // 2], b"GIF89a", None):
        if content is None:
            Image.fromarray(other).save(victim)  # a picture of another size
        else:
            victim.write_bytes(content)
        assert "finished already" not in draw(*flags, f"--out={folder}")
        assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
        assert "finished already" in draw(*flags, f"--out={folder}")


def test_a_finished_npz_of_which_a_byte_changed_is_drawn_again(tmp_path):
    out, flags = tmp_path / "a.npz", ["--num_samples=6", "--batch_size=3"]
    draw(*flags, f"--out={out}")
    whole = out.read_bytes()
    damaged = bytearray(whole)
    damaged[400] ^= 1  # among the pixels
    out.write_bytes(damaged)
    printed = draw(*flags, f"--out={out}")
    assert f"{out} is damaged; it is drawn again" in printed and out.read_bytes() == whole


def parts_of(tmp_path) -> tuple[Npz, np.ndarray]:
    sink = Npz(tmp_path / "a.npz", np.zeros(4, int), (2, 2, 1), {"seed": 1})
    images = np.arange(16, dtype=np.uint8).reshape(4, 2, 2, 1)
    sink.begin()
    for start in (0, 2):
        sink.write(start, images[start : start + 2])
    return sink, images


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


BAD_PARTS = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[:-5],
    "zeros": lambda whole: bytes(len(whole)),
    "a bit": lambda whole: whole[:130] + bytes([whole[130] ^ 1]) + whole[131:],
    "without its sum": lambda whole: npy(np.zeros((2, 2, 2, 1), np.uint8)),
    "a zip": lambda whole: b"PK\x05\x06" + bytes(18),
    "a header": lambda whole: b"\x93NUMPY\x01\x00\x10\x00{'descr': '|u1', (",
    "brackets": lambda whole: b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 0xFFFF,
    "of 2^40 numbers": lambda whole: whole.replace(b"(2, 2, 2, 1)", b"(1 << 40,)  "),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_parts_that_changed(name, tmp_path):
    """They count as missing, and never reach the file."""
    sink, images = parts_of(tmp_path)
    part = tmp_path / "a.npz.parts" / "000000002.npy"
    whole = part.read_bytes()
    part.write_bytes(BAD_PARTS[name](whole))
    again = Npz(sink.out, sink.labels, sink.shape, {"seed": 1})
    again.begin()
    assert again.done(0, 2) and not again.done(2, 2)
    with pytest.raises(UserError, match="000000002.npy has changed since it was written"):
        sink.finish()
    assert not sink.out.exists()
    again.write(2, images[2:])
    again.finish()
    np.testing.assert_array_equal(np.load(sink.out)["arr_0"], images)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_part_of_somebody_else_is_not_merged(tmp_path):
    sink, images = parts_of(tmp_path)
    (tmp_path / "a.npz.parts" / "000000001.npy").write_bytes(npy(images))
    sink.finish()
    np.testing.assert_array_equal(np.load(sink.out)["arr_0"], images)


BAD_NOTES = {
    "no text": npy(np.arange(3)),
    "2^40 letters": npy(np.array("x")).replace(b"'<U1', ", b"'<U1099511627776', "),
    "2^40 texts": npy(np.array("x")).replace(b"()", b"(1099511627776,)"),
    "no letters": npy(np.array("x"))[:-4] + b"\xff\xff\xff\xff",
    "cut": npy(np.array("xyz"))[:-4],
    "brackets": b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 0xFFFF,
    "nothing": b"",
}


@pytest.mark.parametrize("name", BAD_NOTES)
def test_notes_that_are_none(name, tmp_path):
    sink, _ = parts_of(tmp_path)
    with zipfile.ZipFile(sink.out, "w") as archive:
        archive.writestr("note.npy", BAD_NOTES[name])
    with pytest.raises(UserError, match=r"a\.npz is no file of samples"):
        sink.finished()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]", b"[" * 100_000, b'{"seed":  1}', b"3"])
def test_settings_that_are_damaged(content, tmp_path):
    sink, _ = parts_of(tmp_path)
    (sink.folder / "settings.json").write_bytes(content)
    with pytest.raises(UserError, match="holds samples of unknown settings"):
        sink.begin()


def test_what_cannot_be_read_just_now_is_left_alone(tmp_path, monkeypatch):
    """Neither removed nor called something else."""
    sink, _ = parts_of(tmp_path)
    sink.finish()
    other = Npz(sink.out, sink.labels, sink.shape, {"seed": 2})

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(zipfile, "ZipFile", fail)
    for call in (sink.finished, other.finished, other.give_way):
        with pytest.raises(UserError, match=r"a\.npz cannot be read just now: Input/output error"):
            call()
    assert sink.out.exists()


@pytest.mark.parametrize("kind", [Npz, Folder, Grid])
def test_names_that_are_no_text(kind, tmp_path):
    """Of classes, which are names of folders."""
    names = ["é", os.fsdecode(b"caf\xe9")]
    note = {"mdt_jax": "1", "num_classes": 2, "classes": names}
    sink = kind(tmp_path / "s.npz", np.array([0, 1]), (2, 2, 1), note)
    assert '"é", "caf\\udce9"' in sink.note
    sink.begin()
    sink.write(0, np.zeros((2, 2, 2, 1), np.uint8))
    sink.finish()
    assert kind is Grid or sink.finished()
    assert parsed(sink.note) == note
