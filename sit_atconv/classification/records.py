"""Evaluation of a checkpoint or of given weights, for `--eval-only`, with a JSON record."""

import copy

from accelerate import Accelerator
from safetensors.torch import load_file

from sit_atconv.classification.evaluation import save_record
from sit_atconv.classification.preflight import Exam
from sit_atconv.classification.session import evaluate_weights
from sit_atconv.classification.weights import WEIGHTS_FILE, find_weights
from sit_atconv.runtime.commands import user_errors
from sit_atconv.runtime.files import sha256_of
from sit_atconv.runtime.provenance import describe


def record_accuracy(exam: Exam, accelerator: Accelerator) -> None:
    """Evaluates the checkpoint, or the weights of --init-from; rank 0 prints and records the result."""
    config, checkpoint = exam.config, exam.found.checkpoint
    with user_errors():
        if checkpoint is None:
            assert config.init_from is not None
            files, models, name = {"given": find_weights(config.init_from)}, {"given": exam.net}, "evaluation"
        else:
            files = {"raw": checkpoint / "model" / WEIGHTS_FILE, "ema": checkpoint / "ema" / WEIGHTS_FILE}
            models, name = {"raw": exam.net, "ema": copy.deepcopy(exam.net)}, f"evaluation-{checkpoint.name}"
            models["ema"].load_state_dict(load_file(files["ema"]))
    models = {kind: model.to(accelerator.device) for kind, model in models.items()}
    accuracies = evaluate_weights(exam, models, accelerator)
    if not accelerator.is_main_process:
        return
    path = config.out / f"{name}.json"
    with user_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_record(
            path,
            accuracies,
            {
                "weights": {kind: {"file": str(file), "sha256": sha256_of(file)} for kind, file in files.items()},
                "model": config.model,
                "data": {"name": exam.val.name, **exam.val.describe()},
                "image_size": config.data.image_size,
                "crop_ratio": config.data.crop_ratio,
                "interpolation": config.data.interpolation,
                "precision": config.train.precision,
                **describe(),
            },
        )
    for kind, accuracy in accuracies.items():
        print(f"{kind}: {accuracy}, {accuracy.num_images} images")
    print(f"record: {path}")
