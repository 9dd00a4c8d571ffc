"""Long runs: their memory does not grow.

Two tests have a long form:

    python -m pytest tests/test_long_runs.py --slow

It was run once on one core of a Xeon. With a driver of 20 minutes (30,000 frames), the result had every
frame, and its sound was in sync to within a frame. The memory was 675 MB in the second minute of tracking and
694 MB in its last minute, and 763 and 762 MB while rendering. During 2,000 toy training steps it was 796 MB
in the third and in the last quarter.
"""
import subprocess
import sys
import time

import av
import numpy as np
import torch

import infer
from conftest import PHOTO, ROOT, THREADS, TINY_FLAGS, moving, networks, succeed, write_clip
from data import draw_landmarks


MEMORY = """
import os, sys, time, threading
sys.path.insert(0, %r)
from runtime import files
sys.argv = sys.argv[1:]
import importlib
stage = importlib.import_module(sys.argv[0][:-3])
def watch():
    with open("memory.csv", "w") as file:
        while True:
            resident = int(open("/proc/self/statm").read().split()[1]) * 4096
            writing = any(name.endswith(".tmp") for name in os.listdir())
            print(time.time(), resident, int(writing), file=file, flush=True)
            time.sleep(0.1)
threading.Thread(target=watch, daemon=True).start()
files.run(stage.main)
"""


def memory_of(*args, cwd):
    """Run a script in a process of its own and measure its memory every tenth of a second.

    -> times, bytes, and whether a temporary file was being written: (n,) each.
    """
    result = subprocess.run([sys.executable, "-c", MEMORY % str(ROOT), *map(str, args)], cwd=cwd,
                            capture_output=True, text=True, timeout=7200)
    assert result.returncode == 0, result.stderr[-3000:]
    return np.loadtxt(cwd / "memory.csv", delimiter=" ").T


def test_a_long_driver(slow, tmp_path, face, checkpoint):
    """The result has every frame, and the sound is in sync at the end.

    The driver has 12 seconds. In the long form it has 20 minutes, and the memory must not grow.
    """
    seconds, frames = 1200 if slow else 12, moving(face, 60)
    write_clip(tmp_path / "long.mp4", (frames[k % 60] for k in range(25 * seconds)),
               range(0, 25 * seconds * 512, 512))
    succeed("finetune.py", "--photos", PHOTO, "--checkpoint", checkpoint, "--epochs", "1",
            "--out", "p.pt", cwd=tmp_path)
    command = ["infer.py", "--person", "p.pt", "--driver", "long.mp4"]
    if slow:
        times, used, rendering = memory_of(*command, cwd=tmp_path)
    else:
        succeed(*command, cwd=tmp_path)
    with av.open(str(tmp_path / "result.mp4")) as result, av.open(str(tmp_path / "long.mp4")) as driver:
        ends = []
        for container in (result, driver):
            ends.append([float((p.pts + p.duration) * p.time_base)
                         for p in container.demux(container.streams.video[0]) if p.size])
            container.seek(0)
            ends.append([float(p.pts * p.time_base)
                         for p in container.demux(container.streams.audio[0]) if p.size])
    video, sound, driver_video, driver_sound = ends
    assert len(video) == len(driver_video) == 25 * seconds and len(sound) == len(driver_sound)
    assert abs((video[-1] - sound[-1]) - (driver_video[-1] - driver_sound[-1])) < 1 / 25
    for phase in (0, 1) if slow else ():
        seconds, phase_used = times[rendering == phase], used[rendering == phase]
        second = phase_used[(seconds > seconds[0] + 60) & (seconds < seconds[0] + 120)].mean()
        last = phase_used[seconds > seconds[-1] - 60].mean()
        print(f"{('tracking', 'rendering')[phase]} {seconds[-1] - seconds[0]:.0f} s: "
              f"second minute {second / 1e6:.0f} MB, last minute {last / 1e6:.0f} MB")
        assert last < 1.05 * second


def test_frames_are_rendered_when_they_are_needed(monkeypatch):
    """This is why the memory does not grow with the driver, which the long form above measures."""
    drawn = []
    noted = lambda points, size: drawn.append(1) or draw_landmarks(points, size)
    monkeypatch.setattr("data.draw_landmarks", noted)
    cfg, E, G, D = networks()
    G.eval().fold()
    psi = G.project(torch.rand(1, 16))[0].detach()
    points = np.random.rand(100, 68, 2).astype(np.float32) * 64
    frames = infer.render(G, psi, points, 64)
    next(frames)
    assert 8 <= len(drawn) <= 8 * (1 + THREADS)     # a batch of 8 for each thread, and one more


def test_frames_drawn_in_threads_keep_their_order():
    def square(n):
        time.sleep(0.02 if n == 0 else 0)       # so that later items are ready first
        return n * n, torch.get_num_threads()
    before = torch.get_num_threads()
    assert list(infer.map_in_threads(square, range(7), 3)) == [(n * n, 1) for n in range(7)]
    assert torch.get_num_threads() == before


def test_long_training_does_not_grow(slow, tmp_path):
    times, used, _ = memory_of("meta_train.py", *TINY_FLAGS, "--steps", "2000" if slow else "60",
                               "--save-every", "10000", "--out", "run", cwd=tmp_path)
    quarter = len(used) // 4
    early, late = np.median(used[2 * quarter:3 * quarter]), np.median(used[3 * quarter:-5])
    print(f"memory in the third quarter {early / 1e6:.0f} MB, in the last {late / 1e6:.0f} MB")
    assert late < 1.05 * early
