"""Files written whole, the room for them, and what is told of those that cannot be read."""

import contextlib
import errno
import os
import shutil
import stat
from types import SimpleNamespace

import pytest

from mdt_jax.runtime import files
from mdt_jax.runtime.errors import DamagedError, UserError


def test_the_umask_is_never_changed(tmp_path, monkeypatch):
    """Not even for a moment: other threads write meanwhile."""
    before = os.umask(0o027)
    with monkeypatch.context() as patch:
        patch.setattr(os, "umask", lambda _: pytest.fail("the umask is set"))
        with files.atomic_write(
            tmp_path / "a"
        ) as temporary:  # as writers do that let nobody else read
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_room_is_measured_where_a_link_leads(tmp_path, monkeypatch):
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
    (tmp_path / "small" / "checkpoints").symlink_to(tmp_path / "large")

    def disk_usage(path):
        return SimpleNamespace(free=10**9 if "large" in str(os.path.realpath(path)) else 10)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    files.check_room(tmp_path / "small" / "checkpoints", 10**6)
    files.check_room(tmp_path / "small" / "checkpoints" / "a.npz", 10**6)
    with pytest.raises(UserError, match="takes 1.0 MB, and 0.0 MB are free"):
        files.check_room(tmp_path / "small" / "a.npz", 10**6)


@pytest.fixture
def refusing(monkeypatch):
    """refusing(folder, number): nothing can be made in it any more; root may do what others may
    not, so the system's answer is made up."""

    def refuse(folder, number: int, when: str = "opened"):
        def fail(*_):
            raise OSError(number, os.strerror(number))

        @contextlib.contextmanager
        def opened(dir, **named):
            assert dir == folder
            if when == "opened":
                fail()
            yield SimpleNamespace(write=fail)

        monkeypatch.setattr(files.tempfile, "TemporaryFile", opened)

    return refuse


@pytest.mark.parametrize(
    ("number", "when"),
    [
        (errno.EACCES, "opened"), (errno.EROFS, "opened"), (errno.EPERM, "opened"),
        (errno.EDQUOT, "written"), (errno.ENOSPC, "written"), (errno.ESTALE, "opened"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_written_to(number, when, tmp_path, refusing):
    refusing(tmp_path, number, when)
    for folder in (tmp_path, tmp_path / "new", tmp_path / "new" / "er"):
        with pytest.raises(UserError) as error:
            files.check_writable(folder, f"--out={folder}")
        assert str(error.value) == f"--out={folder} cannot be written to: {os.strerror(number)}"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_be_written_to_is_left_as_it_was(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "not" / "yet")
    for name in (".", "new/er", "link", "link/new"):
        files.check_writable(tmp_path / name, "it")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
    (tmp_path / "a").touch()
    for name in ("a", "a/new/er"):
        with pytest.raises(UserError, match=f"it cannot .*: {tmp_path}/a is a file, not a folder"):
            files.check_writable(tmp_path / name, "it")


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{}", b"", b"{", b"[]", b"3", b'"a"', b"[" * 10**5, b'{"a": ' * 10**5]
)
def test_json_that_is_damaged(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DamagedError, match=r"a\.json") as error:
        files.read_json(tmp_path / "a.json")
    assert "\n" not in str(error.value)


def test_json(tmp_path):
    assert files.read_json(tmp_path / "a.json") is None
    (tmp_path / "a.json").write_text('{"ä": 1}', encoding="utf-8")
    assert files.read_json(tmp_path / "a.json") == {"ä": 1}
    with pytest.raises(UserError, match="cannot be read: Is a directory") as error:
        files.read_json(tmp_path)
    assert not isinstance(error.value, DamagedError)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match=r"pipe\.json cannot be read: it is no regular file"):
        files.read_json(tmp_path / "pipe.json")


def test_what_passes():
    for number in (errno.EACCES, errno.EMFILE, errno.EIO, errno.ENOMEM, errno.ESTALE):
        assert files.passes(OSError(number, os.strerror(number)))
        assert files.passes(ValueError(f'opening "x": [OS error {number}: {os.strerror(number)}]'))
        try:
            try:
                raise OSError(number, "x")
            except OSError as error:
                raise ValueError("no such item") from error
        except ValueError as error:
            assert files.passes(error)
    assert files.passes(MemoryError())
    for error in (FileNotFoundError(errno.ENOENT, "x"), ValueError("bad bits"), EOFError()):
        assert not files.passes(error)


def test_paths_of_this_machine(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert files.local("~/runs") == "/home/ada/runs" and files.local("a/~b") == "a/~b"
    assert files.local("tfds:mnist:test") == "tfds:mnist:test" and files.local("") == ""
    monkeypatch.setenv("SCRATCH", "/big")
    assert files.local("$SCRATCH/runs") == files.local("${SCRATCH}/runs") == "/big/runs"
    assert files.local("tfds:/data/mnist/3.0.1:test") == "tfds:/data/mnist/3.0.1:test"
    assert files.local("./~nobody-there") == "./~nobody-there" and files.local("a$b") == "a$b"
    for path, what in (("~nobody-there/x", "user"), ("$NOT_SET/x", "environment variable")):
        with pytest.raises(UserError, match=f"there is no {what} of this name") as error:
            files.local(path)
        assert str(error.value).endswith(f"./{path}")
    urls = "gs:/b/x file:/x HTTP://b gs://b/x S3://b file:///x hdfs+x://y https://z hf://o/r/f"
    for url in urls.split():
        with pytest.raises(UserError, match=f"{url.replace('+', '.')} is a URL"):
            files.local(url)
