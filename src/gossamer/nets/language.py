"""An LSTM language model (Zaremba, Sutskever and Vinyals 2014)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from gossamer.core.errors import ArgumentError

__all__ = ["LSTMLM", "lstm_lm"]

State = list[tuple[Tensor, Tensor]]  # per layer: (1, N, hidden) output and cell


class LSTMLM(nn.Module):
    """``embedding``, one-layer LSTMs ``rnn.0``, ``rnn.1``, ..., and ``output``.

    One module a layer, so that layers may differ in size, as they do when states are removed.

    Args:
        vocabulary: number of tokens.
        embedding: width of the embedding.
        hidden: state size of each layer.
        dropout: fraction dropped before each LSTM and before the output.
        tied: output and embedding share their weights; needs hidden[-1] == embedding.
    """

    def __init__(
        self,
        vocabulary: int,
        embedding: int,
        hidden: Sequence[int],
        *,
        dropout: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        if not hidden or min(vocabulary, embedding, *hidden) < 1:
            raise ArgumentError(
                f"vocabulary={vocabulary}, embedding={embedding}, hidden={tuple(hidden)}: every "
                "size must be at least 1, and there must be a layer"
            )
        if tied and hidden[-1] != embedding:
            raise ArgumentError(
                f"tied=True needs the last hidden size ({hidden[-1]}) to equal embedding "
                f"({embedding})"
            )
        sizes = [embedding, *hidden]
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.rnn = nn.ModuleList(
            nn.LSTM(sizes[i], sizes[i + 1], batch_first=True) for i in range(len(hidden))
        )
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden[-1], vocabulary)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.output.bias)
        if tied:
            self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) token ids -> (N, T, vocabulary) logits, from a zero state."""
        return self.advance(tokens)[0]

    def advance(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits and the state after the last token, from a given state (None: zeros)."""
        x, after = self.embedding(tokens), []
        for i, layer in enumerate(self.rnn):
            x, last = layer(self.dropout(x), None if state is None else state[i])
            after.append(last)
        return self.output(self.dropout(x)), after


def lstm_lm(
    *,
    classes: int = 10_000,
    in_shape: tuple[int, ...] | None = None,
    embedding: int = 200,
    hidden: int | Sequence[int] = (200, 200),
    layers: int | None = None,
    dropout: float = 0.0,
    tied: bool = False,
) -> nn.Module:
    """An :class:`LSTMLM` of two layers of 200 unless told otherwise; ``classes``: the vocabulary.

    ``hidden`` may be one size for ``layers`` (2) layers. ``in_shape`` is accepted as every network
    accepts it: any length of window will do.
    """
    if isinstance(hidden, int):
        hidden = (hidden,) * (2 if layers is None else layers)
    elif layers is not None and layers != len(hidden):
        raise ArgumentError(f"layers={layers} but hidden={tuple(hidden)} names {len(hidden)}")
    if in_shape is not None and len(in_shape) != 1:
        raise ArgumentError(f"lstm-lm takes in_shape=(tokens,), got {tuple(in_shape)}")
    return LSTMLM(classes, embedding, hidden, dropout=dropout, tied=tied)
