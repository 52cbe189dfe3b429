"""Quantised base models on a CPU: bitsandbytes and torchao, 4 and 8 bits, on every projection of the mixers.

Quantised arithmetic rounds coarsely, and a difference in the last bit can flip a whole step of it. So errors are
measured against the base model's own: how far it is from the same model with its weights brought back to float32.
"""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ATTENTION, COMMON, GATED_DELTA_NET, MAMBA, Architecture, mixers
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from reference import with_slow_mixers
from test_law import in_chunks, left_pad
from torch import nn
from trainers import tokenizer, weights
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from trl import SFTConfig, SFTTrainer
from tuned import Tuned, states_of

from peft_s0 import S0Config

# On CPUs with bfloat16 instructions bitsandbytes wants a multiple of 32 columns.
SIZES: dict[str, Callable[[], Any]] = {
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(
        **COMMON,
        **ATTENTION,
        **GATED_DELTA_NET | {"linear_num_value_heads": 32, "linear_value_head_dim": 4},
        intermediate_size=128,
        num_hidden_layers=4,
    ),
    "falcon_h1": lambda: transformers.FalconH1Config(
        **COMMON,
        **MAMBA | {"mamba_n_heads": 32, "mamba_d_head": 2},
        head_dim=16,
        intermediate_size=128,
        num_hidden_layers=2,
        mamba_d_ssm=64,
        mamba_n_groups=1,
    ),
}


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def torchao_8_bit() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def torchao_4_bit() -> TorchAoConfig:
    # torchao's other layouts of four bits need a GPU.
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

    return TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False))


KINDS: dict[str, tuple[str, Callable[[], Any]]] = {
    "bitsandbytes_4": ("bitsandbytes", nf4),
    "bitsandbytes_8": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "torchao_4": ("torchao", torchao_4_bit),
    "torchao_8": ("torchao", torchao_8_bit),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """A kind of quantisation that can run here."""
    package = KINDS[request.param][0]
    pytest.importorskip(package, reason=f"{package} is not installed")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return request.param


@pytest.fixture
def folder(architecture: Architecture, tmp_path: Path) -> Path:
    replace(architecture, config=SIZES[architecture.name]).build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a folder, quantised and frozen."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=KINDS[kind][1](), dtype=dtype, device_map="cpu"
    )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with the quantised weights as float32."""
    if not isinstance(model.config.quantization_config, TorchAoConfig):
        return model.dequantize().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            module.weight = nn.Parameter(module(torch.eye(module.in_features)).T.contiguous(), requires_grad=False)
    return model


def tune(architecture: Architecture, folder: Path, kind: str) -> Tuned:
    """A quantised model with random states; its naive twin and its base in float32."""
    torch.manual_seed(0)
    base = in_float32(load(folder, kind))
    model = get_peft_model(load(folder, kind), S0Config(alpha=0.7, init_weights=1.0, l2_lambda=0.0)).eval()
    return Tuned(architecture, base, model, with_slow_mixers(base, architecture.slow_mixer, states_of(model)))


@torch.no_grad()
def test_the_law(architecture: Architecture, folder: Path, kind: str) -> None:
    tuned, quantized = tune(architecture, folder, kind), load(folder, kind)
    assert not any(
        isinstance(part, nn.Linear) and type(part) is nn.Linear and type(part.weight) is nn.Parameter
        for mixer in mixers(quantized)
        for part in mixer.children()
    )
    ids = tuned.ids(2, 24)
    expected, effect, model = tuned.expected(ids), tuned.effect(ids), tuned.model
    full = quantized(ids).logits
    rounding = max(2 * float((full - tuned.base(ids).logits).abs().max()) / effect, 1e-5)
    assert rounding < 0.25
    tuned.assert_equal(model(ids).logits, expected, effect, rounding)
    tuned.assert_equal(in_chunks(tuned, ids, list(range(1, 25))), expected, effect, rounding)
    tuned.assert_equal(in_chunks(tuned, ids, [4, 11, 24]), expected, effect, rounding)
    rows = [ids[0], ids[1, :5]]
    padded, mask, positions = left_pad(rows)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits
    for i, row in enumerate(rows):
        tuned.assert_equal(logits[i : i + 1, -len(row) :], tuned.expected(row[None]), tuned.effect(row[None]), rounding)
    assert torch.equal(model(ids, adapter_names=["default", "__base__"]).logits[1], full[1])
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, full)


def train(model: nn.Module, folder: Path, **arguments: object) -> SFTTrainer:
    """A trainer that has taken two small steps."""
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            max_steps=2,
            learning_rate=1e-5,
            optim="adamw_torch",
            report_to=[],
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_dict({"input_ids": [list(range(3, 12)), list(range(20, 26))] * 4}),
        processing_class=tokenizer(),
        **arguments,
    )
    start = [weight.detach().clone() for weight in weights(trainer.model)]
    # Bits that bfloat16 does not have, and steps that are too small for it.
    assert start
    assert not any(torch.equal(weight, weight.bfloat16()) for weight in start)
    trainer.train()
    for weight, before in zip(weights(trainer.model), start, strict=True):
        assert weight.dtype == trainer.optimizer.state[weight]["exp_avg"].dtype == torch.float32
        assert 0 < float((weight.detach() - before).abs().max()) <= 3e-5
    return trainer


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "torchao_4"], indirect=True)
def test_training(architecture: Architecture, folder: Path, kind: str, tmp_path: Path) -> None:
    """Prepared as for QLoRA, in a trainer that casts what it trains to bfloat16; then on from the saved adapter.

    transformers trains no model in torchao's four bits.
    """
    base = prepare_model_for_kbit_training(
        load(folder, kind, torch.bfloat16), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    trainer = train(base, tmp_path, peft_config=S0Config(alpha=1.0, init_weights=0.1))
    trainer.save_model(str(tmp_path / "adapter"))
    base = load(folder, kind, torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True, low_cpu_mem_usage=True)
    for weight, saved in zip(weights(loaded), weights(trainer.model), strict=True):
        assert torch.equal(weight, saved)
    train(loaded, tmp_path)


def cast(model: nn.Module) -> None:
    """As TRL's trainers do on a quantised base model."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


def test_a_cast_of_what_is_trained(architecture: Architecture) -> None:
    """Without a quantised model: what counts is what the model says it is."""
    base = architecture.build()
    base.is_loaded_in_4bit = True
    model = get_peft_model(base, S0Config(init_weights=1.0, l2_lambda=0.1))
    before = [weight.detach().clone() for weight in weights(model)]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [model, copy.deepcopy(model), torch.load(buffer, weights_only=False)]
    assigned = copy.deepcopy(model)
    assigned.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    for each in (*copies, assigned):
        cast(each)
        for weight, expected in zip(weights(each), before, strict=True):
            assert isinstance(weight, nn.Parameter)
            assert weight.dtype == torch.float32
            assert weight.requires_grad
            assert torch.equal(weight, expected)
    for weight, expected in zip(weights(model), before, strict=True):
        weight.data = weight.data.to(torch.bfloat16) + 1
        assert weight.dtype == torch.float32
        assert torch.equal(weight.data, (expected.bfloat16() + 1).float())
    model.to(torch.float16)
    assert all(weight.dtype == torch.float32 for weight in weights(model))


def test_parameters_are_plain_elsewhere(architecture: Architecture) -> None:
    model = get_peft_model(architecture.build(), S0Config())
    assert {type(weight) for weight in weights(model)} == {nn.Parameter}
