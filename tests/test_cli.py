"""The flags of the commands."""

import dataclasses
import logging
import subprocess
import sys

import jax
import pytest

from mdt_jax import cli, convert, encode, evaluate, info, inpaint, main, sample
from mdt_jax.config.fields import flat_fields, markdown
from mdt_jax.diffusion.options import SampleOptions
from mdt_jax.runtime.errors import UserError
from tests.conftest import ROOT, SMOKE, exits_with_one_line, run_here

COMMANDS = (main, sample, inpaint, encode, evaluate, convert, info)


def parsed(*flags: str):
    parser = cli.Parser()
    parser.add_config()
    return cli.read_config(parser.parse_args([SMOKE[0], *flags]))


@pytest.fixture
def jax_options():
    """The options of JAX as attributes; set back afterwards."""
    before = dict(jax.config.values)
    yield jax.config
    for name, value in before.items():
        if jax.config.values[name] is not value:
            jax.config.update(name, value)


def test_fields_are_of_their_types(in_root):
    config, given = parsed(
        "--config.model.depth=4", "--config.optim.lr", "1", "--config.data.flip",
        "--config.model.relative_bias=False", "--config.data.workers", "-1", "--config.data.path=",
    )  # fmt: skip
    assert given == {
        "model.depth": 4, "optim.lr": 1.0, "data.flip": True, "model.relative_bias": False,
        "data.workers": -1, "data.path": "",
    }  # fmt: skip
    assert isinstance(given["optim.lr"], float) and isinstance(given["model.depth"], int)
    assert config.model.depth == 4 and config.data.flip is True


@pytest.mark.parametrize("module", [main, encode, info])
def test_help_lists_all_fields(module):
    text = " ".join(run_here(module.main, "--help").split())
    for name, field in flat_fields():
        assert f"--config.{name} " in text
        assert field.help.split()[0] in text and f"default: {field.default_text}" in text


@pytest.mark.parametrize("module", COMMANDS)
def test_all_commands_have_help(module):
    text = run_here(module.main, "--help")
    assert text.startswith("usage: python -m mdt_jax.") and "--jax_debug_nans" in text


@pytest.mark.parametrize("module", [sample, inpaint])
def test_flags_of_sampling_are_the_sample_options(module):
    text = run_here(module.main, "--help")
    for option in dataclasses.fields(SampleOptions):
        assert (f"--{option.name} " in text) == (option.name != "diffusion_steps"), option.name


@pytest.mark.parametrize("module", COMMANDS)
@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--chekpoint=x", "unknown flag --chekpoint"),
        ("--jax_debug_nan", "unknown flag --jax_debug_nan; did you mean --jax_debug_nans?"),
        ("--config.no.such", "unknown config field --config.no.such"),
    ],
)
def test_unknown_flags_are_refused(module, flag, line, capsys, monkeypatch):
    assert line in exits_with_one_line(module.main, [flag], capsys, monkeypatch)


def test_options_of_jax_are_flags(jax_options, in_root):
    assert not jax_options.jax_debug_nans and not jax_options.jax_log_compiles
    parsed("--jax_debug_nans", "--jax_numpy_rank_promotion=warn", "--jax_log_compiles", "true")
    assert jax_options.jax_debug_nans and jax_options.jax_log_compiles
    assert jax_options.jax_numpy_rank_promotion == "warn"
    _, given = parsed("--jax_debug_nans=false", "--config.optim.lr=1")
    assert not jax_options.jax_debug_nans and given == {"optim.lr": 1.0}


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--jax_debug_nans=perhaps", "expected true or false, got 'perhaps'"),
        ("--jax_numpy_rank_promotion=never", "--jax_numpy_rank_promotion=never: "),
        ("--jax_tracer_error_num_traceback_frames=x", "invalid int value: 'x'"),
    ],
)
def test_values_that_jax_refuses(flag, line, jax_options):
    with pytest.raises(UserError, match=line):
        parsed(flag)


def test_info_prints_the_page_of_fields():
    assert run_here(info.main, "--fields") == markdown() + "\n"


def test_flags_of_absl():
    """In a process of their own, since absl keeps what it has read."""
    code = (
        "import logging; from mdt_jax import cli; from mdt_jax.weights import orbax_folders\n"
        "parser = cli.Parser(prog='command'); parser.add_argument('--x', type=int)\n"
        "print(parser.parse_args(['--x=3', '--verbosity=1', '--nologtostderr']))\n"
        "orbax_folders.quiet(); print(logging.getLogger('absl').level)\n"
        "for flag in ('--verbosty=1', '--verbosity=x'):\n"
        "    try: parser.parse_args([flag])\n"
        "    except cli.UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == [
        "Namespace(x=3)",
        str(logging.DEBUG),
        "unknown flag --verbosty; did you mean --verbosity?",
        "flag --verbosity=x: invalid literal for int() with base 10: 'x'",
    ]
