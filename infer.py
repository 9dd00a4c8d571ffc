"""Stage 3: a photo (or a person file) and a driver in, a talking-head video out.

    python infer.py --photo x.jpg --driver v.mp4                    # fine-tunes on the photo first, Sec. 3.3
    python infer.py --photo x.jpg y.jpg --driver v.mp4 --feed-forward --compare
    python infer.py --person person.pt --driver track.npz           # a person from finetune.py, a saved track

The result has the driver's frames, time stamps and sound. Memory does not grow with the driver's length but for the
landmarks themselves, half a kilobyte a frame.
"""
import argparse
import sys

import numpy as np
import torch
from tqdm import tqdm

from data import (check_writable, draw_landmarks, landmark_detector, load_track, run, save_track, to_float, to_uint8, track_video,
                  write_video)
from finetune import CHECKPOINT, default_device, learn_person, save_person
from model import load_checkpoint, load_person

BATCH = 8   # frames rendered at a time


def read_driver(path, config, detect=None):
    """A video or a saved track (.npz) -> Track, with a word on what is not as it should be."""
    if path.lower().endswith(".npz"):
        track = load_track(path)
        if track.detector != config.landmarks:
            print(f"warning: {path} holds {track.detector} landmarks, the checkpoint was trained with {config.landmarks}", file=sys.stderr)
    else:
        track = track_video(path, detect or landmark_detector(config.landmarks), config.landmarks, progress=True)
    missed = len(track.found) - int(track.found.sum())
    if missed:
        print(f"no face in {missed} of {len(track.found)} frames of {path}: they repeat the landmarks before them")
    return track


@torch.inference_mode()
def render(G, psi, points, size, source=None):
    """Yield a uint8 (S, S, 3) frame for each of the landmarks (n, 68, 2): G'(y; psi, psi') of Sec. 3.3.

    source: a picture (3, S, S) in [-1, 1]: then (S, 3S, 3), with source, landmarks and result side by side.
    """
    for start in tqdm(range(0, len(points), BATCH), "rendering", unit=" batches"):
        drawn = [draw_landmarks(p, size) for p in points[start:start + BATCH]]
        y = to_float(torch.from_numpy(np.stack(drawn)).movedim(-1, 1), psi.device)     # (B, 3, S, S)
        frames = to_uint8(G.render(y, psi.expand(len(y), -1)))                         # (B, S, S, 3)
        if source is not None:
            left = np.broadcast_to(to_uint8(source), frames.shape)
            frames = np.concatenate([left, drawn, frames], axis=2)                     # (B, S, 3S, 3)
        yield from frames


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--photo", nargs="+", metavar="FILE", help="photos and/or clips of the person")
    who.add_argument("--person", metavar="FILE", help="a person file of finetune.py or --save-person")
    parser.add_argument("--driver", required=True, metavar="FILE", help="the video whose face drives, or a saved track (.npz)")
    parser.add_argument("--out", default="result.mp4", help="(default: result.mp4)")
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="a meta-learned checkpoint (default: the bundled weights/toy.pt)")
    parser.add_argument("--feed-forward", action="store_true", help="leave fine-tuning out: quicker, less like the person")
    parser.add_argument("--compare", action="store_true", help="source, landmarks and result side by side")
    parser.add_argument("--save-person", metavar="FILE", help="keep the person for --person")
    parser.add_argument("--save-track", metavar="FILE", help="keep the driver's landmarks (.npz) as a later --driver")
    args = parser.parse_args()
    for path in filter(None, (args.out, args.save_person, args.save_track)):
        check_writable(path)

    device = default_device()
    state = load_checkpoint(args.person or args.checkpoint, device, "person" if args.person else "meta")
    track = read_driver(args.driver, state["config"])
    if args.save_track:
        save_track(args.save_track, track)
    if args.person:
        config, source = state["config"], state["source"]
        G, psi = load_person(state)
    else:
        config, G, psi, source = learn_person(state, args.photo, device, 0 if args.feed_forward else 40)
        if args.save_person:
            save_person(args.save_person, config, G, psi, source)

    frames = render(G, psi, track.in_crops(config.image_size), config.image_size, source if args.compare else None)
    sound = None if args.driver.lower().endswith(".npz") else args.driver
    write_video(args.out, frames, track.pts, track.time_base, sound)
    print(f"wrote {args.out}: {len(track.pts)} frames, {track.seconds()[-1] - track.seconds()[0]:.1f} s")


if __name__ == "__main__":
    run(main)
