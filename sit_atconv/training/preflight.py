"""Checks of a run before any process group starts: options, data, folder, disk."""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from sit_atconv.checkpoints.run_folder import checkpoint_step, list_checkpoints
from sit_atconv.checkpoints.training_state import (
    Resumable,
    checkpoint_bytes,
    find_resumable,
    set_aside,
)
from sit_atconv.checkpoints.warm_start import Start, start_from
from sit_atconv.data.codecs import Codec
from sit_atconv.data.data_source import DataSource
from sit_atconv.data.loading import Extra
from sit_atconv.data.order import BatchOrder, hold_out
from sit_atconv.data.sources import describe_data
from sit_atconv.models.sit import BACKBONES, SiT
from sit_atconv.runtime.commands import is_main_process
from sit_atconv.runtime.devices import on_cpu, prepare_device
from sit_atconv.runtime.files import check_room, exclusive
from sit_atconv.training.config import Config
from sit_atconv.training.estimate import fixed_bytes, image_bytes, report, time_step
from sit_atconv.training.meter import check_tracker


@dataclass(frozen=True)
class Job:
    """A training run that passed all checks."""

    config: Config
    data: DataSource
    codec: Codec  # from pixels to the model's inputs
    held_out: np.ndarray  # indices of the images that are never trained on
    order: BatchOrder  # images of every micro-batch of this process
    net: SiT  # as initialised, or with the weights of --init-from
    found: Resumable  # the checkpoint to resume from
    start: Start  # the weights kept of --init-from
    extra: Extra | None  # what the auxiliary loss needs from the data besides latents
    description: dict  # of the data, for data.json
    empty_classes: list[int]  # labels without images to train on
    null_label_trained: bool | None  # as in `Recipe`

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the model's inputs."""
        return self.codec.channels, self.net.config.input_size, self.net.config.input_size


def prepare(
    config: Config,
    sampling: str,
    to_release: contextlib.ExitStack,
    check_quality: Callable[[DataSource], None] | None = None,
) -> Job | None:
    """Checks a run and opens its data; rank 0 then locks its folder, until `to_release` exits.

    `check_quality` raises a ValueError if the samples of this data cannot be evaluated.

    Returns None if there is nothing to train: for a dry run, or a complete run, for which it prints the command
    `sampling` that samples from it.

    Raises:
        ValueError, OSError: an option is impossible; the message names it and the remedy.
    """
    run, train = config.out, config.train
    rules = config.data_rules()
    data, codec = config.data.open(rules)
    held_out = hold_out(len(data), config.data.held_out)
    order = _order(config, data, held_out)
    empty_classes = config.data.find_empty_classes(data, held_out, exists=rules is not None)
    net = new_net(config, data, codec)
    config.flow.check(net, "tf32" if train.precision == "fp32" and train.tf32 and not on_cpu() else train.precision)
    config.check_previews(net, net.null_label)
    extra = build_auxiliary(config, net, data)
    if config.auxiliary is not None and config.auxiliary.couples_samples and order.micro_batch < 2:
        raise ValueError(
            f"auxiliary {type(config.auxiliary).__name__} compares the samples of a micro-batch, which has one image: "
            "lower train.accumulation, or raise train.batch_size"
        )
    check_tracker(train.tracker)
    if check_quality is not None:
        check_quality(data)
    if config.dry_run:
        if is_main_process():
            print(dry_run(net, config, order))
        return None

    # Check the run's folder, load the weights of --init-from, and lock the folder.
    description = describe_data(data, codec)
    if config.auxiliary is not None and (auxiliary := config.auxiliary.describe()):
        description |= {"auxiliary": auxiliary}
    config.check_resumable(description)
    saved, start = list_checkpoints(run), Start([], False)
    if not saved or checkpoint_step(saved[-1]) < train.steps:
        count = train.checkpoints_at_once
        size = checkpoint_bytes(net, len(train.ema_decays), config.auxiliary)
        check_room(run, max(1, count - len(saved)) * size + config.snapshots_bytes(net))
    if config.init_from and not saved:
        start = start_from(
            net,
            config.init_from,
            config.flow.path,
            config.prediction,
            codec.describe(),
            class_names=[*data.class_names],
            objective=config.objective,
            auxiliary=config.auxiliary,
        )
    if is_main_process():
        to_release.enter_context(exclusive(run))
    found = find_resumable(run)
    null_label_trained = config.flow.class_dropout_prob > 0 or start.null_label_trained
    if found.checkpoint and not null_label_trained:
        recipe = json.loads((found.checkpoint / "model" / "recipe.json").read_text())
        null_label_trained = recipe.get("null_label_trained")
        if null_label_trained is None and not config.init_from:  # a recipe older than this field
            null_label_trained = False
    config.check_previews(net, None if null_label_trained is False else net.null_label)

    # Stop here if the run is complete.
    if found.step > train.steps:
        raise ValueError(f"{run} is at step {found.step} already, beyond train.steps {train.steps}: raise train.steps")
    if found.step == train.steps:
        if is_main_process():
            for damaged, problem in found.damaged.items():
                print(f"warning: {damaged} is damaged: {problem}. It is now {set_aside(damaged)}", file=sys.stderr)
            print(f"{run} is complete: {train.steps} steps, in {found.checkpoint}\nsample: {sampling}")
        return None
    return Job(
        config,
        data,
        codec,
        held_out,
        order,
        net,
        found,
        start,
        extra,
        description,
        empty_classes,
        null_label_trained,
    )


def _order(config: Config, data: DataSource, held_out: np.ndarray) -> BatchOrder:
    return BatchOrder(
        len(data),
        config.train.batch_size,
        seed=config.train.seed,
        accumulation=config.train.accumulation,
        rank=int(os.environ.get("RANK", "0")),
        num_processes=int(os.environ.get("WORLD_SIZE", "1")),
        mirror=config.data.mirror,
        held_out=held_out.tolist(),
    )


def new_net(config: Config, data: DataSource, codec: Codec) -> SiT:
    torch.manual_seed(config.train.seed)
    return BACKBONES.find(config.backbone or "SiT")(
        **config.model,
        num_classes=len(data.class_names),
        in_channels=codec.channels,
        input_size=codec.latent_size(data.image_size),
    )


def build_auxiliary(config: Config, net: SiT, data: DataSource) -> Extra | None:
    """Builds the auxiliary loss, and returns what it needs from the data besides latents.

    Raises:
        ValueError: it needs pixels, features or a block that do not exist.
    """
    auxiliary = config.auxiliary
    if auxiliary is None:
        return None
    name = type(auxiliary).__name__
    auxiliary.image_shape = (data.channels, data.image_size, data.image_size)
    extra = auxiliary.check(net, data.features)
    if extra == "pixels" and data.is_encoded and not data.has_pixels:
        features = f"features of {data.features['encoder']} only" if data.features else "neither pixels nor features"
        raise ValueError(
            f"auxiliary {name} needs pixels, and {config.data.latents} holds {features}: give the folder that was "
            "encoded as --data.pixels, or encode again with --pixels or --features"
        )
    if auxiliary.block is not None and not 1 <= auxiliary.block <= net.config.depth:
        raise ValueError(
            f"auxiliary {name} needs block {auxiliary.block}, and the model has blocks 1 to {net.config.depth}"
        )
    auxiliary.build(net)
    return extra if data.is_encoded else None


def dry_run(net: SiT, config: Config, order: BatchOrder) -> str:
    """Returns the report of `--dry-run`, measured on this process's device."""
    return report(net, config, order, prepared_device(config))


def measure_step(config: Config) -> tuple[float, SiT]:
    """Returns the seconds of a training step of one process, and the model.

    Raises:
        ValueError: not even one image fits into memory.
    """
    data, codec = config.data.open()
    net, device = new_net(config, data, codec), prepared_device(config)
    order = _order(config, data, hold_out(len(data), config.data.held_out))
    build_auxiliary(config, net, data)
    fixed = sum(fixed_bytes(net, config, 1).values())
    seconds, note = time_step(net, config, order, fixed, image_bytes(net, config, device), device)
    if seconds is None:
        raise ValueError(note)
    return seconds, net


def prepared_device(config: Config) -> torch.device:
    device = torch.device("cpu") if on_cpu() else torch.accelerator.current_accelerator()
    assert device is not None  # since there is an accelerator
    prepare_device(device, config.train.cpu_threads, config.train.tf32)
    return device
