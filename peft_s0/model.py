"""S0 as a PEFT tuner: find the mixers, attach the layers, route rows to adapters, refuse what cannot be right."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate.hooks import remove_hook_from_module
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, _find_minimal_target_modules
from peft.utils import (
    AuxiliaryTrainingWrapper,
    PeftType,
    _get_submodules,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .alpha import check_alpha, fit_pattern, layer_key
from .card import tag_model, untag_model
from .config import S0Config, listed, load_config, without_start
from .fit import (
    LEARNT,
    check_beside_states,
    check_other_weights,
    check_states,
    check_sum,
    check_weights,
    expected_states,
    shortened,
)
from .injection import CHILD, attach, clean, detach, has_layer, layer_of, unwatch, watch
from .layer import MERGE_ERROR, S0Layer, set_alpha_keys
from .mixers import Mixer, find_mixer, registered_mixers
from .mixers.refused import looks_recurrent, refused
from .naming import match_names, shared_name
from .precision import casts_parameters
from .probing import in_eval_mode
from .prompt import start_from_prompt
from .rows import BASE, Routing, RowAdapters
from .storage import decode


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
    _routing: Routing
    # The rows of every call while a StateBank is used: all but their states, which are in slots, is the base model's.
    _bank_rows: list[str] | None = None

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
        mixers = recurrent_mixers(self.model)
        if peft_config.target_modules is None:
            # Written into the config, which is what is saved: loading needs the names.
            others = {name for name, _ in self.model.named_modules() if name and name not in mixers}
            peft_config.target_modules = _find_minimal_target_modules(set(mixers), others)
        elif not isinstance(peft_config.target_modules, str):
            # Full names may be those of another class of the model.
            modules = [f".{name}" for name, _ in self.model.named_modules()]
            unknown = {
                target
                for target in peft_config.target_modules
                if not any(name.endswith(f".{target}") for name in modules)
            }
            renamed = match_names(unknown, mixers)
            peft_config.target_modules = {renamed.get(target, target) for target in peft_config.target_modules}
        if peft_config.layers_to_transform is not None and peft_config.layers_pattern is None:
            # PEFT's own guess needs something in front of the list of layers, which a bare backbone has not.
            peft_config.layers_pattern = sorted({shared_name(name).partition(".")[0] for name in mixers})
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
        matched = [name for name in self._targets(peft_config, model) if not name.startswith(inside)]
        for name in matched:
            module = model.get_submodule(name)
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
            _check_variant(peft_config, name, module, mixers[name])
            _check_rank(peft_config, name, mixers[name].state_shape(module))
        if not matched:
            raise NoMatchingPeftModuleError(
                f"S0Config: target_modules={peft_config.target_modules!r} (exclude_modules="
                f"{peft_config.exclude_modules!r}, layers_to_transform={peft_config.layers_to_transform!r}, "
                f"modules_to_save={peft_config.modules_to_save!r}) matches nothing. The recurrent mixers of this model "
                f"are {shortened(mixers)}; leave target_modules at None to adapt all of them. Those in modules_to_save "
                "get no state."
            )
        peft_config.alpha_pattern = fit_pattern(peft_config.alpha_pattern, matched)

    def _targets(self, config: S0Config, model: nn.Module | None = None) -> list[str]:
        """Names of the modules that a config's `target_modules` and the fields beside it choose.

        Args:
            config: an adapter's config.
            model: the model to look in; None: this one's.
        """
        model = self.model if model is None else model
        matches = {name: self._check_target_module_exists(config, name) for name, _ in model.named_modules()}
        return [name for name, match in matches.items() if match and not isinstance(match, _ExcludedModule)]

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
        set_alpha_keys(adapter_name, peft_config, {current_key: layer_of(target)})
        layer_of(target).update_layer(adapter_name, peft_config, _device(target), casts_parameters(self.model))

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """See `BaseTuner.inject_adapter`."""
        # Layers read the config in each call, and what the model does not know is written into it: it is the adapter's
        # alone, whatever else is made of the one that was passed.
        config = cast(S0Config, copy.deepcopy(self.peft_config[adapter_name]))
        self.peft_config[adapter_name] = config
        heads = _HEADS.get(config.task_type or "", [])
        if heads:
            # PEFT adds them later, and to the config that was passed.
            config.modules_to_save = [*dict.fromkeys([*(config.modules_to_save or []), *heads])]
        if state_dict is not None:
            # PEFT takes what stands in front of the prefix for the target; here that is the mixer's child, and its name
            # may be that of another class of the model.
            found = ((key, LEARNT.search(key)) for key in state_dict)
            names = {key: key[: match.start()] for key, match in found if match is not None}
            own = match_names(dict.fromkeys(names.values()), (name for name, _ in _mixers(model)))
            # A mixer that has several is the same target.
            state_dict = {f"{own[name]}.s0_state.weight": state_dict[key] for key, name in names.items()}
        # Another tuner may have injected an adapter into the same model, and must go on reaching all layers.
        present = next(self.tuner_layers(), None)
        self._routing = Routing() if present is None else present.routing
        self._routing.layers = []
        with self._all_or_nothing(model, adapter_name):
            if adapter_name == BASE:
                raise ValueError(f"'{BASE}' stands for the base model in adapter_names; name the adapter otherwise.")
            self._replace(adapter_name)
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
            if state_dict is None:
                start_from_prompt(model, adapter_name, cast(S0Config, self.peft_config[adapter_name]))
        _detach_empty(model)
        watch(model)
        tag_model(model)
        self._route()

    def _replace(self, adapter_name: str) -> None:
        """Take away what an earlier adapter of a name has in the model, as where a cell of a notebook is run again.

        Raises:
            ValueError: if it trains more than states, which PEFT would go on with.
        """
        for name, layer in self._layers_of(adapter_name).items():
            config = layer.configs[adapter_name]
            if config.modules_to_save or config.trainable_token_indices:
                raise ValueError(
                    f"This model has an adapter '{adapter_name}' already ('{name}' has a state of it), with "
                    "modules_to_save or trainable_token_indices, which a new one of that name would go on with. Take "
                    "it away first, by unload() or delete_adapter() of its PeftModel, or choose another name."
                )
            layer.drop_adapter(adapter_name)

    def _route(self) -> None:
        """Let all tuner layers of the model look up the same thing."""
        self._routing.layers, self._routing.held = list(self.tuner_layers()), None
        for layer in self._routing.layers:
            layer.routing = self._routing

    @contextmanager
    def _all_or_nothing(self, model: nn.Module, adapter_name: str) -> Iterator[None]:
        """Leave the model as it was where an adapter is refused: PEFT reads `modules_to_save` and tokens last."""
        restore = {layer: layer.snapshot() for layer in self.tuner_layers()}
        earlier = [layer.configs[adapter_name] for layer in restore if adapter_name in layer.configs]
        trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
        wrappers = {module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)}
        try:
            yield
        except Exception:
            for mixer in [module for module in model.modules() if has_layer(module)]:
                restore.get(layer_of(mixer), partial(detach, mixer))()
            unwatch(model)
            for name, module in list(model.named_modules()):
                if isinstance(module, AuxiliaryTrainingWrapper) and module not in wrappers:
                    parent, _, child = _get_submodules(model, name)
                    setattr(parent, child, module.original_module)
            for parameter, requires_grad in trained.items():
                parameter.requires_grad_(requires_grad)
            if earlier:
                self.peft_config[adapter_name] = earlier[0]
            else:
                del self.peft_config[adapter_name]
            self._route()
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
        if not isinstance(adapter_name, str):
            adapter_name = [*adapter_name]
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"Unknown adapters {unknown}; this model has {sorted(self.peft_config)}.")
        if self._has_other_modules() or not self._routing.layers:
            super().set_adapter(adapter_name, inference_mode=inference_mode)
            return
        # Without a walk over all modules of the model, which takes a hundred times as long, and without calls of single
        # layers, each of which waits for memory.
        self._routing.let_learn([] if inference_mode else names)
        for layer in self._routing.layers:
            vars(layer)["_active_adapter"] = names
        self.active_adapter = adapter_name

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
        own = {name for name, config in self.peft_config.items() if isinstance(config, S0Config)}
        # What other methods have put into the model stays, as S0 stays where they are unloaded or merged. PEFT's own
        # loop would take that away, too, and it cannot put back a module of which tokens are trained.
        for name, module in list(self.model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper) and module._get_available_adapters() <= own:
                parent, _, child = _get_submodules(self.model, name)
                setattr(parent, child, module.unload_and_optionally_merge_module(False, False, None))
        if len(own) < len(self.peft_config):
            for name in own:
                del self.peft_config[name]
        elif "peft_config" in vars(self.model):
            # As PEFT does it: a model that carries this attribute counts as adapted.
            del self.model.peft_config
        for module in list(self.model.modules()):
            if has_layer(module):
                detach(module)
        unwatch(self.model)
        untag_model(self.model)
        return self.model

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """States are made in float32 and stay so, whatever the base model's dtype.

        PEFT calls this last where it loads an adapter. If the base model is offloaded, accelerate has offloaded the
        states with it by then, those of layers on disk to files that do not hold them. They come back here.
        """
        for layer in self.tuner_layers():
            for state in layer.learnt_tensors(adapter_name).values():
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
        """Make a new adapter that starts from a weighted sum of the states of others, and reads one of their offsets.

        Args:
            adapters: names of the adapters to combine; they must cover the same layers.
            weights: one weight for each.
            adapter_name: name of the new adapter.
            combination_type: only "linear".

        Raises:
            ValueError: for unknown names, lists of different lengths, a name that is taken, another combination type,
                weights that are no finite numbers or too large for a finite sum, adapters that do not cover the same
                layers, or that train more than states. The model is then as it was.
        """
        if combination_type != "linear":
            raise ValueError(f"States combine by combination_type='linear' only, got {combination_type!r}.")
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter '{adapter_name}' exists already; choose another name or delete it first.")
        check_weights(adapters, weights)
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
        variants = {own[name].variant for name in adapters}
        # Effective states are summed and stored as they are, so alpha is 1 and nothing is normalised again.
        self.peft_config[adapter_name] = without_start(
            own[adapters[0]],
            variant=variants.pop() if len(variants) == 1 else "both",
            alpha=1.0,
            alpha_pattern={},
            learn_alpha=False,
            train_alpha=None,
            normalize=False,
            rank=None,
        )
        self.inject_adapter(self.model, adapter_name)
        # In training mode, `train_alpha` would be read for `alpha`.
        with in_eval_mode(self.model):
            for layer in self.tuner_layers():
                for kind, learnt in layer.learnt_tensors(adapter_name).items():
                    effective = layer.effective_state if kind == "s0_state" else layer.effective_offset
                    parts = [
                        weight * effective(name)
                        for name, weight in zip(adapters, weights, strict=True)
                        if kind in layer.learnt_tensors(name)
                    ]
                    total = torch.stack(parts).sum(0)
                    try:
                        check_sum(total, weights)
                    except ValueError:
                        self.delete_adapter(adapter_name)
                        raise
                    learnt.load_state_dict({"weight": total})

    def set_alpha(self, alpha: float | Mapping[str, float], adapter_name: str | None = None) -> None:
        """Change the scale of an adapter's states, at once and in what is saved.

        It is the scale of `S0Config.alpha` and `alpha_pattern`; `train_alpha`, where it is set, stays that of training.
        Where alphas are learnt (`learn_alpha`), it is written over what was learnt, and learning goes on from there.
        A bank's tasks have alphas of their own. Code that `torch.compile` made is compiled once more when a layer's
        alpha changes for the first time, or is the layer's own for the first time, and never runs with the old value.

        Args:
            alpha: one number for all layers, or numbers by names of layers, as `targeted_module_names` gives them or
                from the list of layers on (`"layers.0.linear_attn"`); layers that are not named keep theirs.
            adapter_name: None for the active adapter. No call of the model may be running.

        Raises:
            ValueError: for an alpha that is no finite number >= 0, for unknown layers or an unknown adapter, and
                without a name if not exactly one adapter is active. Nothing is changed then.

        Example:
            >>> model.set_alpha(0.1)
            >>> model.set_alpha({"layers.0.linear_attn": 0.2, "layers.1.linear_attn": 0.0})
        """
        adapter_name, alpha = self._one_adapter(adapter_name), listed(alpha)
        if isinstance(alpha, Mapping):
            layers = self._layers_of(adapter_name)
            for name, value in alpha.items():
                check_alpha(f"set_alpha: the alpha of '{name}'", value)
            own = match_names((name for name in alpha if isinstance(name, str)), layers)
            unknown = [name for name in alpha if own.get(name) not in layers]
            if unknown:
                raise ValueError(
                    f"set_alpha: unknown layers {unknown}; adapter '{adapter_name}' has {shortened(layers)}."
                )
            alpha = {own[name]: float(value) for name, value in alpha.items()}
        else:
            check_alpha("set_alpha: alpha", alpha)
        self._put_alpha(alpha, adapter_name)

    def _put_alpha(self, alpha: float | dict[str, float], adapter_name: str) -> None:
        """`set_alpha` without its checks, by the names that the layers have here. What is learnt may be negative."""
        layers = self._layers_of(adapter_name)
        config = cast(S0Config, self.peft_config[adapter_name])
        if config.learn_alpha:
            with torch.no_grad():
                for name, layer in layers.items():
                    if not isinstance(alpha, dict) or name in alpha:
                        learnt = layer.learnt_tensors(adapter_name)["s0_alpha"]
                        learnt.weight.fill_(alpha[name] if isinstance(alpha, dict) else alpha)
        elif isinstance(alpha, dict):
            given = {layer_key(name, layers): value for name, value in alpha.items()}
            others = {key: value for key, value in config.alpha_pattern.items() if key not in given}
            self._change_config(adapter_name, {"alpha_pattern": fit_pattern({**given, **others}, layers)})
        else:
            self._change_config(adapter_name, {"alpha": float(alpha), "alpha_pattern": {}})

    def _one_adapter(self, adapter_name: str | None) -> str:
        """The adapter of this name, or with None the one that is active.

        Raises:
            ValueError: if there is no such adapter of S0, or not exactly one is active.
        """
        own = sorted(name for name, config in self.peft_config.items() if isinstance(config, S0Config))
        active = [name for name in self.active_adapters if name in own]
        if adapter_name is None:
            if len(active) != 1:
                raise ValueError(f"Pass adapter_name, one of {own}: the active adapters are {active}.")
            return str(active[0])
        if adapter_name not in own:
            raise ValueError(f"Unknown adapter '{adapter_name}'; this model has {own}.")
        return adapter_name

    def _layers_of(self, adapter_name: str) -> dict[str, S0Layer]:
        """The tuner layers that an adapter has a state in, by the names of their mixers."""
        modules = self.model.named_modules()
        return {
            name.removesuffix(f".{CHILD}"): module
            for name, module in modules
            if isinstance(module, S0Layer) and adapter_name in module.configs
        }

    def _change_config(self, adapter_name: str, changes: Mapping[str, Any]) -> None:
        """Set fields of an adapter's config."""
        config = cast(S0Config, self.peft_config[adapter_name])
        for field, value in changes.items():
            setattr(config, field, value)
        set_alpha_keys(adapter_name, config, self._layers_of(adapter_name))

    def hotswap_adapter(self, model_id: str | Path, adapter_name: str, **kwargs: Any) -> None:
        """Replace the states of a loaded adapter by those of a file, in place.

        Parameters stay the objects they are, so that an optimiser goes on with them and a compiled model runs on. The
        file's `alpha`, `alpha_pattern`, `train_alpha` and `normalize`, which say how its states are read, are taken
        over; the name, `l2_lambda` and all else stay the adapter's own. Code that `torch.compile` made for another
        `alpha` is compiled once more, for any `alpha`; a program that `torch.export` wrote keeps the old one.

        Args:
            model_id: folder or Hub id of the saved adapter.
            adapter_name: the adapter whose states are replaced. No call of the model may be running.
            kwargs: `subfolder`, `revision`, `token` and the like, for the Hub.

        Raises:
            ValueError: if there is no such adapter, if the file is refused as it would be in loading, or if it differs
                in what fixes the parameters: layers, `rank`, `variant`, `learn_alpha`, `modules_to_save`,
                `trainable_token_indices`.
                The adapter is then as it was.
        """
        current = cast(S0Config, self.peft_config[self._one_adapter(adapter_name)])
        config = self._prepare_adapter_config(load_config(model_id, **kwargs), self.get_model_config(self.model))
        for field in ("rank", "variant", "learn_alpha", "modules_to_save", "trainable_token_indices"):
            expected, found = getattr(current, field), getattr(config, field)
            if expected != found:
                raise ValueError(
                    f"Adapter '{adapter_name}' has {field}={expected!r}, but that of '{model_id}' has {found!r}: its "
                    "parameters are others and cannot be replaced in place. Load it with load_adapter."
                )
        scales = {field: getattr(config, field) for field in ("alpha", "train_alpha", "normalize")}
        scales["alpha_pattern"] = fit_pattern(config.alpha_pattern, self._layers_of(adapter_name))
        states = {
            name.removeprefix("base_model.model."): state
            for name, state in load_peft_weights(str(model_id), device="cpu", **kwargs).items()
        }
        check_other_weights(self.model, adapter_name, states)
        # Loaded or trained, the adapter stays if this file is refused.
        vars(current).pop("awaits_states", None)
        set_peft_model_state_dict(self.model, states, adapter_name)
        self._change_config(adapter_name, scales)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Route each row of a batch to an adapter for one call: `adapter_names`, one for each row, `"__base__"` for the
        base model.
        """
        names = kwargs.pop("adapter_names", None)
        outer = self._routing.rows
        if self._bank_rows is not None:
            if names is not None:
                raise ValueError("adapter_names was passed while a StateBank says where each row starts from.")
            names = self._bank_rows if outer is None else None
        rows = None if names is None else self._row_adapters(names, args, kwargs)
        handles = []
        try:
            if rows is None and outer is None:
                yield
                return
            self._routing.rows = rows
            # In a call within this call the same hooks find that call's rows.
            if outer is None and self._has_other_modules():
                handles = list(self._hook_other_modules())
            yield
        except KeyboardInterrupt:
            # After which torch calls no hooks.
            clean(self.model)
            raise
        finally:
            self._routing.rows = outer
            for handle in handles:
                handle.remove()

    def _hook_other_modules(self) -> Iterator[RemovableHandle]:
        """Let the modules that adapters have copies of know each row's adapter."""
        called: set[nn.Module] = set()
        inside: set[nn.Module] = set()
        for name, module in self.model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                hook = partial(_pass_adapter_names, self._routing, called if module in inside else None)
                yield module.register_forward_pre_hook(hook, with_kwargs=True)
            elif find_mixer(type(module)) is not None:
                found = {f"{name}.{place}": part for place, part in module.named_modules()}
                parts = {place: part for place, part in found.items() if isinstance(part, AuxiliaryTrainingWrapper)}
                if parts:
                    inside.update(parts.values())
                    yield module.register_forward_hook(partial(_check_called, self._routing, called, parts))

    def _has_other_modules(self) -> bool:
        # Asked of every adapter at every switch: in a loop, which is faster than a generator.
        for config in self.peft_config.values():
            if getattr(config, "modules_to_save", None) or getattr(config, "trainable_token_indices", None):
                return True
        return False

    def _row_adapters(self, names: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RowAdapters:
        if not isinstance(names, (list, tuple)):
            raise TypeError(f"adapter_names must be a list with one name for each row, got {type(names).__name__}.")
        if self.training:
            raise ValueError("adapter_names is for inference; call model.eval() first.")
        unknown = sorted({str(name) for name in names} - set(self.peft_config) - {BASE})
        if unknown:
            raise ValueError(
                f"adapter_names has unknown adapters {unknown}; this model has {sorted(self.peft_config)} and '{BASE}'."
            )
        # What generate() is called with is seen here, before it repeats rows; what forward() is called with is not.
        inputs = [kwargs[name] for name in ("inputs", "input_ids", "inputs_embeds") if kwargs.get(name) is not None]
        inputs = [*args[:1], *inputs]
        argument = "adapter_names" if self._bank_rows is None else "tasks"
        return RowAdapters(names, inputs[0].shape[0] if inputs else None, argument)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: S0Config, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """What is saved of an adapter; refused where it is not all here, before anything is written."""
        check_beside_states(model, config, adapter_name)
        found: dict[str, Tensor] = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        for name, state in found.items():
            if LEARNT.search(name) and state.numel() == 0:
                raise ValueError(
                    f"The state '{name}' is empty here: DeepSpeed's ZeRO-3 has dealt it out to the processes. Save "
                    "with trainer.save_model(), in all processes, or within deepspeed.zero.GatheredParameters."
                )
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: S0Config, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map a file's names to the model's; refuse a file that is not this adapter's before anything is written."""
        expected = (
            cls._remove_adapter_name_from_key(name, adapter_name) for name in expected_states(model, adapter_name)
        )
        try:
            state_dict = decode(state_dict)
            own = match_names((name for name in state_dict if LEARNT.search(name)), expected)
            state_dict = {own.get(name, name): value for name, value in state_dict.items()}
            remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
                model, config, adapter_name, state_dict
            )
            check_states(model, adapter_name, remapped)
        except ValueError:
            _withdraw(model, config, adapter_name)
            raise
        for mark in ("awaits_states", "awaits_int8"):
            vars(config).pop(mark, None)
        if "disk" in getattr(model, "hf_device_map", {}).values():
            for name, layer in model.named_modules():
                if isinstance(layer, S0Layer):
                    for kind, learnt in layer.learnt_tensors(adapter_name).items():
                        learnt.loaded = remapped[f"{name}.{kind}.{adapter_name}.weight"]
        return remapped

    def tuner_layers(self) -> Iterator[S0Layer]:
        """The tuner layers, in the order of the model."""
        return (module for module in self.model.modules() if isinstance(module, S0Layer))


_HEADS = {"TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


def recurrent_layers(model: nn.Module) -> list[int]:
    """Indices of the decoder layers that have a recurrent mixer, in order: what `layers_to_transform` counts in.

    Args:
        model: any class of the model, adapted or not.

    Example:
        >>> layers = recurrent_layers(model)
        >>> config = S0Config(layers_to_transform=layers[: len(layers) // 3])  # the first third
    """
    found = (re.match(r"[^.]+\.(\d+)\.", shared_name(name)) for name, _ in _mixers(model))
    return sorted({int(match[1]) for match in found if match is not None})


def _mixers(model: nn.Module) -> Iterator[tuple[str, Mixer]]:
    for name, module in model.named_modules():
        declaration = find_mixer(type(module))
        if declaration is not None:
            yield name, declaration


def recurrent_mixers(model: nn.Module) -> dict[str, Mixer]:
    """The recurrent mixers of a model, by their names.

    Raises:
        NoMatchingPeftModuleError: if there are none; the message says why.
    """
    mixers = dict(_mixers(model))
    if not mixers:
        raise NoMatchingPeftModuleError(_no_mixers(model))
    return mixers


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


def _check_variant(config: S0Config, name: str, mixer: nn.Module, declaration: Mixer) -> None:
    if config.variant != "initial" and declaration.readout is None:
        families = dict.fromkeys(mixer.family.name for mixer in registered_mixers() if mixer.readout is not None)
        raise ValueError(
            f"S0Config: variant='{config.variant}' needs a mixer whose state S0 can add an offset to when it is read, "
            f"which '{name}' ({type(mixer).__name__}, {declaration.family.name}) is not. Those are mixers of "
            f"transformers with one of the recurrences {' and '.join(families)}. Use variant='initial'."
        )


def _pass_adapter_names(
    routing: Routing,
    called: set[nn.Module] | None,
    module: AuxiliaryTrainingWrapper,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Tell a module that an adapter has a copy of which copy each row takes; where it has none, the base model's.

    Args:
        routing: whose rows.
        called: for a part of a mixer, where it is noted that it was called; None for all else.
        module: the module.
        args: what it is called with.
        kwargs: what it is called with by name.
    """
    if routing.rows is None:
        return None
    held = module._get_available_adapters()
    batch = len(args[0] if args else next(iter(kwargs.values())))
    if called is not None:
        called.add(module)
    rows = routing.rows.of(batch) if called is None else routing.rows.in_mixer(batch)
    names = [name if name in held else BASE for name in rows]
    return args, {**kwargs, "adapter_names": names}


def _check_called(
    routing: Routing,
    called: set[nn.Module],
    parts: Mapping[str, AuxiliaryTrainingWrapper],
    mixer: nn.Module,
    *call: Any,
) -> None:
    """Refuse rows that would have another adapter's weights, where a mixer reads them off a module, as a convolution's.

    Raises:
        ValueError: naming the module, and whose weights all rows would have.
    """
    if routing.rows is None:
        return
    for name, part in parts.items():
        held = part._get_available_adapters()
        read = part.active_adapters[0] if part.active_adapters and not part.disable_adapters else BASE
        others = {row if row in held else BASE for row in routing.rows.different} - {read}
        if part not in called and others:
            whose = "the base model" if read == BASE else f"adapter '{read}'"
            raise ValueError(
                f"{type(mixer).__name__} reads the weights of '{name}' without calling it, those of {whose} for all "
                f"rows, but there are rows of {sorted(others)}, too. Run the rows of each adapter in a call of their "
                "own, with that adapter active (set_adapter)."
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
    if not all(learnt.untouched for _, layer in layers for learnt in layer.learnt_tensors(adapter_name).values()):
        return
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    _take_away(base, adapter_name, config)
    adapters = model.peft_config
    adapters.pop(adapter_name, None)
    if not adapters:
        untag_model(base)
    if not adapters and "peft_config" in vars(base):
        # As PEFT's own unload does it: a model that carries this attribute counts as adapted.
        del base.peft_config


def _take_away(model: nn.Module, adapter_name: str, config: S0Config) -> None:
    """Take an adapter's states out of a model, and the tuner layers that are left without any."""
    for layer in [module for module in model.modules() if isinstance(module, S0Layer)]:
        if layer.configs.get(adapter_name) is config:
            # Of the active adapter, PEFT would say that it is deleted; here it never was.
            layer.drop_adapter(adapter_name)
    _detach_empty(model)
    unwatch(model)


def _detach_empty(model: nn.Module) -> None:
    """Take the tuner layers away that hold no adapter, nor what a bank has put there."""
    for mixer in [module for module in model.modules() if has_layer(module)]:
        layer = layer_of(mixer)
        if not layer.configs and layer.slots is None:
            detach(mixer)
            layer.routing.layers = [other for other in layer.routing.layers if other is not layer]
