"""The ground of the other files: errors for people, checked paths, writes that are whole or absent.

It imports none of the others.
"""
import argparse
import errno
import os
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))    # by way of all `finally`s
    try:
        result = main()
        sys.stdout.flush()
        return result
    except UserError as e:
        # one that was raised in a loader's worker comes with that worker's traceback before it
        name = f"{UserError.__module__}.UserError: "
        message = "error: " + str(e).strip().splitlines()[-1].removeprefix(name)
        code = 2
    except KeyboardInterrupt:
        message = "stopped"
        code = 130
    except BrokenPipeError:     # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(1)
    except torch.OutOfMemoryError:
        message = ("error: not enough memory on the GPU: close what else uses it, "
                   "or give meta_train.py a smaller --batch")
        code = 2
    except (RuntimeError, OSError) as e:
        if not short_of_shared_memory(e):
            raise
        message = ("error: too little shared memory for the loader's workers: give it more room "
                   "(docker run --shm-size 1g, or mount -o remount,size=1g /dev/shm)")
        code = 2
    print(message, file=sys.stderr)     # only now: a progress bar has been closed with the exception
    sys.exit(code)


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
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        return f"no folder {os.path.dirname(path) or '.'} to write to"
    if mode is not None and any(os.path.samefile(target, i) for i in inputs):
        return "it is also an input, and would be lost"
    return None


# ----------------------------------------------------------------------------------------------- writing

@contextmanager
def atomic(path):
    """Yield a temporary name to write to, renamed to `path` at the end: that is absent, as before, or whole.

    A link keeps pointing to its target, which is written. UserError where it cannot be written.
    """
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    # 50 characters are at most 200 bytes: the file's own name may have all 255 that there can be
    temporary = os.path.join(folder, f"{os.path.basename(target)[:50]}.{os.getpid()}.tmp")
    try:
        os.makedirs(folder, exist_ok=True)
        if os.path.lexists(target) and not os.path.isfile(target):
            raise OSError(errno.EINVAL, "it is no regular file")
        yield temporary
        move(temporary, target)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def move(temporary, target):
    """Rename. A file that is a mount point (docker -v FILE:FILE) cannot be replaced, and is copied into."""
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
