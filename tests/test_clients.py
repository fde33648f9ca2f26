"""The library inside programs that people train and load with, where they are installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import ckptfix

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("default")


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def tiny_bert(transformers: Any) -> Any:
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=20,
        max_position_embeddings=8,
    )
    return transformers.BertForMaskedLM(config)


def test_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source, model = tiny_bert(transformers), tiny_bert(transformers)
    source.save_pretrained(tmp_path)
    assert ckptfix.load_into(model, tmp_path / "model.safetensors").loads
    assert same(source, model)
    torch.save(nn.DataParallel(source).state_dict(), tmp_path / "ddp.pt")
    state = ckptfix.load_state_dict(tmp_path / "ddp.pt", model=model)
    again = type(source).from_pretrained(None, config=source.config, state_dict=state)
    assert same(source, again)


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Wrapped(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(2, 2)

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(batch[0]).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    source = Wrapped()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(4, 2)))
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(source, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for model in (Wrapped(), nn.Linear(2, 2)):
        assert ckptfix.load_into(model, tmp_path / "last.ckpt").loads
        assert same(model, source if isinstance(model, Wrapped) else source.model)


def test_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    source = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.save_model(accelerator.prepare(source), tmp_path)
    with accelerate.init_empty_weights():
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    report = ckptfix.load_into(model, tmp_path / "model.safetensors")
    assert report.loads
    assert report.assigned
    assert same(source, model)


def test_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    source, model = (timm.create_model("resnet10t", pretrained=False) for _ in range(2))
    torch.save(
        {"state_dict": nn.DataParallel(source).state_dict(), "epoch": 3}, tmp_path / "in.pth.tar"
    )
    assert ckptfix.load_into(model, tmp_path / "in.pth.tar").loads
    assert same(source, model)


def test_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
        return peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)

    source, model = adapted(), adapted()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1)
    torch.save(source.state_dict(), tmp_path / "in.pt")
    assert ckptfix.load_into(model, tmp_path / "in.pt").loads
    assert same(source, model)
