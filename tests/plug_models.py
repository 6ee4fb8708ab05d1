"""Tiny random models of transformers' LLaVA classes, and batches for them as their processors make them."""

from dataclasses import dataclass

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

SIDE = 112
"""Pixels of a tile: 8 x 8 patches."""
IMAGE, VIDEO, PAD = 120, 121, 0
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 14,
}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


def build(kind: str, seed: int = 0, **changes) -> nn.Module:
    """A ...ForConditionalGeneration of that kind, weights drawn so wide that text depends on the picture."""
    clip, llama = tf.CLIPVisionConfig(**VISION), tf.LlamaConfig(**TEXT)
    common = {
        "vision_config": clip,
        "text_config": llama,
        "image_token_id": IMAGE,
        "pad_token_id": PAD,
        "image_token_index": IMAGE,
    }
    video = {"video_token_id": VIDEO, "video_token_index": VIDEO}
    anyres = {"image_grid_pinpoints": PINPOINTS}
    options = {
        "Llava": common,
        "VipLlava": {**common, "vision_feature_layer": [-2, -3, 1], "vision_feature_layers": [-2, -3, 1]},
        "LlavaNext": {**common, **anyres, "text_config": tf.MistralConfig(**TEXT, sliding_window=None)},
        "LlavaNextVideo": {**common, **anyres, **video},
        "LlavaOnevision": {
            **common,
            **anyres,
            **video,
            "vision_config": tf.SiglipVisionConfig(**VISION, vision_use_head=False),
            "text_config": tf.Qwen2Config(**TEXT),
        },
        "VideoLlava": {**common, **video},
    }[kind]
    config = getattr(tf, f"{kind}Config")(**options | changes)
    model = getattr(tf, f"{kind}ForConditionalGeneration")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shift = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(shift + 0.15 * torch.randn(parameter.shape, generator=generator))
    model.generation_config.eos_token_id = None  # every answer as long as asked for
    return model.eval()


KINDS = ["Llava", "VipLlava", "LlavaNext", "LlavaNextVideo", "LlavaOnevision", "VideoLlava"]
VIDEO_KINDS = ["LlavaNextVideo", "LlavaOnevision", "VideoLlava"]


@dataclass
class Row:
    """One prompt: `before` text ids, one image or video, `after` text ids."""

    seed: int
    before: int
    after: int
    video: bool = False
    size: tuple[int, int] = (200, 200)


def pixels_of(kind: str, row: Row) -> dict[str, torch.Tensor]:
    """The row's picture as a processor hands it over."""
    generator = torch.Generator().manual_seed(100 + row.seed)
    if row.video:
        return {"pixel_values_videos": torch.randn(1, 3, 3, SIDE, SIDE, generator=generator)}
    if kind in ("LlavaNext", "LlavaNextVideo", "LlavaOnevision"):
        tiles = 3 if row.size[0] < 150 or row.size[1] < 150 else 5
        pixels = torch.zeros(1, 5, 3, SIDE, SIDE)
        pixels[:, :tiles] = torch.randn(1, tiles, 3, SIDE, SIDE, generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([row.size])}
    name = "pixel_values"
    if kind == "VideoLlava" and tf.__version__ < "5.20":
        name = "pixel_values_images"
    return {name: torch.randn(1, 3, SIDE, SIDE, generator=generator)}


def untouched_tokens(kind: str, row: Row) -> int:
    """How many placeholders the processor writes for the row's picture or its three frames."""
    if row.video:  # pooled to 4 x 4 a frame, OneVision with a line end; VideoLlava: all and CLS
        return {"LlavaNextVideo": 3 * 16, "LlavaOnevision": 3 * 16 + 1, "VideoLlava": 3 * 65}[kind]
    if kind not in ("LlavaNext", "LlavaNextVideo", "LlavaOnevision"):
        return 64
    # The overview, then 16 x 16 or 8 x 16 patches and a line end for each of their rows.
    return 64 + {(200, 200): 16, (100, 200): 8}[row.size] * 17


def batch(kind: str, rows: list[Row], side: str = "left") -> dict[str, torch.Tensor]:
    """The rows as one padded batch."""
    ids, pixels = [], [pixels_of(kind, row) for row in rows]
    for row in rows:
        generator = torch.Generator().manual_seed(row.seed)
        text = torch.randint(3, 110, (row.before + row.after,), generator=generator)
        token = VIDEO if row.video else IMAGE
        placeholders = torch.full((untouched_tokens(kind, row),), token)
        ids.append(torch.cat([text[: row.before], placeholders, text[row.before :]]))
    pad = {"batch_first": True, "padding_side": side}
    names = {name: None for picture in pixels for name in picture}
    return {
        "input_ids": nn.utils.rnn.pad_sequence(ids, padding_value=PAD, **pad),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], **pad),
        **{name: torch.cat([picture[name] for picture in pixels if name in picture]) for name in names},
    }


def labelled(kind: str, rows: list[Row], side: str = "right") -> dict[str, torch.Tensor]:
    """A batch with the text behind each picture as labels, and the first ids, which count when not padded."""
    inputs = batch(kind, rows, side)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    return inputs | {"labels": labels.masked_fill(inputs["attention_mask"] == 0, -100)}


def lengths_seen(model) -> list[int]:
    """How many positions each call of the language model gets from now on."""
    seen: list[int] = []
    model.model.language_model.register_forward_hook(
        lambda _m, _a, kwargs, _o: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    return seen


def processor() -> tf.LlavaProcessor:
    """A LlavaProcessor with a tokenizer of words w3 ... w109."""
    words = {"<pad>": PAD, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, IMAGE)}, "<image>": IMAGE}
    words |= {f"w{i}": i for i in range(IMAGE + 1, TEXT["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    images = tf.CLIPImageProcessorPil(
        size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}, do_convert_rgb=True
    )
    return tf.LlavaProcessor(
        images,
        fast,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )
