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
        assert found.read(i)[0].getpixel((3, 3)) == (10 * (2 - c) + k,) * 3
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
    assert other.classes == ["a", "b"] and other.read(1)[0].getpixel((0, 0)) == (2, 2, 2)
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
