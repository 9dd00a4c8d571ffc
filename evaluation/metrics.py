"""The metrics of Sec. 4 (SSIM, CSIM, FID), and ours: landmark errors, movements, whom a frame shows."""
import warnings

import numpy as np
import torch
from PIL import Image

from beyond.face3d import LIPS, fit
from data import to_float
from media.faces import five_points
from runtime.files import UserError, raise_if_out_of_memory

STILL = 1e-6    # a standard deviation below this is a rounding error, in eye distances or radians
SIDE = 256      # smaller frames are enlarged to this many pixels before a face is looked for


def ssim(a, b):
    """Structural similarity [41] of two frames uint8 (S, S, 3), with the Gaussian window of its authors."""
    from skimage.metrics import structural_similarity
    window = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    return float(structural_similarity(a, b, channel_axis=2, **window))


# ---------------------------------------------------------------------------------------- landmarks

def enlarged(frame, points):
    """Frame uint8 (S, S, 3), landmarks (68, 2) -> both at 256 pixels or more."""
    scale = max(1, SIDE / len(frame))
    size = round(len(frame) * scale)
    frame = np.asarray(Image.fromarray(frame).resize((size, size), Image.BICUBIC))
    return frame, (points + 0.5) * scale - 0.5      # pixel centres to pixel centres


def detect_again(frame, points, detect):
    """The landmarks detected on a generated frame, and those that it was generated from, (68, 2) each.

    Both are in pixels of the enlarged frame. The first is None if no face is detected.
    """
    frame, points = enlarged(frame, points)
    return detect(frame), points


def points_error(detected, points):
    """The mean distance of 68 landmarks, in per cent of the distance between the outer eye corners."""
    error = np.linalg.norm(detected - points, axis=1).mean()
    return float(100 * error / np.linalg.norm(points[36] - points[45]))


def landmark_error(frame, points, detect):
    """points_error() of the landmarks detected on a generated frame. None if no face is detected."""
    detected, points = detect_again(frame, points, detect)
    return None if detected is None else points_error(detected, points)


# ------------------------------------------------ movements, measured with the face model of face3d.py

def movements(frames, points, driver, detect, model):
    """How well generated frames (n, S, S, 3) follow the driver's movements -> a dict of numbers.

    points (n, 68, 2): the landmarks that the frames were generated from, in their pixels.
    driver (n, 68, 2): the driver's own landmarks.  model: a Face3D.
    "found" is the share of frames in which a face is detected. If it is 0, it is the only number. The others
    are measured in these frames: "landmark_error" in per cent of the eye distance; "mouth_r", "yaw_r" and
    "roll_r", the correlations with the driver; "mouth_ratio", the standard deviation of the mouth's opening
    over that of the driver's. The last four are NaN if the driver does not move.
    """
    pairs = [detect_again(frame, p, detect) for frame, p in zip(frames, points)]
    seen = [k for k, (detected, _) in enumerate(pairs) if detected is not None]
    if not seen:
        return {"found": 0.0}
    result, driver = fit(np.stack([pairs[k][0] for k in seen]), model), fit(driver[seen], model)
    lips, driver_lips = result.opening[:, LIPS].mean(axis=1), driver.opening[:, LIPS].mean(axis=1)
    return {"found": len(seen) / len(pairs),
            "landmark_error": np.mean([points_error(*pairs[k]) for k in seen]),
            "mouth_r": correlation(lips, driver_lips),
            "mouth_ratio": lips.std() / driver_lips.std() if driver_lips.std() > STILL else np.nan,
            "yaw_r": correlation(result.pose[:, 0], driver.pose[:, 0]),
            "roll_r": correlation(result.pose[:, 2], driver.pose[:, 2])}


def correlation(a, b):
    """Pearson's correlation of a (n,) and b (n,). NaN if n < 3, or if one of them does not vary."""
    if len(a) < 3 or min(a.std(), b.std()) <= STILL:
        return np.nan
    return float(np.corrcoef(a, b)[0, 1])


def crossed(points, model):
    """The share of n frames, given their landmarks (n, 68, 2), in which the lips cross somewhere."""
    return float((fit(points, model).opening[:, LIPS] < 0).any(axis=1).mean())


def change(frames):
    """The mean absolute change of a channel (0 to 255) from frame to frame: uint8 (n, S, S, 3).

    It is NaN if n = 1.
    """
    if len(frames) < 2:
        return np.nan
    return float(np.abs(np.diff(frames.astype(np.float32), axis=0)).mean())


# ----------------------------------- CSIM: the cosine between two vectors of a face recognition network

# The person's right eye, left eye, nose and corners of the mouth in an aligned face of 112 x 112 pixels.
ARCFACE_POINTS = [(38.29, 51.70), (73.53, 51.50), (56.03, 71.74), (41.55, 92.37), (70.73, 92.20)]


def torchscript_recognition(path, device):
    """-> a function vector(frame uint8 (S, S, 3), landmarks (68, 2)) that returns (d,) of norm 1.

    path: of a network like ArcFace, stored as TorchScript. It takes an aligned RGB face (1, 3, 112, 112) in
    [-1, 1] and returns (1, d). Raises UserError if the file holds anything else.
    """
    from skimage.transform import estimate_transform, warp
    try:
        # torch.jit is deprecated and warns, but such files are still common
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            net = torch.jit.load(path, device).eval()
        if net(torch.zeros(1, 3, 112, 112, device=device)).ndim != 2:
            raise ValueError("its result is not a vector")
    except Exception as e:  # torch raises many types on foreign files
        raise_if_out_of_memory(e)
        kind = type(e).__name__
        raise UserError(f"{path} is not a TorchScript network that turns (1, 3, 112, 112) into (1, d) "
                        f"({kind}): export one with torch.jit.trace") from None

    def vector(frame, points):
        align = estimate_transform("similarity", five_points(points), np.array(ARCFACE_POINTS))
        aligned = warp(frame, align.inverse, output_shape=(112, 112), preserve_range=True)
        aligned = aligned.round().astype(np.uint8).transpose(2, 0, 1).copy()
        x = to_float(torch.from_numpy(aligned)[None], device)
        with torch.no_grad():
            v = net(x)[0].cpu().double().numpy()
        return v / np.linalg.norm(v)

    return vector


# ---------------------------------------- whom a frame shows, according to recognition vectors of norm 1

def mean_vector(vectors):
    """The recognition vectors of n frames of a person (n, d) -> their mean, scaled to norm 1 (d,)."""
    mean = np.mean(vectors, axis=0)
    return mean / np.linalg.norm(mean)


def mean_people(vectors, people):
    """The mean recognition vector of each person over the frames of all their videos -> {person: (d,)}.

    vectors: {video: (n, d)}.  people: {video: the person it shows}.
    """
    means = {}
    for person in people.values():
        frames = [vectors[video] for video in people if people[video] == person]
        means[person] = mean_vector(np.concatenate(frames))
    return means


def rank(vectors, people, k):
    """1 + the number of people who are nearer to a vector than person k is: vectors (n, d) -> (n,).

    people (P, d): the mean vector of each person.  Near means a high cosine.
    """
    cosines = vectors @ people.T                                        # (n, P)
    return 1 + (cosines > cosines[:, [k]]).sum(axis=1)


def puppet_identity(vectors, photo, others, driver, people, k):
    """Whom the generated frames of a driven person show, by recognition vectors (n, d) -> {name: number}.

    photo (d,): the vector of the person's photo that was driven.
    others (h, d): of other photos of the same person.
    driver (n, d): of the driver's frames, or None.
    people (P, d), k: as in rank(). The photo itself contributes to none of them.
    "csim", "csim_photo" and "csim_driver" are mean CSIMs to the other photos, to the photo and to the driver.
    "nearest" is the share of frames that are nearest to the person, "nearer_driver" the share that are nearer
    to the driver than to the other photos.
    """
    csim = (vectors @ others.T).mean(axis=1)                            # (n,)
    figures = {"csim": csim.mean(), "csim_photo": (vectors @ photo).mean(),
               "nearest": (rank(vectors, people, k) == 1).mean()}
    if driver is not None:
        to_driver = (vectors * driver).sum(axis=1)
        figures |= {"csim_driver": to_driver.mean(), "nearer_driver": (to_driver > csim).mean()}
    return figures


# -------------------------------------------------------------------------------- Fréchet distances

def frechet(real, fake):
    """The Fréchet distance between two Gaussians with the means and covariances of vectors (n, d) and (m, d).

    It is |mean - mean'|^2 + tr(C + C' - 2 (C C')^1/2). The FID [13] is this distance between features of the
    Inception network.
    """
    C, C_fake = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    values, vectors = np.linalg.eigh(C)
    root = vectors * values.clip(0) ** .5 @ vectors.T                   # C^1/2
    # C C' has the eigenvalues of C^1/2 C' C^1/2, which is symmetric, so that a small n gives no complex ones
    trace = np.linalg.eigvalsh(root @ C_fake @ root).clip(0) ** .5
    shift = real.mean(0) - fake.mean(0)
    return float(shift @ shift + C.trace() + C_fake.trace() - 2 * trace.sum())


def inception(path, device):
    """FID's network from torch-fidelity, as a function of uint8 (B, 3, H, W) that returns (B, 2048).

    Raises UserError if the file holds other weights.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Extractor
    try:
        torch.load(path, map_location="cpu", weights_only=True)     # torch-fidelity would run a pickle's code
        net = Extractor("inception-v3-compat", ["2048"], feature_extractor_weights_path=path).to(device)
    except Exception as e:
        raise_if_out_of_memory(e)
        kind = type(e).__name__
        raise UserError(f"{path} does not hold the weights of the FID's Inception network ({kind}): get them "
                        "from torch-fidelity's releases") from None
    return lambda images: net(images.to(device))[0].cpu()


def fid_statistics(frames, network):
    """The mean and covariance of the network's features over two or more frames uint8 (S, S, 3)."""
    from torch_fidelity.metric_fid import fid_features_to_statistics
    images = torch.from_numpy(np.stack(frames)).movedim(-1, 1)          # (n, 3, S, S)
    with torch.no_grad():
        features = [network(batch).double() for batch in images.split(32)]
    return fid_features_to_statistics(torch.cat(features))


def fid(real, fake):
    """The Fréchet inception distance [13] between two results of fid_statistics(), from torch-fidelity."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
    return fid_statistics_to_metric(real, fake, verbose=False)[KEY_METRIC_FID]
