"""Models for texts. They map token ids (B, T) int64 to features (B, D) or, for language models, to features of every position (B, T, D).

Id 0 is padding, which follows the tokens of a text. Every other id is a token. V is the size of the vocabulary, including id 0. The
numbers of parameters include the linear head. All models run under torch.func.vmap, so they use neither EmbeddingBag nor packed sequences.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedloom.errors import ConfigError
from fedloom.inputs import InputSpec
from fedloom.models.attention import Positions, TransformerBlock
from fedloom.models.layers import check_dropout, projected

PADDING = 0
WIDTHS = (3, 4, 5)
MAPS = 100


class MeanOfTokens(nn.Module):
    """Maps ids (B, T) to the mean embedding of their tokens (B, dim), which is zero for a text without tokens."""

    def __init__(self, vocabulary: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim, padding_idx=PADDING)

    def forward(self, ids: Tensor) -> Tensor:
        return _mean(self.embedding(ids), ids != PADDING)


class MaxOfConvolutions(nn.Module):
    """Maps ids (B, T) to the largest response of each filter over all windows that start at a token (B, maps * number of widths).

    Windows may extend beyond the last token, as in Kim's code, so texts may be shorter than the filters.
    """

    def __init__(self, vocabulary: int, dim: int, maps: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim, padding_idx=PADDING)
        self.convolutions = nn.ModuleList(nn.Conv1d(dim, maps, width) for width in WIDTHS)

    def forward(self, ids: Tensor) -> Tensor:
        tokens = F.pad(self.embedding(ids).transpose(1, 2), (0, max(WIDTHS) - 1))  # (B, dim, T + 4)
        starts = (ids != PADDING).unsqueeze(1)
        n = ids.shape[1]
        return torch.cat([(conv(tokens)[..., :n].relu() * starts).amax(2) for conv in self.convolutions], 1)


class LSTM(nn.Module):
    """Maps ids (B, T) to the output of the top LSTM layer at the last token (B, hidden), or at every position (B, T, hidden)."""

    def __init__(self, vocabulary: int, dim: int, hidden: int, n_layers: int, *, every: bool) -> None:
        super().__init__()
        self.every = every
        self.embedding = nn.Embedding(vocabulary, dim, padding_idx=PADDING)
        self.lstm = nn.LSTM(dim, hidden, n_layers, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        outputs: Tensor = self.lstm(self.embedding(ids))[0]
        if self.every:
            return outputs
        last = ((ids != PADDING).sum(1) - 1).clamp(min=0)
        return outputs.gather(1, last[:, None, None].expand(-1, 1, outputs.shape[2])).squeeze(1)


class Transformer(nn.Module):
    """Maps ids (B, T) to features, with blocks that normalise before attention and perceptron, and with a final LayerNorm.

    Args:
        length: the largest T, which is the number of learnt positions.
        pool: with `mean`, the mean over tokens (B, dim); with `first`, the first token (B, dim); with `none`, every position
            (B, T, dim), which attends only to itself and to earlier positions.
    """

    def __init__(
        self, vocabulary: int, length: int, dim: int, *, heads: int, depth: int, hidden: int, dropout: float, pool: str
    ) -> None:
        super().__init__()
        self.pool = pool
        self.embedding = nn.Embedding(vocabulary, dim, padding_idx=PADDING)
        with torch.no_grad():
            nn.init.normal_(self.embedding.weight, std=0.02)[PADDING] = 0
        self.positions = Positions(length, dim)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, hidden, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor) -> Tensor:
        valid, mask = ids != PADDING, self._mask(ids)
        tokens = self.dropout(self.positions(self.embedding(ids)))
        for block in self.blocks:
            tokens = block(tokens, mask)
        tokens = self.norm(tokens)
        return tokens if self.pool == "none" else tokens[:, 0] if self.pool == "first" else _mean(tokens, valid)

    def _mask(self, ids: Tensor) -> Tensor:
        """Return which positions attend to which positions.

        Each position attends at least to itself, so the result is finite for a text without tokens.
        """
        n = ids.shape[1]
        if self.pool == "none":
            return torch.ones(n, n, dtype=torch.bool, device=ids.device).tril()
        return (ids != PADDING)[:, None, None, :] | torch.eye(n, dtype=torch.bool, device=ids.device)


def _mean(tokens: Tensor, valid: Tensor) -> Tensor:
    """Return the mean (B, dim) of the valid tokens, or zeros if there are none."""
    return (tokens * valid.unsqueeze(2)).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)


def text_mean(spec: InputSpec, width: int | None = None, *, dim: int = 64, hidden: bool = False) -> nn.Sequential:
    """Return fastText's classifier (Joulin et al., EACL 2017), which uses the mean embedding of the tokens.

    It has 640,260 parameters for V=10,000 and Y=4. `hidden` adds a linear layer, as in PFLlib. PFLlib's form has 16,648,708 parameters
    (dim=512, V=32,000, hidden), and its mean includes padding.
    """
    vocabulary, _ = _tokens(spec, "text_mean")
    layers: dict[str, nn.Module] = {"words": MeanOfTokens(vocabulary, dim)}
    if hidden:
        layers["linear"] = nn.Linear(dim, dim)
    return projected(layers, dim, width)


def text_cnn(spec: InputSpec, width: int | None = None, *, dim: int = 64, dropout: float = 0.5) -> nn.Sequential:
    """Return Kim's CNN (EMNLP 2014): 100 filters each of 3, 4 and 5 tokens, the maximum over time, and dropout.

    It has 718,304 parameters for V=10,000 and Y=4. PFLlib's form has 16,999,904 parameters (dim=512, V=32,000) and dropout 0.8.
    `dropout=0` omits the dropout layer, which cannot be vectorised over clients.
    """
    check_dropout(dropout)
    vocabulary, _ = _tokens(spec, "text_cnn")
    layers: dict[str, nn.Module] = {"words": MaxOfConvolutions(vocabulary, dim, MAPS)}
    if dropout:
        layers["dropout"] = nn.Dropout(dropout)
    return projected(layers, MAPS * len(WIDTHS), width)


def char_lstm(
    spec: InputSpec, width: int | None = None, *, dim: int = 8, hidden: int = 256, layers: int = 2
) -> nn.Sequential:
    """Return LEAF's character LSTM (Caldas et al., 2018), which uses the output at the last token. It has 819,920 parameters for V=Y=80.

    torch's LSTM has two bias vectors per layer. With one bias vector, as in TensorFlow, the model has 2,048 fewer parameters: 817,872 for
    LEAF's V=80, and 820,522 for TensorFlow Federated's V=90, which is the number in papers (here 822,570).
    """
    vocabulary, _ = _tokens(spec, "char_lstm")
    return projected({"lstm": LSTM(vocabulary, dim, hidden, layers, every=False)}, hidden, width)


def text_transformer(
    spec: InputSpec,
    width: int | None = None,
    *,
    dim: int = 64,
    heads: int = 4,
    depth: int = 2,
    hidden: int = 256,
    pool: str = "mean",
    dropout: float = 0.0,
) -> nn.Sequential:
    """Return a transformer encoder with learnt positions (Vaswani et al., NeurIPS 2017; Devlin et al., NAACL 2019).

    Inputs are normalised before each layer. It has 744,452 parameters for V=10,000, T=64 and Y=4. With `pool`, features are the `mean`
    over tokens, or those of the `first` token. `hidden` is the width of the perceptrons. PFLlib's transformer has fixed positions and no
    final norm, and has 22,690,820 parameters (dim=512, heads=8, hidden=2048, V=32,000).
    """
    if pool not in ("mean", "first"):
        raise ConfigError(f"model option pool={pool!r} is unknown; known: mean, first")
    body = _transformer(
        spec, "text_transformer", dim, heads=heads, depth=depth, hidden=hidden, dropout=dropout, pool=pool
    )
    return projected({"transformer": body}, dim, width)


def lm_lstm(
    spec: InputSpec, width: int | None = None, *, dim: int = 8, hidden: int = 256, layers: int = 2
) -> nn.Sequential:
    """Return `char_lstm` with the outputs at every position (B, T, D), to predict each next token. It has 819,920 parameters for V=80."""
    vocabulary, _ = _tokens(spec, "lm_lstm")
    return projected({"lstm": LSTM(vocabulary, dim, hidden, layers, every=True)}, hidden, width)


def lm_transformer(
    spec: InputSpec,
    width: int | None = None,
    *,
    dim: int = 128,
    heads: int = 4,
    depth: int = 2,
    hidden: int = 512,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Return a causal transformer (Radford et al., 2019) with features for every position (B, T, D), to predict each next token.

    It has 427,600 parameters for V=T=80. The head has its own weights, separate from those of the embedding.
    """
    body = _transformer(
        spec, "lm_transformer", dim, heads=heads, depth=depth, hidden=hidden, dropout=dropout, pool="none"
    )
    return projected({"transformer": body}, dim, width)


def _transformer(spec: InputSpec, name: str, dim: int, *, heads: int, dropout: float, **sizes: Any) -> Transformer:
    check_dropout(dropout)
    if dim % heads:
        raise ConfigError(f"model {name}: heads={heads} must divide dim={dim}")
    vocabulary, length = _tokens(spec, name)
    return Transformer(vocabulary, length, dim, heads=heads, dropout=dropout, **sizes)


def _tokens(spec: InputSpec, name: str) -> tuple[int, int]:
    """Return V and T of the only input. Raise ConfigError if there are other inputs."""
    field = spec.fields[0]
    if not spec.is_single or field.kind != "token" or len(field.shape) != 1:
        raise ConfigError(f"model={name}: needs token ids (T,) as its only input, but the inputs are {spec}")
    return field.levels[0], field.shape[0]
