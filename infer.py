"""Stage 3: make a talking-head video from a photo (or a person file) and a driver.

    python infer.py --photo x.jpg --driver v.mp4                # fine-tunes on the photo first, Sec. 3.3
    python infer.py --photo x.jpg y.jpg --driver v.mp4 --feed-forward --compare
    python infer.py --person person.pt --driver track.npz       # a person file, driven by saved landmarks
    python infer.py --photo x.jpg --views                       # new viewpoints as in Fig. 6

The result has as many frames as the driver, with its time stamps and sound. A long driving video needs no
more memory than a short one, apart from a few kilobytes for the landmarks of each frame.
"""
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from beyond.adapt import adapt, describe, place, views
from beyond.face3d import fit, load_face3d
from data import landmark_images, to_uint8
from finetune import (CHECKPOINT, EPOCHS, FINETUNING, add_finetuning_flags, content_loss, learn_person,
                      load_for_finetuning, load_photos, save_person)
from media.encode import SUFFIXES, write_video
from media.faces import landmark_detector
from media.folders import evenly
from media.recognition import SAME, dlib_recognition, tell_apart
from media.sound import usable_sound
from media.tracking import is_track, read_crops, read_driver, save_track
from runtime.checkpoint import load_checkpoint, load_person
from runtime.device import default_device, fast_dtype
from runtime.files import UserError, atomic, check_idle, check_paths, make_parser, run, warn


def render(G, psi, points, size, source=None, progress=True):
    """Yield a frame uint8 (S, S, 3) for each face in points (n, 68, 2): G'(y; psi, psi') of Sec. 3.3.

    source: a picture (3, S, S) in [-1, 1]. If given, frames are (S, 3S, 3): source, landmarks, result.
    """
    dtype = fast_dtype(psi.device)
    G = G.to(dtype=dtype, memory_format=torch.channels_last)        # G will not be trained any more
    batch = 8 if psi.is_cuda else max(1, (256 // size) ** 2 // 2)   # CPUs are fastest with small batches
    starts = range(0, len(points), batch)

    @torch.inference_mode()
    def draw(start):
        y = landmark_images(points[start:start + batch], size, psi.device)                  # (B, 3, S, S)
        frames = to_uint8(G.render(y.to(dtype), psi.expand(len(y), -1)))                    # (B, S, S, 3)
        if source is not None:
            left = np.broadcast_to(to_uint8(source), frames.shape)
            frames = np.concatenate([left, to_uint8(y), frames], axis=2)                    # (B, S, 3S, 3)
        return frames

    threads = torch.get_num_threads() if psi.device.type == "cpu" else 1
    for frames in tqdm(map_in_threads(draw, starts, threads), "rendering", len(starts), unit=" batches",
                       disable=not progress):
        yield from frames


def map_in_threads(function, items, threads):
    """Like map(function, items), but a few items ahead, in threads that each use a single core.

    On two cores, drawing one frame on each is faster than using both for one frame after the other: 42 and
    33 frames a second when we compared them (section 19 of the training log).
    """
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# ------------------------------------------------------------------------------------- who drives whom

def choose_motion(track, path, picture, source, face3d):
    """-> the --motion to use if the user names none. Prints the reason if it is not "relative".

    path: the driver's file.  picture: uint8 (S, S, 3), the photo that `source` describes.
    """
    if len(track.pts) == 1:
        print("the driver is a single frame and has no motion, so its pose is used (--motion absolute)")
        return "absolute"
    if not is_track(path) and same_person(track, path, picture, source, face3d):
        print("driver and photo show the same person, so the driver's pose is used (--motion absolute)")
        return "absolute"
    return "relative"


def same_person(track, path, picture, source, face3d, frames=5):
    """Whether dlib's network takes the source and some of the driver's first 250 frames for one person."""
    recognise = dlib_recognition()
    points = place(source.pose[None], source.z[None], source.opening[None], source, face3d)
    own = recognise(picture, points[0])
    start = track.first(250)
    chosen = evenly(np.flatnonzero(start.found).tolist(), frames)
    if not chosen:
        return False
    crops, points = read_crops(path, start, chosen, 256), start.in_crops(256)
    return np.mean([own @ recognise(crops[k], points[k]) for k in crops]) > SAME


def source_of(state, face3d):
    """-> the Source of a loaded person file."""
    photos = state["landmarks"].cpu().split(state["counts"].tolist())
    return describe([points.numpy() for points in photos], face3d)


def warn_of_sides(track, source, motion, face3d):
    """Warn of a photo or a driver that looks to the side, because the result suffers from it."""
    yaw = abs(np.degrees(source.pose[0]))
    if yaw > 40:
        warn(f"the photo shows the face turned by about {yaw:.0f} degrees, so half of it has to be guessed")
    if motion == "relative":
        yaw = abs(np.degrees(np.median(fit(track.points[track.found], face3d).pose[:, 0])))
        if yaw > 25:
            warn(f"the driver's face is turned by about {yaw:.0f} degrees most of the time, and --motion "
                 "relative takes this as its neutral pose: --motion absolute uses the pose as it is")


def write_views(path, sheet, render_points, source, face3d):
    """Fig. 6: write a looping video and a sheet of the photo's expression from yaw -40 to 40 degrees."""
    with atomic(sheet) as temporary:
        row = render_points(views(source, face3d, np.linspace(-40, 40, 9)))
        Image.fromarray(np.concatenate(list(row), axis=1)).save(temporary, "PNG")
    yaws = 40 * np.sin(np.linspace(0, 2 * np.pi, 100, endpoint=False))      # 4 s, there and back
    write_video(path, render_points(views(source, face3d, yaws)), np.arange(100), (1, 25))
    print(f"wrote {path} and {sheet}")


def parse():
    parser = make_parser(__doc__)
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--photo", nargs="+", metavar="FILE", help="photos and clips of the person")
    who.add_argument("--person", metavar="FILE", help="a person file from finetune.py or --save-person")
    add = parser.add_argument
    add("--driver", metavar="FILE", help="a video of the face that drives, or its saved landmarks (.npz)")
    add("--motion", choices=("relative", "absolute", "paper"), help="relative: the driver's movements, added "
        "to pose and expression of the photo; absolute: the driver's pose and expression, on the face of the "
        "photo; paper: the driver's landmarks as they are (default: relative, or absolute if the driver is "
        "the same person)")
    add("--views", action="store_true", help="without a driver: a video of the person from yaw -40 to 40 "
        "degrees, and the same views in one picture, named like --out but ending in .views.png")
    add("--out", default="result.mp4", metavar="FILE", help="the video (default: result.mp4)")
    add("--checkpoint", metavar="FILE", help="a meta-learned checkpoint (default: the bundled one)")
    add("--feed-forward", action="store_true", help="do not fine-tune: faster, but less like the person")
    add("--compare", action="store_true", help="show source, landmarks and result side by side")
    add("--save-person", metavar="FILE", help="also save the person, for a later --person")
    add("--save-track", metavar="FILE", help="also save the driver's landmarks (.npz), for a later --driver")
    add_finetuning_flags(parser)
    args = parser.parse_args()
    if bool(args.driver) == args.views:
        raise UserError("give either --driver FILE or --views")
    if args.person:
        check_idle(args, "--person is already learned", "checkpoint", "feed_forward", "save_person",
                   *FINETUNING)
    if args.feed_forward:
        check_idle(args, "--feed-forward does not fine-tune", *FINETUNING)
    if args.views:
        check_idle(args, "--views has no driver", "motion", "compare", "save_track")
    args.checkpoint = args.checkpoint or CHECKPOINT
    if args.save_track and not is_track(args.save_track):
        raise UserError(f"--save-track {args.save_track}: the name must end in .npz")
    if os.path.splitext(args.out)[1].lower() not in SUFFIXES:
        raise UserError(f"--out {args.out}: the name must end in .mp4, .m4v or .mov, because the result is "
                        "an mp4 file")
    inputs = [*(args.photo or []), args.person or args.checkpoint, args.driver, args.vgg19, args.vggface]
    args.sheet = os.path.splitext(args.out)[0] + ".views.png" if args.views else None
    check_paths(inputs, [args.out, args.sheet, args.save_person, args.save_track])
    return args


def main():
    args, kept = parse(), []
    try:
        animate(args, kept)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(words_on_stop(args, kept)) from None


def words_on_stop(args, kept):
    """A message for Ctrl-C: how to start from what was saved, or which flags would have saved something."""
    if kept:
        silent = " (an .npz has no sound)" if args.save_track else ""
        return f"to continue from here, start the next run with {' '.join(kept)}{silent}"
    lost = [] if args.person or args.save_person else ["--save-person FILE"]
    if args.driver and not is_track(args.driver) and not args.save_track:
        lost.append("--save-track FILE")
    return f"next time, add {' and '.join(lost)} so that a stopped run keeps its work" if lost else ""


def animate(args, kept):
    """The whole command. It puts into `kept` the flags with which another run can use what was saved."""
    # read all inputs, so that a wrong one is refused before anything long begins
    device = default_device()
    if args.person:
        state = load_checkpoint(args.person, device, kind="person")
    elif args.feed_forward:
        state = load_checkpoint(args.checkpoint, device)
    else:
        state = load_for_finetuning(args.checkpoint, device)
    config, face3d = state["config"], load_face3d()
    size, epochs = config.image_size, 0 if args.feed_forward else EPOCHS
    video = args.driver and not is_track(args.driver)
    detect = landmark_detector(config.landmarks) if args.photo or video else None
    if args.photo:
        photos = load_photos(args.photo, config, detect)
        content = None if args.feed_forward else content_loss(args, config)
        source, picture = describe([photo.points for photo in photos], face3d), photos[0].frames[0]
    else:
        source, picture = source_of(state, face3d), to_uint8(state["source"])
    if args.driver:
        track = read_driver(args.driver, config.landmarks, detect, tell_apart())
        sound_from = usable_sound(args.driver) if video else None
        if args.save_track:
            save_track(args.save_track, track)
            kept.append(f"--driver {args.save_track}")
        motion = args.motion or choose_motion(track, args.driver, picture, source, face3d)
        if motion != "paper":
            warn_of_sides(track, source, motion, face3d)

    # the person
    if args.person:
        (G, psi), shown = load_person(state), state["source"]
    else:
        G, psi, shown = learn_person(state, photos, content, epochs, device, as_paper=args.as_paper)
        if args.save_person:
            save_person(args.save_person, config, G, psi, shown, photos)
            kept.insert(0, f"--person {args.save_person}")

    # the video
    if args.views:
        write_views(args.out, args.sheet, lambda points: render(G, psi, points, size), source, face3d)
        return
    points = adapt(track, source, motion, size, face3d, config.lips)
    frames = render(G, psi, points, size, shown if args.compare else None)
    write_video(args.out, frames, track.pts, track.time_base, sound_from)
    print(f"wrote {args.out}: {len(track.pts)} frames, {track.seconds()[-1] - track.seconds()[0]:.1f} s")


if __name__ == "__main__":
    run(main)
