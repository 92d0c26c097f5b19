"""Images in, tensors out: the embedded digits, prepared folders, batches in a reproducible order.

    python data.py              # prepares the embedded digits in prepared/digits

A prepared folder holds x.npy, z.npy and y.npy (one row an image), meta.json and pca.npz:
x (n, C, H, W) float16 latents, scaled; z (n, r_keep, h, w) float16, the encoder's features reduced
by PCA; y (n,) int64 classes.
"""
import argparse
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import pca

PREPARED = {"digits": "prepared/digits"}      # made at first use, by the name that --data takes
IMAGENET = "prepared/imagenet256"             # what every model but size T trains on
FORMAT = 1                                    # of a prepared folder; another number is refused


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


def generator(seed, purpose, index=0):
    """A CPU generator for (seed >= 0, purpose, index >= 0), and nothing else in the program."""
    key = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), index])
    return torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0]))


def to_uint8(x):
    """Images in [-1, 1] -> uint8, by the rounding of ADM and DiT."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


def from_uint8(images):
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def decode(x, codec):
    """Latents x (B, C, H, W) -> images uint8 (B, H, W, 3), numpy. codec None: x is the image."""
    assert codec is None, codec
    return to_uint8(x).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).cpu().numpy()


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
    arrays = {"x": x.numpy().astype(np.float16), "z": z.astype(np.float16), "y": y.numpy()}
    write_prepared(out, arrays, fitted, {"name": "digits", "classes": list("0123456789"),
                                         "codec": None, "image_size": 8})


def write_prepared(out, arrays, fitted, meta):
    """Write a prepared folder, elsewhere first, so that it is there complete or not at all.

    arrays: x, z, y as in the module's docstring; meta: name, classes (empty: unconditional), codec
    (None: x is the image) and image_size; the rest of meta.json is measured here.
    """
    parent = os.path.dirname(out) or "."
    os.makedirs(parent, exist_ok=True)
    part = tempfile.mkdtemp(prefix=os.path.basename(out) + ".", suffix=".part", dir=parent)
    try:
        os.chmod(part, 0o755)                         # mkdtemp's are for the owner alone
        for name, array in arrays.items():
            np.save(f"{part}/{name}.npy", array)
        fitted.save(f"{part}/pca.npz")
        x, z = arrays["x"], arrays["z"].astype(np.float32)
        meta = meta | {
            "format": FORMAT, "n": len(x), "x_channels": x.shape[1], "x_size": x.shape[2],
            "r_keep": z.shape[1], "z_size": z.shape[2], "z_std": fitted.z_std.tolist(),
            "z_rms": np.sqrt((z ** 2).mean((0, 2, 3))).tolist(), "pca_scale": fitted.scale,
            "encoder": fitted.encoder, "sha256": {a: file_hash(f"{part}/{a}.npy") for a in arrays}}
        with open(f"{part}/meta.json", "w") as file:
            json.dump(meta, file, indent=1)
        os.rename(part, out)
    except OSError:
        if not os.path.exists(f"{out}/meta.json"):    # else another process was first
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Prepared:
    """A prepared folder, read through memory maps: 1e3 or 1e6 images, opening costs the same.

    r: channels of z to read, 0 for none. UserError if the folder is missing or damaged, or keeps
    fewer channels.
    """
    def __init__(self, folder, r):
        if not os.path.exists(f"{folder}/meta.json"):
            raise UserError(f"no prepared data in {folder}; make it with: python data.py --images "
                            f"DIR --out {folder}, or train on the embedded digits: --data digits")
        again = "remove it and prepare it again"
        try:
            with open(f"{folder}/meta.json") as file:
                self.meta = m = json.load(file)
            if m["format"] != FORMAT:
                raise ValueError(f"format {m['format']}, this code reads {FORMAT}")
            if not {"classes", "codec", "image_size", "z_std"} <= set(m):
                raise ValueError("meta.json is not whole")
            x, z, y = (np.load(f"{folder}/{name}.npy", mmap_mode="r") for name in "xzy")
            shapes = [("x", x, (m["n"], m["x_channels"], m["x_size"], m["x_size"])),
                      ("z", z, (m["n"], m["r_keep"], m["z_size"], m["z_size"])),
                      ("y", y, (m["n"],))]
        except (KeyError, ValueError, TypeError, EOFError, OSError) as error:
            raise UserError(f"{folder} is damaged or another thing ({error}); {again}") from None
        for name, array, shape in shapes:
            if array.shape != shape:
                raise UserError(f"{folder}/{name}.npy is {array.shape}, but meta.json says {shape}"
                                f"; {again}")
        if r > m["r_keep"]:
            raise UserError(f"--r {r}: {folder} keeps {m['r_keep']} channels of z; lower --r")
        self.x, self.z, self.y, self.r, self.n = x, z, y, r, m["n"]

    def batch(self, rows, device="cpu"):
        """Rows (B,) -> on device: x (B, C, H, W), z (B, r, H, W) on x's grid or None, y (B,)."""
        rows = rows.numpy()
        x = torch.from_numpy(self.x[rows]).to(device).float()
        y = torch.from_numpy(self.y[rows]).to(device)
        if not self.r:
            return x, None, y
        z = torch.from_numpy(self.z[rows, :self.r]).to(device).float()
        return x, resize_z(z, x.shape[-1]), y


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


def open_data(name, r):
    """The Prepared behind --data: "digits", made if it is missing, or a folder's name."""
    if name == "digits":
        prepare_digits()
    return Prepared(PREPARED.get(name, name), r)


def main(args):
    meta = open_data("digits", 0).meta
    print(f"{PREPARED['digits']}: {meta['n']:,} images of {len(meta['classes'])} classes, "
          f"x {meta['x_channels']} x {meta['x_size']}^2, z {meta['r_keep']} x {meta['z_size']}^2 "
          f"from {meta['encoder']}")


def parser():
    return argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


if __name__ == "__main__":
    run_cli(main, parser().parse_args())
