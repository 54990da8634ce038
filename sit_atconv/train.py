"""Trains SiT with ATConv or attention by flow matching.

    accelerate launch sit_atconv/train.py [--config configs/NAME.yaml] [--group.option VALUE ...]

Without --config it trains the embedded digits. The same command again goes on from the newest checkpoint: data order,
noise, times, label dropout and learning rate are functions of (seed, step), so a resumed run repeats nothing and ends
where an undisturbed one does.
"""

import copy
import math
import os
import shlex
import sys
import time

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm

from sit_atconv.checkpointing.runs import (
    TrainingState,
    append_stats,
    checkpoint_step,
    load_checkpoint,
    newest_checkpoint,
    read_stats,
    rewind_stats,
    save_checkpoint,
)
from sit_atconv.checkpointing.weights import Recipe
from sit_atconv.commands import fail, is_main_process, user_errors
from sit_atconv.config import parse
from sit_atconv.data.order import BatchOrder, step_seed
from sit_atconv.data.pixels import to_float
from sit_atconv.data.sources import describe_data
from sit_atconv.devices import keep_freed_memory, on_cpu, share_cores
from sit_atconv.generation import draw_preview
from sit_atconv.models import SiT
from sit_atconv.pictures import save_loss_curve


def main(argv: list[str] | None = None) -> None:
    config = parse(argv)
    run, train = config.out, config.train
    sampling = f"python sample/generate.py --ckpt {shlex.quote(str(run))}"

    # All that can be wrong with what was asked is found here, before any process group starts.
    with user_errors():
        data, codec = config.data.open()
        order = BatchOrder(
            len(data),
            train.batch_size,
            seed=train.seed,
            accumulation=train.accumulation,
            rank=int(os.environ.get("RANK", "0")),
            num_processes=int(os.environ.get("WORLD_SIZE", "1")),
            mirror=config.data.mirror,
        )
        torch.manual_seed(train.seed)
        net = SiT(
            **config.model,
            num_classes=len(data.class_names),
            in_channels=codec.channels,
            input_size=codec.latent_size(data.image_size),
        )
        config.check_guidance(net.null_label)
        checkpoint = newest_checkpoint(run)
        start = checkpoint_step(checkpoint) if checkpoint else 0
        description = describe_data(data, codec)
        config.check_resumable(start, description)
    if start == train.steps:
        if is_main_process():
            print(f"{run} is complete: {start} steps, in {checkpoint}\nsample: {sampling}")
        return

    accelerator = Accelerator(
        cpu=on_cpu(), mixed_precision=train.mixed_precision, gradient_accumulation_steps=train.accumulation
    )
    assert accelerator.num_processes == order.num_processes
    device, main_process = accelerator.device, accelerator.is_main_process
    if device.type == "cpu":
        share_cores(train.cpu_threads)
        keep_freed_memory()
    codec = codec.to(device)
    net = net.to(device)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=train.lr, weight_decay=train.weight_decay, fused=device.type in ("cuda", "cpu", "mps", "xpu")
    )
    model, optimizer = accelerator.prepare(net, optimizer)
    if train.compile:
        model = torch.compile(model)
    state = TrainingState(net, ema, optimizer, accelerator.scaler)
    if checkpoint:
        with user_errors():
            load_checkpoint(checkpoint, state)
    if main_process:
        run.mkdir(parents=True, exist_ok=True)
        config.save(run, description)
        rewind_stats(run, start)
        size = sum(p.numel() for p in parameters) / 1e6
        where = f"{accelerator.num_processes} x {device.type}"
        if device.type == "cpu":
            where += f" with {torch.get_num_threads()} threads"
        print(
            f"{'resuming' if start else 'training'} {run}: {size:.1f}M parameters, {len(data)} images of "
            f"{len(data.class_names)} classes as {codec.channels}x{net.config.input_size}x{net.config.input_size}, "
            f"batch {train.batch_size}, {where}, {train.precision}, "
            f"step {start} of {train.steps}{', compiled' if train.compile else ''}",
            file=sys.stderr,
        )

    averaged = [p for p, q in zip(ema.parameters(), net.parameters(), strict=True) if q.requires_grad]
    generator = torch.Generator(device)
    loader = DataLoader(
        data,
        batch_sampler=order.starting_at(start),
        num_workers=config.data.num_workers,
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)
    loss_sum, loss_count, clock = torch.zeros((), device=device), 0, time.perf_counter()

    progress = tqdm(range(start, train.steps), initial=start, total=train.steps, disable=not main_process, unit="step")
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step)

        for micro_batch in range(train.accumulation):
            generator.manual_seed(step_seed(train.seed, step, micro_batch, accelerator.process_index))
            inputs, y = (tensor.to(device, non_blocking=True) for tensor in next(batches))
            stored = inputs if data.is_encoded else codec.encode(to_float(inputs))
            latents = codec.latents(stored, generator)

            with accelerator.accumulate(model):  # gradients are averaged over processes in the last micro-batch only
                loss = config.flow.loss(model, latents, y, generator, net.null_label).mean()
                accelerator.backward(loss)
                if train.max_grad_norm and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters, train.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            loss_sum += loss.detach()
            loss_count += 1

        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, 1 - train.ema_decay)

        done = step + 1
        last = done == train.steps
        saving = done % train.checkpoint_every == 0 or last
        drawing = done % config.preview.every == 0 or last
        if done % train.log_every == 0 or saving:  # so what is saved has been seen to be finite
            loss = accelerator.reduce(loss_sum / loss_count, "mean").item()
            seconds = time.perf_counter() - clock
            rate = loss_count * train.batch_size / train.accumulation / seconds
            if not math.isfinite(loss):
                fail(f"the loss is {loss} at step {done}: lower train.lr or set train.max_grad_norm; "
                     f"the last checkpoint is {newest_checkpoint(run)}")
            progress.set_postfix(loss=f"{loss:.4f}")
            if main_process:
                append_stats(run, step=done, epoch=done / order.steps_per_epoch, loss=loss,
                             lr=train.learning_rate(step), images_per_second=rate)
            loss_sum, loss_count, clock = torch.zeros_like(loss_sum), 0, time.perf_counter()

        if main_process and (saving or drawing):
            recipe = Recipe(config.flow.path, config.flow.prediction, codec.describe(), list(data.class_names), done)
            if saving:
                save_checkpoint(run, state, recipe, train.ema_decay, train.keep_checkpoints)
                stats = read_stats(run)
                save_loss_curve([s["step"] for s in stats], [s["loss"] for s in stats], run / "loss.png", str(run))
            if drawing:
                draw_preview(ema, codec, recipe, config.preview, run / "samples" / f"step-{done:07d}.png")
        if saving or drawing:
            accelerator.wait_for_everyone()
            clock = time.perf_counter()

    if main_process:
        print(f"{run} is complete: {train.steps} steps, in {newest_checkpoint(run)}\n"
              f"loss: {run / 'loss.png'}, samples: {run / 'samples'}\n"
              f"sample: {sampling}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
