"""Which extra of the distribution installs a package, for hints about missing packages."""

# The extras of pyproject.toml that install a package, the smallest first. tests/unit/test_house.py
# compares this table with pyproject.toml.
EXTRAS = {
    **dict.fromkeys(("torch", "safetensors"), ("model", "worker", "build", "train")),
    "tokenizers": ("model", "worker", "gateway", "build", "train"),
    **dict.fromkeys(("redis", "hiredis"), ("store", "lookup", "worker", "gateway", "build")),
    "prometheus_client": ("services", "lookup", "worker", "gateway"),
    **dict.fromkeys(("grpc_health", "grpc_reflection"), ("services", "lookup", "worker")),
    **dict.fromkeys(("fastapi", "limits", "starlette", "uvicorn"), ("gateway",)),
    "jinja2": ("gateway", "train"),
    "ray": ("build",),
    "tqdm": ("build", "train"),
    "matplotlib": ("train",),
    **dict.fromkeys(("trustme", "cryptography"), ("certs",)),
}


def installation_hint(package: str, preferred: str = "") -> str:
    """The sentence that tells how to install a package; "" if no extra installs it.

    It names the extra `preferred` if that installs the package, else the smallest extra that does.
    """
    if package not in EXTRAS:
        return ""
    extra = preferred if preferred in (*EXTRAS[package], "all") else EXTRAS[package][0]
    return f"the package {package} is not installed: pip install 'tolhouse[{extra}]'"
