"""What files of other programs are, told by their first bytes, or by the names of their arrays."""

import codecs
import os
import re
from collections.abc import Mapping

import numpy as np

_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
AGAIN = "download or copy it once more"
_TAKE = "take the .safetensors or .pt"
# The first bytes of a file: what it is, what to do, and under which suffixes this is said (None:
# under any).
_BYTES: dict[bytes, tuple[str, tuple[str, ...] | None]] = {
    rb"\Z": (f"empty; {AGAIN}", (*_PICKLED, ".safetensors")),
    rb"PK\x03\x04": ("a zip, as PyTorch writes it; rename it to .pt", (".safetensors",)),
    rb".{7}\x00\{": ("a safetensors file; rename it to .safetensors", _PICKLED),
    rb"GGUF": (f"a GGUF file, for llama.cpp; {_TAKE} that it was made from", None),
    rb"\x08[\x01-\x20]\x12.[ -~]{2}": (f"an ONNX graph; {_TAKE} that it was exported from", None),
    rb"\x89HDF": (f"an HDF5 file; {_TAKE} of the same weights", None),
    rb"version https://git-lfs": (
        "a text file, the pointer of Git LFS to the weights; in its repository run git lfs pull",
        None,
    ),
    rb"\s*<(!doctype|html|head)": ("a text file, a page of HTML; download the file itself", None),
}
_OTHER = "which is no network of mdt_jax"
# Names of arrays: the network that has them.
_NAMES = {
    r"lora(_(A|B|up|down|unet|te)|\.)": "a LoRA adapter, not a whole network; merge it into "
    "its network in the program that trained it",
    r"(double_blocks|single_transformer_blocks)\.": f"a transformer of Flux, {_OTHER}",
    r"(joint_blocks|context_embedder)\.": f"a transformer of Stable Diffusion 3, {_OTHER}",
    r"(add_embedding\.linear_1|label_emb\.0\.0)\.": f"a UNet of Stable Diffusion XL, {_OTHER}",
    r"(down_blocks\.\d+\.attentions|input_blocks)\.": f"a UNet, {_OTHER}",
    r"(adaln_single|caption_projection)\.": f"a transformer of PixArt, {_OTHER}",
    r"text_model\.encoder\.": f"a text encoder of CLIP, {_OTHER}",
}


def from_bytes(path: str | os.PathLike, suffix: str) -> str | None:
    """What a file is, for the end of "FILE is …"; None where its first bytes do not tell.

    suffix: of its name, for example ".pt".
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError:
        return None
    for pattern, (what, suffixes) in _BYTES.items():
        fits = suffixes is None or suffix in suffixes
        if fits and re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            return what
    return "a text file, not weights" if _is_text(head) else None


def _is_text(head: bytes) -> bool:
    """Whether bytes, perhaps cut within a character, are text in UTF-8."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return len(text) >= 4 and not re.search(r"[\x00-\x08\x0b\x0e-\x1f\x7f]", text)


def from_arrays(arrays: Mapping[str, np.ndarray]) -> str | None:
    """What the network of arrays by name is, for the end of "FILE is …"; None where unknown."""
    for pattern, what in _NAMES.items():
        if any(re.search(rf"(^|[._])({pattern})", name) for name in arrays):
            return what
    return None
