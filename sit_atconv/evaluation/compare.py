"""Evaluations side by side: a table with differences and their errors, warnings where protocols differ, charts.

    python eval/compare.py RUN RUN ...

A RUN is a JSON that eval/fid.py wrote, or the folder of samples that it wrote to.
"""

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sit_atconv.evaluation.comparison import in_words, read_comparison, to_csv, to_markdown
from sit_atconv.evaluation.metrics import kinds_of_scores
from sit_atconv.runtime.commands import ArgumentParser, add_import_option, run_command, user_errors
from sit_atconv.runtime.files import write_aside
from sit_atconv.runtime.installation import command


def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    with user_errors():
        report = compare(options.runs, options.out, options.names, options.baseline, options.metric)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may know neither ± nor →
    print(report.table, end="")
    print("\n".join(report.messages), file=sys.stderr)


@dataclass(frozen=True)
class Report:
    """The Markdown, and messages: how protocols differ, which charts were not drawn, what was written where."""

    table: str
    messages: list[str]


def compare(
    sources: Sequence[Path], out: Path, names: Sequence[str] | None = None, baseline: str = "1", metric: str = "FID"
) -> Report:
    """Writes OUT/compare.md, OUT/compare.csv and the charts that have something to show.

    Args:
        sources: files that eval/fid.py wrote, folders of samples with scores-*.json, and anything beside them that is
            to be passed over.
        out: where everything goes.
        names: of the evaluations; None takes what distinguishes their paths.
        baseline: number, from 1, or name of the run that the others are compared with.
        metric: "FID" and so on, or a score's whole name, or a metric as eval/fid.py takes it.

    Raises:
        ValueError: a source that holds no evaluation, names that do not fit, an unknown baseline or metric.
        OSError: OUT cannot be written to.
    """
    messages: list[str] = []
    comparison = read_comparison(sources, names, baseline, metric, messages)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{out} cannot be written to ({error.strerror or error}): give another --out") from error
    from sit_atconv.evaluation.charts import draw  # matplotlib takes its time, and all that can be wrong is known now

    table = to_markdown(comparison)
    write_aside(out / "compare.md", table)
    write_aside(out / "compare.csv", to_csv(comparison))
    charts, notes = draw(comparison, out)
    first = comparison.baseline
    warnings = [f"warning: {run.name} differs from {first.name}: {words}" for run in comparison.runs
                if (words := in_words(first.evaluation, run.evaluation))]
    written = ", ".join(map(str, (out / "compare.md", out / "compare.csv", *charts)))
    return Report(table, [*messages, *warnings, *notes, f"written: {written}"])


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
                        help=f"compared and drawn: {', '.join(kinds_of_scores())}, a score's whole name, or your own "
                        "metric, by the name of its score or as module.NAME")
    add_import_option(parser)
    return parser


if __name__ == "__main__":
    run_command(main)
