"""Metrics of generated images, as ADM's suite defines them: FID, sFID, IS, precision and recall.

    python fid.py samples/samples.npz VIRTUAL_imagenet256_labeled.npz    # all five
    python fid.py samples/samples.npz photos --features dinov2           # Fréchet distance there
    python fid.py samples/samples.npz digits                             # held-out digits' judges

Samples first, reference second: images as .npz (arr_0), .npy or a folder, or an .npz of moments. A
reference folder is cropped to the samples' size, as data.py does it. `fid` is what the published
Inception says of at least 50,000 samples; every other distance has its space and both counts in
its name, since few images bias it upwards: compare equal counts only.
"""
import argparse
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import time
import zipfile

import run
from run import UserError, blamed_on


def new_file(text):
    """A type for argparse."""
    if os.path.exists(text) or not os.path.isdir(os.path.dirname(text) or "."):
        raise argparse.ArgumentTypeError(f"{text} is there already, or its folder is not")
    return text


def parser():
    p = run.Parser(description=__doc__)
    p.add_argument("samples", help="generated images: .npz, .npy or folder")
    p.add_argument("reference", help="real images, or an .npz of moments; or the word digits: the "
                                     "held-out ones (a folder so named is ./digits)")
    p.flag("features", "inception", "space of the distance: inception, which has all five metrics, "
           "dinov2 (ViT-L), pixels, or any timm model")
    p.add_argument("--weights", type=run.existing_file, metavar="FILE",
                   help="the space's weights (default: downloaded)")
    p.add_argument("--features_kwargs", nargs="*", type=run.key_value, default=[],
                   metavar="KEY=VALUE", help="arguments of timm.create_model, or mean, std and "
                   "input_size in place of the model's own")
    p.add_argument("--save_stats", type=new_file, metavar="FILE",
                   help="keep what was measured of the reference, an .npz that is a reference, too")
    p.flag("batch_size", 32, "images a batch", type=run.count)
    p.flag("workers", min(8, os.cpu_count()), "threads that read files", type=run.count)
    p.device_flag()
    return p


if __name__ == "__main__":     # before torch, which takes seconds: --help and typos are quicker
    args = parser().parse_args()

import numpy as np
import scipy.linalg
import scipy.special
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
import pca
import pretrained

# the weights of 2015 in PyTorch's format, by pytorch-fid; their sha256 begins as the name ends
INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")
FD_DINOV2 = "vit_large_patch14_dinov2.lvd142m"     # FD-DINOv2 (arXiv 2306.04675), on 224 pixels
N_UNBIASED = 50_000                             # samples that the papers' tables use
SPLIT = 5_000                                   # images a split of the Inception Score (ADM's)
NEIGHBOURS = 3                                  # of precision and recall (arXiv 1904.06991; ADM's)
MOMENTS = (("mu", "sigma"), ("mu_s", "sigma_s"))    # names in an .npz: of pool, of spatial (ADM's)
MAX_D = 8_192                                   # channels whose covariance fits in memory: 0.5 GB


def frechet_distance(mu_1, cov_1, mu_2, cov_2):
    """|mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^1/2) between two Gaussians (arXiv 1706.08500).

    mu (d,), cov (d, d), float64. With C = F F^T, from eigh, the roots of the eigenvalues of C_1 C_2
    are the singular values of F_1^T F_2: real, and exact where a covariance is singular, too (a
    root of the eigenvalue 0 plus rounding is 1e-8). ValueError for shapes that differ, NaN and
    infinity.
    """
    moments = mu_1, cov_1, mu_2, cov_2 = [
        np.asarray(moment, np.float64) for moment in (mu_1, cov_1, mu_2, cov_2)]
    if not mu_1.shape * 2 == mu_2.shape * 2 == cov_1.shape == cov_2.shape:
        raise UserError(f"moments of different spaces: {[moment.shape for moment in moments]}")
    if not all(np.isfinite(moment).all() for moment in moments):
        raise UserError("moments hold NaN or infinity")

    def factor(cov):
        values, vectors = scipy.linalg.eigh(cov)
        real = values > len(values) * np.finfo(np.float64).eps * values.max()     # no rounding
        return vectors[:, real] * np.sqrt(values[real])

    product = factor(cov_1).T @ factor(cov_2)
    cross = 2 * scipy.linalg.svdvals(product).sum() if product.size else 0.0
    return max(float(np.square(mu_1 - mu_2).sum() + np.trace(cov_1 + cov_2) - cross), 0.0)


def distance_of_features(features_1, features_2):
    """Fréchet distance between two sets of rows (n, d)."""
    one, two = (pca.Moments(f.shape[1]).update(f) for f in (features_1, features_2))
    return frechet_distance(one.mean, one.cov, two.mean, two.cov)


def inception_score(logits):
    """exp of the mean KL(p(y | x) || p(y)) of logits (n, classes) (arXiv 1606.03498)."""
    log_p = scipy.special.log_softmax(np.asarray(logits, np.float64), 1)
    log_mean = scipy.special.logsumexp(log_p, 0) - np.log(len(log_p))
    return float(np.exp((np.exp(log_p) * (log_p - log_mean)).sum(1).mean()))


def precision_and_recall(samples, reference, k=NEIGHBOURS, block=1024):
    """The share of samples (n, d) within the manifold of the reference (m, d), and the share of the
    reference within that of the samples: in a ball around a row that reaches to its k-th nearest
    neighbour. Float32 tensors on one device; memory: block rows of distances. ValueError for k rows
    or fewer."""
    if min(len(samples), len(reference)) <= k:
        raise UserError(f"precision and recall need more than {k} images on both sides")

    def inside(points, centres):
        radii = torch.cat([                                # itself and k others
            torch.cdist(part, centres).topk(k + 1, largest=False).values[:, -1]
            for part in centres.split(block)])
        return sum(int((torch.cdist(part, centres) <= radii).any(1).sum())
                   for part in points.split(block)) / len(points)

    return inside(samples, reference), inside(reference, samples)


def tf1_resize(x, size):
    """Bilinear as in TensorFlow 1: output pixel i lies at i * n / size of n, where torch says
    (i + 0.5) * n / size - 0.5. x (B, C, H, W) -> (B, C, size, size)."""
    def matrix(n):
        at = torch.arange(size) * (n / size)
        low, rows, weights = at.long(), torch.arange(size), torch.zeros(size, n)
        weights[rows, low] += 1 - (at - low)
        weights[rows, (low + 1).clamp(max=n - 1)] += at - low
        return weights.to(x)

    return matrix(x.shape[2]) @ x @ matrix(x.shape[3]).T


class Inception(torch.nn.Module):
    """The Inception-v3 of TensorFlow's 2015 release, which FID means: timm's with its pools.

    weights: pt_inception-2015-12-05-6726825d.pth, as a path or a state dict. Images uint8
    (B, 3, H, W) -> pool (B, 2048) for FID; spatial (B, 2023), the first 7 channels of Mixed_6d, for
    sFID; logits (B, 1008) without bias, for IS. ValueError if the weights are of another network.
    """
    def __init__(self, weights):
        super().__init__()
        import timm                                        # slow to import: not before it is used
        net = self.net = timm.create_model("inception_v3", num_classes=1008, aux_logits=False)
        with blamed_on("these are not the weights of the 2015 Inception", f"get {INCEPTION}"):
            if not isinstance(weights, dict):
                weights = torch.load(weights, map_location="cpu", weights_only=True)
            net.load_state_dict(weights)
        for block in net.children():
            if hasattr(block, "branch_pool"):
                block.register_forward_pre_hook(self.keep_input)
                block.branch_pool.register_forward_pre_hook(
                    self.maximum if block is net.Mixed_7c else self.average)
        net.Mixed_6d.register_forward_hook(self.keep_spatial)
        self.eval().requires_grad_(False)

    def keep_input(self, block, args):
        self.into_block, = args

    def average(self, branch, args):                       # timm counts the zeros around the image
        return F.avg_pool2d(self.into_block, 3, 1, 1, count_include_pad=False)

    def maximum(self, branch, args):                       # timm averages
        return F.max_pool2d(self.into_block, 3, 1, 1)

    def keep_spatial(self, block, args, h):
        self.spatial = h[:, :7].flatten(1)

    @torch.no_grad()
    def forward(self, images):
        x = (tf1_resize(images.float(), 299) - 128) / 128
        pool = self.net.forward_head(self.net.forward_features(x), pre_logits=True)
        return pool, self.spatial, pool @ self.net.fc.weight.T


def is_published(path):
    """Whether a file is that of INCEPTION, by its sha256."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return digest.startswith(INCEPTION.removesuffix(".pth").rpartition("-")[2])


class Space:
    """What turns images uint8 (B, H, W, 3) into features, numpy float32: [pool], (B, d), or for
    inception [pool, spatial, logits]. UserError if it cannot be had.

    name: inception, dinov2, pixels, or a timm model, whose pooled features are taken; weights: a
    file, None for the published ones; settings: pretrained.timm_network's. Its own `weights` are
    their sha256, and the settings; `published`: whether its distance is FID.
    """
    def __init__(self, name, weights=None, settings=None, device="cpu"):
        self.name, self.device, self.weights, self.published = name, device, "", False
        settings = settings or {}
        if settings and name in ("pixels", "inception") or weights and name == "pixels":
            raise UserError(f"--{'features_kwargs' if settings else 'weights'} means nothing to "
                            f"--features {name}; leave it out")
        if name == "pixels":
            return
        with blamed_on(f"--features {name} cannot be had",
                       "give its weights with --weights FILE; timm.list_models() has the names"):
            if name == "inception":
                self.net = Inception(weights or torch.hub.load_state_dict_from_url(
                    INCEPTION, map_location="cpu", check_hash=True, weights_only=True))
                self.published = not weights or is_published(weights)
            else:
                if name == "dinov2":
                    name, settings = FD_DINOV2, {"img_size": 224} | settings
                self.net, mean, std, size = pretrained.timm_network(name, weights, settings)
                self.mean, self.std = mean.to(device), std.to(device)
                self.size = size or settings.get("img_size",
                                                 self.net.pretrained_cfg["input_size"][-1])
            self.weights = pretrained.weights_hash(self.net) + "".join(
                f" {key}={value}" for key, value in sorted(settings.items()))
            if name != "inception":
                self.net.reset_classifier(0)               # only now: a file has to fit with it
            self.net.to(device, memory_format=torch.channels_last)
            self(np.zeros((1, 32, 32, 3), np.uint8))       # settings that do not fit fail here

    @torch.no_grad()
    @pretrained.full_precision
    def __call__(self, images):
        images = torch.tensor(images).permute(0, 3, 1, 2).to(self.device)
        features = [part.float().cpu().numpy() for part in self.features(images)]
        if features[0].ndim != 2 or features[0].shape[1] > MAX_D:
            raise UserError(f"--features {self.name}: its features are {features[0].shape}, not "
                            f"(B, d) with d at most {MAX_D}; take another space")
        return features

    def features(self, images):
        if self.name == "pixels":
            return data.from_uint8(images).flatten(1),
        if self.name == "inception":
            return self.net(images)
        x = F.interpolate(images.float() / 255, (self.size, self.size), mode="bicubic",
                          antialias=True, align_corners=False).clamp(0, 1)
        return self.net((x - self.mean) / self.std),


class ImageSet:
    """The images at a path, to be read once, or the moments stored there. Images: the files in a
    folder and its subfolders, an .npy, or an .npz's arr_0; n of them, of `size` (H, W), which are
    None where only moments are. `names`: of an .npz's arrays. What a file is, its content decides,
    not its name. UserError if it is none of these.

    crop: pixels a side that the files of a folder are cropped to; `cropped` are those that had
    another size. None: all must be of one size.
    """
    def __init__(self, path, crop=None):
        self.path, self.crop, self.cropped = path, crop, set()
        self.names, self.files, self.n, self.size = [], [], None, None
        with self.blamed():
            if os.path.isdir(path):
                files, _, _ = data.list_images(path)
                self.files = [os.path.join(path, os.fsdecode(file)) for file in files]
                shape, dtype = (len(files), *self.read(self.files[0]).shape), np.uint8
            else:
                if zipfile.is_zipfile(path):
                    archive = zipfile.ZipFile(path)
                    self.names = [name.removesuffix(".npy") for name in archive.namelist()]
                    if "mu" in self.names and "arr_0" not in self.names:
                        return
                self.file = archive.open("arr_0.npy") if self.names else open(path, "rb")
                np.lib.format.read_magic(self.file)
                shape, by_column, dtype = np.lib.format.read_array_header_1_0(self.file)
                if by_column:
                    raise ValueError("the array is stored column by column")
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[0] < 2:
            raise UserError(f"{path}: images must be uint8 (n, H, W, 3), two or more, got {dtype} "
                            f"{shape}")
        self.n, self.size = shape[0], shape[1:3]

    def read(self, path):
        """uint8 (H, W, 3), grey and the like turned to RGB. UserError if it is no whole image."""
        with blamed_on(f"{path} is no image", "give whole images, and nothing beside them"):
            if self.crop:
                with Image.open(path) as image:            # reads its header alone
                    if image.size != (self.crop, self.crop):
                        self.cropped.add(path)
            pixels = data.load_image(path, self.crop)
        if self.size not in (None, pixels.shape[:2]):
            raise UserError(f"{path} has {pixels.shape[:2]} pixels, and must have the first's "
                            f"{self.size}; only a reference folder is cropped, to the size of "
                            "square samples")
        return pixels

    def blamed(self):
        return blamed_on(f"{self.path} cannot be read as images", "give an .npz as sample.py "
                         "writes it, an .npy, or a folder of images")

    def batches(self, batch_size, workers=1):
        """Arrays uint8 (B, H, W, 3), in order; of files, read ahead by that many threads, since
        Pillow decodes beside Python. UserError if an image cannot be read."""
        def read(start):
            n = min(batch_size, self.n - start)
            if self.files:
                return np.stack([self.read(path) for path in self.files[start:start + n]])
            pixels = self.file.read(n * math.prod(self.size) * 3)
            return np.frombuffer(pixels, np.uint8).reshape(n, *self.size, 3)

        with self.blamed():
            yield from run.prefetch(read, range(0, self.n, batch_size),
                                    workers if self.files else 1)

    def array(self, name):
        """An array of the .npz; of no dimensions: a number or a word."""
        with np.load(self.path, allow_pickle=False) as file:
            return file[name] if file[name].ndim else file[name].item()

    def stored(self, space):
        """What measure() returned, as --save_stats keeps it, or of it the moments in ADM's
        reference batches. UserError if they are of another space."""
        names = {name for pair in MOMENTS if pair[0] in self.names for name in pair}
        names |= {"n", "inception_score", "pool", "space", "weights"} & set(self.names)
        with blamed_on(f"{self.path} cannot be read as moments", "make it anew with --save_stats"):
            stored = {"n": None} | {name: self.array(name) for name in names}
        found = stored.pop("space", "inception"), stored.pop("weights", space.weights)
        if found != (space.name, space.weights):
            raise UserError("{} holds moments of {} {!s:.16}, not of {} {:.16}; give its images, "
                            "or that space".format(self.path, *found, space.name, space.weights))
        return stored

    def statistics(self, space, batch_size=32, workers=1):
        """What is stored of the images, as measure() returns it, else what is measured; for
        inception with pool. UserError if they cannot be read, or moments are of another space."""
        ours = "mu" in self.names and (space.name == "inception" or self.n is None)
        stored = self.stored(space) if ours else {}
        if "pool" in stored or self.n is None:
            return stored
        batches = tqdm(self.batches(batch_size, workers), self.path, -(-self.n // batch_size))
        # ADM's reference batches hold moments of all images, and some of these
        return measure(batches, space, self.path, keep=space.name == "inception") | stored


def measure(batches, space, name="images", keep=False):
    """What the metrics need, by name, of batches of images uint8 (B, H, W, 3) in a Space: n, mu and
    sigma of pool, mu_s and sigma_s of spatial, inception_score, the mean over splits of SPLIT
    images in order, and with `keep` pool (n, d) itself. UserError for features that are not finite.
    """
    moments, scores, kept = [], [], []
    rows = (row for images in batches for row in zip(*space(images)))
    while split := list(itertools.islice(rows, SPLIT)):
        features = [np.stack(part) for part in zip(*split)]
        moments = moments or [pca.Moments(part.shape[1]) for part in features[:2]]
        with blamed_on(f"{name} in the space {space.name}", "are its weights damaged?"):
            for each, part in zip(moments, features):
                each.update(part)
        scores += [inception_score(logits) for logits in features[2:]]
        kept += features[:keep]
    statistics = {"n": moments[0].n}
    for each, (mu, sigma) in zip(moments, MOMENTS):
        statistics |= {mu: each.mean, sigma: each.cov}
    if scores:
        statistics["inception_score"] = float(np.mean(scores))
    if keep:
        statistics["pool"] = np.concatenate(kept)
    return statistics


def metrics_between(samples, reference, space):
    """Metrics by name, of what measure() returned in one Space for both."""
    counts = f"_{samples['n'] or 'stored'}_vs_{reference['n'] or 'stored'}"
    names = f"frechet_{space.name}", f"frechet_{space.name}_spatial"
    if space.published:
        counts = counts if (samples["n"] or 0) < N_UNBIASED else ""
        names = "fid", "sfid"
    metrics = {name + counts: frechet_distance(samples[mu], samples[sigma],
                                               reference[mu], reference[sigma])
               for name, (mu, sigma) in zip(names, MOMENTS) if mu in samples and mu in reference}
    if "inception_score" in samples:
        metrics["inception_score"] = samples["inception_score"]
    if "pool" in samples and "pool" in reference:
        metrics["precision"], metrics["recall"] = precision_and_recall(*(
            torch.from_numpy(each["pool"]).to(space.device) for each in (samples, reference)))
    return metrics


def grey_pixels(images):
    """uint8 (n, H, W, 3) with equal channels -> (n, H W) in [-1, 1], float64."""
    return data.from_uint8(torch.tensor(images[..., 0])).flatten(1).numpy().astype(np.float64)


@functools.lru_cache(maxsize=1)
def digit_classifiers():
    """Two scikit-learn classifiers trained on real training digits: an SVM that reads digits, and
    an MLP whose hidden layer is a feature space. Neither knows of the convnet that makes z."""
    from sklearn.neural_network import MLPClassifier
    from sklearn.svm import SVC
    x, y, held_out = data.digits()
    features, y = grey_pixels(data.to_images(x[~held_out])), y[~held_out].numpy()
    reader = SVC(C=10, gamma=1 / 64).fit(features, y)
    mlp = MLPClassifier((64,), alpha=1e-3, max_iter=300, random_state=0).fit(features, y)
    return reader, mlp


def hidden_layer(images):
    """uint8 digits (n, 8, 8, 3) -> ReLU activations (n, 64) of the MLP judge's hidden layer."""
    _, mlp = digit_classifiers()
    return np.maximum(grey_pixels(images) @ mlp.coefs_[0] + mlp.intercepts_[0], 0)


def digit_distances(images, reference):
    """Fréchet distances, by name, between digits uint8 (n, 8, 8, 3) and (m, 8, 8, 3)."""
    return {f"frechet_{name}": distance_of_features(space(images), space(reference))
            for name, space in (("pixels", grey_pixels), ("classifier", hidden_layer))}


def judge_digits(images, y=None):
    """Metrics, by name, of generated digits uint8 (n, 8, 8, 3) against the held-out ones. y (n,):
    the classes that were asked for; None for an unconditional model."""
    x, real_y, held_out = data.digits()
    reference, real_y = data.to_images(x[held_out]), real_y[held_out].numpy()
    metrics = {f"{name}_{len(images)}_vs_{len(reference)}": distance
               for name, distance in digit_distances(images, reference).items()}
    if y is not None:
        reader, _ = digit_classifiers()
        for name, digits, labels in (
                ("classifier_accuracy_percent", images, y),
                ("classifier_accuracy_on_real_percent", reference, real_y)):
            metrics[name] = 100 * float((reader.predict(grey_pixels(digits)) == labels).mean())
    return metrics


def metrics_of_digits(args):
    """Metrics of the digits in args.samples, by classifiers of real digits."""
    of_others = args.weights, args.features_kwargs, args.save_stats, args.device
    if args.features != "inception" or any(of_others):
        raise UserError("the reference digits has judges of its own; leave out --features, "
                        "--weights, --features_kwargs, --save_stats and --device")
    images, y = ImageSet(args.samples), None
    if images.size != (8, 8):
        raise UserError(f"{args.samples} holds images of {images.size}, digits are of (8, 8)")
    if "y" in images.names:
        with blamed_on(f"{args.samples}: its y cannot be read", "it must hold a class an image"):
            y = images.array("y").reshape(images.n)
    return judge_digits(np.concatenate(list(images.batches(1000))), y)


def metrics_in_space(args):
    """Metrics in the space that args say, and what they are of."""
    samples = ImageSet(args.samples)
    height, width = samples.size or (None, 0)
    reference = ImageSet(args.reference, crop=width if width == height else None)
    space = Space(args.features, args.weights, dict(args.features_kwargs),
                  run.pick_device(args.device))
    # what is stored first: if it does not fit, nothing was measured for it
    found = {each: each.statistics(space, args.batch_size, args.workers)
             for each in sorted((samples, reference), key=lambda each: "mu" not in each.names)}
    with blamed_on(f"{args.samples} and {args.reference} cannot be compared",
                   "make their moments anew with --save_stats"):
        metrics = metrics_between(found[samples], found[reference], space)
    if args.save_stats:
        kept = {name: value for name, value in found[reference].items() if value is not None}
        kept |= {"space": space.name, "weights": space.weights}
        run.write_whole(args.save_stats, lambda file: np.savez(file, **kept))
    result = metrics | {"n_samples": found[samples]["n"], "n_reference": found[reference]["n"],
                        "space": space.name, "weights": space.weights}
    if reference.cropped:
        print(f"{len(reference.cropped)} of {reference.n} images of {args.reference} had another "
              f"size than the samples and were cropped to {width} pixels")
        result |= {"n_cropped": len(reference.cropped), "cropped_to": width}
    return result


def main(args):
    result = metrics_of_digits(args) if args.reference == "digits" else metrics_in_space(args)
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name:40s} {value:.4f}")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm", "scipy")}
    print(json.dumps(result | {"samples": args.samples, "reference": args.reference,
                               "versions": versions, "date": time.strftime("%Y-%m-%d")}))


if __name__ == "__main__":
    run.run_cli(main, args)
