"""PCA of encoder features: streaming float64 moments, fit, project, back-project, one .npz file.

    python pca.py prepared/digits                       # what each component keeps
    python pca.py --from_official dino_pca_model.pth    # the authors' file -> pca.npz

Features are standardised per channel, then rotated; components are not rescaled but by the one
recorded number `scale` (as in ReDi, arXiv 2504.16064). fid.py uses the same moments.
"""
import dataclasses
import glob
import os
import pickle
import types
import zipfile

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import run

DINOV2 = "vit_base_patch14_reg4_dinov2.lvd142m"      # timm's name of the paper's encoder


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
        return self.merge(len(f), f.sum(0), f.T @ f)

    def merge(self, n, total, outer):
        """Add the n, sum and outer of other Moments."""
        self.n, self.sum, self.outer = self.n + n, self.sum + total, self.outer + outer
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
    encoder: str                    # what made the features: timm's name, level and settings
    weights: str = ""               # sha256 of its weights; "" if it is not known

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

    def first(self, k, scale=None):
        """The same with the first k components; with another scale, if it is given. ValueError if
        there are not so many."""
        if not 1 <= k <= len(self.variance):
            raise ValueError(f"cannot keep {k} components, there are {len(self.variance)}")
        return dataclasses.replace(self, components=self.components[:k],
                                   variance=self.variance[:k], scale=float(scale or self.scale))

    def to(self, device):
        """The same whose project() takes float32 tensors on that device."""
        return dataclasses.replace(self, **{
            name: torch.tensor(getattr(self, name), dtype=torch.float32, device=device)
            for name in ("mean", "std", "components")})

    def save(self, path):
        """Write the .npz, whole or not at all."""
        run.write_whole(path, lambda file: np.savez(file, **dataclasses.asdict(self)))


def fit(moments, k, scale=1.0, encoder="", weights=""):
    """The first k components. One pass is enough: the covariance of standardised features is the
    raw one divided by std std^T. A component's largest loading is positive, as in scikit-learn.
    ValueError if there are fewer than k channels or two rows."""
    cov = moments.cov
    std = np.sqrt(np.diag(cov).clip(min=0) * (moments.n - 1) / moments.n)
    # cancellation leaves dust where a channel is constant; such a channel's z is 0
    std = np.where(std > 1e-6 * np.abs(moments.mean), std, 1.0)
    variance, vectors = np.linalg.eigh(cov / np.outer(std, std))      # ascending
    variance, components = variance[::-1].clip(min=0), vectors[:, ::-1].T
    largest = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1)
    return PCA(moments.mean, std, components * np.sign(largest), variance, float(variance.sum()),
               int(moments.n), float(scale), encoder, weights).first(k)


def load(path):
    """A file written by PCA.save. UserError says what is wrong with it."""
    with run.blamed_on(f"{path} is no PCA file of ours", "make it with data.py, or with pca.py "
                       "--from_official"), np.load(path, allow_pickle=False) as file:
        values = {field.name: file[field.name] for field in dataclasses.fields(PCA)}
    return PCA(**{name: value if value.ndim else value.item() for name, value in values.items()})


class OfficialUnpickler(pickle.Unpickler):
    """Admits numpy arrays and scikit-learn's PCA, whose attributes a namespace takes: no code of
    the file's choice can run."""
    def find_class(self, module, name):
        reconstruct, _, _ = np.zeros(1).__reduce__()
        admitted = {"sklearn.decomposition._pca.PCA": types.SimpleNamespace,
                    "_codecs.encode": lambda text, encoding: text.encode("latin1"),
                    "numpy.core.multiarray._reconstruct": reconstruct,
                    "numpy._core.multiarray._reconstruct": reconstruct,
                    "numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype}
        if f"{module}.{name}" not in admitted:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not admitted")
        return admitted[f"{module}.{name}"]


def from_official(path, scale=1.0):
    """The PCA of the authors' dino_pca_model.pth; with scale 1 z is theirs. UserError says what is
    wrong with it."""
    with run.blamed_on(f"{path} is not the authors' PCA file", "theirs is dino_pca_model.pth"):
        with zipfile.ZipFile(path) as archive:
            name, = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as file:
                stats = OfficialUnpickler(file).load()
        theirs = stats["pca_model"]
        arrays = [np.asarray(array, np.float64) for array in (
            stats["mean"], stats["std"], theirs.mean_, theirs.components_,
            theirs.explained_variance_)]
        mean, std, centre, components, variance = arrays
        n, (k, d) = int(theirs.n_samples_), components.shape
        if not ([a.shape for a in arrays] == [(d,), (d,), (d,), (k, d), (k,)] and (std > 0).all()
                and all(np.isfinite(a).all() for a in arrays)):
            raise ValueError("its arrays do not fit together")
    # they centre twice, before and after the division: ((f - mean) / std - centre) @ components.T
    return PCA(mean + std * centre, std, components, variance, float(variance.sum()), n,
               float(scale), DINOV2)


def colours(z, z_std):
    """z (n, r, h, w) -> uint8 (n, h, w, 3): the first three components as red, green and blue, from
    -2 to 2 of their standard deviations in the data, so that a colour means the same everywhere."""
    z = np.asarray(z[:, :3], np.float32)
    rgb = np.zeros((len(z), 3, *z.shape[2:]), np.float32)
    rgb[:, :z.shape[1]] = z / (2 * np.float32(z_std[:z.shape[1]])).reshape(-1, 1, 1)
    return (127.5 * rgb + 128).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def image_grid(kinds, columns, tile, gap=2, names=()):
    """A PIL image of tiles: kinds are lists of uint8 (h, w, 3) pictures, the i-th of each standing
    one above the other; `columns` to a row, each resized smoothly to `tile` pixels. names, one
    for each kind, stand on the left."""
    n, step = max(map(len, kinds)), tile + gap
    columns = min(columns, n)
    row, left = len(kinds) * step + 2 * gap, gap
    if names:
        font = ImageFont.load_default(max(8, tile // 4))
        left += max(round(font.getlength(name)) + 4 * gap for name in names)
    canvas = Image.new("RGB", (left + columns * step, -(-n // columns) * row - gap), "white")
    for k, kind in enumerate(kinds):
        top = gap + k * step
        for i, picture in enumerate(kind):
            picture = Image.fromarray(picture).resize((tile, tile), Image.Resampling.BICUBIC)
            canvas.paste(picture, (left + i % columns * step, top + i // columns * row))
        if names:
            ImageDraw.Draw(canvas).text((2 * gap, top + tile / 2), names[k], "black", font, "lm")
    return canvas


def print_components(name, pca):
    print(f"{name}: {len(pca.variance)} of {len(pca.mean)} components, fitted on {pca.n:,} feature "
          f"vectors of {pca.encoder}, scale {pca.scale:g}")
    print("component  std of z  variance %  sum %")
    ratio = 100 * pca.variance / pca.total_variance
    for i, (std, percent, so_far) in enumerate(zip(pca.z_std, ratio, ratio.cumsum()), 1):
        print(f"{i:9d}  {std:8.3f}  {percent:10.2f}  {so_far:5.1f}")


def main(args):
    if args.from_official:
        if os.path.exists(args.out):
            raise run.UserError(f"--out {args.out} is there already; choose another")
        pca = from_official(args.from_official, args.pca_scale)
        pca.save(args.out)
        print_components(args.out, pca.first(min(8, len(pca.variance))))
        print(f"{args.out} keeps all {len(pca.variance)}; use it with: python data.py --images DIR "
              f"--pca {args.out}")
    else:
        for path in sorted(glob.glob(f"{glob.escape(args.file)}/pca*.npz")) or [args.file]:
            print_components(path, load(path))


def parser():
    p = run.Parser(description=__doc__)
    given = p.add_mutually_exclusive_group(required=True)
    given.add_argument("file", nargs="?", help="a PCA (.npz) or a prepared folder, to show")
    given.add_argument("--from_official", metavar="FILE",
                       help="convert the authors' dino_pca_model.pth, without running its pickle")
    p.flag("out", "pca.npz", "where --from_official saves")
    p.flag("pca_scale", 1.0, "number that z is multiplied with", type=run.positive)
    return p


if __name__ == "__main__":
    run.run_cli(main, parser().parse_args())
