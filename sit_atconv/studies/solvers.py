"""Comparison of solvers: Frechet distance and speed of every solver and grid by NFE.

    python eval/solvers.py --ckpt RUN --cfg 2 --out FOLDER

The baseline is Euler with many steps from the same noise. Writes a table, a chart, and all figures as JSON.
"""

from sit_atconv.runtime.commands import (
    ArgumentParser,
    add_import_option,
    at_least,
    finite,
    is_main_process,
    positive,
    run_command,
    user_errors,
)
from sit_atconv.runtime.installation import command
from sit_atconv.runtime.tables import import_module_of
from sit_atconv.sampling.solvers import SOLVERS


def main(argv: list[str] | None = None) -> None:
    options = vars(make_parser().parse_args(argv))
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    if not is_main_process():  # only rank 0 computes
        return
    with user_errors():
        for name in options["solvers"]:
            if SOLVERS.find(import_module_of(name)).is_adaptive:
                raise ValueError(f"--solvers {name} chooses its own number of steps, so leave it out")
        from sit_atconv.checkpoints.weights import locate_weights

        locate_weights(options["ckpt"])  # reports a wrong path before the slow import of torch
        from sit_atconv.studies.solver_quality import Options, compare_solvers

        result = compare_solvers(Options(**options))
    baseline, out = result["points"][0], options["out"]
    than = f"{baseline['steps']} Euler steps ({baseline['distance']:.2f} +- {baseline['error']:.2f})"
    if result["enough"]:
        best = result["enough"][0]
        times = best["images_per_second"] / baseline["images_per_second"]
        print(
            f"{best['evaluations']:g} evaluations are enough: {best['solver']}, shift {best['shift']:g}, Frechet "
            f"distance {best['distance']:.2f}, is within two standard errors of {than} and {times:.1f} times as fast"
        )
    else:
        print(f"no solver is within two standard errors of {than}")
    print(f"chart: {out}/solvers.png, table: {out}/solvers.md, figures: {out}/solvers.json")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command("solvers"),
        usage="%(prog)s --ckpt RUN --out FOLDER [--cfg 2] [--solvers heun unipc] [options]",
        description="Measures the Frechet distance and the images per second of every solver and grid at several "
        "numbers of model evaluations (NFE). After an interruption the same command resumes.",
    )
    parser.add_argument("--ckpt", required=True, help="run folder, checkpoint, exported folder or hub id of the model")
    parser.add_argument("--out", required=True, help="folder to write table, chart and JSON to")
    parser.add_argument(
        "--cfg", type=finite, default=None, help="guidance scale (default: 2, or 1 without a trained null label)"
    )
    parser.add_argument("--reference", default="digits", help="real images to compare with, given as for eval/fid.py")
    parser.add_argument(
        "--extractor",
        default="digits",
        help="network that computes the features: inception, digits or a registered one",
    )
    parser.add_argument(
        "--weights",
        "--inception-weights",
        dest="extractor_weights",
        default=None,
        metavar="FILE",
        help="weights file of the extractor, as for eval/fid.py",
    )
    parser.add_argument(
        "--num-samples", type=at_least(100), default=1000, help="number of samples of each solver, with balanced labels"
    )
    parser.add_argument("--batch-size", type=at_least(1), default=125, help="number of images per forward pass")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the noise, the same for all solvers")
    fixed = [name for name, solver in SOLVERS.items() if not solver.is_adaptive]
    parser.add_argument(
        "--solvers",
        nargs="+",
        default=("euler", "heun", "unipc", "dpm++", "sde-euler"),
        metavar="SOLVER",
        help=f"solvers to compare: {', '.join(fixed)}, or your own as MODULE.NAME",
    )
    parser.add_argument(
        "--evaluations",
        type=at_least(1),
        nargs="+",
        default=(4, 6, 8, 12, 16, 24, 32, 48),
        metavar="N",
        help="numbers of model evaluations per image (NFE) to compare",
    )
    parser.add_argument(
        "--shifts",
        type=positive,
        nargs="+",
        default=(0.5, 1.0, 2.0),
        metavar="S",
        help="shifts of the time grid to compare; above 1 there are more steps near noise",
    )
    parser.add_argument(
        "--baseline", type=at_least(1), default=250, metavar="STEPS", help="number of Euler steps of the baseline"
    )
    add_import_option(parser)
    return parser


if __name__ == "__main__":
    run_command(main)
