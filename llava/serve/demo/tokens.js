// Pointing at a patch, tapping it or going there with the arrow keys lights up all patches that share its token.
// Each svg.view carries, for its patches in raster order, `data-row`: their token (-1: dropped), and `data-kept`:
// 1 where the token stands for that very patch.
const cell = (patch, columns) => [patch % columns, Math.floor(patch / columns)];

function light(svg, patch) {
  const columns = +svg.dataset.columns;
  const row = JSON.parse(svg.dataset.row), kept = JSON.parse(svg.dataset.kept);
  const token = row[patch];
  svg.dataset.at = patch;
  const same = [...row.keys()].filter((other) => token >= 0 && row[other] === token);
  const squares = (patches) => patches.map((p) => `M${cell(p, columns).join(" ")}h1v1h-1z`).join("");
  svg.querySelector("clipPath path").setAttribute("d", squares(same));
  svg.querySelector(".edge").setAttribute("d", squares(same.filter((p) => !kept[p])));
  svg.querySelector(".heart").setAttribute("d", squares(same.filter((p) => kept[p])));
  svg.querySelector(".here").setAttribute("d", squares([patch]));
  svg.classList.add("lit");
  const at = (p) => `row ${cell(p, columns)[1] + 1}, column ${cell(p, columns)[0] + 1}`;
  const merged = same.filter((p) => !kept[p]).length;
  const heart = same.find((p) => kept[p]);
  const patches = `${merged} ${merged === 1 ? "patch" : "patches"}`;
  tell(
    token < 0 ? `The patch at ${at(patch)} was dropped.`
    : heart === undefined ? `${patches} share one token.`
    : `Kept: the patch at ${at(heart)}, ${merged ? `with ${patches} merged into it` : "nothing merged into it"}.`
  );
}

function clear(svg) {
  svg.classList.remove("lit");
  delete svg.dataset.at;
  tell("");
}

function tell(text) {
  const line = element.querySelector(".told");
  line.textContent = text || line.dataset.hint;
}

function under(event) {
  const svg = event.target.closest("svg.view");
  if (!svg) return [null];
  const box = svg.getBoundingClientRect(), columns = +svg.dataset.columns, rows = +svg.dataset.rows;
  const x = Math.floor(((event.clientX - box.left) / box.width) * columns);
  const y = Math.floor(((event.clientY - box.top) / box.height) * rows);
  return x < 0 || y < 0 || x >= columns || y >= rows ? [null] : [svg, y * columns + x];
}

let last = null; // the view that is lit
function point(event) {
  const [svg, patch] = under(event);
  if (last && last !== svg) clear(last);
  last = svg;
  if (svg && +svg.dataset.at !== patch) light(svg, patch);
}
element.addEventListener("pointermove", (event) => event.pointerType === "mouse" && point(event));
element.addEventListener("click", point);
element.addEventListener("pointerleave", (event) => {
  if (event.pointerType === "mouse" && last) clear(last);
});
element.addEventListener("keydown", (event) => {
  const svg = event.target.closest("svg.view");
  if (!svg) return;
  const columns = +svg.dataset.columns, rows = +svg.dataset.rows;
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (event.key === "Escape") clear(svg);
  if (!step) return;
  event.preventDefault();
  const [x, y] = "at" in svg.dataset ? cell(+svg.dataset.at, columns) : [columns >> 1, rows >> 1];
  const inside = (value, most) => Math.min(Math.max(value, 0), most - 1);
  light(svg, inside(y + step[1], rows) * columns + inside(x + step[0], columns));
  last = svg;
});
