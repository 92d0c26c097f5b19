"""PCA of encoder features: streaming float64 moments, fit, project, back-project, one .npz file.

    python pca.py prepared/digits/pca.npz        # what a fitted file keeps, component by component

Features are standardised per channel, then rotated; components are not rescaled but by the one
recorded number `scale` (as in ReDi, arXiv 2504.16064). fid.py uses the same moments.
"""
import argparse
import dataclasses
import os
import zipfile

import numpy as np


class Moments:
    """Count, mean and covariance of rows seen so far. Memory is d^2 doubles, whatever the count."""
    def __init__(self, d):
        self.n, self.sum, self.outer = 0, np.zeros(d), np.zeros((d, d))      # n, sum f, sum f f^T

    def update(self, features):
        """Add rows (n, d) of any float type. ValueError if one is not finite."""
        f = np.asarray(features, np.float64)
        assert f.ndim == 2 and f.shape[1] == len(self.sum), (f.shape, self.sum.shape)
        if not np.isfinite(f).all():
            raise ValueError("features hold NaN or infinity")
        self.n += len(f)
        self.sum += f.sum(0)
        self.outer += f.T @ f
        return self

    @property
    def mean(self):
        return self.sum / self.n

    @property
    def cov(self):
        """(d, d), divided by n - 1 as in numpy.cov. ValueError for fewer than two rows."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.n}")
        return (self.outer - self.n * np.outer(self.mean, self.mean)) / (self.n - 1)


@dataclasses.dataclass(frozen=True)
class PCA:
    """z = scale * ((f - mean) / std) @ components[:r].T"""
    mean: np.ndarray                # (d,) of the raw features
    std: np.ndarray                 # (d,) of the raw features, divisor n; 1 for a constant channel
    components: np.ndarray          # (k, d) orthonormal rows, largest variance first
    variance: np.ndarray            # (k,) of the standardised features along them, divisor n - 1
    total_variance: float           # of all the standardised channels
    n: int                          # feature vectors it was fitted on
    scale: float                    # z's unit; 1 is the paper's choice
    encoder: str                    # what made the features

    @property
    def z_std(self):
        """(k,) standard deviation of each channel of z."""
        return self.scale * np.sqrt(self.variance)

    def project(self, features, r=None):
        """(..., d) -> z (..., r)."""
        return ((features - self.mean) / self.std) @ self.components[:r].T * self.scale

    def back_project(self, z):
        """z (..., r) -> features (..., d) that it stands for, dropped components at their mean."""
        return z / self.scale @ self.components[:z.shape[-1]] * self.std + self.mean

    def save(self, path):
        np.savez(path, **dataclasses.asdict(self))


def fit(moments, k, scale=1.0, encoder=""):
    """The first k components. One pass is enough: the covariance of standardised features is the
    raw one divided by std std^T. A component's largest loading is positive, as in scikit-learn.
    ValueError if there are fewer than k channels or two rows."""
    d = len(moments.sum)
    if not 1 <= k <= d:
        raise ValueError(f"cannot keep {k} components of {d} channels")
    cov = moments.cov
    std = np.sqrt(np.diag(cov).clip(min=0) * (moments.n - 1) / moments.n)
    # cancellation leaves dust where a channel is constant; such a channel's z is 0
    std = np.where(std > 1e-6 * np.abs(moments.mean), std, 1.0)
    variance, vectors = np.linalg.eigh(cov / np.outer(std, std))      # ascending
    variance, components = variance[::-1].clip(min=0), vectors[:, ::-1].T
    largest = np.abs(components).argmax(1)
    components = components * np.sign(components[np.arange(d), largest])[:, None]
    return PCA(moments.mean, std, components[:k], variance[:k], float(variance.sum()), moments.n,
               float(scale), encoder)


def load(path):
    """A file written by PCA.save. FileNotFoundError or ValueError says what is wrong with it."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"no PCA file at {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            values = {field.name: file[field.name] for field in dataclasses.fields(PCA)}
    except (KeyError, ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a PCA file of ours ({error})") from None
    return PCA(**{name: value if value.ndim else value.item() for name, value in values.items()})


def main(args):
    try:
        pca = load(args.file)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}")
    print(f"{args.file}: {len(pca.variance)} of {len(pca.mean)} components, fitted on {pca.n:,} "
          f"feature vectors of {pca.encoder}, scale {pca.scale:g}")
    print("component  std of z  variance %  sum %")
    share = 100 * pca.variance / pca.total_variance
    for i, (std, part, so_far) in enumerate(zip(pca.z_std, share, share.cumsum()), 1):
        print(f"{i:9d}  {std:8.3f}  {part:10.2f}  {so_far:5.1f}")


def parser():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", help="a fitted PCA (.npz)")
    return p


if __name__ == "__main__":
    main(parser().parse_args())
