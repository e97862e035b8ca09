"""Videos from the command line: what is written, what is reused, and what is refused."""

import json
import math

import imageio.v3 as iio
import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)  # fmt: skip
from typer.testing import CliRunner

from duramen.cli import app
from duramen.problem import Problem
from duramen.video import render as module
from duramen.video.plan import Clip, predict
from duramen.video.render import Wish, open_pipeline, render
from duramen.video.slices import Slices
from duramen.video.text import CodedLinear, quantize_text_encoder

diffusers = pytest.importorskip("diffusers")
LETTERS = [
    *"abcdefghijklmnopqrstuvwxyz",
    *(f"{each}</w>" for each in "abcdefghijklmnopqrstuvwxyz"),
    "<|startoftext|>",
    "<|endoftext|>",
]
SMALL = {"frames": 3, "steps": 4, "prompt": "a red coat"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stock AnimateDiff with random weights."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(LETTERS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, bos_token_id=52, eos_token_id=53,
    )  # fmt: skip
    unet = diffusers.UNetMotionModel(
        sample_size=8, down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"), up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"),
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16, num_attention_heads=2, motion_num_attention_heads=2,
    )  # fmt: skip
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    pipeline = diffusers.AnimateDiffPipeline(
        diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **blocks), CLIPTextModel(config).eval(),
        letters(), unet.eval(), None,
        diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1),
    )  # fmt: skip
    place = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(place)
    return place


def test_a_video_within_memory_is_the_video_without_a_limit(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("duramen.video.plan.LADDER", (None, 20_000, 2_000))
    whole = render(folder, tmp_path / "whole", Wish(**SMALL))
    told = []
    sliced = render(folder, tmp_path / "sliced", Wish(**SMALL, memory=250_000), told.append)
    assert whole["plans"] == []
    (denoiser, decoder) = sliced["plans"]
    assert denoiser["network"] == "UNetMotionModel"
    assert denoiser["peak"] <= 250_000 < denoiser["plain"]
    assert decoder["network"] == "AutoencoderKL"
    assert told[:2] == ["planning", "step 1/4"]
    one, other = (iio.imread(tmp_path / name / "video.gif").astype(int) for name in ("whole", "sliced"))
    assert one.shape[:3] == (3, 16, 16)
    assert abs(one - other).max() <= 2
    page = (tmp_path / "sliced" / "report.html").read_text()
    assert page.count("<figure>") == 3
    assert "of what they would without slices" in page
    assert {file.name for file in (tmp_path / "whole").iterdir()} == {"video.gif", "video.mp4", "video.json", "report.html"}


def letters():
    return CLIPTokenizer({piece: number for number, piece in enumerate(LETTERS)}, [], model_max_length=77)


def cogvideox():
    text = T5EncoderModel(T5Config(vocab_size=len(LETTERS), d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)).eval()
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_embed_dim=16, time_embed_dim=8, num_layers=2,
        sample_width=4, sample_height=4, sample_frames=9, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=1.0, clip_sample=False
    )  # fmt: skip
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2, latent_channels=4
    )
    return diffusers.CogVideoXPipeline(letters(), text, vae, transformer.eval(), scheduler)


def hunyuan():
    small = {"vocab_size": len(LETTERS), "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    llama = LlamaModel(LlamaConfig(**small, num_hidden_layers=3)).eval()
    clip = CLIPTextModel(CLIPTextConfig(**small, num_hidden_layers=1, bos_token_id=52, eos_token_id=53)).eval()
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1, num_single_layers=1, num_refiner_layers=1,
        text_embed_dim=16, pooled_projection_dim=16, rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2, latent_channels=4
    )
    return diffusers.HunyuanVideoPipeline(llama, letters(), transformer.eval(), vae, scheduler, clip, letters())


@pytest.mark.parametrize(
    ("make", "frames"), [(cogvideox, 8), (hunyuan, 5)]
)  # the former's decoder makes four of each of two latents
def test_transformers_beside_their_text_make_the_same_video(make, frames, tmp_path, monkeypatch):
    monkeypatch.setattr("duramen.video.plan.LADDER", (None, 2_000))
    monkeypatch.setattr("duramen.video.plan.WHOLE", ())  # the decoder is larger by far than a transformer as small as this
    monkeypatch.setattr(module, "CHOOSE", 2)
    torch.manual_seed(0)
    pipeline = make()
    pipeline.save_pretrained(tmp_path / "pipeline")
    wish = {"prompt": "a red coat", "steps": 4, "frames": 5, "height": 256, "width": 256}
    whole = render(tmp_path / "pipeline", tmp_path / "whole", Wish(**wish))
    assert whole["clip"]["apart"] == 4
    clip = Clip(**whole["clip"])
    less = (predict(pipeline.transformer, clip, None).peak + predict(pipeline.transformer, clip, Slices(2_000)).peak) // 2
    sliced = render(tmp_path / "pipeline", tmp_path / "sliced", Wish(**wish, memory=less))
    assert [each["piece"] for each in sliced["plans"]] == [2_000]
    one, other = (iio.imread(tmp_path / name / "video.gif").astype(int) for name in ("whole", "sliced"))
    assert whole["frames"] == sliced["frames"] == frames
    assert f"{frames} frames of 256x256 pixels" in (tmp_path / "sliced" / "report.html").read_text()
    assert one.shape[1:3] == (256, 256)  # a gif holds equal frames once
    assert abs(one - other).mean() < 0.5  # of 255; a gif has a palette of its own for every frame
    fewer = render(tmp_path / "pipeline", tmp_path / "fewer", Wish(**wish, full=3))
    assert fewer["denoised"] == 3
    assert all(math.isfinite(error) and error > 0 for errors in fewer["schedule"]["errors"].values() for error in errors)


def test_a_schedule_is_chosen_once_for_a_pipeline_and_its_steps(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHOOSE", 2)
    found = render(folder, tmp_path / "out", Wish(**SMALL, full=2))
    assert found["denoised"] == 2
    assert len(found["schedule"]["full"]) == 2
    assert set(found["schedule"]["errors"]) >= {"even", "threshold", "solver"}
    assert "Distance from the full run" in (tmp_path / "out" / "report.html").read_text()
    chosen = module.choose_schedule

    def refused(*_, **__):
        raise AssertionError

    monkeypatch.setattr(module, "choose_schedule", refused)
    again = render(folder, tmp_path / "out", Wish(**SMALL, full=2, seed=3))
    assert again["schedule"]["full"] == found["schedule"]["full"]
    with pytest.raises(AssertionError):
        render(folder, tmp_path / "out", Wish(**SMALL | {"steps": 5}, full=2))
    monkeypatch.setattr(module, "choose_schedule", chosen)


def test_what_goes_wrong_is_named_and_leaves_nothing_half(folder, tmp_path, monkeypatch):
    opened = module.open_pipeline

    def damaged(place):
        pipeline = opened(place)
        step = pipeline.scheduler.step

        def broken(found, timestep, latents, **options):
            given = step(found, timestep, latents, **options)
            given.prev_sample *= torch.nan if int(timestep) < 400 else 1.0
            return given

        pipeline.scheduler.step = broken
        return pipeline

    monkeypatch.setattr(module, "open_pipeline", damaged)
    with pytest.raises(Problem, match="not finite after step 3 of 4"):
        render(folder, tmp_path / "out", Wish(**SMALL))
    monkeypatch.setattr(module, "open_pipeline", opened)
    assert not list((tmp_path / "out").iterdir())
    for wish, said in (
        (Wish(**SMALL, memory=1000), "too few for the activations"),
        (Wish(**SMALL, height=33), "cannot be"),
        (Wish(**SMALL, full=1), "1 full steps of 4 cannot be"),
        (Wish(**SMALL, quality=-1), "are no quality"),
        (Wish(**SMALL, quality=float("nan")), "are no quality"),
        (Wish(**SMALL, full=2, quality=20), "do not go together"),
        (Wish(**SMALL | {"steps": 1001}), "1001 denoising steps cannot be"),
    ):
        with pytest.raises(Problem, match=said):
            render(folder, tmp_path / "out", wish)
    (tmp_path / "file").write_text("")
    with pytest.raises(Problem, match="cannot be a folder"):
        render(folder, tmp_path / "file", Wish(**SMALL))
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(Problem, match="no pipeline of diffusers"):
        render(tmp_path, tmp_path / "out", Wish())
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(Problem, match="A StableDiffusionPipeline is not known") as caught:
        render(tmp_path, tmp_path / "out", Wish())
    assert "AnimateDiffPipeline" in caught.value.fix


def test_killed_while_it_writes_it_leaves_the_last_video(folder, tmp_path, monkeypatch):
    render(folder, tmp_path / "out", Wish(**SMALL))
    before = (tmp_path / "out" / "video.gif").read_bytes()

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        render(folder, tmp_path / "out", Wish(**SMALL | {"seed": 1}))
    assert (tmp_path / "out" / "video.gif").read_bytes() == before


def test_the_command_line_says_what_happens(folder, tmp_path):
    words = [
        "video",
        str(folder),
        str(tmp_path / "out"),
        "--frames",
        "2",
        "--steps",
        "2",
        "--prompt",
        "a blue bag",
        "--memory",
        "1GiB",
    ]
    for wrong in ("1", "0GB", "nanGB", "-1MB", "1e3MB"):
        refused = CliRunner().invoke(app, [*words[:-1], wrong])
        assert isinstance(refused.exception, Problem)
        assert f"--memory {wrong}` is no size" in str(refused.exception)
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 0, ran.output
    assert "step 2/2" in ran.output
    assert json.loads((tmp_path / "out" / "video.json").read_text())["wish"]["prompt"] == "a blue bag"


def test_a_text_encoder_in_eight_bits(folder, tmp_path):
    whole = render(folder, tmp_path / "whole", Wish(**SMALL))
    found = render(folder, tmp_path / "text", Wish(**SMALL, quantize_text=True))
    assert whole["text_encoder"] is None
    told = found["text_encoder"]
    assert told["encoder"] == "CLIPTextModel"
    assert 0 < told["moved"] < 0.02
    assert "in eight bits" in (tmp_path / "text" / "report.html").read_text()
    one, other = (iio.imread(tmp_path / name / "video.gif").astype(float) for name in ("whole", "text"))
    assert abs(one - other).mean() < 3  # of 255


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("encoder", "config"), [(T5EncoderModel, T5Config), (UMT5EncoderModel, UMT5Config)])
def test_every_text_encoder_holds_its_linear_layers_in_codes(folder, encoder, config, dtype):
    torch.manual_seed(0)
    settings = config(
        vocab_size=len(LETTERS), d_model=64, d_ff=128, d_kv=16, num_heads=4, num_layers=2, feed_forward_proj="gated-gelu"
    )
    pipeline = open_pipeline(folder)
    pipeline.text_encoder = encoder(settings).to(dtype).eval()
    linears = {name: layer for name, layer in pipeline.text_encoder.named_modules() if isinstance(layer, torch.nn.Linear)}
    told = quantize_text_encoder(pipeline, "a red coat")
    assert 0 < told["moved"] < 0.02
    saved = sum(layer.weight.nbytes - layer.weight.numel() - 4 * len(layer.weight) for layer in linears.values())
    assert told["bytes"]["before"] - told["bytes"]["after"] == saved > 0
    for name, layer in linears.items():
        coded = pipeline.text_encoder.get_submodule(name)
        assert isinstance(coded, CodedLinear)
        assert coded.weight.dtype == dtype
        assert ((coded.codes * coded.steps - layer.weight).abs() <= 0.501 * coded.steps).all()


def test_a_pipeline_that_reads_no_text_has_no_encoder_to_round():
    with pytest.raises(Problem, match="has no text encoder"):
        quantize_text_encoder(type("StableVideoDiffusionPipeline", (), {})(), "a red coat")
