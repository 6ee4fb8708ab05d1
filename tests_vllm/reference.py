"""What the plug-in is compared with: `load_pretrained_model` and `generate`, one prompt at a time."""

from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.question import QuestionReader

SPECS = ("none", "prumerge+(max_tokens=144)", "prumerge", "topk(tokens=16)", "random(tokens=16)")


def prompt_of(conv_mode: str, *texts: str) -> str:
    """The prompt of a conversation whose last turn, the assistant's, is still to come."""
    conversation = conv_templates[conv_mode].copy()
    for index, text in enumerate((*texts, None)):
        conversation.append_message(conversation.roles[index % 2], text)
    return conversation.get_prompt()


def greedy_ids(
    loaded, prompt: str, images=(), *, reducer: str = "none", question: str = "", new: int = 16
) -> list[int]:
    """New ids, the end token included where it was reached."""
    tokenizer, model, processor = loaded
    visual = []
    if images:
        made = model.make_reducer(reducer)
        text = QuestionReader(model, tokenizer)(question, made)
        pixels, sizes = process_images(images, processor, model.config), [image.size for image in images]
        visual = model.embed_images(pixels, sizes, [made] * len(images), [text] * len(images))
    found = model.generate(
        tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None],
        visual_embeds=visual,
        do_sample=False,
        max_new_tokens=new,
        pad_token_id=tokenizer.pad_token_id,
    )
    return found[0].tolist()
