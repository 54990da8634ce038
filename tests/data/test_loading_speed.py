"""The measurement of reading: what it reads, and how little memory that takes."""

from sit_atconv.data.images import ImageFolder
from sit_atconv.data.latent_folder import verify
from sit_atconv.data.latents import CachedLatents
from sit_atconv.data.loading_speed import measure_loading, write_random_latents


def test_sources_are_measured_by_turns(latents, digit_folder):
    sources = {"latents": lambda: CachedLatents(latents, mirror=True), "images": lambda: ImageFolder(digit_folder, 32)}
    found = measure_loading(sources, batch_size=20, num_workers=1, rounds=3, seconds=0.05)
    assert found.keys() == sources.keys()
    for speed in found.values():
        assert speed.samples == 120 and len(speed.rounds) == 3
        assert speed.samples_per_second == sorted(speed.rounds)[1] > 0
        assert speed.private_mib is None or 1 < speed.private_mib < 4096


def test_random_latents_are_a_whole_folder(tmp_path):
    write_random_latents(tmp_path, 5000, (8, 4, 4))
    assert verify(tmp_path) == [] and len(CachedLatents(tmp_path)) == 5000 and len(list(tmp_path.glob("shard*"))) == 2
    moments, label = CachedLatents(tmp_path)[4999, True]
    assert moments.shape == (8, 4, 4) and 0.5 < moments.float().std() < 1.5 and 0 <= label < 10
