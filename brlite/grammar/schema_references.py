"""References within a JSON schema: finds the target of a `$ref`, by pointer, `$id` or `$anchor`. Nothing is fetched."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote, unquote, urldefrag, urljoin

from brlite.grammar.patterns import with_plain_classes

IN_URI = "/%:?&=+~!$'()*,;@-._"  # characters that stand for themselves in a URI and in its fragment
MAX_POINTER = 200  # characters of a JSON pointer in a message


class SchemaRefused(ValueError):
    """A schema that is invalid, costs too much or cannot be enforced. The message says where and why."""

    def __init__(self, pointer: str, reason: str) -> None:
        place = pointer if len(pointer) <= MAX_POINTER else f"{pointer[:MAX_POINTER]}…"
        super().__init__(f"at {place}: {reason}")


class SchemaReferences:
    """Finds the targets of a schema's references. Names and base URIs are read once, from the whole schema."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._anchors: dict[str, tuple[str, Any]] = {}  # the subschemas that `$id` and `$anchor` name
        self._bases: dict[int, str] = {}  # by `id`, which stays valid as `_root` is referenced
        self._find_anchors()

    def base_of(self, node: dict[str, Any]) -> str:
        """The base URI of the references in a subschema."""
        return self._bases.get(id(node), "")

    def resolve(self, pointer: str, node: dict[str, Any]) -> tuple[str, Any]:
        """The pointer and the target of a node's `$ref`. Rewrites a reference that is no valid URI to a valid one."""
        reference = node["$ref"]
        if not isinstance(reference, str):
            raise SchemaRefused(f"{pointer}/$ref", "a reference is a string")
        if "/oneOf/" in reference:
            raise SchemaRefused(f"{pointer}/$ref", "references into oneOf are not taken; move the target to $defs")
        plain = unquote(reference)
        if "/patternProperties/" in plain and with_plain_classes(plain) != plain:
            reason = "references to a pattern with such a class are not taken; move the target to $defs"
            raise SchemaRefused(f"{pointer}/$ref", reason)
        written, mark, fragment = reference.partition("#")
        node["$ref"] = quote(written, safe=IN_URI) + mark + quote(fragment, safe=IN_URI)
        address, fragment = urldefrag(urljoin(self.base_of(node), reference))
        found = self._anchors.get(f"{address}#{fragment}" if fragment and fragment[0] != "/" else address)
        if not address and (not fragment or fragment[0] == "/"):
            found = "#", self._root
        if found is None:
            raise SchemaRefused(f"{pointer}/$ref", f"{reference[:100]!r} is not in the schema; nothing is fetched")
        target_pointer, target = found
        for token in fragment.split("/")[1:] if fragment.startswith("/") else []:
            token = unquote(token).replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and token.isdecimal() and len(token) < 10 and int(token) < len(target):
                target = target[int(token)]
            else:
                target = target.get(token) if isinstance(target, dict) else None
            target_pointer += f"/{escape(token)}"
            if target is None:
                raise SchemaRefused(f"{pointer}/$ref", f"{reference[:100]!r} leads to nothing in the schema")
        return target_pointer, target

    def follow(self, pointer: str, node: Any) -> Any:
        """The target of a reference, after up to ten references in a row; any other schema itself."""
        for _ in range(10):
            if not (isinstance(node, dict) and "$ref" in node):
                break
            pointer, node = self.resolve(pointer, node)
        return node

    def _find_anchors(self) -> None:
        """Record the subschemas that `$id` and `$anchor` name, and the base URI of references in each subschema."""
        waiting: list[tuple[str, Any, str]] = [("#", self._root, "")]
        while waiting:
            pointer, node, base = waiting.pop()
            if isinstance(node, dict):
                own = node.get("$id", node.get("id"))
                if isinstance(own, str) and (own.startswith("#") or "$id" in node or node is self._root):
                    base = urljoin(base, own) if not own.startswith("#") else base
                    self._anchors.setdefault(urljoin(base, own), (pointer, node))
                    self._anchors.setdefault(base.rstrip("#"), (pointer, node))
                for keyword in ("$anchor", "$dynamicAnchor"):
                    if isinstance(node.get(keyword), str):
                        self._anchors.setdefault(f"{base.rstrip('#')}#{node[keyword]}", (pointer, node))
                self._bases[id(node)] = base
                waiting += [(f"{pointer}/{escape(key)}", child, base) for key, child in node.items()]
            elif isinstance(node, list):
                waiting += [(f"{pointer}/{index}", child, base) for index, child in enumerate(node)]


def escape(name: str) -> str:
    """The name as a token of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")
