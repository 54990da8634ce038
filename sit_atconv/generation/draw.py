"""From a checked job to a folder of samples: on several processes, after any kill."""

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
from sit_atconv.data.codecs import decode_in_parts
from sit_atconv.data.pixels import to_uint8
from sit_atconv.flow import as_trained, as_velocity, get_interpolant
from sit_atconv.generation.job import SampleJob
from sit_atconv.runtime.devices import on_cpu, prepare_device
from sit_atconv.runtime.dtypes import torch_dtype
from sit_atconv.runtime.plots import save_sample_grid
from sit_atconv.runtime.processes import held_by_main, share, together
from sit_atconv.sampling import SOLVERS, Counted, Sampler, SampleStream

WRITERS = 4  # threads that write images while the next are drawn


def generate_samples(job: SampleJob) -> dict:
    """Draws what is missing of the samples asked for, on all processes together, and writes them down.

    Sample i is a function of (seed, i) and the settings. So a folder that a kill left half full is completed by the
    same call, and neither the number of processes nor the batch size changes an image (but for the last bits of
    arithmetic, and for an adaptive solver, which chooses its steps for the batch).

    Returns:
        The folder's manifest; {} on processes other than the main one.

    Raises:
        OSError: on all processes, another one holds the folder, it cannot be written to, samples are not finite, or
            the folder lacks samples in the end.
    """
    options, folder, solver = job.options, job.folder, job.sampler.solver
    state = PartialState(cpu=on_cpu())
    prepare_device(state.device, tf32=options.dtype == "tf32")
    is_done = not job.missing and (folder.npz.exists() or not options.npz) and folder.read_manifest().get("complete")
    is_done, missing = broadcast_object_list([is_done, job.missing])  # of the main process: others may see less
    if is_done:
        return folder.read_manifest() if state.is_main_process else {}
    where = {"device": state.device.type, "processes": state.num_processes, "versions": versions()}
    with held_by_main(folder.folder, state):
        with together():
            if state.is_main_process:
                folder.begin(job.settings, where, len(missing), options.latents)
        with together():
            speed = draw(job, share(missing, state), state)
        if not state.is_main_process:
            return {}
        if left := folder.missing(options.num_samples, options.latents):
            raise OSError(f"{folder.folder} lacks {len(left)} samples, the first of them {left[0]}: run the same "
                          "command again")
        folder.update_manifest({  # before the npz, in which a kill would lose the speed
            "ckpt": os.path.abspath(options.ckpt) if os.path.exists(options.ckpt) else options.ckpt,
            "step": job.weights.recipe.step,
            "sampler": [*Sampler.__dataclass_fields__, "dtype", "compile"],  # of the settings, those of sampling
            "batches": "agree to " + (f"the tolerance of {solver}" if SOLVERS.find(solver).is_adaptive else
                                      "one grey level"),
            **speed,
            "labels": job.all_labels,
        })
        if options.npz:
            folder.write_npz(options.num_samples)
        _draw_grid(job)
        return folder.update_manifest({"complete": True})


def draw(job: SampleJob, mine: Sequence[int], state: PartialState) -> dict:
    """Draws and writes the samples `mine`, of this process.

    Returns:
        `images_per_second` of all processes, and for each image how often the velocity (`evaluations`) and how often
        a network (`forwards`) was evaluated; {} where there was nothing to draw.
    """
    options, device = job.options, state.device
    model, codec = _ready(job.weights, job, device), job.codec.to(device)
    weak = _ready(job.weak, job, device) if job.weak else None
    evaluations = 0
    writing: list[Future[None]] = []
    clock = time.perf_counter()
    with (
        torch.inference_mode(),
        ThreadPoolExecutor(WRITERS) as pool,
        tqdm(total=len(mine), unit="image", desc="of this process" if state.num_processes > 1 else None,
             disable=not state.is_main_process) as progress,
    ):
        for start in range(0, len(mine), options.batch_size):
            stream = SampleStream(options.seed, mine[start : start + options.batch_size])
            before = model.evaluations
            z = sample_batch(job, model, weak, stream, device)
            evaluations += (model.evaluations - before) * len(z)
            images = decode_in_parts(codec, z)
            if not images.isfinite().all():
                raise ValueError(f"samples {stream.indices[0]} ... {stream.indices[-1]} are not finite with "
                                 f"--cfg {job.sampler.cfg:g} and --dtype {options.dtype}: less guidance or a wider "
                                 "dtype may help, else the weights are damaged")
            images = to_uint8(images).cpu()
            latents = z.cpu() if options.latents else [None] * len(z)
            for written in writing:
                written.result()  # raises what the writer met; one batch at most waits for the disk
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


def sample_batch(
    job: SampleJob, model: Counted, weak: Counted | None, stream: SampleStream, device: torch.device
) -> Tensor:
    """The latents (B, C, h, w) of the stream's samples."""
    path, prediction = job.weights.recipe.interpolant, job.weights.recipe.prediction
    weak_velocity = None
    if weak and job.weak:
        weak_velocity = as_velocity(as_trained(weak, job.weak.recipe), get_interpolant(path), prediction)
    noise, y = stream.randn(job.shape, device), job.labels(stream).to(device)
    return job.sampler(as_trained(model, job.weights.recipe), noise, y, path=path, prediction=prediction,
                       weak=weak_velocity, randn=stream.randn_like)


def _ready(weights: Weights, job: SampleJob, device: torch.device) -> Counted:
    # diffusers' own `to` warns of casting no module at all
    torch.nn.Module.to(weights.model, device, torch_dtype(job.options.dtype))
    return Counted(torch.compile(weights.model) if job.options.compile else weights.model)


def _draw_grid(job: SampleJob, side: int = 10) -> None:
    """The first `side` samples of the `side` most frequent classes."""
    y, sampler, recipe = job.all_labels, job.sampler, job.weights.recipe
    classes = [label for label, _ in Counter(y).most_common(side)]
    shown = [i for label in sorted(classes) for i in [j for j, other in enumerate(y) if other == label][:side]]
    images = [job.folder.read_image(i) for i in shown]
    title = f"step {recipe.step}, cfg {sampler.cfg:g}, {sampler.solver} {sampler.steps}, seed {job.options.seed}"
    save_sample_grid(images, [y[i] for i in shown], recipe.class_names, job.folder.grid, title, columns=side)
