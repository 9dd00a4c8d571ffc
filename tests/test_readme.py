"""The README tells the truth about the files."""
import re

from conftest import ROOT


def test_line_counts():
    told = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.M))
    counted = {f.name: str(len(f.read_text().splitlines())) for f in ROOT.glob("*.py")}
    assert told == counted


def test_ci_runs_the_very_test_command_of_the_readme():
    command = "python -m pytest tests"
    assert f"\n{command}\n" in (ROOT / "README.md").read_text() and f"\n{command}\n" in (ROOT / ".ci/run").read_text()


def test_every_name_in_the_paper_table_exists():
    import importlib
    table = (ROOT / "README.md").read_text().split("## From the paper to the code")[1].split("\n## ")[0]
    modules = {name: importlib.import_module(name) for name in ("model", "losses", "data", "meta_train", "finetune", "infer", "evaluate")}
    for name in re.findall(r"`([A-Za-z_]+(?:\.\w+)?)`", table):
        first, _, last = name.partition(".")
        if last:
            owner = modules.get(first) or getattr(modules["model"], first)
            assert hasattr(owner, last), name


def test_tables_are_as_evaluate_py_wrote_them():
    readme = (ROOT / "README.md").read_text()
    for name in ("table1.md", "table1_video.md", "table2.md"):
        assert (ROOT / "assets" / name).read_text().strip() in readme
