"""Models of images: state-space ones of our own, with which transformers' Auto classes open their folders once this is imported."""

from transformers import AutoConfig, AutoModelForImageClassification

from duramen.vision.elastic import ElasticViTConfig, ElasticViTForImageClassification
from duramen.vision.plainmamba import PlainMambaConfig, PlainMambaForImageClassification
from duramen.vision.vim import VimConfig, VimForImageClassification

for _config, _model in (
    (VimConfig, VimForImageClassification),
    (PlainMambaConfig, PlainMambaForImageClassification),
    (ElasticViTConfig, ElasticViTForImageClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForImageClassification.register(_config, _model, exist_ok=True)

__all__ = [
    "ElasticViTConfig",
    "ElasticViTForImageClassification",
    "PlainMambaConfig",
    "PlainMambaForImageClassification",
    "VimConfig",
    "VimForImageClassification",
]
