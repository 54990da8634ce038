"""What is due after a step, decided in one place from the schedule, signals and what was found on the way."""

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
    signal: int  # number of the signal that asks the run to stop; 0 without one
    bad_step: int  # number of the first step, from 1, that was not finite; 0 without one
    record_unreadable: bool  # some process found images that cannot be read


def decide(
    step: int, config: Config, *, has_held_out: bool, stop: StopRequest, watch: FiniteWatch, num_unreadable: int,
    agreement: Agreement,
) -> Due:
    """Decides what is due after a step; all processes call it and get the same.

    Args:
        step: number of the step, from 1.
        config: with the schedule.
        has_held_out: whether there are held-out images.
        stop: signals received by this process.
        watch: which step was not finite.
        num_unreadable: images that this process could not read and that are not recorded yet.
        agreement: how processes agree.
    """
    train = config.train
    is_last = step == train.steps
    save = is_last or step % train.checkpoint_every == 0
    draw = is_last or step % config.preview.every == 0
    test = has_held_out and (is_last or step % train.held_out_every == 0)
    log = save or test or step % train.log_every == 0
    signal, bad_step, unreadable = agreement.largest(stop.number, watch.look(wait=log), num_unreadable, now=log)
    if signal and not log:  # nothing is saved that has not been seen to be finite
        log = True
        signal, bad_step, unreadable = agreement.largest(signal, watch.look(wait=True), num_unreadable, now=True)
    return Due(is_last, log, test, save or signal > 0, draw, signal, bad_step, unreadable > 0)
