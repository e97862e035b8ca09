"""Vim and PlainMamba as their papers and official code have them, one step after another, over whole grids with zeros where patches have left."""

import torch
from torch.nn.functional import conv1d, conv2d, silu, softplus


def rms(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def scan(x, delta, a, b, c, skip):
    """x, delta [T, E]; a [E, N]; b, c [T, N]."""
    state, rows = torch.zeros_like(a), []
    for step in range(len(x)):
        state = (delta[step][:, None] * a).exp() * state + (delta[step] * x[step])[:, None] * b[step][None]
        rows.append(state @ c[step] + skip * x[step])
    return torch.stack(rows)


def vim_direction(x, there, p, end):
    """One branch over x [T, E] in its own order; patches that are not ``there`` write nothing, and decay by the bias."""
    a_log, skip = (p["A_b_log"], p["D_b"]) if end else (p["A_log"], p["D"])
    weight, bias = p[f"conv1d{end}.weight"], p[f"conv1d{end}.bias"]
    size = weight.shape[-1]
    padded = torch.nn.functional.pad((x * there[:, None]).T[None], (size - 1, 0))
    x = silu(conv1d(padded, weight, bias, groups=len(weight))[0].T) * there[:, None]
    rank, states = p[f"dt_proj{end}.weight"].shape[1], a_log.shape[1]
    low, b, c = torch.split(x @ p[f"x_proj{end}.weight"].T, [rank, states, states], -1)
    dt_bias = p[f"dt_proj{end}.bias"]
    delta = softplus(low @ p[f"dt_proj{end}.weight"].T + dt_bias)
    delta = torch.where(there[:, None], delta, softplus(dt_bias))
    return scan(x, delta, -a_log.exp(), b, c, skip)


def vim(state, image, config, left=None):
    """Logits of one image [c, H, W]; ``left``: layer -> which places are there in and after it, bool [T]."""
    patch = config.patch_size
    x = conv2d(image[None], state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)[0].flatten(1).T
    middle = len(x) // 2
    x = torch.cat([x[:middle], state["cls_token"][0], x[middle:]]) + state["pos_embed"][0]
    there = torch.ones(len(x), dtype=torch.bool)
    for layer in range(config.num_hidden_layers):
        there = (left or {}).get(layer, there)
        p = {
            key.removeprefix(f"layers.{layer}.mixer."): value
            for key, value in state.items()
            if key.startswith(f"layers.{layer}.mixer.")
        }
        normed = rms(x, state[f"layers.{layer}.norm.weight"])
        u, z = (normed @ p["in_proj.weight"].T).chunk(2, -1)
        y = vim_direction(u, there, p, "") + vim_direction(u.flip(0), there.flip(0), p, "_b").flip(0)
        x = x + (y / 2 * silu(z)) @ p["out_proj.weight"].T
    return rms(x, state["norm_f.weight"])[middle] @ state["head.weight"].T + state["head.bias"]


def path(side, columns, back):
    """Cells in order, by walking."""
    row, column, forward, cells = 0, 0, True, []
    for line in range(side):
        for step in range(side):
            place = step if forward else side - 1 - step
            row, column = (place, line) if columns else (line, place)
            cells.append(row * side + column)
        forward = not forward
    return cells[::-1] if back else cells


def reached_by(before, cell, side):
    """0 start, 1 right, 2 left, 3 up, 4 down."""
    return 0 if before is None else {1: 1, -1: 2, -side: 3, side: 4}[cell - before]


def plainmamba(state, image, config, left=None):
    """The same of PlainMamba, without a stem of convolutions."""
    side, patch = config.side, config.patch_size
    x = (
        conv2d(image[None], state["patch_embed.projection.weight"], state["patch_embed.projection.bias"], stride=patch)[0]
        .flatten(1)
        .T
    )
    x = x + state["pos_embed"][0]
    there = torch.ones(len(x), dtype=torch.bool)
    for layer in range(config.num_hidden_layers):
        there = (left or {}).get(layer, there)
        start = f"layers.{layer}."
        p = {key.removeprefix(f"{start}mamba."): value for key, value in state.items() if key.startswith(f"{start}mamba.")}
        normed = layer_norm(x, state[f"{start}norm.weight"], state[f"{start}norm.bias"], 1e-5)
        u, z = (normed @ p["in_proj.weight"].T + p["in_proj.bias"]).chunk(2, -1)
        grid = (u * there[:, None]).T.reshape(1, -1, side, side)
        weight = p["conv2d.weight"]
        u = silu(conv2d(grid, weight, p["conv2d.bias"], padding=weight.shape[-1] // 2, groups=len(weight))[0].flatten(1).T)
        rank, states = p["dt_proj.weight"].shape[1], p["A_log"].shape[1]
        low, b, c = torch.split(u @ p["x_proj.weight"].T, [rank, states, states], -1)
        bias = p["dt_proj.bias"] * (2 if config.double_dt_bias else 1)
        delta = softplus(low @ p["dt_proj.weight"].T + bias)
        if not config.official_pairing:
            delta = torch.where(there[:, None], delta, softplus(bias))
        u, y = u * there[:, None], torch.zeros_like(u)
        for columns in (False, True):
            for back in (False, True):
                cells = path(side, columns, back)
                toward = torch.stack(
                    [
                        p["direction_Bs"][reached_by(before, cell, side)]
                        for before, cell in zip([None, *cells], cells, strict=False)
                    ]
                )
                numbers = list(range(len(cells))) if config.official_pairing else cells
                found = scan(u[cells], delta[numbers], -p["A_log"].exp(), b[numbers] + toward, c[numbers], p["D"])
                y[cells] = y[cells] + found
        x = x + (y * silu(z)) @ p["out_proj.weight"].T + p["out_proj.bias"]
    x = layer_norm(x, state["ln1.weight"], state["ln1.bias"], 1e-6)
    return x[there].mean(0) @ state["head.weight"].T + state["head.bias"]
