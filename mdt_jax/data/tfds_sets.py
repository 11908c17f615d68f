"""Sets prepared by TensorFlow Datasets as ArrayRecord, read at random without TensorFlow."""

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mdt_jax.data.image_files import ImageFiles
from mdt_jax.data.in_buckets import check_array_record, unreached
from mdt_jax.runtime import buckets, files
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsFiles(ImageFiles):
    """The images in one split of a prepared set.

    title: the set's full name with its version, and the split. records: a dict of features each,
    of which `image_feature` is the encoded image. in_bucket: whether gs:// holds them.
    """

    title: str
    records: Sequence[Mapping[str, Any]]
    image_feature: str
    labels: None = None
    in_bucket: bool = False

    def __len__(self) -> int:
        return len(self.records)

    def name(self, i: int) -> str:
        """The set and the number of the record."""
        return f"{self.title}, record {i}"

    def read(self, i: int) -> tuple[io.BytesIO, int]:
        """(encoded image i, its label). Raises UserError where the record is damaged."""
        try:
            return self._parsed(self.records[i], i)
        except (OSError, UserError):
            raise
        except Exception as error:  # of the kinds that ArrayRecord's C++ raises
            if text := unreached(error):
                raise OSError(text) from None
            raise UserError(f"{self.name(i)} is damaged: {reason(error)}") from None

    def read_ahead(self, items: Sequence[int]) -> dict[int, tuple[io.BytesIO, int]]:
        """`read` of several images at once, where each takes the time of a request to a bucket."""
        if not self.in_bucket:
            return {}
        try:
            records = self.records.__getitems__(items)  # pyright: ignore[reportAttributeAccessIssue]
            return {i: self._parsed(record, i) for i, record in zip(items, records, strict=True)}
        except Exception:  # `read` tells what is wrong with which
            return {}

    def _parsed(self, record: Mapping[str, Any], i: int) -> tuple[io.BytesIO, int]:
        label = int(record["label"]) if self.classes else 0
        if self.classes and not 0 <= label < len(self.classes):
            raise UserError(f"{self.name(i)} has the label {label}: the split is not labelled")
        return io.BytesIO(record[self.image_feature]), label

    @property
    def contents(self) -> str:
        """The title and the number of records."""
        return f"{self.title}, {len(self)} records"


def load(name: str, split: str) -> TfdsFiles:
    """Open a split of a prepared set.

    name: as TFDS calls it, for example imagenet2012 or lsun/bedroom, in TFDS_DATA_DIR or
    ~/tensorflow_datasets; or the folder of one version of a set, which needs no code of that set.
    Either folder may be in a bucket, gs://BUCKET/NAME.

    Raises UserError where the set is not prepared as ArrayRecord (and says how to prepare it), has
    no such split or no images, is damaged, or names features that are not TFDS's own: their modules
    would be imported.
    """
    is_version = os.path.isfile(os.path.join(name, "dataset_info.json"))
    if not (files.in_bucket(name) or is_version):  # TFDS looks in its own folder
        try:  # before TFDS is imported, which remembers the value
            files.anywhere(os.environ.get("TFDS_DATA_DIR", ""))
        except UserError as error:
            raise UserError(f"TFDS_DATA_DIR: {error}") from None
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError(
            "data.name=tfds needs tensorflow-datasets: pip install -e '.[data]'"
        ) from None
    for place in _buckets(name):
        files.as_path(place)  # its client is installed
        check_array_record(place)
    with buckets.reading(next(iter(_buckets(name)), name)), _only_own_features(tfds, name):
        builder = _builder(tfds, name)
        return _open_split(tfds, builder, name, split)


def _open_split(tfds, builder, name: str, split: str) -> TfdsFiles:
    try:
        builder.info.splits[split]
    except Exception:  # KeyError, ValueError, …, by what is wrong with it
        known = ", ".join(builder.info.splits) or "none"
        raise UserError(f"{name} has no split {split!r}; it has {known}") from None
    features = dict(builder.info.features.items())
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    if not images:
        raise UserError(f"{name} holds no images; its features are {', '.join(features)}")
    label: Any = features.get("label")
    classes = label.names if isinstance(label, tfds.features.ClassLabel) else None
    try:
        # Not decoded here, because Pillow decodes the images of all sources.
        records = builder.as_data_source(split, decoders={images[0]: tfds.decode.SkipDecoding()})
    except (NotImplementedError, ImportError):
        raise UserError(f"{name} is not prepared as ArrayRecord; {_how_to_prepare(name)}") from None
    title = f"{builder.info.full_name}/{split}"
    if not len(records):
        raise UserError(f"{title} holds no records")
    return TfdsFiles(
        title=title, records=records, image_feature=images[0], classes=list(classes or []),
        in_bucket=files.in_bucket(builder.data_dir),
    )  # fmt: skip


def _buckets(name: str) -> list[str]:
    """The places in buckets where a set may be: the one that it names, and TFDS_DATA_DIR."""
    return [*filter(files.in_bucket, (name, os.environ.get("TFDS_DATA_DIR", "")))]


def _is_of_bucket(error: Exception, name: str) -> bool:
    """Whether the client of a bucket raised an error, which says nothing about the set."""
    return bool(_buckets(name) and buckets.problem(error))


@contextlib.contextmanager
def _only_own_features(tfds, name: str) -> Iterator[None]:
    """Open a set in this context: it imports no feature's module except TFDS's own.

    TFDS imports the module of each class that features.json names, which may be any module. Raises
    UserError for classes of other modules, and for any exception of TFDS on damaged files.
    """
    base, refused = tfds.features.FeatureConnector, []
    before = vars(base)["cls_from_name"]

    def checked(cls, class_name):
        if not str(class_name).startswith("tensorflow_datasets."):
            refused.append(class_name)
            raise UserError(f"{class_name} is not TFDS's own")
        return before.__func__(cls, class_name)

    base.cls_from_name = classmethod(checked)
    try:
        yield
    except Exception as error:
        if refused:  # TFDS may have raised another error because of it
            raise UserError(
                f"{name} has a feature of the class {str(refused[0])[:200]!r}, which is not TFDS's "
                "own and would be imported; prepare the set with TFDS's features"
            ) from None
        if isinstance(error, (UserError, OSError)) or _is_of_bucket(error, name):
            raise
        raise UserError(f"{name} is damaged, or is no TFDS set: {reason(error)}") from None
    finally:
        base.cls_from_name = before


def _builder(tfds, name: str) -> Any:
    """The DatasetBuilder of a prepared set. Raises UserError."""
    hint = ""
    if files.in_bucket(name) or os.path.isdir(name):
        if files.is_file(os.path.join(name, "dataset_info.json")):
            return tfds.builder_from_directory(name)
        if files.in_bucket(name):
            buckets.check_bucket(name)
            raise UserError(
                f"{name} holds no dataset_info.json: give the folder of one version of a prepared "
                "set, e.g. gs://BUCKET/imagenet2012/5.1.0"
            )
        hint = f"; the folder {name} does not hold one version of a prepared set"
    try:
        builder = tfds.builder(name, file_format="array_record")
    except Exception as error:  # of many kinds, by what is missing
        if _is_of_bucket(error, name):
            raise
        text = " ".join(str(error).split())[:200]
        raise UserError(f"TFDS has no set {name!r} that can be read here{hint}: {text}") from None
    if not builder.is_prepared():
        raise UserError(f"{name} is not prepared in {builder.data_dir}; {_how_to_prepare(name)}")
    return builder


def _how_to_prepare(name: str) -> str:
    if files.is_dir(name):
        name = os.path.basename(os.path.dirname(os.path.normpath(name)))
    return f"where TensorFlow is installed: tfds build {name} --file_format=array_record"
