"""Nemotron-H: each block is one mixer, which is Mamba-2, attention, an MLP, or experts.

Routed experts are stored as one three-dimensional parameter per projection and stay as they are.
"""

from duramen.families.table import Family, Projection, Stacked, attention, dual_mixer

FAMILY = Family(
    name="nemotron_h",
    model_types=("nemotron_h",),
    blocks="model.layers",
    stages=(
        *dual_mixer("mixer"),
        *attention("mixer"),
        (Projection("up", "mixer.up_proj"),),
        (Projection("down", "mixer.down_proj"),),
        (Projection("up", "mixer.shared_experts.up_proj"),),
        (Projection("down", "mixer.shared_experts.down_proj"),),
    ),
    stored_as=(("model.", "backbone."),),
    stacked=(
        Stacked("mixer.experts.up_proj", ("mixer.experts.{}.up_proj.weight",)),
        Stacked("mixer.experts.down_proj", ("mixer.experts.{}.down_proj.weight",)),
    ),
)
