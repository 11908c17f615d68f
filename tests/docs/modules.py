"""The list of modules in docs/architecture.md, from the first sentence of each docstring.

`python -m tests.docs.modules` writes it anew.
"""

import ast
import re

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "architecture.md"
LIST = re.compile(r"(?<=<!-- modules -->\n).*(?=<!-- end of modules -->)", re.S)
# From the top level of imports to the bottom.
FOLDERS = ["", "demo", "train", "sampling", "evaluation", "weights", "config"]
FOLDERS += ["data", "diffusion", "models", "runtime"]


def sentence(docstring: str) -> str:
    """Its first sentence, on one line."""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    return re.split(r"(?<=[.!?])(?<!al\.)\s", paragraph)[0].replace("|", "\\|")


def markdown() -> str:
    """A table for each folder of the package."""
    lines = []
    for folder in FOLDERS:
        paths = sorted((ROOT / "mdt_jax" / folder).glob("*.py"))
        if paths:
            lines += ["", f"### mdt_jax/{folder}".rstrip("/"), "", "| module | |", "| --- | --- |"]
        for path in paths:
            docstring = ast.get_docstring(ast.parse(path.read_text()))
            if docstring:
                link = f"[{path.name}](../{path.relative_to(ROOT).as_posix()})"
                lines.append(f"| {link} | {sentence(docstring)} |")
    return "\n".join([*lines, "", ""])


if __name__ == "__main__":
    PAGE.write_text(LIST.sub(lambda _: markdown(), PAGE.read_text()))
