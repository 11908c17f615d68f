"""The page: tabs with fields, and which handler each button calls.

The names of the interface for gradio_client, which stay: weight, draw, watch, picture, mask,
sample_picture, inpaint, stop, run, grid.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mdt_jax.demo import forms
from mdt_jax.demo.handlers import KEPT, OPTIONS, Handlers, Update, said
from mdt_jax.demo.runs import Runs, Shown, clamped
from mdt_jax.diffusion.options import SAMPLERS_OF, SampleOptions
from mdt_jax.diffusion.schedule import SPACINGS
from mdt_jax.sampling.inpainting import MODES, InpaintOptions

if TYPE_CHECKING:
    import gradio as gr

REFRESH = 5  # seconds between looks at a run
WAITING = 64  # the most jobs that wait
CSS = """
:root { --block-info-text-color: #5b5b66 } .dark { --block-info-text-color: #b4b4bc }
.error { color: #b00020; font-weight: 600 } .dark .error { color: #ff8a80 }
.state { min-height: 2rem }
[data-testid="status-tracker"].minimal { overflow: visible !important }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)) }
.plots svg, .weight svg { max-width: 100%; height: auto; background: #fff }
.pixels .image-container, .pixels .gallery-container { padding-top: 2rem }
.pixels .caption-label { position: static; max-width: none }
.pixels .image-frame { width: 100% }
.pixels img { image-rendering: pixelated; width: 100%; max-height: 28rem; object-fit: contain }
.pixels .grid-wrap { height: auto; min-height: 0; max-height: none; overflow: visible }
.pixels .grid-container { grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)) }
.pixels .gallery-item, .pixels .thumbnail-item { aspect-ratio: auto; height: auto }
th { text-align: left; font-weight: normal; padding-right: 1rem }
"""
DEVICE: dict[str, Any] = {"concurrency_id": "device", "concurrency_limit": 1}


def _unchecked(slider: "gr.Slider") -> "gr.Slider":
    """A slider whose bounds gradio does not check: the sampling options have their own check."""
    slider.preprocess = lambda payload: payload
    return slider


def _local(component: Any) -> Any:
    """A component that takes uploads only. A program may send a URL, which gradio would fetch."""
    import gradio as gr

    keep = component.async_move_resource_to_block_cache

    async def keep_local(path: Any) -> Any:
        if str(path).lower().startswith(("http:", "https:")):
            raise gr.Error("send the picture itself, not its URL", print_exception=False)
        return await keep(path)

    component.async_move_resource_to_block_cache = keep_local
    return component


def build(title: str, handlers: Handlers | None, runs: Runs | None) -> "gr.Blocks":
    """The page of a checkpoint, of runs, or of both."""
    import gradio as gr

    with gr.Blocks(title="mdt_jax", analytics_enabled=False, delete_cache=(60, KEPT)) as page:
        gr.Markdown(f"# mdt_jax\n`{title}`")
        options = [] if handlers is None else _options(handlers)
        timer = gr.Timer(REFRESH, active=handlers is None)
        with gr.Tabs() as tabs:
            if handlers is not None:
                _draw(handlers, options)
                _watch(handlers, options)
                _inpaint(handlers, options)
            if runs is not None:
                _run(runs, page, timer)

        def refresh(tab: gr.SelectData) -> gr.Timer:
            return gr.Timer(active=tab.value == "Run")

        tabs.select(refresh, None, timer, api_visibility="private", show_progress="hidden")
        if handlers is not None:

            def stop(request: gr.Request) -> str:
                return handlers.stop(f"{request.session_hash}/")

            gr.api(stop, api_name="stop", queue=False)  # pyright: ignore[reportPrivateImportUsage]
            page.unload(stop)
    page.queue(max_size=WAITING, default_concurrency_limit=8)
    return page


def _options(handlers: Handlers) -> list[Any]:
    """Fields for OPTIONS, with the curve of the guidance weight."""
    import gradio as gr

    own, guided = handlers.pipeline.options, handlers.pipeline.model.num_classes > 0
    help_of = {f.name: f.metadata["help"] for f in dataclasses.fields(SampleOptions)}

    def about(name: str, label: str) -> dict[str, Any]:
        return {"value": getattr(own, name), "label": label, "info": help_of[name]}

    with gr.Accordion("How to sample", open=False):
        with gr.Row():
            fields: list[Any] = [
                gr.Dropdown(list(SAMPLERS_OF[own.objective]), **about("sampler", "Sampler")),
                gr.Number(**about("num_steps", "Steps"), precision=0),
                gr.Dropdown(list(SPACINGS), **about("spacing", "Spacing")),
            ]
        with gr.Row(visible=guided):
            with gr.Column():
                for name, label, high in (
                    ("guidance_scale", "Guidance scale", 10.0),
                    ("guidance_power", "Guidance power", 10.0),
                    ("guidance_low", "Guided from", 1.0),
                    ("guidance_high", "Guided up to", 1.0),
                ):
                    slider = gr.Slider(
                        0, max(high, getattr(own, name)), **about(name, label), step=0.01
                    )
                    fields.append(_unchecked(slider))
            curve = gr.HTML(
                handlers.weight(*(getattr(own, n) for n in OPTIONS)), elem_classes="weight"
            )
    gr.on(
        [field.change for field in fields], handlers.weight, fields, curve, api_name="weight",
        show_progress="hidden", trigger_mode="always_last",
    )  # fmt: skip
    return fields


def _streamed(handler: Callable[..., Iterator[Update]], count: int) -> Callable:
    """A handler for gradio: outputs (results…, state, command); results stay until there are new
    ones. count: of results.
    """
    import gradio as gr

    def stream(request: gr.Request, *values):
        owner = f"{request.session_hash}/{handler.__name__}"
        for result, state, command in handler(owner, *values):
            results = [gr.skip()] * count if result is None else [result] if count == 1 else result
            yield *results, state, command

    return stream


def _classes(handlers: Handlers, many: bool) -> "gr.Dropdown":
    """A field for one class or several, with type-ahead; hidden where there are none."""
    import gradio as gr

    names = forms.class_names(handlers.pipeline)
    choices = [(name if name == str(n) else f"{name} ({n})", n) for n, name in enumerate(names)]
    return gr.Dropdown(
        choices, value=[] if many else 0 if names else None, multiselect=many, filterable=True,
        label="Classes" if many else "Class", visible=bool(names),
        info="Type to search; none: all in turn" if many else "Type to search",
    )  # fmt: skip


def _seed() -> "gr.Number":
    import gradio as gr

    return gr.Number(0, label="Seed", precision=None, info="The same seed draws the same picture")


def _buttons(name: str) -> "tuple[gr.Button, gr.Button]":
    import gradio as gr

    with gr.Row():
        return gr.Button(name, variant="primary"), gr.Button("Stop")


def _state() -> "gr.HTML":
    """A field for the state of an `Update`, as high as a line: there gradio shows the queue."""
    import gradio as gr

    return gr.HTML(elem_classes="state")


def _command() -> "gr.Textbox":
    """A field for the command of an `Update`, with a button that copies it."""
    import gradio as gr

    command = gr.Textbox(label="The same as a command", lines=2, interactive=False, buttons=[])
    copy = gr.Button("Copy the command", size="sm")
    copy.click(
        None, command, None, js="text => navigator.clipboard.writeText(text)",
        api_visibility="private",
    )  # fmt: skip
    return command


def _image(label: str, kind: str = "png") -> "gr.Image":
    import gradio as gr

    return gr.Image(
        label=label, type="filepath", format=kind, interactive=False, elem_classes="pixels",
        min_width=300, buttons=["download", "fullscreen"],
    )  # fmt: skip


def _on(
    button: "gr.Button", handler: Callable[..., Iterator[Update]], inputs: list, results: list,
    answers: tuple,
) -> Any:  # fmt: skip
    """Let a button start a handler of a job; returns gradio's event."""
    return button.click(
        _streamed(handler, len(results)), inputs, [*results, *answers], **DEVICE,
        api_name=handler.__name__, show_progress_on=answers[0], show_progress="minimal",
    )  # fmt: skip


def _on_stop(
    button: "gr.Button", handlers: Handlers, state: "gr.HTML", events: list, names: tuple[str, ...]
) -> None:  # fmt: skip
    """Let a button stop jobs of the session, or take them from the queue.

    events: of `_on`; names: of their handlers.
    """
    import gradio as gr

    def pressed(request: gr.Request) -> str:
        for name in names:
            handlers.stop(f"{request.session_hash}/{name}")
        return said("Stopped.")

    button.click(pressed, None, state, queue=False, cancels=events, api_visibility="private")


def _draw(handlers: Handlers, options: list) -> None:
    import gradio as gr

    with gr.Tab("Draw"):
        with gr.Row():
            classes = _classes(handlers, many=True)
            count = gr.Number(16, label="Pictures", info=f"1 to {forms.MAX_COUNT}")
            seed = _seed()
        three = gr.Checkbox(False, label="The same noise at three guidance scales")
        three.visible = handlers.pipeline.model.num_classes > 0
        button, stop = _buttons("Draw")
        state = _state()
        pictures = gr.Gallery(
            label="Pictures", columns=3, object_fit="contain", height="auto", format="png",
            elem_classes="pixels", interactive=False, buttons=["download", "fullscreen"],
        )  # fmt: skip
        answers = state, _command()
    inputs = [classes, count, seed, three, *options]
    event = _on(button, handlers.draw, inputs, [pictures], answers)
    _on_stop(stop, handlers, state, [event], ("draw",))


def _watch(handlers: Handlers, options: list) -> None:
    import gradio as gr

    shows = [("From noise to sample (x̂₀)", "trajectory"), ("Between noises", "noise")]
    if handlers.pipeline.model.num_classes:
        shows.append(("Between classes", "classes"))
    with gr.Tab("On the way"):
        with gr.Row():
            show = gr.Radio(shows, value="trajectory", label="Show")
            classes = _classes(handlers, many=True)
        with gr.Row():
            count = gr.Number(4, label="Rows", info=f"1 to {forms.MAX_ROWS}")
            frames = gr.Number(10, label="Frames", info=f"2 to {forms.MAX_FRAMES}")
            seed = _seed()
        button, stop = _buttons("Show")
        state = _state()
        with gr.Row():
            strip, moving = _image("Frames"), _image("Moving", "gif")
        answers = state, _command()
    inputs = [show, classes, count, seed, frames, *options]
    event = _on(button, handlers.watch, inputs, [strip, moving], answers)
    _on_stop(stop, handlers, state, [event], ("watch",))


def _inpaint(handlers: Handlers, options: list) -> None:
    import gradio as gr

    own, side = InpaintOptions(), forms.shown_size(handlers.pipeline)
    with gr.Tab("Inpaint"):
        image, unused = gr.State(None), gr.State(None)  # unused: in place of a command
        with gr.Row():
            label = _classes(handlers, many=False)
            seed = _seed()
        with gr.Row():
            upload, mask = (
                _local(gr.UploadButton(text, file_types=["image"], type="filepath"))
                for text in ("Upload a picture", "Upload a mask")
            )
            sample = gr.Button("Draw a sample to paint on")
        editor = gr.ImageEditor(
            label="Paint over what is to be drawn anew", sources=(), layers=False, transforms=(),
            type="numpy", format="png", canvas_size=side, fixed_canvas=True,
            brush=gr.Brush(default_size=24, colors=["#c82828"], color_mode="fixed"),
        )  # fmt: skip
        _local(editor)
        with gr.Accordion("How to inpaint", open=False):
            mode = gr.Radio(list(MODES), value=own.mode, label="Mode")
            length = gr.Number(
                own.jump_length, label="Jump length", info="repaint only: steps of a jump"
            )
            passes = gr.Number(
                own.num_resamples, label="Passes", info="repaint only: passes of each stretch"
            )
            about = "side_interpolater only: steps of the masked pass"
            share = gr.Slider(0, 1, own.masked_share, label="Masked share", info=about)
            _unchecked(share)
        button, stop = _buttons("Inpaint")
        state = _state()
        with gr.Row():
            out, seen = _image("Inpainted"), _image("What the model does not see")
        command = _command()

    def kept(*values):
        """What is refused leaves what there is."""
        return [gr.skip() if value is None else value for value in values]

    def picture(upload):
        return kept(*handlers.picture(upload))

    def mask_of(image, upload):
        return kept(*handlers.mask(image, upload))

    upload.upload(picture, upload, [image, editor, state], api_name="picture")
    mask.upload(mask_of, [image, mask], [editor, state], api_name="mask")
    drawn = [image, editor]
    of_sample = [label, seed, *options]
    events = [_on(sample, handlers.sample_picture, of_sample, drawn, (state, unused))]

    def inpaint(owner, image, painted, *values):
        layers = (painted or {}).get("layers", [])
        return handlers.inpaint(owner, image, layers, *values)

    inputs = [image, editor, label, seed, mode, length, passes, share, *options]
    events.append(_on(button, inpaint, inputs, [out, seen], (state, command)))
    _on_stop(stop, handlers, state, events, ("sample_picture", "inpaint"))


def _run(runs: Runs, page: "gr.Blocks", timer: "gr.Timer") -> None:
    import gradio as gr

    with gr.Tab("Run") as tab:
        names = runs.names()
        name = gr.Dropdown(  # a run that is gone is refused by `runs`
            names, value=names[0], label="Workdir", visible=names != ["."], allow_custom_value=True
        )
        state = gr.HTML()
        curves = gr.HTML(label="Curves")
        with gr.Row():
            # Until it is shown, a program may name any grid.
            number = gr.Slider(0, 10**6, 0, step=1, label="Sample grid", visible=False)
        grid = _image("Samples")
        results, config = gr.HTML(), gr.HTML()
        seen = gr.State(0)  # how many grids there were

    def show(name: str, at: int, count: int):
        """A run now. The slider follows the newest grid unless it was moved away from it."""
        shown = runs.show(name)
        last = len(shown.steps) - 1
        at = clamped(last if at is None or at >= count - 1 else at, last + 1)
        slider = gr.Slider(0, max(last, 1), at, step=1, label=label(shown, at), visible=last > 0)
        path = runs.grid(name, at) if last >= 0 else None
        return shown.state, shown.curves, shown.results, shown.config, slider, path, last + 1

    def label(shown: Shown, at: int) -> str:
        steps = shown.steps
        return f"Samples at step {steps[clamped(at, len(steps))]:,}" if steps else "Samples"

    outputs = [state, curves, results, config, number, grid, seen]
    gr.on(
        [page.load, tab.select, timer.tick, name.change], show, [name, number, seen], outputs,
        api_name="run", show_progress="hidden",
    )  # fmt: skip
    quiet: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
    number.change(runs.grid, [name, number], grid, api_name="grid", **quiet)
    hidden: dict[str, Any] = quiet | {"api_visibility": "private"}
    number.change(
        lambda name, at: gr.Slider(label=label(runs.show(name), at)), [name, number], number,
        **hidden,
    )  # fmt: skip
    timer.tick(lambda: gr.Dropdown(runs.names()), None, name, **hidden)
