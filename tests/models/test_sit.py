import pytest
import torch
from diffusers import ModelMixin

from sit_atconv.models import PRESETS, ATConv, SiT, sit
from sit_atconv.models.attention import Attention
from sit_atconv.sampling import guided
from tests.conftest import relative_error

TINY = dict(input_size=8, hidden_size=48, depth=2, num_heads=4, num_classes=10)


def randomised(**options) -> SiT:
    """A model whose output is not zero."""
    torch.manual_seed(0)
    model = SiT(**{**TINY, **options})
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(("name", "mixer"), [("sit_atconv_tiny", "atconv"), ("sit_attention_tiny", "attention")])
def test_golden_outputs(golden, name, mixer):
    tensors, weights = golden(name)
    model = SiT(**TINY, mixer=mixer)
    if mixer == "attention":
        assert torch.equal(model.pos_embed, weights["pos_embed"])
    model.load_state_dict(weights)
    x, t, y = tensors["x"], tensors["t"], tensors["y"]
    null = torch.full_like(y, model.null_label)
    assert relative_error(model(x, t, y), tensors["output"]) < 1e-5
    assert relative_error(model(x, t, null), tensors["output_null"]) < 1e-5
    velocity = guided(model, y, cfg=4.0, channels=3)
    assert relative_error(velocity(x, t), tensors["output_cfg4_first3channels"]) < 1e-5


@pytest.mark.parametrize(("name", "count"), [("SiT-XL/2", 675_129_632), ("SiT-ATConv-XL/2", 637_678_328)])
def test_published_parameter_counts(name, count):
    with torch.device("meta"):
        model = SiT.from_preset(name)
    assert sum(p.numel() for p in model.parameters()) == count


def test_every_presets_blocks_hold_the_mixer_its_name_says():
    assert {"SiT-S/8", "SiT-ATConv-B/4", "SiT-ATConv-XL/2-Hybrid", "SiT-ATConv-Tiny/2"} <= set(PRESETS)
    for name in PRESETS:
        with torch.device("meta"):
            model = SiT.from_preset(name)
        kinds = [type(block.attn) for block in model.blocks]
        if "Hybrid" in name:
            expected = [Attention, ATConv] * (len(kinds) // 2)
        else:
            expected = [ATConv if "ATConv" in name else Attention] * len(kinds)
        assert kinds == expected, name
        assert (model.pos_embed is None) == (Attention not in kinds), name
        assert name.split("/")[1][0] == str(model.config.patch_size)


FOREIGN_GRID = (torch.randn(3, 4, 12, 20), torch.rand(3), torch.tensor([0, 10, 3]))


def test_a_foreign_grids_table_is_made_once(monkeypatch):
    model = randomised(mixer="attention")
    calls = []
    make = sit.sincos_pos_embed
    monkeypatch.setattr(sit, "sincos_pos_embed", lambda *shape: calls.append(shape) or make(*shape))
    inputs = torch.randn(3, 4, 14, 22), *FOREIGN_GRID[1:]  # of no other test
    with torch.inference_mode():
        first = model(*inputs)
    again = model(*inputs)
    again.square().mean().backward()  # an inference tensor could not be saved for it
    assert torch.equal(first, again) and calls == [(48, (7, 11))]
    assert torch.equal(model._positions((7, 11)), make(48, (7, 11)))


@pytest.mark.parametrize("own_grid", [True, False])
def test_compiles_into_one_graph(own_grid):
    model = randomised(mixer="hybrid")  # ATConv and attention
    x, t, y = FOREIGN_GRID
    x = x[..., :8, :8] if own_grid else x
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x, t, y)
    assert relative_error(found, model(x, t, y)) < 1e-6


def test_exports_with_a_batch_of_any_size():
    model, B = randomised(mixer="hybrid").eval(), torch.export.Dim("B", max=64)
    program = torch.export.export(model, FOREIGN_GRID, dynamic_shapes=({0: B}, {0: B}, {0: B}))
    seven = (torch.randn(7, 4, 12, 20), torch.rand(7), torch.arange(7))
    assert relative_error(program.module()(*seven), model(*seven)) < 1e-6


@pytest.mark.parametrize("mixer", ["atconv", "attention"])
def test_under_autocast_the_residual_stream_stays_in_the_dtype_of_the_weights(mixer):
    model = randomised(mixer=mixer)
    streams = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: streams.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(*FOREIGN_GRID)
    assert streams == [torch.float32] * 2


def test_initialisation_is_sits():
    torch.manual_seed(0)
    model = SiT(**{**TINY, "hidden_size": 256}, mixer="hybrid")
    for block in model.blocks:
        assert not block.adaLN_modulation[1].weight.any() and not block.adaLN_modulation[1].bias.any()
    for zero in (model.final_layer.linear, model.final_layer.adaLN_modulation[1]):
        assert not zero.weight.any() and not zero.bias.any()
    for embedding in (model.y_embedder.embedding_table, model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        assert embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for linear, fan in [(model.blocks[0].attn.qkv, 256 + 768), (model.blocks[1].attn.x_proj, 512)]:
        limit = (6 / fan) ** 0.5
        assert linear.weight.abs().max().item() == pytest.approx(limit, rel=0.01) and not linear.bias.any()
    patch = model.x_embedder.proj
    assert patch.weight.abs().max().item() == pytest.approx((6 / (256 + 16)) ** 0.5, rel=0.01) and not patch.bias.any()
    assert not model.blocks[1].attn.difference_control.any()
    assert not model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])).any()


def test_mixers_by_name_and_by_list():
    kinds = [type(block.attn) for block in SiT(**TINY, mixer=["attention", "atconv"]).blocks]
    assert kinds == [Attention, ATConv]
    with pytest.raises(ValueError, match="'mamba'"):
        SiT(**TINY, mixer="mamba")
    with pytest.raises(ValueError, match="names 3 blocks, but depth is 2"):
        SiT(**TINY, mixer=["atconv"] * 3)
    with pytest.raises(ValueError, match="similar names: SiT-ATConv-XL/2"):
        SiT.from_preset("SiT-ATConv-XXL/2")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixer": ["attention", "atconv"], "kernel_size": 5, "qk_norm": True},
        {"has_null_label": False, "learn_sigma": False},
    ],
)
def test_saved_and_loaded_is_the_same(tmp_path, options):
    model = randomised(**options)
    model.save_pretrained(tmp_path)
    loaded = SiT.from_pretrained(tmp_path)
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    assert isinstance(loaded, ModelMixin) and torch.equal(loaded(x, t, y), model(x, t, y))
    assert loaded.config.mixer == options.get("mixer", "atconv") and loaded.null_label == model.null_label
    half = SiT.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half(x, t, y).dtype == torch.float32 and relative_error(half(x, t, y), model(x, t, y)) < 0.05


@pytest.mark.parametrize("mixer", ["atconv", "hybrid"])
@pytest.mark.parametrize("size", [(8, 8), (12, 4), (16, 16)])
def test_any_grid(mixer, size):
    x = torch.randn(2, 4, *size)
    assert randomised(mixer=mixer)(x, torch.rand(2), torch.tensor([0, 1])).shape == x.shape


def test_rows_are_rows():
    """On a grid that is not square, what is near in the picture is near in the model."""
    model = randomised()
    x = torch.randn(1, 4, 4, 24)
    t, y = torch.rand(1), torch.tensor([3])
    changed = x.clone()
    changed[..., 12:14] += 1e-3
    moved = (model(changed, t, y) - model(x, t, y)).abs().amax((0, 1, 2))
    assert moved[12:14].min() > 10 * moved[:6].max()


def test_position_table_of_another_grid_is_computed():
    model = randomised(mixer="attention")
    other = randomised(mixer="attention", input_size=12)
    x, t, y = torch.randn(1, 4, 12, 12), torch.rand(1), torch.tensor([3])
    assert torch.equal(model(x, t, y), other(x, t, y))


def test_training_mode_changes_nothing():
    model = randomised()
    x, t, y = torch.randn(4, 4, 8, 8), torch.rand(4), torch.arange(4)
    assert torch.equal(model.train()(x, t, y), model.eval()(x, t, y))


def test_sides_not_divisible_by_the_patch():
    with pytest.raises(ValueError, match=r"9x8.*patch_size 2"):
        SiT(**TINY)(torch.zeros(1, 4, 9, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="7x7"):
        SiT(**{**TINY, "input_size": 7})


@pytest.mark.parametrize("mixer", ["atconv", "attention"])
def test_activation_checkpointing_computes_the_same_and_keeps_less(mixer):
    model, inputs = randomised(mixer=mixer, depth=4), FOREIGN_GRID

    def train() -> tuple[torch.Tensor, dict, int]:
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            v = model(*inputs)
        v.square().mean().backward()
        return v, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, sum(kept.values())

    v, gradients, kept = train()
    model.enable_gradient_checkpointing()
    v_again, gradients_again, kept_again = train()
    assert torch.equal(v, v_again)
    assert max(relative_error(gradients_again[name], gradients[name]) for name in gradients) < 1e-6
    assert kept_again < kept / 2
    with torch.no_grad():
        assert torch.equal(model(*inputs), v)  # sampling has nothing to compute again


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = SiT(**TINY, learn_sigma=False)
    x, t, y = torch.randn(4, 4, 8, 8), torch.rand(4), torch.arange(4)
    target = torch.randn(4, 4, 8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0, fused=True)
    for _ in range(150):
        loss = (model(x, t, y) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


BATCH = (
    torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
    torch.tensor([0.2, 0.7]),
    torch.tensor([0, 2]),
)


@pytest.mark.parametrize("mixer", ["atconv", "hybrid"])
def test_every_module_is_called_so_that_hooks_and_adapters_see_it(mixer):
    model = randomised(mixer=mixer)
    seen = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: seen.add(name))
    model(*BATCH)
    containers = {name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    assert {name for name, _ in model.named_modules()} - seen == containers


def test_linears_can_be_quantised_dynamically():
    model = randomised(mixer="atconv").eval()
    expected = model(*BATCH)
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert not [name for name, module in quantised.named_modules() if type(module) is torch.nn.Linear]
    assert 0 < relative_error(quantised(*BATCH), expected) < 0.1


@pytest.mark.parametrize("options", [{"kernels": "static"}, {"kernel_inhibition": "none"}, {"two_times": True}])
def test_every_variant_is_saved_and_loaded(tmp_path, options):
    """diffusers builds the model without initialising it: functions of nn.init then return nothing."""
    model = randomised(**options)
    model.save_pretrained(tmp_path)
    loaded = SiT.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
