"""Stage 3: a photo (or a person file) and a driver in, a talking-head video out.

    python infer.py --photo x.jpg --driver v.mp4                    # fine-tunes on the photo first, Sec. 3.3
    python infer.py --photo x.jpg y.jpg --driver v.mp4 --feed-forward --compare
    python infer.py --person person.pt --driver track.npz           # a person from finetune.py, a saved track

The result has the driver's frames, time stamps and sound. Memory does not grow with the driver's length but for the
landmarks themselves, half a kilobyte a frame.
"""
import argparse
import os
from fractions import Fraction

import numpy as np
import torch
from tqdm import tqdm

from data import Track, check_paths, draw_landmarks, landmark_detector, run, to_float, to_uint8, track_video, warn
from finetune import (CHECKPOINT, EPOCHS, add_content_flags, content_loss, default_device, learn_person, load_faces, load_for_finetuning,
                      save_person)
from model import UserError, atomic, fast_dtype, load_checkpoint, load_person


def read_driver(path, config, detect):
    """A video or a saved track (.npz) -> Track, with a word on what is not as it should be."""
    if path.lower().endswith(".npz"):
        track = load_track(path)
        if track.detector != config.landmarks:
            warn(f"{path} holds {track.detector} landmarks, the checkpoint was trained with {config.landmarks}")
    else:
        track = track_video(path, detect, config.landmarks, progress=True)
    missed = len(track.found) - int(track.found.sum())
    if missed:
        print(f"no face in {missed} of {len(track.found)} frames of {path}: they repeat the landmarks before them, or the first ones")
    return track


@torch.inference_mode()
def render(G, psi, points, size, source=None):
    """Yield a uint8 (S, S, 3) frame for each of the landmarks (n, 68, 2): G'(y; psi, psi') of Sec. 3.3.

    source: a picture (3, S, S) in [-1, 1]: then (S, 3S, 3), with source, landmarks and result side by side.
    """
    dtype = fast_dtype(psi.device)
    G, psi = G.to(dtype=dtype, memory_format=torch.channels_last), psi.to(dtype)     # G is not for training any more
    batch = 8 if psi.is_cuda else max(1, (256 // size) ** 2 // 2)   # on CPUs large images go faster one by one
    for start in tqdm(range(0, len(points), batch), "rendering", unit=" batches"):
        drawn = [draw_landmarks(p, size) for p in points[start:start + batch]]
        y = to_float(torch.from_numpy(np.stack(drawn)).movedim(-1, 1), psi.device)     # (B, 3, S, S)
        frames = to_uint8(G.render(y.to(dtype), psi.expand(len(y), -1)))           # (B, S, S, 3)
        if source is not None:
            left = np.broadcast_to(to_uint8(source), frames.shape)
            frames = np.concatenate([left, drawn, frames], axis=2)                     # (B, S, 3S, 3)
        yield from frames


# --------------------------------------------------------------------------------------- files in and out

def save_track(path, track):
    """Write a track as .npz, by way of a temporary name."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **track._asdict())


def load_track(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            track = Track(*(file[name] for name in Track._fields))
        n = len(track.pts)
        shapes = [track.points.shape, track.found.shape, track.pts.shape, track.time_base.shape]
        if (n == 0 or shapes != [(n, 68, 2), (n,), (n,), (2,)] or not np.isfinite(track.points).all()
                or (track.time_base < 1).any() or (np.diff(track.pts) < 1).any()):
            raise ValueError("its arrays are not those of a track")
        return track._replace(detector=str(track.detector))
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except Exception as e:  # numpy and zipfile raise many types on foreign or damaged files
        raise UserError(f"{path} is not a landmark track ({e})") from None


def write_video(path, frames, pts, time_base, sound_from=None):
    """Write H.264 (yuv420p, mp4) that browsers play, by way of a temporary name.

    frames: an iterable of uint8 (H, W, 3), H and W even.  pts (n,): a time stamp a frame, in units of
    time_base = (numerator, denominator) seconds.  sound_from: a media file whose sound is copied packet by packet,
    or encoded anew as AAC where mp4 cannot hold its codec.
    """
    import av
    base = Fraction(*map(int, time_base))
    shift = -min(0, int(pts[0])) * base     # mp4 hides what comes before 0
    pts = pts - min(0, pts[0])
    rate = Fraction(1 / float(np.median(np.diff(pts)) * base)).limit_denominator(1001) if len(pts) > 1 else 25
    options = {"movflags": "faststart", "video_track_timescale": str(base.denominator)}
    with atomic(path) as temporary:
        try:
            with av.open(temporary, "w", format="mp4", options=options) as out:
                stream = out.add_stream("libx264", rate=rate, options={"crf": "16"})
                sound = _sound(sound_from, out, shift) if sound_from else iter(())
                packet = None
                for frame, stamp in zip(frames, pts, strict=True):
                    if packet is None:  # size and format must be set before the first mux
                        stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], "yuv420p"
                        stream.codec_context.time_base = base
                        packet = next(sound, False)
                    picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                    picture.pts, picture.time_base = int(stamp), base
                    while packet and (packet.pts or 0) * packet.time_base <= stamp * base:  # interleaved: memory stays flat
                        out.mux(packet)
                        packet = next(sound, False)
                    out.mux(stream.encode(picture))
                out.mux(stream.encode())
                while packet:
                    out.mux(packet)
                    packet = next(sound, False)
        except av.FFmpegError as e:
            raise OSError(e.errno, e.strerror or str(e)) from None


def _sound(path, out, shift):
    """Add an audio stream to `out` and return an iterator over its packets, `shift` seconds later; without sound, an empty one."""
    import av
    source = av.open(os.fspath(path))
    if not source.streams.audio:
        return iter(())
    audio = source.streams.audio[0]
    if audio.codec_context is None or not audio.rate:
        warn(f"{path}: its sound cannot be read, and is left out")
        return iter(())
    copy = audio.codec_context.name in {"aac", "mp3", "mp3float", "opus", "libopus", "flac"}  # what browsers play in mp4
    stream = out.add_stream_from_template(audio) if copy else out.add_stream("aac", rate=audio.rate)

    def decoded(packet):
        try:
            return packet.decode()
        except av.InvalidDataError:
            return []       # a damaged packet: a gap of some milliseconds

    def packets():
        with source:
            try:
                for packet in source.demux(audio):
                    if not copy:
                        for frame in decoded(packet):
                            yield from stream.encode(frame)
                    elif packet.dts is not None:  # the last one is empty, for flushing
                        packet.pts, packet.dts = packet.pts + round(shift / packet.time_base), packet.dts + round(shift / packet.time_base)
                        packet.stream = stream
                        yield packet
                if not copy:
                    yield from stream.encode()
            except av.FFmpegError as e:
                warn(f"the sound of {path} ends early ({e.strerror or e})")

    return packets()


# -------------------------------------------------------------------------------------------------- command

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--photo", nargs="+", metavar="FILE", help="photos and/or clips of the person")
    who.add_argument("--person", metavar="FILE", help="a person file of finetune.py or --save-person")
    parser.add_argument("--driver", required=True, metavar="FILE", help="the video whose face drives, or a saved track (.npz)")
    parser.add_argument("--out", default="result.mp4", help="(default: result.mp4)")
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="a meta-learned checkpoint (default: the bundled weights/real64.pt)")
    parser.add_argument("--feed-forward", action="store_true", help="leave fine-tuning out: quicker, less like the person")
    parser.add_argument("--compare", action="store_true", help="source, landmarks and result side by side")
    parser.add_argument("--save-person", metavar="FILE", help="keep the person for --person")
    parser.add_argument("--save-track", metavar="FILE", help="keep the driver's landmarks (.npz) as a later --driver")
    add_content_flags(parser)
    args = parser.parse_args()
    if args.person and (args.feed_forward or args.save_person):
        raise UserError("--person brings a finished person: leave out --feed-forward and --save-person")
    inputs = [*(args.photo or []), args.person or args.checkpoint, args.driver, args.vgg19, args.vggface]
    check_paths(inputs, [args.out, args.save_person, args.save_track])

    # everything is read, and refused, before anything long begins
    device = default_device()
    if args.person or args.feed_forward:
        state = load_checkpoint(args.person or args.checkpoint, device, "person" if args.person else "meta")
    else:
        state = load_for_finetuning(args.checkpoint, device)
    config = state["config"]
    is_track = args.driver.lower().endswith(".npz")
    detect = None if args.person and is_track else landmark_detector(config.landmarks)
    if args.photo:
        x, y = load_faces(args.photo, config, detect)
        content = None if args.feed_forward else content_loss(args, config)
    track = read_driver(args.driver, config, detect)
    if args.save_track:
        save_track(args.save_track, track)

    if args.person:
        (G, psi), source = load_person(state), state["source"]
    else:
        _, G, psi, source = person = learn_person(state, x, y, content, 0 if args.feed_forward else EPOCHS, device)
        if args.save_person:
            save_person(args.save_person, *person)
    frames = render(G, psi, track.in_crops(config.image_size), config.image_size, source if args.compare else None)
    write_video(args.out, frames, track.pts, track.time_base, None if is_track else args.driver)
    print(f"wrote {args.out}: {len(track.pts)} frames, {track.seconds()[-1] - track.seconds()[0]:.1f} s")


if __name__ == "__main__":
    run(main)
