"""Training of SiT with ATConv or attention by flow matching.

    accelerate launch sit_atconv/train.py [--config configs/NAME.yaml] [--group.option VALUE ...]

Without --config it trains on the embedded digits. The same command resumes the run from its newest checkpoint: data
order, noise, times, label dropout and learning rate are functions of (seed, step), so a resumed run ends with the same
weights as an uninterrupted one. SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and exit. See docs/training.md.
"""

import contextlib
import shlex
import signal
import sys
from typing import TYPE_CHECKING

from sit_atconv.runtime.commands import fail, is_main_process, leave_on_ctrl_c, user_errors

if __name__ == "__main__":
    leave_on_ctrl_c()  # before the imports, which take seconds

import torch
from tqdm import tqdm

from sit_atconv.checkpoints.run_folder import append_stats, checkpoint_step, read_stats
from sit_atconv.checkpoints.snapshots import save_snapshot
from sit_atconv.checkpoints.training_state import save_checkpoint
from sit_atconv.data.order import step_seed
from sit_atconv.data.pixels import to_float
from sit_atconv.runtime.dtypes import torch_dtype
from sit_atconv.runtime.installation import command
from sit_atconv.runtime.plots import save_loss_curves
from sit_atconv.training.config import Config, QualityConfig, parse
from sit_atconv.training.guards import poisoned
from sit_atconv.training.optimizers import clip_and_step
from sit_atconv.training.preflight import Job, prepare
from sit_atconv.training.preview import draw_previews
from sit_atconv.training.schedule import Due, decide
from sit_atconv.training.setup import Session, set_up

if TYPE_CHECKING:
    from sit_atconv.studies.quality import Quality


def main(argv: list[str] | None = None) -> None:
    config = parse(argv)
    sampling = f"{command('generate')} --ckpt {shlex.quote(str(config.out))}"
    with contextlib.ExitStack() as to_release:  # the lock of the run's folder, and the data loader's processes
        with user_errors():
            quality = open_quality(config)
            job = prepare(config, sampling, to_release, quality.check if quality is not None else None)
        if job is None:
            if quality is not None and not config.dry_run:  # the last one may have been interrupted
                with user_errors():
                    quality(config.train.steps)
            return
        session = set_up(job, to_release)
        received = train_model(job, session, quality)
        if session.accelerator.is_main_process:
            if received:
                assert session.last_checkpoint is not None
                step = checkpoint_step(session.last_checkpoint)
                print(
                    f"stopped by {signal.Signals(received).name} at step {step} of {config.train.steps}, saved in "
                    f"{session.last_checkpoint}: the same command resumes from there"
                )
            else:
                print(
                    f"{config.out} is complete: {config.train.steps} steps, in {session.last_checkpoint}\n"
                    f"loss: {config.out / 'loss.png'}, samples: {config.out / 'samples'}\nsample: {sampling}"
                )
        session.tracker.end()
        session.accelerator.state.destroy_process_group()


def open_quality(config: Config) -> "Quality | None":
    """Returns what measures the quality of samples, or None if that is never due."""
    if config.train.evaluate_every is None:
        if config.quality != QualityConfig() and is_main_process():
            print("warning: the options of quality do nothing without train.evaluate_every", file=sys.stderr)
        return None
    from sit_atconv.studies.quality import Quality  # with the imports of sampling and evaluation

    return Quality(config)


def train_model(job: Job, session: Session, quality: "Quality | None" = None) -> int:
    """Trains from the checkpoint's step to the last one. Returns the signal that stopped it early, or 0."""
    config, train, data, order = job.config, job.config.train, job.data, job.order
    accelerator, optimizer, averages = session.accelerator, session.optimizer, session.averages
    codec, meter = session.codec, session.meter
    device, parameters, model = accelerator.device, session.parameters, session.tapped
    shape = (train.batch_size, *job.latent_shape)
    generator = torch.Generator(device)
    progress = tqdm(
        range(job.found.step, train.steps),
        initial=job.found.step,
        total=train.steps,
        disable=not accelerator.is_main_process,
        unit="step",
    )

    if quality is not None:
        measure_quality(quality, session, job.found.step)

    for step in progress:
        # Draw all random numbers for the whole batch, the same on every process, and set the learning rate.
        generator.manual_seed(step_seed(train.seed, step))
        objective = config.flow.at(step / train.steps)
        draw = objective.draw(shape, generator)
        posterior = torch.randn(shape, generator=generator, device=device)
        random = torch.rand(train.batch_size, generator=generator, device=device)  # of the auxiliary loss
        auxiliary = config.auxiliary_of(step)
        model.serve(auxiliary)
        finite = torch.ones((), dtype=torch.bool, device=device)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step)

        # Run forward and backward, one micro-batch at a time.
        for micro_batch in range(train.accumulation):
            with meter.timed("data"), user_errors(everywhere=True):
                batch = next(session.batches)
            session.unreadable.note(batch.unreadable)
            rows = order.rows(micro_batch)
            stored = batch.inputs if data.is_encoded else codec.encode(to_float(batch.inputs))
            latents = codec.latents(stored, noise=posterior[rows])
            with accelerator.accumulate(*session.trained):  # processes exchange gradients only in the last micro-batch
                terms = objective.loss(model, latents, batch.y, draw[rows], session.net.null_label)
                added = (
                    {}
                    if auxiliary is None
                    else session.added_terms(batch, latents, objective, draw[rows], random[rows])
                )
                terms, added = (
                    {name: term.where(batch.readable, 0.0) for name, term in named.items()} for named in (terms, added)
                )
                losses = terms.pop(next(iter(terms)))  # the first is minimised, the others are only logged
                loss = sum((term.mean() for term in added.values()), start=losses.mean())  # also over unreadable images
                accelerator.backward(poisoned(loss))
            others = {f"flow/{name}": term for name, term in terms.items()}
            others |= {f"auxiliary/{name}": term for name, term in added.items()}
            meter.add(losses.detach(), draw.t[rows], batch.readable, others, auxiliary is not None)
            finite &= loss.isfinite()

        # Clip the gradient, and update weights and averages unless the update is not finite.
        norm, updated, fine = clip_and_step(accelerator, session.prepared, parameters, train.max_grad_norm)
        finite &= fine
        averages.update(step, updated)
        meter.add_norm(norm)

        # Decide what is due, and end the run if a loss or gradient was not finite.
        done, session.stop.has_work = step + 1, True
        session.watch.note(done, finite)
        due = decide(
            done,
            config,
            has_held_out=len(job.held_out) > 0,
            stop=session.stop,
            watch=session.watch,
            num_unreadable=len(session.unreadable.met),
            agreement=session.agreement,
        )
        if due.bad_step:
            fail(
                f"loss or gradient were not finite in step {due.bad_step}, which changed no weights; last good "
                f"checkpoint: {session.last_checkpoint or 'none yet'}. Start another run from it (--init-from, --out) "
                "with a lower train.lr or with train.max_grad_norm, or look at the images of that batch: "
                f"{order.batch(due.bad_step - 1)}"
            )
        if due.record_unreadable:
            with user_errors():
                session.note_unreadable(job)

        # Write a line of the log.
        if due.log:
            line = {"step": done, "epoch": done / order.steps_per_epoch, "lr": train.learning_rate(step)}
            line |= meter.read(accelerator)
            if due.test:
                with meter.timed("pause"):
                    line |= session.held_out(accelerator)
            progress.set_postfix(loss=f"{line['loss']:.4f}")
            if accelerator.is_main_process:
                with user_errors():
                    append_stats(config.out, line)
            session.tracker.log(line, done)

        # Save a checkpoint and a snapshot of the averages, measure the quality of samples, and draw pictures.
        if due.save or due.draw or due.keep:
            with meter.timed("pause"):
                save(job, session, done, due)
                if due.evaluate and quality is not None:
                    measure_quality(quality, session, done)
                draw_pictures(job, session, done, due)
        if due.signal and not due.is_last:
            progress.close()
            return due.signal
    return 0


def save(job: Job, session: Session, step: int, due: Due) -> None:
    """Writes what is due of checkpoint and snapshot, on rank 0; the other processes wait."""
    config, run, recipe = job.config, job.config.out, session.recipe(job, step)
    if session.accelerator.is_main_process:
        with user_errors():
            if due.keep:
                dtype = torch_dtype(config.train.snapshot_dtype)
                save_snapshot(run, step, session.averages.tensors(), dtype)
            if due.save:
                session.last_checkpoint = save_checkpoint(
                    run,
                    session.state,
                    recipe,
                    keep=config.train.keep_checkpoints,
                    keep_every=config.train.keep_every,
                    keep_best=config.train.keep_best,
                    computed_on=session.computed_on,
                )
    session.accelerator.wait_for_everyone()


def measure_quality(quality: "Quality", session: Session, step: int) -> None:
    """Measures the quality of the samples of a step if that is due; training continues if it fails."""
    expected = (ValueError, OSError, *([RuntimeError] if session.accelerator.num_processes == 1 else []))
    try:
        figures = quality(step)
    except expected as error:
        session.say(f"warning: the quality of samples at step {step} is not known: {error}")
        return
    if figures:
        session.tracker.log(figures, step)
        session.say(f"step {step}: {', '.join(f'{name} {value:.4g}' for name, value in figures.items())}")


def draw_pictures(job: Job, session: Session, step: int, due: Due) -> None:
    """Draws the loss curve, and previews if they are due, on rank 0; the other processes wait."""
    config, run, recipe = job.config, job.config.out, session.recipe(job, step)
    if session.accelerator.is_main_process:
        try:  # training continues if a picture cannot be drawn or written
            save_loss_curves(read_stats(run), run / "loss.png", str(run))
            if due.draw:
                draw_previews(session.averages.first, session.codec, recipe, config.preview, run / "samples")
        except (RuntimeError, OSError) as error:
            session.say(f"warning: no pictures of step {step}: {str(error).splitlines()[0]}")
    session.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
