"""Study of one-step generation on the digits: MeanFlow beside flow matching, over training seeds.

    python benchmarks/one_step.py --out runs/one-step --seeds 0 1 2

Trains each variant with each seed, draws 1,000 balanced samples, and writes OUT/one-step.md: Frechet distances in the
features of the digit classifier, averaged over seeds, and images per second. After an interruption the same command
resumes.
"""

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from sit_atconv.checkpoints.weights import load_weights
from sit_atconv.data.codecs import open_codec
from sit_atconv.evaluation.extractors import open_extractor
from sit_atconv.evaluation.features import extract_features
from sit_atconv.evaluation.gaussians import fit_gaussian
from sit_atconv.evaluation.image_sets import open_image_set
from sit_atconv.runtime.commands import ArgumentParser, at_least, run_command, user_errors
from sit_atconv.runtime.devices import open_device, prepare_device
from sit_atconv.runtime.files import write_aside
from sit_atconv.sampling import Sampler
from sit_atconv.studies.solver_quality import Options, measure

ONE_STEP = ["--config", "digits-onestep"]
ATTENTION = "flow matching, attention"
VARIANTS = {
    "flow matching": ["--config", "digits"],
    "MeanFlow": ONE_STEP,
    "MeanFlow, tangent of the model": [*ONE_STEP, "--flow.tangent", "model"],
    "MeanFlow by differences": [*ONE_STEP, "--flow.derivative", "difference"],
    "MeanFlow, from flow matching": [*ONE_STEP, "--train.steps", "900", "--train.lr", "1e-3"],
    ATTENTION: ["--config", "digits", "--preset", "SiT-Tiny/2"],
    "MeanFlow, attention": [*ONE_STEP, "--preset", "SiT-Tiny/2"],
}
SAMPLERS = {
    "1 step": Sampler(solver="jump", steps=1, cfg=1.0),
    "2 steps": Sampler(solver="jump", steps=2, cfg=1.0),
    "4 steps": Sampler(solver="jump", steps=4, cfg=1.0),
    "UniPC, NFE 4": Sampler(solver="unipc", steps=4, cfg=1.0),
    "Heun, NFE 24": Sampler(solver="heun", steps=12, cfg=1.0),
}
GUIDED = {"250 guided Euler steps": Sampler(solver="euler", steps=250, cfg=2.0)}  # of the variant ATTENTION alone


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(usage="python benchmarks/one_step.py --out FOLDER [--seeds 0 1 2] [options]")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of the table")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS], help=f"variants: {', '.join(VARIANTS)}")
    options = parser.parse_args(argv)
    with user_errors():
        if unknown := {*options.variants} - {*VARIANTS}:
            raise ValueError(f"--variants must be among {', '.join(VARIANTS)}, not {', '.join(sorted(unknown))}")
        results = [study(options.out, variant, seed) for variant in options.variants for seed in options.seeds]
    table = table_of(results)
    write_aside(options.out / "one-step.md", table)
    print(table, end="")


def study(out: Path, variant: str, seed: int) -> dict:
    """Trains one variant with one seed and measures it, once; returns what OUT/RUN.json holds."""
    run = out / f"{variant.replace(', ', '-').replace(' ', '-').lower()}-{seed}"
    record = run.with_suffix(".json")
    if record.exists():
        return json.loads(record.read_text())
    start = ["--init-from", str(out / f"flow-matching-{seed}")] if variant.endswith("from flow matching") else []
    command = ["accelerate", "launch", "--quiet", "sit_atconv/train.py", *VARIANTS[variant], *start]
    subprocess.run([*command, "--train.seed", str(seed), "--out", str(run)], check=True)

    device = open_device("cpu")
    prepare_device(device)
    weights, network = load_weights(str(run)), open_extractor("digits", None, device)
    real = fit_gaussian(extract_features(network, open_image_set("digits"), 500, device)["features"])
    codec, two_times = open_codec(weights.recipe.codec), weights.traits["two_times"]
    settings = Options(str(run), str(out), 1.0, "digits", "digits", None, 1000, 250, 0, (), (), (), 250)
    result: dict = {"variant": variant, "seed": seed}
    warm_up = replace(settings, num_samples=250)
    measure(Sampler(solver="euler", steps=1, cfg=1.0), weights, codec, network, real, warm_up, device)
    for name, sampler in (SAMPLERS | (GUIDED if variant == ATTENTION else {})).items():
        if two_times or sampler.solver != "jump":
            point = measure(sampler, weights, codec, network, real, settings, device)
            result[name] = {"distance": point.distance, "error": point.error, "rate": point.images_per_second}
    write_aside(record, json.dumps(result, indent=1))
    return result


def table_of(results: list[dict]) -> str:
    """Returns two tables in Markdown: distances, and images per second.

    Distances are means with the standard error over seeds, or that of the samples for one seed.
    """
    names = [name for name in (*SAMPLERS, *GUIDED) if any(name in result for result in results)]
    lines: dict[str, list[str]] = {"distance": [], "rate": []}
    for of_kind in lines.values():
        of_kind += [f"| trained by | seeds | {' | '.join(names)} |", f"|---|---:|{'---:|' * len(names)}"]
    for variant in dict.fromkeys(result["variant"] for result in results):
        runs = [result for result in results if result["variant"] == variant]
        for kind, of_kind in lines.items():
            cells = []
            for name in names:
                values = [run[name][kind] for run in runs if name in run]
                if not values:
                    cells.append("")
                elif kind == "rate":
                    cells.append(f"{mean(values):.3g}")
                else:
                    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else runs[0][name]["error"]
                    cells.append(f"{mean(values):.2f} ± {error:.2f}")
            of_kind.append(f"| {variant} | {len(runs)} | {' | '.join(cells)} |")
    return "Frechet distance:\n\n{distance}\n\nImages per second:\n\n{rate}\n".format(
        **{kind: "\n".join(of_kind) for kind, of_kind in lines.items()}
    )


if __name__ == "__main__":
    run_command(main)
