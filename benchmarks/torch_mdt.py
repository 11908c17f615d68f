"""A plain MDT v1 in PyTorch, its losses and its training step, to measure ours against.

The same work as `mdt_jax.train.step` does with the published recipe: full and masked pass, AdamW,
EMA. Parameters have the published names, so that weights of `mdt_jax.convert` load with
strict=True. Of the bench alone; nothing of mdt_jax imports it.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mdt_jax.diffusion.schedule import linear_schedule, respace, spaced_timesteps
from mdt_jax.models.attention import bias_rows, relative_index
from mdt_jax.models.mdt import MDT


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


def mlp(dim, hidden, out, act):
    return nn.Sequential(nn.Linear(dim, hidden), act, nn.Linear(hidden, out))


class RelPosBias(nn.Module):
    def __init__(self, grid, heads):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(bias_rows(grid), heads))
        index = torch.tensor(relative_index(grid)).long()
        self.register_buffer("relative_position_index", index)

    def forward(self, ids):
        if ids is None:
            index = self.relative_position_index[None]
        else:
            index = self.relative_position_index[ids[:, :, None], ids[:, None, :]]
        return self.relative_position_bias_table[index].permute(0, 3, 1, 2)


class Attention(nn.Module):
    def __init__(self, dim, heads, grid):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_bias = RelPosBias(grid, heads)

    def forward(self, x, ids):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.rel_pos_bias(ids).to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, dim, heads, grid):
        super().__init__()
        self.attn, self.mlp = Attention(dim, heads, grid), Mlp(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, ids=None):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, 1)
        norm = x.shape[-1:]
        x = x + gate_a[:, None] * self.attn(
            modulate(F.layer_norm(x, norm, eps=1e-6), shift_a, scale_a), ids
        )
        return x + gate_m[:, None] * self.mlp(
            modulate(F.layer_norm(x, norm, eps=1e-6), shift_m, scale_m)
        )


class Embedder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp = mlp(256, dim, dim, nn.SiLU())

    def forward(self, t):
        frequencies = torch.exp(-np.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        angles = t[:, None].float() * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class Labels(nn.Module):
    def __init__(self, classes, dim):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)


class Patches(nn.Module):
    def __init__(self, channels, dim, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)


class Final(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        return self.linear(modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale))


class TorchMDT(nn.Module):
    """Of the same shapes as an MDT v1 of ours."""

    def __init__(self, model: MDT):
        super().__init__()
        dim, heads, grid = model.hidden_size, model.num_heads, model.grid
        self.grid, self.patch, self.channels = grid, model.patch_size, model.in_channels
        self.decoder_layers = model.decoder_layers
        self.x_embedder = Patches(model.in_channels, dim, model.patch_size)
        self.t_embedder = Embedder(dim)
        self.y_embedder, self.null_label = Labels(model.num_classes, dim), model.num_classes
        self.pos_embed = nn.Parameter(torch.zeros(1, model.num_tokens, dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, model.num_tokens, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, grid) for _ in range(model.depth))
        self.sideblocks = nn.ModuleList(Block(dim, heads, grid) for _ in range(model.side_layers))
        self.final_layer = Final(dim, 2 * model.in_channels * model.patch_size**2)

    def forward(self, x, t, y, ids=None):
        """x: [B, C, H, W]; ids: [B, K] kept tokens of a masked pass → [B, 2C, H, W]."""
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        encoder, decoder = self.blocks[: -self.decoder_layers], self.blocks[-self.decoder_layers :]
        if ids is not None:
            wide = ids[:, :, None].expand(-1, -1, x.shape[-1])
            kept = torch.gather(x, 1, wide)
            for block in encoder:
                kept = block(kept, c, ids)
            full = self.mask_token.to(kept.dtype).expand(*x.shape).scatter(1, wide, kept)
            masked = torch.ones(x.shape[:2], device=x.device).scatter(1, ids, 0)[:, :, None]
            x = full + self.decoder_pos_embed
            side = x
            for block in self.sideblocks:
                side = block(side, c)
            x = masked * side + (1 - masked) * x
        else:
            for block in encoder:
                x = block(x, c)
            x = x + self.decoder_pos_embed
        for block in decoder:
            x = block(x, c)
        x = self.final_layer(x, c).float()
        h, w = self.grid
        x = x.reshape(-1, h, w, self.patch, self.patch, 2 * self.channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(
            -1, 2 * self.channels, h * self.patch, w * self.patch
        )


class Diffusion:
    """The loss of one pass: squared error of ε, and the variational term of the variance."""

    def __init__(self, steps: int = 1000):
        schedule = linear_schedule(steps)
        bars = schedule.alphas_cumprod
        self.constants = {
            name: torch.tensor(values, dtype=torch.float32)
            for name, values in {
                "signal": np.sqrt(bars), "noise": np.sqrt(1 - bars),
                "x0_x": np.sqrt(1 / bars), "x0_eps": np.sqrt(1 / bars - 1),
                "mean_x0": schedule.posterior_mean_x0, "mean_xt": schedule.posterior_mean_xt,
                "log_least": schedule.posterior_log_variance, "log_most": np.log(schedule.betas),
            }.items()
        }  # fmt: skip

    def loss(self, network, x0, t, noise):
        """x0, noise: [B, C, H, W] → [B]."""
        at = {name: values[t][:, None, None, None] for name, values in self.constants.items()}
        x = at["signal"] * x0 + at["noise"] * noise
        eps, v = network(x).chunk(2, 1)
        mse = (noise - eps).square().flatten(1).mean(1)
        fraction = (v + 1) / 2
        log_variance = fraction * at["log_most"] + (1 - fraction) * at["log_least"]
        predicted = at["x0_x"] * x - at["x0_eps"] * eps.detach()
        mean = at["mean_x0"] * predicted + at["mean_xt"] * x
        true = at["mean_x0"] * x0 + at["mean_xt"] * x
        kl = 0.5 * (
            log_variance - at["log_least"] - 1 + torch.exp(at["log_least"] - log_variance)
            + (true - mean).square() * torch.exp(-log_variance)
        )  # fmt: skip

        def cdf(z):
            return 0.5 * (1 + torch.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

        inverse = torch.exp(-0.5 * log_variance)
        upper = cdf(inverse * (x0 - mean + 1 / 255))
        lower = cdf(inverse * (x0 - mean - 1 / 255))
        log_p = torch.where(
            x0 < -0.999,
            upper.clamp(min=1e-12).log(),
            torch.where(
                x0 > 0.999,
                (1 - lower).clamp(min=1e-12).log(),
                (upper - lower).clamp(min=1e-12).log(),
            ),
        )
        vb = torch.where((t == 0)[:, None, None, None], -log_p, kl).flatten(1).mean(1) / np.log(2)
        return mse + vb


class Trainer:
    """AdamW and EMA on a TorchMDT, both passes a step; autocast: bfloat16."""

    def __init__(self, network: TorchMDT, lr: float, ema_decay: float, autocast: bool = False):
        self.network, self.diffusion, self.autocast = network, Diffusion(), autocast
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0)
        self.ema, self.decay = copy.deepcopy(network).requires_grad_(False), ema_decay

    def loss(self, x0, t, noises, labels, ids):
        """noises, labels: of the full and of the masked pass."""
        total = 0
        for noise, y, kept in zip(noises, labels, (None, ids), strict=True):

            def network(x, y=y, kept=kept):
                with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                    return self.network(x, t, y, kept)

            total = total + self.diffusion.loss(network, x0, t, noise).mean()
        return total

    def step(self, *batch) -> float:
        loss = self.loss(*batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for ema, parameter in zip(
                self.ema.parameters(), self.network.parameters(), strict=True
            ):
                ema.lerp_(parameter, 1 - self.decay)
        return loss.item()


class Sampler:
    """Guided ancestral sampling with the learned variance, power-cosine guidance, on the CPU."""

    def __init__(self, network: TorchMDT, num_steps: int, scale: float, power: float, autocast):
        self.network, self.autocast = network.eval(), autocast
        whole = linear_schedule(1000)
        self.schedule = respace(whole, spaced_timesteps(num_steps, 1000))
        self.scale, self.power = scale, power

    @torch.inference_mode()
    def sample(self, x, labels):
        """x: [B, C, H, W] noise → samples."""
        schedule = self.schedule
        both = torch.cat([labels, torch.full_like(labels, self.network.null_label)])
        for i in reversed(range(schedule.num_steps)):
            t = int(schedule.timesteps[i])
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                out = self.network(torch.cat([x, x]), torch.full((2 * len(x),), t), both)
            cond, null = out.chunk(2)
            eps, v = cond.chunk(2, 1)
            rise = (1 - np.cos(np.pi * (1 - t / 1000) ** self.power)) / 2
            weight = 1 + (self.scale - 1) * rise
            n = min(3, x.shape[1])
            guided = null[:, :n] + weight * (eps[:, :n] - null[:, :n])
            eps = torch.cat([guided, eps[:, n:]], 1)
            bar = schedule.alphas_cumprod[i]
            x0 = float(np.sqrt(1 / bar)) * x - float(np.sqrt(1 / bar - 1)) * eps
            factors = schedule.posterior_mean_x0[i], schedule.posterior_mean_xt[i]
            mean = float(factors[0]) * x0 + float(factors[1]) * x
            least, most = schedule.posterior_log_variance[i], np.log(schedule.betas[i])
            least, most = float(least), float(most)
            log_variance = least + (v + 1) / 2 * (most - least)
            noise = torch.randn(x.shape) if i else 0
            x = mean + torch.exp(0.5 * log_variance) * noise
        return x
