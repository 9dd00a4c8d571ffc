"""losses.py against numbers worked out by hand, and MatConvNet files that the tests write themselves."""
import functools

import dlib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision.models.vgg import cfgs

from conftest import PHOTO, ROOT, networks
from data import to_float, to_uint8
import losses
from beyond.likeness import other_poses
from beyond.recognition import FaceTerm
from beyond.toy import ToyHeads
from losses import (ContentLoss, Features, adversarial_loss, feature_matching_loss, hinge_loss, match_loss,
                    read_matconvnet as read_uncached)
from media.faces import dlib_model, landmark_detector
from media.photos import read_photo
from media.recognition import FaceFeatures, face_chips
from runtime.files import UserError

read_matconvnet = functools.cache(read_uncached)


def test_hinge_and_adversarial_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.25])
    assert hinge_loss(real, fake).item() == pytest.approx((0 + 0.5 + 0 + 1.25) / 2)     # eq. 6
    assert adversarial_loss(fake).item() == pytest.approx(1.375)                        # eq. 4


def test_feature_matching_by_hand():
    fake = [torch.zeros(1, 2, 2, 2, requires_grad=True), torch.full((1, 1), 3.0, requires_grad=True)]
    real = [torch.ones(1, 2, 2, 2, requires_grad=True), torch.ones(1, 1, requires_grad=True)]
    loss = feature_matching_loss(fake, real)
    loss.backward()
    assert loss.item() == pytest.approx(10 * (1 + 2) / 2)       # a mean per block, then over blocks
    assert all(f.grad is not None for f in fake) and all(r.grad is None for r in real)


def test_match_by_hand_is_per_embedding_and_moves_e_but_not_w():
    e = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], requires_grad=True)   # (B=1, K=2, N=2); mean 0
    w = torch.zeros(1, 2, requires_grad=True)
    loss = match_loss(e, w)
    loss.backward()
    assert loss.item() == pytest.approx(10 * 0.5)                       # that of the mean of e would be 0
    assert e.grad.abs().sum() > 0 and w.grad is None


def test_match_loss_reaches_the_embedder_only():
    cfg, E, G, D = networks()
    x = torch.rand(4, 3, 64, 64)
    match_loss(E(x, x).unflatten(0, (2, 2)), D.rows(torch.tensor([0, 1]))).backward()
    assert any(p.grad.abs().sum() > 0 for p in E.parameters()) and D.W.grad is None


def matconvnet(path, letter, meta, average, seed=0):
    """A file as MatConvNet publishes them: a cell array of layers, and the mean.

    The mean is under `meta` or, in older files, at the top.
    """
    rng, c_in, cells = np.random.default_rng(seed), 3, []
    for width in cfgs[letter]:
        if width == "M":
            cells.append({"type": "pool", "name": "pool", "method": "max", "pool": [2.0, 2.0],
                          "stride": 2.0, "pad": 0.0})
            continue
        weights = np.empty((1, 2), object)
        weights[0, 0] = (rng.standard_normal((3, 3, c_in, width)) * (2 / (9 * c_in)) ** .5).astype(np.float32)
        weights[0, 1] = rng.standard_normal((1, width)).astype(np.float32)
        cells += [{"type": "conv", "name": "conv", "weights": weights, "pad": 1.0, "stride": 1.0},
                  {"type": "relu", "name": "relu"}]
        c_in = width
    weights = np.empty((1, 2), object)
    weights[0, 0], weights[0, 1] = np.zeros((1, 1, c_in, 10), np.float32), np.zeros((1, 10), np.float32)
    cells.append({"type": "conv", "name": "fc8", "weights": weights})
    cells.append({"type": "softmax", "name": "prob"})
    array = np.empty((1, len(cells)), object)
    array[0] = cells
    mean = {"normalization": {"averageImage": average, "imageSize": [224.0, 224.0, 3.0]}}
    savemat(path, {"layers": array, **({"meta": mean} if meta else mean)})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mat")
    vgg19, vggface = folder / "imagenet-vgg-verydeep-19.mat", folder / "vgg-face.mat"
    matconvnet(vgg19, "E", True, np.array([123.68, 116.779, 103.939]).reshape(1, 1, 3), 1)
    image = np.zeros((224, 224, 3), np.float32) + np.array([129.0, 104.0, 93.0], np.float32)
    image[:112] += 1
    image[112:] -= 1        # it is an image, of which the mean is used
    matconvnet(vggface, "D", False, image, 2)
    return vgg19, vggface


@pytest.fixture(autouse=True)
def read_once(monkeypatch):
    """Read each file only once for all tests, because it takes seconds in a process of its own."""
    monkeypatch.setattr(losses, "read_matconvnet", read_matconvnet)


def test_matconvnet_both_variants(files):
    layers, mean = read_matconvnet(files[0])
    assert len(layers) == 16 and torch.allclose(mean, torch.tensor([123.68, 116.779, 103.939]))
    layers, mean = read_matconvnet(files[1])
    assert len(layers) == 13 and torch.allclose(mean, torch.tensor([129.0, 104.0, 93.0]), atol=1e-3)


def test_caffe_preprocessing_and_first_layer_by_hand(files):
    """The input is RGB of 0 to 255 minus the mean. Filters are (H, W, in, out) and not flipped."""
    filters = np.random.default_rng(1).standard_normal((3, 3, 3, 64)) * (2 / 27) ** .5
    term = ContentLoss("vgg", *files).terms[0]
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    pixels = (x[0].permute(1, 2, 0).double().numpy() + 1) / 2 * 255 - np.array([123.68, 116.779, 103.939])
    patch = pixels[4:7, 7:10]       # around row 5, column 8
    expected = (patch[..., None] * filters).sum((0, 1, 2)) + read_matconvnet(files[0])[0][0][1].numpy()
    assert np.allclose(term(x)[0][0, :, 5, 8].numpy(), np.maximum(expected, 0), rtol=1e-3, atol=1e-2)


def test_content_loss_is_the_weighted_sum_over_the_papers_layers(files):
    loss = ContentLoss("vgg", *files)
    x, y = torch.rand(1, 3, 64, 64) * 2 - 1, torch.rand(1, 3, 64, 64) * 2 - 1
    expected = 0
    for (path, letter, weight, indices) in ((files[0], "E", .15, [1, 6, 11, 20, 29]),
                                            (files[1], "D", .025, [1, 6, 11, 18, 25])):
        layers, mean = read_matconvnet(path)
        h, k, n = [(v + 1) / 2 * 255 - mean.view(1, 3, 1, 1) for v in (x, y)], 0, 0
        for width in cfgs[letter]:
            if width == "M":
                h, k = [torch.nn.functional.max_pool2d(v, 2) for v in h], k + 1
                continue
            h, n, k = [torch.nn.functional.conv2d(v, *layers[n], padding=1).relu() for v in h], n + 1, k + 2
            if k - 1 in indices:
                expected += weight * (h[0] - h[1]).abs().mean().item()
    assert loss(x, y).item() == pytest.approx(expected, rel=1e-4)
    assert loss(x, x).item() == 0


def test_content_loss_trains_the_picture_and_nothing_else():
    loss = ContentLoss("l1")
    x_hat, x = torch.zeros(1, 3, 8, 8, requires_grad=True), torch.full((1, 3, 8, 8), 0.25, requires_grad=True)
    value = loss(x_hat, x)
    assert value.item() == pytest.approx(300 * 0.25)
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU(inplace=True))
    features = Features(layers, (1,), (0.,) * 3, (1.,) * 3, 1.0)
    loss.terms.append(features.requires_grad_(False))
    loss(x_hat, x).backward()
    assert x_hat.grad.abs().sum() > 0 and all(p.grad is None for p in loss.parameters())


def test_with_vggface_the_face_term_is_not_added_but_serves_the_likeness(files):
    """It once was dropped altogether, and fine-tuning silently lost the loss in other poses."""
    x_hat, x = torch.rand(2, 1, 3, 64, 64) * 2 - 1
    loss = ContentLoss("vgg", *files, extra=FaceTerm())
    assert loss(x_hat, x).item() == pytest.approx(ContentLoss("vgg", *files)(x_hat, x).item())
    _, _, G, _ = networks()
    assert other_poses(x, [ToyHeads(1).load(0, [0])[1]], loss, G, torch.zeros(len(G.P.bias))) is not None


def test_without_vggface_it_says_what_is_lost(files, capsys):
    assert len(ContentLoss("vgg", files[0]).terms) == 1
    assert "VGGFace" in capsys.readouterr().err


def test_face_features_are_dlibs():
    """The vector of an aligned face is dlib's. The term is the weighted sum of relative differences."""
    photo, detect = read_photo(PHOTO), landmark_detector("dlib")
    points = [dlib.point(*p) for p in detect(photo).astype(int).tolist()]
    shape = dlib.full_object_detection(dlib.rectangle(0, 0, *photo.shape[1::-1]), points)
    chip = dlib.get_face_chip(photo, shape, 150, 0.25)
    weights = dlib_model("dlib_face_recognition_resnet_model_v1.dat")
    want = np.array(dlib.face_recognition_model_v1(weights).compute_face_descriptor(chip))
    x = to_float(torch.from_numpy(chip.transpose(2, 0, 1).copy())[None])
    loss = ContentLoss("l1", extra=FaceTerm(2.0))
    assert np.allclose(loss.extra.net.activations(x)[-1][0].numpy(), want, atol=1e-5)
    x_hat = torch.zeros_like(x).requires_grad_()
    *look, who = (((a - b).abs().mean() / b.abs().mean()).item()
                  for a, b in zip(loss.extra.net(x_hat), loss.extra.net(x)))
    value, pixels = loss(x_hat, x), 300 * x.abs().mean().item()
    assert value.item() == pytest.approx(pixels + 2 * (sum(look) + who), rel=1e-4)
    heavy = ContentLoss("l1", extra=FaceTerm(2.0, vector_weight=6.0))
    assert heavy(x_hat, x).item() == pytest.approx(pixels + 2 * (sum(look) + 6 * who), rel=1e-4)
    assert loss(x, x).item() == 0
    value.backward()
    assert x_hat.grad[..., 19:-19, 19:-19].abs().sum() > 0 and all(p.grad is None for p in loss.parameters())


@pytest.mark.parametrize("size", [128, 512])
@pytest.mark.parametrize("angle", [0, 15])
def test_faces_are_aligned_as_dlib_does(size, angle):
    """dlib aligns by 51 points and we by five, but the chips are similar, and so are their vectors."""
    photo = Image.open(PHOTO).rotate(angle, Image.BICUBIC, center=(220, 130)).crop((90, 0, 350, 260))
    points = landmark_detector("dlib")(np.asarray(photo))
    corners = [dlib.point(*p) for p in points.astype(int).tolist()]
    shape = dlib.full_object_detection(dlib.rectangle(0, 0, 260, 260), corners)
    chip = dlib.get_face_chip(np.asarray(photo), shape, 150, 0.25)
    recognition = dlib.face_recognition_model_v1(dlib_model("dlib_face_recognition_resnet_model_v1.dat"))

    x = np.asarray(photo.resize((size, size), Image.BICUBIC)).copy()
    x = to_float(torch.from_numpy(x).movedim(-1, 0)[None])
    points = (points[None] + 0.5) * size / 260 - 0.5
    ours = to_uint8(face_chips(x, points))[0]
    assert np.corrcoef(ours.flat, chip.flat)[0, 1] > 0.95
    with torch.no_grad():
        vector = FaceFeatures().vectors(x, points)[0]
    assert np.linalg.norm(vector - np.array(recognition.compute_face_descriptor(chip))) < 0.3


def test_files_that_are_no_such_networks(files, tmp_path):
    other = tmp_path / "other.mat"
    savemat(other, {"a": [1.0]})
    (tmp_path / "text.mat").write_text("not a mat file")
    for path, words in ((other, "not a MatConvNet network"),
                        (tmp_path / "text.mat", "not a MatConvNet network"),
                        (tmp_path / "none.mat", "no file"), (files[1], "does not hold VGG19")):
        with pytest.raises(UserError, match=words):
            ContentLoss("vgg", path)


def test_squeezenet_content_loss():
    """This needs the ImageNet weights in torch hub's folder, which the repository does not hold."""
    home = ROOT.parent / "shared" / "torch_home"
    if not (home / "hub/checkpoints/squeezenet1_1-b8a52dc0.pth").exists():
        pytest.skip("no SqueezeNet weights at hand")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(home))
        loss = ContentLoss("squeeze")
    net, (x, y) = loss.terms[0], torch.rand(2, 1, 3, 64, 64) * 2 - 1
    mean, std = torch.tensor([.485, .456, .406]).view(3, 1, 1), torch.tensor([.229, .224, .225]).view(3, 1, 1)
    # relu of the first convolution, by torchvision's rules
    h = [net.net[:2](((v + 1) / 2 - mean) / std) for v in (x, y)]
    assert torch.allclose(net(x)[0], h[0], atol=1e-4) and len(net(x)) == 7
    expected = 40 * (x - y).abs().mean() + 0.2 * sum((a - b).abs().mean() for a, b in zip(net(x), net(y)))
    assert loss(x, y).item() == pytest.approx(expected.item(), rel=1e-5) and loss(x, x).item() == 0
