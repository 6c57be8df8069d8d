"""DSPy with each of its adapters: `dspy_client.py URL MODEL`. For a real model. No call may be repeated in silence."""

import os
import sys
import urllib.request

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "true"  # it would fetch a list of prices
import dspy

url, name = sys.argv[1:]
lm = dspy.LM(f"lm_studio/{name}", api_base=f"{url}/v1", api_key="none", num_retries=0, max_tokens=400, cache=False)


class Capital(dspy.Signature):
    """Name the capital of a country."""

    country: str = dspy.InputField()
    is_large: bool = dspy.OutputField()
    size: int = dspy.OutputField()


def num_requests() -> int:
    """Requests that the server has ended so far."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines if line.startswith("vllm:request_success_total{"))


assert lm("Say hello.")[0]
begin = num_requests()
with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
    answer = dspy.Predict(Capital)(country="France")
assert (type(answer.is_large), type(answer.size)) == (bool, int), answer
assert num_requests() == begin + 1, "an answer that fits the schema took more than one request"

stream = dspy.streamify(dspy.Predict("question -> answer"), async_streaming=False)
with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
    *_, last = stream(question="What is blue?")
assert isinstance(last, dspy.Prediction), last

embed = dspy.Embedder(f"lm_studio/{name}", api_base=f"{url}/v1", api_key="none", caching=False)
assert embed(["one", "two"]).shape[0] == 2

refusal = None
try:
    dspy.LM("lm_studio/other", api_base=f"{url}/v1", api_key="none", num_retries=0, cache=False)("Say hello.")
except Exception as error:
    refusal = error
assert "does not exist" in str(refusal)
