"""FID, sFID, Inception Score, KID, precision and recall from features, by torch-fidelity's functions, with errors.

Each takes features (N, D) or logits (N, K) of N samples. Errors are for the draw of the samples, the reference held
fixed: by a jackknife over `GROUPS` groups of samples, which follows the true spread where a bootstrap does not (it adds
FID's bias once more). What else is known of a metric is in metrics.py.
"""

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import kernel_poly, mmd2
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from tqdm import tqdm

from sit_atconv.evaluation.gaussians import Gaussian, Moments
from sit_atconv.evaluation.scores import Score, jackknife_error

GROUPS = 20
NEIGHBOURS = 3          # ADM's k, on the features of FID
IS_SPLIT = 5000         # ADM takes chunks of 5,000 in the order of the file; torch-fidelity as many, but equal ones
KID_SUBSET, KID_SUBSETS = 1000, 100
SEED = 2020             # torch-fidelity's, of KID's subsets
BLOCK = 1000            # images compared at a time for precision and recall: bounds memory
METHOD = {              # what a protocol says of these
    "groups": GROUPS, "neighbours": NEIGHBOURS, "is_chunks": f"ceil(N / {IS_SPLIT}) in the order of the files",
    "kid_subset": KID_SUBSET, "kid_subsets": KID_SUBSETS, "seed": SEED,
}


def jackknife_groups(num: int, labels: Sequence[int] | None = None) -> Tensor:
    """Group of each sample, (num,), of equal size: by index, or within each class where labels are balanced.

    (Labels that were drawn at random are part of the draw, and so not balanced out.)
    """
    group = torch.arange(num) % GROUPS
    if labels is None or not are_balanced(labels):
        return group
    order = torch.tensor(labels).sort(stable=True).indices
    return torch.empty_like(group).scatter_(0, order, group)


def are_balanced(labels: Sequence[int]) -> bool:
    """Whether every class that occurs does so equally often, to within one, and twice at least."""
    counts = np.unique(np.asarray(labels), return_counts=True)[1]
    return bool(counts.max() - counts.min() <= 1 and counts.min() > 1 and len(counts) > 1)


def frechet_distance(generated: Gaussian, real: Gaussian) -> float:
    """Between two Gaussians (arXiv 1706.08500, eq. 6), by torch-fidelity."""
    statistics = [{"mu": gaussian.mu, "sigma": gaussian.sigma} for gaussian in (generated, real)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def frechet(generated: Tensor, real: Gaussian, group: Tensor | None = None, progress: bool = False) -> Score:
    """Frechet distance and its error; no error below two samples a group.

    Args:
        generated: features (N, D).
        real: of the reference, as `fit_gaussian` fits it to features.
        group: of each sample, (N,), by `jackknife_groups`; None is by index.
        progress: whether to show a bar.
    """
    group = jackknife_groups(len(generated)) if group is None else group
    origin = generated[:BLOCK].double().mean(0)
    parts = [Moments.of(generated[group == g], origin) for g in range(GROUPS)]
    whole = sum(parts[1:], parts[0])
    value = frechet_distance(whole.gaussian(), real)
    if len(generated) < 2 * GROUPS:
        return Score(value)
    root = _root(real.sigma)
    bar = tqdm(parts, "error of the Frechet distance", unit="group", disable=not progress, leave=False)
    without = [_frechet_by_root((whole - part).gaussian(), real, root) for part in bar]
    return Score(value, jackknife_error(without), without)


def _root(sigma: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance."""
    values, vectors = np.linalg.eigh(sigma)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


def _frechet_by_root(generated: Gaussian, real: Gaussian, root: np.ndarray) -> float:
    """`frechet_distance` with the root of `real.sigma` at hand: three times as fast, by a symmetric problem."""
    shared = np.sqrt(np.linalg.eigvalsh(root @ generated.sigma @ root).clip(0)).sum()
    return float(((generated.mu - real.mu) ** 2).sum() + np.trace(generated.sigma) + np.trace(real.sigma) - 2 * shared)


def chunks(num: int) -> list[np.ndarray]:
    """Returns the indices of the samples in each of the equal chunks that the Inception Score is averaged over."""
    return np.array_split(np.arange(num), math.ceil(num / IS_SPLIT))


def inception_score(logits: Tensor) -> Score:
    """Over ceil(N / 5,000) equal chunks in the order of the samples: ADM's, where 5,000 divides N.

    With the error of the mean of two chunks or more.
    """
    splits = len(chunks(len(logits)))
    score = isc_features_to_metric(logits, splits, shuffle=False)
    error = score[KEY_METRIC_ISC_STD] / math.sqrt(splits - 1) if splits > 1 else None
    return Score(score[KEY_METRIC_ISC_MEAN], error)


def kid(generated: Tensor, real: Tensor, group: Tensor | None = None, progress: bool = False) -> Score:
    """Kernel distance (arXiv 1801.01401) over torch-fidelity's subsets, and its error.

    The usual "std" of KID is the spread over subsets, whose size decides it. The error here is that of the mean: each
    group of samples is left out of all subsets, from whose kernel matrices its rows are taken away. No error where a
    subset has fewer than two samples a group.
    """
    size = min(KID_SUBSET, len(generated), len(real))
    has_error = size >= 2 * GROUPS
    groups = (jackknife_groups(len(generated)) if group is None else group).numpy()
    random = np.random.RandomState(SEED)
    values, without = [], []
    for _ in tqdm(range(KID_SUBSETS), "KID", unit="subset", disable=not progress, leave=False):
        ours = random.choice(len(generated), size, replace=False)
        theirs = random.choice(len(real), size, replace=False)
        x, y = generated.numpy()[ours], real.numpy()[theirs]
        k_xx, k_xy, k_yy = kernel_poly(x, x), kernel_poly(x, y), kernel_poly(y, y)
        values.append(mmd2(k_xx, k_xy, k_yy))
        if has_error:
            without.append(_mmd2_without_groups(k_xx, k_xy, k_yy, groups[ours]))
    value = float(np.mean(values))
    if not has_error:
        return Score(value)
    means = np.mean(without, axis=0).tolist()
    return Score(value, jackknife_error(means), means)


def _mmd2_without_groups(k_xx: np.ndarray, k_xy: np.ndarray, k_yy: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The unbiased MMD^2 without each group of x, (GROUPS,)."""
    n, m = k_xy.shape
    member = np.eye(GROUPS)[group]                                      # (n, GROUPS)
    sums = member.T @ k_xx @ member                                     # of kernels within and between groups
    diagonal, cross, sizes = member.T @ np.diagonal(k_xx), member.T @ k_xy.sum(1, dtype=np.float64), member.sum(0)
    left = n - sizes
    xx = (sums.sum() - 2 * sums.sum(1) + np.diagonal(sums)) - (diagonal.sum() - diagonal)
    xy = cross.sum() - cross
    yy = k_yy.sum(dtype=np.float64) - np.trace(k_yy, dtype=np.float64)
    return xx / (left * (left - 1)) - 2 * xy / (left * m) + yy / (m * (m - 1))


def precision_recall(
    generated: Tensor, real: Tensor, device: torch.device | str = "cpu", progress: bool = False
) -> tuple[Score, Score]:
    """Returns precision, of the samples, and recall, of the reference (arXiv 1904.06991), with k = 3."""
    if progress:
        print(f"precision and recall: {len(generated)} samples and {len(real)} images", file=sys.stderr)
    found = prc_features_to_metric(generated.to(device), real.to(device), prc_neighborhood=NEIGHBOURS,
                                   prc_batch_size=BLOCK, save_cpu_ram=True, verbose=False)
    return Score(found[KEY_METRIC_PRECISION]), Score(found[KEY_METRIC_RECALL])
