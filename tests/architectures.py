"""The table of architectures that every law is tested on. A new architecture is one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import reference
import torch
import transformers
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.models.minimax.modeling_minimax import MiniMaxCache
from transformers.models.xlstm.modeling_xlstm import xLSTMCache

from peft_s0.mixers import cache_argument, find_mixer

VOCABULARY = 128
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
ATTENTION: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
GATED_DELTA_NET: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}
# All experts are chosen: a routing decision that flips at rounding is not what the law is about.
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
LATENT_ATTENTION: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
}
QWEN4: dict[str, Any] = {
    **COMMON,
    **ATTENTION,
    **GATED_DELTA_NET,
    **EXPERTS,
    "num_hidden_layers": 4,
    "hc_count": 2,
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    },
}
NEMOTRON_H: dict[str, Any] = {
    **COMMON,
    **ATTENTION,
    "intermediate_size": 64,
    "ssm_state_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "n_groups": 2,
    "chunk_size": 16,
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
}
IMAGE_TOKENS: dict[str, Any] = {
    "image_token_id": 120,
    "video_token_id": 121,
    "vision_start_token_id": 122,
    "vision_end_token_id": 123,
}
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
MAMBA: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}


def decay_slowly(mixer: nn.Module) -> None:
    """Small time steps, in the parts of a mixer that decay by them."""
    for part in mixer.modules():
        if hasattr(part, "A_log"):
            bias = time_step_bias(part)
            bias.copy_(torch.empty_like(bias).uniform_(0.01, 0.1).expm1().log())
            part.A_log.uniform_(-0.7, 0.7)


def time_step_bias(part: nn.Module) -> torch.Tensor:
    """What is added to the logits of the time step, in a part of a mixer that decays by it."""
    names = [name for name in ("dt_bias", "dt_proj_bias") if hasattr(part, name)]
    return getattr(part, names[0]) if names else part.dt_proj.bias


def open_gates(mixer: nn.Module) -> None:
    """Input gates that let something in, which is what transformers' own initialisation does not."""
    mixer.igate_preact.bias.uniform_(-2, 1)
    for gate in (mixer.igate_preact, mixer.fgate_preact):
        gate.weight.normal_(std=0.1)


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Args:
        name: its model type.
        model_class: the model with a language-modelling head.
        config: makes a tiny config.
        slow_mixer: the naive twin of its mixer.
        alpha: default scale of a state.
        targets: what `target_modules=None` becomes.
        states: how many recurrent layers the tiny model has.
        gain: factor on the mixers' output projections, so that the mixers reach the logits and an error would show.
        masks_steps: whether a call of a single token is given the mask; without attention generate() gives none.
        make_cache: makes an empty one from the model's config, for a number of rows.
        remember: makes a mixer of the tiny model remember its state.
        lacks: what the base model itself cannot do, by the name of the law, with the reason.
    """

    name: str
    model_class: type[PreTrainedModel]
    config: Callable[[], Any]
    slow_mixer: type[reference.SlowMixer]
    alpha: float
    targets: frozenset[str]
    states: int
    gain: float = 1.0
    masks_steps: bool = True
    make_cache: Callable[[Any, int], Any] = lambda config, rows: DynamicCache(config=config)
    remember: Callable[[nn.Module], None] = decay_slowly
    lacks: tuple[tuple[str, str], ...] = ()

    @property
    def cache(self) -> str:
        """The model's argument for its cache."""
        name = cache_argument(self.model_class)
        assert name is not None
        return name

    @property
    def takes_chunks(self) -> bool:
        """Whether the base model goes on with a sequence by several tokens in one call."""
        return "every_split_into_two_chunks" not in dict(self.lacks)

    def shallow(self, recurrent: int) -> Architecture:
        """The same with so many recurrent layers at most and one of attention, where it is layers that take time."""

        def config() -> Any:
            made = self.config()
            if made.num_hidden_layers > recurrent + 1:
                made.num_hidden_layers = recurrent + 1
                made.layer_types = ["linear_attention"] * recurrent + ["full_attention"]
            return made

        return replace(self, config=config, states=len(mixers(self.model_class(config()))))

    def build(self, seed: int = 0) -> PreTrainedModel:
        """A random model in eval mode whose mixers remember: at transformers' own initialisation tiny models forget
        their state within a few tokens."""
        torch.manual_seed(seed)
        model = self.model_class(self.config()).eval()
        with torch.no_grad():
            for mixer in mixers(model):
                self.remember(mixer)
                output_projection(mixer).weight.mul_(self.gain)
        return model


def mixers(model: nn.Module) -> list[nn.Module]:
    """The recurrent mixers of a model."""
    return [module for module in model.modules() if find_mixer(type(module)) is not None]


def output_projection(mixer: nn.Module) -> nn.Module:
    """The last module of a mixer."""
    return next(getattr(mixer, name) for name in ("out_proj", "o_proj", "linear_out") if hasattr(mixer, name))


def _row(name: str, model: str, config: Callable[[], Any], slow_mixer: type, **fields: Any) -> Architecture:
    defaults = {"alpha": 0.07, "targets": frozenset({"linear_attn"}), "states": 3}
    return Architecture(name, getattr(transformers, model), config, slow_mixer, **{**defaults, **fields})


MAMBA2: dict[str, Any] = {"alpha": 0.65, "targets": frozenset({"mamba"}), "states": 2}

# Masks that are made without the positions.
LEAKS = "the base model's attention runs across packed documents"
NGRAMS = "the base model's n-gram embeddings reach across packed documents"
PACKED = (
    "packed_rows",
    "sequence_index_alone",
    "positions_alone",
    "several_packed_rows",
    "packed_row_filled_up_with_pads",
)

MAMBA1: dict[str, Any] = {"alpha": 1.0, "targets": frozenset({"mamba"})}
NO_PAST = (("continued_conversation", "generate() takes no cache of this model back"),)
NO_MATRIX = (("every_form_of_state_has_a_finite_gradient", "its states are no matrices, so they have no rank"),)

ARCHITECTURES = (
    _row(
        "qwen3_5",
        "Qwen3_5ForCausalLM",
        lambda: transformers.Qwen3_5TextConfig(
            **COMMON, **ATTENTION, **GATED_DELTA_NET, intermediate_size=128, num_hidden_layers=4
        ),
        reference.GatedDeltaRule,
    ),
    _row(
        "falcon_h1",
        "FalconH1ForCausalLM",
        lambda: transformers.FalconH1Config(
            **COMMON,
            **MAMBA | {"mamba_d_head": 16},
            head_dim=16,
            intermediate_size=128,
            num_hidden_layers=2,
            mamba_d_ssm=64,
            mamba_n_groups=1,
        ),
        reference.FalconH1,
        **MAMBA2,
        gain=8.0,
    ),
    _row(
        "qwen3_5_moe",
        "Qwen3_5MoeForCausalLM",
        lambda: transformers.Qwen3_5MoeTextConfig(
            **COMMON, **ATTENTION, **GATED_DELTA_NET, **EXPERTS, num_hidden_layers=4
        ),
        reference.GatedDeltaRule,
    ),
    _row(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        lambda: transformers.Qwen3NextConfig(
            **COMMON, **ATTENTION, **GATED_DELTA_NET, **EXPERTS, intermediate_size=64, num_hidden_layers=4
        ),
        reference.Qwen3Next,
    ),
    _row(
        "olmo_hybrid",
        "OlmoHybridForCausalLM",
        lambda: transformers.OlmoHybridConfig(
            **COMMON,
            **GATED_DELTA_NET,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=128,
            num_hidden_layers=4,
        ),
        reference.OlmoHybrid,
    ),
    _row(
        "kimi_linear",
        "KimiLinearForCausalLM",
        lambda: transformers.KimiLinearConfig(
            **COMMON,
            **LATENT_ATTENTION,
            num_hidden_layers=5,
            intermediate_size=64,
            num_local_experts=4,
            num_experts_per_tok=4,
        ),
        reference.KimiDeltaAttention,
        targets=None,
        states=4,
    ),
    _row(
        "bailing_hybrid",
        "BailingHybridForCausalLM",
        lambda: transformers.BailingHybridConfig(
            **COMMON,
            **LATENT_ATTENTION,
            num_hidden_layers=3,
            intermediate_size=64,
            layer_group_size=3,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=4,
        ),
        reference.KimiDeltaAttention,
        targets=None,
        states=2,
    ),
    _row(
        "bamba",
        "BambaForCausalLM",
        lambda: transformers.BambaConfig(
            **COMMON, **MAMBA, intermediate_size=128, num_hidden_layers=3, attn_layer_indices=[1], mamba_n_groups=2
        ),
        reference.Mamba2,
        **MAMBA2,
    ),
    _row(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        lambda: transformers.GraniteMoeHybridConfig(
            **COMMON,
            **MAMBA,
            intermediate_size=128,
            num_hidden_layers=3,
            mamba_n_groups=1,
            num_local_experts=4,
            num_experts_per_tok=4,
            shared_intermediate_size=64,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
        ),
        reference.Mamba2,
        **MAMBA2,
        lacks=tuple((law, LEAKS) for law in PACKED),
    ),
    _row(
        "mamba2",
        "Mamba2ForCausalLM",
        lambda: transformers.Mamba2Config(
            **COMMON, expand=1, num_heads=4, head_dim=16, state_size=16, n_groups=2, chunk_size=16, num_hidden_layers=2
        ),
        reference.Mamba2,
        **MAMBA2 | {"targets": frozenset({"mixer"})},
        masks_steps=False,
        lacks=(("continued_conversation", "generate() takes no cache of this model back"),),
    ),
    _row(
        "nemotron_h",
        "NemotronHForCausalLM",
        lambda: transformers.NemotronHConfig(**NEMOTRON_H),
        reference.Mamba2,
        **MAMBA2 | {"targets": None},
    ),
    _row(
        "nemotron_h_omni",
        "NemotronH_Omni_Reasoning_V3",
        lambda: transformers.NemotronH_Omni_Reasoning_V3_Config(
            text_config=NEMOTRON_H,
            vision_config={
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "patch_size": 4,
                "image_size": 16,
                "max_img_size": 32,
                "video_temporal_patch_size": 2,
            },
            vision_hidden_size=32,
            projector_hidden_size=32,
            image_token_id=IMAGE_TOKENS["image_token_id"],
        ),
        reference.Mamba2,
        **MAMBA2 | {"targets": None},
    ),
    _row(
        "zamba2",
        "Zamba2ForCausalLM",
        lambda: transformers.Zamba2Config(
            **COMMON,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=128,
            num_hidden_layers=4,
            layers_block_type=["linear_attention", "hybrid"] * 2,
            mamba_d_state=16,
            mamba_ngroups=1,
            n_mamba_heads=4,
            chunk_size=16,
            adapter_rank=8,
            use_mem_rope=True,
        ),
        reference.Mamba2,
        **MAMBA2 | {"targets": None, "states": 4},
    ),
    _row(
        "qwen4_exp",
        "Qwen4ExpForCausalLM",
        lambda: transformers.Qwen4ExpTextConfig(**QWEN4),
        reference.GatedDeltaRule,
    ),
    _row(
        "qwen4_exp_ple",
        "Qwen4ExpForCausalLM",
        lambda: transformers.Qwen4ExpTextConfig(
            **QWEN4,
            ple_layer_ids=[1],
            heads_per_ngram=2,
            ngram_vocab_size_base=50,
            make_ngram_vocab_size_divisible_by=8,
            split_ngram_parts=1,
        ),
        reference.GatedDeltaRule,
        lacks=tuple((law, NGRAMS) for law in (*PACKED, "a_packed_row_leaves_the_cache_of_its_last_document")),
    ),
    _row(
        "qwen3_5_vl",
        "Qwen3_5ForConditionalGeneration",
        lambda: transformers.Qwen3_5Config(
            text_config={**COMMON, **ATTENTION, **GATED_DELTA_NET, "intermediate_size": 128, "num_hidden_layers": 4},
            vision_config=VISION,
            **IMAGE_TOKENS,
        ),
        reference.GatedDeltaRule,
    ),
    _row(
        "qwen3_5_moe_vl",
        "Qwen3_5MoeForConditionalGeneration",
        lambda: transformers.Qwen3_5MoeConfig(
            text_config={**COMMON, **ATTENTION, **GATED_DELTA_NET, **EXPERTS, "num_hidden_layers": 4},
            vision_config=VISION,
            **IMAGE_TOKENS,
        ),
        reference.GatedDeltaRule,
    ),
    _row(
        "glm5_next",
        "Glm5NextForConditionalGeneration",
        lambda: transformers.Glm5NextConfig(
            text_config={
                **COMMON,
                **LATENT_ATTENTION,
                "qk_rope_head_dim": 0,
                "qk_nope_head_dim": 16,
                "q_lora_rank": 16,
                "num_hidden_layers": 4,
                "intermediate_size": 64,
                "n_routed_experts": 4,
                "num_experts_per_tok": 4,
                "index_topk": 64,
                "index_head_dim": 16,
                "index_n_heads": 2,
                "index_kpool": 4,
                "hc_mult": 2,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 32,
                "num_heads": 2,
                "out_hidden_size": 64,
                "intermediate_size": 32,
            },
        ),
        reference.KimiDeltaAttention,
        targets=None,
        lacks=(
            *((law, LEAKS) for law in PACKED),
            ("finite_differences", "activations that are cut off at a limit have kinks"),
        ),
    ),
    _row(
        "mamba",
        "MambaForCausalLM",
        lambda: transformers.MambaConfig(**COMMON, state_size=8, num_hidden_layers=2),
        reference.Mamba1,
        **MAMBA1 | {"targets": frozenset({"mixer"}), "states": 2},
        gain=3.0,
        masks_steps=False,
        lacks=(*NO_PAST, *NO_MATRIX),
    ),
    _row(
        "falcon_mamba",
        "FalconMambaForCausalLM",
        lambda: transformers.FalconMambaConfig(**COMMON, state_size=8, num_hidden_layers=2),
        reference.NormalizedMamba1,
        **MAMBA1 | {"targets": frozenset({"mixer"}), "states": 2},
        masks_steps=False,
        lacks=(*NO_PAST, *NO_MATRIX),
    ),
    _row(
        "jamba",
        "JambaForCausalLM",
        lambda: transformers.JambaConfig(
            **COMMON,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            num_hidden_layers=4,
            num_experts=2,
            num_experts_per_tok=2,
            attn_layer_period=4,
            attn_layer_offset=2,
            mamba_d_state=8,
        ),
        reference.NormalizedMamba1,
        **MAMBA1 | {"states": 3},
        lacks=NO_MATRIX,
    ),
    _row(
        "zamba",
        "ZambaForCausalLM",
        lambda: transformers.ZambaConfig(
            **COMMON,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=64,
            num_hidden_layers=4,
            layers_block_type=["linear_attention", "hybrid"] * 2,
            n_mamba_heads=2,
            mamba_d_state=8,
        ),
        reference.Zamba,
        **MAMBA1 | {"states": 4},
        gain=3.0,
    ),
    _row(
        "minimax",
        "MiniMaxForCausalLM",
        lambda: transformers.MiniMaxConfig(
            **COMMON,
            **ATTENTION,
            intermediate_size=64,
            num_hidden_layers=3,
            num_local_experts=4,
            num_experts_per_tok=4,
            block_size=8,
            layer_types=["full_attention", "linear_attention", "linear_attention"],
        ),
        reference.LightningAttention,
        alpha=1.0,
        targets=None,
        states=2,
        make_cache=lambda config, rows: MiniMaxCache(),
        lacks=(
            ("generate", "its cache does not reorder its states for beams"),
            ("static_cache_and_reset", "it takes its own cache only"),
            ("single_token_start_on_a_static_cache", "it takes its own cache only"),
            ("a_packed_row_leaves_the_cache_of_its_last_document", "its cache has another form"),
        ),
    ),
    _row(
        "recurrent_gemma",
        "RecurrentGemmaForCausalLM",
        lambda: transformers.RecurrentGemmaConfig(
            **COMMON,
            num_attention_heads=4,
            num_key_value_heads=1,
            intermediate_size=128,
            num_hidden_layers=4,
            lru_width=64,
            attention_window_size=64,
        ),
        reference.RGLRU,
        alpha=1.0,
        targets=None,
        states=3,
        gain=8.0,
        lacks=(
            *(
                (law, "its convolution forgets the past in a call of several tokens on a cache with a past")
                for law in (
                    "every_split_into_two_chunks",
                    "pads_that_cross_a_chunk",
                    "static_cache_and_reset",
                    "continued_conversation",
                )
            ),
            ("generate", "what it keeps in its layers is not reordered for beams"),
            ("a_packed_row_leaves_the_cache_of_its_last_document", "its state is not in its cache"),
            *NO_MATRIX,
        ),
    ),
    _row(
        "xlstm",
        "xLSTMForCausalLM",
        lambda: transformers.xLSTMConfig(
            **COMMON,
            num_hidden_layers=2,
            num_heads=4,
            chunk_size=16,
            qk_dim_factor=1.0,
            autocast_kernel_dtype="float32",
        ),
        reference.MLSTM,
        alpha=1.0,
        targets=frozenset({"mlstm_layer"}),
        states=2,
        masks_steps=False,
        make_cache=lambda config, rows: xLSTMCache(config, rows, dtype=torch.float32),
        remember=open_gates,
        lacks=(
            ("generate", "its cache cannot be reordered for beams"),
            ("static_cache_and_reset", "it takes its own cache only"),
            ("single_token_start_on_a_static_cache", "it takes its own cache only"),
            ("a_packed_row_leaves_the_cache_of_its_last_document", "its cache has another form"),
            *NO_PAST,
        ),
    ),
)

# What is not a matter of the recurrence is tested on one architecture of each of the two large families.
MAIN = ARCHITECTURES[:2]
