"""Multimodal Gemma 3n and Gemma 4 in vLLM, with rows from Tolhouse: see `gemma.py`.

vLLM's classes need torchvision, and Gemma 3n needs timm.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.gemma3n_mm import Gemma3nForConditionalGeneration
from vllm.model_executor.models.gemma4_mm import Gemma4ForConditionalGeneration
from vllm.model_executor.models.interfaces import SupportsMultiModal

from tolhouse.integrations.vllm.gemma import WithRows
from tolhouse.integrations.vllm.model import request_starts


class _Multimodal(WithRows):
    requires_raw_input_tokens: ClassVar[bool] = True  # rows are looked up by token id

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.per_layer_embeddings = self.stage.rows  # what `forward` of vLLM reads

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Any = None
    ) -> Tensor:
        """Return the embeddings [T, D]. The method of vLLM's class reads the table as well."""
        return SupportsMultiModal.embed_input_ids(
            self, input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        rows: Tensor | None = None,
        failed: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """Return the final hidden states [T, D]."""
        if rows is None:
            _, failed = self.stage.fill(input_ids, request_starts)
        if inputs_embeds is None:  # the model serves text only
            inputs_embeds = self.embed_input_ids(input_ids)
        return (
            super().forward(None, positions, intermediate_tensors, inputs_embeds, **others) + failed
        )


class TolhouseGemma3nForConditionalGeneration(_Multimodal, Gemma3nForConditionalGeneration):
    pass


class TolhouseGemma4ForConditionalGeneration(_Multimodal, Gemma4ForConditionalGeneration):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        names = ("image_token_id", "video_token_id", "audio_token_id")
        ids = [i for name in names if (i := getattr(config, name, None)) is not None]
        self.stage.media = torch.tensor(ids, device=self.stage.rows.device)
