"""Sets prepared by TensorFlow Datasets as ArrayRecord, read at random without TensorFlow."""

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mdt_jax.data.found import describe
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import reason


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One split of a prepared set. classes: the labels' names, none without labels.

    records: of each the features by name; image: the name of the feature that is the image's file.
    """

    title: str
    records: Sequence[Mapping[str, Any]]
    image: str
    classes: list[str]
    left_out = ""

    def __len__(self) -> int:
        return len(self.records)

    def name(self, i: int) -> str:
        """For messages."""
        return f"{self.title}, record {i}"

    @property
    def found(self) -> str:
        """How many images of how many classes there are."""
        return describe(len(self), None, self.classes, self.left_out)

    @property
    def contents(self) -> str:
        """What tells it from other sets: its full name, with its version, and its size."""
        return f"{self.title}, {len(self)} records"

    def read(self, i: int) -> tuple[io.BytesIO, int]:
        """(the file of an image, label). Raises UserError where the record is damaged."""
        try:
            record = self.records[i]
            label = int(record["label"]) if self.classes else 0
            file = io.BytesIO(record[self.image])
        except OSError:
            raise
        except Exception as error:  # of the kinds that ArrayRecord's C++ has
            raise UserError(f"{self.name(i)} is damaged: {reason(error)}") from None
        if self.classes and not 0 <= label < len(self.classes):
            raise UserError(f"{self.name(i)} has the label {label}: the split is not labelled")
        return file, label


def load(name: str, split: str) -> Prepared:
    """A split of the set `name`, such as imagenet2012 or lsun/bedroom.

    It lies where TFDS puts it (TFDS_DATA_DIR, or ~/tensorflow_datasets); or `name` is the folder of
    one version of a prepared set, which then needs no code of its own. Raises UserError where it is
    not prepared as ArrayRecord (and says how), or has no such split or no images, where what lies
    there is damaged, and where it names features that are not TFDS's own: it would be imported.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError(
            "data.name=tfds needs tensorflow-datasets: pip install -e '.[data]'"
        ) from None
    with _own_features(tfds, name):
        return _load(tfds, name, split)


def _load(tfds, name: str, split: str) -> Prepared:
    builder = _builder(tfds, name)
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
    classes = label.names if isinstance(label, tfds.features.ClassLabel) else []
    try:
        # Encoded, to be decoded by Pillow as everywhere.
        records = builder.as_data_source(split, decoders={images[0]: tfds.decode.SkipDecoding()})
    except (NotImplementedError, ImportError):
        raise UserError(f"{name} is not prepared as ArrayRecord; {_how(name)}") from None
    title = f"{builder.info.full_name}/{split}"
    found = Prepared(title, records, images[0], list(classes or []))
    if not len(found):
        raise UserError(f"{title} holds no records")
    return found


@contextlib.contextmanager
def _own_features(tfds, name: str) -> Iterator[None]:
    """While a set is opened, no feature's module is imported but TFDS's own; UserError for others,
    and for whatever TFDS raises where its files are damaged.

    TFDS imports the module of each class that features.json names, which may be anything.
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
        if refused:  # TFDS may have made another error of it
            raise UserError(
                f"{name} has a feature of the class {str(refused[0])[:200]!r}, which is not TFDS's "
                "own and would be imported; prepare the set with TFDS's features"
            ) from None
        if isinstance(error, (UserError, OSError)):
            raise
        raise UserError(f"{name} is damaged, or no set of TFDS: {reason(error)}") from None
    finally:
        base.cls_from_name = before


def _builder(tfds, name: str) -> Any:
    """A DatasetBuilder of a prepared set. Raises UserError."""
    hint = ""
    if os.path.isdir(name):
        if os.path.isfile(os.path.join(name, "dataset_info.json")):
            return tfds.builder_from_directory(name)
        hint = f"; the folder {name} is not that of one version of a prepared set"
    try:
        builder = tfds.builder(name, file_format="array_record")
    except Exception as error:  # of many kinds, by what is missing
        text = " ".join(str(error).split())[:200]
        raise UserError(f"TFDS has no set {name!r} that can be read here{hint}: {text}") from None
    if not builder.is_prepared():
        raise UserError(f"{name} is not prepared in {builder.data_dir}; {_how(name)}")
    return builder


def _how(name: str) -> str:
    if os.path.isdir(name):
        name = os.path.basename(os.path.dirname(os.path.normpath(name)))
    return f"where TensorFlow is installed: tfds build {name} --file_format=array_record"
