"""Item texts to vectors: mean pooling, then PCA fitted on training items, then the grid that makes cosines exact."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel

from reclora_dist.backbone.load import load_tokenizer, mean_pool
from reclora_dist.retrieval import on_grid

Array = npt.NDArray[np.float32]


class TextEncoder:
    """A transformers model on ``device`` that turns texts into vectors."""

    def __init__(self, path: str, max_tokens: int, device: torch.device | str = "cpu") -> None:
        self.tokenizer = load_tokenizer(path)
        self.model = AutoModel.from_pretrained(path, dtype=torch.float32, use_safetensors=True).eval().to(device)
        self.max_tokens = max_tokens
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Array:
        """Mean-pooled last hidden states, float32 [texts, width]."""
        device = self.model.device
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(device)
        hidden = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        pooled: Array = mean_pool(hidden, batch["attention_mask"]).cpu().numpy()
        return pooled


@dataclass(frozen=True)
class Projection:
    """Vectors to item vectors: centred, projected, scaled to ``retrieval.on_grid``.

    Attributes:
        mean: float32 [width].
        basis: float32 [width, dimension]; None keeps all directions.
    """

    mean: Array
    basis: Array | None

    @classmethod
    def fit(cls, vectors: Array, dimension: int) -> "Projection":
        """The leading principal components of ``vectors`` [N, width].

        Args:
            vectors: what may have a say in the projection.
            dimension: components; 0, or more than there are, keeps all directions.

        Raises:
            ValueError: there is no vector to fit on.
        """
        if not len(vectors):
            raise ValueError("no item has a training event, so there is nothing to fit the PCA on; check the split")
        mean = vectors.mean(axis=0)
        reduces = 0 < dimension < vectors.shape[1]
        return cls(mean, _components(vectors - mean, dimension) if reduces else None)

    def __call__(self, vectors: Array) -> Array:
        """Item vectors, float32 [N, dimension]."""
        centred = vectors - self.mean
        return on_grid(centred if self.basis is None else centred @ self.basis)

    def to_array(self) -> Array:
        """One array: the mean, then the components, float32 [1 + dimension, width]."""
        return self.mean[None] if self.basis is None else np.concatenate([self.mean[None], self.basis.T])

    @classmethod
    def from_array(cls, array: Array) -> "Projection":
        """What ``to_array`` made."""
        return cls(array[0], np.ascontiguousarray(array[1:].T) if len(array) > 1 else None)


def _components(rows: Array, dimension: int) -> Array:
    """Leading eigenvectors of the covariance [width, dimension], signs fixed so that runs agree."""
    _, vectors = np.linalg.eigh(rows.T.astype(np.float64) @ rows)
    basis = vectors[:, ::-1][:, :dimension]
    signs = np.sign(basis[np.abs(basis).argmax(axis=0), np.arange(basis.shape[1])])
    components: Array = (basis * signs).astype(np.float32)
    return components
