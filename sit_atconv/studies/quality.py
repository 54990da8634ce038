"""Quality of samples while a run trains: drawn as by sample/generate.py, and scored as by eval/fid.py."""

import contextlib
import json
import os
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from sit_atconv.checkpoints.run_folder import add_to_stats, best_step, quality_record, read_quality
from sit_atconv.data import is_named, may_exist
from sit_atconv.data.data_source import DataSource
from sit_atconv.data.images import ImageFolder
from sit_atconv.evaluation.checks import check_reference
from sit_atconv.evaluation.evaluate import EvaluateOptions, ReferenceOptions, evaluate, fit_reference
from sit_atconv.evaluation.extractors import open_extractor
from sit_atconv.evaluation.records import Evaluation
from sit_atconv.evaluation.references import Reference, open_reference
from sit_atconv.generation.draw import generate_samples
from sit_atconv.generation.drawing import GenerateOptions
from sit_atconv.generation.job import prepare
from sit_atconv.runtime.commands import is_main_process
from sit_atconv.runtime.devices import on_cpu, prepare_device
from sit_atconv.runtime.files import write_aside
from sit_atconv.runtime.processes import together
from sit_atconv.runtime.settings import differences
from sit_atconv.training.config import Config

BEST = "best"  # link in the run's folder


class Quality:
    """Frechet distances of a run's checkpoints, one for each weight average.

    The random numbers of the training are not used, so that its bits are the same as without. A killed evaluation is
    completed when the run resumes. The reference is fitted once in each session.

    Args:
        config: of the run; its `train.evaluate_every` is given.

    Raises:
        ValueError: there is no such reference, or a record of an earlier evaluation is damaged.
    """

    def __init__(self, config: Config):
        self.config, self.run, quality = config, config.out, config.quality
        if quality.reference is None and config.data.latents is not None:
            raise ValueError(
                "train.evaluate_every needs quality.reference: images, or statistics that eval/fid.py "
                "--make-reference wrote, since latents hold no images to compare with"
            )
        place = quality.reference or config.data.images
        if not (is_named(place) or may_exist(place)):
            raise ValueError(f"quality.reference {place} does not exist: give images or statistics to compare with")
        read_quality(self.run)
        self.options = ReferenceOptions(
            reference=place,
            image_size=quality.image_size,
            extractor=quality.extractor,
            weights=quality.weights,
            batch_size=quality.batch_size,
            features=quality.features,
            max_megapixels=config.data.max_megapixels,
        )
        self.reference: Reference | None = None  # fitted at the first evaluation

    def check(self, data: DataSource) -> None:
        """Opens reference and extractor, before any process group starts.

        Raises:
            ValueError: one of them cannot be opened, or they do not fit each other.
        """
        quality = self.config.quality
        if quality.reference is None and quality.image_size is None and isinstance(data, ImageFolder):
            self.options = replace(self.options, image_size=data.image_size)
        try:
            reference = open_reference(self.options.reference, self.options.image_size, self.options.max_megapixels)
            if is_main_process():  # which may download the extractor's weights
                image = torch.zeros(1, 3, data.image_size, data.image_size, dtype=torch.uint8)
                if reference.images is not None:
                    image = reference.images.read(0, 1)
                check_reference(open_extractor(quality.extractor, quality.weights), reference, image)
        except ValueError as error:
            raise ValueError(f"quality: {error}") from error

    def __call__(self, step: int) -> dict[str, float]:
        """Measures a step's checkpoint on all processes together, if that is due and not done.

        Returns:
            New figures for the log: "quality/NAME" and "quality/NAME/error" for each average; those after the first
            are named "quality/ema0.99/NAME". {} if there was nothing to measure.

        Raises:
            ValueError, OSError: samples cannot be drawn or compared; on all processes.
        """
        train = self.config.train
        if step == 0 or not train.evaluates(step):
            return {}
        state = PartialState(cpu=on_cpu())
        known = read_quality(self.run).get(step)
        (known,) = broadcast_object_list([known])  # rank 0's: other ranks may see fewer files
        try:
            figures = {} if known else self._measure(step, state)
        except BaseException:
            if state.is_main_process:
                self._delete_samples(step)
            raise
        finally:
            prepare_device(state.device, train.cpu_threads, train.tf32)  # as the training had set it
        if state.is_main_process:
            self._compare_protocols(step)
            add_to_stats(self.run, step, known["log"] if known else figures)
            if train.keep_best:
                self._link_best()
        return figures

    def _measure(self, step: int, state: PartialState) -> dict[str, float]:
        figures, evaluations = dict[str, float](), dict[str, dict]()
        for number, decay in enumerate(self.config.train.ema_decays):
            evaluation = self._evaluate(step, decay)
            if evaluation is None:
                continue
            prefix = f"ema{decay:g}/" if number else ""
            for name, score in evaluation.scores.items():
                figures[f"quality/{prefix}{name}"] = score.value
                if score.error is not None:
                    figures[f"quality/{prefix}{name}/error"] = score.error
            evaluations[f"{decay:g}"] = asdict(evaluation)
        record = quality_record(self.run, step)
        with together():
            if state.is_main_process:
                with contextlib.suppress(OSError):  # the picture is not worth an error
                    first = self._samples(step, self.config.train.ema_decays[0])
                    os.replace(first / "grid.png", record.with_suffix(".png"))
                protocol = next(iter(evaluations.values()))["protocol"]
                content = {"log": figures, "protocol": protocol, "evaluations": evaluations}
                write_aside(record, json.dumps(content, indent=1), durable=True)
                self._delete_samples(step)
        (figures,) = broadcast_object_list([figures])
        return figures

    def _evaluate(self, step: int, decay: float) -> Evaluation | None:
        """Draws the samples of an average and compares them. None except on rank 0."""
        quality, folder = self.config.quality, self._samples(step, decay)
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
        with together():
            generate_samples(job)
        if self.reference is None:
            self.reference = fit_reference(self.options)
        scored = EvaluateOptions(**asdict(self.options), samples=str(folder), metrics=("fid",), keep_features=False)
        evaluation = None
        with together():
            evaluation = evaluate(scored, self.reference)
        return evaluation  # noqa: RET504  # `together` may end the block early

    def _samples(self, step: int, decay: float) -> Path:
        return self.run / "quality" / f"step-{step:07d}-ema{decay:g}"

    def _delete_samples(self, step: int) -> None:
        for decay in self.config.train.ema_decays:
            shutil.rmtree(self._samples(step, decay), ignore_errors=True)

    def _compare_protocols(self, step: int) -> None:
        """Warns if the evaluation before was another one, since both are in one log and one chart."""
        records = read_quality(self.run)
        if not (earlier := [other for other in records if other < step]):
            return
        if changes := differences(records[max(earlier)]["protocol"], records[step]["protocol"]):
            tqdm.write(
                f"warning: step {step} is measured in another way than step {max(earlier)} ({'; '.join(changes)}): "
                "do not compare them",
                file=sys.stderr,
            )

    def _link_best(self) -> None:
        best, link = best_step(self.run), self.run / BEST
        if best is None:
            return
        partial = self.run / f".{BEST}"
        partial.unlink(missing_ok=True)
        partial.symlink_to(Path("checkpoints", f"step-{best:07d}"))
        os.replace(partial, link)
