"""The rules of import in docs/architecture.md."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "mdt_jax"
MODULES = sorted(p.relative_to(ROOT) for p in PACKAGE.rglob("*.py"))

COMMANDS = {"main", "sample", "inpaint", "encode", "evaluate", "convert", "info", "report"}
# A room imports from itself and from rooms on lower levels.
LEVELS = {
    "runtime": 0,
    "data": 1,
    "models": 1,
    "diffusion": 1,
    "config": 2,
    "weights": 3,
    "sampling": 4,
    "evaluation": 4,
    "train": 5,
    "cli": 6,
    **dict.fromkeys(COMMANDS, 6),
    "demo": 7,
}
NEVER = {("data", "jax"), ("models", "runtime")}
# What the core needs; everything else is imported where it is used.
CORE = {
    "absl", "einops", "etils", "flax", "jax", "mdt_jax", "ml_collections", "numpy", "optax",
    "orbax",
}  # fmt: skip


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: pathlib.Path, everywhere: bool) -> list[str]:
    tree = ast.parse((ROOT / path).read_text())
    found = []
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "mdt_jax":
                names = [alias.name for alias in node.names if alias.name != "__version__"]
                found += [f"mdt_jax.{name}" for name in names]
            else:
                found.append(node.module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_run_downward(path):
    here = room(".".join(path.with_suffix("").parts))
    if here == "__init__":
        return
    for name in imports(path, everywhere=True):
        top = name.split(".")[0]
        assert (here, top) not in NEVER, f"{path} imports {name}"
        if top == "mdt_jax":
            there = room(name)
            assert (here, there) not in NEVER, f"{path} imports {name}"
            shared = there == "cli" and here in COMMANDS
            assert there == here or shared or LEVELS[there] < LEVELS[here], f"{path}: {name}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_heavy_packages_are_imported_where_they_are_used(path):
    if path.stem in COMMANDS:
        return
    for name in imports(path, everywhere=False):
        top = name.split(".")[0]
        assert top in CORE or top in sys.stdlib_module_names, f"{path} imports {name} at the top"


def test_private_jax_is_in_one_module():
    ours = (
        path
        for folder in ("mdt_jax", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    )
    for path in sorted(path.relative_to(ROOT) for path in ours):
        private = [name for name in imports(path, everywhere=True) if name.startswith("jax._src")]
        assert not private or path.name in ("coordination.py", "aot.py", "test_packaging.py"), path


def test_keys_are_made_in_one_module():
    """Where the generator is named, so that JAX_DEFAULT_PRNG_IMPL changes no number."""
    for path in MODULES:
        text = (ROOT / path).read_text()
        assert path.stem == "keys" or not re.search(r"random\.(key\b|PRNGKey)", text), path


def test_flags_are_read_in_entry_points_only():
    for path in MODULES:
        # The pipeline of data only tells Grain that its own flags have their defaults.
        if path.stem not in COMMANDS | {"cli", "__main__"} and path.parts[1:] != (
            "data",
            "pipeline.py",
        ):
            names = imports(path, everywhere=True)
            assert not {"argparse", "absl.flags", "absl"} & set(names), path


def test_models_do_not_depend_on_the_devices():
    """The caller sets the fields that suit its devices: the same model is the same program."""
    for path in (PACKAGE / "models").glob("*.py"):
        read = re.findall(r"device_count|default_backend|devices\(\)", path.read_text())
        assert not read, path


def test_files_are_short():
    for path in MODULES:
        assert len((ROOT / path).read_text().splitlines()) <= 400, path


def test_what_is_public_is_shown():
    import pydoc

    import mdt_jax

    assert set(mdt_jax.__all__) <= set(dir(mdt_jax))
    shown = pydoc.plain(pydoc.render_doc(mdt_jax))
    for name in ("generate", "load", "trajectory"):
        assert f"    {name}(" in shown, name


def test_the_core_imports_with_its_seven_packages_alone():
    code = """
import sys, importlib, pkgutil
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"PIL", "sklearn", "tqdm", "tensorflow", "tensorflow_datasets",
                                  "torch", "mlxtend", "matplotlib", "pandas", "grain"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import mdt_jax
for module in pkgutil.walk_packages(mdt_jax.__path__, "mdt_jax."):
    if module.name.split(".")[1] not in (
        "main", "sample", "inpaint", "info", "convert", "encode", "evaluate", "report", "demo"
    ):
        importlib.import_module(module.name)
for name in mdt_jax.__all__:
    getattr(mdt_jax, name)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
