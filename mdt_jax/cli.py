"""What the commands share: one clear line and exit code 2 for a user's mistake, and flags."""

import argparse
import dataclasses
import difflib
import io
import math
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import absl.logging  # noqa: F401 (defines absl's own flags)
import jax
from absl import flags
from ml_collections import ConfigDict

from mdt_jax import config as configs
from mdt_jax.config.fields import FIELDS
from mdt_jax.diffusion.options import OWN_GUIDES, SampleOptions
from mdt_jax.models.autoencoder import VAE_SCALE
from mdt_jax.runtime import (
    backend,
    buckets,
    cluster,
    files,
    hosts,
    hub,
    interrupts,
    limits,
    progress,
)
from mdt_jax.runtime.bounds import Bound
from mdt_jax.runtime.errors import UserError, exceeded_limit

LONGEST = 1000  # characters of an error


def run(main: Callable[[list[str]], None]) -> None:
    """Call main(argv), and print the errors that a user can do something about as one line.

    Exit codes: 2 for a UserError, for an OSError and for a limit of the machine (open files,
    memory); 130 for Ctrl-C. A second Ctrl-C ends the process at once. Before it leaves, one of
    several processes tells the others why.
    """
    backend.keep_compilations()
    _print_anywhere()
    with interrupts.answered():
        _run(main)


def _run(main: Callable[[list[str]], None]) -> None:
    try:
        main(sys.argv)
        cluster.shutdown()
        _exit_if_stdout_failed()
    except KeyboardInterrupt:
        progress.log("stopped")
        _exit(128 + signal.SIGINT, "Ctrl-C")
    except SystemExit as exit_:
        if not exit_.code and not hosts.several():
            _exit_if_stdout_failed()
        _exit(exit_.code or 0, "it exited")
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
    limit = exceeded_limit(error)
    if limit:  # libraries then print tracebacks of what they could not even begin
        sys.unraisablehook = lambda _: None
        warnings.simplefilter("ignore")
    if isinstance(error, UserError):
        message = f"{error}{f' ({limit})' if limit else ''}"
    elif (problem := buckets.problem(error)) and not limit:
        message = problem
    elif isinstance(error, OSError):
        message = f"{error}{f' ({limit})' if limit else ''}"
    elif limit:
        message = f"{limit} ({files.reason(error)})"
    else:
        return ""
    words = " ".join(message.split())
    text = progress.escape(words)
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}"


def _exit_if_stdout_failed() -> None:
    """Exit where stdout could not be written: as after SIGPIPE for a closed pipe, else with 2."""
    error = progress.stdout_error()
    if isinstance(error, BrokenPipeError):
        sys.exit(128 + signal.SIGPIPE)
    if error is not None:
        progress.log(
            f"error: stdout could not be written: {files.reason(error)}; all files are written"
        )
        sys.exit(2)


def _print_anywhere() -> None:
    """Print characters that the encoding of a terminal lacks as escapes, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _exit(code: str | int, reason: str) -> None:
    if hosts.several():
        cluster.leave_at_once(code if isinstance(code, int) else 1, reason)
    sys.exit(code)


DTYPES = ("float32", "bfloat16")


def local(text: str) -> str:
    """A path on this machine."""
    return _path(text, files.local)


def anywhere(text: str) -> str:
    """A path on this machine or in a bucket."""
    return _path(text, files.anywhere)


def anywhere_or_hub(text: str) -> str:
    """A path on this machine or in a bucket, or hf://…"""
    return _path(text, hub.anywhere_or_hub)


def _path(text: str, expand: Callable[[str], str]) -> str:
    try:
        return expand(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    """A whole number above 0."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def positive(text: str) -> float:
    """A finite number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be positive and finite")
    return float(text)


def sides(text: str) -> tuple[int, int]:
    """(height, width) of 256, a square, or of 256x384."""
    height, _, width = text.partition("x")
    return count(height), count(width or height)


def channels(text: str) -> int:
    """A number of channels, or "all", which is 0."""
    if text != "all" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a number of channels or all, got {text!r}")
    return 0 if text == "all" else int(text)


def scales(text: str) -> list[float]:
    """A number, or several with commas between them."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        message = f"expected a number, or several: 1,2,4; got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def guide(text: str) -> str:
    """null, masked, or the checkpoint of a network."""
    if text == "network":
        raise argparse.ArgumentTypeError("say the checkpoint of the network: --guide=CHECKPOINT")
    return text if text in OWN_GUIDES else anywhere_or_hub(text)


def yes_or_no(text: str) -> bool:
    """true or false."""
    values = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return values[text.lower()]


# A flag that is given as --flag, --flag=true or --flag=false.
SWITCH: dict[str, Any] = {
    "nargs": "?", "const": True, "default": False, "type": yes_or_no, "metavar": "true|false",
}  # fmt: skip
# Sampling options whose flags take other values than a config's fields.
OPTION_FLAGS: dict[str, dict[str, Any]] = {
    "guidance_scale": {"type": scales, "metavar": "SCALE[,SCALE…]"},
    "guidance_channels": {"type": channels, "metavar": "N|all"},
    "guide": {"type": guide, "metavar": "null|masked|CHECKPOINT"},
    "clip_denoised": SWITCH,
}


# Flags of `cluster.start`: name → (default, help).
PROCESSES: dict[str, tuple[int | str, str]] = {
    "distributed": ("auto", "off, HOST:PORT of process 0, or auto: as the scheduler says"),
    "num_processes": (0, "with HOST:PORT: number of processes"),
    "process_id": (-1, "with HOST:PORT: number of this process, from 0"),
    "start_timeout": (300, "seconds within which all processes must start"),
    "patience": (60, "seconds after which a process that does not answer is given up"),
}


class Parser(argparse.ArgumentParser):
    """The flags of a command, the options of JAX (--jax_debug_nans=true) and absl's own flags
    (--verbosity=1).

    Mistakes raise UserError. Flags cannot be abbreviated; for an unknown one the error suggests
    the nearest.
    """

    def __init__(self, **kwargs):
        epilog = "Options of JAX and flags of absl work, too: --jax_debug_nans=true, --verbosity=1."
        super().__init__(allow_abbrev=False, epilog=epilog, **kwargs)
        for name, value in _jax_options().items():
            self.add_argument(
                f"--{name}", **_flag_of(type(value), argparse.SUPPRESS), help=argparse.SUPPRESS
            )

    def error(self, message: str):
        raise UserError(message)

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):
        """The values of the flags; JAX's options are set. Raises UserError."""
        given = self._take_absl_flags(sys.argv[1:] if args is None else list(args))
        self._check_known(given)
        values, rest = self.parse_known_args(given, namespace)
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}; flags are set as --flag=value")
        for name in _jax_options().keys() & vars(values).keys():
            _set_jax_option(name, vars(values).pop(name))
        for name, value in vars(values).items():
            if isinstance(value, (int, float)) and not name.startswith("config."):
                limits.check_number(f"--{name}", value)
        return values

    def _take_absl_flags(self, given: Sequence[str]) -> list[str]:
        """Set the flags that absl defines, like --verbosity=1; returns the other arguments."""
        ours, of_absl = [], []
        for argument in given:
            name = argument.partition("=")[0]
            is_absl = name.startswith("--") and name[2:].removeprefix("no") in flags.FLAGS
            (of_absl if is_absl and name not in self._option_string_actions else ours).append(
                argument
            )
        try:
            if of_absl:
                flags.FLAGS([self.prog, *of_absl])
        except flags.Error as error:
            raise UserError(str(error)) from None
        return ours

    def _check_known(self, given: Iterable[str]) -> None:
        known = [*self._option_string_actions, *(f"--{name}" for name in flags.FLAGS)]
        for argument in given:
            name = argument.partition("=")[0]
            if name.startswith("--") and name not in known:
                what = "config field" if name.startswith("--config.") else "flag"
                nearest = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {nearest[0]}?" if nearest else ""
                raise UserError(f"unknown {what} {name}{hint}")

    def add_config(self) -> None:
        """--config and a flag for each field of a config; see `read_config`."""
        text = "a recipe, FILE.py or FILE.py:VARIANT, or the config.json of a run"
        self.add_argument("--config", required=True, type=local, metavar="FILE", help=text)
        for group, fields in FIELDS.items():
            add = self.add_argument_group(f"config fields: {group}").add_argument
            for name, field in fields.items():
                add(
                    f"--config.{group}.{name}",
                    **_flag_of(field.kind, argparse.SUPPRESS),
                    help=_help(field.help, field.bound, f"default: {field.default_text}"),
                )

    def add_unrecorded(self) -> None:
        """What a published file of a network does not record."""
        add = self.add_argument
        add("--decoder_layers", type=int, help="of an MDT v1 file, which lacks them (default: 2)")
        add("--num_heads", type=int, help="of a DiT file, which lacks them (default: as released)")

    def add_sampling(self) -> None:
        """The checkpoint to sample from, and how to sample."""
        add = self.add_argument
        add(
            "--checkpoint",
            required=True,
            type=anywhere_or_hub,
            help="a run, a step of it, a file, hf://…",
        )
        add("--seed", type=int, default=0, help="sample n depends on it, n and its label alone")
        add("--batch_size", type=count, default=100, help="changes the speed, not the samples")
        add("--dtype", choices=DTYPES, help="of matmuls and activations (default: the run's)")
        add(
            "--vae",
            type=anywhere_or_hub,
            help="file, folder or hf://OWNER/REPOSITORY (default: the checkpoint's)",
        )
        add("--vae_scale", type=positive, help=f"of latents (default: the VAE's, or {VAE_SCALE})")
        self.add_unrecorded()
        add = self.add_argument_group(
            "sampling options (default: the run's); several guidance scales are used in turn"
        ).add_argument
        for option in dataclasses.fields(SampleOptions):
            if option.name != "diffusion_steps":  # the network was trained for them
                values = dict(OPTION_FLAGS.get(option.name) or _flag_of(option.type), default=None)
                text = _help(option.metadata["help"], option.metadata["bound"])
                add(f"--{option.name}", **values, help=text)

    def add_processes(self) -> None:
        """The flags of `cluster.start`."""
        add = self.add_argument_group("several processes").add_argument
        for name, (default, text) in PROCESSES.items():
            help_text = f"{text} (default: {default})"
            add(f"--{name}", type=type(default), default=default, help=help_text)


def _flag_of(kind: Any, default: Any = None) -> dict[str, Any]:
    """What `add_argument` needs for a flag of a type; other types than these are texts."""
    if kind is bool:
        return SWITCH | {"default": default}
    kind = kind if kind in (int, float) else str
    return {"type": kind, "default": default, "metavar": kind.__name__.upper()}


def _help(text: str, bound: Bound, default: str = "") -> str:
    notes = "; ".join(filter(None, (bound.words, default)))
    return f"{text} ({notes})" if notes else text


def _jax_options() -> dict[str, Any]:
    """The options of JAX with their values."""
    return {name: value for name, value in jax.config.values.items() if name.startswith("jax_")}


def _set_jax_option(name: str, value: Any) -> None:
    try:
        jax.config.update(name, value)
    except Exception as error:  # options check their values in several ways
        raise UserError(f"--{name}={value}: {files.reason(error)}") from None


def read_config(args: argparse.Namespace) -> tuple[ConfigDict, dict[str, Any]]:
    """The config that the flags describe, and the fields that flags set: {"optim.lr": 1e-3}.

    Raises UserError for a file that holds no config, and for a URL in a field that holds a path.
    """
    path, _, variant = args.config.partition(":")
    config = configs.load(path, variant)
    fields = {
        name.removeprefix("config."): value
        for name, value in vars(args).items()
        if name.startswith("config.")
    }
    configs.override(config, fields)
    configs.expand_paths(config)
    return config, fields


def start(args: argparse.Namespace, keep_memory: bool = False) -> None:
    """Start what a command computes with: the other processes of its run, and JAX's devices.

    keep_memory: for commands that run one program many times, `backend.keep_freed_memory`.
    """
    if keep_memory:
        backend.keep_freed_memory()
    if "distributed" in args:
        cluster.start(*(getattr(args, name) for name in PROCESSES))
    backend.start()
