"""The tensors of a folder with Wan's weights, of diffusers or of the release, by their names in diffusers.

The key layout of the release is renamed by diffusers' own table.
"""

from __future__ import annotations

from pathlib import Path

from flowanchor.plugins.formats.folder_weights import CONFIG as CONFIG
from flowanchor.plugins.formats.folder_weights import FolderWeights

OURS, THEIRS = "r_embedder.", "condition_embedder.delta_embedder."  # what embeds the end, here and in diffusers


class WanWeights(FolderWeights):
    """The tensors of such a folder by their names in diffusers, and the embedder of the end by ours."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, _own_names)


def diffusers_names(names: list[str]) -> dict[str, str]:
    """Names in either layout -> what diffusers calls them."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers  # takes seconds to import

    if any("condition_embedder." in name for name in names):
        return {name: name for name in names}
    renamed = convert_wan_transformer_to_diffusers({name: name for name in names})  # moves values, looks at none
    return {theirs: ours for ours, theirs in renamed.items()}


def _own_names(names: list[str]) -> dict[str, str]:
    return {theirs: name.replace(THEIRS, OURS, 1) for theirs, name in diffusers_names(names).items()}
