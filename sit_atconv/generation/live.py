"""Drawing while somebody watches: a few images at once, with pictures of the steps on the way."""

import contextlib
import json
import queue
import shlex
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields

import torch
from PIL import Image
from torch import Tensor

from sit_atconv import __version__
from sit_atconv.checkpoints.exported import Weights
from sit_atconv.checkpoints.weights import load_weights
from sit_atconv.data.codecs import decode_in_parts, open_codec
from sit_atconv.data.pixels import to_pil, to_uint8
from sit_atconv.flow import get_interpolant
from sit_atconv.generation.draw import decode_batch, ready_models, sample_batch
from sit_atconv.generation.drawing import Drawing, GenerateOptions, check_drawing
from sit_atconv.generation.labels import typed_label
from sit_atconv.runtime.devices import prepare_device, synchronize
from sit_atconv.runtime.installation import command
from sit_atconv.sampling import SOLVERS, Sampler, SampleStream

FLAGS = {"cfg_interval": "--interval"}  # of sample/generate.py, where they differ from the option's name


@dataclass(frozen=True)
class Frame:
    """Pictures of one step.

    Args:
        t: time of the step; 0 is noise, 1 is data.
        states: what the solver has at t, decoded, uint8 (B, 1 or 3, H, W).
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
        options: the checkpoint and how its weights are loaded and computed with; the rest is not used.
        device: where it computes.
        modules: the user's modules that were imported for it, which the command line of its images names.

    Raises:
        ValueError: the weights or their codec cannot be loaded.
    """

    def __init__(self, options: GenerateOptions, device: torch.device, modules: Sequence[str] = ()):
        self.options, self.device, self.modules = options, device, modules
        self.weights: Weights = load_weights(options.ckpt, options.ema, model=options.model, vae=options.vae)
        self.codec = open_codec(self.weights.recipe.codec, precision="fp32" if options.dtype == "fp32" else "tf32")
        self.identity = self.weights.identity()
        self.lock = threading.Lock()

    def check(self, options: GenerateOptions) -> Drawing:
        """Settles the options. ValueError: they do not fit each other or the model."""
        return check_drawing(options, self.weights, self.codec)

    def draw(self, drawing: Drawing, num_frames: int = 0) -> Iterator[Frame | Drawn]:
        """Draws the images, and yields frames on the way, then the result.

        Image i equals sample i of sample/generate.py, up to the rounding of another batch size.

        Args:
            drawing: what `check` returned.
            num_frames: number of frames at most, about evenly spaced in time.

        Raises:
            ValueError: the samples are not finite, or memory is too small for them.
        """
        found: queue.SimpleQueue[Frame | Drawn | BaseException] = queue.SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            try:
                with self.lock:
                    found.put(self._draw(drawing, num_frames, found, stop))
            except torch.OutOfMemoryError:
                found.put(ValueError("the device has too little memory for these images: draw fewer or smaller ones"))
            except BaseException as error:
                found.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while True:
                item = found.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if isinstance(item, Drawn):
                    return
        finally:
            stop.set()  # nobody watches any more
            thread.join()

    @torch.inference_mode()
    def _draw(self, drawing: Drawing, num_frames: int, found: "queue.SimpleQueue", stop: threading.Event) -> Drawn:
        options, device = drawing.options, self.device
        prepare_device(device, tf32=options.dtype == "tf32")
        stream = SampleStream(options.seed, range(options.num_samples))
        model, weak = ready_models(drawing, device)
        _warm_up(drawing, model, weak, device)
        clock = _Clock(device)
        num_seen = 0

        def watch(t: float, x: Tensor, v: Tensor, r: float) -> None:
            nonlocal num_seen
            if stop.is_set():
                raise _Left
            if num_frames and t * num_frames >= num_seen:
                with clock.paused():
                    found.put(self._frame(drawing, t, x, v, r))
                num_seen = int(t * num_frames) + 1

        before = model.evaluations
        z = sample_batch(drawing, model, weak, stream, device, watch)
        images = [to_pil(image) for image in decode_batch(drawing, z, stream)]
        seconds, labels = clock.stop(), drawing.labels(stream).tolist()
        line = command_line(drawing, self.modules)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            image.info.update(self._facts(drawing, index, label), command=line)
        return Drawn(images, labels, seconds, model.evaluations - before, line)

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
    """Leaves a solver's loop."""


def _warm_up(drawing: Drawing, model, weak, device: torch.device) -> None:
    """Computes one step, so that the first images are not charged with what happens once."""

    def leave(*step) -> None:
        raise _Left

    stream = SampleStream(0, range(drawing.options.num_samples))
    with contextlib.suppress(_Left):
        sample_batch(drawing, model, weak, stream, device, leave)


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
    words = ["--ckpt", options.ckpt, *(word for module in modules for word in ("--import", module))]
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
