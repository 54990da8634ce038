"""Comparison of evaluations: a table with differences and errors, protocol warnings, charts.

    python eval/compare.py RUN RUN ...

A RUN is a JSON file that eval/fid.py wrote, or the folder of samples that contains it.
"""

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sit_atconv.evaluation.comparison import Comparison, read_comparison
from sit_atconv.evaluation.comparison_table import in_words, to_csv, to_json, to_markdown
from sit_atconv.evaluation.metrics import kinds_of_scores
from sit_atconv.runtime.commands import ArgumentParser, add_import_option, run_command, user_errors
from sit_atconv.runtime.files import write_aside
from sit_atconv.runtime.installation import command


def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    with user_errors():
        report = compare(options.runs, options.out, options.names, options.baseline, options.metric, options.per_seed)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal's encoding may lack ± and →
    print(report.table, end="")
    print("\n".join(report.messages), file=sys.stderr)


@dataclass(frozen=True)
class Report:
    """The table as Markdown, and messages: different protocols, missing charts, written files."""

    table: str
    messages: list[str]


def compare(
    sources: Sequence[Path],
    out: Path,
    names: Sequence[str] | None = None,
    baseline: str = "1",
    metric: str = "FID",
    per_seed: bool = False,
) -> Report:
    """Writes OUT/compare.md, .csv and .json and the charts that have something to show.

    Evaluations that differ in seeds alone become one row: mean, standard error over seeds, and paired differences.

    Args:
        sources: files that eval/fid.py wrote, or folders of samples with scores-*.json. Other files are skipped.
        out: output folder.
        names: one name for each row; None uses the parts of their paths that differ.
        baseline: number (from 1) or name of the row that the others are compared with.
        metric: kind of score ("FID"), full name of a score ("FID-1000"), or a metric as in `eval/fid.py --metrics`.
        per_seed: give each evaluation a row of its own.

    Raises:
        ValueError: a source holds no evaluation, the names do not fit, or baseline or metric is unknown.
        OSError: OUT cannot be written to.
    """
    messages: list[str] = []
    comparison = read_comparison(sources, names, baseline, metric, messages, per_seed)
    report = write_comparison(comparison, out)
    return Report(report.table, [*messages, *report.messages])


def write_comparison(comparison: Comparison, out: Path) -> Report:
    """Writes the tables and charts of a comparison to OUT. OSError: OUT cannot be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{out} cannot be written to ({error.strerror or error}): give another --out") from error
    from sit_atconv.evaluation.charts import draw  # matplotlib imports slowly; user errors have been reported by now

    table = to_markdown(comparison)
    write_aside(out / "compare.md", table)
    write_aside(out / "compare.csv", to_csv(comparison))
    write_aside(out / "compare.json", to_json(comparison))
    charts, notes = draw(comparison, out)
    first = comparison.baseline
    warnings = [
        f"warning: {run.name} differs from {first.name}: {words}"
        for run in comparison.runs
        if (words := in_words(first.evaluation, run.evaluation))
    ]
    written = ", ".join(map(str, (*(out / f"compare.{kind}" for kind in ("md", "csv", "json")), *charts)))
    return Report(table, [*warnings, *notes, f"written: {written}"])


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command("compare"),
        usage="%(prog)s RUN [RUN ...] [--out DIR] [--names A B ...] [--baseline 1] [--metric FID]",
        description="Compares evaluations. Runs that differ in their seeds alone become one row: the mean with its "
        "standard error over seeds, and paired differences with a t interval. Prints a table and writes it to DIR as "
        "Markdown, CSV and JSON, with charts of the metric against sampler steps, guidance, training step and speed "
        "where at least two rows can be compared.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="JSON file that eval/fid.py wrote, or a folder of samples with one or more scores-*.json",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare"), metavar="DIR", help="folder to write tables and charts to"
    )
    parser.add_argument(
        "--names",
        nargs="+",
        metavar="NAME",
        help="one name for each row of the table (default: the parts of their paths that differ)",
    )
    parser.add_argument("--baseline", default="1", help="number or name of the row to compare all others with")
    parser.add_argument("--per-seed", action="store_true", help="show each seed in a row of its own")
    parser.add_argument(
        "--metric",
        default="FID",
        help=f"metric to compare and draw: {', '.join(kinds_of_scores())}, the full name of a score, "
        "or your own metric, by the name of its score or as module.NAME",
    )
    add_import_option(parser)
    return parser


if __name__ == "__main__":
    run_command(main)
