"""The labels of samples: as text, from a file, balanced or random."""

import hashlib
from collections.abc import Sequence

import numpy as np

from mdt_jax.data.classes import parse_label, says_which
from mdt_jax.diffusion.options import balanced_labels, check_labels, random_labels
from mdt_jax.runtime.errors import UserError
from mdt_jax.runtime.files import check_regular, fetched, reason


def parse_labels(
    text: str | None,
    num_samples: int | None,
    num_classes: int,
    classes: Sequence[str] = (),
    seed: int = 0,
) -> np.ndarray:
    """The labels that --labels and --num_samples describe: [N] int32.

    text: classes separated by commas, taken in turn; a .txt or .npy file; "random"; "balanced" or
    None, all classes in turn. classes: the run's class names. Raises UserError, also for a name
    that is one of these words or looks like a file.
    """
    count = 100 if num_samples is None else num_samples
    is_file = text is not None and text.endswith((".txt", ".npy")) and not says_which(text)
    if text in classes and (is_file or text in ("balanced", "random")):
        raise UserError(
            f"--labels={text} is ambiguous: a class of the run, and a source of labels; "
            f"--labels=name:{text} is the class"
        )
    if text is None or (text == "balanced" and num_classes):
        return balanced_labels(count, num_classes)
    if not num_classes:
        raise UserError("--labels was given, but the model is unconditional")
    if text == "random":
        return random_labels(count, num_classes, seed)
    if is_file:
        labels = read_labels(text, num_classes, classes)
    else:
        names = [text] if text in classes else text.split(",")
        labels = [
            parse_label(name.strip(), num_classes, classes, f"--labels={text}") for name in names
        ]
    check_labels(labels, num_classes)
    if is_file and num_samples not in (None, len(labels)):
        raise UserError(
            f"--labels={text} has {len(labels)} labels, but --num_samples={num_samples}: they must "
            "be equal; or leave --num_samples out"
        )
    return np.resize(np.asarray(labels, np.int32), num_samples or len(labels))


def read_labels(path: str, num_classes: int, classes: Sequence[str]) -> list[int]:
    """The labels in a .npy of integers [N], or in a .txt with a class number or name per line.

    Raises UserError.
    """
    try:
        check_regular(path)
        file = fetched(path)
        if path.endswith(".npy"):
            # Mapped, so that a damaged header cannot ask for more memory than the file has.
            labels = np.load(file, mmap_mode="r")
            if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu":
                raise UserError(f"--labels={path} is no array of whole numbers")
            if labels.ndim != 1 or not len(labels):
                raise UserError(f"--labels={path} has the shape {labels.shape}; it must be [N]")
            return labels.tolist()
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UserError:
        raise
    except Exception as error:  # damaged files raise errors of many types
        raise UserError(f"--labels={path} could not be read: {reason(error)}") from None
    labels = [
        parse_label(line.strip(), num_classes, classes, f"--labels={path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not labels:
        raise UserError(f"--labels={path} holds no labels")
    return labels


def describe_labels(labels: np.ndarray, text: str | None) -> dict:
    """What the note of samples says about their labels; text: as --labels gave them."""
    return {
        "labels": text or "balanced",
        "labels_sha256": hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest(),
        "num_samples": len(labels),
    }
