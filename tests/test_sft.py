"""TRL's SFTTrainer: the same losses and states, however rows are laid out, accumulated and checkpointed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import MAIN, Architecture
from datasets import Dataset
from torch import Tensor
from trainers import logged, mean_loss, reload, sft, states, token_rows, tokenizer, train, twin, weights, words

from peft_s0 import S0Config

Run = tuple[list[float], list[Tensor]]
CONFIG = {"alpha": 1.0, "init_weights": 0.5}


@pytest.fixture(scope="module", params=MAIN, ids=lambda architecture: architecture.name)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    """Of the module, so that what all are compared with runs once."""
    return request.param


def run(architecture: Architecture, folder: Path, **arguments: Any) -> Run:
    """Losses and states of three steps, each on all rows. The first loss is that of each row by itself."""
    arguments = {"per_device_train_batch_size": 8, **arguments}
    trainer = sft(architecture, folder, S0Config(**CONFIG), **arguments)
    rows = arguments.get("train_dataset", token_rows())
    expected = mean_loss(twin(trainer, architecture), rows)
    train(trainer)
    losses = logged(trainer)
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    if trainer.args.packing:
        assert len(trainer.train_dataset) < len(rows)
    return losses, states(trainer)


def assert_same(found: Run, expected: Run) -> None:
    assert len(expected[0]) == 3
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def padded(architecture: Architecture, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(architecture, tmp_path_factory.mktemp("padded"))


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding_free": True, "max_length": None},
        {"packing": True, "packing_strategy": "bfd", "max_length": 24},
        {"packing": True, "packing_strategy": "bfd_split", "max_length": 24},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"packing": True, "max_length": 24, "gradient_checkpointing": True, "per_device_train_batch_size": 1},
    ],
    ids=["padding_free", "bfd", "bfd_split", "accumulation", "reentrant", "not_reentrant", "bfd_checkpointing"],
)
def test_layouts(architecture: Architecture, padded: Run, tmp_path: Path, arguments: dict[str, Any]) -> None:
    if arguments.get("per_device_train_batch_size") == 1:
        # The packed rows of a step one after the other.
        trainer = sft(architecture, tmp_path, S0Config(**CONFIG), **arguments)
        arguments = {**arguments, "gradient_accumulation_steps": len(trainer.train_dataset)}
    assert_same(run(architecture, tmp_path, **arguments), padded)


def pieces(rows: Dataset, length: int) -> Dataset:
    """Every row in pieces of at most so many tokens."""
    starts = [(row, start) for row in rows for start in range(0, len(row["input_ids"]), length)]
    return Dataset.from_dict(
        {name: [row[name][start : start + length] for row, start in starts] for name in ("input_ids", "labels")}
    )


def one_row(rows: Dataset) -> Dataset:
    """All rows end to end."""
    return Dataset.from_dict({name: [list(chain.from_iterable(rows[name]))] for name in ("input_ids", "labels")})


@pytest.mark.parametrize(
    ("strategy", "length", "cut"),
    [("bfd_split", 10, lambda rows: pieces(rows, 10)), ("wrapped", 22, lambda rows: pieces(one_row(rows), 22))],
    ids=["bfd_split", "wrapped"],
)
def test_packing_that_cuts_rows(
    architecture: Architecture, tmp_path: Path, strategy: str, length: int, cut: Callable[[Dataset], Dataset]
) -> None:
    """Each piece is a document of its own: as if the pieces had been the rows."""
    rows = cut(token_rows())
    cut_before = run(architecture, tmp_path / "before", train_dataset=rows, per_device_train_batch_size=len(rows))
    trainer = sft(
        architecture,
        tmp_path / "packed",
        S0Config(**CONFIG),
        packing=True,
        packing_strategy=strategy,
        max_length=length,
        per_device_train_batch_size=16,
    )
    train(trainer)
    assert_same((logged(trainer), states(trainer)), cut_before)


def labelled(texts: list[list[tuple[str, bool]]]) -> Dataset:
    """Rows of tokens from pieces of text, and whether a piece counts."""
    ids = [[tokenizer()(text)["input_ids"] for text, _ in pieces] for pieces in texts]
    labels = [
        [[token if counts else -100 for token in found] for found, (_, counts) in zip(row, pieces, strict=True)]
        for row, pieces in zip(ids, texts, strict=True)
    ]
    columns = {"input_ids": ids, "labels": labels}
    return Dataset.from_dict(
        {name: [list(chain.from_iterable(row)) for row in column] for name, column in columns.items()}
    )


def test_completion_only_loss(architecture: Architecture, tmp_path: Path) -> None:
    rows = [(words(2 + 2 * row, row), " " + words(5 - row, 9 + row)) for row in range(4)]
    data = Dataset.from_dict({"prompt": [prompt for prompt, _ in rows], "completion": [answer for _, answer in rows]})
    for completion_only in (True, False):
        expected = labelled([[(prompt, not completion_only), (answer + "<eos>", True)] for prompt, answer in rows])
        trainer = sft(
            architecture, tmp_path, S0Config(**CONFIG), train_dataset=data, completion_only_loss=completion_only
        )
        loss = mean_loss(twin(trainer, architecture), expected)
        train(trainer)
        assert logged(trainer)[0] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_assistant_only_loss(architecture: Architecture, tmp_path: Path, packing: bool) -> None:
    """Several turns, of which only those of the assistant count, as the chat template marks them."""
    turns = [[words(2 + turn + row, 4 * row + turn) for turn in range(4)] for row in range(4)]
    data = Dataset.from_dict(
        {
            "messages": [
                [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(row)]
                for row in turns
            ]
        }
    )
    expected = labelled(
        [
            [(f"w4 {text} <eos>", True) if turn % 2 else (f"w3 {text}", False) for turn, text in enumerate(row)]
            for row in turns
        ]
    )
    trainer = sft(
        architecture,
        tmp_path,
        S0Config(**CONFIG),
        train_dataset=data,
        assistant_only_loss=True,
        packing=packing,
        max_length=128,
    )
    loss = mean_loss(twin(trainer, architecture), expected)
    train(trainer)
    assert logged(trainer)[0] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_bf16(architecture: Architecture, padded: Run, tmp_path: Path, packing: bool) -> None:
    """The states stay in float32, in training and in the file; the losses are those of float32 to bf16's digits."""
    model = architecture.build().bfloat16()
    trainer = sft(
        architecture,
        tmp_path,
        S0Config(**CONFIG),
        model=model,
        bf16=True,
        packing=packing,
        max_length=24,
        per_device_train_batch_size=8,
    )
    train(trainer)
    assert logged(trainer) == pytest.approx(padded[0], rel=1e-2)
    assert all(weight.dtype == torch.float32 and weight.grad is None for weight in weights(trainer.model))
    loaded = reload(trainer, architecture, tmp_path / "adapter")
    for a, b in zip(weights(loaded), weights(trainer.model), strict=True):
        assert torch.equal(a, b)
    assert any(bool((weight != weight.bfloat16()).any()) for weight in weights(trainer.model))


def test_evaluation_during_training(architecture: Architecture, padded: Run, tmp_path: Path) -> None:
    """It reports the loss of each row by itself, and changes nothing."""
    held_out = token_rows(rows=3, shortest=5)
    trainer = sft(
        architecture,
        tmp_path,
        S0Config(**CONFIG),
        eval_dataset=held_out,
        eval_strategy="steps",
        eval_steps=1,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
    )
    before = mean_loss(twin(trainer, architecture).eval(), held_out)
    train(trainer)
    assert logged(trainer) == padded[0]
    assert all(torch.equal(a, b) for a, b in zip(states(trainer), padded[1], strict=True))
    found = logged(trainer, "eval_loss")
    assert len(found) == 3
    assert found[2] == pytest.approx(mean_loss(twin(trainer, architecture).eval(), held_out), rel=1e-5)
    assert found[2] != pytest.approx(before, rel=1e-3)


def test_adapter_is_what_was_trained(architecture: Architecture, tmp_path: Path) -> None:
    trainer = sft(architecture, tmp_path)
    train(trainer)
    loaded = reload(trainer, architecture, tmp_path / "adapter")
    assert weights(loaded)
    for a, b in zip(weights(loaded), weights(trainer.model), strict=True):
        assert torch.equal(a, b)
