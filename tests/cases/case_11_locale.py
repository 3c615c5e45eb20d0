"""Files are UTF-8 in every locale, and commands print any text."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tolhouse.testing import open_url, process, tiny_model, wait_until_healthy

from tests.cases import Result, equal
from tests.cases.commands import run

FILE = "chat_template.jinja"


def check(folder: Path) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as at:
        model = tiny_model(Path(at, "base"), "base")
        shutil.copy(folder / FILE, model / FILE)
        done = run("generate", model, "für ✓ 日本", "--max-tokens", "2", **_latin_1(Path(at)))
        yield equal("text beyond Latin-1 is printed", 0, done.returncode)
        variables = [f"{name}={value}" for name, value in _latin_1(Path(at)).items()]
        listen, python = ("--listen", "127.0.0.1:0"), ("env", *variables, sys.executable)
        with (
            process("worker", str(model), *listen, python=python) as worker,
            process(
                "gateway", str(model), "--workers", worker.address, *listen, python=python
            ) as g,
        ):
            wait_until_healthy(g.address)
            with open_url(f"http://{g.address}/tokenizer_info", 30) as answer:
                found = json.load(answer)["chat_template"]
            yield equal("the template", (folder / FILE).read_text(encoding="utf-8"), found)
            with open_url(f"http://{g.address}/explore", 30) as answer:
                yield equal("the page is UTF-8", False, "Î" in answer.read().decode())


def _latin_1(folder: Path) -> dict[str, str]:
    """Return the variables of a new Latin-1 locale in `folder`, or of the C locale."""
    command = ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", folder / "de_DE.ISO-8859-1"]
    made = shutil.which("localedef") and not subprocess.run(command, check=False).returncode
    if made:
        return {"LOCPATH": str(folder), "LC_ALL": "de_DE.ISO-8859-1"}
    return {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
