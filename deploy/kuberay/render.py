"""Render a kustomization without kustomize: python deploy/kuberay/render.py deploy/kuberay/overlays/spot > spot.yaml

It supports only the part of kustomize that the overlays use, and refuses everything else: `resources` (files, and folders
with a kustomization), `images` by name, and `patches` that are RFC 6902 lists with a target of kind and name.
`kubectl kustomize` gives the same objects in another order; a test compares the two if kubectl is installed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonpatch import JsonPatch

KNOWN = {"apiVersion", "kind", "resources", "images", "patches"}


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that occurs twice in one mapping, as kustomize does. PyYAML would use the last one without a warning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(
                    f"{node.start_mark.name}, line {node.start_mark.line + 1}: {key!r} occurs twice; remove one"
                )
        return super().construct_mapping(node, deep)


def render(folder: Path) -> list[dict[str, Any]]:
    """Return the Kubernetes objects of `folder`/kustomization.yaml. Raises ValueError for a field that it does not support or an object that it cannot find."""
    path = folder / "kustomization.yaml"
    (wanted,) = load(path)
    if unknown := sorted(wanted.keys() - KNOWN):
        raise ValueError(
            f"{path}: {unknown[0]!r} is not supported here (only {', '.join(sorted(KNOWN))}); use kubectl kustomize"
        )
    objects: list[dict[str, Any]] = []
    for resource in wanted["resources"]:
        place = folder / resource
        objects += render(place) if place.is_dir() else load(place)
    names = [_name(each) for each in objects]
    if double := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path}: {sorted(double)[0]} is in two files; remove one of them")
    for patch in wanted.get("patches", []):
        target = patch["target"]["kind"], patch["target"]["name"]
        if patch.keys() != {"target", "patch"} or patch["target"].keys() != {"kind", "name"} or target not in names:
            raise ValueError(f"{path}: a patch of {target} is not an inline RFC 6902 list for one of {names}")
        (steps,) = yaml.load_all(patch["patch"], StrictLoader)
        objects[names.index(target)] = JsonPatch(steps).apply(objects[names.index(target)])
    for image in wanted.get("images", []):
        for each in objects:
            _set_image(each, image["name"], f"{image['newName']}:{image['newTag']}")
    return objects


def load(path: Path) -> list[dict[str, Any]]:
    """Return the documents of a YAML file. Aliases of an anchor become copies, so that a patch of one does not change the other."""
    with path.open(encoding="utf-8") as file:
        return [
            json.loads(json.dumps(document)) for document in yaml.load_all(file, StrictLoader) if document is not None
        ]


def _name(each: dict[str, Any]) -> tuple[str, str]:
    return each["kind"], each["metadata"]["name"]


def _set_image(node: Any, name: str, image: str) -> None:
    """Set the image in every list of containers, in objects of every kind, as kustomize does."""
    if isinstance(node, list):
        for item in node:
            _set_image(item, name, image)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers") and isinstance(value, list):
                for container in value:
                    if container.get("image") == name:
                        container["image"] = image
            _set_image(value, name, image)


if __name__ == "__main__":
    yaml.safe_dump_all(render(Path(sys.argv[1])), sys.stdout, sort_keys=False, width=120)
