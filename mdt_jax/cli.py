"""What the commands share: one clear line and exit code 2 for a user's mistake, configs."""

import argparse
import os
import sys
from collections.abc import Callable

from absl import flags
from ml_collections import ConfigDict, config_flags

from mdt_jax.errors import UserError


def run(main: Callable[[list[str]], None]) -> None:
    """Call main(argv); a UserError prints as one line and exits with code 2."""
    try:
        main(sys.argv)
    except UserError as error:
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors, and that takes no abbreviations."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UserError(message)


def parse_config(
    argv: list[str], usage: str, **strings: str
) -> tuple[ConfigDict, flags.FlagValues]:
    """Read `--config=FILE.py[:variant]`, `--config.field=value` and string flags.

    strings: name → help of the further flags, all required. Raises UserError for an unknown file,
    field or flag and for a value of the wrong type.
    """
    if "--help" in argv or "-h" in argv:
        print(usage)
        sys.exit(0)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    for name, help_text in strings.items():
        flags.DEFINE_string(name, None, help_text, flag_values=values)
    _check_file(argv)
    try:
        stray = values(argv)[1:]
    except flags.Error as error:
        raise UserError(str(error)) from None
    except (AttributeError, KeyError) as error:
        raise UserError(_unknown_field(argv, error)) from None
    except Exception as error:  # whatever the user's own Python file raises
        raise UserError(f"the config could not be read: {type(error).__name__}: {error}") from None
    if stray:
        raise UserError(f"unexpected argument {stray[0]!r}; fields are set as --config.field=value")
    for name in ("config", *strings):
        if values[name].value is None:
            raise UserError(f"--{name} is missing; {usage.splitlines()[0]}")
    return values["config"].value, values


def _check_file(argv: list[str]) -> None:
    for flag, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = flag.lstrip("-").partition("=")
        if flag.startswith("-") and name == "config":
            path = (value if equals else following).partition(":")[0]
            if not os.path.isfile(path):
                raise UserError(f"config file {path} does not exist")


def _unknown_field(argv: list[str], error: Exception) -> str:
    """ConfigDict's error names one part of the field only; name the whole flag."""
    text = str(error).replace("\\n", " ").replace("\\", "").strip("'\" ")
    wrong = text.partition(" ")[0].strip("'\"")
    given = [a for a in argv if a.startswith("--config.") and wrong in a.partition("=")[0]]
    hint = text[text.find("Did you mean") :] if "Did you mean" in text else ""
    return f"unknown config field {given[0] if given else wrong}. {hint}".strip()
