"""The servers of buckets that other tests use, through the clients that the package uses."""

import json
import os
import subprocess
import sys
import urllib.error

import numpy as np
import pytest

from tests.conftest import ROOT

CHUNK = 8 << 20


@pytest.fixture
def files(gcs):
    """gcsfs's file system, new in each test."""
    import gcsfs

    return gcsfs.GCSFileSystem(skip_instance_cache=True)


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A file of 20 MB with random bytes."""
    path = tmp_path_factory.mktemp("big") / "big"
    path.write_bytes(os.urandom(20 << 20))
    return path


def test_gcsfs_reads_what_it_wrote(gcs, files, big):
    for content in (b"", b"\r", b"a\n", b"\r\n", b"--==", os.urandom(100_000) + b"\r\n\r"):
        files.pipe(f"{gcs.bucket}/a/b", content)
        assert gcs.read("a/b") == files.cat(f"{gcs.bucket}/a/b") == content
    assert files.cat_file(f"{gcs.bucket}/a/b", 1000, 2000) == content[1000:2000]
    assert files.cat_file(f"{gcs.bucket}/a/b", -9, None) == content[-9:]
    for chunk in (CHUNK, 50 << 20):
        files.put(str(big), f"{gcs.bucket}/a/big", chunksize=chunk)
        assert gcs.read("a/big") == big.read_bytes() == files.cat(f"{gcs.bucket}/a/big")
    with files.open(f"{gcs.bucket}/c", "wb") as file:
        file.write(big.read_bytes())
    assert gcs.read("c") == big.read_bytes()


def test_gcsfs_lists_and_removes(gcs, files):
    for name in ("a/1", "a/2", "a/b/3", "c"):
        gcs.write(name, b"x")
    assert files.ls(f"{gcs.bucket}/a") == [f"{gcs.bucket}/a/{n}" for n in ("1", "2", "b")]
    assert files.exists(f"{gcs.bucket}/a/1") and not files.exists(f"{gcs.bucket}/a/4")
    files.rm(f"{gcs.bucket}/a", recursive=True)
    assert gcs.objects() == ["c"]


def test_a_listing_has_pages(gcs, files):
    for number in range(7):
        gcs.write(f"{number}", b"")
    listing = json.loads(gcs._request("GET", f"/storage/v1/b/{gcs.bucket}/o?maxResults=3"))
    assert [item["name"] for item in listing["items"]] == ["0", "1", "2"]
    assert listing["nextPageToken"] == "3"
    assert len(gcs.objects()) == len(files.ls(gcs.bucket)) == 7


def test_what_exists_is_not_created_again(gcs, files, big):
    files.pipe(f"{gcs.bucket}/a", b"1", mode="create")
    with pytest.raises(FileExistsError):
        files.pipe(f"{gcs.bucket}/a", b"2", mode="create")
    with pytest.raises(FileExistsError):
        files.put(str(big), f"{gcs.bucket}/a", mode="create", chunksize=CHUNK)
    assert gcs.read("a") == b"1"


def test_what_is_not_there(gcs, files):
    for path in (f"{gcs.bucket}/a", "no-such-bucket/a"):
        with pytest.raises(FileNotFoundError):
            files.cat(path)
    with pytest.raises(FileNotFoundError):
        files.pipe("no-such-bucket/a", b"1")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        gcs.read("a")


def test_tensorstore_reads_and_writes_on_conditions(gcs):
    import tensorstore

    store = tensorstore.KvStore.open(f"{gcs.root}/kv/").result()
    missing = store.read(b"a").result()
    assert missing.state == "missing"
    first = store.write(b"a", b"0123456789", if_equal=missing.stamp.generation).result()
    second = store.write(b"a", b"other", if_equal=missing.stamp.generation).result()
    assert second.generation != first.generation and gcs.read("kv/a") == b"0123456789"
    assert store.read(b"a", if_not_equal=first.generation).result().state == "unspecified"
    store.write(b"a", b"9876543210", if_equal=first.generation).result()
    store.write(b"b", b"").result()
    assert gcs.read("kv/a") == b"9876543210" and gcs.read("kv/b") == b""
    assert sorted(store.list().result()) == [b"a", b"b"]
    assert store.list(tensorstore.KvStore.KeyRange("b", "c")).result() == [b"b"]
    store.delete_range(tensorstore.KvStore.KeyRange()).result()
    assert gcs.objects() == []


def test_tensorstore_keeps_arrays(gcs):
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": f"{gcs.root}/arrays/"}}
    values = np.random.default_rng(0).normal(size=(100, 300)).astype(np.float32)
    kwargs = {"dtype": "float32", "shape": values.shape, "create": True}
    tensorstore.open(spec, **kwargs).result().write(values).result()
    assert "arrays/manifest.ocdbt" in gcs.objects()
    again = tensorstore.open(spec, context=tensorstore.Context()).result()
    np.testing.assert_array_equal(again.read().result(), values)


def test_array_record_reads_at_random(gcs, tmp_path):
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    from array_record.python.array_record_module import ArrayRecordWriter

    path = tmp_path / "records"
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    records = [number.to_bytes(4, "little") * 100 for number in range(1000)]
    for record in records:
        writer.write(record)
    writer.close()
    gcs.write("records", path.read_bytes())
    source = ArrayRecordDataSource([f"{gcs.root}/records"])
    assert len(source) == 1000 and source[7] == records[7]
    assert source.__getitems__([3, 999, 500]) == [records[n] for n in (3, 999, 500)]


def test_google_cloud_storage_finds_the_bucket(gcs):
    from google.api_core.exceptions import NotFound
    from google.cloud import storage

    assert storage.Client().get_bucket(gcs.bucket).name == gcs.bucket
    with pytest.raises(NotFound, match="bucket does not exist"):
        storage.Client().get_bucket("no-such-bucket")


def test_one_of_several_processes_creates_an_object(gcs):
    script = (
        "import gcsfs, sys\n"
        "files = gcsfs.GCSFileSystem()\n"
        "print('ready', flush=True)\n"
        "input()\n"
        "for n in range(10):\n"
        "    try:\n"
        f"        files.pipe(f'{gcs.bucket}/{{n}}', sys.argv[1].encode(), mode='create')\n"
        "        print(n)\n"
        "    except FileExistsError:\n"
        "        pass\n"
    )
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [
        subprocess.Popen([sys.executable, "-c", script, name], **pipe, cwd=ROOT) for name in "ab"
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    created = [writer.communicate(timeout=60)[0].split() for writer in writers]
    assert sorted(created[0] + created[1]) == [str(number) for number in range(10)]
    for name, numbers in zip("ab", created, strict=True):
        assert all(gcs.read(number) == name.encode() for number in numbers)


@pytest.mark.parametrize(
    "fields",
    [
        {"status": 503},
        {"cut": "down"},
        {"cut": "up", "method": "POST"},
        {"cut": "up", "method": "POST", "skip": 2},
        {"cut": "answer", "method": "POST"},
        {"cut": "answer", "method": "POST", "skip": 2},
        {"cut": "answer", "method": "POST", "skip": 3},
        {"wait": 0.3},
    ],
    ids=str,
)
def test_gcsfs_tries_again_after_a_fault(gcs, files, big, fields):
    gcs.write("a", big.read_bytes())
    gcs.set_faults(dict(**fields, times=1))
    assert files.cat(f"{gcs.bucket}/a") == big.read_bytes()
    files.put(str(big), f"{gcs.bucket}/big", chunksize=CHUNK)
    assert gcs.read("big") == big.read_bytes()
    assert [each.times for each in gcs.faults] == [0]


def test_faults_that_stay(gcs, files):
    gcs.write("a", b"1")
    gcs.set_faults(dict(status=403, target="/o/a"))
    with pytest.raises(OSError, match="Forbidden"):
        files.cat(f"{gcs.bucket}/a")
    files.pipe(f"{gcs.bucket}/b", b"2")
    gcs.set_faults(dict(status=401, method="POST", target="object-c"))
    with pytest.raises(Exception, match="401"):
        files.pipe(f"{gcs.bucket}/object-c", b"3")
    assert gcs.requests[-1].endswith("uploadType=multipart object-c")
    gcs.set_faults()
    assert gcs.objects() == ["a", "b"]


def test_an_upload_that_is_cut_leaves_no_object(gcs, big):
    gcs.set_faults(dict(cut="up", method="POST"))
    with pytest.raises(urllib.error.URLError):
        gcs.write("a", big.read_bytes())
    gcs.set_faults()
    assert gcs.objects() == []


def test_s3(s3):
    import s3fs

    files = s3fs.S3FileSystem(skip_instance_cache=True)
    files.pipe(f"{s3.bucket}/a/b", b"0123456789")
    assert s3.read("a/b") == b"0123456789" and s3.objects() == ["a/b"]
    assert files.cat_file(f"{s3.bucket}/a/b", start=2, end=5) == b"234"
    s3.write("c", b"")
    assert files.exists(f"{s3.bucket}/c") and not files.exists(f"{s3.bucket}/d")
    with pytest.raises(FileExistsError):
        files.pipe(f"{s3.bucket}/c", b"1", mode="create")
