"""A page about training runs: one HTML file with tables, curves, scores, pictures and commands.

    python eval/report.py RUN... [--out report.html]

Everything is read from the records of the runs and of their samples; the file needs nothing else, and no network.
"""

from pathlib import Path

from sit_atconv.runtime.commands import ArgumentParser, run_command, user_errors
from sit_atconv.runtime.installation import command


def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    with user_errors():
        from sit_atconv.studies.pages import read_runs, write_page

        runs = read_runs(options.runs, options.scores)
        out = options.out or options.runs[0] / "report.html"
        if not out.absolute().parent.is_dir():
            raise ValueError(f"{out} cannot be written: give --out a file in a folder that exists")
        write_page(runs, out, options.title or " and ".join(run.name for run in runs), options.speed)
    print(f"page: {out}")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command("report"),
        usage="%(prog)s RUN [RUN ...] [--scores FILE ...] [--out report.html]",
        description="Writes one HTML page about training runs: what was trained on what, curves, scores with their "
        "errors, samples, speed and commands. The pictures are inside the file.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of training runs")
    parser.add_argument(
        "--scores",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="records of eval/fid.py that are not beside samples in RUN/samples",
    )
    parser.add_argument("--speed", type=Path, metavar="PNG", help="chart of eval/speed.py to show")
    parser.add_argument("--title", help="heading (default: the names of the runs)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="file to write (default: report.html in the first run)"
    )
    return parser


if __name__ == "__main__":
    run_command(main)
