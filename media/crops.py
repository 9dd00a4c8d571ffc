"""The one crop of all stages: where it lies, how it holds still in a video, and how its border is filled."""
import numpy as np
from PIL import Image

JERK = 0.15     # of half a crop: the face moves at least so far at a cut that matters
MADE_UP = 0.1   # crops of which a larger share lies beyond the picture's border are not trained on
ZOOM = 0.07     # a larger jump of growth() may be a cut; of 20 clips without one, the largest is 0.061


def face_box(points):
    """The one crop of all stages: points (..., 68, 2) -> (..., 3), centre x, y and half side.

    Centred between eyes and mouth: VoxCeleb's own frames end not far above the brows.
    """
    eyes = np.stack([points[..., 36:42, :].mean(-2), points[..., 42:48, :].mean(-2)], axis=-2)
    mouth = points[..., [48, 54], :].mean(-2)
    between = eyes.mean(-2)
    eye_distance = np.linalg.norm(eyes[..., 0, :] - eyes[..., 1, :], axis=-1)
    mouth_distance = np.linalg.norm(mouth - between, axis=-1)
    half = np.maximum(2 * eye_distance, 1.8 * mouth_distance)
    return np.concatenate([between + 0.5 * (mouth - between), half[..., None]], axis=-1)


def steady_boxes(points, times, shot):
    """face_box for a video: a Gaussian mean over about a second either side, so that it does not jitter.

    points (n, 68, 2), times (n,) in seconds, shot (n,) of shots() -> (n, 3).
    Nothing is averaged across a cut.
    """
    boxes = face_box(points)
    result = np.empty_like(boxes)
    for k, t in enumerate(times):
        a, b = np.searchsorted(times, [t - 3, t + 3])
        weight = np.exp(-0.5 * (times[a:b] - t) ** 2) * (shot[a:b] == shot[k])
        result[k] = weight @ boxes[a:b] / weight.sum()
    return result


def shots(points, found, cuts):
    """The number of each frame's shot: points (n, 68, 2), found and cuts (n,) of a Track -> (n,).

    A new one begins where the face jumps by half a crop, or its size does. Where the pictures show a cut,
    less is enough, but a flash or a jerk of the camera, which look like one, leave the face about as it is.
    """
    half = face_box(points)[:, 2]
    moves = np.linalg.norm(np.diff(points, axis=0, prepend=points[:1]), axis=2).mean(1)
    changes = (moves > JERK * half) | (np.abs(growth(points)) > ZOOM)
    return np.cumsum((moves > half) | (cuts & changes) | zooms(points, found))


def zooms(points, found):
    """Where the size of the face jumps from one frame to the next, and stays: (n,) bool.

    A head that leans forward quickly takes several frames, and a slip of the detector does not stay.
    """
    change = growth(points) * (found & np.roll(found, 1))
    size, result = np.cumsum(change), np.zeros(len(change), bool)
    for k in np.flatnonzero(np.abs(change) > ZOOM):
        beside = np.abs(np.concatenate([change[max(0, k - 2):k], change[k + 1:k + 3]])).max(initial=0)
        stays = np.median(size[k:k + 5]) - np.median(size[max(0, k - 5):k])
        result[k] = abs(change[k]) > 2.5 * beside and stays / change[k] > 0.6
    return result


def growth(points):
    """The logarithm of how much larger each face is than the one before, by all but the mouth: (n,)."""
    rigid = points[:, :48] - points[:, :48].mean(1, keepdims=True)
    z = rigid[..., 0] + 1j * rigid[..., 1]
    before = np.concatenate([z[:1], z[:-1]])
    return np.log(np.abs((before.conj() * z).sum(1)) / (np.abs(before) ** 2).sum(1))


def inside(box, image):
    """A box (3,) moved into the picture as far as it fits: what lies beyond can only be made up. -> (3,)"""
    room = np.array(image.shape[1::-1]) - 2 * box[2]        # in x and y; negative where the box is too large
    corner = np.clip(box[:2] + 0.5 - box[2], np.minimum(room / 2, 0), np.maximum(room / 2, room))
    return np.append(corner + box[2] - 0.5, box[2])


def crop(image, box, size):
    """image uint8 (H, W, 3), box (3,) of face_box -> uint8 (size, size, 3), antialiased.

    What lies beyond the picture's border has to be made up: there the border's colours go on, ever more
    blurred, so that no network is shown an eye or a mouth where none is.
    """
    height, width = image.shape[:2]
    (x, y), half = box[:2] + 0.5, box[2]        # +0.5: from pixel centres to the edges that PIL counts in
    edges = np.array([x - half, y - half, x + half, y + half])
    beyond = np.array([-edges[0], -edges[1], edges[2] - width, edges[3] - height])
    left, top, right, bottom = np.ceil(beyond).clip(0).astype(int)
    if left or top or right or bottom:
        image = np.pad(image, ((top, bottom), (left, right), (0, 0)), "edge")
        edges += (left, top, left, top)
    result = np.asarray(Image.fromarray(image).resize((size, size), Image.BICUBIC, box=tuple(edges)))
    if left or top or right or bottom:
        centres = (np.arange(size) + 0.5) * 2 * half / size             # of the crop's pixels, from its edge
        known_x = (x - half + centres > 0) & (x - half + centres < width)
        known_y = (y - half + centres > 0) & (y - half + centres < height)
        result = fill_unknown(result, known_y[:, None] & known_x)
    return result


def made_up(box, image):
    """The share of a crop, 0 to 1, that lies beyond the border of a picture and has to be made up."""
    middle, half = box[:2] + 0.5, box[2]
    size = np.array(image.shape[1::-1])
    shown = np.minimum(middle + half, size) - np.maximum(middle - half, 0)     # in x and in y
    return 1 - np.prod(shown.clip(0) / (2 * half))


def fill_unknown(image, known):
    """uint8 (S, S, 3), known (S, S) bool -> the same with every other pixel made up from the known ones.

    By halves: a pixel without a known one near it takes the mean of a larger neighbourhood.
    """
    if known.all() or not known.any():
        return image
    return _fill(image.astype(np.float32), known.astype(np.float32)).round().clip(0, 255).astype(np.uint8)


def _fill(image, weight):
    """image float32 (H, W, 3), weight (H, W): how much of each pixel is known, 0 to 1 -> (H, W, 3)."""
    if weight.min() >= 1 or min(weight.shape) == 1:
        mean = (image * weight[..., None]).sum((0, 1)) / weight.sum()
        return np.where(weight[..., None] > 0, image, mean)
    H, W = weight.shape
    even = ((0, H % 2), (0, W % 2))
    quarters = lambda a: np.pad(a, even + ((0, 0),) * (a.ndim - 2)).reshape(
        (H + 1) // 2, 2, (W + 1) // 2, 2, *a.shape[2:]).sum((1, 3))
    total = quarters(weight)
    mean = quarters(image * weight[..., None]) / np.maximum(total, 1e-6)[..., None]
    coarse = _fill(mean, np.minimum(total, 1))
    size = 2 * coarse.shape[1], 2 * coarse.shape[0]
    channels = [Image.fromarray(c).resize(size, Image.BILINEAR) for c in np.moveaxis(coarse, 2, 0)]
    larger = np.stack([np.asarray(c) for c in channels], axis=2)[:H, :W]
    return image * weight[..., None] + larger * (1 - weight[..., None])


def to_crop(points, box, size):
    """Points in the image (..., 68, 2) -> in pixels of its crop by `box` (..., 3)."""
    centre, half = np.split(box[..., None, :], [2], axis=-1)
    result = np.subtract(points, centre - half, dtype=np.float32)    # in place: a long driver has many
    result *= (size / (2 * half)).astype(np.float32)
    result -= 0.5
    return result
