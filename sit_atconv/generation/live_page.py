"""The page of `sit_atconv.demo`: settings on one side, and a column of images for each model."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gradio as gr
from PIL import Image
from torchvision.utils import make_grid

from sit_atconv.data.pixels import to_pil
from sit_atconv.generation.drawing import Drawing
from sit_atconv.generation.live import Drawn, Frame, LiveModel
from sit_atconv.runtime.names import labels_by_name
from sit_atconv.sampling import SOLVERS, Sampler

IN_A_ROW = 8  # images of a frame
SMALL = 64  # sides in pixels below which images are enlarged, with visible pixels
MOST_SEED = 2**31
SYSTEM_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
CSS = """
.small img { image-rendering: pixelated; }
.images .grid-wrap { height: auto !important; min-height: 0 !important; }
.images { min-height: 0 !important; height: auto !important; }
.command .cm-scroller { min-height: 0 !important; }
footer { display: none !important; }
"""


@dataclass(frozen=True)
class Limits:
    """The most that one click may ask for.

    Args:
        images: number of images.
        side: height and width in pixels.
        steps: solver steps.
    """

    images: int
    side: int
    steps: int


@dataclass(frozen=True)
class Column:
    """The parts of the page that show one model."""

    model: LiveModel
    gallery: gr.Gallery
    time: gr.Markdown
    frames: gr.State  # [(t, picture), ...]
    slider: gr.Slider
    picture: gr.Image
    command: gr.Code

    def empty(self) -> dict:
        """Returns every part with the value of nothing drawn."""
        slider = gr.Slider(0, 1, 0, interactive=False)
        return {
            self.gallery: None,
            self.time: "",
            self.frames: [],
            self.slider: slider,
            self.picture: None,
            self.command: "",
        }


def make_page(models: Sequence[LiveModel], limits: Limits) -> gr.Blocks:
    """Returns the page of one model, or of several side by side. ValueError: they have other classes."""
    first = models[0]
    names = first.weights.recipe.class_names
    for other in models[1:]:
        if other.weights.recipe.class_names != names:
            raise ValueError(f"{first.options.ckpt} and {other.options.ckpt} have different classes: show one of them")
    titles = _titles(models)
    start = first.check(replace(first.options, num_samples=1))
    with gr.Blocks(title=" and ".join(titles), analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# {' and '.join(titles)}")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                controls = _controls(models, start, limits)
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw")
                    again = gr.Button("New seed", elem_id="new-seed")
                    stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
                with gr.Accordion("size, guidance interval, frames", open=False, elem_id="more"):
                    controls |= _more_controls(start)
            with gr.Column(scale=3, min_width=320):
                status = gr.Markdown("Choose a class and press **Draw**.", elem_id="status")
                with gr.Row():
                    columns = [_column(model, title, start) for model, title in zip(models, titles, strict=True)]

        def busy():
            return gr.Button("Drawing …", interactive=False), gr.Button(interactive=False), gr.Button(visible=True)

        def ready():
            return gr.Button("Draw", interactive=True), gr.Button(interactive=True), gr.Button(visible=False)

        buttons = [draw, again, stop]
        outputs = [status, *(part for column in columns for part in column.empty())]
        events = []
        for button in (draw, again):
            begun = button.click(busy, None, buttons, queue=False, show_progress="hidden", api_visibility="private")
            if button is again:
                begun = begun.then(_new_seed, None, controls["seed"], queue=False, api_visibility="private")
            drawn = begun.then(
                _drawer(columns, limits, status, list(controls)),
                [*controls.values()],
                outputs,
                api_name="draw" if button is draw else None,
                api_visibility="public" if button is draw else "private",
                concurrency_limit=1,
                concurrency_id="draw",
                show_progress="minimal",
            )
            drawn.then(ready, None, buttons, queue=False, show_progress="hidden", api_visibility="private")
            events.append(drawn)
        stop.click(lambda: "Stopped.", None, status, queue=False, cancels=events, api_visibility="private")
        for column in columns:
            column.slider.input(
                _shown,
                [column.slider, column.frames],
                column.picture,
                queue=False,
                show_progress="hidden",
                trigger_mode="always_last",
                api_visibility="private",
            )
    return page


def launch(page: gr.Blocks, host: str, port: int | None, max_waiting: int) -> str:
    """Serves the page in the background and returns its address; nothing of it comes from elsewhere.

    Raises:
        OSError: no port can be opened.
    """
    page.queue(max_size=max_waiting)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        theme=gr.themes.Default(**SYSTEM_FONTS),
        css=CSS,
        share=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    return address


# ----------------------------------------------------------------------------------------------- parts of the page


def _controls(models: Sequence[LiveModel], start: Drawing, limits: Limits) -> dict[str, gr.components.Component]:
    """Returns the inputs that everybody uses by name, with the model's own settings at the start."""
    sampler = start.sampler
    solvers = [name for name in SOLVERS if all(_suits(name, model) for model in models)]
    return {
        "classes": gr.Dropdown(
            _choices(start.weights.recipe.class_names),
            value=["label:0"],
            multiselect=True,
            label="class",
            info="several are drawn in turn; none: at random",
            elem_id="classes",
        ),
        "num_samples": gr.Slider(1, limits.images, min(4, limits.images), step=1, label="images", elem_id="images"),
        "seed": gr.Number(0, precision=0, label="seed", info="image i is a function of (seed, i)", elem_id="seed"),
        "cfg": gr.Number(sampler.cfg, label="cfg", info="guidance scale: 1 is off, 0 ignores the class", elem_id="cfg"),
        "solver": gr.Dropdown(solvers, value=sampler.solver, label="solver", elem_id="solver"),
        "steps": gr.Number(sampler.steps, precision=0, label="steps", info=f"1 ... {limits.steps}", elem_id="steps"),
    }


def _more_controls(start: Drawing) -> dict[str, gr.components.Component]:
    """Returns the other inputs by name."""
    height, width = start.size
    with gr.Row():
        sides = {
            "height": gr.Number(height, precision=0, label="height", min_width=80, elem_id="height"),
            "width": gr.Number(width, precision=0, label="width", min_width=80, elem_id="width"),
        }
    return {
        **sides,
        "lo": gr.Slider(0, 1, 0, step=0.01, label="guided from t =", info="0 is noise, 1 is data", elem_id="from"),
        "hi": gr.Slider(0, 1, 1, step=0.01, label="guided below t =", elem_id="below"),
        "num_frames": gr.Slider(
            0, 40, 12, step=1, label="frames", info="pictures of the way from noise; they take no part in the time"
        ),
    }


def _column(model: LiveModel, title: str, start: Drawing) -> Column:
    recipe, config = model.weights.recipe, model.weights.model.config
    average = f", EMA {recipe.ema_decay:g}" if recipe.ema_decay else ""
    small = ["small"] if max(start.size) < SMALL else []
    with gr.Column(min_width=300):
        gr.Markdown(f"### {title}\nmixer {config.mixer}, step {recipe.step:,}{average}")
        gallery = gr.Gallery(
            label="images", format="png", columns=4, object_fit="contain", elem_classes=["images", *small]
        )
        seconds = gr.Markdown("", elem_classes=["time"])
        slider = gr.Slider(
            0,
            1,
            0,
            step=1,
            label="from noise to image",
            info="above: what the solver has; below: where its velocity leads",
            elem_classes=["way"],
        )
        picture = gr.Image(
            label="the way", format="png", interactive=False, elem_classes=["frame", *small], buttons=["download"]
        )
        line = gr.Code(
            "",
            language="shell",
            label="the same images",
            lines=2,
            wrap_lines=True,
            show_line_numbers=False,
            elem_classes=["command"],
        )
    return Column(model, gallery, seconds, gr.State([], time_to_live=3600), slider, picture, line)


def _titles(models: Sequence[LiveModel]) -> list[str]:
    """Returns a name for each model: the end of its path, as short as it differs from the others'."""
    places = [model.weights.home.absolute().parts for model in models]
    for length in range(1, max(map(len, places))):
        names = [str(Path(*parts[-length:])) for parts in places]
        if len({*names}) == len(names):
            return names
    return [model.options.ckpt for model in models]


def _choices(class_names: Sequence[str]) -> list[tuple[str, str]]:
    shared = {label for labels in labels_by_name(class_names).values() if len(labels) > 1 for label in labels}
    return [
        (f"{name} ({label})" if label in shared else name, f"label:{label}") for label, name in enumerate(class_names)
    ]


def _suits(solver: str, model: LiveModel) -> bool:
    try:
        replace(Sampler(), solver=solver).check(
            model.weights.recipe.interpolant, model.weights.recipe.prediction, **model.weights.traits
        )
    except ValueError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------ what it does


def _new_seed() -> int:
    return random.randrange(MOST_SEED)


def _shown(number: int, frames: Sequence[tuple[float, Image.Image]]):
    """Returns the picture of a frame, under its time."""
    if not frames:
        return None
    t, picture = frames[min(int(number), len(frames) - 1)]
    return gr.Image(picture, label=f"t = {t:.2f}")


def _drawer(columns: Sequence[Column], limits: Limits, status: gr.Markdown, names: Sequence[str]) -> Callable:
    """Returns the function behind the buttons: values of the controls -> changes of the page."""

    def draw(*values) -> Iterator[dict]:
        given = dict(zip(names, values, strict=True))
        drawn, results = list[Drawn](), dict[object, object]()
        try:
            drawings = [column.model.check(_options(column.model, given, limits)) for column in columns]
            yield {part: value for column in columns for part, value in column.empty().items()}
            for column, drawing in zip(columns, drawings, strict=True):
                frames = list[tuple[float, Image.Image]]()
                for item in column.model.draw(drawing, int(given["num_frames"])):
                    if isinstance(item, Frame):
                        frames.append((item.t, _sheet(item)))
                        images = [to_pil(image) for image in item.expected]
                        yield {column.gallery: images, status: f"Drawing: t = {item.t:.2f}"}
                    else:
                        drawn.append(item)
                        results |= _result(column, item, frames)
                        yield results
        except ValueError as error:
            yield {status: f"**error:** {error}"}
            return
        yield {status: _summary(drawings, drawn), **results}

    return draw


def _options(model: LiveModel, given: dict, limits: Limits):
    """Returns the options that the page asks for. ValueError: a number is missing, or above its limit."""
    limited = {
        "images": (given["num_samples"], 1, limits.images),
        "seed": (given["seed"], 0, 2**63 - 1),
        "cfg": (given["cfg"], -1e3, 1e3),
        "steps": (given["steps"], 1, limits.steps),
        "height": (given["height"], 1, limits.side),
        "width": (given["width"], 1, limits.side),
    }
    for name, (value, least, most) in limited.items():
        if value is None or not least <= value <= most:
            raise ValueError(f"{name} {'is empty' if value is None else value}: give {least:g} ... {most:g}")
    sampler = Sampler(
        cfg=float(given["cfg"]),
        cfg_interval=(float(given["lo"]), float(given["hi"])),
        solver=given["solver"],
        steps=int(given["steps"]),
    )
    return replace(
        model.options,
        sampler=sampler,
        classes=tuple(given["classes"] or ()),
        num_samples=int(given["num_samples"]),
        seed=int(given["seed"]),
        size=(int(given["height"]), int(given["width"])),
    )


def _result(column: Column, drawn: Drawn, frames: list[tuple[float, Image.Image]]) -> dict:
    number, names = len(drawn.images), column.model.weights.recipe.class_names
    is_one_class = len({*drawn.labels}) == 1
    captions = [None if is_one_class else names[label] for label in drawn.labels]
    last = max(len(frames) - 1, 0)
    return {
        column.gallery: list(zip(drawn.images, captions, strict=True)),
        column.time: f"{drawn.seconds / number:.3g} s for each of {number} images, NFE {drawn.evaluations}",
        column.frames: frames,
        column.slider: gr.Slider(0, max(last, 1), last, step=1, interactive=last > 0),
        column.picture: _shown(last, frames),
        column.command: drawn.command,
    }


def _summary(drawings: Sequence[Drawing], drawn: Sequence[Drawn]) -> str:
    lines = ["Done."]
    if len(drawn) == 2:
        lines.append(f"The right one takes {drawn[1].seconds / drawn[0].seconds:.2f} times as long as the left one.")
        if drawings[0].shape != drawings[1].shape:
            lines.append("Their latents have different shapes, so the noise differs.")
    return " ".join(lines)


def _sheet(frame: Frame) -> Image.Image:
    """Returns the states of a frame above the images they lead to."""
    times = max(1, SMALL // max(frame.states.shape[-2:]))
    sheets = [
        to_pil(make_grid(images.repeat_interleave(times, -1).repeat_interleave(times, -2), nrow=IN_A_ROW))
        for images in (frame.states, frame.expected)
    ]
    sheet = Image.new("RGB", (sheets[0].width, 2 * sheets[0].height + 2), "white")
    for number, part in enumerate(sheets):
        sheet.paste(part, (0, number * (part.height + 2)))
    return sheet
