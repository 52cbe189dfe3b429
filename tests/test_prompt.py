"""States without training: an adapter of what a prompt leaves in the recurrent layers."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, MAIN, Architecture, mixers
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from reference import with_slow_mixers
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin
from tuned import states_of, tune

from peft_s0 import S0Config, S0Layer, calibrate_alpha, compress_adapter, state_from_prompt
from peft_s0.layer import InitialState
from peft_s0.mixers import find_mixer
from peft_s0.probing import final_states, token_rows

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from miniature.base import FOLDER, load_base, load_tokenizer

ROWS = {row.name: row for row in ARCHITECTURES}
KEPT = [row for row in ARCHITECTURES if row.name != "xlstm"]
CHUNKED = [row for row in KEPT if row.takes_chunks and "mamba1" not in row.slow_mixer.__module__]
TEXT = "def total(x):"


@pytest.fixture(autouse=True, scope="module")
def _no_grad():
    with torch.no_grad():
        yield


def ids(tokens: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 99, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def naive_ends(architecture: Architecture, model: PreTrainedModel, prompt: list[int]) -> dict[str, Tensor]:
    """What the naive twins end a prompt in, float64, by the mixers' names."""
    names = {name for name, module in model.named_modules() if any(module is mixer for mixer in mixers(model))}
    found = {name: model.get_submodule(name) for name in names}
    zeros = {name: torch.zeros(find_mixer(type(mixer)).state_shape(mixer)) for name, mixer in found.items()}
    slow = with_slow_mixers(model, architecture.slow_mixer, zeros)
    slow(torch.tensor([prompt]), use_cache=False)
    return {name: slow.get_submodule(name).final[0] for name in names}


@pytest.mark.parametrize("architecture", KEPT, ids=lambda row: row.name)
@pytest.mark.parametrize("tokens", [1, 13])
def test_the_states_are_those_at_the_end_of_the_prompt(architecture: Architecture, tokens: int) -> None:
    prompt = ids(tokens)
    base = architecture.build().requires_grad_(False)
    expected = naive_ends(architecture, base, prompt)
    model = state_from_prompt(architecture.build(), None, prompt)
    actual = states_of(model)
    assert model.peft_config["default"].alpha == 1.0
    assert actual.keys() == expected.keys()
    for name, state in actual.items():
        assert state.dtype == torch.float32
        torch.testing.assert_close(
            state.double(), expected[name], atol=2e-5 * float(expected[name].abs().max()), rtol=0
        )
    # And sequences start from them.
    slow = with_slow_mixers(base, architecture.slow_mixer, {name: state.double() for name, state in expected.items()})
    row = torch.tensor([ids(9, seed=1)])
    logits = slow(row, use_cache=False).logits.float()
    torch.testing.assert_close(model(row, use_cache=False).logits, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", CHUNKED, ids=lambda row: row.name)
def test_a_prompt_in_pieces_is_the_same(architecture: Architecture) -> None:
    model, row = architecture.build(), torch.tensor(ids(14))
    whole = final_states(model, row)
    for chunk_size in (1, 4, 13):
        for mixer, state in final_states(model, row, chunk_size).items():
            torch.testing.assert_close(state, whole[mixer], atol=1e-6 * (1 + float(whole[mixer].abs().max())), rtol=0)


@pytest.mark.parametrize("name", ["mamba", "jamba", "zamba", "minimax", "recurrent_gemma"])
def test_a_base_model_that_forgets_between_calls_gets_the_prompt_whole(name: str) -> None:
    model, row = ROWS[name].build(), torch.tensor(ids(14))
    whole = final_states(model, row)
    assert all(torch.equal(state, whole[mixer]) for mixer, state in final_states(model, row, 4).items())


# Models without attention, and no positions.
PURE = ("mamba2", "mamba", "falcon_mamba")


@pytest.mark.parametrize("name", PURE)
def test_nothing_is_lost_of_a_recurrent_model_without_look_back(name: str) -> None:
    """Without attention and with convolutions that see one token, the state is all that a model knows of a prompt."""
    base = ROWS[name].build()
    for mixer in mixers(base):
        mixer.conv1d.weight[..., :-1] = 0
    prompt, text = ids(13), ids(8, seed=1)
    in_context = base(torch.tensor([prompt + text])).logits[:, len(prompt) :]
    alone = base(torch.tensor([text])).logits
    effect = float((in_context - alone).abs().max())
    model = state_from_prompt(base, None, prompt)
    error = float((model(torch.tensor([text])).logits - in_context).abs().max())
    assert effect > 0.02
    assert error < 1e-4 * effect


@pytest.mark.parametrize("name", PURE)
def test_what_a_look_back_loses(name: str) -> None:
    """The convolutions' last inputs are no part of the state. Two layers of them reach six tokens back; from there on
    the prompt's state is closer to the prompt than nothing is, but no longer the same."""
    base = ROWS[name].build()
    prompt, text = ids(40), ids(16, seed=1)
    in_context = base(torch.tensor([prompt + text])).logits[:, len(prompt) + 6 :].log_softmax(-1)
    alone = base(torch.tensor([text])).logits[:, 6:].log_softmax(-1)
    started = state_from_prompt(base, None, prompt)(torch.tensor([text])).logits[:, 6:].log_softmax(-1)
    without, left = (float((in_context.exp() * (in_context - other)).sum()) for other in (alone, started))
    assert 0.01 * without < left < 0.6 * without


def test_text_chat_and_ids_are_the_same_prompt() -> None:
    tokenizer, base = load_tokenizer(), load_base()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = [{"role": "system", "content": "def "}, {"role": "user", "content": "total(x):"}]
    by_ids = tokenizer(TEXT)["input_ids"]
    assert by_ids[0] == tokenizer.bos_token_id
    expected = final_states(base, torch.tensor(by_ids))
    arrays = [
        np.array(by_ids),
        np.array([by_ids]),
        [np.array(by_ids)],
        list(np.array(by_ids)),
        list(torch.tensor(by_ids)),
    ]
    for prompt in (TEXT, by_ids, torch.tensor(by_ids), torch.tensor([by_ids]), *arrays, [TEXT]):
        (row,) = token_rows(base, tokenizer, prompt)
        assert row.tolist() == by_ids
    (row,) = token_rows(base, tokenizer, chat)
    assert row.tolist() == tokenizer.apply_chat_template(chat)["input_ids"]
    states = states_of(state_from_prompt(base, tokenizer, TEXT))
    assert all(torch.equal(state, end) for state, end in zip(states.values(), expected.values(), strict=True))


def test_a_processor_stands_for_its_tokenizer() -> None:
    tokenizer, base = load_tokenizer(), load_base()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    processor = ProcessorMixin(chat_template=tokenizer.chat_template)
    processor.tokenizer = tokenizer
    chat = [{"role": "system", "content": "def "}, {"role": "user", "content": "total(x):"}]
    for prompt in (TEXT, chat, [TEXT, chat]):
        assert [row.tolist() for row in token_rows(base, processor, prompt)] == [
            row.tolist() for row in token_rows(base, tokenizer, prompt)
        ]


def test_a_prompt_with_a_picture() -> None:
    """Its template would leave a mark where the picture was, and the model would run that."""
    tokenizer, base = load_tokenizer(), load_base()
    tokenizer.chat_template = (
        "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] or 'x' }}{% endfor %}{% endfor %}"
    )
    text = {"type": "text", "text": TEXT}
    (row,) = token_rows(base, tokenizer, [{"role": "user", "content": [text]}])
    assert row.tolist() == tokenizer(TEXT, add_special_tokens=False).input_ids
    with pytest.raises(ValueError, match="a part of the type 'image', and only text is run"):
        state_from_prompt(base, tokenizer, [{"role": "user", "content": [{"type": "image", "url": "a.png"}, text]}])


@pytest.mark.parametrize("architecture", MAIN, ids=lambda row: row.name)
def test_several_prompts_are_their_mean(architecture: Architecture) -> None:
    prompts = [ids(5), ids(9, seed=1), ids(2, seed=2)]
    ends = [states_of(state_from_prompt(architecture.build(), None, prompt)) for prompt in prompts]
    mean = states_of(state_from_prompt(architecture.build(), None, prompts))
    for name, state in mean.items():
        torch.testing.assert_close(state, sum(end[name] for end in ends) / 3)


@pytest.mark.parametrize("architecture", MAIN, ids=lambda row: row.name)
def test_any_alpha_starts_from_the_same(architecture: Architecture) -> None:
    plain = states_of(state_from_prompt(architecture.build(), None, ids(7)))
    scaled = state_from_prompt(architecture.build(), None, ids(7), config=S0Config())
    assert scaled.peft_config["default"].alpha == architecture.alpha
    for name, state in states_of(scaled).items():
        torch.testing.assert_close(state, plain[name])
        stored = scaled.get_submodule(f"base_model.model.{name}.s0").state("default").weight
        torch.testing.assert_close(stored, plain[name] / architecture.alpha)


@pytest.mark.parametrize("learn_alpha", [False, True])
def test_alphas_of_layers_start_from_the_same(learn_alpha: bool) -> None:
    plain = states_of(state_from_prompt(MAIN[0].build(), None, ids(7)))
    config = S0Config(alpha=2.0, alpha_pattern={r"layers\.1\..*": 0.25}, learn_alpha=learn_alpha)
    scaled = state_from_prompt(MAIN[0].build(), None, ids(7), config=config)
    for name, state in states_of(scaled).items():
        torch.testing.assert_close(state, plain[name])
    with pytest.raises(ValueError, match=r"alpha_pattern={'linear_attn': 0} lets nothing of it into a layer"):
        state_from_prompt(MAIN[0].build(), None, ids(7), config=S0Config(alpha_pattern={"linear_attn": 0}))
    with pytest.raises(ValueError, match=r"train_alpha=1.0 takes no account of alpha_pattern"):
        state_from_prompt(
            MAIN[0].build(), None, ids(7), config=S0Config(alpha=1.0, train_alpha=1.0, alpha_pattern={"linear_attn": 2})
        )


def test_an_offset_beside_it_begins_at_zero() -> None:
    model = state_from_prompt(MAIN[0].build(), None, ids(7), config=S0Config(alpha=1.0, variant="both"))
    expected = states_of(state_from_prompt(MAIN[0].build(), None, ids(7)))
    for name, state in expected.items():
        layer = model.get_submodule(f"base_model.model.{name}.s0")
        assert torch.equal(layer.effective_state("default"), state)
        assert not layer.effective_offset("default").any()


@pytest.mark.parametrize("config", [{"variant": "both"}, {"learn_alpha": True}], ids=str)
def test_what_an_adapter_for_inference_has_beside_the_state(config: dict) -> None:
    """It is not awaited from a file: it is where it begins."""
    expected = state_from_prompt(MAIN[0].build(), None, ids(7))(torch.tensor([ids(5)])).logits
    config = S0Config(alpha=1.0, inference_mode=True, **config)
    model = state_from_prompt(MAIN[0].build(), None, ids(7), config=config)
    torch.testing.assert_close(model(torch.tensor([ids(5)])).logits, expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("architecture", MAIN, ids=lambda row: row.name)
def test_rank_keeps_the_nearest(architecture: Architecture) -> None:
    full = states_of(state_from_prompt(architecture.build(), None, ids(20)))
    low = states_of(state_from_prompt(architecture.build(), None, ids(20), config=S0Config(alpha=0.5, rank=3)))
    for name, state in full.items():
        left_out = torch.linalg.svdvals(state.double())[:, 3:]
        expected = left_out.square().sum(-1).sqrt()
        torch.testing.assert_close((state - low[name]).double().norm(dim=(1, 2)), expected, atol=1e-6, rtol=1e-5)
        assert torch.linalg.matrix_rank(low[name]).max() <= 3


def test_a_state_of_lower_rank_than_asked_for_can_grow() -> None:
    state = InitialState((2, 6, 5), S0Config(rank=3), None)
    target = torch.outer(torch.arange(6.0), torch.ones(5)).expand(2, 6, 5)
    state.write(target)
    torch.testing.assert_close(state.compose(state.weight), target)
    with torch.enable_grad():
        (state.compose(state.weight) * torch.randn(2, 6, 5)).sum().backward()
    # The columns that stand for nothing yet.
    assert state.weight.grad[:, 6:, 1:].abs().min() > 0


def test_only_the_layers_that_the_config_chooses() -> None:
    architecture = MAIN[0]
    every = states_of(state_from_prompt(architecture.build(), None, ids(7)))
    one = states_of(
        state_from_prompt(architecture.build(), None, ids(7), config=S0Config(alpha=1.0, layers_to_transform=[1]))
    )
    assert [name.split(".")[2] for name in one] == ["1"]
    assert all(torch.equal(state, every[name]) for name, state in one.items())


@pytest.mark.parametrize("architecture", MAIN, ids=lambda row: row.name)
def test_on_an_adapted_model_the_prompt_is_the_base_models(architecture: Architecture) -> None:
    """And all else stays as it was: modes, what is trained, which adapter is active."""
    expected = states_of(state_from_prompt(architecture.build(), None, ids(7)))
    tuned = tune(architecture)
    tuned.model.requires_grad_(False)
    tuned.model.train()
    mixers(tuned.model)[0].eval()
    modes = {name: module.training for name, module in tuned.model.named_modules()}
    before = tuned.model(tuned.ids(1, 5)).logits
    assert state_from_prompt(tuned.model, None, ids(7), adapter_name="prompt") is tuned.model
    assert {name: tuned.model.get_submodule(name).training for name in modes} == modes
    assert tuned.model.active_adapters == ["default"]
    assert torch.equal(tuned.model(tuned.ids(1, 5)).logits, before)
    assert not any(p.requires_grad for name, p in tuned.model.named_parameters() if "prompt" not in name)
    for name, layer in tuned.model.named_modules():
        if isinstance(layer, S0Layer):
            state = layer.effective_state("prompt")
            assert torch.equal(state, expected[name.removeprefix("base_model.model.").removesuffix(".s0")])


def test_a_lora_beside_it_has_no_part_in_it() -> None:
    architecture = MAIN[0]
    expected = states_of(state_from_prompt(architecture.build(), None, ids(7)))
    base = architecture.build()
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj", "in_proj_qkv"], init_lora_weights=False))
    trained = {name for name, p in lora.named_parameters() if p.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT warns of a second adapted model; that is meant
        model = state_from_prompt(base, None, ids(7), adapter_name="prompt")
    assert all(torch.equal(state, expected[name]) for name, state in states_of(model).items())
    layers = [layer for layer in lora.modules() if isinstance(layer, LoraLayer)]
    assert layers
    assert not any(layer.disable_adapters for layer in layers)
    assert trained == {name for name, p in lora.named_parameters() if p.requires_grad and "lora_" in name}


def test_save_and_load(tmp_path: Path) -> None:
    architecture = MAIN[0]
    model = state_from_prompt(architecture.build(), None, ids(7), config=S0Config(alpha=0.5, inference_mode=True))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(architecture.build(), tmp_path)
    row = torch.tensor([ids(5, seed=1)])
    assert torch.equal(loaded(row).logits, model(row).logits)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], ValueError, "There is no prompt in"),
        ("", ValueError, "is text: pass the model's tokenizer"),
        ([[]], ValueError, r"The prompt \[\] has no tokens"),
        ([3, 128], ValueError, "token ids from 3 to 128, but the model knows 128"),
        ([-1], ValueError, "token ids from -1 to -1"),
        ([[1.5]], TypeError, r"a list of chat messages or a list of token ids, got list: \[1.5\]"),
        (3, ValueError, "There is no prompt in 3"),
    ],
)
def test_bad_prompts(prompt: object, error: type, message: str) -> None:
    model = MAIN[0].build()
    with pytest.raises(error, match=message):
        state_from_prompt(model, None, prompt)
    assert not any(isinstance(module, S0Layer) for module in model.modules())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"variant": "offset"}, "variant='offset' has no initial state"),
        ({"normalize": True}, "normalize=True takes its norm away"),
        ({"alpha": 0.0}, "alpha=0 lets nothing of it in"),
        ({"train_alpha": 1.0}, "train_alpha=1.0 would start training from another state"),
        ({"init_weights": "prompt", "init_prompt": "x"}, "and a config with another"),
    ],
)
def test_configs_that_do_not_keep_it(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        state_from_prompt(MAIN[0].build(), None, ids(3), config=S0Config(**config))
    if "init_weights" not in config:
        model = MAIN[0].build()
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, S0Config(init_weights="prompt", init_prompt=[5, 6], **config))
        assert not any(isinstance(module, S0Layer) for module in model.modules())
        assert not hasattr(model, "peft_config")


def test_a_train_alpha_that_is_alpha() -> None:
    config = S0Config(init_weights="prompt", init_prompt=ids(5), train_alpha=MAIN[0].alpha)
    expected = states_of(state_from_prompt(MAIN[0].build(), None, ids(5)))
    for name, state in states_of(get_peft_model(MAIN[0].build(), config)).items():
        torch.testing.assert_close(state, expected[name])


def test_refusals() -> None:
    xlstm = ROWS["xlstm"].build()
    with pytest.raises(ValueError, match="xLSTMLayer ends in is a matrix, a normalizer and their scale"):
        state_from_prompt(xlstm, None, ids(3))
    assert not hasattr(xlstm, "peft_config")
    model = state_from_prompt(MAIN[0].build(), None, ids(3))
    with pytest.raises(ValueError, match="'default' exists already"):
        state_from_prompt(model, None, ids(3))
    with pytest.raises(ValueError, match="chunk_size must be an integer >= 1, got 0"):
        state_from_prompt(MAIN[0].build(), None, ids(3), chunk_size=0)
    broken = MAIN[0].build()
    broken.get_input_embeddings().weight[5] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.0\.linear_attn, at the end of the prompt' has .* NaN or infinite"):
        state_from_prompt(broken, None, [5])
    assert not hasattr(broken, "peft_config")


# As a start for training.


def test_a_config_with_a_prompt_starts_there(tmp_path: Path) -> None:
    expected = states_of(state_from_prompt(load_base(), load_tokenizer(), TEXT))
    base = load_base().train()
    config = S0Config(init_weights="prompt", init_prompt=TEXT, l2_lambda=0.0)
    model = get_peft_model(base, config)
    assert model.peft_config["default"].alpha == 0.07
    assert model.training
    model.eval()
    for name, state in states_of(model).items():
        torch.testing.assert_close(state, expected[name])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "s0_state" in name
    }
    # What is loaded is what was saved: the prompt does not run again.
    for layer in model.base_model.tuner_layers():
        layer.state("default").weight.mul_(2)
    model.save_pretrained(tmp_path)
    saved = PeftConfig.from_pretrained(tmp_path)
    assert (saved.init_weights, saved.init_prompt) == ("prompt", TEXT)
    for trainable in (False, True):
        fresh = load_base()
        ran: list[int] = []
        fresh.get_input_embeddings().register_forward_hook(lambda *_, ran=ran: ran.append(1))
        loaded = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=trainable)
        assert ran == []
        for (name, p), (_, q) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
            assert torch.equal(p, q), name
    row = torch.tensor([[1, 5, 9]])
    transformers_own = load_base()
    transformers_own.load_adapter(str(tmp_path))
    assert torch.equal(transformers_own(row).logits, model(row).logits)


def _hotswap(model: PeftModel, folder: Path, **config: object) -> None:
    other = get_peft_model(load_base(), S0Config(init_weights=1.0, **config))
    other.save_pretrained(folder)
    model.hotswap_adapter(folder, "default")


def _calibrate(model: PeftModel, folder: Path) -> None:
    first, *others = model.base_model.tuner_layers()
    calibrate_alpha(
        model, lambda _: sum(x.alpha("default") for x in others) - first.alpha("default"), [1.0], per_layer=1
    )
    assert first.alpha("default") == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda model, folder: model.set_alpha(0.0),
        lambda model, folder: model.set_alpha({"layers.0.linear_attn": 0.0}),
        _calibrate,
        partial(_hotswap, normalize=True),
        partial(_hotswap, train_alpha=1.0),
    ],
    ids=["alpha", "alpha of a layer", "calibrate_alpha", "normalize", "train_alpha"],
)
def test_what_was_changed_since_is_loaded(tmp_path: Path, change: Callable) -> None:
    """No prompt runs where states are loaded, so that nothing has to hold one."""
    model = get_peft_model(load_base(), S0Config(init_weights="prompt", init_prompt=TEXT, alpha=1.0)).eval()
    change(model, tmp_path / "other")
    row = torch.tensor([[1, 5, 9]])
    expected = model(row).logits
    model.save_pretrained(tmp_path)
    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(load_base(), tmp_path, is_trainable=trainable).eval()
        assert torch.equal(loaded(row).logits, expected)
    transformers_own = load_base()
    transformers_own.load_adapter(str(tmp_path))
    assert torch.equal(transformers_own(row).logits, expected)
    # transformers saves a config that is not for inference.
    transformers_own.peft_config["default"].inference_mode = False
    transformers_own.save_pretrained(tmp_path / "again")
    assert torch.equal(PeftModel.from_pretrained(load_base(), tmp_path / "again")(row).logits, expected)


@pytest.mark.parametrize("architecture", MAIN, ids=lambda row: row.name)
def test_a_config_from_a_file_for_a_new_adapter(architecture: Architecture, tmp_path: Path) -> None:
    """Whether states will be loaded cannot be known when it is made: without them it is refused where it is used."""
    model = get_peft_model(architecture.build(), S0Config(init_weights="prompt", init_prompt=ids(7))).eval()
    row = torch.tensor([ids(5, seed=1)])
    model.save_pretrained(tmp_path)
    config = S0Config.from_pretrained(tmp_path)
    config.inference_mode = False
    second = get_peft_model(architecture.build(), S0Config(), "first")
    second.add_adapter("default", config)
    second.set_adapter("default")
    injected = inject_adapter_in_model(config, architecture.build())
    for made in (get_peft_model(architecture.build(), config), second, injected):
        for mode in (True, False):
            with pytest.raises(
                RuntimeError, match=r"its prompt, .*dataclasses\.replace\(config, inference_mode=False\)"
            ):
                made.train(mode)(row)
    # The states in time, or the prompt.
    set_peft_model_state_dict(second, get_peft_model_state_dict(model))
    for made in (second, get_peft_model(architecture.build(), replace(config, inference_mode=False))):
        assert torch.equal(made.eval()(row).logits, model(row).logits)


@pytest.mark.parametrize("architecture", MAIN, ids=lambda row: row.name)
def test_a_prompt_and_learnt_alphas(architecture: Architecture) -> None:
    expected = states_of(state_from_prompt(architecture.build(), None, ids(7)))
    config = S0Config(init_weights="prompt", init_prompt=ids(7), learn_alpha=True)
    model = get_peft_model(architecture.build(), config)
    for name, state in states_of(model).items():
        torch.testing.assert_close(state, expected[name])
    for layer in model.base_model.tuner_layers():
        assert layer.alpha("default") == pytest.approx(architecture.alpha, rel=1e-6)


@pytest.mark.parametrize("architecture", MAIN, ids=lambda row: row.name)
def test_a_state_that_came_from_a_prompt_is_compressed(architecture: Architecture, tmp_path: Path) -> None:
    model = get_peft_model(architecture.build(), S0Config(init_weights="prompt", init_prompt=ids(7))).eval()
    errors = compress_adapter(model, "default", 4, "small")
    assert all(0 < error < 1 for error in errors.values())
    config = model.peft_config["small"]
    assert (config.init_weights, config.init_prompt, config.rank) == (True, None, 4)
    model.set_adapter("small")
    row = torch.tensor([ids(5, seed=1)])
    model.save_pretrained(tmp_path, selected_adapters=["small"])
    assert torch.equal(
        PeftModel.from_pretrained(architecture.build(), tmp_path / "small")(row).logits, model(row).logits
    )


def test_a_second_adapter_that_starts_from_ids() -> None:
    tuned = tune(MAIN[0])
    tuned.model.add_adapter("prompt", S0Config(init_weights="prompt", init_prompt=ids(7), rank=2))
    expected = states_of(state_from_prompt(MAIN[0].build(), None, ids(7), config=S0Config(rank=2)))
    tuned.model.set_adapter("prompt")
    for name, state in states_of(tuned.model).items():
        torch.testing.assert_close(state, expected[name])
    # A mixture has states of its own.
    tuned.model.base_model.add_weighted_adapter(["prompt"], [1.0], "mixture")
    assert tuned.model.peft_config["mixture"].init_prompt is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_weights": "prompt"}, "go together, got init_weights='prompt' and init_prompt=None"),
        ({"init_prompt": "x"}, "go together, got init_weights=True and init_prompt='x'"),
        ({"init_weights": "text"}, "standard deviation >= 0 or 'prompt', got 'text'"),
    ],
)
def test_bad_fields(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S0Config(**arguments)


@pytest.mark.parametrize(
    ("name", "message"),
    [(None, "the model does not say where it comes from"), ("/nowhere/at/all", "'/nowhere/at/all' gives none")],
)
def test_no_tokenizer(name: str | None, message: str) -> None:
    model = MAIN[0].build()
    with pytest.raises(ValueError, match=f"{message}.*Set tokenizer_name_or_path"):
        get_peft_model(model, S0Config(init_weights="prompt", init_prompt=TEXT, tokenizer_name_or_path=name))
    assert not any(isinstance(module, S0Layer) for module in model.modules())
    assert not hasattr(model, "peft_config")


def test_a_tokenizer_of_another_name() -> None:
    base = MAIN[0].build()
    config = S0Config(init_weights="prompt", init_prompt=TEXT, alpha=1.0, tokenizer_name_or_path=str(FOLDER))
    expected = states_of(state_from_prompt(copy.deepcopy(base), load_tokenizer(), TEXT))
    assert all(torch.equal(state, expected[name]) for name, state in states_of(get_peft_model(base, config)).items())


def test_a_model_without_weights() -> None:
    with torch.device("meta"):
        model = transformers.Qwen3_5ForCausalLM(MAIN[0].config())
    with pytest.raises(ValueError, match="its weights are on the meta device"):
        get_peft_model(model, S0Config(init_weights="prompt", init_prompt=[1, 2]))
