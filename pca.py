"""PCA of encoder features: streaming float64 moments, fit, project, back-project, one .npz file.

    python pca.py prepared/digits        # a prepared folder, or an .npz: what each component keeps
    python pca.py --images DIR           # fits DINOv2's features of a folder of images
    python pca.py --from_official dino_pca_model.pth

Features are standardised per channel, then rotated; components are not rescaled but by the one
recorded number `scale` (as in ReDi, arXiv 2504.16064). fid.py uses the same moments.
"""
import argparse
import contextlib
import dataclasses
import os
import pickle
import zipfile

import numpy as np

DINOV2 = "vit_base_patch14_reg4_dinov2.lvd142m"      # timm's name of the paper's encoder


def write_whole(path, write):
    """write(file), in such a way that path holds the old content or the new, never a part."""
    try:
        with open(f"{path}.part", "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:                              # a full disk: what is there stays, alone
        with contextlib.suppress(OSError):
            os.remove(f"{path}.part")
        raise
    os.replace(f"{path}.part", path)


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

    def merge(self, other):
        """Add what another one has seen."""
        self.n, self.sum, self.outer = (
            self.n + other.n, self.sum + other.sum, self.outer + other.outer)
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

    def first(self, k):
        """The same with the first k components. ValueError if there are not so many."""
        if not 1 <= k <= len(self.variance):
            raise ValueError(f"cannot keep {k} components, there are {len(self.variance)}")
        return dataclasses.replace(self, components=self.components[:k], variance=self.variance[:k])

    def save(self, path):
        """Write the .npz, whole or not at all."""
        write_whole(path, lambda file: np.savez(file, **dataclasses.asdict(self)))


def fit(moments, k, scale=1.0, encoder="", weights=""):
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
               float(scale), encoder, weights)


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


class _OfficialPCA:
    """Takes the attributes of the scikit-learn PCA that the authors' file pickles."""


def _latin1(text, encoding):
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding}")
    return text.encode(encoding)


class _OfficialUnpickler(pickle.Unpickler):
    """Admits numpy arrays and that one class, in whose place it puts ours: no code of the file's
    choice can run."""
    reconstruct, _, _ = np.zeros(1).__reduce__()
    admitted = {"sklearn.decomposition._pca.PCA": _OfficialPCA, "_codecs.encode": _latin1,
                "numpy.core.multiarray._reconstruct": reconstruct,
                "numpy._core.multiarray._reconstruct": reconstruct,
                "numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype}

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.admitted:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not admitted")
        return self.admitted[f"{module}.{name}"]


def from_official(path, scale=1.0):
    """The PCA of the authors' dino_pca_model.pth; with scale 1 z is theirs. FileNotFoundError or
    ValueError says what is wrong with it."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"no file at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            name, = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as file:
                stats = _OfficialUnpickler(file).load()
        theirs = stats["pca_model"]
        mean, std, centre, components, variance = (
            np.asarray(array, np.float64) for array in (
                stats["mean"], stats["std"], theirs.mean_, theirs.components_,
                theirs.explained_variance_))
        n = int(theirs.n_samples_)
        if not (mean.shape == std.shape == centre.shape == components.shape[1:]
                and components.shape[:1] == variance.shape and (std > 0).all()
                and all(np.isfinite(a).all() for a in (mean, std, centre, components, variance))):
            raise ValueError("its arrays do not fit together")
    except Exception as error:                                       # damage raises anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not the authors' PCA file ({reason})") from None
    # they centre twice, before and after the division: ((f - mean) / std - centre) @ components.T
    return PCA(mean + std * centre, std, components, variance, float(variance.sum()), n,
               float(scale), DINOV2)


def colours(z, z_std):
    """z (n, r, h, w) -> uint8 (n, h, w, 3): the first three components as red, green and blue, from
    -2 to 2 of their standard deviations in the data, so that a colour means the same everywhere."""
    z = np.asarray(z[:, :3], np.float32)
    rgb = np.zeros((len(z), 3, *z.shape[2:]), np.float32)
    rgb[:, :z.shape[1]] = z / (2 * np.asarray(z_std[:z.shape[1]], np.float32)).reshape(-1, 1, 1)
    return (127.5 * rgb + 128).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def show(name, pca):
    print(f"{name}: {len(pca.variance)} of {len(pca.mean)} components, fitted on {pca.n:,} feature "
          f"vectors of {pca.encoder}, scale {pca.scale:g}")
    print("component  std of z  variance %  sum %")
    share = 100 * pca.variance / pca.total_variance
    for i, (std, part, so_far) in enumerate(zip(pca.z_std, share, share.cumsum()), 1):
        print(f"{i:9d}  {std:8.3f}  {part:10.2f}  {so_far:5.1f}")


def show_folder(folder, columns=10, tile=96):
    """The PCAs of a prepared folder, and a picture of its z: an image a column, three components
    (as red, green, blue) a row."""
    import data
    source = data.Prepared(folder)
    for encoder in source.meta["encoders"]:
        show(f"{folder}/{encoder['pca']}", load(f"{folder}/{encoder['pca']}"))
    z = source.z[source.rows(source.examples(columns).numpy())]
    z_std = source.meta["z_std"]
    picture = data.contact_sheet([colours(z[:, i:i + 3], z_std[i:i + 3])
                                  for i in range(0, z.shape[1], 3)], columns, tile)
    picture.save(f"{folder}/z.png")
    print(f"{folder}/z.png: an image a column; components 1 to 3 as red, green and blue in the "
          "first row, 4 to 6 in the second, and on")


def main(args):
    """What the flags ask for; trouble ends in data.run_cli's one line."""
    modes = [args.file, args.images, args.from_official]
    if sum(mode is not None for mode in modes) != 1:
        raise ValueError("give one of: a file or folder to show, --images DIR, --from_official "
                         "FILE; python pca.py --help says more")
    if args.images:
        import data
        for path, pca in data.fit_folder(args).items():
            show(path, pca)
    elif args.from_official:
        pca = from_official(args.from_official, args.pca_scale or 1.0)
        pca.save(args.out)
        show(args.out, pca.first(args.r_keep))
        print(f"{args.out} keeps them all; use it with: python data.py --images DIR --pca "
              f"{args.out}")
    elif os.path.isdir(args.file):
        show_folder(args.file)
    else:
        show(args.file, load(args.file))


def feature_flags(p):
    """The flags about images, encoders and their PCA, which data.py has too."""
    def flag(name, default, meaning, **options):
        options.setdefault("type", type(default))
        p.add_argument(f"--{name}", default=default, help=f"{meaning} (default: %(default)s)",
                       **options)

    p.add_argument("--images", metavar="DIR", help="images in class subfolders, or flat (no "
                                                   "classes); whatever Pillow reads")
    flag("size", 256, "pixels a side after ADM's centre crop; a multiple of twice the codec's "
                      "factor, so 16 for SD-VAE")
    flag("encoder", [DINOV2], "timm models; several make one z, each with its own PCA", nargs="+",
         type=str)
    p.add_argument("--encoder_layer", nargs="+", metavar="K", default=["last"],
                   help="feature level as in timm's forward_intermediates, one for all encoders or "
                        "one for each; last: the last, after the final norm (default: last)")
    p.add_argument("--encoder_weights", nargs="+", metavar="FILE", default=["hub"],
                   help="local weights, one for all or one for each; hub: timm's own (default: "
                        "hub)")
    p.add_argument("--encoder_kwargs", nargs="*", metavar="KEY=VALUE", action="append",
                   help="arguments of timm.create_model; mean, std and input_size override the "
                        "model's own normalisation and the input's pixels. Given several times: "
                        "once for each encoder")
    flag("pca_images", 76_800, "random images that the PCA is fitted on at most")
    p.add_argument("--pca_scale", type=float, help="number that z is multiplied with (default: 1, "
                                                   "the paper's; with --pca, that file's)")
    flag("r_keep", 16, "components kept of each encoder; train.py --r takes the first of them")
    p.add_argument("--batch_size", type=int, help="images that a network sees at once (default: 32 "
                                                  "on a GPU, 4 on a CPU, where it is the fastest)")
    flag("seed", 0, "of the choice of the PCA's images")
    p.add_argument("--workers", type=int, help="processes that read images; 0: none (default: the "
                                               "CPU cores, shared among torchrun's processes)")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction,
                   help="bfloat16 autocast of codec and encoders (default: on GPUs)")
    p.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")


def parser():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", nargs="?", help="a fitted PCA (.npz) or a prepared folder to show")
    p.add_argument("--from_official", metavar="FILE",
                   help="convert the authors' dino_pca_model.pth, without running its pickle")
    p.add_argument("--out", default="pca.npz", help="where a new PCA is saved (default: pca.npz); "
                                                    "of several encoders: pca_2.npz and on as well")
    feature_flags(p)
    return p


if __name__ == "__main__":
    try:
        main(parser().parse_args())
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")
    except KeyboardInterrupt:
        raise SystemExit("interrupted")
