"""Evaluations side by side: a table with differences and their errors, warnings where protocols differ, charts.

    python eval/compare.py RUN RUN ...

A RUN is a JSON that eval/fid.py wrote, or the folder of samples that it wrote to.
"""

import sys
from pathlib import Path

from sit_atconv.runtime.commands import ArgumentParser, run_command, user_errors
from sit_atconv.runtime.installation import command


def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    with user_errors():
        from sit_atconv.evaluation.comparison import compare

        report = compare(options.runs, options.out, options.names, options.baseline, options.metric)
    sys.stdout.reconfigure(errors="replace")  # a terminal may know neither ± nor →
    print(report.table, end="")
    print("\n".join(report.messages), file=sys.stderr)


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command("compare"),
        usage="%(prog)s RUN [RUN ...] [--out DIR] [--names A B ...] [--baseline 1] [--metric FID]",
        description="Compares evaluations: table on stdout, and in DIR as Markdown and CSV; charts of the metric "
        "against sampler steps, guidance, training step and speed, where there is something to draw.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="a JSON that eval/fid.py wrote, or a folder of samples with one or several scores-*.json")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), metavar="DIR",
                        help="where tables and charts go")
    parser.add_argument("--names", nargs="+", metavar="NAME",
                        help="one for each evaluation; by default what distinguishes their paths")
    parser.add_argument("--baseline", default="1", help="number or name of the run that all others are compared with")
    parser.add_argument("--metric", default="FID",
                        help="compared and drawn: FID, sFID, KID, IS, precision, recall, or a score's whole name")
    return parser


if __name__ == "__main__":
    run_command(main)
