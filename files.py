"""The ground that all other files stand on: errors for people, checked paths, writes that are whole or absent.

It imports none of the others.
"""
import argparse
import os
import sys
from contextlib import contextmanager

import torch


class UserError(Exception):
    """What a user can mend: a wrong file, a missing folder. Scripts print it as one line and leave with code 2."""


def run(main):
    """Run a script's main(): what the user can mend becomes one line on stderr and exit code 2."""
    try:
        return main()
    except UserError as e:
        # one that was raised in a loader's worker comes with that worker's traceback before it
        message = "error: " + str(e).strip().splitlines()[-1].removeprefix("files.UserError: ")
        code = 2
    except KeyboardInterrupt:
        message = "stopped"
        code = 130
    print(message, file=sys.stderr)     # only now: a progress bar has been closed with the exception
    sys.exit(code)


def make_parser(doc):
    """doc: a script's docstring, shown by --help as it stands."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


def check_paths(inputs, outputs=()):
    """UserError now, not after minutes of work, if an input is missing or an output cannot or must not be written.

    inputs, outputs: lists of paths, None where a flag was not given.
    """
    inputs = [path for path in inputs if path is not None]
    outputs = [path for path in outputs if path is not None]
    for path in inputs:
        if not os.path.isfile(path):
            raise UserError(f"no file {path}")
    for path in outputs:
        folder = os.path.dirname(path) or "."
        if os.path.isdir(path):
            raise UserError(f"cannot write {path}: it is a folder")
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise UserError(f"cannot write {path}: no folder {folder} to write to")
        if os.path.exists(path) and any(os.path.samefile(path, i) for i in inputs):
            raise UserError(f"cannot write {path}: it is also an input, and would be lost")


@contextmanager
def atomic(path):
    """Yield a temporary name to write to, renamed to `path` at the end: it is absent, as it was before, or whole."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def save_tensors(state, path):
    """torch.save, atomically."""
    with atomic(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as e:  # what torch.save makes of a full disk
            raise OSError(str(e).splitlines()[0]) from None
