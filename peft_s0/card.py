"""The model card of S0 adapters.

PEFT writes the same card (README.md) for every method. A reader of an S0 adapter must import peft_s0 besides, without
which PEFT does not know the method. So S0 has a section of its own in the card, in front of everything else.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .files import new_file
from .storage import contents, is_state

CARD_NAME = "README.md"
_TAG = "s0-tuning"
_BASE_TAG = "base_model:adapter:"
_START = "<!-- peft_s0: this section is renewed on saving, the rest of the card is kept -->"
_END = "<!-- peft_s0: end of the section -->"
_SECTION = f"""\
{_START}
## S0 adapter

Learnt {{learnt}} of the recurrent layers of {{base}}, made by S0 tuning \
([arXiv:2604.01168](https://arxiv.org/abs/2604.01168)). PEFT loads them once `peft_s0` is imported; without it, it \
stops with `KeyError: 'S0'`.

```bash
pip install peft-s0
```

```python
import peft_s0  # makes S0 known to PEFT
from peft import PeftModel
from transformers import {{model_class}}

model = {{model_class}}.from_pretrained({{base_source}}, dtype="auto")
{{loading}}
```

{{table}}

{_END}"""
_LEARNT = {
    "initial": "initial states",
    "offset": "state offsets ([arXiv:2503.03499](https://arxiv.org/abs/2503.03499))",
    "both": "initial states and state offsets ([arXiv:2503.03499](https://arxiv.org/abs/2503.03499))",
}
# What PEFT adds at the end of a card.
_VERSIONS = "### Framework versions"
_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def update_model_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    metrics: Mapping[str, float | str] | None = None,
    earlier: ModelCardData | None = None,
) -> None:
    """Write the section on S0 into the model card of a folder of adapters, and their tags into its metadata.

    Saving with PEFT does this. Call it for a folder that transformers saved, or whose card a trainer wrote afterwards.
    What was written outside of the section stays, and a section that was moved stays where it is.

    Args:
        folder: folder that `save_pretrained` wrote: an adapter, or adapters in folders of their own.
        repo_id: the repository that the card's example loads from. `None`: the folder.
        revision: the branch that it loads from there. `None`: the repository's main one.
        metrics: what these states reach, such as `{"HumanEval pass@1": "72.2 %"}`. The next save leaves them out again,
            for its states may be others.
        earlier: metadata whose tags and base model are to be kept; saving with PEFT puts its own in their place.

    Raises:
        TypeError: if the metrics are no names with texts or numbers.
        ValueError: if there is no S0 adapter in the folder that can be read; further ones are passed over then.
    """
    check_metrics(metrics or {})
    folder = Path(folder)
    adapters = _find_adapters(folder)
    if not adapters:
        raise ValueError(
            f"'{folder}' holds no S0 adapter that can be read, so there is nothing for its model card to say."
        )
    file = folder / CARD_NAME
    card = ModelCard.load(file) if file.exists() else ModelCard("---\nlibrary_name: peft\n---\n")
    _update_metadata(cast(ModelCardData, card.data), adapters[0].base, earlier or ModelCardData())
    place = _arguments(repo_id or folder.resolve().name, revision)
    card.text = _place(_describe(adapters, place, repo_id is not None, metrics or {}), card.text)
    with new_file(file, overwrite=True) as temporary:
        card.save(temporary)


def check_metrics(metrics: Any) -> None:
    """Refuse what a card cannot show as metrics.

    Raises:
        TypeError: naming what was found.
    """
    expected = "metrics must be a dict of names to texts or numbers, such as {'pass@1': 0.72}; found "
    if not isinstance(metrics, Mapping):
        raise TypeError(f"{expected}{type(metrics).__name__}.")
    for name, value in metrics.items():
        if not isinstance(value, (str, Real)):
            raise TypeError(f"{expected}{type(value).__name__} for {name!r}.")


def update_card_of_peft(folder: Path) -> None:
    """Call `update_model_card` if PEFT has written a card for the adapter in a folder.

    PEFT puts an adapter of another name than "default" into a folder below the one that its card is in.

    Warns:
        UserWarning: if that fails. Whatever lies in the folder, saving goes on: there may be further adapters to save.
    """
    for place in (folder, folder.parent):
        file = place / CARD_NAME
        if file.exists() and "\nlibrary_name: peft\n" in file.read_text(encoding="utf-8"):
            try:
                update_model_card(place)
            except Exception as error:
                warnings.warn(
                    f"The adapter is saved, but its section of the model card '{file}' is not up to date "
                    f"({type(error).__name__}: {error}). Write it with peft_s0.update_model_card('{place}').",
                    stacklevel=3,
                )
            return


def tag_model(model: Any) -> None:
    """Tag a transformers model as adapted by S0, for the cards that transformers and trainers write."""
    if hasattr(model, "add_model_tags"):
        model.add_model_tags(_TAG)


def untag_model(model: Any) -> None:
    """Undo `tag_model`."""
    if _TAG in (getattr(model, "model_tags", None) or ()):
        model.model_tags = [tag for tag in model.model_tags if tag != _TAG] or None


@dataclass(frozen=True)
class _Adapter:
    """What a saved adapter says of itself.

    Args:
        folder: its folder, relative to the card's; "." for the same.
        config: its config.
        layers: number of layers with a state; None, as what follows, if its states are not in a safetensors file.
        parameters: number of parameters in the file.
        size: bytes of the file.
        storage: how its states are stored.
        alphas: those that were learnt, one for each layer.
    """

    folder: str
    config: dict[str, Any]
    layers: int | None = None
    parameters: int | None = None
    size: int | None = None
    storage: str | None = None
    alphas: tuple[float, ...] = ()

    @property
    def base(self) -> str | None:
        """Name or path of the base model."""
        return self.config.get("base_model_name_or_path")

    @property
    def variant(self) -> str:
        """What is learnt."""
        return str(self.config.get("variant", "initial"))

    @property
    def base_class(self) -> str | None:
        """Class of the base model, if it is one of transformers' and PEFT has recorded it."""
        mapping = self.config.get("auto_mapping") or {}
        return mapping["base_model_class"] if mapping.get("parent_library", "").startswith("transformers.") else None


def _find_adapters(folder: Path) -> list[_Adapter]:
    # A folder with a card of its own is a save of its own, such as a trainer's checkpoint; a hidden one is half-done.
    folders = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    below = sorted(path for path in folders if not (path / CARD_NAME).exists())
    adapters = []
    for place in (folder, *below):
        try:
            config = json.loads((place / CONFIG_NAME).read_text(encoding="utf-8"))
            if isinstance(config, dict) and config.get("peft_type") == "S0":
                adapters.append(_Adapter(str(place.relative_to(folder)), config, *_measure(place)))
        except (OSError, ValueError, SafetensorError):
            continue  # no adapter, or one that cannot be loaded either
    return adapters


def _measure(folder: Path) -> tuple[int, int, int, str, tuple[float, ...]] | tuple[()]:
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.exists():
        return ()
    found = contents(file)
    states = {name: storage for name, (storage, _) in found.items() if is_state(name)}
    layers = {name.rpartition(".s0.")[0] for name in states}
    parameters = sum(values for _, values in found.values())
    with safe_open(file, framework="pt") as tensors:
        alphas = tuple(float(tensors.get_tensor(name)) for name in found if ".s0_alpha." in name)
    return len(layers), parameters, file.stat().st_size, ", ".join(sorted(set(states.values()))), alphas


def _hub_id(name: str | None) -> str | None:
    """A base model's name if it can be one on the Hub; None if it is a local folder or not known."""
    possible = name is not None and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not Path(name).exists()
    return name if possible else None


def _update_metadata(data: ModelCardData, base: str | None, earlier: ModelCardData) -> None:
    if _hub_id(base) is None and data.base_model == base:
        # PEFT takes a local path for a name; the Hub refuses such a card.
        data.base_model = None
    data.base_model = data.base_model or _hub_id(base) or earlier.base_model
    tags = [*(earlier.tags or []), *(data.tags or []), "peft", _TAG]
    tags = [tag for tag in tags if not tag.startswith(_BASE_TAG) or _hub_id(tag.removeprefix(_BASE_TAG))]
    data.library_name = "peft"
    data.tags = list(dict.fromkeys(tags))


def _arguments(name: str, revision: str | None) -> str:
    """What from_pretrained is called with for a name, and its revision if there is one."""
    return _quoted(name) + (f", revision={_quoted(revision)}" if revision else "")


def _quoted(text: str) -> str:
    """A text as Python code has it."""
    return json.dumps(text, ensure_ascii=False)


def _describe(adapters: list[_Adapter], place: str, on_hub: bool, metrics: Mapping[str, float | str]) -> str:
    """The section on S0; the first adapter's base model stands for all.

    Args:
        adapters: what it is about.
        place: the arguments by which they are loaded.
        on_hub: whether that is a repository.
        metrics: what the states reach.
    """
    first = adapters[0]
    known = _hub_id(first.base)
    model_class = first.base_class
    if model_class is None or model_class.endswith("ForCausalLM"):
        model_class = _AUTO_CLASSES.get(first.config.get("task_type") or "", "AutoModelForCausalLM")
    loading = []
    for adapter in adapters:
        arguments = place
        if adapter.folder != ".":
            arguments += f", adapter_name={_quoted(adapter.folder)}, subfolder={_quoted(adapter.folder)}"
        loading.append(
            f"model = PeftModel.from_pretrained(model, {arguments})"
            if adapter is first
            else f"model.load_adapter({arguments})"
        )
    variants = {adapter.variant for adapter in adapters}
    return _SECTION.format(
        learnt=_LEARNT[variants.pop() if len(variants) == 1 else "both"],
        base=f"[{known}](https://huggingface.co/{known})" if known else f"a local {first.base_class or 'model'}",
        base_source=_arguments(known, first.config.get("revision")) if known else '"path/to/the/base/model"',
        model_class=model_class,
        loading="\n".join(loading) + ("" if on_hub else "  # this folder, or the name of its repository"),
        table=_table(adapters) + (f"\n\n{_rows([('metric', 'value'), *metrics.items()])}" if metrics else ""),
    )


def _table(adapters: list[_Adapter]) -> str:
    """A row for each adapter; a setting that none of them makes use of has no column."""
    columns = {
        "adapter": [f"`{adapter.folder}`" if adapter.folder != "." else "default" for adapter in adapters],
        "alpha": [_shown_alpha(adapter) for adapter in adapters],
    }
    if any(adapter.variant != "initial" for adapter in adapters):
        columns["variant"] = [adapter.variant for adapter in adapters]
    for name in ("train_alpha", "normalize", "rank"):
        if any(adapter.config.get(name) for adapter in adapters):
            columns[name] = [_shown(adapter.config.get(name)) for adapter in adapters]
    if all(adapter.size for adapter in adapters):
        columns["layers"] = [str(adapter.layers) for adapter in adapters]
        columns["parameters"] = [f"{adapter.parameters:,}" for adapter in adapters]
        columns["file"] = [_shown_size(adapter.size or 0) for adapter in adapters]
        columns["storage"] = [adapter.storage or "" for adapter in adapters]
    return _rows([tuple(columns), *zip(*columns.values(), strict=True)])


def _rows(rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table, the first row its header."""
    cells = [[_cell(cell) if isinstance(cell, str) else _shown(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (cells[0], ["---"] * len(cells[0]), *cells[1:]))


def _cell(text: str) -> str:
    """A text that ends neither its cell nor its row."""
    return " ".join(text.replace("|", r"\|").splitlines())


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        # In full, not as 1.23457e+06.
        return str(value)
    return "-" if value is None else f"{value:g}"


def _shown_alpha(adapter: _Adapter) -> str:
    """One number, or the range where layers have their own."""
    alpha = _shown(adapter.config.get("alpha"))
    own, how = list(adapter.alphas), "learnt from"
    if not own:
        own, how = list((adapter.config.get("alpha_pattern") or {}).values()), "others"
    if not own:
        return alpha
    shown = f"{_shown(min(own))} to {_shown(max(own))}"
    return f"{shown} by layer, {how} {alpha}"


def _shown_size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _place(section: str, text: str) -> str:
    """A card's text with the section in its place, or in front where it has none yet."""
    before, start, rest = text.partition(_START)
    _, end, after = rest.partition(_END)
    if start and end:
        return before + section + after
    written, versions, rest = text.partition(_VERSIONS)
    if written.split() == ModelCard.from_template(ModelCardData()).text.split():
        # An empty template, in which nobody has written anything.
        text = versions + rest
    return f"\n{section}\n\n{text.lstrip()}"
