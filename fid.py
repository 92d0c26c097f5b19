"""Metrics of generated images, as ADM's suite defines them: FID, sFID, IS, precision and recall.

    python fid.py samples/samples.npz VIRTUAL_imagenet256_labeled.npz    # all five
    python fid.py samples/samples.npz photos --features dinov2           # Fréchet distance there
    python fid.py samples/samples.npz digits                             # held-out digits' judges

Samples first, reference second: .npz (arr_0, or stored moments), .npy or a folder of images. Only
what Inception sees is called FID; other distances are named after their space and the counts. Few
images bias them all upwards: compare equal counts only.
"""
import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pickle
import sys
import time
import zipfile
import zlib

import numpy as np
import scipy.linalg
import scipy.special
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

import data
import pca

# the 2015 weights in PyTorch's format, by pytorch-fid; the hash in the name is checked
INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")
# FD-DINOv2 (arXiv 2306.04675): ViT-L's class token on 224 pixels
DINOV2, DINOV2_PIXELS = "vit_large_patch14_dinov2.lvd142m", 224
N_UNBIASED = 50_000                             # samples that the papers' tables use
SPLIT = 5_000                                   # images a split of the Inception Score (ADM's)
NEIGHBOURS = 3                                  # of precision and recall (arXiv 1904.06991; ADM's)
ROWS = 1_024                                    # features that go into the moments at once
MOMENTS = (("mu", "sigma"), ("mu_s", "sigma_s"))    # names in an .npz: of pool, of spatial (ADM's)
MAX_D = 8_192                                   # channels whose covariance fits in memory: 0.5 GB


def frechet_distance(mu_1, cov_1, mu_2, cov_2):
    """|mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^1/2) between two Gaussians (arXiv 1706.08500).

    mu (d,), cov (d, d), float64. The last trace is the sum of the roots of the eigenvalues of the
    symmetric C_1^1/2 C_2 C_1^1/2. With C = F F^T, from eigh, they are the singular values of
    F_1^T F_2: real, and exact where a covariance is singular, too (a root of the eigenvalue 0 plus
    rounding is 1e-8). ValueError for shapes that differ, NaN and infinity.
    """
    mu_1, cov_1, mu_2, cov_2 = (np.asarray(a, np.float64) for a in (mu_1, cov_1, mu_2, cov_2))
    if not (mu_1.shape == mu_2.shape and cov_1.shape == cov_2.shape == (len(mu_1), len(mu_1))):
        raise ValueError("moments of different spaces: "
                         f"{mu_1.shape} {cov_1.shape} and {mu_2.shape} {cov_2.shape}")
    if not all(np.isfinite(a).all() for a in (mu_1, cov_1, mu_2, cov_2)):
        raise ValueError("moments hold NaN or infinity")

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


class InceptionScore:
    """exp of the mean KL(p(y | x) || p(y)) over each split of SPLIT images in order, the last one
    maybe shorter; their mean (arXiv 1606.03498). Logits are kept until their split is full."""
    def __init__(self):
        self.scores, self.waiting = [], []

    def update(self, logits):
        """Add logits (B, classes), of any float type."""
        self.waiting.extend(np.asarray(logits, np.float64))
        while len(self.waiting) >= SPLIT:
            self.scores.append(self.of_split(self.waiting[:SPLIT]))
            self.waiting = self.waiting[SPLIT:]

    @staticmethod
    def of_split(logits):
        log_p = scipy.special.log_softmax(np.stack(logits), 1)
        log_mean = scipy.special.logsumexp(log_p, 0) - np.log(len(log_p))
        return float(np.exp((np.exp(log_p) * (log_p - log_mean)).sum(1).mean()))

    @property
    def splits(self):
        """Their sizes."""
        return [SPLIT] * len(self.scores) + [len(self.waiting)] * bool(self.waiting)

    @property
    def score(self):
        return float(np.mean(self.scores + [self.of_split(self.waiting)] * bool(self.waiting)))


def squared_lengths(rows, block=512):
    """(n, d) -> (n,)."""
    return torch.cat([part.square().sum(1) for part in rows.split(block)])


def squared_distances(a, b, lengths_b):
    """(n, d), (m, d) and squared_lengths(b) -> (n, m)."""
    return (squared_lengths(a)[:, None] + lengths_b - 2 * a @ b.T).clamp(min=0)


def radii(features, k=NEIGHBOURS, block=512):
    """(n, d) -> (n,) squared distances to the k-th nearest other row."""
    result, lengths = [], squared_lengths(features)
    for start in range(0, len(features), block):
        distances = squared_distances(features[start:start + block], features, lengths)
        own = torch.arange(len(distances))
        distances[own, start + own] = torch.inf
        result.append(distances.kthvalue(k, 1).values)
    return torch.cat(result)


def precision_and_recall(samples, reference, k=NEIGHBOURS, block=512):
    """The share of samples (n, d) within the manifold of the reference (m, d), and the share of the
    reference within that of the samples: in a ball around a row that reaches to its k-th nearest
    neighbour. Memory: block rows of distances. ValueError for k rows or fewer."""
    if min(len(samples), len(reference)) <= k:
        raise ValueError(f"precision and recall need more than {k} images on both sides")

    def inside(points, centres):
        reach, lengths = radii(centres, k, block), squared_lengths(centres)
        return float(torch.cat([(squared_distances(part, centres, lengths) <= reach).any(1)
                                for part in points.split(block)]).double().mean())

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


class Inception(nn.Module):
    """The Inception-v3 of TensorFlow's 2015 release, which FID means: timm's with its pools.

    weights: pt_inception-2015-12-05-6726825d.pth, as a path or a state dict. Images uint8
    (B, 3, H, W) -> pool (B, 2048) for FID; spatial (B, 2023), the first 7 channels of Mixed_6d, for
    sFID; logits (B, 1008) without bias, for IS. ValueError if the weights are of another network.
    """
    def __init__(self, weights):
        super().__init__()
        import timm                                        # slow to import: not before it is used
        net = self.net = timm.create_model("inception_v3", num_classes=1008, aux_logits=False)
        try:
            if not isinstance(weights, dict):
                weights = torch.load(weights, map_location="cpu", weights_only=True)
            net.load_state_dict(weights)
        except (RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError("no weights of the 2015 Inception: " + data.one_line(error)) from None
        for block in net.children():
            if hasattr(block, "branch_pool"):
                block.branch_pool.register_forward_pre_hook(self.without_padding)
        net.Mixed_7c.register_forward_pre_hook(self.keep_input)
        net.Mixed_7c.branch_pool.register_forward_pre_hook(self.max_pool)
        net.Mixed_6d.register_forward_hook(self.keep_output)
        self.eval().requires_grad_(False)

    @staticmethod
    def without_padding(branch, args):
        """timm's average counts the zeros around the image, TensorFlow's does not."""
        return args[0] / F.avg_pool2d(torch.ones_like(args[0][:1, :1]), 3, 1, 1)

    def keep_input(self, block, args):
        self.into_7c = args[0]

    def max_pool(self, branch, args):
        """In the last block TensorFlow's pool takes the maximum."""
        return F.max_pool2d(self.into_7c, 3, 1, 1)

    def keep_output(self, block, args, h):
        self.spatial = h[:, :7].flatten(1)

    @torch.no_grad()
    def forward(self, images):
        x = (tf1_resize(images.float(), 299) - 128) / 128
        pool = self.net.forward_head(self.net.forward_features(x), pre_logits=True)
        return pool, self.spatial, pool @ self.net.fc.weight.T


def is_published(path):
    """Whether a file is that of INCEPTION, by the first digits of its sha256 in that name."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return digest.startswith(INCEPTION.removesuffix(".pth").rpartition("-")[2])


class Space:
    """What turns images uint8 (B, 3, H, W) into features: the call returns (pool,), (B, d), and for
    inception (pool, spatial, logits). weights: their sha256, and the settings that change what they
    do; with_head: a timm model's sha256 as the metadata of prepared data have it. UserError if it
    cannot be had.

    name: inception, dinov2, pixels, or a timm model, whose pooled features are taken; weights: a
    file, None for the published ones; settings: timm.create_model's, and mean and std in place of
    the model's own; flags: what precedes "features", "weights" and "features_kwargs" in the flags
    that these came from.
    """
    def __init__(self, name, weights=None, settings=None, device="cpu", flags=""):
        self.name, self.device, self.weights, self.with_head = name, torch.device(device), "", ""
        if weights and not os.path.isfile(weights):
            raise data.UserError(f"--{flags}weights {weights}: no such file")
        for given, flag, useless in ((weights, "weights", ("pixels",)),
                                     (settings, "features_kwargs", ("pixels", "inception"))):
            if given and name in useless:
                raise data.UserError(f"--{flags}{flag} means nothing to --{flags}features {name}; "
                                     "leave it out")
        try:
            if name == "inception":
                net = Inception(weights or torch.hub.load_state_dict_from_url(
                    INCEPTION, map_location="cpu", check_hash=True, weights_only=True))
            elif name != "pixels":
                net = self.timm_model(name, weights, dict(settings or {}))
        except Exception as error:                         # a dozen kinds, many lines
            published = f", for inception {os.path.basename(INCEPTION)}" * (not weights)
            raise data.UserError(
                f"--{flags}features {name} cannot be had ({data.one_line(error)}); give its "
                f"weights with --{flags}weights FILE{published}") from None
        if name == "inception" and weights and not is_published(weights):
            print(f"warning: {weights} is not {os.path.basename(INCEPTION)}: these numbers compare "
                  "with no other's", file=sys.stderr)
        if name != "pixels":
            self.weights = data.weights_hash(net) + "".join(
                f" {key}={value}" for key, value in sorted((settings or {}).items()))
            self.net = net.to(device, memory_format=torch.channels_last)

    def timm_model(self, name, weights, settings):
        import timm
        if name == "dinov2":
            name, settings = DINOV2, {"img_size": DINOV2_PIXELS} | settings
        ours = {key: settings.pop(key) for key in ("mean", "std") if key in settings}
        overlay = {"file": weights, "custom_load": weights.endswith(".npz")} if weights else {}
        net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **settings)
        self.with_head = data.weights_hash(net)
        net.reset_classifier(0)                            # only now: the load was strict
        net = net.eval().requires_grad_(False)
        config = timm.data.resolve_model_data_config(net) | ours
        self.size = settings.get("img_size", config["input_size"][-1])
        self.mean, self.std = (torch.tensor(config[key]).expand(3).view(3, 1, 1)
                               for key in ("mean", "std"))
        net(torch.zeros(1, 3, self.size, self.size))       # settings that do not fit fail here
        return net

    @torch.no_grad()
    def __call__(self, images):
        images = images.to(self.device)
        if self.name == "pixels":
            return data.from_uint8(images).flatten(1),
        with torch.backends.cudnn.flags(allow_tf32=False): # float32 on GPUs too
            return self.features(images)

    def features(self, images):
        if self.name == "inception":
            return self.net(images)
        x = F.interpolate(images.float() / 255, (self.size, self.size), mode="bicubic",
                          antialias=True, align_corners=False).clamp(0, 1)
        return self.net((x - self.mean.to(x)) / self.std.to(x)),


class Images:
    """A set of images uint8 (n, H, W, 3), read in batches: an .npz's arr_0, an .npy or the files in
    a folder and its subfolders. UserError if path is none of these, or an image is not as the
    others."""
    def __init__(self, path):
        self.path = path
        try:
            if os.path.isdir(path):
                files, _, _ = data.list_images(path)
                self.files = [os.path.join(path, os.fsdecode(file)) for file in files]
                shape, dtype = (len(self.files), *read_image(self.files[0]).shape), np.uint8
            else:
                with open_rows(path) as (shape, dtype, _):
                    pass
        except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise data.UserError(f"{path} cannot be read as images ({data.one_line(error)}); give "
                                 "an .npz as sample.py writes it, an .npy or a folder") from None
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3:
            raise data.UserError(f"{path}: images must be uint8 (n, H, W, 3), got {dtype} {shape}")
        if shape[0] < 2:
            raise data.UserError(f"{path} holds {shape[0]} image; a covariance needs two")
        self.n, self.size = shape[0], shape[1:3]

    def batches(self, batch_size, workers=0):
        """Tensors uint8 (B, 3, H, W), in order."""
        try:
            if not os.path.isdir(self.path):
                with open_rows(self.path) as (_, _, read):
                    for start in range(0, self.n, batch_size):
                        images = read(min(batch_size, self.n - start))
                        yield torch.from_numpy(images).permute(0, 3, 1, 2)
                return
            batches = [self.files[i:i + batch_size] for i in range(0, self.n, batch_size)]
            yield from torch.utils.data.DataLoader(Files(batches, self.size), batch_size=None,
                                                   num_workers=workers)
        except (ValueError, RuntimeError, EOFError, zipfile.BadZipFile,
                zlib.error) as error:                      # many lines, of the worker's
            last = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
            raise data.UserError(f"{self.path} cannot be read as images ({last})") from None


class Files(torch.utils.data.Dataset):
    """Batches of image files, which must all be of one size."""
    def __init__(self, batches, size):
        self.batches, self.size = batches, size

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, i):
        images = []
        for path in self.batches[i]:
            images.append(read_image(path))
            if images[-1].shape[:2] != self.size:
                raise ValueError(f"{path} is of {images[-1].shape[:2]} pixels, the first of "
                                 f"{self.size}; sizes must agree")
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def read_image(path):
    """uint8 (H, W, 3). ValueError if it is not RGB, or no image."""
    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no image ({error})") from None
    if mode != "RGB":
        raise ValueError(f"{path} has the mode {mode}, and must be RGB without transparency")
    return pixels


@contextlib.contextmanager
def open_rows(path):
    """shape, dtype and read(n), the next n rows, of an .npy or an .npz's arr_0, never all at once.
    ValueError, KeyError or BadZipFile if there is no such array."""
    if not path.endswith(".npz"):
        array, place = np.load(path, mmap_mode="r"), [0]

        def read(n):
            place[0] += n
            return np.array(array[place[0] - n:place[0]])

        yield array.shape, array.dtype, read
        return
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0,
                  (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = header(file)
        if fortran or dtype.hasobject:
            raise ValueError(f"arr_0 is stored as {dtype}{', column by column' * fortran}")

        def read(n):
            content = file.read(n * int(np.prod(shape[1:])) * dtype.itemsize)
            return np.frombuffer(bytearray(content), dtype).reshape(n, *shape[1:])

        yield shape, dtype, read


@dataclasses.dataclass
class Statistics:
    """What the metrics need of a set of images; None where there is none."""
    n: int | None                               # images; None where only moments are known
    pool_moments: tuple                         # mean (d,) and covariance (d, d) of pool
    spatial_moments: tuple | None = None        # the same of spatial
    score: InceptionScore | None = None
    pool: torch.Tensor | None = None            # (n, d) float32, for precision and recall


def measure(batches, n, space, name="", keep=True):
    """The Statistics, in a Space, of batches uint8 (B, 3, H, W); n: about how many images, for the
    progress bar; keep: pool, too. UserError for none, and for features that are not finite."""
    moments, score, kept, waiting = [], InceptionScore(), [], []

    def flush():                                           # many rows at once: 12 times as fast
        for each, parts in zip(moments, zip(*waiting)):
            try:
                each.update(torch.cat(parts).numpy())
            except ValueError as error:
                raise data.UserError(f"{name} in the space {space.name}: {error}") from None
        waiting.clear()

    with tqdm(total=n, desc=name, unit="image") as bar:
        for batch in batches:
            features = [part.float().cpu() for part in space(batch)]
            if features[0].shape[1] > MAX_D:
                raise data.UserError(f"--features {space.name}: {features[0].shape[1]} channels "
                                     f"are more than the {MAX_D} that fit; take another space")
            moments = moments or [pca.Moments(part.shape[1]) for part in features[:2]]
            waiting.append(features[:2])
            if sum(len(part) for part, *_ in waiting) >= ROWS:
                flush()
            if len(features) == 3:
                score.update(features[2].numpy())
            if keep:
                kept.append(features[0])
            bar.update(len(batch))
    flush()
    if not moments or moments[0].n < 2:
        raise data.UserError(f"{name} has no two images that can be read; give others")
    done = [(each.mean, each.cov) for each in moments]
    return Statistics(moments[0].n, *done, score=score if space.name == "inception" else None,
                      pool=torch.cat(kept) if keep else None)


def holds(path, name):
    """Whether path is an .npz with an array of that name."""
    if not path.endswith(".npz") or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return f"{name}.npy" in archive.namelist()


def stored_statistics(path, space):
    """The Statistics in an .npz: mu, sigma (and mu_s, sigma_s), as in ADM's reference batches and
    as --save_stats writes them; None if it has none. UserError if they are of another space."""
    if not holds(path, "mu"):
        return None
    with np.load(path, allow_pickle=False) as file:
        made_by = str(file["space"]) if "space" in file else "inception"
        weights = str(file["weights"]) if "weights" in file else space.weights
        if (made_by, weights) != (space.name, space.weights):
            raise data.UserError(f"{path} holds moments of {made_by} (weights {weights[:16]}), not "
                                 f"of {space.name} ({space.weights[:16]}); give its images, or the "
                                 "space that it is of")
        if any(mu in file and sigma not in file for mu, sigma in MOMENTS):
            raise data.UserError(f"{path} holds means without their covariances, sigma; make it "
                                 "anew with fid.py --save_stats")
        pairs = [(file[mu], file[sigma]) for mu, sigma in MOMENTS if mu in file]
        pool = torch.from_numpy(file["pool"]) if "pool" in file else None
        return Statistics(int(file["n"]) if "n" in file else None, *pairs, pool=pool)


def save_statistics(path, statistics, space):
    """An .npz that stored_statistics() reads."""
    arrays = {"space": space.name, "weights": space.weights}
    arrays |= {} if statistics.n is None else {"n": statistics.n}
    for names, moments in zip(MOMENTS, (statistics.pool_moments, statistics.spatial_moments)):
        arrays |= dict(zip(names, moments or ()))
    if statistics.pool is not None:
        arrays["pool"] = statistics.pool.numpy()
    pca.write_whole(path, lambda file: np.savez(file, **arrays))


def named_distance(space, n, reference):
    """What a distance of n samples to the Statistics `reference` is called."""
    return f"frechet_{space.name}_{n}_vs_{reference.n or 'stored'}"


def compare(samples, reference, space):
    """Metrics by name of two Statistics in one Space, samples first."""
    name = "fid" if space.name == "inception" else named_distance(space, samples.n, reference)
    metrics = {name: frechet_distance(*samples.pool_moments, *reference.pool_moments)}
    if samples.spatial_moments and reference.spatial_moments:
        metrics["sfid"] = frechet_distance(*samples.spatial_moments, *reference.spatial_moments)
    if samples.score:
        metrics["inception_score"] = samples.score.score
    if samples.pool is not None and reference.pool is not None:
        metrics["precision"], metrics["recall"] = precision_and_recall(
            samples.pool.to(space.device), reference.pool.to(space.device))
    return metrics


def grey_pixels(images):
    """uint8 (n, H, W, 3) with equal channels -> (n, H W) in [-1, 1]."""
    return data.from_uint8(torch.from_numpy(images[..., 0])).flatten(1).double().numpy()


@functools.lru_cache(maxsize=1)
def held_out_digits():
    """The digits nobody trained on, as uint8 like samples: images (n, 8, 8, 3), classes (n,)."""
    x, y, held_out = data.digits()
    return data.to_images(x[held_out]), y[held_out].numpy()


@functools.lru_cache(maxsize=1)
def digit_judges():
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
    _, mlp = digit_judges()
    return np.maximum(grey_pixels(images) @ mlp.coefs_[0] + mlp.intercepts_[0], 0)


def judge_digits(images, y=None):
    """Metrics, by name, of generated digits uint8 (n, 8, 8, 3) against the held-out ones. y (n,):
    the classes that were asked for; None for an unconditional model."""
    reference, reference_y = held_out_digits()
    counts = f"{len(images)}_vs_{len(reference)}"
    metrics = {f"frechet_{name}_{counts}": distance_of_features(space(images), space(reference))
               for name, space in (("pixels", grey_pixels), ("classifier", hidden_layer))}
    if y is not None:
        reader, _ = digit_judges()
        for name, digits, labels in (("read_as_asked_percent", images, y),
                                     ("real_read_right_percent", reference, reference_y)):
            metrics[name] = 100 * float((reader.predict(grey_pixels(digits)) == labels).mean())
    return metrics


def judge(args):
    """Metrics of the digits in args.samples, by judges that know real digits."""
    if (args.features, args.weights, args.features_kwargs, args.save_stats) != (
            "inception", None, None, None):
        raise data.UserError("the reference digits has judges of its own; leave out --features, "
                             "--weights, --features_kwargs and --save_stats")
    images = Images(args.samples)
    if images.size != (8, 8):
        raise data.UserError(f"{args.samples} holds images of {images.size}, digits are of (8, 8)")
    batches = torch.cat(list(images.batches(1000))).permute(0, 2, 3, 1).numpy()
    y = None
    if args.labels and holds(args.samples, "y"):
        try:
            with np.load(args.samples, allow_pickle=False) as file:
                y = file["y"]
        except ValueError as error:
            raise data.UserError(f"{args.samples}: y cannot be read ({error})") from None
        if y.shape != (images.n,):
            raise data.UserError(f"{args.samples}: y must have a class for each image, got "
                                 f"{y.shape}")
    return judge_digits(batches, y)


def statistics_of(path, space, precision_recall=False, batch_size=32, workers=0):
    """The Statistics of a path: those that it stores, as far as it does, else of its images.
    UserError if it holds neither, or moments of another space."""
    stored = None
    if space.name == "inception" or not holds(path, "arr_0"):          # ADM's moments are of that
        stored = stored_statistics(path, space)
    if stored and (stored.pool is not None or not precision_recall or not holds(path, "arr_0")):
        return stored
    images = Images(path)
    measured = measure(images.batches(batch_size, workers), images.n, space, path,
                       precision_recall)
    if stored:                                 # ADM's: moments of all images, arr_0 some of them
        stored.pool, stored.score = measured.pool, measured.score
    return stored or measured


class Judge:
    """Sees samples of one model again and again, while it is trained. reference: "digits", for
    judge_digits(); else the Statistics of real images in a Space, whose distance is measured."""
    def __init__(self, reference, space=None):
        self.reference, self.space = reference, space

    def see(self, images):
        """What metrics() needs of images uint8 (B, H, W, 3): an array of B rows."""
        if self.reference == "digits":
            return images
        return self.space(torch.from_numpy(images).permute(0, 3, 1, 2))[0].float().cpu().numpy()

    def metrics(self, seen, y=None):
        """Metrics by name of all that was seen, (n, ...); y (n,): the classes, None without."""
        if self.reference == "digits":
            return judge_digits(seen, y)
        try:
            moments = pca.Moments(seen.shape[1]).update(seen)
        except ValueError as error:
            raise data.UserError(f"samples in the space {self.space.name}: {error}") from None
        return {named_distance(self.space, len(seen), self.reference): frechet_distance(
            moments.mean, moments.cov, *self.reference.pool_moments)}


def main(args):
    for name, least in (("batch_size", 1), ("workers", 0)):
        if getattr(args, name) < least:
            raise data.UserError(f"--{name} {getattr(args, name)} must be at least {least}")
    if args.reference == "digits":
        metrics = judge(args)
        print(f"samples    {args.samples}\nreference  the held-out digits")
        report(args, metrics)
        return
    check_save_stats(args)
    for path in (args.samples, args.reference):            # before what is slow
        if not holds(path, "mu"):
            Images(path)
    settings = data.key_values(args.features_kwargs or [], "features_kwargs")
    space = Space(args.features, args.weights, settings, data.pick_device(args.device))
    inception = space.name == "inception"
    # what is stored first: if it does not fit, nothing was measured for it
    found = {path: statistics_of(path, space, inception, args.batch_size, args.workers)
             for path in sorted({args.samples, args.reference},
                                key=lambda path: (not holds(path, "mu"), path != args.samples))}
    samples, reference = found[args.samples], found[args.reference]
    try:
        metrics = compare(samples, reference, space)
    except ValueError as error:
        raise data.UserError(str(error)) from None

    def counted(statistics):
        n = "an unknown number of" if statistics.n is None else f"{statistics.n:,}"
        if statistics.pool is None or len(statistics.pool) == statistics.n:
            return f"{n} images"
        return f"{n} images, {len(statistics.pool):,} of them for precision and recall"

    print(f"samples    {args.samples}: {counted(samples)}\n"
          f"reference  {args.reference}: {counted(reference)}\n"
          f"space      {space.name}, weights {space.weights[:16] or 'none'}")
    splits = samples.score.splits if samples.score else []
    remarks = []
    if inception and len(metrics) < 5:
        remarks.append("what is missing needs images, and there are stored moments alone")
    if splits:
        remarks.append("inception_score is the mean of splits of "
                       f"{', '.join(map(str, splits))} images in order")
    if samples.n and samples.n < N_UNBIASED:
        remarks.append(f"{samples.n:,} samples: below {N_UNBIASED:,} Fréchet distances are biased "
                       "upwards, compare equal counts only")
    report(args, metrics, {
        "n_samples": samples.n, "n_reference": reference.n, "space": space.name,
        "weights": space.weights, "inception_score_splits": splits}, remarks)
    if args.save_stats:
        save_statistics(args.save_stats, reference, space)


def check_save_stats(args):
    """UserError for a --save_stats that cannot be written, or read again, or is there already."""
    path = args.save_stats
    if path and not path.endswith(".npz"):
        raise data.UserError(f"--save_stats {path}: its name must end in .npz")
    if path and os.path.exists(path):
        raise data.UserError(f"--save_stats {path} is there already; remove it, or take another "
                             "name")
    if path and not os.path.isdir(os.path.dirname(path) or "."):
        raise data.UserError(f"--save_stats {path}: there is no folder {os.path.dirname(path)}")


def report(args, metrics, details=None, remarks=()):
    """Print metrics by name as a table, remarks, and all with details as one line of JSON."""
    for name, value in metrics.items():
        print(f"{name:32s} {value:.4f}")
    for remark in remarks:
        print(remark)
    print(json.dumps(metrics | {"samples": args.samples, "reference": args.reference} | (
        details or {}) | {"versions": {name: importlib.metadata.version(name)
                                       for name in ("torch", "timm", "scipy")},
                          "date": time.strftime("%Y-%m-%d")}))


def parser():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("samples", help="generated images: .npz, .npy or folder")
    p.add_argument("reference", help="real images, the same; or the word digits: the held-out ones "
                                     "(a folder of that name is ./digits)")
    p.add_argument("--features", default="inception",
                   help="space of the distance: inception (FID and the others), dinov2 (ViT-L), "
                        "pixels, or any timm model (default: %(default)s)")
    p.add_argument("--weights", metavar="FILE", help="the space's weights (default: downloaded)")
    p.add_argument("--features_kwargs", nargs="*", metavar="KEY=VALUE",
                   help="arguments of timm.create_model; mean and std of the images it was "
                        "trained on, where timm's are others")
    p.add_argument("--save_stats", metavar="FILE", help="keep what was measured of the reference, "
                                                        "an .npz that is a reference, too")
    p.add_argument("--batch_size", type=int, default=32, help="images a batch (default: 32)")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count()),
                   help="processes that read files; 0: none (default: %(default)s)")
    p.add_argument("--labels", action=argparse.BooleanOptionalAction, default=True,
                   help="compare digits with the classes y in the samples' .npz, which those of "
                        "unconditional models lack (default: on)")
    p.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    return p


if __name__ == "__main__":
    data.run_cli(main, parser().parse_args())
