"""The parameters of a request: the sampling table, structured output, and pooling for embeddings.

Plain values that validate themselves, independent of engine and HTTP. First file: `params.py`.
"""

from brlite.sampling_params.params import (
    GREEDY_BELOW,
    MAX,
    MODEL_DEFAULTS,
    FinishReason,
    Pooling,
    PoolingParams,
    SamplingParameter,
    SamplingParams,
    check_token_ids,
    parameters,
)
from brlite.sampling_params.readers import NamedProcessor
from brlite.sampling_params.structured_output import CallPart, Calls, ParameterNotation, Reasoning, StructuredOutput

__all__ = [
    "GREEDY_BELOW",
    "MAX",
    "MODEL_DEFAULTS",
    "CallPart",
    "Calls",
    "FinishReason",
    "NamedProcessor",
    "ParameterNotation",
    "Pooling",
    "PoolingParams",
    "Reasoning",
    "SamplingParameter",
    "SamplingParams",
    "StructuredOutput",
    "check_token_ids",
    "parameters",
]
