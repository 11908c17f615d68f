"""What the page does when somebody presses a button; without gradio, so that Python can call it."""

import contextlib
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from mdt_jax.demo import forms
from mdt_jax.demo.jobs import Jobs, Stopped
from mdt_jax.runtime.errors import UserError
from mdt_jax.sampling.generation import changed
from mdt_jax.sampling.inpainting import InpaintOptions
from mdt_jax.sampling.pipeline import Pipeline

# The sampling options that the page has fields for, in their order.
OPTIONS = (
    "sampler", "num_steps", "spacing", "guidance_scale", "guidance_power", "guidance_low",
    "guidance_high",
)  # fmt: skip
PICTURES = "pictures-"  # the beginning of folders' names
KEPT = 3600  # seconds for which pictures can be downloaded
THREE = (0.5, 1.0, 2.0)  # "three scales": 1 + so many times what the scale is above 1


class Update(NamedTuple):
    """What a job has to show. result: None until it is done; state: HTML; command: for a shell."""

    result: Any
    state: str
    command: str


# What a job does, and the command that does the same.
Plan = tuple[Callable[[], Any], str]


def said(text: str, error: bool = False) -> str:
    """A line of HTML; a mistake is red. Screen readers speak both."""
    kind = 'class="error" role="alert"' if error else 'role="status"'
    return f"<p {kind}>{escape(text)}</p>"


class Handlers:
    """Draw with a checkpoint.

    folder: for pictures, which are deleted after KEPT seconds. loaded: the flags with which the
    checkpoint was loaded, for commands. A user's mistake is a red line. owner: whose job it is, for
    `stop`. options: values of OPTIONS.
    """

    def __init__(self, pipeline: Pipeline, folder: str, loaded: Sequence[str] = ()):
        self.pipeline, self.folder, self.loaded, self.jobs = pipeline, folder, loaded, Jobs()

    def weight(self, *options: Any) -> str:
        """The curve of the guidance weight, as HTML."""
        try:
            values = forms.read_options(self.pipeline, _named(options))
            chosen = changed(self.pipeline.options, values)
            chosen.check(self.pipeline.model.num_classes)
            return forms.weight_plot(chosen)
        except UserError as error:
            return said(str(error), error=True)

    def draw(
        self, owner: str, classes: Sequence[int], count: int, seed: int, three: bool, *options: Any
    ) -> Iterator[Update]:
        """Draw samples; the result is [(path, caption)], one picture, or one for each of THREE.

        classes: numbers, none for all classes in turn.
        """

        def plan() -> Plan:
            values, pictures, commands = _named(options), [], []
            scale = forms.number("guidance_scale", values["guidance_scale"], float)
            if three and scale <= 1:
                raise UserError(f"guidance_scale is {scale}; for three scales it must be above 1")
            scales = [round(1 + part * (scale - 1), 6) for part in THREE] if three else [scale]
            for each in scales:
                one = values | {"guidance_scale": each}
                flags = forms.sample_flags(self.pipeline, classes, count, seed, one)
                name = f"scale-{each:g}.png" if three else "samples.png"
                commands.append(self._command("sample", flags, name))
                pictures.append((flags, name, f"guidance scale {each:g}" if three else None))

            def work() -> list[tuple[str, str | None]]:
                folder = self._new_folder()
                return [
                    (str(forms.draw(self.pipeline, flags, folder / name)), caption)
                    for flags, name, caption in pictures
                ]

            return work, "\n".join(commands)

        return self._run(owner, plan)

    def watch(
        self, owner: str, show: str, classes: Sequence[int], count: int, seed: int, frames: int,
        *options: Any,
    ) -> Iterator[Update]:  # fmt: skip
        """Draw rows of frames, as `mdt_jax.sample --show`; the result is (PNG, GIF)."""

        def plan() -> Plan:
            values = _named(options)
            flags = forms.sample_flags(self.pipeline, classes, count, seed, values)
            forms.check_frames(frames)
            flags += [f"--show={show}", f"--frames={forms.number('frames', frames)}"]

            def work() -> tuple[str, str]:
                strip, moving = forms.draw_rows(self.pipeline, flags, self._new_folder())
                return str(strip), str(moving)

            return work, self._command("sample", flags, "frames.gif")

        return self._run(owner, plan)

    def picture(self, upload: str | None) -> tuple[str | None, np.ndarray | None, str]:
        """(path, what to paint on, state) of an uploaded picture, cropped to the model's size."""
        if not upload:
            return None, None, said("Choose a picture first.", error=True)
        try:
            path = self._new_folder() / "image.png"
            shown = forms.fit(self.pipeline, upload, path)
        except UserError as error:
            return None, None, said(str(error), error=True)
        return str(path), shown, said("Paint over what is to be drawn anew.")

    def mask(self, image: str | None, upload: str | None) -> tuple[dict | None, str]:
        """(what to paint on and the paint, state) of an uploaded mask for a picture."""
        if not (image and upload):
            return None, said("Choose a picture first, then a mask.", error=True)
        try:
            layer = forms.mask_layer(self.pipeline, upload)
        except UserError as error:
            return None, said(str(error), error=True)
        shown = forms.shown(self.pipeline, pathlib.Path(image))
        return {"background": shown, "layers": [layer], "composite": None}, said(
            "Paint, or inpaint."
        )

    def sample_picture(
        self, owner: str, label: int | None, seed: int, *options: Any
    ) -> Iterator[Update]:
        """Draw one sample to be painted on; the result is (path, what to paint on)."""

        def plan() -> Plan:
            classes = [] if label is None else [label]
            flags = forms.sample_flags(self.pipeline, classes, 1, seed, _named(options))

            def work() -> tuple[str, np.ndarray]:
                path = self._new_folder() / "image.png"
                return str(path), forms.draw_one(self.pipeline, flags, path)

            return work, ""

        return self._run(owner, plan)

    def inpaint(
        self, owner: str, image: str | None, layers: Sequence[np.ndarray], label: int | None,
        seed: int, mode: str, jump_length: int, num_resamples: int, masked_share: float,
        *options: Any,
    ) -> Iterator[Update]:  # fmt: skip
        """Draw what is painted over anew; the result is (PNG, mask as the model sees it).

        image: of `picture`; layers: as of `forms.painted`; the numbers: of `InpaintOptions`.
        """

        def plan() -> Plan:
            if image is None:
                raise UserError("there is no picture yet: upload one, or draw a sample")
            path, folder = pathlib.Path(image), self._new_folder()
            hidden = forms.painted(self.pipeline, layers)
            how = {"jump_length": jump_length, "num_resamples": num_resamples}
            if mode == "side_interpolater":
                how = {"masked_share": masked_share}
            flags = [f"--seed={forms.number('seed', seed)}", f"--mode={mode}"]
            flags += [] if label is None else [f"--label={forms.label_text(self.pipeline, label)}"]
            own = InpaintOptions()
            read = {n: forms.number(n, v, type(getattr(own, n))) for n, v in how.items()}
            flags += [f"--{n}={value}" for n, value in read.items() if value != getattr(own, n)]
            flags += forms.options_of(self.pipeline, _named(options))

            def work() -> tuple[str, np.ndarray]:
                out = forms.complete(self.pipeline, path, hidden, flags, folder)
                return str(out), forms.as_seen(self.pipeline, path, hidden)

            files = ["--image=image.png", "--mask=mask.png"]
            return work, self._command("inpaint", [*files, *flags], "inpainted.png")

        return self._run(owner, plan)

    def stop(self, owner: str) -> str:
        """Stop jobs between two steps: those of owners that begin with `owner`."""
        return said("Stopped." if self.jobs.stop(owner) else "Nothing is being drawn.")

    def _command(self, name: str, flags: Sequence[str], out: str) -> str:
        return forms.command(name, self.pipeline, [*self.loaded, *flags], out)

    def _run(self, owner: str, plan: Callable[[], Plan]) -> Iterator[Update]:
        command = ""
        try:
            work, command = plan()
            with contextlib.closing(self.jobs.run(owner, work)) as job:
                while True:
                    try:
                        text = next(job)
                    except StopIteration as done:
                        yield Update(done.value, said("Done."), command)
                        return
                    yield Update(None, said(text), command)
        except UserError as error:
            yield Update(None, said(str(error), error=True), command)
        except Stopped:
            yield Update(None, said("Stopped."), command)

    def _new_folder(self) -> pathlib.Path:
        """A new folder for pictures; those that are too old are deleted."""
        new = pathlib.Path(tempfile.mkdtemp(prefix=PICTURES, dir=self.folder))
        for folder in pathlib.Path(self.folder).glob(f"{PICTURES}*"):
            if folder.stat().st_mtime < time.time() - KEPT:
                shutil.rmtree(folder, ignore_errors=True)
        return new


def _named(options: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(OPTIONS, options, strict=True))
