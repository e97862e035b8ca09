"""PEFT's format: PEFT loads what is written with equal output, and what PEFT writes is read with equal changes."""

import json

import pytest
import torch

import tiny
from duramen.families.model import BlockModel
from duramen.problem import Problem
from duramen.recover.peft_io import CONFIG, delta, read_peft, write_peft
from duramen.recover.rora import Settings, adapted

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def trained(network, **settings):
    chosen = Settings(rank=4, alpha=6.0, **settings)
    context = adapted(network, BlockModel.from_module(network), chosen)
    adapters = context.__enter__()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.b.normal_(std=0.1, generator=generator)
    return context, adapters


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("form", ["portable", "rslora"])
@torch.no_grad()
def test_peft_loads_it_with_equal_output(name, form, tmp_path):
    network, tokens = tiny.model(name), tiny.ids(3, 20)
    context, adapters = trained(network)
    expected = network(tokens).logits
    write_peft(tmp_path, adapters, alpha=6.0, form=form)
    changes = {layer: (adapter.merged() - adapter.weight) for layer, adapter in adapters.items()}
    context.__exit__(None, None, None)
    theirs = peft.PeftModel.from_pretrained(tiny.model(name), tmp_path)
    torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(network(tokens).logits, expected, atol=1e-3)
    for layer, change in read_peft(tmp_path).items():
        torch.testing.assert_close(delta(change), changes[layer], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_what_the_principal_start_takes_off_is_written_too(tmp_path):
    network, tokens = tiny.model("llama"), tiny.ids(3, 20)
    context, adapters = trained(network, init="pissa")
    expected = network(tokens).logits
    with pytest.raises(Problem, match="rslora"):
        write_peft(tmp_path, adapters, alpha=6.0, form="rslora")
    write_peft(tmp_path, adapters, alpha=6.0)
    context.__exit__(None, None, None)
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == 8
    theirs = peft.PeftModel.from_pretrained(tiny.model("llama"), tmp_path)
    torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
@torch.no_grad()
def test_what_peft_writes_is_read_with_equal_changes(rslora, tmp_path):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=10,
        use_rslora=rslora,
        target_modules=["q_proj", "down_proj"],
        alpha_pattern={"down_proj": 3},
        task_type="CAUSAL_LM",
    )
    model, dense = peft.get_peft_model(tiny.model("llama"), config), tiny.model("llama").state_dict()
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload().state_dict()
    found = read_peft(tmp_path)
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "down_proj"}
    for name, change in found.items():
        torch.testing.assert_close(delta(change), merged[f"{name}.weight"] - dense[f"{name}.weight"], rtol=1e-4, atol=1e-6)


def test_what_is_more_than_a_low_rank_change_is_refused(tmp_path):
    for settings, word in (({"dora": True}, "row lengths"), ({"mode": "spp"}, "the mode spp")):
        context, adapters = trained_once(settings)
        with pytest.raises(Problem, match=word):
            write_peft(tmp_path, adapters, alpha=6.0)
        context.__exit__(None, None, None)
    context, adapters = trained_once({"scaling": "constant"})
    with pytest.raises(Problem, match="strength is not"):
        write_peft(tmp_path, adapters, alpha=6.0, form="rslora")
    write_peft(tmp_path, adapters, alpha=6.0)
    context.__exit__(None, None, None)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(Problem, match="use_dora"):
        read_peft(tmp_path)
    with pytest.raises(Problem, match="is no adapter"):
        read_peft(tmp_path / "nowhere")


def trained_once(settings):
    network = tiny.model("llama")
    context = adapted(network, BlockModel.from_module(network), Settings(rank=4, alpha=6.0, **settings))
    return context, context.__enter__()
