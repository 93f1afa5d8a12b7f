"""The two models of the check, with seeded random weights, and packages of them that were saved on the CPU."""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Digits(nn.Module):
    "The digits example's network: ten logits for 8x8 grey images"

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.head = nn.Linear(64 * 4 * 4, 10)

    def forward(self, image):
        x = F.relu(self.conv2(F.relu(self.conv1(image))))
        return self.head(F.max_pool2d(x, 2).flatten(1))


class Layer(nn.Module):
    "Attention, then a small network, each added to its input"

    def __init__(self, width, heads, inner):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width) for _ in range(4))
        self.grow, self.shrink = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-12), nn.LayerNorm(width, 1e-12)

    def forward(self, x, keep):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.mix(seen))
        return self.norm2(x + self.shrink(F.gelu(self.grow(x))))


class Encoder(nn.Module):
    "MiniLM's architecture: token numbers and a mask in, one vector of length 1 for each row out"

    def __init__(self, words=30522, places=512, width=384, heads=12, inner=1536, layers=6):
        super().__init__()
        self.words, self.places, self.kinds = (nn.Embedding(n, width) for n in (words, places, 2))
        self.norm = nn.LayerNorm(width, 1e-12)
        self.layers = nn.ModuleList(Layer(width, heads, inner) for _ in range(layers))

    def forward(self, ids, mask):
        x = self.norm(self.words(ids) + self.places.weight[:ids.shape[1]] + self.kinds.weight[0])
        keep = mask.bool()[:, None, None]
        for layer in self.layers:
            x = layer(x, keep)
        real = mask[..., None].to(x.dtype)
        return F.normalize((x * real).sum(1) / real.sum(1).clamp(min=1))


@dataclass(frozen=True)
class Kind:
    "One model of the check"
    name: str
    output: str
    tokens: int = 0  # of a row; 0 for images
    words: int = 30522
    layers: int = 6

    def module(self):
        "With the same weights each time"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(20261127)
            return (Encoder(words=self.words, layers=self.layers) if self.tokens else Digits()).eval()

    def rows(self, n, seed=1):
        "Inputs by name, of n rows"
        rng = np.random.default_rng(seed)
        if not self.tokens:
            return {"image": rng.random((n, 1, 8, 8), np.float32)}
        lengths = rng.integers(self.tokens // 2, self.tokens + 1, n)
        return {"ids": rng.integers(1000, self.words, (n, self.tokens)), "mask": (np.arange(self.tokens) < lengths[:, None]).astype(np.int64)}

    def package(self, work, format="torchscript", **options):
        "The package, saved on the CPU by the first section that asks for it"
        from mlserve.package import load_package, save_package
        folder = work / "-".join([self.name, format, *map(str, options.values())])
        if (folder / "package.lock").exists():
            return load_package(folder)
        return save_package(self.module(), folder, self.name, self.rows(4, 0), [self.output], format=format, **options)


CNN = Kind("digits", "logits")


def encoder(record, tokens=128):
    "The encoder: as it is on a GPU; in a rehearsal one layer, short rows and few words"
    return Kind(f"encoder-{tokens}", "vector", tokens) if record.gpu else Kind("encoder-16", "vector", 16, 2000, 1)


def tensors(kind, n, device, seed=1):
    return [torch.from_numpy(a).to(device) for a in kind.rows(n, seed).values()]


def synced(record):
    "What waits until the device has finished"
    return torch.cuda.synchronize if record.gpu else (lambda: None)


def free(record):
    "Give back what torch keeps of the GPU's memory"
    if record.gpu:
        torch.cuda.empty_cache()
