"""Preparing a folder of videos and photos for training, in several processes: what `python data.py` does."""
import io
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, resource_tracker

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from media.crops import MADE_UP
from media.faces import landmark_detector
from media.folders import evenly, faces_in, find_sequences, first_names
from media.recognition import are_several, tell_apart
from runtime.device import free_memory, usable_cores
from runtime.files import UserError, leave_on_signals, make_folder, raise_if_out_of_memory, save_tensors

WORKER_MEMORY = 627e6   # bytes that a worker process needs
COMPARED = 4            # the number of files of a sequence that are compared to see if they show one person


def prepare(videos, out, kind, size, max_frames, workers):
    """Write a prepared file (see data.py) into `out` for every sequence below `videos`, and print a summary.

    kind: as in landmark_detector().  size: of the crops, in pixels.  workers: the number of processes.
    max_frames: use at most this many frames of a sequence, evenly spaced; 0 means all.
    A sequence whose file exists is skipped. Raises UserError if nothing could be prepared, a worker process
    died, or a file cannot be written.
    """
    if not os.path.isdir(videos):
        raise UserError(f"no folder {videos}: name the folder of videos or photos with --videos DIR")
    sequences, problems = find_sequences(videos, out)
    if not sequences:
        raise UserError(f"{videos} holds neither videos nor photos: name another folder with --videos DIR")
    make_folder(out)
    todo = {name: files for name, files in sequences.items() if not os.path.exists(f"{out}/{name}.pt")}
    landmark_detector(kind)     # if it cannot be built, this fails here and not in every worker

    # the work
    done, frames, tight, stop = 0, 0, 0, None
    jobs = [(files, f"{out}/{name}.pt", size, max_frames) for name, files in todo.items()]
    try:
        for count, cut_tight, lines in results(jobs, kind, workers):
            done += count > 0
            frames += count
            tight += cut_tight
            problems += lines
    except BrokenProcessPool:
        stop = UserError("a worker process died, probably because memory ran out: run the command again with "
                         "fewer --workers, and it will continue where it stopped")
    except UserError as e:      # a file cannot be written
        stop = e

    # the summary
    before = len(sequences) - len(todo)
    left_out = {name: len(files) - max_frames for name, files in todo.items() if 0 < max_frames < len(files)}
    print(f"{out}: {done} sequences with {frames} frames prepared, {before} were there already")
    if left_out:
        print(f"left out by --max-frames {max_frames}: {sum(left_out.values())} photos and clips of "
              f"{first_names(list(left_out))}")
    if tight:
        print(f"{tight} of these frames are cut so tight that more than {MADE_UP:.0%} of the crop had to be "
              "made up: training does not use them")
    if problems:
        print(f"skipped, used in part, or worth a look ({len(problems)}):", *sorted(problems), sep="\n  ")
    if stop or (done == 0 and len(sequences) == len(todo)):
        raise stop or UserError(f"nothing in {videos} could be used, for the reasons listed above")


def default_workers(kind):
    """The number of worker processes for this machine's cores and memory. kind: as in landmark_detector()."""
    if kind == "fan" and torch.cuda.is_available():
        return 2    # they share the GPU
    return max(1, int(min(usable_cores(), free_memory() / WORKER_MEMORY)))


def results(jobs, kind, workers):
    """Call _prepare() with each of these tuples of arguments in worker processes, and yield the results."""
    # The resource tracker is a process that multiprocessing starts. It ignores SIGINT and SIGTERM, and it
    # inherits from here that SIGHUP is ignored, too. Otherwise a closed terminal would end it first.
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    resource_tracker.ensure_running()
    signal.signal(signal.SIGHUP, handler)
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (kind,)) as pool:
        jobs = [pool.submit(_job, *job) for job in jobs]
        try:
            for job in tqdm(as_completed(jobs), "preparing", len(jobs), unit=" sequences"):
                yield job.result()
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            for worker in active_children():    # a signal may have reached this process alone
                worker.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


# ------------------------------------------------------------------------------- in the worker processes

_detect = _recognition = None   # built once in each worker
_stopped = False                # whether this worker has received a signal


def _start_worker(kind):
    global _detect, _recognition, _stopped
    try:
        leave_on_signals(signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        torch.set_num_threads(1)
        _detect, _recognition = landmark_detector(kind), tell_apart()
    except SystemExit:      # the pool would print a traceback of it; now _job() leaves
        _stopped = True


def _job(*arguments):
    """Call _prepare(), but do nothing after a signal, because the pool still sends the jobs in its queue."""
    global _stopped
    if _stopped:
        sys.exit()
    try:
        return _prepare(*arguments)
    except SystemExit:
        _stopped = True
        raise


def _prepare(files, out, size, max_frames):
    """Prepare one sequence -> the number of frames stored, how many of them are above MADE_UP, [problems]."""
    files = evenly(files, max_frames or len(files))
    jpegs, numbers, faces, vectors, problems = [], [], [], [], []
    compared = evenly(range(len(files)), COMPARED) if len(files) > 1 else []
    for number, file in enumerate(files):
        try:
            share = max_frames // len(files)
            for face in faces_in(file, _detect, size, share, problems.append, _recognition):
                if number in compared and number not in numbers:
                    vectors.append(_recognition.vector(face.image, face.points))
                buffer = io.BytesIO()
                Image.fromarray(face.image).save(buffer, "JPEG", quality=95, subsampling=0)
                jpegs.append(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
                faces.append(face._replace(image=None))     # to save memory
                numbers.append(number)
        except UserError as e:
            problems.append(str(e))
        except Exception as e:  # one bad file among a million must not stop the others
            raise_if_out_of_memory(e)
            problems.append(f"{file}: {type(e).__name__}: {e}")
    if len(jpegs) < 2:
        place = files[0] if len(files) == 1 else files[0].parent
        return 0, 0, problems + [f"{place}: frames that show a face: {len(jpegs)}; at least 2 are needed"]
    if are_several(vectors):
        problems.append(f"{files[0].parent}: the files seem to show several people, but were prepared as one "
                        "person: give each person a folder")
    shares = torch.tensor([face.made_up for face in faces])
    save_tensors({"jpeg": torch.cat(jpegs),
                  "offsets": torch.tensor([0] + [len(j) for j in jpegs]).cumsum(0),
                  "landmarks": torch.from_numpy(np.stack([face.points for face in faces])),
                  "file": torch.tensor(numbers),
                  "seconds": torch.tensor([face.seconds for face in faces], dtype=torch.float64),
                  "made_up": shares, "image_size": size, "detector": _detect.kind}, out)
    return len(jpegs), int((shares > MADE_UP).sum()), problems
