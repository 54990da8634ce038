"""FID, Inception Score, precision, recall and KID of samples against a reference: one JSON object on stdout.

    python eval/fid.py --samples SAMPLES --reference REFERENCE
"""

import json
from pathlib import Path

from sit_atconv.commands import ArgumentParser, at_least, fail, is_main_process, user_errors


def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    for source in (options.samples, options.reference):
        if source != "digits" and not Path(source).exists():
            fail(f"{source} does not exist: give a folder of images, an .npz with arr_0, or the word digits")
    if options.inception_weights and not Path(options.inception_weights).is_file():
        fail(f"there is no file {options.inception_weights}: give --inception-weights the path of Inception's weights")
    if options.out and (Path(options.out).is_dir() or not Path(options.out).absolute().parent.is_dir()):
        fail(f"{options.out} cannot be written: give --out a file in a folder that exists")
    if not is_main_process():  # one process computes
        return
    with user_errors():
        from sit_atconv.evaluation.metrics import evaluate

        result = evaluate(
            options.samples,
            options.reference,
            extractor=options.extractor,
            metrics=options.metrics,
            batch_size=options.batch_size,
            inception_weights=options.inception_weights,
        )
        text = json.dumps(result, indent=1)
        print(text, flush=True)
        if options.out:
            Path(options.out).write_text(text + "\n")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        usage="python eval/fid.py --samples SAMPLES --reference REFERENCE [--extractor inception] [options]",
        description="Compares samples with a reference: FID, Inception Score, KID, precision and recall, by "
        "torch-fidelity. Prints one JSON object.",
    )
    kinds = "a folder of images, an .npz with arr_0 uint8 (N, H, W, 3), or the word digits"
    parser.add_argument("--samples", required=True, help=f"what sample/generate.py wrote, {kinds}")
    parser.add_argument("--reference", required=True, help=kinds)
    parser.add_argument("--extractor", default="inception",
                        help="inception, digits (for 8x8 images, shipped) or one registered with torch-fidelity")
    parser.add_argument("--inception-weights", default=None, metavar="FILE",
                        help="torch-fidelity's Inception weights; by default from torch's hub cache, or downloaded")
    metrics = ("fid", "is", "kid", "prc")
    parser.add_argument("--metrics", nargs="+", choices=metrics, default=metrics, help="prc is precision and recall")
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="images at a time")
    parser.add_argument("--out", default=None, metavar="FILE", help="write the JSON here too")
    return parser


if __name__ == "__main__":
    main()
