"""ReDi's network and its two diffusions: DiT and SiT over image latents x and features z.

    net = build("SiT-XL/2", fusion="merged", r=8, n_classes=1000, x_channels=4, x_size=32)
    pred_x, pred_z = net(x_t, z_t, t, y)

Module names and shapes are those of the published DiT and SiT weights. ReDi: arXiv 2504.16064;
DiT: 2212.09748; SiT: 2401.08740. B batch, L tokens, C width, p patch, r channels of z.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# depth, width, heads: table 1 of the DiT paper; T is ours, for digits and tests
SIZES = {"T": (4, 128, 4), "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16),
         "XL": (28, 1152, 16)}
PATCHES = (2, 4, 8)
FUSIONS = ("none", "merged", "separate")


# A diffusion noises a clean sample, x_t = alpha_t x + sigma_t eps, and says what the network's
# prediction means and what it costs to be wrong. x and z share t and have independent noise.

def append_dims(values):
    """(B,) -> (B, 1, 1, 1), to broadcast over (B, C, H, W)."""
    return values.view(-1, 1, 1, 1)


class Flow:
    """SiT's linear path: x_t = t x + (1 - t) eps with t in [0, 1], t = 1 is data; the net predicts
    the velocity v = dx_t/dt = x - eps."""
    outputs = 1                                       # output channels per input channel: v

    def t_from_uniform(self, u):
        """Training times (B,) from u (B,), uniform in [0, 1)."""
        return u

    def normalised_time(self, t):
        """t on the scale that both diffusions share: 0 is noise, 1 is data."""
        return t

    def add_noise(self, x, eps, t):
        return append_dims(t) * x + (1 - append_dims(t)) * eps

    def loss(self, pred, x, eps, t):
        """(B,) mean squared error of the velocity."""
        return (pred - (x - eps)).square().mean((1, 2, 3))

    def prediction(self, x, eps):
        """What the net should predict where x is noised with eps."""
        return x - eps

    def denoised(self, pred, x_t, t):
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

    def __init__(self, timesteps=range(n_timesteps)):
        """timesteps: ascending indices into the 1000 steps that form a shorter chain."""
        alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, self.n_timesteps))[list(timesteps)]
        before = np.append(1, alpha_bar[:-1])
        beta = 1 - alpha_bar / before
        posterior = beta * (1 - before) / (1 - alpha_bar)               # beta tilde, 0 at t = 0;
        posterior[0] = posterior[1]                                     # its log would be -inf
        self.timesteps = list(timesteps)              # what the net is told at each step
        # tables over the steps; numpy's, as devices such as Apple's have no float64, without which
        # differences with 1 lose 3 digits at t = 0
        self.alpha, self.sigma, self.beta = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), beta
        self.log_beta, self.log_posterior = np.log(beta), np.log(posterior)
        self.mean_per_eps = beta / (self.sigma * np.sqrt(1 - beta))     # of p(x_{t-1} | x_t)
        self.on_device = {}                           # the tables, where extract() needed them

    def respaced(self, steps):
        """The same chain on `steps` (2..1000) of its timesteps, first and last included."""
        assert 2 <= steps <= self.n_timesteps, steps
        last = self.n_timesteps - 1
        return DDPM([round(i * last / (steps - 1)) for i in range(steps)])

    def extract(self, name, t, like):
        """Entries t (B,) of the table of that name, as `like`'s dtype, (B, 1, 1, 1)."""
        key = name, like.dtype, t.device
        if key not in self.on_device:
            self.on_device[key] = torch.from_numpy(getattr(self, name)).to(like.dtype).to(t.device)
        return append_dims(self.on_device[key][t])

    def t_from_uniform(self, u):
        return (u * self.n_timesteps).long()

    def normalised_time(self, t):
        return 1 - t / (self.n_timesteps - 1)

    def add_noise(self, x, eps, t):
        return self.extract("alpha", t, x) * x + self.extract("sigma", t, x) * eps

    def log_variance(self, out, t):
        """Log-variance of p(x_{t-1} | x_t), from log beta tilde (out = -1) to log beta (1)."""
        most, least = self.extract("log_beta", t, out), self.extract("log_posterior", t, out)
        f = (out + 1) / 2
        return f * most + (1 - f) * least

    def loss(self, pred, x, eps, t):
        """(B,) mean squared error of eps + variational bound, which trains the variance alone."""
        pred_eps, out = pred.chunk(2, 1)
        mse = (pred_eps - eps).square().mean((1, 2, 3))
        return mse + self.vlb(pred_eps.detach(), out, x, eps, t)

    def vlb(self, pred_eps, out, x, eps, t):
        """(B,) bits per element: KL(q(x_{t-1} | x_t, x) || p(x_{t-1} | x_t)); at t = 0 the
        negative log-likelihood of x in bins of 2/255 (arXiv 2006.11239, equations 5 and 13).

        Both means are (x_t - beta / sigma * eps) / sqrt(1 - beta), one with the true eps: x_t
        cancels in their difference. At t = 0 the true mean is x itself.
        """
        log_true, log_var = self.extract("log_posterior", t, x), self.log_variance(out, t)
        gap = self.extract("mean_per_eps", t, x) * (pred_eps - eps)     # true mean - predicted mean
        kl = 0.5 * (log_var - log_true + (log_true - log_var).exp() - 1
                    + gap.square() * (-log_var).exp())
        nll = -log_likelihood_in_bins(x, x - gap, 0.5 * log_var)
        return torch.where(t == 0, nll.mean((1, 2, 3)), kl.mean((1, 2, 3))) / math.log(2)

    def prediction(self, x, eps):
        """What the net should predict where x is noised with eps; of variances the middle."""
        return torch.cat([eps, torch.zeros_like(eps)], 1)

    def denoised(self, pred, x_t, t):
        """The clean sample that the prediction implies, for one step t; not clipped."""
        return (x_t - float(self.sigma[t]) * pred[:, :x_t.shape[1]]) / float(self.alpha[t])

    def posterior(self, pred, x_t, t):
        """Mean and log-variance of p(x_{t-1} | x_t), for one step t of this chain."""
        pred_eps, out = pred.chunk(2, 1)
        mean = x_t / float(1 - self.beta[t]) ** 0.5 - float(self.mean_per_eps[t]) * pred_eps
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
    """net(x_t, z_t, t, y) -> (pred_x, pred_z), predictions of what net.diffusion says.

    x_t (B, x_channels, x_size, x_size); z_t (B, r, x_size, x_size), None without fusion; t (B,);
    y (B,) in 0..n_classes, n_classes the null class. Predictions have diffusion.outputs times the
    channels of what they predict.
    """
    def __init__(self, family, depth, width, heads, patch, fusion, r, n_classes, x_channels,
                 x_size):
        super().__init__()
        self.diffusion = FAMILIES[family]()
        self.fusion, self.r, self.n_classes = fusion, r, n_classes
        self.patch, self.x_channels, self.x_size = patch, x_channels, x_size
        self.grad_checkpointing = False       # True: compute a block's activations twice
        grid, per_channel = x_size // patch, patch ** 2 * self.diffusion.outputs
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

    def forward(self, x_t, z_t, t, y, encoder_depth=None):
        """encoder_depth: also return x's tokens (B, L, C) after that many blocks, REPA's input."""
        size = (self.x_size, self.x_size)
        assert x_t.shape[1:] == (self.x_channels, *size), (x_t.shape, self.x_channels, size)
        assert (z_t.shape[1:] == (self.r, *size)) if self.r else z_t is None, (z_t, self.r, size)
        c = self.t_embedder(t) + self.y_embedder(y)                               # (B, C)
        h = self.x_embedder(x_t) + self.pos_embed                                 # (B, L, C)
        if self.fusion == "merged":
            h = h + self.z_embedder(z_t)                                          # (B, L, C)
        elif self.fusion == "separate":
            h = torch.cat([h, self.z_embedder(z_t) + self.pos_embed], 1)          # (B, 2L, C)
        hidden = ()
        for k, block in enumerate(self.blocks, 1):
            if self.grad_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, c, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, c)
            if k == encoder_depth:
                hidden = (h.chunk(2, 1)[0] if self.fusion == "separate" else h,)          # x's half
        h = modulate(h, *self.final_layer.adaLN_modulation(c)[:, None].chunk(2, 2))
        h_x, h_z = h.chunk(2, 1) if self.fusion == "separate" else (h, h)         # (B, L, C) each
        pred_x = self.unpatchify(self.final_layer.linear(h_x))                    # (B, -, H, W)
        pred_z = self.unpatchify(self.final_layer.linear_z(h_z)) if self.r else None
        return pred_x, pred_z, *hidden

    def compile_blocks(self):
        """torch.compile each block: they are alike, so that one's code serves all."""
        for block in self.blocks:
            block.compile(dynamic=False)

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
    return z_t.masked_fill(append_dims(dropped), 0)


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
    net.config = {"name": name, "fusion": fusion, "r": r, "n_classes": n_classes,
                  "x_channels": x_channels, "x_size": x_size}
    return net


def projector(width, d, hidden=2048):
    """REPA's (2410.06940): tokens (B, L, width) -> (B, L, d), to be aligned with features."""
    layers = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden),
                           nn.SiLU(), nn.Linear(hidden, d))
    for linear in layers[::2]:
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    return layers
