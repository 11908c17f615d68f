"""What class a label means: the run's own names, numbers, ImageNet's names; two sets compared."""

import re

import pytest

from mdt_jax.data.classes import correspond, imagenet_among, imagenet_label, imagenet_names
from mdt_jax.data.classes import parse_label as parse
from mdt_jax.runtime.errors import UserError

COUNTED = ["1", "2", "3"]
PADDED = ["01", "02", "03"]
DIGITS = [*"0123456789"]
WORDS = ["Great_Dane", "cat", "great dane"]
SPECIES = [f"sp{n:04}" for n in range(1000)]
FEW = ["n01440764", "n01443537", "n02012849", "n02099601"]  # tench, goldfish, crane, retriever


@pytest.mark.parametrize(
    ("text", "names", "label"),
    [
        ("3", COUNTED, 2),
        ("0", COUNTED, 0),
        ("03", COUNTED, 2),
        ("name:1", COUNTED, 0),
        ("number:1", COUNTED, 1),
        ("name: 2", COUNTED, 1),
        ("01", PADDED, 0),
        ("03", PADDED, 2),
        ("3", PADDED, 2),
        ("number:1", PADDED, 1),
        ("number:01", PADDED, 1),
        ("name:1", PADDED, 0),
        *((text, DIGITS, 1) for text in ("1", "01", "+1", "1.0", "1.", "name:1", "number:1")),
        ("cat", WORDS, 1),
        ("CAT", WORDS, 1),
        ("great dane", WORDS, 2),
        ("2", WORDS, 2),
        ("name:x", ["name:x", "x"], 0),
        ("number:1", ["number:1", "x"], 0),
        ("sp0001", SPECIES, 1),
        ("1", SPECIES, 1),
        ("goldfish", FEW, 1),
        ("Golden_Retriever", FEW, 3),
        ("crane", FEW, 2),  # of the two that ImageNet has, the run has one
        ("n02099601", FEW, 3),
        ("3", FEW, 3),
    ],
)
def test_what_a_label_means(text, names, label):
    assert parse(text, len(names), names, "--labels") == label


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        (
            "1", COUNTED, "--label: '1' may be class 0 by its name '1' or class 1 by its number, "
            "which is named '2'; give name:1 or number:1",
        ),
        ("1.0", COUNTED, "class 0 by its name '1' or class 1 by its number"),
        ("1", PADDED, "give name:01 or number:1"),
        ("GREAT DANE", WORDS, "give name:Great_Dane or name:great dane"),
        ("4", COUNTED, "--label: label 4 is outside the classes 0 to 2"),
        ("-1", DIGITS, "label -1 is outside"),
        ("+10", DIGITS, "label +10 is outside"),
        ("number:3", COUNTED, "label 3 is outside"),
        ("name:4", COUNTED, "'4' is no class number"),
        ("number:cat", WORDS, "'cat' is no class number"),
        *((text, DIGITS, "is no class number (e.g. 3)")
          for text in ("1.5", "1_0", "１", "0x1", "nan", "1e0", "", "9" * 5000)),
        ("cta", WORDS, "nor a class of the run (e.g. cat)"),
        ("goldfish", SPECIES, "'goldfish' is no class number"),
        ("n01443537", SPECIES, "'n01443537' is no class number"),
        ("otter", FEW, "--label: label 'otter' is no ImageNet class"),
    ],
)  # fmt: skip
def test_labels_that_mean_nothing_or_several_classes(text, names, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse(text, len(names), names, "--label")


def test_imagenets_names_are_for_imagenets_classes():
    assert len(imagenet_names()) == 1000
    for text in ("goldfish", "Goldfish", "n01443537", "1", "Carassius_auratus"):
        assert parse(text, 1000, [], "--labels") == 1
    assert imagenet_label("toilet tissue") == imagenet_label("n15075141") == 999
    assert imagenet_among(1000, SPECIES) is None and imagenet_among(999, []) is None
    assert imagenet_among(4, FEW) == [0, 1, 134, 207]
    assert imagenet_among(2, ["n01440764", "cat"]) is None
    hub = [", ".join(names) for names in imagenet_names()]
    assert hub[0] == "tench, Tinca tinca" and imagenet_among(1000, hub) is None
    hub[517] = "crane2"
    assert imagenet_among(1000, hub) == range(1000) and parse("goldfish", 1000, hub, "x") == 1
    assert parse("crane", 1000, hub, "x") == 134
    with pytest.raises(UserError, match="'crane' names several classes: 134 .* 517"):
        parse("crane", 1000, [], "--labels")
    with pytest.raises(UserError, match="'goldfish' is no class number"):
        parse("goldfish", 999, [], "--labels")


@pytest.mark.parametrize(
    ("numbers", "names", "others", "their", "expected"),
    [
        ({0, 1}, ["dog", "horse"], {0, 1, 2}, ["cat", "dog", "horse"], {0: 1, 1: 2}),
        ({0, 1}, ["cat", "cow"], {0}, ["cat"], {0: 0}),
        ({3, 5}, [], {3, 5, 7}, [], {3: 3, 5: 5}),
        ({0, 2}, [], {0, 1, 2}, ["cat", "dog", "horse"], {0: 0, 2: 2}),
        ({0, 2}, ["cat", "dog", "horse"], {0, 1, 2}, [], {0: 0, 2: 2}),
        ({0, 1}, [], {0, 1, 2}, COUNTED, {0: 0, 1: 1}),
        ({1, 2}, [], {0, 1, 2}, COUNTED, {1: 1, 2: 2}),  # places, as sample numbers them
        ({1, 3}, [], {0, 1, 2}, COUNTED, {1: 0, 3: 2}),
        ({5, 7}, [], {0, 1}, ["5", "7"], {5: 0, 7: 1}),
        ({0, 1}, [], {0, 1}, ["5", "7"], {0: 0, 1: 1}),
        ({0, 9}, [], {0, 1}, ["cat", "dog"], {0: 0}),
    ],
)
def test_the_same_classes_of_two_sets(numbers, names, others, their, expected):
    assert correspond(numbers, names, others, their) == expected


def test_numbers_that_may_be_names_or_places():
    with pytest.raises(UserError, match="label 2 may be class 2 by its number .'5'. or class 1"):
        correspond({0, 2}, [], {0, 1, 2}, ["0", "2", "5"])
