"""Sets prepared by TensorFlow Datasets as ArrayRecord, read at random without TensorFlow."""

import dataclasses
import io
import os

from mdt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One split of a prepared set. classes: the labels' names, none without labels."""

    title: str
    records: object
    image: str
    classes: list[str]

    def __len__(self) -> int:
        return len(self.records)

    def name(self, i: int) -> str:
        """For messages."""
        return f"{self.title}, record {i}"

    def read(self, i: int):
        """(PIL.Image of whatever mode and size, label); OSError where it is no image."""
        from PIL import Image

        record = self.records[i]
        return Image.open(io.BytesIO(record[self.image])), int(record.get("label", 0))


def load(name: str, split: str) -> Prepared:
    """A split of the set `name`, such as imagenet2012 or lsun/bedroom.

    It lies where TFDS puts it (TFDS_DATA_DIR, or ~/tensorflow_datasets); or `name` is the folder of
    one version of a prepared set, which then needs no code of its own. Raises UserError where it is
    not prepared as ArrayRecord (and says how), or has no such split or no images.
    """
    import tensorflow_datasets as tfds

    builder = _builder(tfds, name)
    if split not in builder.info.splits:
        known = ", ".join(builder.info.splits) or "none"
        raise UserError(f"{name} has no split {split!r}; it has {known}")
    features = dict(builder.info.features.items())
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    if not images:
        raise UserError(f"{name} holds no images; its features are {', '.join(features)}")
    classes = getattr(features.get("label"), "names", None) or []
    try:
        # Encoded, to be decoded by Pillow as everywhere.
        records = builder.as_data_source(split, decoders={images[0]: tfds.decode.SkipDecoding()})
    except (NotImplementedError, ImportError):
        raise UserError(f"{name} is not prepared as ArrayRecord; {_how(name)}") from None
    return Prepared(f"{name}/{split}", records, images[0], list(classes))


def _builder(tfds, name: str):
    try:
        if os.path.isdir(name):
            return tfds.builder_from_directory(name)
        builder = tfds.builder(name, file_format="array_record")
    except Exception as error:  # of many kinds, by what is missing
        text = " ".join(str(error).split())[:200]
        raise UserError(f"TFDS has no set {name!r} that can be read here: {text}") from None
    if not builder.is_prepared():
        raise UserError(f"{name} is not prepared in {builder.data_dir}; {_how(name)}")
    return builder


def _how(name: str) -> str:
    if os.path.isdir(name):
        name = os.path.basename(os.path.dirname(os.path.normpath(name)))
    return f"where TensorFlow is installed: tfds build {name} --file_format=array_record"
