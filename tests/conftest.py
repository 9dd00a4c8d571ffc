"""What the tests share: small networks, a photo and a clip made from it, prepared files, running commands."""
import functools
import gc
import importlib
import io
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from fractions import Fraction
from itertools import chain
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:     # `pytest -n 2`: one thread for each worker and its subprocesses,
    os.environ["OMP_NUM_THREADS"] = "1"     # because two processes of two threads slow each other down

import av
import dlib
import numpy as np
import pytest
import torch
from PIL import Image

from beyond.face3d import load_face3d
from media.faces import landmark_detector
from model import Config, Discriminator, Embedder, Generator
from runtime.checkpoint import save_checkpoint
from runtime import files

# A decoder of PyAV waits for its threads when it is freed. A forked process, such as a loader's worker, does
# not have these threads and would wait forever, so unused decoders are freed before the fork.
os.register_at_fork(before=gc.collect)

# `nohup pytest ... &` ignores these signals, and the commands that the tests start would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
THREADS = min(2, len(os.sched_getaffinity(0)), int(os.environ.get("OMP_NUM_THREADS", 2)))
PHOTO = ROOT / "assets" / "astronaut.jpg"
TRACK = ROOT / "assets" / "speech.npz"
TINY = dict(channels=(8, 16, 16), landmarks="dlib", content="l1", lr=3e-4, lr_d=3e-4, finetune_lr=6e-4,
            finetune_lr_d=6e-4, lips=1.25)
TINY_FLAGS = ["--toy", "--channels", "8", "16", "16", "--K", "2", "--batch", "2"]
# The same with sequences that a test has prepared. With the 1000 toy heads, --grow-from takes longer.
TINY_DATA_FLAGS = ["--data", "prepared", "--image-size", "64", "--content", "l1", *TINY_FLAGS[1:]]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long forms of tests (two hours in all)")


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: the test may use the GPU, which is hidden from all others")


@pytest.fixture(autouse=True)
def few_threads_and_no_gpu(request, monkeypatch):
    torch.set_num_threads(THREADS)
    if "cuda" not in request.keywords:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def slow(request):
    """Whether to run the long form of a test."""
    return request.config.getoption("--slow")


# Built once for all tests: the first takes 100 MB and a second, the other a third of a second.
shape_predictor = functools.cache(dlib.shape_predictor)
frontal_detector = functools.cache(dlib.get_frontal_face_detector)
OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


def script(*args, cwd, timeout=300, **env):
    """Run `python SCRIPT ARGS` in a process of its own, without accelerators and downloads."""
    command = [sys.executable, str(ROOT / args[0]), *map(str, args[1:])]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | OFFLINE | env
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


@contextmanager
def captured(out, err):
    """Redirect stdout and stderr, of Python and of libraries, to two files."""
    sys.stdout.flush(), sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            yield
    finally:
        out.flush(), err.flush()
        os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        os.close(kept[0]), os.close(kept[1])


def here(*args, cwd, **env):
    """The same as `script`, but in this process, by calling the script's main(). This saves seconds.

    A module in a folder is named as for `python -m`: "beyond.teach".
    """
    module = importlib.import_module(args[0].removesuffix(".py"))
    numbers = signal.SIGTERM, signal.SIGHUP, signal.SIGINT
    handlers = {number: signal.getsignal(number) for number in numbers}
    with (tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err,
          pytest.MonkeyPatch.context() as patch):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", list(map(str, args)))
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(dlib, "shape_predictor", shape_predictor)
        patch.setattr(dlib, "get_frontal_face_detector", frontal_detector)
        for name, value in (OFFLINE | env).items():
            patch.setenv(name, value)
        code = 0
        try:
            with captured(out, err):
                files.run(module.main)
        except SystemExit as e:
            code = e.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess(args, code, out.read(), err.read())


def succeed(*args, start=here, **options):
    """Run a command that must succeed, and return its stdout. start: `here`, or `script` in a new process."""
    result = start(*args, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fail(*args, start=here, **options):
    """Run a command that must fail with exit code 2 and one line on stderr, and return that line."""
    result = start(*args, **options)
    lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert result.returncode == 2, (result.returncode, result.stderr)
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def torchrun(*arguments, cwd):
    """Run torchrun with two ranks on the CPU, with one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})


def tensors(path):
    """The tensors in a checkpoint, by name."""
    return {k: v for k, v in torch.load(path, weights_only=True).items() if torch.is_tensor(v)}


def same(a, b):
    """Whether two dicts of tensors are equal."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def networks(size=64, num_videos=4, **config):
    """-> Config, E, G, D: tiny and untrained, always with the same weights."""
    torch.manual_seed(0)
    cfg = Config(image_size=size, num_videos=num_videos, **TINY | config)
    return cfg, Embedder(cfg), Generator(cfg), Discriminator(cfg)


def pictures(*shape):
    """Pictures in [-1, 1]: noise around a colour of their own."""
    return (torch.rand(*shape, 3, 64, 64) + torch.rand(*shape, 3, 1, 1) - 1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny, untrained checkpoint as of meta-learning."""
    cfg, E, G, D = networks()
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    save_checkpoint(path, "meta", cfg, E=E, G=G, V=D.V, w0=D.w0, b=D.b)
    return path


@pytest.fixture(scope="session")
def detect():
    return landmark_detector("dlib")


@pytest.fixture(scope="session")
def model():
    """The bundled 3-D face model."""
    return load_face3d()


@pytest.fixture(scope="session")
def face():
    """A photo of the astronaut's head, uint8 (200, 240, 3), which is small and not square."""
    return np.asarray(Image.open(PHOTO).crop((110, 0, 350, 200)))


def write_clip(path, frames, pts, sound=True, rate=25):
    """Write an mp4 of frames uint8 (H, W, 3) with time stamps `pts` in 1/12800 s, and a tone as its sound."""
    frames = iter(frames)
    first = next(frames)
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=rate, options={"crf": "10"})
        video.height, video.width, video.pix_fmt = *first.shape[:2], "yuv420p"
        video.codec_context.time_base = Fraction(1, 12800)
        audio = out.add_stream("aac", rate=16000, layout="mono") if sound else None
        for frame, stamp in zip(chain([first], frames), pts):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = int(stamp), Fraction(1, 12800)
            out.mux(video.encode(picture))
        out.mux(video.encode())
        if sound:
            samples = int(16000 * (pts[-1] + 512) / 12800)
            tone = (np.sin(np.arange(samples) * 0.2) * 8000).astype(np.int16)[None]
            note = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
            note.rate, note.pts = 16000, 0
            out.mux(audio.encode(note))
            out.mux(audio.encode())


def remux(source, target, offset, kinds=("video", "audio"), **metadata):
    """Copy a file without re-encoding, with the packets of these kinds of streams `offset` seconds later."""
    with av.open(str(source)) as a, av.open(str(target), "w") as b:
        b.metadata.update(metadata)
        copies = {s.index: b.add_stream_from_template(s) for s in a.streams}
        for packet in a.demux():
            if packet.dts is not None:
                shift = round(offset / packet.time_base) if packet.stream.type in kinds else 0
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = copies[packet.stream.index]
                b.mux(packet)


def moving(face, n):
    """n frames of 160 x 200 pixels, cut from the photo `face` at different places, so that the head moves."""
    return [face[20 + k % 3:180 + k % 3, 20 + 2 * (k % 5):220 + 2 * (k % 5)] for k in range(n)]


@pytest.fixture(scope="session")
def clip(tmp_path_factory, face):
    """A clip of 20 frames at a variable rate, with sound, and without a face in frames 7 and 8."""
    frames = moving(face, 20)
    frames[7] = frames[8] = np.zeros_like(frames[0])
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_clip(path, frames, np.cumsum([512] * 10 + [768] * 10) - 512)
    return path


def prepare(path, frames, points, file=None, seconds=None, made_up=None):
    """Write a file as data.py does, of frames uint8 (n, S, S, 3) and landmarks (n, 68, 2).

    file, seconds (n,): the clip that each frame is from, and its time in it. By default they are photos.
    made_up (n,): the share of each frame that lies beyond the picture. By default it is 0.
    """
    jpegs = []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=95)
        jpegs.append(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
    offsets = torch.tensor([0] + [len(jpeg) for jpeg in jpegs]).cumsum(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.save_tensors({"jpeg": torch.cat(jpegs), "offsets": offsets, "landmarks": torch.tensor(points),
                        "file": torch.as_tensor(range(len(frames)) if file is None else file),
                        "seconds": torch.as_tensor(np.zeros(len(frames)) if seconds is None else seconds),
                        "made_up": torch.zeros(len(frames)) if made_up is None else torch.tensor(made_up),
                        "image_size": len(frames[0]),
                        "detector": "dlib"}, path)
