"""Quality of samples while a run trains: drawn as by sample/generate.py, and scored as by eval/fid.py."""

import contextlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from sit_atconv.checkpoints.run_folder import (
    add_to_stats,
    best_step,
    quality_record,
    read_quality,
)
from sit_atconv.data import is_named
from sit_atconv.evaluation.evaluate import EvaluateOptions, evaluate
from sit_atconv.evaluation.records import Evaluation
from sit_atconv.generation.draw import generate_samples
from sit_atconv.generation.job import GenerateOptions, prepare
from sit_atconv.runtime.devices import on_cpu, prepare_device
from sit_atconv.runtime.files import write_aside
from sit_atconv.runtime.processes import together
from sit_atconv.training.config import Config

BEST = "best"  # link in the run's folder


class Quality:
    """Frechet distances of a run's checkpoints, one for each weight average.

    The random numbers of the training are not used, so that its bits are the same as without. A killed evaluation is
    completed when the run resumes.

    Args:
        config: of the run; its `train.evaluate_every` is given.

    Raises:
        ValueError: there is no such reference, or a record of an earlier evaluation is damaged.
    """

    def __init__(self, config: Config):
        self.config, self.run = config, config.out
        self.reference = config.quality.reference or config.data.images
        if config.quality.reference is None and config.data.latents is not None:
            raise ValueError(
                "train.evaluate_every needs quality.reference: images, or statistics that eval/fid.py "
                "--make-reference wrote, since latents hold no images to compare with"
            )
        if not is_named(self.reference) and not Path(self.reference).exists():
            raise ValueError(f"quality.reference {self.reference} does not exist")
        read_quality(self.run)

    def __call__(self, step: int) -> dict[str, float]:
        """Measures a step's checkpoint on all processes together, if that is due and not done.

        Returns:
            What it measured, for the log: "quality/NAME" and "quality/NAME/error" for each average; those after the
            first are named "quality/ema0.99/NAME". {} if there was nothing to measure.

        Raises:
            ValueError, OSError: samples cannot be drawn or compared.
        """
        train = self.config.train
        if step == 0 or not train.evaluates(step):
            return {}
        state = PartialState(cpu=on_cpu())
        (known,) = broadcast_object_list([read_quality(self.run).get(step)])  # other ranks may see fewer files
        figures = {} if known else self._measure(step, state)
        if state.is_main_process:
            add_to_stats(self.run, step, known or figures)
            if train.keep_best:
                self._link_best()
        prepare_device(state.device, train.cpu_threads, train.tf32)  # as the training had set it
        return figures

    def _measure(self, step: int, state: PartialState) -> dict[str, float]:
        record, figures, evaluations = quality_record(self.run, step), dict[str, float](), dict[str, dict]()
        for number, decay in enumerate(self.config.train.ema_decays):
            prefix = f"ema{decay:g}/" if number else ""
            evaluation = self._evaluate(step, decay, _folder(record, decay))
            if evaluation is None:
                continue
            for name, score in evaluation.scores.items():
                figures[f"quality/{prefix}{name}"] = score.value
                if score.error is not None:
                    figures[f"quality/{prefix}{name}/error"] = score.error
            evaluations[f"{decay:g}"] = asdict(evaluation)
        if state.is_main_process:
            first = self.config.train.ema_decays[0]
            with contextlib.suppress(OSError):  # the picture is not worth an error
                os.replace(_folder(record, first) / "grid.png", record.with_suffix(".png"))
            write_aside(record, json.dumps({"log": figures, "evaluations": evaluations}, indent=1), durable=True)
            for decay in self.config.train.ema_decays:
                shutil.rmtree(_folder(record, decay), ignore_errors=True)
        (figures,) = broadcast_object_list([figures])
        return figures

    def _evaluate(self, step: int, decay: float, folder: Path) -> Evaluation | None:
        """Draws the samples of an average and compares them. None except on rank 0."""
        quality = self.config.quality
        drawn = GenerateOptions(
            ckpt=str(self.run / "checkpoints" / f"step-{step:07d}"),
            sampler=quality.sampler,
            ema=decay,
            labels="balanced",
            num_samples=quality.num_samples,
            seed=quality.seed,
            batch_size=quality.batch_size,
            npz=False,
            out=str(folder),
        )
        with together():  # no process writes before all have looked into the folder
            job = prepare(drawn)
        generate_samples(job)
        PartialState().wait_for_everyone()  # rank 0 completes the folder
        scored = EvaluateOptions(
            samples=str(folder),
            reference=self.reference,
            image_size=quality.image_size,
            extractor=quality.extractor,
            weights=quality.weights,
            batch_size=quality.batch_size,
            metrics=("fid",),
            features=quality.features,
            keep_features=False,
        )
        return evaluate(scored)

    def _link_best(self) -> None:
        best, link = best_step(self.run), self.run / BEST
        if best is None:
            return
        partial = self.run / f".{BEST}"
        partial.unlink(missing_ok=True)
        partial.symlink_to(Path("checkpoints", f"step-{best:07d}"))
        os.replace(partial, link)


def _folder(record: Path, decay: float) -> Path:
    """Returns the folder of the samples of an average, beside the record of its step."""
    return record.with_name(f"{record.stem}-ema{decay:g}")
