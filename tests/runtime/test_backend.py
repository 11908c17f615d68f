import jax
import pytest

from mdt_jax import convert
from mdt_jax.runtime import backend
from tests.conftest import exits_with_one_line
from tests.runs import DIGITS


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose devices and programs are those in a folder, and whose JAX may choose."""
    kinds = tuple(
        (kind, str(tmp_path / devices.rpartition("/")[2]), program, extra)
        for kind, devices, program, extra in backend.KINDS
    )
    monkeypatch.setattr(backend, "KINDS", kinds)
    monkeypatch.setenv("PATH", str(tmp_path))
    before = jax.config.jax_platforms
    jax.default_backend()  # the tests' CPUs
    jax.config.update("jax_platforms", None)
    yield tmp_path
    jax.config.update("jax_platforms", before)


def test_nothing_is_said_of_a_machine_with_cpus_only(machine, capsys):
    backend.start()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "kind", "extra"),
    [
        ("nvidia0", "an NVIDIA GPU", "cuda"),
        ("nvidia-smi", "an NVIDIA GPU", "cuda"),
        ("accel0", "a TPU", "tpu"),
    ],
)
def test_a_device_that_jax_does_not_use_is_said_once(name, kind, extra, machine, capsys):
    (machine / name).touch(0o755)
    (machine / "nvidiactl").touch()  # the driver alone is no device
    backend.start()
    assert capsys.readouterr().err == (
        f"warning: this machine has {kind} ({machine / name}), but JAX finds only CPUs; to use "
        f"it: pip install -e '.[{extra}]'\n"
    )


def test_a_user_who_chose_the_cpu_hears_nothing(machine, capsys):
    (machine / "nvidia0").touch()
    jax.config.update("jax_platforms", "cpu")
    backend.start()
    assert capsys.readouterr().err == ""


def test_nothing_is_said_where_jax_uses_it(machine, capsys, monkeypatch):
    (machine / "nvidia0").touch()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    backend.start()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "chosen, named", [("cuda", "cuda, which JAX_PLATFORMS asks for"), (None, "its devices")]
)
def test_what_jax_cannot_start_is_one_line(chosen, named, machine, capsys, monkeypatch):
    def fail():
        raise RuntimeError(f"Unable to initialize backend {chosen!r}:\nno such plugin")

    jax.config.update("jax_platforms", chosen)
    monkeypatch.setattr(jax, "default_backend", fail)
    argv = [f"--src={DIGITS}", f"--dst={machine / 'a.pt'}"]
    line = exits_with_one_line(convert.main, argv, capsys, monkeypatch)
    assert f"JAX cannot start {named}: Unable to initialize" in line
    assert list(machine.iterdir()) == []
