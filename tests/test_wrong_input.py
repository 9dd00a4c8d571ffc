"""All stages refuse wrong input in one line with exit code 2, before the long work."""
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import PHOTO, ROOT, fail, here, script, write_clip


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, checkpoint, clip):
    """A folder with an example of every file that users get wrong."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "text.jpg").write_text("no picture")
    (folder / "text.mp4").write_text("no video")
    (folder / "cut.mp4").write_bytes(clip.read_bytes()[:3000])     # without the index, which is at the end
    Image.new("RGB", (300, 300)).save(folder / "dark.png")
    Image.open(PHOTO).save(folder / "copy.png")
    write_clip(folder / "dark.mp4", [np.zeros((64, 64, 3), np.uint8)] * 4, np.arange(4) * 512)
    with av.open(str(folder / "sound.mp4"), "w") as out:
        audio = out.add_stream("aac", rate=16000, layout="mono")
        note = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), format="s16", layout="mono")
        note.rate = 16000
        out.mux(audio.encode(note)), out.mux(audio.encode())
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"format": 99}, folder / "format.pt")
    torch.save(state | {"config": state["config"] | {"channels": (8, 16, 32)}}, folder / "config.pt")
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
    (dict(checkpoint="format.pt"), "format 99, but this version reads format 2"),
    (dict(checkpoint="config.pt"), "does not fit its own config"),
    (dict(checkpoint="ff.pt"), "without the match loss"),
    (dict(checkpoint="vgg.pt"), "put the file into"),
    (dict(out="nowhere/result.mp4"), "no folder nowhere"),
    (dict(out="full"), "it is a folder"),
])
def test_infer_refuses_wrong_input_in_one_line(wrong, checkpoint, change, words):
    use = {"photo": PHOTO, "driver": ROOT / "assets" / "speech.npz", "checkpoint": checkpoint,
           "out": "result.mp4"} | change
    arguments = [part for k, v in use.items() for part in (f"--{k}", v)]
    if change == {"driver": "dark.mp4"}:
        # this one is noticed only while frames are read, below a progress bar
        result = here("infer.py", *arguments, cwd=wrong)
        assert result.returncode == 2 and words in result.stderr.splitlines()[-1]
    elif "checkpoint" in change and "vgg" in change["checkpoint"]:
        # torch hub announces its download
        result = here("infer.py", *arguments, cwd=wrong, TORCH_HOME=str(wrong))
        assert result.returncode == 2 and words in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr
    else:
        assert words in fail("infer.py", *arguments, cwd=wrong)
    assert not (wrong / "result.mp4").exists()


@pytest.mark.parametrize("arguments,words", [
    (["infer.py", "--person", "CHECKPOINT", "--driver", str(ROOT / "assets/speech.npz")],
     "is a file of another kind (meta): a person file of finetune.py"),
    (["finetune.py", "--photos", "dark.png", "--checkpoint", "CHECKPOINT"], "no face found in dark.png"),
    (["finetune.py", "--photos", str(PHOTO), "--epochs", "0"], "--epochs 0"),
    (["finetune.py", "--photos", str(PHOTO), "--checkpoint", "ff.pt"], "without the match loss"),
    (["infer.py", "--person", "CHECKPOINT", "--driver", "dark.mp4", "--feed-forward"],
     "leave out --feed-forward"),
    (["finetune.py", "--photos", str(PHOTO), "--checkpoint", "CHECKPOINT", "--vggface", "text.jpg"],
     "belong to --content vgg"),
    (["infer.py", "--photo", "copy.png", "--views", "--compare", "--motion", "paper"],
     "leave out --motion, --compare"),
    (["infer.py", "--person", "p.pt", "--driver", "dark.mp4", "--checkpoint", "vgg.pt", "--content", "l1"],
     "--person is already learned: leave out --checkpoint, --content"),
    (["infer.py", "--photo", "copy.png", "--views", "--feed-forward", "--as-paper", "--vgg19", "x"],
     "--feed-forward does not fine-tune: leave out --as-paper, --vgg19"),
    (["evaluate.py", "--toy", "--timing", "--ablation", "--out", "x"], "leave out --out, --ablation"),
    (["evaluate.py", "--toy", "--data", "x"], "--toy draws its own heads: leave out --data"),
    (["meta_train.py", "--toy", "--data", "x"], "--toy draws its own heads: leave out --data"),
    (["finetune.py", "--photos", "dark.png", "--no-adversarial", "--random", "w"],
     "--no-adversarial and --random w"),
    (["meta_train.py", "--toy", "--steps", "3", "--epochs", "2"], "--epochs and --steps exclude each other"),
    (["infer.py", "--photo", "copy.png", "--driver", "dark.mp4", "--save-track", "track"], "end in .npz"),
    (["infer.py", "--photo", "copy.png", "--driver", "dark.mp4", "--out", "dark.mp4"], "it is also an input"),
    (["finetune.py", "--photos", str(PHOTO), "--checkpoint", "vgg.pt", "--out", "vgg.pt"],
     "it is also an input"),
    (["meta_train.py", "--data", "nowhere"], "--toy"),
    (["meta_train.py", "--data", "."], "inside --data"),
    (["meta_train.py", "--toy", "--small"], "use one of them"),
    (["meta_train.py", "--toy", "--channels", "8"], "per halving"),
    (["meta_train.py", "--toy", "--vggface", "text.jpg"], "belong to --content vgg"),
    (["meta_train.py", "--toy", "--out", "text.jpg"], "cannot write to --out"),
    (["meta_train.py", "--toy", "--seed", "-1"], "--seed -1"),
    (["meta_train.py", "--toy", "--image-size", "100"], "image size 100"),
    (["meta_train.py", "--toy", "--batch", "0"], "--batch 0"),
    (["meta_train.py", "--toy", "--steps", "0"], "--steps 0"),
    (["meta_train.py", "--toy", "--epochs", "0"], "--epochs 0"),
    (["meta_train.py", "--toy", "--content", "vgg", "--vgg19", "none.mat"], "no file none.mat"),
])
def test_other_stages_refuse_wrong_input_in_one_line(wrong, checkpoint, arguments, words):
    arguments = [checkpoint if a == "CHECKPOINT" else a for a in arguments]
    assert words in fail(*arguments, cwd=wrong, TORCH_HOME=str(wrong))


def test_every_script_refuses_with_exit_code_2_and_one_line(wrong):
    """Each script in a process of its own, because the tests above only call main()."""
    commands = [["meta_train.py", "--toy", "--batch", "0"], ["data.py", "--videos", "nowhere"],
                ["finetune.py", "--photos", "text.jpg"], ["evaluate.py", "--data", "nowhere"],
                ["infer.py", "--photo", "text.jpg", "--driver", "dark.mp4"]]
    with ThreadPoolExecutor(2) as pool:
        for started in [pool.submit(fail, *arguments, cwd=wrong, start=script) for arguments in commands]:
            started.result()


def test_a_failed_run_leaves_the_last_result_alone(wrong, checkpoint, tmp_path):
    (tmp_path / "result.mp4").write_bytes(b"precious")
    result = here("infer.py", "--photo", PHOTO, "--driver", wrong / "dark.mp4",
                  "--checkpoint", checkpoint, cwd=tmp_path)
    assert result.returncode == 2
    assert (tmp_path / "result.mp4").read_bytes() == b"precious"
