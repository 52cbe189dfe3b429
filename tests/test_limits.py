"""What base models, PEFT and TRL cannot do themselves: pinned, so that it shows when it changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, LEAKS, MAIN, NGRAMS, Architecture, mixers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from reference import Mamba2
from test_law import in_chunks, packed_arguments
from trainers import logged, mean_loss, sft, token_rows
from tuned import tune

from peft_s0 import S0Config


@pytest.mark.parametrize(
    "architecture",
    [row for row in ARCHITECTURES if {LEAKS, NGRAMS} & {reason for _, reason in row.lacks}],
    ids=lambda row: row.name,
)
def test_packed_rows_leak_outside_of_the_mixers(architecture) -> None:
    """The documents are apart in every mixer: with the same input it gives what it gives the document alone."""
    tuned = tune(architecture)
    rows = [tuned.ids(1, 6)[0], tuned.ids(1, 8, seed=1)[0]]
    packed, inputs, outputs = packed_arguments([6, 8]), [], []
    handles = []
    for mixer in mixers(tuned.model):
        handles.append(mixer.register_forward_hook(lambda m, args, out: outputs.append((m, out))))
        handles.append(
            mixer.register_forward_pre_hook(
                lambda m, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
                prepend=True,
            )
        )
    with torch.no_grad():
        logits = tuned.model(torch.cat(rows)[None], use_cache=False, **packed).logits
        for handle in handles:
            handle.remove()
        for given, (mixer, found) in zip(inputs, outputs, strict=True):
            alone = mixer(hidden_states=given[:, 6:])
            torch.testing.assert_close(found[:, 6:], alone, atol=2e-5, rtol=0)
        expected = tuned.expected(rows[1][None])
    assert float((logits[:, 6:] - expected).abs().max()) > 0.05 * tuned.effect(rows[1][None])


@torch.no_grad()
@pytest.mark.parametrize(
    "architecture", [row for row in ARCHITECTURES if row.slow_mixer is Mamba2], ids=lambda row: row.name
)
def test_single_steps_do_not_limit_the_time_step(architecture: Architecture) -> None:
    tuned = tune(architecture)
    for mixer in (*mixers(tuned.base), *mixers(tuned.model)):
        mixer.time_step_limit = (0.1, float("inf"))
    ids = tuned.ids(2, 12)
    for limited in (tuned, replace(tuned, model=tuned.base)):
        at_once = limited.model(ids, use_cache=False).logits
        # A prompt, its continuation in one call, and token by token.
        torch.testing.assert_close(in_chunks(limited, ids, [6, 12]), at_once, atol=2e-5, rtol=0)
        assert float((in_chunks(limited, ids, range(6, 13)) - at_once).abs().max()) > 1e-3


@pytest.mark.parametrize(("name", "cap"), [("recurrent_gemma", "logits_soft_cap"), ("xlstm", "output_logit_soft_cap")])
def test_trl_does_not_find_the_soft_cap_of_logits(name: str, cap: str, tmp_path: Path) -> None:
    architecture = next(row for row in ARCHITECTURES if row.name == name)
    rows, losses = token_rows(4), []
    for told in (False, True):
        model = architecture.build()
        if told:
            model.config.final_logit_softcapping = getattr(model.config, cap)
        trainer = sft(architecture, tmp_path, model=model, train_dataset=rows, max_steps=1)
        trainer.train()
        losses += logged(trainer)
    expected = mean_loss(architecture.build(), rows)
    assert losses[0] != pytest.approx(expected, rel=1e-5)
    assert losses[1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "config", [S0Config(), LoraConfig(target_modules=["q_proj"])], ids=lambda config: config.peft_type
)
def test_peft_keeps_tokens_for_all_adapters_or_none(config: PeftConfig, tmp_path: Path) -> None:
    def model(first: list[int] | None, second: list[int] | None) -> PeftModel:
        made = get_peft_model(MAIN[0].build(), replace(config, trainable_token_indices=first), "first")
        made.add_adapter("second", replace(config, trainable_token_indices=second))
        return made

    model([5], [6]).save_pretrained(tmp_path)
    model([5], [6]).load_adapter(tmp_path / "second", "third")
    model(None, None).save_pretrained(tmp_path / "plain")
    with pytest.raises(KeyError, match="trainable_tokens_delta"):
        model([5], None).save_pretrained(tmp_path)
    with pytest.raises(KeyError, match="trainable_tokens_delta"):
        model([5], [6]).load_adapter(tmp_path / "plain" / "second", "third")


def test_peft_reads_no_config_for_a_name_that_is_there(tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7]])
    tuned = tune(MAIN[0], alpha=0.3)
    tuned.model.save_pretrained(tmp_path)
    other = tune(MAIN[0], alpha=0.9).model
    other.load_adapter(tmp_path, "default")
    assert other.peft_config["default"].alpha == 0.9
    assert not torch.equal(other(ids).logits, tuned.model(ids).logits)
    other.hotswap_adapter(tmp_path, "default")
    assert torch.equal(other(ids).logits, tuned.model(ids).logits)


def test_trl_does_not_train_tokens_of_tied_embeddings(tmp_path: Path) -> None:
    model = MAIN[0].build()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    trainer = sft(MAIN[0], tmp_path, S0Config(trainable_token_indices=[5]), model=model, max_steps=1)
    with pytest.raises(AttributeError, match="'TrainableTokensWrapper' object has no attribute 'bias'"):
        trainer.train()


@pytest.mark.parametrize("name", ["granitemoehybrid", "glm5_next", "qwen3_5_moe"])
def test_trl_balances_routers(name: str, tmp_path: Path) -> None:
    """By a term in the loss, for which it must find the number of experts."""
    architecture = next(row for row in ARCHITECTURES if row.name == name)
    rows = token_rows(4)
    expected = mean_loss(architecture.build(), rows)
    trainer = sft(architecture, tmp_path, train_dataset=rows, max_steps=1)
    if name == "qwen3_5_moe":
        trainer.train()
        assert logged(trainer)[0] > expected + 1e-3
    else:
        with pytest.raises(AttributeError, match="has no attribute 'num_experts'"):
            trainer.train()
    trainer = sft(architecture, tmp_path, train_dataset=rows, max_steps=1, router_aux_loss_coef=0.0)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(expected, rel=1e-6)
