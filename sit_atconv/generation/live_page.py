"""The page of `sit_atconv.demo`: settings on one side, and a column of images for each model."""

import random
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import gradio as gr
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision.utils import make_grid

from sit_atconv.data.pixels import to_pil
from sit_atconv.generation.drawing import Drawing
from sit_atconv.generation.live import MOST_SHOWN, Drawn, Frame, LiveModel
from sit_atconv.models.mixers import mixer_names
from sit_atconv.runtime.names import labels_by_name
from sit_atconv.sampling import SOLVERS, Sampler

WIDEST = 1600  # pixels of a frame's picture
SMALL = 64  # sides in pixels below which images are enlarged, with visible pixels
MOST_SEED = 2**53 - 1  # a browser's numbers are exact up to here
NEW_SEEDS = 2**31
MOST_CFG = 1000
SYSTEM_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
CSS = """
.small img { image-rendering: pixelated; }
.images .grid-container { grid-template-columns: repeat(auto-fill, minmax(80px, 1fr)) !important; }
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
    frame_time: gr.Markdown
    picture: gr.Image
    command: gr.Code

    @property
    def parts(self) -> list:
        return [self.gallery, self.time, self.frames, self.slider, self.frame_time, self.picture, self.command]

    def empty(self) -> dict:
        """Returns every part with the value of nothing drawn."""
        slider = gr.Slider(0, 1, 0, interactive=False)
        return dict(zip(self.parts, [None, "", [], slider, "", None, ""], strict=True))


def make_page(models: Sequence[LiveModel], limits: Limits) -> gr.Blocks:
    """Returns the page of one model, or of several side by side. ValueError: they have other classes."""
    first = models[0]
    names = first.weights.recipe.class_names
    for other in models[1:]:
        if other.weights.recipe.class_names != names:
            raise ValueError(f"{first.options.ckpt} and {other.options.ckpt} have different classes: show one of them")
    titles = _titles(models)
    solvers = [name for name in SOLVERS if all(_suits(name, model) for model in models)]
    start = _start(models, solvers)
    if max(start.size) > limits.side:
        raise ValueError(
            f"--max-side {limits.side} is less than the model's {max(start.size)} pixels: give at least that"
        )
    with gr.Blocks(
        title=" and ".join(titles), analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)
    ) as page:
        gr.Markdown(f"# {' and '.join(titles)}")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                controls = _controls(start, solvers, limits)
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw")
                    again = gr.Button("New seed", elem_id="new-seed")
                    stop = gr.Button("Stop", elem_id="stop")
                with gr.Accordion("size, guidance interval, frames", open=False, elem_id="more"):
                    controls |= _more_controls(start)
            with gr.Column(scale=3, min_width=320):
                status = gr.Markdown("Choose a class and press **Draw**.", elem_id="status")
                with gr.Row():
                    columns = [_column(model, title, start) for model, title in zip(models, titles, strict=True)]
        parts = [part for column in columns for part in column.parts]
        events = [
            button.click(
                _Drawer(columns, limits, status, seed).draw,
                [controls[name] for name in ARGUMENTS],
                [status, *parts, *([seed] if seed is not None else [])],
                api_name="draw" if button is draw else None,
                api_visibility="public" if button is draw else "private",
                concurrency_limit=1,
                concurrency_id="draw",
                show_progress="minimal",
                show_progress_on=status,
                trigger_mode="once",  # further clicks are ignored while one is under way
            )
            for button, seed in ((draw, None), (again, controls["seed"]))
        ]
        stop.click(lambda: "Stopped.", None, status, queue=False, cancels=events, api_visibility="private")
        for column in columns:
            column.slider.input(
                _shown,
                [column.slider, column.frames],
                [column.frame_time, column.picture],
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
        show_error=True,
    )
    return address


# ----------------------------------------------------------------------------------------------- parts of the page


def _start(models: Sequence[LiveModel], solvers: Sequence[str]) -> Drawing:
    """Returns the drawing that the page shows at first: the first model's own, as far as it suits all."""
    drawing = models[0].check(Sampler())
    if drawing.sampler.solver not in solvers:
        usual = "unipc" if "unipc" in solvers else solvers[0]
        drawing = models[0].check(Sampler(solver=usual))
    solver = drawing.sampler.solver
    scales = [model.check(Sampler(solver=solver)).sampler.cfg for model in models]
    if 1 in scales:  # a model that cannot be guided
        drawing = models[0].check(Sampler(solver=solver, cfg=1))
    return drawing


def _controls(start: Drawing, solvers: Sequence[str], limits: Limits) -> dict[str, gr.components.Component]:
    """Returns the inputs that everybody uses, by the names of `_Drawer.draw`'s arguments."""
    sampler = start.sampler
    return {
        "classes": gr.Dropdown(
            _choices(start.weights.recipe.class_names),
            value=["label:0"],
            multiselect=True,
            label="class",
            info="several are drawn in turn; none: at random",
            elem_id="classes",
        ),
        "num_samples": gr.Number(
            min(4, limits.images), label="images", info=f"1 ... {limits.images}", elem_id="images"
        ),
        "seed": gr.Number(0, label="seed", info="image i is a function of (seed, i)", elem_id="seed"),
        "cfg": gr.Number(sampler.cfg, label="cfg", info="guidance scale: 1 is off, 0 ignores the class", elem_id="cfg"),
        "solver": gr.Dropdown(list(solvers), value=sampler.solver, label="solver", elem_id="solver"),
        "steps": gr.Number(
            min(sampler.steps, limits.steps), label="steps", info=f"1 ... {limits.steps}", elem_id="steps"
        ),
    }


def _more_controls(start: Drawing) -> dict[str, gr.components.Component]:
    """Returns the other inputs by name."""
    height, width = start.size
    with gr.Row():
        sides = {
            "height": gr.Number(height, label="height", min_width=80, elem_id="height"),
            "width": gr.Number(width, label="width", min_width=80, elem_id="width"),
        }
    return {
        **sides,
        "lo": gr.Slider(0, 1, 0, step=0.01, label="guided from t =", info="0 is noise, 1 is data", elem_id="from"),
        "hi": gr.Slider(0, 1, 1, step=0.01, label="guided below t =", elem_id="below"),
        "num_frames": gr.Slider(
            0,
            40,
            12,
            step=1,
            label="frames",
            info="pictures of the way from noise; not part of the time",
            elem_id="frames",
        ),
    }


def _column(model: LiveModel, title: str, start: Drawing) -> Column:
    recipe, config = model.weights.recipe, model.weights.model.config
    average = f", EMA {recipe.ema_decay:g}" if recipe.ema_decay else ""
    mixers = " and ".join(
        f"{number} x {name}" for name, number in Counter(mixer_names(config.mixer, config.depth)).items()
    )
    small = ["small"] if max(start.size) < SMALL else []
    with gr.Column(min_width=300):
        gr.Markdown(f"### {title}\n{mixers}, step {recipe.step:,}{average}")
        gallery = gr.Gallery(
            label="images",
            show_label=False,
            format="png",
            columns=4,
            object_fit="contain",
            elem_classes=["images", *small],
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
        frame_time = gr.Markdown("", elem_classes=["frame-time"])
        picture = gr.Image(
            label="the way",
            show_label=False,
            format="png",
            interactive=False,
            elem_classes=["frame", *small],
            buttons=["download"],
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
    return Column(model, gallery, seconds, gr.State([], time_to_live=3600), slider, frame_time, picture, line)


def _titles(models: Sequence[LiveModel]) -> list[str]:
    """Returns a name for each model: a hub id, or the end of its path, as short as they differ."""
    if not all(Path(model.options.ckpt).exists() for model in models):
        return [model.options.ckpt for model in models]
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
        Sampler(solver=solver).check(
            model.weights.recipe.interpolant, model.weights.recipe.prediction, **model.weights.traits
        )
    except ValueError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------ what it does


ARGUMENTS = ("classes", "num_samples", "seed", "cfg", "solver", "steps", "height", "width", "lo", "hi", "num_frames")


def _shown(number: float, frames: Sequence[tuple[float, Image.Image]]) -> tuple[str, Image.Image | None]:
    """Returns the time of a frame in words, and its picture."""
    if not frames:
        return "", None
    t, picture = frames[min(int(number), len(frames) - 1)]
    return f"t = {t:.2f}", picture


@dataclass(frozen=True)
class _Drawer:
    """The function behind a button.

    Args:
        columns: the models.
        limits: the most that it draws.
        status: the line that says what happens.
        seed: the field that gets a new seed first; None draws with the seed that it holds.
    """

    columns: Sequence[Column]
    limits: Limits
    status: gr.Markdown
    seed: gr.Number | None

    def draw(self, classes, num_samples, seed, cfg, solver, steps, height, width, lo, hi, num_frames) -> Iterator[dict]:
        """Draws with every model in turn; yields changes of the page, the last of which are complete."""
        begin: dict[object, object] = {self.status: "Drawing ..."}
        if self.seed is not None:
            seed = random.randrange(NEW_SEEDS)
            begin[self.seed] = seed
        given = dict(cfg=cfg, solver=solver, steps=steps, height=height, width=width, lo=lo, hi=hi)
        given |= dict(classes=classes, num_samples=num_samples, seed=seed)
        yield begin
        try:
            wanted = _wanted(given, self.limits)
            drawings = [column.model.check(**wanted) for column in self.columns]
            with tempfile.TemporaryDirectory() as folder:  # Gradio keeps copies
                yield from self._draw(drawings, int(num_frames), Path(folder))
        except ValueError as error:
            yield {self.status: f"**error:** {error}"}
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            yield {self.status: f"**error:** {reason} (the terminal of the command shows where)"}

    def _draw(self, drawings: Sequence[Drawing], num_frames: int, folder: Path) -> Iterator[dict]:
        drawn, results = list[Drawn](), dict[object, object]()
        yield {part: value for column in self.columns for part, value in column.empty().items()}
        for number, (column, drawing) in enumerate(zip(self.columns, drawings, strict=True)):
            frames = list[tuple[float, Image.Image]]()
            for item in column.model.draw(drawing, num_frames):
                if isinstance(item, Drawn):
                    drawn.append(item)
                    results |= _result(column, item, frames, folder / str(number))
                    yield results
                    continue
                changes: dict[object, object] = {self.status: f"Drawing: t = {item.t:.2f}"}
                if isinstance(item, Frame):
                    frames.append((item.t, _sheet(item)))
                    images = [to_pil(image) for image in item.expected]
                    changes[column.gallery] = _saved(images, folder / f"{number}-{len(frames)}")
                yield changes
        yield {self.status: _summary(drawings, drawn), **results}


def _wanted(given: dict, limits: Limits) -> dict:
    """Returns the arguments of `LiveModel.check`. ValueError: a number is missing, or out of its range."""
    limited = {
        "images": (given["num_samples"], 1, limits.images),
        "seed": (given["seed"], 0, MOST_SEED),
        "steps": (given["steps"], 1, limits.steps),
        "height": (given["height"], 1, limits.side),
        "width": (given["width"], 1, limits.side),
    }
    for name, (value, least, most) in limited.items():
        if value is None or not least <= value <= most or value != int(value):
            said = "is empty" if value is None else f"{value:g}"
            raise ValueError(f"{name} {said}: give a whole number, {least} ... {most}")
    if given["cfg"] is None or not abs(given["cfg"]) <= MOST_CFG:
        said = "is empty" if given["cfg"] is None else f"{given['cfg']:g}"
        raise ValueError(f"cfg {said}: give a number, {-MOST_CFG} ... {MOST_CFG}")
    if not given["lo"] < given["hi"]:
        raise ValueError(
            f"the guidance interval {given['lo']:g} ... {given['hi']:g} is empty: choose a start below its end"
        )
    sampler = Sampler(
        cfg=float(given["cfg"]),
        cfg_interval=(float(given["lo"]), float(given["hi"])),
        solver=given["solver"],
        steps=int(given["steps"]),
    )
    return dict(
        sampler=sampler,
        classes=tuple(given["classes"] or ()),
        num_samples=int(given["num_samples"]),
        seed=int(given["seed"]),
        size=(int(given["height"]), int(given["width"])),
    )


def _result(column: Column, drawn: Drawn, frames: list[tuple[float, Image.Image]], folder: Path) -> dict:
    number, names = len(drawn.images), column.model.weights.recipe.class_names
    is_one_class = len({*drawn.labels}) == 1
    captions = [None if is_one_class else names[label] for label in drawn.labels]
    last = max(len(frames) - 1, 0)
    values = [
        list(zip(_saved(drawn.images, folder), captions, strict=True)),
        f"{drawn.seconds / number:.3g} s for each of {number} images, NFE {drawn.evaluations}",
        frames,
        gr.Slider(0, max(last, 1), last, step=1, interactive=last > 0),
        *_shown(last, frames),
        drawn.command,
    ]
    return dict(zip(column.parts, values, strict=True))


def _saved(images: Sequence[Image.Image], folder: Path) -> list[str]:
    """Writes images with what they say of themselves, as PNG files, and returns their paths.

    (Gradio would write equal pictures to one file, also while it is read for somebody else.)
    """
    folder.mkdir()
    paths = [str(folder / f"{index:04d}.png") for index in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        info = PngInfo()
        for name, text in {**image.info, "Creation Time": datetime.now(timezone.utc).isoformat()}.items():
            info.add_text(str(name), str(text))
        image.save(path, pnginfo=info)
    return paths


def _summary(drawings: Sequence[Drawing], drawn: Sequence[Drawn]) -> str:
    lines = ["Done."]
    if SOLVERS.find(solver := drawings[0].sampler.solver).is_adaptive:
        lines.append(f"{solver} chooses its own steps.")
    if len(drawn) == 2:
        lines.append(f"The second takes {drawn[1].seconds / drawn[0].seconds:.2f} times as long as the first.")
        if drawings[0].shape != drawings[1].shape:
            lines.append("Their latents have different shapes, so the noise differs.")
    return " ".join(lines)


def _sheet(frame: Frame) -> Image.Image:
    """Returns the states of a frame above the images they lead to."""
    times = max(1, SMALL // max(frame.states.shape[-2:]))
    sheets = [
        to_pil(make_grid(images.repeat_interleave(times, -1).repeat_interleave(times, -2), nrow=MOST_SHOWN))
        for images in (frame.states, frame.expected)
    ]
    sheet = Image.new("RGB", (sheets[0].width, 2 * sheets[0].height + 2), "white")
    for number, part in enumerate(sheets):
        sheet.paste(part, (0, number * (part.height + 2)))
    sheet.thumbnail((WIDEST, WIDEST))
    return sheet
