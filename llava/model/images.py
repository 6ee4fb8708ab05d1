"""From pictures to what the language model reads of them: tower, reducer, projector, joined tiles."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from llava.errors import UserError
from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.anyres import KEEPS_PLACES, join_tiles, reduce_views
from llava.model.projector import build_projector
from llava.model.vision_tower import VisionTower
from llava.reducers import (
    ReducedTokens,
    Reducer,
    ReducerInputError,
    ReducerSpecError,
    VisionFeatures,
    build_reducer,
)
from llava.reducers.features import TEXT_FIELDS
from llava.reducers.scores import score_reads

logger = logging.get_logger(__name__)

Texts = Sequence[Mapping[str, Tensor]]
"""What reducers read of the question (`llava.model.question`), for each picture: VisionFeatures' text_embeds
[M, e], text_tokens [m, D], or both."""

Images = Tensor | Sequence[Tensor]
"""[n, 3, H, W] or a list of [3, H, W]; for anyres [n, views, 3, H, W] or a list of [views, 3, H, W]."""


# A mixin: what it uses of a model comes from the class it is combined with.
_Model: Any = PreTrainedModel if TYPE_CHECKING else object


class ImageMixin(_Model):
    """What a LLaVA model does with pictures; `llava.model.llava_arch` joins it with a language model.

    Attributes:
        reducer: makes few tokens of the tower's many, see `llava.reducers`.
    """

    reducer: Reducer

    def get_vision_tower(self) -> VisionTower | None:
        return self.model.vision_tower

    def set_vision_tower(self, tower: VisionTower) -> None:
        """Puts in the tower; creates the projector if the model has none yet. Their width and the tower's
        selection go into the config; `config.mm_vision_tower`, its path, is the caller's to know.

        Raises:
            UserError: the projector was made for another width.
        """
        config = self.config
        if self.model.mm_projector is None:
            projector = build_projector(config.mm_projector_type, tower.hidden_size, config.hidden_size)
            self.model.mm_projector = projector.to(device=self.device, dtype=self.dtype)
        elif config.mm_hidden_size != tower.hidden_size:
            raise UserError(
                f"the projector takes visual tokens {config.mm_hidden_size} wide (mm_hidden_size) but this "
                f"vision tower's are {tower.hidden_size}: use the tower the checkpoint was trained with "
                "(--vision-tower)"
            )
        config.mm_hidden_size = tower.hidden_size
        config.mm_vision_select_layer = tower.select_layer
        config.mm_vision_select_feature = tower.select_feature
        self.model.vision_tower = tower

    def make_reducer(self, spec: str, *, allow_files: bool = False) -> Reducer:
        """The reducer of a spec, if this model can use it.

        Args:
            allow_files: whether the spec may name a Python file, which runs it.

        Raises:
            UserError: no such reducer or option; a spec that names a file; no fixed number of tokens where
                the tiles of an image share it.
        """
        try:
            reducer = build_reducer(spec, allow_files=allow_files)
        except ReducerSpecError as error:
            raise UserError(str(error)) from error
        fixed = reducer.name == "none" or getattr(reducer, "tokens", None) is not None
        if self.config.mm_anyres_budget == "shared" and not fixed:
            raise UserError(
                f"mm_anyres_budget 'shared' shares out a fixed number of tokens, and {spec!r} has none: "
                f"write {reducer.name}(tokens=640), or use the budget 'tile'"
            )
        return reducer

    def set_reducer(self, spec: str, *, allow_files: bool = True) -> None:
        """Reduces visual tokens as `spec` says from now on; saved with the config.

        Raises:
            UserError: as `make_reducer`.
        """
        self.reducer = self.make_reducer(spec, allow_files=allow_files)
        self.config.mm_token_reducer = self.reducer.spec

    # Pixels to embeddings

    def encode_images(
        self, pixel_values: Tensor, reducers: Sequence[Reducer] | None = None, texts: Texts | None = None
    ) -> list[Tensor]:
        """The visual tokens of B images: tower, then reducer, before the projector. They may be cached.

        Args:
            pixel_values: [B, 3, H, W].
            reducers: one an image (`make_reducer`); None: the model's own for all.
            texts: see `Texts`.

        Returns:
            B tensors [K_i, mm_hidden_size] in the tower's dtype.

        Raises:
            UserError: no tower, pixels that are NaN or infinite, a reducer that cannot work with this tower
                or reads a question that is not given.
        """
        return [tokens for tokens, _ in self._encode(pixel_values, [1] * len(pixel_values), reducers, texts)]

    def _encode(
        self,
        pixel_values: Tensor,
        pictures: Sequence[int],
        reducers: Sequence[Reducer] | None,
        texts: Texts | None,
    ) -> list[tuple[Tensor, Tensor]]:
        """The visual tokens [K_i, mm_hidden_size] of each view, and the patches [K_i] that they stand for.

        Args:
            pixel_values: of all views of all pictures.
            pictures: how many views each picture has, see `llava.model.anyres`.
        """
        if reducers is None:
            reducers = [self.reducer] * len(pictures)
        if all(reducer.name == "none" for reducer in reducers):  # not even the last block's keys are needed
            tokens = self._tower_for(pixel_values).tokens(pixel_values)
            return [(view, torch.arange(len(view), device=view.device)) for view in tokens]
        _, reduced = self.reduce_images(pixel_values, pictures, reducers, texts)
        return [(view.tokens[0], view.kept[0]) for view in reduced]

    def _tower_for(self, pixel_values: Tensor) -> VisionTower:
        tower = self.model.vision_tower
        if tower is None:
            raise UserError(
                "this model has no vision tower, so it cannot take images: load it with "
                "load_pretrained_model, or put one in with set_vision_tower"
            )
        if not pixel_values.isfinite().all():
            raise UserError("the pixels of an image are NaN or infinite: check how it was processed")
        return tower

    @torch.no_grad()
    def reduce_images(
        self,
        pixel_values: Tensor,
        pictures: Sequence[int],
        reducers: Sequence[Reducer],
        texts: Texts | None = None,
    ) -> tuple[VisionFeatures, list[ReducedTokens]]:
        """What the tower saw in V views of B pictures, and what the reducers kept of each view (B = 1).

        Args:
            pixel_values: [V, 3, H, W].
            pictures: how many views each picture has, V in all; 1 but for anyres.
            reducers, texts: one a picture.
        """
        tower = self._tower_for(pixel_values)
        if tower.select_feature != "patch":
            raise UserError(
                f"reducer {reducers[0].spec!r} reduces patches, but mm_vision_select_feature is "
                f"{tower.select_feature!r}: set it to 'patch', or use the reducer 'none'"
            )
        budget = self.config.mm_anyres_budget
        reads = {name for reducer in reducers for name in reducer.asks}
        if budget == "shared":
            reads.update(score_reads(None))
        # The tower runs once, whatever the reducers: under ZeRO-3 every rank must call it equally often.
        features = self.with_projected(tower(pixel_values, reads), reads)

        owner = torch.tensor([row for row, count in enumerate(pictures) for _ in range(count)])
        reduced: list[Any] = [None] * len(owner)
        for reducer in dict.fromkeys(reducers):
            rows = [row for row, one in enumerate(reducers) if one == reducer]
            views = torch.isin(owner, torch.tensor(rows)).nonzero().flatten()
            own = features[views] if len(views) < len(owner) else features
            if reducer.reads_question:
                if texts is None:
                    raise UserError(
                        f"reducer {reducer.spec!r} reads the question, which is not known here: use it in "
                        "llava chat, llava eval or llava.engine, or give embed_images texts="
                    )
                of_views = [texts[int(owner[view])] for view in views]
                asked: Any = {
                    name: [text[name] for text in of_views] for name in TEXT_FIELDS if name in reducer.reads
                }
                own = replace(own, **asked)
            try:
                found = reduce_views(reducer, own, [pictures[row] for row in rows], budget)
            except ReducerInputError as error:
                raise UserError(str(error)) from error
            for view, one in zip(views.tolist(), found, strict=True):
                reduced[view] = one
        return features, reduced

    def with_projected(self, features: VisionFeatures, reads: Collection[str]) -> VisionFeatures:
        """The features with their patches projected too, where a reducer reads that."""
        if "projected" not in reads:
            return features
        return replace(features, projected=torch.stack(self.project(features.patches.unbind())))

    def project(self, visual_tokens: Sequence[Tensor]) -> list[Tensor]:
        """The embeddings of visual tokens: [K_i, mm_hidden_size] each -> [K_i, hidden_size] each."""
        projector = self.model.mm_projector
        assert projector is not None, "a model without projector: call set_vision_tower first"
        if not visual_tokens:
            return []
        # One call for all: under ZeRO-3 every rank must call each module equally often.
        tokens = torch.cat(list(visual_tokens)).to(self.device)
        # A projector quantised to 4 bits keeps its bias in floating point, an identity has nothing.
        weight = next((p for p in projector.parameters() if p.is_floating_point()), tokens)
        return list(projector(tokens.to(weight.dtype)).split([len(block) for block in visual_tokens]))

    def embed_images(
        self,
        images: Images,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        reducers: Sequence[Reducer] | None = None,
        texts: Texts | None = None,
    ) -> list[Tensor]:
        """What the language model reads for each picture: tower, reducer, projector; an anyres picture's
        tiles joined. A conversation keeps them and passes them to `generate` as `visual_embeds` in each turn.

        Args:
            images, image_sizes: as in `forward`.
            reducers, texts: as in `encode_images`, one a picture.

        Returns:
            One [K_i, hidden_size] block per picture.

        Raises:
            UserError: as `encode_images`; sizes missing for a spatial merge type.
        """
        if isinstance(images, Tensor) and images.ndim == 4:  # plain images, of one view and no rows to end
            return self.project(self.encode_images(images, reducers, texts))
        pictures = [image if image.ndim == 4 else image[None] for image in images]
        if reducers is None:
            reducers = [self.reducer] * len(pictures)
        reduced: list[list[tuple[Tensor, Tensor]]] = [[] for _ in pictures]
        # One batch per size. (Under ZeRO-3 every rank must see as many sizes; training feeds one.)
        for shape in dict.fromkeys(views.shape[1:] for views in pictures):
            rows = [row for row, views in enumerate(pictures) if views.shape[1:] == shape]
            encoded = iter(
                self._encode(
                    torch.cat([pictures[row] for row in rows]),
                    [len(pictures[row]) for row in rows],
                    [reducers[row] for row in rows],
                    None if texts is None else [texts[row] for row in rows],
                )
            )
            for row in rows:
                reduced[row] = list(islice(encoded, len(pictures[row])))
        blocks = iter(self.project([tokens for views in reduced for tokens, _ in views]))

        joined = []
        for index, (views, reducer) in enumerate(zip(reduced, reducers, strict=True)):
            kept = [patches for _, patches in views]
            size = None if image_sizes is None else image_sizes[index]
            joined.append(self._join(list(islice(blocks, len(views))), kept, reducer, size))
        return joined

    def _join(
        self, views: list[Tensor], kept: list[Tensor], reducer: Reducer, size: tuple[int, int] | None
    ) -> Tensor:
        """One picture: its small copy, then its tiles, in the rows of the picture where the config says so.

        Args:
            views: [K_i, hidden] of the small copy and each tile.
            kept: [K_i] the patches that they stand for.
            size: (width, height) of the picture.
        """
        config, tower = self.config, self.model.vision_tower
        (overview, *tiles), merge = views, config.mm_patch_merge_type
        if merge != "flat" and (reducer.name not in KEEPS_PLACES or tower.select_feature != "patch"):
            logger.warning_once(
                f"mm_patch_merge_type {merge!r} needs patches in their places; the tokens of the reducer "
                f"{reducer.spec!r} are not, so the tiles of an image are joined flat, without row ends"
            )
            merge = "flat"
        if merge == "flat":
            return torch.cat(views)
        newline = self.model.image_newline if merge == "spatial_unpad" else None
        if not tiles:
            return overview if newline is None else torch.cat([overview, newline[None].to(overview)])
        if config.mm_anyres_budget == "papers":  # 2 x 2, resized and not padded
            across, size = 2, None
        elif size is None:
            raise UserError(
                f"mm_patch_merge_type {merge!r} needs image_sizes=, the (width, height) of each picture"
            )
        else:
            across, _ = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, tower.image_size)
        return torch.cat([overview, join_tiles(tiles, kept[1:], across, tower.grid, newline, size)])
