"""Images in, latents out: photographs or the embedded digits, prepared once; batches in order.

    python data.py                                   # the embedded digits, in prepared/digits
    python data.py --images imagenet/train           # a folder of images, in prepared/imagenet256
    torchrun --nproc_per_node=8 data.py --images imagenet/train
    python data.py --images hfds/cifar10 --size 32 --vae none        # x are pixels

A prepared folder holds shards/00000.npy and on, each of the images of SHARD files, one record an
image: x (C or 2C, H, W) float16, the VAE's latent, unscaled, or its mean and standard deviation;
z (r_keep, h, w) float16, the encoder's features reduced by PCA; y int64, the class; and with
--keep_features f (d, h, w) float16, the features, for train.py --repa. Beside them: meta.json,
written last, the PCA, files.txt with the image of each row, and a picture, sheet.png.
"""
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import shutil
import tarfile
import threading
import warnings

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

import pca
import pretrained
import run
from run import UserError

DIGITS, IMAGENET = "prepared/digits", "prepared/imagenet256"           # where they are by default
FORMAT = 3                                    # of a prepared folder; another number is refused
SHARD = 1024                                  # files a shard: what a kill costs at most


def to_uint8(x):
    """Images in [-1, 1] -> uint8, by the rounding of ADM and DiT."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


def from_uint8(images):
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_images(x):
    """Pixels x (B, 1 or 3, H, W) in [-1, 1] -> images uint8 (B, H, W, 3), numpy."""
    return to_uint8(x).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).cpu().numpy()


def decode(x, meta, device="cpu", batch_size=8):
    """Scaled latents x (B, C, H, W) of the data that meta describes -> images uint8 (B, H, W, 3)
    numpy. UserError if its VAE cannot be had."""
    vae = pretrained.vae_of(meta, device)
    return np.concatenate([to_images(vae.decode(part.to(device)) if vae else part)
                           for part in x.split(batch_size)])


def classes_in_turn(n, n_classes):
    """(n,): 0, 1, ... n_classes - 1, 0, 1, ...; fewer than one of each are evenly spread. All zeros
    where n_classes is 0."""
    if 0 < n < n_classes:
        return torch.arange(n) * n_classes // n
    return torch.arange(n) % (n_classes or 1)


def open_images(source):
    """The images of a folder, a .tar or a Hugging Face data set, hfds/NAME: their names (n,) as
    bytes; y (n,); the classes' names; and read(name), which gives what Image.open takes. UserError
    if there is nothing to read."""
    if source.startswith("hfds/") and not os.path.isdir(source):
        return open_hub_dataset(source)
    if not os.path.isfile(source):
        return *list_images(source), lambda name: os.path.join(os.fsencode(source), name)
    with run.blamed_on(f"--images {source} is no folder and no .tar", "unpack or decompress it"), \
            tarfile.open(source, "r:") as archive:
        files = dict(tar_files(archive))
        top = os.path.commonpath([os.path.dirname(name) for name in files] or [""]) or "."
        files = {os.path.relpath(name, top): place for name, place in files.items()}

    def read(name):
        start, size = files[os.fsdecode(name)]
        with open(source, "rb") as file:                   # of its own, as for every thread
            file.seek(start)
            return io.BytesIO(file.read(size))

    return *sort_by_class(files, source), read


def open_hub_dataset(source):
    """open_images() of hfds/NAME: the first columns of images and of classes of its split train."""
    if not importlib.util.find_spec("datasets"):
        raise UserError(f"--images {source} needs a package: pip install datasets")
    import datasets
    with run.blamed_on(f"--images {source}", "hfds/NAME is a data set of the Hugging Face hub, or "
                       "a folder in its format, with images in a split train"):
        rows = datasets.load_dataset(source.removeprefix("hfds/"), split="train")
        columns = {type(kind): column for column, kind in reversed(rows.features.items())}
        image, label = columns[datasets.Image], columns.get(datasets.ClassLabel)
        classes = rows.features[label].names if label else []
        y = np.array(rows[label]) if label else np.zeros(len(rows), int)
        rows = rows.cast_column(image, datasets.Image(decode=False))

    def read(name):
        stored = rows[int(name)][image]
        return io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]

    return np.array([b"%08d" % i for i in range(len(rows))]), y, classes, read


def tar_files(archive, folder="", start=0):
    """name, (offset, size) of each file but hidden ones in an open .tar that starts at byte
    `start`. A .tar within, as in ImageNet's, is a folder."""
    for member in filter(tarfile.TarInfo.isfile, archive):
        name = os.path.normpath(os.path.join(folder, member.name))
        place = start + member.offset_data
        if name.endswith(".tar"):
            inner = tarfile.open(fileobj=archive.extractfile(member), mode="r:")
            yield from tar_files(inner, name[:-4], place)
        elif f"{os.sep}." not in os.sep + name:
            yield name, (place, member.size)


def list_images(folder):
    """Every file below folder but hidden ones, as sort_by_class() gives them. UserError if there is
    nothing to read."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is no folder; give one that holds images, or a subfolder of "
                        "images for each class")
    paths = []
    for top, folders, names in os.walk(folder, followlinks=True):
        paths += [os.path.relpath(os.path.join(top, name), folder) for name in names
                  if not name.startswith(".")]
        folders[:] = [name for name in folders if not name.startswith(".")
                      and not is_inside(top, os.path.join(top, name))]       # a link in a circle
    return sort_by_class(paths, folder)


def sort_by_class(paths, source):
    """Paths relative to source, in order, (n,) as bytes; y (n,); the classes' names, which are the
    folders that hold files. Without such folders: no names, and y is 0."""
    classes = sorted({path.split(os.sep)[0] for path in paths if os.sep in path})
    if classes:
        known = Image.registered_extensions()
        beside = [path for path in paths if os.sep not in path]
        images = [path for path in beside if os.path.splitext(path)[1].lower() in known]
        if images:
            raise UserError(f"{source} holds class folders and {len(images)} images beside them "
                            f"({images[0]}); move them into a folder, or elsewhere")
        paths = set(paths) - set(beside)
    if not paths:
        raise UserError(f"{source} holds no files")
    paths = sorted(paths, key=lambda path: path.split(os.sep))
    y = [classes.index(path.split(os.sep)[0]) if classes else 0 for path in paths]
    return np.array([os.fsencode(path) for path in paths]), np.array(y), classes


def is_inside(path, folder):
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([path, folder]) == folder


def load_image(file, size=None, grey=False):
    """uint8 (size, size, 3) RGB, upright by its EXIF, cropped as ADM does; size None: uncropped;
    grey: three times its luma. Raises what Pillow raises if the file is no whole image, and
    ValueError if nothing says which of its values is white."""
    if isinstance(file, (str, bytes, os.PathLike)):        # by path Pillow turns some TIFFs wrongly
        file = open(file, "rb")
    with file, Image.open(file) as image:
        image.load()
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]           # 12 in some TIFFs
        with contextlib.suppress(Exception):               # pixels are whole where EXIF is not
            ImageOps.exif_transpose(image, in_place=True)
        # convert() would clip these, not scale; early Pillows have 16-bit PNGs in mode I
        if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):
            image = Image.fromarray((np.asarray(image) >> bits - 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(f"a {image.format} of mode {image.mode} does not say which value is "
                             "white; save it with 8 or 16 bits")
        image = image.convert("L" if grey else "RGB").convert("RGB")
    if size is None:
        return np.asarray(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if image.width * image.height * scale ** 2 > 2 * Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{image.size} enlarged to {size} pixels is too large")
    image = image.resize((round(image.width * scale), round(image.height * scale)),
                         Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


class Pixels:
    """Takes a VAE's place where x are the images themselves, in [-1, 1]; grey: one channel."""
    name, weights, factor, has_std, scale, shift = None, "", 1, False, 1.0, 0.0

    def __init__(self, grey=False):
        self.kind, self.channels = "grey pixels" if grey else "pixels", 1 if grey else 3

    def encode(self, images):
        """Images (B, 3, H, W) -> x (B, 1 or 3, H, W)."""
        return images[:, :self.channels]


class Preparation:
    """What the flags of data.py ask for, and how a prepared folder is made of it."""
    def __init__(self, args, device):
        none = args.vae == "none"
        if none and args.vae_scale or args.grey and not none:
            raise UserError("--grey is for --vae none, and --vae_scale for another --vae")
        self.args, self.device, self.out = args, device, args.out
        self.names, self.y, self.classes, read = open_images(args.images)
        self.load = lambda name: load_image(read(name), args.size, args.grey)
        layers, files, settings, pca_files = (for_each_encoder(args, flag) for flag in (
            "encoder_layer", "encoder_weights", "encoder_kwargs", "pca"))
        self.encoders = [pretrained.Encoder(name, args.size, layer, file, dict(given or ()), device)
                         for name, layer, file, given in zip(args.encoder, layers, files, settings)]
        for encoder in self.encoders:
            if args.r_keep > encoder.d:
                raise UserError(f"--r_keep {args.r_keep}: {encoder.name} has {encoder.d} channels")
        self.encoder_files = [file and os.path.abspath(file) for file in files]
        vae = self.vae = (Pixels(args.grey) if none else
                          pretrained.VAE(args.vae, device, args.vae_scale))
        if args.size % (2 * vae.factor):
            raise UserError(f"--size {args.size} must be a multiple of {2 * vae.factor}: the VAE's "
                            f"{vae.factor} pixels a latent, and patches of 2")
        self.pcas = [read_pca(path, encoder, args)
                     for path, encoder in zip(pca_files, self.encoders) if path]
        # what decides the bytes: a folder that was begun with others is refused
        self.settings = {name: getattr(args, name) for name in (
            "size", "r_keep", "batch_size", "bf16", "keep_features", "pca_images", "pca_scale")} | {
            "images": f"{len(self.names)} files {short_hash(self.names, self.y)}",
            "vae": f"{vae.kind} {vae.weights[:16]}", "vae_scale": vae.scale,
            "encoder": [encoder.config for encoder in self.encoders],
            "pca": [short_hash(each.components, each.mean, each.std) for each in self.pcas]}

    def read_batch(self, rows):
        """Images uint8 (batch_size, size, size, 3) of those of the rows of names that can be read,
        then black ones; these rows; and why the others cannot be read, {name: reason}."""
        size, good, skipped = self.args.size, [], {}
        images = np.zeros((self.args.batch_size, size, size, 3), np.uint8)
        for row in rows:
            try:
                images[len(good)] = self.load(self.names[row])
                good.append(row)
            except Exception as error:                     # Pillow raises anything
                if run.is_the_machines(error):
                    raise
                skipped[os.fsdecode(self.names[row])] = run.one_line(error)
        return images, good, skipped

    def make(self, parts, rows, desc):
        """For each absent part that this process is to make: its path, and an iterator over the
        batches (read_batch) of its SHARD rows, read ahead by threads, to be used up first."""
        size, batches = self.args.batch_size, {}
        for k in parts.mine():
            of_part = rows[k * SHARD:(k + 1) * SHARD]
            batches[k] = np.split(of_part, range(size, len(of_part), size))
        bar = tqdm([*itertools.chain(*batches.values())], desc, unit="batch",
                   disable=run.rank_and_count()[0] > 0)
        stream = run.prefetch(self.read_batch, bar, self.args.workers)
        for k in batches:
            yield parts.paths[k], itertools.islice(stream, len(batches[k]))
        parts.complete()

    def encode(self, network, images, n):
        """What network, an encoder's features or the VAE's encode, makes of the first n of the
        images uint8 (B, H, W, 3)."""
        images = from_uint8(torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            return network(images)[:n]

    def fit_pca(self, i):
        """Save the PCA of encoder i's features of random images. The moments of SHARD images are a
        part; their sum depends neither on kills nor on the number of processes."""
        args, encoder, why = self.args, self.encoders[i], ""
        order = torch.randperm(len(self.names), generator=run.generator(0, "pca images"))
        rows = order[:args.pca_images].numpy()
        parts = run.Parts(f"{self.out}/moments_{i}", math.ceil(len(rows) / SHARD), "npz")
        for path, batches in self.make(parts, rows, "PCA"):
            moments = pca.Moments(encoder.d)
            for images, good, skipped in batches:
                why = max([why, *skipped.values()])
                f = self.encode(encoder.features, images, len(good))
                with run.blamed_on(f"--encoder {encoder.name}", "are its weights damaged?"):
                    moments.update(f.permute(0, 2, 3, 1).flatten(0, 2).cpu().numpy())
            run.write_whole(path, lambda file: np.savez(file, **vars(moments)))
        if run.rank_and_count()[0] == 0:
            total = pca.Moments(encoder.d)
            for path in parts.paths:                       # in the same order every time
                with np.load(path) as moments:
                    total.merge(moments["n"], moments["sum"], moments["outer"])
            with run.blamed_on(f"--images {args.images}", f"too few of its files are images {why}; "
                               f"mend them and remove {self.out}"):
                fitted = pca.fit(total, args.r_keep, args.pca_scale or 1.0, encoder.name,
                                 encoder.config["weights"])
            fitted.save(f"{self.out}/{pca_name(i)}")

    def make_shards(self):
        """Make the shards that are absent; the paths of all."""
        out, n, n_kept = self.out, len(self.names), int(self.args.keep_features)
        parts = run.Parts(f"{out}/shards", math.ceil(n / SHARD))
        pcas = [pca.load(f"{out}/{pca_name(i)}").to(self.device) for i in range(len(self.encoders))]
        for path, batches in self.make(parts, np.arange(n), "x and z"):
            stored, skipped = [], {}
            for images, rows, bad in batches:
                features = [self.encode(each.features, images, len(rows)) for each in self.encoders]
                x = self.encode(self.vae.encode, images, len(rows))
                made = x, project(pcas, features), *features[:n_kept]
                stored.append([self.y[rows], *(part.half().cpu().numpy() for part in made)])
                skipped |= bad
            y, *columns = map(np.concatenate, zip(*stored))
            write_shard(path, dict(zip("xzf", columns)) | {"y": y}, self.vae, skipped)
        return parts.paths

    def finish(self, shards):
        """Write files.txt, skipped.txt, the picture and, last, meta.json. UserError if too many
        files could not be read."""
        args, out, vae, n = self.args, self.out, self.vae, len(self.names)
        shards = [read_json(path.replace(".npy", ".json")) for path in shards]
        skipped = {name: reason for shard in shards for name, reason in shard["skipped"].items()}
        if len(skipped) > args.max_bad * n or len(skipped) == n:
            some = "; ".join(map(": ".join, [*skipped.items()][:5])) + " ..." * (len(skipped) > 5)
            raise UserError(f"{len(skipped)} of {n} files cannot be read, more than --max_bad "
                            f"{args.max_bad:g} of them: {some}; raise --max_bad, or mend them and "
                            f"remove {out}")
        for i in range(len(self.encoders)):                # not before all have seen the PCA
            shutil.rmtree(f"{out}/moments_{i}", ignore_errors=True)
        names = [name for name in map(os.fsdecode, self.names) if name not in skipped]
        for name, lines in ("files", names), ("skipped", map(": ".join, skipped.items())):
            text = os.fsencode("".join(f"{line}\n" for line in lines))
            run.write_whole(f"{out}/{name}.txt", lambda file: file.write(text))
        meta = describe(out, shards, [encoder.config for encoder in self.encoders], {
            "name": f"images of {os.path.basename(os.path.normpath(args.images))}",
            "vae": os.path.abspath(args.vae) if os.path.isdir(args.vae) else vae.name,
            "vae_weights": vae.weights, "scale": vae.scale, "shift": vae.shift,
            "has_std": vae.has_std, "image_size": args.size, "classes": self.classes,
            "encoder_files": self.encoder_files, "settings": self.settings})
        dataset = LatentDataset(out, meta=meta)
        rows = dataset.examples(10)
        stored = dataset.read(rows)
        kinds = {"image": [self.load(os.fsencode(names[row])) for row in rows],
                 "decoded": decode(dataset.unpack(stored)[0], meta, self.device, 1)}
        for i in range(0, max(1, meta["r_keep"] - 2), 3):
            kinds[f"z {i + 1}-{i + 3}"] = pca.colours(stored[1][:, i:], meta["z_std"][i:])
        run.write_picture(f"{out}/sheet.png", pca.image_grid(
            list(kinds.values()), len(rows), 128, names=list(kinds)))
        run.write_json(f"{out}/meta.json", meta)
        print(f"{out}: {meta['n']:,} images of {len(self.classes) or 'no'} classes "
              f"({run.one_line(', '.join(self.classes) or 'all alike')}), "
              f"{dataset.open_shard(0).itemsize / 1e3:.1f} kB each; {len(skipped)} files left out, "
              "see skipped.txt there; sheet.png shows images, decoded latents and features")


def prepare(args):
    """Make the prepared folder args.out from args.images, or go on where a killed run with the same
    settings was. Any number of processes share the work."""
    if is_inside(args.out, args.images):
        raise UserError(f"--out {args.out} is inside --images {args.images}; choose another")
    out, is_first = args.out, run.rank_and_count()[0] == 0
    work = Preparation(args, run.begin(args, days=7))      # the slowest may take hours longer
    with run.locked(out):
        if not run.share(is_first and is_complete(out, work.settings)):
            if is_first:
                run.write_json(f"{out}/meta.json", {"format": FORMAT, "settings": work.settings})
                for i, fitted in enumerate(work.pcas):
                    fitted.save(f"{out}/{pca_name(i)}")
            for i in range(len(work.encoders)):
                if not run.share(os.path.exists(f"{out}/{pca_name(i)}")):
                    work.fit_pca(i)
            run.gather(None)                               # all PCAs are there
            shards = work.make_shards()
            if is_first:
                work.finish(shards)
        elif is_first:
            print(f"{out} is there already, prepared with these settings")
        run.end()


def for_each_encoder(args, flag):
    """The values of a flag, one for each encoder; a single one, or None, serves them all."""
    n, values = len(args.encoder), getattr(args, flag) or [None]
    if len(values) not in (1, n):
        raise UserError(f"--{flag}: give a value for each of --encoder, {n}, or one for all; got "
                        f"{len(values)}")
    return values * n if len(values) == 1 else values


def pca_name(i):
    """The file of encoder i's PCA: pca.npz, pca_2.npz and on."""
    return f"pca_{i + 1}.npz" if i else "pca.npz"


def read_pca(path, encoder, args):
    """The first r_keep components of a PCA file. UserError if it is not this encoder's."""
    fitted, weights = pca.load(path), encoder.config["weights"]
    found = f"{fitted.encoder}, {len(fitted.mean)} channels, weights {fitted.weights[:16]}"
    wanted = f"{encoder.name}, {encoder.d} channels, weights {weights[:16] * bool(fitted.weights)}"
    if found != wanted:
        raise UserError(f"--pca {path} is the PCA of {found}; --encoder is {wanted}")
    with run.blamed_on(f"--pca {path}", "lower --r_keep"):
        return fitted.first(args.r_keep, args.pca_scale)


def project(pcas, features):
    """Each encoder's features (B, d, h, w) -> z (B, channels of all, h, w), on the first's grid."""
    zs = [each.project(f.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
          for each, f in zip(pcas, features)]
    return torch.cat([resize_z(z, zs[0].shape[2]) for z in zs], 1)


def short_hash(*arrays):
    return hashlib.sha256(b"".join(map(np.ndarray.tobytes, arrays))).hexdigest()[:16]


def read_json(path):
    """UserError if it is damaged."""
    with run.blamed_on(f"{path} is damaged", "remove the folder, and prepare it again"), \
            open(path) as file:
        return json.load(file)


def is_complete(out, settings):
    """Whether the folder out is prepared with these settings; False if it is empty or not finished.
    UserError if it was begun with others, or holds other things."""
    if not os.path.exists(f"{out}/meta.json"):
        if any(not name.startswith(".") for name in os.listdir(out)):
            raise UserError(f"{out} is not empty and holds no prepared data; choose another --out")
        return False
    meta = read_meta(out)
    for key, value in settings.items():
        found = meta["settings"].get(key)
        if found != value:
            raise UserError(f"{out} was made with another --{key}: {found}, now {value}; choose "
                            "another --out, or remove it")
    return "n" in meta


def write_shard(path, columns, vae=Pixels, skipped=()):
    """The .npy of records of these columns {name: (n, ...)} and, before it, the .json beside it:
    what meta.json needs to know of them. UserError for NaN, infinity, and a scale of the latents
    that would ruin training: noise has RMS 1."""
    records = np.empty(len(columns["y"]), [(name, array.dtype, array.shape[1:])
                                           for name, array in columns.items()])
    for name, array in columns.items():
        records[name] = array
        if not np.isfinite(array).all():
            raise UserError(f"{name} holds NaN or infinity: are the weights of the VAE or encoder "
                            "damaged? Give others by --vae or --encoder_weights, without --bf16")
    x_square = mean_square(columns["x"], vae.has_std, vae.scale, vae.shift)
    rms = np.sqrt(x_square.mean())
    if vae.name and len(records) and not 0.5 <= rms <= 2:
        better = f"--vae_scale {np.mean(vae.scale) / rms:.4g}" if not vae.shift else "another VAE"
        raise UserError(f"the scaled latents of --vae {vae.name} have RMS {rms:.3g}, and should "
                        f"have about 1: take {better}, and another --out")
    run.write_json(path.replace(".npy", ".json"), {
        "n": len(records), "skipped": dict(skipped),
        "shapes": {name: array.shape[1:] for name, array in columns.items()},
        "x_square": x_square.tolist(), "z_square": mean_square(columns["z"]).tolist(),
        "sha256": hashlib.sha256(records.tobytes()).hexdigest()})
    run.write_whole(path, lambda file: np.save(file, records))


def mean_square(array, has_std=False, scale=1.0, shift=0.0):
    """Stored latents or features (n, C or 2C, h, w) -> (C,) mean squares of scaled ones; of drawn
    ones, where the second half of the channels is a standard deviation. Zeros if n is 0."""
    mean, *std = torch.from_numpy(array).float().chunk(1 + has_std, 1)
    square = pretrained.scaled(mean, scale, shift).square()
    for part in std:
        square += pretrained.scaled(part, scale, 0.0).square()
    return square.numpy().sum((0, 2, 3), dtype=np.float64) / max(1, square[:, 0].numel())


def describe(out, shards, encoders, meta):
    """meta.json's content: what write_shard() found, what the PCAs in out and the encoders' configs
    say, and meta: name, classes (empty: unconditional), image_size, vae (None: x are pixels),
    vae_weights, scale, shift, has_std and settings."""
    shapes, n = shards[0]["shapes"], [shard["n"] for shard in shards]
    digest = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode())
    x_rms, z_rms = (np.sqrt(np.average([shard[name] for shard in shards], 0, n)).tolist()
                    for name in ("x_square", "z_square"))
    pcas = [pca.load(f"{out}/{pca_name(i)}") for i in range(len(encoders))]
    return meta | {
        "format": FORMAT, "n": sum(n), "shards": n, "sha256": digest.hexdigest(),
        "x_channels": shapes["x"][0] // (1 + meta["has_std"]), "x_size": shapes["x"][1],
        "r_keep": shapes["z"][0], "z_size": shapes["z"][1], "d": shapes.get("f", [0])[0],
        "x_rms": x_rms, "z_rms": z_rms, "z_std": np.concatenate([p.z_std for p in pcas]).tolist(),
        "encoders": [config | {"pca": pca_name(i), "scale": each.scale}
                     for i, (config, each) in enumerate(zip(encoders, pcas))],
        "versions": {name: importlib.metadata.version(name)
                     for name in ("numpy", "torch", "timm", "diffusers", "pillow")}}


def read_meta(folder):
    """A prepared folder's meta.json, without "n" while it is not finished. UserError if it is
    missing, damaged or of another format."""
    if not os.path.exists(f"{folder}/meta.json"):
        raise UserError(f"no prepared data in {folder}; make it with: python data.py --images DIR "
                        f"--out {folder}, or train on the embedded digits: --data digits")
    meta = read_json(f"{folder}/meta.json")
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != FORMAT:
        raise UserError(f"{folder} has format {found}, this code reads {FORMAT}; remove it and "
                        "prepare it again")
    return meta


class LatentDataset:
    """A prepared folder, read through memory maps: 1e3 or 1e6 images, opening costs the same.

    r: channels of z to read, an equal share of each encoder's first; 0 for none, None for all.
    features: read f too. meta: meta.json's content, if that is not there yet. UserError if the
    folder is missing, unfinished or damaged, or does not keep what is asked for.
    """
    def __init__(self, folder, r=None, features=False, meta=None):
        meta = meta or read_meta(folder)
        if "n" not in meta:
            raise UserError(f"{folder} is not finished; the same data.py command continues it")
        n_encoders, r_keep = len(meta["encoders"]), meta["r_keep"]
        if features and not meta["d"]:
            raise UserError(f"--repa needs the encoder's features, and {folder} did not keep them: "
                            "prepare it anew with data.py --keep_features")
        r = r_keep if r is None else r
        if r > r_keep or r % n_encoders:
            raise UserError(f"--z_channels {r} must be at most the {r_keep} that {folder} keeps, "
                            f"and a multiple of its {n_encoders} encoders")
        first = np.arange(n_encoders)[:, None] * (r_keep // n_encoders)
        self.channels = (first + np.arange(r // n_encoders)).ravel()
        self.folder, self.r, self.n, self.has_std = folder, r, meta["n"], meta["has_std"]
        self.meta = meta | {"z_std": [meta["z_std"][c] for c in self.channels]}
        self.names = ("x", "z", "y", "f") if features else ("x", "z", "y")
        self.ends = np.cumsum(meta["shards"])
        self.opening = threading.Lock()      # Python 3.11 parses .npy headers in one thread alone
        # few at a time: an open file each
        self.shard = functools.lru_cache(maxsize=128)(self.open_shard)

    def open_shard(self, k):
        """The records of shard k, memory-mapped."""
        path = f"{self.folder}/shards/{k:05d}.npy"
        with self.opening, run.blamed_on(f"{path} is damaged or missing",
                                         f"remove {self.folder} and prepare it again"):
            records = np.load(path, mmap_mode="r")
            if len(records) != self.meta["shards"][k]:
                raise ValueError(f"{len(records)} records, not {self.meta['shards'][k]}")
        return records

    def examples(self, k):
        """The rows of k images, evenly spread; of all of them if there are fewer."""
        k = min(k, self.n)
        return (torch.arange(k) + 0.5).mul(self.n / k).long()

    def read(self, rows):
        """x, z, y and f (None unless asked for) of rows (B,), as they are stored, on the CPU."""
        rows = np.asarray(rows)
        shards = np.searchsorted(self.ends, rows, "right")
        records = [self.shard(k)[place] for k, place in zip(shards, rows - self.ends[shards])]
        parts = {name: np.stack([record[name] for record in records]) for name in self.names}
        # numpy's indexing: torch's would start threads of its own in each that loads batches
        parts["z"] = np.ascontiguousarray(parts["z"][:, self.channels])
        return [torch.from_numpy(parts[name]) if name in parts else None for name in "xzyf"]

    def unpack(self, stored, eps=None):
        """What read() returned, on any device -> x (B, C, H, W), scaled; z (B, r, H, W) on x's grid
        or None; y (B,); f (B, d, h, w) or None. Where the VAE has a standard deviation, x is its
        mean + std * eps, eps (B, C, H, W); without eps its mean."""
        x, z, y, f = stored
        x = x.float()
        if self.has_std:
            x, std = x.chunk(2, 1)
            x = x if eps is None else x + std * eps
        x = pretrained.scaled(x, self.meta["scale"], self.meta["shift"])
        return (x, resize_z(z.float(), x.shape[-1]) if self.r else None, y,
                None if f is None else f.float())


def encode_images(paths, dataset, device="cpu"):
    """Images uint8 (n, H, W, 3) of new files, and z (n, r, H, W) of them on x's grid, as unpack()
    makes it of stored ones, by the encoders and PCAs that made the dataset's. UserError if one of
    them cannot be had."""
    meta, folder, images, features, pcas = dataset.meta, dataset.folder, [], [], []
    size, configs = meta["image_size"], meta["encoders"]
    for path in paths:
        with run.blamed_on(f"{path} is no image", "give whole images"):
            images.append(load_image(path, size, grey=meta["x_channels"] == 1))
    images = np.stack(images)
    x = from_uint8(torch.from_numpy(images).permute(0, 3, 1, 2).to(device))
    for config, file in zip(configs, meta.get("encoder_files", [None] * len(configs))):
        if config["name"] == DigitEncoder.name:
            encoder = DigitEncoder.load(f"{folder}/{file}").to(device)
        else:
            encoder = pretrained.Encoder(config["name"], size, config["layer"], file,
                                         config["settings"], device)
        if encoder.config["weights"] != config["weights"]:
            raise UserError(f"the weights of {config['name']} are not those that made {folder}; "
                            "put those in their place")
        features.append(encoder.features(x))
        fitted = pca.load(f"{folder}/{config['pca']}")
        pcas.append(fitted.first(dataset.r // len(configs)).to(device))
    return images, resize_z(project(pcas, features), meta["x_size"]).cpu()


def resize_z(z, size):
    """z (B, r, h, w) -> (B, r, size, size), before it is noised."""
    return F.interpolate(z, size=(size, size), mode="bilinear", align_corners=False)


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    """The rows 0..n-1 in the order of that epoch."""
    return torch.randperm(n, generator=run.generator(seed, "epoch", epoch))


def rows_of_step(seed, step, batch_size, n):
    """Rows (batch_size,) of training step 0, 1, ...: the next piece of an endless stream of epochs,
    each shuffled anew."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // n
    return torch.cat([epoch_order(seed, int(epoch), n)[positions[epochs == epoch] % n]
                      for epoch in epochs.unique()])


def digits():
    """The 1,797 scans of scikit-learn's load_digits: x (n, 1, 8, 8) in [-1, 1], y (n,) and the mask
    held_out (n,) of the tenth that neither the encoder nor the model ever trains on."""
    from sklearn.datasets import load_digits
    images, y = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 8 - 1          # pixels are 0..16
    held_out = torch.zeros(len(x), dtype=torch.bool)
    shuffled = torch.randperm(len(x), generator=run.generator(0, "digits held out"))
    held_out[shuffled[:len(x) // 10]] = True
    return x, torch.from_numpy(y), held_out


class DigitEncoder(nn.Module):
    """Takes DINOv2's place for digits: (B, 1, 8, 8) -> features (B, 64, 4, 4) -> logits (B, 10)."""
    name = "the digits' convnet"

    def __init__(self, width=64, n_classes=10):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, stride=2), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1))
        self.head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                  nn.Linear(width, n_classes))

    @classmethod
    def load(cls, path):
        """From encoder.safetensors of a prepared folder. UserError if it is missing or damaged."""
        encoder = cls()
        with run.blamed_on(f"{path} is not the digits' encoder", "prepare them again"):
            encoder.load_state_dict(safetensors.torch.load_file(path))
        return encoder.eval()

    @property
    def config(self):
        return {"name": self.name, "weights": pretrained.weights_hash(self)}

    @torch.no_grad()
    def features(self, x):
        """Grey images (B, 1 or 3, 8, 8), three channels alike -> (B, 64, 4, 4)."""
        return self.convs(x[:, :1])

    def forward(self, x):
        return self.head(self.convs(x))


def train_digit_encoder(x, y, epochs=20, batch_size=64, seed=0):
    """A DigitEncoder trained on labelled digits, in eval mode; equal seeds, equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = DigitEncoder()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    for epoch in range(epochs):
        shuffled = torch.randperm(len(x), generator=run.generator(seed, "encoder epoch", epoch))
        for rows in shuffled.split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(encoder(x[rows]), y[rows]).backward()
            optimizer.step()
    return encoder.eval()


def prepare_digits(out=DIGITS, scale=None):
    """Write the training digits as a prepared folder, unless it is there. Takes ten seconds.
    scale: z's, as in pca.fit(); None: that by which its first 4 channels have RMS 1, like x."""
    settings = {"images": "scikit-learn's digits"} | ({"pca_scale": scale} if scale else {})
    if os.path.exists(f"{out}/meta.json") and is_complete(out, settings):
        return
    with run.locked(out, seconds=120):
        if is_complete(out, settings):                     # another command was first
            return
        print(f"preparing {out}: training the digits' encoder, once", flush=True)
        run.write_json(f"{out}/meta.json", {"format": FORMAT, "settings": settings})
        x, y, held_out = digits()
        x, y = x[~held_out], y[~held_out]
        encoder = train_digit_encoder(x, y)
        safetensors.torch.save_file(encoder.state_dict(), f"{out}/encoder.safetensors")
        f, config = encoder.features(x), encoder.config
        moments = pca.Moments(f.shape[1]).update(f.permute(0, 2, 3, 1).flatten(0, 2).numpy())
        fitted = pca.fit(moments, 16, 1.0, *config.values())
        fitted = fitted.first(16, scale or round(float(fitted.variance[:4].mean() ** -0.5), 4))
        fitted.save(f"{out}/pca.npz")
        os.makedirs(f"{out}/shards", exist_ok=True)
        write_shard(f"{out}/shards/00000.npy", {
            "x": x.half().numpy(), "y": y.numpy(), "f": f.half().numpy(),
            "z": project([fitted.to("cpu")], [f]).half().numpy()})
        run.write_json(f"{out}/meta.json", describe(
            out, [read_json(f"{out}/shards/00000.json")], [config], {
                "name": "digits", "vae": None, "vae_weights": "", "scale": 1.0, "shift": 0.0,
                "has_std": False, "image_size": 8, "classes": list("0123456789"),
                "encoder_files": ["encoder.safetensors"], "settings": settings}))


def open_data(name, r, features=False):
    """The LatentDataset behind --data: a prepared folder, or "digits", made if they are missing."""
    if name == "digits":
        prepare_digits()
    return LatentDataset(DIGITS if name == "digits" else name, r, features)


def main(args):
    out = args.out = args.out or (IMAGENET if args.images else DIGITS)
    if args.images:
        warnings.simplefilter("ignore")                    # Pillow's, of files it can read
        prepare(args)
    else:
        for name, value in vars(args).items():
            if name not in ("out", "pca_scale") and value != parser().get_default(name):
                raise UserError(f"--{name} is for --images; of the digits, leave it out")
        prepare_digits(out, args.pca_scale)
        print(f"{out}: {read_meta(out)['n']:,} images of 10 classes")


def layer(text):
    """argparse's type of --encoder_layer."""
    return None if text == "last" else run.natural(text)


def parser():
    p = run.Parser(description=__doc__)
    p.add_argument("--images", metavar="SOURCE",
                   help="a folder, with a subfolder for each class or flat (no classes), a .tar of "
                        "one, or hfds/NAME, a data set of the Hugging Face hub; whatever Pillow "
                        "reads (default: scikit-learn's digits)")
    p.add_argument("--out", metavar="DIR", help="the prepared folder (default: "
                   f"{IMAGENET}, without --images {DIGITS})")
    p.flag("size", 256, "pixels a side after ADM's centre crop; a multiple of twice the VAE's "
                        "factor, so 16 for SD-VAE", type=run.count)
    p.flag("vae", pretrained.SD_VAE, "diffusers AutoencoderKL or AutoencoderTiny, hub name or "
                                     "local folder; none: x are pixels, for small images")
    p.switch("grey", False, "with --vae none: one channel, the luma")
    p.add_argument("--vae_scale", type=run.positive,
                   help="number that makes the latents' RMS 1 (default: the VAE's own, 0.18215 for "
                        "the one above)")
    p.flag("encoder", [pca.DINOV2], "timm models; several make one z, each with its own PCA",
           nargs="+", type=str)
    p.flag("encoder_layer", [None], "feature level as in timm's forward_intermediates, one for all "
                                    "encoders or one for each; last is after the final norm",
           nargs="+", type=layer, metavar="K")
    p.flag("encoder_weights", [None], "local weights, one for all or one for each; None: timm's",
           nargs="+", type=run.existing_file, metavar="FILE")
    p.add_argument("--encoder_kwargs", nargs="*", metavar="KEY=VALUE", action="append",
                   type=run.key_value,
                   help="arguments of timm.create_model; mean, std and input_size override the "
                        "model's own. Given several times: once for each encoder")
    p.add_argument("--pca", nargs="+", metavar="FILE",
                   help="fitted PCA, one for each encoder (default: it is fitted first)")
    p.flag("pca_images", 76_800, "random images that the PCA is fitted on at most", type=run.count)
    p.add_argument("--pca_scale", type=run.positive, help="number that z is multiplied with "
                   "(default: 1, the paper's; with --pca, that file's; for digits, "
                   "the one of RMS 1)")
    p.flag("r_keep", 16, "components kept of each encoder; train.py --z_channels takes the first "
                         "of them", type=run.count)
    p.switch("keep_features", False, "store the first encoder's features too, for train.py --repa: "
                                     "393 kB an image with DINOv2-B")
    p.flag("max_bad", 0.01, "share of files that may be unreadable and are left out; more stop the "
                            "run", type=run.share_of_one)
    p.flag("batch_size", 32 if torch.cuda.is_available() else 4,
           "images that a network sees at once: 32 on CUDA devices, 4 is the fastest on a CPU",
           type=run.count)
    p.flag("workers", max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
           "threads that read images: the CPU cores, shared among torchrun's processes",
           type=run.count)
    p.switch("bf16", False, "bfloat16 autocast of VAE and encoders, whose output is kept for all "
                            "later training")
    p.device_flag()
    return p


if __name__ == "__main__":
    run.run_cli(main, parser().parse_args())
