"""SiT image generators whose transformer blocks mix tokens with ATConv (Attentive Convolution) instead of attention.

The parts, each importable on its own: `ops` (the dynamic depthwise convolution), `models` (ATConv, SiT), `flow`
(interpolants and objectives), `sampling` (guidance and solvers), `data` (codecs and data sets), `checkpoints`
(runs and exported weights), `evaluation` (FID and friends). Importing this package loads none of them.
"""

__version__ = "0.1.0"
