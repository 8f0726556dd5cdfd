"""One token that pads, for the tokenizer, the batches and the model alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loftq_exp.errors import UserError
from loftq_exp.tasks.encode import pad_token_id, padding_candidates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def settle_padding(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives `tokenizer` a pad token that `model` has an embedding for, and the model's config the same one.

    The attention mask hides padding, but a decoder that classifies finds the end of a text by comparing ids with its
    config's `pad_token_id`: with another one, a row's label would depend on the rows beside it. A pad token that was added
    to a tokenizer and not to its model is beyond the embeddings. Raises UserError where no token can pad.
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
