"""E-CAR in one file: the network, the training loss and the sampler, with torch and nothing else of ours.

    python examples/standalone.py MODEL_FOLDER OUT.png      # e.g. src/ecar/bundled/fashion

A test holds this file equal to the library (same weights, same noise, same loss, same latents), so it can be read
as the specification. Notation as in docs/method.md: z data, n noise, y_k the end of stage k, M_k token maps.
"""

import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# --- Stages (Eq. 1-5) -------------------------------------------------------------------------------------------------


def D(x):
    return F.avg_pool2d(x, 2)


def U(x):
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def levels(ends, rho):
    """a_k of every stage (Eq. 4)."""
    return [0.0] + [rho * b / (2 * (1 - b) + rho * b) for b in ends[:-1]]


def fresh_part(e, rho):
    return math.sqrt(1 - rho**2) * U(D(e)) + e - U(D(e))


def noise_pyramid(es, rho):
    """n_1 = e_1, n_k = (rho/2) U n_{k-1} + fresh part."""
    ns = [es[0]]
    for e in es[1:]:
        ns.append(rho / 2 * U(ns[-1]) + fresh_part(e, rho))
    return ns


# --- Network ----------------------------------------------------------------------------------------------------------


def rms(x, weight=1.0):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def grid_coordinates(side):
    rows, columns = ((torch.arange(n) + 0.5) / n for n in side)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)


def fourier(side, bands=6):
    phases = (grid_coordinates(side)[:, :, None] * math.pi * 2.0 ** torch.arange(bands)).flatten(1)
    return torch.cat([phases.sin(), phases.cos()], -1)


def rotary(side, finest, head_dim):
    pairs = head_dim // 4
    frequencies = 100.0 ** (-torch.arange(pairs) / pairs)
    return ((grid_coordinates(side) * torch.tensor(finest))[:, :, None] * frequencies).flatten(1)


def rotate(x, angles):
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Block(nn.Module):
    """adaLN-zero, QK-normalised attention with 2-D rotary positions, SwiGLU."""

    def __init__(self, width, heads):
        super().__init__()
        hidden = math.ceil(8 * width / 3 / 32) * 32
        self.attention, self.mlp = nn.Module(), nn.Module()
        self.heads, a, m = heads, self.attention, self.mlp
        a.to_qkv, a.to_out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        a.q_norm, a.k_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        m.w_in, m.w_out = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x, condition, angles, mask=None):
        """x (B, N, D), condition (B, 1 or N, D)."""
        s1, c1, g1, s2, c2, g2 = self.modulation(condition).chunk(6, -1)
        h = rms(x) * (1 + c1) + s1
        q, k, v = self.attention.to_qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (rotate(rms(y, n.weight), angles) for y, n in ((q, self.attention.q_norm), (k, self.attention.k_norm)))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + g1 * self.attention.to_out(h)
        gate, value = self.mlp.w_in(rms(x) * (1 + c2) + s2).chunk(2, -1)
        return x + g2 * self.mlp.w_out(F.silu(gate) * value)


class Part(nn.Module):
    """What transformer and head have in common."""

    def __init__(self, c, depth):
        super().__init__()
        width, stages = c["width"], len(c["stages"]["sides"])
        self.map_in, self.position_in = nn.Linear(c["channels"], width), nn.Linear(24, width)
        self.class_embedding = nn.Embedding(c["num_classes"] + 1, width)
        self.stage_embedding = nn.Embedding(stages, width)
        self.blocks = nn.ModuleList(Block(width, c["heads"]) for _ in range(depth))


class ECAR(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config["velocity_std"], "the configuration has no velocity_std"
        self.c, width = config, config["width"]
        self.sides = [tuple(s) for s in config["stages"]["sides"]]
        self.ends, self.rho = config["stages"]["ends"], config["stages"]["rho"]
        self.starts = levels(self.ends, self.rho)
        self.trunk, self.head = Part(config, config["trunk_depth"]), Part(config, config["head_depth"])
        self.trunk.norm_out = nn.RMSNorm(width)
        self.head.token_in, self.head.map_out = nn.Linear(width, width), nn.Linear(width, config["channels"])
        self.head.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.head.modulation_out = nn.Linear(width, 2 * width)

    def angles(self, k):
        return rotary(self.sides[k], self.sides[-1], self.c["width"] // self.c["heads"])

    def tokens(self, ys, labels):
        """M_1 .. M_K from y_1 .. y_{K-1}, block-causal over stages."""
        p, xs, conditions, ids = self.trunk, [], [], []
        for k in range(len(ys) + 1):
            x = p.position_in(fourier(self.sides[k])) + p.stage_embedding.weight[k] + p.class_embedding(labels)[:, None]
            if k:
                x = x + p.map_in(U(ys[k - 1]).flatten(2).transpose(1, 2))
            condition = F.silu(p.class_embedding(labels) + p.stage_embedding.weight[k])
            xs.append(x)
            conditions.append(condition[:, None].expand_as(x))
            ids.append(torch.full((x.shape[1],), k))
        x, condition, ids = torch.cat(xs, 1), torch.cat(conditions, 1), torch.cat(ids)
        angles = torch.cat([self.angles(k) for k in range(len(ys) + 1)])
        for block in p.blocks:
            x = block(x, condition, angles, mask=ids[:, None] >= ids)
        return rms(x, p.norm_out.weight).split([h * w for h, w in self.sides[: len(ys) + 1]], 1)

    def velocity(self, k, x, t, tokens, labels):
        """v_k at x_k^t."""
        p, width = self.head, self.c["width"]
        h = p.map_in(x.flatten(2).transpose(1, 2)) + p.token_in(tokens) + p.position_in(fourier(self.sides[k]))
        frequencies = torch.exp(-math.log(10_000.0) * torch.arange(width // 2) / (width // 2))
        phases = 1000 * t[:, None] * frequencies
        time = p.time_mlp(torch.cat([phases.cos(), phases.sin()], -1))
        condition = F.silu(time + p.class_embedding(labels) + p.stage_embedding.weight[k])[:, None]
        for block in p.blocks:
            h = block(h, condition, self.angles(k))
        shift, scale = p.modulation_out(condition).chunk(2, -1)
        v = p.map_out(rms(h) * (1 + scale) + shift).transpose(1, 2).unflatten(2, self.sides[k])
        return v * self.c["velocity_std"][k]


# --- Training loss ----------------------------------------------------------------------------------------------------


def loss(model, z, labels, es, contexts, times):
    """Per stage, per image: squared error of the velocity in units of its standard deviation. Teacher-forced."""
    zs = [z]
    while len(zs) < len(model.sides):
        zs.insert(0, D(zs[0]))
    ns = noise_pyramid(es, model.rho)
    ys = [b * zk + (1 - b) * n for b, zk, n in zip(model.ends, zs, ns, strict=True)]
    noisy = [y + model.c["context_noise"] * c for y, c in zip(ys, contexts, strict=False)]
    tokens, losses = model.tokens(noisy, labels), []
    for k, (a, y, n, t) in enumerate(zip(model.starts, ys, ns, times, strict=True)):
        start = n if k == 0 else a * U(zs[k - 1]) + (1 - a) * n
        x = start + t.view(-1, 1, 1, 1) * (y - start)
        error = (model.velocity(k, x, t, tokens[k], labels) - (y - start)) / model.c["velocity_std"][k]
        losses.append(error.square().mean((1, 2, 3)))
    return losses


# --- Sampler ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(model, labels, es, contexts, steps, guidance, guidance_from=(), solver="euler"):
    """Latents from noise: steps (euler or ab2), guidance scale and the time from which it acts per stage. Recomputes
    the tokens: no cache, to stay short."""
    null, ys, read = torch.full_like(labels, model.c["num_classes"]), [], []
    for k, (count, scale) in enumerate(zip(steps, guidance, strict=True)):
        if k:
            a, b = model.starts[k], model.ends[k - 1]
            x = a / b * U(ys[-1]) + (1 - a) * fresh_part(es[k], model.rho)  # the jump (Eq. 5)
            read.append(ys[-1] + model.c["context_noise"] * contexts[k - 1])
        else:
            x = es[0]
        m, m_null, before = model.tokens(read, labels)[k], model.tokens(read, null)[k], None
        for i in range(count):
            t = torch.full((len(labels),), i / count)
            v = model.velocity(k, x, t, m, labels)
            if scale != 1 and i / count >= (guidance_from[k] if guidance_from else 0):
                v_null = model.velocity(k, x, t, m_null, null)
                v = v_null + scale * (v - v_null)
            ahead = v if solver == "euler" or before is None else 1.5 * v - 0.5 * before  # Adams-Bashforth, equal steps
            x, before = x + ahead / count, v
        ys.append(x)
    return ys[-1]


def load(folder):
    from safetensors.torch import load_file

    config = json.loads((Path(folder) / "config.json").read_text())["model"]
    model = ECAR(config)
    model.load_state_dict({k: v.float() for k, v in load_file(Path(folder) / "model.safetensors").items()})
    return model.eval()


def main():
    from PIL import Image

    from ecar.tokenizers import load_tokenizer  # the decoder is not the method: taken from the library

    folder, out = sys.argv[1], sys.argv[2]
    model, c = load(folder), json.loads((Path(folder) / "config.json").read_text())["model"]
    labels = torch.arange(c["num_classes"]).repeat_interleave(8) if c["num_classes"] else torch.zeros(32).long()
    torch.manual_seed(0)
    es = [torch.randn(len(labels), c["channels"], *side) for side in model.sides]
    contexts = [torch.randn_like(e) for e in es[:-1]]
    s = c["sampling"]
    assert s["solver"] in ("euler", "ab2"), f"not here: {s}"
    z = sample(model, labels, es, contexts, s["steps"], s["guidance"], s.get("guidance_from"), s["solver"])
    x = load_tokenizer(Path(folder) / "tokenizer").decode(z)
    rows = [torch.cat(list(row), -1) for row in x.split(8)]
    sheet = ((torch.cat(rows, -2) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(sheet).save(out)


if __name__ == "__main__":
    main()
