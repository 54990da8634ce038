"""Training of AttNet, or of any model of timm, to classify images.

    accelerate launch sit_atconv/classify.py [--config configs/attnet-t2.yaml] --data.train DIR --data.val DIR

Without --config and --data.train it trains on the embedded digits. The same command resumes the run from its newest
checkpoint: data order, augmentation, mixing, stochastic depth and learning rate are functions of (seed, step), so a
resumed run ends with the same weights as an uninterrupted one. SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and exit.
"""

import contextlib
import signal

from sit_atconv.runtime.commands import fail, leave_on_ctrl_c, user_errors

if __name__ == "__main__":
    leave_on_ctrl_c()  # before the imports, which take seconds

import torch
from timm.loss import SoftTargetCrossEntropy
from tqdm import tqdm

from sit_atconv.checkpoints.run_folder import append_stats, checkpoint_step, read_stats
from sit_atconv.classification.config import parse
from sit_atconv.classification.preflight import Job, prepare, prepare_exam
from sit_atconv.classification.records import record_accuracy
from sit_atconv.classification.session import Session, set_up, start_processes
from sit_atconv.classification.streams import MODEL, stream_seed
from sit_atconv.runtime.plots import save_accuracy_curves
from sit_atconv.training.guards import poisoned
from sit_atconv.training.optimizers import clip_and_step


def main(argv: list[str] | None = None) -> None:
    config = parse(argv)
    if config.eval_only:
        with user_errors():
            exam = prepare_exam(config)
        accelerator = start_processes(config)
        record_accuracy(exam, accelerator)
        accelerator.state.destroy_process_group()
        return
    with contextlib.ExitStack() as to_release:  # the lock of the run's folder, and the data loader's processes
        with user_errors():
            job = prepare(config, to_release)
        if job is None:
            return
        session = set_up(job, to_release)
        report(job, session, train_model(job, session))
        session.accelerator.state.destroy_process_group()


def train_model(job: Job, session: Session) -> int:
    """Trains from the checkpoint's step to the last one. Returns the signal that stopped it early, or 0."""
    config, train, order, schedule = job.config, job.config.train, job.order, job.schedule
    accelerator, optimizer, meter = session.accelerator, session.optimizer, session.meter
    device, parameters, criterion = accelerator.device, session.parameters, SoftTargetCrossEntropy()
    progress = tqdm(
        range(job.found.step, schedule.steps),
        initial=job.found.step,
        total=schedule.steps,
        disable=not accelerator.is_main_process,
        unit="step",
    )

    for step in progress:
        # Set the learning rate of this step.
        finite = torch.ones((), dtype=torch.bool, device=device)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)

        # Run forward and backward, one micro-batch at a time.
        for micro_batch in range(train.accumulation):
            with user_errors(everywhere=True):
                examples = next(session.batches)
            rows = order.rows(micro_batch)
            x, targets = job.mixing(examples.x, examples.y, step, rows.start)
            session.paths.draw(step, rows)
            torch.manual_seed(stream_seed(MODEL, train.seed, step, rows.start))  # for other random layers of timm
            with accelerator.autocast():
                logits = session.model(x)
            loss = criterion(logits.float(), targets)
            accelerator.backward(poisoned(loss) / train.accumulation)
            meter.add(loss, logits, examples.y)
            finite &= loss.isfinite()

        # Average the gradient over processes, clip it, and update weights and EMA unless the update is not finite.
        session.average_gradients()
        _, updated, fine = clip_and_step(accelerator, session.prepared, parameters, train.max_grad_norm)
        finite &= fine
        session.norms.settle(accelerator, updated)
        session.ema.decay = min(train.ema_decay, (1 + step) / (10 + step))  # forgets the first running statistics, of 1
        session.ema.update(session.net)

        # Decide what is due, and end the run if a loss or gradient was not finite.
        done, session.stop.has_work = step + 1, True
        session.watch.note(done, finite)
        due = session.decide(done)
        if due.bad_step:
            fail(
                f"loss or gradient were not finite in step {due.bad_step}, which changed no weights; last good "
                f"checkpoint: {session.last_checkpoint or 'none yet'}. Start another run from it (--init-from, --out) "
                "with a lower train.lr or with train.max_grad_norm"
            )

        # Evaluate, and write a line of the log.
        if due.log:
            line = {"step": done, "epoch": done / order.steps_per_epoch, "lr": schedule.learning_rate(step)}
            line |= meter.read(accelerator)
            if due.test:
                with meter.pause():
                    for name, accuracy in session.evaluate().items():
                        line |= {f"val_{name}_top1": accuracy.top1, f"val_{name}_top5": accuracy.top5}
            progress.set_postfix(loss=f"{line['loss']:.4f}")
            if accelerator.is_main_process:
                with user_errors():
                    append_stats(config.out, line)

        # Save a checkpoint, and draw the curves.
        if due.save:
            with meter.pause(), user_errors():
                if accelerator.is_main_process:
                    session.save(done)
                    save_accuracy_curves(read_stats(config.out), config.out / "loss.png", str(config.out))
                accelerator.wait_for_everyone()
        if due.signal and not due.is_last:
            progress.close()
            return due.signal
    return 0


def report(job: Job, session: Session, received: int) -> None:
    """Prints how the run ended, from rank 0, and the command to evaluate it."""
    run, steps, checkpoint = job.config.out, job.schedule.steps, session.last_checkpoint
    if not session.accelerator.is_main_process:
        return
    assert checkpoint is not None
    if received:
        print(
            f"stopped by {signal.Signals(received).name} at step {checkpoint_step(checkpoint)} of {steps}, saved in "
            f"{checkpoint}: the same command resumes from there"
        )
        return
    last = read_stats(run)[-1]
    print(
        f"{run} is complete: {steps} steps, in {checkpoint}\n"
        f"top-1 on {len(job.val)} images: {last['val_raw_top1']:.2%}, by the EMA weights {last['val_ema_top1']:.2%}; "
        f"curves: {run / 'loss.png'}\n"
        f"evaluate: {job.config.evaluation_command()}"
    )


if __name__ == "__main__":
    main()
