"""What is put around an encoded text: BOS before it and EOS after it, where the model's tokenizer does so."""

from __future__ import annotations

from tokenizers import Tokenizer, processors


def add_bos_eos(backend: Tokenizer, *, bos_token_id: int | None, eos_token_id: int | None) -> None:
    """Make `encode` add the tokens that are not None, if it is asked for special tokens."""
    ends = {"bos": bos_token_id, "eos": eos_token_id}
    template = [name for name in ("bos", "$A", "eos") if ends.get(name, 0) is not None]
    backend.post_processor = processors.TemplateProcessing(
        single=template,
        special_tokens=[
            {"id": name, "ids": [token_id], "tokens": [backend.id_to_token(token_id)]}
            for name, token_id in ends.items()
            if token_id is not None
        ],
    )
