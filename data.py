"""Images in, tensors out: the embedded digits, prepared folders, batches in a reproducible order.

    python data.py              # prepares the embedded digits in prepared/digits

A prepared folder holds x.npy, z.npy and y.npy (one row an image), meta.json and pca.npz. x (n, C, H, W)
float16 latents, scaled; z (n, r_keep, h, w) float16 PCA-reduced features; y (n,) int64 classes.
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

PREPARED = {"digits": "prepared/digits"}      # data sets made at first use, by the name that --data takes
IMAGENET = "prepared/imagenet256"             # what every model but size T trains on
FORMAT = 1                                    # of a prepared folder; another number is refused


# ------------------------------------------------------------------ what every script needs

class UserError(ValueError):
    """A mistake of the user's: one line with what was given, what was needed and what to type."""


def run_cli(main, args):
    """main(args); a UserError ends the script with its one line and exit code 1, without a traceback."""
    try:
        main(args)
    except UserError as error:
        sys.exit(f"error: {error}")


def generator(seed, purpose, index=0):
    """A CPU generator of its own for (seed >= 0, purpose, index >= 0); equal ones give equal draws."""
    state = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def to_uint8(x):
    """Images in [-1, 1] -> uint8, by the rounding of ADM and DiT."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


def from_uint8(images):
    """uint8 -> [-1, 1]"""
    return images.float() / 127.5 - 1


def decode(x, codec):
    """Latents x (B, C, H, W) -> images uint8 (B, H, W, 3). codec None: x is the image."""
    assert codec is None, codec
    return to_uint8(x).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).cpu().numpy()


# ------------------------------------------------------------------ digits, embedded in scikit-learn

def digits():
    """The 1,797 scans of scikit-learn's load_digits: x (n, 1, 8, 8) in [-1, 1], y (n,) and the mask
    held_out (n,) of the tenth that neither the encoder nor the model ever trains on."""
    from sklearn.datasets import load_digits
    images, y = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 8 - 1                 # pixels are 0..16
    held_out = torch.zeros(len(x), dtype=torch.bool)
    held_out[torch.randperm(len(x), generator=generator(0, "digits held out"))[:len(x) // 10]] = True
    return x, torch.from_numpy(y), held_out


class DigitEncoder(nn.Module):
    """Takes DINOv2's place for digits: (B, 1, 8, 8) -> features (B, 64, 4, 4), and from them the class."""
    def __init__(self, width=64, n_classes=10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, stride=2), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1))
        self.head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, n_classes))

    def forward(self, x):
        return self.head(self.features(x))


def train_digit_encoder(x, y, epochs=20, batch_size=64, seed=0):
    """A DigitEncoder trained on labelled digits, in eval mode; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = DigitEncoder()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    encoder.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=generator(seed, "encoder epoch", epoch)).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(encoder(x[rows]), y[rows]).backward()
            optimizer.step()
    return encoder.eval()


def prepare_digits(out=PREPARED["digits"], r_keep=16):
    """Write the training digits as a prepared folder, unless it is there. Takes some ten seconds."""
    if os.path.exists(out):
        return
    print(f"preparing {out}: training the digits' encoder, once", flush=True)
    x, y, held_out = digits()
    x, y = x[~held_out], y[~held_out]
    encoder = train_digit_encoder(x, y)
    with torch.no_grad():
        features = encoder.features(x).permute(0, 2, 3, 1).double().numpy()        # (n, 4, 4, d)
    moments = pca.Moments(features.shape[-1]).update(features.reshape(-1, features.shape[-1]))
    fitted = pca.fit(moments, r_keep, encoder="the digits' convnet")
    z = fitted.project(features).transpose(0, 3, 1, 2)                             # (n, r_keep, 4, 4)
    meta = {"name": "digits", "classes": [str(c) for c in range(10)], "codec": None, "image_size": 8}
    write_prepared(out, {"x": x.numpy().astype(np.float16), "z": z.astype(np.float16), "y": y.numpy()}, fitted, meta)


# ------------------------------------------------------------------ prepared folders

def write_prepared(out, arrays, fitted, meta):
    """Write a whole prepared folder, in a temporary place first, so that it is there complete or not at all.

    arrays: x, z, y as in the module's docstring; meta: name, classes (empty: unconditional), codec
    (None: x is the image) and image_size; the rest of meta.json is measured here.
    """
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    part = tempfile.mkdtemp(prefix=os.path.basename(out) + ".", suffix=".part", dir=os.path.dirname(out) or ".")
    for name, array in arrays.items():
        np.save(f"{part}/{name}.npy", array)
    fitted.save(f"{part}/pca.npz")
    x, z = arrays["x"], arrays["z"].astype(np.float32)
    meta = meta | {
        "format": FORMAT, "n": len(x), "x_channels": x.shape[1], "x_size": x.shape[2],
        "r_keep": z.shape[1], "z_size": z.shape[2], "encoder": fitted.encoder, "pca_scale": fitted.scale,
        "z_std": fitted.z_std.tolist(), "z_rms": np.sqrt((z ** 2).mean((0, 2, 3))).tolist(),
        "sha256": {name: file_hash(f"{part}/{name}.npy") for name in arrays}}
    with open(f"{part}/meta.json", "w") as file:
        json.dump(meta, file, indent=1)
    os.chmod(part, 0o755)
    try:
        os.rename(part, out)
    except OSError:                                   # another process was first, with the same content
        if not os.path.exists(f"{out}/meta.json"):
            raise
        shutil.rmtree(part)


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Prepared:
    """A prepared folder, read through memory maps: opening it costs the same for 1e3 and for 1e6 images.

    r: channels of z to read, 0 for none. UserError if the folder is missing, damaged or keeps fewer.
    """
    def __init__(self, folder, r):
        if not os.path.exists(f"{folder}/meta.json"):
            raise UserError(f"no prepared data in {folder}; make it with: python data.py --images DIR "
                            f"--out {folder}, or train on the embedded digits with --data digits")
        try:
            with open(f"{folder}/meta.json") as file:
                self.meta = meta = json.load(file)
            self.x, self.z, self.y = (np.load(f"{folder}/{name}.npy", mmap_mode="r") for name in "xzy")
            shapes = {"x": (meta["n"], meta["x_channels"], meta["x_size"], meta["x_size"]),
                      "z": (meta["n"], meta["r_keep"], meta["z_size"], meta["z_size"]), "y": (meta["n"],)}
        except (KeyError, ValueError, EOFError, OSError) as error:   # ValueError: a file cut short, or not JSON
            raise UserError(f"{folder} is damaged ({error}); remove and prepare it again") from None
        if meta["format"] != FORMAT:
            raise UserError(f"{folder} has format {meta['format']}, this code reads {FORMAT}; remove and prepare it again")
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise UserError(f"{folder}/{name}.npy is {getattr(self, name).shape}, meta.json says {shape}; "
                                "remove and prepare it again")
        if r > meta["r_keep"]:
            raise UserError(f"--r {r} is more than the {meta['r_keep']} channels of z that {folder} keeps; lower --r")
        self.r, self.n = r, meta["n"]

    def batch(self, rows, device="cpu"):
        """Rows (B,) -> x (B, C, H, W), z (B, r, H, W) resized to x's grid, or None, and y (B,), on device."""
        rows = rows.numpy()
        x = torch.from_numpy(self.x[rows]).to(device).float()
        z = resize_z(torch.from_numpy(self.z[rows][:, :self.r]).to(device).float(), x.shape[-1]) if self.r else None
        return x, z, torch.from_numpy(self.y[rows]).to(device)


def resize_z(z, x_size):
    """z (B, r, h, w) -> (B, r, x_size, x_size), before it is noised."""
    return F.interpolate(z, size=(x_size, x_size), mode="bilinear", align_corners=False)


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    return torch.randperm(n, generator=generator(seed, "epoch", epoch))


def rows_of_step(seed, step, batch_size, n):
    """Rows (batch_size,) of training step 0, 1, ...: the next piece of an endless stream of shuffled epochs."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // n
    return torch.cat([epoch_order(seed, int(epoch), n)[positions[epochs == epoch] % n] for epoch in epochs.unique()])


def open_data(name, r):
    """The Prepared behind --data: a data set of PREPARED, made if it is missing, or a folder."""
    if name == "digits":
        prepare_digits()
    return Prepared(PREPARED.get(name, name), r)


def main(args):
    prepare_digits()
    meta = Prepared(PREPARED["digits"], 0).meta
    print(f"{PREPARED['digits']}: {meta['n']:,} images of {len(meta['classes'])} classes, x {meta['x_channels']} x "
          f"{meta['x_size']}^2, z {meta['r_keep']} x {meta['z_size']}^2 from {meta['encoder']}")


def parser():
    return argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


if __name__ == "__main__":
    run_cli(main, parser().parse_args())
