"""Which of our files may import which others (the rules of the layout)."""
import ast

import pytest

from conftest import ROOT

STAGES = {"meta_train", "finetune", "infer", "evaluate"}
LIBRARY = {"model", "losses", "data"}       # of the paper, beside the stages
FOLDERS = {"runtime", "media", "beyond", "evaluation"}
OURS = STAGES | LIBRARY | FOLDERS

# A folder stands for all modules in it. A module may have more, as checkpoint.py, which builds networks.
ALLOWED = {
    "model": set(),
    "losses": {"runtime", "media"},
    "data": {"runtime", "media"},
    "runtime": set(),
    "runtime.checkpoint": {"model"},
    "media": {"runtime"},
    "beyond": {"runtime", "media"} | LIBRARY,
    "evaluation": {"runtime", "media", "beyond"} | LIBRARY,
    "meta_train": FOLDERS | LIBRARY,
    "finetune": FOLDERS | LIBRARY,
    "infer": FOLDERS | LIBRARY | {"finetune"},
    "evaluate": FOLDERS | LIBRARY | {"finetune", "infer"},
}


def imports(text):
    """Our modules and folders that a source text imports anywhere: for example {"model", "runtime"}."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name their folder"      # so that a reader sees where they lead
            found.add(node.module.split(".")[0])
    return found & OURS


def forbidden(module, text):
    """-> sorted imports of a module, such as "data" or "media.faces", that the rules forbid."""
    folder = module.split(".")[0]
    allowed = ALLOWED.get(module, set()) | ALLOWED[folder]
    own_folder = {folder} & FOLDERS
    return sorted(imports(text) - allowed - own_folder)


def modules():
    """{module: its path} of all files of ours but the tests."""
    files = [file for folder in (".", *FOLDERS) for file in (ROOT / folder).glob("*.py")]
    names = [file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for file in files]
    return dict(zip(names, files))


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_one_way(module):
    assert forbidden(module, modules()[module].read_text()) == []


def test_the_top_level_holds_the_paper_and_nothing_else():
    assert {file.stem for file in ROOT.glob("*.py")} == STAGES | LIBRARY


@pytest.mark.parametrize("module,text,found", [
    ("media.faces", "from beyond.adapt import adapt", ["beyond"]),
    ("media.faces", "import numpy, data", ["data"]),
    ("runtime.files", "import model", ["model"]),
    ("runtime.checkpoint", "import model\nfrom media import faces", ["media"]),
    ("beyond.teach", "def f():\n    from meta_train import batches", ["meta_train"]),
    ("beyond.teach", "if True:\n    import evaluation.metrics as m", ["evaluation"]),
    ("evaluation.timing", "import torch\nfrom finetune import finetune\nfrom infer import render",
     ["finetune", "infer"]),
    ("model", "import torch\nfrom runtime import files", ["runtime"]),
    ("finetune", "from infer import render", ["infer"]),
    ("evaluation.report", "from evaluation.metrics import fid\nfrom model import Generator", [])])
def test_a_forbidden_import_is_found(module, text, found):
    assert forbidden(module, text) == found
