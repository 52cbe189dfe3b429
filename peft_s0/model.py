"""S0 as a PEFT tuner: find the mixers, attach the layers, route rows to adapters, refuse what cannot be right."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch
from accelerate.hooks import remove_hook_from_module
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, _find_minimal_target_modules
from peft.utils import AuxiliaryTrainingWrapper, PeftType, _get_submodules
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from .config import S0Config
from .injection import CHILD, attach, detach, has_layer, layer_of, unwatch_packing, watch_packing
from .layer import BASE, MERGE_ERROR, S0Layer
from .mixers import Mixer, find_mixer, registered_mixers
from .mixers.refused import looks_recurrent, refused

_STATE_KEY = f".{CHILD}.s0_state."


class S0Model(BaseTuner):
    """Adds learnt initial states to the recurrent mixers of a model (arXiv 2604.01168).

    Args:
        model: the model to adapt; it is changed in place.
        config: the adapter's config.
        adapter_name: its name.
        low_cpu_mem_usage: make the states on the meta device, to be loaded at once.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from peft_s0 import S0Config
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3.5-4B")
        >>> model = get_peft_model(model, S0Config())
    """

    prefix: str = "s0_"
    tuner_layer_cls = S0Layer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as in PEFT

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        other = getattr(model, "peft_config", {}).get(adapter_name)
        if other is not None and not isinstance(other, S0Config):
            raise ValueError(
                f"This model has an adapter '{adapter_name}' of type {PeftType(other.peft_type).value}, whose config "
                "would be lost. Give the S0 adapter another name (adapter_name=...)."
            )
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        # The model's own attribute, which PEFT would do with, goes when another method is merged or unloaded.
        self.peft_config = self.model.peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: S0Config, key: str) -> Any:
        """As in PEFT, but `layers_to_transform` also counts for mixers named in full or by a regular expression."""
        layers = peft_config.layers_to_transform
        everywhere = copy.copy(peft_config)
        everywhere.layers_to_transform = None
        match = BaseTuner._check_target_module_exists(everywhere, key)
        if not match or layers is None or layers == []:
            return match
        patterns = peft_config.layers_pattern or r"[^.]+"
        pattern = "|".join([patterns] if isinstance(patterns, str) else patterns)
        found = re.match(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.", key)
        return found is not None and int(found.group(1)) in ([layers] if isinstance(layers, int) else layers)

    def _prepare_adapter_config(self, peft_config: S0Config, model_config: dict[str, Any]) -> S0Config:
        mixers = dict(_mixers(self.model))
        if not mixers:
            raise NoMatchingPeftModuleError(_no_mixers(self.model))
        if peft_config.target_modules is None:
            # Written into the config, which is what is saved: loading needs the names.
            others = {name for name, _ in self.model.named_modules() if name and name not in mixers}
            peft_config.target_modules = _find_minimal_target_modules(set(mixers), others)
        if peft_config.alpha is None:
            families = {declaration.family for declaration in mixers.values()}
            if len({family.alpha for family in families}) > 1:
                raise ValueError(
                    "S0Config: alpha is None, but this model mixes recurrences with different defaults ("
                    + ", ".join(f"{family.name}: {family.alpha}" for family in families)
                    + "). Set alpha."
                )
            peft_config.alpha = next(iter(families)).alpha
        return peft_config

    def _prepare_model(self, peft_config: S0Config, model: nn.Module) -> None:
        """Refuse a config that does not fit before anything is attached."""
        mixers = dict(_mixers(model))
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        matched = []
        for name, module in model.named_modules():
            match = self._check_target_module_exists(peft_config, name)
            if not match or isinstance(match, _ExcludedModule) or name.startswith(inside):
                continue
            matched.append(name)
            if name not in mixers:
                raise TypeError(
                    f"S0Config: target_modules={peft_config.target_modules!r} matches '{name}' "
                    f"({type(module).__name__}), which is no recurrent mixer. S0 adapts whole mixers, here for example "
                    f"'{next(iter(mixers))}' ({type(model.get_submodule(next(iter(mixers)))).__name__}); leave "
                    "target_modules at None to adapt all of them."
                )
            refusal = mixers[name].refusal(module)
            if refusal is not None:
                raise ValueError(f"S0 cannot tune '{name}' ({type(module).__name__}): {refusal}.")
            _check_rank(peft_config, name, mixers[name].state_shape(module))
        if not matched:
            raise NoMatchingPeftModuleError(
                f"S0Config: target_modules={peft_config.target_modules!r} (exclude_modules="
                f"{peft_config.exclude_modules!r}, layers_to_transform={peft_config.layers_to_transform!r}) matches "
                f"nothing. The recurrent mixers of this model are {_shortened(mixers)}; leave target_modules at None "
                "to adapt all of them."
            )

    def _create_and_replace(
        self,
        peft_config: S0Config,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        declaration = find_mixer(type(target))
        if declaration is None:
            raise TypeError(f"S0 adapts recurrent mixers; '{current_key}' is a {type(target).__name__}.")
        if not has_layer(target):
            attach(target, S0Layer(target, declaration).train(target.training))
        layer_of(target).update_layer(adapter_name, peft_config, _device(target))

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """See `BaseTuner.inject_adapter`."""
        if state_dict is not None:
            # PEFT takes what stands in front of the prefix for the target; here that is the mixer's child.
            state_dict = {key.replace(_STATE_KEY, ".s0_state."): value for key, value in state_dict.items()}
        with self._all_or_nothing(model, adapter_name):
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
        watch_packing(model)

    @contextmanager
    def _all_or_nothing(self, model: nn.Module, adapter_name: str) -> Iterator[None]:
        """Leave the model as it was where an adapter is refused: PEFT reads `modules_to_save` and tokens last."""
        active = {layer: layer.active_adapters for layer in self.tuner_layers()}
        trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
        wrappers = {module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)}
        try:
            yield
        except Exception:
            _take_away(model, adapter_name, cast(S0Config, self.peft_config[adapter_name]))
            for name, module in list(model.named_modules()):
                if isinstance(module, AuxiliaryTrainingWrapper) and module not in wrappers:
                    parent, _, child = _get_submodules(model, name)
                    setattr(parent, child, module.original_module)
            for layer, names in active.items():
                layer._active_adapter = names
            for parameter, requires_grad in trained.items():
                parameter.requires_grad_(requires_grad)
            held = [layer.configs[adapter_name] for layer in self.tuner_layers() if adapter_name in layer.configs]
            if held:
                self.peft_config[adapter_name] = held[0]
            else:
                del self.peft_config[adapter_name]
            raise

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE_ERROR)

    def unmerge_adapter(self) -> None:
        """Not possible for states.

        Raises:
            ValueError: always, saying what to use instead.
        """
        raise ValueError(MERGE_ERROR)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Choose the adapter that sequences start from; the states of several add up.

        Args:
            adapter_name: its name, or a list of names.
            inference_mode: whether its states are frozen.

        Raises:
            ValueError: for a name that this model does not have.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"Unknown adapters {unknown}; this model has {sorted(self.peft_config)}.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """See `BaseTuner.delete_adapter`.

        Raises:
            ValueError: for an unknown adapter, and for one of another method.
        """
        config = self.peft_config.get(adapter_name)
        if config is not None and not isinstance(config, S0Config):
            raise ValueError(
                f"Adapter '{adapter_name}' is of type {PeftType(config.peft_type).value}: delete it through the "
                "PeftModel that it was added with."
            )
        super().delete_adapter(adapter_name)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        own = [name for name, config in self.peft_config.items() if isinstance(config, S0Config)]
        if len(own) == len(self.peft_config):
            super()._unload_and_optionally_merge(False, *args, **kwargs)
        else:
            # What other methods have put into the model stays, as S0 stays where they are unloaded or merged.
            for name, module in list(self.model.named_modules()):
                if isinstance(module, AuxiliaryTrainingWrapper) and module._get_available_adapters() <= set(own):
                    parent, _, child = _get_submodules(self.model, name)
                    setattr(parent, child, module.unload_and_optionally_merge_module(False, False, None))
            for name in own:
                del self.peft_config[name]
        for module in list(self.model.modules()):
            if has_layer(module):
                detach(module)
        unwatch_packing(self.model)
        return self.model

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """States are made in float32 and stay so, whatever the base model's dtype.

        PEFT calls this last where it loads an adapter. If the base model is offloaded, accelerate has offloaded the
        states with it by then, those of layers on disk to files that do not hold them. They come back here.
        """
        for layer in self.tuner_layers():
            if adapter_name in layer.configs:
                state = layer.state(adapter_name)
                hook: Any = getattr(state, "_hf_hook", None)
                if getattr(hook, "offload", False):
                    if state.loaded is not None:
                        hook.weights_map = {"weight": state.loaded}
                    remove_hook_from_module(state)
                state.loaded = None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No: an initial state is no weight update."""
        return False

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Literal["linear"] = "linear",
    ) -> None:
        """Make a new adapter that starts from a weighted sum of the states of others.

        Args:
            adapters: names of the adapters to combine; they must cover the same layers.
            weights: one weight for each.
            adapter_name: name of the new adapter.
            combination_type: only "linear".

        Raises:
            ValueError: for unknown names, lists of different lengths, a name that is taken, another combination type,
                adapters that do not cover the same layers, or that train more than states.
        """
        if combination_type != "linear":
            raise ValueError(f"States combine by combination_type='linear' only, got {combination_type!r}.")
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter '{adapter_name}' exists already; choose another name or delete it first.")
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(
                f"Pass one weight for each adapter, got {len(adapters)} adapters and {len(weights)} weights."
            )
        own = {name: config for name, config in self.peft_config.items() if isinstance(config, S0Config)}
        unknown = sorted(set(adapters) - set(own))
        if unknown:
            raise ValueError(f"Unknown adapters {unknown}; this model has {sorted(own)}.")
        for name in adapters:
            if own[name].modules_to_save or own[name].trainable_token_indices:
                raise ValueError(
                    f"States combine, whole modules do not: adapter '{name}' has modules_to_save or "
                    "trainable_token_indices, which the combination would lose."
                )
        for layer in self.tuner_layers():
            held = [name for name in adapters if name in layer.configs]
            if held and len(held) != len(adapters):
                raise ValueError(f"The adapters {adapters} do not cover the same layers: one layer has only {held}.")
        # Effective states are summed and stored as they are, so alpha is 1 and nothing is normalised again.
        self.peft_config[adapter_name] = replace(
            own[adapters[0]],
            alpha=1.0,
            train_alpha=None,
            normalize=False,
            rank=None,
            init_weights=True,
        )
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for layer in self.tuner_layers():
                if adapter_name in layer.configs:
                    states = [
                        weight * layer.effective_state(name) for name, weight in zip(adapters, weights, strict=True)
                    ]
                    layer.state(adapter_name).weight.copy_(torch.stack(states).sum(0))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Route each row of a batch to an adapter for one call: `adapter_names`, one for each row, `"__base__"` for the
        base model.
        """
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if not isinstance(names, (list, tuple)):
            raise TypeError(f"adapter_names must be a list with one name for each row, got {type(names).__name__}.")
        if self.training:
            raise ValueError("adapter_names is for inference; call model.eval() first.")
        unknown = sorted(set(names) - set(self.peft_config) - {BASE})
        if unknown:
            raise ValueError(
                f"adapter_names has unknown adapters {unknown}; this model has {sorted(self.peft_config)} and '{BASE}'."
            )
        layers, handles = list(self.tuner_layers()), []
        try:
            for layer in layers:
                layer.row_adapters = list(names)
            for module in self.model.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    hook = partial(_pass_adapter_names, adapter_names=list(names))
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for layer in layers:
                layer.row_adapters = None
            for handle in handles:
                handle.remove()

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: S0Config, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map a file's names to the model's; refuse a file that is not this adapter's before anything is written."""
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        try:
            _check_states(model, adapter_name, remapped)
        except ValueError:
            _withdraw(model, config, adapter_name)
            raise
        vars(config).pop("awaits_states", None)
        if "disk" in getattr(model, "hf_device_map", {}).values():
            for name, layer in model.named_modules():
                if isinstance(layer, S0Layer) and adapter_name in layer.configs:
                    layer.state(adapter_name).loaded = remapped[f"{name}.s0_state.{adapter_name}.weight"]
        return remapped

    def tuner_layers(self) -> Iterator[S0Layer]:
        """The tuner layers, in the order of the model."""
        return (module for module in self.model.modules() if isinstance(module, S0Layer))


def _mixers(model: nn.Module) -> Iterator[tuple[str, Mixer]]:
    for name, module in model.named_modules():
        declaration = find_mixer(type(module))
        if declaration is not None:
            yield name, declaration


def _no_mixers(model: nn.Module) -> str:
    supported = ", ".join(declaration.path.rpartition(".")[2] for declaration in registered_mixers())
    reasons = refused(model)
    if reasons:
        name, reason = next(iter(reasons.items()))
        return (
            f"{type(model).__name__} is recurrent, but S0 does not support its {name}: {reason}. Supported are "
            f"{supported}. For this model use LoRA."
        )
    recurrent = looks_recurrent(model)
    if recurrent:
        return (
            f"{type(model).__name__} is recurrent, but S0 does not support its {' and '.join(recurrent)}. Supported "
            f"are {supported}. A mixer that takes its initial state from its cache can be added with "
            "peft_s0.register_mixer."
        )
    return (
        f"{type(model).__name__} has no recurrent layers, so there is no initial state to tune. S0 is for hybrid and "
        f"recurrent models with {supported}. For a pure Transformer use LoRA."
    )


def _shortened(names: Any) -> str:
    names = list(names)
    return ", ".join(names) if len(names) < 5 else f"{names[0]}, {names[1]}, ... {names[-1]} ({len(names)} in all)"


def _device(mixer: nn.Module) -> torch.device | None:
    devices = (parameter.device for parameter in mixer.parameters())
    return next((device for device in devices if device.type != "meta"), None)


def _check_rank(config: S0Config, name: str, shape: tuple[int, ...]) -> None:
    if config.rank is None:
        return
    if len(shape) != 3:
        raise ValueError(f"S0Config: rank={config.rank} needs matrix states, but that of '{name}' is {list(shape)}.")
    if config.rank > min(shape[1:]):
        raise ValueError(
            f"S0Config: rank={config.rank} is more than a head's state of '{name}' can have: it is {shape[1]} x "
            f"{shape[2]}. Choose a rank <= {min(shape[1:])}, or None for the full state."
        )


def _pass_adapter_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _check_states(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Compare a file's states with what the model expects.

    Raises:
        ValueError: for missing or additional layers, other shapes, dtypes that are not floating-point, or values that
            are not finite; the message names the layer, the expected and the found.
    """
    expected = {
        name: parameter.shape for name, parameter in model.named_parameters() if f"{_STATE_KEY}{adapter_name}." in name
    }
    found = {name: state for name, state in state_dict.items() if "s0_state" in name}
    missing, additional = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    advice = "Load the adapter on the base model it was trained on."
    if missing or additional:
        raise ValueError(
            f"The states do not fit this model. Expected {len(expected)} layers, found {len(found)}"
            + (f"; missing in the file: {_shortened(missing)}" if missing else "")
            + (f"; not in the model: {_shortened(additional)}" if additional else "")
            + f". {advice}"
        )
    for name, state in found.items():
        if state.shape != expected[name]:
            raise ValueError(
                f"The state '{name}' does not fit this model: expected shape {list(expected[name])}, found "
                f"{list(state.shape)}. {advice}"
            )
        if not state.is_floating_point():
            raise ValueError(f"The state '{name}' has dtype {state.dtype}, expected a floating-point dtype.")
        if not bool(torch.isfinite(state).all()):
            raise ValueError(
                f"The state '{name}' has {int((~torch.isfinite(state)).sum())} of {state.numel()} values that are NaN "
                "or infinite; a training run that diverged or a damaged file. Load another checkpoint."
            )


def _withdraw(model: Any, config: S0Config, adapter_name: str) -> None:
    """Take an adapter away again that was made for a file which turned out not to fit.

    Without this, the next attempt under the same name would load onto the refused file's config. An adapter that
    already holds states stays as it is.
    """
    if not config.awaits_states:
        return
    layers = [(module, layer_of(module)) for module in model.modules() if has_layer(module)]
    layers = [(mixer, layer) for mixer, layer in layers if adapter_name in layer.configs]
    if not all(layer.state(adapter_name).untouched for _, layer in layers):
        return
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    _take_away(base, adapter_name, config)
    adapters = model.peft_config
    adapters.pop(adapter_name, None)
    if not adapters and "peft_config" in vars(base):
        # As PEFT's own unload does it: a model that carries this attribute counts as adapted.
        del base.peft_config


def _take_away(model: nn.Module, adapter_name: str, config: S0Config) -> None:
    """Take an adapter's states out of a model, and the tuner layers that are left without any."""
    for mixer in [module for module in model.modules() if has_layer(module)]:
        layer = layer_of(mixer)
        if layer.configs.get(adapter_name) is config:
            # Of the active adapter, PEFT would say that it is deleted; here it never was.
            layer._active_adapter = [name for name in layer.active_adapters if name != adapter_name]
            layer.delete_adapter(adapter_name)
        if not layer.configs:
            detach(mixer)
    unwatch_packing(model)
