"""Images in, tensors out: photographs or the embedded digits, prepared once; batches in order.

    python data.py                                   # the embedded digits, in prepared/digits
    python data.py --images imagenet/train           # a folder of images, in prepared/imagenet256
    torchrun --nproc_per_node=8 data.py --images imagenet/train

A prepared folder holds, one row an image: x.npy (n, C or 2C, H, W) float16, the codec's latents or
their means and standard deviations, not scaled yet; z.npy (n, r_keep, h, w) float16, the encoder's
features reduced by PCA; y.npy (n,) int64 classes; with --keep_features f.npy (n, d, h, w) float16,
the features themselves, for train.py --repa; and meta.json, the PCA and skipped.txt.
"""
import argparse
import ast
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
import zlib

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from tqdm import tqdm

import pca

PREPARED = {"digits": "prepared/digits"}      # made at first use, by the name that --data takes
IMAGENET = "prepared/imagenet256"             # what every model but size T trains on
FORMAT = 2                                    # of a prepared folder; another number is refused
VAE = "stabilityai/sd-vae-ft-ema"             # the paper's
PCA_CHUNK = 1024                              # images a partial sum: lost at most when killed
# OSErrors that blame one file and not the disk or the process; Pillow's own have no number
OF_THE_FILE = (None, errno.ENOENT, errno.EACCES, errno.ELOOP, errno.EINVAL)


class UserError(ValueError):
    """A mistake of the user's, in one line: what was given, what was needed, what to type."""


def run_cli(main, args):
    """main(args); mistakes, trouble with files (a full disk) and Ctrl-C end the script with one
    line and an exit code, without a traceback."""
    try:
        main(args)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def pick_device(name=None):
    """The torch device of that name; None: this process's GPU if there is one, else the CPU.
    UserError if it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))    # torchrun's
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def rank_and_count():
    """This process's rank, and how many there are: torchrun's word, or alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def begin(args, n_processes, gpu_backend="gloo", days=1 / 24):
    """The device of args, with the defaults of --bf16 and --compile for it; meet the other
    processes, by gpu_backend if there are GPUs. Some may wait `days` for others, as long as a
    preview or a save takes. UserError if the device cannot be had."""
    device = pick_device(args.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    args.bf16 = on_gpu if args.bf16 is None else args.bf16
    args.compile = on_gpu if args.compile is None else args.compile
    if n_processes > 1:
        nccl = on_gpu and gpu_backend == "nccl"
        dist.init_process_group("nccl" if nccl else "gloo", timeout=datetime.timedelta(days),
                                **({"device_id": device} if nccl else {}))
    return device


def barrier():
    if dist.is_initialized():
        try:
            dist.barrier()
        except RuntimeError:                               # its own message says why
            raise UserError("another process stopped") from None


def share(value):
    """The first process's value, for all."""
    if not dist.is_initialized():
        return value
    box = [value]
    try:
        dist.broadcast_object_list(box)
    except RuntimeError:
        raise UserError("another process stopped") from None
    return box[0]


def begins_anew(args):
    """--restart, but not where torchrun starts a failed run again: that goes on."""
    return args.restart and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


def same_command(args):
    return "the same command" + " without --restart" * args.restart


@contextlib.contextmanager
def clear_errors(args, kept, smaller):
    """Too little memory or disk, in one line: kept says what is not lost, smaller what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{one_line(error)}; {smaller}") from None
    except OSError as error:
        raise UserError(f"{error}; {kept}: when that is mended (a full disk?), "
                        f"{same_command(args)} goes on from there") from None


def seeds(seed, purpose, index=0, n=1):
    """n integers for (seed >= 0, purpose, index >= 0), and for nothing else in the program."""
    key = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), index])
    return key.generate_state(n, np.uint64).tolist()


def generator(seed, purpose, index=0):
    """A CPU generator for (seed, purpose, index), and for nothing else in the program."""
    return torch.Generator().manual_seed(*seeds(seed, purpose, index))


def classes_in_turn(n, n_classes):
    """(n,): 0, 1, ... n_classes - 1, 0, 1, ...; fewer than one of each are evenly spread. All zeros
    where n_classes is 0."""
    if 0 < n < n_classes:
        return torch.arange(n) * n_classes // n
    return torch.arange(n) % (n_classes or 1)


def to_uint8(x):
    """Images in [-1, 1] -> uint8, by the rounding of ADM and DiT."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


def from_uint8(images):
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_images(x):
    """Pixels x (B, 1 or 3, H, W) in [-1, 1] -> images uint8 (B, H, W, 3), numpy."""
    return to_uint8(x).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).cpu().numpy()


def contact_sheet(kinds, columns, tile, gap=2, names=()):
    """A PIL image of tiles: kinds are lists of uint8 (h, w, 3) pictures, the i-th of each standing
    one above the other; `columns` to a row, each enlarged or reduced to `tile` pixels. names, one
    for each kind, stand on the left."""
    n, step = len(kinds[0]), tile + gap
    columns = min(columns, n)
    row, left = len(kinds) * step + 2 * gap, gap
    if names:
        font = ImageFont.load_default(max(8, tile // 4))
        left += max(round(font.getlength(name)) + 4 * gap for name in names)
    canvas = Image.new("RGB", (left + columns * step, -(-n // columns) * row - gap), "white")
    for k, kind in enumerate(kinds):
        for i, picture in enumerate(kind):
            picture = Image.fromarray(picture).resize((tile, tile), Image.Resampling.NEAREST)
            canvas.paste(picture, (left + i % columns * step, gap + i // columns * row + k * step))
    for k, name in enumerate(names):
        middle = gap + k * step + tile / 2
        ImageDraw.Draw(canvas).text((2 * gap, middle), name, "black", font, anchor="lm")
    return canvas


def list_images(folder):
    """Every file below folder but hidden ones: paths (n,) as bytes, relative to it, class by class
    and sorted; y (n,); the classes' names, which are the sorted subfolders that hold files. Without
    such subfolders: no names, and y is 0. UserError if there is nothing to read."""
    def below(name, above=()):
        top = os.path.join(folder, name)
        if os.path.realpath(top) in above:                 # a link to where it is
            return
        with os.scandir(top) as entries:
            for entry in entries:
                path = f"{name}/{entry.name}"
                if entry.name.startswith("."):
                    continue
                elif entry.is_dir():
                    yield from below(path, (*above, os.path.realpath(top)))
                elif entry.is_file() or entry.is_symlink():
                    yield path

    if not os.path.isdir(folder):
        raise UserError(f"--images {folder} is no folder; give one that holds images, or a "
                        "subfolder of images for each class")
    with os.scandir(folder) as entries:
        entries = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith("."))
    classes = {name: sorted(below(name)) for name, is_folder in entries if is_folder}
    classes = {name: paths for name, paths in classes.items() if paths}
    flat = [name for name, is_folder in entries if not is_folder]
    if classes:
        known = Image.registered_extensions()
        beside = [name for name in flat if os.path.splitext(name)[1].lower() in known]
        if beside:
            raise UserError(f"{folder} holds class folders and {len(beside)} images beside them "
                            f"({beside[0]}); move them into a folder, or elsewhere")
        flat = [path for paths in classes.values() for path in paths]
    if not flat:
        raise UserError(f"{folder} holds no files")
    y = np.repeat(np.arange(max(1, len(classes))),
                  [len(paths) for paths in classes.values()] or [len(flat)])
    # bytes, not str: workers share the array without copying it
    return np.array([os.fsencode(path) for path in flat]), y, list(classes)


def load_image(path, size):
    """uint8 (size, size, 3) RGB, upright by its EXIF, cropped as ADM does. Raises what Pillow
    raises if the file is no whole image."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):              # convert() would clip 16 bits, not scale
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if image.width * image.height * scale ** 2 > 2 * Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{image.size} enlarged to {size} pixels is too large")
    image = image.resize((round(image.width * scale), round(image.height * scale)),
                         Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


class Batches(torch.utils.data.Dataset):
    """Image files in batches of a fixed shape: item b is rows (k,), images uint8 (batch_size, size,
    size, 3) and the mask good (batch_size,). What cannot be read is black and not good."""
    def __init__(self, folder, files, rows, batch_size, size):
        self.folder, self.files, self.size = os.fsencode(folder), files, size
        self.batches = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
        self.batch_size = batch_size

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, b):
        rows = self.batches[b]
        images = np.zeros((self.batch_size, self.size, self.size, 3), np.uint8)
        good = np.zeros(self.batch_size, bool)
        for i, file in enumerate(self.files[rows]):
            try:
                images[i] = load_image(os.path.join(self.folder, file), self.size)
                good[i] = True
            except MemoryError:
                raise
            except OSError as error:
                if error.errno not in OF_THE_FILE:
                    raise
            except Exception:                        # Pillow raises anything on a damaged file
                pass
        return torch.from_numpy(rows), torch.from_numpy(images), torch.from_numpy(good)

    def loader(self, workers, batches=None):
        """Items of the given numbers (None: all) in turn, read ahead by worker processes. UserError
        if reading fails for another reason than the file."""
        numbers = range(len(self)) if batches is None else batches
        try:
            yield from torch.utils.data.DataLoader(self, batch_size=None, num_workers=workers,
                                                   sampler=numbers,
                                                   pin_memory=torch.cuda.is_available())
        except (RuntimeError, OSError, MemoryError) as error:          # many lines, of the worker's
            last = str(error).strip().splitlines()[-1]
            raise UserError(f"reading images failed ({last}); fewer --workers may help, and the "
                            "same command goes on where it was") from None


def weights_hash(net):
    """sha256 of a network's weights, names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def is_hub_name(name):
    """Whether it can be a repository's, OWNER/NAME, and is nothing that lies here."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not os.path.exists(name)


class Codec:
    """A diffusers AutoencoderKL or AutoencoderTiny, local folder or hub name, between images and
    latents. Scaled latents are (raw - shift) * scale. UserError if it cannot be had.

    scale, shift: None for those of its configuration; else a number, or a list, one a channel.
    """
    def __init__(self, name, device="cpu", scale=None, shift=None):
        import diffusers                                  # slow to import: not before it is used
        diffusers.utils.logging.set_verbosity_error()
        if not is_hub_name(name) and not os.path.exists(f"{name}/config.json"):
            raise UserError(f"--vae {name}: no config.json there, and it is no hub name (such as "
                            f"{VAE}); give a local folder in diffusers' format, or a hub name")
        try:
            kind = diffusers.AutoencoderKL.load_config(name).get("_class_name")
            if kind not in ("AutoencoderKL", "AutoencoderTiny"):
                raise ValueError(f"it is of class {kind}, not AutoencoderKL or AutoencoderTiny")
            vae, info = getattr(diffusers, kind).from_pretrained(
                name, torch_dtype=torch.float32, low_cpu_mem_usage=False, output_loading_info=True)
            lacking = [*info["missing_keys"], *info["mismatched_keys"]]
            if lacking:
                raise ValueError(f"its weights lack or do not fit {lacking[0]}")
        except Exception as error:                        # a dozen kinds, many lines
            raise UserError(f"--vae {name} cannot be loaded ({one_line(error)}); give a hub name "
                            "such as " + VAE + " or a local folder in diffusers' format") from None
        self.vae = vae.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.name, self.kind, self.weights, config = name, kind, weights_hash(vae), vae.config
        self.has_std, self.channels = kind == "AutoencoderKL", config.latent_channels
        levels = config.block_out_channels if self.has_std else config.encoder_block_out_channels
        self.factor = 2 ** (len(levels) - 1)               # pixels a latent
        if shift is None:
            shift = config.get("latents_mean") or config.get("shift_factor") or 0.0
        if scale is None:
            scale = config.scaling_factor / np.array(config.get("latents_std") or 1.0)
        self.scale, self.shift = np.asarray(scale).tolist(), shift

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> raw latents (B, C, h, w), or (B, 2C, h, w): their mean,
        then their standard deviation."""
        out = self.vae.encode(images.contiguous(memory_format=torch.channels_last))
        if not self.has_std:
            return out.latents.float()
        return torch.cat([out.latent_dist.mean, out.latent_dist.std], 1).float()

    @torch.no_grad()
    def decode(self, x):
        """Scaled latents (B, C, h, w) -> images (B, 3, H, W) in about [-1, 1]."""
        return self.vae.decode(x / per_channel(self.scale, x) + per_channel(self.shift, x)).sample


def per_channel(value, x):
    """A number or a list of C numbers, to be broadcast over x (B, C, H, W)."""
    return column_of(tuple(value), x.device, x.dtype) if isinstance(value, list) else value


@functools.lru_cache(maxsize=4)                  # copied to a GPU once: a copy waits for it
def column_of(values, device, dtype):
    return torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1)


def scaled(x, scale, shift):
    """Raw latents (B, C, h, w) -> what the network sees."""
    return (x - per_channel(shift, x)) * per_channel(scale, x)


@functools.lru_cache(maxsize=1)
def open_codec(name, weights, scale_and_shift, device):
    codec = Codec(name, device, *json.loads(scale_and_shift))
    if weights and codec.weights != weights:
        raise UserError(f"the codec at {name} is not the one that made the data, its weights "
                        f"differ; put that one there, or: sample.py --vae {name}")
    return codec


def codec_of(meta, device="cpu"):
    """The codec that made the data which meta describes, opened once; None: its x are images."""
    if meta["codec"] is None:
        return None
    return open_codec(meta["codec"], meta["codec_weights"],
                      json.dumps([meta["scale"], meta["shift"]]), torch.device(device))


def decode(x, meta, device="cpu", batch_size=8):
    """Scaled latents x (B, C, H, W) of the data that meta describes -> images uint8 (B, H, W, 3)
    numpy. UserError if its codec cannot be had."""
    codec = codec_of(meta, device)
    return np.concatenate([to_images(codec.decode(part.to(device)) if codec else part)
                           for part in x.split(batch_size)])


class Encoder:
    """A timm model whose feature maps make z. UserError if it cannot be had, or not so.

    size: pixels of the images. A plain vision transformer sees them resized to size / 16 patches a
    side (DINOv2: 224 for 256), other models as they are. layer: a level as in timm's
    forward_intermediates; None: the last, after the final norm. weights: a file; None: timm's own.
    settings: timm.create_model's, and mean, std, input_size in place of the model's own.
    """
    def __init__(self, name, size, layer=None, weights=None, settings=None, device="cpu"):
        import timm                                       # slow to import: not before it is used
        overlay = {"file": weights, "custom_load": str(weights).endswith(".npz")} if weights else {}
        of_model = dict(settings or {})
        ours = {key: of_model.pop(key) for key in ("mean", "std", "input_size") if key in of_model}
        if weights and not os.path.exists(weights):
            raise UserError(f"--encoder_weights {weights}: no such file")
        try:
            net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay,
                                    **of_model)                  # with its head: a strict load
            self.weights = weights_hash(net)
            reductions = [level["reduction"] for level in net.feature_info]
            plain = len(reductions) > 1 and len(set(reductions)) == 1      # a vision transformer
            patches = max(1, round(size / 16)) * reductions[0]
            self.input_size = ours.get("input_size", patches if plain else size)
            if hasattr(net, "set_input_size"):
                net.set_input_size(img_size=(self.input_size, self.input_size))
            net = net.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
            config = timm.data.resolve_model_data_config(net) | ours
            self.mean, self.std = (torch.tensor(config[key], device=device).expand(3).view(3, 1, 1)
                                   for key in ("mean", "std"))
            self.net, self.layer = net, layer
            black = torch.zeros(1, 3, size, size, device=device)
            _, self.d, *self.grid = self.features(black).shape
        except Exception as error:                        # a dozen kinds, many lines
            raise UserError(f"--encoder {name} cannot be used so ({one_line(error)}); "
                            "--encoder_weights takes a local file, and timm.list_models() has the "
                            "names") from None
        self.name = name if layer is None else f"{name} level {layer}"
        self.name += "".join(f" {key}={value}" for key, value in sorted((settings or {}).items())
                             if key != "input_size")

    @torch.no_grad()
    def features(self, images):
        """Images (B, 3, size, size) in [-1, 1] -> (B, d, h, w): no class token, no registers."""
        f = ((images + 1) / 2 - self.mean) / self.std
        if f.shape[-1] != self.input_size:                # as the official code: antialias off
            f = F.interpolate(f, size=(self.input_size, self.input_size), mode="bicubic")
        f = f.contiguous(memory_format=torch.channels_last)
        last = self.layer is None
        return self.net.forward_intermediates(f, indices=1 if last else [self.layer], norm=last,
                                              intermediates_only=True, stop_early=True,
                                              output_fmt="NCHW")[-1].float()


def one_line(error, most=200):
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + "..."


def open_encoders(args, device):
    """The Encoders of pca.feature_flags, ready to use."""
    n = len(args.encoder)

    def one_each(values, flag):
        if len(values) not in (1, n):
            raise UserError(f"--{flag}: give one value for all of --encoder, or one for each; got "
                            f"{len(values)} for {n}")
        return values * n if len(values) == 1 else values

    for layer in args.encoder_layer:
        if layer != "last" and not layer.isdecimal():
            raise UserError(f"--encoder_layer {layer}: give a number from 0, or last")
    layers = one_each(args.encoder_layer, "encoder_layer")
    weights = one_each(args.encoder_weights, "encoder_weights")
    settings = [key_values(pairs, "encoder_kwargs")
                for pairs in one_each(args.encoder_kwargs or [[]], "encoder_kwargs")]
    return [Encoder(name, args.size, None if layer == "last" else int(layer),
                    None if file == "hub" else file, of_model, device)
            for name, layer, file, of_model in zip(args.encoder, layers, weights, settings)]


def key_values(pairs, flag):
    """{key: value} of KEY=VALUE texts; a value is a Python literal, or a word."""
    def literal(text):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text

    if not all("=" in pair for pair in pairs):
        raise UserError(f"--{flag} {' '.join(pairs)}: give KEY=VALUE pairs")
    return {key: literal(value) for key, value in (pair.split("=", 1) for pair in pairs)}


class Source:
    """What the flags of pca.feature_flags say: the files, the encoders, where and how to run."""
    def __init__(self, args):
        self.args, self.device = args, pick_device(args.device)
        if args.batch_size is None:
            args.batch_size = 32 if self.device.type == "cuda" else 4
        for name in ("batch_size", "pca_images", "r_keep"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name} {getattr(args, name)} must be at least 1")
        if args.size < 8:
            raise UserError(f"--size {args.size} must be at least 8 pixels")
        if args.pca_scale is not None and not 0 < args.pca_scale < float("inf"):
            raise UserError(f"--pca_scale {args.pca_scale} must be above 0")
        if args.seed < 0 or (args.workers or 0) < 0:
            raise UserError("--seed and --workers must be 0 or more")
        self.rank, self.n_ranks = rank_and_count()
        self.files, self.y, self.classes = list_images(args.images)
        self.bf16 = self.device.type == "cuda" if args.bf16 is None else args.bf16
        self.workers = args.workers
        if args.workers is None:
            self.workers = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.encoders = open_encoders(args, self.device)
        for encoder in self.encoders:
            if args.r_keep > encoder.d:
                raise UserError(f"--r_keep {args.r_keep}: {encoder.name} has {encoder.d} channels")
        torch.backends.cudnn.deterministic = True          # a resumed run writes the same bytes

    def batches(self, rows):
        return Batches(self.args.images, self.files, rows, self.args.batch_size, self.args.size)

    def to_device(self, images):
        """uint8 (B, H, W, 3) -> (B, 3, H, W) in [-1, 1] on the device."""
        return from_uint8(images.to(self.device, non_blocking=True).permute(0, 3, 1, 2))

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def random_rows(self):
        order = torch.randperm(len(self.files), generator=generator(self.args.seed, "pca images"))
        return order[:self.args.pca_images].numpy()

    def fit_pcas(self, folder):
        """A PCA of each encoder from random images. Partial sums of PCA_CHUNK images lie in folder
        meanwhile: a killed run adds what is missing, and the total depends neither on that nor on
        the number of processes (of as many threads). Only rank 0 gets the PCAs, others an empty
        list."""
        batches = self.batches(self.random_rows())
        each = max(1, PCA_CHUNK // self.args.batch_size)
        chunks = [range(i, min(i + each, len(batches))) for i in range(0, len(batches), each)]
        paths = [f"{folder}/moments_{c:05d}.npz" for c in range(len(chunks))]
        mine = [c for c in range(self.rank, len(chunks), self.n_ranks)
                if not os.path.exists(paths[c])]
        stream = iter(batches.loader(self.workers, [b for c in mine for b in chunks[c]]))
        with tqdm(total=len(batches.batches) * self.args.batch_size, desc="PCA", unit="image",
                  initial=sum(map(os.path.exists, paths)) * each * self.args.batch_size,
                  disable=self.rank > 0) as bar:
            for c in mine:
                moments = [pca.Moments(encoder.d) for encoder in self.encoders]
                for _ in chunks[c]:
                    _, images, good = next(stream)
                    images = self.to_device(images)
                    for encoder, sums in zip(self.encoders, moments):
                        with self.autocast():
                            f = encoder.features(images)
                        f = f.permute(0, 2, 3, 1)[good.to(self.device)].reshape(-1, encoder.d)
                        try:
                            sums.update(f.cpu().numpy())
                        except ValueError as error:
                            raise UserError(f"{encoder.name}: its {error}; --no-bf16 may help"
                                            ) from None
                    bar.update(len(good) * self.n_ranks)
                parts = {f"{name}_{i}": getattr(sums, name) for i, sums in enumerate(moments)
                         for name in ("n", "sum", "outer")}
                pca.write_whole(paths[c], lambda file: np.savez(file, **parts))
        barrier()
        if self.rank:
            return []
        return [self.fit_one(i, encoder, paths) for i, encoder in enumerate(self.encoders)]

    def fit_one(self, i, encoder, paths):
        total, part = pca.Moments(encoder.d), pca.Moments(encoder.d)
        for path in paths:                                 # in the same order every time
            wait_for(path)
            with np.load(path) as file:
                part.n, part.sum, part.outer = (file[f"{name}_{i}"][()]
                                                for name in ("n", "sum", "outer"))
            total.merge(part)
        if total.n < 2:
            raise UserError(f"{self.args.images} holds too few images that Pillow can read: they "
                            f"have {total.n} feature vectors, a PCA needs 2")
        total.n = int(total.n)
        return pca.fit(total, self.args.r_keep, self.args.pca_scale or 1.0, encoder.name,
                       encoder.weights)


def wait_for(path, seconds=120):
    """Until a file that another machine wrote shows on the shared disk."""
    for _ in range(seconds):
        if os.path.exists(path):
            break
        time.sleep(1)


def fit_folder(args):
    """pca.py --images: fit and save the PCAs alone; {path: PCA}."""
    source = Source(args)
    if source.n_ranks > 1:
        raise UserError("pca.py --images is one process; data.py fits with many")
    folder, name = os.path.split(args.out)
    with tempfile.TemporaryDirectory(dir=folder or ".") as parts:
        fitted = source.fit_pcas(parts)
    paths = [os.path.join(folder, path) for path in pca_names(len(fitted), name)]
    for path, each in zip(paths, fitted):
        each.save(path)
    return dict(zip(paths, fitted))


def pca_names(n, first="pca.npz"):
    """pca.npz, pca_2.npz, ...: a file for each encoder."""
    stem, extension = os.path.splitext(first)
    return [first] + [f"{stem}_{i}{extension}" for i in range(2, n + 1)]


def prepare(args):
    """Make the prepared folder args.out from args.images, or go on where a killed run with the same
    settings was. Any number of processes share the work; rows are written block by block, each then
    marked in status.npy, so that a block is there whole or made again. meta.json comes last."""
    try:
        prepare_or_resume(args)
    except torch.OutOfMemoryError as error:
        raise UserError(f"--batch_size {args.batch_size} takes too much memory; start anew in "
                        f"another --out with less ({one_line(error)})") from None
    except OSError as error:
        raise UserError(f"{args.out}: {error}; what is there is kept, and when that is mended the "
                        "same command goes on where it was") from None


def prepare_or_resume(args):
    if not 0 <= args.max_bad <= 1:
        raise UserError(f"--max_bad {args.max_bad} is a share, from 0 to 1")
    if args.vae_scale is not None and not 0 < args.vae_scale < float("inf"):
        raise UserError(f"--vae_scale {args.vae_scale} must be above 0")
    if args.pca and len(args.pca) != len(args.encoder):
        raise UserError(f"--pca: give a file for each of --encoder, {len(args.encoder)}")
    images, out = os.path.realpath(args.images), os.path.realpath(args.out)
    if os.path.commonpath([images, out]) == images:
        raise UserError(f"--out {args.out} is inside --images {args.images}; choose another")
    source, out = Source(args), args.out
    codec = Codec(args.vae, source.device, args.vae_scale)
    if args.size % (2 * codec.factor):
        raise UserError(f"--size {args.size} must be a multiple of {2 * codec.factor}: the codec's "
                        f"{codec.factor} pixels a latent, and patches of 2")
    given = [read_pca(path, encoder, args)
             for path, encoder in zip(args.pca or [], source.encoders)]
    settings = {
        "images": f"{len(source.files)} files {short_hash(source.files, source.y)}",
        "size": args.size, "vae": f"{codec.kind} {codec.weights[:16]}",
        "vae_scale": codec.scale, "encoder": [f"{e.name} at {e.input_size} pixels {e.weights[:16]}"
                                              for e in source.encoders],
        "pca": [short_hash(each.components, each.mean, each.std) for each in given],
        "pca_images": None if given else args.pca_images,
        "pca_scale": [each.scale for each in given] or args.pca_scale or 1.0, "r_keep": args.r_keep,
        "seed": args.seed, "batch_size": args.batch_size, "bf16": source.bf16,
        "keep_features": args.keep_features}
    if is_complete(out, settings):
        if source.rank == 0:
            clear_up(out)
            print(f"{out} is there already, prepared with these settings")
        return
    if source.rank == 0 and not os.path.exists(f"{out}/progress.json"):
        check_scale(source, codec)
    if source.n_ranks > 1:                                 # the slowest may take hours longer
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    n, x_size = len(source.files), args.size // codec.factor
    shapes = {"x": (n, codec.channels * (1 + codec.has_std), x_size, x_size),
              "z": (n, args.r_keep * len(source.encoders), *source.encoders[0].grid)}
    if args.keep_features:
        shapes["f"] = (n, source.encoders[0].d, *source.encoders[0].grid)
    if source.rank == 0:
        if args.keep_features:
            print(f"{out}/f.npy, the features of --keep_features, takes "
                  f"{2 * np.prod(shapes['f'], dtype=float) / 1e9:,.3g} GB", flush=True)
        os.makedirs(out, exist_ok=True)
        write_json(f"{out}/progress.json", {"settings": settings})
        for name, shape in shapes.items():
            allocate(f"{out}/{name}.npy", shape, np.float16)
        allocate(f"{out}/y.npy", (n,), np.int64)
        write_rows(f"{out}/y.npy", 0, source.y)
        allocate(f"{out}/status.npy", (n,), np.uint8)      # 0: to do, 1: done, 2: cannot be read
        status = np.load(f"{out}/status.npy")              # and may have been mended since
        write_rows(f"{out}/status.npy", 0, np.where(status == 2, 0, status).astype(np.uint8))
    barrier()
    names = pca_names(len(source.encoders))
    if share(not all(os.path.exists(f"{out}/{name}") for name in names)):    # opinions may differ
        fitted = given or source.fit_pcas(out)
        for name, each in zip(names, fitted):              # none but on rank 0, if just fitted
            if source.rank == 0:
                each.save(f"{out}/{name}")
    barrier()
    for name in names:
        wait_for(f"{out}/{name}")
    try:
        pcas = [pca.load(f"{out}/{name}") for name in names]
    except ValueError as error:
        raise UserError(f"{error}; remove it, and the same command makes it again") from None
    encode_all(source, codec, pcas, out)
    barrier()
    if source.rank == 0:
        finish(source, codec, pcas, settings, out)
    if source.n_ranks > 1:
        barrier()
        dist.destroy_process_group()


def read_pca(path, encoder, args):
    """The first r_keep components of a PCA file. UserError if it is not this encoder's."""
    try:
        fitted = pca.load(path)
        same = fitted.encoder == encoder.name and len(fitted.mean) == encoder.d
        if not same or fitted.weights and fitted.weights != encoder.weights:
            raise ValueError(f"{path} is the PCA of {fitted.encoder}, {len(fitted.mean)} channels, "
                             f"weights {fitted.weights[:16] or 'unknown'}; --encoder is "
                             f"{encoder.name}, {encoder.d}, {encoder.weights[:16]}")
        scale = fitted.scale if args.pca_scale is None else args.pca_scale
        return dataclasses.replace(fitted.first(args.r_keep), scale=scale)
    except (OSError, ValueError) as error:
        raise UserError(f"--pca: {error}") from None


def short_hash(*arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def is_complete(out, settings):
    """Whether out is prepared with these settings. UserError if it is, or was begun to be, with
    others, or holds other things."""
    for name in ("meta.json", "progress.json"):
        if not os.path.exists(f"{out}/{name}"):
            continue
        try:
            with open(f"{out}/{name}") as file:
                stored = json.load(file)["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{out}/{name} is damaged ({error}); choose another --out, or remove "
                            f"{out}") from None
        for key, value in settings.items():
            if stored.get(key, False) != value:                # older folders lack the newest key
                raise UserError(f"{out} was made with another --{key}: {stored.get(key)}, now "
                                f"{value}; choose another --out, or remove it")
        return name == "meta.json"
    if os.path.isdir(out) and any(not name.endswith(".part") for name in os.listdir(out)):
        raise UserError(f"{out} is not empty and holds no prepared data; choose another --out")
    return False


def write_json(path, value):
    pca.write_whole(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def allocate(path, shape, dtype):
    """A .npy file of zeros, unless it is there. Its space is taken at once, so that a disk that is
    too small is found out first and not last."""
    if os.path.exists(path):
        return
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    try:
        with open(path + ".part", "wb") as file:
            np.lib.format.write_array_header_1_0(file, {
                "descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape})
            file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, file.tell() + size)
            else:                                          # macOS
                file.truncate(file.tell() + size)
    except OSError as error:
        free = shutil.disk_usage(os.path.dirname(path)).free
        with contextlib.suppress(FileNotFoundError):
            os.remove(path + ".part")
        raise UserError(f"{path} needs {size / 1e9:.2f} GB and cannot have them ({error.strerror}; "
                        f"{free / 1e9:.2f} GB are free); make room, or choose another --out"
                        ) from None
    os.replace(path + ".part", path)


def write_rows(path, start, rows):
    """Write rows of a .npy file in their place, and wait until they are on the disk."""
    array = np.load(path, mmap_mode="r")
    assert rows.dtype == array.dtype and rows.shape[1:] == array.shape[1:], (rows.shape, array)
    assert start + len(rows) <= len(array), (start, len(rows), len(array))
    # O_DSYNC, not fsync: it keeps NFS from writing whole pages, with another machine's rows
    with open(path, "r+b", opener=lambda path, flags: os.open(path, flags | os.O_DSYNC)) as file:
        file.seek(array.offset + start * array[0].nbytes)
        file.write(np.ascontiguousarray(rows))


def encode_all(source, codec, pcas, out):
    """Fill x.npy, z.npy and status.npy. UserError if too many images cannot be read."""
    status = np.load(f"{out}/status.npy", mmap_mode="r")
    batches = source.batches(np.arange(len(status)))
    todo = [b for b, rows in enumerate(batches.batches) if (status[rows] != 1).any()]
    barrier()                                              # all have seen the same status
    pcas = [on_device(each, source.device) for each in pcas]
    with tqdm(total=len(status), initial=np.count_nonzero(status == 1), desc="x and z",
              unit="image", disable=source.rank > 0) as bar, \
            concurrent.futures.ThreadPoolExecutor(1) as writer:
        writing = None
        mine = np.array_split(todo, source.n_ranks)[source.rank].tolist()
        for rows, images, good in batches.loader(source.workers, mine):
            images = source.to_device(images)
            with source.autocast():
                x = codec.encode(images)
                features = [encoder.features(images) for encoder in source.encoders]
            zs = [each.project(f.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
                  for each, f in zip(pcas, features)]
            z = torch.cat([zs[0]] + [F.interpolate(z, size=zs[0].shape[2:], mode="bilinear")
                                     if z.shape[2:] != zs[0].shape[2:] else z for z in zs[1:]], 1)
            arrays = {"x": x, "z": z} | ({"f": features[0]} if source.args.keep_features else {})
            arrays = {name: (part * good.to(part.device).view(-1, 1, 1, 1)).half().cpu().numpy()
                      for name, part in arrays.items()}
            if writing:
                writing.result()
            writing = writer.submit(write_block, out, rows.numpy(), arrays, good.numpy())
            if not good[:len(rows)].all():
                writing.result()
                stop_if_too_many_bad(source, status, out)
            bar.update(np.count_nonzero(status) - bar.n)
        if writing:
            writing.result()
            bar.update(np.count_nonzero(status) - bar.n)


def write_block(out, rows, arrays, good):
    k = len(rows)                                          # the last batch is padded
    for name, array in arrays.items():
        write_rows(f"{out}/{name}.npy", rows[0], array[:k])
    write_rows(f"{out}/status.npy", rows[0], np.where(good[:k], 1, 2).astype(np.uint8))


def on_device(fitted, device):
    """A PCA whose project() takes float32 tensors there."""
    return dataclasses.replace(fitted, **{
        name: torch.tensor(getattr(fitted, name), dtype=torch.float32, device=device)
        for name in ("mean", "std", "components")})


def check_scale(source, codec, n=16):
    """UserError if n random images show that the codec's scale is wrong: at once, not at last."""
    batches = source.batches(source.random_rows()[:n]).loader(workers=0)
    with source.autocast():
        x = [codec.encode(source.to_device(images[good])) for _, images, good in batches
             if good.any()]
    if x:
        x = torch.cat(x).cpu().numpy()
        check_rms(mean_square(x, codec.has_std, codec.scale, codec.shift), codec)


def check_rms(square, codec, least=0.5, most=2.0):
    """UserError if scaled latents of that mean square (C,) would ruin training: noise has 1."""
    rms = float(np.sqrt(np.mean(square)))
    if not least <= rms <= most:
        better = "" if codec.shift else f"; --vae_scale {np.mean(codec.scale) / rms:.4g} makes it 1"
        raise UserError(f"the scaled latents of --vae {codec.name} have RMS {rms:.3g}, and should "
                        f"have about 1 ({least} to {most}): its scale {codec.scale} is not right"
                        + better)


def stop_if_too_many_bad(source, status, out):
    bad, n = np.flatnonzero(status == 2), len(status)
    if len(bad) > source.args.max_bad * n:
        lines = write_skipped(source, bad, out)
        raise UserError(f"{len(bad)} of {n} files cannot be read, more than --max_bad "
                        f"{source.args.max_bad:g} of them: {'; '.join(lines[:5])}"
                        f"{' ...' * (len(bad) > 5)} (all in {out}/skipped.txt); mend them, or "
                        "raise --max_bad, and the same command goes on; without them it is other "
                        "data, for another --out")


def write_skipped(source, bad, out):
    """skipped.txt: a line for each file that cannot be read, with the reason; returns the lines."""
    lines = []
    for row in bad:
        path = os.fsdecode(source.files[row])
        try:
            load_image(os.path.join(source.args.images, path), source.args.size)
            reason = "could not be read when its turn came"
        except Exception as error:                         # Pillow raises anything
            reason = one_line(error)
        lines.append(f"{path}: {reason}")
    text = "".join(line + "\n" for line in lines).encode(errors="surrogateescape")
    pca.write_whole(f"{out}/skipped.txt", lambda file: file.write(text))
    return lines


def finish(source, codec, pcas, settings, out):
    """Check and measure the arrays, make the picture, then meta.json, and clear up."""
    args, status = source.args, np.load(f"{out}/status.npy")
    assert status.all(), np.flatnonzero(status == 0)
    bad = np.flatnonzero(status == 2)
    stop_if_too_many_bad(source, status, out)
    if len(bad) == len(status):
        raise UserError(f"{args.images} holds no image that Pillow can read")
    if len(bad):
        write_skipped(source, bad, out)
    is_local = os.path.isdir(args.vae)
    meta = {"name": os.path.basename(os.path.normpath(args.images)), "classes": source.classes,
            "image_size": args.size, "codec": os.path.abspath(args.vae) if is_local else args.vae,
            "codec_weights": codec.weights, "scale": codec.scale, "shift": codec.shift,
            "x_channels": codec.channels, "x_has_std": codec.has_std, "settings": settings}
    meta = describe(out, meta, pcas, bad.tolist())
    check_rms(np.square(meta["x_rms"]), codec)
    if not np.isfinite(meta["z_rms"]).all():
        raise UserError("the features hold NaN or infinity; remove "
                        f"{out} and prepare it again with --no-bf16")
    good = np.flatnonzero(status == 1)
    rows = good[((np.arange(10) + 0.5) * len(good) / 10).astype(int)]
    x, z, _ = (np.load(f"{out}/{name}.npy", mmap_mode="r") for name in "xzy")
    originals = [load_image(os.path.join(os.fsencode(args.images), source.files[row]), args.size)
                 for row in rows]
    raw = torch.from_numpy(x[rows][:, :codec.channels]).to(source.device).float()
    pictures = [to_images(codec.decode(part))[0]
                for part in scaled(raw, codec.scale, codec.shift).split(1)]
    picture = contact_sheet([originals, pictures, pca.colours(z[rows], meta["z_std"])], 10, 128)
    pca.write_whole(f"{out}/sheet.png", lambda file: picture.save(file, "PNG"))
    if not len(bad) and os.path.exists(f"{out}/skipped.txt"):
        os.remove(f"{out}/skipped.txt")                    # of an earlier attempt
    write_json(f"{out}/meta.json", meta)
    clear_up(out)
    size = sum(os.path.getsize(f"{out}/{name}.npy") for name in meta["arrays"]) / len(status)
    print(f"{out}: {len(good):,} images of {len(source.classes) or 'no'} classes, "
          f"{size / 1e3:.1f} kB each; {len(bad)} files skipped"
          f"{f', see {out}/skipped.txt' * bool(len(bad))}; {out}/sheet.png shows images, decoded "
          "latents and features")


def clear_up(out):
    """Remove what only an unfinished folder needs."""
    for name in os.listdir(out):
        if name in ("progress.json", "status.npy") or name.startswith("moments_"):
            os.remove(f"{out}/{name}")


def digits():
    """The 1,797 scans of scikit-learn's load_digits: x (n, 1, 8, 8) in [-1, 1], y (n,) and the mask
    held_out (n,) of the tenth that neither the encoder nor the model ever trains on."""
    from sklearn.datasets import load_digits
    images, y = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 8 - 1          # pixels are 0..16
    held_out = torch.zeros(len(x), dtype=torch.bool)
    shuffled = torch.randperm(len(x), generator=generator(0, "digits held out"))
    held_out[shuffled[:len(x) // 10]] = True
    return x, torch.from_numpy(y), held_out


class DigitEncoder(nn.Module):
    """Takes DINOv2's place for digits: (B, 1, 8, 8) -> features (B, 64, 4, 4) -> logits (B, 10)."""
    def __init__(self, width=64, n_classes=10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, stride=2), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1))
        self.head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                  nn.Linear(width, n_classes))

    def forward(self, x):
        return self.head(self.features(x))


def train_digit_encoder(x, y, epochs=20, batch_size=64, seed=0):
    """A DigitEncoder trained on labelled digits, in eval mode; equal seeds, equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = DigitEncoder()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    for epoch in range(epochs):
        shuffled = torch.randperm(len(x), generator=generator(seed, "encoder epoch", epoch))
        for rows in shuffled.split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(encoder(x[rows]), y[rows]).backward()
            optimizer.step()
    return encoder.eval()


def prepare_digits(out=PREPARED["digits"], r_keep=16):
    """Write the training digits as a prepared folder, unless it is there. Takes ten seconds."""
    if os.path.exists(f"{out}/meta.json"):
        return
    print(f"preparing {out}: training the digits' encoder, once", flush=True)
    x, y, held_out = digits()
    x, y = x[~held_out], y[~held_out]
    encoder = train_digit_encoder(x, y)
    with torch.no_grad():
        features = encoder.features(x).permute(0, 2, 3, 1).double().numpy()  # (n, 4, 4, d)
    d = features.shape[-1]
    fitted = pca.fit(pca.Moments(d).update(features.reshape(-1, d)), r_keep,
                     encoder="the digits' convnet")
    z = fitted.project(features).transpose(0, 3, 1, 2)                       # (n, r_keep, 4, 4)
    arrays = {"x": x.numpy().astype(np.float16), "z": z.astype(np.float16), "y": y.numpy(),
              "f": features.transpose(0, 3, 1, 2).astype(np.float16)}
    parent = os.path.dirname(out) or "."
    os.makedirs(parent, exist_ok=True)
    part = tempfile.mkdtemp(prefix=os.path.basename(out) + ".", suffix=".part", dir=parent)
    try:                                              # complete, or not at all
        os.chmod(part, 0o755)                         # mkdtemp's are for the owner alone
        for name, array in arrays.items():
            np.save(f"{part}/{name}.npy", array)
        fitted.save(f"{part}/pca.npz")
        write_json(f"{part}/meta.json", describe(part, {
            "name": "digits", "classes": list("0123456789"), "image_size": 8, "codec": None,
            "codec_weights": None, "scale": 1.0, "shift": 0.0, "x_channels": 1, "x_has_std": False,
            "settings": {}}, [fitted]))
        os.rename(part, out)
    except OSError:
        if not os.path.exists(f"{out}/meta.json"):    # else another process was first
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def describe(folder, meta, fitted, bad_rows=()):
    """meta.json's content for the arrays in folder: meta, completed with what is measured here and
    with what the PCAs `fitted` say. meta has name, classes (empty: unconditional), image_size,
    codec (None: x are images), codec_weights, scale, shift, x_channels, x_has_std and settings."""
    arrays, square = {}, {}
    for name in ("x", "z", "y", "f"):
        if name == "f" and not os.path.exists(f"{folder}/f.npy"):
            continue
        array = np.load(f"{folder}/{name}.npy", mmap_mode="r")
        good = np.ones(len(array), bool)
        good[list(bad_rows)] = False
        with open(f"{folder}/{name}.npy", "rb") as file:
            digest = hashlib.sha256(file.read(array.offset))
        square[name] = 0
        for start in range(0, len(array), 4096):
            part = array[start:start + 4096]
            digest.update(np.ascontiguousarray(part))
            part = part[good[start:start + 4096]]
            if name in "xz" and len(part):
                of_x = (meta["x_has_std"], meta["scale"], meta["shift"]) if name == "x" else ()
                square[name] += len(part) / good.sum() * mean_square(part, *of_x)
        arrays[name] = {"shape": list(array.shape), "dtype": str(array.dtype),
                        "sha256": digest.hexdigest()}
    names = pca_names(len(fitted))
    packages = ["numpy", "torch", "timm", "diffusers", "pillow"]
    return meta | {
        "format": FORMAT, "n": arrays["x"]["shape"][0], "bad_rows": list(bad_rows),
        "x_size": arrays["x"]["shape"][2], "x_rms": np.sqrt(square["x"]).tolist(),
        "r_keep": arrays["z"]["shape"][1], "z_size": arrays["z"]["shape"][2],
        "z_std": [std for each in fitted for std in each.z_std.tolist()],
        "z_rms": np.sqrt(square["z"]).tolist(), "pca_scale": fitted[0].scale,
        "encoders": [{"encoder": each.encoder, "weights": each.weights, "d": len(each.mean),
                      "pca": name, "scale": each.scale} for each, name in zip(fitted, names)],
        "arrays": arrays, "versions": {name: importlib.metadata.version(name) for name in packages}}


def mean_square(array, has_std=False, scale=1.0, shift=0.0):
    """Stored latents or features (n, C or 2C, h, w) -> (C,) mean squares of scaled ones; of drawn
    ones, where the second half of the channels is a standard deviation."""
    mean, std = np.split(array.astype(np.float32), 2, 1) if has_std else (array, np.float32(0))
    scale, shift = (np.reshape(np.float32(v), (-1, 1, 1)) for v in (scale, shift))
    square = np.square((mean - shift) * scale) + np.square(std * scale)
    return square.mean((0, 2, 3), dtype=np.float64)


class Prepared:
    """A prepared folder, read through memory maps: 1e3 or 1e6 images, opening costs the same.

    r: channels of z to read, an equal share of each encoder's first; 0 for none, None for all.
    features: read f too. n: its images, numbered 0 to n - 1 without those that could not be read.
    UserError if the folder is missing, unfinished or damaged, or does not keep what is asked for.
    """
    def __init__(self, folder, r=None, features=False):
        again = "remove it and prepare it again"
        if not os.path.exists(f"{folder}/meta.json"):
            if os.path.exists(f"{folder}/progress.json"):
                raise UserError(f"{folder} is not finished; run the same data.py command again, it "
                                "goes on where it was")
            raise UserError(f"no prepared data in {folder}; make it with: python data.py --images "
                            f"DIR --out {folder}, or train on the embedded digits: --data digits")
        try:
            with open(f"{folder}/meta.json") as file:
                m = json.load(file)
            if m["format"] != FORMAT:
                raise ValueError(f"format {m['format']}, this code reads {FORMAT}")
            needed = {"classes", "codec", "image_size", "z_std", "scale", "shift", "bad_rows"}
            if not needed <= set(m):
                raise ValueError("meta.json is not whole")
            self.x, self.z, self.y = (np.load(f"{folder}/{name}.npy", mmap_mode="r")
                                      for name in "xzy")
            x_channels = m["x_channels"] * (1 + m["x_has_std"])
            shapes = {"x": (m["n"], x_channels, m["x_size"], m["x_size"]),
                      "z": (m["n"], m["r_keep"], m["z_size"], m["z_size"]), "y": (m["n"],)}
            self.f = None
            if features and "f" in m["arrays"]:
                self.f = np.load(f"{folder}/f.npy", mmap_mode="r")
                shapes["f"] = (m["n"], *m["arrays"]["f"]["shape"][1:])
            self.bad = np.array(m["bad_rows"], np.int64)
            n_encoders = len(m["encoders"])
        except (KeyError, ValueError, TypeError, EOFError, OSError) as error:
            raise UserError(f"{folder} is damaged or another thing ({error}); {again}") from None
        for name, shape in shapes.items():
            found = getattr(self, name).shape
            if found != shape:
                raise UserError(f"{folder}/{name}.npy is {found}, but meta.json says {shape}; "
                                + again)
        if features and self.f is None:
            raise UserError(f"--repa needs the encoder's features, and {folder} did not keep them: "
                            "prepare it anew with data.py --keep_features (for digits: remove it)")
        r = m["r_keep"] if r is None else r
        if r > m["r_keep"]:
            raise UserError(f"--r {r}: {folder} keeps {m['r_keep']} channels of z; lower --r")
        if r % n_encoders:
            raise UserError(f"--r {r} must be a multiple of {n_encoders}: {folder} has so many "
                            "encoders, and each gives an equal share")
        first = np.arange(n_encoders)[:, None] * (m["r_keep"] // n_encoders)
        self.channels = (first + np.arange(r // n_encoders)).ravel()
        self.meta = m | {"z_std": [m["z_std"][c] for c in self.channels]}
        self.r, self.n, self.has_std = r, m["n"] - len(self.bad), m["x_has_std"]

    def rows(self, numbers):
        """The arrays' rows of images (B,) of 0..n - 1: bad rows are stepped over."""
        return numbers + np.searchsorted(self.bad - np.arange(len(self.bad)), numbers, "right")

    def examples(self, k):
        """The numbers of k images, evenly spread."""
        return (torch.arange(k) + 0.5).mul(self.n / k).long()

    def read(self, numbers):
        """x, z, y and f (None unless asked for) of images (B,), as they are stored, on the CPU."""
        rows = self.rows(numbers.numpy())
        parts = [self.x[rows], self.z[rows[:, None], self.channels], self.y[rows],
                 None if self.f is None else self.f[rows]]
        return [None if part is None else torch.from_numpy(part) for part in parts]

    def unpack(self, stored, eps=None):
        """What read() returned, on any device -> x (B, C, H, W), scaled; z (B, r, H, W) on x's grid
        or None; y (B,); f (B, d, h, w) or None. Where the codec has a standard deviation, x is its
        mean + std * eps, eps (B, C, H, W); without eps its mean."""
        x, z, y, f = stored
        x = x.float()
        if self.has_std:
            x, std = x.chunk(2, 1)
            x = x if eps is None else x + std * eps
        x = scaled(x, self.meta["scale"], self.meta["shift"])
        return (x, resize_z(z.float(), x.shape[-1]) if self.r else None, y,
                None if f is None else f.float())

    def batch(self, numbers, eps=None):
        """unpack(read(numbers), eps)."""
        return self.unpack(self.read(numbers), eps)


def prefetch(make, steps, ahead=4):
    """make(step) for each of the steps, in turn; as many threads make the next ones meanwhile."""
    pool, waiting = concurrent.futures.ThreadPoolExecutor(ahead), collections.deque()
    try:
        for step in steps:
            waiting.append(pool.submit(make, step))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def resize_z(z, x_size):
    """z (B, r, h, w) -> (B, r, x_size, x_size), before it is noised."""
    return F.interpolate(z, size=(x_size, x_size), mode="bilinear", align_corners=False)


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    """The rows 0..n-1 in the order of that epoch."""
    return torch.randperm(n, generator=generator(seed, "epoch", epoch))


def rows_of_step(seed, step, batch_size, n):
    """Rows (batch_size,) of training step 0, 1, ...: the next piece of an endless stream of epochs,
    each shuffled anew."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // n
    return torch.cat([epoch_order(seed, int(epoch), n)[positions[epochs == epoch] % n]
                      for epoch in epochs.unique()])


def open_data(name, r, features=False):
    """The Prepared behind --data: "digits", made if it is missing, or a folder's name."""
    if name == "digits":
        prepare_digits()
    return Prepared(PREPARED.get(name, name), r, features)


def main(args):
    if args.images:
        with warnings.catch_warnings():                    # Pillow's, of files it can read
            warnings.simplefilter("ignore")
            return prepare(args)
    meta = open_data("digits", 0).meta
    print(f"{PREPARED['digits']}: {meta['n']:,} images of {len(meta['classes'])} classes, "
          f"x {meta['x_channels']} x {meta['x_size']}^2, z {meta['r_keep']} x {meta['z_size']}^2 "
          f"from {meta['encoders'][0]['encoder']}")


def parser():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    pca.feature_flags(p)
    p.add_argument("--out", default=IMAGENET, metavar="DIR",
                   help="the prepared folder (default: %(default)s)")
    p.add_argument("--vae", default=VAE, help="diffusers AutoencoderKL or AutoencoderTiny, hub "
                                              "name or local folder (default: %(default)s)")
    p.add_argument("--vae_scale", type=float, help="number that makes the latents' RMS 1 (default: "
                                                   "the codec's own; 0.18215 for the one above)")
    p.add_argument("--pca", nargs="+", metavar="FILE",
                   help="fitted PCA, one for each encoder (default: it is fitted first)")
    p.add_argument("--keep_features", action=argparse.BooleanOptionalAction, default=False,
                   help="store the first encoder's features too, for train.py --repa: 393 kB an "
                        "image with DINOv2-B (default: off)")
    p.add_argument("--max_bad", type=float, default=0.01,
                   help="share of files that may be unreadable: they are skipped, more stop the "
                        "run (default: %(default)s)")
    return p


if __name__ == "__main__":
    run_cli(main, parser().parse_args())
