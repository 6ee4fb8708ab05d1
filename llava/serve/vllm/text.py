"""From a prompt to ids as in training: the tokenizer that vLLM uses."""

from pathlib import Path

from transformers import BatchEncoding, LlamaTokenizer, PreTrainedTokenizerFast
from vllm.tokenizers.hf import get_cached_tokenizer

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates, default_conv_mode
from llava.mm_utils import get_model_name_from_path, image_tag
from llava.serve.vllm.config import load_config
from llava.serve.vllm.template import chat_template, spelled_bos


class _PieceByPiece:
    """Encodes each piece between two `<image>` by itself, as `llava.mm_utils.tokenizer_image_token` does.

    Encoded whole, a sentencepiece tokenizer would lose the space in front of a piece and all ids after it
    would differ. A chat prompt spells its BOS and is encoded without special tokens; the model saw it encoded
    with them, which is not the same for every tokenizer, so the one is made the other.
    """

    def _encode_plus(self, text, *args, add_special_tokens: bool = True, **kwargs) -> BatchEncoding:
        encode = super()._encode_plus
        if isinstance(text, str):
            added = encode("", add_special_tokens=True)["input_ids"]
            if added and not add_special_tokens and text.startswith(self.bos_token):
                text, add_special_tokens = text.removeprefix(self.bos_token), True
            if DEFAULT_IMAGE_TOKEN in text:
                first, *rest = text.split(DEFAULT_IMAGE_TOKEN)
                ids = encode(first, add_special_tokens=add_special_tokens)["input_ids"]
                for piece in rest:
                    ids += [self.image_token_id, *encode(piece, add_special_tokens=False)["input_ids"]]
                return BatchEncoding({"input_ids": ids, "attention_mask": [1] * len(ids)})
        return encode(text, *args, add_special_tokens=add_special_tokens, **kwargs)

    @property
    def image_token_id(self) -> int:
        """The id of `<image>`: there is one, so that K of them can stand where K visual tokens go."""
        return self.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)


class _SentencePiece(_PieceByPiece, LlamaTokenizer):
    pass


class _ByteLevel(_PieceByPiece, PreTrainedTokenizerFast):
    pass


class LlavaTokenizer:
    """What vLLM's tokenizer registry calls: our loader, never AutoTokenizer."""

    @classmethod
    def from_pretrained(cls, path: str | Path, *args, truncation_side: str = "left", **kwargs):
        """The tokenizer with `<image>` and a chat template; vLLM's other keywords concern AutoTokenizer."""
        config, tokenizer = load_config(path)
        conversation = conv_templates[default_conv_mode(get_model_name_from_path(str(path)), tokenizer)]
        tokenizer.chat_template = chat_template(
            conversation, bos=spelled_bos(tokenizer), image=image_tag(config.mm_use_im_start_end)
        )
        tokenizer.truncation_side = truncation_side
        tokenizer.__class__ = _SentencePiece if isinstance(tokenizer, LlamaTokenizer) else _ByteLevel
        return get_cached_tokenizer(tokenizer)
