"""One pad token for the tokenizer, the batches and the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loftq_exp.errors import UserError
from loftq_exp.tasks.encode import pad_token_id, padding_candidates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def settle_padding(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set one pad token, which `model` has an embedding for, in `tokenizer` and in the model's config.

    The attention mask hides padding. However, a decoder that classifies finds the end of a text by comparing ids with its
    config's `pad_token_id`. With another pad token, a row's label would depend on the other rows of the batch. A pad token
    added to the tokenizer only has no embedding. Raises UserError if no token can pad.
    """
    embeddings = model.get_input_embeddings().weight.shape[0]
    token_id = pad_token_id(tokenizer)
    if token_id >= embeddings:
        known = [candidate for candidate in padding_candidates(tokenizer) if candidate < embeddings]
        if not known:
            raise UserError(
                f"model.path={tokenizer.name_or_path}: its tokenizer pads with token {token_id} and the model has embeddings "
                f"for {embeddings}; use a model whose tokenizer_config.json names a pad_token or eos_token among these"
            )
        token_id = known[0]
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(token_id)
    model.config.get_text_config().pad_token_id = token_id
