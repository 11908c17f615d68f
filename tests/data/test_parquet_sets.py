import json
import multiprocessing
import os
import pickle
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mdt_jax.data import folders, parquet_rows, parquet_sets, pipeline
from mdt_jax.data.crops import CroppedImages
from mdt_jax.evaluation import image_sets
from mdt_jax.runtime import buckets, files, locks
from mdt_jax.runtime.errors import UserError
from tests.small_data import CLASSES, write_parquet, write_pictures

BYTES = pa.struct([("bytes", pa.binary())])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "folder", 24)


@pytest.fixture
def shards(pictures, tmp_path):
    write_parquet(pictures, tmp_path / "data", shards=3)
    return tmp_path / "data"


def write(path, columns, types=None, names=None, **options):
    """A shard of these columns; names: the class names of each column that has some."""
    features = {
        name: {"names": each, "_type": "ClassLabel"} for name, each in (names or {}).items()
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    arrays = {name: pa.array(column, (types or {}).get(name)) for name, column in columns.items()}
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(arrays).replace_schema_metadata(metadata), path, **options)
    return path


def refused(path, message, **options):
    with pytest.raises(UserError, match=message) as caught:
        parquet_sets.load(path, **options)
    assert "\n" not in str(caught.value)


def batches(source, hosts, workers=0):
    each = 8 // hosts
    parts = []
    for host in range(hosts):
        rows = np.arange(host * each, (host + 1) * each)
        plan = pipeline.Shuffled(len(source), 1, 8, rows)
        stream = pipeline.batches(source, plan, workers)
        parts.append([next(stream) for _ in range(5)])
        stream.close()
    return [
        {name: np.concatenate([part[name] for part in step]).tobytes() for name in step[0]}
        for step in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_the_batches_are_those_of_a_folder_on_any_number_of_hosts(rows, pictures, tmp_path):
    write_parquet(pictures, tmp_path / "data", rows=rows)
    expected = batches(CroppedImages(folders.load(pictures), (16, 16), crop="random", flip=True), 1)
    for at_random in (False, True):
        found = parquet_sets.load(tmp_path / "data", at_random=at_random)
        source = CroppedImages(found, (16, 16), crop="random", flip=True)
        # A folder sorts its classes, and these shards have them in the same order.
        assert found.classes == CLASSES
        for hosts, workers in ((1, 0), (2, 0), (4, 0), (2, 1)):
            assert batches(source, hosts, workers) == expected


@pytest.mark.parametrize(
    "path", ["", "*.parquet", "train-0000?-of-00003.parquet", "../**/*.parquet"]
)
def test_folders_and_globs(path, shards, pictures):
    found = parquet_sets.load(f"{shards}/{path}")
    assert len(found) == 24 and found.left_out == ""
    assert found.summary == "24 images of 3 classes, 8 each"
    assert (
        found.name(8) == f"{os.path.normpath(shards)}/train-00001-of-00003.parquet, row 0" or path
    )
    one = parquet_sets.load(shards / "train-00001-of-00003.parquet", 0)
    assert len(one) == 8 and one.classes == []
    assert one.left_out.startswith("shard that is not there: 2 (e.g. train-00000-of-00003.parquet)")


def test_the_identity_is_of_all_shards(shards):
    before = parquet_sets.load(shards).contents
    moved = shards.rename(shards.with_name("moved"))
    assert parquet_sets.load(moved).contents == before  # wherever they are
    table = pq.read_table(moved / "train-00002-of-00003.parquet")
    other = table.set_column(1, "label", pa.array([0] * 8))
    pq.write_table(other, moved / "train-00002-of-00003.parquet")
    changed = parquet_sets.load(moved).contents
    (moved / "train-00002-of-00003.parquet").unlink()
    assert len({before, changed, parquet_sets.load(moved).contents}) == 3


def test_splits_are_refused_with_the_globs(shards):
    for n in range(2):
        (shards / f"validation-{n:05}-of-00002.parquet").write_bytes(b"")
    globs = rf"give one of them, {shards}/train-\*.parquet, {shards}/validation-\*.parquet$"
    refused(shards, globs)
    refused(f"{shards}/*", globs)
    assert len(parquet_sets.load(f"{shards}/train-*.parquet")) == 24
    for split in ("train", "test"):  # as the hub converts sets
        (shards.parent / "x" / split).mkdir(parents=True)
        (shards.parent / "x" / split / "0000.parquet").write_bytes(b"")
    refused(shards.parent / "x", r"x/train/\*.parquet, \S*/x/test/\*.parquet$")


def test_older_names_of_the_hub_have_a_hash(shards):
    for n, path in enumerate(sorted(shards.iterdir())):
        path.rename(shards / f"train-{n:05}-of-00003-{n:x}a0123456789bcde.parquet")
    found = parquet_sets.load(shards)
    assert len(found) == 24 and found.left_out == ""
    (shards / "train-00001-of-00003-1a0123456789bcde.parquet").rename(
        shards / "test-00000-of-00001-f0123456789bcdea.parquet"
    )
    refused(shards, rf"one of them, {shards}/train-\*.parquet, {shards}/test-\*.parquet$")


def test_shards_with_other_dictionaries(tmp_path):
    for n, texts in enumerate((["b", "c"], ["c", "a"])):
        labels = pa.array(texts).dictionary_encode()
        columns, types = {"image": [b"x"] * 2, "label": labels}, {"label": labels.type}
        write(tmp_path / "data" / f"{n}.parquet", columns, types)
    found = parquet_sets.load(tmp_path / "data")
    assert found.classes == ["a", "b", "c"] and found.labels.tolist() == [1, 2, 2, 0]


def test_columns_are_found_by_name_and_type(tmp_path):
    path = tmp_path / "s.parquet"
    image = [b"1", b"2", b"3"]
    for columns, names, classes, labels in (
        ({"image": image}, {}, [], [0, 0, 0]),
        ({"webp": image, "mask": image, "cls": [7, 10, 7]}, {}, ["7", "10"], [0, 1, 0]),
        ({"x": image, "label": ["b", "a", "b"]}, {}, ["a", "b"], [1, 0, 1]),
        ({"x": image, "kind": [1, 0, 1]}, {"kind": ["u", "v", "w"]}, ["u", "v", "w"], [1, 0, 1]),
        ({"img": image, "coarse_label": [0] * 3, "fine_label": [0, 1, 1]}, {}, ["0", "1"],
         [0, 1, 1]),
        ({"image": image, "a": [0] * 3, "b": [1] * 3}, {"a": ["x"], "b": ["y"]}, [], [0, 0, 0]),
    ):  # fmt: skip
        found = parquet_sets.load(write(path, columns, names=names))
        assert found.classes == classes and found.labels.tolist() == labels
        assert found.labels.dtype == np.int32
        assert [found.read(i)[0].read() for i in range(3)] == image
    for kind in (pa.large_binary(), BYTES):
        values = image if kind != BYTES else [{"bytes": each} for each in image]
        texts = pa.array(["b", "a", "b"]).dictionary_encode()
        write(path, {"image": values, "label": texts}, {"image": kind, "label": texts.type})
        found = parquet_sets.load(path)
        assert found.read(2)[0].read() == b"3" and found.labels.tolist() == [1, 0, 1]


def test_numbers_without_names(tmp_path):
    path = write(tmp_path / "s.parquet", {"image": [b"x"] * 3, "label": [3, 1, 3]})
    assert parquet_sets.load(path).classes == ["1", "3"]
    found = parquet_sets.load(path, 4)  # some classes have no images
    assert found.classes == ["0", "1", "2", "3"] and found.labels.tolist() == [3, 1, 3]
    found = parquet_sets.load(path, 3)
    assert found.classes == ["1", "2", "3"] and found.labels.tolist() == [2, 0, 2]
    refused(path, "s.parquet, row 0: label 3 is outside the classes 0 to 1", num_classes=2)


BAD = {
    "no image": ({"label": [0]}, {}, {}, r"no column holds the images; .* label \(int64\)"),
    "two images": ({"a": [b""], "b": [b""]}, {}, {}, "2 columns may hold the images; name one of"),
    "image of paths": ({"image": ["a.jpg"]}, {}, {}, "the column image is string; images must be"),
    "image of pixels": ({"image": [[[1]]]}, {}, {}, "the column image is list<.*; images must be"),
    "no bytes": ({"image": [{"path": "a"}]}, {}, {}, "the column image is struct<path: string>"),
    "no label": ({"image": [b""]}, {}, {}, "has no label column, one of label, labels, cls"),
    "float label": ({"image": [b""], "label": [0.5]}, {}, {}, "the column label is double; label"),
    "list label": ({"image": [b""], "cls": [[1]]}, {}, {}, "the column cls is list<.*; labels mu"),
    "null label": (
        {"image": [b""] * 2, "label": [1, None]}, {}, {}, "s.parquet, row 1 has no label; model.nu"
    ),
    "negative": (
        {"image": [b""] * 2, "label": [0, -1]}, {}, {"label": ["a", "b"]},
        "s.parquet, row 1: label -1 is outside the classes 0 to 1; this split is not labelled",
    ),
    "too large": (
        {"image": [b""] * 2, "label": [1, 2]}, {}, {"label": ["a", "b"]},
        "s.parquet, row 1: label 2 is outside the classes 0 to 1$",
    ),
    "no rows": ({"image": [], "label": []}, {"image": BYTES, "label": pa.int8()}, {}, "no rows"),
}  # fmt: skip


@pytest.mark.parametrize("image", [b"x", None])
def test_rows_may_take_less_than_a_byte(image, tmp_path):
    columns = {"image": [image] * 20_000, "label": [0] * 20_000}
    path = write(tmp_path / "s.parquet", columns, {"image": pa.binary()})
    assert path.stat().st_size < 20_000
    found = parquet_sets.load(path)
    assert len(found) == 20_000 and found.read(19_999)[0].read() == (image or b"")


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read(name, tmp_path):
    *made, message = BAD[name]
    refused(write(tmp_path / "s.parquet", *made), message, num_classes=2)
    assert [path.name for path in tmp_path.iterdir()] == ["s.parquet"]


def test_what_is_no_set(shards, tmp_path):
    refused(tmp_path / "none", "data.path .*none does not exist")
    refused(f"{tmp_path}/no*.parquet", "matches no files")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"holds no \*.parquet files")
    write(shards / "train-00003-of-00003.parquet", {"image": [b""], "label": [0]})
    refused(
        shards, "00003-of-00003.parquet has other columns than .*00000-of-00003.parquet: .* lab"
    )
    columns, types = {"image": [{"bytes": b""}], "label": [0]}, {"image": BYTES}
    write(shards / "train-00003-of-00003.parquet", columns, types, {"label": ["a", "b", "c"]})
    refused(shards, "00003-of-00003.parquet has other class names than")


def test_metadata_of_others_is_ignored(tmp_path):
    table = pa.table({"image": [b"x"], "label": [1]})
    for text in (
        "{", "[]", "null", '{"info": null}', '{"info": {"features": []}}', "[" * 100_000,
        '{"info": {"features": {"label": {"names": 5}}}}', '{"info": {"features": {"label": 1}}}',
        '{"info": {"features": {"label": {"names": [1, 2]}}}}',
        '{"info": {"features": {"label": {"names": ["a", "a"]}}}}',
        '{"info": {"features": {"x": 1}}}',
    ):  # fmt: skip
        pq.write_table(table.replace_schema_metadata({"huggingface": text}), tmp_path / "s.parquet")
        assert parquet_sets.load(tmp_path / "s.parquet").classes == ["1"]


def damage(path, place, content=b"\xff" * 64):
    whole = bytearray(path.read_bytes())
    whole[place : place + len(content)] = content
    path.write_bytes(whole)


@pytest.mark.parametrize("at_random", [False, True])
def test_damaged_pages_are_named(at_random, shards):
    path = shards / "train-00001-of-00003.parquet"
    table = pq.read_table(path)
    pq.write_table(table, path, row_group_size=4, write_page_checksum=True)
    group = pq.read_metadata(path).row_group(1)

    def read_all():
        found = parquet_sets.load(shards, at_random=at_random)
        for i in range(24):
            found.read(i)

    read_all()
    damage(path, group.column(0).dictionary_page_offset + 400)
    message = "train-00001-of-00003.parquet, row group 1, is damaged: .*; fetch the shard again"
    with pytest.raises(UserError, match=message):
        read_all()
    place = group.column(2).dictionary_page_offset + 8
    damage(path, place)
    with pytest.raises(UserError, match="train-00001-of-00003.parquet is damaged: "):
        read_all()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="train-00001-of-00003.parquet is damaged: "):
        read_all()
    assert not list(shards.glob("*.tmp")) and not list(shards.glob(".*.lock"))


def test_rows_without_an_image_are_damaged_images(tmp_path, capfd):
    columns = {"image": [None, {"bytes": None}, {"bytes": b""}, {"bytes": b"x"}], "label": [0] * 4}
    path = write(tmp_path / "s.parquet", columns, {"image": BYTES})
    for at_random in (False, True):
        source = CroppedImages(parquet_sets.load(path, at_random=at_random), (8, 8), stand_ins=0)
        plan = [(np.arange(4), np.zeros(4))]
        list(pipeline.batches(source, plan, max_damaged=4))
        assert capfd.readouterr().err.count("is left out: cannot identify image") == 4
        with pytest.raises(UserError, match="images that cannot be read: 1, the last .*, row 0"):
            list(pipeline.batches(source, plan))
        capfd.readouterr()


def test_unpacked_once_for_the_same_shard(shards, capfd, monkeypatch):
    first = parquet_sets.load(shards, at_random=True)
    printed = capfd.readouterr().err
    assert "unpacking the images of 3 parquet shards once" in printed and "GB to" in printed
    assert pickle.loads(pickle.dumps(first)).read(20)[0].read() == first.read(20)[0].read()
    monkeypatch.setattr(parquet_rows, "_write", None)
    again = parquet_sets.load(shards, at_random=True)
    assert [again.read(i)[0].read() for i in range(24)] == [
        first.read(i)[0].read() for i in range(24)
    ]
    assert capfd.readouterr().err == ""
    monkeypatch.undo()
    # A shard that changed, or whose copy is cut short or damaged, is unpacked again.
    path = shards / "train-00000-of-00003.parquet"
    copy = shards / "train-00000-of-00003.parquet.array_record"
    for spoil in (
        lambda: pq.write_table(pq.read_table(path).take([1, 0, 2, 3, 4, 5, 6, 7]), path),
        lambda: copy.write_bytes(copy.read_bytes()[:-100]),
        lambda: copy.write_bytes(b""),
        lambda: (copy.unlink(), os.mkfifo(copy)),
    ):
        spoil()
        found = parquet_sets.load(shards, at_random=True)
        assert "unpacking the images of 1 parquet shards" in capfd.readouterr().err
        assert found.read(0)[0].read() == first.read(1)[0].read() and copy.is_file()


def test_a_damaged_copy_is_named(shards, monkeypatch):
    found = parquet_sets.load(shards, at_random=True)
    copy = shards / "train-00001-of-00003.parquet.array_record"
    place = copy.read_bytes().find(found.read(10)[0].read())
    damage(copy, place, b"no")
    found = parquet_sets.load(shards, at_random=True)
    with pytest.raises(UserError, match=f"{copy} is damaged: .*; remove it, and it is made again"):
        found.read(10)
    monkeypatch.setattr(files, "passes", lambda error: True)
    with pytest.raises(UserError, match=f"{copy} cannot be read: "):
        found.read(10)
    copy.write_bytes(b"")
    refused(shards, f"{copy} cannot be read: ", at_random=True)


def unpack_and_read(path, queue):
    found = parquet_sets.load(path, at_random=True)
    queue.put([found.read(i)[0].read() for i in range(24)])


def test_several_processes_unpack_together(shards):
    """Also where one was killed and left a part, and where another one takes long."""
    killed = shards / "train-00001-of-00003.parquet.array_record.123-abc.tmp"
    killed.write_bytes(b"x")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    copy = shards / "train-00002-of-00003.parquet.array_record"
    processes = [context.Process(target=unpack_and_read, args=(shards, queue)) for _ in range(3)]
    with locks.held(locks.beside(copy), str(copy)):
        for process in processes:
            process.start()
        deadline = time.monotonic() + 60
        while len(list(shards.glob("*.array_record"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(3 * parquet_rows.WAIT)
        assert len(list(shards.glob("*.array_record"))) == 2
        assert not copy.exists() and queue.empty()
    taken = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    expected = parquet_sets.load(shards)
    assert taken == 3 * [[expected.read(i)[0].read() for i in range(24)]]
    assert sorted(path.suffix for path in shards.iterdir()) == 3 * [".array_record"] + 3 * [
        ".parquet"
    ]


def test_where_the_copies_do_not_fit(shards, monkeypatch):
    def no_room(path, size):
        raise UserError(f"{path} could not be written: it takes {size / 1e6:.1f} MB")

    monkeypatch.setattr(files, "check_room", no_room)
    refused(shards, f"{shards} could not be written: it takes", at_random=True)
    monkeypatch.undo()

    def not_writable(folder, name):
        raise UserError(f"{name} cannot be written to: Read-only file system")

    monkeypatch.setattr(files, "check_writable", not_writable)
    message = f"{shards}, to which .* symbolic links .*, cannot be written to: Read-only file sys"
    refused(shards, message, at_random=True)
    assert len(parquet_sets.load(shards)) == 24


def test_nothing_is_unpacked_for_another_number_of_classes(shards):
    assert len(parquet_sets.load(shards, 5, at_random=True).classes) == 3
    assert not list(shards.glob("*.array_record"))


def test_links_to_a_folder_above_add_nothing(shards):
    for name in ("one", "two"):
        (shards / name).symlink_to(shards)
    found = parquet_sets.load(shards)
    assert len(found) == 24
    assert found.left_out == f"link to a folder above: 2 (e.g. {shards}/one)"


def test_a_folder_whose_name_ArrayRecord_cannot_read(shards):
    with pytest.raises(UserError, match="line break.* and the images of parquet shards there"):
        parquet_sets.load(shards.rename(shards.with_name("two\nlines")), at_random=True)


def test_symbolic_links_keep_the_copies_elsewhere(shards, tmp_path):
    (tmp_path / "links").mkdir()
    for path in shards.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    found = parquet_sets.load(tmp_path / "links", at_random=True)
    assert len(found) == 24 and len(list((tmp_path / "links").glob("*.array_record"))) == 3
    assert not list(shards.glob("*.array_record"))


def test_without_pyarrow(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(shards, r"data.name=parquet needs pyarrow: pip install -e '.\[parquet\]'")


@pytest.mark.parametrize("protocol", ["gs", "s3"])
def test_shards_in_a_bucket_are_read_in_order(protocol, shards, request):
    root = request.getfixturevalue({"gs": "gcs", "s3": "s3"}[protocol]).root
    client = buckets.client(root)
    client.put(str(shards), f"{root}/set", recursive=True)
    for hidden in (".train-00000-of-00003.parquet", ".cache/train-00000-of-00003.parquet"):
        client.pipe_file(f"{root}/set/{hidden}", b"x")
    expected = parquet_sets.load(shards)
    for path in (f"{root}/set", f"{root}/set/train-*.parquet", f"{root}/set/*", f"{root}/set/**"):
        found = parquet_sets.load(path)
        assert found.contents == expected.contents and found.classes == CLASSES
        assert found.sha256 == expected.sha256
        assert [found.read(i)[0].read() for i in range(24)] == [
            expected.read(i)[0].read() for i in range(24)
        ]
    copied = {"gs": "gcloud storage cp -r", "s3": "aws s3 cp --recursive"}[protocol]
    refused(f"{root}/set", rf"copy them to a disk \({copied} {root}/set set\), or", at_random=True)
    refused(f"{root}/set/.train-00000-of-00003.parquet", "00003.parquet is damaged")
    refused(f"{root}/no", "data.path .*/no does not exist")
    refused(f"{root}/no*", "matches no files")
    refused(f"{root}-no/x", f"cannot be read: there is no bucket {root}-no")
    refused(f"{root}-no/x*", f"cannot be read: there is no bucket {root}-no")
    client.pipe_file(f"{root}/set/test-00000-of-00001.parquet", b"x")
    globs = rf"one of them, {root}/set/train-\*.parquet, {root}/set/test-\*.parquet$"
    refused(f"{root}/set", globs)
    refused(f"{root}/set/test-*", "test-00000-of-00001.parquet is damaged")


def test_evaluation_reads_the_images_of_a_folder(shards, pictures):
    found, expected = (
        image_sets.open_images(str(path), 16, labelled=True)
        for path in (shards / "train-*.parquet", pictures)
    )
    assert found.classes == expected.classes == CLASSES
    assert found.labels.tolist() == expected.labels.tolist()
    np.testing.assert_array_equal(found.take(range(24)), expected.take(range(24)))
    before = found.sha256
    path = shards / "train-00001-of-00003.parquet"
    pq.write_table(pq.read_table(path), path, compression="none")
    assert image_sets.open_images(f"{shards}/*.parquet", 16).sha256 != before
    with pytest.raises(UserError, match="^/.*no.parquet does not exist"):
        image_sets.open_images(str(shards / "no.parquet"))


@pytest.mark.parametrize("fields", [{"status": 503}, {"cut": "down"}], ids=str)
def test_a_bucket_that_fails_for_a_while(fields, shards, gcs):
    from tests.gcs_protocol import Fault

    buckets.client(gcs.root).put(str(shards), f"{gcs.root}/set", recursive=True)
    expected = parquet_sets.load(shards)
    for skip in (0, 8):
        gcs.set_faults(Fault(target="set", skip=skip, times=2, **fields))
        found = parquet_sets.load(f"{gcs.root}/set")
        for i in range(24):
            assert found.read(i)[0].read() == expected.read(i)[0].read()
        assert [fault.times for fault in gcs.faults] == [0]
        parquet_rows._recent.clear()


def test_a_bucket_without_permission_and_objects_that_vanish(shards, gcs):
    from tests.gcs_protocol import Fault

    buckets.client(gcs.root).put(str(shards), f"{gcs.root}/set", recursive=True)
    found = parquet_sets.load(f"{gcs.root}/set")
    buckets.remove(f"{gcs.root}/set/train-00002-of-00003.parquet")
    with pytest.raises(
        UserError, match="00002-of-00003.parquet, row group 0, cannot be read: ther"
    ):
        found.read(20)
    gcs.set_faults(Fault(target="set", status=403))
    with pytest.raises(UserError, match="00000-of-00003.parquet cannot be read: Forbidden"):
        found.read(0)
    refused(f"{gcs.root}/set", "/set cannot be read: Forbidden")
