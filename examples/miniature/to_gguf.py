"""Tiny models as GGUF files, by llama.cpp's own converter.

    python examples/miniature/to_gguf.py path/to/llama.cpp model-folder model.gguf

A real model needs nothing of this: `python path/to/llama.cpp/convert_hf_to_gguf.py model-folder`. The converter knows
tokenizers by name, and no tiny model has one of those. Its words become pieces of a tokenizer that looks for the most
likely ones: as all are equally likely, for the longest. A model without a tokenizer gets none.
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any


def vocabulary(gguf: Any, folder: Path, size: int) -> tuple[list[str], list[float], list[int]]:
    """Pieces, their scores and their types; a space is written as it is in sentencepiece."""
    words = json.loads((folder / "tokenizer.json").read_text())
    special = {token["content"] for token in words["added_tokens"]}
    pieces = [f"<unused {index}>" for index in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size
    for word, index in words["model"]["vocab"].items():
        pieces[index] = word if word in special else word.replace(" ", "\u2581")
        types[index] = int(gguf.TokenType.CONTROL if word in special else gguf.TokenType.NORMAL)
        if word == words["model"]["unk_token"]:
            types[index] = int(gguf.TokenType.UNKNOWN)
    return pieces, [-1.0] * size, types


def as_published(hparams: dict[str, Any]) -> dict[str, Any]:
    """A config as the model's checkpoints have it: transformers has given some things other names since."""
    kind = hparams["model_type"]
    if kind.startswith("qwen3_5"):
        # Where these are missing, the converter puts those of heads that a tiny model does not have.
        rope = hparams["rope_parameters"]
        frequencies = int(hparams["head_dim"] * rope["partial_rotary_factor"]) // 2
        return {
            **hparams,
            "rope_parameters": {"mrope_section": [(frequencies + 2 - part) // 3 for part in range(3)], **rope},
        }
    if kind == "granitemoehybrid":
        names = {"linear_attention": "mamba", "full_attention": "attention"}
        return {**hparams, "layer_types": [names[layer] for layer in hparams["layer_types"]]}
    if kind == "nemotron_h":
        letters = {"linear_attention": "M", "mlp": "-", "full_attention": "*"}
        pattern = "".join(letters[layer] for layer in hparams["layers_block_type"])
        dense = {
            name: value
            for name, value in hparams.items()
            if "expert" not in name and name not in ("n_group", "topk_group", "layers_block_type")
        }
        return {**dense, "hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    return hparams


def convert(llama_cpp: Path, folder: Path, file: Path) -> None:
    """Write a model's GGUF, in float32."""
    if str(llama_cpp) not in sys.path:
        sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    hparams = as_published(ModelBase.load_hparams(folder, False))
    base = get_model_class(get_model_architecture(hparams, ModelType.TEXT))

    class Tiny(base):
        model_arch = base.model_arch
        no_mtp = True  # tiny models predict one token at a time

        def set_vocab(self) -> None:
            if not (folder / "tokenizer.json").exists():
                self._set_vocab_none()
                self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])
                return
            pieces, scores, types = vocabulary(gguf, folder, self.hparams["vocab_size"])
            self.gguf_writer.add_tokenizer_model("t5")
            self.gguf_writer.add_tokenizer_pre("default")
            self.gguf_writer.add_token_list(pieces)
            self.gguf_writer.add_token_scores(scores)
            self.gguf_writer.add_token_types(types)
            self.gguf_writer.add_add_space_prefix(False)
            self.gguf_writer.add_remove_extra_whitespaces(False)
            self.gguf_writer.add_add_bos_token(True)
            self.gguf_writer.add_add_eos_token(False)
            for name in ("bos", "eos", "pad"):
                getattr(self.gguf_writer, f"add_{name}_token_id")(self.hparams[f"{name}_token_id"])
            self.gguf_writer.add_unk_token_id(types.index(gguf.TokenType.UNKNOWN))

    with torch.inference_mode():
        Tiny(folder, gguf.LlamaFileType.ALL_F32, file, hparams=hparams).write()


def main() -> None:
    """Converts one model, or several in one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_cpp", type=Path, help="folder of llama.cpp, which has the converter")
    parser.add_argument("paths", type=Path, nargs="+", help="folder of a model, file to write; again for more")
    arguments = parser.parse_args()
    if len(arguments.paths) % 2:
        parser.error("name a file to write for each folder")
    logging.basicConfig(level=logging.WARNING)
    for folder, file in zip(arguments.paths[::2], arguments.paths[1::2], strict=True):
        convert(arguments.llama_cpp.resolve(), folder, file)


if __name__ == "__main__":
    main()
