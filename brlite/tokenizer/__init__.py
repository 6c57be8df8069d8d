"""Text to token ids and back, and chats to text, for the model that is served.

Reads tokenizers of Hugging Face folders, bare sentencepiece models and GGUF vocabularies. Knows no weights, no sampling
and no HTTP. May import: errors; tokenizers, sentencepiece, inside the loaders
only; jinja2, in a child process only.
"""

from brlite.tokenizer.child_process import ChildLimits
from brlite.tokenizer.loader import load_tokenizer
from brlite.tokenizer.tokenizer import Tokenizer

__all__ = ["ChildLimits", "Tokenizer", "load_tokenizer"]
