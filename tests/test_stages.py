"""Each stage as a user runs it, with tiny networks; and what must not go wrong on the way."""
import csv
import os
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import finetune as stage2
import meta_train
from conftest import PHOTO, ROOT, TINY_FLAGS, fail, networks, same, script, succeed, tensors, torchrun
from data import ToyHeads, read_video, to_float, to_rgb, to_tensors
from finetune import embed, finetune
from infer import load_track
from losses import ContentLoss
from model import UserError, load_checkpoint, load_person, save_checkpoint


def train(monkeypatch, out, *flags):
    """meta_train.py in this process: quicker than a subprocess, the same main()."""
    monkeypatch.setattr(sys, "argv", ["meta_train.py", *TINY_FLAGS, "--out", str(out), *map(str, flags)])
    meta_train.main()


# ------------------------------------------------------------------------------------------ meta-learning

def test_a_grown_network_sees_what_the_small_one_saw(tmp_path):
    """From 64 to 128 pixels: E, V and G's encoder start as they were, on the halved pictures."""
    cfg, *small = networks(64, min_channels=16, max_channels=32)
    _, *large = networks(128, min_channels=8, max_channels=32)
    with torch.no_grad():
        small[1].P.bias.uniform_(-1, 1)
    path = str(tmp_path / "small.pt")
    save_checkpoint(path, "meta", cfg, E=small[0], G=small[1], V=small[2].V, w0=small[2].w0, b=small[2].b)
    meta_train.grow(*large, path, 128)
    frames, points = ToyHeads(4, 64).load(0, lambda count: range(4))
    x, y = (to_float(part) for part in to_tensors(frames, points))              # (4, 3, 64, 64)
    X, Y = (F.interpolate(part, scale_factor=2.0) for part in (x, y))           # which averages to x and y again
    e, v, psi = small[0].eval()(x, y), small[2].eval().V(x, y)[0], small[1].eval().project(torch.ones(1, 32))
    assert torch.allclose(large[1].eval().project(torch.ones(1, 32))[:, :psi.shape[1]], psi, atol=1e-3)
    for old, new in ((e, large[0].eval()(X, Y)), (v, large[2].eval().V(X, Y)[0])):
        assert (old - new).norm() < 0.1 * old.norm()                            # not equal: the borders are padded otherwise
    meta_train.grow(*networks(64, min_channels=16, max_channels=32)[1:], path, 64)
    with pytest.raises(UserError, match="half of it is needed"):
        meta_train.grow(*networks(256)[1:], path, 256)


def test_grow_from_as_a_user_runs_it(tmp_path, monkeypatch):
    train(monkeypatch, tmp_path / "small", "--steps", 1, "--min-channels", 16)
    train(monkeypatch, tmp_path / "large", "--steps", 1, "--image-size", 128, "--grow-from", tmp_path / "small/step-1.pt")
    a, b = tensors(tmp_path / "small/step-1.pt"), tensors(tmp_path / "large/step-1.pt")
    key = "G.bottleneck.0.conv1.parametrizations.weight.original"
    assert (a[key] - b[key]).abs().max() < 1e-3                                 # one step of Adam further


def test_meta_training_writes_what_it_promises(tmp_path):
    said = succeed("meta_train.py", *TINY_FLAGS, "--steps", "4", "--save-every", "2", "--out", "run", cwd=tmp_path)
    assert {f.name for f in (tmp_path / "run").iterdir()} == {
        "log.csv", "samples-2.png", "samples-4.png", *(f"step-{n}{end}" for n in (2, 4) for end in (".pt", ".rank-0.state"))}
    rows = list(csv.DictReader(open(tmp_path / "run/log.csv")))
    assert [r["step"] for r in rows] == ["2", "4"] and {"cnt", "adv", "fm", "mch", "dsc", "|e|", "|W|"} <= rows[0].keys()
    assert all(float(v) == float(v) for r in rows for v in r.values())
    lines = said.splitlines()
    assert len({len(line) for line in lines}) == 1 and "ETA" in lines[0]        # aligned
    config = load_checkpoint(tmp_path / "run/step-4.pt")["config"]
    assert (config.landmarks, config.content, config.num_videos, config.K) == ("dlib", "l1", 1000, 2)
    assert "is finished" in succeed("meta_train.py", *TINY_FLAGS, "--steps", "4", "--out", "run", "--resume", cwd=tmp_path)


def test_only_the_last_two_checkpoints_stay(tmp_path, monkeypatch):
    train(monkeypatch, tmp_path, "--steps", 3, "--save-every", 1)
    assert sorted(f.name for f in tmp_path.glob("step-*")) == ["step-2.pt", "step-2.rank-0.state", "step-3.pt", "step-3.rank-0.state"]


def test_each_update_moves_its_own_networks_only(tmp_path, monkeypatch):
    """With a learning rate of next to nothing one side must stand still while the other moves."""
    def parameters(name, *flags):
        train(monkeypatch, tmp_path / name, "--steps", 1, *flags)
        portable, state = tensors(tmp_path / name / "step-1.pt"), torch.load(tmp_path / name / "step-1.rank-0.state", weights_only=True)
        keep = lambda d: {k: v for k, v in d.items() if not k.endswith(("._u", "._v"))}  # spectral norm's buffers
        return keep({k: v for k, v in portable.items() if k[:2] in ("E.", "G.")}), keep(state["D"])
    still = lambda a, b: all(torch.allclose(a[k], b[k], rtol=0, atol=1e-12) for k in a)
    start, start_D = parameters("none", "--lr", 1e-30, "--lr-d", 1e-30)
    EG, D = parameters("EG", "--lr", 1e-3, "--lr-d", 1e-30)
    assert still(D, start_D) and not any(torch.equal(EG[k], start[k]) for k in EG if k.endswith("original") and "attention" not in k)
    EG, D = parameters("D", "--lr", 1e-30, "--lr-d", 1e-3)
    assert still(EG, start) and not torch.equal(D["w0"], start_D["w0"])
    assert 1 <= (D["W"] != start_D["W"]).any(1).sum() <= 2                      # only the rows of the batch, W by D alone


def test_the_match_loss_takes_part_unless_told_otherwise(tmp_path, monkeypatch):
    train(monkeypatch, tmp_path / "FT", "--steps", 1)
    train(monkeypatch, tmp_path / "FF", "--steps", 1, "--no-match")
    FT, FF = (load_checkpoint(tmp_path / run / "step-1.pt") for run in ("FT", "FF"))
    assert FT["config"].match and not FF["config"].match
    E = [k for k in FT if k.startswith("E.") and k.endswith("original")]
    assert not all(torch.equal(FT[k], FF[k]) for k in E)                        # the same seed and data: L_MCH is the difference


def test_killed_and_resumed_equals_never_stopped(tmp_path):
    flags = ["meta_train.py", *TINY_FLAGS, "--ema", "0.9", "--steps", "40", "--save-every", "5"]
    succeed(*flags, "--out", "whole", cwd=tmp_path)
    process = subprocess.Popen([sys.executable, str(ROOT / flags[0]), *flags[1:], "--out", "cut"], cwd=tmp_path,
                               stdout=subprocess.DEVNULL, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    while not (tmp_path / "cut/step-10.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut/step-40.pt").exists()
    assert "add --resume" in fail(*flags, "--out", "cut", cwd=tmp_path)
    assert "seed was 0, now 7" in fail(*flags, "--out", "cut", "--resume", "--seed", "7", cwd=tmp_path)
    assert "K was 2, now 3" in fail(*flags, "--out", "cut", "--resume", "--K", "3", cwd=tmp_path)
    succeed(*flags, "--out", "cut", "--resume", cwd=tmp_path)
    assert same(tensors(tmp_path / "whole/step-40.pt"), tensors(tmp_path / "cut/step-40.pt"))
    losses = [[row[:8] for row in csv.reader(open(tmp_path / run / "log.csv"))] for run in ("whole", "cut")]
    assert losses[0] == losses[1]


def test_two_ranks_resume_exactly_and_part_only_in_d(tmp_path):
    for out, stops in (("run", [3]), ("cut", [2, 3])):
        for steps in stops:
            result = torchrun(ROOT / "meta_train.py", *TINY_FLAGS, "--steps", steps, "--out", out, "--resume", cwd=tmp_path)
            assert result.returncode == 0, result.stderr
    assert same(tensors(tmp_path / "run/step-3.pt"), tensors(tmp_path / "cut/step-3.pt"))
    states = [torch.load(tmp_path / f"run/step-3.rank-{r}.state", weights_only=True) for r in (0, 1)]
    a, b = (s["optimizers"][0]["state"] for s in states)
    assert all(torch.equal(a[k]["exp_avg_sq"], b[k]["exp_avg_sq"]) for k in a)  # equal gradients, so equal E and G
    assert not torch.equal(states[0]["D"]["w0"], states[1]["D"]["w0"])
    assert states[0]["D"]["W"].shape[0] == states[1]["D"]["W"].shape[0] == 500  # each owns its rows
    portable = tensors(tmp_path / "run/step-3.pt")
    assert torch.equal(portable["w0"], states[0]["D"]["w0"]) and "W" not in portable

    line = fail("meta_train.py", *TINY_FLAGS, "--steps", "5", "--out", "run", "--resume", cwd=tmp_path)
    assert "ranks was 2, now 1" in line                                                 # the same number of ranks only


def test_ranks_reduce_e_and_g(tmp_path):
    """E and G of two ranks, compared as tensors: rank 1 writes its own."""
    program = f"""
import sys, os, torch
sys.path.insert(0, {str(ROOT)!r}); sys.argv = ["meta_train.py"] + {TINY_FLAGS!r} + ["--steps", "3", "--out", "run"]
import meta_train
keep = meta_train.save
def save(out, step, config, nets, averages, D, *rest):
    torch.save([net.state_dict() for net in (*nets, D)], f"rank-{{os.environ['RANK']}}")
    keep(out, step, config, nets, averages, D, *rest)
meta_train.save = save
meta_train.main()
"""
    (tmp_path / "program.py").write_text(program)
    result = torchrun("program.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (E0, G0, D0), (E1, G1, D1) = (torch.load(tmp_path / f"rank-{r}", weights_only=True) for r in (0, 1))
    assert same(E0, E1) and same(G0, G1)
    assert not torch.equal(D0["V.blocks.0.conv1.parametrizations.weight.original"], D1["V.blocks.0.conv1.parametrizations.weight.original"])


def test_training_learns_on_toy_heads(tmp_path, monkeypatch):
    train(monkeypatch, tmp_path, "--steps", 80, "--save-every", 10, "--lr", 2e-3, "--batch", 4)
    rows = list(csv.DictReader(open(tmp_path / "log.csv")))
    assert float(rows[-1]["cnt"]) < 0.9 * float(rows[0]["cnt"])


# -------------------------------------------------------------------------------------------- fine-tuning

def person(T):
    frames, points = ToyHeads(1, 64, first=5).load(0, lambda n: range(T))
    return tuple(map(to_float, to_tensors(frames, points)))


@pytest.mark.parametrize("T", [1, 9])
def test_fine_tuning_moves_psi_and_w_and_leaves_e(T):
    cfg, E, G, D = networks()
    for net in (E, G, D):
        net.eval()
    x, y = person(T)
    before = {k: v.clone() for k, v in E.state_dict().items()}
    P = {k: v.clone() for k, v in G.P.state_dict().items()}
    V = D.V.blocks[0].conv1.weight.detach().clone()
    with torch.no_grad():
        e_new = torch.stack([E(x[t:t + 1], y[t:t + 1])[0] for t in range(T)]).mean(0)
        psi_start, w_start = G.project(e_new[None])[0], D.w0 + e_new            # eq. 7; psi' = P e_NEW; w' = w0 + e_NEW
    assert torch.allclose(embed(E, x, y), e_new, atol=1e-5)
    psi0, w0, history = finetune(E, G, D, x, y, cfg, None, epochs=0)
    assert torch.allclose(psi0, psi_start, atol=1e-5) and torch.allclose(w0, w_start, atol=1e-5) and history == []
    psi, w, history = finetune(E, G, D, x, y, cfg, ContentLoss("l1"), epochs=3)
    assert len(history) == 3 * -(-T // 8) and history[-1].keys() == {"cnt", "adv", "fm", "dsc"}
    assert (psi != psi_start).all() and (w != w_start).any()
    assert not torch.equal(V, D.V.blocks[0].conv1.weight)
    assert same(before, E.state_dict()) and same(P, G.P.state_dict())


def test_fine_tuning_fits_the_person():
    cfg, E, G, D = networks(lr=1e-3, lr_d=1e-3)
    x, y = person(8)
    history = finetune(E, G, D, x, y, cfg, ContentLoss("l1"), epochs=40)[2]
    assert history[-1]["cnt"] < 0.7 * history[0]["cnt"]


def test_the_switches_of_the_ablations(tmp_path, checkpoint, monkeypatch):
    """A.2: without L'_ADV D's features no longer matter; random starts change psi' or w'; an FF checkpoint may start from a random w'."""
    def run(*flags, ckpt=checkpoint):
        command = ["finetune.py", "--photos", PHOTO, "--checkpoint", ckpt, "--epochs", "3", "--out", tmp_path / "p.pt", *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        stage2.main()   # in this process: quicker than eight of them
        return tensors(tmp_path / "p.pt")
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"w0": state["w0"] * 0, "V.blocks.0.conv1.bias": state["V.blocks.0.conv1.bias"] + 1}, tmp_path / "other-D.pt")
    plain, no_adversarial = run(), run("--no-adversarial")
    assert not same(plain, run(ckpt=tmp_path / "other-D.pt")) and same(no_adversarial, run("--no-adversarial", ckpt=tmp_path / "other-D.pt"))
    assert len({tuple(run("--random", what)["psi"].tolist()) for what in ("e", "psi", "w")} | {tuple(plain["psi"].tolist())}) == 4
    torch.save(state | {"config": state["config"] | {"match": False}}, tmp_path / "ff.pt")
    run("--random", "w", ckpt=tmp_path / "ff.pt")
    assert "without the match loss" in fail("finetune.py", "--photos", PHOTO, "--checkpoint", "ff.pt", "--random", "e", cwd=tmp_path)


def test_finetune_and_infer_as_a_user_runs_them(tmp_path, checkpoint, clip):
    untouched = checkpoint.read_bytes()
    succeed("finetune.py", "--photos", PHOTO, clip, "--checkpoint", checkpoint, "--epochs", "2", "--out", "p.pt", cwd=tmp_path)
    assert checkpoint.read_bytes() == untouched
    G, psi = load_person(load_checkpoint(tmp_path / "p.pt", kind="person"))
    assert psi.shape == (sum(G.psi_sizes),) and not any(k.startswith("P.") for k in G.state_dict())
    said = succeed("infer.py", "--person", "p.pt", "--driver", clip, "--compare", "--save-track", "t.npz", cwd=tmp_path)
    assert "no face in 2 of 20 frames" in said and "20 frames" in said
    with av.open(str(tmp_path / "result.mp4")) as result, av.open(str(clip)) as driver:
        stamps = [[float(f.pts * f.time_base) for f in c.decode(video=0)] for c in (result, driver)]
        assert stamps[0] == pytest.approx(stamps[1], abs=1e-6)                  # variable frame rate included
        result.seek(0), driver.seek(0)
        sound = [[bytes(p) for p in c.demux(audio=0) if p.size] for c in (result, driver)]
        assert sound[0] == sound[1] and result.streams.video[0].width == 3 * 64
    assert len(load_track(tmp_path / "t.npz").pts) == 20

    succeed("infer.py", "--person", "p.pt", "--driver", "t.npz", "--compare", "--out", "again.mp4", cwd=tmp_path)
    a, b = ([to_rgb(f) for f in read_video(tmp_path / name)] for name in ("result.mp4", "again.mp4"))
    assert np.array_equal(a, b)                                                 # a track drives as its video does
    assert not [f for f in tmp_path.iterdir() if "tmp" in f.name]


def test_infer_from_a_photo_is_finetune_then_infer(tmp_path, checkpoint, clip):
    succeed("infer.py", "--photo", PHOTO, "--driver", clip, "--checkpoint", checkpoint, "--save-person", "a.pt", cwd=tmp_path)
    succeed("finetune.py", "--photos", PHOTO, "--checkpoint", checkpoint, "--out", "b.pt", cwd=tmp_path)
    succeed("infer.py", "--photo", PHOTO, "--driver", clip, "--checkpoint", checkpoint, "--save-person", "ff.pt", "--feed-forward",
            "--out", "ff.mp4", cwd=tmp_path)
    a, b, ff = (tensors(tmp_path / name) for name in ("a.pt", "b.pt", "ff.pt"))
    assert same(a, b) and not torch.equal(a["psi"], ff["psi"])


# -------------------------------------------------------------------------------------------- wrong input

@pytest.fixture(scope="module")
def wrong(tmp_path_factory, checkpoint, clip):
    """A folder with one of everything that users get wrong."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "text.jpg").write_text("no picture")
    (folder / "text.mp4").write_text("no video")
    (folder / "cut.mp4").write_bytes(clip.read_bytes()[:3000])                  # its index was at the end
    from PIL import Image
    Image.new("RGB", (300, 300)).save(folder / "dark.png")
    Image.open(PHOTO).save(folder / "copy.png")
    from conftest import write_clip
    write_clip(folder / "dark.mp4", [np.zeros((64, 64, 3), np.uint8)] * 4, np.arange(4) * 512)
    with av.open(str(folder / "sound.mp4"), "w") as out:
        audio = out.add_stream("aac", rate=16000, layout="mono")
        note = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), format="s16", layout="mono")
        note.rate = 16000
        out.mux(audio.encode(note)), out.mux(audio.encode())
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"format": 99}, folder / "format.pt")
    torch.save(state | {"config": state["config"] | {"max_channels": 32}}, folder / "config.pt")
    torch.save(state | {"config": state["config"] | {"match": False}}, folder / "ff.pt")
    torch.save(state | {"config": state["config"] | {"content": "vgg"}}, folder / "vgg.pt")
    torch.save({"weights": torch.zeros(3)}, folder / "foreign.pt")
    np.savez(folder / "foreign.npz", a=np.zeros(3))
    (folder / "full").mkdir()
    return folder


@pytest.mark.parametrize("change,words", [
    (dict(photo="none.jpg"), "no file none.jpg"),
    (dict(photo="text.jpg"), "text.jpg is not a picture"),
    (dict(photo="dark.png"), "no face found in dark.png"),
    (dict(driver="none.mp4"), "no file none.mp4"),
    (dict(driver="text.mp4"), "text.mp4 is not a video"),
    (dict(driver="cut.mp4"), "cut.mp4 is not a video"),
    (dict(driver="sound.mp4"), "sound.mp4 has no video in it"),
    (dict(driver="dark.mp4"), "no face found in any of the 4 frames of dark.mp4"),
    (dict(driver="foreign.npz"), "foreign.npz is not a landmark track"),
    (dict(checkpoint="none.pt"), "no file none.pt"),
    (dict(checkpoint="text.jpg"), "text.jpg is not a readable checkpoint"),
    (dict(checkpoint="foreign.pt"), "foreign.pt is not a checkpoint of this project"),
    (dict(checkpoint="format.pt"), "format 99; this code reads format 1"),
    (dict(checkpoint="config.pt"), "does not fit its own config"),
    (dict(checkpoint="ff.pt"), "without the match loss"),
    (dict(checkpoint="vgg.pt"), "put it into"),
    (dict(out="nowhere/result.mp4"), "no folder nowhere"),
    (dict(out="full"), "it is a folder"),
])
def test_infer_refuses_wrong_input_in_one_line(wrong, checkpoint, change, words):
    use = {"photo": PHOTO, "driver": ROOT / "assets" / "speech.npz", "checkpoint": checkpoint, "out": "result.mp4"} | change
    arguments = [part for k, v in use.items() for part in (f"--{k}", v)]
    if change == {"driver": "dark.mp4"}:                                        # the one that is found out frame by frame,
        result = script("infer.py", *arguments, cwd=wrong)                      # under a progress bar
        assert result.returncode == 2 and words in result.stderr.splitlines()[-1]
    elif "checkpoint" in change and "vgg" in change["checkpoint"]:              # torch hub announces its download
        result = script("infer.py", *arguments, cwd=wrong, TORCH_HOME=str(wrong))
        assert result.returncode == 2 and words in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    else:
        assert words in fail("infer.py", *arguments, cwd=wrong)
    assert not (wrong / "result.mp4").exists()


@pytest.mark.parametrize("arguments,words", [
    (["infer.py", "--person", "CHECKPOINT", "--driver", str(ROOT / "assets/speech.npz")], "is a meta file; a person file is needed"),
    (["finetune.py", "--photos", "dark.png", "--checkpoint", "CHECKPOINT"], "no face found in dark.png"),
    (["finetune.py", "--photos", str(PHOTO), "--epochs", "0"], "--epochs 0"),
    (["finetune.py", "--photos", str(PHOTO), "--checkpoint", "ff.pt"], "without the match loss"),
    (["infer.py", "--person", "CHECKPOINT", "--driver", "dark.mp4", "--feed-forward"], "leave out --feed-forward"),
    (["infer.py", "--photo", "copy.png", "--driver", "dark.mp4", "--out", "copy.png"], "it is also an input"),
    (["finetune.py", "--photos", str(PHOTO), "--checkpoint", "vgg.pt", "--out", "vgg.pt"], "it is also an input"),
    (["meta_train.py", "--data", "nowhere"], "--toy"),
    (["meta_train.py", "--data", "."], "not from data.py"),
    (["meta_train.py", "--toy", "--out", "text.jpg"], "cannot write to --out"),
    (["meta_train.py", "--toy", "--seed", "-1"], "--seed -1"),
    (["meta_train.py", "--toy", "--image-size", "100"], "image size 100"),
    (["meta_train.py", "--toy", "--batch", "0"], "--batch 0"),
    (["meta_train.py", "--toy", "--steps", "0"], "--steps 0"),
    (["meta_train.py", "--toy", "--epochs", "0"], "--epochs 0"),
    (["meta_train.py", "--toy", "--content", "vgg", "--vgg19", "none.mat"], "no file none.mat"),
])
def test_other_stages_refuse_wrong_input_in_one_line(wrong, checkpoint, arguments, words):
    assert words in fail(*(checkpoint if a == "CHECKPOINT" else a for a in arguments), cwd=wrong, TORCH_HOME=str(wrong))


def test_a_failed_run_leaves_the_last_result_alone(wrong, checkpoint, tmp_path):
    (tmp_path / "result.mp4").write_bytes(b"precious")
    assert script("infer.py", "--photo", PHOTO, "--driver", wrong / "dark.mp4", "--checkpoint", checkpoint, cwd=tmp_path).returncode == 2
    assert (tmp_path / "result.mp4").read_bytes() == b"precious"


@pytest.mark.parametrize("how", [(), ("--feed-forward",)])
def test_the_bundled_checkpoint_and_track_work(tmp_path, how):
    succeed("infer.py", "--photo", PHOTO, "--driver", ROOT / "assets/speech.npz", *how, cwd=tmp_path)
    means = np.array([to_rgb(frame).mean() for frame in read_video(tmp_path / "result.mp4")])
    assert len(means) == len(load_track(ROOT / "assets/speech.npz").pts)
    assert 40 < means.mean() < 200 and abs(np.diff(means)).max() < 4            # no frame dims or brightens at once
