"""Warm starts: what is kept of the weights, what starts from scratch, and what is reported."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from sit_atconv.checkpoints.exported import save_weights
from sit_atconv.checkpoints.recipe import Recipe
from sit_atconv.checkpoints.training_state import TrainingState, load_checkpoint, save_checkpoint
from sit_atconv.checkpoints.warm_start import _blocks, start_from
from sit_atconv.flow.alignment import Alignment, MLPProjector
from sit_atconv.models import SiT
from sit_atconv.models.mixers import MIXERS, Mixer
from sit_atconv.models.sit import sincos_pos_embed
from tests.checkpoints.test_published import CONVOLUTIONS, as_repa
from tests.models.test_sit import TINY, randomised

CODEC = {"kind": "identity", "channels": 4, "downsample": 1}
NAMES = [f"class {i}" for i in range(10)]
RECIPE = Recipe("linear", "velocity", CODEC, NAMES, 7, ema_decay=0.99)
TABLE = "y_embedder.embedding_table.weight"


def fresh(**options) -> SiT:
    torch.manual_seed(1)
    return SiT(**{**TINY, **options})


def copy_of(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def start(tmp_path):
    """start(theirs, net, published=False, recipe=RECIPE, **settings) -> (lines, names that changed, tensors before)."""

    def run(theirs, net, published=False, recipe=RECIPE, **settings):
        ckpt = tmp_path / "theirs"
        if published:
            tensors = theirs if isinstance(theirs, dict) else theirs.state_dict()
            save_file(tensors, ckpt := tmp_path / "theirs.safetensors")
        else:
            names = recipe.class_names[: theirs.config.num_classes]
            save_weights(theirs, dataclasses.replace(recipe, class_names=names), ckpt)
        before = copy_of(net)
        settings = dict(flow_path="linear", prediction="velocity", codec=CODEC) | settings
        lines = start_from(net, str(ckpt), **settings).lines
        assert all(line and "\n" not in line and str(tmp_path) not in line for line in lines[1:])
        changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
        return lines, changed, before

    return run


def assert_kept(net, theirs, names):
    ours, theirs = net.state_dict(), theirs.state_dict()
    assert names and all(torch.equal(ours[name], theirs[name]) for name in names)


@pytest.mark.parametrize("mixer", ["atconv", "hybrid"])
@pytest.mark.parametrize("published", [True, False])
def test_the_same_model_is_copied_without_further_lines(start, mixer, published):
    theirs, net = randomised(mixer=mixer), fresh(mixer=mixer)
    lines, _, _ = start(theirs, net, published)
    assert_kept(net, theirs, net.state_dict())
    total = len(net.state_dict()) - (mixer == "hybrid")
    where = "" if published else " (EMA, step 7)"
    assert len(lines) == 1 and lines[0].endswith(f"{where}: {total} of {total} tensors kept"), lines
    assert lines[0].startswith("started from /")


def test_the_ema_weights_of_runs_and_files_are_used(tmp_path):
    model, ema, net = randomised(), fresh(), fresh()
    torch.nn.init.ones_(ema.final_layer.linear.weight)
    save_checkpoint(
        tmp_path / "run",
        TrainingState(model, {0.9: ema}, torch.optim.SGD(model.parameters())),
        dataclasses.replace(RECIPE, ema_decay=None),
        keep=1,
    )
    torch.save({"model": model.state_dict(), "ema": ema.state_dict()}, tmp_path / "file.pt")
    for name, kind in [
        ("run", "EMA, step 7"),
        ("run/checkpoints/step-0000007/model", "as trained, step 7"),
        ("file.pt", "EMA"),
    ]:
        lines = start_from(net, str(tmp_path / name), "linear", "velocity", CODEC).lines
        assert f"{name} ({kind}): " in lines[0]
        assert_kept(net, ema if "EMA" in kind else model, net.state_dict())


def test_the_model_can_be_trained(start):
    """Loaded weights are frozen and float32; the model keeps its dtype and its gradients."""
    net = fresh().bfloat16().train()
    start(randomised(), net)
    assert all(p.requires_grad and p.dtype is torch.bfloat16 and p.is_leaf for p in net.parameters())


# ------------------------------------------------------------------------------------------------- label table


@pytest.mark.parametrize(("published", "there"), [(True, "6 rows"), (False, "5 classes")])
def test_another_class_count_starts_the_label_table_from_scratch(start, published, there):
    net = fresh()
    lines, changed, before = start(randomised(num_classes=5), net, published)
    assert changed == before.keys() - {TABLE}
    assert lines[1:] == [f"the label table starts from scratch: {there} there, 10 classes and the null label here"]


def test_equal_rows_with_another_class_count_start_from_scratch(start):
    """Ten classes and a null label are not eleven classes."""
    lines, changed, _ = start(randomised(), fresh(num_classes=11, has_null_label=False))
    assert TABLE not in changed
    assert lines[1:] == ["the label table starts from scratch: 10 classes there, 11 classes here"]


@pytest.mark.parametrize("published", [True, False])
def test_a_new_null_label_starts_from_scratch(start, published):
    theirs, net = randomised(has_null_label=False), fresh()
    lines, _, before = start(theirs, net, published)
    table = net.state_dict()[TABLE]
    assert torch.equal(table[:10], theirs.state_dict()[TABLE]) and torch.equal(table[10], before[TABLE][10])
    assert len(lines) == 2 and "null label's row starts from scratch" in lines[1]


@pytest.mark.parametrize("published", [True, False])
def test_a_null_label_can_be_left_out(start, published):
    theirs, net = randomised(), fresh(has_null_label=False)
    lines, _, _ = start(theirs, net, published)
    assert torch.equal(net.state_dict()[TABLE], theirs.state_dict()[TABLE][:10])
    assert len(lines) == 2 and "null label's row is left out" in lines[1]


def test_differing_class_names_are_reported(start):
    renamed = ["class 0", "cat", "dog", *NAMES[3:]]
    line = "label 1 is 'class 1' there, 'cat' here (and 1 more)"
    assert line in start(randomised(), fresh(), class_names=renamed)[0][1]
    for names in (NAMES, None):
        assert len(start(randomised(), fresh(), class_names=names)[0]) == 1
    five = start(randomised(num_classes=5), fresh(), class_names=renamed)[0]
    assert len(five) == 2 and "5 classes there" in five[1]


def test_rows_follow_the_names_of_their_classes(start):
    """The names may have another order or another Unicode form."""
    names = [f"class {i}" for i in range(9)] + ["caf\u00e9"]
    here = [" cafe\u0301 ", *names[8::-1]]
    theirs, net = randomised(), fresh()
    recipe = dataclasses.replace(RECIPE, class_names=names)
    lines, _, before = start(theirs, net, recipe=recipe, class_names=here)
    there = theirs.state_dict()[TABLE]
    assert torch.equal(net.state_dict()[TABLE], torch.cat([there[:10].flip(0), there[10:]]))
    assert lines[1:] == [
        "the label table's rows follow the class names, whose order differs: label 0 is 'class 0' "
        "there, ' cafe\u0301 ' here (and 9 more)"
    ]
    assert f": {len(before)} of {len(before)} tensors kept" in lines[0]
    lines, _, _ = start(theirs, other := fresh(has_null_label=False), recipe=recipe, class_names=here)
    assert torch.equal(other.state_dict()[TABLE], there[:10].flip(0)) and len(lines) == 3
    lines, _, _ = start(theirs, net, recipe=recipe, class_names=[*names[:9], "cafe\u0301"])
    assert torch.equal(net.state_dict()[TABLE], there) and len(lines) == 1
    doubled = ["a", *names[1:9], "a"]  # which of the two is which?
    lines, _, _ = start(theirs, net, recipe=dataclasses.replace(RECIPE, class_names=doubled), class_names=doubled[::-1])
    assert torch.equal(net.state_dict()[TABLE], there) and "the label table is kept: label 1" in lines[1]


def test_labels_of_a_file_without_names_are_reported(start):
    lines, _, _ = start(randomised(), fresh(), published=True, class_names=NAMES[::-1])
    assert lines[1:] == [
        "the weights do not name their classes: label 0 becomes 'class 9', "
        "label 1 becomes 'class 8', label 2 becomes 'class 7', ..."
    ]


def test_the_training_arguments_of_a_file_are_used(tmp_path):
    """They hold class names, interpolant and number of classes."""
    theirs, net = randomised(), fresh()
    args = dict(class_names=NAMES[::-1], num_classes=10, path_type="GVP", prediction="velocity", class_dropout_prob=0)
    torch.save({"ema": theirs.state_dict(), "args": args}, tmp_path / "a.pt")
    begun = start_from(net, str(tmp_path / "a.pt"), "linear", "velocity", CODEC, class_names=NAMES)
    assert torch.equal(net.state_dict()[TABLE][:10], theirs.state_dict()[TABLE][:10].flip(0))
    assert "rows follow the class names" in begun.lines[1]
    assert begun.lines[2:] == ["the weights were trained with other settings: interpolant gvp -> linear"]
    assert begun.null_label_trained is False
    eleven = start_from(fresh(num_classes=11, has_null_label=False), str(tmp_path / "a.pt"), "gvp", "velocity", CODEC)
    assert "the label table starts from scratch: 10 classes there, 11 classes here" in eleven.lines


@pytest.mark.parametrize(
    ("trained", "there", "here", "kept"),
    [
        (True, {}, {}, True),
        (False, {}, {}, False),
        (None, {}, {}, None),
        (True, dict(num_classes=5), {}, False),
        (True, dict(has_null_label=False), {}, False),
        (True, {}, dict(has_null_label=False), False),
    ],
)
def test_the_result_tells_if_the_null_label_was_trained(tmp_path, trained, there, here, kept):
    theirs = randomised(**there)
    recipe = dataclasses.replace(RECIPE, class_names=NAMES[: theirs.config.num_classes], null_label_trained=trained)
    save_weights(theirs, recipe, tmp_path / "theirs")
    assert start_from(fresh(**here), str(tmp_path / "theirs"), "linear", "velocity", CODEC).null_label_trained is kept


def test_a_dit_is_refused_and_a_model_without_a_recipe_is_taken(tmp_path):
    theirs, net = randomised(), fresh()
    torch.save({"ema": theirs.state_dict(), "args": {"model": "DiT-S/8"}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a DiT predicts noise"):
        start_from(net, str(tmp_path / "a.pt"), "linear", "velocity", CODEC)
    theirs.save_pretrained(tmp_path / "bare")
    lines = start_from(net, str(tmp_path / "bare"), "linear", "velocity", CODEC, class_names=NAMES).lines
    assert_kept(net, theirs, net.state_dict())
    assert f"{tmp_path}/bare: " in lines[0] and "do not name their classes" in lines[1] and len(lines) == 2


# ------------------------------------------------------------------------------------------------- positions


def test_another_resolution_needs_no_line(start):
    theirs, net = randomised(mixer="attention"), fresh(mixer="attention", input_size=16)
    lines, changed, before = start(theirs, net)
    assert "pos_embed" not in changed and len(lines) == 1
    assert f"{len(before) - 1} of {len(before) - 1} " in lines[0]


def test_a_position_embedding_is_added_or_left_out(start):
    lines, _, _ = start(randomised(use_pos_embed=True), net := fresh())
    assert lines[1:] == ["position embedding left out: this model has none"] and net.pos_embed is None
    lines, changed, _ = start(randomised(), fresh(use_pos_embed=True))
    assert lines[1:] == ["position embedding added: the weights have none"] and "pos_embed" not in changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the latter rounds by more than the threshold
def test_a_trained_position_embedding_is_copied(start, dtype):
    theirs, net = randomised(mixer="attention").to(dtype), fresh(mixer="attention")
    assert len(start(theirs, net, published=True)[0]) == 1
    assert torch.equal(net.pos_embed, sincos_pos_embed(48, (4, 4)))
    theirs.pos_embed.data += 0.01
    lines, _, before = start(theirs, net, published=True)
    assert torch.equal(net.pos_embed, theirs.pos_embed.float()) and not net.pos_embed.requires_grad
    assert len(lines) == 2 and "it was trained" in lines[1] and f"{len(before)} of {len(before)} " in lines[0]


# ------------------------------------------------------------------------------------------------- mixers


def mixer_names(net, *blocks):
    return {name for name in net.state_dict() if name.startswith(tuple(f"blocks.{i}.attn." for i in blocks))}


@pytest.mark.parametrize(
    ("there", "here", "fresh_blocks", "line"),
    [
        (dict(mixer="attention"), dict(), (0, 1, 2, 3), "mixers of all 4 blocks (attention there, 3x3 ATConv here)"),
        (dict(mixer="hybrid"), dict(), (0, 2), "mixers of blocks 0, 2 (attention there, 3x3 ATConv here)"),
        (
            dict(mixer="hybrid"),
            dict(mixer=["atconv", "attention"] * 2),
            (0, 1, 2, 3),
            "mixers of blocks 0, 2 (attention there, 3x3 ATConv here) and of blocks 1, 3 (3x3 ATConv there, attention",
        ),
        (dict(), dict(kernel_size=5), (0, 1, 2, 3), "mixers of all 4 blocks (3x3 ATConv there, 5x5 ATConv here)"),
        (
            dict(mixer="attention", qk_norm=True),
            dict(mixer="attention"),
            (0, 1, 2, 3),
            "mixers of all 4 blocks (attention with qk_norm there, attention here)",
        ),
    ],
)
def test_other_mixers_start_from_scratch_as_a_whole(start, there, here, fresh_blocks, line):
    """Both kinds have attn.proj of the same shape, but its meaning differs."""
    common = dict(depth=4, use_pos_embed=False)
    theirs, net = randomised(**common, **there), fresh(**common, **here)
    lines, changed, before = start(theirs, net)
    left = mixer_names(net, *fresh_blocks)
    assert left and not left & changed
    assert_kept(net, theirs, set(before) - left)
    assert len(lines) == 2 and lines[1].startswith(line) and lines[1].endswith(" start from scratch"), lines
    assert f": {len(before) - len(left)} of {len(before)} tensors kept" in lines[0]


@pytest.mark.parametrize("published", [True, False])
def test_a_users_own_mixer_starts_from_scratch_or_is_kept(start, monkeypatch, published):
    """Its tensors have the names and shapes of attention's, so that a file of them shows attention."""
    build = MIXERS["attention"].build
    monkeypatch.setitem(MIXERS._entries, "linear", Mixer(build, parameters=MIXERS["attention"].parameters))
    theirs, net = randomised(mixer="linear"), fresh(mixer="attention", use_pos_embed=False)
    lines, changed, _ = start(theirs, net, published)
    assert (mixer_names(net, 0, 1) <= changed) == published
    assert published or lines[1] == "mixers of all 2 blocks (linear there, attention here) start from scratch"
    if not published:
        lines, changed, before = start(theirs, again := fresh(mixer="linear"))
        assert len(lines) == 1
        assert_kept(again, theirs, set(before))


@pytest.mark.parametrize(
    ("blocks", "spoken"),
    [
        (range(28), "all 28 blocks"),
        (range(0, 28, 2), "blocks 0, 2, ..., 26"),
        ([3], "block 3"),
        ([0, 1, 2, 5], "blocks 0-2, 5"),
        (range(20), "blocks 0-19"),
        ([0, 27], "blocks 0, 27"),
    ],
)
def test_blocks_are_named_briefly(blocks, spoken):
    assert _blocks(list(blocks), 28) == spoken


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        (dict(kernel_act="silu"), dict(), ["model.kernel_act is silu there, gelu_tanh here"]),
        (dict(kernel_pool="grid"), dict(), ["model.kernel_pool is grid there, raster here"]),
        (dict(mixer="attention", num_heads=2), dict(mixer="attention"), ["model.num_heads is 2 there, 4 here"]),
        (dict(mixer="attention", kernel_act="silu"), dict(mixer="attention"), []),  # concerns no block
        (dict(num_heads=2), dict(), []),
    ],
)
def test_differing_options_that_no_tensor_shows_are_reported(start, there, here, said):
    lines, _, _ = start(randomised(**there), fresh(**here))
    assert [line.split(":")[0] for line in lines[1:]] == said


def test_repas_weights_are_converted(start):
    theirs = randomised(kernel_act="silu", learn_sigma=False)
    tensors = {**as_repa(theirs.state_dict(), convolutions=True), "projectors.0.0.weight": torch.zeros(3, 3)}
    assert tensors[f"blocks.0.attn.{CONVOLUTIONS[0]}"].ndim == 4
    for act in ("silu", "gelu_tanh"):
        lines, _, _ = start(tensors, net := fresh(kernel_act=act, learn_sigma=False), published=True)
        assert_kept(net, theirs, {"final_layer.linear.weight", "blocks.0.attn.proj.weight"})
        assert "REPA" in lines[1] and len(lines) == (3 if act == "silu" else 4), lines
    assert lines[2] == "1 tensors of projectors are left out: this run trains none"
    assert lines[3].startswith("model.kernel_act is silu there, gelu_tanh here")


# ------------------------------------------------------------------------------------------------- output layer


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("learned_there", [True, False])
def test_learn_sigma_may_differ(start, learned_there, published):
    theirs, net = randomised(learn_sigma=learned_there), fresh(learn_sigma=not learned_there)
    for parameter in net.final_layer.linear.parameters():
        torch.nn.init.constant_(parameter, 7)
    lines, _, before = start(theirs, net, published)
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([3, 10])
    assert torch.equal(net(x, t, y), theirs(x, t, y))  # the channels that are not dropped
    assert len(lines) == 2 and "4 learn_sigma channels" in lines[1]
    assert ("left out" if learned_there else "start from scratch") in lines[1]
    if not learned_there:
        second_half = net.final_layer.linear.weight.reshape(4, 8, 48)[:, 4:]
        assert (second_half == 7).all() and f"{len(before)} of {len(before)} " in lines[0]


# ------------------------------------------------------------------------------------------------- differences


def test_other_settings_of_the_training_are_named(start):
    vae = {"kind": "autoencoder_kl", "source": "a", "weights": "c" * 64, "channels": 4, "scale": 0.18, "shift": 0.0}
    other = vae | {"source": "b", "scale": 0.5, "weights": "d" * 64, "unknown": 1}
    recipe = dataclasses.replace(RECIPE, codec=vae)
    lines, _, _ = start(randomised(), fresh(), recipe=recipe, flow_path="gvp", prediction="noise", codec=other)
    assert lines[1:] == [
        "the weights were trained with other settings: interpolant linear -> gvp, prediction velocity -> noise, "
        f"codec.weights {'c' * 12} -> {'d' * 12}, codec.scale 0.18 -> 0.5"
    ]
    assert len(start(randomised(), fresh(), recipe=recipe, codec=vae | {"source": "elsewhere"})[0]) == 1


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (
            dict(hidden_size=32),
            dict(),
            r"x_embedder\.proj\.weight \(32, 4, 2, 2\) there, \(48, 4, 2, 2\) here; .*and \d+ more",
        ),
        (dict(depth=3), dict(), r"blocks\.2\..* \(\d+.*\) there, none here; .*and \d+ more"),
        (dict(), dict(depth=3), r"blocks\.2\..* missing there, \(\d+.*\) here; .*and \d+ more"),
        (dict(patch_size=4), dict(), r"x_embedder\.proj\.weight \(48, 4, 4, 4\) there"),
        (dict(in_channels=8, learn_sigma=False), dict(), r"x_embedder\.proj\.weight \(48, 8, 2, 2\) there"),
        (dict(mlp_ratio=2.0), dict(), r"mlp\.fc1\.weight \(96, 48\) there, \(192, 48\) here"),
        (dict(hidden_size=32, num_classes=5, mixer="attention"), dict(), r"x_embedder\.proj\.weight"),
        (dict(hidden_size=32, mixer="hybrid"), dict(mixer="hybrid"), r"x_embedder\.proj\.weight"),
    ],
)
def test_another_model_is_refused_and_nothing_changes(start, there, here, message, published):
    net = fresh(**here)
    before = copy_of(net)
    with pytest.raises(ValueError, match=message + r".*--preset") as error:
        start(randomised(**there), net, published)
    assert "\n" not in str(error.value) and len(str(error.value).split("; ")) <= 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_one_missing_tensor_is_refused(start):
    theirs = randomised().state_dict()
    theirs["extra.weight"] = theirs.pop("t_embedder.mlp.2.bias")
    with pytest.raises(
        ValueError,
        match=r"t_embedder\.mlp\.2\.bias missing there, \(48,\) here; extra\.weight \(48,\) "
        r"there, none here\. Give",
    ):
        start(theirs, fresh(), published=True)


# ------------------------------------------------------------------------------------------------------ projectors


def aligned(net, width: int = 12):
    loss = Alignment(encoder="any")
    torch.manual_seed(2)
    loss.projectors.append(MLPProjector(net.config.hidden_size, width, net.grid_size, inner=20))
    return loss


def test_projectors_of_repa_are_kept_if_they_fit(start):
    theirs, net = fresh(learn_sigma=False), fresh(learn_sigma=False)
    published = as_repa(theirs.state_dict(), convolutions=True) | dict(aligned(net).state_dict())
    published["projectors.0.4.bias"] = torch.full((12,), 7.0)
    kept, other = aligned(net), aligned(net, width=10)
    lines, _, _ = start(published, net, published=True, auxiliary=kept)
    assert any(line.startswith("6 tensors of the auxiliary loss kept") for line in lines)
    assert kept.projectors[0][4].bias.eq(7).all()
    lines, _, _ = start(published, net, published=True, auxiliary=other)
    assert any("start from scratch: projectors.0.4.weight (12, 20) there, (10, 20) here" in line for line in lines)
    assert not other.projectors[0][4].bias.eq(7).any()
    lines, _, _ = start(published, net, published=True)
    assert "6 tensors of projectors are left out: this run trains none" in lines
    lines, _, _ = start(as_repa(theirs.state_dict(), convolutions=True), net, published=True, auxiliary=kept)
    assert "the parameters of the auxiliary loss start from scratch: the weights have none" in lines


def test_projectors_of_a_run_are_those_of_its_ema(tmp_path):
    net = fresh()
    loss, averages = aligned(net), {0.9: {}, 0.5: {}}
    for value, decay in enumerate(averages):
        averages[decay] = {name: torch.full_like(p, value + 3.0) for name, p in loss.named_parameters()}
    optimizer = torch.optim.AdamW([*net.parameters(), *loss.parameters()])
    state = TrainingState(net, dict.fromkeys(averages, net), optimizer, None, loss, averages)
    save_checkpoint(tmp_path / "run", state, RECIPE, keep=1)
    here = aligned(net)
    lines = start_from(net, str(tmp_path / "run"), "linear", "velocity", CODEC, auxiliary=here).lines
    assert any(line.startswith("6 tensors of the auxiliary loss kept") for line in lines)
    assert all(p.eq(3).all() for p in here.parameters())
    folder = tmp_path / "run" / "checkpoints" / "step-0000007"
    start_from(net, str(folder / "model"), "linear", "velocity", CODEC, auxiliary=(raw := aligned(net)))
    assert all(torch.equal(p, loss.get_parameter(name)) for name, p in raw.named_parameters())
    optimizer = torch.optim.AdamW([*net.parameters(), *here.parameters()])
    restored = {decay: {name: p * 0 for name, p in named.items()} for decay, named in averages.items()}
    load_checkpoint(
        folder,
        TrainingState(net, dict.fromkeys(averages, net), optimizer, None, here, restored),
    )
    assert all(torch.equal(p, loss.get_parameter(name)) for name, p in here.named_parameters())
    assert all(torch.equal(p, averages[decay][name]) for decay in averages for name, p in restored[decay].items())
    (folder / "auxiliary.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"auxiliary\.safetensors is damaged: take another checkpoint"):
        start_from(net, str(folder), "linear", "velocity", CODEC, auxiliary=here)


def test_averages_start_from_the_parameters_where_an_older_checkpoint_has_none(tmp_path):
    net = fresh()
    loss, here = aligned(net), aligned(net)
    optimizers = [torch.optim.AdamW([*net.parameters(), *module.parameters()]) for module in (loss, here)]
    save_checkpoint(tmp_path / "run", TrainingState(net, {0.9: net}, optimizers[0], None, loss), RECIPE, keep=1)
    averages = {0.9: {name: p * 0 for name, p in loss.named_parameters()}}
    state = TrainingState(net, {0.9: net}, optimizers[1], None, here, averages)
    load_checkpoint(tmp_path / "run" / "checkpoints" / "step-0000007", state)
    assert all(torch.equal(p, loss.get_parameter(name)) for name, p in averages[0.9].items())
