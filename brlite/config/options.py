"""The configuration: frozen structs with every option, its type, range, default and description.

`docs/configuration.py` prints `brlite.toml` and docs/configuration.md from them. `load.py` reads TOML, or the manual's
13-field JSON (`manual_json.py`). Limits that depend on the model are checked where the model is opened, not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from brlite.models.precision import PrecisionOption

Count = Annotated[int, Meta(ge=1, le=10**9)]
CountOrZero = Annotated[int, Meta(ge=0, le=10**9)]
Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1, extra={"allowed": "a 64-bit integer"})]  # as in TOML
Port = Annotated[int, Meta(ge=0, le=65535)]
Seconds = Annotated[float, Meta(gt=0, le=10**6)]
SecondsOrZero = Annotated[float, Meta(ge=0, le=10**6)]
Text = Annotated[str, Meta(pattern=r"\S", extra={"allowed": "a non-empty string"})]
Word = Annotated[str, Meta(pattern=r"^\S+\Z", extra={"allowed": "a non-empty string without spaces"})]
HeaderName = Annotated[
    str,
    Meta(
        pattern=r"^[!#$%&'+\-.^_`|~0-9A-Za-z]+\*?\Z", extra={"allowed": "the name of a header, or its beginning and *"}
    ),
]
DeviceIndex = Annotated[int, Meta(ge=0, le=1023)]
BlockSize = Literal[8, 16, 32, 64, 128, 256]
Backend = Literal["auto", "native", "torch"]
TorchKernels = Literal["auto", "triton", "eager"]
STEP_TOKENS = 128  # default for backends without a preferred number
Choice = Literal["least_loaded", "round_robin", "prefix", "sticky"]
KeyHeader = Literal["authorization", "x-api-key", "api-key", "x-goog-api-key"]
JsonCalls = Literal["hermes", "llama3_json", "xlam", "granite", "phi4_mini", "functools", "nemotron", "tool_calls"]
NamedCalls = Literal["functionary", "functionary_32", "deepseek", "deepseek_v31", "kimi", "chatglm", "harmony"]
TaggedCalls = Literal["qwen3_coder", "seed_oss", "minimax_m2", "glm4_moe", "pythonic", "lfm2", "olmo3"]
ToolParserName = Literal[
    "auto", "none", JsonCalls, "internlm", "command", "mistral", "mistral_args", NamedCalls, TaggedCalls
]
ReasoningParserName = Literal["auto", "none", "think", "mistral", "seed", "command", "kimi", "reasoning"]
Forwarded = Literal["off", "append", "set"]


def option(text: str, example: object = None) -> Meta:
    """The description of an option for `brlite.toml` and docs/configuration.md, and an example if it has no default."""
    return Meta(description=text, examples=None if example is None else [example])


DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# From the model card; the model's files have no values. At temperature 1.0 a model of this size writes near garbage.
DEFAULT_MODEL_SAMPLING: Mapping[str, float] = MappingProxyType({"temperature": 0.2, "top_p": 0.9})
# Headers that are never forwarded: hop-by-hop ones, keys, and those that brlite sets itself. A final * is a wildcard.
_OF_ONE_HOP = "connection content-length keep-alive proxy-* te trailer transfer-encoding upgrade x-request-id"
_KEYS = "api-key authorization cookie x-api-key x-goog-api-key"
_CLIENT_ADDRESS = "forwarded x-forwarded-* x-real-ip"  # set by `proxy.forwarded`, never copied from a client
NEVER_TO_UPSTREAMS = tuple(f"{_OF_ONE_HOP} {_KEYS} {_CLIENT_ADDRESS} accept-encoding expect host via".split())
NEVER_TO_CLIENTS = tuple(f"{_OF_ONE_HOP} access-control-* server set-cookie".split())

ENGINE_VARIABLE = "BRLITE_ENGINE"


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where and how the HTTP server listens."""

    host: Annotated[Word, option('the address to listen on; "0.0.0.0" is all of them: set an API key then')] = (
        "127.0.0.1"
    )
    port: Annotated[Port, option("the port of the API and of /metrics; 0: a free one")] = 8000
    cors_origins: Annotated[
        tuple[Word, ...],
        option('origins of web pages that may use the server: ["https://app.example.com"]; ["*"] allows all'),
    ] = ()
    allowed_hosts: Annotated[
        tuple[Word, ...],
        option("names allowed in Host besides local ones; []: on loopback without keys local names only, else any"),
    ] = ()
    metrics_need_key: Annotated[
        bool, option("with keys set /metrics needs one; false shows models and usage to any client")
    ] = True
    slots: Annotated[bool, option("GET /slots shows how far each running request is, without its content")] = True
    strict: Annotated[
        bool, option("true: what an answer would warn of is refused (400), as by `strict` in a request")
    ] = False
    drain_seconds: Annotated[SecondsOrZero, option("time for running requests to finish after SIGTERM")] = 30.0
    access_log: Annotated[bool, option("one log line a request, without its content")] = True
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        option("the least important lines that are logged: debug, info, warning, error"),
    ] = "info"


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are computed.

    Prompts of different API keys are kept apart in the prefix cache unless `share_prefix_cache` is set: with a shared
    cache, usage and response times would show one key what another key sent.
    """

    name: Annotated[
        Word | None, option("an installed engine plugin, used in place of the backends (docs/engines.md)", "toy")
    ] = None
    options: Annotated[
        dict[str, str | bool | Integer | float], option("the plugin's own options: { tokens_per_second = 20 }")
    ] = {}
    backend: Annotated[Backend, option("native (CPU kernels), torch, or auto: native where it can be used")] = "auto"
    device: Annotated[
        Word,
        option(
            "cpu, cuda, supa (Biren cards), xpu, mps, or one of several such as cuda:1; auto: supa, else cuda, else cpu"
        ),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        option("numbers of torch: float32 (on CPUs in place of native kernels), bfloat16; auto: what is fast there"),
    ] = "auto"
    torch_kernels: Annotated[
        TorchKernels,
        option("on a CUDA card: triton (our kernels), eager (torch's operators), or auto: triton where it can be used"),
    ] = "auto"
    threads: Annotated[
        int,
        Meta(ge=0, le=1024),
        option("threads that compute; 0: one for each physical core, within CPU affinity and quotas"),
    ] = 0
    adaptive_threads: Annotated[
        bool, option("steps take fewer threads while other programs use the cores; the answers are the same")
    ] = True
    block_size: Annotated[BlockSize, option("tokens in a block of the KV cache: 8, 16, 32, 64, 128, 256")] = 16
    max_num_batched_tokens: Annotated[
        CountOrZero,
        option("tokens computed in one step, at least build_batch; 0: 128 on CPUs, 2048 on CUDA cards"),
    ] = 0
    max_step_seconds: Annotated[
        SecondsOrZero,
        option("while answers run, a step computes the prompt tokens that fit this time, at least 16; 0: no bound"),
    ] = 0.2
    prefix_caching: Annotated[bool, option("reuse the KV cache of equal prompt beginnings")] = True
    share_prefix_cache: Annotated[
        bool, option("true: API keys share the prefix cache; false: each key has its own part")
    ] = False
    speculation: Annotated[
        Literal["auto", "on", "off"],
        option(
            "auto: draft repeated text where the backend can verify it, not on cards; on: there too; off. "
            "The answers are the same"
        ),
    ] = "auto"
    max_draft_tokens: Annotated[
        int, Meta(ge=1, le=16), option("drafted tokens of one sequence in one step, 1 to 16")
    ] = 7
    max_draft_seqs: Annotated[int, Meta(ge=1, le=4096), option("draft only while at most so many sequences run")] = 4
    logits_processors: Annotated[
        tuple[Word, ...],
        option(
            "installed entry points of brlite.logits_processors that requests may name; no others are imported",
            ["my_processor"],
        ),
    ] = ()
    memory_gib: Annotated[
        float,
        Meta(ge=0, le=10**6),
        option("bound on the weights and KV caches of all loaded models together, in GiB; 0: no bound"),
    ] = 0.0
    max_downloads: Annotated[
        Count, option("models that are downloaded at once, with 8 connections each; others wait for their turn")
    ] = 4
    gpu_memory_utilization: Annotated[
        float,
        Meta(gt=0, le=1),
        option("share of a card's memory for weights and KV cache, including what other processes hold there"),
    ] = 0.9
    on_rank_failure: Annotated[
        Literal["restart", "exit"],
        option("when a rank process ends or a card fails: restart loads the model again, exit ends the server"),
    ] = "restart"

    def step_tokens(self, preferred: int = STEP_TOKENS) -> int:
        """The maximum number of tokens of a step: the option if set, else the backend's `preferred`."""
        return self.max_num_batched_tokens or preferred

    def drafts_text(self, *, has_draft: bool, runs_ahead: bool) -> bool:
        """Whether a backend that verifies drafts gets those of text; `runs_ahead`: it launches steps ahead."""
        return self.speculation == "on" or (self.speculation == "auto" and (has_draft or not runs_ahead))


class DraftConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A smaller model of the same vocabulary, which drafts tokens for the served one to verify."""

    path: Annotated[Text, option("a Hugging Face folder or a .gguf file")]
    precision: Annotated[PrecisionOption, option("as of a model")] = "auto"


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model to serve.

    `model_file`, `input_name` and `output_name` belong to the manual's engine. They are kept for engine plugins; only a
    `model_file` that is a traced `.pt` is read here.
    """

    name: Annotated[Text, option("the name that requests use; without `path` the model is downloaded by this name")] = (
        DEFAULT_MODEL
    )
    path: Annotated[Text | None, option("a Hugging Face folder or a .gguf file", "/models/my-model")] = None
    precision: Annotated[
        PrecisionOption,
        option(
            "auto: quantized weights stay quantized, a bundle has its own precision, others are bf16; "
            "only native kernels have a_int8_w_int8 (activations are int8, too) and a_bf16_w_int4 (weights in 4 bits)"
        ),
    ] = "auto"
    build_seq: Annotated[
        CountOrZero,
        option("longest context in tokens, prompt plus answer; 0: the model's own, as far as memory allows"),
    ] = 0
    build_batch: Annotated[int, Meta(ge=1, le=4096), option("sequences computed at once; more wait")] = 16
    num_blocks: Annotated[
        CountOrZero, option("blocks of the KV cache; 0: build_batch full contexts, or by memory if build_seq is 0")
    ] = 0
    tensor_parallel: Annotated[
        int,
        Meta(ge=1, le=1024),
        option("ranks that share the model: one process for each card, or for a part of the cores"),
    ] = 1
    devices: Annotated[
        tuple[DeviceIndex, ...], option("device numbers, one for each rank; []: from 0 to tensor_parallel - 1")
    ] = ()
    draft: Annotated[
        DraftConfig | None,
        option(
            "a smaller model of the same vocabulary that drafts tokens, also as [model.draft] (docs/speculation.md)",
            {"path": "/models/my-small-model", "precision": "auto"},
        ),
    ] = None
    chat_template: Annotated[
        Text | None, option("a file used in place of the model's own template", "/models/chat.jinja")
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, str | bool | int | float],
        option("variables of the chat template, for requests that do not set them", {"enable_thinking": False}),
    ] = {}
    force_chat_template_kwargs: Annotated[
        bool, option("true: a request that sets one of them to another value is refused")
    ] = False
    control_tokens_in_text: Annotated[
        bool,
        option("true: a control token that a message spells out becomes that token; false: it stays text"),
    ] = False
    tool_parser: Annotated[
        ToolParserName,
        option("the format of tool calls; auto: by the chat template, none: calls stay text (docs/tools.md)"),
    ] = "auto"
    reasoning_parser: Annotated[
        ReasoningParserName,
        option("the marks of reasoning; auto: by the chat template, none: reasoning stays in the text"),
    ] = "auto"
    generation_config: Annotated[
        Literal["model", "none"],
        option("model: requests without sampling values get those of generation_config.json; none: they do not"),
    ] = "model"
    pooling: Annotated[
        Literal["auto", "last", "mean", "none"],
        option("how embeddings are made; auto: by the model's sentence-transformers files, else last; none: refused"),
    ] = "auto"
    matryoshka_dimensions: Annotated[
        tuple[CountOrZero, ...],
        option("lengths that embeddings may be cut to; []: those of the model's config.json, [0]: any", [256, 512]),
    ] = ()
    classifier_from_token: Annotated[
        tuple[Text, ...],
        Meta(max_length=2, extra={"allowed": "a list of at most two tokens"}),
        option(
            "a model that generates gives scores: the probability of the second of two tokens against the first, or "
            "the sigmoid of one token's logit; []: none (docs/embeddings-and-rerank.md)",
            ["no", "yes"],
        ),
    ] = ()
    score_template: Annotated[
        Text,
        option(
            "the prompt of a scored pair: qwen3_reranker, model (of a GGUF file), none, or a file with {query} and "
            '{document}; auto: qwen3_reranker with classifier_from_token = ["no", "yes"], else model or none'
        ),
    ] = "auto"
    vocab_size: Annotated[Count | None, option("if set, it must equal the model's", 49152)] = None
    load: Annotated[
        Literal["start", "on_demand"], option("start, or on_demand: with the first request that names the model")
    ] = "start"
    idle_unload_seconds: Annotated[
        SecondsOrZero, option("unload the model after so long without a request; 0: never")
    ] = 0.0
    model_file: Annotated[str, option("a traced .pt, read if the folder at `path` has no weights")] = ""
    serialize_file: Annotated[
        str, option('file for the packed weights; "": only those of downloaded models are kept, in the cache folder')
    ] = ""
    input_name: Annotated[
        str, option("the input's name in br-vllm-serving's traced graph; only engine plugins use it")
    ] = "input_ids.1"
    output_name: Annotated[
        str, option("the output's name in br-vllm-serving's traced graph; only engine plugins use it")
    ] = ""

    def __post_init__(self) -> None:
        if not self.devices:
            msgspec.structs.force_setattr(self, "devices", tuple(range(self.tensor_parallel)))


class UpstreamConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One server to forward to: any server with the OpenAI API."""

    url: Annotated[
        Word,
        option(
            "http:// or https://HOST[:PORT][/PATH], or unix:/run/model.sock; any server with the OpenAI API",
            "http://127.0.0.1:8001",
        ),
    ]
    models: Annotated[
        tuple[Text, ...],
        Meta(min_length=1, extra={"allowed": "a list of at least one model name"}),
        option("the models that it serves; several upstreams may serve the same one", ["my-model"]),
    ]
    name: Annotated[Word | None, option("its name in logs and metrics; without it, the url", "gpu-1")] = None
    weight: Annotated[
        int, Meta(ge=1, le=1000), option("its share of the requests, relative to other upstreams of the model")
    ] = 1
    rename: Annotated[
        dict[str, Text],
        option("model → the upstream's name for it, put into the request body", {"my-model": "org/my-model"}),
    ] = {}
    api_key: Annotated[Word | None, option("the upstream's own key; a client's key is never forwarded", "sk-1")] = None
    api_key_env: Annotated[Word | None, option("or the environment variable that holds it", "MODEL_KEY")] = None
    api_key_header: Annotated[
        KeyHeader, option("the header that carries it: authorization, x-api-key, api-key, x-goog-api-key")
    ] = "authorization"
    ca_file: Annotated[
        Text | None, option("CA certificate of the upstream, if not one of the system's", "/etc/ssl/own-ca.pem")
    ] = None
    health_path: Annotated[str, option('requested every proxy.health_seconds; "": never')] = "/health"

    def __repr__(self) -> str:
        return f"UpstreamConfig({self.url!r}, models={self.models!r})"


class LimitsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every bound on what a client can ask for. `docs/refusals.md` has the table with the error that each one gives."""

    max_body_bytes: Annotated[Count, option("request body; a longer one is refused")] = 1024 * 1024
    max_body_bytes_in_flight: Annotated[
        Count, option("bodies of all requests in progress; one API key may hold half of it")
    ] = 64 * 1024 * 1024
    max_header_bytes: Annotated[
        int,
        Meta(ge=1024, le=1024 * 1024),
        option("request headers; longer ones are refused, and so are more than 100 lines"),
    ] = 16 * 1024
    header_seconds: Annotated[Seconds, option("time for a client to send its headers")] = 30.0
    body_seconds: Annotated[Seconds, option("time for a client to send its body")] = 30.0
    keepalive_seconds: Annotated[Seconds, option("an idle connection is closed after this time")] = 75.0
    slow_client_seconds: Annotated[Seconds, option("a client that reads nothing for so long is disconnected")] = 60.0
    sse_comment_seconds: Annotated[
        Seconds, option("an idle stream gets a comment line this often, so that proxies keep it open")
    ] = 15.0
    max_connections: Annotated[
        Count, option("open connections; when all are taken, idle ones are closed for new ones")
    ] = 2048
    max_connections_per_address: Annotated[
        Count, option("the same for one client address; behind a reverse proxy all clients have its address")
    ] = 1024
    max_prompts: Annotated[Count, option("prompts in one completions request")] = 64
    max_embedding_inputs: Annotated[Count, option("texts in one embeddings request")] = 2048
    max_n: Annotated[Count, option("answers to one prompt (`n`)")] = 128
    max_beam_width: Annotated[Count, option("beams of one search (`best_of` with `use_beam_search`)")] = 16
    max_sequences: Annotated[Count, option("prompts times `n` in one request")] = 256
    max_logprobs: Annotated[CountOrZero, option("alternatives reported for each token")] = 20
    max_stop_strings: Annotated[CountOrZero, option("entries of `stop`, and of `stop_token_ids`")] = 16
    max_stop_length: Annotated[Count, option("characters of one stop string")] = 256
    max_logit_bias: Annotated[CountOrZero, option("entries of `logit_bias` and of `allowed_token_ids`")] = 1024
    max_bad_words: Annotated[CountOrZero, option("entries of `bad_words`")] = 64
    max_bad_word_length: Annotated[Count, option("characters of one entry of `bad_words`")] = 128
    max_messages: Annotated[Count, option("messages of one chat")] = 4096
    max_tools: Annotated[Count, option("tools of one chat")] = 256
    max_tools_bytes: Annotated[Count, option("their definitions together, as JSON")] = 512 * 1024
    max_stored_bytes: Annotated[
        CountOrZero,
        option(
            "responses kept for `previous_response_id`, and events of background responses that run; the oldest are "
            "forgotten first; 0: none are kept"
        ),
    ] = 64 * 1024 * 1024
    max_idempotent_bytes: Annotated[
        CountOrZero,
        option(
            "answers kept for retries with the same `Idempotency-Key`, and events of streams that run with one; the "
            "oldest are forgotten first; 0: none are kept"
        ),
    ] = 16 * 1024 * 1024
    max_owner_bytes: Annotated[
        CountOrZero,
        option(
            "ids of responses that upstreams store, kept to find the upstream again; the oldest are forgotten first; "
            "0: none are kept"
        ),
    ] = 8 * 1024 * 1024
    template_seconds: Annotated[
        float, Meta(gt=0, le=3600), option("CPU time of a chat template, for one chat and for loading it")
    ] = 2.0
    template_memory_bytes: Annotated[
        int, Meta(ge=64 * 1024**2, le=2**40), option("memory of the process that renders chats, at least 64 MiB")
    ] = 512 * 1024**2
    max_waiting: Annotated[Count, option("waiting requests; beyond that, 429")] = 256
    max_wait_seconds: Annotated[Seconds, option("longest wait of a request; then 503")] = 120.0


class GrammarConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds on structured output: schemas, regular expressions and grammars that clients send.

    Compiling one cannot be interrupted, so its time is bounded by what it may contain.
    """

    max_bytes: Annotated[Count, option("a schema, grammar or regular expression, or all choices together")] = 256 * 1024
    max_subschemas: Annotated[Count, option("schemas inside one schema, those behind references included")] = 10_000
    max_properties: Annotated[Count, option("properties of one object")] = 1000
    max_optional_properties: Annotated[Count, option("those of them that are not required")] = 400
    max_references: Annotated[Count, option("depth of `$ref` inside the target of another `$ref`")] = 200
    max_repetitions: Annotated[
        Count,
        option("characters of all patterns, repetitions like {1,100} written out; `multipleOf` counts, too"),
    ] = 10_000
    max_joint_patterns: Annotated[Count, option("patterns that one string must match at once, by allOf")] = 3
    max_rules: Annotated[Count, option("rules of a grammar")] = 500
    max_lexer_states: Annotated[Count, option("states that a grammar in use may need, 1 to 2 kB each")] = 20_000
    cache_bytes: Annotated[CountOrZero, option("memory for compiled grammars, kept for later requests")] = 64 * 1024**2
    preload: Annotated[
        bool,
        option(
            "true: vocabularies above 1024 tokens are read as a server loads a model; false: with the first grammar"
        ),
    ] = True


class KeysConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """API keys that may use everything. Without a key, every client may use the server."""

    keys: Annotated[tuple[Word, ...], option("API keys; without any key, every client may use the server")] = ()
    file: Annotated[Text | None, option("a file with one key a line", "/etc/brlite/keys")] = None
    env: Annotated[Word, option("an environment variable that may hold one key")] = "BRLITE_API_KEY"
    admin: Annotated[
        bool, option("true: these are operators' keys; if there are [[key]] tables, only such keys see all metrics")
    ] = False

    def __repr__(self) -> str:
        return f"KeysConfig({len(self.keys)} keys, file={self.file!r}, env={self.env!r})"


class KeyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One API key with rules of its own."""

    name: Annotated[Word, option("its name in logs and metrics", "team-a")]
    key: Annotated[Word | None, option("the key itself", "sk-2")] = None
    env: Annotated[Word | None, option("or the environment variable that holds it", "TEAM_A_KEY")] = None
    models: Annotated[tuple[Text, ...], option("models that it may use; []: all", ["my-model"])] = ()
    requests_per_minute: Annotated[CountOrZero, option("requests in a minute; 0: no limit")] = 0
    tokens_per_minute: Annotated[CountOrZero, option("prompts and answers together; 0: no limit")] = 0
    max_concurrent: Annotated[CountOrZero, option("requests at once; 0: no limit")] = 0
    weight: Annotated[
        int, Meta(ge=1, le=100), option("turns that it gets for each turn of a key of weight 1, while requests wait")
    ] = 1
    priority: Annotated[
        int,
        Meta(ge=-100, le=100),
        option("its requests wait for those of keys with a lower number; a request may ask for a higher one"),
    ] = 0
    admin: Annotated[
        bool, option("true: an operator's key, which sees the metrics of all models, keys and upstreams")
    ] = False

    def __repr__(self) -> str:
        return f"KeyConfig({self.name!r})"


class ProxyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How requests are forwarded to upstreams.

    URLs of `all_models` may be placeholders, as in the manual. Only listed headers are forwarded; `request_headers`
    and `response_headers` add names to the list.
    """

    all_models: Annotated[
        dict[str, str], option("br-vllm-serving's table, URL → model name: which server serves which model")
    ] = {}
    aliases: Annotated[dict[str, Text], option("another name → the model that it means")] = {}
    fallbacks: Annotated[
        dict[str, tuple[Text, ...]],
        option('model → models used when none of its servers can be reached: { a = ["b", "c"] }'),
    ] = {}
    choice: Annotated[
        Choice,
        option("how one of a model's servers is chosen: least_loaded, round_robin, prefix, sticky (docs/proxy.md)"),
    ] = "least_loaded"
    sticky_header: Annotated[
        Word, option('with choice = "sticky", requests with the same value go to the same server')
    ] = "x-session-id"
    prefix_bytes: Annotated[
        Count, option('with choice = "prefix", bytes compared of a prompt or of the first user message')
    ] = 2048
    request_headers: Annotated[
        tuple[HeaderName, ...],
        option('request headers forwarded besides the usual ones (docs/proxy.md): ["x-tenant", "x-team-*"]'),
    ] = ()
    forwarded: Annotated[
        Forwarded,
        option(
            "X-Forwarded-For, Forwarded and X-Real-IP to upstreams; off: none, set: the client's address, append: "
            "that, after the addresses that a trusted proxy in front sent"
        ),
    ] = "off"
    response_headers: Annotated[tuple[HeaderName, ...], option("answer headers forwarded besides the usual ones")] = ()
    max_in_flight: Annotated[Count, option("requests of one model at once; more wait")] = 256
    max_queued: Annotated[CountOrZero, option("waiting requests of one model, shared by key; then 429")] = 256
    max_queue_seconds: Annotated[Seconds, option("longest wait; then 503")] = 30.0
    max_retries: Annotated[
        int, Meta(ge=0, le=2), option("further servers tried before the first byte of an answer, 0 to 2")
    ] = 2
    connect_seconds: Annotated[Seconds, option("time for an upstream to accept a connection")] = 2.0
    first_byte_seconds: Annotated[Seconds, option("time for an upstream to begin its answer")] = 600.0
    idle_seconds: Annotated[Seconds, option("longest pause within an answer")] = 120.0
    held_bytes: Annotated[
        int,
        Meta(ge=4096, le=10**9),
        option("bytes of an answer or an event kept until it is complete; longer ones are forwarded in parts"),
    ] = 1024 * 1024
    max_idle_connections: Annotated[CountOrZero, option("idle connections kept to each upstream")] = 256
    idle_connection_seconds: Annotated[
        Seconds, option("an idle connection to an upstream is closed after this time")
    ] = 60.0
    health_seconds: Annotated[Seconds, option("interval of health checks")] = 5.0
    health_timeout_seconds: Annotated[
        Seconds, option("time to answer a health check; 3 failures take an upstream out, 2 successes bring it back")
    ] = 2.0
    eject_failures: Annotated[Count, option("failed requests in a row that eject an upstream")] = 5
    eject_seconds: Annotated[
        Seconds,
        option("first ejection time; doubles up to 120 s while probes fail; if all are ejected, each is tried in turn"),
    ] = 10.0


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All options. Read-only after loading."""

    server: Annotated[ServerConfig, option("where and how the server listens")] = ServerConfig()
    engine: Annotated[EngineConfig, option("how tokens are computed")] = EngineConfig()
    model: Annotated[tuple[ModelSpec, ...], option("a model to serve; one table a model")] = (ModelSpec(),)
    upstream: Annotated[
        tuple[UpstreamConfig, ...],
        option("a server to forward to, for requests that name its models; one table a server"),
    ] = ()
    limits: Annotated[LimitsConfig, option("every bound on what a client can request")] = LimitsConfig()
    grammar: Annotated[GrammarConfig, option("bounds on structured output")] = GrammarConfig()
    keys: Annotated[KeysConfig, option("API keys that may use everything")] = KeysConfig()
    key: Annotated[tuple[KeyConfig, ...], option("an API key with rules of its own; one table a key")] = ()
    proxy: Annotated[ProxyConfig, option("how requests are forwarded to upstreams")] = ProxyConfig()
