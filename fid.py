"""Fréchet distances between sets of images, and judges of generated digits.

    python fid.py samples/samples.npz digits          # samples against the held-out digits
    python fid.py a/samples.npz b/samples.npz         # two sets, in pixel space

A distance is named after its feature space and the two counts; none of these is the FID of the
papers, which needs Inception. Few images bias it upwards: compare equal counts only.
"""
import argparse
import functools
import os
import zipfile

import numpy as np
import scipy.linalg
import torch

import data
import pca


def frechet_distance(mu_1, cov_1, mu_2, cov_2):
    """|mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^1/2) between two Gaussians (arXiv 1706.08500).

    mu (d,), cov (d, d), float64. The last trace is that of the symmetric (C_1^1/2 C_2 C_1^1/2)^1/2:
    real eigenvalues, also where a covariance is singular. ValueError for shapes that differ, NaN
    and infinity.
    """
    mu_1, cov_1, mu_2, cov_2 = (np.asarray(a, np.float64) for a in (mu_1, cov_1, mu_2, cov_2))
    if not (mu_1.shape == mu_2.shape and cov_1.shape == cov_2.shape == (len(mu_1), len(mu_1))):
        raise ValueError("moments of different spaces: "
                         f"{mu_1.shape} {cov_1.shape} and {mu_2.shape} {cov_2.shape}")
    values, vectors = scipy.linalg.eigh(cov_1)                         # raises ValueError on NaN
    root_1 = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    product = scipy.linalg.eigh(root_1 @ cov_2 @ root_1, eigvals_only=True)
    cross = 2 * np.sqrt(product.clip(min=0)).sum()
    return max(float(np.square(mu_1 - mu_2).sum() + np.trace(cov_1 + cov_2) - cross), 0.0)


def distance_of_features(features_1, features_2):
    """Fréchet distance between two sets of rows (n, d)."""
    one, two = (pca.Moments(f.shape[1]).update(f) for f in (features_1, features_2))
    return frechet_distance(one.mean, one.cov, two.mean, two.cov)


def pixels(images):
    """uint8 (n, H, W, 3) -> (n, 3 H W) in [-1, 1]."""
    return data.from_uint8(torch.from_numpy(images)).flatten(1).double().numpy()


def grey_pixels(images):
    """uint8 (n, H, W, 3) with equal channels -> (n, H W) in [-1, 1]."""
    return pixels(images[..., :1])


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


def load_images(path):
    """arr_0 uint8 (n, H, W, 3) of an .npz in ADM's layout, and its y or None. UserError if it is
    anything else."""
    if not os.path.exists(path):
        raise data.UserError(f"no images at {path}; make them with: python sample.py --n 1000")
    try:
        with np.load(path, allow_pickle=False) as file:
            images, y = file["arr_0"], file["y"] if "y" in file else None
    except (KeyError, ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise data.UserError(f"{path} holds no images ({error}); sample.py writes one") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) < 2:
        raise data.UserError(f"{path}: arr_0 must be uint8 (n >= 2, H, W, 3), "
                             f"got {images.dtype} {images.shape}")
    if y is not None and y.shape != images.shape[:1]:
        raise data.UserError(f"{path}: y must have a class for each image, got {y.shape}")
    return images, y


def main(args):
    images, y = load_images(args.samples)
    digits = args.reference == "digits"
    reference, _ = held_out_digits() if digits else load_images(args.reference)
    if reference.shape[1:] != images.shape[1:]:
        raise data.UserError(f"{args.samples} holds images of {images.shape[1:3]}, "
                             f"{args.reference} of {reference.shape[1:3]}; sizes must agree")
    if digits:
        metrics = judge_digits(images, y if args.labels else None)
    else:
        metrics = {f"frechet_pixels_{len(images)}_vs_{len(reference)}":
                   distance_of_features(pixels(images), pixels(reference))}
    print(f"samples {args.samples}, reference {args.reference}")
    for name, value in metrics.items():
        print(f"{name:32s} {value:.3f}")


def parser():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("samples", help=".npz with arr_0 uint8 (n, H, W, 3)")
    p.add_argument("reference", help="another one, or the word digits: the held-out digits")
    p.add_argument("--labels", action=argparse.BooleanOptionalAction, default=True,
                   help="compare digits with the samples' y; --no-labels for unconditional models")
    return p


if __name__ == "__main__":
    data.run_cli(main, parser().parse_args())
