import csv
import io
import itertools
import json
import math
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from sit_atconv.evaluation.charts import pareto_front, trend
from sit_atconv.evaluation.compare import compare
from sit_atconv.evaluation.comparison import (
    Comparison,
    Run,
    read_comparison,
)
from sit_atconv.evaluation.comparison_inputs import distinct_names, paths_to_name
from sit_atconv.evaluation.comparison_table import in_words, rows, to_csv, to_markdown
from sit_atconv.evaluation.records import Evaluation
from sit_atconv.evaluation.scores import Score, jackknife_error
from sit_atconv.runtime.installation import command

FOLDER = "step0400000-cfg{cfg:g}-{solver}{steps}-balanced-seed0-n{num}"


def record(
    fid=3.0,
    model="atconv",
    step=400000,
    cfg=1.5,
    solver="heun",
    steps=12,
    num=1000,
    labels="balanced",
    reference="ab" * 32,
    seed=0,
    device="cuda",
    **subject,
):
    """Returns an evaluation whose group values share the noise of all others and have a little of their own."""
    without = [fid + 0.3 * math.sin(i) + 0.02 * math.cos(i * fid) for i in range(20)]
    sampler = {"cfg": cfg, "solver": solver, "steps": steps, "times": None, "cfg_interval": [0.0, 1.0]}
    return Evaluation(
        {
            f"FID-{num}": Score(fid, jackknife_error(without), without),
            "IS": Score(100 - fid, 1.5),
            "recall": Score(0.61),
        },
        {
            "samples": {"num": num, "image_size": [8, 8], "labels": labels, "sampler": sampler},
            "reference": {"num": 1797, "content": reference},
            "extractor": {"name": "inception", "sha256": "cd" * 32},
        },
        {
            "ckpt": f"runs/{model}",
            "step": step,
            "weights": f"{model} {step}",
            "seed": seed,
            "device": device,
            "processes": 1,
            "images_per_second": (50 if model == "atconv" else 40) / steps,
            **subject,
        },
        {},
    )


def named(**evaluations):
    return [Run(name, (evaluation,)) for name, evaluation in evaluations.items()]


@pytest.fixture
def save(tmp_path):
    """save(evaluation, ...) writes evaluations and returns their folders of samples."""

    def write(*evaluations):
        folders = []
        for e in evaluations:
            sampler = e.protocol["samples"]["sampler"]
            name = FOLDER.format(num=e.protocol["samples"]["num"], **sampler)
            folders.append(tmp_path / e.subject["ckpt"] / "samples" / name)
            folders[-1].mkdir(parents=True, exist_ok=True)
            e.save(folders[-1] / "scores-inception.json")
        return folders

    return write


@pytest.fixture
def read(save):
    return lambda *evaluations, baseline="1", metric="FID": read_comparison(
        save(*evaluations), None, baseline, metric, []
    )


def column(comparison, start):
    return [next(value for name, value in row.items() if name.startswith(start)) for row in rows(comparison)]


@pytest.mark.parametrize(
    ("subject", "model"),
    [
        ({"ckpt": "runs/x", "path": "elsewhere"}, "runs/x"),
        ({"ckpt": "/checkpoints/x.pt"}, "/checkpoints/x.pt"),
        ({"ckpt": "runs/x/checkpoints/step-0000400/ema-0.999"}, "runs/x"),
        ({"path": "published.npz"}, "published.npz"),
        ({"path": "runs/x/samples/step0000400-cfg2-heun12"}, "runs/x"),
        ({}, "."),
    ],
)
def test_the_model_is_the_folder_of_its_run(subject, model):
    assert Run("", (Evaluation({}, {}, subject, {}),)).model == Path(model)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["x/samples/step1-cfg1-heun12-n50/scores-a", "x/samples/step1-cfg2-heun12-n50/scores-a"], ["cfg1", "cfg2"]),
        (["runs/net-a/samples/cfg1-heun12/scores-x", "runs/net-b/samples/cfg1-heun12/scores-x"], ["a", "b"]),
        (["runs/a/samples/cfg1-n5/scores-x", "runs/b/samples/cfg2-n5/scores-x"], ["a/cfg1", "b/cfg2"]),
        (["s/cfg1/scores-digits", "s/cfg1/scores-inception"], ["digits", "inception"]),
        (["s/cfg1/scores-x", "s/cfg1-compiled/scores-x"], ["cfg1", "cfg1-compiled"]),  # "cfg1" alone would become empty
        (["s/a-b/scores-x", "s/b-a/scores-x"], ["a-b", "b-a"]),
        (
            ["published/scores-x", "runs/x/samples/cfg1-n5/scores-x", "runs/x/samples/cfg2-n5/scores-x"],
            ["published", "cfg1", "cfg2"],
        ),
        (["sit/scores-x", "runs/net-a/samples/1/scores-x", "runs/net-b/samples/1/scores-x"], ["sit", "a/1", "b/1"]),
        (["/w/sit-xl/scores-x", "/w/runs/y/samples/cfg1-n5/scores-x"], ["sit-xl", "cfg1-n5"]),
        (
            ["published/dit", "published/sit", "x/cfg1-n5/scores-x"],
            ["published/dit", "published/sit", "cfg1-n5/scores-x"],
        ),
        (["s/a/scores-x", "elsewhere/s/a/scores-x"], ["s/a", "elsewhere/s/a"]),
        (["runs/x/samples/cfg1-heun12/scores-x"], ["cfg1-heun12"]),
        (["runs/x/mine"], ["mine"]),
    ],
)
def test_names_are_the_parts_of_the_paths_that_differ(paths, names):
    assert distinct_names(paths_to_name([Path(path + ".json") for path in paths])) == names


def test_each_file_is_read_once_and_a_folder_may_hold_several(save):
    (folder,) = save(record())
    (folder / "scores-digits.json").write_bytes((folder / "scores-inception.json").read_bytes())
    (folder / "scores.json").write_text("{}")
    found = read_comparison([folder, folder / "scores-digits.json", folder / ".." / folder.name], None, "1", "FID", [])
    assert [run.name for run in found.runs] == ["digits", "inception"]


def test_errors_name_what_cannot_be_compared(save, tmp_path):
    folders = save(record(), record(cfg=2.0))
    (tmp_path / "empty").mkdir()
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "0.png").touch()
    (tmp_path / "list.json").write_text("[]")
    for sources, options, message in (
        ([tmp_path / "nowhere"], {}, "nowhere does not exist: give a JSON"),
        ([tmp_path / "empty"], {}, r"empty contains neither scores-\*\.json nor samples: give a folder"),
        ([tmp_path / "samples"], {}, "samples contains no scores-.*: evaluate it first"),
        ([tmp_path / "list.json"], {}, "list.json is not an evaluation"),
        (
            [tmp_path / "list.json", tmp_path / "empty", tmp_path / "empty"],
            {},
            r"none of these is an evaluation \(1 JSON file, 2 folders without scores-\*.json\): evaluate samples first",
        ),
        (folders, {"names": ["a"]}, "1 names for 2 rows: give one for each of cfg1.5, cfg2$"),
        (folders, {"names": ["a", "a"]}, "'a', 'a' are not distinct"),
        (folders, {"names": ["a", " "]}, "not distinct, or empty"),
        (folders, {"baseline": "3"}, "no run '3' to be the baseline: give .* from 1 to 2, or one .* cfg1.5, cfg2$"),
        (folders, {"baseline": "0"}, "no run '0'"),
        (folders, {"metric": "KID"}, "baseline cfg1.5 has no KID: give --metric one of FID-1000, IS, recall"),
    ):
        with pytest.raises(ValueError, match=message):
            read_comparison(sources, **{"names": None, "baseline": "1", "metric": "FID", "messages": []} | options)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file cannot be written to .*: give another --out"):
        compare(folders, tmp_path / "file")


def test_a_baseline_that_is_both_a_name_and_a_number_is_ambiguous(save):
    folders = save(record(), record(cfg=2.0))
    chosen = read_comparison(folders, ["2", "x"], "x", "FID", [])
    assert chosen.baseline is chosen.runs[1]
    with pytest.raises(ValueError, match="--baseline 2 is ambiguous: it is the number of run x and the name"):
        read_comparison(folders, ["2", "x"], "2", "FID", [])
    assert read_comparison(folders, ["1", "x"], "1", "FID", []).baseline.name == "1"


def test_the_baseline_is_the_first_or_chosen_by_number_or_name(read):
    both = record(), record(cfg=2.0)
    for given, name in (("1", "cfg1.5"), ("2", "cfg2"), ("cfg2", "cfg2")):
        assert read(*both, baseline=given).baseline.name == name


def test_the_metric_is_found_by_kind_or_full_name(read):
    digits = record()
    digits.scores.update({"FD-digits-1000": Score(7.0), "score-digits": Score(2.0)})
    assert read(digits).metric == "FID-1000"
    assert read(digits, metric="FD-digits-1000").metric == "FD-digits-1000"
    del digits.scores["FID-1000"], digits.scores["IS"]
    assert read(digits).metric == "FD-digits-1000" and read(digits, metric="IS").metric == "score-digits"


def test_differences_are_paired_and_need_the_same_measurement(read):
    base, better = record(3.0), record(2.5, cfg=2.0)
    others = [record(2.5, cfg=3.0, seed=1), record(2.0, num=500, cfg=4.0), record(2.0, reference="", cfg=5.0)]
    none, paired, independent, fewer, other = column(read(base, better, *others), "difference in FID-1000")
    assert none is fewer is other is None
    assert paired.value == independent.value == -0.5
    assert paired.error < 0.6 * independent.error
    errors = base.scores["FID-1000"].error, better.scores["FID-1000"].error
    assert independent.error == pytest.approx(math.hypot(*errors))
    assert [gap and gap.value for gap in column(read(better, base, baseline="2"), "difference")] == [-0.5, None]


def test_the_table_has_scores_and_errors_and_bold_differences_beyond_two_errors(read):
    runs = [
        record(3.0),
        record(2.5, cfg=2.0),
        record(2.99, cfg=3.0),
        record(1.0, cfg=4.0, num=500, images_per_second=None),
    ]
    comparison = read(*runs)
    lines = to_markdown(comparison).splitlines()
    head, *body = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    assert head == [
        "name",
        "FID-1000",
        "FID-500",
        "IS",
        "recall",
        "difference in FID-1000",
        "images/s",
        "training step",
        "protocol: baseline → its own",
    ]
    first, better, same, fewer = (dict(zip(head, row, strict=True)) for row in body[1:])
    assert first["name"].endswith(" (baseline)") and first["difference in FID-1000"] == first[head[-1]] == ""
    assert first["FID-1000"] == str(runs[0].scores["FID-1000"]) and " ± " in first["FID-1000"]
    assert first["FID-500"] == ""
    assert (first["IS"], first["recall"], first["images/s"]) == ("97.0 ± 1.5", "0.61", "4.167")
    assert first["training step"] == "400000"
    assert better["difference in FID-1000"] == f"**{column(comparison, 'difference')[1]}**"
    assert "*" not in same["difference in FID-1000"] and same["difference in FID-1000"].startswith("-0.01")
    assert better[head[-1]] == "cfg 1.5 → 2"
    assert (fewer["FID-1000"], fewer["images/s"], fewer["difference in FID-1000"]) == ("", "", "")
    assert fewer["FID-500"] == str(runs[3].scores["FID-500"]) and fewer[head[-1]] == "num 1000 → 500; cfg 1.5 → 4"
    assert " **+0.500 ± " in to_markdown(read(runs[1], runs[0]))


def test_shared_settings_and_a_note_follow_the_table(read):
    text = to_markdown(read(record(), record(cfg=2.0), record(cfg=2.0, steps=25)))
    assert "- samples: num 1000, image size [8, 8], labels balanced\n" in text
    assert "\n- sampler: solver heun, cfg interval [0, 1]\n" in text
    assert "- reference: num 1797, content abababab\n- extractor: name inception, sha256 cdcdcdcd\n" in text
    assert "the reference is fixed" in text and "2606.20536" in text and text.endswith(".\n")


def test_the_table_has_the_hardware_if_it_differs(read):
    assert column(read(record(), record(cfg=2.0, device="cpu")), "sampled on") == ["cuda x 1", "cpu x 1"]
    assert "sampled on" not in to_markdown(read(record(), record(cfg=2.0)))


def test_the_csv_has_all_digits_and_a_column_for_each_error(read):
    runs = [record(3.0), record(2.0 + 1 / 3, cfg=2.0), record(num=50, cfg=3.0)]
    comparison = read(*runs)
    first, better, fewer = csv.DictReader(io.StringIO(to_csv(comparison)))
    assert float(better["FID-1000"]) == runs[1].scores["FID-1000"].value
    assert float(better["error of FID-1000"]) == runs[1].scores["FID-1000"].error
    gap = column(comparison, "difference")[1]
    assert float(better["difference in FID-1000"]) == gap.value
    assert float(better["error of difference in FID-1000"]) == gap.error
    assert first["difference in FID-1000"] == fewer["FID-1000"] == fewer["error of FID-1000"] == ""
    assert (first["name"], first["error of recall"], first["training step"]) == ("cfg1.5-n1000", "", "400000")


def test_protocol_differences_in_words_are_short():
    base = record(num=50_000)
    assert in_words(base, base) == ""
    assert in_words(base, record(num=10_000, labels="random")) == "num 50000 → 10000; labels balanced → random"
    assert in_words(base, record(num=50_000, reference="ef" * 32)) == "reference content abababab → efefefef"
    bare = record(num=50_000, labels=None)
    bare.protocol["samples"]["sampler"] = None
    assert in_words(base, bare) == "labels balanced → none; sampler known → unknown"
    assert in_words(bare, base) == "labels none → balanced; sampler unknown → known"
    times = record(num=50_000)
    times.protocol["samples"]["sampler"]["times"] = [i / 50 for i in range(51)]
    assert in_words(base, times).startswith("times none → [0, 0.02, ") and len(in_words(base, times)) < 60


def test_lines_join_runs_that_agree_in_everything_else():
    runs = named(
        a=record(steps=25),
        b=record(steps=6),
        c=record(cfg=2.0, steps=6),
        d=record(steps=50, seed=1),
        e=record(reference=""),
        f=record(step=1),
        g=record(model="attention"),
        h=record(model="attention", steps=25),
        i=record(cfg=2.0, solver="unipc"),
    )

    def joined(along, runs=runs):
        return [(model, settings, [(x, run.name) for x, run in line]) for model, settings, line in trend(runs, along)]

    assert joined("samples.sampler.steps") == [
        ("atconv", "", [(6, "b"), (25, "a")]),
        ("attention", "", [(12, "g"), (25, "h")]),
    ]
    assert joined("samples.sampler.cfg") == [("atconv", "", [(1.5, "b"), (2.0, "c")])]
    assert joined("step") == [] and trend([], "step") == []
    trained = named(
        v=record(step=2, cfg=4.0),
        w=record(step=3, cfg=4.0, ckpt="runs/atconv/checkpoints/step-03/ema"),
        x=record(step=2),
        y=record(step=1),
        z=record(step=3, model="attention"),
    )
    assert joined("step", trained) == [
        ("atconv", "cfg 4", [(2, "v"), (3, "w")]),
        ("atconv", "cfg 1.5", [(1, "y"), (2, "x")]),
    ]


def test_lines_of_two_emas_of_one_run_have_different_labels():
    runs = named(a=record(steps=6), b=record(), c=record(steps=6, weights="ema"), d=record(weights="ema"))
    labels = [label for _, label, _ in trend(runs, "samples.sampler.steps")]
    assert labels == ["weights atconv 400000", "weights ema"]


def test_the_pareto_front_holds_points_that_no_other_beats():
    points = [(1, 5.0), (2, 4.0), (2, 6.0), (4, 4.5), (8, 9.0), (3, 4.5), (0.5, 4.0)]
    assert pareto_front(points) == [(2, 4.0), (4, 4.5), (8, 9.0)]
    assert pareto_front(points, higher=True) == [(8, 9.0)]
    assert pareto_front([(1, 5.0), (2, 6.0), (2, 3.0), (3, 2.0)], higher=True) == [(2, 6.0), (3, 2.0)]


@pytest.fixture
def charts(save, tmp_path, monkeypatch):
    """charts(record, ..., metric=...) returns {file name: drawn figure} and all messages."""

    def draw(*evaluations, metric="FID"):
        figures = {}
        monkeypatch.setattr(
            Figure, "savefig", lambda self, path, **options: figures.update({path.name: self}) or path.write_text("")
        )
        report = compare(save(*evaluations), tmp_path / "out", metric=metric)
        return {name.removeprefix(".partial-"): figure for name, figure in figures.items()}, "\n".join(report.messages)

    return draw


def lines_of(figure):
    """Returns label -> (points, lengths of error bars)."""
    (axes,) = figure.axes
    return {
        bars.get_label(): (
            bars[0].get_xydata().tolist(),
            [segment[1][1] - segment[0][1] for segment in bars[2][0].get_segments()],
        )
        for bars in axes.containers
    }


def test_charts_show_scores_with_two_standard_errors(charts):
    grid = [
        record(fid, model, cfg=cfg, steps=steps)
        for fid, (model, cfg, steps) in enumerate(itertools.product(("atconv", "attention"), (1.5, 2.0), (6, 12)), 2)
    ]
    figures, said = charts(*grid)
    assert sorted(figures) == ["fid-cfg.png", "fid-steps.png", "pareto.png"]
    assert "no fid-training.png: no two runs differ in the training step alone" in said
    drawn = lines_of(figures["fid-steps.png"])
    assert list(drawn) == ["atconv, cfg 1.5", "atconv, cfg 2", "attention, cfg 1.5", "attention, cfg 2"]
    points, bars = drawn["atconv, cfg 2"]
    assert points == [[6, 4.0], [12, 5.0]]
    assert bars == pytest.approx([4 * e.scores["FID-1000"].error for e in grid[2:4]])
    (axes,) = figures["fid-steps.png"].axes
    assert axes.get_ylabel() == "FID-1000 (lower is better)\nbars: two standard errors, or 95 % interval over seeds"
    assert axes.get_xlabel() == "steps of the sampler" and [t.get_text() for t in axes.get_xticklabels()] == ["6", "12"]
    styles = {bars.get_label(): (bars[0].get_color(), bars[0].get_linestyle()) for bars in axes.containers}
    assert len(set(styles.values())) == 4 and styles["atconv, cfg 2"][0] == styles["attention, cfg 2"][0]
    assert figures["fid-steps.png"].get_suptitle() == "num 1000, labels balanced, solver heun"
    of_models, _ = charts(grid[0], grid[1], grid[4], grid[5])
    colors = {bars.get_label(): bars[0].get_color() for bars in of_models["fid-steps.png"].axes[0].containers}
    assert list(colors) == ["atconv", "attention"] and len(set(colors.values())) == 2


def test_the_pareto_chart_names_all_points_and_keeps_other_hardware_off_its_front(charts):
    runs = [record(3 + 0.01 * i, cfg=1 + i / 8, steps=10 + i // 6, solver="a_long_name") for i in range(9)]
    elsewhere = record(1.0, cfg=9.0, steps=1, device="cpu", solver="a_long_name_of_a_solver")
    figures, said = charts(*runs, elsewhere)
    figure = figures["pareto.png"]
    (axes,) = figure.axes
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    assert len({label.get_text() for label in labels}) == 10 and axes.get_xscale() == "log"
    boxes = [Text.get_window_extent(label, renderer) for label in labels]  # without the connecting lines
    assert [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)] == []
    assert all(figure.bbox.containsx(box.x1) and figure.bbox.containsy(box.y0) for box in boxes)
    assert [label.xy for label in labels] == [
        (e.subject["images_per_second"], e.scores["FID-1000"].value) for e in [*runs, elsewhere]
    ]
    fronts = [line for line in axes.lines if line.get_drawstyle() == "steps-pre"]
    assert fronts[0].get_xydata()[1:-1].tolist() == [[5.0, 3.0]]
    assert [bars[0].get_markerfacecolor() == "white" for bars in axes.containers] == [False] * 9 + [True]
    assert "was sampled on cpu x 1, most runs on cuda x 1: its speed is not comparable" in said
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["Pareto front on cuda x 1", "sampled on cpu x 1: speed not comparable"]


def test_charts_need_the_measurement_of_the_baseline_and_old_charts_are_deleted(charts, tmp_path):
    assert list(charts(record(), record(steps=25))[0]) == ["fid-steps.png", "pareto.png"]
    figures, said = charts(record(), record(steps=6, num=500), record(steps=25, reference="", solver="unipc"))
    assert figures == {} and sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "compare.csv",
        "compare.json",
        "compare.md",
    ]
    assert "no pareto.png: fewer than two runs record images per second" in said
    assert "not in the charts (another score, reference or extractor): heun6-n500, unipc25-n1000" in said
    figures, _ = charts(record(step=1), record(step=2, cfg=2.0), record(step=3, cfg=3.0), metric="IS")
    assert list(figures) == ["pareto.png"] and "higher is better" in figures["pareto.png"].axes[0].get_ylabel()


def test_the_training_chart_has_steps_on_its_x_axis(charts, save, tmp_path):
    early = save(record(4.0, step=200_000))[0]
    (tmp_path / "early").mkdir()
    (early / "scores-inception.json").rename(tmp_path / "early" / "scores-inception.json")
    report = compare([tmp_path / "early", *save(record(3.0))], tmp_path / "out")
    assert str(tmp_path / "out" / "fid-training.png") in report.messages[-1]
    assert (tmp_path / "out" / "fid-training.png").read_bytes().startswith(b"\x89PNG")
    assert not any(line.startswith("warning") for line in report.messages)


def test_each_run_with_another_protocol_gets_one_warning(save, tmp_path):
    runs = save(record(), record(cfg=2.0, steps=25, labels="random"), record(solver="euler", step=1))
    report = compare(runs, tmp_path / "out", names=["a", "b", "c"])
    assert report.messages[:2] == [
        "warning: b differs from a: labels balanced → random; cfg 1.5 → 2; steps 12 → 25",
        "warning: c differs from a: solver heun → euler",
    ]
    assert (tmp_path / "out" / "compare.md").read_text() == report.table and "| a (baseline) | 3." in report.table
    assert report.messages[-1].startswith(f"written: {tmp_path / 'out' / 'compare.md'}, ")
    assert json.loads((runs[0] / "scores-inception.json").read_text())["scores"]  # the input is unchanged


@pytest.mark.parametrize(
    ("metric", "part", "is_alike"),
    [
        ("FID-1000", "reference", False),
        ("FID-1000", "compared", True),
        ("recall", "reference", True),
        ("recall", "compared", False),
        ("IS", "reference", True),
        ("IS", "compared", True),
        ("IS", "extractor", False),
        ("recall", "metrics", False),
        ("IS", "samples", False),
        ("recall", "samples", False),
    ],
)
def test_a_score_is_subtracted_if_everything_it_depends_on_agrees(metric, part, is_alike):
    """FID depends on the statistics, precision and recall on the compared images, IS on neither; all on the method."""
    a, b = record(), record()
    for evaluation, value in ((a, 3), (b, 5)):
        evaluation.protocol.update(compared={}, metrics={})
        evaluation.protocol[part]["num"] = value
    runs = named(a=a, b=b)
    assert Comparison(runs, runs[0], metric).is_measured_alike(runs[1]) == is_alike


def test_sources_without_a_record_are_skipped_and_counted(save, tmp_path):
    """Such as previews and samples that were not evaluated, which `runs/*/samples/*` matches."""
    folders = save(record(), record(cfg=2.0))
    samples = folders[0].parent
    for name in ("step-1.png", "step-2.png", "samples.npz", "no suffix"):
        (samples / name).write_bytes(b"\x89\xff")
    (samples / "manifest.json").write_text(json.dumps({"settings": {}, "labels": [1] * 9999}))
    (samples / "list.json").write_text("not closed: [")
    for name in ("empty [1]", "other"):
        (samples / name).mkdir()
    (samples / "other" / "manifest.json").touch()  # only this one looks like samples
    report = compare(sorted(samples.iterdir()), tmp_path / "out")
    assert [line for line in report.messages if line.startswith("skipped")] == [
        "skipped: 2 folders without scores-*.json, 2 JSON files, 1 file, 1 NPZ file, 2 PNG files (to evaluate "
        f"{samples / 'other'}: {command('fid')} --samples {samples / 'other'} --reference "
        "REFERENCE)"
    ]
    assert "| cfg1.5 (baseline) |" in report.table and "| cfg2 |" in report.table


@pytest.mark.parametrize("name", ["scores-digits-1.json", "x.scores-digits-1.json", "mine.json", "mine.txt"])
def test_a_damaged_record_is_an_error_even_among_other_files(save, tmp_path, name):
    folders = save(record())
    text = (folders[0] / "scores-inception.json").read_text()
    (tmp_path / name).write_text(text[: len(text) // 2])
    (tmp_path / "step.png").write_bytes(b"\x89")
    with pytest.raises(ValueError, match=f"{name} is not an evaluation"):
        read_all([*folders, tmp_path / name, tmp_path / "step.png"])
    (folders[0] / "scores-digits.json").write_text("")
    with pytest.raises(ValueError, match=r"scores-digits\.json is not an evaluation"):
        read_all(folders)


def read_all(sources):
    return read_comparison(sources, None, "1", "FID", [])


def test_the_records_of_an_npz_are_found_by_its_name(tmp_path):
    """This includes names that are glob patterns."""
    for name in ("x[1]", "x1"):
        (tmp_path / f"{name}.npz").write_bytes(b"PK")
        record().save(tmp_path / f"{name}.scores-inception-1.json")
    runs = read_all([tmp_path / "x[1].npz", tmp_path / "x1.npz", tmp_path / "x1.scores-inception-1.json"]).runs
    assert [run.name for run in runs] == ["x[1].scores", "x1.scores"]


def test_a_record_under_any_name_is_found(tmp_path):
    record().save(tmp_path / "mine.txt")
    record(cfg=2.0).save(tmp_path / "b.json")
    assert len(read_all([tmp_path / "mine.txt", tmp_path / "b.json"]).runs) == 2


def test_names_may_contain_any_character(save, tmp_path):
    """The names hold a broken formula, a column separator of Markdown, and a line break."""
    folders = save(record(), record(cfg=2.0), record(cfg=2.5))
    report = compare(folders, tmp_path / "out", names=["$x_{$", "a|b", "a\nc"])
    assert "| $x_{$ (baseline) |" in report.table and "| a\\|b |" in report.table and "| a c |" in report.table
    assert (tmp_path / "out" / "pareto.png").exists() and (tmp_path / "out" / "fid-cfg.png").exists()
