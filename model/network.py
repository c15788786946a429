"""MTGR: user, history and candidates of many requests in, the probabilities of four heads per candidate out.

The story of one batch: embed tokens, run the layers over them, read the candidates. What a layer does is in `hstu` and
`gated_conv`, who sees whom in `masks`, the batch itself in `batch`. The slow double of all this is `oracle`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model.batch import JaggedBatch
from model.config import ModelConfig
from model.embeddings import TokenEmbedding, TokenGate
from model.gated_conv import GatedConvBlock
from model.heads import Heads
from model.hstu import HstuBlock
from model.masks import layout
from pipeline.contracts import FeatureSchema


class MTGR(nn.Module):
    """The network. Its inputs are `PackedBatch.tensors()`; all their lengths may change from call to call."""

    def __init__(self, config: ModelConfig, schema: FeatureSchema) -> None:
        super().__init__()
        self.config = config
        self.schema = schema
        self.embedding = TokenEmbedding(config, schema)
        self.token_gate = TokenGate(config.d_model) if config.token_gate else None
        last = config.layers - 1
        self.blocks = nn.ModuleList(
            HstuBlock(config, last=number == last) if config.layer == "hstu" else GatedConvBlock(config) for number in range(config.layers)
        )
        self.heads = Heads(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        user_ids: Tensor,
        event_ids: Tensor,
        candidate_ids: Tensor,
        cross: Tensor,
        token_source: Tensor,
        kind: Tensor,
        history_index: Tensor,
        history_limit: Tensor,
        candidate_index: Tensor,
        candidate_limit: Tensor,
        unpad: Tensor,
        candidate_rows: Tensor,
    ) -> Tensor:
        """[C, 4] float32 probabilities, in the order of the batch's candidates and of `HEADS`."""
        return torch.sigmoid(
            self.logits(
                user_ids,
                event_ids,
                candidate_ids,
                cross,
                token_source,
                kind,
                history_index,
                history_limit,
                candidate_index,
                candidate_limit,
                unpad,
                candidate_rows,
            )
        )

    def logits(
        self,
        user_ids: Tensor,
        event_ids: Tensor,
        candidate_ids: Tensor,
        cross: Tensor,
        token_source: Tensor,
        kind: Tensor,
        history_index: Tensor,
        history_limit: Tensor,
        candidate_index: Tensor,
        candidate_limit: Tensor,
        unpad: Tensor,
        candidate_rows: Tensor,
    ) -> Tensor:
        """`forward` before the sigmoid."""
        x = self.embedding(user_ids, event_ids, candidate_ids, cross, token_source, kind)
        if self.token_gate is not None:
            x = self.token_gate(x)
        places = layout(
            kind,
            history_index,
            history_limit,
            candidate_index,
            candidate_limit,
            unpad,
            candidate_rows,
            dynamic=self.config.dynamic_mask,
            dtype=self.dtype,
        )
        for number, block in enumerate(self.blocks):
            x = block(x, kind, places, last=number == self.config.layers - 1)
        return self.heads(x)

    def logits_jagged(self, batch: JaggedBatch) -> Tensor:
        """`logits` over the kernels' kind of batch, on a GPU. Raises ValueError for layer=gated_conv, which has no kernels."""
        if self.config.layer != "hstu":
            raise ValueError(f"kernels know layer=hstu, got {self.config.layer}; pack the requests with batch.pack")
        x = self.embedding(batch.user_ids, batch.event_ids, batch.candidate_ids, batch.cross, batch.token_source, batch.kind)
        if self.token_gate is not None:
            x = self.token_gate(x)
        for number, block in enumerate(self.blocks):
            x = block(x, batch.kind, batch.layout, last=number == self.config.layers - 1)
        return self.heads(x)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the dense weights."""
        return self.embedding.user_projection.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.user_projection.weight.device

    def table_parameters(self) -> Iterator[nn.Parameter]:
        """The embedding tables."""
        return self.embedding.features.parameters()

    def dense_parameters(self) -> Iterator[nn.Parameter]:
        """Everything but the embedding tables."""
        tables = {id(parameter) for parameter in self.table_parameters()}
        return (parameter for parameter in self.parameters() if id(parameter) not in tables)

    def sparse_table_gradients(self, sparse: bool = True) -> None:
        """Whether tables get sparse gradients: only the rows of the batch, for a row-wise optimiser."""
        for table in self.embedding.features.modules():
            if isinstance(table, nn.Embedding):
                table.sparse = sparse


def block_flops(layers: int, width: int, tokens: int) -> int:
    """Multiply-adds, counted twice, of `layers` HSTU blocks over one request of `tokens`, as the paper counts: without mask and pruning."""
    return layers * (10 * width**2 * tokens + 4 * width * tokens**2)
