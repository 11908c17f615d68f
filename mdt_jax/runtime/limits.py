"""Upper bounds of the numbers in fields and flags."""

from typing import Any

from mdt_jax.runtime.errors import UserError

# Bounds of whole numbers by the full or the last name of the field or flag, far above all known
# uses. `train.costs` checks what a combination of them needs.
MOST = {
    "hidden_size": 65_536,
    "depth": 1_000,
    "side_layers": 1_000,
    "num_classes": 10_000_000,
    "image_size": 16_384,
    "image_width": 16_384,
    "channels": 1_024,
    "batch_size": 131_072,
    "workers": 1_024,
    "num_samples": 10_000_000,
    "num_resamples": 10_000,
    "jump_length": 10_000,
    "frames": 10_000,
    "diffusion.steps": 100_000,
}
MOST_TOKENS = 16_384  # the index of the relative position bias has this number squared
MOST_WHOLE = 2**31 - 1  # of fields that MOST does not name
MOST_REAL = 1e38  # about float32's largest


def check_number(name: str, value: Any) -> None:
    """Raise UserError, naming the field or flag, for NaN, infinity and numbers above its bound."""
    if not isinstance(value, int):
        if not abs(value) <= MOST_REAL:
            raise UserError(f"{name} is {value}; it must be a finite number, at most {MOST_REAL:g}")
        return
    last_name = name.rpartition(".")[2].lstrip("-")
    most = MOST.get(name, MOST.get(last_name, MOST_WHOLE))
    if abs(value) > most:
        shown = str(value) if abs(value) < 10**20 else f"a number of {len(hex(value)) * 4} bits"
        raise UserError(f"{name} is {shown}; it must be at most {most:,}")


def check_tokens(tokens: int, hidden_size: int) -> None:
    """Raise UserError if an image has more tokens than the position embeddings allow."""
    if tokens > MOST_TOKENS or tokens * hidden_size > 2**26:
        raise UserError(
            f"an image makes {tokens:,} tokens of model.hidden_size {hidden_size}; it may make at "
            f"most {MOST_TOKENS:,} tokens, and 2^26 numbers in all: decrease data.image_size or "
            "increase model.patch_size"
        )
