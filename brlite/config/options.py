"""The configuration: frozen structs that are the list of every option, its type, its range and its default.

`load.py` reads TOML (documented in `brlite.toml`) or the manual's 13-field JSON (`manual_json.py`). Nothing here
reads a model, a device or the network: limits that depend on the model are checked where the model is opened.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from brlite.precision import PrecisionName

Count = Annotated[int, Meta(ge=1, le=10**9)]
CountOrZero = Annotated[int, Meta(ge=0, le=10**9)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Seconds = Annotated[float, Meta(gt=0, le=10**6)]
SecondsOrZero = Annotated[float, Meta(ge=0, le=10**6)]
Text = Annotated[str, Meta(min_length=1, description="a non-empty string")]
Word = Annotated[str, Meta(pattern=r"^\S+\Z", description="a non-empty string without spaces")]
HeaderName = Annotated[
    str, Meta(pattern=r"^[!#$%&'+\-.^_`|~0-9A-Za-z]+\*?\Z", description="the name of a header, or its beginning and *")
]
DeviceIndex = Annotated[int, Meta(ge=0, le=1023)]
BlockSize = Literal[8, 16, 32, 64, 128, 256]
Backend = Literal["auto", "native", "torch"]
Choice = Literal["least_loaded", "round_robin", "prefix", "sticky"]
KeyHeader = Literal["authorization", "x-api-key", "api-key", "x-goog-api-key"]
Forwarded = Literal["off", "append", "set"]

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Headers that no config lets pass: of one hop only, or keys, or brlite's own to say. One that ends in * is a beginning.
_OF_ONE_HOP = "connection content-length keep-alive proxy-* te trailer transfer-encoding upgrade x-request-id"
_KEYS = "api-key authorization cookie x-api-key x-goog-api-key"
_WHOSE = "forwarded x-forwarded-* x-real-ip"  # said as `proxy.forwarded` wants it, never as a client claims
NEVER_TO_UPSTREAMS = tuple(f"{_OF_ONE_HOP} {_KEYS} {_WHOSE} accept-encoding expect host via".split())
NEVER_TO_CLIENTS = tuple(f"{_OF_ONE_HOP} access-control-* server set-cookie".split())

ENGINE_VARIABLE = "BRLITE_ENGINE"


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where and how the HTTP server listens. Port 0 takes a free one; `drain_seconds` is the grace time of SIGTERM.

    `allowed_hosts` are names, besides local ones, that requests may have in `Host`. With none, any name is good, but on
    loopback without API keys only local ones are. With `metrics_need_key`, and where there are keys, `/metrics`
    is closed to clients without one.
    """

    host: Word = "127.0.0.1"
    port: Port = 8000
    cors_origins: tuple[Word, ...] = ()
    allowed_hosts: tuple[Word, ...] = ()
    metrics_need_key: bool = True
    drain_seconds: SecondsOrZero = 30.0
    access_log: bool = True
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How steps are computed. `threads = 0` means one for each physical core.

    Prompts of different API keys are kept apart in the prefix cache unless `share_prefix_cache` is set: usage and time
    would tell one key what another one asked. Speculation is on where the backend can verify guesses, while at most
    `max_draft_seqs` sequences run. `memory_gib` is what the weights and caches of all loaded models may take together;
    0 sets no bound. `name` is an engine that is installed beside brlite (`backends/plugins/contract.py`) and computes
    in the backends' place; `options` are its own. `on_rank_failure` says what comes after a process of a model with
    `tensor_parallel` is lost: the model is loaded anew, or the server ends.
    """

    name: Word | None = None
    options: dict[str, str | bool | int | float] = {}
    backend: Backend = "auto"
    device: Word = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    block_size: BlockSize = 16
    max_num_batched_tokens: Count = 128
    prefix_caching: bool = True
    share_prefix_cache: bool = False
    speculation: Literal["auto", "off"] = "auto"
    max_draft_tokens: Annotated[int, Meta(ge=1, le=16)] = 7
    max_draft_seqs: Annotated[int, Meta(ge=1, le=4096)] = 4
    memory_gib: Annotated[float, Meta(ge=0, le=10**6)] = 0.0
    on_rank_failure: Literal["restart", "exit"] = "restart"


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model to serve. Without `path` it is fetched by `name`.

    `build_seq = 0` means the model's own context, or as much of it as memory holds; the KV cache is then bounded by
    memory, too (`backends/sizes.py`). Beside a `build_seq`, `num_blocks = 0` means build_batch full contexts.

    `load = "on_demand"` loads the model for the first request that asks for it, and `idle_unload_seconds` (0: never)
    gives its memory back when nobody has asked for so long. `serialize_file` is where the packed weights are kept.
    A `model_file` that is a traced `.pt` gives the weights where the model's folder has none. Else it belongs to the
    manual's engine, as `input_name` and `output_name` do: they are kept for the engines that use them and reported by
    `brlite check`.
    """

    name: Text = DEFAULT_MODEL
    path: Text | None = None
    precision: PrecisionName = "bf16"
    build_seq: CountOrZero = 0
    build_batch: Annotated[int, Meta(ge=1, le=4096)] = 16
    num_blocks: CountOrZero = 0
    tensor_parallel: Annotated[int, Meta(ge=1, le=1024)] = 1
    devices: tuple[DeviceIndex, ...] = (0,)
    chat_template: Text | None = None
    vocab_size: Count | None = None
    load: Literal["start", "on_demand"] = "start"
    idle_unload_seconds: SecondsOrZero = 0.0
    model_file: str = ""
    serialize_file: str = ""
    input_name: str = "input_ids.1"
    output_name: str = ""


class UpstreamConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One server behind this one, and the models that it serves. Any server with OpenAI's API will do.

    `url` is `http://HOST[:PORT]`, `https://HOST[:PORT]` or `unix:/PATH`. `rename` says what the upstream calls a model,
    where that is another name. Its key comes from `api_key`, or from the environment variable `api_key_env`,
    and is sent in `api_key_header`.
    """

    url: Word
    models: Annotated[tuple[Text, ...], Meta(min_length=1, description="a list of at least one model name")]
    name: Word | None = None
    weight: Annotated[int, Meta(ge=1, le=1000)] = 1
    rename: dict[str, Text] = {}
    api_key: Word | None = None
    api_key_env: Word | None = None
    api_key_header: KeyHeader = "authorization"
    ca_file: Text | None = None
    health_path: str = "/health"

    def __repr__(self) -> str:
        return f"UpstreamConfig({self.url!r}, models={self.models!r})"


class LimitsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every bound on what a client can ask for. `docs/http-api.md` has the table with the error that each one gives."""

    max_body_bytes: Count = 1024 * 1024
    max_body_bytes_in_flight: Count = 64 * 1024 * 1024
    max_header_bytes: Annotated[int, Meta(ge=1024, le=1024 * 1024)] = 16 * 1024
    header_seconds: Seconds = 30.0
    body_seconds: Seconds = 30.0
    keepalive_seconds: Seconds = 75.0
    slow_client_seconds: Seconds = 60.0
    sse_comment_seconds: Seconds = 15.0
    max_connections: Count = 2048
    max_connections_per_address: Count = 1024
    max_prompts: Count = 64
    max_n: Count = 128
    max_sequences: Count = 256
    max_logprobs: CountOrZero = 20
    max_stop_strings: CountOrZero = 16
    max_stop_length: Count = 256
    max_logit_bias: CountOrZero = 1024
    max_messages: Count = 4096
    template_seconds: Annotated[float, Meta(gt=0, le=3600)] = 2.0
    template_memory_bytes: Annotated[int, Meta(ge=64 * 1024**2, le=2**40)] = 512 * 1024**2
    max_waiting: Count = 256
    max_wait_seconds: Seconds = 120.0


class KeysConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """API keys. With none, everybody may ask. `file` holds one key a line; `env` names a variable with one key.

    With `admin` they are an operator's: beside keys with names, only such see the metrics of all models and keys.
    """

    keys: tuple[Word, ...] = ()
    file: Text | None = None
    env: Word = "BRLITE_API_KEY"
    admin: bool = False

    def __repr__(self) -> str:
        return f"KeysConfig({len(self.keys)} keys, file={self.file!r}, env={self.env!r})"


class KeyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One API key with rules of its own. `name` is how logs and metrics call it; the key comes from `key` or `env`.

    No `models` means all of them; 0 sets no limit. With `admin` it is an operator's, which sees all metrics.
    """

    name: Word
    key: Word | None = None
    env: Word | None = None
    models: tuple[Text, ...] = ()
    requests_per_minute: CountOrZero = 0
    tokens_per_minute: CountOrZero = 0
    max_concurrent: CountOrZero = 0
    admin: bool = False

    def __repr__(self) -> str:
        return f"KeyConfig({self.name!r})"


class ProxyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How requests for the models of other servers are passed on.

    `all_models` is the manual's table, URL → model; its URLs may be placeholders. `aliases` maps a name that requests
    use to a model, `fallbacks` a model to those that may answer in its stead. Bounds: `max_in_flight` requests of one
    model at once, `max_queued` more wait for `max_queue_seconds` at most; `held_bytes` of an answer that is no stream,
    or of one event, are kept until they are whole, longer ones go on in parts. Of headers, a list goes on;
    `request_headers` and `response_headers` add names to it. `forwarded` says whether upstreams are told the client's
    address: not at all, that of its connection, or that behind what a trusted proxy before this one said.
    """

    all_models: dict[str, str] = {}
    aliases: dict[str, Text] = {}
    fallbacks: dict[str, tuple[Text, ...]] = {}
    choice: Choice = "least_loaded"
    sticky_header: Word = "x-session-id"
    prefix_bytes: Count = 2048
    request_headers: tuple[HeaderName, ...] = ()
    forwarded: Forwarded = "off"
    response_headers: tuple[HeaderName, ...] = ()
    max_in_flight: Count = 256
    max_queued: CountOrZero = 256
    max_queue_seconds: Seconds = 30.0
    max_retries: Annotated[int, Meta(ge=0, le=2)] = 2
    connect_seconds: Seconds = 2.0
    first_byte_seconds: Seconds = 600.0
    idle_seconds: Seconds = 120.0
    held_bytes: Annotated[int, Meta(ge=4096, le=10**9)] = 1024 * 1024
    max_idle_connections: CountOrZero = 256
    idle_connection_seconds: Seconds = 60.0
    health_seconds: Seconds = 5.0
    health_timeout_seconds: Seconds = 2.0
    eject_failures: Count = 5
    eject_seconds: Seconds = 10.0


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything brlite can be told. Read-only after loading."""

    server: ServerConfig = ServerConfig()
    engine: EngineConfig = EngineConfig()
    model: tuple[ModelSpec, ...] = (ModelSpec(),)
    upstream: tuple[UpstreamConfig, ...] = ()
    limits: LimitsConfig = LimitsConfig()
    keys: KeysConfig = KeysConfig()
    key: tuple[KeyConfig, ...] = ()
    proxy: ProxyConfig = ProxyConfig()
