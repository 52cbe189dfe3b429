"""Gradients of the states: those of the naive twin, of finite differences, and the same however the tokens arrive."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from architectures import ARCHITECTURES, Architecture, mixers
from reference import with_slow_mixers
from test_law import left_pad, packed_arguments
from torch import Tensor, nn
from torch.nn import functional as F
from tuned import Tuned, offsets_of, states_of, tune

from peft_s0.mixers import find_mixer


@pytest.fixture(params=ARCHITECTURES, ids=lambda architecture: architecture.name)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    """The whole table, less what a base model itself cannot do."""
    law = request.node.originalname.removeprefix("test_")
    reason = dict(request.param.lacks).get(law)
    if reason is not None:
        pytest.skip(reason)
    return request.param


def loss_of(model, ids: Tensor, labels: Tensor | None = None, **arguments: object) -> Tensor:
    """Summed cross-entropy of every next token."""
    logits = model(ids, **arguments).logits.double()
    labels = ids if labels is None else labels
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100)


def squares_of(model, ids: Tensor, **arguments: object) -> Tensor:
    """Sum of all squared logits: a loss for sequences of one token."""
    return model(ids, **arguments).logits.double().square().sum()


def gradients(tuned: Tuned, loss: Tensor) -> dict[str, Tensor]:
    tuned.model.zero_grad()
    loss.backward()
    found = {name: p.grad for name, p in tuned.model.named_parameters() if p.requires_grad}
    assert found
    assert all("s0_state" in name or "s0_offset" in name for name in found)
    assert all(grad is not None and bool(grad.abs().max() > 0) for grad in found.values())
    return found


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 5e-5) -> None:
    """Relative to the largest; at a zero state the norms behind the mixers take rounding far up."""
    assert actual.keys() == expected.keys()
    for name in expected:
        scale = float(expected[name].abs().max())
        assert float((actual[name] - expected[name]).abs().max()) <= tolerance * scale, name


def reference_gradients(tuned: Tuned, rows: list[Tensor], loss=loss_of) -> dict[str, Tensor]:
    """Gradients by the parameters of states and offsets, through the naive twin, of the rows' summed losses."""
    learnt = {"s0_state": states_of(tuned.model), "s0_offset": offsets_of(tuned.model)}
    for tensors in learnt.values():
        tensors.update({name: tensor.double().requires_grad_() for name, tensor in tensors.items()})
    slow = with_slow_mixers(tuned.base, tuned.architecture.slow_mixer, *learnt.values())
    sum(loss(slow, row[None], use_cache=False) for row in rows).backward()
    config = tuned.model.peft_config["default"]
    return {
        f"base_model.model.{name}.s0.{kind}.default.weight": config.alpha * tensor.grad.float()
        for kind, tensors in learnt.items()
        for name, tensor in tensors.items()
        if (kind, config.variant) != ("s0_state", "offset")
    }


def test_equal_the_naive_twin(tuned: Tuned) -> None:
    ids = tuned.ids(2, 20)
    assert_equal(gradients(tuned, loss_of(tuned.model, ids)), reference_gradients(tuned, list(ids)))


@pytest.mark.parametrize("init_weights", [True, 1.0])
def test_left_padded_rows(architecture: Architecture, init_weights: bool | float) -> None:
    """Also at zero, where training starts and pads would not show in the logits."""
    tuned = tune(architecture, init_weights=init_weights)
    rows = [tuned.ids(1, length, seed=length)[0] for length in (17, 9, 4)]
    ids, mask, positions = left_pad(rows)
    # The first real token has no logits in front of it: there stands a pad.
    labels = torch.where(mask.cumsum(1) > 1, ids, -100)
    loss = loss_of(tuned.model, ids, labels, attention_mask=mask, position_ids=positions)
    assert_equal(gradients(tuned, loss), reference_gradients(tuned, rows))


def test_packed_rows(tuned: Tuned) -> None:
    rows = [tuned.ids(1, length, seed=length)[0] for length in (9, 2, 17)]
    ids = torch.cat(rows)[None]
    arguments = packed_arguments([9, 2, 17])
    labels = torch.where(arguments["position_ids"] > 0, ids, -100)
    assert_equal(
        gradients(tuned, loss_of(tuned.model, ids, labels, use_cache=False, **arguments)),
        reference_gradients(tuned, rows),
    )


@pytest.mark.parametrize("training", [False, True])
def test_one_token_rows(tuned: Tuned, training: bool) -> None:
    """A loss on the only token's logits, with a cache or without."""
    tuned.model.train(training)
    ids = tuned.ids(3, 1)
    expected = reference_gradients(tuned, list(ids), squares_of)
    for use_cache in (False, True):
        assert_equal(gradients(tuned, squares_of(tuned.model, ids, use_cache=use_cache)), expected)


def test_finite_differences(tuned: Tuned) -> None:
    """Along random directions, and along the gradient itself."""
    ids = tuned.ids(2, 12)
    found = gradients(tuned, loss_of(tuned.model, ids))
    parameters = {name: p for name, p in tuned.model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    random = {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}
    length = norm_of(found)
    for direction in (random, found):
        unit, step, losses = 1 / norm_of(direction), 2e-2, []
        with torch.no_grad():
            for sign in (1, -2, 1):
                for name, parameter in parameters.items():
                    parameter.add_(sign * step * unit * direction[name])
                losses.append(float(loss_of(tuned.model, ids)))
        slope = unit * sum(float((direction[name] * found[name]).sum()) for name in found)
        # A random direction is all but orthogonal to the gradient, whose length is the measure then.
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=5e-3, abs=1e-3 * length)


def norm_of(tensors: dict[str, Tensor]) -> float:
    return sum(float(tensor.square().sum()) for tensor in tensors.values()) ** 0.5


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(architecture: Architecture, use_reentrant: bool, padded: bool) -> None:
    tuned = tune(architecture)
    rows = [tuned.ids(1, 15)[0], tuned.ids(1, 15 - 8 * padded, seed=1)[0]]
    ids, mask, positions = left_pad(rows)
    arguments = {"attention_mask": mask, "position_ids": positions}
    tuned.model.train()
    expected = gradients(tuned, loss_of(tuned.model, ids, use_cache=False, **arguments))
    tuned.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    tuned.model.enable_input_require_grads()
    actual = gradients(tuned, loss_of(tuned.model, ids, use_cache=False, **arguments))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_of_packed_rows(architecture: Architecture, use_reentrant: bool) -> None:
    """A layer that is run again finds the same documents, also when other rows went through it in between."""
    tuned = tune(architecture)
    ids, arguments = tuned.ids(1, 15), packed_arguments([9, 6])
    tuned.model.train()
    expected = gradients(tuned, loss_of(tuned.model, ids, use_cache=False, **arguments))
    tuned.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    tuned.model.enable_input_require_grads()
    loss = loss_of(tuned.model, ids, use_cache=False, **arguments)
    with torch.no_grad():
        tuned.model.eval()(tuned.ids(1, 12), use_cache=False, **packed_arguments([3, 9]))
    tuned.model.train()
    # In another thread, as on a GPU.
    with ThreadPoolExecutor(1) as pool:
        actual = pool.submit(gradients, tuned, loss).result()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "config", [{"normalize": True}, {"rank": 2}, {"train_alpha": 1.0}, {"init_weights": True, "normalize": True}]
)
def test_every_form_of_state_has_a_finite_gradient(architecture: Architecture, config: dict) -> None:
    tuned = tune(architecture, **config)
    tuned.model.train()
    found = gradients(tuned, loss_of(tuned.model, tuned.ids(2, 9)))
    assert all(bool(torch.isfinite(grad).all()) for grad in found.values())


def test_backpropagation_goes_no_further_than_the_states(tuned: Tuned) -> None:
    """No weight has a gradient, and nothing below the first tuned mixer a graph."""
    needs: list[bool] = []

    def note(mixer: nn.Module, args: tuple, kwargs: dict) -> None:
        argument = find_mixer(type(mixer)).input_argument
        needs.append((kwargs[argument] if argument in kwargs else args[0]).requires_grad)

    for mixer in mixers(tuned.model):
        mixer.register_forward_pre_hook(note, with_kwargs=True)
    loss = loss_of(tuned.model, tuned.ids(2, 7))
    assert needs == [False, *[True] * (len(needs) - 1)]
    states = {parameter for name, parameter in tuned.model.named_parameters() if "s0_state" in name}
    assert leaves(loss) == states


def leaves(result: Tensor) -> set[Tensor]:
    """The tensors that a result's backward pass leaves gradients in."""
    found, seen, todo = set(), set(), [result.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        todo += [following for following, _ in node.next_functions]
    return found
