import json
import os
import pty
import subprocess
import sys

import numpy as np
import pytest
from torch_fidelity import register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from sit_atconv.data.digits import load_digits
from sit_atconv.data.image_npz import write_npz
from sit_atconv.evaluation.fid import to_table
from sit_atconv.evaluation.records import read_evaluation
from sit_atconv.evaluation.scores import Score
from tests.conftest import ROOT, load_command, python
from tests.pixel_features import Pixels

FID = "eval/fid.py"
DIGITS = np.repeat(load_digits()[0][..., None], 3, axis=-1)


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("npz") / "samples.npz"
    np.savez(path, DIGITS[:400])
    return path


def digits_argv(samples, work, *more):
    return [
        "--samples",
        samples,
        "--reference",
        "digits",
        "--extractor",
        "digits",
        "--features",
        work / "features",
        "--out",
        work / "scores.json",
        *more,
    ]


def quick_argv(samples, work):
    return digits_argv(samples, work, "--metrics", "fid", "is", "prc", "--batch-size", 4)


def test_a_pipe_gets_one_json_object_and_stderr_the_scores(npz, tmp_path):
    argv = ["--samples", npz, "--reference", "digits", "--extractor", "digits"]
    done = subprocess.run(python(ROOT / FID, *argv), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 0 < result["scores"]["FD-digits-400"]["value"] < 2
    [record] = npz.parent.glob("samples.scores-digits-*.json")
    written = read_evaluation(record)  # this one has the values without each group, too
    assert result == json.loads(written.brief().to_json()) and str(record) in done.stderr
    assert len(written.scores["FD-digits-400"].without_group) == 20
    assert f"FD-digits-400            {written.scores['FD-digits-400']}" in done.stderr
    assert "±" in done.stderr and list((tmp_path / "runs" / "features").iterdir())


def test_several_extractors_have_a_record_each(npz, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            register_feature_extractor(name, Pixels)
    argv = ["--samples", npz, "--reference", "digits", "--metrics", "fid", "--extractor"]
    load_command(FID).main([*map(str, [*argv, "first", "second", "digits"]), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [(name, *one["scores"]) for name, one in found.items()] == [
        (name, f"FD-{name}-400") for name in ("first", "second", "digits")
    ]
    assert len([*npz.parent.glob("samples.scores-first-*.json"), *npz.parent.glob("samples.scores-second-*.json")]) == 2
    assert found["first"]["scores"]["FD-first-400"]["value"] == found["second"]["scores"]["FD-second-400"]["value"]


def test_an_extractor_that_fails_does_not_lose_the_scores_of_another(npz, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [
        "--samples",
        npz,
        "--reference",
        "digits",
        "--metrics",
        "fid",
        "--extractor",
        "digits",
        "nonsense",
        "--json",
    ]
    with pytest.raises(SystemExit):
        load_command(FID).main([*map(str, argv)])
    printed = capsys.readouterr()
    assert "there is no extractor 'nonsense'" in printed.err
    assert "FD-digits-400" in json.loads(printed.out)["digits"]["scores"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["digits", "--out", "x.json"], "--out x.json is for one extractor, and inception, digits are given"),
        (["inception"], "--extractor names one twice"),
        (["digits", "--weights", FID], "--weights must be one file for each of the 2 extractors, not 1"),
    ],
)
def test_options_for_one_extractor_are_refused_with_several(npz, fails, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(ROOT)
    argv = ["--samples", npz, "--reference", "digits", "--extractor", "inception", *more]
    assert message in fails(load_command(FID).main, argv)


def test_a_terminal_gets_a_table_and_the_path_of_the_record(npz, tmp_path):
    """The JSON record is written as well; stderr does not repeat the scores."""
    terminal, stdout = pty.openpty()
    argv = digits_argv(npz, tmp_path, "--metrics", "fid", "is")
    done = subprocess.run(python(ROOT / FID, *argv), stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(stdout)
    assert done.returncode == 0, done.stderr
    head, *lines, path = os.read(terminal, 10_000).decode().splitlines()
    os.close(terminal)
    scores = read_evaluation(tmp_path / "scores.json").scores
    assert head.split() == ["metric", "value", "error"] and path == f"record: {tmp_path / 'scores.json'}"
    assert [line.split() for line in lines] == [[name, *str(score).split(" ± ")] for name, score in scores.items()]
    assert "FD-digits-400" not in done.stderr


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_json_can_be_asked_for_on_a_terminal(npz, tmp_path, monkeypatch, capsys, options):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    common = ["--reference", "digits", "--extractor", "digits", "--features", str(tmp_path / "features"), *options]
    load_command(FID).main(["--samples", str(npz), "--out", str(tmp_path / "scores.json"), "--metrics", "is", *common])
    scores = capsys.readouterr().out
    load_command(FID).main(["--make-reference", str(tmp_path / "r.npz"), *common])
    reference = capsys.readouterr().out
    if options:
        assert "score-digits" in json.loads(scores)["scores"] and json.loads(reference)["num"] == 1797
    else:
        assert scores.startswith("metric") and reference == f"statistics of 1797 images: {tmp_path / 'r.npz'}\n"


def test_the_columns_of_the_table_are_aligned():
    assert to_table({"FD-digits-1000": Score(2.1134, 0.0987), "IS": Score(215.25)}) == (
        "metric          value  error\nFD-digits-1000  2.113  0.099\nIS              215.2"
    )


def test_samples_of_generate_py(launch, tiny_run, tmp_path, capsys):
    """The grid picture is not evaluated; the second run replaces the record beside the samples."""
    out = tmp_path / "samples"
    argv = ["--ckpt", tiny_run, "--steps", 1, "--num-samples", 60, "--labels", "balanced", "--seed", 3, "--out", out]
    codes, output = launch("sample/generate.py", argv)
    assert codes == [0], output
    argv = [
        "--samples",
        str(out),
        "--reference",
        "digits",
        "--extractor",
        "digits",
        "--metrics",
        "fid",
        "--features",
        str(tmp_path / "features"),
    ]
    load_command(FID).main(argv)
    result = json.loads(capsys.readouterr().out)
    assert result["protocol"]["samples"]["num"] == 60 and result["protocol"]["samples"]["labels"] == "balanced"
    assert result["protocol"]["samples"]["sampler"]["solver"] == "unipc" and result["subject"]["seed"] == 3
    assert result["subject"]["images_per_second"] > 0 and result["subject"]["device"] == "cpu"
    load_command(FID).main(argv)
    assert len(list(out.glob("scores-digits-*.json"))) == 1


def test_a_reference_is_made_and_used(npz, tmp_path, capsys):
    main = load_command(FID).main
    common = ["--extractor", "digits", "--features", str(tmp_path / "features")]
    main(["--make-reference", str(tmp_path / "r.npz"), "--reference", "digits", *common])
    assert json.loads(capsys.readouterr().out)["num"] == 1797
    scores = []
    for reference in ("digits", tmp_path / "r.npz"):
        main(["--samples", str(npz), "--reference", str(reference), "--out", str(tmp_path / "x.json"), *common])
        scores.append(json.loads(capsys.readouterr().out)["scores"])
    for name, score in scores[0].items():
        assert scores[1][name]["value"] == pytest.approx(score["value"], rel=1e-6), name


def test_references_are_cropped(digit_folder, tmp_path, capsys):
    """Images of 16x16 are cropped to 8x8."""
    load_command(FID).main(
        [
            "--make-reference",
            str(tmp_path / "r.npz"),
            "--reference",
            str(digit_folder),
            "--image-size",
            "8",
            "--extractor",
            "digits",
            "--features",
            str(tmp_path / "features"),
        ]
    )
    recipe = json.loads(capsys.readouterr().out)
    assert recipe["image_size"] == [8, 8] and "(ADM), to 8x8" in recipe["crop"]
    with np.load(tmp_path / "r.npz") as file:
        assert file["arr_0"].shape == (120, 8, 8, 3)


# ------------------------------------------------------------------------------------ several processes and kills


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Digits for six shards, the last of which is short."""
    path = tmp_path_factory.mktemp("large") / "samples.npz"
    images = np.random.default_rng(0).choice(DIGITS, 5200)
    np.savez(path, images ^ np.random.default_rng(1).integers(0, 8, images.shape, dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def undisturbed(launch, large, tmp_path_factory):
    work = tmp_path_factory.mktemp("undisturbed")
    codes, output = launch(FID, quick_argv(large, work))
    assert codes == [0], output
    return read_evaluation(work / "scores.json")


def test_two_processes_give_the_same_scores(launch, large, undisturbed, tmp_path):
    codes, output = launch(FID, quick_argv(large, tmp_path), processes=2)
    assert codes == [0, 0], output
    found = read_evaluation(tmp_path / "scores.json")
    assert found.protocol == undisturbed.protocol and found.environment["processes"] == 2
    for name, score in undisturbed.scores.items():
        assert found.scores[name].value == pytest.approx(score.value, rel=1e-6), name
    assert output.count('"scores"') == 1


def same_after(launch, large, undisturbed, work, processes=1):
    codes, output = launch(FID, quick_argv(large, work), processes)
    assert codes == [0] * processes, output
    found = read_evaluation(work / "scores.json")
    assert found.scores == undisturbed.scores and found.subject["content"] == undisturbed.subject["content"]
    return output


def test_five_kills_during_extraction_lose_nothing(launch, large, undisturbed, tmp_path):
    """Finished shards are not extracted again, and the result is bitwise the same."""
    for count, kill_at in enumerate((64, 1040, 2060, 3090, 4110)):
        codes, _ = launch(FID, quick_argv(large, tmp_path), kill_at=kill_at)
        assert codes == [-9], kill_at
        assert len(list((tmp_path / "features").glob("[!.]*"))) >= count
    same_after(launch, large, undisturbed, tmp_path)


@pytest.mark.parametrize("number", [2, 5, 22])
def test_a_kill_before_a_write_loses_nothing(launch, large, undisturbed, tmp_path, number):
    codes, _ = launch(FID, quick_argv(large, tmp_path), die=number, work=tmp_path)
    assert codes == [-9]
    same_after(launch, large, undisturbed, tmp_path)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("every", [pytest.param(7, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.scale)])
def test_kills_before_every_write_lose_nothing(launch, large, undisturbed, tmp_path, processes, every):
    """Kills before each opening, renaming or making of a file until the command succeeds."""
    for number in range(1, 99, every):
        work = tmp_path / str(number)
        work.mkdir()
        codes, output = launch(FID, quick_argv(large, work), processes, die=number, work=work)
        if codes == [0] * processes:
            break
        assert -9 in codes, output
        if processes == 1:
            same_after(launch, large, undisturbed, work)
        else:
            codes, output = launch(FID, quick_argv(large, work), processes)
            assert codes == [0, 0], output
            found = read_evaluation(work / "scores.json")
            for name, score in undisturbed.scores.items():
                assert found.scores[name].value == pytest.approx(score.value, rel=1e-6), name
    assert number > 10


def test_an_error_in_one_process_ends_all(launch, tmp_path):
    """One process cannot read its image; the message appears once."""
    from PIL import Image

    (tmp_path / "images").mkdir()
    for i in range(1100):  # two shards
        Image.fromarray(DIGITS[i]).save(tmp_path / "images" / f"{i:04d}.png")
    (tmp_path / "images" / "1099.png").write_bytes(b"no image")
    codes, output = launch(FID, digits_argv(tmp_path / "images", tmp_path), processes=2)
    assert 0 not in codes and output.count("1099.png cannot be read as an image") == 1 and "Traceback" not in output


@pytest.mark.slow
def test_torchruns_report_ends_with_the_error(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    argv = ["--samples", tmp_path / "nowhere", "--reference", "digits"]
    done = subprocess.run([*torchrun, *map(str, [ROOT / FID, *argv])], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-2]
    assert last.endswith("or the word digits, or an .npz") and f"error: {tmp_path / 'nowhere'} does not exist" in last


# ----------------------------------------------------------------------------------------------------- errors


def test_arguments_are_checked_before_anything_is_loaded(fails, npz, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sit_atconv.evaluation.evaluate", None)  # an import would raise
    monkeypatch.setitem(sys.modules, "torch", None)
    main = load_command(FID).main
    argv = ["--samples", npz, "--reference", "digits", "--extractor", "digits"]
    for more, message in [
        (["--weights", tmp_path / "nowhere.pth"], "nowhere.pth"),
        (["--inception-weights", tmp_path / "nowhere.pth"], "nowhere.pth"),
        (["--out", tmp_path / "nowhere" / "x.json"], "cannot be written"),
        (["--out", tmp_path], "cannot be written"),
        (["--make-reference", tmp_path / "x.npz"], "leave --samples out"),
        (["--out", npz], "is an input of this command"),
        (["--out", "/dev/null"], "cannot be written"),
        (["--import", "no_such_module"], "the module no_such_module cannot be imported"),
    ]:
        assert message in fails(main, [*argv, *more])
    assert "--samples is missing" in fails(main, ["--reference", "digits"])
    assert "is an input of this command" in fails(main, ["--make-reference", npz, "--reference", npz])


def test_max_megapixels_limits_image_files(fails, digit_folder, tmp_path, monkeypatch):
    from sit_atconv.data import MAX_MEGAPIXELS

    def read(path, size, max_megapixels, background):
        raise ValueError(f"has more than {max_megapixels} megapixels")

    monkeypatch.setattr("sit_atconv.evaluation.image_sets.read_image", read)
    for more, limit in (([], MAX_MEGAPIXELS), (["--max-megapixels", 300], 300.0)):
        argv = ["--samples", digit_folder, "--reference", "digits", "--extractor", "digits", *more]
        assert f"000.png has more than {limit} megapixels" in fails(load_command(FID).main, argv)


def test_scores_are_printed_even_if_the_record_cannot_be_written(npz, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr("sit_atconv.evaluation.records.write_aside", full)
    with pytest.raises(SystemExit):
        load_command(FID).main(list(map(str, digits_argv(npz, tmp_path, "--metrics", "is"))))
    printed = capsys.readouterr()
    assert json.loads(printed.out)["scores"]["score-digits"]["value"] > 1 and "error: disk full" in printed.err


def test_a_closed_pipe_does_not_lose_the_record(npz, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError("no space left on stdout")

    monkeypatch.setattr("builtins.print", lambda *args, file=None, **kwargs: file or full())
    with pytest.raises(SystemExit):
        load_command(FID).main(list(map(str, digits_argv(npz, tmp_path, "--metrics", "is"))))
    assert read_evaluation(tmp_path / "scores.json").scores["score-digits"].value > 1


def test_an_imported_module_registers_an_extractor(npz, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "module_of_a_test.py").write_text(
        "from torch_fidelity import register_feature_extractor\n"
        "from sit_atconv.encoders.digit_features import DigitFeatures\n"
        "register_feature_extractor('mine', DigitFeatures)\n"
    )
    load_command(FID).main(
        [
            "--samples",
            str(npz),
            "--reference",
            "digits",
            "--extractor",
            "mine",
            "--metrics",
            "fid",
            "--import",
            "module_of_a_test",
        ]
    )
    assert list(json.loads(capsys.readouterr().out)["scores"]) == ["FD-mine-400"]


def test_ctrl_c_ends_the_command_with_one_line(monkeypatch, npz, tmp_path, fails):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("sit_atconv.evaluation.evaluate.evaluate", interrupted)
    assert "error: interrupted" in fails(load_command(FID).main, digits_argv(npz, tmp_path))


def test_a_full_disk_loses_nothing(launch, large, undisturbed, tmp_path):
    codes, output = launch(FID, quick_argv(large, tmp_path), die="files of 100 kB are too large")
    assert codes == [1] and "cannot be written" in output and "Traceback" not in output
    same_after(launch, large, undisturbed, tmp_path)


def test_errors_name_the_remedy(fails, npz, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("offline")))
    main = load_command(FID).main
    (tmp_path / "empty").mkdir()
    for argv, message in [
        (["--samples", tmp_path / "nowhere", "--reference", "digits"], "nowhere does not exist"),
        (["--samples", tmp_path / "empty", "--reference", "digits", "--extractor", "digits"], "holds no images"),
        (["--samples", npz, "--reference", "digits"], "--weights"),
        (["--samples", npz, "--reference", "digits", "--extractor", "dinov2"], "--weights"),
        (["--samples", npz, "--reference", "digits", "--extractor", "vgg99"], "vgg99"),
        (["--samples", npz, "--reference", "digits", "--metrics", "fvd"], "fvd"),
        (["--samples", npz], "--reference"),
    ]:
        assert message in fails(main, argv)


# ----------------------------------------------------------------------------------------------------- 50,000 images

WATCHED = """
import runpy, sys, threading, time
import torch, torch.nn.functional as F
import sit_atconv.evaluation.evaluate
from sit_atconv.evaluation.extractors import Extractor

mix = torch.randn(768, 2048 + 1008 + 2023, generator=torch.Generator().manual_seed(0)) / 28

def network(images):
    return ((F.adaptive_avg_pool2d(images.float(), 16).flatten(1) / 10) @ mix).relu().split((2048, 1008, 2023), 1)

network.eval = lambda: network
sit_atconv.evaluation.evaluate.open_extractor = lambda *args: Extractor(
    "inception", network, "0" * 64, ("features", "logits", "spatial"), "none")

def watch(file, peak=0):
    while True:
        for line in open("/proc/self/smaps_rollup"):
            if line.startswith("Anonymous:"):
                peak = max(peak, int(line.split()[1]))
        open(file, "w").write(str(peak))
        time.sleep(0.1)

threading.Thread(target=watch, args=sys.argv[1:2], daemon=True).start()
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.scale
def test_fifty_thousand_images_of_256_pixels_in_bounded_memory(tmp_path):
    """Measures all metrics against as many reference images, with an extractor of Inception's widths."""
    rng = np.random.default_rng(0)
    images = (rng.integers(0, 256, (256, 256, 3), dtype=np.uint8) for _ in range(50_000))
    write_npz(tmp_path / "x.npz", images, (50_000, 256, 256, 3))
    command = python(
        "-c",
        WATCHED,
        tmp_path / "peak",
        ROOT / FID,
        "--samples",
        tmp_path / "x.npz",
        "--reference",
        tmp_path / "x.npz",
        "--features",
        tmp_path / "features",
        "--out",
        tmp_path / "scores.json",
    )
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scores = read_evaluation(tmp_path / "scores.json").scores
    peak = int((tmp_path / "peak").read_text()) / 2**20
    print(f"peak private memory {peak:.2f} GiB; {scores}")
    assert set(scores) == {"FID", "sFID", "IS", "precision", "recall", "KID"}
    assert 0.5 < peak < 6


REAL = ("ADM_SAMPLES", "ADM_REFERENCE", "INCEPTION_WEIGHTS")


@pytest.mark.slow
@pytest.mark.skipif(
    not all(name in os.environ for name in REAL),
    reason=(
        "set ADM_SAMPLES, ADM_REFERENCE and INCEPTION_WEIGHTS to the paths of admnet_guided_upsampled_imagenet256.npz, "
        "VIRTUAL_imagenet256_labeled.npz and torch-fidelity's weights"
    ),
)
def test_adms_own_samples_have_the_published_scores(tmp_path):
    samples, reference, weights = (os.environ[name] for name in REAL)
    command = python(
        ROOT / FID,
        "--samples",
        samples,
        "--reference",
        reference,
        "--weights",
        weights,
        "--features",
        tmp_path / "features",
        "--out",
        tmp_path / "scores.json",
    )
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scores = read_evaluation(tmp_path / "scores.json").scores
    for name, value, tolerance in [
        ("FID", 3.941, 0.003),
        ("sFID", 6.140, 0.003),
        ("IS", 216.0, 0.3),
        ("precision", 0.8255, 0.002),
        ("recall", 0.5285, 0.002),
    ]:
        assert scores[name].value == pytest.approx(value, abs=tolerance), name
