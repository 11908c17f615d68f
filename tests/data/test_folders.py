import json
import os

import numpy as np
import pytest
from PIL import Image

from mdt_jax.data import folders, image_files
from mdt_jax.runtime.errors import UserError


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(path)


def test_a_folder_a_class_sorted_as_numbers(tmp_path):
    for name in ("10", "9", "2"):
        picture(tmp_path / name / "deep" / "a.png", int(name))
        picture(tmp_path / name / "b.JPG")
    (tmp_path / "9" / "notes.txt").touch()
    (tmp_path / ".cache").mkdir()
    found = folders.load(tmp_path)
    assert found.classes == ["2", "9", "10"] and len(found) == 6
    assert found.labels.tolist() == [2, 2, 0, 0, 1, 1] and found.labels.dtype == np.int32
    assert found.read(found.paths.index("10/deep/a.png"))[0] == tmp_path / "10/deep/a.png"
    assert folders.load(tmp_path, num_classes=0).classes == []


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    picture(tmp_path / "all" / "cat" / "1.png")
    picture(tmp_path / "all" / "dog" / "1.png")
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "cat").symlink_to(tmp_path / "all" / "cat")
    (tmp_path / "all" / "cat" / "circle").symlink_to(tmp_path / "all" / "cat")
    assert folders.load(tmp_path / "some").paths == ["cat/1.png"]
    assert folders.load(tmp_path / "all").paths == ["cat/1.png", "dog/1.png"]
    (tmp_path / "all" / "dog" / "cats").symlink_to(tmp_path / "all" / "cat")
    (tmp_path / "all" / "cat" / "dogs").symlink_to(tmp_path / "all" / "dog")
    (tmp_path / "all" / "kitten").symlink_to(tmp_path / "some" / "cat")
    paths = folders.load(tmp_path / "all").paths
    assert len(paths) == 6 and "kitten/1.png" in paths and "dog/cats/1.png" in paths


def test_names_that_are_no_numbers_are_sorted_as_text():
    assert image_files.sort_classes({"b", "a10", "a9"}) == ["a10", "a9", "b"]
    assert image_files.sort_classes({"10", "9", "x"}) == ["10", "9", "x"]
    assert image_files.sort_classes({"010", "9", "0"}) == ["0", "9", "010"]


def test_class_and_image_in_the_name_or_no_class_at_all(tmp_path):
    for name in ("dog_1.png", "cat_7.png", "dog_2.png"):
        picture(tmp_path / "named" / name)
    found = folders.load(tmp_path / "named")
    assert found.classes == ["cat", "dog"] and found.labels.tolist() == [0, 1, 1]
    picture(tmp_path / "bare" / "00001.png")
    assert folders.load(tmp_path / "bare").classes == []
    picture(tmp_path / "named" / "fish.png")
    with pytest.raises(UserError, match="fish.png has no label, but others have"):
        folders.load(tmp_path / "named")


def test_lists(tmp_path):
    picture(tmp_path / "x" / "1.png")
    picture(tmp_path / "2.png")
    (tmp_path / "l.csv").write_text("path,label\nx/1.png,7\n2.png,11\n")
    found = folders.load(tmp_path / "l.csv")
    assert found.paths == ["x/1.png", "2.png"] and found.classes == ["7", "11"]
    lines = [{"path": "2.png", "label": "b"}, {"path": "./x/1.png", "label": "a"}]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = folders.load(tmp_path / "l.jsonl")
    assert found.paths == ["2.png", "x/1.png"] and found.labels.tolist() == [1, 0]
    (tmp_path / "bare.csv").write_text("2.png\nx/1.png\n")
    assert folders.load(tmp_path / "bare.csv").classes == []


def test_numbers_in_a_list_are_those_classes(tmp_path):
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    table = tmp_path / "l.csv"
    table.write_text("a.png,7\nb.png,2\nc.png,7\n")
    found = folders.load(table, num_classes=10)  # some classes have no image
    assert found.labels.tolist() == [7, 2, 7] and found.classes == list("0123456789")
    table.write_text("a.png,10\nb.png,1\nc.png,7\n")
    found = folders.load(table, num_classes=10)  # counted from 1
    assert found.labels.tolist() == [9, 0, 6] and found.classes[0] == "1"
    for number, num_classes in (("10", 10), ("-1", 3), ("-1", 10), ("12", 5), ("0", 2)):
        table.write_text(f"a.png,7\nb.png,0\nc.png,{number}\n")
        with pytest.raises(UserError, match="label .* is out of range: .* classes are 0 to"):
            folders.load(table, num_classes)


def test_images_beside_folders(tmp_path):
    picture(tmp_path / "1_1.png")
    (tmp_path / "thumbs").mkdir()
    assert folders.load(tmp_path).classes == ["1"]  # an empty folder is no class
    picture(tmp_path / "thumbs" / "1.png")
    with pytest.raises(UserError, match="both folders of images and images without one, e.g. 1_1"):
        folders.load(tmp_path)
    assert len(folders.load(tmp_path, num_classes=0)) == 2


def test_labels_left_aside_need_not_be_whole(tmp_path):
    for name in ("IMG_1.png", "photo.png", "_x.png"):
        picture(tmp_path / name)
    assert len(folders.load(tmp_path, num_classes=0)) == 3
    assert image_files.class_in_name("_x.png") is None


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    """As root may read everything, the system's answer is made up."""
    picture(tmp_path / "a" / "1.png")
    picture(tmp_path / "b" / "1.png")
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError, match="b"):
        folders.load(tmp_path)


def test_lists_of_other_encodings(tmp_path):
    picture(tmp_path / "1.png")
    for suffix, text in (("csv", "1.png,é"), ("jsonl", '{"path": "1.png", "label": "é"}')):
        table = tmp_path / f"l.{suffix}"
        table.write_text(text, encoding="utf-8-sig")
        assert folders.load(table).classes == ["é"]
        table.write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match="is not text in UTF-8"):
            folders.load(table)
    table.write_text("[" * 100_000)
    with pytest.raises(UserError, match='line 1: expected {"path"'):
        folders.load(table)
    (tmp_path / "l.csv").write_text('"1.png,a\n' + "x" * 200_000)
    with pytest.raises(UserError, match="is no CSV: field larger"):
        folders.load(tmp_path / "l.csv")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "1.png,\n", "line 1: the label is missing"),
        ("a.csv", "path,label\n../secret.png,1\n", "line 2: ../secret.png leaves"),
        ("a.csv", "/etc/passwd,1\n", "line 1: /etc/passwd leaves"),
        ("a.csv", "b/../../x.png,1\n", "line 1: b/../../x.png leaves"),
        ("a.csv", "none.png,1\n", "line 1: none.png does not exist"),
        ("a.csv", "1.png,2,3\n", "line 1: expected path,label; got 3 fields"),
        ("a.csv", "1.png,2\n2.png\n", "2.png has no label, but others have"),
        ("a.csv", "", "holds no images"),
        ("a.csv", "1.png,2\n1.png,3\n", "line 2: 1.png is 3, but 2 in an earlier line"),
        ("a.csv", '"1\n.png",2\n', "line 2: "),
        ("a.jsonl", '{"path": "1.png", "label": ""}', "line 1: path must be text, and label"),
        ("a.jsonl", '{"path": "1.png", "label": true}', "line 1: path must be text, and label"),
        ("a.jsonl", "{", 'line 1: expected {"path"'),
        ("a.jsonl", '{"label": 1}', 'line 1: expected {"path"'),
        ("a.jsonl", '{"path": "1.png", "label": [1]}', "line 1: path must be text, and label"),
        ("a.txt", "", "must be a folder, .csv or .jsonl$"),
        ("a.tar", "", "or .jsonl; a tar is read with data.name=tar"),
        ("a.parquet", "", "or .jsonl; parquet shards are read with data.name=parquet"),
        ("a.tar.gz", "", "or .jsonl; extract it first"),
        ("stats.pkl", "", "or .jsonl; evaluate reads images, or mu and sigma, of an npz"),
    ],
)
def test_lists_that_are_wrong(name, text, message, tmp_path):
    picture(tmp_path / "1.png")
    picture(tmp_path / "2.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        folders.load(tmp_path / name)


def test_what_is_found_and_what_is_left_out_is_said(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/.thumbs/1.png", ".DS_Store.png"):
        picture(tmp_path / name)
    for name in ("a/1.avif", "a/2.AVIF", "a/README", "c/1.jfif", "labels.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "none.png")
    (tmp_path / "b" / "itself.png").symlink_to(tmp_path / "b" / "itself.png")
    found = folders.load(tmp_path)
    assert found.summary.startswith("3 images of 2 classes, 1 (b) to 2 (a) each; left out: ")
    for said in (
        "unknown suffix .avif: 2 (e.g. a/1.avif)", "unknown suffix .jfif: 1 (c/1.jfif)",
        "hidden: 2 (e.g. .DS_Store.png)", "broken link: 2 (e.g. b/gone.png)",
        "link to a folder above: 1 (a/up)", "no suffix: 1 (a/README)",
        "list, which is read where data.path names it: 1 (labels.csv)",
    ):  # fmt: skip
        assert said in found.left_out
    assert found.left_out.endswith("folder without images: 1 (c)")
    for n in range(30):
        (tmp_path / "a" / f"log.{n:02}").touch()
    assert folders.load(tmp_path).left_out.endswith("; other kinds: 26")
    assert folders.load(tmp_path / "b").summary.startswith("1 image without classes; left out: ")
    (tmp_path / "l.csv").write_text("a/1.png,3\na/2.png,3\nb/1.png,0\n")
    said = folders.load(tmp_path / "l.csv", num_classes=4).summary
    assert said == "3 images of 4 classes, 0 (1) to 2 (3) each, 2 without images"
    with pytest.raises(UserError, match=r"holds no images \(.*\); left out: unknown suffix .jfif"):
        folders.load(tmp_path / "c")


def test_only_regular_files_are_read(tmp_path):
    picture(tmp_path / "a" / "1.png")
    os.mkfifo(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "zero.png").symlink_to("/dev/zero")
    found = folders.load(tmp_path)
    assert found.paths == ["a/1.png"]
    assert found.left_out == "no regular file: 2 (e.g. a/x.png)"


def test_folders_are_not_followed_for_ever(tmp_path):
    picture(tmp_path / "/".join("d" * folders.MAX_DEPTH) / "1.png")
    assert len(folders.load(tmp_path, num_classes=0)) == 1
    picture(tmp_path / "/".join("d" * (folders.MAX_DEPTH + 1)) / "1.png")
    with pytest.raises(UserError, match="folders are nested more than 32 deep"):
        folders.load(tmp_path)


@pytest.mark.parametrize(
    "names, given",
    [
        (["train/cat", "val/cat", "train/dog"], "train"),
        (["train", "test"], "train"),
        (["Validation/a", "Training/a"], "Training"),
        (["valid/a", "test/a"], "test"),
        (["train2017", "val2017", "extra"], "train2017"),
        (["imagenet/train/a", "imagenet/val/a"], "imagenet/train"),
        (["a/b/train/x", "a/b/testing/x", "c/x"], "a/b/train"),
        (["images_val/a", "images_train/a"], "images_train"),
        (["ILSVRC2012_img_train/a", "ILSVRC2012_img_val/a"], "ILSVRC2012_img_train"),
        (["testset/a", "trainset/a"], "trainset"),
        (["Test Images", "Train Images"], "Train Images"),
        (["training_set/a", "test_set/a"], "training_set"),
        (["testA", "testB", "trainA", "trainB"], "trainA"),
        (["test.1/a", "train.2/a"], "train.2"),
    ],
)
def test_train_and_val_are_no_classes(names, given, tmp_path):
    for name in names:
        picture(tmp_path / name / "1.png")
    message = f"are splits, not classes; give one of them, e.g. {tmp_path}/{given}"
    for num_classes in (None, 0, 2):
        with pytest.raises(UserError, match=message):
            folders.load(tmp_path, num_classes)


def test_what_is_no_division_of_a_set(tmp_path):
    for name in (
        "train",
        "bus",
        "trainer",
        "value",
        "tester",
        "evaluate",
        "test tube",
        "train station",
        "invalid",
        "latest",
    ):  # a vehicle among others
        picture(tmp_path / name / "1.png")
    assert len(folders.load(tmp_path).classes) == 10


def test_the_folder_of_the_classes_is_named(tmp_path):
    for name in ("cat", "dog"):
        picture(tmp_path / "set" / "train" / name / "1.png")
    line = f"only the folder set: if the folders in {tmp_path}/set/train are the classes, give"
    with pytest.raises(UserError, match=line):
        folders.load(tmp_path, 2)
    assert folders.load(tmp_path / "set" / "train").classes == ["cat", "dog"]
    assert len(folders.load(tmp_path, 0)) == 2


def stylegan(folder, content):
    for n in range(4):
        picture(folder / f"{n // 2:05}" / f"img{n:08}.png")
    (folder / "dataset.json").write_text(content)
    return [f"{n // 2:05}/img{n:08}.png" for n in range(4)]


def test_the_labels_of_stylegan_and_edm(tmp_path):
    paths = stylegan(tmp_path, "")
    labels = [[path, n % 3] for n, path in enumerate(paths)]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    for path in (tmp_path, tmp_path / "dataset.json"):
        found = folders.load(path, num_classes=3)
        assert found.paths == paths and found.labels.tolist() == [0, 1, 2, 0]
        assert found.classes == ["0", "1", "2"] and found.left_out == ""
        assert folders.load(path, 5).classes == list("01234")
        with pytest.raises(UserError, match="label 2 of 00001/img00000002.png is out of range"):
            folders.load(path, 2)
    assert folders.load(tmp_path, num_classes=0).classes == []
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels[1:]}))
    found = folders.load(tmp_path, num_classes=3)
    assert len(found) == 3 and "image without a label in dataset.json: 1 (00000/" in found.left_out
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    found = folders.load(tmp_path, num_classes=3)
    assert found.paths == paths and found.classes == []  # the folders are shards, not classes
    (tmp_path / "dataset.json").write_text('{"images": []}')  # another program's
    found = folders.load(tmp_path)
    assert (
        found.classes == ["00000", "00001"] and "suffix .json: 1 (dataset.json)" in found.left_out
    )


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"labels": [["00000/img00000000.png"', "is no JSON"),
        pytest.param("[" * 100_000, "is no JSON", id="nested"),
        ('{"labels": [["00000/img00000000.png", [0, 1]]]}', "must be a list of .path, number"),
        ('{"labels": {"a": 1}}', "must be a list of .path, number"),
        ('{"labels": [["00000/none.png", 1]]}', "00000/none.png does not exist"),
        ('{"labels": [["../x.png", 1]]}', "../x.png leaves"),
    ],
)
def test_a_dataset_json_that_is_damaged(content, message, tmp_path):
    stylegan(tmp_path, content)
    with pytest.raises(UserError, match=message):
        folders.load(tmp_path, 3)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        folders.load(tmp_path / "none")
    with pytest.raises(UserError, match="holds no images"):
        folders.load(tmp_path)
