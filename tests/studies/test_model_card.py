"""The card of a pipeline says what the records say, and its commands run."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from sit_atconv import convert
from sit_atconv.checkpoints.weights import load_weights
from sit_atconv.evaluation.records import read_evaluation
from sit_atconv.studies.model_card import model_card
from tests.conftest import ROOT, load_command, working_folder


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A run with evaluated samples."""
    run = tmp_path_factory.mktemp("card") / "run"
    shutil.copytree(tiny_run, run)
    sessions = json.loads((run / "provenance.json").read_text())
    sessions[-1]["command"] = f"/home/me/env/bin/python -u {ROOT}/sit_atconv/train.py --out '/data/my run'"
    (run / "provenance.json").write_text(json.dumps(sessions))
    drawn = ("--ckpt", run, "--num-samples", 60, "--solver", "euler", "--cfg", 1, "--steps", 2, "--no-npz")
    samples = run / "samples" / "own"
    load_command("sample/generate.py").main([*map(str, (*drawn, "--labels", "balanced", "--out", samples))])
    scored = ("--samples", samples, "--reference", "digits", "--extractor", "digits", "--metrics", "fid")
    load_command("eval/fid.py").main([*map(str, (*scored, "--features", tmp_path_factory.mktemp("features")))])
    return run


def test_says_what_the_records_say(run, tmp_path, capsys):
    convert.main([str(run), str(tmp_path / "digits"), "--to", "pipeline", "--license", "cc-by-4.0"])
    path = tmp_path / "digits" / "README.md"
    assert f"card for the hub: {path}" in capsys.readouterr().out
    card = ModelCard.load(path)
    assert card.data.license == "cc-by-4.0" and card.data.library_name == "diffusers" and "atconv" in card.data.tags
    text = card.text
    [record] = run.glob("samples/*/scores-*.json")
    score = read_evaluation(record).scores["FD-digits-60"]
    for said in (
        "# digits\n",
        "depth 2, width 32 and patch size 2",
        "images of 8 x 8 pixels",
        "has 10 classes",
        "atconv (2 blocks)",
        "| steps | 4 |",
        "EMA of decay 0.99",
        "batch size 512",
        f"| FD-digits-60 | {score} |",
        "| 60 | euler 2 | 1.0 | balanced | digits | digits |",
        "python -u sit_atconv/train.py --out '/data/my run'",
    ):
        assert said in text, said
    assert str(ROOT) not in text and "{{" not in text and "None" not in text


def test_its_commands_run(run, tmp_path):
    convert.main([str(run), str(tmp_path / "digits"), "--to", "pipeline"])
    text = (tmp_path / "digits" / "README.md").read_text()
    python, shell = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)[1] for kind in ("python", "sh"))
    names = {}
    with working_folder(tmp_path):
        exec(python.replace("guidance_scale=4.0", "guidance_scale=4.0, num_inference_steps=2"), names)
        words = shell.split()[2:]
        load_command("sample/generate.py").main([*words, "--num-samples", "1", "--steps", "2", "--out", "drawn"])
    assert names["images"][0].size == (8, 8) and Path(tmp_path, "drawn", "images", "000000.png").is_file()


def test_only_scores_of_these_weights_count(run, tmp_path):
    weights = load_weights(str(run))
    [record] = run.glob("samples/*/scores-*.json")
    moved = tmp_path / "scores.json"
    content = json.loads(record.read_text())
    moved.write_text(json.dumps({**content, "subject": {**content["subject"], "step": 3, "weights": "0" * 64}}))
    with pytest.raises(ValueError, match=r"scores.json has scores of other weights .*, step 3"):
        model_card(weights, "x", scores=[moved])
    with pytest.raises(ValueError, match="there is no file"):
        model_card(replace(weights, path=tmp_path), "x", scores=[tmp_path / "missing.json"])
    convert.main([str(run), str(tmp_path / "exported")])
    exported = load_weights(str(tmp_path / "exported"))
    assert model_card(exported, "x", scores=[record]).count("| FD-digits-60 |") == 1
    other = load_weights(str(run), ema=False)
    assert "No scores of these weights are recorded" in model_card(other, "x")
    (run / "quality").mkdir()
    quality = {"log": {"quality/FD-digits-60": 1.0}, "protocol": {}, "evaluations": {"0.99": content}}
    (run / "quality" / "step-0000004.json").write_text(json.dumps(quality))
    assert model_card(weights, "x").count("| FD-digits-60 |") == 2
    shutil.rmtree(run / "quality")


def test_a_card_without_records(run, tmp_path):
    weights = load_weights(str(run))
    recipe = replace(weights.recipe, class_names=["a|`b\n# c", *"cdefghijk"[:9]], null_label_trained=False, step=0)
    text = model_card(replace(weights, recipe=recipe, path=tmp_path), 'my "own" x')
    assert "--ckpt 'my \"own\" x' --classes" in text and 'from_pretrained("my \\"own\\" x")' in text
    twice = replace(recipe, class_names=["same", "same", *"cdefghij"])
    assert "class_labels=[0]" in model_card(replace(weights, recipe=twice), "x")
    assert "licence of these weights is not stated" in text and "license" not in text
    assert "not possible" in text and "guidance_scale" not in text  # it cannot be guided
    assert "class_labels=['a|`b\\n# c']" in text and "(`a| b # c`, `c`," in text and "steps | not recorded" in text
    assert "learned guidance of scale 2:" in model_card(replace(weights, recipe=replace(recipe, trained_cfg=2.0)), "x")


def test_options_of_the_card_need_a_pipeline(run, tmp_path, fails):
    assert "--to pipeline" in fails(convert.main, [run, tmp_path / "out", "--license", "mit"])
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    assert "bad.json" in fails(convert.main, [run, tmp_path / "out", "--to", "pipeline", "--scores", bad])
    assert not (tmp_path / "out").exists()
