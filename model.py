"""ReDi's network and its two processes: DiT and SiT over image latents x and features z.

    net = build("SiT-XL/2", fusion="merged", r=8, n_classes=1000, x_channels=4, x_size=32)
    pred_x, pred_z = net(x_t, z_t, t, y)

Module names and shapes are those of the published DiT and SiT weights. ReDi: arXiv 2504.16064;
DiT: 2212.09748; SiT: 2401.08740. B batch, L tokens, C width, p patch, r channels of z.
"""
import argparse
import contextlib
import math
import os
import pickle
import re
import zipfile

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# depth, width, heads: table 1 of the DiT paper; T is ours, for digits and tests
SIZES = {"T": (4, 128, 4), "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16),
         "XL": (28, 1152, 16)}
PATCHES = (2, 4, 8)
FUSIONS = ("none", "merged", "separate")


# A process noises a clean sample, x_t = alpha_t x + sigma_t eps, says what the network's output
# means and what it costs to be wrong. x and z share t and have independent noise.

def column(values):
    """(B,) -> (B, 1, 1, 1), to broadcast over (B, C, H, W)."""
    return values.view(-1, 1, 1, 1)


class Flow:
    """SiT's linear path: x_t = t x + (1 - t) eps with t in [0, 1], t = 1 is data; the net predicts
    the velocity v = dx_t/dt = x - eps."""
    outputs = 1                                       # output channels per input channel: v

    def draw_t(self, u):
        """Times (B,) from u (B,), uniform in [0, 1)."""
        return u

    def data_time(self, t):
        """t on a common scale from 0 (noise) to 1 (data), for logging."""
        return t

    def add_noise(self, x, eps, t):
        return column(t) * x + (1 - column(t)) * eps

    def target(self, x, eps, t):
        return x - eps

    def loss(self, pred, x, eps, t):
        """(B,) mean squared error of the velocity."""
        return (pred - self.target(x, eps, t)).square().mean((1, 2, 3))

    def x_hat(self, pred, x_t, t):
        """The clean sample that the prediction implies, for one time t."""
        return x_t + (1 - t) * pred

    def score(self, pred, x_t, t):
        """grad log p_t(x_t), for one time t < 1."""
        return (t * pred - x_t) / (1 - t)


class DDPM:
    """DiT's chain of 1000 steps, beta linear from 1e-4 to 0.02: x_t = sqrt(a) x + sqrt(1 - a) eps
    with a = alpha_bar_t; t = 0 is nearly data, t = 999 noise. The net predicts eps (first half of
    its channels) and where log-variance lies between its bounds (second half; 2102.09672)."""
    outputs = 2                                       # per input channel: eps and a variance value
    n_timesteps = 1000

    def __init__(self, timesteps=None):
        """timesteps: ascending indices into the 1000 steps that form a shorter chain; None: all."""
        beta = torch.linspace(1e-4, 0.02, self.n_timesteps, dtype=torch.float64)
        alpha_bar = torch.cumprod(1 - beta, 0)
        if timesteps is None:
            timesteps = range(self.n_timesteps)
        self.timesteps = list(timesteps)              # what the net is told at each step
        self.on_device = {}                           # the tables below, where they are used
        alpha_bar = alpha_bar[self.timesteps]
        before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        beta = 1 - alpha_bar / before
        posterior = beta * (1 - before) / (1 - alpha_bar)               # beta tilde, 0 at t = 0;
        posterior[0] = posterior[1]                                     # its log would be -inf
        # differences with 1 are taken here, in float64: in float32 they lose 3 digits at t = 0
        self.alpha, self.sigma, self.beta = alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), beta
        self.log_beta, self.log_posterior = beta.log(), posterior.log()
        self.mean_per_eps = beta / (self.sigma * (1 - beta).sqrt())     # of p(x_{t-1} | x_t)

    def respaced(self, steps):
        """The same process on `steps` (2..1000) of its timesteps, first and last included."""
        assert 2 <= steps <= self.n_timesteps, steps
        last = self.n_timesteps - 1
        return DDPM([round(i * last / (steps - 1)) for i in range(steps)])

    def at(self, name, t, like):
        """Entry t (B,) of a float64 table as `like`'s dtype, (B, 1, 1, 1)."""
        if (name, t.device) not in self.on_device:
            self.on_device[name, t.device] = getattr(self, name).to(t.device)
        return column(self.on_device[name, t.device][t].to(like.dtype))

    def draw_t(self, u):
        return (u * self.n_timesteps).long()

    def data_time(self, t):
        return 1 - t / (self.n_timesteps - 1)

    def add_noise(self, x, eps, t):
        return self.at("alpha", t, x) * x + self.at("sigma", t, x) * eps

    def log_variance(self, out, t):
        """Log-variance of p(x_{t-1} | x_t), from log beta tilde (out = -1) to log beta (1)."""
        f = (out + 1) / 2
        return f * self.at("log_beta", t, out) + (1 - f) * self.at("log_posterior", t, out)

    def target(self, x, eps, t):
        return eps

    def loss(self, pred, x, eps, t):
        """(B,) mean squared error of eps + variational bound, which trains the variance alone."""
        pred_eps, out = pred.chunk(2, 1)
        mse = (pred_eps - self.target(x, eps, t)).square().mean((1, 2, 3))
        return mse + self.vlb(pred_eps.detach(), out, x, eps, t)

    def vlb(self, pred_eps, out, x, eps, t):
        """(B,) bits per element: KL(q(x_{t-1} | x_t, x) || p(x_{t-1} | x_t)); at t = 0 the
        negative log-likelihood of x in bins of 2/255 (arXiv 2006.11239, equations 5 and 13).

        Both means are (x_t - beta / sigma * eps) / sqrt(1 - beta), one with the true eps: x_t
        cancels in their difference. At t = 0 the true mean is x itself.
        """
        log_true, log_var = self.at("log_posterior", t, x), self.log_variance(out, t)
        gap = self.at("mean_per_eps", t, x) * (pred_eps - eps)          # true mean - predicted mean
        kl = 0.5 * (log_var - log_true + (log_true - log_var).exp() - 1
                    + gap.square() * (-log_var).exp())
        nll = -log_likelihood_in_bins(x, x - gap, 0.5 * log_var)
        return torch.where(t == 0, nll.mean((1, 2, 3)), kl.mean((1, 2, 3))) / math.log(2)

    def x_hat(self, pred, x_t, t):
        """The clean sample that the prediction implies, for one step t; not clipped."""
        return (x_t - self.sigma[t].item() * pred[:, :x_t.shape[1]]) / self.alpha[t].item()

    def score(self, pred, x_t, t):
        return -pred[:, :x_t.shape[1]] / self.sigma[t].item()

    def posterior(self, pred, x_t, t):
        """Mean and log-variance of p(x_{t-1} | x_t), for one step t of this chain."""
        pred_eps, out = pred.chunk(2, 1)
        mean = x_t / (1 - self.beta[t].item()) ** 0.5 - self.mean_per_eps[t].item() * pred_eps
        return mean, self.log_variance(out, torch.full((len(x_t),), t, device=x_t.device))


def log_likelihood_in_bins(x, mean, log_std):
    """Log-probability (nats) of the bin of width 2/255 around x under a Gaussian, the outermost
    bins open. As in DiT: the normal CDF by its tanh approximation, probabilities >= 1e-12."""
    def cdf(value):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value ** 3)))

    upper = cdf((x - mean + 1 / 255) * (-log_std).exp())
    lower = cdf((x - mean - 1 / 255) * (-log_std).exp())
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return inside.clamp(min=1e-12).log()


FAMILIES = {"DiT": DDPM, "SiT": Flow}
NAMES = tuple(f"{family}-{size}/{p}" for family in FAMILIES for size in SIZES for p in PATCHES)


class PatchEmbed(nn.Module):
    """(B, channels, H, W) -> tokens (B, L, C). The convolution's weights are applied as a matrix
    product: at size T a training step on a CPU is 8 % faster for it."""
    def __init__(self, channels, patch, width):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))       # as a Linear layer's
        nn.init.zeros_(self.proj.bias)

    def forward(self, x):
        B, channels, H, W = x.shape
        p, weight = self.patch, self.proj.weight.flatten(1)
        x = x.view(B, channels, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
        return F.linear(x.reshape(B, -1, weight.shape[1]), weight, self.proj.bias)


class TimestepEmbedder(nn.Module):
    """t (B,) -> (B, C). SiT's t in [0, 1] and DiT's integers 0..999 go in as they are."""
    def __init__(self, width, n_frequencies=128):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * n_frequencies, width), nn.SiLU(),
                                 nn.Linear(width, width))
        frequencies = torch.exp(-math.log(10000) * torch.arange(n_frequencies) / n_frequencies)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t):
        angles = t[:, None].float() * self.frequencies                 # (B, n_frequencies), float32
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """y (B,) -> (B, C); index n_classes is the null class."""
    def __init__(self, n_classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(n_classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, h):
        B, L, C = h.shape
        q, k, v = (part.view(B, L, self.heads, -1).transpose(1, 2)
                   for part in self.qkv(h).chunk(3, -1))               # (B, heads, L, C / heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(h.transpose(1, 2).reshape(B, L, C))


class Mlp(nn.Module):
    def __init__(self, width, ratio=4):
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, h):
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


def modulate(h, shift, scale):
    """Layer norm without affine, then the conditioning's shift and scale (B, 1, C) on every token:
    norm(h) * (1 + scale) + shift."""
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=1e-6), 1 + scale)


class Block(nn.Module):
    """Transformer block with adaLN-Zero: its gates are 0 at first, so that it is the identity."""
    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, h, c):
        six = self.adaLN_modulation(c)[:, None].chunk(6, 2)                        # (B, 1, C) each
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six
        h = torch.addcmul(h, gate_a, self.attn(modulate(h, shift_a, scale_a)))     # h + gate * ...
        return torch.addcmul(h, gate_m, self.mlp(modulate(h, shift_m, scale_m)))


class FinalLayer(nn.Module):
    """One norm and modulation; a decoder per modality: `linear` for x, `linear_z` for z."""
    def __init__(self, width, x_outputs, z_outputs):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, x_outputs)
        self.linear_z = nn.Linear(width, z_outputs) if z_outputs else None


class ReDi(nn.Module):
    """net(x_t, z_t, t, y) -> (pred_x, pred_z), what they mean being up to `net.process`.

    x_t (B, x_channels, x_size, x_size); z_t (B, r, x_size, x_size), None without fusion; t (B,);
    y (B,) in 0..n_classes, n_classes the null class. pred_* has process.outputs times the channels.
    """
    def __init__(self, family, depth, width, heads, patch, fusion, r, n_classes, x_channels,
                 x_size):
        super().__init__()
        self.process = FAMILIES[family]()
        self.fusion, self.r, self.n_classes = fusion, r, n_classes
        self.patch, self.x_channels, self.x_size = patch, x_channels, x_size
        self.grad_checkpointing = False       # True: a block's activations are computed again
        grid, per_channel = x_size // patch, patch ** 2 * self.process.outputs
        self.x_embedder = PatchEmbed(x_channels, patch, width)
        self.z_embedder = PatchEmbed(r, patch, width) if r else None
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(n_classes, width)
        self.register_buffer("pos_embed", sincos_2d(width, grid)[None])                # (1, L, C)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.final_layer = FinalLayer(width, per_channel * x_channels, per_channel * r)
        self.initialize()

    def initialize(self):
        """DiT's: Xavier, small embeddings, and zeros where they make the net start simple."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in (self.y_embedder.embedding_table, *self.t_embedder.mlp[::2]):
            nn.init.normal_(module.weight, std=0.02)
        zero = [block.adaLN_modulation[1] for block in self.blocks]
        zero += [m for m in self.final_layer.modules() if isinstance(m, nn.Linear)]
        for linear in zero:
            nn.init.zeros_(linear.weight)

    def forward(self, x_t, z_t, t, y, tap=None):
        """tap: k in 1..depth adds the output of block k, the tokens (B, L, C) of x, as a third."""
        size = (self.x_size, self.x_size)
        assert x_t.shape[1:] == (self.x_channels, *size), (x_t.shape, self.x_channels, size)
        assert (z_t.shape[1:] == (self.r, *size)) if self.r else z_t is None, (z_t, self.r, size)
        c = self.t_embedder(t) + self.y_embedder(y)                               # (B, C)
        h = self.x_embedder(x_t) + self.pos_embed                                 # (B, L, C)
        if self.fusion == "merged":
            h = h + self.z_embedder(z_t)                                          # (B, L, C)
        elif self.fusion == "separate":
            h = torch.cat([h, self.z_embedder(z_t) + self.pos_embed], 1)          # (B, 2L, C)
        tapped = ()
        for k, block in enumerate(self.blocks, 1):
            if self.grad_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, c, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, c)
            if k == tap:
                tapped = (h.chunk(2, 1)[0] if self.fusion == "separate" else h,)          # x's half
        h = modulate(h, *self.final_layer.adaLN_modulation(c)[:, None].chunk(2, 2))
        h_x, h_z = h.chunk(2, 1) if self.fusion == "separate" else (h, h)         # (B, L, C) each
        pred_x = self.unpatchify(self.final_layer.linear(h_x))                    # (B, -, H, W)
        pred_z = self.unpatchify(self.final_layer.linear_z(h_z)) if self.r else None
        return pred_x, pred_z, *tapped

    def unpatchify(self, h):
        """(B, L, p * p * channels) -> (B, channels, H, W); a token is ordered (p, p, channel)."""
        g, p = self.x_size // self.patch, self.patch
        h = h.view(len(h), g, g, p, p, -1).permute(0, 5, 1, 3, 2, 4)     # (B, -, g, p, g, p)
        return h.reshape(len(h), -1, self.x_size, self.x_size)


def sincos_2d(width, grid):
    """(grid * grid, width) fixed positions: sin and cos of the column, then of the row, as MAE."""
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega         # (grid, width / 4)
    one_axis = torch.cat([angles.sin(), angles.cos()], 1)                     # (grid, width / 2)
    columns, rows = one_axis.repeat(grid, 1), one_axis.repeat_interleave(grid, 0)
    return torch.cat([columns, rows], 1).float()


def drop_z(z_t, dropped):
    """The z-null: z_t = 0 where `dropped` (B,) is true. Training's z-dropout and representation
    guidance both go through here: the net is asked what it was taught, e(x_t) = e(x_t, 0, t)."""
    return z_t.masked_fill(column(dropped), 0)


def parse_name(name):
    """"SiT-XL/2" -> ("SiT", "XL", 2). ValueError, with the list of names, for any other."""
    if name not in NAMES:
        raise ValueError(f"unknown model {name!r}; choose from: {', '.join(NAMES)}")
    family, rest = name.split("-")
    size, patch = rest.split("/")
    return family, size, int(patch)


def build(name, fusion="merged", r=8, n_classes=1000, x_channels=4, x_size=32):
    """The network of that name, initialised from torch's global generator.

    fusion: none (a plain DiT/SiT; r counts as 0), merged (a token carries x and z) or separate
    (twice the tokens). n_classes=0: unconditional. ValueError for what does not exist.
    """
    family, size, patch = parse_name(name)
    if fusion not in FUSIONS:
        raise ValueError(f"unknown fusion {fusion!r}; choose from: {', '.join(FUSIONS)}")
    if fusion != "none" and r < 1:
        raise ValueError(f"fusion {fusion!r} needs r >= 1 channels of z, got {r}; or take 'none'")
    if x_size % patch:
        raise ValueError(f"{name} cuts patches of {patch}, which do not fill x_size={x_size}")
    depth, width, heads = SIZES[size]
    r = r if fusion != "none" else 0
    net = ReDi(family, depth, width, heads, patch, fusion, r, n_classes, x_channels, x_size)
    net.arch = {"name": name, "fusion": fusion, "r": r, "n_classes": n_classes,
                "x_channels": x_channels, "x_size": x_size}
    return net


X_CHANNELS = 4                            # of all published weights: latents of Stable Diffusion
WEIGHT_FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")


def from_hub(repository):
    """The path of the one file of weights in a repository of the Hugging Face hub, which is fetched
    once. ValueError if it cannot be had."""
    import huggingface_hub as hub                          # slow to import: not before it is used

    def one(names):
        names = [name for name in names if name.endswith(WEIGHT_FILES)]
        if len(names) != 1:
            raise ValueError(f"that hub repository holds {len(names)} files of weights "
                             f"({', '.join(names[:5])}): fetch the right one, and give the path")
        return names[0]

    def ask(function, *args, **options):
        try:
            return function(*args, **options)
        except Exception as error:                         # a dozen kinds, many lines
            raise ValueError(
                "there is no such file here, and it cannot be had as a repository of the hub "
                f"({(str(error) or type(error).__name__).splitlines()[0]}); without internet, "
                "fetch its file of weights elsewhere, and give the path to that") from None

    there = []                                             # what was fetched before
    with contextlib.suppress(ValueError):
        folder = ask(hub.snapshot_download, repository, local_files_only=True)
        there = [os.path.join(top, name) for top, _, names in os.walk(folder) for name in names]
    if any(name.endswith(WEIGHT_FILES) for name in there):
        return one(there)
    files = ask(hub.HfApi().model_info, repository, timeout=20).siblings
    return ask(hub.hf_hub_download, repository, one([file.rfilename for file in files]))


def read_weights(path):
    """What torch.save or safetensors wrote to that file, on the CPU. ValueError if it is damaged or
    would run code."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        is_zip = zipfile.is_zipfile(path)                  # torch's format, but for old published
        if is_zip:                                         # files; it has CRCs
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(f"wrong checksum in {damaged}")
        with torch.serialization.safe_globals([argparse.Namespace]):     # the authors' settings
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (OSError, MemoryError):                         # no fault of the file's
        raise
    except pickle.UnpicklingError as error:                # its message advises to run the code
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError("no plain weights are in it"
                         + (f" but {refused[1]}" if refused else "")) from None
    except Exception as error:                             # damage raises anything
        raise ValueError((str(error) or type(error).__name__).splitlines()[0]) from None


def load_published(source, family=None):
    """The network, in eval mode, of weights that the authors of ReDi, SiT or DiT publish.

    source: a file, or its state dict, bare or as "ema" beside others. family: DiT or SiT, which a
    plain net's weights do not tell; more than 4 input channels mean ReDi, so SiT unless said
    otherwise. ValueError for anything else.

    ReDi's one embedding and one decoder of 4 + r channels, x first, become two of each. SiT's files
    may carry DiT's variance outputs, which SiT does not use: they are left out.
    """
    if isinstance(source, (str, os.PathLike)):
        source = read_weights(source)
    if not isinstance(source, dict):
        raise ValueError(f"no state dict but a {type(source).__name__}")
    weights = dict(source.get("ema", source))
    try:
        embed, pos = weights.pop("x_embedder.proj.weight"), weights.pop("pos_embed")
        decode, bias = (weights.pop(f"final_layer.linear.{part}") for part in ("weight", "bias"))
        n_classes = len(weights["y_embedder.embedding_table.weight"]) - 1
    except KeyError as error:
        raise ValueError(f"no weights of DiT, SiT or ReDi: they lack {error}") from None
    width, channels, patch, _ = embed.shape
    depth = sum(name.endswith("attn.qkv.weight") for name in weights)
    r, outputs = channels - X_CHANNELS, len(decode) // (patch ** 2 * channels)
    sizes = [size for size in SIZES if SIZES[size][:2] == (depth, width)]
    if not sizes or r < 0 or outputs not in (1, 2):
        raise ValueError(f"no published net has {depth} blocks of width {width}, {channels} input "
                         f"channels and {outputs} times as many outputs")
    family = "SiT" if r and family is None else family
    if family not in FAMILIES:
        raise ValueError("plain DiT and SiT weights look alike: say which they are, DiT or SiT")
    kept = FAMILIES[family].outputs
    if outputs < kept:
        raise ValueError("DiT weights have outputs for variances, these have none: take SiT")
    net = build(f"{family}-{sizes[0]}/{patch}", "merged" if r else "none", r, n_classes, X_CHANNELS,
                math.isqrt(pos.shape[1]) * patch)
    # rows are ordered (p, p, channel); the channels are those of the predictions, then variances
    decode, bias = (part.view(patch ** 2, outputs, channels, -1)[:, :kept]
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
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[-1].strip()) from None
    return net.eval()


def adopt(net, given):
    """Copy the weights of another net, `given`, into net, where both are the same model. What a
    plain net lacks for z starts at 0: with merged tokens net's x is then that of the plain one.
    Other classes get new embeddings; the null class stays. ValueError if they do not fit."""
    if type(given.process) is not type(net.process):
        raise ValueError("DiT cannot become SiT, nor SiT DiT: choose --model of its kind")
    if given.r not in (0, net.r):
        raise ValueError(f"it has {given.r} channels of z, this run {net.r}: take --r {given.r}")
    old, new = given.state_dict(), net.state_dict()
    for name in new:
        if name.startswith(("z_embedder.", "final_layer.linear_z.")) and not given.r:
            old[name] = torch.zeros_like(new[name])
    classes = "y_embedder.embedding_table.weight"
    if given.n_classes != net.n_classes:
        old[classes] = torch.cat([new[classes][:-1], old[classes][-1:]])
    old["pos_embed"] = new["pos_embed"]                  # fixed; another image size has others
    for name in new:
        if name not in old or old[name].shape != new[name].shape:
            found = f"is {tuple(old[name].shape)}" if name in old else "is not there"
            raise ValueError(f"it is another model than --model says: {name} {found}, and must be "
                             f"{tuple(new[name].shape)}")
    net.load_state_dict(old)


def projector(width, d, hidden=2048):
    """REPA's (2410.06940): tokens (B, L, width) -> (B, L, d), to be aligned with features."""
    layers = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden),
                           nn.SiLU(), nn.Linear(hidden, d))
    for linear in layers[::2]:
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    return layers
