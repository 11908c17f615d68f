"""The files of a run that grow: on a disk in the workdir, for a bucket in a folder beside it."""

import fnmatch
import pathlib
import shutil
import tempfile

from mdt_jax.runtime import buckets, files

LOG = "metrics.jsonl"
# Files that other libraries write.
MIRRORED = ("profile/*", "tensorboard/*", "wandb/run-id")


class Mirror:
    """A local folder for LOG and the files of MIRRORED, of which a workdir in a bucket gets copies.

    On a disk the folder is the workdir itself, and nothing is copied.
    """

    def __init__(self, workdir: files.Path):
        self._workdir = workdir
        self._copied: dict[str, tuple[int, int]] = {}  # name → size and time of what was uploaded
        if isinstance(workdir, pathlib.Path):
            self.folder = workdir
        else:
            self._temporary = tempfile.TemporaryDirectory(prefix="mdt_jax-")
            self.folder = pathlib.Path(self._temporary.name)

    def fetch(self, *names: str) -> None:
        """Copy those of the files that exist from the bucket. Raises UserError."""
        for name in names:
            source, path = self._workdir / name, self.folder / name
            if files.in_bucket(source) and files.is_file(source):
                path.parent.mkdir(exist_ok=True)
                shutil.copyfile(files.fetched(source), path)

    def log(self) -> str | None:
        """The text of LOG; None on a disk, and where this process has no log."""
        path = self.folder / LOG
        return path.read_text() if files.in_bucket(self._workdir) and path.exists() else None

    def put_log(self, text: str | None) -> None:
        """Write a text of `log` to the bucket. Raises UserError."""
        if text is not None:
            with files.atomic_write(self._workdir / LOG) as temporary:
                temporary.write_text(text)

    def push(self) -> None:
        """Copy the files of MIRRORED that have changed, each as one object. Raises UserError."""
        if not files.in_bucket(self._workdir):
            return
        for path in sorted(self.folder.rglob("*")):
            name, stat = path.relative_to(self.folder).as_posix(), path.stat()
            if not any(fnmatch.fnmatch(name, pattern) for pattern in MIRRORED) or path.is_dir():
                continue
            if self._copied.get(name) != (stat.st_size, stat.st_mtime_ns):
                buckets.upload(path, self._workdir / name)
                self._copied[name] = stat.st_size, stat.st_mtime_ns
