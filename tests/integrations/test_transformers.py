"""Every method in the Hugging Face Trainer, a resume to the same bits, and folders with a pack."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core.errors import ArgumentError, FormatError, GossamerError
from integration_methods import FAMILIES, METHODS, STEPS, same

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from gossamer.integrations import pretrained  # noqa: E402
from gossamer.integrations.transformers import (  # noqa: E402
    MethodCallback,
    from_pretrained,
    last_checkpoint,
    save_pretrained,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 8,
}


def bert(kind: str = "BertForSequenceClassification") -> Any:
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.BertConfig(**SIZES))


class Stop(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyError("stopped")


def trainer_of(model: Any, folder: Path, *, labels: str = "class", **options: Any) -> Any:
    g = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 32, (40, 8), generator=g)
    rows = [{"input_ids": t, "labels": t if labels == "tokens" else t.sum() % 2} for t in tokens]
    args = {"max_steps": STEPS, "save_steps": 4, "learning_rate": 1e-2, **options}
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        logging_strategy="no",
        **args,
    )
    return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:8])


def trained(folder: Path, kind: str, model: Any, *, stop: int = 0, **options: Any) -> Any:
    trainer = trainer_of(model, folder, **options)
    MethodCallback(trainer, METHODS[kind](model))
    if stop:
        trainer.add_callback(Stop(stop))
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    return model


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_resumed_run_is_the_unbroken_one(kind: str, tmp_path: Path) -> None:
    whole = trained(tmp_path / "a", kind, bert())
    with pytest.raises(KeyError, match="stopped"):
        trained(tmp_path / "b", kind, bert(), stop=6)
    again = trained(tmp_path / "b", kind, bert())
    assert same(whole, again)
    assert list(again.state_dict()) == list(bert().state_dict())  # plain tensors
    optimizers = [
        torch.load(tmp_path / x / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
        for x in "ab"
    ]
    assert repr(optimizers[0]) == repr(optimizers[1])


@pytest.mark.parametrize("kind", ["masks", "lsq"])
def test_tied_weights_resume(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"labels": "tokens"}
    whole = trained(tmp_path / "a", kind, bert("BertForMaskedLM"), **options)
    with pytest.raises(KeyError):
        trained(tmp_path / "b", kind, bert("BertForMaskedLM"), stop=6, **options)
    again = trained(tmp_path / "b", kind, bert("BertForMaskedLM"), **options)
    assert same(whole, again)
    assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight


def test_the_best_model_comes_with_its_methods(tmp_path: Path) -> None:
    options = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "eval_strategy": "steps",
        "eval_steps": 4,
        "greater_is_better": True,  # the first is the best: the state of a step that is past
    }
    model = bert()
    trainer = trainer_of(model, tmp_path, **options)
    callback = MethodCallback(trainer, METHODS["rigl"](model))
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    saved = torch.load(best / "optimizer.pt", weights_only=True)["gossamer"]
    masks = callback.attached.methods[0].masks
    for name, mask in saved["methods"][0]["state"]["masks"].items():
        assert torch.equal(masks[name], mask)
        assert not model.state_dict()[name][~mask].any()


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    model = bert()
    with pytest.raises(ArgumentError, match="auto_find_batch_size"):
        MethodCallback(
            trainer_of(model, tmp_path, auto_find_batch_size=True), METHODS["masks"](model)
        )
    trainer = trainer_of(model, tmp_path, save_only_model=True)
    MethodCallback(trainer, METHODS["masks"](model))
    trainer.train()
    with pytest.raises(ArgumentError, match="were finished"):
        trainer.train()
    model = bert()
    trainer = trainer_of(model, tmp_path, max_steps=STEPS + 4)
    MethodCallback(trainer, METHODS["masks"](model))
    with pytest.raises(ArgumentError, match="held no state of the optimizer"):
        trainer.train(resume_from_checkpoint=last_checkpoint(tmp_path))


def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step in (4, 8, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 12:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "BertForMaskedLM"])
def test_a_folder_gives_the_network_back(kind: str, tmp_path: Path) -> None:
    model = bert(kind).eval()
    model.config.id2label = {0: "no", 1: "yes"}
    folder = save_pretrained(model, tmp_path / "new" / "folder")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.gsm"]
    state = torch.get_rng_state()
    again = from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(again) is type(model)
    assert same(model, again)
    assert not again.training
    assert again.config.id2label == {0: "no", 1: "yes"}
    x = torch.arange(8)[None]
    assert torch.equal(model(x).logits, again(x).logits)


def test_half_precision_and_generation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).bfloat16()
    model.generation_config.max_new_tokens = 3
    again = from_pretrained(save_pretrained(model, tmp_path))
    assert same(model, again)
    assert again.dtype == torch.bfloat16
    assert again.generation_config.max_new_tokens == 3


def test_a_results_file_brings_its_changes(tmp_path: Path) -> None:
    model = bert()
    packed = gossamer.pack.pack(
        gossamer.compression.records.rebuild(
            bert(), [gossamer.compression.records.LowRank(ranks={"bert.pooler.dense": 2})]
        ),
        tmp_path / "low.gsm",
        metadata={"structure": [{"kind": "low-rank", "ranks": {"bert.pooler.dense": 2}}]},
    )
    packed.close()
    changed = gossamer.load(tmp_path / "low.gsm", bert())
    result = gossamer.Result(
        out=tmp_path,
        file=tmp_path / "low.gsm",
        report=tmp_path,
        bytes=0,
        dense_bytes=0,
        before=None,  # type: ignore[arg-type]
        after=None,  # type: ignore[arg-type]
        model=changed,
        run={},
    )
    again: Any = from_pretrained(save_pretrained(model, tmp_path / "f", result=result))
    assert same(changed, again)
    assert isinstance(again.bert.pooler.dense, nn.Sequential)


def test_what_is_read_back_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()

    def other(folder: Path) -> nn.Module:
        found = from_pretrained(folder)
        found.classifier.bias.data[0] = 1  # type: ignore[union-attr, operator, index]
        return found

    monkeypatch.setattr(pretrained, "from_pretrained", other)
    with pytest.raises(GossamerError, match=r"'classifier\.bias' is not what was packed"):
        save_pretrained(model, tmp_path)
    assert not (tmp_path / "model.gsm").exists()


def test_no_code_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(transformers.BertForSequenceClassification):
        pass

    torch.manual_seed(0)
    with pytest.raises(ArgumentError, match="not a class of transformers' own"):
        save_pretrained(Mine(transformers.BertConfig(**SIZES)), tmp_path)
    folder = save_pretrained(bert(), tmp_path)
    path = folder / "config.json"
    good = json.loads(path.read_text())

    def changed(**keys: Any) -> None:
        path.write_text(json.dumps({**good, **keys}))

    for name in ("Mine", "os", "PreTrainedModel", "AutoModel", "Trainer", "a.b", ""):
        changed(architectures=[name])
        with pytest.raises(ArgumentError, match="no network of transformers' own"):
            from_pretrained(folder)
    for found in (None, [], "BertModel", ["a", "b"], [3]):
        changed(architectures=found)
        with pytest.raises(FormatError, match="list of one class"):
            from_pretrained(folder)
    changed(model_type="gpt2")
    with pytest.raises(FormatError, match="model_type is 'gpt2'"):
        from_pretrained(folder)
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    changed(
        auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
        _attn_implementation="someone/kernels",
        attn_implementation="someone/kernels",
    )
    assert same(from_pretrained(folder), bert())
    changed(num_attention_heads=3)
    with pytest.raises(FormatError, match="BertForSequenceClassification fails"):
        from_pretrained(folder)
    path.write_text("[1]")
    with pytest.raises(FormatError, match="must be an object"):
        from_pretrained(folder)
    path.write_text("{")
    with pytest.raises(FormatError, match="no JSON"):
        from_pretrained(folder)
    changed()
    (folder / "model.gsm").unlink()
    with pytest.raises(FormatError, match=r"has no model\.gsm"):
        from_pretrained(folder)


def test_a_config_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = save_pretrained(bert(), tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": 32}))
    with pytest.raises(ArgumentError, match="does not fit the model"):
        from_pretrained(folder)
