"""The dense decoder of modjax.nn in PyTorch, eager and in float32, for comparison in `bench step`.

Legend: B batch, L positions, D model width, N heads, H head width.
"""

import os
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from modjax.specs import ModelSpec, TrainConfig


class Block(nn.Module):
    def __init__(self, config: ModelSpec):
        super().__init__()
        d = config.d_model
        self.heads = config.num_heads
        self.q, self.k, self.v, self.out = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.w_in = nn.Linear(d, config.d_ff, bias=False)
        self.w_out = nn.Linear(config.d_ff, d, bias=False)
        self.attention_norm = nn.RMSNorm(d, eps=config.norm_eps)
        self.mlp_norm = nn.RMSNorm(d, eps=config.norm_eps)

    def forward(self, x_BLD, cos_LH, sin_LH):
        batch, length, width = x_BLD.shape
        h_BLD = self.attention_norm(x_BLD)
        q, k, v = (
            w(h_BLD).view(batch, length, self.heads, -1).transpose(1, 2)
            for w in (self.q, self.k, self.v)
        )

        def rotate(x_BNLH):
            a, b = x_BNLH.chunk(2, dim=-1)
            return torch.cat([a * cos_LH - b * sin_LH, b * cos_LH + a * sin_LH], dim=-1)

        y_BNLH = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x_BLD = x_BLD + self.out(y_BNLH.transpose(1, 2).reshape(batch, length, width))
        hidden = F.gelu(self.w_in(self.mlp_norm(x_BLD)), approximate="tanh")
        return x_BLD + self.w_out(hidden)


class Decoder(nn.Module):
    def __init__(self, config: ModelSpec, seq_len: int):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.logits = nn.Linear(config.d_model, config.vocab_size, bias=False)
        h = config.shape.head_dim
        frequency = 10_000.0 ** -(torch.arange(0, h, 2) / h)
        angle_LH = torch.arange(seq_len)[:, None] * frequency[None]
        self.cos_LH, self.sin_LH = angle_LH.cos(), angle_LH.sin()

    def forward(self, tokens_BL):
        x_BLD = self.embedding(tokens_BL)
        for block in self.blocks:
            x_BLD = block(x_BLD, self.cos_LH, self.sin_LH)
        return self.logits(self.norm(x_BLD))


def torch_step(config: ModelSpec, train: TrainConfig, tokens: np.ndarray) -> Callable[[], None]:
    """Returns an AdamW step with gradient clipping, on the cores that this process may use."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model = Decoder(config, train.seq_len)
    optimizer = torch.optim.AdamW(
        model.parameters(), train.learning_rate, (train.b1, train.b2), train.eps, train.weight_decay
    )
    batch_BL = torch.as_tensor(tokens)

    def step() -> None:
        optimizer.zero_grad()
        logits_BLV = model(batch_BL[:, :-1])
        F.cross_entropy(logits_BLV.flatten(0, 1), batch_BL[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        optimizer.step()

    return step
