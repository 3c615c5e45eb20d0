"""Files are UTF-8 in every locale, and commands print any text."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tolhouse.testing import Process, open_url, process, wait_until_healthy

from tests.commands import LOCAL, tolhouse

TEMPLATE = "{% for m in messages %}«q» {{ m.role }}: {{ m.content }}\n{% endfor %}réponse → "


@pytest.fixture(scope="module", params=["latin-1", "C", "ascii"])
def locale(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The variables of a locale whose encoding is not UTF-8."""
    if request.param != "latin-1":
        coerced = "1" if request.param == "C" else "0"
        return {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": coerced}
    folder = tmp_path_factory.mktemp("locales")
    command = ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", folder / "de_DE.ISO-8859-1"]
    if not shutil.which("localedef") or subprocess.run(command, check=False).returncode:
        pytest.skip("this machine cannot make locales")
    return {"LOCPATH": str(folder), "LC_ALL": "de_DE.ISO-8859-1"}


@pytest.fixture
def _in_locale(locale: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in locale.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("_in_locale")
def test_templates_and_pages_are_utf_8(checkpoint: Path, store: str, tmp_path: Path) -> None:
    """A gateway reads the model's template and its own pages as UTF-8."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    config = {"chat_template": "«no»", "eos_token": "✓"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, ensure_ascii=False), encoding="utf-8-sig"
    )

    def get(gateway: Process, path: str) -> str:
        with open_url(f"http://{gateway.address}{path}", 30) as answer:
            return answer.read().decode()

    with (
        process("worker", str(folder), "--rows", store, *LOCAL) as worker,
        process("gateway", str(folder), "--workers", worker.address, *LOCAL) as gateway,
    ):
        wait_until_healthy(gateway.address)
        info = json.loads(get(gateway, "/tokenizer_info"))
        assert (TEMPLATE, "✓") == (info["chat_template"], info["eos_token"])
        assert "Ã" not in get(gateway, "/explore") + get(gateway, "/openapi.json")


@pytest.mark.usefixtures("_in_locale")
def test_any_text_is_printed(checkpoint: Path, locale: dict) -> None:
    """Commands print characters that the locale lacks without a crash."""
    prompt = "für ✓ 日本"
    done = tolhouse("generate", checkpoint, prompt.encode(), "--max-tokens", 4)
    assert done.stdout.startswith(prompt)
    done = tolhouse("explain", checkpoint, prompt.encode(), "--json")
    assert json.loads(done.stdout)
    assert os.environ["LC_ALL"] == locale["LC_ALL"]
