"""Checks of a run before any process group starts: options, data, model, folder."""

import contextlib
import dataclasses
import os
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn

from sit_atconv.checkpoints.run_folder import checkpoint_step, list_checkpoints
from sit_atconv.checkpoints.training_state import (
    Resumable,
    checkpoint_bytes,
    checkpoints_at_once,
    find_resumable,
    set_aside,
)
from sit_atconv.classification.config import Config, Schedule
from sit_atconv.classification.image_sets import ImageSet, check_same_classes, open_images
from sit_atconv.classification.loading import RepeatedOrder, Transform
from sit_atconv.classification.mixing import Mixing
from sit_atconv.classification.weights import (
    WEIGHTS_FILE,
    build_model,
    find_weights,
    load_initial,
    normalisation_of,
    other_classes,
    read_weights,
)
from sit_atconv.runtime.commands import is_main_process
from sit_atconv.runtime.files import check_room, exclusive, gigabytes


@dataclass(frozen=True)
class Exam:
    """Images to evaluate a model on, and the model."""

    config: Config
    val: ImageSet
    transform: Transform  # of evaluation
    net: nn.Module  # as initialised, or with the weights of --init-from
    found: Resumable  # the checkpoint to evaluate, or to resume from


@dataclass(frozen=True)
class Job(Exam):
    """A training run that passed all checks."""

    train: ImageSet
    augmentation: Transform
    order: RepeatedOrder  # images of every micro-batch of this process
    num_groups: int  # of BatchNorm and Mixup in one micro-batch
    mixing: Mixing
    schedule: Schedule

    def describe_data(self) -> dict:
        """Returns the description of the data, for data.json."""
        return {"train": self.train.describe(), "val": self.val.describe()}


def prepare(config: Config, to_release: contextlib.ExitStack) -> Job | None:
    """Checks a training run and opens its data; rank 0 then locks its folder, until `to_release` exits.

    Returns None if there is nothing to do: for a dry run, or a complete run.

    Raises:
        ValueError, OSError: an option is impossible; the message names it and the remedy.
    """
    run, data, train = config.out, config.data, config.train
    if data.train is None and data.val is not None:
        raise ValueError(f"there are images to evaluate on ({data.val}), and none to train on: give --data.train")
    images = open_images(data.train, "train", data.channels)
    val = open_images(data.val, "validation", data.channels)
    check_same_classes(images, val)
    num_classes, num_processes = len(images.labels), int(os.environ.get("WORLD_SIZE", "1"))
    order = RepeatedOrder(
        len(images),
        train.batch_size,
        repeats=data.repeats,
        group_size=train.group_size,
        seed=train.seed,
        accumulation=train.accumulation,
        rank=int(os.environ.get("RANK", "0")),
        num_processes=num_processes,
    )
    num_groups = train.groups_in(order.micro_batch, num_processes)
    mixing = Mixing(
        num_classes,
        mixup=data.mixup,
        cutmix=data.cutmix,
        prob=data.mix_prob,
        switch_prob=data.switch_prob,
        smoothing=data.smoothing,
        group_size=train.group_size,
        seed=train.seed,
    )
    schedule = config.schedule(order.steps_per_epoch)
    torch.manual_seed(train.seed)
    net = build_model(config, num_classes)
    normalisation = normalisation_of(net)
    saved = list_checkpoints(run)
    if config.init_from and not saved:
        file = find_weights(config.init_from)
        load_initial(net, file, read_weights(file), config.reset_head)
        if is_main_process():
            print(f"started from {file}", file=sys.stderr)
            if not config.reset_head and (other := other_classes(file, images.class_names)):
                print(f"warning: {other}; --reset-head true trains a new classifier", file=sys.stderr)
    job = Job(
        config,
        val,
        data.evaluation_transform(normalisation),
        net,
        Resumable(None, 0, {}),
        images,
        data.training_transform(normalisation),
        order,
        num_groups,
        mixing,
        schedule,
    )
    if config.dry_run:
        if is_main_process():
            print(dry_run(job))
        return None

    # Check the run's folder and lock it.
    config.check_resumable(job.describe_data())
    if not saved or checkpoint_step(saved[-1]) < schedule.steps:
        count = checkpoints_at_once(schedule.steps, train.checkpoint_every, train.keep_checkpoints, None)
        check_room(run, max(1, count - len(saved)) * checkpoint_bytes(net, 1))
    if is_main_process():
        to_release.enter_context(exclusive(run))
    found = find_resumable(run, WEIGHTS_FILE)

    # Stop here if the run is complete.
    if found.step > schedule.steps:
        raise ValueError(f"{run} is at step {found.step} already, beyond the {schedule.steps} steps asked for")
    if found.step == schedule.steps:
        if is_main_process():
            for damaged, problem in found.damaged.items():
                print(f"warning: {damaged} is damaged: {problem}. It is now {set_aside(damaged)}", file=sys.stderr)
            print(
                f"{run} is complete: {schedule.steps} steps, in {found.checkpoint}\n"
                f"evaluate: {config.evaluation_command()}"
            )
        return None
    return dataclasses.replace(job, found=found)


def prepare_exam(config: Config) -> Exam:
    """Opens the images of an evaluation, and the weights of --init-from or of the run's newest checkpoint.

    Raises:
        ValueError, OSError: there are no such images or weights, or they have other classes.
    """
    val = open_images(config.data.val, "validation", config.data.channels)
    found = Resumable(None, 0, {})
    if config.init_from:
        file = find_weights(config.init_from)
    else:
        found = find_resumable(config.out, WEIGHTS_FILE)
        if found.checkpoint is None:
            raise ValueError(f"{config.out} has no checkpoint to evaluate: give another --out, or --init-from WEIGHTS")
        file = found.checkpoint / "model" / WEIGHTS_FILE
    if other := other_classes(file, val.class_names):
        raise ValueError(f"{other}: give --data.val a folder with the class folders of the training")
    net = build_model(config, len(val.labels))
    load_initial(net, file, read_weights(file))
    return Exam(config, val, config.data.evaluation_transform(normalisation_of(net)), net, found)


def dry_run(job: Job) -> str:
    """Returns the report of `--dry-run`."""
    config, train, order = job.config, job.config.train, job.order
    return (
        f"{config.model}: {sum(p.numel() for p in job.net.parameters()) / 1e6:.2f}M parameters, "
        f"{len(job.train.labels)} classes\n"
        f"{len(job.train)} images to train on, {len(job.val)} to evaluate on, {config.data.image_size} px\n"
        f"{job.schedule.steps} steps of {train.batch_size} images ({order.steps_per_epoch} an epoch), "
        f"{order.micro_batch} images in a micro-batch, in groups of {train.group_size}\n"
        f"{gigabytes(checkpoint_bytes(job.net, 1))} for each checkpoint, in {config.out}"
    )
