import gzip
import io
import os
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from mdt_jax.data import tars
from mdt_jax.runtime.errors import UserError


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
    with pytest.raises(UserError, match="1.png is in no folder or tar, but others are"):
        load(["a/1.png", "1.png"])


def test_compressed_tars(tmp_path):
    (tmp_path / "t.tar.gz").write_bytes(gzip.compress(tar({"a/1.png": jpeg(1)})))
    with pytest.raises(UserError, match="t.tar.gz is no tar or is damaged: .*not be compressed"):
        tars.load(tmp_path / "t.tar.gz")
    (tmp_path / "t.tar").write_bytes(tar({"a.tar": b""}))
    with pytest.raises(UserError, match="t.tar:a.tar is no tar or is damaged"):
        tars.load(tmp_path / "t.tar")


def special(name, kind, linkname=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, linkname
    return member


def test_what_is_found_and_what_is_left_out_is_said(tmp_path):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as archive:
        inside = tar({"1.png": jpeg(3), "x/.hidden/2.png": jpeg(4)})
        for name, data in {
            "a/1.png": jpeg(1), "a/2.png": jpeg(2), "a/1.cls": b"7", "b.tar": inside,
            ".c/1.png": b"",
        }.items():  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        archive.addfile(special("a/3.png", tarfile.LNKTYPE, "a/1.png"))
        archive.addfile(special("a/4.png", tarfile.SYMTYPE, "1.png"))
        archive.addfile(special("a/5.png", tarfile.FIFOTYPE))
        archive.addfile(special("a", tarfile.DIRTYPE))
    for _ in range(2):  # from the tar, and from its index
        found = tars.load(path)
        assert found.summary.startswith("3 images of 2 classes, 1 (b) to 2 (a) each; left out: ")
        for said in (
            "link: 2 (e.g. a/3.png)", "hidden: 2 (e.g. b.tar/x/.hidden/2.png)",
            "no regular file: 1 (a/5.png)", "unknown suffix .cls: 1 (a/1.cls)",
        ):  # fmt: skip
            assert said in found.left_out


def test_layouts_of_others(tmp_path):
    path, image = tmp_path / "t.tar", jpeg(1)
    for names in (
        ["s/train/a/1.png", "s/val/a/1.png"],
        ["train/1.png", "test/1.png"],
        ["s/train_set/a/1.png", "s/test_set/a/1.png"],
    ):
        path.write_bytes(tar(dict.fromkeys(names, image)))
        for _ in range(2):
            with pytest.raises(UserError, match="make a tar of one of them, e.g. train"):
                tars.load(path)
    path.write_bytes(tar({"train.tar": tar({"1.png": image}), "val.tar": tar({"1.png": image})}))
    with pytest.raises(UserError, match="is divided into train.tar, val.tar"):
        tars.load(path)
    labels = b'{"labels": [["00000/1.png", 3]]}'
    path.write_bytes(tar({"00000/1.png": image, "dataset.json": labels}))
    with pytest.raises(UserError, match="labels in dataset.json are read from a folder only"):
        tars.load(path)
    path.write_bytes(tar({"00000/1.png": image, "dataset.json": b'{"made": "by others"}'}))
    assert "dataset.json" in tars.load(path).left_out


def header(name, size, **more):
    member = tarfile.TarInfo(name)
    for field, value in {"size": size, **more}.items():
        setattr(member, field, value)
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("size", [-512, -1024, -100, -(2**40)])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_sizes_that_lead_back(size, first, kind, tmp_path):
    before = b"" if first else tar({"a/1.png": jpeg(1)}).rstrip(b"\0")
    before += bytes(-len(before) % 512)
    path = tmp_path / "t.tar"
    path.write_bytes(before + header("a/2.png", size, type=kind) + bytes(10240))
    with pytest.raises(UserError, match="t.tar is no tar or is damaged|is damaged or cut short"):
        tars.load(path)


@pytest.mark.parametrize("size", [2**21, 2**40, 2**62])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_sizes_beyond_the_end(size, kind, tmp_path):
    path = tmp_path / "t.tar"
    path.write_bytes(tar({"a/1.png": jpeg(1)})[:1024] + header("a/2.png", size, type=kind))
    with pytest.raises(UserError, match="t.tar is no tar or is damaged|is damaged or cut short"):
        tars.load(path)


def test_a_pax_size_that_leads_back(tmp_path):
    path = tmp_path / "t.tar"
    member = tarfile.TarInfo("a/1.png")
    member.pax_headers = {"size": "-2048"}
    path.write_bytes(member.tobuf(tarfile.PAX_FORMAT) + bytes(20480))
    with pytest.raises(UserError, match="is no tar or is damaged|is damaged or cut short"):
        tars.load(path)


def sparse_tars(folder):
    """A picture with a hole in it, by name of the form that a tar has it in."""
    pax = tarfile.TarInfo("a/1.png")
    pax.size = 512
    forms = {
        "0.0": {"GNU.sparse.size": "9000", "GNU.sparse.numblocks": "1"},
        "0.1": {"GNU.sparse.map": "0,512", "GNU.sparse.size": "9000"},
        "1.0": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9000"},
        "later": {"GNU.sparse.major": "2", "GNU.sparse.minor": "0"},
    }
    for name, fields in forms.items():
        pax.pax_headers = fields
        data = b"1\n0\n512\n".ljust(512, b"\0")
        (folder / f"{name}.tar").write_bytes(pax.tobuf(tarfile.PAX_FORMAT) + data + bytes(1024))
        yield f"{name}.tar"
    old = bytearray(header("a/1.png", 512, type=tarfile.GNUTYPE_SPARSE))
    old[386:410] = b"%011o\0%011o\0" % (0, 512)
    old[483:495] = b"%011o\0" % 9000
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old)
    (folder / "old.tar").write_bytes(bytes(old) + bytes(512 + 1024))
    yield "old.tar"


def test_sparse_members_are_refused(tmp_path):
    for name in sparse_tars(tmp_path):
        with pytest.raises(UserError, match=f"{name}: a/1.png is stored sparsely"):
            tars.load(tmp_path / name)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kept", [1, 5, 8])
def test_zeros_before_the_end(nested, kept, tmp_path):
    """A download that stopped, in a file that had its length from the start."""
    plain = bytearray(tar({f"a/{i}.png": jpeg(i) for i in range(10)}))
    heads = [n for n in range(0, len(plain), 512) if plain[n : n + 2] == b"a/"]
    path = tmp_path / "t.tar"

    def refused(content):
        path.write_bytes(tar({"x.tar": bytes(content)}) if nested else content)
        with pytest.raises(UserError, match=f"zeros at byte {heads[kept]}, which end a tar, but"):
            tars.load(path)

    refused(plain[: heads[kept]] + bytes(len(plain) - heads[kept]))  # to the end
    refused(plain[: heads[kept]] + bytes(512) + plain[heads[kept] + 512 :])  # one block
    refused(plain[: heads[kept]] + bytes(1024) + plain)  # another tar behind
    for end in (512, 1024, 10240):  # which other programs write
        whole = plain[: heads[kept]] + bytes(end)
        path.write_bytes(tar({"x.tar": bytes(whole)}) if nested else whole)
        assert len(tars.load(path)) == kept


def test_how_deep_tars_lie_in_each_other(tmp_path):
    content, path = tar({"a_1.png": jpeg(1)}), tmp_path / "t.tar"
    for _ in range(tars.MAX_DEPTH - 1):
        content = tar({"n.tar": content})
    path.write_bytes(content)
    assert len(tars.load(path)) == 1
    path.write_bytes(tar({"n.tar": content}))
    with pytest.raises(UserError, match="tars are nested more than 8 deep"):
        tars.load(path)


def test_another_tar_of_the_same_size_and_time(tmp_path):
    path = tmp_path / "t.tar"

    def replace(content):
        path.write_bytes(content)
        os.utime(path, ns=(10**18, 10**18))

    images = [jpeg(n) for n in (10, 20)]
    assert len(images[0]) == len(images[1])
    first = tar({"a/1.png": images[0], "b/1.png": images[1]})
    replace(first)
    before = tars.load(path)
    replace(tar({"b/1.png": images[0], "a/1.png": images[1]}))
    with pytest.raises(OSError, match="is another file than its index"):  # while it is read
        before.read(0)
    found = tars.load(path)
    assert [found.classes[found.read(i)[1]] for i in range(2)] == ["b", "a"]
    # Of tars inside, which give the classes, the headers are compared, too.
    inside = [tar({"1.png": image}) for image in images]
    replace(tar({"a.tar": inside[0], "b.tar": inside[1]}))
    assert tars.load(path).labels.tolist() == [0, 1]
    replace(tar({"b.tar": inside[0], "a.tar": inside[1]}))
    assert tars.load(path).labels.tolist() == [1, 0]


def broken_indices(whole):
    """Whatever may lie where an index was."""
    with np.load(whole) as file:
        found = dict(file)
    yield b""
    yield b"no index"
    yield whole.read_bytes()[:-30]
    for change in (
        {"names": found["names"][:1]},  # of unequal length
        {"offsets": found["offsets"].astype(float)},
        {"offsets": found["offsets"] + 10**9},
        {"sizes": -found["sizes"]},
        {"headers": np.zeros_like(found["headers"]) - 5},
        {"headers": np.array(3)},
        {"classes": np.array([{}, {}], object)},
        {"left_out": np.array([], "U1")},
        {"names": np.full(found["names"].shape, -1, np.int32).view("U1")},  # no characters
        {"stamp": np.array([1])},
    ):
        file = io.BytesIO()
        np.savez(file, **{**found, **change})
        yield file.getvalue()
    file = io.BytesIO()
    np.save(file, np.zeros(3))  # another NumPy file
    yield file.getvalue()
    for of in (b"\x01\x00", b"\x00\x00"):  # encrypted, of an unknown compression
        content = bytearray(whole.read_bytes())
        at = content.find(b"PK\x01\x02")
        content[at + 8 : at + 10] = of
        content[at + 10 : at + 12] = b"\x63\x00"
        yield bytes(content)


def test_whatever_is_wrong_with_the_index_it_is_made_anew(imagenet):
    expected = tars.load(imagenet)
    index = imagenet.with_name("train.tar.index.npz")
    index.rename(index.with_name("whole"))
    for content in broken_indices(index.with_name("whole")):
        index.write_bytes(content)
        found = tars.load(imagenet)
        assert found.contents == expected.contents and pixel(found, 5) == pixel(expected, 5)
        assert zipfile.is_zipfile(index) and len(np.load(index)["names"]) == 6
    index.unlink()
    os.mkfifo(index)  # which would be waited for
    assert tars.load(imagenet).contents == expected.contents
    assert index.is_file()
