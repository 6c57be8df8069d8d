"""The request fields that brlite knows of and does not decode: who has them, and which values ask for nothing.

`protocol.py` holds the fields that are obeyed. A field of this table is taken silently where its value cannot change
the answer, and refused by name where it can. A field that neither has is ignored, with a warning in the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

import msgspec

from brlite.errors import InvalidRequest
from brlite.http.decode import decode_json

MAX_REPORTED_FIELDS = 16
MAX_FIELD_LENGTH = 64

OPENAI, VLLM, VLLM_04, LLAMA_CPP, SGLANG = "OpenAI", "vLLM", "vLLM 0.4", "llama.cpp", "SGLang"


class Field(NamedTuple):
    """A field, or several of one kind, by name.

    `neutral` are the values beside null that cannot change the answer; None: no value can. `instead` names what to use.
    """

    names: str
    known_to: tuple[str, ...]
    neutral: tuple[object, ...] | None = ()
    instead: str = ""


NOT_DECODED = (
    # No value of these changes which text is generated.
    Field("user store metadata service_tier safety_identifier", (OPENAI,), None),
    Field("prompt_cache_key prompt_cache_options prompt_cache_retention", (OPENAI,), None),
    Field("parallel_tool_calls", (OPENAI, VLLM, SGLANG), None),  # needs tools, which are refused
    Field("request_id rid session_id conversation_id priority", (VLLM, SGLANG), None),
    Field("guided_decoding_backend guided_whitespace_pattern", (VLLM,), None),  # need a guided_… field
    Field("spaces_between_special_tokens", (VLLM_04, VLLM), None),  # only slow tokenizers have them
    Field("separate_reasoning stream_reasoning", (SGLANG,), None),  # where reasoning stands, not what it is
    Field("mm_processor_kwargs", (VLLM,), None),  # needs images
    Field("cache_prompt id_slot n_cache_reuse slot_id", (LLAMA_CPP,), None),
    Field("reasoning_format reasoning_in_content parse_tool_calls", (LLAMA_CPP,), None),
    Field("mirostat_tau mirostat_eta dynatemp_exponent xtc_threshold", (LLAMA_CPP,), None),  # each needs another one
    Field("dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers", (LLAMA_CPP,), None),
    # Structured output.
    Field("response_format", (OPENAI, VLLM_04, VLLM, LLAMA_CPP, SGLANG), ({"type": "text"},)),
    Field("guided_json guided_regex guided_choice guided_grammar", (VLLM_04, VLLM)),
    Field("structured_outputs structural_tag", (VLLM,), ({},)),
    Field("json_schema grammar", (LLAMA_CPP, SGLANG), ("", {})),
    Field("grammar_lazy", (LLAMA_CPP,), (False,)),
    Field("grammar_triggers", (LLAMA_CPP,), ([],)),
    Field("regex ebnf stop_regex", (SGLANG,), ("", [])),
    # Tools.
    Field("tools functions", (OPENAI, VLLM, LLAMA_CPP, SGLANG), ([],)),
    Field("tool_choice function_call", (OPENAI, VLLM, LLAMA_CPP, SGLANG), ("none", "auto")),
    Field("web_search_options moderation", (OPENAI,)),
    # What is said, and how.
    Field("modalities", (OPENAI,), (["text"],)),
    Field("audio prediction", (OPENAI,)),
    Field("reasoning_effort verbosity", (OPENAI, VLLM, SGLANG), ("medium",)),
    Field("include_reasoning", (VLLM,), (True,)),
    Field("thinking_token_budget thinking_budget_tokens reasoning_budget", (VLLM, LLAMA_CPP), (-1,)),
    Field("reasoning_budget_message", (LLAMA_CPP,), ("",)),
    Field("chat_template", (VLLM, LLAMA_CPP), ("",)),
    Field("chat_template_kwargs", (VLLM, LLAMA_CPP, SGLANG), ({},)),
    Field("documents", (VLLM,), ([],)),
    Field("suffix", (OPENAI, VLLM_04, VLLM), ("",)),
    Field("input_prefix input_suffix", (LLAMA_CPP,), ("",)),
    Field("input_extra image_data", (LLAMA_CPP,), ([],)),
    Field("prompt_embeds", (VLLM,)),
    # Sampling.
    Field("use_beam_search early_stopping", (VLLM_04, VLLM), (False,)),
    Field("beam_width", (SGLANG,), (1,)),
    Field("length_penalty", (VLLM_04, VLLM), (1,)),
    Field("bad_words logits_processors", (VLLM,), ([],)),
    Field("allowed_token_ids", (VLLM,), instead="logit_bias"),
    Field("logit_processors custom_logit_processor", (SGLANG,), ("", [])),
    Field("custom_params vllm_xargs", (SGLANG, VLLM), ({},)),
    Field("repetition_detection watermark", (VLLM, SGLANG), (False,)),
    Field("mirostat", (LLAMA_CPP,), (0,)),
    Field("typical_p", (LLAMA_CPP,), (1,)),
    Field("top_n_sigma adaptive_target", (LLAMA_CPP,), (-1, 0)),
    Field("adaptive_decay", (LLAMA_CPP,), None),  # needs adaptive_target
    Field("dynatemp_range dry_multiplier xtc_probability min_keep", (LLAMA_CPP,), (0,)),
    Field("repeat_penalty", (LLAMA_CPP,), (1,), "repetition_penalty"),
    Field("repeat_last_n", (LLAMA_CPP,), None),  # needs repeat_penalty
    Field("penalize_nl", (LLAMA_CPP,), (False,)),
    Field("samplers sampler_seq backend_sampling", (LLAMA_CPP,), (False,)),
    Field("stop_words", (LLAMA_CPP,), ([],), "stop"),
    Field("n_predict", (LLAMA_CPP,), (-1,), "max_tokens"),
    Field("max_new_tokens", (SGLANG,), (), "max_tokens"),
    Field("min_new_tokens", (SGLANG,), (0,), "min_tokens"),
    Field("no_stop_trim", (SGLANG,), (False,), "include_stop_str_in_output"),
    Field("n_keep n_discard n_indent t_max_predict_ms", (LLAMA_CPP,), (0, -1)),
    # Another model, or another place to compute.
    Field("lora lora_path lora_adapter", (LLAMA_CPP, SGLANG), ([], "")),
    Field("session_params kv_transfer_params", (SGLANG, VLLM), ({},)),
    Field("bootstrap_host bootstrap_port bootstrap_room", (SGLANG,)),
    Field("data_parallel_rank routed_dp_rank", (SGLANG,)),
    Field("extra_key", (SGLANG,), ("",), "cache_salt"),
    # What else the answer would hold.
    Field("prompt_logprobs", (VLLM,), instead="echo and logprobs of /v1/completions"),
    Field("logprob_token_ids", (VLLM,), ([],)),
    Field("return_token_ids return_prompt_text", (VLLM,), (False,)),
    Field("return_hidden_states return_routed_experts return_cached_tokens_details", (SGLANG,), (False,)),
    Field("return_meta_info input_token_logprobs", (SGLANG,), (False,)),
    Field("n_probs", (LLAMA_CPP,), (0,), "logprobs"),
    Field("post_sampling_probs", (LLAMA_CPP,), (False,)),
    Field("timings_per_token return_progress return_tokens verbose", (LLAMA_CPP,), (False,)),
    Field("response_fields", (LLAMA_CPP,), ([],)),
)
# Of these each endpoint decodes its own; to another one they are what is said here.
OF_ONE_ENDPOINT = (
    Field("top_logprobs", (OPENAI,), (0,), "logprobs"),
    Field("max_completion_tokens", (OPENAI,), (), "max_tokens"),
    Field("echo", (OPENAI, VLLM_04, VLLM), (False,)),
    Field("add_special_tokens", (VLLM,), (False,)),
    Field("continue_final_message add_generation_prompt", (VLLM_04, VLLM), None),  # need messages
    Field("messages", (OPENAI,), ([],), "/v1/chat/completions"),
    Field("prompt", (OPENAI,), ("", []), "/v1/completions"),
)

_BY_NAME = {name: field for field in (*NOT_DECODED, *OF_ONE_ENDPOINT) for name in field.names.split()}
_TOOLS_OF = {"tool_choice": "tools", "function_call": "functions"}
_ANY = msgspec.json.Decoder(Any)


def check_undecoded(given: Mapping[str, msgspec.Raw]) -> list[str]:
    """A warning for each top-level field that nobody knows. `given` are those that the request's struct lacks.

    Raises `InvalidRequest` for a known field whose value would change the answer.
    """
    for name, raw in given.items():
        field = _BY_NAME.get(name)
        if field is None or field.neutral is None or is_neutral(_decode(raw), field.neutral):
            continue
        tools = given.get(_TOOLS_OF.get(name, ""))
        if tools is not None and _decode(tools) == []:
            continue  # a choice among no tools
        raise not_supported(name, f"; use {field.instead}" if field.instead else "")
    unknown = (name for name in given if name not in _BY_NAME)
    return [
        f"the field {name[:MAX_FIELD_LENGTH]!r} is not known and was ignored"
        for name in islice(unknown, MAX_REPORTED_FIELDS)
    ]


def is_neutral(value: object, neutral: Iterable[object]) -> bool:
    """Whether a value is null or one of `neutral`. `false` is not 0, but 1.0 is 1."""
    return value is None or any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral)


def not_supported(param: str, more: str = "") -> InvalidRequest:
    """The refusal of what would change the answer and is not built."""
    return InvalidRequest(
        f"{param} is not supported by this version of brlite{more}", param=param, code="unsupported_parameter"
    )


def _decode(raw: msgspec.Raw) -> object:
    return decode_json(bytes(raw), _ANY)
