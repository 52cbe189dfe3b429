"""Reading a state, against direct computations; and the pictures, whose data is the arrays."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, MAIN, Architecture, mixers
from peft import get_peft_model
from reference import with_slow_mixers
from torch.nn import functional
from tuned import Tuned, states_of, tune

from peft_s0 import S0Config, StateBank, analysis

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from miniature.base import load_base, load_tokenizer

LENGTHS = (11, 4, 1, 7)


@pytest.fixture(autouse=True, scope="module")
def _no_grad():
    mpl.use("Agg")
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def rows_of(tuned: Tuned) -> list[list[int]]:
    return [tuned.ids(1, length, seed=length)[0].tolist() for length in LENGTHS]


def test_influence(tuned: Tuned) -> None:
    rows = rows_of(tuned)
    result = analysis.influence(tuned.model, None, rows, batch_size=3)
    assert result.kl.shape == (4, 11)
    for row, kl in zip(rows, result.kl, strict=True):
        base, own = (logits.double().log_softmax(-1) for logits in both_logits(tuned, row))
        expected = functional.kl_div(own, base, log_target=True, reduction="none").sum(-1)[0]
        np.testing.assert_allclose(kl[: len(row)], expected, rtol=1e-3, atol=1e-6)
        assert np.isnan(kl[len(row) :]).all()
        assert kl[0] > 0.01
    np.testing.assert_allclose(result.mean[4], (result.kl[0, 4] + result.kl[3, 4]) / 2)
    np.testing.assert_allclose(result.quantile(0.5)[9], result.kl[0, 9])
    table = str(result).splitlines()
    assert table[0].split() == ["token", "texts", "mean", "KL", "median", "90", "%"]
    assert [line.split()[:2] for line in table[1:]] == [["1", "4"], ["2", "3"], ["4", "3"], ["8", "1"], ["11", "1"]]
    ax = result.plot()
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), result.mean)


def both_logits(tuned: Tuned, row: list[int]) -> list[torch.Tensor]:
    ids = torch.tensor([row])
    return [tuned.base(ids).logits, tuned.expected(ids)]


def test_influence_of_nothing_is_nothing() -> None:
    tuned = tune(MAIN[0], init_weights=True)
    assert (analysis.influence(tuned.model, None, [[5, 6, 7]]).kl == 0).all()


def test_kl_where_a_token_is_ruled_out() -> None:
    base, tuned = torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([[1.0, 0.0, 2.0]])
    p = base[0, :2].softmax(0).double()
    expected = float((p * (p.log() - tuned[0].double().log_softmax(0)[:2])).sum())
    assert analysis._kl(base, tuned)[0] == pytest.approx(expected)
    assert np.isnan(analysis._kl(base * torch.nan, tuned)[0])


def test_divergence(tuned: Tuned) -> None:
    rows = rows_of(tuned)
    result = analysis.divergence(tuned.model, None, rows, max_new_tokens=6, batch_size=3)
    for i, row in enumerate(rows):
        base, own = (
            model.generate(torch.tensor([row]), max_new_tokens=6, do_sample=False)[0, len(row) :].tolist()
            for model in (tuned.base, tuned.model)
        )
        assert (result.base[i], result.tuned[i]) == (base, own)
        differ = [j for j, (a, b) in enumerate(zip(base, own, strict=True)) if a != b]
        assert result.first[i] == differ[0]
    assert result.share(5) == 1.0
    assert result.share(0) == (result.first == 0).mean()
    assert str(result).splitlines()[-1].split() == ["6", "100.0%"]


def test_answers_that_end() -> None:
    tuned = tune(MAIN[0])
    assert analysis._first_difference([5, 2], [5, 2]) == -1
    assert analysis._first_difference([5, 2], [5, 6, 7]) == 1
    assert analysis._first_difference([5], [5, 6]) == 1
    row = rows_of(tuned)[0]
    whole = analysis.divergence(tuned.model, None, row, max_new_tokens=6)
    end = whole.base[0][2]
    tuned.base.generation_config.eos_token_id = [127, end]
    tuned.model.get_base_model().generation_config.eos_token_id = [127, end]
    cut = analysis.divergence(tuned.model, None, [row, row[:3]], max_new_tokens=6)
    assert cut.base[0] == whole.base[0][: whole.base[0].index(end) + 1]


def test_divergence_that_is_drawn() -> None:
    result = analysis.Divergence(np.array([0, 0, 3, -1]), [[1, 1, 1, 1]] * 4, [[2], [2], [1, 1, 1, 2], [1, 1, 1, 1]])
    assert [result.share(token) for token in (0, 2, 3)] == [0.5, 0.5, 0.75]
    ax = result.plot()
    assert {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in ax.patches if bar.get_height()} == {
        1: 2,
        4: 1,
        6: 1,
    }
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "3", "4", "never"]
    never = analysis.Divergence(np.array([-1]), [[1]], [[1]])
    assert never.share(0) == 0
    never.plot()


def test_chat_prompts_open_an_answer() -> None:
    tokenizer = load_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}" + (
        "{% if add_generation_prompt %}return x{% endif %}"
    )
    model = get_peft_model(load_base(), S0Config())
    chat = [{"role": "user", "content": "def f(x):"}]
    opened = tokenizer("def f(x):return x", add_special_tokens=False)["input_ids"]
    expected = analysis.divergence(model, None, opened, max_new_tokens=3)
    assert analysis.divergence(model, tokenizer, chat, max_new_tokens=3).base == expected.base
    assert expected.first.tolist() == [-1]


EXACT = [row for row in ARCHITECTURES if row.name != "xlstm"]


@pytest.mark.parametrize("architecture", EXACT, ids=lambda row: row.name)
def test_memory(architecture: Architecture) -> None:
    """The naive twins with the state of one layer, and with none."""
    tuned = tune(architecture)
    states = states_of(tuned.model)
    row = tuned.ids(1, 9)
    result = analysis.memory(tuned.model, None, row, positions=[1, 9])
    assert result.layers == list(states)
    zeros = {name: torch.zeros_like(state) for name, state in states.items()}
    for place in (0, 1):
        tokens = row[:, : result.positions[place]]
        slow = with_slow_mixers(tuned.base, architecture.slow_mixer, zeros)
        slow(tokens, use_cache=False)
        ends = {name: slow.get_submodule(name).final[0] for name in states}
        for name in (result.layers[0], result.layers[-1]):
            slow.get_submodule(name).state = states[name]
            slow(tokens, use_cache=False)
            difference = slow.get_submodule(name).final[0] - ends[name]
            slow.get_submodule(name).state = zeros[name]
            i = result.layers.index(name)
            whole = float(difference.norm() / states[name].norm())
            assert result.survival[0, i, place] == pytest.approx(whole, abs=1e-5)
            assert 0 < whole < 1
            if states[name].ndim > 1:
                heads = difference.flatten(1).norm(dim=1) / states[name].flatten(1).norm(dim=1)
                np.testing.assert_allclose(result.heads[i][0, :, place], heads, atol=1e-5)


def test_memory_of_several_texts_and_its_picture() -> None:
    tuned = tune(MAIN[1])
    rows = [tuned.ids(1, n, seed=n)[0].tolist() for n in (12, 6)]
    result = analysis.memory(tuned.model, None, rows)
    assert result.positions.tolist() == [1, 2, 4, 6]
    assert result.survival.shape == (2, 2, 4)
    assert (np.diff(result.survival, axis=-1) < 0).all()
    alone = analysis.memory(tuned.model, None, rows[1])
    np.testing.assert_allclose(alone.survival[0], result.survival[1])
    assert str(result).splitlines()[1].split()[1:] == [f"{x:.1%}" for x in result.survival.mean(0)[0]]
    ax = result.plot()
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), [1.0, *result.survival.mean(0)[1]])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["layers.0.mamba", "layers.1.mamba"]


def test_memory_counts_the_layers_of_the_active_adapter() -> None:
    tuned = tune(MAIN[0])
    tuned.model.add_adapter("one", S0Config(layers_to_transform=[1], init_weights=1.0))
    tuned.model.set_adapter("one")
    assert analysis.memory(tuned.model, None, [3, 4, 5]).layers == ["model.layers.1.linear_attn"]


@pytest.mark.parametrize("rank", [None, 2])
def test_norms(architecture: Architecture, rank: int | None, tmp_path: Path) -> None:
    tuned = tune(architecture, rank=rank)
    result = analysis.norms(tuned.model)
    states = {name: state / 0.7 for name, state in states_of(tuned.model).items()}
    assert result.layers == list(states)
    assert result.alpha == 0.7
    for norm, heads, state in zip(result.norms, result.heads, states.values(), strict=True):
        assert norm == pytest.approx(float(state.norm()), rel=1e-5)
        np.testing.assert_allclose(heads, [float(head.norm()) for head in state], rtol=1e-5)
    assert str(result).splitlines()[1].split()[2] == str(result.heads[0].argmax())
    tuned.model.save_pretrained(tmp_path)
    if rank is not None:
        with pytest.raises(ValueError, match="has states of rank 2, kept as two matrices"):
            analysis.norms(tmp_path)
        return
    from_file = analysis.norms(tmp_path)
    assert from_file.layers == result.layers
    assert from_file.alpha == 0.7
    np.testing.assert_allclose(from_file.norms, result.norms)
    grid = from_file.plot().images[0].get_array()
    np.testing.assert_allclose(grid, np.stack(result.heads))


@pytest.mark.parametrize("config", [{"learn_alpha": True}, {"alpha_pattern": {r"layers\.1\..*": 0.2}}], ids=str)
def test_norms_where_layers_have_alphas_of_their_own(config: dict, tmp_path: Path) -> None:
    model = tune(MAIN[0], **config).model
    model.set_alpha({"layers.0.linear_attn": 0.1})
    model.save_pretrained(tmp_path)
    for found in (analysis.norms(model), analysis.norms(tmp_path)):
        assert found.alpha is None
        assert len(found.layers) == MAIN[0].states
    model.set_alpha(0.5)
    assert analysis.norms(model).alpha == 0.5


def test_offsets(tmp_path: Path) -> None:
    model = get_peft_model(MAIN[0].build(), S0Config(variant="both", init_weights=1.0, learn_alpha=True)).eval()
    result = analysis.norms(model)
    assert result.layers[:2] == ["model.layers.0.linear_attn", "model.layers.0.linear_attn (offset)"]
    layer = next(model.base_model.tuner_layers())
    expected = [layer.effective_state("default").norm() / 0.07, layer.effective_offset("default").norm() / 0.07]
    np.testing.assert_allclose(result.norms[:2], [float(norm) for norm in expected], rtol=1e-5)
    model.save_pretrained(tmp_path)
    from_file = analysis.norms(tmp_path)
    assert dict(zip(from_file.layers, from_file.norms, strict=True)) == pytest.approx(
        dict(zip(result.layers, result.norms, strict=True))
    )
    assert analysis.memory(model, None, [5, 6]).layers[0] == "model.layers.0.linear_attn"
    offset = get_peft_model(MAIN[0].build(), S0Config(variant="offset", init_weights=1.0)).eval()
    assert analysis.influence(offset, None, [5, 6]).kl[0, 1] > 0
    with pytest.raises(ValueError, match="no S0 adapter of this model is active with an initial state"):
        analysis.memory(offset, None, [5])


def test_norms_of_a_named_adapter_and_of_vectors() -> None:
    tuned = tune({row.name: row for row in ARCHITECTURES}["recurrent_gemma"])
    tuned.model.add_adapter("second", S0Config(init_weights=0.0))
    result = analysis.norms(tuned.model, "default")
    assert [len(heads) for heads in result.heads] == [1, 1, 1]
    assert (analysis.norms(tuned.model, "second").norms == 0).all()
    with pytest.raises(ValueError, match=r"unknown adapter 'third'; this model has \['default', 'second'\]"):
        analysis.norms(tuned.model, "third")
    tuned.model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"active adapters are \['default', 'second'\]; pass adapter_name"):
        analysis.norms(tuned.model)


def test_models_are_left_as_they_were(tuned: Tuned) -> None:
    tuned.model.requires_grad_(False)
    tuned.model.train()
    mixers(tuned.model)[0].eval()
    modes = [module.training for module in tuned.model.modules()]
    before = tuned.model(tuned.ids(1, 5)).logits
    analysis.influence(tuned.model, None, [5, 6])
    analysis.divergence(tuned.model, None, [5, 6], max_new_tokens=2)
    analysis.memory(tuned.model, None, [5, 6])
    analysis.norms(tuned.model)
    assert [module.training for module in tuned.model.modules()] == modes
    assert not any(parameter.requires_grad for parameter in tuned.model.parameters())
    assert torch.equal(tuned.model(tuned.ids(1, 5)).logits, before)


def test_refusals() -> None:
    tuned = tune(MAIN[0])
    for function in (analysis.influence, analysis.divergence, analysis.memory):
        with pytest.raises(ValueError, match="This Qwen3_5ForCausalLM has no S0 adapter"):
            function(tuned.base, None, [5])
    with pytest.raises(ValueError, match="has no S0 adapter"):
        analysis.norms(tuned.base)
    backbone = get_peft_model(MAIN[0].build().model, S0Config(init_weights=1.0))
    with pytest.raises(ValueError, match="Qwen3_5TextModel gives no logits for each token"):
        analysis.influence(backbone, None, [5])
    for positions in ([0], [4], []):
        with pytest.raises(ValueError, match="positions must be from 1 to the length of the shortest text, 3, got"):
            analysis.memory(tuned.model, None, [5, 6, 7], positions=positions)
    for function in (analysis.influence, analysis.divergence):
        for size in (0, -1):
            with pytest.raises(ValueError, match=f"batch_size must be an integer >= 1, got {size}"):
                function(tuned.model, None, [5, 6], batch_size=size)
    zero = tune(MAIN[0], init_weights=True)
    with pytest.raises(ValueError, match=r"state of 'model\.layers\.0\.linear_attn' is zero"):
        analysis.memory(zero.model, None, [5])
    with tuned.model.disable_adapter(), pytest.raises(ValueError, match="no S0 adapter of this model is active"):
        analysis.memory(tuned.model, None, [5])
    xlstm = tune({row.name: row for row in ARCHITECTURES}["xlstm"])
    with pytest.raises(ValueError, match="xLSTMLayer ends in is a matrix, a normalizer"):
        analysis.memory(xlstm.model, None, [5])


@pytest.mark.parametrize("rows", [["task"], ["__base__"]], ids=str)
def test_a_bank_in_use_is_not_taken_for_the_active_adapter(rows: list[str], tmp_path: Path) -> None:
    tuned = tune(MAIN[0])
    tuned.model.save_pretrained(tmp_path)
    bank = StateBank(tuned.model, capacity=1)
    bank.add("task", tmp_path)
    expected = analysis.norms(tuned.model).norms
    with bank.use(rows):
        for function in (analysis.influence, analysis.divergence, analysis.memory):
            with pytest.raises(RuntimeError, match="whose tasks would be measured in place of the active adapters"):
                function(tuned.model, None, [5])
        assert np.array_equal(analysis.norms(tuned.model).norms, expected)
    assert analysis.influence(tuned.model, None, [5]).kl.max() > 0


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    result = analysis.influence(tune(MAIN[0]).model, None, [5, 6])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"plot\(\) needs matplotlib: pip install 'peft-s0\[plots\]'"):
        result.plot()
    assert len(str(result).splitlines()) == 3
