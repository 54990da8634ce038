import diffusers
import timm
import torch

from sit_atconv.runtime.environment import describe_environment


def test_the_environment_says_where_and_with_what():
    found = describe_environment(torch.device("cpu"))
    assert found["device"] == "cpu" and found["hardware"] and found["cuda"] is None
    assert found["cpu_threads"] == torch.get_num_threads() and found["torch"] == torch.__version__
    assert (found["timm"], found["diffusers"]) == (timm.__version__, diffusers.__version__)
    assert {"python", "date", "float32_matmul_precision"} <= set(found)
