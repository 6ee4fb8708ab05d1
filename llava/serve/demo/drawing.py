"""The page's pictures as HTML: what was kept of an image, the attention behind it, answers side by side."""

import base64
import io
import json
from html import escape

import numpy as np
from PIL import Image

from llava.engine import Answer, Look
from llava.pictures import Assignment, canvas, paint
from llava.reducers.prumerge import outlier_fence
from llava.reducers.scores import patch_scores


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def kept_tokens(look: Look, squares: list[Image.Image], across: int, spec: str) -> str:
    """A look at an image: its views in their places, what became of their patches, the curve of attention.

    Args:
        squares: the T views as pictures.
        across: tiles beside one another where there are several views.
        spec: the reducer's.
    """
    grid = look.features.grid
    views = [Assignment.of(reduced) for reduced in look.reduced]
    drawn = [
        _view(number, square, patches, grid)
        for number, (square, patches) in enumerate(zip(squares, views, strict=True))
    ]
    overview, tiles = drawn[0], "".join(drawn[1:])
    tiles = tiles and f'<div class="tiles" style="--across: {across}">{tiles}</div>'
    total, tokens = sum(len(view.row) for view in views), sum(view.tokens for view in views)
    kept = sum(int(view.kept.sum()) for view in views)
    merged = sum(int(view.merged.sum()) for view in views)
    facts = [f"<b>{kept}</b> patches kept, bright" if kept else "no single patch kept"]
    facts += [f"<b>{merged}</b> merged, in the colour of their token"] * (merged > 0)
    facts += [f"<b>{tokens - kept}</b> more for what was left"] * (0 < kept < tokens)
    facts += [f"<b>{total - kept - merged}</b> dropped, dark"] * (total > kept + merged)
    where = f" in {len(views)} views, padding included" if tiles else ""
    return f"""
<figure class="kept" data-tokens="{tokens}">
  <figcaption><strong>{tokens} of {total}</strong> visual tokens{where}
    <span class="spec">{escape(spec)}</span></figcaption>
  <div class="views">{overview}{tiles}</div>
  <p class="told" aria-live="polite" data-hint="{HINT}">{HINT}</p>
  <p class="facts">{" · ".join(facts)}</p>
  {_curve(look, views[0]) if look.features.has_cls else ""}
</figure>"""


HINT = "Point at a patch or tap it to see all of its token; arrow keys move."


def _view(number: int, square: Image.Image, patches: Assignment, grid: tuple[int, int]) -> str:
    """One view; tokens.js lights up what `data-row` and `data-kept` say, by the paths that are empty here."""
    rows, columns = grid
    whole = canvas(square, grid)
    name = "The picture as the model sees it" if number == 0 else f"Tile {number}"
    kept = int(patches.kept.sum())
    size = f'width="{columns}" height="{rows}"'
    return f"""
<svg class="view" viewBox="0 0 {columns} {rows}" role="img" tabindex="0" data-rows="{rows}"
  data-columns="{columns}" data-row="{json.dumps(patches.row.tolist())}"
  data-kept="{json.dumps(patches.kept.astype(int).tolist())}"
  aria-label="{name}: {kept} of {len(patches.row)} patches kept, {int(patches.merged.sum())} merged.">
  <image href="{data_url(paint(whole, patches, grid, tint=True))}" {size}/>
  <g class="light">
    <rect {size}/>
    <clipPath id="lit-{number}"><path/></clipPath>
    <image href="{data_url(whole)}" {size} clip-path="url(#lit-{number})"/>
    <path class="edge"/><path class="heart"/><path class="here"/>
  </g>
</svg>"""


def _curve(look: Look, patches: Assignment) -> str:
    """Attention of the first view's patches by rank on a logarithmic scale, kept ones marked; the fence."""
    scores, ranked = patch_scores(look.features)[0].double().sort(descending=True, stable=True)
    fence, order = float(outlier_fence(scores)), ranked.cpu().numpy()
    level = np.log(np.maximum(scores.cpu().numpy(), 1e-12))
    low, high = np.quantile(level, 0.02) - 0.3, level[0]
    height = 100 * np.clip((np.append(level, np.log(fence)) - low) / (high - low), 0, 1)

    def bars(mask: np.ndarray) -> str:
        return "".join(f"M{rank} 100v{-height[rank]:.1f}h1V100z" for rank in np.flatnonzero(mask))

    kept, y = patches.kept[order], 100 - height[-1]
    above = int((scores > fence).sum())
    where = " in the whole picture" if len(look.reduced) > 1 else ""
    return f"""
  <svg class="curve" viewBox="0 0 {len(order)} 100" preserveAspectRatio="none" role="img"
    aria-label="Attention of the patches from the largest to the smallest; {above} lie above the fence.">
    <path class="rest" d="{bars(~kept)}"/><path class="chosen" d="{bars(kept)}"/>
    <line x1="0" x2="{len(order)}" y1="{y:.1f}" y2="{y:.1f}"/>
  </svg>
  <p class="facts">How much CLS attends to each patch{where}, from most to least, logarithmic.
    <i class="chosen"></i> kept. <i class="fence"></i> the fence Q3 + 1.5 (Q3 − Q1):
    <b>{above}</b> patches are above it.</p>"""


def side_by_side(question: str, answers: dict[str, Answer | None]) -> str:
    """The answers to a question by the name of how its image was read; None: not there yet."""
    given = [answer.timing.total_ms for answer in answers.values() if answer and answer.timing]
    cards = "".join(_card(name, answer, max(given, default=1)) for name, answer in answers.items())
    return f'<section class="compare"><h2>{escape(question)}</h2><div>{cards}</div></section>'


def _card(name: str, answer: Answer | None, longest: float) -> str:
    if answer is None:
        return f'<article aria-busy="true"><h3>{escape(name)}</h3><p class="answer">…</p></article>'
    rows = {"visual tokens": f"{sum(answer.visual_tokens):,}"} if answer.visual_tokens else {}
    bar = ""
    if took := answer.timing:
        known = {"vision": took.vision_ms, "prefill": took.prefill_ms}
        phases = {name: ms for name, ms in known.items() if ms}  # a server does not tell all
        phases["decoding"] = took.total_ms - sum(phases.values())
        parts = [
            f'<i class="{name}" style="width:{100 * ms / longest:.1f}%"></i>' for name, ms in phases.items()
        ]
        bar = f'<div class="bar" aria-hidden="true">{"".join(parts)}</div>'
        rows |= {name: f"{ms:,.0f} ms" for name, ms in {**phases, "total": took.total_ms}.items()}
    facts = [
        f'<div class="{name.split()[0]}"><dt>{name}</dt><dd>{value}</dd></div>'
        for name, value in rows.items()
    ]
    head = f'<h3>{escape(name)}</h3><p class="answer">{escape(answer.text)}</p>'
    return f"<article>{head}{bar}<dl>{''.join(facts)}</dl></article>"
