"""AttNet: the published values, and what timm asks of its models."""

import argparse
import json

import pytest
import timm
import torch
from safetensors import safe_open
from timm.optim import create_optimizer_v2
from torch.utils.flop_counter import FlopCounterMode

from sit_atconv.models import attnet
from sit_atconv.models.attnet import AttNet, DepthwiseConv, GateAndValue, checkpoint_filter_fn, official_state_dict
from tests.conftest import GOLDEN

# Name -> parameters, and multiply-adds at 224 px.
PUBLISHED = {
    "attnet_xxs": (2_853_556, 501_084_016),
    "attnet_xs": (5_554_902, 942_744_130),
    "attnet_s": (7_681_316, 1_242_366_071),
    "attnet_t1": (13_714_900, 2_255_365_488),
    "attnet_t2": (27_010_782, 4_733_318_951),
    "attnet_t3": (49_175_682, 8_702_132_008),
    "attnet_t4": (87_320_214, 15_548_479_392),
}
FILES = ["attnet_t_small", "attnet_xxs_small"]


def largest_error(found, expected):
    """Returns the largest difference over the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def golden_model(golden, name):
    tensors, weights = golden(name)
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    model = AttNet(
        num_classes=config["num_classes"],
        depths=config["depths"],
        dims=config["dims"],
        mlp_ratios=config["exp_rates"],
        layer_scale=config["use_layer_scale"],
        mlp_norm=config["glu_norm"][0],
    ).eval()
    model.load_state_dict(weights)
    return model, tensors, weights


def small(**options):
    """An AttNet with all parts, none of which has its initial value."""
    torch.manual_seed(0)
    shape = dict(depths=(1, 1, 2, 1), dims=(8, 12, 16, 20), layer_scale=True, mlp_norm=True, num_classes=5)
    model = AttNet(**{**shape, **options})
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if tensor.ndim == 1 else torch.randn_like(tensor) * 0.2)
    return model.eval()


@pytest.mark.parametrize("name", FILES)
def test_golden_values_and_gradients(golden, name):
    model, tensors, _ = golden_model(golden, name)
    x = tensors["input"].requires_grad_()
    output = model(x)
    last, features = model.forward_intermediates(x)
    assert largest_error(output, tensors["output"]) < 1e-5
    assert largest_error(model.forward_head(last, pre_logits=True), tensors["pre_logits"]) < 1e-5
    for i, feature in enumerate(features):
        assert largest_error(feature, tensors[f"features.{i}"]) < 1e-5
    (output * tensors["cotangent"]).sum().backward()
    assert largest_error(x.grad, tensors["grad.input"]) < 2e-5
    for p in model.parameters():
        p.data = p.grad
    gradients = official_state_dict(model)
    published = {name.removeprefix("grad."): value for name, value in tensors.items() if name.startswith("grad.")}
    assert len(published) > 15
    for name, gradient in published.items():
        assert name == "input" or largest_error(gradients[name], gradient) < 2e-5, name


@pytest.mark.parametrize("name", FILES)
def test_golden_values_of_training_mode(golden, name):
    model, tensors, _ = golden_model(golden, name)
    assert largest_error(model.train()(tensors["input"]), tensors["train.output"]) < 1e-5
    after = official_state_dict(model)
    statistics = [name for name in tensors if name.startswith("train.after.")]
    assert len(statistics) == 4
    for name in statistics:
        assert largest_error(after[name.removeprefix("train.after.")], tensors[name]) < 1e-5, name


@pytest.mark.parametrize("name", FILES)
def test_official_names_are_translated_and_back(golden, name):
    model, _, weights = golden_model(golden, name)
    back = official_state_dict(model)
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in back)
    own = model.state_dict()
    assert checkpoint_filter_fn(own).keys() == own.keys()
    assert checkpoint_filter_fn({"model": weights, "epoch": 3}).keys() == own.keys()


def test_official_training_files_load_by_timm(tmp_path):
    there = timm.create_model("attnet_xxs", num_classes=4).eval()
    content = {"model": official_state_dict(there), "optimizer": {}, "epoch": 299, "args": argparse.Namespace(lr=4e-3)}
    torch.save(content, tmp_path / "checkpoint.pth")
    here = timm.create_model("attnet_xxs", num_classes=4, checkpoint_path=tmp_path / "checkpoint.pth").eval()
    assert torch.equal(here(x := torch.randn(1, 3, 64, 64)), there(x))
    with pytest.raises(RuntimeError, match=r"head\.fc\.weight"):
        timm.create_model("attnet_xxs", num_classes=5, checkpoint_path=tmp_path / "checkpoint.pth")


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_counts_and_timms_configuration(name):
    """Pooling, which is a product of matrices here, counts nothing in the published figures."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        images = torch.empty(1, *model.default_cfg["input_size"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = model.forward_features(images)
        model.forward_head(features)
    stages = zip(model.stages, model.feature_info, strict=True)
    pooling = sum(9 * info["num_chs"] * (224 // info["reduction"]) ** 2 * len(stage.blocks) for stage, info in stages)
    parameters = sum(p.numel() for p in model.parameters())
    assert (parameters, counter.get_total_flops() // 2 - pooling) == PUBLISHED[name]

    config, weights = model.default_cfg, model.state_dict()
    assert f"{config['classifier']}.weight" in weights and f"{config['first_conv']}.weight" in weights
    assert config["num_classes"] == model.num_classes == 1000
    assert features.shape == (1, model.num_features, *config["pool_size"])


def test_the_models_are_registered_without_weights():
    assert set(timm.list_models("attnet*")) == PUBLISHED.keys() == attnet.PRESETS.keys()
    assert timm.list_pretrained("attnet*") == []
    with pytest.raises(RuntimeError, match="No pretrained weights exist for attnet_t2"):
        timm.create_model("attnet_t2", pretrained=True)


@pytest.mark.parametrize("size", [(75, 101), (33, 33), (64, 64), (224, 224), (96, 384)])
@pytest.mark.parametrize("fused", [False, True])
def test_any_size_channels_and_batch(size, fused):
    """At 64 px the last stage has four tokens, fewer than bins."""
    model = small(in_chans=1)
    assert (model.fuse() if fused else model)(torch.randn(1, 1, *size)).shape == (1, 5)


def test_every_parameter_gets_a_gradient_also_with_checkpointing():
    model, x = small().train(), torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        gradients.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.any() and torch.equal(plain, checkpointed)


@pytest.mark.parametrize("feature_cls", [None, "getter", "fx"])
def test_features_only(feature_cls):
    how = {} if feature_cls is None else {"feature_cls": feature_cls}
    extractor = timm.create_model("attnet_xxs", features_only=True, **how).eval()
    features = extractor(x := torch.randn(1, 3, 96, 96))
    info = extractor.feature_info
    assert [f.shape[1] for f in features] == info.channels() == [32, 64, 128, 240]
    assert [96 // f.shape[2] for f in features] == info.reduction() == [4, 8, 16, 32]
    assert [tuple(f.shape[2:]) for f in extractor(x[..., :64])] == [(24, 16), (12, 8), (6, 4), (3, 2)]


def test_intermediates_and_pruning():
    model, x = small(), torch.randn(1, 3, 64, 64)
    last, (second, third) = model.forward_intermediates(x, indices=[1, 2])
    assert torch.equal(last, model.forward_features(x)) and (second.shape[1], third.shape[1]) == (12, 16)
    early, chosen = model.forward_intermediates(x, indices=[0, 2], stop_early=True)
    assert torch.equal(early, third) and torch.equal(chosen[1], third)
    assert len(model.forward_intermediates(x, indices=2, intermediates_only=True)) == 2
    with pytest.raises(ValueError, match="must be 'NCHW', not 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")
    assert model.prune_intermediate_layers([0, 2]) == [0, 2] and torch.equal(model(x), third)


def test_the_classifier_is_replaced_or_removed():
    model, x = small(), torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    pre_logits = model.forward_head(features, pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(x), pre_logits) and pre_logits.shape == (2, model.head_hidden_size)
    model.reset_classifier(7, "max")
    assert model(x).shape == (2, 7) and model.get_classifier().out_features == model.num_classes == 7
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape


def test_layer_decay_groups_cover_all_layers():
    model = timm.create_model("attnet_xxs")
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.8)
    assert len(optimizer.param_groups) == 24
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.ndim > 1}


@pytest.mark.parametrize("name", FILES)
def test_fusing_changes_no_logits(golden, name):
    model, tensors, _ = golden_model(golden, name)
    kinds = {type(module).__name__ for module in model.fuse().modules()}
    assert not kinds & {"BatchNorm2d", "LayerScale"}
    for stage in model.stages:
        for block in stage.blocks:
            assert (block.norm_1.weight == 1).all() and (block.norm_2.bias == 0).all()
            mlp = block.channel_mixer
            assert mlp.dwconv.groups % 16 == 0 and mlp.fc2.in_features == mlp.dwconv.groups  # with channels of zeros
    assert largest_error(model(tensors["input"]), tensors["output"]) < 1e-5


def test_gate_and_value_are_the_same_on_every_device():
    """A CPU computes them as convolutions; a tensor that says it is elsewhere takes the other way."""

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

    layer, x = GateAndValue(6, 10), torch.randn(2, 3, 4, 6)
    for here, there in zip(layer(x), layer(x.as_subclass(Elsewhere)), strict=True):
        assert largest_error(here, there.as_subclass(torch.Tensor)) < 1e-6


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (1, 4), (4, 1), (2, 3)])
def test_small_grids_are_convolved_in_training_as_in_evaluation(grid):
    """Grids of up to four positions are stacked in training; their samples must not mix."""
    layer = DepthwiseConv(6)
    x = torch.randn(3, *grid, 6).permute(0, 3, 1, 2).requires_grad_()
    weights = torch.randn(3, 6, *grid)
    results = []
    for mode in (True, False):
        y = layer.train(mode)(x)
        results.append([y, *torch.autograd.grad((y * weights).sum(), [x, layer.weight, layer.bias])])
    for trained, evaluated in zip(*results, strict=True):
        torch.testing.assert_close(trained, evaluated)


def test_a_model_is_made_where_and_in_which_dtype_timm_is_told():
    model = timm.create_model("attnet_xxs", in_chans=1, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float16)} and model.in_chans == 1


def test_timms_reparameterization_is_ours_and_training_mode_is_refused():
    model, x = small(), torch.randn(1, 3, 64, 64)
    again = timm.utils.reparameterize_model(model)
    assert torch.equal(again(x), model.fuse()(x)) and torch.equal(again(x), model.fuse()(x))
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        small().train().fuse()


def test_graphs_of_torch():
    """Exported with a batch of any size, and compiled as one graph."""
    model, B = small(depths=(1, 1), dims=(8, 12), mlp_ratios=(8, 4)), torch.export.Dim("B", max=64)
    x = torch.randn(3, 3, 64, 96)
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: B},))
    assert largest_error(program.module()(x), model(x)) < 1e-6
    assert largest_error(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x)) < 1e-6


def test_memory_formats_give_the_same():
    model, x = small(), torch.randn(2, 3, 64, 64)
    expected = model(x)
    assert torch.equal(model(x.to(memory_format=torch.channels_last)), expected)
    assert largest_error(model.to(memory_format=torch.channels_last)(x), expected) < 1e-5


def test_a_folder_made_for_the_hub_is_loaded_again(tmp_path):
    from timm.models import save_for_hf

    model = timm.create_model("attnet_xxs", num_classes=3).eval()
    save_for_hf(model, tmp_path / "folder", model_config={"num_classes": 3}, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert torch.equal(again(x := torch.randn(1, 3, 64, 64)), model(x)) and again.num_classes == 3


def test_drop_path_rises_linearly_and_initial_values_are_the_published():
    model = AttNet(depths=(1, 2, 1, 1), dims=(16, 16, 16, 16), layer_scale=True, drop_path_rate=0.4)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert [block.drop_path_1.drop_prob for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert [block.drop_path_2.drop_prob for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    mixer, mlp = blocks[0].token_mixer, blocks[0].channel_mixer
    for layer in (model.stem[0][0], mixer.proj, mlp.fc1, model.head.fc):
        assert 0.015 < layer.weight.std() < 0.025 and (layer.bias is None or not layer.bias.any())
    assert not mixer.difference_control.any() and blocks[0].layer_scale_1.gamma.eq(1e-6).all()


def test_stages_of_unequal_number_are_refused():
    with pytest.raises(ValueError, match="one value a stage, not 4, 3 and 4"):
        AttNet(dims=(8, 8, 8))
    with pytest.raises(TypeError, match="mlp_ratio"):
        timm.create_model("attnet_xxs", mlp_ratio=4)
