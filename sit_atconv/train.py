"""Trains SiT with ATConv or attention by flow matching.

    accelerate launch sit_atconv/train.py [--config configs/NAME.yaml] [--group.option VALUE ...]

Without --config it trains the embedded digits. The same command again goes on from the newest checkpoint: data order,
noise, times, label dropout and learning rate are functions of (seed, step), so a resumed run repeats nothing and ends
where an undisturbed one does. SIGTERM, SIGUSR1 and Ctrl-C save and leave. docs/training.md tells the rest.
"""

import contextlib
import json
import os
import shlex
import signal
import sys
from datetime import timedelta
from pathlib import Path

from sit_atconv.runtime.commands import (
    fail,
    is_main_process,
    leave_at_once,
    leave_on_ctrl_c,
    say_at_once,
    user_errors,
)

if __name__ == "__main__":
    leave_on_ctrl_c()  # before imports that take seconds

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from sit_atconv.checkpoints.runs import (
    TrainingState,
    append_stats,
    checkpoint_step,
    find_resumable,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    read_stats,
    rewind_stats,
    save_checkpoint,
    set_aside,
)
from sit_atconv.checkpoints.warm_start import Start, start_from
from sit_atconv.checkpoints.weights import Recipe
from sit_atconv.data.codecs import Codec
from sit_atconv.data.loading import load_batches
from sit_atconv.data.order import BatchOrder, hold_out, step_seed
from sit_atconv.data.pixels import to_float
from sit_atconv.data.sources import describe_data, name_classes, untrained_classes
from sit_atconv.models import SiT
from sit_atconv.runtime.devices import has_fused_optimizers, on_cpu, prepare_device
from sit_atconv.runtime.files import check_room, exclusive
from sit_atconv.runtime.installation import command
from sit_atconv.runtime.plots import save_loss_curves
from sit_atconv.training.config import Config, parse
from sit_atconv.training.ema import Averages, parameter_groups
from sit_atconv.training.estimate import (
    Plan,
    checkpoint_bytes,
    checkpoints_at_once,
    estimate,
    multiply_adds,
    report,
    time_step,
)
from sit_atconv.training.guards import Agreement, FiniteWatch, StopRequest, leave_signals_to_the_trainer, poisoned
from sit_atconv.training.held_out import HeldOut
from sit_atconv.training.meter import Meter, Tracker, check_tracker, peak_tflops
from sit_atconv.training.preview import draw_preview
from sit_atconv.training.unreadable import Unreadable


def main(argv: list[str] | None = None) -> None:
    config = parse(argv)
    with contextlib.ExitStack() as to_release:  # the run's folder, and the processes that load its data
        train_model(config, to_release)


def train_model(config: Config, to_release: contextlib.ExitStack) -> None:
    run, train = config.out, config.train
    sampling = f"{command('generate')} --ckpt {shlex.quote(str(run))}"

    # What can be wrong with what was asked is found here, before any process group starts.
    with user_errors():
        rules = config.data_rules()
        data, codec = config.data.open(rules)
        held_out = hold_out(len(data), config.data.held_out)
        order = BatchOrder(
            len(data),
            train.batch_size,
            seed=train.seed,
            accumulation=train.accumulation,
            rank=int(os.environ.get("RANK", "0")),
            num_processes=int(os.environ.get("WORLD_SIZE", "1")),
            mirror=config.data.mirror,
            held_out=held_out,
        )
        empty_classes = config.data.find_empty_classes(data, held_out, exists=rules is not None)
        size = codec.latent_size(data.image_size)
        torch.manual_seed(train.seed)
        net = SiT(**config.model, num_classes=len(data.class_names), in_channels=codec.channels, input_size=size)
        config.check_dropout(net.null_label)
        config.check_previews(net.null_label)
        check_tracker(train.tracker)
        plan = Plan.of(train, order)
        if config.dry_run:
            if is_main_process():
                print(dry_run(net, config, plan))
            return
        description = describe_data(data, codec)
        config.check_resumable(description)
        saved, start = list_checkpoints(run), Start([], False)
        if not saved or checkpoint_step(saved[-1]) < train.steps:
            check_room(run, max(1, checkpoints_at_once(plan) - len(saved)) * checkpoint_bytes(net, plan.num_averages))
        if config.init_from and not saved:
            start = start_from(net, config.init_from, config.flow.path, config.flow.prediction, codec.describe(),
                               class_names=[*data.class_names])
        if is_main_process():
            to_release.enter_context(exclusive(run))
        found = find_resumable(run)
        null_label_trained = config.flow.class_dropout_prob > 0 or start.null_label_trained
        if found.checkpoint and not null_label_trained:
            null_label_trained = had_trained_null_label(found.checkpoint, None if config.init_from else False)
        config.check_previews(None if null_label_trained is False else net.null_label)
        if found.step > train.steps:
            raise ValueError(f"{run} stands at step {found.step} already, beyond train.steps {train.steps}")
        if found.step == train.steps:
            if is_main_process():
                for damaged, problem in found.damaged.items():
                    print(f"warning: {damaged} is damaged: {problem}. It is now {set_aside(damaged)}", file=sys.stderr)
                print(f"{run} is complete: {train.steps} steps, in {found.checkpoint}\nsample: {sampling}")
            return

    stop = to_release.enter_context(contextlib.closing(StopRequest(
        announce=lambda: say_at_once("Ctrl-C: this step is finished and saved; a second Ctrl-C leaves at once"),
        leave=lambda: leave_at_once(f"interrupted; last checkpoint: {newest_checkpoint(run) or 'none yet'}"),
    )))
    watch = FiniteWatch()
    accelerator = Accelerator(
        cpu=on_cpu(),
        mixed_precision=train.mixed_precision,
        gradient_accumulation_steps=train.accumulation,
        log_with=train.tracker,
        project_dir=run,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(hours=1)),  # others wait while one saves and draws
        ],
    )
    assert accelerator.num_processes == order.num_processes
    agreement = Agreement()
    if agreement.largest(found.step, -found.step, now=True) != [found.step, -found.step]:
        fail(f"the processes find {run} at different steps, here {found.step}: put it on a disk that all of them see",
             everywhere=True)
    device, main_process = accelerator.device, accelerator.is_main_process
    prepare_device(device, train.cpu_threads, train.tf32)

    codec = codec.to(device)
    net = net.to(device)
    if train.activation_checkpointing:
        net.enable_gradient_checkpointing()
    averages = Averages(net, train.ema_decays, train.ema_warmup)
    groups = parameter_groups(net, train.weight_decay)
    adamw = torch.optim.AdamW(groups, lr=train.lr, fused=has_fused_optimizers(device))
    model, optimizer = accelerator.prepare(net, adamw)
    if train.compile:
        model = torch.compile(model)
    parameters = [p for p in net.parameters() if p.requires_grad]
    state = TrainingState(net, averages.models, adamw, accelerator.scaler)
    computed_on = {
        "processes": accelerator.num_processes,
        "accumulation": train.accumulation,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "compile": train.compile,
        "torch": torch.__version__,
    }
    begins_anew = not found.checkpoint and (run / "config.yaml").exists()
    with user_errors():
        before = load_checkpoint(found.checkpoint, state) if found.checkpoint else computed_on
        unreadable = Unreadable(run, resumes=found.checkpoint is not None)
        if unreadable.recorded:
            empty_classes = untrained_classes(data, np.union1d(held_out, data.find(unreadable.recorded)))
        if main_process:
            for damaged in found.damaged:
                set_aside(damaged)
            config.save(run, description)
            rewind_stats(run, found.step)
            if not found.checkpoint:
                unreadable.path.unlink(missing_ok=True)
        tracker = Tracker(accelerator, train.tracker, run, config.flat_options(), found.step)

    def say(text: str) -> None:
        if main_process:
            tqdm.write(text, file=sys.stderr)

    for damaged, problem in found.damaged.items():
        say(f"warning: {damaged} is damaged: {problem}. It is set aside as damaged-{damaged.name}")
    if begins_anew:
        say(f"{run} has no checkpoint yet: it begins anew, with the options and data given now")
    say(introduction(config, net, order, codec, accelerator, found.step))
    for line in start.lines:
        say(line)
    if empty_classes:
        say(f"warning: no image is trained on of {name_classes(data, empty_classes)}")
    if unreadable.recorded:
        say(f"{len(unreadable.recorded)} images were left out as unreadable so far: {unreadable.path}")
    if changed := [f"{key} {now} instead of {before.get(key)}" for key, now in computed_on.items()
                   if before.get(key) != now]:
        say(f"goes on with {', '.join(changed)}: an undisturbed run's weights to rounding, not to the bit")

    shape = (train.batch_size, codec.channels, size, size)
    generator = torch.Generator(device)
    batches = to_release.enter_context(contextlib.closing(load_batches(
        data, order.starting_at(found.step), config.data.num_workers, device, leave_signals_to_the_trainer,
        skip_unreadable=config.data.skip_unreadable,
    )))
    with user_errors(everywhere=True):
        test = HeldOut(data, held_out.tolist(), codec, config.flow, batch_size=plan.micro_batch, device=device,
                       rank=order.rank, num_processes=order.num_processes,
                       skip_unreadable=config.data.skip_unreadable)
    unreadable.note(test.unreadable)
    meter = Meter(device, 3 * 2 * multiply_adds(net) / 1e9,
                  train.peak_tflops or peak_tflops(device, train.precision, train.tf32))
    last_checkpoint = found.checkpoint
    settle_gradient_exchange(accelerator, model, optimizer, (plan.micro_batch, *shape[1:]))

    progress = tqdm(range(found.step, train.steps), initial=found.step, total=train.steps, disable=not main_process,
                    unit="step")
    for step in progress:
        for group in adamw.param_groups:
            group["lr"] = train.learning_rate(step)
        generator.manual_seed(step_seed(train.seed, step))
        draw = config.flow.draw(shape, generator)  # for the whole batch, on every process: all the same
        posterior = torch.randn(shape, generator=generator, device=device)
        finite = torch.ones((), dtype=torch.bool, device=device)

        for micro_batch in range(train.accumulation):
            with meter.waiting(), user_errors(everywhere=True):
                batch = next(batches)
            unreadable.note(batch.unreadable)
            rows = order.rows(micro_batch)
            stored = batch.inputs if data.is_encoded else codec.encode(to_float(batch.inputs))
            latents = codec.latents(stored, noise=posterior[rows])
            with accelerator.accumulate(model):  # gradients are averaged over processes in the last micro-batch only
                losses = config.flow.loss(model, latents, batch.y, draw[rows], net.null_label)
                losses = losses.where(batch.readable, 0.0)
                loss = losses.mean()  # over all, so that it does not depend on how the step's batch is cut
                accelerator.backward(poisoned(loss))
            meter.add(losses.detach(), draw.t[rows], batch.readable)
            finite &= loss.isfinite()

        accelerator.unscale_gradients(optimizer)
        norm = get_total_norm([p.grad for p in parameters], foreach=True)
        if train.max_grad_norm:
            clip_grads_with_norm_(parameters, train.max_grad_norm, norm)
        updated = norm.isfinite()
        if accelerator.scaler is None:
            adamw.found_inf = (~updated).float()
            finite &= updated
        else:  # withholds such an update itself and goes on at a lower scale, which must not fall for ever
            finite &= updated | (accelerator.scaler._scale >= 1)
        optimizer.step()
        optimizer.zero_grad()
        averages.update(step, updated)
        meter.add_norm(norm)

        done, stop.has_work = step + 1, True
        watch.note(done, finite)
        last = done == train.steps
        saving = last or done % train.checkpoint_every == 0
        drawing = last or done % config.preview.every == 0
        testing = len(held_out) > 0 and (last or done % train.held_out_every == 0)
        logging = saving or testing or done % train.log_every == 0
        received, bad_step, unrecorded = agreement.largest(
            stop.number, watch.look(wait=logging), len(unreadable.met), now=logging)
        if received and not logging:  # nothing is saved that has not been seen to be finite
            logging = True
            received, bad_step, unrecorded = agreement.largest(
                received, watch.look(wait=True), len(unreadable.met), now=True)
        if bad_step:
            fail(f"loss or gradient were not finite in step {bad_step}, and no weight was changed by it; last good "
                 f"checkpoint: {last_checkpoint or 'none yet'}. Start another run from it (--init-from, --out) with a "
                 "lower train.lr or with train.max_grad_norm, or look at the images of that batch: "
                 f"{order.batch(bad_step - 1)}")
        saving = saving or received > 0
        if unrecorded:
            with user_errors():
                for name, reason in unreadable.record(agreement.gather(unreadable.met), write=main_process).items():
                    say(f"warning: {name} {reason}: left out, and recorded in {unreadable.path}")
            known, empty_classes = empty_classes, untrained_classes(
                data, np.union1d(held_out, data.find(unreadable.recorded)))
            if emptied := sorted({*empty_classes} - {*known}):
                say(f"warning: no image is trained on of {name_classes(data, emptied)}")

        if logging:
            line = {"step": done, "epoch": done / order.steps_per_epoch, "lr": train.learning_rate(step)}
            line |= meter.read(accelerator)
            if testing:
                with meter.aside():
                    total, count = accelerator.reduce(test.loss(averages.first, accelerator.autocast), "sum").tolist()
                    line |= {"held_out_loss": total / count} if count else {}
            progress.set_postfix(loss=f"{line['loss']:.4f}")
            if main_process:
                with user_errors():
                    append_stats(run, line)
            tracker.log(line, done)

        if saving or drawing:
            with meter.aside():
                recipe = Recipe(config.flow.path, config.flow.prediction, codec.describe(), [*data.class_names], done,
                                null_label_trained=null_label_trained, empty_classes=empty_classes)
                with user_errors():
                    if saving and main_process:
                        last_checkpoint = save_checkpoint(
                            run, state, recipe, keep=train.keep_checkpoints, keep_every=train.keep_every,
                            computed_on=computed_on,
                        )
                if main_process:
                    try:  # a picture that cannot be drawn or written ends no training
                        save_loss_curves(read_stats(run), run / "loss.png", str(run))
                        if drawing:
                            draw_preview(averages.first, codec, recipe, config.preview,
                                         run / "samples" / f"step-{done:07d}.png")
                    except (RuntimeError, OSError) as error:
                        say(f"warning: no pictures of step {done}: {str(error).splitlines()[0]}")
                accelerator.wait_for_everyone()
        if received and not last:
            progress.close()
            if main_process:
                print(f"stopped by {signal.Signals(received).name} at step {done} of {train.steps}, saved in "
                      f"{last_checkpoint}: the same command goes on from there")
            break
    else:
        if main_process:
            print(f"{run} is complete: {train.steps} steps, in {last_checkpoint}\n"
                  f"loss: {run / 'loss.png'}, samples: {run / 'samples'}\n"
                  f"sample: {sampling}")
    tracker.end()
    accelerator.state.destroy_process_group()


def settle_gradient_exchange(accelerator: Accelerator, model, optimizer, shape: tuple[int, ...]) -> None:
    """A backward to nothing: DDP regroups gradients after its first one, and sums them in another order from then on.

    Without it the first step after a resume would differ from the same step of an undisturbed run in the last bits.
    """
    if accelerator.num_processes > 1:
        x, t = torch.zeros(shape, device=accelerator.device), torch.zeros(shape[0], device=accelerator.device)
        accelerator.backward(model(x, t, t.long()).float().sum())
        optimizer.zero_grad()


def had_trained_null_label(checkpoint: Path, if_unknown: bool | None) -> bool | None:
    """Returns what the recipe of a checkpoint says, or `if_unknown` for one older than that field."""
    trained = json.loads((checkpoint / "model" / "recipe.json").read_text()).get("null_label_trained")
    return if_unknown if trained is None else trained


def dry_run(net: SiT, config: Config, plan: Plan) -> str:
    """What the run will need, some of it measured on this process's device."""
    device = torch.device("cpu") if on_cpu() else torch.accelerator.current_accelerator()
    prepare_device(device, config.train.cpu_threads, config.train.tf32)
    found = estimate(net, plan)
    if config.train.activation_checkpointing:
        net.enable_gradient_checkpointing()
    return report(found, time_step(net.to(device), config.flow, plan, found.memory, device))


def introduction(
    config: Config, net: SiT, order: BatchOrder, codec: Codec, accelerator: Accelerator, step: int
) -> str:
    """What is about to be trained, on what."""
    threads = f" with {torch.get_num_threads()} threads" if accelerator.device.type == "cpu" else ""
    return (
        f"{'resuming' if step else 'training'} {config.out}: {net.num_parameters(only_trainable=True) / 1e6:.1f}M "
        f"parameters, {order.num_images} images of {net.config.num_classes} classes as "
        f"{codec.channels}x{net.config.input_size}x{net.config.input_size}, batch {config.train.batch_size}, "
        f"{accelerator.num_processes} x {accelerator.device.type}{threads}, {config.train.precision}, step {step} of "
        f"{config.train.steps}{', compiled' if config.train.compile else ''}"
    )


if __name__ == "__main__":
    main()
