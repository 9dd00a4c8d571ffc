"""files.py: checks of paths, atomic writes, errors in one line. device.py: free cores and memory."""
import errno
import os
import signal
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from media.prepare import default_workers
from runtime import device, files
from runtime.files import UserError, atomic, check_paths
from runtime.resume import clear


def write(path, text="new"):
    with atomic(path) as temporary, open(temporary, "w") as file:
        file.write(text)


def test_a_new_folder_in_a_read_only_one_is_refused_in_plain_words(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(os, "makedirs", denied)
    with pytest.raises(UserError, match="cannot write to --out .*/new: the folder that it .* is read-only"):
        files.make_folder(str(tmp_path / "new"))


def test_a_file_without_permission_and_a_link_to_nowhere_are_told(tmp_path, monkeypatch):
    (tmp_path / "link.mp4").symlink_to("/nowhere/a.mp4")
    with pytest.raises(UserError, match="cannot write .*link.mp4: no folder /nowhere to write to"):
        check_paths([], [str(tmp_path / "link.mp4")])
    (tmp_path / "secret.mp4").touch()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="secret.mp4 cannot be read, because its permissions forbid it"):
        check_paths([str(tmp_path / "secret.mp4")])


def test_a_link_is_kept_and_its_target_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/real.mp4").write_text("old")
    (tmp_path / "link.mp4").symlink_to("folder/real.mp4")
    (tmp_path / "dangling.mp4").symlink_to("folder/later.mp4")
    for link, target in (("link.mp4", "real.mp4"), ("dangling.mp4", "later.mp4")):
        check_paths([], [str(tmp_path / link)])
        write(tmp_path / link)
        assert (tmp_path / link).is_symlink() and (tmp_path / "folder" / target).read_text() == "new"
    assert not list(tmp_path.rglob("*.tmp"))


def test_paths_that_are_not_regular_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "nowhere").symlink_to("missing/a.mp4")
    for path, words in (("/dev/null", "not a regular file"), (tmp_path / "pipe", "not a regular file"),
                        (tmp_path, "a folder"), (f"{tmp_path}/new/", "name of a folder"),
                        (tmp_path / "loop", "cannot write"),
                        (tmp_path / "null", "not a regular file"), (tmp_path / "nowhere", "no folder"),
                        (tmp_path / ("a" * 256), "too long")):
        with pytest.raises(UserError, match=words):
            check_paths([], [str(path)])
    with pytest.raises(UserError, match="not a regular file"):
        write(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo() and not os.path.isfile("/dev/null")


def test_two_processes_with_the_same_number_write_the_same_file(tmp_path, monkeypatch):
    """This can happen in two containers. The file is complete, and from the process that ends last."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with atomic(tmp_path / "out") as first, open(first, "w") as a:
        a.write("the first, ")
        with atomic(tmp_path / "out") as second, open(second, "w") as b:
            b.write("the second, whole")
        assert (tmp_path / "out").read_text() == "the second, whole"
        a.write("whole")
    assert (tmp_path / "out").read_text() == "the first, whole"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_resumed_run_deletes_temporary_files_of_a_killed_one(tmp_path):
    with atomic(tmp_path / "step-6.pt") as a, atomic(tmp_path / "step-6.rank-0.state") as b:
        (tmp_path / "step-6.pt.notes").touch()
        clear(tmp_path, keep=[6])
        assert [p.name for p in tmp_path.iterdir()] == ["step-6.pt.notes"]
        open(a, "w").close(), open(b, "w").close()


def test_a_file_gets_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "new")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    (tmp_path / "private").touch(0o600)
    write(tmp_path / "private")
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["a" * 251 + ".mp4", "\u00e9" * 125 + ".mp4", "\U0001f600" * 62 + ".mp4"])
def test_names_of_the_greatest_length(tmp_path, name):
    check_paths([], [str(tmp_path / name)])
    write(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_mounted_file_is_overwritten(tmp_path, monkeypatch):
    """A file that docker mounts with -v FILE:FILE cannot be replaced by renaming."""
    (tmp_path / "mounted").write_text("old")
    number = os.stat(tmp_path / "mounted").st_ino

    def busy(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")
    monkeypatch.setattr(os, "replace", busy)
    write(tmp_path / "mounted")
    assert (tmp_path / "mounted").read_text() == "new" and os.stat(tmp_path / "mounted").st_ino == number
    assert not list(tmp_path.glob("*.tmp"))


def test_a_read_only_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)     # because root may write everywhere
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/a.mp4: the folder {tmp_path} is read-only"):
        check_paths([], [str(tmp_path / "a.mp4")])


def test_all_bad_inputs_are_named_in_one_message(tmp_path):
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
    """Run PROGRAM with this body of main() in a process of its own."""
    command = [sys.executable, "-c", PROGRAM.format(root=str(ROOT), body=body)]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, **options)


def test_errors_take_one_line(tmp_path, capsys):
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
    for words, kind in (("", MemoryError), ("std::bad_alloc", RuntimeError),
                        ("Cannot allocate memory", OSError),
                        ("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
                         "memory: you tried to allocate 67108864 bytes.", RuntimeError),
                        ("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes",
                         RuntimeError),
                        ("can't start new thread", RuntimeError),
                        ("DataLoader worker (pid 7) is killed by signal: Killed. ", RuntimeError)):
        with pytest.raises(SystemExit) as left:
            files.run(lambda: raised(words, kind))
        said = capsys.readouterr().err
        assert left.value.code == 2 and len(said.splitlines()) == 1 and "not enough memory: close" in said
    with pytest.raises(RuntimeError, match="a bug of ours"):        # any other error keeps its traceback
        files.run(lambda: raised("a bug of ours"))
    names = run(tmp_path, "print('wrote caf\\u00e9 \\udcff.mp4')",
                env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert names.returncode == 0 and "wrote caf" in names.stdout


def test_too_little_memory_is_an_error_of_one_line(tmp_path):
    """A checkpoint that does not fit into memory must not be called damaged: the user might delete it."""
    torch.save({"x": torch.zeros(50_000_000)}, tmp_path / "large.pt")
    body = """
    from runtime.checkpoint import load_checkpoint
    used = int(open("/proc/self/statm").read().split()[5]) * 4096       # the data segment
    resource.setrlimit(resource.RLIMIT_DATA, (used + 50_000_000,) * 2)
    {}"""
    for line in ("load_checkpoint('large.pt')", "torch.zeros(50_000_000)", "bytearray(200_000_000)"):
        done = run(tmp_path, "import resource, torch" + body.format(line))
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert "error: not enough memory: close other programs" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_temporary_file(tmp_path, number):
    """The signals come from `timeout`, `docker stop`, clusters and closed connections."""
    body = f"""
    with files.atomic("result") as temporary:
        open(temporary, "w").close()
        try:
            os.kill(os.getpid(), {int(number)})
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)        # a second signal, as systemd sends it
            time.sleep(0.1)"""
    done = run(tmp_path, "import os, signal, time" + body)
    assert done.returncode == 128 + number and not list(tmp_path.iterdir()) and "Traceback" not in done.stderr


def test_a_program_under_nohup_ignores_sighup(tmp_path):
    body = "import os, signal; os.kill(os.getpid(), signal.SIGHUP); print('continued')"
    ignored = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert run(tmp_path, body, preexec_fn=ignored).stdout == "continued\n"


def test_a_closed_pipe_is_no_traceback(tmp_path):
    """As in `python infer.py ... | head -0`. Without our handler, Python prints an error when it exits."""
    command = [sys.executable, "-c", PROGRAM.format(root=str(ROOT), body="print('wrote it')")]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=env, timeout=120)
    os.close(writing)
    assert done.returncode == 1 and not done.stderr


def test_warnings_do_not_go_into_a_file_if_stderr_is_closed(tmp_path):
    """Otherwise the result would be opened as descriptor 2, and libraries would write warnings into it."""
    body = "import os; f = open('result', 'w'); files.warn('lost'); os.write(2, b'lost'); f.write('whole')"
    command = [sys.executable, "-c", PROGRAM.format(root=str(ROOT), body=body)]
    done = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], cwd=tmp_path,
                          capture_output=True, timeout=120)
    assert done.returncode == 0 and (tmp_path / "result").read_text() == "whole"


# --------------------------------------------------------------- device.py: free cores and memory

QUOTAS = {  # the system files in a container that may use 2.5 cores and 3 GB, half of which are in use
    "version 2": ("0::/", {
        "cpu.max": "250000 100000\n", "memory.max": "3000000000", "memory.current": "1600000000",
        "memory.stat": "anon 1500000000\ninactive_file 60000000\nactive_file 40000000\n"}),
    "version 2, around its own group": ("0::/user.slice/job", {
        "user.slice/cpu.max": "250000 100000", "user.slice/job/cpu.max": "max 100000",
        "user.slice/memory.max": "3000000000", "user.slice/memory.current": "1500000000",
        "user.slice/job/memory.max": "max", "user.slice/job/memory.current": "1000000000"}),
    "version 1": ("5:cpu,cpuacct:/docker/1f\n4:memory:/docker/1f\n1:cpuset:/\n0::/", {
        "cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000",
        "memory/memory.limit_in_bytes": "3000000000", "memory/memory.usage_in_bytes": "1600000000",
        "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 60000000\ntotal_active_file 40000000\n"}),
    "without a limit": ("4:memory:/\n1:cpu:/\n0::/", {
        "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000", "cpu.max": "max 100000",
        "memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "5000000000"})}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 8 cores and 4.096 GB of free memory, as yet without control groups."""
    monkeypatch.setattr(device, "PROC", tmp_path / "proc")
    monkeypatch.setattr(device, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "proc/self").mkdir(parents=True)
    meminfo = "MemTotal:  99999 kB\nMemAvailable:  4000000 kB\nHugePages_Total:  0\n"
    (tmp_path / "proc/meminfo").write_text(meminfo)
    return tmp_path


@pytest.mark.parametrize("kind", QUOTAS)
def test_cores_and_memory_of_a_container(machine, kind):
    groups, contents = QUOTAS[kind]
    (machine / "proc/self/cgroup").write_text(groups)
    for name, content in contents.items():
        (machine / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (machine / "groups" / name).write_text(content)
    limited = kind != "without a limit"
    assert device.usable_cores() == (2 if limited else 8)
    assert device.free_memory() == (1.5e9 if limited else 4.096e9)
    assert default_workers("dlib") == (2 if limited else 6)         # 627 MB each


def test_cores_and_memory_without_control_groups(machine, monkeypatch):
    assert device.usable_cores() == 8 and default_workers("dlib") == 6
    (machine / "proc/meminfo").write_text("MemAvailable:  4000 kB\n")
    assert default_workers("dlib") == 1
    (machine / "proc/meminfo").unlink()
    assert default_workers("dlib") == 8 and device.free_memory() == float("inf")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert device.usable_cores() == default_workers("dlib") == 1
