"""What the commands share: one clear line and exit code 2 for a user's mistake, configs."""

import argparse
import io
import math
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable

from absl import flags
from ml_collections import ConfigDict, config_flags

from mdt_jax import config as configs
from mdt_jax.models.autoencoder import VAE_SCALE
from mdt_jax.runtime import backend, cluster, files, hosts, hub, interrupts, limits, progress
from mdt_jax.runtime.backend import PRECISIONS
from mdt_jax.runtime.errors import UserError, exceeded_limit

LONGEST = 1000  # characters of an error


def run(main: Callable[[list[str]], None]) -> None:
    """Call main(argv); a mistake of the user's or of the file system is one line, exit code 2, and
    so is a limit of the machine: too many open files, no more memory.

    So is Ctrl-C where main leaves it to Python, with the code that shells have for it; the second
    one ends the process at once. Where a run has several processes, the others hear why this one
    left.
    """
    backend.keep_compilations()
    _print_anywhere()
    with interrupts.answered():
        _run(main)


def _run(main: Callable[[list[str]], None]) -> None:
    try:
        main(sys.argv)
        cluster.shutdown()
        _exit_if_lost()
    except KeyboardInterrupt:
        progress.log("stopped")
        _exit(128 + signal.SIGINT, "Ctrl-C")
    except SystemExit as exit_:
        if not exit_.code and not hosts.several():
            _exit_if_lost()
        _exit(exit_.code or 0, "it was told to")
    except Exception as error:
        if line := one_line(error):
            who = f"{hosts.name()}: " if hosts.several() else ""
            progress.log(f"error: {who}{line}")
            _exit(2, line)
        if hosts.several():
            hosts.await_verdict(error)
            traceback.print_exc()
            _exit(1, f"{type(error).__name__}: {error}")
        raise


def one_line(error: Exception) -> str:
    """What is wrong, in a line that a terminal shows as it is, for errors that a user can do
    something about; "" for others.

    Names and values of damaged files may hold anything: control characters are written as escapes,
    and of what is longer than LONGEST the middle is left out.
    """
    met = exceeded_limit(error)
    if met:  # libraries then print tracebacks of what they could not even begin
        sys.unraisablehook = lambda _: None
        warnings.simplefilter("ignore")
    if isinstance(error, (UserError, OSError)):
        said = f"{error}{f' ({met})' if met else ''}"
    elif met:
        said = f"{met} ({files.reason(error)})"
    else:
        return ""
    words = " ".join(said.split())
    text = progress.escape(words)
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}"


def _exit_if_lost() -> None:
    """At a good end, which a pipe that nobody reads any more is for Unix tools, too: by SIGPIPE."""
    error = progress.stdout_error()
    if isinstance(error, BrokenPipeError):
        sys.exit(128 + signal.SIGPIPE)
    if error is not None:
        progress.log(
            f"error: stdout could not be written: {files.reason(error)}; what goes to files is done"
        )
        sys.exit(2)


def _print_anywhere() -> None:
    """Characters that a terminal's encoding lacks are printed as escapes, not raised as errors."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _exit(code: str | int, reason: str) -> None:
    if hosts.several():
        cluster.leave_at_once(code if isinstance(code, int) else 1, reason)
    sys.exit(code)


# Flags of `cluster.start`: name → (default, help).
PROCESSES = {
    "distributed": ("auto", "off, HOST:PORT of process 0, or auto: what the scheduler says"),
    "num_processes": (0, "with HOST:PORT: how many processes there are"),
    "process_id": (-1, "with HOST:PORT: which this is, from 0"),
    "start_timeout": (300, "seconds in which all processes must have come together"),
    "patience": (60, "seconds after which a process that does not answer is given up"),
}


DTYPES = ("float32", "bfloat16")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors, and that takes no abbreviations."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UserError(message)


def local(text: str) -> str:
    """A path on this machine."""
    return _path(text, files.local)


def on_disk(text: str) -> str:
    """A path on this machine, or hf://…"""
    return _path(text, hub.on_disk)


def _path(text: str, understood: Callable[[str], str]) -> str:
    try:
        return understood(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def channels(text: str) -> int:
    """A number of channels, or "all"."""
    if text != "all" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of channels, nor all")
    return 0 if text == "all" else int(text)


def scales(text: str) -> list[float]:
    """A number, or several with commas between."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, nor several as 1,2,4") from None


def yes_or_no(text: str) -> bool:
    """true or false."""
    known = {"true": True, "false": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return known[text.lower()]


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise UserError for flags that were given and are not positive and finite."""
    for name in names:
        value = getattr(args, name)
        if value is None:
            continue
        if not 0 < value < math.inf:
            raise UserError(f"--{name}={value} must be positive, and finite")
        limits.check_number(f"--{name}", value)


def add_sampling_flags(parser: Parser) -> None:
    """What says which network draws, and how."""
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        type=on_disk,
        help="a workdir or a step of it, .pt, .safetensors, hf://…",
    )
    add("--seed", type=int, default=0, help="sample n depends on the seed, n and its label alone")
    add("--batch_size", type=int, default=100, help="changes the speed, not the samples")
    add("--dtype", choices=DTYPES, help="of matmuls and activations (default: the run's own)")
    add("--precision", choices=PRECISIONS, help="of float32 matmuls (default: the run's own)")
    add(
        "--vae",
        type=on_disk,
        help="a file, a folder or hf://OWNER/REPOSITORY; default: the run's own",
    )
    add("--vae_scale", type=float, help=f"of a file's latents (default: the VAE's, or {VAE_SCALE})")
    add("--decoder_layers", type=int, help="of an MDT v1 file, which does not tell (default: 2)")
    group = parser.add_argument_group("overriding the checkpoint's own settings")
    add = group.add_argument
    add("--sampler", help="ddpm, ddim, dpmpp_2m, dpmpp_2m_sde or heun")
    add("--num_steps", type=int, help="of the schedule's steps, how many are taken")
    add("--spacing", help="even (in t), stride, karras or log_snr")
    add("--eta", type=float, help="ddim's, from 0 (deterministic) to 1")
    add("--guidance_scale", type=scales, help="or several, 1,2,4: samples take them in turn")
    add("--guidance_power", type=float, help="0: constant weight")
    add("--guidance", help="power_cosine, power_cosine_printed or constant")
    add("--guidance_channels", type=channels, help="the first N channels, or all")
    add("--guidance_low", type=float, help="guidance acts from this share of the timesteps …")
    add("--guidance_high", type=float, help="… to this one; 0 is the clean end")
    add("--guidance_skip_tolerance", type=float, help="weights so near to 1 are taken as 1")
    add(
        "--clip_denoised",
        nargs="?",
        const=True,
        type=yes_or_no,
        metavar="true|false",
        help="the predicted clean sample is clipped to [-1, 1] at each step (default: the run's "
        "own; true for pixels and false for latents where it does not say)",
    )


def parse_config(
    argv: list[str],
    usage: str,
    optional: dict[str, tuple[bool | int | str, str]] | None = None,
    **strings: str,
) -> tuple[ConfigDict, flags.FlagValues]:
    """Read `--config=FILE.py[:variant]`, `--config.field=value` and further flags.

    strings: name → help of those that are required. optional: name → (default, help) of others.
    In paths ~ is the home folder. Raises UserError for an unknown file, field or flag, for a value
    of the wrong type, for a URL where a path is meant, and for a file that gives no config.
    """
    if "--help" in argv or "-h" in argv:
        progress.print_result(usage)
        sys.exit(0)
    path, argv = _config_path(argv)
    values = flags.FlagValues()
    for name, help_text in strings.items():
        flags.DEFINE_string(name, None, help_text, flag_values=values)
    for name, (default, help_text) in (optional or {}).items():
        define = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, str: flags.DEFINE_string}
        define[type(default)](name, default, help_text, flag_values=values)
    try:
        config_flags.DEFINE_config_file("config", flag_values=values)
        stray = values(argv)[1:]
    except Exception as error:  # whatever the user's own Python file raises, too
        raise UserError(_what_is_wrong(argv, path, error)) from None
    if stray:
        raise UserError(f"unexpected argument {stray[0]!r}; fields are set as --config.field=value")
    for name in strings:
        if not values[name].value:
            raise UserError(f"--{name} is missing; {usage.splitlines()[0]}")
    config = values["config"].value
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config() must return a ConfigDict, not {config!r}")
    configs.expand_paths(config)
    return config, values


def said(values: flags.FlagValues) -> frozenset[str]:
    """The config's fields that flags have set, such as sample.guidance_scale."""
    return frozenset(config_flags.get_override_values(values["config"]))


def _config_path(argv: list[str]) -> tuple[str, list[str]]:
    """The path in --config=PATH[:variant] or --config PATH, and argv with that path written out.

    Raises UserError where there is none.
    """
    for number, flag in enumerate(argv):
        name, equals, value = flag.lstrip("-").partition("=")
        if flag.startswith("-") and name == "config":
            value = files.local(value if equals else "".join(argv[number + 1 : number + 2]))
            path = value.partition(":")[0]
            if not os.path.isfile(path):
                wrong = "is a folder" if os.path.isdir(path) else "does not exist"
                raise UserError(f"config file '{path}' {wrong}")
            rest = argv[number + (1 if equals else 2) :]
            return path, [*argv[:number], f"--config={value}", *rest]
    raise UserError("--config is missing, such as --config=configs/digits.py")


def _what_is_wrong(argv: list[str], path: str, error: Exception) -> str:
    """One line about an error that arose in reading the flags or the config's file."""
    # ml_collections puts the traceback of the user's file into its message.
    text = str(error).strip().splitlines()[-1] if "Traceback" in str(error) else str(error)
    if isinstance(error, flags.Error):
        return f"{path}: {text}" if "Traceback" in str(error) else text
    if isinstance(error, (AttributeError, KeyError)):
        words = re.findall(r"\w+", text)  # ConfigDict's text begins with one part of the field
        for flag in argv:
            if flag.startswith("--config.") and words[0] in flag.partition("=")[0].split("."):
                hint = re.search(r"Did you mean[^?]*\?", text.replace("\\n", " "))
                return f"unknown config field {flag} {hint[0] if hint else ''}".strip()
        if "get_config" in words:
            return f"{path} defines no get_config()"
    return f"{path} could not be read: {type(error).__name__}: {text}"
