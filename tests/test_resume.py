"""resume.py: resuming a run exactly, damaged and missing files of a run, and several ranks."""
import shutil

import pytest
import torch

import meta_train
from conftest import ROOT, TINY_FLAGS, fail, here, same, succeed, tensors, torchrun
from runtime import resume


def test_the_same_seed_gives_the_same_tensors_and_resuming_is_exact(tmp_path, monkeypatch):
    """With augmentation, stills, averaged weights and falling learning rates."""
    for name, value in dict(augment=True, stills=0.5, ema=0.9).items():
        monkeypatch.setitem(meta_train.TOY, name, value)
    flags = ["meta_train.py", *TINY_FLAGS, "--steps", "4", "--linear-decay", "--save-every", "2", "--out"]
    for out in ("a", "b"):
        succeed(*flags, out, cwd=tmp_path)
    a, b = (tensors(tmp_path / f"{out}/step-4.pt") for out in "ab")
    assert same(a, b)
    (tmp_path / "b/step-4.pt").unlink()
    succeed(*flags, "b", "--resume", cwd=tmp_path)
    assert same(a, tensors(tmp_path / "b/step-4.pt"))


@pytest.mark.parametrize("damaged", ["step-4.pt", "step-4.rank-0.state"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damaged, tmp_path):
    flags = ["meta_train.py", *TINY_FLAGS, "--save-every", "2", "--out", "run"]
    succeed(*flags, "--steps", "4", cwd=tmp_path)
    whole = tensors(tmp_path / "run/step-4.pt")
    path = tmp_path / "run" / damaged
    path.write_bytes(path.read_bytes()[:1000])
    result = here(*flags, "--steps", "4", "--resume", cwd=tmp_path)
    assert result.returncode == 0 and damaged in result.stderr and "step 4 cannot be resumed" in result.stderr
    assert same(tensors(tmp_path / "run/step-4.pt"), whole)
    (tmp_path / "run/step-4-best.pt").write_bytes(b"the user's own")
    for file in (tmp_path / "run").glob("step-?.pt"):
        file.write_bytes(b"nothing")
    result = here(*flags, "--steps", "4", "--resume", cwd=tmp_path)
    assert result.returncode == 2 and "none of the checkpoints" in result.stderr.splitlines()[-1]
    assert (tmp_path / "run/step-4-best.pt").exists()


def test_a_run_that_was_copied_without_its_states(tmp_path):
    """The message says what is missing and gives two ways out, and both work."""
    flags = ["meta_train.py", *TINY_FLAGS, "--save-every", "2"]
    succeed(*flags, "--steps", "2", "--out", "run", cwd=tmp_path)
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "run/step-2.pt", tmp_path / "copy")
    result = here(*flags, "--steps", "4", "--out", "copy", "--resume", cwd=tmp_path)
    warning, error = result.stderr.splitlines()
    assert result.returncode == 2 and "copy/step-2.rank-0.state is missing" in warning
    assert "if the run was copied here, copy these files, too" in error
    assert "start a new run from copy/step-2.pt with --grow-from and another --out" in error
    # other settings are reported before missing files
    line = fail(*flags, "--steps", "4", "--out", "copy", "--resume", "--K", "3", cwd=tmp_path)
    assert "K was 2, now 3. Use the same settings again, or start a new run from copy/step-2.pt" in line
    assert [file.name for file in (tmp_path / "copy").iterdir()] == ["step-2.pt"]
    # both ways out
    shutil.copy(tmp_path / "run/step-2.rank-0.state", tmp_path / "copy")
    succeed(*flags, "--steps", "4", "--out", "copy", "--resume", cwd=tmp_path)
    succeed(*flags, "--steps", "2", "--out", "new", "--grow-from", "copy/step-4.pt", cwd=tmp_path)
    assert (tmp_path / "new/step-2.pt").exists()


def two_ranks(folder, out, steps, change, *flags):
    """Run meta_train.py on two ranks, which execute the code `change` after each step.

    Each rank saves its E, G and D in OUT-rank-R. A restart must continue at step 4.
    """
    (folder / "program.py").write_text(f"""
import os, signal, sys, torch
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["meta_train.py", *{TINY_FLAGS!r}, "--steps", "{steps}", "--save-every", "2",
            "--out", {out!r}]
import meta_train
from runtime import files
rank, restarts = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
train_step = meta_train.train_step
step = 4 * restarts
def changed(E, G, D, *rest, **named):
    global step
    step, values = step + 1, train_step(E, G, D, *rest, **named)
    {change}
    torch.save([net.state_dict() for net in (E.module, G.module, D)], f"{out}-rank-{{rank}}")
    return values
meta_train.train_step = changed
files.run(meta_train.main)
""")
    return torchrun(*flags, "program.py", cwd=folder)


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A folder with a run on two ranks ("live") that was not interrupted in its 8 steps."""
    folder = tmp_path_factory.mktemp("live")
    result = two_ranks(folder, "live", 8, "pass")
    assert result.returncode == 0, result.stderr
    return folder


def test_two_ranks_have_the_same_e_and_g_but_different_d(live):
    (E0, G0, D0), (E1, G1, D1) = (torch.load(live / f"live-rank-{r}", weights_only=True) for r in (0, 1))
    assert same(E0, E1) and same(G0, G1)
    weight = "V.blocks.0.conv1.parametrizations.weight.original"
    assert not torch.equal(D0[weight], D1[weight])
    states = [torch.load(live / f"live/step-8.rank-{r}.state", weights_only=True) for r in (0, 1)]
    a, b = (s["optimizers"][0]["state"] for s in states)
    assert all(torch.equal(a[k]["exp_avg_sq"], b[k]["exp_avg_sq"]) for k in a)  # equal gradients
    assert not torch.equal(states[0]["D"]["w0"], states[1]["D"]["w0"])
    assert states[0]["D"]["W"].shape[0] == states[1]["D"]["W"].shape[0] == 500  # each has half of the rows
    portable = tensors(live / "live/step-8.pt")
    assert torch.equal(portable["w0"], states[0]["D"]["w0"]) and "W" not in portable
    line = fail("meta_train.py", *TINY_FLAGS, "--steps", "9", "--out", "live", "--resume", cwd=live)
    assert "ranks was 2, now 1" in line     # the number of ranks must stay the same


def resume_with_two(out, cwd):
    """Resume a run on two ranks, which must fail and change nothing -> the lines that we print on stderr."""
    before = sorted((file.name, file.read_bytes()) for file in (cwd / out).iterdir())
    result = torchrun(ROOT / "meta_train.py", *TINY_FLAGS, "--out", out, "--steps", "10", "--resume", cwd=cwd)
    assert result.returncode != 0
    assert not [name for name in ("resume", "meta_train", "files") if f'{name}.py", line' in result.stderr]
    assert sorted((file.name, file.read_bytes()) for file in (cwd / out).iterdir()) == before
    return [line for line in result.stderr.splitlines() if line.startswith(("error: ", "warning: "))]


def test_a_run_of_one_rank_is_not_resumed_with_two(tmp_path):
    succeed("meta_train.py", *TINY_FLAGS, "--out", "run", "--steps", "2", "--save-every", "2", cwd=tmp_path)
    assert resume_with_two("run", tmp_path) == [
        "error: run cannot be resumed: ranks was 1, now 2. Use the same settings again, or start a new run "
        "from run/step-2.pt with --grow-from and another --out"]


def test_the_user_hears_that_there_is_nothing_to_resume(tmp_path, capsys):
    assert resume.open_run(tmp_path / "typo", resume=True, rank=0) == []
    assert "no checkpoint to resume" in capsys.readouterr().err
    assert resume.open_run(tmp_path / "new", resume=False, rank=0) == [] and not capsys.readouterr().err


def test_all_ranks_refuse_if_the_state_of_one_is_missing(live, tmp_path):
    shutil.copytree(live / "live", tmp_path / "moved")
    for step in (6, 8):
        (tmp_path / f"moved/step-{step}.rank-1.state").unlink()
    *warnings, error = resume_with_two("moved", tmp_path)
    assert len(warnings) == 2 and "step-8.rank-1.state is missing" in warnings[0]
    assert "none of the checkpoints in moved can be resumed: every rank's step-8.rank-R.state" in error
    assert "copy these files, too; or start a new run from moved/step-8.pt with --grow-from" in error


def test_a_rank_that_dies_is_started_again_and_all_agree_on_a_nan(live, tmp_path):
    """Rank 1 is killed at step 5, and torchrun's restart continues at step 4 as if nothing had happened.

    At step 10, which would be saved, rank 1 has a NaN.
    """
    change = ("if (rank, step, restarts) == (1, 5, 0): os.kill(os.getpid(), signal.SIGKILL)\n"
              "    if (rank, step) == (1, 10): values['fm'].fill_(float('nan'))")
    result = two_ranks(tmp_path, "die", 12, change, "--max-restarts", "1")
    assert "exitcode: -9" in result.stderr
    assert "Unable to shutdown" not in result.stderr    # the other rank exited when torchrun asked it to
    assert same(tensors(tmp_path / "die/step-8.pt"), tensors(live / "live/step-8.pt"))
    assert result.returncode != 0 and not (tmp_path / "die/step-10.pt").exists()
    line = "error: step 10: fm is NaN or infinite. The last good checkpoint is die/step-8.pt"
    assert result.stderr.count(line) == 2


def test_nan_stops_the_run_and_names_the_term(tmp_path):
    flags = ["meta_train.py", *TINY_FLAGS, "--save-every", "1", "--out", "run"]
    succeed(*flags, "--steps", "1", cwd=tmp_path)
    ckpt = torch.load(tmp_path / "run/step-1.pt", weights_only=True)
    ckpt["G.to_rgb.bias"][:] = float("nan")
    torch.save(ckpt, tmp_path / "run/step-1.pt")
    line = fail(*flags, "--steps", "5", "--resume", cwd=tmp_path)
    assert "step 2" in line and "cnt" in line and "run/step-1.pt" in line
    assert not (tmp_path / "run/step-2.pt").exists()
