"""files.py: which paths may be read and written, writes that are whole or absent, errors of one line."""
import errno
import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from runtime import files
from runtime.files import UserError, atomic, check_paths


def write(path, text="new"):
    with atomic(path) as temporary, open(temporary, "w") as file:
        file.write(text)


def test_a_link_keeps_pointing_to_its_target(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/real.mp4").write_text("old")
    (tmp_path / "link.mp4").symlink_to("folder/real.mp4")
    (tmp_path / "dangling.mp4").symlink_to("folder/later.mp4")
    for link, target in (("link.mp4", "real.mp4"), ("dangling.mp4", "later.mp4")):
        check_paths([], [str(tmp_path / link)])
        write(tmp_path / link)
        assert (tmp_path / link).is_symlink() and (tmp_path / "folder" / target).read_text() == "new"
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "nowhere").symlink_to("missing/a.mp4")
    for path, words in (("/dev/null", "no regular file"), (tmp_path / "pipe", "no regular file"),
                        (tmp_path, "a folder"), (f"{tmp_path}/new/", "name of a folder"),
                        (tmp_path / "loop", "cannot write"),
                        (tmp_path / "null", "no regular file"), (tmp_path / "nowhere", "no folder"),
                        (tmp_path / ("a" * 256), "too long")):
        with pytest.raises(UserError, match=words):
            check_paths([], [str(path)])
    with pytest.raises(UserError, match="no regular file"):
        write(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo() and not os.path.isfile("/dev/null")


@pytest.mark.parametrize("name", ["a" * 251 + ".mp4", "\u00e9" * 125 + ".mp4", "\U0001f600" * 62 + ".mp4"])
def test_names_as_long_as_there_are(tmp_path, name):
    check_paths([], [str(tmp_path / name)])
    write(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_mounted_file_is_written_into(tmp_path, monkeypatch):
    """docker -v FILE:FILE: it cannot be renamed over."""
    (tmp_path / "mounted").write_text("old")
    number = os.stat(tmp_path / "mounted").st_ino

    def busy(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")
    monkeypatch.setattr(os, "replace", busy)
    write(tmp_path / "mounted")
    assert (tmp_path / "mounted").read_text() == "new" and os.stat(tmp_path / "mounted").st_ino == number
    assert not list(tmp_path.glob("*.tmp"))


def test_all_bad_inputs_are_named_at_once(tmp_path):
    (tmp_path / "good").touch()
    inputs = [str(tmp_path / "good"), str(tmp_path / "a.jpg"), None, str(tmp_path),
              str(tmp_path / "b.jpg")]
    with pytest.raises(UserError) as e:
        check_paths(inputs)
    said = str(e.value)
    assert "a.jpg" in said and "b.jpg" in said and "is a folder" in said and "good" not in said
    with pytest.raises(UserError, match="another output"):
        check_paths([], [str(tmp_path / "x"), str(tmp_path / "x")])
    with pytest.raises(UserError, match="also an input"):
        check_paths([str(tmp_path / "good")], [str(tmp_path / "good")])


PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from runtime import files
def main():
    {body}
files.run(main)
"""


def run(tmp_path, body, **options):
    command = [sys.executable, "-c", PROGRAM.format(root=str(ROOT), body=body)]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, **options)


def test_errors_of_one_line(tmp_path, capsys):
    def raised(words, kind=RuntimeError):
        raise kind(words)

    with pytest.raises(SystemExit) as left:
        files.run(lambda: raised("DataLoader worker (pid 7) is killed by signal: Bus error. "
                                 "It is possible that dataloader workers are out of shared memory"))
    said = capsys.readouterr().err
    assert left.value.code == 2 and len(said.splitlines()) == 1 and "--shm-size" in said
    with pytest.raises(SystemExit) as left:
        files.run(lambda: raised("CUDA out of memory. Tried to allocate 2.00 GiB", torch.OutOfMemoryError))
    said = capsys.readouterr().err
    assert left.value.code == 2 and len(said.splitlines()) == 1 and "--batch" in said
    with pytest.raises(RuntimeError, match="a fault of ours"):      # it keeps its traceback
        files.run(lambda: raised("a fault of ours"))
    names = run(tmp_path, "print('wrote caf\\u00e9 \\udcff.mp4')",
                env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert names.returncode == 0 and "wrote caf" in names.stdout


def test_sigterm_leaves_no_temporary_file(tmp_path):
    """As timeout, docker stop and clusters end a program."""
    body = """
    with files.atomic("result") as temporary:
        open(temporary, "w").close()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)"""
    done = run(tmp_path, "import os, signal, time" + body)
    assert done.returncode == 143 and not list(tmp_path.iterdir()) and "Traceback" not in done.stderr


def test_nobody_reads_what_is_printed(tmp_path):
    """`python infer.py ... | head -0`: Python would complain at its end, with a code of its own."""
    command = [sys.executable, "-c", PROGRAM.format(root=str(ROOT), body="print('wrote it')")]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=env, timeout=120)
    os.close(writing)
    assert done.returncode == 1 and not done.stderr


def test_a_closed_stderr_takes_no_file_s_place(tmp_path):
    """Else the result would be opened as number 2, and the libraries would write their warnings into it."""
    body = "import os; f = open('result', 'w'); files.warn('lost'); os.write(2, b'lost'); f.write('whole')"
    command = [sys.executable, "-c", PROGRAM.format(root=str(ROOT), body=body)]
    done = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], cwd=tmp_path,
                          capture_output=True, timeout=120)
    assert done.returncode == 0 and (tmp_path / "result").read_text() == "whole"
