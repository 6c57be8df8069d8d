"""The configuration: frozen structs that are the list of every option, its type and its default.

`load_config` reads TOML (documented in `brlite.toml`) or the manual's 13-field JSON (`seed_config.py`). Nothing here
touches a model folder, a device or the network: limits that depend on the model are checked where the model is opened.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Precision = Literal["bf16", "a_bf16_w_int8", "a_bf16_w_int8_kv_int8"]

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where and how the HTTP server listens."""

    host: str = "127.0.0.1"
    port: int = 8000
    cors_origins: tuple[str, ...] = ()
    metrics_need_key: bool = False
    drain_seconds: float = 30.0
    access_log: bool = True
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How steps are computed. `threads = 0` means one for each physical core."""

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = 0
    block_size: int = 16
    max_num_batched_tokens: int = 256
    prefix_caching: bool = True


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model to serve. Without `path` it is fetched by `name`; `num_blocks = 0` means build_batch full contexts.

    `input_name`, `output_name` and `serialize_file` belong to the manual's engine: they are kept for the engines that
    use them and reported by `brlite check`.
    """

    name: str = DEFAULT_MODEL
    path: str | None = None
    precision: Precision = "bf16"
    build_seq: int = 2048
    build_batch: int = 16
    num_blocks: int = 0
    tensor_parallel: int = 1
    devices: tuple[int, ...] = (0,)
    chat_template: str | None = None
    vocab_size: int | None = None
    serialize_file: str = ""
    input_name: str = "input_ids.1"
    output_name: str = ""


class LimitsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every bound on what a client can ask for. `README.md` has the table with the error that each one gives."""

    max_body_bytes: int = 4 * 1024 * 1024
    max_header_bytes: int = 16 * 1024
    header_seconds: float = 30.0
    body_seconds: float = 30.0
    keepalive_seconds: float = 75.0
    slow_client_seconds: float = 60.0
    sse_comment_seconds: float = 15.0
    max_connections: int = 2048
    max_prompts: int = 64
    max_n: int = 128
    max_sequences: int = 256
    max_logprobs: int = 20
    max_stop_strings: int = 16
    max_stop_length: int = 256
    max_logit_bias: int = 1024
    max_messages: int = 4096
    max_waiting: int = 256
    max_wait_seconds: float = 120.0


class KeysConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """API keys. With none, everybody may ask. `file` holds one key a line; `env` names a variable with one key."""

    keys: tuple[str, ...] = ()
    file: str | None = None
    env: str = "BRLITE_API_KEY"

    def __repr__(self) -> str:
        return f"KeysConfig({len(self.keys)} keys, file={self.file!r}, env={self.env!r})"


class ProxyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which server serves which model: URL → model name. URLs are opaque here and may be the manual's placeholders."""

    all_models: dict[str, str] = {}


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything brlite can be told. Read-only after loading."""

    server: ServerConfig = ServerConfig()
    engine: EngineConfig = EngineConfig()
    model: tuple[ModelSpec, ...] = (ModelSpec(),)
    limits: LimitsConfig = LimitsConfig()
    keys: KeysConfig = KeysConfig()
    proxy: ProxyConfig = ProxyConfig()
