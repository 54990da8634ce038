"""Optimizers: any of torch or of the user by class path, and Muon with AdamW for all but matrices.

accelerate launch sit_atconv/train.py --optimizer AdamW --optimizer.betas "[0.9, 0.95]"
accelerate launch sit_atconv/train.py --optimizer sit_atconv.training.optimizers.MuonAdamW
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from sit_atconv.runtime.devices import has_fused_optimizers

FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)  # their fused kernels obey `found_inf` on any device


def parameter_groups(modules: Sequence[nn.Module], weight_decay: float) -> list[dict]:
    """Returns parameter groups with weight decay for matrices, and none for norms, biases and embeddings.

    `difference_control` is a vector and has none either.
    """
    every = [module for each in modules for module in each.modules()]
    tables = {p for module in every if isinstance(module, nn.Embedding) for p in module.parameters()}
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1 and p not in tables]
    others = [p for p in trained if p.ndim <= 1 or p in tables]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def make_optimizer(
    kind: type[torch.optim.Optimizer], modules: Sequence[nn.Module], lr: float, weight_decay: float, options: dict
) -> torch.optim.Optimizer:
    """Builds an optimizer of the trainable parameters, fused if possible; only matrices get weight decay.

    Raises:
        ValueError: the class does not accept the parameters or the options.
    """
    groups = parameter_groups(modules, weight_decay)
    is_fused = kind in FUSED and has_fused_optimizers(next(modules[0].parameters()).device)
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    options |= {"fused": True} if is_fused else {}
    construct: Callable[..., torch.optim.Optimizer] = kind  # the base class takes other arguments
    try:
        return construct(groups, lr=lr, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the optimizer {kind.__name__} cannot be created ({str(error).splitlines()[0]})") from error


def clip_and_step(
    accelerator: Accelerator,
    prepared: AcceleratedOptimizer,
    parameters: Sequence[nn.Parameter],
    max_grad_norm: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clips the gradient, updates the parameters unless it is not finite, and clears it.

    Args:
        accelerator: the accelerator, with the scaler of fp16.
        prepared: its wrapper of the optimizer.
        parameters: the parameters, in the order in which their norms are added up.
        max_grad_norm: norm to clip to; None does not clip.

    Returns:
        The gradient's norm before clipping, whether the parameters were updated, and whether training is fine; 0-d, on
        the device. In fp16 a skipped update is fine as long as the scale, which it lowers, is at least 1.
    """
    accelerator.unscale_gradients(prepared)
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if max_grad_norm:
        clip_grads_with_norm_(parameters, max_grad_norm, norm)
    updated = fine = norm.isfinite()
    if accelerator.scaler is None:
        step_where(updated, prepared.optimizer, prepared.step)
    else:
        fine = updated | (accelerator.scaler._scale >= 1)  # the public get_scale() would wait for the device
        prepared.step()
    prepared.zero_grad()
    return norm, updated, fine


def step_where(updated: Tensor, optimizer: torch.optim.Optimizer, step: Callable[[], object]) -> None:
    """Calls `step` if `updated`, a 0-d bool on the device, is True.

    A fused optimizer checks this on the device, by the attribute `found_inf` that torch's GradScaler also sets; for
    others the host waits for the device.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = (~updated).float()  # type: ignore[attr-defined]  # torch declares it nowhere
        step()
    elif updated.item():
        step()


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for the matrices of the first group, AdamW for all other parameters.

    Args:
        params: groups of parameters, as `parameter_groups` returns them.
        lr: learning rate of both; Muon's updates are scaled to the size of AdamW's (arXiv 2502.16982).
        momentum: momentum of Muon.
        betas: decays of AdamW's running moments of the gradient.

    Raises:
        ValueError: this version of torch has no Muon.
    """

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.95, betas: tuple[float, float] = (0.9, 0.95)):
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"Muon needs torch 2.9 or later, not {torch.__version__}")
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})
        first, *others = self.param_groups
        matrices = {**first, "params": [p for p in first["params"] if p.ndim == 2]}
        rest = {**first, "params": [p for p in first["params"] if p.ndim != 2]}
        self.muon = torch.optim.Muon([matrices], momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW([rest, *others], betas=betas)
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]
        self._share()

    def _share(self) -> None:
        """Makes both parts use the state and groups of this object, which is saved as one optimizer."""
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self.muon.state = self.adamw.state = self.state

    def step(self, closure=None):
        self.muon.step()
        self.adamw.step()

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()
