"""The token mixer ATConv, and SiT with any mixture of ATConv, attention and other token mixers."""

_HOMES = {
    "ATConv": "sit_atconv.models.atconv",
    "SiT": "sit_atconv.models.sit",
    "PRESETS": "sit_atconv.models.presets",
}


def __getattr__(name):  # ATConv alone must not pay for importing diffusers and timm
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return sorted(_HOMES)
