"""The speed comparison of image classifiers: AttNet in its forms, beside timm's models.

python eval/speed.py --classifiers attnet_t2 fused:attnet_t2 published:attnet_t2 convnext_tiny --batch-size 8
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerScale
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from sit_atconv.models.atconv import ATConv
from sit_atconv.models.attnet import AttNet, Block
from sit_atconv.runtime.devices import keep_freed_memory, open_device, synchronize
from sit_atconv.runtime.dtypes import torch_dtype
from sit_atconv.runtime.environment import describe_environment
from sit_atconv.speed.agreement import BOUNDS, check
from sit_atconv.speed.timing import Rounds, time_interleaved

LEVELS = {"model": "inference", "train": "training step"}  # level of the command -> what is timed


@dataclass(frozen=True)
class Timing:
    """Figures of one classifier; `speedup` is over the first that is timed alike, round by round."""

    classifier: str
    quantity: str
    dtype: str
    batch_size: int
    parameters: int
    multiply_adds: int  # of one image in convolutions and products of matrices
    milliseconds: Rounds
    images_per_second: Rounds
    speedup: Rounds


def compare_classifiers(
    names: list[str],
    *,
    resolution: int = 224,
    batch_size: int = 8,
    dtypes: tuple[str, ...] = ("fp32",),
    levels: tuple[str, ...] = ("model", "train"),
    rounds: int = 5,
    warmup: int = 1,
    device: str = "auto",
    progress: bool = False,
) -> dict:
    """Times classifiers in interleaved rounds, as images (B, 3, H, W) -> logits (B, 1000).

    Args:
        names: models of timm, the first of which is the baseline; `fused:` before AttNet's name folds its norms and
            scales, for inference only, and `published:` computes it as published.
        resolution: side of the images in pixels.
        batch_size: images of a batch.
        dtypes: "fp32", "bf16", "fp16"; a training step keeps its weights in fp32.
        levels: "model" for inference, "train" for a training step with AdamW.
        rounds: number of rounds that count.
        warmup: number of rounds before them.
        device: as in `open_device`.
        progress: whether to draw a progress bar on stderr.

    Returns:
        The environment, the checks of AttNet's forms and the timings, as plain values.

    Raises:
        ValueError: a name is unknown, a form is not AttNet's, or a form computes other values than the model.
    """
    place = open_device(device)
    keep_freed_memory()
    errors = {name: difference(name, resolution) for name in names}
    timings = []
    with tqdm(total=len(dtypes) * len(levels) * (rounds + warmup), unit="round", disable=not progress) as bar:
        for dtype, level in product(dtypes, levels):
            bar.set_description(f"{LEVELS[level]} {dtype}")
            timed = [name for name in names if level == "model" or not name.startswith("fused:")]
            if not timed:
                continue
            models = {name: build(name, level == "train") for name in timed}
            images = torch.randn(batch_size, 3, resolution, resolution)
            runs: dict[str, Callable[[], object]] = {}
            for name, model in models.items():
                model, x = model.to(place), images.to(place)
                if level == "train":
                    runs[name] = training_step(model, x, dtype)
                else:
                    runs[name] = partial(infer, model.to(torch_dtype(dtype)), x.to(torch_dtype(dtype)))
            seconds = time_interleaved(
                runs,
                rounds=rounds,
                warmup=warmup,
                synchronize=partial(synchronize, place),
                clock=time.perf_counter,
                after_round=bar.update,
            )
            baseline = Rounds.of(seconds[timed[0]])
            for name, model in models.items():
                times = Rounds.of(seconds[name])
                timings.append(
                    Timing(
                        name,
                        LEVELS[level],
                        dtype,
                        batch_size,
                        sum(p.numel() for p in model.parameters()),
                        multiply_adds(name, resolution),
                        Rounds.of([1000 * s for s in times.rounds]),
                        Rounds.of([batch_size / s for s in times.rounds]),
                        baseline.over(times),
                    )
                )
    return {
        "resolution": resolution,
        "environment": describe_environment(place),
        "agreement": [{"classifier": name, "error": error} for name, error in errors.items() if error is not None],
        "timings": [asdict(timing) for timing in timings],
    }


def table(result: dict) -> str:
    """Returns the timings as a Markdown table, with medians and quartiles in brackets."""
    where, timings = result["environment"], result["timings"]
    errors = [check["error"] for check in result["agreement"]]
    rounds = len(timings[0]["milliseconds"]["rounds"])
    columns = ["classifier", "what", "dtype", "batch", "parameters", "GMACs", "ms", "images/s"]
    lines = [
        f"# Speed of image classifiers at {result['resolution']} px",
        "",
        f"{where['hardware']}, CPU threads: {where['cpu_threads']}, torch {where['torch']}, timm {where['timm']}, "
        f"{where['date'][:10]}; {rounds} interleaved rounds. {len(errors)} checks of AttNet's forms passed; the "
        f"largest relative error was {max(errors, default=0):.1g}.",
        "",
        f"| {' | '.join(columns)} | speedup over the first |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for t in timings:
        cells = [t["classifier"], t["quantity"], t["dtype"], f"{t['batch_size']}", f"{t['parameters'] / 1e6:.1f}M"]
        cells += [
            f"{t['multiply_adds'] / 1e9:.2f}",
            _cell(t["milliseconds"], ".4g"),
            _cell(t["images_per_second"], ".4g"),
        ]
        lines.append(f"| {' | '.join([*cells, _cell(t['speedup'], '.2f')])} |")
    return "\n".join(lines)


def _cell(rounds: dict, form: str) -> str:
    return f"{rounds['median']:{form}} ({rounds['q1']:{form}}-{rounds['q3']:{form}})"


# -------------------------------------------------------------------------------------------------------- models


def build(name: str, training: bool = False) -> nn.Module:
    """Builds a classifier with 1000 classes; weights are the same at every call.

    Raises:
        ValueError: the model or the form is unknown, or the form does not fit the model.
    """
    form, _, model_name = name.rpartition(":")
    if not timm.is_model(model_name):
        raise ValueError(f"timm has no model {model_name!r} (sit_atconv adds attnet_xxs ... attnet_t4)")
    torch.manual_seed(0)
    model = timm.create_model(model_name, num_classes=1000)
    for module in model.modules():
        if isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, 0.5)  # as trained: a branch that adds nothing could hide an error
    if not form:
        return model.train(training)
    if form not in ("fused", "published") or not isinstance(model, AttNet):
        raise ValueError(f"the forms are fused:attnet_... and published:attnet_..., not {name!r}")
    if form == "published":
        return PublishedAttNet(model).train(training)
    return model.eval().fuse()


@torch.no_grad()
def difference(name: str, resolution: int) -> float | None:
    """Returns the relative error of a form of AttNet against the model; None for a model itself.

    Raises:
        ValueError: the name is unknown, or the error is above the bound for float32.
    """
    form, _, model_name = name.rpartition(":")
    if not form:
        build(name)
        return None
    x = torch.randn(1, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
    error = check(name, [build(name).eval()(x)], [build(model_name).eval()(x)]).error
    if error is None or not error <= BOUNDS["fp32"]:
        raise ValueError(f"not timed: {name} does not compute what {model_name} does (relative error {error})")
    return error


def multiply_adds(name: str, resolution: int) -> int:
    """Counts the multiply-adds of one image in inference, without data."""
    with torch.device("meta"):
        model, x = build(name), torch.empty(1, 3, resolution, resolution)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


@torch.inference_mode()
def infer(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def training_step(model: nn.Module, x: Tensor, dtype: str) -> Callable[[], None]:
    """Returns a repeatable training step: forward under autocast, cross-entropy, backward and fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    y = torch.arange(len(x), device=x.device) % 1000

    def step() -> None:
        with torch.autocast(x.device.type, torch_dtype(dtype), enabled=dtype != "fp32"):
            loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ------------------------------------------------------------------------------------------------ published form


class PublishedAttNet(nn.Module):
    """AttNet as published, with the weights and the values of an `AttNet`: everything in NCHW."""

    def __init__(self, model: AttNet):
        super().__init__()
        self.model = model
        self.stages = nn.ModuleList(
            nn.Sequential(*(PublishedBlock(block) for block in stage.blocks))  # type: ignore[union-attr]
            for stage in model.stages
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.model.stem(x)
        for stage, blocks in zip(self.model.stages, self.stages, strict=True):
            x = blocks(stage.get_submodule("downsample")(x))
        return self.model.head(x)


class PublishedBlock(nn.Module):
    """Block as published: it projects all positions before it pools them, and 1x1 maps are convolutions."""

    def __init__(self, block: Block):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        block, mlp = self.block, self.block.channel_mixer
        x = x + scaled(mix(norm(x, block.norm_1), block.token_mixer), block.layer_scale_1)
        gate, value = convolve_1x1(norm(x, block.norm_2), mlp.fc1).chunk(2, 1)
        y = mlp.act(mlp.dwconv(gate)) * value
        if isinstance(mlp.norm_layer, nn.RMSNorm):
            y = y * torch.rsqrt(y.square().mean(1, keepdim=True) + 1e-6) * mlp.norm_layer.weight[:, None, None]
        return x + scaled(convolve_1x1(y, mlp.fc2), block.layer_scale_2)


def mix(x: Tensor, mixer: ATConv) -> Tensor:
    """Computes ATConv as published: (B, C, H, W) -> (B, C, H, W)."""
    (B, C, H, W), k = x.shape, mixer.kernel_size
    pooled = F.adaptive_avg_pool1d(convolve_1x1(x, mixer.kernel_proj).flatten(2), k * k)  # (B, C, k*k)
    K = mixer.kernel_gen(mixer.kernel_act(pooled))
    K = K - torch.sigmoid(mixer.difference_control)[:, None] * K.mean(-1, keepdim=True)
    v = convolve_1x1(x, mixer.x_proj).reshape(1, B * C, H, W)
    y = F.conv2d(v, K.reshape(B * C, 1, k, k), padding=k // 2, groups=B * C)
    return convolve_1x1(y.reshape(B, C, H, W), mixer.proj)


def convolve_1x1(x: Tensor, linear: nn.Linear) -> Tensor:
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


def norm(x: Tensor, layer_norm: nn.Module) -> Tensor:
    return layer_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def scaled(x: Tensor, layer_scale: nn.Module) -> Tensor:
    return x * layer_scale.gamma[:, None, None] if isinstance(layer_scale, LayerScale) else x
