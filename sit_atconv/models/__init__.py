"""Models: the token mixer ATConv, and SiT with ATConv, attention or other token mixers in its blocks."""

from sit_atconv.runtime.lazy import lazy_exports

# ATConv alone must not pay for importing diffusers and timm.
__getattr__, __dir__ = lazy_exports(__name__, atconv="ATConv", sit="SiT", presets="PRESETS")
