"""State files of others: what they mean, that nothing is lost either way, and what is refused.

RWKV's models are fla's, whose kernels have an environment of their own: tests/kernels/test_rwkv_states.py. Files on the
Hub are in test_cli.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, VOCABULARY, Architecture, mixers
from peft import PeftModel, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from reference import with_slow_mixers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache
from tuned import states_of, tune

from peft_s0 import S0Config, convert
from peft_s0.convert import export_rwkv, export_s0_tuning, import_rwkv, import_s0_tuning
from peft_s0.export.states import read_start
from peft_s0.mixers import cache_argument
from peft_s0.skeleton import load_without_weights

ROWS = {row.name: row for row in ARCHITECTURES}
NAMES = {"qwen3_5": ("gated_delta_net", "linear_attn"), "falcon_h1": ("mamba2", "mamba")}
# PEFT's use of transformers, which pytest.warns gives out again as if it came from elsewhere.
PASSED_ON = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
ADAPTER = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(autouse=True, scope="module")
def _no_grad():
    with torch.no_grad():
        yield


def save(folder: Path, architecture: Architecture, seed: int = 0, **changes: Any) -> dict[int, Tensor]:
    """Write a folder as that library's own `save` does, by its description; return the states.

    Args:
        folder: the folder.
        architecture: which model's.
        seed: of the states.
        changes: other values in its config.
    """
    found = mixers(architecture.build())
    torch.manual_seed(seed)
    states = {mixer.layer_idx: torch.randn(shape_of(mixer)) for mixer in found}
    folder.mkdir(exist_ok=True)
    save_file({str(index): state for index, state in states.items()}, folder / "states.safetensors")
    config = {"n_steps": 20, "lr": 0.001, "l2_lambda": 0.002, "alpha": 0.3, "normalize": False, "grad_clip": 1.0}
    config = {**config, "max_length": 2048, **changes}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shape = list(next(iter(states.values())).shape)
    meta = {"arch": NAMES[architecture.name][0], "recurrent_layers": sorted(states), "state_shape": shape}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2))
    return states


def shape_of(mixer: Any) -> tuple[int, ...]:
    """Of the states in that library: heads, then key and value dimension, or head and state dimension."""
    if hasattr(mixer, "ssm_state_size"):
        return mixer.num_heads, mixer.head_dim, mixer.ssm_state_size
    return mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}, indent=2))


def change_states(folder: Path, change: Any) -> None:
    states = load_file(folder / "states.safetensors")
    change(states)
    save_file(states, folder / "states.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def logits_from_a_cache(model: Any, states: dict[int, Tensor], ids: Tensor) -> Tensor:
    """Logits of the base model, given a cache in which each recurrent layer has a state, and else nothing has."""
    cache = DynamicCache(config=model.config)
    for mixer in mixers(model):
        channels, _, width = mixer.conv1d.weight.shape
        cache.update_conv_state(torch.zeros(len(ids), channels, width), mixer.layer_idx)
        cache.update_recurrent_state(states[mixer.layer_idx].repeat(len(ids), 1, 1, 1), mixer.layer_idx)
    return model(ids, **{cache_argument(type(model)): cache}).logits


@pytest.fixture
def base(architecture: Architecture, tmp_path: Path) -> Path:
    architecture.build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def theirs(architecture: Architecture, tmp_path: Path) -> Path:
    save(tmp_path / "theirs", architecture)
    return tmp_path / "theirs"


@pytest.mark.parametrize(
    ("changes", "scale"),
    [({}, 0.3), ({"normalize": True, "alpha": 5.0}, None), ({"alpha": None}, "default")],
    ids=["alpha", "normalize", "no alpha"],
)
def test_what_sequences_start_from(
    architecture: Architecture, base: Path, tmp_path: Path, changes: dict[str, Any], scale: float | str | None
) -> None:
    states = save(tmp_path / "theirs", architecture, **changes)
    if scale is None:
        scaled = {index: 5.0 * state / state.square().sum().sqrt() for index, state in states.items()}
    else:
        factor = architecture.alpha if scale == "default" else scale
        scaled = {index: factor * state for index, state in states.items()}
    import_s0_tuning(tmp_path / "theirs", tmp_path / "adapter", base)
    model = PeftModel.from_pretrained(architecture.build(), tmp_path / "adapter")
    ids = torch.randint(3, 100, (2, 9))
    actual, plain = model(ids).logits, architecture.build()
    effect = (actual - plain(ids).logits).abs().max()
    assert effect > 0.05
    by_cache = logits_from_a_cache(plain, scaled, ids)
    names = {f"model.layers.{index}.{NAMES[architecture.name][1]}": state for index, state in scaled.items()}
    by_formula = with_slow_mixers(plain, architecture.slow_mixer, names)(ids, use_cache=False).logits
    for expected in (by_cache, by_formula):
        assert (actual - expected).abs().max() < 1e-5 * effect


def test_what_is_carried(architecture: Architecture, base: Path, theirs: Path, tmp_path: Path) -> None:
    import_s0_tuning(theirs, tmp_path / "adapter", base)
    assert sorted(contents(tmp_path / "adapter")) == ADAPTER
    config = S0Config.from_pretrained(tmp_path / "adapter")
    assert (config.alpha, config.train_alpha, config.normalize, config.l2_lambda) == (0.3, 1.0, False, 0.002)
    assert (config.base_model_name_or_path, config.task_type) == (str(base), "CAUSAL_LM")
    assert config.target_modules == architecture.targets
    assert config.layers_to_transform is None
    stored, states = (
        load_file(file) for file in (tmp_path / "adapter" / "adapter_model.safetensors", theirs / "states.safetensors")
    )
    mixer = NAMES[architecture.name][1]
    assert stored.keys() == {f"base_model.model.model.layers.{i}.{mixer}.s0.s0_state.weight" for i in states}
    for i, state in states.items():
        assert torch.equal(stored[f"base_model.model.model.layers.{i}.{mixer}.s0.s0_state.weight"], state)
    # The card names the folder by its name, not that in which it was written.
    assert '"adapter")' in (tmp_path / "adapter" / "README.md").read_text()
    assert not list(tmp_path.glob(".*"))
    # As that library trains: the bare state.
    model = PeftModel.from_pretrained(architecture.build(), tmp_path / "adapter", is_trainable=True).train()
    layer = next(model.base_model.tuner_layers())
    assert torch.equal(layer.effective_state("default"), layer.state("default").weight)


def test_from_a_model_without_a_name(architecture: Architecture, theirs: Path, tmp_path: Path) -> None:
    base = architecture.build()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    import_s0_tuning(theirs, tmp_path / "adapter", base)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not any("s0" in name.split(".") for name, _ in base.named_modules())
    export_s0_tuning(tmp_path / "adapter", tmp_path / "again", base)
    assert contents(tmp_path / "again") == contents(theirs)
    with pytest.raises(ValueError, match="does not say which base model it is for; name the base model"):
        export_s0_tuning(tmp_path / "adapter", tmp_path / "other")


def test_there_and_back_is_the_same_bytes(architecture: Architecture, base: Path, theirs: Path, tmp_path: Path) -> None:
    import_s0_tuning(theirs, tmp_path / "adapter", base)
    export_s0_tuning(tmp_path / "adapter", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(theirs)
    import_s0_tuning(tmp_path / "again", tmp_path / "adapter-again", base)
    first, second = contents(tmp_path / "adapter"), contents(tmp_path / "adapter-again")
    assert first["README.md"].replace(b'"adapter"', b'"adapter-again"') == second["README.md"]
    assert first["adapter_config.json"] == second["adapter_config.json"]
    assert_same_states(tmp_path / "adapter", tmp_path / "adapter-again")


def assert_same_states(*folders: Path) -> None:
    """Bit for bit, and with the same metadata, whose order in a file is a matter of chance."""
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    metadata = []
    for folder in folders:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            metadata.append(file.metadata())
    assert metadata[0] == metadata[1]


def test_an_adapter_there_and_back(architecture: Architecture, base: Path, tmp_path: Path) -> None:
    """Trained here; how it was trained is not made up."""
    model = get_peft_model(
        type(architecture.build()).from_pretrained(base), S0Config(init_weights=1.0, alpha=0.4, normalize=True)
    ).eval()
    model.save_pretrained(tmp_path / "adapter")
    export_s0_tuning(tmp_path / "adapter", tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text()) == {
        "l2_lambda": 5e-4,
        "alpha": 0.4,
        "normalize": True,
    }
    import_s0_tuning(tmp_path / "theirs", tmp_path / "again", base)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    ids = torch.randint(3, 100, (2, 9))
    loaded = PeftModel.from_pretrained(architecture.build(), tmp_path / "again")
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_low_rank_is_written_in_full(architecture: Architecture, base: Path, tmp_path: Path) -> None:
    model = get_peft_model(
        type(architecture.build()).from_pretrained(base), S0Config(init_weights=1.0, alpha=0.4, rank=2)
    ).eval()
    model.save_pretrained(tmp_path / "adapter")
    export_s0_tuning(tmp_path / "adapter", tmp_path / "theirs")
    for index, state in load_file(tmp_path / "theirs" / "states.safetensors").items():
        mixer = next(mixer for mixer in mixers(model) if mixer.layer_idx == int(index))
        u, v = mixer.s0.s0_state["default"].weight.split(shape_of(mixer)[1:], dim=1)
        torch.testing.assert_close(state, torch.einsum("hir,hjr->hij", u, v), atol=1e-6, rtol=1e-6)
    import_s0_tuning(tmp_path / "theirs", tmp_path / "again", base)
    ids = torch.randint(3, 100, (2, 9))
    loaded = PeftModel.from_pretrained(architecture.build(), tmp_path / "again")
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.filterwarnings(PASSED_ON)
def test_some_layers_only(architecture: Architecture, base: Path, theirs: Path, tmp_path: Path) -> None:
    """A state that is not there is the base model's zero, as in that library."""
    change_states(theirs, lambda states: states.pop("0"))
    with pytest.warns(UserWarning, match=r"has states for \d of the \d recurrent layers; layers 0 start from zero"):
        import_s0_tuning(theirs, tmp_path / "adapter", base)
    states = {int(index): 0.3 * state for index, state in load_file(theirs / "states.safetensors").items()}
    model, plain = PeftModel.from_pretrained(architecture.build(), tmp_path / "adapter"), architecture.build()
    ids = torch.randint(3, 100, (2, 9))
    states[0] = torch.zeros(shape_of(mixers(plain)[0]))
    actual, expected = model(ids).logits, logits_from_a_cache(plain, states, ids)
    assert (actual - expected).abs().max() < 1e-5 * (actual - plain(ids).logits).abs().max()
    export_s0_tuning(tmp_path / "adapter", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(theirs)


@pytest.mark.filterwarnings(PASSED_ON)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"recurrent_layers": [0, 1, 2, 3, 4]},
            r"recurrent_layers in meta.json is \[0, 1, 2, 3, 4\].*The states count",
        ),
        ({"state_shape": [1, 2, 3]}, r"state_shape in meta.json is \[1, 2, 3\], but the states are \[4, 16.*count"),
    ],
)
def test_meta_that_is_not_right(
    architecture: Architecture, base: Path, theirs: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    import_s0_tuning(theirs, tmp_path / "expected", base)
    change_json(theirs / "meta.json", **changes)
    with pytest.warns(UserWarning, match=message):
        import_s0_tuning(theirs, tmp_path / "adapter", base)
    assert_same_states(tmp_path / "expected", tmp_path / "adapter")


def test_states_alone(architecture: Architecture, base: Path, theirs: Path, tmp_path: Path) -> None:
    """That library takes its own defaults then."""
    (theirs / "config.json").unlink()
    (theirs / "meta.json").unlink()
    import_s0_tuning(theirs, tmp_path / "adapter", base)
    config = S0Config.from_pretrained(tmp_path / "adapter")
    assert (config.alpha, config.normalize, config.l2_lambda) == (architecture.alpha, False, 5e-4)


def _rename(states: dict[str, Tensor]) -> None:
    states["layers.0"] = states.pop("0")


def _transpose(states: dict[str, Tensor]) -> None:
    states["0"] = states["0"][..., :7].transpose(1, 2).contiguous()


def _half(states: dict[str, Tensor]) -> None:
    states["0"] = states["0"].half()


def _nan(states: dict[str, Tensor]) -> None:
    states["1"][0, 0, :3] = float("nan")


def _another_layer(states: dict[str, Tensor]) -> None:
    states["17"] = states["0"].clone()


BROKEN: dict[str, tuple[Any, str]] = {
    "no files": (lambda f: (f / "states.safetensors").unlink(), r"has no states\.safetensors, which the s0-tuning"),
    "pickle": (
        lambda f: (f / "states.safetensors").rename(f / "states.pt"),
        r"Its states\.pt is a pickle file, which can run code.*save_file",
    ),
    "truncated": (
        lambda f: (f / "states.safetensors").write_bytes((f / "states.safetensors").read_bytes()[:-10]),
        r"is not a whole safetensors file",
    ),
    "empty": (
        lambda f: save_file({}, f / "states.safetensors"),
        r"named by the index of their decoder layer.*found none",
    ),
    "keys": (lambda f: change_states(f, _rename), r"such as '0', found 'layers\.0'"),
    "layer": (
        lambda f: change_states(f, _another_layer),
        r"for layers 0, 1,.* 17, but \w+ has no recurrent layer 17; its recurrent layers are 0, 1",
    ),
    "shape": (
        lambda f: change_states(f, _transpose),
        r"state '0' does not fit.*expected shape \[4, 16, (8|16)\], found \[4, 7, 16\]",
    ),
    "dtype": (lambda f: change_states(f, _half), r"state of layer 0 has dtype torch\.float16, expected torch\.float32"),
    "nan": (lambda f: change_states(f, _nan), r"state '1' has 3 of \d+ values that are NaN or infinite"),
    "json": (lambda f: (f / "config.json").write_text("{"), r"config\.json' is not JSON"),
    "list": (lambda f: (f / "meta.json").write_text("[]"), r"meta\.json' must hold a JSON object, found a list"),
    "field": (
        lambda f: change_json(f / "config.json", mode="x"),
        r"field 'mode' in its config\.json.*how its states are meant",
    ),
    "type": (lambda f: change_json(f / "config.json", normalize=1), r"normalize in config\.json must be bool, found 1"),
    "alpha": (
        lambda f: change_json(f / "config.json", alpha="0.3"),
        r"alpha in config\.json must be int or float or None",
    ),
    "negative": (
        lambda f: change_json(f / "config.json", alpha=-0.3),
        r"alpha must be a finite number >= 0, got -0\.3",
    ),
    "architecture": (
        lambda f: change_json(f / "meta.json", arch="rwkv"),
        r"has states of the architecture 'rwkv', but \w+ForCausalLM is '(gated_delta_net|mamba2)'",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_refused(architecture: Architecture, base: Path, theirs: Path, tmp_path: Path, name: str) -> None:
    change, message = BROKEN[name]
    change(theirs)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        import_s0_tuning(theirs, tmp_path / "adapter", base)
    assert sorted(tmp_path.iterdir()) == before


def test_a_subfolder_that_is_not_there(theirs: Path, base: Path, tmp_path: Path) -> None:
    """A folder's own is not looked for on the Hub."""
    with pytest.raises(ValueError, match=r"theirs' has no states\.safetensors, which the s0-tuning"):
        import_s0_tuning(theirs, tmp_path / "adapter", base, subfolder="nowhere")


def test_states_of_another_model(theirs: Path, architecture: Architecture, tmp_path: Path) -> None:
    other = next(ROWS[name] for name in NAMES if name != architecture.name).build()
    with pytest.raises(ValueError, match=r"has states of the architecture '.*', but .* is '.*'. Name the base model"):
        import_s0_tuning(theirs, tmp_path / "adapter", other)
    for name, message in (
        ("jamba", r"JambaForCausalLM has 'model\.layers\.\d\.mamba' of the family Mamba: that format has no place"),
        ("mamba2", r"knows gated delta rule mixers called 'linear_attn' and Mamba-2 mixers called 'mamba'.*backbone"),
        ("kimi_linear", r"KimiLinearForCausalLM has 'model\.layers\.0\.self_attn' of the family gated delta rule"),
    ):
        with pytest.raises(ValueError, match=message):
            import_s0_tuning(theirs, tmp_path / "adapter", ROWS[name].build())
    llama = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(NoMatchingPeftModuleError, match="LlamaForCausalLM has no recurrent layers"):
        import_s0_tuning(theirs, tmp_path / "adapter", transformers.LlamaForCausalLM(llama))
    with pytest.raises(ValueError, match=r"has adapters\. Pass the base model alone"):
        import_s0_tuning(theirs, tmp_path / "adapter", tune(architecture).model)
    with pytest.raises(TypeError, match="must be a model of transformers, its folder or its Hub id, got Linear"):
        import_s0_tuning(theirs, tmp_path / "adapter", nn.Linear(1, 1))
    assert not (tmp_path / "adapter").exists()


def test_a_layer_where_that_library_does_not_look(tmp_path: Path) -> None:
    """Zamba2's hybrid layers have their mixer one step further down."""
    base = ROWS["zamba2"].build()
    get_peft_model(ROWS["zamba2"].build(), S0Config()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"has a state for '.*mamba_decoder\.mamba', where the s0-tuning library does"):
        export_s0_tuning(tmp_path / "adapter", tmp_path / "theirs", base)


@pytest.mark.parametrize("scales", [{"alpha_pattern": {"0.linear_attn": 0.5}}, {"learn_alpha": True}], ids=str)
def test_alphas_of_layers_have_no_place_there(tmp_path: Path, scales: dict[str, Any]) -> None:
    model = tune(ROWS["qwen3_5"], alpha=0.25, **scales).model
    for layer in model.base_model.tuner_layers():
        for alpha in layer.s0_alpha.values():
            alpha.weight.mul_(2)
    model.save_pretrained(tmp_path / "adapter")
    message = (
        r"scales the state of 'model\.layers\.0\.linear_attn' by something else than alpha=0\.25; .* one alpha for all"
    )
    with pytest.raises(ValueError, match=message):
        export_s0_tuning(tmp_path / "adapter", tmp_path / "theirs", ROWS["qwen3_5"].build())
    assert not (tmp_path / "theirs").exists()


def test_an_adapter_of_more_than_states(tmp_path: Path) -> None:
    base = ROWS["qwen3_5"].build()
    model = get_peft_model(ROWS["qwen3_5"].build(), S0Config(modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "adapter")
    for export in (export_s0_tuning, export_rwkv):
        with pytest.raises(ValueError, match="has modules_to_save or trainable_token_indices, for which this format"):
            export(tmp_path / "adapter", tmp_path / "theirs", base)
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("rank", [None, 2])
def test_embeddings_that_were_saved_have_no_place_there(
    architecture: Architecture, base: Path, tmp_path: Path, rank: int | None
) -> None:
    """PEFT saves them where it is told to, and by itself where the vocabulary was resized."""
    model = get_peft_model(architecture.build(), S0Config(alpha=0.5, init_weights=1.0, rank=rank))
    model.save_pretrained(tmp_path / "told", save_embedding_layers=True)
    resized = transformers.AutoModelForCausalLM.from_pretrained(base)
    resized.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    model = get_peft_model(resized, S0Config(alpha=0.5, init_weights=1.0, rank=rank))
    with pytest.warns(UserWarning, match="as the embedding layer has been resized"):
        model.save_pretrained(tmp_path / "resized")
    model.save_pretrained(tmp_path / "states", save_embedding_layers=False)
    message = "weight' beside its states, for which there is no place.*save_embedding_layers=False"
    for name in ("told", "resized"):
        with pytest.raises(ValueError, match=message):
            export_s0_tuning(tmp_path / name, tmp_path / "theirs", base)
        with pytest.raises(ValueError, match=message):
            read_start(tmp_path / name, base_model=base)
        assert not (tmp_path / "theirs").exists()
    export_s0_tuning(tmp_path / "states", tmp_path / "theirs", base)
    # What needs no more than the states is told them all the same.
    loaded = load_without_weights(tmp_path / "resized", base)
    for name, state in states_of(model).items():
        assert torch.equal(states_of(loaded)[name], state)


@pytest.mark.parametrize("field", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5]}], ids=str)
def test_states_without_weights(architecture: Architecture, base: Path, tmp_path: Path, field: dict[str, Any]) -> None:
    model = get_peft_model(architecture.build(), S0Config(task_type="CAUSAL_LM", init_weights=1.0, **field))
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_without_weights(tmp_path / "adapter", base)
    for name, state in states_of(model).items():
        assert torch.equal(states_of(loaded)[name], state)
    assert all(parameter.is_meta for name, parameter in loaded.named_parameters() if "s0_state" not in name)


def test_a_bare_backbone(architecture: Architecture, theirs: Path, base: Path, tmp_path: Path) -> None:
    """PEFT's class for language models takes only what generates."""
    import_s0_tuning(theirs, tmp_path / "bare", architecture.build().model)
    import_s0_tuning(theirs, tmp_path / "whole", base)
    assert S0Config.from_pretrained(tmp_path / "bare").task_type is None
    expected = architecture.build()
    PeftModel.from_pretrained(expected, tmp_path / "whole")
    backbone = PeftModel.from_pretrained(architecture.build().model, tmp_path / "bare")
    ids = torch.randint(3, 90, (2, 9))
    assert torch.equal(backbone(ids).last_hidden_state, expected.model(ids).last_hidden_state)


def test_a_place_that_is_taken(architecture: Architecture, base: Path, theirs: Path, tmp_path: Path) -> None:
    place = tmp_path / "adapter"
    place.mkdir()  # an empty folder is free
    import_s0_tuning(theirs, place, base)
    first = contents(place)
    with pytest.raises(FileExistsError, match=r"adapter' exists already.*overwrite=True"):
        import_s0_tuning(theirs, place, base)
    save(theirs, architecture, seed=1)
    import_s0_tuning(theirs, place, base, overwrite=True)
    second = contents(place)
    assert second.keys() == first.keys()
    assert second["adapter_model.safetensors"] != first["adapter_model.safetensors"]
    (place / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"exists already|holds 'notes\.txt'.* would be lost"):
            import_s0_tuning(theirs, place, base, overwrite=overwrite)
    assert contents(place) == {**second, "notes.txt": b"mine"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file' is a file; choose another name"):
        import_s0_tuning(theirs, tmp_path / "file", base, overwrite=True)


def test_a_write_that_is_stopped(
    architecture: Architecture, base: Path, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there stays, and nothing is left over."""
    import_s0_tuning(theirs, tmp_path / "adapter", base)
    before, listed = contents(tmp_path / "adapter"), sorted(tmp_path.iterdir())

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "save_file", stop)
    save(tmp_path / "theirs", architecture, seed=1)
    with pytest.raises(KeyboardInterrupt):
        import_s0_tuning(theirs, tmp_path / "adapter", base, overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        export_s0_tuning(tmp_path / "adapter", tmp_path / "again")
    assert contents(tmp_path / "adapter") == before
    assert sorted(tmp_path.iterdir()) == listed


def test_rwkv_files_without_fla(theirs: Path, base: Path, tmp_path: Path) -> None:
    """What is said of the file comes first, then that its models are another package's."""
    file = tmp_path / "state.pth"
    good = {f"blocks.{i}.att.time_state": torch.randn(2, 4, 4) for i in range(2)}
    cases: list[tuple[Any, type[Exception], str]] = [
        (
            {**good, "emb.weight": torch.zeros(1)},
            ValueError,
            r"holds 'emb\.weight', expected states only, named blocks\.0",
        ),
        (
            {"blocks.0.att.time_state": torch.zeros(2, 4, 4).half()},
            ValueError,
            "dtype torch.float16, expected float32 or",
        ),
        ([torch.zeros(1)], ValueError, "must hold tensors by their names, found list"),
        (
            {"blocks.0.att.time_state": object()},
            ValueError,
            "no file of tensors that torch.load reads with weights_only",
        ),
        (good, ImportError, "need flash-linear-attention: pip install 'peft-s0\\[fla\\]'"),
    ]
    for content, error, message in cases:
        torch.save(content, file)
        with pytest.raises(error, match=message):
            import_rwkv(file, tmp_path / "adapter", base)
    # A failed download may leave words behind.
    for damaged in (file.read_bytes()[:100], b"", b"Repository not found", b"hello world"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="it is damaged"):
            import_rwkv(file, tmp_path / "adapter", base)
    with pytest.raises(FileNotFoundError, match=r"no file '.*none\.pth'"):
        import_rwkv(tmp_path / "none.pth", tmp_path / "adapter", base)
    torch.save(good, file)
    with pytest.raises(ValueError, match=r"time_state files are for RWKV-6 and RWKV-7 .* Qwen3_5ForCausalLM has"):
        import_rwkv(file, tmp_path / "adapter", ROWS["qwen3_5"].build())
    with pytest.raises(ValueError, match=r"in float32 or bfloat16, got dtype=torch\.float16"):
        export_rwkv(tmp_path / "adapter", file, dtype=torch.float16)
    assert not (tmp_path / "adapter").exists()
