"""Drawing: several processes fill a folder with the samples of a job, also after a kill."""

import importlib
import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from sit_atconv.checkpoints.exported import Weights
from sit_atconv.checkpoints.recipe import versions
from sit_atconv.checkpoints.run_folder import read_config
from sit_atconv.data.codecs import decode_in_parts
from sit_atconv.data.pixels import to_uint8
from sit_atconv.flow import as_trained, as_velocity, get_interpolant
from sit_atconv.generation.drawing import Drawing
from sit_atconv.generation.job import SampleJob
from sit_atconv.runtime.devices import on_cpu, prepare_device
from sit_atconv.runtime.dtypes import torch_dtype
from sit_atconv.runtime.plots import save_sample_grid
from sit_atconv.runtime.processes import held_by_main, share, together
from sit_atconv.sampling import SOLVERS, Counted, Sampler, SampleStream, Watch

WRITERS = 4  # threads that write images while the next batch is drawn


def generate_samples(job: SampleJob) -> dict:
    """Draws and writes the missing samples on all processes together.

    Sample i is a function of (seed, i) and the settings. The same call therefore completes a folder after a kill, and
    the number of processes and the batch size do not change an image (except for rounding, and with an adaptive
    solver, which chooses its steps for the whole batch).

    Returns:
        The manifest of the folder; {} on all ranks but 0.

    Raises:
        OSError: on all ranks: another command holds the folder, it cannot be written to, or samples are not finite;
            on rank 0: samples are missing in the end.
    """
    drawing, folder = job.drawing, job.folder
    options, recipe = drawing.options, drawing.weights.recipe
    state = PartialState(cpu=on_cpu())
    prepare_device(state.device, tf32=options.dtype == "tf32")
    is_done = not job.missing and (folder.npz.exists() or not options.npz) and folder.read_manifest().get("complete")
    is_done, missing = broadcast_object_list([is_done, job.missing])  # rank 0's: other ranks may see fewer files
    if is_done:
        return folder.read_manifest() if state.is_main_process else {}
    session = {
        "missing": len(missing),
        "device": state.device.type,
        "processes": state.num_processes,
        "versions": versions(),
    }
    with held_by_main(folder.folder, state):
        with together():
            if state.is_main_process:
                folder.begin(job.settings, session, options.latents)
        with together():
            speed = draw(job, share(missing, state), state)
        if not state.is_main_process:
            return {}
        if left := folder.missing(options.num_samples, options.latents):
            raise OSError(
                f"{folder.folder} lacks {len(left)} samples, the first is {left[0]}: run the same command again"
            )
        labels = drawing.labels(SampleStream(options.seed, range(options.num_samples))).tolist()
        solver = drawing.sampler.solver
        is_adaptive = SOLVERS.find(solver).is_adaptive
        folder.update_manifest(
            {  # before the npz: a kill while that is written must not lose the speed
                "ckpt": os.path.abspath(options.ckpt) if os.path.exists(options.ckpt) else options.ckpt,
                "step": recipe.step,
                "ema_decay": recipe.ema_decay,
                "training": read_config(drawing.weights.home) or None,
                "sampler": [*Sampler.__dataclass_fields__, "dtype", "compile"],  # names of the settings of sampling
                "batches": f"agree to {f'the tolerance of {solver}' if is_adaptive else 'one grey level'}",
                **speed,
                "labels": labels,
            }
        )
        if options.npz:
            folder.write_npz(options.num_samples)
        _save_grid(job, labels)
        return folder.update_manifest({"complete": True})


def draw(job: SampleJob, mine: Sequence[int], state: PartialState) -> dict:
    """Draws and writes the samples `mine`, which are the share of this process.

    Returns:
        `images_per_second` of all processes and, per image, the NFE (`evaluations`) and the forwards of a network
        (`forwards`); {} if `mine` is empty.
    """
    drawing, device = job.drawing, state.device
    options = drawing.options
    model, weak = ready_models(drawing, device)
    if library := SOLVERS.find(drawing.sampler.solver).library:
        importlib.import_module(library)  # before the clock starts
    evaluations = 0
    writing: list[Future[None]] = []
    clock = time.perf_counter()
    with (
        torch.inference_mode(),
        ThreadPoolExecutor(WRITERS) as pool,
        tqdm(
            total=len(mine),
            unit="image",
            desc="this process" if state.num_processes > 1 else None,
            disable=not state.is_main_process,
        ) as progress,
    ):
        for start in range(0, len(mine), options.batch_size):
            stream = SampleStream(options.seed, mine[start : start + options.batch_size])
            before = model.evaluations
            z = sample_batch(drawing, model, weak, stream, device)
            evaluations += (model.evaluations - before) * len(z)
            images = decode_batch(drawing, z, stream)
            latents = z.cpu() if options.latents else [None] * len(z)
            for written in writing:
                written.result()  # raises the errors of writing; at most one batch waits for the disk
            samples = zip(stream.indices, images, latents, strict=True)
            writing = [pool.submit(job.folder.write_sample, *sample) for sample in samples]
            progress.update(len(z))
        for written in writing:
            written.result()
    if not mine:
        return {}
    forwards = model.samples + (weak.samples if weak else 0)
    rate = len(mine) * state.num_processes / (time.perf_counter() - clock)
    return {"images_per_second": rate, "evaluations": evaluations / len(mine), "forwards": forwards / len(mine)}


def ready_models(drawing: Drawing, device: torch.device) -> tuple[Counted, Counted | None]:
    """Moves codec, model and weak model to the device, and both models to the dtype; returns the models."""

    def ready(weights: Weights) -> Counted:
        # diffusers' own `to` warns of casting no module at all
        torch.nn.Module.to(weights.model, device, torch_dtype(drawing.options.dtype))
        return Counted(torch.compile(weights.model) if drawing.options.compile else weights.model)

    drawing.codec.to(device)
    return ready(drawing.weights), ready(drawing.weak) if drawing.weak else None


def sample_batch(
    drawing: Drawing,
    model: Counted,
    weak: Counted | None,
    stream: SampleStream,
    device: torch.device,
    watch: Watch | None = None,
) -> Tensor:
    """Returns the latents (B, C, h, w) of the stream's samples; `watch` sees every step (`Sampler`)."""
    path, prediction = drawing.weights.recipe.interpolant, drawing.weights.recipe.prediction
    weak_velocity = None
    if weak and drawing.weak:
        weak_velocity = as_velocity(as_trained(weak, drawing.weak.recipe), get_interpolant(path), prediction)
    noise, y = stream.randn(drawing.shape, device), drawing.labels(stream).to(device)
    return drawing.sampler(
        as_trained(model, drawing.weights.recipe),
        noise,
        y,
        path=path,
        prediction=prediction,
        weak=weak_velocity,
        randn=stream.randn_like,
        watch=watch,
    )


def decode_batch(drawing: Drawing, z: Tensor, stream: SampleStream) -> Tensor:
    """Returns the images, uint8 (B, 1 or 3, H, W) on the CPU, of latents (B, C, h, w).

    Raises:
        ValueError: an image is not finite.
    """
    images = decode_in_parts(drawing.codec, z)
    if not images.isfinite().all():
        raise ValueError(
            f"samples {stream.indices[0]} ... {stream.indices[-1]} are not finite with "
            f"--cfg {drawing.sampler.cfg:g} and --dtype {drawing.options.dtype}: try a smaller --cfg or a "
            "wider --dtype; otherwise the weights are damaged"
        )
    return to_uint8(images).cpu()


def _save_grid(job: SampleJob, y: list[int], side: int = 10) -> None:
    """Saves a picture of the first `side` samples of the `side` most frequent classes."""
    drawing = job.drawing
    sampler, recipe = drawing.sampler, drawing.weights.recipe
    classes = [label for label, _ in Counter(y).most_common(side)]
    shown = [i for label in sorted(classes) for i in [j for j, other in enumerate(y) if other == label][:side]]
    images = [job.folder.read_image(i) for i in shown]
    title = f"step {recipe.step}, cfg {sampler.cfg:g}, {sampler.solver} {sampler.steps}, seed {drawing.options.seed}"
    save_sample_grid(images, [y[i] for i in shown], recipe.class_names, job.folder.grid, title, columns=side)
