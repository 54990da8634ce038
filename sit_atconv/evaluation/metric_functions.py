"""FID, sFID, Inception Score, KID, precision and recall from features, by torch-fidelity, with errors.

Density, coverage and CMMD, which torch-fidelity lacks, are computed here. Each function takes features (N, D) or logits
(N, K) of N samples. Errors are standard errors for drawing other samples, with a fixed reference, by a jackknife over
`GROUPS` groups of samples. It follows the true spread; a bootstrap does not, since it adds FID's bias once more. The
table of metrics is in metrics.py.
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
NEIGHBOURS = 3  # ADM's k
IS_SPLIT = 5000  # ADM's chunks, in the order of the file; torch-fidelity takes equally many of equal size
KID_SUBSET, KID_SUBSETS = 1000, 100
SEED = 2020  # torch-fidelity's seed of KID's subsets
DENSITY_NEIGHBOURS = 5  # k of density and coverage, as in their paper
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
BLOCK = 1000  # images compared at a time for precision and recall: bounds memory
METHOD = {  # these constants in a protocol
    "groups": GROUPS,
    "neighbours": NEIGHBOURS,
    "is_chunks": f"ceil(N / {IS_SPLIT}) in the order of the files",
    "kid_subset": KID_SUBSET,
    "kid_subsets": KID_SUBSETS,
    "seed": SEED,
}


def jackknife_groups(num: int, labels: Sequence[int] | None = None) -> Tensor:
    """Returns the group of each sample (num,): by index, or within each class if labels are balanced.

    Labels drawn at random are part of the draw, so groups are not balanced by them.
    """
    group = torch.arange(num) % GROUPS
    if labels is None or not are_balanced(labels):
        return group
    order = torch.tensor(labels).sort(stable=True).indices
    return torch.empty_like(group).scatter_(0, order, group)


def are_balanced(labels: Sequence[int]) -> bool:
    """True if all classes that occur are equally frequent, to within one, and occur at least twice."""
    counts = np.unique(np.asarray(labels), return_counts=True)[1]
    return bool(counts.max() - counts.min() <= 1 and counts.min() > 1 and len(counts) > 1)


def frechet_distance(generated: Gaussian, real: Gaussian) -> float:
    """Returns the Frechet distance of two Gaussians (arXiv 1706.08500, eq. 6), by torch-fidelity."""
    statistics = [{"mu": gaussian.mu, "sigma": gaussian.sigma} for gaussian in (generated, real)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def frechet(generated: Tensor, real: Gaussian, group: Tensor | None = None, progress: bool = False) -> Score:
    """Returns the Frechet distance and its error, or no error for fewer than two samples per group.

    Args:
        generated: features (N, D).
        real: Gaussian of the reference, as by `fit_gaussian`.
        group: group of each sample (N,), as by `jackknife_groups`; None groups by index.
        progress: True shows a progress bar.
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
    """Returns the symmetric square root of a covariance."""
    values, vectors = np.linalg.eigh(sigma)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


def _frechet_by_root(generated: Gaussian, real: Gaussian, root: np.ndarray) -> float:
    """Returns `frechet_distance`, three times as fast: `root` of `real.sigma` makes the problem symmetric."""
    shared = np.sqrt(np.linalg.eigvalsh(root @ generated.sigma @ root).clip(0)).sum()
    return float(((generated.mu - real.mu) ** 2).sum() + np.trace(generated.sigma) + np.trace(real.sigma) - 2 * shared)


def chunks(num: int) -> list[np.ndarray]:
    """Returns the sample indices of each of the equal chunks that the Inception Score is averaged over."""
    return np.array_split(np.arange(num), math.ceil(num / IS_SPLIT))


def inception_score(logits: Tensor) -> Score:
    """Returns the mean over ceil(N / 5,000) equal chunks in the order of the samples, and its error.

    These are ADM's chunks if 5,000 divides N. A single chunk has no error.
    """
    splits = len(chunks(len(logits)))
    score = isc_features_to_metric(logits, splits, shuffle=False)
    error = score[KEY_METRIC_ISC_STD] / math.sqrt(splits - 1) if splits > 1 else None
    return Score(score[KEY_METRIC_ISC_MEAN], error)


def kid(generated: Tensor, real: Tensor, group: Tensor | None = None, progress: bool = False) -> Score:
    """Returns the kernel distance (arXiv 1801.01401) over torch-fidelity's subsets, and its error.

    The usual "std" of KID is the spread over subsets, which depends on their size. The error here is the standard error
    of the mean: the jackknife removes the rows of each group from the kernel matrices of all subsets. There is no error
    if a subset has fewer than two samples per group.
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
    """Returns the unbiased MMD^2 without each group of x, (GROUPS,)."""
    n, m = k_xy.shape
    member = np.eye(GROUPS)[group]  # (n, GROUPS)
    sums = member.T @ k_xx @ member  # kernels within and between groups
    diagonal, cross, sizes = member.T @ np.diagonal(k_xx), member.T @ k_xy.sum(1, dtype=np.float64), member.sum(0)
    left = n - sizes
    xx = (sums.sum() - 2 * sums.sum(1) + np.diagonal(sums)) - (diagonal.sum() - diagonal)
    xy = cross.sum() - cross
    yy = k_yy.sum(dtype=np.float64) - np.trace(k_yy, dtype=np.float64)
    return xx / (left * (left - 1)) - 2 * xy / (left * m) + yy / (m * (m - 1))


def precision_recall(
    generated: Tensor, real: Tensor, device: torch.device | str = "cpu", progress: bool = False
) -> tuple[Score, Score]:
    """Returns precision of the samples and recall of the reference (arXiv 1904.06991), with k = 3."""
    if progress:
        print(f"precision and recall of {len(generated)} samples, {len(real)} reference images", file=sys.stderr)
    found = prc_features_to_metric(
        generated.to(device),
        real.to(device),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=BLOCK,
        save_cpu_ram=True,
        verbose=False,
    )
    return Score(found[KEY_METRIC_PRECISION]), Score(found[KEY_METRIC_RECALL])


def cmmd(
    generated: Tensor,
    real: Tensor,
    group: Tensor | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Score:
    """Returns CMMD (arXiv 2401.09603) and its error.

    It is 1,000 times the squared MMD of CLIP embeddings of unit length. The kernel is Gaussian with sigma 10, the
    estimator the biased one, as the authors' code has them. There is no error for fewer than two samples per group.
    """
    group = jackknife_groups(len(generated)) if group is None else group
    x, y = (features.double() / features.double().norm(dim=1, keepdim=True) for features in (generated, real))
    x, y, member = x.to(device), y.to(device), torch.eye(GROUPS, dtype=torch.float64, device=device)[group.to(device)]
    within, cross = torch.zeros(GROUPS, GROUPS, device=device).double(), torch.zeros(GROUPS, device=device).double()
    blocks = zip(x.split(BLOCK), member.split(BLOCK), strict=True)
    for part, of in tqdm(blocks, "CMMD", unit="block", total=-(-len(x) // BLOCK), disable=not progress, leave=False):
        within += of.T @ _gaussian_kernel(part, x) @ member
        cross += of.T @ _gaussian_kernel(part, y).sum(1)
    between = sum(_gaussian_kernel(part, y).sum() for part in y.split(BLOCK)) / len(y) ** 2

    def distance(own: Tensor, with_real: Tensor, num: Tensor) -> Tensor:
        return CMMD_SCALE * (own / num**2 - 2 * with_real / (num * len(y)) + between)

    value = distance(within.sum(), cross.sum(), member.sum()).item()
    if len(generated) < 2 * GROUPS:
        return Score(value)
    left = within.sum() - 2 * within.sum(1) + within.diagonal()
    without = distance(left, cross.sum() - cross, len(x) - member.sum(0)).tolist()
    return Score(value, jackknife_error(without), without)


def _gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Returns exp(-d^2 / (2 sigma^2)) of vectors of unit length, (N, M)."""
    return torch.exp((x @ y.T - 1) / CMMD_SIGMA**2)


def density_coverage(
    generated: Tensor,
    real: Tensor,
    group: Tensor | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[Score, Score]:
    """Returns density of the samples and coverage of the reference (arXiv 2002.09797), with k = 5.

    The ball of a reference image reaches to its k-th nearest neighbour among the others. Density is the number of balls
    that hold a sample, divided by k, on average; coverage is the share of balls that hold any sample. Density has an
    error, unless there are fewer than two samples per group; coverage has none, since the jackknife overestimates it.
    """
    group = jackknife_groups(len(generated)) if group is None else group
    real, k = real.to(device), DENSITY_NEIGHBOURS
    nearest = [torch.cdist(part, real).kthvalue(k + 1, dim=1).values for part in real.split(BLOCK)]  # itself is one
    radius, counts, covered = (
        torch.cat(nearest),
        list[Tensor](),
        torch.zeros(len(real), dtype=torch.bool, device=device),
    )
    blocks = generated.split(BLOCK)
    for part in tqdm(blocks, "density and coverage", unit="block", disable=not progress, leave=False):
        inside = torch.cdist(part.to(device), real) < radius  # (b, M)
        counts.append(inside.sum(1).cpu())
        covered |= inside.any(0)
    count = torch.cat(counts).double() / k  # (N,)
    density, coverage = count.mean().item(), Score(covered.double().mean().item())
    if len(generated) < 2 * GROUPS:
        return Score(density), coverage
    without = [count[group != g].mean().item() for g in range(GROUPS)]
    return Score(density, jackknife_error(without), without), coverage
