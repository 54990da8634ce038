import subprocess

import torch

from sit_atconv.runtime.dtypes import DTYPES, torch_dtype
from tests.conftest import python


def test_names_are_torchs_dtypes_and_cost_no_import():
    assert [torch_dtype(name) for name in DTYPES] == [torch.float32, torch.float32, torch.bfloat16, torch.float16]
    code = "import sys, sit_atconv.runtime.dtypes; print('torch' in sys.modules)"
    assert subprocess.run(python("-c", code), capture_output=True, text=True).stdout == "False\n"
