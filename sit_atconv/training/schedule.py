"""Decision about what is due after a step, from the schedule, signals and faults of all processes."""

from dataclasses import dataclass

from sit_atconv.training.config import Config
from sit_atconv.training.guards import Agreement, FiniteWatch, StopRequest


@dataclass(frozen=True)
class Due:
    """Actions due after a step, the same on all processes."""

    is_last: bool  # this is the last step of the run
    log: bool  # write a line of the log
    test: bool  # compute the held-out loss
    save: bool  # write a checkpoint
    draw: bool  # draw the previews
    keep: bool  # write a snapshot of the averages
    evaluate: bool  # measure the quality of samples
    signal: int  # number of the signal that asks the run to stop; 0 without one
    bad_step: int  # number of the first step, from 1, that was not finite; 0 without one
    record_unreadable: bool  # some process found images that cannot be read


def decide(
    step: int,
    config: Config,
    *,
    has_held_out: bool,
    stop: StopRequest,
    watch: FiniteWatch,
    num_unreadable: int,
    agreement: Agreement,
) -> Due:
    """Decides what is due after a step (1-based); all processes must call it and get the same answer.

    `num_unreadable` counts the images that this process could not read and that are not recorded yet.
    """
    train = config.train
    is_last = step == train.steps
    evaluate = train.evaluates(step)
    save = is_last or evaluate or step % train.checkpoint_every == 0
    draw = is_last or step % config.preview.every == 0
    keep = train.snapshot_every is not None and (is_last or step % train.snapshot_every == 0)
    test = has_held_out and (is_last or step % train.held_out_every == 0)
    log = save or test or keep or step % train.log_every == 0
    log, signal, bad_step, unreadable = agree_on_end(log, stop, watch, agreement, num_unreadable)
    return Due(is_last, log, test, save or signal > 0, draw, keep, evaluate, signal, bad_step, unreadable > 0)


def agree_on_end(
    log: bool, stop: StopRequest, watch: FiniteWatch, agreement: Agreement, num_unreadable: int = 0
) -> tuple[bool, int, int, int]:
    """Returns what all processes agree on: log, signal, step that was not finite, unreadable images.

    A step that is not logged learns what was agreed one step before; a signal makes it log.
    """
    signal, bad_step, unreadable = agreement.largest(stop.number, watch.look(wait=log), num_unreadable, now=log)
    if signal and not log:  # before saving, make sure that all steps were finite
        log = True
        signal, bad_step, unreadable = agreement.largest(signal, watch.look(wait=True), num_unreadable, now=True)
    return log, signal, bad_step, unreadable
