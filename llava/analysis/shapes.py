"""The shapes of the models we estimate and time: numbers only, no weights and no torch.

Fields are called as in transformers' configs, so the config of a LLaMA-like model serves as a LanguageShape.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class LanguageShape:
    """A LLaMA-like decoder: SwiGLU feed-forward, RMSNorm, rotary positions."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False


def kv_width(language: LanguageShape) -> int:
    """Numbers of one key (or one value) of one token in one layer."""
    return language.num_key_value_heads * (language.hidden_size // language.num_attention_heads)


def linears(language: LanguageShape) -> tuple[tuple[str, int, int], ...]:
    """(name, inputs, outputs) of one layer's weight products."""
    hidden, inner = language.hidden_size, language.intermediate_size
    return (
        ("q_proj", hidden, hidden),
        ("k_proj", hidden, kv_width(language)),
        ("v_proj", hidden, kv_width(language)),
        ("o_proj", hidden, hidden),
        ("gate_proj", hidden, inner),
        ("up_proj", hidden, inner),
        ("down_proj", inner, hidden),
    )


def decoder_weights(language: LanguageShape) -> int:
    """Parameters of all layers' products (norms are left out: under 0.01 %)."""
    return language.num_hidden_layers * sum(inputs * outputs for _, inputs, outputs in linears(language))


@dataclass(frozen=True)
class TowerShape:
    """A vision transformer with a CLS token and a plain (GELU) feed-forward.

    Attributes:
        family: clip or dinov2.
        patch_size, image_size: edges in pixels.
    """

    family: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int = 14
    image_size: int = 336

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class Shape:
    """A LLaVA: tower, two-layer projector (tower width -> language width -> language width), decoder."""

    name: str
    tower: TowerShape
    language: LanguageShape


CLIP_L_336 = TowerShape("clip", 1024, 4096, 24, 16)
DINOV2_S = TowerShape("dinov2", 384, 1536, 12, 6)

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("7b", CLIP_L_336, LanguageShape(4096, 11008, 32, 32, 32, 32000)),
        Shape("13b", CLIP_L_336, LanguageShape(5120, 13824, 40, 40, 40, 32000)),
        # The small LLaVA that ships with the project: DINOv2 ViT-S/14 and SmolLM2-135M.
        Shape("mini", DINOV2_S, LanguageShape(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True)),
    )
}
