"""How generated frames are judged: SSIM, CSIM, FID, the landmarks found again, movements (Sec. 4)."""
import warnings

import numpy as np
import torch
from PIL import Image

from beyond.face3d import LIPS, fit
from data import to_float
from media.faces import dlib_model, five_points
from runtime.files import UserError

STILL = 1e-6  # a smaller deviation is rounding, in eye distances or radians
SIDE = 256  # smaller frames are enlarged to this many pixels before a face is looked for


def ssim(a, b):
    """Structural similarity [41], with its authors' Gaussian window, of two frames uint8 (S, S, 3)."""
    from skimage.metrics import structural_similarity
    window = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    return float(structural_similarity(a, b, channel_axis=2, **window))


# ---------------------------------------------------------------------------------------- landmarks

def enlarged(frame, points):
    """-> the frame at 256 pixels or more, and its landmarks there."""
    scale = max(1, SIDE / len(frame))
    size = round(len(frame) * scale)
    frame = np.asarray(Image.fromarray(frame).resize((size, size), Image.BICUBIC))
    return frame, (points + 0.5) * scale - 0.5      # pixel centres to pixel centres


def found_again(frame, points, detect):
    """-> the 68 points found on a frame (68, 2), None where no face is found, and those that drove it.

    Both in pixels of the enlarged frame.
    """
    frame, points = enlarged(frame, points)
    return detect(frame), points


def points_error(again, points):
    """Mean distance of the 68 points, in per cent of the distance between the outer eye corners."""
    error = np.linalg.norm(again - points, axis=1).mean()
    return float(100 * error / np.linalg.norm(points[36] - points[45]))


def landmark_error(frame, points, detect):
    """points_error() of the points found again on a frame; None where no face is found."""
    again, points = found_again(frame, points, detect)
    return None if again is None else points_error(again, points)


# --------------------------------------------------------------- movements, by the face of face3d.py

def movements(frames, points, driver, detect, face):
    """How far the driver's movements were taken over, by the landmarks found again: frames (n, S, S, 3).

    points (n, 68, 2): those that drove them.  driver (n, 68, 2): the driver's own.
    -> found, the share of frames with a face, and of these the landmark error, correlations of mouth, yaw
    and roll with the driver's, and the mouth's deviation over the driver's; NaN where he is still.
    """
    pairs = [found_again(frame, p, detect) for frame, p in zip(frames, points)]
    seen = [k for k, (again, _) in enumerate(pairs) if again is not None]
    if not seen:
        return {"found": 0.0}
    result, driver = fit(np.stack([pairs[k][0] for k in seen]), face), fit(driver[seen], face)
    lips, driver_lips = result.opening[:, LIPS].mean(axis=1), driver.opening[:, LIPS].mean(axis=1)
    return {"found": len(seen) / len(pairs),
            "landmark_error": np.mean([points_error(*pairs[k]) for k in seen]),
            "mouth_r": correlation(lips, driver_lips),
            "mouth_ratio": lips.std() / driver_lips.std() if driver_lips.std() > STILL else np.nan,
            "yaw_r": correlation(result.pose[:, 0], driver.pose[:, 0]),
            "roll_r": correlation(result.pose[:, 2], driver.pose[:, 2])}


def correlation(a, b):
    """Pearson's; NaN of fewer than 3, and where one of the two does not vary."""
    if len(a) < 3 or min(a.std(), b.std()) <= STILL:
        return np.nan
    return float(np.corrcoef(a, b)[0, 1])


def crossed(points, face):
    """The share of faces (n, 68, 2) with crossed lips: somewhere the upper one lies below the lower."""
    return float((fit(points, face).opening[:, LIPS] < 0).any(axis=1).mean())


def change(frames):
    """Mean change from frame to frame, in levels: uint8 (n, S, S, 3). NaN of a single frame."""
    if len(frames) < 2:
        return np.nan
    return float(np.abs(np.diff(frames.astype(np.float32), axis=0)).mean())


# --------------------------------------------------------- CSIM: the cosine of two of these vectors

# By dlib's network, of photos of 64 pixels and more (LFW):
STRANGERS = 0.90    # below it lies 1 in 100 pairs of one person's photos, and most pairs of strangers
SAME = 0.92         # above it lie 1 in 500 pairs of strangers, and 19 in 20 of one person's

def dlib_recognition():
    """-> vector(frame uint8 (S, S, 3), points (68, 2)): 128 numbers of norm 1, by dlib's network."""
    import dlib
    net = dlib.face_recognition_model_v1(dlib_model("dlib_face_recognition_resnet_model_v1.dat"))

    def vector(frame, points):
        frame, points = enlarged(frame, points)
        corners = [dlib.point(*p) for p in points.round().astype(int).tolist()]
        shape = dlib.full_object_detection(dlib.rectangle(0, 0, *frame.shape[:2]), corners)
        v = np.array(net.compute_face_descriptor(frame, shape))     # dlib aligns the face by its landmarks
        return v / np.linalg.norm(v)

    return vector


# Where an aligned face of 112 pixels has the person's right eye, left eye, nose and corners of the mouth.
ARCFACE_POINTS = [(38.29, 51.70), (73.53, 51.50), (56.03, 71.74), (41.55, 92.37), (70.73, 92.20)]


def torchscript_recognition(path, device):
    """-> vector() as above, by an ArcFace-like network.

    It takes RGB (1, 3, 112, 112) in [-1, 1], aligned, and returns (1, n).
    """
    from skimage.transform import estimate_transform, warp
    try:
        # torch.jit is on its way out, and warns; such files are not
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            net = torch.jit.load(path, device).eval()
        if net(torch.zeros(1, 3, 112, 112, device=device)).ndim != 2:
            raise ValueError("its result is no vector")
    except Exception as e:  # torch raises many types on foreign files
        kind = type(e).__name__
        raise UserError(f"{path} is not a TorchScript network that makes (1, n) of (1, 3, 112, 112) "
                        f"({kind})") from None

    def vector(frame, points):
        align = estimate_transform("similarity", five_points(points), np.array(ARCFACE_POINTS))
        face = warp(frame, align.inverse, output_shape=(112, 112), preserve_range=True)
        face = face.round().astype(np.uint8).transpose(2, 0, 1).copy()
        x = to_float(torch.from_numpy(face)[None], device)
        with torch.no_grad():
            v = net(x)[0].cpu().double().numpy()
        return v / np.linalg.norm(v)

    return vector


# ------------------------------------------------------- whom a frame shows, by vectors of norm 1

def mean_vector(vectors):
    """(n, d) -> (d,), of norm 1 again: a person by n frames."""
    mean = np.mean(vectors, axis=0)
    return mean / np.linalg.norm(mean)


def mean_people(vectors, people):
    """vectors: {video: (n, d)}, people: {video: who it shows} -> {who: (d,), the mean of all its frames}."""
    persons = {}
    for who in people.values():
        frames = [vectors[name] for name in people if people[name] == who]
        persons[who] = mean_vector(np.concatenate(frames))
    return persons


def rank(vectors, people, k):
    """Of every vector (n, d): 1 where person k is the nearest of the people (P, d), 2 where one is nearer."""
    cosines = vectors @ people.T                                        # (n, P)
    return 1 + (cosines > cosines[:, [k]]).sum(axis=1)


def likeness(vectors, photo, others, driver, people, k):
    """Whom a puppet shows: vectors (n, d) of a person's photo that somebody else drives.

    photo (d,), others (h, d): of this photo and of others of the person.  driver (n, d): of the frames
    that drove it, or None.  people (P, d), k: of rank(); the photo itself is in none of them.
    -> mean CSIM to other photos, to the photo, to the driver; shares of frames.
    """
    csim = (vectors @ others.T).mean(axis=1)                            # (n,)
    figures = {"csim": csim.mean(), "csim_photo": (vectors @ photo).mean(),
               "first": (rank(vectors, people, k) == 1).mean()}
    if driver is not None:
        to_driver = (vectors * driver).sum(axis=1)
        figures |= {"csim_driver": to_driver.mean(), "nearer_driver": (to_driver > csim).mean()}
    return figures


# -------------------------------------------------------------------------------- Frechet distances

def frechet(real, fake):
    """Frechet distance between two Gaussians, which have the moments of vectors (n, d) and (m, d).

    |mean - mean'|^2 + tr(C + C' - 2 (C C')^1/2). Only of one certain network's features it is the FID [13].
    """
    C, C_fake = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    values, vectors = np.linalg.eigh(C)
    root = vectors * values.clip(0) ** .5 @ vectors.T                   # C^1/2
    # C C' has the eigenvalues of C^1/2 C' C^1/2, which is symmetric: no imaginary parts where n is small
    trace = np.linalg.eigvalsh(root @ C_fake @ root).clip(0) ** .5
    shift = real.mean(0) - fake.mean(0)
    return float(shift @ shift + C.trace() + C_fake.trace() - 2 * trace.sum())


def inception(path, device):
    """FID's network by torch-fidelity: uint8 (B, 3, H, W) -> (B, 2048). UserError for a foreign file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Extractor
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # the library would run a pickle's code
        net = Extractor("inception-v3-compat", ["2048"], feature_extractor_weights_path=path).to(device)
    except Exception as e:
        kind = type(e).__name__
        raise UserError(f"{path} does not hold the weights of FID's network ({kind})") from None
    return lambda images: net(images.to(device))[0].cpu()


def fid_statistics(frames, network):
    """Mean and covariance of the network's features of two or more frames uint8 (S, S, 3)."""
    from torch_fidelity.metric_fid import fid_features_to_statistics
    images = torch.from_numpy(np.stack(frames)).movedim(-1, 1)          # (n, 3, S, S)
    with torch.no_grad():
        features = [network(part).double() for part in images.split(32)]
    return fid_features_to_statistics(torch.cat(features))


def fid(real, fake):
    """Frechet inception distance [13] between two results of fid_statistics, by torch-fidelity."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
    return fid_statistics_to_metric(real, fake, verbose=False)[KEY_METRIC_FID]
