import pytest

from sit_atconv.speed.options import SpeedOptions


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(resolutions=(250,)), "resolution 250 is not a multiple of 16.*give 240 or 256"),
        (dict(resolutions=(8,)), "resolution 8 .*give 16 or 32"),
        (dict(resolutions=()), "resolutions must be one or more"),
        (dict(resolutions=(64, 64)), "resolutions must be one or more different"),
        (dict(preset="SiT-S/2"), "no preset 'SiT-S/2'.*S/2"),
        (dict(dtypes=("fp64",)), "fp32, bf16, fp16, not fp64"),
        (dict(forms=("attention", "mamba")), "forms must be among attention, .*, not mamba"),
        (dict(levels=("models",)), "levels must be among op, .*, not models"),
        (dict(forms=("atconv",)), "baseline 'attention' is not among the forms of the level 'model' .atconv.: give"),
        (dict(baseline="timm"), "baseline 'timm' is not among the forms of the level 'model'"),
        (dict(baseline="hybrid", levels=("model", "op")), "baseline 'hybrid' .* the level 'op'"),
        (dict(batch_sizes=(1, 2, 3)), "batch_sizes must be one number .* 2 resolutions, not \\[1, 2, 3\\]"),
        (dict(batch_sizes=(0,)), "batch_sizes must be one number of at least 1"),
        (dict(batch_sizes=()), "batch_sizes must be one number of at least 1"),
        (dict(decoder="sd-vae", channels=3), "SD-VAE decodes 4 channels of 1/8 the resolution, not 3 of 1/8"),
        (dict(rounds=0), "rounds must be at least 1, not 0"),
        (dict(depth=0), "depth must be at least 1, not 0"),
        (dict(warmup=-1), "warmup must be at least 0, .* not -1"),
        (dict(warmup=0, compile=True), "at least 1 with compile, not 0"),
        (dict(cfg=float("nan")), "cfg must be a finite number, not nan"),
    ],
)
def test_a_wrong_option_is_an_error_with_its_value(change, message):
    with pytest.raises(ValueError, match=message):
        SpeedOptions(**change)


def test_batch_sizes_are_paired_with_resolutions():
    options = SpeedOptions(resolutions=(64, 256, 128), batch_sizes=(8, 1, 2))
    assert [options.batch_size(px) for px in (256, 64, 128)] == [1, 8, 2]
    assert SpeedOptions(resolutions=(64, 256), batch_sizes=(5,)).batch_size(256) == 5


def test_model_config_has_the_forms_mixer_and_the_resolution():
    options = SpeedOptions(preset="Tiny/4", depth=3, resolutions=(28,), downsample=1, channels=3)
    mixers = {form: options.model_config(form, 28)["mixer"] for form in options.forms}
    assert mixers == {
        "attention": "attention",
        "timm": "attention",
        "published": "atconv",
        "atconv": "atconv",
        "hybrid": "hybrid",
        "floor": "atconv",
    }
    config = options.model_config("hybrid", 28)
    assert (config["input_size"], config["in_channels"], config["patch_size"], config["depth"]) == (28, 3, 4, 3)
