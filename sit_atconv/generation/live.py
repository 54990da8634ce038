"""Drawing while somebody watches: a few images at once, with pictures of the steps on the way."""

import contextlib
import json
import queue
import shlex
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sit_atconv import __version__
from sit_atconv.checkpoints.exported import Weights
from sit_atconv.checkpoints.run_folder import newest_checkpoint
from sit_atconv.checkpoints.weights import load_weights
from sit_atconv.data.codecs import decode_in_parts, open_codec
from sit_atconv.data.pixels import to_pil, to_uint8
from sit_atconv.flow import get_interpolant
from sit_atconv.generation.draw import decode_batch, sample_batch
from sit_atconv.generation.drawing import Drawing, GenerateOptions, check_drawing
from sit_atconv.generation.labels import typed_label
from sit_atconv.runtime.devices import prepare_device, synchronize
from sit_atconv.runtime.dtypes import torch_dtype
from sit_atconv.runtime.installation import command
from sit_atconv.sampling import SOLVERS, Counted, Sampler, SampleStream

PROGRESS_EVERY = 0.5  # seconds
MOST_SHOWN = 8  # images of a frame
FLAGS = {"cfg_interval": "--interval"}  # of sample/generate.py, where they differ from the option's name


@dataclass(frozen=True)
class Progress:
    """The time t that the drawing has reached, in [0, 1]."""

    t: float


@dataclass(frozen=True)
class Frame:
    """Pictures of one step.

    Args:
        t: time of the step; 0 is noise, 1 is data.
        states: what the solver has at t, decoded, uint8 (n, 1 or 3, H, W), of the first images, at most MOST_SHOWN.
        expected: the images that its velocity leads to, likewise.
    """

    t: float
    states: Tensor
    expected: Tensor


@dataclass(frozen=True)
class Drawn:
    """The images of one call.

    Args:
        images: the images; `info` of each holds its settings, which a PNG keeps.
        labels: their labels.
        seconds: time of sampling and decoding all of them, without the frames.
        evaluations: NFE of an image.
        command: a call of sample/generate.py that draws the same images.
    """

    images: list[Image.Image]
    labels: list[int]
    seconds: float
    evaluations: int
    command: str


class LiveModel:
    """A loaded checkpoint that draws a few images at a time, for people who watch.

    Args:
        ckpt, model, vae, ema, dtype: the weights and the arithmetic, as in `GenerateOptions`.
        device: where it computes.
        modules: the user's modules that were imported for it, which the command line of its images names.

    Raises:
        ValueError: the weights or their codec cannot be loaded.
    """

    def __init__(
        self,
        ckpt: str,
        device: torch.device,
        *,
        model: str | None = None,
        vae: str | None = None,
        ema: bool | float = True,
        dtype: str = "fp32",
        modules: Sequence[str] = (),
    ):
        self.options = GenerateOptions(ckpt=ckpt, model=model, vae=vae, ema=ema, dtype=dtype)
        self.device, self.modules = device, modules
        self.weights: Weights = load_weights(ckpt, ema, model=model, vae=vae)
        self.identity = self.weights.identity()
        codec = open_codec(self.weights.recipe.codec, precision="fp32" if dtype == "fp32" else "tf32")
        self.codec = codec.to(device)
        torch.nn.Module.to(self.weights.model, device, torch_dtype(dtype))  # not diffusers' own, which warns
        self.lock = threading.Lock()
        self.warm = set[tuple]()  # shapes and solvers that were drawn before

    def check(
        self,
        sampler: Sampler,
        classes: Sequence[str] = (),
        num_samples: int = 1,
        seed: int = 0,
        size: tuple[int, ...] = (),
    ) -> Drawing:
        """Settles what is to be drawn; the arguments are those of `GenerateOptions`.

        Raises:
            ValueError: they do not fit each other or the model.
        """
        wanted = dict(sampler=sampler, classes=tuple(classes), num_samples=num_samples, seed=seed, size=size)
        return check_drawing(replace(self.options, **wanted), self.weights, self.codec)

    def draw(self, drawing: Drawing, num_frames: int = 0) -> Iterator[Progress | Frame | Drawn]:
        """Draws the images, and yields frames on the way, then the result.

        Image i equals sample i of sample/generate.py, up to the rounding of another batch size. Progress comes between
        frames, about twice a second. Closing the generator ends the drawing with its current step, without waiting for
        that; another drawing of this model begins afterwards.

        Args:
            drawing: what `check` returned.
            num_frames: number of frames at most, at least 0, about evenly spaced in time.

        Raises:
            ValueError: the samples are not finite, or memory is too small for them.
        """
        watched = _Watched()

        def work() -> None:
            try:
                with self.lock:
                    watched.show(self._draw(drawing, num_frames, watched))
            except _Left:
                pass
            except BaseException as error:
                with contextlib.suppress(_Left):
                    watched.show(_explained(error))

        threading.Thread(target=work, daemon=True, name="drawing").start()
        try:
            while True:
                try:
                    item = watched.found.get(timeout=PROGRESS_EVERY)
                except queue.Empty:
                    yield Progress(watched.t)
                    continue
                if isinstance(item, BaseException):
                    raise item
                yield item
                if isinstance(item, Drawn):
                    return
        finally:
            watched.left.set()

    @torch.inference_mode()
    def _draw(self, drawing: Drawing, num_frames: int, watched: "_Watched") -> Drawn:
        watched.reach(0.0)  # it may have waited for another drawing
        options, device = drawing.options, self.device
        prepare_device(device, tf32=options.dtype == "tf32")
        stream, model = SampleStream(options.seed, range(options.num_samples)), Counted(self.weights.model)
        self._warm_up(drawing, watched)
        clock = _Clock(device)
        next_frame = 0

        def watch(t: float, x: Tensor, v: Tensor, r: float) -> None:
            nonlocal next_frame
            watched.reach(t)
            place = min(int(t * num_frames), num_frames - 1)
            if num_frames and place >= next_frame:
                with clock.paused():
                    watched.show(self._frame(drawing, t, x[:MOST_SHOWN], v[:MOST_SHOWN], r))
                next_frame = place + 1

        z = sample_batch(drawing, model, None, stream, device, watch)
        watched.reach(1.0)
        images = [to_pil(image) for image in decode_batch(drawing, z, stream)]
        seconds, labels = clock.stop(), drawing.labels(stream).tolist()
        line = command_line(drawing, self.modules)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            image.info.update(self._facts(drawing, index, label), command=line)
        return Drawn(images, labels, seconds, model.evaluations, line)

    def _warm_up(self, drawing: Drawing, watched: "_Watched") -> None:
        """Computes a step and decodes once, so that the first images are not charged with what happens once."""
        kind = (drawing.shape, drawing.options.num_samples, drawing.sampler.solver, drawing.sampler.cfg == 1)
        if kind in self.warm:
            return

        def leave(t: float, x: Tensor, v: Tensor, r: float) -> None:
            watched.reach(0.0)
            decode_in_parts(self.codec, x.float())
            raise _Left

        with contextlib.suppress(_Left):
            stream = SampleStream(0, range(drawing.options.num_samples))
            sample_batch(drawing, Counted(self.weights.model), None, stream, self.device, leave)
        watched.reach(0.0)
        self.warm.add(kind)

    def _frame(self, drawing: Drawing, t: float, x: Tensor, v: Tensor, r: float) -> Frame:
        recipe = drawing.weights.recipe
        if SOLVERS.find(drawing.sampler.solver).jumps:
            expected = x + (r - t) * v
        else:
            expected = get_interpolant(recipe.interpolant).data_from_velocity(
                v, x, torch.tensor(t, dtype=torch.float64)
            )
        states, images = (to_uint8(decode_in_parts(self.codec, z.float()).nan_to_num()).cpu() for z in (x, expected))
        return Frame(t, states, images)

    def _facts(self, drawing: Drawing, index: int, label: int) -> dict[str, str]:
        """Returns what a PNG file says of its image."""
        recipe, options = drawing.weights.recipe, drawing.options
        settings = {
            **drawing.sampler.settings(),
            "seed": options.seed,
            "index": index,
            "label": label,
            "class": recipe.class_names[label],
            "size": drawing.size,
            "dtype": options.dtype,
            "ckpt": options.ckpt,
            "step": recipe.step,
            "ema_decay": recipe.ema_decay,
            "weights": self.identity,
        }
        return {"Software": f"sit_atconv {__version__}", "settings": json.dumps(settings)}


class _Left(Exception):
    """Leaves a solver's loop, because nobody watches any more."""


class _Watched:
    """Passes items from the thread that draws to the one that watches."""

    def __init__(self):
        self.found: queue.Queue[Frame | Drawn | BaseException] = queue.Queue(maxsize=2)
        self.left = threading.Event()
        self.t = 0.0

    def reach(self, t: float) -> None:
        """Notes the time reached. _Left: nobody watches any more."""
        if self.left.is_set():
            raise _Left
        self.t = max(self.t, t)

    def show(self, item: "Frame | Drawn | BaseException") -> None:
        """Hands over an item as soon as there is room for it. _Left: nobody watches any more."""
        while True:
            self.reach(self.t)
            with contextlib.suppress(queue.Full):
                return self.found.put(item, timeout=PROGRESS_EVERY)


def _explained(error: BaseException) -> BaseException:
    """Returns a ValueError for too little memory, which the user can change; other errors as they are."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
        return ValueError("there is too little memory for these images: draw fewer or smaller ones")
    return error


class _Clock:
    """A clock of a device's work that can be paused."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, 0.0
        synchronize(device)
        self.started = time.perf_counter()

    def stop(self) -> float:
        synchronize(self.device)
        self.seconds += time.perf_counter() - self.started
        return self.seconds

    @contextlib.contextmanager
    def paused(self):
        self.stop()
        yield
        synchronize(self.device)
        self.started = time.perf_counter()


def command_line(drawing: Drawing, modules: Sequence[str] = ()) -> str:
    """Returns the call of sample/generate.py that draws the same images, with these modules imported."""
    options, names = drawing.options, drawing.weights.recipe.class_names
    ckpt = Path(options.ckpt)
    if newest_checkpoint(ckpt):  # a run, whose newest checkpoint may be another one later
        ckpt = ckpt / "checkpoints" / f"step-{drawing.weights.recipe.step:07d}"
    words = ["--ckpt", str(ckpt), *(word for module in modules for word in ("--import", module))]
    if options.ema is False:
        words.append("--no-ema")
    given: dict[str, object] = {"--ema": None if isinstance(options.ema, bool) else options.ema}
    given |= {f"--{name}": getattr(options, name) for name in ("model", "vae")}
    given["--classes"] = [_typed(label, names) for label in drawing.given]
    given |= {"--num-samples": options.num_samples, "--seed": options.seed}
    given["--size"] = () if drawing.has_trained_size else drawing.size
    defaults = {f.name: f.default for f in fields(Sampler) if f.default is not MISSING}
    for name, value in drawing.sampler.settings().items():
        if value != defaults[name]:
            given[FLAGS.get(name, "--" + name.replace("_", "-"))] = value
    given["--dtype"] = options.dtype if options.dtype != GenerateOptions.dtype else None
    for flag, value in given.items():
        values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if values and value is not None:
            words += [flag, *map(str, values)]
    return f"{command('generate')} {shlex.join(words)}"


def _typed(label: int, class_names: Sequence[str]) -> str:
    """Returns a class as one types it: by its name if that is no other's, else by its number."""
    name = class_names[label]
    with contextlib.suppress(ValueError):
        if name == name.strip() and not name.startswith("-") and typed_label(name, class_names) == label:
            return name
    return f"label:{label}"
