"""The shapes of the models we estimate and time: numbers only, no weights and no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LanguageShape:
    """A LLaMA-like decoder: SwiGLU feed-forward, RMSNorm, rotary positions."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied_head: bool = False

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads

    @property
    def kv_width(self) -> int:
        """Numbers of one key (or one value) of one token in one layer."""
        return self.kv_heads * self.head_width

    @property
    def linears(self) -> tuple[tuple[str, int, int], ...]:
        """(name, inputs, outputs) of one layer's weight products."""
        return (
            ("q_proj", self.hidden, self.hidden),
            ("k_proj", self.hidden, self.kv_width),
            ("v_proj", self.hidden, self.kv_width),
            ("o_proj", self.hidden, self.hidden),
            ("gate_proj", self.hidden, self.intermediate),
            ("up_proj", self.hidden, self.intermediate),
            ("down_proj", self.intermediate, self.hidden),
        )

    @property
    def layer_weights(self) -> int:
        """Parameters of one layer's products (norms are left out: under 0.01 %)."""
        return sum(inputs * outputs for _, inputs, outputs in self.linears)


@dataclass(frozen=True)
class TowerShape:
    """A vision transformer with a CLS token and a plain (GELU) feed-forward.

    Attributes:
        family: clip or dinov2.
        patch, image: edges in pixels.
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    patch: int
    image: int

    @property
    def side(self) -> int:
        """Patches along one edge of the (square) image."""
        return self.image // self.patch

    @property
    def patches(self) -> int:
        return self.side**2


@dataclass(frozen=True)
class Shape:
    """A LLaVA: tower, two-layer projector (tower width -> language width -> language width), decoder."""

    name: str
    tower: TowerShape
    language: LanguageShape


CLIP_L_336 = TowerShape(
    family="clip", hidden=1024, intermediate=4096, layers=24, heads=16, patch=14, image=336
)
DINOV2_S = TowerShape(family="dinov2", hidden=384, intermediate=1536, layers=12, heads=6, patch=14, image=336)

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("7b", CLIP_L_336, LanguageShape(4096, 11008, 32, 32, 32, 32000)),
        Shape("13b", CLIP_L_336, LanguageShape(5120, 13824, 40, 40, 40, 32000)),
        # The small LLaVA that ships with the project: DINOv2 ViT-S/14 and SmolLM2-135M.
        Shape("mini", DINOV2_S, LanguageShape(576, 1536, 30, 9, 3, 49152, tied_head=True)),
    )
}
