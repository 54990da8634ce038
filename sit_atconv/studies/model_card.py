"""The card of a model for the hub: README.md with what the records of its weights say."""

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from sit_atconv import __version__
from sit_atconv.checkpoints.exported import Weights
from sit_atconv.checkpoints.run_folder import quality_record
from sit_atconv.evaluation.records import Evaluation, parse_evaluation, read_evaluation
from sit_atconv.models.mixers import mixer_names
from sit_atconv.runtime.names import labels_by_name, normal
from sit_atconv.runtime.settings import flatten
from sit_atconv.studies.pages import RunRecord, read_runs, training_facts

MARK = "Written by sit-atconv "
TEMPLATE = Path(__file__).with_name("model_card.md")
FEW = 10  # classes that are named
UNKNOWN = "not recorded"


def model_card(weights: Weights, name: str, licence: str | None = None, scores: Iterable[Path] = ()) -> str:
    """Returns the text of README.md.

    Args:
        weights: what `load_weights` returned; if they are of a run, its records are read.
        name: name of the folder or repository.
        licence: identifier of the hub, such as "apache-2.0"; None says that it is not stated.
        scores: further records of eval/fid.py, of samples of these weights.

    Raises:
        ValueError: a record is missing, damaged or of other weights.
    """
    recipe, config, home = weights.recipe, weights.model.config, weights.home
    runs = read_runs([home]) if (home / "config.yaml").is_file() else []
    names = recipe.class_names
    shown = ", ".join(map(_as_code, names[:FEW])) + (", ..." if len(names) > FEW else "")
    is_named = names != [*map(str, range(len(names)))]
    is_unique = len(labels_by_name(names)[normal(names[0])]) == 1
    two_times = weights.traits["two_times"]
    parameters = sum(parameter.numel() for parameter in weights.model.parameters())
    downsample, channels = recipe.codec.get("downsample", 1), config.in_channels
    mixers = Counter(mixer_names(config.mixer, config.depth))
    is_guided = weights.null_label is not None and recipe.trained_cfg == 1
    content = {
        "name": name,
        "quoted": shlex.quote(name),
        "literal": json.dumps(name, ensure_ascii=False),
        "mark": f"{MARK}{__version__}",
        "architecture": f"SiT of depth {config.depth}, width {config.hidden_size} and patch size {config.patch_size} "
        f"with {parameters:,} parameters",
        "mixers": " and ".join(f"{name} ({number} blocks)" for name, number in mixers.items()),
        "size": " x ".join(2 * [str(config.input_size * downsample)]),
        "latents": "" if downsample == 1 else f", in the latent space of a codec with {channels} channels",
        "num_classes": len(names),
        "classes": f" ({shown})" if is_named else "",
        "prediction": recipe.prediction,
        "interpolant": recipe.interpolant,
        "guidance": _guidance(weights),
        "example": repr(names[0]) if is_named and is_unique else "0",
        "options": ", guidance_scale=4.0" if is_guided and not two_times else "",
        "facts": _facts(weights, runs),
        "command": _command(runs),
        "scores": [row for found in [*_evaluations(weights, runs), *_given(weights, scores)] for row in _rows(found)],
        "licence": licence
        or "The licence of these weights is not stated. That of the training images may restrict it.",
    }
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    text = environment.from_string(TEMPLATE.read_text()).render(content)
    data = ModelCardData(
        license=licence or None,
        library_name="diffusers",
        tags=["image-generation", "class-conditional", "flow-matching", "sit", *sorted(mixers)],
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _command(runs: list[RunRecord]) -> str | None:
    """Returns the last command of the training, without the folders of Python and of the script."""
    if not runs or not runs[0].sessions or not (typed := runs[0].sessions[-1].get("command")):
        return None
    words = shlex.split(typed)
    script = next((place for place, word in enumerate(words) if word.endswith(".py")), 0)
    for place in (0, script):
        parts = Path(words[place]).parts
        words[place] = "/".join(parts[-2:] if "sit_atconv" in parts[-2:] else parts[-1:])
    return shlex.join(words)


def renamed(card: str, old: str, new: str) -> str:
    """Returns a card that `model_card` wrote with the name of another place; other cards as they are."""
    if MARK not in card:
        return card
    literals, words = [json.dumps(name, ensure_ascii=False) for name in (old, new)], map(shlex.quote, (old, new))
    for form, (before, after) in {
        "\n# {}\n": (old, new),
        "SiTPipeline.from_pretrained({})": literals,
        "--ckpt {} --classes": words,
    }.items():
        card = card.replace(form.format(before), form.format(after), 1)
    return card


def _guidance(weights: Weights) -> str:
    if weights.traits["two_times"]:
        return " It was trained with MeanFlow: one step draws an image, a few draw a better one."
    if weights.recipe.trained_cfg != 1:
        return f" It has learned guidance of scale {weights.recipe.trained_cfg:g}: draw without further guidance."
    if weights.null_label is None:
        return " It was trained without label dropout, so classifier-free guidance is not possible."
    return ""


def _facts(weights: Weights, runs: list[RunRecord]) -> Mapping[str, str]:
    """Returns rows on the training; the steps and the average are of these weights."""
    recipe = weights.recipe
    average = {"EMA": f"EMA of decay {recipe.ema_decay}", "as trained": "none", None: UNKNOWN}[recipe.average]
    facts = {row: cells[0] for row, cells in training_facts(runs).items()} if runs else {}
    for row in ("steps", "checkpoints"):
        facts.pop(row, None)
    return {"steps": f"{recipe.step:,}" if recipe.step else UNKNOWN, "average of weights": average, **facts}


def _evaluations(weights: Weights, runs: list[RunRecord]) -> list[Evaluation]:
    """Returns the recorded evaluations of these weights."""
    found = [evaluation for run in runs for evaluation in run.evaluations.values()]
    for run in runs:
        record = quality_record(run.folder, weights.recipe.step)
        if record.is_file():
            try:
                of_averages = json.loads(record.read_bytes()).get("evaluations", {})
                found += map(parse_evaluation, of_averages.values())
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{record} is damaged ({error}): delete it") from error
    return [one for one in found if _is_of(one, weights)]


def _given(weights: Weights, scores: Iterable[Path]) -> list[Evaluation]:
    """Reads the records that the user named. ValueError: one is missing, damaged or of other weights."""
    found = []
    for path in scores:
        if not path.is_file():
            raise ValueError(f"there is no file {path}: give records that eval/fid.py wrote")
        found.append(read_evaluation(path))
        if not _is_of(found[-1], weights):
            there = found[-1].subject
            raise ValueError(
                f"{path} has scores of other weights ({there.get('ckpt')}, step {there.get('step')}, EMA decay "
                f"{there.get('ema_decay')}): leave it out"
            )
    return found


def _is_of(evaluation: Evaluation, weights: Weights) -> bool:
    """True if samples of these weights alone were measured; earlier records lack their identity."""
    subject = evaluation.subject
    if "weights" in subject:
        return subject["weights"] == weights.identity() and "weak" not in subject
    return (subject.get("step"), subject.get("ema_decay")) == (weights.recipe.step, weights.recipe.ema_decay)


def _as_code(name: str) -> str:
    """Returns a class name as Markdown code in one line, which nothing in it can end."""
    return f"`{' '.join(name.replace('`', ' ').split())}`"


def _rows(evaluation: Evaluation) -> list[list[str]]:
    protocol = flatten(evaluation.protocol)
    sampler = " ".join(str(protocol.get(f"samples.sampler.{key}", "")) for key in ("solver", "steps"))
    facts = [
        str(protocol.get("samples.num", "")),
        sampler,
        str(protocol.get("samples.sampler.cfg", "")),
        str(protocol.get("samples.labels", "")),
        str(protocol.get("extractor.name", "")),
        Path(str(evaluation.subject.get("reference", ""))).name,
    ]
    return [[name, str(score), *facts] for name, score in evaluation.scores.items()]
