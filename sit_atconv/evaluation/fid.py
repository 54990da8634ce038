"""FID, sFID, Inception Score, precision, recall and KID of samples, with standard errors.

    python eval/fid.py --samples SAMPLES --reference REFERENCE
    accelerate launch eval/fid.py --samples SAMPLES --reference VIRTUAL_imagenet256_labeled.npz
    python eval/fid.py --make-reference STATISTICS.npz --reference IMAGENET/train --image-size 256

Prints a table of the scores on a terminal. Elsewhere, or with `--json`, it prints one JSON object on stdout and the
scores on stderr. After an interruption the same command resumes.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ImageColor

from sit_atconv.data import IMAGES_AS, MAX_MEGAPIXELS, is_named, may_exist
from sit_atconv.evaluation.metrics import METRICS, find_metric
from sit_atconv.evaluation.scores import Score
from sit_atconv.runtime.commands import (
    ArgumentParser,
    add_import_option,
    at_least,
    fail,
    positive,
    run_command,
    user_errors,
    wants_json,
    warn_if_hidden,
)
from sit_atconv.runtime.installation import command

if TYPE_CHECKING:
    from sit_atconv.evaluation.records import Evaluation

OF_SAMPLES = ("samples", "metrics", "num_samples", "held_out")  # options that --make-reference does not need


def main(argv: list[str] | None = None) -> None:
    options = vars(make_parser().parse_args(argv))
    out, statistics = (options.pop(name) for name in ("out", "make_reference"))
    as_json = wants_json(options.pop("json"))
    check_paths(options, out, statistics)
    extractors, weights = options.pop("extractor"), options.pop("weights") or []
    with user_errors():
        check_extractors(extractors, weights, out, statistics)
        of_extractors = [
            {"extractor": name, "weights": file}
            for name, file in zip(extractors, weights or [None] * len(extractors), strict=True)
        ]
        for name in options["metrics"]:
            find_metric(name)
        from sit_atconv.evaluation import evaluate as scoring
        from sit_atconv.evaluation.protocol import write_record

        if statistics:
            options = {name: options[name] for name in options if name not in OF_SAMPLES}
            recipe = scoring.make_reference(scoring.ReferenceOptions(**options, **of_extractors[0]), Path(statistics))
            if recipe:
                line = f"statistics of {recipe['num']} images: {statistics}"
                print(json.dumps(recipe, indent=1) if as_json else line)
            return
        results: dict[str, str] = {}  # JSON objects by extractor
        try:  # a full disk must not lose the scores, nor a closed pipe the records, nor one extractor those of another
            for chosen in of_extractors:
                evaluation = scoring.evaluate(scoring.EvaluateOptions(**options, **chosen))
                if evaluation is None:
                    continue
                results[chosen["extractor"]] = evaluation.brief().to_json()
                try:
                    record = write_record(evaluation, out)
                    picture = draw_pairs(evaluation, options, record)
                finally:
                    if not as_json:
                        print(to_table(evaluation.scores), flush=True)
                for name, score in evaluation.scores.items() if as_json else ():
                    print(f"{name:24} {score}", file=sys.stderr)
                print(f"record: {record}{picture}", file=sys.stderr if as_json else sys.stdout)
        finally:
            if as_json and results:
                print(in_one(results, several=len(of_extractors) > 1), flush=True)


def draw_pairs(evaluation: "Evaluation", options: Mapping, record: Path) -> str:
    """Draws the samples nearest to reference images, if they were looked for; returns a line about it."""
    if not (pairs := evaluation.subject.get("nearest")):
        return ""
    from sit_atconv.evaluation.image_sets import open_image_set
    from sit_atconv.evaluation.nearest import draw_nearest

    reading = {name: options[name] for name in ("max_megapixels", "background")}
    images = open_image_set(options["reference"], options["image_size"], **reading)
    path = record.with_suffix(".nearest.png")
    draw_nearest(pairs, open_image_set(options["samples"], **reading), images, path)
    return f"\npicture: {path}"


def colour(text: str) -> tuple[int, ...]:
    """Returns red, green and blue of "white" or "#ffffff"."""
    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no colour: give a name such as white, or #rrggbb") from None


def in_one(results: Mapping[str, str], several: bool) -> str:
    """Returns one JSON object: that of a single extractor, or one with those of several by their names."""
    if not several:
        return next(iter(results.values()))
    return json.dumps({name: json.loads(result) for name, result in results.items()}, indent=1)


def check_extractors(
    extractors: Sequence[str], weights: Sequence[str], out: str | None, statistics: str | None
) -> None:
    """Raises ValueError if options for one extractor are given with several, or weights are missing."""
    if len({*extractors}) < len(extractors):
        raise ValueError(f"--extractor names one twice: {', '.join(extractors)}")
    if weights and len(weights) != len(extractors):
        raise ValueError(
            f"--weights must be one file for each of the {len(extractors)} extractors, not {len(weights)}: run one "
            "command for each to download some"
        )
    for option, value in (("--out", out), ("--make-reference", statistics)):
        if value and len(extractors) > 1:
            raise ValueError(
                f"{option} {value} is for one extractor, and {', '.join(extractors)} are given: leave it out"
            )


def to_table(scores: Mapping[str, Score]) -> str:
    """Returns the scores as aligned columns for a terminal: metric, value, error."""
    rows = [("metric", "value", "error")]
    for name, score in scores.items():
        value, _, error = str(score).partition(" ± ")
        rows.append((name, value, error))
    names, values, errors = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(f"{name:{names}}  {value:>{values}}  {error:>{errors}}".rstrip() for name, value, error in rows)


def check_paths(options: dict, out: str | None, statistics: str | None) -> None:
    """Checks paths before the slow import of torch; ends the command if one is wrong."""
    if not options["samples"] and not statistics:
        fail("--samples is missing: give the images to evaluate, or --make-reference FILE.npz", code=2)
    if options["samples"] and statistics:
        fail("--make-reference reads the reference only: leave --samples out", code=2)
    sources = list(filter(None, (options["samples"], options["reference"])))
    for name in ("samples", "reference", "held_out"):
        source = options[name]
        if source and is_named(source):
            warn_if_hidden(f"--{name}", source)
        elif source and not may_exist(source):
            fail(f"{source} does not exist: give {IMAGES_AS}, or an .npz")
    for weights in options["weights"] or ():
        if not Path(weights).is_file():
            fail(f"there is no file {weights}: give --weights the path of the extractor's weights")
    for name, path in (("--out", out), ("--make-reference", statistics)):
        if path and ((Path(path).exists() and not Path(path).is_file()) or not Path(path).absolute().parent.is_dir()):
            fail(f"{path} cannot be written: give {name} a file in a folder that exists")
        if path and Path(path).exists() and any(Path(s).exists() and Path(s).samefile(path) for s in sources):
            fail(f"{path} is an input of this command: give {name} another file")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command("fid"),
        usage="%(prog)s --samples SAMPLES --reference REFERENCE [--extractor inception] [options]",
        description="Compares samples with a reference by torch-fidelity: FID, sFID, Inception Score, precision and "
        "recall as the ADM evaluator measures them, and KID, with standard errors. Prints the scores and writes a JSON "
        "record with everything that could change them. After an interruption the same command resumes.",
    )
    parser.add_argument(
        "--samples",
        help="images to evaluate: a folder that sample/generate.py wrote, or its "
        "manifest.json; a folder of images; or an .npz with arr_0 uint8 (N, H, W, 3)",
    )
    parser.add_argument(
        "--reference",
        required=True,
        help="what to compare with: an .npz with mu and sigma, from ADM or --make-reference; images, "
        "given as for --samples; or a .zip or .tar, wids:PLACE, hf:NAME, idx:FOLDER or digits, as for training",
    )
    parser.add_argument(
        "--make-reference",
        default=None,
        metavar="FILE.npz",
        help="write the statistics and some images of --reference to this file, and measure nothing",
    )
    parser.add_argument(
        "--image-size",
        type=at_least(1),
        default=None,
        metavar="PIXELS",
        help="crop the reference's image files to squares of this side, by ADM's rule, or pad IDX files to it",
    )
    parser.add_argument(
        "--max-megapixels",
        type=positive,
        default=MAX_MEGAPIXELS,
        metavar="MP",
        help="refuse image files with more megapixels, which may not fit into memory",
    )
    parser.add_argument(
        "--background",
        type=colour,
        default=None,
        metavar="COLOUR",
        help="composite transparent pixels of image files on this colour, white or #rrggbb (default: they keep the "
        "colour that they hold, as in ADM)",
    )
    parser.add_argument(
        "--held-out",
        default=None,
        metavar="IMAGES",
        help="real images that were not trained on, for --metrics copies: are samples nearer to the reference than "
        "these? (default: 1,000 images of the reference, each compared with the others)",
    )
    parser.add_argument(
        "--num-samples", type=at_least(2), default=None, metavar="N", help="evaluate the first N samples only"
    )
    parser.add_argument(
        "--extractor",
        nargs="+",
        default=["inception"],
        metavar="NAME",
        help="network that computes the features, or several, each with its record: inception; dinov2; digits (for 8x8 "
        "images) and fashion (for 32x32 Fashion-MNIST), both shipped; or one registered with torch-fidelity (vgg16, "
        "clip-vit-b-32, ..., or by an --import module)",
    )
    parser.add_argument(
        "--weights",
        "--inception-weights",
        nargs="+",
        default=None,
        metavar="FILE",
        help="weights file of the extractor, as torch-fidelity and Meta publish it (default: download it)",
    )
    named = [
        f"{name} ({' and '.join(metric.scores)})" if len(metric.scores) > 1 else name
        for name, metric in METRICS.items()
    ]
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=(),
        metavar="METRIC",
        help=f"metrics to compute: {', '.join(named)}, or your own, registered by an --import module "
        "or given as module.NAME (default: all but dc and copies that the extractor and the reference allow)",
    )
    add_import_option(parser)
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="number of images per forward pass")
    parser.add_argument(
        "--features",
        default="runs/features",
        metavar="FOLDER",
        help="folder that caches features; several commands may share it, and it may be deleted",
    )
    parser.add_argument(
        "--out",
        default=None,
        metavar="FILE",
        help="file to write the record to (default: scores-EXTRACTOR-KEY.json beside the samples)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON on stdout even on a terminal, which gets a table otherwise"
    )
    return parser


if __name__ == "__main__":
    run_command(main)
