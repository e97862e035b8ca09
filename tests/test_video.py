"""Streamlined video diffusion: whole UNets and decoders against themselves, norms against the library's, memory against closed forms."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duramen.problem import Problem
from duramen.video.group_norm import Moments, affine, moments, normalised
from duramen.video.ledger import Ledger, counted, peak_of, release
from duramen.video.plan import LADDER, Clip, plan, predict, streamline_within
from duramen.video.slices import Joined, Slices, piecewise, ranges
from duramen.video.streamline import MARK, Streamlined, streamline

diffusers = pytest.importorskip("diffusers")
DOUBLE = torch.float64
BLOCKS = {"block_out_channels": (32, 64), "layers_per_block": 2, "sample_size": 16}


def shaken(network):
    """Random everywhere, zero-initialised layers and blends included, which would hide what happens over time."""
    draw = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        values = torch.randn(parameter.shape, generator=draw)
        size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.data.copy_(values * size + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
        if "mix_factor" in name:
            parameter.data.fill_(0.3)
    return network.eval().to(DOUBLE)


def svd():
    types = {
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    }
    network = diffusers.UNetSpatioTemporalConditionModel(
        **BLOCKS, **types, cross_attention_dim=16, num_attention_heads=(2, 4), in_channels=8, addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24, transformer_layers_per_block=(2, 1),
    )  # fmt: skip
    x, looked, numbers = torch.randn(2, 5, 8, 10, 14), torch.randn(2, 1, 16), torch.randn(2, 3)
    given = [each.to(DOUBLE) for each in (x, torch.tensor(3.0), looked, numbers)]
    return shaken(network), lambda network, *given: network(*given).sample, given


def animatediff():
    types = {
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
    }
    network = diffusers.UNetMotionModel(
        **BLOCKS, **types, cross_attention_dim=16, num_attention_heads=2, motion_num_attention_heads=2, motion_max_seq_length=32
    )
    looked = torch.randn(2, 7, 16).repeat_interleave(5, 0)
    given = [each.to(DOUBLE) for each in (torch.randn(2, 4, 5, 10, 14), torch.tensor(3.0), looked)]
    return shaken(network), lambda network, *given: network(*given).sample, given


def decoder():
    network = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), latent_channels=4, layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2
    )
    return shaken(network), lambda network, z: network.decode(z, num_frames=5).sample, [torch.randn(10, 4, 6, 7, dtype=DOUBLE)]


def images():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return shaken(diffusers.AutoencoderKL(block_out_channels=(32, 64), **blocks))


def wan():
    network = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=8, ffn_dim=48, num_layers=3,
        cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    given = [torch.randn(2, 4, 3, 8, 10, dtype=DOUBLE), torch.tensor([3, 7]), torch.randn(2, 9, 16, dtype=DOUBLE)]
    return shaken(network), lambda network, *given: network(*given).sample, given


def ltx(per_token=False):
    network = diffusers.LTXVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=24,
        num_layers=3,
        caption_channels=16,
    )
    mask = torch.ones(2, 9, dtype=DOUBLE)
    mask[1, 5:] = 0
    time = torch.tensor([3.0, 7.0], dtype=DOUBLE) if not per_token else torch.arange(2 * 60, dtype=DOUBLE).view(2, 60)
    given = [torch.randn(2, 60, 4, dtype=DOUBLE), torch.randn(2, 9, 16, dtype=DOUBLE), time, mask]
    return shaken(network), lambda network, *given: network(*given, 3, 4, 5).sample, given


def cogvideox(rotary=True):
    network = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_embed_dim=16, time_embed_dim=8, num_layers=3,
        sample_width=10, sample_height=8, sample_frames=9, max_text_seq_length=9, use_rotary_positional_embeddings=rotary,
    )  # fmt: skip
    given = [torch.randn(2, 3, 4, 8, 10, dtype=DOUBLE), torch.randn(2, 9, 16, dtype=DOUBLE), torch.tensor([3, 7])]
    angles = torch.randn(60, 16)
    turns = (angles.cos(), angles.sin()) if rotary else None
    return shaken(network), lambda network, *given: network(*given, image_rotary_emb=turns).sample, given


def hunyuan(first_frame=False):
    network = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, num_single_layers=2, num_refiner_layers=1,
        text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 4, 4), guidance_embeds=False,
        image_condition_type="token_replace" if first_frame else None,
    )  # fmt: skip
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    given = [
        torch.randn(2, 4, 3, 8, 10, dtype=DOUBLE),
        torch.tensor([3, 7]),
        torch.randn(2, 9, 16, dtype=DOUBLE),
        mask,
        torch.randn(2, 8, dtype=DOUBLE),
    ]
    return shaken(network), lambda network, *given: network(*given).sample, given


TRANSFORMERS = {
    "wan": wan, "ltx": ltx, "ltx, times of tokens": partial(ltx, per_token=True), "cogvideox": cogvideox,
    "cogvideox, no rotation": partial(cogvideox, rotary=False), "hunyuan": hunyuan, "hunyuan, a first frame": partial(hunyuan, first_frame=True),
}  # fmt: skip
KINDS = {"svd": svd, "animatediff": animatediff, "decoder": decoder}


def apart(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_slices_change_nothing_but_memory(kind):
    network, run, given = KINDS[kind]()
    expected, whole = run(network, *given), peak_of(lambda: run(network, *given))
    peaks, apart_of = [], []
    for piece, donate in ((2**40, True), (40000, True), (4000, False), (4000, True)):
        handle = streamline(network, piece=piece, donate=donate)
        peaks.append(peak_of(lambda: apart_of.append(apart(run(network, *given), expected))))
        handle.remove()
    assert max(apart_of) < 1e-12
    assert torch.equal(run(network, *given), expected)
    assert not any("forward" in module.__dict__ for module in network.modules())
    assert peaks[-1] <= peaks[-2] <= whole
    assert peaks[-1] < 0.5 * whole
    single = copy.deepcopy(network).float()
    narrow = [each.float() for each in given]
    handle = streamline(single, piece=20000)
    assert apart(run(single, *narrow).to(DOUBLE), expected) < 2e-5
    handle.remove()


@torch.no_grad()
def test_a_norm_of_each_slice_alone_is_another_function(monkeypatch):
    network, run, given = svd()
    expected = run(network, *given)
    monkeypatch.setattr("duramen.video.unet._moments", lambda whole, norm, slices: moments(whole[..., :3, :], norm.num_groups))
    handle = streamline(network, piece=100000)
    assert apart(run(network, *given), expected) > 1e-3
    handle.remove()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 1000))
def test_moments_merge_to_those_of_the_whole(batch, frames, heights, seed):
    draw = torch.Generator().manual_seed(seed)
    x = 1e3 + torch.randn(batch, frames, 8, sum(heights), 3, generator=draw, dtype=DOUBLE)
    norm = torch.nn.GroupNorm(4, 8, eps=1e-5).to(DOUBLE)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    merged = None
    for part in x.split(heights, 3):
        found = moments(part, 4)
        merged = found if merged is None else merged.merged(found)
    mine = normalised(x, *affine(merged, norm))
    theirs = norm(x.transpose(1, 2)).transpose(1, 2)
    assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9)
    naive = (
        x.view(batch, frames, 4, 2, -1, 3).square().mean((1, 3, 4, 5))
        - x.view(batch, frames, 4, 2, -1, 3).mean((1, 3, 4, 5)).square()
    )
    assert naive.shape == merged.mean.shape


def test_half_precision_does_not_overflow():
    x = (300 * torch.randn(1, 2, 4, 8, 8)).half()
    assert not torch.isfinite(torch.var(x, correction=0)) or x.var() > 0
    norm = torch.nn.GroupNorm(2, 4)
    found = normalised(x, *affine(moments(x, 2), norm))
    assert torch.isfinite(found).all()
    assert found.dtype == torch.float16
    assert abs(float(found.detach().float().std()) - 1) < 0.05


@torch.no_grad()
def test_memory_follows_the_closed_forms():
    first, second = torch.nn.Conv2d(4, 16, 1), torch.nn.Conv2d(16, 4, 1)
    x = torch.randn(16, 4, 8, 8)
    unit = x.numel() * 4

    def grouped(slices):
        return piecewise(lambda chosen: second(torch.nn.functional.silu(first(x[chosen]))), len(x), unit, slices)

    for count in (2, 4, 8, 16):
        assert peak_of(lambda count=count: grouped(Slices(unit // count))) == unit * (1 + 8 / count)
    assert peak_of(lambda: grouped(Slices())) == 8 * unit
    assert torch.allclose(grouped(Slices(unit // 5)), second(torch.nn.functional.silu(first(x))), atol=1e-6)


@torch.no_grad()
def test_the_ledger_counts_every_byte_once():
    x = torch.zeros(1000)
    with counted() as ledger:
        y = x + 1
        view = y.view(10, 100)
        view.add_(1)
        z = y.double()
        del y, view
        w = torch.zeros(10)
        release(z)
    assert ledger.peak == 4000 + 8000
    assert ledger.curve[-1] == 8000 + 40
    assert ledger.at_peak[0] == ("_to_copy in the pipeline", 8000)
    assert len(w) == 10
    layer = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
    with counted(layer) as ledger:
        layer(torch.zeros(2, 4))
    assert any(name.endswith("in 0") for name, _ in ledger.at_peak)
    assert not layer._forward_hooks


@torch.no_grad()
def test_what_is_released_is_not_read_again():
    network, run, given = animatediff()
    handle = streamline(network, piece=30000)
    kept = [each.clone() for each in given]
    found = run(network, *given)
    assert torch.isfinite(found).all()
    assert all(torch.equal(one, other) for one, other in zip(given, kept, strict=True))
    handle.remove()
    mine = torch.randn(4, 2, 3, 3)
    Joined((mine[:2],)).given_back(Slices())
    assert mine.untyped_storage().nbytes() > 0


def test_ranges_cover_everything_once():
    for length in (1, 5, 16):
        for count in (1, 3, 20):
            found = [index for each in ranges(length, count) for index in range(length)[each]]
            assert found == list(range(length))


def test_what_is_not_known_runs_its_own_way_or_is_refused():
    network, run, given = animatediff()
    with torch.no_grad():
        expected = run(network, *given)
    handle = streamline(network)
    with pytest.raises(Problem, match="streamlined already"):
        streamline(network)
    assert torch.equal(run(network, *given).detach(), expected)
    with torch.no_grad():
        network.enable_freeu(0.9, 0.2, 1.2, 1.4)
        freed = run(network, *given)
        handle.remove()
        assert apart(freed, run(network, *given)) < 1e-12
    assert MARK not in network.__dict__
    with pytest.raises(Problem, match="nothing to streamline"):
        streamline(torch.nn.Linear(2, 2))


@torch.no_grad()
def test_a_decoder_of_images_takes_them_one_by_one_until_the_way_back():
    pipeline = SimpleNamespace(components={"unet": animatediff()[0], "vae": images(), "scheduler": object()})
    decoder, latents = pipeline.components["vae"], torch.randn(3, 4, 6, 7, dtype=DOUBLE)
    expected, whole = decoder.decode(latents).sample, peak_of(lambda: decoder.decode(latents))
    handle = streamline(pipeline)
    assert peak_of(lambda: decoder.decode(latents)) < 0.5 * whole
    assert torch.allclose(decoder.decode(latents).sample, expected, rtol=1e-12, atol=1e-12)
    handle.remove()
    assert not decoder.use_slicing
    assert predict(decoder, Clip(48, 56, 3), Slices(1)).peak == peak_of(
        lambda: [decoder.enable_slicing(), decoder.decode(latents)]
    )


def test_equal_parts_of_one_feature():
    one = Moments(2, torch.zeros(1, 1), torch.ones(1, 1))
    both = one.merged(one)
    assert (both.count, float(both.mean), float(both.apart)) == (4, 0.0, 2.0)


@pytest.mark.parametrize(
    ("kind", "slices"), [("svd", None), ("animatediff", None), ("animatediff", Slices(100000)), ("decoder", Slices(50000))]
)
def test_a_prediction_is_what_a_run_takes(kind, slices):
    network, run, given = KINDS[kind]()
    clip = Clip(48, 56, 10) if kind == "decoder" else Clip(80, 112, 5)
    if kind == "animatediff":
        given[2] = torch.randn(10, 77, 16, dtype=DOUBLE)
    frames = {"num_frames": 10} if kind == "decoder" else {}
    handle = None if slices is None else Streamlined([network], slices)
    measured = peak_of(lambda: network.decode(*given, **frames) if frames else run(network, *given))
    if handle:
        handle.remove()
    assert predict(network, clip, slices).peak == measured


@pytest.mark.parametrize("slices", [None, Slices(4000)], ids=["whole", "sliced"])
@pytest.mark.parametrize("kind", ["cogvideox", "cogvideox, no rotation", "hunyuan"])
@torch.no_grad()
def test_a_prediction_of_a_transformer_is_what_a_run_takes(kind, slices):
    network, run, given = TRANSFORMERS[kind]()
    if kind == "hunyuan":
        given[2:4] = torch.randn(2, 256, 16, dtype=DOUBLE), torch.ones(2, 256, dtype=torch.long)
    handle = None if slices is None else Streamlined([network], slices)
    measured = peak_of(lambda: run(network, *given))
    if handle:
        handle.remove()
    assert predict(network, Clip(64, 80, 9), slices).peak == measured


def test_a_video_has_as_many_latents_in_time_as_its_autoencoder_makes():
    network, _, _ = wan()
    usual = predict(network, Clip(64, 80, 17, guided=False), None).peak
    assert usual == predict(network, Clip(64, 80, 17, guided=False, apart=4), None).peak
    assert usual == predict(network, Clip(64, 80, 9, guided=False, apart=2), None).peak
    assert usual < predict(network, Clip(64, 80, 17, guided=False, apart=2), None).peak


def test_a_plan_takes_the_largest_slices_that_fit(monkeypatch):
    network, _, _ = svd()
    clip = Clip(80, 112, 5)

    def pretended(network, clip, slices):
        return Ledger(2**40 if slices is None or slices.piece is None else slices.piece * 1000, [("conv in up", 2**20)])

    monkeypatch.setattr("duramen.video.plan.predict", pretended)
    for piece in LADDER:
        found = plan(network, clip, 2**40 if piece is None else piece * 1000)
        assert found.slices.piece == piece
        assert found.peak == (2**40 if piece is None else piece * 1000)
        assert found.plain == 2**40
    with pytest.raises(Problem, match="too few for the activations") as caught:
        plan(network, clip, 100)
    assert "conv in up 1 MiB" in caught.value.why
    handle, (mine,) = streamline_within(network, clip, 2**23 * 1000)
    assert mine.slices == Slices(2**23)
    handle.remove()
    monkeypatch.undo()
    with pytest.raises(Problem, match="nothing to streamline"):
        streamline_within(torch.nn.Linear(2, 2), clip, 1000)


def wan_with_times_of_tokens():
    network, run, given = wan()
    return network, run, [given[0], torch.arange(2 * 60).view(2, 60), given[2]]


@pytest.mark.parametrize("kind", [*TRANSFORMERS, "wan, times of tokens"])
@torch.no_grad()
def test_transformers_give_the_same_in_two_phases(kind):
    network, run, given = (TRANSFORMERS | {"wan, times of tokens": wan_with_times_of_tokens})[kind]()
    narrow = [each.float() if each.is_floating_point() else each for each in given]
    for mine, inputs in ((network, given), (copy.deepcopy(network).float(), narrow)):
        expected, whole = run(mine, *inputs), peak_of(lambda mine=mine, inputs=inputs: run(mine, *inputs))
        for slices in (1, 3, 8, 100):
            tokens = 2 * 60 * 24 * inputs[0].element_size()
            handle = streamline(mine, piece=2**30 if slices == 1 else -(-tokens // slices))
            assert torch.allclose(
                run(mine, *inputs), expected, rtol=0, atol=0 if slices == 1 else 1e-5 if expected.dtype != DOUBLE else 1e-13
            )
            peak = peak_of(lambda mine=mine, inputs=inputs: run(mine, *inputs))
            handle.remove()
            if slices >= 8 and kind != "ltx, times of tokens":  # there the embedding of time is the peak
                assert peak < 0.7 * whole
        assert torch.equal(run(mine, *inputs), expected)
