"""The README tells the truth about the files, and its commands can be run."""
import importlib
import re

import pytest

from conftest import ROOT, here

README = (ROOT / "README.md").read_text()
MODULES = [file.stem for file in sorted(ROOT.glob("*.py"))]
STAGES = ["data", "meta_train", "finetune", "infer", "evaluate"]


def test_line_counts():
    told = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M)
    counted = {f"{name}.py": str((ROOT / f"{name}.py").read_bytes().count(b"\n")) for name in MODULES}
    assert dict(told) == counted and len(told) == len(counted)


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 180
    assert not [line for line in lines if len(line) >= 120]


def test_ci_runs_the_very_test_command_of_the_readme():
    command = "python -m pytest tests -n 2"
    assert f"\n{command}\n" in README and f"\n{command}\n" in (ROOT / ".ci/run").read_text()


def missing(text):
    """The names in backticks, module.name or Class.name of model.py, that are not there; and how many are."""
    modules = {name: importlib.import_module(name) for name in MODULES}
    found = re.findall(r"`(\w+)\.(\w+)`", text)
    names = [(first, last) for first, last in found if last not in ("py", "pt", "npz", "mp4", "mat", "jpg")]
    owner = lambda first: modules.get(first) or getattr(modules["model"], first, None)
    return [f"{first}.{last}" for first, last in names if not hasattr(owner(first), last)], len(names)


def test_every_name_in_the_paper_table_exists():
    table = README.split("## From the paper to the code")[1].split("\n## ")[0]
    names = "`model.Nothing` `Nothing.at_all` `model.conv`"
    assert missing(names) == (["model.Nothing", "Nothing.at_all"], 3)
    absent, there = missing(table)
    assert not absent and there > 30
    assert not re.findall(r"`\w+`", table)     # a name without its file would not be checked
    assert not missing(README)[0]


@pytest.mark.parametrize("page", ["README.md", "weights/MODEL_CARD.md"])
def test_every_file_that_a_page_names_exists(page):
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert all((folder / link).exists() for link in links), links
    files = re.findall(r"`((?:assets|tests|weights)/[\w.]+)`", text)
    assert files and all((ROOT / file).exists() for file in files), files


@pytest.mark.parametrize("name", STAGES)
def test_every_flag_in_the_readmes_commands_exists(name, tmp_path):
    text = README.replace("\\\n", " ")
    commands = re.findall(rf"\b{name}\.py((?: +(?:--)?[^\s`#|;&]+)*)", text)
    flags = {flag for command in commands for flag in re.findall(r"(--[a-z0-9-]+)", command)}
    told = here(f"{name}.py", "--help", cwd=tmp_path)
    assert told.returncode == 0 and flags
    assert flags <= set(re.findall(r"(--[a-z0-9-]+)", told.stdout)), name
