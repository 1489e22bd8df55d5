"""Networks of transformers and PEFT: from a folder to a packed file, of the same function.

Skipped where transformers is not installed (the extra ``gossamer[transformers]``).
"""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer
import no_torchvision
from gossamer import datasets, nets
from gossamer.compression import fresh, proof
from gossamer.core import names
from gossamer.core.errors import ArgumentError, FormatError
from gossamer.core.plain import copied, plain
from gossamer.quantize.layerwise import Treatment
from gossamer.quantize.posttraining import treat_network
from gossamer.training.layer_inputs import readers
from gossamer.training.renorm import distance
from gossamer.training.tasks import Classification

no_torchvision.hide()
pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries, as they are


@pytest.fixture(scope="module")
def library() -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("transformers")
        try:
            assert found.GPT2LMHeadModel
        except (ImportError, RuntimeError) as e:  # installed, but its own imports fail
            pytest.skip(f"transformers does not import: {e}")
    found.logging.set_verbosity_error()
    return found


def gpt2(library: Any) -> nn.Module:
    config = library.GPT2Config(
        n_layer=1, n_head=2, n_embd=32, vocab_size=64, n_positions=16, bos_token_id=0,
        eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return library.GPT2LMHeadModel(config)


def bert(library: Any) -> nn.Module:
    config = library.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16, initializer_range=0.2,
    )  # fmt: skip
    return library.BertForMaskedLM(config)


@pytest.mark.parametrize("make", [gpt2, bert])
def test_tables_and_layers_of_a_transformer_are_treated(library: Any, make: Any) -> None:
    torch.manual_seed(0)
    net = make(library).eval()
    batches = [torch.randint(0, 64, (8, 12)) for _ in range(4)]
    own = {n: p for n, p in names.parameters(net).items() if p.ndim >= 2}
    read = readers(net, batches, own)

    def treated(bits: int, inputs: bool = True) -> tuple[float, Any]:
        other = copy.deepcopy(net)
        how = dict.fromkeys(read, Treatment(bits=bits))
        done = treat_network(other, batches, how, read if inputs else {})
        return distance(other, net, batches), done

    error, done = treated(16)
    assert error**0.5 < 1e-3
    count = sum(own[row["name"]].numel() for row in done.rows if row["seen"])
    assert count >= 0.95 * sum(p.numel() for p in net.parameters())
    assert treated(4)[0] < treated(4, inputs=False)[0]
    layers = names.matrices(net)  # what every other stage takes by itself
    assert any("mlp.c_fc" in n or "intermediate.dense" in n for n in layers)


def test_a_folder_that_transformers_saved(library: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, ids = gpt2(library).eval(), torch.randint(0, 64, (2, 9))
    net.save_pretrained(tmp_path / "net")
    found = nets.build(f"hf:{tmp_path / 'net'}", seed=1, pretrained=False)
    assert type(found) is type(net)
    assert not found.training
    assert torch.equal(found(ids).logits, net(ids).logits)
    with pytest.raises(ArgumentError, match=r"there is no .*config\.json"):
        nets.build(f"hf:{tmp_path}")
    text = (tmp_path / "net" / "config.json").read_text()
    config = tmp_path / "net" / "config.json"
    config.write_text(text.replace("GPT2LMHeadModel", "MyOwnModel"))
    with pytest.raises(ArgumentError, match=r"'MyOwnModel', which transformers .* does not have"):
        nets.build(f"hf:{tmp_path / 'net'}")
    config.write_text(text.replace("GPT2LMHeadModel", "GPT2ForSequenceClassification"))
    with pytest.raises(ArgumentError, match="which would be random"):
        nets.build(f"hf:{tmp_path / 'net'}")


def test_adapters_are_merged_into_a_copy(library: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net, ids = gpt2(library).eval(), torch.randint(0, 64, (2, 9))
    config = peft.LoraConfig(
        target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
    )
    adapted = peft.get_peft_model(net, config).eval()
    before: Tensor = adapted(ids).logits
    made, told = plain(copied(adapted))
    assert type(made) is type(net)
    assert told == ["the network: PEFT's adapters are merged into its weights"]
    assert not any("lora" in n for n in names.parameters(made))
    torch.testing.assert_close(made(ids).logits, before, rtol=1e-4, atol=1e-4)
    assert any("lora" in n for n, _ in adapted.named_parameters())
    assert torch.equal(adapted(ids).logits, before)
    inner = nn.ModuleDict({"a": adapted.base_model.model})  # injected, without PEFT's own class
    made, told = plain(copied(inner))
    torch.testing.assert_close(made["a"](ids).logits, before, rtol=1e-4, atol=1e-4)
    assert not any("lora" in n for n in names.parameters(made))


def test_buffers_that_no_file_holds_are_made_by_the_class_again(
    library: Any, tmp_path: Path
) -> None:
    if sys.modules.get("torchvision", sys) is None:
        pytest.skip("a torchvision that does not import stands in the way of other processes")
    torch.manual_seed(0)
    net, ids = bert(library).eval(), torch.randint(0, 64, (60, 12))
    recipe = {"name": "b", "stages": [{"obs": {"bits": 8}}, "pack"]}
    reloaded = gossamer.compress(net, ids, recipe=recipe, out=tmp_path / "run").run["bytes"]
    assert reloaded["reloaded"]["not_proved"] is None
    assert reloaded["reloaded"]["same_outputs"]
    built = reloaded["reloaded"]["built"]
    assert built == "BertForMaskedLM of transformers, by its configuration"


def test_what_the_class_does_not_make_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    class Config:
        def save_pretrained(self, folder: str) -> None:
            Path(folder, "config.json").write_text("{}")

    builder = proof.Builder(None, {}, nn.Linear(2, 2), config=Config())
    before = proof._Found({"carried": ["ids"], "built": "its modules"})
    data = datasets.load("digits", subset=20)

    def by_class(figures: Any) -> Any:
        def check(*_: Any, **__: Any) -> Any:
            if isinstance(figures, Exception):
                raise figures
            return figures

        monkeypatch.setattr(fresh, "check", check)
        arguments = (Path("net.gsm"), data.test, Classification(), [])
        return proof._by_class(builder, *arguments, before)

    for bad in (
        FormatError("it has other tensors"),
        {"digest": "0", "unbuilt": "it is not installed"},
        {"digest": "0", "test": {}, "same": False, "carried": []},
        {"digest": "0", "test": {}, "same": True, "carried": ["ids"]},
        {"digest": "0", "failed": "it does not fit"},
    ):
        assert by_class(bad) is before
    good = by_class({"digest": "0", "test": {}, "same": True, "carried": []})
    assert good.problem is None
    assert good.figures["built"] == "Linear of transformers, by its configuration"
