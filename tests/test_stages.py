"""Each stage as a user runs it, with tiny networks."""
import csv
import importlib
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image

import infer
import meta_train
from beyond import likeness
from beyond.likeness import other_poses
from beyond.portrait import LUMINANCE
from beyond.recognition import FaceTerm
from beyond.toy import ToyHeads
from conftest import (PHOTO, ROOT, TINY_FLAGS, TRACK, fail, here, networks, pictures, same, script, succeed,
                      tensors)
from data import to_float, to_tensors
from finetune import embed, finetune, learn_person
from losses import ContentLoss
from media.decode import read_video, to_rgb
from media.folders import Photo, faces_in
from media.tracking import load_track, save_track
from runtime.checkpoint import load_checkpoint, load_person


# ------------------------------------------------------------------------------------------ meta-learning

def test_meta_training_writes_what_it_promises(tmp_path):
    said = succeed("meta_train.py", *TINY_FLAGS, "--steps", "4", "--save-every", "2", "--out", "run",
                   cwd=tmp_path, start=script)
    assert {f.name for f in (tmp_path / "run").iterdir()} == {
        "log.csv", "samples-2.png", "samples-4.png",
        *(f"step-{n}{end}" for n in (2, 4) for end in (".pt", ".rank-0.state"))}
    rows = list(csv.DictReader(open(tmp_path / "run/log.csv")))
    assert [r["step"] for r in rows] == ["2", "4"]
    assert {"cnt", "adv", "fm", "mch", "dsc", "|e|", "|W|"} <= rows[0].keys()
    assert all(float(v) == float(v) for r in rows for v in r.values())
    lines = said.splitlines()
    assert len({len(line) for line in lines}) == 1 and "ETA" in lines[0]        # the columns are aligned
    state = load_checkpoint(tmp_path / "run/step-4.pt")
    config = state["config"]
    assert (config.landmarks, config.content, config.num_videos) == ("dlib", "l1", 1000)
    assert (state["run"]["K"], state["run"]["batch"], state["run"]["match_weight"]) == (2, 2, 10.0)
    again = succeed("meta_train.py", *TINY_FLAGS, "--steps", "4", "--out", "run", "--resume",
                    cwd=tmp_path)
    assert "is finished" in again


def test_only_the_last_two_checkpoints_stay_and_only_the_same_run_resumes(tmp_path):
    flags = ["meta_train.py", *TINY_FLAGS, "--out", "run"]
    succeed(*flags, "--steps", 3, "--save-every", 1, cwd=tmp_path)
    left = sorted(f.name for f in tmp_path.glob("run/step-*"))
    assert left == ["step-2.pt", "step-2.rank-0.state", "step-3.pt", "step-3.rank-0.state"]
    assert "add --resume" in fail(*flags, "--steps", 4, cwd=tmp_path)
    assert "seed was 0, now 7" in fail(*flags, "--steps", 4, "--resume", "--seed", 7, cwd=tmp_path)
    assert "K was 2, now 3" in fail(*flags, "--steps", 4, "--resume", "--K", 3, cwd=tmp_path)


def test_training_learns_on_toy_heads(tmp_path):
    succeed("meta_train.py", *TINY_FLAGS, "--steps", 30, "--save-every", 10, "--lr", 4e-3,
            "--batch", 4, "--out", "run", cwd=tmp_path)
    rows = list(csv.DictReader(open(tmp_path / "run/log.csv")))
    assert float(rows[-1]["cnt"]) < 0.9 * float(rows[0]["cnt"])


# -------------------------------------------------------------------------------------------- fine-tuning

def person(T):
    frames, points = ToyHeads(1, 64, first=5).load(0, range(T))
    return tuple(map(to_float, to_tensors(frames, points)))


@pytest.mark.parametrize("T", [1, 8, 9])
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
        # eq. 7; psi' = P e_NEW; w' = w0 + e_NEW
        psi_start, w_start = G.project(e_new[None])[0], D.w0 + e_new
    assert torch.allclose(embed(E, x, y), e_new, atol=1e-5)
    psi0, w0, history = finetune(E, G, D, x, y, cfg, None, epochs=0)
    assert torch.allclose(psi0, psi_start, atol=1e-5) and torch.allclose(w0, w_start, atol=1e-5)
    assert history == []
    psi, w, history = finetune(E, G, D, x, y, cfg, ContentLoss("l1"), epochs=3)
    assert len(history) == 3 * -(-T // 8) and history[-1].keys() == {"cnt", "adv", "fm", "dsc"}
    assert (psi != psi_start).all() and (w != w_start).any()
    assert not torch.equal(V, D.V.blocks[0].conv1.weight)
    assert same(before, E.state_dict()) and same(P, G.P.state_dict())


def test_fine_tuning_learns_to_be_known_in_other_poses(monkeypatch):
    """The loss in the mouth is left out, because it is 0 at first and can only grow.

    With the weight of 20 that fine-tuning has, this would take more epochs.
    """
    monkeypatch.setattr(likeness, "MOUTH_WEIGHT", 0.0)
    monkeypatch.setattr(likeness, "LIKENESS_WEIGHT", 100.0)
    cfg, E, G, D = networks(finetune_lr=2e-3, finetune_lr_d=2e-3)
    x, y = person(1)
    content, points = ContentLoss("l1", extra=FaceTerm()), ToyHeads(1, 64, first=5).load(0, [0])[1]
    with torch.no_grad():
        psi_hat = G.project(embed(E, x, y)[None])[0]
    others = other_poses(x, [points], content, networks()[2], psi_hat)
    history = finetune(E, G, D, x, y, cfg, content, epochs=50, others=others)[2]
    like = [losses["others"] for losses in history]
    assert np.mean(like[-5:]) < 0.8 * np.mean(like[:5])


def test_fine_tuning_fits_the_person():
    cfg, E, G, D = networks(finetune_lr=2e-3, finetune_lr_d=2e-3)
    history = finetune(E, G, D, *person(1), cfg, ContentLoss("l1"))[2]
    assert len(history) == 40                                                   # A.1: 40 epochs
    assert history[-1]["cnt"] < 0.7 * history[0]["cnt"]


def test_the_switches_of_the_ablations(tmp_path, checkpoint):
    """A.2: without L'_ADV, D's features do not matter any more. Random starts change psi' or w'.

    An FF checkpoint may start from a random w'.
    """
    def run(*flags, ckpt=checkpoint):
        succeed("finetune.py", "--photos", PHOTO, "--checkpoint", ckpt, "--epochs", 2,
                "--out", "p.pt", *flags, cwd=tmp_path)
        return tensors(tmp_path / "p.pt")
    state = torch.load(checkpoint, weights_only=True)
    other = {"w0": state["w0"] * 0, "V.blocks.0.conv1.bias": state["V.blocks.0.conv1.bias"] + 1}
    torch.save(state | other, tmp_path / "other-D.pt")
    plain, no_adversarial = run(), run("--no-adversarial")
    assert not same(plain, run(ckpt=tmp_path / "other-D.pt"))
    assert same(no_adversarial, run("--no-adversarial", ckpt=tmp_path / "other-D.pt"))
    starts = [plain, *(run("--random", what) for what in ("e", "psi", "w"))]
    assert len({tuple(start["psi"].tolist()) for start in starts}) == 4
    torch.save(state | {"config": state["config"] | {"match": False}}, tmp_path / "ff.pt")
    run("--random", "w", ckpt=tmp_path / "ff.pt")
    said = fail("finetune.py", "--photos", PHOTO, "--checkpoint", "ff.pt", "--random", "e",
                cwd=tmp_path)
    assert "without the match loss" in said


def test_finetune_and_infer_as_a_user_runs_them(tmp_path, checkpoint, clip):
    untouched = checkpoint.read_bytes()
    succeed("finetune.py", "--photos", PHOTO, clip, "--checkpoint", checkpoint, "--epochs", "2",
            "--out", "p.pt", cwd=tmp_path)
    assert checkpoint.read_bytes() == untouched
    G, psi = load_person(load_checkpoint(tmp_path / "p.pt", kind="person"))
    assert psi.shape == (sum(G.psi_sizes),) and not any(k.startswith("P.") for k in G.state_dict())
    said = succeed("infer.py", "--person", "p.pt", "--driver", clip, "--compare",
                   "--save-track", "t.npz", cwd=tmp_path)
    assert "no face in 2 of 20 frames" in said and "20 frames" in said
    assert "driver and photo show the same person" in said
    with av.open(str(tmp_path / "result.mp4")) as result, av.open(str(clip)) as driver:
        stamps = [[float(f.pts * f.time_base) for f in c.decode(video=0)] for c in (result, driver)]
        assert stamps[0] == pytest.approx(stamps[1], abs=1e-6)                  # the frame rate varies
        result.seek(0), driver.seek(0)
        sound = [[bytes(p) for p in c.demux(audio=0) if p.size] for c in (result, driver)]
        assert sound[0] == sound[1] and result.streams.video[0].width == 3 * 64
    assert len(load_track(tmp_path / "t.npz").pts) == 20

    succeed("infer.py", "--person", "p.pt", "--driver", "t.npz", "--compare", "--motion", "absolute",
            "--out", "again.mp4", cwd=tmp_path)
    a, b = ([to_rgb(f) for f in read_video(tmp_path / name)] for name in ("result.mp4", "again.mp4"))
    assert np.array_equal(a, b)         # a track gives the same result as its video
    assert not [f for f in tmp_path.iterdir() if "tmp" in f.name]


def test_infer_from_a_photo_is_finetune_then_infer(tmp_path, checkpoint, clip, monkeypatch):
    assert infer.EPOCHS == 40           # the default of finetune.py, which is tested above
    monkeypatch.setattr(infer, "EPOCHS", 4)
    lips, adapt = [], infer.adapt
    monkeypatch.setattr(infer, "adapt", lambda *args: lips.append(args[5]) or adapt(*args))
    succeed("infer.py", "--photo", PHOTO, "--driver", clip, "--checkpoint", checkpoint,
            "--save-person", "a.pt", cwd=tmp_path)
    succeed("finetune.py", "--photos", PHOTO, "--checkpoint", checkpoint, "--epochs", "4",
            "--out", "b.pt", cwd=tmp_path)
    succeed("infer.py", "--photo", PHOTO, "--driver", clip, "--checkpoint", checkpoint,
            "--save-person", "ff.pt", "--feed-forward", "--out", "ff.mp4", cwd=tmp_path)
    a, b, ff = (tensors(tmp_path / name) for name in ("a.pt", "b.pt", "ff.pt"))
    assert same(a, b) and not torch.equal(a["psi"], ff["psi"])
    assert lips == [1.25, 1.25]         # as the checkpoint says


def test_ctrl_c_says_how_the_next_run_can_start(tmp_path, checkpoint, clip, monkeypatch):
    def stopped(*_):
        yield np.zeros((64, 64, 3), np.uint8)
        raise KeyboardInterrupt
    monkeypatch.setattr(infer, "render", stopped)

    def said(*args):
        result = here("infer.py", *args, cwd=tmp_path)
        assert result.returncode == 130 and not list(tmp_path.glob("result*"))
        return result.stderr.splitlines()[-1]
    photo = ["--photo", PHOTO, "--checkpoint", checkpoint, "--feed-forward", "--driver", clip]
    lost = "--save-person FILE and --save-track FILE"
    assert said(*photo) == f"stopped: next time, add {lost} so that a stopped run keeps its work"
    kept = ("stopped: to continue from here, start the next run with --person p.pt --driver t.npz (an .npz "
            "has no sound)")
    assert said(*photo, "--save-person", "p.pt", "--save-track", "t.npz") == kept
    assert said("--person", "p.pt", "--driver", "t.npz") == "stopped"           # all of it was saved before


@pytest.mark.parametrize("epochs", [0, 2])
def test_a_grey_photo_makes_a_grey_person(checkpoint, detect, epochs):
    state, content = load_checkpoint(checkpoint), ContentLoss("l1")
    shot, = faces_in(PHOTO, detect, 64)
    grey = np.asarray(Image.fromarray(shot.image).convert("L").convert("RGB"))
    noisy = grey + np.random.default_rng(0).integers(0, 3, grey.shape, np.uint8)       # as in a JPEG
    photo = lambda image: Photo(image[None], shot.points[None])

    def drawn(*images, **options):
        photos = [photo(image) for image in images]
        G, psi, _ = learn_person(state, photos, content, epochs, "cpu", progress=False, **options)
        return np.stack(list(infer.render(G, psi, shot.points[None], 64, progress=False))).astype(float)
    result, colours = drawn(grey, noisy), drawn(grey, noisy, as_paper=True)
    assert np.ptp(result, axis=3).max() == 0 and result.std() > 1
    for other in (colours, drawn(grey, shot.image)):
        assert np.ptp(other, axis=3).mean() > 1
    if not epochs:      # the picture is as bright as the coloured one
        assert np.abs(result[..., 0] - colours @ LUMINANCE).mean() < 8


@pytest.mark.parametrize("how", [[], ["--feed-forward"]])
def test_the_bundled_checkpoint_and_track_work(how, tmp_path, monkeypatch):
    monkeypatch.setattr(infer, "EPOCHS", 3)     # of 40
    track = load_track(TRACK)
    first = {name: getattr(track, name)[:60] for name in ("points", "found", "cuts", "pts")}
    save_track(tmp_path / "t.npz", track._replace(**first))
    succeed("infer.py", "--photo", PHOTO, "--driver", "t.npz", *how, cwd=tmp_path)
    means = np.array([to_rgb(frame).mean() for frame in read_video(tmp_path / "result.mp4")])
    assert len(means) == 60 and len(track.pts) == 200
    assert 40 < means.mean() < 200
    assert abs(np.diff(means)).max() < 4        # no frame is suddenly darker or brighter


# --------------------------------------------------------------------------------------------------- on a GPU

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_stage_on_a_gpu(tmp_path, monkeypatch):
    """Training, resumed; fine-tuning; rendering with and without it; scores.

    With CUDA, as the scripts choose it.
    """
    monkeypatch.chdir(tmp_path)

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        importlib.import_module(name).main()
    monkeypatch.setitem(meta_train.TOY, "ema", 0.9)
    for steps in (1, 2):
        call("meta_train", *TINY_FLAGS, "--steps", steps, "--out", "run", "--resume")
    common, track = ("--checkpoint", "run/step-2.pt"), ROOT / "assets/speech.npz"
    call("finetune", "--photos", PHOTO, *common, "--epochs", 2, "--out", "p.pt")
    call("infer", "--person", "p.pt", "--driver", track)
    call("infer", "--photo", PHOTO, "--driver", track, *common, "--feed-forward", "--out", "ff.mp4")
    call("evaluate", "--toy", *common, "--videos", 1, "--shots", 1, "--holdout", 2)
    for name in ("result.mp4", "ff.mp4", "runs/eval/table.md", "p.pt"):
        assert (tmp_path / name).stat().st_size > 100
    cfg, E, G, D = networks()
    y, e = pictures(2), torch.rand(2, 16) * 5
    with torch.no_grad():
        on_cpu, on_gpu = G.eval()(y, e), G.cuda()(y.cuda(), e.cuda()).cpu()
    assert (on_cpu - on_gpu).abs().max() < 0.05                                 # TF32
