"""Compilations are cached between tests, and between the processes they start."""

import contextlib
import functools
import importlib.metadata
import io
import os
import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Optimisations are left out, so that a training step compiles in half the time; tests that hold
# numbers to the published ones ask for them with FULL_COMPILE.
XLA_FLAGS = "--xla_backend_optimization_level=0"
FULL_COMPILE = {"xla_backend_optimization_level": 3}
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know the flag
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
    FULL_COMPILE["xla_cpu_use_fusion_emitters"] = True
os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)  # a child process may bring its own
os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_COMPILATION_CACHE_DIR=str(ROOT / ".jax_cache"),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.5",
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="0",
    GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",  # gcsfs reads it when it is imported
)
# Tests in the background ignore Ctrl-C, and so would the processes that they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Tests in these folders are marked with the folder's name, and `make test` leaves them out.
GROUPS = ("processes", "docs", "benches", "combinations")
# The files that take longest, in this order; files that start late must be short.
SLOW_FIRST = (
    "test_evaluate.py", "train/test_step.py", "sampling/test_generation.py", "test_inpaint.py",
    "data/test_sources.py", "train/test_evaluation_in_training.py", "test_main.py",
    "test_convert.py", "train/test_objective.py", "test_commands.py", "models/test_mdt.py",
    "processes/test_distributed.py", "docs/test_pages.py", "processes/test_pod.py",
    "benches/test_benchmarks.py", "benches/test_convergence.py",
    "combinations/test_switches.py", "processes/test_devices.py", "processes/test_main.py",
    "processes/test_evaluate.py", "processes/test_sample.py", "docs/test_notebooks.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> str:
        return item.path.relative_to(ROOT / "tests").as_posix()

    for item in items:
        folder = place(item).partition("/")[0]
        if folder in GROUPS:
            item.add_marker(folder)
    order = {name: number for number, name in enumerate(SLOW_FIRST)}
    items.sort(key=lambda item: order.get(place(item), len(order)))


STEPS = {}  # training steps that the tests have compiled
NOT_IN_THE_STEP = {
    "train": ("steps", "log_every", "sample_every", "checkpoint_every", "keep", "max_skipped"),
    "data": ("path", "split", "workers", "max_damaged"),
    "optim": ("lr",),
}


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_file():
    """Forgotten after it: Linux lets a process map 65,530 pieces of memory, of which each compiled
    program takes dozens, and XLA crashes where it gets no more."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@functools.cache
def counted_once():
    """costs.pass_macs, which traces the network anew each time, once for equal arguments."""
    from mdt_jax.train import costs

    return functools.cache(costs.pass_macs)


def compiled_once(compile_step):
    """compile_step, which traces and lowers anew each time, once for equal arguments."""

    def remembered(config, model, optimizer, state, mesh, *options):
        told = config.to_dict()
        for group in ("sample", "evaluation", "init"):
            del told[group]
        for group, fields in NOT_IN_THE_STEP.items():
            if told["optim"]["schedule"] != "constant":  # which falls over the run's steps
                fields = [name for name in fields if name not in ("lr", "steps")]
            told[group] = {n: v for n, v in told[group].items() if n not in fields}
        key = repr(told), model, mesh, options
        if key not in STEPS:
            STEPS[key] = compile_step(config, model, optimizer, state, mesh, *options)
        return STEPS[key]

    return remembered


SMOKE = [
    "--config=configs/digits.py:smoke",
    "--config.train.steps=4",
    "--config.train.sample_every=2",
    "--config.train.checkpoint_every=2",
]


def start_command(*arguments: str, cwd=ROOT, **environment: str) -> subprocess.Popen:
    """Start `python -m …` from the root of the project in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_command(*arguments: str, expect: int = 0, **environment: str) -> str:
    """Run it to its end; returns what it printed, stdout and stderr together."""
    process = start_command(*arguments, **environment)
    out, err = process.communicate(timeout=300)
    assert process.returncode == expect, f"exit code {process.returncode}\n{out}\n{err}"
    return out + err


def run_here(command, *arguments: str, expect: int = 0, cwd=ROOT) -> str:
    """An entry point's main(argv) in this process, which is quicker; returns what it printed.

    Equal training steps are traced and compiled once.
    """
    from mdt_jax import cli
    from mdt_jax.runtime import interrupts
    from mdt_jax.train import costs, loop

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    printed, code = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(loop, "compile_step", compiled_once(loop.compile_step))
        patch.setattr(costs, "pass_macs", counted_once())
        patch.setattr(interrupts, "end_in", lambda seconds, code: None)
        patch.setattr("sys.argv", ["command", *arguments])
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                cli.run(command)
            except SystemExit as exit_:
                code = exit_.code
    for number, handler in before.items():
        signal.signal(number, handler)
    assert code == expect, f"exit code {code}\n{printed.getvalue()}"
    return printed.getvalue()


def train_here(*arguments: str, expect: int = 0) -> str:
    """`python -m mdt_jax.main …` in this process."""
    from mdt_jax import main

    return run_here(main.main, *arguments, expect=expect)


def exits_with_one_line(command, argv, capsys, monkeypatch) -> str:
    """Call an entry point's main, which must fail on a mistake; returns the line it prints."""
    from mdt_jax import cli

    monkeypatch.setattr("sys.argv", ["command", *argv])
    with pytest.raises(SystemExit) as exit_:
        cli.run(command)
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    assert printed.out == "" and "Traceback" not in printed.err
    return printed.err


@pytest.fixture
def in_root(monkeypatch):
    """Run the test from the root of the project, as the README says."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def keep_signals():
    """Put back what a training run in this process does to SIGTERM and SIGINT."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> pathlib.Path:
    """The workdir of a finished smoke run."""
    workdir = tmp_path_factory.mktemp("runs") / "smoke"
    train_here(*SMOKE, f"--workdir={workdir}")
    return workdir


@pytest.fixture(scope="session")
def gcs_process():
    """A server that speaks the protocol of Google Cloud Storage, in a process of its own."""
    pytest.importorskip("gcp_storage_emulator")
    pytest.importorskip("gcsfs")
    from tests import bucket_servers

    with bucket_servers.serve_gcs() as server:
        yield server


@pytest.fixture
def gcs(gcs_process, monkeypatch):
    """That server with an empty bucket and no faults; all clients here and in children use it."""
    gcs_process.make_bucket()
    for name, value in gcs_process.environment.items():
        monkeypatch.setenv(name, value)
    yield gcs_process
    gcs_process.set_faults()


@pytest.fixture(scope="session")
def s3_server():
    """A server that speaks S3's protocol, in this process."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    from tests import bucket_servers

    with bucket_servers.serve_s3() as server:
        yield server


@pytest.fixture
def s3(s3_server, monkeypatch):
    """That server with an empty bucket; all clients here and in children use it."""
    s3_server.make_bucket()
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server
