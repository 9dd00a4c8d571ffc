"""Photos, videos, tracks and checkpoints that are odd, hostile or damaged.

The test test_fuzz has a long form:

    python -m pytest tests/test_hostile.py --slow

It was run once on one core of a Xeon, with 2,400 mutated photos, videos, tracks, .mat files and checkpoints.
Each gave a result or one line of error within 30 s, and the memory stayed under 2 GB.
"""
import os
import pickle
import struct
import subprocess
import sys
import zlib

import av
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import PHOTO, ROOT, TRACK, fail, moving, write_clip
from media.decode import read_video, to_rgb
from media.photos import read_photo
from runtime.files import UserError


class Bomb:
    """Runs a shell command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_pickles_that_would_run_code_are_refused(tmp_path, checkpoint):
    torch.save(torch.load(checkpoint, weights_only=True) | {"x": Bomb()}, tmp_path / "bomb.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Bomb()))
    np.savez(tmp_path / "bomb.npz", points=np.array([Bomb()], object), found=[True], pts=[0],
             time_base=[1, 25], detector="dlib")
    for name in ("bomb.pt", "raw.pt"):
        said = fail("infer.py", "--photo", PHOTO, "--driver", TRACK, "--checkpoint", name,
                    cwd=tmp_path)
        assert "is not a readable checkpoint" in said
    said = fail("infer.py", "--photo", PHOTO, "--driver", "bomb.npz", "--checkpoint", checkpoint,
                cwd=tmp_path)
    assert "is not a landmark track" in said
    assert not (tmp_path / "exploded").exists()


def png(width, height):
    """-> the bytes of a PNG whose header gives a size, but which has almost no pixels."""
    number = lambda n: struct.pack(">I", n)
    chunk = lambda kind, body: number(len(body)) + kind + body + number(zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))
            + chunk(b"IEND", b""))


def test_hostile_pictures(tmp_path, face, detect):
    for size in ((0, 0), (30_000, 30_000), (10_000, 10_000)):
        (tmp_path / "hostile.png").write_bytes(png(*size))
        with pytest.raises(UserError, match="hostile.png"):
            read_photo(tmp_path / "hostile.png")
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    Image.new("RGB", (20_000, 30)).save(tmp_path / "wide.png")
    image = Image.fromarray(face)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.quantize(16).save(tmp_path / "palette.png")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    image.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", image.size)])
    for name, found in (("dot.png", False), ("wide.png", False), ("cmyk.jpg", True),
                        ("palette.png", True), ("deep.png", True), ("moving.gif", True)):
        picture = read_photo(tmp_path / name)
        assert picture.ndim == 3 and picture.dtype == np.uint8, name
        assert (detect(picture) is not None) == found, name


def test_odd_videos(tmp_path, face, capsys):
    frames = moving(face, 6)
    write_clip(tmp_path / "one.mp4", frames[:1], [0])
    assert len(list(read_video(tmp_path / "one.mp4"))) == 1
    with av.open(str(tmp_path / "deep.mkv"), "w") as out:       # 10 bits, and an odd width and height
        stream = out.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 161, 121, "yuv420p10le"
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(face[:121, :161].copy(), format="rgb24")))
        out.mux(stream.encode())
    assert [to_rgb(f).shape for f in read_video(tmp_path / "deep.mkv")] == [(121, 161, 3)] * 3
    parts = []      # the resolution changes in the middle
    for k, size in enumerate(((160, 120), (320, 240))):
        with av.open(str(tmp_path / f"{k}.h264"), "w", format="h264") as out:
            stream = out.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            for _ in range(3):
                out.mux(stream.encode(av.VideoFrame(*size, "yuv420p")))
            out.mux(stream.encode())
        parts.append((tmp_path / f"{k}.h264").read_bytes())
    (tmp_path / "change.h264").write_bytes(b"".join(parts))
    shapes = [to_rgb(f).shape for f in read_video(tmp_path / "change.h264")]
    assert shapes == [(120, 160, 3)] * 6
    with av.open(str(tmp_path / "none.mkv"), "w") as out:       # a stream without a frame
        stream = out.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        out.start_encoding()
    with pytest.raises(UserError, match="none.mkv"):
        list(read_video(tmp_path / "none.mkv"))


FUZZ = """
import os, random, resource, signal, sys, time
sys.path[:0] = [%(root)r, %(tests)r]
import numpy as np, torch
from pathlib import Path
from data import PreparedVideos
from media.folders import faces_in
from media.faces import landmark_detector
from media.tracking import load_track, track_video
from runtime.files import UserError
from losses import read_matconvnet
from runtime.checkpoint import load_checkpoint, load_networks
torch.set_num_threads(1)
detect = landmark_detector("dlib")
read = {
    ".jpg": lambda p: list(faces_in(p, detect, 64)), ".png": lambda p: list(faces_in(p, detect, 64)),
    ".mp4": lambda p: track_video(p, detect, complain=lambda m: None),
    ".npz": lambda p: load_track(p).in_crops(64), ".mat": read_matconvnet,
    ".pt": lambda p: load_networks(load_checkpoint(p)),
}
seeds, rng, slowest, used = sorted(Path("seeds").iterdir()), random.Random(0), 0, 0
for n in range(int(sys.argv[1]) if __name__ == "__main__" else 0):
    # fewer .mat files, because each takes a process and seconds
    seed = seeds[1 + n %% (len(seeds) - 1)] if n %% 30 else seeds[0]
    data = bytearray(seed.read_bytes())
    for _ in range(rng.choice((1, 3, 30))):
        kind, at = rng.random(), rng.randrange(len(data))
        if kind < .6: data[at] = rng.randrange(256)
        elif kind < .75: del data[at:at + rng.randrange(1, 200)]
        elif kind < .9: data[at:at] = rng.randbytes(rng.randrange(1, 200))
        else: data = data[:max(at, 1)]
        if len(data) < 2: break
    path = Path("mutated" + seed.suffix)
    path.write_bytes(data)
    signal.alarm(30)        # a hang kills the process
    began = time.time()
    try:
        read[seed.suffix](path)
        used += 1
    except UserError as e:
        assert "\\n" not in str(e), e
    slowest = max(slowest, time.time() - began)
    signal.alarm(0)
print(used, f"{slowest:.1f}", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_fuzz(slow, tmp_path, face, checkpoint):
    """Mutated files of all kinds give a result or a UserError of one line, and no other exception."""
    from scipy.io import savemat
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    Image.fromarray(face).save(seeds / "a.jpg")
    Image.fromarray(face).save(seeds / "b.png")
    write_clip(seeds / "c.mp4", moving(face, 5), np.arange(5) * 512)
    (seeds / "d.npz").write_bytes(TRACK.read_bytes())
    weights = np.array([np.zeros((3, 3, 3, 4), np.float32), np.zeros(4, np.float32)], object)
    layer = {"type": "conv", "name": "conv1_1", "weights": weights}
    savemat(seeds / "0.mat", {"layers": np.array([layer], object),
                              "meta": {"normalization": {"averageImage": np.zeros(3)}}})
    (seeds / "f.pt").write_bytes(checkpoint.read_bytes())
    (tmp_path / "fuzz.py").write_text(FUZZ % {"root": str(ROOT), "tests": str(ROOT / "tests")})
    result = subprocess.run([sys.executable, "fuzz.py", "2400" if slow else "60"], cwd=tmp_path,
                            capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, result.stderr[-3000:]
    used, slowest, peak = result.stdout.split()[-3:]
    assert int(used) > 0 and float(slowest) < 30 and int(peak) < 2e6, result.stdout
