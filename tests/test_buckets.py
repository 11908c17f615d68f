"""Commands whose files are in buckets, in this process: equal to those on a disk, or one line."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

import mdt_jax
from mdt_jax import convert, evaluate, inpaint, main, sample
from mdt_jax.runtime import buckets, files, leases, locks
from mdt_jax.runtime.errors import UserError
from mdt_jax.train import loop
from mdt_jax.weights.vae import Vae
from tests.conftest import ROOT, SMOKE, exits_with_one_line, run_here, train_here
from tests.gcs_protocol import Fault
from tests.runs import MEASURING, SAMPLE
from tests.small_data import write_vae

pytestmark = pytest.mark.usefixtures("keep_signals")


@pytest.fixture(scope="module")
def stored(gcs_process, trained):
    """(name, content) of each object of a finished run in a bucket."""
    gcs_process.make_bucket()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in gcs_process.environment.items():
            patch.setenv(name, value)
        train_here(*SMOKE, f"--workdir={gcs_process.root}/run")
    return [(name, gcs_process.read(name)) for name in gcs_process.objects()]


@pytest.fixture
def run(gcs, stored):
    """The workdir of a finished run, in a bucket of its own."""
    for name, content in stored:
        gcs.write(name, content)
    return f"{gcs.root}/run"


def same_images(content: bytes, file) -> None:
    """Whether an npz or a PNG has the same samples as a file; their notes name other paths."""
    if file.suffix == ".png":
        with Image.open(io.BytesIO(content)) as ours, Image.open(file) as theirs:
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
        return
    with np.load(io.BytesIO(content)) as ours, np.load(file) as theirs:
        for name in ("arr_0", "arr_1"):
            np.testing.assert_array_equal(ours[name], theirs[name])


def names(gcs, prefix: str = "") -> set[str]:
    """The objects without those of checkpoints."""
    return {name for name in gcs.objects(prefix) if "checkpoints/" not in name}


def test_a_run_has_the_files_that_it_has_on_a_disk(gcs, run, trained):
    on_disk = {f"run/{p.relative_to(trained)}" for p in trained.rglob("*") if p.is_file()}
    assert names(gcs) == {name for name in on_disk if "checkpoints/" not in name}
    for name in ("config.json", "classes.json"):
        assert gcs.read(f"run/{name}") == (trained / name).read_bytes()
    for name in ("samples.npz", "samples.png", "samples/0000004.png"):
        same_images(gcs.read(f"run/{name}"), trained / name)
    ours, theirs = (
        [json.loads(line)["loss"] for line in content.splitlines()]
        for content in (gcs.read("run/metrics.jsonl"), (trained / "metrics.jsonl").read_bytes())
    )
    assert ours == theirs
    loaded, local = mdt_jax.load(run), mdt_jax.load(str(trained))
    np.testing.assert_array_equal(
        loaded.generate([1, 2], num_steps=3), local.generate([1, 2], num_steps=3)
    )


def test_the_best_step_is_kept_as_on_a_disk(gcs, tmp_path):
    for workdir in (f"{gcs.root}/run", tmp_path / "run"):
        train_here(*MEASURING, "--config.train.steps=6", f"--workdir={workdir}")
    (there,) = (p.name for p in (tmp_path / "run" / "best" / "checkpoints").iterdir())
    steps = {name.split("/")[3] for name in gcs.objects("run/best/checkpoints/")}
    assert steps == {there}
    assert mdt_jax.load(f"{gcs.root}/run/best").weights.step == int(there)


def test_a_finished_run_is_left_alone(gcs, run):
    before = [(name, gcs.read(name)) for name in gcs.objects()]
    assert "reported already" in train_here(*SMOKE, f"--workdir={run}")
    assert [(name, gcs.read(name)) for name in gcs.objects()] == before


def test_a_step_without_its_commit_file_is_passed_over(gcs, run):
    gcs.remove("run/checkpoints/4/commit_success.txt")
    printed = run_here(sample.main, f"--checkpoint={run}", "--num_steps=3", "--labels=1",
                       f"--out={gcs.root}/a.png")  # fmt: skip
    assert f"{run}/checkpoints/4 is not finished, and is passed over" in printed
    printed = train_here(*SMOKE, f"--workdir={run}")
    assert "resuming from step 2" in printed
    assert f"removed the unfinished step 4 of {run}/checkpoints" in printed
    assert "run/checkpoints/4/commit_success.txt" in gcs.objects()


def test_a_run_whose_only_step_is_not_finished(gcs, run, capsys, monkeypatch):
    for step in (2, 4):
        gcs.remove(f"run/checkpoints/{step}/commit_success.txt")
    argv = [f"--checkpoint={run}", "--labels=1", f"--out={gcs.root}/a.png"]
    monkeypatch.setattr("sys.argv", ["command", *argv])
    printed = run_here(sample.main, *argv, expect=2)
    assert "checkpoints/4 is not finished" in printed and f"{run} holds no checkpoint" in printed
    assert "a.png" not in gcs.objects()


def test_a_damaged_step_is_marked(gcs, run):
    for damaged in [n for n in gcs.objects("run/checkpoints/4/params/") if "/d/" in n]:
        content = bytearray(gcs.read(damaged))
        content[len(content) // 2] ^= 1
        gcs.write(damaged, bytes(content))
    gcs.set_faults(Fault("POST", "samples/0000003.png", status=403))  # stops the run on its way
    printed = train_here(*SMOKE, "--config.train.sample_every=1", f"--workdir={run}", expect=2)
    gcs.set_faults()
    assert "checkpoints/4 is damaged" in printed and "resuming from step 2" in printed
    there = gcs.objects("run/checkpoints/4/")
    assert "run/checkpoints/4/damaged.txt" in there and damaged in there
    assert "run/checkpoints/4/commit_success.txt" not in there
    # The run gets there again: the step is saved anew.
    printed = train_here(*SMOKE, f"--workdir={run}")
    there = gcs.objects("run/checkpoints/4/")
    assert "run/checkpoints/4/commit_success.txt" in there and damaged not in there
    assert "run/checkpoints/4/damaged.txt" not in there


def test_a_step_that_cannot_be_read_just_now_is_not_damaged(gcs, run, capsys, monkeypatch):
    before = gcs.objects()
    gcs.set_faults(Fault("GET", "checkpoints/4/params.*alt=media", status=403))
    line = exits_with_one_line(main.main, [*SMOKE, f"--workdir={run}"], capsys, monkeypatch)
    assert "cannot be read just now" in line
    gcs.set_faults()
    assert gcs.objects() == before


def test_every_command_reads_and_writes_there(gcs, run, tmp_path):
    root, there, here = gcs.root, [f"--checkpoint={run}", "--num_steps=3"], tmp_path
    gcs.write("labels.txt", b"3\n5\n3\n5\n")
    for out in ("a.npz", "grid.png", "folder/"):
        flags = [*SAMPLE, "--labels={}/labels.txt", "--num_samples=4", "--batch_size=2"]
        (here / "labels.txt").write_text("3\n5\n3\n5\n")
        for place in (root, here):
            run_here(sample.main, *(f.format(place) for f in flags), f"--out={place}/{out}")
    for name in ("a.npz", "grid.png", *(p.name for p in (here / "folder").iterdir())):
        name = name if name in ("a.npz", "grid.png") else f"folder/{name}"
        ours, theirs = gcs.read(name), (here / name).read_bytes()
        if name.endswith(".json"):  # settings, which name the file of labels
            assert ours.replace(root.encode(), b"") == theirs.replace(str(here).encode(), b"")
        else:
            same_images(ours, here / name)
    again = run_here(sample.main, *(f.format(root) for f in flags), f"--out={root}/folder/")
    assert "finished already" in again
    run_here(sample.main, *there, "--num_samples=20", f"--out={root}/s.npz")
    features = "--features=pixels,classifier"
    run_here(evaluate.main, f"--samples={root}/s.npz", "--reference=digits", features)
    (here / "s.npz").write_bytes(gcs.read("s.npz"))
    run_here(evaluate.main, f"--samples={here}/s.npz", "--reference=digits", features)
    cards = json.loads(gcs.read("s.npz.json")), json.loads((here / "s.npz.json").read_bytes())
    assert cards[0]["measured"] == cards[1]["measured"]
    assert cards[0]["samples"]["sha256"] == cards[1]["samples"]["sha256"]
    for src, dst in ((run, "w.safetensors"), (f"{root}/w.safetensors", "w.pt"),
                     (f"{root}/w.safetensors", "w")):  # fmt: skip
        layers = [] if src == run else ["--decoder_layers=1"]
        run_here(convert.main, f"--src={src}", f"--dst={root}/{dst}", *layers)
    for name in ("w.safetensors", "w.pt", "w"):
        loaded = mdt_jax.load(f"{root}/{name}", decoder_layers=None if name == "w" else 1)
        for a, b in zip(*(map(np.asarray, _leaves(p.params)) for p in (loaded, mdt_jax.load(run))),
                        strict=True):  # fmt: skip
            np.testing.assert_array_equal(a.ravel(), b.ravel())
    gcs.write("in.png", (here / "folder" / "3_000000.png").read_bytes())
    mask = np.zeros((8, 8, 1), np.uint8)
    mask[:4] = 255
    mdt_jax.data.images.save_image(f"{root}/mask.png", mask)
    run_here(inpaint.main, *SAMPLE, f"--image={root}/in.png", f"--mask={root}/mask.png",
             "--label=3", "--num_resamples=1", f"--out={root}/out.png")  # fmt: skip
    assert {"in.png", "mask.png", "out.png"} <= names(gcs)
    assert not [name for name in gcs.objects() if "lock" in name or ".tmp" in name]


def _leaves(tree) -> list:
    import jax

    return jax.tree.leaves(tree)


def test_weights_and_samples_in_s3(s3, trained, capsys, monkeypatch):
    root = s3.root
    run_here(convert.main, f"--src={trained}", f"--dst={root}/w.safetensors")
    run_here(sample.main, f"--checkpoint={root}/w.safetensors", "--num_steps=3", "--labels=1,2",
             "--decoder_layers=1", f"--out={root}/a.npz")  # fmt: skip
    run_here(sample.main, *SAMPLE, "--labels=1,2", f"--out={root}/folder/")
    assert set(s3.objects()) == {
        "a.npz", "folder/1_000000.png", "folder/2_000001.png", "folder/settings.json",
        "w.safetensors",
    }  # fmt: skip
    for command, argv in (
        (main.main, [*SMOKE, f"--workdir={root}/run"]),
        (convert.main, [f"--src={trained}", f"--dst={root}/folder-of-orbax"]),
        (sample.main, [f"--checkpoint={root}/folder", "--labels=1", "--out=x.png"]),
    ):
        line = exits_with_one_line(command, argv, capsys, monkeypatch)
        assert "Orbax writes and reads arrays on disks and in gs:// only" in line


def test_a_folder_of_diffusers_in_a_bucket(gcs, tmp_path):
    write_vae(tmp_path / "orbax")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    file.parent.mkdir()
    run_here(convert.main, f"--src={tmp_path}/orbax", f"--dst={file}")
    (file.parent / "config.json").write_text(json.dumps({"scaling_factor": 0.25}))
    for path in file.parent.iterdir():
        gcs.write(f"vae/{path.name}", path.read_bytes())
    there, here = Vae.load(f"{gcs.root}/vae"), Vae.load(tmp_path / "vae")
    assert there.norm.scale == 0.25
    assert (there.norm, there.network, there.sha256) == (here.norm, here.network, here.sha256)


MISTAKES = {
    "no bucket": ([*SMOKE, "--workdir=gs://nobody-has-this/run"], "there is no bucket gs://nobody"),
    "no name": ([*SMOKE, "--workdir=gs://"], "write gs://BUCKET/NAME"),
    "dots": ([*SMOKE, "--workdir=gs://bucket/../run"], "write gs://BUCKET/NAME"),
    "an object": ([*SMOKE, "--workdir={}/object"], "is an object; choose another name"),
    "a number sign": ([*SMOKE, "--workdir={}/run#1"], "a name in a bucket cannot have a #"),
    "something else": ([*SMOKE, "--workdir={}/cats"], "holds something else than a run (cat.png)"),
    "a pattern": ([*SMOKE, "--workdir={}/run[1]"], "cannot be read back"),
    "a scheme": ([*SMOKE, "--workdir=az://bucket/run"], "is a URL, and mdt_jax reads and writes"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_workdir_that_cannot_be(name, gcs, capsys, monkeypatch):
    gcs.write("object", b"")
    gcs.write("cats/cat.png", b"")
    argv, message = MISTAKES[name]
    argv = [text.format(gcs.root) for text in argv]
    assert message in exits_with_one_line(main.main, argv, capsys, monkeypatch)
    assert gcs.objects() == ["cats/cat.png", "object"]


@pytest.mark.parametrize("status", [401, 403])
def test_no_permission_to_write(status, gcs, capsys, monkeypatch):
    gcs.set_faults(Fault("POST", "/upload/", status=status))
    line = exits_with_one_line(main.main, [*SMOKE, f"--workdir={gcs.root}/r"], capsys, monkeypatch)
    assert f"workdir {gcs.root}/r cannot be written to" in line
    assert "check the credentials and permissions" in line and gcs.objects() == []


def test_no_permission_to_delete(gcs, capsys, monkeypatch):
    argv = [*SMOKE, f"--workdir={gcs.root}/r"]
    gcs.set_faults(Fault("GET", r"/b/[^/]*(\?|$)", status=403))  # the metadata of the bucket
    line = exits_with_one_line(main.main, argv, capsys, monkeypatch)
    assert "needs the permission storage.buckets.get" in line and gcs.objects() == []
    gcs.set_faults(Fault("DELETE", "", status=403))
    for _ in range(2):
        line = exits_with_one_line(main.main, argv, capsys, monkeypatch)
        assert "objects can be written, but not removed" in line
    assert gcs.objects() == ["r/.write-test"]


def test_the_probe_of_another_process_is_no_content(gcs):
    for folder in ("run", "samples", "latents"):
        gcs.write(f"{folder}/.write-test", b"")
        assert files.names_in(files.as_path(f"{gcs.root}/{folder}")) == []
    train_here(*SMOKE, f"--workdir={gcs.root}/run")
    run_here(sample.main, *SAMPLE, "--labels=1", f"--out={gcs.root}/samples/")


def test_requests_that_are_refused(gcs, run, capsys, monkeypatch):
    """Answers of 400 are ValueErrors of gcsfs."""
    gcs.set_faults(Fault("GET", "", status=400))
    for argv in ([f"--checkpoint={run}", "--out=x.png"], [*SAMPLE, f"--out={gcs.root}/x.png"]):
        line = exits_with_one_line(sample.main, [*argv, "--labels=1"], capsys, monkeypatch)
        assert f"{gcs.root}/" in line


def test_other_peoples_objects_are_left_alone(gcs):
    for name in ("a1.npz.parts/x", "a*.npz.parts/x", "a*.npz.parts/y/z", "a[1]/x"):
        gcs.write(name, b"")
    files.remove_folder(files.as_path(f"{gcs.root}/a*.npz.parts"))
    assert gcs.objects() == ["a1.npz.parts/x", "a[1]/x"]
    files.remove_folder(files.as_path(f"{gcs.root}/a[1]"))
    assert gcs.objects() == ["a1.npz.parts/x"]


def test_what_python_programs_pass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = mdt_jax.config.load(str(ROOT / "configs" / "digits.py"), "smoke")
    for call in (
        lambda: loop.train(config, "az://b/run"),
        lambda: mdt_jax.load("az://b/run"),
        lambda: mdt_jax.fid("az://b/s.npz", "digits", inception="x"),
    ):
        with pytest.raises(UserError, match="is a URL, and mdt_jax reads and writes"):
            call()
    assert not list(tmp_path.iterdir())


def test_a_bucket_that_does_not_exist(gcs, capsys, monkeypatch):
    argv = ["--checkpoint=gs://nobody-has-this/run", "--labels=1", "--out=x.png"]
    line = exits_with_one_line(sample.main, argv, capsys, monkeypatch)
    assert "there is no bucket gs://nobody-has-this" in line
    argv = [*SAMPLE, "--labels=1", "--out=gs://x.png"]
    assert "write gs://BUCKET/NAME" in exits_with_one_line(sample.main, argv, capsys, monkeypatch)


def test_a_lock_whose_answer_was_lost(gcs):
    gcs.set_faults(Fault("POST", r"\.lock", cut="answer", times=1))
    started = leases.time.monotonic()
    with locks.held(files.as_path(f"{gcs.root}/.lock"), "it"):
        assert leases.time.monotonic() - started < 30
    assert gcs.objects() == []


def test_no_permission_to_read(gcs, run, capsys, monkeypatch):
    gcs.set_faults(Fault("GET", "", status=403))
    argv = [f"--checkpoint={run}", "--labels=1", f"--out={gcs.root}/a.png"]
    line = exits_with_one_line(sample.main, argv, capsys, monkeypatch)
    assert "Forbidden" in line and "check the credentials and permissions" in line


def test_a_prefix_that_holds_something_else(gcs, trained, capsys, monkeypatch):
    gcs.write("other/readme.txt", b"hello")
    argv = [*SAMPLE, "--labels=1", f"--out={gcs.root}/other/"]
    line = exits_with_one_line(sample.main, argv, capsys, monkeypatch)
    assert "holds other files and no settings.json" in line
    argv = [f"--checkpoint={gcs.root}/other", "--labels=1", f"--out={gcs.root}/a.png"]
    assert "holds no checkpoint" in exits_with_one_line(sample.main, argv, capsys, monkeypatch)
    argv = [f"--src={trained}", f"--dst={gcs.root}/other"]
    assert "exists already" in exits_with_one_line(convert.main, argv, capsys, monkeypatch)
    assert gcs.objects() == ["other/readme.txt"]


def test_a_client_that_is_not_installed(monkeypatch, capsys):
    buckets._load.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    argv = [*SMOKE, "--workdir=gs://bucket/run"]
    line = exits_with_one_line(main.main, argv, capsys, monkeypatch)
    assert "gs:// needs gcsfs: pip install -e '.[gcs]'" in line
    buckets._load.cache_clear()


def test_the_objects_that_grow_are_copied_with_each_checkpoint(gcs):
    train_here(*SMOKE, "--tensorboard", "--profile_steps=2:3", f"--workdir={gcs.root}/run")
    found = names(gcs)
    assert any(re.fullmatch(r"run/tensorboard/events\.out\.tfevents.*", name) for name in found)
    assert any(name.startswith("run/profile/plugins/profile/") for name in found)


def test_a_lock_that_a_process_of_another_host_left(gcs, monkeypatch):
    monkeypatch.setattr(leases, "WATCH", 1.5)
    monkeypatch.setattr(leases, "BEAT", 0.3)
    monkeypatch.setattr(leases, "SETTLE", 0.1)
    lock = files.as_path(f"{gcs.root}/run/.lock")
    holder = {"host": "other", "process": 7, "since": "today", "token": "t"}
    gcs.write("run/.lock", json.dumps(holder).encode())
    with locks.held(lock, "it"):  # after it was watched
        assert json.loads(gcs.read("run/.lock"))["host"] != "other"
        with pytest.raises(UserError, match="it is in use by process"), locks.held(lock, "it"):
            pass
    assert gcs.objects() == []


def test_a_lock_that_was_taken_over_is_not_held(gcs, monkeypatch):
    monkeypatch.setattr(leases, "BEAT", 0.1)
    lock = files.as_path(f"{gcs.root}/run/.lock")
    with locks.held(lock, "it") as check:
        check()
        holder = {"host": "other", "process": 7, "since": "today", "token": "t"}
        gcs.write("run/.lock", json.dumps(holder).encode())
        for _ in range(100):
            try:
                check()
            except UserError as error:
                assert "it is in use by process 7 on other" in str(error)
                break
            leases.time.sleep(0.05)
        else:
            raise AssertionError("the process did not see it")
    assert json.loads(gcs.read("run/.lock")) == holder  # the other's


def test_copies_follow_their_objects(gcs):
    gcs.write("a/x.json", b"1")
    path = f"{gcs.root}/a/x.json"
    first = files.fetched(path)
    assert first.read_bytes() == b"1" and files.fetched(path) == first
    gcs.write("a/x.json", b"22")
    assert files.fetched(path).read_bytes() == b"22"
    with pytest.raises(FileNotFoundError):
        files.fetched(f"{gcs.root}/a/y.json")
    assert files.names_in(files.as_path(f"{gcs.root}/a")) == ["x.json"]
    assert files.is_dir(f"{gcs.root}/a") and not files.is_dir(path) and files.is_file(path)
