"""The crop around a face that all stages share: its box, its motion in a video, and its pixels.

    box = face_box(points)                  # (3,): centre x, y and half side
    picture = crop(image, box, 256)         # uint8 (256, 256, 3)
"""
import numpy as np
from PIL import Image

JERK = 0.15     # a visible cut counts if the face moves by more than this, in halves of the crop's side
MADE_UP = 0.1   # training does not use crops of which a larger share lies beyond the picture's border
REACH = 0.3     # a face is at most this far from the middle of its crop, in halves of the crop's side
ZOOM = 0.07     # a larger value of growth() may be a cut; the largest in 20 clips without cuts is 0.061


def face_box(points):
    """The box of a face's crop: landmarks (..., 68, 2) -> (..., 3), centre x, y and half side in pixels.

    The centre is between eyes and mouth: a higher one would reach beyond VoxCeleb's frames, which end just
    above the brows.
    """
    eyes = np.stack([points[..., 36:42, :].mean(-2), points[..., 42:48, :].mean(-2)], axis=-2)
    mouth = points[..., [48, 54], :].mean(-2)
    between = eyes.mean(-2)
    eye_distance = np.linalg.norm(eyes[..., 0, :] - eyes[..., 1, :], axis=-1)
    mouth_distance = np.linalg.norm(mouth - between, axis=-1)
    half = np.maximum(2 * eye_distance, 1.8 * mouth_distance)
    return np.concatenate([between + 0.5 * (mouth - between), half[..., None]], axis=-1)


def steady_boxes(points, times, shot):
    """Boxes that do not jitter, one for each frame of a video: landmarks (n, 68, 2) -> (n, 3).

    Each is a mean of face_box() over its shot, with Gaussian weights in time (standard deviation: 1 second).
    If somebody walks, the face can leave such a box, so the box is moved as far as REACH requires.
    times (n,) in seconds.  shot (n,): from shots().
    """
    boxes = face_box(points)
    result = np.empty_like(boxes)
    for k, t in enumerate(times):
        a, b = np.searchsorted(times, [t - 3, t + 3])
        weight = np.exp(-0.5 * (times[a:b] - t) ** 2) * (shot[a:b] == shot[k])
        result[k] = weight @ boxes[a:b] / weight.sum()
    reach = REACH * result[:, 2:]
    result[:, :2] = result[:, :2].clip(boxes[:, :2] - reach, boxes[:, :2] + reach)
    return result


def shots(points, found, cuts):
    """The number of each frame's shot: points (n, 68, 2), found and cuts (n,) of a Track -> (n,).

    A new shot begins where the face jumps by half a crop, or changes its size at once and for good. At a
    visible cut a smaller change is enough, but some change is needed, because a flash or a shaking camera
    looks like a cut, too, and leaves the face about where it was.
    """
    half = face_box(points)[:, 2]
    moves = np.linalg.norm(np.diff(points, axis=0, prepend=points[:1]), axis=2).mean(1)
    changes = (moves > JERK * half) | (np.abs(growth(points)) > ZOOM)
    return np.cumsum((moves > half) | (cuts & changes) | zooms(points, found))


def zooms(points, found):
    """Whether the size of the face jumps at a frame and stays there: (n,) bool.

    When a head quickly leans forward, its size changes over several frames. When the detector makes an error,
    the size does not stay.
    """
    change = growth(points) * (found & np.roll(found, 1))
    size, result = np.cumsum(change), np.zeros(len(change), bool)
    for k in np.flatnonzero(np.abs(change) > ZOOM):
        nearby = np.abs(np.concatenate([change[max(0, k - 2):k], change[k + 1:k + 3]])).max(initial=0)
        lasting = np.median(size[k:k + 5]) - np.median(size[max(0, k - 5):k])
        result[k] = abs(change[k]) > 2.5 * nearby and lasting / change[k] > 0.6
    return result


def growth(points):
    """The logarithm of each face's size relative to the face before, measured without the mouth: (n,)."""
    rigid = points[:, :48] - points[:, :48].mean(1, keepdims=True)
    z = rigid[..., 0] + 1j * rigid[..., 1]
    before = np.concatenate([z[:1], z[:-1]])
    return np.log(np.abs((before.conj() * z).sum(1)) / (np.abs(before) ** 2).sum(1))


def inside(box, image):
    """A box (3,), moved so that as little of it as possible lies beyond the picture's border -> (3,)."""
    room = np.array(image.shape[1::-1]) - 2 * box[2]        # in x and y; negative if the box is too large
    corner = np.clip(box[:2] + 0.5 - box[2], np.minimum(room / 2, 0), np.maximum(room / 2, room))
    return np.append(corner + box[2] - 0.5, box[2])


def crop(image, box, size):
    """image uint8 (H, W, 3), box (3,) as face_box() returns it -> uint8 (size, size, 3), antialiased.

    Beyond the picture's border, the colours of the border continue and become more and more blurred. They are
    not mirrored, because then the networks would see a second eye or mouth.
    """
    height, width = image.shape[:2]
    (x, y), half = box[:2] + 0.5, box[2]        # +0.5, because PIL's coordinates start at a pixel's edge
    edges = np.array([x - half, y - half, x + half, y + half])
    beyond = np.array([-edges[0], -edges[1], edges[2] - width, edges[3] - height])
    left, top, right, bottom = np.ceil(beyond).clip(0).astype(int)
    if left or top or right or bottom:
        image = np.pad(image, ((top, bottom), (left, right), (0, 0)), "edge")
        edges += (left, top, left, top)
    result = np.asarray(Image.fromarray(image).resize((size, size), Image.BICUBIC, box=tuple(edges)))
    if left or top or right or bottom:
        centres = (np.arange(size) + 0.5) * 2 * half / size         # of the crop's pixels, from its edge
        known_x = (x - half + centres > 0) & (x - half + centres < width)
        known_y = (y - half + centres > 0) & (y - half + centres < height)
        result = fill_unknown(result, known_y[:, None] & known_x)
    return result


def made_up(box, image):
    """The share of a box (3,), 0 to 1, that lies beyond the picture's border, and is made up by crop()."""
    middle, half = box[:2] + 0.5, box[2]
    size = np.array(image.shape[1::-1])
    inner = np.minimum(middle + half, size) - np.maximum(middle - half, 0)      # width and height inside
    return 1 - np.prod(inner.clip(0) / (2 * half))


def fill_unknown(image, known):
    """image uint8 (S, S, 3), known (S, S) bool -> the image with its unknown pixels filled in.

    They are filled from copies of half, a quarter, an eighth ... of the size: the farther a pixel is from the
    known ones, the larger is the neighbourhood whose mean it takes.
    """
    if known.all() or not known.any():
        return image
    return _fill(image.astype(np.float32), known.astype(np.float32)).round().clip(0, 255).astype(np.uint8)


def _fill(image, weight):
    """image float32 (H, W, 3), weight (H, W): the known share of each pixel, 0 to 1 -> (H, W, 3)."""
    if weight.min() >= 1 or min(weight.shape) == 1:
        mean = (image * weight[..., None]).sum((0, 1)) / weight.sum()
        return np.where(weight[..., None] > 0, image, mean)
    H, W = weight.shape
    even = ((0, H % 2), (0, W % 2))
    padded = np.pad(weight, even), np.pad(image * weight[..., None], (*even, (0, 0)))
    total, colours = (a[::2, ::2] + a[::2, 1::2] + a[1::2, ::2] + a[1::2, 1::2] for a in padded)
    mean = colours / np.maximum(total, 1e-6)[..., None]
    coarse = _fill(mean, np.minimum(total, 1))
    size = 2 * coarse.shape[1], 2 * coarse.shape[0]
    channels = [Image.fromarray(c).resize(size, Image.BILINEAR) for c in np.moveaxis(coarse, 2, 0)]
    larger = np.stack([np.asarray(c) for c in channels], axis=2)[:H, :W]
    return image * weight[..., None] + larger * (1 - weight[..., None])


def to_crop(points, box, size):
    """points (..., 68, 2) in pixels of the image -> in pixels of its crop by `box` (..., 3)."""
    centre, half = np.split(box[..., None, :], [2], axis=-1)
    result = np.subtract(points, centre - half, dtype=np.float32)
    result *= (size / (2 * half)).astype(np.float32)    # in place, because a long driver has many points
    result -= 0.5
    return result
