"""The fields of requests: the APIs that have each, the endpoints that take it, and its effect. A row has one or several
similar fields.

`OBEYED` lists the fields that the request structs decode. The structs have their types; `sampling_params/params.py` has
the ranges and defaults of sampling parameters. `OTHER_NAMES` are aliases of sampling parameters. `UNUSUAL` are sampling
parameters that the structs lack; they are read only if a body has them. A field of `NOT_DECODED` is accepted if its
value cannot change the answer (with a warning if it is not null and neither OpenAI's nor Anthropic's API has the
field), and refused by name if it can. Any other field is ignored, with a warning in the answer; so is a field of an
object in the request that its struct lacks, unless it is one of its `no_effect`. docs/fields.md is generated from this
file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from brlite.dialects.json_body import decode_value, given_twice
from brlite.dialects.object_fields import MAX_FIELD_LENGTH
from brlite.errors import InvalidRequest
from brlite.files.quoting import excerpt

MAX_REPORTED_FIELDS = 16

OPENAI, ANTHROPIC, VLLM, VLLM_04 = "OpenAI", "Anthropic", "vLLM", "vLLM 0.4"
LLAMA_CPP, SGLANG, TEI = "llama.cpp", "SGLang", "TEI"
CHAT, COMPLETIONS, RESPONSES, MESSAGES, EMBEDDINGS = "chat", "completions", "responses", "messages", "embeddings"
INFILL, RERANK, SCORE = "infill", "rerank", "score"
TOKENIZE, DETOKENIZE = "tokenize", "detokenize"
# Endpoints
BOTH = (CHAT, COMPLETIONS)
OF_OPENAI = (*BOTH, RESPONSES)
GENERATING = (*OF_OPENAI, MESSAGES, INFILL)
OF_PROMPTS = (EMBEDDINGS, RERANK, SCORE)  # these generate no text
COMPUTING = (*GENERATING, *OF_PROMPTS)
# APIs
OPENAI_STYLE = (OPENAI, VLLM, LLAMA_CPP, SGLANG)
OPENAI_STYLE_04 = (OPENAI, VLLM_04, VLLM, LLAMA_CPP, SGLANG)
EVERY_API = (OPENAI, ANTHROPIC, VLLM_04, VLLM, LLAMA_CPP, SGLANG)
VLLM_AND_SGLANG = (VLLM_04, VLLM, SGLANG)


class ObeyedField(NamedTuple):
    """Names of fields that `endpoints` decode and apply. `note` describes exceptions."""

    names: str
    endpoints: tuple[str, ...]
    known_to: tuple[str, ...]
    note: str = ""


OBEYED = (
    ObeyedField("model", (*COMPUTING, TOKENIZE, DETOKENIZE), EVERY_API, "may be left out where one model is served"),
    ObeyedField("messages", (CHAT, MESSAGES, TOKENIZE), EVERY_API, "text only"),
    ObeyedField(
        "prompt",
        (COMPLETIONS, INFILL, TOKENIZE),
        OPENAI_STYLE_04,
        "tokenize: one text; infill: the start of the answer",
    ),
    ObeyedField("input_prefix input_suffix", (INFILL,), (LLAMA_CPP,), "what stands before the gap and after it"),
    ObeyedField("input_extra", (INFILL,), (LLAMA_CPP,), "other files: `text`, `filename`"),
    ObeyedField("return_tokens", (INFILL,), (LLAMA_CPP,), "streams have them always"),
    ObeyedField("samplers", (INFILL,), (LLAMA_CPP,), "in this server's order; those not listed are off"),
    ObeyedField("n_indent", (INFILL,), (LLAMA_CPP,), "the answer ends before a line with less indentation"),
    ObeyedField("t_max_predict_ms", (INFILL,), (LLAMA_CPP,), "after this time the answer ends with its line"),
    ObeyedField("response_fields", (INFILL,), (LLAMA_CPP,), "the only fields that the answer has"),
    ObeyedField("tokens", (DETOKENIZE,), (VLLM, LLAMA_CPP)),
    ObeyedField("input", (RESPONSES, EMBEDDINGS), OPENAI_STYLE, "text only; embeddings: as `prompt`"),
    ObeyedField("instructions", (RESPONSES,), OPENAI_STYLE, "text only"),
    ObeyedField("encoding_format", (EMBEDDINGS,), OPENAI_STYLE, "base64: of float32, little-endian"),
    ObeyedField("dimensions", (EMBEDDINGS,), (OPENAI, VLLM, SGLANG), "where the model is made for it"),
    ObeyedField("normalize", (EMBEDDINGS,), (VLLM,), "true is the default"),
    ObeyedField("pooling", (EMBEDDINGS,), (), "the default is the model's"),
    ObeyedField("query", (RERANK,), (VLLM, SGLANG), 'text, or `{"text": …}`'),
    ObeyedField("top_n return_documents", (RERANK,), (VLLM, LLAMA_CPP, SGLANG), "by default all, with their texts"),
    ObeyedField("texts return_text", (RERANK,), (TEI, LLAMA_CPP), "in place of `documents`; the answer is a bare list"),
    ObeyedField("raw_scores", (RERANK,), (TEI,), "with `texts`; true: no sigmoid"),
    ObeyedField(
        "truncate truncation_direction", (RERANK,), (TEI,), "with `texts`; false: a text that is too long is a 400"
    ),
    ObeyedField("text_1 text_2", (SCORE,), (VLLM,), "one text beside one or several, or pairs"),
    ObeyedField("queries data_1", (SCORE,), (VLLM,), "other names of `text_1`"),
    ObeyedField("items data_2", (SCORE,), (VLLM,), "other names of `text_2`, as `documents` is"),
    ObeyedField("instruction", (RERANK, SCORE), (VLLM,), "where the model's template of a pair has a place for it"),
    ObeyedField("instruct", (RERANK, SCORE), (SGLANG,), "its name of `instruction`"),
    ObeyedField("use_activation", (RERANK, SCORE), (VLLM,), "sigmoid or not; the default is the model's"),
    ObeyedField("previous_response_id", (RESPONSES,), (OPENAI, VLLM, SGLANG), "where responses are stored"),
    ObeyedField("max_output_tokens", (RESPONSES,), OPENAI_STYLE, "its name of `max_tokens`"),
    ObeyedField("text", (RESPONSES,), OPENAI_STYLE, "`format` as docs/structured-output.md says"),
    ObeyedField("reasoning", (RESPONSES,), OPENAI_STYLE, "`effort`; there are no summaries"),
    ObeyedField("include", (RESPONSES,), (OPENAI, VLLM, SGLANG), "hosted tools' results are never there"),
    ObeyedField("truncation", (RESPONSES,), (OPENAI, VLLM, SGLANG), '"auto" cuts the beginning of the prompt'),
    ObeyedField("store", (RESPONSES,), (OPENAI, VLLM, SGLANG), "true is the default"),
    ObeyedField("background", (RESPONSES,), (OPENAI, VLLM, SGLANG), "needs `store`"),
    ObeyedField(
        "metadata user safety_identifier prompt_cache_key", (RESPONSES,), (OPENAI,), "only returned in the response"
    ),
    ObeyedField("system", (MESSAGES,), (ANTHROPIC,), "text or text blocks"),
    ObeyedField("stop_sequences", (MESSAGES,), (ANTHROPIC,), "its name of `stop`"),
    ObeyedField("thinking", (MESSAGES,), (ANTHROPIC,), "off if absent; `budget_tokens` is not obeyed"),
    ObeyedField("output_config", (MESSAGES,), (ANTHROPIC,), "`effort` where the chat template takes it, `format`"),
    ObeyedField("output_format", (MESSAGES,), (ANTHROPIC,), "`output_config.format`"),
    ObeyedField("thread", (MESSAGES,), (ANTHROPIC,), "refused; clients then send the whole conversation"),
    ObeyedField("context_management", (MESSAGES,), (ANTHROPIC,), "accepted, not applied, with a warning"),
    ObeyedField("stream", GENERATING, EVERY_API),
    ObeyedField("stream_options", OF_OPENAI, OPENAI_STYLE, "`include_obfuscation` is refused"),
    ObeyedField("n", BOTH, OPENAI_STYLE_04),
    ObeyedField(
        "max_tokens",
        (*BOTH, MESSAGES, INFILL),
        EVERY_API,
        "messages: required; infill, and completions with `echo`: 0, too",
    ),
    ObeyedField("temperature top_p", GENERATING, EVERY_API),
    ObeyedField("presence_penalty frequency_penalty seed", GENERATING, OPENAI_STYLE_04),
    ObeyedField("stop", (*OF_OPENAI, INFILL), OPENAI_STYLE_04),
    ObeyedField("logit_bias", BOTH, OPENAI_STYLE),
    ObeyedField("best_of", BOTH, (OPENAI, VLLM_04), "not in streams, but of a beam search"),
    ObeyedField("use_beam_search", BOTH, (VLLM_04, VLLM), "streams have the answers at their end"),
    ObeyedField("max_completion_tokens", (CHAT,), OPENAI_STYLE, "another name of `max_tokens`"),
    ObeyedField("logprobs", BOTH, OPENAI_STYLE_04, "chats: true or false; completions: a number"),
    ObeyedField("top_logprobs", (CHAT, RESPONSES), OPENAI_STYLE, "chats: needs `logprobs`"),
    ObeyedField("echo", BOTH, (OPENAI, VLLM_04, VLLM, SGLANG), "chats: the last message, if it is the assistant's"),
    ObeyedField("suffix", (COMPLETIONS,), (OPENAI, VLLM_04, VLLM), "where the vocabulary has tokens for infills"),
    ObeyedField("top_k", GENERATING, (ANTHROPIC, VLLM_04, VLLM, LLAMA_CPP, SGLANG)),
    ObeyedField("min_p", GENERATING, (VLLM_04, VLLM, LLAMA_CPP, SGLANG)),
    ObeyedField("top_n_sigma", BOTH, (LLAMA_CPP,)),
    ObeyedField("allowed_token_ids bad_words", BOTH, (VLLM,)),
    ObeyedField("repetition_penalty", GENERATING, VLLM_AND_SGLANG),
    ObeyedField("min_tokens", BOTH, (VLLM_04, VLLM)),
    ObeyedField("ignore_eos", GENERATING, (VLLM_04, VLLM, LLAMA_CPP, SGLANG)),
    ObeyedField("stop_token_ids skip_special_tokens", BOTH, VLLM_AND_SGLANG),
    ObeyedField("stop_tokens_ids", BOTH, (), "br-vllm-serving's spelling of `stop_token_ids`"),
    ObeyedField("include_stop_str_in_output", BOTH, (VLLM_04, VLLM)),
    ObeyedField("truncate_prompt_tokens truncation_side", (*BOTH, *OF_PROMPTS), (VLLM,)),
    ObeyedField("return_tokens_as_token_ids", BOTH, (VLLM,)),
    ObeyedField(
        "priority",
        COMPUTING,
        (VLLM,),
        "lower numbers go first, none below the [key's](keys.md); SGLang's order is the reverse",
    ),
    ObeyedField("timeout", COMPUTING, (), "seconds, LiteLLM's; the request ends with a 408 after them"),
    ObeyedField("cache_salt", COMPUTING, (VLLM, SGLANG)),
    ObeyedField("prompt_logprobs", BOTH, (VLLM,), "not in streams"),
    ObeyedField("return_token_ids", BOTH, (VLLM,), "of the prompt and of the answer"),
    ObeyedField("strict", COMPUTING, (), "each warning of the answer is a 400"),
    ObeyedField("add_generation_prompt continue_final_message", (CHAT, TOKENIZE), (VLLM_04, VLLM)),
    ObeyedField("tools", (CHAT, RESPONSES, MESSAGES, TOKENIZE), EVERY_API, "functions only (docs/tools.md)"),
    ObeyedField("tool_choice", (CHAT, RESPONSES, MESSAGES), EVERY_API, "messages: an object"),
    ObeyedField("parallel_tool_calls", (CHAT, RESPONSES), OPENAI_STYLE),
    ObeyedField("functions function_call", (CHAT,), (OPENAI,), "the form before `tools`"),
    ObeyedField(
        "chat_template_kwargs",
        (CHAT, MESSAGES, RERANK, SCORE, TOKENIZE),
        (VLLM, LLAMA_CPP, SGLANG),
        "rerank, score: `instruction`",
    ),
    ObeyedField("documents", (CHAT, RERANK, SCORE), (VLLM,), "chats: where the chat template takes them"),
    ObeyedField("reasoning_effort", (CHAT,), (OPENAI, VLLM, SGLANG), "where the chat template takes it"),
    ObeyedField("include_reasoning", (CHAT,), (VLLM,)),
    ObeyedField("separate_reasoning", (CHAT,), (SGLANG,)),
    ObeyedField("add_special_tokens", (*BOTH, EMBEDDINGS, TOKENIZE), (VLLM,), "chats: false is the default"),
    ObeyedField("response_format", (*BOTH, INFILL), OPENAI_STYLE_04, "docs/structured-output.md, as all below"),
    ObeyedField("guided_json guided_regex guided_choice guided_grammar", (*BOTH, INFILL), (VLLM_04, VLLM)),
    ObeyedField("guided_whitespace_pattern structured_outputs", (*BOTH, INFILL), (VLLM,)),
    ObeyedField("json_schema", (*BOTH, INFILL), (LLAMA_CPP, SGLANG)),
    ObeyedField("grammar", (*BOTH, INFILL), (LLAMA_CPP,)),
    ObeyedField("regex ebnf", (*BOTH, INFILL), (SGLANG,)),
    ObeyedField("return_token_strs", (TOKENIZE,), (VLLM,)),
    ObeyedField("content add_special with_pieces", (TOKENIZE,), (LLAMA_CPP,), "`content` in place of `prompt`"),
)


# Sampling parameters that few requests have. The structs lack them: `read_undecoded` passes them to `SamplingParams`.
UNUSUAL = (
    ObeyedField("length_penalty early_stopping", BOTH, (VLLM_04, VLLM), "of a beam search"),
    ObeyedField("repeat_last_n typical_p", GENERATING, (LLAMA_CPP,)),
    ObeyedField(
        "xtc_probability xtc_threshold", GENERATING, (LLAMA_CPP,), "the last truncation; before the temperature there"
    ),
    ObeyedField("dynatemp_range dynatemp_exponent", GENERATING, (LLAMA_CPP,), "by the entropy of what `top_k` keeps"),
    ObeyedField("dry_multiplier dry_base dry_allowed_length", GENERATING, (LLAMA_CPP,)),
    ObeyedField(
        "dry_penalty_last_n dry_sequence_breakers", GENERATING, (LLAMA_CPP,), "breakers are found within single tokens"
    ),
    ObeyedField("top_n_sigma", (RESPONSES, MESSAGES, INFILL), (LLAMA_CPP,)),
    ObeyedField("logit_bias", (RESPONSES, MESSAGES, INFILL), OPENAI_STYLE),
    ObeyedField("allowed_token_ids bad_words", (RESPONSES, MESSAGES, INFILL), (VLLM,)),
    ObeyedField(
        "logits_processors", GENERATING, (VLLM,), "names that the config allows ([more](sampling.md#logits-processors))"
    ),
    ObeyedField("min_tokens include_stop_str_in_output", (RESPONSES, MESSAGES, INFILL), (VLLM_04, VLLM)),
    ObeyedField("stop_token_ids stop_tokens_ids skip_special_tokens", (RESPONSES, MESSAGES, INFILL), VLLM_AND_SGLANG),
)
# Parameters that Responses and Messages lack or name differently. Aliases of these are not read there.
OWN_PARAMETERS = frozenset(("n", "max_tokens", "stop", "logprobs"))


class OtherName(NamedTuple):
    """Another API's name of a sampling parameter. `note` describes a difference in meaning."""

    name: str
    parameter: str
    known_to: tuple[str, ...]
    note: str = ""


OTHER_NAMES = (
    OtherName("n_cmpl", "n", (LLAMA_CPP,)),
    OtherName("n_predict", "max_tokens", (LLAMA_CPP,)),
    OtherName("n_probs", "logprobs", (LLAMA_CPP,), "0: none; chats: `top_logprobs` with `logprobs`"),
    OtherName("repeat_penalty", "repetition_penalty", (LLAMA_CPP,), "of the whole text without `repeat_last_n`"),
    OtherName("stop_words", "stop", (LLAMA_CPP,)),
    OtherName("max_new_tokens", "max_tokens", (SGLANG,)),
    OtherName("min_new_tokens", "min_tokens", (SGLANG,)),
    OtherName("no_stop_trim", "include_stop_str_in_output", (SGLANG,)),
)


class Field(NamedTuple):
    """Names of fields that are not decoded.

    `neutral` are the values, besides null, that cannot change the answer; None: no value can. `instead` are the fields
    and endpoints to use; an error names those fields that the request's endpoint has. `switch` is a field that switches
    these off: if the request gives it a neutral value, any value is accepted.
    """

    names: str
    known_to: tuple[str, ...]
    neutral: tuple[object, ...] | None = ()
    instead: str = ""
    switch: str = ""


NOT_DECODED = (
    # No value of these changes the generated text.
    Field("service_tier max_tool_calls client_metadata background_options", (OPENAI,), None),
    Field("cache_control betas anthropic_version anthropic_beta inference_geo speed diagnostics", (ANTHROPIC,), None),
    Field("user_profile_id workspace_id", (ANTHROPIC,), None),
    Field("prompt_cache_options prompt_cache_retention", (OPENAI,), None),
    Field("request_id rid session_id conversation_id", (VLLM, SGLANG), None),
    Field("guided_decoding_backend", (VLLM,), None),  # selects an implementation, not a result
    Field("spaces_between_special_tokens", (VLLM_04, VLLM), (True, False)),  # in vLLM only slow tokenizers add them
    Field("stream_reasoning", (SGLANG,), None),  # changes where reasoning is reported, not its text
    Field("mm_processor_kwargs", (VLLM,), None),  # needs images
    Field("cache_prompt id_slot n_cache_reuse slot_id", (LLAMA_CPP,), None),
    Field("t_max_prompt_ms", (LLAMA_CPP,), None),  # llama.cpp does not obey it either
    Field("reasoning_format reasoning_in_content parse_tool_calls", (LLAMA_CPP,), None),
    # Structured output.
    Field("structural_tag", (SGLANG,), ("", {}), "response_format"),
    Field("grammar_lazy", (LLAMA_CPP,), (False,)),
    Field("grammar_triggers", (LLAMA_CPP,), ([],)),
    Field("stop_regex", (SGLANG,), ("", []), "stop stop_sequences"),
    Field("web_search_options moderation conversation", (OPENAI,)),
    Field("mcp_servers", (ANTHROPIC,), ([],)),
    Field("container", (ANTHROPIC,)),
    # Kind and style of input and output.
    Field("modalities", (OPENAI,), (["text"],)),
    Field("audio prediction", (OPENAI,)),
    Field("verbosity", (OPENAI, VLLM, SGLANG), ("medium",)),
    Field("thinking_token_budget thinking_budget_tokens reasoning_budget", (VLLM, LLAMA_CPP), (-1,)),
    Field("reasoning_budget_message", (LLAMA_CPP,), ("",)),
    Field("chat_template", (VLLM, LLAMA_CPP), ("",)),
    Field("parse_special", (LLAMA_CPP,), (True,)),
    Field("image_data", (LLAMA_CPP,), ([],)),
    Field("prompt_embeds", (VLLM,)),
    # Embeddings.
    Field("task", (VLLM,), ("embed",)),
    Field("embed_dtype", (VLLM,), ("float32",)),
    Field("endianness", (VLLM,), ("native", "little")),
    Field("activation softmax", (VLLM,), (True,), "normalize use_activation"),
    Field("embd_normalize", (LLAMA_CPP,), (2,), "normalize"),
    Field("image", (SGLANG,)),
    # Sampling.
    Field("beam_width", (SGLANG,), (1,), "use_beam_search"),
    Field("logit_processors custom_logit_processor", (SGLANG,), ("", []), "logits_processors"),
    Field("custom_params vllm_xargs", (SGLANG, VLLM), ({},)),
    Field("repetition_detection watermark", (VLLM, SGLANG), (False,)),
    Field("mirostat", (LLAMA_CPP,), (0,)),
    Field("mirostat_tau mirostat_eta", (LLAMA_CPP,), switch="mirostat"),
    Field("adaptive_target", (LLAMA_CPP,), (-1, 0)),
    Field("adaptive_decay", (LLAMA_CPP,), switch="adaptive_target"),
    Field("min_keep", (LLAMA_CPP,), (0,)),
    Field("penalize_nl", (LLAMA_CPP,), (False,)),
    Field("sampler_seq backend_sampling", (LLAMA_CPP,), (False,)),
    Field("n_keep n_discard", (LLAMA_CPP,), (0, -1)),
    # Another model, or another place to compute.
    Field("lora lora_path lora_adapter", (LLAMA_CPP, SGLANG), ([], "")),
    Field("session_params kv_transfer_params", (SGLANG, VLLM), ({},)),
    Field("bootstrap_host bootstrap_port bootstrap_room", (SGLANG,)),
    Field("data_parallel_rank routed_dp_rank", (SGLANG,)),
    Field("extra_key", (SGLANG,), ("",), "cache_salt"),
    # Additional contents of the answer.
    Field("logprob_token_ids", (VLLM,), ([],)),
    Field("return_prompt_text", (VLLM,), (False,)),
    Field("return_hidden_states return_routed_experts return_cached_tokens_details", (SGLANG,), (False,)),
    Field("return_meta_info input_token_logprobs", (SGLANG,), (False,)),
    Field("post_sampling_probs", (LLAMA_CPP,), (False,)),
    Field("timings_per_token return_progress verbose", (LLAMA_CPP,), (False,)),
)
# Fields that some endpoints decode. The rows apply at the other endpoints.
OF_ONE_ENDPOINT = (
    Field("samplers", (LLAMA_CPP,), (False,)),
    Field("n_indent t_max_predict_ms", (LLAMA_CPP,), (0, -1)),
    Field("response_fields", (LLAMA_CPP,), ([],)),
    Field("context_management", (OPENAI,), ([],)),
    Field("background", (OPENAI,), (False,), "/v1/responses"),
    Field("user store metadata safety_identifier prompt_cache_key", (OPENAI,), None),
    Field("add_special_tokens", (VLLM,), (False,)),
    Field("encoding_format dimensions normalize pooling", (OPENAI, VLLM), None),  # of embeddings
    Field("use_activation", (VLLM,), (True,), "normalize"),  # of scores
    Field("continue_final_message add_generation_prompt", (VLLM_04, VLLM), None),  # need messages
    Field("messages tools functions documents", (OPENAI, VLLM), ([],), "/v1/chat/completions"),
    Field("tool_choice function_call", (OPENAI,), ("none", "auto"), "/v1/chat/completions"),
    Field("parallel_tool_calls", (OPENAI,), None),  # needs a chat
    Field("reasoning_effort", (OPENAI,), ("medium",), "reasoning.effort output_config.effort /v1/chat/completions"),
    Field("chat_template_kwargs", (VLLM,), ({},), "/v1/chat/completions"),
    Field("prompt", (OPENAI,), ("", []), "input messages /v1/completions"),
    Field("input_prefix input_suffix", (LLAMA_CPP,), ("",), "/infill"),
    Field("input_extra", (LLAMA_CPP,), ([],), "/infill"),
    Field("return_tokens", (LLAMA_CPP,), (False,), "return_token_ids"),
)

_LENGTHS = "max_tokens max_completion_tokens max_output_tokens"
# The same for fields that limit or shape generated text. At endpoints that generate none, no value changes the answer.
OF_GENERATION = (
    Field("n n_cmpl best_of", (OPENAI, VLLM_04, LLAMA_CPP), (1,)),
    Field("use_beam_search", (VLLM_04, VLLM), (False,)),
    Field(_LENGTHS, (OPENAI,), (-1,), _LENGTHS),
    Field("n_predict max_new_tokens", (LLAMA_CPP, SGLANG), (-1,), _LENGTHS),
    Field("stop stop_words", OPENAI_STYLE_04, ("", [], [""]), "stop stop_sequences"),
    Field("logprobs", OPENAI_STYLE_04, (False,), "top_logprobs"),
    Field("top_logprobs n_probs", (OPENAI, LLAMA_CPP), (0,), "logprobs"),
    Field("suffix", (OPENAI, VLLM_04, VLLM), ("",), "/v1/completions"),
    Field("prompt_logprobs", (VLLM,)),
    Field("return_tokens_as_token_ids return_token_ids", (VLLM,), (False,)),
    Field("echo", (OPENAI, VLLM_04, VLLM), (False,)),
    Field("stream_options", (OPENAI,), None),  # other endpoints always report the usage
    Field("response_format", OPENAI_STYLE_04, ({"type": "text"},), "text.format output_config.format"),
    Field("guided_json guided_regex guided_choice guided_grammar", (VLLM_04, VLLM), ("", [], {}), "response_format"),
    Field("structured_outputs json_schema", (VLLM, LLAMA_CPP, SGLANG), ("", {}), "response_format"),
    Field("grammar regex ebnf", (LLAMA_CPP, SGLANG), ("",), "response_format"),
    Field("guided_whitespace_pattern truncation_side", (VLLM,), None),  # each needs a field that is refused
    Field("truncate_prompt_tokens", (VLLM,), (), "truncation"),
    Field("truncation", (OPENAI,), ("disabled",), "truncate_prompt_tokens"),
    Field("instructions previous_response_id", (OPENAI,), ("",), "messages"),
    Field("text", (OPENAI,), ({}, {"format": {"type": "text"}}), "response_format output_config.format"),
    Field("reasoning", (OPENAI,), ({},), "reasoning_effort output_config.effort"),
    Field("include", (OPENAI,), ([],)),
)

_PARAMETERS = {name: name for row in UNUSUAL for name in row.names.split()} | {
    other.name: other.parameter for other in OTHER_NAMES
}
_BY_NAME = {name: field for field in (*NOT_DECODED, *OF_ONE_ENDPOINT) for name in field.names.split()}
_OF_GENERATION = {name: field for field in OF_GENERATION for name in field.names.split()}
# Names that some endpoint obeys, or would.
_ELSEWHERE = {name for row in OBEYED for name in row.names.split()} | _PARAMETERS.keys() | _OF_GENERATION.keys()
_ANY = msgspec.json.Decoder(Any)


class Undecoded(NamedTuple):
    """The result of reading the fields that a request's struct lacks.

    `sampling` has parameters by their names in `SamplingParams`, `field_names` the client's aliases of these.
    """

    warnings: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = {}
    field_names: Mapping[str, str] = {}


NOTHING_MORE = Undecoded()


def read_undecoded(given: Mapping[str, msgspec.Raw], fields: Collection[str], own: Collection[str]) -> Undecoded:
    """Read the fields that a generation's struct lacks. Raises as `check_undecoded`, and for two names of one
    parameter. Aliases of the `own` parameters are not read."""
    names = {name: _PARAMETERS[name] for name in given if name in _PARAMETERS and _PARAMETERS[name] not in own}
    sampling: dict[str, Any] = {}
    for name, parameter in names.items():
        value = _decode(name, given[name])
        if value is None:
            continue
        if parameter in sampling:
            raise given_twice(name, parameter)
        sampling[parameter] = value
    warnings = check_undecoded({name: raw for name, raw in given.items() if name not in names}, fields)
    return Undecoded(warnings, sampling, {parameter: name for name, parameter in names.items() if name != parameter})


def check_undecoded(
    given: Mapping[str, msgspec.Raw], fields: Collection[str], *, generates: bool = True
) -> tuple[str, ...]:
    """A warning for each field that has no effect. `given` are those that the request's structs lack, by their paths.

    Raises `InvalidRequest` for a known field whose value would change the answer; it names what to use of `fields`,
    those of the struct. With `generates` the endpoint generates text.
    """
    warnings: list[str] = []
    for name, raw in given.items():
        field = _BY_NAME.get(name) or _OF_GENERATION.get(name)
        if not generates and (name in _PARAMETERS or name in _OF_GENERATION):
            field = None
        if field is None and name in _ELSEWHERE:
            if _decode(name, raw) is not None:
                warnings.append(f"the field {name!r} has no effect at this endpoint")
        elif field is None:
            warnings.append(f"the field {name[:MAX_FIELD_LENGTH]!r} is not known and was ignored")
        elif field.neutral is None or (field.switch and _is_off(field.switch, given)):
            if not {OPENAI, ANTHROPIC} & {*field.known_to} and _decode(name, raw) is not None:
                warnings.append(f"the field {name!r} has no effect on this server")
        elif not is_neutral(_decode(name, raw), field.neutral):
            known = (*fields, *_PARAMETERS) if generates else fields
            uses = [use for use in field.instead.split() if use.startswith("/") or use.partition(".")[0] in known]
            remedy = f"; use {' or '.join(uses)}" if uses else ""
            if field.switch:
                remedy = f"; it is accepted beside {field.switch}: 0, which switches it off"
            raise not_supported(name, remedy)
    return tuple(warnings[:MAX_REPORTED_FIELDS])


def _is_off(switch: str, given: Mapping[str, msgspec.Raw]) -> bool:
    """Whether the request gives the field a neutral value. An absent field does not count: other servers may default
    to on."""
    value = _decode(switch, given[switch]) if switch in given else None
    return value is not None and is_neutral(value, _BY_NAME[switch].neutral or ())


def is_neutral(value: object, neutral: Iterable[object]) -> bool:
    """Whether a value is null or one of `neutral`. `false` is not 0, but 1.0 is 1."""
    return value is None or any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral)


def not_supported(param: str, more: str = "") -> InvalidRequest:
    """The error for a field that would change the answer and is not implemented."""
    return InvalidRequest(
        f"{param} is not supported by this version of brlite{more}", param=param, code="unsupported_parameter"
    )


def not_text(param: str, kind: str) -> InvalidRequest:
    """The error for a part of this type, such as an image."""
    return not_supported(param, f": its type is {excerpt(kind)}, and this server takes text only")


def _decode(name: str, raw: msgspec.Raw) -> object:
    return decode_value(raw, _ANY, name)
