"""Stage 3: a photo (or a person file) and a driver in, a talking-head video out.

    python infer.py --photo x.jpg --driver v.mp4                # fine-tunes on the photo first, Sec. 3.3
    python infer.py --photo x.jpg y.jpg --driver v.mp4 --feed-forward --compare
    python infer.py --person person.pt --driver track.npz       # from finetune.py, a saved track

The result has the driver's frames, time stamps and sound. Memory does not grow with the driver's length
but for the landmarks themselves, half a kilobyte a frame.
"""
import os

import numpy as np
import torch
from tqdm import tqdm

from data import draw_landmarks, to_float, to_uint8
from device import default_device, fast_dtype
from faces import landmark_detector
from files import UserError, check_paths, make_parser, run, warn
from finetune import (CHECKPOINT, EPOCHS, add_content_flags, content_loss, learn_person, load_faces,
                      load_for_finetuning, save_person)
from model import load_checkpoint, load_person
from sound import usable_sound
from video import SUFFIXES, load_track, save_track, track_video, write_video


@torch.inference_mode()
def render(G, psi, points, size, source=None):
    """Yield a uint8 (S, S, 3) frame for each of the landmarks (n, 68, 2): G'(y; psi, psi') of Sec. 3.3.

    source: a picture (3, S, S) in [-1, 1]: then (S, 3S, 3), source, landmarks and result side by side.
    """
    dtype = fast_dtype(psi.device)
    G = G.to(dtype=dtype, memory_format=torch.channels_last)        # it is not for training any more
    batch = 8 if psi.is_cuda else max(1, (256 // size) ** 2 // 2)   # on CPUs large images go faster one by one
    for start in tqdm(range(0, len(points), batch), "rendering", unit=" batches"):
        drawn = np.stack([draw_landmarks(p, size) for p in points[start:start + batch]])    # (B, S, S, 3)
        y = to_float(torch.from_numpy(drawn).movedim(-1, 1), psi.device)                    # (B, 3, S, S)
        frames = to_uint8(G.render(y.to(dtype), psi.expand(len(y), -1)))                    # (B, S, S, 3)
        if source is not None:
            left = np.broadcast_to(to_uint8(source), frames.shape)
            frames = np.concatenate([left, drawn, frames], axis=2)                          # (B, S, 3S, 3)
        yield from frames


def read_driver(path, config, detect):
    """A video or a saved track (.npz) -> Track, with a word on what is not as it should be."""
    if is_track(path):
        track = load_track(path)
        if track.detector != config.landmarks:
            warn(f"{path} holds {track.detector} landmarks, the checkpoint was trained with {config.landmarks}")
    else:
        track = track_video(path, detect, config.landmarks, progress=True)
    missed = len(track.found) - int(track.found.sum())
    if missed:
        print(f"no face in {missed} of {len(track.found)} frames of {path}: "
              "they repeat the landmarks before them, or the first ones")
    return track


def is_track(path):
    return path.lower().endswith(".npz")


def parse():
    parser = make_parser(__doc__)
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--photo", nargs="+", metavar="FILE", help="photos and/or clips of the person")
    who.add_argument("--person", metavar="FILE", help="a person file of finetune.py or --save-person")
    add = parser.add_argument
    add("--driver", required=True, metavar="FILE", help="the video whose face drives, or a saved track (.npz)")
    add("--out", default="result.mp4", help="(default: result.mp4)")
    add("--checkpoint", default=CHECKPOINT, help="a meta-learned checkpoint (default: the bundled one)")
    add("--feed-forward", action="store_true", help="leave fine-tuning out: quicker, less like the person")
    add("--compare", action="store_true", help="source, landmarks and result side by side")
    add("--save-person", metavar="FILE", help="keep the person for --person")
    add("--save-track", metavar="FILE", help="keep the driver's landmarks (.npz) as a later --driver")
    add_content_flags(parser)
    args = parser.parse_args()
    if args.person and (args.feed_forward or args.save_person):
        raise UserError("--person brings a finished person: leave out --feed-forward and --save-person")
    if os.path.splitext(args.out)[1].lower() not in SUFFIXES:
        raise UserError(f"--out {args.out}: the result is an mp4, and players go by the name: "
                        "end it in .mp4, .m4v or .mov")
    inputs = [*(args.photo or []), args.person or args.checkpoint, args.driver, args.vgg19, args.vggface]
    check_paths(inputs, [args.out, args.save_person, args.save_track])
    return args


def main():
    # everything is read, and refused, before anything long begins
    args = parse()
    device = default_device()
    if args.person:
        state = load_checkpoint(args.person, device, kind="person")
    elif args.feed_forward:
        state = load_checkpoint(args.checkpoint, device)
    else:
        state = load_for_finetuning(args.checkpoint, device)
    config = state["config"]
    detect = None if args.person and is_track(args.driver) else landmark_detector(config.landmarks)
    if args.photo:
        x, y = load_faces(args.photo, config, detect)
        content = None if args.feed_forward else content_loss(args, config)
    track = read_driver(args.driver, config, detect)
    sound_from = None if is_track(args.driver) else usable_sound(args.driver)
    if args.save_track:
        save_track(args.save_track, track)

    # the person
    if args.person:
        G, psi = load_person(state)
        source = state["source"]
    else:
        epochs = 0 if args.feed_forward else EPOCHS
        _, G, psi, source = learn_person(state, x, y, content, epochs, device)
        if args.save_person:
            save_person(args.save_person, config, G, psi, source)

    # the video
    points = track.in_crops(config.image_size)
    frames = render(G, psi, points, config.image_size, source if args.compare else None)
    write_video(args.out, frames, track.pts, track.time_base, sound_from)
    print(f"wrote {args.out}: {len(track.pts)} frames, {track.seconds()[-1] - track.seconds()[0]:.1f} s")


if __name__ == "__main__":
    run(main)
