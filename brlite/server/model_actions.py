"""Load and unload models of `load = "on_demand"` at once, by HTTP: llama.cpp's paths and bodies.

A first request would also start the load, so every key may load its models. An unload makes other keys' requests wait
for the next load: if the server needs keys, it needs an operator's key.
"""

from __future__ import annotations

from aiohttp import web
from msgspec import Struct

from brlite.dialects.json_body import BodyDecoder
from brlite.errors import InvalidRequest, OperatorKeyRequired
from brlite.http.body import read_body
from brlite.http.keys import API_KEY, KEYS
from brlite.server.generate import CONFIG, MODELS, admit, json_response


class ModelAction(Struct, forbid_unknown_fields=True):
    """`model` is optional if only one model is served."""

    model: str | None = None


class ModelActionDone(Struct, kw_only=True):
    success: bool = True
    model: str
    status: str


_DECODER = BodyDecoder(ModelAction)


async def load_model(request: web.Request) -> web.Response:
    """`POST /models/load`: responds when the model is in memory. Raises the same errors as a request to the model."""
    limits = request.app[CONFIG].limits
    name = _DECODER.decode(await read_body(request, limits))[0].model
    with admit(request, name) as model:
        model.keep()  # the later of an unload and a load counts
        await model.loaded(limits.max_wait_seconds, request[API_KEY].tenant)
        return json_response(ModelActionDone(model=model.name, status=model.status))


async def unload_model(request: web.Request) -> web.Response:
    """`POST /models/unload`: responds at once. The model is unloaded as soon as no request uses it."""
    name = _DECODER.decode(await read_body(request, request.app[CONFIG].limits))[0].model
    if not (request.app[KEYS].is_open or request[API_KEY].is_admin):
        raise OperatorKeyRequired("models are unloaded with an operator's key (admin = true)")
    model = request.app[MODELS].find(name)
    if model.spec.load != "on_demand":
        raise InvalidRequest(
            f'the model {model.name} is loaded at the start and stays; load = "on_demand" lets it go',
            param="model",
            code="model_not_on_demand",
        )
    model.dismiss()
    status = "unloading" if model.engine is not None else model.status
    return json_response(ModelActionDone(model=model.name, status=status))
