"""Errors in one line for the user, checks of paths and flags, and atomic writes."""
import argparse
import errno
import gc
import os
import re
import secrets
import shutil
import signal
import stat
import sys
from contextlib import contextmanager

import torch


class UserError(Exception):
    """A problem that the user can solve, such as a missing file. Its message is one line.

    run() prints it and exits with code 2.
    """


def run(main):
    """Run a script's main(). Problems that the user can solve are printed in one line, with exit code 2."""
    gc.freeze()     # leaves the imported modules out of garbage collection: the program ends 0.3 s sooner
    open_closed_streams()
    leave_on_signals(signal.SIGTERM, signal.SIGHUP)
    try:
        result = main()
        sys.stdout.flush()
        return result
    except UserError as e:
        # if a loader's worker raised it, the message begins with that worker's traceback
        name = f"{UserError.__module__}.UserError: "
        message = "error: " + str(e).strip().splitlines()[-1].removeprefix(name)
        code = 2
    except KeyboardInterrupt as e:
        message = f"stopped: {e}" if str(e) else "stopped"
        code = 130
    except BrokenPipeError:     # the program that read our output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(1)
    except (MemoryError, RuntimeError, OSError, ImportError) as e:
        if is_out_of_shared_memory(e):
            message = ("error: too little shared memory for the loader's workers: make it larger, with "
                       "docker run --shm-size 1g or mount -o remount,size=1g /dev/shm")
        elif is_out_of_memory(e):
            where = " on the GPU" if isinstance(e, torch.OutOfMemoryError) else ""
            message = (f"error: not enough memory{where}: close other programs, or use a smaller --batch "
                       "(meta_train.py) or fewer --workers (data.py)")
        else:
            raise
        code = 2
    print(message, file=sys.stderr)     # here, because the exception has closed any progress bar by now
    sys.exit(code)


def leave_on_signals(*numbers):
    """Let these signals raise SystemExit, so that every `finally` runs. A second one does not stop that.

    A signal that is ignored stays ignored, such as SIGHUP (a closed connection) under nohup.
    """
    def leave(number, frame):
        for heard in numbers:
            signal.signal(heard, lambda number, frame: None)
        forget_lost_terminal()
        sys.exit(128 + number)

    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    for number in numbers:
        signal.signal(number, leave)


def forget_lost_terminal():
    """Discard stdout and stderr if they are a terminal that was closed. Otherwise every print would fail."""
    for number in (1, 2):
        is_device = stat.S_ISCHR(os.fstat(number).st_mode)
        if is_device and not os.isatty(number):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def make_parser(doc):
    """-> an ArgumentParser. doc: the script's docstring, which --help prints as it is."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def open_closed_streams():
    """Open stdin, stdout and stderr to the null device if they are closed, and let them print any file name.

    If they stayed closed, the next file that is opened would get the descriptor of stderr, and libraries
    would write their warnings into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):      # a test's or a notebook's stream may lack it
            stream.reconfigure(errors="backslashreplace")


def is_out_of_shared_memory(error):
    """Whether torch's DataLoader failed because /dev/shm, through which its workers pass batches, is full."""
    text = str(error)
    return any(words in text for words in ("shared memory", "Bus error", "/torch_"))


# The messages of C, torch's allocators, C++, the linker, oneDNN, Python's threads (each of which needs a
# stack), and of a loader whose worker Linux killed.
OUT_OF_MEMORY = re.compile(r"allocate memory|not enough memory|out of memory|bad_alloc|failed to map segment|"
                           r"could not create a primitive$|can't start new thread|"
                           r"is killed by signal: Killed")


def is_out_of_memory(error):
    """Whether an error means that memory ran out. On a CPU, torch raises a plain RuntimeError for this."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


def raise_if_out_of_memory(error):
    """Raise an error again if it means that memory ran out.

    It is for code that would take any exception for a sign of a damaged file.
    """
    if is_out_of_memory(error):
        raise error


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


# ------------------------------------------------------------------------------------- flags and paths

def check_paths(inputs, outputs=()):
    """Raise UserError if an input is missing or an output cannot be written, before minutes of work are lost.

    inputs, outputs: lists of paths, with None for flags that were not given. All bad inputs are named.
    """
    inputs = [path for path in inputs if path is not None]
    outputs = [path for path in outputs if path is not None]
    problems = [problem for path in inputs if (problem := problem_of_input(path))]
    if problems:
        raise UserError("; ".join(problems))
    for path in outputs:
        problem = problem_of_output(path, inputs)
        if problem:
            raise UserError(f"cannot write {path}: {problem}")
    targets = [os.path.realpath(path) for path in outputs]
    for k, path in enumerate(outputs):
        if targets[k] in targets[:k]:
            raise UserError(f"cannot write {path}: another output has the same name: choose different names")


def check_least(args, least, *names):
    """Raise UserError if one of these flags, as named by argparse, is less than `least`."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be at least {least}")


def check_idle(args, reason, *names):
    """Raise UserError if any of these flags, as named by argparse, is given, because it has no effect.

    reason: why it has none.
    """
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, False)]
    if given:
        raise UserError(f"{reason}: leave out {', '.join(given)}")


def problem_of_input(path):
    """-> a few words on why a path cannot be read as a file, or None if it can."""
    if os.path.isdir(path):
        return f"{path} is a folder, but a file is needed"
    if not os.path.isfile(path):
        return f"no file {path}"
    if not os.access(path, os.R_OK):
        return f"{path} cannot be read, because its permissions forbid it"
    return None


def problem_of_output(path, inputs):
    """-> a few words on why a file cannot be written to a path, or None if it can. Links are followed."""
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if path.endswith(os.sep):
        return "this is the name of a folder, but a file name is needed"
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        mode = None
    except OSError as e:        # for example, the name is too long
        return e.strerror
    if mode is not None and stat.S_ISDIR(mode):
        return "it is a folder"
    if mode is not None and not stat.S_ISREG(mode):     # a device, a pipe, or a link to itself
        return "it is not a regular file"
    name = folder if os.path.islink(path) else os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        return f"no folder {name} to write to"
    if not os.access(folder, os.W_OK):
        return f"the folder {name} is read-only"
    if mode is not None and any(os.path.samefile(target, i) for i in inputs):
        return "it is also an input, which would be overwritten"
    return None


def make_folder(path):
    """Make the folder that --out names. Raises UserError if that is impossible, or if it is read-only."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        denied = e.errno in (errno.EACCES, errno.EROFS)
        reason = "the folder that it would be in is read-only" if denied else e.strerror
        raise UserError(f"cannot write to --out {path}: {reason}") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write to --out {path}: the folder is read-only")


# ---------------------------------------------------------------------------------------- atomic writes

@contextmanager
def atomic(path):
    """A context that yields a temporary name for a file, which is renamed to `path` at the end.

    So `path` is always either as it was before or complete. If it is a link, the file to which it points is
    replaced. Raises UserError if it cannot be written.
    """
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    # The suffix is random and not the process's number, as processes in two containers can have the same.
    # A name may have 255 bytes, which the file's own name may use up; 50 characters are at most 200 bytes.
    temporary = os.path.join(folder, f"{os.path.basename(target)[:50]}.{secrets.token_hex(8)}.tmp")
    try:
        os.makedirs(folder, exist_ok=True)
        if os.path.lexists(target) and not os.path.isfile(target):
            raise OSError(errno.EINVAL, "it is not a regular file")
        open(temporary, "x").close()    # it gets the usual permissions; "x", so that no file is overwritten
        yield temporary
        move(temporary, target)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def move(temporary, target):
    """Rename a file, which gets the permissions of the file that it replaces.

    A file that is a mount point (docker -v FILE:FILE) cannot be replaced, so it is overwritten.
    """
    if os.path.exists(target):
        shutil.copymode(target, temporary)
    try:
        os.replace(temporary, target)
    except OSError as e:
        if e.errno != errno.EBUSY:
            raise
        shutil.copyfile(temporary, target)


def save_tensors(state, path):
    """torch.save(), but atomic. Raises UserError if the file cannot be written."""
    with atomic(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as e:   # torch.save raises this, with words of its own, if the disk is full
            raise OSError(f"is the disk full? ({str(e).splitlines()[0]})") from None
