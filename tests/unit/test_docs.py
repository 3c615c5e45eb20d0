"""The docs name only existing commands, options, variables, make targets, metrics and files."""

import re
from pathlib import Path

import click
import pytest
from tolhouse import config
from tolhouse.cli import main

ROOT = Path(__file__).parent.parent.parent
LOGS = {"CHANGELOG.md"}  # also names removed features
PAGES = [p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")) if p.name not in LOGS]
PAGES.append(ROOT / "deploy" / "k8s" / "README.md")
SOURCES = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "services").rglob("*.py"))

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def command_lines(text: str) -> list[list[str]]:
    """Return the words of every `tolhouse COMMAND …` in code, up to a comment or the code's end."""
    text = text.replace("\\\n", " ")
    code = re.findall(r"```\w*\n(.*?)```|`([^`\n]+)`|^    (.*)$", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(part for parts in code for part in parts).splitlines()
    # without `from tolhouse import …` and the namespace of `kubectl -n tolhouse apply …`
    found = (re.search(r"(?<!from )(?<!-n )\btolhouse ([a-z]+\b[^#|…]*)", line) for line in lines)
    return [match[1].split() for match in found if match]


@each_page
def test_commands_and_options_exist(page: Path) -> None:
    """Each command on the page exists and accepts the given options."""
    for words in command_lines(page.read_text(encoding="utf-8")):
        command, rest = main.commands.get(words[0]), words[1:]
        assert command, f"there is no command {words[0]}"
        while isinstance(command, click.Group) and rest and rest[0] in command.commands:
            command, rest = command.commands[rest[0]], rest[1:]
        known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        given = {re.split("[=`]", word)[0] for word in rest if word.startswith("--")}
        assert set() == given - known - {"--help"}, words


@each_page
def test_environment_variables_exist(page: Path) -> None:
    """Tolhouse reads each of its variables on the page."""
    named = set(re.findall(r"\bTOLHOUSE_[A-Z_]+[A-Z]\b", page.read_text(encoding="utf-8")))
    assert set() == named - config.variables()


@each_page
def test_make_targets_exist(page: Path) -> None:
    """Each `make TARGET` on the page is a target of the Makefile."""
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    named = set(
        re.findall(r"(?:`|^    )make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert set() == named - targets


@each_page
def test_metrics_exist(page: Path) -> None:
    """The sources define each metric on the page, by its full name or its last part."""
    for name in re.findall(r"`(tolhouse_[a-z_]+)`", page.read_text(encoding="utf-8")):
        last = re.sub("^tolhouse_(lookup|worker|gateway)_|_total$", "", name)
        assert re.search(rf'"({name}|{last})"|{{[^}}]*}}_{last}"', SOURCES), name


@each_page
def test_source_files_exist(page: Path) -> None:
    """Each source path on the page exists, relative to the root, the package or the page."""
    for path in re.findall(
        r"`([\w./-]+/[\w-]+\.(?:py|proto|md|yaml|yml))`", page.read_text(encoding="utf-8")
    ):
        tops = ROOT, ROOT / "services" / "tolhouse", page.parent
        assert any((top / path).exists() for top in tops), path


def test_the_readme_is_one_page() -> None:
    """The README has at most 140 lines, because details belong in docs/."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 140
