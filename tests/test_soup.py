"""A weighted sum of saved adapters, without a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, MAIN, Architecture
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tuned import states_of

from peft_s0 import S0Config, analysis, soup, soups
from peft_s0.config import load_config
from peft_s0.storage import decode

NAMES = ("first", "second", "third")
WEIGHTS = [0.7, -0.2, 1.5]
STATES = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture(autouse=True, scope="module")
def _no_grad():
    with torch.no_grad():
        yield


def save(architecture: Architecture, folder: Path, seed: int = 0, **config: object) -> Path:
    torch.manual_seed(seed)
    model = architecture.build()
    torch.manual_seed(seed + 100)
    get_peft_model(model, S0Config(**{"alpha": 0.6, "init_weights": 1.0, **config})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of one architecture."""
    root = tmp_path_factory.mktemp("adapters")
    return [save(MAIN[0], root / name, seed) for seed, name in enumerate(NAMES)]


@pytest.mark.parametrize("architecture", MAIN, ids=lambda row: row.name)
def test_it_is_the_weighted_adapter_of_a_model(architecture: Architecture, tmp_path: Path) -> None:
    folders = [save(architecture, tmp_path / name, seed) for seed, name in enumerate(NAMES)]
    assert soup(folders, WEIGHTS, tmp_path / "soup") == tmp_path / "soup"
    model = PeftModel.from_pretrained(architecture.build(), folders[0], adapter_name="first")
    for folder in folders[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    model.base_model.add_weighted_adapter(list(NAMES), WEIGHTS, "mixture")
    model.load_adapter(tmp_path / "soup", adapter_name="soup")
    ids = torch.randint(3, 99, (2, 9))
    model.set_adapter("mixture")
    mixture, expected = states_of(model), model(ids).logits
    model.set_adapter("soup")
    for name, state in states_of(model).items():
        torch.testing.assert_close(state, mixture[name])
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)
    assert model.peft_config["soup"].alpha == 0.6


def test_the_mean_by_hand(folders: list[Path], tmp_path: Path) -> None:
    soup(folders, None, tmp_path / "soup")
    states = [load_file(folder / STATES) for folder in folders]
    actual = load_file(tmp_path / "soup" / STATES)
    assert actual.keys() == states[0].keys()
    for name, state in actual.items():
        expected = sum(other[name].double() for other in states) / 3
        assert state.dtype == torch.float32
        torch.testing.assert_close(state, expected.float(), atol=1e-7, rtol=1e-6)


def test_one_adapter_is_a_copy(folders: list[Path], tmp_path: Path) -> None:
    soup(folders[:1], [1.0], tmp_path / "copy")
    before, after = load_file(folders[0] / STATES), load_file(tmp_path / "copy" / STATES)
    assert all(torch.equal(after[name], state) for name, state in before.items())


def test_offsets_are_added_as_well(tmp_path: Path) -> None:
    folders = [save(MAIN[0], tmp_path / name, seed, variant="both") for seed, name in enumerate(NAMES)]
    soup(folders, WEIGHTS, tmp_path / "soup")
    states = [load_file(folder / STATES) for folder in folders]
    actual = load_file(tmp_path / "soup" / STATES)
    assert sum("s0_offset" in name for name in actual) == MAIN[0].states == len(actual) / 2
    for name, state in actual.items():
        expected = sum(weight * other[name] for weight, other in zip(WEIGHTS, states, strict=True))
        torch.testing.assert_close(state, expected)
    assert load_config(tmp_path / "soup").variant == "both"
    PeftModel.from_pretrained(MAIN[0].build(), tmp_path / "soup")


def test_names_of_another_class_of_the_model(tmp_path: Path) -> None:
    rows = {row.name: row for row in ARCHITECTURES}
    text, vision = save(rows["qwen3_5"], tmp_path / "text"), save(rows["qwen3_5_vl"], tmp_path / "vision", 1)
    soup([text, vision], [1.0, 2.0], tmp_path / "soup")
    states = [
        {name.partition("layers")[2]: state for name, state in load_file(folder / STATES).items()}
        for folder in (text, vision, tmp_path / "soup")
    ]
    for name, state in states[2].items():
        torch.testing.assert_close(state, states[0][name] + 2 * states[1][name])


def test_config_and_card(tmp_path: Path) -> None:
    one = save(MAIN[0], tmp_path / "one", init_weights="prompt", init_prompt=[5, 6, 7])
    two = save(MAIN[0], tmp_path / "two", l2_lambda=0.1)
    soup([one, two], [0.25, 0.75], tmp_path / "soup")
    config = load_config(tmp_path / "soup")
    assert (config.init_weights, config.init_prompt, config.alpha, config.inference_mode) == (True, None, 0.6, True)
    card = (tmp_path / "soup" / "README.md").read_text()
    assert "## S0 adapter" in card
    assert f"| {one} | 0.25 |\n| {two} | 0.75 |" in card
    assert sorted(path.name for path in (tmp_path / "soup").iterdir()) == ["README.md", CONFIG, STATES]


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_adapters_that_are_stored_small(folders: list[Path], storage: str, tmp_path: Path) -> None:
    small = save(MAIN[0], tmp_path / "small", 3, storage=storage)
    soup([folders[0], small], [1.0, 2.0], tmp_path / "soup")
    soup([small, folders[0]], [2.0, 1.0], tmp_path / "stored")
    whole, stored = (decode(load_file(tmp_path / name / STATES)) for name in ("soup", "stored"))
    states = [decode(load_file(folder / STATES)) for folder in (folders[0], small)]
    for name, state in whole.items():
        torch.testing.assert_close(state, states[0][name] + 2 * states[1][name])
        error = float((stored[name] - state).abs().max())
        assert 0 < error < 0.02 * float(state.abs().max())
    assert analysis.norms(tmp_path / "stored").norms == pytest.approx(
        [float(state.norm()) for state in stored.values()]
    )


def test_onto_one_of_its_ingredients(folders: list[Path], tmp_path: Path) -> None:
    mine = save(MAIN[0], tmp_path / "mine", 7)
    before = load_file(mine / STATES)
    with pytest.raises(FileExistsError, match="mine' exists already"):
        soup([mine, folders[0]], [1.0, 1.0], mine)
    soup([mine, folders[0]], [1.0, 1.0], mine, overwrite=True)
    other = load_file(folders[0] / STATES)
    for name, state in load_file(mine / STATES).items():
        torch.testing.assert_close(state, before[name] + other[name])
    assert load_config(mine).alpha == 0.6


def test_an_interrupted_save_leaves_the_old_files(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = save(MAIN[0], tmp_path / "mine", 7)
    before = {path.name: path.read_bytes() for path in mine.iterdir()}

    def interrupted(states: dict, file: Path, **kwargs: object) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(soups, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        soup(folders, None, mine, overwrite=True)
    assert list(tmp_path.iterdir()) == [mine]
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == before


def test_a_folder_that_must_stay_where_it_is(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell in it would go on in one that is gone; a mount point cannot be moved."""
    monkeypatch.chdir(tmp_path)
    for place in (".", tmp_path, "/dev"):
        with pytest.raises(FileExistsError, match=r"is the working directory or a mount point; name a folder in it"):
            soup(folders, None, place)
    assert not list(tmp_path.iterdir())
    assert load_config(soup(folders, None, "below")).alpha == 0.6


OTHERS = [
    ({"alpha": 0.5}, "has alpha=0.6, but '.*other' has alpha=0.5. Load the adapters on one model"),
    ({"alpha_pattern": {"layers.0.linear_attn": 0.5}}, "alpha_pattern={}, but '.*other' has alpha_pattern={'layers.0"),
    ({"learn_alpha": True}, "'.*other' has learn_alpha=True: it is the scaled states that add up"),
    ({"train_alpha": 1.0}, "train_alpha=None, but '.*other' has train_alpha=1.0"),
    ({"variant": "offset"}, "variant='initial', but '.*other' has variant='offset'. They act in different ways"),
    ({"rank": 2}, "'.*other' has rank=2: a sum of low-rank states is not of that rank"),
    ({"normalize": True}, "'.*other' has normalize=True: it is the normalised states that add up"),
    (
        {"alpha_pattern": {"0.linear_attn": 2.0}},
        "has alpha_pattern={}, but '.*other' has alpha_pattern={'0.linear_attn",
    ),
    (
        {"learn_alpha": True},
        "'.*other' has learn_alpha=True: it is the scaled states that add up. Load the adapters on",
    ),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*whole modules do not"),
    ({"trainable_token_indices": [5]}, "trainable_token_indices=.*token embeddings do not"),
    (
        {"layers_to_transform": [0]},
        r"has no sum with '.*first': The states do not fit this model. Expected 3 layers, found 1; missing",
    ),
]


@pytest.mark.parametrize(("config", "message"), OTHERS)
def test_adapters_that_do_not_fit_one_another(folders: list[Path], config: dict, message: str, tmp_path: Path) -> None:
    other = save(MAIN[0], tmp_path / "other", **config)
    with pytest.raises(ValueError, match=message):
        soup([folders[0], other], None, tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_other_base_models_shapes_and_values(folders: list[Path], tmp_path: Path) -> None:
    def changed(name: str, change: object, file: str = CONFIG) -> Path:
        folder = save(MAIN[0], tmp_path / name)
        if file == CONFIG:
            content = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps({**content, **change}))
        else:
            states = load_file(folder / file)
            key = sorted(states)[0]
            save_file({**states, **change(key, states[key])}, folder / file)
        return folder

    cases = [
        (
            changed("base", {"base_model_name_or_path": "else/where"}),
            "base_model_name_or_path=None, but '.*base' has .*'else/where'. They are of different base models",
        ),
        (changed("shape", lambda k, s: {k: s[:1].clone()}, STATES), r"expected shape \[4, 16, 8\], found \[1, 16, 8\]"),
        (changed("nan", lambda k, s: {k: s * float("nan")}, STATES), "NaN or infinite"),
        (changed("integers", lambda k, s: {k: s.int()}, STATES), "dtype torch.int32, expected a floating-point dtype"),
        (
            changed("more", lambda k, s: {"base_model.model.lm_head.weight": s.clone()}, STATES),
            "holds 'base_model.model.lm_head.weight' beside its states",
        ),
    ]
    for folder, message in cases:
        with pytest.raises(ValueError, match=message):
            soup([folders[0], folder], None, tmp_path / "soup")
        assert not (tmp_path / "soup").exists()
    (tmp_path / "nan" / STATES).unlink()
    with pytest.raises(ValueError, match=f"has no {STATES}"):
        soup([tmp_path / "nan"], None, tmp_path / "soup")


@pytest.mark.parametrize(
    ("adapters", "weights", "message"),
    [
        ([], None, r"pass a list of adapters, one at least, got \[\]"),
        ("one", None, "pass a list of adapters, one at least, got 'one'"),
        (["one"], [1.0, 2.0], "one weight for each adapter, got 1 adapters and 2 weights"),
        (["one"], [float("inf")], "A weight must be a finite number, got inf"),
        (["one"], ["1"], "A weight must be a finite number, got '1'"),
        (["one"], [True], "A weight must be a finite number, got True"),
    ],
)
def test_bad_arguments(adapters: object, weights: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        soup(adapters, weights, tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_a_sum_that_is_not_finite(folders: list[Path], tmp_path: Path) -> None:
    """States that no loader would take are not written."""
    with pytest.raises(ValueError, match=r"not finite in float32 with the weights \[1e\+40, 1.0\]: too large"):
        soup(folders[:2], [1e40, 1.0], tmp_path / "soup")
    assert not (tmp_path / "soup").exists()
