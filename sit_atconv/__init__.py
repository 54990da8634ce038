"""SiT image generators with ATConv (Attentive Convolution) in place of attention.

Packages, each importable alone: `ops` (the dynamic depthwise convolution), `models` (ATConv, SiT), `flow` (interpolants
and objectives), `sampling` (guidance and solvers), `data` (codecs and data sets), `checkpoints` (runs and exported
weights), `evaluation` (FID and other metrics). Importing `sit_atconv` loads none of them.
"""

__version__ = "0.1.0"
