"""Presets: named sizes, patches and mixers; imports nothing heavy, so that `--help` can list them."""

import difflib

SIZES = {
    "Tiny": dict(depth=4, hidden_size=128, num_heads=4),  # for digits, tests and examples
    "S": dict(depth=12, hidden_size=384, num_heads=6),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
}
PATCHES = (2, 4, 8)
VARIANTS = {"SiT-{}": "attention", "SiT-ATConv-{}": "atconv", "SiT-ATConv-{}-Hybrid": "hybrid"}

PRESETS: dict[str, dict] = {
    variant.format(f"{size}/{patch}"): {**shape, "patch_size": patch, "mixer": mixer}
    for variant, mixer in VARIANTS.items()
    for size, shape in SIZES.items()
    for patch in PATCHES
}


def preset_config(name: str) -> dict:
    """Returns the constructor arguments of SiT in a preset; raises ValueError for an unknown name."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.3) or list(PRESETS)
        raise ValueError(f"there is no preset {name!r}; similar names: {', '.join(near)}")
    return PRESETS[name]
