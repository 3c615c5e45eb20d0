"""Maps packages to the extras that install them, for hints about missing packages."""

# The extras of pyproject.toml that install a package, with the smallest first.
# tests/unit/test_house.py compares this table with pyproject.toml.
EXTRAS = {
    **dict.fromkeys(("torch", "safetensors"), ("model", "worker", "build", "train")),
    "tokenizers": ("model", "worker", "gateway", "build", "train"),
    **dict.fromkeys(("redis", "hiredis"), ("store", "lookup", "worker", "gateway", "build")),
    "prometheus_client": ("services", "lookup", "worker", "gateway"),
    **dict.fromkeys(("grpc_health", "grpc_reflection"), ("services", "lookup", "worker")),
    **dict.fromkeys(("fastapi", "limits", "starlette", "uvicorn"), ("gateway",)),
    "jinja2": ("gateway", "train"),
    "ray": ("build",),
    "fsspec": ("build", "gguf"),
    "tqdm": ("build", "train", "gguf"),
    "matplotlib": ("train",),
    "gguf": ("gguf",),
    **dict.fromkeys(("accelerate", "peft", "tensorboard", "transformers"), ("transformers",)),
    **dict.fromkeys(("trustme", "cryptography"), ("certs",)),
}


def installation_hint(package: str, preferred: str = "") -> str:
    """Return a hint on how to install a package, or "" if no extra installs it.

    The hint names the extra `preferred` if that installs the package, and otherwise the smallest
    extra that does.
    """
    if package not in EXTRAS:
        return ""
    extra = preferred if preferred in (*EXTRAS[package], "all") else EXTRAS[package][0]
    return f"the package {package} is not installed: pip install 'tolhouse[{extra}]'"
