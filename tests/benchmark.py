"""Measures where the time goes.

    python tests/benchmark.py                       # everything, about ten minutes on two cores
    python tests/benchmark.py generator step        # some of: generator step w data infer

The machine should do nothing else meanwhile. Times are the minimum over several interleaved runs, with the
device synchronised. "share" is the achieved rate of multiply-adds, divided by that of a large matrix product
of the same dtype in the same run. The multiply-adds are those of the layers as the paper describes them, even
where we compute the same with fewer.

All numbers below are from one run on two cores of a Xeon with AMX, with torch 2.15, where the matrix product
reaches 430 GFLOP/s in float32. They were measured with an earlier version of the networks and of this file.
W is missing, because Adam now updates all of its rows.

    at the paper's size, 256 pixels               float32  share  bfloat16          the paper, on a P40
    G, one frame, 46.6 GMAC (folded: 37.2)        231 ms   94 %   86 ms             139 ms (2080 Ti: 13)
    a training step, K = 8, VGG19 and VGGFace,
    862 GMAC, batch 1                             7.4 s    55 %   2.6 s
    the same, batch 6                             48 s     51 %   12.8 s
    peak memory of the step, batch 1 and 6        4.9 and 12.9 GB (float32 and bfloat16 in one process)

    data.py, one core                             95 frames/s, 0.80 of decoding and detection alone
    with two workers compared with one            1.93 times as fast, without starting the processes
    loading at 256 pixels, one core               1,063 frames/s (decode, draw, stack)
    peak memory, driver of 60 s and of 6 s        841 MB, 1.00 times

The training step does not reach the 70 % in float32 that we aimed for. Nine tenths of its time are
convolutions, and oneDNN runs their backward passes at about 60 % of the matrix product's rate. A sixth of the
CPU time is spent on newly allocated memory. glibc keeps memory for later with
MALLOC_MMAP_THRESHOLD_=4294967296 and MALLOC_TRIM_THRESHOLD_=68719476736. In another run, the share at batch 1
then rose from 60 to 65 %.
"""
import copy
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.vgg import cfgs, make_layers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402  (our own modules, which need the line above)
import finetune as stage2  # noqa: E402
import infer as stage3  # noqa: E402
import meta_train  # noqa: E402
from losses import VGG19_LAYERS, VGGFACE_LAYERS, ContentLoss, Features  # noqa: E402
from media import decode, encode, faces, prepare, recognition, tracking  # noqa: E402
from model import Config, Discriminator, Embedder, Generator  # noqa: E402
from runtime import device  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def best(functions, repeats=5):
    """{name: function} -> {name: seconds}: the minimum over interleaved runs, after one run to warm up."""
    seconds = dict.fromkeys(functions, float("inf"))
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def matmul(dtype, n=2048):
    """A function that multiplies two (n, n) matrices."""
    a = torch.randn(n, n, device=DEVICE, dtype=dtype)
    return lambda: a @ a


def flops(function):
    """The floating point operations of a call, two for each multiply-add."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def upsample_conv_saves(G):
    """The operations per frame that model.upsample_conv saves: of 9 products at every pixel, 4 remain."""
    widths = [[size // 2 for size in block.psi_sizes] for block in G.up]
    return sum(2 * (9 - 4) * c_in * c_out * (16 << k) ** 2 for k, (c_in, c_out) in enumerate(widths, 1))


def row(name, *values):
    """Print a row of a table."""
    print(f"  {name:52}" + "".join(f"{v:>16}" for v in values), flush=True)


def generator():
    """The time of G for one frame at the paper's size."""
    G = Generator(Config()).to(DEVICE).eval()
    y, e = torch.rand(1, 3, 256, 256, device=DEVICE) * 2 - 1, torch.rand(1, 512, device=DEVICE)
    with torch.inference_mode():
        psi = G.project(e)
        before = G.render(y, psi)
        unfolded = best({"unfolded": lambda: G(y, e)})["unfolded"]
        G.fold()
        difference = (G.render(y, psi) - before).abs().max().item()
        computed = flops(lambda: G.render(y, psi))
        work = computed + upsample_conv_saves(G)
        channels_last = Generator(Config()).to(DEVICE).fold().to(memory_format=torch.channels_last)
        runs = {}
        for name, net in (("contiguous", G), ("channels_last", channels_last)):
            for kind, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
                net_, inputs = copy.deepcopy(net).to(dtype), (y.to(dtype), psi.to(dtype))
                runs[f"{kind} {name}"] = lambda net=net_, inputs=inputs: net.render(*inputs)
        times = best(runs | {"float32": matmul(torch.float32), "bfloat16": matmul(torch.bfloat16)})
    print(f"generator, 256 pixels, one frame: {work / 2e9:.1f} GMAC in the paper's layers, on which the "
          f"shares are based; upsample_conv leaves {computed / 2e9:.1f} of them\n"
          f"folding changes the picture by at most {difference:.1e}")
    row("", "ms per frame", "GFLOP/s", "share")
    row("float32 unfolded", f"{unfolded * 1e3:.0f}")
    for name in runs:
        rate = 2 * 2048 ** 3 / times[name.split()[0]]
        row(name, f"{times[name] * 1e3:.0f}", f"{work / times[name] / 1e9:.0f}",
            f"{work / times[name] / rate:.0%}")
    for name in ("float32", "bfloat16"):
        row(f"matrix product {name}", f"{times[name] * 1e3:.0f}", f"{2 * 2048 ** 3 / times[name] / 1e9:.0f}")


def random_vgg():
    """The paper's content loss with random weights, which takes the same time."""
    content = ContentLoss("l1")
    for letter, layers in (("E", VGG19_LAYERS), ("D", VGGFACE_LAYERS)):
        features = Features(make_layers(cfgs[letter]), layers, (128.,) * 3, (1.,) * 3, 0.1)
        content.terms.append(features.requires_grad_(False))
    return content.to(device=DEVICE, memory_format=torch.channels_last)


def step():
    """The time of a training step at the paper's size, with K = 8, and with random VGG19 and VGGFace."""
    cfg = Config(num_videos=1000)
    layout = dict(device=DEVICE, memory_format=torch.channels_last)
    E, G, D = Embedder(cfg).to(**layout), Generator(cfg).to(**layout), Discriminator(cfg).to(**layout)
    content = random_vgg()
    optimizers = meta_train.make_optimizers(E, G, D, cfg)
    fast_dtype = device.fast_dtype
    print("training step, 256 pixels, K = 8, two updates of D")
    row("", "s", "GMAC", "GFLOP/s", "share", "peak GB")
    for batch in (1, 6):
        x, y = torch.rand(2, batch, 9, 3, 256, 256, device=DEVICE) * 2 - 1
        index = torch.zeros(batch, dtype=torch.long, device=DEVICE)
        one_step = lambda: meta_train.train_step(E, G, D, content, optimizers, index, x, y)
        for kind in ("float32", "bfloat16"):    # autocast() asks this function
            device.fast_dtype = lambda device, dtype=getattr(torch, kind): dtype
            work = flops(one_step)
            times = best({"step": one_step, "product": matmul(getattr(torch, kind))}, 3 if batch == 1 else 1)
            rate = 2 * 2048 ** 3 / times["product"]
            if DEVICE.type == "cuda":
                peak = torch.cuda.max_memory_allocated()
            else:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1e3
            row(f"{kind}, batch {batch}", f"{times['step']:.2f}", f"{work / 2e9:.0f}",
                f"{work / times['step'] / 1e9:.0f}", f"{work / times['step'] / rate:.0%}",
                f"{peak / 1e9:.1f}")
    device.fast_dtype = fast_dtype


def w():
    """The time that W takes in a step, by its number of rows: a step updates D, and so all rows, twice."""
    runs = {}
    for videos in (1_000, 18_139, 145_112):     # a small data set, VoxCeleb2 on eight ranks, VoxCeleb2 on one
        W = torch.nn.Parameter(torch.rand(videos, 512, device=DEVICE))
        optimizer = torch.optim.Adam([W], 2e-4, (0.0, 0.999), fused=DEVICE.type == "cuda")
        index = torch.arange(6, device=DEVICE) * 100

        def run(W=W, optimizer=optimizer, index=index):
            for _ in range(2):
                optimizer.zero_grad()
                F.embedding(index, W).sum().backward()
                optimizer.step()
        runs[videos] = run
    times = best(runs, 10)
    print("W: gather and gradient for a batch of 6, and two steps of Adam on all rows; memory of all of it")
    for videos, seconds in times.items():
        row(f"{videos} videos", f"{seconds * 1e3:.1f} ms", f"{videos * 512 * 4 * 4 / 1e6:.0f} MB")


def clip(path, frames, size=512):
    """Write a driver of 25 frames a second, in which the astronaut's head moves about."""
    image = Image.open(ROOT / "assets/astronaut.jpg").crop((90, 0, 370, 280))
    image = image.resize((size + 64, size + 64), Image.BICUBIC)
    image, k = np.asarray(image), np.arange(frames)
    dx, dy = (32 + 24 * np.sin(k / 17)).astype(int), (32 + 16 * np.sin(k / 11)).astype(int)
    encode.write_video(str(path), (image[b:b + size, a:a + size] for a, b in zip(dx, dy)), k, (1, 25))


def data_():
    """data.py on one core, compared with decoding and detection alone; with two workers; and loading."""
    torch.set_num_threads(1)
    detect = faces.landmark_detector("dlib")
    with tempfile.TemporaryDirectory() as folder:
        clip(f"{folder}/a.mp4", 100, 224)
        parts = lambda: [detect(decode.to_rgb(f)) for f in decode.read_video(f"{folder}/a.mp4")]
        prepare._detect, prepare._recognition = detect, recognition.tell_apart()
        whole = lambda: prepare._prepare([Path(f"{folder}/a.mp4")], f"{folder}/p/a.pt", 256, 0)
        times = best({"parts": parts, "whole": whole}, 3)
        print("data, one core")
        row("decoding and detection alone, 224 pixels", f"{100 / times['parts']:.0f} frames/s")
        row("data.py", f"{100 / times['whole']:.0f} frames/s", f"{times['parts'] / times['whole']:.2f} of it")
        rates = []
        for workers in (1, 2):
            seconds = []
            for clips in (8, 40):   # the difference does not include starting the processes
                for n in range(clips):
                    os.makedirs(f"{folder}/v{clips}/{n}", exist_ok=True)
                    if not os.path.exists(f"{folder}/v{clips}/{n}/a.mp4"):
                        os.link(f"{folder}/a.mp4", f"{folder}/v{clips}/{n}/a.mp4")
                command = [sys.executable, str(ROOT / "data.py"), "--videos", f"{folder}/v{clips}",
                           "--out", f"{folder}/{workers}-{clips}", "--landmarks", "dlib",
                           "--workers", str(workers), "--max-frames", "0"]
                start = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                seconds.append(time.perf_counter() - start)
            rates.append((40 - 8) * 100 / (seconds[1] - seconds[0]))       # 100 frames a clip
        row("the whole command without its start, 1 and 2 workers",
            *(f"{r:.0f} frames/s" for r in rates), f"ratio {rates[1] / rates[0]:.2f}")
        episodes = data.Episodes(data.PreparedVideos(f"{folder}/p"), 8, 6)
        seconds = best({"load": lambda: [episodes[n] for n in range(10)]})["load"]
        row("loading (decode, draw, stack), 256 pixels", f"{90 / seconds:.0f} frames/s")
    torch.set_num_threads(os.cpu_count())


def infer():
    """infer.py with the bundled checkpoint, compared with its parts; its memory, by the driver's length."""
    state = stage2.load_checkpoint(stage2.CHECKPOINT, DEVICE)
    config = state["config"]
    detect, S = faces.landmark_detector("dlib"), config.image_size
    with tempfile.TemporaryDirectory() as folder:
        clip(f"{folder}/short.mp4", 150), clip(f"{folder}/long.mp4", 1500)
        photos = stage2.load_photos([ROOT / "assets/astronaut.jpg"], config, detect)
        G, psi, source = stage2.learn_person(state, photos, None, 0, DEVICE)
        stage2.save_person(f"{folder}/p.pt", config, G, psi, source, photos)
        frames = [np.zeros((S, S, 3), np.uint8)] * 150
        track = tracking.track_video(f"{folder}/short.mp4", detect)
        points = track.in_crops(S)
        command = [sys.executable, str(ROOT / "infer.py"), "--person", f"{folder}/p.pt",
                   "--out", f"{folder}/o.mp4", "--driver"]
        quiet = dict(check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        decoding = lambda: [decode.to_rgb(f) for f in decode.read_video(f"{folder}/short.mp4")]

        def whole():
            track = tracking.track_video(f"{folder}/short.mp4", detect)
            pictures = stage3.render(G, psi, track.in_crops(S), S)
            encode.write_video(f"{folder}/o.mp4", pictures, track.pts, track.time_base)
        times = best({
            "decoding": decoding,
            "detection": lambda frames=decoding(): [detect(f) for f in frames],
            "G": lambda: list(stage3.render(G, psi, points, S)),
            "encoding": lambda: encode.write_video(f"{folder}/o.mp4", frames, np.arange(150), (1, 25)),
            "whole": whole}, 3)
        print(f"infer.py, {S} pixels, driver of 512 pixels")
        for name, seconds in times.items():
            row(name, f"{150 / seconds:.0f} frames/s")
        sum_of_parts = sum(times.values()) - times["whole"]
        row("whole / sum of parts", f"{times['whole'] / sum_of_parts:.2f}")
        measure = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
                   "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss; "
                   "open(sys.argv[-1] + '.peak', 'w').write(str(peak))")
        peaks = []
        for name in ("short", "long"):
            subprocess.run([sys.executable, "-c", measure, *command, f"{folder}/{name}.mp4"], **quiet)
            peaks.append(int(Path(f"{folder}/{name}.mp4.peak").read_text()))
        row("peak memory, 6 s and 60 s", *(f"{p / 1e3:.0f} MB" for p in peaks),
            f"ratio {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    cpu = f"CPU, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if DEVICE.type == "cuda" else cpu
    print(f"{machine}, torch {torch.__version__}")
    benchmarks = {"generator": generator, "step": step, "w": w, "data": data_, "infer": infer}
    for name in sys.argv[1:] or benchmarks:
        benchmarks[name]()
