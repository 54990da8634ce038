"""The data set of cached latents, and that what is drawn from it depends on seed and position alone."""

import dataclasses
import pickle
import shutil
from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader

from sit_atconv.data.codecs import VAECodec
from sit_atconv.data.images import ImageFolder
from sit_atconv.data.latent_folder import read_index, write_index
from sit_atconv.data.latents import CachedLatents
from sit_atconv.data.order import BatchOrder
from sit_atconv.data.pixels import to_float
from sit_atconv.data.sources import DataConfig, describe_data
from tests.conftest import encode_argv, relative_error


def test_the_latents_are_the_moments_of_plain_and_flipped_images(latents, digit_folder, vae):
    cached, images, codec = CachedLatents(latents), ImageFolder(digit_folder, 32), VAECodec(str(vae))
    assert len(cached) == 120 and cached.class_names == images.class_names and cached.image_size == 32
    for i in (0, 19, 20, 119):
        for mirrored in (False, True):
            moments, label = cached[i, mirrored]
            pixels, expected = images[i, mirrored]
            assert relative_error(moments, codec.encode(to_float(pixels[None]))[0]) < 1e-5 and label == expected
    moments, mirrored = cached[7, False][0], cached[7, True][0]
    assert relative_error(mirrored, moments.flip(-1)) > 1e-3  # encoded separately, not flipped


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_stored_latents_decode_as_those_straight_from_the_vae(
    launch, latents, digit_folder, vae, tmp_path, dtype, tolerance
):
    argv = encode_argv(digit_folder, vae, tmp_path / "half")
    argv[argv.index("--dtype") + 1] = dtype
    codes, output = launch("sit_atconv/encode.py", argv)
    assert codes == [0], output
    half, whole, codec = CachedLatents(tmp_path / "half"), CachedLatents(latents), VAECodec(str(vae))
    pixels = ImageFolder(digit_folder, 32)[77, False][0][None]
    stored = half[77, False][0]
    assert stored.dtype == getattr(torch, dtype)
    assert relative_error(stored, whole[77, False][0]) < tolerance
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    decoded = codec.decode(codec.latents(stored[None], generators[0]))
    direct = codec.decode(codec.latents(codec.encode(to_float(pixels)), generators[1]))
    assert decoded.dtype == torch.float32 and relative_error(decoded, direct) < 2 * tolerance


def batches(latents, workers, start=0, count=12):
    order = BatchOrder(120, 20, seed=3, accumulation=2, mirror=True).starting_at(start)
    loader = DataLoader(CachedLatents(latents, mirror=True), batch_sampler=order, num_workers=workers)
    return list(islice(loader, count))


def test_batches_are_the_same_for_any_number_of_workers_and_from_any_step(latents):
    """An epoch has six steps of two micro-batches each; all are equal bitwise."""
    alone = batches(latents, 0, count=16)
    for workers, start in ((1, 0), (3, 0), (2, 3), (0, 7)):
        others = batches(latents, workers, start, count=16 - 2 * start)
        for (x, y), (other_x, other_y) in zip(alone[2 * start :], others, strict=True):
            assert torch.equal(x, other_x) and torch.equal(y, other_y)
    assert not torch.equal(alone[0][0], alone[12][0])


def test_it_can_be_pickled_for_a_spawned_process(latents):
    cached = CachedLatents(latents)
    before = cached[5, False]
    again = pickle.loads(pickle.dumps(cached))
    assert torch.equal(again[5, False][0], before[0]) and again.shards.keys() == cached.shards.keys()


def test_unusable_latents_and_options_are_refused(latents, vae, make_vae, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere holds no index\.json"):
        DataConfig(latents=str(tmp_path / "nowhere")).open()
    with pytest.raises(ValueError, match=r"data.image_size is 64, but .* was encoded at 32"):
        DataConfig(latents=str(latents), image_size=64).open()
    with pytest.raises(ValueError, match=r"was encoded with another codec than .*\(weights \w+ -> \w+\)"):
        DataConfig(latents=str(latents), codec=str(make_vae(1))).open()
    with pytest.raises(ValueError, match=r"was encoded with another codec than .*\(scale 0\.5 -> 0\.25\)"):
        DataConfig(latents=str(latents), codec=str(make_vae(scaling_factor=0.25))).open()
    with pytest.raises(
        ValueError, match=r"no VAE could be loaded from '/nowhere/vae'.*Set --data\.codec to the folder"
    ):
        DataConfig(latents=str(latents), codec="/nowhere/vae").open()
    with pytest.raises(ValueError, match=r"data\.images here and data\.latents .*: give one of them"):
        DataConfig(images="here", latents=str(latents)).open()
    with pytest.raises(ValueError, match=r"data\.codec: .* was encoded with .*\(kind autoencoder_kl -> identity"):
        DataConfig(latents=str(latents), codec="identity").open()
    copy = shutil.copytree(latents, tmp_path / "copy")
    shard = copy / "shard-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors has \d+ bytes, and the index says \d+: delete it"):
        DataConfig(latents=str(copy)).open()
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors is missing: run the same"):
        DataConfig(latents=str(copy)).open()


def test_classes_without_images_are_refused_unless_they_are_kept(latents, tmp_path):
    copy = shutil.copytree(latents, tmp_path / "copy")
    index = read_index(copy)
    index = dataclasses.replace(index, class_names=[*index.class_names, "moth"], class_counts=[*index.class_counts, 0])
    write_index(copy, index)
    with pytest.raises(ValueError, match=r"has 1 class without images: 10 \('moth'\).*--data\.keep_empty_classes true"):
        CachedLatents(copy)
    assert CachedLatents(copy, keep_empty_classes=True).class_counts[-1] == 0
    (copy / "shard-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"(?s)1 class without images.*shard-00002\.safetensors is missing"):
        CachedLatents(copy)
    shutil.copy(latents / "shard-00002.safetensors", copy)
    write_index(copy, dataclasses.replace(index, keep_empty_classes=True))
    assert len(CachedLatents(copy).class_names) == 11


def test_a_shard_of_other_settings_is_refused_when_it_is_read(latents, tmp_path):
    copy = shutil.copytree(latents, tmp_path / "copy")
    index = read_index(copy)
    write_index(copy, dataclasses.replace(index, settings=dataclasses.replace(index.settings, crop="none")))
    with pytest.raises(ValueError, match=r"shard-00000.safetensors was encoded with .*\(crop upright .* -> none\)"):
        CachedLatents(copy)[0, False]


def test_the_description_of_the_data_does_not_depend_on_their_place(latents, vae, make_vae, tmp_path):
    """A moved copy has an equal description."""
    here = DataConfig(latents=str(latents))
    description = describe_data(*here.open())
    shutil.copytree(vae, tmp_path / "vae")
    moved = DataConfig(latents=str(shutil.copytree(latents, tmp_path / "moved")), codec=str(tmp_path / "vae"))
    assert describe_data(*moved.open()) == description
    assert description["classes"] == 10 and description["kind"] == "latents"
    data, codec = here.open()
    assert codec.describe()["source"] == str(vae) and data.is_encoded
