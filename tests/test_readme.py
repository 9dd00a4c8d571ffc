"""The README tells the truth about the files, and its commands can be run."""
import importlib
import re

import pytest

from conftest import ROOT, here

README = (ROOT / "README.md").read_text()
FOLDERS = ["runtime", "media", "beyond", "evaluation"]
FILES = [file for folder in (".", *FOLDERS) for file in sorted((ROOT / folder).glob("*.py"))
         if file.name != "__init__.py"]
FILES = [file.relative_to(ROOT).as_posix() for file in FILES]
MODULES = [file.removesuffix(".py").replace("/", ".") for file in FILES]
COMMANDS = ["data.py", "meta_train.py", "finetune.py", "infer.py", "evaluate.py", "beyond.teach"]


def test_the_tree_names_every_file_once():
    tree = README.split("## The files")[1].split("```")[1]
    told, folder = [], ""
    for line in tree.splitlines():
        name = re.match(r"( *)([\w]+(?:\.py|/))", line)
        if name and name[2].endswith("/"):
            folder = name[2]
        elif name:
            told.append((folder if name[1] else "") + name[2])
    assert sorted(told) == sorted(FILES)


def test_ci_runs_the_very_test_command_of_the_readme():
    command = "python -m pytest tests -n 2"
    assert f"\n{command}\n" in README and f"\n{command}\n" in (ROOT / ".ci/run").read_text()


def missing(text):
    """Of the names in backticks, those that are not there, and how many names there are.

    A name is module.name, folder.module.name, folder.module, or Class.name of model.py.
    """
    modules = {name: importlib.import_module(name) for name in MODULES + FOLDERS}
    found = re.findall(r"`(\w+(?:\.\w+)?)\.(\w+)`", text)
    suffixes = "py", "pt", "npz", "mp4", "mat", "jpg", "png"
    names = [(first, last) for first, last in found if last not in suffixes]
    owner = lambda first: modules.get(first) or getattr(modules["model"], first, None)
    return [f"{first}.{last}" for first, last in names if not hasattr(owner(first), last)], len(names)


def test_every_name_in_the_paper_table_exists():
    table = README.split("## From the paper to the code")[1].split("\n## ")[0]
    names = "`model.Nothing` `Nothing.at_all` `model.conv` `media.faces.Nothing` `media.crops.face_box`"
    assert missing(names) == (["model.Nothing", "Nothing.at_all", "media.faces.Nothing"], 5)
    absent, there = missing(table)
    assert not absent and there > 30
    assert not re.findall(r"`\w+`", table)     # a name without its file would not be checked
    assert not missing(README)[0]


@pytest.mark.parametrize("page", ["README.md", "weights/MODEL_CARD.md"])
def test_every_file_that_a_page_names_exists(page):
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert all((folder / link).exists() for link in links), links
    files = re.findall(r"`((?:assets|tests|weights|runtime|media|beyond|evaluation)/[\w.]+)`", text)
    assert files and all((ROOT / file).exists() for file in files), files


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_in_the_readmes_commands_exists(name, tmp_path):
    text = README.replace("\\\n", " ")
    commands = re.findall(rf"\b{re.escape(name)}((?: +(?:--)?[^\s`#|;&]+)*)", text)
    flags = {flag for command in commands for flag in re.findall(r"(--[a-z0-9-]+)", command)}
    told = here(name, "--help", cwd=tmp_path)
    assert told.returncode == 0 and flags
    assert flags <= set(re.findall(r"(--[a-z0-9-]+)", told.stdout)), name
