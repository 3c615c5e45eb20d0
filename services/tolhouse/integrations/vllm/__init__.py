"""A plug-in for vLLM: MemoryLLM, Flex, wide and Gemma models with rows from Tolhouse.

vLLM calls `register` in each of its processes. `vllm serve CHECKPOINT` then works without changes
to the checkpoint, and options are in `--additional-config '{"tolhouse": {…}}'`.

    options.py    the options, checked
    versions.py   the supported versions of vLLM
    config.py     config.json as vLLM reads it
    start.py      finds the table once, before vLLM starts its processes
    resolve.py    looks up the table, in a process of its own
    staging.py    rows of a step, at fixed addresses
    layers.py     attention and FFN-C in parallel layers
    model.py      the model
    state.py      stages rows in vLLM's second model runner
    scheduler.py  fails requests without rows, and only these

    gemma.py        Gemma 3n and Gemma 4, text models
    gemma_media.py  multimodal models
    gemma_start.py  chooses these classes if rows are configured
    gemma_table.py  checks the table of a Gemma checkpoint
"""

ARCHITECTURE = "TolhouseForCausalLM"
_PACKAGE = "tolhouse.integrations.vllm"


def register() -> None:
    """Register the config and the model. Registering again is allowed."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from tolhouse.integrations.vllm.config import MemoryLLMConfig
    from tolhouse.integrations.vllm.gemma_start import STOCK, GemmaStart, class_name
    from tolhouse.integrations.vllm.start import Start

    _CONFIG_REGISTRY[MemoryLLMConfig.model_type] = MemoryLLMConfig
    MODELS_CONFIG_MAP[ARCHITECTURE] = Start
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{_PACKAGE}.model:{ARCHITECTURE}")
        for stock in STOCK:
            name = class_name(stock)
            module = "gemma" if stock.endswith("CausalLM") else "gemma_media"
            ModelRegistry.register_model(name, f"{_PACKAGE}.{module}:{name}")
            MODELS_CONFIG_MAP[stock] = GemmaStart.before(MODELS_CONFIG_MAP.get(stock))
