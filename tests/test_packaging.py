"""What pyproject.toml states, and what it rests on."""

import ast
import importlib.metadata
import json
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import mdt_jax
from mdt_jax import config as configs
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_one_version():
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    tree = ast.parse((ROOT / "mdt_jax" / "__init__.py").read_text())
    assigned = [n for n in tree.body if isinstance(n, ast.Assign) and "__version__" in ast.dump(n)]
    assert [ast.literal_eval(node.value) for node in assigned] == [mdt_jax.__version__]
    released = re.findall(r"^## (\d+\.\d+\.\d+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == mdt_jax.__version__


def test_the_oldest_versions_are_those_that_are_tested():
    pins = {}
    for line in (ROOT / "tests" / "constraints-oldest.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[name] = Version(version)
    bounds = {}
    for text in [*PROJECT["dependencies"], *EXTRAS["data"]]:
        requirement = Requirement(text)
        for bound in requirement.specifier:
            assert bound.operator == ">=", text
            bounds[requirement.name] = Version(bound.version)
    assert len(bounds) > 8 and set(bounds) <= set(pins)
    for name, bound in bounds.items():
        assert pins[name].release[: len(bound.release)] == bound.release, name


def test_pythons_are_stated():
    stated = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if ":: Python ::" in c]
    assert stated == ["3.11", "3.12", "3.13"] and PROJECT["requires-python"] == ">=3.11"


@pytest.mark.parametrize("extra", ["cuda", "cuda12", "cuda13", "tpu"])
def test_extras_for_devices_are_jaxs_own(extra):
    assert EXTRAS[extra] == [f"jax[{extra}]"]
    assert extra in importlib.metadata.metadata("jax").get_all("Provides-Extra")


def test_what_launches_the_recipes_installs_what_they_need():
    """Each ImageNet recipe takes its images from TFDS and its VAE from the hub, as safetensors."""
    config = configs.load(str(ROOT / "configs" / "xl2.py"))
    assert config.data.name == "tfds" and config.vae.path.startswith("hf://")
    assert {"huggingface_hub", "safetensors"} <= set(PROJECT["dependencies"])
    assert any(text.startswith("tensorflow-datasets") for text in EXTRAS["data"])
    launch = ROOT / "launch"
    told = [
        *re.findall(r"EXTRAS=([\w,]+)", (launch / "Dockerfile").read_text()),
        *re.findall(r"EXTRAS=([\w,]+)", (launch / "kubernetes" / "README.md").read_text()),
        *re.findall(r"'\.\[([\w,]+)\]'\"", (launch / "tpu" / "pod.sh").read_text()),
    ]
    assert len(told) == 5
    for extras in told:
        assert "data" in extras.split(","), extras


def test_pre_commit_runs_the_ruff_of_make_lint():
    rev = re.search(r"rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())[1]
    assert f"ruff=={rev}" in EXTRAS["test"]


def test_messages_name_extras_that_exist():
    named = set()
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("launch/**/*.md")]
    for path in [*ROOT.glob("mdt_jax/**/*.py"), *pages]:
        for extras in re.findall(r"""install -e ["']\.\[([\w,-]+)\]""", path.read_text()):
            named |= set(extras.split(","))
    assert {"cuda", "data", "k8s", "weights"} <= named <= set(EXTRAS)


def test_the_private_part_of_jax_is_where_we_expect_it():
    """JAX has no public way to its key-value store, by which processes agree and notice deaths."""
    from jax._src import distributed

    state = distributed.global_state
    for name in ("client", "coordinator_address", "num_processes", "process_id"):
        assert hasattr(state, name), f"jax._src.distributed.global_state has no {name} any more"
    from jax._src.lib import _jax

    for name in ("blocking_key_value_get_bytes", "key_value_set_bytes", "wait_at_barrier"):
        assert hasattr(_jax.DistributedRuntimeClient, name), f"JAX's client has no {name} any more"


def test_notebooks_name_the_repository_that_the_project_does():
    address = PROJECT["urls"]["Repository"]
    owner = address.removeprefix("https://github.com/")
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        badge, setup = ("".join(cell["source"]) for cell in cells[:2])
        assert f"/github/{owner}/blob/main/notebooks/{path.name})" in badge
        assert f'REPOSITORY = "{address}"\n' in setup
