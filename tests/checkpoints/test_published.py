"""Reading published files: formats, REPA's conventions, damage, and code that is never run."""

import argparse

import pytest
import torch
from safetensors.torch import save_file

from sit_atconv.checkpoints.published import read_published
from tests.conftest import relative_error
from tests.models.test_sit import randomised


@pytest.fixture
def weights():
    return randomised().state_dict()


def training_file(path, model, ema=None):
    """Writes a training file in the format of SiT and REPA."""
    content = {"model": model, "opt": {"state": {0: {"step": torch.tensor(3.0)}}}, "args": argparse.Namespace(lr=1e-4)}
    torch.save(content if ema is None else {**content, "ema": ema}, path)
    return path


def assert_equal(a: dict, b: dict):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


def test_the_ema_weights_of_a_training_file_are_preferred(tmp_path, weights):
    others = {name: tensor + 1 for name, tensor in weights.items()}
    both = read_published(training_file(tmp_path / "a.pt", others, weights))
    assert both.ema is True and not both.repa
    assert_equal(both.tensors, weights)
    alone = read_published(training_file(tmp_path / "b.ckpt", weights, {}))
    assert alone.ema is False
    assert_equal(alone.tensors, weights)


def test_bare_state_dicts_are_read_in_every_format(tmp_path, weights):
    torch.save(weights, tmp_path / "a.pth")
    torch.save(weights, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "a.safetensors")
    for name in ("a.pth", "legacy.pt", "a.safetensors"):
        assert read_published(tmp_path / name).ema is None
        assert_equal(read_published(tmp_path / name).tensors, weights)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
def test_prefixes_of_wrappers_are_removed(tmp_path, weights, prefix):
    wrapped = {prefix + name: tensor for name, tensor in weights.items()}
    assert_equal(read_published(training_file(tmp_path / "a.pt", {}, wrapped)).tensors, weights)


def test_changing_loaded_tensors_does_not_change_the_file(tmp_path, weights):
    """The file is mapped into memory."""
    path = training_file(tmp_path / "a.pt", weights)
    before = path.read_bytes()
    for tensor in read_published(path).tensors.values():
        tensor.zero_()
    assert path.read_bytes() == before


def as_repa(weights: dict, convolutions: bool) -> dict:
    """Returns the weights of v_repa(x, t) = -v(x, 1 - t) in REPA's form.

    W [cos ft | sin ft] is the real part of w e^(ift), w = Wc - i Ws. With 1 - t for t it is that of w e^(if) e^(-ift),
    which is that of conj(w e^(if)) e^(ift).
    """
    weights = dict(weights)
    first = weights["t_embedder.mlp.0.weight"].double()
    half = first.shape[1] // 2
    w = torch.complex(first[:, :half], -first[:, half:])
    f = torch.tensor([10000 ** (-j / half) for j in range(half)], dtype=torch.float64)
    w = (w * torch.exp(1j * f)).conj()
    weights["t_embedder.mlp.0.weight"] = torch.cat([w.real, -w.imag], dim=1).float()
    for name, tensor in weights.items():
        if name.startswith("final_layer.linear"):
            weights[name] = -tensor
        if convolutions and ".attn." in name and name.split(".attn.")[1] in CONVOLUTIONS:
            weights[name] = tensor[:, :, None, None]
    return weights


CONVOLUTIONS = ("kernel_proj.weight", "x_proj.weight", "proj.weight")


@pytest.mark.parametrize("patch_size", [1, 2])  # with 1, the patch embedding has weights (D, C, 1, 1) and keeps them
@pytest.mark.parametrize(("mixer", "projectors"), [("atconv", True), ("atconv", False), ("attention", True)])
def test_repas_time_is_reversed(tmp_path, mixer, projectors, patch_size):
    options = dict(mixer=mixer, patch_size=patch_size, learn_sigma=False, num_classes=10)
    ours = randomised(**options)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.3, 1.0]), torch.tensor([0, 10, 3])
    repa = randomised(**options)
    repa.load_state_dict(as_repa(ours.state_dict(), convolutions=False))
    assert relative_error(repa(x, t, y), -ours(x, 1 - t, y)) < 1e-5  # REPA's convention indeed
    assert relative_error(repa(x, t, y), -ours(x, t, y)) > 0.01

    theirs = as_repa(ours.state_dict(), convolutions=mixer == "atconv")
    if projectors:
        theirs["projectors.0.0.weight"] = torch.zeros(7, 48)
    published = read_published(training_file(tmp_path / "repa.pt", {}, {f"module.{k}": v for k, v in theirs.items()}))
    assert published.repa
    loaded = randomised(**options)
    loaded.load_state_dict(published.tensors)
    assert relative_error(loaded(x, t, y), ours(x, t, y)) < 1e-5


def test_repas_weights_keep_their_dtype(tmp_path, weights):
    half = {name: tensor.half() for name, tensor in as_repa(weights, convolutions=True).items()}
    tensors = read_published(training_file(tmp_path / "repa.pt", half)).tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    name = "t_embedder.mlp.0.weight"
    assert (tensors[name].float() - weights[name]).abs().max() < 1e-3


def test_repas_weights_must_be_complete(tmp_path, weights):
    partial = {name: t for name, t in as_repa(weights, convolutions=True).items() if name != "final_layer.linear.bias"}
    with pytest.raises(ValueError, match=r"repa\.pt has REPA's form but no final_layer\.linear\.bias"):
        read_published(training_file(tmp_path / "repa.pt", partial))


def one_line(path) -> str:
    """Returns the error for a file: one line that names it."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        read_published(path)
    assert str(path) in str(error.value) and len(str(error.value)) < 400 + len(str(path))
    return str(error.value)


@pytest.mark.parametrize("name", ["a.pt", "legacy.pt", "a.safetensors"])
def test_damaged_files_are_named(tmp_path, weights, name):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=name == "a.pt")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-10], whole[:4], b"", b"not weights\n" * 99, b"\x93" * 4000):
        path.write_bytes(content)
        assert "incomplete or damaged" in one_line(path) and "download or copy it again" in one_line(path)


def test_files_without_weights_say_what_they_hold(tmp_path):
    torch.save({"optimizer": {}, "scaler": None}, tmp_path / "optimizer.pt")
    assert "only optimizer, scaler" in one_line(tmp_path / "optimizer.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    assert "(Tensor)" in one_line(tmp_path / "tensor.pt")
    torch.save({}, tmp_path / "empty.pt")
    assert "(dict)" in one_line(tmp_path / "empty.pt")
    assert "is not a file" in one_line(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_is_run(tmp_path, weights, zipped):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"ema": weights, "args": Payload()}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    message = one_line(tmp_path / "a.pt")
    assert "could run code" in message and "open" in message and ".safetensors" in message
    assert not (tmp_path / "owned").exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # for this file only
