"""Tiny random models of Gemma 3n and Gemma 4."""

from pathlib import Path
from typing import Any

import torch

END = 1
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "sliding_window": 8,
    "eos_token_id": END,
}


def tiny_gemma(family: str, *, multimodal: bool = False, **sizes: Any) -> Any:
    """A random model of family gemma4 or gemma3n: the text model with its head, or for gemma4 the
    multimodal model without encoders."""
    import transformers as hf

    sizes = SIZES | sizes
    size = sizes["vocab_size"]
    if family == "gemma3n":
        # As in the public models, the last tokens have no per-layer embedding.
        more = {"vocab_size_per_layer_input": size - 10, "num_kv_shared_layers": 0}
        sizes = {"num_hidden_layers": 5, "laurel_rank": 4} | more | sizes
        model: Any = hf.Gemma3nForCausalLM(hf.Gemma3nTextConfig(**sizes))
    else:
        kinds = ["sliding_attention", "full_attention"] * 3
        more = {"global_head_dim": 32, "num_kv_shared_layers": 2, "layer_types": kinds}
        sizes = {"num_hidden_layers": 6, "vocab_size_per_layer_input": size} | more | sizes
        config = hf.Gemma4TextConfig(**sizes)
        if multimodal:
            media: dict[str, Any] = {"image_token_id": 290, "video_token_id": 291}
            media |= {"audio_token_id": 292, "vision_config": None, "audio_config": None}
            whole = hf.Gemma4Config(text_config=config, **media)
            model = hf.Gemma4ForConditionalGeneration(whole)
        else:
            model = hf.Gemma4ForCausalLM(config)
    return model.eval()


def saved(model: Any, path: Path, dtype: torch.dtype) -> Any:
    """Give a model normal weights of standard deviation 0.3, save it, and load what was saved."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    model.to(dtype).save_pretrained(path)
    return type(model).from_pretrained(path, dtype="auto").eval()
