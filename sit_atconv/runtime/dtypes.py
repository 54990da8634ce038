"""Names of precisions for options; imports nothing heavy, so that `--help` can list them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # -> torch's names


def torch_dtype(name: str) -> "torch.dtype":
    """Returns the tensor dtype of a precision: "bf16" -> torch.bfloat16."""
    import torch

    return getattr(torch, DTYPES[name])
