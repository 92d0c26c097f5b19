"""Every network that comes from a file: VAEs, feature encoders, our checkpoints, published weights.

    net, checkpoint = load_model("out/ckpt.pt")            # the averaged weights, ready to sample
    net = load_published("DiT-XL-2-256x256.pt", "DiT")     # weights of the papers' authors
    vae, encoder = VAE("stabilityai/sd-vae-ft-ema"), Encoder("resnet50", size=256)
"""
import argparse
import contextlib
import functools
import glob
import hashlib
import inspect
import json
import math
import os
import pickle
import re
import warnings
import zipfile

import numpy as np
import torch
import torch.nn.functional as F

import model
from run import UserError, blamed_on, is_out_of_memory, one_line

SD_VAE = "stabilityai/sd-vae-ft-ema"      # the paper's
X_CHANNELS = 4                            # of all published weights: latents of Stable Diffusion
PUBLISHED_STEPS = 250                     # sampling steps in the papers' tables
WEIGHT_FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
# what is computed once and kept, or compared with others' numbers, is exact float32 on GPUs too
full_precision = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True,
                                            allow_tf32=False)


def weights_hash(net):
    """sha256 of a network's weights, names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def is_hub_name(name):
    """Whether it looks like a hub repository, OWNER/NAME, and no such path exists here."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not os.path.exists(name)


@functools.cache
def hub_answers():
    """Whether the Hugging Face hub can be reached. If not, its client is told to be content with
    what it has downloaded before: it would try for a minute."""
    from huggingface_hub import constants, get_session     # slow to import: not before it is used
    with contextlib.suppress(Exception):                   # its client raises anything
        get_session().head(constants.ENDPOINT, timeout=5)
        return True
    constants.HF_HUB_OFFLINE = True
    return False


def from_hub(repository):
    """The path of the one file of weights in a repository of the Hugging Face hub, downloaded once.
    UserError if there is not exactly one, or it cannot be had."""
    import huggingface_hub as hub
    with blamed_on(f"{repository} is no file here, and cannot be had from the hub",
                   "without internet, download its weights elsewhere, and give their path"):
        if hub_answers():
            names = hub.HfApi().list_repo_files(repository)
        else:
            try:                                           # downloaded before?
                folder = hub.snapshot_download(repository, local_files_only=True)
            except (OSError, ValueError):
                raise ConnectionError("it does not answer") from None
            names = glob.glob("**", root_dir=folder, recursive=True)
        names = [name for name in names if name.endswith(WEIGHT_FILES)]
        if len(names) != 1:
            raise UserError(f"{repository} holds {len(names)} files of weights "
                            f"({', '.join(names[:5])}): download the right one, and give its path")
        return hub.hf_hub_download(repository, names[0])   # from the cache, if it is there


@contextlib.contextmanager
def reading(path):
    """Whatever is wrong with the file becomes one line; trouble of the disk or memory does not."""
    try:
        yield
    except Exception as error:                             # damage raises anything
        if isinstance(error, (UserError, OSError)) or is_out_of_memory(error):
            raise
        message = (f"{path} is damaged, or neither a checkpoint of train.py nor weights that the "
                   f"authors of ReDi, SiT or DiT publish ({one_line(error)})")
        before = os.path.join(os.path.dirname(path), "ckpt_prev.pt")
        if os.path.basename(path) == "ckpt.pt" and os.path.exists(before):
            message += f"; the checkpoint before it is {before}"
        raise UserError(message) from None


def read_weights(path, check=True):
    """What torch.save or safetensors wrote to that file, on the CPU. check: compare its checksums
    before. UserError if it is missing; damage, and code in it, may raise anything."""
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}; make one with: python train.py, or give weights "
                        "that the authors of ReDi, SiT or DiT publish")
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file
        return load_file(path)
    is_zip = zipfile.is_zipfile(path)                      # torch's format since 2020
    if is_zip and check:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"wrong checksum in {damaged}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):     # the authors' settings
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:                # whose message advises to run the code
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(f"it holds {refused[1]}" if refused
                         else "no plain weights are in it") from None


CHECKPOINT = {"config", "settings", "meta", "step", "net", "ema", "optimizer", "sums"}
SNAPSHOT = {"config", "settings", "meta", "step", "ema"}


def completed(checkpoint, needed):
    """A checkpoint of ours with all of model.build's arguments in its config: one that is older
    than some of them has their defaults. ValueError if it lacks a needed key, UserError if its
    config lacks an argument or, of newer code, has others."""
    missing = [key for key in sorted(needed) if checkpoint.get(key) is None]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    known = inspect.signature(model.build).parameters
    unknown = [name for name in checkpoint["config"] if name not in known]
    if unknown:
        raise UserError(f"the checkpoint's network has {', '.join(unknown)} in its config, which "
                        "this code does not know: take the code that trained it")
    config = {name: each.default for name, each in known.items()} | checkpoint["config"]
    missing = [name for name, value in config.items() if value is inspect.Parameter.empty]
    if missing:
        raise UserError(f"the config of the checkpoint's network lacks {', '.join(missing)}")
    return checkpoint | {"config": config}


def load_checkpoint(path, check=True):
    """A checkpoint of train.py, on the CPU: config (model.build's arguments), settings, meta (the
    data's), step, net, ema, optimizer, sums (the log's) and, with --repa, projector. A snapshot of
    --keep_every, which has SNAPSHOT's keys alone, is refused. check: compare the file's checksums
    before. UserError if it is missing or damaged."""
    with reading(path):
        return completed(read_weights(path, check), CHECKPOINT)


def load_model(path, name=None):
    """The network to sample from, in eval mode on the CPU, and its metadata: a checkpoint without
    weights; published weights get what stands for one.

    path: a checkpoint or snapshot of train.py, published weights, or the hub repository that holds
    them. name: the model's, as --model has it, which tells plain DiT from plain SiT; None: as the
    weights say. UserError if it cannot be had, or is another model.
    """
    if name not in (None, *model.NAMES):
        raise UserError(f"--model {name}: there are {', '.join(model.NAMES)}")
    if is_hub_name(path) and not path.endswith(WEIGHT_FILES):
        path = from_hub(path)
    with reading(path):
        content = read_weights(path)
        if isinstance(content, dict) and SNAPSHOT <= set(content):
            content = completed(content, SNAPSHOT)
            net = model.build(**content["config"])
            net.load_state_dict(find_weights(content["ema"]))
            metadata = {key: content[key] for key in ("settings", "meta", "step")}
        else:
            net = load_published(content, name and model.parse_name(name)[0])
            metadata = {
                "settings": {"sample_steps": PUBLISHED_STEPS, "p_drop_z": None, "p_drop_y": None},
                "meta": {"vae": SD_VAE, "vae_weights": None, "scale": None, "shift": None,
                         "image_size": None, "z_std": None}, "step": None}
    if name and net.config["name"] != name:
        raise UserError(f"--model {name}: {path} is {net.config['name']}")
    return net.eval().requires_grad_(False), metadata | {"config": net.config}


def find_weights(content):
    """The state dict {name: tensor} of a DiT in what a file holds: at any depth, averaged weights
    before others; without the prefixes of DDP and torch.compile, and REPA's projectors."""
    def tensors(content, path=""):
        for name, value in content.items():
            if isinstance(value, dict):
                yield from tensors(value, f"{path}{name}.")
            elif isinstance(value, torch.Tensor):
                yield re.sub(r"\b(module|_orig_mod)\.", "", f"{path}{name}"), value

    found, first = dict(tensors(content)), "x_embedder.proj.weight"
    prefixes = [name.removesuffix(first) for name in found if name.endswith(first)]
    prefix = min(prefixes, key=lambda prefix: "ema" not in prefix, default="")
    return {name.removeprefix(prefix): value for name, value in found.items()
            if name.startswith(prefix) and not name.startswith(f"{prefix}projectors.")}


def load_published(source, family=None):
    """The network, in eval mode, of weights that the authors of ReDi, SiT or DiT publish.

    source: a file, or its content, a state dict or one among others. family: DiT or SiT, which a
    plain net's weights do not tell; more than 4 input channels mean ReDi, so SiT unless said
    otherwise. ValueError for anything else, RuntimeError for weights of other shapes.

    ReDi's one embedding and one decoder of 4 + r channels, x first, become two of each. SiT's files
    may carry DiT's variance outputs, which SiT does not use: they are left out.
    """
    if isinstance(source, (str, os.PathLike)):
        source = read_weights(source)
    if not isinstance(source, dict):
        raise ValueError(f"no state dict but a {type(source).__name__}")
    weights = find_weights(source)
    needed = ["x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight",
              "final_layer.linear.weight", "final_layer.linear.bias"]
    missing = [name for name in needed if name not in weights]
    if missing:
        raise ValueError(f"found {', '.join(map(str, [*(weights or source)][:5]))}, needed "
                         f"{', '.join(missing)}")
    embed, pos, labels, decode, bias = (weights[name] for name in needed)
    width, channels, patch, _ = embed.shape
    depth = sum(name.endswith("attn.qkv.weight") for name in weights)
    r, (outputs, rest) = channels - X_CHANNELS, divmod(len(decode), patch ** 2 * channels)
    sizes = [size for size in model.SIZES if model.SIZES[size][:2] == (depth, width)]
    if not sizes or r < 0 or outputs not in (1, 2) or rest:
        raise ValueError(f"no published net has {depth} blocks of width {width}, {channels} input "
                         f"channels and {outputs} times as many outputs")
    family = "SiT" if r and family is None else family
    if family not in model.FAMILIES:
        raise ValueError("plain DiT and SiT weights look alike: say which they are, DiT or SiT")
    used = model.FAMILIES[family].outputs
    if outputs < used:
        raise ValueError("DiT weights have outputs for variances, these have none: take SiT")
    net = model.build(f"{family}-{sizes[0]}/{patch}", "merged" if r else "none", r, len(labels) - 1,
                      X_CHANNELS, math.isqrt(pos.shape[1]) * patch)
    # rows are ordered (p, p, channel); the channels are those of the predictions, then variances
    decode, bias = (part.view(patch ** 2, outputs, channels, -1)[:, :used]
                    for part in (decode, bias))
    weights["x_embedder.proj.weight"] = embed[:, :X_CHANNELS]
    if r:
        weights["z_embedder.proj.weight"] = embed[:, X_CHANNELS:]
        weights["z_embedder.proj.bias"] = torch.zeros(width)               # x's bias is for both
    own = {"linear": slice(0, X_CHANNELS)} | ({"linear_z": slice(X_CHANNELS, None)} if r else {})
    for name, part in own.items():
        weights[f"final_layer.{name}.weight"] = decode[:, :, part].reshape(-1, width)
        weights[f"final_layer.{name}.bias"] = bias[:, :, part].reshape(-1)
    weights["pos_embed"] = net.pos_embed                                   # the same, or nearly
    missing, others = net.load_state_dict(weights, strict=False)
    if missing or others:
        raise ValueError(f"found {', '.join(others[:5]) or 'no others'}, needed "
                         f"{', '.join(missing[:5]) or 'no more'}")
    return net.eval()


def load_pretrained(net, pretrained):
    """Copy the weights of another network of the same model into net, to train on from there. What
    a plain network lacks for z starts at 0, so that with merged tokens net's x is that of the plain
    one. Other classes get new embeddings; the null class stays. ValueError if they do not fit."""
    if type(pretrained.diffusion) is not type(net.diffusion):
        raise ValueError("DiT cannot become SiT, nor SiT DiT: choose --model of its kind")
    if pretrained.r not in (0, net.r):
        raise ValueError(f"it has {pretrained.r} channels of z, this run {net.r}: take "
                         f"--z_channels {pretrained.r}")
    old, new = pretrained.state_dict(), net.state_dict()
    for name in new:
        if name.startswith(("z_embedder.", "final_layer.linear_z.")) and not pretrained.r:
            old[name] = torch.zeros_like(new[name])
    classes = "y_embedder.embedding_table.weight"
    if pretrained.n_classes != net.n_classes:
        old[classes] = torch.cat([new[classes][:-1], old[classes][-1:]])
    old["pos_embed"] = new["pos_embed"]                  # fixed; another image size has others
    for name in new:
        if name not in old or old[name].shape != new[name].shape:
            found = f"is {tuple(old[name].shape)}" if name in old else "is not there"
            raise ValueError(f"it is another model than --model says: {name} {found}, and must be "
                             f"{tuple(new[name].shape)}")
    net.load_state_dict(old)


class VAE:
    """A diffusers AutoencoderKL or AutoencoderTiny, local folder or hub name, between images and
    latents. Scaled latents are (raw - shift) * scale. UserError if it cannot be had.

    scale, shift: None for those of its configuration; else a number, or a list, one a channel.
    """
    def __init__(self, name, device="cpu", scale=None, shift=None):
        import diffusers                                  # slow to import: not before it is used
        diffusers.utils.logging.set_verbosity_error()
        advice = f"give a local folder in diffusers' format, or a hub name such as {SD_VAE}"
        if not is_hub_name(name) and not os.path.exists(f"{name}/config.json"):
            raise UserError(f"--vae {name}: no config.json there; {advice}")
        if is_hub_name(name) and not hub_answers():
            advice = f"the hub does not answer: {advice}"
        # between the dots of diffusion_pytorch_model.fp16.safetensors stands the variant
        variants = [os.path.basename(path).split(".")[1:-1]
                    for path in glob.glob(f"{glob.escape(name)}/diffusion_pytorch_model*")
                    if path.endswith(WEIGHT_FILES)]
        with blamed_on(f"--vae {name} cannot be loaded", advice), \
                warnings.catch_warnings(action="ignore"):
            kind = diffusers.AutoencoderKL.load_config(name).get("_class_name")
            if kind not in ("AutoencoderKL", "AutoencoderTiny"):
                raise ValueError(f"it is of class {kind}, not AutoencoderKL or AutoencoderTiny")
            vae, info = getattr(diffusers, kind).from_pretrained(
                name, torch_dtype=torch.float32, low_cpu_mem_usage=False, output_loading_info=True,
                variant=".".join(min(variants, default=[])) or None)
            misfits = [*info["missing_keys"], *info["mismatched_keys"]]
            if misfits:
                raise ValueError(f"its weights lack or do not fit {misfits[0]}")
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
    @full_precision
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
    if not isinstance(value, list):
        return value
    value = torch.tensor(value, dtype=x.dtype).view(-1, 1, 1)
    return value.to(x.device, non_blocking=True)           # else it would wait for the GPU


def scaled(x, scale, shift):
    """Raw latents (B, C, h, w) -> what the network sees."""
    return (x - per_channel(shift, x)) * per_channel(scale, x)


def vae_of(meta, device="cpu"):
    """The VAE that made the data which meta describes, opened once; None: its x are pixels."""
    described = json.dumps([meta[key] for key in ("vae", "vae_weights", "scale", "shift")])
    return open_vae(described, torch.device(device)) if meta["vae"] else None


@functools.lru_cache(maxsize=1)
def open_vae(described, device):
    name, weights, scale, shift = json.loads(described)
    vae = VAE(name, device, scale, shift)
    if weights and vae.weights != weights:
        raise UserError(f"the VAE at {name} is not the one that made the data, its weights differ; "
                        f"put that one there, or: sample.py --vae {name}")
    return vae


def timm_network(name, weights=None, settings=None):
    """A timm model with its head, so that every weight was loaded, in eval mode; the mean and std
    (3, 1, 1) of images in [0, 1] that it was trained on; its input_size in pixels.

    weights: a file; None: timm's own. settings: timm.create_model's, and mean, std and input_size
    in place of the model's own.
    """
    import timm                                           # slow to import: not before it is used
    settings = dict(settings or {})
    own = {key: settings.pop(key) for key in ("mean", "std", "input_size") if key in settings}
    overlay = {"file": weights, "custom_load": weights.endswith(".npz")} if weights else {}
    if not weights:
        hub_answers()
    net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **settings)
    config = timm.data.resolve_model_data_config(net) | own
    mean, std = (torch.tensor(config[key]).expand(3).view(3, 1, 1) for key in ("mean", "std"))
    return net.eval().requires_grad_(False), mean, std, own.get("input_size")


class Encoder:
    """A timm model whose feature maps make z. UserError if it cannot be had, or not so.

    size: pixels of the images. A plain vision transformer sees them resized to size / 16 patches a
    side (DINOv2: 224 for 256), other models as they are. layer: a level as in timm's
    forward_intermediates; None: the last, after the final norm. weights, settings: timm_network's.
    """
    def __init__(self, name, size, layer=None, weights=None, settings=None, device="cpu"):
        with blamed_on(f"--encoder {name} cannot be used so",
                       "--encoder_weights takes a local file, timm.list_models() has the names"):
            net, mean, std, input_size = timm_network(name, weights, settings)
            reductions = [level["reduction"] for level in net.feature_info]
            is_vit = len(reductions) > 1 and len(set(reductions)) == 1
            patches = max(1, round(size / 16)) * reductions[0]
            self.input_size = input_size or (patches if is_vit else size)
            self.config = {"name": name, "layer": layer, "settings": settings or {},
                           "input_size": self.input_size, "weights": weights_hash(net)}
            if hasattr(net, "set_input_size"):
                net.set_input_size(img_size=(self.input_size, self.input_size))
            self.net, self.layer = net.to(device, memory_format=torch.channels_last), layer
            self.mean, self.std = mean.to(device), std.to(device)
            black = torch.zeros(1, 3, size, size, device=device)
            _, self.d, *self.grid = self.features(black).shape

    @property
    def name(self):
        """Its name, layer and settings in one line."""
        settings = {key: value for key, value in self.config["settings"].items()
                    if key != "input_size"}
        return self.config["name"] + f" level {self.layer}" * (self.layer is not None) + "".join(
            f" {key}={value}" for key, value in sorted(settings.items()))

    @torch.no_grad()
    @full_precision
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
