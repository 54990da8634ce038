"""Set-up of the training loop: processes, model, optimizer and data, restored from the checkpoint."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor
from tqdm import tqdm

from sit_atconv.checkpoints.recipe import Recipe
from sit_atconv.checkpoints.run_folder import rewind_quality, rewind_stats
from sit_atconv.checkpoints.snapshots import rewind_snapshots
from sit_atconv.checkpoints.training_state import TrainingState, load_checkpoint, set_aside
from sit_atconv.data.codecs import Codec
from sit_atconv.data.loading import Batch, load_batches
from sit_atconv.data.pixels import to_float
from sit_atconv.data.sources import untrained_classes
from sit_atconv.flow import Objective
from sit_atconv.flow.auxiliary import AuxiliaryInputs, HiddenTap
from sit_atconv.models import SiT
from sit_atconv.models.costs import multiply_adds
from sit_atconv.runtime.commands import fail, user_errors
from sit_atconv.runtime.devices import on_cpu, prepare_device
from sit_atconv.runtime.names import name_classes
from sit_atconv.runtime.provenance import record_provenance
from sit_atconv.runtime.settings import differences, flatten
from sit_atconv.training.ema import Averages
from sit_atconv.training.guards import Agreement, FiniteWatch, StopRequest, leave_signals_to_the_trainer, stop_request
from sit_atconv.training.held_out import HeldOut
from sit_atconv.training.meter import Meter, Tracker, peak_tflops
from sit_atconv.training.optimizers import make_optimizer
from sit_atconv.training.preflight import Job
from sit_atconv.training.unreadable import Unreadable


@dataclass
class Session:
    """Everything that the training loop uses."""

    accelerator: Accelerator
    codec: Codec  # on the device
    net: SiT  # the model being trained, unwrapped
    model: nn.Module  # the same model, distributed and compiled
    tapped: HiddenTap  # the same model as the loop calls it: it keeps hidden tokens for the auxiliary loss
    auxiliary: nn.Module | None  # the auxiliary loss as the loop calls it
    averages: Averages
    optimizer: torch.optim.Optimizer
    prepared: torch.optim.Optimizer  # accelerate's wrapper of the optimizer
    state: TrainingState  # saved in checkpoints
    computed_on: dict  # all that the exact bits of the weights depend on, apart from the state
    batches: Iterator[Batch]  # the micro-batches of this process, on the device
    held_out_loss: HeldOut
    meter: Meter
    tracker: Tracker
    unreadable: Unreadable
    watch: FiniteWatch
    stop: StopRequest
    agreement: Agreement
    empty_classes: list[int]  # labels without images to train on
    is_encoded: bool  # True if batches hold latents instead of pixels
    last_checkpoint: Path | None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the order in which their norms are added up."""
        return [p for p in self.state.parameters().values() if p.requires_grad]

    @property
    def trained(self) -> list[nn.Module]:
        """The model and the auxiliary loss, whose gradients are accumulated."""
        return [module for module in (self.model, self.auxiliary) if module is not None]

    def held_out(self, accelerator: Accelerator) -> dict[str, float]:
        """Returns the loss of the EMA weights on the held-out images of all processes, for the log."""
        loss = self.held_out_loss.loss(self.averages.first, accelerator.autocast)
        total, count = accelerator.reduce(loss, "sum").tolist()
        return {"held_out_loss": total / count} if count else {}

    def added_terms(
        self, batch: Batch, latents: Tensor, objective: Objective, draw, random: Tensor
    ) -> dict[str, Tensor]:
        """Returns the terms (B,) of the auxiliary loss, after the model was called for this micro-batch."""
        assert self.auxiliary is not None
        y, hidden = self.tapped.take()
        pixels = batch.extras.get("pixels", None if self.is_encoded else batch.inputs)
        return self.auxiliary(
            AuxiliaryInputs(
                data=latents,
                y=y,
                hidden=hidden,
                pixels=None if pixels is None else to_float(pixels),
                features=batch.extras.get("features"),
                objective=objective,
                draw=draw,
                random=random,
                average=self.averages.first,
            )
        )

    def say(self, text: str) -> None:
        """Prints a line on stderr, above the progress bar; on rank 0 only."""
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stderr)

    def recipe(self, job: Job, step: int) -> Recipe:
        """Returns the recipe of the weights of this step."""
        config = job.config
        return Recipe(
            config.flow.path,
            config.prediction,
            self.codec.describe(),
            [*job.data.class_names],
            step,
            null_label_trained=job.null_label_trained,
            empty_classes=self.empty_classes,
            objective=config.objective,
            backbone=config.backbone,
            trained_cfg=config.flow.trained_cfg,
        )

    def note_unreadable(self, job: Job) -> None:
        """Records the images that any process could not read, and prints a warning for new ones."""
        met = self.agreement.gather(self.unreadable.met)
        for name, reason in self.unreadable.record(met, write=self.accelerator.is_main_process).items():
            self.say(f"warning: {name} {reason}: left out, and recorded in {self.unreadable.path}")
        known, self.empty_classes = self.empty_classes, classes_without(job, self.unreadable)
        if emptied := sorted({*self.empty_classes} - {*known}):
            self.say(f"warning: no images to train on for {name_classes(job.data.class_names, emptied)}")


def set_up(job: Job, to_release: contextlib.ExitStack) -> Session:
    """Starts the processes, moves everything to the device and restores the checkpoint.

    Exits with an error that only shows now: processes that disagree, a checkpoint of another model, a tracker that
    cannot start.
    """
    config, train, run, found = job.config, job.config.train, job.config.out, job.found
    stop = to_release.enter_context(contextlib.closing(stop_request(run)))
    watch = FiniteWatch()

    # Start the processes.
    accelerator = Accelerator(
        cpu=on_cpu(),
        mixed_precision="no" if train.precision == "fp32" else train.precision,
        gradient_accumulation_steps=train.accumulation,
        log_with=train.tracker,
        project_dir=run,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(hours=1)),  # the others wait while rank 0 saves and draws
        ],
    )
    assert accelerator.num_processes == job.order.num_processes
    agreement = Agreement()
    if agreement.largest(found.step, -found.step, now=True) != [found.step, -found.step]:
        fail(
            f"the processes find {run} at different steps, here {found.step}: put it on a disk that all nodes share",
            everywhere=True,
        )
    device = accelerator.device
    prepare_device(device, train.cpu_threads, train.tf32)

    # Build averages and optimizer, and wrap the model.
    codec, net = job.codec.to(device), job.net.to(device)
    if train.activation_checkpointing:
        net.enable_gradient_checkpointing()
    auxiliary: nn.Module | None = config.auxiliary.to(device) if config.auxiliary is not None else None
    averages = Averages(net, train.ema_decays, train.profile, auxiliary)
    kind, options = config.optimizer
    with user_errors():
        modules = [net] if auxiliary is None else [net, auxiliary]
        optimizer = make_optimizer(kind, modules, train.lr, train.weight_decay, options)
    model, prepared = accelerator.prepare(net, optimizer)
    if train.compile:
        model = torch.compile(model)
    tapped = HiddenTap(model, net)
    state = TrainingState(net, averages.models, optimizer, accelerator.scaler, auxiliary, averages.auxiliary)
    if auxiliary is not None and any(p.requires_grad for p in auxiliary.parameters()):
        auxiliary = accelerator.prepare(auxiliary)

    # Restore the checkpoint, and write to the run's folder.
    computed_on = {
        "processes": accelerator.num_processes,
        "accumulation": train.accumulation,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "compile": train.compile,
        "torch": torch.__version__,
    }
    is_restart = not found.checkpoint and (run / "config.yaml").exists()
    with user_errors():
        before = load_checkpoint(found.checkpoint, state) if found.checkpoint else computed_on
        check_micro_batches(job, before, computed_on)
        unreadable = Unreadable(run, resumes=found.checkpoint is not None)
        if accelerator.is_main_process:
            for damaged in found.damaged:
                set_aside(damaged)
            config.save(run, job.description)
            record_provenance(run)
            rewind_stats(run, found.step)
            rewind_snapshots(run, found.step)
            rewind_quality(run, found.step)
            if not found.checkpoint:
                unreadable.path.unlink(missing_ok=True)
        tracker = Tracker(accelerator, train.tracker, run, flatten(config.options), found.step)
    empty_classes = classes_without(job, unreadable) if unreadable.recorded else job.empty_classes
    if accelerator.is_main_process:
        introduce(job, accelerator, unreadable, empty_classes, is_restart, differences(before, computed_on))

    # Start loading data.
    batches = to_release.enter_context(
        contextlib.closing(
            load_batches(
                job.data,
                job.order.starting_at(found.step),
                config.data.num_workers,
                device,
                leave_signals_to_the_trainer,
                skip_unreadable=config.data.skip_unreadable,
                extra=job.extra,
                is_needed=lambda step: config.auxiliary_of(step) is not None,
            )
        )
    )
    with user_errors(everywhere=True):
        held_out_loss = HeldOut(
            job.data,
            job.held_out.tolist(),
            codec,
            config.flow,
            batch_size=job.order.micro_batch,
            device=device,
            rank=job.order.rank,
            num_processes=job.order.num_processes,
            skip_unreadable=config.data.skip_unreadable,
        )
    added = config.auxiliary.multiply_adds(net) if config.auxiliary is not None else 0.0
    meter = Meter(
        device,
        (3 + config.flow.forwards) * 2 * multiply_adds(net, net.grid_size) / 1e9,
        train.peak_tflops or peak_tflops(device, train.precision, train.tf32),
        2 * added / 1e9,
    )
    session = Session(
        accelerator,
        codec,
        net,
        model,
        tapped,
        auxiliary,
        averages,
        optimizer,
        prepared,
        state,
        computed_on,
        batches,
        held_out_loss,
        meter,
        tracker,
        unreadable,
        watch,
        stop,
        agreement,
        empty_classes,
        job.data.is_encoded,
        found.checkpoint,
    )
    unreadable.note(held_out_loss.unreadable)
    settle_gradient_exchange(job, session)
    return session


def check_micro_batches(job: Job, before: dict, now: dict) -> None:
    """Raises ValueError if the loss depends on the micro-batches, and a resumed run has others."""
    parts = [name for name in ("processes", "accumulation") if before.get(name) != now[name]]
    loss = job.config.auxiliary
    if loss is not None and loss.couples_samples and parts:
        changes = ", ".join(f"{name} {before.get(name)} -> {now[name]}" for name in parts)
        raise ValueError(
            f"{type(loss).__name__} compares the samples of a micro-batch, so its loss depends on their number "
            f"({changes}): resume with the former"
        )


def classes_without(job: Job, unreadable: Unreadable) -> list[int]:
    """Returns the labels without images to train on; held-out and unreadable images do not count."""
    return untrained_classes(job.data, np.union1d(job.held_out, job.data.find(unreadable.recorded)))


def introduce(
    job: Job,
    accelerator: Accelerator,
    unreadable: Unreadable,
    empty_classes: list[int],
    is_restart: bool,
    changes: list[str],
) -> None:
    """Prints what will be trained, on which data and devices, with all warnings."""
    config, train, step = job.config, job.config.train, job.found.step
    threads = f" with {torch.get_num_threads()} threads" if accelerator.device.type == "cpu" else ""
    lines = [
        f"warning: {damaged} is damaged: {problem}. It is renamed to damaged-{damaged.name}"
        for damaged, problem in job.found.damaged.items()
    ]
    if is_restart:
        lines.append(f"{config.out} has no checkpoint yet: it starts from scratch with the options and data given now")
    lines.append(
        f"{'resuming' if step else 'training'} {config.out}: {job.net.num_parameters(only_trainable=True) / 1e6:.1f}M "
        f"parameters, {job.order.num_images} images of {job.net.config.num_classes} classes as "
        f"{'x'.join(map(str, job.latent_shape))}, batch {train.batch_size}, {accelerator.num_processes} x "
        f"{accelerator.device.type}{threads}, {train.precision}, step {step} of {train.steps}"
        f"{', compiled' if train.compile else ''}"
    )
    lines += job.start.lines
    if empty_classes:
        lines.append(f"warning: no images to train on for {name_classes(job.data.class_names, empty_classes)}")
    if unreadable.recorded:
        lines.append(f"{len(unreadable.recorded)} images were left out as unreadable so far: see {unreadable.path}")
    if changes:
        lines.append(
            f"resuming with {', '.join(changes)}: the weights will equal those of an uninterrupted run up to "
            "rounding, not bitwise"
        )
    for line in lines:
        tqdm.write(line, file=sys.stderr)


def settle_gradient_exchange(job: Job, session: Session) -> None:
    """Runs one dummy backward, after which DDP rebuilds its buckets and so changes the order of summation.

    Doing it now keeps a resumed run bitwise equal to an uninterrupted one.
    """
    accelerator, loss, images = session.accelerator, job.config.auxiliary, job.order.micro_batch
    if accelerator.num_processes > 1:
        x = torch.zeros(images, *job.latent_shape, device=accelerator.device)
        t = torch.zeros(images, device=x.device)
        two_times = session.net.config.get("two_times")
        session.tapped.serve(loss)
        output = session.tapped(x, t, t.long(), *([t] if two_times else [])).float().sum()
        if loss is not None and session.auxiliary is not None:
            y, hidden = session.tapped.take()
            objective = job.config.flow
            draw = objective.draw(x.shape, torch.Generator(x.device))
            inputs = AuxiliaryInputs(
                data=x,
                y=y,
                hidden=hidden,
                objective=objective,
                draw=draw,
                random=t,
                average=session.averages.first,
                **loss.blank_inputs(images, x.device),
            )
            output = output + sum(term.sum() for term in session.auxiliary(inputs).values())
        accelerator.backward(output)
        session.prepared.zero_grad()
