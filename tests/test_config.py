"""Fields, recipes, stored configs and the rules of a valid config."""

import dataclasses
import json

import pytest

from mdt_jax import config as configs
from mdt_jax.config.fields import FIELDS, flat_fields, markdown
from mdt_jax.config.rules import RULES, WITHOUT_EFFECT, _derived, get
from mdt_jax.diffusion.options import NOT_IN_SAMPLE, SampleOptions
from mdt_jax.runtime import bounds
from mdt_jax.runtime.errors import UserError
from tests.conftest import ROOT, train_here

DIGITS = str(ROOT / "configs" / "digits.py")


def test_the_page_of_fields_is_up_to_date():
    """Write it anew with: python -m mdt_jax.info --fields > docs/config.md"""
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == markdown() + "\n"
    assert all(len(line) <= 100 for line in page.splitlines())
    for name, field in flat_fields():
        assert f"- `{name.partition('.')[2]}`: " in page and field.help[-5:] in page


def test_defaults_are_within_their_bounds():
    for name, field in flat_fields():
        bounds.check(name, field.default, field.kind, field.bound)
    configs.validate(configs.default())


def test_sample_options_are_the_fields_of_the_group_sample():
    options = {option.name for option in dataclasses.fields(SampleOptions)}
    assert set(FIELDS["sample"]) == options - set(NOT_IN_SAMPLE) | {"num_samples", "batch_size"}
    drawn = SampleOptions.from_config(configs.default())
    assert drawn == SampleOptions(clip_denoised=True)  # the default config is one of pixels
    assert all(option.metadata["help"] for option in dataclasses.fields(SampleOptions))


def test_messages_of_rules_name_fields_that_exist():
    values = _derived(configs.default())
    for message, holds in RULES.items():
        assert holds(values), message
        assert "{" not in message.format_map(vars(values))
    names = dict(flat_fields())
    for (switch, _), fields in WITHOUT_EFFECT.items():
        assert {switch, *fields} <= set(names)


@pytest.mark.parametrize(
    ("bound", "good", "bad"),
    [
        (bounds.at_least(1), (1, 2), (0, -1)),
        (bounds.above(0), (0.1,), (0, -0.1)),
        (bounds.between(0, 1), (0, 1), (-0.1, 1.1)),
        (bounds.half_open(0, 1), (0, 0.9), (-0.1, 1)),
        (bounds.one_of("ab"), ("a", "b"), ("c", "")),
    ],
)
def test_bounds(bound, good, bad):
    assert all(bound.holds(value) for value in good)
    for value in bad:
        kind = float if not isinstance(value, str) else str
        with pytest.raises(UserError, match=r"^group.field is .*; it must be "):
            bounds.check("group.field", value, kind, bound)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(True, int), (1.5, int), (1, bool), ("1", float), (None, str), (True, float)],
)
def test_other_types_are_refused(value, kind):
    with pytest.raises(UserError, match=f"x is {value!r}; it must be of type {kind.__name__}"):
        bounds.check("x", value, kind)


def test_a_stored_config_is_the_config_of_its_run(tmp_path):
    recipe = configs.load(DIGITS, "smoke")
    stored = tmp_path / "config.json"
    stored.write_text(json.dumps(recipe.to_dict()))
    assert configs.load(str(stored)).to_dict() == recipe.to_dict()


def test_a_stored_config_lacks_the_fields_that_came_later(tmp_path):
    groups = configs.default().to_dict()
    del groups["train"]["precision"], groups["evaluation"]
    groups["train"] |= {"remat": True, "seed": 7}
    (tmp_path / "config.json").write_text(json.dumps(groups))
    config = configs.load(str(tmp_path / "config.json"))
    assert (config.train.remat, config.train.precision, config.train.seed) == ("full", "highest", 7)
    assert config.evaluation.to_dict() == configs.default().evaluation.to_dict()
    configs.validate(config)


@pytest.mark.parametrize(
    ("text", "variant", "line"),
    [
        ("{}", "", "holds no config"),
        ('{"steps": 3}', "", "holds no config"),
        ('{"model": 3}', "", "holds no config"),
        ("[]", "", "expected a JSON object"),
        ("{", "", "cannot be read"),
        ('{"model": {}}', "smoke", "a stored config has no variants"),
        ('{"model": {"wings": 2}}', "", "unknown config field model.wings"),
        ('{"model": {}, "wings": {}}', "", "unknown group of config fields wings"),
        ('{"model": {"depth": "two"}}', "", "model.depth is 'two'; it must be of type int"),
    ],
)
def test_other_json_files_are_refused(text, variant, line, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        configs.load(str(path), variant)
    assert str(path) in str(refused.value) and line in str(refused.value)


def test_fields_of_another_number_type_are_set(tmp_path):
    """JSON has lost the .0 where a person has edited it."""
    path = tmp_path / "config.json"
    path.write_text('{"model": {}, "optim": {"lr": 1}}')
    config = configs.load(str(path))
    configs.override(config, {"optim.lr": 0.5, "model.version": "v2"})
    assert (get(config, "optim.lr"), config.model.version) == (0.5, "v2")


def test_a_recipe_may_begin_with_another(tmp_path):
    (tmp_path / "one.py").write_text((ROOT / "configs" / "digits.py").read_text())
    (tmp_path / "two.py").write_text(
        "from mdt_jax import config as configs\n"
        "def get_config(variant=''):\n"
        "    config = configs.base(__file__, 'one.py')\n"
        "    config.optim.lr = 0.5\n"
        "    return configs.variant(config, variant)\n"
    )
    small = configs.load(str(tmp_path / "two.py"), "smoke")
    assert small.optim.lr == 0.5 and small.train.steps == 2
    assert small.optim.ema_decay == configs.load(DIGITS).optim.ema_decay
    (tmp_path / "one.py").unlink()
    with pytest.raises(UserError, match="config file '.*one.py' does not exist"):
        configs.load(str(tmp_path / "two.py"))


def test_a_run_is_trained_again_from_its_stored_config(trained, tmp_path):
    """To the same metrics, and with other fields where flags set them."""
    stored = f"--config={trained}/config.json"
    train_here(stored, f"--workdir={tmp_path / 'again'}")
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (trained, tmp_path / "again")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    more = ["--config.train.steps=2", "--config.sample.num_samples", "0"]
    train_here(stored, f"--workdir={tmp_path / 'shorter'}", *more)
    config = json.loads((tmp_path / "shorter" / "config.json").read_text())
    assert (config["train"]["steps"], config["sample"]["num_samples"]) == (2, 0)
    expected = json.loads((trained / "config.json").read_text())
    expected["train"]["steps"], expected["sample"]["num_samples"] = 2, 0
    assert config == expected
