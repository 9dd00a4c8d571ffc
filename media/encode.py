"""Writing an mp4, with the sound of another file.

    write_video("result.mp4", frames, track.pts, track.time_base, sound_from="v.mp4")
"""
import math
from fractions import Fraction

import numpy as np

from media.streams import open_media
from media.sound import Sound
from runtime.files import atomic

SUFFIXES = ("", ".mp4", ".m4v", ".mov")     # the endings that a file of write_video() may have


def write_video(path, frames, pts, time_base, sound_from=None):
    """Write an mp4 file (H.264, yuv420p) that browsers can play, and that starts at time 0.

    frames: an iterable of uint8 (H, W, 3), H and W even.  pts (n,): the time stamp of each frame, in units of
    time_base = (numerator, denominator) seconds.  sound_from: a media file from which the sound is copied, or
    None; frames and sound are shifted in time alike. Raises UserError if the file cannot be written; then no
    partial file is left.
    """
    import av
    base = Fraction(*map(int, time_base))
    start = int(pts[0]) * base
    pts = pts - pts[0]
    rate = Fraction(25)
    if len(pts) > 1:
        rate = Fraction(1 / float(np.median(np.diff(pts)) * base)).limit_denominator(1001)
    options = {"movflags": "faststart", "video_track_timescale": str(base.denominator)}
    with atomic(path) as temporary:
        try:
            with open_media(temporary, "w", format="mp4", options=options) as out:
                # veryfast, because the encoder shares the cores with what makes the frames
                quality = {"crf": "15", "preset": "veryfast"}
                stream = out.add_stream("libx264", rate=rate, options=quality)
                with Sound(sound_from, out, start) as sound:
                    for k, (frame, stamp) in enumerate(zip(frames, pts, strict=True)):
                        if k == 0:      # size and format must be set before the first packet
                            stream.height, stream.width = frame.shape[:2]
                            stream.pix_fmt = "yuv420p"
                            stream.codec_context.time_base = base
                        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                        picture.pts, picture.time_base = int(stamp), base
                        sound.write_until(int(stamp) * base)    # interleaved, so that nothing accumulates
                        out.mux(stream.encode(picture))
                    out.mux(stream.encode())
                    sound.write_until(math.inf)
        except av.FFmpegError as e:
            raise OSError(e.errno, e.strerror or str(e)) from None
