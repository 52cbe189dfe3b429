"""What the model card of an adapter says, and what it leaves as it is."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import Architecture
from datasets import Dataset
from full_disk import full_disk
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from tuned import tune

from peft_s0 import S0Config, update_model_card

# PEFT looks for the base model's vocabulary on the Hub.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in")

START, END = "<!-- peft_s0: this section", "<!-- peft_s0: end of the section -->"


@pytest.fixture
def model(architecture: Architecture) -> PeftModel:
    return tuned(architecture)


def tuned(architecture: Architecture, base: str = "org/base-1.5B", **config: object) -> PeftModel:
    """A tuned model whose base was loaded from somewhere."""
    model = tune(architecture, **config).model
    model.get_base_model().name_or_path = base
    model.get_base_model().config._name_or_path = base
    return model


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def rows_of(card: ModelCard) -> list[dict[str, str]]:
    """The table of adapters."""
    lines = [line.strip("| ").split(" | ") for line in card.text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_the_card_says_what_is_in_the_file(model: PeftModel, architecture: Architecture, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    states = load_file(tmp_path / "adapter_model.safetensors")
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert rows_of(card) == [
        {
            "adapter": "default",
            "alpha": "0.7",
            "layers": str(architecture.states),
            "parameters": f"{sum(state.numel() for state in states.values()):,}",
            "file": f"{size / 1000:.1f} kB",
            "storage": "float32",
        }
    ]
    assert "[org/base-1.5B](https://huggingface.co/org/base-1.5B)" in card.text
    assert card.data.base_model == "org/base-1.5B"
    assert card.data.library_name == "peft"
    assert {"s0-tuning", "peft", "transformers", "base_model:adapter:org/base-1.5B"} <= set(card.data.tags)
    # The questions of PEFT's template, which nobody has answered, are gone; its versions are not.
    assert "More Information Needed" not in card.text
    assert re.search(r"### Framework versions\n\n- PEFT \d", card.text)


def test_alphas_of_layers(architecture: Architecture, tmp_path: Path) -> None:
    tuned(architecture, alpha_pattern={r"layers\.0\..*": 0.25, r"layers\.1\..*": 2.0}).save_pretrained(tmp_path)
    assert rows_of(card_of(tmp_path))[0]["alpha"] == "0.25 to 2 by layer, others 0.7"


def test_settings_show_where_they_are_used(architecture: Architecture, tmp_path: Path) -> None:
    model = tuned(architecture, train_alpha=1.0, normalize=True, rank=2)
    model.add_adapter("second", S0Config(alpha=0.25))
    model.save_pretrained(tmp_path)
    first, second = rows_of(card_of(tmp_path))
    assert [first[name] for name in ("adapter", "alpha", "train_alpha", "normalize", "rank")] == [
        "default", "0.7", "1", "yes", "2"
    ]  # fmt: skip
    assert [second[name] for name in ("adapter", "alpha", "train_alpha", "normalize", "rank")] == [
        "`second`", "0.25", "-", "no", "-"
    ]  # fmt: skip
    assert first["layers"] == second["layers"]
    assert first["parameters"] != second["parameters"]


def test_saving_again_changes_nothing_but_the_section(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == first
    card = card_of(tmp_path)
    # A user who moves the section down, and writes around it.
    card.text = f"\n# My task\n\nWhat it does.\n{card.text}\n## More\n\nA | table | of mine.\n"
    card.data["license"] = "mit"
    card.save(tmp_path / "README.md")
    model.peft_config["default"].alpha = 0.125
    for _ in range(2):
        model.save_pretrained(tmp_path)
        again = card_of(tmp_path)
        assert again.text.rstrip() == card.text.replace("| 0.7 |", "| 0.125 |").rstrip()
        assert again.data["license"] == "mit"
    update_model_card(tmp_path, repo_id="me/my-task")
    assert 'from_pretrained(model, "me/my-task")\n' in card_of(tmp_path).text


def test_the_base_models_revision(architecture: Architecture, tmp_path: Path) -> None:
    get_peft_model(tuned(architecture).unload(), S0Config(), revision="v1").save_pretrained(tmp_path)
    assert 'from_pretrained("org/base-1.5B", revision="v1", dtype="auto")\n' in card_of(tmp_path).text


def test_metrics_where_they_are_known(model: PeftModel, tmp_path: Path) -> None:
    """They are those of the states that were saved, so a later save does not go on claiming them."""
    model.save_pretrained(tmp_path)
    without = card_of(tmp_path).text
    update_model_card(tmp_path, metrics={"HumanEval pass@1": "72.2 %", "loss": 0.3125})
    text = card_of(tmp_path).text
    assert "\n| metric | value |\n| --- | --- |\n| HumanEval pass@1 | 72.2 % |\n| loss | 0.3125 |\n" in text
    model.save_pretrained(tmp_path)
    assert card_of(tmp_path).text == without


def test_metrics_stay_in_their_cells_and_counts_are_exact(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    update_model_card(
        tmp_path, metrics={"p(a|b)": "high | low", "two\nlines": "a\nb", "tokens": 1234567, "solved": np.int64(7654321)}
    )
    expected = "\n| p(a\\|b) | high \\| low |\n| two lines | a b |\n| tokens | 1234567 |\n| solved | 7654321 |\n"
    assert expected in card_of(tmp_path).text


@pytest.mark.parametrize("metrics", [["pass@1"], {"pass@1": [0.7, 0.8]}, {"pass@1": 1j}])
def test_metrics_of_other_types(model: PeftModel, tmp_path: Path, metrics: Any) -> None:
    model.save_pretrained(tmp_path)
    before = card_of(tmp_path).text
    with pytest.raises(TypeError, match=r"metrics must be a dict of names to texts or numbers, .* found "):
        update_model_card(tmp_path, metrics=metrics)
    assert card_of(tmp_path).text == before


def test_a_card_that_was_there_before(model: PeftModel, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlanguage: en\n---\n# Mine\n\nWords.\n")
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert card.text.startswith(f"\n{START}")
    assert f"{END}\n\n# Mine\n\nWords.\n" in card.text
    assert card.data["language"] == "en"


def test_a_card_is_there_whole(model: PeftModel, tmp_path: Path) -> None:
    """Also where the disk is full: what a user wrote is not lost."""
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\nMine.\n")
    before = card.read_text()
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        update_model_card(tmp_path, metrics={"pass@1": 0.5})
    assert card.read_text() == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("base", ["/home/me/models/base", "C:\\models\\base", "../base", "here", ""])
def test_a_path_is_not_shown_as_a_name(architecture: Architecture, tmp_path: Path, monkeypatch, base: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    tuned(architecture, base).save_pretrained(tmp_path / "adapter")
    card = card_of(tmp_path / "adapter")
    assert card.data.base_model is None
    assert f"of a local {architecture.model_class.__name__}," in card.text
    assert 'AutoModelForCausalLM.from_pretrained("path/to/the/base/model"' in card.text
    assert not any(tag.startswith("base_model") for tag in card.data.tags)
    if base:
        assert f'"{base}"' not in str(card)
        assert f": {base}" not in str(card)


def test_adapters_in_folders_of_their_own(architecture: Architecture, tmp_path: Path) -> None:
    """PEFT has one card for all of a model's adapters."""
    model = get_peft_model(architecture.build(), S0Config(alpha=0.5), adapter_name="second")
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert [row["adapter"] for row in rows_of(card)] == ["`second`"]
    assert card.text.count(START) == 1
    assert f'from_pretrained(model, "{tmp_path.name}", adapter_name="second", subfolder="second")' in card.text
    assert not (tmp_path / "second" / "README.md").exists()


def test_names_with_quotes(architecture: Architecture, tmp_path: Path) -> None:
    """The example is Python all the same."""
    folder = tmp_path / 'the "best"'
    get_peft_model(architecture.build(), S0Config(), adapter_name='say "yes"').save_pretrained(folder)
    *_, example = re.findall(r"```python\n(.*?)```", card_of(folder).text, re.DOTALL)
    assert {'the "best"', 'say "yes"'} < {
        node.value for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Constant)
    }


def test_checkpoints_are_not_taken_for_adapters(model: PeftModel, tmp_path: Path) -> None:
    for folder in (tmp_path / "checkpoint-1", tmp_path):
        model.save_pretrained(folder)
        assert [row["adapter"] for row in rows_of(card_of(folder))] == ["default"]


def test_a_folder_that_transformers_saved(architecture: Architecture, tmp_path: Path) -> None:
    base = architecture.build()
    base.add_adapter(S0Config(alpha=0.5))
    base.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    update_model_card(tmp_path)
    (row,) = rows_of(card_of(tmp_path))
    assert row["alpha"] == "0.5"
    assert "from transformers import AutoModelForCausalLM" in card_of(tmp_path).text


def test_states_that_are_not_there_are_not_measured(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    update_model_card(tmp_path)
    assert rows_of(card_of(tmp_path)) == [{"adapter": "default", "alpha": "0.7"}]


@pytest.mark.parametrize(
    ("config", "states"),
    [(b'{"peft_type": "S0"}', b"truncated"), (b"{", b""), (b"[1]", b""), (b"\xff\xfe{", b"")],
    ids=["states", "json", "list", "encoding"],
)
def test_what_cannot_be_read_is_passed_over(model: PeftModel, tmp_path: Path, config: bytes, states: bytes) -> None:
    """A folder that happens to lie beside the adapters keeps none of them from being saved."""
    model.add_adapter("second", S0Config(alpha=0.5))
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "adapter_config.json").write_bytes(config)
    (tmp_path / "another" / "adapter_model.safetensors").write_bytes(states)
    model.save_pretrained(tmp_path)
    assert [row["adapter"] for row in rows_of(card_of(tmp_path))] == ["default", "`second`"]
    assert load_file(tmp_path / "second" / "adapter_model.safetensors")


def test_a_card_never_keeps_an_adapter_from_being_saved(model: PeftModel, tmp_path: Path) -> None:
    model.add_adapter("second", S0Config(alpha=0.5))
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "adapter_config.json").write_text('{"peft_type": "S0", "alpha": "large"}')
    with pytest.warns(UserWarning, match=r"The adapter is saved, but its section of the model card '.*' is not up to"):
        model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "second" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="Unknown format code"):
        update_model_card(tmp_path)


def test_cards_of_others_are_left_alone(architecture: Architecture, tmp_path: Path) -> None:
    """A config on its own is not an adapter, and a README of something else is not its card."""
    (tmp_path / "README.md").write_text("# A project\n")
    (tmp_path / "config").mkdir()
    for folder in (tmp_path, tmp_path / "config"):
        S0Config(alpha=0.5).save_pretrained(folder)
    assert (tmp_path / "README.md").read_text() == "# A project\n"
    assert not (tmp_path / "config" / "README.md").exists()
    lora = get_peft_model(architecture.build(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    assert "s0" not in str(card_of(tmp_path / "lora")).lower()
    with pytest.raises(ValueError, match="lora' holds no S0 adapter"):
        update_model_card(tmp_path / "lora")


def test_the_tag_goes_with_the_adapter(architecture: Architecture, tmp_path: Path) -> None:
    """On the base model, where transformers and trainers look for it, as long as there is an adapter."""
    model = tuned(architecture)
    assert model.model_tags == ["s0-tuning"]
    assert model.unload().model_tags is None
    model = tuned(architecture)
    model.add_model_tags("mine")
    assert model.unload().model_tags == ["mine"]
    tuned(architecture, layers_to_transform=[0]).save_pretrained(tmp_path)
    config = S0Config.from_pretrained(tmp_path)
    config.layers_to_transform = None
    base = architecture.build()
    with pytest.raises(ValueError, match="missing in the file"):
        PeftModel.from_pretrained(base, tmp_path, config=config)
    assert base.model_tags is None


def test_a_trainers_card(architecture: Architecture, tmp_path: Path) -> None:
    """transformers' trainer writes its own text over PEFT's, and adds PEFT's data; the section can be put back."""
    model = tuned(architecture)
    trainer = Trainer(model, TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True))
    trainer.save_model()
    assert START in card_of(tmp_path).text
    trainer.create_model_card()
    written = card_of(tmp_path)
    assert "s0-tuning" in written.data.tags
    update_model_card(tmp_path)
    assert card_of(tmp_path).text.endswith(written.text.lstrip())
    assert START in card_of(tmp_path).text


def test_a_card_of_trl(architecture: Architecture, tmp_path: Path) -> None:
    model = tuned(architecture)
    data = Dataset.from_dict({"input_ids": [[3, 4, 5]]})
    arguments = SFTConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, dataset_kwargs={"skip_prepare_dataset": True}
    )
    with torch.enable_grad():
        trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=_tokenizer())
    # As its push_to_hub calls it.
    trainer.create_model_card(model_name="my-task", tags=list(trainer.model.model_tags))
    written = card_of(tmp_path)
    assert {"s0-tuning", "trl", "sft"} <= set(written.data.tags)
    trainer.model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert START in card.text
    assert "It has been trained using [TRL]" in card.text
    assert {"s0-tuning", "trl", "sft"} <= set(card.data.tags)


def _tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="</s>")
