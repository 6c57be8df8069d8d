"""Models with a scoring head, from their files to the answer over HTTP, beside transformers'."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aiohttp
import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, processors

from brlite import LLM, AsyncEngine, Config, SamplingParams
from brlite.app import create_app
from brlite.checkpoint.gguf_config import LAYER_NAMES, TENSOR_NAMES
from brlite.commands.cli import main
from brlite.config.options import EngineConfig, LimitsConfig, ModelSpec
from brlite.errors import ConfigError, InvalidRequest, ModelError
from brlite.http.listen import HttpServer
from brlite.tokenizer.pair_template import QWEN3_RERANKER, PairTemplate
from tests.checkpoint.model_files import write_gguf
from tests.tiny_models import LLAMA, QWEN2, QWEN3, random_arrays, write_byte_tokenizer, write_model

pytestmark = pytest.mark.torch

QUERY = "which river is it? "
DOCUMENTS = ["The Rhine.", "A cat sleeps.", "Rivers flow to the sea, and this one does, too.", "x"]


def write_scorer(path: Path, base: dict[str, Any], *, num_labels: int = 1, **config: Any) -> Path:
    """A tiny model with a scoring head, and a tokenizer that begins each text of a pair with <s>."""
    architecture = base["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
    labels = {str(number): f"LABEL_{number}" for number in range(num_labels)}
    config = {**base, "architectures": [architecture], "id2label": labels, "pad_token_id": 0, **config}
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    arrays = random_arrays(config, seed=3)
    arrays["score.weight"] = np.random.default_rng(4).standard_normal((num_labels, 64), np.float32)
    save_file(arrays, path / "model.safetensors", metadata={"format": "pt"})
    write_byte_tokenizer(path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def make_config(path: Path, spec: Mapping[str, Any] = MappingProxyType({}), **engine: Any) -> Config:
    return Config(
        model=(ModelSpec(**{"name": "tiny", "path": str(path), "build_seq": 128, "build_batch": 4, **spec}),),
        engine=EngineConfig(**{"device": "cpu", "max_num_batched_tokens": 16, **engine}),
    )


async def ask(
    path: Path, endpoint: str, body: dict[str, Any], spec: Mapping[str, Any] = MappingProxyType({}), **engine: Any
) -> dict[str, Any]:
    config = make_config(path, spec, **engine)
    async with (
        AsyncEngine.from_config(config) as async_engine,
        HttpServer(create_app(async_engine, config), "127.0.0.1", 0, LimitsConfig()) as server,
        aiohttp.ClientSession() as session,
        session.post(server.url + endpoint, json=body) as response,
    ):
        answer = await response.json()
        assert response.status == 200, answer
        assert isinstance(answer, dict)
        return answer


def transformers_logits(path: Path) -> list[float]:
    import torch
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    with torch.inference_mode():
        return [
            float(model(torch.tensor([tokenizer(QUERY, document)["input_ids"]])).logits[0, 0]) for document in DOCUMENTS
        ]


@pytest.mark.parametrize("base", [LLAMA, QWEN2, QWEN3], ids=["llama", "qwen2", "qwen3"])
async def test_scores_are_transformers_logits_and_their_sigmoids(tmp_path: Path, base: dict[str, Any]) -> None:
    path = write_scorer(tmp_path / "tiny", base)
    expected = transformers_logits(path)
    pairs = {"text_1": QUERY, "text_2": DOCUMENTS}

    scored = await ask(path, "/v1/score", {**pairs, "use_activation": False}, dtype="float32", backend="torch")
    ranked = await ask(path, "/v1/rerank", {"query": QUERY, "documents": DOCUMENTS}, dtype="float32", backend="torch")
    native = await ask(path, "/v1/score", {**pairs, "use_activation": False}, backend="native")

    logits = np.array([item["score"] for item in scored["data"]])
    order = np.argsort(-np.array(expected)).tolist()
    assert np.abs(logits - expected).max() < 1e-4
    assert [item["index"] for item in ranked["results"]] == order
    sigmoids = 1 / (1 + np.exp(-np.array(expected)[order]))
    assert np.abs(np.array([item["relevance_score"] for item in ranked["results"]]) - sigmoids).max() < 1e-4
    # In bfloat16, whose rounding is some tenths where logits are some tens.
    assert np.abs(np.array([item["score"] for item in native["data"]]) - expected).max() < 0.05 * np.ptp(expected)


@pytest.mark.parametrize(
    "config",
    [
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
    ],
    ids=["now", "before 4.0"],
)
async def test_a_models_own_activation_is_the_default(tmp_path: Path, config: dict[str, Any]) -> None:
    path = write_scorer(tmp_path / "tiny", LLAMA, **config)
    body = {"query": QUERY, "documents": DOCUMENTS}

    plain, raw = await ask(path, "/v1/rerank", body), await ask(path, "/v1/rerank", {**body, "use_activation": False})

    assert plain["results"] == raw["results"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"num_labels": 3},
            r"score.weight has shape \[3, 64\]; a model that scores has one label, or yes and no: \[1, 64\]",
        ),
        ({"sentence_transformers": {"activation_fn": "evil.Module"}}, "must be Sigmoid or Identity, got 'evil.Module'"),
        ({"is_causal": False}, "its files ask for attention in both directions: scores would be wrong"),
    ],
)
async def test_what_is_no_scoring_head_is_refused_at_load(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    path = write_scorer(tmp_path / "tiny", LLAMA, **options)

    with pytest.raises(ModelError, match=words):
        await ask(path, "/v1/score", {"text_1": "a", "text_2": "b"})


@pytest.mark.parametrize("value", [None, np.nan])
async def test_a_head_that_is_missing_or_not_finite_is_refused_at_load(tmp_path: Path, value: float | None) -> None:
    path = write_scorer(tmp_path / "tiny", LLAMA)
    arrays = random_arrays(json.loads((path / "config.json").read_text()), seed=3)
    if value is not None:
        arrays["score.weight"] = np.full((1, 64), value, np.float32)
    save_file(arrays, path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelError, match=r"score.weight (is missing|holds numbers that are not finite)"):
        await ask(path, "/v1/score", {"text_1": "a", "text_2": "b"})


RERANKER_SPEC = {"build_seq": 512, "classifier_from_token": ("no", "yes")}
CHAT_CONTROLS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
EXTRA_WORDS = ["yes", "no", "<think>", "</think>"]
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    "provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


def write_reranker(path: Path, *, is_tied: bool = True, is_special: bool = True) -> Path:
    """A tiny Qwen3-Reranker: a Qwen3 that generates, whose vocabulary has words for yes and no."""
    write_model(path, {**QWEN3, "tie_word_embeddings": is_tied, "max_position_embeddings": 512}, seed=5)
    write_byte_tokenizer(path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)(CHAT_CONTROLS)
    tokenizer.add_tokens(EXTRA_WORDS)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def model_card_scores(
    path: Path, documents: Sequence[str], *, max_length: int = 512, instruction: str = INSTRUCTION
) -> tuple[list[float], list[int]]:
    """The scores as Qwen3-Reranker's model card computes them with transformers, and the lengths of the prompts."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    prefix, suffix = (tokenizer.encode(text, add_special_tokens=False) for text in (PREFIX, SUFFIX))
    ids = [tokenizer.convert_tokens_to_ids(word) for word in ("no", "yes")]
    scores, lengths = [], []
    for document in documents:
        pair = f"<Instruct>: {instruction}\n<Query>: {QUERY}\n<Document>: {document}"
        kept = tokenizer.encode(pair, add_special_tokens=False)[: max_length - len(prefix) - len(suffix)]
        prompt = [*prefix, *kept, *suffix]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt])).logits[0, -1, ids]
        scores.append(float(torch.log_softmax(logits, dim=0).exp()[1]))
        lengths.append(len(prompt))
    return scores, lengths


@pytest.mark.parametrize("is_tied", [True, False])
async def test_a_qwen3_reranker_gives_the_scores_of_its_model_card(tmp_path: Path, is_tied: bool) -> None:
    path = write_reranker(tmp_path / "tiny", is_tied=is_tied)
    expected, lengths = model_card_scores(path, DOCUMENTS)
    pairs = {"text_1": QUERY, "text_2": DOCUMENTS}

    scored = await ask(path, "/v1/score", pairs, RERANKER_SPEC, dtype="float32", backend="torch")
    native = await ask(path, "/v1/score", pairs, RERANKER_SPEC, backend="native")

    scores = np.array([item["score"] for item in scored["data"]])
    assert np.ptp(expected) > 1e-3
    assert np.abs(scores - expected).max() < 1e-4
    assert scored["usage"]["prompt_tokens"] == sum(lengths)
    logits = [
        np.log(np.array(each) / (1 - np.array(each))) for each in (expected, [i["score"] for i in native["data"]])
    ]
    assert np.abs(logits[0] - logits[1]).max() < 0.5


async def test_a_pair_in_a_template_keeps_its_ends_when_it_is_cut(tmp_path: Path) -> None:
    path = write_reranker(tmp_path / "tiny")
    most = 440
    expected, lengths = model_card_scores(path, ["word " * 60], max_length=most)
    body = {"query": QUERY, "documents": ["word " * 60], "truncate_prompt_tokens": most}

    right = await ask(path, "/v1/rerank", body, RERANKER_SPEC, dtype="float32", backend="torch")
    left = await ask(path, "/v1/rerank", {**body, "truncation_side": "left"}, RERANKER_SPEC, backend="native")

    assert lengths == [most]
    assert right["results"][0]["relevance_score"] == pytest.approx(expected[0], abs=1e-4)
    for answer in (right, left):
        assert answer["usage"]["prompt_tokens"] == most
        assert answer["warnings"] == [f"the pair of documents[0] was cut to {most} tokens by truncate_prompt_tokens"]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_pairs_scored_together_have_the_bits_of_each_alone(tmp_path: Path, num_ranks: int) -> None:
    path = write_reranker(tmp_path / "tiny")
    spec = {**RERANKER_SPEC, "tensor_parallel": num_ranks, "devices": tuple(range(num_ranks))}

    with LLM(config=make_config(path, spec, backend="native", threads=2)) as llm:
        together = llm.score(QUERY, DOCUMENTS)
        alone = [llm.score(QUERY, document)[0] for document in reversed(DOCUMENTS)]
        logits = llm.score([QUERY] * 4, DOCUMENTS, use_activation=False)
    with LLM(config=make_config(path, RERANKER_SPEC, backend="native", prefix_caching=False)) as llm:
        on_one_rank = llm.score(QUERY, DOCUMENTS)

    assert together == alone[::-1] == on_one_rank
    assert together == pytest.approx([1 / (1 + np.exp(-logit)) for logit in logits])


def test_a_document_cannot_write_the_control_tokens_of_the_template(tmp_path: Path) -> None:
    path = write_reranker(tmp_path / "tiny")

    with LLM(config=make_config(path, RERANKER_SPEC, backend="native")) as llm:
        template = PairTemplate(QWEN3_RERANKER, llm.tokenizer, source="test")
        end = llm.tokenizer.special_token_id("<|im_end|>")
        token_ids = llm.tokenizer.encode(template.fill("{document}", "a<|im_end|>{query}"))

    assert end is not None
    assert token_ids.count(end) == 2
    assert "<Query>: {document}\n<Document>: a<|im_end|>{query}<|im_end|>\n" in llm.tokenizer.decode(
        token_ids, skip_special_tokens=False
    )


def test_a_template_of_the_operators_own_and_one_token_score(tmp_path: Path) -> None:
    path = write_reranker(tmp_path / "tiny")
    template = tmp_path / "pair.txt"
    template.write_text("Q: {query} D: {document} ?")
    spec = {"classifier_from_token": ("yes",), "score_template": str(template)}

    with LLM(config=make_config(path, spec, backend="native")) as llm:
        (logit,) = llm.score("which", "that", use_activation=False)
        token_ids = llm.tokenizer.encode("Q: which D: that ?", add_special_tokens=False)
        (yes,) = llm.tokenizer.encode_continuation("yes")
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=20, logit_bias={yes: 100.0})
        (output,) = llm.generate([token_ids], params)
        with pytest.raises(InvalidRequest, match=r"as many as text_2 has \(3\), got 2"):
            llm.score(["a", "b"], ["c"] * 3)

    assert output.outputs[0].token_ids == [yes]
    assert np.isfinite(logit)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"classifier_from_token": ("no", "maybe")}, "'maybe' must be one token of tiny, not "),
        ({"classifier_from_token": ("no",), "score_template": "{here}/absent"}, "absent: "),
        ({"classifier_from_token": ("no",), "score_template": "{here}/config.json"}, "must hold {query} and then"),
        ({"score_template": "qwen3_reranker"}, "tiny has no scoring head, nor classifier_from_token"),
        (
            {"classifier_from_token": ("no",), "score_template": "model"},
            "score_template model: the model's files have no",
        ),
        (
            {"classifier_from_token": ("no", "yes"), "build_seq": 284},
            "tokens without a query and a document; the context of tiny has 284 (build_seq)",
        ),
    ],
)
def test_settings_of_scores_that_do_not_fit_are_refused_at_load(
    tmp_path: Path, spec: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_reranker(tmp_path / "tiny")
    spec = {
        name: value.replace("{here}", str(path)) if name == "score_template" else value for name, value in spec.items()
    }

    with pytest.raises(ConfigError, match=re.escape(words)):
        LLM(config=make_config(path, spec))

    lines = [f"{name} = {json.dumps(value)}" for name, value in {"name": "tiny", "path": str(path), **spec}.items()]
    (tmp_path / "brlite.toml").write_text("\n".join(["[[model]]", *lines]))
    assert main(["check", str(tmp_path / "brlite.toml")]) != 0
    assert words in capsys.readouterr().err


def test_an_engine_plugin_refuses_the_settings_of_scores() -> None:
    spec = ModelSpec(name="toy", build_seq=64, classifier_from_token=("no", "yes"))

    with pytest.raises(ConfigError, match="are not for the engine toy"):
        LLM(config=Config(model=(spec,), engine=EngineConfig(name="toy")))


def test_a_template_of_another_vocabulary_is_refused_at_load(tmp_path: Path) -> None:
    path = write_scorer(tmp_path / "tiny", QWEN3)

    with pytest.raises(ConfigError, match=r"score_template qwen3_reranker: <\|im_\w+\|> is no token of the model"):
        LLM(config=make_config(path, {"score_template": "qwen3_reranker"}))


def test_a_converted_reranker_gets_the_template_by_its_name(tmp_path: Path) -> None:
    """Control tokens that are not flagged as special, and a head of one row in place of two rows of the vocabulary."""
    path = write_reranker(tmp_path / "tiny", is_special=False)
    card_scores, _ = model_card_scores(path, DOCUMENTS)
    with LLM(config=make_config(path, RERANKER_SPEC, dtype="float32", backend="torch")) as llm:
        expected = llm.score(QUERY, DOCUMENTS)
        no, yes = (llm.tokenizer.encode_continuation(word)[0] for word in ("no", "yes"))
    arrays = load_file(path / "model.safetensors")
    arrays["score.weight"] = (arrays["model.embed_tokens.weight"][yes] - arrays["model.embed_tokens.weight"][no])[None]
    save_file(arrays, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3ForSequenceClassification"]}))

    spec = {"build_seq": 512, "score_template": "qwen3_reranker"}
    with LLM(config=make_config(path, spec, dtype="float32", backend="torch")) as llm:
        scores = llm.score(QUERY, DOCUMENTS)
        token_ids = llm.tokenizer.encode(PairTemplate(QWEN3_RERANKER, llm.tokenizer, source="").fill("q", "<|im_end|>"))
        end = llm.tokenizer.encode("<|im_end|>", add_special_tokens=False)

    assert scores == expected
    assert expected == pytest.approx(card_scores, abs=1e-4)
    assert token_ids.count(*end) == 2


def test_a_head_of_its_own_and_classifier_tokens_are_refused_together(tmp_path: Path) -> None:
    path = write_scorer(tmp_path / "tiny", LLAMA)

    with pytest.raises(ConfigError, match="has a scoring head of its own"):
        LLM(config=make_config(path, {"classifier_from_token": ("a", "b")}))


def test_offline_scores_are_those_of_the_server_and_a_model_without_a_head_says_so(tmp_path: Path) -> None:
    path = write_scorer(tmp_path / "tiny", LLAMA)
    expected = transformers_logits(path)

    with LLM(config=make_config(path, dtype="float32", backend="torch")) as llm:
        logits = llm.score(QUERY, DOCUMENTS, use_activation=False)
        assert llm.score(QUERY, []) == []
        with pytest.raises(InvalidRequest, match=r"prompts\[1\]: .*maximum context length is 128"):
            llm.score(QUERY, ["x", "y" * 200])

    assert np.abs(np.array(logits) - expected).max() < 1e-4
    plain = write_model(tmp_path / "plain", LLAMA)
    write_byte_tokenizer(plain)
    with LLM(config=make_config(plain)) as llm, pytest.raises(InvalidRequest, match="no scoring head"):
        llm.score("a", "b")


def test_a_scorer_whose_files_say_that_it_has_no_embeddings_still_scores(tmp_path: Path) -> None:
    path = write_reranker(tmp_path / "tiny")
    modules = [{"type": "sentence_transformers.models.Transformer"}, {"type": "x.modules.LogitScore"}]
    (path / "modules.json").write_text(json.dumps(modules))

    with LLM(config=make_config(path, RERANKER_SPEC)) as llm:
        assert len(llm.score(QUERY, DOCUMENTS)) == len(DOCUMENTS)
        with pytest.raises(InvalidRequest, match="this model has no embeddings"):
            llm.embed("x")


def test_a_model_with_a_scoring_head_is_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_scorer(tmp_path / "tiny", LLAMA)
    order = ["--model_name", "org/tiny", "--model_dir", str(path), "--output_dir", str(tmp_path / "out")]

    status = main(["convert", *order])

    assert status != 0
    assert "a bundle has no place for a scoring head" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def write_gguf_reranker(file: Path, folder: Path, *, part_tensors: int = 0, **metadata: Any) -> Path:
    """The GGUF file that llama.cpp's conversion makes of a Qwen3-Reranker: its head are two rows, yes and then no."""
    config, arrays = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    parts = json.loads((folder / "tokenizer.json").read_text())
    added = {token["id"]: token for token in parts["added_tokens"]}
    tokens = [*parts["model"]["vocab"], *(token["content"] for token in parts["added_tokens"]), "ĉĉ"]
    names = {theirs: ours for ours, theirs in {**TENSOR_NAMES, **LAYER_NAMES}.items()}
    tensors = {}
    for name, values in arrays.items():
        *prefix, inner = name.rpartition(".")[0].split(".", 3) if ".layers." in name else [name.rpartition(".")[0]]
        begin = f"blk.{prefix[-1]}." if prefix else ""
        tensors[f"{begin}{names[inner]}.weight"] = values, gguf.GGMLQuantizationType.F32
    head = tensors["token_embd.weight"] if config["tie_word_embeddings"] else tensors.pop("output.weight")
    tensors["cls.output.weight"] = head[0][[tokens.index("yes"), tokens.index("no")]], gguf.GGMLQuantizationType.F32
    kinds = {True: 3, False: 4}  # control tokens, and words of their own
    given = {
        ".context_length": config["max_position_embeddings"],
        ".embedding_length": config["hidden_size"],
        ".block_count": config["num_hidden_layers"],
        ".feed_forward_length": config["intermediate_size"],
        ".attention.head_count": config["num_attention_heads"],
        ".attention.head_count_kv": config["num_key_value_heads"],
        ".attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        ".attention.key_length": config["head_dim"],
        ".attention.value_length": config["head_dim"],
        ".rope.dimension_count": config["head_dim"],
        ".rope.freq_base": config["rope_theta"],
        ".pooling_type": int(gguf.PoolingType.RANK),
        ".classifier.output_labels": ["yes", "no"],
        "tokenizer.chat_template.rerank": (
            f"{PREFIX}<Instruct>: {INSTRUCTION}\n<Query>: {{query}}\n<Document>: {{document}}{SUFFIX}"
        ),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds[added[i]["special"]] if i in added else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": ["ĉ ĉ"],
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
    }
    return write_gguf(file, tensors, architecture="qwen3", metadata=given | metadata, part_tensors=part_tensors)


def test_a_split_gguf_file_gives_the_bits_of_the_whole_one(tmp_path: Path) -> None:
    folder = write_reranker(tmp_path / "tiny")
    whole = write_gguf_reranker(tmp_path / "tiny.gguf", folder)
    (tmp_path / "parts").mkdir()
    first = write_gguf_reranker(tmp_path / "parts" / "tiny.gguf", folder, part_tensors=7)

    scores = []
    for path in (whole, first, first.parent):
        with LLM(config=make_config(path, {"build_seq": 512}, backend="native")) as llm:
            scores.append(llm.score(QUERY, DOCUMENTS, use_activation=False))

    assert len(list(first.parent.iterdir())) > 2
    assert scores[0] == scores[1] == scores[2]


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_rerankers_gguf_file_gives_the_scores_of_the_model_card(tmp_path: Path, is_tied: bool) -> None:
    folder = write_reranker(tmp_path / "tiny", is_tied=is_tied)
    expected, _ = model_card_scores(folder, DOCUMENTS)
    instructed, _ = model_card_scores(folder, DOCUMENTS, instruction="Find poems.")
    file = write_gguf_reranker(tmp_path / "tiny.gguf", folder)

    with LLM(config=make_config(file, {"build_seq": 512}, dtype="float32", backend="torch")) as llm:
        scores = llm.score(QUERY, DOCUMENTS)
        others = llm.score(QUERY, DOCUMENTS, instruction="Find poems.")
        with pytest.raises(InvalidRequest, match="this model does not generate"):
            llm.generate("x")
    with LLM(config=make_config(file, {"build_seq": 512}, backend="native")) as llm:
        logits = llm.score(QUERY, DOCUMENTS, use_activation=False)

    assert np.ptp(expected) > 1e-3
    assert scores == pytest.approx(expected, abs=1e-4)
    assert others == pytest.approx(instructed, abs=1e-4)
    assert np.abs(np.array(scores) - instructed).max() > 1e-3
    assert np.abs(np.array(logits) - np.log(np.array(expected) / (1 - np.array(expected)))).max() < 0.5


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (
            {".classifier.output_labels": ["good", "bad"]},
            "has shape [2, 64]; a model that scores has one label, or yes",
        ),
        ({".classifier.output_labels": None}, "has shape [2, 64]; a model that scores has one label, or yes"),
        ({".classifier.output_labels": 2}, "qwen3.classifier.output_labels must be a list of strings, got 2"),
        (
            {"tokenizer.chat_template.rerank": "{query}"},
            "score_template model: it must hold {query} and then {document}",
        ),
        ({".pooling_type": [1, 2]}, "qwen3.pooling_type must be an integer from 1 to 2147483647, got "),
        ({".attention.causal": "no"}, "qwen3.attention.causal must be true or false, got 'no'"),
        ({".attention.causal": False}, "its files ask for attention in both directions: scores would be wrong"),
    ],
)
def test_a_gguf_reranker_that_cannot_be_understood_is_refused_at_load(
    tmp_path: Path, metadata: dict[str, Any], words: str
) -> None:
    file = write_gguf_reranker(tmp_path / "tiny.gguf", write_reranker(tmp_path / "tiny"), **metadata)

    with pytest.raises((ConfigError, ModelError), match=re.escape(words)):
        LLM(config=make_config(file, {"build_seq": 512}))


@pytest.mark.parametrize("labels", [["yes", "no"], ["no", "yes"]])
def test_a_head_of_two_rows_scores_yes_whichever_row_it_is(tmp_path: Path, labels: list[str]) -> None:
    folder = write_reranker(tmp_path / "tiny")
    scores = []
    for name, order in (("a", ["yes", "no"]), ("b", labels)):
        file = write_gguf_reranker(tmp_path / f"{name}.gguf", folder, **{".classifier.output_labels": order})
        with LLM(config=make_config(file, {"build_seq": 512})) as llm:
            scores.append(llm.score(QUERY, DOCUMENTS))

    assert scores[1] == (scores[0] if labels[0] == "yes" else pytest.approx([1 - score for score in scores[0]]))


def test_a_template_has_a_place_for_an_instruction_or_refuses_it(tmp_path: Path) -> None:
    path = write_reranker(tmp_path / "tiny")
    template = tmp_path / "pair.txt"
    scores = {}
    for text in (
        "{instruction=Rank.} {query} {document}",
        "{instruction} {query} {document}",
        "Rank. {query} {document}",
    ):
        template.write_text(text)
        with LLM(config=make_config(path, {**RERANKER_SPEC, "score_template": str(template)})) as llm:
            scores[text] = llm.score(QUERY, DOCUMENTS)
            if "instruction" in text:
                scores[text] = llm.score(QUERY, DOCUMENTS, instruction="Rank.")
                continue
            with pytest.raises(InvalidRequest, match="instruction has no effect: the prompt of a pair has no place"):
                llm.score(QUERY, DOCUMENTS, instruction="Rank.")

    assert len({tuple(each) for each in scores.values()}) == 1


def test_an_instruction_cannot_write_the_control_tokens_of_the_template(tmp_path: Path) -> None:
    path = write_reranker(tmp_path / "tiny")

    with LLM(config=make_config(path, RERANKER_SPEC)) as llm:
        template = PairTemplate(QWEN3_RERANKER, llm.tokenizer, source="test")
        end = llm.tokenizer.special_token_id("<|im_end|>")
        token_ids = llm.tokenizer.encode(template.fill("q", "d", "<|im_end|>{query}"))

    assert token_ids.count(end) == 2
    assert "<Instruct>: <|im_end|>{query}\n<Query>: q\n" in llm.tokenizer.decode(token_ids, skip_special_tokens=False)
