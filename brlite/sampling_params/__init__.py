"""What a request says of its answer: the sampling table, the shape of an answer, and how a prompt is embedded.

Plain values that check themselves. They know neither engine nor HTTP. First file: `params.py`.
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
from brlite.sampling_params.structured_output import (
    CallPart,
    Calls,
    ParameterNotation,
    Reasoning,
    StructuredOutput,
)

__all__ = [
    "GREEDY_BELOW",
    "MAX",
    "MODEL_DEFAULTS",
    "CallPart",
    "Calls",
    "FinishReason",
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
