"""Slow references: every row on its own, dense solves, exhaustive search. Written from the formulas, not from the package."""

from itertools import combinations

import torch


def damped(gram, damping):
    """H = G + λ·Id with λ a share of the mean diagonal."""
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def loss(delta, hessian):
    """Σ δHδᵀ over rows."""
    return float(((delta @ hessian) * delta).sum())


def primal(weight, hessian, pruned):
    """ŵ_S = w_S + w_P H_PS (H_SS)⁻¹, row by row."""
    out = torch.zeros_like(weight)
    for row in range(len(weight)):
        kept, gone = ~pruned[row], pruned[row]
        if kept.any():
            cross = weight[row, gone] @ hessian[gone][:, kept]
            out[row, kept] = weight[row, kept] + torch.linalg.solve(hessian[kept][:, kept], cross)
    return out


def dual(weight, hessian, pruned):
    """δ = −w_P (K_PP)⁻¹ K_P,: with K = H⁻¹, row by row."""
    inverse, out = torch.linalg.inv(hessian), weight.clone()
    for row in range(len(weight)):
        gone = pruned[row]
        if gone.any():
            force = torch.linalg.solve(inverse[gone][:, gone], weight[row, gone])
            out[row] -= force @ inverse[gone]
            out[row, gone] = 0
    return out


def least_squares(weight, inputs, pruned):
    """min ‖ŵX − wX‖ over the kept columns, undamped, row by row; inputs [I, tokens]."""
    out = torch.zeros_like(weight)
    for row in range(len(weight)):
        kept = ~pruned[row]
        out[row, kept] = torch.linalg.lstsq(inputs[kept].T, inputs.T @ weight[row]).solution
    return out


def sparsegpt_columns(weight, hessian, pruned):
    """SparseGPT's compensation of a given mask, one column at a time, re-inverting the trailing Hessian each time."""
    work = weight.clone()
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:])
        gone = pruned[:, column]
        force = work[:, column].where(gone, torch.zeros_like(work[:, column])) / inverse[0, 0]
        work[:, column:] -= force[:, None] * inverse[0]
        work[gone, column] = 0
    return work


def sparsegpt(weight, hessian, kept, group):
    """Algorithm 1 for N:M, re-inverting the trailing Hessian at every column."""
    work, pruned = weight.clone(), torch.zeros(weight.shape, dtype=torch.bool)
    inputs = weight.shape[1]
    for column in range(inputs):
        if column % group == 0:
            diagonals = torch.stack([torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(column, column + group)])
            scores = work[:, column : column + group].square() / diagonals
            order = scores.argsort(dim=1, stable=True)[:, : group - kept]
            pruned[:, column : column + group] = pruned[:, column : column + group].scatter(1, order, True)
        inverse = torch.linalg.inv(hessian[column:, column:])
        force = work[:, column].masked_fill(~pruned[:, column], 0) / inverse[0, 0]
        work[:, column:] -= force[:, None] * inverse[0]
        work[pruned[:, column], column] = 0
    return work, pruned


def all_masks(inputs, count):
    """Every mask with ``count`` removed of ``inputs``, bool [masks, inputs]."""
    sets = torch.tensor(list(combinations(range(inputs), count)))
    return torch.zeros(len(sets), inputs, dtype=torch.bool).scatter_(1, sets, True)


def pattern_masks(inputs, kept, group):
    """Every N:M mask of a row, bool [masks, inputs]."""
    one = all_masks(group, group - kept)
    masks = one
    for _ in range(inputs // group - 1):
        masks = torch.cat([torch.cat([masks, piece.expand(len(masks), -1)], dim=1) for piece in one])
    return masks


def best_mask(row, hessian, masks):
    """The mask with the least exact loss for one row, and that loss, by solving for each."""
    losses = torch.stack([mask_loss(row, hessian, mask) for mask in masks])
    return masks[losses.argmin()], float(losses.min())


def mask_loss(row, hessian, mask):
    """δHδᵀ of the exact solution for one row and mask."""
    delta = primal(row[None], hessian, mask[None])[0] - row
    return delta @ hessian @ delta
