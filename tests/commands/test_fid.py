import json
import subprocess
import sys

import numpy as np
import pytest

from sit_atconv.data.images import load_digits
from tests.conftest import ROOT, load_command, python

FID = "eval/fid.py"


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("npz") / "samples.npz"
    np.savez(path, np.repeat(load_digits()[0][:400, ..., None], 3, axis=-1))
    return path


def test_one_json_object_on_stdout(npz, tmp_path):
    command = python(ROOT / FID, "--samples", npz, "--reference", "digits", "--extractor", "digits", "--out", "x.json")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 0 < result["fd_digits"] < 2 and result == json.loads((tmp_path / "x.json").read_text())


def test_samples_of_generate(launch, tiny_run, tmp_path, capsys):
    """The labelled picture beside the samples is not one of them."""
    out = tmp_path / "samples"
    codes, output = launch("sample/generate.py", ["--ckpt", tiny_run, "--steps", 1, "--num-samples", 60, "--out", out])
    assert codes == [0], output
    argv = ["--samples", str(out), "--reference", "digits", "--extractor", "digits", "--metrics", "fid"]
    load_command(FID).main(argv)
    assert json.loads(capsys.readouterr().out)["num_samples"] == 60


def test_arguments_are_checked_before_anything_is_loaded(fails, npz, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sit_atconv.evaluation.metrics", None)  # an import would raise
    main = load_command(FID).main
    argv = ["--samples", npz, "--reference", "digits", "--extractor", "digits"]
    assert "nowhere.pth" in fails(main, [*argv, "--inception-weights", tmp_path / "nowhere.pth"])
    assert "cannot be written" in fails(main, [*argv, "--out", tmp_path / "nowhere" / "x.json"])
    assert "cannot be written" in fails(main, [*argv, "--out", tmp_path])


def test_the_scores_are_printed_even_where_they_cannot_be_written(npz, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    argv = ["--samples", str(npz), "--reference", "digits", "--extractor", "digits", "--metrics", "is"]
    with pytest.raises(SystemExit):
        load_command(FID).main([*argv, "--out", str(tmp_path / "x.json")])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["score_digits"] > 1 and "error: disk full" in printed.err


def test_other_processes_leave_quietly(npz, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    load_command(FID).main(["--samples", str(npz), "--reference", "digits", "--extractor", "digits"])
    assert capsys.readouterr() == ("", "")


def test_errors(fails, npz, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("offline")))
    main = load_command(FID).main
    (tmp_path / "empty").mkdir()
    for argv, message in [
        (["--samples", tmp_path / "nowhere", "--reference", "digits"], "nowhere does not exist"),
        (["--samples", tmp_path / "empty", "--reference", "digits", "--extractor", "digits"], "holds no images"),
        (["--samples", npz, "--reference", "digits"], "--inception-weights"),
        (["--samples", npz, "--reference", "digits", "--extractor", "vgg99"], "vgg99"),
        (["--samples", npz, "--reference", "digits", "--metrics", "fvd"], "fvd"),
        (["--samples", npz], "--reference"),
    ]:
        assert message in fails(main, argv)
