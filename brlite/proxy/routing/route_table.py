"""Which model is served by which upstreams: made once from a config, replaced as a whole when the config changes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import msgspec

from brlite.config.options import Config
from brlite.config.proxy_files import upstream_configs
from brlite.proxy.routing.balancer import Balancer
from brlite.proxy.routing.concurrency import ConcurrencyLimit
from brlite.proxy.routing.upstream import Upstream


class Route(msgspec.Struct, frozen=True, eq=False):
    """One model: the upstreams that serve it, its concurrency limit, and the models that are used in its place.

    `routes` are all routes of the table by model: two models may be each other's fallback.
    """

    model: str
    upstreams: tuple[Upstream, ...]
    balancer: Balancer[Upstream]
    limit: ConcurrencyLimit
    fallbacks: tuple[str, ...]
    routes: Mapping[str, Route]

    def __repr__(self) -> str:
        return f"Route({self.model})"

    def name_at(self, upstream: Upstream) -> str:
        """The upstream's name for the model."""
        return upstream.config.rename.get(self.model, self.model)

    def only(self, name: str) -> Route | None:
        """The route with only this upstream. None if it does not serve the model (any more)."""
        found = next((upstream for upstream in self.upstreams if upstream.name == name), None)
        return None if found is None else msgspec.structs.replace(self, upstreams=(found,), fallbacks=())

    def is_available(self, now: float, tried: Collection[Upstream] = ()) -> bool:
        """Whether an upstream that was not tried yet may get requests."""
        excluded = self._excluded(now, tried)
        return any(upstream.is_available(now) and upstream not in excluded for upstream in self.upstreams)

    def has_untried(self, now: float, tried: Collection[Upstream]) -> bool:
        """Whether `choose` would find an upstream."""
        excluded = self._excluded(now, tried)
        return any(upstream not in excluded for upstream in self.upstreams)

    def choose(self, now: float, affinity: bytes | None, tried: Collection[Upstream]) -> Upstream | None:
        """An upstream that was not tried yet, and is not known to lack the model. None if there is none."""
        if len(self.upstreams) == 1:
            return None if self.upstreams[0] in tried else self.upstreams[0]
        return self.balancer.choose(now, affinity, self._excluded(now, tried))

    def _excluded(self, now: float, tried: Collection[Upstream]) -> Collection[Upstream]:
        """Those tried, and those that lack the model. If all lack it, all may be tried: lists may be wrong."""
        lacking = [upstream for upstream in self.upstreams if upstream.lacks(self.name_at(upstream), now)]
        return tried if not lacking or len(lacking) == len(self.upstreams) else (*tried, *lacking)


class RouteTable:
    """All upstreams, and the routes by the names that requests use, aliases included."""

    def __init__(self, config: Config, before: RouteTable | None = None) -> None:
        """Upstreams of the table `before` that do not change are kept, with their connections and state.

        So are the concurrency limits of models, with the requests that run and wait.
        """
        configs, limits = upstream_configs(config), (config.proxy.max_in_flight, config.proxy.max_queued)
        known = {each.name: each for each in before.upstreams} if before is not None else {}
        kept = {each.model: each.limit for each in before or () if each.limit.limits == limits}
        self.upstreams: tuple[Upstream, ...] = tuple(
            same
            if (same := known.get(each.name or each.url)) is not None and same.is_made_from(each, config.proxy)
            else Upstream(each, config.proxy)
            for each in configs
        )
        by_model: dict[str, dict[Upstream, None]] = {}  # a config may name a model twice
        for upstream in self.upstreams:
            for model in upstream.config.models:
                by_model.setdefault(model, {})[upstream] = None
        routes: dict[str, Route] = {}
        for model, serving in by_model.items():
            upstreams = tuple(serving)
            routes[model] = Route(
                model,
                upstreams,
                Balancer(config.proxy.choice, upstreams),
                kept.get(model) or ConcurrencyLimit(*limits),
                tuple(name for name in config.proxy.fallbacks.get(model, ()) if name in by_model),
                routes,
            )
        self.routes: Mapping[str, Route] = routes
        self._is_only_one = len(routes) == 1 and not config.model
        aliases = {alias: routes[model] for alias, model in config.proxy.aliases.items() if model in routes}
        self._by_name = {**routes, **aliases}

    def __iter__(self) -> Iterator[Route]:
        return iter(self.routes.values())

    def find(self, name: str | None) -> Route | None:
        """The route of the name. Without a name: the only route, if there is one and no model is served here."""
        if name is None:
            return next(iter(self.routes.values())) if self._is_only_one else None
        return self._by_name.get(name)

    def upstream(self, name: str) -> Upstream | None:
        return next((upstream for upstream in self.upstreams if upstream.name == name), None)

    def renewed(self, route: Route) -> Route:
        """What replaces a route of an earlier table. That route if its model, or its only upstream, is gone."""
        now = self.routes.get(route.model, route)
        if route.routes.get(route.model) is not route:  # it is for one upstream
            return now.only(route.upstreams[0].name) or route
        return now

    def names(self) -> Iterable[tuple[str, Route]]:
        """Every name that a request may use, with its route."""
        return self._by_name.items()
