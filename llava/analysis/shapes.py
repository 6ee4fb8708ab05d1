"""The shapes of the models we estimate and time: numbers only, no weights and no torch.

Fields are called as in transformers' configs, so a config of our models serves as a LanguageShape.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class LanguageShape:
    """A decoder with SwiGLU feed-forward, RMSNorm and rotary positions: LLaMA, Mistral, Qwen.

    Attributes:
        model_type: transformers' name of the language model.
        head_dim: width of an attention head; None: hidden_size / num_attention_heads.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False
    model_type: str = "llama"
    head_dim: int | None = None


def query_width(language: LanguageShape) -> int:
    """Width of all heads' queries side by side; Qwen3's is not the hidden size."""
    head_dim = getattr(language, "head_dim", None)  # Qwen2's config has none
    return language.num_attention_heads * head_dim if head_dim else language.hidden_size


def kv_width(language: LanguageShape) -> int:
    """Numbers of one key (or one value) of one token in one layer."""
    return query_width(language) * language.num_key_value_heads // language.num_attention_heads


def linears(language: LanguageShape) -> tuple[tuple[str, int, int], ...]:
    """(name, inputs, outputs) of one layer's weight products."""
    hidden, inner = language.hidden_size, language.intermediate_size
    return (
        ("q_proj", hidden, query_width(language)),
        ("k_proj", hidden, kv_width(language)),
        ("v_proj", hidden, kv_width(language)),
        ("o_proj", query_width(language), hidden),
        ("gate_proj", hidden, inner),
        ("up_proj", hidden, inner),
        ("down_proj", inner, hidden),
    )


def decoder_weights(language: LanguageShape) -> int:
    """Parameters of all layers' products (norms and biases are left out: under 0.01 %)."""
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

    tower: TowerShape
    language: LanguageShape


CLIP_L_336 = TowerShape("clip", 1024, 4096, 24, 16)

SHAPES = {
    name: Shape(CLIP_L_336, language)
    for name, language in {
        "7b": LanguageShape(4096, 11008, 32, 32, 32, 32000),
        "13b": LanguageShape(5120, 13824, 40, 40, 40, 32000),
        "yi-34b": LanguageShape(7168, 20480, 60, 56, 8, 64000),
        "llama3-8b": LanguageShape(4096, 14336, 32, 32, 8, 128256),
        "mistral-7b": LanguageShape(4096, 14336, 32, 32, 8, 32000, False, "mistral"),
        "qwen2.5-1.5b": LanguageShape(1536, 8960, 28, 12, 2, 151936, True, "qwen2"),
        "qwen2.5-7b": LanguageShape(3584, 18944, 28, 28, 4, 152064, False, "qwen2"),
        "qwen3-4b": LanguageShape(2560, 9728, 36, 32, 8, 151936, True, "qwen3", head_dim=128),
        "qwen3-8b": LanguageShape(4096, 12288, 36, 32, 8, 151936, False, "qwen3", head_dim=128),
    }.items()
}
"""By what `--shape` takes: 7b and 13b are Vicuna's, yi-34b is LLaVA-1.6's largest."""

# The small LLaVA that ships with the project: DINOv2 ViT-S/14 and SmolLM2-135M.
SHAPES["mini"] = Shape(
    TowerShape("dinov2", 384, 1536, 12, 6),
    LanguageShape(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
)
