"""Set-up of the training loop: processes, model, optimizer and data, restored from the checkpoint."""

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn as nn
from accelerate import Accelerator, InitProcessGroupKwargs
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm

from sit_atconv.checkpoints.run_folder import rewind_stats
from sit_atconv.checkpoints.training_state import TrainingState, load_checkpoint, save_checkpoint, set_aside
from sit_atconv.classification.batch_norm import GroupNorms
from sit_atconv.classification.config import Config
from sit_atconv.classification.drop_path import DropPaths
from sit_atconv.classification.evaluation import Accuracy, evaluate
from sit_atconv.classification.loading import AugmentedReader, Examples, evaluation_batches
from sit_atconv.classification.preflight import Exam, Job
from sit_atconv.classification.weights import WEIGHTS_FILE, ClassifierRecipe, save_classifier, versions
from sit_atconv.data.loading import read_ahead
from sit_atconv.runtime.commands import fail, user_errors
from sit_atconv.runtime.devices import has_fused_optimizers, on_cpu, prepare_device
from sit_atconv.runtime.provenance import record_provenance
from sit_atconv.runtime.settings import differences
from sit_atconv.training.guards import (
    Agreement,
    FiniteWatch,
    StopRequest,
    leave_signals_to_the_trainer,
    stop_request,
)
from sit_atconv.training.schedule import agree_on_end


@dataclass(frozen=True)
class Due:
    """Actions due after a step, the same on all processes."""

    is_last: bool
    log: bool  # write a line of the log
    test: bool  # evaluate
    save: bool  # write a checkpoint
    signal: int  # number of the signal that asks the run to stop; 0 without one
    bad_step: int  # number of the first step, from 1, that was not finite; 0 without one


class Meter:
    """Loss, accuracy and speed since the last line of the log."""

    def __init__(self, device: torch.device, counts_hits: bool):
        self.device, self.counts_hits = device, counts_hits
        self._restart()

    def _restart(self) -> None:
        self.sums = torch.zeros(3, device=self.device)  # of losses, of hits, of images
        self.start, self.paused = time.perf_counter(), 0.0

    def add(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        """Adds a micro-batch: its mean loss, logits (B, num_classes) and labels (B,)."""
        hits = (logits.argmax(1) == y).sum()
        self.sums += torch.stack([loss.detach() * len(y), hits, torch.full_like(hits, len(y))])

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves a block, such as an evaluation, out of the speed."""
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Returns loss, speed and, if images are not mixed, accuracy; all processes must call it."""
        loss, hits, images = accelerator.reduce(self.sums, "sum").tolist()
        line = {"loss": loss / images, "images_per_second": images / (time.perf_counter() - self.start - self.paused)}
        if self.counts_hits:
            line["train_top1"] = hits / images
        self._restart()
        return line


@dataclass
class Session:
    """Everything that the training loop uses."""

    job: Job
    accelerator: Accelerator
    net: nn.Module  # the model being trained
    model: Callable[[Tensor], Tensor]  # the same model, compiled if asked for
    ema: ModelEmaV3
    norms: GroupNorms
    paths: DropPaths
    optimizer: torch.optim.Optimizer
    prepared: torch.optim.Optimizer  # accelerate's wrapper of the optimizer
    state: TrainingState  # saved in checkpoints
    computed_on: dict  # all that the exact bits of the weights depend on, apart from the state
    batches: Generator[Examples, None, None]  # the micro-batches of this process, on the device
    meter: Meter
    watch: FiniteWatch
    stop: StopRequest
    agreement: Agreement
    last_checkpoint: Path | None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.net.parameters() if p.requires_grad]

    def average_gradients(self) -> None:
        """Replaces gradients by their mean over processes."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        mean = self.accelerator.reduce(parameters_to_vector(gradients), "mean")
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def decide(self, step: int) -> Due:
        """Decides what is due after a step (1-based); all processes must call it and get the same answer."""
        train, last = self.job.config.train, self.job.schedule.steps
        save = step == last or step % train.checkpoint_every == 0
        test = step == last or step % train.eval_every == 0
        log = save or test or step % train.log_every == 0
        log, signal, bad_step, _ = agree_on_end(log, self.stop, self.watch, self.agreement)
        return Due(step == last, log, test, save or signal > 0, signal, bad_step)

    def evaluate(self) -> dict[str, Accuracy]:
        """Returns the accuracy of the weights as trained and of their EMA on data.val."""
        return evaluate_weights(self.job, {"raw": self.net, "ema": self.ema.module}, self.accelerator)

    def save(self, step: int) -> None:
        """Writes a checkpoint from rank 0."""
        train = self.job.config.train
        self.last_checkpoint = save_checkpoint(
            self.job.config.out,
            self.state,
            ClassifierRecipe(self.job.train.class_names, step),
            write=save_classifier,
            keep=train.keep_checkpoints,
            computed_on=self.computed_on,
        )


def evaluate_weights(exam: Exam, models: dict[str, nn.Module], accelerator: Accelerator) -> dict[str, Accuracy]:
    """Returns the accuracy of models on data.val; all processes must call it."""
    batches = evaluation_batches(
        exam.val,
        exam.transform,
        exam.config.train.group_size,
        num_workers=exam.config.data.num_workers,
        device=accelerator.device,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    with user_errors(everywhere=True):
        return evaluate(models, batches, accelerator)


def start_processes(config: Config) -> Accelerator:
    """Starts the processes and prepares their devices."""
    train = config.train
    accelerator = Accelerator(
        cpu=on_cpu(),
        mixed_precision="no" if train.precision == "fp32" else train.precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=1))],  # the others wait while rank 0 saves
    )
    prepare_device(accelerator.device, train.cpu_threads)
    return accelerator


def set_up(job: Job, to_release: contextlib.ExitStack) -> Session:
    """Starts the processes, moves everything to the device and restores the checkpoint.

    Exits with an error that only shows now: processes that disagree, a checkpoint of another model.
    """
    config, train, run, found, order = job.config, job.config.train, job.config.out, job.found, job.order
    stop = to_release.enter_context(contextlib.closing(stop_request(run)))
    accelerator = start_processes(config)
    assert accelerator.num_processes == order.num_processes
    agreement = Agreement()
    if agreement.largest(found.step, -found.step, now=True) != [found.step, -found.step]:
        fail(
            f"the processes find {run} at different steps, here {found.step}: put it on a disk that all nodes share",
            everywhere=True,
        )
    device, net = accelerator.device, job.net.to(accelerator.device)

    # Build the EMA and the optimizer, and restore the checkpoint.
    ema = ModelEmaV3(net, decay=train.ema_decay)
    optimizer = create_optimizer_v2(
        net, "adamw", lr=train.lr, weight_decay=train.weight_decay, fused=has_fused_optimizers(device)
    )
    prepared = accelerator.prepare(optimizer)
    state = TrainingState(net, {train.ema_decay: ema.module}, optimizer, accelerator.scaler, weights_file=WEIGHTS_FILE)
    computed_on = {
        "processes": accelerator.num_processes,
        "accumulation": train.accumulation,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "compile": train.compile,
        **versions(),
    }
    with user_errors():
        before = load_checkpoint(found.checkpoint, state) if found.checkpoint else computed_on
        if accelerator.is_main_process:
            for damaged in found.damaged:
                set_aside(damaged)
            config.save(job.describe_data())
            record_provenance(run)
            rewind_stats(run, found.step)
            introduce(job, accelerator, differences(before, computed_on))

    # Change the parts of the model that draw or normalise, and start loading data.
    norms = GroupNorms(net, job.num_groups, train.batch_size // train.group_size)
    paths = DropPaths(net, train.batch_size, order.micro_batch, train.seed)
    reader = AugmentedReader(job.train, job.augmentation, train.seed)
    batches = read_ahead(
        reader,
        order.starting_at(found.step),
        config.data.num_workers,
        device,
        leave_signals_to_the_trainer,
        "the training data",
    )
    to_release.enter_context(contextlib.closing(batches))
    return Session(
        job,
        accelerator,
        net.train(),
        torch.compile(net) if train.compile else net,
        ema,
        norms,
        paths,
        optimizer,
        prepared,
        state,
        computed_on,
        batches,
        Meter(device, counts_hits=not job.mixing.is_on),
        FiniteWatch(),
        stop,
        agreement,
        found.checkpoint,
    )


def introduce(job: Job, accelerator: Accelerator, changes: list[str]) -> None:
    """Prints what will be trained, on which data and devices, with all warnings."""
    config, train, step = job.config, job.config.train, job.found.step
    threads = f" with {torch.get_num_threads()} threads" if accelerator.device.type == "cpu" else ""
    lines = [
        f"warning: {damaged} is damaged: {problem}. It is renamed to damaged-{damaged.name}"
        for damaged, problem in job.found.damaged.items()
    ]
    lines.append(
        f"{'resuming' if step else 'training'} {config.out}: {config.model}, "
        f"{sum(p.numel() for p in job.net.parameters()) / 1e6:.1f}M parameters, {len(job.train)} images of "
        f"{len(job.train.labels)} classes at {config.data.image_size} px, batch {train.batch_size}, "
        f"{accelerator.num_processes} x {accelerator.device.type}{threads}, {train.precision}, step {step} of "
        f"{job.schedule.steps}{', compiled' if train.compile else ''}"
    )
    if changes:
        lines.append(
            f"resuming with {', '.join(changes)}: the weights will equal those of an uninterrupted run up to "
            "rounding, not bitwise"
        )
    for line in lines:
        tqdm.write(line, file=sys.stderr)
