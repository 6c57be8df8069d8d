"""Some of an application's resources, such as those that need no key. It knows no routes: paths come from the caller.

They stay the same where the application is mounted in another one, which puts a prefix before their paths.
"""

from __future__ import annotations

from collections.abc import Set

from aiohttp import web


class Resources:
    """The resources that an application has at `paths` when this is made: `request in resources`.

    A request is for one of them only if its path is spelt exactly as the resource's own: any other spelling may mean
    something else to a proxy before us.
    """

    def __init__(self, app: web.Application, paths: Set[str]) -> None:
        self._members = frozenset(resource for resource in app.router.resources() if resource.canonical in paths)

    def __contains__(self, request: web.Request) -> bool:
        resource = request.match_info.route.resource
        return resource in self._members and request.raw_path.partition("?")[0] == resource.canonical
