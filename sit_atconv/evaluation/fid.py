"""FID, sFID, Inception Score, precision, recall and KID of samples against a reference, with standard errors.

    python eval/fid.py --samples SAMPLES --reference REFERENCE
    accelerate launch eval/fid.py --samples SAMPLES --reference VIRTUAL_imagenet256_labeled.npz
    python eval/fid.py --make-reference STATISTICS.npz --reference IMAGENET/train --image-size 256

Prints a table of the scores on a terminal; elsewhere, or with `--json`, one JSON object on stdout and the scores on
stderr. The same command resumes after an interruption.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from sit_atconv.data import MAX_MEGAPIXELS
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
)
from sit_atconv.runtime.installation import command


def main(argv: list[str] | None = None) -> None:
    options = vars(make_parser().parse_args(argv))
    out, statistics = (options.pop(name) for name in ("out", "make_reference"))
    as_json = wants_json(options.pop("json"))
    check_paths(options, out, statistics)
    with user_errors():
        for name in options["metrics"]:
            find_metric(name)
        from sit_atconv.evaluation import evaluate as scoring
        from sit_atconv.evaluation.protocol import write_record

        if statistics:
            options = {name: options[name] for name in options if name not in ("samples", "metrics", "num_samples")}
            recipe = scoring.make_reference(scoring.ReferenceOptions(**options), Path(statistics))
            if recipe:
                line = f"statistics of {recipe['num']} images: {statistics}"
                print(json.dumps(recipe, indent=1) if as_json else line)
            return
        evaluation = scoring.evaluate(scoring.EvaluateOptions(**options))
        if evaluation is None:
            return
        try:
            record = write_record(evaluation, out)
        finally:  # neither a full disk nor a closed pipe loses both
            print(evaluation.brief().to_json() if as_json else to_table(evaluation.scores), flush=True)
    if as_json:
        for name, score in evaluation.scores.items():
            print(f"{name:24} {score}", file=sys.stderr)
    print(f"record: {record}", file=sys.stderr if as_json else sys.stdout)


def to_table(scores: Mapping[str, Score]) -> str:
    """Returns the scores as aligned columns for a terminal: metric, value, error."""
    rows = [("metric", "value", "error")]
    for name, score in scores.items():
        value, _, error = str(score).partition(" ± ")
        rows.append((name, value, error))
    names, values, errors = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(f"{name:{names}}  {value:>{values}}  {error:>{errors}}".rstrip() for name, value, error in rows)


def check_paths(options: dict, out: str | None, statistics: str | None) -> None:
    """What can be known before torch is imported."""
    if not options["samples"] and not statistics:
        fail("--samples is missing: give what is to be compared, or --make-reference FILE.npz", code=2)
    if options["samples"] and statistics:
        fail("--make-reference is of the reference alone: leave --samples out", code=2)
    sources = list(filter(None, (options["samples"], options["reference"])))
    for source in sources:
        if source != "digits" and not Path(source).exists():
            fail(f"{source} does not exist: give a folder of images, an .npz, or the word digits")
    if options["weights"] and not Path(options["weights"]).is_file():
        fail(f"there is no file {options['weights']}: give --weights the path of the extractor's weights")
    for name, path in (("--out", out), ("--make-reference", statistics)):
        if path and ((Path(path).exists() and not Path(path).is_file()) or not Path(path).absolute().parent.is_dir()):
            fail(f"{path} cannot be written: give {name} a file in a folder that exists")
        if path and Path(path).exists() and any(Path(s).exists() and Path(s).samefile(path) for s in sources):
            fail(f"{path} is what is to be read: give {name} another file")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command("fid"),
        usage="%(prog)s --samples SAMPLES --reference REFERENCE [--extractor inception] [options]",
        description="Compares samples with a reference: FID, sFID, Inception Score, precision and recall as the ADM "
        "evaluator measures them, and KID, by torch-fidelity, with standard errors. Prints one JSON object and writes "
        "it down, with all that could change the scores. Interrupted, the same command goes on where it was.",
    )
    parser.add_argument("--samples", help="a folder that sample/generate.py wrote, or its manifest.json; a folder of "
                        "images; an .npz with arr_0 uint8 (N, H, W, 3)")
    parser.add_argument("--reference", required=True,
                        help="an .npz with mu and sigma, as ADM's or of --make-reference; images as for --samples; or "
                        "the word digits")
    parser.add_argument("--make-reference", default=None, metavar="FILE.npz",
                        help="write the statistics of --reference and some of its images to this file, and no scores")
    parser.add_argument("--image-size", type=at_least(1), default=None, metavar="PIXELS",
                        help="crop the images of a folder of references to squares, by ADM's rule")
    parser.add_argument("--max-megapixels", type=positive, default=MAX_MEGAPIXELS, metavar="MP",
                        help="refuse image files of more megapixels, which may not fit into memory")
    parser.add_argument("--num-samples", type=at_least(2), default=None, metavar="N", help="the first N samples only")
    parser.add_argument("--extractor", default="inception",
                        help="inception; dinov2; digits (for 8x8 images, shipped); or one registered with "
                        "torch-fidelity (vgg16, clip-vit-b-32, ..., or by a module of --import)")
    parser.add_argument("--weights", "--inception-weights", default=None, metavar="FILE",
                        help="of the extractor, as torch-fidelity and Meta publish them (default: a download)")
    named = [f"{name} ({' and '.join(metric.scores)})" if len(metric.scores) > 1 else name
             for name, metric in METRICS.items()]
    parser.add_argument("--metrics", nargs="+", default=(), metavar="METRIC",
                        help=f"{', '.join(named)}, or your own, registered by a module of --import or as module.NAME; "
                        "by default all that extractor and reference allow")
    add_import_option(parser)
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="images at a time")
    parser.add_argument("--features", default="runs/features", metavar="FOLDER",
                        help="where features are kept for the next time; several commands may share it, and it may be "
                        "deleted")
    parser.add_argument("--out", default=None, metavar="FILE",
                        help="the record (default: scores-EXTRACTOR-KEY.json beside the samples)")
    parser.add_argument("--json", action="store_true",
                        help="print JSON on stdout on a terminal too, where a table is printed otherwise")
    return parser


if __name__ == "__main__":
    run_command(main)
