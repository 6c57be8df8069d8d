"""Tiny tokenizers in the shapes that models come in, trained here; GGUF headers written to order."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.tokenizer.texts import CORPUS

WriteGguf = Callable[..., Path]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endfor %}"
)
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_folder(folder: Path, **files: Any) -> Path:
    """Write JSON files into a folder: the keyword `tokenizer_config` makes `tokenizer_config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def qwen2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE with NFC and single digits, a chat template, no BOS: Qwen2 in small."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<tool_call>", normalized=False)])
    folder = write_folder(
        tmp_path_factory.mktemp("qwen2"),
        config={"model_type": "qwen2", "eos_token_id": backend.token_to_id("<|im_end|>")},
        generation_config={
            "eos_token_id": [backend.token_to_id("<|im_end|>"), backend.token_to_id("<|endoftext|>")],
        },
        tokenizer_config={
            "tokenizer_class": "Qwen2Tokenizer",
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "chat_template": CHATML,
        },
    )
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BPE over ▁ with bytes for unknown characters and a BOS from the post-processor: Llama 2 in small."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(merge) for merge in model["merges"]]
    vocabulary = {name: token_id for token_id, name in enumerate(names)}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names[:3]])
    folder = write_folder(
        tmp_path_factory.mktemp("llama"),
        config={"model_type": "llama", "eos_token_id": 2},
        tokenizer_config={
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": {
                "__type": "AddedToken",
                "content": "<s>",
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
            },
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "chat_template": [{"name": "default", "template": LLAMA2_CHAT}, {"name": "tool_use", "template": ""}],
        },
    )
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An old Llama folder: a bare `tokenizer.model` and no JSON at all."""
    return train_sentencepiece(tmp_path_factory.mktemp("sentencepiece"), model_type="bpe")


def train_sentencepiece(folder: Path, **options: Any) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.splitlines() if line),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=options.pop("vocab_size", 480),
        byte_fallback=True,
        normalization_rule_name=options.pop("normalization_rule_name", "identity"),
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
        **options,
    )
    return folder


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGguf:
    """Write a GGUF file that has a header only. Keys with a dot stand as they are, others under `tokenizer.ggml.`."""

    def write(name: str = "model.gguf", **keys: Any) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        for key, value in keys.items():
            _add(writer, key if "." in key else f"tokenizer.ggml.{key}", value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return tmp_path / name

    return write


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    add[type(value)](key, value)


@pytest.fixture(scope="session")
def byte_level_keys(qwen2_folder: Path) -> Mapping[str, Any]:
    """The GGUF keys of the tiny Qwen2 tokenizer, which has no BOS."""
    parts = json.loads((qwen2_folder / "tokenizer.json").read_bytes())
    added = {token["id"]: token for token in parts["added_tokens"]}
    texts = {**{i: text for text, i in parts["model"]["vocab"].items()}, **{i: t["content"] for i, t in added.items()}}
    tokens = [texts[token_id] for token_id in range(len(texts))]
    kinds = [1 if i not in added else 3 if added[i]["special"] else 4 for i in range(len(tokens))]
    return {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": tokens,
        "token_type": kinds,
        "merges": [" ".join(merge) for merge in parts["model"]["merges"]],
        "eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.chat_template": CHATML,
    }


@pytest.fixture(scope="session")
def pieces_keys(sentencepiece_folder: Path) -> Mapping[str, Any]:
    """The GGUF keys of the tiny sentencepiece model, with nothing said of BOS and spaces."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    ids = range(processor.get_piece_size())
    kinds = [2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 1 for i in ids]
    return {
        "model": "llama",
        "tokens": [processor.id_to_piece(i) for i in ids],
        "scores": [processor.get_score(i) for i in ids],
        "token_type": [6 if processor.is_byte(i) else kind for i, kind in zip(ids, kinds, strict=True)],
    }
