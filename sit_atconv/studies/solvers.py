"""How many evaluations of the model are enough: Frechet distance and speed of every solver and grid.

    python eval/solvers.py --ckpt RUN --cfg 2 --out FOLDER

Compares with many Euler steps from the same noise; writes a table, a chart and all figures as JSON.
"""

from sit_atconv.runtime.commands import (
    ArgumentParser,
    at_least,
    finite,
    is_main_process,
    positive,
    run_command,
    user_errors,
)
from sit_atconv.runtime.installation import command


def main(argv: list[str] | None = None) -> None:
    options = vars(make_parser().parse_args(argv))
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    if not is_main_process():  # one process computes
        return
    with user_errors():
        from sit_atconv.checkpoints.weights import locate_weights

        locate_weights(options["ckpt"])  # answers before torch is imported
        from sit_atconv.studies.solver_quality import Options, compare_solvers

        result = compare_solvers(Options(**options))
    baseline, out = result["points"][0], options["out"]
    than = f"{baseline['steps']} Euler steps ({baseline['distance']:.2f} +- {baseline['error']:.2f})"
    if result["enough"]:
        best = result["enough"][0]
        times = best["images_per_second"] / baseline["images_per_second"]
        print(f"{best['evaluations']:g} evaluations are enough: {best['solver']}, shift {best['shift']:g}, Frechet "
              f"distance {best['distance']:.2f}, is within two standard errors of {than} and {times:.1f} times as fast")
    else:
        print(f"none is within two standard errors of {than}")
    print(f"chart: {out}/solvers.png, table: {out}/solvers.md, figures: {out}/solvers.json")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command("solvers"),
        usage="%(prog)s --ckpt RUN --out FOLDER [--cfg 2] [--solvers heun unipc] [options]",
        description="Frechet distance against evaluations of the model, for every solver and grid, and the images per "
        "second of each. The same command again goes on where it was.",
    )
    parser.add_argument("--ckpt", required=True, help="a run, a checkpoint, an exported folder or a hub id")
    parser.add_argument("--out", required=True, help="folder of table, chart and JSON")
    parser.add_argument("--cfg", type=finite, default=None,
                        help="guidance scale (default: 2, or 1 without a trained null label)")
    parser.add_argument("--reference", default="digits", help="real images, as eval/fid.py takes them")
    parser.add_argument("--extractor", default="digits", help="of the features: inception, digits or a registered one")
    parser.add_argument("--weights", "--inception-weights", dest="extractor_weights", default=None, metavar="FILE",
                        help="of the extractor, as for eval/fid.py")
    parser.add_argument("--num-samples", type=at_least(100), default=1000, help="of each solver, with balanced labels")
    parser.add_argument("--batch-size", type=at_least(1), default=125, help="images at a time")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the noise, the same for all")
    parser.add_argument("--solvers", nargs="+", default=("euler", "heun", "unipc", "dpm++", "sde-euler"),
                        choices=("euler", "heun", "unipc", "dpm++", "sde-euler", "sde-heun"), help="to compare")
    parser.add_argument("--evaluations", type=at_least(1), nargs="+", default=(4, 6, 8, 12, 16, 24, 32, 48),
                        metavar="N", help="of the model, for each image")
    parser.add_argument("--shifts", type=positive, nargs="+", default=(0.5, 1.0, 2.0), metavar="S",
                        help="of the grid; above 1 it has more steps near noise")
    parser.add_argument("--baseline", type=at_least(1), default=250, metavar="STEPS", help="of Euler, to compare with")
    return parser


if __name__ == "__main__":
    run_command(main)
