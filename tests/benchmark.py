"""Where the time goes, each figure a ratio taken in one run on one machine.

    python tests/benchmark.py                       # all of them, about ten minutes on two cores
    python tests/benchmark.py generator step        # some of: generator step w data infer finetune

Leave the machine idle meanwhile. Times are the best of several interleaved runs, synchronised.
"share" is the achieved rate of multiply-adds, counted as the paper's layers are, over that of a
large matrix product of the same dtype in the same run. On two cores of a Xeon with AMX, torch 2.15,
float32 product 430 GFLOP/s, before G was trained with plain upsampling (it was trained with the
transposed kernel that folding makes now), all from one run:

    at the paper's size, 256 pixels               float32  share  bfloat16          the paper, on a P40
    G, a frame, 46.6 GMAC (folded: 37.2)          231 ms   94 %   86 ms             139 ms (2080 Ti: 13)
    a training step, K = 8, VGG19 and VGGFace,
    862 GMAC, batch 1                             7.4 s    55 %   2.6 s
    the same, batch 6                             48 s     51 %   12.8 s
    peak memory of the step, batch 1 and 6        4.9 and 12.9 GB (float32 and bfloat16 in one process)
    fine-tuning, 40 epochs (one measured),
    T = 1, 8, 32                                                  95, 447, 1,823 s  44, 85, 258 s

    W: gather, gradient and step,                 1.00 times; 892 MB with its optimiser,
    145,112 videos against 1,000                  111 on each of 8 GPUs
    data.py, one core                             95 frames/s, 0.80 of decoding and detection alone
    with two workers against one                  1.93 times as fast, the processes' start left out
    loading at 256 pixels, one core               1,063 frames/s (decode, draw, stack)
    infer.py, 64 pixels, 512-pixel driver         73 frames/s; 1.07 times the sum of its parts
    its peak memory, driver of 60 s against 6 s   841 MB, 1.00 times
    fine-tuning, T = 8, 40 epochs, 64-pixel toy   10.7 s; 1.02 times 40 bare steps

The training step misses our aim of 70 % in float32: nine tenths of it are convolutions, whose
backward passes oneDNN runs at about 60 % of the matrix product, and a sixth of the CPU time goes
into fresh memory, which glibc keeps with MALLOC_MMAP_THRESHOLD_=4294967296
MALLOC_TRIM_THRESHOLD_=68719476736 (share at batch 1: 65 % against 60 %, side by side).
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

import data  # noqa: E402  (the project's own modules, from wherever this is run)
import finetune as stage2  # noqa: E402
import infer as stage3  # noqa: E402
import meta_train  # noqa: E402
from beyond.toy import ToyHeads  # noqa: E402
from config import Config  # noqa: E402
from losses import FACE_WEIGHT, ContentLoss  # noqa: E402
from media import decode, encode, faces, folders, tracking  # noqa: E402
from model import Discriminator, Embedder, Generator  # noqa: E402
from perceptual import VGG19_LAYERS, VGGFACE_LAYERS, Features  # noqa: E402
from runtime import device  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def best(functions, repeats=5):
    """{name: function} -> {name: seconds}, the minimum over interleaved repeats, after one run to warm up."""
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
    a = torch.randn(n, n, device=DEVICE, dtype=dtype)
    return lambda: a @ a


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def upsample_conv_saves(G):
    """Operations per 256-pixel frame that a folded model.upsample_conv does not do.

    4 of 9 products remain at every pixel of its output.
    """
    widths = [[size // 2 for size in block.psi_sizes] for block in G.up]
    return sum(2 * (9 - 4) * c_in * c_out * (16 << k) ** 2 for k, (c_in, c_out) in enumerate(widths, 1))


def row(name, *values):
    print(f"  {name:52}" + "".join(f"{v:>16}" for v in values), flush=True)


def generator():
    """G at the paper's size, one frame."""
    G = Generator(Config()).to(DEVICE).eval()
    y, e = torch.rand(1, 3, 256, 256, device=DEVICE) * 2 - 1, torch.rand(1, 512, device=DEVICE)
    with torch.inference_mode():
        psi = G.project(e)
        before = G.render(y, psi)
        unfolded = best({"unfolded": lambda: G(y, e)})["unfolded"]
        G.fold()
        difference = (G.render(y, psi) - before).abs().max().item()
        done = flops(lambda: G.render(y, psi))
        work = done + upsample_conv_saves(G)
        last = Generator(Config()).to(DEVICE).fold().to(memory_format=torch.channels_last)
        runs = {}
        for name, net in (("contiguous", G), ("channels_last", last)):
            for kind, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
                net_, inputs = copy.deepcopy(net).to(dtype), (y.to(dtype), psi.to(dtype))
                runs[f"{kind} {name}"] = lambda net=net_, inputs=inputs: net.render(*inputs)
        rates = {"float32": 2 * 2048 ** 3, "bfloat16": 2 * 2048 ** 3}
        times = best(runs | {"float32": matmul(torch.float32), "bfloat16": matmul(torch.bfloat16)})
    print(f"generator, 256 pixels, one frame: {work / 2e9:.1f} GMAC as the paper's layers are, "
          f"on which the shares are based; {done / 2e9:.1f} are done (upsample_conv)\n"
          f"folding changes the picture by at most {difference:.1e}")
    row("", "ms a frame", "GFLOP/s", "share")
    row("float32 unfolded", f"{unfolded * 1e3:.0f}")
    for name in runs:
        rate = rates[name.split()[0]] / times[name.split()[0]]
        row(name, f"{times[name] * 1e3:.0f}", f"{work / times[name] / 1e9:.0f}",
            f"{work / times[name] / rate:.0%}")
    for name in rates:
        row(f"matrix product {name}", f"{times[name] * 1e3:.0f}", f"{rates[name] / times[name] / 1e9:.0f}")


def random_vgg():
    """The paper's content loss with random weights: the same work."""
    content = ContentLoss("l1")
    for letter, layers in (("E", VGG19_LAYERS), ("D", VGGFACE_LAYERS)):
        features = Features(make_layers(cfgs[letter]), layers, (128.,) * 3, (1.,) * 3, 0.1)
        content.terms.append(features.requires_grad_(False))
    return content.to(device=DEVICE, memory_format=torch.channels_last)


def step():
    """A training step at the paper's size, K = 8, with VGG19 and VGGFace of random weights."""
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
        one = lambda: meta_train.train_step(E, G, D, content, optimizers, index, x, y, 10.0)
        for kind in ("float32", "bfloat16"):
            device.fast_dtype = lambda device, dtype=getattr(torch, kind): dtype
            work = flops(one)
            times = best({"step": one, "product": matmul(getattr(torch, kind))}, 3 if batch == 1 else 1)
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
    """W's gather, gradient and optimiser step must not grow with the number of videos."""
    runs = {}
    for videos in (1_000, 145_112):
        W = torch.nn.Parameter(torch.rand(videos, 512, device=DEVICE))
        optimizer = torch.optim.SparseAdam([W], 2e-4, (0.0, 0.999))
        index = torch.arange(6, device=DEVICE) * 100

        def run(W=W, optimizer=optimizer, index=index):
            optimizer.zero_grad()
            F.embedding(index, W, sparse=True).sum().backward()
            optimizer.step()
        runs[videos] = lambda run=run: [run() for _ in range(100)]
    times = best(runs, 10)
    print("W: gather, gradient and step for 6 rows")
    for videos, seconds in times.items():
        row(f"{videos} videos", f"{seconds * 1e4:.0f} us",
            f"{videos * 512 * 4 * 3 / 1e6:.0f} MB with its optimiser")
    row("ratio", f"{times[145_112] / times[1_000]:.2f}")


def clip(path, frames, size=512):
    """A driver: the astronaut's head moving about, 25 fps."""
    image = Image.open(ROOT / "assets/astronaut.jpg").crop((90, 0, 370, 280))
    image = image.resize((size + 64, size + 64), Image.BICUBIC)
    image, k = np.asarray(image), np.arange(frames)
    dx, dy = (32 + 24 * np.sin(k / 17)).astype(int), (32 + 16 * np.sin(k / 11)).astype(int)
    encode.write_video(str(path), (image[b:b + size, a:a + size] for a, b in zip(dx, dy)), k, (1, 25))


def data_():
    """Preparing against decoding plus detection alone, and loading, on one core."""
    torch.set_num_threads(1)
    detect = faces.landmark_detector("dlib")
    with tempfile.TemporaryDirectory() as folder:
        clip(f"{folder}/a.mp4", 100, 224)
        alone = lambda: [detect(decode.to_rgb(f)) for f in decode.read_video(f"{folder}/a.mp4")]
        folders._detect = detect
        whole = lambda: folders._prepare([Path(f"{folder}/a.mp4")], f"{folder}/p/a.pt", 256, 0)
        times = best({"alone": alone, "whole": whole}, 3)
        print("data, one core")
        row("decoding and detection alone, 224 pixels", f"{100 / times['alone']:.0f} frames/s")
        row("data.py", f"{100 / times['whole']:.0f} frames/s", f"{times['alone'] / times['whole']:.2f} of it")
        rates = []
        for workers in (1, 2):
            seconds = []
            for clips in (8, 40):   # the difference leaves out what starting the processes takes
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
            rates.append(3200 / (seconds[1] - seconds[0]))
        row("the whole command, its start left out, 1 and 2 workers",
            *(f"{r:.0f} frames/s" for r in rates), f"ratio {rates[1] / rates[0]:.2f}")
        episodes = data.Episodes(data.PreparedVideos(f"{folder}/p"), 8, 6)
        seconds = best({"load": lambda: [episodes[n] for n in range(10)]})["load"]
        row("loading (decode, draw, stack), 256 pixels", f"{90 / seconds:.0f} frames/s")
    torch.set_num_threads(os.cpu_count())


def infer():
    """infer.py against the sum of its parts; memory against the driver's length; the bundled checkpoint."""
    state = stage2.load_checkpoint(stage2.CHECKPOINT, DEVICE)
    config = state["config"]
    detect, S = faces.landmark_detector("dlib"), config.image_size
    with tempfile.TemporaryDirectory() as folder:
        clip(f"{folder}/short.mp4", 150), clip(f"{folder}/long.mp4", 1500)
        parts = stage2.load_parts([ROOT / "assets/astronaut.jpg"], config, detect)
        G, psi, source = stage2.learn_person(state, parts, None, 0, DEVICE)
        stage2.save_person(f"{folder}/p.pt", config, G, psi, source)
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
        parts = sum(times.values()) - times["whole"]
        row("whole / sum of parts", f"{times['whole'] / parts:.2f}")
        measure = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
                   "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss; "
                   "open(sys.argv[-1] + '.peak', 'w').write(str(peak))")
        peaks = []
        for name in ("short", "long"):
            subprocess.run([sys.executable, "-c", measure, *command, f"{folder}/{name}.mp4"], **quiet)
            peaks.append(int(Path(f"{folder}/{name}.mp4.peak").read_text()))
        row("peak memory, 6 s and 60 s", *(f"{p / 1e3:.0f} MB" for p in peaks),
            f"ratio {peaks[1] / peaks[0]:.3f}")


def finetune():
    """T = 8, 40 epochs, against its parts, by the toy checkpoint; on one photo, as infer.py does it."""
    x, y = (data.to_float(t, DEVICE) for t in data.to_tensors(*ToyHeads(1, 64).load(0, lambda n: range(8))))
    state = stage2.load_checkpoint(ROOT / "weights/toy.pt", DEVICE)
    content = ContentLoss("l1").to(DEVICE)
    nets = stage2.load_networks(state)
    few = lambda epochs: stage2.finetune(*nets, x, y, state["config"], content, epochs)
    times = best({"40 epochs": lambda: few(40), "1 epoch": lambda: few(1),
                  "2 epochs": lambda: few(2), "embedding": lambda: few(0)}, 3)
    print("fine-tuning, T = 8, 64 pixels")
    for name, seconds in times.items():
        row(name, f"{seconds:.2f} s")
    state = stage2.load_checkpoint(stage2.CHECKPOINT, DEVICE)
    config, detect = state["config"], faces.landmark_detector("dlib")
    parts = stage2.load_parts([ROOT / "assets/astronaut.jpg"], config, detect)
    content = ContentLoss(config.content, face=FACE_WEIGHT).to(DEVICE)
    learn = lambda: stage2.learn_person(state, parts, content, 40, DEVICE)
    row(f"one photo, {config.image_size} pixels", f"{best({'learn': learn}, 1)['learn']:.1f} s")
    print("fine-tuning at the paper's size, 256 pixels, VGG19 and VGGFace: one epoch, and 40 times that")
    cfg, content = Config(), random_vgg()
    nets = [net(cfg).to(DEVICE) for net in (Embedder, Generator, Discriminator)]
    for T in (1, 8, 32):
        x, y = torch.rand(2, T, 3, 256, 256, device=DEVICE) * 2 - 1
        seconds = best({"epoch": lambda: stage2.finetune(*nets, x, y, cfg, content, 1)}, 1)["epoch"]
        row(f"T = {T}", f"{seconds:.1f} s", f"{40 * seconds:.0f} s")


if __name__ == "__main__":
    cpu = f"CPU, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if DEVICE.type == "cuda" else cpu
    print(f"{machine}, torch {torch.__version__}")
    stages = {"generator": generator, "step": step, "w": w, "data": data_,
              "infer": infer, "finetune": finetune}
    for name in sys.argv[1:] or stages:
        stages[name]()
