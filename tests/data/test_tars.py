import gzip
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from mdt_jax.data import tars
from mdt_jax.errors import UserError


def jpeg(value):
    content = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(content, "PNG")
    return content.getvalue()


def tar(files):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def pixel(found, i):
    return Image.open(found.read(i)[0]).getpixel((0, 0))


@pytest.fixture
def imagenet(tmp_path):
    """A tar of a tar a class, as ILSVRC2012's."""
    classes = {
        f"n{c}.tar": tar({f"n{c}_{i}.JPEG": jpeg(10 * c + i) for i in range(3)}) for c in (2, 1)
    }
    path = tmp_path / "train.tar"
    path.write_bytes(tar(classes))
    return path


def test_nested_tars_are_read_in_place(imagenet):
    found = tars.load(imagenet)
    assert found.classes == ["n1", "n2"] and found.labels.tolist() == [1, 1, 1, 0, 0, 0]
    for i in range(6):
        c, k = divmod(i, 3)
        assert Image.open(found.read(i)[0]).getpixel((3, 3)) == (10 * (2 - c) + k,) * 3
    assert found.name(0) == f"{imagenet}:n2.tar/n2_0.JPEG"


def test_the_index_is_made_once_for_the_same_tar(imagenet, monkeypatch):
    first = tars.load(imagenet)
    scan = tars._scan
    monkeypatch.setattr(tars, "_scan", None)
    again = tars.load(imagenet)
    np.testing.assert_array_equal(again.offsets, first.offsets)
    monkeypatch.setattr(tars, "_scan", scan)
    imagenet.write_bytes(tar({"a/1.png": jpeg(1), "b/2.png": jpeg(2)}))
    other = tars.load(imagenet)
    assert other.classes == ["a", "b"] and pixel(other, 1) == (2, 2, 2)
    index = imagenet.with_name("train.tar.index.npz")
    index.write_bytes(index.read_bytes()[:100])  # a damaged one is made again
    assert len(tars.load(imagenet)) == 2


def test_what_is_no_such_tar(imagenet, tmp_path):
    with pytest.raises(UserError, match="is no tar file"):
        tars.load(tmp_path / "none.tar")
    (tmp_path / "text.tar").write_text("hello" * 300)
    with pytest.raises(UserError, match="is no tar or is damaged"):
        tars.load(tmp_path / "text.tar")
    (tmp_path / "empty.tar").write_bytes(tar({"readme.txt": b"x"}))
    with pytest.raises(UserError, match="holds no images"):
        tars.load(tmp_path / "empty.tar")
    imagenet.write_bytes(imagenet.read_bytes()[:-12_000])
    with pytest.raises(UserError, match="is cut short|is damaged"):
        tars.load(imagenet)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("damage", ["header", "end", "within a header"])
def test_what_follows_damage_is_not_lost_in_silence(nested, damage, tmp_path):
    plain = bytearray(tar({f"a/{i}.png": jpeg(i) for i in range(10)}))
    headers = [n for n in range(0, len(plain), 512) if plain[n : n + 2] == b"a/"]
    if damage == "header":
        plain[headers[6] + 150] ^= 1  # its checksum
    elif damage == "end":
        del plain[headers[6] :]
    else:
        del plain[headers[6] + 200 :]
    path = tmp_path / "t.tar"
    path.write_bytes(
        tar({"x.tar": bytes(plain), "y.tar": tar({"1.png": jpeg(1)})}) if nested else plain
    )
    with pytest.raises(UserError, match="is damaged or cut short at byte|is no tar or is damaged"):
        tars.load(path)
    assert [place.name for place in tmp_path.iterdir()] == ["t.tar"]


def test_classes_of_plain_tars(tmp_path):
    def load(files):
        (tmp_path / "t.tar").write_bytes(tar(dict.fromkeys(files, jpeg(1))))
        return tars.load(tmp_path / "t.tar")

    assert load(["./train/a/1.png", "./train/b/1.png", "./train/a/._1.png"]).classes == ["a", "b"]
    assert load(["2_1.png", "10_1.png"]).classes == ["2", "10"]
    found = load(["1.png", "2.png"])
    assert found.classes == [] and found.labels.tolist() == [0, 0]
    with pytest.raises(UserError, match="1.png lies in no folder or tar, but others do"):
        load(["a/1.png", "1.png"])


def test_compressed_tars(tmp_path):
    (tmp_path / "t.tar.gz").write_bytes(gzip.compress(tar({"a/1.png": jpeg(1)})))
    with pytest.raises(UserError, match="t.tar.gz is no tar or is damaged: .*not be compressed"):
        tars.load(tmp_path / "t.tar.gz")
    (tmp_path / "t.tar").write_bytes(tar({"a.tar": b""}))
    with pytest.raises(UserError, match="t.tar:a.tar is no tar or is damaged"):
        tars.load(tmp_path / "t.tar")
