"""Converts text to token ids and back, and renders chats as text, for the served model.

Reads tokenizers of Hugging Face folders, bare sentencepiece models and GGUF vocabularies. Imports the libraries in the
loaders only. First file: `tokenizer.py`.
"""

from brlite.chat.turns import NO_EXTRAS, TemplateExtras
from brlite.process.sandbox import ChildLimits
from brlite.tokenizer.loader import load_tokenizer
from brlite.tokenizer.tokenizer import Tokenizer

__all__ = ["NO_EXTRAS", "ChildLimits", "TemplateExtras", "Tokenizer", "load_tokenizer"]
