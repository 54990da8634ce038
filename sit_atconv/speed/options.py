"""Options of the speed comparison, with their checks."""

import math
from dataclasses import dataclass

from sit_atconv.models.presets import PATCHES, PRESETS, SIZES, preset_config
from sit_atconv.runtime.dtypes import DTYPES
from sit_atconv.speed.forms import DEFAULT_FORMS, FORMS, LEVELS, find_form

PRECISIONS = tuple(name for name in DTYPES if name != "tf32")
PRESET = "SiT-{}"  # preset of a size and patch; forms replace its mixer


@dataclass(frozen=True)
class SpeedOptions:
    """Options that `eval/speed.py --help` explains.

    Raises:
        ValueError: a value is out of range, a name is unknown, or values do not fit each other.
    """

    preset: str = "S/2"
    depth: int | None = None
    forms: tuple[str, ...] = DEFAULT_FORMS
    levels: tuple[str, ...] = ("model", "sampling")
    baseline: str = "attention"
    resolutions: tuple[int, ...] = (256, 512)
    batch_sizes: tuple[int, ...] = (1,)
    downsample: int = 8
    channels: int = 4
    dtypes: tuple[str, ...] = ("fp32",)
    steps: int = 50
    cfg: float = 4.0
    decoder: str = "none"
    compile: bool = False
    rounds: int = 5
    warmup: int = 1
    device: str = "auto"

    def __post_init__(self):
        for name in ("depth", "downsample", "channels", "steps", "rounds"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.warmup < self.compile:
            raise ValueError(f"warmup must be at least 0, and at least 1 with compile, not {self.warmup}")
        if not math.isfinite(self.cfg):
            raise ValueError(f"cfg must be a finite number, not {self.cfg}")
        for name, known in (("forms", None), ("levels", LEVELS), ("resolutions", None), ("dtypes", PRECISIONS)):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be one or more different values, not {list(values)}")
            if known and (unknown := set(values) - set(known)):
                raise ValueError(f"{name} must be among {', '.join(known)}, not {', '.join(sorted(unknown))}")
        for level in self.levels:
            if self.baseline not in (forms := self.forms_of(level)):
                raise ValueError(
                    f"the baseline {self.baseline!r} is not among the forms of the level {level!r} "
                    f"({', '.join(forms) or 'none'}): give another baseline or more forms"
                )
        if len(self.batch_sizes) not in (1, len(self.resolutions)) or min(self.batch_sizes) < 1:
            raise ValueError(
                f"batch_sizes must be one number of at least 1, or one for each of the "
                f"{len(self.resolutions)} resolutions, not {list(self.batch_sizes)}"
            )
        if PRESET.format(self.preset) not in PRESETS:
            known = ", ".join(f"{size}/{patch}" for size in SIZES for patch in PATCHES)
            raise ValueError(f"there is no preset {self.preset!r}: give size and patch, one of {known}")
        if self.decoder == "sd-vae" and (self.downsample, self.channels) != (8, 4):
            raise ValueError(
                f"the SD-VAE decodes 4 channels of 1/8 the resolution, not {self.channels} of "
                f"1/{self.downsample}: give --channels 4 --downsample 8 or --decoder none"
            )
        tile = self.downsample * self.patch_size
        for resolution in self.resolutions:
            if resolution < tile or resolution % tile:
                below = max(1, resolution // tile) * tile
                raise ValueError(
                    f"resolution {resolution} is not a multiple of {tile} (downsample {self.downsample} x "
                    f"patch {self.patch_size}): give {below} or {below + tile}"
                )

    @property
    def patch_size(self) -> int:
        return preset_config(PRESET.format(self.preset))["patch_size"]

    def batch_size(self, resolution: int) -> int:
        return self.batch_sizes[self.resolutions.index(resolution) % len(self.batch_sizes)]

    def forms_of(self, level: str) -> tuple[str, ...]:
        """Returns the forms that the level times, ours before the user's."""
        forms = sorted(self.forms, key=[*FORMS, *self.forms].index)
        return tuple(form for form in forms if level in find_form(form).levels)

    def model_config(self, form: str, resolution: int) -> dict:
        """Returns the arguments of SiT's constructor for the form's model at a resolution in pixels."""
        entry = find_form(form)
        config = {**preset_config(PRESET.format(self.preset)), "mixer": entry.mixer, **entry.options}
        overrides = {"input_size": resolution // self.downsample, "in_channels": self.channels}
        return {**config, **overrides, **({} if self.depth is None else {"depth": self.depth})}
