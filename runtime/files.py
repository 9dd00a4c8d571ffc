"""The ground of the other files: errors for people, checked paths, writes that are whole or absent.

It imports none of the others.
"""
import argparse
import errno
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
    """What a user can mend: a wrong file, a missing folder. Scripts print one line and leave with code 2."""


def run(main):
    """Run a script's main(): what the user can mend becomes one line on stderr and exit code 2."""
    open_closed_streams()
    leave_on_signals(signal.SIGTERM, signal.SIGHUP)
    try:
        result = main()
        sys.stdout.flush()
        return result
    except UserError as e:
        # one that was raised in a loader's worker comes with that worker's traceback before it
        name = f"{UserError.__module__}.UserError: "
        message = "error: " + str(e).strip().splitlines()[-1].removeprefix(name)
        code = 2
    except KeyboardInterrupt as e:
        message = f"stopped: {e}" if str(e) else "stopped"
        code = 130
    except BrokenPipeError:     # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(1)
    except (MemoryError, RuntimeError, OSError, ImportError) as e:
        if short_of_shared_memory(e):
            message = ("error: too little shared memory for the loader's workers: give it more room "
                       "(docker run --shm-size 1g, or mount -o remount,size=1g /dev/shm)")
        elif short_of_memory(e):
            where = " on the GPU" if isinstance(e, torch.OutOfMemoryError) else ""
            message = (f"error: not enough memory{where}: close what else uses it, or give meta_train.py "
                       "a smaller --batch, data.py fewer --workers")
        else:
            raise
        code = 2
    print(message, file=sys.stderr)     # only now: a progress bar has been closed with the exception
    sys.exit(code)


def leave_on_signals(*numbers):
    """The first of these signals ends the process by way of all `finally`s, which a second would break off.

    One that is ignored stays so: SIGHUP, which a broken connection sends, under nohup.
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
    """What would be written to a terminal that is gone, goes nowhere: else every line is an error."""
    for number in (1, 2):
        is_device = stat.S_ISCHR(os.fstat(number).st_mode)
        if is_device and not os.isatty(number):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def make_parser(doc):
    """doc: a script's docstring, shown by --help as it stands."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def open_closed_streams():
    """Give stdin, stdout and stderr a place where they are closed, and words for names they cannot show.

    Else the next file that is opened gets the number of stderr, and libraries write their warnings into it.
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


def short_of_shared_memory(error):
    """Whether torch's DataLoader failed for want of room in /dev/shm, where its workers hand over batches."""
    text = str(error)
    return any(words in text for words in ("shared memory", "Bus error", "/torch_"))


# in the words of C, torch's allocators, C++, the linker, oneDNN, and of a loader whose worker Linux killed
OUT_OF_MEMORY = re.compile(r"allocate memory|not enough memory|out of memory|bad_alloc|failed to map segment|"
                           r"could not create a primitive$|is killed by signal: Killed")


def short_of_memory(error):
    """Whether an error says that there is too little memory: on a CPU, torch's is a plain RuntimeError."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


def pass_on_want_of_memory(error):
    """Raise it again if that is what it says. For those who take any other exception for a damaged file."""
    if short_of_memory(error):
        raise error


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


# ------------------------------------------------------------------------------------- flags and paths

def check_paths(inputs, outputs=()):
    """UserError now, not after minutes of work, if an input is missing or an output cannot be written.

    inputs, outputs: lists of paths, None where a flag was not given. All bad inputs are named at once.
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
            raise UserError(f"cannot write {path}: another output has the same name")


def check_least(args, least, *names):
    """UserError for the first of these flags (as argparse names them) that is below `least`."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: {least} or more is needed")


def check_idle(args, reason, *names):
    """UserError for those of these flags (as argparse names them) that are given, but change nothing."""
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, False)]
    if given:
        raise UserError(f"{reason}: leave out {', '.join(given)}")


def problem_of_input(path):
    """A few words on why a path cannot be read as a file; None where it can."""
    if os.path.isdir(path):
        return f"{path} is a folder, and a file is wanted"
    if not os.path.isfile(path):
        return f"no file {path}"
    return None


def problem_of_output(path, inputs):
    """A few words on why no file may be written at a path, or where its link leads; None where it may."""
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if path.endswith(os.sep):
        return "that is the name of a folder"
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        mode = None
    except OSError as e:        # among them: a name that is too long
        return e.strerror
    if mode is not None and stat.S_ISDIR(mode):
        return "it is a folder"
    if mode is not None and not stat.S_ISREG(mode):     # a device, a pipe, a link to itself
        return "it is no regular file"
    name = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        return f"no folder {name} to write to"
    if not os.access(folder, os.W_OK):
        return f"the folder {name} is read-only"
    if mode is not None and any(os.path.samefile(target, i) for i in inputs):
        return "it is also an input, and would be lost"
    return None


def make_folder(path):
    """Make the folder that --out names. UserError where that cannot be, or where it is read-only."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write to --out {path}: {e.strerror}") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write to --out {path}: the folder is read-only")


# ----------------------------------------------------------------------------------------------- writing

@contextmanager
def atomic(path):
    """Yield a temporary name to write to, renamed to `path` at the end: that is absent, as before, or whole.

    A link keeps pointing to its target, which is written. UserError where it cannot be written.
    """
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    # Random, because processes in two containers can have the same number. 50 characters are at most 200
    # bytes: the file's own name may have all 255 that there can be.
    temporary = os.path.join(folder, f"{os.path.basename(target)[:50]}.{secrets.token_hex(8)}.tmp")
    try:
        os.makedirs(folder, exist_ok=True)
        if os.path.lexists(target) and not os.path.isfile(target):
            raise OSError(errno.EINVAL, "it is no regular file")
        open(temporary, "x").close()    # with the permissions that any new file has; nobody else's file
        yield temporary
        move(temporary, target)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def move(temporary, target):
    """Rename, with the permissions of the file that is replaced.

    A file that is a mount point (docker -v FILE:FILE) cannot be replaced, and is copied into.
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
    """torch.save, atomically."""
    with atomic(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as e:  # what torch.save makes of a full disk
            raise OSError(str(e).splitlines()[0]) from None
