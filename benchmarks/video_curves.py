"""Claim: in slices of one size, what a denoiser holds grows with the latent alone, far slower than what it holds as it is, over frames and over pixels.

    python benchmarks/video_curves.py

Counts the activations of one denoising step, in half precision and without data, at several numbers of frames of one size and several sizes of one number of frames. Writes
benchmarks/results/video_curves.csv and docs/images/video_curves.svg. About ten minutes of one core.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import rows
from duramen.video.plan import predict
from duramen.video.slices import Slices
from video_memory import MIB, animatediff, svd, wan

NETWORKS = {"SVD": svd, "AnimateDiff": animatediff, "Wan-1.3B": wan}
SUBJECTS = {"as it is": None, "streamlined, 64 MiB": Slices(64 * MIB), "streamlined, 16 MiB": Slices(16 * MIB)}
FRAMES = {"SVD": (7, 14, 21, 28), "AnimateDiff": (8, 16, 24, 32), "Wan-1.3B": (17, 49, 81, 113)}
SIZES = {
    "SVD": ((320, 576), (448, 768), (576, 1024), (704, 1280)), "AnimateDiff": ((320, 576), (448, 768), (576, 1024), (704, 1280)),
    "Wan-1.3B": ((320, 576), (480, 832), (576, 1024), (720, 1280)),
}  # fmt: skip
METRICS = {"frames": "peak of activations by frames", "pixels": "peak of activations by pixels"}


def main() -> None:
    """Counts what is missing, and draws."""
    table = rows.read("video_curves")
    for name, make in NETWORKS.items():
        network, usual, _, _ = make()
        clips = [("frames", frames, replace(usual, frames=frames)) for frames in FRAMES[name]]
        clips += [("pixels", height * width, replace(usual, height=height, width=width)) for height, width in SIZES[name]]
        for along, number, clip in clips:
            case = f"{name}, {clip.frames} frames of {clip.width}x{clip.height}, {number} {along}"
            for subject, slices in SUBJECTS.items():
                if any((row["case"], row["subject"]) == (case, subject) for row in table):
                    continue
                peak = predict(network, clip, slices).peak / 2**30
                beside = rows.beside(rows.peer_of(table, case, METRICS[along], "as it is"))
                table.append(rows.row(case, METRICS[along], "GiB", subject, peak, **beside))
                rows.write("video_curves", table)
                print(case, subject, round(peak, 3), flush=True)
    draw(table)


def draw(table: list[dict[str, object]]) -> None:
    """A panel for each network and axis."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "duramen"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(NETWORKS), figsize=(9, 5), layout="constrained")
    for line, (along, metric) in zip(panels, METRICS.items(), strict=True):
        for axis, name in zip(line, NETWORKS, strict=True):
            for subject in SUBJECTS:
                mine = [
                    row
                    for row in table
                    if (row["metric"], row["subject"]) == (metric, subject) and str(row["case"]).startswith(name)
                ]
                at = [float(str(row["case"]).split()[-2]) / (1 if along == "frames" else 1e6) for row in mine]
                axis.plot(at, [float(str(row["value"])) for row in mine], "o-", label=subject)
            axis.set(
                title=name, xlabel=along if along == "frames" else "million pixels a frame", ylim=(0, None), xlim=(0, None)
            )
        line[0].set_ylabel("GiB at the peak")
    panels[0][0].legend(frameon=False, fontsize="small")
    figure.savefig(Path(__file__).parents[1] / "docs" / "images" / "video_curves.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
