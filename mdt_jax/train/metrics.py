"""metrics.jsonl: one line a logged step, each step once, however often the run was stopped."""

import json
import math
import os


class MetricsLog:
    """Appends lines; opening it at `step` drops what a killed run wrote after that step."""

    def __init__(self, path: str | os.PathLike, step: int):
        self._path = path
        self._drop_after(step)
        self._file = open(path, "a")  # noqa: SIM115 (closed in __exit__)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def _drop_after(self, step: int) -> None:
        if not os.path.exists(self._path):
            return
        with open(self._path) as file:
            lines = file.readlines()
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if len(kept) < len(lines):
            temporary = f"{self._path}.tmp"
            with open(temporary, "w") as file:
                file.writelines(kept)
            os.replace(temporary, self._path)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Numbers that are not finite become null: JSON has no NaN."""
        values = {name: _number(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()


def _number(value) -> int | float | None:
    value = value.item() if hasattr(value, "item") else value
    return value if math.isfinite(value) else None
