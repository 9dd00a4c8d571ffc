"""The README tells the truth about the files, and its commands can be run."""
import importlib
import re

import pytest

from conftest import ROOT, here

README = (ROOT / "README.md").read_text()
MODULES = [file.stem for file in sorted(ROOT.glob("*.py"))]


def test_line_counts():
    told = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M))
    counted = {f"{name}.py": str(len((ROOT / f"{name}.py").read_text().splitlines())) for name in MODULES}
    assert told == counted


def test_ci_runs_the_very_test_command_of_the_readme():
    command = "python -m pytest tests"
    assert f"\n{command}\n" in README and f"\n{command}\n" in (ROOT / ".ci/run").read_text()


def test_every_name_in_the_paper_table_exists():
    table = README.split("## From the paper to the code")[1].split("\n## ")[0]
    modules = {name: importlib.import_module(name) for name in MODULES}
    names = re.findall(r"`([A-Za-z_]+(?:\.\w+)?)`", table)
    assert len(names) > 20
    for name in names:
        first, _, last = name.partition(".")
        if last:
            owner = modules.get(first) or getattr(modules["model"], first)
            assert hasattr(owner, last), name


@pytest.mark.parametrize("name", ["data", "meta_train", "finetune", "infer", "evaluate"])
def test_every_flag_in_the_readmes_commands_exists(name, tmp_path):
    text = README.replace("\\\n", " ")
    commands = re.findall(rf"\b{name}\.py((?: +(?:--)?[^\s`#|;&]+)*)", text)
    flags = {flag for command in commands for flag in re.findall(r"(--[a-z0-9-]+)", command)}
    told = here(f"{name}.py", "--help", cwd=tmp_path)
    assert told.returncode == 0 and flags
    assert flags <= set(re.findall(r"(--[a-z0-9-]+)", told.stdout)), name
