"""Images in parquet shards, as the Hugging Face hub has them: an image and a label in each row."""

import contextlib
import dataclasses
import glob
import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mdt_jax.data import image_files, parquet_rows
from mdt_jax.data.image_files import ImageFiles, LeftOut
from mdt_jax.data.parquet_rows import Shard
from mdt_jax.runtime import buckets, files
from mdt_jax.runtime.errors import UserError

SUFFIX = ".parquet"
# Names of the columns: the first that a set has is read.
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_NAMES = ("label", "labels", "cls", "class", "fine_label")
NUMBERED = re.compile(r"(.*-)(\d{5})(-of-)(\d{5})(.*)")  # the hub's names of shards
HASH = re.compile(r"(?<=-of-\d{5})-[0-9a-f]{16}(?=\.parquet$)")  # in older names of the hub
# The most rows that a byte of a shard may hold: equal or missing images take few bits.
ROWS_PER_BYTE = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParquetFiles(ImageFiles):
    """The images in the rows of parquet shards.

    names: of the shards, relative to the folder that holds all. records: the encoded image of each
    row; empty where the row has none.
    """

    shards: list[Shard]
    names: list[str]
    records: Sequence[bytes]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """The path of the shard of image i, and its row there, from 0."""
        shard, row = _locate(self.shards, i)
        return f"{shard.path}, row {row}"

    def read(self, i: int) -> tuple[io.BytesIO, int]:
        """(encoded image i, its label). Raises UserError where the row cannot be read."""
        try:
            return io.BytesIO(self.records[i]), int(self.labels[i])
        except (UserError, OSError):
            raise
        except Exception as error:  # of the kinds that ArrayRecord's C++ raises
            copy = _locate(self.shards, i)[0].unpacked
            if files.passes(error):
                raise UserError(f"{copy} cannot be read: {files.reason(error)}") from None
            raise UserError(
                f"{copy} is damaged: {files.reason(error)}; remove it, and it is made again"
            ) from None

    @property
    def sha256(self) -> str:
        """SHA-256 of the shards, hexadecimal. Those in a bucket are read, but not copied."""
        digest = hashlib.sha256()
        for shard in self.shards:
            with parquet_rows.open_file(shard.path) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    @property
    def contents(self) -> str:
        """The name, size and number of rows of each shard, and all labels."""
        lines = [f"{n}\t{s.size}\t{s.rows}" for n, s in zip(self.names, self.shards, strict=True)]
        return "\n".join([*lines, hashlib.sha256(self.labels.tobytes()).hexdigest()])


def load(
    path: str | os.PathLike, num_classes: int | None = None, at_random: bool = False
) -> ParquetFiles:
    """Open parquet shards.

    path: a shard, a glob of shards, or a folder with shards at any depth; they are read in the
    order of their names. The image column is the first of IMAGE_NAMES, else the only one of a
    fitting type: binary, or a struct with binary `bytes`, as the hub has it. The label column is
    the first of LABEL_NAMES, else the only one with class names; it has whole numbers or text.
    Class names are those in the hub's metadata; without them, classes are sorted.
    num_classes: the expected number; 0 ignores labels. Numbers without names count from 0 to
    num_classes − 1, or from 1 to num_classes. at_random: unpack the images, because a row group is
    too much to read for each (`parquet_rows.unpack`). Raises UserError where there are no shards,
    or several splits, or where a shard is damaged or a column missing or of another type, a label
    is missing or out of range, or pyarrow is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError("data.name=parquet needs pyarrow: pip install -e '.[parquet]'") from None
    paths, names, left_out = _find_shards(os.fspath(path))
    opened = [_open(shard, num_classes != 0) for shard in paths]
    shards, columns = [shard for shard, _ in opened], [labels for _, labels in opened]
    for shard, labels in opened:
        if (shard.column, labels.kind) != (shards[0].column, columns[0].kind):
            raise UserError(
                f"{shard.path} has other columns than {shards[0].path}: the image is "
                f"{shard.column} and the label {labels.kind}, not {shards[0].column} and "
                f"{columns[0].kind}"
            )
        if labels.names != columns[0].names:
            raise UserError(f"{shard.path} has other class names than {shards[0].path}")
    if not sum(shard.rows for shard in shards):
        raise UserError(f"{path} holds no images: its shards have no rows")
    labels, classes = _number_labels(shards, columns, num_classes)
    # Callers refuse another number of classes: first, as unpacking may take many minutes.
    expected = not num_classes or len(classes) == num_classes
    unpacked = at_random and expected
    records = parquet_rows.unpack(shards) if unpacked else parquet_rows.RowGroups.of(shards)
    return ParquetFiles(
        shards=shards, names=names, records=records, labels=labels, classes=classes,
        left_out=str(left_out),
    )  # fmt: skip


def _locate(shards: list[Shard], i: int) -> tuple[Shard, int]:
    """(shard of image i, its row there)."""
    for shard in shards:
        if i < shard.rows:
            return shard, i
        i -= shard.rows
    raise IndexError(i)


def _find_shards(path: str) -> tuple[list[files.Path], list[str], LeftOut]:
    """(paths of the shards, their names relative to the folder of all, shards that are not there).

    Raises UserError where there are none, or where they are several splits.
    """
    left_out = LeftOut()
    found = _list_shards(path, left_out)
    # Their functions would shorten gs:// to gs:/.
    start = f"{buckets.scheme(path)}://" if files.in_bucket(path) else ""
    places = [name.removeprefix(start) for name in found]
    root = os.path.commonpath([os.path.dirname(name) for name in places])
    names = [os.path.relpath(name, root) for name in places]
    plain = [HASH.sub("", name) for name in names]
    if splits := image_files.find_splits(plain):
        folder, parts = splits
        globs = [start + os.path.join(root, folder, _split_glob(part)) for part in parts]
        raise UserError(
            f"{path} is divided into splits: give one of them, {', '.join(dict.fromkeys(globs))}"
        )
    there = set(plain)
    for name in plain:
        if match := NUMBERED.fullmatch(name):
            head, _, middle, total, end = match.groups()
            series = {f"{head}{n:05}{middle}{total}{end}" for n in range(int(total))}
            if missing := sorted(series - there):
                left_out.add("shard that is not there", missing[0], len(missing))
            there |= series
    return [files.as_path(name) for name in found], names, left_out


def _list_shards(path: str, left_out: LeftOut) -> list[str]:
    """The shards in a folder or matching a glob, sorted. Raises UserError where there are none.

    Hidden ones, and those in hidden folders, are left out unless the path names them.
    """
    with buckets.reading(path):
        is_folder, exists = files.is_dir(path), files.exists(path)
    if is_folder:
        pattern, problem = (
            os.path.join(glob.escape(path), "**", f"*{SUFFIX}"),
            f"holds no *{SUFFIX} files",
        )
    else:
        pattern = glob.escape(path) if exists else path
        problem = "matches no files" if glob.has_magic(path) else "does not exist"
    if files.in_bucket(path):
        found = _list_bucket(path, pattern, is_folder)
    elif is_folder:
        found = _walk(path, left_out)
    else:
        found = [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
    if not found:
        buckets.check_bucket(path)
        raise UserError(f"data.path {path} {problem}")
    return sorted(found)


def _list_bucket(path: str, pattern: str, is_folder: bool) -> list[str]:
    """As `_list_shards`, in a bucket; pattern: a glob of the path. Empty where there are none."""
    client, found = buckets.client(path), {}
    with buckets.reading(path), contextlib.suppress(FileNotFoundError):  # of the bucket
        list_objects = client.find if is_folder else client.glob
        found = list_objects(path if is_folder else pattern, detail=True)
    names = [client.unstrip_protocol(n) for n, info in found.items() if info["type"] == "file"]
    root = re.split(r"[*?[]", pattern)[0].rpartition("/")[0]
    if "/." not in pattern.removeprefix(root):
        names = [name for name in names if "/." not in name.removeprefix(root)]
    return [name for name in names if not is_folder or name.endswith(SUFFIX)]


def _walk(folder: str, left_out: LeftOut, above: tuple[str, ...] = ()) -> list[str]:
    """The shards in a folder and in its folders; links never lead into a circle.

    above: the real paths of the folders around this one.
    """
    real = os.path.realpath(folder)
    if real in above:
        left_out.add("link to a folder above", folder)
        return []
    found = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if name.startswith("."):
            continue
        if os.path.isdir(path):
            found += _walk(path, left_out, (*above, real))
        elif name.endswith(SUFFIX) and os.path.isfile(path):
            found.append(path)
    return found


def _split_glob(part: str) -> str:
    """A glob of the shards of one split; part: a shard of it, or its folder."""
    if not part.endswith(SUFFIX):
        return os.path.join(part, f"*{SUFFIX}")
    return part if not re.search(r"\d", part) else f"{re.split(r'[0-9]', part)[0]}*{SUFFIX}"


@dataclasses.dataclass(frozen=True)
class _Labels:
    """The label column of a shard.

    values: a pyarrow ChunkedArray; None without labels. kind: its type, in words. names: of the
    classes 0, 1, …; empty where the metadata has none.
    """

    values: Any
    kind: str
    names: list[str]


def _open(path: files.Path, labelled: bool) -> tuple[Shard, _Labels]:
    """Read the metadata of a shard and its labels. Raises UserError as `load` does."""
    import pyarrow

    size, version = _stat(path)
    with parquet_rows.damage(str(path)), parquet_rows.open_shard(path) as file:
        schema = file.schema_arrow
        column = _image_column(path, schema)
        groups, images = [], 0
        for n in range(file.num_row_groups):
            group = file.metadata.row_group(n)
            leaf = next(
                leaf for leaf in map(group.column, range(group.num_columns))
                if leaf.path_in_schema == column
            )  # fmt: skip
            if not group.num_rows == leaf.num_values <= ROWS_PER_BYTE * size:
                raise ValueError(f"row group {n} cannot have {group.num_rows} rows")
            groups.append(group.num_rows)
            images += leaf.total_uncompressed_size
        labels = _Labels(None, "missing", [])
        names = _class_names(schema) if labelled else {}
        if labelled and (name := _label_column(path, schema, names)):
            values = file.read(columns=[name]).column(0)
            if pyarrow.types.is_dictionary(values.type):  # each shard may have another one
                values = values.cast(values.type.value_type)
            if len(values) != sum(groups):
                raise ValueError(f"{name} has {len(values)} rows instead of {sum(groups)}")
            labels = _Labels(values, f"{name} of {values.type}", names.get(name, []))
    return Shard(path, column, size, version, tuple(groups), images), labels


def _stat(path: files.Path) -> tuple[int, str]:
    """(size of a file or an object, a text that changes with its content)."""
    if files.in_bucket(path):
        with buckets.reading(path):
            info = buckets.client(path).info(str(path))
        return info["size"], str(info.get("generation") or info.get("ETag"))
    return os.stat(path).st_size, str(os.stat(path).st_mtime_ns)


def _image_column(path: files.Path, schema) -> str:
    """The path of the image column in a schema. Raises UserError where none fits, or several do."""
    from pyarrow import types

    def is_binary(kind) -> bool:
        return kind is not None and (types.is_binary(kind) or types.is_large_binary(kind))

    fitting = {}
    for field in schema:
        if is_binary(field.type):
            fitting[field.name] = field.name
        elif types.is_struct(field.type):
            parts = {part.name: part.type for part in field.type.fields}
            if is_binary(parts.get("bytes")):
                fitting[field.name] = f"{field.name}.bytes"
    named = [name for name in IMAGE_NAMES if name in schema.names]
    if named and named[0] not in fitting:
        raise UserError(
            f"{path}: the column {named[0]} is {schema.field(named[0]).type}; images must be "
            "binary, or a struct with binary bytes"
        )
    if named:
        return fitting[named[0]]
    if len(fitting) != 1:
        of = ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"
        problem = f"{len(fitting)} columns may hold" if fitting else "no column holds"
        raise UserError(
            f"{path}: {problem} the images; name one of them image, and make it binary or a struct "
            f"with binary bytes; the columns are {of:.300}"
        )
    return next(iter(fitting.values()))


def _label_column(path: files.Path, schema, names: dict[str, list[str]]) -> str | None:
    """The name of the label column; None where there is none. Raises UserError for another type.

    names: the class names of each column that has some.
    """
    from pyarrow import types

    known = [name for name in LABEL_NAMES if name in schema.names] or list(names)[:2]
    if not known or (len(known) > 1 and known[0] not in LABEL_NAMES):
        return None
    kind = schema.field(known[0]).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_integer(value) or types.is_string(value) or types.is_large_string(value)):
        raise UserError(
            f"{path}: the column {known[0]} is {kind}; labels must be whole numbers or text"
        )
    return known[0]


def _class_names(schema) -> dict[str, list[str]]:
    """The class names of each column that has some, from the hub's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = {
            name: feature["names"]
            for name, feature in features.items()
            if name in schema.names and isinstance(feature, dict) and feature.get("names")
        }
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}
    return {
        name: names
        for name, names in found.items()
        if isinstance(names, list)
        and all(isinstance(each, str) for each in names)
        and len(set(names)) == len(names)
    }


def _number_labels(
    shards: list[Shard], columns: list[_Labels], num_classes: int | None
) -> tuple[np.ndarray, list[str]]:
    """(label of each row [N] int32, names of the classes). Raises UserError as `load` does."""
    import pyarrow as pa

    if columns[0].values is None:
        if num_classes:
            raise UserError(
                f"{shards[0].path} has no label column, one of {', '.join(LABEL_NAMES)}; "
                "model.num_classes=0 ignores labels"
            )
        return np.zeros(sum(shard.rows for shard in shards), np.int32), []
    chunks = [chunk for column in columns for chunk in column.values.chunks]
    encoded = pa.chunked_array(chunks).combine_chunks().dictionary_encode()
    if encoded.null_count:
        shard, row = _locate(shards, int(np.flatnonzero(encoded.is_null())[0]))
        raise UserError(f"{shard.path}, row {row} has no label; model.num_classes=0 ignores labels")
    values, places = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    names, first = columns[0].names, 0
    if isinstance(values[0], int) and (names or num_classes):
        count = len(names) or int(num_classes or 0)
        first = int(not names and max(values) == count and min(values) > 0)
        names = names or [str(number) for number in range(first, first + count)]
        for place, value in enumerate(values):
            if not first <= value < first + count:
                shard, row = _locate(shards, int(np.flatnonzero(places == place)[0]))
                raise UserError(
                    f"{shard.path}, row {row}: label {value} is outside the classes {first} to "
                    f"{first + count - 1}" + "; this split is not labelled" * (value == -1)
                )
        return np.array(values, np.int32)[places] - np.int32(first), names
    texts = [str(value) for value in values]
    classes = image_files.sort_classes(texts)
    return image_files.number_labels(texts, classes)[places], classes
