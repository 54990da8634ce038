"""Alignment with encoders, latents and the EMA: golden values of REPA and iREPA, and each option by itself."""

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from sit_atconv.encoders import digit_features
from sit_atconv.flow import FlowMatching
from sit_atconv.flow.alignment import (
    Alignment,
    ConvProjector,
    MLPProjector,
    dispersive_loss,
    negative_cosine,
    spatially_normalised,
)
from sit_atconv.flow.auxiliary import AuxiliaryInputs, HiddenTap
from sit_atconv.models import SiT
from sit_atconv.models.costs import multiply_adds
from tests.conftest import GOLDEN, relative_error


def close(a, b, tolerance=1e-5):
    assert relative_error(a, b) <= tolerance


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = SiT(
        input_size=8,
        patch_size=2,
        in_channels=1,
        hidden_size=16,
        depth=6,
        num_heads=2,
        num_classes=10,
        learn_sigma=False,
    )
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    return net


def aligned(net, features=None, **options) -> Alignment:
    torch.manual_seed(1)
    loss = Alignment(**options)
    loss.image_shape = net.config.in_channels, net.config.input_size, net.config.input_size
    loss.needs = loss.check(net, features)
    loss.build(net)
    return loss


def inputs(**given) -> AuxiliaryInputs:
    names = [field.name for field in dataclasses.fields(AuxiliaryInputs)]
    return AuxiliaryInputs(**(dict.fromkeys(names) | given))


def inputs_of(net, loss, batch=3, **given) -> AuxiliaryInputs:
    """What the training loop hands over, after one call of the model."""
    generator = torch.Generator().manual_seed(2)
    flow = FlowMatching()
    data = torch.randn(batch, 1, 8, 8, generator=generator)
    draw = flow.draw(data.shape, generator)
    model = HiddenTap(net, net)
    model.serve(loss)
    flow.loss(model, data, torch.arange(batch), draw, net.null_label)
    y, hidden = model.take()
    given = {"pixels": data.clamp(-1, 1), "features": None} | given
    return AuxiliaryInputs(
        data=data, y=y, hidden=hidden, objective=flow, draw=draw, random=torch.full((batch,), 0.5), average=net, **given
    )


# -------------------------------------------------------------------------------------------------- golden values


@pytest.mark.parametrize("name", ["repa_loss", "repa_loss_two_encoders"])
def test_losses_and_gradients_are_those_of_repa(net, name):
    given = load_file(GOLDEN / f"{name}.safetensors")
    targets = [given[key] for key in sorted(given) if key.startswith("z.")]
    hidden = given["hidden"].requires_grad_()
    inner = len(given["weights.projectors.0.0.bias"])
    loss = Alignment(encoder=["any"] * len(targets))
    loss.projectors.extend(MLPProjector(hidden.shape[-1], z.shape[-1], (4, 4), inner) for z in targets)
    loss.load_state_dict({key.removeprefix("weights."): given[key] for key in given if key.startswith("weights.")})
    loss.targets = lambda inputs: targets
    for i, projector in enumerate(loss.projectors):
        close(projector(hidden), given[f"z_tilde.{i}"])
    flow = FlowMatching(path="linear" if name == "repa_loss" else "gvp")
    draw = flow.draw(given["latents"].shape, torch.Generator().manual_seed(0))
    output = (-given["model_output"]).requires_grad_()  # REPA's velocity points from data to noise
    draw = type(draw)(given["noise"], 1 - given["t"], torch.zeros(len(hidden), dtype=torch.bool))
    terms = flow.loss(lambda x, t, y: output, given["latents"], torch.zeros(len(hidden)), draw, 10)
    close(terms["loss"], given["denoising_loss"])
    added = loss(inputs(data=given["latents"], hidden=hidden))
    close(added["alignment"].mean() / 0.5, given["proj_loss"][0])
    total = terms["loss"].mean() + added["alignment"].mean()
    close(total, given["total"][0])
    total.backward()
    close(hidden.grad, given["grad.hidden"])
    close(-output.grad, given["grad.model_output"])
    for key, p in loss.named_parameters():
        close(p.grad, given[f"grad.{key}"])


def test_the_convolution_and_the_normalisation_are_those_of_irepa():
    given = load_file(GOLDEN / "irepa_loss.safetensors")
    hidden = given["hidden"].requires_grad_()
    projector = ConvProjector(24, 20, (4, 5))
    projector.load_state_dict({key: given[f"weights.{key}"] for key in ("weight", "bias")})
    z = spatially_normalised(given["z"], 0.6)
    close(z, given["z_normalised"])
    close(projector(hidden), given["z_tilde"])
    loss = negative_cosine(projector(hidden), z).mean()
    close(loss, given["proj_loss"][0])
    loss.backward()
    close(hidden.grad, given["grad.hidden"])
    close(projector.weight.grad, given["grad.weight"])
    close(projector.bias.grad, given["grad.bias"])


def test_half_precision_is_normalised_in_float32():
    large = torch.full((1, 2, 4096), 300.0, dtype=torch.float16)  # the square of its length overflows
    assert negative_cosine(large, large) == pytest.approx(-1, abs=1e-6)


def test_the_dispersive_loss_averages_over_all_pairs():
    hidden = torch.randn(5, 4, 3, requires_grad=True)
    pairs = [[(a - b).square().sum() / (12 * 0.5) for a in hidden] for b in hidden]
    expected = torch.stack([torch.exp(-d) for row in pairs for d in row]).mean().log()
    close(dispersive_loss(hidden), expected)
    one, two = (torch.autograd.grad(loss, hidden)[0] for loss in (dispersive_loss(hidden), expected))
    close(one, two)


# --------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(("depth", "block"), [(1, 1), (6, 2), (12, 4), (24, 8), (28, 8)])
def test_the_default_block_is_that_of_repa(depth, block):
    net = SiT(input_size=4, hidden_size=8, depth=depth, num_heads=1)
    assert aligned(net, target="vae").block == block


@pytest.mark.parametrize(
    ("projector", "options"),
    [
        ("mlp", {"encoder": "digits"}),
        ("conv", {"encoder": "digits"}),
        ("conv", {"target": "vae"}),
        ("mlp", {"target": "self"}),
    ],
)
def test_alignment_trains_model_and_projector(net, options, projector):
    loss = aligned(net, projector=projector, **options)
    assert loss.needs == ("pixels" if "encoder" in options else None)
    optimizer = torch.optim.Adam([*net.parameters(), *loss.parameters()], 1e-3)
    average, values = copy.deepcopy(net), []
    for _ in range(4):
        terms = loss(dataclasses.replace(inputs_of(net, loss), average=average))
        assert [*terms] == ["alignment"] and terms["alignment"].shape == (3,)
        optimizer.zero_grad()
        terms["alignment"].mean().backward()
        assert all(p.grad is None for p in loss.encoders.parameters())
        assert all(p.grad is not None for p in loss.projectors.parameters())
        optimizer.step()
        values.append(terms["alignment"].mean().item())
    assert values[-1] < values[0] - 1e-3
    untouched = [p.grad is None for block in net.blocks[loss.block :] for p in block.parameters()]
    assert all(untouched)


def test_the_tokens_of_several_encoders_are_averaged(net):
    both = aligned(net, encoder=["digits", "digits"], coefficient=1.0)
    one, two = (aligned(net, encoder="digits", coefficient=1.0) for _ in range(2))
    for loss, projector in zip((one, two), both.projectors, strict=True):
        loss.projectors[0] = projector
    terms = [loss(inputs_of(net, loss))["alignment"] for loss in (both, one, two)]
    close(terms[0], (terms[1] + terms[2]) / 2)


def test_the_target_of_self_is_a_later_block_nearer_to_data(net):
    loss = aligned(net, target="self", teacher_block=5)
    inputs = inputs_of(net, loss)
    (target,) = loss.targets(inputs)
    t = (inputs.draw.t + 0.1).clamp(max=1)
    x = inputs.objective.interpolant.interpolate(inputs.data, inputs.draw.noise, t)
    assert torch.equal(target, net(x, t, inputs.y, return_hidden=5)[1]) and not target.requires_grad


def test_the_target_of_vae_are_the_patches_of_the_latents():
    net = SiT(input_size=8, patch_size=2, in_channels=4, hidden_size=16, depth=2, num_heads=2)
    loss = aligned(net, target="vae")
    data = torch.randn(2, 4, 8, 8)
    (target,) = loss.targets(inputs(data=data))
    assert target.shape == (2, 16, 16) and loss.projectors[0][4].out_features == 16
    assert torch.equal(target[1, 5].view(2, 2, 4), data[1, :, 2:4, 2:4].permute(1, 2, 0))


def test_stored_features_equal_those_of_the_encoder(net):
    live = aligned(net, encoder="digits")
    tokens = live.encoders[0](inputs_of(net, live).pixels).half()
    stored = {"encoder": "digits", "weights": "default", "grid_size": [4, 4], "width": 48}
    cached = aligned(net, stored, encoder="digits")
    assert cached.needs == "features" and not len(cached.encoders) and cached.features_shape == (16, 48)
    assert all(torch.equal(p, live.get_parameter(name)) for name, p in cached.named_parameters())
    one, two = live(inputs_of(net, live)), cached(inputs_of(net, cached, pixels=None, features=tokens))
    torch.testing.assert_close(two["alignment"], one["alignment"], rtol=1e-3, atol=1e-5)


def test_hidden_tokens_survive_checkpointing_compilation_and_autocast(net):
    loss = aligned(net, encoder="digits")
    plain = loss(inputs_of(net, loss))["alignment"]
    net.enable_gradient_checkpointing()
    net.train()
    close(loss(inputs_of(net, loss))["alignment"], plain, 1e-6)
    net.disable_gradient_checkpointing()
    compiled, given = HiddenTap(torch.compile(net, backend="aot_eager"), net), inputs_of(net, loss)
    compiled.serve(loss)
    given.objective.loss(compiled, given.data, torch.arange(3), given.draw, net.null_label)
    close(compiled.take()[1], given.hidden, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        close(loss(inputs_of(net, loss))["alignment"], plain, 2e-2)


def test_the_tap_keeps_only_what_an_active_loss_needs(net):
    """A loss that is active in some steps must not get the labels or tokens of another step."""
    model, x, t = HiddenTap(net, net), torch.randn(2, 1, 8, 8), torch.rand(2)
    model(x, t, torch.tensor([1, 1]))
    model.serve(aligned(net, target="vae"))
    model(x, t, torch.tensor([2, 2]))
    y, hidden = model.take()
    assert y.tolist() == [2, 2] and hidden.shape == (2, 16, 16)
    model.serve(None)
    model(x, t, torch.tensor([3, 3]))
    assert model.kept is None


def test_without_coefficients_it_is_off_and_opens_no_encoder(net):
    assert not Alignment(coefficient=0).enabled and Alignment(coefficient=0, dispersive=0.5).enabled
    only = aligned(net, coefficient=0, dispersive=0.5, encoder="nonsense")
    assert not [*only.parameters()] and [*only(inputs_of(net, only))] == ["dispersive"]
    assert [Alignment(last_step=3).is_active(step) for step in range(5)] == [True] * 3 + [False] * 2


def test_arithmetic_counts_encoder_and_projector(net):
    loss = aligned(net, encoder="digits", projector="conv")
    encoder = 64 * 24 * 9 + 16 * 48 * 24 * 9 + 16 * 48 * 48 * 9  # 8x8 pixels, then 4x4
    assert loss.multiply_adds(net) == encoder + 3 * 16 * 16 * 48 * 9
    of_self = aligned(net, target="self", projector="conv").multiply_adds(net)
    assert of_self == multiply_adds(net, net.grid_size) + 3 * 16 * 16 * 16 * 9


@pytest.mark.parametrize(
    ("options", "features", "message"),
    [
        ({"block": 0}, None, "auxiliary.block is 0, and the model has the blocks 1 to 6"),
        ({"block": 7}, None, "auxiliary.block is 7, and the model has the blocks 1 to 6"),
        ({"target": "self", "teacher_block": 9}, None, "teacher_block is 9"),
        ({"encoder": "dino"}, None, "there is no encoder dino: known are"),
        ({"encoder": "digits", "encoder_weights": "nowhere"}, None, "there is no file nowhere"),
        (
            {"encoder": "digits"},
            {"encoder": "digits", "weights": "default", "grid_size": [8, 8], "width": 48},
            "--features-grid 4",
        ),
        (
            {"encoder": "digits", "encoder_weights": str(digit_features.WEIGHTS)},
            {"encoder": "digits", "weights": "default", "grid_size": [4, 4], "width": 48},
            "features of digits with other weights, default and not 9c94fed3264c",
        ),
        (
            {"encoder": "digits"},
            {"encoder": "digits", "weights": "0" * 64, "grid_size": [4, 4], "width": 48},
            "features of digits with other weights, 000000000000 and not default",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(net, options, features, message):
    with pytest.raises(ValueError, match=message) as error:
        aligned(net, features, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficient": -1}, "coefficient must be finite and not negative, not -1"),
        ({"target": "vae", "encoder_weights": "x"}, "encoder_weights is for the target encoder, not vae"),
        ({"teacher_block": 3}, "teacher_block is for the target self, not encoder"),
        ({"encoder": []}, "names no encoder: give one, or --auxiliary.target vae or self"),
        ({"spatial_norm": 2}, r"spatial_norm must be in \[0, 1\], not 2"),
        ({"last_step": 0}, "last_step must be at least 1, not 0"),
        ({"encoder": ["digits", "fashion"], "encoder_weights": "one"}, "2 encoders, 1 files"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Alignment(**options)
