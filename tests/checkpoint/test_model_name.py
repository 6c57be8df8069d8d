"""Names of models, and which files of a repository they mean."""

from __future__ import annotations

import pytest

from brlite.checkpoint.model_name import ModelName, choose_files, parse_model_name, quantization_of
from brlite.errors import ModelError

GGUF_FILES = ["README.md", "m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-UD-Q4_K_M.gguf", "mmproj-Q8_0.gguf", "BF16/m-BF16.gguf"]
SPLIT_FILES = ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf", "m-Q4_0.gguf"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpt2", ("huggingface", "gpt2", None, None)),
        ("org/m", ("huggingface", "org/m", None, None)),
        ("org/m:q8_0", ("huggingface", "org/m", "q8_0", None)),
        ("org/m@v1.2", ("huggingface", "org/m", None, "v1.2")),
        ("hf:org/m:Q8_0@refs/pr/1", ("huggingface", "org/m", "Q8_0", "refs/pr/1")),
        ("modelscope:org/m", ("modelscope", "org/m", None, None)),
    ],
)
def test_a_name_is_taken_apart(text: str, expected: tuple[str, ...]) -> None:
    assert parse_model_name(text) == ModelName(*expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "..",
        "../etc",
        "a/b/c",
        "/root",
        "a b",
        "a\nb",
        "a/..",
        "C:\\models",
        "-rf",
        "a/b:",
        "a/b@",
        "a/b@../c",
        "x:a/b",
    ],
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match="is not a model name such as organisation/model"):
        parse_model_name(text)


def test_the_environment_chooses_the_hub_of_plain_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRLITE_HUB", "ModelScope")

    assert parse_model_name("org/m").hub == "modelscope"
    assert parse_model_name("hf:org/m").hub == "huggingface"
    with pytest.raises(ModelError, match="name of ModelScope such as organisation/model"):
        parse_model_name("gpt2")


def test_an_unknown_hub_is_named_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRLITE_HUB", "ollama")

    with pytest.raises(ModelError, match="BRLITE_HUB is 'ollama'; allowed are huggingface and modelscope"):
        parse_model_name("org/m")


@pytest.mark.parametrize(
    ("names", "quantization", "chosen"),
    [
        (GGUF_FILES, None, "m-Q4_K_M.gguf"),
        (GGUF_FILES, "q8_0", "m-Q8_0.gguf"),
        (GGUF_FILES, "bf16", "BF16/m-BF16.gguf"),
        (GGUF_FILES, "UD-Q4_K_M", "m-UD-Q4_K_M.gguf"),
        (GGUF_FILES, "M-UD-Q4_K_M.gguf", "m-UD-Q4_K_M.gguf"),
        (["only-Q2_K.gguf"], None, "only-Q2_K.gguf"),
        (["model.safetensors", *GGUF_FILES], "Q8_0", "m-Q8_0.gguf"),
        (SPLIT_FILES, "Q4_0", "m-Q4_0.gguf"),
        (["tiny.gguf", "tiny-imatrix.gguf"], None, "tiny.gguf"),
    ],
)
def test_a_quantization_chooses_the_file(names: list[str], quantization: str | None, chosen: str) -> None:
    assert choose_files(names, quantization) == [chosen]


def test_all_parts_of_a_split_gguf_are_chosen() -> None:
    assert choose_files(SPLIT_FILES, "Q8_0") == SPLIT_FILES[:2]
    assert choose_files(["sub/m-00002-of-00002.gguf", "sub/m-00001-of-00002.gguf"]) == [
        "sub/m-00001-of-00002.gguf",
        "sub/m-00002-of-00002.gguf",
    ]


@pytest.mark.parametrize(
    ("names", "quantization", "said"),
    [
        (GGUF_FILES, "Q5_K_M", r"no \.gguf file is Q5_K_M; name one as :QUANT: BF16, Q4_K_M, Q8_0, UD-Q4_K_M"),
        (GGUF_FILES, "Q4_K", r"no \.gguf file is Q4_K; "),
        (SPLIT_FILES, None, r"of 2 \.gguf files none is Q4_K_M; name one as :QUANT: Q4_0, Q8_0"),
        (SPLIT_FILES[1:], "Q8_0", "the repository lacks 'm-Q8_0-00001-of-00002.gguf', one of 2 parts"),
        (
            ["a-Q8_0.gguf", "b-Q8_0.gguf"],
            "Q8_0",
            r"2 \.gguf files are Q8_0; name one as :FILE: a-Q8_0.gguf, b-Q8_0.gguf",
        ),
        (["model.safetensors"], "Q8_0", r"no \.gguf file for Q8_0 to choose from"),
        (["README.md"], None, r"neither model\.safetensors nor pytorch_model\.bin, and no \.gguf file"),
    ],
)
def test_a_name_that_means_no_one_file_gets_the_choices_in_a_line(
    names: list[str], quantization: str | None, said: str
) -> None:
    with pytest.raises(ModelError, match=said) as refusal:
        choose_files(names, quantization)

    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "names",
    [
        ["\x1b[2Ja-Q8_0.gguf", "b-Q8_0.gguf"],
        [f"{letter * 10**6}-Q8_0.gguf" for letter in "ab"],
    ],
)
def test_names_that_a_hub_lists_are_cut_and_escaped(names: list[str]) -> None:
    with pytest.raises(ModelError) as refusal:
        choose_files(names, "Q8_0")

    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 1200


def test_a_split_file_whose_names_would_fill_the_memory_is_refused() -> None:
    with pytest.raises(ModelError, match="has 10025 characters; allowed are 1024"):
        choose_files([f"{'a' * 10**4}-Q8_0-00001-of-99999.gguf"], "Q8_0")


def test_safetensors_come_with_config_and_tokenizer_and_without_code() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    others = ["modeling_evil.py", "pytorch_model.bin", "onnx/model.safetensors", "model.fp16.safetensors"]

    templates = ["additional_chat_templates/tool_use.jinja", "chat_template.jinja"]

    assert choose_files(["config.json", *shards, *others, *templates]) == ["config.json", *shards, *templates]


def test_bin_files_are_taken_where_there_are_no_safetensors() -> None:
    assert choose_files(["config.json", "pytorch_model.bin", "x.py"]) == ["config.json", "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("qwen2.5-0.5b-instruct-q8_0.gguf", "Q8_0"),
        ("m-IQ3_XXS.gguf", "IQ3_XXS"),
        ("m-Q8_0_model.gguf", "Q8_0"),
        ("tiny.gguf", None),
    ],
)
def test_a_file_name_tells_its_quantization(name: str, told: str | None) -> None:
    assert quantization_of(name) == told
